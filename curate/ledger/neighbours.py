"""Which members of a group are near each other, so that `best_of` rejects only what is near to what it keeps.

A group of near-duplicates is a centre and what is near it, so two members may be twice as far apart as the thresholds
allow. Whoever makes such groups keeps the pairs beside them, in a file that `best_of` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
        if not file.is_file() or sha256_file(file) != sha:
            raise UserError(
                f"{file} is not what it was when {name} was made. Remove {table.name}: "
                f"`tastemaker annotate {data.root}` makes both anew."
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
    copies, of = one[same], other[same]
    stands = keys.copy()  # the key of the row that stands for each
    if len(copies):
        order = np.argsort(copies)
        at = np.minimum(np.searchsorted(copies, keys, sorter=order), len(copies) - 1)
        hit = copies[order[at]] == keys
        stands[hit] = of[order[at[hit]]]
    classes, row_class = np.unique(stands, return_inverse=True)

    known, ends = np.zeros(len(classes), np.bool_), []
    inside = np.ones(int((~same).sum()), np.bool_)
    for side in (one[~same], other[~same]):
        at = np.minimum(np.searchsorted(classes, side), max(0, len(classes) - 1))
        hit = classes[at] == side if len(classes) else np.zeros(len(side), np.bool_)
        known[at[hit]] = True
        inside &= hit  # one that is not here, such as a hidden image, rejects nobody
        ends.append(at)
    a, b = np.concatenate(ends)[np.tile(inside, 2)], np.concatenate(ends[::-1])[np.tile(inside, 2)]

    order = np.lexsort((keys, -values))  # NaN is last
    rank = np.empty(len(keys), np.int64)
    rank[order] = np.arange(len(keys))
    best = np.full(len(classes), len(keys), np.int64)
    np.minimum.at(best, row_class, rank)
    out = np.zeros(len(classes), np.bool_)
    while len(a):  # whoever is better than all its neighbours that are left stays
        rival = np.full(len(classes), len(keys), np.int64)
        np.minimum.at(rival, a, best[b])
        stays = best[a] < rival[a]
        out[b[stays]] = True
        settled = np.zeros(len(classes), np.bool_)
        settled[a[stays]] = True
        settled |= out
        left = ~(settled[a] | settled[b])
        a, b = a[left], b[left]
    return known[row_class], (rank == best[row_class]) & ~out[row_class]
