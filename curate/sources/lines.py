"""Text lists cut into lines, records and fields, a block at a time; a broken line costs its own row.

Arrow parses nearly all of a list. A block in which something is odd (a quote within a field, a line with a field too
many) is read record by record: what cannot be read is set apart with its line and the reason, and reading goes on at
the next line, so that a quote that nobody closes swallows nothing.
"""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from aesthetic.errors import UserError
from aesthetic.tables import HEAD, TableShape, kind_of
from aesthetic.untrusted import open_regular
from curate.sources.columns import shown
from curate.sources.problems import unreadable

_BLOCK = 8 << 20  # bytes that are parsed at a time
LONGEST_LINE = 64 << 20
"""Bytes; a longer line is broken. Values that long are no text of anybody's, and hold the memory up."""

_BOMB = 500  # times its size that a gzip file may unpack to, beyond _SMALL bytes; its format allows 1,032
_SMALL = 256 << 20


@dataclass(frozen=True)
class Broken:
    """A line that is no row, and why."""

    line: int | None  # from 1; None where `why` says it
    why: str

    def __str__(self) -> str:
        return self.why if self.line is None else f"line {self.line:,}: {self.why}"


# ------------------------------------------------------------------------------------------------------------- bytes


def read_head(path: Path) -> bytes:
    """The first HEAD bytes of a text list, unpacked where it is a gzip file, whatever its name says.

    Raises UserError for what is no regular file, or another kind of file altogether.
    """
    with open_regular(path) as raw:
        try:
            head = raw.read(HEAD)
            if head.startswith(b"\x1f\x8b"):
                raw.seek(0)
                head = gzip.GzipFile(fileobj=raw).read(HEAD)
        except (OSError, EOFError, zlib.error) as e:
            raise unreadable(path, e) from e
    if kind := kind_of(head):
        raise UserError(f"{path}: is {kind}")
    return head


# what no character stands for becomes three bytes that are no UTF-8, so it is found where all text is checked
codecs.register_error("curate.no_text", lambda e: ("\udfff", e.end))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Block:
    """Whole lines of a list, as UTF-8 (which nothing has checked), the last one ended unless the file ends there."""

    data: bytes
    line: int  # number of the first one, from 1
    last: bool = False  # whether the file ends here
    too_long: bool = False  # one line, of which only the beginning is here


def blocks(path: Path, encoding: str = "utf-8", start: int = 0) -> Iterator[Block]:
    """A text list from byte `start` on, cut at line ends into blocks; a carriage return alone ends no line.

    (But where a file has no other line ends, as old Macs wrote it.)
    """
    rest, line, skipping = b"", 1, False
    for piece in as_utf8(path, encoding, start):
        if skipping:
            end = piece.find(b"\n")
            if end < 0:
                continue
            piece, skipping, line = piece[end + 1 :], False, line + 1
        end = piece.rfind(b"\n") + 1
        if end:
            data = rest + piece[:end]
            yield Block(data, line)
            line += data.count(b"\n")
            rest = piece[end:]
        else:
            rest += piece
            if len(rest) > LONGEST_LINE:
                yield Block(rest[:200], line, too_long=True)
                rest, skipping = b"", True
    yield Block(rest, line, last=True)


def as_utf8(path: Path, encoding: str, start: int) -> Iterator[bytes]:
    """The bytes of a text list from byte `start` on, unpacked, as UTF-8, a piece at a time.

    Raises UserError for a file that unpacks without end.
    """
    decoder = codecs.getincrementaldecoder(encoding)("curate.no_text") if encoding != "utf-8" else None
    mac: bool | None = None
    length = 0
    with open_regular(path) as raw:
        try:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            unpacked: IO[bytes] = gzip.GzipFile(fileobj=raw) if packed else raw  # type: ignore[assignment]
            while piece := unpacked.read(_BLOCK):
                length += len(piece)
                if packed and length > _SMALL and length > _BOMB * raw.tell():
                    raise UserError(f"{path}: unpacks to more than {_BOMB} times its size: no list does")
                skipped, piece, start = piece[:start], piece[start:], max(0, start - len(piece))
                if decoder is not None:
                    piece = decoder.decode(piece).encode("utf-8", "surrogatepass")
                if mac is None and piece:
                    head = piece[:HEAD]
                    mac = b"\r" in head and b"\n" not in head + skipped and len(piece) > piece.index(b"\r") + 1
                yield piece.replace(b"\r", b"\n") if mac else piece
        except (OSError, EOFError, zlib.error) as e:
            raise unreadable(path, e) from e
    if decoder is not None and (rest := decoder.decode(b"", final=True)):
        yield rest.encode("utf-8", "surrogatepass")


def enumerate_lines(path: Path, encoding: str, start: int) -> Iterator[tuple[int, bytes | Broken]]:
    """The lines of a text list that are not blank, without their ends, with their numbers."""
    for block in blocks(path, encoding, start):
        if block.too_long:
            yield block.line, _too_long(block)
            continue
        for number, text in enumerate(block.data.split(b"\n"), block.line):
            if text := text.strip(b" \t\r\n"):
                yield number, text


