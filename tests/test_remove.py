"""`tastemaker remove`: nothing is left of what was removed, nothing brings it back, and all else is as it was."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from aesthetic.errors import UserError
from curate import verify
from curate.fetch.deny_file import DenyEntry, add_entry, read_entries
from curate.layout import Data
from curate.ledger.select import load_selection
from curate.shards.pack import pack
from curate.shards.tar import image_member, index_tar, read_range
from curate.store.objects import ObjectStore
from demo.web import Route
from pipelines import cli
from pipelines.checks import refuse_denied
from tests.stages import Served, fetch_shards, run_stages, serving

NAME = "bundled"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    """A whole data folder, with ratings, a log and a sheet beside it; its list is text, so the plan holds a copy."""
    root = tmp_path_factory.mktemp("removed")
    others = {"/busy.jpg": Route(status=503), "/no.jpg": Route(status=404)}
    with serving(40, others, 12) as served:
        data = Data(root / "data")
        run_stages(served.write_list(root / "list.tsv"), data, served.recipe)
        keys = [row["key"] for row in rows(data)]
        for path, text in (
            (data.ratings("mine"), "image,score,rater\n" + "".join(f"{key},3,me\n" for key in keys)),
            (data.logs / "fetch.log", "".join(f"12:00 slow: {row['url']} (2 s)\n" for row in rows(data))),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        data.sheet(NAME).parent.mkdir(parents=True, exist_ok=True)
        data.sheet(NAME).write_bytes(b"a sheet")
        yield served, root


@pytest.fixture
def data(made: tuple[Served, Path], tmp_path: Path) -> Data:
    shutil.copytree(made[1] / "data", tmp_path / "data")
    return Data(tmp_path / "data")


def rows(data: Data) -> list[dict[str, Any]]:
    return [row for s in data.plan.shards for row in pq.read_table(data.table(s.shard)).to_pylist()]


def images(tars: Iterator[Path]) -> dict[str, bytes]:
    """The images of tars, by their keys."""
    found = {}
    for tar in tars:
        with open(tar, "rb") as f:
            for key, members in index_tar(tar).items():
                member = image_member(members)
                assert member is not None
                found[key] = read_range(f, member[1])
    return found


def traces(data: Data, keys: set[str]) -> list[bytes]:
    """What could tell that these images were there: bytes, hashes, URLs, captions, vectors."""
    stored, found = images((data.root / "fetched").glob("*.tar")), []
    for row in rows(data):
        if row["key"] in keys:
            found += [row[n].encode() for n in ("url", "caption", "sha256", "phash") if row[n]]
            if (image := stored.get(row["key"])) is not None:
                found += [image, image[len(image) // 2 :][:64], hashlib.sha256(image).hexdigest().encode()]
    for s in data.plan.shards:
        there = pq.read_table(data.metadata(s.shard))["key"].to_pylist()
        for file in (data.image_vectors(s.shard), data.text_vectors(s.shard)):
            vectors = np.load(file)
            found += [v.tobytes() for k, v in zip(there, vectors, strict=True) if k in keys and v.any()]
    return found


def found_in(data: Data, wanted: list[bytes]) -> list[str]:
    """The files in which one of these is, decoded where they are tables; the deny-list aside."""
    hits = []
    for path in sorted(p for p in data.root.rglob("*") if p.is_file() and p != data.deny_list):
        content = path.read_bytes()
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            content += json.dumps(table.to_pylist(), default=str, ensure_ascii=False).encode()
        hits += [path.relative_to(data.root).as_posix() for w in wanted if w in content or w.hex().encode() in content]
    return hits


def run(*words: str) -> int:
    return cli.main(["remove", *words])


def test_nothing_is_left_and_nothing_brings_it_back(made: tuple[Served, Path], data: Data) -> None:
    served, _ = made
    before, stored = rows(data), images((data.root / "fetched").glob("*.tar"))
    packed = pq.read_table(sorted(data.packed(NAME).glob("*.parquet")))["key"].to_pylist()
    failed = next(row for row in before if row["reason"] == "http_5xx")
    by_key, by_url, by_hash = packed[:3], packed[3], packed[4]
    row_of = {row["key"]: row for row in before}
    gone = {*by_key, by_url, by_hash, failed["key"]}
    wanted = traces(data, gone)
    assert len(wanted) > 30 and {p.split("/")[0] for p in found_in(data, wanted)} >= {
        "plan", "fetched", "embedded", "shards", "logs"
    }  # fmt: skip

    words = ["--keys", *by_key, failed["key"], "--urls", row_of[by_url]["url"], "--sha256", row_of[by_hash]["sha256"]]
    assert run(str(data.root), *words, "--dry-run") == 0 and found_in(data, wanted) and not data.deny_list.exists()
    assert run(str(data.root), *words) == 0
    data = Data(data.root)
    assert found_in(data, wanted) == []
    assert not data.removal.parent.exists() and not data.sheet(NAME).exists()
    assert not gone & {line.split(",")[0] for line in data.ratings("mine").read_text().splitlines()}

    for old, new in zip(before, rows(data), strict=True):
        if new["key"] in gone:
            assert (new["status"], new["reason"]) == ("removed", "removed")
            assert new["error_message"].startswith("removed on 20")
            assert {n for n, v in new.items() if v is not None} == {"key", "status", "reason", "error_message"}
        else:
            assert old == new
    kept = {key: image for key, image in stored.items() if key not in gone}
    assert images((data.root / "fetched").glob("*.tar")) == kept
    assert {*verify.verify(data)} == {None}

    left = [key for key in packed if key not in gone]
    tars = sorted(data.packed(NAME).glob("*.tar"))
    assert (
        list(images(iter(tars)))
        == left
        == pq.read_table(sorted(data.packed(NAME).glob("*.parquet")))["key"].to_pylist()
    )
    selection, manifest = load_selection(data, NAME), data.record(data.manifest(NAME))
    assert selection.kept == manifest["count"] == len(left) and selection.not_fetched["removed"] == len(gone)
    assert sum(selection.funnel.values()) == selection.rows == len(before) and manifest["funnel"] == selection.funnel
    assert sum(json.loads((data.packed(NAME) / "sizes.json").read_text()).values()) == len(left)
    written = data.manifest(NAME).read_bytes()
    pack(data, NAME, served.recipe.pack)
    assert data.manifest(NAME).read_bytes() == written, "nothing to be packed anew"

    asked = served.requests()
    fetch_shards(data, served.recipe, retry=True)
    for record in (data.root / "fetched").glob("*.json"):
        record.unlink()
    fetch_shards(Data(data.root), served.recipe)  # all of it, once more
    assert found_in(data, wanted) == []
    assert {row["key"] for row in rows(data) if row["status"] == "removed"} == gone
    paths = {"/" + row_of[key]["url"].split("/", 3)[3] for key in gone}
    assert all(served.requests()[path] == asked[path] for path in paths)


def test_what_was_denied_while_looking_goes_and_its_line_is_hashed(made: tuple[Served, Path], data: Data) -> None:
    served, _ = made
    row = next(row for row in rows(data) if row["status"] == "success")
    wanted = traces(data, {row["key"]})
    add_entry(data, DenyEntry(row["url"], "image", row["key"]))
    with pytest.raises(UserError, match=r"tastemaker remove \S+ --denied"):
        refuse_denied(data, served.recipe)
    assert run(str(data.root), "--denied") == 0
    data = Data(data.root)
    refuse_denied(data, served.recipe)
    assert found_in(data, wanted) == [] and row["url"] not in data.deny_list.read_text()
    assert {len(entry.entry) for entry in read_entries(data)} == {64}


def test_bad_words(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        ([], "say what to remove"),
        (["--keys", "9" * 9], "has no row"),
        (["--urls", "example.com"], "an http or https URL is expected"),
        (["--domains", "http://x.y"], "a domain such as"),
        (["--sha256", "ab"], "64 hex digits"),
    ):
        assert run(str(data.root), *words) == 2 and said in capsys.readouterr().err
    assert not data.deny_list.exists()


@pytest.mark.long
def test_on_an_object_store_it_is_the_same(
    made: tuple[Served, Path], data: Data, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy on a real S3 server and one on a disk: all that lies there is the same afterwards, and as little."""
    monkeypatch.setenv("TASTEMAKER_CACHE", str(tmp_path / "cache"))
    store = ObjectStore(s3_url)
    for file in sorted(p for p in data.root.rglob("*") if p.is_file() and not p.name.startswith(".")):
        store.put_file(file, file.relative_to(data.root).as_posix())
    packed = pq.read_table(sorted(data.packed(NAME).glob("*.parquet")))["key"].to_pylist()
    keys, wanted = packed[::4], traces(data, {*packed[::4]})
    image = tmp_path / "their.jpg"
    image.write_bytes(images((data.root / "fetched").glob("*.tar"))[packed[1]])
    for words in (["--keys", *keys[:-1]], ["--keys", keys[-1], "--like", str(image), "--yes"]):
        assert run(str(data.root), *words) == 0 and run(s3_url, *words) == 0
    wanted += traces(Data(made[1] / "data"), {packed[1]})
    there = tmp_path / "there"
    for stored in store.list():
        (there / stored.name).parent.mkdir(parents=True, exist_ok=True)
        store.get_file(stored.name, there / stored.name)
    copy = Data(there)
    assert found_in(copy, wanted) == found_in(data, wanted) == []
    assert rows(copy) == rows(data) and sum(row["status"] == "removed" for row in rows(copy)) > len(keys)
    assert images((there / "fetched").glob("*.tar")) == images((data.root / "fetched").glob("*.tar"))
    assert images(copy.packed(NAME).glob("*.tar")) == images(data.packed(NAME).glob("*.tar"))
    assert {*verify.verify(copy)} == {None} and cli.main(["verify", s3_url]) == 0


