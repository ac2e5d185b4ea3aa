"""Ratings on disk: what `tastemaker fit` reads, a line for each. What `add` returned from is there, whoever is killed.

A rating is one line at the end of the file, flushed to the disk. To take one back, or to rate an image again, the file
is written anew, whole or not at all. A line that a power cut tore was never confirmed: it goes when the file is opened.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import io
import math
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from aesthetic.errors import DiskFull, UserError
from aesthetic.untrusted import read_bytes
from curate.layout import Data
from curate.store.clients import StoreUnavailable
from curate.store.files import json_bytes, open_own, read_json
from curate.store.objects import Changed
from studio.errors import NotHere

SetKind = Literal["scores", "labels", "pairs"]
Row = tuple[str, ...]
T = TypeVar("T")

COLUMNS: dict[str, tuple[str, ...]] = {
    "scores": ("image", "score", "rater"),
    "labels": ("image", "label", "rater"),
    "pairs": ("image_a", "image_b", "choice", "rater"),
}
ANSWERS = {"labels": ("yes", "no"), "pairs": ("a", "b", "tie")}

NAME = r"[a-z][a-z0-9_]{0,39}"
"""What a set of ratings is called: then its head and that head's column may be called so, too."""
RATER = r"[^\W_][\w .@'-]{0,39}"
MOST = 1_000_000
"""Ratings in one set."""

_LARGEST = 256 << 20  # bytes of a file
_TRIES = 20  # on an object store, where somebody else was first
_PATIENCE = 10.0  # seconds in which another process ends its write: it takes milliseconds


@dataclass(frozen=True)
class RatingSet:
    """What is asked in a set of ratings."""

    name: str
    kind: SetKind
    scale: tuple[float, float] | None = None  # of scores
    concept: str = ""  # what is judged, for people

    def identity(self, row: Row) -> tuple[str, ...]:
        """Of which there is one rating: an image or two, either way round, and a rater."""
        return (*sorted(row[:-2]), row[-1])


