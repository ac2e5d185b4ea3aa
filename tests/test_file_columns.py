"""Columns that others computed: each form in which they come, what matches nothing, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aesthetic.errors import UserError
from curate.annotators.registry import make_annotator, make_annotators
from curate.annotators.stage import annotate_table
from curate.layout import Data
from curate.ledger.view import recorded_columns, tables
from curate.store.files import read_json
from pipelines.cli import main
from pipelines.recipe import load_recipe, store_recipe


@pytest.fixture
def data(real_data: Data, tmp_path: Path) -> Data:
    shutil.copytree(real_data.root, tmp_path / "data")
    store_recipe(Data(tmp_path / "data"), load_recipe("bundled", ["columns={}", "select.rules={}"]))
    return Data(tmp_path / "data")


def annotate(data: Data, **columns: Any) -> pd.DataFrame:
    """The fetched rows of the ledger, by key, with these columns."""
    made = make_annotators(columns)
    for name in made:
        annotate_table(data, name, made, encoder=lambda: 1 / 0, say=lambda line: None)  # type: ignore[arg-type]
    return Data(data.root).ledger.filter("status = 'success'").order("key").df().set_index("key")


def written(path: Path, table: pd.DataFrame) -> str:
    match path.suffix:
        case ".parquet":
            table.to_parquet(path)  # with its index as a column, where that is no range
        case ".csv":
            table.to_csv(path)  # with its index in a column without a name
        case ".tsv":
            table.to_csv(path, index=False, sep="\t")
        case ".jsonl":
            table.to_json(path, orient="records", lines=True)
    return str(path)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".jsonl"])
def test_scores_of_others_by_url(data: Data, tmp_path: Path, suffix: str) -> None:
    """As LAION publishes them, and as a colleague's pandas or script writes them."""
    rows = data.ledger.order("key").df()
    fetched = rows[rows["status"] == "success"]
    theirs = pd.DataFrame(
        {
            "URL": [*reversed(fetched["url"][:9]), *rows[rows["status"] != "success"]["url"][:1], "http://no.where/"],
            "AESTHETIC_SCORE": [5.5, 6.25, np.nan, *range(8)],
            "Their Caption": [f'said "{i}", new' for i in range(11)],
            "n": range(11),
        }
    )
    path = written(tmp_path / f"theirs{suffix}", theirs.sample(frac=1, random_state=0))
    spec = {"use": "file", "path": path, "on": "url"}
    found = annotate(data, theirs=spec, score={**spec, "columns": ["AESTHETIC_SCORE"]})
    expected = found["url"].map(theirs.set_index("URL")["AESTHETIC_SCORE"])
    assert expected.notna().sum() == 8
    np.testing.assert_array_equal(found["score"], expected)
    np.testing.assert_array_equal(found["theirs_aesthetic_score"], expected)
    assert [*found["theirs_their_caption"].dropna()] == [f'said "{i}", new' for i in reversed(range(9))]
    assert [*found["theirs_n"].dropna()] == [*reversed(range(9))]
    assert not {"theirs___index_level_0__", "theirs_"} & {*found}
    listed = pq.read_table(data.index("theirs") / "unmatched.parquet").to_pandas().set_index("name")["reason"]
    assert listed.to_dict() == {
        theirs["URL"][9]: "its image was not fetched",
        "http://no.where/": "not in the list",
    }
    facts = recorded_columns(tables(data))["score"]
    assert facts["notes"] == [
        f"theirs{suffix}: 11 rows, 9 of them name an image; 2 name none, and are listed in "
        "annotated/score/index/unmatched.parquet",
        f"{len(found) - 9} images without a row in theirs{suffix}",
    ]


@pytest.mark.parametrize("on", ["key", "sha256", "uid"])
def test_what_names_an_image(data: Data, tmp_path: Path, on: str) -> None:
    rows = data.ledger.select("*, source.uid AS uid").filter("status = 'success'").order("key").df()
    assert rows[on].is_unique
    labels = ["cat", "dog", None, "", "bird"]
    theirs = pd.DataFrame({on.upper(): rows[on][:5].str.upper(), "label": labels, "sha1": "x"})
    file = written(tmp_path / "labels.parquet", theirs)
    found = annotate(data, label={"use": "file", "path": file, "on": on, "columns": ["label"]})["label"]
    assert found[:5].to_list() == labels and found[5:].isna().all()
    assert not (data.index("label") / "unmatched.parquet").exists()


def test_keys_of_another_data_folder_are_refused(data: Data, tmp_path: Path) -> None:
    rows = data.ledger.order("key").df()
    theirs = pd.DataFrame({"key": rows["key"], "url": [*rows["url"][1:], "http://x/"], "score": 1.0})
    file = written(tmp_path / "other.parquet", theirs)
    with pytest.raises(UserError, match=r"the key 00\d+ is http.* there, and http.* here: .*another data folder"):
        annotate(data, score={"use": "file", "path": file, "on": "key"})


