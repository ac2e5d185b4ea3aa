"""How much of a caption server's own limit is reached: `python -m bench.captions [--images N]`.

The server, in a process of its own, works on so many requests at a time, each for a fixed time: its limit is slots over
seconds. Shards are small, so that one's last answers are waited for again and again. The first share is the whole
run's, from the first request (the probe apart) to the last answer; the second that of its second half, when the number
of requests at a time has been found.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from curate.annotators.registry import make_annotators
from curate.annotators.stage import annotate_table
from curate.layout import Data
from tests.small_captions import Behaviour, CaptionServer, make_images


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
            one = measure(data, slots, slots / options.rate, f"cap{slots}")
            found.append(one)
            print(
                f"{slots:3} slots of {one['latency']:.2f} s: {one['whole']:.1%} of {options.rate:g} answers a second, "
                f"{one['second_half']:.1%} in the second half, {one['cpu_ms']:.1f} ms of a core per image, at most "
                f"{one['peak']} requests at a time"
            )
    if options.json:
        print(json.dumps(found))


def measure(data: Data, slots: int, latency: float, name: str) -> dict[str, Any]:
    """Shares of the server's limit that one run reaches."""
    with CaptionServer(Behaviour(slots=slots, latency=latency)) as server:
        annotators = make_annotators({name: {"use": "captions", "base_url": server.url, "model": "tiny-vl"}})
        began = time.process_time()
        annotate_table(data, name, annotators, encoder=_none, say=lambda text: None)
        cpu, seen = time.process_time() - began, server.seen()
    times = sorted(seen.times)[1:]  # the first is of the red square
    images, half, limit = len(times), len(times) // 2, slots / latency
    return {
        "slots": slots,
        "latency": latency,
        # the first answer came a latency after its request
        "whole": images / (times[-1] - times[0] + latency) / limit,
        "second_half": (images - half) / (times[-1] - times[half - 1]) / limit,
        "cpu_ms": 1000 * cpu / images,
        "peak": seen.peak,
    }


def _none() -> Any:
    raise AssertionError("no vectors are needed")


if __name__ == "__main__":
    main()
