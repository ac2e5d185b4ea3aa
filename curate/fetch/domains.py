"""What one web site can be asked: so many requests at a time, so many a second, whoever asks.

    Budget     lends slots: rights to have one request under way at a registered domain. Plain and synchronous; one per
               process by default, one for all workers of a cluster in an actor.
    Turns      a worker's rows, waiting by domain for a slot and for one of the worker's places.

A slot rests `per_domain / rate` seconds from the start of one request to the next. So a domain never has more than
`per_domain` requests at one time, nor more than `per_domain + rate x t` in any t seconds, however many workers there
are; and without a message per request, because a worker keeps a slot while it has rows for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache

from publicsuffixlist import PublicSuffixList

from curate.fetch.addresses import FinalError
from curate.ledger.schema import RowError

LEASE = 15.0
"""Seconds after which the slots of a worker that is not heard of are lent to others."""

_POLL = 0.1  # seconds between two questions of a worker that waits for slots
WARM = 5.0
"""Seconds that an unused connection is kept (each one is a file descriptor); domains with one come first."""

_KEPT = 10_000  # domains remembered for their failures
STRIKES = 10
"""Failures in a row, with no answer between, after which a domain is left alone for `REST`; then one request tries."""
REST = 20.0
"""Seconds, give or take a quarter."""
_GIVEN_UP = 600.0  # seconds for which a domain is left alone when that one request fails too


@cache
def _suffixes() -> PublicSuffixList:
    return PublicSuffixList()


@lru_cache(100_000)
def registered_domain(host: str) -> str:
    """Whom a host belongs to: the public suffix (publicsuffix.org, private section too) and one label more.

    An address, or a name that is a suffix itself, belongs to itself.
    """
    if ":" in host or host.rpartition(".")[2].isdigit():
        return host
    return _suffixes().privatesuffix(host.rstrip(".")) or host


# ----------------------------------------------------------------------------------------------------------- the lender


@dataclass
class LeaseRequest:
    """What a worker tells the budget. Times are seconds from now, so that clocks need not agree."""

    wanted: dict[str, int] = field(default_factory=dict)  # domain -> slots, in place of what was wanted before
    returned: list[tuple[str, float]] = field(default_factory=list)  # domain, until the slot may be used again
    resting: dict[str, float] = field(default_factory=dict)  # domain -> for how long it asked to be left alone


@dataclass
class LeaseReply:
    """What the budget answers."""

    granted: list[tuple[str, float]] = field(default_factory=list)  # domain, until the slot may be used
    called: list[str] = field(default_factory=list)  # give one slot of each back: somebody waits
    resting: dict[str, float] = field(default_factory=dict)


LeaseSlots = Callable[[LeaseRequest], Awaitable[LeaseReply]]


@dataclass
class _Lent:
    free: list[float]  # from when each free slot may be used
    holders: Counter[str] = field(default_factory=Counter)
    wanted: dict[str, int] = field(default_factory=dict)
    rests_until: float = 0.0


class Budget:
    """Lends the slots of every domain to workers.

    Args:
        per_domain: slots of a domain.
        clock: seconds.
    """

    def __init__(self, per_domain: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_domain, self._clock = per_domain, clock
        self._domains: dict[str, _Lent] = {}
        self._heard: dict[str, float] = {}
        self._called: dict[str, set[str]] = {}
        self._wants: dict[str, set[str]] = {}  # worker -> domains
        self._told: dict[str, dict[str, float]] = {}  # worker -> domain -> rests until; not told yet

    def lease(self, worker: str, message: LeaseRequest) -> LeaseReply:
        """Take back, note and lend. Whoever holds or wants slots must come again within `LEASE`."""
        now = self._clock()
        self._heard[worker] = now
        for other in [w for w, heard in self._heard.items() if heard < now - LEASE]:
            self._forget(other, now)
        for domain, wait in message.returned:
            self._take_back(worker, domain, now + wait)
        for domain, seconds in message.resting.items():
            self._rest(worker, domain, now + seconds)
        wants = self._wants.setdefault(worker, set())
        for domain, count in message.wanted.items():
            if count:
                self._lent(domain, now).wanted[worker] = count
                wants.add(domain)
            else:
                wants.discard(domain)
                if domain in self._domains:
                    self._domains[domain].wanted.pop(worker, None)
        reply = LeaseReply()
        for domain in list(wants):
            self._lend(worker, domain, now, reply)
        reply.called = sorted(self._called.pop(worker, ()))
        for domain, until in self._told.pop(worker, {}).items():
            reply.resting[domain] = until - now
        for domain in [*message.wanted, *(d for d, _ in message.returned)]:
            self._tidy(domain, now)
        return reply

    def _lent(self, domain: str, now: float) -> _Lent:
        if domain not in self._domains:
            self._domains[domain] = _Lent([now] * self._per_domain)
        return self._domains[domain]

    def _lend(self, worker: str, domain: str, now: float, reply: LeaseReply) -> None:
        lent = self._domains[domain]
        share = -(-self._per_domain // len({*lent.holders, *lent.wanted}))
        count = min(lent.wanted[worker], len(lent.free), max(0, share - lent.holders.get(worker, 0)))
        if count:
            lent.free.sort(reverse=True)
            lent.holders[worker] += count
            reply.granted += [(domain, max(0.0, lent.free.pop() - now)) for _ in range(count)]
            if lent.rests_until > now:
                reply.resting[domain] = lent.rests_until - now
            lent.wanted[worker] -= count
            if not lent.wanted[worker]:
                del lent.wanted[worker]
                self._wants[worker].discard(domain)
        elif worker not in lent.holders and not lent.free:  # have the one who holds the most share
            most, _ = lent.holders.most_common(1)[0]
            self._called.setdefault(most, set()).add(domain)

    def _take_back(self, worker: str, domain: str, usable: float) -> None:
        lent = self._domains.get(domain)
        if lent is None or not lent.holders.get(worker):
            return  # lent to others meanwhile: the worker was not heard of for too long
        lent.holders[worker] -= 1
        if not lent.holders[worker]:
            del lent.holders[worker]
        lent.free.append(usable)

    def _rest(self, worker: str, domain: str, until: float) -> None:
        lent = self._lent(domain, self._clock())
        lent.rests_until = max(lent.rests_until, until)
        for other in {*lent.holders, *lent.wanted} - {worker}:
            self._told.setdefault(other, {})[domain] = lent.rests_until

    def _forget(self, worker: str, now: float) -> None:
        del self._heard[worker]
        self._called.pop(worker, None)
        self._wants.pop(worker, None)
        self._told.pop(worker, None)
        for domain, lent in list(self._domains.items()):
            lent.wanted.pop(worker, None)
            while worker in lent.holders:
                self._take_back(worker, domain, now)
            self._tidy(domain, now)

    def _tidy(self, domain: str, now: float) -> None:
        lent = self._domains.get(domain)
        if lent and not lent.holders and not lent.wanted and max(*lent.free, lent.rests_until) <= now:
            del self._domains[domain]


def local(budget: Budget) -> LeaseSlots:
    """A budget of this process as a worker asks it."""
    worker = random.randbytes(8).hex()

    async def lease(message: LeaseRequest) -> LeaseReply:
        return budget.lease(worker, message)

    return lease


# --------------------------------------------------------------------------------------------------- a worker's side


@dataclass
class _Site:
    """A domain as one worker sees it. Times are the event loop's."""

    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)
    idle: list[float] = field(default_factory=list)  # from when each slot at hand may be used
    busy: int = 0  # slots in use
    asked: int = 0  # slots wanted and not granted yet
    called: int = 0  # slots to give back when they are free
    ready: bool = False  # waits for a place
    leaving: bool = False  # its slots will be given back soon, unless a row comes
    timer: asyncio.TimerHandle | None = None
    warm_until: float = 0.0
    rests_until: float = 0.0
    limit: int = 1  # requests at a time; doubled by each answer up to the slots there are, and 1 after each failure
    strikes: int = 0
    trial: bool = False  # it rests for its failures, or the one request that comes after is under way
    given_up: RowError | None = None
    given_up_until: float = 0.0


