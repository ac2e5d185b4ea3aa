"""The sheet that `annotate` draws of what a column says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate.column_sheet import ENDS, TEXTS, _Sheet, column_sheet
from curate.layout import Data
from pipelines.cli import main
from tests.test_annotators import copy_of


@pytest.fixture
def data(real_data: Data, tmp_path: Path) -> Data:
    """A data folder with columns of numbers, of a few values, of texts, and of what is unsafe."""
    data = copy_of(real_data, tmp_path / "data")
    keys = pa.concat_tables(
        pq.read_table(data.table(s.shard), filters=[("status", "=", "success")]) for s in data.plan.shards
    )["key"]
    n = len(keys)
    table = pa.table(
        {
            "key": keys,
            "place": pa.array(range(n), pa.float32()),
            "kind": pa.array([None, "cat", "dog"] * n, pa.string())[:n],
            "said": [f"image {i}: " + "many words of it " * 9 for i in range(n)],
        }
    )
    pq.write_table(table, tmp_path / "given.parquet")
    assert main(["annotate", str(data.root), f"given={{use: file, path: {tmp_path / 'given.parquet'}, on: key}}"]) == 0
    return Data(data.root)


def test_a_sheet_shows_both_ends_values_and_texts(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    path = data.column_sheet("given")
    assert path.is_file()
    sheet = _Sheet(data, "given")
    lowest, highest = sheet.ends("given_place"), sheet.ends("given_place", "desc")
    assert [e.value for e in lowest[:3]] == ["0.000", "1.00", "2.00"] and len(lowest) == len(highest) == ENDS
    assert float(highest[0].value) == sheet.images - 1
    assert sum(sheet.histogram("given_place")[0]) == sheet.images
    assert dict(sheet.values("given_kind")) == {"cat": sheet.count("given_kind") - n_dogs(sheet), "dog": n_dogs(sheet)}
    assert len(sheet.examples("true", "key", TEXTS, "given_said")) == TEXTS
    with Image.open(path) as drawn:
        pixels = np.asarray(drawn)
    assert pixels.shape[1] == 2480 and pixels.std() > 20
    before = path.read_bytes()
    assert column_sheet(data, "given") == path and path.read_bytes() == before
    assert column_sheet(data, "nothing") is None


def n_dogs(sheet: _Sheet) -> int:
    return sum(n for value, n in sheet.values("given_kind") if value == "dog")


def test_what_is_unsafe_is_blurred_and_the_command_names_the_sheet(
    data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["annotate", str(data.root), "bad={use: zero-shot, wanted: [a cat], against: [a dog], task: nsfw}"]) == 0
    )
    out = capsys.readouterr().out
    assert re.search(r"bad by its values\s+\S*report/bad.png", out)
    sheet = _Sheet(data, "bad")
    assert all(e.blurred == (float(e.value) >= 0.5) for e in sheet.ends("bad", "desc"))
    assert any(e.blurred for e in sheet.ends("bad", "desc")) or float(sheet.ends("bad", "desc")[0].value) < 0.5
    assert (
        main(["annotate", str(data.root), "bad={use: zero-shot, wanted: [a cat], against: [a dog], task: nsfw}"]) == 0
    )
    assert "by its values" not in capsys.readouterr().out  # nothing new to look at
