"""What an exception means to whoever typed the command: a paragraph and an exit code; and what a process must have."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import tempfile
from pathlib import Path

from aesthetic.errors import UserError

_GOES_ON = "What is done stays done; the same command goes on where it stopped."

# what libraries written in C++ raise, as plain RuntimeErrors, where an allocation or a thread is refused
_NO_MEMORY = ("can't allocate memory", "bad_alloc", "std::bad_alloc", "out of memory", "can't start new thread",
              "Resource temporarily unavailable", "Cannot allocate memory")  # fmt: skip

# errors about a path that whoever typed the command can put right
_ABOUT_PATHS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.ETXTBSY, errno.ENXIO, errno.ENODEV),
}


_WITH_RAY = ("curate", "fetch", "embed", "retry")
_RAY_FILES = 128  # with 64 its processes die; fetching asks for more, by itself
_LEAST = (
    (4e9, _WITH_RAY),  # below, Ray's processes end each other
    (2e9, ("select", "pack", "query")),  # below, DuckDB's threads abort the process
)
"""Bytes of address space without which a command can't begin, even on little data."""


def explain(error: BaseException) -> tuple[int, str]:
    """(exit code, paragraph) for what ended a command."""
    if isinstance(error, UserError):
        return 2, str(error)
    if _is_out_of_memory(error):  # first of all: there may be none to import anything with
        return 1, f"this needs more memory than there is{_limit(resource.RLIMIT_AS, 'ulimit -v', 1024)}. {_GOES_ON}"
    if isinstance(error, OSError) and (found := _from_the_system(error)):
        return found
    from aesthetic.errors import DiskFull
    from curate.annotators.stage import EndsItsProcess
    from curate.ledger.select import NothingKept
    from curate.shards.tar import CorruptShard
    from curate.store.clients import StoreUnavailable
    from curate.store.lease import LeaseLost

    names = {c.__name__ for c in type(error).__mro__}  # of libraries that may not be loaded

    if isinstance(error, NothingKept):
        return 3, str(error)
    if isinstance(error, DiskFull | EndsItsProcess | StoreUnavailable | LeaseLost):
        return 1, str(error)
    if isinstance(error, CorruptShard) or "ArrowInvalid" in names:
        return 1, f"{error}\n`tastemaker verify DATA` finds damaged files, and says what repairs them"
    if isinstance(error, RecursionError):
        return 1, "something is nested too deep to be read (--verbose shows where)"
    if "PeerLost" in names:
        return 1, f"{error}\nThe same command goes on from the last checkpoint."
    if "RayError" in names:
        what = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return 1, (
            f"Ray has lost what it needs ({type(error).__name__}: {what}). Mostly that is memory (`dmesg` tells), or a "
            f"limit of files or processes (`ulimit -a`); logs/ in the folder says more. {_GOES_ON}"
        )
    limited = _limit(resource.RLIMIT_AS, "ulimit -v", 1024)
    return 1, (
        f"{type(error).__name__}: {error}\n"
        + (f"(memory is limited{limited}, which may be why)\n" if limited else "")
        + "(--verbose shows where; that it ends like this is an error of tastemaker's: please report it)"
    )


def check_limits(command: str) -> None:
    """UserError where a limit of this process is known to end a command in the midst of a library, without a word."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    needs = next((least for least, commands in _LEAST if command in commands), 0)
    if soft != resource.RLIM_INFINITY and soft < needs:
        raise UserError(
            f"tastemaker {command} needs {needs / 1e9:g} GB of address space at the least, and this process may have "
            f"{soft / 1e9:.1f} (`ulimit -v`): raise it"
        )
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if command in _WITH_RAY and files < _RAY_FILES:
        raise UserError(
            f"tastemaker {command} needs {_RAY_FILES} open files at the least, and this process may have {files} "
            f"(`ulimit -n`): raise it"
        )


def _is_out_of_memory(error: BaseException) -> bool:
    names = {c.__name__ for c in type(error).__mro__}  # of libraries that may not be loaded
    if names & {"MemoryError", "ArrowMemoryError", "OutOfMemoryError"}:
        return True
    if "OutOfMemoryException" in names:  # DuckDB's own limit says more than we could
        return "failed to allocate" in str(error).lower() and "limit" not in str(error).lower()
    if isinstance(error, ImportError) and "failed to map segment" in str(error):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def _from_the_system(error: OSError) -> tuple[int, str] | None:
    """What the operating system refused."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        limit = _limit(resource.RLIMIT_NOFILE, "ulimit -n")
        return 1, f"more files are open than may be{limit}: `ulimit -n 4096` allows more. {_GOES_ON}"
    if error.errno in (errno.ENOMEM, errno.EAGAIN):
        return 1, f"the system refuses more memory or processes ({error.strerror}). {_GOES_ON}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return 1, f"{error.filename or 'a disk'} is full. Free some space and run the same command again."
    if error.filename is None:
        return None
    where = error.filename if error.filename2 is None else f"{error.filename} and {error.filename2}"
    where = where.decode(errors="replace") if isinstance(where, bytes) else where
    if error.errno in _ABOUT_PATHS:
        return 2, f"{where}: {error.strerror} (--verbose shows what for)"
    if error.errno in (errno.EIO, errno.ESTALE):
        return 1, f"{where}: {error.strerror}: the disk, or the server that it is on, fails. {_GOES_ON}"
    return None


def _limit(kind: int, name: str, unit: int = 1) -> str:
    """The limit of this process in words, where there is one."""
    soft, _ = resource.getrlimit(kind)
    return "" if soft == resource.RLIM_INFINITY else f" ({name} is {soft // unit:,})"


def ensure_home() -> None:
    """Have HOME and USER say something where the system knows neither, as in a container with a user of no name.

    Caches of ours and of libraries lie in the home folder; here it is a private one for temporary files.
    """
    import getpass

    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user-{os.getuid()}"
    if os.environ.get("HOME"):
        return
    os.environ.pop("HOME", None)  # empty is not absent
    with contextlib.suppress(RuntimeError):
        Path.home()
        return
    home = Path(tempfile.gettempdir(), f"tastemaker-{os.getuid()}")
    with contextlib.suppress(OSError):
        home.mkdir(mode=0o700)
    try:
        found = home.lstat()
        private = found.st_uid == os.getuid() and found.st_mode & 0o170077 == 0o040000
    except OSError:
        private = False
    os.environ["HOME"] = str(home) if private else tempfile.mkdtemp(prefix="tastemaker-")
