"""Images from a model: text to image, image to image, inpainting, enlarging. A thin layer over diffusers' pipelines.

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
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from curate.annotators.base import Spec
from curate.annotators.registry import DETECTOR, load_annotator
from curate.store.files import sha256_file
from curate.store.mirror import in_urls
from train import devices
from train.devices import out_of_memory, versions
from train.generate.calls import call_arguments
from train.generate.reading import PromptReading
from train.generate.request import GenerationRequest, check_scheduler, facts_of, resolve
from train.generate.upscale import Network, by_tiles, restore_faces, tile_starts, tiles_cost
from train.models.embeddings import add_embeddings, read_embedding
from train.models.info import ModelInfo, read_model_info
from train.models.load import check_fits, load_pipeline, pipelines_with_images
from train.models.lora import Lora, add_loras, check_lora
from train.models.schedulers import new_scheduler

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = ["Generated", "GenerationRequest", "NoImage", "Sampler"]

OnStep = Callable[[int, int], None]
"""Is called with (steps done, steps in all) after each step. An exception in it ends the run: this is how to cancel."""

OnNote = Callable[[str], None]
"""Is called with a line that whoever asked should know, once."""

UNSAFE = 0.2
"""The NSFW score from which on an image is blurred: Yahoo calls what is below 0.2 safe (README of open_nsfw). Our
recipes keep images for training by the same number."""


class NoImage(UserError, FloatingPointError):
    """What a model computed is not finite, and so no image: as pixels it would be black."""


@dataclass(frozen=True)
class Generated:
    """A finished image."""

    request: GenerationRequest  # resolved
    image: Image.Image  # what may be shown: blurred where it is flagged
    nsfw: float  # the project's detector's score, 0 to 1
    flagged: bool  # nsfw >= UNSAFE
    facts: dict[str, Any]  # what its PNG carries (`train.generate.files.png`)


class Sampler:
    """A model that is loaded and ready to generate. Not for several threads at once."""

    def __init__(
        self,
        model: ModelInfo | str | Path,
        *,
        loras: Sequence[Lora] = (),
        embeddings: Sequence[Path] = (),
        upscaler: Path | None = None,
        faces: Path | None = None,
        batch: int = 1,
        size: tuple[int, int] | None = None,
        blur: bool = True,
        detector: Spec = DETECTOR,
        device: torch.device | None = None,
    ) -> None:
        """Load a model. Raises UserError where it, a LoRA or other weights can't be loaded.

        Args:
            embeddings: textual inversions, words that files teach the model.
            upscaler: weights that enlarge (ESRGAN and its like), in place of Lanczos.
            faces: weights that restore faces (GFPGAN), applied to every image.
            batch: images that are generated at once at most.
            size: (width, height) in pixels of the largest that will be generated; memory is saved as these need it.
            blur: images that the NSFW detector flags.
            detector: an annotator of one column that tells from 0 to 1 what is unsafe to show.
        """
        self.info = model if isinstance(model, ModelInfo) else read_model_info(model)
        self.loras, self.batch, self.blur = tuple(loras), batch, blur
        width, height = (max(self.info.step, side - side % self.info.step) for side in self.info.size)
        # in tiles an enlarged image is redrawn: (width, height) in pixels, as large as the model draws
        self.tile = width, height
        self._overlap = max(8, min(self.tile) // 8)  # pixels by which tiles do: an eighth, 64 of 512
        for lora in self.loras:
            check_lora(self.info, lora)
        words = [read_embedding(self.info, path) for path in embeddings]
        self.embeddings = tuple(embeddings)
        self.device = device or devices.default_device()
        self.dtype = devices.precision(self.device, self.info)
        self._precision = str(self.dtype).removeprefix("torch.")
        self.upscaler = Network(upscaler, "SR", self.device) if upscaler else None
        self.faces = Network(faces, "FaceSR", self.device) if faces else None
        self._extra_weights = {"upscaler": upscaler, "faces": faces}

        self._text = load_pipeline(self.info, self.dtype)
        # not the settings of the file: of old models pipelines put two right, which `from_config` would take for
        # defaults of that scheduler, and leave out
        self._scheduler_config: dict[str, Any] = dict(self._text.scheduler.config)
        defaults = self._scheduler_config.get("_use_default_values", ())
        self._scheduler_config["_use_default_values"] = [
            k for k in defaults if k not in ("steps_offset", "clip_sample")
        ]
        self._on_note: OnNote | None = None
        self._said: set[str] = set()
        self.notes = add_loras(self._text, self.loras, self.info.name)  # what is to be said, a line each
        self.notes += add_embeddings(self._text, words)
        parts = [getattr(self._text, name) for name in self.info.configs]
        for part in parts:
            part.requires_grad_(False).eval()

        sizes = [sum(p.numel() for p in part.parameters()) * self.dtype.itemsize for part in parts]
        cost = devices.memory_cost(self.info, sizes, self.dtype.itemsize)
        free = devices.free_memory(self.device)
        self.savings = devices.choose_savings(free, cost, *(size or self.info.size), batch, kind=self.device.type)
        devices.apply_savings(self.savings, self._text, self.device)

        self._image, self._mask = pipelines_with_images(self._text, self.info)
        for pipeline in filter(None, (self._text, self._image, self._mask)):
            pipeline.set_progress_bar_config(disable=True)
        self._detector = load_annotator(detector)
        self._digest = ThreadPoolExecutor(1).submit(lambda: self.info.digest)  # reads all weights once more

    def __str__(self) -> str:
        """Device, precision and what is done against too little memory, in a line."""
        memory = "memory suffices" if self.savings == devices.MemorySavings() else f"memory saved by {self.savings}"
        return f"{self.device.type} · {self._precision} · {memory}"

    def check(self, request: GenerationRequest) -> GenerationRequest:
        """The request with nothing left open (see `resolve`). Raises UserError where it does not fit the model."""
        r = resolve(self.info, request, upscaler=self.upscaler is not None)
        check_scheduler(self.info, r)
        return r

    def generate(
        self, requests: Iterable[GenerationRequest], on_step: OnStep | None = None, on_note: OnNote | None = None
    ) -> Iterator[Generated]:
        """Generate images, in this order; each comes when its batch is finished.

        `on_note` is called with a line about each prompt that the model does not read to its end, before its steps.
        Raises UserError before the first is begun where one does not fit, and later where memory does not suffice.
        """
        checked = [self.check(r) for r in requests]
        total = 0
        for r in checked:
            if not r.enlarges:
                total += (r.steps or 0) if r.image is None else r.steps_of_image
            total += r.steps_of_image * self.tiles(r)

        def kind(r: GenerationRequest) -> tuple[Any, ...]:
            """What images of one batch have in common."""
            given = (r.image is not None, r.mask is not None, bool(r.negative))
            return r.steps, r.guidance, r.width, r.height, r.scheduler, r.strength, r.upscale, given

        steps = _StepCounter(on_step, total)
        self._on_note, self._said = on_note, set()
        for _, alike in groupby(checked, kind):
            group = list(alike)
            while group:
                batch, began = group[: self.batch], steps.done
                try:
                    images = self._generate_batch(batch, steps)
                except (RuntimeError, MemoryError) as e:
                    if not out_of_memory(e):
                        raise
                    self._save_memory(batch, e)
                    steps.done = began
                    continue
                except UserError as e:
                    if len(batch) == 1 or isinstance(e, NoImage):
                        raise
                    self.batch, steps.done = 1, began  # PRX's pipeline fails with more than one
                    continue
                group = group[len(batch) :]
                for request, image in zip(batch, images, strict=True):
                    yield self._finish(request, image)

    def _save_memory(self, batch: Sequence[GenerationRequest], error: Exception) -> None:
        """After memory ran out: fewer at once, then stricter savings. UserError where there are none left."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        stricter = devices.next_savings(self.savings, self.device.type)
        if len(batch) > 1:
            self.batch = (len(batch) + 1) // 2
        elif stricter is not None:
            self.savings = stricter
            devices.apply_savings(stricter, self._text, self.device)
        else:
            raise UserError(
                f"{batch[0].width} x {batch[0].height} pixels need more memory than {self.device.type} has, also with "
                f"{self.savings}: draw a smaller image"
            ) from error

    # -------------------------------------------------------------------------------------------- which pipeline

    def _generate_batch(self, batch: Sequence[GenerationRequest], steps: _StepCounter) -> list[Image.Image]:
        """Images of requests that differ in prompts, seeds and images alone."""
        one = batch[0]
        noise = [noise_generator(r.seed) for r in batch]
        size = {"width": one.width, "height": one.height}
        given = [_fit(r.image.convert("RGB"), r) for r in batch if r.image is not None]
        if one.enlarges:
            images = given
        elif one.mask is not None:
            masks = [_fit(r.mask.convert("L"), r) for r in batch if r.mask is not None]
            with _four_channels(self._text, self.info):
                images = self._call(
                    self._mask, batch, noise, steps, image=given, mask_image=masks, strength=one.strength, **size
                )
        elif given:
            images = self._call(self._image, batch, noise, steps, image=given, strength=one.strength, **size)
        else:
            images = self._call(self._text, batch, noise, steps, **size)
        if one.upscale > 1:
            images = [self._enlarge(r, image, steps) for r, image in zip(batch, images, strict=True)]
        return [restore_faces(image, self.faces)[0] if self.faces else image for image in images]

    def _call(
        self,
        pipeline: Any,
        batch: Sequence[GenerationRequest],
        noise: Sequence[torch.Generator],
        steps: _StepCounter,
        **more: Any,
    ) -> list[Image.Image]:
        """One call of a diffusers pipeline. Raises NoImage where what it computes is not finite."""
        import numpy as np

        one, began = batch[0], steps.done
        planned = len(batch) * int(one.steps * more.get("strength", 1))
        pipeline.scheduler = new_scheduler(str(one.scheduler), self._scheduler_config)
        reading = PromptReading(pipeline, [text for r in batch for text in (r.prompt, r.negative)])

        def on_step(done: int, of: int) -> None:
            for note in reading.notes() if done == 1 else ():
                self._say(note)
            steps.to(began + planned * done // of)

        given = call_arguments(pipeline, self.info, batch, noise, on_step, more)
        try:
            with reading.listen():
                pixels = np.asarray(pipeline(**given).images)
        except (TypeError, ValueError, RuntimeError, IndexError, OverflowError, AttributeError) as e:
            check_fits(self._text, self.info, e)
            raise
        finally:
            self._text.maybe_free_model_hooks()
        if not np.isfinite(pixels).all():  # which as pixels would be black
            raise NoImage(
                f"{self.info.name} computed values that are no numbers, and so no image, though its weights in "
                f"{self.info.folder} are numbers: they are too large for {self._precision}, or the LoRA or guidance is"
            )
        drawn = (pixels.shape[2], pixels.shape[1])
        if drawn != (more["width"], more["height"]):
            raise UserError(
                "asked for {} x {} pixels, {} drew {} x {}: ask for a size that it keeps to".format(
                    more["width"], more["height"], self.info.abilities.text, *drawn
                )
            )
        images: list[Image.Image] = pipeline.numpy_to_pil(pixels)
        return images

    def _say(self, note: str) -> None:
        if self._on_note and note not in self._said:
            self._said.add(note)
            self._on_note(note)

    # ------------------------------------------------------------------------------------------------- enlarging

    def tiles(self, r: GenerationRequest) -> int:
        """Tiles that a resolved request is enlarged in; 0 where nothing is redrawn."""
        if r.upscale == 1 or not r.steps_of_image:
            return 0
        assert r.width and r.height
        across, down = (
            len(tile_starts(side * r.upscale, tile, self._overlap))
            for side, tile in zip((r.width, r.height), self.tile, strict=True)
        )
        return across * down

    def cost(self, requests: Iterable[GenerationRequest]) -> str:
        """What enlarging will take, in words, by the time of one tile that is redrawn; "" where it is little."""
        from PIL import Image

        checked = [self.check(r) for r in requests]
        tiles = sum(self.tiles(r) for r in checked)
        if not tiles_cost(tiles, self.tile):
            return ""
        one = next(r for r in checked if self.tiles(r))
        seconds = 0.0
        try:
            for _ in range(2):  # much of the first is for being the first
                began = time.perf_counter()
                blank, noise = [Image.new("RGB", self.tile)], [noise_generator(0)]
                self._call(self._image, [one], noise, _StepCounter(None, 0), **self._of_tile(blank, one.strength))
                seconds = time.perf_counter() - began
                if seconds >= 1:
                    break
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
            return tiles_cost(tiles, self.tile)  # less is used when it is generated
        return tiles_cost(tiles, self.tile, seconds)

    def _of_tile(self, images: list[Image.Image], strength: float | None) -> dict[str, Any]:
        """What a pipeline is called with to redraw tiles."""
        return {"image": images, "strength": strength, "width": self.tile[0], "height": self.tile[1]}

    def _enlarge(self, r: GenerationRequest, image: Image.Image, steps: _StepCounter) -> Image.Image:
        """Enlarged by Lanczos or the upscaler; then image-to-image in tiles as large as the model draws, so that things
        keep the size that it knows. All noise comes from one generator, tile after tile."""
        from PIL.Image import Resampling

        width, height = image.width * r.upscale, image.height * r.upscale
        if self.upscaler:
            image = by_tiles(image, (256, 256), 16, self.upscaler, self.upscaler.scale)
        image = image.resize((width, height), Resampling.LANCZOS)
        if not r.strength:
            return image
        noise = noise_generator(r.seed)

        def redraw(tile: Image.Image) -> Image.Image:
            return self._call(self._image, [r], [noise], steps, **self._of_tile([tile], r.strength))[0]

        return by_tiles(image, self.tile, self._overlap, redraw)

    # -------------------------------------------------------------------------------------- safety check and facts

    def _finish(self, request: GenerationRequest, image: Image.Image) -> Generated:
        """Looked at by the NSFW detector, blurred where that is asked, with its facts."""
        import numpy as np
        from PIL import ImageFilter

        from curate.annotators.base import scores_of

        score = float(scores_of(self._detector, [np.asarray(image)])[0])
        flagged = score >= UNSAFE
        blurred = flagged and self.blur
        if blurred:
            image = image.filter(ImageFilter.GaussianBlur(max(image.size) / 12))
        nsfw = {"score": score, "threshold": UNSAFE, "flagged": flagged, "blurred": blurred}
        return Generated(request, image, score, flagged, {**facts_of(request), **self._model_facts, "nsfw": nsfw})

    @cached_property
    def _model_facts(self) -> dict[str, Any]:
        """What is the same for all images."""
        return {
            "loras": [
                {"name": in_urls(str(x.path)), "weight": x.weight, "sha256": sha256_file(x.file)} for x in self.loras
            ],
            "embeddings": [{"name": in_urls(str(path)), "sha256": sha256_file(path)} for path in self.embeddings],
            **{
                name: None if path is None else {"name": in_urls(str(path)), "sha256": sha256_file(path)}
                for name, path in self._extra_weights.items()
            },
            "model": {"name": self.info.name, "sha256": self._digest.result()},
            "data_manifest_sha256": self.info.manifest,
            "device": self.device.type,
            "dtype": self._precision,
            "made_with": versions(),
        }


class _StepCounter:
    """Counts the steps that are done of all."""

    def __init__(self, on_step: OnStep | None, total: int) -> None:
        self._on_step, self._total, self.done = on_step, total, 0

    def to(self, done: int) -> None:
        self.done = done
        if self._on_step:
            self._on_step(done, self._total)


def noise_generator(seed: int) -> torch.Generator:
    """Noise of an image: on the CPU, where every machine draws the same."""
    import torch

    return torch.Generator().manual_seed(seed)


def _fit(image: Image.Image, r: GenerationRequest) -> Image.Image:
    """Scaled and cut to the size that is generated, in the middle; as it is where it has that size or is enlarged."""
    from PIL import ImageOps
    from PIL.Image import Resampling

    assert r.width and r.height
    if image.size == (r.width, r.height):
        return image
    is_mask = image.mode == "L"
    return ImageOps.fit(image, (r.width, r.height), Resampling.NEAREST if is_mask else Resampling.LANCZOS)


@contextlib.contextmanager
def _four_channels(pipeline: Any, info: ModelInfo) -> Iterator[None]:
    """StableDiffusionInpaintPipeline tells a plain UNet by its four input channels, and uses the number for nothing
    else. Those of models with latents of other sizes, pixels among them, say four while it runs."""
    if not info.is_stable_diffusion or info.inpaints_only:
        yield
        return
    channels = pipeline.unet.config.in_channels
    pipeline.unet.register_to_config(in_channels=4)
    try:
        yield
    finally:
        pipeline.unet.register_to_config(in_channels=channels)
