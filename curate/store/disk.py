"""Where the files of a data folder are: on a disk, as they lie. A mirror of an object store answers the same."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from aesthetic.errors import UserError
from aesthetic.files import write_atomic
from aesthetic.untrusted import open_regular, read_bytes
from curate.store.files import cannot_write, open_own, write_json
from curate.store.lock import Lock
from curate.store.records import read_record

Stamp = tuple[int, str]
"""A file's size in bytes, and what changes when it is written again (of an object, its ETag)."""

_TICK = 2_000_000_000  # nanoseconds, with a large margin; FAT counts in two seconds


class FileChanged(Exception):
    """A file is no longer the one with the stamp that was named, or is gone."""


class Disk:
    """A folder on a local or shared file system. Nothing has to be moved; `Mirror` is the same of an object store."""

    url: str | None = None
    token: str | None = None  # of the lease that this run holds; a disk has a lock, which nobody alive loses
    fence: Callable[[], None] | None = None  # in a worker: raises LeaseLost where others do what it was at

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def read_small(self, path: Path, most: int = 1 << 28) -> bytes | None:
        """The bytes of a small file; None where there is none, a link, or one of more bytes than `most`."""
        self.bring([path])
        with contextlib.suppress(OSError, UserError):
            if stat.S_ISREG(os.lstat(path).st_mode):
                return read_bytes(path, most)
        return None

    def lock(self) -> contextlib.AbstractContextManager[Any]:
        """One run at a time, while the block runs. UserError where another one is at work."""
        return Lock(self.root)

    def refresh(self) -> None:
        """Look again at what lies there, as other processes write too."""

    def bring(self, paths: Iterable[Path]) -> None:
        """Have files of the folder here, whole and as they are now; one that is not there is not here either."""

    def push(self, paths: Iterable[Path]) -> None:
        """Put files there as they are here, each whole or not at all, in this order."""

    def bring_newest(self, path: Path) -> None:
        """Have a small file here that others may write at any time, as it is now."""

    def replace(self, path: Path, data: bytes) -> None:
        """Write a small file, whole or not at all, in place of what was brought last; on a store Changed where somebody
        else has written it since, and on a disk whoever writes it takes turns."""
        write_atomic(path, data)

    def release(self, paths: Iterable[Path]) -> None:
        """Let go of the files here that lie there: their room may be used for others."""

    def remove(self, paths: Iterable[Path]) -> None:
        """Remove files, here and there; those that are not there are fine."""
        for path in paths:
            path.unlink(missing_ok=True)

    def stamp(self, path: Path) -> Stamp | None:
        """The stamp of a file, None where there is none."""
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _stamp(found)

    def lasting(self, stamp: Stamp) -> bool:
        """Whether a file could not have been written again since without that its stamp is another: clocks of file
        systems tick each few milliseconds."""
        return time.time_ns() - int(stamp[1].split("-")[0]) > _TICK

    def read_range(self, path: Path, start: int, length: int, stamp: Stamp) -> bytes:
        """Bytes of a file, fewer where it ends before, without the rest of it. FileChanged where another has its name
        by now than the one with this stamp."""
        try:
            with open_regular(path) as f:
                if _stamp(os.fstat(f.fileno())) != stamp:
                    raise FileChanged(str(path))
                return os.pread(f.fileno(), length, start)
        except UserError as e:
            raise FileChanged(str(path)) from e

    def change(self, path: Path, edit: Callable[[bytes], bytes]) -> bytes:
        """Write a small file anew from what it holds (b"" where it is not there), whole and flushed to the disk; of
        several who change it at once, here or elsewhere, each sees what the one before wrote. The bytes that it has
        then. UserError where that can't be, DiskFull."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = open_own(path.with_name(f".{path.name}.lock"), os.O_RDWR)
        except OSError as e:
            raise cannot_write(path, e) from e
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            before = read_bytes(path) if path.exists() else b""
            after = edit(before)
            if after != before:
                write_atomic(path, after)
            return after
        finally:
            os.close(fd)

    def names(self, folder: Path) -> list[str]:
        """The names of the files and folders in a folder, sorted; none where it is not there."""
        try:
            return sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def folders(self, parent: Path) -> list[str]:
        """The names of the folders in a folder, sorted."""
        return [name for name in self.names(parent) if (parent / name).is_dir()]

    def walk(self, folder: Path) -> list[Path]:
        """All files below a folder, sorted."""
        below = [path for name in self.folders(folder) for path in self.walk(folder / name)]
        return sorted([*below, *(folder / name for name in {*self.names(folder)}.difference(self.folders(folder)))])

    def read_records(self, paths: Iterable[Path]) -> dict[Path, tuple[dict[str, Any], Stamp, str]]:
        """Of the records that are there, what each says, its stamp, and the mark of its outputs."""
        found = {}
        for path in paths:
            if (stamp := self.stamp(path)) is not None:
                found[path] = read_record(path), stamp, ""
        return found

    def write_record(self, path: Path, value: Mapping[str, Any], outputs: Iterable[Path]) -> None:
        """Put outputs there, and last of all the record that names them."""
        if self.fence is not None:
            self.fence()
        write_json(path, value)

    def mark(self, outputs: Iterable[Path]) -> str:
        """What the outputs of a record are there, in short, where a size says too little: on a disk nobody writes
        them whose lock is lost."""
        return ""


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_size, f"{found.st_mtime_ns}-{found.st_ino}"
