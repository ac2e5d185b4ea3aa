"""What is searched for becomes a ranking, which the grid shows as it shows any order."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from fastapi import HTTPException

from aesthetic.errors import UserError
from curate.layout import EMBEDDED, Data
from studio.errors import NotHere
from studio.queue import BoundedExecutor
from studio.search.codes import CodeBuilder, CodeIndex
from studio.search.groups import CopyGroups
from studio.search.request import ParsedSearch
from studio.search.scan import Mask, Rows, Scores
from studio.search.vectors import VectorTable
from studio.search.words import DataEncoder, EncoderAbility

if TYPE_CHECKING:
    from studio.explore.explorer import Explorer
    from studio.explore.snapshot import Snapshot

NEAREST = 10
"""Images that are shown as nearest to one."""
_KEPT = 200  # vectors of words that were searched for lately
_TOO_SHORT = 1e-3  # of what is left of words without others: rounding


@dataclass(frozen=True)
class SearchResult:
    """A ranking that was made. of: the images that have a vector.    exact: whether each of them was compared.

    recall: else the share of the 100 nearest that is found, as measured on this data; None where it was not.
    """

    id: str
    what: str
    seconds: float
    exact: bool
    recall: float | None
    of: int


@dataclass(frozen=True)
class SearchIndexState:
    """Where every vector is compared (state none) no index is needed. done, of: vectors that are in it, and all."""

    state: Literal["none", "building", "ready"]
    done: int = 0
    of: int = 0
    error: str = ""


@dataclass(eq=False)
class _Version:
    """The rows and vectors of one version of the data; their index once it is made, and what makes it."""

    number: int
    rows: Snapshot
    made_of: tuple[str, str | None]  # the digests of its rows, and of `embedded/`
    table: VectorTable
    index: CodeIndex | None = None
    builder: CodeBuilder | None = None


class SearchService:
    """Search over a data folder's vectors, for all who look at it.

    Vectors are looked up anew where the data has changed; of those on an object store none is read before somebody
    searches. Where they are too many an index is made in the background, in `folder` (None: for this time alone); until
    it is ready every vector is compared.
    """

    def __init__(
        self,
        data: Data,
        explorer: Explorer,
        encoder: DataEncoder,
        folder: Path | None,
        on_fault: Callable[[Exception], None],
    ) -> None:
        self._data, self._explorer, self._folder, self._on_fault = data, explorer, folder, on_fault
        self.encoder, self.groups = encoder, CopyGroups(explorer)
        self.reading = BoundedExecutor("search-reading", 2)
        self.searching = BoundedExecutor("searching", 2)
        self._lock, self._making, self._closed = threading.Lock(), threading.Lock(), False
        self._version: _Version | None = None
        self._ability: EncoderAbility | None = None
        self._looked, self.looked_up = -1, threading.Event()  # for which version, and whether it was once
        self._texts = OrderedDict[str, Scores]()
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self.ability()

    def stop(self) -> None:
        """Begin nothing more."""
        self._closed = True
        self.reading.close()
        self.searching.close()
        if self._version is not None and self._version.builder is not None:
            self._version.builder.stop()

    def close(self) -> None:
        """Stop, and wait for what runs to end."""
        self.stop()
        self._looking.join(1)
        if self._version is not None and self._version.builder is not None:
            self._version.builder.wait()
        if self._temporary is not None:
            self._temporary.cleanup()

    # ------------------------------------------------------------------------------------------ what there is to say

    def ability(self) -> EncoderAbility:
        """What can be searched for. Whether the encoder is here is looked up beside; until that is known it is said to
        be, where there are vectors."""
        with self._lock:
            if self._looked != self._explorer.version:
                self._looked = self._explorer.version
                there = self._data.exists(self._data.space)
                self._ability = self._ability or EncoderAbility(
                    there, "" if there else "there are no vectors yet", there
                )
                self._looking = threading.Thread(target=self._look, name="encoder", daemon=True)
                self._looking.start()
            assert self._ability is not None
            return self._ability

    def _look(self) -> None:
        try:
            self._ability = self.encoder.ability()
            if self._data.url is None and self._explorer.version:  # so that the first search need not wait
                with contextlib.suppress(UserError, NotHere):
                    self._current()
        except UserError as e:
            self._ability = EncoderAbility(False, str(e), False)
        except Exception as e:
            self._ability = EncoderAbility(False, "the encoder could not be looked for; the log says why", False)
            self._on_fault(e)
        self.looked_up.set()

    @property
    def index_state(self) -> SearchIndexState:
        """How far the index is."""
        version = self._version
        builder = None if version is None else version.builder
        if version is None or builder is None:
            return SearchIndexState("none")
        state: Literal["none", "building", "ready"] = "ready" if version.index else "building"
        return SearchIndexState("none" if builder.error else state, builder.done, builder.of, builder.error)

    # ------------------------------------------------------------------------------------------------------- search

    def search(self, asked: ParsedSearch) -> SearchResult:
        """The ranking of what is asked for. HTTPException 404 where there is no such image; UserError where it can't
        be done."""
        began = time.perf_counter()
        version = self._current()
        query = self._query(version, asked)

        def again(rows: Mask) -> tuple[Rows, Scores]:  # of the rows as they are: whatever has become of their vectors
            return _best(self._current(), query, asked.limit, rows)[:2]

        rows, scores, exact = _best(version, query, asked.limit)
        id = self._explorer.add_ranking(rows, scores, asked.what, again, version.rows.rows.digest)
        recall = None
        if not exact and version.index is not None:
            kind = "images" if asked.key or asked.image is not None else "words"
            recall = version.index.recall.get(kind)
        return SearchResult(id, asked.what, time.perf_counter() - began, exact, recall, version.table.shown)

    def _query(self, version: _Version, asked: ParsedSearch) -> Scores:
        """What is searched for as one vector of unit length: the mean of what it should be like, less what not."""
        like = [self._text(asked.words)] if asked.words else []
        like += [self._of_image(version, asked.key)] if asked.key else []
        like += [self._of_file(version, asked.image)] if asked.image is not None else []
        query = np.mean(like, axis=0) if like else np.zeros(version.table.dim, np.float32)
        if asked.without:
            query = query - self._text(asked.without)
        length = np.linalg.norm(query)
        if not length > _TOO_SHORT:
            raise UserError("nothing is left of what is searched for without that: say something else")
        return np.ascontiguousarray(query / length, np.float32)

    def _text(self, words: str) -> Scores:
        with self._lock:
            if (known := self._texts.get(words)) is not None:
                self._texts.move_to_end(words)
                return known
        vector = self.encoder.text(words)
        with self._lock:
            self._texts[words] = vector
            while len(self._texts) > _KEPT:
                self._texts.popitem(last=False)
        return vector

    def _of_image(self, version: _Version, key: str) -> Scores:
        """HTTPException 404 where there is no such image, or it must not be seen; UserError where it has no vector."""
        try:
            row = version.rows.row(key)
        except KeyError:
            raise HTTPException(404, f"there is no image {key}") from None
        if version.table.vector_of[row] < 0:
            raise UserError(f"the image {key} has no vector yet. `tastemaker embed {self._data}` makes it.")
        return version.table.vectors(np.array([row]))[0]

    def _of_file(self, version: _Version, file: bytes) -> Scores:
        """The vector of an image file; where there are two ways to look at it, that which is nearer to any image."""
        vectors = self.encoder.image(file)
        if len(vectors) == 1:
            return vectors[0]
        return vectors[int(np.argmax([_best(version, vector, 1)[1].max(initial=-1) for vector in vectors]))]

    def nearest(self, key: str) -> list[tuple[str, float]]:
        """The images nearest to one of the data, and their cosines, nearest first; none where there are no vectors, or
        it has none. HTTPException 404 where there is no such image."""
        try:
            version = self._current()
            query = self._of_image(version, key)
        except UserError:
            return []
        rows, cosines, _ = _best(version, query, NEAREST + 1)
        found = [(version.rows.key(r), c) for r, c in zip(rows.tolist(), cosines.tolist(), strict=True)]
        return [(other, cosine) for other, cosine in found if other != key][:NEAREST]

    def _current(self) -> _Version:
        """The vectors as they are now. UserError where there are none."""
        with self._making:
            number, before = self._explorer.version, self._version
            if before is not None and before.number == number:
                return before
            rows = self._explorer.snapshot
            made_of = rows.rows.digest, next((t.digest() for t in rows.found if t.name == EMBEDDED), None)
            if before is not None and before.made_of == made_of and made_of[1] is not None:
                before.number, before.rows = number, rows  # columns are others, and vectors the same
                return before
            version = _Version(number, rows, made_of, VectorTable(self._data, rows.rows.keys))
            if before is not None and before.builder is not None:
                before.builder.stop()
                before.builder.wait()
            self._version = version
            if not version.table.is_small and not self._closed:

                def ready(index: CodeIndex) -> None:
                    version.index = index

                if self._folder is None:
                    self._temporary = tempfile.TemporaryDirectory(prefix="tastemaker-studio-")
                    self._folder = Path(self._temporary.name)
                version.builder = CodeBuilder(version.table, self._folder, ready, self._on_fault)
                version.builder.start()
                version.builder.wait(1.0)  # where it was made before it is there at once
            return version


def _best(version: _Version, query: Scores, count: int, rows: Mask | None = None) -> tuple[Rows, Scores, bool]:
    """The rows nearest to a query, of all or of some; their cosines; and whether every vector was compared."""
    if version.index is not None:
        found, scores, exact = version.index.nearest(query, count, rows)
    else:
        found, scores = version.table.nearest(query, count, rows)
        exact = True
    return found, np.clip(scores, -1, 1), exact
