"""The bytes of bodies in memory: those that arrive, and those that wait for a decoder."""

from __future__ import annotations

import asyncio
import heapq
import itertools


class Memory:
    """The bytes that bodies may take. Where there is no more, the oldest body that wants some goes beyond, and no other
    one until it is gone: so the excess is one body's, and bodies never wait for each other in a circle.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._beyond: Hold | None = None
        self._waiting: list[tuple[int, Hold, int, asyncio.Future[None]]] = []  # heap: age, who, bytes, ticket
        self._ages = itertools.count()
        self._room = asyncio.Event()
        self._room.set()

    def hold(self) -> Hold:
        """Room for one body, none so far."""
        return Hold(self, next(self._ages))

    async def room(self) -> None:
        """Wait until less than half is used: then a body that is asked for will hardly wait when it comes."""
        await self._room.wait()

    def take_now(self, hold: Hold, size: int) -> bool:
        """See Hold.grow_now."""
        if hold is self._beyond or (self._used + size <= self._size and not self._waiting):
            self._change(size)
            return True
        return False

    async def take(self, hold: Hold, size: int) -> None:
        """See Hold.grow."""
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (hold.age, hold, size, ticket))
        self._serve()
        try:
            await ticket
        except asyncio.CancelledError:
            if not ticket.cancelled():  # granted in the same moment
                self._change(-size)
            self._serve()
            raise

    def leave(self, hold: Hold) -> None:
        """See Hold.release."""
        if hold is self._beyond:
            self._beyond = None
        self._change(-hold.size)
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            _, hold, size, ticket = self._waiting[0]
            if not ticket.done():
                if self._used + size > self._size:
                    if self._beyond is not None:
                        return
                    self._beyond = hold
                self._change(size)
                ticket.set_result(None)
            heapq.heappop(self._waiting)

    def _change(self, size: int) -> None:
        self._used += size
        if self._used < self._size / 2:
            self._room.set()
        else:
            self._room.clear()


class Hold:
    """The bytes that one body takes."""

    def __init__(self, memory: Memory, age: int) -> None:
        self._memory, self.age = memory, age
        self.size = 0

    def grow_now(self, size: int) -> bool:
        """Take room for so many bytes in all, if there is and nobody waits for it."""
        if self._memory.take_now(self, size - self.size):
            self.size = size
            return True
        return False

    async def grow(self, size: int) -> None:
        """Wait until there is room for so many bytes in all."""
        await self._memory.take(self, size - self.size)
        self.size = size

    def release(self) -> None:
        """The body is gone."""
        self._memory.leave(self)
        self.size = 0
