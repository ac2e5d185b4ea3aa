"""What a command writes to people: stdout, stderr and the logs, safe to look at and never what ends the work.

Host names, captions and file names come from strangers. Everything that is printed goes through `Shown`, which shows
control characters as escapes, so that nobody's list can clear a screen, colour it or write to a clipboard. Characters
that a terminal's encoding lacks are written otherwise. Where the reader is gone (`tastemaker ... | head -1`, a closed
stdout), the work goes on without him; where what is written is lost (a full disk), the work goes on and the exit code
says so.
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
from collections.abc import Iterator
from typing import IO, Any

from aesthetic.untrusted import printable


class Control(str):
    """Our own control sequence, which is written as it is; any other text is foreign."""


CLEAR = Control("\r\033[K")
"""To the beginning of the line, and nothing on it."""

RETURN = Control("\r")
"""To the beginning of the line."""

_SPACES = re.compile(r"([\n\t])")


def shown(text: str) -> str:
    """Foreign text for a terminal or a log: lines and tabs stay, other controls are shown as escapes.

    >>> shown("a\\tb\\x1b[2Jc\\r\\n")
    'a\\tb\\\\x1b[2Jc\\\\r\\n'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(part if part in ("\n", "\t") else printable(part) for part in _SPACES.split(text))


class Shown:
    """A text stream of a terminal, a pipe or a file, for text of others. Does not raise; `lost` says what was lost."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost: OSError | None = None
        self._terminal = bool(stream.isatty())
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):
                stream.reconfigure(errors="tastemaker")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, text: str) -> int:
        if self.lost is None:
            try:
                self._stream.write(text if isinstance(text, Control) else shown(text))
            except OSError as e:
                self._lose(e)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.lost is None:
            try:
                self._stream.flush()
            except OSError as e:
                self._lose(e)

    def close(self) -> None:
        self.flush()
        with contextlib.suppress(OSError):  # what could not be written is written again, in vain
            self._stream.close()

    def _lose(self, error: OSError) -> None:
        self.lost = error

    @property
    def missed(self) -> OSError | None:
        """What kept somebody from reading; None where all was written, or nobody reads any more."""
        if self.lost is None or self.lost.errno == errno.EPIPE or (self._terminal and self.lost.errno == errno.EIO):
            return None
        return self.lost


_PLAIN = {
    "·": "-", "…": "...", "±": "+-", "×": "x", "→": "->", "←": "<-", "–": "-", "—": "-", "−": "-", "≥": ">=",
    "≤": "<=", "’": "'", "‘": "'", "“": '"', "”": '"', "²": "^2", "§": "section ", "µ": "u", "α": "alpha", "ρ": "rho",
}  # fmt: skip


def _otherwise(error: UnicodeError) -> tuple[str, int]:
    """Characters that an encoding lacks: our own signs in ASCII, others as escapes."""
    assert isinstance(error, UnicodeEncodeError)
    found = error.object[error.start : error.end]
    plain = (_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in found)
    return "".join(plain), error.end


codecs.register_error("tastemaker", _otherwise)


@contextlib.contextmanager
def safe_streams() -> Iterator[tuple[Shown, Shown]]:
    """stdout and stderr as `Shown` while the block runs."""
    before = sys.stdout, sys.stderr
    out, err = (Shown(s if s is not None else open(os.devnull, "w", encoding="utf-8")) for s in before)  # noqa: SIM115
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


def text_stream(fd: int, like: IO[str] | None) -> Shown:
    """A descriptor as a `Shown` stream, line by line, in the encoding of another stream."""
    encoding = getattr(like, "encoding", None) or "utf-8"
    return Shown(os.fdopen(fd, "w", buffering=1, encoding=encoding, errors="tastemaker"))


class LogFormatter(logging.Formatter):
    """Lines of a log: controls in them are shown as escapes."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))
