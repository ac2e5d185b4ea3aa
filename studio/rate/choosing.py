"""Which images to rate next: at random, around a cut, or those that teach the head most; and pairs of them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from aesthetic.splits import FOLDS, folds_of
from studio.rate.learning import LearntHead

Rows = npt.NDArray[np.int64]

_WHOLE = 200_000  # rows up to which they are put in a random order at once
POOL = 2000
"""Images that stand for all where those are chosen that teach most: in half a second, of vectors of 768 numbers."""
_FIRST_PENALTY = 0.01
"""Of a head that does not exist yet: what is chosen by vectors of unit norm, most often."""
_TRIES = 200  # pairs that are looked at before it is said that there are no more
_FEW_IMAGES = 60
_NEAR = 0.1  # share of the images, by score, within which two are near each other


def seed_of(*words: str) -> int:
    """A number of these words, the same in every run."""
    return int.from_bytes(hashlib.sha256("\0".join(words).encode()).digest()[:8], "big")


def shuffled(count: int, seed: int) -> Iterator[int]:
    """The numbers below `count` in a random order, each once; the same for a seed. Lazily where there are many."""
    rng = np.random.default_rng(seed)
    if count <= _WHOLE:
        yield from rng.permutation(count).tolist()
        return
    seen: set[int] = set()
    while len(seen) < count // 2:
        for number in rng.integers(0, count, 1000).tolist():
            if number not in seen:
                seen.add(number)
                yield number
    rest = np.setdiff1d(np.arange(count), np.fromiter(seen, np.int64))
    yield from rng.permutation(rest).tolist()


def around(values: npt.NDArray[np.floating], rows: Rows, cut: float, most: int) -> Rows:
    """Of rows with these values those nearest to a cut, in turn one from below and one from above: `most` at most."""
    known = np.isfinite(values)
    rows, values = rows[known], values[known].astype(np.float64)
    sides = []
    for side in (np.flatnonzero(values < cut), np.flatnonzero(values >= cut)):
        distance = np.abs(values[side] - cut)
        if len(side) > most:
            near = np.argpartition(distance, most - 1)[:most]
            side, distance = side[near], distance[near]
        sides.append(rows[side[np.lexsort((rows[side], distance))]])
    below, above = sides
    turns = min(len(below), len(above))
    mixed = np.stack([below[:turns], above[:turns]], 1).ravel()
    return np.concatenate([mixed, below[turns:], above[turns:]])[:most]


def most_telling(
    learnt: LearntHead | None, known: npt.NDArray[np.floating], pool: npt.NDArray[np.floating], count: int
) -> Rows:
    """Rows of the pool (m, d) that would teach the head most, as `tastemaker fit --suggest` has it; the first ones are
    a spread of the images, while there is no head. known (n, d): the vectors of what is rated, `learnt` or not."""
    from threadpoolctl import threadpool_limits

    from aesthetic.suggest import suggest

    if len(pool) > POOL:
        even = np.arange(POOL) * len(pool) // POOL
        return even[most_telling(learnt, known, pool[even], count)]
    if not len(pool):
        return np.zeros(0, np.int64)
    penalty, weights, relevance = _FIRST_PENALTY, np.ones(max(1, len(known))), None
    if not len(known):
        known = pool.mean(0, dtype=np.float64)[None, :]
    if learnt is not None and learnt.head is not None and learnt.penalty is not None:
        penalty = learnt.penalty
        if learnt.head.link == "sigmoid":  # a label of an image at p says p (1 - p) of what a rating would
            each = (learnt.head(vectors).astype(np.float64) for vectors in (known, pool))
            weights, relevance = (np.maximum(p * (1 - p), 1e-6) for p in each)
    with threadpool_limits(1, user_api="blas"):  # on a busy machine a second thread waits more than it works
        return suggest(known, weights, pool, penalty, count, relevance=relevance)


def pairs(
    keys: Sequence[str],
    rows: Rows,
    scores: npt.NDArray[np.float64] | None,
    seen: Collection[frozenset[str]],
    count: int,
    seed: int,
) -> list[tuple[str, str]]:
    """Pairs of some rows of these keys that are not among those seen; with scores, of all keys, pairs whose scores are
    near each other.

    Both images of a pair lie in the same of the folds by which `fit_comparisons` tests: of others only a fifth could be
    tested, and five times as many would be needed before there is a head.
    """
    rng = np.random.default_rng([seed, len(seen)])
    if scores is not None:
        rows = rows[np.isfinite(scores[rows])]
        rows = rows[np.argsort(scores[rows], kind="stable")]
    found: dict[frozenset[str], tuple[str, str]] = {}
    if len(rows) < 2:
        return []
    reach = len(rows) - 1 if scores is None else min(len(rows) - 1, max(2 * FOLDS, round(_NEAR * len(rows))))

    def drawn() -> Iterator[tuple[str, str]]:
        while True:
            first = int(rng.integers(len(rows)))
            near = first + rng.integers(1, reach + 1, 4 * FOLDS) * rng.choice([-1, 1], 4 * FOLDS)
            near = near[(near >= 0) & (near < len(rows))]
            name, *others = (keys[row] for row in rows[[first, *near]])
            fold = _folds([name, *others])
            same = [other for other, its in zip(others, fold[1:], strict=True) if its == fold[0]]
            if len(rows) < _FEW_IMAGES:  # folds are dealt, whatever is chosen here
                same = others
            yield from ((name, other) for other in same[:1])

    for pair in islice(drawn(), _TRIES + 10 * count):
        if (both := frozenset(pair)) not in seen and len(both) == 2:
            found.setdefault(both, pair)
        if len(found) == count:
            break
    return list(found.values())


def _folds(names: list[str]) -> list[int]:
    """The fold of each image, as `fit_comparisons` has it where there are many."""
    filler = [f" {i}" for i in range(60)]  # of few groups folds would be dealt, not hashed
    return folds_of([*names, *filler], FOLDS)[: len(names)].tolist()
