"""Making the plan of a list: its rows are cut into shards once, and more of them when `--limit` grows."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.files import atomic, write_atomic
from curate.layout import Data
from curate.ledger.schema import URL_COLUMNS, stored_schema
from curate.sources.columns import stored_batch, stored_own
from curate.sources.find import Found, find, stat
from curate.sources.lists import ParquetInput
from curate.sources.plan import ANEW, MOST_HELD, SHARDS, VERSION, Plan, ShardPlan, SourceConfig, load_plan, shards_file
from curate.sources.remote import is_remote
from curate.sources.scan import ListScan, scan_list
from curate.store.files import digest, sha256_file, write_json
from curate.store.records import record_digest

_LARGEST_GROUP = 2_000_000
"""Rows; a parquet file with a larger row group is cut anew: each of its shards would decode the whole group."""

_WRITTEN_GROUP = 100_000
"""Rows; the row groups of what is cut here hold a shard each, but no more than this."""

_SHARDS_AT_LEAST, _SMALLEST_SHARD = 8, 32
"""A list that is not long has shards of fewer rows than `source.shard_size`: a run that is stopped loses little, and
embedding begins while the rest is fetched. Below a batch of an encoder's (32 on a CPU) that would only cost."""


@dataclass(frozen=True)
class PlanPreview:
    """What a plan would be, for `--dry-run`."""

    listed_rows: int  # rows of the list, after `where`
    total_rows: int  # of these, the rows that `limit` leaves
    shard_count: int
    columns: dict[str, str | None]  # as `Plan.columns`
    extra_columns: pa.Schema
    warnings: Sequence[str]  # what a run says before it begins


