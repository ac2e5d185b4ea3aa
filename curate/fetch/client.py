"""URLs to bytes: politely, within limits, and with a named reason for every one that fails.

    fetcher = Fetcher(FetchConfig())
    body = await fetcher.get("https://...")         # Body, or RowError with a reason from the closed list
    await fetcher.close()

What holds for every request, also those for robots.txt and for each hop of a redirect: the address was checked and the
connection goes to the checked address (`addresses`, `dns`), one registered domain gets so many requests at a time and a
second (`budget`, `domains`), and there are `concurrency` in all; no cookies, no proxy from the environment, no
credentials. No answer can take longer than `timeout` or hold more than `max_bytes`, counted after decompression; all
bodies in memory share `MEMORY` bytes.
"""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import contextlib
import errno
import functools
import json
import random
import resource
import ssl
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from aesthetic.errors import UserError
from curate.estimate.spent import count
from curate.fetch import addresses, budget, domains, optouts
from curate.fetch.body import REDIRECTS, BodyLimits, Memory, Reservation, read_body
from curate.fetch.config import FetchConfig
from curate.fetch.deny import Deny
from curate.fetch.dns import GuardedResolver, Lookup
from curate.ledger.schema import FinalError, Reason, RowError

MEMORY = 128_000_000
"""Bytes of bodies, arriving or waiting for a decoder, that a fetcher holds; one may go `max_bytes` beyond."""

SECOND_PASS = 5.0
"""Seconds, or up to half as many more, before the last attempt: what is down for a moment is up again by then."""

_BACKOFF = 0.5  # seconds before an attempt that is not the last, on average; doubles with each one
_OF_THE_DOMAIN = {Reason.CONNECT, Reason.TLS, Reason.TIMEOUT, Reason.HTTP_429}  # and 503; others are one URL's affair
_NO_HEAD = {400, 403, 405, 406, 501}  # what servers answer that know no HEAD, or want none
_UNREACHABLE = {Reason.BLOCKED_ADDRESS, Reason.DNS, Reason.CONNECT, Reason.TLS, Reason.TIMEOUT}
_LONGEST_WAIT = 30.0  # seconds of Retry-After that are waited for; beyond, the row is left to `tastemaker retry`
_PAUSE = 1.0  # seconds that a domain is left alone after a 429 that names no time
_LONGEST_BAN = 3600.0  # seconds for which a Retry-After keeps us away from a domain
_READ = 65_536  # bytes of a connection's buffers; aiohttp and asyncio have 256 kB, several times for each connection
_FILES = 512  # open ones that are no requests under way: others, and to spare
_KEPT_PER_SECOND = 4000  # connections: twice the answers that come, as aiohttp keeps some for twice the time


@dataclass(frozen=True)
class Body:
    """What a server gave for a URL."""

    data: bytes
    final_url: str  # after redirects
    http_status: int  # 200 or 203
    opt_out: str | None = None  # opt-out signals that were seen on the way and are not in `respect`
    redirects: str | None = None  # as the ledger's column has it


