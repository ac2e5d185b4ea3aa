"""Memory (C1, requirement c): as many of the worst answers as are fetched at once: 512 MB above the baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from answers import AT_ONCE, path_of
from hostile_web import Hostile, Measured, good_image, measure
from test_answers import fetch_hostile

from bench import certificates
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


# -------------------------------------------------------------------------------------------------------- over https


@pytest.fixture(scope="module")
def https(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hostile]:
    """A server whose authority is the one that is trusted, by this process and those that it starts."""
    root, [(_, certificate)] = certificates.make(tmp_path_factory.mktemp("tls"), ["*.a.test"])
    with pytest.MonkeyPatch.context() as patch, Hostile("answers", certificate=certificate) as server:
        patch.setenv("SSL_CERT_FILE", str(root))
        yield server


def fetch_over_https(server: Hostile, urls: list[str]) -> Measured:
    """Fetch these paths of a server, each from a host of its own; one certificate has all, so one domain has all."""
    at = f"a.test:{server.port}"
    warm = [f"https://warm{n}.{at}/good" for n in range(100)]
    config = {"allow": server.allow, "retries": 0, "timeout": 120, "respect": (), "per_domain": 10_000, "rate": 0}
    named = {f"{n}": f"https://h{n}.{at}{path}" for n, path in enumerate(urls)}
    return measure(fetch_hostile, named, warm, config, limit=1_000_000_000)


@pytest.mark.long
def test_large_bodies_over_https(https: Hostile) -> None:
    measured = fetch_over_https(https, [path_of("at once/bodies of 4 MB")] * AT_A_TIME + ["/good"] * NEIGHBOURS)
    print(f"{measured.growth / 1e6:.0f} MB above the baseline, {measured.seconds:.1f} s")
    assert Counter(ended.size for ended in measured.result.values()) == {
        4_000_000: AT_A_TIME,
        len(good_image()): NEIGHBOURS,
    }
    assert measured.growth < 512e6


def test_connections_kept_open_over_https(https: Hostile) -> None:
    """A list of many domains has thousands of these: `domains.WARM` seconds' worth."""
    measured = fetch_over_https(https, ["/good"] * 300)
    print(f"{measured.growth / 1e6:.0f} MB above the baseline, {measured.seconds:.1f} s")
    assert {ended.reason for ended in measured.result.values()} == {None}
    assert measured.growth < 300 * 200_000
