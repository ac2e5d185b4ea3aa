"""One column of the index: its values in the order of rows, the order of its values, and bins for histograms.

N.values.npy  numbers as they are stored, uint8 of flags, uint16 codes of texts of which there are few
N.valid.npy   a bitmap as Arrow's, where some rows have no value
N.order.npy   uint32, rows by value and then by key; those without a value last
N.bins.npy    uint8, the bin of each row in a linear histogram;  N.log.npy: in a logarithmic one
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

BINS = 80
"""Bins of a histogram; of categories the commonest values that are told apart."""
NONE, OTHER = 127, 126
"""Bins of rows without a value, and of values that are not among the commonest. Below 128: with the highest bit, which
says that a row is kept, one look at each row counts both."""
FEW = 1000
"""Different texts up to which a column is in the index; others are read from the tables of the data folder."""
LONG = 200
"""Characters of a text from which on its column is none of categories."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ColumnFacts:
    """What is known of a column without a look at its rows."""

    name: str
    kind: str  # number, category, flag or text: how it is shown
    stored: str  # number, flag or code: how its values lie here; "" where they do not
    number: int = 0  # of its files
    count: int | None = None  # rows that have a value (a finite one); None where nobody counted
    low: float | None = None
    high: float | None = None
    infinite: tuple[int, float] = (0, 0.0)  # rows with an infinity, and one of them
    edges: tuple[float, ...] = ()  # of numbers, one more than there are bins
    counts: tuple[int, ...] = ()
    log_edges: tuple[float, ...] = ()
    log_counts: tuple[int, ...] = ()
    words: tuple[str, ...] = ()  # of codes, by code
    values: tuple[str, ...] = ()  # of categories and flags: the commonest first
    others: int = 0  # rows with other values than these
    nullable: bool = False  # whether there is a bitmap

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> ColumnFacts:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return ColumnFacts(**fields)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class ColumnWriter:
    """Writes a column, shard by shard: `put`, and then `finish`."""

    def __init__(self, folder: Path, number: int, name: str, kind: pa.DataType, rows: int, cluster: bool) -> None:
        self.folder, self.number, self.name, self.rows, self.cluster = folder, number, name, rows, cluster
        self._kind = kind
        self._codes = dict[str, int]()
        dtype: Any = None
        if pa.types.is_boolean(kind):
            dtype = np.uint8
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            dtype = np.uint16
        elif pa.types.is_integer(kind) or kind in (pa.float32(), pa.float64()):
            dtype = kind.to_pandas_dtype()
        self._values = None if dtype is None else new_array(folder / f"{number}.values.npy", dtype, rows)
        self._valid = np.zeros(rows if dtype is not None else 0, np.bool_)

    @property
    def wanted(self) -> bool:
        """Whether its values are to be in the index, as far as is known."""
        return self._values is not None

    def put(self, places: npt.NDArray[np.int64] | slice, found: pa.ChunkedArray) -> None:
        """Values of some rows."""
        if self._values is None:
            return
        column = found.combine_chunks()
        valid = np.ones(len(column), np.bool_) if not column.null_count else column.is_valid().to_numpy(False)
        if self._values.dtype == np.uint16 and not pa.types.is_integer(self._kind):
            if (codes := self._encode(column)) is None:
                return
            values: Any = codes
        elif pa.types.is_boolean(column.type):
            values = pc.fill_null(column, False).to_numpy(False).astype(np.uint8)
        else:
            values = (pc.fill_null(column, 0) if column.null_count else column).to_numpy(zero_copy_only=False)
        self._values[places] = values
        self._valid[places] = valid

    def _encode(self, column: pa.Array) -> npt.NDArray[np.uint16] | None:
        """Codes of texts, 0 where there is none; None, and the column is given up, where there are too many."""
        encoded = pc.dictionary_encode(column)
        words = encoded.dictionary.to_pylist()
        for word in words:
            self._codes.setdefault(word, len(self._codes))
        if len(self._codes) > FEW or any(len(word) > LONG for word in words):
            self._values, self._valid = None, np.zeros(0, np.bool_)
            (self.folder / f"{self.number}.values.npy").unlink()
            return None
        codes = np.array([self._codes[word] for word in words] or [0], np.uint16)
        return codes[pc.fill_null(encoded.indices, 0).to_numpy(zero_copy_only=False)]

    def finish(self) -> ColumnFacts:
        """Write what is made of the values."""
        if self._values is None:
            return ColumnFacts(self.name, "text", "")
        values, valid = self._values, self._valid
        nullable = not valid.all()
        if nullable:
            save(self.folder / f"{self.number}.valid.npy", np.packbits(valid, bitorder="little"))
        infinite = (0, 0.0)
        if values.dtype.kind == "f":
            finite = np.isfinite(values)
            if len(odd := values[valid & np.isinf(values)]):
                infinite = len(odd), float(odd[0])
            valid &= finite
        facts = self._arrange(values, valid)
        if not facts["count"]:
            facts["kind"] = "text"  # there is nothing to count
        flush(values)
        return ColumnFacts(**{**facts, "nullable": nullable, "infinite": infinite})

    def _arrange(self, values: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> dict[str, Any]:
        """Write order and bins; the facts."""
        coded = values.dtype == np.uint16 and not pa.types.is_integer(self._kind)
        rank: npt.NDArray[Any] = values
        words = tuple(self._codes)
        if coded and words:  # in the order of the texts
            places = np.empty(len(words), np.uint16)
            places[np.argsort(np.array(words, object))] = np.arange(len(words), dtype=np.uint16)
            rank = places[values]
        there = np.flatnonzero(valid)
        order = np.empty(self.rows, np.uint32)
        order[: len(there)] = there[np.argsort(rank[there], kind="stable")]
        order[len(there) :] = np.flatnonzero(~valid)
        save(self.folder / f"{self.number}.order.npy", order)
        facts = {"name": self.name, "number": self.number, "count": len(there), "words": words}
        stored = "flag" if pa.types.is_boolean(self._kind) else "code" if coded else "number"
        if stored == "number" and not self.cluster:
            return {**facts, "stored": stored, "kind": "number", **self._bin_numbers(values, order[: len(there)])}
        again = self.cluster or len(there) >= 4 * len(words)  # texts that come again and again are no names of groups
        kind = "flag" if stored == "flag" else "category" if again else "text"
        return {**facts, "stored": stored, "kind": kind, **self._bin_values(values, order, len(there), words)}

    def _bin_numbers(self, values: npt.NDArray[Any], order: npt.NDArray[np.uint32]) -> dict[str, Any]:
        if not len(order):
            self._save_bins("bins", order, [])
            return {}
        ordered = values[order]
        low, high = ordered[0].item(), ordered[-1].item()
        edges = linear_edges(low, high, whole=values.dtype.kind in "iu")
        counts = self._count(ordered, order, edges, "bins")
        facts: dict[str, Any] = {"low": float(low), "high": float(high), "edges": edges, "counts": counts}
        if 0 < low < high:
            edges = np.geomspace(low, high, BINS + 1)
            edges[0], edges[-1] = low, high
            edges = np.unique(edges)
            facts |= {"log_edges": edges, "log_counts": self._count(ordered, order, edges, "log")}
        return {k: tuple(v.tolist()) if isinstance(v, np.ndarray) else v for k, v in facts.items()}

    def _count(
        self, ordered: npt.NDArray[Any], order: npt.NDArray[np.uint32], edges: npt.NDArray[np.float64], name: str
    ) -> npt.NDArray[np.int64]:
        """Write the bin of each row: it has values from its edge on, and the last one those at its end as well."""
        starts = np.searchsorted(ordered, edges[1:-1], "left")
        counts = np.diff(np.concatenate([[0], starts, [len(ordered)]]))
        self._save_bins(name, order, counts)
        return counts

    def _save_bins(self, name: str, order: npt.NDArray[np.uint32], counts: Any) -> None:
        bins = np.full(self.rows, NONE, np.uint8)
        bins[order] = np.repeat(np.arange(len(counts), dtype=np.uint8), counts)
        save(self.folder / f"{self.number}.{name}.npy", bins)

    def _bin_values(
        self, values: npt.NDArray[Any], order: npt.NDArray[np.uint32], count: int, words: tuple[str, ...]
    ) -> dict[str, Any]:
        """The same of values that have no order: a bin each of the commonest."""
        valid = order[:count]
        different, places, counts = np.unique(values[valid], return_inverse=True, return_counts=True)
        common = np.argsort(-counts, kind="stable")[:BINS]
        bin_of = np.full(len(different), OTHER, np.uint8)
        bin_of[common] = np.arange(len(common), dtype=np.uint8)
        bins = np.full(self.rows, NONE, np.uint8)
        bins[valid] = bin_of[places]
        save(self.folder / f"{self.number}.bins.npy", bins)
        if pa.types.is_boolean(self._kind):
            shown = ["true" if different[i] else "false" for i in common]
        else:
            shown = [words[different[i]] if words else str(different[i]) for i in common]
        some = counts[common]
        return {"values": tuple(shown), "counts": tuple(some.tolist()), "others": int(count - some.sum())}


def linear_edges(low: float, high: float, whole: bool) -> npt.NDArray[np.float64]:
    """Edges of bins of equal width from `low` to `high`; of whole numbers each bin holds as many of them."""
    if whole:
        step = max(1, -(-(int(high) - int(low) + 1) // BINS))
        count = -(-(int(high) - int(low) + 1) // step)
        return float(low) + float(step) * np.arange(count + 1, dtype=np.float64)
    if low == high:
        return np.array([low - 0.5, low + 0.5])
    edges: npt.NDArray[np.float64] = 2 * np.linspace(low / 2, high / 2, BINS + 1)  # halves: no overflow
    edges[0], edges[-1] = low, high
    return np.unique(edges)  # there may be fewer numbers between than bins


class IndexedColumn:
    """A column of the index, memory-mapped."""

    def __init__(self, folder: Path, facts: ColumnFacts, kind: pa.DataType, rows: int) -> None:
        self.facts, self.kind, self.rows, self._folder = facts, kind, rows, folder

    def _map(self, name: str) -> npt.NDArray[Any]:
        return open_array(self._folder / f"{self.facts.number}.{name}.npy")

    @cached_property
    def values(self) -> npt.NDArray[Any]:
        """As they are stored: anything where there is none."""
        return self._map("values")

    @cached_property
    def valid(self) -> Bytes | None:
        """A bitmap; None: all rows have a value (which may be NaN)."""
        return self._map("valid") if self.facts.nullable else None

    @cached_property
    def order(self) -> npt.NDArray[np.uint32]:
        return self._map("order")

    def bins(self, log: bool) -> Bytes:
        return self._log_bins if log else self._bins

    @cached_property
    def _bins(self) -> Bytes:
        return self._map("bins")

    @cached_property
    def _log_bins(self) -> Bytes:
        return self._map("log")

    @cached_property
    def arrow(self) -> pa.Array:
        """As DuckDB sees it; the memory is that of the file, but for flags."""
        valid = None if self.valid is None else pa.py_buffer(self.valid)
        if self.facts.stored == "flag":
            bits = np.packbits(self.values, bitorder="little")
            return pa.Array.from_buffers(pa.bool_(), self.rows, [valid, pa.py_buffer(bits)])
        kind = pa.uint16() if self.facts.stored == "code" else self.kind
        array = pa.Array.from_buffers(kind, self.rows, [valid, pa.py_buffer(np.ascontiguousarray(self.values))])
        if self.facts.stored == "code":
            return pa.DictionaryArray.from_arrays(array, pa.array(self.facts.words, pa.string()))
        return array

    def has_value(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which of some rows have a value that is finite."""
        found = np.ones(len(rows), np.bool_)
        if self.valid is not None:
            found = (self.valid[rows >> 3] >> (rows & 7).astype(np.uint8) & 1).astype(np.bool_)
        if self.facts.stored == "number" and self.values.dtype.kind == "f":
            found &= np.isfinite(self.values[rows])
        return found

    def value(self, row: int) -> float | int | str | bool | None:
        """The value of a row; None where it has none."""
        if not self.has_value(np.array([row]))[0]:
            return None
        value = self.values[row].item()
        if self.facts.stored == "code":
            return self.facts.words[value]
        return bool(value) if self.facts.stored == "flag" else value

    def below(self, value: float, rows: npt.NDArray[np.uint32] | None = None, count: int | None = None) -> int:
        """How many of some rows that lie in the order of values, by default of all that have one, have less."""
        order, length = self._ordered(rows, count)
        return bisect.bisect_left(range(length), value, key=lambda i: self.values[order[i]].item())

    def up_to(self, value: float, rows: npt.NDArray[np.uint32] | None = None, count: int | None = None) -> int:
        """How many of them have this much or less."""
        order, length = self._ordered(rows, count)
        return bisect.bisect_right(range(length), value, key=lambda i: self.values[order[i]].item())

    def _ordered(self, rows: npt.NDArray[np.uint32] | None, count: int | None) -> tuple[npt.NDArray[np.uint32], int]:
        if rows is None:
            return self.order, self.facts.count or 0
        return rows, len(rows) if count is None else count


# -------------------------------------------------------------------------------------------------------------- files


def new_array(path: Path, dtype: Any, rows: int) -> npt.NDArray[Any]:
    """An array to be filled that is a file."""
    if not rows:  # nothing can be mapped
        np.save(path, np.zeros(0, dtype))
        return np.zeros(0, dtype)
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(rows,))


def open_array(path: Path) -> npt.NDArray[Any]:
    """An array that is a file, memory-mapped, as a plain array."""
    if path.stat().st_size <= 128:  # a header and nothing to map
        return np.load(path)
    return np.asarray(np.load(path, mmap_mode="r"))


def save(path: Path, array: npt.NDArray[Any]) -> None:
    np.save(path, array)


def flush(array: npt.NDArray[Any]) -> None:
    if isinstance(array, np.memmap):
        array.flush()
