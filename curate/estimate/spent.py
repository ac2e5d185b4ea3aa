"""What a worker spends on a shard: seconds of CPU and GPU, requests, bytes. Records keep it under `spent`."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any


def cpu_seconds() -> float:
    """Of all threads of this process, and of children that have ended: user and system."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Spent:
    """Counts of one process, or of one shard in it, which a record takes as they are since the last time. CPU seconds
    are always the process's: shards that are under way together share them as it happens, so that sums over shards are
    right and single ones are not."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._cpu = cpu_seconds()

    def add(self, **amounts: float) -> None:
        """So much more of these."""
        with self._lock:
            self._counts.update(amounts)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def thread(self, name: str) -> Iterator[None]:
        """CPU seconds of this thread while the block runs, under a name."""
        began = time.thread_time()
        try:
            yield
        finally:
            self.add(**{name: time.thread_time() - began})

    @contextlib.contextmanager
    def model(self, name: str) -> Iterator[None]:
        """Seconds while the block runs, as `NAME seconds`, and as `NAME gpu` where it took memory of a GPU."""
        began, allocated = time.perf_counter(), _allocated()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self.add(**{f"{name} seconds": seconds})
            if _allocated() != allocated:
                self.add(**{f"{name} gpu": seconds})

    def take(self, **more: float) -> dict[str, float]:
        """What has been counted since the last time, with `cpu`, all CPU seconds of the process since then."""
        with self._lock:
            self._counts.update(more)  # type: ignore[arg-type]
            counts = dict(self._counts)
            self._counts.clear()
            now = cpu_seconds()
            cpu, self._cpu = now - self._cpu, now
        return {name: round(value, 6) for name, value in sorted({**counts, "cpu": cpu}.items())}


_CURRENT: ContextVar[Spent | None] = ContextVar("spent", default=None)


@contextlib.contextmanager
def counting(spent: Spent) -> Iterator[None]:
    """Have `count` add to this, in the block and in the tasks that it starts."""
    token = _CURRENT.set(spent)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def count(**amounts: float) -> None:
    """So much more of these, for whom it is done; for nobody, where nobody counts."""
    spent = _CURRENT.get()
    if spent is not None:
        spent.add(**amounts)


def of_models(counts: Mapping[str, float], images: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """What a pass over pixels took (`Spent.take`, with `decode`) told apart by model; `images` is how many each saw.

    Threads that decode run beside the models; what of the CPU is not theirs is shared among the models as their seconds
    are, but for those on a GPU, whose CPU time is that of waiting for it. The decoding is shared evenly.
    """
    decode = counts.get("decode", 0.0)
    seconds = {name: counts.get(f"{name} seconds", 0.0) for name in images}
    on_gpu = {name: counts.get(f"{name} gpu", 0.0) for name in images}
    all_seconds = sum(seconds.values()) or 1.0
    left, found = max(counts["cpu"] - decode, 0.0), {}
    for name, count in images.items():
        spent: dict[str, float] = {
            "images": count,
            "decode": decode / len(images),
            "cpu": left * seconds[name] / all_seconds,
        }
        spent |= {"seconds": seconds[name]} | ({"gpu": on_gpu[name]} if on_gpu[name] else {})
        found[name] = {k: round(v, 6) for k, v in spent.items()} | ({"device": _gpu()} if on_gpu[name] else {})
    return found


def total_spent(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs over a shard spent together: a retry's record says what the shard took in all."""
    total = dict(before or {}) | dict(now)
    for name, value in (before or {}).items():
        if isinstance(value, (int, float)) and isinstance(now.get(name, 0), (int, float)):
            total[name] = round(value + now.get(name, 0), 6)
    return total


def _allocated() -> int:
    """How often this process took memory of a GPU; 0 where torch is not loaded or has used none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))


def _gpu() -> str:
    torch = sys.modules["torch"]
    return str(torch.cuda.get_device_name())