def inspect(list_path: str, config: SourceConfig, limit: int | None = None, data: Data | None = None) -> PlanPreview:
    """What `make_plan` would make, in `data` where it is given. Writes nothing; a remote list is copied elsewhere.

    Raises UserError as make_plan does.
    """
    plan = load_plan(data) if data is not None else None
    if plan is not None:
        remote = plan.facts["remote"] or is_remote(list_path)
        _require_same(plan, list_path, None if remote else find(list_path, plan.data.root), config)
        if not _grows(plan, limit):
            rows = plan.listed_rows, plan.total_rows
            return PlanPreview(*rows, len(plan.shards), plan.columns, plan.extra_columns, plan.warnings)
    with tempfile.TemporaryDirectory() as scratch:
        found = find(list_path, Path(scratch))
        scan = scan_list(found, config, limit)
        added = scan if plan is None else _without_planned(plan, found, config, scan)
    size = _rows_per_shard(config, sum(added.kept))
    shard_count = (len(plan.shards) if plan else 0) + sum(-(-kept // size) for kept in added.kept)
    first = scan.inputs[0]
    columns = {"url": first.url, "caption": first.caption} if found.kind == "list" else {}
    return PlanPreview(scan.listed_rows, sum(scan.kept), shard_count, columns, scan.extra_columns, scan.warnings)


def make_plan(list_path: str, data: Data, config: SourceConfig, limit: int | None = None) -> Plan:
    """The plan of a list, made in the data folder where there is none yet.

    `limit` takes that many rows, spread over the whole list and always the same ones, in the list's order. A plan that
    is there grows where `limit` now asks for more rows: its shards stay, and shards of the other rows follow them.
    Raises UserError, and leaves nothing behind, where the list or the configuration is at fault; and where it holds
    the plan of another list, other settings or more rows. A remote list is copied once, and looked at again only to
    grow.
    """
    plan = load_plan(data)
    if plan is not None:
        local = not (plan.facts["remote"] or is_remote(list_path))
        found = find(list_path, data.plan_folder) if local else None
        moved = _require_same(plan, list_path, found, config)
        if found is not None and moved:  # written anew with the paths and times of what moved or was touched
            facts = json.loads(json.dumps(dict(plan.facts)))
            paths = {}
            for index, now in moved.items():
                paths[facts["inputs"][index]["path"]] = now["path"]
                facts["inputs"][index] |= now
            for table in ("identities", "made_of"):
                facts[table] = {paths.get(name, name): value for name, value in facts[table].items()}
            facts |= {"list": found.name, "base": str(found.base) if found.base else None}
            shards = [replace(s, file=paths.get(s.file, s.file)) for s in plan.shards]
            plan = _write_plan(data, facts, shards, replaces=shards_file(plan.facts))
        return _grow(plan, list_path, config, limit) if _grows(plan, limit) else plan
    data.clear_plan()  # of a run that was killed before its plan was whole
    try:
        found = find(list_path, data.plan_folder)
        return _cut_list(data, found, scan_list(found, config, limit), config, limit)
    except BaseException:
        data.clear_plan()
        raise


# ----------------------------------------------------------------------------------------------------------- a new plan


def _cut_list(data: Data, found: Found, scan: ListScan, config: SourceConfig, limit: int | None) -> Plan:
    """Write a plan: parquet files are used where they lie, what of the list cannot be is cut into files of ours."""
    size = _rows_per_shard(config, sum(scan.kept))
    shards: list[ShardPlan] = []
    inputs: list[dict[str, Any]] = []
    identities: dict[str, str] = {}  # of each file that shards refer to: what it holds, whoever wrote it
    made_of: dict[str, int] = {}  # and which input it is or comes from
    cut: dict[str, str] = {}  # and the sha256 of those that were written here
    for index, (source, kept) in enumerate(zip(scan.inputs, scan.kept, strict=True)):
        before = stat(found.kind, source.path)
        content = source.digest()
        identity: list[Any] = [content, source.url, source.caption, *([source.constants] if source.constants else [])]
        is_whole = scan.predicate is None and scan.limit_hash is None
        if is_whole and isinstance(source, ParquetInput) and source.largest_group <= _LARGEST_GROUP:
            file = str(source.path.relative_to(data.root) if found.remote else source.path)
        else:
            file = f"plan/{index:05d}.parquet"
            if scan.predicate is not None:
                identity.append(scan.predicate.condition)
            if scan.limit_hash is not None:
                identity += [index, scan.limit_hash]
            if kept:
                _write_rows(data.root / file, index, scan, size)
                cut[file] = sha256_file(data.root / file)
            if found.remote:
                source.path.unlink()
        if not found.remote and stat(found.kind, source.path) != before:
            raise UserError(f"{source.path}: changed while it was read. Run the same command again.")
        if found.remote:  # of a copy nothing is compared; the plan is the same wherever and whenever it was made
            before = {"path": found.names.get(source.path, source.path.name), "size": before["size"]}
        fact = {**before, **source.origin, "sha256": content, "url": source.url, "caption": source.caption}
        if broken := source.problems.counts["broken"]:
            fact["broken"] = broken
        if source.constants:
            fact["constants"] = source.constants
        inputs.append(fact)
        identities[file], made_of[file] = digest(identity), index
        shards += _shards_of(file, kept, size, first=len(shards))
    facts = {
        "version": VERSION,
        "list": found.name,
        "remote": found.remote,
        "kind": found.kind,
        "base": str(found.base) if found.base else None,
        "inputs": inputs,
        "listed_rows": scan.listed_rows,
        "total_rows": sum(scan.kept),
        "carried": {f.name: str(f.type) for f in scan.extra_columns},
        "carried_schema": base64.b64encode(scan.extra_columns.serialize()).decode(),
        "identities": identities,
        "made_of": made_of,
        "cut": cut,
        "warnings": scan.warnings,
        "source": _settings(config, limit),
    }
    return _write_plan(data, facts, shards)


def _rows_per_shard(config: SourceConfig, rows: int) -> int:
    """How many rows the shards of so many have: `shard_size`, or less, for a list that would have but a few shards."""
    return min(config.shard_size, max(_SMALLEST_SHARD, -(-rows // _SHARDS_AT_LEAST)))


def _shards_of(file: str, rows: int, size: int, first: int) -> list[ShardPlan]:
    offsets = range(0, rows, size)
    return [ShardPlan(first + i, file, offset, min(size, rows - offset)) for i, offset in enumerate(offsets)]


def _settings(config: SourceConfig, limit: int | None) -> dict[str, Any]:
    settings = {f"source.{k}": v for k, v in asdict(config).items()}
    return json.loads(json.dumps({**settings, "--limit": limit}))  # as it will be read again: tuples are lists


def _write_rows(path: Path, index: int, scan: ListScan, shard_size: int) -> None:
    """Write the rows of one input that belong to the plan, a row group per shard."""
    source = scan.inputs[index]
    own = [(stored_own(name), kind) for name, kind in source.own_columns]
    schema = pa.schema([*URL_COLUMNS, *stored_schema(scan.extra_columns), *own])
    group = min(shard_size, _WRITTEN_GROUP)
    held: list[pa.RecordBatch] = []
    with atomic(path) as f, pq.ParquetWriter(f, schema, compression="zstd") as writer:
        for batch in scan.kept_rows(index):
            held.append(
                stored_batch(batch, source.url or "url", source.caption, scan.extra_columns, source.own_columns)
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


def _write_plan(data: Data, facts: dict[str, Any], shards: list[ShardPlan], replaces: str | None = None) -> Plan:
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


# ------------------------------------------------------------------------------------------------- a plan that is there


def _require_same(plan: Plan, list_path: str, found: Found | None, config: SourceConfig) -> dict[int, dict[str, Any]]:
    """The inputs whose content is the same, but not their path or time. UserError where anything else differs.

    Of a remote list, which is not `found` again, the name is compared.
    """
    old, new = plan.facts["source"], _settings(config, plan.limit)
    differences = [f"{k} was {old.get(k)!r} and is {new[k]!r} now" for k in new if old.get(k) != new[k]]
    moved: dict[int, dict[str, Any]] = {}
    inputs, kind = plan.facts["inputs"], plan.facts["kind"]
    if found is None:
        if list_path != plan.list:
            differences.append(f"the list was {plan.list} and is {list_path} now")
    elif found.kind != kind or len(found.files) != len(inputs):
        differences.append(
            f"the list was {plan.list} ({len(inputs)} inputs of kind {kind}) and is {found.name} now "
            f"({len(found.files)} of kind {found.kind})"
        )
    else:
        for index, (file, fact) in enumerate(zip(found.files, inputs, strict=True)):
            now = stat(kind, file)
            if all(now[k] == fact[k] for k in now):
                continue
            same_path = now["path"] == fact["path"]
            name = str(file) if same_path else f"{file} is not the list that was planned ({fact['path']})"
            if now["size"] != fact["size"]:
                differences.append(f"{name}: it had {fact['size']:,} bytes and has {now['size']:,} now")
                continue
            is_list = found.base is None
            content = sha256_file(file) if is_list else found.open(file, config.url, config.caption).digest()
            if content != fact["sha256"]:
                differences.append(f"{name}: the size is the same, the content is not")
            else:
                moved[index] = now
    if differences:
        raise UserError(f"{plan.data} was made from something else: {'; '.join(differences)}. {ANEW}")
    return moved


def _grows(plan: Plan, limit: int | None) -> bool:
    """Whether a limit asks for more rows than the plan has. UserError where it asks for fewer."""
    wanted = plan.listed_rows if limit is None else min(limit, plan.listed_rows)
    if wanted < plan.total_rows:
        raise UserError(
            f"{plan.data} holds {plan.total_rows:,} rows of the list, and --limit {limit} is fewer. "
            f"Leave --limit out for the whole list, give {plan.total_rows} or more, or another --out."
        )
    return wanted > plan.total_rows


def _without_planned(plan: Plan, found: Found, config: SourceConfig, scan: ListScan) -> ListScan:
    """What a larger limit adds to a plan: the scan without the rows that are planned."""
    before = scan_list(found, config, plan.limit)
    if sum(before.kept) != plan.total_rows:
        raise UserError(f"{found.name}: has changed since the plan was made. {ANEW}")
    kept = [now - then for now, then in zip(scan.kept, before.kept, strict=True)]
    return replace(scan, kept=kept, planned_hash=before.limit_hash)


def _grow(plan: Plan, list_path: str, config: SourceConfig, limit: int | None) -> Plan:
    """The plan with the rows that a larger limit adds, cut into files and shards of their own."""
    facts = json.loads(json.dumps(dict(plan.facts)))
    shards, written = list(plan.shards), list[Path]()
    with tempfile.TemporaryDirectory(dir=plan.data.plan_folder, prefix=".", suffix=".tmp") as scratch:
        found = find(list_path, Path(scratch))
        scan = _without_planned(plan, found, config, scan_list(found, config, limit))
        size = _rows_per_shard(config, sum(scan.kept))
        try:
            for index, (source, kept) in enumerate(zip(scan.inputs, scan.kept, strict=True)):
                if found.remote and source.digest() != facts["inputs"][index]["sha256"]:
                    raise UserError(f"{list_path}: has changed since the plan was made. {ANEW}")
                if not kept:
                    continue
                file = f"plan/{index:05d}-{len(plan.shards):05d}.parquet"
                written.append(plan.data.root / file)
                _write_rows(written[-1], index, scan, size)
                facts["cut"][file] = sha256_file(written[-1])
                identity = [facts["inputs"][index]["sha256"], source.url, source.caption, config.where, index]
                facts["identities"][file] = digest([*identity, scan.planned_hash, scan.limit_hash])
                facts["made_of"][file] = index
                shards += _shards_of(file, kept, size, first=len(shards))
            _require_same(plan, list_path, None if found.remote else found, config)  # nor did it change meanwhile
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise
    facts |= {"total_rows": plan.total_rows + sum(scan.kept), "source": _settings(config, limit)}
    return _write_plan(plan.data, facts, shards, replaces=shards_file(plan.facts))
