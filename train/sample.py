"""Drawing with a model: text to image, image to image, inpainting, enlarging. A thin layer over diffusers' pipelines.

>>> from train.sample import Artist, Request
>>> artist = Artist("model")
>>> for drawn in artist.draw([Request("a red fox in the snow", seed=7)]):
...     drawn.image.save("fox.png")

A picture depends on its Request, the model, the LoRAs on it and the versions in use, on nothing else: its noise comes
from a generator of its own, on the CPU, started with its seed. Text to image with the same settings is what bare
diffusers draws, bit for bit. In a batch a GPU or CPU may round sums otherwise than for one picture alone: the starting
noise is the same, and pictures are equal but for rounding.
"""

from __future__ import annotations

import contextlib
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.store import UserError
from train.about import About, look
from train.picture import pixels_digest
from train.schedulers import new_scheduler, scheduler_name

if TYPE_CHECKING:
    import torch
    from PIL import Image

OnStep = Callable[[int, int], None]
"""Hears (steps done, steps in all) after each step. An exception in it ends the drawing: this is how to cancel."""

UNSAFE = 0.2
"""The NSFW score from which on a picture is blurred: Yahoo calls what is below 0.2 safe (README of open_nsfw). Our
recipes keep pictures for training by the same number."""

STRENGTH, STRENGTH_MASK, STRENGTH_UPSCALE = 0.8, 1.0, 0.3
"""How much is drawn anew where nothing is asked: diffusers' own defaults of image-to-image and inpainting; for
enlarging so little that things stay what they are."""

SEEDS = 2**32
"""Seeds are below this."""


@dataclass(frozen=True)
class Request:
    """One picture: all that it depends on beside the model. None: what suits the model. UserError where it can't be."""

    prompt: str
    negative: str = ""  # what should not be in it; works by guidance, so none below 1
    seed: int = 0
    steps: int = 30
    guidance: float | None = None  # classifier-free guidance scale; 1 and less: off
    width: int | None = None  # pixels
    height: int | None = None
    scheduler: str | None = None  # a class of diffusers, with or without "Scheduler"
    image: Image.Image | None = None  # to begin with
    strength: float | None = None  # 0 to 1: how much of the steps is done, and of the image replaced by noise before
    mask: Image.Image | None = None  # white is drawn anew; as large as the image
    upscale: int = 1  # times; with an image and no mask that image is enlarged

    def __post_init__(self) -> None:
        if len(self.prompt) > 10_000 or len(self.negative) > 10_000:
            raise UserError("a prompt of more than 10,000 characters: a model reads some hundred at most")
        if not 0 <= self.seed < SEEDS:
            raise UserError(f"seed {self.seed}: a whole number from 0 to {SEEDS - 1} is expected")
        if not 1 <= self.steps <= 1000:
            raise UserError(f"steps {self.steps}: 1 to 1000 are expected")
        if self.guidance is not None and not 0 <= self.guidance <= 100:
            raise UserError(f"guidance {self.guidance:g}: 0 to 100 are expected (7.5 is usual)")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise UserError(f"strength {self.strength:g}: 0 to 1 are expected")
        if not 1 <= self.upscale <= 4:
            raise UserError(f"upscale {self.upscale}: 1 to 4 times are possible")
        if (self.width is None) != (self.height is None):
            raise UserError("give both width and height, or none of them")
        if self.mask is not None and self.image is None:
            raise UserError("a mask says what of an image is drawn anew: give that image too")
        if self.mask is not None and self.image is not None and self.mask.size != self.image.size:
            raise UserError(
                "the mask has another size than the image: {} x {}, not {} x {}".format(
                    *self.mask.size, *self.image.size
                )
            )
        if self.mask is not None and self.upscale > 1:
            raise UserError("a mask and enlarging are two things: draw first, then enlarge the result")
        if self.strength is not None and self.image is None and self.upscale == 1:
            raise UserError("strength is for an image to begin with, or for enlarging")

    @property
    def enlarges(self) -> bool:
        """Whether its image is to be enlarged as it is, nothing drawn before."""
        return self.image is not None and self.upscale > 1


@dataclass(frozen=True)
class Drawn:
    """A finished picture."""

    request: Request  # with nothing left to suit the model
    image: Image.Image  # what may be shown: blurred where it is flagged
    nsfw: float  # the project's detector's score, 0 to 1
    flagged: bool  # nsfw >= UNSAFE
    facts: dict[str, Any]  # what its PNG carries (`train.picture.png`)


