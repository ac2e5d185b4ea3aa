"""Our contender: the fetch stage as a worker of `tastemaker curate` runs it, in a process of its own.

    python -m bench.ours LIST FOLDER JSON      JSON: {"fetch": {...}, "images": {...}, "shard_size": 1000}

Plan, fetch, decode, and commit tar, table and record, shard by shard, two at a time as the Ray job does. Prints a line
of JSON at the end: the CPU seconds from the plan on, when the first shard began and the last ended, and what became of
the rows.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import pandas  # noqa: F401  pyarrow does so at its first array, and importing is left out of all figures

from bench import mechanisms, names
from curate.fetch.config import FetchConfig
from curate.images.config import ImagesConfig
from curate.layout import Data
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from curate.store.files import read_json
from curate.workers import FetchWorker, ignore
from pipelines.runtime.jobs import shards_together


async def fetch(data: Data, options: dict[str, Any]) -> dict[str, Any]:
    """Fetch all shards."""
    ends: list[tuple[float, str, str]] = []

    def note(stage: str, outcome: str, host: str) -> None:
        ends.append((time.time(), outcome, host))

    report = note if options.get("ends") else ignore
    worker = FetchWorker(data, FetchConfig(**options["fetch"]), ImagesConfig(**options["images"]), "bench", report)
    slots = asyncio.Semaphore(shards_together(max(s.rows for s in data.plan.shards)))  # as the job does

    async def one(shard: int) -> None:
        async with slots:
            await worker.run(shard)

    async with asyncio.TaskGroup() as group:
        for shard in range(len(data.plan.shards)):
            group.create_task(one(shard))
    await worker.close()
    records = [read_json(data.fetched_record(n)) or {} for n in range(len(data.plan.shards))]
    return {
        "began": min(r["start_time"] for r in records),
        "ended": max(r["end_time"] for r in records),
        "shard_ends": [r["end_time"] for r in records],
        "outcomes": _sum(r["status_dict"] for r in records),
        "ends": ends,
    }


def _sum(counts: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for each in counts:
        for name, n in each.items():
            total[name] = total.get(name, 0) + n
    return total


def main() -> None:
    names.install()
    listed, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    mechanisms.switch_off(options.get("without", ""))
    before = time.process_time()
    make_plan(listed, Data(folder), SourceConfig(shard_size=options["shard_size"]))
    facts = asyncio.run(fetch(Data(folder), options))
    print(json.dumps(facts | {"cpu": time.process_time() - before}), flush=True)


if __name__ == "__main__":
    main()
