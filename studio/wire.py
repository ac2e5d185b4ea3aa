"""What is said in JSON between the page, or another client, and the server; and how much may be asked."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from studio.gate import MAX_BODY
from studio.queue import State
from train.generate.sampler import STRENGTH, STRENGTH_MASK

MAX_STEPS = 150
MAX_NUMBER = 16  # pictures of one job
MAX_PROMPT = 2000  # characters; CLIP reads 77 tokens
MAX_GUIDANCE = 30.0
MAX_TIMES = 4
"""Pictures may have so many times the pixels that the model draws by itself: memory for attention grows with their
square, and where it runs out on a CPU, the kernel ends the whole process."""
MAX_INPUT = 16_000_000
"""Pixels of a picture to begin with (4,000 x 4,000), and of an enlarged one; checked before anything is decoded."""


class ErrorView(BaseModel):
    """Every error."""

    error: str = Field(description="what is wrong")
    hint: str = Field(description="what to do about it, where that is not plain")


class JobRequest(BaseModel):
    """One or more pictures to draw. What is left out is what suits the model."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(max_length=MAX_PROMPT)
    negative: str = Field("", max_length=MAX_PROMPT, description="what should not be in it")
    number: int = Field(1, ge=1, le=MAX_NUMBER, description="pictures; their seeds follow each other")
    seed: int | None = Field(None, ge=0, lt=2**32, description="of the first; null: a random one")
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance: float | None = Field(None, ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)
    width: int | None = Field(None, ge=8, le=8192, description="pixels")
    height: int | None = Field(None, ge=8, le=8192, description="pixels")
    scheduler: str | None = Field(None, max_length=100, description="one of those that GET /api/model names")
    image: str | None = Field(None, description="to begin with: base64 of a PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF")
    strength: float | None = Field(None, ge=0, le=1, allow_inf_nan=False, description="how much of it is drawn anew")
    mask: str | None = Field(
        None,
        description="base64, as large as the image: white is drawn anew; or what is painted on a transparent one",
    )
    upscale: int = Field(1, ge=1, le=4, description="times; with an image that image is enlarged")

    @field_validator("prompt", "negative", "scheduler")
    @classmethod
    def _is_text(cls, text: str | None) -> str | None:
        for character in text or "":
            if "\ud800" <= character <= "\udfff" or (character < " " and character not in "\t\n\r"):
                raise ValueError(f"the character {character!r} can't be in a text")
        return text


class FactsView(BaseModel):
    """What a picture's file says of itself, as far as it is looked at here; other programs write such files too."""

    model_config = ConfigDict(extra="allow", strict=True)

    prompt: str = Field("", max_length=20_000)
    negative: str = Field("", max_length=20_000)
    seed: int = Field(0, ge=0, lt=2**32)
    steps: int = Field(1, ge=1, le=1000)
    guidance: float = Field(1, ge=0, le=100, allow_inf_nan=False)
    width: int = Field(8, ge=1, le=10**6)
    height: int = Field(8, ge=1, le=10**6)
    scheduler: str = Field("", max_length=100)
    strength: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    upscale: int = Field(1, ge=1, le=100)
    nsfw: NsfwView | None = None


class NsfwView(BaseModel):
    """What the detector said of a picture."""

    model_config = ConfigDict(extra="allow", strict=True)

    flagged: bool
    blurred: bool
    score: float = Field(allow_inf_nan=False)
    threshold: float = Field(allow_inf_nan=False)


class ImageLink(BaseModel):
    """A picture's file."""

    name: str = Field(description="its number in the folder, such as 000007")
    url: str


class ImageView(ImageLink):
    """A finished picture."""

    facts: dict[str, Any] = Field(description="what the PNG carries: prompt, settings, model, versions, NSFW score")


class ImagesView(BaseModel):
    """Finished pictures, newest first."""

    pictures: list[ImageView]
    more: bool = Field(description="whether there are older ones")


class JobView(BaseModel):
    """How far a job is."""

    id: str
    state: State
    position: int | None = Field(description="of a queued one: jobs that are finished before it; else null")
    step: int = Field(description="steps done, of all its pictures")
    of: int = Field(description="steps in all; 0 before the first")
    pictures: list[ImageLink] = Field(description="those that are finished")
    error: str = Field(description="of a failed one: why")
    note: str = Field(description="what else there is to know: the end of a prompt that the model does not read")
    cost: str = Field(description="of an enlargement in many tiles: how many, and how long that takes, once known")
    asked: dict[str, Any] = Field(description="what was asked for, without pictures")
    at: float = Field(description="when it was asked for, seconds since 1970")
    mine: bool = Field(description="whether it is the asker's own")


class JobsView(BaseModel):
    """Jobs that wait, are drawn, or ended lately: newest first."""

    jobs: list[JobView]
    more: bool = Field(description="whether there are older ones")


class Defaults(BaseModel):
    """What is taken for what is left out."""

    width: int
    height: int
    steps: int
    guidance: float
    scheduler: str
    strength: float = STRENGTH
    strength_mask: float = STRENGTH_MASK


class Limits(BaseModel):
    """What is refused above."""

    pixels: int
    steps: int = MAX_STEPS
    guidance: float = MAX_GUIDANCE
    number: int = MAX_NUMBER
    prompt: int = MAX_PROMPT
    input_pixels: int = MAX_INPUT
    body: int = MAX_BODY


class ModelView(BaseModel):
    """What pictures are drawn with."""

    name: str
    device: str
    step: int = Field(description="sides are multiples of this, in pixels")
    schedulers: list[str]
    inpaints_only: bool = Field(description="whether every drawing needs an image and a mask")
    unsafe_from: float = Field(description="the NSFW score from which on a picture is flagged")
    blurs: bool = Field(description="whether flagged pictures are blurred")
    defaults: Defaults
    limits: Limits


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorView, "description": what}
    for status, what in (
        (400, "no request that could be understood"),
        (401, "a token is needed"),
        (403, "not from here, or not yours"),
        (404, "there is no such thing"),
        (405, "this address does not do that"),
        (408, "the request did not arrive in time"),
        (413, "too large"),
        (415, "not JSON"),
        (422, "something in it can't be"),
        (429, "too many of yours are waiting, or too many wrong tokens came from your address"),
        (431, "too many headers"),
        (500, "an error of the server's own; its log says more"),
        (503, "the queue is full, or the folder of pictures is not there"),
    )
}
"""What each address may answer beside what it is for."""

ERRORS_OF_FILES: dict[int | str, dict[str, Any]] = {
    status: {
        "description": error["description"],
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for status, error in ERRORS.items()
}
"""The same, of addresses whose answer is no JSON: else FastAPI describes errors in the kind of the answer."""
