"""Several processes that train one model, by torch: each has all of it (DistributedDataParallel) or a share (FSDP2).

Ray Train or torchrun makes the process group; without one there is one process. Gradients are sums over all processes:
each sample counts 1 / batch wherever it is, so that N processes make what one makes of the same batch.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aesthetic.errors import UserError
from train.tasks import Task


class PeerLost(RuntimeError):
    """Another of the processes that train together is gone, so that they can't add up."""


def rank_and_size() -> tuple[int, int]:
    """Which of the processes this is, from 0 on, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def join(task: Task, *, shard: bool = False, compile: bool = False) -> Alone:
    """Make ready the task's module, in place, for all processes that there are; every one of them calls this.

    Parameters must be the same everywhere; where they are sharded, they are other objects afterwards. UserError where
    one process alone is to shard.
    """
    if shard:
        if not (dist.is_available() and dist.is_initialized()):
            raise UserError("to shard a model takes several workers: give --workers, or start them with torchrun")
        return Sharded(task, compile)
    for model in task.modules.values() if compile else ():
        model.compile()
    return Replicated(task) if rank_and_size()[1] > 1 else Alone(task)


class Alone:
    """One process, which exchanges nothing."""

    sharded = False

    def __init__(self, task: Task) -> None:
        self.task = task
        self.module = task.module  # what is called with the task's inputs

    def exchanging(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around the pass of a micro-batch; gradients are exchanged with the `last` one of a step."""
        return contextlib.nullcontext()

    def sum(self, *values: float) -> Sequence[float]:
        """Of each value the sum over all processes. Raises PeerLost."""
        return values

    def give_up(self) -> None:
        """In a process where a pass failed: take part in what is left of its exchange, so that no other waits."""

    def start_again(self) -> None:
        """In all processes, after a pass that failed in one: forget it"""

    @contextlib.contextmanager
    def whole(self) -> Iterator[bool]:
        """Within, the pipeline's models are whole; entered by all processes. Gives whether this one is to write."""
        yield rank_and_size()[0] == 0


def summed(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value's sum over all processes."""
    both = torch.tensor(values, dtype=torch.float64, device=device)
    with peers():
        dist.all_reduce(both)
    found: list[float] = both.tolist()
    return found


class Replicated(Alone):
    """DistributedDataParallel: the exchange begins while the rest of the backward pass is computed."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._device = next(task.module.parameters()).device
        self._begun: list[torch.futures.Future[Any]] = []  # exchanges of this pass
        self._wrap()

    def _wrap(self) -> None:
        # not with a static graph: torch 2.15 can't have its first pass without an exchange, and exchanges more in it
        wrapped = nn.parallel.DistributedDataParallel(
            self.task.module, gradient_as_bucket_view=True, forward_sync_buffers=False
        )
        wrapped.register_comm_hook(None, lambda _, bucket: self._exchange(bucket))  # torch's own gives the mean
        self.module = wrapped

    def _exchange(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        assert work is not None
        done = work.get_future()
        self._begun.append(done)
        return done.then(lambda f: f.value()[0])

    def exchanging(self, last: bool) -> contextlib.AbstractContextManager[None]:
        self._begun = []
        if not last:
            return self.module.no_sync()  # type: ignore[operator, no-any-return]
        return contextlib.nullcontext()

    def sum(self, *values: float) -> Sequence[float]:
        return summed(values, self._device)

    def give_up(self) -> None:
        reducer: Any = self.module.reducer
        with peers():
            reducer._rebuild_buckets()  # once in a run, together, as the second step begins
            for bucket in reducer._get_zeros_like_grad_buckets()[len(self._begun) :]:  # as torch's own `join` does
                dist.all_reduce(bucket.buffer())
            for done in self._begun:
                done.wait()

    def start_again(self) -> None:
        self.module._remove_autograd_hooks()  # type: ignore[operator]  # of a pass that is half done
        self.module = self.task.module
        gc.collect()
        with peers():
            self._wrap()


class Sharded(Alone):
    """FSDP2: each process holds a share of every block, of averages and moments; a block is whole while it works.

    Gradients are exchanged with every micro-batch: until the last one they would be kept whole.
    """

    sharded = True

    def __init__(self, task: Task, compile: bool) -> None:
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        super().__init__(task)
        self._device = next(task.module.parameters()).device
        self._empty = {name: _without_weights(model) for name, model in task.modules.items()}
        policy = MixedPrecisionPolicy()
        if self._device.type == "cuda":  # inputs stay as they are: times have no room in bf16
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for model in task.modules.values():
            for block in blocks(model):
                if compile:
                    block.compile()
                fully_shard(block, mp_policy=policy)
            fully_shard(model, mp_policy=policy)
            if recorded := getattr(model, "_can_record_outputs", None):  # of transformers, which asks by the class:
                from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

                _CAN_RECORD_REGISTRY[model] = recorded  # it is another now, and would give no hidden states
        fully_shard(task.module, mp_policy=policy)
        for module in task.module.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other

    def sum(self, *values: float) -> Sequence[float]:
        return summed(values, self._device)

    @contextlib.contextmanager
    def whole(self) -> Iterator[bool]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        first = rank_and_size()[0] == 0
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        with peers():
            states = {name: get_model_state_dict(m, options=options) for name, m in self.task.modules.items()}
        if not first:
            yield False
            return
        for name, model in self._empty.items():
            model.load_state_dict(states[name], assign=True)
            setattr(self.task.pipeline, name, model)
        try:
            yield True
        finally:
            for name, model in self.task.modules.items():
                setattr(self.task.pipeline, name, model)
                self._empty[name].to("meta")


def blocks(model: nn.Module) -> list[nn.Module]:
    """The parts of a model of diffusers or transformers that are sharded, each by itself: those that it says must stay
    together on one device."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [m for m in reversed(list(model.modules())) if type(m).__name__ in names and m is not model]


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters are on no device."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """Within, an exchange that fails raises PeerLost."""
    try:
        yield
    except RuntimeError as e:
        if is_lost_peer(e):
            raise PeerLost(f"another worker is gone: {e}") from e
        raise


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an exchange failed: nccl's errors have a class, gloo's name its source files."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)
