"""Who asked us to stay away, and who did not."""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from collections import Counter
from typing import Any

import pytest
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from curate.fetch import addresses, optouts
from curate.ledger.schema import FinalError, Reason, RowError


def headers(*pairs: tuple[str, str]) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict(pairs))


# ----------------------------------------------------------------------------------------------------------- headers

DIRECTIVES = ["noai", "noimageai", "noml", "noindex", "noimageindex", "none"]
PLACES = {  # where a directive stands -> whether it is meant for us
    "global": (["{}"], True),
    "ours": (["tastemaker: {}"], True),
    "other": (["otherbot: {}"], False),
    "in a list": (["nofollow, {}, noarchive"], True),
    "in another's list": (["otherbot: nofollow, {}, noarchive"], False),
    "second header": (["otherbot: nofollow", "max-snippet: 3, {}"], True),
    "after a date": (["unavailable_after: Sat, 25 Jun 2010 15:00:00 GMT, {}"], True),
    "after another's date": (["otherbot: unavailable_after: 25 Jun 2010 15:00:00 PST, {}"], False),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("directive", DIRECTIVES)
def test_x_robots_tag_truth_table(directive: str, place: str) -> None:
    lines, ours = PLACES[place]
    for cased in (directive, directive.upper(), directive.title()):
        said = optouts.read_headers(headers(*(("x-ROBOTS-tag", line.format(cased)) for line in lines)))
        assert said == ({"x-robots-tag": directive} if ours else {})


@pytest.mark.parametrize(
    ("lines", "refused"),
    [
        ([], None),
        *(([d], d) for d in ("noai", "noimageai", "noindex", "noimageindex", "none")),
        (["NoAI"], "noai"),
        ([" noai , nofollow"], "noai"),
        (["nofollow,noarchive,  NOIMAGEAI"], "noimageai"),
        (["all"], None),
        (["nofollow", "noai"], "noai"),
        (["otherbot: noai"], None),
        (["otherbot: noindex, noai"], None),
        (["otherbot: noindex", "noai"], "noai"),
        (["noai, otherbot: nofollow"], "noai"),
        (["tastemaker: noai"], "noai"),
        (["Tastemaker: nofollow, NOAI"], "noai"),
        (["tastemaker/0.1: noai"], "noai"),
        (["tastemaker-pro: noai"], None),
        (["*: noai"], "noai"),
        (["otherbot: noindex, tastemaker: noai"], "noai"),
        (["tastemaker: nofollow, otherbot: noai"], None),
        (["otherbot: tastemaker: noai"], "noai"),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST"], None),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST, noai"], "noai"),
        (["unavailable_after: Saturday, 25-Jun-10 15:00:00 PST, noai"], "noai"),
        (["otherbot: unavailable_after: Sat, 25 Jun 2010 15:00:00 GMT, noai"], None),
        (["max-snippet: -1, max-image-preview:large"], None),
        (["max-snippet:20, noai"], "noai"),
        (["noai: yes"], "noai"),
        (["noaix, xnoai, no-ai, index"], None),
        ([",,:,: noai"], None),
        (["Some Bot: nofollow, noai"], "noai"),
        (["a:" * 1024], None),
        (["a:" * 512, "b," * 513], "more than 2048 characters"),  # which would take the event loop 0.1 s
    ],
)
def test_x_robots_tag(lines: list[str], refused: str | None) -> None:
    said = optouts.read_headers(headers(*(("X-Robots-Tag", line) for line in lines)))
    assert said == ({"x-robots-tag": refused} if refused else {})
    assert optouts.robots_tag_refusal(lines) == refused


@pytest.mark.parametrize(
    ("values", "reserved"),
    [
        ([], False),
        (["1"], True),
        ([" 1\t"], True),
        (["0"], False),
        (["2"], False),
        (["-1"], False),
        (["01"], False),
        (["1.0"], False),
        (["true"], False),
        (['"1"'], False),
        (["1; policy=x"], False),
        (["١"], False),
        ([""], False),
        (["1" * 10_000], False),
        (["1", "1"], True),
        (["1, 1"], True),
        (["1", "0"], False),
        (["0, 1"], False),
        (["1", "maybe"], False),
    ],
)
def test_tdm_reservation(values: list[str], reserved: bool) -> None:
    policy = ("tdm-policy", "https://example.com/policy.json")
    said = optouts.read_headers(headers(*(("TDM-Reservation", value) for value in values), policy))
    assert said == ({"tdm-reservation": "1"} if reserved else {})


