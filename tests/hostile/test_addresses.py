"""Addresses (N1-N6 of the threat list): a resolver that lies, listeners that count, and every `connect` of the process.

All cases run against one fetcher and the same listeners; each one's own connections are what its test looks at.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

import pytest
from watched import watched

from curate.fetch.client import Body, Fetcher
from curate.fetch.config import FetchConfig
from curate.ledger.schema import Reason, RowError

# ------------------------------------------------------------------------------------------------------- the cases

TARGETS = {
    "loopback": "127.0.0.1",
    "private": "10.1.2.3",
    "metadata": "169.254.169.254",
    "cgnat": "100.100.100.200",
}


def spellings(dotted: str) -> Iterator[tuple[str, str]]:
    """(name, host) for the ways in which some resolver or browser reads an IPv4 address, and ways around a filter."""
    a, b, c, d = (int(part) for part in dotted.split("."))
    number = int(IPv4Address(dotted))
    wide = str.maketrans("0123456789", "０１２３４５６７８９")
    round_ = str.maketrans("0123456789", "⓪①②③④⑤⑥⑦⑧⑨")
    yield from {
        "plain": dotted,
        "decimal": f"{number}",
        "hex": f"{number:#x}",
        "HEX": f"0X{number:X}",
        "octal": f"0{number:o}",
        "hex parts": f"{a:#x}.{b:#x}.{c:#x}.{d:#x}",
        "octal parts": f"0{a:o}.0{b:o}.0{c:o}.0{d:o}",
        "zeros": f"{a:03d}.{b:03d}.{c:03d}.{d:03d}",
        "mixed": f"{a:#x}.{b}.0{c:o}.{d}",
        "two parts": f"{a}.{number & 0xFFFFFF}",
        "three parts": f"{a}.{b}.{number & 0xFFFF}",
        "overflow": f"{a + 256}.{b}.{c}.{d}",
        "dot": f"{dotted}.",
        "two dots": f"{dotted}..",
        "full-width": dotted.translate(wide),
        "circled": dotted.translate(round_),
        "ideographic dots": dotted.replace(".", "\u3002"),
        "half-width dots": dotted.replace(".", "\uff61"),
        "soft hyphen": dotted.replace(".", "\u00ad."),
        "zero width": dotted.replace(".", "\u200b."),
        "percent": "".join(f"%{ord(digit):02x}" for digit in dotted),
        "percent dots": dotted.replace(".", "%2e"),
        "user": f"good.example@{dotted}",
        "user and word": f"good.example:80@{dotted}",
        "backslash": f"good.example\\@{dotted}",
        "backslash before": f"{dotted}\\@good.example",
        "fragment": f"good.example#@{dotted}",
        "two users": f"a@b@{dotted}",
        "brackets": f"[{dotted}]",
        "tab": f"{dotted[:4]}\t{dotted[4:]}",
        "null": f"{dotted}\0.good.example",
    }.items()


def clothes(dotted: str) -> Iterator[tuple[str, str]]:
    """(name, IPv6 address) for the ways in which an IPv4 address is carried in an IPv6 one."""
    v4 = int(IPv4Address(dotted))
    high, low = f"{v4 >> 16:x}", f"{v4 & 0xFFFF:x}"
    upside = v4 ^ 0xFFFFFFFF
    yield from {
        "mapped": f"::ffff:{dotted}",
        "mapped, hex": f"::ffff:{high}:{low}",
        "compatible": f"::{dotted}",
        "translated": f"::ffff:0:{dotted}",
        "NAT64": f"64:ff9b::{high}:{low}",
        "local NAT64": f"64:ff9b:1::{high}:{low}",
        "6to4": f"2002:{high}:{low}::1",
        "Teredo server": f"2001:0:{high}:{low}::1",
        "Teredo client": f"2001:0:4136:e378:8000:63bf:{upside >> 16:x}:{upside & 0xFFFF:x}",
        "ISATAP": f"2606:4700:4700::5efe:{high}:{low}",
        "ISATAP, unique": f"2606:4700:4700::200:5efe:{high}:{low}",
    }.items()


_NOT_GLOBAL = """
    0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 100.127.255.255 127.0.0.1 127.0.0.2
    127.255.255.254 168.63.129.16 169.254.0.1 169.254.169.254 169.254.170.2 169.254.169.123 172.16.0.1 172.31.255.255
    192.0.0.1 192.0.0.8 192.0.0.192 192.0.2.1 192.88.99.1 192.168.0.1 192.168.255.255 198.18.0.1 198.19.255.255
    198.51.100.7 203.0.113.9 224.0.0.1 224.0.0.251 232.1.1.1 239.255.255.250 240.0.0.1 255.255.255.255
    :: ::1 ::2 100::1 100:0:0:1::1 2001:10::1 2001:20::1 2001:db8::1 3ffe::1 3fff::1 5f00::1 4000::1 8000::1 fc00::1
    fd00:ec2::254 fd20:ce::254 fd12:3456::1 fe80::1 fe80::1%lo fe80::a9fe:a9fe fec0::1 feff::1 ff01::1 ff02::1 ff05::2
    ff0e::1
