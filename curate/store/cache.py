"""What of object stores lies on this machine: a bounded cache, and the folders into which its files are linked.

    CACHE/objects/DIGEST          what lay under a URL and an ETag, for all processes of this machine
    CACHE/mirrors/PID-NONCE/      the files of one process, under their own names; gone when it ends, or has ended
    CACHE/locks/                  so that each file is fetched once

A file of a mirror is a hard link to one of the cache, so that what a process lets go of may stay for the next who wants
it, and what is evicted from the cache stays for who has it. CACHE is TASTEMAKER_CACHE, else ~/.cache/tastemaker;
TASTEMAKER_CACHE_SIZE bounds what is kept for later (20GB, 500MB, 2TB; 50GB where it is not set).
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from aesthetic.errors import DiskFull, UserError
from curate.store.files import RESERVE

_DEFAULT = 50 * 10**9
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_LOOK = 30.0  # seconds after which what other processes put into the cache is counted again


def cache_folder() -> Path:
    """Where copies of what lies on object stores are kept, made where it is missing. UserError where it cannot be."""
    folder = Path(os.environ.get("TASTEMAKER_CACHE") or "~/.cache/tastemaker").expanduser().absolute()
    try:
        for name in ("objects", "mirrors"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"TASTEMAKER_CACHE: {folder} cannot be written: {e.strerror}") from e
    return folder


def cache_size() -> int:
    """Bytes that are kept for later: TASTEMAKER_CACHE_SIZE. UserError where it is no size."""
    text = os.environ.get("TASTEMAKER_CACHE_SIZE", "").strip()
    if not text:
        return _DEFAULT
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.lower())
    if match is None:
        raise UserError(f"TASTEMAKER_CACHE_SIZE: {text!r} is no size; 50GB or 500MB, say, is expected")
    return int(float(match[1]) * _UNITS[match[2]])


# ---------------------------------------------------------------------------------------------------------- one process


def own_folder() -> Path:
    """The folder of this process for its mirrors; it and those of processes that are gone are removed."""
    return _own_folder(os.getpid())


@functools.cache
def _own_folder(pid: int) -> Path:
    parent = cache_folder() / "mirrors"
    _sweep(parent)
    while True:
        folder = parent / f"{pid}-{secrets.token_hex(4)}"
        folder.mkdir()
        # held until the process ends, however it ends; a number alone may be another process's in a container
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if folder.exists():  # nobody swept it away before it was locked
            atexit.register(_leave, folder, pid)
            return folder
        os.close(fd)


def _leave(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # not in a process forked from it
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove the folders of processes that are gone."""
    for folder in parent.iterdir():
        with contextlib.suppress(OSError):
            fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(fd)


# ------------------------------------------------------------------------------------------------------ all together


def link(cached: Path, path: Path, size: int) -> bool:
    """Have a file of the cache under a path as well; False where it is not in the cache, or is not what it was."""
    with contextlib.suppress(FileNotFoundError):
        if cached.stat().st_size != size:  # somebody wrote at its end, where it was linked
            cached.unlink()
            return False
        os.utime(cached)
        _replace(cached, path)
        return True
    return False


def keep(path: Path, cached: Path) -> None:
    """Have a file in the cache as well, for later."""
    make_room(0)
    with contextlib.suppress(OSError):  # the cache is a convenience
        _replace(path, cached)
        _known.add(path.stat().st_size)


@contextlib.contextmanager
def one_at_a_time(cached: Path) -> Iterator[None]:
    """While the block runs, no other thread or process of this machine fetches the same file. Few locks stand for all
    files: those of which two have one are fetched one after the other."""
    folder = cache_folder() / "locks"
    folder.mkdir(exist_ok=True)
    with open(folder / cached.name[:3], "wb") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _replace(file: Path, path: Path) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    os.link(file, scratch)
    os.replace(scratch, path)
    scratch.unlink(missing_ok=True)  # `replace` of two links to one file does nothing


def make_room(size: int) -> None:
    """Remove what was wanted longest ago, until the cache has its size and so many bytes fit on the disk.

    DiskFull where they do not fit.
    """
    folder, limit = cache_folder(), cache_size()
    free = shutil.disk_usage(folder).free - size - RESERVE
    if free >= 0 and _known.fits(limit):
        return
    left = -free
    with os.scandir(folder / "objects") as entries:
        found = [(s.st_mtime, s.st_size, s.st_nlink, entry.path) for entry in entries if (s := _stat(entry))]
    total = sum(size for _, size, _, _ in found)
    for _, bytes_, links, path in sorted(found):
        if total <= limit * 0.9 and left <= 0:  # some more than must be, so that not each file looks at all
            break
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
            total -= bytes_
            left -= bytes_ if links == 1 else 0
    _known.set(total)
    if left > 0:
        raise DiskFull(
            f"{folder} is full: {size / 1e6:,.0f} MB more are needed at a time. Free some space, or set "
            "TASTEMAKER_CACHE to a folder on a larger disk, and run the same command again."
        )


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None


class _Known:
    """How many bytes are in the cache, as far as this process knows: they are counted anew now and then."""

    def __init__(self) -> None:
        self._bytes, self._counted, self._lock = 0, float("-inf"), threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self._bytes += size

    def set(self, size: int) -> None:
        with self._lock:
            self._bytes, self._counted = size, time.monotonic()

    def fits(self, limit: int) -> bool:
        return self._bytes <= limit and time.monotonic() - self._counted < _LOOK


_known = _Known()
