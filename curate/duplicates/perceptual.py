"""Pairs of images whose perceptual hashes are near: 64 bits propose, and PDQ's 256 confirm.

At ten million images tens of thousands of pairs lie within 8 of 64 bits by chance, and drawings of one template within
4. PDQ hashes of different photographs differ in 84 bits at least (of 909,226 pairs), those of copies in at most 31.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aesthetic.hashes import hamming, pair_tables, table_pairs
from curate.duplicates.rows import HASH, MIRROR, Array, Table, keep_array, read_rows
from curate.duplicates.vectors import PAIR, as_pairs, unique_pairs

_MANY = 64
"""Different PDQ hashes of one perceptual hash, from which they are compared by leaders."""

_LEADERS = 1024
"""Leaders of one perceptual hash that a PDQ hash is compared with, at most."""

_TASK_HASHES = 1_000_000  # that a task sorts, at least, where there are so many
_CHUNK = 1 << 20  # pairs that are compared at a time


@dataclass(frozen=True)
class Hashes:
    """The different (perceptual hash, PDQ hash) of images, sorted by the perceptual one.

    first: the first image that has them.    mirrored: whether they are of the mirrored image.    equal: (image, first
    image with the same), of all images that are not the first.
    """

    phash: Array
    pdq: Array
    first: Array
    mirrored: Array
    equal: Array


def read_hashes(table: Table) -> Hashes:
    """Of all images that have both hashes."""
    known, phash, pdq = read_rows(table, "known", "phash", "pdq")
    own = np.flatnonzero(known & HASH)
    found = [_distinct(own, phash[own], pdq[own], False)]
    if table.modes.mirror:
        known, phash, pdq = read_rows(table, "known", "mirror_phash", "mirror_pdq")
        other = np.flatnonzero(known & MIRROR)
        found.append(_distinct(other, phash[other], pdq[other], True))
    together = [np.concatenate([getattr(h, f) for h in found]) for f in ("phash", "pdq", "first", "mirrored")]
    order = np.argsort(together[0], kind="stable")
    phash, pdq, first, mirrored = (t[order] for t in together)
    return Hashes(phash, pdq, first, mirrored, found[0].equal)


def _distinct(images: Array, phash: Array, pdq: Array, mirrored: bool) -> Hashes:
    order = np.argsort(phash, kind="stable")
    same = phash[order[1:]] == phash[order[:-1]]
    runs = np.flatnonzero(np.append(same, False) | np.append(False, same))  # of one perceptual hash: by PDQ, too
    part = order[runs]
    order[runs] = part[np.lexsort((part, *pdq[part].T, phash[part]))]
    new = np.ones(len(order), np.bool_)
    new[1:] = (phash[order[1:]] != phash[order[:-1]]) | (pdq[order[1:]] != pdq[order[:-1]]).any(axis=1)
    first = images[order[new]]
    of = first[np.cumsum(new) - 1]
    equal = np.stack([images[order[~new]], of[~new]], axis=1)
    kept = order[new]
    return Hashes(phash[kept], pdq[kept], first, np.full(len(kept), mirrored), equal)


# ----------------------------------------------------------------------------------------------------------- proposals


@dataclass(frozen=True)
class HashTables:
    """A task: some of the tables in which near hashes are looked for."""

    table: Table
    work: str
    config: str
    bits: int
    tables: tuple[int, ...]

    @property
    def path(self) -> Path:
        return self.table.index / self.work / f"hashes-{self.tables[0]:05d}.npy"


def search_tables(task: HashTables) -> None:
    """A task: write the pairs of unique hashes that these tables propose, as indices."""

    def make() -> Array:
        values = task.table.load(task.table.index / task.work / "hashes.npy")
        return np.concatenate([table_pairs(values, task.bits, table) for table in task.tables])

    keep_array(task.table.data, task.path, make, config=task.config)


def proposed(
    table: Table, work: str, config: str, phash: Array, run_map: Callable[[Callable[[Any], Any], Sequence[Any]], Any]
) -> tuple[Array, Array]:
    """(unique perceptual hashes, pairs of them within the bits that the entry says, as indices)."""
    bits = table.modes.phash
    assert bits is not None
    values = phash[np.flatnonzero(np.append(True, phash[1:] != phash[:-1]))] if len(phash) else phash  # they are sorted
    if len(values) < 2:
        return values, np.zeros((0, 2), np.int64)
    keep_array(table.data, table.index / work / "hashes.npy", lambda: values, config=config)
    count = pair_tables(len(values), bits)
    each = max(1, math.ceil(_TASK_HASHES / len(values)))
    tasks = [HashTables(table, work, config, bits, tuple(range(count)[t : t + each])) for t in range(0, count, each)]
    for _ in run_map(search_tables, tasks):
        pass
    return values, np.concatenate([np.zeros((0, 2), np.int64), *(table.load(task.path) for task in tasks)])


# -------------------------------------------------------------------------------------------------------- confirmation


def confirmed(table: Table, hashes: Hashes, values: Array, pairs: Array) -> Array:
    """Of proposed pairs of perceptual hashes, and of equal ones, the pairs of images within the PDQ bits."""
    starts = np.searchsorted(hashes.phash, values, side="left")
    ends = np.searchsorted(hashes.phash, values, side="right")
    counts = ends - starts
    same = np.flatnonzero(counts > 1)
    found = [np.zeros(0, PAIR)]
    few = counts <= _MANY
    inside = same[few[same]]
    small = pairs[few[pairs].all(axis=1)]
    one, other = np.concatenate([inside, small[:, 0]]), np.concatenate([inside, small[:, 1]])
    for a, b in _products(starts, counts, one, other):
        found.append(_within(table, hashes, a, b))

    leaders: dict[int, Array] = {}
    for value in same[~few[same]].tolist():
        leaders[value], of = _leaders(hashes.pdq[starts[value] : ends[value]], table.modes.pdq)
        found.append(_within(table, hashes, starts[value] + np.arange(len(of)), starts[value] + of))
    for one, other in pairs[~few[pairs].all(axis=1)].tolist():
        a, b = (starts[v] + leaders[v] if v in leaders else np.arange(starts[v], ends[v]) for v in (one, other))
        rows = max(1, _CHUNK // len(b))
        for start in range(0, len(a), rows):
            part = a[start : start + rows]
            found.append(_within(table, hashes, np.repeat(part, len(b)), np.tile(b, len(part))))
    return unique_pairs(np.concatenate(found), smallest=True)


def _products(starts: Array, counts: Array, one: Array, other: Array) -> Iterator[tuple[Array, Array]]:
    """All pairs of entries of two perceptual hashes each, some at a time."""
    sizes = counts[one] * counts[other]
    total = np.cumsum(sizes)
    low = 0
    while low < len(one):
        before = total[low - 1] if low else 0
        high = max(low + 1, int(np.searchsorted(total, before + _CHUNK, side="right")))
        part, size = slice(low, high), sizes[low:high]
        within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        width = np.repeat(counts[other[part]], size)
        yield (
            np.repeat(starts[one[part]], size) + within // width,
            np.repeat(starts[other[part]], size) + within % width,
        )
        low = high


def _within(table: Table, hashes: Hashes, a: Array, b: Array) -> Array:
    """The pairs of different images, at most one of them mirrored, whose PDQ hashes are near enough."""
    one, other = hashes.first[a], hashes.first[b]
    keep = (one != other) & ~(hashes.mirrored[a] & hashes.mirrored[b])
    a, b, one, other = a[keep], b[keep], one[keep], other[keep]
    bits = hamming(hashes.pdq[a], hashes.pdq[b])
    near = bits <= table.modes.pdq
    return as_pairs(one[near], other[near], bits[near])


def _leaders(pdq: Array, bits: int) -> tuple[Array, Array]:
    """(leaders, the leader of each): hashes of which none is within `bits` of an earlier one, LEADERS at most.

    So many that are alike take linear time, and are tied to the first of them.
    """
    of = np.full(len(pdq), -1, np.int64)
    leaders: list[int] = []
    rest = np.arange(len(pdq))
    while len(rest) and len(leaders) < _LEADERS:
        leader = rest[0]
        near = hamming(pdq[rest], pdq[leader][None]) <= bits
        of[rest[near]] = leader
        leaders.append(int(leader))
        rest = rest[~near]
    of[rest] = rest
    return np.array(leaders, np.int64), of


def pdq_bits(table: Table, pairs: Array) -> Array:
    """The bits in which the PDQ hashes of pairs (n, 2) of images differ, NaN where one has none: (n,) float32."""
    known, pdq = read_rows(table, "known", "pdq")
    both = ((known[pairs] & HASH) != 0).all(axis=1)
    bits = hamming(pdq[pairs[:, 0]], pdq[pairs[:, 1]]) if len(pairs) else np.zeros(0)
    return np.where(both, bits, np.nan).astype(np.float32)
