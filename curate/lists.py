"""List files: one file of any kind as a stream of typed columns, read in pieces however long it is.

Text is made text by one rule, wherever it comes from: bytes that are not UTF-8 and lone surrogates become U+FFFD, NUL
stays, null stays null. A number that is not finite is null (JSON has none, and SQL takes NaN for the largest number).
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from aesthetic.untrusted import clean as clean
from curate.store import UserError, sha256_file

BATCH = 65_536
"""Rows that are held at a time."""

_TEXT_FORMATS = ("csv", "tsv", "json", "jsonl", "ndjson", "txt")
URL_NAMES = ("url", "image_url")
CAPTION_NAMES = ("caption", "text", "alt")
_CHUNK = 1 << 20  # characters of a JSON array that are read at a time
_LONGEST_OBJECT = 64 << 20  # characters; a JSON object that is still open after that many is taken for a broken one


def list_format(name: str) -> str | None:
    """The format that a file's name says: parquet, csv, tsv, json, jsonl, txt, or None for no list at all."""
    parts = name.lower().split(".")
    if parts[-1] == "parquet" and len(parts) > 1:
        return "parquet"
    if parts[-1] == "gz":
        parts.pop()
    if len(parts) < 2 or parts[-1] not in _TEXT_FORMATS:
        return None
    return "jsonl" if parts[-1] == "ndjson" else parts[-1]


KNOWN_FORMATS = ".parquet, or .csv, .tsv, .json, .jsonl, .ndjson, .txt, each also with .gz"


# ---------------------------------------------------------------------------------------------------------- columns


def named(names: Sequence[str], wanted: str, aliases: Sequence[str]) -> str | None:
    """The wanted name where it is there, else the first that is one of the aliases in small or capital letters."""
    if wanted in names:
        return wanted
    return next((n for alias in aliases for n in names if n.lower() == alias), None)


def _find(names: Sequence[str], wanted: str, default: str, aliases: Sequence[str], where: str) -> str | None:
    """As `named`, but only the default name stands for others: what someone asked for by name must be there."""
    if wanted not in names and wanted != default:
        raise UserError(f"{where}: there is no column {wanted!r} (source.{default}). {describe(names, wanted)}")
    return named(names, wanted, aliases)


def describe(names: Iterable[str], wanted: str | None = None) -> str:
    """A sentence that lists the columns that are there, after the one that is nearest to the wanted name."""
    names = list(names)
    folded = {n.lower(): n for n in names}
    near = difflib.get_close_matches(wanted.lower(), folded, 1) if wanted else []
    hint = f"Did you mean {folded[near[0]]!r}? " if near else ""
    return f"{hint}Columns: {', '.join(names) or 'none'}."


