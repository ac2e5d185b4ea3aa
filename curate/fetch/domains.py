"""When a worker's next request may start: its rows in line, by domain for slots of the budget, and all for places.

A domain's circuit breaker stands here too. After `MAX_FAILURES` in a row it opens: nobody asks the domain for
`OPEN_SECONDS`. Then it is half open, and one request tries: an answer closes it; after another failure its rows
end at once, for `FAIL_FAST_SECONDS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from curate.fetch.budget import LEASE, LeaseReply, LeaseRequest, LeaseSlots
from curate.ledger.schema import FinalError, RowError

WARM = 5.0
"""Seconds that an unused connection is kept (each one is a file descriptor)."""

MAX_FAILURES = 10
OPEN_SECONDS = 20.0  # give or take a quarter
FAIL_FAST_SECONDS = 600.0

_POLL = 0.1  # seconds between two questions of a worker that waits for slots
_REMEMBERED = 10_000  # domains remembered for their failures


@dataclass
class _DomainState:
    """A domain as one worker sees it. Times are the event loop's."""

    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)
    idle: list[float] = field(default_factory=list)  # from when each slot at hand may be used
    busy: int = 0  # slots in use
    asked: int = 0  # slots wanted and not granted yet
    recalled: int = 0  # slots to give back when they are free
    queued: bool = False  # waits for a place
    leaving: bool = False  # its slots will be given back soon, unless a row comes
    timer: asyncio.TimerHandle | None = None
    backoff_until: float = 0.0
    limit: int = 1  # requests at a time; doubled by each answer up to the slots there are, and 1 after each failure
    failures: int = 0  # in a row
    half_open: bool = False  # it backs off for its failures, or the one request that comes after is under way
    fail_with: RowError | None = None  # rows end with it, until `fail_until`
    fail_until: float = 0.0


@dataclass
class Permit:
    """The right to have one request under way at a domain; what comes of it decides about the next ones."""

    permits: Permits
    domain: str
    state: _DomainState
    started: float

    def answered(self) -> None:
        """The domain gave an answer that counts as one, be it a refusal."""
        state = self.state
        state.failures, state.half_open = 0, False
        state.limit = min(2 * state.limit, self.permits.per_domain)

    def failed(self, error: RowError) -> None:
        """The domain failed in a transient way: its breaker opens after `MAX_FAILURES` of these in a row."""
        state = self.state
        state.failures += 1
        state.limit = 1
        if state.half_open and self.started >= state.backoff_until:
            self.fail_fast(error, FAIL_FAST_SECONDS)
        elif state.failures >= MAX_FAILURES and not state.half_open:
            state.half_open = True
            until = time.monotonic() + OPEN_SECONDS * random.uniform(0.75, 1.25)
            state.backoff_until = max(state.backoff_until, until)

    def fail_fast(self, error: RowError, seconds: float) -> None:
        """Rows of the domain end with this error for so long."""
        state = self.state
        state.fail_with, state.fail_until = error.with_traceback(None), time.monotonic() + seconds
        state.failures, state.half_open = 0, False
        self.permits.start_rows(self.domain, state)

    def back_off(self, seconds: float) -> None:
        """Nobody asks the domain for so long; other workers are told."""
        self.permits.back_off(self.domain, seconds)


