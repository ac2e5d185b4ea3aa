"""What is learnt: to remove noise (the model itself), or to reproduce an image through few latents (its autoencoder).

A task turns a batch into one loss per sample; the loop knows nothing else of it. Everything random in it is a function
of (seed, step, slot of the sample), drawn on the CPU: the same on every device, for any number of ranks and however a
batch is cut into micro-batches. There is no random state to save.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from curate.hub import no_progress_bars
from curate.sheets import Tile, enlarged
from train.data import Batch
from train.models.base import Family
from train.models.family import family_of
from train.objective import TIMES, Objective, objective_of

HELD_OUT_TIMES = tuple(TIMES * (2 * k + 1) // 16 for k in range(8))
"""The eight times at which held-out loss is measured: the middles of eighths."""

KL_WEIGHT = 1e-6
"""Of the autoencoder's KL term, per pixel value: as Rombach et al. 2022 (latent diffusion) train theirs."""

_HELD_OUT = 2**32  # no step has this number


class Task(Protocol):
    """What the loop trains."""

    pipeline: Any  # of diffusers
    modules: dict[str, nn.Module]  # its models that take part, by name

    @property
    def module(self) -> nn.Module:
        """All that takes part in a loss, as one; of it, the parameters that require gradients learn."""
        ...

    def inputs(self, batch: Batch, seed: int, step: int) -> tuple[Tensor, ...]:
        """What `module` takes; made without gradients. module(*inputs) is the loss of each sample, (n,) float32."""
        ...

    def matrices(self) -> list[nn.Parameter]:
        """The parameters that Muon is for, where it is asked for."""
        ...

    def held_out_losses(self, batch: Batch, seed: int) -> Tensor:
        """The loss of each sample at fixed noise, (n,) float32: comparable between steps and runs."""
        ...

    def preview(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, list[Tile]]]:
        """Images of what has been learnt so far: rows of a sheet, each with its title."""
        ...

    def save(self, folder: Path) -> None:
        """Write what has been learnt into a folder of its own inside this one, as diffusers clients read it."""
        ...


class Denoise:
    """Training of a text-to-image pipeline: its denoiser and, with `text`, its text encoder; or its LoRA alone.

    The autoencoder is never trained here and runs without gradients, in fp32; with precomputed latents it does not run.
    `real` holds an image, (h, w, 3) uint8, for prompts that are captions of one: previews show it beside the generated.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        text: bool = True,
        gamma: float | None = None,
        real: Mapping[str, npt.NDArray[np.uint8]] | None = None,
    ) -> None:
        self.pipeline, self.family, self._real = pipeline, family_of(pipeline), real or {}
        self.objective: Objective = objective_of(pipeline.scheduler, gamma)
        pipeline.vae.requires_grad_(False).eval()
        self.family.train_text(pipeline, text and not self.family.has_lora(pipeline))
        self._network = self.family.network(pipeline)
        self.modules = {self.family.denoiser: self._network, **self.family.text_encoders(pipeline)}
        self.module = DenoisingError(self.family, self._network, self.family.text_encoder(pipeline), self.objective)
        self._sample_noise = _NoisePrefetcher(self.objective.sample_time)

    def matrices(self) -> list[nn.Parameter]:
        """Those of the denoiser's blocks."""
        return self.family.matrices(self._network)

    def inputs(self, batch: Batch, seed: int, step: int) -> tuple[Tensor, ...]:
        """Latents, noise, a random time for each, and captions as tokens or as what the text encoder makes of them."""
        x0 = self._latents(batch)
        t, noise = self._sample_noise(seed, step, batch.slots, x0)
        return x0, noise, t, batch.tokens.to(x0.device), batch.lengths, batch.views.to(x0.device)

    def held_out_losses(self, batch: Batch, seed: int) -> Tensor:
        """Mean squared error of each sample, averaged over the eight times of HELD_OUT_TIMES."""
        return self.held_out_losses_by_time(batch, seed).mean(0)

    def held_out_losses_by_time(self, batch: Batch, seed: int) -> Tensor:
        """The same before it is averaged, (8, n)."""
        x0 = self._latents(batch)
        text = self.module.encode_text(batch.tokens.to(x0.device), batch.lengths)
        _, noise = (x.to(x0.device) for x in _time_and_noise(seed, _HELD_OUT, batch.slots, x0.shape[1:]))
        times = (torch.full((len(x0),), float(t), device=x0.device) for t in HELD_OUT_TIMES)
        views = batch.views.to(x0.device)
        return torch.stack([self.module(x0, noise, t, text, batch.lengths, views) for t in times])

    def _latents(self, batch: Batch) -> Tensor:
        device = self._network.device
        images = batch.images.to(device, torch.float32, non_blocking=True)
        if batch.latent:
            return images
        with torch.autocast(device.type, enabled=False):
            return self.family.encode_images(self.pipeline.vae, images)

    def preview(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, list[Tile]]]:
        """A row for each prompt: the real image of that caption where it is known, then one for each seed."""
        prompts = prompts or [""]
        generated = iter(generate_images(self.pipeline, prompts, seeds))
        rows = []
        for prompt in prompts:
            real = [enlarged(self._real[prompt], "real, held out")] if prompt in self._real else []
            rows.append((prompt, real + [enlarged(next(generated), f"generated, seed {s}") for s in seeds]))
        return rows

    def save(self, folder: Path) -> None:
        """`pipeline/`; of a LoRA `lora/`, which goes on top of the pipeline that training began with."""
        with no_progress_bars("diffusers"):
            if self.family.has_lora(self.pipeline):
                self.family.save_lora(self.pipeline, folder / "lora")
            else:
                self.pipeline.save_pretrained(folder / "pipeline")


