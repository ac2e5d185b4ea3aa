"""The fetcher against a hostile server on loopback: every failure has its name, and neighbours don't suffer."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import random
import socket
import ssl
import subprocess
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from aesthetic.errors import UserError
from curate.fetch import body as body_module
from curate.fetch import budget, domains
from curate.fetch import client as fetch_module
from curate.fetch.client import Fetcher
from curate.fetch.config import FetchConfig
from curate.fetch.dns import Lookup
from curate.ledger.schema import FinalError, Reason, RowError

PIXELS = b"\xff\xd8" + bytes(range(256)) * 8


class Server:
    """Answers raw bytes by path, and remembers what it was asked.

    `self[path]` is bytes to send before closing, or a function (writer, head) that writes what it likes. Unknown
    paths give PIXELS and keep the connection; unknown robots.txt give 404.
    """

    def __init__(self) -> None:
        self.pages: dict[str, bytes | Callable[[asyncio.StreamWriter, str], Awaitable[None]]] = {}
        self.asked: list[tuple[str, str]] = []  # Host without port, path
        self.times: list[float] = []
        self.heads: list[str] = []
        self.connections = 0
        self.busy: Counter[str] = Counter()
        self.busiest: Counter[str] = Counter()

    def __setitem__(self, path: str, page: bytes | Callable[[asyncio.StreamWriter, str], Awaitable[None]]) -> None:
        self.pages[path] = page

    def count(self, path: str, host: str | None = None) -> int:
        return sum(p == path and host in (None, h) for h, p in self.asked)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(OSError, EOFError, asyncio.LimitOverrunError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                path = head.split(" ")[1]
                host = head.lower().partition("\r\nhost: ")[2].partition("\r\n")[0].rpartition(":")[0]
                self.asked.append((host, path))
                self.times.append(time.monotonic())
                self.heads.append(head)
                self.busy[host] += 1
                self.busiest[host] = max(self.busiest[host], self.busy[host])
                page = self.pages.get(f"//{host}{path}", self.pages.get(path))
                try:
                    if page is None:
                        writer.write(reply(404) if path == "/robots.txt" else reply(200, PIXELS))
                    elif isinstance(page, bytes):
                        writer.write(page)
                    else:
                        await page(writer, head)
                    await writer.drain()
                finally:
                    self.busy[host] -= 1
                if page is not None:
                    break
        with contextlib.suppress(OSError):
            writer.close()


def reply(status: int, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def bare(body: bytes, *headers: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 X", *headers]).encode("latin-1") + b"\r\n\r\n" + body


async def at_home(host: str) -> list[str]:
    """Every *.test name lives on loopback."""
    if host.endswith(".test"):
        return ["127.0.0.1"]
    raise socket.gaierror(socket.EAI_NONAME, "no such name")


@contextlib.asynccontextmanager
async def running(lookup: Lookup = at_home, **config: Any) -> AsyncIterator[tuple[Server, str, Fetcher]]:
    """A server, the URL of its root and a fetcher that may contact it."""
    server = Server()
    listener = await asyncio.start_server(server, "127.0.0.1", 0, backlog=1000)
    port = listener.sockets[0].getsockname()[1]
    fetcher = Fetcher(
        FetchConfig(**{"allow": (f"127.0.0.0/8:{port}",), "retries": 0, "timeout": 2.0, **config}), lookup=lookup
    )
    try:
        yield server, f"http://a.test:{port}/", fetcher
    finally:
        await fetcher.close()
        listener.close()


async def failure(fetcher: Fetcher, url: str) -> RowError:
    with pytest.raises(RowError) as e:
        await fetcher.get(url)
    return e.value


def test_a_good_image_and_what_is_sent() -> None:
    async def main() -> None:
        async with running() as (server, root, fetcher):
            for _ in range(3):
                body = await fetcher.get(root + "x%2fy.jpg?s=%7e#part")
                assert (body.data, body.final_url, body.http_status) == (PIXELS, root + "x%2fy.jpg?s=%7e", 200)
            assert server.asked == [("a.test", "/robots.txt")] + [("a.test", "/x%2fy.jpg?s=%7e")] * 3
            assert server.connections == 1  # kept alive
            head = server.heads[1].lower()
            assert "accept-encoding: identity" in head and "tastemaker" in head and "cookie" not in head

            async def asks_for_cookies(writer: asyncio.StreamWriter, _: str) -> None:
                writer.write(reply(302, b"", "Set-Cookie: a=b", "Location: /jar"))

            server["/cookies"] = asks_for_cookies
            await fetcher.get(root + "cookies")
            assert "cookie" not in server.heads[-1].lower()

    asyncio.run(main())


def test_nothing_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine a.test login me password secret\n")
    for name, value in [
        ("HOME", str(tmp_path)),
        ("http_proxy", "http://127.0.0.1:9"),
        ("ALL_PROXY", "http://127.0.0.1:9"),
    ]:
        monkeypatch.setenv(name, value)

    async def main() -> None:
        async with running() as (server, root, fetcher):
            assert (await fetcher.get(root)).data == PIXELS
            assert "authorization" not in server.heads[-1].lower()

    asyncio.run(main())


# ------------------------------------------------------------------------------------------- whom we never contact

LITERALS = [
    *[
        "127.0.0.1",
        "127.1",
        "127.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "0x7f.1",
        "0177.0.0.1",
        "017700000001",
    ],
    *["127.0.0.01", "127.0.0.1.", "0", "0.0.0.0", "127.0.0.2", "１２７.０.０.１", "①②⑦.⓪.⓪.①", "127。0。0。1"],
    *[
        "127%2e0%2e0%2e1",
        "%31%32%37.0.0.1",
        "127.0.0.1%00.good.example",
        "127.0.0.1%0d%0a",
        "127.0.0.1\t",
        "127.0.0.1\x00",
    ],
    *[
        "[::1]",
        "[0:0:0:0:0:0:0:1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
    ],
    *["[2002:7f00:1::]", "[::1%25lo]", "[::1%lo]", "[fe80::1%25lo]", "[fd00:ec2::254]", "[127.0.0.1]"],
    *["me@127.0.0.1", "me:pw@127.0.0.1", "good.example@127.0.0.1", "127.0.0.1\\@good.example", "\\127.0.0.1"],
    *[
        "good.example\\@127.0.0.1",
        "good.example #@127.0.0.1",
        "localhost",
        "LOCALHOST",
        "localhost.",
        "localhost\u3002",
    ],
    *["169.254.169.254", "100.100.100.200", "168.63.129.16", "10.0.0.1", "172.16.0.1", "192.168.0.1", "224.0.0.1"],
    "255.255.255.255",
]
NAMES = {
    "private.test": ["127.0.0.1"],
    "ten.test": ["10.0.0.1"],
    "mixed.test": ["93.184.216.34", "127.0.0.1"],
    "mixed-the-other-way.test": ["127.0.0.1", "93.184.216.34"],
    "mapped.test": ["::ffff:127.0.0.1"],
    "six.test": ["::1"],
    "any.test": ["0.0.0.0"],
    "nat64.test": ["64:ff9b::7f00:1"],
    "sixtofour.test": ["2002:7f00:1::"],
    "teredo.test": ["2001:0:7f00:1::1"],
    "zoned.test": ["fe80::1%lo"],
    "metadata.test": ["169.254.169.254"],
    "multicast.test": ["224.0.0.1"],
    "azure.test": ["168.63.129.16"],
    "xn--bcher-kva.test": ["127.0.0.1"],
}


@pytest.mark.parametrize("via_redirect", [False, True], ids=["direct", "redirect"])
@pytest.mark.parametrize("host", LITERALS + list(NAMES))
def test_refused_hosts_are_never_contacted(host: str, via_redirect: bool) -> None:
    """A listener stands at every address that these could mean; the count of its connections is what matters."""

    async def main() -> None:
        victim = Server()
        listener = await asyncio.start_server(victim, ["127.0.0.1", "127.0.0.2", "::1"], 0)
        ports = {s.getsockname()[1] for s in listener.sockets}

        async def lookup(name: str) -> list[str]:
            if name in NAMES:
                return NAMES[name]
            return ["127.0.0.1"] if name.rstrip(".") == "localhost" else await at_home(name)

        async with running(lookup) as (server, root, fetcher):
            for port in ports - {URL(root).port}:  # it may be the server's too, which is allowed on all of 127/8
                url = f"http://{host}:{port}/latest/meta-data"
                if via_redirect:
                    server["/go"] = reply(302, b"", f"Location: {url}".encode().decode("latin-1"))
                    url = root + "go"
                error = await failure(fetcher, url)
                allowed = {Reason.BAD_URL, Reason.BLOCKED_ADDRESS}
                if (
                    "\\@" in host
                ):  # the backslash ends the host, as in browsers: it is good.example, which has no address
                    allowed.add(Reason.DNS)
                if via_redirect:  # a control character in a header is the parser's to refuse
                    allowed.add(Reason.PROTOCOL)
                assert error.reason in allowed, error
                if host in NAMES:
                    assert error.reason is Reason.BLOCKED_ADDRESS
        listener.close()
        assert victim.connections == 0

    asyncio.run(main())


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://a.test/", "data:,x", "http:///x", "gopher://a.test/", ""])
def test_other_schemes_also_after_a_redirect(url: str) -> None:
    async def main() -> None:
        async with running() as (server, root, fetcher):
            assert (await failure(fetcher, url)).reason is Reason.BAD_URL
            if url and url != "http:///x":
                server["/go"] = reply(301, b"", f"Location: {url}")
                error = await failure(fetcher, root + "go")
                assert (error.reason, error.http_status, error.final_url) == (Reason.BAD_URL, 301, root + "go")

    asyncio.run(main())


def test_a_name_that_changes_its_mind_reaches_nothing_private() -> None:
    """Rebinding: whatever the name server says at each question, a connection goes to a checked address only."""
    dice = random.Random(0)

    async def lookup(host: str) -> list[str]:
        if host.startswith("flip"):
            return [dice.choice(["127.0.0.3", "127.0.0.1"])]
        return await at_home(host)

    async def main() -> None:
        victim = Server()
        listener = await asyncio.start_server(victim, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        open_house = Server()
        allowed = await asyncio.start_server(open_house, "127.0.0.3", port)
        fetcher = Fetcher(FetchConfig(allow=(f"127.0.0.3:{port}",), retries=0, respect=()), lookup=lookup)
        fetcher._resolver._cache._keep = lambda _: 0.0  # ask the name server each time
        for i in range(20):
            for _ in range(3):
                with contextlib.suppress(RowError):
                    await fetcher.get(f"http://flip{i}.test:{port}/")
        await fetcher.close()
        listener.close()
        allowed.close()
        assert victim.connections == 0 and open_house.connections >= 10

    asyncio.run(main())


def test_redirects_at_every_hop_are_checked() -> None:
    async def main() -> None:
        victim = Server()
        listener = await asyncio.start_server(victim, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        async with running() as (server, root, fetcher):
            for depth in range(1, 6):
                for hop in range(1, depth):
                    server[f"/{depth}/{hop}"] = reply(307, b"", f"Location: /{depth}/{hop + 1}")
                server[f"/{depth}/{depth}"] = reply(308, b"", f"Location: http://127.0.0.1:{port}/")
                error = await failure(fetcher, f"{root}{depth}/1")
                assert (error.reason, error.final_url) == (Reason.BLOCKED_ADDRESS, f"{root}{depth}/{depth}")
        listener.close()
        assert victim.connections == 0

    asyncio.run(main())


# ---------------------------------------------------------------------------------------------------------- redirects


def test_redirects() -> None:
    async def main() -> None:
        async with running() as (server, root, fetcher):
            server["/rel"] = reply(302, b"ignored", "Location: sub/x.jpg")
            server["/proto"] = reply(301, b"", f"Location: //b.test:{root.rsplit(':')[-1]}y.jpg")
            server["/big"] = reply(303, b"z" * 100_000, "Location: /x.jpg")
            assert (await fetcher.get(root + "rel")).final_url == root + "sub/x.jpg"
            assert (await fetcher.get(root + "proto")).final_url == root.replace("a.test", "b.test") + "y.jpg"
            assert (await fetcher.get(root + "big")).data == PIXELS

            server["/loop"] = reply(302, b"", "Location: /loop")
            error = await failure(fetcher, root + "loop")
            assert (error.reason, error.http_status) == (Reason.TOO_MANY_REDIRECTS, 302)
            assert server.count("/loop") == 6  # the first and five redirects
            for i in range(6):
                server[f"/chain{i}"] = reply(302, b"", f"Location: /chain{i + 1}")
            assert (await fetcher.get(root + "chain1")).data == PIXELS
            assert (await failure(fetcher, root + "chain0")).reason is Reason.TOO_MANY_REDIRECTS

            for status in (300, 301, 302, 303, 304, 305, 306, 307, 308):
                server["/nowhere"] = reply(status)
                error = await failure(fetcher, root + "nowhere")
                assert (error.reason, error.http_status) == (Reason.PROTOCOL, status)

    asyncio.run(main())


# ------------------------------------------------------------------------------------------------ answers that are none


STATUSES = {
    "http_4xx": [400, 401, 403, 406, 410, 418, 451, 499],
    "http_404": [404],
    "http_429": [429],
    "http_5xx": [500, 502, 503, 504, 599],
    "protocol": [101, 201, 202, 204, 205, 206, 226, 600, 999],
}


@pytest.mark.parametrize(("status", "reason"), [(status, reason) for reason in STATUSES for status in STATUSES[reason]])
def test_statuses(status: int, reason: str) -> None:
    async def main() -> None:
        async with running() as (server, root, fetcher):
            server["/x"] = reply(status, b"" if status in (101, 204) else b"body")
            error = await failure(fetcher, root + "x")
            assert (error.reason, error.http_status, error.final_url) == (reason, status, root + "x")
            server["/203"] = reply(203, PIXELS)
            assert (await fetcher.get(root + "203")).http_status == 203

    asyncio.run(main())


CHUNKED = "Transfer-Encoding: chunked"
BROKEN = {
    "bad status line": b"HELLO\r\n\r\n",
    "http 0.9": b"\xff\xd8\xff\xe0 an image, straight away" * 10,
    "status of words": b"HTTP/1.1 abc OK\r\n\r\n",
    "status 0": b"HTTP/1.1 000 X\r\nContent-Length: 0\r\n\r\n",
    "huge header": bare(b"x", "A: " + "b" * 1_000_000),
    "header without colon": b"HTTP/1.1 200 OK\r\nno colon here\r\n\r\nx",
    "NUL in header": b"HTTP/1.1 200 OK\r\nA: b\x00c\r\nContent-Length: 1\r\n\r\nx",
    "10000 headers": bare(b"x", *(f"A{i}: {'b' * 200}" for i in range(10_000))),
    "negative length": bare(b"x", "Content-Length: -1"),
    "word as length": bare(b"x", "Content-Length: many"),
    "endless length": bare(b"x", "Content-Length: " + "9" * 6000),
    "two lengths": bare(b"xy", "Content-Length: 1", "Content-Length: 2"),
    "length lies high": bare(PIXELS, "Content-Length: 100000"),
    "chunk cut short": bare(b"ff\r\nabc", CHUNKED),
    "chunks without end": bare(b"3\r\nabc\r\n", CHUNKED),
    "chunk size of words": bare(b"zz\r\nabc\r\n0\r\n\r\n", CHUNKED),
    "negative chunk": bare(b"-3\r\nabc\r\n0\r\n\r\n", CHUNKED),
    "br": reply(200, b"abc", "Content-Encoding: br"),
    "zstd": reply(200, b"abc", "Content-Encoding: zstd"),
    "nested gzip": reply(200, gzip.compress(gzip.compress(b"x")), "Content-Encoding: gzip, gzip"),
    "twice gzip": reply(200, gzip.compress(b"x"), "Content-Encoding: gzip", "Content-Encoding: gzip"),
    "not gzip": reply(200, PIXELS, "Content-Encoding: gzip"),
    "gzip cut short": reply(200, gzip.compress(PIXELS)[:-12], "Content-Encoding: gzip"),
    "empty gzip": reply(200, b"", "Content-Encoding: gzip"),
    "not deflate": reply(200, b"\x08\x00abc", "Content-Encoding: deflate"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_answers_are_protocol(case: str) -> None:
    async def main() -> None:
        async with running() as (server, root, fetcher):
            server["/x"] = BROKEN[case]
            error, neighbour = await asyncio.gather(failure(fetcher, root + "x"), fetcher.get(root + "good"))
            assert error.reason is Reason.PROTOCOL, error
            assert neighbour.data == PIXELS

    asyncio.run(main())


def test_mutated_answers_end_with_a_body_or_a_reason() -> None:
    """Whatever bytes come, nothing but a RowError leaves the fetcher."""
    rng = random.Random(7)
    seeds = [reply(200, PIXELS), bare(b"5\r\nabcde\r\n0\r\n\r\n", CHUNKED), reply(302, b"", "Location: /x")]
    seeds += [reply(429, b"", "Retry-After: 1"), reply(200, gzip.compress(PIXELS), "Content-Encoding: gzip")]
    inserts = [b"\r\n", b"\0", b":", b"\xff", b"\n", b"9" * 20, b"Location: //\xff/\r\n", b"X-Robots-Tag: \xff\r\n"]

    async def main() -> None:
        async with running(respect=["x-robots-tag"]) as (server, root, fetcher):
            for i in range(200):
                data = bytearray(rng.choice(seeds))
                for _ in range(rng.randint(1, 5)):
                    at = rng.randrange(min(len(data), 100))
                    data[at : at + rng.randint(0, 3)] = rng.choice([*inserts, rng.randbytes(1)])
                server["/x"] = bytes(data)
                with contextlib.suppress(RowError):
                    await fetcher.get(root.replace("a.test", f"f{i}.test") + "x")
            assert (await fetcher.get(root)).data == PIXELS

    asyncio.run(main())


def test_a_length_that_lies_low_never_gives_more_and_poisons_nothing() -> None:
    async def main() -> None:
        async with running() as (server, root, fetcher):
            server["/x"] = bare(PIXELS, "Content-Length: 10")
            server["/smuggle"] = reply(200, PIXELS) + reply(200, b"another's answer")
            try:
                assert (await fetcher.get(root + "x")).data == PIXELS[:10]
            except RowError as e:  # where the rest is seen in time
                assert e.reason is Reason.PROTOCOL and "\n" not in e.detail and len(e.detail) < 300
            with contextlib.suppress(RowError):
                assert (await fetcher.get(root + "smuggle")).data == PIXELS
            for _ in range(3):
                assert (await fetcher.get(root + "y")).data == PIXELS

    asyncio.run(main())


def test_compression_that_nobody_asked_for() -> None:
    async def main() -> None:
        async with running() as (server, root, fetcher):
            bare_deflate = zlib.compressobj(wbits=-15)
            server["/g"] = reply(200, gzip.compress(PIXELS), "Content-Encoding: GZip")
            server["/z"] = reply(200, zlib.compress(PIXELS), "Content-Encoding: deflate")
            server["/d"] = reply(200, bare_deflate.compress(PIXELS) + bare_deflate.flush(), "Content-Encoding: deflate")
            server["/i"] = reply(200, PIXELS, "Content-Encoding: identity")
            words = ("none", "UTF-8", "binary", "identity, utf-8", "")  # no codings: browsers take the body as it is
            for i, word in enumerate(words):
                server[f"/{i}"] = reply(200, PIXELS, f"Content-Encoding: {word}")
            for path in "gzdi01234":
                assert (await fetcher.get(root + path)).data == PIXELS
            server["/br"] = reply(200, b"abc", "Content-Encoding: br")
            error = await failure(fetcher, root + "br")
            assert isinstance(error, FinalError) and server.count("/br") == 1  # the same again would not help

    asyncio.run(main())


# ------------------------------------------------------------------------------------------------------- size and time


async def endless(writer: asyncio.StreamWriter, _: str) -> None:
    writer.write(bare(b"", CHUNKED))
    while True:
        writer.write(b"10000\r\n" + bytes(65536) + b"\r\n")
        await writer.drain()


async def endless_interim(writer: asyncio.StreamWriter, _: str) -> None:
    while True:
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 50)
        await writer.drain()
        await asyncio.sleep(0.001)


def drop(pause: float, *pieces: bytes) -> Callable[[asyncio.StreamWriter, str], Awaitable[None]]:
    """Send the pieces one by one with a pause after each, then nothing."""

    async def page(writer: asyncio.StreamWriter, _: str) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)
        await asyncio.sleep(30)

    return page


def test_bodies_past_the_cap() -> None:
    async def main() -> None:
        bomb = gzip.compress(bytes(50_000_000), 9)
        async with running(max_bytes=100_000) as (server, root, fetcher):
            sent = 0

            async def counts(writer: asyncio.StreamWriter, _: str) -> None:
                nonlocal sent
                writer.write(bare(b""))
                while True:
                    writer.write(bytes(10_000))
                    await writer.drain()
                    sent += 10_000

            server["/endless"], server["/counts"] = endless, counts
            server["/declared"] = drop(0, bare(b"x", "Content-Length: 100001"))
            server["/gzip"] = reply(200, bomb, "Content-Encoding: gzip")
            server["/deflate"] = reply(200, zlib.compress(bytes(50_000_000), 9), "Content-Encoding: deflate")
            server["/exact"], server["/over"] = reply(200, bytes(100_000)), reply(200, bytes(100_001))
            tracemalloc.start()
            for path in ("endless", "counts", "declared", "gzip", "deflate", "over"):
                error = await failure(fetcher, root + path)
                assert (error.reason, error.http_status, error.final_url) == (Reason.TOO_LARGE, 200, root + path)
            assert tracemalloc.get_traced_memory()[1] < 10_000_000  # the bombs hold 50 MB each
            tracemalloc.stop()
            assert len((await fetcher.get(root + "exact")).data) == 100_000
            assert sent < 20_000_000  # what lies in the kernel's buffers; not a gigabyte

    asyncio.run(main())


SLOW = {
    "silence": drop(30),
    "head": drop(0.05, *(bytes([b]) for b in reply(200, PIXELS))),
    "body": drop(0.05, bare(b"", "Content-Length: 2000"), *(b"x" for _ in range(2000))),
    "chunks": drop(0.05, bare(b"", CHUNKED), *(b"1\r\nx\r\n" for _ in range(2000))),
    "stall": drop(30, bare(PIXELS[:1000], "Content-Length: 2000")),
    "interim": endless_interim,
    "endless": drop(0.01, bare(b"", CHUNKED), *(b"3e8\r\n" + bytes(1000) + b"\r\n" for _ in range(1000))),
}


def test_slow_answers_end_in_time_and_harm_nobody() -> None:
    async def main() -> None:
        async with running(timeout=1.0) as (server, root, fetcher):
            server.pages |= {f"/{name}": page for name, page in SLOW.items()}
            rows = [
                failure(fetcher, f"{root.replace('a.test', f'{name}{i}.test')}{name}")
                for name in SLOW
                for i in range(3)
            ]
            start = time.monotonic()
            slow, good = asyncio.gather(*rows), asyncio.gather(*(fetcher.get(root + "good") for _ in range(20)))
            assert all(body.data == PIXELS for body in await good)
            assert {e.reason for e in await slow} == {Reason.TIMEOUT}
            assert time.monotonic() - start < 2.0  # the deadline and a second

    asyncio.run(main())


def test_a_body_may_be_long_in_coming_but_must_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "_SLOW_AFTER", 0.2)
    monkeypatch.setattr(body_module, "_SLOW", 1e5)

    async def late(writer: asyncio.StreamWriter, _: str) -> None:
        await asyncio.sleep(0.6)
        writer.write(reply(200, PIXELS))

    async def drips(writer: asyncio.StreamWriter, _: str) -> None:
        writer.write(bare(b"", "Content-Length: 1000"))
        while True:
            writer.write(b"x")
            await asyncio.sleep(0.05)

    async def main() -> None:
        async with running(respect=()) as (server, root, fetcher):
            server["/late"], server["/drips"] = late, drips
            assert (await fetcher.get(root + "late")).data == PIXELS
            began = time.monotonic()
            assert (await failure(fetcher, root + "drips")).reason is Reason.TIMEOUT
            assert time.monotonic() - began < 1

    asyncio.run(main())


def test_the_deadline_spans_redirects_and_names() -> None:
    async def stalls(host: str) -> list[str]:
        if host == "stall.test":
            await asyncio.sleep(30)
        return await at_home(host)

    async def main() -> None:
        async with running(stalls, timeout=0.5, respect=()) as (server, root, fetcher):

            async def dawdles(writer: asyncio.StreamWriter, _: str) -> None:
                await asyncio.sleep(0.2)
                writer.write(reply(302, b"", "Location: /dawdle"))

            server["/dawdle"] = dawdles
            start = time.monotonic()
            errors = await asyncio.gather(
                failure(fetcher, root + "dawdle"), failure(fetcher, root.replace("a.test", "stall.test"))
            )
            assert [e.reason for e in errors] == [Reason.TIMEOUT, Reason.DNS]
            assert time.monotonic() - start < 1.5

    asyncio.run(main())


# --------------------------------------------------------------------------------------------------- connections, names


def test_connections_that_fail() -> None:
    async def main() -> None:
        async with running(respect=()) as (server, root, fetcher):

            async def resets(writer: asyncio.StreamWriter, _: str) -> None:
                writer.transport.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, b"\1" + bytes(7)
                )
                writer.transport.abort()

            server["/reset"], server["/hangup"] = resets, b""
            assert (await failure(fetcher, root + "reset")).reason is Reason.CONNECT
            assert (await failure(fetcher, root + "hangup")).reason is Reason.CONNECT
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            refused = Fetcher(FetchConfig(allow=(f"127.0.0.1:{port}",), retries=0), lookup=at_home)
            error = await failure(refused, f"http://a.test:{port}/")
            assert error.reason is Reason.CONNECT and error.http_status is None and error.final_url is None
            await refused.close()

    asyncio.run(main())


def test_names_that_fail() -> None:
    asked = Counter[str]()

    async def lookup(host: str) -> list[str]:
        asked[host] += 1
        raise socket.gaierror(socket.EAI_AGAIN if host == "busy.test" else socket.EAI_NONAME, "no answer")

    async def main() -> None:
        async with running(lookup, retries=1) as (_, root, fetcher):
            fetcher._resolver._cache._keep = lambda _: 0.0
            for host, questions in [("none.test", 1), ("busy.test", 2)]:
                error = await failure(fetcher, root.replace("a.test", host))
                assert error.reason is Reason.DNS and host in error.detail
                assert asked[host] == questions

    asyncio.run(main())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for a.test, its own authority, and the key."""
    folder = tmp_path_factory.mktemp("tls")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    command += ["-subj", "/CN=a.test", "-addext", "subjectAltName=DNS:a.test", "-keyout", str(folder / "key.pem")]
    subprocess.run([*command, "-out", str(folder / "cert.pem")], capture_output=True, check=True)
    return folder / "cert.pem", folder / "key.pem"