@pytest.mark.long
def test_whoever_is_killed_goes_on(data: Data, tmp_path: Path) -> None:
    """kill -9 at ten moments; no other command takes hold of the folder meanwhile; the end is that of an undisturbed
    removal."""
    keys = pq.read_table(sorted(data.packed(NAME).glob("*.parquet")))["key"].to_pylist()[::3]
    wanted, calm = traces(data, {*keys}), Data(tmp_path / "calm")
    shutil.copytree(data.root, calm.root)
    script = (
        "import os, signal, sys\n"
        "from aesthetic import files\n"
        "left, sync = int(sys.argv[1]), files.sync\n"
        "def count(path):\n"
        "    global left\n"
        "    left -= 1\n"
        "    sync(path)\n"
        "    if left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.sync = count\n"
        "from pipelines import cli\n"
        "sys.exit(cli.main(sys.argv[2:]))\n"
    )
    assert run(str(calm.root), "--keys", *keys) == 0
    words, killed = ["remove", str(data.root), "--keys", *keys], 0
    for moment in (3, 4, 6, 7, 9, 11, 13, 16, 19, 23):
        done = subprocess.run([sys.executable, "-c", script, str(moment), *words], capture_output=True, timeout=100)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
        killed += done.returncode != 0
        if done.returncode == 0:
            break
        if data.removal.exists():
            words = ["remove", str(data.root)]
            with pytest.raises(UserError, match="was broken off"), Data(data.root).hold():
                pass
    assert killed >= 6
    assert cli.main(["remove", str(data.root), "--keys", *keys]) == 0
    assert found_in(Data(data.root), wanted) == []
    assert images((data.root / "fetched").glob("*.tar")) == images((calm.root / "fetched").glob("*.tar"))
    for path in sorted(calm.root.rglob("*")):
        if path.is_file() and path.suffix in (".parquet", ".npy", ".tar", ".csv", ".txt") and path.name[0] != ".":
            assert (data.root / path.relative_to(calm.root)).read_bytes() == path.read_bytes(), path
    assert Data(data.root).record(data.manifest(NAME))["funnel"] == calm.record(calm.manifest(NAME))["funnel"]
