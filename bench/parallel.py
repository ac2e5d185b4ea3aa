"""Two processes that train one model, beside one process: DistributedDataParallel, FSDP2, and a flat all-reduce.

    python -m bench.parallel                    some two minutes on two cores

Each contender takes the same steps (forward, backward, exchange, clip, AdamW, average) on the same batch, in turns, in
the same two processes of one thread (gloo, this machine); "one" is the first process alone with the whole batch while
the other waits. The flat all-reduce is what the loop did itself before: all gradients laid end to end, after the
backward pass. CPU time is user and system time of a process; where others are at work it says more than a clock.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from bench.train import BATCH, MODEL, batch_of, model
from train.loop import Ema
from train.models.base import count_parameters
from train.parallel import Alone, join
from train.tasks import Denoise

CONTENDERS = ("one", "flat", "DDP", "FSDP2")
STEPS = 3  # of a turn


def main() -> None:
    """Measure in two processes, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        mp.spawn(_rank, (Path(scratch), asked.rounds), 2)  # type: ignore[attr-defined]
        found = json.loads((Path(scratch) / "found.json").read_text())
    print(f"UNet of {found['parameters'] / 1e6:.1f} M parameters, batch {BATCH}, two processes of one thread")
    for name, row in found["contenders"].items():
        print(
            f"    {name:6} {row['ms']:8.0f} ms a step  {row['cpu_ms']:8.0f} CPU-ms a step and process  "
            f"{row['state_mb']:6.1f} MB of weights, average and moments  {row['ratio']:.2f} of one's CPU"
        )
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))


def flat_all_reduce(tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over all processes: one message of all of them."""
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(total.view_as(t))


def _rank(rank: int, scratch: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{scratch / 'store'}", rank=rank, world_size=2)
    steps, sizes = {}, {}
    for name in CONTENDERS:
        steps[name], sizes[name] = _contender(name, rank)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    for i in range(rounds + 1):
        for name in CONTENDERS[:: 1 if i % 2 else -1]:
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            if rank == 0 or name != "one":
                for _ in range(STEPS):
                    steps[name]()
            if i:  # one to warm up
                taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    if rank == 0:
        rows = {}
        for name, seconds in taken.items():
            ratio = median(a[1] / b[1] for a, b in zip(seconds, taken["one"], strict=True))
            wall, cpu = (1000 * median(s[i] for s in seconds) / STEPS for i in (0, 1))
            rows[name] = {"ms": wall, "cpu_ms": cpu, "ratio": ratio, "state_mb": sizes[name] / 1e6}
        parameters = count_parameters([model().unet])
        (scratch / "found.json").write_text(json.dumps({"parameters": parameters, "contenders": rows}))
    dist.destroy_process_group()


def _contender(name: str, rank: int) -> tuple[Callable[[], None], int]:
    """(a step, bytes that this process holds of weights, average and moments)."""
    pipeline = model()
    task = Denoise(pipeline, text=False)
    workers = Alone(task) if name in ("one", "flat") else join(task, shard=name == "FSDP2")
    params = [p for p in task.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
    ema = Ema(params, 0.999)
    shares = range(BATCH) if name == "one" else range(rank, BATCH, 2)
    side = MODEL.size // MODEL.factor
    images = torch.rand(BATCH, MODEL.latents, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = batch_of(pipeline, images[list(shares)], True, shares)
    count = iter(range(10**9))

    def step() -> None:
        with workers.exchanging(last=True):
            (workers.module(*task.inputs(batch, 0, number := next(count))).sum() / BATCH).backward()
        if name == "flat":
            flat_all_reduce([p.grad for p in params if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(number + 1)

    return step, sum(_local(t).nbytes for t in [*params, *ema.mean]) + 2 * sum(_local(p).nbytes for p in params)


def _local(tensor: Any) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


if __name__ == "__main__":
    main()
