"""Lists as people have them: other delimiters, encodings and names, broken lines, columns that are called like ours."""

from __future__ import annotations

import bz2
import dataclasses
import decimal
import gzip
import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aesthetic.errors import UserError
from curate.layout import Data
from curate.ledger.schema import FETCHED_COLUMNS, URL_COLUMNS, Reason, list_name, stored_name
from curate.ledger.select import SelectConfig, select
from curate.ledger.view import open_ledger, query
from curate.shards.pack import PackConfig, pack
from curate.sources import lines
from curate.sources.columns import CAPTION_NAMES, find_column
from curate.sources.plan import Plan, SourceConfig
from curate.sources.planner import inspect, make_plan
from pipelines.recipe import Recipe, load_recipe
from tests.small_web import image
from tests.stages import fetch_shards, serving


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def plan_of(path: Path, **config: Any) -> Plan:
    return make_plan(str(path), Data(path.parent / f"data-{len(list(path.parent.iterdir()))}"), SourceConfig(**config))


def rows_of(path: Path, **config: Any) -> list[tuple[Any, ...]]:
    """(url, caption, and what else there is) of each row."""
    plan = plan_of(path, **config)
    return [tuple(row.values()) for s in plan.shards for row in plan.read(s.shard).table.to_pylist()]


def failures(plan: Plan) -> dict[int, str]:
    """What is found of the rows that are broken, by number."""
    found = [row.failure for s in plan.shards for row in plan.read(s.shard).rows()]
    assert {f.reason for f in found if f} <= {Reason.BAD_LINE}
    return {i: f.detail for i, f in enumerate(found) if f}


def numbered(count: int, sep: str = ",", first: int = 0) -> str:
    return "".join(f"http://a.test/{i}{sep}caption {i}\n" for i in range(first, first + count))


# -------------------------------------------------------------------------------------------------------- broken lines


def test_quotes_in_a_tsv_mean_nothing_unless_its_shape_says_so(tmp_path: Path) -> None:
    rows = [("http://a/1", "plain"), ("http://a/2", '"Hello, said the fox'), ("http://a/3", 'a "quoted" word')]
    rows += [("http://a/4", '"all of it"'), ("http://a/5", "it's 5\""), ("http://a/6", "carriage\rreturn")]
    text = "url\tcaption\r\n" + "".join(f"{u}\t{c}\r\n" for u, c in rows)
    assert rows_of(write(tmp_path / "l.tsv", text)) == rows
    quoted = 'url\tcaption\nu1\t"with ""quotes"" and a\ttab"\nu2\t"two\nlines"\nu3\tplain\n'
    assert rows_of(write(tmp_path / "q.tsv", quoted)) == [
        *[("u1", 'with "quotes" and a\ttab'), ("u2", "two\nlines"), ("u3", "plain")]
    ]
    for text in ('"url"\t"caption"\n"u1"\t"a"\n', 'url\tcaption\n"u1"\t"a"\n"u2"\t"b"\n'):
        assert rows_of(write(tmp_path / "h.tsv", text))[0] == ("u1", "a")


def test_a_broken_line_of_a_csv_is_a_row_with_a_reason(tmp_path: Path) -> None:
    broken = {
        100: "http://a.test/x,too,many",
        150: "http://a.test/y",
        200: 'http://a.test/z,"not closed',
        250: 'http://a.test/q,"closed" too early',
        300: 'http://a.test/r,"swallows what',
        302: 'http://a.test/s,follows"',
    }
    text = numbered(600).splitlines()
    for number, line in broken.items():
        text[number] = line
    text[400] = 'http://a.test/400,"two, with ""quotes""\nlines"'
    text[500] = 'http://a.test/500,a "word" in quotes'
    plan = plan_of(write(tmp_path / "l.csv", "url,caption\n" + "\n".join(text)), shard_size=70)
    assert plan.total_rows == len(text) == sum(s.rows for s in plan.shards)
    rows = [row for s in plan.shards for row in plan.read(s.shard).rows()]
    assert failures(plan) == {
        100: "line 102: 3 fields, where the header has 2: http://a.test/x,too,many",
        150: "line 152: 1 fields, where the header has 2: http://a.test/y",
        200: 'line 202: text after a closing quote: http://a.test/z,"not closed',
        250: 'line 252: text after a closing quote: http://a.test/q,"closed" too early',
        300: 'line 302: a quote is not closed on this line: http://a.test/r,"swallows what',
    }
    assert rows[300].url is None and rows[301].url == "http://a.test/301" and rows[302].caption == 'follows"'
    assert rows[400].caption == 'two, with "quotes"\nlines' and rows[500].caption == 'a "word" in quotes'
    assert (
        len(plan.warnings) == 1 and "l.csv: 5 lines are broken" in plan.warnings[0] and "line 202" in plan.warnings[0]
    )
    found = inspect(str(tmp_path / "l.csv"), SourceConfig(where="caption = 'caption 7'"))
    assert found.total_rows == 6  # a condition cannot be asked of what is broken, so that stays