def common_type(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The type of a column whose files say `a` and `b`: the wider number, else text; None where there is none."""
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if pa.types.is_integer(a) and pa.types.is_integer(b):
        return pa.int64() if pa.uint64() not in (a, b) else pa.string()  # int64 and uint64 share no integer type
    if _is_number(a) and _is_number(b):
        return pa.float64()
    scalar = [_is_number(t) or pa.types.is_string(t) or pa.types.is_boolean(t) for t in (a, b)]
    return pa.string() if all(scalar) else None


def _is_number(t: pa.DataType) -> bool:
    return pa.types.is_integer(t) or pa.types.is_floating(t)


def plain_type(t: pa.DataType) -> pa.DataType:
    """The type that a column has once it is `plain`."""
    if isinstance(t, pa.BaseExtensionType):
        return plain_type(t.storage_type)
    if pa.types.is_dictionary(t):
        return plain_type(t.value_type)
    if pa.types.is_large_string(t) or pa.types.is_string_view(t):
        return pa.string()
    if pa.types.is_large_binary(t) or pa.types.is_binary_view(t):
        return pa.binary()
    return pa.float32() if pa.types.is_float16(t) else t


def plain(column: pa.Array) -> pa.Array:
    """A column without dictionaries, large offsets, extension types, broken UTF-8 and numbers that are not finite."""
    if isinstance(column, pa.ExtensionArray):
        return plain(column.storage)
    if pa.types.is_dictionary(column.type):
        return plain(column.dictionary_decode())
    column = column.cast(plain_type(column.type))
    if pa.types.is_string(column.type):
        return _valid(column.cast(pa.binary()))
    if pa.types.is_floating(column.type):
        return pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
    return column


def as_type(column: pa.Array, wanted: pa.DataType) -> pa.Array:
    """A plain column in the type that all files of the list agree on."""
    if column.type == wanted:
        return column
    if pa.types.is_string(wanted) and pa.types.is_binary(column.type):
        return _valid(column)
    return column.cast(wanted, safe=not pa.types.is_floating(wanted))  # 2**53 + 1 rounds where others have fractions


def _valid(binary: pa.Array) -> pa.Array:
    try:
        return binary.cast(pa.string())  # checks UTF-8; nearly every list passes
    except pa.ArrowInvalid:
        return pa.array([v if v is None else v.decode("utf-8", "replace") for v in binary.to_pylist()], pa.string())


# ----------------------------------------------------------------------------------------------------------- inputs


class Notes:
    def sentences(self) -> list[str]:
        return []


class Input:
    """One file of the list (or one tar, or one folder of images): its columns, and its rows as a stream.

    `schema` holds the columns under the list's own names; `local` says that `batches` adds the place of the bytes.
    """

    url: str | None
    caption: str | None
    schema: pa.Schema
    rows: int
    local = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: Any = Notes()

    def digest(self) -> str:
        """A sha256 that names what is in this input."""
        return sha256_file(self.path)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """All rows in order, at most BATCH at a time, with at least the named columns in `schema`'s types."""
        raise NotImplementedError

    def resolve(self, names: Sequence[str], url: str, caption: str | None) -> None:
        """Find the two columns among the names, which must differ from each other."""
        twice = sorted({n for n in names if list(names).count(n) > 1})
        if twice:
            raise UserError(f"{self.path}: two columns are called {twice[0]!r}. Rename one of them.")
        self.url = _find(names, url, "url", URL_NAMES, str(self.path))
        self.caption = None
        if caption is not None:
            self.caption = _find(names, caption, "caption", CAPTION_NAMES, str(self.path))


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


def open_parquet(path: Path) -> pq.ParquetFile:
    """A parquet file whose column chunks are read in pieces: a row group may be larger than the memory."""
    try:
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError) as e:
        raise _unreadable(path, e) from e