class Permits:
    """The rows of one worker in line.

    The place of a request goes to the next row of the same domain: so connections are used again. Rows that wait hold
    nothing. A domain that has not answered yet, or has just failed, gets one request at a time: so those that never
    answer take few places.

    Args:
        places: requests under way at one time.
        per_domain: slots that a domain has.
        rate: requests a second that may start at a domain; 0: any number.
        lease: asks the budget.
    """

    def __init__(self, places: int, per_domain: int, rate: float, lease: LeaseSlots) -> None:
        self._places, self.per_domain, self._lease = places, per_domain, lease  # places: those that are free
        self._interval = per_domain / rate if rate else 0.0
        self._states: dict[str, _DomainState] = {}
        self._full = _REMEMBERED  # domains from which on some are forgotten
        self._queue: deque[str] = deque()  # domains that wait for a place
        self._unmet: set[str] = set()  # domains that wait for slots
        self._request = LeaseRequest()  # not sent yet
        self._news = asyncio.Event()
        self._sending = asyncio.Lock()
        self._syncing: asyncio.Task[None] | None = None
        self._broken: Exception | None = None
        self._closing = False

    @contextlib.asynccontextmanager
    async def permit(self, domain: str) -> AsyncIterator[Permit]:
        """Wait for a slot of the domain and a place, and hold them for the block.

        Raises FinalError while the domain's breaker fails fast, and what asking the budget raised.
        """
        if self._syncing is None:
            self._syncing = asyncio.create_task(self._keep_in_sync())
        state = self._states.get(domain)
        if state is None:
            if len(self._states) >= self._full:  # domains that nobody waits for are forgotten
                now = time.monotonic()
                kept = {d: s for d, s in self._states.items() if s.waiting or s.busy or s.queued or s.fail_until > now}
                for forgotten in self._states.keys() - kept.keys():
                    self._return(forgotten, self._states[forgotten])
                self._states = kept
                self._full = max(_REMEMBERED, 2 * len(kept))  # looked through again only when as many more have come
            state = self._states[domain] = _DomainState()
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        state.waiting.append(ticket)
        self.start_rows(domain, state)
        try:
            await ticket
        except asyncio.CancelledError:
            if ticket.done() and not ticket.cancelled() and ticket.exception() is None:
                self._release(domain, state, time.monotonic())
            raise

        permit = Permit(self, domain, state, time.monotonic())
        try:
            yield permit
        finally:
            self._release(domain, state, permit.started)

    def _release(self, domain: str, state: _DomainState, started: float) -> None:
        """A request that started then is over."""
        self._places += 1
        state.busy -= 1
        state.idle.append(started + self._interval)
        if state.recalled:
            state.recalled -= 1
            self._return(domain, state, 1)
        self.start_rows(domain, state)  # the same domain first: its connection is open
        while self._places and self._queue:
            queued = self._queue.popleft()
            self._states[queued].queued = False
            self.start_rows(queued, self._states[queued])

    def back_off(self, domain: str, seconds: float) -> None:
        """See Permit.back_off."""
        state = self._states[domain]
        state.backoff_until = max(state.backoff_until, time.monotonic() + seconds)
        self._request.backoff[domain] = max(seconds, self._request.backoff.get(domain, 0.0))
        self._news.set()

    def start_rows(self, domain: str, state: _DomainState) -> None:
        """Let waiting rows of a domain go ahead, as many as may, and ask for the slots that are missing."""
        now, loop = time.monotonic(), asyncio.get_running_loop()
        while state.waiting and state.waiting[0].done():  # cancelled
            state.waiting.popleft()
        if self._broken is not None or (state.fail_with is not None and now < state.fail_until):
            self._end_waiting(state)
        if not state.waiting:
            if not state.leaving:
                state.leaving = True
                loop.call_later(WARM / 10, self._leave, domain, state)
            self._want(domain, state, 0)
            return

        state.idle.sort(reverse=True)
        usable = sum(t <= now for t in state.idle)
        wanted = min(len(state.waiting), state.limit - state.busy) - usable
        self._want(domain, state, min(wanted, self.per_domain - state.busy - len(state.idle)))

        while state.waiting and state.idle and state.busy < state.limit:
            if (at := max(state.idle[-1], state.backoff_until)) > now:
                if state.timer is not None:
                    state.timer.cancel()
                state.timer = loop.call_at(at, self.start_rows, domain, state)
                return
            if not self._places:
                if not state.queued:
                    state.queued = True
                    self._queue.append(domain)
                return
            ticket = state.waiting.popleft()
            if not ticket.done():
                state.idle.pop()
                state.busy += 1
                self._places -= 1
                ticket.set_result(None)

    def _end_waiting(self, state: _DomainState) -> None:
        for ticket in state.waiting:
            if not ticket.done():
                error = self._broken or FinalError(state.fail_with.reason, state.fail_with.detail)  # type: ignore[union-attr]
                ticket.set_exception(error)
        state.waiting.clear()

    def _leave(self, domain: str, state: _DomainState) -> None:
        """Give a domain's slots back when none of its rows has come for a while."""
        state.leaving = False
        if state.waiting:
            return
        self._return(domain, state)
        remembered = state.failures or state.half_open or max(state.fail_until, state.backoff_until) > time.monotonic()
        if not remembered and not state.busy and not state.queued and self._states.get(domain) is state:
            del self._states[domain]

    # ---------------------------------------------------------------------------------------- with the budget

    async def return_slots(self) -> None:
        """Give all slots back that no row waits for, and wait until they are: who asks may be ended after this."""
        if self._syncing is None or self._broken is not None:
            return
        for domain, state in self._states.items():
            if not state.waiting:
                self._return(domain, state)
        await asyncio.shield(asyncio.create_task(self._sync()))  # what is on its way here must not be lost

    async def close(self) -> None:
        """Give all slots back and ask no more."""
        await self.return_slots()
        self._closing = True
        self._news.set()
        if self._syncing is not None:
            await self._syncing

    def _want(self, domain: str, state: _DomainState, count: int) -> None:
        count = max(0, count)
        if count != state.asked:
            state.asked = count
            self._request.wanted[domain] = count
            (self._unmet.add if count else self._unmet.discard)(domain)
            self._news.set()

    def _return(self, domain: str, state: _DomainState, count: int | None = None) -> None:
        """Give idle slots of a domain back: all, or so many."""
        now = time.monotonic()
        self._request.returned += [(domain, max(0.0, usable - now)) for usable in state.idle[:count]]
        del state.idle[:count]
        self._news.set()

    async def _keep_in_sync(self) -> None:
        """Ask the budget whenever there is news, and often enough to keep what it has leased."""
        while not self._closing and self._broken is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL if self._unmet else LEASE / 4):
                    await self._news.wait()
            await asyncio.sleep(0)  # whatever else this round of the loop has to say goes along
            self._news.clear()
            await self._sync()

    async def _sync(self) -> None:
        async with self._sending:
            for domain in self._unmet:  # again each time: a budget that did not hear of us for long forgets it
                self._request.wanted[domain] = self._states[domain].asked
            request, self._request = self._request, LeaseRequest()
            try:
                self._apply(await self._lease(request))
            except Exception as e:  # the budget is gone: an error of ours, which rows carry to where it ends the run
                self._broken = e
                for state in self._states.values():
                    self._end_waiting(state)

    def _apply(self, reply: LeaseReply) -> None:
        now = time.monotonic()
        for domain, seconds in reply.backoff.items():
            if (known := self._states.get(domain)) is not None:
                known.backoff_until = max(known.backoff_until, now + seconds)
        granted: dict[str, _DomainState] = {}
        for domain, wait in reply.granted:
            state = granted[domain] = self._states.setdefault(domain, _DomainState())
            state.idle.append(now + wait)
            state.asked = max(0, state.asked - 1)
            if not state.asked:
                self._unmet.discard(domain)
            if domain in self._request.wanted:  # written before this was known
                self._request.wanted[domain] = state.asked
        for domain in reply.recalled:
            if (known := self._states.get(domain)) is not None:
                if known.idle:
                    self._return(domain, known, 1)
                else:
                    known.recalled += 1
        for domain, state in granted.items():
            self.start_rows(domain, state)