def test_a_file_that_names_no_image_says_what_names_look_like(data: Data, tmp_path: Path) -> None:
    file = written(tmp_path / "x.parquet", pd.DataFrame({"url": ["s3://bucket/a.jpg", None], "score": [1.0, 2.0]}))
    found = annotate(data, score={"use": "file", "path": file, "on": "url"})
    assert found["score"].isna().all()
    (note,) = recorded_columns(tables(data))["score"]["notes"][:1]
    assert "2 rows, 0 of them name an image; 2 name none" in note and "such as s3://bucket/a.jpg, here http" in note
    listed = pq.read_table(data.index("score") / "unmatched.parquet")
    assert listed["reason"].to_pylist() == ["not in the list", "it names nothing"]


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(data: Data, tmp_path: Path) -> None:
    url = data.ledger.filter("status = 'success'").order("key").df()["url"][0]
    spec = {"use": "file", "path": str(tmp_path / "x.csv"), "on": "url"}
    (tmp_path / "x.csv").write_text(f"url,score\n{url},3\n")
    assert annotate(data, score=spec)["score"].iloc[0] == 3
    record = data.annotations_record("score", 0)
    before = record.read_bytes()
    annotate(data, score=spec)
    assert record.read_bytes() == before and read_json(record)["columns"]["score"]["type"] == "int64"
    (tmp_path / "x.csv").write_text(f"url,score\n{url},2.5\n")
    assert annotate(data, score=spec)["score"].iloc[0] == 2.5


def test_from_the_command_line_and_as_a_rule(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    urls = data.ledger.filter("status = 'success'").order("key").df()["url"]
    file = written(tmp_path / "s.parquet", pd.DataFrame({"url": [*urls[:6], "http://x/"], "score": [*range(7)]}))
    assert main(["annotate", str(data.root), f"laion={{use: file, path: {file}, on: url}}"]) == 0
    assert "laion: s.parquet: 7 rows, 6 of them name an image; 1 name none" in capsys.readouterr().out
    assert main(["select", str(data.root), "--set", "select.rules.good=laion >= 3"]) == 0
    assert main(["status", str(data.root)]) == 0
    out = capsys.readouterr().out
    assert "7 rows, 6 of them name an image" in out
    assert f"{len(urls) - 6} images without a row in s.parquet" in out


@pytest.mark.parametrize(
    ("table", "more", "message"),
    [
        ({"u": ["a"], "v": [1]}, {}, "has no column url; it has u, v"),
        ({"url": ["a"]}, {}, "no column of values"),
        ({"url": ["a"], "v": [[1, 2]], "w": [1]}, {}, r"v holds list<.*expected. `columns: \[w\]` leaves it out"),
        ({"url": ["a"], "v": [b"x"]}, {}, "v holds binary; numbers, text, dates or booleans are expected$"),
        ({"url": ["a"], "v": [{"a": 1}]}, {}, "v holds struct<"),
        ({"url": ["a"], "a b": [1], "a_b": [2]}, {}, "two columns have one name"),
        ({"url": ["a"], "v": [1]}, {"columns": ["w"]}, "has no column w; it has url, v"),
        ({"key": [12], "v": [1]}, {"on": "key"}, "key holds int64; text is expected"),
        ({"url": ["a"], "v": [1]}, {"on": "phash"}, "on: Input should be 'key', 'url', 'sha256' or 'uid'"),
    ],
)
def test_a_file_that_can_be_no_columns_is_refused(tmp_path: Path, table: Any, more: Any, message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=message):
        make_annotator("x", {"use": "file", "path": str(tmp_path / "x.parquet"), "on": "url", **more})


def test_two_rows_of_one_image_are_refused_and_so_is_a_list_without_uids(data: Data, tmp_path: Path) -> None:
    url = data.ledger.df()["url"][0]
    file = written(tmp_path / "x.parquet", pd.DataFrame({"url": [url, "b", url], "uid": ["0" * 32] * 3, "v": 1}))
    with pytest.raises(UserError, match="has two rows of the url http"):
        annotate(data, x={"use": "file", "path": file, "on": "url"})
    plan = data.plan
    data.__dict__["plan"] = replace(
        plan, extra_columns=plan.extra_columns.remove(plan.extra_columns.names.index("uid"))
    )
    with pytest.raises(UserError, match="the list carries no text column uid"):
        annotate(data, x={"use": "file", "path": file, "on": "uid"})
    data.__dict__["plan"] = plan
    (tmp_path / "page.parquet").write_text("<html>")
    with pytest.raises(UserError, match="a web page"):
        make_annotator("x", {"use": "file", "path": str(tmp_path / "page.parquet"), "on": "url"})
