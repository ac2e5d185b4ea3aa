"""Files and text that others made: read within bounds, decoded where that is certain, parsed, and shown safely.

Whatever a user names, or a list or a folder brings along, comes in through here: a fifo, a device, a folder, a link
that leads nowhere, a file of 100 GB, JSON nested 100,000 deep and text of another encoding each end in a UserError
that names the file, or in a value that says what was not certain.
"""

from __future__ import annotations

import codecs
import errno
import json
import math
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from aesthetic.errors import UserError

if TYPE_CHECKING:
    import numpy.typing as npt

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

LARGEST_TEXT = 16 << 20
"""Bytes that a text file read whole (a caption, a card, a configuration, a file of prompts) may have by default."""


# ------------------------------------------------------------------------------------------------------------- files


def open_regular(path: str | Path, limit: int | None = None) -> BinaryIO:
    """Open a regular file to read its bytes; links are followed.

    Raises UserError, at once, for what is absent, no regular file (a folder, a fifo, a device such as /dev/zero, a
    dangling or circular link), not to be read, or longer than `limit` bytes.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # non-blocking: a fifo without a writer hangs
    except (OSError, ValueError) as e:
        why = "no file can be called so"
        if isinstance(e, OSError):
            absent = "is a link to a file that is not there" if os.path.islink(path) else "there is no such file"
            pipe, loop = "is a socket or a pipe, not a file", "is a link that leads back to itself"
            known = {errno.ENOENT: absent, errno.ELOOP: loop, errno.ENXIO: pipe}
            why = known.get(e.errno or 0, f"cannot be read: {e.strerror or e}")
        raise UserError(f"{path}: {why}") from e
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: is {_KINDS.get(stat.S_IFMT(found.st_mode), 'no regular file')}, not a file")
        if limit is not None and found.st_size > limit:
            raise UserError(f"{path}: has {found.st_size:,} bytes; at most {limit:,} are expected in such a file")
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def check_regular(path: str | Path, limit: int | None = None) -> int:
    """The size in bytes of a file that a library is about to open by its path; raises what `open_regular` raises."""
    with open_regular(path, limit) as f:
        return os.fstat(f.fileno()).st_size


def read_bytes(path: str | Path, limit: int = LARGEST_TEXT) -> bytes:
    """The bytes of a file; raises what `open_regular` raises, also where the file grows past `limit` meanwhile."""
    with open_regular(path, limit) as f:
        try:
            data = f.read(limit + 1)
        except OSError as e:
            raise UserError(f"{path}: cannot be read: {e.strerror or e}") from e
    if len(data) > limit:
        raise UserError(f"{path}: has more than {limit:,} bytes, which is more than such a file should have")
    return data


def open_vectors(path: Path) -> npt.NDArray[Any]:
    """The rows (n, d) of a .npy file as clip-retrieval stores them, float16 or float32, mapped and not read.

    Raises UserError, naming the file, where it is anything else, such as pickled objects, or shorter than it says.
    """
    import tokenize
    import zipfile

    import numpy as np

    # what numpy raises for headers that somebody made up: they are parsed as Python literals
    made_up = (ValueError, EOFError, TypeError, AttributeError, KeyError, OverflowError, MemoryError, RecursionError)
    check_regular(path)
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (*made_up, OSError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile) as e:
        raise UserError(f"{path} cannot be read as a .npy file of vectors: {e}") from e
    if not isinstance(vectors, np.ndarray):
        vectors.close()
        raise UserError(f"{path} is a .npz file, not a .npy file of vectors")
    if vectors.ndim != 2 or vectors.dtype not in (np.float16, np.float32):
        raise UserError(
            f"{path} holds {vectors.dtype} of shape {vectors.shape}; rows of float16 or float32 are expected"
        )
    return vectors


# -------------------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class DecodedText:
    """Bytes as text. `certain` is False where they are neither UTF-8 nor marked: then no byte is made up, and bytes
    that are not UTF-8 are U+FFFD in `text`."""

    text: str
    encoding: str  # utf-8, utf-16-le, utf-16-be, utf-32-le, utf-32-be
    certain: bool


_MARKS = (  # the 32-bit ones first: their marks begin with those of 16 bits
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def marked_encoding(head: bytes) -> tuple[str, int] | None:
    """The encoding that a byte order mark at the beginning says (Unicode 16, 23.8), and the mark's length in bytes."""
    return next(((name, len(mark)) for mark, name in _MARKS if head.startswith(mark)), None)


