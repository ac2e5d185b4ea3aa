"""Counts of a column's values beside a selection's verdicts, read a little at a time."""

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.layout import Data
from curate.ledger.counts import Verdicts, quantile, value_range, values_of
from curate.ledger.view import LedgerTable


def _table(folder: Path, values: list[pa.Array]) -> LedgerTable:
    """A table of some files, with keys counted through."""
    files, first = [], 0
    for i, part in enumerate(values):
        files.append(folder / f"{i:05d}.parquet")
        keys = pa.array([f"{key:09d}" for key in range(first, first + len(part))])
        pq.write_table(pa.table({"key": keys, "score": part}), files[-1])
        first += len(part)
    return LedgerTable(Data(folder), "annotated/score", "key", ("score",), tuple(range(len(files))), tuple(files), ())


@pytest.mark.parametrize("kind", ["normal", "outlier", "few", "ints", "one"])
def test_quantiles_are_those_of_all_values(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    values = {
        "normal": rng.normal(5, 1, 200_000).astype(np.float32),
        "outlier": np.append(rng.random(199_999), 1e12),  # all the others fall into one bin
        "few": rng.choice([0.25, 0.5, 0.5000001], 200_000),
        "ints": rng.integers(-(2**40), 2**40, 200_000),
        "one": np.full(200_000, 7.5),
    }[kind]
    nothing = pa.nulls(1, pa.from_numpy_dtype(values.dtype))
    table = _table(tmp_path, [pa.array(values[:50_000]), nothing, pa.array(values[50_000:])])
    assert value_range(table, "score") == (values.min(), values.max())
    stored = pa.table({"v": values})
    for level in (0.0, 0.01, 0.3, 0.5, 1 - 0.3, 0.999, 1.0):
        (exact,) = duckdb.from_arrow(stored).aggregate(f"quantile_disc(v, {level})").fetchall()[0]
        assert quantile(table, "score", level) == exact


def test_what_is_no_number_has_no_range(tmp_path: Path) -> None:
    table = _table(tmp_path, [pa.array([None, np.nan, np.inf, -np.inf], pa.float32())])
    assert value_range(table, "score") is None and quantile(table, "score", 0.5) is None
    assert [len(values) for _, values in values_of(table, "score")] == [0]


def test_verdicts_are_found_in_any_order(tmp_path: Path) -> None:
    """Keys are ordered as numbers: one has more digits than the others, and not all have a verdict."""
    numbers = [*range(10, 100, 3), 1234567]
    words = ["kept" if n % 2 else "denied" if n % 4 else "small" for n in numbers]
    table = pa.table({"key": [f"{n:05d}" for n in numbers], "verdict": pa.array(words).dictionary_encode()})
    pq.write_table(table, tmp_path / "v.parquet", row_group_size=7)
    verdicts = Verdicts(tmp_path / "v.parquet")
    asked = np.random.default_rng(1).permutation([0, *range(5, 110), 1234567, 9999999])
    found = verdicts.of(pa.array([f"{n:05d}" for n in asked]))
    expected = dict(zip(numbers, words, strict=True))
    said = [verdicts.words[place] if place >= 0 else None for place in found]
    assert said == [expected.get(n) for n in asked.tolist()]
    assert verdicts.kept(found).tolist() == [word == "kept" for word in said]
    assert verdicts.denied(found).tolist() == [word == "denied" for word in said]
    empty = pq.read_schema(tmp_path / "v.parquet").empty_table()
    pq.write_table(empty, tmp_path / "none.parquet")
    nothing = Verdicts(tmp_path / "none.parquet")
    assert nothing.of(pa.array(["00010"])).tolist() == [-1] and not nothing.kept(found).any()
