"""Content-Usage of the AIPREF drafts (attach-05, vocab-08): what it says, in headers, in robots.txt, and over HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from curate.fetch import optouts
from curate.ledger.schema import Reason
from demo.web import Route, Web
from tests.small_web import image
from tests.test_fetch import PIXELS, failure, reply, robots, running
from tests.test_fetch_job import fetch

STATEMENTS = [
    ("train-ai=n", "train-ai=n"),
    ("train-ai=y", None),
    ("search=n", None),
    ("ai-use=n", None),
    ("search=y, train-ai=n", "train-ai=n"),
    ("train-ai=n,search=y", "train-ai=n"),
    ("  train-ai=n\t,\t search=y  ", "train-ai=n"),
    ("train-ai=n;reason=x", "train-ai=n"),
    ('train-ai=n; a="b;c,d\\"e"; f, search', "train-ai=n"),
    ("train-genai=n", "train-genai=n"),  # of -02 and -03
    ("train-ai=y, train-genai=n", "train-genai=n"),
    ("train-ai=n, train-ai=y", None),  # the last one counts
    ("train-ai=y, train-ai=n", "train-ai=n"),
    ('other=(a b;c=1 "d" );e, x=?1, y=:aGk=:, z=1.5, d=@12, s=%"f%c3%bc", train-ai=n', "train-ai=n"),
    # other values say nothing
    ("train-ai=N", None),
    ("train-ai=no", None),
    ('train-ai="n"', None),
    ("train-ai=?0", None),
    ("train-ai=0", None),
    ("train-ai", None),
    ("train-ai=(n)", None),
    # nor does what is no dictionary
    ("", None),
    ("Train-AI=n", None),
    ("train-ai = n", None),
    ("train-ai=n,", None),
    (",train-ai=n", None),
    ("train-ai=n search=y", None),
    ("train-ai=n, ?", None),
    ("train-ai=n, a=\u00fc", None),
    ('train-ai=n, a="', None),
    ("disallow training", None),
    ("train-ai=n, " + "a" * 3000, "more than 2048 characters"),
]


@pytest.mark.parametrize(("statement", "refused"), STATEMENTS)
def test_statements(statement: str, refused: str | None) -> None:
    assert optouts.usage_refusal(statement) == refused
    found = optouts.read_headers(CIMultiDictProxy(CIMultiDict({"content-USAGE": statement})))
    assert found == ({"content-usage": refused} if refused else {})


def test_several_headers_are_one_dictionary() -> None:
    def said(*values: str) -> dict[str, str]:
        return optouts.read_headers(CIMultiDictProxy(CIMultiDict([("Content-Usage", v) for v in values])))

    assert said("search=y", "train-ai=n") == {"content-usage": "train-ai=n"}
    assert said("train-ai=n", "train-ai=y") == said("train-ai=n", "?!") == {}


@pytest.mark.parametrize(
    "piece", [";a", "a", "a,", '"', "(", "( ", "a=(b ", ";a=1", "a;b;c=?1,", ":", '%"', "a=1.", " "]
)
def test_no_statement_takes_long(piece: str) -> None:
    start = time.process_time()
    for head in ("train-ai=n", "a=(", "a=", ""):
        optouts.usage_refusal((head + piece * 2048)[: optouts.MOST_USAGE])
    assert time.process_time() - start < 0.2


DRAFT = """User-Agent: *
Allow: /
Disallow: /never/
Content-Usage: train-ai=n
Content-Usage: /ai-ok/ train-ai=y

