"""Decoding in processes that may die or hang, each of which is counted."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

HANGS = 5.0
"""Seconds for one case."""


@dataclass
class Report:
    """What became of the cases."""

    outcomes: dict[Any, Any] = field(default_factory=dict)  # case -> what the function returned
    deaths: list[Any] = field(default_factory=list)  # cases that ended the process
    hangs: list[Any] = field(default_factory=list)  # cases without an end in time

    def counted(self) -> Counter[Any]:
        """How often each outcome came."""
        return Counter(self.outcomes.values())


def run(function: Callable[..., Any], cases: Sequence[Any], *args: Any) -> Report:
    """function(case, *args) for each case, in a child that is replaced when it dies or hangs."""
    report, todo = Report(), list(cases)
    context = multiprocessing.get_context("spawn")
    while todo:
        ours, theirs = context.Pipe()
        child = context.Process(target=_work, args=(theirs, function, todo, args, sys.path), daemon=True)
        child.start()
        theirs.close()
        try:
            assert ours.poll(60) and ours.recv() == "ready"
            while todo:
                if not ours.poll(HANGS):
                    report.hangs.append(todo.pop(0))
                    break
                failed, outcome = ours.recv()
                assert not failed, f"{todo[0]!r}: {outcome}"
                report.outcomes[todo.pop(0)] = outcome
        except EOFError:
            report.deaths.append(todo.pop(0))
        finally:
            child.kill()
            child.join()
    return report


def _work(pipe: Connection, function: Callable[..., Any], cases: list[Any], args: tuple, path: list[str]) -> None:
    sys.path[:] = path
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff says a word on each
    pipe.send("ready")
    for case in cases:
        try:
            outcome = False, function(case, *args)
        except Exception as e:
            outcome = True, f"{type(e).__name__}: {e}"
        pipe.send(outcome)
    time.sleep(HANGS)  # until the parent has read all


def memory() -> int:
    """Bytes of this process now."""
    return _status("VmRSS")


def peak() -> int:
    """Bytes of this process at its largest since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Let `peak` start anew (Linux, proc(5): clear_refs)."""
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def _status(key: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))
