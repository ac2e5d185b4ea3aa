"""Whom we may contact: the addresses, ports and URLs that are refused.

A list of URLs is somebody else's text, and the machine that fetches it sits inside somebody's network. So a connection
is made only to globally routable addresses, and every redirect passes the same checks. That the connection goes to the
address that was checked is the matter of `curate.fetch.dns`; who asked us to stay away, of `curate.fetch.optouts`.
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any
from urllib.parse import quote

from yarl import URL

from aesthetic.errors import UserError
from curate.ledger.schema import Reason, RowError

MAX_URL = 8000
"""Characters; RFC 9110 section 4.1 asks everybody to support at least 8000 octets."""


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
    *map(ip_network, ("0.0.0.0/8", "10.0.0.0/8", "127.0.0.0/8", "172.16.0.0/12", "192.0.2.0/24", "192.168.0.0/16")),
    *map(ip_network, ("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4")),
    ip_network("100.64.0.0/10"),  # carrier-grade NAT; Alibaba's metadata service
    ip_network("168.63.129.16/32"),  # Azure's host service: a public address that never leaves the machine's host
    ip_network("169.254.0.0/16"),  # link-local; most clouds' metadata services
    ip_network("192.0.0.0/24"),  # protocol assignments; Oracle's metadata service; parts count as global to Python
    ip_network("192.88.99.0/24"),  # 6to4 relays; global to Python
    ip_network("224.0.0.0/4"),  # multicast; global to Python
]
# Everything outside 2000::/3 is refused as a whole: loopback, link- and site-local, unique local (AWS's fd00:ec2::254),
# multicast, IPv4-mapped and -compatible, and NAT64 (64:ff9b::/96 and 64:ff9b:1::/48), which embed IPv4 addresses.
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_REFUSED_V6 = [
    *map(ip_network, ("2001:db8::/32", "3ffe::/16", "3fff::/20")),
    ip_network("2001::/23"),  # protocol assignments, among them Teredo, which embeds IPv4 addresses
    ip_network("2002::/16"),  # 6to4: embeds IPv4 addresses; global to Python
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
ENDS_IN_A_NUMBER = re.compile(r"(?:^|\.)(?:\d+|0x[0-9a-f]*)\.?$")  # WHATWG: then the whole host is an IPv4 address


def parse_url(text: str, allow: tuple[Allowed, ...], base: URL | None = None) -> URL:
    """Read a URL (or, with `base`, a redirect's Location) and refuse what must not be requested.

    The result has an http or https scheme, a plain ASCII host (IDNA-encoded) or a canonical address that may be
    contacted, no user information and no fragment. Path and query go out exactly as written where RFC 3986 lets
    them: signed URLs break when they are normalised. Else it is what a browser makes of the text (`_as_browsers_read`).

    Raises:
        RowError: bad_url, or blocked_address where the host is an address that may not be contacted.
    """
    text = _as_browsers_read(text, base is None)
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
        url = (base.join(URL(text)) if base is not None else URL(text)).with_fragment(None)
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
    if ":" in host or ENDS_IN_A_NUMBER.search(host):
        try:
            address = ip_address(host)
        except ValueError as e:  # resolvers read it in other spellings too: 127.1, 0x7f.1
            raise RowError(Reason.BAD_URL, f"host {host[:80]!r}: an address in an odd form") from e
        if isinstance(address, IPv6Address) and address.scope_id is not None:
            raise RowError(Reason.BAD_URL, f"host {host[:80]!r}: an address with a zone")
        check_address(host, port, allow)
    elif len(host) > 253 or not _HOST.fullmatch(host):
        raise RowError(Reason.BAD_URL, f"host {host[:80]!r}")
    if _SENT_AS_IS.fullmatch(text):
        exact = URL(text, encoded=True)
        exact = (base.join(exact) if base is not None else exact).with_fragment(None)
        if exact.raw_authority == url.raw_authority and exact.raw_path.startswith("/") and "/." not in exact.raw_path:
            return exact
    return url


def _as_browsers_read(text: str, listed: bool) -> str:
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
