"""Which ratings belong together, and which of them a head may see: groups, folds and the test set.

Two photographs by one photographer, two images of one prompt or two copies of one file tell more about each other
than about taste. They form a group, and a group is never on both sides of a split. Which side it is on follows from a
hash of its name alone: other ratings that come later change nothing for those that are there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aesthetic.hashes import MIN_ONES, Hashes, hex_to_bits, near_hashes
from aesthetic.heads import HeadError
from aesthetic.neighbours import near_vectors, near_vectors_in_cells

Ints = npt.NDArray[np.int64]

NEAR_COSINE = 0.95
"""From this cosine on two images count as near-duplicates. Ours: crops, resizes and re-encodings of a photograph lie
above it in CLIP's spaces and in the bundled one; too many pairs only make a split a little coarser."""

NEAR_BITS = 4
"""Up to this many of 64 bits two perceptual hashes may differ. Ours, likewise."""

EXACT_UP_TO = 50_000
"""Vectors up to which all pairs are found. With more they are looked for in cells, which takes half the time there and
a tenth for a million; which share of them is found is measured, and stated in the report."""

TEST_SHARE = 0.2
FOLDS = 5
TEST = -1  # the fold of the test set
NESTED_UP_TO = 3000
"""Images up to which each is predicted by nested cross-validation. With more, a fifth of them is a test set: its
interval is narrow by then (half-width of Spearman's about .05 for 600 images)."""

_MIN_GROUPS = 3
_FEW_GROUPS = 50  # below this folds are dealt evenly, because hashing could leave one nearly empty


@dataclass(frozen=True)
class Groups:
    """The group of each row, and how it came about."""

    names: list[str]
    given: bool  # by whoever rated; otherwise each row is its own, but for near-duplicates
    joined: int  # near-duplicate pairs that lay in different groups
    recall: float | None = None  # of the pairs of near vectors, where not all were compared

    @property
    def count(self) -> int:
        return len(set(self.names))

    @property
    def facts(self) -> dict[str, Any]:
        """What reports say of them."""
        recall = {} if self.recall is None else {"near_duplicates_recall": round(self.recall, 4)}
        return {"groups": self.count, "groups_given": self.given, "near_duplicates_joined": self.joined, **recall}


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
    digits) within NEAR_BITS, and vectors (n, d) of unit norm with a cosine of at least NEAR_COSINE. Of hashes with few
    ones (hashes.MIN_ONES), as flat images and simple drawings have, only equal ones count, and those of none never. A
    group of several has the name whose hash is the smallest.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    each = ids
    if groups is not None:
        each = [f"image {i}" if g is None or g != g else str(g) for g, i in zip(groups, ids, strict=True)]
    names, group = np.unique(np.asarray(each, str), return_inverse=True)
    pairs = [_equal(_numbered(sha256 or ())), near_looks(hex_to_bits(phash or (), least=1)[0])]
    recall = None
    if vectors is not None and len(vectors) > EXACT_UP_TO:
        near, recall = near_vectors_in_cells(vectors, NEAR_COSINE)
        pairs.append(near)
    elif vectors is not None:
        pairs.append(near_vectors(vectors, NEAR_COSINE))
    linked = group[np.concatenate([p.reshape(-1, 2) for p in pairs])]
    linked = linked[linked[:, 0] != linked[:, 1]]
    graph = coo_array((np.ones(len(linked), np.int8), (linked[:, 0], linked[:, 1])), shape=(len(names), len(names)))
    component = connected_components(graph, directed=False)[1]
    order = np.argsort([_digest(n) for n in names], kind="stable")
    name_of: dict[int, str] = {}
    for i in order:
        name_of.setdefault(int(component[i]), str(names[i]))
    names_of_rows = [name_of[int(component[g])] for g in group]
    return Groups(names_of_rows, groups is not None, len(np.unique(linked, axis=0)), recall)


def near_copies(sha256: Hashes, phash: Hashes) -> Ints:
    """Pairs of rows that connect equal files, and images that look nearly the same: (pairs, 2).

    sha256, phash: (n,) uint64: 64 bits of either hash, 0 where it is not known, or has no ones.
    """
    return np.concatenate([_equal(sha256), near_looks(phash)])


def near_looks(phash: Hashes) -> Ints:
    """As `near_copies`, by perceptual hashes alone: equal ones, and those with enough ones within NEAR_BITS."""
    rows = np.flatnonzero(np.bitwise_count(phash) >= MIN_ONES)
    values, first = np.unique(phash[rows], return_index=True)
    return np.concatenate([_equal(phash), rows[first[near_hashes(values, NEAR_BITS)]]])


def _numbered(values: Sequence[str | None]) -> Ints:
    """A number for each value, the same for equal ones, (n,); 0 for None."""
    numbers: dict[str, int] = {}
    return np.array([0 if v is None else numbers.setdefault(v, len(numbers) + 1) for v in values], np.int64)


def _equal(values: npt.NDArray[Any]) -> Ints:
    """Each row whose value, not 0, has been there before, with the row that had it last: (pairs, 2)."""
    rows = np.flatnonzero(values)
    rows = rows[np.argsort(values[rows], kind="stable")]
    again = values[rows[1:]] == values[rows[:-1]]
    return np.stack([rows[:-1][again], rows[1:][again]], 1)


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
