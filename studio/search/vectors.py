"""The vectors of a data folder by the rows of the studio, and which of them are nearest to a query, exactly."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.untrusted import open_vectors
from curate.layout import Data
from studio.search.scan import MappedIndex, Mask, Rows, Scores, exact_index

T = TypeVar("T")

LARGEST = 1 << 30
"""Bytes of all vectors up to which files stay mapped, and each search compares all of them: 0.2 s of CPU."""
AT_A_TIME = 2
"""Files that one search reads beside each other."""
_AHEAD = 256  # files that are brought together


@dataclass(eq=False)
class VectorFile:
    """The vectors of a shard, which are first to first + count - 1 of all."""

    data: Data = field(repr=False)
    shard: int
    first: int
    count: int
    dim: int
    _index: MappedIndex | None = None
    _offset: int = 0  # of the first row in the file

    @property
    def path(self) -> Path:
        return self.data.image_vectors(self.shard)

    def index(self, keep: bool) -> MappedIndex:
        """Its rows, mapped: once, or for this time."""
        index = self._index or exact_index(self.open())
        if keep:
            self._index = index
        return index

    def open(self) -> npt.NDArray[np.float16]:
        """The rows, (count, dim), mapped. UserError where they are not what the record says."""
        vectors = open_vectors(self.data.local(self.path))
        if vectors.shape != (self.count, self.dim) or vectors.dtype != np.float16 or not vectors.flags.c_contiguous:
            raise UserError(
                f"{self.data.shown(self.path)} holds {vectors.dtype} of shape {vectors.shape}, not float16 of shape "
                f"{(self.count, self.dim)}. `tastemaker verify {self.data} --repair` sees to it."
            )
        self._offset = int(getattr(vectors, "offset", 0))
        return vectors

    def read(self, rows: Rows) -> npt.NDArray[np.float16]:
        """Some rows, (k, dim). They are read, not mapped: of a mapped file pages around each would come along."""
        if not self._offset:
            self.open()
        out = np.empty((len(rows), self.dim), np.float16)
        with open(self.data.local(self.path), "rb", buffering=0) as file:
            for place, row in enumerate(rows.tolist()):
                at = self._offset + row * 2 * self.dim
                out[place] = np.frombuffer(os.pread(file.fileno(), 2 * self.dim, at), np.float16)
        return out


class VectorTable:
    """The vectors of a data folder's images, one for each row that has one.

    files: in the order of their shards; vector i is row i - first of its file.
    row_of: (m,) int32, the studio's row of each vector, -1 where it is none, as of hidden images.
    vector_of: (n,) int32, the vector of each row, -1 where it has none.
    """

    def __init__(self, data: Data, rows: npt.NDArray[np.uint64]) -> None:
        """rows: the keys of all rows, (n,), ascending. Reads the keys of all vectors, and no vector. UserError where
        the folder has none, or they can't be read."""
        try:
            self._read(data, rows)
        except (OSError, pa.ArrowException) as e:
            raise _unreadable(data, e) from e

    def _read(self, data: Data, rows: npt.NDArray[np.uint64]) -> None:
        shards = data.shards(data.embedded_record) if data.exists(data.space) else []
        data.look(map(data.embedded_record, shards))
        self.data, self.files = data, list[VectorFile]()
        keys, first, dim = [np.zeros(0, np.uint64)], 0, 0
        for at, shard in enumerate(shards):
            if at % _AHEAD == 0:
                data.bring(*map(data.metadata, shards[at : at + _AHEAD]))
            part = _keys(data.metadata(shard))
            if not len(part):
                continue
            dim = dim or int(open_vectors(data.local(data.image_vectors(shard))).shape[1])
            self.files.append(VectorFile(data, shard, first, len(part), dim))
            keys.append(part)
            first += len(part)
        if not self.files:
            raise UserError(f"{data} holds no vectors yet. `tastemaker embed {data}` makes them.")
        self.dim, self.count = dim, first
        self.row_of = _places(np.concatenate(keys), rows)
        self.vector_of = np.full(len(rows), -1, np.int32)
        shown = np.flatnonzero(self.row_of >= 0)
        self.vector_of[self.row_of[shown]] = shown
        self.shown = len(shown)
        self._is_whole = self.shown == self.count == len(rows) and bool((np.diff(self.row_of) > 0).all())
        self._starts = np.array([file.first for file in self.files])
        self._pool = ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="vectors")

    @property
    def is_small(self) -> bool:
        """Whether each search compares all vectors."""
        return 2 * self.count * self.dim <= LARGEST

    def vectors(self, rows: Rows) -> Scores:
        """The vectors of rows that have one, (k, dim) float32."""
        wanted = self.vector_of[rows].astype(np.int64)
        out = np.empty((len(rows), self.dim), np.float32)
        order = np.argsort(wanted, kind="stable")
        edges = np.searchsorted(wanted[order], [*self._starts, self.count])
        needed = [
            (f, order[low:high]) for f, low, high in zip(self.files, edges, edges[1:], strict=False) if low < high
        ]
        try:
            self.data.bring(*(file.path for file, _ in needed))
            for file, places in needed:
                out[places] = file.read(wanted[places] - file.first)
                self.release(file)
        except OSError as e:
            raise _unreadable(self.data, e) from e
        return out

    def among(self, rows: Mask | None) -> Mask | None:
        """Which vectors are of these rows, (m,), of all that are shown where `rows` is None; None: all are."""
        if self._is_whole:  # vector i is row i
            return rows
        if rows is None:
            return None if self.shown == self.count else self.row_of >= 0
        return (self.row_of >= 0) & rows[self.row_of]  # of -1 the last row is asked, in vain

    def shown_of(self, rows: Mask | None) -> int:
        """How many of these rows, of all where it is None, have a vector."""
        if rows is None:
            return self.shown
        return int(np.count_nonzero(rows if self._is_whole else rows & (self.vector_of >= 0)))

    def nearest(self, query: Scores, count: int, rows: Mask | None = None) -> tuple[Rows, Scores]:
        """The `count` rows, of all or of some, whose vectors have the largest product with a query (dim,), and these
        products, largest first; of equal ones the smaller row. Every vector is compared."""
        among = self.among(rows)

        def of_file(file: VectorFile) -> tuple[Rows, Scores]:
            part = None if among is None else among[file.first : file.first + file.count]
            found, scores = file.index(self.is_small).best(query, count, part)
            self.release(file)
            return found + file.first, scores

        self.bring()
        return self.merged(self.each(of_file, self.files), count)

    def release(self, file: VectorFile) -> None:
        """Let go of a file that lies elsewhere as well, where all of them would be many."""
        if not self.is_small:
            self.data.release(file.path)

    def bring(self) -> None:
        """Have all vectors here, where they are few: else each when it is its turn."""
        for at in range(0, len(self.files) if self.is_small else 0, _AHEAD):
            self.data.bring(*(file.path for file in self.files[at : at + _AHEAD]))

    def each(self, work: Callable[[Any], T], parts: Iterable[Any]) -> list[T]:
        """What a function makes of each part, a few at a time, in their order."""
        return list(self._pool.map(work, parts))

    def merged(self, found: list[tuple[Rows, Scores]], count: int) -> tuple[Rows, Scores]:
        """The best of what was found in several places, as rows of the studio."""
        vectors = np.concatenate([vectors for vectors, _ in found])
        scores = np.concatenate([scores for _, scores in found])
        return largest(self.row_of[vectors].astype(np.int64), scores, count)

    def ranked(self, query: Scores, rows: Rows, count: int) -> tuple[Rows, Scores]:
        """The best `count` of these rows, as `nearest` gives them."""
        return largest(rows, self.vectors(rows) @ query, count)