def test_an_open_quote_costs_one_line_wherever_blocks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = numbered(300) + 'http://a.test/300,"open\n' + numbered(300, first=301)
    legal = 'http://a.test/601,"a ""long"" caption, of\n' + "many lines,\n" * 50 + 'x"\n'
    for size in (64, 500, 3000, 8 << 20):
        monkeypatch.setattr(lines, "_BLOCK", size)
        plan = plan_of(write(tmp_path / f"{size}.csv", "url,caption\n" + head + legal + numbered(99, first=602)))
        rows = [row for s in plan.shards for row in plan.read(s.shard).rows()]
        assert [i for i, row in enumerate(rows) if row.failure] == [300] and len(rows) == 701
        assert rows[601].caption is not None and rows[601].caption.count("\n") == 51
        assert [r.url for i, r in enumerate(rows) if i != 300] == [f"http://a.test/{i}" for i in range(701) if i != 300]


def test_broken_lines_of_json_and_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = [
        json.dumps({"url": f"http://a.test/{i}", "n": i, "caption": f"é {i}"}, ensure_ascii=False) for i in range(600)
    ]
    bad = ['{"url": ', "[1]", '{"n": ' + "[" * 100_000, '{"url": "x", "n": ' + "9" * 5000 + "}", '{"n": 1} {"n": 2}']
    plan = plan_of(write(tmp_path / "l.jsonl", "\n".join(good[:100] + bad + good[100:])))
    found = failures(plan)
    assert list(found) == [100, 101, 102, 103, 104] and plan.total_rows == 605
    assert [found[i].split(": ")[1] for i in found] == [
        "not JSON",
        "no object {...}",
        "nested too deep",
        *["not JSON"] * 2,
    ]
    assert plan.extra_columns == pa.schema([("n", pa.int64())])
    text = numbered(300, "").encode() + b"http://a.test/caf\xe9\n" + b"x" * 5000 + b"\n" + numbered(300, "").encode()
    monkeypatch.setattr(lines, "LONGEST_LINE", 4000)
    monkeypatch.setattr(lines, "_BLOCK", 1000)
    found = failures(plan_of(write(tmp_path / "l.txt", text)))
    assert found == {
        300: r"line 301: not UTF-8: http://a.test/caf\xe9",
        301: f"line 302: longer than 0 MB: {'x' * 99}…",
    }


def test_many_broken_lines_are_an_error_that_shows_three(tmp_path: Path) -> None:
    lines_ = numbered(300).splitlines()
    for i in (10, 20, 30, 40):
        lines_[i] += ",x"
    path = write(tmp_path / "l.csv", "url,caption\n" + "\n".join(lines_))
    with pytest.raises(UserError, match=r"l.csv: 4 of 300 lines are broken.*line 12: .*line 22: .*line 32: [^;]*$"):
        inspect(str(path), SourceConfig())
    path = write(tmp_path / "l.jsonl", '{"url": "a"}\nnonsense\n')
    with pytest.raises(UserError, match=r"l.jsonl: 1 of 2 lines are broken.*line 2: not JSON"):
        inspect(str(path), SourceConfig())
    for text in ('[{"url": "a"}, {"n": ' + "[" * 100_000, '[{"url": ' + "9" * 5000 + "}]"):
        with pytest.raises(UserError, match=r"l.json, item \d: (nested too deep|not JSON)"):
            inspect(str(write(tmp_path / "l.json", text)), SourceConfig())


