"""A small real web on loopback: many hosts, one port, and the ways in which the web fails.

It runs in a process of its own, so that it takes nothing from the one that is measured, and it counts what it was
asked. A route answers by its URL alone, whatever was asked before, unless it says `first`.

    with Web({"/a.jpg": Route(file="a.jpg"), "/gone": Route(status=410)}, hosts=3) as web:
        web.url(0, "/a.jpg")      # http://127.1.0.1:PORT/a.jpg
        web.counts().requests     # {(0, "/a.jpg"): 1}
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import mimetypes
import multiprocessing
import signal
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

from aiohttp import web
from multidict import CIMultiDict

from aesthetic.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Route:
    """What one path answers. A body is `file`'s bytes where a file is named, else `body`."""

    file: str | None = None
    body: bytes = b""
    status: int = 200
    content_type: str | None = None  # None: guessed from the file's name, else application/octet-stream
    headers: tuple[tuple[str, str], ...] = ()  # in a value, {port} is the server's port
    keep: float = 1.0  # the part of the body that exists at all: 0.5 serves half a file as if it were whole
    drop: bool = False  # promise the whole body, send half of it, close the connection
    gzip: bool = False  # Content-Encoding: gzip
    delay: float = 0.0  # seconds before the answer
    trickle: float = 0.0  # seconds between pieces of 1 KB
    first: tuple[Route, ...] = ()  # answers to the first requests for this path of this host, one each; then this one

    def content(self) -> bytes:
        """The bytes to send, as shortened and packed as the route says."""
        data = Path(self.file).read_bytes() if self.file else self.body
        data = data[: round(len(data) * self.keep)]
        return gzip.compress(data, mtime=0) if self.gzip else data

    def kind(self) -> str:
        """The Content-Type to state."""
        guessed = mimetypes.guess_type(self.file)[0] if self.file else None
        return self.content_type or guessed or "application/octet-stream"


Routes = Mapping[str | tuple[int, str], Route]
"""Path -> route for every host, or (host index, path) -> route for one host, which comes first. Else 404."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the server was asked so far."""

    requests: Counter[tuple[int, str]] = field(default_factory=Counter)  # (host index, path) -> times
    peak: Counter[int] = field(default_factory=Counter)  # host index -> most requests open at one time


class Web:
    """The server's handle. `port` 0 takes a free one. Raises UserError where the port or the addresses can't be had."""

    def __init__(self, routes: Routes, *, hosts: int = 1, port: int = 0) -> None:
        if not 1 <= hosts <= 250:
            raise ValueError(f"hosts must be 1 to 250, not {hosts}")
        self._routes = dict(routes)
        self._hosts = hosts
        self.port = port
        self._pipe: Connection | None = None
        self._process: multiprocessing.process.BaseProcess | None = None

    def __enter__(self) -> Web:
        sockets = _listen(self._hosts, self.port)
        self.port = sockets[0].getsockname()[1]
        context = multiprocessing.get_context("spawn")  # a fork would copy the caller's threads' locks
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(self._routes, sockets, theirs), daemon=True)
        process.start()
        self._process = process
        theirs.close()
        for s in sockets:
            s.close()
        try:
            self._pipe.recv()  # it listens
        except EOFError:
            process.join()
            raise RuntimeError(f"the web server ended while starting, exit code {process.exitcode}") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pipe is not None and self._process is not None:
            self._pipe.close()  # the server ends when this end is gone, however we end
            self._process.join(5)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()

    def host(self, index: int) -> str:
        """The address of a host, with the port."""
        return f"{address(index)}:{self.port}"

    def url(self, index: int, path: str) -> str:
        """The URL of a path on a host."""
        return f"http://{self.host(index % self._hosts)}{path}"

    def counts(self) -> Counts:
        """What the server was asked so far."""
        assert self._pipe is not None, "the server has not been started"
        self._pipe.send("counts")
        return self._pipe.recv()


def address(index: int) -> str:
    """The loopback address of a host: 127.1.0.1, 127.1.0.2, and so on."""
    return f"127.1.0.{index + 1}"


def _listen(hosts: int, port: int) -> list[socket.socket]:
    """One listening socket per host, on one port; nothing is reachable from outside this machine."""
    with contextlib.ExitStack() as undo:
        sockets: list[socket.socket] = []
        for index in range(hosts):
            s = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind((address(index), port))
            except OSError as e:
                if e.errno == errno.EADDRNOTAVAIL:
                    raise UserError(
                        f"{address(index)} is no address here: many hosts need Linux, where all of 127/8 is local."
                    ) from None
                raise UserError(
                    f"port {port} on {address(index)}: {e.strerror}. Stop what uses it, or choose another port."
                ) from None
            s.listen(512)
            sockets.append(s)
            port = s.getsockname()[1]  # the others take the port that the first one got
        undo.pop_all()
        return sockets


# ------------------------------------------------------------------------------------------------ the server's process


def _serve(routes: Routes, sockets: list[socket.socket], pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who started us; we end with their pipe
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run(routes, sockets, pipe))


async def _run(routes: Routes, sockets: list[socket.socket], pipe: Connection) -> None:
    counts = Counts()
    ended = asyncio.Event()

    def answer_parent() -> None:
        try:
            pipe.recv()
            pipe.send(counts)
        except (EOFError, OSError):
            ended.set()

    open_now: Counter[int] = Counter()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        host = _index(request)
        key = (host, request.raw_path.partition("?")[0])
        route = routes.get(key) or routes.get(key[1]) or Route(status=404, body=b"not found")
        nth = counts.requests[key]
        counts.requests[key] += 1
        if nth < len(route.first):
            route = route.first[nth]
        open_now[host] += 1
        counts.peak[host] = max(counts.peak[host], open_now[host])
        try:
            return await _answer(request, route)
        finally:
            open_now[host] -= 1

    server = web.Server(handle)
    runner = web.ServerRunner(server)
    await runner.setup()
    for s in sockets:
        await web.SockSite(runner, s).start()
    loop = asyncio.get_running_loop()
    loop.add_reader(pipe.fileno(), answer_parent)
    pipe.send("ready")
    await ended.wait()
    loop.remove_reader(pipe.fileno())
    await runner.cleanup()


def _index(request: web.BaseRequest) -> int:
    """Which host was asked: by the address that the connection came to, not by what the request claims."""
    return int(_here(request)[0].rpartition(".")[2]) - 1


def _here(request: web.BaseRequest) -> tuple[str, int]:
    """Our end of the connection: (address, port)."""
    assert request.transport is not None, "the peer has gone"
    here: tuple[str, int] = request.transport.get_extra_info("sockname")
    return here


async def _answer(request: web.BaseRequest, route: Route) -> web.StreamResponse:
    if route.delay:
        await asyncio.sleep(route.delay)
    data = route.content()
    headers = CIMultiDict((name, value.replace("{port}", str(_here(request)[1]))) for name, value in route.headers)
    headers.setdefault("Content-Type", route.kind())
    response = web.StreamResponse(status=route.status, headers=headers)
    if route.gzip:
        response.headers["Content-Encoding"] = "gzip"
    response.content_length = len(data)
    with contextlib.suppress(ConnectionError):  # a client may hang up: one that gives up on a slow answer does
        await response.prepare(request)
        if request.method != "HEAD":
            for piece in _pieces(data[: len(data) // 2] if route.drop else data, 1024 if route.trickle else 1 << 16):
                await response.write(piece)
                if route.trickle:
                    await asyncio.sleep(route.trickle)
        if not route.drop:
            await response.write_eof()
        elif request.transport is not None:
            request.transport.close()
    return response


def _pieces(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]
