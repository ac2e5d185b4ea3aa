"""The other contender: img2dataset's own `download`, in a process of its own and those that it starts.

    python -m bench.peer JSON      JSON: the arguments of img2dataset.download

Runs under any Python that has img2dataset; needs nothing of ours but bench.names. Prints a line of JSON at the end. The
CPU that it tells is that of the shards, in the processes that fetch them, and that of the process which deals them out;
starting them and importing (seconds) is left out.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import img2dataset
from img2dataset.downloader import Downloader

from bench import names

fetch = Downloader.__call__


def counted(self: Downloader, row: Any) -> Any:
    """A shard, and a line with the CPU seconds that it took."""
    before = time.process_time()
    try:
        return fetch(self, row)
    finally:
        with open(os.environ["BENCH_PEER_CPU"], "a") as f:
            f.write(f"{time.process_time() - before}\n")


# on import, because img2dataset's processes import this module too
names.install()
Downloader.__call__ = counted


def main() -> None:
    options = json.loads(sys.argv[1])
    cpu = Path(options["output_folder"] + ".cpu")
    cpu.unlink(missing_ok=True)
    os.environ["BENCH_PEER_CPU"] = str(cpu)
    before = time.process_time()
    img2dataset.download(**options)
    own = time.process_time() - before
    records = [json.loads(p.read_text()) for p in sorted(Path(options["output_folder"]).glob("*_stats.json"))]
    outcomes: dict[str, int] = {}
    for record in records:
        for name, n in record["status_dict"].items():
            outcomes[name] = outcomes.get(name, 0) + n
    facts = {
        "cpu": own + sum(map(float, cpu.read_text().split())),
        "began": min(r["start_time"] for r in records),
        "ended": max(r["end_time"] for r in records),
        "outcomes": outcomes,
    }
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
