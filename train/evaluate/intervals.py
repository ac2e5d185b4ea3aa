"""Means and shares with their 95% intervals: {value, low, high}."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from aesthetic.metrics import Estimate, Statistic, estimate

Array = npt.NDArray[np.float64]


def mean_of(values: npt.ArrayLike) -> Statistic:
    """The mean of these values, as a statistic that can be bootstrapped."""
    y = np.asarray(values, np.float64)
    return lambda w: float(w @ y / w.sum())


def mean(values: npt.ArrayLike, seed: int = 0) -> Estimate:
    """The mean of (n,) values that do not depend on each other, with a bootstrap interval."""
    y = np.asarray(values, np.float64)
    return estimate({"mean": mean_of(y)}, range(len(y)), seed=seed)["mean"]


def share(hits: npt.ArrayLike) -> Estimate:
    """The mean of (n,) values from 0 to 1, most of them one of the two, with Wilson's interval (1927).

    A bootstrap would promise too much here: of values that are all 0 it knows no other.
    """
    y = np.asarray(hits, np.float64)
    n, p, z = len(y), float(y.mean()), 1.959964
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    return {"value": p, "low": max(0.0, middle - reach), "high": min(1.0, middle + reach)}


def difference(generated: npt.ArrayLike, real: npt.ArrayLike, *, paired: bool, seed: int = 0) -> Estimate:
    """Mean of `generated` (n,) less mean of `real` (m,).

    `paired`: image i of both has caption i, and the two are resampled together. Otherwise each for itself.
    """
    a, b = np.asarray(generated, np.float64), np.asarray(real, np.float64)
    if paired:
        return mean(a - b, seed)
    both, first = np.concatenate([a, b]), np.arange(len(a) + len(b)) < len(a)

    def gap(w: Array) -> float:
        if not (w[first].any() and w[~first].any()):
            return float("nan")
        return float(np.average(both[first], weights=w[first]) - np.average(both[~first], weights=w[~first]))

    return estimate({"gap": gap}, range(len(both)), seed=seed)["gap"]