def test_a_broken_line_is_a_row_of_the_ledger(tmp_path: Path) -> None:
    with serving(2, {}, 200) as served:
        listed = [*[f"{url},c" for url in served.urls], "x,y,z", *["ftp://a.test/,c"] * 117]
        path = write(tmp_path / "l.csv", "url,caption\n" + "\n".join(listed))
        data = Data(tmp_path / "data")
        make_plan(str(path), data, served.recipe.source)
        fetch_shards(data, served.recipe)
        served.web.counts()
    rows = [row for s in data.plan.shards for row in pq.read_table(data.table(s.shard)).to_pylist()]
    assert [r["status"] for r in rows[:4]] == ["success", "success", "failed_to_download", "failed_to_download"]
    assert (
        rows[2]["reason"] == "bad_line" and rows[2]["error_message"].startswith("line 4: 3 fields") and len(rows) == 120
    )
    assert rows[2]["url"] is None and rows[3]["reason"] == "bad_url"


# ------------------------------------------------------------------------------------------------ delimiters, encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_delimiters_and_encodings(tmp_path: Path, encoding: str) -> None:
    for name, text in {
        "a.csv": "url;caption\nu;é, x\n",
        "b.csv": "url\tcaption\nu\té, x\n",
        "c.csv": 'sep=,\r\nurl,caption\r\nu,"é, x"\r\n',
        "d.tsv": 'url,caption\nu,"é, x"\n',
        "e.csv": "url;caption\ru;é, x\r",
        "f.json": '[{"url": "u", "caption": "é, x"}]',
        "g.jsonl": '{"url": "u", "caption": "é, x"}\n',
    }.items():
        data = text.encode(encoding)
        assert rows_of(write(tmp_path / name, data)) == [("u", "é, x")]
        assert rows_of(write(tmp_path / f"z-{name}", gzip.compress(data))) == [("u", "é, x")]  # without the ending .gz
        assert rows_of(write(tmp_path / f"{name}.gz", data)) == [("u", "é, x")]  # and with it, but not packed
    assert rows_of(write(tmp_path / "l.txt", "http://a/é\n".encode(encoding))) == [("http://a/é", None)]


def test_what_is_not_utf8_is_null_and_told(tmp_path: Path) -> None:
    good = numbered(200)
    text = ("url,caption\n" + good).encode() + b"http://a.test/x,caf\xe9 \x93cr\xe8me\x94\nhttp://\xe9/,x\n"
    plan = plan_of(write(tmp_path / "l.csv", text))
    rows = [row for s in plan.shards for row in plan.read(s.shard).rows()]
    assert rows[200].caption is None and rows[200].url == "http://a.test/x" and rows[200].failure is None
    assert failures(plan) == {201: r"row 202: the URL is not UTF-8: http://\xe9/"}
    assert any(
        r"1 values are not UTF-8" in w and r"row 201: caption caf\xe9 \x93cr" in w and "iconv" in w
        for w in plan.warnings
    )
    odd = ("url,caption\n" + good).encode() + b"http://a.test/x,\xe9,\xe9\nhttp://a.test/y,\xe9\n"
    assert failures(plan_of(write(tmp_path / "m.csv", odd))) == {
        200: r"line 202: 3 fields, where the header has 2: http://a.test/x,\xe9,\xe9"
    }
    lines_ = b'{"url": "u", "caption": "caf\xe9", "x": "ok \\ud800"}\n{"url": "v", "caption": "caf\xc3\xa9", "x": 1}\n'
    plan = plan_of(write(tmp_path / "l.jsonl", lines_))
    assert plan.read(0).table.to_pylist() == [
        {"url": "u", "caption": None, "x": "ok \ufffd"},
        {"url": "v", "caption": "café", "x": "1"},
    ]
    assert "row 1: caption caf" in plan.warnings[0]
    columns = {"url": ["u", "v"], "caption": pa.array([b"caf\xe9", b"ok"]), "x": pa.array([b"\xff", b"y"])}
    columns["x"] = pa.Array.from_buffers(pa.string(), 2, columns["x"].buffers())  # text that is none
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    shard = plan_of(tmp_path / "l.parquet").read(0)
    assert [row.caption for row in shard.rows()] == [None, "ok"] and shard.table.column("x").to_pylist() == [None, "y"]
    assert "2 values are not UTF-8" in shard.notes[0] and "row 1: x \\xff; row 1: caption caf\\xe9" in shard.notes[0]
    odd = "url,caption\nu,a".encode("utf-16") + b"\x00\xd8" + "b\n".encode("utf-16-le")
    assert rows_of(write(tmp_path / "odd.csv", odd)) == [("u", None)]  # half a surrogate pair
    with pytest.raises(UserError, match=r"the header is not UTF-8.*iconv"):
        inspect(str(write(tmp_path / "h.csv", b"url,gr\xf6sse\nu,1\n")), SourceConfig())


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("l.csv", b"\x28\xb5\x2f\xfd\0", "Zstandard.*zstd -d"),
        ("l.jsonl", bz2.compress(b"{}"), "bzip2.*bunzip2"),
        ("l.txt", lzma.compress(b"x"), "xz.*unxz"),
        ("l.json.gz", b"PK\x03\x04", "zip file"),
        ("l.csv", b"PAR1", "parquet"),
        ("l.tsv", b"<!DOCTYPE html>", "web page"),
        ("l.csv", gzip.compress(b"PK\x03\x04", mtime=0), "zip file"),
        ("l.parquet", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("l.parquet", gzip.compress(b"x", mtime=0), "gzip"),
        ("l.parquet", b"url,caption\n", "l.parquet: cannot be read"),
        ("l.csv", "url,caption\nu,x\n".encode("utf-16-be"), "UTF-16BE without a byte order mark"),
        ("l.txt", b"url\tcaption\nu\tx\n", "is a table.*Name it .tsv"),
        ("l.csv", ("x," * 3000).encode() + b"\n", "3,001 columns"),
    ],
)
def test_what_is_no_list_is_named(tmp_path: Path, name: str, data: bytes, match: str) -> None:
    with pytest.raises(UserError, match=match):
        inspect(str(write(tmp_path / name, data)), SourceConfig())


