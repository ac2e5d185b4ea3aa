"""URLs to bytes: politely, within limits, and with a named reason for every one that fails.

    fetcher = Fetcher(FetchConfig())
    body = await fetcher.get("https://...")         # Body, or RowError with a reason from the closed list
    await fetcher.close()

What holds for every request, also those for robots.txt and for each hop of a redirect: the address was checked and the
connection goes to the checked address (`curate.fetch.addresses`), one registered domain gets so many requests at a time
and a second (`curate.fetch.domains`), and there are `concurrency` in all; no cookies, no proxy from the environment, no
credentials. No answer can take longer than `timeout` or hold more than `max_bytes`, counted after decompression; all
bodies in memory share `MEMORY` bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import random
import resource
import ssl
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDictProxy
from yarl import URL

from aesthetic.errors import UserError
from curate.fetch import addresses, domains, optouts
from curate.fetch.deny import Deny
from curate.fetch.memory import Hold, Memory
from curate.ledger.schema import Reason, RowError

ENGINES = ("native", "img2dataset")

MEMORY = 128_000_000
"""Bytes of bodies, arriving or waiting for a decoder, that a fetcher holds; one may go `max_bytes` beyond."""

SECOND_PASS = 5.0
"""Seconds, or up to half as many more, before the last attempt: what is down for a moment is up again by then."""

_FOLLOWED = {301, 302, 303, 307, 308}
_BACKOFF = 0.5  # seconds before an attempt that is not the last, on average; doubles with each one
_OF_THE_DOMAIN = {Reason.CONNECT, Reason.TLS, Reason.TIMEOUT, Reason.HTTP_429}  # and 503; others are one URL's affair
_UNREACHABLE = {Reason.BLOCKED_ADDRESS, Reason.DNS, Reason.CONNECT, Reason.TLS, Reason.TIMEOUT}
_PATIENCE = 30.0  # seconds of Retry-After that are waited for; beyond, the row is left to `tastemaker retry`
_PAUSE = 1.0  # seconds that a domain is left alone after a 429 that names no time
_LONGEST_BAN = 3600.0  # seconds for which a Retry-After keeps us away from a domain
_FIELD = 16_384  # bytes of one header field
_STEP = 65_536  # bytes that a body is first given; doubled as it grows
_PIECE = 262_144  # bytes that are decompressed at a time
_AHEAD = 24  # bodies that may wait for decoders before fewer requests are made at a time, and the fewest requests
_LATE = 0.5  # seconds after which a request under way leaves its place to another
_FILES = 512  # open ones that are no requests under way: others, and to spare
_KEPT_PER_SECOND = 4000  # connections: twice the answers that come, as aiohttp keeps some for twice the time
_SLOW, _SLOW_AFTER = 1000.0, 5.0  # bytes per second that a body must bring, on the average of more than so many seconds


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How URLs are fetched.

    Raises:
        UserError: a value out of its range or an unknown word, naming the key.
    """

    engine: str = "native"  # or img2dataset: its downloader in place of ours (no address guard, no robots.txt)
    timeout: float = 20.0  # seconds for one attempt: names, TLS, redirects and body; waiting for a turn not counted
    concurrency: int = 256  # requests in flight per worker
    per_domain: int = 6  # requests in flight per registered domain (example.co.uk), of all workers together
    rate: float = 50.0  # requests started per second and registered domain, of all workers together; 0: any number
    max_bytes: int = 32_000_000  # of one body, after decompression
    max_redirects: int = 5
    retries: int = 2  # attempts after the first, for transient reasons
    user_agent: str = "tastemaker/0.1.0 (dataset curation; robots.txt token: tastemaker)"
    respect: tuple[str, ...] = ("x-robots-tag", "robots-txt", "tdm-reservation")  # opt-out signals that are honoured
    verify: str | None = None  # a column of the list: md5, sha256 or sha512 of the original bytes, in hex
    deny: tuple[str, ...] = ()  # files of URLs, domains and hashes that are never fetched, decoded or stored
    allow: tuple[str, ...] = ()  # private "network:port" pairs that may be contacted, such as 127.0.0.0/8:8123

    def __post_init__(self) -> None:
        for key in ("respect", "allow", "deny"):
            value = getattr(self, key)
            if isinstance(value, str):
                raise UserError(f"fetch.{key}: {value!r} must be a list")
            object.__setattr__(self, key, tuple(value))
        if self.engine not in ENGINES:
            raise UserError(f"fetch.engine: {self.engine!r} is not one of {', '.join(ENGINES)}")
        for least, keys in (1, ("concurrency", "per_domain", "max_bytes")), (0, ("rate", "max_redirects", "retries")):
            for key in keys:
                if not getattr(self, key) >= least:
                    raise UserError(f"fetch.{key}: {getattr(self, key)} must be at least {least}")
        if not self.timeout > 0:
            raise UserError(f"fetch.timeout: {self.timeout} must be more than 0 seconds")
        if not self.user_agent.isascii() or not self.user_agent.isprintable() or not self.user_agent.strip():
            raise UserError(f"fetch.user_agent: {self.user_agent!r} must be printable ASCII and not empty")
        for signal in self.respect:
            if signal not in optouts.SIGNALS:
                raise UserError(f"fetch.respect: {signal!r} is not one of {', '.join(optouts.SIGNALS)}")
        if self.engine == "img2dataset" and (self.verify or self.deny):
            raise UserError("fetch.verify and fetch.deny need fetch.engine=native: img2dataset knows neither")
        addresses.parse_allow(self.allow)


