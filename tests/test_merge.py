"""Data folders made one: what a folder of the union of their lists holds, and nothing is asked or computed for it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from aesthetic.errors import UserError
from curate import verify
from curate.fetch.deny import Deny
from curate.layout import Data
from curate.ledger.select import SelectConfig, select
from curate.shards.tar import read_images
from curate.sources.adding import adding
from curate.sources.planner import make_plan
from curate.store import mirror
from pipelines.checks import refuse_denied
from pipelines.commands.merge import MergeOptions, run
from pipelines.commands.remove import RemoveOptions
from pipelines.commands.remove import run as remove
from pipelines.commands.status import status
from pipelines.recipe import Recipe, load_recipe, store_recipe, stored_recipe
from tests.small_web import image
from tests.stages import Served, embed_shards, fetch_shards, serving

ROOT = Path(__file__).parents[1]
RULES = {"large": "original_width >= 150", "once": "best_of(dup, aesthetic)", "best": "top(aesthetic, 0.6)"}


@dataclass
class Halves:
    """Two folders of overlapping halves of a list, and one of all of it."""

    served: Served
    folders: list[Path]  # a, b, whole
    lists: list[Path]
    recipes: list[Recipe]  # of a and the whole, of b

    def urls(self, part: int) -> list[str]:
        """The URLs of a list, in its order."""
        return [line.split("\t")[0] for line in self.lists[part].read_text().splitlines()[1:]]


def write_list(path: Path, urls: list[str], all_urls: list[str], extra: str) -> Path:
    """A list whose captions and other columns depend on the URL alone."""
    lines = [f"url\tcaption\tn\t{extra}"]
    for url in urls:
        i = all_urls.index(url)
        lines.append(f"{url}\t{'' if i % 7 == 3 else f'picture {i}, “naïve”'}\t{i}\t{extra} {i}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Halves]:
    tmp = tmp_path_factory.mktemp("halves")
    name, body, _ = image(90)
    from demo.web import Route

    kind = f"image/{name.rpartition('.')[2]}"
    late = Route(body=body, content_type=kind, first=(Route(status=503),))
    others = {"/late.jpg": late, "/gone.jpg": Route(status=404), "/busy.jpg": Route(status=503)}
    with serving(18, others, shard_size=9) as served:
        settings = [*served.settings, "select.rules=", "columns.open_nsfw=", "columns.text=", "select.name=chosen"]
        recipe = load_recipe("bundled", settings)
        recipe = replace(recipe, select=SelectConfig(name="chosen", rules=RULES))
        other = replace(recipe, source=replace(recipe.source, shard_size=12))
        urls = served.urls
        special = [next(u for u in urls if u.endswith(p)) for p in others]
        plain = [u for u in urls if u not in special]
        lists = [
            write_list(tmp / "a.tsv", [*plain[:11], *special], urls, "licence"),
            write_list(tmp / "b.tsv", [*special, *plain[7:]], urls, "licence"),
            write_list(tmp / "whole.tsv", [*plain[:11], *special, *plain[11:]], urls, "licence"),
        ]
        folders = [tmp / "a", tmp / "b", tmp / "whole"]
        for listed, folder, own in zip(lists, folders, (recipe, other, recipe), strict=True):
            make_plan(str(listed), Data(folder), own.source)
            store_recipe(Data(folder), own)
            fetch_shards(Data(folder), own)
            embed_shards(Data(folder), own)
        yield Halves(served, folders, lists, [recipe, other])


def merge(out: Path | str, *folders: Path | str) -> dict[str, Any]:
    """What the command says for --json."""
    return run(MergeOptions(folders=tuple(map(str, folders)), out=str(out))).facts


def told(data: Data) -> dict[str, dict[str, Any]]:
    """All that the ledger says of each row, by URL, with the sha256 of the stored image and its vectors; no keys."""
    stored = {}
    for s in data.plan.shards:
        for key, extension, body in read_images(data.local(data.tar(s.shard))):
            stored[key] = {"stored": extension + hashlib.sha256(body).hexdigest()}
        vectors = np.load(data.local(data.image_vectors(s.shard))), np.load(data.local(data.text_vectors(s.shard)))
        metadata = pq.read_table(data.local(data.metadata(s.shard))).to_pylist()
        for row, of_image, of_text in zip(metadata, *vectors, strict=True):
            assert row["key"] == row["image_path"]
            stored[row["key"]] |= {"image": of_image.tolist(), "text": of_text.tolist()}
    columns = data.ledger.df()
    found = {}
    for row in columns.to_dict("records"):
        row |= stored.pop(row["key"], {})
        for name in ("key", "dup", "dup_of", "dup_size", "dup_nearest"):
            row.pop(name, None)
        found[row["url"]] = {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()}
    assert not stored and len(found) == len(columns)
    return found


def agree(here: dict[str, Any], there: dict[str, Any]) -> bool:
    """Whether two rows say the same; vectors and scores as far as they do not depend on what else was in a batch."""
    return here.keys() == there.keys() and all(
        np.allclose(a, b, atol=2e-3) if isinstance(a, float | list) else a == b
        for a, b in ((here[k], there[k]) for k in here)
    )


def verdicts(data: Data, config: SelectConfig) -> dict[str, str]:
    select(data, config)
    urls = dict(data.ledger.project("key, url").fetchall())
    table = pq.read_table(data.local(data.verdicts(config.name)))
    return {urls[row["key"]]: row["verdict"] for row in table.to_pylist()}


def check_whole(data: Data) -> None:
    """All files as their records say, and none beside."""
    assert not any(verify.verify(data)) and not verify.strays(data) and not verify.unfinished(data)
    assert not data.exists(data.merging)
    data.plan.check()


def test_two_halves_make_the_whole(halves: Halves, tmp_path: Path) -> None:
    a, b, whole = (Data(folder) for folder in halves.folders)
    asked, recipe = halves.served.requests(), halves.recipes[0]
    before = {path: path.stat().st_mtime_ns for folder in halves.folders[:2] for path in folder.rglob("*")}
    facts = merge(tmp_path / "m", a.root, b.root)
    data = Data(tmp_path / "m")
    check_whole(data)
    of_a, of_b, here = told(a), told(b), told(data)
    assert facts["rows"] == len(here) == 21 and facts["folders"][0]["same_url"] == 1  # /late.jpg, which b has
    assert facts["folders"][1]["same_url"] == 6, "4 images, and two that neither has"
    assert facts["columns"] == {"columns": ["aesthetic", "pdq", "quality"], "in part": [], "left out": ["dup"]}
    late = next(u for u in here if u.endswith("/late.jpg"))
    assert of_a[late]["status"] != "success" and of_b[late]["status"] == here[late]["status"] == "success"
    for url, row in here.items():
        assert row == (of_a[url] if url in of_a and url != late else of_b[url]), "to the last bit of a vector"

    stored = stored_recipe(data)
    assert stored is not None and stored.source.shard_size == 12 and {*stored.columns} == {*recipe.columns, "pdq"}
    fetch_shards(data, stored)
    assert embed_shards(data, stored) == 0, "no model sees an image; near-duplicates are found anew"
    there = told(whole)
    assert here.keys() == there.keys()
    now = told(data)
    assert all(agree(now[url], there[url]) for url in there)
    assert verdicts(data, recipe.select) == verdicts(whole, recipe.select)
    assert halves.served.requests() == asked
    assert before == {path: path.stat().st_mtime_ns for folder in halves.folders[:2] for path in folder.rglob("*")}
    check_whole(data)

    # the same command does nothing; the lists are known; what failed is fetched again, and nothing else
    assert merge(data.root, a.root, b.root)["state"]
    plan = data.plan
    assert [one["list"] for one in plan.lists] == [str(listed) for listed in halves.lists[:2]]
    assert make_plan(str(halves.lists[0]), Data(data.root), stored.source).digest == plan.digest
    for listed in halves.lists:
        with adding(str(listed), plan, stored.source, None, Deny(), tmp_path) as more:
            assert more.counts["added"] == 0
    fetch_shards(data, stored, retry=True)
    now = {path: n - asked.get(path, 0) for path, n in halves.served.requests().items()}
    assert {path: n for path, n in now.items() if n} == {"/busy.jpg": 1}
    assert embed_shards(data, stored) == 0
    said, following = status(data, lambda line: None)
    assert said["rows"] == 21 and [one["rows"] for one in said["lists"]] == [13, 8] and "retry" not in following


@pytest.mark.long
def test_what_is_linked_is_that_of_the_first_folder(halves: Halves, tmp_path: Path) -> None:
    """Numbers that need as many digits, and rows that all come in: the files are the same, and nothing changes them."""
    b = Data(shutil.copytree(halves.folders[1], tmp_path / "b"))
    a = fetched(halves, tmp_path / "a", halves.urls(0)[:4], halves.recipes[1])
    merge(tmp_path / "m", b.root, a.root)
    data = Data(tmp_path / "m")
    assert os.path.samefile(data.tar(0), b.tar(0)) and os.path.samefile(data.image_vectors(1), b.image_vectors(1))
    check = {path: path.read_bytes() for path in (data.tar(0), data.table(0), data.metadata(0), data.tar(2))}
    key = pq.read_table(b.table(0), filters=[("status", "=", "success")])["key"][0].as_py()
    remove(RemoveOptions(data=str(b.root), keys=(key,)))
    assert {path: path.read_bytes() for path in check} == check and not os.path.samefile(data.tar(0), b.tar(0))
    assert not any(verify.verify(data)) and not any(verify.verify(b))
    assert status(data, lambda line: None)[1] == f"tastemaker embed {data.root}"  # a has no vectors


def fetched(halves: Halves, root: Path, urls: list[str], recipe: Recipe, extra: str = "licence") -> Data:
    """A folder of a few rows, without vectors."""
    listed = write_list(root.with_suffix(".tsv"), urls, halves.served.urls, extra)
    data = Data(root)
    make_plan(str(listed), data, recipe.source)
    store_recipe(data, recipe)
    fetch_shards(data, recipe)
    return data


def test_what_one_denies_or_has_removed_does_not_come_from_another(halves: Halves, tmp_path: Path) -> None:
    a, b = (Data(shutil.copytree(halves.folders[i], tmp_path / "ab"[i])) for i in range(2))
    of_b = [u for u in halves.urls(1) if u not in halves.urls(0)]
    both = [u for u in halves.urls(1)[3:] if u in halves.urls(0)]
    a.deny_list.write_text(f"# mine\n{of_b[0]}  # a comment\n")
    remove(RemoveOptions(data=str(a.root), urls=(both[0],)))
    key = dict(b.ledger.project("url, key").fetchall())[of_b[3]]
    b.deny_list.write_text(f"# mine\n{of_b[3]}  # image {key}\n{of_b[0]}\nnobody.example\n")
    facts = merge(tmp_path / "m", a.root, b.root)
    assert [one["denied"] for one in facts["folders"]] == [0, 3]
    data = Data(tmp_path / "m")
    check_whole(data)
    rows = data.ledger.df().to_dict("records")
    urls = {row["url"] for row in rows}
    assert not urls & {of_b[0], of_b[3], both[0]} and {of_b[1], both[1]} <= urls
    gone = next(row for row in rows if row["status"] == "removed")
    lines = data.deny_list.read_text().splitlines()
    assert lines.count("# mine") == 1 and f"{of_b[0]}  # a comment" in lines and f"{of_b[3]}  # image" in lines
    assert "nobody.example" in lines and sum(f"# removed {gone['key']} " in line for line in lines) == 2
    asked, stored = halves.served.requests(), stored_recipe(data)
    assert stored is not None
    with adding(str(halves.lists[1]), data.plan, stored.source, None, Deny.load([data.deny_list]), tmp_path) as more:
        assert more.counts["added"] == 0
    refuse_denied(data, stored)
    fetch_shards(data, stored, retry=True)
    assert {p for p, n in halves.served.requests().items() if n > asked[p]} <= {"/busy.jpg"}


@pytest.mark.long
def test_refusals_name_what_differs_and_leave_nothing(halves: Halves, tmp_path: Path) -> None:
    a, recipe, urls = halves.folders[0], halves.recipes[0], halves.served.urls
    small = fetched(halves, tmp_path / "small", urls[:2], replace(recipe, images=replace(recipe.images, size=64)))
    early = replace(recipe, select=replace(recipe.select, early=("large",)))
    few = fetched(halves, tmp_path / "few", urls[:2], early)
    heeds = replace(recipe, fetch=replace(recipe.fetch, respect=("x-robots-tag",)))
    less = fetched(halves, tmp_path / "less", urls[:2], heeds)
    words = fetched(halves, tmp_path / "words", urls[:2], recipe, extra="m")
    listed = tmp_path / "n.tsv"
    listed.write_text(f"url\tn\n{urls[0]}\tmany\n")
    other = Data(tmp_path / "other")
    make_plan(str(listed), other, recipe.source)
    store_recipe(other, recipe)
    out = tmp_path / "m"
    for folders, match in (
        ((a,), "needs two data folders or more"),
        ((a, a), "is named twice"),
        ((a, small.root), r"made differently: images\.size: 128 and 64"),
        ((a, few.root), r"other early rules \(select\.early\)"),
        ((a, less.root), r"fetch\.respect: .*robots-txt.* is heeded in .*Name .*less first"),
        ((a, other.root), r"other: column 'n' is string here and int64 in .*/a\. "),
        ((a, tmp_path / "no"), "is not a data folder: it is not there"),
    ):
        with pytest.raises(UserError, match=match):
            merge(out, *folders)
        assert not out.exists()
    with pytest.raises(UserError, match="is a data folder already"):
        merge(words.root, less.root, a)
    with pytest.raises(UserError, match="lies in"):
        merge(a / "m", a, words.root)

    # another column, and rows that are not fetched yet; a note says what holds from now on
    merge(out, less.root, words.root, a)
    data = Data(out)
    assert data.plan.extra_columns.names == ["n", "licence", "m"]
    assert not any(verify.verify(data)) and not verify.strays(data) and verify.unfinished(data) == {"embedded": [0]}

    # a file that is damaged is not taken for what is left of it; put right, the same command goes on
    b = Data(shutil.copytree(halves.folders[1], tmp_path / "b"))
    whole = b.tar(1).read_bytes()
    b.tar(1).write_bytes(whole[:700] + b"x" + whole[701:])
    out = tmp_path / "again"
    with pytest.raises(UserError, match=r"b/fetched/00001\.tar: is damaged"):
        merge(out, a, b.root)
    half, left = Data(out), f"a merge was broken off: `tastemaker merge {a} {b.root} --out {out}` goes on"
    with pytest.raises(UserError, match=left), half.hold():
        pass
    with pytest.raises(UserError, match=r"a merge into .*again was broken off, and these folders are not .*/a, .*/b"):
        merge(out, a, words.root)
    assert not any(verify.verify(half)) and verify.unfinished(half)["fetched"]
    b.tar(1).write_bytes(whole)
    merge(out, a, b.root)
    check_whole(Data(out))
    assert told(Data(out)) == told(Data(merge_of(halves, tmp_path)))


def merge_of(halves: Halves, tmp_path: Path) -> Path:
    """The two halves, merged without a disturbance."""
    merge(tmp_path / "calm", *halves.folders[:2])
    return tmp_path / "calm"


KILLED = (
    "import os, signal, sys\n"
    "left = int(sys.argv[1])\n"
    "replace, link = os.replace, os.link\n"
    "def dying(work):\n"
    "    def do(*args, **kwargs):\n"
    "        global left\n"
    "        left -= 1\n"
    "        if left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
    "        return work(*args, **kwargs)\n"
    "    return do\n"
    "os.replace, os.link = dying(replace), dying(link)\n"
    "from pipelines.cli import main\n"
    "sys.exit(main(sys.argv[2:]))\n"
)


@pytest.mark.long
def test_whoever_is_killed_goes_on(halves: Halves, tmp_path: Path) -> None:
    """kill -9 at moments between files; the end is that of an undisturbed one, to the byte."""
    calm, out = merge_of(halves, tmp_path), tmp_path / "m"
    words = ["merge", *map(str, halves.folders[:2]), "--out", str(out)]
    killed = 0
    for left in (2, 5, 7, 4, 9, 3, 11, 8, 6, 10, 1000):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(left), *words], cwd=ROOT, capture_output=True, text=True
        )
        killed += done.returncode < 0
        data = Data(out)
        if done.returncode < 0 and data.plan_record.exists():
            assert not any(verify.verify(data))
            with pytest.raises(UserError, match="a merge was broken off"), data.hold():
                pass
    assert killed >= 8 and done.returncode == 0, done.stderr
    data = Data(out)
    check_whole(data)
    for path in sorted(calm.rglob("*")):
        name = path.relative_to(calm)
        if path.is_file() and path.suffix != ".json" and not path.name.startswith("."):
            assert (out / name).read_bytes() == path.read_bytes(), name
    assert told(data) == told(Data(calm))


@pytest.mark.long
def test_folders_on_an_object_store(
    halves: Halves, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASTEMAKER_CACHE", str(tmp_path / "cache"))
    mirror.open_mirror.cache_clear()
    there = Data.at(f"{s3_url}/b")
    for path in sorted(halves.folders[1].rglob("*")):
        to = there.root / path.relative_to(halves.folders[1])
        if path.is_file():
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)
            if path.name != ".lock":
                there.push(to)
    for record in [p for stage in ("fetched", "embedded", "annotated") for p in there.records(stage)]:
        there.recommit(record, there.record(record)["inputs"])  # as a run there would have written it
    calm = told(Data(merge_of(halves, tmp_path)))
    for out in (tmp_path / "here", f"{s3_url}/m"):
        merge(out, halves.folders[0], there.url or "")
        mirror.open_mirror.cache_clear()
        data = Data.at(out)
        assert not any(verify.verify(data)) and not verify.unfinished(data)
        assert told(data) == calm


def test_folders_of_images_and_answers_that_were_paid_for(tmp_path: Path) -> None:
    """Shards are to the byte what fetching gives under their new keys; answers about what is left out are, too."""
    recipe, folders = load_recipe("bundled", ["source.shard_size=8", "images.size=96", "columns.text="]), []
    for name, numbers in (("a", (0, 1, 2)), ("b", (5, 1, 3, 2, 4))):
        images, data = tmp_path / f"images-{name}", Data(tmp_path / name)
        images.mkdir()
        for number in numbers:
            (images / f"{number}.{name}.jpg").write_bytes(image(number)[1])
        (images / "broken.jpg").write_bytes(b"no image")
        make_plan(str(images), data, recipe.source)
        store_recipe(data, recipe)
        fetch_shards(data, recipe)
        folders.append(data)
    a, b = folders
    stored = {hashlib.sha256(body).hexdigest(): key for key, _, body in read_images(b.tar(0))}
    log = b.answers("caption", 0)
    log.parent.mkdir(parents=True)
    log.write_text("".join(f'{{"image": "{sha}", "request": "r"}}\n' for sha in stored))
    facts = merge(tmp_path / "m", a.root, b.root)
    assert facts["folders"][1] == {
        "data": str(b.root),
        "rows": 4,
        "images": 3,
        "same_url": 0,
        "same_bytes": 2,
        "denied": 0,
    }
    data = Data(tmp_path / "m")
    assert not any(verify.verify(data)) and [one["base"] for one in data.plan.lists] == [
        str(tmp_path / "images-a"),
        str(tmp_path / "images-b"),
    ]
    now = {hashlib.sha256(body).hexdigest() for _, _, body in read_images(data.tar(1))}
    lines = data.answers("caption", 1).read_text().splitlines()
    assert len(now) == len(lines) == 3 and {json.loads(line)["image"] for line in lines} == now < stored.keys()
    with adding(str(tmp_path / "images-b"), data.plan, recipe.source, None, Deny(), tmp_path) as more:
        assert more.counts["added"] == 0
    files = [path for s in (0, 1) for path in (data.tar(s), data.table(s))]
    before = [path.read_bytes() for path in files]
    data.invalidate(data.fetched_record(0), data.fetched_record(1))
    fetch_shards(data, recipe)
    assert [path.read_bytes() for path in files] == before
