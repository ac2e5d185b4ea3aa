"""A rating file's columns: CSV, TSV, parquet or AVA.txt, and where in it a mistake is.

Files are parsed by Arrow and turned into text or numbers a column at a time; the line of a mistake is looked for only
once there is one.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from aesthetic.errors import UserError, nearest
from aesthetic.heads import HeadError
from aesthetic.tables import HEAD, TableShape, kind_of, table_shape
from aesthetic.untrusted import LARGEST_TEXT, check_regular, decode_text, open_regular, read_bytes

if TYPE_CHECKING:
    import pandas as pd

Texts = npt.NDArray[np.object_]
Array = npt.NDArray[np.float64]

LABEL_NAME = "label"
IMAGE_NAMES = (
    *("image", "key", "path", "image_path", "file", "filename", "file_name", "image_name", "image_id"),
    *("url", "image_url", "sha256", "image_sha256", "name", "id"),
)
SCORE_NAMES = ("score", "rating", "mean", "mos")
RATER_NAMES = ("rater", "rater_id", "user", "user_id", "worker", "worker_id", "annotator", "annotator_id")
N_NAMES = ("n", "votes", "n_votes", "num_votes")
SD_NAMES = ("sd", "std")
SIDE_NAMES = (("image_a", "image_b"), ("image_1", "image_2"), ("image_left", "image_right"), ("left", "right"))
CHOICE_NAMES = ("winner", "choice", "preference", LABEL_NAME)
"""Names of columns that are looked for where none is given: in this order, in upper or lower case."""

YES, NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")
TIES = ("tie", "tied", "draw", "equal", "same", "both", "neither")

AVA_COLUMNS = ("index", "image_id", *map(str, range(1, 11)), "tag1", "tag2", "challenge")
POSITIVE = float(np.finfo(np.float64).tiny)  # the lowest number above 0
EMPTY = ("", "nan", "na", "n/a", "null")
"""How a cell without a number is written, by spreadsheets, pandas and R."""

LARGEST = 4 << 30  # bytes of a rating file, and of what is in it: 100 million votes
_TOO_LARGE = "more than ratings take; leave out columns and rows that say nothing of them"

_WHOLE = re.compile(r"-?[0-9]{1,18}")
_BLOCK = 64 << 20  # bytes that Arrow parses at a time; no row may be longer


def _folded(name: str) -> str:
    return re.sub(r"[\s_\-]+", "", name).lower()


@dataclass(frozen=True, eq=False)
class RatingFile:
    """A file's columns: text as it stands in a CSV, or parquet's own types."""

    path: Path
    table: pa.Table
    shape: TableShape | None = None  # how a text is written: of .csv and .tsv
    rows: npt.NDArray[np.int64] | None = None  # where the table's rows stand in the file, if some are left out

    @classmethod
    def read(cls, path: Path) -> RatingFile:
        """Parse a file by its suffix, without columns of bytes or nested values.

        The encoding of a text is that of its byte order mark, else UTF-8; its delimiter may be another than its suffix
        says, where it shows that. Raises HeadError where it is no regular file, too large, not what its name says, or a
        row is too long or too short.
        """
        kind = path.suffix.lower()
        if kind not in (".csv", ".tsv", ".parquet", ".txt"):
            raise HeadError(f"{path}: a rating file is .csv, .tsv or .parquet, or AVA's .txt")
        try:
            check_regular(path, LARGEST)
            with open_regular(path) as f:
                head = f.read(HEAD)
            found = kind_of(head)
            if found and not (kind == ".parquet" and head.startswith(b"PAR1")):
                raise UserError(f"{path}: is {found}")
            shape = None
            if kind in (".csv", ".tsv"):
                shape = table_shape(head, "\t" if kind == ".tsv" else ",", str(path))
        except UserError as e:
            raise HeadError(str(e)) from None
        if shape is not None:
            table = _parse_csv(path, shape)
        else:
            table = _parse_parquet(path) if kind == ".parquet" else _parse_ava(path)
        for i, field in enumerate(table.schema):
            if pa.types.is_dictionary(field.type) or pa.types.is_large_string(field.type):
                table = table.set_column(i, field.name, pc.cast(table[field.name], pa.string()))
        return cls(path, table, shape)

    def filled(self, columns: Iterable[str], words: bool = False) -> RatingFile:
        """The file without the rows in which all of these columns are empty; words: NA and nan are no empty cells."""
        filled = np.zeros(len(self.table), bool)
        for column in columns:
            filled |= ~np.isin(self.words(column), [""] if words else EMPTY)
        if filled.all():
            return self
        return replace(self, table=self.table.filter(filled), rows=np.flatnonzero(filled))

    def error(self, row: int, message: str) -> HeadError:
        """What is wrong with a row, and where it is."""
        return HeadError(f"{self.path}, {self.locate(row)}: {message}")

    def locate(self, row: int) -> str:
        """What to call a row (from 0) in a message: its line, the last one where it has several."""
        row = row if self.rows is None else int(self.rows[row])
        if self.shape is not None:
            lines = (line for line, fields in _lines(self.path, self.shape) if fields)
        elif self.path.suffix.lower() == ".txt":
            lines = (i for i, line in enumerate(_ava_text(self.path).splitlines(), 1) if line.strip())
        else:
            return f"row {row}"
        try:
            return f"line {next(line for i, line in enumerate(lines) if i == row)}"
        except csv.Error:  # a field longer than Python's reader takes
            return f"row {row + 1} below the header"

    def find(self, names: Iterable[str]) -> str | None:
        """The first of the names that is a column; capitals, and blanks, - or nothing in place of _, do not matter."""
        columns = self.table.column_names
        folded = {_folded(c): c for c in reversed(columns)}
        found = (name if name in columns else folded.get(_folded(name)) for name in names)
        return next((name for name in found if name is not None), None)

    def choose(self, role: str, given: str | None, names: Iterable[str]) -> str:
        """The column that was asked for, or else the first of the names; raises HeadError where there is none."""
        columns = self.table.column_names
        listed = ", ".join(columns) or "none"
        if given is None:
            if found := self.find(names):
                return found
            usual = ", ".join(names)
            option = "--key" if role == "image" else "--score"
            raise HeadError(
                f"{self.path}: no column for the {role} ({usual}). Columns: {listed}; say which one it is: "
                f"{option} COLUMN"
            )
        if given not in columns:
            raise HeadError(f"{self.path} has no column {given!r}. Columns: {listed}{did_you_mean(given, columns)}")
        return given

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
            values = pc.cast(self._trimmed(cells), pa.float64(), safe=False).to_numpy()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            values = np.array([_float(v) for v in self._trimmed(cells).to_pylist()])
        wrong = ~(np.isfinite(values) & (values >= low))
        if may_be_empty and wrong.any():
            wrong &= ~np.isin(self.words(column), EMPTY)
        if wrong.any():
            row = int(wrong.argmax())
            raise self.error(row, f"{column} is {cells[row].as_py()!r}, not {wanted}")
        return values

    def _trimmed(self, cells: pa.ChunkedArray) -> pa.ChunkedArray:
        """Text without the white space around it; numbers with a decimal comma, where no comma parts cells, with a
        point."""
        if not pa.types.is_string(cells.type):
            return cells
        cells = pc.utf8_trim_whitespace(cells)
        if self.shape is None or self.shape.delimiter == ",":
            return cells
        comma = pc.fill_null(pc.match_substring_regex(cells, r"^[+-]?\d*,\d+$"), False)
        return pc.if_else(comma, pc.replace_substring(cells, ",", "."), cells)

    def values(self, column: str) -> pd.Series:
        """A column of no known role; of CSV as numbers where every filled cell is one. What is empty is missing."""
        cells = self.table[column]
        if self.shape is not None:
            cells = pc.if_else(pc.equal(pc.utf8_trim_whitespace(cells), ""), None, cells)
            if not pc.any(pc.match_substring_regex(cells, r"^\s*[+-]?0\d")).as_py():  # 007 is a name
                for number in (pa.int64(), pa.float64()):
                    try:
                        return pc.cast(self._trimmed(cells), number).to_pandas()
                    except pa.ArrowInvalid:
                        continue
        return cells.to_pandas()


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, if any is near."""
    near = nearest(word, words)
    return f"; did you mean {near!r}?" if near else ""


