"""What is seen of a training run: speed, FLOPs and memory, log.jsonl, TensorBoard, the loss as a plot."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.distributed.tensor import DTensor

from aesthetic.errors import UserError
from aesthetic.files import atomic
from aesthetic.plots import drawing
from train.checkpoint import checkpoints
from train.data import Batch
from train.devices import autocast
from train.tasks import Task, slice_batch

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")

PEAK_FLOPS = {
    # nvidia.com/data-center: GB200 NVL72, HGX (of eight: 36 PFLOP/s with sparsity, half without), H200, H100, A100
    "GB300": 2500e12, "GB200": 2500e12, "B300": 2250e12, "B200": 2250e12,
    "H200 NVL": 836e12, "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A40": 150e12, "A10": 125e12,
    "A10G": 70e12,  # aws.amazon.com/ec2/instance-types/g5
    # white papers of NVIDIA's RTX Blackwell, Ada and Ampere GA102: tensor cores that add up in fp32
    "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12, "RTX 6000 Ada": 364e12, "RTX A6000": 155e12,
    # amd.com/products/accelerators/instinct; of an MI250X torch sees two, with a half of its 383 each
    "MI355X": 2500e12, "MI350X": 2300e12, "MI325X": 1307e12, "MI300X": 1307e12, "MI300A": 981e12, "MI250X": 191.5e12,
}  # fmt: skip
"""Dense bf16 FLOP/s by a part of the device's name, from the makers' data sheets: what MFU is a share of."""

MAX_DATA_WAIT = 0.1
"""Share of time spent waiting for data from which on `format_record` warns."""

SCALARS = ("loss", "lr", "grad_norm", "img_s", "tflop_s", "mfu", "data_wait", "memory_gb")
"""What of a record goes to TensorBoard, beside held-out loss."""


class TrainMeter:
    """Times, speed and memory since the last record; the first one counts from when the first batch is there."""

    def __init__(
        self, steps: int, batch: int, device: torch.device, *, ranks: int = 1, checkpointing: bool = False
    ) -> None:
        """`batch`: of all `ranks` together, each of which has a device like `device`."""
        self._steps, self._batch, self._device, self._checkpointing = steps, batch, device, checkpointing
        self._flops: float | None = None  # of one sample's training
        one = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._peak = one and one * ranks
        self._began, self._done = time.perf_counter(), 0  # steps, of this process
        self._reset()

    def _reset(self) -> None:
        self._since, self._wait = time.perf_counter(), 0.0
        self._losses: list[float] = []

    def wait_for(self, load: Callable[[], T]) -> T:
        """What `load` returns, its time counted as waiting for data."""
        before = time.perf_counter()
        loaded = load()
        self._wait += time.perf_counter() - before
        if not self._done:
            self._reset()
        return loaded

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """What is done within does not count as training time."""
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before

    def add_step(self, loss: float) -> None:
        self._losses.append(loss)
        self._done += 1

    def record(self, task: Task, batch: Batch, step: int, grad_norm: float) -> dict[str, Any]:
        """The figures of the steps since the last record."""
        now, steps = time.perf_counter(), len(self._losses)
        seconds = now - self._since
        if self._flops is None:
            self._flops = training_flops(task, batch, checkpointing=self._checkpointing)
        images_per_s = steps * self._batch / seconds
        if self._device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self._device)
        else:  # of this process
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        record = {
            "step": step,
            "steps": self._steps,
            "loss": sum(self._losses) / steps,
            "grad_norm": grad_norm,
            "img_s": images_per_s,
            "tflop_s": images_per_s * self._flops / 1e12,
            "mfu": images_per_s * self._flops / self._peak if self._peak else None,
            "data_wait": self._wait / seconds,
            "memory_gb": memory / 1e9,  # at most so far
            # at the pace of this process so far, with checkpoints, previews and whatever else took its time
            "eta_s": (self._steps - step) * (now - self._began) / self._done,
        }
        self._reset()
        return record


def peak_flops(device: str) -> float | None:
    """FLOP/s in bf16 of a device of this name; None where they are not known, as of a slice (MIG) of one."""
    if re.search(r"\b(MIG|Laptop|\d+ D)\b", device):
        return None
    return next((flops for name, flops in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device)), None)


def training_flops(task: Task, batch: Batch, *, checkpointing: bool = False) -> float:
    """Floating-point operations of training on one sample: a forward and a backward pass, counted as they are done.

    The sample is the one whose caption is of middle length. What is computed a second time, by checkpointing or inside
    of fused attention, is not counted, as usual for MFU (Chowdhery et al. 2022, PaLM), nor what the optimizer does.
    """
    trained = [p for p in task.module.parameters() if p.requires_grad]
    middle = int(batch.lengths.argsort(stable=True)[len(batch.keys) // 2])
    sample = slice_batch(batch, middle, middle + 1)
    sample = replace(sample, tokens=sample.tokens[:, : int(sample.lengths[0])])
    with torch.compiler.set_stance("force_eager"), flop_counter() as counter:
        with autocast(trained[0].device):
            loss = task.module(*task.inputs(sample, 0, 0)).sum()
        forward = counter.get_total_flops()
        if isinstance(trained[0], DTensor):  # whose gradients are made in its own hooks, and by all processes
            loss.backward()
            for p in trained:
                p.grad = None
        else:
            torch.autograd.grad(loss, trained, allow_unused=True)
        backward = counter.get_total_flops() - forward
    return forward + backward * (2 / 3 if checkpointing else 1)  # 2 forward passes' worth of its 3, nearly


def flop_counter() -> FlopCounterMode:
    """torch's, which gives the backward pass of fused attention five products: here it has four.

    The fifth is one of the forward pass again. So the number is the same for all kinds of attention.
    """
    from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count

    def backward(
        grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *rest: Any, **more: Any
    ) -> int:
        return sdpa_backward_flop_count(grad, query, key, value) * 4 // 5

    fused = [op for op in flop_registry if "_scaled_dot_product" in str(op) and str(op).endswith("_backward")]
    return FlopCounterMode(display=False, custom_mapping=dict.fromkeys(fused, backward))


def format_record(record: dict[str, Any]) -> str:
    """A record in one line."""
    speed = f"MFU {record['mfu']:.0%}" if record["mfu"] is not None else f"{record['tflop_s'] * 1000:.0f} GFLOP/s"
    rate = f"{record['img_s']:.{0 if record['img_s'] >= 10 else 2}f}"
    minutes, seconds = divmod(round(record["eta_s"]), 60)
    text = (
        f"step {record['step']}/{record['steps']}  loss {record['loss']:.4f}  {rate} img/s  {speed}  "
        f"data-wait {record['data_wait']:.0%}  {record['memory_gb']:.1f} GB  eta {minutes}:{seconds:02d}"
    )
    if record["data_wait"] > MAX_DATA_WAIT:
        text += "  WARNING: training waits for data. Latents computed once, or more loader workers, would help."
    if held_out := record.get("held_out"):
        text += f"  held-out {held_out['raw']:.4f} (EMA {held_out['ema']:.4f})"
    if "samples" in record:
        text += f"  images: {record['samples']}"
    return text


class RecordLog:
    """Records as JSON lines. A run that goes on from `step` drops the lines of steps that it does again."""

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # the last line of a process that was killed
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
        with atomic(path) as f:
            f.write("".join(kept).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed with the run

    def write(self, record: dict[str, Any], *, sync: bool = False) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if sync:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def log_to_tensorboard(records: Iterable[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    """The records of `loop.train` into the model folder `folder`, each written to `folder/tensorboard` on its way.

    Where a run goes on from a checkpoint, the steps after it that TensorBoard knows are done again, and seen once.
    Raises UserError, at once, where the package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise UserError("TensorBoard is not installed: `pip install 'tastemaker[tensorboard]'`") from e
    last = max(checkpoints(folder), default=0)
    writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=last + 1)

    def written() -> Iterator[dict[str, Any]]:
        with writer:
            for record in records:
                step = record["step"]
                for name in SCALARS:
                    if record[name] is not None:
                        writer.add_scalar(name, record[name], step)
                for kind, loss in (record.get("held_out") or {}).items():
                    writer.add_scalar(f"held_out/{kind}", loss, step)
                if "samples" in record:
                    image = Image.open(record["samples"]).convert("RGB")
                    writer.add_image("samples", np.asarray(image), step, dataformats="HWC")
                writer.flush()
                yield record

    return written()


def plot_loss(folder: Path) -> Path | None:
    """Plot `folder/log.jsonl` as `folder/loss.png`: training loss, and held-out loss of raw and averaged weights.

    None, and nothing is written, where fewer than two steps were logged. The scale is logarithmic.
    """
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    if len(records) < 2:
        return None
    measured = [r for r in records if r.get("held_out")]
    with drawing(folder / "loss.png", f"{folder.name}: loss", 7.0, 4.2) as figure:
        axes = figure.subplots()
        axes.plot([r["step"] for r in records], [r["loss"] for r in records], color="#c9c7c0", label="training")
        for kind, color, label in (("raw", "#b9702a", "held out"), ("ema", "#2f7d6d", "held out, averaged weights")):
            points = [r["step"] for r in measured], [r["held_out"][kind] for r in measured]
            axes.plot(*points, "o-", color=color, markersize=3, label=label)
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(color="#e4e2dc", linewidth=0.7, which="both")
        axes.set_axisbelow(True)
        axes.legend(loc="upper right")
    return folder / "loss.png"
