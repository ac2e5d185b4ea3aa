"""Whom we may contact.

A list of URLs is somebody else's text, and the machine that fetches it sits inside somebody's network. So a connection
is made only to globally routable addresses; what a name resolves to is checked once and the connection goes to exactly
the checked addresses, so that a second, different answer of the name server changes nothing; and every redirect passes
the same checks. Who asked us to stay away is the matter of `curate.fetch.optouts`.
"""

from __future__ import annotations

import asyncio
import copy
import errno
import re
import socket
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from aesthetic.errors import UserError
from curate.ledger.schema import Reason, RowError

MAX_URL = 8000
"""Characters; RFC 9110 section 4.1 asks everybody to support at least 8000 octets."""


class FinalError(RowError):
    """A row's error that trying again in this run would not change, whatever its reason."""


# ------------------------------------------------------------------------------------------------------- addresses


@dataclass(frozen=True)
class Allowed:
    """A private network and the one port of it that may be contacted."""

    network: IPv4Network | IPv6Network
    port: int


_ALLOW = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<v4>[0-9.]+))(?P<prefix>/\d{1,3})?:(?P<port>\d{1,5})")


def parse_allow(entries: Iterable[str]) -> tuple[Allowed, ...]:
    """Read `fetch.allow`: "network:port" strings such as "127.0.0.0/8:8123" or "[::1]/128:8123".

    Raises:
        UserError: an entry is not of that form; the message quotes it.
    """
    allowed = []
    for entry in entries:
        match = _ALLOW.fullmatch(entry)
        port = int(match["port"]) if match else 0
        if not match or not 1 <= port <= 65535:
            raise UserError(
                f"fetch.allow: {entry!r} is not a network and a port; write it like 127.0.0.0/8:8123 or [::1]/128:8123"
            )
        try:
            network = ip_network((match["v6"] or match["v4"]) + (match["prefix"] or ""))
        except ValueError as e:
            raise UserError(f"fetch.allow: {entry!r}: {e}") from e
        allowed.append(Allowed(network, port))
    return tuple(allowed)


# IANA's special-purpose registry, as far as it is not for everybody. Python's own tables (`is_global`) are asked too,
# but they differ by version and miss what stands here with a remark.
_REFUSED_V4 = [
    ip_network(n)
    for n in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT; Alibaba's metadata service
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's host service: a public address that never leaves the machine's host
        "169.254.0.0/16",  # link-local; most clouds' metadata services
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata service; parts count as global to Python
        "192.0.2.0/24",
        "192.88.99.0/24",  # 6to4 relays; global to Python
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast; global to Python
        "240.0.0.0/4",
    )
]
# Everything outside 2000::/3 is refused as a whole: loopback, link- and site-local, unique local (AWS's fd00:ec2::254),
# multicast, IPv4-mapped and -compatible, and NAT64 (64:ff9b::/96 and 64:ff9b:1::/48), which embed IPv4 addresses.
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_REFUSED_V6 = [
    ip_network(n)
    for n in (
        "2001::/23",  # protocol assignments, among them Teredo, which embeds IPv4 addresses
        "2001:db8::/32",
        "2002::/16",  # 6to4: embeds IPv4 addresses; global to Python
        "3ffe::/16",
        "3fff::/20",
    )
]

# ISATAP (RFC 5214 section 6.1): under any prefix, an interface identifier of these upper 32 bits, but for the two bits
# of the mask, carries an IPv4 address.
_ISATAP, _ISATAP_MASK = 0x00005EFE, 0xFCFFFFFF

# Ports where an HTTP request does harm: the WHATWG Fetch standard's list of bad ports, which browsers refuse, and
# those of Ray (6379, 8265, 10001), which runs code for whoever reaches it, also where a node has a public address.
_REFUSED_PORTS = frozenset(
    {1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95, 101, 102, 103, 104, 109}
    | {110, 111, 113, 115, 117, 119, 123, 135, 137, 139, 143, 161, 179, 389, 427, 465, 512, 513, 514, 515, 526, 530}
    | {531, 532, 540, 548, 554, 556, 563, 587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723, 2049, 3659, 4045}
    | {4190, 5060, 5061, 6000, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080}
    | {6379, 8265, 10001}
)


