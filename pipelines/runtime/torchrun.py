"""A training run whose processes torchrun has started: the first one carries out the command, the others follow it.

    torchrun --standalone --nproc-per-node 2 $(which tastemaker) train SHARDS --out MODEL

What is done once, such as looking at the images, the first does; the others wait until it says what is next.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pipelines.runtime.progress import redirect_output

if TYPE_CHECKING:
    from pipelines.runtime.trainers import TrainJob
    from train.latents import Tell
    from train.run import Record, ShouldStop, TrainRun

_LONG = timedelta(days=7)
"""For which the others wait for the first, that looks at images; torchrun ends them all where one dies."""


def launched() -> tuple[int, int] | None:
    """(rank, number of processes) where torchrun has started this one with others."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or (size := int(os.environ.get("WORLD_SIZE", 1))) < 2:
        return None
    return int(os.environ["RANK"]), size


class ProcessGroup:
    """The processes that torchrun has started, and what the first says to the others."""

    def __init__(self) -> None:
        import torch
        import torch.distributed as dist

        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        # by a store of this attempt alone: torch 2.15 finds there the addresses of processes that it has started again
        attempt = f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # torchrun's
        dist.init_process_group(
            "gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl",
            store=dist.PrefixStore(attempt, store),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
        self._words: Any = dist.new_group(backend="gloo", timeout=_LONG)
        self._all_are_busy = False

    def say(self, *words: Any) -> None:
        """To the others, what they are to do next; nothing: that all is done."""
        import torch.distributed as dist

        dist.broadcast_object_list([words], group=self._words)

    def hear(self) -> Any:
        """What the first one says next."""
        import torch.distributed as dist

        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, group=self._words)
        return heard[0]

    @contextlib.contextmanager
    def together(self, *words: Any) -> Iterator[None]:
        """Around what all do at the same time; the others are told `words`."""
        self.say(*words)
        self._all_are_busy = True
        yield
        self.wait()
        self._all_are_busy = False

    def wait(self) -> None:
        """Until all are here."""
        import torch.distributed as dist

        dist.barrier(group=self._words)

    def close(self) -> None:
        """Let the others go; where they are in the midst of something, they find out by themselves."""
        import torch.distributed as dist

        if not self._all_are_busy:
            with contextlib.suppress(RuntimeError):  # they are gone already
                self.say()
            dist.destroy_process_group()


class TorchrunTrainer:
    """Carries out the stages of a run in all processes of the group; this is the first."""

    def __init__(self, group: ProcessGroup, job: TrainJob, run: TrainRun, size: int) -> None:
        self._group, self._job, self._run = group, job, run
        self.about = f"{size} processes with {'a GPU' if group.device.type == 'cuda' else 'the CPU'} each"

    def train(self, stage: str, should_stop: ShouldStop) -> Iterator[Record]:
        """Train `autoencoder` or `model` to the end, or until `should_stop`; records as `train.loop.train` yields."""
        from pipelines.runtime.trainers import train_stage
        from train.places import push

        push(self._run.out)
        with self._group.together("train", self._job, stage):
            for record in train_stage(self._run, stage, should_stop):
                if "checkpoint" in record:
                    push(self._run.out)
                yield record

    def precompute_latents(self, tell: Tell) -> None:
        """Write the latents that are missing, each process its share of the shards."""

        def write_shards(made: dict[str, Any], missing: list[int]) -> None:
            with self._group.together("latents", self._job, made, missing):
                for shard in _share(missing):
                    self._run.write_latents(shard, made, tell)

        self._run.precompute_latents(tell, write_shards)


def follow(group: ProcessGroup) -> None:
    """In every process but the first: do what that says, until it says that all is done."""
    from pipelines.runtime.trainers import train_stage
    from train.parallel import rank_and_size

    for number in (signal.SIGINT, signal.SIGTERM):  # the first decides, and ends with a checkpoint
        signal.signal(number, signal.SIG_IGN)
    while words := group.hear():
        what, job, *more = words
        job = job.there()
        with redirect_output(job.options.out / "logs" / f"train-{rank_and_size()[0]}.log"):
            run = job.open(group.device)
            if what == "train":
                for _ in train_stage(run, more[0], lambda: False):
                    pass
            else:
                made, missing = more
                for shard in _share(missing):
                    run.write_latents(shard, made, lambda count: None)
            group.wait()


def _share(items: list[int]) -> list[int]:
    from train.parallel import rank_and_size

    rank, size = rank_and_size()
    return items[rank::size]
