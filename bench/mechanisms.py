"""The fetcher's mechanisms, each switched off from outside: no option of the product does it."""

from __future__ import annotations

from typing import Any

from curate.fetch import cache, dns

OFF = ("cache", "coalescing", "ahead")
"""Kept DNS answers; one look-up for all who ask for a name at once; looking up before a request takes its place."""


def switch_off(name: str) -> None:
    """In this process, make curate do without a mechanism; "" switches off none."""
    if name == "cache":
        dns._KEPT = 0.0
    elif name == "coalescing":
        begin = dns.GuardedResolver.__init__

        def init(self: dns.GuardedResolver, *more: Any, **named: Any) -> None:
            begin(self, *more, **named)
            self._cache.__class__ = _Each

        dns.GuardedResolver.__init__ = init  # type: ignore[method-assign]
    elif name == "ahead":
        assert hasattr(dns.GuardedResolver, "look_up"), "the look-ahead has another name now"

        async def nothing(self: dns.GuardedResolver, host: str) -> float:
            return 0.0

        dns.GuardedResolver.look_up = nothing  # type: ignore[method-assign]
    elif name:
        raise ValueError(f"{name!r} is not one of {', '.join(OFF)}")


class _Each(cache.CoalescingCache[Any]):
    """Everybody looks up for himself, unless an answer is kept."""

    async def get(self, key: str) -> Any:
        self._running.pop(key, None)
        return await super().get(key)

    async def _run(self, key: str) -> Any:
        try:
            return await super()._run(key)
        except KeyError:  # another one for the same key was done first
            return self._kept[key][1]
