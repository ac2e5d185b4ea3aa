"""Ratings from several sources, each on a scale of its own, brought to one scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aesthetic.chunks import Map, thread_map
from aesthetic.ridge import PENALTIES, Ridge

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

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
