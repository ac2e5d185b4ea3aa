"""The processes that train one model together: by default there is one."""

from __future__ import annotations

from torch import Tensor


class PeerLost(RuntimeError):
    """Another of the processes that train together is gone, so that they can't add up."""


class World:
    """One process. A subclass that knows others says who it is among them and how to add up."""

    rank = 0
    size = 1

    def all_reduce(self, tensors: list[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over all processes. They have the same shapes everywhere."""


class Distributed(World):
    """The process group that torch.distributed was initialised with: by torchrun, Ray Train, or a test."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def all_reduce(self, tensors: list[Tensor]) -> None:
        """One all-reduce of all of them, laid end to end: a model has hundreds of small tensors.

        Raises PeerLost where another process is gone.
        """
        import torch
        import torch.distributed as dist

        flat = torch.cat([t.reshape(-1) for t in tensors])
        try:
            dist.all_reduce(flat)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:  # gloo's and nccl's, which have no class of their own for it
            raise PeerLost(f"another worker is gone: {e}") from e
        at = 0
        for t in tensors:
            t.copy_(flat[at : at + t.numel()].view_as(t))
            at += t.numel()