"""
NOT_GLOBAL = _NOT_GLOBAL.split()
"""Loopback, private, link-local, shared, metadata of seven clouds, documentation, benchmarks, relays, multicast."""

CLOTHED = {f"{target} as {name}": v6 for target, v4 in TARGETS.items() for name, v6 in clothes(v4)}
LITERALS = {f"{target}, {name}": host for target, v4 in TARGETS.items() for name, host in spellings(v4)}
LITERALS |= {name: f"[{v6}]" for name, v6 in CLOTHED.items()}
LITERALS |= {ip: f"[{ip.replace('%', '%25')}]" if ":" in ip else ip for ip in NOT_GLOBAL}
LITERALS |= {
    "localhost": "localhost",
    "LOCALHOST": "LOCALHOST",
    "localhost.": "localhost.",
    "localhost, wide": "ｌｏｃａｌｈｏｓｔ",
    "localhost, ideographic": "localhost\u3002",
    "a name under localhost": "pictures.localhost",
    "IDN of a liar": "bücher.lies.test",
    "IDN as ASCII": "xn--bcher-kva.lies.test",
}

GOOD = "127.0.0.9"
"""Where the server is that may be asked: the part of a public address, in tests that never leave this machine."""

ANSWERS: dict[str, list[str]] = {f"answer {ip}": [ip] for ip in NOT_GLOBAL}
ANSWERS |= {f"answer {name}": [v6] for name, v6 in CLOTHED.items()}
ANSWERS |= {  # one private among public ones, at every place
    f"one of {count} at {place}": [*["93.184.216.34"] * place, "127.0.0.1", *["93.184.216.34"] * (count - place - 1)]
    for count in (2, 3, 4)
    for place in range(count)
}
ANSWERS |= {
    "public, and private in IPv6": ["93.184.216.34", "::1"],
    "public, and mapped": ["93.184.216.34", "::ffff:127.0.0.1"],
    "private in IPv6, and public": ["fd00:ec2::254", "2606:4700:4700::1111"],
    "the allowed one and another": [GOOD, "127.0.0.1"],
    "another and the allowed one": ["127.0.0.1", GOOD],
}

BAD_PORTS = (22, 25, 53, 110, 143, 179, 389, 465, 587, 993, 2049, 5060, 6000, 6379, 6667, 8265, 10001, 10080)

NOT_URLS = [
    *[
        "",
        " ",
        "good.example/a.jpg",
        "/a.jpg",
        "a.jpg",
        "http:a.jpg",
        "http:///a.jpg",
        "http://",
    ],
    *[
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        " file:///etc/passwd",
        "\tfile:///etc/passwd",
        "\x00file:///etc/passwd",
    ],
    *["file://localhost/etc/passwd", "file:/etc/passwd", "ftp://good.example/a", "ftps://good.example/a"],
    *[
        "data:image/png;base64,AAAA",
        "gopher://127.0.0.1:6379/_INFO",
        "javascript:alert(1)",
        "blob:http://good.example/",
    ],
    *["jar:http://good.example!/", "ws://good.example/", "unix:///var/run/docker.sock", "http+unix://%2Frun/x"],
    *["dict://127.0.0.1:11211/stat", "ldap://127.0.0.1/", "view-source:http://good.example/", "smb://127.0.0.1/c$"],
    *["netdoc:/etc/passwd", "local_file:///etc/passwd", "url:file:///etc/passwd", "fi\nle:///etc/passwd"],
]

NOT_BY_ADDRESS = ("a file", "with a user", "decimal")  # refused by how they are written

DESTINATIONS = {  # where a redirect may lead, with {port} of the listeners that nobody may reach
    "private literal": "http://127.0.0.1:{port}/",
    "private name": "http://private.test:{port}/",
    "decimal": "http://2130706433:{port}/",
    "IPv6": "http://[::1]:{port}/",
    "mapped": "http://[::ffff:127.0.0.1]:{port}/",
    "metadata": "http://169.254.169.254/latest/meta-data/iam/",
    "another port of the allowed host": "http://127.0.0.9:{port}/",
    "protocol-relative": "//127.0.0.1:{port}/",
    "a file": "file:///etc/passwd",
    "with a user": "http://good.test@127.0.0.1:{port}/",
}


# ------------------------------------------------------------------------------------------------------ the listeners


@dataclass(frozen=True)
class Outcome:
    """What became of one URL."""

    result: Body | RowError
    hits: int  # connections that the listeners saw
    connects: tuple[tuple[str, int], ...]  # those that were begun, but for the allowed server's

    @property
    def reason(self) -> Reason | None:
        return self.result.reason if isinstance(self.result, RowError) else None


class Ground:
    """Listeners at all addresses here that a URL could mean, and one server that may be asked; one fetcher."""

    def __init__(self) -> None:
        self.hits = 0
        self.hops: dict[str, str] = {}  # path -> Location
        self.paths: list[str] = []  # that the server was asked for
        self.questions: Counter[str] = Counter()
        self.answers: dict[str, list[str]] = {"good.test": [GOOD], "private.test": ["127.0.0.1"]}

    async def lookup(self, name: str) -> list[str]:
        """The resolver that lies."""
        self.questions[name] += 1
        if name.rstrip(".").endswith("localhost") or name.endswith("lies.test"):
            return ["127.0.0.1"]
        if name in self.answers:
            return self.answers[name]
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    async def _victim(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.hits += 1
        writer.close()

    async def _good(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode()
        self.paths.append(path)
        status, more = ("302 Found", f"Location: {self.hops[path]}\r\n") if path in self.hops else ("200 OK", "")
        writer.write(f"HTTP/1.1 {status}\r\n{more}Content-Length: 3\r\nConnection: close\r\n\r\nabc".encode())
        await writer.drain()
        writer.close()

    async def __aenter__(self) -> Ground:
        victims = await asyncio.start_server(self._victim, "127.0.0.1", 0)
        self.port = victims.sockets[0].getsockname()[1]
        good = await asyncio.start_server(self._good, GOOD, 0)
        self.good_port = good.sockets[0].getsockname()[1]
        self._servers = [victims, good]
        for address in ("127.0.0.2", GOOD, "::1"):
            self._servers.append(await asyncio.start_server(self._victim, address, self.port))
        self.fetcher = self.new_fetcher()
        return self

    def new_fetcher(self) -> Fetcher:
        """One without memory."""
        config = FetchConfig(allow=(f"{GOOD}:{self.good_port}",), retries=0, timeout=5, respect=())
        return Fetcher(config, lookup=self.lookup)

    async def __aexit__(self, *_: object) -> None:
        await self.fetcher.close()
        for server in self._servers:
            server.close()

    async def ask(self, url: str) -> Outcome:
        """Fetch one URL, and see whom that contacts."""
        before = self.hits
        with watched() as seen:
            try:
                result: Body | RowError = await self.fetcher.get(url)
            except RowError as e:
                result = e
            await asyncio.sleep(0)  # a connection that was made is seen by the listener
        others = tuple(c for c in seen.connects if c != (GOOD, self.good_port))
        return Outcome(result, self.hits - before, others)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """Every case's outcome, by its name."""

    async def main() -> dict[str, Outcome]:
        found: dict[str, Outcome] = {}
        async with Ground() as ground:
            for name, host in LITERALS.items():
                for scheme, port in (("http", ground.port), ("http", ground.good_port), ("https", 443)):
                    found[f"{name} {scheme} {port == ground.port}"] = await ground.ask(f"{scheme}://{host}:{port}/x")
            for number, (name, answer) in enumerate(ANSWERS.items()):
                ground.answers[f"n{number}.test"] = answer
                found[name] = await ground.ask(f"http://n{number}.test:{ground.port}/x")
            for number, ((name, url), hop) in enumerate(itertools.product(DESTINATIONS.items(), range(1, 6))):
                steps = [
                    f"http://r{number}-{step}.test:{ground.good_port}/{number}/{step}" for step in range(1, hop + 1)
                ]
                for step, target in enumerate([*steps[1:], url.format(port=ground.port)], 1):
                    ground.answers[f"r{number}-{step}.test"] = [GOOD]  # a host for each hop: none has to wait
                    ground.hops[f"/{number}/{step}"] = target
                found[f"{name} at {hop}"] = await ground.ask(steps[0])
            ground.answers["public.test"] = ["93.184.216.34"]
            for port in BAD_PORTS:
                found[f"port {port}"] = await ground.ask(f"http://public.test:{port}/")
            found["good"] = await ground.ask(f"http://good.test:{ground.good_port}/x")
            found["hits"] = Outcome(found["good"].result, ground.hits, ())
        return found

    return asyncio.run(main())


