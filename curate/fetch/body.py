"""The body of an answer: read within bounds of size, memory and time, decompressed, or a reason why there is none.

`Memory` is the bytes of all bodies: those that arrive, and those that wait for a decoder.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import aiohttp
from multidict import CIMultiDictProxy

from curate.ledger.schema import FinalError, Reason, RejectedEarly, RowError

REDIRECTS = {301, 302, 303, 307, 308}

_FIRST_BYTES = 65_536  # that a body is first given; doubled as it grows
_PIECE = 262_144  # bytes that are decompressed at a time
_FIRST_LOOK = 512  # bytes of a body that are looked at; then twice as many, until they say enough
_DRAINED = 32_768  # bytes of a body nobody wants that are read all the same, so that the connection can be kept
_SLOW, _SLOW_AFTER = 1000.0, 5.0  # bytes per second that a body must bring, on the average of more than so many seconds

_REASONS = {404: Reason.HTTP_404, 429: Reason.HTTP_429, 4: Reason.HTTP_4XX, 5: Reason.HTTP_5XX}

_CODINGS = {  # IANA's HTTP Content Coding Registry, but for identity
    *("aes128gcm", "br", "compress", "x-compress", "dcb", "dcz", "deflate", "exi", "gzip", "x-gzip", "pack200-gzip"),
    "zstd",
}


@dataclass(frozen=True)
class BodyLimits:
    """What differs between fetching an image and fetching robots.txt."""

    max_bytes: int
    truncate: bool  # a longer body is cut there, not refused
    respect: frozenset[str]  # opt-out headers that end the row
    method: str = "GET"
    headers_only: bool = False  # nobody wants the body: it is not read, and a part of it will do
    look: Callable[[bytes], bool] | None = None
    """Sees the first bytes, and more of them, until it says that it has seen enough; what it raises ends the row."""


async def read_body(
    response: aiohttp.ClientResponse,
    limits: BodyLimits,
    opt_outs: Mapping[str, str],
    memory: Reservation,
    clock: asyncio.Timeout,
) -> bytes:
    """The body of an answer that has one to give, b"" for a redirect; RowError for all other answers.

    Args:
        response: with its headers read.
        limits: of this kind of request.
        opt_outs: what headers said against us so far, here and before redirects.
        memory: where room for the body is taken, as it comes: a length that is only promised takes nothing from others.
        clock: the timeout of the request; it stands still while the body waits for memory.
    """
    status = response.status
    if status not in REDIRECTS and status not in (200, 203) and not (limits.headers_only and status == 206):
        raise RowError(_REASONS.get(status) or _REASONS.get(status // 100) or Reason.PROTOCOL, f"status {status}")
    for signal, directive in opt_outs.items():
        if signal in limits.respect:
            raise RowError(Reason.OPTED_OUT, f"{signal}: {directive}")
    if status in REDIRECTS or limits.headers_only:
        return b""
    most, declared = limits.max_bytes, response.content_length
    if declared is not None and declared > most and not limits.truncate:
        raise RowError(Reason.TOO_LARGE, f"{declared} bytes declared, more than {most}")

    def seconds_left() -> float:
        return (clock.when() or 0.0) - asyncio.get_running_loop().time()

    async def have_room(needed: int) -> None:
        if needed > memory.size:
            await memory.grow(min(max(needed, 2 * memory.size, _FIRST_BYTES), most + 1), clock)

    coding = _coding(response.headers)
    inflate = _Inflate(coding) if coding else None
    pieces: list[bytes] = []
    look, next_look = limits.look, _FIRST_LOOK
    received = size = 0
    left_at_first = seconds_left()
    async for chunk in response.content.iter_any():
        received += len(chunk)
        while chunk:
            if inflate is None:
                piece, chunk = chunk, b""
            else:  # in a thread, and little by little: a few bytes can be a great many
                await have_room(min(size + _PIECE, most))
                piece, chunk = await asyncio.to_thread(inflate, chunk)
            size += len(piece)
            if size > most:
                if limits.truncate:
                    return b"".join([*pieces, piece])[:most]
                raise RowError(Reason.TOO_LARGE, f"more than {most} bytes")
            await have_room(size)
            pieces.append(piece)
            if look is not None and size >= next_look:
                try:
                    look = None if look(b"".join(pieces)) else look
                except RejectedEarly:
                    if declared is not None and declared - received <= _DRAINED:
                        await _drain(response, clock)
                    raise
                next_look = 2 * size
        if received > most and not limits.truncate:
            raise RowError(Reason.TOO_LARGE, f"more than {most} bytes")
        elapsed = left_at_first - seconds_left()  # without what was waited for memory
        if elapsed > _SLOW_AFTER and received < _SLOW * elapsed:
            raise RowError(Reason.TIMEOUT, f"{received} bytes in {elapsed:.0f} s")
    if inflate is not None and not inflate.complete:
        raise RowError(Reason.PROTOCOL, f"{coding} body cut short")
    return b"".join(pieces)


async def _drain(response: aiohttp.ClientResponse, clock: asyncio.Timeout) -> None:
    """Read what is left of a body, if it comes within a second: a connection with an answer in it can't be kept."""
    clock.reschedule(None)
    with contextlib.suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(1.0):
            async for _ in response.content.iter_any():
                pass


