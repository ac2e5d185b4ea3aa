"""The processes that train one model together: those of torch.distributed's group (torchrun's, Ray Train's), or one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class PeerLost(RuntimeError):
    """Another of the processes that train together is gone, so that they can't add up."""


def rank_and_size() -> tuple[int, int]:
    """Which of the processes this is, from 0 on, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce(tensors: list[Tensor]) -> None:
    """Replace each tensor, in place, by its sum over all processes. They have the same shapes everywhere.

    One message of all of them, laid end to end: a model has hundreds of small tensors. Raises PeerLost.
    """
    if rank_and_size()[1] == 1:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    try:
        dist.all_reduce(flat)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as e:  # gloo's and nccl's, which have no class of their own for it
        raise PeerLost(f"another worker is gone: {e}") from e
    for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(total.view_as(t))
