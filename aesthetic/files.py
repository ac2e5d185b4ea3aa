"""Files that are whole or absent.

A file is written beside its place under a hidden name of its own, flushed to the disk and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from aesthetic.errors import DiskFull

TRY_AGAIN = "Free some space and run the same command again: it goes on where it stopped."


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under `path` only if the block ends well, whole and flushed to the disk.

    Its folder is made where it is missing. Raises DiskFull, and what the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_path(path)
    try:
        with open(scratch, "xb") as f:  # x: never through a link, never over a file
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(scratch, path)
    except OSError as e:
        raise as_disk_full(e, path.parent) from e
    finally:
        scratch.unlink(missing_ok=True)
    sync(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that appears under `path` whole and flushed to the disk, or not at all."""
    with atomic(path) as f:
        f.write(data)


def scratch_path(path: Path) -> Path:
    """A hidden name beside `path` that no other process uses and no `*.tar` glob finds."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def as_disk_full(error: OSError, folder: Path) -> Exception:
    """DiskFull, saying where and what to do, in place of an error that means just that; other errors as they are."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"{folder} is full. {TRY_AGAIN}")
    return error
