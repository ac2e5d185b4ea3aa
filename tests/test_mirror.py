"""A data folder on an object store holds the bytes that it would hold on a disk, whatever happens on the way."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stages import Served, contents, run_stages, serving

from aesthetic.errors import UserError
from curate.layout import Data
from curate.ledger.view import query
from curate.shards.indexes import is_index
from curate.shards.pack import pack
from curate.sources.find import open_folder
from curate.store import cache, mirror
from curate.store.files import json_bytes
from curate.store.lease import LeaseLost
from curate.store.objects import ObjectStore
from curate.store.ownership import open_data
from curate.store.records import record_digest
from curate.verify import strays, verify
from pipelines.cli import main
from tests.stores import Faults, Proxy, Server

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["stages", "curate.store.mirror", "pyarrow.parquet", "onnxruntime"])


def forget() -> None:
    """Be as a process that has just been started, on a machine that has seen nothing."""
    shutil.rmtree(cache.cache_folder())
    cache._own_folder.cache_clear()
    mirror.open_mirror.cache_clear()


@pytest.fixture
def s3(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty folder, and a cache of its own."""
    monkeypatch.setenv("TASTEMAKER_CACHE", str(tmp_path / "cache"))
    forget()
    yield s3_url
    forget()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(22, {}, 8) as served:
        yield served


def downloaded(url: str, folder: Path) -> Path:
    """All that lies there, as files."""
    store = ObjectStore(url)
    store.get_files([(stored.name, folder / stored.name) for stored in store.list() if stored.name != ".lease"])
    return folder


def run_there(listed: Path, url: str, served: Served) -> None:
    """The stages on a data folder there, as the only run."""
    data = Data.at(url)
    with data.hold():
        run_stages(listed, data, served.recipe)


@pytest.mark.long
def test_the_same_bytes_as_on_a_disk(served: Served, s3: str, tmp_path: Path) -> None:
    listed = served.write_list(tmp_path / "list.tsv")
    here = Data(tmp_path / "data")
    run_stages(listed, here, served.recipe)
    run_there(listed, s3, served)
    forget()
    there = downloaded(s3, tmp_path / "there")
    assert contents(there) == contents(here.root)

    asked = served.requests()
    before = {stored.name: stored.etag for stored in ObjectStore(s3).list() if stored.name != ".lease"}
    run_there(listed, s3, served)  # again does nothing
    assert served.requests() == asked
    assert {stored.name: stored.etag for stored in ObjectStore(s3).list() if stored.name != ".lease"} == before

    forget()
    data = open_data(s3)  # as `query`, `status` and `verify` do, which hold nothing
    sql = "SELECT key, sha256, aesthetic FROM ledger ORDER BY key"
    assert query(data, sql).equals(query(here, sql))
    assert [damage for damage in verify(data) if damage] == strays(data) == []


@pytest.mark.long
def test_damage_is_seen_and_made_again(served: Served, s3: str, tmp_path: Path) -> None:
    listed = served.write_list(tmp_path / "list.tsv")
    run_there(listed, s3, served)
    store, whole = ObjectStore(s3), downloaded(s3, tmp_path / "whole")
    tar = store.get("fetched/00001.tar")
    assert tar is not None
    store.put(bytes([tar[0][0] ^ 1, *tar[0][1:]]), "fetched/00001.tar")  # of the same size: a late writer's
    store.delete(["annotated/aesthetic/00000.parquet"])
    forget()
    data = open_data(s3)
    damaged = sorted(data.shown(damage.path) for damage in verify(data) if damage)
    assert damaged == [f"{s3}/annotated/aesthetic/00000.parquet", f"{s3}/fetched/00001.tar"]
    run_there(listed, s3, served)
    forget()
    assert contents(downloaded(s3, tmp_path / "again")) == contents(whole)


@pytest.mark.long
def test_what_others_put_beside_packed_shards_stays(served: Served, s3: str, tmp_path: Path) -> None:
    listed = served.write_list(tmp_path / "list.tsv")
    run_there(listed, s3, served)
    name = served.recipe.select.name
    ObjectStore(s3).put(b"theirs", f"shards/{name}/notes.txt")
    ObjectStore(s3).delete([f"shards/{name}/manifest.json"])
    with pytest.raises(UserError, match=rf"{s3}/shards/{name} holds notes\.txt, which was not packed"):
        run_there(listed, s3, served)
    ObjectStore(s3).delete([f"shards/{name}/notes.txt"])
    ObjectStore(s3).put(b"of more shards than there are now", f"shards/{name}/00099.tar")
    run_there(listed, s3, served)
    assert ObjectStore(s3).head(f"shards/{name}/00099.tar") is None


