"""List files: one file of any kind as a stream of typed columns, read in pieces however long it is.

Text is made text by one rule, wherever it comes from. A byte order mark says the encoding, else it is UTF-8; a value
that is not is null, counted and named, as is one of more than 4 MB. A lone surrogate in JSON becomes U+FFFD, NUL
stays, null stays null. A number that is not finite is null (JSON has none, and SQL takes NaN for the largest number).

A line that is broken is a row with a failure; more than one in a hundred are an error.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.errors import UserError, nearest
from aesthetic.tables import kind_of, table_shape
from aesthetic.untrusted import caption_of, clean, decode_text, marked_encoding, open_regular, printable
from curate.ledger.schema import Reason
from curate.sources.columns import fit, fit_type
from curate.sources.lines import Broken, Table, as_utf8, head_of, is_quoted, numbered_lines, shown, unreadable
from curate.sources.pages import pages
from curate.store.files import sha256_file

BATCH = 65_536
"""Rows that are held at a time."""

_TEXT_FORMATS = ("csv", "tsv", "json", "jsonl", "ndjson", "txt")
URL_NAMES = ("url", "image_url", "imageurl", "img_url", "image_link", "photo_image_url", "original_url", "originalurl")
CAPTION_NAMES = (
    *("caption", "text", "alt", "alt_text", "alttext", "image_caption", "img_caption", "image_text", "captions"),
    *("description", "image_description", "ai_description", "photo_description", "caption_reference_description"),
    *("eng_text", "eng_caption", "en_text", "en_caption", "text_en", "caption_en", "english_caption", "top_caption"),
    *("raw_caption", "original_caption", "long_caption", "short_caption", "re_caption", "recaption", "blip_caption"),
    *("generated_caption", "synthetic_caption", "title", "prompt", "sentence", "sentences"),
)
"""What others call the column (LAION, DataComp, COYO, CC12M, WIT, Unsplash, DiffusionDB, Recap ...), best first."""

LONGEST_VALUE = 4 << 20
"""Bytes of one text; a longer one is null."""

MOST_COLUMNS = 2_000
"""Of a table of text; more are the sign of another delimiter, or of no list."""

FAILURES = (("\0reason", pa.string()), ("\0error", pa.string()))
"""What a row of a list with broken lines has beside the list's columns, whose names hold no NUL."""

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
    """The wanted name where it is there, else the first that is one of the aliases.

    Small and capital letters, white space around it, and -, blank or nothing in place of _ make no difference.
    """
    if wanted in names:
        return wanted
    folded: dict[str, str] = {}
    for name in names:
        folded.setdefault(_folded(name), name)
    return next((folded[_folded(alias)] for alias in (wanted, *aliases) if _folded(alias) in folded), None)


def _folded(name: str) -> str:
    return re.sub(r"[\s_\-\ufeff]+", "", name).lower()


def _find(names: Sequence[str], wanted: str, default: str, aliases: Sequence[str], where: str) -> str | None:
    """As `named`, but only the default name stands for others: what someone asked for by name must be there."""
    if wanted not in names and wanted != default:
        raise UserError(f"{where}: there is no column {wanted!r} (source.{default}). {describe(names, wanted)}")
    return named(names, wanted, aliases)


def describe(names: Iterable[str], wanted: str | None = None) -> str:
    """A sentence that lists the columns that are there, after the one that is nearest to the wanted name."""
    names = list(names)
    near = nearest(wanted, names[:_SHOWN]) if wanted else None
    hint = f"Did you mean {printable(near, 80)!r}? " if near else ""
    return f"{hint}Columns: {listed(names)}."


def listed(names: Sequence[str]) -> str:
    """Names of columns in a sentence, as many as one wants to read."""
    rest = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return (", ".join(printable(n, 80) for n in names[:_SHOWN]) or "none") + rest


_SHOWN = 40  # names of columns in a message


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
    return pa.float32() if pa.types.is_float16(t) else fit_type(t)


