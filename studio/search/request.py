"""What can be searched for, and how much of a request is read."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, field_validator

from aesthetic.errors import UserError
from curate.images.header import probe
from studio.bodies import check_characters, parse_body, read_input

MAX_WORDS = 1000
"""Characters of what is searched for; CLIP reads 77 tokens."""
MOST = 10_000
"""Images of a ranking: some hundreds of screens."""


class SearchRequest(BaseModel):
    """What the images should be like: words, an image of the data, another one, or several of these together."""

    model_config = ConfigDict(extra="forbid", strict=True)

    words: str | None = Field(None, max_length=MAX_WORDS, description="what should be in it")
    key: str | None = Field(None, max_length=40, description="an image of the data that it should be like")
    image: str | None = Field(
        None, description="another one that it should be like: base64 of a PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF"
    )
    without: str | None = Field(None, max_length=MAX_WORDS, description="words that it should be far from")
    limit: int = Field(MOST, ge=1, le=MOST, description="images of the ranking at most")

    @field_validator("words", "key", "without")
    @classmethod
    def _is_text(cls, text: str | None) -> str | None:
        return text and check_characters(text)


@dataclass(frozen=True)
class ParsedSearch:
    """A request as it was read; the image isn't decoded yet."""

    words: str
    key: str
    without: str
    image: bytes | None
    limit: int

    @property
    def what(self) -> str:
        """What is searched for, in words."""
        parts = [f"“{self.words}”"] if self.words else []
        parts += [f"like {self.key}"] if self.key else []
        parts += ["like the image that was dropped"] if self.image is not None else []
        return " and ".join(parts) + (f" without “{self.without}”" if self.without else "")


def parse_search(body: bytes) -> ParsedSearch:
    """Parse a request to search.

    Raises HTTPException (400, 413), RequestValidationError or UserError, which name the field where it is one's.
    """
    asked, files = parse_body(body, SearchRequest, ("image",))
    for name, data in files.items():
        read_input(name, probe, data)
    words, key, without = ((text or "").strip() for text in (asked.words, asked.key, asked.without))
    if not (words or key or without or files):
        raise UserError("there is nothing to search for: give words, the key of an image, or an image")
    return ParsedSearch(words, key, without, files.get("image"), asked.limit)
