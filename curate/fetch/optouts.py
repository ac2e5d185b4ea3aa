"""Who asked us to stay away: X-Robots-Tag, robots.txt (RFC 9309), TDMRep (the TDM Reservation Protocol), Content-Usage.

TDMRep is the W3C Community Group's Final Report of 10 May 2024, of which two of its ways to say it count here: the
header `tdm-reservation` and the file `/.well-known/tdmrep.json`. Reserved is reserved, also where a `tdm-policy` offers
a licence: nobody here could accept one.

Content-Usage is that of two drafts of the IETF's AIPREF group, draft-ietf-aipref-attach-05 (where it stands: a header,
lines of robots.txt) and draft-ietf-aipref-vocab-08 (what it says). What a file says of itself: curate.images.rights.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import numpy as np
from multidict import CIMultiDictProxy
from yarl import URL

from aesthetic.errors import UserError
from aesthetic.untrusted import parse_json
from curate.fetch.cache import CoalescingCache
from curate.ledger.schema import FinalError, Reason, RowError

PRODUCT_TOKEN = "tastemaker"
"""The name under which robots.txt and X-Robots-Tag can address us."""

SIGNALS = ("x-robots-tag", "robots-txt", "tdm-reservation", "content-usage", "c2pa", "iptc", "tdmrep-json")
"""The opt-out signals that `fetch.respect` can name: in headers, in files of an origin, in the image file itself."""

Read = Callable[[URL], Awaitable[bytes | None]]
"""Fetches a file of an origin: its bytes, cut where they are too many; None where the origin has none."""

# --------------------------------------------------------------------------------------------------------- headers

_REFUSALS = {"noai", "noimageai", "noml", "noindex", "noimageindex", "none"}
_AGENT = re.compile(r"[a-z][a-z0-9_.*+/-]*|\*")
_NAMES = _REFUSALS | {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
_LONGEST = 2048  # characters of all X-Robots-Tag headers of an answer; nobody who means it needs as many


def read_headers(headers: CIMultiDictProxy[str]) -> dict[str, str]:
    """The opt-outs in the headers of one answer: the signal's name -> the word that says it; {} if there are none.

    `{"x-robots-tag": "noai", "tdm-reservation": "1", "content-usage": "train-ai=n"}` is all that there can be, with
    other directives in place of noai. Every hop of a redirect has headers of its own.

    `tdm-reservation` reserves where its value is 1, blanks around it aside. TDMRep calls every other value but 0 an
    error, and an error counts as unset; so do values that contradict each other, in one header or in several, for the
    field is no list. The same value repeated, as when a server and the cache before it both add the header, is none.
    """
    found = {}
    directive = robots_tag_refusal(headers.getall("X-Robots-Tag", ()))
    if directive:
        found["x-robots-tag"] = directive
    if {value.strip() for line in headers.getall("tdm-reservation", ()) for value in line.split(",")} == {"1"}:
        found["tdm-reservation"] = "1"
    if said := usage_refusal(", ".join(headers.getall("Content-Usage", ()))):
        found["content-usage"] = said
    return found


def robots_tag_refusal(headers: Iterable[str]) -> str | None:
    """The directive in the values of all X-Robots-Tag headers of one answer that asks us to stay away, or None.

    A value is a comma list; `agent:` before a directive makes it and what follows it in that header a matter of
    that agent alone (several agents may follow each other). Case does not matter. These count: noai, noimageai,
    noml, noindex, noimageindex, none. Headers that are too long to be meant are taken for a refusal, not read.
    """
    headers = list(headers)
    if sum(map(len, headers)) > _LONGEST:
        return f"more than {_LONGEST} characters"
    for header in headers:
        ours = True
        for item in header.lower().split(","):
            name, colon, rest = (part.strip() for part in item.partition(":"))
            # A date may hold both commas and colons; none of its pieces looks like an agent's name.
            while colon and name not in _NAMES and _AGENT.fullmatch(name):
                ours = name == "*" or name.partition("/")[0] == PRODUCT_TOKEN
                name, colon, rest = (part.strip() for part in rest.partition(":"))
            if ours and name in _REFUSALS:
                return name
    return None


# A dictionary of RFC 9651 (Structured Field Values), section 3.2; what is no such dictionary says nothing.
_SF_KEY = r"[a-z*][a-z0-9_.*-]*"
_SF_ITEM = (
    r"(?:-?[0-9]{1,15}(?:\.[0-9]{1,3})?"  # integers and decimals
    r'|"(?:[ !#-\[\]-~]|\\["\\])*"'  # strings
    r"|[A-Za-z*][A-Za-z0-9!#$%&'*+.^_`|~:/-]*"  # tokens
    r"|:[A-Za-z0-9+/=]*:|\?[01]|@-?[0-9]{1,15}"  # bytes, booleans, dates
    r'|%"(?:[ !#$&-~]|%[0-9a-f]{2})*")'  # display strings
)
_SF_PARAMETERS = rf"(?:; *{_SF_KEY}(?:={_SF_ITEM})?)*"
_SF_VALUE = rf"(?:{_SF_ITEM}|\( *(?:{_SF_ITEM}{_SF_PARAMETERS}(?: +|(?=\))))*\)){_SF_PARAMETERS}"
_SF_MEMBER = re.compile(rf"({_SF_KEY})(?:=({_SF_VALUE})|{_SF_PARAMETERS})[ \t]*(?:(,)[ \t]*|$)")

_TRAINING = ("train-ai", "train-genai")
"""The categories that are ours: AI Training, and Generative AI Training as -02 and -03 of the vocabulary had it."""

MOST_USAGE = 2048
"""Characters of a statement of preferences that are read; who says more is taken to refuse."""


def usage_refusal(statement: str) -> str | None:
    """What of a statement of preferences (draft-ietf-aipref-vocab-08) asks us to stay away: `train-ai=n`, or None.

    The statement is a dictionary of structured fields; n and y are tokens, and every other value, as every other key
    and all parameters, says nothing. Of a key that comes twice the last one counts. What is no dictionary as a whole
    says nothing either.
    """
    statement = statement.strip(" ")
    if len(statement) > MOST_USAGE:
        return f"more than {MOST_USAGE} characters"
    said: dict[str, str] = {}
    at, comma = 0, None
    while at < len(statement):
        if (member := _SF_MEMBER.match(statement, at)) is None:
            return None
        said[member[1]] = (member[2] or "").partition(";")[0]
        at, comma = member.end(), member[3]
    refused = [key for key in _TRAINING if said.get(key) == "n"]
    return f"{refused[0]}=n" if refused and not comma else None


# ------------------------------------------------------------------------------------------------------ rules of paths

DEAREST = 100_000_000
"""Characters of a path times characters of patterns with wildcards, above which a path counts as refused: to compare
that many could take a second, and no site means it."""

_CHEAP = 1_000_000  # of the same; more is compared in a thread


class Rules:
    """Which of a file's rules decides about a path: the one of highest rank among those whose pattern matches.

    A pattern matches from the start of a path, minding case; `*` is anything, `$` at the end the end, percent-encoding
    is made equal. Half a megabyte of rules, the most that is read of a file, takes less than 1.5 MB, and a decision
    less than a tenth of a second whatever they are: of a plain pattern only a hash is kept, and patterns with
    wildcards are compared in a number of steps that is known beforehand.

    Args:
        rules: (pattern, rank, whether what it matches is refused). Of equal patterns the highest rank counts.
    """

    def __init__(self, rules: Iterable[tuple[str, int, bool]]) -> None:
        plain: dict[str, tuple[int, bool]] = {}
        wild: dict[str, tuple[int, bool]] = {}
        for pattern, rank, refused in rules:
            kind = wild if "*" in pattern or pattern.endswith("$") else plain
            if kind is wild:
                ends = "$" if pattern.endswith("$") else ""
                pattern = "*".join(map(_comparable, _STARS.split(pattern.removesuffix("$")))) + ends
            else:
                pattern = _comparable(pattern)
            if pattern not in kind or kind[pattern][0] < rank:
                kind[pattern] = rank, refused
        self._lengths = sorted({len(p) for p in plain})
        found = sorted((_hash(p), rank, refused) for p, (rank, refused) in plain.items())
        self._hashes = np.array([h for h, _, _ in found], np.uint64)
        self._ranks = np.array([2 * rank + refused for _, rank, refused in found], np.int64)
        self._wild = sorted(((rank, refused, p) for p, (rank, refused) in wild.items()), reverse=True)
        self._wild_size = sum(map(len, wild))
        self.size = sys.getsizeof(self) + 16 * len(found) + sum(120 + len(p) for _, _, p in self._wild)  # bytes

    def __bool__(self) -> bool:
        return bool(self._lengths or self._wild)

    def is_cheap(self, path: str) -> bool:
        """Whether a decision takes so few steps that nobody notices."""
        return self._wild_size * len(path) <= _CHEAP

    def refuse(self, path: str) -> bool:
        """Whether the rule that decides refuses a path, with its query; False where no rule matches it."""
        path = _comparable(path)
        if not self.is_cheap(path):
            comparable = sum(len(p) for _, _, p in self._wild if _least(p) <= len(path))
            if comparable * len(path) > DEAREST:
                return True
        rank, refused = -1, False
        prefixes = [_hash(path[:n]) for n in self._lengths if n <= len(path)]
        if prefixes:
            wanted = np.array(prefixes, np.uint64)
            at = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
            if len(matching := self._ranks[at[self._hashes[at] == wanted]]):
                best = int(matching.max())
                rank, refused = best // 2, best % 2 == 1
        for wild_rank, wild_refused, pattern in self._wild:
            if wild_rank < rank:
                break
            if _matches(pattern, path):
                return wild_refused
        return refused


def _hash(text: str) -> int:
    return hash(text) & 0xFFFF_FFFF_FFFF_FFFF  # siphash with a key of this process: nobody can make two meet


def _least(pattern: str) -> int:
    """Characters that a path must have to match."""
    return len(pattern) - pattern.count("*") - pattern.endswith("$")


def _matches(pattern: str, path: str) -> bool:
    """Whether a pattern with wildcards matches; from left to right, so in no more steps than the path is long."""
    if _least(pattern) > len(path):
        return False
    ends = pattern.endswith("$")
    first, *others = pattern.removesuffix("$").split("*")
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
        return not ends or len(path) == at
    return len(path) - len(last) >= at and path.endswith(last) if ends else path.find(last, at) >= 0


_ESCAPE = re.compile("%[0-9a-fA-F]{2}")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")  # RFC 3986 section 2.3
_PLAIN = "".join(c for c in map(chr, range(33, 127)) if c not in "$*")
_AS_IT_IS = re.compile("[!#&-)+-~]*")  # most paths: nothing to encode, no escape
_STARS = re.compile(r"\*+")


def _comparable(text: str) -> str:
    """A path, or a piece of a pattern, in the one spelling of percent-encoding in which both are compared.

    A bare `*` or `$` becomes an escape: a pattern that means the character has to write it so.
    """
    if _AS_IT_IS.fullmatch(text):
        return text

    def one(escape: re.Match[str]) -> str:
        character = chr(int(escape[0][1:], 16))
        return character if _UNRESERVED.fullmatch(character) else escape[0].upper()

    return _ESCAPE.sub(one, quote(text, safe=_PLAIN, errors="replace"))


MOST_RULES = 64_000_000
"""Bytes of rules that are remembered, of all origins together; the oldest are forgotten first, and read again."""

_KEPT = 86_400.0  # seconds: RFC 9309 section 2.4 asks for no more than a day
_KEPT_FAILURE = 300.0
_ENTRY = 600  # bytes that remembering any origin takes


class _OriginRules:
    """A file of rules, read once per origin and shared by all its rows.

    Files are parsed one at a time, in a thread: half a megabyte takes a tenth of a second, and a list can name any
    number of hosts that send as much.
    """

    path: str
    parse: Callable[[bytes], Rules]  # the rules in a file

    def __init__(self, read: Read) -> None:
        self._read = read
        self._cache = CoalescingCache(
            self._load,
            lambda rules: _KEPT_FAILURE if isinstance(rules, RowError) else _KEPT,
            MOST_RULES,
            lambda rules: _ENTRY + (rules.size if isinstance(rules, Rules) else 0),
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rules")

    async def refuse(self, url: URL) -> bool:
        """Whether the rules refuse a URL; raises the RowError that reading them ended with."""
        return await self._decide(await self._rules(url), url)

    async def _rules(self, url: URL) -> Rules:
        return await self._cache.get(f"{url.scheme}://{url.host_port_subcomponent}")

    async def _decide(self, rules: Rules, url: URL) -> bool:
        if not rules:
            return False
        path = url.raw_path_qs
        if rules.is_cheap(path):
            return rules.refuse(path)
        return await asyncio.get_running_loop().run_in_executor(self._thread, rules.refuse, path)

    async def close(self) -> None:
        """Stop what is under way."""
        await self._cache.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _load(self, origin: str) -> Rules:
        body = await self._read(URL(origin).with_path(self.path))
        if not body:
            return _NO_RULES
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.parse, body)


_NO_RULES = Rules([])


# ------------------------------------------------------------------------------------------------------- robots.txt

ROBOTS_MAX_BYTES = 500 * 1024
"""RFC 9309 section 2.5: read at least 500 kibibytes. The rest is not read."""

# as generous as crawlers are: without a colon, and misspelt
_RULE_LINE = re.compile(
    r"(?:^|[\r\n])[ \t]*(?P<field>user[- ]?agent|content-usage|"
    r"allow|disallow|dissallow|dissalow|disalow|diasllow|disallaw)(?:[ \t]*:|[ \t])[ \t]*(?P<value>[^#\r\n]*)",
    re.IGNORECASE,
)


class RobotsRules(Rules):
    """The rules of a robots.txt, and what it prefers of the use of what may be fetched."""

    def __init__(self, rules: Iterable[tuple[str, int, bool]], usage: Iterable[tuple[str, int, bool]]) -> None:
        super().__init__(rules)
        self.usage = Rules(usage)
        self.size += self.usage.size


def robots_rules(body: bytes) -> RobotsRules:
    """Read a robots.txt: the rules that RFC 9309 gives to our product token, else those for everybody.

    The group is chosen to the letter of section 2.2.1: a whole token counts, a version after it does not, and records
    of other kinds (Crawl-delay, Sitemap) end no group. Of the rules that match, the longest decides, and of two of one
    length the one that allows (section 2.2.2); robots.txt itself is always allowed.

    A Content-Usage rule of the group is `[PATH] STATEMENT` (draft-ietf-aipref-attach-05, section 3); without a path it
    is about all of them. The longest that matches decides here too, whatever it says of training: one that is silent
    leaves the matter open. Of two of one length the one that refuses counts.
    """
    ours: tuple[list[tuple[str, int, bool]], list[tuple[str, int, bool]]] = [], []  # access, usage
    everybodys: tuple[list[tuple[str, int, bool]], list[tuple[str, int, bool]]] = [], []
    named = in_rules = False
    agents: list[str] = []
    for line in _RULE_LINE.finditer(body.decode("utf-8-sig", errors="replace")):
        field, value = line["field"].lower(), line["value"].strip()
        if field.startswith("user"):
            if in_rules:
                agents, in_rules = [], False
            token = re.match(r"[a-z_-]+|\*", value.lower())
            agents.append(token[0] if token else "")
            named = named or agents[-1] == PRODUCT_TOKEN
            continue
        in_rules = True
        about_usage = field == "content-usage"
        if about_usage:
            pattern, *statement = value.split(None, 1) if value.startswith("/") else ("", value)
            refused = bool(usage_refusal(statement[0])) if statement else False
            rule = pattern, 2 * len(pattern) + refused, refused
        else:
            rule = value, 2 * len(value) + (field == "allow"), field != "allow"
        if PRODUCT_TOKEN in agents and value:
            ours[about_usage].append(rule)
        if "*" in agents and value:
            everybodys[about_usage].append(rule)
    access, usage = ours if named else everybodys
    return RobotsRules([*access, ("/robots.txt", sys.maxsize // 4, False)], usage)


class Robots(_OriginRules):
    """robots.txt of every origin.

    `read` fetches one; None means any 4xx. What it raises ends every row of that origin for a while, with its own
    reason: 5xx is a complete disallow (RFC 9309 section 2.3.1.4), but a transient one.
    """

    path = "/robots.txt"
    parse = staticmethod(robots_rules)

    async def check(self, url: URL) -> None:
        """Raises RowError: opted_out where the rules disallow this URL, or what `read` raised."""
        if await self.refuse(url):
            raise FinalError(Reason.OPTED_OUT, f"robots.txt of {url.origin()} disallows it")

    async def refuse_usage(self, url: URL) -> bool:
        """Whether Content-Usage rules ask that what is at a URL be not trained on; raises what `read` raised."""
        rules = await self._rules(url)
        return isinstance(rules, RobotsRules) and await self._decide(rules.usage, url)


# ---------------------------------------------------------------------------------------------------- tdmrep.json


def tdmrep_rules(body: bytes) -> Rules:
    """Read a tdmrep.json: a rule refuses where it reserves the rights in what it matches.

    The first rule whose `location` matches path and query decides; where its `tdm-reservation` is not 1 (the number,
    or the text as headers have it), nothing is reserved. Locations match as paths in robots.txt do. A file that is not
    a JSON array is an error, and an error means unset; a rule that is no object with a location is passed over.
    """
    try:
        entries = parse_json(body, "tdmrep.json")
    except UserError:
        entries = None
    rules = []
    for i, entry in enumerate(entries if isinstance(entries, list) else ()):
        location = entry.get("location") if isinstance(entry, dict) else None
        if isinstance(location, str) and location:
            value = entry.get("tdm-reservation")
            rules.append((location, len(entries) - i, value in (1, "1") and value is not True))
    return Rules(rules)


class TdmRep(_OriginRules):
    """/.well-known/tdmrep.json of every origin.

    `read` fetches one. By TDMRep an origin that has none, or fails to give it, has said nothing: what `read` raises
    ends no row. A header may say more than the file but not take it back, though TDMRep lets it: who is reserved in
    the file is not asked.
    """

    path = "/.well-known/tdmrep.json"
    parse = staticmethod(tdmrep_rules)

    async def check(self, url: URL) -> None:
        """Raises RowError: opted_out where the file of the URL's origin reserves it."""
        try:
            reserved = await self.refuse(url)
        except RowError:
            return
        if reserved:
            raise FinalError(Reason.OPTED_OUT, f"tdmrep.json of {url.origin()} reserves it")