def test_tls(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        secure = Server()
        encrypted = await asyncio.start_server(secure, "127.0.0.1", 0, ssl=context)
        port = encrypted.sockets[0].getsockname()[1]

        async def say_nothing(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(3)
            writer.close()  # named here: Python 3.13 closes a connection whose writer nobody holds

        silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
        silent_port = silent.sockets[0].getsockname()[1]
        deaf = await asyncio.start_server(lambda r, w: w.write(reply(400)), "127.0.0.1", 0)  # speaks no TLS
        deaf_port = deaf.sockets[0].getsockname()[1]

        def new() -> Fetcher:
            fetch_module._tls.cache_clear()
            allow = tuple(f"127.0.0.1:{p}" for p in (port, silent_port, deaf_port))
            return Fetcher(FetchConfig(allow=allow, retries=0, timeout=0.5), lookup=at_home)

        distrustful = new()
        assert (await failure(distrustful, f"https://a.test:{port}/")).reason is Reason.TLS
        assert (await failure(distrustful, f"https://a.test:{silent_port}/")).reason is Reason.TIMEOUT
        await distrustful.close()

        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        trusting = new()
        assert (await trusting.get(f"https://a.test:{port}/")).data == PIXELS
        assert (await failure(trusting, f"https://b.test:{port}/")).reason is Reason.TLS  # not its name
        assert (await failure(trusting, f"https://a.test:{deaf_port}/")).reason is Reason.TLS
        async with running() as (_, root, _):
            secure["/down"] = reply(302, b"", f"Location: {root}x")
            plain_port = root.rstrip("/").rpartition(":")[2]
            both = Fetcher(
                FetchConfig(allow=(f"127.0.0.1:{port}", f"127.0.0.1:{plain_port}"), retries=0), lookup=at_home
            )
            assert (await both.get(f"https://a.test:{port}/down")).final_url == root + "x"
            await both.close()
        await trusting.close()
        for listener in (encrypted, silent, deaf):
            listener.close()

    asyncio.run(main())
    fetch_module._tls.cache_clear()


# ------------------------------------------------------------------------------------------------------------- opt-outs


def test_opt_out_headers_on_every_hop() -> None:
    async def main() -> None:
        async with running() as (server, root, fetcher):
            server["/two"] = reply(200, PIXELS, "X-Robots-Tag: nofollow", "x-robots-tag: NoAI")
            server["/other"] = reply(200, PIXELS, "X-Robots-Tag: otherbot: noindex, noai")
            server["/hop"] = reply(302, b"", "X-Robots-Tag: tastemaker: noimageai", "Location: /x")
            server["/gone"] = reply(404, b"", "X-Robots-Tag: noindex")
            error = await failure(fetcher, root + "two")
            assert (error.reason, error.http_status) == (Reason.OPTED_OUT, 200) and "noai" in error.detail
            assert (await failure(fetcher, root + "hop")).reason is Reason.OPTED_OUT
            assert server.count("/x") == 0
            assert (await failure(fetcher, root + "gone")).reason is Reason.HTTP_404
            assert (await fetcher.get(root + "other")).data == PIXELS
        async with running(respect=["robots-txt"]) as (server, root, fetcher):
            server["/two"] = reply(200, PIXELS, "X-Robots-Tag: noai")
            assert (await fetcher.get(root + "two")).data == PIXELS

    asyncio.run(main())


def robots(text: str) -> bytes:
    return reply(200, text.encode())


def test_robots_txt_is_asked_for_once_per_origin() -> None:
    async def main() -> None:
        async with running(per_domain=2) as (server, root, fetcher):
            server["//a.test/robots.txt"] = robots("User-agent: *\nDisallow: /private\n")
            results = await asyncio.gather(
                *(fetcher.get(f"{root}{'private' if i % 2 else 'public'}/{i}.jpg") for i in range(40)),
                *(fetcher.get(f"{root.replace('a.test', 'b.test')}private/{i}.jpg") for i in range(10)),
                return_exceptions=True,
            )
            reasons = Counter(r.reason if isinstance(r, RowError) else "ok" for r in results)
            assert reasons == {"ok": 30, Reason.OPTED_OUT: 20}
            assert server.count("/robots.txt", "a.test") == server.count("/robots.txt", "b.test") == 1
            assert not any(path.startswith("/private") for host, path in server.asked if host == "a.test")
            # The target of a redirect is asked too.
            server["/go"] = reply(302, b"", f"Location: {root}private/1.jpg")
            assert (await failure(fetcher, root.replace("a.test", "c.test") + "go")).reason is Reason.OPTED_OUT

    asyncio.run(main())


async def outcome_of(page: Any, file: str = "/robots.txt", **config: Any) -> tuple[str, Server]:
    """What becomes of an image whose server has this page as that file, or, in a dict, these pages."""
    async with running(**config) as (server, root, fetcher):
        server.pages |= page if isinstance(page, dict) else {file: page}
        try:
            await fetcher.get(root + "x.jpg")
        except RowError as e:
            return e.reason.value, server
        return "ok", server


@pytest.mark.parametrize(
    ("page", "outcome"),
    [
        (reply(404), "ok"),
        (reply(401), "ok"),
        (reply(403), "ok"),
        (reply(429), "http_429"),
        (reply(500), "http_5xx"),
        (reply(503), "http_5xx"),
        (reply(304), "ok"),
        (reply(200), "ok"),
        (robots("User-agent: *\nDisallow: /"), "opted_out"),
        (reply(200, gzip.compress(b"User-agent: *\nDisallow: /"), "Content-Encoding: gzip"), "opted_out"),
        (robots("User-agent: *\nDisallow: /\n" + "#" * 800_000), "opted_out"),
        (robots("#" * 800_000 + "\nUser-agent: *\nDisallow: /\n"), "ok"),
        ({"/robots.txt": reply(301, b"", "Location: /r"), "/r": robots("User-agent: *\nDisallow: /")}, "opted_out"),
        ({"/robots.txt": reply(301, b"", "Location: /robots.txt")}, "ok"),
        ({"/robots.txt": reply(301, b"", "Location: http://127.0.0.1:1/")}, "blocked_address"),
        ({"/robots.txt": reply(301, b"", "Location: http://nowhere.invalid/")}, "dns"),
        ({"/robots.txt": reply(301, b"", "Location: /r"), "/r": drop(30)}, "timeout"),
        (b"", "connect"),
        (b"HELLO\r\n\r\n", "protocol"),
        (drop(30), "timeout"),
    ],
)
def test_robots_txt_answers(page: Any, outcome: str) -> None:
    assert asyncio.run(outcome_of(page, timeout=1.0))[0] == outcome


def test_robots_txt_is_not_asked_for_where_it_is_not_respected() -> None:
    outcome, server = asyncio.run(outcome_of(robots("User-agent: *\nDisallow: /"), respect=["x-robots-tag"]))
    assert outcome == "ok" and server.asked == [("a.test", "/x.jpg")]


# ------------------------------------------------------------------------------------------------- retries, politeness


def flaky(failures: int, answer: bytes) -> Callable[[asyncio.StreamWriter, str], Awaitable[None]]:
    """The same answer so many times, then an image."""
    left = failures

    async def page(writer: asyncio.StreamWriter, _: str) -> None:
        nonlocal left
        writer.write(answer if left > 0 else reply(200, PIXELS))
        left -= 1

    return page


def test_only_what_may_pass_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "_BACKOFF", 0.01)
    monkeypatch.setattr(fetch_module, "SECOND_PASS", 0.01)
    monkeypatch.setattr(fetch_module, "_PAUSE", 0.01)

    async def main() -> None:
        async with running(retries=2, respect=["x-robots-tag"]) as (server, root, fetcher):
            for path, answer in [("503", reply(503)), ("429", reply(429)), ("cut", bare(b"x", "Content-Length: 9"))]:
                server["/" + path] = flaky(2, answer)
                assert (await fetcher.get(root + path)).data == PIXELS
            server["/500"] = flaky(3, reply(500))
            assert (await failure(fetcher, root + "500")).reason is Reason.HTTP_5XX
            for path, answer in [
                ("404", reply(404)),
                ("403", reply(403)),
                ("noai", reply(200, PIXELS, "X-Robots-Tag: noai")),
                ("blocked", reply(302, b"", "Location: http://10.0.0.1/")),
            ]:
                server["/" + path] = answer
                await failure(fetcher, root + path)
                assert server.count("/" + path) == 1
            assert [server.count(p) for p in ("/503", "/429", "/cut", "/500")] == [3, 3, 3, 3]

    asyncio.run(main())


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_waited_for_by_all_rows_of_the_host(as_date: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "_BACKOFF", 0.01)
    monkeypatch.setattr(fetch_module, "SECOND_PASS", 0.01)
    monkeypatch.setattr(fetch_module, "_PAUSE", 0.01)

    async def main() -> None:
        async with running(retries=1, per_domain=1, respect=()) as (server, root, fetcher):
            later = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True) if as_date else "1"
            server["/busy"] = flaky(1, reply(429, b"", f"Retry-After: {later}"))
            start = time.monotonic()
            await asyncio.gather(fetcher.get(root + "busy"), fetcher.get(root + "y"))
            assert server.asked[0][1] == "/busy" and server.count("/busy") == 2
            assert all(0.9 <= t - start < 3 for t in server.times[1:])
            other = time.monotonic()
            await fetcher.get(root.replace("a.test", "b.test"))
            assert time.monotonic() - other < 0.5

    asyncio.run(main())


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("5", 5),
        (" 7 ", 7),
        ("1000000000", 1e9),
        ("-5", None),
        ("soon", None),
        ("", None),
        ("1.5", None),
        ("٣", None),
        ("9" * 400, 999999999999.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 21 Oct 2015 07:28:00", 0),
        ("Wed, 99 Oct 2015 99:28:00 GMT", None),
    ],
)
def test_retry_after_values(value: str | None, seconds: float | None) -> None:
    assert fetch_module._retry_after(value) == seconds


