"""One run at a time on a data folder of an object store: a lease that its owner renews, and that others watch."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aesthetic.errors import UserError
from curate.store.objects import Changed, ObjectStore, StoredObject, StoreUnavailable


class LeaseLost(Exception):
    """Another run has the data folder now, or may have it: nothing may be committed any more (exit code 1)."""


class Lease:
    """A context manager like `curate.store.lock.Lock`, for a store that knows no locks.

    One object says who owns the folder. It is only ever created where there is none, or swapped for what was read. Its
    owner swaps it every `renew` seconds, with a counter, so that no two of its contents are the same. Who finds it
    unchanged for `ttl` seconds of his own steady clock takes it over; times that others wrote are never compared.
    A dead owner on the same machine is replaced at once. Each owner has a higher epoch than the one before.

    What a store cannot do is stop an owner who was paused: so each commit is to ask `check` (or in another process
    `check_token`) first, and to put its record by a condition.
    """

    def __init__(
        self,
        store: ObjectStore,
        name: str = ".lease",
        *,
        renew: float = 15.0,
        ttl: float = 60.0,
        waiting: Callable[[str], None] | None = None,  # told, in a sentence, when another's lease is watched
    ) -> None:
        # what asks longer than this has no answer in time
        self._store = ObjectStore(store.url, patience=min(renew, ttl / 6))
        self._name, self._renew, self._ttl, self._waiting = name, renew, ttl, waiting
        self._nonce = secrets.token_hex(8)
        self._epoch = self._counter = 0
        self._held: StoredObject | None = None
        self._renewed = 0.0  # by `_now`, before the last renewal that succeeded was sent
        self._lost: str | None = None  # who has it
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def token(self) -> str:
        """Names this ownership, for workers: `check_token` tells them whether it still holds."""
        return f"{self._epoch}-{self._nonce}"

    def __enter__(self) -> Lease:
        self._acquire()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._held is not None and self._lost is None:
            with contextlib.suppress(Changed, StoreUnavailable, UserError):  # it runs out by itself
                self._swap("released")

    def check(self) -> None:
        """Raise LeaseLost where another owner has it, or could have it by now. Asks nobody: costs nothing."""
        if self._lost is not None:
            raise LeaseLost(f"{self._store.url}: {self._lost} has taken it over. {_WHY}")
        if (age := _now() - self._renewed) > self._ttl * 2 / 3:
            raise LeaseLost(
                f"{self._store.url}: this run could not say for {age:,.0f} s that it is alive (it was stopped, or the "
                f"store did not answer), so another may have taken over. {_WHY}"
            )

    # -------------------------------------------------------------------------------------------------- acquiring

    def _acquire(self) -> None:
        watched: str | None = None  # the etag that is watched, since when
        since = 0.0
        while True:
            asked = _now()
            found = self._store.get(self._name)
            try:
                if found is None:
                    self._epoch = 1
                    self._become(asked, None)
                    return
                owner = _read(found[0])
                self._epoch = int(owner.get("epoch", 0)) + 1
                if owner.get("state") == "released" or _is_dead(owner):
                    self._become(asked, found[1].etag)
                    return
                if watched is not None and watched != found[1].etag:
                    raise UserError(
                        f"{self._store.url} is in use by {_described(owner)}. Wait for it, stop it, or give another "
                        "--out."
                    )
                if watched is None:
                    watched, since = found[1].etag, asked
                    if self._waiting is not None:
                        self._waiting(
                            f"{self._store.url} was left by {_described(owner)}, or is in use by it: watching for up "
                            f"to {self._ttl:.0f} s whether it is alive"
                        )
                elif asked - since > self._ttl:
                    self._become(asked, watched)
                    return
            except (FileExistsError, Changed):  # another was quicker: who?
                watched = None
                continue
            time.sleep(self._renew / 5)

    def _become(self, asked: float, etag: str | None) -> None:
        self._held = self._store.put(self._text("held"), self._name, create=etag is None, replaces=etag)
        self._renewed = asked

    # --------------------------------------------------------------------------------------------------- renewing

    def _keep(self) -> None:
        """Renew until the end; sooner again where the store did not answer."""
        pause = self._renew
        while not self._ended.wait(pause):
            try:
                self._swap("held")
                pause = self._renew
            except Changed:
                try:
                    found = self._store.get(self._name)
                    self._lost = _described(_read(found[0])) if found else "somebody who removed the lease"
                except (StoreUnavailable, UserError):
                    self._lost = "another run"
                return
            except (StoreUnavailable, UserError):  # rights may come back, as after a rotation of keys; else it runs out
                pause = self._renew / 5

    def _swap(self, state: str) -> None:
        assert self._held is not None
        asked = _now()
        self._counter += 1
        self._held = self._store.put(self._text(state), self._name, replaces=self._held.etag)
        self._renewed = asked

    def _text(self, state: str) -> bytes:
        about = {
            "state": state,
            "epoch": self._epoch,
            "nonce": self._nonce,
            "counter": self._counter,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": _process(os.getpid()),
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),  # for people; nobody compares it
        }
        return (json.dumps(about) + "\n").encode()


_WHY = "Nothing was committed since. What is done stays done; the same command goes on where it stopped."


def check_token(store: ObjectStore, token: str, name: str = ".lease") -> None:
    """Raise LeaseLost where the lease is no longer the one with this token. One small read."""
    found = store.get(name)
    owner = _read(found[0]) if found else {}
    if owner.get("state") != "held" or f"{owner.get('epoch')}-{owner.get('nonce')}" != token:
        raise LeaseLost(f"{store.url}: the run of this worker has ended, or {_described(owner)} took it over. {_WHY}")


def _now() -> float:
    """Seconds of a clock that nobody sets, and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _read(data: bytes) -> dict[str, Any]:
    """What a lease says; nothing where it is no lease of ours, which then is watched like one."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("epoch", 0), int) else {}


def _described(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown machine')}"


def _process(pid: int) -> str | None:
    """What no other process ever has: the machine's boot, the space of process numbers, when the process started.

    None where this machine does not tell.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else f"{boot} {space} {numbers[18]}"  # Z: killed, and its parent has not noticed yet


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether an owner was a process of this machine (of this container), and is gone."""
    process, pid = owner.get("process"), owner.get("pid")
    own = _process(os.getpid())
    if not isinstance(process, str) or not isinstance(pid, int) or own is None:
        return False
    if owner.get("host") != socket.gethostname() or process.rpartition(" ")[0] != own.rpartition(" ")[0]:
        return False
    return _process(pid) != process
