"""Where something is published: a folder on a disk, an object store, or (hub_place) a repository of the hub.

A place says of a file whether it lies there as it is here, takes files one by one, and lets go of others.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from aesthetic.errors import UserError
from aesthetic.files import atomic
from curate.store.files import is_scratch, local_path, sha256_file
from curate.store.objects import ObjectStore, is_url


class Destination(Protocol):
    """Files under names below one address. All may raise UserError where rights or the place itself are missing."""

    def names(self) -> set[str]:
        """The names of the files that lie there."""

    def read(self, name: str) -> bytes | None:
        """A small file; None where there is none."""

    def holds(self, name: str, path: Path, sha256: str, stamp: str) -> bool:
        """Whether a file there is the one here. stamp: what `send` said when it went there, or nothing."""

    def send(self, path: Path, name: str, sha256: str) -> str:
        """Put a file there, whole or not at all; returns a stamp by which `holds` knows it again."""

    def delete(self, names: Iterable[str]) -> None:
        """Remove files."""

    def finish(self, message: str) -> str:
        """All is sent; returns where it can be seen, if that is not the address itself."""


def open_place(to: str) -> Destination:
    """The place of that address. UserError where it is none."""
    if to.startswith("hf://"):
        from curate.publish.hub_place import HubPlace

        return HubPlace(to)
    return StorePlace(to) if is_url(to) else FolderPlace(local_path(to))


class FolderPlace:
    """A folder on a disk, made where it is missing."""

    def __init__(self, root: Path) -> None:
        if root.is_symlink() or (root.exists() and not root.is_dir()):
            raise UserError(f"{root} is a link or a file; a folder is expected")
        self._root = root

    def names(self) -> set[str]:
        """All files below it, but for what a killed process left."""
        found = (p for p in self._root.rglob("*") if p.is_file() and not is_scratch(p.name))
        return {p.relative_to(self._root).as_posix() for p in found}

    def read(self, name: str) -> bytes | None:
        """A file's bytes."""
        path = self._root / name
        return path.read_bytes() if path.is_file() else None

    def holds(self, name: str, path: Path, sha256: str, stamp: str) -> bool:
        """By size and time, else by its bytes."""
        there = self._root / name
        if not there.is_file() or there.stat().st_size != path.stat().st_size:
            return False
        return stamp == self._stamp(there) or sha256_file(there) == sha256

    def send(self, path: Path, name: str, sha256: str) -> str:
        """Copy it."""
        there = self._root / name
        with open(path, "rb") as source, atomic(there) as out:
            shutil.copyfileobj(source, out, 1 << 20)
        return self._stamp(there)

    def delete(self, names: Iterable[str]) -> None:
        """Remove files, and the folders that this leaves empty."""
        for name in names:
            path = self._root / name
            path.unlink(missing_ok=True)
            if path.parent != self._root and path.parent.is_dir() and not any(path.parent.iterdir()):
                path.parent.rmdir()

    def finish(self, message: str) -> str:
        """Nothing is left to do."""
        return ""

    def _stamp(self, path: Path) -> str:
        found = path.stat()
        return f"{found.st_size}-{found.st_mtime_ns}"


class StorePlace:
    """Objects below a URL of an object store."""

    def __init__(self, url: str) -> None:
        self._store = ObjectStore(url)
        self._found: dict[str, str] | None = None  # name -> stamp

    def _all(self) -> dict[str, str]:
        if self._found is None:
            self._found = {o.name: f"{o.size}-{o.etag}" for o in self._store.list()}
        return self._found

    def names(self) -> set[str]:
        """The objects below the URL."""
        return {*self._all()}

    def read(self, name: str) -> bytes | None:
        """An object's bytes."""
        found = self._store.get(name)
        return None if found is None else found[0]

    def holds(self, name: str, path: Path, sha256: str, stamp: str) -> bool:
        """By its etag, which was noted when it was sent."""
        return bool(stamp) and self._all().get(name) == stamp

    def send(self, path: Path, name: str, sha256: str) -> str:
        """Put it, large ones in parts."""
        put = self._store.put_file(path, name)
        self._all()[name] = stamp = f"{put.size}-{put.etag}"
        return stamp

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects."""
        self._store.delete(names)

    def finish(self, message: str) -> str:
        """Nothing is left to do."""
        return ""