def _coding(headers: CIMultiDictProxy[str]) -> str:
    """How the body is encoded: gzip, x-gzip or deflate; "" where it is not, be it that the header names no coding.

    `none`, `UTF-8` and `binary` stand there on the web: browsers take such a body as it is.
    """
    named = [c.strip().lower() for c in ",".join(headers.getall("Content-Encoding", ())).split(",")]
    codings = [c for c in named if c in _CODINGS]
    if not codings:
        return ""
    if codings not in (["gzip"], ["x-gzip"], ["deflate"]):
        raise FinalError(Reason.PROTOCOL, f"Content-Encoding {', '.join(codings)[:40]!r} was not asked for")
    return codings[0]


class _Inflate:
    """Decompresses a body that came compressed although we asked for none, never much at a time."""

    def __init__(self, coding: str) -> None:
        self._stream = zlib.decompressobj(31) if coding != "deflate" else None

    def __call__(self, chunk: bytes) -> tuple[bytes, bytes]:
        """(some bytes, what is left of the chunk)."""
        if self._stream is None:  # "deflate" is zlib's format by the book and bare deflate by custom
            self._stream = zlib.decompressobj(15 if chunk[0] & 0x0F == 8 else -15)
        try:
            piece = self._stream.decompress(chunk, _PIECE)
        except zlib.error as e:
            raise RowError(Reason.PROTOCOL, f"broken compression: {e}") from e
        return piece, self._stream.unconsumed_tail

    @property
    def complete(self) -> bool:
        return self._stream is not None and self._stream.eof


# --------------------------------------------------------------------------------------------------------------- memory


class Memory:
    """The bytes that bodies may take. Where there is no more, the oldest body that wants some goes beyond, and no other
    one until it is gone: so the excess is one body's, and bodies never wait for each other in a circle.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 0
        self.beyond: Reservation | None = None
        self.waiting: list[tuple[int, Reservation, int, asyncio.Future[None]]] = []  # heap: age, who, bytes, ticket
        self.ages = itertools.count()
        self.half_free = asyncio.Event()  # then a body that is asked for will hardly wait when it comes
        self.half_free.set()

    def serve(self) -> None:
        """Let bodies that wait have what there is, the oldest first."""
        while self.waiting:
            _, reservation, size, ticket = self.waiting[0]
            if not ticket.done():
                if self.used + size > self.size:
                    if self.beyond is not None:
                        return
                    self.beyond = reservation
                self.change(size)
                ticket.set_result(None)
            heapq.heappop(self.waiting)

    def change(self, size: int) -> None:
        """So many bytes more are taken, or fewer."""
        self.used += size
        if self.used < self.size / 2:
            self.half_free.set()
        else:
            self.half_free.clear()


class Reservation:
    """The bytes that one body takes; none at first."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self.age = memory, next(memory.ages)
        self.size = 0

    async def grow(self, size: int, clock: asyncio.Timeout) -> None:
        """Wait until there is room for so many bytes in all. The clock of a timeout stands still meanwhile."""
        memory, more = self._memory, size - self.size
        if self is memory.beyond or (memory.used + more <= memory.size and not memory.waiting):
            memory.change(more)
            self.size = size
            return

        loop = asyncio.get_running_loop()
        left = (clock.when() or 0.0) - loop.time()
        clock.reschedule(None)
        ticket: asyncio.Future[None] = loop.create_future()
        heapq.heappush(memory.waiting, (self.age, self, more, ticket))
        memory.serve()
        try:
            await ticket
        except asyncio.CancelledError:
            if not ticket.cancelled():  # granted in the same moment
                memory.change(-more)
            memory.serve()
            raise
        clock.reschedule(loop.time() + left)
        self.size = size

    def release(self) -> None:
        """The body is gone."""
        memory = self._memory
        if self is memory.beyond:
            memory.beyond = None
        memory.change(-self.size)
        memory.serve()
        self.size = 0
