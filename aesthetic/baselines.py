"""What a head must beat: predictors that learn nothing about taste, or look at no image."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NEIGHBOURS = 10
_NEIGHBOURS_FROM = 10_000  # rated images among which neighbours are looked for; more change little and cost much
_WORDS_AT_MOST = 0.5  # a column with more different words than this share of the rows names rows, not kinds of them


def predict(
    x: npt.NDArray[Any], y: Array, w: Array, columns: Mapping[str, npt.NDArray[Any]], train: Ints, test: Ints
) -> dict[str, Array]:
    """Each baseline's predictions of the rows `test`, learnt from the rows `train`; columns: `usable` metadata."""
    predicted = {"nearest": nearest(x, y, w, train, test)}
    return predicted | ({"metadata": from_metadata(columns, y, w, train, test)} if columns else {})


def nearest(x: npt.NDArray[Any], y: Array, w: Array, train: Ints, test: Ints) -> Array:
    """The weighted mean rating of the 10 most similar rated images, by cosine."""
    step = -(-len(train) // _NEIGHBOURS_FROM)
    train = train[::step]  # rows lie in the order of their names: an even sample
    base = x[train].astype(np.float32)
    k = min(NEIGHBOURS, len(train))
    predicted = np.empty(len(test))
    for start in range(0, len(test), 2048):
        part = test[start : start + 2048]
        similarity = x[part].astype(np.float32) @ base.T
        near = train[np.argpartition(-similarity, k - 1, axis=1)[:, :k]]
        predicted[start : start + len(part)] = (w[near] * y[near]).sum(1) / w[near].sum(1)
    return predicted


def usable(metadata: Mapping[str, Sequence[Any]]) -> dict[str, npt.NDArray[Any]]:
    """The columns that could tell kinds of images apart: numbers as float64, words as str; constants and names go."""
    columns: dict[str, npt.NDArray[Any]] = {}
    for name, values in metadata.items():
        try:
            parsed = np.array([np.nan if v is None or v == "" else float(v) for v in values])
        except (TypeError, ValueError):
            words = np.array(["" if v is None else str(v) for v in values])
            if 1 < len(np.unique(words)) <= _WORDS_AT_MOST * len(words):
                columns[name] = words
            continue
        if np.isfinite(parsed).any() and len(np.unique(parsed[np.isfinite(parsed)])) > 1:
            columns[name] = np.where(np.isfinite(parsed), parsed, np.nan)
    return columns


def from_metadata(columns: Mapping[str, npt.NDArray[Any]], y: Array, w: Array, train: Ints, test: Ints) -> Array:
    """What metadata alone predicts: gradient-boosted trees on numbers and on the shrunk mean rating of each word.

    If this comes near a head, the head may have learnt who took an image and not how good it is: a split that keeps
    such a column whole (--group) shows it.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor
    from threadpoolctl import threadpool_limits

    learn, unseen = [], []
    for name in sorted(columns):
        values = columns[name]
        if values.dtype.kind == "U":
            known, unknown = _mean_of_words(values, y, w, train, test)
        else:
            known, unknown = values[train], values[test]
        learn.append(known)
        unseen.append(unknown)
    leaf = max(2, min(20, len(train) // 20))
    trees = HistGradientBoostingRegressor(max_iter=50, min_samples_leaf=leaf, early_stopping=False, random_state=0)
    # one thread: others spin while they wait, on a busy machine for 40 times the CPU that 1,000 rows take. The trees
    # are the same. Here, because limits reach only the OpenMP of libraries that are loaded
    with warnings.catch_warnings(), threadpool_limits(1, user_api="openmp"):
        warnings.simplefilter("ignore")  # a column without any value in these rows
        trees.fit(np.stack(learn, 1), y[train], sample_weight=w[train])
        return np.asarray(trees.predict(np.stack(unseen, 1)), np.float64)


def _mean_of_words(words: npt.NDArray[Any], y: Array, w: Array, train: Ints, test: Ints) -> tuple[Array, Array]:
    """The mean rating of each row's word, shrunk towards the mean of all as if by 5 such ratings (Micci-Barreca 2001).

    Rows learnt from get the mean of the others' ratings, in five parts, so a word that occurs once counts nothing.
    """
    codes = np.unique(words, return_inverse=True)[1]
    part = np.arange(len(train)) % 5

    def means(rows: Ints) -> Array:
        scale = w[rows].mean()
        prior = 5 * scale * float(w[rows] @ y[rows] / w[rows].sum())
        total = np.bincount(codes[rows], w[rows] * y[rows], minlength=codes.max() + 1)
        return (total + prior) / (np.bincount(codes[rows], w[rows], minlength=codes.max() + 1) + 5 * scale)

    known = np.empty(len(train))
    for k in range(5):
        known[part == k] = means(train[part != k])[codes[train[part == k]]]
    return known, means(train)[codes[test]]
