"""The fetch and images stages of a small list, as a notebook runs them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curate.fetch.config import FetchConfig
from curate.images.config import ImagesConfig
from curate.layout import Data
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from curate.workers import FetchWorker


def write_list(path: Path, columns: dict[str, Any]) -> Path:
    """A list in parquet."""
    pq.write_table(pa.table(columns), path)
    return path


def fetch_list(listed: Path, root: Path, fetch: FetchConfig, shard_size: int = 10_000) -> list[dict[str, Any]]:
    """All rows of a list, in its order, as the ledger has them."""
    shards = [s.shard for s in make_plan(str(listed), Data(root), SourceConfig(shard_size=shard_size)).shards]
    data = Data(root)

    async def run() -> None:
        worker = FetchWorker(data, fetch, ImagesConfig(size=64), "config", threads=1)
        try:
            await asyncio.gather(*(worker.run(shard) for shard in shards))
        finally:
            await worker.close()

    asyncio.run(run())
    return [row for shard in shards for row in pq.read_table(data.table(shard)).to_pylist()]