def _float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _parse_parquet(path: Path) -> pa.Table:
    import pyarrow.parquet as pq
    from pyarrow import types

    try:
        schema = pq.read_schema(path)
        names = [
            f.name
            for f in schema
            if not (types.is_nested(f.type) or types.is_binary(f.type) or types.is_large_binary(f.type))
        ]
        # texts as indices into a dictionary, as they mostly lie there: a few kilobytes can stand for terabytes
        texts = [
            n for n in names if types.is_string(schema.field(n).type) or types.is_large_string(schema.field(n).type)
        ]
        with pq.ParquetFile(path, read_dictionary=texts) as file:
            about = file.metadata
            parts = [
                about.row_group(g).column(c) for g in range(about.num_row_groups) for c in range(about.num_columns)
            ]
            size = max(sum(p.total_uncompressed_size for p in parts), 8 * about.num_rows * len(names))
            if size > LARGEST:
                raise HeadError(f"{path}: {about.num_rows:,} rows in {size:,} bytes: {_TOO_LARGE}")
            table = file.read(names)
        if sum(_length(chunk) for column in table.columns for chunk in column.chunks) > LARGEST:
            raise HeadError(f"{path}: {_TOO_LARGE}")
        table.validate(full=True)  # that texts are UTF-8, for one
        return table
    except (pa.ArrowException, OSError, ValueError, MemoryError) as e:
        raise HeadError(f"{path}: not a parquet file that can be read: {e}") from e


