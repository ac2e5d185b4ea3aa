"""Making the plan of a list: its rows are cut into shards once, and more of them when `--limit` grows."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from aesthetic.errors import UserError
from curate.fetch.deny import Deny
from curate.layout import Data
from curate.sources.adding import Addition, growing
from curate.sources.find import Found, find, stat
from curate.sources.lists import ParquetInput
from curate.sources.plan import ANEW, VERSION, Plan, ShardPlan, SourceConfig, load_plan, shards_file
from curate.sources.plan_files import input_facts, rows_per_shard, settings, shards_of, write_plan, write_rows
from curate.sources.remote import is_remote
from curate.sources.scan import ListScan, open_scan, scan_list
from curate.store.files import digest, sha256_file

_LARGEST_GROUP = 2_000_000
"""Rows; a parquet file with a larger row group is cut anew: each of its shards would decode the whole group."""


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
        rows, shard_count = (plan.listed_rows, plan.total_rows), len(plan.shards)
        if _grows(plan, limit):
            with tempfile.TemporaryDirectory() as scratch, _growth(plan, list_path, config, limit, scratch) as more:
                rows, shard_count = (more.plan_listed_rows, more.total_rows), more.shard_count
        return PlanPreview(*rows, shard_count, plan.columns, plan.extra_columns, plan.warnings)
    with tempfile.TemporaryDirectory() as scratch:
        scan = scan_list(found := find(list_path, Path(scratch)), config, limit)
    size = rows_per_shard(config, sum(scan.kept))
    shard_count = sum(-(-kept // size) for kept in scan.kept)
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
            plan = write_plan(data, facts, shards, replaces=shards_file(plan.facts))
        if not _grows(plan, limit):
            return plan
        with (
            tempfile.TemporaryDirectory(dir=data.plan_folder, prefix=".", suffix=".tmp") as scratch,
            _growth(plan, list_path, config, limit, scratch) as more,
        ):
            return more.write()
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
    size = rows_per_shard(config, sum(scan.kept))
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
                write_rows(data.root / file, index, scan, size)
                cut[file] = sha256_file(data.root / file)
            if found.remote:
                source.path.unlink()
        if not found.remote and stat(found.kind, source.path) != before:
            raise UserError(f"{source.path}: changed while it was read. Run the same command again.")
        inputs.append(input_facts(found, source, before, content))
        identities[file], made_of[file] = digest(identity), index
        shards += shards_of(file, kept, size, first=len(shards))
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
        "source": settings(config, limit),
    }
    return write_plan(data, facts, shards)


# ------------------------------------------------------------------------------------------------- a plan that is there


def _require_same(plan: Plan, list_path: str, found: Found | None, config: SourceConfig) -> dict[int, dict[str, Any]]:
    """The inputs whose content is the same, but not their path or time. UserError where anything else differs.

    Of a remote list, which is not `found` again, the name is compared.
    """
    old, new = plan.facts["source"], settings(config, plan.limit)
    differences = [f"{k} was {old.get(k)!r} and is {new[k]!r} now" for k in new if old.get(k) != new[k]]
    moved: dict[int, dict[str, Any]] = {}
    inputs, kind = [fact for fact in plan.facts["inputs"] if not fact.get("list")], plan.facts["kind"]
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
        raise UserError(
            f"{plan.data} was made from something else: {'; '.join(differences)}. --add appends the rows of another "
            f"list that are not there yet. {ANEW}"
        )
    return moved


def _grows(plan: Plan, limit: int | None) -> bool:
    """Whether a limit asks for more rows than the plan has. UserError where it asks for fewer."""
    rows, listed_rows = plan.lists[0]["rows"], plan.lists[0]["listed_rows"]
    wanted = listed_rows if limit is None else min(limit, listed_rows)
    if wanted < rows:
        raise UserError(
            f"{plan.data} holds {rows:,} rows of the list, and --limit {limit} is fewer. "
            f"Leave --limit out for the whole list, give {rows} or more, or another --out."
        )
    return wanted > rows


@contextmanager
def _growth(
    plan: Plan, list_path: str, config: SourceConfig, limit: int | None, copies: str | Path
) -> Iterator[Addition]:
    """What a larger limit takes of a plan's first list."""
    found = find(list_path, Path(copies))
    scan = open_scan(found, config, limit)
    with growing(plan, 0, found, scan, config, limit, Deny(), plan.extra_columns) as more:
        yield more
