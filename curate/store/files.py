"""Files of ours: JSON, digests, where we may write, room for it, and the scratch files that killed processes leave."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from aesthetic.errors import DiskFull, UserError
from aesthetic.files import TRY_AGAIN, as_disk_full, write_atomic

if TYPE_CHECKING:
    import pyarrow as pa

RESERVE = 64 << 20
"""Bytes that are left free on a disk: room to write the records and logs that say why a run stopped."""


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON with sorted keys, atomically: the same value gives the same bytes."""
    write_atomic(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """A value as `write_json` writes it."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """The JSON value in a file, or None where there is no such file or it is not JSON (a torn disk, a foreign file)."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The columns of a parquet file of ours (None: all), as far as they are there, in its order. In this thread: of
    small files, in a quarter of the time that pyarrow's own `read_table` takes."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read(columns, use_threads=False)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """As `sha256_file`, of a large file that many ask about: read again only where its size or time is another."""
    stat = path.stat()
    return _sha256_once(path.absolute(), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _sha256_once(path: Path, size: int, mtime_ns: int) -> str:
    return sha256_file(path)


def digest(value: Any) -> str:
    """A short name for a JSON value: the first 16 hex digits of the sha256 of its canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


quoted: Callable[[str], str] = json.encoder.encode_basestring_ascii  # type: ignore[attr-defined]
"""A string as `json.dumps` writes it, at a fifth of the time: for digests of millions."""


def local_path(text: str) -> Path:
    """The path of a folder on a disk. UserError where the text names another place."""
    if not text.strip():  # of a variable that is not set, say: not the folder one is in
        raise UserError("the name of a folder is empty")
    if "://" in text and not text.startswith("file://"):
        raise UserError(
            f"{text}: a folder on a disk is expected here, or one on an object store: s3://, gs:// or az://"
        )
    try:
        return Path(text.removeprefix("file://")).expanduser().absolute()
    except RuntimeError as e:
        raise UserError(f"{text}: there is no such home folder") from e


def open_own(path: Path, flags: int) -> int:
    """Open a file that we write to where it lies, made where it is missing; a link is never followed.

    Raises UserError where a link or anything else but a regular file lies there, OSError as os.open does.
    """
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR):
            raise UserError(f"{path} is a link, or no file: remove it, it would be written to") from e
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UserError(f"{path} is no regular file: remove it, it would be written to")
    return fd


def open_log(path: Path) -> BinaryIO:
    """Open a log to write at its end, its folder made where it is missing. UserError where either is a link."""
    if path.parent.is_symlink():
        raise UserError(f"{path.parent} is a link: remove it, logs would be written where it leads")
    try:
        path.parent.mkdir(exist_ok=True)
        return os.fdopen(open_own(path, os.O_WRONLY | os.O_APPEND), "ab")
    except OSError as e:
        raise cannot_write(path, e) from e


def cannot_write(path: Path, error: OSError) -> Exception:
    """What to raise where a folder or file that a run needs cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return as_disk_full(error, path)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
                       errno.ENOENT, errno.ELOOP):  # fmt: skip
        return UserError(f"{path} cannot be written: {error.strerror}")
    return error


def check_space(root: Path, needed: int = 0) -> None:
    """Raise DiskFull where `needed` bytes would not fit beside the reserve."""
    free = shutil.disk_usage(root).free
    if free < needed + RESERVE:
        raise DiskFull(
            f"{root} has {free / 1e6:,.0f} MB free, and {(needed + RESERVE) / 1e6:,.0f} MB are needed. {TRY_AGAIN}"
        )


# ----------------------------------------------------------------------------------------------------------- scratch

_SCRATCH = re.compile(r"\..+\.(\d{1,10})-[0-9a-f]{8}\.tmp|\.spill-(\d{1,10})-[0-9a-f]{8}|\.\d{5,}\.starts\.tmp", re.S)


def is_scratch(name: str) -> bool:
    """Whether something has a name that only `scratch_path`, a query that spills or `Data.embed_starts` gives."""
    return _SCRATCH.fullmatch(name) is not None


def sweep(root: Path) -> None:
    """Remove the scratch files and folders that killed processes left under `root`, which must be a folder of ours.

    Only the owner of the folder's lock may call it. What a process that lives has is left to it.
    """
    for scratch in left_over(root):
        if scratch.is_dir() and not scratch.is_symlink():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            scratch.unlink(missing_ok=True)


def left_over(root: Path) -> list[Path]:
    """The scratch files and folders under `root` whose processes are gone; links to folders are not followed."""
    found = []
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            if (match := _SCRATCH.fullmatch(name)) is None:
                continue
            process = int(match[1] or match[2] or 0)
            # our own number is that of a process before us: in a container it is always the same one
            if process == 0 or not _runs(process) or (match[1] and process == os.getpid()):
                found.append(Path(folder, name))
        folders[:] = [name for name in folders if not is_scratch(name)]
    return found


def _runs(process: int) -> bool:
    """Whether a process of this machine is alive: a query, which takes no lock, may be spilling."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def clear(folder: Path, pattern: str) -> None:
    """Remove the files of a folder whose whole names match, and the folder where that leaves it empty.

    What somebody else has put there stays.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        ours = re.fullmatch(pattern, path.name) or is_scratch(path.name)
        if ours and (path.is_symlink() or not path.is_dir()):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
