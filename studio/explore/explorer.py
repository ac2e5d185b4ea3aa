"""A data folder to explore: its index, made in the background, and selections, listings and rankings over it."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aesthetic.errors import UserError
from curate.layout import Data
from curate.ledger.select import SelectConfig
from curate.ledger.view import LedgerTable, tables
from curate.store.files import digest
from studio.errors import NotHere
from studio.explore import listing as listings
from studio.explore.index import IndexStopped, make_index, part_digests, part_folders, steps
from studio.explore.listing import Ranking, RowOrder, Show
from studio.explore.live import LiveSelection, RuleAnswer, RuleBook, selection_id
from studio.explore.memory import return_large_blocks
from studio.explore.remembered import Remembered
from studio.explore.snapshot import Snapshot
from studio.queue import BoundedExecutor

_LOOK, _LOOK_STORE = 2.0, 60.0
"""Seconds between two looks whether the data changed: on a disk, on an object store."""

_AGAIN = 30.0
"""Seconds after which an index that could not be made is tried again, though the data is the same."""

_SELECTIONS, _LISTINGS, _RANKINGS = 120 << 20, 160 << 20, 80 << 20
"""Bytes of each that are remembered."""


@dataclass(frozen=True)
class IndexState:
    """How far the index is."""

    state: Literal["ready", "building", "none"]
    done: int = 0
    of: int = 0
    seconds: float = 0.0
    error: str = ""  # why there is none


class UnknownSelection(KeyError):
    """There is no selection of this id, or no longer."""


class Explorer:
    """Rows are numbers from 0, in the order of keys, of the images that are not hidden. Raises NotHere until the index
    is made, which begins at once.

    Args:
        recipe: whose early rules are applied early, and whose cuts say what is unsafe to look at.
        keep: the index is kept in the data folder, where that can be written to; else it is made for this run alone.
        log: called with a line about what was done.
        on_fault: called with exceptions that are nobody's fault but ours.
    """

    def __init__(
        self,
        data: Data,
        recipe: SelectConfig | None = None,
        *,
        keep: bool = True,
        log: Callable[[str], None] = lambda line: None,
        on_fault: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        return_large_blocks()
        self.data, self.recipe, self._log, self._on_fault = data, recipe or SelectConfig(), log, on_fault
        self._keep = keep
        self.version = 0
        self._book: RuleBook | None = None
        self._state = IndexState("building")
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._looked, self._ended, self._seen = 0.0, 0.0, ""
        self._selections = Remembered[str, LiveSelection](_SELECTIONS, lambda s: s.bytes)
        self._asked = Remembered[str, tuple[dict[str, str], dict[str, str]]](2000, lambda rules: 1)
        self._listings = Remembered[Any, RowOrder](_LISTINGS, lambda found: found.bytes)
        self._rankings = Remembered[str, Ranking](_RANKINGS, lambda r: r.rows.nbytes + r.scores.nbytes)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self.work = BoundedExecutor("explore", 2)
        self._builder = self._start()

    def stop(self) -> None:
        """Begin nothing more."""
        self._stopped.set()
        self.work.close()

    def close(self) -> None:
        """End what runs."""
        self.stop()
        self._builder.join(5)
        if self._temporary is not None:
            self._temporary.cleanup()

    # ------------------------------------------------------------------------------------------------- the index

    @property
    def state(self) -> IndexState:
        """How far the index is; one that is being made anew while the old one answers counts as ready."""
        state = self._state
        return IndexState("ready", state.done, state.of, state.seconds) if self._book is not None else state

    @property
    def stale(self) -> bool:
        """Whether the data changed since the index was made; looks, and begins to make it anew, every few seconds."""
        with self._lock:
            now = time.monotonic()
            if not self._builder.is_alive() and now - self._looked > (_LOOK if self.data.url is None else _LOOK_STORE):
                self._looked = now
                failed = self._state.state == "none" and now - self._ended > _AGAIN
                if failed or self._signature() != self._seen:
                    self._builder = self._start()
            return self._book is not None and (self._builder.is_alive() or self._state.state == "none")

    def look(self) -> None:
        """Look whether the data changed when the next one asks, however lately somebody did."""
        self._looked = 0.0

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._build, name="index", daemon=True)
        thread.start()
        return thread

    def wait(self, seconds: float = 600) -> None:
        """Wait until the index is made, or can't be."""
        self._builder.join(seconds)

    def _signature(self) -> str:
        """What is another as soon as a record is written, at the price of a look at its file."""
        try:
            if self.data.url is not None:
                self.data.store.refresh()
            found = tables(self.data)
        except (UserError, OSError):
            return ""
        stamp = self.data.store.stamp
        return digest([[t.name, t.columns, [stamp(record) for record in t.records]] for t in found])

    def _build(self) -> None:
        """Make the index and take it up."""
        began, done, of = time.monotonic(), 0, 0

        def on_step(count: int) -> None:
            nonlocal done
            done += count
            if self._stopped.is_set():
                raise IndexStopped
            self._state = IndexState("building", done, of, time.monotonic() - began)

        try:
            self._seen = self._signature()
            found = tables(self.data)
            of = steps(found)
            snapshot = self._open(found, on_step)
            if self._book is None or snapshot.digest != self._book.snapshot.digest:
                book = RuleBook(snapshot, self.data.studio_index / "answers" if self._keep else None)
                with contextlib.suppress(UserError):  # they are what the page asks first; what is wrong is said there
                    book.select(self.recipe.rules, {})
                self._book, self.version = book, self.version + 1
            seconds = time.monotonic() - began
            self._state = IndexState("ready", of, of, seconds)
            self._log(f"the index of {snapshot.count:,} images is ready ({seconds:.1f} s)")
        except IndexStopped:
            pass
        except (UserError, OSError) as e:
            self._state = IndexState("none", done, of, time.monotonic() - began, str(e))
            self._log(f"no index: {e}")
        except Exception as e:
            self._state = IndexState("none", done, of, time.monotonic() - began, f"{type(e).__name__}: see the log")
            self._on_fault(e)
        finally:
            self._ended = time.monotonic()

    def _open(self, found: Sequence[LedgerTable], on_step: Callable[[int], None]) -> Snapshot:
        """The index of these tables, made where it is missing. Another server may remove a part as it is opened."""
        for last in (False, False, True):
            try:
                folders = make_index(self._folder(found), found, on_step)
                return Snapshot.open(self.data, self.recipe, found, folders, part_digests(found))
            except FileNotFoundError:
                if last:
                    raise
        raise AssertionError

    def _folder(self, found: Sequence[LedgerTable]) -> Path:
        """Where the index is: in the data folder, or, where nothing may be written there, for this run alone."""
        folder = self.data.studio_index
        if self._keep:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    return folder
        elif all(part.exists() for part in part_folders(folder, found).values()):
            return folder
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="tastemaker-studio-")
        return Path(self._temporary.name)

    @property
    def book(self) -> RuleBook:
        """Raises NotHere where the index is not made yet."""
        if self._book is None:
            state = self._state
            if state.state == "none":
                raise NotHere(f"there is nothing to explore: {state.error}", "GET /api/data says more")
            raise NotHere(
                f"the index is being made: {state.done:,} of {state.of:,}", "GET /api/data says how far it is"
            )
        return self._book

    @property
    def snapshot(self) -> Snapshot:
        """The data folder as it was when its index was made. Ask for it once where several answers must agree."""
        return self.book.snapshot

    @property
    def snapshot_or_none(self) -> Snapshot | None:
        """The same; None where the index is not made yet."""
        return None if self._book is None else self._book.snapshot

    # -------------------------------------------------------------------------------------------------- rows

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self.snapshot.count

    @property
    def keys(self) -> npt.NDArray[np.uint64]:
        """(count,) of all rows, ascending."""
        return self.snapshot.rows.keys

    def key(self, row: int) -> str:
        """The key of a row."""
        return self.snapshot.key(row)

    def row(self, key: str) -> int:
        """The row of a key; KeyError where it has no image, or must not be seen."""
        return self.snapshot.row(key)

    def shard_of(self, row: int) -> tuple[int, int]:
        """The shard that a row is in, and its place among all images of that shard (hidden ones count)."""
        rows = self.snapshot.rows
        return int(rows.shard[row]), int(rows.place[row])

    def values(self, column: str) -> npt.NDArray[Any]:
        """(count,) of a column of numbers or flags, NaN where there is no value; memory-mapped where all rows have one.
        UserError where its values are texts, or there is no such column."""
        snapshot = self.snapshot
        found = snapshot.columns.get(column)
        if found is None or found.facts.stored not in ("number", "flag"):
            raise UserError(f"there is no column of numbers called {column}")
        if found.valid is None:
            return found.values
        valid = np.unpackbits(found.valid, count=snapshot.count, bitorder="little").astype(np.bool_)
        real = found.values.dtype.kind == "f"
        values = found.values.copy() if real else found.values.astype(np.float64)
        values[~valid] = np.nan
        return values

    def percentile(self, column: str, value: float) -> float:
        """The share of rows with a smaller value in percent, of those that have one; ties count half."""
        found = self.snapshot.columns[column]
        if not found.facts.count:
            return 0.0
        return 50.0 * (found.below(value) + found.up_to(value)) / found.facts.count

    def facts(self, rows: Sequence[int] | npt.NDArray[Any], columns: Sequence[str]) -> pa.Table:
        """Any columns of the ledger, as rules name them, of a few rows, read from the files of their shards."""
        try:
            return self.snapshot.facts(np.asarray(rows, np.int64), columns)
        except OSError as e:
            raise NotHere(f"the data folder is being changed: {e}", "try again in a while") from None

    def blurred(self, row: int) -> bool:
        """Whether an image is unsafe to look at, by any column whose annotator says so."""
        return bool(self.snapshot.blurred(np.array([row]))[0])

    # -------------------------------------------------------------------------------------------- selections

    def select(self, rules: Mapping[str, str], off: Mapping[str, str] | None = None) -> LiveSelection:
        """Apply rules, name -> condition, in their order; `off` are those that are switched off and may be asked about.

        Raises UserError where one is wrong, in the words of `tastemaker select`.
        """
        book = self.book
        id = selection_id(book.snapshot, dict(rules), dict(off or {}))
        self._asked.put(id, (dict(rules), dict(off or {})))
        return self._selections.get_or_make(id, lambda: book.select(dict(rules), dict(off or {})))

    def selection(self, id: str) -> LiveSelection:
        """One that was asked for before; UnknownSelection where it was not, or the rows changed since."""
        book, found = self.book, self._selections.get(id)
        if found is not None and found.snapshot.rows.digest == book.snapshot.rows.digest:
            return found
        rules = self._asked.get(id)  # it had to make room for others
        if rules is None or selection_id(book.snapshot, *rules) != id:
            raise UnknownSelection(id)
        return self.select(*rules)

    def answer_of(self, selection: LiveSelection, name: str) -> RuleAnswer:
        """What a rule of a selection says of all rows, also where it is switched off."""
        for answer in selection.answers:
            if answer.rule.name == name:
                return answer
        if name not in selection.off:
            raise UserError(f"the selection has no rule {name}")
        book = RuleBook(selection.snapshot) if selection.snapshot is not self.snapshot else self.book
        early = [rule for rule in selection.rules if rule.name in self.recipe.early]
        return book.answer(book.check({name: selection.off[name]})[0], early)

    # ---------------------------------------------------------------------------------------------- listings

    def add_ranking(
        self,
        rows: npt.NDArray[Any],
        scores: npt.NDArray[Any],
        what: str,
        again: Callable[[listings.Mask], tuple[npt.NDArray[Any], npt.NDArray[Any]]] | None = None,
        of: str | None = None,
    ) -> str:
        """Remember rows that a search found, the best first, under an id for `sort=search:ID`. again: searches among
        some rows, (n,) bool, alone.    of: the digest of all rows, by which they are numbered; None: as now."""
        of = of or self.snapshot.rows.digest
        found = Ranking(np.asarray(rows, np.uint32), np.asarray(scores, np.float32), what, of, again)
        id = digest([self.version, what, found.rows.tobytes().hex()[:4096], len(rows), time.monotonic_ns()])
        self._rankings.put(id, found)
        return id

    def ranking(self, id: str) -> Ranking:
        """UnknownSelection where it is not remembered, or its rows are others now."""
        found = self._rankings.get(id)
        if found is None or found.of != self.snapshot.rows.digest:
            raise UnknownSelection(id)
        return found

    def listing(
        self,
        selection: LiveSelection | None,
        *,
        show: Show = "all",
        rule: str | None = None,
        other: LiveSelection | None = None,
        sort: str = "key",
        descending: bool = False,
    ) -> RowOrder:
        """Which rows are shown, in their order. Raises UserError for what can't be shown or sorted by."""
        ids = tuple(None if s is None else s.id for s in (selection, other))
        key = (self.snapshot.digest, *ids, show, rule, sort, descending)
        return self._listings.get_or_make(key, lambda: self._list(selection, show, rule, other, sort, descending))

    def _list(
        self,
        selection: LiveSelection | None,
        show: Show,
        rule: str | None,
        other: LiveSelection | None,
        sort: str,
        descending: bool,
    ) -> RowOrder:
        snapshot = self.snapshot if selection is None else selection.snapshot
        mask = None
        if selection is not None and (show != "all"):
            mask = listings.filtered(selection, show, rule, other, lambda name: self.answer_of(selection, name))
        elif show != "all":
            raise UserError(f"show={show} needs a selection")
        if sort.startswith("search:"):
            return listings.order_of_ranking(self.ranking(sort.removeprefix("search:")), mask, descending)
        if sort == "nearest":
            if selection is None or rule is None or mask is None:
                raise UserError("sort=nearest is to the cut of a rule: a selection, `show` and `rule` are needed")
            cut = listings.cut_of(snapshot, self.answer_of(selection, rule))
            if cut is None:  # it compares no column of numbers: there is nothing to be near to
                return listings.order_of(snapshot, mask, "key", descending)
            return listings.nearest(snapshot, mask, *cut)
        return listings.order_of(snapshot, mask, sort, descending)
