"""Servers in trouble (N11, N13, N15): how often they are asked, who waits for them, and what comes back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import hostile_web
import pytest
from fetched import fetch_list, write_list
from hostile_web import Hostile, at_home, endless, head, hosts, measure, whole
from test_answers import FetchResult, fetch_all

from curate.fetch.client import Fetcher
from curate.fetch.config import FetchConfig
from curate.ledger.schema import Reason, RowError

ROWS = 20  # of one host
RETRIES = FetchConfig().retries


def in_seconds(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


REFUSALS = {  # what every URL of a host answers, and its reason
    "429": (whole(b"", status="429 X"), Reason.HTTP_429),
    "503": (whole(b"", status="503 X"), Reason.HTTP_5XX),
    "429, wait 0 s": (whole(b"", "Retry-After: 0", status="429 X"), Reason.HTTP_429),
    "429, wait 1 s": (whole(b"", "Retry-After: 1", status="429 X"), Reason.HTTP_429),
    "503, wait 1 s": (whole(b"", "Retry-After: 1", status="503 X"), Reason.HTTP_5XX),
    "429, until a date": (whole(b"", f"Retry-After: {in_seconds(3600)}", status="429 X"), Reason.HTTP_429),
    "429, until 2015": (whole(b"", "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT", status="429 X"), Reason.HTTP_429),
    "503, 10^9 s": (whole(b"", "Retry-After: 1000000000", status="503 X"), Reason.HTTP_5XX),
    "429, 10^400 s": (whole(b"", "Retry-After: 1" + "0" * 400, status="429 X"), Reason.HTTP_429),
    "429, -5 s": (whole(b"", "Retry-After: -5", status="429 X"), Reason.HTTP_429),
    "503, soon": (whole(b"", "Retry-After: soon", status="503 X"), Reason.HTTP_5XX),
    "429, twice": (whole(b"", "Retry-After: 1", "Retry-After: 99999", status="429 X"), Reason.HTTP_429),
    "hangs up": (b"", Reason.CONNECT),
    "speaks nonsense": (b"HELLO\r\n\r\n", Reason.PROTOCOL),
}
KEEPS_OUT = ("429, until a date", "503, 10^9 s", "429, 10^400 s")
hostile_web.PAGES.update({f"/refusal-{n}": page for n, (page, _) in enumerate(REFUSALS.values())})
hostile_web.PAGES["/drip"] = endless(head("Content-Length: 100000"), b"x", pause=1.0)


@pytest.fixture(scope="module")
def server() -> Iterator[Hostile]:
    with Hostile("test_outages", hosts=320, delay=0.05) as server:
        yield server


# ------------------------------------------------------------------------------------------------------ refusals (N13)


@pytest.fixture(scope="module")
def refused(server: Hostile) -> tuple[dict[str, FetchResult], dict[str, int]]:
    """Every kind of refusal at once, each by a host of its own with so many rows; and how often each was asked."""
    urls = {
        f"{name} {row}": f"http://refuses{n}.test:{server.port}/refusal-{n}?{row}"
        for n, name in enumerate(REFUSALS)
        for row in range(ROWS)
    }

    async def main() -> dict[str, FetchResult]:
        fetcher = Fetcher(FetchConfig(allow=server.allow, timeout=5), lookup=at_home)
        try:
            return await fetch_all(fetcher, urls)
        finally:
            await fetcher.close()

    server.forget()
    ended = asyncio.run(main())
    counts = server.counts()
    return ended, {name: counts.of(f"refuses{n}.test") for n, name in enumerate(REFUSALS)}


@pytest.mark.long
@pytest.mark.parametrize("name", REFUSALS)
def test_a_host_that_refuses_is_asked_a_bounded_number_of_times(
    refused: tuple[dict[str, FetchResult], dict[str, int]], name: str
) -> None:
    ended, asked = refused
    assert {ended[f"{name} {row}"].reason for row in range(ROWS)} == {REFUSALS[name][1]}
    print(f"{name}: asked {asked[name]} times for {ROWS} rows")
    if name in KEEPS_OUT:  # robots.txt, and those that were under way when the host said for how long
        assert asked[name] <= 8
    else:
        assert asked[name] <= 1 + ROWS * (1 + RETRIES) * 2


@pytest.mark.long
def test_a_host_that_fails_every_other_time_gives_all_in_the_end(server: Hostile) -> None:
    """Half of the answers are refusals, of whatever URL: with two retries seven of eight rows come through."""
    turn = 0

    async def main() -> Counter[str]:
        nonlocal turn

        async def flaps(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal turn
            asked = await reader.readuntil(b"\r\n\r\n")
            if asked.startswith(b"GET /robots.txt "):
                writer.write(whole(b"", "Connection: close", status="404 X"))
            else:
                turn += 1
                good = turn * 2654435761 >> 16 & 1
                writer.write(whole(b"abc", "Connection: close", status="200 X" if good else "503 X"))
            writer.close()

        flapping = await asyncio.start_server(flaps, "127.0.0.1", 0)
        port = flapping.sockets[0].getsockname()[1]
        fetcher = Fetcher(FetchConfig(allow=(f"127.0.0.1:{port}",)), lookup=at_home)
        rows = await asyncio.gather(
            *(fetcher.get(f"http://f{n % 4}.test:{port}/{n}") for n in range(80)), return_exceptions=True
        )
        await fetcher.close()
        flapping.close()
        return Counter(r.reason if isinstance(r, RowError) else type(r).__name__ for r in rows)

    reasons = asyncio.run(main())
    assert set(reasons) <= {"Body", Reason.HTTP_5XX} and reasons["Body"] >= 60, reasons
    assert turn <= 80 * (1 + RETRIES) * 2


# ------------------------------------------------------------------------------------------------------- outages (N15)


@pytest.mark.long
@pytest.mark.parametrize("how", ["503", "503 soon", "hang up", "closed", "mute"])
def test_an_outage_of_five_seconds_costs_no_row(server: Hostile, tmp_path: Path, how: str) -> None:
    """The whole web is away for 5 s in the middle of a run, with the default settings."""
    urls = [f"{url}?{n}" for n in range(4) for url in hosts(60, server.port, "/good")]
    listed = write_list(tmp_path / "list.parquet", {"url": urls})
    config = FetchConfig(allow=server.allow)
    lock = threading.Lock()  # one word at a time through the pipe

    def outage() -> None:
        time.sleep(0.3)
        for mode, seconds in ((how, 5.0), ("up", 0.0)):
            with lock:
                server.be(mode)
            time.sleep(seconds)

    trouble = threading.Thread(target=outage)
    trouble.start()
    start = time.monotonic()
    try:
        rows = fetch_list(listed, tmp_path / "data", config, shard_size=60)
    finally:
        trouble.join()
    outcomes = Counter(row["reason"] or "good" for row in rows)
    print(f"{how}: {dict(outcomes)}, {time.monotonic() - start:.0f} s")
    assert outcomes == {"good": len(urls)}


# ------------------------------------------------------------------------------------------------- dripping hosts (N11)

GOOD = 4000


def fetch_beside(
    ready: Callable[[], None], port: int, allow: tuple[str, ...], drips: int
) -> tuple[float, int, Counter]:
    """Seconds for the good rows while `drips` rows of 64 hosts are under way; how many were good; the drips' ends.

    The good rows are fetched three times, and the fastest counts: other work on the machine only ever adds.
    """

    async def main() -> tuple[float, int, Counter]:
        fetcher = Fetcher(FetchConfig(allow=allow, respect=()))
        await fetch_all(fetcher, {url: url for url in hosts(250, port, "/good")})
        ready()
        slow = {f"{url}?{n}": f"{url}?{n}" for n in range(drips // 64) for url in hosts(64, port, "/drip", first=250)}
        held = asyncio.create_task(fetch_all(fetcher, slow))
        await asyncio.sleep(0.5)  # they have all that they can get
        seconds, good, began = [], [], time.monotonic()
        while len(seconds) < 3 and time.monotonic() - began < 8:
            start = time.monotonic()
            urls = (f"{url}?{n}" for n in range(GOOD // 250) for url in hosts(250, port, "/good"))
            rows = await fetch_all(fetcher, {url: url for url in urls})
            seconds.append(time.monotonic() - start)
            good.append(sum(e.reason is None for e in rows.values()))
        if drips <= 64:
            ends = Counter(e.reason for e in (await held).values())
        else:  # the rest of them would take minutes
            ends = Counter()
            held.cancel()
            await asyncio.gather(held, return_exceptions=True)
        await fetcher.close()
        return min(seconds), min(good), ends

    return asyncio.run(main())


@pytest.mark.long
@pytest.mark.parametrize("rows", [1, 16], ids=["a row each", "16 rows each"])
def test_64_hosts_that_drip_leave_the_others_their_rate(server: Hostile, rows: int) -> None:
    """Four thousand good rows of 250 hosts, alone and beside 64 hosts that send a byte a second; in turn, twice."""
    clean, beside = [], []
    for _ in range(2):
        for drips, times in ((0, clean), (64 * rows, beside)):
            seconds, good, ends = measure(fetch_beside, server.port, server.allow, drips).result
            assert good == GOOD
            assert not ends or ends == {Reason.TIMEOUT: drips}
            times.append(seconds)
    share = min(clean) / min(beside)
    print(f"{GOOD} rows in {clean} s alone, in {beside} s beside {64 * rows} rows that drip: {share:.0%}")
    assert share >= 0.8
