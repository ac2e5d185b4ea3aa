"""A code of one bit a number for each vector, so that ten million can be compared with a query in a tenth of a second.

Codes are RaBitQ's (Gao and Long 2024, arXiv 2405.12497) of the vectors, rotated at random and taken from their mean:
of 512 numbers 72 bytes, in place of 1,024. All codes are compared, no cells are looked through: so a selection costs
nothing but what it keeps, words are found as well as images, and shards that are added add their codes. What looks
nearest by its code is compared exactly.

STUDIO/search/center.npy              what vectors are taken from: the mean of a sample of them
              codes-NNNNN-DIGEST.npy  the codes of some shards that follow each other
              recall-DIGEST.json      what was measured of all of them
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aesthetic.errors import DiskFull
from aesthetic.files import atomic, write_atomic
from aesthetic.neighbours import one_thread
from aesthetic.untrusted import open_vectors
from curate.store.files import digest, sweep
from curate.store.records import output_digests
from studio.search.scan import MappedIndex, Mask, Rows, Scores
from studio.search.vectors import VectorFile, VectorTable, largest

VERSION = 1  # of the files

DEPTH = 10_000
"""Images that look nearest by their codes, which are compared exactly."""

_BLOCK = 500_000  # vectors whose codes are one file, about
_SAMPLED = 100, 100  # files that the mean is of, and vectors of each
_SEED = 0x7461737465  # of the rotation and the samples
_BITS = 8  # to which a query's numbers are rounded
_QUERIES = 50  # images, and as many captions, by which the recall is measured
_TRUE = 100  # nearest images of each of them


class BuildStopped(Exception):
    """The index is not wanted any more."""


@dataclass(frozen=True)
class CodeBlock:
    """The codes of vectors first to first + count - 1 of all."""

    first: int
    count: int
    codes: MappedIndex


class CodeIndex:
    """The codes of all vectors of a table, and the share of the nearest images that is found by them.

    recall: of images and of words, None where there are no captions' vectors to measure it with.
    """

    def __init__(self, table: VectorTable, blocks: list[CodeBlock], center: Scores) -> None:
        self._table, self._blocks = table, blocks
        self._rotation, self._center = _rotation(table.dim), center
        self.recall: dict[str, float | None] = {}

    def nearest(self, query: Scores, count: int, rows: Mask | None = None) -> tuple[Rows, Scores, bool]:
        """The `count` rows, of all or of some, nearest to a query (dim,), with the products, largest first; and
        whether each was compared exactly. Of more than DEPTH rows there are DEPTH at most."""
        table = self._table
        if table.shown_of(rows) <= DEPTH:
            some = np.flatnonzero(table.vector_of >= 0 if rows is None else rows & (table.vector_of >= 0))
            return *table.ranked(query, some, count), True
        found = self.candidates(query, table.among(rows))
        return *table.ranked(query, table.row_of[found].astype(np.int64), count), False

    def candidates(self, query: Scores, among: Mask | None) -> Rows:
        """The DEPTH vectors that look nearest, of all or of some, in no order."""
        rotated = self._rotation.apply(query[None])[0]

        def of_block(block: CodeBlock) -> tuple[Rows, Scores]:
            import faiss

            parameters = faiss.RaBitQSearchParameters()
            parameters.qb = _BITS
            part = None if among is None else among[block.first : block.first + block.count]
            found, scores = block.codes.best(rotated, DEPTH, part, parameters)
            return found + block.first, scores

        found = self._table.each(of_block, self._blocks)
        rows, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return largest(rows, scores, DEPTH)[0]

    def measure(self, check: Callable[[], None]) -> dict[str, float | None]:
        """The recall, by some vectors of the data compared with all. check: raises to end it."""
        table, rng = self._table, np.random.default_rng(_SEED)
        shown = np.flatnonzero(table.row_of >= 0)
        some = rng.choice(shown, min(_QUERIES, len(shown)), replace=False)
        images = table.vectors(table.row_of[some].astype(np.int64))
        captions = _captions(table, rng)
        return {"images": self._recall(images, check), "words": self._recall(captions, check)}

    def _recall(self, queries: Scores, check: Callable[[], None]) -> float | None:
        if not len(queries):
            return None
        table, among = self._table, self._table.among(None)
        scores = np.full((len(queries), 0), 0, np.float32)
        rows = np.zeros(scores.shape, np.int64)
        for file in table.files:
            check()
            part = None if among is None else among[file.first : file.first + file.count]
            with one_thread():
                new, products = file.index(self._table.is_small).best_of_each(queries, _TRUE, part)
            rows, scores = np.hstack([rows, new + file.first]), np.hstack([scores, products])
            best = np.argsort(-scores, axis=1, kind="stable")[:, :_TRUE]
            rows, scores = np.take_along_axis(rows, best, 1), np.take_along_axis(scores, best, 1)
            table.release(file)
        found = (np.isin(true, self.candidates(query, among)).mean() for query, true in zip(queries, rows, strict=True))
        return float(np.mean(list(found)))


class CodeBuilder:
    """Makes the codes of a table in a folder, in a thread; what is there already is kept, and what is old goes.

    done, of: vectors whose codes are there, and all.    ready: called with the index.
    """

    def __init__(
        self,
        table: VectorTable,
        folder: Path,
        ready: Callable[[CodeIndex], None],
        on_fault: Callable[[Exception], None],
    ) -> None:
        self._table, self._folder, self._ready, self._on_fault = table, folder, ready, on_fault
        self.done, self.of, self.error = 0, table.count, ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="search-index", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the shard that it is at."""
        self._stopped.set()

    def wait(self, seconds: float = 5.0) -> None:
        """Wait until it has ended."""
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._ready(self.build())
        except BuildStopped:
            pass
        except (OSError, DiskFull) as e:  # a full disk, a folder that may not be written: every vector is compared then
            self.error = f"the index of the search could not be made: {e}"
        except Exception as e:
            self.error = "the index of the search could not be made; the log says why"
            self._on_fault(e)

    def build(self) -> CodeIndex:
        """The index of the table. Raises BuildStopped after `stop`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        sweep(self._folder)
        center, size = self._basis()
        blocks, names = [], []
        for number, files in _blocks(self._table.files, size):
            named = digest([VERSION, center.tobytes().hex(), *(_sha256(file) for file in files)])
            path = self._folder / f"codes-{number:05d}-{named}.npy"
            count = sum(file.count for file in files)
            if not path.exists():
                self._make(path, files, center)
            codes = np.load(path, mmap_mode="r")
            blocks.append(CodeBlock(files[0].first, count, MappedIndex(codes, _empty(center))))
            names.append(path.name)
            self.done = files[0].first + count
        index = CodeIndex(self._table, blocks, center)
        recall = self._folder / f"recall-{digest([DEPTH, *names])}.json"
        if not recall.exists():
            write_atomic(recall, json.dumps(index.measure(self._check)).encode())
        index.recall = json.loads(recall.read_text())
        for old in self._folder.iterdir():
            if old.name not in (*names, recall.name, "center.npy") and old.suffix in (".npy", ".json"):
                old.unlink(missing_ok=True)
        return index

    def _check(self) -> None:
        if self._stopped.is_set():
            raise BuildStopped

    def _basis(self) -> tuple[Scores, int]:
        """What vectors are taken from, and shards of a block: as they were first, until there are eight times as
        many vectors as then."""
        path = self._folder / "center.npy"
        if path.exists():
            kept = np.load(path)  # center, vectors, shards of a block
            if len(kept) == self._table.dim + 2 and self._table.count <= 8 * kept[-2]:
                return kept[:-2].astype(np.float32), int(kept[-1])
        files, rows = _SAMPLED
        chosen = self._table.files[:: max(1, len(self._table.files) // files)]
        rng = np.random.default_rng(_SEED)
        total, count = np.zeros(self._table.dim), 0
        for file in chosen:
            self._check()
            some = np.sort(rng.choice(file.count, min(rows, file.count), replace=False))
            total, count = total + file.open()[some].astype(np.float64).sum(0), count + len(some)
        center = (total / count).astype(np.float32)
        size = max(1, _BLOCK // max(file.count for file in self._table.files))
        with atomic(path) as f:
            np.save(f, np.append(center.astype(np.float64), [self._table.count, size]))
        return center, size

    def _make(self, path: Path, files: list[VectorFile], center: Scores) -> None:
        """Write the codes of some files."""
        rotation, coder = _rotation(self._table.dim), _empty(center)
        with atomic(path) as f:
            shape = (sum(file.count for file in files), coder.code_size)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(f, header)
            for file in files:
                self._check()
                with one_thread():
                    f.write(coder.sa_encode(rotation.apply(file.open().astype(np.float32))).tobytes())
                self._table.release(file)
                self.done += file.count


def _blocks(files: list[VectorFile], size: int) -> Iterator[tuple[int, list[VectorFile]]]:
    """Files that make one block, by number: shards size * number to size * (number + 1) - 1."""
    numbers = [file.shard // size for file in files]
    for number in dict.fromkeys(numbers):
        yield number, [file for file, its in zip(files, numbers, strict=True) if its == number]


def _sha256(file: VectorFile) -> str:
    """Of what is in a file of vectors, by its record."""
    outputs = output_digests(file.data.record(file.data.embedded_record(file.shard)))
    return outputs[str(file.path.relative_to(file.data.root))]


def _rotation(dim: int) -> Any:
    """A rotation of the space, the same each time: signs say little of numbers of which few are large."""
    import faiss

    rotation = faiss.RandomRotationMatrix(dim, dim)
    with one_thread():
        rotation.init(_SEED % 2**31)
    return rotation


def _empty(center: Scores) -> Any:
    """What makes codes, and compares them, of vectors taken from a center, rotated here."""
    import faiss

    coder = faiss.IndexRaBitQ(len(center), faiss.METRIC_INNER_PRODUCT)
    coder.train(_rotation(len(center)).apply(center[None]))
    return coder


def _captions(table: VectorTable, rng: np.random.Generator) -> Scores:
    """Vectors of some captions, (k, dim), none where the data has none."""
    chosen = rng.choice(len(table.files), min(_QUERIES, len(table.files)), replace=False)
    found = [np.zeros((0, table.dim), np.float32)]
    for file in (table.files[i] for i in sorted(chosen)):
        path = file.data.text_vectors(file.shard)
        if file.data.exists(path):
            vectors = open_vectors(file.data.local(path))
            some = np.sort(rng.choice(len(vectors), min(_QUERIES // len(chosen) + 1, len(vectors)), replace=False))
            taken = vectors[some].astype(np.float32)
            found.append(taken[taken.any(axis=1)])
            file.data.release(path)
    return np.concatenate(found)[:_QUERIES]
