"""Images removed in every way, from a data folder with everything in it: every byte of it is searched afterwards."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate.duplicates.pdq import MIN_QUALITY, pdq
from curate.fetch.deny import Deny
from curate.fetch.deny_file import DenyEntry, add_entry
from curate.images.decode import decode
from curate.layout import Data
from curate.ledger.select import SelectConfig
from curate.shards.tar import read_images
from curate.sources.adding import adding
from curate.sources.plan import load_plan
from demo.web import Route, Web, address
from pipelines.cli import main
from pipelines.recipe import Recipe, load_recipe
from tests.side_environments import SideEnvironments
from tests.small_captions import Behaviour, CaptionServer
from tests.small_serve import serving_data
from tests.small_web import image
from tests.stages import fetch_shards, run_stages

pytestmark = pytest.mark.long

EACH = 50  # images that go in each way
WAYS = ("keys", "urls", "domains", "sha256", "like", "denied")
HOSTS = 4  # of those that stay, or go in another way than by their domain


@dataclass(frozen=True)
class Row:
    """An image of the web: its words stand in its URL and caption, and nowhere else."""

    url: str
    caption: str
    file: bytes
    words: tuple[str, ...]


@dataclass(frozen=True)
class World:
    """A web, the rows of its list, and a recipe that may ask it."""

    web: Web
    rows: list[Row]
    recipe: Recipe

    def write_list(self, path: Path, rows: Sequence[Row], spare: str = "") -> Path:
        """The list as text, so that the plan holds a copy; `spare` makes other URLs of the same images."""
        path.write_text("url\tcaption\n" + "".join(f"{r.url}{spare}\t{r.caption}\n" for r in rows))
        return path


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """So many images as the test's parameter says; the first fifty lie on a host of their own."""
    count, form = request.param
    made, routes = [], dict[str | tuple[int, str], Route]()
    for i in range(count):
        name, file, _ = image(i)
        words = [hashlib.sha256(f"{what} {i}".encode()).hexdigest()[:12] for what in ("url", "caption")]
        path = f"/{words[0]}.{name.rpartition('.')[2]}"
        routes[path] = Route(body=file, content_type=f"image/{name.rpartition('.')[2]}")
        made.append((path, f"part {i}, “naïve” {words[1]}", file, words))
    with Web(routes, hosts=HOSTS + 1) as web:
        rows = [
            Row(web.url(0 if i < EACH else 1 + i % HOSTS, path), caption, file, tuple(words))
            for i, (path, caption, file, words) in enumerate(made)
        ]
        settings = ["source.shard_size=64", f'fetch.allow=["127.0.0.0/8:{web.port}"]', "fetch.retries=0"]
        settings += ["images.size=160", f"images.format={form}", "pack.shard_size=50", "fetch.rate=5000"]
        recipe = load_recipe("bundled", settings)
        columns = recipe.columns | {"pdq": "pdq", "dup": {"use": "near-duplicates", "phash": 4}}
        select = SelectConfig(name="all", rules={"seen": "width > 0"})
        yield World(web, rows, replace(recipe, columns=columns, select=select))


def make(world: World, root: Path, captions: CaptionServer | None = None) -> Data:
    """Everything that a data folder has: shards, vectors, columns with answers that were paid for, two selections and
    packs, a model's latents, a sheet, ratings, what the studio keeps, a published copy inside of it."""
    data = Data(root / "data")
    run_stages(world.write_list(root / "list.tsv", world.rows), data, world.recipe)
    if captions is not None:
        spec = f"cap={{use: captions, base_url: '{captions.url}', model: tiny-vl}}"
        assert main(["annotate", str(data), spec]) == 0
        best = 'select.rules={good: "top(aesthetic, 0.7)"}'
        assert main(["select", str(data), "--name", "best", "--sheet", "--set", best]) == 0
        assert main(["select", str(data), "--name", "all", "--set", 'select.rules={seen: "width > 0"}']) == 0
        for name in ("best", "all"):
            assert main(["pack", str(data), "--name", name]) == 0
        model = ["--out", str(data.root / "models" / "m"), "--preset", "debug", "--steps", "4", "--batch", "4"]
        assert main(["train", str(data.packed("best")), *model]) == 0
        (data.root / "models" / "m" / "latents").mkdir()  # this model works on pixels: others keep such
        (data.root / "models" / "m" / "latents" / "00000.safetensors").write_bytes(bytes(100))
        assert main(["publish", str(data), "--name", "all", "--to", str(data.root / "copy")]) == 0
    keys = [row["key"] for row in ledger(data) if row["status"] == "success"]
    with serving_data(Data(data.root)) as served, served.client() as client:
        served.folder.explorer.wait()
        client.post("/api/ratings", json={"name": "mine", "kind": "labels"}).raise_for_status()
        for key in keys[::3]:
            assert client.get(f"/api/thumbnails/{key}").status_code == 200
            body = {"rater": "anna", "key": key, "label": "yes"}
            client.post("/api/ratings/mine", json=body).raise_for_status()
    data.logs.mkdir(exist_ok=True)
    (data.logs / "slow.log").write_text("".join(f"12:00 slow: {row.url} (2 s)\n" for row in world.rows))
    return Data(data.root)


