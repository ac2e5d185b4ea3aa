"""Jobs of several people, run one after another by one thread, a job of each person in turn; and bounded side work.

A model does one thing at a time. Whoever asked for twenty images waits between them for those who asked for one: the
next job is the first of whoever's turn is longest ago.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

State = Literal["queued", "drawing", "done", "failed", "cancelled"]

MAX_WAITING, MAX_WAITING_OF_ONE = 100, 50
"""Jobs that wait: of all people, and of one."""
MAX_BYTES = 256 << 20
"""Of the images that waiting jobs bring with them, as pixels."""
ADDRESS_SHARE = 0.75
"""The share of both that jobs from one address may have: whoever drops his cookie is another person each time, but
comes from the same address."""
REMEMBERED = 500
"""Jobs that are over and can still be asked for; the images themselves are files."""

OnStep = Callable[[int, int], None]
"""(steps done, steps in all). What it raises ends the job."""
T = TypeVar("T")


class QueueFull(Exception):
    """No more jobs can wait: of all people, or (`own`) of the one who asks."""

    def __init__(self, message: str, own: bool = False) -> None:
        super().__init__(message)
        self.own = own


class JobCancelled(Exception):
    """Raised out of a step to end a job."""


@dataclass(eq=False)
class StudioJob:
    """What somebody asked for, and how far it is."""

    requests: Sequence[Any]  # what `run` works on; () when it is over, so that the images in them are freed
    client: str
    asked: dict[str, Any]  # the same for people: prompt and settings, without images
    bytes: int = 0
    address: str = ""  # from where it was asked; many clients may share one
    id: str = field(default_factory=lambda: secrets.token_hex(8))  # never one of an earlier run's
    state: State = "queued"
    step: int = 0
    of: int = 0
    pictures: list[Any] = field(default_factory=list)  # what `run` yielded
    error: str = ""  # why it failed
    note: str = ""  # what else there is to know
    cost: str = ""  # what it will take, where that is much
    at: float = field(default_factory=time.time)  # when it was asked for, seconds since 1970
    cancelled: bool = False  # while it ran: seen at the next step

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


class JobQueue:
    """The queue, and the thread that works.

    Args:
        run: what the thread does with a job; yields something for each image that is finished.
        explain: an exception of `run` in words for the person whose job it was.
        on_change: called, from whichever thread it was, after anything changed. It must be quick.
    """

    def __init__(
        self,
        run: Callable[[StudioJob, OnStep], Iterator[Any]],
        explain: Callable[[Exception], str],
        on_change: Callable[[], None],
    ) -> None:
        self._run, self._explain, self._on_change = run, explain, on_change
        self._lock = threading.Condition()
        self._waiting: OrderedDict[str, deque[StudioJob]] = OrderedDict()  # by client, whose turn is next first
        self._running: StudioJob | None = None
        self._jobs: OrderedDict[str, StudioJob] = OrderedDict()  # all that are remembered, oldest first
        self.closed = False
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more jobs, cancel those that wait, and end the one that runs at its next step."""
        with self._lock:
            self.closed = True
            for job in [job for jobs in self._waiting.values() for job in jobs]:
                self._finish(job, "cancelled")
            self._waiting.clear()
            if self._running is not None:
                self._running.cancelled = True
            self._lock.notify_all()
        self._on_change()

    def close(self) -> None:
        """Stop, and wait a second at most for the step that runs."""
        self.stop()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def submit(self, job: StudioJob) -> StudioJob:
        """Let a job wait for its turn. Raises QueueFull."""
        with self._lock:
            self.check_room(job.client, job.address, job.bytes)
            self._jobs[job.id] = job
            self._waiting.setdefault(job.client, deque()).append(job)
            self._lock.notify_all()
        self._on_change()
        return job

    def check_room(self, client: str, address: str, bytes: int) -> None:
        """Raise QueueFull where a job with images of so many bytes could not wait, before they are decoded."""
        with self._lock:
            waiting = [job for jobs in self._waiting.values() for job in jobs]
            near = [job for job in waiting if job.address == address]
            if self.closed:
                raise QueueFull("the server is being stopped")
            if len(self._waiting.get(client, ())) >= MAX_WAITING_OF_ONE:
                raise QueueFull(f"{MAX_WAITING_OF_ONE} of your jobs are waiting already", own=True)
            if len(waiting) >= MAX_WAITING:
                raise QueueFull(f"the queue is full: {MAX_WAITING} jobs are waiting")
            if len(near) >= ADDRESS_SHARE * MAX_WAITING:
                raise QueueFull(f"{len(near)} jobs from your address are waiting already", own=True)
            if sum(job.bytes for job in waiting) + bytes > MAX_BYTES:
                raise QueueFull("the queue is full: the images that wait with their jobs take all the room there is")
            if sum(job.bytes for job in near) + bytes > ADDRESS_SHARE * MAX_BYTES:
                raise QueueFull("the images that wait with jobs from your address take all the room there is", own=True)

    def cancel(self, job: StudioJob) -> None:
        """End a job that waits, at once, or runs, at its next step; one that is over stays as it is.

        Images that are finished by then stay.
        """
        with self._lock:
            if job.state == "queued":
                mine = self._waiting[job.client]
                mine.remove(job)
                if not mine:
                    del self._waiting[job.client]
                self._finish(job, "cancelled")
            elif job.state == "drawing":
                job.cancelled = True
        self._on_change()

    def get(self, id: str) -> StudioJob | None:
        """A job by its id, None where there is none, or no more."""
        with self._lock:
            return self._jobs.get(id)

    def jobs(self) -> list[StudioJob]:
        """Those that wait, run, or ended lately: newest first."""
        with self._lock:
            return list(reversed(self._jobs.values()))

    def positions(self) -> dict[str, int]:
        """By id, how many jobs will be finished before each that waits: 0 is next, where nothing runs now."""
        with self._lock:
            queues = [deque(jobs) for jobs in self._waiting.values()]
            first = 0 if self._running is None else 1
        found: dict[str, int] = {}
        while queues:
            for jobs in queues:
                found[jobs.popleft().id] = first + len(found)
            queues = [jobs for jobs in queues if jobs]
        return found

    # ------------------------------------------------------------------------------------------------- the thread

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._waiting and not self.closed:
                    self._lock.wait()
                if self.closed:
                    return
                client, jobs = self._waiting.popitem(last=False)
                job = jobs.popleft()
                if jobs:
                    self._waiting[client] = jobs  # behind all others
                job.state, self._running = "drawing", job
            self._on_change()
            state, error = self._run_job(job)
            with self._lock:
                self._running = None
                self._finish(job, state, error)
            self._on_change()

    def _run_job(self, job: StudioJob) -> tuple[State, str]:
        """How the job ended, and why it failed."""

        def on_step(done: int, of: int) -> None:
            if job.cancelled:
                raise JobCancelled
            job.step, job.of = done, of
            self._on_change()

        try:
            for result in self._run(job, on_step):
                job.pictures.append(result)
                self._on_change()
        except JobCancelled:
            return "cancelled", ""
        except Exception as e:  # this job's; the next may go well
            return "failed", self._explain(e)
        return "done", ""

    def _finish(self, job: StudioJob, state: State, error: str = "") -> None:
        job.state, job.error = state, error
        job.requests, job.bytes = (), 0
        over = [j.id for j in self._jobs.values() if j.is_over]
        for id in over[: max(0, len(over) - REMEMBERED)]:
            del self._jobs[id]