@dataclass(frozen=True)
class Body:
    """What a server gave for a URL."""

    data: bytes
    final_url: str  # after redirects
    http_status: int  # 200 or 203
    opt_out: str | None = None  # opt-out headers that were seen on the way and are not in `respect`


# --------------------------------------------------------------------------------------------------------- fetching


@dataclass(frozen=True)
class _Answer:
    url: URL
    status: int
    headers: CIMultiDictProxy[str]
    data: bytes
    seen: dict[str, str]  # opt-out headers, of this hop and those before
    hold: Hold  # the memory of `data`; to be released
    seconds: float  # it took


@dataclass(frozen=True)
class _Errand:
    """What differs between fetching an image and fetching robots.txt."""

    max_bytes: int
    cut: bool  # a longer body is cut there, not refused
    signals: frozenset[str]  # opt-outs that are looked at


T = TypeVar("T")


class Loan:
    """A body in use, for `async with`. While much is held, nothing new is asked for, so a web that is faster than the
    decoders does not fill the memory."""

    def __init__(self, fetcher: Fetcher, url: str) -> None:
        self._fetcher, self._url = fetcher, url
        self._answer: _Answer

    async def __aenter__(self) -> Body:
        self._answer = answer = await self._fetcher.borrow(self._url)
        return Body(answer.data, str(answer.url), answer.status, _words(answer.seen))

    async def __aexit__(self, *_: object) -> None:
        self._fetcher.give_back(self._answer)


