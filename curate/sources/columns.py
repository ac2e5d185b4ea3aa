"""Columns of lists: found by their names, and made fit for tables, JSON and SQL, whatever a file holds.

A file may hold times that no calendar has, zones that nobody knows, numbers of 76 digits or none that is finite, and
text that is no UTF-8, also inside lists and structs. What cannot be represented is null.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aesthetic.errors import nearest
from aesthetic.untrusted import decode_text, printable
from curate.ledger.schema import stored_name
from curate.sources.problems import Problems

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

_SHOWN = 40  # names of columns in a message


# ------------------------------------------------------------------------------------------------------------- names


def find_column(names: Sequence[str], wanted: str, aliases: Sequence[str]) -> str | None:
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


# ------------------------------------------------------------------------------------------------------------- types


def common_type(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The type of a column whose files say `a` and `b`: the wider number, else text; None where there is none."""
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if pa.types.is_integer(a) and pa.types.is_integer(b):
        return pa.int64() if pa.uint64() not in (a, b) else pa.string()  # int64 and uint64 share no integer type
    numbers = [pa.types.is_integer(t) or pa.types.is_floating(t) for t in (a, b)]
    if all(numbers):
        return pa.float64()
    scalar = [n or pa.types.is_string(t) or pa.types.is_boolean(t) for n, t in zip(numbers, (a, b), strict=True)]
    return pa.string() if all(scalar) else None


def is_text(t: pa.DataType) -> bool:
    """Whether a column holds text, or bytes that may be text."""
    return pa.types.is_string(t) or pa.types.is_binary(t) or pa.types.is_large_string(t) or pa.types.is_large_binary(t)


def is_texts(t: pa.DataType) -> bool:
    """Whether a column holds lists of texts, as captions sometimes are."""
    return (pa.types.is_list(t) or pa.types.is_large_list(t)) and plain_type(t.value_type) == pa.string()


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
    if pa.types.is_float16(t):
        return pa.float32()
    if any(pa.types.is_decimal256(leaf.type) for leaf in _leaves(pa.nulls(0, t))):
        return pa.string()  # no SQL type has so many digits
    if pa.types.is_timestamp(t) and t.tz is not None:
        try:
            pa.lib.string_to_tzinfo(t.tz)
        except Exception:  # pytz's or zoneinfo's, whichever is there
            return pa.timestamp(t.unit, "UTC")
    return t


# ------------------------------------------------------------------------------------------------------------ values


def plain(column: pa.Array, problems: Problems | None = None, name: str = "", row: int = 0) -> pa.Array:
    """A column in `plain_type`, with null for values that cannot be represented.

    `name` and `row`, the index of its first value, name what goes into `problems`.
    """
    if isinstance(column, pa.ExtensionArray):
        return plain(column.storage, problems, name, row)
    t, wanted = column.type, plain_type(column.type)
    if pa.types.is_dictionary(t):
        return plain(column.dictionary_decode(), problems, name, row)
    if pa.types.is_temporal(t):
        return _within_bounds(column).cast(wanted)
    if pa.types.is_nested(t) and (wanted != t or not all(map(_is_fit, _leaves(column)))):
        values = [_to_python(value) for value in column]
        if pa.types.is_string(wanted):
            values = [None if v is None else str(v) for v in values]
        return pa.array(values, wanted)
    column = column.cast(wanted)
    if pa.types.is_string(wanted) and not pa.types.is_decimal256(t):
        return as_text(column.cast(pa.binary()), problems, name, row)
    if pa.types.is_floating(wanted):
        return pc.if_else(pc.is_finite(column), column, pa.scalar(None, wanted))
    return column


_DAY = 86_400
_FIRST, _LAST = -719_160 * _DAY, 2_932_894 * _DAY
"""Seconds since 1970: the years 1 to 9999 without their first and last days, which a zone may move out of them."""

_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def _within_bounds(column: pa.Array) -> pa.Array:
    """A column of dates, times or durations, with null for those that Python and SQL do not have."""
    t = column.type
    if pa.types.is_timestamp(t):
        # the lowest integer of all is pandas' "no time"
        low, high = max(_FIRST * _UNITS[t.unit], -(2**63) + 1), min(_LAST * _UNITS[t.unit], 2**63 - 1)
    elif pa.types.is_date(t):
        unit = 1 if pa.types.is_date32(t) else _DAY * 1000
        low, high = _FIRST // _DAY * unit, _LAST // _DAY * unit
    elif pa.types.is_time(t):
        low, high = 0, _DAY * _UNITS[t.unit] - 1
    elif pa.types.is_duration(t):
        high = min(999_999_999 * _DAY * _UNITS[t.unit], 2**63 - 1)
        low = -high
    else:
        return column
    integers = column.view(pa.int32() if t.bit_width == 32 else pa.int64())
    inside = pc.and_(pc.greater_equal(integers, low), pc.less_equal(integers, high))
    return column if pc.all(inside).as_py() else pc.if_else(inside, column, pa.scalar(None, t))


