"""What a domain is asked, whoever asks: counted where requests would arrive, with several workers and one budget."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections import Counter, defaultdict

import pytest

from curate.fetch import domains
from curate.fetch.budget import LEASE, Budget, LeaseReply, LeaseRequest, LeaseSlots, local, registered_domain
from curate.fetch.domains import Permits
from curate.ledger.schema import FinalError, Reason, RowError


@pytest.mark.parametrize(
    ("host", "domain"),
    [
        ("i.pinimg.com", "pinimg.com"),
        ("pinimg.com", "pinimg.com"),
        ("a.b.example.co.uk", "example.co.uk"),
        ("shop-a.myshopify.com", "shop-a.myshopify.com"),  # each shop is its own site: the private section says so
        ("d1.cloudfront.net", "d1.cloudfront.net"),
        ("co.uk", "co.uk"),
        ("localhost", "localhost"),
        ("x.y.test", "y.test"),
        ("www.example.com.", "example.com"),
        ("127.1.0.1", "127.1.0.1"),
        ("2606:4700::1111", "2606:4700::1111"),
        ("www.xn--bcher-kva.example", "xn--bcher-kva.example"),
    ],
)
def test_whom_a_host_belongs_to(host: str, domain: str) -> None:
    assert registered_domain(host) == domain


class Counting:
    """Domains as they would see it: how many at once, and when each request began."""

    def __init__(self) -> None:
        self.busy: Counter[str] = Counter()
        self.busiest: Counter[str] = Counter()
        self.began: dict[str, list[float]] = defaultdict(list)

    @contextlib.contextmanager
    def request(self, domain: str):
        self.busy[domain] += 1
        self.busiest[domain] = max(self.busiest[domain], self.busy[domain])
        self.began[domain].append(time.monotonic())
        try:
            yield
        finally:
            self.busy[domain] -= 1

    def most_within(self, domain: str, seconds: float) -> int:
        began = sorted(self.began[domain])
        return max(sum(t <= u < t + seconds for u in began) for t in began)


def far(shared: Budget, worker: str, dice: random.Random) -> LeaseSlots:
    """A budget behind a network: every message takes some milliseconds, there and back."""

    async def lease(request: LeaseRequest) -> LeaseReply:
        await asyncio.sleep(dice.uniform(0, 0.01))
        reply = shared.lease(worker, request)
        await asyncio.sleep(dice.uniform(0, 0.01))
        return reply

    return lease


@pytest.mark.parametrize("workers", [1, 4, 7])
def test_the_limits_hold_for_all_workers_together(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that fail, are cancelled, come late or take long; domains with one row and with hundreds."""
    monkeypatch.setattr(domains, "WARM", 0.1)  # so that slots are given back and asked for again all the time
    dice = random.Random(workers)
    seen = Counting()

    async def row(permits: Permits, domain: str) -> None:
        await asyncio.sleep(dice.uniform(0, 0.5))
        with contextlib.suppress(ValueError):
            async with permits.permit(domain) as permit:
                permit.answered()
                with seen.request(domain):
                    await asyncio.sleep(dice.uniform(0, 0.02))
                    if dice.random() < 0.1:
                        raise ValueError("a row that fails")

    async def main() -> None:
        shared = Budget(4)
        all_permits = [Permits(20, 4, 200.0, far(shared, f"w{i}", dice)) for i in range(workers)]
        rows = ["big.test"] * 150 + [f"{i % 10}.test" for i in range(100)] + [f"once{i}.test" for i in range(100)]
        dice.shuffle(rows)
        tasks = [asyncio.create_task(row(all_permits[i % workers], d)) for i, d in enumerate(rows)]
        for task in dice.sample(tasks, 40):
            await asyncio.sleep(0.002)
            task.cancel()
        async with asyncio.timeout(30):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert seen.busiest["big.test"] == 4 and max(seen.busiest.values()) == 4
        for domain in seen.began:
            assert seen.most_within(domain, 0.25) <= 4 + 0.25 * 200
        if workers > 1:
            assert time.monotonic() - seen.began["big.test"][0] > 0.4  # 120 and more at 200 a second
        for permits in all_permits:
            await permits.close()
        leftover = shared.lease("asker", LeaseRequest(wanted={"big.test": 4, "0.test": 4}))
        assert Counter(d for d, _ in leftover.granted) == {"big.test": 4, "0.test": 4}  # no slot was lost, none made

    asyncio.run(main())


