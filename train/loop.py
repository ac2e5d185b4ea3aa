"""The training loop: plain Python, one process or several, a generator that yields a record per logged step.

    for record in train(Denoise(pipeline), stream, config, Path("model")):
        print(line(record))

It goes on from the last whole checkpoint in the folder. On a CPU the losses of 100 steps are those of 50, a kill, and
50 more, bit for bit.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aesthetic.errors import UserError
from aesthetic.files import atomic
from curate.report import sheet
from curate.store.disk import check_space
from curate.store.files import write_json
from train import checkpoint
from train.data import Batch, Ints, Stream, TrainDataset, ordered_batches
from train.devices import out_of_memory
from train.tasks import Task, slice_batch
from train.world import World


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How to train; the model itself and the data have settings of their own."""

    steps: int
    batch: int  # samples per step, over all ranks
    micro_batch: int = 0  # samples at a time on one rank; 0: all of its share. Halved where memory runs out
    lr: float = 1e-4  # AdamW's, at its highest
    warmup: int = 50  # steps of rising learning rate
    schedule: str = "cosine"  # cosine: down to 0 at the last step; constant
    weight_decay: float = 0.01
    clip: float = 1.0  # norm of the gradient at most
    ema: float = 0.9999  # decay of the averaged weights, which are what is saved to be used; reached slowly
    seed: int = 0
    checkpointing: bool = False  # gradients recomputed: less memory, a third slower
    compile: bool = False  # torch.compile
    log_every: int = 10
    held_out_every: int = 0  # steps between measurements of held-out loss; 0: at checkpoints
    preview_every: int = 0  # steps between grids of pictures; 0: at checkpoints
    save_every: int = 0  # steps between checkpoints; 0: at the end only
    keep: int = 2  # checkpoints: the last ones, and the best

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}: at least 1 is expected")
        if self.schedule not in ("cosine", "constant"):
            raise UserError(f"train.schedule is {self.schedule!r}: cosine or constant")
        if not 0 <= self.ema < 1 or not self.lr > 0:
            raise UserError(f"train.ema is {self.ema} and train.lr {self.lr}: 0 <= ema < 1 and lr > 0 are expected")

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on: all that changes the numbers."""
        free = (
            "log_every",
            "held_out_every",
            "preview_every",
            "save_every",
            "keep",
            "micro_batch",
            "checkpointing",
            "compile",
        )
        return {k: v for k, v in asdict(self).items() if k not in free}


class Diverged(UserError):
    """The loss or the gradient is not a number any more; says at which step and with which samples."""


class Ema:
    """The running average of parameters, in fp32: mean += (1 - d) (raw - mean), d = min(decay, (1 + n) / (10 + n)).

    The warm-up (as TensorFlow's ExponentialMovingAverage has it) lets short runs forget their random beginning.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._raw, self._decay = list(parameters), decay
        self.mean = [p.detach().clone().float() for p in self._raw]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step`, counted from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.mean, [p.detach().float() for p in self._raw], 1 - decay)

    @torch.no_grad()
    def settle(self) -> None:
        """From now on the modules hold the average."""
        for p, mean in zip(self._raw, self.mean, strict=True):
            p.copy_(mean)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the modules hold the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for i, p in enumerate(self._raw):
            raw = p.detach().clone()
            p.copy_(self.mean[i])
            self.mean[i] = raw.float()


@dataclass
class _Held:
    """What is measured on."""

    examples: TrainDataset
    numbers: Ints


def held_out(examples: TrainDataset, numbers: Ints) -> _Held | None:
    """The held-out pictures as `train` wants them; None where there are none."""
    return _Held(examples, numbers) if len(numbers) else None


def train(
    task: Task,
    stream: Stream,
    config: LoopConfig,
    folder: Path,
    *,
    held: _Held | None = None,
    prompts: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2, 3),
    identity: dict[str, Any] | None = None,
    world: World | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """Train up to `config.steps`, from the last whole checkpoint in `folder` on.

    Args:
        task: what is learnt; its modules are on the device already.
        stream: this rank's batches; made with the same batch, seed and world.
        held: what loss is measured on, raw and averaged, at fixed noise and times.
        prompts: drawn with each of `seeds`, into `folder/samples/000400.png`; () where the task draws without any.
        identity: what else must be the same for a run to go on (model, data), by name.
        stop: asked after each step, of the first rank; where it says True, a checkpoint is saved and the run ends.

    Yields records of logged steps: step, loss (mean since the last record), lr, grad_norm, img_s, tflop_s, mfu (None
    where the device's peak is not known), data_wait (share of time), memory_gb, eta_s, epoch, micro_batch; and held_out
    {raw, ema}, samples and checkpoint where they are due. What is done aside (these three, and what the caller does
    between records) counts in eta_s alone. The last record of a run that was stopped has `stopped`, True. The lines are
    in `folder/log.jsonl` too.

    When the last step is done, the task's modules hold the averaged weights.

    Raises UserError for a folder trained with other settings, DiskFull before the first step where checkpoints would
    not fit, Diverged.
    """
    world = world or World()
    trained = [p for m in task.modules.values() for p in m.parameters() if p.requires_grad]
    device = trained[0].device
    fused = device.type in ("cpu", "cuda")  # one pass over each tensor
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    ema = Ema(trained, config.ema)
    facts = {"config": {**config.identity(), **(identity or {})}}

    folder.mkdir(parents=True, exist_ok=True)
    check_space(folder, (config.keep + 2) * 5 * 4 * sum(p.numel() for p in trained))  # raw, average, two moments; EMA
    step, cursor, micro = 0, (0, 0), config.micro_batch or math.ceil(config.batch / world.size)
    if state := checkpoint.load_state(folder, facts["config"]):
        step, cursor = state["step"], tuple(state["cursor"])
        with torch.no_grad():
            for p, raw, mean, average in zip(trained, state["raw"], state["mean"], ema.mean, strict=True):
                p.copy_(raw)
                average.copy_(mean)
        optimizer.load_state_dict(state["optimizer"])
    log = _Log(folder / "log.jsonl" if world.rank == 0 else None, step)

    for module in task.modules.values():
        module.train()
        if config.checkpointing:
            _recompute(module)
        if config.compile:
            module.compile()

    batches = stream.batches(cursor)
    meter = _Meter(config, device)
    try:
        while step < config.steps:
            batch = meter.waited(lambda: next(batches))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            loss, micro = _gradients(task, batch, config, step, micro, device, trained)
            world.all_reduce([*(p.grad for p in trained if p.grad is not None), loss])
            norm = torch.nn.utils.clip_grad_norm_(trained, config.clip)
            if not math.isfinite(value := float(loss)) or not math.isfinite(float(norm)):
                raise _diverged(folder, step, batch, value, float(norm), world.rank)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, cursor = step + 1, batch.cursor
            ema.update(step)
            meter.stepped(value)

            last = step == config.steps
            record: dict[str, Any] = {}
            if not last and world.rank == 0 and stop():
                record["stopped"] = True
            saves = last or _due(config.save_every, step)
            with meter.aside(), torch.compiler.set_stance("force_eager"):  # not compiled again for other shapes
                if record:
                    saves = True  # and nothing else: whoever stops a run does not want to wait
                elif held is not None and (saves or _due(config.held_out_every, step)):
                    record["held_out"] = _measure(task, held, config, micro, device, ema)
                if world.rank == 0 and "stopped" not in record and (saves or _due(config.preview_every, step)):
                    record["samples"] = _save_preview(task, ema, folder, step, prompts, seeds, device)
                if world.rank == 0 and saves:
                    state = {"step": step, "cursor": list(cursor), "optimizer": optimizer.state_dict()}
                    known = {**facts, "held_out": record.get("held_out")}
                    state |= {"raw": [p.detach().clone() for p in trained], "mean": list(ema.mean)}
                    with ema.applied():
                        path = checkpoint.save(folder, step, task.save, state, known, keep=config.keep)
                    record["checkpoint"] = str(path)
            if record or last or step % config.log_every == 0:
                record = {**meter.record(task, batch, step, norm), **record}
                record |= {"epoch": cursor[0], "micro_batch": micro, "lr": learning_rate(config, step - 1)}
                log.write(record)
                with meter.aside():
                    yield record
                if "stopped" in record:
                    return
        ema.settle()
    finally:
        batches.close()
        log.close()


def learning_rate(config: LoopConfig, step: int) -> float:
    """Of the step after `step` steps: rising over `warmup` steps, then constant, or a cosine down to 0 at the end."""
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    if config.schedule == "constant":
        return config.lr * rise
    done = max(0.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    return config.lr * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _gradients(
    task: Task,
    batch: Batch,
    config: LoopConfig,
    step: int,
    micro: int,
    device: torch.device,
    trained: list[nn.Parameter],
) -> tuple[Tensor, int]:
    """Gradients of this rank's part of the mean loss over the whole batch; that part, and the micro-batch that fitted.

    Each sample counts 1 / batch whatever rank and micro-batch it is in: their sum is the gradient of the mean.
    """
    while True:
        try:
            total = torch.zeros((), device=device)
            for start in range(0, len(batch.keys), micro):
                with autocast(device):
                    losses = task.losses(slice_batch(batch, start, start + micro), config.seed, step)
                part = losses.sum() / config.batch
                part.backward()
                total += part.detach()
            return total, micro
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
            if micro == 1:
                raise UserError(
                    "one sample at a time does not fit into memory. A smaller preset, or checkpointing, would help."
                ) from e
        for p in trained:  # outside of the except block, which holds on to the tensors of the failed pass
            p.grad = None
        gc.collect()  # what cycles of the failed pass hold on to
        if device.type == "cuda":
            torch.cuda.empty_cache()
        micro = max(1, min(micro, len(batch.keys)) // 2)


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on CUDA, fp32 elsewhere; weights and their updates are always fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _recompute(module: nn.Module) -> None:
    """Gradient checkpointing, by the name that diffusers or transformers gives it."""
    for name in ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(module, name):
            getattr(module, name)()
            return


@torch.no_grad()
def _measure(
    task: Task, held: _Held, config: LoopConfig, micro: int, device: torch.device, ema: Ema
) -> dict[str, float]:
    """Mean held-out loss, of the raw weights and of their average."""

    def mean() -> float:
        found = []
        for batch in ordered_batches(held.examples, held.numbers, micro):
            with autocast(device):
                found.append(task.held_out_losses(batch, config.seed).float().cpu())
        return float(torch.cat(found).mean())

    modules = list(task.modules.values())
    for m in modules:
        m.eval()
    try:
        raw = mean()
        with ema.applied():
            return {"raw": raw, "ema": mean()}
    finally:
        for m in modules:
            m.train()


def _save_preview(
    task: Task, ema: Ema, folder: Path, step: int, prompts: Sequence[str], seeds: Sequence[int], device: torch.device
) -> str:
    with ema.applied(), autocast(device):
        rows = task.preview(prompts, seeds)
    return str(sheet(folder / "samples" / f"{step:06d}.png", f"after {step:,} steps", rows))


def _diverged(folder: Path, step: int, batch: Batch, loss: float, norm: float, rank: int) -> Diverged:
    path = folder / f"diverged-{rank}.json"
    write_json(path, {"step": step, "loss": str(loss), "grad_norm": str(norm), "keys": batch.keys})
    return Diverged(
        f"step {step + 1}: the loss is {loss}, the gradient's norm {norm}. Samples {', '.join(batch.keys[:5])} "
        f"{'and others ' if len(batch.keys) > 5 else ''}(all in {path}). Nothing of this step was kept. "
        f"A lower lr or clip, or the removal of a broken picture, would help; the last checkpoint is whole."
    )


# ------------------------------------------------------------------------------------------------- what is seen of it

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "4090": 165e12}
"""Dense bf16 FLOP/s by part of the device's name, from the makers' data sheets: what MFU is a share of."""


WAITS = 0.1
"""Share of time spent waiting for data from which on `line` warns."""


class _Meter:
    """Times, speed and memory since the last record; the first one counts from when the first batch is there."""

    def __init__(self, config: LoopConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._flops: float | None = None  # of one sample's training
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak = next((v for k, v in PEAK.items() if k in name), None)
        self._began, self._done = time.perf_counter(), 0  # steps, of this process
        self._start()

    def _start(self) -> None:
        self._since, self._wait = time.perf_counter(), 0.0
        self._losses: list[float] = []

    def waited(self, take: Callable[[], Batch]) -> Batch:
        before = time.perf_counter()
        batch = take()
        self._wait += time.perf_counter() - before
        if not self._done:
            self._start()
        return batch

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is done within does not count as training time."""
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before

    def stepped(self, loss: float) -> None:
        self._losses.append(loss)
        self._done += 1

    def record(self, task: Task, batch: Batch, step: int, norm: Tensor) -> dict[str, Any]:
        now, steps = time.perf_counter(), len(self._losses)
        seconds = now - self._since
        if self._flops is None:
            self._flops = training_flops(task, batch, self._config)
        images = steps * self._config.batch / seconds
        done = {
            "step": step,
            "steps": self._config.steps,
            "loss": sum(self._losses) / steps,
            "grad_norm": float(norm),
            "img_s": images,
            "tflop_s": images * self._flops / 1e12,
            "mfu": images * self._flops / self._peak if self._peak else None,
            "data_wait": self._wait / seconds,
            "memory_gb": _memory(self._device),
            # at the pace of this process so far, with checkpoints, pictures and whatever else took its time
            "eta_s": (self._config.steps - step) * (now - self._began) / self._done,
        }
        self._start()
        return done


def training_flops(task: Task, batch: Batch, config: LoopConfig) -> float:
    """Floating-point operations of training on one sample: a forward and a backward pass, counted as they are done.

    What checkpointing computes a second time is not counted, as usual for MFU (Chowdhery et al. 2022, PaLM).
    """
    from torch.utils.flop_counter import FlopCounterMode

    device = next(p.device for m in task.modules.values() for p in m.parameters())
    trained = [p for m in task.modules.values() for p in m.parameters() if p.requires_grad]
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        with autocast(device):
            loss = task.losses(slice_batch(batch, 0, 1), config.seed, 0).sum()
        forward = counter.get_total_flops()
        torch.autograd.grad(loss, trained, allow_unused=True)
        backward = counter.get_total_flops() - forward
    return forward + backward * (2 / 3 if config.checkpointing else 1)  # 2 forward passes' worth of its 3


def _memory(device: torch.device) -> float:
    """Gigabytes at most so far: of the GPU's memory, or of this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def format_record(record: dict[str, Any]) -> str:
    """A record in one line."""
    speed = f"MFU {record['mfu']:.0%}" if record["mfu"] is not None else f"{record['tflop_s'] * 1000:.0f} GFLOP/s"
    rate = f"{record['img_s']:.{0 if record['img_s'] >= 10 else 2}f}"
    minutes, seconds = divmod(round(record["eta_s"]), 60)
    text = (
        f"step {record['step']}/{record['steps']}  loss {record['loss']:.4f}  {rate} img/s  {speed}  "
        f"data-wait {record['data_wait']:.0%}  {record['memory_gb']:.1f} GB  eta {minutes}:{seconds:02d}"
    )
    if record["data_wait"] > WAITS:
        text += "  WARNING: training waits for data. Latents computed once, or more loader workers, would help."
    if found := record.get("held_out"):
        text += f"  held-out {found['raw']:.4f} (EMA {found['ema']:.4f})"
    if "samples" in record:
        text += f"  pictures: {record['samples']}"
    return text


class _Log:
    """Records as JSON lines. A run that goes on drops the lines of steps that it does again."""

    def __init__(self, path: Path | None, step: int) -> None:
        self._file = None
        if path is None:
            return
        kept = []
        if path.exists():
            for text in path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # the last line of a process that was killed
                    if json.loads(text)["step"] <= step:
                        kept.append(text)
        with atomic(path) as f:
            f.write("".join(t + "\n" for t in kept).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed with the run

    def write(self, record: dict[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file:
            self._file.close()
