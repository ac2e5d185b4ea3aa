"""Streams of server-sent events: how many may be open, and what wakes those that wait for news."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator

from fastapi import Depends, Request

from studio.gate import address_of
from studio.queue import QueueFull

MAX_STREAMS = 64
"""Streams of events to one address, and four times as many to all: each is written at every change."""


class EventStreams:
    """Counts the streams that are open, of all parts of the application together."""

    def __init__(self) -> None:
        self.open: Counter[str] = Counter()  # by address

    @contextlib.contextmanager
    def take(self, address: str) -> Iterator[None]:
        """While events are sent to somebody. Raises QueueFull where too many are."""
        if self.open[address] >= MAX_STREAMS:
            raise QueueFull(f"{MAX_STREAMS} streams of events to your address are open already", own=True)
        if self.open.total() >= 4 * MAX_STREAMS:
            raise QueueFull(f"{4 * MAX_STREAMS} streams of events are open already")
        self.open[address] += 1
        try:
            yield
        finally:
            self.open[address] -= 1
            if not self.open[address]:
                del self.open[address]


class ChangeSignal:
    """Wakes those who wait for a change, which comes from any thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._next = asyncio.Event()  # set at the next change, and then replaced

    def next(self) -> asyncio.Event:
        """Is set at the next change. To be taken before looking, so that none is missed."""
        self._loop = asyncio.get_running_loop()
        return self._next

    def __call__(self) -> None:
        """From any thread: something has changed."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody looks any more
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        change, self._next = self._next, asyncio.Event()
        change.set()


async def _stream(request: Request) -> AsyncIterator[None]:
    streams: EventStreams = request.app.state.streams
    with streams.take(address_of(request.scope)):
        yield


OneStream = Depends(_stream)
"""Takes a place among the streams until the last event was sent."""