def _leaves(column: pa.Array) -> Iterator[pa.Array]:
    """The columns of scalars that a column of structs, maps or lists is made of; itself, where it is none."""
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
        return plain(leaf).null_count == leaf.null_count and plain_type(t) == t
    if pa.types.is_string(t) or pa.types.is_large_string(t):
        try:
            leaf.cast(pa.binary()).cast(pa.string())
        except pa.ArrowInvalid:
            return False
    return True


def _to_python(value: pa.Scalar) -> Any:
    def finite(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, dict):
            return {k: finite(v) for k, v in value.items()}
        return type(value)(map(finite, value)) if isinstance(value, list | tuple) else value

    try:
        return finite(value.as_py())
    except Exception:  # what pyarrow, datetime, pytz and pandas raise for what they do not have
        return None


def column_as(
    batch: pa.RecordBatch, name: str | None, wanted: pa.DataType, problems: Problems | None = None
) -> pa.Array:
    """A plain column of a batch in the type that all files of the list agree on; nulls where there is none."""
    if name is None or name not in batch.schema.names:
        return pa.nulls(batch.num_rows, wanted)
    column = batch.column(name)
    if column.type == wanted:
        return column
    if pa.types.is_string(wanted) and pa.types.is_binary(column.type):
        return as_text(column, problems, name)
    if pa.types.is_string(wanted) and is_texts(column.type):  # `caption_of`, a column at a time
        texts = plain(column.flatten())
        filled = pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(texts), ""), False)
        rows, firsts = np.unique(pc.list_parent_indices(column).filter(filled).to_numpy(), return_index=True)
        places = np.full(len(column), -1)
        places[rows] = firsts
        return texts.filter(filled).take(pa.array(places, mask=places < 0))
    return column.cast(wanted, safe=not pa.types.is_floating(wanted))  # 2**53 + 1 rounds where others have fractions


def stored_batch(
    batch: pa.RecordBatch,
    url: str,
    caption: str | None,
    extra_columns: pa.Schema,
    own_columns: Sequence[tuple[str, pa.DataType]] = (),
    problems: Problems | None = None,
    absent: Collection[str] = (),
) -> pa.RecordBatch:
    """A batch of a list as our columns, in their types and under the names that they are stored by.

    Null where this file of the list has no such column, or where it is one of those that are `absent`, as others have
    them alone. `own_columns` are those of ours that the input has beside.
    """
    wanted: list[tuple[str | None, str, pa.DataType]] = [(url, "url", pa.string()), (caption, "caption", pa.string())]
    wanted += [(None if f.name in absent else f.name, stored_name(f.name), f.type) for f in extra_columns]
    wanted += [(name, stored_own(name), kind) for name, kind in own_columns]
    arrays = [column_as(batch, name, kind, problems) for name, _, kind in wanted]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema([(stored, kind) for _, stored, kind in wanted]))


def stored_own(name: str) -> str:
    """What a column of ours beside the list's is called in a file of the plan: the list has none that begins with @."""
    return name.replace("\0", "@")


def as_text(binary: pa.Array, problems: Problems | None = None, name: str = "", row: int = 0) -> pa.Array:
    """Bytes as text; null, and a problem, what is not UTF-8 or too long."""
    binary = shortened(binary, LONGEST_VALUE, problems, name, row)
    try:
        return binary.cast(pa.string())  # checks UTF-8; nearly every list passes
    except pa.ArrowInvalid:
        pass
    texts = []
    for i, value in enumerate(binary.to_pylist()):
        decoded = decode_text(value) if value is not None else None
        texts.append(decoded.text if decoded and decoded.certain else None)
        if decoded and not decoded.certain and problems is not None:
            problems.add("not_utf8", f"row {row + i + 1:,}: {name} {shown(value[:60])}")
    return pa.array(texts, pa.string())


def shortened(column: pa.Array, longest: int, problems: Problems | None, name: str, row: int) -> pa.Array:
    """A column without texts of more than `longest` bytes."""
    if not is_text(column.type) or longest_text(column) <= longest:
        return column
    long = pc.fill_null(pc.greater(pc.binary_length(column), longest), False)
    if problems is not None:
        for i in pc.indices_nonzero(long).to_pylist():
            problems.add("too_long", f"row {row + i + 1:,}: {name}")
    # not if_else, whose result is as large as what it had
    return column.take(pa.array(np.arange(len(column)), mask=long.to_numpy(zero_copy_only=False)))


def longest_text(column: pa.Array) -> int:
    """Bytes of the longest text of a column, 0 where it holds none."""
    texts = column.dictionary if pa.types.is_dictionary(column.type) else column
    return pc.max(pc.binary_length(texts)).as_py() or 0 if is_text(texts.type) else 0


def shown(data: bytes) -> str:
    """The beginning of bytes that may be no text, for people."""
    return printable(data[:200].decode("utf-8", "backslashreplace").rstrip("\r\n"), 100)