@pytest.mark.long
def test_packed_shards_there_are_verified_exported_and_indexed(served: Served, s3: str, tmp_path: Path) -> None:
    listed = served.write_list(tmp_path / "list.tsv")
    run_there(listed, s3, served)
    forget()
    whole, folder = downloaded(s3, tmp_path / "whole"), f"shards/{served.recipe.select.name}"
    assert main(["verify", f"{s3}/{folder}"]) == 0
    assert main(["export", f"{s3}/{folder}", "--as", "folder", "--out", str(tmp_path / "out")]) == 0
    assert len(open_folder(tmp_path / "out")) == len(open_folder(whole / folder))

    manifest = json.loads((whole / folder / "manifest.json").read_text())  # as it was before there were indexes
    indexes = [name for name in manifest["outputs"] if is_index(name)]
    manifest["outputs"] = {name: fact for name, fact in manifest["outputs"].items() if not is_index(name)}
    ObjectStore(s3).delete(indexes)
    value = {**manifest, "self": record_digest(manifest)}
    ObjectStore(s3).put(json_bytes(value), f"{folder}/manifest.json")
    forget()
    run_there(listed, s3, served)
    forget()
    assert contents(downloaded(s3, tmp_path / "again")) == contents(whole)

    tar = ObjectStore(s3).get(f"{folder}/00000.tar")
    assert tar is not None
    ObjectStore(s3).put(tar[0][:600] + bytes([tar[0][600] ^ 1]) + tar[0][601:], f"{folder}/00000.tar")
    forget()
    assert main(["verify", f"{s3}/{folder}"]) == 1


