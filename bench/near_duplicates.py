"""Near-duplicates of made-up images: time, CPU, memory and recall of one size, with planted groups.

python -m bench.near_duplicates 1000000 --dim 256 --cosine 0.96 --phash 4 --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from aesthetic.chunks import thread_map
from curate.store.files import read_json
from tests.small_near import plan_near, search, with_neighbours, write_near

SHARD = 50_000
PLANTED = 0.3  # of the images are copies, of one that lies before them in their shard or the first


def make(root: Path, images: int, dim: int, cosine: float | None, hashes: bool) -> Any:
    """The data folder."""
    data = plan_near(root, images, SHARD)
    rng = np.random.default_rng(0)
    for shard in range(-(-images // SHARD)):
        n = min(SHARD, images - shard * SHARD)
        given: dict[str, Any] = {}
        if cosine is not None:
            given["vectors"] = with_neighbours(rng, n, dim, cosine + 0.01, PLANTED)
        if hashes:
            phash = rng.integers(1 << 63, (1 << 64) - 1, n, np.uint64) | np.uint64(0x5555_5555)
            pdq = rng.integers(0, (1 << 64) - 1, (n, 4), np.uint64)
            copies = np.flatnonzero(rng.random(n) < PLANTED)[1:]
            of = rng.integers(0, copies)
            phash[copies], pdq[copies] = phash[of], pdq[of]
            for _ in range(3):
                phash[copies] ^= np.uint64(1) << rng.integers(0, 64, len(copies), np.uint64)
            for _ in range(8):
                pdq[copies, rng.integers(0, 4, len(copies))] ^= np.uint64(1) << rng.integers(
                    0, 64, len(copies), np.uint64
                )
            given |= {"phash": phash, "pdq": pdq}
        write_near(data, shard, SHARD, **given)
    return data


def main() -> None:
    """One size: JSON on standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=int)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--cosine", type=float)
    parser.add_argument("--phash", type=int)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    made = options.out / f"{options.images}-{options.dim}"
    if not made.exists():
        make(made, options.images, options.dim, options.cosine, options.phash is not None)
    from curate.layout import Data

    data = Data(made / "data")
    shutil.rmtree(data.annotations("dup", 0).parent, ignore_errors=True)
    steps: dict[str, float] = {}

    def timed(function: Any, items: Any) -> Any:
        began = time.perf_counter()
        yield from thread_map(function, items)
        steps[function.__name__] = round(steps.get(function.__name__, 0) + time.perf_counter() - began, 1)

    began, before = time.perf_counter(), os.times()
    modes = {k: v for k, v in (("phash", options.phash), ("cosine", options.cosine)) if v is not None}
    search(data, map=timed, **modes)
    after = os.times()
    facts = read_json(data.annotations_record("dup", 0))
    print(
        json.dumps(
            {
                "images": options.images,
                **modes,
                "dim": options.dim,
                "seconds": round(time.perf_counter() - began, 1),
                "cpu_seconds": round(after.user + after.system - before.user - before.system, 1),
                "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
                "steps": steps,
                "groups": facts["groups"],
                "recall": facts["recall"],
            }
        )
    )


if __name__ == "__main__":
    main()
