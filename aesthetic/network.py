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

    x (n, d), scores y and weights w (n,). Vectors are centred and scaled to a mean square of 1, scores to mean 0 and
    variance 1; both are multiplied into the layers. The seed is fixed and the rows come sorted: the same data give the
    same network on one machine.
    """
    from sklearn.neural_network import MLPRegressor

    share = w / w.sum()
    a = x.astype(np.float32)
    centre = (share @ a).astype(np.float32)
    a -= centre
    scale = float(np.sqrt(share @ (a**2).mean(1))) or 1.0
    mean = float(share @ y)
    spread = float(np.sqrt(share @ (y - mean) ** 2)) or 1.0
    # fewer passes over more rows: about the same number of steps from 20,000 rows on
    epochs = int(np.clip(_EPOCHS * 20_000 / len(y), 10, _EPOCHS))
    net = MLPRegressor(
        hidden_layer_sizes=(HIDDEN,), alpha=_DECAY, max_iter=epochs, tol=0, n_iter_no_change=epochs + 1, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the number of epochs is the plan, not a failure to converge
        net.fit(a / np.float32(scale), ((y - mean) / spread).astype(np.float32), sample_weight=w)
    first, last = (c.astype(np.float64) for c in net.coefs_)
    bias = net.intercepts_[0] - (centre.astype(np.float64) / scale) @ first
    layers = ((first / scale).T, bias), (last.T * spread, net.intercepts_[1] * spread + mean)
    return tuple((weight.astype(np.float32), bias.astype(np.float32)) for weight, bias in layers)