class Fetcher:
    """Fetches URLs on one event loop. Any number of `get` may wait at once: rows that wait for a busy domain hold
    none of the `concurrency` places.

    Args:
        config: the limits.
        lookup: resolves host names in place of the system; what it answers is checked all the same.
        lease: asks the budget of requests per domain, where it is shared with others; by default this fetcher's own.
        deny: URLs and domains that are not asked for, also where a redirect leads there.

    Raises:
        UserError: this process may not open as many files as there are requests.
    """

    def __init__(
        self,
        config: FetchConfig,
        *,
        lookup: addresses.Lookup | None = None,
        lease: domains.LeaseSlots | None = None,
        deny: Deny | None = None,
    ) -> None:
        self._config = config
        self._allow = addresses.parse_allow(config.allow)
        self._turns = domains.Turns(
            config.concurrency,
            config.per_domain,
            config.rate,
            lease or domains.local(domains.Budget(config.per_domain)),
        )
        self._memory = Memory(max(MEMORY, config.max_bytes))
        self._resolver = addresses.GuardedResolver(self._allow, config.timeout, lookup)
        self._robots = optouts.Robots(self._read_robots)
        self._tdmrep = optouts.TdmRep(self._read_tdmrep)
        self._deny = deny or Deny.load(())
        self._image = _Errand(config.max_bytes, False, frozenset(config.respect))
        self._rules = _Errand(optouts.ROBOTS_MAX_BYTES, True, frozenset())
        self._keep_for = _keep_for(config.concurrency)
        self._opened: aiohttp.ClientSession | None = None
        self._bodies = 0  # that wait for a decoder or are with one
        self._width = config.concurrency  # requests at a time, as long as bodies are used as fast as they come
        self._late = 0  # requests under way beside these

    async def get(self, url: str) -> Body:
        """Fetch one URL.

        Raises:
            RowError: why there is no body; `final_url` and `http_status` are set where a server answered.
        """
        async with self.body(url) as body:
            return body

    def body(self, url: str) -> Loan:
        """As `get`, for `async with`: the body counts as held until the block ends."""
        return Loan(self, url)

    async def borrow(self, url: str) -> _Answer:
        """See Loan."""
        try:
            parsed = addresses.parse_url(url, self._allow)
            answer = await self._persist(lambda: self._follow(parsed, self._image))
        except BaseException:
            self._pace()
            raise
        self._bodies += 1
        return answer

    def give_back(self, answer: _Answer) -> None:
        """See Loan."""
        self._bodies -= 1
        answer.hold.release()
        self._pace()

    def _pace(self) -> None:
        """Ask no faster than bodies are used: with fewer requests at a time, more of them find an open connection, and
        bodies are still in the processor's cache when they are decoded."""
        if self._bodies > _AHEAD:
            by = -1 if self._width > _AHEAD else 0
        else:
            by = min(2, self._config.concurrency - self._width - self._late) if self._bodies < _AHEAD // 4 else 0
        if by:
            self._width += by
            self._turns.widen(by)

    def _step_aside(self, turn: domains.Turn) -> None:
        """Leave the place of a request that takes long to another: few places are soon full of such."""
        if self._width + self._late < self._config.concurrency:
            self._late += 1
            self._turns.widen(1)
            turn.aside = True

    async def return_slots(self) -> None:
        """Give back what the budget lent and no row needs now."""
        await self._turns.give_back()

    async def close(self) -> None:
        """Drop all connections. Rows still under way end with an error; wait for them first."""
        await self._robots.close()
        await self._tdmrep.close()
        await self._turns.close()
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
                    socket_factory=addresses.guarded_socket(self._allow),
                    limit=0,  # turns and places are counted here
                    keepalive_timeout=self._keep_for,
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
        """Try, and try again for transient reasons: soon after, and the last time in a second pass."""
        retries = self._config.retries
        for n in range(retries + 1):
            try:
                return await attempt()
            except addresses.FinalError:
                raise
            except RowError as e:
                if not e.reason.transient or n == retries:
                    raise
            if n < retries - 1:
                await asyncio.sleep(_BACKOFF * 2**n * random.uniform(0.5, 1.5))
            else:
                await asyncio.sleep(SECOND_PASS * random.uniform(1.0, 1.5))
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _follow(self, url: URL, errand: _Errand) -> _Answer:
        """One attempt: the URL and its redirects, each hop checked like the first.

        Names are looked up before a row waits for its turn, so that no place is spent on waiting for a name server.
        """
        left = self._config.timeout
        seen: dict[str, str] = {}
        answer: _Answer | None = None
        try:
            for _ in range(self._config.max_redirects + 1):
                self._deny.url(url)
                if "robots-txt" in errand.signals:
                    await self._robots.check(url)
                if "tdmrep-json" in errand.signals:
                    await self._tdmrep.check(url)
                left -= await self._resolver.ahead(url.raw_host or "")
                async with self._turns.turn(domains.registered_domain(url.raw_host or "")) as turn:
                    await self._memory.room()
                    answer = await self._exchange(url, left, errand, seen, turn)
                left -= answer.seconds
                if answer.status not in _FOLLOWED:
                    return answer
                answer.hold.release()
                location = answer.headers.get("Location")
                if not location:
                    raise RowError(Reason.PROTOCOL, f"{answer.status} without a Location")
                url = addresses.parse_url(location, self._allow, base=url)
            raise RowError(Reason.TOO_MANY_REDIRECTS, f"more than {self._config.max_redirects}")
        except RowError as e:
            e.opt_out = _words(seen)
            if answer is not None and e.http_status is None:  # what led there
                e.final_url, e.http_status = str(answer.url), answer.status
                e.detail = f"redirect: {e.detail}"
            raise

    async def _exchange(
        self, url: URL, seconds: float, errand: _Errand, seen: dict[str, str], turn: domains.Turn
    ) -> _Answer:
        """One request and its answer, and what it says about the domain."""
        status, retry_after = None, None
        hold = self._memory.hold()
        late = asyncio.get_running_loop().call_later(_LATE, self._step_aside, turn)
        try:
            try:
                async with asyncio.timeout(seconds) as limit, self._session.get(url, allow_redirects=False) as response:
                    status = response.status
                    retry_after = _retry_after(response.headers.get("Retry-After"))
                    seen |= optouts.read_headers(response.headers)
                    room = _Room(hold, errand.max_bytes + 1, limit, seconds)
                    data = await _read(response, errand, seen, room)
                    turn.answered()
                    return _Answer(url, status, response.headers, data, seen, hold, seconds - _left(limit))
            except (aiohttp.ClientError, HttpProcessingError, OSError) as e:  # TimeoutError is an OSError
                raise _as_row_error(e) from e
        except RowError as e:
            hold.release()
            if status is not None:
                e.final_url, e.http_status = str(url), status
            if e.reason in _OF_THE_DOMAIN or status == 503:
                turn.failed(e)
            elif status is not None:
                turn.answered()
            self._keep_away(e, retry_after, turn)
            raise
        except BaseException:
            hold.release()
            raise
        finally:
            late.cancel()
            if turn.aside:
                self._late -= 1
                self._turns.widen(-1)

    def _keep_away(self, error: RowError, retry_after: float | None, turn: domains.Turn) -> None:
        """What a 429 or 5xx asks for. Raises FinalError where that is to wait for too long."""
        if error.reason is Reason.HTTP_429 and retry_after is None:
            retry_after = _PAUSE
        if retry_after is None or error.reason not in (Reason.HTTP_429, Reason.HTTP_5XX):
            return
        if retry_after <= _PATIENCE:
            turn.rest(retry_after)
            return
        final = addresses.FinalError(
            error.reason,
            f"{error.detail}; asked to wait {retry_after:.0f} s",
            final_url=error.final_url,
            http_status=error.http_status,
        )
        turn.give_up(final, min(retry_after, _LONGEST_BAN))
        raise final from error

    async def _read_rules(self, url: URL) -> bytes:
        answer = await self._persist(lambda: self._follow(url, self._rules))
        answer.hold.release()
        return answer.data

    async def _read_tdmrep(self, url: URL) -> bytes | None:
        """The bytes of a tdmrep.json, None where there is none."""
        try:
            return await self._read_rules(url)
        except RowError as e:
            if 300 <= (e.http_status or 0) < 500:
                return None
            raise

    async def _read_robots(self, url: URL) -> bytes | None:
        """The bytes of a robots.txt, None where there is none; see optouts.Robots for what the errors mean."""
        try:
            return await self._read_rules(url)
        except RowError as e:
            status = e.http_status or 0
            unavailable = 300 <= status < 500 and status != 429  # which asks for less, not for more
            if e.reason is Reason.DENIED or (e.reason not in _UNREACHABLE and unavailable):
                return None  # RFC 9309 section 2.3.1.3, also after too many redirects
            detail = f"{url}: {e.detail}"
            if e.reason is Reason.HTTP_5XX:
                detail += ", which means: keep out"  # section 2.3.1.4; but only for now
            raise addresses.FinalError(e.reason, detail) from e


