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
        self._beyond: Reservation | None = None
        self._waiting: list[tuple[int, Reservation, int, asyncio.Future[None]]] = []  # heap: age, who, bytes, ticket
        self._ages = itertools.count()
        self._half_free = asyncio.Event()
        self._half_free.set()

    def reserve(self) -> Reservation:
        """Room for one body, none so far."""
        return Reservation(self, next(self._ages))

    async def wait_until_half_free(self) -> None:
        """Then a body that is asked for will hardly wait when it comes."""
        await self._half_free.wait()

    def take_now(self, reservation: Reservation, size: int) -> bool:
        """Take so many bytes more if they are free and nobody waits for them."""
        free = self._used + size <= self._size and not self._waiting
        if free or reservation is self._beyond:
            self._change(size)
            return True
        return False

    async def take(self, reservation: Reservation, size: int) -> None:
        """Wait for so many bytes more, behind older bodies."""
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (reservation.age, reservation, size, ticket))
        self._serve()
        try:
            await ticket
        except asyncio.CancelledError:
            if not ticket.cancelled():  # granted in the same moment
                self._change(-size)
            self._serve()
            raise

    def give_back(self, reservation: Reservation) -> None:
        """All that a body took is free again."""
        if reservation is self._beyond:
            self._beyond = None
        self._change(-reservation.size)
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            _, reservation, size, ticket = self._waiting[0]
            if not ticket.done():
                if self._used + size > self._size:
                    if self._beyond is not None:
                        return
                    self._beyond = reservation
                self._change(size)
                ticket.set_result(None)
            heapq.heappop(self._waiting)

    def _change(self, size: int) -> None:
        self._used += size
        if self._used < self._size / 2:
            self._half_free.set()
        else:
            self._half_free.clear()


class Reservation:
    """The bytes that one body takes."""

    def __init__(self, memory: Memory, age: int) -> None:
        self._memory, self.age = memory, age
        self.size = 0

    async def grow(self, size: int, clock: asyncio.Timeout) -> None:
        """Wait until there is room for so many bytes in all. The clock of a timeout stands still meanwhile."""
        if not self._memory.take_now(self, size - self.size):
            loop = asyncio.get_running_loop()
            left = (clock.when() or 0.0) - loop.time()
            clock.reschedule(None)
            await self._memory.take(self, size - self.size)
            clock.reschedule(loop.time() + left)
        self.size = size

    def release(self) -> None:
        """The body is gone."""
        self._memory.give_back(self)
        self.size = 0
