"""What can be asked of a model: one image's request, with everything filled in that suits the model, and as JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from aesthetic.untrusted import error_line, first_three
from train.generate.files import pixels_digest
from train.models.info import ModelInfo
from train.models.schedulers import check_steps, new_scheduler, scheduler_name, share_of_steps

if TYPE_CHECKING:
    from PIL import Image

STRENGTH, STRENGTH_MASK, STRENGTH_UPSCALE = 0.8, 1.0, 0.3
"""How much is regenerated where nothing is asked: diffusers' own defaults of image-to-image and inpainting; for
enlarging so little that things stay what they are."""

SEEDS = 2**32
"""Seeds are below this."""

MAX_SIDE = 16_384
"""Pixels of a side that can be asked for."""

_PLAIN = ("prompt", "negative", "seed", "steps", "guidance", "width", "height", "scheduler", "strength", "upscale")


@dataclass(frozen=True)
class GenerationRequest:
    """One image: all that it depends on beside the model. None: what suits the model. UserError where it can't be."""

    prompt: str
    negative: str = ""  # what should not be in it; works by guidance, so none below 1
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None  # classifier-free guidance scale; 1 and less: off
    width: int | None = None  # pixels
    height: int | None = None
    scheduler: str | None = None  # a class of diffusers, with or without "Scheduler"
    image: Image.Image | None = None  # to begin with
    strength: float | None = None  # 0 to 1: how much of the steps is done, and of the image replaced by noise before
    mask: Image.Image | None = None  # white is regenerated; as large as the image
    upscale: int = 1  # times; with an image and no mask that image is enlarged

    def __post_init__(self) -> None:
        if len(self.prompt) > 10_000 or len(self.negative) > 10_000:
            raise UserError("a prompt of more than 10,000 characters: a model reads some hundred at most")
        if any("\ud800" <= c <= "\udfff" for c in self.prompt + self.negative):
            raise UserError("the prompt is no text: it holds bytes that are not UTF-8")
        if not 0 <= self.seed < SEEDS:
            raise UserError(f"seed {self.seed}: a whole number from 0 to {SEEDS - 1} is expected")
        if self.steps is not None and not 1 <= self.steps <= 1000:
            raise UserError(f"steps {self.steps}: 1 to 1000 are expected")
        if self.guidance is not None and not 0 <= self.guidance <= 100:
            raise UserError(f"guidance {self.guidance:g}: 0 to 100 are expected (7.5 is usual)")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise UserError(f"strength {self.strength:g}: 0 to 1 are expected")
        if not 1 <= self.upscale <= 4:
            raise UserError(f"upscale {self.upscale}: 1 to 4 times are possible")
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and not 1 <= side <= MAX_SIDE:
                raise UserError(f"{name} {side}: 1 to {MAX_SIDE:,} pixels are expected")
        if (self.width is None) != (self.height is None):
            raise UserError("give both width and height, or none of them")
        if self.mask is not None:
            if self.image is None:
                raise UserError("a mask says what of an image is regenerated: give that image too")
            if self.mask.size != self.image.size:
                sizes = "{} x {}, not {} x {}".format(*self.mask.size, *self.image.size)
                raise UserError(f"the mask has another size than the image: {sizes}")
            if self.upscale > 1:
                raise UserError("a mask and enlarging are two things: draw first, then enlarge the result")
        if self.strength is not None and self.image is None and self.upscale == 1:
            raise UserError("strength is for an image to begin with, or for enlarging")

    @property
    def enlarges(self) -> bool:
        """Whether its image is to be enlarged as it is, nothing generated before."""
        return self.image is not None and self.upscale > 1

    @property
    def steps_of_image(self) -> int:
        """Steps that are done from an image, of a resolved request: the share of them that `strength` is."""
        return int((self.steps or 0) * (self.strength or 0))


def resolve(info: ModelInfo, request: GenerationRequest, *, upscaler: bool = False) -> GenerationRequest:
    """The request with everything filled in that suits the model. Raises UserError where the two do not fit.

    With an `upscaler` what it enlarges is left as it is, unless a strength is asked for.
    """
    r = request
    if info.inpaints_only and r.mask is None:
        raise UserError(f"{info.name} is an inpainting model: it draws into an image, where a mask says so")
    _check_abilities(info, r)
    scheduler, steps = scheduler_name(r.scheduler, info.scheduler), r.steps or info.abilities.steps
    check_steps(scheduler, info.scheduler, steps)
    strength = r.strength
    if strength is None and r.mask is not None:
        strength = STRENGTH_MASK
    elif strength is None and r.upscale > 1:
        strength = 0.0 if upscaler else max(1 / steps, share_of_steps(STRENGTH_UPSCALE, info.scheduler))
    elif strength is None and r.image is not None:
        strength = STRENGTH
    if strength is not None and int(steps * strength) < 1 and not (r.upscale > 1 and strength == 0):
        least = f"at least {math.ceil(1 / strength)} steps" if strength else "a strength above 0"
        raise UserError(f"of {steps} steps strength {strength:g} leaves none: {least} would do")
    if strength and r.upscale > 1 and info.abilities.image is None:
        raise UserError(
            f"enlarging redraws an image in tiles, and {_no_pipeline(info, 'image-to-image')}: --strength 0 enlarges "
            "without redrawing, and so does --upscaler"
        )
    width, height = (r.width, r.height) if r.width and r.height else r.image.size if r.image else info.size
    for name, side in (("width", width), ("height", height)):
        if not r.enlarges and (side < info.step or side % info.step):
            near = max(info.step, round(side / info.step) * info.step)
            raise UserError(
                f"{name} {side} does not fit this model: sides are multiples of {info.step}. {near} would do."
            )
    guidance = info.guidance if r.guidance is None else float(r.guidance)
    return replace(
        r, scheduler=scheduler, steps=steps, strength=strength, width=width, height=height, guidance=guidance
    )