class Turn:
    """A request's time at a domain; what comes of it decides about the next ones.

    `async with turns.turn(domain) as turn` waits for a slot of the domain and a place, and holds them for the block. It
    raises FinalError while the domain is given up, and what asking the budget raised.
    """

    def __init__(self, turns: Turns, domain: str) -> None:
        self._turns, self._domain = turns, domain
        self._site: _Site
        self.started = 0.0
        self.aside = False  # it takes long, and another has its place

    async def __aenter__(self) -> Turn:
        self._site = await self._turns.wait(self._domain)
        self.started = self._turns.now()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._turns.done(self._domain, self._site, self.started)

    def answered(self) -> None:
        """The domain gave an answer that counts as one, be it a refusal."""
        self._turns.answered(self._site)

    def failed(self, error: RowError) -> None:
        """The domain failed in a way that may pass: it is left alone after `STRIKES` of these in a row."""
        site, now = self._site, self._turns.now()
        site.strikes += 1
        site.limit = 1
        if site.trial and self.started >= site.rests_until:
            self._turns.give_up(self._domain, error, _GIVEN_UP)
        elif site.strikes >= STRIKES and not site.trial:
            site.trial = True
            site.rests_until = max(site.rests_until, now + REST * random.uniform(0.75, 1.25))

    def rest(self, seconds: float) -> None:
        """Nobody asks the domain for so long; other workers are told."""
        self._turns.rest(self._domain, seconds)

    def give_up(self, error: RowError, seconds: float) -> None:
        """Rows of the domain end with this error for so long."""
        self._turns.give_up(self._domain, error, seconds)


