"""How many requests a server gets at a time: as many as make it answer more of them a second, and no more."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import AsyncIterator

FIRST, MOST = 8, 256
"""Requests at a time at first, and at most."""

DOUBLE = 1.6
"""How many times the answers a second twice as many requests must bring for the number to double again."""

STEP, MORE = 1.25, 1.05
"""Then the number grows by smaller steps, as long as each brings so many times the answers a second."""

SPARE = 1.15
"""Requests at a time over those that keep a server busy, so that the next one is there when an answer leaves."""

_WINDOW = 16  # answers, at least, over which a rate is taken
_HOLD = 20  # windows until more are tried again: a server may have been given more
_HOLD_AFTER_REFUSAL = 5


class SlotsClosed(Exception):
    """No more requests are to begin."""


class Slots:
    """Places for requests; whoever waits longest is next.

    The number doubles as long as the server then gives DOUBLE times the answers a second, measured over as many answers
    as say it; then it is what that rate needs, and SPARE, and grows by STEP as long as that brings MORE. A server that
    says it has too much (429, 503) gets 0.7 times as many, and none at all until the time that it names. With `fixed`
    the number stays.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.limit = fixed or FIRST
        self.active = 0
        self._fixed, self._closed = fixed is not None, False
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._paused_until = 0.0
        self._changed = 0.0  # when the limit changed last
        self._answers, self._spent, self._any = 0, 0.0, False  # since the limit changed, or since it was full
        self._before: tuple[int, float] | None = None  # the limit before this one, and its rate
        self._ramping, self._hold = True, 0

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[float]:
        """A place for one request, or SlotsClosed; gives when it began, as the loop's clock has it."""
        loop = asyncio.get_running_loop()
        while not self._closed and (self.active >= self.limit or loop.time() < self._paused_until):
            waiter = loop.create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                self._wake()
                raise
        if self._closed:
            raise SlotsClosed
        self.active += 1
        try:
            yield loop.time()
        finally:
            self.active -= 1
            self._wake()

    def close(self) -> None:
        """Whoever waits for a place, or asks for one from now on, gets SlotsClosed."""
        self._closed = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def pause(self, seconds: float) -> None:
        """No request begins for so long."""
        loop = asyncio.get_running_loop()
        self._paused_until = max(self._paused_until, loop.time() + seconds)
        self._answers, self._spent = 0, 0.0
        loop.call_at(self._paused_until + 0.001, self._wake)

    def overloaded(self, began: float) -> None:
        """The server refused a request, which began then, because it has too many."""
        if self._fixed or began < self._changed or not self._any:  # sent before it was lowered, or the server is away
            return
        self._set(max(1, int(0.7 * self.limit)))
        self._before, self._ramping, self._hold = None, False, _HOLD_AFTER_REFUSAL

    def answered(self, began: float) -> None:
        """A request that began then was answered."""
        if self._fixed:
            return
        self._any = True
        if not self._waiters:  # it is we who are slow
            self._answers, self._spent = 0, 0.0
            return
        self._answers += 1
        if self._answers <= self.limit:  # of when fewer were under way
            return
        self._spent += asyncio.get_running_loop().time() - began
        count = self._answers - self.limit
        if count >= max(_WINDOW, (1 if self._ramping else 2) * self.limit):
            rate = count * self.limit / max(self._spent, 1e-6)  # Little's law: answers may come in bursts
            self._answers, self._spent = 0, 0.0
            self._judge(rate)

    def _judge(self, rate: float) -> None:
        """Go on, or back, by the rate of this number of requests."""
        if self._hold > 0:
            self._hold -= 1
            return
        if self._before is None:
            self._before = self.limit, rate
            self._set(self._more())
            return
        level, slower = self._before
        gain = rate / slower
        if gain >= (DOUBLE if self._ramping else MORE):
            self._before = self.limit, rate
            self._set(self._more())
        elif self._ramping:  # as many as the rate grew by are busy
            self._before, self._ramping, self._hold = None, False, 0 if gain >= MORE else _HOLD
            self._set(min(self.limit, math.ceil(level * max(1.0, gain) * SPARE) + 1))
        else:
            self._before, self._hold = None, _HOLD
            self._set(level)

    def _more(self) -> int:
        return min(MOST, 2 * self.limit if self._ramping else math.ceil(STEP * self.limit))

    def _set(self, limit: int) -> None:
        self.limit, self._changed = limit, asyncio.get_running_loop().time()
        self._answers, self._spent, self._any = 0, 0.0, False
        self._wake()

    def _wake(self) -> None:
        if asyncio.get_running_loop().time() < self._paused_until:
            return
        free = self.limit - self.active
        while self._waiters and free > 0:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                free -= 1
