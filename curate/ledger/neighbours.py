"""Which members of a group are near each other, so that `best_of` rejects only what is near to what it keeps.

A group of near-duplicates is a centre and what is near it, so two members may be twice as far apart as the thresholds
allow. Whoever makes such groups keeps the pairs beside them, in a file that `best_of` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.files import atomic
from curate.layout import ANNOTATED, Data
from curate.ledger.view import LedgerTable
from curate.store.files import sha256_file

FACT = "neighbours"
"""In an annotator's record: the sha256 of such a file, of the column that is called like the annotator's entry."""

FILE = "neighbours.parquet"
"""Its name, in `Data.index` of the entry."""

_SPARSE = 4  # keys are looked up in a table of their range, where it is no longer than so many times their number
_SCHEMA = pa.schema([("key", pa.uint64()), ("near", pa.uint64()), ("same", pa.bool_())])


def write_neighbours(file: Path, copies: npt.NDArray[np.uint64], pairs: npt.NDArray[np.uint64]) -> str:
    """Write pairs of keys, as numbers; the sha256 of the file, for the record.

    copies: (m, 2) of an image and the one that stands for it and all that equal it.    pairs: (p, 2) of images that
    stand for others, or for themselves, and are near each other. Groups that have no pairs are taken whole.
    """
    both = np.concatenate([copies, pairs])
    same = np.arange(len(both)) < len(copies)
    with atomic(file) as f:
        pq.write_table(pa.table([both[:, 0], both[:, 1], same], schema=_SCHEMA), f, compression="zstd")
    return sha256_file(file)


def known_neighbours(data: Data, found: Sequence[LedgerTable]) -> dict[str, tuple[Path, str]]:
    """Of columns of groups that have such a file: it, and its sha256. UserError where it is not what it was."""
    files = {}
    for table in found[1:]:
        sha, name = table.facts[0].get(FACT), table.name.removeprefix(f"{ANNOTATED}/")
        if not sha or name not in table.columns:
            continue
        file = data.index(name) / FILE
        if not data.exists(file) or sha256_file(data.local(file)) != sha:
            raise UserError(
                f"{data.shown(file)} is not what it was when {name} was made. Remove {table.name}: "
                f"`tastemaker annotate {data}` makes both anew."
            )
        files[name] = file, sha
    return files


def far_from_best(
    file: Path, keys: npt.NDArray[np.uint64], values: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """(which rows are in groups whose pairs are known, which of these stay), each (n,).

    The best row of a group stays and rejects its neighbours, of what is left the best stays and rejects its own, and so
    on. values: NaN goes last; of equal ones the smaller key is the better.
    """
    table = pq.read_table(file)
    one, other, same = (table[name].to_numpy() for name in _SCHEMA.names)
    del table
    by_key = np.argsort(keys)  # so that a stable sort breaks ties by key, and looking keys up stays within a cache
    ordered = keys[by_key]
    rank = np.empty(len(keys), np.int32)  # of each row, the best 0
    rank[np.argsort(-values[by_key], kind="stable")] = np.arange(len(keys), dtype=np.int32)  # NaN is last

    classes, row_class, best = ordered, np.arange(len(keys)), rank  # rows that one stands for, and the best of them
    if same.any():
        copies, of = one[same], other[same]
        sorted_copies = np.argsort(copies)
        at, hit = _find(copies[sorted_copies], ordered)
        stands = np.where(hit, of[sorted_copies[at]], ordered)
        classes, row_class = np.unique(stands, return_inverse=True)
        best = np.full(len(classes), len(keys), np.int32)
        np.minimum.at(best, row_class, rank)
        one, other = one[~same], other[~same]
    (a, a_here), (b, b_here) = _find(classes, one), _find(classes, other)
    known = np.zeros(len(classes), np.bool_)
    known[a[a_here]] = known[b[b_here]] = True
    both = a_here & b_here  # one that is not here, such as a hidden image, rejects nobody
    better, worse = best[a[both]], best[b[both]]
    del one, other, a, b, a_here, b_here, both
    better, worse = np.minimum(better, worse), np.maximum(better, worse)

    out = np.zeros(len(keys), np.bool_)  # by rank
    while len(better):  # whoever has no better neighbour that may yet stay, stays
        beaten = np.zeros(len(keys), np.bool_)
        beaten[worse] = True
        stays = ~beaten[better]
        out[worse[stays]] = True
        left = ~(out[worse] | out[better] | stays)
        better, worse = better[left], worse[left]
    found = np.empty((2, len(keys)), np.bool_)
    found[0, by_key] = known[row_class]
    found[1, by_key] = (rank == best[row_class]) & ~out[rank]
    return found[0], found[1]


def _find(
    values: npt.NDArray[np.uint64], wanted: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Where each of `wanted` is in `values`, sorted and different, and whether it is."""
    if not len(values):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.bool_)
    low, high = values[0], values[-1]
    if int(high - low) < _SPARSE * len(values):  # as keys are: 4 s of CPU for ten million, not 14
        place = np.full(int(high - low) + 1, -1, np.int32)
        place[values - low] = np.arange(len(values), dtype=np.int32)
        at = place[np.clip(wanted, low, high) - low]
        return np.maximum(at, 0), (at >= 0) & (wanted >= low) & (wanted <= high)
    at = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    return at, values[at] == wanted
