"""Object stores that fail: a proxy breaks requests to a real one; and what is wrong before the first request."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aesthetic.errors import UserError
from curate.store.objects import Changed, ObjectStore, StoreUnavailable
from tests.stores import Faults, Proxy, Server

BODY = bytes(range(256)) * 8192  # 2 MB


@contextlib.contextmanager
def faulty(
    server: Server, patch: pytest.MonkeyPatch, faults: Faults, patience: float = 60
) -> Iterator[tuple[ObjectStore, ObjectStore]]:
    """(a store behind a proxy that makes faults, the same store without)."""
    url = server.use(patch)
    direct = ObjectStore(url)
    assert direct.head("opened, with this address") is None
    with Proxy(server.port, faults) as proxy:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield ObjectStore(url, patience), direct


_LONG = [pytest.param(fault, marks=pytest.mark.long) for fault in ("503", "429", "500", "reset", "lost", "slow")]


@pytest.mark.parametrize("fault", ["cut", *_LONG])
def test_each_fault_at_each_operation(
    s3_server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str
) -> None:
    """The first two requests of each operation are broken; what it does and says is what it would without."""
    faults = Faults()
    with faulty(s3_server, monkeypatch, faults) as (store, direct):

        def again() -> None:
            faults.requests.clear()
            faults.at = {1: fault, 2: fault}

        again()
        put = store.put(BODY, "a", metadata={"kind": "x"})
        assert put == direct.head("a")
        again()
        assert store.head("a") == put
        again()
        assert store.get("a") == (BODY, put, {"kind": "x"})
        again()
        assert store.get_file("a", tmp_path / "a") == put
        assert (tmp_path / "a").read_bytes() == BODY
        again()
        assert store.range("a", 7, 1000) == BODY[7:1007]
        again()
        file = tmp_path / "large"
        file.write_bytes(BODY * 9)
        stored = store.put_file(file, "large")
        assert stored == direct.head("large")
        assert direct.get_file("large", tmp_path / "back") == stored
        assert (tmp_path / "back").read_bytes() == BODY * 9
        again()
        made = store.put(b"1", "once", create=True)
        assert made == direct.head("once")
        again()
        with pytest.raises(FileExistsError):
            store.put(b"1", "once", create=True)
        again()
        swapped = store.put(b"2", "once", replaces=made.etag)
        assert swapped == direct.head("once")
        again()
        with pytest.raises(Changed):
            store.put(b"2", "once", replaces=made.etag)
        again()
        assert sorted(o.name for o in store.list()) == ["a", "large", "once"]
        again()
        store.delete(["a", "once", "missing"])
        assert [o.name for o in direct.list()] == ["large"]
        assert len(faults.done) >= 14
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.long
def test_a_long_listing_that_breaks_off(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each object once, although pages come cut, and the client says of a listing that failed that it is at its end."""
    faults = Faults(only="^GET", at={2: "cut", 4: "cut", 5: "cut"})
    names = [f"{i % 7}/{i:05d}" for i in range(3500)]
    with faulty(s3_server, monkeypatch, faults) as (store, direct):
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(lambda name: direct.put(b"1", name), names))
        assert [o.name for o in store.list()] == sorted(names)
    assert len(faults.done) == 3


