"""A rating file's columns: CSV, TSV, parquet or AVA.txt, and where in it a mistake is.

Files are parsed by Arrow and turned into text or numbers a column at a time; the line of a mistake is looked for only
once there is one.
"""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from aesthetic.heads import HeadError

if TYPE_CHECKING:
    import pandas as pd

Texts = npt.NDArray[np.object_]
Array = npt.NDArray[np.float64]

AVA_COLUMNS = ("index", "image_id", *map(str, range(1, 11)), "tag1", "tag2", "challenge")
POSITIVE = float(np.finfo(np.float64).tiny)  # the lowest number above 0
EMPTY = ("", "nan", "na", "n/a", "null")
"""How a cell without a number is written, by spreadsheets, pandas and R."""

_WHOLE = re.compile(r"-?[0-9]{1,18}")
_BLOCK = 64 << 20  # bytes that Arrow parses at a time; no row may be longer


@dataclass(frozen=True, eq=False)
class RatingFile:
    """A file's columns: text as it stands in a CSV, or parquet's own types."""

    path: Path
    table: pa.Table
    rows: npt.NDArray[np.int64] | None = None  # where the table's rows stand in the file, if some are left out

    @classmethod
    def read(cls, path: Path) -> RatingFile:
        """Parse a file by its suffix, without columns of bytes or nested values.

        Raises HeadError where it is not what its name says, or a row is too long or too short.
        """
        kind = path.suffix.lower()
        parse = {".csv": _parse_csv, ".tsv": _parse_csv, ".parquet": _parse_parquet, ".txt": _parse_ava}.get(kind)
        if parse is None:
            raise HeadError(f"{path}: a rating file is .csv, .tsv or .parquet, or AVA's .txt")
        if not path.is_file():
            raise HeadError(f"{path}: no such file")
        table = parse(path)
        for i, field in enumerate(table.schema):
            if pa.types.is_dictionary(field.type) or pa.types.is_large_string(field.type):
                table = table.set_column(i, field.name, pc.cast(table[field.name], pa.string()))
        return cls(path, table)

    def filled(self, columns: Iterable[str], words: bool = False) -> RatingFile:
        """The file without the rows in which all of these columns are empty; words: NA and nan are no empty cells."""
        there = np.zeros(len(self.table), bool)
        for column in columns:
            there |= ~np.isin(self.words(column), [""] if words else EMPTY)
        return self if there.all() else RatingFile(self.path, self.table.filter(there), np.flatnonzero(there))

    def error(self, row: int, message: str) -> HeadError:
        """What is wrong with a row, and where it is."""
        return HeadError(f"{self.path}, {self.place(row)}: {message}")

    def place(self, row: int) -> str:
        """What to call a row (from 0) in a message: its line, the last one where it has several."""
        row = row if self.rows is None else int(self.rows[row])
        if self.path.suffix.lower() == ".parquet":
            return f"row {row}"
        with open(self.path, newline="", encoding="utf-8-sig") as f:
            if self.path.suffix.lower() == ".txt":
                lines = (i for i, line in enumerate(f, 1) if line.strip())
            else:
                reader = csv.reader(f, delimiter=_delimiter(self.path))
                next(reader)
                lines = (reader.line_num for fields in reader if fields)
            return f"line {next(line for i, line in enumerate(lines) if i == row)}"

    def find(self, names: Iterable[str]) -> str | None:
        """The first of the names that is a column, in upper or lower case."""
        columns = self.table.column_names
        folded = {c.lower(): c for c in reversed(columns)}
        return next((name if name in columns else folded[name] for name in names if name in folded), None)

    def choose(self, role: str, asked: str | None, names: Iterable[str]) -> str:
        """The column that was asked for, or else the first of the names; raises HeadError where there is none."""
        columns = self.table.column_names
        there = ", ".join(columns) or "none"
        if asked is None:
            if found := self.find(names):
                return found
            usual = ", ".join(names)
            raise HeadError(f"{self.path}: no column for the {role} ({usual}). Columns: {there}; say which one it is")
        if asked not in columns:
            raise HeadError(f"{self.path} has no column {asked!r}. Columns: {there}{did_you_mean(asked, columns)}")
        return asked

    def text(self, column: str) -> Texts:
        """A column as text; raises HeadError where a cell is empty."""
        cells = self.table[column]
        if pa.types.is_floating(cells.type) and pc.all(pc.equal(pc.round(cells), cells)).as_py():
            cells = pc.cast(cells, pa.int64())  # ids of a column that once had missing values: 12.0 is 12
        cells = pc.cast(cells, pa.string())
        empty = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(cells), ""), True).to_numpy()
        if empty.any():
            raise self.error(int(empty.argmax()), f"{column} is empty")
        return cells.to_numpy()

    def words(self, column: str) -> Texts:
        """A column as text in lower case without surrounding spaces; "" where a cell is empty."""
        cells = pc.utf8_trim_whitespace(pc.cast(self.table[column], pa.string()))
        return pc.fill_null(pc.utf8_lower(cells), "").to_numpy()

    def numbers(
        self, column: str, wanted: str = "a number", *, low: float = -np.inf, may_be_empty: bool = False
    ) -> Array:
        """A column as finite numbers of at least `low`, NaN where a cell may be empty; raises HeadError for others."""
        cells = self.table[column]
        try:
            trimmed = pc.utf8_trim_whitespace(cells) if pa.types.is_string(cells.type) else cells
            values = pc.cast(trimmed, pa.float64(), safe=False).to_numpy()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            values = np.array([_float(v) for v in cells.to_pylist()])
        wrong = ~(np.isfinite(values) & (values >= low))
        if may_be_empty and wrong.any():
            wrong &= ~np.isin(self.words(column), EMPTY)
        if wrong.any():
            row = int(wrong.argmax())
            raise self.error(row, f"{column} is {cells[row].as_py()!r}, not {wanted}")
        return values

    def values(self, column: str) -> pd.Series:
        """A column of no known role; of CSV as numbers where every filled cell is one. What is empty is missing."""
        cells = self.table[column]
        if self.path.suffix.lower() in (".csv", ".tsv"):
            cells = pc.if_else(pc.equal(pc.utf8_trim_whitespace(cells), ""), None, cells)
            if not pc.any(pc.match_substring_regex(cells, r"^\s*[+-]?0\d")).as_py():  # 007 is a name
                for number in (pa.int64(), pa.float64()):
                    try:
                        return pc.cast(pc.utf8_trim_whitespace(cells), number).to_pandas()
                    except pa.ArrowInvalid:
                        continue
        return cells.to_pandas()


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, if any is near."""
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _parse_parquet(path: Path) -> pa.Table:
    import pyarrow.parquet as pq
    from pyarrow import types

    try:
        with pq.ParquetFile(path) as file:
            names = [
                f.name
                for f in file.schema_arrow
                if not (types.is_nested(f.type) or types.is_binary(f.type) or types.is_large_binary(f.type))
            ]
            return file.read(names)
    except (pa.ArrowException, OSError) as e:
        raise HeadError(f"{path}: not a parquet file that can be read: {e}") from e


def _parse_csv(path: Path) -> pa.Table:
    from pyarrow.csv import ConvertOptions, ParseOptions, ReadOptions, read_csv

    delimiter = _delimiter(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            names = [name.strip() for name in next(csv.reader(f, delimiter=delimiter, strict=True), [])]
        if len(set(names)) != len(names):
            raise HeadError(f"{path}: a column name occurs twice: {', '.join(names)}")
        if not names:
            return pa.table({})
        return read_csv(
            path,
            read_options=ReadOptions(column_names=names, skip_rows_after_names=1, block_size=_BLOCK),
            parse_options=ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
    except (UnicodeDecodeError, csv.Error, pa.ArrowInvalid) as e:
        raise _csv_error(path, e) from e


def _csv_error(path: Path, error: Exception) -> HeadError:
    """What is wrong with a CSV that Arrow cannot parse, and where: Python's reader counts lines."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.reader(f, delimiter=_delimiter(path), strict=True)
            names = next(reader, [])
            for row in reader:
                if row and len(row) != len(names):
                    return HeadError(f"{path}, line {reader.line_num}: {len(row)} fields, the header has {len(names)}")
    except (UnicodeDecodeError, csv.Error) as e:
        error = e
    return HeadError(f"{path}: not {path.suffix[1:].upper()} in UTF-8: {error}")


