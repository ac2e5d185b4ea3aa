"""What one web site can be asked by all workers together: the lessor of request slots.

A slot is the right to have one request under way at a registered domain. It can be used again `per_domain / rate`
seconds after the start of its last request. So a domain never has more than `per_domain` requests at one time, nor more
than `per_domain + rate x t` in any t seconds, however many workers there are; and without a message per request,
because a worker keeps a slot while it has rows for it.

The budget is plain and synchronous: one per process by default, one for all workers of a cluster in an actor.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache

from publicsuffixlist import PublicSuffixList

LEASE = 15.0
"""Seconds after which the slots of a worker that is not heard of are leased to others."""


@lru_cache(100_000)
def registered_domain(host: str) -> str:
    """Whom a host belongs to: the public suffix (publicsuffix.org, private section too) and one label more.

    An address, or a name that is a suffix itself, belongs to itself.
    """
    if ":" in host or host.rpartition(".")[2].isdigit():
        return host
    return _suffixes().privatesuffix(host.rstrip(".")) or host


@cache
def _suffixes() -> PublicSuffixList:
    return PublicSuffixList()


@dataclass
class LeaseRequest:
    """What a worker tells the budget. Times are seconds from now, so that clocks need not agree."""

    wanted: dict[str, int] = field(default_factory=dict)  # domain -> slots, in place of what was wanted before
    returned: list[tuple[str, float]] = field(default_factory=list)  # domain, until the slot may be used again
    backoff: dict[str, float] = field(default_factory=dict)  # domain -> for how long it asked to be left alone


@dataclass
class LeaseReply:
    """What the budget answers."""

    granted: list[tuple[str, float]] = field(default_factory=list)  # domain, until the slot may be used
    recalled: list[str] = field(default_factory=list)  # give one slot of each back: somebody waits
    backoff: dict[str, float] = field(default_factory=dict)


LeaseSlots = Callable[[LeaseRequest], Awaitable[LeaseReply]]
"""Asks a budget, wherever it is."""


@dataclass
class _DomainSlots:
    free: list[float]  # from when each free slot may be used
    holders: Counter[str] = field(default_factory=Counter)  # worker -> slots
    wanted: dict[str, int] = field(default_factory=dict)
    backoff_until: float = 0.0


@dataclass
class _Worker:
    heard: float = 0.0
    wants: set[str] = field(default_factory=set)  # domains
    recalled: set[str] = field(default_factory=set)  # domains of which it is to give a slot back; not told yet
    backoff: dict[str, float] = field(default_factory=dict)  # domain -> until when; not told yet


class Budget:
    """Leases the slots of every domain to workers.

    Args:
        per_domain: slots of a domain.
        clock: seconds.
    """

    def __init__(self, per_domain: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_domain, self._clock = per_domain, clock
        self._domains: dict[str, _DomainSlots] = {}
        self._workers: dict[str, _Worker] = {}

    def lease(self, name: str, request: LeaseRequest) -> LeaseReply:
        """Take back, note and grant. A worker that holds or wants slots must come again within `LEASE`."""
        now = self._clock()
        worker = self._workers.setdefault(name, _Worker())
        worker.heard = now
        for other in [w for w, facts in self._workers.items() if facts.heard < now - LEASE]:
            del self._workers[other]
            for domain, slots in list(self._domains.items()):
                slots.wanted.pop(other, None)
                while other in slots.holders:
                    self._take_back(other, domain, now)
                self._forget_idle(domain, now)

        for domain, wait in request.returned:
            self._take_back(name, domain, now + wait)
        for domain, seconds in request.backoff.items():
            slots = self._slots(domain, now)
            slots.backoff_until = max(slots.backoff_until, now + seconds)
            for other in {*slots.holders, *slots.wanted} - {name}:
                self._workers[other].backoff[domain] = slots.backoff_until
        for domain, count in request.wanted.items():
            if count:
                self._slots(domain, now).wanted[name] = count
                worker.wants.add(domain)
            else:
                worker.wants.discard(domain)
                if domain in self._domains:
                    self._domains[domain].wanted.pop(name, None)

        reply = LeaseReply()
        for domain in list(worker.wants):
            self._grant(name, domain, now, reply)
        reply.recalled, worker.recalled = sorted(worker.recalled), set()
        reply.backoff |= {domain: until - now for domain, until in worker.backoff.items()}
        worker.backoff = {}
        for domain in [*request.wanted, *(d for d, _ in request.returned)]:
            self._forget_idle(domain, now)
        return reply

    def _slots(self, domain: str, now: float) -> _DomainSlots:
        if domain not in self._domains:
            self._domains[domain] = _DomainSlots([now] * self._per_domain)
        return self._domains[domain]

    def _grant(self, name: str, domain: str, now: float, reply: LeaseReply) -> None:
        """Grant a worker its share of a domain's free slots, or recall one from who holds the most."""
        slots = self._domains[domain]
        share = -(-self._per_domain // len({*slots.holders, *slots.wanted}))
        count = min(slots.wanted[name], len(slots.free), max(0, share - slots.holders.get(name, 0)))
        if count:
            slots.free.sort(reverse=True)
            slots.holders[name] += count
            reply.granted += [(domain, max(0.0, slots.free.pop() - now)) for _ in range(count)]
            if slots.backoff_until > now:
                reply.backoff[domain] = slots.backoff_until - now
            slots.wanted[name] -= count
            if not slots.wanted[name]:
                del slots.wanted[name]
                self._workers[name].wants.discard(domain)
        elif name not in slots.holders and not slots.free:
            most, _ = slots.holders.most_common(1)[0]
            self._workers[most].recalled.add(domain)

    def _take_back(self, name: str, domain: str, usable: float) -> None:
        slots = self._domains.get(domain)
        if slots is None or not slots.holders.get(name):
            return  # leased to others meanwhile: the worker was not heard of for too long
        slots.holders[name] -= 1
        if not slots.holders[name]:
            del slots.holders[name]
        slots.free.append(usable)

    def _forget_idle(self, domain: str, now: float) -> None:
        slots = self._domains.get(domain)
        if slots and not slots.holders and not slots.wanted and max(*slots.free, slots.backoff_until) <= now:
            del self._domains[domain]


def local(budget: Budget) -> LeaseSlots:
    """A budget of this process as a worker asks it."""
    worker = random.randbytes(8).hex()

    async def lease(request: LeaseRequest) -> LeaseReply:
        return budget.lease(worker, request)

    return lease
