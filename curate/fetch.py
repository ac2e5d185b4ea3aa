"""URLs to bytes: politely, within limits, and with a named reason for every one that fails.

    fetcher = Fetcher(FetchConfig())
    body = await fetcher.get("https://...")         # Body, or RowError with a reason from the closed list
    await fetcher.close()

What holds for every request, also those for robots.txt and for each hop of a redirect: the address was checked and the
connection goes to the checked address (`curate.guard`), at most `per_host` requests are open to one host and
`concurrency` in all, no cookies, no proxy from the environment, no credentials. No answer can take longer than
`timeout` or hold more than `max_bytes`, counted after decompression; so a worker's bodies in flight need less than
concurrency x max_bytes, and for honest lists a hundredth of that.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import random
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDictProxy
from yarl import URL

from curate import guard
from curate.ledger import Reason, RowError
from curate.store import UserError

ENGINES = ("native", "img2dataset")

_FOLLOWED = {301, 302, 303, 307, 308}
_BACKOFF = 0.5  # seconds before the second attempt, on average; doubles with each one
_PATIENCE = 30.0  # seconds of Retry-After that are waited for; beyond, the row is left to `tastemaker retry`
_LONGEST_BAN = 3600.0  # seconds for which a Retry-After keeps us away from a host
_OF_THE_HOST = {Reason.DNS, Reason.CONNECT, Reason.TLS, Reason.TIMEOUT}
_HELD = 256_000_000  # bytes of bodies that wait for a decoder before nothing new is asked for
_STRIKES = 20  # failures in a row, with no answer of another kind between, after which a host is left alone
_REST = 60.0  # seconds for which it is
_IDLE = 5.0  # seconds that an unused connection is kept; lists are wide, and each one is a file descriptor
_HOSTS_KEPT = 10_000  # hosts remembered before the idle ones are forgotten
_FIELD = 16_384  # bytes of one header field


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How URLs are fetched.

    Raises:
        UserError: a value out of its range or an unknown word, naming the key.
    """

    engine: str = "native"  # or img2dataset: its downloader in place of ours (no address guard, no robots.txt)
    timeout: float = 20.0  # seconds for one attempt: names, TLS, redirects and body; waiting for a turn not counted
    concurrency: int = 256  # requests in flight per worker
    per_host: int = 4  # requests in flight per host name
    max_bytes: int = 32_000_000  # of one body, after decompression
    max_redirects: int = 5
    retries: int = 2  # attempts after the first, for reasons that may pass
    user_agent: str = "tastemaker/0.1.0 (dataset curation; robots.txt token: tastemaker)"
    respect: tuple[str, ...] = guard.SIGNALS  # opt-out signals that are honoured
    allow: tuple[str, ...] = ()  # private "network:port" pairs that may be contacted, such as 127.0.0.0/8:8123

    def __post_init__(self) -> None:
        for key in ("respect", "allow"):
            value = getattr(self, key)
            if isinstance(value, str):
                raise UserError(f"fetch.{key}: {value!r} must be a list")
            object.__setattr__(self, key, tuple(value))
        if self.engine not in ENGINES:
            raise UserError(f"fetch.engine: {self.engine!r} is not one of {', '.join(ENGINES)}")
        for key, least in (("concurrency", 1), ("per_host", 1), ("max_bytes", 1), ("max_redirects", 0), ("retries", 0)):
            if getattr(self, key) < least:
                raise UserError(f"fetch.{key}: {getattr(self, key)} must be at least {least}")
        if not self.timeout > 0:
            raise UserError(f"fetch.timeout: {self.timeout} must be more than 0 seconds")
        if not self.user_agent.isascii() or not self.user_agent.isprintable() or not self.user_agent.strip():
            raise UserError(f"fetch.user_agent: {self.user_agent!r} must be printable ASCII and not empty")
        for signal in self.respect:
            if signal not in guard.SIGNALS:
                raise UserError(f"fetch.respect: {signal!r} is not one of {', '.join(guard.SIGNALS)}")
        guard.parse_allow(self.allow)


@dataclass(frozen=True)
class Body:
    """What a server gave for a URL."""

    data: bytes
    final_url: str  # after redirects
    http_status: int  # 200 or 203


# ----------------------------------------------------------------------------------------------------------- hosts


