"""Ridge regression in closed form: every penalty from one decomposition, sums that add up over machines.

There is no seed, no learning rate and no early stopping to choose, and the same rows in any order give the same head.
scikit-learn's Ridge fits 250,000 x 768 with one penalty in 11.6 s; this, 33 of them in 5 folds in 4.9 (bench/fit.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from aesthetic.chunks import Map, thread_map

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PENALTIES = tuple(float(v) for v in np.logspace(-6, 2, 33))
"""Penalties per unit of weight: the loss is mean squared error + penalty * |w|^2, so they suit any number of rows.
Vectors of unit norm have a variance of at most 1, so the grid reaches from no shrinkage to nothing but the mean."""

CHUNK = 8192  # rows summed at a time; the same whoever sums them, so that the result is too


@dataclass(frozen=True)
class Moments:
    """All that a ridge needs to know of its rows, as sums over them. Sums add: of chunks, folds, machines."""

    weight: float
    x: Array  # (d,)
    xx: Array  # (d, d)
    y: float
    xy: Array  # (d,)

    @classmethod
    def of(cls, rows: tuple[npt.NDArray[Any], Array, Array]) -> Moments:
        """The sums of vectors (n, d), scores (n,) and weights (n,), in float64."""
        x, y, w = rows
        root = np.sqrt(w)
        a = x.astype(np.float64) * root[:, None]
        return cls(float(w.sum()), root @ a, a.T @ a, float(w @ y), (root * y) @ a)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.weight + other.weight, self.x + other.x, self.xx + other.xx, self.y + other.y, self.xy + other.xy
        )


@dataclass(frozen=True)
class RidgePath:
    """Ridge solutions for every penalty at once."""

    centre: Array  # (d,) weighted mean of the vectors
    mean: float  # weighted mean of the scores
    basis: Array  # (d, k): directions in which the penalised problem falls apart
    moments: Array  # (k,): covariance of scores and vectors along them
    values: Array  # (k,): variance of the vectors along them

    @classmethod
    def of_covariance(cls, covariance: Array, xy: Array, centre: Array, mean: float) -> RidgePath:
        """From the covariance of the vectors (d, d) and that of vectors and scores (d,)."""
        values, basis = np.linalg.eigh(covariance)
        return cls(centre, mean, basis, basis.T @ xy, np.maximum(values, 0))

    def solution(self, penalty: float) -> tuple[Array, float]:
        """Weights (d,) and constant."""
        weights = self.basis @ (self.moments / (self.values + penalty))
        return weights, self.mean - float(self.centre @ weights)

    def predict(self, x: npt.NDArray[Any], penalties: Sequence[float] = PENALTIES) -> Array:
        """Scores (n, penalties) of vectors (n, d) of any float type."""
        coordinates = self.moments[:, None] / (self.values[:, None] + np.asarray(penalties)[None, :])
        weights = self.basis @ coordinates
        chunks = (x[i : i + CHUNK].astype(np.float64) for i in range(0, len(x), CHUNK))
        parts = [(chunk - self.centre) @ weights + self.mean for chunk in chunks]
        return np.concatenate(parts) if parts else np.zeros((0, weights.shape[1]))


def ridge_path(x: npt.NDArray[Any], y: Array, weights: Array) -> RidgePath:
    """Minimise sum(weights * (y - x w - b)^2) / sum(weights) + penalty * |w|^2, exactly, for every penalty at once.

    One eigendecomposition serves them all: of the covariance (d, d), or where there are fewer rows than columns of the
    kernel (n, n), whose solution is the same (Hastie, Tibshirani and Friedman 2009, 3.4.1 and 18.3.5). scikit-learn's
    Ridge has alpha = penalty * sum(weights).
    """
    share = weights / weights.sum()
    a = x.astype(np.float64)
    centre, mean = share @ a, float(share @ y)
    root = np.sqrt(share)
    a -= centre
    a *= root[:, None]
    r = root * (y - mean)
    if len(a) >= a.shape[1]:
        return RidgePath.of_covariance(a.T @ a, a.T @ r, centre, mean)
    values, vectors = np.linalg.eigh(a @ a.T)
    return RidgePath(centre, mean, a.T @ vectors, vectors.T @ r, np.maximum(values, 0))


def path_of_sums(sums: Moments) -> RidgePath:
    """The same from sums over the rows."""
    centre, mean = sums.x / sums.weight, sums.y / sums.weight
    covariance = sums.xx / sums.weight - np.outer(centre, centre)
    return RidgePath.of_covariance(covariance, sums.xy / sums.weight - centre * mean, centre, mean)


@dataclass(frozen=True)
class FittedRidge:
    """A ridge with a chosen penalty."""

    weights: Array
    constant: float
    penalty: float

    @property
    def at_edge(self) -> bool:
        """Whether the grid of penalties ended there."""
        return self.penalty in (PENALTIES[0], PENALTIES[-1])

    def __call__(self, x: npt.NDArray[Any]) -> Array:
        parts = [x[i : i + CHUNK].astype(np.float64) @ self.weights for i in range(0, len(x), CHUNK)]
        return np.concatenate(parts) + self.constant if parts else np.zeros(0)


class Ridge:
    """Rows in folds, and the ridge of any set of folds, its penalty chosen by leaving out one of them after another.

    Paths are kept, because nested cross-validation asks for most of them twice: leaving out {f, g} serves as the inner
    fold g of the outer fold f, and the other way round. With more rows than columns a path costs a sum of Moments and
    a decomposition, and never another pass over the rows.
    """

    def __init__(self, x: npt.NDArray[Any], y: Array, w: Array, fold: Ints, map: Map = thread_map) -> None:
        self.x, self.y, self.w, self.fold = x, y, w, fold
        self.folds = frozenset(int(f) for f in np.unique(fold))
        self._paths: dict[frozenset[int], RidgePath] = {}
        self._sums: dict[int, Moments] = {}
        self._fitted: dict[frozenset[int], FittedRidge] = {}
        if len(x) < 2 * x.shape[1]:
            return
        chunks = []
        for f in sorted(self.folds):
            rows = np.flatnonzero(fold == f)
            chunks += [(f, rows[i : i + CHUNK]) for i in range(0, len(rows), CHUNK)]
        sums = map(Moments.of, ((x[rows], y[rows], w[rows]) for _, rows in chunks))
        for (f, _), part in zip(chunks, sums, strict=True):
            self._sums[f] = self._sums[f] + part if f in self._sums else part

    def path(self, folds: frozenset[int]) -> RidgePath:
        """Ridge solutions on the rows of these folds."""
        if folds not in self._paths:
            if self._sums:
                self._paths[folds] = path_of_sums(reduce(Moments.__add__, (self._sums[f] for f in sorted(folds))))
            else:
                rows = np.isin(self.fold, sorted(folds))
                self._paths[folds] = ridge_path(self.x[rows], self.y[rows], self.w[rows])
        return self._paths[folds]

    def errors(self, folds: frozenset[int]) -> Array:
        """The weighted squared error of each penalty over these folds, each predicted from the others of them."""
        total = np.zeros(len(PENALTIES))
        for held in sorted(folds):
            rows = self.fold == held
            predicted = self.path(folds - {held}).predict(self.x[rows])
            total += self.w[rows] @ (predicted - self.y[rows, None]) ** 2
        return total

    def fit(self, folds: frozenset[int]) -> FittedRidge:
        """The ridge of these folds, with the penalty that predicts each of them best from the others."""
        if folds not in self._fitted:
            penalty = PENALTIES[int(np.argmin(self.errors(folds)))]
            self._fitted[folds] = FittedRidge(*self.path(folds).solution(penalty), penalty)
        return self._fitted[folds]


# Several sources, each on a scale of its own -------------------------------------------------------------------------

_ROUNDS = 4
_SPREADS = 0.2


@dataclass(frozen=True)
class Scales:
    """score = offset + factor * score on the reference's scale, for each source."""

    reference: str
    offset: dict[str, float]
    factor: dict[str, float]

    def to_reference(self, y: Array, sources: Sequence[str]) -> Array:
        """Scores on the reference's scale."""
        offset = np.array([self.offset[s] for s in sources])
        return (y - offset) / np.array([self.factor[s] for s in sources])


