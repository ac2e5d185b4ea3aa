"""What a command and everything that it starts use: CPU, time, memory. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Used:
    """What a command used."""

    cpu: float  # seconds, user and system, of all its processes
    wall: float  # seconds
    peak: float  # MB resident, the most at one time; shared pages count once
    output: str  # what it printed
    memory: list[tuple[float, float]] = field(repr=False)  # (time.time(), MB), twice a second


def run(command: Sequence[str], environment: Mapping[str, str], words: Path, seconds: float = 3600) -> Used:
    """Run a command to its end; its output goes to the file `words`. RuntimeError where it fails.

    Orphans among its descendants become our children, so that none is missed in the sum.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    memory: list[tuple[float, float]] = []
    ours = {p.pid for p in psutil.Process().children()}  # servers
    began = time.perf_counter()
    with open(words, "wb") as out:
        child = subprocess.Popen(
            command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
        stop = threading.Event()
        watch = threading.Thread(target=_watch, args=(child.pid, memory, stop), daemon=True)
        watch.start()
        timer = threading.Timer(seconds, child.kill)
        timer.start()
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - began
        timer.cancel()
        stop.set()
        watch.join()
    child.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait for it again
    cpu = usage.ru_utime + usage.ru_stime + _orphans(ours)
    output = words.read_text(errors="replace")
    if child.returncode:
        raise RuntimeError(f"{command[:6]} ended with {child.returncode}: {output[:4000]} ... {output[-1000:]}")
    return Used(cpu, wall, max((mb for _, mb in memory), default=0.0), output, memory)


def _orphans(ours: set[int]) -> float:
    """CPU seconds of what the command left behind: waited for now."""
    total = 0.0
    for process in psutil.Process().children():
        if process.pid not in ours:
            _, _, usage = os.wait4(process.pid, 0)
            total += usage.ru_utime + usage.ru_stime
    return total


def _watch(pid: int, memory: list[tuple[float, float]], stop: threading.Event) -> None:
    while not stop.wait(0.5):
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(pid)
            memory.append((time.time(), _megabytes([top, *top.children(recursive=True)])))


def _megabytes(processes: list[psutil.Process]) -> float:
    """Resident memory: what is each process's own, and what they share once. Of one process, its RSS."""
    own = shared = 0
    for process in processes:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
            sizes = {line.split()[0]: int(line.split()[1]) for line in lines}
            own += sizes["Private_Clean:"] + sizes["Private_Dirty:"]
            shared = max(shared, sizes["Shared_Clean:"] + sizes["Shared_Dirty:"])
    return (own + shared) / 1024
