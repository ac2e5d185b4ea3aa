"""A web server that means harm, in a process of its own; and a way to measure who fetches from it.

It answers by path: `PAGES` says how, `/good...` gives a real image, robots.txt is absent. `Hostile` is its handle.
Names such as a.test are for a fetcher whose resolver is `at_home`; for the system's resolver it also listens at
`hosts` addresses, 127.4.0.1 and on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import multiprocessing
import os
import signal
import socket
import ssl
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

Page = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]
CHUNKED = "Transfer-Encoding: chunked"
FOREVER = 3600.0


async def at_home(name: str) -> list[str]:
    """Every *.test name lives on loopback; names under stall.test take for ever."""
    if name.endswith("stall.test"):
        await asyncio.sleep(FOREVER)
    if name.endswith(".test"):
        return ["127.0.0.1"]
    raise socket.gaierror(socket.EAI_NONAME, "no such name")


@functools.cache
def good_image() -> bytes:
    """A real JPEG of 64 x 48 pixels."""
    image = Image.radial_gradient("L").resize((64, 48)).convert("RGB")
    out = io.BytesIO()
    image.save(out, "JPEG")
    return out.getvalue()


def head(*lines: str, status: str = "200 OK") -> bytes:
    """The head of an answer, with the blank line."""
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode("latin-1")


def whole(body: bytes, *lines: str, status: str = "200 OK") -> bytes:
    """An answer as it should be."""
    return head(f"Content-Length: {len(body)}", *lines, status=status) + body


def pieces(*parts: bytes, pause: float = 0.0, rest: float = 0.0) -> Page:
    """Send the parts with a pause after each, then do nothing for a while, then close."""

    async def page(writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            if pause:
                await asyncio.sleep(pause)
        await asyncio.sleep(rest)

    return page


def endless(first: bytes, unit: bytes, pause: float = 0.0) -> Page:
    """Send `first`, then `unit` for ever, as fast as it is taken or with a pause after each."""

    async def page(writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        while True:
            writer.write(unit)
            await writer.drain()
            await asyncio.sleep(pause)

    return page


def sized(size: int) -> Page:
    """A whole answer of so many bytes, never held in one piece."""

    async def page(writer: asyncio.StreamWriter) -> None:
        writer.write(head(f"Content-Length: {size}"))
        piece = bytes(1 << 18)
        for start in range(0, size, len(piece)):
            writer.write(piece[: size - start])
            await writer.drain()

    return page


def bomb(wbits: int, megabytes: int, *lines: str) -> Page:
    """Megabytes of zeros (0: no end of them), compressed: a thousandth of that is sent."""
    squeeze = zlib.compressobj(9, wbits=wbits)
    first = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    unit = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)  # stands alone, so it can be repeated
    return pieces(head(*lines), first, *[unit] * (megabytes - 1)) if megabytes else endless(head(*lines) + first, unit)


async def reset(writer: asyncio.StreamWriter) -> None:
    """Hang up so that the other side sees a reset."""
    sock = writer.transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


PAGES: dict[str, Page] = {}
"""What a test module adds here before it starts a `Hostile` with its name."""


@dataclass
class Counts:
    """What the server was asked."""

    connections: int = 0
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)  # (host as asked for, path) -> times
    busiest: Counter[str] = field(default_factory=Counter)  # host -> most requests open at one time
    times: dict[str, list[float]] = field(default_factory=dict)  # host -> when it was asked, time.monotonic

    def of(self, host: str) -> int:
        """Requests of a host, for any path."""
        return sum(n for (h, _), n in self.requests.items() if h == host)


class Hostile:
    """The server's process.

    `pages` names the module whose import fills PAGES. Ports: `port` speaks HTTP, `mute` accepts and says nothing,
    `slow_tls` begins a TLS answer and goes on by a byte each 0.1 s, `full` has no room for another connection.
    With a certificate (a file of it and its key), `port` speaks https.
    """

    def __init__(self, pages: str = "", hosts: int = 0, delay: float = 0.0, certificate: Path | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, pages, hosts, delay, certificate, sys.path), daemon=True
        )
        self._process.start()
        self.port, self.mute, self.slow_tls, self.full = self._pipe.recv()

    def __enter__(self) -> Hostile:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def _ask(self, word: str) -> Any:
        self._pipe.send(word)
        return self._pipe.recv()

    def counts(self) -> Counts:
        """What was asked since the last `forget`."""
        return self._ask("counts")

    def forget(self) -> None:
        """Start counting anew."""
        self._ask("forget")

    def be(self, mode: str) -> None:
        """From now on: "up", or for everything "503", "503 soon" (Retry-After: 1), "hang up", "closed", "mute"."""
        self._ask(mode)

    @property
    def allow(self) -> tuple[str, ...]:
        """`fetch.allow` for all its ports."""
        return tuple(f"127.0.0.0/8:{port}" for port in (self.port, self.mute, self.slow_tls, self.full))


def _serve(pipe: Connection, pages: str, hosts: int, delay: float, certificate: Path | None, path: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:] = path
    if pages:
        __import__(pages)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_Server(pipe, hosts, delay, certificate).run())


class _Server:
    def __init__(self, pipe: Connection, hosts: int, delay: float, certificate: Path | None) -> None:
        self.pipe, self.hosts, self.delay = pipe, hosts, delay
        self.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) if certificate else None
        if self.tls:
            self.tls.load_cert_chain(certificate)
        self.counts, self.mode = Counts(), "up"
        self.open_now: Counter[str] = Counter()
        self.listeners: list[asyncio.Server] = []
        self.port = 0

    async def listen(self) -> None:
        addresses = ["127.0.0.1", *(f"127.4.{n // 250}.{n % 250 + 1}" for n in range(self.hosts))]
        for address in addresses:
            listener = await asyncio.start_server(self.serve, address, self.port, backlog=1000, ssl=self.tls)
            self.port = listener.sockets[0].getsockname()[1]
            self.listeners.append(listener)

    async def run(self) -> None:
        await self.listen()
        mute = await asyncio.start_server(lambda r, w: asyncio.sleep(FOREVER), "127.0.0.1", 0)
        slow = await asyncio.start_server(_begin_tls, "127.0.0.1", 0)
        full = socket.socket()
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        self.crowd = [socket.socket() for _ in range(4)]  # they fill the queue, and nobody ever accepts them
        for one in self.crowd:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        ports = [s.sockets[0].getsockname()[1] for s in (mute, slow)]
        asyncio.get_running_loop().add_reader(self.pipe.fileno(), self.command)
        self.pipe.send((self.port, *ports, full.getsockname()[1]))
        await asyncio.Event().wait()

    def command(self) -> None:
        try:
            word = self.pipe.recv()
        except EOFError:
            os._exit(0)  # whoever started us is gone
        if word == "counts":
            self.pipe.send(self.counts)
            return
        if word == "forget":
            self.counts = Counts()
        else:
            if word == "closed":
                for listener in self.listeners:
                    listener.close()
                self.listeners = []
            self.mode = word
            if word == "up" and not self.listeners:
                asyncio.ensure_future(self.listen()).add_done_callback(lambda _: self.pipe.send(None))
                return
        self.pipe.send(None)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counts.connections += 1
        with contextlib.suppress(OSError, EOFError, asyncio.LimitOverrunError):
            while await self.one(reader, writer):
                pass
        with contextlib.suppress(OSError):
            writer.close()

    async def one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        asked = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        path = asked.split(" ")[1].partition("?")[0]
        host = asked.lower().partition("\r\nhost: ")[2].partition("\r\n")[0].rpartition(":")[0]
        self.counts.requests[host, path] += 1
        self.counts.times.setdefault(host, []).append(time.monotonic())
        self.open_now[host] += 1
        self.counts.busiest[host] = max(self.counts.busiest[host], self.open_now[host])
        try:
            return await self.answer(path, writer)
        finally:
            self.open_now[host] -= 1

    async def answer(self, path: str, writer: asyncio.StreamWriter) -> bool:
        """Send the answer; returns whether the connection goes on."""
        if self.mode == "mute":
            await asyncio.sleep(FOREVER)
        if self.mode in ("hang up", "closed"):
            return False
        if self.mode.startswith("503"):
            writer.write(whole(b"down", *["Retry-After: 1"] * (self.mode == "503 soon"), status="503 Down"))
            return True
        page = PAGES.get(path)
        if page is None:
            if self.delay:
                await asyncio.sleep(self.delay)
            good = path.startswith("/good")
            writer.write(whole(good_image(), "Content-Type: image/jpeg") if good else whole(b"", status="404 None"))
            await writer.drain()
            return True
        if isinstance(page, bytes):
            writer.write(page)
        else:
            await page(writer)
        await writer.drain()
        return False


async def _begin_tls(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        writer.write(b"\x16\x03\x03\x3f\xff\x02\x00\x3f\xfb\x03\x03")  # a handshake record with a ServerHello in it
        while True:
            writer.write(b"\0")
            await writer.drain()
            await asyncio.sleep(0.1)


# ------------------------------------------------------------------------------------------------ measuring a client


@dataclass(frozen=True)
class Measured:
    """What a function in a process of its own returned, and what it took."""

    result: Any
    growth: int  # bytes of resident memory above what the process had when it called `ready`, at most
    seconds: float  # after `ready`


def measure(function: Callable[..., Any], *args: Any, limit: int = 1_500_000_000, timeout: float = 150) -> Measured:
    """Run function(ready, *args) in a new process. It calls `ready()` when it is warm; from then on it is watched.

    A process that grows by more than `limit` bytes is killed, so that a test which fails takes nobody along.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_measured, args=(theirs, function, args, sys.path), daemon=True)
    child.start()
    theirs.close()
    try:
        assert ours.poll(60), "the process did not get ready"
        word, value = ours.recv()
        assert word == "ready", value
        process, start = psutil.Process(child.pid), time.monotonic()
        base, growth = process.memory_info().rss, 0
        ours.send("go")
        while not ours.poll(0.01):
            growth = max(growth, process.memory_info().rss - base)
            assert growth < limit, (
                f"{growth / 1e6:.0f} MB more than at the start, after {time.monotonic() - start:.1f} s"
            )
            assert time.monotonic() - start < timeout, f"no end after {timeout} s"
        word, value = ours.recv()
        assert word == "result", value
        return Measured(value, growth, time.monotonic() - start)
    finally:
        child.kill()
        child.join()


def _measured(pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...], path: list[str]) -> None:
    sys.path[:] = path

    def ready() -> None:
        pipe.send(("ready", None))
        pipe.recv()

    try:
        pipe.send(("result", function(ready, *args)))
    except BaseException as e:
        import traceback

        pipe.send(("error", "".join(traceback.format_exception(e))))
        raise
    with contextlib.suppress(EOFError):
        pipe.recv()  # stay until the other side has read


def hosts(count: int, port: int, path: str, first: int = 0) -> Iterator[str]:
    """URLs of a path on so many hosts, by their addresses."""
    for n in range(first, first + count):
        yield f"http://127.4.{n // 250}.{n % 250 + 1}:{port}{path}"
