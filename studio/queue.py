"""Jobs of several people, drawn one after another by one thread, a job of each person in turn.

A model draws one thing at a time. Whoever asked for twenty pictures waits between them for those who asked for one:
the next job is the first of whoever's turn is longest ago.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["queued", "drawing", "done", "failed", "cancelled"]

MOST_WAITING = 100
MOST_OF_ONE = 50
"""Jobs that wait: of all people, and of one."""
MOST_BYTES = 256 << 20
"""Of the pictures that waiting jobs bring with them, as pixels."""
OF_ADDRESS = 0.75
"""The share of both that jobs from one address may have: whoever drops his cookie is another person each time, but
comes from the same address."""
REMEMBERED = 500
"""Jobs that are over and can still be asked for; the pictures themselves are files."""


class QueueFull(Exception):
    """No more jobs can wait: of all people, or (`own`) of the one who asks."""

    def __init__(self, message: str, own: bool = False) -> None:
        super().__init__(message)
        self.own = own


class JobCancelled(Exception):
    """Raised out of a step to end a drawing."""


@dataclass(eq=False)
class StudioJob:
    """What somebody asked for, and how far it is."""

    requests: Sequence[
        Any
    ]  # train.generate.sampler's, one a picture; () when it is over, so that their pictures are freed
    client: str
    asked: dict[str, Any]  # the same for people: prompt and settings, without pictures
    bytes: int = 0
    address: str = ""  # from where it was asked; many clients may share one
    id: str = field(default_factory=lambda: secrets.token_hex(8))  # never one of an earlier run's
    state: State = "queued"
    step: int = 0
    of: int = 0
    pictures: list[Any] = field(default_factory=list)  # what `draw` yielded
    error: str = ""  # why it failed
    note: str = ""  # what else there is to know
    cost: str = ""  # what it will take, where that is much
    at: float = field(default_factory=time.time)  # when it was asked for, seconds since 1970
    ended: float | None = None
    unwanted: bool = False  # cancelled while being drawn: seen at the next step

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


OnStep = Callable[[int, int], None]
"""(steps done, steps in all). What it raises ends the drawing."""


class JobQueue:
    """The queue, and the thread that draws.

    Args:
        draw: what the thread does with a job; yields something for each picture that is finished.
        explain: an exception of `draw` in words for the person whose job it was.
        on_change: called, from whichever thread it was, after anything changed. It must be quick.
    """

    def __init__(
        self,
        draw: Callable[[StudioJob, OnStep], Iterator[Any]],
        explain: Callable[[Exception], str],
        on_change: Callable[[], None],
    ) -> None:
        self._draw, self._explain, self._on_change = draw, explain, on_change
        self._lock = threading.Condition()
        self._waiting: OrderedDict[str, deque[StudioJob]] = OrderedDict()  # by client, whose turn is next first
        self._drawing: StudioJob | None = None
        self._jobs: OrderedDict[str, StudioJob] = OrderedDict()  # all that are remembered, oldest first
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="drawing", daemon=True)

    def start(self) -> None:
        """Begin to draw."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more jobs, cancel those that wait, and end the one that is drawn at its next step."""
        with self._lock:
            self._closed = True
            waiting = [job for jobs in self._waiting.values() for job in jobs]
            self._waiting.clear()
            for job in waiting:
                self._end(job, "cancelled")
            if self._drawing is not None:
                self._drawing.unwanted = True
            self._lock.notify_all()
        self._on_change()

    def close(self, seconds: float = 1.0) -> None:
        """Stop, and wait so long at most for the step that is being drawn."""
        self.stop()
        if self._thread.is_alive():
            self._thread.join(seconds)

    @property
    def closed(self) -> bool:
        """Whether it was stopped."""
        return self._closed

    def submit(self, job: StudioJob) -> StudioJob:
        """Let a job wait for its turn. raises QueueFull."""
        with self._lock:
            self._check_room(job.client, job.address, job.bytes)
            self._jobs[job.id] = job
            self._waiting.setdefault(job.client, deque()).append(job)
            self._lock.notify_all()
        self._on_change()
        return job

    def check_room(self, client: str, address: str, bytes: int) -> None:
        """Raise QueueFull where a job with pictures of so many bytes could not wait, before they are decoded."""
        with self._lock:
            self._check_room(client, address, bytes)

    def _check_room(self, client: str, address: str, bytes: int) -> None:
        waiting = [j for jobs in self._waiting.values() for j in jobs]
        near = [j for j in waiting if j.address == address]
        if self._closed:
            raise QueueFull("the server is being stopped")
        if len(self._waiting.get(client, ())) >= MOST_OF_ONE:
            raise QueueFull(f"{MOST_OF_ONE} of your jobs are waiting already", own=True)
        if len(waiting) >= MOST_WAITING:
            raise QueueFull(f"the queue is full: {MOST_WAITING} jobs are waiting")
        if len(near) >= OF_ADDRESS * MOST_WAITING:
            raise QueueFull(f"{len(near)} jobs from your address are waiting already", own=True)
        if sum(j.bytes for j in waiting) + bytes > MOST_BYTES:
            raise QueueFull("the queue is full: the pictures that wait with their jobs take all the room there is")
        if sum(j.bytes for j in near) + bytes > OF_ADDRESS * MOST_BYTES:
            raise QueueFull("the pictures that wait with jobs from your address take all the room there is", own=True)

    def cancel(self, job: StudioJob) -> None:
        """End a job that waits, at once, or is drawn, at its next step; one that is over stays as it is.

        Pictures that are finished by then stay.
        """
        with self._lock:
            if job.state == "queued":
                mine = self._waiting[job.client]
                mine.remove(job)
                if not mine:
                    del self._waiting[job.client]
                self._end(job, "cancelled")
            elif job.state == "drawing":
                job.unwanted = True
        self._on_change()

    def get(self, id: str) -> StudioJob | None:
        """A job by its id, None where there is none, or no more."""
        with self._lock:
            return self._jobs.get(id)

    def jobs(self) -> list[StudioJob]:
        """Those that wait, are drawn, or ended lately: newest first."""
        with self._lock:
            return list(reversed(self._jobs.values()))

    def positions(self) -> dict[str, int]:
        """By id, how many jobs will be finished before each that waits: 0 is drawn next, where nothing is drawn now."""
        with self._lock:
            turns = [deque(jobs) for jobs in self._waiting.values()]
            place = 0 if self._drawing is None else 1
        found: dict[str, int] = {}
        while turns:
            for jobs in turns:
                found[jobs.popleft().id] = place + len(found)
            turns = [jobs for jobs in turns if jobs]
        return found

    # ------------------------------------------------------------------------------------------------- the thread

    def _work(self) -> None:
        while (job := self._next()) is not None:
            state, error = self._outcome(job)
            with self._lock:
                self._drawing = None
                self._end(job, state, error)
            self._on_change()

    def _outcome(self, job: StudioJob) -> tuple[State, str]:
        """Draw a job: how it ended, and why it failed."""

        def on_step(done: int, of: int) -> None:
            if job.unwanted:
                raise JobCancelled
            job.step, job.of = done, of
            self._on_change()

        try:
            for picture in self._draw(job, on_step):
                job.pictures.append(picture)
                self._on_change()
        except JobCancelled:
            return "cancelled", ""
        except Exception as e:  # this job's; the next may go well
            return "failed", self._explain(e)
        return "done", ""

    def _next(self) -> StudioJob | None:
        """The job whose turn it is, when there is one; None at the end."""
        with self._lock:
            while not self._waiting and not self._closed:
                self._lock.wait()
            if self._closed:
                return None
            client, jobs = self._waiting.popitem(last=False)
            job = jobs.popleft()
            if jobs:
                self._waiting[client] = jobs  # behind all others
            job.state = "drawing"
            self._drawing = job
        self._on_change()
        return job

    def _end(self, job: StudioJob, state: State, error: str = "") -> None:
        job.state, job.error, job.ended = state, error, time.time()
        job.requests, job.bytes = (), 0
        over = [j.id for j in self._jobs.values() if j.is_over]
        for id in over[: max(0, len(over) - REMEMBERED)]:
            del self._jobs[id]
