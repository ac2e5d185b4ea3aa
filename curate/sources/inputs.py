"""An input: one file of a list, one tar or one folder of images, as typed columns that are read in pieces.

Text is made text by one rule, wherever it comes from. A byte order mark says the encoding, else it is UTF-8; a value
that is not is null, counted and named, as is one of more than 4 MB. A lone surrogate in JSON becomes U+FFFD, NUL
stays, null stays null. A number that is not finite is null (JSON has none, and SQL takes NaN for the largest number).
A line that is broken is a row with a failure; more than one in a hundred are an error.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from aesthetic.errors import UserError
from aesthetic.untrusted import caption_of, clean, printable
from curate.ledger.schema import EMBEDDED_COLUMNS, FETCHED_COLUMNS, Reason
from curate.sources.columns import (
    CAPTION_NAMES,
    LONGEST_VALUE,
    URL_NAMES,
    describe,
    find_column,
    listed,
    shown,
)
from curate.sources.lines import Broken
from curate.sources.problems import Problems
from curate.store.files import sha256_file

MOST_COLUMNS = 2_000
"""Of a table of text; more are the sign of another delimiter, or of no list."""

FAILURES = (("\0reason", pa.string()), ("\0error", pa.string()))
"""What a row of a list with broken lines has beside the list's columns, whose names hold no NUL."""

PLACE_COLUMNS = (
    ("@path", pa.string()),  # of the file that holds the bytes, relative to the plan's base
    ("@offset", pa.int64()),  # of the first byte; in a parquet file the index of the row
    ("@size", pa.int64()),
    ("@status", pa.string()),  # these three are set, and those above null, where the row came with a failure
    ("@reason", pa.string()),
    ("@error", pa.string()),
)
"""What a row of a folder of images has beside the list's columns."""

RESULT_COLUMNS = {name for name, _ in FETCHED_COLUMNS + EMBEDDED_COLUMNS}
"""Columns of a former run, img2dataset's or ours: results, which this run finds out anew."""

_MOST_NAMES = 500
"""Different names in the JSON of samples that become columns; what more there are is left out, and that is said."""


def place(path: str, offset: int, size: int | None) -> dict[str, Any]:
    """PLACE_COLUMNS of an image that is there."""
    return {"@path": path, "@offset": offset, "@size": size, "@status": None, "@reason": None, "@error": None}


def no_place(reason: Reason, error: str) -> dict[str, Any]:
    """PLACE_COLUMNS of a row that came without an image."""
    absent = dict.fromkeys(("@path", "@offset", "@size"))
    return {**absent, "@status": reason.status.value, "@reason": reason.value, "@error": error}


class Input:
    """The rows of one file of a list, or of one tar, table or folder that holds images."""

    url: str | None  # the columns that hold these, as `schema` calls them
    caption: str | None
    schema: pa.Schema  # the list's columns, under its own names
    rows: int
    local = False  # whether `batches` adds the place of the bytes
    uncaptioned = 0  # rows without a caption, where a file of each may tell it; a column's are not counted
    own_columns: tuple[tuple[str, pa.DataType], ...] = ()  # of ours, that every batch has beside the list's

    def __init__(self, path: Path) -> None:
        self.path = path
        self.origin: dict[str, Any] = {}  # of a copy: what it is a copy of
        self.constants: dict[str, str | None] = {}  # columns of one text in every row, that the file does not have
        self.problems = Problems()

    def digest(self) -> str:
        """A sha256 that names what is in this input."""
        return sha256_file(self.path)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """All rows in order, some at a time, with at least those of the named columns that the file has."""
        raise NotImplementedError

    def resolve(self, names: Sequence[str], url: str, caption: str | None) -> None:
        """Find the two columns among the names, which must differ from each other.

        Only the default names stand for others: what someone asked for by name must be there.
        """
        if twice := sorted(n for n, count in Counter(names).items() if count > 1):
            raise UserError(f"{self.path}: two columns are called {printable(twice[0], 80)!r}. Rename one of them.")
        for wanted, default in ((url, "url"), (caption, "caption")):
            if wanted not in (None, default, *names):
                raise UserError(
                    f"{self.path}: there is no column {wanted!r} (source.{default}). {describe(names, wanted)}"
                )
        self.url = find_column(names, url, URL_NAMES)
        self.caption = find_column(names, caption, CAPTION_NAMES) if caption is not None else None

    def check_broken(self, hint: str = "") -> None:
        """A few broken lines are rows with a failure; more than one in a hundred raise UserError."""
        self.problems.refuse_many("broken", self.rows, str(self.path), hint)
        if self.problems.counts["broken"]:
            self.own_columns = FAILURES


def with_constants(batch: pa.RecordBatch, constants: Mapping[str, str | None]) -> pa.RecordBatch:
    """A batch with columns that hold one text in every row."""
    for name, value in constants.items():
        batch = batch.append_column(name, pa.array([value] * batch.num_rows, pa.string()))
    return batch


def failure_columns(rows: int, broken: Mapping[int, Broken]) -> list[pa.Array]:
    """FAILURES of some rows."""
    reasons: list[str | None] = [None] * rows
    errors: list[str | None] = [None] * rows
    for row, line in broken.items():
        reasons[row], errors[row] = Reason.BAD_LINE.value, str(line)
    return [pa.array(reasons, pa.string()), pa.array(errors, pa.string())]


