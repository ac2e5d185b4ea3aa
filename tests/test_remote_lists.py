"""Lists on an object store."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aesthetic.errors import UserError
from curate.layout import Data
from curate.sources.plan import SourceConfig
from curate.sources.planner import inspect, make_plan
from curate.store.objects import ObjectStore
from tests.stores import Faults, Proxy, Server

ROWS = 20


@pytest.fixture
def store(s3_url: str) -> ObjectStore:
    return ObjectStore(s3_url)


def table(name: str) -> bytes:
    """A list as parquet; its URLs name it."""
    urls = [f"http://{name}.test/{i}.jpg" for i in range(ROWS)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"URL": urls, "TEXT": [f"{name} {i}" for i in range(ROWS)]}), sink)
    return sink.getvalue().to_pybytes()


def hosts(url: str, folder: Path, config: SourceConfig | None = None) -> list[str]:
    """The lists that a URL stands for, in their order: the hosts of the plan's URLs."""
    config = config or SourceConfig(shard_size=50)
    plan = make_plan(url, Data(folder), config)
    assert inspect(url, config, data=Data(folder)).total_rows == plan.total_rows
    found = [u for s in plan.shards for u in plan.read(s.shard).table["url"].to_pylist()]
    return list(dict.fromkeys(u.split("/")[2].removesuffix(".test") for u in found))


def test_a_file_a_folder_a_pattern(store: ObjectStore, tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "below/c.parquet", ".hidden.parquet", "_delta_log/x.parquet"):
        store.put(table(name.split(".")[-2].rpartition("/")[2] or "hidden"), f"lists/{name}")
    store.put(b"{}", "lists/dataset_info.json")
    store.put(b"no list", "lists/README.md")
    url = f"{store.url}/lists"
    cases = {
        f"{url}/b.parquet": ["b"],
        url: ["a", "b"],
        f"{url}/": ["a", "b"],
        f"{url}/*.parquet": ["a", "b"],
        f"{url}/[bx].parquet": ["b"],
        f"{url}/?.parquet": ["a", "b"],
        f"{url}/**/*.parquet": ["x", "a", "b", "c"],
        f"{url}/below": ["c"],
    }
    for index, (list_url, expected) in enumerate(cases.items()):
        assert hosts(list_url, tmp_path / str(index)) == expected, list_url


def test_what_is_no_list(store: ObjectStore, tmp_path: Path) -> None:
    store.put(b"", "mixed/a.csv")
    store.put(b"", "mixed/b.parquet")
    store.put(b"", "notes/README.md")
    store.put(b"", "photos/a.jpg")
    for path, told in (
        ("missing", "there is no such object or folder"),
        ("missing/*.csv", "there is no such object or folder"),
        ("mixed", "lists of several formats"),
        ("mixed/*.json", "no list is there"),
        ("notes", "no list is there, and no tars"),
        ("photos", r"Images are there \(.*/photos/a\.jpg\): pack them into tars"),
        ("notes/README.md", "is not a list that can be read"),
        ("../x", "cannot be on an object store"),
    ):
        with pytest.raises(UserError, match=told):
            make_plan(f"{store.url}/{path}", Data(tmp_path / "data"), SourceConfig())
    with pytest.raises(UserError, match="no bucket 'nobucket'"):
        make_plan("s3://nobucket/x/*.csv", Data(tmp_path / "data"), SourceConfig())


def test_folders_that_are_columns(store: ObjectStore, tmp_path: Path) -> None:
    """As Spark writes them: lang=en/part-0.parquet; the same as in a folder on a disk."""
    for lang in ("en", "de"):
        store.put(table(lang), f"spark/lang={lang}/part-0.parquet")
        (tmp_path / "spark" / f"lang={lang}").mkdir(parents=True)
        (tmp_path / "spark" / f"lang={lang}" / "part-0.parquet").write_bytes(table(lang))
    config = SourceConfig(where="lang = 'de'")
    for index, place in enumerate((store.url, str(tmp_path))):
        for end in ("spark", "spark/*/*.parquet"):
            folder = tmp_path / f"{index} {end.replace('/', ' ')}"
            assert hosts(f"{place}/{end}", folder, config) == ["de"]
            assert make_plan(f"{place}/{end}", Data(folder), config).extra_columns.names == ["lang"]


def test_a_store_that_fails_now_and_then(s3_server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    faults = Faults(only="^(GET|HEAD)", at={1: "lost", 2: "cut", 4: "503", 5: "cut", 7: "reset", 9: "lost"})
    with Proxy(s3_server.port, faults) as proxy:
        store = ObjectStore(s3_server.use(monkeypatch, proxy.port))
        for name in "abcdefgh":
            store.put(table(name), f"{name}.parquet")
        assert hosts(f"{store.url}/*.parquet", tmp_path / "data") == list("abcdefgh")
    assert len(faults.done) == 6