class BoundedExecutor:
    """Work off the event loop: `places` pieces at a time, `each` of them of one client, and as many that wait as jobs.

    So nobody waits for more than `each` pieces of each of the others.
    """

    def __init__(self, name: str, places: int, each: int = 1) -> None:
        self._pool = ThreadPoolExecutor(places, thread_name_prefix=name)
        self._places = asyncio.Semaphore(places)
        self._waiting: Counter[str] = Counter()
        self._each = each
        self._own: dict[str, asyncio.Semaphore] = {}
        self._closed = False

    async def run(self, client: str, work: Callable[[], T]) -> T:
        """What `work` returns, or raises. Raises QueueFull where too many wait already."""
        if self._waiting[client] >= MAX_WAITING_OF_ONE:
            raise QueueFull(f"{MAX_WAITING_OF_ONE} of your requests are being read already", own=True)
        if self._waiting.total() >= MAX_WAITING:
            raise QueueFull(f"the queue is full: {MAX_WAITING} requests are being read already")
        self._waiting[client] += 1
        try:
            async with self._own.setdefault(client, asyncio.Semaphore(self._each)), self._places:
                if self._closed:
                    raise QueueFull("the server is ending")
                return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._closed or task is None or task.cancelling():
                raise
            raise QueueFull("the server is ending") from None  # what waited was cancelled by `close`, not who asked
        finally:
            self._waiting[client] -= 1
            if not self._waiting[client]:
                del self._waiting[client], self._own[client]

    def close(self) -> None:
        """Begin nothing more."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)


AT_ONCE, ADDRESS_AT_ONCE = 8, 30
"""Requests of one client, and from one address, that are worked on at a time. A browser sends six; 40 threads work."""


class Turns:
    """Lets a request wait where its client, or its address, has many that are worked on already: so that whoever asks
    for much at once, or for what takes long, leaves threads for others."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[asyncio.Semaphore, int]] = {}  # and how many hold or want one

    @contextlib.asynccontextmanager
    async def take(self, client: str, address: str) -> AsyncIterator[None]:
        """While a request is worked on."""
        async with self._place(client, AT_ONCE), self._place(f"address {address}", ADDRESS_AT_ONCE):
            yield

    @contextlib.asynccontextmanager
    async def _place(self, who: str, most: int) -> AsyncIterator[None]:
        places, count = self._places.get(who, (asyncio.Semaphore(most), 0))
        self._places[who] = places, count + 1
        try:
            async with places:
                yield
        finally:
            places, count = self._places.pop(who)
            if count > 1:
                self._places[who] = places, count - 1