# ------------------------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize(
    "name",
    [
        *[
            "description",
            "text",
            "alt",
            "TEXT ",
            " TEXT",
            "title",
            "prompt",
            "alt_text",
            "ENG_TEXT",
            "Alt-Text",
            "altText",
        ],
        *[
            "Caption",
            "captions",
            "TOP_CAPTION",
            "re_caption",
            "caption_reference_description",
            "Image Caption",
            "\ufefftext",
        ],
    ],
)
def test_captions_are_found_under_their_usual_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / "l.parquet"
    pq.write_table(pa.table({" URL": ["u"], "n": [1], name: ["a fox"]}), path)
    assert rows_of(path) == [("u", "a fox", 1)]
    assert rows_of(write(tmp_path / "l.csv", f"n, Url ,{name}\n1,u,a fox\n")) == [("u", "a fox", 1)]
    assert find_column(["title", name.strip(), "alt"], "caption", CAPTION_NAMES) in (name.strip(), "alt")


def test_a_list_without_captions_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "l.csv", "url,beschreibung,n\nu,ein Fuchs,1\n")
    found = inspect(str(path), SourceConfig())
    assert found.columns == {"url": "url", "caption": None}
    assert [w.split(": ", 1)[1] for w in found.warnings] == [
        "no column of captions was found, so all captions are null. Columns of text: beschreibung. "
        "`--set source.caption=NAME` takes one"
    ]
    assert plan_of(path).warnings == found.warnings
    assert not inspect(str(path), SourceConfig(caption="beschreibung")).warnings
    assert not inspect(str(path), SourceConfig(caption=None)).warnings
    assert (
        "It has no other column of text" in inspect(str(write(tmp_path / "l.txt", "u\n")), SourceConfig()).warnings[0]
    )


def test_captions_in_json_that_are_no_text(tmp_path: Path) -> None:
    values = ["a", ["", "b", "c"], 7, None, {"en": "d"}, True, [], [["e"]], ""]
    lines_ = [json.dumps({"url": "u", "caption": v, "tags": v}) for v in values]
    path = write(tmp_path / "l.jsonl", "\n".join(lines_))
    rows = rows_of(path)
    assert [r[1] for r in rows] == ["a", "b", "7", None, None, None, None, None, ""]
    assert rows[1][2] == '["", "b", "c"]'  # other columns hold what they held
    assert ["3 captions are neither text" in w and 'row 5: {"en": "d"}' in w for w in plan_of(path).warnings] == [True]
    table = pa.table({"url": ["u"] * 4, "captions": [["", "a", "b"], [], None, [None, "c"]]})
    pq.write_table(table, tmp_path / "l.parquet")
    assert [r[1] for r in rows_of(tmp_path / "l.parquet")] == ["a", None, None, "c"]


# ---------------------------------------------------------------------------------------------------------------- names


