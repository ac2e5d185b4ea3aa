"""Pairs of images whose vectors are near: each image is compared with the members of the cells nearest to it.

Cells are fitted once, on a sample, and kept, and so are the pairs that were found: where shards are added, their images
are compared with all, and those that were there are not compared with each other again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from aesthetic.errors import UserError
from aesthetic.files import atomic
from aesthetic.neighbours import NEAREST, cell_pairs, fit_cells, nearest_cells
from aesthetic.untrusted import open_vectors
from curate.duplicates.rows import VERSION, Array, Table, hashes_agree, keep_array
from curate.encoders.embed import take_vectors, vector_rows
from curate.layout import shard_name
from curate.store.files import digest, read_json

ONE_CELL = 20_000
"""Up to so many images all are compared with all."""

REFIT = 2.8
"""How many times as many cells images must want before they are fitted anew, and all are compared again: that is eight
times as many images."""

PAIR = np.dtype([("a", "<i8"), ("b", "<i8"), ("distance", "<f4")])
"""Two images by number, a < b; distance: their cosine, or the bits in which they differ."""

_SAMPLE_BYTES = 1 << 30  # of vectors, as float32, that cells are fitted on
_SAMPLE_ROWS = 256  # per cell, at most
_TASK_BYTES = 128 << 20  # of vectors that a task reads, about
_QUERIES = 1 << 14  # of one cell in a task, where it has many


# --------------------------------------------------------------------------------------------------------------- cells


def cell_count(images: int) -> int:
    """How many cells: sqrt(n). More make it dearer to fit them, and part more neighbours; fewer, to compare in them."""
    return 1 if images <= ONE_CELL else round(math.sqrt(images))


def find_cells(table: Table, say: Callable[[str], None]) -> str:
    """Fit the cells, unless those that are there will do; returns their digest."""
    data, record, path = table.data, table.index / "cells.json", table.index / "cells.npy"
    images, config = int(table.offsets[-1]), digest([VERSION, read_json(data.local(data.space))])
    known = data.record(record)
    if not data.is_done(record, config=config, inputs={}) or cell_count(images) > REFIT * known["cells"]:
        if known:
            say(f"{images:,} images: cells are fitted anew, and all vectors are compared again")
        centroids = _fitted(table, images)
        data.invalidate(record)
        with atomic(path) as f:
            np.save(f, centroids)
        facts = {"cells": cell_count(images), "images": images}
        known = data.commit(record, config=config, inputs={}, outputs=[path], facts=facts)
    return digest([config, known["outputs"]])


def _fitted(table: Table, images: int) -> Array:
    vectors = [
        open_vectors(table.data.local(table.data.image_vectors(s)))
        for s, n in zip(table.shards, table.counts, strict=True)
        if n
    ]
    dim = vectors[0].shape[1] if vectors else 1
    cells = cell_count(images)
    if cells == 1:
        return np.eye(1, dim, dtype=np.float32)  # which does not matter
    rows = min(images, _SAMPLE_ROWS * cells, _SAMPLE_BYTES // (4 * dim))
    chosen = np.sort(np.random.default_rng(0).choice(images, rows, replace=False))
    sample = gather(table, chosen)
    return fit_cells(sample[sample.any(axis=1)], cells, seed=0)  # without those that have no vector


def gather(table: Table, images: Array) -> Array:
    """The vectors of images by number, in ascending order: (n, d), float16 where they are stored so."""
    at, rows = table.place(images)
    edges = np.searchsorted(at, np.arange(len(table.shards) + 1))
    parts = []
    for shard, low, high in zip(table.shards, edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if low < high:
            parts.append(take_vectors(table.data, shard, rows[low:high]))
    return np.concatenate(parts) if parts else np.zeros((0, 1), np.float16)


def check_vectors(table: Table) -> int:
    """The dimension of the vectors. UserError where a shard has none."""
    dim = 1
    for shard, count in zip(table.shards, table.counts, strict=True):
        path = table.data.image_vectors(shard)
        if not table.data.exists(path) or not table.data.exists(table.data.embedded_record(shard)):
            raise UserError(
                f"near-duplicates with `cosine` compares vectors, and shard {shard_name(shard)} has none: "
                f"`tastemaker embed {table.data}` makes them"
            )
        if count:
            vectors = open_vectors(table.data.local(path))
            if len(vectors) != count and vector_rows(table.data, shard) is None:
                raise UserError(
                    f"{path} has {len(vectors):,} rows, not one for each of {count:,} images: embed it anew"
                )
            dim = vectors.shape[1]
    return dim


# ------------------------------------------------------------------------------------- the cells of each shard's images


@dataclass(frozen=True)
class ShardCells:
    """Which images of a shard lie in which cell: those that have it for their nearest, and those that have it among
    the further ones. Rows of cell c are rows[starts[c]:starts[c + 1]]."""

    home_starts: Array
    home_rows: Array
    other_starts: Array
    other_rows: Array


def _cells_path(table: Table, shard: int) -> Path:
    return table.index / "cells" / f"{shard_name(shard)}.npy"


def make_cells(item: tuple[Table, int, str]) -> None:
    """A task: the nearest cells of the images of one shard (its position, and the digest of the cells)."""
    table, at, cells = item
    shard = table.shards[at]

    def make() -> Array:
        centroids = table.load(table.index / "cells.npy")
        k, n = len(centroids), table.counts[at]
        if k == 1 or n == 0:
            found = np.zeros((n, 1), np.int32)
        else:
            found = nearest_cells(take_vectors(table.data, shard), centroids, min(NEAREST, k))
        parts = [np.array([n], np.int32)]
        for columns in (found[:, :1], found[:, 1:]):
            cell = columns.ravel()
            order = np.argsort(cell, kind="stable")
            starts = np.searchsorted(cell[order], np.arange(k + 1))
            parts += [starts.astype(np.int32), (order // max(1, columns.shape[1])).astype(np.int32)]
        return np.concatenate(parts)

    keep_array(table.data, _cells_path(table, shard), make, config=cells, of=table.inputs[at])


def read_cells(table: Table, shard: int, k: int) -> ShardCells:
    """The file that `make_cells` wrote, mapped."""
    array = table.load(_cells_path(table, shard), mapped=True)
    n, k = int(array[0]), k + 1
    return ShardCells(
        array[1 : 1 + k], array[1 + k : 1 + k + n], array[1 + k + n : 1 + 2 * k + n], array[1 + 2 * k + n :]
    )


# --------------------------------------------------------------------------------------------------------------- pairs


@dataclass(frozen=True)
class CellRange:
    """A task: cells first to last (not included), and where it is one with many images, a part of those."""

    table: Table
    work: str
    config: str
    first: int
    last: int
    part: int = 0
    parts: int = 1

    @property
    def path(self) -> Path:
        return self.table.index / self.work / f"pairs-{self.first:07d}-{self.part:04d}.npy"


def cell_ranges(table: Table, work: str, config: str) -> tuple[list[CellRange], float]:
    """The tasks, and how many cosines they are, where all images are new."""
    centroids = table.load(table.index / "cells.npy", mapped=True)
    k, dim = centroids.shape
    home, other = np.zeros(k, np.int64), np.zeros(k, np.int64)
    for shard in table.shards:
        cells = read_cells(table, shard, k)
        home += np.diff(cells.home_starts)
        other += np.diff(cells.other_starts)
    ranges, first, rows, most = [], 0, 0, _TASK_BYTES // (2 * dim)
    for cell, count in enumerate((home + other).tolist()):
        parts = math.ceil(count / _QUERIES) if count > most or k == 1 else 1
        if cell > first and (rows + count > most or parts > 1):
            ranges.append(CellRange(table, work, config, first, cell))
            first, rows = cell, 0
        if parts > 1:
            ranges += [CellRange(table, work, config, cell, cell + 1, p, parts) for p in range(parts)]
            first, rows = cell + 1, 0
        else:
            rows += count
    if first < k:
        ranges.append(CellRange(table, work, config, first, k))
    return ranges, float((home * (home + other)).sum())


def compare_cells(task: CellRange) -> int:
    """A task: write the pairs that it finds; returns how many."""
    keep_array(task.table.data, task.path, lambda: _pairs(task), config=task.config)
    return len(task.table.load(task.path, mapped=True))


def _pairs(task: CellRange) -> Array:
    table = task.table
    state = table.load(table.index / task.work / "state.npy", mapped=True)  # USE, NEW
    image, cell, is_home = _range_images(task, state)
    numbers, where = np.unique(image, return_inverse=True)
    vectors = gather(table, numbers)
    new = (state[numbers] & NEW) != 0
    order = np.argsort(cell, kind="stable")
    edges = np.searchsorted(cell[order], np.arange(task.first, task.last + 1))
    found = [np.zeros(0, PAIR)]
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        inside = order[low:high]
        members, queries = where[inside[is_home[inside]]], where[inside]
        if task.parts > 1:
            queries = np.array_split(queries, task.parts)[task.part]
        for q, m in ((queries[new[queries]], members), (queries[~new[queries]], members[new[members]])):
            for part in _split(q):
                near = _of_cell(vectors, numbers, part, m, table.modes.cosine)
                found.append(near[hashes_agree(table, near["a"], near["b"])])
    return unique_pairs(np.concatenate(found))


def _split(rows: Array) -> Iterator[Array]:
    for start in range(0, len(rows), _QUERIES):
        yield rows[start : start + _QUERIES]


def _of_cell(vectors: Array, numbers: Array, queries: Array, members: Array, cosine: float | None) -> Array:
    assert cosine is not None
    if not (len(queries) and len(members)):
        return np.zeros(0, PAIR)
    pairs, cosines = cell_pairs(vectors[queries], numbers[queries], vectors[members], numbers[members], cosine)
    return as_pairs(pairs[:, 0], pairs[:, 1], cosines)


def _range_images(task: CellRange, state: Array) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
    """The images that have a cell of the range among their nearest: (number, cell, whether it is the nearest)."""
    table, parts = task.table, []
    k = len(table.load(table.index / "cells.npy", mapped=True))
    for shard, offset in zip(table.shards, table.offsets.tolist(), strict=False):
        cells = read_cells(table, shard, k)
        for home, starts, rows in (
            (True, cells.home_starts, cells.home_rows),
            (False, cells.other_starts, cells.other_rows),
        ):
            edges = starts[task.first : task.last + 1]
            image = offset + rows[edges[0] : edges[-1]].astype(np.int64)
            cell = np.repeat(np.arange(task.first, task.last), np.diff(edges))
            use = (state[image] & USE) != 0
            parts.append((image[use], cell[use], np.full(int(use.sum()), home)))
    image, cell, is_home = (np.concatenate(p) for p in zip(*parts, strict=True))
    return image, cell, is_home


USE, NEW = 1, 2
"""What the array `state` says of each image: that it is compared; that it was not compared with the others before."""


def as_pairs(a: Array, b: Array, distance: Array | float) -> Array:
    """Two arrays of images, and distances, as an array of PAIR."""
    found = np.empty(len(a), PAIR)
    found["a"], found["b"], found["distance"] = np.minimum(a, b), np.maximum(a, b), distance
    return found


def unique_pairs(pairs: Array, *, smallest: bool = False) -> Array:
    """Each pair once, sorted, with the largest of its distances, or the smallest."""
    distance = pairs["distance"] if smallest else -pairs["distance"]
    pairs = pairs[np.lexsort((distance, pairs["b"], pairs["a"]))]
    first = np.ones(len(pairs), np.bool_)
    first[1:] = (pairs["a"][1:] != pairs["a"][:-1]) | (pairs["b"][1:] != pairs["b"][:-1])
    return pairs[first]


def pair_cosines(item: tuple[Table, Array]) -> npt.NDArray[np.float32]:
    """A task: the cosines of pairs (n, 2) of images."""
    table, pairs = item
    numbers, where = np.unique(pairs, return_inverse=True)
    vectors = gather(table, numbers)
    where, found = where.reshape(-1, 2), np.zeros(len(pairs), np.float32)
    for start in range(0, len(pairs), 1 << 12):
        a, b = (vectors[where[start : start + (1 << 12), side]].astype(np.float32) for side in (0, 1))
        found[start : start + len(a)] = np.einsum("ij,ij->i", a, b)
    return found
