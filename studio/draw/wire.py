"""What page, or another client, and server say to each other in JSON to draw.

`parse_request` is work for threads, of which a `BoundedExecutor` has few, so that it can hold up neither the event loop
nor the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from curate.images.header import probe
from studio.bodies import MAX_INPUT, check_characters, parse_body, read_input
from studio.gate import MAX_BODY
from studio.queue import State
from train.generate.request import STRENGTH, STRENGTH_MASK

MAX_STEPS = 150
MAX_NUMBER = 16  # images of one job
MAX_PROMPT = 2000  # characters; CLIP reads 77 tokens
MAX_GUIDANCE = 30.0
MAX_TIMES = 4
"""Images may have so many times the pixels that the model draws by itself: memory for attention grows with their
square, and where it runs out on a CPU, the kernel ends the whole process."""

# ------------------------------------------------------------------------------------------------------------ schemas


class JobRequest(BaseModel):
    """One or more images to draw. What is left out is what suits the model."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(max_length=MAX_PROMPT)
    negative: str = Field("", max_length=MAX_PROMPT, description="what should not be in it")
    number: int = Field(1, ge=1, le=MAX_NUMBER, description="images; their seeds follow each other")
    seed: int | None = Field(None, ge=0, lt=2**32, description="of the first; null: a random one")
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance: float | None = Field(None, ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)
    width: int | None = Field(None, ge=8, le=8192, description="pixels")
    height: int | None = Field(None, ge=8, le=8192, description="pixels")
    scheduler: str | None = Field(None, max_length=100, description="one of those that GET /api/model names")
    image: str | None = Field(None, description="to begin with: base64 of a PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF")
    strength: float | None = Field(None, ge=0, le=1, allow_inf_nan=False, description="how much of it is regenerated")
    mask: str | None = Field(
        None, description="base64, as large as the image: white is regenerated; or what is painted on a transparent one"
    )
    upscale: int = Field(1, ge=1, le=4, description="times; with an image that image is enlarged")

    @field_validator("prompt", "negative", "scheduler")
    @classmethod
    def _is_text(cls, text: str | None) -> str | None:
        return text and check_characters(text)


class NsfwView(BaseModel):
    """What the detector said of an image."""

    model_config = ConfigDict(extra="allow", strict=True)

    flagged: bool
    blurred: bool
    score: float = Field(allow_inf_nan=False)
    threshold: float = Field(allow_inf_nan=False)


class FactsView(BaseModel):
    """What an image's file says of itself, as far as it is shown; other programs write such files too."""

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


class ImageLink(BaseModel):
    """An image's file."""

    name: str = Field(description="its number in the folder, such as 000007")
    url: str


class ImageView(ImageLink):
    """A finished image."""

    facts: dict[str, Any] = Field(description="what the PNG carries: prompt, settings, model, versions, NSFW score")


class ImagesView(BaseModel):
    """Finished images, newest first."""

    pictures: list[ImageView]
    more: bool = Field(description="whether there are older ones")


class JobView(BaseModel):
    """How far a job is."""

    id: str
    state: State
    position: int | None = Field(description="of a queued one: jobs that are finished before it; else null")
    step: int = Field(description="steps done, of all its images")
    of: int = Field(description="steps in all; 0 before the first")
    pictures: list[ImageLink] = Field(description="those that are finished")
    error: str = Field(description="of a failed one: why")
    note: str = Field(description="what else there is to know: the end of a prompt that the model does not read")
    cost: str = Field(description="of an enlargement in many tiles: how many, and how long that takes, once known")
    asked: dict[str, Any] = Field(description="what was asked for, without images")
    at: float = Field(description="when it was asked for, seconds since 1970")
    mine: bool = Field(description="whether it is the asker's own")


class JobsView(BaseModel):
    """Jobs that wait, are generated, or ended lately: newest first."""

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
    """What images are generated with."""

    name: str
    device: str
    step: int = Field(description="sides are multiples of this, in pixels")
    schedulers: list[str]
    inpaints_only: bool = Field(description="whether every drawing needs an image and a mask")
    takes_image: bool = Field(description="whether it can begin with an image, and so redraw one that is enlarged")
    takes_mask: bool = Field(description="whether it can redraw parts of an image")
    takes_negative: bool = Field(description="whether it reads negative prompts")
    unsafe_from: float = Field(description="the NSFW score from which on an image is flagged")
    blurs: bool = Field(description="whether flagged images are blurred")
    defaults: Defaults
    limits: Limits


# ----------------------------------------------------------------------------------------------------- bounded reading


@dataclass(frozen=True)
class ParsedRequest:
    """A request as it was read: nothing is decoded yet."""

    settings: JobRequest  # without images
    files: dict[str, bytes]  # by field, "image" and "mask"
    bytes: int  # of their pixels


def parse_request(body: bytes) -> ParsedRequest:
    """Parse a request to draw.

    Raises HTTPException (400, 413), RequestValidationError or UserError, which name the field where it is one's.
    """
    settings, files = parse_body(body, JobRequest, ("image", "mask"))
    sizes = [read_input(name, probe, data)[1:] for name, data in files.items()]
    return ParsedRequest(settings, files, sum(3 * width * height for width, height in sizes))
