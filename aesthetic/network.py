"""A small network on the vectors, for those who suspect that a straight line is not enough."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from aesthetic.heads import Layer

Array = npt.NDArray[np.float64]

HIDDEN = 64
_EPOCHS = 200
_DECAY = 1e-2


def fit_network(x: npt.NDArray[Any], y: Array, w: Array) -> tuple[Layer, ...]:
    """A d-64-1 network with ReLU (scikit-learn's MLPRegressor, Adam, weight decay), as the layers of a head.

    Vectors are centred and scaled to a mean square of 1, scores to mean 0 and variance 1; both are folded into the
    layers. The seed is fixed and the rows come sorted: the same data give the same network on one machine.
    """
    from sklearn.neural_network import MLPRegressor

    share = w / w.sum()
    a = x.astype(np.float32)
    centre = (share @ a).astype(np.float32)
    a = a - centre
    scale = float(np.sqrt(share @ (a**2).mean(1))) or 1.0
    a /= scale
    mean = float(share @ y)
    spread = float(np.sqrt(share @ (y - mean) ** 2)) or 1.0
    epochs = _epochs(len(y))
    net = MLPRegressor(
        hidden_layer_sizes=(HIDDEN,), alpha=_DECAY, max_iter=epochs, tol=0, n_iter_no_change=epochs + 1, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the number of epochs is the plan, not a failure to converge
        net.fit(a, ((y - mean) / spread).astype(np.float32), sample_weight=w)
    first, last = (c.astype(np.float64) for c in net.coefs_)
    bias = net.intercepts_[0] - (centre.astype(np.float64) / scale) @ first
    layers = ((first / scale).T, bias), (last.T * spread, net.intercepts_[1] * spread + mean)
    return tuple((a.astype(np.float32), b.astype(np.float32)) for a, b in layers)


def _epochs(n: int) -> int:
    """Fewer passes over more rows: about the same number of steps from 20,000 rows on."""
    return int(np.clip(_EPOCHS * 20_000 / max(n, 1), 10, _EPOCHS))


def apply_network(layers: tuple[Layer, ...], x: npt.NDArray[Any]) -> Array:
    """What the head of these layers scores: (n,)."""
    (first, bias), (last, constant) = layers
    parts = [
        np.maximum(x[i : i + 8192].astype(np.float32) @ first.T + bias, 0) @ last[0] for i in range(0, len(x), 8192)
    ]
    return np.concatenate(parts).astype(np.float64) + constant[0]
