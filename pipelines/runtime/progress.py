"""What people see while a job runs: workers count, lines on the terminal say how far it is and how long it takes."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from curate.store.files import open_log
from pipelines.terminal import CLEAR, RETURN, SafeStream, safe_stream

Counts = dict[tuple[str, str], int]
"""(stage, outcome) -> rows."""

EARLY = 500
"""Rows after which a failure rate over one half is said at once: the list, the network or the resolver is broken."""

LINE_SECONDS = "TASTEMAKER_PROGRESS_SECONDS"
"""Environment variable: how often a command that writes to no terminal says how far it is. Default: 10."""


def line_seconds() -> float:
    """Seconds between two lines about progress, where there is no terminal."""
    try:
        return float(os.environ.get(LINE_SECONDS, "10"))
    except ValueError:
        return 10.0


class Meter:
    """Counts rows in a worker and hands them on once a second, from a thread of its own."""

    def __init__(self, send: Callable[[Counts, dict[str, int]], None]) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._hosts: Counter[str] = Counter()
        threading.Thread(target=self._loop, daemon=True, name="meter").start()

    def __call__(self, stage: str, outcome: str, host: str) -> None:
        with self._lock:
            self._counts[stage, outcome] += 1
            if outcome != "success" and host:
                self._hosts[host] += 1

    def flush(self) -> None:
        """Hand on what has been counted since the last time."""
        with self._lock:
            counts, hosts = dict(self._counts), dict(self._hosts.most_common(20))
            self._counts.clear()
            self._hosts.clear()
        if counts:
            self._send(counts, hosts)

    def _loop(self) -> None:
        while True:
            time.sleep(1)
            self.flush()


class ProgressDisplay:
    """Draws the progress line: rewritten in place on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, out: IO[str], rows: int, images: int, embeds: bool, shard: int = 0) -> None:
        self._out = out
        self._shard = shard  # rows of one: its images are embedded when all of it is fetched
        self._rows = rows  # to fetch
        self._images = images  # fetched before, to embed
        self._embeds = embeds
        self._began = self._last = time.monotonic()
        self._seen: dict[str, list[tuple[float, int]]] = {}
        self._live = out.isatty()
        self._every = line_seconds()
        self._warned = False

    def show(self, counts: Counts, hosts: list[tuple[str, int]], end: bool = False) -> None:
        """Show the counts so far."""
        now = time.monotonic()
        outcomes = Counter({outcome: n for (stage, outcome), n in counts.items() if stage == "fetch"})
        del outcomes["rejected_early"]  # as it was asked for
        rows = outcomes.total()
        if not self._warned and rows and rows >= min(EARLY, self._rows):
            self._warned = True
            failed = rows - outcomes.pop("success", 0)
            if failed > rows / 2:
                reasons = " · ".join(f"{reason} {n}" for reason, n in outcomes.most_common(3))
                worst = "    hosts: " + " · ".join(f"{host} {n}" for host, n in hosts) if hosts else ""
                self.say(f"warning: {failed / rows:.0%} of the first {rows:,} rows failed: {reasons}{worst}")

        line = self._line(counts, now, end)  # each time, shown or not: rates need to see when rows come
        if not end and not self._live and now - self._last < self._every:
            return
        self._last = now
        if self._live:
            width = 80  # where the terminal does not say, or is gone
            with contextlib.suppress(OSError):
                width = os.get_terminal_size(self._out.fileno()).columns or width
            self._out.write(RETURN)
            self._out.write(line[: width - 1].ljust(width - 1) + ("\n" if end else ""))
        else:
            self._out.write(line + "\n")
        self._out.flush()

    def say(self, text: str) -> None:
        """A line of its own, above the progress line."""
        if self._live:
            self._out.write(CLEAR)
        self._out.write(text + "\n")
        self._out.flush()

    def _line(self, counts: Counts, now: float, end: bool) -> str:
        fetched = sum(n for (stage, _), n in counts.items() if stage == "fetch")
        good = counts.get(("fetch", "success"), 0)
        embedded = counts.get(("embed", "success"), 0)
        parts, eta = [], ""
        fetching = 0.0  # seconds until all is fetched
        if self._rows:
            early = counts.get(("fetch", "rejected_early"), 0)
            share = f"  {good / (fetched - early):.1%} ok" if fetched > early else ""
            share += f"  {early / fetched:.1%} rejected early" if early else ""
            rate = self._rate("fetch", fetched, now)
            parts.append(f"fetch  {fetched:,}/{self._rows:,}  {format_rate(rate, 'rows')}{share}")
            fetching = (self._rows - fetched) / rate if rate else 0.0
            eta = format_duration(fetching) if rate else ""
        if self._embeds:
            images = self._images + (round(self._rows * good / fetched) if fetched else self._rows)
            rate = self._rate("embed", embedded, now)
            parts.append(f"embed  {embedded:,}/{images:,}  {format_rate(rate, 'img')}")
            left = max(0, images - embedded)
            if rate:  # both at once, and then the images of the shard that was fetched last
                last = min(left, self._shard) if fetching else 0
                eta = format_duration(max(left / rate, fetching + last / rate)) if eta or not self._rows else ""
            elif left and eta:
                eta += " + embedding"
        if end:
            parts.append(format_duration(now - self._began))
        elif eta:
            parts.append(f"eta {eta}")
        return "     ".join(parts)

    def _rate(self, stage: str, count: int, now: float) -> float:
        """Rows a second, from when the stage's first rows were seen to when its last ones were."""
        if not count:
            return 0.0
        seen = self._seen.setdefault(stage, [(max(self._began, now - 1.0), 0)])
        if count != seen[-1][1]:
            seen.append((now, count))
            if len(seen) > 4000:  # of a long run; the first and the last say the rate
                del seen[1:-1:2]
        return count / max(seen[-1][0] - seen[0][0], 1e-3)

    def timing(self) -> dict[str, dict[str, float]]:
        """How the run went by the clock, for a projection: of fetch and embed, `begin` (seconds after the start), the
        seconds that the first nine tenths of the rows took for `each`, and the `tail` of the others; those wait for
        slow servers, of which there are not more at a time in a longer list."""
        found = {}
        for stage, seen in self._seen.items():
            (first, _), (last, count) = seen[0], seen[-1]
            most = next(at for at, done in seen if done >= 0.9 * count)
            each = (most - first) / (0.9 * count)
            found[stage] = {"begin": first - self._began, "each": each, "tail": last - most, "count": count}
        return found


