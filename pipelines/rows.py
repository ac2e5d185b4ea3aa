"""The rows of a query: all of them as CSV, JSON or a file; a terminal gets the first of them to look at.

Rows are written as DuckDB gives them, so a table larger than the memory goes through.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.files import atomic
from aesthetic.untrusted import printable
from curate.layout import Data
from curate.ledger.view import QueryResult
from pipelines.terminal import Verbatim

MAX_ROWS, MAX_WIDTH = 200, 60
"""Rows of a table on a terminal, and characters of a value in it."""


def show(data: Data, sql: str, out: IO[str], *, as_json: bool = False) -> str:
    """Print the rows of one SELECT over `ledger` and `verdicts`; returns a line about what was left out, or nothing.

    `out` gets CSV, or with `as_json` an array on one line; where it is a terminal, a table of the first rows. JSON has
    no NaN and no infinity: they are null.
    """
    with QueryResult(data, sql) as result:
        if out.isatty() and not as_json:
            return _table(result, out)
        stream = _RowStream(out)
        try:
            if as_json:
                stream.write("[")
                for i, record in enumerate(_json_rows(result)):
                    stream.write(f"{', ' if i else ''}{record}")
                stream.write("]\n")
            else:
                _write_csv(result, stream)
        except _ReaderGone:
            pass
        return ""


class _ReaderGone(Exception):
    """Whoever read has enough: `tastemaker query ... | head -1`."""


class _RowStream:
    """A stream for rows: as they are, in UTF-8; a terminal sees controls as escapes all the same."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._kind = str if out.isatty() else Verbatim
        with contextlib.suppress(AttributeError):
            out.reconfigure(encoding="utf-8")  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        if getattr(self._out, "write_error", None) is not None:
            raise _ReaderGone
        return self._out.write(self._kind(text))


def write(data: Data, sql: str, file: Path) -> int:
    """Write the rows of one SELECT to a new .csv, .parquet or .jsonl, whole or not at all; returns how many."""
    kind = file.suffix.lower()
    if kind not in (".csv", ".parquet", ".jsonl"):
        raise UserError(f"--out {file}: a name that ends in .csv, .parquet or .jsonl is expected")
    if file.exists() or file.is_symlink():
        raise UserError(f"--out {file}: it is there already, and is left alone. Give another name, or remove it")
    if not file.parent.is_dir():
        raise UserError(f"--out {file}: there is no folder {file.parent}")
    with QueryResult(data, sql) as result, atomic(file) as f:
        if kind == ".csv":
            text = io.TextIOWrapper(f, encoding="utf-8", newline="", write_through=True)
            rows = _write_csv(result, text)
            text.flush()
            text.detach()
            return rows
        rows = 0
        if kind == ".jsonl":
            for record in _json_rows(result):
                f.write(f"{record}\n".encode())
                rows += 1
            return rows
        try:
            with pq.ParquetWriter(f, result.schema, compression="zstd") as out:
                for batch in result.batches():
                    out.write_batch(batch)
                    rows += batch.num_rows
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as e:
            raise UserError(
                f"parquet does not hold such values: {e}. CAST(... AS VARCHAR) makes text of them"
            ) from None
        return rows


# -------------------------------------------------------------------------------------------------------------- writing


def _write_csv(result: QueryResult, out: Any) -> int:
    out.write(",".join(map(_quoted, result.columns)) + "\n")
    rows = 0
    for batch in result.batches():
        for values in zip(*_columns(batch), strict=True):
            # a lone empty value in quotes: an empty line is no row to most readers
            out.write((",".join(map(_quoted, map(_text, values))) or '""') + "\n")
        rows += batch.num_rows
    return rows


_IN_QUOTES = re.compile('[",\\r\\n]')


def _quoted(value: Any) -> str:
    """A value of a CSV line; Python's own writer leaves a lone carriage return bare, and readers end the line there."""
    text = "" if value is None else str(value)
    return '"' + text.replace('"', '""') + '"' if _IN_QUOTES.search(text) else text


def _json_rows(result: QueryResult) -> Iterator[str]:
    """Each row as a JSON object."""
    for batch in result.batches():
        for values in zip(*_columns(batch), strict=True):
            yield json.dumps(dict(zip(result.columns, map(_plain, values), strict=True)), ensure_ascii=False)


def _columns(batch: pa.RecordBatch) -> Iterator[Sequence[Any]]:
    """The columns as Python values; a float of 32 bits as the shortest number that means it, not 0.20000000298."""
    for column in batch.columns:
        if pa.types.is_float32(column.type):
            yield [None if v is None else float(v) for v in pc.cast(column, pa.string()).to_pylist()]
        else:
            yield column.to_pylist()


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Decimal):  # of sums of whole numbers, too
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.hex() if isinstance(value, bytes) else str(value)


def _text(value: Any) -> Any:
    """A value as CSV has it: what is made of parts, as JSON."""
    if value is None or (isinstance(value, str | int | float) and not isinstance(value, bool)):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list):
        return json.dumps(_plain(value), ensure_ascii=False)
    return value.hex() if isinstance(value, bytes) else str(value)


# ----------------------------------------------------------------------------------------------------------- a terminal


def _table(result: QueryResult, out: IO[str]) -> str:
    """A table of the first rows, numbers to the right; returns how many there are where it is not all of them."""
    first: list[tuple[Any, ...]] = []
    rows = 0
    for batch in result.batches():
        if rows < MAX_ROWS:
            part = batch.slice(0, MAX_ROWS - rows)
            first += zip(*_columns(part), strict=True)
        rows += batch.num_rows
    cells = [["" if v is None else printable(_text(v)) for v in row] for row in first]
    cut = any(len(cell) > MAX_WIDTH for row in cells for cell in row)
    cells = [[printable(cell, MAX_WIDTH) for cell in row] for row in cells]
    names = [printable(name, MAX_WIDTH) for name in result.columns]
    wide = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    right = [pa.types.is_floating(t) or pa.types.is_integer(t) or pa.types.is_decimal(t) for t in result.schema.types]
    for line in itertools.chain([names], cells):
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, wide, right, strict=True))
        out.write("  ".join(padded).rstrip() + "\n")
    notes = [f"{len(first):,} of {rows:,} shown"] if rows > len(first) else []
    notes += ["long values are cut"] if cut else []
    return f"{', '.join(notes)}: --out FILE.csv, .parquet or .jsonl writes all" if notes else ""
