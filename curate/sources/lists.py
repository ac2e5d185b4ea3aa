"""List files of every format as inputs: parquet, csv and tsv, json, lines of JSON, URLs one a line."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from aesthetic.errors import UserError
from aesthetic.tables import table_shape
from aesthetic.untrusted import clean, marked_encoding, printable
from curate.sources.columns import as_text, plain_type, shown
from curate.sources.inputs import MOST_COLUMNS, Input, RowsInput, failure_columns
from curate.sources.lines import Broken, CsvReader, as_utf8, enumerate_lines, is_quoted, read_head
from curate.sources.listing import KNOWN_FORMATS, list_format
from curate.sources.parquet import BATCH, open_parquet, parquet_batches
from curate.sources.problems import Problems

_SPACE = re.compile(r"\s*")
_LONGEST_OBJECT = 64 << 20  # characters; a JSON object that is still open after that many is taken for a broken one


def open_list(path: Path, url: str, caption: str | None) -> Input:
    """A list file as an input. Raises UserError where it cannot be read or lacks a column that is named."""
    match list_format(path.name):
        case "parquet":
            return ParquetInput(path, url, caption)
        case "csv":
            return CsvInput(path, ",", url, caption)
        case "tsv":
            return CsvInput(path, "\t", url, caption)
        case "json" | "jsonl":
            return JsonInput(path, url, caption)
        case "txt":
            return TxtInput(path, url, caption)
    raise UserError(f"{path}: not a list that can be read: {KNOWN_FORMATS}.")


class ParquetInput(Input):
    """A parquet file; rows and columns that are not asked for are not read."""

    def __init__(self, path: Path, url: str, caption: str | None) -> None:
        super().__init__(path)
        file = open_parquet(path)
        arrow = file.schema_arrow
        self.resolve(arrow.names, url, caption)
        self.schema = pa.schema([(f.name, plain_type(f.type)) for f in arrow])
        self.rows = file.metadata.num_rows
        groups = range(file.metadata.num_row_groups)
        self.largest_group = max((file.metadata.row_group(g).num_rows for g in groups), default=0)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        yield from parquet_batches(self.path, columns)


# --------------------------------------------------------------------------------------------------------- csv and tsv

_NOT_A_NUMBER = "^([Nn]a[Nn]|NAN)$"
_WRITTEN_AS = {
    pa.int64(): "^-?(0|[1-9][0-9]*)$",
    # no more than 15 digits before the point: longer integers (hashes) would lose some
    pa.float64(): r"^-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?([eE][-+]?[0-9]{1,2})?$|" + _NOT_A_NUMBER,
    pa.bool_(): "^(true|false|True|False)$",
}


class CsvInput(Input):
    """A csv or tsv file with a header line; whatever delimits its fields, and however it is encoded.

    A column is integers, decimal numbers or true/false where every value is written so that nothing is lost (007 and
    1e400 stay text); an empty field is null. The url and caption columns are text.
    """

    def __init__(self, path: Path, delimiter: str, url: str, caption: str | None) -> None:
        super().__init__(path)
        shape = table_shape(read_head(path), delimiter, str(path))
        self._names = [n.replace("\0", "") for n in shape.names]
        if any(n.startswith(("http://", "https://", "//")) for n in self._names):
            raise UserError(f"{path}: has no header line with the column names; its first line is a row. Add one.")
        if any("\ufffd" in n for n in self._names):
            raise UserError(
                f"{path}: the header is not UTF-8. Convert the list: `iconv -f WINDOWS-1252 -t UTF-8` "
                "(or whatever it is)"
            )
        if len(self._names) > MOST_COLUMNS:
            raise UserError(f"{path}: the header has {len(self._names):,} columns; at most {MOST_COLUMNS:,} are read")
        self.resolve(self._names, url, caption)
        url_index = self._names.index(self.url) if self.url else None
        self._reader = CsvReader(path, shape, is_quoted(path, shape), url_index)
        possible = {n: [t for t in _WRITTEN_AS if n not in (self.url, self.caption)] for n in self._names}
        filled = set()
        self.rows = 0
        for batch, broken in self._as_text(self._names, self.problems):
            self.rows += batch.num_rows
            for line in broken.values():
                self.problems.add("broken", str(line))
            for name in self._names:
                values = batch.column(name).drop_null()
                if len(values):
                    filled.add(name)
                    possible[name] = [t for t in possible[name] if _is_written_as(t, values)]
        self.check_broken(f". The header: {printable(shape.delimiter.join(self._names), 100)}")
        types = [(n, t[0] if t and n in filled else pa.string()) for n, t in possible.items()]
        self.schema = pa.schema(types)

    def _as_text(
        self, columns: Sequence[str], problems: Problems | None = None
    ) -> Iterator[tuple[pa.RecordBatch, dict[int, Broken]]]:
        """The rows as text, and those of them that are broken."""
        start = 0
        for records in self._reader.records([self._names.index(n) for n in columns]):
            arrays, broken = [], records.broken
            for name, raw in zip(columns, records.columns, strict=True):
                text = as_text(raw, problems if name != self.url else None, name, start)
                if name == self.url and text.null_count > raw.null_count:  # a URL that is no text names nothing
                    for row in pc.indices_nonzero(pc.and_(pc.is_null(text), pc.is_valid(raw))).to_pylist():
                        why = f"row {start + row + 1:,}: the URL is not UTF-8: {shown(raw[row].as_py())}"
                        broken[row] = Broken(None, why)
                arrays.append(text)
            whole = pa.RecordBatch.from_arrays(arrays, names=list(columns))
            for first in range(0, records.rows, BATCH):
                part = {r - first: b for r, b in broken.items() if first <= r < first + BATCH} if broken else {}
                yield whole.slice(first, BATCH), part
            start += records.rows

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        wanted = [n for n in self._names if n in columns or n == self.url]
        for batch, broken in self._as_text(wanted):
            arrays = [_parse(batch.column(n), self.schema.field(n).type) for n in wanted]
            if self.own_columns:
                arrays += failure_columns(batch.num_rows, broken)
            yield pa.RecordBatch.from_arrays(arrays, names=[*wanted, *(n for n, _ in self.own_columns)])


def _is_written_as(t: pa.DataType, values: pa.Array) -> bool:
    if not pc.all(pc.match_substring_regex(values, _WRITTEN_AS[t])).as_py():
        return False
    try:
        _parse(values, t)
    except pa.ArrowInvalid:  # an integer of more than 64 bits
        return False
    return True


def _parse(values: pa.Array, t: pa.DataType) -> pa.Array:
    if pa.types.is_floating(t):
        values = pc.if_else(pc.match_substring_regex(values, _NOT_A_NUMBER), pa.scalar(None, pa.string()), values)
    return values.cast(t)


# ------------------------------------------------------------------------------------------------------- JSON and lines


class JsonInput(RowsInput):
    """A JSON array of objects (.json), or one JSON object a line."""

    def __init__(self, path: Path, url: str, caption: str | None) -> None:
        super().__init__(path)
        head = read_head(path)
        self._encoding, self._start = marked_encoding(head[:4]) or ("utf-8", 0)
        self.scan()
        is_array = head[self._start :].lstrip()[:1] == b"["
        self.check_broken(". An array [{...}, ...] is called .json" if is_array else "")
        self.resolve(self.schema.names, url, caption)
        self.finish()

    def objects(self) -> Iterator[dict[str, Any] | Broken]:
        for item in self._items() if list_format(self.path.name) == "json" else self._lines():
            if not isinstance(item, Broken) and not all(n.isascii() and "\0" not in n for n in item):
                item = {clean(n).replace("\0", ""): v for n, v in item.items()}
            yield item

    def _lines(self) -> Iterator[dict[str, Any] | Broken]:
        for number, line in enumerate_lines(self.path, self._encoding, self._start):
            if isinstance(line, Broken):
                yield line
                continue
            try:
                item = json.loads(line.decode("utf-8", "surrogateescape"))
            except RecursionError:
                yield Broken(number, f"nested too deep: {shown(line)}")
            except ValueError as e:
                yield Broken(number, f"not JSON: {printable(e, 100)}: {shown(line)}")
            else:
                yield item if isinstance(item, dict) else Broken(number, f"no object {{...}}: {shown(line)}")

    def _items(self) -> Iterator[dict[str, Any]]:
        """The items of an array, of which only a piece is in memory."""
        # bytes that are no text are escaped as surrogates
        pieces = codecs.iterdecode(as_utf8(self.path, self._encoding, self._start), "utf-8", "surrogateescape")
        decoder = json.JSONDecoder()
        buffer, items = next(pieces, ""), 0
        at = _after_space(buffer, 0)
        if buffer[at : at + 1] != "[":
            raise UserError(f"{self.path}: an array [{{...}}, ...] is needed. One object a line? Name it .jsonl")
        at += 1
        while True:
            at = _after_space(buffer, at)
            if buffer[at : at + 1] == "]":
                return
            try:
                start = at
                if items:
                    if buffer[at : at + 1] != ",":
                        raise json.JSONDecodeError("a comma or ] is needed", buffer, at)
                    start = _after_space(buffer, at + 1)
                item, end = decoder.raw_decode(buffer, start)
            except json.JSONDecodeError as e:
                more = next(pieces, "") if len(buffer) - at < _LONGEST_OBJECT else ""
                if not more:
                    raise UserError(f"{self.path}, item {items + 1}: not JSON, or cut short: {e.msg}") from e
                buffer, at = buffer[at:] + more, 0
                continue
            except (RecursionError, ValueError) as e:  # a number of too many digits
                why = "nested too deep" if isinstance(e, RecursionError) else f"not JSON: {printable(e, 100)}"
                raise UserError(f"{self.path}, item {items + 1}: {why}") from e
            items, at = items + 1, end
            if not isinstance(item, dict):
                beginning = printable(json.dumps(item), 60)
                raise UserError(f"{self.path}, item {items}: an object {{...}} is needed, not {beginning}")
            yield item


def _after_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space is not None
    return space.end()


class TxtInput(RowsInput):
    """One URL a line; empty lines are no rows."""

    def __init__(self, path: Path, url: str, caption: str | None) -> None:
        super().__init__(path)
        self.resolve(["url"], url, caption)
        head = read_head(path)
        self._encoding, self._start = marked_encoding(head[:4]) or ("utf-8", 0)
        first = next((line for line in head.splitlines() if line.strip()), b"")
        if b"\t" in first.strip():
            raise UserError(f"{path}: is a table, not a URL a line. Name it .tsv, with a header line of column names.")
        self.scan()
        self.check_broken()
        self.schema = pa.schema([("url", pa.string())])

    def objects(self) -> Iterator[dict[str, Any] | Broken]:
        for number, line in enumerate_lines(self.path, self._encoding, self._start):
            if isinstance(line, Broken):
                yield line
                continue
            try:
                url = line.decode().strip()
            except UnicodeDecodeError:
                yield Broken(number, f"not UTF-8: {shown(line)}")
            else:
                if url:
                    yield {"url": url}
