"""Drawing with a model: text to image, image to image, inpainting, enlarging. A thin layer over diffusers' pipelines.

>>> from train.generate.sampler import GenerationRequest, Sampler
>>> sampler = Sampler("model")
>>> for generated in sampler.generate([GenerationRequest("a red fox in the snow", seed=7)]):
...     generated.image.save("fox.png")

An image depends on its GenerationRequest, the model, the LoRAs on it and the versions in use, on nothing else: its
noise comes from a generator of its own, on the CPU, started with its seed. Text to image with the same settings is what
bare diffusers draws, bit for bit. In a batch a GPU or CPU may round sums otherwise than for one image alone: the
starting noise is the same, and images are equal but for rounding.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from aesthetic.untrusted import first_three
from curate.store.files import sha256_file
from train import devices
from train.devices import out_of_memory, versions
from train.generate.files import pixels_digest
from train.generate.upscale import Network, by_tiles, cost_of, restore_faces, tile_count
from train.models.info import ModelInfo, read_model_info
from train.models.lora import Lora, add_loras, check_lora
from train.models.schedulers import check_steps, new_scheduler, scheduler_name, share_of_steps, try_steps

if TYPE_CHECKING:
    import torch
    from PIL import Image

OnStep = Callable[[int, int], None]
"""Hears (steps done, steps in all) after each step. An exception in it ends the drawing: this is how to cancel."""

DETECTOR = "open-nsfw"
"""The annotator that looks at every image that is generated."""

UNSAFE = 0.2
"""The NSFW score from which on a picture is blurred: Yahoo calls what is below 0.2 safe (README of open_nsfw). Our
recipes keep pictures for training by the same number."""

STRENGTH, STRENGTH_MASK, STRENGTH_UPSCALE = 0.8, 1.0, 0.3
"""How much is drawn anew where nothing is asked: diffusers' own defaults of image-to-image and inpainting; for
enlarging so little that things stay what they are."""

SEEDS = 2**32
"""Seeds are below this."""

LARGEST = 16_384
"""Pixels of a side that can be asked for."""


class NoImage(UserError, FloatingPointError):
    """What a model computed is not finite, and so no picture: as pixels it would be black."""


@dataclass(frozen=True)
class GenerationRequest:
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
        if any("\ud800" <= c <= "\udfff" for c in self.prompt + self.negative):
            raise UserError("the prompt is no text: it holds bytes that are not UTF-8")
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
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and not 1 <= side <= LARGEST:
                raise UserError(f"{name} {side}: 1 to {LARGEST:,} pixels are expected")
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
class Generated:
    """A finished picture."""

    request: GenerationRequest  # with nothing left to suit the model
    image: Image.Image  # what may be shown: blurred where it is flagged
    nsfw: float  # the project's detector's score, 0 to 1
    flagged: bool  # nsfw >= UNSAFE
    facts: dict[str, Any]  # what its PNG carries (`train.generate.files.png`)


def resolve(about: ModelInfo, request: GenerationRequest, *, upscaler: bool = False) -> GenerationRequest:
    """The request with everything filled in that suits the model. Raises UserError where the two do not fit.

    With an `upscaler` what it enlarges is left as it is, unless a strength is asked for.
    """
    r = request
    if about.inpaints_only and r.mask is None:
        raise UserError(f"{about.name} is an inpainting model: it draws into an image, where a mask says so")
    name = scheduler_name(r.scheduler, about.scheduler)
    check_steps(name, about.scheduler, r.steps)
    strength = r.strength
    if strength is None and (r.image is not None or r.upscale > 1):
        enlarging = 0.0 if upscaler else max(1 / r.steps, share_of_steps(STRENGTH_UPSCALE, about.scheduler))
        strength = STRENGTH_MASK if r.mask is not None else STRENGTH if r.upscale == 1 else enlarging
    if strength is not None and int(r.steps * strength) < 1 and not (r.upscale > 1 and strength == 0):
        least = f"at least {math.ceil(1 / strength)} steps" if strength else "a strength above 0"
        raise UserError(f"of {r.steps} steps strength {strength:g} leaves none: {least} would do")
    width, height = (r.width, r.height) if r.width and r.height else r.image.size if r.image else about.size
    if not r.enlarges:
        _check_side("width", width, about.step)
        _check_side("height", height, about.step)
    guidance = about.guidance if r.guidance is None else float(r.guidance)
    return replace(r, scheduler=name, strength=strength, width=width, height=height, guidance=guidance)


def fitting_size(about: ModelInfo, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) that a picture of (width, height) `size` is scaled and cut to, to begin with it.

    Its own where the model can draw that; else as many pixels as the model draws by itself, in the picture's shape, as
    on the page of `tastemaker serve`.
    """
    if all(side % about.step == 0 for side in size):
        return size
    ratio = math.sqrt(math.prod(about.size) / math.prod(size))
    width, height = (max(about.step, round(side * ratio / about.step) * about.step) for side in size)
    return width, height


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