def test_names_are_stored_and_read_back() -> None:
    ours = [n for n, _ in URL_COLUMNS + FETCHED_COLUMNS]
    for name in [*ours, "WIDTH", "source.x", "source.source.x", "@path", "similarity", "", "source."]:
        assert list_name(stored_name(name)) == name and stored_name(name) not in ours
    assert stored_name("WIDTH") == "WIDTH" and stored_name("similarity") == "similarity"


def test_columns_that_are_called_like_ours(tmp_path: Path) -> None:
    """In the plan, the table, the JSON, SQL, rules and packed shards; ours keep their names."""
    theirs = [
        "width",
        "height",
        "sha256",
        "status",
        "key",
        "similarity",
        "caption",
        "source.x",
        "@reason",
        "Url",
        "aesthetic",
    ]
    with serving(3, {}, 2) as served:
        links = served.urls
        columns: dict[str, list[Any]] = {"link": links, "alt": ["a", "b", None]}
        columns |= {name: [f"{name} {i}" for i in range(3)] for name in theirs} | {"width": [7, 8, 9]}
        paths = [tmp_path / "l.parquet", tmp_path / "l.jsonl"]
        pq.write_table(pa.table(columns), paths[0])
        write(paths[1], "\n".join(json.dumps({n: v[i] for n, v in columns.items()}) for i in range(3)))
        for path in paths:
            settings = dataclasses.replace(served.recipe.source, url="link", caption="alt")
            recipe = dataclasses.replace(served.recipe, source=settings)
            data = Data(tmp_path / path.suffix[1:])
            plan = make_plan(str(path), data, recipe.source)
            assert plan.extra_columns.names == theirs
            fetch_shards(data, recipe)
            _check_names(data)


def _check_names(data: Data) -> None:
    row = pq.read_table(data.table(1)).to_pylist()[0]
    assert (row["status"], row["source.status"], row["source.width"], row["source.source.x"]) == (
        *("success", "status 2", 9, "source.x 2"),
    )
    assert row["source.caption"] == "caption 2" and row["caption"] is None and row["source.@reason"] == "@reason 2"
    found = query(data, 'SELECT status, source.status AS s, source.width, source."source.x" AS x FROM ledger')
    assert found.s.tolist() == [f"status {i}" for i in range(3)] and found.x.tolist() == [
        f"source.x {i}" for i in range(3)
    ]
    assert set(found.status) == {"success"}
    # a score that is called like a column of the list
    for shard in (0, 1):
        keys = pq.read_table(data.table(shard)).column("key")
        path = data.root / "annotated" / "aesthetic" / f"{shard:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"key": keys, "aesthetic": pa.array([0.5] * len(keys), pa.float32())}), path)
        data.commit(path.with_suffix(".json"), config="c", inputs={}, outputs=[path], facts={})
    rules = {"wide": "source.width >= 8 and width > 0", "good": "aesthetic > 0.4 and source.aesthetic <> 'x'"}
    assert select(data, SelectConfig(name="s", rules=rules)).kept == 2
    pack(data, "s", PackConfig())
    packed = {r["key"]: r for r in pq.read_table(data.root / "shards/s/00000.parquet").to_pylist()}
    assert packed["000002" if "000002" in packed else max(packed)]["aesthetic"] == 0.5
    assert {r["source.aesthetic"] for r in packed.values()} == {"aesthetic 1", "aesthetic 2"}
    assert {r["similarity"] for r in packed.values()} == {"similarity 1", "similarity 2"}  # nothing was embedded here
    ledger = open_ledger(data)
    assert isinstance(ledger, duckdb.DuckDBPyConnection)
    ledger.close()


def test_a_digest_of_the_list_is_compared_whether_or_not_it_is_kept(tmp_path: Path) -> None:
    import hashlib

    with serving(2, {}, 10) as served:
        digests = [hashlib.sha256(image(0)[1]).hexdigest(), "0" * 64]
        pq.write_table(pa.table({"url": served.urls, "sha256": digests, "uid": ["a", "b"]}), tmp_path / "l.parquet")
        settings = [*served.settings, "fetch.verify=sha256", "source.columns=[uid]"]
        recipe: Recipe = load_recipe("bundled", settings)
        assert recipe.source.columns == ("uid", "sha256")
        data = Data(tmp_path / "data")
        make_plan(str(tmp_path / "l.parquet"), data, recipe.source)
        fetch_shards(data, recipe)
    rows = pq.read_table(data.table(0)).to_pylist()
    assert [r["reason"] for r in rows] == [None, "hash_mismatch"] and rows[0]["source.sha256"] == rows[0]["sha256"]


