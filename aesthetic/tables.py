"""Tables in text files as others write them: what a file is by its first bytes, its encoding, delimiter and header.

Excel writes semicolons where the comma is the decimal point, `sep=;` as a first line, tabs and UTF-16 as "Unicode
text"; a .csv may hold tabs. What is certain is read; what is something else altogether is said by name.
"""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass

from aesthetic.errors import UserError
from aesthetic.untrusted import marked_encoding

HEAD = 1 << 16
"""Bytes of a file's beginning that are enough for the functions here."""

DELIMITERS = (",", "\t", ";", "|", "=")  # the last is that of the EVA data set
_LINES = 50  # of the head, that the delimiters are tried on

_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "a gzip file: unpack it with `gunzip`"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file: unpack it with `zstd -d`"),
    (b"BZh", "a bzip2 file: unpack it with `bunzip2`"),
    (b"\xfd7zXZ\0", "an xz file: unpack it with `unxz`"),
    (b"PK\x03\x04", "a zip file (or a spreadsheet such as .xlsx): unpack it, or save it as .csv"),
    (b"7z\xbc\xaf", "a 7z file: unpack it"),
    (b"\xd0\xcf\x11\xe0", "an old Office file such as .xls: save it as .csv"),
    (b"PAR1", "a parquet file"),
    (b"ARROW1", "an Arrow file: save it as parquet"),
    (b"Obj\x01", "an Avro file: save it as parquet"),
    (b"ORC", "an ORC file: save it as parquet"),
    (b"SQLite format 3\0", "an SQLite file: export the table as .csv"),
    (b"%PDF-", "a PDF file"),
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself: `git lfs pull` brings it"),
)


def kind_of(head: bytes) -> str | None:
    """What a file is, in words, by its first bytes: gzip, zip, parquet, a web page ...; None where it may be text."""
    found = next((kind for magic, kind in _KINDS if head.startswith(magic)), None)
    if found is None and head[:64].lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith(
        (b"<!doctype", b"<html", b"<?xml")
    ):
        return "a web page or XML: was it downloaded from a page that asks for a login?"
    return found


@dataclass(frozen=True)
class TableShape:
    """How a table of text is written."""

    encoding: str  # what a byte order mark says, else utf-8 (which nothing has checked)
    start: int  # bytes before the header line: the mark, empty lines, and a line such as `sep=;`
    delimiter: str
    names: tuple[str, ...]  # the header's, without the white space around them


def table_shape(head: bytes, usual: str, what: str) -> TableShape:
    """The shape of the table whose file begins with `head` (at least a line, HEAD bytes are enough).

    `usual` is the delimiter that the file's name says; another one is taken where the header and the lines below it
    show that the name is wrong. Raises UserError, naming `what`, for a file that is empty or no text.
    """
    if kind := kind_of(head):
        raise UserError(f"{what}: is {kind}")
    encoding, mark = marked_encoding(head[:4]) or ("utf-8", 0)
    if not mark and b"\0" in head[:4] and head.strip(b"\0"):
        name = "UTF-16LE" if head[1:2] == b"\0" else "UTF-16BE"
        raise UserError(f"{what}: looks like {name} without a byte order mark. Convert it: `iconv -f {name} -t UTF-8`")
    text = head[mark:].decode(encoding, "replace")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    first = next((i for i, line in enumerate(lines) if line.strip()), len(lines))
    top = lines[first].strip(" \r\n").strip('"') if first < len(lines) else ""
    stated = top[4] if len(top) == 5 and top[:4].lower() == "sep=" else None  # as Excel reads and writes it
    if stated or (first < len(lines) and lines[first].startswith("#TYPE ")):  # Windows PowerShell's Export-Csv
        first += 1
    if not "".join(lines[first:]).strip():
        raise UserError(f"{what}: is empty; a header line with the column names is needed.")
    above = 0  # characters before the header; a line ends at \n, \r\n or \r
    for line in lines[:first]:
        above += len(line) + (2 if text.startswith("\r\n", above + len(line)) else 1)
    start = mark + len(text[:above].encode(encoding))
    sample = lines[first : first + _LINES]
    if len(head) >= HEAD and len(sample) > 1:
        sample.pop()  # may be cut
    delimiter = stated or _delimiter(sample, usual)
    header, rest = lines[first], first + 1
    while header.count('"') % 2 and rest < min(first + 10, len(lines)):  # a name that goes over several lines
        header, rest = f"{header}\n{lines[rest]}", rest + 1
    names = _fields(header if header.count('"') % 2 == 0 else lines[first], delimiter)
    return TableShape(encoding, start, delimiter, tuple(n.strip("\ufeff \t\r\n\xa0") for n in names))


def _fields(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [""])
    except csv.Error:
        return line.split(delimiter)


def _delimiter(lines: list[str], usual: str) -> str:
    """The delimiter that cuts the header and most lines into equally many fields, more than one; else the usual one."""
    lines = [line for line in lines if line]
    found = []
    for delimiter in (usual, *(d for d in DELIMITERS if d != usual)):
        counts = [len(_fields(line, delimiter)) for line in lines]
        agree = Counter(counts)[counts[0]] / len(counts)
        if counts[0] > 1 and agree >= 0.5:
            found.append((delimiter == usual and agree >= 0.8, agree, counts[0], delimiter))
    return max(found)[-1] if found else usual
