"""Names to addresses: what a name resolves to is checked, and the connection goes to exactly the checked addresses.

So a second, different answer of the name server changes nothing.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from aiohttp.abc import AbstractResolver, ResolveResult

from curate.fetch.addresses import ENDS_IN_A_NUMBER, Allowed, check_address
from curate.fetch.cache import CoalescingCache
from curate.ledger.schema import FinalError, Reason, RowError

Lookup = Callable[[str], Awaitable[list[str]]]
"""A host name to its addresses as text; raises socket.gaierror where there are none."""

_THREADS = 64  # look-ups at once; a stalled name server holds a thread for up to half a minute
_KEPT = 300.0  # seconds; getaddrinfo does not tell a record's own time to live
_KEPT_NO_NAME = 60.0
_KEPT_FAILURE = 5.0
_NAMES = 100_000  # names kept
_NO_SUCH_NAME = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", None), getattr(socket, "EAI_ADDRFAMILY", None)}


class GuardedResolver(AbstractResolver):
    """Names to addresses for aiohttp, which then connects to exactly what this returns.

    A host is refused when any one of its addresses may not be contacted. Answers are kept and look-ups shared, 64 of
    them at a time; every answer is checked again each time it is used, for the port at hand.

    Args:
        allow: private addresses that may be contacted.
        timeout: seconds for one look-up, not counting its wait for others.
        lookup: what is asked in place of the system.

    Raises (from `resolve` and `look_up`):
        RowError: dns (a `FinalError` where the name does not exist) or blocked_address.
    """

    def __init__(self, allow: tuple[Allowed, ...], timeout: float, lookup: Lookup | None = None) -> None:
        self._allow, self._timeout = allow, timeout
        self._places = asyncio.Semaphore(_THREADS)
        self._threads = ThreadPoolExecutor(_THREADS, "dns")
        self._lookup = lookup
        self._cache = CoalescingCache(self._addresses, _seconds_kept, _NAMES)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        addresses, _ = await self._cache.get(host)
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

    async def look_up(self, host: str) -> float:
        """Have a name's addresses at hand. Returns the seconds of a look-up that this call waited for, 0 for most."""
        if ":" in host or ENDS_IN_A_NUMBER.search(host):
            return 0.0
        began = time.monotonic()
        _, seconds = await self._cache.get(host)
        return min(time.monotonic() - began, seconds)

    async def close(self) -> None:
        """Stop what is under way."""
        await self._cache.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _addresses(self, host: str) -> tuple[list[str], float]:
        """A name's addresses, and the seconds that finding them took."""
        try:
            async with self._places:
                began = time.monotonic()
                async with asyncio.timeout(self._timeout):
                    if self._lookup is not None:
                        addresses = await self._lookup(host)
                    else:
                        ask = partial(socket.getaddrinfo, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
                        found = await asyncio.get_running_loop().run_in_executor(self._threads, ask, host, None)
                        addresses = [str(address[0]) for *_, address in found]
        except TimeoutError:
            raise RowError(Reason.DNS, f"{host}: no answer within {self._timeout:g} s") from None
        except socket.gaierror as e:
            kind = FinalError if e.errno in _NO_SUCH_NAME else RowError
            raise kind(Reason.DNS, f"{host}: {e.strerror or e}") from e
        except UnicodeError as e:  # the system's own IDNA encoder, on a label that it finds odd
            raise FinalError(Reason.DNS, f"{host}: {e}") from e
        if not addresses:
            raise FinalError(Reason.DNS, f"{host}: no address")
        return addresses, time.monotonic() - began


def _seconds_kept(outcome: tuple[list[str], float] | RowError) -> float:
    if isinstance(outcome, FinalError):
        return _KEPT_NO_NAME
    return _KEPT_FAILURE if isinstance(outcome, RowError) else _KEPT
