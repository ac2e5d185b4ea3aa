"""What people see while a job runs."""

from __future__ import annotations

import contextlib
import doctest
import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from pipelines.runtime import progress
from pipelines.runtime.channel import ProgressActor
from pipelines.runtime.progress import EARLY, Counts, Meter, ProgressDisplay, format_duration

ROOT = Path(__file__).parents[1]


def test_durations_in_words() -> None:
    assert doctest.testmod(progress).failed == 0
    assert [format_duration(s) for s in (0, 59.4, 59.6, 3599.6, 86400)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "1 h 0 min",
        "24 h 0 min",
    ]


def test_meters_lose_nothing_between_threads_and_progress_actor() -> None:
    progress_actor = ProgressActor()
    lock = threading.Lock()

    def send(counts: Counts, hosts: dict[str, int]) -> None:
        with lock:
            progress_actor.add(counts, hosts)

    meters = [Meter(send) for _ in range(2)]

    def work(meter: Meter) -> None:
        for i in range(3000):
            meter("fetch", "success" if i % 3 else "dns", f"h{i % 5}")

    threads = [threading.Thread(target=work, args=(m,)) for m in meters for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for m in meters:
        m.flush()
    counts, hosts = progress_actor.counts()
    assert counts == {("fetch", "success"): 8000, ("fetch", "dns"): 4000}
    assert len(hosts) == 3 and all(n == 800 for _, n in hosts)  # only failures count for a host


def test_a_meter_hands_on_each_second_by_itself() -> None:
    sent = threading.Event()
    meter = Meter(lambda counts, hosts: sent.set())
    assert not sent.wait(0.2)
    meter("fetch", "success", "")
    assert sent.wait(5)


def test_the_actor_keeps_the_worst_hosts_and_the_first_error() -> None:
    progress_actor = ProgressActor()
    for i in range(30):
        progress_actor.add({}, {f"{i}-{j}": 1 for j in range(100)} | {"worst": 5})
    assert progress_actor.counts()[1][0] == ("worst", 150)
    assert len(progress_actor._hosts) <= 2100
    assert progress_actor.failure() is None
    first = ValueError("first")
    progress_actor.fail(first)
    progress_actor.fail(ValueError("second"))
    assert progress_actor.failure() is first


def counts(good: int, bad: int, embedded: int = 0) -> Counts:
    return {("fetch", "success"): good, ("fetch", "http_404"): bad, ("embed", "success"): embedded}


def test_lines_where_it_is_no_terminal() -> None:
    out = io.StringIO()
    screen = ProgressDisplay(out, 1000, 0, True)
    for n in range(5):
        screen.show(counts(n, 0), [])
    assert out.getvalue() == ""  # not more often than each ten seconds
    screen.show(counts(900, 100, 900), [], end=True)
    line = out.getvalue()
    assert line.count("\n") == 1 and "\r" not in line
    assert line.startswith("fetch  1,000/1,000  ") and "90.0% ok     embed  900/900  " in line


def test_only_what_is_left_to_do_is_shown() -> None:
    for rows, images, embeds, shown in (
        (10, 0, False, "fetch  10/10"),
        (0, 7, True, "embed  7/7"),
    ):
        out = io.StringIO()
        done: Counts = {("fetch", "success"): 10} if rows else {("embed", "success"): 7}
        ProgressDisplay(out, rows, images, embeds).show(done, [], end=True)
        assert out.getvalue().startswith(shown)
        assert ("embed" in out.getvalue()) == embeds and ("fetch" in out.getvalue()) == bool(rows)


def test_time_left_is_by_the_slower_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out = io.StringIO()
    screen = ProgressDisplay(out, 1000, 0, True)
    for second in range(1, 31):
        now[0] += 1
        screen.show(counts(20 * second, 0, 5 * second), [])
    last = out.getvalue().splitlines()[-1]
    assert "fetch  600/1,000  20 rows/s  100.0% ok" in last and "embed  150/1,000  5 img/s" in last
    assert last.endswith("eta 2 min 50 s")  # 850 images at 5 a second


def test_time_left_counts_embedding_before_it_has_begun_and_when_all_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out = io.StringIO()
    screen = ProgressDisplay(out, 1000, 0, True, shard=125)

    def line(good: int, embedded: int) -> str:
        now[0] += 10
        screen.show(counts(good, 0, embedded), [])
        return out.getvalue().splitlines()[-1]

    assert line(0, 0).endswith("0 img/s")  # nothing is known yet
    line(10, 0)
    assert line(110, 0).endswith("eta 1 min 29 s + embedding")  # 890 rows at 10 a second
    line(210, 1)
    assert line(310, 201).endswith("eta 1 min 16 s")  # 690 rows at 10 a second, then a shard of 125 images at 18
    assert line(1000, 401).endswith("eta 31 s")
    assert line(1000, 600).endswith("eta 21 s")


def test_a_run_is_timed_without_its_start_and_its_slow_last_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    screen = ProgressDisplay(io.StringIO(), 100, 0, True)
    now[0] += 20  # Ray starts, models are loaded
    for tenth in range(1, 10):
        now[0] += 1
        screen.show(counts(10 * tenth, 0, 10 * tenth), [])
    now[0] += 30  # a server that does not answer
    screen.show(counts(100, 0, 100), [], end=True)
    fetch = screen.timing()["fetch"]
    assert 0.09 <= fetch["each"] <= 0.11  # ten rows a second; not 59 s a hundred
    assert 19 <= fetch["begin"] <= 20 and fetch["tail"] == 30 and fetch["count"] == 100
    assert ProgressDisplay(io.StringIO(), 100, 0, True).timing() == {}


@pytest.mark.parametrize(("rows", "at"), [(10_000, EARLY), (30, 30)])
def test_a_broken_list_is_said_at_once_and_once(rows: int, at: int) -> None:
    out = io.StringIO()
    screen = ProgressDisplay(out, rows, 0, True)
    screen.show(counts(1, at - 2), [("a", 9), ("b", 2)])
    assert out.getvalue() == ""
    for _ in range(3):
        screen.show(counts(1, at - 1), [("a", 9), ("b", 2)])
    share = f"{(at - 1) / at:.0%}"
    told = f"warning: {share} of the first {at} rows failed: http_404 {at - 1}    hosts: a 9 · b 2\n"
    assert out.getvalue() == told


def test_half_of_the_rows_may_fail_in_silence() -> None:
    out = io.StringIO()
    ProgressDisplay(out, 10_000, 0, True).show(counts(EARLY // 2, EARLY // 2), [])
    assert out.getvalue() == ""


@pytest.mark.parametrize("columns", [40, 200, 0])
def test_a_terminal_is_rewritten_in_place(columns: int) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w") as out:
        screen = ProgressDisplay(out, 100, 0, True)
        screen.show(counts(10, 0, 5), [])
        screen.say("a line of its own")
        screen.show(counts(100, 0, 100), [], end=True)
    shown = ""
    with contextlib.suppress(OSError):  # the other end is closed, and all is read
        while piece := os.read(ours, 10_000):
            shown += piece.decode()
    os.close(ours)
    first, line, last = shown.partition("\r\x1b[K")[0], "a line of its own\r\n", shown.rpartition("\r")[2]
    assert first.startswith("\r") and len(first) == (columns or 80)
    assert line in shown and shown.endswith("\r\n") and last == "\n"


def test_libraries_words_go_to_a_log_and_ours_to_the_terminal(tmp_path: Path) -> None:
    """Python's print, a child's output and what C code writes to the descriptors; afterwards all is as it was."""
    code = f"""
import os, subprocess, sys
from pathlib import Path
from pipelines.runtime.progress import redirect_output
print("before")
with redirect_output(Path({str(tmp_path)!r}) / "logs" / "ray.log") as out:
    print("a library prints")
    print("a library warns", file=sys.stderr)
    os.write(1, b"C writes to 1\\n"), os.write(2, b"C writes to 2\\n")
    subprocess.run(["echo", "a child speaks"])
    print("ours", file=out)
print("after")
try:
    with redirect_output(Path({str(tmp_path)!r}) / "logs" / "ray.log") as out:
        raise ValueError
except ValueError:
    print("after an error", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "before\nafter\n"
    assert done.stderr == "ours\nafter an error\n"
    log = (tmp_path / "logs" / "ray.log").read_text()
    for line in ("a library prints", "a library warns", "C writes to 1", "C writes to 2", "a child speaks"):
        assert log.count(line) == 1
