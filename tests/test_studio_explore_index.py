"""The index of a data folder: made once, made anew where the data changed, whole or absent after kills; its API."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from small_explore import SHARD_SIZE, made_up, make_explored, write, write_shard
from small_serve import ServedData, serving_data

from curate.layout import Data
from curate.ledger.schema import make_key
from curate.ledger.select import SelectConfig, select
from curate.store.files import sweep
from studio.explore.explorer import Explorer

ROWS = 4 * SHARD_SIZE
LONG = pytest.mark.long


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return make_explored(tmp_path_factory.mktemp("made") / "data", ROWS)


@pytest.fixture
def data(made: Data, tmp_path: Path) -> Data:
    return Data(shutil.copytree(made.root, tmp_path / "data"))


def explore(data: Data, **more: Any) -> Explorer:
    faults: list[Exception] = []
    found = Explorer(data, on_fault=faults.append, **more)
    found.wait()
    assert not faults, faults
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def add_column(data: Data, name: str, value: float) -> None:
    """Annotate all images with a new column, or write another value into one that is there."""
    values = made_up(ROWS)
    for shard in range(ROWS // SHARD_SIZE):
        keys = [make_key(shard, n, SHARD_SIZE) for n in range(SHARD_SIZE) if (shard * SHARD_SIZE + n) % 17 != 3]
        table = pa.table({"key": keys, name: pa.array([value] * len(keys), pa.float32())})
        said = {"annotator": name, "columns": {name: {}}}
        write(data, data.annotations(name, shard), data.annotations_record(name, shard), table, said)
    assert values


def test_the_same_data_gives_the_same_bytes_and_a_second_server_makes_nothing(data: Data) -> None:
    explore(data).close()
    first = contents(data.studio_index)
    times = {f: f.stat().st_mtime_ns for f in data.studio_index.rglob("*")}
    second = explore(data)
    assert second.version == 1 and {f: f.stat().st_mtime_ns for f in data.studio_index.rglob("*")} == times
    second.close()
    shutil.rmtree(data.studio_index)
    explore(data).close()
    assert contents(data.studio_index) == first and len(first) > 30


def test_a_new_column_adds_its_part_and_leaves_the_others(data: Data) -> None:
    explorer = explore(data)
    before = {p.name: p.stat().st_ino for p in data.studio_index.iterdir()}
    tried = explorer.select({"good": "score >= 5"})
    assert not explorer.stale
    add_column(data, "fresh", 0.5)
    explorer.look()
    assert explorer.stale, "it is being made anew"
    explorer.wait()
    assert explorer.version == 2 and not explorer.stale
    after = {p.name: p.stat().st_ino for p in data.studio_index.iterdir()}
    assert before.items() <= after.items() and len(after) == len(before) + 1
    # rows are the same, so what was tried before can still be looked at
    assert explorer.selection(tried.id).kept_count == tried.kept_count
    assert explorer.select({"new": "fresh > 0.4"}).kept_count == explorer.count
    add_column(data, "fresh", 0.25)
    explorer.look()
    assert explorer.stale
    explorer.wait()
    assert explorer.select({"new": "fresh > 0.4"}).kept_count == 0, "the same rule, other values"
    assert len([*data.studio_index.iterdir()]) == len(after), "the part of before is gone"
    explorer.close()


def test_other_rows_forget_what_was_tried(data: Data) -> None:
    explorer = explore(data)
    tried, count = explorer.select({"good": "score >= 5"}), explorer.count
    values = made_up(ROWS + SHARD_SIZE, 1)
    write_shard(data, values, ROWS // SHARD_SIZE, range(ROWS, ROWS + SHARD_SIZE), early=False)
    explorer.look()
    assert explorer.stale
    explorer.wait()
    assert explorer.count > count
    with pytest.raises(KeyError):
        explorer.selection(tried.id)
    again = explorer.select({"good": "score >= 5"})
    assert again.kept_count == select(data, SelectConfig(name="s", rules={"good": "score >= 5"})).kept
    explorer.close()


def test_tables_that_are_not_whole_are_refused_as_select_refuses_them(data: Data) -> None:
    from aesthetic.errors import UserError

    data.annotations_record("score", 2).unlink()
    explorer = explore(data)
    for rules in ({"good": "score >= 5"}, {"best": "top(score, 0.5)"}):
        with pytest.raises(UserError) as made:
            select(data, SelectConfig(name="s", rules=rules))
        with pytest.raises(UserError) as tried:
            explorer.select(rules)
        assert str(tried.value) == str(made.value)
    assert explorer.select({"near": "similarity > 0.2"}).kept_count > 0
    explorer.close()


def _make_until(root: Path, steps: int) -> None:
    """Make the index, and be killed after some steps of it."""
    from curate.ledger.view import tables
    from studio.explore.index import make_index

    data, done = Data(root), 0

    def on_step(count: int) -> None:
        nonlocal done
        done += 1
        if done >= steps:
            os.kill(os.getpid(), signal.SIGKILL)

    make_index(data.studio_index, tables(data), on_step)


@LONG
@pytest.mark.parametrize("steps", [1, 4, 7, 11, 23, 40])
def test_killed_while_it_is_made_nothing_is_half_made(data: Data, made: Data, steps: int) -> None:
    child = multiprocessing.get_context("spawn").Process(target=_make_until, args=(data.root, steps))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert [p for p in data.studio_index.iterdir() if p.name.startswith(".")], "it was at work"
    explorer = explore(data)
    assert not [p for p in data.studio_index.iterdir() if p.name.startswith(".")], "what it left is gone"
    assert explorer.select({"good": "score >= 5"}).kept_count > 0
    explorer.close()
    whole = Data(made.root.parent / "whole")
    if not whole.root.exists():
        shutil.copytree(made.root, whole.root, ignore=shutil.ignore_patterns("studio"))
        explore(whole).close()
    assert contents(data.studio_index) == contents(whole.studio_index)


def _explore(root: Path, rounds: int) -> None:
    for _ in range(rounds):
        explorer = explore(Data(root))
        assert explorer.state.state == "ready", explorer.state
        assert explorer.select({"good": "score >= 5"}).kept_count > 0
        explorer.close()


@LONG
def test_two_servers_at_once_do_no_harm(data: Data) -> None:
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=_explore, args=(data.root, 3)) for _ in range(2)]
    for child in children:
        child.start()
    for n in range(3):
        add_column(data, "fresh", n)  # parts come and go meanwhile
    for child in children:
        child.join(120)
        assert child.exitcode == 0


def test_read_only_writes_nothing(data: Data) -> None:
    before = contents(data.root)
    explorer = explore(data, keep=False)
    assert explorer.select({"good": "score >= 5"}).kept_count > 0
    assert contents(data.root) == before
    explorer.close()
    explore(data).close()
    times = {f: f.stat().st_mtime_ns for f in data.root.rglob("*")}
    explorer = explore(data, keep=False)
    assert explorer.state.state == "ready"
    explorer.close()
    assert {f: f.stat().st_mtime_ns for f in data.root.rglob("*")} == times, "what is there is used"


def test_an_empty_folder_and_one_without_images(tmp_path: Path) -> None:
    explorer = explore(Data(tmp_path))
    assert explorer.state.state == "none" and "holds no fetched shard" in explorer.state.error
    explorer.close()
    data = Data(tmp_path / "data")
    values = {**made_up(20), "denied": [True] * 20}
    write_shard(data, values, 0, range(20), early=False)
    explorer = explore(data)
    assert explorer.count == 0 and explorer.snapshot.rows.rows == 20
    tried = explorer.select({"good": "score >= 5", "best": "top(score, 0.5)", "told": "length(caption) > 3"})
    assert tried.kept_count == 0 and len(explorer.listing(tried, show="kept", sort="score").rows) == 0
    explorer.close()


def test_what_took_long_is_kept_for_the_next_server(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    from studio.explore import live

    monkeypatch.setattr(live, "SLOW", 0.0)
    rules = {"told": "length(caption) > 9", "best": "best_of(dup, score)"}
    recipe = SelectConfig(rules=rules)
    explorer = explore(data, recipe=recipe)
    first, folder = explorer.select(rules), data.studio_index / "answers"
    explorer.close()
    kept = sorted(folder.glob("*.states.npy"))
    assert len(kept) == 2 and first.counts[1].groups

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("it was asked already")

    with monkeypatch.context() as patch:
        patch.setattr(live.RuleBook, "_ask", refuse)
        explorer = explore(data, recipe=recipe)
        again = explorer.select(rules)
        assert again.counts == first.counts and np.array_equal(again.kept, first.kept)
        explorer.close()
    for damaged in kept:
        damaged.write_bytes(damaged.read_bytes()[:-5])
    explorer = explore(data, recipe=recipe)
    assert np.array_equal(explorer.select(rules).kept, first.kept)
    explorer.close()


def test_sweeping_takes_what_is_left_and_not_the_index(data: Data) -> None:
    explore(data).close()
    before = contents(data.studio_index)
    dead = data.studio_index / ".rows-0123456789abcdef.999999999-0123abcd.tmp"
    dead.mkdir()
    sweep(data.root)
    assert not dead.exists() and contents(data.studio_index) == before


# ----------------------------------------------------------------------------------------------------------- the API


@pytest.fixture(scope="module")
def served(made: Data, tmp_path_factory: pytest.TempPathFactory) -> Any:
    data = Data(shutil.copytree(made.root, tmp_path_factory.mktemp("served") / "data"))
    select(data, SelectConfig(name="saved", rules={"good": "score >= 5"}))
    select(data, SelectConfig(name="best", rules={"good": "score >= 5", "best": "top(similarity, 0.5)"}))
    recipe = SelectConfig(name="mine", rules={"good": "score >= 4", "sharp": "sharpness > 0.1"}, early=("sharp",))
    with serving_data(data, recipe=recipe) as server:
        server.folder.explorer.wait()
        yield server


def test_the_api_says_what_the_explorer_says(served: ServedData) -> None:
    explorer = served.folder.explorer
    with served.client() as client:
        said = client.get("/api/data").json()
        columns = {c["name"]: c for c in said["columns"]}
        assert said["index"]["state"] == "ready" and said["images"] == explorer.count and said["rows"] == ROWS
        assert "denied" not in columns and said["unsafe"] == ["unsafe"]
        assert columns["score"]["kind"] == "number" and columns["score"]["scale"] == [0.0, 10.0]
        assert columns["cluster"]["kind"] == "category" and columns["safe"]["kind"] == "flag"
        assert columns["caption"]["kind"] == "text" and columns["source.LICENSE"]["kind"] == "category"
        assert [s["name"] for s in said["selections"]] == ["best", "saved"] and not said["selections"][0]["stale"]
        assert said["recipe_rules"][1] == {"name": "sharp", "condition": "sharpness > 0.1", "early": True}

        rules = [
            {"name": "good", "condition": "score >= 5"},
            {"name": "best", "condition": "top(similarity, 0.5)"},
            {"name": "off", "condition": "count < 100", "on": False},
            {"name": "wrong", "condition": "nope < 1", "on": False},
        ]
        asked = {"rules": rules, "columns": ["score", "cluster", "safe", "original_width"], "log": ["original_width"]}
        tried = client.post("/api/selections", json=asked).json()
        by_name = {r["name"]: r for r in tried["rules"]}
        assert by_name["good"]["cuts"] == [{"column": "score", "sign": ">=", "value": 5.0}]
        assert by_name["best"]["top"]["fraction"] == 0.5 and by_name["best"]["top"]["value"] is not None
        assert by_name["off"]["rejected"] == 0 < by_name["off"]["marginal"]
        assert "no column nope" in by_name["wrong"]["error"]
        counted = sum(r["rejected"] for r in tried["rules"]) + tried["kept"] + sum(tried["not_fetched"].values())
        assert counted + sum(tried["denied"].values()) == tried["rows"] == ROWS
        assert sum(tried["kept_histograms"]["cluster"]) <= tried["kept"]
        assert sum(tried["kept_histograms"]["original_width"]) == tried["kept"]

        query = {"selection": tried["id"], "show": "kept", "sort": "score", "descending": True, "limit": 7, "offset": 3}
        page = client.get("/api/rows", params=query).json()
        assert page["total"] == tried["kept"] and len(page["rows"]) == 7
        selection = explorer.selection(tried["id"])
        listing = explorer.listing(selection, show="kept", sort="score", descending=True)
        assert [r["key"] for r in page["rows"]] == [explorer.key(int(row)) for row in listing.rows[3:10]]
        assert [r["value"] for r in page["rows"]] == sorted((r["value"] for r in page["rows"]), reverse=True)
        assert all(r["verdict"] == "kept" and r["width"] == 64 for r in page["rows"])
        unsafe = explorer.values("unsafe")
        assert [r["blurred"] for r in page["rows"]] == [not unsafe[row] < 0.5 for row in listing.rows[3:10]]
        place = client.get("/api/place", params={**query, "value": 6.0}).json()
        assert place["total"] == tried["kept"] and 0 < place["offset"] < place["total"]
        other = client.post("/api/selections", json={"rules": rules[:1]}).json()
        both = client.post("/api/compare", json={"a": tried["id"], "b": other["id"]}).json()
        assert both["only_a"] == 0 and both["both"] == tried["kept"] and both["only_b"] == other["kept"] - tried["kept"]
        root = str(served.folder.data)
        assert shlex.split(both["command"]) == ["tastemaker", "diff", root, "best", "saved"]  # what is off is no rule
        third = client.post("/api/selections", json={"rules": rules[1:2]}).json()
        assert client.post("/api/compare", json={"a": tried["id"], "b": third["id"]}).json()["command"] is None
        found = explorer.add_ranking(np.array([5, 1, 3]), np.array([0.9, 0.5, 0.1]), "a search")
        page = client.get("/api/rows", params={"sort": f"search:{found}"}).json()
        assert [(r["key"], round(r["value"], 3)) for r in page["rows"]] == [
            (explorer.key(5), 0.9), (explorer.key(1), 0.5), (explorer.key(3), 0.1)
        ]  # fmt: skip


def test_what_is_wrong_is_told(served: ServedData) -> None:
    with served.client() as client:
        wrong = client.post("/api/selections", json={"rules": [{"name": "a b", "condition": "skore > 1"}]})
        assert (
            wrong.status_code == 422
            and wrong.json()["rule"] == "a b"
            and "Did you mean score?" in wrong.json()["error"]
        )
        twice = [{"name": "a", "condition": "score > 1"}] * 2
        assert client.post("/api/selections", json={"rules": twice}).status_code == 422
        unknown = {"selection": "0123456789abcdef"}
        assert client.get("/api/rows", params=unknown).status_code == 404
        assert client.get("/api/rows", params={"sort": "search:0"}).status_code == 404
        for query in (
            {"sort": "nope"}, {"sort": "nearest"}, {"show": "kept"}, {"limit": 1000}, {"offset": -1}, {"show": "some"}
        ):  # fmt: skip
            assert client.get("/api/rows", params=query).status_code == 422, query
        for query in (
            {"sort": "key", "value": 1},
            {"sort": "score", "value": "nan"},
            {"sort": "source.LICENSE", "value": 1},
        ):
            assert client.get("/api/place", params=query).status_code == 422, query
        for column in ("nope", "caption", "denied2"):
            assert client.get("/api/histogram", params={"column": column}).status_code == 422


def test_until_the_index_is_made_the_server_says_so(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    from studio.explore import explorer as module

    make, go = module.make_index, multiprocessing.Event()

    def later(*arguments: Any) -> Any:
        assert go.wait(30)
        return make(*arguments)

    monkeypatch.setattr(module, "make_index", later)
    with serving_data(data) as server, server.client() as client:
        said = client.get("/api/data").json()
        assert said["index"]["state"] == "building" and said["columns"] == []
        answer = client.post("/api/selections", json={"rules": []})
        assert answer.status_code == 503 and "the index is being made" in answer.json()["error"]
        go.set()
        deadline = time.monotonic() + 30
        while client.get("/api/data").json()["index"]["state"] != "ready":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert client.post("/api/selections", json={"rules": []}).status_code == 200