def _too_long(block: Block) -> Broken:
    return Broken(block.line, f"longer than {LONGEST_LINE >> 20} MB: {shown(block.data)}")


# ------------------------------------------------------------------------------------------------------------ records


@dataclass
class Records:
    """Some records of a table: a column of bytes for each name, and what is broken among them.

    Broken lines have a row like all others, in which every column is null.
    """

    columns: list[pa.Array]
    rows: int
    broken: dict[int, Broken] = field(default_factory=dict)  # row -> what is wrong with it


class CsvReader:
    """A table in a text file: records of as many fields as its header has.

    `quoted` says that a field may stand in quotes as csv has it ("a ""b"", c"), over several lines too; else quotes
    mean nothing. `url` is the place of the column of URLs: a row is looked for in what a quote holds.
    """

    def __init__(self, path: Path, shape: TableShape, quoted: bool, url: int | None = None) -> None:
        self.path, self.shape, self.quoted = path, shape, quoted
        self._count, self._url = len(shape.names), url
        self._delimiter = shape.delimiter.encode()
        self._cell = re.compile(rb"[^\n" + re.escape(self._delimiter) + rb"]*+")
        may_precede = {*self._delimiter, *b'\n"'}
        self._before = np.array([c in may_precede for c in range(256)])
        self._after = np.array([c in may_precede | {*b"\r"} for c in range(256)])

    def records(self, wanted: Sequence[int]) -> Iterator[Records]:
        """The records below the header, of the wanted columns."""
        rest, line, header = b"", 1, True
        for block in blocks(self.path, self.shape.encoding, self.shape.start):
            if block.too_long:
                yield Records([pa.nulls(1, pa.binary())] * len(wanted), 1, {0: _too_long(block)})
                continue
            data, line = rest + block.data, line if rest else block.line
            if header and data:
                end = data.find(b"\n") + 1 or len(data)
                if self.quoted and data.count(b'"', 0, end) % 2:  # a name that goes over several lines
                    fields, after = self._record(data, 0)
                    end = after if isinstance(fields, list) and len(fields) == self._count else end
                line += data.count(b"\n", 0, end)
                data, header = data[end:], False
            records, used = self._parse(data, line, wanted, block.last)
            line += data.count(b"\n", 0, used)
            rest = data[used:]
            if records.rows:
                yield records

    def _parse(self, data: bytes, line: int, wanted: Sequence[int], last: bool) -> tuple[Records, int]:
        """The records of a block, by Arrow where nothing is odd in it, and how many bytes they take."""
        used = len(data)
        odd = b"\r" in data and data.count(b"\r") != data.count(b"\r\n")
        if self.quoted and b'"' in data:
            odd, used = (True, used) if odd else self._odd_quotes(data, last)
        if not odd:
            found = self._by_arrow(data[:used] if used < len(data) else data, wanted)
            if found is not None:
                return found, used
        return self._one_by_one(data, line, wanted, last)

    def _odd_quotes(self, data: bytes, last: bool) -> tuple[bool, int]:
        """Whether a quote stands where csv has none, or holds what looks like rows; and where the last record ends."""
        text = np.frombuffer(data, np.uint8)
        quotes, ends = np.flatnonzero(text == ord('"')), np.flatnonzero(text == ord("\n"))
        within = np.searchsorted(quotes, ends) % 2 == 1
        used = len(data)
        if len(quotes) % 2:
            whole = ends[~within]
            if last or not len(whole):
                return True, used
            used = int(whole[-1]) + 1
            quotes, ends, within = quotes[quotes < used], ends[ends < used], within[ends < used]
            if len(quotes) % 2:
                return True, used
        opening, closing = quotes[0::2], quotes[1::2]
        before = text[opening[opening > 0] - 1]
        after = text[closing[closing + 1 < len(text)] + 1]
        if not self._before[before].all() or not self._after[after].all():
            return True, used
        # between its lines a quoted field may hold rows, which a quote that was not meant has swallowed
        first = np.unique(np.searchsorted(quotes, ends[within]))
        return any(b"//" in data[quotes[i - 1] : quotes[i]] for i in first.tolist()), used

    def _by_arrow(self, data: bytes, wanted: Sequence[int]) -> Records | None:
        """The records of a block, or None where one has another number of fields than the header."""
        names = [str(i) for i in range(self._count)]
        columns = [names[i] for i in wanted or [0]]
        if not data.strip(b"\r\n"):
            return Records([pa.array([], pa.binary()) for _ in wanted], 0)
        try:
            found = pa_csv.read_csv(
                pa.BufferReader(data),
                read_options=pa_csv.ReadOptions(block_size=_BLOCK * 32, column_names=names),
                parse_options=pa_csv.ParseOptions(
                    delimiter=self.shape.delimiter,
                    quote_char='"' if self.quoted else False,
                    newlines_in_values=self.quoted,
                ),
                convert_options=pa_csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.binary()),
                    include_columns=columns,
                    null_values=[""],
                    strings_can_be_null=True,
                ),
            )
        except pa.ArrowInvalid:
            return None
        arrays = [c.combine_chunks() if isinstance(c, pa.ChunkedArray) else c for c in found.columns]
        return Records(arrays if wanted else [], found.num_rows)

    def _one_by_one(self, data: bytes, line: int, wanted: Sequence[int], last: bool) -> tuple[Records, int]:
        rows: list[list[bytes] | None] = []
        broken: dict[int, Broken] = {}
        at = 0
        while at < len(data):
            end = data.find(b"\n", at) + 1 or len(data)
            text = data[at:end].rstrip(b"\r\n")
            if not text:
                at, line = end, line + 1
                continue
            fields: list[bytes] | str = text.split(self._delimiter)
            after = end
            if self.quoted and b'"' in text:
                fields, after = self._record(data, at)
                if after < 0:  # a quote that is not closed in this block
                    if not last and len(data) - at < LONGEST_LINE:
                        break
                    after = end
            if isinstance(fields, list) and len(fields) != self._count:
                fields = f"{len(fields):,} fields, where the header has {self._count:,}"
            if isinstance(fields, list) and after > end and self._swallowed(data[end:after]):
                fields = "a quote is not closed on this line"
            if isinstance(fields, list):
                rows.append(fields)
                line += data.count(b"\n", at, after)
                at = after
            else:
                broken[len(rows)] = Broken(line, f"{fields}: {shown(text)}")
                rows.append(None)
                at, line = end, line + 1
        columns = [pa.array([r[i] or None if r else None for r in rows], pa.binary()) for i in wanted]
        return Records(columns, len(rows), broken), at

    _QUOTED = re.compile(rb'"((?:[^"]++|"")*+)"')

    def _record(self, data: bytes, at: int) -> tuple[list[bytes] | str, int]:
        """The fields of the record at a place, or what is wrong with it; and where it ends, -1 where it does not."""
        fields = []
        while True:
            if data[at : at + 1] == b'"':
                quoted = self._QUOTED.match(data, at)
                if quoted is None:
                    return "a quote is not closed", -1
                fields.append(quoted[1].replace(b'""', b'"'))
                at = quoted.end()
                if data[at : at + 2] == b"\r\n" or (data[at : at + 1] == b"\r" and at + 1 == len(data)):
                    at += 1
            else:
                cell = self._cell.match(data, at)
                assert cell is not None
                fields.append(cell[0])
                at = cell.end()
                if data[at : at + 1] != self._delimiter:
                    fields[-1] = fields[-1].removesuffix(b"\r")
            after = data[at : at + 1]
            if after in (b"", b"\n"):
                return fields, at + len(after)
            if after != self._delimiter:
                return "text after a closing quote", at
            at += 1

    def _swallowed(self, lines: bytes) -> bool:
        """Whether lines that a quoted field holds are rows of the list: as many fields, and a URL where URLs are."""
        for text in lines.split(b"\n"):
            fields = text.rstrip(b"\r").split(self._delimiter)
            if self._url is not None and len(fields) == self._count:
                url = fields[self._url].strip(b' "').lower()
                if url.startswith((b"http://", b"https://", b"//")):
                    return True
        return False


