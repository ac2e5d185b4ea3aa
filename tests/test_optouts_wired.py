"""Opt-outs as the fetcher heeds them, against a real server: at every hop, before the body, one file per origin."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections import Counter
from typing import Any

import pytest

from curate.fetch import optouts
from curate.fetch.config import FetchConfig
from curate.ledger.schema import Reason, RowError
from tests.test_fetch import PIXELS, bare, drop, failure, outcome_of, reply, robots, running

FILE = "/.well-known/tdmrep.json"
ALL_RESERVED = json.dumps([{"location": "/", "tdm-reservation": 1}]).encode()


def test_what_is_respected_where_nobody_says_otherwise() -> None:
    """The file costs a request per origin, and hardly any has one: it is for those who ask for it."""
    files = ("tdm-reservation", "content-usage", "c2pa", "iptc")
    assert FetchConfig().respect == optouts.SIGNALS[:6] == ("x-robots-tag", "robots-txt", *files)
    assert FetchConfig(respect=optouts.SIGNALS).respect == optouts.SIGNALS


@pytest.mark.parametrize(
    "header",
    [
        *[f"X-Robots-Tag: {d}" for d in ("noai", "noimageai", "noml", "noindex", "noimageindex", "none", "NoML")],
        *["X-Robots-Tag: otherbot: noai, tastemaker: noml", "tdm-reservation: 1", "TDM-Reservation:   1  "],
        "tdm-reservation: 1\r\ntdm-policy: https://provider.example/policy.json",
        "tdm-reservation: 1\r\ntdm-reservation: 1",
    ],
)
@pytest.mark.parametrize("where", ["only", "first hop", "last hop"])
def test_a_header_ends_a_row_before_its_body(header: str, where: str) -> None:
    signal = header.partition(":")[0].lower()

    async def endless(writer: asyncio.StreamWriter, _: str) -> None:
        writer.write(bare(b"", header, "Content-Type: image/jpeg"))
        while True:
            writer.write(bytes(1000))
            await writer.drain()
            await asyncio.sleep(0.01)

    async def main() -> None:
        async with running(respect=[signal], timeout=10) as (server, root, fetcher):
            hop = [header] if where == "first hop" else []
            server["/hop"] = reply(302, b"", *hop, "Location: /x.jpg")
            server["/x.jpg"] = reply(200, PIXELS) if hop else endless
            start = time.monotonic()
            error = await failure(fetcher, root + ("x.jpg" if where == "only" else "hop"))
            assert time.monotonic() - start < 5
            assert error.reason is Reason.OPTED_OUT and signal in error.detail.lower()
            assert error.http_status == (302 if hop else 200)
            assert error.final_url == root + ("hop" if hop else "x.jpg")
            assert server.count("/x.jpg") == (not hop)

    asyncio.run(main())


@pytest.mark.parametrize(
    "header",
    [
        *["tdm-reservation: 0", "tdm-reservation: 2", "tdm-reservation: yes", "tdm-reservation:", "tdm-policy: 1"],
        *[
            "tdm-reservation: 1\r\ntdm-reservation: 0",
            "X-Robots-Tag: otherbot: noml",
            "X-Robots-Tag: noarchive, nofollow",
        ],
    ],
)
def test_other_headers_end_none(header: str) -> None:
    async def main() -> None:
        async with running() as (server, root, fetcher):
            server["/x.jpg"] = reply(200, PIXELS, header)
            assert (await fetcher.get(root + "x.jpg")).data == PIXELS

    asyncio.run(main())


@pytest.mark.parametrize("header", ["X-Robots-Tag: noai", "tdm-reservation: 1"])
def test_what_is_not_respected_ends_none(header: str) -> None:
    others = [s for s in optouts.SIGNALS if s not in header.lower()]

    async def main() -> None:
        async with running(respect=others) as (server, root, fetcher):
            server["/x.jpg"] = reply(200, PIXELS, header)
            assert (await fetcher.get(root + "x.jpg")).data == PIXELS

    asyncio.run(main())


def test_tdmrep_json_is_asked_for_once_per_origin() -> None:
    reserved = json.dumps([{"location": "/private/*.jpg$", "tdm-reservation": 1}]).encode()

    async def main() -> None:
        async with running(respect=["tdmrep-json"]) as (server, root, fetcher):
            server[f"//a.test{FILE}"] = reply(200, reserved)
            server[f"//b.test{FILE}"] = reply(404)
            other = root.replace("a.test", "b.test")
            results = await asyncio.gather(
                *(fetcher.get(f"{root}{'private' if i % 2 else 'public'}/{i}.jpg") for i in range(40)),
                *(fetcher.get(f"{other}private/{i}.jpg") for i in range(10)),
                return_exceptions=True,
            )
            reasons = Counter(r.reason if isinstance(r, RowError) else "ok" for r in results)
            assert reasons == {"ok": 30, Reason.OPTED_OUT: 20}
            assert server.count(FILE, "a.test") == server.count(FILE, "b.test") == 1
            assert not any(path.startswith("/private") for host, path in server.asked if host == "a.test")
            assert server.count("/robots.txt") == 0
            # The target of a redirect is asked too, and never fetched.
            server["/go"] = reply(302, b"", f"Location: {root}private/1.jpg")
            error = await failure(fetcher, other + "go")
            assert error.reason is Reason.OPTED_OUT and "tdmrep.json" in error.detail
            assert server.count("/private/1.jpg", "a.test") == 0

    asyncio.run(main())


@pytest.mark.parametrize(
    ("page", "outcome"),
    [
        (reply(200, ALL_RESERVED), "opted_out"),
        (reply(200, b"\xef\xbb\xbf" + ALL_RESERVED), "opted_out"),
        (reply(200, gzip.compress(ALL_RESERVED), "Content-Encoding: gzip"), "opted_out"),
        ({FILE: reply(301, b"", "Location: /r"), "/r": reply(200, ALL_RESERVED)}, "opted_out"),
        ({FILE: reply(302, b"", f"Location: {FILE}")}, "ok"),
        ({FILE: reply(301, b"", "Location: http://127.0.0.1:1/")}, "ok"),
        (reply(200, ALL_RESERVED[:-1]), "ok"),
        (reply(200, b" " * 800_000 + ALL_RESERVED), "ok"),
        (reply(200), "ok"),
        (reply(200, b"<html>Not here</html>"), "ok"),
        (reply(404, ALL_RESERVED), "ok"),
        (reply(401), "ok"),
        (reply(500, ALL_RESERVED), "ok"),
        (reply(503), "ok"),
        (b"", "ok"),
        (b"HELLO\r\n\r\n", "ok"),
        (drop(30), "ok"),
    ],
)
def test_tdmrep_json_answers(page: Any, outcome: str) -> None:
    """By TDMRep an origin that fails to give the file says nothing."""
    found, server = asyncio.run(outcome_of(page, FILE, timeout=1.0, respect=["tdmrep-json"]))
    assert (found, server.count("/x.jpg")) == (outcome, int(outcome == "ok"))
    assert server.count(FILE) >= 1


def test_files_are_asked_for_only_where_they_are_respected_and_needed() -> None:
    page = {FILE: reply(200, ALL_RESERVED), "/robots.txt": robots("User-agent: *\nDisallow: /")}
    outcome, server = asyncio.run(outcome_of({FILE: page[FILE]}))
    assert outcome == "ok" and server.count(FILE) == 0
    outcome, server = asyncio.run(outcome_of(page, respect=optouts.SIGNALS))
    assert outcome == "opted_out" and server.asked == [("a.test", "/robots.txt")]
