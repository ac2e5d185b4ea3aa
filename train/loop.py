"""The training loop: plain Python, one process or several, a generator that yields a record per logged step.

    for record in train(Denoise(pipeline), stream, config, Path("model")):
        print(format_record(record))

It goes on from the last whole checkpoint in the folder. On a CPU the losses of 100 steps are those of 50, a kill, and
50 more, bit for bit.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aesthetic.errors import UserError
from curate.sheets import sheet
from curate.store.files import check_space, write_json
from train import checkpoint
from train.data import Batch, Ints, Stream, TrainDataset, ordered_batches
from train.devices import autocast, out_of_memory
from train.metrics import RecordLog, TrainMeter
from train.optimizer import new_optimizer, set_rate
from train.parallel import Alone, join, peers, rank_and_size
from train.places import shown
from train.tasks import Task, slice_batch

SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How to train; the model itself and the data have settings of their own."""

    steps: int
    batch: int  # samples per step, over all ranks
    micro_batch: int = 0  # samples at a time on one rank; 0: all of its share. Halved where memory runs out
    lr: float = 1e-4  # AdamW's, at its highest
    muon: float = 0.0  # Muon's then, for the matrices of a transformer's blocks; 0: AdamW for all
    warmup: int = 50  # steps of rising learning rate
    schedule: str = "cosine"  # cosine: down to 0 at the last step; constant
    weight_decay: float = 0.01
    clip: float = 1.0  # norm of the gradient at most
    ema: float = 0.9999  # decay of the averaged weights, which are what is saved to be used; reached slowly
    seed: int = 0
    checkpointing: bool = False  # gradients recomputed: less memory, a third slower
    compile: bool = False  # torch.compile
    shard: bool = False  # each rank holds a share of the model: for one that does not fit on one device
    log_every: int = 10
    held_out_every: int = 0  # steps between measurements of held-out loss; 0: at checkpoints
    preview_every: int = 0  # steps between grids of generated images; 0: at checkpoints
    save_every: int = 0  # steps between checkpoints; 0: at the end only
    keep: int = 2  # checkpoints: the last ones, and the best

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}: at least 1 is expected")
        if self.schedule not in SCHEDULES:
            raise UserError(f"train.schedule is {self.schedule!r}: {' or '.join(SCHEDULES)}")
        if not 0 <= self.ema < 1 or not self.lr > 0:
            raise UserError(f"train.ema is {self.ema} and train.lr {self.lr}: 0 <= ema < 1 and lr > 0 are expected")

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on: all that changes the numbers."""
        free = {"log_every", "held_out_every", "preview_every", "save_every", "keep"}
        free |= {"micro_batch", "checkpointing", "compile", "shard"} | (set() if self.muon else {"muon"})
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
    def copy_to_parameters(self) -> None:
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


def train(
    task: Task,
    stream: Stream,
    config: LoopConfig,
    folder: Path,
    *,
    held_out: Ints | None = None,
    prompts: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2, 3),
    identity: dict[str, Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """Train up to `config.steps`, from the last whole checkpoint in `folder` on.

    Args:
        task: what is learnt; its modules are on the device already.
        stream: this rank's batches; made with the same batch and seed, and this rank.
        held_out: indices of the examples that loss is measured on, raw and averaged, at fixed noise and times.
        prompts: generated with each of `seeds`, into `folder/samples/000400.png`; () where the task needs none.
        identity: what else must be the same for a run to go on (model, data), by name.
        should_stop: asked after each step, of the first rank; True: a checkpoint is saved and the run ends.

    Yields records of logged steps: step, loss (mean since the last record), lr, grad_norm, img_s, tflop_s, mfu (None
    where the device's peak is not known), data_wait (share of time), memory_gb, eta_s, epoch, micro_batch; and held_out
    {raw, ema}, samples and checkpoint where they are due. The time of these three, and of what the caller does between
    records, counts in eta_s alone. The last record of a run that was stopped has `stopped`, True. The lines are in
    `folder/log.jsonl` too.

    When the last step is done, the task's modules hold the averaged weights.

    Raises UserError for a folder trained with other settings, DiskFull before the first step where checkpoints would
    not fit, Diverged.
    """
    rank, ranks = rank_and_size()
    names = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
    for module in task.modules.values():
        module.train()
        if config.checkpointing:  # by the name that diffusers or transformers gives it
            next((getattr(module, name) for name in names if hasattr(module, name)), lambda: None)()
    micro_batch = config.micro_batch or math.ceil(config.batch / ranks)
    workers = join(task, shard=config.shard, compile=config.compile)
    trained = {name: p for name, p in task.module.named_parameters() if p.requires_grad}
    params = list(trained.values())
    device = params[0].device
    rates = {"lr": config.lr, "muon": config.muon, "weight_decay": config.weight_decay}
    optimizer = new_optimizer(params, task.matrices(), **rates)
    ema = Ema(params, config.ema)
    facts = {"config": {**config.identity(), **(identity or {})}}

    folder.mkdir(parents=True, exist_ok=True)
    check_space(folder, (config.keep + 2) * 5 * 4 * sum(p.numel() for p in params))  # raw, average, two moments; EMA
    step, cursor = 0, (0, 0)
    if before := checkpoint.last_record(folder, facts["config"]):
        step, cursor = before["step"], tuple(before["cursor"])
        _make_moments(optimizer, params)
        checkpoint.load_tensors(checkpoint.path_of(folder, step), _state(trained, ema, optimizer))
    log = RecordLog(folder / "log.jsonl", step) if rank == 0 else None

    batches = stream.batches(cursor)
    meter = TrainMeter(config.steps, config.batch, device, ranks=ranks, checkpointing=config.checkpointing)
    try:
        while step < config.steps:
            batch = meter.wait_for(lambda: next(batches))
            set_rate(optimizer, learning_rate(config, step))
            loss, micro_batch, stopped = _backward(workers, batch, config, step, micro_batch, should_stop)
            with peers():
                grad_norm = float(_whole(torch.nn.utils.clip_grad_norm_(params, config.clip)))
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                raise _diverged(folder, step, batch, loss, grad_norm, rank)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, cursor = step + 1, batch.cursor
            ema.update(step)
            meter.add_step(loss)

            last = step == config.steps
            takes_part = rank == 0 or workers.sharded  # in what one process does for all
            save = last or stopped or _is_due(config.save_every, step)
            record: dict[str, Any] = {"stopped": True} if stopped else {}
            # not compiled again for other shapes
            with meter.excluded(), peers(), torch.compiler.set_stance("force_eager"):
                if not stopped:  # whoever stops a run does not want to wait
                    if held_out is not None and len(held_out) and (save or _is_due(config.held_out_every, step)):
                        record["held_out"] = _held_out_loss(
                            task, stream.dataset, held_out, config.seed, micro_batch, ema, device
                        )
                    if takes_part and (save or _is_due(config.preview_every, step)):
                        with ema.applied(), autocast(device):
                            rows = task.preview(prompts, seeds)
                        if rank == 0:
                            path = folder / "samples" / f"{step:06d}.png"
                            record["samples"] = shown(sheet(path, f"after {step:,} steps", rows))
            save = save and takes_part
            if record or save or last or step % config.log_every == 0:
                with peers():
                    record = {**meter.record(task, batch, step, grad_norm), **record}
                record |= {"epoch": cursor[0], "micro_batch": micro_batch, "lr": learning_rate(config, step - 1)}
                if save:
                    record["checkpoint"] = shown(checkpoint.path_of(folder, step))
                with meter.excluded(), peers():
                    if log:  # before the checkpoint: a run that goes on drops lines, and can't make up for one
                        log.write(record, sync=save)
                    if save:
                        known = {**facts, "cursor": list(cursor), "held_out": record.get("held_out")}
                        state = _state(trained, ema, optimizer)
                        checkpoint.save(
                            folder, step, _export(workers, ema), state, known,
                            together=workers.sharded, keep=config.keep,
                        )  # fmt: skip
                    yield record
                if stopped:
                    return
        ema.copy_to_parameters()
    finally:
        batches.close()
        if log:
            log.close()


def learning_rate(config: LoopConfig, step: int) -> float:
    """Of the step after `step` steps: rising over `warmup` steps, then constant, or a cosine down to 0 at the end."""
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    if config.schedule == "constant":
        return config.lr * rise
    done = max(0.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    return config.lr * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _backward(
    workers: Alone, batch: Batch, config: LoopConfig, step: int, micro_batch: int, should_stop: Callable[[], bool]
) -> tuple[float, int, bool]:
    """Gradients of the mean loss over the whole batch; that loss, the micro-batch that fitted, whether to stop.

    Each sample counts 1 / batch whatever rank and micro-batch it is in: their sum is the gradient of the mean. A rank
    where memory runs out says so with its part of the loss; then all try again with half the micro-batch.
    """
    params = list(workers.task.module.parameters())
    device, count = params[0].device, len(batch.keys)
    while True:
        total, failed = torch.zeros((), device=device), False
        try:
            for start in range(0, count, micro_batch):
                with peers(), workers.exchanging(start + micro_batch >= count):
                    total += _pass(workers, slice_batch(batch, start, start + micro_batch), config, step, device)
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
            if workers.sharded:
                raise UserError(
                    f"{micro_batch} images at a time do not fit into memory. --micro-batch {max(1, micro_batch // 2)}, "
                    f"--checkpointing or more workers would help."
                ) from e
            failed = True
        if failed:  # outside of the except block, which holds on to the tensors of the failed pass
            _forget(params)
            workers.give_up()
        stop = rank_and_size()[0] == 0 and step + 1 < config.steps and should_stop()
        loss, failures, stopped = workers.sum(float(total), failed, stop)
        if not failures:
            return loss, micro_batch, bool(stopped)
        if micro_batch == 1:
            raise UserError("one sample at a time does not fit into memory. A smaller preset, or checkpointing, helps.")
        _forget(params)
        workers.start_again()
        micro_batch = max(1, min(micro_batch, count) // 2)


def _pass(workers: Alone, batch: Batch, config: LoopConfig, step: int, device: torch.device) -> Tensor:
    with autocast(device):
        part = workers.module(*workers.task.inputs(batch, config.seed, step)).sum() / config.batch
    part.backward()
    return part.detach()


def _forget(params: Sequence[nn.Parameter]) -> None:
    """Gradients, and what cycles of a failed pass hold on to."""
    for p in params:
        p.grad = None
    gc.collect()
    if params[0].device.type == "cuda":
        torch.cuda.empty_cache()


def _whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, as one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _make_moments(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter]) -> None:
    """Have an optimizer make its state, which a checkpoint is read into; the parameters are read then too."""
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _state(trained: Mapping[str, nn.Parameter], ema: Ema, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """By name all tensors that training goes on from: raw and averaged weights, and what the optimizer keeps of each.

    They share memory with those in use.
    """
    state = {f"raw.{name}": p.detach() for name, p in trained.items()}
    state |= {f"mean.{name}": mean for name, mean in zip(trained, ema.mean, strict=True)}
    for name, p in trained.items():
        state |= {f"{kind}.{name}": t.view(1) if t.dim() == 0 else t for kind, t in optimizer.state[p].items()}
    return state


def _export(workers: Alone, ema: Ema) -> Callable[[Path], None]:
    """What writes the models of a checkpoint, with the averaged weights."""

    def write(folder: Path) -> None:
        with ema.applied(), workers.whole() as first:
            if first:
                workers.task.save(folder)

    return write


@torch.no_grad()
def _held_out_loss(
    task: Task, dataset: TrainDataset, indices: Ints, seed: int, batch_size: int, ema: Ema, device: torch.device
) -> dict[str, float]:
    """Mean held-out loss, of the raw weights and of their average."""
    modules = list(task.modules.values())

    def mean() -> float:
        losses = []
        for batch in ordered_batches(dataset, indices, batch_size):
            with autocast(device):
                losses.append(task.held_out_losses(batch, seed).float().cpu())
        return float(torch.cat(losses).mean())

    for m in modules:
        m.eval()
    try:
        raw = mean()
        with ema.applied():
            return {"raw": raw, "ema": mean()}
    finally:
        for m in modules:
            m.train()


def _diverged(folder: Path, step: int, batch: Batch, loss: float, grad_norm: float, rank: int) -> Diverged:
    path = folder / f"diverged-{rank}.json"
    write_json(path, {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "keys": batch.keys})
    return Diverged(
        f"step {step + 1}: the loss is {loss}, the gradient's norm {grad_norm}. Samples {', '.join(batch.keys[:5])} "
        f"{'and others ' if len(batch.keys) > 5 else ''}(all in {path}). Nothing of this step was kept. "
        f"A lower lr or clip, or the removal of a broken image, would help; the last checkpoint is whole."
    )