def test_all_that_headers_say() -> None:
    said = optouts.read_headers(
        headers(("X-Robots-Tag", "noindex, noai"), ("tdm-reservation", "1"), ("Robots", "none"))
    )
    assert said == {"x-robots-tag": "noindex", "tdm-reservation": "1"}
    assert set(said) <= set(optouts.SIGNALS)


# -------------------------------------------------------------------------------------------------------- robots.txt


ROBOTS = [
    ("", "/a", True),
    ("User-agent: *\nDisallow: /", "/a", False),
    ("User-agent: *\nDisallow:", "/a", True),
    ("User-agent: *\nDisallow: /\n\nUser-agent: tastemaker\nDisallow:", "/a", True),
    ("User-agent: *\nAllow: /\n\nUser-agent: TasteMaker\nDisallow: /p", "/p/a", False),
    ("User-agent: tastemaker/1.0\nDisallow: /", "/a", False),
    ("User-agent: tastemaker # us\nDisallow: / # all", "/a", False),
    ("User-agent: tastemakers\nDisallow: /", "/a", True),
    ("User-agent: taste\nDisallow: /", "/a", True),
    ("User-agent: taste\nAllow: /\nUser-agent: *\nDisallow: /", "/a", False),
    ("User-agent: otherbot\nDisallow: /", "/a", True),
    ("User-agent: otherbot\nUser-agent: tastemaker\nDisallow: /x", "/x", False),
    ("User-agent: tastemaker\n\n\nDisallow: /x", "/x", False),
    (
        "User-agent: tastemaker\nDisallow: /x\nUser-agent: b\nAllow: /\nUser-agent: tastemaker\nDisallow: /y",
        "/y",
        False,
    ),
    ("User-agent: tastemaker\nCrawl-delay: 1\nUser-agent: b\nDisallow: /", "/a", False),
    ("User-agent: tastemaker\nSitemap: http://a/\nDisallow: /", "/a", False),
    ("Disallow: /", "/a", True),
    ("user-agent:*\ndisallow:/p\nallow:/p/q", "/p/q/r", True),
    ("user-agent:*\ndisallow:/p\nallow:/p/q", "/p/r", False),
    ("User-agent: *\nAllow: /p\nDisallow: /p", "/p", True),
    ("User-agent: *\nAllow: /p\nDisallow: /pa", "/pa", False),
    ("User-agent: *\nDisallow: /*.gif$", "/a/b.gif", False),
    ("User-agent: *\nDisallow: /*.gif$", "/a/b.gif?x", True),
    ("User-agent: *\nDisallow: /a*c", "/abbbc/d", False),
    ("User-agent: *\nDisallow: *.jpg", "/b.jpg", False),
    ("User-agent: *\nDisallow: /A", "/a", True),
    ("User-agent: *\nDisallow: /a%3Cd.html", "/a%3cd.html", False),
    ("User-agent: *\nDisallow: /ü", "/%C3%BC", False),
    ("User-agent: *\nDisallow: /a?b=c", "/a?b=c&d", False),
    ("User-agent: *\nDisallow: /", "/robots.txt", True),
    ("\ufeffUser-agent: *\nDisallow: /", "/a", False),
    ("User-agent: *\r\nDisallow: /x\r\n", "/x", False),
    ("User-agent: *\rDisallow: /x\r", "/x", False),
    ("User-agent: *\nDissallow: /x", "/x", False),
    ("User-agent *\nDisallow /x", "/x", False),
    ("<html><body>Not found</body></html>", "/a", True),
    ("User-agent: *\nDisallow: /x\n" + "junk\n" * 1000 + "Disallow: /y", "/y", False),
    ("User-agent: *\nDisallow: /fish", "/fish.html", False),
    ("User-agent: *\nDisallow: /fish/", "/fish", True),
    # The same path in other spellings, RFC 9309 section 2.2.2.
    ("User-agent: *\nDisallow: /foo/bar?baz=quz", "/foo/bar?baz=quz", False),
    ("User-agent: *\nDisallow: /foo/bar/\u30c4", "/foo/bar/%E3%83%84", False),
    ("User-agent: *\nDisallow: /foo/bar/%E3%83%84", "/foo/bar/\u30c4", False),
    ("User-agent: *\nDisallow: /foo/bar/%62%61%7A", "/foo/bar/baz", False),
    ("User-agent: *\nDisallow: /~joe", "/%7ejoe/a", False),
    ("User-agent: *\nDisallow: /a%2fb", "/a/b", True),
    # Special characters, sections 2.2.3 and 2.2.2.
    ("User-agent: *\nDisallow: /this/path/exactly$", "/this/path/exactly", False),
    ("User-agent: *\nDisallow: /this/path/exactly$", "/this/path/exactly/not", True),
    ("User-agent: *\nDisallow: /this/*/exactly", "/this/and/that/exactly", False),
    ("User-agent: *\nDisallow: /p # all of it", "/p", False),
    ("User-agent: *\nDisallow: /*", "/a", False),
    ("User-agent: *\nDisallow: /a\nAllow: /*b", "/a/longer/b", True),
    # The longest match, not the first or the last: the example of section 5.2 and its like.
    ("User-agent: *\nAllow: /example/page/\nDisallow: /example/page/not.gif", "/example/page/not.gif", False),
    ("User-agent: *\nDisallow: /example/page/not.gif\nAllow: /example/page/", "/example/page/not.gif", False),
    ("User-agent: *\nDisallow: /\nAllow: /example/page/", "/example/page/yes.gif", True),
    # Groups of others, among them those who train models: asked for by their names, not by ours.
    *[(f"User-agent: {bot}\nDisallow: /", "/a", True) for bot in ("GPTBot", "CCBot", "Google-Extended", "img2dataset")],
    ("User-agent: GPTBot\nUser-agent: CCBot\nUser-agent: *\nDisallow: /", "/a", False),
    ("User-agent: GPTBot\nDisallow: /\nUser-agent: tastemaker\nDisallow: /b", "/a", True),
    ("USER-AGENT: *\nDISALLOW: /x", "/x", False),
    ("\t User-agent\t:\t*\n\tDisallow :  /x  ", "/x", False),
    ("User-agent: *\nDisallow: /" + "*a" * 5000 + "$", "/" + "a" * 4000 + "b", True),
]