def test_a_conflict_is_tried_again(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 answers 409 where two write under one condition at the same time: that is no "there is one already"."""
    with faulty(s3_server, monkeypatch, Faults(only="^PUT", at={1: "409", 3: "409"})) as (store, direct):
        made = store.put(b"1", "a", create=True)
        assert store.put(b"2", "a", replaces=made.etag) == direct.head("a")


@pytest.mark.long
def test_five_percent_of_all_requests_fail(s3_server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    faults = Faults(share=0.05, seed=2)
    names = [f"n/{i:03d}" for i in range(200)]
    with faulty(s3_server, monkeypatch, faults) as (store, direct):
        for name in names:
            assert store.put(name.encode(), name, create=True).size == 5
        store.get_files([(name, tmp_path / name) for name in names])
        assert [(n, d) for n, d, *_ in store.get_many(names)] == [(n, n.encode()) for n in names]
        store.delete(names)
        assert not list(direct.list())
    assert all((tmp_path / name).read_text() == name for name in names)
    assert len(faults.done) > 15
    assert {d.split()[1] for d in faults.done} == {"503", "429", "reset", "cut", "lost", "slow"}


@pytest.mark.long
def test_a_store_that_stays_away(s3_server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    always = Faults(share=1, kinds=("503",))
    with faulty(s3_server, monkeypatch, always, patience=1) as (store, direct):
        direct.put(BODY, "a")
        start = time.monotonic()
        with pytest.raises(StoreUnavailable, match=rf"^{store.url}: the store failed while reading a, .*503") as raised:
            store.get_file("a", tmp_path / "a")
        assert "the same command goes on where it stopped" in str(raised.value)
        assert time.monotonic() - start < 5
        with pytest.raises(StoreUnavailable, match="while writing b"):
            store.put(b"", "b", create=True)
        with pytest.raises(StoreUnavailable, match="while listing it"):
            list(store.list())
        with pytest.raises(UserError, match="503"):
            store.probe()
        assert direct.head("b") is None
        always.kinds = ("cut",)
        with pytest.raises(StoreUnavailable, match="reading a"):
            store.get_file("a", tmp_path / "a")
        always.down = True
        with pytest.raises(StoreUnavailable, match="while reading a"):
            store.get("a")
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_store_that_hangs(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty(s3_server, monkeypatch, Faults(at={1: "hang"}), patience=4) as (store, direct):
        direct.put(BODY, "a")
        assert store.head("a") == direct.head("a")  # asked again after 2 s


def test_ctrl_c_ends_the_wait(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; from curate.store.objects import ObjectStore; ObjectStore(sys.argv[1]).get('a')"
    faults = Faults(share=1, kinds=("hang",))
    with faulty(s3_server, monkeypatch, faults) as (store, _):
        process = subprocess.Popen([sys.executable, "-c", code, store.url], stderr=subprocess.PIPE, text=True)
        while not faults.requests:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=10)
    assert "KeyboardInterrupt" in said


def test_a_killed_writer_leaves_nothing(s3_server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Killed at each of its requests in turn: the object is the old one or the new one, whole."""
    file = tmp_path / "large"
    file.write_bytes(BODY * 9)
    code = "import sys; from pathlib import Path; from curate.store.objects import ObjectStore\n"
    code += "ObjectStore(sys.argv[1]).put_file(Path(sys.argv[2]), 'a')"
    with faulty(s3_server, monkeypatch, Faults()) as (store, direct):
        old = direct.put(b"old", "a")
        for count in (1, 2, 4, 5):  # create the upload, parts, complete
            faults = Faults(at={count: "hang"})
            with Proxy(s3_server.port, faults) as proxy:
                environment = {**os.environ, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
                process = subprocess.Popen([sys.executable, "-c", code, store.url, str(file)], env=environment)
                while not faults.done and process.poll() is None:
                    time.sleep(0.02)
                process.kill()
                process.wait()
            assert faults.done
            assert list(direct.list()) == [old]
        assert store.put_file(file, "a") == direct.head("a") != old


def test_a_disk_that_takes_no_more(s3_url: str, tmp_path: Path) -> None:
    store = ObjectStore(s3_url)
    store.put(BODY, "a")
    with limited_files(1 << 20), pytest.raises(OSError, match="File too large"):
        store.get_file("a", tmp_path / "a")
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def limited_files(size: int) -> Iterator[None]:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_forked_process_is_told(s3_url: str) -> None:
    """It would wait for ever otherwise."""
    store = ObjectStore(s3_url)
    store.put(b"1", "a")
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe()

    def child() -> None:
        try:
            store.get("a")
        except RuntimeError as e:
            writer.send(str(e))

    process = context.Process(target=child)
    process.start()
    assert reader.poll(10)
    assert "spawn or forkserver" in reader.recv()
    process.join(10)


# ------------------------------------------------------------------------------------------- wrong from the start


def _long(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, r"these credentials are refused \(InvalidAccessKeyId\): set AWS_ACCESS_KEY"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, r"these credentials are refused \(SignatureDoesNotMatch\)"),
        ({"AWS_ACCESS_KEY_ID": "reader"}, r"writing \.probe-.* is not allowed .*They need s3:ListBucket, .*PutObject"),
        _long({"AWS_ENDPOINT_URL": "http://no-such-host.invalid:1"}, r"cannot be reached.*no-such-host\.invalid:1"),
        _long({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, r"cannot be reached while .*nothing listens there"),
        ({"AWS_ENDPOINT_URL": "127.0.0.1:8333"}, r"is no address: give http://host:port"),
        ({"AWS_SECRET_ACCESS_KEY": None}, r"AWS_SECRET_ACCESS_KEY is not: set both"),
        ({"AWS_PROFILE": "none"}, r"know no profile 'none'"),
    ],
)
def test_a_probe_tells_what_is_wrong(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], told: str | None
) -> None:
    for name, value in changes.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    store = ObjectStore(s3_url)
    if told is None:
        store.probe()
        assert not list(store.list())
        return
    start = time.monotonic()
    with pytest.raises(UserError, match=told) as raised:
        store.probe()
    assert time.monotonic() - start < 15
    assert "secret" not in str(raised.value).lower().replace("aws_secret_access_key", "")
    assert len(str(raised.value)) < 800


