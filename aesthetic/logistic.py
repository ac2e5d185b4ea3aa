"""Logistic regression over folds, for labels and for comparisons, and the calibration of what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PENALTIES = tuple(float(v) for v in np.logspace(-1, -7, 7))
"""Penalties per unit of weight, strongest first: the loss is mean log-loss + penalty / 2 * |w|^2.
scikit-learn's C is 1 / (penalty * sum(weights))."""


@dataclass(frozen=True)
class Linear:
    """log-odds = x . weights + constant."""

    weights: Array
    constant: float

    def __call__(self, x: npt.NDArray[Any]) -> Array:
        parts = [x[i : i + 8192].astype(np.float64) @ self.weights for i in range(0, len(x), 8192)]
        return np.concatenate(parts) + self.constant if parts else np.zeros(0)

    def from_basis(self, basis: Array | None) -> Linear:
        """The same on the vectors whose coordinates in `basis` it takes (see `row_space`)."""
        return self if basis is None else Linear(basis @ self.weights, self.constant)


class Logistic:
    """Rows in folds, and the logistic regressions of any set of folds, one for each penalty.

    With fewer rows than columns the problem is turned into the rows' own directions, which changes no solution.
    """

    def __init__(self, x: npt.NDArray[Any], labels: Array, w: Array, fold: Ints) -> None:
        self.labels, self.w, self.fold = labels, w, fold
        self.x, self.basis = row_space(x)
        self._fitted: dict[frozenset[int], list[Linear]] = {}

    def path(self, folds: frozenset[int]) -> list[Linear]:
        """One regression a penalty, on the rows of these folds, in the coordinates of `self.x`."""
        if folds not in self._fitted:
            rows = np.isin(self.fold, sorted(folds))
            self._fitted[folds] = logistic_path(self.x[rows], self.labels[rows], self.w[rows])
        return self._fitted[folds]

    def out_of_fold(self, folds: Sequence[int], within: frozenset[int]) -> Array:
        """Log-odds (rows, penalties) of the rows of `folds`, each fold from the others of `within`; else NaN."""
        odds = np.full((len(self.x), len(PENALTIES)), np.nan)
        for held in folds:
            rows = self.fold == held
            for i, model in enumerate(self.path(within - {held})):
                odds[rows, i] = model(self.x[rows])
        return odds


def row_space(x: npt.NDArray[Any]) -> tuple[Array, Array | None]:
    """Rows (n, d) in coordinates of their own, with the basis (d, k) of these, where n < d; else as they are."""
    a = np.asarray(x, np.float64)
    if len(a) >= a.shape[1]:
        return a, None
    values, vectors = np.linalg.eigh(a @ a.T)
    keep = values > values[-1] * 1e-13
    basis = (a.T @ vectors[:, keep]) / np.sqrt(values[keep])
    return a @ basis, basis


def logistic_path(x: Array, labels: Array, w: Array, *, comparisons: bool = False) -> list[Linear]:
    """One regression for each penalty, strongest first. x (n, d), labels (n,) 0 or 1, weights w (n,).

    Comparisons are rows of differences (winner - loser) with no constant and the label 1: each row then stands for
    itself and its mirror image (Bradley and Terry 1952, with log-strengths linear in the vectors).
    """
    from sklearn.linear_model import LogisticRegression

    if comparisons:
        x, labels, w = np.concatenate([x, -x]), np.repeat([1.0, 0.0], len(labels)), np.tile(w / 2, 2)
    centre = np.zeros(x.shape[1]) if comparisons else w @ x / w.sum()
    model = LogisticRegression(fit_intercept=not comparisons, tol=1e-6, max_iter=1000, warm_start=True)
    found = []
    for penalty in PENALTIES:
        model.C = 1 / (penalty * w.sum())
        model.fit(x - centre, labels, sample_weight=w)
        weights = model.coef_[0].copy()
        constant = 0.0 if comparisons else float(model.intercept_[0]) - float(centre @ weights)
        found.append(Linear(weights, constant))
    return found


def best_penalty(odds: Array, labels: Array, w: Array) -> int:
    """The index of the penalty whose log-odds (n, penalties) have the lowest log-loss, over the rows that have any."""
    rows = np.isfinite(odds).all(1)
    signs = np.where(labels[rows] > 0.5, 1.0, -1.0)
    return int(np.argmin(w[rows] @ np.logaddexp(0, -signs[:, None] * odds[rows])))


def platt(odds: Array, labels: Array, w: Array, *, constant: bool = True) -> tuple[float, float]:
    """Slope and shift that make log-odds honest: P = 1 / (1 + exp(-(slope * odds + shift))).

    Platt (1999) with his smoothed targets, by Newton's method (Lin, Lin and Weng 2007). A slope is never below 0.001:
    calibration does not turn a head around. Without a constant the shift is 0 (comparisons have none).
    """
    positive, negative = w @ labels, w @ (1 - labels)
    target = np.where(labels > 0.5, (positive + 1) / (positive + 2), 1 / (negative + 2))
    design = np.stack([odds, np.ones(len(odds))], 1) if constant else odds[:, None]
    at = np.array([1.0, 0.0][: design.shape[1]])  # slope and shift

    def loss(at: Array) -> float:
        z = design @ at
        return float(w @ (np.logaddexp(0, z) - target * z))

    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(design @ at, -500, 500)))
        gradient = design.T @ (w * (p - target))
        curvature = (design * (w * p * (1 - p))[:, None]).T @ design + 1e-12 * np.eye(len(at))
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while size > 1e-8 and loss(at - size * step) > loss(at):
            size /= 2
        at = at - size * step
        if np.abs(size * step).max() < 1e-10:
            break
    return max(float(at[0]), 1e-3), float(at[1]) if constant else 0.0
