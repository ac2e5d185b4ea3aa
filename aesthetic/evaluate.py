"""How well predictions agree with ratings, and how sure one can be of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Statistic = Callable[[npt.NDArray[np.float64], npt.NDArray[np.float64]], float]


def pearson(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Pearson's correlation of two rows of numbers, -1 to 1; NaN where one of them does not vary."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Spearman's rank correlation, -1 to 1, with the mean rank for ties; NaN where one of them does not vary."""
    from scipy.stats import rankdata

    return pearson(rankdata(a), rankdata(b))


def interval(
    predicted: npt.ArrayLike,
    rated: npt.ArrayLike,
    groups: Sequence[Any] | npt.NDArray[Any],
    statistic: Statistic,
    *,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """A percentile interval of a statistic from a cluster bootstrap: whole groups are drawn, with replacement.

    Rows of a group resemble each other, so drawing rows would promise too much (Cameron, Gelbach and Miller 2008). The
    same data and seed give the same interval in any order of rows. (NaN, NaN) with fewer than two groups, or where most
    draws have no value.
    """
    x, y = np.asarray(predicted, np.float64), np.asarray(rated, np.float64)
    rows = rows_of(groups)
    if len(rows) < 2:
        return float("nan"), float("nan")
    members = [rows[g] for g in sorted(rows)]
    rng = np.random.default_rng(seed)
    values = np.empty(draws)
    for i in range(draws):
        chosen = np.concatenate([members[j] for j in rng.integers(0, len(members), len(members))])
        values[i] = statistic(x[chosen], y[chosen])
    values = values[np.isfinite(values)]
    if len(values) < draws / 2:
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def rows_of(groups: Sequence[Any] | npt.NDArray[Any]) -> dict[str, npt.NDArray[np.int64]]:
    """The row numbers of each group; a group is known by its name as text."""
    rows: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        rows.setdefault(str(group), []).append(i)
    return {group: np.array(members) for group, members in rows.items()}