def test_a_bucket_that_is_not_there(s3_url: str) -> None:
    with pytest.raises(UserError, match=r"^s3://nobucket/x: there is no bucket 'nobucket'\. Create it"):
        ObjectStore("s3://nobucket/x").probe()


@pytest.mark.long
def test_no_credentials_at_all(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1/169.254.169.254")
    with pytest.raises(UserError, match="no credentials for it are here: set AWS_ACCESS_KEY_ID and"):
        ObjectStore(s3_url).probe()


def test_a_store_without_conditions(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes no notice of If-None-Match and If-Match, as some do, is refused."""
    with faulty(s3_server, monkeypatch, Faults(blind=True)) as (store, direct):
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
        with pytest.raises(UserError, match=r"ignores conditions of writes .*Take a store that honours them"):
            store.probe()
        assert not list(direct.list())


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://", "names no bucket"),
        ("s3:///folder", "names no bucket"),
        ("ftp://bucket/x", "not the URL of an object store"),
        ("s3://key:hidden@bucket/x", "credentials belong into the environment"),
        ("s3://bu cket/x", "no bucket has such a name"),
        ("s3://bucket/a//b", "cannot be on an object store"),
        ("s3://bucket/../b", "cannot be on an object store"),
        ("s3://bucket/x?versionId=hidden", "must not have"),
    ],
)
def test_urls_that_are_none(url: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as raised:
        ObjectStore(url)
    assert "hidden" not in str(raised.value)


def test_one_place_has_one_url() -> None:
    same = ["s3://bucket/a/b", "s3://bucket/a/b/", "s3a://bucket/a/b", "S3://bucket/a/b//"]
    assert {ObjectStore(url).url for url in same} == {"s3://bucket/a/b"}
    assert ObjectStore("gcs://bucket").url == "gs://bucket"
    assert ObjectStore("abfss://box@account.dfs.core.windows.net/x").url == "abfss://box@account.dfs.core.windows.net/x"
    assert ObjectStore("azure://box/x").url == "az://box/x"


def test_profiles_of_aws(s3_server: Server, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keys, region and address of a profile, from both files, as AWS's tools write them."""
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = nobody\naws_secret_access_key = x\n"
        "[work]\naws_access_key_id = key\naws_secret_access_key = secret\n"
    )
    (tmp_path / "config").write_text(
        f"[profile work]\nregion = us-east-1\nservices = local\n[services local]\ns3 =\n"
        f"  endpoint_url = http://127.0.0.1:{s3_server.port}\n"
        "[profile sso]\nsso_session = us\nregion = us-east-1\n"
    )
    for name in s3_server.environment:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    ObjectStore(s3_url).probe()
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_server.port}")
    with pytest.raises(UserError, match="InvalidAccessKeyId"):
        ObjectStore(s3_url).probe()
    monkeypatch.setenv("AWS_PROFILE", "sso")
    with pytest.raises(UserError, match=r"profile 'sso' signs in by single sign-on.*pip install boto3"):
        ObjectStore(s3_url).probe()