class RowsInput(Input):
    """Rows that come as dicts: from JSON, text lines, tars and folders. They are gone through once for the types."""

    content: str  # a digest of all rows, where they are local

    def objects(self) -> Iterator[dict[str, Any] | Broken]:
        """The rows in order; called more than once."""
        raise NotImplementedError

    def scan(self) -> None:
        """Count the rows and find the columns, in order of appearance, and the type of each.

        A column of integers and other numbers is float64, one of several kinds is text, and what is nested is JSON
        text.
        """
        own = {name for name, _ in self.own_columns}
        kinds: dict[str, set[type]] = {}
        content = hashlib.sha256()
        self._no_captions: defaultdict[str, Problems] = defaultdict(Problems)  # by column
        self.rows = 0
        for row in self.objects():
            self.rows += 1
            if isinstance(row, Broken):
                self.problems.add("broken", str(row))
                continue
            if self.local:
                self.uncaptioned += row["caption"] is None
                content.update(json.dumps(row, default=str).encode() + b"\n")
            for name, value in row.items():
                if name in own:
                    continue
                seen = kinds.setdefault(name, set())
                if value is not None:
                    is_long = type(value) is int and not -(2**63) <= value < 2**63
                    kind = type(value) if isinstance(value, bool | int | float) and not is_long else str
                    seen.add(kind)
                    if kind not in (int, float):
                        self._check(name, value)
            if len(kinds) > MOST_COLUMNS:
                raise UserError(
                    f"{self.path}: has more than {MOST_COLUMNS:,} columns. The first: {listed(list(kinds))}"
                )
        self.content = content.hexdigest()
        types = [(n, _ARROW.get(frozenset(k), pa.string() if k else pa.null())) for n, k in kinds.items()]
        self.schema = pa.schema(types)

    def _check(self, name: str, value: Any) -> None:
        """Note a value that is no text, or could be no caption."""
        if isinstance(value, str):
            if _value(value, pa.string()) is None:
                long = len(value) > LONGEST_VALUE
                beginning = "" if long else " " + shown(value[:60].encode("utf-8", "surrogateescape"))
                self.problems.add("too_long" if long else "not_utf8", f"row {self.rows:,}: {name}{beginning}")
        elif value not in ([], {}) and caption_of(value) is None:
            as_json = json.dumps(value, ensure_ascii=False, default=str)
            self._no_captions[name].add("no_caption", f"row {self.rows:,}: {printable(as_json, 60)}")

    def finish(self) -> None:
        """Once the two columns are known: they are text, and captions that are none are problems."""
        found = self._no_captions.get(self.caption or "", Problems())
        self.problems.counts += found.counts
        self.problems.first |= found.first
        text = (self.url, self.caption)
        self.schema = pa.schema([(f.name, pa.string() if f.name in text else f.type) for f in self.schema])

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        fields = [f for f in self.schema if f.name in columns]
        schema = pa.schema([*fields, *self.own_columns])
        rows = self.objects()
        while chunk := list(islice(rows, 8192)):
            found = [{} if isinstance(r, Broken) else r for r in chunk]
            arrays = []
            for f in fields:
                values = (r.get(f.name) for r in found)
                if f.name == self.caption:
                    values = (v if v is None or isinstance(v, str) else caption_of(v) for v in values)
                arrays.append(pa.array([_value(v, f.type) for v in values], f.type))
            if self.own_columns == FAILURES:
                arrays += failure_columns(len(chunk), {i: r for i, r in enumerate(chunk) if isinstance(r, Broken)})
            else:
                arrays += [pa.array([r.get(name) for r in found], kind) for name, kind in self.own_columns]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)


_ARROW = {
    frozenset([bool]): pa.bool_(),
    frozenset([int]): pa.int64(),
    frozenset([float]): pa.float64(),
    frozenset([int, float]): pa.float64(),
}
_NO_UTF8 = re.compile("[\udc80-\udcff]")  # what bytes that are none become while JSON is read


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


class SamplesInput(RowsInput):
    """Rows that are samples: what is known of each becomes its columns, and each has a place or a failure."""

    local = True
    own_columns = PLACE_COLUMNS

    def __init__(self, path: Path, url: str, caption: str | None) -> None:
        super().__init__(path)
        self._wanted_url, self._wanted_caption = url, caption
        self._names: set[str] = set()
        self.url, self.caption = "url", "caption"

    def read_all(self) -> None:
        """Go through all rows once; raises UserError where the JSON of too many can't be read."""
        self.scan()
        self.finish()
        self.problems.refuse_many("json", self.rows, str(self.path))

    def row(self, facts: dict[str, Any], caption: str | None, place: dict[str, Any], name: str) -> dict[str, Any]:
        """A row from what is known of a sample; `caption` is that of a file of its own, `name` stands for its URL."""
        url, text = find_column(list(facts), self._wanted_url, URL_NAMES), None
        value = facts.get(url) if url else None
        result: dict[str, Any] = {"url": value if isinstance(value, str) and value else name, "caption": None}
        if self._wanted_caption is not None:
            text = find_column(list(facts), self._wanted_caption, CAPTION_NAMES)
            result["caption"] = caption or (caption_of(facts[text]) if text else None)
        for key, value in facts.items():
            if key in (url, text, "url", "caption") or key in RESULT_COLUMNS or key in place:
                continue
            if len(self._names) < _MOST_NAMES:
                self._names.add(key)
            if key in self._names:
                result[clean(key)] = value
            else:
                self.problems.add_once("names", key)
        return result | place


def merged(row: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The row of a parquet and the JSON of the same sample, which has the last word."""
    return row | {k: v for k, v in facts.items() if v is not None or k not in row}
