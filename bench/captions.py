"""How much of a caption server's own limit is reached: `python -m bench.captions [--images N]`.

The server, in a process of its own, works on so many requests at a time, each for a fixed time. Its limit is what a
bare loop gets from it, in the same run, which sends requests made beforehand, twice as many at a time. Shards are
small, so that one's last answers are waited for again and again. The first share of the limit is the whole run's, from
the first request (the probe apart) to the last answer; the second that of its second half, when the number of requests
at a time has been found.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from curate.annotators.registry import make_annotators
from curate.annotators.stage import annotate_table
from curate.layout import Data
from curate.recaption.protocol import CaptionRequest
from tests.small_captions import Behaviour, CaptionServer, jpeg, make_images


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.captions", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000, help="images (default: %(default)s)")
    parser.add_argument("--shard", type=int, default=50, help="images of a shard (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="their long side in pixels (default: %(default)s)")
    parser.add_argument(
        "--slots", type=int, nargs="*", default=(4, 16, 48), help="requests the server works on at a time"
    )
    parser.add_argument("--rate", type=float, default=40, help="the server's limit in answers a second")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, last")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        data = make_images(Path(scratch) / "data", options.images, options.shard, (options.size, options.size * 3 // 4))
        for slots in options.slots:
            latency = slots / options.rate
            one = measure(data, slots, latency, f"cap{slots}")
            found.append(one)
            print(
                f"{slots:3} slots of {latency:.2f} s: {one['whole']:.1%} of {one['limit']:.1f} answers a second, "
                f"{one['second_half']:.1%} in the second half, {one['cpu_ms']:.1f} ms of a core per image, at most "
                f"{one['peak']} requests at a time"
            )
    if options.json:
        print(json.dumps(found))


def measure(data: Data, slots: int, latency: float, name: str) -> dict[str, Any]:
    """Shares of the server's limit that one run reaches."""
    behaviour = Behaviour(slots=slots, latency=latency)
    with CaptionServer(behaviour) as server:
        annotators = make_annotators({name: {"use": "captions", "base_url": server.url, "model": "tiny-vl"}})
        limit = asyncio.run(bare_loop(server.url, 200 + 16 * slots, 2 * slots))
        server.become(behaviour)
        began = time.process_time()
        annotate_table(data, name, annotators, encoder=_none, say=lambda text: None)
        cpu, seen = time.process_time() - began, server.seen()
    times = sorted(seen.times)[1:]  # the first is of the red square
    images, half = len(times), len(times) // 2
    return {
        "slots": slots,
        "latency": latency,
        "limit": limit,
        # the first answer came a latency after its request
        "whole": images / (times[-1] - times[0] + latency) / limit,
        "second_half": (images - half) / (times[-1] - times[half - 1]) / limit,
        "cpu_ms": 1000 * cpu / images,
        "peak": seen.peak,
    }


async def bare_loop(url: str, requests: int, together: int) -> float:
    """Answers a second, where so many requests are under way at a time."""
    asked = CaptionRequest("tiny-vl", "Describe it.", {"max_tokens": 300}, {})
    bodies = [asked.body(jpeg(n, (512, 384))) for n in range(requests)]
    places, times = asyncio.Semaphore(together), []

    async def ask(session: aiohttp.ClientSession, body: bytes) -> None:
        async with places, session.post(f"{url}/chat/completions", data=body) as response:
            await response.read()
        times.append(time.monotonic())

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(ask(session, body) for body in bodies))
    full = times[2 * together : -together]  # while all places are taken
    return (len(full) - 1) / (full[-1] - full[0])


def _none() -> Any:
    raise AssertionError("no vectors are needed")


if __name__ == "__main__":
    main()
