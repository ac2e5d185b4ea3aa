"""Commands that run for a page, one at a time: each a process of its own whose lines are kept while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Literal

from aesthetic.untrusted import printable
from studio.commands.actions import CommandLine
from studio.queue import QueueFull
from studio.streams import ChangeSignal

State = Literal["waiting", "running", "done", "failed", "cancelled"]

MAX_LINES, MAX_LINE = 200, 2000
"""Lines of a command that are kept, the last ones, and characters of each."""
MAX_WAITING, MAX_WAITING_OF_ONE, REMEMBERED = 40, 20, 100
GRACE = 10.0
"""Seconds that a command has to end after it was interrupted, before it is killed."""

_PROGRESS = re.compile(r"(\d[\d,]*)/(\d[\d,]*)  ([\d.,]+ [^ ]+)")
_ETA = re.compile(r"\beta (.+)$")


@dataclass(frozen=True)
class CommandProgress:
    """How far a command says that it is."""

    done: int
    of: int
    rate: str  # "38 img/s"
    eta: str  # "3 min 2 s", empty where it does not say


@dataclass
class CommandJob:
    """A command that waits, runs or has run."""

    words: Sequence[str]  # after `tastemaker`
    client: str
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    at: float = field(default_factory=time.time)
    state: State = "waiting"
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_LINES))
    dropped: int = 0  # lines before those
    progress: CommandProgress | None = None
    exit: int | None = None
    paths: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    process: subprocess.Popen[bytes] | None = None
    interrupted: float | None = None  # when, by time.monotonic

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


class CommandService:
    """Runs commands of the command line, one after the other, in the folder where the studio was started.

    Args:
        line: the command line; without one nothing can be asked for.
        after: called after a command that was begun, whatever came of it.
        log: called with a line about each command.
        on_fault: called with exceptions that are ours.
    """

    def __init__(
        self,
        line: CommandLine | None,
        *,
        after: Callable[[], None] = lambda: None,
        log: Callable[[str], None] = lambda line: None,
        on_fault: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self.line, self._after, self._log, self._on_fault = line, after, log, on_fault
        self._lock = threading.Condition()
        self._jobs: dict[str, CommandJob] = {}  # oldest first
        self._thread: threading.Thread | None = None
        self.changed = ChangeSignal()
        self.closed = False

    def submit(self, words: Sequence[str], client: str) -> CommandJob:
        """Run a command when those before it are over. Raises QueueFull."""
        with self._lock:
            waiting = [job for job in self._jobs.values() if job.state == "waiting"]
            if self.closed:
                raise QueueFull("the server is being stopped")
            if sum(job.client == client for job in waiting) >= MAX_WAITING_OF_ONE:
                raise QueueFull(f"{MAX_WAITING_OF_ONE} of your commands are waiting already", own=True)
            if len(waiting) >= MAX_WAITING:
                raise QueueFull(f"{MAX_WAITING} commands are waiting already")
            job = CommandJob(list(words), client)
            self._jobs[job.id] = job
            over = [id for id, j in self._jobs.items() if j.is_over]
            for id in over[: max(0, len(over) - REMEMBERED)]:
                del self._jobs[id]
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True, name="commands")
                self._thread.start()
            self._lock.notify_all()
        self.changed()
        return job

    def get(self, id: str) -> CommandJob | None:
        """A command by its id, None where there is none, or no more."""
        with self._lock:
            return self._jobs.get(id)

    def jobs(self) -> list[CommandJob]:
        """Those that wait, run, or ended lately: newest first."""
        with self._lock:
            return list(reversed(self._jobs.values()))

    def cancel(self, job: CommandJob) -> None:
        """End a command: one that waits at once, one that runs as Ctrl-C does; one that is over stays as it is."""
        with self._lock:
            if job.state == "waiting":
                job.state = "cancelled"
            elif job.state == "running" and job.interrupted is None:
                self._interrupt(job)
        self.changed()

    def stop(self) -> None:
        """Begin nothing more, and end what runs; does not wait for it."""
        with self._lock:
            self.closed = True
            for job in self._jobs.values():
                if job.state == "waiting":
                    job.state = "cancelled"
                elif job.state == "running" and job.interrupted is None:
                    self._interrupt(job)
            self._lock.notify_all()
        self.changed()

    def close(self) -> None:
        """Stop, and wait until what ran has ended."""
        self.stop()
        if self._thread is not None:
            self._thread.join(GRACE + 5)

    async def changes(self, job: CommandJob) -> AsyncIterator[CommandJob]:
        """The job each time that it changed, until it is over or the server ends."""
        while True:
            change = self.changed.next()
            yield job
            if job.is_over or self.closed:
                return
            await change.wait()
            await asyncio.sleep(0.1)  # a command may print more lines than anybody reads

    # ------------------------------------------------------------------------------------------------- the thread

    def _work(self) -> None:
        while True:
            with self._lock:
                while not (waiting := [j for j in self._jobs.values() if j.state == "waiting"]) and not self.closed:
                    self._lock.wait()
                if self.closed:
                    return
                job = waiting[0]
                job.state = "running"
            self.changed()
            self._log(shlex.join(["tastemaker", *job.words]))
            began = time.monotonic()
            try:
                job.exit = self._run(job)
            except Exception as e:  # not even begun
                job.lines.append(f"{type(e).__name__}: {printable(e, 500)}")
                self._on_fault(e)
            try:
                self._after()
            except Exception as e:
                self._on_fault(e)
            with self._lock:
                job.seconds, job.process = time.monotonic() - began, None
                ended = "done" if job.exit == 0 else "cancelled" if job.interrupted is not None else "failed"
                job.state = ended  # type: ignore[assignment]
            self.changed()

    def _run(self, job: CommandJob) -> int:
        """Run a command to its end; its exit code."""
        line = self.line
        assert line is not None
        with self._lock:
            if job.interrupted is not None:
                return 130
            job.process = process = subprocess.Popen(
                [*line.program, *job.words, "--json"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, **line.environment},
                start_new_session=True,  # Ctrl-C in the terminal is for the studio, and so that all of it can be killed
            )
            if self.closed:
                self._interrupt(job)
        assert process.stdout is not None
        watch = threading.Thread(target=self._kill_late, args=(job, process), daemon=True, name="command's end")
        watch.start()
        for text in _lines(process.stdout):
            facts = _facts(text)
            if facts is None:
                self._say(job, text)
            else:
                job.paths = {str(name): str(path) for name, path in facts["paths"].items()}
        return process.wait()

    def _say(self, job: CommandJob, line: str) -> None:
        job.dropped += len(job.lines) == MAX_LINES
        job.lines.append(printable(line.expandtabs(), MAX_LINE))
        job.progress = _progress(line[:MAX_LINE]) or job.progress
        self.changed()

    def _interrupt(self, job: CommandJob) -> None:
        job.interrupted = time.monotonic()
        if job.process is not None and job.process.poll() is None:
            job.process.send_signal(signal.SIGINT)

    def _kill_late(self, job: CommandJob, process: subprocess.Popen[bytes]) -> None:
        """Kill what has not ended some time after it was interrupted, with all that it has started."""
        while process.poll() is None:
            time.sleep(0.1)
            if job.interrupted is not None and time.monotonic() - job.interrupted > GRACE:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """The lines of a process as they come; of one that never ends, the last million bytes."""
    rest = b""
    while part := os.read(stream.fileno(), 1 << 16):
        *whole, rest = re.split(rb"[\r\n]+", (rest + part)[-(1 << 20) :])
        yield from (line.decode("utf-8", "replace") for line in whole if line.strip())
    if rest.strip():
        yield rest.decode("utf-8", "replace")


def _facts(line: str) -> dict[str, Any] | None:
    """What the line holds that --json adds, which nobody reads; None of another line."""
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("paths"), dict) and "options" in found else None


def _progress(line: str) -> CommandProgress | None:
    """What a line says of how far it is: of its last stage that has begun."""
    found: Iterable[re.Match[str]] = _PROGRESS.finditer(line)
    counts = [(int(m[1].replace(",", "")), int(m[2].replace(",", "")), m[3]) for m in found]
    begun = [c for c in counts if c[0]] or counts
    if not begun:
        return None
    done, of, rate = begun[-1]
    eta = _ETA.search(line)
    return CommandProgress(done, of, rate, eta[1] if eta else "")