def test_a_long_retry_after_ends_the_row_and_spares_the_host() -> None:
    async def main() -> None:
        async with running(retries=2, respect=()) as (server, root, fetcher):
            server["/x"] = reply(429, b"", "Retry-After: 1000000000")
            error = await failure(fetcher, root + "x")
            assert (error.reason, error.http_status) == (Reason.HTTP_429, 429) and "1000000000 s" in error.detail
            assert (await failure(fetcher, root + "y")).reason is Reason.HTTP_429
            assert server.asked == [("a.test", "/x")]
            assert (await fetcher.get(root.replace("a.test", "b.test"))).data == PIXELS

    asyncio.run(main())


def test_a_domain_that_only_fails_is_left_alone_and_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domains, "OPEN_SECONDS", 0.4)

    async def main() -> None:
        async with running(per_domain=2, respect=()) as (server, root, fetcher):
            for i in range(60):
                server[f"//a.test/{i}"] = b""  # hangs up
                server[f"//b.test/{i}"] = reply(500)
            errors = await asyncio.gather(*(failure(fetcher, f"{root}{i}") for i in range(60)))
            assert {e.reason for e in errors} == {Reason.CONNECT}
            assert len(server.asked) <= 2 * (domains.MAX_FAILURES + 3)  # aiohttp asks twice where a server hangs up
            assert server.times[-1] - server.times[0] > 0.3  # the one after the rest
            # What a URL answers is its own affair: each of these is asked, and one that works after 60 is seen.
            errors = await asyncio.gather(*(failure(fetcher, f"{root.replace('a.', 'b.')}{i}") for i in range(60)))
            assert {(e.reason, e.http_status) for e in errors} == {(Reason.HTTP_5XX, 500)}
            assert (await fetcher.get(root.replace("a.test", "b.test") + "works")).data == PIXELS
            # One that works again when it is tried loses only the rows that it refused.
            server["//c.test/x"] = flaky(domains.MAX_FAILURES, reply(503))
            rows = (fetcher.get(root.replace("a.", "c.") + "x") for _ in range(60))
            answers = await asyncio.gather(*rows, return_exceptions=True)
            assert sum(isinstance(a, RowError) for a in answers) == domains.MAX_FAILURES

    asyncio.run(main())


