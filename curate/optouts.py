"""Who asked us to stay away: X-Robots-Tag, robots.txt (RFC 9309) and TDMRep (the TDM Reservation Protocol).

TDMRep is the W3C Community Group's Final Report of 10 May 2024, of which two of its ways to say it count here: the
header `tdm-reservation` and the file `/.well-known/tdmrep.json`. Reserved is reserved, also where a `tdm-policy` offers
a licence: nobody here could accept one.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from multidict import CIMultiDictProxy
from protego import Protego
from yarl import URL

from curate.guard import Settled, Shared
from curate.ledger import Reason, RowError

PRODUCT_TOKEN = "tastemaker"
"""The name under which robots.txt and X-Robots-Tag can address us."""

SIGNALS = ("x-robots-tag", "robots-txt", "tdm-reservation", "tdmrep-json")
"""The opt-out signals that `fetch.respect` can name: two headers, two files per origin."""

Read = Callable[[URL], Awaitable[bytes | None]]
"""Fetches a file of an origin: its bytes, cut where they are too many; None where the origin has none."""

# --------------------------------------------------------------------------------------------------------- headers

_REFUSALS = {"noai", "noimageai", "noml", "noindex", "noimageindex", "none"}
_AGENT = re.compile(r"[a-z][a-z0-9_.*+/-]*|\*")
_WITH_VALUE = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}


def read_headers(headers: CIMultiDictProxy[str]) -> dict[str, str]:
    """What the headers of one answer say against us: the signal's name -> the word that says it; {} if nothing does.

    `{"x-robots-tag": "noai", "tdm-reservation": "1"}` is all that there can be, with other directives in place of
    noai. Every hop of a redirect has headers of its own.

    `tdm-reservation` reserves where its value is 1, blanks around it aside. TDMRep calls every other value but 0 an
    error, and an error counts as unset; so do values that contradict each other, in one header or in several, for the
    field is no list. The same value repeated, as when a server and the cache before it both add the header, is none.
    """
    said = {}
    directive = robots_tag_refusal(headers.getall("X-Robots-Tag", ()))
    if directive:
        said["x-robots-tag"] = directive
    if {value.strip() for line in headers.getall("tdm-reservation", ()) for value in line.split(",")} == {"1"}:
        said["tdm-reservation"] = "1"
    return said


def robots_tag_refusal(headers: Iterable[str]) -> str | None:
    """The directive in the values of all X-Robots-Tag headers of one answer that asks us to stay away, or None.

    A value is a comma list; `agent:` before a directive makes it and what follows it in that header a matter of
    that agent alone (several agents may follow each other). Case does not matter. These count: noai, noimageai,
    noml, noindex, noimageindex, none.
    """
    for header in headers:
        ours = True
        for item in header.lower().split(","):
            name, colon, rest = (part.strip() for part in item.partition(":"))
            # A date may hold both commas and colons; none of its pieces looks like an agent's name.
            while colon and name not in _REFUSALS | _WITH_VALUE and _AGENT.fullmatch(name):
                ours = name == "*" or name.partition("/")[0] == PRODUCT_TOKEN
                name, colon, rest = (part.strip() for part in rest.partition(":"))
            if ours and name in _REFUSALS:
                return name
    return None


# ------------------------------------------------------------------------------------------------------- robots.txt

ROBOTS_MAX_BYTES = 500 * 1024
"""RFC 9309 section 2.5: read at least 500 kibibytes. The rest is not read."""

_KEPT = 86_400.0  # seconds: RFC 9309 section 2.4 asks for no more than a day
_KEPT_FAILURE = 300.0
_ORIGINS = 20_000  # remembered


def _kept(outcome: object) -> float:
    return _KEPT_FAILURE if isinstance(outcome, RowError) else _KEPT


def robots_rules(body: bytes) -> Protego:
    """Read a robots.txt: the rules that RFC 9309 gives to our product token, else those for everybody.

    Choosing the group is done here to the letter of section 2.2.1: a whole token counts, a version after it does
    not, and records of other kinds (Crawl-delay, Sitemap) end no group. Protego does the patterns.
    """
    ours: list[str] = []
    everybodys: list[str] = []
    named = in_rules = False
    agents: list[str] = []
    for line in re.split(r"\r\n|\r|\n", body.decode("utf-8-sig", errors="replace")):
        line = line.partition("#")[0].strip()
        field, _, value = line.partition(":") if ":" in line else line.partition(" ")
        field, value = field.strip().lower(), value.strip().lower()
        if field in ("user-agent", "useragent", "user agent"):
            if in_rules:
                agents, in_rules = [], False
            token = re.match(r"[a-z_-]+|\*", value)
            agents.append(token[0] if token else "")
            named = named or agents[-1] == PRODUCT_TOKEN
        elif field == "allow" or field.startswith(("dis", "dias")):
            in_rules = True
            if PRODUCT_TOKEN in agents:
                ours.append(line)
            if "*" in agents:
                everybodys.append(line)
    return Protego.parse("\n".join(["user-agent: *", *(ours if named else everybodys)]))


_NO_RULES = Protego.parse("")


def _origin(url: URL) -> str:
    return f"{url.scheme}://{url.host_port_subcomponent}"  # as str(url.origin()), which builds another URL


class Robots:
    """robots.txt, read once per origin and shared by all its rows.

    `read` fetches one; None means any 4xx. What it raises ends every row of that origin for a while, with its own
    reason: 5xx is a complete disallow (RFC 9309 section 2.3.1.4), but one that may pass.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._shared = Shared(self._rules, _kept, _ORIGINS)

    async def check(self, url: URL) -> None:
        """Raises RowError: opted_out where the rules disallow this URL, or what `read` raised."""
        rules = await self._shared.get(_origin(url))
        if rules is not _NO_RULES and not rules.can_fetch(str(url), PRODUCT_TOKEN):
            raise Settled(Reason.OPTED_OUT, f"robots.txt of {url.origin()} disallows it")

    async def close(self) -> None:
        await self._shared.close()

    async def _rules(self, origin: str) -> Protego:
        body = await self._read(URL(origin).with_path("/robots.txt"))
        # Half a megabyte of rules takes a good part of a second to read: not on the event loop.
        return await asyncio.to_thread(robots_rules, body) if body else _NO_RULES