def plain(column: pa.Array, notes: Notes | None = None, name: str = "", row: int = 0) -> pa.Array:
    """A column without dictionaries, large offsets, extension types, broken UTF-8 and numbers that are not finite."""
    if isinstance(column, pa.ExtensionArray):
        return plain(column.storage, notes, name, row)
    if pa.types.is_dictionary(column.type):
        return plain(column.dictionary_decode(), notes, name, row)
    if pa.types.is_temporal(column.type) or pa.types.is_nested(column.type) or pa.types.is_decimal256(column.type):
        return fit(column)
    column = column.cast(plain_type(column.type))
    if pa.types.is_string(column.type):
        return _valid(column.cast(pa.binary()), notes, name, row)
    if pa.types.is_floating(column.type):
        return pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
    return column


def as_type(
    column: pa.Array, wanted: pa.DataType, notes: Notes | None = None, name: str = "", row: int = 0
) -> pa.Array:
    """A plain column in the type that all files of the list agree on."""
    if column.type == wanted:
        return column
    if pa.types.is_string(wanted) and pa.types.is_binary(column.type):
        return _valid(column, notes, name)
    if pa.types.is_string(wanted) and is_texts(column.type):
        return _first_texts(column)
    return column.cast(wanted, safe=not pa.types.is_floating(wanted))  # 2**53 + 1 rounds where others have fractions


def is_texts(t: pa.DataType) -> bool:
    """Whether a column holds lists of texts, as captions sometimes are."""
    return (pa.types.is_list(t) or pa.types.is_large_list(t)) and plain_type(t.value_type) == pa.string()


def _first_texts(column: pa.Array) -> pa.Array:
    """Of lists of texts, the first that is not blank: `caption_of`, a column at a time."""
    texts = plain(column.flatten())
    filled = pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(texts), ""), False)
    rows, firsts = np.unique(pc.list_parent_indices(column).filter(filled).to_numpy(), return_index=True)
    places = np.full(len(column), -1)
    places[rows] = firsts
    return texts.filter(filled).take(pa.array(places, mask=places < 0))


def _valid(binary: pa.Array, notes: Notes | None = None, name: str = "", row: int = 0) -> pa.Array:
    """Bytes as text; null, and noted, what is not UTF-8 or too long. `row` is the number of the first value."""
    if len(binary) and (pc.max(pc.binary_length(binary)).as_py() or 0) > LONGEST_VALUE:
        binary = _shortened(binary, LONGEST_VALUE, notes, name, row)
    try:
        return binary.cast(pa.string())  # checks UTF-8; nearly every list passes
    except pa.ArrowInvalid:
        return pa.array([_decoded(v, notes, name, row + i + 1) for i, v in enumerate(binary.to_pylist())], pa.string())


def _decoded(value: bytes | None, notes: Notes | None, name: str, row: int) -> str | None:
    found = decode_text(value) if value is not None else None
    if found is None or found.certain:
        return found.text if found else None
    if notes is not None:
        notes.add("not_utf8", f"row {row:,}: {name} {shown(value[:60])}")  # type: ignore[index]
    return None


