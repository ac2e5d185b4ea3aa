"""Which ratings belong together, and which of them a head may see: groups, folds and the test set.

Two photographs by one photographer, two images of one prompt or two copies of one file tell more about each other
than about taste. They form a group, and a group is never on both sides of a split. Which side it is on follows from a
hash of its name alone: other ratings that come later change nothing for those that are there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from aesthetic.heads import HeadError

Ints = npt.NDArray[np.int64]

NEAR_COSINE = 0.95
"""From this cosine on two images count as near-duplicates. Ours: crops, resizes and re-encodings of a photograph lie
above it in CLIP's spaces and in the bundled one; too many pairs only make a split a little coarser."""

NEAR_BITS = 4
"""Up to this many of 64 bits two perceptual hashes may differ. Ours, likewise."""

TEST_SHARE = 0.2
FOLDS = 5
TEST = -1  # the fold of the test set
NESTED_UP_TO = 3000
"""Images up to which each is predicted by nested cross-validation. With more, a fifth of them is a test set: its
interval is narrow by then (half-width of Spearman's about .05 for 600 images)."""

_MIN_GROUPS = 3
_FEW_GROUPS = 50  # below this folds are dealt evenly, because hashing could leave one nearly empty
_FILTER_DIMS = 32
_BLOCK = 2048
_MANY = 0.01  # share of a block's pairs from which one product of matrices is quicker than so many of rows


@dataclass(frozen=True)
class Groups:
    """The group of each row, and how it came about."""

    names: list[str]
    given: bool  # by whoever rated; otherwise each row is its own, but for near-duplicates
    joined: int  # near-duplicate pairs that lay in different groups

    @property
    def count(self) -> int:
        return len(set(self.names))


def groups_of(
    ids: Sequence[str],
    groups: Sequence[Any] | None = None,
    *,
    vectors: npt.NDArray[Any] | None = None,
    sha256: Sequence[str | None] | None = None,
    phash: Sequence[str | None] | None = None,
) -> Groups:
    """Groups as given, or one for each id; then groups that share a near-duplicate become one (union-find).

    A group that is None or NaN is its image's own. Near-duplicates are equal files (sha256), perceptual hashes (16 hex
    digits) within NEAR_BITS, and vectors (n, d) of unit norm with a cosine of at least NEAR_COSINE. A group of several
    has the name whose hash is the smallest.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    each = ids
    if groups is not None:
        each = [f"image {i}" if g is None or g != g else str(g) for g, i in zip(groups, ids, strict=True)]
    names, group = np.unique(np.asarray(each, str), return_inverse=True)
    last: dict[str, int] = {}  # file -> row
    copies = []  # neighbours in each run of equal files
    for i, value in enumerate(sha256 or ()):
        if value is not None:
            copies.append((last.get(value, i), i))
            last[value] = i
    pairs = [np.array(copies, np.int64).reshape(-1, 2), _near_hashes(phash)]
    if vectors is not None:
        pairs.append(near_duplicates(vectors))
    linked = group[np.concatenate([p.reshape(-1, 2) for p in pairs])]
    linked = linked[linked[:, 0] != linked[:, 1]]
    graph = coo_array((np.ones(len(linked), np.int8), (linked[:, 0], linked[:, 1])), shape=(len(names), len(names)))
    component = connected_components(graph, directed=False)[1]
    order = np.argsort([_digest(n) for n in names], kind="stable")
    name_of: dict[int, str] = {}
    for i in order:
        name_of.setdefault(int(component[i]), str(names[i]))
    return Groups([name_of[int(component[g])] for g in group], groups is not None, len(np.unique(linked, axis=0)))


def _near_hashes(hashes: Sequence[str | None] | None) -> Ints:
    """Pairs of hashes that differ in at most NEAR_BITS bits: they agree in one of NEAR_BITS + 1 bands."""
    known = [(i, int(h, 16)) for i, h in enumerate(hashes or ()) if h and int(h, 16) != 0]  # 0: a flat image
    if not known:
        return np.zeros((0, 2), np.int64)
    rows = np.array([i for i, _ in known], np.int64)
    bits = np.array([h for _, h in known], np.uint64)
    edges = [64 * b // (NEAR_BITS + 1) for b in range(NEAR_BITS + 2)]
    found = []
    for low, high in pairwise(edges):
        band = (bits >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        for run in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            for start in range(0, len(run) if len(run) > 1 else 0, _BLOCK):
                part = run[start : start + _BLOCK]
                differ = np.bitwise_count(bits[part][:, None] ^ bits[run][None, :])
                a, b = np.nonzero(differ <= NEAR_BITS)
                found.append(np.stack([part[a], run[b]], 1)[part[a] < run[b]])
    return rows[np.unique(np.concatenate(found), axis=0)] if found else np.zeros((0, 2), np.int64)


def near_duplicates(vectors: npt.NDArray[Any]) -> Ints:
    """All pairs (i < j) of unit vectors (n, d) with a cosine of at least NEAR_COSINE: (pairs, 2).

    Exact. A projection onto directions at right angles shortens distances only, so most pairs are ruled out by the 32
    directions in which the vectors differ most, and rows that lie too far apart along the first are never compared. For
    20,000 vectors as the bundled encoder makes them that takes 1.2 s of CPU, and all products of 1,664 numbers 5.8 s.
    """
    x = np.ascontiguousarray(vectors, np.float32)
    n, d = x.shape
    if n < 2:
        return np.zeros((0, 2), np.int64)
    radius2 = 2 - 2 * NEAR_COSINE + 1e-4
    sample = x[:: max(1, n // 10_000)].astype(np.float64)
    sample = sample - sample.mean(0)
    k = min(_FILTER_DIMS, d)
    directions = np.linalg.eigh(sample.T @ sample)[1][:, ::-1][:, :k].astype(np.float32)
    p = x @ directions
    order = np.argsort(p[:, 0], kind="stable")
    x, p = x[order], p[order]
    halves, ones = -np.einsum("ij,ij->i", p, p)[:, None] / 2, np.ones((n, 1), np.float32)
    left, right = np.hstack([p, halves, ones]), np.hstack([p, ones, halves])  # their product is -distance^2 / 2
    found = []
    for i in range(0, n, _BLOCK):
        a = slice(i, min(i + _BLOCK, n))
        reach = p[a.stop - 1, 0] + np.sqrt(radius2)
        for j in range(i, n, _BLOCK):
            if p[j, 0] > reach:
                break
            b = slice(j, min(j + _BLOCK, n))
            near = np.flatnonzero(left[a] @ right[b].T >= -radius2 / 2)
            if len(near) > _MANY * (a.stop - i) * (b.stop - j):
                near = np.flatnonzero(x[a] @ x[b].T >= NEAR_COSINE - 1e-5)
            rows, columns = np.divmod(near, b.stop - j)
            rows, columns = rows + i, columns + j
            rows, columns = rows[rows < columns], columns[rows < columns]
            close = np.einsum("ij,ij->i", x[rows], x[columns]) >= NEAR_COSINE
            found.append(np.sort(np.stack([order[rows[close]], order[columns[close]]], 1), axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _digest(name: str, salt: str = "") -> int:
    return int.from_bytes(hashlib.sha256(f"{salt}\0{name}".encode()).digest()[:8], "big")


def in_test_set(groups: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which rows are for testing only: those of the groups whose hash lies in the first fifth of all hashes."""
    chosen = {g: _digest(g, "test") < TEST_SHARE * 2.0**64 for g in set(groups)}
    return np.array([chosen[g] for g in groups], bool)


