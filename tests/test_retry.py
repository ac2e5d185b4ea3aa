"""`tastemaker retry` fetches what failed for transient reasons, and only that; `--restart-from` redoes on purpose."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate import verify
from curate.annotators.registry import make_annotators
from curate.fetch.deny import Deny
from curate.layout import Data
from curate.ledger.denied import DenySearch
from curate.ledger.sql import connect
from curate.shards.tar import index_tar, read_images
from curate.store.files import read_json
from curate.workers import embed_done, fetch_done
from demo.web import Route
from pipelines import cli
from pipelines.commands.status import status
from pipelines.curation import remaining_work, restart
from pipelines.recipe import Recipe, load_recipe
from pipelines.runtime.jobs import RemainingWork
from pipelines.terminal import counted
from tests.small_web import image
from tests.stages import Served, choose, contents, embed_shards, fetch_shards, run_stages, serving

ROOT = Path(__file__).parents[1]
SHARD_SIZE, IMAGES = 12, 30  # three shards; the middle one has nothing that may pass


def flaky(number: int, *first: Route, **then: Any) -> Route:
    """An image that is answered after other answers."""
    name, data, _ = image(number)
    return Route(body=data, content_type=f"image/{name.rpartition('.')[2]}", first=first, **then)


def others() -> dict[str, Route]:
    """Two rows of each shard that fail at first."""
    return {
        "/flaky.jpg": flaky(40, Route(status=503)),
        "/busy.jpg": flaky(41, Route(status=429)),
        "/no.jpg": Route(status=404),
        "/page.jpg": Route(body=b"<!doctype html>", content_type="image/jpeg"),
        "/cut.jpg": flaky(44, flaky(44, drop=True)),
        "/down.jpg": Route(status=503),
    }


WAITING = {"/flaky.jpg": 1, "/busy.jpg": 1, "/cut.jpg": 1, "/down.jpg": 1}


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(IMAGES, others(), SHARD_SIZE) as served:
        yield served


def rows(data: Data, shard: int) -> list[dict[str, Any]]:
    return pq.read_table(data.table(shard)).to_pylist()


def outcomes(data: Data) -> dict[str, str | None]:
    """path -> reason of the rows that are not plain images."""
    found = {"/" + r["url"].split("/", 3)[3]: r["reason"] for s in range(3) for r in rows(data, s)}
    return {path: found[path] for path in others()}


def written(data: Data, shard: int) -> dict[str, int]:
    """When each file of a shard was written, ns; another time is another file."""
    found = (p for stage in ("fetched", "embedded", "annotated") for p in (data.root / stage).rglob(f"*{shard:05d}*"))
    whole = data.annotations("dup", shard).parent  # depends on all images
    return {str(p): p.stat().st_mtime_ns for p in found if not p.is_relative_to(whole)}


def asked(served: Served, before: dict[str, int]) -> dict[str, int]:
    """What was asked for since."""
    return dict(Counter(served.requests()) - Counter(before))


# -------------------------------------------------------------------------------------------------------------- retry


def test_retry_asks_for_what_may_pass_and_keeps_the_rest(served: Served, tmp_path: Path) -> None:
    listed = served.write_list(tmp_path / "list.tsv")
    data, recipe = Data(tmp_path / "data"), served.recipe
    first = run_stages(listed, data, recipe)
    said: list[str] = []
    assert status(data, said.append)[1] == f"tastemaker retry {data.root}"
    assert set(served.requests().values()) == {1}
    assert outcomes(data) == {
        "/flaky.jpg": "http_5xx",
        "/busy.jpg": "http_429",
        "/no.jpg": "http_404",
        "/page.jpg": "not_an_image",
        "/cut.jpg": "protocol",
        "/down.jpg": "http_5xx",
    }
    before = served.requests()
    then = {shard: (rows(data, shard), dict(_images(data, shard)), written(data, shard)) for shard in range(3)}

    fetch_shards(data, recipe, retry=True)
    assert remaining_work(data, recipe, make_annotators(recipe.columns), ("fetch", "embed")) == RemainingWork(
        [0, 2], 0, 3
    )
    assert embed_shards(data, recipe) == 3  # of 30 images, those that came back
    second = choose(data, recipe)

    assert asked(served, before) == WAITING
    now = outcomes(data)
    assert [path for path in now if now[path] is None] == ["/flaky.jpg", "/busy.jpg", "/cut.jpg"]
    assert now["/down.jpg"] == "http_5xx"
    for shard, (old_rows, old_images, old_times) in then.items():
        keys = [r["key"] for r in rows(data, shard) if r["status"] == "success"]
        assert list(index_tar(data.tar(shard))) == keys == sorted(keys)  # in the list's order
        for old, new in zip(old_rows, rows(data, shard), strict=True):
            assert old == new or old["url"].endswith(tuple(WAITING))
        assert old_images.items() <= dict(_images(data, shard)).items()
        changed = {path for path, when in written(data, shard).items() if when != old_times[path]}
        assert changed == (set() if shard == 1 else set(old_times))
    assert second.fetched == first.fetched + 3 and second.not_fetched != first.not_fetched
    assert list(verify.verify(data)) and not any(verify.verify(data))

    # what a first run would have given, had the web been well
    fresh = Data(tmp_path / "fresh")
    run_stages(listed, fresh, recipe)
    same(fresh.root, data.root)

    # and again: one server is still down, and its shard comes out the same
    before, then = served.requests(), contents(data.root)
    then_times = {shard: written(data, shard) for shard in range(3)}
    fetch_shards(data, recipe, retry=True)
    assert asked(served, before) == {"/down.jpg": 1}
    assert embed_shards(data, recipe) == 0
    assert contents(data.root) == then
    assert written(data, 0) == then_times[0] and written(data, 1) == then_times[1]
    facts, following = status(data, said.append)
    assert (facts["may_pass"], facts["tried_in_vain"], following) == (1, 1, "")
    assert any("the last one had back none of 1 row that" in line for line in said)
    assert all(embed_done(data, shard, recipe.hashes()[1], {}) for shard in range(3))


def same(root: Path, other: Path) -> None:
    """Images that a retry recovers go through the models in other batches than in an undisturbed run, which changes no
    byte: of the bundled models each image's numbers depend on no other's."""
    a, b = contents(root), contents(other)
    assert {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)} == set()


@pytest.mark.long
def test_retries_before_the_next_embedding_add_up(served: Served, tmp_path: Path) -> None:
    """Two retries and then one embedding; and a shard that was fetched again as a whole is embedded as a whole."""
    data, recipe = Data(tmp_path / "data"), served.recipe
    run_stages(served.write_list(tmp_path / "list.tsv"), data, recipe)
    vectors = [np.load(data.image_vectors(shard)) for shard in range(3)]
    fetch_shards(data, recipe, retry=True)
    fetch_shards(data, recipe, retry=True)
    retries = [read_json(data.fetched_record(shard)).get("retries", []) for shard in range(3)]
    assert [[(r["tried"], len(r["recovered"])) for r in each] for each in retries] == [[(2, 2)], [], [(2, 1), (1, 0)]]
    assert embed_shards(data, recipe) == 3
    for shard in range(3):
        kept = [v.tobytes() for v in np.load(data.image_vectors(shard))]
        assert {v.tobytes() for v in vectors[shard]} <= set(kept)
    data.invalidate(data.fetched_record(0))
    fetch_shards(data, recipe)
    assert "retries" not in read_json(data.fetched_record(0))
    data.invalidate(data.annotations_record("open_nsfw", 0))  # a detector alone has the pixels decoded again
    assert embed_shards(data, recipe) == read_json(data.fetched_record(0))["successes"]


def _images(data: Data, shard: int) -> Iterator[tuple[str, bytes]]:
    yield from ((key, image) for key, _, image in read_images(data.tar(shard)))


KILLED = """
import sys
from pathlib import Path
from curate.layout import Data
from curate.ledger.denied import DenySearch
from curate.fetch.deny import Deny
from pipelines.recipe import load_recipe
from tests.stages import fetch_shards
fetch_shards(Data(Path(sys.argv[1])), load_recipe("bundled", sys.argv[2:]), retry=True)
"""


@pytest.mark.long
def test_a_retry_that_is_killed_has_changed_nothing(tmp_path: Path) -> None:
    slow = {"/flaky.jpg": flaky(40, Route(status=503)), "/stuck.jpg": flaky(41, Route(status=503), delay=8.0)}
    with serving(10, slow, shard_size=6) as served:
        data = Data(tmp_path / "data")
        recipe = load_recipe("bundled", [*served.settings, "select.rules="])
        run_stages(served.write_list(tmp_path / "list.tsv"), data, recipe)
        before, then = served.requests(), contents(data.root)
        command = [sys.executable, "-c", KILLED, str(data.root), *served.settings]
        with subprocess.Popen(command, cwd=ROOT) as process:
            _wait_for(lambda: asked(served, before).keys() == slow.keys())
            record = data.fetched_record(0)
            _wait_for(lambda: b'"http_5xx"' not in record.read_bytes() if record.exists() else False)
            process.send_signal(signal.SIGKILL)  # the first shard is through, the second waits
        assert all(fetch_done(data, shard, recipe.hashes()[0]) for shard in range(2))
        now = contents(data.root)
        assert {name for name in then if now[name] != then[name]} == {"fetched/00000.tar", "fetched/00000.parquet"}
        assert not any(verify.verify(data))
        assert not embed_done(data, 0, recipe.hashes()[1], {}) and embed_done(data, 1, recipe.hashes()[1], {})

        before = served.requests()
        fetch_shards(data, replace(recipe, fetch=replace(recipe.fetch, timeout=20)), retry=True)
        assert asked(served, before) == {"/stuck.jpg": 1}  # what the killed retry had got is not asked for again
        assert [r["reason"] for shard in range(2) for r in rows(data, shard)] == [None] * 12


def _wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.mark.long
def test_the_command_with_ray(served: Served, tmp_path: Path) -> None:
    data, recipe = Data(tmp_path / "data"), served.recipe
    run_stages(served.write_list(tmp_path / "list.tsv"), data, recipe)
    before, untouched = served.requests(), written(data, 1)
    done = tastemaker("retry", data.root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert asked(served, before) == WAITING
    assert written(data, 1) == untouched
    fresh = Data(tmp_path / "fresh")
    run_stages(tmp_path / "list.tsv", fresh, recipe)
    shutil.rmtree(data.root / "report")
    same(fresh.root, data.root)
    assert "retry  3 more images" in done.stdout
    assert "kept" in done.stdout and "1 of 3 shards are done already" in done.stdout


def tastemaker(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "pipelines.cli", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)


def _settings(served: Served) -> list[str]:
    return [word for setting in served.settings for word in ("--set", setting)]


# ------------------------------------------------------------------------------------------- refused changes, restart


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    """A finished data folder with nothing to retry, its list beside it; for reading only."""
    root = tmp_path_factory.mktemp("restart")
    with serving(20, {"/no.jpg": Route(status=404)}, shard_size=9) as served:
        run_stages(served.write_list(root / "list.tsv"), Data(root / "data"), served.recipe)
        yield served, root / "data"


@pytest.fixture
def copy(made: tuple[Served, Path], tmp_path: Path) -> Data:
    shutil.copytree(made[1], tmp_path / "data")
    return Data(tmp_path / "data")


def everything(root: Path) -> dict[str, bytes]:
    """All files, records too."""
    hidden = (".lock", ".workers", ".tastemaker")
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name not in hidden}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["images.size=64"], ["images.size: 128 there, 64 asked for", "--restart-from images"]),
        (
            ["images.quality=80", "fetch.max_bytes=1MB"],
            [
                "fetch.max_bytes: 32000000 there, 1000000 asked for",
                "images.quality: 95 there, 80 asked for",
                "--restart-from fetch",
            ],
        ),
        (["source.shard_size=5"], ["source.shard_size: 9 there, 5 asked for", "--restart-from source"]),
        (
            ["embed.encoder=open_clip:ViT-B-32/openai", "columns=", "select.rules="],
            ["embed.encoder: 'bundled' there, 'open_clip:ViT-B-32/openai' asked for", "--restart-from embed"],
        ),
    ],
)
def test_a_change_that_would_alter_finished_shards_is_refused(
    made: tuple[Served, Path], copy: Data, capsys: pytest.CaptureFixture[str], settings: list[str], words: list[str]
) -> None:
    served, finished = made
    before, requests = everything(copy.root), served.requests()
    command = ["curate", str(finished.parent / "list.tsv"), "--out", str(copy.root), "--recipe", "bundled"]
    changed = [word for setting in settings for word in ("--set", setting)]
    assert cli.main([*command, *_settings(served), *changed]) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words), told
    assert cli.main([*command, *_settings(served), *changed, "--dry-run"]) == 2
    assert capsys.readouterr().err == told
    assert everything(copy.root) == before and served.requests() == requests
    if not settings[0].startswith("source"):
        assert cli.main(["retry", str(copy.root), *changed]) == 2
        assert everything(copy.root) == before


@pytest.mark.long
def test_other_changes_ask_nothing_and_contact_nobody(
    made: tuple[Served, Path], copy: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    served, finished = made
    requests, fetched = served.requests(), {s: written(copy, s) for s in range(3)}
    command = ["curate", str(finished.parent / "list.tsv"), "--out", str(copy.root), "--recipe", "bundled"]
    command += _settings(served)
    for setting in ("select.rules.beautiful=top(aesthetic, 0.9)", "pack.shard_size=3", "fetch.timeout=7"):
        command += ["--set", setting]
        assert cli.main(command) == 0, capsys.readouterr().err
    assert cli.main([*command[:4], "--dry-run", "--json"]) == 0  # by DATA's own recipe, as that is now
    assert '"rows_to_fetch": 0' in capsys.readouterr().out
    assert cli.main(command[:4]) == 0
    assert cli.main(["annotate", str(copy.root), "again=bundled-aesthetic"]) == 0
    assert cli.main(["retry", str(copy.root)]) == 0  # a 404 does not pass: nothing to do, not even to start Ray
    assert "starting Ray" not in capsys.readouterr().out
    assert served.requests() == requests
    now = {s: {p: i for p, i in written(copy, s).items() if "/again/" not in p} for s in range(3)}
    assert now == fetched
    assert "top(aesthetic, 0.9)" in copy.recipe.read_text()
    assert len(list((copy.root / "shards" / "bundled").glob("*.tar"))) > 1


def test_a_restart_that_cannot_be_done_takes_nothing_back(
    made: tuple[Served, Path], copy: Data, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    served, finished = made
    before = everything(copy.root)
    listed, out = (
        str(finished.parent / "list.tsv"),
        ["--out", str(copy.root), "--recipe", "bundled", *_settings(served)],
    )
    refused = {
        "images.size: 128 there, 64 asked for": [listed, "--restart-from", "embed", "--set", "images.size=64"],
        "nowhere.tsv": [str(tmp_path / "nowhere.tsv"), "--restart-from", "source"],
        "nosuch": [listed, "--restart-from", "images", "--set", "select.rules.odd=nosuch > 1"],
        "bundled-aesthetic reads vectors of bundled": [
            *(listed, "--restart-from", "embed", "--set", "embed.encoder=open_clip:ViT-B-32/openai")
        ],
        "embed.weights: there is no file": [
            *(listed, "--restart-from", "embed", "--set", f"embed.weights={tmp_path}/no.pt", "--set", "columns="),
            *("--set", "embed.encoder=open_clip:ViT-B-32/openai", "--set", "select.rules="),
        ],
    }
    for words, arguments in refused.items():
        assert cli.main(["curate", *arguments[:1], *out, *arguments[1:]]) == 2
        told = capsys.readouterr().err
        assert words in told, told
        assert everything(copy.root) == before, words
    for command in ("embed", "retry"):
        assert cli.main([command, str(copy.root), "--restart-from", "images"]) == 2
        told = capsys.readouterr().err
        assert f"tastemaker curate {copy.plan.list} --out {copy.root} --restart-from images" in told
        assert everything(copy.root) == before


@pytest.mark.long
def test_restart_from_images_gives_what_a_fresh_folder_gives(
    made: tuple[Served, Path], copy: Data, tmp_path: Path
) -> None:
    served, finished = made
    listed = finished.parent / "list.tsv"
    command = ["curate", listed, "--out", copy.root, "--recipe", "bundled", *_settings(served)]
    before = served.requests()
    done = tastemaker(*command, "--set", "images.size=96", "--restart-from", "images")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(asked(served, before).values()) == {1} and len(asked(served, before)) == 21
    other = Data(tmp_path / "fresh")
    run_stages(listed, other, load_recipe("bundled", [*served.settings, "images.size=96"]))
    ours, theirs = contents(copy.root), contents(other.root)
    assert {n for n in theirs if theirs[n] != ours.get(n)} == set()
    assert all(name.startswith("report/") for name in ours.keys() - theirs.keys())
    assert not any(verify.verify(copy))


def test_a_restart_that_is_killed_is_taken_up_by_the_old_recipe_too(
    made: tuple[Served, Path], copy: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    served, finished = made
    before, recipe = contents(copy.root), served.recipe
    restart(copy, recipe, "images", ("fetch", "embed"))  # as far as a killed run came
    assert not any(fetch_done(copy, s, recipe.hashes()[0]) for s in range(3))
    run_stages(finished.parent / "list.tsv", copy, recipe)
    assert contents(copy.root) == before
    assert copy.is_done(copy.space_record, config="", inputs={})


@pytest.mark.long
def test_restart_from_source_leaves_no_shard_of_the_old_list(
    made: tuple[Served, Path], copy: Data, tmp_path: Path
) -> None:
    served, finished = made
    recipe: Recipe = load_recipe("bundled", [*served.settings, "source.shard_size=30"])
    restart(copy, recipe, "source", ("fetch", "embed"))
    run_stages(finished.parent / "list.tsv", copy, recipe)
    fresh = Data(tmp_path / "fresh")
    run_stages(finished.parent / "list.tsv", fresh, recipe)
    assert contents(fresh.root) == contents(copy.root)
    assert [p.name for p in (copy.root / "fetched").glob("*.tar")] == ["00000.tar"]


# --------------------------------------------------------------------------------------- a deny-list that comes later


def test_a_deny_list_given_later_names_what_is_there(
    made: tuple[Served, Path], copy: Data, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By URL, in another spelling, by domain, by the sha256 of bytes or of a URL, by md5: every command refuses."""
    served, finished = made
    before, requests = everything(copy.root), served.requests()
    good = [r for shard in range(3) for r in rows(copy, shard) if r["status"] == "success"]
    packed = pq.read_table(sorted((copy.root / "shards" / "bundled").glob("*.parquet")))["key"].to_pylist()
    row = next(r for r in good if r["key"] in packed)
    host = row["url"].split("/")[2].partition(":")[0]
    of_host = [r["key"] for r in good if r["url"].split("/")[2].startswith(host)]
    denied = tmp_path / "denied.txt"

    def run(*words: str) -> str:
        code = cli.main([*words, "--set", f"fetch.deny=[{denied}]"])
        told = capsys.readouterr()
        assert code == (2 if told.err else 0), told.err
        assert everything(copy.root) == before or not told.err
        assert row["url"] not in told.err
        return told.err

    retry = ("retry", str(copy.root))
    for entry, keys in {
        row["url"]: [row["key"]],
        row["url"].replace("http://", "HTTP://") + "#part": [row["key"]],
        host: of_host,
        row["sha256"]: [r["key"] for r in good if r["sha256"] == row["sha256"]],
        hashlib.sha256(row["final_url"].encode()).hexdigest(): [row["key"]],
    }.items():
        denied.write_text(f"# not these\n{entry}\nother.example\n")
        told = run(*retry)
        assert f"{counted(len(keys), 'image')} of fetched/ (key {', '.join(keys[:3])}" in told, told
        count = len(set(keys) & set(packed))
        assert f"; {counted(count, 'image')} of shards/bundled.\n" in told
        assert told.endswith(f"\n  tastemaker remove {copy.root} --denied --deny {denied}\n")
    denied.write_text(row["url"])
    listed = str(finished.parent / "list.tsv")
    curate = ["curate", listed, "--out", str(copy.root), "--recipe", "bundled", *_settings(served)]
    for words in (
        *(curate, [*curate, "--dry-run"], ["fetch", *curate[1:]], ["embed", str(copy.root)]),
        *(["select", str(copy.root)], ["pack", str(copy.root)]),
    ):
        assert "1 image of fetched/" in run(*words), words
    told = run(*curate, "--restart-from", "fetch")  # the pack would stay until the very end, or for ever
    assert " of fetched/" not in told and "holds already: 1 image of shards/bundled.\n" in told
    denied.write_text("0" * 32)
    told = run(*retry)
    assert "perhaps images of fetched/ (shards 00000, 00001, 00002): its md5" in told
    assert "perhaps images of shards/bundled" in told
    assert f"--set 'fetch.deny=[{denied}]' --restart-from fetch" in told

    denied.write_text("https://elsewhere.example/a.jpg\nelsewhere.example\n" + "0" * 64)
    assert not run(*retry) and served.requests() == requests


def test_odd_urls_are_found_as_plain_ones_are(tmp_path: Path) -> None:
    urls = [
        *("http://a.example/x.jpg", "http://A.example:80/x.jpg#y", " http://a.example/x.jpg ", "http://b.example/é?"),
        *("http://c.example/a/../x.jpg", "http://d.example/x.jpg?", "http://sub.e.example/1", "no url", "/a/file.jpg"),
        *("http://192.168.0.1/x", "http://f.example/a,b", None),
    ]
    path = tmp_path / "t.parquet"
    names = ["url", "sha256", "key"]
    keys = [str(i) for i in range(len(urls))]
    pq.write_table(pa.table([pa.array(urls), pa.array(["no digest", None] * 6), pa.array(keys)], names=names), path)
    listed = [
        "http://a.example/x.jpg",
        "http://b.example/%C3%A9?",
        "http://c.example/x.jpg",
        "e.example",
        "192.168.0.1",
    ]
    (tmp_path / "deny.txt").write_text("\n".join([*listed, "http://d.example/x.jpg"]))
    deny = Deny.load([tmp_path / "deny.txt"])
    with connect() as con:
        assert list(DenySearch(con, deny).denied([path])) == [["0", "1", "2", "3", "4", "5", "6", "9"]]
