"""One run at a time on a data folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from aesthetic.errors import UserError
from aesthetic.files import as_disk_full
from curate.store.files import cannot_write, open_own


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
            raise as_disk_full(e, root) from e
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


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a file's lock among processes while the block runs; waits for who has it."""
    fd = open_own(path, os.O_RDWR)
    try:
        _flock(fd, fcntl.LOCK_EX, path.parent, wait=True)
        yield
    finally:
        os.close(fd)


_LEAVING = 30.0  # seconds that workers of a dead run are waited for; 2 s is what they took on a busy machine


def hold_worker_lock(root: Path) -> None:
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
        if e.errno not in _NO_LOCKS:  # a server that fails, say
            raise OSError(e.errno, e.strerror, str(root)) from e
        raise UserError(
            f"{root} is on a file system that cannot lock files ({e.strerror}), so nothing would keep two runs apart. "
            "Give a folder on a local disk or on an object store, or mount it with locks (NFS: version 4, or a lock "
            "manager that runs; Lustre: -o flock)."
        ) from e


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What the kernel says of NFS without a lock manager, of Lustre without -o flock, and of what knows no flock at all."""