class Notes:
    """What of a list could not be taken as it is: how often, and the first three of each kind by name."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, where: str) -> None:
        """Count one; `where` says which."""
        self.counts[kind] += 1
        if len(self.first[kind]) < 3:
            self.first[kind].append(where)

    def sentences(self) -> list[str]:
        """A sentence for each kind that there is."""
        return [
            f"{count:,} {NOTED[kind]}. The first: {'; '.join(self.first[kind])}"
            for kind, count in sorted(self.counts.items())
        ]


NOTED = {
    "broken": "lines are broken, and rows without a picture (bad_line)",
    "not_utf8": "values are not UTF-8, and null (`iconv -f WINDOWS-1252 -t UTF-8`, or whatever it is, mends it)",
    "too_long": "values are too long, and null (4 MB; or 64 kB, where a shard holds half a gigabyte)",
    "no_caption": "captions are neither text nor a list of texts, and null",
}


# ----------------------------------------------------------------------------------------------------------- inputs


class Input:
    """One file of the list (or one tar, or one folder of images): its columns, and its rows as a stream.

    `schema` holds the columns under the list's own names; `local` says that `batches` adds the place of the bytes.
    """

    url: str | None
    caption: str | None
    schema: pa.Schema
    rows: int
    local = False
    uncaptioned = 0
    """Rows without a caption, where a file of each may tell it; a column's are not counted."""
    extra: tuple[tuple[str, pa.DataType], ...] = ()
    """Columns of ours that every batch has, beside those of the list."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.constants: dict[str, str | None] = {}
        self.notes = Notes()

    def digest(self) -> str:
        """A sha256 that names what is in this input."""
        return sha256_file(self.path)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """All rows in order, at most BATCH at a time, with at least the named columns in `schema`'s types."""
        raise NotImplementedError

    def set_constants(self, constants: Mapping[str, str | None]) -> None:
        """Add columns that hold one text in every row, and that the file does not have."""
        self.constants = {n: v for n, v in constants.items() if n not in self.schema.names}
        self.schema = pa.schema([*self.schema, *((n, pa.string()) for n in self.constants)])

    def whole_batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """As `batches`, with the constants."""
        for batch in self.batches(columns):
            yield with_constants(batch, self.constants)

    def check_sizes(self, columns: Sequence[str]) -> None:
        """UserError where reading these columns would take more memory than any list needs."""

    def resolve(self, names: Sequence[str], url: str, caption: str | None) -> None:
        """Find the two columns among the names, which must differ from each other."""
        if twice := sorted(n for n, count in Counter(names).items() if count > 1):
            raise UserError(f"{self.path}: two columns are called {printable(twice[0], 80)!r}. Rename one of them.")
        self.url = _find(names, url, "url", URL_NAMES, str(self.path))
        self.caption = None
        if caption is not None:
            self.caption = _find(names, caption, "caption", CAPTION_NAMES, str(self.path))

    def check_broken(self) -> None:
        """Take note of broken lines: a few are rows with a failure, more than one in a hundred raise UserError."""
        count, first = self.notes.counts["broken"], "; ".join(self.notes.first["broken"])
        if count * 100 > self.rows:
            raise UserError(
                f"{self.path}: {count:,} of {self.rows:,} lines are broken, which is too many. {first}{self._hint()}"
            )
        if count:
            self.extra = FAILURES

    def _hint(self) -> str:
        """What may be the reason why so many lines are broken."""
        return ""


def with_constants(batch: pa.RecordBatch, constants: Mapping[str, str | None]) -> pa.RecordBatch:
    """A batch with columns that hold one text in every row."""
    for name, value in constants.items():
        batch = batch.append_column(name, pa.array([value] * batch.num_rows, pa.string()))
    return batch


def _failures(rows: int, broken: dict[int, Broken]) -> list[pa.Array]:
    """FAILURES for some rows."""
    reasons: list[str | None] = [None] * rows
    errors: list[str | None] = [None] * rows
    for row, what in broken.items():
        reasons[row], errors[row] = Reason.BAD_LINE.value, str(what)
    return [pa.array(reasons, pa.string()), pa.array(errors, pa.string())]


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

    def check_sizes(self, columns: Sequence[str]) -> None:
        check_pages(self.path, columns)


def open_parquet(path: Path) -> pq.ParquetFile:
    """A parquet file whose column chunks are read in pieces: a row group may be larger than the memory."""
    with open_regular(path) as f:
        head = f.read(512)
    if not head.startswith(b"PAR1") and (kind := kind_of(head)):
        raise UserError(f"{path}: is {kind}")
    try:
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError) as e:
        raise unreadable(path, e) from e


LARGEST_PAGE = 256 << 20
"""Bytes that a page of a parquet file may unpack to, of the columns that are read; they have one megabyte or so."""

_MOST_IN_A_ROW = 100_000  # values that a nested column may hold in each row, on average, of a row group


