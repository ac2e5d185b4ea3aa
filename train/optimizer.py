"""What updates the weights: AdamW, or Muon for the matrices of a transformer's blocks and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW as one optimizer: its first group is Muon's, its second AdamW's.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) steps along the orthogonalised momentum, so that all
    directions of a matrix move alike, and in half the steps comes to the same loss.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], rest: Sequence[nn.Parameter], muon: Any, adamw: Any) -> None:
        """`muon` and `adamw`: what the two are made with (lr, weight_decay, ...), as mappings."""
        self._parts = torch.optim.Muon(matrices, **muon), torch.optim.AdamW(rest, **adamw)
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state  # those that load_state_dict may have put there
            part.step()


def new_optimizer(
    params: Sequence[nn.Parameter], matrices: Sequence[nn.Parameter], *, lr: float, muon: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW for all parameters, or, with `muon` above 0, that of Muon for `matrices` and AdamW for the others.

    `set_rate` scales both rates alike.
    """
    fused = params[0].device.type in ("cpu", "cuda")  # one pass over each tensor
    adamw: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "fused": fused}
    if not (muon and matrices):
        return torch.optim.AdamW(params, **adamw)
    found = {id(p) for p in matrices}
    rest = [p for p in params if id(p) not in found]
    optimizer = MuonAdamW(matrices, rest, {"lr": muon, "weight_decay": weight_decay}, adamw)
    optimizer.param_groups[0]["scale"] = muon / lr
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let the next step be of this rate of AdamW."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)