@dataclass(frozen=True)
class Lora:
    """Low-rank matrices to lay over a model: a file of safetensors, or the folder of one."""

    path: Path
    weight: float = 1.0


def settled(about: About, request: Request) -> Request:
    """The request with everything filled in that suits the model. Raises UserError where the two do not fit."""
    r = request
    if about.inpaints_only and r.mask is None:
        raise UserError(f"{about.name} is an inpainting model: it draws into an image, where a mask says so")
    name = scheduler_name(r.scheduler, about.scheduler)
    strength = r.strength
    if strength is None and (r.image is not None or r.upscale > 1):
        strength = STRENGTH_MASK if r.mask is not None else STRENGTH if r.upscale == 1 else STRENGTH_UPSCALE
    if strength is not None and int(r.steps * strength) < 1 and not (r.upscale > 1 and strength == 0):
        least = f"at least {math.ceil(1 / strength)} steps" if strength else "a strength above 0"
        raise UserError(f"of {r.steps} steps strength {strength:g} leaves none: {least} would do")
    width, height = (r.width, r.height) if r.width and r.height else r.image.size if r.image else about.size
    if not r.enlarges:
        _check_side("width", width, about.step)
        _check_side("height", height, about.step)
    guidance = about.guidance if r.guidance is None else float(r.guidance)
    return replace(r, scheduler=name, strength=strength, width=width, height=height, guidance=guidance)


def _check_side(name: str, pixels: int, step: int) -> None:
    if pixels < step or pixels % step:
        raise UserError(
            f"{name} {pixels} does not fit this model: sides are multiples of {step}. "
            f"{max(step, round(pixels / step) * step)} would do."
        )


