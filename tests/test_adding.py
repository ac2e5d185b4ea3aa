"""Another list for a data folder that is there: which of its rows are added, and that what is there stays."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aesthetic.errors import UserError
from curate import verify
from curate.fetch.deny import Deny
from curate.layout import Data
from curate.ledger.select import select
from curate.ledger.view import open_ledger, tables
from curate.ledger.whole import whole_row
from curate.sources.adding import Addition, adding
from curate.sources.plan import Plan, SourceConfig, load_plan
from curate.sources.planner import inspect, make_plan
from curate.store import mirror
from curate.store.files import sha256_file, sweep
from curate.store.objects import ObjectStore
from pipelines.commands.status import status
from pipelines.commands.why import find, row_lines
from pipelines.recipe import Recipe, load_recipe
from tests.stages import choose, embed_shards, fetch_shards, run_stages, serving

CONFIG = SourceConfig(shard_size=40)


def table(path: Path, **columns: Sequence[Any] | pa.Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def urls(start: int, stop: int) -> list[str]:
    return [f"http://x.test/{i}" for i in range(start, stop)]


def add(
    listed: Path | str, root: Path, config: SourceConfig = CONFIG, limit: int | None = None, deny: Sequence[Path] = ()
) -> tuple[Addition, Plan]:
    """Add a list; what is there before is compared with what is there afterwards."""
    plan = load_plan(Data(root))
    assert plan is not None
    before = [(s, plan.shard_digest(s.shard), plan.read(s.shard).table) for s in plan.shards]
    with adding(str(listed), plan, config, limit, Deny.load(deny), root) as more:
        told = more.total_rows, more.shard_count, more.plan_listed_rows
        more.write()
    again = load_plan(Data(root))
    assert again is not None
    again.check()
    assert told == (again.total_rows, len(again.shards), again.listed_rows)
    for shard, digest, rows in before:
        assert again.shards[shard.shard] == shard and again.shard_digest(shard.shard) == digest
        assert again.read(shard.shard).table.equals(rows)
    assert sum(s.rows for s in again.shards) == again.total_rows == sum(one["rows"] for one in again.lists)
    return more, again


def rows_of(plan: Plan) -> list[dict[str, Any]]:
    return [row for s in plan.shards for row in plan.read(s.shard).table.to_pylist()]


def test_only_rows_that_are_not_there_are_added(tmp_path: Path) -> None:
    root = tmp_path / "data"
    first = table(tmp_path / "a.parquet", url=urls(0, 100), caption=[f"c{i}" for i in range(100)], n=list(range(100)))
    plan = make_plan(str(first), Data(root), CONFIG)
    changed = [f"c{i}" if i % 10 else "another" for i in range(50, 150)]
    second = table(tmp_path / "b.parquet", URL=[*urls(50, 150), None], TEXT=[*changed, "x"], licence=["cc0"] * 101)
    more, grown = add(second, root)
    assert more.counts == {
        "new": 50,
        "added": 50,
        "known": 50,
        "changed_caption": 5,
        "denied": 0,
        "without_url": 1,
    }
    added = rows_of(grown)[100:]
    assert [r["url"] for r in added] == urls(100, 150) and added[0]["caption"] == "another"
    assert {(r["n"], r["licence"]) for r in added} == {(None, "cc0")}
    assert grown.extra_columns.names == ["n", "licence"] and grown.digest != plan.digest
    assert [one["list"] for one in grown.lists] == [str(first), str(second)] and grown.lists[1]["date"]
    for listed in (first, second):  # and so does one with less of what is there
        less, same = add(listed, root)
        assert less.counts["added"] == 0 and same.facts == grown.facts
    third = table(tmp_path / "c.parquet", url=urls(140, 160), n=[0.5] * 20)
    with pytest.raises(UserError, match=r"c\.parquet: column 'n' is double here and int64 in .*data"):
        add(third, root)
    large = table(tmp_path / "d.parquet", url=urls(200, 210), n=pa.array([2**63] * 10, pa.uint64()))
    with pytest.raises(UserError, match=r"d\.parquet: a number is too large for .*data"):
        add(large, root)
    assert load_plan(Data(root)) == grown
    assert add(third, root, replace(CONFIG, columns=()))[0].counts["added"] == 10
    with pytest.raises(UserError, match=r"source\.shard_size was 40 and is 50 now: all lists"):
        add(third, root, replace(CONFIG, shard_size=50))
    with pytest.raises(UserError, match="--add appends the rows of another list"):
        make_plan(str(second), Data(root), CONFIG)
    assert make_plan(str(first), Data(root), CONFIG).total_rows == 160


def test_settings_limits_and_deny_lists(tmp_path: Path) -> None:
    root, deny = tmp_path / "data", tmp_path / "deny.txt"
    lists = [table(tmp_path / f"{i}.parquet", url=urls(i * 500, i * 500 + 1000), n=list(range(1000))) for i in range(3)]
    make_plan(str(lists[0]), Data(root), CONFIG, limit=100)
    deny.write_text("".join(f"{hashlib.sha256(u.encode()).hexdigest()}\n" for u in urls(1400, 1500)))
    some = replace(CONFIG, where="n % 2 = 1")
    more, plan = add(lists[1], root, some, limit=60, deny=[deny])
    assert more.counts["added"] == 60 and more.counts["denied"] == 50 and more.counts["known"] > 5
    assert plan.lists[1]["listed_rows"] == more.counts["new"] == 450 - more.counts["known"]
    taken = {r["url"] for r in rows_of(plan)}
    assert len(taken) == 160 and all(int(u.rpartition("/")[2]) % 2 for u in {r["url"] for r in rows_of(plan)[100:]})
    assert add(lists[1], root, some, limit=60)[0].counts["added"] == 0  # the same list again
    assert add(lists[1], root, some, limit=50)[0].counts["added"] == 0
    _, plan = add(lists[2], root)
    # what a trial left of the first two, of which other lists have some by now
    preview = inspect(str(lists[0]), CONFIG, None, Data(root))
    plan = make_plan(str(lists[0]), Data(root), CONFIG)
    assert (preview.total_rows, preview.listed_rows, preview.shard_count) == (
        plan.total_rows,
        plan.listed_rows,
        len(plan.shards),
    )
    more, plan = add(lists[1], root, some, deny=[deny])
    found = [r["url"] for r in rows_of(plan)]
    assert sorted(found) == sorted(set(found)) and set(found) == {*urls(0, 2000)}
    assert plan.listed_rows == plan.total_rows
    for config, listed in ((CONFIG, lists[0]), (some, lists[1]), (CONFIG, lists[2])):
        assert add(listed, root, config)[0].counts["added"] == 0
    assert make_plan(str(lists[0]), Data(root), CONFIG).digest == plan.digest


def test_uids_decide_where_both_lists_have_them(tmp_path: Path) -> None:
    root = tmp_path / "data"
    make_plan(
        str(table(tmp_path / "a.parquet", url=urls(0, 10), uid=[f"{i:032x}" for i in range(10)])), Data(root), CONFIG
    )
    same = table(tmp_path / "b.parquet", url=urls(0, 10), uid=[f"{i:032x}" for i in range(5, 15)])
    assert add(same, root)[0].counts["added"] == 5  # another row of the same URL is another row
    assert add(table(tmp_path / "c.parquet", url=urls(5, 15)), root)[0].counts["added"] == 5
    assert (
        add(table(tmp_path / "d.parquet", url=urls(10, 20), uid=[None] * 5 + ["x"] * 5), root)[0].counts["added"] == 5
    )


def test_a_list_that_was_written_anew_in_its_place(tmp_path: Path) -> None:
    with serving(6, {}, 4) as served:
        listed, data = tmp_path / "l.parquet", Data(tmp_path / "data")
        table(listed, url=served.urls[:4])
        plan = make_plan(str(listed), data, served.recipe.source)
        table(listed, url=served.urls[2:])
        with pytest.raises(UserError, match=r"l\.parquet: has changed .* shard 0 of it is not fetched yet"):
            add_to = load_plan(data)
            assert add_to is not None
            with adding(str(listed), add_to, served.recipe.source, None, Deny(), tmp_path):
                pass
        table(listed, url=served.urls[:4])
        os.utime(listed, ns=(plan.facts["inputs"][0]["mtime_ns"],) * 2)
        fetch_shards(data, served.recipe)
        table(listed, url=served.urls[2:])
        with adding(str(listed), plan, served.recipe.source, None, Deny(), tmp_path) as more:
            assert (more.counts["added"], more.counts["known"]) == (2, 2)
            more.write()


def test_folders_are_known_by_where_their_images_lie(tmp_path: Path) -> None:
    from tests.small_web import image

    def put(folder: Path, *numbers: int) -> Path:
        folder.mkdir(exist_ok=True)
        for number in numbers:
            (folder / f"{number}.jpg").write_bytes(image(number)[1])
        return folder

    folder, root = put(tmp_path / "images", 0, 1, 2), tmp_path / "data"
    make_plan(str(folder), Data(root), CONFIG)
    assert add(folder, root)[0].counts["added"] == 0
    put(folder, 3, 4)
    more, plan = add(folder, root)
    assert (more.counts["added"], more.counts["known"]) == (2, 3)
    assert {r.place.path.name for r in plan.read(1).rows() if r.place} == {"3.jpg", "4.jpg"}
    other, plan = add(put(tmp_path / "others", 0, 5), root)  # the same names elsewhere are other images
    assert other.counts["added"] == 2 and plan.list_of(2)["base"] == str(tmp_path / "others")
    listed, plan = add(table(tmp_path / "l.parquet", url=urls(0, 3)), root)
    assert listed.counts["added"] == 3 and not plan.read(3).local and plan.read(2).local


@pytest.mark.long
def test_lists_and_data_folders_on_an_object_store(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASTEMAKER_CACHE", str(tmp_path / "cache"))
    mirror.open_mirror.cache_clear()
    store = ObjectStore(s3_url)
    for name, rows in (("a", urls(0, 60)), ("b", urls(30, 120))):
        listed = table(tmp_path / f"{name}.parquet", url=rows)
        store.put(listed.read_bytes(), f"lists/{name}.parquet")
    data = Data.at(f"{s3_url}/data")
    with data.hold():
        plan = make_plan(f"{s3_url}/lists/a.parquet", data, CONFIG)
        store.put(b"of a run that was killed", "data/plan/00001-00003.parquet")
        with adding(f"{s3_url}/lists/b.parquet", plan, CONFIG, 40, Deny(), tmp_path) as more:
            assert (more.counts["added"], more.counts["new"], more.counts["known"]) == (40, 60, 30)
            more.write()
    mirror.open_mirror.cache_clear()
    monkeypatch.setenv("TASTEMAKER_CACHE", str(tmp_path / "elsewhere"))
    data = Data.at(f"{s3_url}/data")
    with data.hold():
        with adding(f"{s3_url}/lists/b.parquet", data.plan, CONFIG, None, Deny(), tmp_path) as more:
            assert (more.counts["added"], more.counts["known"]) == (20, 70)
            more.write()
        again = load_plan(data)
        assert again is not None
        again.check()
        assert sorted(r["url"] for r in rows_of(again)) == sorted(urls(0, 120))
    there = {found.name for found in store.list("data/plan")}
    assert there == {f"data/{name}" for name in (*again.facts["made_of"], again.facts["shards"], "plan/plan.json")}
    mirror.open_mirror.cache_clear()


def tree(root: Path) -> dict[str, str]:
    """The sha256 of each file of shards; near-duplicates are looked for among all of them."""
    files = [p for name in ("fetched", "embedded", "annotated") for p in (root / name).rglob("*") if p.is_file()]
    ours = [p for p in files if not p.name.startswith(".") and not p.is_relative_to(root / "annotated" / "dup")]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in ours}


def verdicts(data: Data) -> dict[str, tuple[str, str]]:
    con = open_ledger(data)
    sql = "SELECT url, sha256, verdict FROM ledger JOIN verdicts USING (key)"
    return {url: (sha256, verdict) for url, sha256, verdict in con.sql(sql).fetchall()}


def three_lists(folder: Path, all_urls: Sequence[str]) -> list[Path]:
    """Three lists of half of the URLs each, which overlap by half; the second has a column more."""
    part = len(all_urls) // 4
    spans = [range(i * part, (i + 2) * part) for i in range(3)]
    columns: list[dict[str, Any]] = [{}, {"licence": ["cc0"] * 2 * part}, {}]
    return [
        table(folder / f"{i}.parquet", url=[all_urls[n] for n in span], n=list(span), **columns[i])
        for i, span in enumerate(spans)
    ]


def add_here(listed: Path, root: Path, recipe: Recipe) -> int:
    """What `tastemaker curate --add` does up to the selection, without Ray; how many images went through the models."""
    data = Data(root)
    with data.hold():
        sweep(root)
        with adding(str(listed), data.plan, recipe.source, None, Deny(), root.parent) as more:
            more.write()
    data = Data(root)
    fetch_shards(data, recipe)
    return embed_shards(data, recipe)


def add_killed(listed: Path, root: Path, recipe: Recipe, made: str, count: int) -> None:
    """Begin to add a list in a child, which is killed when there are so many more files of that name."""

    def there() -> int:
        return len([*root.glob(made)])

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "curate.workers", "curate.report", "pipelines.curation", "onnxruntime"])
    child, before = context.Process(target=add_here, args=(listed, root, recipe)), there()
    child.start()
    while child.is_alive() and there() < before + count:
        time.sleep(0.002)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL, (made, count)


QUICK = "columns={aesthetic: bundled-aesthetic, dup: {use: near-duplicates, phash: 4}}"

Kill = tuple[str, int]
"""A pattern of files, and of how many more of them a run is killed."""


def last_key(data: Data) -> str:
    """The key of the last row."""
    key = pq.read_table(data.table(len(data.plan.shards) - 1))["key"][-1].as_py()
    assert isinstance(key, str)
    return key


def compare_with_union(tmp_path: Path, count: int, shard_size: int, kills: Sequence[Sequence[Kill]] = ((), ())) -> None:
    """Lists that are added one after another against one list of all: the same images and verdicts. kills: when a
    run over the second list is killed, and over the third."""
    with serving(count, {}, shard_size) as served:
        rules = {"wide": "original_width > 60", "odd": "source.n % 7 != 3"}
        recipe = load_recipe("bundled", [*served.settings, *([] if any(kills) else [QUICK])])
        recipe = replace(recipe, select=replace(recipe.select, rules=rules))
        lists = three_lists(tmp_path, served.urls)
        data = Data(tmp_path / "data")
        run_stages(lists[0], data, recipe)
        model = tmp_path / "data" / "models" / "m"
        about = {"folder": str(data.packed("bundled")), "manifest_sha256": sha256_file(data.manifest("bundled"))}
        model.mkdir(parents=True)
        (model / "train.json").write_text(json.dumps({"data": about}))
        packed = pq.read_table(sorted(data.packed("bundled").glob("*.parquet")))["key"][0].as_py()
        assert status(data, lambda _: None)[0]["models"] == {str(model): {"pack": "bundled", "older": ""}}
        asked, again = sum(served.requests().values()), 0
        for listed, moments in zip(lists[1:], kills, strict=True):
            before = tree(data.root)
            for made, number in moments:
                add_killed(listed, data.root, recipe, made, number)
            left = [s.rows for s in Data(data.root).plan.shards if not data.exists(data.embedded_record(s.shard))]
            embedded = add_here(listed, data.root, recipe)
            data = Data(data.root)
            assert data.plan.lists[-1]["rows"] == count // 4 and 0 < embedded <= count // 4
            assert embedded <= sum(left) + shard_size if moments else embedded == count // 4
            again += len(moments) * count // 4
            after = tree(data.root)
            assert {name: after[name] for name in before} == before
            facts, following = status(data, lambda _: None)
            (selected,) = facts["selected"].values()
            assert selected["stale"] and "select" in following and len(facts["lists"]) == len(data.plan.lists)
            assert facts["models"][str(model)]["older"] == "which is older than the data"
            (match,) = find(data, (found := tables(data)), packed)
            told = "\n".join(row_lines(whole_row(data, packed, found), match, False))
            for word in ("selection   bundled: kept (older than", "packed ", "model "):
                (line,) = [line for line in told.splitlines() if line.startswith(f"  {word}")]
                assert "older than" in line, told
            assert whole_row(data, last_key(data)).selections["bundled"].verdict is None
        assert 0 <= sum(served.requests().values()) - asked - 2 * (count // 4) <= again  # nothing was fetched twice
        choose(data, recipe)
        assert status(data, lambda _: None)[0]["models"][str(model)]["older"] == "before it was packed anew"
        con = open_ledger(data)
        assert con.sql("SELECT count(*) FROM ledger WHERE source.licence = 'cc0'").fetchall() == [(count // 4,)]
        union = table(tmp_path / "union.parquet", url=served.urls, n=list(range(count)))
        whole = Data(tmp_path / "whole")
        run_stages(union, whole, recipe)
        found = verdicts(data)
        assert found == verdicts(whole) and len(found) == count
        assert len({verdict for _, verdict in found.values()}) > 1
        assert not any(verify.verify(data))


def test_the_whole_list_goes_on_from_a_trial(tmp_path: Path) -> None:
    """And from a larger one: each row is fetched and embedded once, what is there stays, the end is that of one run."""
    with serving(18, {}, 4) as served:
        settings = [*served.settings, "columns=", "select.rules={wide: original_width > 250}"]
        recipe, listed = load_recipe("bundled", settings), served.write_list(tmp_path / "list.tsv")
        data, embedded = Data(tmp_path / "data"), list[int]()
        for limit in (5, 9, None):
            before = tree(data.root)
            plan = make_plan(str(listed), data, recipe.source, limit)
            data = Data(data.root)
            fetch_shards(data, recipe)
            embedded.append(embed_shards(data, recipe))
            assert plan.total_rows == sum(embedded) == sum(served.requests().values())
            after = tree(data.root)
            assert {name: after[name] for name in before} == before
        assert embedded == [5, 4, 9]
        select(data, recipe.select)
        whole = Data(tmp_path / "whole")
        make_plan(str(listed), whole, recipe.source)
        fetch_shards(whole, recipe)
        assert select(whole, recipe.select).kept == select(data, recipe.select).kept > 0
        assert verdicts(data) == verdicts(whole) and len(verdicts(data)) == 18


@pytest.mark.long
def test_lists_that_are_added_against_their_union(tmp_path: Path) -> None:
    compare_with_union(tmp_path, 24, 6)


@pytest.mark.long
def test_long_lists_that_are_added_against_their_union(tmp_path: Path) -> None:
    """Three lists of 1,000 rows; the runs over the second and the third are killed five times."""
    fetched, embedded = "fetched/*_stats.json", "embedded/stats/*.json"
    second = [("plan/*.parquet", 1), (fetched, 2), (embedded, 1)]
    compare_with_union(tmp_path, 2000, 100, [second, [(fetched, 1), (embedded, 3)]])


@pytest.mark.long
def test_adding_killed_at_any_moment(tmp_path: Path) -> None:
    first = table(tmp_path / "a.parquet", url=urls(0, 100_000))
    second = table(tmp_path / "b.parquet", url=urls(50_000, 250_000))
    root = tmp_path / "data"
    make_plan(str(first), Data(root), SourceConfig())
    before = load_plan(Data(root))
    assert before is not None
    script = (
        "import sys; from pathlib import Path; from curate.fetch.deny import Deny; from curate.layout import Data\n"
        "from curate.sources.adding import adding; from curate.sources.plan import SourceConfig, load_plan\n"
        "plan = load_plan(Data(Path(sys.argv[2]))); print('go', flush=True)\n"
        "with adding(sys.argv[1], plan, SourceConfig(), None, Deny(), Path(sys.argv[2])) as more: more.write()\n"
    )
    words = [sys.executable, "-c", script, str(second), str(root)]
    whole = 0.0
    moments = random.Random(1)
    for kill in range(6):
        (root / "plan.json").unlink(missing_ok=True)
        began = time.monotonic()
        process = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        if kill < 5:
            time.sleep(moments.uniform(0, 0.6))
            process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        whole = time.monotonic() - began
        plan = load_plan(Data(root))
        assert plan is not None and whole
        plan.check()
        assert plan.total_rows in (100_000, 250_000) and plan.shards[: len(before.shards)] == before.shards
    assert plan.total_rows == 250_000
    there = {f"plan/{p.name}" for p in (root / "plan").glob("*.parquet")}
    assert {name for name in there if "shards" not in name} == {*plan.facts["cut"]}
    assert json.loads((root / "plan" / "plan.json").read_text())["added"][0]["rows"] == 150_000