@pytest.mark.parametrize(("text", "path", "allowed"), ROBOTS)
def test_robots_txt(text: str, path: str, allowed: bool) -> None:
    rules = optouts.robots_rules(text.encode())
    assert rules.refuse(addresses.parse_url("https://example.com" + path, ()).raw_path_qs) is not allowed


@pytest.mark.parametrize(
    "body", [b"\xff\xfe\x00", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 100, b"User-agent: *\n\xc3"]
)
def test_robots_txt_that_is_none(body: bytes) -> None:
    assert not optouts.robots_rules(body).refuse("/a")


HOSTILE = {
    "plain": "".join(f"Disallow: /{i:x}\n" for i in range(40_000)),
    "wild": "".join(f"Disallow: /*{i:x}*b\n" for i in range(40_000)),
    "long": "".join(f"Disallow: /{'ab' * 500}{i}\n" for i in range(600)),
    "spaces": "Disallow" + " " * 500_000,
    "lengths": "".join(f"Disallow: /{'a' * i}\n" for i in range(1, 990)),
    "stars": ("Disallow: /" + "*a" * 4000 + "b\n") * 100,
    "agents": "User-agent: *\n" * 50_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_half_a_megabyte_of_rules_is_kept_in_few_bytes_and_decides_in_few_steps(kind: str) -> None:
    """The event loop and the memory of a fetcher are everybody's."""
    body = ("User-agent: *\n" + HOSTILE[kind]).encode()[: optouts.ROBOTS_MAX_BYTES]
    tracemalloc.start()
    try:
        rules = optouts.robots_rules(body)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 6_000_000 and most < 40_000_000 and rules.size > kept / 4 - 1000
    start = time.process_time()
    for path in ("/a", "/" + "a" * 7900, "/" + "ab" * 3900):
        rules.refuse(path)
    assert time.process_time() - start < 1.0  # 0.1 s is what it takes


def test_a_path_that_would_take_seconds_to_compare_is_refused() -> None:
    rules = optouts.robots_rules(b"User-agent: *\n" + b"".join(b"Disallow: /*%dx*\n" % i for i in range(30_000)))
    assert not rules.refuse("/photo.jpg") and rules.refuse("/" + "a" * 7900)


def test_rules_of_many_origins_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[str] = Counter()
    body = ("User-agent: *\n" + HOSTILE["wild"]).encode()[:100_000]

    async def read(url: URL) -> bytes | None:
        asked[str(url.host)] += 1
        return body if str(url.host).startswith("large") else b"User-agent: *\nDisallow: /x"

    async def main() -> None:
        robots = optouts.Robots(read)
        for host in ("small0", *(f"large{i}" for i in range(6)), "large5", "large0", "small0"):
            await robots.check(URL(f"https://{host}/a.jpg"))
        await robots.close()

    monkeypatch.setattr(optouts, "MOST_RULES", 3 * optouts.robots_rules(body).size)
    asyncio.run(main())
    assert asked == Counter({f"large{i}": 1 for i in range(1, 6)} | {"large0": 2, "small0": 2})


# ------------------------------------------------------------------------------------------------------- tdmrep.json


def rules(*pairs: tuple[Any, Any]) -> bytes:
    return json.dumps([{"location": where, "tdm-reservation": value} for where, value in pairs]).encode()


SITE = json.dumps(
    [
        {"location": "/directory-a/", "tdm-reservation": 1},
        {"location": "/directory-b/html/", "tdm-reservation": 1, "tdm-policy": "https://provider.example/policy.json"},
        {"location": "/directory-b/images/*.jpg", "tdm-reservation": 0},
        {"location": "/directory-b/", "tdm-reservation": 1},
    ]
).encode()


@pytest.mark.parametrize(
    ("body", "path", "reserved"),
    [
        (rules(("/", 1)), "/", True),
        (rules(("/", 1)), "/a/b.jpg?c=d", True),
        (rules(("/", 0)), "/a", False),
        (rules(("/", "1")), "/a", True),
        *[(rules(("/", value)), "/a", False) for value in ("0", 2, -1, True, None, "", "yes", [1], {"1": 1}, 1.5)],
        # The first that matches decides, be it in error; none: unset.
        (SITE, "/directory-a/x.pdf", True),
        (SITE, "/directory-b/html/x", True),
        (SITE, "/directory-b/images/x.jpg", False),
        (SITE, "/directory-b/images/x.png", True),
        (SITE, "/directory-c/x", False),
        (SITE, "/Directory-A/x", False),
        (rules(("/a", 7), ("/", 1)), "/a", False),
        (rules(("/a", 7), ("/", 1)), "/b", True),
        (rules(("/", 1), ("/a", 0)), "/a", True),
        # Patterns.
        (rules(("/fish", 1)), "/fish.html", True),
        (rules(("/fish", 1)), "/catfish", False),
        (rules(("/fish$", 1)), "/fish", True),
        (rules(("/fish$", 1)), "/fish?x", False),
        (rules(("/*.jpg$", 1)), "/a/b.jpg", True),
        (rules(("/*.jpg$", 1)), "/a/b.jpg.png", False),
        (rules(("*.jpg", 1)), "/a/b.jpg", True),
        (rules(("*", 1)), "/a", True),
        (rules(("/this/*/then", 1)), "/this/and/that/then/more", True),
        (rules(("/a*b*c$", 1)), "/axxbxxc", True),
        (rules(("/a*b*c$", 1)), "/axxcxxb", False),
        (rules(("/ab*b$", 1)), "/ab", False),
        (rules(("/a**c", 1)), "/abc", True),
        (rules(("/p?x=1", 1)), "/p?x=1&y", True),
        (rules(("images/", 1)), "/images/a", False),
        (rules(("https://example.com/", 1)), "/a", False),
        # Spellings.
        (rules(("/path/foo-%24", 1)), "/path/foo-$", True),
        (rules(("/path/%2a", 1)), "/path/*", True),
        (rules(("/path/%2a", 1)), "/path/a", False),
        (rules(("/ü", 1)), "/%c3%bc", True),
        (rules(("/%C3%bc b", 1)), "/ü%20b", True),
        (rules(("/%7ejoe", 1)), "/~joe", True),
        (rules(("/a%2fb", 1)), "/a/b", False),
        (rules(("/\ud800", 1), ("/", 1)), "/a", True),
        # What is no rule.
        (rules(("", 1), (None, 1), (["/"], 1), (1, 1)), "/a", False),
        (b'[null, "/", {"tdm-reservation": 1}, {"location": "/", "tdm-reservation": 1}]', "/a", True),
        (b'[{"location": "/"}]', "/a", False),
        (b'[{"location": "/", "TDM-Reservation": 1}]', "/a", False),
        # What is no file.
        (b'{"location": "/", "tdm-reservation": 1}', "/a", False),
        (b'[{"location": "/", "tdm-reservation": 1}', "/a", False),
        *[(body, "/a", False) for body in (b"", b"null", b"1", b'"/"', b"<html></html>", b"\xff\xfe[", b"[" * 100_000)],
        (b"\xef\xbb\xbf" + rules(("/", 1)), "/a", True),
        (b"[" + b"1" * 10_000 + b"]", "/a", False),
    ],
)
def test_tdmrep_json(body: bytes, path: str, reserved: bool) -> None:
    assert (
        optouts.tdmrep_rules(body).refuse(addresses.parse_url("https://example.com" + path, ()).raw_path_qs) is reserved
    )


@pytest.mark.parametrize("location", ["/" + "*" * 400_000 + "b", "/" + "*a" * 200_000 + "b$", "/" + "a*" * 200_000])
def test_patterns_take_no_time(location: str) -> None:
    """None of this may keep the event loop from its other hosts."""
    reserved = optouts.tdmrep_rules(rules((location, 1)))
    start = time.process_time()
    assert not reserved.refuse("/" + "a" * 7000)
    assert time.process_time() - start < 0.2


def test_tdmrep_json_is_read_once_per_origin_and_its_absence_is_no_error() -> None:
    asked: Counter[str] = Counter()

    async def read(url: URL) -> bytes | None:
        asked[str(url)] += 1
        await asyncio.sleep(0.01)
        if url.host == "none.test":
            return None
        if url.host == "down.test":
            raise FinalError(Reason.HTTP_5XX, "status 503")
        return rules(("/private/", 1))

    async def reason(tdmrep: optouts.TdmRep, url: str) -> Reason | None:
        try:
            await tdmrep.check(URL(url))
        except RowError as e:
            assert isinstance(e, FinalError) and "tdmrep.json" in e.detail
            return e.reason
        return None

    async def main() -> None:
        tdmrep = optouts.TdmRep(read)
        hosts = ("https://a.test", "http://a.test", "https://a.test:8443", "https://none.test", "https://down.test")
        urls = [f"{host}/{part}/{i}.jpg" for host in hosts for part in ("private", "public") for i in range(10)]
        reasons = await asyncio.gather(*(reason(tdmrep, url) for url in urls))
        for url, outcome in zip(urls, reasons, strict=True):
            assert outcome == (Reason.OPTED_OUT if "a.test" in url and "/private/" in url else None)
        assert asked == {f"{host}/.well-known/tdmrep.json": 1 for host in hosts}
        await tdmrep.close()

    asyncio.run(main())


def test_a_bug_of_ours_is_not_an_absent_file() -> None:
    async def read(url: URL) -> bytes | None:
        raise ZeroDivisionError

    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            await optouts.TdmRep(read).check(URL("https://a.test/"))

    asyncio.run(main())