_QUOTING_SAMPLE = 16 << 20  # bytes of a .tsv in which quoting is looked for


def is_quoted(path: Path, shape: TableShape) -> bool:
    """Whether the fields of a table stand in quotes as csv has it. Those of a .csv do; a .tsv's where it shows.

    That is: every field that begins with a quote also ends with one, quotes in between are doubled, and somewhere
    quotes were needed (around a tab, a line end, a quote), or the header or all lines have them.
    """
    if shape.delimiter != "\t":
        return True
    data = b""
    for block in blocks(path, shape.encoding, shape.start):
        data += block.data
        if len(data) >= _QUOTING_SAMPLE:
            break
    data = data.replace(b"\r\n", b"\n")
    delimiter = shape.delimiter.encode()
    begins = re.compile(rb"(?:^|(?<=[\n" + re.escape(delimiter) + rb']))"')
    field = re.compile(rb'"((?:[^"]++|"")*+)"(?=[\n' + re.escape(delimiter) + rb"]|$)")
    if data.startswith(b'"') and (quoted := field.match(data)) and b"\n" not in quoted[0]:
        return True
    at, needed, found = 0, 0, 0
    while begun := begins.search(data, at):
        quoted = field.match(data, begun.start())
        if quoted is None:  # the last one may go on behind what was read
            return needed > 0 and data.find(b'"', begun.end()) < 0
        found += 1
        needed += b'""' in quoted[1] or b"\n" in quoted[1] or delimiter in quoted[1]
        at = quoted.end()
    return needed > 0 or found >= max(2, data.count(b"\n") - 1)
