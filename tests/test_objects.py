"""Object stores, against a real S3 server, and Azure's emulator where it is installed."""

from __future__ import annotations

import pickle
import secrets
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from curate.store.lease import Lease, check_token
from curate.store.objects import Changed, ObjectStore, StoredObject
from tests.stores import Server, azurite


@pytest.fixture(scope="session")
def azure() -> Iterator[dict[str, str]]:
    with azurite() as environment:
        yield environment


@pytest.fixture(params=["s3", pytest.param("az", marks=pytest.mark.long)])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """An empty folder of each kind of store that can be run here."""
    if request.param == "s3":
        return ObjectStore(request.getfixturevalue("s3_url"))
    for name, value in request.getfixturevalue("azure").items():
        monkeypatch.setenv(name, value)
    return ObjectStore(f"az://box/{secrets.token_hex(6)}")


def test_small_objects(store: ObjectStore) -> None:
    assert store.get("a") is None
    assert store.head("a") is None
    put = store.put(b"one", "a", metadata={"digest": "12 ab"})
    assert put == StoredObject("a", 3, put.etag)
    assert store.head("a") == put
    assert store.get("a") == (b"one", put, {"digest": "12 ab"})
    assert store.put(b"two", "a").etag != put.etag
    assert store.range("a", 1, 1) == b"w"
    assert store.range("a", 1, 10) == b"wo"
    with pytest.raises(FileNotFoundError, match="it is not there"):
        store.range("b", 0, 1)


def test_names_of_all_kinds(store: ObjectStore) -> None:
    names = ["plan/plan.json", "fetched/00000.tar", ".lease", "a b/é%2F#?.txt", "a+b/%20&=.x"]
    for name in names:
        store.put(name.encode(), name)
    assert {o.name: o.size for o in store.list()} == {n: len(n.encode()) for n in names}
    assert [o.name for o in store.list("fetched")] == ["fetched/00000.tar"]
    assert [o.name for o in store.list("fetch")] == []  # a folder, and no beginning of a name
    assert [found[:2] for found in store.get_many([*names, "missing"])] == [(n, n.encode()) for n in names]
    for name in ("", "a//b", "/a", "a/", "../a", "a/./b", "a\nb"):
        with pytest.raises(ValueError, match="cannot be the name of an object"):
            store.put(b"", name)
    store.delete([*names, "missing"])
    assert not list(store.list())


def test_folders_that_a_console_made_are_no_objects(store: ObjectStore, s3_server: Server) -> None:
    """Empty objects whose keys end with a slash; obstore writes none, so they are put by hand."""
    if not store.url.startswith("s3://"):
        pytest.skip("by hand means without a signature")
    store.put(b"", "a/empty")
    for key in ("", "a/", "new/"):
        place = f"http://127.0.0.1:{s3_server.port}/{store.url.removeprefix('s3://')}/{key}"
        urllib.request.urlopen(urllib.request.Request(place, method="PUT", data=b"")).close()
    assert [o.name for o in store.list()] == ["a/empty"]
    assert [o.name for o in store.list("a")] == ["a/empty"]
    assert not list(store.list("new"))
    assert store.names("") == ([], {"a"})
    assert [o.name for o in store.names("a")[0]] == ["a/empty"]


def test_folders_that_were_emptied(store: ObjectStore) -> None:
    """SeaweedFS lists them for a while."""
    store.put(b"1", "a/b/c")
    assert store.names("") == ([], {"a"})
    store.delete(["a/b/c"])
    assert store.names("") == ([], set())


def test_files(store: ObjectStore, tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(bytes(range(256)) * 100_000)  # 25 MB: in parts
    put = store.put_file(file, "x/large", {"sha": "1"})
    assert put == store.head("x/large")
    assert [o.size for o in store.list("x")] == [25_600_000]
    copy = tmp_path / "copies" / "large"
    assert store.get_file("x/large", copy) == put
    assert copy.read_bytes() == file.read_bytes()
    with pytest.raises(FileNotFoundError, match="missing: it is not there"):
        store.get_file("missing", tmp_path / "copies" / "missing")
    assert [p.name for p in copy.parent.iterdir()] == ["large"]


def test_many_files(store: ObjectStore, tmp_path: Path) -> None:
    names = [f"many/{i:04d}" for i in range(300)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.put(name.encode() * 100, name), names))
    stored = store.get_files([(name, tmp_path / name) for name in names])
    assert stored == sorted(store.list(), key=lambda o: o.name)
    assert all((tmp_path / name).read_bytes() == name.encode() * 100 for name in names)
    with pytest.raises(FileNotFoundError):
        store.get_files([("many/0000", tmp_path / "again"), ("missing", tmp_path / "missing")])
    store.delete(iter(names))
    assert not list(store.list())


def test_conditions(store: ObjectStore) -> None:
    first = store.put(b"1", "a", create=True)
    with pytest.raises(FileExistsError):
        store.put(b"1", "a", create=True)
    second = store.put(b"2", "a", replaces=first.etag)
    with pytest.raises(Changed):
        store.put(b"3", "a", replaces=first.etag)
    with pytest.raises(Changed):
        store.put(b"3", "missing", replaces=first.etag)
    assert store.head("a") == second


@pytest.mark.parametrize("rounds", [2, pytest.param(12, marks=pytest.mark.long)])
def test_one_of_many_wins(store: ObjectStore, rounds: int) -> None:
    """Sixteen at once create an object, then replace it: one succeeds, each time."""

    def attempt(data: bytes, etag: str | None) -> StoredObject | None:
        start.wait()
        try:
            return store.put(data, "a", create=etag is None, replaces=etag)
        except (FileExistsError, Changed):
            return None

    start, etag = threading.Barrier(16), None
    with ThreadPoolExecutor(16) as pool:
        for index in range(rounds):
            # other bytes each time: S3's etag is their digest
            texts = [f"{index} {thread}".encode() for thread in range(16)]
            won = [w for w in pool.map(attempt, texts, [etag] * 16) if w]
            assert len(won) == 1
            assert store.head("a") == won[0]
            etag = won[0].etag


def test_a_store_pickles_as_its_url(store: ObjectStore) -> None:
    store.put(b"1", "a")
    sent = pickle.dumps(store)
    assert b"secret" not in sent
    assert len(sent) < 200
    assert pickle.loads(sent).get("a") == store.get("a")


def test_a_probe(store: ObjectStore) -> None:
    store.probe()
    assert not list(store.list())


def test_a_lease(store: ObjectStore) -> None:
    with Lease(store) as lease:
        lease.check()
        check_token(store, lease.token)
    with Lease(store) as lease:
        assert lease.token.startswith("2-")