def check_address(ip: str, port: int, allow: tuple[Allowed, ...]) -> None:
    """Refuse to contact an address that is not globally routable, or a port that HTTP has no business with.

    `allow` opens exactly its networks at exactly their ports. An IPv4 address in IPv6 clothes is never opened by a
    rule for the IPv4 network.

    Raises:
        RowError: blocked_address.
    """
    address = ip_address(ip)
    if any(port == a.port and address in a.network for a in allow):
        return
    if port in _REFUSED_PORTS:
        raise RowError(Reason.BLOCKED_ADDRESS, f"port {port} is not for HTTP")
    if isinstance(address, IPv4Address):
        public = address.is_global and not any(address in n for n in _REFUSED_V4)
    else:
        public = (
            address.is_global
            and address.scope_id is None
            and address in _GLOBAL_UNICAST
            and not any(address in n for n in _REFUSED_V6)
            and int(address) >> 32 & _ISATAP_MASK != _ISATAP
        )
    if not public:
        raise RowError(Reason.BLOCKED_ADDRESS, f"{ip} is not a public address")


def guarded_socket(allow: tuple[Allowed, ...]) -> Callable[[tuple[Any, ...]], socket.socket]:
    """A socket factory for aiohttp that has the last word on the address, whichever way it was come by.

    URL and resolver were checked before; this stands where nothing can pass by. It raises PermissionError, because
    aiohttp handles only OSError there.
    """

    def open_socket(info: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, address = info
        try:
            check_address(address[0], address[1], allow)
        except RowError as e:
            raise PermissionError(errno.EACCES, e.detail) from e
        return socket.socket(family, kind, protocol)

    return open_socket


# ------------------------------------------------------------------------------------------------------------ URLs

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_AROUND = "".join(map(chr, [*range(0x21), *range(0x7F, 0xA1), 0x200B, 0x2028, 0x2029, 0x3000, 0xFEFF]))
"""Controls, white space and byte order marks: a browser strips the first 33 around a URL, and nobody means the rest."""
_REMOVED = str.maketrans("", "", "\t\n\r")
_AMPERSAND = re.compile(r"&(?:amp|#0*38|#x0*26);", re.IGNORECASE)
_SENT_AS_IS = re.compile(r"[!#$%&'()*+,\-./0-9:;=?@A-Z\[\]_a-z~]*")  # what RFC 3986 lets stand in a URL
_NOT_SENT = re.compile(r"[^!#$%&'()*+,\-./0-9:;=?@A-Z\[\]_a-z~\ud800-\udfff]+")
_HOST = re.compile(r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.?")
_AUTHORITY = re.compile(r"(?:[^:/?#]*:)?//([^/?#]*)")
_NO_HOST = re.compile(r"https?:(?!//[^/?#])", re.IGNORECASE)  # also in a redirect, where yarl takes it for a path
_LONGEST_HOST = 1000  # characters with port and user, of which at most 253 can be a host: IDNA takes 4 us for each
_ENDS_IN_A_NUMBER = re.compile(r"(?:^|\.)(?:\d+|0x[0-9a-f]*)\.?$")  # WHATWG: then the whole host is an IPv4 address


def parse_url(text: str, allow: tuple[Allowed, ...], base: URL | None = None) -> URL:
    """Read a URL (or, with `base`, a redirect's Location) and refuse what must not be requested.

    The result has an http or https scheme, a plain ASCII host (IDNA-encoded) or a canonical address that may be
    contacted, no user information and no fragment. Path and query go out exactly as written where RFC 3986 lets
    them: signed URLs break when they are normalised. Else it is what a browser makes of the text (`_as_in_a_page`).

    Raises:
        RowError: bad_url, or blocked_address where the host is an address that may not be contacted.
    """
    text = _as_in_a_page(text, base is None)
    if not text:
        raise RowError(Reason.BAD_URL, "empty")
    if len(text) > MAX_URL:
        raise RowError(Reason.BAD_URL, f"{len(text)} characters, more than {MAX_URL}")
    if _CONTROL.search(text):
        raise RowError(Reason.BAD_URL, "control characters")
    authority = _AUTHORITY.match(text)
    if _NO_HOST.match(text) or (authority and len(authority[1]) > _LONGEST_HOST):
        raise RowError(Reason.BAD_URL, "no host" if _NO_HOST.match(text) else f"host {text[:80]!r}")
    try:
        url = _joined(base, URL(text))
        host, port = url.raw_host or "", url.port or 0
    except (ValueError, IndexError) as e:  # UnicodeError is one; yarl stumbles over http://[]@/
        raise RowError(Reason.BAD_URL, str(e)) from e
    if url.scheme not in ("http", "https"):
        raise RowError(Reason.BAD_URL, f"scheme {url.scheme[:20]!r}: only http and https are fetched")
    if authority and "@" in authority[1]:
        raise RowError(Reason.BAD_URL, "a user name before the host")
    if authority and "[" in authority[1] and ":" not in host:
        raise RowError(Reason.BAD_URL, "brackets without an address")
    if not host or not port:
        raise RowError(Reason.BAD_URL, "port 0" if host else "no host")
    if ":" in host or _ENDS_IN_A_NUMBER.search(host):
        check_address(_canonical(host), port, allow)
    elif len(host) > 253 or not _HOST.fullmatch(host):
        raise RowError(Reason.BAD_URL, f"host {host[:80]!r}")
    if _SENT_AS_IS.fullmatch(text):
        exact = _joined(base, URL(text, encoded=True))
        if exact.raw_authority == url.raw_authority and exact.raw_path.startswith("/") and "/." not in exact.raw_path:
            return exact
    return url


def _as_in_a_page(text: str, listed: bool) -> str:
    """A URL as a browser reads it (WHATWG URL, 4.4): without controls and white space around it, without tabs and line
    ends, with slashes for backslashes, and what may not stand in it percent-encoded as UTF-8.

    Of a list (and not of a redirect) come pieces of HTML too: //host/path, which is taken for http, and &amp; for &.
    """
    text = text.strip(_AROUND).translate(_REMOVED)
    if len(text) > MAX_URL:
        return text
    if listed:
        text = _AMPERSAND.sub("&", text)
    before, question, query = text.partition("?")
    before, fragment, rest = before.partition("#") if "#" in before else (before, "", "")
    if re.match(r"(?:https?:)?[/\\]", before, re.IGNORECASE) or not listed:
        before = before.replace("\\", "/")
    if listed and before.startswith("//"):
        before = f"http:{before}"
    scheme = re.match(r"(?:[a-z][a-z0-9+.-]*:)?//[^/]*", before, re.IGNORECASE)
    host, path = (scheme[0], before[scheme.end() :]) if scheme else ("", before)
    whole = path + fragment + rest + question + query
    if (listed and not host) or _CONTROL.search(whole):
        return host + whole
    return host + _NOT_SENT.sub(lambda m: quote(m[0], safe=""), whole)


def _joined(base: URL | None, url: URL) -> URL:
    return (base.join(url) if base is not None else url).with_fragment(None)


def _canonical(host: str) -> str:
    """An address as host, in its one canonical spelling; resolvers read others too (127.1, 0x7f.1, 2130706433)."""
    try:
        address = ip_address(host)
    except ValueError as e:
        raise RowError(Reason.BAD_URL, f"host {host[:80]!r}: an address in an odd form") from e
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        raise RowError(Reason.BAD_URL, f"host {host[:80]!r}: an address with a zone")
    return host


# ------------------------------------------------------------------------------------------------ shared, kept work

T = TypeVar("T")


class Shared(Generic[T]):
    """One computation per key for all who ask at once, its outcome kept for a time; the oldest are forgotten first.

    A RowError is an outcome like any other, and everybody gets a copy of their own. Other exceptions are not kept.
    `keep` gives the seconds for which an outcome holds; `size` is the most that all outcomes may weigh together, each
    one what `weight` says (1).
    """

    def __init__(
        self,
        compute: Callable[[str], Awaitable[T]],
        keep: Callable[[T | RowError], float],
        size: int,
        weight: Callable[[T | RowError], int] = lambda outcome: 1,
    ) -> None:
        self._compute, self._keep, self._size, self._weight = compute, keep, size, weight
        self._weighs = 0
        self._running: dict[str, asyncio.Task[T | RowError]] = {}
        self._kept: OrderedDict[str, tuple[float, T | RowError]] = OrderedDict()

    async def get(self, key: str) -> T:
        """The outcome for a key: kept, under way, or computed now. A caller who is cancelled stops nobody else."""
        until, outcome = self._kept.get(key, (0.0, None))
        if outcome is None or until <= time.monotonic():
            task = self._running.get(key)
            if task is None:
                task = self._running[key] = asyncio.create_task(self._run(key))
                task.add_done_callback(lambda t: t.cancelled() or t.exception())  # seen, also where all have left
            outcome = await asyncio.shield(task)
        if isinstance(outcome, RowError):
            raise copy.copy(outcome)
        return outcome

    async def _run(self, key: str) -> T | RowError:
        outcome: T | RowError
        try:
            try:
                outcome = await self._compute(key)
            except RowError as e:
                outcome = e.with_traceback(None)
            if key in self._kept:
                self._weighs -= self._weight(self._kept.pop(key)[1])
            self._kept[key] = (time.monotonic() + self._keep(outcome), outcome)
            self._weighs += self._weight(outcome)
            while self._weighs > self._size and len(self._kept) > 1:
                self._weighs -= self._weight(self._kept.popitem(last=False)[1][1])
            return outcome
        finally:
            del self._running[key]

    async def close(self) -> None:
        """Stop what is under way."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# ----------------------------------------------------------------------------------------------------------- names

Lookup = Callable[[str], Awaitable[list[str]]]
"""A host name to its addresses as text; raises socket.gaierror where there are none."""

_DNS_THREADS = 64  # look-ups at once; a stalled name server holds a thread for up to half a minute
_DNS_KEPT = 300.0  # seconds; getaddrinfo does not tell a record's own time to live
_DNS_KEPT_NO_NAME = 60.0
_DNS_KEPT_FAILURE = 5.0
_DNS_SIZE = 100_000  # names kept
_NO_SUCH_NAME = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", None), getattr(socket, "EAI_ADDRFAMILY", None)}


@dataclass(frozen=True)
class _Addresses:
    addresses: tuple[str, ...]
    seconds: float  # that finding them took


class GuardedResolver(AbstractResolver):
    """Names to addresses for aiohttp, which then connects to exactly what this returns.

    A host is refused when any one of its addresses may not be contacted. Answers are kept and look-ups shared, 64 of
    them at a time; every answer is checked again each time it is used, for the port at hand.

    Args:
        allow: private addresses that may be contacted.
        timeout: seconds for one look-up, not counting its wait for others.
        lookup: what is asked in place of the system.

    Raises (from `resolve` and `ahead`):
        RowError: dns (a `FinalError` one where the name does not exist) or blocked_address.
    """

    def __init__(self, allow: tuple[Allowed, ...], timeout: float, lookup: Lookup | None = None) -> None:
        self._allow, self._timeout = allow, timeout
        self._places = asyncio.Semaphore(_DNS_THREADS)
        self._threads = ThreadPoolExecutor(_DNS_THREADS, "dns")
        self._lookup = lookup or self._ask_the_system
        self._shared = Shared(self._addresses, self._keep, _DNS_SIZE)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        addresses = (await self._shared.get(host)).addresses
        for address in addresses:
            try:
                check_address(address, port, self._allow)
            except RowError as e:
                raise RowError(e.reason, f"{host}: {e.detail}") from e
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    async def ahead(self, host: str) -> float:
        """Have a name's addresses at hand. Returns the seconds of a look-up that this call waited for, 0 for most."""
        if ":" in host or _ENDS_IN_A_NUMBER.search(host):
            return 0.0
        began = time.monotonic()
        names = await self._shared.get(host)
        return min(time.monotonic() - began, names.seconds)

    async def close(self) -> None:
        """Stop what is under way."""
        await self._shared.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _addresses(self, host: str) -> _Addresses:
        try:
            async with self._places:
                began = time.monotonic()
                async with asyncio.timeout(self._timeout):
                    addresses = await self._lookup(host)
        except TimeoutError:
            raise RowError(Reason.DNS, f"{host}: no answer within {self._timeout:g} s") from None
        except socket.gaierror as e:
            kind = FinalError if e.errno in _NO_SUCH_NAME else RowError
            raise kind(Reason.DNS, f"{host}: {e.strerror or e}") from e
        except UnicodeError as e:  # the system's own IDNA encoder, on a label that it finds odd
            raise FinalError(Reason.DNS, f"{host}: {e}") from e
        if not addresses:
            raise FinalError(Reason.DNS, f"{host}: no address")
        return _Addresses(tuple(addresses), time.monotonic() - began)

    async def _ask_the_system(self, host: str) -> list[str]:
        answers = await asyncio.get_running_loop().run_in_executor(
            self._threads,
            lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG),
        )
        return [str(address[0]) for *_, address in answers]

    @staticmethod
    def _keep(outcome: _Addresses | RowError) -> float:
        if isinstance(outcome, FinalError):
            return _DNS_KEPT_NO_NAME
        return _DNS_KEPT_FAILURE if isinstance(outcome, RowError) else _DNS_KEPT
