"""A retry beside what else happens to a data folder: images removed, opt-outs asked for again, kills at any moment."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from aesthetic import files
from aesthetic.errors import UserError
from curate import verify
from curate.fetch.deny import Deny
from curate.fetch.recheck import recheck
from curate.layout import Data
from curate.ledger.select import select
from curate.sources.adding import adding
from curate.sources.planner import make_plan
from curate.store.files import sweep
from demo.web import Route
from pipelines import cli
from pipelines.recipe import Recipe, load_recipe
from tests.small_web import image
from tests.stages import Served, choose, contents, embed_shards, fetch_shards, run_stages, serving


def flaky(number: int) -> Route:
    """An image that is answered after a 503."""
    name, data, _ = image(number)
    return Route(body=data, content_type=f"image/{name.rpartition('.')[2]}", first=(Route(status=503),))


COLUMNS = "columns={aesthetic: bundled-aesthetic, quality: quality, dup: {use: near-duplicates, phash: 4}}"


def recipe_of(served: Served) -> Recipe:
    """Cheap columns of each kind, and no rules."""
    return load_recipe("bundled", [*served.settings, COLUMNS, "select.rules="])


@pytest.fixture
def retried(tmp_path: Path) -> Iterator[tuple[Served, Data]]:
    """Two shards; three rows of the first came back by a retry, and nothing is embedded since. One server is down."""
    others = {f"/flaky{i}.jpg": flaky(40 + i) for i in range(3)} | {"/down.jpg": Route(status=503)}
    with serving(12, others, shard_size=9) as served:
        data = Data(tmp_path / "data")
        run_stages(served.write_list(tmp_path / "list.tsv"), data, recipe_of(served))
        assert recheck(data, served.recipe.fetch).asked == 12
        fetch_shards(data, recipe_of(served), retry=True)
        yield served, data


def paths_of(data: Data) -> dict[str, str]:
    """The key of each row that has a URL, by its path."""
    rows = [row for s in data.plan.shards for row in pq.read_table(data.table(s.shard)).to_pylist()]
    return {"/" + row["url"].split("/", 3)[3]: row["key"] for row in rows if row["url"]}


def remove(data: Data, *paths: str) -> Data:
    keys = paths_of(data)
    assert cli.main(["remove", str(data.root), "--keys", *(keys[path] for path in paths)]) == 0
    return Data(data.root)


# -------------------------------------------------------------------------------------------------------- with removal


@pytest.mark.long
def test_what_is_removed_between_a_retry_and_its_embedding(retried: tuple[Served, Data], tmp_path: Path) -> None:
    """Only what came back and is left is embedded, to the bytes of a folder that was embedded first; no retry asks for
    what was removed, whether it had an image or failed."""
    served, data = retried
    recipe, gone = recipe_of(served), ("/flaky1.jpg", "/down.jpg", "/000.jpg")
    first = Data(tmp_path / "first")
    shutil.copytree(data.root, first.root)
    assert embed_shards(first, recipe) == 3
    choose(remove(first, *gone), recipe)
    data = remove(data, *gone)
    assert embed_shards(data, recipe) == 2
    assert embed_shards(data, recipe) == 0
    choose(data, recipe)
    assert not any(verify.verify(data))
    ours, theirs = contents(data.root), contents(first.root)
    tables = {n for n in theirs if n.endswith((".parquet", ".npy", ".tar")) and not n.startswith("shards/")}
    assert len(tables) > 20 and {n for n in tables if ours[n] != theirs[n]} == set()

    asked = served.requests()
    fetch_shards(data, recipe, retry=True)
    for shard in range(2):
        data.invalidate(data.fetched_record(shard))
    fetch_shards(data, recipe)
    now = served.requests()
    assert {path for path in now if now[path] != asked.get(path)} == {*asked} - {*gone}
    assert not {*gone} & paths_of(data).keys()
    assert embed_shards(data, recipe) == 0  # the same bytes
    reasons = [r for s in range(2) for r in pq.read_table(data.table(s))["reason"].to_pylist()]
    assert reasons.count("removed") == 3


# -------------------------------------------------------------------------------------------------------- with opt-outs


def test_of_images_that_came_since_nobody_was_asked(tmp_path: Path) -> None:
    """A rule about opt-outs is refused, with what to do, until their origins are asked, and no others."""
    others = {"/flaky.jpg": flaky(40), "/gone.jpg": Route(status=404, first=(Route(status=503),))}
    with serving(4, others, shard_size=3) as served:
        recipe, data = recipe_of(served), Data(tmp_path / "data")
        asking = replace(recipe.select, rules={"willing": "opt_out_answer = 'ok'"})
        again = r"annotated/opt_outs\S* {}.* `tastemaker check-opt-outs \S+` makes"
        make_plan(str(served.write_list(tmp_path / "list.tsv")), data, recipe.source)
        fetch_shards(data, recipe)
        assert recheck(data, recipe.fetch).asked == select(data, asking).kept == 4

        fetch_shards(data, recipe, retry=True)  # an image comes back, and a failure becomes final
        with pytest.raises(UserError, match=again.format("was made from an older fetched/0000")):
            select(data, asking)
        assert recheck(data, recipe.fetch).asked == 1
        assert select(data, asking).kept == 5

        more = tmp_path / "more.tsv"
        more.write_text(f"url\n{served.web.url(5, '/000.jpg')}\n")
        with adding(str(more), data.plan, recipe.source, None, Deny(), tmp_path) as addition:
            addition.write()
        data = Data(data.root)
        fetch_shards(data, recipe)
        with pytest.raises(UserError, match=again.format("lacks 1 of 3 fetched shards")):
            select(data, asking)
        assert recheck(data, recipe.fetch).asked == 1
        assert select(data, asking).kept == 6


# --------------------------------------------------------------------------------------------------------------- killed


def retry_here(root: Path, settings: list[str], kill_at: int) -> None:
    """What `tastemaker retry` does, without Ray, in a process that ends itself after so many files; it says how many
    there were."""
    sync, count = files.sync, 0

    def counting(path: Path) -> None:
        nonlocal count
        sync(path)
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    files.sync = counting
    data, recipe = Data(root), load_recipe("bundled", settings)
    with data.hold():
        sweep(root)
        fetch_shards(data, recipe, retry=True)
        embed_shards(data, recipe)
        choose(data, recipe)
    root.with_suffix(".count").write_text(str(count))


def retry_child(root: Path, settings: list[str], kill_at: int = 0) -> int | None:
    """Run it in a child that is forked from a process which has imported everything; its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "curate.workers", "curate.report", "pipelines.curation", "onnxruntime"])
    child = context.Process(target=retry_here, args=(root, settings, kill_at))
    child.start()
    child.join()
    return child.exitcode