def untouched(outcome: Outcome) -> RowError:
    """The error of a row that contacted nobody."""
    assert isinstance(outcome.result, RowError), outcome.result
    assert (outcome.hits, outcome.connects) == (0, ())
    return outcome.result


# ---------------------------------------------------------------------------------------------------------- the tests


def test_no_listener_was_reached_in_all(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["hits"].hits == 0 and len(outcomes) > 500
    good = outcomes["good"].result
    assert isinstance(good, Body) and good.data == b"abc"  # the same fetcher and resolver do reach who may be asked


def test_the_watch_sees_connections() -> None:
    async def main() -> None:
        async with Ground() as ground:
            with watched() as seen:
                _, writer = await asyncio.open_connection("127.0.0.1", ground.port)
                writer.close()
                _, writer = await asyncio.open_connection("::1", ground.port)
                writer.close()
                await asyncio.sleep(0.05)
            assert seen.connects == [("127.0.0.1", ground.port), ("::1", ground.port)] and ground.hits == 2

    asyncio.run(main())


@pytest.mark.parametrize("name", LITERALS)
def test_addresses_in_urls(outcomes: dict[str, Outcome], name: str) -> None:
    """At a listener's port, at the allowed server's port, and with TLS at 443."""
    for way in ("http True", "http False", "https False"):
        error = untouched(outcomes[f"{name} {way}"])
        wanted = {Reason.BAD_URL, Reason.BLOCKED_ADDRESS}
        # "good.example#@127.0.0.1" is a URL of good.example, which has no address here; so is one with a backslash,
        # which ends a host as a slash does (WHATWG)
        elsewhere = name.endswith((", fragment", ", backslash"))
        assert error.reason in (wanted | {Reason.DNS} if elsewhere else wanted), error


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_of_a_resolver(outcomes: dict[str, Outcome], name: str) -> None:
    error = untouched(outcomes[name])
    assert error.reason is Reason.BLOCKED_ADDRESS and error.final_url is None and error.http_status is None


@pytest.mark.parametrize("hop", range(1, 6))
@pytest.mark.parametrize("name", DESTINATIONS)
def test_redirects_at_every_hop(outcomes: dict[str, Outcome], name: str, hop: int) -> None:
    error = untouched(outcomes[f"{name} at {hop}"])
    assert error.reason is (Reason.BAD_URL if name in NOT_BY_ADDRESS else Reason.BLOCKED_ADDRESS), error
    if name != "private name":  # that one is refused by its own request, which nobody answered
        # the row says how far it came: the hop that led away is the last one that answered
        assert error.http_status == 302 and (error.final_url or "").endswith(f"/{hop}")


@pytest.mark.parametrize("port", BAD_PORTS)
def test_ports_of_other_services(outcomes: dict[str, Outcome], port: int) -> None:
    assert untouched(outcomes[f"port {port}"]).reason is Reason.BLOCKED_ADDRESS


@pytest.mark.parametrize("url", NOT_URLS)
def test_what_is_no_url_of_the_web_opens_nothing(url: str) -> None:
    async def main() -> None:
        async with Ground() as ground:
            with watched() as seen:
                error = untouched(await ground.ask(url))
            assert error.reason in (Reason.BAD_URL, Reason.BLOCKED_ADDRESS)
            assert not [path for path in seen.opened if "passwd" in path] and not ground.questions

    asyncio.run(main())


REBINDING = {  # whether the nth answer for a name is the private one
    "public, then private": lambda n: n % 2 == 0,
    "private, then public": lambda n: n % 2 == 1,
    "once public": lambda n: n > 0,
    "once private": lambda n: n == 0,
    "in pairs": lambda n: n // 2 % 2 == 1,
    "in threes": lambda n: n // 3 % 2 == 1,
    "third only": lambda n: n % 3 == 2,
    "of no pattern": lambda n: n * 2654435761 % 7 < 3,
    "of another": lambda n: n * 40503 % 11 < 5,
    "private mostly": lambda n: n % 10 > 0,
}


@pytest.mark.parametrize("pattern", REBINDING)
def test_rebinding_races(pattern: str) -> None:
    """A hundred rows at once, of ten names, through ten fetchers that remember nothing; every question may lie.

    Whoever checks one answer and connects by another is found out: at the good server's port, a listener that nobody
    may reach stands at the private address.
    """
    lies = REBINDING[pattern]

    async def main() -> None:
        asked: Counter[str] = Counter()
        hits = 0

        async def victim(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal hits
            hits += 1
            writer.close()

        async with Ground() as ground:
            trap = await asyncio.start_server(victim, "127.0.0.1", ground.good_port)

            async def lookup(name: str) -> list[str]:
                answer = "127.0.0.1" if lies(asked[name]) else GOOD
                asked[name] += 1
                await asyncio.sleep(0.001 * (asked[name] % 3))
                return [answer]

            ground.lookup = lookup  # type: ignore[method-assign]
            fetchers = [ground.new_fetcher() for _ in range(10)]
            with watched() as seen:
                rows = await asyncio.gather(
                    *(f.get(f"http://n{i}.test:{ground.good_port}/x") for f in fetchers for i in range(10)),
                    return_exceptions=True,
                )
            reasons = Counter(r.reason if isinstance(r, RowError) else type(r).__name__ for r in rows)
            assert set(reasons) <= {"Body", Reason.BLOCKED_ADDRESS} and reasons.total() == 100
            assert set(seen.connects) <= {(GOOD, ground.good_port)} and hits == 0
            assert len(seen.connects) > 0 and reasons[Reason.BLOCKED_ADDRESS] > 0  # both kinds of answer were used
            for fetcher in fetchers:
                await fetcher.close()
            trap.close()

    asyncio.run(main())