def largest(rows: Rows, scores: Scores, count: int) -> tuple[Rows, Scores]:
    """Rows by score, the largest first, of equal ones the smaller row; the first `count` of them."""
    if len(rows) > count > 0:  # those that may be among them, before they are sorted
        least = np.partition(scores, len(scores) - count)[len(scores) - count]
        some = scores >= least
        rows, scores = rows[some], scores[some]
    order = np.lexsort((rows, -scores))[:count]
    return rows[order], scores[order]


def _unreadable(data: Data, error: Exception) -> UserError:
    return UserError(f"{data}/embedded can't be read ({error}). If it is being made anew, try again in a while.")


def _keys(metadata: Path) -> npt.NDArray[np.uint64]:
    """The keys of a shard's vectors, as numbers."""
    with pq.ParquetFile(metadata) as file:
        name = "key" if "key" in file.schema_arrow.names else "image_path"  # as clip-retrieval has it
        keys = file.read([name], use_threads=False)[name]
    return pc.cast(keys, pa.uint64()).to_numpy()


def _places(keys: npt.NDArray[np.uint64], ordered: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
    """Where keys are among those of all rows, which ascend; -1 where they are not."""
    if not len(ordered):
        return np.full(len(keys), -1, np.int32)
    at = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1).astype(np.int32)
    at[ordered[at] != keys] = -1
    return at