# ----------------------------------------------------------------------------------------------------- folders of lists


def test_lists_in_folders_below(tmp_path: Path) -> None:
    """Hive's partitions are columns; the hub's data/train-00000-of-00001.parquet is a list."""
    for lang, year in (("en", "2020"), ("d%C3%A9", "__HIVE_DEFAULT_PARTITION__")):
        for file in ("hive/lang={}/year={}/part-0.parquet", "text/lang={}/year={}/part-0.csv"):
            path = tmp_path / file.format(lang, year)
            path.parent.mkdir(parents=True)
            table = pa.table({"url": [f"http://{len(lang)}"], "caption": ["x"], "n": [1]})
            if path.suffix == ".csv":
                path.write_text(f"url,caption,n\nhttp://{len(lang)},x,1\n")
            else:
                pq.write_table(table, path)
    for name in ("hive", "text", "hive/**/*.parquet", "text/lang=*/*/*.csv"):
        plan = make_plan(str(tmp_path / name), Data(tmp_path / f"p-{name[:4]}{len(name)}"), SourceConfig())
        rows = [row for s in plan.shards for row in plan.read(s.shard).table.to_pylist()]
        assert {(r["url"], r["lang"], r["year"]) for r in rows} == {
            ("http://2", "en", "2020"),
            ("http://7", "dé", None),
        }
    some = inspect(str(tmp_path / "hive"), SourceConfig(where="lang = 'en' AND n = 1"))
    assert (some.total_rows, some.extra_columns.names) == (1, ["n", "lang", "year"])
    hub = tmp_path / "hub"
    (hub / "data").mkdir(parents=True)
    (hub / "_delta_log").mkdir()
    write(hub / "dataset_infos.json", "{}")
    write(hub / "README.md", "hello")
    write(hub / "_delta_log" / "0.json", "{}")
    pq.write_table(pa.table({"url": ["http://a"]}), hub / "data" / "train-00000-of-00001.parquet")
    assert inspect(str(hub), SourceConfig()).total_rows == 1


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.csv")
    (tmp_path / "dangling.csv").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle.csv").symlink_to(tmp_path / "circle.csv")
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    for name, match in {
        "fifo.csv": "is a pipe",
        "dangling.csv": "a link to a file that is not there",
        "circle.csv": "a link that leads back to itself",
        "zero.csv": "is a device",
        "x" * 5000: "no such file",
        "nul\0.csv": "no such file",
    }.items():
        with pytest.raises(UserError, match=match):
            inspect(str(tmp_path / name), SourceConfig())


# ---------------------------------------------------------------------------------------------- parquet as it may come


def test_values_that_cannot_be_said_are_null(tmp_path: Path) -> None:
    def of(number: int, t: pa.DataType) -> pa.Array:
        return pa.array([number, 5], pa.int32() if t.bit_width == 32 else pa.int64()).view(t)

    odd = {
        "ms": of(10**15, pa.timestamp("ms")),
        "us": of(-(2**62), pa.timestamp("us")),
        "never": of(-(2**63), pa.timestamp("ns")),
        "day": of(2**30, pa.date32()),
        "time": of(10**9, pa.time32("ms")),
        "nan": pa.array([[float("nan"), 1.0], [2.0]]),
        "inf": pa.array([{"a": float("inf")}, {"a": 1.0}]),
        "moments": pa.array([[10**15], [5]], pa.list_(pa.int64())).cast(pa.list_(pa.timestamp("ms"))),
    }
    columns = {
        **odd,
        "url": ["ftp://a", "ftp://b"],
        "zone": pa.array([0, 5], pa.timestamp("us", "Mars/Phobos")),
        "digits": pa.array([decimal.Decimal("1.50"), None], pa.decimal256(60, 2)),
        "map": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int32())),
    }
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    data = Data(tmp_path / "data")
    plan = make_plan(str(tmp_path / "l.parquet"), data, SourceConfig())
    rows = plan.read(0).table.to_pylist()
    json.dumps(rows, default=str, allow_nan=False)
    nulls = [rows[0][name] for name in odd]
    assert nulls == [None, None, None, None, None, [None, 1.0], {"a": None}, None]
    assert all(rows[1][name] is not None for name in odd) and rows[1]["day"].isoformat() == "1970-01-06"
    assert rows[0]["digits"] == "1.50" and rows[0]["map"] == [("a", 1)] and str(rows[0]["zone"].tzinfo) == "UTC"
    fetch_shards(data, load_recipe("bundled", ["fetch.retries=0"]))
    assert len(query(data, "SELECT source FROM ledger")) == 2


