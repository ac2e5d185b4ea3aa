"""Rating files -> one rating table: which image, what score; where known how many votes, their spread, the group."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aesthetic.heads import HeadError

if TYPE_CHECKING:
    import pandas as pd

KEY_NAMES = ("key", "image", "path", "image_path", "file", "filename", "image_id")
SCORE_NAMES = ("score", "rating", "mean", "mos")
"""Names that are looked for, in this order, where none is given."""


def read_ratings(
    path: str | Path,
    *,
    key: str | None = None,
    score: str | None = None,
    n: str | None = None,
    sd: str | None = None,
    group: str | None = None,
) -> pd.DataFrame:
    """Read a CSV, TSV or parquet file of ratings.

    The arguments name the file's columns; without them `key` and `score` are found among usual names, and `n` (votes),
    `sd` (spread of the votes) and `group` are taken where columns of these names exist. Returns columns key (str),
    score (float), and n, sd (float) and group (str) where the file has them, in the file's order, one row a key.

    Raises HeadError where a column is missing (it names those that are there), or a value is no number or a key occurs
    twice (it names the line, or for parquet the row).
    """
    import pandas as pd

    path = Path(path).expanduser()
    columns, places = _columns(path)
    chosen = {
        "key": _choose(path, columns, "key", key, KEY_NAMES),
        "score": _choose(path, columns, "score", score, SCORE_NAMES),
    }
    for role, asked in (("n", n), ("sd", sd), ("group", group)):
        if asked is not None or role in columns:
            chosen[role] = _choose(path, columns, role, asked, (role,))
    table: dict[str, list[Any]] = {}
    for role, column in chosen.items():
        if role in ("key", "group"):
            table[role] = [_text(v, path, places[i], column) for i, v in enumerate(columns[column])]
        else:
            table[role] = [_number(v, path, places[i], column) for i, v in enumerate(columns[column])]
    if not table["key"]:
        raise HeadError(f"{path}: no ratings in it")
    seen: dict[str, int] = {}
    for i, k in enumerate(table["key"]):
        if k in seen:
            raise HeadError(
                f"{path}, {places[i]}: {k!r} was rated before ({places[seen[k]]}); give one row an image, the mean"
            )
        seen[k] = i
    return pd.DataFrame(table)


def _columns(path: Path) -> tuple[dict[str, list[Any]], list[str]]:
    """The file's columns, and for each row what to call its place in a message."""
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".parquet"):
        raise HeadError(f"{path}: a rating file is .csv, .tsv or .parquet")
    if not path.is_file():
        raise HeadError(f"{path}: no such file")
    if kind == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            columns = pq.read_table(path).to_pydict()
        except (pa.ArrowInvalid, OSError) as e:
            raise HeadError(f"{path}: not a parquet file that can be read: {e}") from e
        return columns, [f"row {i}" for i in range(len(next(iter(columns.values()), [])))]
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.reader(f, delimiter="\t" if kind == ".tsv" else ",", strict=True)
            names = next(reader, [])
            if len(set(names)) != len(names):
                raise HeadError(f"{path}: a column name occurs twice: {', '.join(names)}")
            rows, places = [], []
            for row in reader:
                if not row:
                    continue
                if len(row) != len(names):
                    raise HeadError(f"{path}, line {reader.line_num}: {len(row)} fields, the header has {len(names)}")
                rows.append(row)
                places.append(f"line {reader.line_num}")
    except (UnicodeDecodeError, csv.Error) as e:
        raise HeadError(f"{path}: not {kind[1:].upper()} in UTF-8: {e}") from e
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}, places


def _choose(path: Path, columns: dict[str, list[Any]], role: str, asked: str | None, names: tuple[str, ...]) -> str:
    there = ", ".join(columns) or "none"
    if asked is not None:
        if asked not in columns:
            raise HeadError(f"{path} has no column {asked!r}. Columns: {there}")
        return asked
    for name in names:
        if name in columns:
            return name
    raise HeadError(f"{path}: no column for the {role} ({', '.join(names)}). Columns: {there}; say which one it is")


def _text(value: Any, path: Path, place: str, column: str) -> str:
    if value is None or not str(value).strip():
        raise HeadError(f"{path}, {place}: {column} is empty")
    return str(value)


def _number(value: Any, path: Path, place: str, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise HeadError(f"{path}, {place}: {column} is {value!r}, not a number")
    return number