@dataclass(frozen=True)
class _HttpAnswer:
    url: URL
    status: int
    location: str | None
    data: bytes
    memory: Reservation  # of `data`; to be released
    seconds: float  # it took
    hops: tuple[str, ...] = ()  # every URL that was asked for, this one last


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
        lookup: Lookup | None = None,
        lease: budget.LeaseSlots | None = None,
        deny: Deny | None = None,
    ) -> None:
        self._config = config
        self._allow = addresses.parse_allow(config.allow)
        lease = lease or budget.local(budget.Budget(config.per_domain))
        self._permits = domains.Permits(config.concurrency, config.per_domain, config.rate, lease)
        self._memory = Memory(max(MEMORY, config.max_bytes))
        self._resolver = GuardedResolver(self._allow, config.timeout, lookup)
        self._robots = optouts.Robots(self._read_robots)
        self._tdmrep = optouts.TdmRep(self._read_tdmrep)
        self._deny = deny or Deny.load(())
        self._image_limits = BodyLimits(config.max_bytes, truncate=False, respect=frozenset(config.respect))
        self._header_limits = replace(self._image_limits, method="HEAD", headers_only=True)
        self._rules_limits = BodyLimits(optouts.ROBOTS_MAX_BYTES, truncate=True, respect=frozenset())
        self._keepalive = _seconds_kept_open(config.concurrency)
        self._opened: aiohttp.ClientSession | None = None

    async def get(self, url: str) -> Body:
        """Fetch one URL.

        Raises:
            RowError: why there is no body; `final_url` and `http_status` are set where a server answered.
        """
        async with self.body(url) as body:
            return body

    @contextlib.asynccontextmanager
    async def body(self, url: str, look: Callable[[bytes], bool] | None = None) -> AsyncIterator[Body]:
        """As `get`, for `async with`: the body counts as held until the block ends. `look` is as `BodyLimits` has it.

        While half of the memory is held, nothing new is asked for: a web that is faster than the decoders doesn't fill
        it.
        """
        opt_outs: dict[str, str] = {}
        parsed = addresses.parse_url(url, self._allow)
        answer = await self._get_with_retries(parsed, replace(self._image_limits, look=look), opt_outs)
        try:
            yield Body(answer.data, str(answer.url), answer.status, opt_outs_text(opt_outs), _chain(answer.hops))
        finally:
            answer.memory.release()

    async def check(self, url: str) -> Body:
        """As `get`, but for what is said of a URL alone: a body without bytes, from HEAD requests, or where a server
        refuses those from a GET of one byte. What the file says of itself is not seen."""
        opt_outs: dict[str, str] = {}
        parsed = addresses.parse_url(url, self._allow)
        answer = await self._get_with_retries(parsed, self._header_limits, opt_outs)
        answer.memory.release()
        return Body(b"", str(answer.url), answer.status, opt_outs_text(opt_outs), _chain(answer.hops))

    async def return_slots(self) -> None:
        """Give back what the budget leased and no row needs now."""
        await self._permits.return_slots()

    async def close(self) -> None:
        """Drop all connections. Rows still under way end with an error; wait for them first."""
        await self._robots.close()
        await self._tdmrep.close()
        await self._permits.close()
        if self._opened is not None:
            await self._opened.close()
        await self._resolver.close()

    # ------------------------------------------------------------------------------------------------- one URL

    async def _get_with_retries(self, url: URL, limits: BodyLimits, opt_outs: dict[str, str]) -> _HttpAnswer:
        """Try, and try again for transient reasons: soon after, and the last time in a second pass."""
        retries = self._config.retries
        for n in range(retries):
            try:
                return await self._get_once(url, limits, opt_outs)
            except RowError as e:
                if isinstance(e, FinalError) or not e.reason.transient:
                    raise
            if n < retries - 1:
                await asyncio.sleep(_BACKOFF * 2**n * random.uniform(0.5, 1.5))
            else:
                await asyncio.sleep(SECOND_PASS * random.uniform(1.0, 1.5))
        return await self._get_once(url, limits, opt_outs)

    async def _get_once(self, url: URL, limits: BodyLimits, opt_outs: dict[str, str]) -> _HttpAnswer:
        """One attempt: the URL and its redirects, each hop checked like the first.

        Names are looked up before a row waits for its permit, so that no place is spent on waiting for a name server.
        """
        seconds = self._config.timeout
        opt_outs.clear()
        answer: _HttpAnswer | None = None
        hops: list[str] = []
        try:
            for _ in range(self._config.max_redirects + 1):
                self._deny.check_url(url)
                hops.append(str(url))
                await self._check_files(url, limits.respect, opt_outs)
                host = url.raw_host or ""
                seconds -= await self._resolver.look_up(host)
                try:
                    answer = await self._permitted(url, seconds, limits, opt_outs)
                except RowError as e:
                    if limits.method != "HEAD" or e.http_status not in _NO_HEAD or e.reason is Reason.OPTED_OUT:
                        raise
                    answer = await self._permitted(url, seconds, replace(limits, method="GET"), opt_outs)
                seconds -= answer.seconds
                if answer.status not in REDIRECTS:
                    return replace(answer, hops=tuple(hops))
                answer.memory.release()
                if not answer.location:
                    raise RowError(Reason.PROTOCOL, f"{answer.status} without a Location")
                url = addresses.parse_url(answer.location, self._allow, base=url)
            raise RowError(Reason.TOO_MANY_REDIRECTS, f"more than {self._config.max_redirects}")
        except RowError as e:
            e.opt_out, e.redirects = opt_outs_text(opt_outs), _chain(hops)
            if answer is not None and e.http_status is None:  # what led there
                e.final_url, e.http_status = str(answer.url), answer.status
                e.detail = f"redirect: {e.detail}"
            raise

    async def _permitted(self, url: URL, seconds: float, limits: BodyLimits, opt_outs: dict[str, str]) -> _HttpAnswer:
        """One request, once its domain has a place for it."""
        async with self._permits.permit(budget.registered_domain(url.raw_host or "")) as permit:
            await self._memory.half_free.wait()
            return await self._request(url, seconds, limits, opt_outs, permit)

    async def _check_files(self, url: URL, respect: Collection[str], opt_outs: dict[str, str]) -> None:
        """Ask the files of the URL's origin; RowError where one that is respected refuses it.

        A robots.txt that can't be read keeps out only who respects its Disallow.
        """
        if "robots-txt" in respect:
            with _noted(opt_outs, "robots-txt", "disallow"):
                await self._robots.check(url)
        if "robots-txt" in respect or "content-usage" in respect:
            refused = False
            with contextlib.suppress(RowError):
                refused = await self._robots.refuse_usage(url)
            if refused:
                opt_outs["content-usage"] = "train-ai=n in robots.txt"
                if "content-usage" in respect:
                    detail = f"content-usage: robots.txt of {url.origin()} says train-ai=n of it"
                    raise FinalError(Reason.OPTED_OUT, detail)
        if "tdmrep-json" in respect:
            with _noted(opt_outs, "tdmrep-json", "1"):
                await self._tdmrep.check(url)

    async def _request(
        self, url: URL, seconds: float, limits: BodyLimits, opt_outs: dict[str, str], permit: domains.Permit
    ) -> _HttpAnswer:
        """One request and its answer, and what it says about the domain."""
        status, retry_after, response = None, None, None
        memory = Reservation(self._memory)
        began = time.monotonic()
        try:
            try:
                only = {"Range": "bytes=0-0"} if limits.headers_only and limits.method == "GET" else None
                request = self._session.request(limits.method, url, allow_redirects=False, headers=only)
                async with asyncio.timeout(seconds) as clock, request as response:
                    status = response.status
                    retry_after = _retry_after(response.headers.get("Retry-After"))
                    opt_outs |= optouts.read_headers(response.headers)
                    data = await read_body(response, limits, opt_outs, memory, clock)
                    permit.answered()
                    took = seconds - ((clock.when() or 0.0) - asyncio.get_running_loop().time())
                    return _HttpAnswer(url, status, response.headers.get("Location"), data, memory, took)
            except (aiohttp.ClientError, HttpProcessingError, OSError) as e:  # TimeoutError is an OSError
                raise _as_row_error(e) from e
        except RowError as e:
            memory.release()
            if status is not None:
                e.final_url, e.http_status = str(url), status
            if e.reason in _OF_THE_DOMAIN or status == 503:
                permit.failed(e)
            elif status is not None:
                permit.answered()
            if retry_after is None and e.reason is Reason.HTTP_429:
                retry_after = _PAUSE
            if retry_after is None or e.reason not in (Reason.HTTP_429, Reason.HTTP_5XX):
                raise
            if retry_after <= _LONGEST_WAIT:
                permit.back_off(retry_after)
                raise
            detail = f"{e.detail}; asked to wait {retry_after:.0f} s"
            final = FinalError(e.reason, detail, final_url=e.final_url, http_status=e.http_status)
            permit.fail_fast(final, min(retry_after, _LONGEST_BAN))
            raise final from e
        except BaseException:
            memory.release()
            raise
        finally:
            received = 0 if response is None else response.content.total_bytes
            seconds = time.monotonic() - began
            count(requests=1, rules=float(limits.truncate), received=received, in_flight=seconds)

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None:  # not in __init__: aiohttp wants a running loop
            self._opened = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    ssl=_tls(),
                    resolver=self._resolver,
                    use_dns_cache=False,  # the resolver has one that checks
                    socket_factory=addresses.guarded_socket(self._allow),
                    limit=0,  # permits bound them
                    keepalive_timeout=self._keepalive,
                ),
                headers={
                    "User-Agent": self._config.user_agent,
                    "Accept": "image/*,*/*;q=0.5",
                    "Accept-Encoding": "identity",
                },
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # _request has the only clock
                auto_decompress=False,
                trust_env=False,
                max_field_size=16_384,  # bytes of one header field
                read_bufsize=_READ,
            )
        return self._opened

    # ----------------------------------------------------------------------------------------- files of an origin

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
            if e.reason in (Reason.DENIED, Reason.REMOVED) or (e.reason not in _UNREACHABLE and unavailable):
                return None  # RFC 9309 section 2.3.1.3, also after too many redirects
            detail = f"{url}: {e.detail}"
            if e.reason is Reason.HTTP_5XX:
                detail += ", which means: keep out"  # section 2.3.1.4; but only for now
            raise FinalError(e.reason, detail) from e

    async def _read_rules(self, url: URL) -> bytes:
        answer = await self._get_with_retries(url, self._rules_limits, {})
        answer.memory.release()
        return answer.data


