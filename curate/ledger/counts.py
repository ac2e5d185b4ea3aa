"""Values of a column and what a selection says of their rows, in a memory that does not grow with the rows.

Tables and verdicts both lie in the order of keys, so a few files of the one and a row group of the other are read at a
time. Rows in another order are counted as well, only more slowly.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.ledger.rules import DENIED, KEPT
from curate.ledger.view import LedgerTable

_ROWS, _FILES = 1 << 17, 64  # that are read, and brought from an object store, at a time
_BINS, _FEW = 1 << 12, 1 << 16


def values_of(table: LedgerTable, column: str) -> Iterator[tuple[pa.ChunkedArray, npt.NDArray[np.float64]]]:
    """The finite values of a column of numbers and their keys, in the table's order."""
    for batch in _batches(table, [table.key, column]):
        values = pc.cast(batch[column], pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        finite = np.isfinite(values)  # null is NaN here
        yield batch[table.key].filter(pa.array(finite)), values[finite]


def value_range(table: LedgerTable, column: str) -> tuple[float, float] | None:
    """The least and the greatest finite value; None where there is none."""
    lo, hi = np.inf, -np.inf
    for values in _numbers(table, column):
        if len(values):
            lo, hi = min(lo, float(values.min())), max(hi, float(values.max()))
    return (lo, hi) if lo <= hi else None


def quantile(table: LedgerTable, column: str, level: float) -> float | None:
    """The least value that a share `level` of all finite ones do not exceed, exactly; None where there is none.

    Counts the values of ever narrower ranges, until few enough are left to be put in order.
    """
    if (found := value_range(table, column)) is None:
        return None
    lo, hi = found
    rank = None  # of the value that is looked for, among those from lo to hi
    while lo < hi:
        edges = np.linspace(lo, hi, _BINS + 1)
        counts, lows, highs = np.zeros(_BINS, np.int64), np.full(_BINS, np.inf), np.full(_BINS, -np.inf)
        for values in _numbers(table, column):
            values = values[(values >= lo) & (values <= hi)]
            places = np.clip(np.searchsorted(edges, values, "right") - 1, 0, _BINS - 1)
            counts += np.bincount(places, minlength=_BINS)
            np.minimum.at(lows, places, values)
            np.maximum.at(highs, places, values)
        if rank is None:
            count = int(counts.sum())
            rank = max(1, count - int(count - level * count))
        sums = np.cumsum(counts)
        place = int(np.searchsorted(sums, rank))
        rank -= int(sums[place] - counts[place])
        lo, hi = float(lows[place]), float(highs[place])
        if counts[place] <= _FEW:
            left = [values[(values >= lo) & (values <= hi)] for values in _numbers(table, column)]
            return float(np.sort(np.concatenate(left))[rank - 1])
    return lo


def _numbers(table: LedgerTable, column: str) -> Iterator[npt.NDArray[np.float64]]:
    for batch in _batches(table, [column]):
        values = pc.cast(batch[column], pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        yield values[np.isfinite(values)]


def _batches(table: LedgerTable, columns: list[str]) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(table.files), _FILES):
        files = table.files[start : start + _FILES]
        table.data.bring(*files)
        for path in files:
            with pq.ParquetFile(path) as file:
                yield from file.iter_batches(_ROWS, columns=columns, use_threads=False)


class Verdicts:
    """What a selection's file says of keys: `of` gives a place in `words` for each."""

    def __init__(self, path: Path) -> None:
        self.words: list[str] = []
        self._file = pq.ParquetFile(path)
        self._groups = [i for i in range(self._file.num_row_groups) if self._file.metadata.row_group(i).num_rows]
        firsts = [next(self._file.iter_batches(1, row_groups=[i], columns=["key"]))["key"] for i in self._groups]
        self._firsts = np.array([int(keys[0].as_py()) for keys in firsts], np.uint64)
        self._read = lru_cache(1)(self._read_group)

    def of(self, keys: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.int16]:
        """A place in `words` for each key, -1 where there is no verdict."""
        numbers, found = key_numbers(keys), np.full(len(keys), -1, np.int16)
        groups = np.searchsorted(self._firsts, numbers, "right") - 1
        for group in np.unique(groups[groups >= 0]).tolist():
            theirs = np.flatnonzero(groups == group)
            known, verdicts = self._read(group)
            places = np.minimum(np.searchsorted(known, numbers[theirs]), len(known) - 1)
            found[theirs] = np.where(known[places] == numbers[theirs], verdicts[places], -1)
        return found

    def kept(self, places: npt.NDArray[np.int16]) -> npt.NDArray[np.bool_]:
        """Which of some verdicts are `kept`."""
        return self._are(places, KEPT)

    def denied(self, places: npt.NDArray[np.int16]) -> npt.NDArray[np.bool_]:
        """Which of some verdicts are `denied`."""
        return self._are(places, DENIED)

    def _are(self, places: npt.NDArray[np.int16], word: str) -> npt.NDArray[np.bool_]:
        return places == self.words.index(word) if word in self.words else np.zeros(len(places), bool)

    def _read_group(self, group: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int16]]:
        rows = self._file.read_row_group(self._groups[group], use_threads=False)
        verdict = rows["verdict"].combine_chunks()
        names = verdict.dictionary.to_pylist()
        self.words += [name for name in names if name not in self.words]
        places = np.array([self.words.index(name) for name in names], np.int16)
        return key_numbers(rows["key"]), places[verdict.indices.to_numpy()]


def key_numbers(keys: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """Keys as the numbers that they are."""
    return pc.cast(pc.cast(keys, pa.string()), pa.uint64()).to_numpy(zero_copy_only=False)