def reference_of(sources: Sequence[str]) -> str:
    """The source to whose scale the others are brought: that of the most images, of equals the last by name."""
    return max(set(sources), key=lambda s: (list(sources).count(s), s))


def fit_scales(
    x: npt.NDArray[Any],
    y: Array,
    w: Array,
    sources: Sequence[str],
    fold: Ints,
    reference: str,
    map: Map = thread_map,
) -> Scales:
    """Offset and factor of each source under one taste: y = offset_s + factor_s * (x . w).

    The direction w comes from differences within sources alone, so that one source's better images are not taken for
    its generous raters; factors come from how steeply a source's scores rise with predictions made without them (in
    folds), offsets from where its mean image lies along w. The reference, with offset 0 and factor 1, is the one
    named `reference`. A source of few images, or of one score for all, keeps about the factor that its spread suggests.
    """
    names = sorted(set(sources))
    rows = {s: np.flatnonzero(np.asarray(sources) == s) for s in names}
    weight = {s: float(w[r].sum()) for s, r in rows.items()}
    mean_y = {s: float(w[r] @ y[r] / weight[s]) for s, r in rows.items()}
    mean_x = {s: w[r] @ x[r].astype(np.float64) / weight[s] for s, r in rows.items()}
    spread = {s: float(np.sqrt(w[r] @ (y[r] - mean_y[s]) ** 2 / weight[s])) or 1.0 for s, r in rows.items()}
    factor = {s: spread[s] / spread[reference] for s in names}
    centred, rise = x.astype(np.float64), np.empty(len(y))
    for s, r in rows.items():
        centred[r] -= mean_x[s]
        rise[r] = y[r] - mean_y[s]
    for _ in range(_ROUNDS):
        scaled = rise / np.array([factor[s] for s in sources])
        ridge = Ridge(centred, scaled, w, fold, map)
        penalty = PENALTIES[int(np.argmin(ridge.errors(ridge.folds)))]
        predicted = np.empty(len(y))
        for held in ridge.folds:
            test = fold == held
            predicted[test] = ridge.path(ridge.folds - {held}).predict(centred[test], [penalty])[:, 0]
        slope, doubt = {}, {}
        for s, r in rows.items():
            both, square = float((w[r] * predicted[r]) @ rise[r]), float(w[r] @ predicted[r] ** 2)
            most = square * float(w[r] @ rise[r] ** 2)
            slope[s] = both / square if square > 0 else 0.0
            share = both**2 / most if most > 0 else 0.0
            doubt[s] = (1 / max(share, 1e-9) - 1) / len(r)  # squared standard error of log(slope)
        for s in names:
            if s != reference and slope[s] > 0 and slope[reference] > 0:
                measured = math.log(slope[s] / slope[reference] * spread[reference] / spread[s])
                trust = _SPREADS**2 / (_SPREADS**2 + doubt[s] + doubt[reference])
                factor[s] = spread[s] / spread[reference] * math.exp(trust * measured)
    direction, _ = ridge.path(ridge.folds).solution(penalty)
    height = {s: mean_y[reference] + float((mean_x[s] - mean_x[reference]) @ direction) for s in names}
    offset = {s: mean_y[s] - factor[s] * height[s] for s in names}
    offset[reference] = 0.0
    return Scales(reference, offset, factor)