def test_no_host_gets_more_than_its_share_and_waiting_rows_hold_no_place() -> None:
    async def main() -> None:
        async with running(per_domain=3, concurrency=8, timeout=1.5) as (server, root, fetcher):

            async def slow(writer: asyncio.StreamWriter, _: str) -> None:
                await asyncio.sleep(0.3)
                writer.write(reply(200, PIXELS))

            for i in range(30):
                server[f"//a.test/{i}"] = slow
            start = time.monotonic()
            # 30 rows of one slow host wait three seconds for their turns, twice their own deadline, and all succeed ...
            crowd = [asyncio.create_task(fetcher.get(f"{root}{i}")) for i in range(30)]
            await asyncio.sleep(0.05)
            # ... while others pass at once.
            others = [fetcher.get(f"{root.replace('a.test', f'h{i}.test')}x") for i in range(40)]
            await asyncio.gather(*others)
            assert time.monotonic() - start < 2
            await asyncio.gather(*crowd)
            assert server.busiest["a.test"] == 3
            assert sum(server.busiest[h] for h in server.busiest) > 3

    asyncio.run(main())


def test_bodies_that_are_held_stop_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "MEMORY", 25_000)

    async def main() -> None:
        async with asyncio.timeout(10), running(max_bytes=9999) as (server, root, fetcher), fetcher.body(root + "1"):
            async with fetcher.body(root + "2") as body:
                assert body.data == PIXELS
                third = asyncio.create_task(fetcher.get(root + "3"))
                await asyncio.sleep(0.1)
                assert server.count("/3") == 0
            assert (await third).data == PIXELS

    asyncio.run(main())


