"""A web of more domains than files may be open: connections are kept for as long as there are files for them."""

from __future__ import annotations

import asyncio
import os
import resource
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hostile_web import Hostile, at_home, measure
from test_answers import fetch_all

from aesthetic.errors import UserError
from curate.fetch.client import Fetcher
from curate.fetch.config import FetchConfig

DOMAINS = 4000


@pytest.fixture(scope="module")
def server() -> Iterator[Hostile]:
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 3 * DOMAINS  # for the server, which inherits it
    if hard != resource.RLIM_INFINITY and hard < enough:
        pytest.skip(f"{hard} files may be open here, and the server wants {enough}")
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, enough), hard))
    with Hostile() as server:
        yield server
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def fetch_with(
    ready: Callable[[], None], port: int, allow: tuple[str, ...], soft: int, hard: int
) -> tuple[Counter[str], int]:
    """Outcomes of a row of each domain under these limits, and the most files that were open."""
    most = 0

    async def main() -> Counter[str]:
        fetcher = Fetcher(FetchConfig(allow=allow, respect=()), lookup=at_home)

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, len(os.listdir("/dev/fd")))
                await asyncio.sleep(0.02)

        watching = asyncio.create_task(watch())
        urls = [f"http://h{n}.test:{port}/good" for n in range(DOMAINS)]
        ended = await fetch_all(fetcher, {url: url for url in urls})
        watching.cancel()
        await fetcher.close()
        return Counter(e.reason or "good" for e in ended.values())

    ready()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return asyncio.run(main()), most


@pytest.mark.parametrize("soft,hard", [(1024, 1024), (1024, 10_000)])
def test_more_domains_than_files(server: Hostile, soft: int, hard: int) -> None:
    server.forget()
    outcomes, most = measure(fetch_with, server.port, server.allow, soft, hard).result
    print(f"{outcomes}, {most} files")
    assert outcomes == {"good": DOMAINS}
    assert most < 1024 if hard == 1024 else 1024 < most < hard


def test_too_few_files_for_the_requests_are_told_at_once() -> None:
    assert measure(refused, 500, 500).result.startswith("fetch.concurrency: 384 requests at a time need 896 open files")


def refused(ready: Callable[[], None], soft: int, hard: int) -> str:
    ready()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with pytest.raises(UserError) as e:
        Fetcher(FetchConfig())
    return str(e.value)
