"""Addresses and URLs: the rules on their own. That they keep connections from being made: test_fetch.py."""

from __future__ import annotations

import asyncio
import socket
import time

import aiohttp
import pytest
from yarl import URL

from aesthetic.errors import UserError
from curate.fetch import addresses
from curate.fetch.cache import CoalescingCache
from curate.fetch.dns import GuardedResolver
from curate.ledger.schema import FinalError, Reason, RowError

PRIVATE_TEXT = """
    0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 100.127.255.255 127.0.0.1 127.255.255.254
    168.63.129.16 169.254.169.254 169.254.170.2 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.8 192.0.0.9 192.0.0.170
    192.0.0.192 192.0.2.1 192.88.99.1 192.168.0.1 198.18.0.1 198.19.255.255 198.51.100.7 203.0.113.9 224.0.0.1
    239.255.255.250 240.0.0.1 255.255.255.255
    :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::ffff:0:127.0.0.1 64:ff9b::7f00:1 64:ff9b::808:808
    64:ff9b:1::1 100::1 2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1::
    2002:808:808::1 3ffe::1 3fff::1 5f00::1 fc00::1 fd00:ec2::254 fd12:3456::1 fe80::1 fe80::1%lo fec0::1 ff02::1
    ff0e::1 4000::1
"""
PUBLIC_TEXT = """
    1.1.1.1 8.8.8.8 100.63.255.255 100.128.0.1 172.15.0.1 172.32.0.1 193.0.0.1 223.255.255.254
    2606:4700:4700::1111 2001:4860:4860::8888 2a00:1450:4001::1
"""
PRIVATE, PUBLIC = PRIVATE_TEXT.split(), PUBLIC_TEXT.split()


@pytest.mark.parametrize("ip", PRIVATE)
def test_private_addresses_are_refused(ip: str) -> None:
    with pytest.raises(RowError) as e:
        addresses.check_address(ip, 80, ())
    assert e.value.reason is Reason.BLOCKED_ADDRESS


@pytest.mark.parametrize("ip", PUBLIC)
def test_public_addresses_pass(ip: str) -> None:
    addresses.check_address(ip, 443, ())
    for port in (22, 25, 6379, 8265, 10001):
        with pytest.raises(RowError, match="port"):
            addresses.check_address(ip, port, ())


def test_allow_opens_exactly_its_network_and_port() -> None:
    allow = addresses.parse_allow(["127.0.0.0/8:8123", "[::1]/128:8123", "10.1.2.3:6379", "[fd00::]/8:80"])
    for ip, port in [("127.0.0.1", 8123), ("127.9.9.9", 8123), ("::1", 8123), ("10.1.2.3", 6379), ("fd00::7", 80)]:
        addresses.check_address(ip, port, allow)
    for ip, port in [
        ("127.0.0.1", 8124),
        ("126.255.255.255", 6379),
        ("::2", 8123),
        ("::ffff:127.0.0.1", 8123),
        ("10.1.2.4", 6379),
        ("10.1.2.3", 80),
        ("169.254.169.254", 8123),
        ("fe00::1", 80),
    ]:
        with pytest.raises(RowError):
            addresses.check_address(ip, port, allow)


@pytest.mark.parametrize(
    "entry",
    [
        *["127.0.0.1", "127.0.0.0/8", "127.0.0.1/8:80", "localhost:80", "::1:80", "[::1]:0", "1.2.3.4:70000", "*:80"],
        *["", "300.0.0.1:80", "10.0.0.0/33:80", "127.0.0.0/8:80-90"],
    ],
)
def test_a_wrong_allow_is_an_error_that_quotes_it(entry: str) -> None:
    with pytest.raises(UserError, match=r"fetch\.allow") as e:
        addresses.parse_allow([entry])
    assert repr(entry) in str(e.value)


