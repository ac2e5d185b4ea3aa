"""Ratings + vectors -> a head, by ridge regression in closed form.

There is no seed, no learning rate and no early stopping to choose, and the same ratings in any order give the same
head. The one number to choose, the penalty, is chosen by cross-validation; how good the head is comes from a second
cross-validation around that one, so no rating is predicted by a head that has seen it or its group.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aesthetic.evaluate import interval, pearson, rows_of, spearman
from aesthetic.heads import Head, HeadError
from aesthetic.space import Space

Array = npt.NDArray[np.float64]

PENALTIES = tuple(float(v) for v in np.logspace(-6, 2, 33))
"""Penalties per unit of weight: the loss is mean squared error + penalty * |w|^2, so they suit any number of rows.
Vectors of unit norm have a variance of at most 1, so the grid reaches from no shrinkage to nothing but the mean."""

QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_MIN_GROUPS = 3


@dataclass(frozen=True)
class Path:
    """Ridge solutions for every penalty at once; `predict` gives one column a penalty."""

    centre: Array  # (d,) weighted mean of the vectors
    mean: float  # weighted mean of the scores
    basis: Array  # (d, k): directions in which the penalised problem falls apart
    coordinates: Array  # (k, penalties)

    def predict(self, x: Array) -> Array:
        """Scores (n, penalties) of vectors (n, d)."""
        return ((x - self.centre) @ self.basis) @ self.coordinates + self.mean

    def solution(self, i: int) -> tuple[Array, float]:
        """Weights (d,) and constant for the penalty number i."""
        weights = self.basis @ self.coordinates[:, i]
        return weights, self.mean - float(self.centre @ weights)


def ridge_path(x: Array, y: Array, weights: Array, penalties: Sequence[float]) -> Path:
    """Minimise sum(weights * (y - x w - b)^2) / sum(weights) + penalty * |w|^2, exactly, for every penalty.

    One eigendecomposition serves them all: of the covariance (d, d), or where there are fewer rows than columns of the
    kernel (n, n), whose solution is the same. scikit-learn's Ridge has alpha = penalty * sum(weights).
    """
    share = weights / weights.sum()
    centre, mean = share @ x, float(share @ y)
    root = np.sqrt(share)
    a = root[:, None] * (x - centre)
    r = root * (y - mean)
    lam = np.asarray(penalties)[None, :]
    n, d = a.shape
    if n < d:
        values, vectors = np.linalg.eigh(a @ a.T)
        basis, moments = a.T @ vectors, vectors.T @ r
    else:
        values, basis = np.linalg.eigh(a.T @ a)
        moments = basis.T @ (a.T @ r)
    return Path(centre, mean, basis, moments[:, None] / (np.maximum(values, 0)[:, None] + lam))


def fold_of_groups(groups: Sequence[Any], folds: int) -> npt.NDArray[np.int64]:
    """The fold of each row, whole groups together: larger groups first, ties by hash, each to the smallest fold.

    Depends on the groups' names and sizes alone, not on the order of rows.
    """
    rows = rows_of(groups)
    order = sorted(rows, key=lambda g: (-len(rows[g]), hashlib.sha256(g.encode()).digest()))
    sizes = [0] * folds
    fold = np.empty(sum(map(len, rows.values())), np.int64)
    for group in order:
        target = sizes.index(min(sizes))
        fold[rows[group]] = target
        sizes[target] += len(rows[group])
    return fold


def fit_head(
    vectors: npt.ArrayLike,
    scores: npt.ArrayLike,
    groups: Sequence[Any] | npt.NDArray[Any],
    space: Space,
    *,
    name: str,
    scale: tuple[float, float],
    task: str = "aesthetic",
    weights: npt.ArrayLike | None = None,
    folds: int = 5,
    card: dict[str, Any] | None = None,
) -> tuple[Head, dict[str, Any]]:
    """Fit an affine head to ratings, and measure it on ratings that it has not seen.

    vectors (n, d) of `space`; scores (n,) within `scale`; groups (n,): rows that belong together (a photographer, a
    prompt, a theme, copies of one image) and are never on both sides of a split; weights (n,) positive, such as numbers
    of votes. The report, whose metrics also stand in the head's card, is JSON:

    n, groups, folds; penalty (the head's) and penalty_at_edge (whether the grid ended there);
    spearman, pearson {value, low, high} with a cluster-bootstrap 95% interval; rmse and rmse_of_mean (what guessing the
    mean of the training folds would have), in the ratings' units; quantiles of the held-out predictions.

    Raises HeadError where the input does not fit together, or has fewer than three groups.
    """
    x, y, w, names = _checked(vectors, scores, groups, weights, space, name, scale)
    folds = min(folds, len(set(names)))
    if folds < _MIN_GROUPS:
        raise HeadError(
            f"{name}: the ratings have {len(set(names))} groups; at least {_MIN_GROUPS} are needed to measure the head "
            f"on groups that it has not seen. Without groups, give each image its own."
        )
    fold = fold_of_groups(names, folds)
    held_out, guess = _nested(x, y, w, fold, folds)
    errors = _errors_by_penalty(x, y, w, fold, range(folds))
    best = int(np.argmin(errors))
    weight, bias = ridge_path(x, y, w, PENALTIES).solution(best)
    share = w / w.sum()
    report: dict[str, Any] = {
        "n": len(y),
        "groups": len(set(names)),
        "folds": folds,
        "penalty": PENALTIES[best],
        "penalty_at_edge": best in (0, len(PENALTIES) - 1),
        "spearman": _with_interval(held_out, y, names, spearman),
        "pearson": _with_interval(held_out, y, names, pearson),
        "rmse": math.sqrt(share @ (held_out - y) ** 2),
        "rmse_of_mean": math.sqrt(share @ (guess - y) ** 2),
        "quantiles": {f"{q:.0%}": float(v) for q, v in zip(QUANTILES, np.quantile(held_out, QUANTILES), strict=True)},
    }
    metrics = {k: v for k, v in report.items() if k != "quantiles"}
    head = Head(
        name=name,
        task=task,
        space=space,
        scale=(float(scale[0]), float(scale[1])),
        layers=((weight.astype(np.float32)[None, :], np.array([bias], np.float32)),),
        card={
            **(card or {}),
            "metrics": {
                **metrics,
                "how": "nested cross-validation by group; intervals: 95%, groups resampled 1,000 times",
            },
            "quantiles": {"of": f"held-out predictions of the {len(y):,} rated images", **report["quantiles"]},
        },
    )
    return head, report


def _checked(
    vectors: npt.ArrayLike,
    scores: npt.ArrayLike,
    groups: Sequence[Any] | npt.NDArray[Any],
    weights: npt.ArrayLike | None,
    space: Space,
    name: str,
    scale: tuple[float, float],
) -> tuple[Array, Array, Array, list[str]]:
    """The input as float64, its rows sorted by what is in them: their order as given then changes no bit of it."""
    given = np.asarray(vectors)
    x = given.astype(np.float64)
    y = np.asarray(scores, np.float64)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
    if x.ndim != 2 or x.shape[1] != space.dim:
        raise HeadError(f"{name}: vectors of shape {x.shape}; {space.encoder} gives (n, {space.dim})")
    if not len(x) == len(y) == len(groups) == len(w):
        raise HeadError(f"{name}: {len(x)} vectors, {len(y)} scores, {len(groups)} groups and {len(w)} weights")
    if not np.isfinite(x).all():
        raise HeadError(f"{name}: the vector of row {int((~np.isfinite(x)).any(1).argmax())} is not finite")
    wrong = ~((y >= scale[0]) & (y <= scale[1]))  # also where NaN
    if wrong.any():
        row = int(wrong.argmax())
        raise HeadError(f"{name}: the score of row {row} is {y[row]:g}, outside the scale {scale[0]:g} to {scale[1]:g}")
    if not (np.isfinite(w) & (w > 0)).all():
        raise HeadError(f"{name}: a weight is not a positive number; leave out the rows that shall not count")
    if len(y) and np.ptp(y) == 0:
        raise HeadError(f"{name}: every score is {y[0]:g}; there is nothing to learn")
    names = [str(g) for g in groups]
    order = sorted(range(len(y)), key=lambda i: (names[i], y[i], w[i], hashlib.sha256(x[i].tobytes()).digest()))
    return x[order], y[order], w[order], [names[i] for i in order]


def _nested(x: Array, y: Array, w: Array, fold: npt.NDArray[np.int64], folds: int) -> tuple[Array, Array]:
    """Each row's prediction by a head whose fit and penalty know nothing of the row's fold; and the mean as a guess."""
    predicted, guess = np.empty(len(y)), np.empty(len(y))
    for held in range(folds):
        train, test = fold != held, fold == held
        errors = _errors_by_penalty(x[train], y[train], w[train], fold[train], [f for f in range(folds) if f != held])
        path = ridge_path(x[train], y[train], w[train], PENALTIES)
        predicted[test] = path.predict(x[test])[:, np.argmin(errors)]
        guess[test] = path.mean
    return predicted, guess


def _errors_by_penalty(x: Array, y: Array, w: Array, fold: npt.NDArray[np.int64], folds: Sequence[int]) -> Array:
    """The weighted squared error of each penalty, summed over the folds, each predicted from the others."""
    errors = np.zeros(len(PENALTIES))
    for held in folds:
        train, test = fold != held, fold == held
        predicted = ridge_path(x[train], y[train], w[train], PENALTIES).predict(x[test])
        errors += w[test] @ (predicted - y[test, None]) ** 2
    return errors


def _with_interval(predicted: Array, rated: Array, groups: Sequence[str], statistic: Any) -> dict[str, float | None]:
    low, high = interval(predicted, rated, groups, statistic)
    values = {"value": statistic(predicted, rated), "low": low, "high": high}
    return {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