# ---------------------------------------------------------------------------------------------------- tdmrep.json


@dataclass(frozen=True)
class _Rule:
    pieces: tuple[str, ...]  # of the location, between its asterisks
    ends: bool  # the location ends with $
    reserved: bool

    def matches(self, path: str) -> bool:
        first, *others = self.pieces
        if not path.startswith(first):
            return False
        at = len(first)
        last = others.pop() if others else None
        for piece in others:
            found = path.find(piece, at)
            if found < 0:
                return False
            at = found + len(piece)
        if last is None:
            return not self.ends or len(path) == at
        return len(path) - len(last) >= at and path.endswith(last) if self.ends else path.find(last, at) >= 0


def tdmrep_reserves(body: bytes) -> Callable[[URL], bool]:
    """Read a tdmrep.json: a function that tells whether it reserves the rights in a URL of its origin.

    The first rule whose `location` matches path and query decides; where its `tdm-reservation` is not 1 (the number,
    or the text as headers have it), nothing is reserved. Locations match as paths in robots.txt do: from the start,
    with `*` for anything and `$` at the end for the end, minding case, percent-encoding made equal. A file that is not
    a JSON array is an error, and an error means unset; a rule that is no object with a location is passed over.
    """
    try:
        entries = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        entries = None
    rules = [rule for entry in entries if (rule := _rule(entry))] if isinstance(entries, list) else []

    def reserves(url: URL) -> bool:
        path = _comparable(url.raw_path_qs)
        return next((rule.reserved for rule in rules if rule.matches(path)), False)

    return reserves


def _rule(entry: Any) -> _Rule | None:
    location = entry.get("location") if isinstance(entry, dict) else None
    if not isinstance(location, str) or not location:
        return None
    value = entry.get("tdm-reservation")
    pieces = tuple(_comparable(piece) for piece in re.split(r"\*+", location.removesuffix("$")))
    return _Rule(pieces, location.endswith("$"), value in (1, "1") and value is not True)


_ESCAPE = re.compile("%[0-9a-fA-F]{2}")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")  # RFC 3986 section 2.3
_PLAIN = "".join(c for c in map(chr, range(33, 127)) if c not in "$*")


def _comparable(text: str) -> str:
    """A path, or a piece of a pattern, in the one spelling of percent-encoding in which both are compared.

    A bare `*` or `$` becomes an escape: a pattern that means the character has to write it so.
    """

    def one(escape: re.Match[str]) -> str:
        character = chr(int(escape[0][1:], 16))
        return character if _UNRESERVED.fullmatch(character) else escape[0].upper()

    return _ESCAPE.sub(one, quote(text, safe=_PLAIN, errors="replace"))


class TdmRep:
    """/.well-known/tdmrep.json, read once per origin and shared by all its rows.

    `read` fetches one. By TDMRep an origin that has none, or fails to give it, has said nothing: what `read` raises
    ends no row. A header may say more than the file but not take it back, though TDMRep lets it: who is reserved in
    the file is not asked.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._shared = Shared(self._rules, _kept, _ORIGINS)

    async def check(self, url: URL) -> None:
        """Raises RowError: opted_out where the file of the URL's origin reserves it."""
        try:
            reserves = await self._shared.get(_origin(url))
        except RowError:
            return
        if reserves(url):
            raise Settled(Reason.OPTED_OUT, f"tdmrep.json of {url.origin()} reserves it")

    async def close(self) -> None:
        await self._shared.close()

    async def _rules(self, origin: str) -> Callable[[URL], bool]:
        body = await self._read(URL(origin).with_path("/.well-known/tdmrep.json"))
        return await asyncio.to_thread(tdmrep_reserves, body or b"[]")
