"""bench.fetch's measurements of one worker of ours without a rival: memory, dripping hosts, what mechanisms earn."""

from __future__ import annotations

import json
import random
from statistics import median
from typing import Any

from bench import web
from bench.contend import Bench, Lists, spread, write
from bench.measure import Used

DRIPPING = 64
GOOD = 1000
LOOKUP = 0.03  # seconds
PLACES = 4  # requests in flight where mechanisms are compared: then their time decides, not the CPU


def memory(bench: Bench, scale: float) -> dict[str, Any]:
    """The worker's resident memory from the first shard to the last: 200,000 small bodies, and 2,000 of 2 MB."""
    result = {}
    for name, count, size, shard_size in (
        ("small bodies", int(200_000 * scale), 1, 10_000),
        ("2 MB bodies", int(2_000 * scale), 2_000_000, 100),
    ):
        dice = random.Random(1)
        with web.serving(bench.images, bench.certificates) as server:
            urls = [f"http://{spread(dice)}:{server.http}/x/{size}?n={n}" for n in range(count)]
            used = _worker(bench, urls, server.http, {"shard_size": max(1, int(shard_size * min(1.0, scale * 10)))})
        found = _last(used)
        peaks, begin = [], found["began"]
        for end in sorted(found["shard_ends"]):
            if samples := [mb for at, mb in used.memory if begin <= at <= end]:  # none: two ended at once
                peaks.append(max(samples))
            begin = end
        assert found["outcomes"] == {"success": count}, found["outcomes"]
        per_second = count / (found["ended"] - found["began"])
        print(f"{name}: {count} at {per_second:.0f}/s; MB per shard: {' '.join(f'{mb:.0f}' for mb in peaks)}")
        print(f"    the most: {used.peak:.0f} MB", flush=True)
        result[name] = {"count": count, "peak_mb": used.peak, "shards_mb": peaks, "per_second": per_second}
    return result


def drips(bench: Bench, per_host: int, rounds: int = 3) -> dict[str, Any]:
    """The rate of 1,000 good rows on many hosts, alone and among rows of 64 hosts that drip a byte a second."""
    rates: dict[str, list[float]] = {"clean": [], "with drips": []}
    with web.serving(bench.images, bench.certificates) as server:
        dice = random.Random(2)
        good: list[str] = []
        while len(good) < GOOD:
            path = f"/p/{dice.randrange(400)}?n={dice.randrange(10**6)}"
            if not web.fate(path).error:
                good.append(f"http://{spread(dice)}:{server.http}{path}")
        bad = [
            f"http://www.drip{host}.test:{server.http}/drip?n={n}" for host in range(DRIPPING) for n in range(per_host)
        ]
        both = good + bad
        dice.shuffle(both)
        for _ in range(rounds):
            for name, urls in (("clean", good), ("with drips", both)):
                found = _last(_worker(bench, urls, server.http, {"shard_size": 10_000, "ends": True}))
                ends = [at for at, outcome, host in found["ends"] if "drip" not in host]
                assert found["outcomes"]["success"] == len(ends) == GOOD, found["outcomes"]
                rates[name].append(GOOD / (max(ends) - found["began"]))
                print(f"{name}: {rates[name][-1]:.1f} good rows a second, {found['outcomes']}", flush=True)
    ratio = median(rates["with drips"]) / median(rates["clean"])
    print(f"with {DRIPPING} hosts that drip, {per_host} rows each: {ratio:.2f} of the clean rate")
    return {"rates": rates, "ratio": ratio, "per_host": per_host}


def mechanisms(bench: Bench, count: int, rounds: int) -> dict[str, Any]:
    """What the fetcher does with every mechanism, and without each: over https, look-ups of 30 ms, few places, and
    without robots.txt: waiting for that would hide what look-ups cost."""
    cases = {
        "all": "",
        "no DNS cache": "cache",
        "no coalescing": "coalescing",
        "no look-ahead": "ahead",
        "no reuse": "",
    }
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, off in cases.items():
            with web.serving(bench.images, bench.certificates, close=name == "no reuse") as server:
                lists = Lists(bench, server, "photo", "https", count)
                asked = bench.folder / "lookups"
                used = bench.worker(
                    lists.path,
                    _options(bench, server.https, {"shard_size": count, "without": off}, PLACES),
                    {"BENCH_DNS_SECONDS": str(LOOKUP), "BENCH_DNS_COUNT": str(asked)},
                )
                found, counts = _last(used), server.counts()
                seen[name].append(
                    {
                        "per_second": found["outcomes"]["success"] / (found["ended"] - found["began"]),
                        "cpu_ms": 1000 * found["cpu"] / found["outcomes"]["success"],
                        "lookups": int(asked.read_text()),
                        "connections": counts["connections"],
                        "requests": counts["requests"],
                    }
                )
    middle = {name: {key: median(r[key] for r in runs) for key in runs[0]} for name, runs in seen.items()}
    for name, facts in middle.items():
        print(f"{name:15} " + ", ".join(f"{key} {value:.1f}" for key, value in facts.items()))
    return middle


def _worker(bench: Bench, urls: list[str], port: int, more: dict[str, Any]) -> Used:
    path = bench.folder / "alone.parquet"
    write(path, urls)
    return bench.worker(path, _options(bench, port, more))


def _options(bench: Bench, port: int, more: dict[str, Any], places: int = 0) -> dict[str, Any]:
    fetch: dict[str, Any] = {"allow": [f"127.0.0.0/8:{port}"]}
    if places:
        fetch |= {"concurrency": places, "respect": []}
    return {"fetch": fetch, "images": {"size": bench.size, "quality": bench.quality}, **more}


def _last(used: Used) -> dict[str, Any]:
    return json.loads(used.output.splitlines()[-1])
