"""Where bytes live: files that are whole or absent, records that say what was done, and one owner at a time.

A file appears under its final name only when it is whole: it is written beside it under a hidden name of its own,
flushed to the disk and renamed. A stage writes the record of a shard last; the record names the sha256 of every file
that it wrote and of every file that it read, so a shard is done exactly when its record still matches.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from aesthetic.errors import UserError as UserError


class DiskFull(Exception):
    """The disk is full, or so nearly full that going on would fill it; what is committed stays valid."""


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under `path` only if the block ends well, whole and flushed to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_path(path)
    try:
        with open(scratch, "xb") as f:  # x: never through a link, never over a file
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(scratch, path)
    except OSError as e:
        raise told(e, path.parent) from e
    finally:
        scratch.unlink(missing_ok=True)
    sync(path.parent)


def told(error: OSError, folder: Path) -> Exception:
    """DiskFull, saying where and what to do, in place of an error that means just that; other errors as they are."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"{folder} is full. {_AGAIN}")
    return error


def scratch_path(path: Path) -> Path:
    """A hidden name beside `path` that no other process uses and no `*.tar` glob finds."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


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


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON with sorted keys, atomically: the same value gives the same bytes."""
    with atomic(path) as f:
        f.write(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """A value as `write_json` writes it."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """The JSON value in a file, or None where there is no such file or it is not JSON (a torn disk, a foreign file)."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(value: Any) -> str:
    """A short name for a JSON value: the first 16 hex digits of the sha256 of its canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------- records


def commit(
    root: Path,
    record: Path,
    *,
    config: str,
    inputs: Mapping[str, str],
    outputs: list[Path],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the record that makes a shard done, last of all its files.

    `config` is the hash of the part of the recipe that the stage reads, `inputs` maps names to sha256, `outputs` are
    the files just written, `facts` what else is worth knowing (counts, times). Paths are kept relative to `root`.
    """
    written = {str(p.relative_to(root)): {"sha256": sha256_file(p), "bytes": p.stat().st_size} for p in outputs}
    value = {**facts, "config": config, "inputs": dict(inputs), "outputs": written}
    write_json(record, {**value, "self": record_digest(value)})
    return value


def record_digest(value: Mapping[str, Any]) -> str:
    """The digest that a record carries of itself (key `self`), so that a changed byte in it is found as well."""
    return digest({k: v for k, v in value.items() if k != "self"})


def recommit(root: Path, record: Path, inputs: Mapping[str, str]) -> None:
    """Write a record again for other inputs from which the same files would come."""
    value = read_json(record)
    facts = {k: v for k, v in value.items() if k not in ("config", "inputs", "outputs", "self")}
    outputs = [root / name for name in value["outputs"]]
    commit(root, record, config=value["config"], inputs=inputs, outputs=outputs, facts=facts)


def uncommit(record: Path) -> None:
    """Take a record back before its files are replaced, so that a half-replaced shard is never taken for done."""
    record.unlink(missing_ok=True)


def is_done(root: Path, record: Path, *, config: str, inputs: Mapping[str, str]) -> bool:
    """Whether a shard's record still matches: same configuration, same inputs, every file there at its size.

    Bytes are not read again here (that is `tastemaker verify`), so asking costs a few stats per shard.
    """
    value = read_json(record)
    if not isinstance(value, dict) or value.get("config") != config or value.get("inputs") != dict(inputs):
        return False
    return outputs_present(root, value)


def outputs_present(root: Path, value: Mapping[str, Any]) -> bool:
    """Whether every file that a record names is there at the size that it names."""
    for name, fact in value.get("outputs", {}).items():
        try:
            if (root / name).stat().st_size != fact["bytes"]:
                return False
        except FileNotFoundError:
            return False
    return True


def output_digests(value: Mapping[str, Any]) -> dict[str, str]:
    """The files that a record names, each with its sha256: what the next stage notes as its inputs."""
    return {name: fact["sha256"] for name, fact in value["outputs"].items()}


# ------------------------------------------------------------------------------------------------------------ owner


class Lock:
    """One run at a time on a data folder. The kernel frees it when its owner dies, however it dies."""

    def __init__(self, root: Path) -> None:
        self.path = root / ".lock"
        self._fd: int | None = None

    def __enter__(self) -> Lock:
        root = self.path.parent
        try:
            fd = self._held()
        except OSError as e:
            raise cannot_write(root, e) from e
        self._fd = fd
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            _await_workers(root)
        except OSError as e:
            self.__exit__()
            raise told(e, root) from e
        except BaseException:
            self.__exit__()
            raise
        return self

    def _held(self) -> int:
        """The descriptor of the lock file that lies there, locked."""
        for attempt in itertools.count():
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                fd = open_own(self.path, os.O_RDWR)
            except FileNotFoundError:  # its owner took the folder away just now
                if attempt == 100:
                    raise
                continue
            try:
                if not _flock(fd, fcntl.LOCK_EX, self.path.parent):
                    owner = os.read(fd, 200).decode(errors="replace").strip() or "another process"
                    raise UserError(
                        f"{self.path.parent} is in use by {owner}. Wait for it, stop it, or give another --out."
                    )
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), os.lstat(self.path)):
                        return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # its owner took the file away with its folder: what is locked is no longer the lock
        raise AssertionError

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