BAD_URLS = [
    *["", " ", "example.com/a.jpg", "/a.jpg", "file:///etc/passwd", "FILE:///etc/passwd"],
    *["ftp://example.com/a", "data:image/png;base64,AAAA", "gopher://example.com", "javascript:alert(1)"],
    *[
        "jar:http://example.com!/",
        "\tfile:///etc/passwd",
        " file:///x",
        "http:",
        "http://",
        "http:///a",
        "http:example",
    ],
    *[
        "http://user@example.com/",
        "http://user:pw@example.com/",
        "http://example.com@127.0.0.1/",
        "http://[]@/",
        "http://[::1]@",
        "http://@example.com/",
    ],
    *["http://2130706433/", "http://0x7f000001/", "http://0x7f.1/", "http://127.1/", "http://0177.0.0.1/"],
    *["http://127.0.0.1./", "http://127.0.0.01/", "http://017700000001/", "http://1.2.3.4.5/", "http://0x/"],
    *["http://%31%32%37.0.0.1/", "http://127.0.0.1%00.example.com/", "http://ex%61mple.com/", "http://exa mple.com/"],
    *[
        "http://\\127.0.0.1/",
        "\\\\",
        "//",
        "///a",
        "http://exa\x01mple.com/",
        "http://example.com/\x01a",
        "ftp:\\\\a.com\\b",
    ],
    *["http://ex\u200bample.com/", "http://[::1", "http://[::1%25lo]/", "http://[v1.a]/", "http://a..b/", "http://.a/"],
    *["http://-a.com/", "http://" + "a" * 64 + ".com/", "http://" + "a." * 130 + "com/", "http://example.com:0/"],
    *["http://example.com:99999/", "http://example.com:port/", "http://example.com/" + "a" * 8000],
    *[
        "http://*.example.com/",
        "http://a,b.com/",
        "http://ex<ample>.com/",
        "http://\ud800.com/",
        "http://example.com:-1/",
    ],
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_bad_urls(url: str) -> None:
    with pytest.raises(RowError) as e:
        addresses.parse_url(url, ())
    assert e.value.reason is Reason.BAD_URL


@pytest.mark.parametrize(
    "url",
    [
        *["http://127.0.0.1/", "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://１２７.０.０.１/"],
        *["http://127。0。0。1/", "http://①②⑦.⓪.⓪.①/", "https://169.254.169.254/latest/meta-data/"],
        *["http://[fd00:ec2::254]/", "http://0.0.0.0:80/", "http://127.0.0.1:8265/api/jobs/", "http://1.1.1.1:6379/"],
        *["http://[0:0:0:0:0:0:0:1]/", "HTTP://127.0.0.1/", "http://127.0.0.1\\@example.com/", "//127.0.0.1/a"],
        *["http:\\\\127.0.0.1\\a", "\ufeffhttp://127.0.0.1/", "http://127.0.\t0.1/", "\\\\127.0.0.1/", "/\\127.0.0.1/"],
    ],
)
def test_urls_with_addresses_that_may_not_be_contacted(url: str) -> None:
    with pytest.raises(RowError) as e:
        addresses.parse_url(url, ())
    assert e.value.reason is Reason.BLOCKED_ADDRESS


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("http://Example.COM", "http://example.com/"),
        (" https://example.com/a.jpg ", "https://example.com/a.jpg"),
        ("https://example.com/a b.jpg#frag", "https://example.com/a%20b.jpg"),
        ("https://example.com/ü?q=ä", "https://example.com/%C3%BC?q=%C3%A4"),
        ("https://bücher.example/", "https://xn--bcher-kva.example/"),
        ("https://example.com:443/a", "https://example.com/a"),
        (
            "https://example.com/%7e%c3%a9?sig=a%2Bb%3d+c&x[]=%zz",
            "https://example.com/%7e%c3%a9?sig=a%2Bb%3d+c&x[]=%zz",
        ),
        ("https://a_b.example.com./x", "https://a_b.example.com./x"),
        ("https://example.com/a/../b", "https://example.com/b"),
        ("http://1.1.1.1:8080/#@127.0.0.1/", "http://1.1.1.1:8080/"),
        # what a browser makes of it
        ("\ufeff https://example.com/a.jpg\r\n", "https://example.com/a.jpg"),
        ("\x00\xa0https://example.com/a.jpg\u3000", "https://example.com/a.jpg"),
        ("https://exam\nple.com/a\r\n\tb.jpg", "https://example.com/ab.jpg"),
        ("//example.com/a.jpg", "http://example.com/a.jpg"),
        ("https://example.com/a?b=1&amp;c=2&AMP;d&#38;e&#x26;f&copy=1", "https://example.com/a?b=1&c=2&d&e&f&copy=1"),
        ("https:\\\\example.com\\a\\b.jpg?c\\d", "https://example.com/a/b.jpg?c%5Cd"),
        ("http://example.com\\@127.0.0.1/", "http://example.com/@127.0.0.1/"),
        (
            'https://example.com/a b|c^"<é>.jpg?s=%zz %7e',
            "https://example.com/a%20b%7Cc%5E%22%3C%C3%A9%3E.jpg?s=%zz%20%7e",
        ),
        ("https://example.com/a{1}`.jpg#f r", "https://example.com/a%7B1%7D%60.jpg"),
        ("https://example.com/./a/%2e%2e/b/../c.jpg", "https://example.com/c.jpg"),
        ("HTTPS://EXAMPLE.com:0443/A", "https://example.com/A"),
    ],
)
def test_good_urls_go_out_as_written(text: str, sent: str) -> None:
    assert str(addresses.parse_url(text, ())).rstrip("/") == sent.rstrip("/")


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("b.jpg", "https://example.com/d/b.jpg"),
        ("/x%2fy?%7e", "https://example.com/x%2fy?%7e"),
        ("//other.example/x", "https://other.example/x"),
        ("?q", "https://example.com/d/a.jpg?q"),
        ("http://other.example/", "http://other.example/"),
        (" b c.jpg\r\n", "https://example.com/d/b%20c.jpg"),
        ("\\\\other.example\\x", "https://other.example/x"),
        ("/x?a&amp;b", "https://example.com/x?a&amp;b"),
    ],
)
def test_redirect_targets(location: str, target: str) -> None:
    assert str(addresses.parse_url(location, (), base=URL("https://example.com/d/a.jpg"))) == target