@pytest.mark.long
def test_a_cache_that_holds_nothing(served: Served, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASTEMAKER_CACHE_SIZE", "1k")
    listed = served.write_list(tmp_path / "list.tsv")
    run_there(listed, s3, served)
    kept = sum(path.stat().st_size for path in (cache.cache_folder() / "objects").iterdir())
    assert kept < 100_000
    monkeypatch.setenv("TASTEMAKER_CACHE_SIZE", "many")
    forget()
    with pytest.raises(UserError, match="TASTEMAKER_CACHE_SIZE: 'many' is no size"):
        open_data(s3)


def test_what_is_not_there(s3: str) -> None:
    with pytest.raises(UserError, match="is no data folder"):
        open_data(s3)
    with pytest.raises(UserError, match="one on an object store"):
        Data.at("ftp://host/data")
    ObjectStore(s3).put(b"theirs", "notes.txt")
    from curate.store.ownership import check_free

    with pytest.raises(UserError, match=r"holds something else \(notes\.txt\)"):
        check_free(Data.at(s3).store, "data")


@pytest.mark.long
def test_who_lost_the_lease_commits_nothing(served: Served, s3: str, tmp_path: Path) -> None:
    listed = served.write_list(tmp_path / "list.tsv")
    run_there(listed, s3, served)
    data = Data.at(s3)
    with pytest.raises(LeaseLost), data.hold():
        name = served.recipe.select.name
        lease = ObjectStore(s3).get(".lease")
        assert lease is not None
        ObjectStore(s3).put(lease[0].replace(b'"epoch"', b'"epoch": 99, "was"'), ".lease")
        data.store._lease = None  # type: ignore[attr-defined]  # as a worker of its, which has the token alone
        data.invalidate(data.manifest(name))
        pack(data, name, served.recipe.pack)


@pytest.mark.long
def test_a_listing_that_lags(served: Served, s3: str, tmp_path: Path) -> None:
    """What was written lately is not listed: it is made once more, and nothing breaks."""
    listed = served.write_list(tmp_path / "list.tsv")
    run_there(listed, s3, served)
    forget()
    before = contents(downloaded(s3, tmp_path / "before"))
    data = Data.at(s3)
    with data.hold():
        late = [name for name in data.store._listing if name.startswith(("selected/", "annotated/dup/", "embedded/"))]  # type: ignore[attr-defined]
        assert len(late) > 10
        data.store._listing.remove(late)  # type: ignore[attr-defined]
        run_stages(listed, data, served.recipe)
    forget()
    assert contents(downloaded(s3, tmp_path / "after")) == before


# --------------------------------------------------------------------------------------------------------------- faults


def child(listed: Path, url: str, served: Any, cache_folder: str, port: int) -> None:
    os.environ |= {"TASTEMAKER_CACHE": cache_folder, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    run_there(listed, url, served)


class Killing(Faults):
    """Kills a process as its n-th request arrives, before or after it is done."""

    process: Any = None
    after: bool = False

    def next(self, request: str) -> str | None:
        self.requests.append(request)
        if len(self.requests) == self.n and self.process is not None:
            os.kill(self.process.pid, signal.SIGKILL)
            return "lost" if self.after else "reset"
        return None

    n = 0


class Killer:
    """Starts runs in processes of their own, whose requests go through a proxy that may kill them."""

    def __init__(self, proxy: Proxy, faults: Killing, listed: Path, served: Served, folder: Path) -> None:
        self._proxy, self._faults, self._listed, self._folder = proxy, faults, listed, folder
        self._served: Any = Served(None, served.urls, served.recipe, served.settings)  # type: ignore[arg-type]

    def run(self, url: str, n: int = 0, after: bool = False) -> bool:
        """Whether a run came to its end. n: the request at which it is killed; after: once that is done."""
        self._faults.n, self._faults.after = n, after
        self._faults.requests.clear()
        arguments = self._listed, url, self._served, str(self._folder), self._proxy.port
        self._faults.process = process = forkserver.Process(target=child, args=arguments)
        process.start()
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL), f"killed at {n}: {self._faults.requests[-3:]}"
        return process.exitcode == 0


@pytest.mark.long
def test_killed_at_every_request(served: Served, s3: str, s3_server: Server, tmp_path: Path) -> None:
    """A run that is killed as its n-th request arrives, the next at its (n + 1)-th: nothing is ever half, and in the
    end there is what there is after a run that nobody stops."""
    listed = served.write_list(tmp_path / "list.tsv")
    here = Data(tmp_path / "data")
    run_stages(listed, here, served.recipe)
    faults, n = Killing(), 1
    with Proxy(s3_server.port, faults) as proxy:
        killer = Killer(proxy, faults, listed, served, tmp_path / "child")
        while not killer.run(s3, n, after=bool(n % 2)):
            n += 1
            if n % 10 == 0:
                whole(s3)
    forget()
    print(f"\nkilled {n - 1} times")
    assert contents(downloaded(s3, tmp_path / "there")) == contents(here.root)


@pytest.mark.long
def test_killed_at_requests_of_a_whole_run(served: Served, s3: str, s3_server: Server, tmp_path: Path) -> None:
    """As above, each time from the beginning, at every sixth request; the run after it comes to its end."""
    listed = served.write_list(tmp_path / "list.tsv")
    here = Data(tmp_path / "data")
    run_stages(listed, here, served.recipe)
    wanted, faults = contents(here.root), Killing()
    with Proxy(s3_server.port, faults) as proxy:
        killer = Killer(proxy, faults, listed, served, tmp_path / "child")
        assert killer.run(f"{s3}/whole")
        count = len(faults.requests)
        for n in range(1, count, 6):
            if killer.run(f"{s3}/{n}", n, after=bool(n % 4 == 1)):
                continue  # some requests more or fewer are asked for in another run
            whole(f"{s3}/{n}")
            assert killer.run(f"{s3}/{n}")
            forget()
            assert contents(downloaded(f"{s3}/{n}", tmp_path / str(n))) == wanted, n
    print(f"\n{count} requests")


def whole(url: str) -> None:
    """What a record names is there, byte for byte."""
    forget()
    data = Data.at(url)
    data.store.refresh()
    damaged = [damage for damage in verify(data) if damage and damage.path != data.plan_record]
    assert damaged == []


@pytest.mark.long
def test_faults_of_a_twentieth_of_all_requests(served: Served, s3: str, s3_server: Server, tmp_path: Path) -> None:
    listed = served.write_list(tmp_path / "list.tsv")
    took = {}
    for share in (0.0, 0.05):
        url = f"{s3}/{share}"
        faults = Faults(share=share, kinds=("503", "429", "reset", "cut", "lost", "slow"), seed=3)
        with Proxy(s3_server.port, faults) as proxy, pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
            forget()
            began = time.monotonic()
            run_there(listed, url, served)
            took[share] = time.monotonic() - began
        print(f"\n{share:.0%} faults: {len(faults.requests)} requests, {len(faults.done)} faults, {took[share]:.1f} s")
        assert not share or len(faults.done) > 5
    forget()
    one, other = (contents(downloaded(f"{s3}/{share}", tmp_path / str(share))) for share in took)
    assert one == other