_LEAVING = 30.0  # seconds that workers of a dead run are waited for; 2 s is what they took on a busy machine


def attend(root: Path) -> None:
    """Called once in a worker's process: until that process ends, no other run begins in the folder.

    The lock is its driver's. Where a driver is killed, its workers go on for a second or two, and would write beside
    those of the next run.
    """
    _flock(open_own(root / ".workers", os.O_RDWR), fcntl.LOCK_SH, root, wait=True)


def _await_workers(root: Path) -> None:
    """Wait until the workers of a run that was killed are gone."""
    fd = open_own(root / ".workers", os.O_RDWR)
    try:
        for _ in range(round(_LEAVING / 0.1)):
            if _flock(fd, fcntl.LOCK_EX, root):
                return
            time.sleep(0.1)
    finally:
        os.close(fd)
    raise UserError(f"{root}: workers of a run that was killed are still at work there. Stop them, or wait for them.")


def _flock(fd: int, kind: int, root: Path, wait: bool = False) -> bool:
    """Lock a file; False where another process has it. UserError where the file system knows no such locks."""
    try:
        fcntl.flock(fd, kind if wait else kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as e:
        raise UserError(
            f"{root} is on a file system that cannot lock files ({e.strerror}), so nothing would keep two runs apart. "
            "Give a folder on a local disk, or mount it with locks (NFS: version 4, or a lock manager that runs)."
        ) from e


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
        return told(error, path)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
                       errno.ENOENT, errno.ELOOP):  # fmt: skip
        return UserError(f"{path} cannot be written: {error.strerror}")
    return error


# ------------------------------------------------------------------------------------------------------------- disk

RESERVE = 64 << 20
"""Bytes that are left free: room to write the records and logs that say why a run stopped."""

_AGAIN = "Free some space and run the same command again: it goes on where it stopped."


def check_space(root: Path, needed: int = 0) -> None:
    """Raise DiskFull where `needed` bytes would not fit beside the reserve."""
    free = shutil.disk_usage(root).free
    if free < needed + RESERVE:
        raise DiskFull(
            f"{root} has {free / 1e6:,.0f} MB free, and {(needed + RESERVE) / 1e6:,.0f} MB are needed. {_AGAIN}"
        )


def local_path(text: str) -> Path:
    """A data folder's path. Object stores are refused until they are tested (renames there are not atomic)."""
    if not text.strip():  # of a variable that is not set, say: not the folder one is in
        raise UserError("the name of a folder is empty")
    if "://" in text and not text.startswith("file://"):
        raise UserError(
            f"{text}: a data folder must be on a local or shared file system; object stores are not supported yet."
        )
    try:
        return Path(text.removeprefix("file://")).expanduser().absolute()
    except RuntimeError as e:
        raise UserError(f"{text}: there is no such home folder") from e
