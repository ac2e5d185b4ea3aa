"""What a web server refuses before anything of ours is asked: strangers, other sites, and requests out of proportion.

A page on another site can make its visitor's browser send requests here. Browsers say where a request comes from
(`Origin`, `Sec-Fetch-Site`) and what name it was sent to (`Host`), and keep other sites from setting a content type of
JSON unasked; so all four are looked at. A token, where there is one, comes as `Authorization: Bearer`, or as a cookie
that the sign-in form sets.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import secrets
from collections import Counter
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from studio.attempts import TokenAttempts

MAX_HEADERS = 100
MAX_HEAD = 16 << 10  # bytes of a request's line and headers
MAX_BODY = 24 << 20
"""Bytes of one request: two pictures of 8 MB in base64, and room."""
SMALL_BODY = 64 << 10
MAX_READING = 256 << 20
"""Bytes of all the requests above SMALL_BODY that are read at once; those from one address may be half of it."""
BODY_SECONDS = 60.0
HEAD_SECONDS = 10.0  # from the first byte, or from connecting, to the end of the headers
WRITE_SECONDS = 30.0  # in which a client takes 64 kB of an answer
MOST_CONNECTIONS = 384  # and as many again that are being answered
CHUNKS, CHUNK_BYTES = 200, 1000
"""A body in chunks has so many at most, and then one for each so many bytes: each costs as much time as a request."""

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


def error_response(status: int, error: str, hint: str = "", headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The one shape of every error: what is wrong, and what to do about it."""
    return JSONResponse({"error": error, "hint": hint}, status, headers)


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
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None, token: str | None, sign_in: str) -> None:
        self._app, self._hosts, self._token, self._sign_in = app, hosts, token, sign_in
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
                for name, value in PROTECTION.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            answer = await self._pass(scope, receive, protected)
        except Refused as e:
            answer = e.response
        if answer is not None:
            await answer(scope, receive, protected)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        """Let the app answer (None), or say what is answered in its place."""
        headers = Headers(scope=scope)
        method, path = scope["method"], scope["path"]
        if len(headers) > MAX_HEADERS:
            raise Refused(431, f"{len(headers):,} headers; at most {MAX_HEADERS} are read")
        self._check_host(headers)
        _check_site(headers, method, path)
        if self._token is not None and path == "/login" and method == "POST":
            return await self._log_in(scope, receive)
        if path not in OPEN and not await self._is_known(scope):
            if path == "/" and method == "GET":
                return self._form(401, "")
            raise Refused(
                401,
                "this server asks for a token",
                "send it as `Authorization: Bearer TOKEN`, or sign in on the page",
                {"www-authenticate": "Bearer"},
            )
        if method in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return None
        address = address_of(scope)
        body = await self._body(headers, receive, address)
        if method in ("POST", "PUT", "PATCH"):
            _check_type(headers, "application/json")
        ended = False

        async def again() -> Message:
            nonlocal ended
            if ended:
                return await receive()
            ended = True
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            await self._app(scope, again, send)
        finally:
            self._read(address, -len(body))
        return None

    def _check_host(self, headers: Headers) -> None:
        given = headers.getlist("host")
        if len(given) != 1:
            raise Refused(400, f"{len(given)} Host headers; one is expected")
        name = _hostname(given[0])
        if self._hosts is not None and name not in self._hosts:
            raise Refused(
                403,
                f"this server does not answer to the name {given[0][:100]!r}",
                f"it answers to {', '.join(sorted(self._hosts))}; for another name start it with --host and a token",
            )

    async def _is_known(self, scope: Scope) -> bool:
        if self._token is None:
            return True
        connection = HTTPConnection(scope)
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        bearer = given.strip() if scheme.lower() == "bearer" else ""
        kept = connection.cookies.get(COOKIE, "")
        if not bearer and not kept:
            return False
        right = _same(bearer, self._token) | _same(kept, cookie(self._token))
        return await self._looked_at(scope, right)

    async def _looked_at(self, scope: Scope, right: bool) -> bool:
        """What came of a token, when its time has come. Refused where too many guesses wait."""
        address = address_of(scope)
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

    async def _log_in(self, scope: Scope, receive: Receive) -> Response:
        headers = Headers(scope=scope)
        address = address_of(scope)
        body = await self._body(headers, receive, address, most=10_000)
        self._read(address, -len(body))
        _check_type(headers, "application/x-www-form-urlencoded")
        try:
            given = parse_qs(body.decode("utf-8", "replace"), max_num_fields=10).get("token", [""])[0]
        except ValueError as e:
            raise Refused(400, f"this is no sign-in: {e}") from None
        if self._token is None or not await self._looked_at(scope, _same(given.strip(), self._token)):
            return self._form(401, "That is not the token. It is printed where the server was started.")
        answer = RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, cookie(self._token), max_age=30 * 86400, httponly=True, samesite="strict")
        return answer

    def _form(self, status: int, note: str) -> Response:
        return HTMLResponse(self._sign_in.replace("{note}", note), status)

    async def _body(self, headers: Headers, receive: Receive, address: str, most: int = MAX_BODY) -> bytes:
        """All bytes of a request, which count as being read until the caller takes them off again.

        Counted as they come, whatever `Content-Length` says.
        """
        too_large = Refused(413, f"the request is larger than {most / 1e6:,.0f} MB", "send smaller pictures")
        said = headers.get("content-length", "0")
        if not said.isdecimal() or int(said[:20]) > most:
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
                    self._read(address, len(part))
                    body += part
                    more = message.get("more_body", False)
                    if len(body) > most:
                        raise too_large
                    if len(body) > SMALL_BODY and self._much_is_read(address):
                        raise Refused(503, "too much is being sent at once", "try again shortly", {"retry-after": "5"})
        except TimeoutError:
            self._read(address, -len(body))
            raise Refused(408, f"the request did not arrive within {BODY_SECONDS:.0f} seconds") from None
        except BaseException:
            self._read(address, -len(body))
            raise
        return bytes(body)

    def _read(self, address: str, bytes: int) -> None:
        self._reading[address] += bytes
        if not self._reading[address]:
            del self._reading[address]

    def _much_is_read(self, address: str) -> bool:
        return self._reading.total() > MAX_READING or self._reading[address] > MAX_READING / 2


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