def folds_of(groups: Sequence[str], folds: int) -> Ints:
    """The fold of each row, whole groups together, by the hash of the group's name.

    With fewer than 50 groups they are dealt: larger groups first, ties by hash, each to the smallest fold. Either way
    the order of rows does not matter.
    """
    sizes: dict[str, int] = {}
    for g in groups:
        sizes[g] = sizes.get(g, 0) + 1
    if len(sizes) >= _FEW_GROUPS:
        fold = {g: _digest(g, "fold") * folds >> 64 for g in sizes}
    else:
        fold, filled = {}, [0] * folds
        for g in sorted(sizes, key=lambda g: (-sizes[g], _digest(g, "fold"))):
            fold[g] = filled.index(min(filled))
            filled[fold[g]] += sizes[g]
    return np.array([fold[g] for g in groups], np.int64)


def first_groups(groups: Sequence[str], share: float) -> npt.NDArray[np.bool_]:
    """Rows of a share of the groups, the smaller share within the larger: for learning curves."""
    chosen = {g: _digest(g, "curve") < share * 2.0**64 for g in set(groups)}
    return np.array([chosen[g] for g in groups], bool)


@dataclass(frozen=True)
class Split:
    """Rows to learn from and rows to predict."""

    folds: frozenset[int]  # those learnt from
    train: Ints
    test: Ints


def make_splits(groups: Groups, name: str) -> tuple[Ints, list[Split]]:
    """The fold of each row (TEST: held back), and the splits into rows to learn from and rows to predict.

    Up to NESTED_UP_TO rows each fold is predicted once from the others; with more the test set is, from the rest.
    Raises HeadError where there are fewer than three groups.
    """
    if groups.count < _MIN_GROUPS:
        raise HeadError(
            f"{name}: the ratings have {groups.count} groups; at least {_MIN_GROUPS} are needed to measure a head on "
            f"groups that it has not seen. Without a group column each image is one, and near-duplicates share one."
        )
    fold = folds_of(groups.names, min(FOLDS, groups.count))
    held_back = in_test_set(groups.names)
    if len(fold) > NESTED_UP_TO and groups.count >= 2 * _FEW_GROUPS and held_back.any():
        fold[held_back] = TEST
    folds = frozenset(int(f) for f in np.unique(fold)) - {TEST}
    if TEST in fold:
        return fold, [Split(folds, np.flatnonzero(fold != TEST), np.flatnonzero(fold == TEST))]
    return fold, [Split(folds - {f}, np.flatnonzero(fold != f), np.flatnonzero(fold == f)) for f in sorted(folds)]


def predict_splits(
    splits: Sequence[Split], rows: int, predict: Callable[[Split], dict[str, npt.NDArray[np.float64]]]
) -> dict[str, npt.NDArray[np.float64]]:
    """What each predictor says of the test rows of all splits (rows,), by name; NaN for rows in no test.

    predict: what each says of one split's test rows, having learnt from its training rows.
    """
    found: dict[str, npt.NDArray[np.float64]] = {}
    for split in splits:
        for name, values in predict(split).items():
            found.setdefault(name, np.full(rows, np.nan))[split.test] = values
    return found
