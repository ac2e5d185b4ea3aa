"""One computation per key for all who ask at once, its outcome kept for a time."""

from __future__ import annotations

import asyncio
import copy
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from curate.ledger.schema import RowError

T = TypeVar("T")


class CoalescingCache(Generic[T]):
    """A cache of what an async function gives for a key; the oldest outcomes are forgotten first.

    A RowError is an outcome like any other, and everybody gets a copy of their own. Other exceptions are not kept.

    Args:
        compute: the function.
        keep: seconds for which an outcome holds.
        size: the most that all outcomes may weigh together.
        weight: of one outcome.
    """

    def __init__(
        self,
        compute: Callable[[str], Awaitable[T]],
        keep: Callable[[T | RowError], float],
        size: int,
        weight: Callable[[T | RowError], int] = lambda outcome: 1,
    ) -> None:
        self._compute, self._keep, self._size, self._weight = compute, keep, size, weight
        self._weighs = 0
        self._running: dict[str, asyncio.Task[T | RowError]] = {}
        self._kept: OrderedDict[str, tuple[float, T | RowError]] = OrderedDict()

    async def get(self, key: str) -> T:
        """The outcome for a key: kept, under way, or computed now. A caller who is cancelled stops nobody else."""
        until, outcome = self._kept.get(key, (0.0, None))
        if outcome is None or until <= time.monotonic():
            task = self._running.get(key)
            if task is None:
                task = self._running[key] = asyncio.create_task(self._run(key))
                task.add_done_callback(lambda t: t.cancelled() or t.exception())  # seen, also where all have left
            outcome = await asyncio.shield(task)
        if isinstance(outcome, RowError):
            raise copy.copy(outcome)
        return outcome

    async def _run(self, key: str) -> T | RowError:
        outcome: T | RowError
        try:
            try:
                outcome = await self._compute(key)
            except RowError as e:
                outcome = e.with_traceback(None)
            if key in self._kept:
                self._weighs -= self._weight(self._kept.pop(key)[1])
            self._kept[key] = (time.monotonic() + self._keep(outcome), outcome)
            self._weighs += self._weight(outcome)
            while self._weighs > self._size and len(self._kept) > 1:
                self._weighs -= self._weight(self._kept.popitem(last=False)[1][1])
            return outcome
        finally:
            del self._running[key]

    async def close(self) -> None:
        """Stop what is under way."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