def parquet_batches(path: Path, columns: Sequence[str], groups: list[int] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of some row groups (default: all), with the named columns that the file has, plain."""
    file = open_parquet(path)
    names = [n for n in file.schema_arrow.names if n in columns]
    try:
        for batch in file.iter_batches(BATCH, row_groups=groups, columns=names):
            arrays = [plain(batch.column(n)) for n in names]
            yield pa.RecordBatch.from_arrays(arrays, names=names) if names else batch
    except (pa.ArrowException, OSError) as e:
        raise _unreadable(path, e) from e


class CsvInput(Input):
    """A csv or tsv file with a header line.

    Quoting is csv's, also in tsv. A column is integers, decimal numbers or true/false where every value is written
    so that nothing is lost (007 and 1e400 stay text); an empty field is null. The url and caption columns are text.
    """

    def __init__(self, path: Path, delimiter: str, url: str, caption: str | None) -> None:
        super().__init__(path)
        self._delimiter = delimiter
        self._names = self._header()
        self.resolve(self._names, url, caption)
        possible = {n: [k for k in _WRITTEN_AS if n not in (self.url, self.caption)] for n in self._names}
        filled = set()
        self.rows = 0
        for batch in self._strings(self._names):
            self.rows += batch.num_rows
            for name in self._names:
                values = batch.column(name).drop_null()
                if len(values):
                    filled.add(name)
                    possible[name] = [k for k in possible[name] if _is_written_as(k, values)]
        kinds = {n: possible[n][0] if possible[n] and n in filled else pa.string() for n in self._names}
        self.schema = pa.schema(list(kinds.items()))

    def _header(self) -> list[str]:
        # read here and not by Arrow, whose errors do not tell a file without rows from one without anything
        with open_text(self.path) as f:
            try:
                text = io.TextIOWrapper(f, "utf-8-sig", "replace", newline="")
                names = next(line for line in csv.reader(text, delimiter=self._delimiter) if line)
            except StopIteration:
                raise UserError(f"{self.path}: is empty; a header line with the column names is needed.") from None
            except (csv.Error, OSError, EOFError) as e:
                raise _unreadable(self.path, e) from e
        if any(n.startswith(("http://", "https://")) for n in names):
            raise UserError(f"{self.path}: has no header line with the column names; its first line is a row. Add one.")
        return names

    def _strings(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        try:
            # bytes, not text: one that is not UTF-8 is ours to replace
            with open_text(self.path) as f:
                reader = pa_csv.open_csv(
                    f,
                    read_options=pa_csv.ReadOptions(block_size=8 << 20, column_names=self._names, skip_rows=0),
                    parse_options=pa_csv.ParseOptions(delimiter=self._delimiter, newlines_in_values=True),
                    convert_options=pa_csv.ConvertOptions(
                        column_types=dict.fromkeys(self._names, pa.binary()),
                        include_columns=list(columns),
                        null_values=[""],
                        strings_can_be_null=True,
                    ),
                )
                header = 1  # as the names are given, Arrow takes the header for the first row
                for batch in reader:
                    rows = batch.slice(header)
                    header = 0
                    for start in range(0, rows.num_rows, BATCH):
                        part = rows.slice(start, BATCH)
                        yield pa.RecordBatch.from_arrays([_valid(c) for c in part.columns], names=part.schema.names)
        except (pa.ArrowException, OSError, EOFError) as e:
            raise _unreadable(self.path, e) from e

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        wanted = [n for n in self._names if n in columns]
        for batch in self._strings(wanted):
            arrays = [_parse(batch.column(n), self.schema.field(n).type) for n in wanted]
            yield pa.RecordBatch.from_arrays(arrays, names=wanted)


_NOT_A_NUMBER = "^([Nn]a[Nn]|NAN)$"
_WRITTEN_AS = {
    pa.int64(): "^-?(0|[1-9][0-9]*)$",
    # no more than 15 digits before the point: longer integers (hashes) would lose some
    pa.float64(): r"^-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?([eE][-+]?[0-9]{1,2})?$|" + _NOT_A_NUMBER,
    pa.bool_(): "^(true|false|True|False)$",
}


def _is_written_as(kind: pa.DataType, values: pa.Array) -> bool:
    if not pc.all(pc.match_substring_regex(values, _WRITTEN_AS[kind])).as_py():
        return False
    try:
        _parse(values, kind)
    except pa.ArrowInvalid:  # an integer of more than 64 bits
        return False
    return True


def _parse(values: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_floating(kind):
        values = pc.if_else(pc.match_substring_regex(values, _NOT_A_NUMBER), pa.scalar(None, pa.string()), values)
    return values.cast(kind)


class RowsInput(Input):
    """Rows that come as dicts: from JSON, text lines, tars and folders. They are gone through once for the types."""

    extra: tuple[tuple[str, pa.DataType], ...] = ()
    """Columns of ours that every dict has, beside those of the list."""

    def objects(self) -> Iterator[dict[str, Any]]:
        """The rows in order; called more than once."""
        raise NotImplementedError

    def scan(self) -> None:
        """Count the rows and find the columns, in order of appearance, and the type of each.

        A column of integers and other numbers is float64, one of several kinds is text, and what is nested is JSON
        text.
        """
        ours = {name for name, _ in self.extra}
        kinds: dict[str, set[type]] = {}
        content = hashlib.sha256()
        self.rows = 0
        for row in self.objects():
            self.rows += 1
            content.update(json.dumps(row, default=str).encode() + b"\n")
            for name, value in row.items():
                if name not in ours:
                    seen = kinds.setdefault(name, set())
                    if value is not None:
                        seen.add(_kind(value))
        self.content = content.hexdigest()
        self.schema = pa.schema(
            [(n, _ARROW.get(frozenset(k), pa.null() if not k else pa.string())) for n, k in kinds.items()]
        )

    def make_text(self, *names: str | None) -> None:
        """Take these columns for text, whatever they hold."""
        self.schema = pa.schema([(f.name, pa.string() if f.name in names else f.type) for f in self.schema])

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        fields = [f for f in self.schema if f.name in columns]
        schema = pa.schema([*fields, *self.extra])
        rows = self.objects()
        while chunk := list(islice(rows, 8192)):
            arrays = [pa.array([_value(r.get(f.name), f.type) for r in chunk], f.type) for f in schema]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)


_ARROW = {
    frozenset([bool]): pa.bool_(),
    frozenset([int]): pa.int64(),
    frozenset([float]): pa.float64(),
    frozenset([int, float]): pa.float64(),
}


def _kind(value: Any) -> type:
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return str
    return type(value) if isinstance(value, bool | int | float) else str


def _value(value: Any, wanted: pa.DataType) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if not pa.types.is_string(wanted):
        return float(value) if pa.types.is_floating(wanted) else value
    return clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


class JsonInput(RowsInput):
    """A JSON array of objects, or one JSON object a line."""

    def __init__(self, path: Path, lines: bool, url: str, caption: str | None) -> None:
        super().__init__(path)
        self._lines = lines
        self.scan()
        self.resolve(self.schema.names, url, caption)
        self.make_text(self.url, self.caption)

    def objects(self) -> Iterator[dict[str, Any]]:
        try:
            with open_text(self.path) as f:
                text = io.TextIOWrapper(f, "utf-8-sig", "replace")
                for place, item in self._numbered_lines(text) if self._lines else self._items(text):
                    if not isinstance(item, dict):
                        raise UserError(
                            f"{self.path}, {place}: an object {{...}} is needed, not {json.dumps(item)[:60]}"
                        )
                    yield item
        except (OSError, EOFError) as e:
            raise _unreadable(self.path, e) from e

    def _numbered_lines(self, text: IO[str]) -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(text, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except ValueError as e:
                    raise UserError(f"{self.path}, line {number}: not JSON: {e}") from e

    def _items(self, text: IO[str]) -> Iterator[tuple[str, Any]]:
        """The items of an array, of which only a piece is in memory."""
        decoder = json.JSONDecoder()
        buffer, at, items = text.read(_CHUNK), 0, 0
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
                more = text.read(_CHUNK) if len(buffer) - at < _LONGEST_OBJECT else ""
                if not more:
                    raise UserError(f"{self.path}, item {items + 1}: not JSON, or cut short: {e.msg}") from e
                buffer, at = buffer[at:] + more, 0
                continue
            items, at = items + 1, end
            yield f"item {items}", item


def _after_space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


class TxtInput(RowsInput):
    """One URL a line; empty lines are no rows."""

    def __init__(self, path: Path, url: str, caption: str | None) -> None:
        super().__init__(path)
        self.resolve(["url"], url, caption)
        self.scan()
        self.schema = pa.schema([("url", pa.string())])

    def objects(self) -> Iterator[dict[str, Any]]:
        try:
            with open_text(self.path) as f:
                for line in io.TextIOWrapper(f, "utf-8-sig", "replace", newline="\n"):
                    if url := line.strip():
                        yield {"url": url}
        except (OSError, EOFError) as e:
            raise _unreadable(self.path, e) from e


def open_text(path: Path) -> IO[bytes]:
    """The bytes of a text list, unpacked where the name ends in .gz."""
    try:
        return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")  # type: ignore[return-value]
    except OSError as e:
        raise _unreadable(path, e) from e


def open_list(path: Path, url: str, caption: str | None) -> Input:
    """A list file as an input. Raises UserError where it cannot be read or lacks a column that is named."""
    match list_format(path.name):
        case "parquet":
            return ParquetInput(path, url, caption)
        case "csv":
            return CsvInput(path, ",", url, caption)
        case "tsv":
            return CsvInput(path, "\t", url, caption)
        case "json":
            return JsonInput(path, False, url, caption)
        case "jsonl":
            return JsonInput(path, True, url, caption)
        case "txt":
            return TxtInput(path, url, caption)
    raise UserError(f"{path}: not a list that can be read: {KNOWN_FORMATS}.")


def _unreadable(path: Path, e: BaseException) -> UserError:
    reason = (str(e).splitlines() or [type(e).__name__])[0]
    return UserError(f"{path}: cannot be read: {reason[:300]}")
