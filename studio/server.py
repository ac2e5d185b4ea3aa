"""The web server: uvicorn, where who is slow is closed, and which ends at once when it is told to."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from aesthetic.errors import UserError
from studio.gate import address_of

MAX_HEAD = 16 << 10  # bytes of a request's line and headers
HEAD_SECONDS = 10.0  # from the first byte, or from connecting, to the end of the headers
WRITE_SECONDS = 30.0  # in which a client takes 64 kB of an answer
MAX_CONNECTIONS = 384  # and as many again that are being answered
CHUNKS, CHUNK_BYTES = 200, 1000
"""A body in chunks has so many at most, and then one for each so many bytes: each costs as much time as a request."""


def listen(host: str, port: int) -> socket.socket:
    """Take an address, before a model is loaded in vain. Raises UserError where it can't be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as e:
        raise UserError(f"--host {host}: no such address ({e})") from e
    taken = socket.socket(family, kind, protocol)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        taken.listen()
    except OSError as e:
        taken.close()
        if e.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use: stop what uses it, or give another --port") from e
        raise UserError(f"{host} port {port} can't be had: {e.strerror}") from e
    return taken


class StudioServer(uvicorn.Server):
    """uvicorn around an app. `run(sockets=[listen(...)])` serves until SIGINT or SIGTERM, or `should_exit`.

    The signal is raised once more at the end.

    Args:
        ready: called when the server answers.
        stop: called when it is to end, before it waits for answers: ends streams of events, for which it would wait.
    """

    def __init__(self, app: ASGIApp, stop: Callable[[], None], ready: Callable[[], None] = lambda: None) -> None:
        config = uvicorn.Config(
            app,
            http=GuardedProtocol,
            ws="none",
            log_config=None,
            log_level="error",  # its warnings are of requests that are none, as many as anybody likes
            access_log=False,
            server_header=False,
            proxy_headers=False,  # anybody could say that he is somebody else
            h11_max_incomplete_event_size=MAX_HEAD,
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)
        self._stop, self._ready = stop, ready

    async def main_loop(self) -> None:
        self._ready()
        await super().main_loop()
        self._stop()
        for connection in list(self.server_state.connections):
            if isinstance(connection, GuardedProtocol) and connection.is_answering and connection.cycle.more_body:
                connection.transport.abort()  # in the midst of a request


class ChunkLimit(h11.Connection):
    """h11's, where a body in crumbs is no request."""

    chunks = bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunks = self.bytes = 0
        elif isinstance(event, h11.Data):
            self.chunks += event.chunk_start
            self.bytes += len(event.data)
            if self.chunks > CHUNKS + self.bytes // CHUNK_BYTES:
                raise h11.RemoteProtocolError("the body comes in too small chunks")
        return event


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, where who is slow is closed: a connection has HEAD_SECONDS to bring a whole head, and
    WRITE_SECONDS to take what it asked for.

    Where MAX_CONNECTIONS are there and one more comes, one makes room for it that waits for its client: of the address
    that has the most of these, the one that has been there longest, and first of all one that never asked anything.
    """

    _has_asked = False
    _deadline: asyncio.TimerHandle | None = None
    _write_deadline: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = ChunkLimit(h11.SERVER, MAX_HEAD)
        self._since = self.loop.time()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.address = address_of({"client": self.client})
        if len(self.connections) > MAX_CONNECTIONS:
            others = [c for c in self.connections if isinstance(c, GuardedProtocol) and c is not self]
            # whose turn it is: to ask, to send the rest of a request, or to take the answer
            idle = [c for c in others if not c.is_answering or c.cycle.response_started or c.cycle.more_body]
            if idle or len(self.connections) > 2 * MAX_CONNECTIONS:
                counts = Counter(c.address for c in idle)
                leaves = min(idle, key=lambda c: (-counts[c.address], c._has_asked, c._since), default=self)
                self.connections.discard(leaves)  # at once: more may come before it has gone
                leaves.transport.abort()
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._head_is_there()
        self.resume_writing()

    def on_response_complete(self) -> None:
        self._since, self._has_asked = self.loop.time(), True
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_deadline is None:
            self._write_deadline = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    @property
    def is_answering(self) -> bool:
        """Whether a request is there whose answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        if self.is_answering:
            self._head_is_there()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _head_is_there(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if not self.is_answering and not self.transport.is_closing():
            self.transport.close()