class DenoisingError(nn.Module):
    """Denoiser and text encoder as one module: noised latents and captions to an error for each sample."""

    def __init__(self, family: Family, denoiser: nn.Module, text_encoder: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.denoiser, self.text_encoder = denoiser, text_encoder
        self._family, self._objective = family, objective

    def forward(self, x0: Tensor, noise: Tensor, t: Tensor, text: Tensor, lengths: Tensor, views: Tensor) -> Tensor:
        """Mean squared error of each sample, (n,) float32, weighted by the objective.

        Args:
            x0, noise: (n, c, h, w) float32.
            t: times in [0, TIMES), (n,) float32.
            text: tokens (n, longest) or (n, longest, 2) int64, or what the text encoder makes of them, floating point.
            lengths: of each caption, (n,) int64, on the CPU.
            views: (n, 6), what of each image is shown.
        """
        x_t, target, weight = self._objective.noised(x0, noise, t)
        predicted = self._family.predict(self.denoiser, x_t, t, self.encode_text(text, lengths), lengths, views)
        return weight * F.mse_loss(predicted.float(), target, reduction="none").mean((1, 2, 3))

    def encode_text(self, text: Tensor, lengths: Tensor) -> Tensor:
        """What the denoiser takes of captions; what is that already, as where it is precomputed, stays as it is."""
        if text.is_floating_point():
            return text
        if not any(p.requires_grad for p in self.text_encoder.parameters()):
            self.text_encoder.eval()  # T5 has dropout
        return self._family.encode_text(self.text_encoder, text, lengths)


class Reconstruct:
    """Training of a pipeline's autoencoder: L1 between image and reconstruction, and a little KL."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.modules = {"vae": pipeline.vae.requires_grad_(True)}
        self.module = ReconstructionError(pipeline.vae)
        self._first: Tensor | None = None  # images of the first batch, for previews
        self._sample_noise = _NoisePrefetcher()

    def matrices(self) -> list[nn.Parameter]:
        """None: an autoencoder has hardly any."""
        return []

    def inputs(self, batch: Batch, seed: int, step: int) -> tuple[Tensor, ...]:
        """Images, and noise for their latents."""
        x = batch.images.to(self.pipeline.vae.device)
        self._first = x[:5] if self._first is None else self._first
        config = self.pipeline.vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        shape = (config.latent_channels, x.shape[2] // factor, x.shape[3] // factor)
        return x, self._sample_noise(seed, step, batch.slots, x.new_empty(1, *shape))[1]

    def held_out_losses(self, batch: Batch, seed: int) -> Tensor:
        """Mean squared error of each sample's reconstruction from the mean of its latents, in [-1, 1] units."""
        x = batch.images.to(self.pipeline.vae.device)
        return F.mse_loss(self._reconstruct(x), x, reduction="none").mean((1, 2, 3))

    def _reconstruct(self, x: Tensor) -> Tensor:
        vae = self.pipeline.vae
        decoded: Tensor = vae.decode(vae.encode(x).latent_dist.mode(), return_dict=False)[0].float()
        return decoded.clamp(-1, 1)

    def preview(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, list[Tile]]]:
        """Images of the first batch, and their reconstructions below."""
        assert self._first is not None
        with torch.no_grad():
            both = torch.cat([self._first, self._reconstruct(self._first)])
        pixels = ((both + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        shown = [enlarged(p, str(i % len(self._first) + 1)) for i, p in enumerate(pixels)]
        return [("images", shown[: len(self._first)]), ("their reconstructions", shown[len(self._first) :])]

    def save(self, folder: Path) -> None:
        """`vae/`: an AutoencoderKL."""
        self.pipeline.vae.save_pretrained(folder / "vae")


class ReconstructionError(nn.Module):
    """An autoencoder, from images to an error for each."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Mean absolute error of each sample in [-1, 1] units, plus KL_WEIGHT times its KL per pixel value, (n,)."""
        posterior = self.vae.encode(x).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0].float()
        return (decoded - x).abs().mean((1, 2, 3)) + KL_WEIGHT * posterior.kl().float() / x[0].numel()


def psnr(mean_squared_error: float) -> float:
    """Peak signal to noise, in dB, of a mean squared error in [-1, 1] units (a range of 2)."""
    return float(10 * np.log10(4 / max(mean_squared_error, 1e-12)))


@torch.no_grad()
def fit_scale(pipeline: Any, batch: Batch) -> float:
    """Set, and return, the scaling factor that gives latents unit variance (Rombach et al. 2022)."""
    std = float(pipeline.vae.encode(batch.images.to(pipeline.vae.device)).latent_dist.mode().std())
    pipeline.vae.register_to_config(scaling_factor=1 / max(std, 1e-6))
    return float(pipeline.vae.config.scaling_factor)


SampleTime = Callable[[np.random.Generator], float]


def _time_and_noise(
    seed: int, step: int, slots: Sequence[int], shape: Sequence[int], sample_time: SampleTime = lambda rng: 0.0
) -> tuple[Tensor, Tensor]:
    """Of each slot its time and then its standard normal noise: (n,) and (n, *shape), float32, on the CPU."""
    rngs = [np.random.default_rng([seed, step, slot]) for slot in slots]
    times = torch.tensor([sample_time(rng) for rng in rngs], dtype=torch.float32)
    return times, torch.from_numpy(np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs]))


