"""Tars of samples on an object store as a LIST: the same rows, images and data folder as from a disk."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aesthetic.errors import UserError
from curate.layout import Data
from curate.sources.plan import Plan, SourceConfig
from curate.sources.planner import make_plan
from curate.store.objects import ObjectStore
from tests.real_data import fetch_all

IMAGES = 12  # of each tar


@pytest.fixture
def store(s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ObjectStore:
    monkeypatch.setenv("TASTEMAKER_CACHE", str(tmp_path / "cache"))
    return ObjectStore(s3_url)


def write_tars(folder: Path, count: int) -> Path:
    """Tars as img2dataset writes them: a table beside each, in which one more row failed."""
    folder.mkdir(parents=True)
    for shard in range(count):
        rows = []
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(IMAGES):
                key, out = f"{shard:05d}{i:04d}", io.BytesIO()
                Image.new("RGB", (40 + i, 30), (shard * 20, i * 20, 90)).save(out, "JPEG")
                rows.append({"key": key, "status": "success", "error_message": None, "caption": f"a {key}",
                             "url": f"http://x.test/{key}", "score": 40 + i})  # fmt: skip
                members = {"jpg": out.getvalue(), "txt": f"a {key}".encode(), "json": json.dumps(rows[-1]).encode()}
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        rows.append({"key": "9", "status": "failed_to_download", "error_message": "HTTP Error 404", "caption": None,
                     "url": "http://x.test/9", "score": None})  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return folder


def upload(store: ObjectStore, folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            store.put_file(file, f"tars/{file.relative_to(folder).as_posix()}")


def images_of(plan: Plan) -> list[tuple[str | None, bytes | None]]:
    rows = [row for s in plan.shards for row in plan.read(s.shard).rows()]
    return [(row.caption, row.place and row.place.read()) for row in rows]


def in_cache(folder: Path) -> int:
    return sum(p.stat().st_size for p in (folder / "cache" / "mirrors").rglob("*.tar"))


@pytest.mark.parametrize(
    "url", ["tars", *(pytest.param(u, marks=pytest.mark.long) for u in ("tars/*.tar", "tars/**/0*.tar"))]
)
@pytest.mark.parametrize("config", [SourceConfig(shard_size=50), SourceConfig(shard_size=5, where="score > 45")])
def test_the_same_plan_as_on_a_disk(store: ObjectStore, tmp_path: Path, url: str, config: SourceConfig) -> None:
    folder = write_tars(tmp_path / "tars", 5)
    upload(store, folder)
    here = make_plan(str(folder), Data(tmp_path / "here"), config)
    there = make_plan(f"{store.url}/{url}", Data(tmp_path / "there"), config)
    assert there.digest == here.digest
    assert [there.shard_digest(s.shard) for s in there.shards] == [here.shard_digest(s.shard) for s in here.shards]
    assert images_of(there) == images_of(here)
    assert in_cache(tmp_path) <= 3 * (folder / "00000.tar").stat().st_size  # of five
    for file in (tmp_path / "here/plan").glob("0*.parquet"):
        assert (tmp_path / "there/plan" / file.name).read_bytes() == file.read_bytes()
    assert not [p for p in (tmp_path / "there/plan").iterdir() if "list-" in p.name or p.name.startswith(".")]
    assert make_plan(f"{store.url}/{url}", Data(tmp_path / "there"), config).digest == here.digest
    make_plan(f"{store.url}/{url}", Data(tmp_path / "again"), config)
    assert (tmp_path / "again/plan/plan.json").read_bytes() == (tmp_path / "there/plan/plan.json").read_bytes()


def test_the_same_data_folder_as_from_a_disk(store: ObjectStore, tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "tars", 2)
    upload(store, folder)
    config = SourceConfig(shard_size=8)
    for name, url in (("here", str(folder)), ("there", f"{store.url}/tars")):
        make_plan(url, Data(tmp_path / name), config)
        fetch_all(Data(tmp_path / name))
    names = sorted(p.name for p in (tmp_path / "here/fetched").iterdir() if not p.name.endswith(".json"))
    assert len(names) >= 8
    for name in names:
        assert (tmp_path / "there/fetched" / name).read_bytes() == (tmp_path / "here/fetched" / name).read_bytes()


def test_it_grows(store: ObjectStore, tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "tars", 3)
    upload(store, folder)
    config = SourceConfig(shard_size=8)
    for name, url in (("here", str(folder)), ("there", f"{store.url}/tars")):
        make_plan(url, Data(tmp_path / name), config, limit=10)
        plan = make_plan(url, Data(tmp_path / name), config)
        assert plan.total_rows == 3 * (IMAGES + 1)
    assert sorted(images_of(plan), key=str) == sorted(images_of(Data(tmp_path / "here").plan), key=str)


def test_a_tar_that_changed(store: ObjectStore, tmp_path: Path) -> None:
    upload(store, write_tars(tmp_path / "tars", 1))
    plan = make_plan(f"{store.url}/tars", Data(tmp_path / "data"), SourceConfig())
    store.put(b"another", "tars/00000.tar")
    with pytest.raises(UserError, match=r"tars/00000\.tar: has changed since the plan was made"):
        images_of(plan)
    store.delete(["tars/00000.tar"])
    with pytest.raises(UserError, match=r"or is gone"):
        images_of(plan)
    with pytest.raises(UserError, match=r"00000\.tar"):
        store.put(b"no tar at all" * 100, "tars/00000.tar")
        make_plan(f"{store.url}/tars", Data(tmp_path / "other"), SourceConfig())
    assert not list((tmp_path / "other").rglob("*.tar"))
