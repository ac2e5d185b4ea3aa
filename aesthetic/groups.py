"""Pairs of near-duplicates -> groups in which each member is near one centre."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Small = npt.NDArray[np.int32]

_WORTH = 0.1  # share of the pairs that a round must settle; below it one centre after another is quicker


def link_groups(n: int, pairs: npt.NDArray[Any], order: npt.NDArray[Any] | None = None) -> Ints:
    """The group of each of n rows: its member that comes first; -1 for rows alone. (n,) int64.

    A group is a centre and its neighbours: of the rows that a chain of pairs connects, that with most neighbours is
    the first centre (of several the one that comes first), and what is no neighbour of it is grouped again among
    itself. So a chain of look-alikes is cut, and rows may stay alone though they are in a pair.

    Args:
        pairs: (m, 2) indices of rows, in any order; equal pairs count once, and a row is no neighbour of itself.
        order: (n,) which row comes before which, all different; that of the indices by default.

    Linear in the pairs, but for long chains (m log m). About 100 bytes of memory per pair.
    """
    found = np.full(n, -1, np.int64)
    pairs = np.asarray(pairs)
    linked = np.zeros(n, np.bool_)
    for side in range(2):
        linked[pairs[:, side]] = True
    rows = np.flatnonzero(linked)
    if order is not None:
        rows = rows[np.argsort(np.asarray(order)[rows], kind="stable")]
    small = np.empty(n, np.int32)  # from here on rows are numbered as they come
    small[rows] = np.arange(len(rows), dtype=np.int32)
    centre = _centres(len(rows), *_both_ways(len(rows), small[pairs[:, 0]], small[pairs[:, 1]]))
    first = np.full(len(rows), len(rows), np.int64)
    grouped = np.flatnonzero(centre >= 0)
    np.minimum.at(first, centre[grouped], grouped)
    found[rows[grouped]] = rows[first[centre[grouped]]]
    return found


def _both_ways(n: int, a: Small, b: Small) -> tuple[Small, Small]:
    """Each pair in both directions, once, sorted by the first."""
    from scipy.sparse import coo_array

    a, b = a[a != b], b[a != b]
    ends = np.concatenate([a, b]), np.concatenate([b, a])
    graph = coo_array((np.ones(len(ends[0]), np.bool_), ends), shape=(n, n)).tocsr()
    return np.repeat(np.arange(n, dtype=np.int32), np.diff(graph.indptr)), graph.indices.astype(np.int32, copy=False)


def _centres(n: int, a: Small, b: Small) -> Small:
    """The centre of each row's group, -1 for rows alone, of pairs in both directions, sorted by the first.

    A row with more neighbours than all that are at most two pairs away is a centre whatever becomes of the others: to
    choose another first takes no neighbour from it. So all such rows are chosen at once, in rounds.
    """
    centre = np.full(n, -1, np.int32)
    while len(a):
        starts = np.concatenate([[0], np.flatnonzero(np.diff(a)) + 1])
        rows = a[starts]
        rank = np.zeros(n, np.int64)
        rank[rows] = np.diff(starts, append=len(a)) * np.int64(n) + (n - 1 - rows)
        best = rank.copy()
        best[rows] = np.maximum(rank[rows], np.maximum.reduceat(rank[b], starts))
        is_centre = np.zeros(n, np.bool_)
        is_centre[rows] = np.maximum(best[rows], np.maximum.reduceat(best[b], starts)) == rank[rows]
        centre[is_centre] = np.flatnonzero(is_centre)
        member = is_centre[b]
        centre[a[member]] = b[member]
        left = (centre[a] < 0) & (centre[b] < 0)
        settled = len(a) - left.sum()
        a, b = a[left], b[left]
        if settled < _WORTH * (settled + len(a)):
            _one_by_one(centre, a, b)
            break
    return centre


def _one_by_one(centre: Small, a: Small, b: Small) -> None:
    """Choose centres one after another, as for long chains whose rows come one after the other."""
    starts = np.searchsorted(a, np.arange(len(centre) + 1))
    degree = np.diff(starts).tolist()
    heap = [(-d, row) for row, d in enumerate(degree) if d]
    heapify(heap)
    while heap:
        known, row = heappop(heap)
        if centre[row] >= 0 or not degree[row]:
            continue
        if -known != degree[row]:  # it has lost neighbours since
            heappush(heap, (-degree[row], row))
            continue
        members = [row, *(x for x in b[starts[row] : starts[row + 1]].tolist() if centre[x] < 0)]
        for x in members:
            centre[x] = row
        for x in members:
            for y in b[starts[x] : starts[x + 1]].tolist():
                degree[y] -= 1
