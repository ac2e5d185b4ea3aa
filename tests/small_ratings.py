"""Planted ratings: unit vectors, and scores that depend on them in a known way."""

import numpy as np

from aesthetic.examples import Examples
from aesthetic.space import Space

SCALE = (1.0, 7.0)


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def make(n=240, dim=32, groups=40, noise=0.3, seed=0):
    """Unit vectors (n, dim), scores that depend on them linearly, and group names."""
    rng = np.random.default_rng(seed)
    x = unit(rng.standard_normal((n, dim)))
    y = np.clip(4 + 3 * x @ rng.standard_normal(dim) + noise * rng.standard_normal(n), *SCALE)
    return x, y, [f"g{v}" for v in rng.integers(0, groups, n)]


def examples(x, y, groups=None, **more):
    return Examples(
        vectors=x, scores=y, ids=more.pop("ids", [f"{i:06d}" for i in range(len(y))]), groups=groups, **more
    )


def space(dim=32):
    return Space(encoder="test", dim=dim, norm="l2", probes=None, details={})