@pytest.mark.long
def test_a_retry_killed_at_many_moments(tmp_path: Path) -> None:
    """kill -9 while it fetches, embeds, compares, selects and packs; the next retry ends where an undisturbed one does.
    And killed again and again, a few files further each time."""
    others = {f"/flaky{i}.jpg": flaky(40 + i) for i in range(4)}
    others |= {"/down.jpg": Route(status=503), "/gone.jpg": Route(status=404, first=(Route(status=503),))}
    with serving(20, others, shard_size=9) as served:
        settings = [
            *served.settings,
            COLUMNS,
            "select.rules={sharp: quality_sharpness > 20, best: 'top(aesthetic, 0.7)'}",
        ]
        data = Data(tmp_path / "data")
        run_stages(served.write_list(tmp_path / "list.tsv"), data, load_recipe("bundled", settings))
        calm = tmp_path / "calm"
        shutil.copytree(data.root, calm)
        assert retry_child(calm, settings) == 0
        expected, total = contents(calm), int(calm.with_suffix(".count").read_text())
        assert expected != contents(data.root) and total > 40
        for kill_at in range(1, total, max(1, total // 10)):
            root = tmp_path / f"killed{kill_at}"
            shutil.copytree(data.root, root)
            assert retry_child(root, settings, kill_at) == -signal.SIGKILL
            assert retry_child(root, settings) == 0
            assert contents(root) == expected, kill_at
            assert not any(verify.verify(Data(root)))
            shutil.rmtree(root)
        kills, root = 0, data.root
        while retry_child(root, settings, 30) == -signal.SIGKILL:  # the pack, which is made as a whole, has fewer files
            kills += 1
            assert kills < 10, "it comes no further"
        assert kills > 0 and contents(root) == expected