def opt_outs_text(opt_outs: Mapping[str, str]) -> str | None:
    """Signals and the words that said them, as the column `opt_out` has it; None where there are none."""
    return "; ".join(f"{signal}: {directive}" for signal, directive in opt_outs.items()) or None


@contextlib.contextmanager
def _noted(opt_outs: dict[str, str], signal: str, word: str) -> Iterator[None]:
    """Around what may raise `opted_out`: then the signal was seen."""
    try:
        yield
    except RowError as e:
        if e.reason is Reason.OPTED_OUT:
            opt_outs[signal] = word
        raise


def _chain(hops: Sequence[str]) -> str | None:
    return json.dumps(hops, ensure_ascii=False) if len(hops) > 1 else None


@functools.cache
def _tls() -> ssl.SSLContext:
    """One for all: building it reads every root certificate, some 50 ms.

    Also sets the buffer that asyncio allocates for each TLS connection, in use or kept open; no argument reaches it.
    """
    asyncio.sslproto.SSLProtocol.max_size = _READ
    context = ssl.create_default_context()
    context.hostname_checks_common_name = False  # nobody else takes it for a name any more (RFC 9525)
    return context


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


def _seconds_kept_open(concurrency: int) -> float:
    """For how long unused connections are kept: `domains.WARM`, or less where so many files can't be open at once.

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
