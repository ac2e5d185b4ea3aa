"""Answers that do harm (N7, N9-N12): one reason each, in time, in bounded memory, and good rows stay good.

All of them are fetched at the same time, by one fetcher in a process of its own whose memory is watched.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from answers import ANSWERS, MAX_BYTES, path_of
from hostile_web import Hostile, Measured, at_home, good_image, measure

from curate.fetch.client import Fetcher
from curate.fetch.config import FetchConfig
from curate.ledger.schema import Reason, RowError

TIMEOUT = 2.0  # seconds
NEIGHBOURS = 100  # rows of as many hosts that nothing is wrong with
NAMELESS = (Reason.DNS, Reason.TIMEOUT)  # a name server that says nothing may be told by either
ELSEWHERE: dict[
    str, tuple[str, Reason | tuple[Reason, ...]]
] = {  # what is slow before there is an answer; {0} mute, {1} slow_tls, {2} full, {3} the server
    "a TLS handshake that nobody answers": ("https://tls1.test:{0}/", Reason.TIMEOUT),
    "a TLS handshake by the byte": ("https://tls2.test:{1}/", Reason.TIMEOUT),
    "a TLS handshake answered in HTTP": ("https://tls3.test:{3}/good", Reason.TIMEOUT),
    "a name server that never answers": ("http://a.stall.test:{3}/good", NAMELESS),
    "the same for another name": ("http://b.stall.test:{3}/good", NAMELESS),
    "a connection that is never accepted": ("http://full.test:{2}/", Reason.TIMEOUT),
    "a connection that is never answered": ("http://mute.test:{0}/", Reason.TIMEOUT),
    "no such name": ("http://nobody.invalid:{3}/good", Reason.DNS),
}


@dataclass(frozen=True)
class FetchResult:
    """One row: its reason (None: a body of `size` bytes), and how long that took."""

    reason: Reason | None
    detail: str
    size: int
    seconds: float
    status: int | None


async def fetch_all(fetcher: Fetcher, urls: dict[str, str]) -> dict[str, FetchResult]:
    """All rows at once."""

    async def one(url: str) -> FetchResult:
        start = time.monotonic()
        try:
            async with fetcher.body(url) as body:
                return FetchResult(None, "", len(body.data), time.monotonic() - start, body.http_status)
        except RowError as e:
            return FetchResult(e.reason, e.detail, 0, time.monotonic() - start, e.http_status)

    ended = await asyncio.gather(*(one(url) for url in urls.values()))
    return dict(zip(urls, ended, strict=True))


def fetch_hostile(
    ready: Callable[[], None], urls: dict[str, str], warm: list[str], config: dict
) -> dict[str, FetchResult]:
    """The watched process: warms up, then fetches all."""

    async def main() -> dict[str, FetchResult]:
        fetcher = Fetcher(FetchConfig(**config), lookup=at_home)
        first = await fetch_all(fetcher, {url: url for url in warm})
        assert {e.reason for e in first.values()} == {None}, first
        ready()
        try:
            return await fetch_all(fetcher, urls)
        finally:
            await fetcher.close()

    return asyncio.run(main())


@pytest.fixture(scope="module")
def server() -> Iterator[Hostile]:
    with Hostile("answers") as server:
        yield server


@pytest.fixture(scope="module")
def measured(server: Hostile) -> Measured:
    """Everything at once, each row at a host of its own."""
    urls = {
        name: f"http://{number}.answers{number}.test:{server.port}{path_of(name)}"
        for number, name in enumerate(ANSWERS)
    }
    ports = (server.mute, server.slow_tls, server.full, server.port)
    urls |= {name: url.format(*ports) for name, (url, _) in ELSEWHERE.items()}
    urls |= {f"good {n}": f"http://good{n}.test:{server.port}/good" for n in range(NEIGHBOURS)}
    warm = [f"http://warm{n}.test:{server.port}/good" for n in range(50)]
    config = {"timeout": TIMEOUT, "retries": 0, "max_bytes": MAX_BYTES, "allow": server.allow, "respect": ()}
    return measure(fetch_hostile, urls, warm, config)


@pytest.mark.parametrize("name", ANSWERS)
def test_each_answer_has_one_reason_in_time(measured: Measured, name: str) -> None:
    ended = measured.result[name]
    assert ended.reason is ANSWERS[name].reason, ended
    assert ended.seconds < TIMEOUT + 1
    assert len(ended.detail) < 400 and ended.detail.isprintable()
    if ended.reason is Reason.TIMEOUT:
        assert ended.seconds > TIMEOUT - 0.1


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_never_gets_to_an_answer(measured: Measured, name: str) -> None:
    ended = measured.result[name]
    reasons = ELSEWHERE[name][1]
    assert ended.reason in (reasons if isinstance(reasons, tuple) else (reasons,)), ended
    assert ended.seconds < TIMEOUT + 1


def test_neighbours_are_unharmed_and_memory_is_bounded(measured: Measured) -> None:
    for number in range(NEIGHBOURS):
        ended = measured.result[f"good {number}"]
        assert (ended.reason, ended.size, ended.status) == (None, len(good_image()), 200), ended
    print(f"{measured.growth / 1e6:.0f} MB above the baseline, {measured.seconds:.1f} s")
    assert measured.growth < 512e6
    assert measured.seconds < TIMEOUT + 2
