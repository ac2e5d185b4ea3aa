"""The lease of a data folder on an object store: one owner, whatever happens to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from aesthetic.errors import UserError
from curate.store.lease import Lease, LeaseLost, check_token
from curate.store.objects import ObjectStore
from tests.stores import Faults, Proxy, Server

RENEW, TTL = 0.5, 3.0  # seconds; in earnest they are 15 and 60

OWNER = """
import sys
from curate.store.lease import Lease, LeaseLost
from curate.store.objects import Changed, ObjectStore
url, renew, ttl = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
store = ObjectStore(url)
record = store.put(b"before", "record")
with Lease(store, renew=renew, ttl=ttl) as lease:
    print(lease.token, flush=True)
    sys.stdin.readline()
    try:
        lease.check()
        print("committed", store.put(b"late", "record", replaces=record.etag), flush=True)
    except LeaseLost as e:
        print("lost:", e, flush=True)
    try:
        print("fenced?", store.put(b"late", "record", replaces=record.etag), flush=True)
    except Changed:
        print("fenced", flush=True)
"""
"""Takes the lease, says its token, and commits when it is told to."""


@pytest.fixture
def store(s3_url: str) -> ObjectStore:
    return ObjectStore(s3_url)


@contextlib.contextmanager
def another(store: ObjectStore) -> Iterator[subprocess.Popen[str]]:
    """An owner in a process of its own."""
    command = [sys.executable, "-c", OWNER, store.url, str(RENEW), str(TTL)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def from_elsewhere(store: ObjectStore, **changes: object) -> None:
    """Make the lease that lies there look as if a process on another machine had written it."""
    found = store.get(".lease")
    assert found is not None
    owner = json.loads(found[0]) | {"host": "elsewhere", "process": "another boot"} | changes
    store.put(json.dumps(owner).encode(), ".lease")


def take(store: ObjectStore, **settings: float) -> Lease:
    return Lease(store, **{"renew": RENEW, "ttl": TTL, **settings})


def test_one_owner_at_a_time(store: ObjectStore) -> None:
    with take(store) as first:
        first.check()
        check_token(store, first.token)
        with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on .*\. Wait for it, stop it"):
            take(store).__enter__()
    with pytest.raises(LeaseLost, match="has ended"):
        check_token(store, first.token)
    start = time.monotonic()
    with take(store) as second:
        assert time.monotonic() - start < TTL / 2  # released: nobody waits
        assert second.token.startswith("2-")
        check_token(store, second.token)
        with pytest.raises(LeaseLost):
            check_token(store, first.token)


@pytest.mark.long
def test_it_lives_as_long_as_its_owner(store: ObjectStore) -> None:
    with take(store) as lease:
        for _ in range(10):
            time.sleep(TTL / 5)
            lease.check()
            check_token(store, lease.token)


def test_a_killed_owner_on_this_machine_is_replaced_at_once(store: ObjectStore) -> None:
    with another(store) as process:
        assert process.stdout is not None
        token = process.stdout.readline().strip()
        check_token(store, token)
        process.kill()  # and is not waited for: a zombie is dead
        time.sleep(0.1)
        start = time.monotonic()
        with take(store) as lease:
            assert time.monotonic() - start < TTL / 2
            assert lease.token.startswith("2-")
            with pytest.raises(LeaseLost, match="took it over"):
                check_token(store, token)


@pytest.mark.long
@pytest.mark.parametrize("written", ["1970-01-01T00:00:00Z", "2999-01-01T00:00:00Z"])
def test_a_dead_owner_elsewhere_is_replaced_when_it_was_silent(store: ObjectStore, written: str) -> None:
    """Whatever time it wrote: only what is seen here counts, by a clock that nobody sets."""
    said: list[str] = []
    with take(store):
        pass
    from_elsewhere(store, state="held", written=written)
    start = time.monotonic()
    with Lease(store, renew=RENEW, ttl=TTL, waiting=said.append) as lease:
        assert TTL < time.monotonic() - start < 2 * TTL
        check_token(store, lease.token)
    assert len(said) == 1
    assert "on elsewhere" in said[0]


def test_a_paused_owner_cannot_commit(store: ObjectStore) -> None:
    """Stopped for longer than the lease lasts, it wakes when another has it, and has committed."""
    with another(store) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        token = process.stdout.readline().strip()
        process.send_signal(signal.SIGSTOP)
        with take(store) as lease:
            found = store.head("record")
            assert found is not None
            store.put(b"mine", "record", replaces=found.etag)
            process.send_signal(signal.SIGCONT)
            process.stdin.write("commit\n")
            process.stdin.flush()
            assert process.stdout.readline().startswith("lost: s3://")
            assert process.stdout.readline() == "fenced\n"
            lease.check()
            check_token(store, lease.token)
            with pytest.raises(LeaseLost, match="took it over"):
                check_token(store, token)
    assert (store.get("record") or [b""])[0] == b"mine"


def test_an_owner_that_is_robbed_learns_it(store: ObjectStore) -> None:
    with take(store) as lease:
        from_elsewhere(store, epoch=7)
        deadline = time.monotonic() + 5
        with pytest.raises(LeaseLost, match=r"on elsewhere has taken it over\. Nothing was committed since"):
            while time.monotonic() < deadline:
                lease.check()
                time.sleep(0.05)
    found = store.get(".lease")
    assert found is not None
    assert json.loads(found[0])["state"] == "held"  # of the other: left alone


def test_answers_that_are_lost(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store did what it was asked, and did not say so: it is repeated, refused, and found to be our own."""
    faults = Faults(only=r"^PUT .*\.lease$", at={1: "lost", 3: "lost", 4: "503", 6: "reset"})
    with Proxy(s3_server.port, faults) as proxy:
        store = ObjectStore(s3_server.use(monkeypatch, proxy.port))
        with take(store, ttl=6) as lease:
            deadline = time.monotonic() + 20
            while len(faults.done) < 4 and time.monotonic() < deadline:
                lease.check()
                time.sleep(0.1)
            check_token(store, lease.token)
    assert [d.split()[1] for d in faults.done] == ["lost", "lost", "503", "reset"]