class _Host:
    def __init__(self, per_host: int) -> None:
        self.turns = asyncio.Semaphore(per_host)
        self.users = 0  # rows that wait or are served
        self.strikes = 0
        self.not_before = 0.0  # loop time; what Retry-After asked for
        self.closed_until = 0.0  # loop time; until then rows end with `last` and nothing is sent
        self.last: RowError | None = None


class Hosts:
    """Turns at hosts: never more than `per_host` requests at one time, pauses where a host asks for them, and a rest
    for one that only fails. Keyed by host name. One object may serve several fetchers on one event loop.
    """

    def __init__(self, per_host: int) -> None:
        self._per_host = per_host
        self._hosts: dict[str, _Host] = {}

    @contextlib.asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        """Wait for a turn at a host and hold it. Raises guard.Settled while the host is left alone."""
        clock = asyncio.get_running_loop().time
        host = self._hosts.get(name)
        if host is None:
            self._forget_idle(clock())
            host = self._hosts[name] = _Host(self._per_host)
        host.users += 1
        try:
            async with host.turns:
                while (wait := host.not_before - clock()) > 0 and host.closed_until <= clock():
                    await asyncio.sleep(wait)
                if host.last is not None and host.closed_until > clock():
                    raise guard.Settled(host.last.reason, host.last.detail)  # the same words, whoever came first
                yield
        finally:
            host.users -= 1

    def answered(self, name: str) -> None:
        """A host gave an answer that counts as one, be it a refusal."""
        self._hosts[name].strikes = 0

    def failed(self, name: str, error: RowError, retry_after: float | None) -> None:
        """A host failed in a way that may pass; `retry_after` is what it asked for, in seconds."""
        host, now = self._hosts[name], asyncio.get_running_loop().time()
        if error.reason in _OF_THE_HOST:  # not what one URL of it answers: that must not depend on its neighbours
            host.strikes += 1
        host.last = error.with_traceback(None)
        if retry_after is not None and retry_after > _PATIENCE:
            host.closed_until = now + min(retry_after, _LONGEST_BAN)
        elif retry_after is not None:
            host.not_before = max(host.not_before, now + retry_after)
        if host.strikes >= _STRIKES:
            host.closed_until = max(host.closed_until, now + _REST)

    def _forget_idle(self, now: float) -> None:
        if len(self._hosts) >= _HOSTS_KEPT:
            self._hosts = {n: h for n, h in self._hosts.items() if h.users or max(h.not_before, h.closed_until) > now}


# --------------------------------------------------------------------------------------------------------- fetching


@dataclass(frozen=True)
class _Answer:
    url: URL
    status: int
    headers: CIMultiDictProxy[str]
    data: bytes


@dataclass(frozen=True)
class _Errand:
    """What differs between fetching an image and fetching robots.txt."""

    max_bytes: int
    cut: bool  # a longer body is cut there, not refused
    signals: frozenset[str]  # opt-outs that are looked at


T = TypeVar("T")