class RatingLog:
    """The ratings of one set, in the order in which they were given. Safe in many threads and several processes.

    log: called with a line where the file had to be mended.
    """

    def __init__(self, data: Data, about: RatingSet, log: Callable[[str], None] = lambda line: None) -> None:
        self.data, self.about, self._log = data, about, log
        self.path = data.ratings(about.name)
        self.version = 0  # goes up when ratings change
        self._rows: list[Row] = []
        self._place: dict[tuple[str, ...], int] = {}  # of each identity, its row
        self._raters: Counter[str] = Counter()
        self._before: dict[Row, tuple[int, Row]] = {}  # by a rating, the one of the same image that it replaced
        self._stamp: Any = None
        self._lock, self._is_held = threading.RLock(), False

    def add(self, row: Row) -> int:
        """Write a rating, in place of the same rater's of the same image(s); how many there are. It is on the disk
        when this returns. Raises NotHere where it could not be written; nothing has changed then."""
        return self._retried(lambda: self._add(row))

    def _add(self, row: Row) -> int:
        if len(self._rows) >= MOST:
            raise UserError(f"{self.path.name} holds {MOST:,} ratings, as many as one set may: begin another")
        old = self._place.get(self.about.identity(row))
        if old is None:
            self._append(row)
        else:
            replaced = self._rows[old]
            self._write([*self._rows[:old], *self._rows[old + 1 :], row])
            if replaced != row:  # else it is the same answer, sent again
                self._before[row] = old, replaced
        return len(self._rows)

    def undo(self, rater: str, images: Sequence[str] = ()) -> tuple[Row | None, Row | None, int]:
        """Take back the rater's last rating, or that of these images: it, what stood there before where that is still
        known, and how many there are now. (None, None, ...) where there is none. Raises NotHere as `add`."""
        return self._retried(lambda: self._undo(rater, images))

    def _undo(self, rater: str, images: Sequence[str]) -> tuple[Row | None, Row | None, int]:
        if images:
            at = self._place.get((*sorted(images), rater))
        else:
            at = next((i for i in range(len(self._rows) - 1, -1, -1) if self._rows[i][-1] == rater), None)
        if at is None:
            return None, None, len(self._rows)
        row = self._rows[at]
        rows = [*self._rows[:at], *self._rows[at + 1 :]]
        place, before = self._before.get(row, (0, None))
        if before is not None:
            rows.insert(min(place, len(rows)), before)
        self._write(rows)
        self._before.pop(row, None)
        return row, before, len(self._rows)

    def _retried(self, work: Callable[[], T]) -> T:
        """What `work` returns while nobody else writes. On an object store others can: then again, on what they wrote.
        Raises NotHere where nothing could be written; nothing has changed then."""
        for tries in range(_TRIES):
            with self.held():
                try:
                    return work()
                except (OSError, DiskFull, StoreUnavailable, Changed) as e:
                    self._stamp = None  # read again, whatever lies there now
                    if isinstance(e, Changed) and tries + 1 < _TRIES:
                        continue
                    why = (e.strerror or str(e)) if isinstance(e, OSError) else str(e).split(". ")[0]
                    hint = "make room or put right what is wrong, then do it again; all that was confirmed is there"
                    shown = self.data.shown(self.path)
                    raise NotHere(f"{shown} could not be written: {why}. This was not saved.", hint) from e
        raise AssertionError

    def rows(self) -> list[Row]:
        """All ratings, in the order of the file."""
        with self.held():
            return self._rows.copy()

    def raters(self) -> dict[str, int]:
        """Who has rated how often."""
        with self.held():
            return dict(self._raters)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else writes while the block runs; what others wrote before is known. May be nested."""
        with self._lock:
            if self._is_held:
                yield
                return
            with _locked(self.data.ratings_lock):
                try:
                    self.data.store.bring_newest(self.path)
                    if self._stamp is None or self._stamp != _stamp(self.path):
                        self._read()
                except (OSError, DiskFull, StoreUnavailable, Changed) as e:
                    raise NotHere(f"{self.data.shown(self.path)} cannot be read: {e}", "try again in a while") from e
                self._is_held = True
                try:
                    yield
                finally:
                    self._is_held = False

    # -------------------------------------------------------------------------------------------------- the file

    def _read(self) -> None:
        content = read_bytes(self.path, _LARGEST) if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            self._log(f"{self.path}: the last line was not whole and was left out: {content[len(whole) :][:200]!r}")
            self.data.store.replace(self.path, whole or self._line(COLUMNS[self.about.kind]))
        self._take(self._parse(whole))

    def _parse(self, content: bytes) -> list[Row]:
        columns = COLUMNS[self.about.kind]
        try:
            reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
            rows = [tuple(row) for row in reader if row]
        except (UnicodeError, csv.Error) as e:
            raise UserError(f"{self.path} is no CSV that can be read: {e}. Put right what was changed in it") from e
        if rows and rows[0] != columns:
            raise UserError(
                f"{self.path} has other columns than {', '.join(columns)}: keep what you add to it in another file"
            )
        for number, row in enumerate(rows[1:], 2):
            if len(row) != len(columns):
                raise UserError(f"{self.path}, row {number}: {len(row)} cells, the header has {len(columns)}")
        return rows[1:]

    def _take(self, rows: list[Row]) -> None:
        self._rows = rows
        self._place = {self.about.identity(row): i for i, row in enumerate(rows)}
        self._raters = Counter(row[-1] for row in rows)
        self._stamp, self.version = _stamp(self.path), self.version + 1

    def _append(self, row: Row) -> None:
        if self.data.url is not None or not self.path.exists():  # there objects are written whole; or it was taken away
            self._write([*self._rows, row])
            return
        fd = open_own(self.path, os.O_WRONLY | os.O_APPEND)
        size = os.fstat(fd).st_size
        try:
            line = self._line(row)
            if os.write(fd, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(fd)
        except BaseException:
            os.ftruncate(fd, size)
            raise
        finally:
            os.close(fd)
        self._place[self.about.identity(row)] = len(self._rows)
        self._rows.append(row)
        self._raters[row[-1]] += 1
        self._stamp, self.version = _stamp(self.path), self.version + 1

    def _write(self, rows: list[Row]) -> None:
        self.data.store.replace(self.path, b"".join(map(self._line, [COLUMNS[self.about.kind], *rows])))
        self._take(rows)

    def _line(self, row: Row) -> bytes:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerow(row)
        return text.getvalue().encode()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock among processes. NotHere where another one keeps it, or the folder can't be written."""
    until = time.monotonic() + _PATIENCE
    try:
        path.parent.mkdir(exist_ok=True)
        fd = open_own(path, os.O_RDWR)
    except OSError as e:
        raise NotHere(f"{path.parent} cannot be written: {e.strerror}", "ratings are kept there") from e
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise NotHere(f"another process holds {path}", "end it, or wait") from None
                time.sleep(0.002)
            except OSError as e:
                raise NotHere(f"{path.parent} cannot be locked: {e.strerror}", "use a disk with file locks") from e
        yield
    finally:
        os.close(fd)


# ----------------------------------------------------------------------------------------------------------- the sets


def make_set(data: Data, about: RatingSet, log: Callable[[str], None]) -> None:
    """Write an empty set of ratings. UserError where there is one of that name, NotHere where it can't be written."""
    record, path = data.ratings_record(about.name), data.ratings(about.name)
    with _locked(data.ratings_lock):
        data.store.bring_newest(record)
        data.store.bring_newest(path)
        if record.exists() or path.exists():
            raise UserError(f"there are ratings called {about.name} already: rate on in these, or choose another name")
        scale = None if about.scale is None else list(about.scale)
        try:
            data.store.replace(path, ",".join(COLUMNS[about.kind]).encode() + b"\n")
            data.store.replace(record, json_bytes({"kind": about.kind, "scale": scale, "concept": about.concept}))
        except (OSError, DiskFull, StoreUnavailable, Changed) as e:
            raise NotHere(f"{data.shown(path)} could not be written: {e}", "make room, then do it again") from e
    log(f"ratings {about.name}: {about.kind}")


def read_set(data: Data, name: str) -> RatingSet | None:
    """What is asked in a set of ratings; None where there is none of that name, or none of ours."""
    if not re.fullmatch(NAME, name):
        return None
    record = data.ratings_record(name)
    data.bring(record)
    match read_json(record):
        case {"kind": "scores", "scale": [int() | float() as low, int() | float() as high], **rest} if (
            low < high and math.isfinite(high - low)
        ):
            return RatingSet(name, "scores", (float(low), float(high)), str(rest.get("concept", "")))
        case {"kind": "labels" | "pairs" as kind, **rest}:
            return RatingSet(name, kind, None, str(rest.get("concept", "")))
    return None