@pytest.mark.parametrize("text", ["http:///a", "http:a", "http:/a", "https:///a", "http://\\127.0.0.1/", "http://?a"])
def test_a_scheme_without_a_host_is_refused_in_redirects_too(text: str) -> None:
    """yarl joins these to the page that they came from."""
    for base in (None, URL("http://example.com/d/a.jpg")):
        with pytest.raises(RowError) as refused:
            addresses.parse_url(text, (), base=base)
        assert refused.value.reason is Reason.BAD_URL


def test_a_host_that_none_can_be_is_refused_before_it_is_encoded() -> None:
    began = time.process_time()
    for _ in range(100):
        with pytest.raises(RowError, match="host"):
            addresses.parse_url("http://" + "ü" * 7000, ())
    assert time.process_time() - began < 1  # 2.5 s and more where IDNA sees it


# ---------------------------------------------------------------------------------------------------------- resolver


def test_lookups_are_shared_kept_and_checked_for_every_port() -> None:
    asked: list[str] = []

    async def lookup(host: str) -> list[str]:
        asked.append(host)
        await asyncio.sleep(0.01)
        if host == "none.test":
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        if host == "busy.test":
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return {"mixed.test": ["8.8.8.8", "10.0.0.1"], "home.test": ["127.0.0.1"]}.get(host, ["8.8.8.8"])

    async def main() -> None:
        resolver = GuardedResolver(addresses.parse_allow(["127.0.0.0/8:8123"]), 5.0, lookup)
        answers = await asyncio.gather(*(resolver.resolve("good.test", 80) for _ in range(50)))
        assert {a["host"] for answer in answers for a in answer} == {"8.8.8.8"}
        assert (await resolver.resolve("good.test", 443))[0]["port"] == 443
        assert asked == ["good.test"]

        errors = await asyncio.gather(*(resolver.resolve("none.test", 80) for _ in range(5)), return_exceptions=True)
        errors += await asyncio.gather(resolver.resolve("none.test", 80), return_exceptions=True)
        assert all(isinstance(e, FinalError) and e.reason is Reason.DNS for e in errors)
        assert len({id(e) for e in errors}) == 6 and asked.count("none.test") == 1

        with pytest.raises(RowError) as e:
            await resolver.resolve("busy.test", 80)
        assert e.value.reason is Reason.DNS and not isinstance(e.value, FinalError)
        for host, port in [("mixed.test", 80), ("home.test", 8124)]:
            with pytest.raises(RowError, match=host) as e:
                await resolver.resolve(host, port)
            assert e.value.reason is Reason.BLOCKED_ADDRESS
        assert (await resolver.resolve("home.test", 8123))[0]["host"] == "127.0.0.1"

        # One who gives up takes nobody along.
        first = asyncio.create_task(resolver.resolve("slow.test", 80))
        second = asyncio.create_task(resolver.resolve("slow.test", 80))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second)[0]["host"] == "8.8.8.8"
        await resolver.close()

    asyncio.run(main())


