"""Writing the files of a plan: the rows that are cut out of a list, the table of shards, and `plan.json` last."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.files import atomic, write_atomic
from curate.layout import Data
from curate.ledger.schema import URL_COLUMNS, stored_schema
from curate.sources.columns import stored_batch, stored_own
from curate.sources.find import Found
from curate.sources.inputs import Input
from curate.sources.plan import MOST_HELD, SHARDS, Plan, ShardPlan, SourceConfig, shards_file
from curate.sources.scan import ListScan
from curate.store.files import write_json
from curate.store.records import record_digest

_WRITTEN_GROUP = 100_000
"""Rows; the row groups of what is cut here hold a shard each, but no more than this."""

_SHARDS_AT_LEAST, _SMALLEST_SHARD = 8, 32
"""A list that is not long has shards of fewer rows than `source.shard_size`: a run that is stopped loses little, and
embedding begins while the rest is fetched. Below a batch of an encoder's (32 on a CPU) that would only cost."""


def rows_per_shard(config: SourceConfig, rows: int) -> int:
    """How many rows the shards of so many have: `shard_size`, or less, for a list that would have but a few shards."""
    return min(config.shard_size, max(_SMALLEST_SHARD, -(-rows // _SHARDS_AT_LEAST)))


def shards_of(file: str, rows: int, size: int, first: int) -> list[ShardPlan]:
    """The shards of `size` rows that a file of rows is, the last one smaller."""
    offsets = range(0, rows, size)
    return [ShardPlan(first + i, file, offset, min(size, rows - offset)) for i, offset in enumerate(offsets)]


def input_facts(found: Found, source: Input, before: dict[str, Any], content: str) -> dict[str, Any]:
    """What plan.json says of an input: `before`, as `find.stat` has it, and the digest of its `content`."""
    if found.remote:  # of a copy nothing is compared; the plan is the same wherever and whenever it was made
        before = {"path": found.names.get(source.path, source.path.name), "size": before["size"]}
    fact = {**before, **source.origin, "sha256": content, "url": source.url, "caption": source.caption}
    if broken := source.problems.counts["broken"]:
        fact["broken"] = broken
    if source.constants:
        fact["constants"] = source.constants
    return fact


def settings(config: SourceConfig, limit: int | None) -> dict[str, Any]:
    """What plan.json keeps of the recipe and the command line."""
    source = {f"source.{k}": v for k, v in asdict(config).items()}
    return json.loads(json.dumps({**source, "--limit": limit}))  # as it will be read again: tuples are lists


def write_rows(path: Path, index: int, scan: ListScan, shard_size: int) -> None:
    """Write the rows of one input that belong to the plan, a row group per shard."""
    source = scan.inputs[index]
    own = [(stored_own(name), kind) for name, kind in source.own_columns]
    schema = pa.schema([*URL_COLUMNS, *stored_schema(scan.extra_columns), *own])
    group = min(shard_size, _WRITTEN_GROUP)
    held: list[pa.RecordBatch] = []
    with atomic(path) as f, pq.ParquetWriter(f, schema, compression="zstd") as writer:
        for batch in scan.kept_rows(index):
            held.append(
                stored_batch(
                    batch,
                    source.url or "url",
                    source.caption,
                    scan.extra_columns,
                    source.own_columns,
                    absent=scan.absent,
                )
            )
            rows = sum(b.num_rows for b in held)
            is_large = sum(b.nbytes for b in held) > MOST_HELD
            if rows >= group or is_large:
                table = pa.Table.from_batches(held)
                whole = rows if is_large else rows - rows % group
                writer.write_table(table.slice(0, whole), row_group_size=group)
                held = table.slice(whole).combine_chunks().to_batches()
        if held:
            writer.write_table(pa.Table.from_batches(held), row_group_size=group)


def write_plan(data: Data, facts: dict[str, Any], shards: list[ShardPlan], replaces: str | None = None) -> Plan:
    """Write the plan's two files; from the second one on it is there, in place of one with that table of shards."""
    columns = zip(*((s.shard, s.file, s.offset, s.rows) for s in shards), strict=True)
    table = io.BytesIO()
    pq.write_table(pa.table([list(c) for c in columns], schema=SHARDS), table)
    facts["shards_sha256"] = hashlib.sha256(table.getvalue()).hexdigest()
    if replaces is not None:  # a kill between the two files leaves the old plan whole
        facts["shards"] = f"plan/shards-{facts['shards_sha256'][:8]}.parquet"
    write_atomic(data.root / shards_file(facts), table.getvalue())
    written = [data.root / name for name in facts["made_of"] if (data.root / name).is_relative_to(data.root)]
    data.push(*(path for path in written if path.exists()), data.root / shards_file(facts))
    facts = {k: v for k, v in facts.items() if k != "self"}
    write_json(data.plan_record, {**facts, "self": record_digest(facts)})
    data.push(data.plan_record)
    if replaces is not None and replaces != facts["shards"]:
        data.remove(data.root / replaces)
    return Plan.of(data, facts, shards)