@functools.cache
def _tls() -> ssl.SSLContext:
    """One for all: building it reads every root certificate, some 50 ms."""
    context = ssl.create_default_context()
    context.hostname_checks_common_name = False  # nobody else takes it for a name any more (RFC 9525)
    return context


class _Room:
    """Memory and time for the body of an answer. While it waits for memory, its time stands still."""

    def __init__(self, hold: Hold, most: int, limit: asyncio.Timeout, seconds: float) -> None:
        self._hold, self._most, self._limit, self._seconds = hold, most, limit, seconds

    def elapsed(self) -> float:
        return self._seconds - _left(self._limit)

    async def grow(self, size: int) -> None:
        """Have room for so many bytes, if there is to be more than there is."""
        if size <= self._hold.size:
            return
        size = min(max(size, 2 * self._hold.size, _STEP), self._most)
        if self._hold.grow_now(size):
            return
        left = _left(self._limit)
        self._limit.reschedule(None)
        await self._hold.grow(size)
        self._limit.reschedule(time.monotonic() + left)


def _left(limit: asyncio.Timeout) -> float:
    return (limit.when() or 0.0) - time.monotonic()


async def _read(response: aiohttp.ClientResponse, errand: _Errand, seen: Mapping[str, str], room: _Room) -> bytes:
    """The body of an answer that has one to give, b"" for a redirect; RowError for all other answers."""
    status = response.status
    if status not in _FOLLOWED and status not in (200, 203):
        raise RowError(_REASONS.get(status) or _REASONS.get(status // 100) or Reason.PROTOCOL, f"status {status}")
    for signal, says in seen.items():
        if signal in errand.signals:
            raise RowError(Reason.OPTED_OUT, f"{signal}: {says}")
    if status in _FOLLOWED:
        return b""
    limit, declared = errand.max_bytes, response.content_length
    if declared is not None and declared > limit and not errand.cut:
        raise RowError(Reason.TOO_LARGE, f"{declared} bytes declared, more than {limit}")
    encoding = _coding(response.headers)
    inflate = _Inflate(encoding) if encoding else None
    pieces: list[bytes] = []
    received = size = 0
    began = room.elapsed()  # an answer may be long in coming; then it must come
    async for chunk in response.content.iter_any():
        received += len(chunk)
        while chunk:
            if inflate is None:
                piece, chunk = chunk, b""
            else:  # in a thread, and little by little: a few bytes can be a great many
                await room.grow(min(size + _PIECE, limit))
                piece, chunk = await asyncio.to_thread(inflate, chunk)
            size += len(piece)
            if size > limit:
                if errand.cut:
                    return b"".join([*pieces, piece])[:limit]
                raise RowError(Reason.TOO_LARGE, f"more than {limit} bytes")
            await room.grow(size)  # as it comes: a length that is only promised takes nothing from others
            pieces.append(piece)
        if received > limit and not errand.cut:
            raise RowError(Reason.TOO_LARGE, f"more than {limit} bytes")
        if (elapsed := room.elapsed() - began) > _SLOW_AFTER and received < _SLOW * elapsed:
            raise RowError(Reason.TIMEOUT, f"{received} bytes in {elapsed:.0f} s")
    if inflate is not None and not inflate.complete:
        raise RowError(Reason.PROTOCOL, f"{encoding} body cut short")
    return b"".join(pieces)


def _words(seen: Mapping[str, str]) -> str | None:
    return "; ".join(f"{signal}: {says}" for signal, says in seen.items()) or None


_REASONS = {404: Reason.HTTP_404, 429: Reason.HTTP_429, 4: Reason.HTTP_4XX, 5: Reason.HTTP_5XX}


_CODINGS = {  # IANA's HTTP Content Coding Registry, but for identity
    *("aes128gcm", "br", "compress", "x-compress", "dcb", "dcz", "deflate", "exi", "gzip", "x-gzip", "pack200-gzip"),
    "zstd",
}


def _coding(headers: CIMultiDictProxy[str]) -> str:
    """How the body is encoded: gzip, x-gzip or deflate; "" where it is not, be it that the header names no coding.

    `none`, `UTF-8` and `binary` stand there on the web: browsers take such a body as it is.
    """
    named = [c.strip().lower() for c in ",".join(headers.getall("Content-Encoding", ())).split(",")]
    codings = [c for c in named if c in _CODINGS]
    if not codings:
        return ""
    if codings not in (["gzip"], ["x-gzip"], ["deflate"]):
        raise addresses.FinalError(Reason.PROTOCOL, f"Content-Encoding {', '.join(codings)[:40]!r} was not asked for")
    return codings[0]


class _Inflate:
    """Decompresses a body that came compressed although we asked for none, never much at a time."""

    def __init__(self, encoding: str) -> None:
        self._stream = zlib.decompressobj(31) if encoding != "deflate" else None

    def __call__(self, chunk: bytes) -> tuple[bytes, bytes]:
        """(some bytes, what is left of the chunk)."""
        if self._stream is None:  # "deflate" is zlib's format by the book and bare deflate by custom
            self._stream = zlib.decompressobj(15 if chunk[0] & 0x0F == 8 else -15)
        try:
            piece = self._stream.decompress(chunk, _PIECE)
        except zlib.error as e:
            raise RowError(Reason.PROTOCOL, f"broken compression: {e}") from e
        return piece, self._stream.unconsumed_tail

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


def _keep_for(concurrency: int) -> float:
    """Seconds for which unused connections are kept: `domains.WARM`, or less where so many files can't be open at once.

    A list of many domains soon fills the 1,024 that most systems begin with. Most allow more to who asks for it.
    """
    busy = concurrency + _FILES
    wanted = busy + int(_KEPT_PER_SECOND * domains.WARM)
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return domains.WARM
    more = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    if files < more:
        with contextlib.suppress(ValueError, OSError):  # macOS says "any number", and may refuse this one
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, most))
            files = more
    if files <= busy:
        raise UserError(
            f"fetch.concurrency: {concurrency} requests at a time need {busy} open files, "
            f"and this process may have {files}: raise `ulimit -n` or lower fetch.concurrency"
        )
    return min(domains.WARM, (files - busy) / _KEPT_PER_SECOND)


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
    if isinstance(error, aiohttp.ServerDisconnectedError) and not isinstance(error.message, str):
        return RowError(Reason.PROTOCOL, "the head was cut short")
    if isinstance(error, aiohttp.InvalidURL):
        return RowError(Reason.BAD_URL, detail)
    if isinstance(error, (OSError, aiohttp.ClientConnectionError)):
        return RowError(Reason.CONNECT, detail)
    return RowError(Reason.PROTOCOL, detail)  # bad status line or header, lengths that lie, broken chunks