def check_pages(path: Path, columns: Sequence[str]) -> None:
    """UserError where a page of these columns unpacks to more than LARGEST_PAGE, or rows hold values without end."""
    file = open_parquet(path)
    metadata = file.metadata
    wanted = set(columns)
    with open_regular(path) as f:
        for g in range(metadata.num_row_groups):
            group = metadata.row_group(g)
            for c in range(group.num_columns):
                column = group.column(c)
                name = column.path_in_schema
                if name not in wanted and not any(name.startswith(f"{n}.") for n in wanted):
                    continue
                try:
                    largest = max((page.size for page in pages(f.fileno(), column)), default=0)
                except (ValueError, OSError) as e:
                    raise UserError(f"{path}: cannot be read: row group {g}, column {printable(name, 80)}: {e}") from e
                if largest > LARGEST_PAGE or column.num_values > _MOST_IN_A_ROW * max(group.num_rows, 100):
                    much = f"a page of {largest:,} bytes" if largest > LARGEST_PAGE else f"{column.num_values:,} values"
                    raise UserError(
                        f"{path}: column {printable(name, 80)!r} is too large to read: {much} in row group {g}. "
                        "Leave it out: name the columns that matter in source.columns"
                    )


def parquet_batches(
    path: Path,
    columns: Sequence[str],
    groups: list[int] | None = None,
    start: int = 0,
    rows: int | None = None,
    most: int | None = None,
    notes: Notes | None = None,
) -> Iterator[pa.RecordBatch]:
    """Rows of some row groups (default: all), with the named columns that the file has, plain.

    `rows` rows from `start` on, counted from the first of these groups. Once texts have taken `most` bytes, those of
    more than _LONG_THEN are null. What is null for its length or because it is not UTF-8 is noted.
    """
    file = open_parquet(path)
    names = [n for n in file.schema_arrow.names if n in columns]
    groups = list(range(file.metadata.num_row_groups)) if groups is None else groups
    try:
        left, longest, taken, number = rows, LONGEST_VALUE, 0, 0
        for whole in file.iter_batches(_rows_at_a_time(path, file, names, groups), row_groups=groups, columns=names):
            batch = whole.slice(min(start, whole.num_rows), left)
            start = max(0, start - whole.num_rows)
            left = left if left is None else left - batch.num_rows
            if names and batch.num_rows:
                arrays = [plain(batch.column(n), notes, n, number) for n in names]
                if longest < LONGEST_VALUE:
                    arrays = [_shortened(a, longest, notes, n, number) for n, a in zip(names, arrays, strict=True)]
                batch = pa.RecordBatch.from_arrays(arrays, names=names)
                number, taken = number + batch.num_rows, taken + batch.nbytes
                longest = LONGEST_VALUE if most is None or taken <= most else _LONG_THEN
            if batch.num_rows:
                yield batch
            if left == 0:
                return
    except (pa.ArrowException, OSError) as e:
        raise unreadable(path, e) from e


_LONG_THEN = 64 << 10
_AT_A_TIME = 64 << 20  # bytes of texts that a batch may hold


