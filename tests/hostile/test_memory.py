"""Memory (C1, requirement c): as many of the worst answers as are fetched at once: 512 MB above the baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from answers import AT_ONCE, path_of
from hostile_web import Hostile, good_image, measure
from test_answers import fetch_hostile

from curate.fetch.config import FetchConfig

AT_A_TIME = FetchConfig().concurrency
NEIGHBOURS = 64


@pytest.fixture(scope="module")
def server() -> Iterator[Hostile]:
    with Hostile("answers") as server:
        yield server


@pytest.mark.long
@pytest.mark.parametrize("name", AT_ONCE)
def test_the_worst_of_each_kind_at_once(server: Hostile, name: str) -> None:
    reason = AT_ONCE[name][1]
    path = path_of(f"at once/{name}")
    urls = {f"bad {n}": f"http://bad{n}.test:{server.port}{path}" for n in range(AT_A_TIME)}
    urls |= {f"good {n}": f"http://good{n}.test:{server.port}/good" for n in range(NEIGHBOURS)}
    warm = [f"http://warm{n}.test:{server.port}/good" for n in range(100)]
    # A deadline that these bodies do not reach on a slow machine: memory is what is looked at.
    config = {"allow": server.allow, "retries": 0, "timeout": 120, "respect": ()}
    measured = measure(fetch_hostile, urls, warm, config, limit=1_000_000_000)
    bad = Counter(ended.reason for key, ended in measured.result.items() if key.startswith("bad"))
    good = [ended for key, ended in measured.result.items() if key.startswith("good")]
    print(f"{name}: {measured.growth / 1e6:.0f} MB above the baseline, {measured.seconds:.1f} s")
    assert bad == {reason: AT_A_TIME}
    assert all((ended.reason, ended.size) == (None, len(good_image())) for ended in good)
    assert measured.growth < 512e6