def test_requests_that_hang_keep_nobody_waiting_when_bodies_were_held() -> None:
    async def main() -> None:
        config = {"concurrency": 200, "per_domain": 200, "rate": 0, "timeout": 4.0, "respect": ()}
        async with asyncio.timeout(15), running(**config) as (server, root, fetcher):
            clock = asyncio.get_running_loop().time
            async with contextlib.AsyncExitStack() as held:
                for n in range(30):
                    await held.enter_async_context(fetcher.body(f"{root}{n}"))
                for n in range(200):
                    await fetcher.get(f"{root}quick{n}")
            for n in range(60):
                server[f"/hang{n}"] = drop(30)
            hanging = [asyncio.create_task(failure(fetcher, f"{root}hang{n}")) for n in range(60)]
            await asyncio.sleep(0.1)
            began = clock()
            assert (await fetcher.get(root.replace("a.test", "b.test") + "x")).data == PIXELS
            assert clock() - began < 3
            for row in hanging:
                row.cancel()
            await asyncio.gather(*hanging, return_exceptions=True)

    asyncio.run(main())


def test_no_place_is_lost_on_any_way_out() -> None:
    async def main() -> None:
        async with asyncio.timeout(10), running(concurrency=1, timeout=0.2) as (server, root, fetcher):
            server["/redirect"] = reply(302, b"", "Location: /x")
            server["/bad"], server["/hang"], server["/hangup"] = reply(404), drop(30), b""
            for path in ("redirect", "bad", "hang", "hangup", "x") * 2:
                with contextlib.suppress(RowError):
                    await fetcher.get(root + path)
            assert (await fetcher.get(root + "x")).data == PIXELS

    asyncio.run(main())


