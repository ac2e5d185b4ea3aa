"""Near pairs of hashes of images: all that differ in few bits, exactly, without comparing all with all.

Two 64-bit hashes within r bits agree in at least m - r of m blocks of their bits. So for each choice of m - r blocks
the hashes are sorted by these, and each is compared with those that follow it while they agree: block permutation
(Manku, Jain and Das Sarma 2007). Choices are called tables here; no two of them give the same pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

MIN_ONES = 29
"""A perceptual hash (64 bits, split at their median) with fewer ones is of a flat image and equals nothing: 4 of 796
drawings have no ones at all, 47 fewer than 29, and 2 of 1,349 photographs."""

_BLOCK = 1 << 15  # hashes at a time, so that what is made of them stays in the processor's cache


def hex_to_bits(
    hashes: Sequence[str | None], bits: int = 64, least: int = MIN_ONES
) -> tuple[Hashes, npt.NDArray[np.bool_]]:
    """Hex digits -> uint64 (n,), or (n, bits / 64) for longer hashes, first digits first, and which are there (n,).

    Absent are None, what isn't bits / 4 hex digits, and of 64-bit hashes those with fewer than `least` ones; absent
    ones are 0, and must be compared with nothing.
    """
    digits, words = bits // 4, bits // 64
    if {*map(type, hashes)} <= {str} and {*map(len, hashes)} <= {digits}:  # type: ignore[arg-type]
        valid, there = np.ones(len(hashes), np.bool_), hashes
    else:
        valid = np.fromiter((isinstance(h, str) and len(h) == digits for h in hashes), np.bool_, len(hashes))
        there = [h for h, v in zip(hashes, valid, strict=True) if v]
    try:
        data = bytes.fromhex("".join(map(str, there)))
    except ValueError:
        data = b""
    if len(data) != digits // 2 * int(valid.sum()):  # some are no hex digits
        valid &= np.fromiter((isinstance(h, str) and _is_hex(h) for h in hashes), np.bool_, len(hashes))
        data = bytes.fromhex("".join(h for h, v in zip(hashes, valid, strict=True) if v and h))
    found = np.zeros((len(hashes), words), np.uint64)
    found[valid] = np.frombuffer(data, ">u8").reshape(-1, words)
    if words == 1:
        found = found[:, 0]
        valid &= np.bitwise_count(found) >= least
    found[~valid] = 0
    return found, valid


def _is_hex(text: Any) -> bool:
    return all(c in "0123456789abcdefABCDEF" for c in text)


def hamming(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Ints:
    """In how many bits hashes differ: int64, of uint64 that broadcast.

    Where both have a last axis of 4, and one has two axes or more, that axis is one hash of 256 bits.
    """
    differ = np.bitwise_count(np.asarray(a) ^ np.asarray(b))
    if np.shape(a)[-1:] == np.shape(b)[-1:] == (4,) and max(np.ndim(a), np.ndim(b)) > 1:
        return np.asarray(differ.sum(-1, dtype=np.int64))
    return np.asarray(differ, np.int64)


# -------------------------------------------------------------------------------------------------------------- tables


def _blocks(n: int, bits: int) -> int:
    """Into how many blocks to cut: with more, tables are many; with fewer, many hashes agree by chance.

    Measured: permuting, sorting and looking at one successor take 10 ns, and each further one about 12.
    """

    def cost(m: int) -> float:
        agree_by_chance = n / 2.0 ** (64 * (m - bits) / m)
        return math.comb(m, bits) * (10 + 12 * agree_by_chance / 2)

    return min(range(max(bits, 1), min(bits + 9, 65)), key=cost)


def pair_tables(n: int, bits: int) -> int:
    """How many tables n unique 64-bit hashes take to find all pairs within `bits` (0 to 64)."""
    return math.comb(_blocks(n, bits), bits) if bits else 0


def _permutation(m: int, chosen: Sequence[int]) -> list[tuple[int, int, int]]:
    """Which bits go where, so that the chosen of m blocks come first: (shift right, mask, shift left) of each run."""
    edges = [64 * b // m for b in range(m + 1)]
    order = [b for first in (True, False) for b in reversed(range(m)) if (b in chosen) == first]
    runs: list[list[int]] = []
    for b in order:  # from the top down; neighbours stay neighbours
        if runs and runs[-1][0] == edges[b + 1]:
            runs[-1][0] = edges[b]
        else:
            runs.append([edges[b], edges[b + 1]])
    parts, top = [], 64
    for low, high in runs:
        top -= high - low
        parts.append((low, (1 << (high - low)) - 1, top))
    return parts


def _permute(values: Hashes, parts: Sequence[tuple[int, int, int]], *, back: bool = False) -> Hashes:
    """Each hash with its bits moved as `parts` say, or moved back."""
    out = np.zeros_like(values)
    for start in range(0, len(values), _BLOCK):
        v, o = values[start : start + _BLOCK], out[start : start + _BLOCK]
        for low, mask, top in parts:
            a, b = (top, low) if back else (low, top)
            o |= ((v >> np.uint64(a)) & np.uint64(mask)) << np.uint64(b)
    return out


def _successors(values: Hashes, key: int, bits: int) -> Iterator[tuple[Hashes, Hashes]]:
    """Of sorted hashes those that agree in the first `key` bits and differ in at most `bits`: (one, other)."""
    limit = np.uint64((1 << (64 - key)) - 1)
    for start in range(0, len(values) - 1, _BLOCK):
        at: npt.NDArray[Any] = np.arange(start, min(start + _BLOCK, len(values) - 1))
        step, one, other = 1, values[start : start + len(at)], values[start + 1 : start + 1 + len(at)]
        while len(at):
            differ = one ^ other
            agree = differ <= limit
            near = agree & (np.bitwise_count(differ) <= bits)
            if near.any():
                yield one[near], other[near]
            step += 1
            at = at[agree]
            at = at[: np.searchsorted(at, len(values) - step)]
            one, other = values[at], values[at + step]


def _table(values: Hashes, bits: int, table: int) -> tuple[Hashes, Hashes]:
    """Pairs of hashes that this table finds within `bits`, and no table before it."""
    m = _blocks(len(values), bits)
    edges = [64 * b // m for b in range(m + 1)]
    chosen = next(c for t, c in enumerate(combinations(range(m), m - bits)) if t == table)
    parts = _permutation(m, chosen)
    key = sum(edges[b + 1] - edges[b] for b in chosen)
    permuted = _permute(values, parts)
    permuted.sort()
    found = list(_successors(permuted, key, bits))
    nothing = np.zeros(0, np.uint64)
    one, other = (_permute(np.concatenate([nothing, *(f[side] for f in found)]), parts, back=True) for side in range(2))
    # the table of a pair is that of the first m - bits blocks in which it agrees: it differs in those between
    ours = np.ones(len(one), np.bool_)
    for b in range(chosen[-1] if chosen else 0):
        if b not in chosen:
            mask = np.uint64(((1 << (edges[b + 1] - edges[b])) - 1) << edges[b])
            ours &= ((one ^ other) & mask) != 0
    return one[ours], other[ours]


def table_pairs(values: Hashes, bits: int, table: int) -> Ints:
    """Pairs (i < j) of indices of hashes within `bits` that one of `pair_tables` finds: (pairs, 2), in no order.

    values: (n,) sorted and unique. No pair is found by two tables. Uses 8 bytes per hash beside those given.
    """
    one, other = (np.searchsorted(values, side) for side in _table(values, bits, table))
    return np.stack([np.minimum(one, other), np.maximum(one, other)], 1)


def near_hashes(values: Hashes, bits: int) -> Ints:
    """All pairs (i < j) of indices of hashes within `bits`: (pairs, 2), sorted.

    values: (n,) sorted and unique; raises ValueError if not. 1 million within 4 bits take half a second of CPU.
    """
    if len(values) > 1 and not (values[1:] > values[:-1]).all():
        raise ValueError("hashes must be sorted and unique")
    found = [table_pairs(values, bits, t) for t in range(pair_tables(len(values), bits) if len(values) > 1 else 0)]
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *found])
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def cross_hashes(values: Hashes, others: Hashes, bits: int) -> Ints:
    """All pairs (i of values, j of others) within `bits`: (pairs, 2), sorted. 64-bit hashes, in any order."""
    ours, our_row = np.unique(values, return_inverse=True)
    theirs, their_row = np.unique(others, return_inverse=True)
    if not (len(ours) and len(theirs)):
        return np.zeros((0, 2), np.int64)
    union = np.sort(np.concatenate([ours, theirs]))
    union = union[np.append(True, union[1:] != union[:-1])]  # numpy's unique and union1d take a hundred times as long
    tables = pair_tables(len(union), bits)
    if len(ours) * len(theirs) <= 8 * tables * len(union):  # few on one side: all with all is quicker
        found = [(ours[i], theirs[j]) for i, j in _all_within(ours, theirs, bits)]
    else:
        both = np.intersect1d(ours, theirs)
        found = [(both, both)]
        is_ours, is_theirs = np.isin(union, ours), np.isin(union, theirs)
        for t in range(tables):
            pairs = table_pairs(union, bits, t)
            for a, b in (pairs.T, pairs.T[::-1]):
                keep = is_ours[a] & is_theirs[b]
                found.append((union[a[keep]], union[b[keep]]))
    a = np.searchsorted(ours, np.concatenate([f[0] for f in found]))
    b = np.searchsorted(theirs, np.concatenate([f[1] for f in found]))
    pairs = _expand(_expand(np.stack([a, b], 1), our_row)[:, ::-1], their_row)[:, ::-1]
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _all_within(values: Hashes, others: Hashes, bits: int) -> Iterator[tuple[Ints, Ints]]:
    """(indices of values, indices of others) of all pairs within `bits`, by comparing all with all."""
    rows = max(1, (1 << 20) // len(others))
    for start in range(0, len(values), rows):
        differ = np.bitwise_count(values[start : start + rows, None] ^ others)
        a, b = np.nonzero(differ <= bits)
        yield a + start, b


def _expand(pairs: Ints, unique_row: Ints) -> Ints:
    """Pairs (of unique values, any) -> pairs of all rows that have these values."""
    order = np.argsort(unique_row, kind="stable")
    count = np.bincount(unique_row)
    first = np.cumsum(count) - count
    times = count[pairs[:, 0]]
    within = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
    return np.stack([order[np.repeat(first[pairs[:, 0]], times) + within], np.repeat(pairs[:, 1], times)], 1)
