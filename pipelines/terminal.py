"""What a command prints: safe to look at, and never what ends its work.

Host names, captions and file names come from strangers. Everything that is printed goes through `SafeStream`, which
shows control characters as escapes, so that nobody's list can clear a screen, colour it or write to a clipboard.
Characters that a terminal's encoding lacks are written otherwise. Where the reader is gone (`tastemaker ... | head -1`,
a closed stdout), the work goes on; where output is lost (a full disk), it goes on and the exit code says so.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

from aesthetic.untrusted import printable
from curate.store.mirror import in_urls


class Verbatim(str):
    """Text that is written as it is, such as our own control sequences; any other text is from strangers."""


CLEAR = Verbatim("\r\033[K")
"""To the beginning of the line, and nothing on it."""

RETURN = Verbatim("\r")
"""To the beginning of the line."""

_SPACES = re.compile(r"([\n\t])")


def counted(count: int, one: str, many: str = "") -> str:
    """So many of something, in words.

    >>> counted(1, "image"), counted(2_000, "entry", "entries")
    ('1 image', '2,000 entries')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def escape_controls(text: str) -> str:
    """Text of strangers for a terminal or a log: lines and tabs stay, other controls become escapes.

    >>> escape_controls("a\\tb\\x1b[2Jc\\r\\n")
    'a\\tb\\\\x1b[2Jc\\\\r\\n'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(part if part in ("\n", "\t") else printable(part) for part in _SPACES.split(text))


class SafeStream:
    """A text stream of a terminal, a pipe or a file. Writing never raises; the first error is kept in `write_error`.

    What lies on an object store is called by its URL, not by the path of the mirror in which we work on it.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.write_error: OSError | None = None
        self._is_terminal = bool(stream.isatty())
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):
                stream.reconfigure(errors="tastemaker")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        shown = text if isinstance(text, Verbatim) else escape_controls(in_urls(text))
        self._try(lambda: self._stream.write(shown))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, write: Callable[[], object]) -> None:
        if self.write_error is None:
            try:
                write()
            except OSError as e:
                self.write_error = e

    def close(self) -> None:
        self.flush()
        with contextlib.suppress(OSError):  # what could not be written is written again, in vain
            self._stream.close()

    @property
    def output_lost(self) -> OSError | None:
        """The error that kept output from somebody who reads; None where all was written, or nobody reads any more."""
        error = self.write_error
        if error is None or error.errno == errno.EPIPE or (self._is_terminal and error.errno == errno.EIO):
            return None
        return error


_ASCII = {
    "·": "-", "…": "...", "±": "+-", "×": "x", "→": "->", "←": "<-", "–": "-", "—": "-", "−": "-", "≥": ">=",
    "≤": "<=", "’": "'", "‘": "'", "“": '"', "”": '"', "²": "^2", "§": "section ", "µ": "u", "α": "alpha", "ρ": "rho",
}  # fmt: skip


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Characters that an encoding lacks: our own signs in ASCII, others as escapes."""
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking), error.end


codecs.register_error("tastemaker", _in_ascii)


@contextlib.contextmanager
def safe_streams() -> Iterator[tuple[SafeStream, SafeStream]]:
    """stdout and stderr as `SafeStream` while the block runs."""
    before = sys.stdout, sys.stderr
    out, err = (SafeStream(s if s is not None else open(os.devnull, "w", encoding="utf-8")) for s in before)  # noqa: SIM115
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    try:
        yield out, err
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


def open_descriptors() -> None:
    """Have the descriptors 0, 1 and 2 lead nowhere where they are closed.

    Otherwise the next files that are opened get these numbers, and what libraries print is written into them.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            fd = os.open(os.devnull, flags)
            if fd != number:
                os.dup2(fd, number)
                os.close(fd)
            os.set_inheritable(number, True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:  # so that what is printed later, when the descriptor is a log's, gets there
            setattr(sys, name, os.fdopen(number, "w", buffering=1, encoding="utf-8", closefd=False))


def safe_stream(fd: int, like: IO[str] | None) -> SafeStream:
    """A descriptor as a `SafeStream` stream, line by line, in the encoding of another stream."""
    encoding = getattr(like, "encoding", None) or "utf-8"
    return SafeStream(os.fdopen(fd, "w", buffering=1, encoding=encoding, errors="tastemaker"))


class LogFormatter(logging.Formatter):
    """Lines of a log: controls in them are shown as escapes."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))
