"""Where a model draws: device, precision, and what is done to save memory."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aesthetic.chunks import cpus

if TYPE_CHECKING:
    import torch

    from train.models.info import ModelInfo


def default_device() -> torch.device:
    """The GPU where there is one (`cuda` is also torch's name for AMD's, `mps` Apple's), else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on CUDA, fp32 elsewhere; weights and their updates are always fp32."""
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class FreeCores:
    """How many cores of this machine others leave free, measured between its making and the question.

    Threads of one pool wait for each other at every operation: two on a core that they share with another program
    are many times slower than one.
    """

    def __init__(self) -> None:
        self._before = _busy(), time.monotonic(), time.process_time()

    def __call__(self) -> int:
        """At least 1, at most as many as this process may use."""
        allowed = cpus()
        busy, since, own = self._before
        seconds = time.monotonic() - since
        if busy is None or (now := _busy()) is None or seconds < 0.2:
            return allowed
        others = (now - busy - (time.process_time() - own)) / seconds
        return max(1, min(allowed, round((os.cpu_count() or 1) - others)))


def _busy() -> float | None:
    """Seconds that all cores have worked since the machine started; None where that is not told (not Linux)."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def set_threads(before: int | None, free: FreeCores) -> tuple[int, str]:
    """Choose how many threads compute on the CPU, by what others leave free; returns the number, and it in words.

    A run that goes on keeps the number that it began with (`before`): it changes the last bits of sums. OMP_NUM_THREADS
    is obeyed.
    """
    import torch

    cores = count = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        count = before or min(cores, free())
        torch.set_num_threads(count)
    words = f"{count} thread{'s' * (count > 1)}"
    if count < cores:
        reason = "as when it began" if before else "others are busy"
        words += f" of {cores} ({reason}; OMP_NUM_THREADS sets another number)"
    return count, words


def versions() -> dict[str, str]:
    """Of what an image's bits depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("tastemaker", "torch", "diffusers", "transformers", "peft"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def precision(device: torch.device, info: ModelInfo) -> torch.dtype:
    """bf16 on GPUs that compute in it, fp16 on other CUDA devices; fp32 on the CPU, on MPS, where fp16 gives black
    images, and for models of pixels, which are small and whose exact autoencoder needs it."""
    import torch

    if device.type != "cuda" or info.of_pixels:
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def free_memory(device: torch.device) -> int | None:
    """Bytes that may still be taken on a device, None where it does not say."""
    import torch

    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    sizes = dict(line.split()[:2] for line in meminfo.read_text().splitlines())
    return int(sizes["MemAvailable:"]) * 1024


_NO_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "could not create a primitive",
              "could not create a memory")  # fmt: skip
"""What torch and oneDNN (the last two) say on a CPU, in plain RuntimeErrors."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the CPU."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in _NO_MEMORY)


@dataclass(frozen=True)
class MemorySavings:
    """What saves memory."""

    vae_slicing: bool = False  # images of a batch are decoded one after the other
    vae_tiling: bool = False  # large ones in overlapping tiles
    attention_slicing: bool = False  # one head after the other
    offload: bool = False  # only the part at work is on the GPU

    def __str__(self) -> str:
        named = {
            "VAE slicing": self.vae_slicing, "VAE tiling": self.vae_tiling,
            "attention slicing": self.attention_slicing, "offload to the CPU": self.offload,
        }  # fmt: skip
        return " + ".join(name for name, on in named.items() if on) or "nothing more"


@dataclass(frozen=True)
class MemoryCost:
    """What drawing takes, estimated from a model's configurations."""

    weights: int  # bytes
    largest_part: int  # bytes
    vae: int  # channels of the autoencoder's finest level
    unet: int  # channels of the UNet's finest level
    heads: int  # of attention at the UNet's finest level, 0 where there is none
    factor: int  # pixels of a side per latent
    item: int  # bytes of a number: 4, or 2 in half precision

    def peak(self, width: int, height: int, batch: int, measures: MemorySavings, *, fused: bool) -> int:
        """The most bytes held at one time while `batch` images of `width` x `height` pixels are drawn.

        Counted are weights and the maps that the two large parts hold at their finest level: twelve for each (input,
        norm, activation, result, shortcut and workspace of a residual block, at twice the width: so wide is what comes
        up from the level below). The UNet does two images for one, because of guidance. Where attention is not
        `fused`, a matrix over all pairs of latents for each head comes on top, or for one where it is sliced. A fifth
        is added for what allocators lose.
        """
        pixels, latents = width * height, width * height // self.factor**2
        seen = min(pixels, TILE * TILE) if measures.vae_tiling else pixels
        vae = 12 * seen * self.vae * (1 if measures.vae_slicing else batch)
        unet = 12 * latents * self.unet * 2 * batch
        if not fused and self.heads:
            unet += latents**2 * (1 if measures.attention_slicing else self.heads * 2 * batch)
        weights = self.largest_part if measures.offload else self.weights
        return weights + int(1.2 * self.item * max(vae, unet))