def _check_site(headers: Headers, method: str, path: str) -> None:
    """Refuse what a browser sends because another site told it to; whoever is no browser says nothing of the kind."""
    site, mode = headers.get("sec-fetch-site"), headers.get("sec-fetch-mode")
    link = method == "GET" and path == "/" and mode == "navigate"  # to come here by a link is fine
    origin = headers.get("origin")
    foreign = site not in (None, "same-origin", "none") and not link
    if origin is not None and method not in ("GET", "HEAD"):
        foreign |= origin.partition("://")[2].lower() != headers.get("host", "").lower()
    if foreign:
        raise Refused(403, "this request comes from another site", "open the page itself, or ask without a browser")


def _check_type(headers: Headers, expected: str) -> None:
    given = headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != expected:
        raise Refused(415, f"the content type is {given[:100]!r}; {expected} is expected")


def _hostname(host: str) -> str:
    """The name in a Host header, without port and brackets, in lower case; "" where it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


class _Parser(h11.Connection):
    """h11's, where a body in crumbs is no request."""

    chunks = bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunks = self.bytes = 0
        elif isinstance(event, h11.Data):
            self.chunks += event.chunk_start
            self.bytes += len(event.data)
            if self.chunks > CHUNKS + self.bytes // CHUNK_BYTES:
                raise h11.RemoteProtocolError("the body comes in too small chunks")
        return event


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, where who is slow is closed: a connection has HEAD_SECONDS to bring a whole head, and
    WRITE_SECONDS to take what it asked for.

    Where MOST_CONNECTIONS are there and one more comes, one makes room for it that waits for its client: of the address
    that has the most of these, the one that has been there longest, and first of all one that never asked anything.
    """

    _has_asked = False
    _deadline: asyncio.TimerHandle | None = None
    _write_deadline: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _Parser(h11.SERVER, MAX_HEAD)
        self._since = self.loop.time()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.address = address_of({"client": self.client})
        if len(self.connections) > MOST_CONNECTIONS:
            self._make_room()
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()
        self.resume_writing()

    def on_response_complete(self) -> None:
        self._since, self._has_asked = self.loop.time(), True
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_deadline is None:
            self._write_deadline = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    @property
    def is_sending(self) -> bool:
        """Whether the client is in the midst of a request."""
        return self.cycle is not None and not self.cycle.response_complete and self.cycle.more_body

    @property
    def waits_for_client(self) -> bool:
        """Whether it is the client's turn: to ask, to send the rest of a request, or to take the answer."""
        asked = self.cycle
        return asked is None or asked.response_complete or asked.response_started or asked.more_body

    def _make_room(self) -> None:
        idle = [c for c in self.connections if isinstance(c, GuardedProtocol) and c is not self and c.waits_for_client]
        if not idle and len(self.connections) <= 2 * MOST_CONNECTIONS:
            return
        counts = Counter(c.address for c in idle)
        leaves = min(idle, key=lambda c: (-counts[c.address], c._has_asked, c._since), default=self)
        self.connections.discard(leaves)  # at once: more may come before it has gone
        leaves.transport.abort()

    def _wait(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()  # a request is being answered
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()
