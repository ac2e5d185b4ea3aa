"""Between workers and their driver: one actor for counts, messages, errors and the wish to stop.

An error reaches the driver as it was raised, with its traceback in the worker as a note: Ray's own report of it is
text, in wrappings that vary.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import pickle
import secrets
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from curate.store.disk import Disk
from curate.store.files import open_log
from curate.store.lease import LeaseLost
from curate.store.lock import hold_worker_lock
from pipelines.runtime.progress import Counts
from pipelines.terminal import LogFormatter

NOT_ASKED = 30.0
"""Seconds in which a driver must answer a worker; after so many of silence again, others have its items."""


class ProgressActor:
    """What workers tell their driver, and the driver them. Lives in an actor, so that workers on any node reach it."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._hosts: Counter[str] = Counter()
        self._messages: list[Any] = []
        self._failure: Exception | None = None
        self._stop = False
        self._heard: dict[str, float] = {}  # workers by their names, and when they gave the last sign of life
        self._dismissed: set[str] = set()

    def add(self, counts: Counts, hosts: dict[str, int]) -> None:
        """Add up rows by stage and outcome, and failures by host."""
        self._counts.update(counts)
        self._hosts.update(hosts)
        if len(self._hosts) > 2000:  # the web has many hosts, and only the worst are shown
            self._hosts = Counter(dict(self._hosts.most_common(1000)))

    def counts(self) -> tuple[Counts, list[tuple[str, int]]]:
        """All rows so far, and the three worst hosts."""
        return dict(self._counts), self._hosts.most_common(3)

    def put(self, message: Any) -> None:
        """Queue a message for the driver."""
        self._messages.append(message)

    def take(self) -> list[Any]:
        """The messages since the last time."""
        messages, self._messages = self._messages, []
        return messages

    def alive(self, worker: str) -> None:
        """A sign of life of a worker."""
        if worker not in self._dismissed:
            self._heard[worker] = time.monotonic()

    def silence(self) -> dict[str, float]:
        """Seconds since the last sign of life of each worker."""
        return {worker: time.monotonic() - at for worker, at in self._heard.items()}

    def dismiss(self, worker: str) -> None:
        """Hear no more of a worker: others do what it was at."""
        self._dismissed.add(worker)
        self._heard.pop(worker, None)

    def at_work(self, worker: str) -> bool:
        """Whether a worker is still the one that does what it was asked to do."""
        return worker not in self._dismissed

    def fail(self, error: Exception, worker: str | None = None) -> None:
        """Keep what went wrong in a worker; the first error is the cause of those after it."""
        if worker not in self._dismissed:
            self._failure = self._failure or error

    def failure(self) -> Exception | None:
        """What went wrong in a worker, as it was raised there."""
        return self._failure

    def request_stop(self) -> None:
        """Ask the workers to end after what they are at."""
        self._stop = True

    def stop_requested(self) -> bool:
        return self._stop


def start_progress() -> tuple[str, Any]:
    """The name of a new ProgressActor, and a handle of it; it lives as long as that."""
    import ray

    name = f"tastemaker-{os.getpid()}-{secrets.token_hex(4)}"
    return name, ray.remote(ProgressActor).options(name=name, **beside_driver()).remote()


def beside_driver() -> dict[str, Any]:
    """Options of an actor that runs on the driver's node and sets nothing aside: no other node's end is its end."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}


# ------------------------------------------------------------------------------------------------------- in a worker


def start_worker(store: Disk, stage: str, progress: str) -> Any:
    """In a new worker's process: hold the folder's worker lock, log to its logs, find the ProgressActor. Nothing is
    committed there any more by a worker whose items others have.

    Beside an object store Ray keeps what a worker says.
    """
    import ray

    actor = ray.get_actor(progress)
    if store.url is None:
        hold_worker_lock(store.root)
        log_to_file(store.root / "logs", stage)
    if (name := ray.get_runtime_context().get_actor_name()) is not None:
        store.fence = functools.partial(_check_at_work, actor, name)
    return actor


def _check_at_work(progress: Any, worker: str) -> None:
    import ray
    from ray.exceptions import RayError

    why = "others do what this worker was at, as nothing was heard of it"
    try:
        if ray.get(progress.at_work.remote(worker), timeout=NOT_ASKED):
            return
    except RayError as e:
        why = f"its driver can't be asked whether the work is still this worker's ({type(e).__name__})"
    raise LeaseLost(f"{worker}: {why}")


def log_to_file(logs: Path, stage: str) -> None:
    """Send a worker's log records to a file in that folder."""
    handler = logging.StreamHandler(io.TextIOWrapper(open_log(logs / f"{stage}.log"), "utf-8", "backslashreplace"))
    handler.setFormatter(LogFormatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


@contextlib.contextmanager
def report_errors(progress: Any) -> Iterator[None]:
    """Have the ProgressActor keep the error that ends a worker."""
    import ray

    try:
        yield
    except Exception as e:
        error = e
        while isinstance(error, ExceptionGroup):  # rows of a shard are tasks of a group
            error = error.exceptions[0]
        error.add_note(f"In a worker:\n{traceback.format_exc()}")
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # whatever a class of exceptions does when it is copied
            error = RuntimeError(f"{type(error).__name__}: {error}")
        ray.get(progress.fail.remote(error, ray.get_runtime_context().get_actor_name()))
        raise


def stop_check(progress: Any) -> Callable[[], bool]:
    """Whether the driver wants an end, asked once a second at most."""
    import ray

    last = time.monotonic()

    def should_stop() -> bool:
        nonlocal last
        if time.monotonic() - last < 1:
            return False
        last = time.monotonic()
        return bool(ray.get(progress.stop_requested.remote()))

    return should_stop


# ------------------------------------------------------------------------------------------------------ in the driver


def watch(work: Callable[[], None], progress: Any, every: float) -> Iterator[None]:
    """Do the work in a thread, yielding every so many seconds, and once after its end. Raises what ends it: an error of
    a worker as it was raised there, else its own.

    In a thread, because Ray Train takes Ctrl-C for itself in the main one.
    """
    import ray
    from ray.exceptions import RayError

    ended: list[BaseException] = []
    abandoned = threading.Event()

    def run() -> None:
        try:
            work()
        except BaseException as e:
            if not abandoned.is_set():
                traceback.print_exc()  # into the log: Ray's account of it
            ended.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    alive = True
    try:
        while alive:
            thread.join(every)
            alive = thread.is_alive()
            yield
            failure = None
            with contextlib.suppress(RayError):  # a lost actor can't say whether a worker failed
                failure = ray.get(progress.failure.remote(), timeout=5)
            if failure is not None:
                raise failure
    finally:
        abandoned.set()
    if ended:
        raise ended[0]