def _length(values: pa.Array) -> int:
    """The bytes of the values of an array, of texts in a dictionary as if each were written out."""
    if not pa.types.is_dictionary(values.type) or not (
        pa.types.is_string(values.type.value_type) or pa.types.is_large_string(values.type.value_type)
    ):
        return int(values.nbytes)
    lengths = pc.cast(pc.binary_length(values.dictionary), pa.int64())
    return pc.sum(lengths.take(values.indices)).as_py() or 0


def _parse_csv(path: Path, shape: TableShape) -> pa.Table:
    from pyarrow.csv import ConvertOptions, ParseOptions, ReadOptions, read_csv

    names = list(shape.names)
    if len(set(names)) != len(names):
        raise HeadError(f"{path}: a column name occurs twice: {', '.join(names)}")
    try:
        with open_regular(path, LARGEST) as f:
            f.seek(shape.start)
            table = read_csv(
                f if shape.encoding == "utf-8" else io.BytesIO(f.read().decode(shape.encoding).encode()),
                read_options=ReadOptions(column_names=names, skip_rows_after_names=1, block_size=_BLOCK),
                parse_options=ParseOptions(delimiter=shape.delimiter, newlines_in_values=True),
                convert_options=ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
            )
    except (UnicodeError, pa.ArrowInvalid) as e:
        error: Exception = e
        try:  # Python's reader counts lines
            for line, fields in _lines(path, shape):
                if fields and len(fields) != len(names):
                    raise HeadError(f"{path}, line {line}: {len(fields)} fields, the header has {len(names)}") from e
        except csv.Error as its:
            error = its
        if isinstance(error, UnicodeError) or "UTF8" in str(error):
            raise HeadError(
                f"{path}: is not UTF-8. Convert it: `iconv -f WINDOWS-1252 -t UTF-8` (or whatever it is)"
            ) from e
        raise HeadError(f"{path}: not {path.suffix[1:].upper()} that can be read: {error}") from e
    if shape.delimiter == "\t":
        for name in names:
            swallowed = pc.match_substring_regex(table[name], r"(?s)\t.*\n|\n.*\t")
            if pc.any(swallowed).as_py():
                location = RatingFile(path, table, shape).locate(int(pc.index(swallowed, True).as_py()))
                raise HeadError(
                    f"{path}, up to {location}: a quotation mark that is not closed takes lines for one field"
                )
    return table


def _lines(path: Path, shape: TableShape) -> Iterator[tuple[int, list[str]]]:
    """The rows below the header as Python's reader parses them: the number of the last line of each, and its fields."""
    with open_regular(path, LARGEST) as f:
        before = f.read(shape.start).decode(shape.encoding, "replace")
        above = before.count("\n") or before.count("\r")
        text = io.TextIOWrapper(f, shape.encoding, "replace", newline="")
        reader = csv.reader(text, delimiter=shape.delimiter, strict=True)
        next(reader, None)
        for fields in reader:
            yield above + reader.line_num, fields


def _ava_text(path: Path) -> str:
    return decode_text(read_bytes(path, LARGEST_TEXT * 64)).text


def _parse_ava(path: Path) -> pa.Table:
    import pandas as pd

    try:
        text = io.StringIO(_ava_text(path))
        table = pd.read_csv(text, sep=r"\s+", header=None, dtype=np.int64, quoting=csv.QUOTE_NONE)
    except pd.errors.EmptyDataError:
        raise HeadError(f"{path}: no ratings in it") from None
    except (ValueError, OverflowError) as e:  # text, or lines of unequal length
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
    for i, line in enumerate(_ava_text(path).splitlines(), 1):
        fields = line.split()
        if fields and (len(fields) != len(AVA_COLUMNS) or not all(_WHOLE.fullmatch(v) for v in fields)):
            return HeadError(f"{path}, line {i}: {line.strip()[:80]!r}; {need}")
    return HeadError(f"{path}: {need}")