def _rows_at_a_time(path: Path, file: pq.ParquetFile, names: Sequence[str], groups: Sequence[int]) -> int:
    """Rows of a batch: fewer than BATCH where a few rows may hold much, as a page of few rows or a dictionary can.

    A text of a megabyte that a hundred thousand rows share takes a kilobyte of a file.
    """
    types = {n: file.schema_arrow.field(n).type for n in names}
    texts = [n for n, t in types.items() if _is_text(t.value_type if pa.types.is_dictionary(t) else t)]
    longest = 1
    with open_regular(path) as f:
        for g in groups:
            group = file.metadata.row_group(g)
            shared = set()
            for c in range(group.num_columns):
                column = group.column(c)
                if column.path_in_schema not in texts:
                    continue
                try:
                    for page in pages(f.fileno(), column):
                        if not page.dictionary:
                            longest = max(longest, page.size // max(page.values, 1))
                        elif page.size * min(group.num_rows, BATCH) > _AT_A_TIME:
                            shared.add(column.path_in_schema)
                except ValueError as e:
                    raise unreadable(path, e) from e
            if shared:
                found = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, read_dictionary=sorted(shared))
                for batch in found.iter_batches(1, row_groups=[g], columns=sorted(shared)):
                    longest = max(longest, *(_longest(batch.column(n)) for n in shared))
                    break
    return max(1, min(BATCH, _AT_A_TIME // longest))


def _is_text(t: pa.DataType) -> bool:
    return pa.types.is_string(t) or pa.types.is_binary(t) or pa.types.is_large_string(t) or pa.types.is_large_binary(t)


def _longest(column: pa.Array) -> int:
    texts = column.dictionary if pa.types.is_dictionary(column.type) else column
    return pc.max(pc.binary_length(texts)).as_py() or 0 if _is_text(texts.type) else 0


def _shortened(column: pa.Array, longest: int, notes: Notes | None, name: str, row: int) -> pa.Array:
    """A column without texts of more than so many bytes."""
    if not _is_text(column.type) or _longest(column) <= longest:
        return column
    long = pc.fill_null(pc.greater(pc.binary_length(column), longest), False)
    if notes is not None:
        for i in pc.indices_nonzero(long).to_pylist():
            notes.add("too_long", f"row {row + i + 1:,}: {name}")
    # not if_else, whose result is as large as what it had
    return column.take(pa.array(np.arange(len(column)), mask=long.to_numpy(zero_copy_only=False)))


class CsvInput(Input):
    """A csv or tsv file with a header line; whatever delimits its fields, and however it is encoded.

    A column is integers, decimal numbers or true/false where every value is written so that nothing is lost (007 and
    1e400 stay text); an empty field is null. The url and caption columns are text.
    """

    def __init__(self, path: Path, delimiter: str, url: str, caption: str | None) -> None:
        super().__init__(path)
        shape = table_shape(head_of(path), delimiter, str(path))
        self._names = [n.replace("\0", "") for n in shape.names]
        self._check_header()
        self.resolve(self._names, url, caption)
        place = self._names.index(self.url) if self.url else None
        self._table = Table(path, shape, is_quoted(path, shape, usual=shape.delimiter != "\t"), place)
        possible = {n: [k for k in _WRITTEN_AS if n not in (self.url, self.caption)] for n in self._names}
        filled = set()
        self.rows = 0
        for batch, broken in self._strings(self._names, self.notes):
            self.rows += batch.num_rows
            for what in broken.values():
                self.notes.add("broken", str(what))
            for name in self._names:
                values = batch.column(name).drop_null()
                if len(values):
                    filled.add(name)
                    possible[name] = [k for k in possible[name] if _is_written_as(k, values)]
        self.check_broken()
        kinds = {n: possible[n][0] if possible[n] and n in filled else pa.string() for n in self._names}
        self.schema = pa.schema(list(kinds.items()))

    def _hint(self) -> str:
        return f". The header: {printable(self._table.shape.delimiter.join(self._names), 100)}"

    def _check_header(self) -> None:
        if any(n.startswith(("http://", "https://", "//")) for n in self._names):
            raise UserError(f"{self.path}: has no header line with the column names; its first line is a row. Add one.")
        if any("\ufffd" in n for n in self._names):
            raise UserError(
                f"{self.path}: the header is not UTF-8. Convert the list: `iconv -f WINDOWS-1252 -t UTF-8` "
                "(or whatever it is)"
            )
        if len(self._names) > MOST_COLUMNS:
            raise UserError(
                f"{self.path}: the header has {len(self._names):,} columns; at most {MOST_COLUMNS:,} are read"
            )

    def _strings(
        self, columns: Sequence[str], notes: Notes | None = None
    ) -> Iterator[tuple[pa.RecordBatch, dict[int, Broken]]]:
        """The rows as text, and those of them that are broken."""
        start = 0
        for records in self._table.records([self._names.index(n) for n in columns]):
            arrays = [
                _valid(c, notes if n != self.url else None, n, start)
                for n, c in zip(columns, records.columns, strict=True)
            ]
            broken = records.broken
            if self.url in columns:
                at = list(columns).index(str(self.url))
                if arrays[at].null_count > records.columns[at].null_count:  # a URL that is no text names nothing
                    lost = pc.and_(pc.is_null(arrays[at]), pc.is_valid(records.columns[at]))
                    for row in pc.indices_nonzero(lost).to_pylist():
                        why = f"row {start + row + 1:,}: the URL is not UTF-8"
                        broken[row] = Broken(None, f"{why}: {shown(records.columns[at][row].as_py())}")
            whole = pa.RecordBatch.from_arrays(arrays, names=list(columns))
            for first in range(0, records.rows, BATCH):
                part = {r - first: b for r, b in broken.items() if first <= r < first + BATCH} if broken else {}
                yield whole.slice(first, BATCH), part
            start += records.rows

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        wanted = [n for n in self._names if n in columns or n == self.url]
        for batch, broken in self._strings(wanted):
            arrays = [_parse(batch.column(n), self.schema.field(n).type) for n in wanted]
            extra = _failures(batch.num_rows, broken) if self.extra else []
            yield pa.RecordBatch.from_arrays([*arrays, *extra], names=[*wanted, *(n for n, _ in self.extra)])


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

    def objects(self) -> Iterator[dict[str, Any] | Broken]:
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
        self._odd: defaultdict[str, Notes] = defaultdict(Notes)  # by column: what could be no caption
        self.rows = 0
        for row in self.objects():
            self.rows += 1
            if isinstance(row, Broken):
                self.notes.add("broken", str(row))
                continue
            if self.local:
                self.uncaptioned += row["caption"] is None
                content.update(json.dumps(row, default=str).encode() + b"\n")
            for name, value in row.items():
                if name not in ours:
                    seen = kinds.setdefault(name, set())
                    if value is not None:
                        seen.add(_kind(value))
                        if not isinstance(value, int | float) or isinstance(value, bool):
                            self._note(name, value)
            if len(kinds) > MOST_COLUMNS:
                raise UserError(
                    f"{self.path}: has more than {MOST_COLUMNS:,} columns. The first: {listed(list(kinds))}"
                )
        self.content = content.hexdigest()
        self.schema = pa.schema(
            [(n, _ARROW.get(frozenset(k), pa.null() if not k else pa.string())) for n, k in kinds.items()]
        )

    def _note(self, name: str, value: Any) -> None:
        if isinstance(value, str):
            if _value(value, pa.string()) is None:
                kind = "too_long" if len(value) > LONGEST_VALUE else "not_utf8"
                shown_ = "" if kind == "too_long" else " " + shown(value[:60].encode("utf-8", "surrogateescape"))
                self.notes.add(kind, f"row {self.rows:,}: {name}{shown_}")
        elif value not in ([], {}) and caption_of(value) is None:
            said = json.dumps(value, ensure_ascii=False, default=str)
            self._odd[name].add("no_caption", f"row {self.rows:,}: {printable(said, 60)}")

    def note_captions(self) -> None:
        """Take note of captions that are neither text nor a list of texts."""
        if (odd := self._odd.get(self.caption or "")) is not None:
            self.notes.counts += odd.counts
            self.notes.first |= odd.first
        del self._odd

    def make_text(self, *names: str | None) -> None:
        """Take these columns for text, whatever they hold."""
        self.schema = pa.schema([(f.name, pa.string() if f.name in names else f.type) for f in self.schema])

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        fields = [f for f in self.schema if f.name in columns]
        rows = self.objects()
        while chunk := list(islice(rows, 8192)):
            found = [{} if isinstance(r, Broken) else r for r in chunk]
            arrays = [pa.array(self._values(found, f), f.type) for f in fields]
            if self.extra == FAILURES:
                arrays += _failures(len(chunk), {i: r for i, r in enumerate(chunk) if isinstance(r, Broken)})
            else:
                arrays += [pa.array([r.get(name) for r in found], kind) for name, kind in self.extra]
            yield pa.RecordBatch.from_arrays(arrays, schema=pa.schema([*fields, *self.extra]))

    def _values(self, rows: list[dict[str, Any]], f: pa.Field) -> list[Any]:
        values = (r.get(f.name) for r in rows)
        if f.name == self.caption:
            values = (v if v is None or isinstance(v, str) else caption_of(v) for v in values)
        return [_value(v, f.type) for v in values]


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
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if not text.isascii() and _NO_UTF8.search(text):
        return None
    if len(text) * 4 > LONGEST_VALUE and len(text.encode("utf-8", "replace")) > LONGEST_VALUE:
        return None
    return clean(text)


_NO_UTF8 = re.compile("[\udc80-\udcff]")  # what bytes that are none become while JSON is read


class JsonInput(RowsInput):
    """A JSON array of objects, or one JSON object a line."""

    def __init__(self, path: Path, lines: bool, url: str, caption: str | None) -> None:
        super().__init__(path)
        self._lines = lines
        self._encoding, self._start = marked_encoding(head_of(path)[:4]) or ("utf-8", 0)
        self.scan()
        self.check_broken()
        self.resolve(self.schema.names, url, caption)
        self.note_captions()
        self.make_text(self.url, self.caption)

    def _hint(self) -> str:
        return (
            ". An array [{...}, ...] is called .json" if head_of(self.path)[self._start :].lstrip()[:1] == b"[" else ""
        )

    def objects(self) -> Iterator[dict[str, Any] | Broken]:
        for item in self._numbered_lines() if self._lines else self._items():
            yield item if isinstance(item, Broken) else _clean_names(item)

    def _numbered_lines(self) -> Iterator[dict[str, Any] | Broken]:
        for number, line in numbered_lines(self.path, self._encoding, self._start):
            if isinstance(line, Broken):
                yield line
                continue
            try:
                item = json.loads(_escaped(line))
            except RecursionError:
                yield Broken(number, f"nested too deep: {shown(line)}")
            except ValueError as e:
                yield Broken(number, f"not JSON: {printable(e, 100)}: {shown(line)}")
            else:
                yield item if isinstance(item, dict) else Broken(number, f"no object {{...}}: {shown(line)}")

    def _items(self) -> Iterator[dict[str, Any]]:
        """The items of an array, of which only a piece is in memory."""
        pieces = _characters(self.path, self._encoding, self._start)
        decoder = json.JSONDecoder()
        buffer, at, items = next(pieces, ""), 0, 0
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
                said = printable(json.dumps(item), 60)
                raise UserError(f"{self.path}, item {items}: an object {{...}} is needed, not {said}")
            yield item


def _escaped(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode("utf-8", "surrogateescape")


def _characters(path: Path, encoding: str, start: int) -> Iterator[str]:
    """A file's text, a piece at a time; bytes that are none are escaped as surrogates."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    for data in as_utf8(path, encoding, start):
        for at in range(0, len(data), _CHUNK):
            yield decoder.decode(data[at : at + _CHUNK])
    yield decoder.decode(b"", final=True)


def _clean_names(item: dict[str, Any]) -> dict[str, Any]:
    """An object whose names can be columns: no lone surrogates, no NUL."""
    if all(n.isascii() and "\0" not in n for n in item):
        return item
    return {clean(n).replace("\0", ""): v for n, v in item.items()}


def _after_space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


class TxtInput(RowsInput):
    """One URL a line; empty lines are no rows."""

    def __init__(self, path: Path, url: str, caption: str | None) -> None:
        super().__init__(path)
        self.resolve(["url"], url, caption)
        head = head_of(path)
        self._encoding, self._start = marked_encoding(head[:4]) or ("utf-8", 0)
        first = next((line for line in head.splitlines() if line.strip()), b"")
        if b"\t" in first.strip():
            raise UserError(f"{path}: is a table, not a URL a line. Name it .tsv, with a header line of column names.")
        self.scan()
        self.check_broken()
        self.schema = pa.schema([("url", pa.string())])

    def objects(self) -> Iterator[dict[str, Any] | Broken]:
        for number, line in numbered_lines(self.path, self._encoding, self._start):
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