class _NoisePrefetcher:
    """`_time_and_noise`, that of the next step made in a thread while this one is computed.

    256 slots take 13 ms, about half of the time that a GPU needs for a step of `small-64`.
    """

    def __init__(self, sample_time: SampleTime = lambda rng: 0.0) -> None:
        self._sample_time = sample_time
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="noise")
        self._ahead: dict[Any, Any] = {}

    def __call__(self, seed: int, step: int, slots: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
        """(times, noise) of these slots, noise of the shape of `like`, on its device."""
        this, following = ((seed, s, tuple(slots), tuple(like.shape[1:])) for s in (step, step + 1))
        ready = self._ahead.pop(this, None)
        # other micro-batches of this step and of the next may be under way; what is older is not asked for any more
        self._ahead = {key: made for key, made in self._ahead.items() if key[:2] in (this[:2], following[:2])}
        self._ahead[following] = self._pool.submit(_time_and_noise, *following, self._sample_time)
        times, noise = ready.result() if ready else _time_and_noise(*this, self._sample_time)
        return times.to(like.device), noise.to(like.device)


def slice_batch(batch: Batch, start: int, stop: int) -> Batch:
    """Some samples of a batch."""
    rows = slice(start, stop)
    return replace(
        batch, keys=batch.keys[rows], slots=batch.slots[rows], images=batch.images[rows], tokens=batch.tokens[rows],
        lengths=batch.lengths[rows], views=batch.views[rows],
    )  # fmt: skip


def generate_images(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], *, steps: int = 20, guidance: float = 3.0
) -> list[Image.Image]:
    """One image for each prompt and seed, prompts first; noise comes from the CPU, the same on every device."""
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    images, how = [], family_of(pipeline).drawing(pipeline, guidance)
    with eval_mode(pipeline):
        for start in range(0, len(pairs), 32):
            part = pairs[start : start + 32]
            images += pipeline(
                [prompt for prompt, _ in part], num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(seed) for _, seed in part], **how,
            ).images  # fmt: skip
    return images


@contextlib.contextmanager
def eval_mode(pipeline: Any) -> Iterator[None]:
    """Without gradients, dropout and progress bars."""
    family = family_of(pipeline)
    modules = [family.network(pipeline), *family.text_encoders(pipeline).values(), pipeline.vae]
    were = [m.training for m in modules]
    pipeline.set_progress_bar_config(disable=True)
    for m in modules:
        m.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, was in zip(modules, were, strict=True):
            m.train(was)


def image_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size in rows of `columns`."""
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet
