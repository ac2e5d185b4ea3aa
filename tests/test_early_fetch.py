"""Early rules on the list and on header sizes: not fetched, not read to the end, not stored; and got back later."""

from __future__ import annotations

import asyncio
import contextlib
import io
import multiprocessing
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aesthetic.errors import UserError
from curate import verify
from curate.annotators.registry import make_annotators
from curate.fetch.client import Fetcher
from curate.fetch.config import FetchConfig
from curate.fetch.early import EarlyRules, ShardRules
from curate.layout import Data
from curate.ledger.judge import state_sql
from curate.ledger.rules import check_rules
from curate.ledger.schema import RejectedEarly, RowError
from curate.ledger.select import SelectConfig, funnel_text, select
from curate.ledger.view import ledger_types, source_types
from curate.sources.planner import make_plan
from curate.store.files import read_json
from curate.workers import fetch_done, left_out
from pipelines import cli
from pipelines.checks import refuse_changes, refuse_same_early
from pipelines.commands.status import status
from pipelines.curation import remaining_work
from pipelines.recipe import Recipe, store_recipe
from tests.small_web import Watch
from tests.stages import Served, contents, fetch_shards, run_stages, serving

RULES = {
    "told": "length(caption) > 10",  # a part of the captions is empty
    "large": "least(original_width, original_height) >= 150",
    "sharp": "quality_sharpness > 1",
}
EARLY = ("told", "large")
SHARD_SIZE, IMAGES = 12, 30


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(IMAGES, {}, SHARD_SIZE) as served:
        yield served


def recipe(served: Served, *early: str, **rules: str) -> Recipe:
    columns = {"quality": "quality"}
    selection = replace(served.recipe.select, rules={**RULES, **rules}, early=early)
    return replace(served.recipe, select=selection, columns=columns)


def rows(data: Data) -> list[dict[str, Any]]:
    return [row for s in data.plan.shards for row in pq.read_table(data.table(s.shard)).to_pylist()]


def verdicts(data: Data, name: str) -> dict[str, str]:
    table = pq.read_table(data.verdicts(name))
    return dict(zip(table["key"].to_pylist(), table["verdict"].to_pylist(), strict=True))


@pytest.fixture(scope="module")
def both(served: Served, tmp_path_factory: pytest.TempPathFactory) -> tuple[Data, Data, dict[str, int]]:
    """A data folder made with early rules, one without, and what the former asked the server for."""
    here = tmp_path_factory.mktemp("early")
    listed, data, whole = served.write_list(here / "list.tsv"), Data(here / "data"), Data(here / "whole")
    run_stages(listed, data, recipe(served, *EARLY))
    asked = served.requests()
    run_stages(listed, whole, recipe(served))
    return data, whole, asked


def test_the_same_is_kept_and_the_rest_costs_nothing(both: tuple[Data, Data, dict[str, int]]) -> None:
    data, whole, asked = both
    early, late = rows(data), rows(whole)
    expected = {row["key"]: row for row in late}
    told = {k for k, row in expected.items() if row["caption"] is not None and len(row["caption"]) > 10}
    large = {k for k, row in expected.items() if min(row["original_width"], row["original_height"]) >= 150}
    assert 0 < len(told) < IMAGES and 0 < len(large & told) < len(told)
    for row in early:
        key, url = row["key"], row["url"]
        if key in told & large:
            assert row == expected[key]
            continue
        rule = "large" if key in told else "told"
        size = (row["original_width"], row["original_height"])
        assert (row["status"], row["reason"], row["error_message"]) == ("rejected_early", rule, RULES[rule])
        assert (key in asked or f"/{url.rpartition('/')[2]}" in asked) == (rule == "large")
        theirs = expected[key]
        assert size == ((theirs["original_width"], theirs["original_height"]) if rule == "large" else (None, None))
        assert row["final_url"] == (url if rule == "large" else None)
        assert row["sha256"] is row["phash"] is row["width"] is None
    assert verdicts(data, "bundled") == verdicts(whole, "bundled")
    ours, theirs_made = (
        select(data, SelectConfig(name="bundled", rules=RULES)),
        select(whole, SelectConfig(name="bundled", rules=RULES)),
    )
    assert ours.funnel == theirs_made.funnel and sum(ours.funnel.values()) == ours.rows == IMAGES
    assert contents(data.root)["shards/bundled/00000.tar"] == contents(whole.root)["shards/bundled/00000.tar"]
    assert ours.fetched == len(told & large) and sum(ours.early.values()) == IMAGES - ours.fetched
    counts = {rule.name: rule for rule in ours.rules}
    assert counts["told"].unknown == 0 and counts["told"].marginal == IMAGES - len(told)
    # sizes are known of what was asked for; of rows that were not, nothing is
    assert counts["large"].unknown == IMAGES - len(told) and counts["large"].marginal == len(told - large)
    assert counts["sharp"].unknown == IMAGES - ours.fetched
    assert "unknown, as early rules rejected them" in funnel_text(ours)


def test_records_status_verify_and_card_say_so(both: tuple[Data, Data, dict[str, int]]) -> None:
    data, _, _ = both
    records = [read_json(data.fetched_record(s.shard)) for s in data.plan.shards]
    left = sum(sum(record["rejected_early"].values()) for record in records)
    for record in records:
        assert record["early"] == {name: RULES[name] for name in EARLY}
        assert record["status_dict"]["rejected_early"] == sum(record["rejected_early"].values())
        assert sum(record["status_dict"].values()) == record["count"]
        failed = record["failed_to_download"] + record["failed_to_resize"]
        assert failed == 0 and record["successes"] == record["count"] - record["status_dict"]["rejected_early"]
    said: list[str] = []
    facts, following = status(data, said.append)
    assert sum(facts["rejected_early"].values()) == left and following == ""
    assert any("100.0% ok" in line for line in said)
    assert any(line.startswith(("early     large", "early     told")) for line in said)
    assert list(verify.verify(data)) and not any(verify.verify(data))
    assert "what they rejected was not stored" in (data.packed("bundled") / "README.md").read_text()


def test_a_later_selection_says_what_it_cannot_judge(both: tuple[Data, Data, dict[str, int]]) -> None:
    data, whole, _ = both
    stricter = {**RULES, "large": "least(original_width, original_height) >= 200"}
    ours, theirs = (select(d, SelectConfig(name="stricter", rules=stricter)) for d in (data, whole))
    assert not ours.unjudged and not [w for w in ours.warnings if "judged" in w]
    assert verdicts(data, "stricter") == verdicts(whole, "stricter") and ours.kept == theirs.kept

    looser = {**RULES, "large": "least(original_width, original_height) >= 120"}
    ours = select(data, SelectConfig(name="looser", rules=looser))
    said, expected = verdicts(data, "looser"), {}
    select(whole, SelectConfig(name="looser", rules=looser))
    expected = verdicts(whole, "looser")
    unjudged = {key for key, verdict in said.items() if verdict == "unjudged"}
    assert len(unjudged) == ours.unjudged == ours.funnel["unjudged"] > 0
    assert all(expected[key] in ("kept", "sharp") for key in unjudged)
    assert {k: v for k, v in said.items() if k not in unjudged} == {
        k: v for k, v in expected.items() if k not in unjudged
    }
    warning = next(w for w in ours.warnings if "judged" in w)
    assert f"{len(unjudged):,} rows can't be judged" in warning and "early rules (large)" in warning
    assert f"`tastemaker retry {data.root} --early --set 'select.early=[told]'`" in warning
    assert "\nunjudged " in funnel_text(ours) and sum(ours.funnel.values()) == ours.rows

    none = select(data, SelectConfig(name="none", rules={}))
    assert none.unjudged == sum(none.early.values()) and none.kept == none.fetched
    assert f"`tastemaker retry {data.root} --early`" in next(w for w in none.warnings if "judged" in w)


def test_an_image_that_models_did_not_see_is_no_image_without_a_value(served: Served, tmp_path: Path) -> None:
    listed, data = served.write_list(tmp_path / "list.tsv"), Data(tmp_path / "data")
    sharp = {"sharp": "quality_sharpness > 100"}
    chosen = run_stages(listed, data, recipe(served, "sharp", **sharp))
    blurred = next(rule.rejected for rule in chosen.rules if rule.name == "sharp")
    assert blurred and chosen.kept and not chosen.unjudged and not chosen.early
    alike = {"alike": "similarity > -2", **sharp}
    both = select(data, SelectConfig(name="both", rules=alike))
    rule = both.rules[0]
    # without a caption there is no similarity, which is known; of what was not embedded nothing is
    assert rule.unknown > 0 and not both.unjudged and rule.nulls == rule.marginal
    alone = select(data, SelectConfig(name="alone", rules={"alike": alike["alike"]}))
    assert alone.unjudged == rule.unknown and alone.kept + alone.unjudged + rule.marginal == alone.rows
    assert "early rules (sharp) did" in next(w for w in alone.warnings if "judged" in w)
    assert set(verdicts(data, "alone").values()) == {"kept", "unjudged", "alike"}


def test_what_was_left_out_is_fetched_later_and_nothing_else(served: Served, tmp_path: Path) -> None:
    listed, data, whole = served.write_list(tmp_path / "list.tsv"), Data(tmp_path / "data"), Data(tmp_path / "whole")
    run_stages(listed, data, recipe(served, *EARLY))
    before, then = served.requests(), {row["key"]: row for row in rows(data)}

    now = recipe(served, "told")
    with pytest.raises(
        UserError, match=r"(?s)other early rules.*large: 'least.*' there, 'not early' asked for.*--early"
    ):
        refuse_changes(data, now)
    refuse_changes(data, now, early=True)
    refuse_changes(data, now, "fetch")
    with pytest.raises(UserError, match=r"select.early is what it was \(told, large\)"):
        refuse_same_early(data, recipe(served, *EARLY))
    refuse_same_early(data, now)
    left = sum(row["reason"] == "large" for row in then.values())
    annotators = make_annotators(now.columns)
    assert remaining_work(data, now, annotators, ("fetch",)).rows == sum(
        left_out(data, s.shard, now.early_fetch()) for s in data.plan.shards
    )
    store_recipe(data, now)  # as an interrupted retry leaves it
    assert all(fetch_done(data, s.shard, now.hashes()[0]) for s in data.plan.shards)
    fetch_shards(data, now)
    asked = {path for path, n in served.requests().items() if n > before.get(path, 0)}
    assert len(asked) == left
    for row in rows(data):
        if then[row["key"]]["reason"] == "told" or then[row["key"]]["status"] == "success":
            assert row == then[row["key"]]
        else:
            assert row["status"] == "success" and row["sha256"]

    # and all of it: the files of a run that had no early rules
    none = recipe(served)
    run_stages(listed, data, none)
    run_stages(listed, whole, none)
    ours, theirs = contents(data.root), contents(whole.root)
    for name in ours:
        if name.startswith(("fetched/", "selected/", "shards/")) and not name.endswith((".json", ".md")):
            assert ours[name] == theirs[name], name
    with pytest.raises(UserError, match=r"has no early rules"):
        refuse_same_early(data, none)


@pytest.mark.long
def test_killed_while_it_fetches_what_was_left_out(served: Served, tmp_path: Path) -> None:
    """At every file event in `fetched/` but the first few: what was there stays, and the next run ends as any other."""
    listed, early, now = served.write_list(tmp_path / "list.tsv"), recipe(served, *EARLY), recipe(served, "told")
    first, whole = Data(tmp_path / "first"), Data(tmp_path / "whole")
    for data, wanted in ((first, early), (whole, now)):
        make_plan(str(listed), data, wanted.source)
        fetch_shards(data, wanted)
    events = 0
    for kill_at in (1, 3, 5, 7, 9, 99):
        data = Data(tmp_path / f"killed-{kill_at}")
        shutil.copytree(first.root, data.root)
        watch = Watch(data.root)
        child = multiprocessing.get_context("forkserver").Process(target=fetch_shards, args=(data, now))
        child.start()
        seen = 0
        while child.is_alive():
            for _ in watch.events(0.01):
                seen += 1
                if seen == kill_at:
                    child.kill()
        child.join()
        watch.close()
        events = max(events, seen)
        data = Data(data.root)
        for s in data.plan.shards:
            assert not fetch_done(data, s.shard, now.hashes()[0]) or data.table(s.shard).exists()
        fetch_shards(data, now)
        ours, theirs = contents(data.root), contents(whole.root)
        assert {n: b for n, b in ours.items() if n.startswith("fetched/")} == {
            n: b for n, b in theirs.items() if n.startswith("fetched/")
        }
    assert events > 9


def test_local_files_are_not_read_to_the_end(served: Served, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, side in enumerate([100, 160, 120, 200]):
        Image.fromarray(rng.integers(0, 255, (side, 400, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a long enough caption")
    data = Data(tmp_path / "data")
    run_stages(str(folder), data, recipe(served, "large"))
    found = rows(data)
    assert [row["reason"] for row in found] == ["large", None, "large", None]
    assert [(row["original_width"], row["original_height"]) for row in found] == [
        (400, side) for side in (100, 160, 120, 200)
    ]
    assert found[0]["bytes"] is None  # left after its first 64 kB


# ------------------------------------------------------------------------------------------------------ on the wire


class Drip:
    """A server that sends one body in pieces, slowly, and counts what it could send, and its connections."""

    def __init__(self, body: bytes, head: bytes = b"") -> None:
        self.body, self.head = body, head or b"Content-Length: %d\r\n" % len(body)
        self.sent, self.connections = 0, 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError):
            while (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n" + self.head + b"\r\n")
                for at in range(0, len(self.body), 16_384):
                    writer.write(self.body[at : at + 16_384])
                    await writer.drain()
                    self.sent += len(self.body[at : at + 16_384])
                    await asyncio.sleep(0.01)
        writer.close()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        async with await asyncio.start_server(self.answer, "127.0.0.1", 0) as server:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


def noise(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def fetch_twice(body: bytes, head: bytes = b"") -> tuple[Drip, list[BaseException | None]]:
    """Two fetches one after the other, under a rule that wants 600 pixels."""
    rules = EarlyRules({"large": "least(original_width, original_height) >= 600"}, pa.schema([]))
    table, drip, ended = pa.table({"url": ["u"], "caption": ["c"]}), Drip(body, head), list[BaseException | None]()

    async def run() -> None:
        async with drip.serving() as host:
            fetcher = Fetcher(FetchConfig(allow=(f"127.0.0.0/8:{host[10:]}",), respect=(), retries=0))
            with ShardRules(rules, table, ["0"]) as early:
                for _ in range(2):
                    try:
                        async with fetcher.body(f"http://{host}/a", lambda data: early.check_prefix(0, data)):
                            ended.append(None)
                    except RowError as e:
                        ended.append(e)
            await fetcher.close()

    asyncio.run(asyncio.wait_for(run(), 30))
    return drip, ended


def test_a_body_is_left_as_soon_as_its_header_is_read() -> None:
    body = noise(500, 700)
    assert len(body) > 1_000_000
    drip, ended = fetch_twice(body)
    assert [type(e) for e in ended] == [RejectedEarly] * 2
    assert isinstance(ended[0], RejectedEarly) and ended[0].original_size == (500, 700) and ended[0].http_status == 200
    assert drip.sent < 2 * 150_000 and drip.connections == 2

    drip, ended = fetch_twice(noise(700, 700))
    assert ended == [None, None] and drip.connections == 1


def test_little_that_is_left_is_read_to_keep_the_connection() -> None:
    drip, ended = fetch_twice(noise(90, 100))
    assert [type(e) for e in ended] == [RejectedEarly] * 2 and drip.connections == 1


# ------------------------------------------------------------------------------------------------ the same as DuckDB


def test_a_rule_says_early_what_it_says_later() -> None:
    """Random rows, with nulls and numbers that are none, through `select`'s own SQL in a query over all."""
    rng = np.random.default_rng(1)
    n = 400
    floats = np.where(rng.random(n) < 0.2, np.nan, rng.normal(size=n))
    table = pa.table(
        {
            "url": [f"http://h{i % 7}/{i}" for i in range(n)],
            "caption": [None if rng.random() < 0.1 else "x" * int(rng.integers(0, 9)) for _ in range(n)],
            "WIDTH": pa.array(
                [None if rng.random() < 0.1 else int(rng.integers(1, 900)) for _ in range(n)], pa.int64()
            ),
            'od"d': pa.array(floats, pa.float64(), mask=rng.random(n) < 0.1),
            "source.width": pa.array(rng.integers(0, 5, n), pa.int16()),
        }
    )
    extra = pa.schema([("WIDTH", pa.int64()), ('od"d', pa.float64()), ("width", pa.int16())])
    rules = {
        "told": "length(caption) > 3 and url not like '%h3%'",
        "odd": 'source."od""d" > -1',
        "known": "source.WIDTH > 100 or source.WIDTH is null",
        "second": "source.width_1 < 4",
        "keyed": "key > '000000040'",
        "large": "least(original_width, original_height) >= 300",
        "flat": "greatest(original_width, original_height) <= 3.0 * least(original_width, original_height)",
        "as_said": "original_width >= source.WIDTH / 2",
        "wide": "case when original_width > original_height then original_width % 3 <> 1 else caption <> '' end",
        "odd_function": "len(range(original_width)) > 40",
    }
    keys = [f"{i:09d}" for i in range(n)]
    sizes = [(int(w), int(h)) for w, h in rng.integers(1, 900, (n, 2))]
    con, whole = duckdb.connect(), table.append_column("key", pa.array(keys))
    whole = whole.append_column("w", pa.array([w for w, _ in sizes], pa.int32()))
    whole = whole.append_column("h", pa.array([h for _, h in sizes], pa.int32()))
    con.register("t", whole.rename_columns(["url", "caption", "a", "b", "c", "key", "w", "h"]))
    con.execute(
        "CREATE TABLE ledger AS SELECT url, caption, key, w AS original_width, h AS original_height, struct_pack("
        '"WIDTH" := a, "od""d" := b, "width_1" := c) AS source FROM t'
    )
    types = {**ledger_types(), **{f"source.{k}": v for k, v in source_types(extra).items()}}
    expected = {
        rule.name: [
            s != 0 for (s,) in con.execute(f"SELECT {state_sql(rule, types)} FROM ledger ORDER BY key").fetchall()
        ]
        for rule in check_rules(rules, ledger_types(), source_types(extra), {})
    }
    for name, condition in rules.items():
        found = []
        with ShardRules(EarlyRules({name: condition}, extra), table, keys) as early:
            for i, (width, height) in enumerate(sizes):
                try:
                    early.check_row(i)
                    early.check_size(i, width, height)
                    found.append(False)
                except RejectedEarly as e:
                    assert e.rule == name
                    found.append(True)
        assert found == expected[name] and 0 < sum(found) < n, name


def test_sql_that_fails_on_a_row_ends_the_run_and_names_the_rule() -> None:
    table = pa.table({"url": ["a", "b"], "caption": ["1", "no number"]})
    with pytest.raises(UserError, match=r"rule number \(CAST\(caption AS INT\) > 0\) fails on a row: .*no number"):
        ShardRules(EarlyRules({"number": "CAST(caption AS INT) > 0"}, pa.schema([])), table, ["0", "1"])


def test_refused_at_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = tmp_path / "list.csv"
    listed.write_text("url,caption\nhttp://127.0.0.1:9/a.jpg,a caption\n")
    command = ["curate", str(listed), "--out", str(tmp_path / "data"), "--recipe", "bundled", "--set"]
    for setting, words in (
        ("select.early=[larg]", "there is no rule larg. Did you mean large?"),
        ("select.early=[on_topic]", "top() looks at all rows"),
        ("select.early=[once]", "best_of() looks at all rows"),
    ):
        assert cli.main([*command, setting]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
