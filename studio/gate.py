"""What a web server refuses before anything of ours is asked: strangers, other sites, and requests out of proportion.

A page on another site can make its visitor's browser send requests here. Browsers say where a request comes from
(`Origin`, `Sec-Fetch-Site`) and what name it was sent to (`Host`), and keep other sites from setting a content type of
JSON unasked; so all four are looked at. A token, where there is one, comes as `Authorization: Bearer`, or as a cookie
that the sign-in form sets. Wrong ones are looked at slowly, the right one at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import math
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_HEADERS = 100
MAX_BODY = 24 << 20
"""Bytes of one request: two images of 8 MB in base64, and room."""
SMALL_BODY = 64 << 10
MAX_READING = 256 << 20
"""Bytes of all the requests above SMALL_BODY that are read at once; those from one address may be half of it."""
BODY_SECONDS = 60.0

COOKIE = "tastemaker_token"
OPEN = ("/style.css", "/icon.svg")
"""What the sign-in page needs: part of the package, the same for everybody."""

PROTECTION = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
"""Headers of every response: nothing from other hosts, no script in the page's text, in nobody's frame."""


def error_response(
    status: int, error: str, hint: str = "", headers: Mapping[str, str] | None = None, more: Mapping[str, str] = {}
) -> JSONResponse:
    """The one shape of every error: what is wrong, and what to do about it; `more` goes beside it."""
    return JSONResponse({"error": error, "hint": hint, **more}, status, headers)


class Refused(Exception):
    """A request that goes no further, with the response that it gets."""

    def __init__(self, status: int, error: str, hint: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error)
        self.response = error_response(status, error, hint, headers)


class Gate:
    """ASGI middleware around the app.

    Args:
        hosts: names that the server answers to; None: any. A site whose name was pointed at this machine's address
            (DNS rebinding) is of one origin with what it reads, and only its name gives it away. With a token that
            does not matter: the cookie belongs to the name under which it was set.
        token: what a client must know; None: nothing.
        sign_in: the HTML of the form that asks for the token, with `{note}` where a note goes.
        pages: the addresses of pages: what people come to by a link, and where the form is shown.
    """

    def __init__(
        self, app: ASGIApp, hosts: frozenset[str] | None, token: str | None, sign_in: str, pages: Collection[str]
    ) -> None:
        self._app, self._hosts, self._token, self._sign_in, self._pages = app, hosts, token, sign_in, pages
        self._reading: Counter[str] = Counter()  # bytes, by address
        self._attempts = TokenAttempts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no web sockets here
            await send({"type": "websocket.close", "code": 1008})
            return

        async def protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(PROTECTION)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            response = await self._pass(scope, receive, protected)
        except Refused as e:
            response = e.response
        if response is not None:
            await response(scope, receive, protected)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        """Let the app answer (None), or say what is answered in its place."""
        headers, method, path, address = Headers(scope=scope), scope["method"], scope["path"], address_of(scope)
        if len(headers) > MAX_HEADERS:
            raise Refused(431, f"{len(headers):,} headers; at most {MAX_HEADERS} are read")
        self._check_origin(headers, method, path)
        if self._token is not None:
            if path == "/login" and method == "POST":
                return await self._log_in(scope, receive, self._token)
            scheme, _, given = headers.get("authorization", "").partition(" ")
            bearer = given.strip() if scheme.lower() == "bearer" else ""
            kept = HTTPConnection(scope).cookies.get(COOKIE, "")
            right = _same(bearer, self._token) | _same(kept, cookie(self._token))
            if path not in OPEN and not ((bearer or kept) and await self._attempt(address, right)):
                if path in self._pages and method == "GET":
                    return self._form("")
                raise Refused(
                    401,
                    "this server asks for a token",
                    "send it as `Authorization: Bearer TOKEN`, or sign in on the page",
                    {"www-authenticate": "Bearer"},
                )
        if method in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return None

        body: bytes | None = await self._read_body(headers, receive, address)
        size = len(body or b"")
        try:
            if method in ("POST", "PUT", "PATCH"):
                _check_type(headers, "application/json")

            async def replay() -> Message:
                nonlocal body
                if body is None:
                    return await receive()
                message = {"type": "http.request", "body": body, "more_body": False}
                body = None
                return message

            await self._app(scope, replay, send)
        finally:
            self._count(address, -size)
        return None

    def _check_origin(self, headers: Headers, method: str, path: str) -> None:
        given = headers.getlist("host")
        if len(given) != 1:
            raise Refused(400, f"{len(given)} Host headers; one is expected")
        try:
            name = urlsplit(f"//{given[0]}").hostname or ""
        except ValueError:
            name = ""
        if self._hosts is not None and name not in self._hosts:
            raise Refused(
                403,
                f"this server does not answer to the name {given[0][:100]!r}",
                f"it answers to {', '.join(sorted(self._hosts))}; for another name start it with --host and a token",
            )

        # what a browser sends because another site told it to; whoever is no browser says nothing of the kind
        site, mode, origin = (headers.get(name) for name in ("sec-fetch-site", "sec-fetch-mode", "origin"))
        link = method == "GET" and path in self._pages and mode == "navigate"  # to come here by a link is fine
        foreign = site not in (None, "same-origin", "none") and not link
        if origin is not None and method not in ("GET", "HEAD"):
            foreign |= origin.partition("://")[2].lower() != headers.get("host", "").lower()
        if foreign:
            raise Refused(403, "this request comes from another site", "open the page itself, or ask without a browser")

    # ------------------------------------------------------------------------------------------------------ tokens

    async def _attempt(self, address: str, right: bool) -> bool:
        """What came of a token, when its time has come. Refused where too many attempts wait."""
        if right and self._attempts.is_known(address):
            self._attempts.right(address, taken=False)
            return True
        wait = self._attempts.take(address)
        if wait is None:
            raise Refused(429, "too many wrong tokens came from your address", "wait a little", {"retry-after": "15"})
        await asyncio.sleep(wait)
        if right:
            self._attempts.right(address, taken=True)
        return right

    async def _log_in(self, scope: Scope, receive: Receive, token: str) -> Response:
        headers, address = Headers(scope=scope), address_of(scope)
        body = await self._read_body(headers, receive, address, most=10_000)
        self._count(address, -len(body))
        _check_type(headers, "application/x-www-form-urlencoded")
        try:
            given = parse_qs(body.decode("utf-8", "replace"), max_num_fields=10).get("token", [""])[0]
        except ValueError as e:
            raise Refused(400, f"this is no sign-in: {e}") from None
        if not await self._attempt(address, _same(given.strip(), token)):
            return self._form("That is not the token. It is printed where the server was started.")
        response = RedirectResponse("/", 303)
        response.set_cookie(COOKIE, cookie(token), max_age=30 * 86400, httponly=True, samesite="strict")
        return response

    def _form(self, note: str) -> Response:
        return HTMLResponse(self._sign_in.replace("{note}", note), 401)

    # ------------------------------------------------------------------------------------------------------ bodies

    async def _read_body(self, headers: Headers, receive: Receive, address: str, most: int = MAX_BODY) -> bytes:
        """All bytes of a request, which count as being read until the caller takes them off again.

        Counted as they come, whatever `Content-Length` says.
        """
        too_large = Refused(413, f"the request is larger than {most / 1e6:,.0f} MB", "send smaller images")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the request ended before its end")
                    part = message.get("body", b"")
                    self._count(address, len(part))
                    body += part
                    more = message.get("more_body", False)
                    if len(body) > most:
                        raise too_large
                    full = self._reading.total() > MAX_READING or self._reading[address] > MAX_READING / 2
                    if len(body) > SMALL_BODY and full:
                        raise Refused(503, "too much is being sent at once", "try again shortly", {"retry-after": "5"})
        except BaseException as e:
            self._count(address, -len(body))
            if isinstance(e, TimeoutError):
                raise Refused(408, f"the request did not arrive within {BODY_SECONDS:.0f} seconds") from None
            raise
        return bytes(body)

    def _count(self, address: str, bytes: int) -> None:
        self._reading[address] += bytes
        if not self._reading[address]:
            del self._reading[address]


def address_of(scope: Scope) -> str:
    """From where a request comes: of IPv6 the /64, which is one customer's. Behind a proxy all have the proxy's."""
    host = (scope.get("client") or ("",))[0]
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return str(host)
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.IPv6Network((found, 64), strict=False))
    return str(found)


def cookie(token: str) -> str:
    """What the cookie holds: proof of the token, not the token. Browsers show cookies to every port of a host."""
    return hashlib.sha256(f"tastemaker sign-in {token}".encode()).hexdigest()


def _same(given: str, expected: str) -> bool:
    return secrets.compare_digest(given.encode("utf-8", "replace"), expected.encode())


def _check_type(headers: Headers, expected: str) -> None:
    given = headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != expected:
        raise Refused(415, f"the content type is {given[:100]!r}; {expected} is expected")


# ----------------------------------------------------------------------------------------------------- wrong tokens

EACH, EACH_AT_ONCE = 5.0, 10
"""Attempts a second of one address, after so many at once."""
ALL, ALL_AT_ONCE = 25.0, 50
"""The same of all addresses together; the first FREE of an address do not count, so that a newcomer waits for none."""
FREE = 3
MAX_WAIT = 10.0  # seconds that an attempt waits to be looked at
MAX_ADDRESSES = 10_000


class LeakyBucket:
    """Places in time for things that come at `rate` a second, after the first `at_once`."""

    def __init__(self, rate: float, at_once: int) -> None:
        self._interval, self._ahead = 1 / rate, (at_once - 1) / rate
        self._next = -math.inf

    def wait(self, now: float) -> float:
        """Seconds until the next place."""
        return max(0.0, max(self._next, now - self._ahead) - now)

    def take(self, now: float) -> None:
        """Take that place."""
        self._next = max(self._next, now - self._ahead) + self._interval

    def give_back(self) -> None:
        """The place taken last was not needed."""
        self._next -= self._interval

    def is_new(self, now: float) -> bool:
        """Whether nothing came for so long that it is as new."""
        return self._next < now - self._ahead


class TokenAttempts:
    """When a token may be looked at, and from where the right one has come.

    Per address a few at once and then five a second, of all 25 a second. An address that has shown the right token
    passes at once with it, whatever else comes from there; what is wrong waits there too.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._all = LeakyBucket(ALL, ALL_AT_ONCE)
        self._each: OrderedDict[str, tuple[LeakyBucket, int]] = OrderedDict()  # and how many came
        self._known: OrderedDict[str, None] = OrderedDict()

    def is_known(self, address: str) -> bool:
        """Whether the right token came from there before."""
        return address in self._known

    def take(self, address: str) -> float | None:
        """Seconds to wait before a token of an address is looked at; None: too many wait, and it is not looked at."""
        now = self._now()
        bucket, count = self._each.pop(address, (LeakyBucket(EACH, EACH_AT_ONCE), 0))
        if bucket.is_new(now):
            count = 0
        buckets = [bucket] if count < FREE else [bucket, self._all]
        wait = max(b.wait(now) for b in buckets)
        if wait <= MAX_WAIT:
            for b in buckets:
                b.take(now)
            count += 1
        _remember(self._each, address, (bucket, count))
        return wait if wait <= MAX_WAIT else None

    def right(self, address: str, taken: bool) -> None:
        """The right token came; `taken`: after a place was taken for it."""
        _remember(self._known, address, None)
        if taken and address in self._each:
            self._each[address][0].give_back()


def _remember(addresses: OrderedDict[str, Any], address: str, value: Any) -> None:
    """As the newest; the oldest are forgotten where there are too many."""
    addresses.pop(address, None)
    addresses[address] = value
    while len(addresses) > MAX_ADDRESSES:
        addresses.popitem(last=False)