class Fetcher:
    """Fetches URLs on one event loop. Any number of `get` may wait at once: rows that wait for a busy host hold
    none of the `concurrency` places.

    Args:
        config: the limits.
        lookup: resolves host names in place of the system; what it answers is checked all the same.
        hosts: the turns at hosts, to share them with other fetchers; by default this fetcher's own.
    """

    def __init__(self, config: FetchConfig, *, lookup: guard.Lookup | None = None, hosts: Hosts | None = None) -> None:
        self._config = config
        self._allow = guard.parse_allow(config.allow)
        self._hosts = hosts or Hosts(config.per_host)
        self._places = asyncio.Semaphore(config.concurrency)
        self._resolver = guard.GuardedResolver(self._allow, lookup)
        self._robots = guard.Robots(self._read_robots)
        self._image = _Errand(config.max_bytes, False, frozenset(config.respect))
        self._rules = _Errand(guard.ROBOTS_MAX_BYTES, True, frozenset())
        self._opened: aiohttp.ClientSession | None = None
        self._held = 0  # bytes of bodies that are not used up yet
        self._room = asyncio.Event()
        self._room.set()

    async def get(self, url: str) -> Body:
        """Fetch one URL.

        Raises:
            RowError: why there is no body; `final_url` and `http_status` are set where a server answered.
        """
        parsed = guard.parse_url(url, self._allow)
        answer = await self._persist(lambda: self._follow(parsed, self._image))
        return Body(answer.data, str(answer.url), answer.status)

    @contextlib.asynccontextmanager
    async def body(self, url: str) -> AsyncIterator[Body]:
        """As `get`, counting the body as held until the block ends: while too much is held, nothing new is asked for.

        So a web that is faster than the decoders does not fill the memory. Rows that wait for a host's turn hold
        nothing.
        """
        answer = await self.get(url)
        self._hold(len(answer.data))
        try:
            yield answer
        finally:
            self._hold(-len(answer.data))

    def _hold(self, size: int) -> None:
        self._held += size
        if self._held < _HELD:
            self._room.set()
        else:
            self._room.clear()

    async def close(self) -> None:
        """Drop all connections. Rows still under way end with an error; wait for them first."""
        await self._robots.close()
        if self._opened is not None:
            await self._opened.close()
        await self._resolver.close()

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None:  # not in __init__: aiohttp wants a running loop
            self._opened = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    ssl=_tls(),
                    resolver=self._resolver,
                    use_dns_cache=False,  # the resolver has one that checks
                    socket_factory=guard.guarded_socket(self._allow),
                    limit=0,  # turns and places are counted here
                    keepalive_timeout=_IDLE,
                ),
                headers={
                    "User-Agent": self._config.user_agent,
                    "Accept": "image/*,*/*;q=0.5",
                    "Accept-Encoding": "identity",
                },
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # _exchange has the only clock
                auto_decompress=False,
                trust_env=False,
                max_field_size=_FIELD,
            )
        return self._opened

    async def _persist(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Try, and try again for reasons that may pass."""
        for n in range(self._config.retries + 1):
            try:
                return await attempt()
            except guard.Settled:
                raise
            except RowError as e:
                if not e.reason.passing or n == self._config.retries:
                    raise
            await asyncio.sleep(_BACKOFF * 2**n * random.uniform(0.5, 1.5))
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _follow(self, url: URL, errand: _Errand) -> _Answer:
        """One attempt: the URL and its redirects, each hop checked like the first.

        Turns come before places, so that a row which waits for a busy host takes nothing from the others.
        """
        left = self._config.timeout
        clock = asyncio.get_running_loop().time
        for _ in range(self._config.max_redirects + 1):
            if "robots-txt" in errand.signals:
                await self._robots.check(url)
            async with self._hosts.turn(url.raw_host or ""), self._places:
                await self._room.wait()
                start = clock()
                answer = await self._exchange(url, left, errand)
                left -= clock() - start
            if answer.status not in _FOLLOWED:
                return answer
            location = answer.headers.get("Location")
            try:
                if not location:
                    raise RowError(Reason.PROTOCOL, f"{answer.status} without a Location")
                url = guard.parse_url(location, self._allow, base=url)
            except RowError as e:
                raise RowError(
                    e.reason, f"redirect: {e.detail}", final_url=str(answer.url), http_status=answer.status
                ) from e
        raise RowError(
            Reason.TOO_MANY_REDIRECTS,
            f"more than {self._config.max_redirects}",
            final_url=str(answer.url),
            http_status=answer.status,
        )

    async def _exchange(self, url: URL, seconds: float, errand: _Errand) -> _Answer:
        """One request and its answer, and what it says about the host."""
        name, status, retry_after = url.raw_host or "", None, None
        try:
            try:
                async with asyncio.timeout(seconds), self._session.get(url, allow_redirects=False) as response:
                    status = response.status
                    retry_after = _retry_after(response.headers.get("Retry-After"))
                    data = await _read(response, errand)
                    answer = _Answer(url, status, response.headers, data)
            except (aiohttp.ClientError, HttpProcessingError, OSError) as e:  # TimeoutError is an OSError
                raise _as_row_error(e) from e
        except RowError as e:
            if status is not None:
                e.final_url, e.http_status = str(url), status
            if e.reason.passing:
                asked = retry_after if e.reason in (Reason.HTTP_429, Reason.HTTP_5XX) else None
                self._hosts.failed(name, e, asked)
                if asked is not None and asked > _PATIENCE:
                    raise guard.Settled(
                        e.reason,
                        f"{e.detail}; asked to wait {asked:.0f} s",
                        final_url=e.final_url,
                        http_status=e.http_status,
                    ) from e
            elif status is not None:
                self._hosts.answered(name)
            raise
        self._hosts.answered(name)
        return answer

    async def _read_robots(self, url: URL) -> bytes | None:
        """The bytes of a robots.txt, None where there is none; see guard.Robots for what the errors mean."""
        try:
            return (await self._persist(lambda: self._follow(url, self._rules))).data
        except RowError as e:
            status = e.http_status or 0
            if e.reason is not Reason.BLOCKED_ADDRESS and 300 <= status < 500:
                return None  # RFC 9309 section 2.3.1.3: unavailable, also after too many redirects
            detail = f"{url}: {e.detail}"
            if e.reason is Reason.HTTP_5XX and status:
                raise guard.Settled(Reason.OPTED_OUT, f"{detail}, which means: keep out") from e
            raise guard.Settled(e.reason, detail) from e


@functools.cache
def _tls() -> ssl.SSLContext:
    """One for all: building it reads every root certificate, some 50 ms."""
    return ssl.create_default_context()


async def _read(response: aiohttp.ClientResponse, errand: _Errand) -> bytes:
    """The body of an answer that has one to give, b"" for a redirect; RowError for all other answers."""
    status = response.status
    if status not in _FOLLOWED and status not in (200, 203):
        raise RowError(_REASONS.get(status) or _REASONS.get(status // 100) or Reason.PROTOCOL, f"status {status}")
    if "x-robots-tag" in errand.signals:
        directive = guard.robots_tag_refusal(response.headers.getall("X-Robots-Tag", ()))
        if directive:
            raise RowError(Reason.OPTED_OUT, f"X-Robots-Tag: {directive}")
    if status in _FOLLOWED:
        return b""
    limit = errand.max_bytes
    if response.content_length is not None and response.content_length > limit and not errand.cut:
        raise RowError(Reason.TOO_LARGE, f"{response.content_length} bytes declared, more than {limit}")
    encoding = ",".join(response.headers.getall("Content-Encoding", ())).strip().lower()
    inflate = _Inflate(encoding) if encoding not in ("", "identity") else None
    body = bytearray()
    received = 0
    async for chunk in response.content.iter_any():
        received += len(chunk)
        body += chunk if inflate is None else inflate(chunk, limit + 1 - len(body))
        if len(body) > limit or received > limit:
            if errand.cut:
                return bytes(body[:limit])
            raise RowError(Reason.TOO_LARGE, f"more than {limit} bytes")
    if inflate is not None and not inflate.complete:
        raise RowError(Reason.PROTOCOL, f"{encoding} body cut short")
    return bytes(body)


_REASONS = {404: Reason.HTTP_404, 429: Reason.HTTP_429, 4: Reason.HTTP_4XX, 5: Reason.HTTP_5XX}


class _Inflate:
    """Decompresses a body that came compressed although we asked for none, never past a given size."""

    def __init__(self, encoding: str) -> None:
        if encoding not in ("gzip", "x-gzip", "deflate"):
            raise RowError(Reason.PROTOCOL, f"Content-Encoding {encoding[:40]!r} was not asked for")
        self._stream = zlib.decompressobj(31) if encoding != "deflate" else None

    def __call__(self, chunk: bytes, limit: int) -> bytes:
        if self._stream is None:  # "deflate" is zlib's format by the book and bare deflate by custom
            self._stream = zlib.decompressobj(15 if chunk[0] & 0x0F == 8 else -15)
        try:
            return self._stream.decompress(chunk, limit)
        except zlib.error as e:
            raise RowError(Reason.PROTOCOL, f"broken compression: {e}") from e

    @property
    def complete(self) -> bool:
        return self._stream is not None and self._stream.eof


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110 section 10.2.3), None where it is absent or nonsense."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:12])
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    when = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def _as_row_error(error: Exception) -> RowError:
    """The reason for what aiohttp or the system raised. Running out of file descriptors is nobody's but ours."""
    text = error.message if isinstance(error, aiohttp.ClientResponseError) else f"{error}"
    detail = " ".join(text.split())[:200] or type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise UserError("too many open files: raise `ulimit -n` or lower fetch.concurrency") from error
    if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError)):
        return RowError(Reason.TLS, detail)
    if isinstance(error, TimeoutError) or (isinstance(error, OSError) and error.errno == errno.ETIMEDOUT):
        return RowError(Reason.TIMEOUT, "no whole answer in time")
    if isinstance(error, aiohttp.InvalidURL):
        return RowError(Reason.BAD_URL, detail)
    if isinstance(error, (OSError, aiohttp.ClientConnectionError)):
        return RowError(Reason.CONNECT, detail)
    return RowError(Reason.PROTOCOL, detail)  # bad status line or header, lengths that lie, broken chunks