_MEASURED = """
import re, sys
from pathlib import Path
from curate.layout import Data
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from aesthetic.errors import UserError
try:
    plan = make_plan(sys.argv[1], Data(Path(sys.argv[2])), SourceConfig())
    outcome = str(plan.read(0).table.column("caption").null_count)
except UserError as e:
    outcome = str(e)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1], outcome)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("shared", r"^\d+$"),
        ("page", "is too large to read: a page of"),
        ("values", "is too large to read: .* values"),
        ("gz", "unpacks to more than 500 times its size"),
        ("line", "lines are broken"),
    ],
)
def test_bombs_are_measured(tmp_path: Path, name: str, match: str) -> None:
    """A few kilobytes that would take gigabytes: refused, or read within one."""
    path = tmp_path / (f"l.{'csv.gz' if name in ('gz', 'line') else 'parquet'}")
    if name == "shared":  # a text of a megabyte in each of 100,000 rows
        texts = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * (1 << 20)]))
        table = pa.table({"url": ["http://a"] * 100_000, "caption": texts})
        pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=8 << 20)
    elif name == "page":
        table = pa.table({"url": ["http://a"], "caption": ["x" * (1 << 30)]})
        pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    elif name == "values":
        zeros = pa.ListArray.from_arrays([0, 50_000_000], pa.nulls(50_000_000, pa.int64()))
        pq.write_table(pa.table({"url": ["http://a"], "caption": ["x"], "x": zeros}), path, compression="zstd")
    else:
        with gzip.open(path, "wb", 9) as f:
            f.write(b"url,caption\nu,x\n")
            for _ in range(1 << 9 if name == "gz" else 100):
                f.write((b"\n" if name == "gz" else b"x") * (1 << 20))
    assert path.stat().st_size < 3 << 20
    command = [sys.executable, "-c", _MEASURED, str(path), str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kilobytes, outcome = done.stdout.strip().split(" ", 1)
    assert int(kilobytes) < 1_100_000
    assert re.search(match, outcome)


def test_a_list_has_not_columns_without_end(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["u"], **{f"c{i}": [i] for i in range(1200)}}), tmp_path / "l.parquet")
    with pytest.raises(UserError, match=r"1,200 extra columns would be kept.*source.columns: c0, .* and 1,160 more"):
        inspect(str(tmp_path / "l.parquet"), SourceConfig())
    assert inspect(str(tmp_path / "l.parquet"), SourceConfig(columns=("c7",))).extra_columns.names == ["c7"]
    pq.write_table(pa.table({}), tmp_path / "none.parquet")
    with pytest.raises(UserError, match="has no rows"):
        inspect(str(tmp_path / "none.parquet"), SourceConfig())


def test_lists_that_are_something_else_say_so(tmp_path: Path) -> None:
    def warnings(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(text)
        try:
            return " ".join(inspect(str(path), SourceConfig()).warnings)
        except UserError as e:
            return str(e)

    paths = "C:\\\\pics\\\\1.jpg\r\n".replace("\\\\", "\\") + "./2.jpg\n/home/me/3.jpg\n"
    assert "the first 3 values of column 'url' are paths, not URLs: 'C:" in warnings("a.txt", paths)
    assert "are paths" not in warnings("b.txt", paths + "http://a.test/1.jpg\n//a.test/2.jpg\n")
    # Export-Csv of Windows PowerShell
    assert warnings("c.csv", '#TYPE System.Object\r\n"url","caption"\r\n"http://a.test/1.jpg","a fox"\r\n') == ""
    assert warnings("d.jsonl", '[{"url": "http://a.test/1"},\n{"url": "http://a.test/2"}]').endswith("is called .json")
    assert warnings("e.csv", "# mine\nurl,caption\nhttp://a.test/1,x\n").endswith("The header: # mine")
    with pytest.raises(UserError, match="LIST is empty"):
        inspect("", SourceConfig())