class Artist:
    """A model that is loaded and ready to draw. Not for several threads at once."""

    def __init__(
        self,
        model: About | str | Path,
        *,
        loras: Sequence[Lora] = (),
        batch: int = 1,
        size: tuple[int, int] | None = None,
        blur: bool = True,
        device: torch.device | None = None,
    ) -> None:
        """Load a model. Raises UserError where it, or a LoRA, can't be loaded.

        Args:
            batch: pictures that are drawn at once at most.
            size: (width, height) in pixels of the largest that will be drawn; memory is saved as these need it.
            blur: pictures that the NSFW detector flags.
        """
        from curate.detectors import load_detector
        from train import devices
        from train.model import load_model

        self.about = model if isinstance(model, About) else look(model)
        self.batch, self.blur = batch, blur
        self.device = device or devices.device_here()
        self.dtype = devices.precision(self.device, self.about)
        pipeline = load_model(self.about.folder, self.dtype)
        pipeline.set_progress_bar_config(disable=True)
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            module.requires_grad_(False).eval()
        sizes = [sum(p.numel() * p.element_size() for p in m.parameters())
                 for m in (pipeline.unet, pipeline.vae, pipeline.text_encoder)]  # fmt: skip
        cost = devices.cost_of(self.about, sizes, self.dtype.itemsize)
        self.measures = devices.choose(
            devices.free_memory(self.device), cost, *(size or self.about.size), batch, kind=self.device.type
        )
        devices.apply(self.measures, pipeline, self.device)
        self._text = pipeline
        self._detector = load_detector("open-nsfw")

    def __str__(self) -> str:
        """Device, precision and measures, in a line."""
        return f"{self.device.type}, {str(self.dtype).removeprefix('torch.')}, {self.measures}"

    def check(self, request: Request) -> Request:
        """The request with nothing left open (see `settled`). Raises UserError where it does not fit the model."""
        return settled(self.about, request)

    def draw(self, requests: Iterable[Request], on_step: OnStep | None = None) -> Iterator[Drawn]:
        """Draw pictures, in this order; each comes when its batch is finished.

        Raises UserError before the first is begun where one does not fit.
        """
        checked = [self.check(r) for r in requests]
        steps = _Steps(on_step, sum(map(_work, checked)))
        for _, alike in groupby(checked, _key):
            group = list(alike)
            for start in range(0, len(group), self.batch):
                part = group[start : start + self.batch]
                for request, image in zip(part, self._drawn(part, steps), strict=True):
                    yield self._finished(request, image)

    def _drawn(self, group: Sequence[Request], steps: _Steps) -> list[Image.Image]:
        """Pictures of requests that differ in prompts and seeds alone."""
        one = group[0]
        return self._run(
            self._text, group, [generator(r.seed) for r in group], one.steps, steps, width=one.width, height=one.height
        )

    def _run(
        self, pipeline: Any, group: Sequence[Request], generators: Sequence[torch.Generator], planned: int,
        steps: _Steps, **more: Any,
    ) -> list[Image.Image]:  # fmt: skip
        """One call of a diffusers pipeline."""
        one = group[0]
        pipeline.scheduler = new_scheduler(str(one.scheduler), self.about.scheduler)
        began = steps.done

        def tell(pipeline: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
            steps.to(began + len(group) * planned * (i + 1) // pipeline.num_timesteps)
            return {}

        try:
            images: list[Image.Image] = pipeline(
                [r.prompt for r in group], negative_prompt=[r.negative for r in group], num_inference_steps=one.steps,
                guidance_scale=one.guidance, generator=list(generators), callback_on_step_end=tell, **more,
            ).images  # fmt: skip
        finally:
            self._text.maybe_free_model_hooks()
        return images

    def _finished(self, request: Request, image: Image.Image) -> Drawn:
        """Looked at, blurred where that is asked, with its facts."""
        import numpy as np
        from PIL import ImageFilter

        score = float(self._detector.score_prepared(self._detector.preprocess(np.asarray(image))[None])[0])
        flagged = score >= UNSAFE
        blurred = flagged and self.blur
        if blurred:
            image = image.filter(ImageFilter.GaussianBlur(max(image.size) / 12))
        nsfw = {"score": score, "threshold": UNSAFE, "flagged": flagged, "blurred": blurred}
        return Drawn(request, image, score, flagged, {**facts_of(request), **self._facts, "nsfw": nsfw})

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """What is the same for all pictures."""
        return {
            "model": {"name": self.about.name, "sha256": self.about.digest},
            "data_manifest_sha256": self.about.manifest,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "made_with": versions(),
        }


def generator(seed: int) -> torch.Generator:
    """Noise of a picture: on the CPU, where every machine draws the same."""
    import torch

    return torch.Generator().manual_seed(seed)


def _key(r: Request) -> tuple[Any, ...]:
    """What pictures of one batch have in common."""
    kind = (r.image is not None, r.mask is not None)
    return r.steps, r.guidance, r.width, r.height, r.scheduler, r.strength, r.upscale, kind


def _work(r: Request) -> int:
    """Steps of a request."""
    return r.steps


class _Steps:
    """Counts what is done of all, and tells."""

    def __init__(self, tell: OnStep | None, total: int) -> None:
        self._tell, self._total, self.done = tell, total, 0

    def to(self, done: int) -> None:
        """So many are done."""
        self.done = done
        if self._tell:
            self._tell(done, self._total)


# ------------------------------------------------------------------------------------------------------------- facts


def facts_of(request: Request) -> dict[str, Any]:
    """A settled request as JSON; of its image and mask their digests."""
    plain = ("prompt", "negative", "seed", "steps", "guidance", "width", "height", "scheduler", "strength", "upscale")
    facts: dict[str, Any] = {name: getattr(request, name) for name in plain}
    for name in ("image", "mask"):
        picture = getattr(request, name)
        facts[name] = None if picture is None else {"sha256": pixels_digest(picture)}
    return facts


def request_of(facts: Mapping[str, Any], image: Image.Image | None = None, mask: Image.Image | None = None) -> Request:
    """The request that a picture's facts tell. Raises UserError where its image or mask is absent or another one."""
    for name, picture in (("image", image), ("mask", mask)):
        wanted = facts.get(name)
        if wanted and picture is None:
            raise UserError(f"the picture was drawn with an {name} to begin with: give it too")
        if wanted and picture is not None and pixels_digest(picture) != wanted["sha256"]:
            raise UserError(f"the picture was drawn with another {name} than the one given (their pixels differ)")
    plain = ("prompt", "negative", "seed", "steps", "guidance", "width", "height", "scheduler", "strength", "upscale")
    try:
        return Request(**{name: facts[name] for name in plain}, image=image, mask=mask)
    except (KeyError, TypeError) as e:
        raise UserError(f"the picture's facts are incomplete or damaged: {e}") from e


def versions() -> dict[str, str]:
    """Of what a picture's bits depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("tastemaker", "torch", "diffusers", "transformers", "peft"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