def ledger(data: Data) -> list[dict[str, Any]]:
    return [row for path in sorted(data.table(0).parent.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


# ---------------------------------------------------------------------------------------------------- every byte of it


def traces(data: Data, world: World, keys: set[str]) -> dict[str, list[bytes]]:
    """What could tell of these images, by its kind: all but what other images have as well."""
    found: dict[str, list[tuple[str, bytes]]] = {}

    def note(kind: str, key: str, value: bytes | None) -> None:
        if value:
            found.setdefault(kind, []).append((key, value))

    of_url = {row.url: row for row in world.rows}
    for row in ledger(data):
        key, source = row["key"], of_url[row["url"]]
        note("original", key, source.file[len(source.file) // 2 :][:48])
        for kind, word in zip(("url", "caption"), source.words, strict=True):
            note(kind, key, word.encode())
        for kind in ("sha256", "phash"):
            note(kind, key, (row[kind] or "").encode())
            note(f"{kind} in bytes", key, bytes.fromhex(row[kind] or ""))
    for tar in sorted(data.table(0).parent.glob("*.tar")):
        for key, _, stored in read_images(tar):
            note("stored", key, stored[len(stored) // 2 :][:48])
            note("sha256 of stored", key, hashlib.sha256(stored).hexdigest().encode())
    for table in sorted((data.root / "annotated" / "pdq").glob("*.parquet")):
        for row in pq.read_table(table).to_pylist():
            note("pdq", row["key"], (row["pdq_hash"] or "").encode())
    for table in sorted((data.root / "annotated" / "cap").glob("*.parquet")):
        for row in pq.read_table(table).to_pylist():
            note("answer", row["key"], (row["cap"] or "").encode()[-24:])
    for s in data.plan.shards:
        there = pq.read_table(data.metadata(s.shard))["key"].to_pylist()
        for kind, file in (("vector", data.image_vectors(s.shard)), ("vector of words", data.text_vectors(s.shard))):
            for key, vector in zip(there, np.load(file), strict=True):
                note(kind, key, vector.tobytes()[:32] if vector.any() else None)
    others = {kind: {value for key, value in pairs if key not in keys} for kind, pairs in found.items()}
    return {kind: [v for k, v in pairs if k in keys and v not in others[kind]] for kind, pairs in found.items()}


def found_in(data: Data, wanted: Mapping[str, list[bytes]]) -> dict[str, set[str]]:
    """Where which kind of these is: in the bytes of each file of the folder, and in the values of each column of each
    table and each JSON text; the deny-list aside, and a model, which is what it learnt."""
    kinds = {value: kind for kind, values in wanted.items() for value in values if len(value) >= 8}
    starts = np.unique(np.array([int.from_bytes(value[:8], "little") for value in kinds], np.uint64))
    by_start: dict[int, list[bytes]] = {}
    for value in kinds:
        by_start.setdefault(int.from_bytes(value[:8], "little"), []).append(value)
    hits: dict[str, set[str]] = {}
    for path in sorted(data.root.rglob("*")):
        name = path.relative_to(data.root).as_posix()
        if path.is_file() and path != data.deny_list and not (name.startswith("models/") and "latents" not in name):
            content = np.frombuffer(decoded(path) + bytes(8), np.uint8)
            windows = np.lib.stride_tricks.sliding_window_view(content, 8)
            for first in range(0, len(windows), 1 << 22):
                part = np.ascontiguousarray(windows[first : first + (1 << 22)]).view(np.uint64)[:, 0]
                places = np.minimum(np.searchsorted(starts, part), len(starts) - 1)
                for at in np.flatnonzero(starts[places] == part).tolist():
                    for value in by_start[int(part[at])]:
                        if content[first + at :][: len(value)].tobytes() == value:
                            hits.setdefault(name, set()).add(kinds[value])
    return hits


def decoded(path: Path) -> bytes:
    """The bytes of a file, and what they say where these are compressed or escaped."""
    content = path.read_bytes()
    if path.suffix == ".parquet":
        for column in pq.read_table(path).columns:
            for value in column.to_pylist():
                content += value if isinstance(value, bytes) else str(value).encode()
                content += b"\n"
    elif path.suffix in (".json", ".jsonl"):
        lines = [content] if path.suffix == ".json" else content.splitlines()
        content += json.dumps([json.loads(line) for line in lines], ensure_ascii=False).encode()
    return content


# -------------------------------------------------------------------------------------------------------- in every way


def near_copy(file: bytes, number: int) -> bytes:
    """The same image as others have it: at another quality, smaller, or larger."""
    with Image.open(io.BytesIO(file)) as whole:
        copy, out = whole.convert("RGB"), io.BytesIO()
    if number % 3:
        share = (0.75, 1.4)[number % 2]
        copy = copy.resize((round(copy.width * share), round(copy.height * share)), Image.Resampling.LANCZOS)
    copy.save(out, ("JPEG", "PNG", "WEBP")[number % 3], quality=60)
    return out.getvalue()


def words_of(way: str, data: Data, world: World, chosen: Sequence[Row], root: Path) -> list[str]:
    """The options that remove these, in a way."""
    of_url = {row["url"]: row for row in ledger(data)}
    if way == "denied":  # as the studio denies
        for row in chosen:
            add_entry(data, DenyEntry(row.url, "image", of_url[row.url]["key"]))
        return ["--denied"]
    if way == "like":
        files = [root / f"copy{i}" for i in range(len(chosen))]
        for i, (file, row) in enumerate(zip(files, chosen, strict=True)):
            file.write_bytes(near_copy(row.file, i))
        return ["--like", *map(str, files), "--yes"]
    if way == "domains":
        return ["--domains", address(0)]
    column = {"keys": "key", "urls": "url", "sha256": "sha256"}[way]
    listed = root / f"{way}.txt"
    listed.write_text("".join(f"{of_url[row.url][column]}\n" for row in chosen))
    return [f"--{way}", str(listed)]


def removed(data: Data) -> set[str]:
    return {row["key"] for row in ledger(data) if row["status"] == "removed"}


@pytest.mark.parametrize("world", [(EACH * 8, "jpg")], indirect=True)
def test_nothing_is_left_of_images_removed_in_every_way(world: World, tmp_path: Path, side: SideEnvironments) -> None:
    with CaptionServer(Behaviour()) as captions:
        data = make(world, tmp_path, captions)
    assert (data.root / "models" / "m" / "latents").is_dir() and [*data.answers("cap", 0).parent.glob("*.jsonl")]
    whole = Data(shutil.copytree(data.root, tmp_path / "whole"))
    key_of = {row["url"]: row["key"] for row in ledger(data)}
    plans = {
        way: world.rows[EACH * i : EACH * (i + 1)]
        for i, way in enumerate(("domains", "keys", "urls", "sha256", "denied"))
    }
    rest = [row for row in world.rows[EACH * 5 :] if pdq(decode(row.file))[1] >= MIN_QUALITY]
    plans["like"] = rest[:EACH]  # of a clear sky no hash says anything
    wanted = {key_of[row.url] for rows in plans.values() for row in rows}
    before = found_in(data, traces(data, world, wanted))
    seen = {top: set().union(*(kinds for name, kinds in before.items() if name.startswith(top))) for top in TOPS}
    assert all(seen[top] >= kinds for top, kinds in TOPS.items()), seen

    gone = set[str]()
    for way in WAYS:
        assert main(["remove", str(data), *words_of(way, data, world, plans[way], tmp_path)]) == 0
        now = removed(Data(data.root))
        assert {key_of[row.url] for row in plans[way]} <= now, way
        if way != "like":  # that may find neighbours of what it was shown
            same = {row.file for row in plans[way]}
            assert now - gone == {key_of[r.url] for r in world.rows if r.file in same} - gone, way
        gone = now
    assert len(wanted) == EACH * len(WAYS) <= len(gone) < len(world.rows) - EACH // 3
    assert main(["publish", str(data), "--name", "all", "--to", str(data.root / "copy")]) == 0
    told = traces(whole, world, gone)
    assert not (data.root / "models" / "m" / "latents").exists() and (data.root / "models" / "m" / "unet").is_dir()
    assert {kind: len(values) for kind, values in told.items() if not values} == {}
    assert found_in(data, told) == {}

    data = Data(data.root)
    for name in ("all", "best"):
        readers_agree(data, name, side, tmp_path)
    assert main(["verify", str(data)]) == 0
    asked = world.web.counts().requests
    fetch_shards(data, world.recipe, retry=True)
    add(data, world, world.write_list(tmp_path / "again.tsv", world.rows[: EACH * 2]))
    for record in (data.root / "fetched").glob("*.json"):
        record.unlink()
    fetch_shards(Data(data.root), world.recipe)  # all of it, once more
    assert removed(data) == gone and found_in(data, told) == {}
    paths = {"/" + row.url.split("/", 3)[3] for row in world.rows if key_of[row.url] in gone}
    asked_now = world.web.counts().requests - asked
    assert asked_now and not [path for _, path in asked_now if path in paths]

    add(
        data, world, world.write_list(tmp_path / "others.tsv", world.rows, spare="?another")
    )  # the same bytes elsewhere
    fetch_shards(Data(data.root), world.recipe)
    assert removed(data) > gone
    assert found_in(data, {kind: values for kind, values in told.items() if kind not in ("url", "caption")}) == {}


def add(data: Data, world: World, listed: Path) -> None:
    """Add the rows of a list that are new, and on no deny-list."""
    plan = load_plan(data)
    assert plan is not None
    with adding(str(listed), plan, world.recipe.source, None, Deny.load([data.deny_list]), data.root) as more:
        more.write()


def readers_agree(data: Data, name: str, side: SideEnvironments, scratch: Path) -> None:
    """webdataset, datasets, open_clip and train read packed shards, and all see the same."""
    import datasets
    import webdataset

    folder = data.packed(name)
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    keys = [row["key"] for row in rows]
    samples = [*webdataset.WebDataset(tars, shardshuffle=False).decode("pil")]
    assert [s["__key__"] for s in samples] == keys and [s["jpg"].width for s in samples] == [r["width"] for r in rows]
    loaded = datasets.load_dataset("webdataset", data_files={"train": tars}, split="train", streaming=True)
    assert [sample["__key__"] for sample in loaded] == keys
    seen = side("read_open_clip.py", f"{folder}/{{00000..{len(tars) - 1:05d}}}.tar", "webdataset==0.2.86")
    assert seen["size"] == [len(rows), len(tars)] and seen["valid"] == [row["caption"] or "" for row in rows]
    model = ["--out", str(scratch / f"after-{name}"), "--preset", "debug", "--steps", "2", "--batch", "4"]
    assert main(["train", str(folder), *model]) == 0


KILLED = """
import os, signal, sys
from aesthetic import files
left, sync = int(sys.argv[1]), files.sync
def count(path):
    global left
    left -= 1
    sync(path)
    if left == 0: os.kill(os.getpid(), signal.SIGKILL)
files.sync = count
from pipelines import cli
code = cli.main(sys.argv[2:])
print("flushed", int(sys.argv[1]) - left)
sys.exit(code)
"""
"""The command line, which kills itself once so many files are on the disk."""


@pytest.mark.parametrize("world", [(EACH * 2, "png")], indirect=True)
def test_killed_five_times_it_ends_the_same(world: World, tmp_path: Path) -> None:
    data = make(world, tmp_path)
    calm = Data(shutil.copytree(data.root, tmp_path / "calm"))
    key_of = {row["url"]: row["key"] for row in ledger(data)}
    told = traces(data, world, {key_of[row.url] for row in world.rows[:EACH]})
    assert found_in(data, told)

    def run(moment: int, *words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-c", KILLED, str(moment), *words]
        return subprocess.run(line, capture_output=True, text=True, timeout=200)

    done = run(1 << 30, "remove", str(calm), "--domains", address(0))
    assert done.returncode == 0, done.stderr
    flushed = int(done.stdout.split()[-1])
    words = ["remove", str(data), "--domains", address(0)]
    for _ in range(5):
        assert run(flushed // 6, *words).returncode == -signal.SIGKILL
        assert data.removal.exists() and found_in(data, told) != {}
        words = ["remove", str(data)]
    assert main(words) == 0 and not data.removal.exists()
    assert found_in(data, told) == {} and main(["verify", str(data)]) == 0
    for path in sorted(calm.root.rglob("*")):
        if path.is_file() and path.suffix in (".parquet", ".npy", ".tar", ".csv", ".txt") and path.name[0] != ".":
            assert (data.root / path.relative_to(calm.root)).read_bytes() == path.read_bytes(), path


TOPS: dict[str, set[str]] = {
    "plan": {"url", "caption"},
    "fetched": {"url", "caption", "sha256", "phash", "stored"},
    "embedded": {"vector", "vector of words"},
    "annotated/pdq": {"pdq"},
    "annotated/cap": {"answer", "sha256 of stored"},
    "shards/all": {"url", "caption", "stored", "answer"},
    "shards/best": {"url", "caption", "stored", "answer"},
    "copy": {"url", "caption", "stored"},
    "studio": {"caption"},
    "logs": {"url"},
}
"""What is there before, by where it is."""