def test_a_cancelled_row_leaves_its_place_and_turn() -> None:
    async def main() -> None:
        async with running(concurrency=1, per_domain=1, timeout=30.0) as (server, root, fetcher):
            server["/hang"] = drop(30)
            row = asyncio.create_task(fetcher.get(root + "hang"))
            await asyncio.sleep(0.1)
            row.cancel()
            with pytest.raises(asyncio.CancelledError):
                await row
            assert (await fetcher.get(root + "x")).data == PIXELS

    asyncio.run(main())


def test_fetchers_can_share_a_budget() -> None:
    async def main() -> None:
        shared = budget.Budget(2)
        async with running() as (server, root, _):

            async def slow(writer: asyncio.StreamWriter, _: str) -> None:
                await asyncio.sleep(0.02)
                writer.write(reply(200, PIXELS))

            server["/x"] = slow
            allow = (f"127.0.0.1:{root.rstrip('/').rpartition(':')[2]}",)
            config = FetchConfig(allow=allow, respect=(), per_domain=2)
            fetchers = [Fetcher(config, lookup=at_home, lease=budget.local(shared)) for _ in range(2)]
            await asyncio.gather(*(fetchers[i % 2].get(root + "x") for i in range(12)))
            assert server.busiest["a.test"] == 2
            for fetcher in fetchers:
                await fetcher.close()

    asyncio.run(main())


# -------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("engine", "curl"),
        ("timeout", 0),
        ("timeout", float("nan")),
        ("concurrency", 0),
        ("per_domain", 0),
        ("rate", -1),
        ("rate", float("nan")),
        ("max_bytes", 0),
        ("max_redirects", -1),
        ("retries", -1),
        ("user_agent", "a\r\nX: y"),
        ("user_agent", " "),
        ("user_agent", "tästmaker"),
        ("respect", ["robots.txt"]),
        ("respect", "robots-txt"),
        ("allow", ["localhost:80"]),
    ],
)
def test_wrong_configuration_names_the_key(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"fetch.{key}"):
        FetchConfig(**{key: value})