TILE = 512
"""Pixels of a side above which the autoencoder works in tiles, where it is told to: diffusers' own for
Stable Diffusion (`AutoencoderKL.tile_sample_min_size` is the size that it was trained at)."""


def memory_cost(info: ModelInfo, sizes: Sequence[int], item: int) -> MemoryCost:
    """The cost of a model; `sizes`: bytes of its parts in memory."""
    vae, unet, heads = info.finest
    return MemoryCost(
        weights=sum(sizes), largest_part=max(sizes), vae=vae, unet=unet, heads=heads, factor=info.factor, item=item
    )  # fmt: skip


def choose_savings(
    free: int | None, cost: MemoryCost, width: int, height: int, batch: int, *, kind: str
) -> MemorySavings:
    """The gentlest measures with which drawing fits into nine tenths of `free` bytes; all there are where none does.

    None free: unknown, nothing is saved. Slicing attention helps on MPS only: elsewhere PyTorch's attention is fused
    and needs no matrix of all pairs, and slices would take more memory and time than that. Offload is for GPUs.

    Args:
        kind: of the device: "cuda", "mps" or "cpu".
    """
    ladder = _ladder(kind)
    if free is None:
        return ladder[0]
    fused = kind != "mps"
    return next((m for m in ladder if cost.peak(width, height, batch, m, fused=fused) <= 0.9 * free), ladder[-1])


def next_savings(measures: MemorySavings, kind: str) -> MemorySavings | None:
    """What saves more memory than these measures on a device of this kind, or None."""
    ladder = _ladder(kind)
    return next(iter(ladder[ladder.index(measures) + 1 :]), None)


def _ladder(kind: str) -> list[MemorySavings]:
    ladder = [MemorySavings(), MemorySavings(vae_slicing=True), MemorySavings(vae_slicing=True, vae_tiling=True)]
    if kind == "mps":
        ladder += [MemorySavings(True, True, attention_slicing=True)]
    if kind != "cpu":
        ladder += [MemorySavings(True, True, attention_slicing=kind == "mps", offload=True)]
    return ladder


def apply_savings(measures: MemorySavings, pipeline: Any, device: torch.device) -> None:
    """Do so on a pipeline, which is on `device` afterwards, or comes there part by part."""
    vae = next((getattr(pipeline, name) for name in ("vae", "movq", "vqgan") if hasattr(pipeline, name)), None)
    for what, on in (("slicing", measures.vae_slicing), ("tiling", measures.vae_tiling)):
        if switch := getattr(vae, f"{'enable' if on else 'disable'}_{what}", None):
            with contextlib.suppress(NotImplementedError):  # not of this kind of autoencoder
                switch()
    if measures.attention_slicing:
        pipeline.enable_attention_slicing("max")
    if measures.offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
