"""How large the pages of a parquet file are once they are unpacked, read from their headers before anything is.

A page is the least that can be unpacked, and its size is said nowhere else: a file of some kilobytes may hold one of
two gigabytes. Headers are Thrift's compact protocol (parquet.thrift: PageHeader; field 2 is the size unpacked, 3 the
size in the file, 5, 7 and 8 are the headers of kinds of pages, whose field 1 is how many values there are).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_READ = 1024  # bytes of a header at first; statistics may make it longer
_LONGEST_HEADER = 64 << 20


class _Short(Exception):
    """The header goes on behind what was read."""


@dataclass(frozen=True)
class Page:
    """What the header of a page says."""

    size: int  # bytes, unpacked
    values: int
    dictionary: bool


def pages(fd: int, column: Any) -> Iterator[Page]:
    """The pages of a column chunk (`pyarrow.parquet.ColumnChunkMetaData`).

    Raises ValueError where the headers are none.
    """
    at = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        at = min(at, column.dictionary_page_offset)
    end = at + column.total_compressed_size
    while at < end:
        length, page, packed = _header(fd, at)
        if page.size < 0 or packed < 0:
            raise ValueError("a page of negative size")
        yield page
        at += length + packed


def _header(fd: int, at: int) -> tuple[int, Page, int]:
    """(length of the header, the page, its bytes in the file) at a place."""
    size = _READ
    while True:
        data = os.pread(fd, size, at)
        try:
            end, fields = _struct(data, 0)
            kind = fields.get(5) or fields.get(7) or fields.get(8) or {}
            return end, Page(fields[2], kind.get(1, 0), 7 in fields), fields[3]
        except (KeyError, TypeError, AttributeError):
            raise ValueError("a page without a size") from None
        except _Short:
            if len(data) < size or size > _LONGEST_HEADER:
                raise ValueError("a page header that does not end") from None
            size *= 8


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[int, dict[int, Any]]:
    """Where a struct ends, and its integers and structs by field."""
    if depth > 16:
        raise ValueError("nested too deep")
    fields: dict[int, Any] = {}
    number = 0
    while True:
        head = _byte(data, at)
        at += 1
        if head == 0:
            return at, fields
        if head >> 4:
            number += head >> 4
        else:
            at, delta = _varint(data, at)
            number = (delta >> 1) ^ -(delta & 1)
        at, value = _value(data, at, head & 15, depth)
        if value is not None:
            fields[number] = value


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[int, Any]:
    if kind in (1, 2):  # true, false: in the field's own head
        return at, None
    if kind == 3:
        return at + 1, None
    if kind in (4, 5, 6):
        at, value = _varint(data, at)
        return at, (value >> 1) ^ -(value & 1)
    if kind == 7:
        return at + 8, None
    if kind == 8:
        at, length = _varint(data, at)
        if at + length > len(data):
            raise _Short
        return at + length, None
    if kind in (9, 10):
        head = _byte(data, at)
        at, count = (at + 1, head >> 4) if head >> 4 < 15 else _varint(data, at + 1)
        for _ in range(min(count, len(data) + 1)):
            at = at + 1 if head & 15 in (1, 2) else _value(data, at, head & 15, depth + 1)[0]
            _byte(data, at - 1)
        return at, None
    if kind == 12:
        return _struct(data, at, depth + 1)
    raise ValueError(f"a field of kind {kind}")


def _byte(data: bytes, at: int) -> int:
    if at >= len(data):
        raise _Short
    return data[at]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = _byte(data, at)
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return at, value
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