class ProgressBar:
    """One line about work of known length: how much is done, how fast, how long it still takes.

    unit: of what is counted; "B" are bytes, shown as MB.
    """

    def __init__(self, out: IO[str], what: str, total: int, unit: str = "img") -> None:
        self._out, self._what, self._total, self._unit = out, what, total, unit
        self._began = self._last = time.monotonic()
        self._done, self._live = 0, out.isatty()
        self._every = 0.2 if self._live else line_seconds()

    def at(self, done: int, total: int) -> None:
        """So many are done, of so many as is known by now."""
        self._total = total
        self(done - self._done)

    def __call__(self, more: int) -> None:
        """So many more are done."""
        self._done += more
        now = time.monotonic()
        if now - self._last < self._every:
            return
        self._last = now
        rate = self._done / (now - self._began)
        left = format_duration((self._total - self._done) / rate) if rate else "unknown"
        count = f"{self._done:,}/{self._total:,}"
        if self._unit == "B":
            count = f"{self._done / 1e6:,.1f}/{self._total / 1e6:,.1f} MB"
        text = f"{self._what}  {count}  {format_rate(rate, self._unit)}  eta {left}"
        self._out.write(CLEAR if self._live else "")
        self._out.write(text if self._live else f"{text}\n")
        self._out.flush()

    def clear(self) -> None:
        """Take the line off a terminal: what is done is said by others."""
        self._out.write(CLEAR if self._live else "")
        self._out.flush()

    def end(self, more: str = "") -> None:
        """The last line: all of it, and how long it took, or that there was nothing left to do."""
        seconds = time.monotonic() - self._began
        self._out.write(CLEAR if self._live else "")
        done = f"{self._done:,} in {format_duration(seconds)}" if self._done else f"{self._total:,}, made before"
        self._out.write(f"{self._what}  {done}{more}\n")
        self._out.flush()


def format_duration(seconds: float) -> str:
    """A duration as people say it.

    >>> format_duration(8), format_duration(100), format_duration(7300)
    ('8 s', '1 min 40 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def format_rate(rate: float, unit: str) -> str:
    """A rate per second as people say it; of slow work, how long one takes.

    >>> [format_rate(r, "img") for r in (1234.5, 5.0, 0.015, 0.0)]
    ['1,234 img/s', '5 img/s', '66.7 s/img', '0 img/s']
    >>> format_rate(2_345_000, "B")
    '2.3 MB/s'
    """
    if unit == "B":
        return f"{rate / 1e6:,.1f} MB/s"
    if 0 < rate < 1:
        return f"{1 / rate:.1f} s/{unit.removesuffix('s')}"
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"


@contextlib.contextmanager
def redirect_output(log: Path) -> Iterator[IO[str]]:
    """Our own stream to the terminal, while what libraries write goes to a log file; Ray's C++ parts write to the
    descriptors themselves."""
    with open_log(log) as f:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = [os.dup(1), os.dup(2)]
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    lost = [(stream, stream.write_error) for stream in (sys.stdout, sys.stderr) if isinstance(stream, SafeStream)]
    for stream, _ in lost:
        stream.write_error = None  # the log can be written, whatever became of the terminal
    terminal = safe_stream(os.dup(saved[1]), sys.stderr)
    try:
        yield terminal  # type: ignore[misc]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, before in enumerate(saved, 1):
            os.dup2(before, fd)
            os.close(before)
        for stream, error in lost:
            stream.write_error = error
        terminal.close()
        if isinstance(sys.stderr, SafeStream):  # the same descriptor: what was lost here counts there
            sys.stderr.write_error = sys.stderr.write_error or terminal.write_error