def check_scheduler(about: ModelInfo, r: GenerationRequest) -> None:
    """Raise UserError where diffusers can't make the scheduler of a resolved request. Loads diffusers, no weights."""
    try_steps(str(r.scheduler), about.scheduler, r.steps, about.folder / "scheduler" / "scheduler_config.json")


def _check_side(name: str, pixels: int, step: int) -> None:
    if pixels < step or pixels % step:
        raise UserError(
            f"{name} {pixels} does not fit this model: sides are multiples of {step}. "
            f"{max(step, round(pixels / step) * step)} would do."
        )


class Sampler:
    """A model that is loaded and ready to draw. Not for several threads at once."""

    def __init__(
        self,
        model: ModelInfo | str | Path,
        *,
        loras: Sequence[Lora] = (),
        upscaler: Path | None = None,
        faces: Path | None = None,
        batch: int = 1,
        size: tuple[int, int] | None = None,
        blur: bool = True,
        device: torch.device | None = None,
    ) -> None:
        """Load a model. Raises UserError where it, a LoRA or other weights can't be loaded.

        Args:
            upscaler: weights that enlarge (ESRGAN and its like), in place of Lanczos.
            faces: weights that restore faces (GFPGAN), applied to every picture.
            batch: pictures that are drawn at once at most.
            size: (width, height) in pixels of the largest that will be drawn; memory is saved as these need it.
            blur: pictures that the NSFW detector flags.
        """
        from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

        from curate.annotators.registry import load_annotator
        from train.models.unet import count_parameters, load_model

        self.about = model if isinstance(model, ModelInfo) else read_model_info(model)
        self.loras, self.batch, self.blur = tuple(loras), batch, blur
        for lora in self.loras:
            check_lora(self.about, lora)
        self.device = device or devices.default_device()
        self.upscaler = Network(upscaler, "SR", self.device) if upscaler else None
        self.faces = Network(faces, "FaceSR", self.device) if faces else None
        self._others = {"upscaler": upscaler, "faces": faces}
        self.dtype = devices.precision(self.device, self.about)
        self._text = _quiet(load_model(self.about, self.dtype))
        self._scheduler = _settings_of(self._text.scheduler)
        if not isinstance(self._text.unet.config.sample_size, int):  # which image-to-image compares, and does not use
            self._text.unet.register_to_config(sample_size=64)
        self.notes = add_loras(self._text, self.loras, self.about.name)  # what is to be said, a line each
        parts = (self._text.unet, self._text.vae, self._text.text_encoder)
        for part in parts:
            part.requires_grad_(False).eval()
        sizes = [count_parameters([part]) * self.dtype.itemsize for part in parts]
        cost = devices.memory_cost(self.about, sizes, self.dtype.itemsize)
        free = devices.free_memory(self.device)
        self.measures = devices.choose_savings(free, cost, *(size or self.about.size), batch, kind=self.device.type)
        devices.apply_savings(self.measures, self._text, self.device)
        self._digest = ThreadPoolExecutor(1).submit(lambda: self.about.digest)  # reads all weights once more
        same = {**self._text.components, "requires_safety_checker": False}
        self._image, self._mask = (
            _quiet(kind(**same)) for kind in (StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline)
        )
        self._detector = load_annotator(DETECTOR)

    def __str__(self) -> str:
        """Device, precision and measures, in a line."""
        memory = "memory suffices" if self.measures == devices.MemorySavings() else f"memory saved by {self.measures}"
        return f"{self.device.type} · {str(self.dtype).removeprefix('torch.')} · {memory}"

    def check(self, request: GenerationRequest) -> GenerationRequest:
        """The request with nothing left open (see `resolve`). Raises UserError where it does not fit the model."""
        r = resolve(self.about, request, upscaler=self.upscaler is not None)
        check_scheduler(self.about, r)
        return r

    def unread(self, text: str) -> str:
        """The end of a prompt that is beyond what the text encoder reads; "" where it reads all."""
        tokenizer = self._text.tokenizer
        ids = tokenizer(text, truncation=False, verbose=False).input_ids
        return str(tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1])).strip()

    def generate(self, requests: Iterable[GenerationRequest], on_step: OnStep | None = None) -> Iterator[Generated]:
        """Draw pictures, in this order; each comes when its batch is finished.

        Raises UserError before the first is begun where one does not fit, and later where memory does not suffice.
        """
        checked = [self.check(r) for r in requests]
        steps = _Steps(on_step, sum(self._work(r) for r in checked))
        for _, alike in groupby(checked, _key):
            group = list(alike)
            while group:
                part = group[: self.batch]
                try:
                    began = steps.done
                    images = self._drawn(part, steps)
                except (RuntimeError, MemoryError) as e:
                    if not out_of_memory(e):
                        raise
                    self._save_memory(part, e)
                    steps.done = began
                    continue
                group = group[len(part) :]
                for request, image in zip(part, images, strict=True):
                    yield self._finished(request, image)

    def _work(self, r: GenerationRequest) -> int:
        """Steps that a request takes."""
        redrawn = int(r.steps * (r.strength or 0))
        if r.upscale == 1:
            return r.steps if r.image is None else redrawn
        return (0 if r.enlarges else r.steps) + redrawn * self.tiles(r)

    def tiles(self, r: GenerationRequest) -> int:
        """Tiles that a checked request is enlarged in; 0 where nothing is redrawn."""
        if r.upscale == 1 or not int(r.steps * (r.strength or 0)):
            return 0
        assert r.width and r.height
        return tile_count(r.width * r.upscale, r.height * r.upscale, *self._tiles)

    @property
    def tile(self) -> tuple[int, int]:
        """(width, height) of a tile, pixels."""
        return self._tiles[0]

    def cost(self, requests: Iterable[GenerationRequest]) -> str:
        """What enlarging will take, in words, by the time of one tile that is drawn for that; "" where it is little."""
        import time

        from PIL import Image

        checked = [self.check(r) for r in requests]
        tiles = sum(self.tiles(r) for r in checked)
        if not cost_of(tiles, self.tile):
            return ""
        one = next(r for r in checked if self.tiles(r))
        blank = [Image.new("RGB", self.tile)]

        def timed() -> float:
            began = time.perf_counter()
            self._run(self._image, [one], [generator(0)], _Steps(None, 0), image=blank, strength=one.strength)
            return time.perf_counter() - began

        try:
            if (seconds := timed()) < 1:  # much of the first is for being the first
                seconds = timed()
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
            return cost_of(tiles, self.tile)  # less is used when it is drawn
        return cost_of(tiles, self.tile, seconds)

    def _drawn(self, group: Sequence[GenerationRequest], steps: _Steps) -> list[Image.Image]:
        """Pictures of requests that differ in prompts, seeds and images alone."""
        one = group[0]
        noise = [generator(r.seed) for r in group]
        size = {"width": one.width, "height": one.height}
        begin = [_fitted(r.image.convert("RGB"), r) for r in group if r.image is not None]
        if one.enlarges:
            images = begin
        elif one.mask is not None:
            masks = [_fitted(r.mask.convert("L"), r) for r in group if r.mask is not None]
            with _as_plain(self._text.unet, self.about):
                images = self._run(
                    self._mask, group, noise, steps, image=begin, mask_image=masks, strength=one.strength, **size
                )
        elif begin:
            images = self._run(self._image, group, noise, steps, image=begin, strength=one.strength)
        else:
            images = self._run(self._text, group, noise, steps, **size)
        if one.upscale > 1:
            images = [self._enlarged(r, image, steps) for r, image in zip(group, images, strict=True)]
        return [restore_faces(image, self.faces)[0] if self.faces else image for image in images]

    def _run(
        self,
        pipeline: Any,
        group: Sequence[GenerationRequest],
        noise: Sequence[torch.Generator],
        steps: _Steps,
        **more: Any,
    ) -> list[Image.Image]:
        """One call of a diffusers pipeline. NoImage where what it computes is not finite."""
        import numpy as np

        from train.models.unet import check_computes

        one, began = group[0], steps.done
        planned = len(group) * int(one.steps * more.get("strength", 1))
        pipeline.scheduler = new_scheduler(str(one.scheduler), self._scheduler)

        def tell(pipeline: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
            steps.to(began + planned * (i + 1) // pipeline.num_timesteps)
            return {}

        try:
            drawn = pipeline(
                [r.prompt for r in group], negative_prompt=[r.negative for r in group], num_inference_steps=one.steps,
                guidance_scale=one.guidance, generator=list(noise), callback_on_step_end=tell, output_type="np", **more,
            ).images  # fmt: skip
        except (TypeError, ValueError, RuntimeError, IndexError, OverflowError, AttributeError) as e:
            check_computes(self._text, self.about, e)
            raise
        finally:
            self._text.maybe_free_model_hooks()
        if not np.isfinite(drawn).all():  # which as pixels would be black
            precision = str(self.dtype).removeprefix("torch.")
            raise NoImage(
                f"{self.about.name} computed values that are no numbers, and so no picture, though its weights in "
                f"{self.about.folder} are numbers: they are too large for {precision}, or the LoRA or guidance is"
            )
        images: list[Image.Image] = pipeline.image_processor.numpy_to_pil(drawn)
        return images

    @property
    def _tiles(self) -> tuple[tuple[int, int], int]:
        """How a picture that is enlarged is cut: (width, height) of the tiles, as the model draws, and the pixels by
        which they overlap: an eighth, 64 of 512."""
        width, height = (max(self.about.step, side - side % self.about.step) for side in self.about.size)
        return (width, height), max(8, min(width, height) // 8)

    def _enlarged(self, r: GenerationRequest, image: Image.Image, steps: _Steps) -> Image.Image:
        """Enlarged by Lanczos or the upscaler; then image-to-image in tiles as large as the model draws, so that things
        keep the size that it knows. All noise comes from one generator, tile after tile."""
        from PIL.Image import Resampling

        width, height = image.width * r.upscale, image.height * r.upscale
        if self.upscaler:
            image = by_tiles(image, (256, 256), 16, self.upscaler, self.upscaler.scale)
        image = image.resize((width, height), Resampling.LANCZOS)
        if not r.strength:
            return image
        noise = generator(r.seed)

        def redraw(tile: Image.Image) -> Image.Image:
            return self._run(self._image, [r], [noise], steps, image=[tile], strength=r.strength)[0]

        return by_tiles(image, *self._tiles, redraw)

    def _save_memory(self, part: Sequence[GenerationRequest], error: Exception) -> None:
        """After memory ran out: fewer at once, then stricter measures. UserError where there are none left."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        stricter = devices.next_savings(self.measures, self.device.type)
        if len(part) > 1:
            self.batch = (len(part) + 1) // 2
        elif stricter is not None:
            self.measures = stricter
            devices.apply_savings(stricter, self._text, self.device)
        else:
            raise UserError(
                f"{part[0].width} x {part[0].height} pixels need more memory than {self.device.type} has, also with "
                f"{self.measures}: draw a smaller picture"
            ) from error

    def _finished(self, request: GenerationRequest, image: Image.Image) -> Generated:
        """Looked at, blurred where that is asked, with its facts."""
        import numpy as np
        from PIL import ImageFilter

        from curate.annotators.base import scores_of

        score = float(scores_of(self._detector, [np.asarray(image)])[0])
        flagged = score >= UNSAFE
        blurred = flagged and self.blur
        if blurred:
            image = image.filter(ImageFilter.GaussianBlur(max(image.size) / 12))
        nsfw = {"score": score, "threshold": UNSAFE, "flagged": flagged, "blurred": blurred}
        return Generated(request, image, score, flagged, {**facts_of(request), **self._facts, "nsfw": nsfw})

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """What is the same for all pictures."""
        return {
            "loras": [{"name": str(x.path), "weight": x.weight, "sha256": sha256_file(x.file)} for x in self.loras],
            **{
                name: None if path is None else {"name": str(path), "sha256": sha256_file(path)}
                for name, path in self._others.items()
            },
            "model": {"name": self.about.name, "sha256": self._digest.result()},
            "data_manifest_sha256": self.about.manifest,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "made_with": versions(),
        }


def generator(seed: int) -> torch.Generator:
    """Noise of a picture: on the CPU, where every machine draws the same."""
    import torch

    return torch.Generator().manual_seed(seed)


def _settings_of(scheduler: Any) -> dict[str, Any]:
    """A pipeline's own scheduler's settings. Not those of the file: of old models pipelines put two right, which
    `from_config` would take for defaults of that scheduler, and leave out."""
    settings = dict(scheduler.config)
    put_right = ("steps_offset", "clip_sample")
    settings["_use_default_values"] = [k for k in settings.get("_use_default_values", ()) if k not in put_right]
    return settings


def _quiet(pipeline: Any) -> Any:
    """Without a progress bar of its own."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _key(r: GenerationRequest) -> tuple[Any, ...]:
    """What pictures of one batch have in common."""
    kind = (r.image is not None, r.mask is not None)
    return r.steps, r.guidance, r.width, r.height, r.scheduler, r.strength, r.upscale, kind


def _fitted(image: Image.Image, r: GenerationRequest) -> Image.Image:
    """Scaled and cut to the size that is drawn, in the middle; as it is where it has that size or is enlarged."""
    from PIL import ImageOps
    from PIL.Image import Resampling

    assert r.width and r.height
    if image.size == (r.width, r.height):
        return image
    sharp = image.mode == "L"  # a mask
    return ImageOps.fit(image, (r.width, r.height), Resampling.NEAREST if sharp else Resampling.LANCZOS)


@contextlib.contextmanager
def _as_plain(unet: Any, about: ModelInfo) -> Iterator[None]:
    """StableDiffusionInpaintPipeline tells a plain UNet by its four input channels, and uses the number for nothing
    else. Those of models with latents of other sizes, pixels among them, say four while it runs."""
    channels = unet.config.in_channels
    if not about.inpaints_only:
        unet.register_to_config(in_channels=4)
    try:
        yield
    finally:
        unet.register_to_config(in_channels=channels)


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


def facts_of(request: GenerationRequest) -> dict[str, Any]:
    """A resolved request as JSON; of its image and mask their digests."""
    plain = ("prompt", "negative", "seed", "steps", "guidance", "width", "height", "scheduler", "strength", "upscale")
    facts: dict[str, Any] = {name: getattr(request, name) for name in plain}
    for name in ("image", "mask"):
        picture = getattr(request, name)
        facts[name] = None if picture is None else {"sha256": pixels_digest(picture)}
    return facts


def request_of(
    facts: Mapping[str, Any], image: Image.Image | None = None, mask: Image.Image | None = None
) -> GenerationRequest:
    """The request that a picture's facts tell. Raises UserError where its image or mask is absent or another one."""
    for name, picture in (("image", image), ("mask", mask)):
        wanted = facts.get(name)
        if wanted and picture is None:
            raise UserError(f"the picture was drawn with an {name} to begin with: give it too")
        if wanted and picture is not None and pixels_digest(picture) != wanted["sha256"]:
            raise UserError(f"the picture was drawn with another {name} than the one given (their pixels differ)")
    plain = ("prompt", "negative", "seed", "steps", "guidance", "width", "height", "scheduler", "strength", "upscale")
    try:
        return GenerationRequest(**{name: facts[name] for name in plain}, image=image, mask=mask)
    except (KeyError, TypeError) as e:
        raise UserError(f"the picture's facts are incomplete or damaged: {e}") from e