def test_the_system_resolves_localhost() -> None:
    async def main() -> None:
        resolver = GuardedResolver(addresses.parse_allow(["127.0.0.0/8:80", "[::1]:80"]), 5.0)
        assert {a["host"] for a in await resolver.resolve("localhost", 80)} <= {"127.0.0.1", "::1"}
        with pytest.raises(RowError) as e:
            await resolver.resolve("localhost", 81)
        assert e.value.reason is Reason.BLOCKED_ADDRESS
        await resolver.close()

    asyncio.run(main())


def test_outcomes_are_forgotten_in_time_and_beyond_size() -> None:
    ran: list[str] = []

    async def compute(key: str) -> int:
        ran.append(key)
        if key == "bug":
            raise ZeroDivisionError
        return len(ran)

    async def main() -> None:
        shared = CoalescingCache(compute, lambda _: 0.02, size=2)
        assert await shared.get("a") == await shared.get("a") == 1
        await asyncio.sleep(0.03)
        assert await shared.get("a") == 2
        assert [await shared.get(k) for k in "bca"] == [3, 4, 5]
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await shared.get("bug")
        assert ran.count("bug") == 2

    asyncio.run(main())


def test_the_socket_has_the_last_word() -> None:
    """aiohttp with a resolver that does not check at all still reaches nothing that is not allowed."""

    class Careless(aiohttp.resolver.AbstractResolver):
        async def resolve(self, host: str, port: int = 0, family: int = 0) -> list:
            answer = {"hostname": host, "host": "127.0.0.1", "port": port}
            return [{**answer, "family": socket.AF_INET, "proto": 0, "flags": 0}]

        async def close(self) -> None: ...

    async def main() -> None:
        hits = []

        def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            hits.append(1)
            writer.close()

        server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        for allow, reached in [((), False), (addresses.parse_allow([f"127.0.0.1:{port}"]), True)]:
            connector = aiohttp.TCPConnector(resolver=Careless(), socket_factory=addresses.guarded_socket(allow))
            async with aiohttp.ClientSession(connector=connector) as session:
                for host in ("good.test", "127.0.0.1"):
                    with pytest.raises(aiohttp.ClientError):
                        await session.get(f"http://{host}:{port}/")
            assert bool(hits) is reached
        server.close()

    asyncio.run(main())