User-Agent: ExampleBot
Allow: /
Content-Usage: train-ai=y
"""


@pytest.mark.parametrize(
    ("text", "path", "refused"),
    [
        (DRAFT, "/test", True),
        (DRAFT, "/ai-ok/test", False),
        (DRAFT.replace("ExampleBot", "tastemaker"), "/test", False),  # our own group decides
        (DRAFT.replace("User-Agent: *", "User-Agent: x\nUser-agent: Tastemaker"), "/test", True),
        (DRAFT.replace("User-Agent: *", "User-Agent: x"), "/test", False),  # nobody's group, to us
        ("user-agent: *\ncontent-usage : \ttrain-ai=n # why not", "/a", True),
        ("User-agent: *\nContent-Usage: /a/*.jpg$\ttrain-ai=n", "/a/b.jpg", True),
        ("User-agent: *\nContent-Usage: /a/*.jpg$ train-ai=n", "/a/b.png", False),
        ("User-agent: *\nContent-Usage: /%7ea train-ai=n", "/~a/b", True),
        ("User-agent: *\nContent-Usage: train-ai=n\nContent-Usage: /a search=n", "/a", False),  # the longest is silent
        ("User-agent: *\nContent-Usage: / train-ai=y\nContent-Usage: train-ai=n", "/a", False),
        ("User-agent: *\nContent-Usage: /a train-ai=y\nContent-Usage: /a train-ai=n", "/a", True),
        ("User-agent: *\nContent-Usage: /a train-ai=n\nContent-Usage: /a train-ai=y", "/a", True),
        ("User-agent: *\nContent-Usage: /a", "/a", False),
        ("User-agent: *\nContent-Usage:", "/a", False),
        ("User-agent: *\nContent-Usage: a train-ai=n", "/a", False),  # a path begins with a slash
        ("Content-Usage: train-ai=n\nUser-agent: *\nDisallow:", "/a", False),  # in no group
        ("User-agent: a\nContent-Usage: search=n\nUser-agent: *\nContent-Usage: train-ai=n", "/a", True),
        ("User-agent: *\nContent-Usage: search=n\nUser-agent: a\nContent-Usage: train-ai=n", "/a", False),
        ("User-agent: *\r\nDisallow: /b\r\nSitemap: /x\r\nContent-Usage: train-ai=n", "/a", True),
    ],
)
def test_lines_of_robots_txt(text: str, path: str, refused: bool) -> None:
    rules = optouts.robots_rules(text.encode())
    assert rules.usage.refuse(path) == refused
    plain = "".join(line for line in text.splitlines(keepends=True) if "usage" not in line.lower())
    assert rules.refuse(path) == optouts.robots_rules(plain.encode()).refuse(path)  # it changes nothing in that


def test_half_a_megabyte_of_them() -> None:
    lines = (f"Content-Usage: /{n}/*a train-ai=n, x={n}" for n in range(16_000))
    body = ("User-agent: *\n" + "\n".join(lines)).encode()[: optouts.ROBOTS_MAX_BYTES]
    start = time.process_time()
    rules = optouts.robots_rules(body)
    assert rules.usage.refuse("/7/ba") and not rules.usage.refuse("/7/b") and rules.size > 1_000_000
    assert time.process_time() - start < 3


HEADER = "Content-Usage: train-ai=n"
ALL = robots(f"User-agent: *\n{HEADER}\n")


@pytest.mark.parametrize("where", ["only", "first hop", "last hop", "robots.txt", "robots.txt of the last hop"])
@pytest.mark.parametrize("respect", [["content-usage"], ["robots-txt"], ["content-usage", "robots-txt"], []])
def test_over_http(where: str, respect: list[str]) -> None:
    async def main() -> None:
        async with running(respect=respect) as (server, root, fetcher):
            first, last = ([HEADER] if where == hop else [] for hop in ("first hop", "last hop"))
            if where == "only":
                last = [HEADER]
            server["/hop"] = reply(302, b"", *first, f"Location: {root.replace('a.test', 'b.test')}x.jpg")
            server["/x.jpg"] = reply(200, PIXELS, *last)
            server["/robots.txt"] = reply(404)
            if where.startswith("robots.txt"):
                server[f"//{'b' if 'last' in where else 'a'}.test/robots.txt"] = ALL
            url = root + ("x.jpg" if where in ("only", "robots.txt") else "hop")
            in_file = where.startswith("robots.txt")
            if "content-usage" in respect:
                error = await failure(fetcher, url)
                assert error.reason is Reason.OPTED_OUT and "train-ai=n" in error.detail
                assert error.opt_out == "content-usage: train-ai=n" + in_file * " in robots.txt"
                assert server.count("/x.jpg") == (where in ("only", "last hop"))
            else:
                body = await fetcher.get(url)
                assert body.data == PIXELS
                seen = "content-usage: train-ai=n" + in_file * " in robots.txt"
                assert body.opt_out == (None if in_file and not respect else seen)
            assert server.count("/robots.txt") == (0 if not respect else len({h for h, _ in server.asked}))

    asyncio.run(main())


@pytest.mark.parametrize("page", [reply(500), reply(404), reply(429), reply(200, b"\0\xff" * 1000)])
def test_a_robots_txt_that_says_nothing_keeps_nobody_out_for_its_sake(page: bytes) -> None:
    async def main() -> None:
        async with running(respect=["content-usage"], retries=0) as (server, root, fetcher):
            server["/robots.txt"] = page
            server["/x.jpg"] = reply(200, PIXELS)
            assert (await fetcher.get(root + "x.jpg")).opt_out is None

    asyncio.run(main())


def test_the_ledger_says_what_was_seen_and_every_redirect(tmp_path: Path) -> None:
    """In the table, in the shard's JSON, respected or not; and what files say of themselves."""
    body, made = image(0)[1], Path(__file__).parent / "rights"
    usage = ("Content-Usage", "train-ai=n")
    routes: dict[Any, Route] = {
        "/plain.jpg": Route(body=body),
        "/usage.jpg": Route(body=body, headers=(usage,)),
        "/file.jpg": Route(file=str(made / "not_allowed.jpg")),
        "/both.jpg": Route(file=str(made / "constrained.jpg"), headers=(usage,)),
        "/fine.jpg": Route(file=str(made / "allowed.jpg")),
        "/one": Route(status=301, headers=(("Location", "/two"),)),
        "/two": Route(status=302, headers=(("Location", "/plain.jpg"),)),
        "/lost": Route(status=302, headers=(("Location", "/nothing"),)),
        "/there": Route(status=302, headers=(("Location", "/private.jpg"),)),
        "/robots.txt": Route(body=b"User-agent: *\nDisallow: /private\n"),
    }
    paths = [p for p in routes if p not in ("/two", "/robots.txt")]
    with Web(routes, hosts=1) as web:
        rows = {"url": [web.url(0, p) for p in paths], "caption": ["a"] * len(paths)}
        allow = f"127.0.0.0/8:{web.port}"
        open_ = fetch(tmp_path / "a", rows, allow, respect=())
        kept = fetch(tmp_path / "b", rows, allow)
        root = web.url(0, "")
    file = ["c2pa: notAllowed ai_training", "content-usage: train-ai=n; c2pa: constrained ai_generative_training"]
    seen = [None, "content-usage: train-ai=n", *file, None, None, None]
    assert open_["opt_out"].to_pylist() == [*seen, None]
    seen[3] = "content-usage: train-ai=n"  # enough: the file was not asked for
    assert kept["opt_out"].to_pylist() == [*seen, "robots-txt: disallow"]
    refused = [None, "opted_out", "opted_out", "opted_out", None, None]
    assert kept["reason"].to_pylist() == [*refused, "http_404", "opted_out"]
    assert open_["reason"].to_pylist() == [None] * 6 + ["http_404"] * 2
    chains = [None] * 5 + [["/one", "/two", "/plain.jpg"], ["/lost", "/nothing"], ["/there", "/private.jpg"]]
    wanted = [chain and json.dumps([root + p for p in chain]) for chain in chains]
    assert kept["redirects"].to_pylist() == open_["redirects"].to_pylist() == wanted