def decode_text(data: bytes) -> DecodedText:
    """Bytes as text: by their byte order mark, which is not part of the text, else as UTF-8.

    Other encodings cannot be told from each other with certainty, so they are not guessed: `certain` is False.
    """
    encoding, start = marked_encoding(data[:4]) or ("utf-8", 0)
    try:
        return DecodedText(data[start:].decode(encoding), encoding, True)
    except UnicodeDecodeError:
        return DecodedText(data[start:].decode(encoding, "replace"), encoding, False)


def read_text(path: str | Path, limit: int = LARGEST_TEXT) -> str:
    """The text of a file that must be text: UnicodeDecodeError becomes a UserError that says how to convert it."""
    found = decode_text(read_bytes(path, limit))
    if not found.certain:
        raise UserError(f"{path}: is not UTF-8. Convert it: `iconv -f WINDOWS-1252 -t UTF-8` (or whatever it is)")
    return found.text


_SURROGATE = re.compile("[\ud800-\udfff]")


def clean(text: str) -> str:
    """A str that UTF-8 can encode: lone surrogates become U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


# -------------------------------------------------------------------------------------------------------------- JSON


def parse_json(data: bytes | str, what: str, *, finite: bool = True, unique: bool = False) -> Any:
    """A JSON value; strings in it can be encoded (no lone surrogates), numbers are finite.

    finite: where False, NaN, Infinity and 1e400 are floats, as Python and those who write by it have them.
    unique: refuse an object in which a key occurs twice (parsers differ in which of the two they believe).

    Raises UserError, naming `what`, for what is not JSON, not UTF-8 (or marked otherwise), nested too deep for this
    interpreter, or holds a number that no float or 4,300-digit integer can be.
    """
    if isinstance(data, bytes):
        found = decode_text(data)
        if not found.certain:
            raise UserError(f"{what}: not JSON: it is not UTF-8")
        data = found.text

    def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(items)) != len(items):
            raise ValueError("a key occurs twice")
        return dict(items)

    def no_number(text: str) -> float:
        raise ValueError(f"{text} is no number of JSON's")

    try:
        strict: dict[str, Any] = {"parse_constant": no_number, "parse_float": _finite} if finite else {}
        return _cleaned(json.loads(data, object_pairs_hook=once if unique else None, **strict))
    except RecursionError:
        raise UserError(f"{what}: not read: it is nested too deep") from None
    except ValueError as e:  # JSONDecodeError, an integer of too many digits, NaN
        raise UserError(f"{what}: not JSON: {e}") from e


def read_json_file(path: str | Path, limit: int = LARGEST_TEXT, *, finite: bool = True) -> Any:
    """The JSON value in a file; raises what `read_bytes` and `parse_json` raise."""
    return parse_json(read_bytes(path, limit), str(path), finite=finite)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_cleaned(v) for v in value]
    if isinstance(value, dict):
        return {clean(k): _cleaned(v) for k, v in value.items()}
    return value


def caption_of(value: Any) -> str | None:
    """The caption in a JSON value: a text as it is, a number as its text (2020 may be one, as in a CSV), of a list the
    first that is not blank; None where there is none, also for true, false, objects and blank text.

    A list holds several captions of one image (COCO, Flickr30k): one of them is taken, always the same.
    """
    if isinstance(value, list):
        return next((found for v in value if not isinstance(v, list) and (found := caption_of(v)) is not None), None)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value) if isinstance(value, int) or math.isfinite(value) else None
    return clean(value) if isinstance(value, str) and value.strip() else None


# ------------------------------------------------------------------------------------------------------ to be shown

# C0 and C1 controls, DEL, and what changes the direction of what follows (Unicode Bidi_Control) or splits lines
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object, most: int | None = None) -> str:
    """Foreign text for a terminal or a log: on one line, controls as escapes, at most `most` characters."""
    shown = _UNSHOWN.sub(lambda m: m[0].encode("unicode_escape", "surrogatepass").decode(), str(text))
    return shown if most is None or len(shown) <= most else shown[: most - 1] + "…"


def error_line(error: Exception) -> str:
    """What a library said of a file that others made, in a line."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return printable(f"{type(error).__name__}: {first}" if not isinstance(error, (ValueError, OSError)) else first, 300)


def first_three(names: Sequence[str], most: int = 240) -> str:
    """Up to three names, as they may be shown, and whether there are more."""
    return ", ".join(printable(n, most) for n in names[:3]) + (", ..." if len(names) > 3 else "")


def markdown(text: object) -> str:
    """Foreign text within a line of Markdown: no image, link, tag or cell of a table comes of it."""
    return re.sub(r"[\\`|]|(?<=\])[(\[]", r"\\\g<0>", printable(text)).replace("<", "&lt;")


def markdown_code(text: object) -> str:
    """Foreign text as code within a line of Markdown, a table's too."""
    return "`" + printable(text).replace("`", "'").replace("|", "\\|") + "`"