@pytest.mark.long
def test_a_store_that_is_away(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner stops before anyone may take over; nobody did, so it may go on when the store is back."""
    with Proxy(s3_server.port) as proxy:
        store = ObjectStore(s3_server.use(monkeypatch, proxy.port))
        with take(store) as lease:
            proxy.faults.down = True
            start = time.monotonic()
            with pytest.raises(LeaseLost, match="could not say for"):
                while time.monotonic() - start < 10:
                    lease.check()
                    time.sleep(0.05)
            assert time.monotonic() - start < TTL
            proxy.faults.down = False
            while time.monotonic() - start < 10:
                with contextlib.suppress(LeaseLost):
                    lease.check()
                    break
                time.sleep(0.05)
            lease.check()
            check_token(store, lease.token)


@pytest.mark.long
def test_one_of_many_gets_it(store: ObjectStore) -> None:
    def attempt(_: int) -> str | None:
        lease = Lease(store, renew=2, ttl=40)
        with contextlib.suppress(UserError):
            lease.__enter__()
            return lease.token
        return None

    with ThreadPoolExecutor(8) as pool:
        tokens = [t for t in pool.map(attempt, range(8)) if t]
    assert len(tokens) == 1
    check_token(store, tokens[0])


@pytest.mark.long
def test_runs_that_are_stopped_and_woken_at_random(store: ObjectStore) -> None:
    """Six owners in turn, each stopped when it has the lease: none of those before can commit."""
    with contextlib.ExitStack() as stack:
        processes, tokens = [], []
        for _ in range(6):
            process = stack.enter_context(another(store))
            assert process.stdout is not None
            tokens.append(process.stdout.readline().strip())
            processes.append(process)
            process.send_signal(signal.SIGSTOP)
        assert [t.split("-")[0] for t in tokens] == list("123456")
        for process in processes[:-1]:
            process.send_signal(signal.SIGCONT)
            assert process.stdin is not None
            process.stdin.write("commit\n")
            process.stdin.flush()
            assert process.stdout is not None
            assert process.stdout.readline().startswith("lost:")
        check_token(store, tokens[-1])
