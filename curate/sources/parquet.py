"""Parquet files of others, a piece at a time: neither a row group nor a page may take more memory than there is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.tables import kind_of
from aesthetic.untrusted import open_regular, printable
from curate.sources.columns import LONGEST_VALUE, is_text, longest_text, plain, shortened
from curate.sources.problems import Problems, unreadable

BATCH = 65_536
"""Rows that are held at a time."""

LARGEST_PAGE = 256 << 20
"""Bytes that a page may unpack to, of the columns that are read; they have one megabyte or so."""

_MOST_IN_A_ROW = 100_000  # values that a nested column may hold in each row, on average, of a row group
_LONG_LATER = 64 << 10  # bytes of a text, once texts have taken all that they may
_BATCH_BYTES = 64 << 20  # of texts that a batch may hold


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


def parquet_batches(
    path: Path,
    columns: Sequence[str],
    groups: list[int] | None = None,
    start: int = 0,
    rows: int | None = None,
    max_bytes: int | None = None,
    problems: Problems | None = None,
) -> Iterator[pa.RecordBatch]:
    """Rows of some row groups (default: all), with the named columns that the file has, plain.

    `rows` rows from `start` on, counted from the first of these groups. Once texts have taken `max_bytes`, those of
    more than 64 kB are null. What is null for its length or because it is not UTF-8 is a problem.
    """
    file = open_parquet(path)
    names = [n for n in file.schema_arrow.names if n in columns]
    groups = list(range(file.metadata.num_row_groups)) if groups is None else groups
    left, longest, taken, done = rows, LONGEST_VALUE, 0, 0
    try:
        for whole in file.iter_batches(_rows_at_a_time(path, file, names, groups), row_groups=groups, columns=names):
            batch = whole.slice(min(start, whole.num_rows), left)
            start = max(0, start - whole.num_rows)
            left = left if left is None else left - batch.num_rows
            if names and batch.num_rows:
                arrays = [plain(batch.column(n), problems, n, done) for n in names]
                if longest < LONGEST_VALUE:
                    arrays = [shortened(a, longest, problems, n, done) for n, a in zip(names, arrays, strict=True)]
                batch = pa.RecordBatch.from_arrays(arrays, names=names)
                done, taken = done + batch.num_rows, taken + batch.nbytes
                longest = LONGEST_VALUE if max_bytes is None or taken <= max_bytes else _LONG_LATER
            if batch.num_rows:
                yield batch
            if left == 0:
                return
    except (pa.ArrowException, OSError) as e:
        raise unreadable(path, e) from e


def rows_between(
    path: Path, offset: int, rows: int, columns: Sequence[str], max_bytes: int, problems: Problems | None = None
) -> Iterator[pa.RecordBatch]:
    """As `parquet_batches`, rows from `offset` on; only the row groups that they lie in are read."""
    metadata = open_parquet(path).metadata
    groups: list[int] = []
    first = start = 0
    for group in range(metadata.num_row_groups):
        end = start + metadata.row_group(group).num_rows
        if start < offset + rows and end > offset:
            first = first if groups else start
            groups.append(group)
        start = end
    yield from parquet_batches(path, columns, groups, offset - first, rows, max_bytes, problems)


def check_pages(path: Path, columns: Sequence[str]) -> None:
    """UserError where a page of these columns unpacks to more than LARGEST_PAGE, or rows hold values without end."""
    metadata = open_parquet(path).metadata
    with open_regular(path) as f:
        for g in range(metadata.num_row_groups):
            group = metadata.row_group(g)
            for c in range(group.num_columns):
                column = group.column(c)
                name = column.path_in_schema
                if not any(name == n or name.startswith(f"{n}.") for n in columns):
                    continue
                try:
                    largest = max((size for size, _, _ in _pages(f.fileno(), column)), default=0)
                except (ValueError, OSError) as e:
                    raise UserError(f"{path}: cannot be read: row group {g}, column {printable(name, 80)}: {e}") from e
                if largest > LARGEST_PAGE or column.num_values > _MOST_IN_A_ROW * max(group.num_rows, 100):
                    much = f"a page of {largest:,} bytes" if largest > LARGEST_PAGE else f"{column.num_values:,} values"
                    raise UserError(
                        f"{path}: column {printable(name, 80)!r} is too large to read: {much} in row group {g}. "
                        "Leave it out: name the columns that matter in source.columns"
                    )


def _rows_at_a_time(path: Path, file: pq.ParquetFile, names: Sequence[str], groups: Sequence[int]) -> int:
    """Rows of a batch: fewer than BATCH where a few rows may hold much, as a page of few rows or a dictionary can.

    A text of a megabyte that a hundred thousand rows share takes a kilobyte of a file.
    """
    types = {n: file.schema_arrow.field(n).type for n in names}
    texts = [n for n, t in types.items() if is_text(t.value_type if pa.types.is_dictionary(t) else t)]
    longest = 1
    with open_regular(path) as f:
        for g in groups:
            group = file.metadata.row_group(g)
            shared = set()
            for column in map(group.column, range(group.num_columns)):
                if column.path_in_schema not in texts:
                    continue
                try:
                    for size, values, is_dictionary in _pages(f.fileno(), column):
                        if not is_dictionary:
                            longest = max(longest, size // max(values, 1))
                        elif size * min(group.num_rows, BATCH) > _BATCH_BYTES:
                            shared.add(column.path_in_schema)
                except ValueError as e:
                    raise unreadable(path, e) from e
            if shared:
                found = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, read_dictionary=sorted(shared))
                for batch in found.iter_batches(1, row_groups=[g], columns=sorted(shared)):
                    longest = max(longest, *(longest_text(batch.column(n)) for n in shared))
                    break
    return max(1, min(BATCH, _BATCH_BYTES // longest))


# ------------------------------------------------------------------------------------------------------ page headers
#
# How large a page is once it is unpacked stands in its header only, and no library shows that: a file of some
# kilobytes may hold one of two gigabytes. Headers are Thrift's compact protocol (parquet.thrift, PageHeader).

_HEADER_BYTES = 1024  # read at first; statistics may make a header longer
_LONGEST_HEADER = 64 << 20


def _pages(fd: int, column: Any) -> Iterator[tuple[int, int, bool]]:
    """(bytes unpacked, values, whether it is a dictionary) of the pages of a column chunk.

    `column` is pyarrow's ColumnChunkMetaData. Raises ValueError where the headers are none.
    """
    at = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        at = min(at, column.dictionary_page_offset)
    end = at + column.total_compressed_size
    while at < end:
        header, fields = _header(fd, at)
        kind = fields.get(5) or fields.get(7) or fields.get(8) or {}  # of data, of a dictionary, of data in version 2
        try:
            size, packed, values = fields[2], fields[3], kind.get(1, 0)
            negative = size < 0 or packed < 0
        except (KeyError, TypeError, AttributeError):
            raise ValueError("a page without a size") from None
        if negative:
            raise ValueError("a page of negative size")
        yield size, values, 7 in fields
        at += header + packed


def _header(fd: int, at: int) -> tuple[int, dict[int, Any]]:
    """The length of the header at a place, and its fields."""
    size = _HEADER_BYTES
    while True:
        data = os.pread(fd, size, at)
        reader = _Thrift(data)
        try:
            fields = reader.struct()
            return reader.at, fields
        except IndexError:  # it goes on behind what was read
            if len(data) < size or size > _LONGEST_HEADER:
                raise ValueError("a page header that does not end") from None
            size *= 8


class _Thrift:
    """Reads structs in the compact protocol: their integers and structs by field. IndexError where the data ends."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number of more than 64 bits")

    def integer(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def struct(self, depth: int = 0) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        field = 0
        while head := self.byte():
            field = field + (head >> 4) if head >> 4 else self.integer()
            if (value := self.value(head & 15, depth)) is not None:
                fields[field] = value
        return fields

    def value(self, kind: int, depth: int, in_list: bool = False) -> Any:
        """The value of a field or of an item of a list; None for what is neither an integer nor a struct."""
        if depth > 16:
            raise ValueError("nested too deep")
        if kind in (1, 2):  # true and false: a field's stand in its head
            self.at += in_list
        elif kind == 3:
            self.at += 1
        elif kind in (4, 5, 6):
            return self.integer()
        elif kind == 7:
            self.at += 8
        elif kind == 8:
            length = self.varint()
            self.at += length
        elif kind in (9, 10):
            head = self.byte()
            count = head >> 4 if head >> 4 < 15 else self.varint()
            for _ in range(min(count, len(self.data) + 1)):
                self.value(head & 15, depth + 1, in_list=True)
                if self.at > len(self.data):
                    raise IndexError
        elif kind == 12:
            return self.struct(depth + 1)
        else:
            raise ValueError(f"a field of kind {kind}")
        return None
