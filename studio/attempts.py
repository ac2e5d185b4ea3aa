"""Tokens that are wrong are looked at slowly, the right one at once: who has shown it is not held up by who guesses."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

EACH, EACH_AT_ONCE = 5.0, 10
"""Guesses a second of one address, after so many at once."""
ALL, ALL_AT_ONCE = 25.0, 50
"""The same of all addresses together; the first FREE of an address do not count, so that a newcomer waits for none."""
FREE = 3
LONGEST = 10.0  # seconds that a guess waits to be looked at
MOST_ADDRESSES = 10_000


class LeakyBucket:
    """Places in time for things that come at `rate` a second, after the first `at_once` (a leaky bucket)."""

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
        """The place taken last was none of a guess."""
        self._next -= self._interval

    def idle(self, now: float) -> bool:
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
        pace, count = self._each.pop(address, (LeakyBucket(EACH, EACH_AT_ONCE), 0))
        if pace.idle(now):
            count = 0
        paces = [pace] if count < FREE else [pace, self._all]
        wait = max(p.wait(now) for p in paces)
        if wait <= LONGEST:
            for p in paces:
                p.take(now)
            count += 1
        self._each[address] = pace, count
        _bound(self._each)
        return wait if wait <= LONGEST else None

    def right(self, address: str, taken: bool) -> None:
        """The right token came; `taken`: after a place was taken for it."""
        self._known.pop(address, None)
        self._known[address] = None
        _bound(self._known)
        if taken and address in self._each:
            self._each[address][0].give_back()


def _bound(addresses: OrderedDict[str, Any]) -> None:
    while len(addresses) > MOST_ADDRESSES:
        addresses.popitem(last=False)
