"""Folders that are ours: a folder says so, and what others put into one is never removed.

    DATA/.tastemaker      the mark: "tastemaker data" ("tastemaker model", "tastemaker evaluation")

A run that makes a folder, or takes an empty one, writes the mark before anything else. A folder without it is ours
where it holds a record that only we write: the plan or the resolved recipe of a data folder, a model's train.json, an
evaluation's evaluation.json. A data folder may begin where nothing but lists lies: people put the list there. Any
other folder that holds something is refused before a byte is written. Where a run
is refused later, what it made is taken back, and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aesthetic.errors import UserError
from aesthetic.files import atomic
from aesthetic.untrusted import parse_json
from curate.layout import Data
from curate.store.disk import Disk
from curate.store.files import is_scratch
from curate.store.lock import Lock

MARK = ".tastemaker"

RECIPE_HEADER = "# what was asked for, resolved"
"""How the recipe begins that a run writes beside its data."""

_WHAT = {"data": "a data folder", "model": "a model", "evaluation": "an evaluation"}


def kind_of(place: Path | Disk) -> str | None:
    """What a folder says it is: data, model or evaluation; None where it does not say that it is ours."""
    store = place if isinstance(place, Disk) else Disk(place)
    if marked := _marked(store):
        return marked
    data = Data(store.root)
    if {"version", "list", "shards_sha256"} <= _record(store, data.plan_record).keys():
        return "data"
    if (store.read_small(data.recipe) or b"").startswith(RECIPE_HEADER.encode()):
        return "data"
    for kind, record, key in (("model", "train.json", "settings"), ("evaluation", "evaluation.json", "asked")):
        if isinstance(_record(store, store.root / record).get(key), dict):
            return kind
    return None


def _marked(store: Disk) -> str | None:
    words = (store.read_small(store.root / MARK, 1000) or b"").decode("ascii", "replace").split()
    return words[1] if len(words) > 1 and words[0] == "tastemaker" and words[1] in _WHAT else None


def _record(store: Disk, path: Path) -> dict[str, Any]:
    try:
        value = parse_json(store.read_small(path) or b"", str(path))
    except UserError:
        return {}
    return value if isinstance(value, dict) else {}


def open_data(place: str | Path) -> Data:
    """Open an existing data folder, at a path or a URL. UserError where there is none."""
    data = Data.at(place)
    if not _is_planned(data):
        root = data.root
        if data.url is not None:
            raise UserError(
                f"{data} is no data folder (no plan/ in it). `tastemaker curate LIST --out {data}` makes one."
            )
        if around := next((p for p in root.parents if _is_planned(Data(p))), None):
            raise UserError(f"{root} is not a data folder, but lies in one. Did you mean {around}?")
        if not root.is_dir():
            raise UserError(f"{root} is not a data folder: {'it is a file' if root.exists() else 'it is not there'}.")
        raise UserError(
            f"{root} is not a data folder (no plan/ in it). `tastemaker curate LIST --out {root}` makes one."
        )
    data.store.refresh()
    return data


def _is_planned(data: Data) -> bool:
    return bool(data.store.names(data.plan_folder)) and kind_of(data.store) == "data"


def check_free(place: Path | Disk, kind: str) -> None:
    """UserError where a run may not write to a folder: it is a file, or holds what is not ours. Touches nothing."""
    store = place if isinstance(place, Disk) else Disk(place)
    if store.url is not None:
        _check_free_there(store, kind)
        return
    root = store.root
    if root.is_symlink() and not root.exists():
        raise UserError(f"{root} is a link that leads nowhere: give a folder with --out")
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; --out names a folder")
    if not root.is_dir():
        return
    try:
        others = sorted(name for name in _names(root) if not _left_by_lock(root / name))
    except OSError as e:
        raise UserError(f"{root} cannot be read: {e.strerror}") from e
    if not others:
        return
    found = kind_of(root)
    if found is None and kind == "data":
        from curate.sources.listing import list_format  # brings pyarrow, which most who ask do not need

        # a list of URLs may lie there; .json says too little, as programs leave such files everywhere
        lists = {n for n in others if list_format(n) not in (None, "json") and not n.startswith(".")}
        others = [name for name in others if name not in lists or not (root / name).is_file()]
        if not others:
            return
    if found is None:
        raise UserError(f"{root} holds something else ({others[0]}): give a folder of its own with --out")
    if found != kind:
        raise UserError(f"{root} holds {_WHAT[found]}, not {_WHAT[kind]}: give another folder with --out")


def _check_free_there(store: Disk, kind: str) -> None:
    others = [name for name in store.names(store.root) if name != ".lease"]
    found = kind_of(store) if others else kind
    if found is None:
        raise UserError(f"{store} holds something else ({others[0]}): give a place of its own with --out")
    if found != kind:
        raise UserError(f"{store} holds {_WHAT[found]}, not {_WHAT[kind]}: give another place with --out")


def _names(root: Path) -> set[str]:
    """What is in a folder; nothing where it is not there, any more or yet."""
    try:
        return set(os.listdir(root))
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _left_by_lock(path: Path) -> bool:
    """Whether a file is one that a lock leaves in a folder, or that somebody killed did: no more than that."""
    try:
        found = os.lstat(path)
    except OSError:
        return True  # gone meanwhile
    if is_scratch(path.name):
        return True
    if not stat.S_ISREG(found.st_mode) or path.name not in (".lock", ".workers"):
        return False
    return found.st_size == 0 or (path.name == ".lock" and path.read_bytes()[:8] == b"process ")


@dataclass(frozen=True)
class Taken:
    """A folder that this run holds the lock of, and what was in it before, so that it can be put back."""

    root: Path
    before: set[str]  # the names in it
    made: list[Path]  # it and those around it, as far as this run made them
    kept: dict[str, bytes]  # what was in the small files that the run replaces
    new: bool  # whether it was not ours before

    def undo(self, names: Iterable[str]) -> None:
        """Take back what this run made under these names, and put back what it replaced: the folder is as it was."""
        for name in names:
            if name not in self.before:
                _remove(self.root / name)
            elif name in self.kept and _bytes_of(self.root / name) != self.kept[name]:
                with atomic(self.root / name) as f:
                    f.write(self.kept[name])
        if self.new:
            for name in (MARK, ".workers", ".lock"):
                if name not in self.before:
                    _remove(self.root / name)
            for folder in self.made:
                with contextlib.suppress(OSError):  # somebody else has put something there
                    folder.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _bytes_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


@dataclass(frozen=True)
class TakenStore:
    """As `Taken`, of a place on an object store."""

    store: Disk
    before: set[str]
    kept: dict[str, bytes]

    def undo(self, names: Iterable[str]) -> None:
        """As `Taken.undo`."""
        for name in (*names, *([MARK] if MARK not in self.before else [])):
            path = self.store.root / name
            if name not in self.before:
                self.store.remove(self.store.walk(path) if path.is_dir() else [path])
                _remove(path)
            elif name in self.kept:
                with atomic(path) as f:
                    f.write(self.kept[name])
                self.store.push([path])


@contextlib.contextmanager
def _taken_there(store: Disk, kind: str, replaces: Iterable[str]) -> Iterator[TakenStore]:
    check_free(store, kind)
    with store.lock():
        check_free(store, kind)
        before = {*store.names(store.root)}
        kept = {name: found for name in replaces if (found := store.read_small(store.root / name)) is not None}
        if MARK not in before:
            with atomic(store.root / MARK) as f:
                f.write(f"tastemaker {kind}\n".encode())
            store.push([store.root / MARK])
        yield TakenStore(store, before, kept)


@contextlib.contextmanager
def taken(place: Path | Disk, kind: str, replaces: Iterable[str] = ()) -> Iterator[Taken | TakenStore]:
    """Hold a folder that is ours, made or taken now where it is not there or empty. `replaces`: small files in it that
    a run writes anew, for `undo`.

    Raises UserError, and leaves nothing behind, where it holds something else or is in use.
    """
    store = place if isinstance(place, Disk) else Disk(place)
    if store.url is not None:
        with _taken_there(store, kind, replaces) as there_taken:
            yield there_taken
        return
    root = store.root
    check_free(root, kind)
    made = [p for p in (root, *root.parents) if not p.exists()]
    there = _names(root)
    folder: Taken | None = None
    lock = Lock(root)
    try:
        with lock:
            hidden = {".lock", ".workers"} - there
            try:
                check_free(root, kind)  # again: until now another run may have been at work here
            except UserError:
                for name in hidden:
                    _remove(root / name)
                raise
            new = kind_of(root) is None
            before = _names(root) - hidden
            kept = {name: found for name in replaces if (found := _bytes_of(root / name)) is not None}
            folder = Taken(root, before, made, kept, new)
            if _marked(store) is None:
                with atomic(root / MARK) as f:
                    f.write(f"tastemaker {kind}\n".encode())
            yield folder
    except UserError:
        if folder is None:  # refused before it was ours: nothing but the lock was made
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()
        raise