def _check_abilities(info: ModelInfo, r: GenerationRequest) -> None:
    """Raise UserError where diffusers has no pipeline for what is asked of a model of its kind."""
    if r.mask is not None and info.abilities.mask is None:
        raise UserError(f"{_no_pipeline(info, 'inpainting')}: it takes no mask")
    if r.image is not None and r.mask is None and not r.enlarges and info.abilities.image is None:
        raise UserError(f"{_no_pipeline(info, 'image-to-image')}: it draws from words alone, without an image")
    if r.negative.strip() and not info.abilities.negative:
        raise UserError(
            f"{info.name} reads no negative prompt: {info.abilities.text} weighs a prompt against none. Say in the "
            "prompt what should be in the image"
        )


def _no_pipeline(info: ModelInfo, what: str) -> str:
    return f"{info.name} is drawn with diffusers' {info.abilities.text}, which has no {what}"


def fitting_size(info: ModelInfo, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) that an image of (width, height) `size` is scaled and cut to, to begin with it.

    Its own where the model can draw that; else as many pixels as the model draws by itself, in the image's shape, as on
    the page of `tastemaker serve`.
    """
    if all(side % info.step == 0 for side in size):
        return size
    ratio = math.sqrt(math.prod(info.size) / math.prod(size))
    width, height = (max(info.step, round(side * ratio / info.step) * info.step) for side in size)
    return width, height


def check_scheduler(info: ModelInfo, r: GenerationRequest) -> None:
    """Raise UserError where diffusers can't make the scheduler of a resolved request. Loads diffusers, no weights."""
    import numpy as np

    name, path = str(r.scheduler), info.folder / "scheduler" / "scheduler_config.json"
    try:
        scheduler = new_scheduler(name, info.scheduler)
        shifted = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}  # by size, known when it is drawn
        scheduler.set_timesteps(r.steps, **shifted)
        finite = all(np.isfinite(np.asarray(getattr(scheduler, n, 0.0))).all() for n in ("timesteps", "sigmas"))
    except Exception as e:  # whatever settings that are none make of a constructor
        raise UserError(f"{name} can't draw in {r.steps} steps with the settings of {path}: {error_line(e)}") from e
    if not finite:
        raise UserError(f"{path}: with these settings {name} computes times that are no numbers")


_OTHERS = re.compile(
    r"<(?:lora|lyco|hypernet):[^<>]{1,200}>"  # AUTOMATIC1111's web UI, and those that take after it
    r"|\({1,9}[^()\[\]<>]{1,200}:\s*[+-]?\d{0,9}\.?\d{1,9}\s*\)"
    r"|\(\([^()]{1,200}\)\)"
    r"|\[[^\[\]]{1,200}\]"
    r"|\bBREAK\b"
    r"|\([^()]{1,200}\)(?:\d{1,3}\.\d{1,9}|\+{1,9})"  # compel
    r"|\bembedding:\S{1,200}"  # ComfyUI
    r"|\{[^{}]{0,200}\|[^{}]{0,200}\}"  # dynamic prompts
)


def foreign_syntax(prompts: Iterable[str]) -> str:
    """What to say of prompts that are written in the syntax of another program, in a line; "" where none is."""
    found = list(dict.fromkeys(m[0] for text in prompts for m in _OTHERS.finditer(text)))
    if not found:
        return ""
    lora = "; a LoRA is given with --lora PATH:WEIGHT" if any(text.startswith("<l") for text in found) else ""
    some = first_three(found, 60)
    return f"prompts are read as plain words: {some} would weigh or replace words in other programs, not here{lora}"


def facts_of(request: GenerationRequest) -> dict[str, Any]:
    """A resolved request as JSON; of its image and mask their digests."""
    facts: dict[str, Any] = {name: getattr(request, name) for name in _PLAIN}
    for name, image in (("image", request.image), ("mask", request.mask)):
        facts[name] = None if image is None else {"sha256": pixels_digest(image)}
    return facts


def request_of(
    facts: Mapping[str, Any], image: Image.Image | None = None, mask: Image.Image | None = None
) -> GenerationRequest:
    """The request that an image's facts tell. Raises UserError where its image or mask is absent or another one."""
    for name, given in (("image", image), ("mask", mask)):
        wanted = facts.get(name)
        if wanted and given is None:
            raise UserError(f"the image was generated with an {name} to begin with: give it too")
        if wanted and given is not None and pixels_digest(given) != wanted["sha256"]:
            raise UserError(f"the image was generated with another {name} than the one given (their pixels differ)")
    try:
        return GenerationRequest(**{name: facts[name] for name in _PLAIN}, image=image, mask=mask)
    except (KeyError, TypeError) as e:
        raise UserError(f"the image's facts are incomplete or damaged: {e}") from e