def test_a_worker_that_is_gone_loses_its_slots_and_one_that_waits_gets_a_share() -> None:
    now = [0.0]
    shared = Budget(4, clock=lambda: now[0])
    assert len(shared.lease("a", LeaseRequest(wanted={"x.test": 4})).granted) == 4
    assert shared.lease("b", LeaseRequest(wanted={"x.test": 4})) == LeaseReply()
    assert shared.lease("a", LeaseRequest()).recalled == ["x.test"]
    shared.lease("a", LeaseRequest(returned=[("x.test", 3.0)], wanted={"x.test": 9}))
    assert shared.lease("b", LeaseRequest()).granted == [("x.test", 3.0)]  # with the rest that the slot needs
    now[0] = LEASE / 2
    assert shared.lease("b", LeaseRequest()).granted == []
    now[0] = LEASE + 1  # a is not heard of
    assert len(shared.lease("b", LeaseRequest()).granted) == 3
    now[0] += 1
    assert shared.lease("a", LeaseRequest(returned=[("x.test", 0.0)] * 3)) == LeaseReply()  # back, but lent to b
    assert shared.lease("c", LeaseRequest(wanted={"x.test": 1})).granted == []


def test_a_domain_that_asks_for_a_pause_gets_it_from_all() -> None:
    now = [0.0]
    shared = Budget(2, clock=lambda: now[0])
    for worker in "ab":
        shared.lease(worker, LeaseRequest(wanted={"x.test": 1}))
    shared.lease("a", LeaseRequest(backoff={"x.test": 20.0}))
    now[0] = 5.0
    assert shared.lease("b", LeaseRequest()).backoff == {"x.test": 15.0}
    assert shared.lease("b", LeaseRequest()).backoff == {}  # said once
    shared.lease("b", LeaseRequest(returned=[("x.test", 0.0)]))
    assert shared.lease("c", LeaseRequest(wanted={"x.test": 1})).backoff == {"x.test": 15.0}


def test_what_is_idle_is_forgotten() -> None:
    now = [0.0]
    shared = Budget(2, clock=lambda: now[0])
    for i in range(1000):
        shared.lease("a", LeaseRequest(wanted={f"{i}.test": 1}))
        shared.lease("a", LeaseRequest(returned=[(f"{i}.test", 0.0)]))
    assert not shared._domains


def test_open_connections_come_first_and_the_next_row_of_a_domain_follows_at_once() -> None:
    order: list[str] = []

    async def row(permits: Permits, domain: str) -> None:
        async with permits.permit(domain):
            order.append(domain)
            await asyncio.sleep(0.001)

    async def main() -> None:
        permits = Permits(1, 4, 0.0, local(Budget(4)))
        await asyncio.gather(*(row(permits, f"{i % 5}.test") for i in range(25)))
        await permits.close()

    asyncio.run(main())
    assert sum(a != b for a, b in itertools.pairwise(order)) == 4


def test_a_domain_is_given_up_after_its_probe_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domains, "OPEN_SECONDS", 0.2)
    tried: list[float] = []

    async def row(permits: Permits, domain: str) -> str:
        try:
            async with permits.permit(domain) as permit:
                if domain == "good.test":
                    permit.answered()
                    return "ok"
                tried.append(time.monotonic())
                permit.failed(RowError(Reason.CONNECT, "refused"))
                return "failed"
        except FinalError as e:
            return f"{e.reason} {e.detail}"

    async def main() -> None:
        permits = Permits(10, 3, 0.0, local(Budget(3)))
        outcomes = Counter(await asyncio.gather(*(row(permits, f"{d}.test") for d in ("bad", "good") * 50)))
        await permits.close()
        assert outcomes["ok"] == 50
        assert outcomes["failed"] == len(tried) <= domains.MAX_FAILURES + 3
        assert outcomes["connect refused"] == 50 - len(tried)
        assert max(b - a for a, b in itertools.pairwise(tried)) > 0.14

    asyncio.run(main())


def test_a_budget_that_is_gone_ends_every_row() -> None:
    async def broken(request: LeaseRequest) -> LeaseReply:
        raise ConnectionError("the actor died")

    async def main() -> None:
        permits = Permits(10, 3, 0.0, broken)

        async def row() -> None:
            async with permits.permit("x.test"):
                pass

        async with asyncio.timeout(5):
            outcomes = await asyncio.gather(row(), row(), return_exceptions=True)
            assert [str(e) for e in outcomes] == ["the actor died"] * 2
            with pytest.raises(ConnectionError):
                await row()
        await permits.close()

    asyncio.run(main())


def test_many_domains_that_all_wait_are_looked_through_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look-through is as long as the list of domains, and keeps the event loop from everybody."""
    monkeypatch.setattr(domains, "_REMEMBERED", 500)
    seen: list[object] = []

    async def row(permits: Permits, domain: str) -> None:
        if not seen or seen[-1] is not permits._states:
            seen.append(permits._states)  # a look-through leaves another dict
        async with permits.permit(domain) as permit:
            permit.answered()

    async def main() -> None:
        permits = Permits(256, 6, 0.0, local(Budget(6)))
        await asyncio.gather(*(row(permits, f"{i}.example") for i in range(4000)))
        assert len(seen) <= 5
        assert permits._full <= 8000  # and what is not waited for is forgotten as before
        for i in range(9000):
            await row(permits, f"new{i}.example")
        assert len(permits._states) <= 8000
        await permits.close()

    asyncio.run(main())