class Turns:
    """The rows of one worker in line: by domain for slots, and all for places.

    The place of a request goes to the next row of the same domain, and a domain whose connection is open comes before
    one that was not asked yet, and that before a second connection to another: so connections are used again. Rows
    that wait hold nothing. A domain that has not answered yet, or has just failed, gets one request at a time: so those
    that never answer take few places.

    Args:
        places: requests under way at one time.
        per_domain: slots that a domain has.
        rate: requests a second that may start at a domain; 0: any number.
        lease: asks the budget.
    """

    def __init__(self, places: int, per_domain: int, rate: float, lease: LeaseSlots) -> None:
        self._places, self._per_domain, self._lease = places, per_domain, lease
        self._interval = per_domain / rate if rate else 0.0
        self._sites: dict[str, _Site] = {}
        self._full = _KEPT  # domains from which on some are forgotten
        self._ready: deque[str] = deque()  # domains that wait for a place
        self._more: deque[str] = deque()  # those among them that have a request under way already
        self._unmet: set[str] = set()  # domains that wait for slots
        self._message = LeaseRequest()
        self._news = asyncio.Event()
        self._trading: asyncio.Task[None] | None = None
        self._broken: Exception | None = None
        self._closing = False
        self._telling: list[asyncio.Future[None]] = []  # who waits until the budget has the message

    now = staticmethod(time.monotonic)  # the event loop's clock

    def turn(self, domain: str) -> Turn:
        """A turn at the domain, to be waited for."""
        return Turn(self, domain)

    async def wait(self, domain: str) -> _Site:
        """See Turn."""
        if self._trading is None:
            self._trading = asyncio.create_task(self._trade())
        site = self._sites.get(domain)
        if site is None:
            self._forget_failures()
            site = self._sites[domain] = _Site()
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        site.waiting.append(ticket)
        self._serve(domain, site)
        try:
            await ticket
        except asyncio.CancelledError:
            if ticket.done() and not ticket.cancelled() and ticket.exception() is None:
                self.done(domain, site, self.now())
            raise
        return site

    def widen(self, by: int) -> None:
        """More places, or, with a negative number, fewer, as they become free."""
        self._places += by
        self._serve_ready()

    def answered(self, site: _Site) -> None:
        """See Turn.answered."""
        site.strikes, site.trial = 0, False
        site.limit = min(2 * site.limit, self._per_domain)

    def rest(self, domain: str, seconds: float) -> None:
        """See Turn.rest."""
        self._rest_here(domain, seconds)
        self._message.resting[domain] = max(seconds, self._message.resting.get(domain, 0.0))
        self._news.set()

    def give_up(self, domain: str, error: RowError, seconds: float) -> None:
        """See Turn.give_up."""
        site = self._sites[domain]
        site.given_up = error.with_traceback(None)
        site.given_up_until = self.now() + seconds
        site.strikes, site.trial = 0, False
        self._serve(domain, site)

    async def give_back(self) -> None:
        """Give all slots back that no row waits for, and wait until they are: who asks may be ended after this."""
        if self._trading is None or self._trading.done():
            return
        for domain, site in self._sites.items():
            if not site.waiting:
                self._return(domain, site)
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._telling.append(told)
        self._news.set()
        await told

    async def close(self) -> None:
        """Give all slots back and ask no more."""
        await self.give_back()
        self._closing = True
        self._news.set()
        if self._trading is not None:
            await self._trading  # not cancelled: what is on its way here would be lost

    def _rest_here(self, domain: str, seconds: float) -> None:
        site = self._sites.get(domain)
        if site is not None:
            site.rests_until = max(site.rests_until, self.now() + seconds)

    def _serve(self, domain: str, site: _Site) -> None:
        """Let rows of a domain go ahead, as many as may."""
        now = self.now()
        while site.waiting and site.waiting[0].done():  # cancelled
            site.waiting.popleft()
        if self._broken is not None or (site.given_up is not None and now < site.given_up_until):
            self._end_waiting(site)
        if not site.waiting:
            if not site.leaving:
                site.leaving = True
                asyncio.get_running_loop().call_later(WARM / 10, self._leave, domain, site)
            self._ask(domain, site, 0)
            return
        site.idle.sort(reverse=True)
        usable = sum(t <= now for t in site.idle)
        wanted = min(len(site.waiting), site.limit - site.busy) - usable
        self._ask(domain, site, min(wanted, self._per_domain - site.busy - len(site.idle)))
        open_at = site.rests_until if site.rests_until > now else 0.0
        while site.waiting and site.idle and max(site.idle[-1], open_at) <= now and site.busy < site.limit:
            if self._places <= 0:
                if not site.ready:
                    site.ready = True
                    if site.busy:
                        self._more.append(domain)
                    elif site.warm_until > now:
                        self._ready.appendleft(domain)
                    else:
                        self._ready.append(domain)
                return
            ticket = site.waiting.popleft()
            if not ticket.done():
                site.idle.pop()
                site.busy += 1
                self._places -= 1
                ticket.set_result(None)
        if site.waiting and site.idle and site.busy < site.limit:
            if site.timer is not None:
                site.timer.cancel()
            at = max(site.idle[-1], open_at)
            site.timer = asyncio.get_running_loop().call_at(at, self._serve, domain, site)

    def done(self, domain: str, site: _Site, started: float) -> None:
        """A turn that began then is over."""
        now = self.now()
        site.busy -= 1
        self._places += 1
        site.warm_until = now + WARM
        site.idle.append(started + self._interval)
        if site.called:
            site.called -= 1
            self._return(domain, site, 1)
        self._serve(domain, site)  # the same domain first: its connection is open
        self._serve_ready()

    def _serve_ready(self) -> None:
        while self._places > 0 and (self._ready or self._more):
            domain = (self._ready or self._more).popleft()
            site = self._sites[domain]
            site.ready = False
            self._serve(domain, site)

    def _end_waiting(self, site: _Site) -> None:
        for ticket in site.waiting:
            if not ticket.done():
                error = self._broken or FinalError(site.given_up.reason, site.given_up.detail)  # type: ignore[union-attr]
                ticket.set_exception(error)
        site.waiting.clear()

    def _leave(self, domain: str, site: _Site) -> None:
        """Give a domain's slots back when none of its rows has come for a while."""
        site.leaving = False
        if not site.waiting:
            self._return(domain, site)
            if not site.busy and not site.ready and self._is_forgotten(site) and self._sites.get(domain) is site:
                del self._sites[domain]

    def _is_forgotten(self, site: _Site) -> bool:
        return not site.strikes and not site.trial and max(site.given_up_until, site.rests_until) <= self.now()

    def _forget_failures(self) -> None:
        """Forget domains that nobody waits for, where there are too many."""
        if len(self._sites) >= self._full:
            now = self.now()
            kept = {d: s for d, s in self._sites.items() if s.waiting or s.busy or s.ready or s.given_up_until > now}
            for domain, site in self._sites.items():
                if domain not in kept:
                    self._return(domain, site)
            self._sites = kept
            self._full = max(_KEPT, 2 * len(kept))  # looked through again only when as many more have come

    # ---------------------------------------------------------------------------------------- with the budget

    def _ask(self, domain: str, site: _Site, count: int) -> None:
        count = max(0, count)
        if count != site.asked:
            site.asked = count
            self._message.wanted[domain] = count
            (self._unmet.add if count else self._unmet.discard)(domain)
            self._news.set()

    def _return(self, domain: str, site: _Site, count: int | None = None) -> None:
        """Give idle slots of a domain back: all, or so many."""
        now = self.now()
        for usable in site.idle[:count]:
            self._message.returned.append((domain, max(0.0, usable - now)))
        del site.idle[:count]
        self._news.set()

    async def _trade(self) -> None:
        """Ask the budget whenever there is news, and often enough to keep what it has lent."""
        try:
            while not self._closing:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_POLL if self._unmet else LEASE / 4):
                        await self._news.wait()
                await asyncio.sleep(0)  # whatever else this round of the loop has to say goes along
                self._news.clear()
                for domain in self._unmet:  # again each time: a budget that did not hear of us for long forgets it
                    self._message.wanted[domain] = self._sites[domain].asked
                message, self._message = self._message, LeaseRequest()
                count = len(self._telling)
                self._apply(await self._lease(message))
                self._told(count)
        except Exception as e:  # the budget is gone: an error of ours, which the rows carry to where it ends the run
            self._broken = e
            self._told(len(self._telling))
            for site in self._sites.values():
                self._end_waiting(site)

    def _told(self, count: int) -> None:
        for told in self._telling[:count]:
            if not told.done():
                told.set_result(None)
        del self._telling[:count]

    def _apply(self, reply: LeaseReply) -> None:
        now = self.now()
        for domain, seconds in reply.resting.items():
            self._rest_here(domain, seconds)
        served: dict[str, _Site] = {}
        for domain, wait in reply.granted:
            site = served[domain] = self._sites.setdefault(domain, _Site())
            site.idle.append(now + wait)
            site.asked = max(0, site.asked - 1)
            if not site.asked:
                self._unmet.discard(domain)
            if domain in self._message.wanted:  # written before this was known
                self._message.wanted[domain] = site.asked
        for domain in reply.called:
            held = self._sites.get(domain)
            if held is not None and held.idle:
                self._return(domain, held, 1)
            elif held is not None:
                held.called += 1
        for domain, site in served.items():
            self._serve(domain, site)
