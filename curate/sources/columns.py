"""Columns of others' parquet files, made fit for what comes after: tables, JSON, SQL.

A file may hold moments that no calendar has, times of day beyond midnight, zones that nobody knows, numbers of 76
digits and, inside lists and structs, numbers that are not finite and text that is none. What cannot be said is null.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_DAY = 86_400
_FIRST, _LAST = -719_160 * _DAY, 2_932_894 * _DAY
"""Seconds since 1970: the years 1 to 9999 without their first and last days, which a zone may move out of them."""

_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def fit_type(t: pa.DataType) -> pa.DataType:
    """The type of a column that is fit."""
    if pa.types.is_decimal256(t) or (pa.types.is_nested(t) and any(pa.types.is_decimal256(x) for x in _leaf_types(t))):
        return pa.string()  # no SQL type has so many digits
    if pa.types.is_timestamp(t) and t.tz is not None and not _is_zone(t.tz):
        return pa.timestamp(t.unit, "UTC")
    return t


def fit(column: pa.Array) -> pa.Array:
    """A column of dates, times, decimals or nested values in `fit_type`, without values that cannot be said."""
    wanted = fit_type(column.type)
    if pa.types.is_temporal(column.type):
        bounds = _bounds(column.type)
        if bounds is not None:
            numbers = column.view(pa.int32() if column.type.bit_width == 32 else pa.int64())
            inside = pc.and_(pc.greater_equal(numbers, bounds[0]), pc.less_equal(numbers, bounds[1]))
            if not pc.all(inside).as_py() and len(column):
                column = pc.if_else(inside, column, pa.scalar(None, column.type))
        return column.cast(wanted)
    if pa.types.is_nested(column.type) and (wanted != column.type or not all(map(_is_fit, _leaves(column)))):
        values = [_said(value) for value in column]
        return pa.array(
            [None if v is None else str(v) for v in values] if pa.types.is_string(wanted) else values, wanted
        )
    return column.cast(wanted)


def _bounds(t: pa.DataType) -> tuple[int, int] | None:
    if pa.types.is_timestamp(t):
        lowest, highest = _FIRST * _UNITS[t.unit], _LAST * _UNITS[t.unit]
        return max(lowest, -(2**63) + 1), min(highest, 2**63 - 1)  # the lowest of all is pandas' "no time"
    if pa.types.is_date32(t):
        return _FIRST // _DAY, _LAST // _DAY
    if pa.types.is_date64(t):
        return _FIRST * 1000, _LAST * 1000
    if pa.types.is_time(t):
        return 0, _DAY * _UNITS[t.unit] - 1
    if pa.types.is_duration(t):
        most = min(999_999_999 * _DAY * _UNITS[t.unit], 2**63 - 1)
        return -most, most
    return None


def _is_zone(name: str) -> bool:
    try:
        pa.lib.string_to_tzinfo(name)
    except Exception:  # pytz's or zoneinfo's, whichever is there
        return False
    return True


def _leaf_types(t: pa.DataType) -> Iterator[pa.DataType]:
    if pa.types.is_struct(t) or pa.types.is_map(t) or pa.types.is_union(t):
        parts = [t.key_type, t.item_type] if pa.types.is_map(t) else [t.field(i).type for i in range(t.num_fields)]
        for part in parts:
            yield from _leaf_types(part)
    elif pa.types.is_nested(t):
        yield from _leaf_types(t.value_type)
    else:
        yield t


def _leaves(column: pa.Array) -> Iterator[pa.Array]:
    t = column.type
    if pa.types.is_struct(t):
        for i in range(t.num_fields):
            yield from _leaves(column.field(i))
    elif pa.types.is_map(t):
        yield from _leaves(column.keys)
        yield from _leaves(column.items)
    elif pa.types.is_nested(t):
        yield from _leaves(column.flatten())
    elif pa.types.is_dictionary(t):
        yield from _leaves(column.dictionary)
    else:
        yield column


def _is_fit(leaf: pa.Array) -> bool:
    t = leaf.type
    if pa.types.is_floating(t):
        return pc.all(pc.is_finite(leaf)).as_py() is not False
    if pa.types.is_temporal(t):
        return fit(leaf).null_count == leaf.null_count and fit_type(t) == t
    if pa.types.is_string(t) or pa.types.is_large_string(t):
        try:
            leaf.cast(pa.binary()).cast(pa.string())
        except pa.ArrowInvalid:
            return False
    return True


def _said(value: pa.Scalar) -> Any:
    try:
        return _finite(value.as_py())
    except Exception:  # what pyarrow, datetime, pytz and pandas raise for what they cannot say
        return None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_finite(v) for v in value)
    return value