def _parse_ava(path: Path) -> pa.Table:
    import pandas as pd

    try:
        table = pd.read_csv(path, sep=r"\s+", header=None, dtype=np.int64, quoting=csv.QUOTE_NONE)
    except pd.errors.EmptyDataError:
        raise HeadError(f"{path}: no ratings in it") from None
    except ValueError as e:  # text, or lines of unequal length
        raise _ava_error(path) from e
    if table.shape[1] != len(AVA_COLUMNS):
        raise _ava_error(path)
    table.columns = pd.Index(AVA_COLUMNS)
    for code in ("image_id", "tag1", "tag2", "challenge"):  # numbers that name something
        table[code] = table[code].astype(str)
    return pa.Table.from_pandas(table.drop(columns="index"), preserve_index=False)


def _ava_error(path: Path) -> HeadError:
    need = (
        f"a line of AVA.txt is {len(AVA_COLUMNS)} whole numbers: index, image id, votes 1 to 10, two tags, challenge. "
        "Other ratings go into a .csv with a header"
    )
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        for i, line in enumerate(f, 1):
            fields = line.split()
            if fields and (len(fields) != len(AVA_COLUMNS) or not all(_WHOLE.fullmatch(v) for v in fields)):
                return HeadError(f"{path}, line {i}: {line.strip()[:80]!r}; {need}")
    return HeadError(f"{path}: {need}")
