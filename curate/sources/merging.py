"""Data folders as one: which of their rows come into it, in which shard, and the plan that it has.

A shard stays a shard, without the rows that another folder has too: of a URL (or the place of an image) and of bytes
the first folder that has an image of it is meant. Shards of the first folder keep their numbers. The plan names the
lists of all, so that each can be grown, added or fetched again; their rows are cut into files of its own.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.files import atomic
from curate.fetch.deny import Deny
from curate.layout import Data
from curate.ledger.denied import DenySearch
from curate.ledger.schema import URL_COLUMNS, Status, make_key, shard_of_key, stored_schema
from curate.ledger.sql import connect
from curate.sources.adding import with_columns
from curate.sources.columns import stored_own
from curate.sources.inputs import FAILURES, PLACE_COLUMNS
from curate.sources.known import NAME, name_rows
from curate.sources.parquet import rows_between
from curate.sources.plan import MOST_HELD, Plan, ShardPlan
from curate.sources.plan_files import write_plan
from curate.store.files import digest, read_table, sha256_file

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Part:
    """A shard of one of the folders, as it goes into the merged one."""

    folder: int  # which of them
    shard: int  # its number there
    number: int  # and here
    kept: Mask  # which of its rows come in


@dataclass(kw_only=True)
class Merge:
    """What of data folders makes one; nothing is written."""

    folders: list[Data]
    parts: list[Part]  # in the order of their numbers
    shard_size: int
    extra_columns: list[list[pa.Schema]]  # of each folder, of each of its lists: with those of all before it
    counts: list[Counter[str]]  # of each folder: rows, images; left out: same_url, same_bytes, denied

    def key_of(self, folder: int, key: str) -> str | None:
        """What the row with this key in a folder is called in the merged one; None where it does not come in."""
        size = self.folders[folder].plan.shard_size
        shard = shard_of_key(key, size)
        part = self._by_shard.get((folder, -1 if shard is None else shard))
        if shard is None or part is None:
            return None
        row = int(key) - int(make_key(shard, 0, size))
        if row >= len(part.kept) or not part.kept[row]:
            return None
        return make_key(part.number, int(part.kept[:row].sum()), self.shard_size)

    @cached_property
    def _by_shard(self) -> dict[tuple[int, int], Part]:
        return {(part.folder, part.shard): part for part in self.parts}


# --------------------------------------------------------------------------------------------------- which rows come in


@dataclass
class _Rows:
    """All rows of all folders, a number or two for each; hashes as `known` has them, with its odds."""

    folder: list[npt.NDArray[np.int16]] = field(default_factory=list)
    name: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    named: list[Mask] = field(default_factory=list)
    sha: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    image: list[Mask] = field(default_factory=list)
    denied: list[Mask] = field(default_factory=list)


def plan_merge(folders: Sequence[Data], deny: Deny) -> Merge:
    """Which rows of the folders make one, without images that `deny` names.

    UserError where columns do not go together, or a list is gone of which rows are not fetched yet. Some 20 bytes of
    memory a row.
    """
    columns = _all_columns(folders)
    rows, shards = _Rows(), list[tuple[int, int]]()
    with connect(folders[0].root, memory_limit="2GB") as con:
        search = DenySearch(con, deny) if deny else None
        for number, data in enumerate(folders):
            for s in data.plan.shards:
                shards.append((number, s.shard))
                _add_rows(rows, number, data, s, con, search)
    folder, name, sha = np.concatenate(rows.folder), np.concatenate(rows.name), np.concatenate(rows.sha)
    named, image, denied = np.concatenate(rows.named), np.concatenate(rows.image), np.concatenate(rows.denied)
    lengths = [len(part) for part in rows.folder]
    del rows

    fresh = image & ~denied
    same_url = fresh & named & (_first(name, folder, fresh & named) < folder)
    fresh &= ~same_url
    same_bytes = fresh & (_first(sha, folder, fresh) < folder)
    fresh &= ~same_bytes
    # a row without an image comes in where no other folder has one of it, and of several from the first
    others = ~image & named
    has_image, has_row = _first(name, folder, fresh & named), _first(name, folder, others)
    known = others & np.where(has_image < len(folders), has_image != folder, has_row < folder)
    kept = (fresh | ~image) & ~known

    counts = []
    for i in range(len(folders)):
        own = folder == i
        said = {"rows": kept, "images": fresh, "same_url": same_url | known, "same_bytes": same_bytes}
        counts.append(Counter({k: int((own & mask).sum()) for k, mask in (said | {"denied": image & denied}).items()}))
    parts = list[Part]()
    for (i, shard), mask in zip(shards, np.split(kept, np.cumsum(lengths)[:-1]), strict=True):
        if mask.any():
            parts.append(Part(i, shard, len(parts), mask))
    if not parts:
        raise UserError("nothing would come in: all rows of these folders are denied")
    size = max(data.plan.shard_size for data in folders)
    return Merge(folders=[*folders], parts=parts, shard_size=size, extra_columns=columns, counts=counts)


def _add_rows(rows: _Rows, folder: int, data: Data, s: ShardPlan, con: Any, search: DenySearch | None) -> None:
    table = planned_rows(data, s.shard, ["url", "@path", "@offset"])
    names = name_rows(table.combine_chunks().to_batches()[0], "url", None, None, data.plan.list_of(s.shard)["base"])
    con.register("planned_names", names)
    rows.name.append(
        con.sql(f"SELECT coalesce(hash({NAME}), 0) AS name FROM planned_names").to_arrow_table()["name"].to_numpy()
    )
    con.unregister("planned_names")
    rows.named.append(np.asarray(names["url"].is_valid().to_numpy(), np.bool_))
    image, denied, sha = np.zeros(s.rows, np.bool_), np.zeros(s.rows, np.bool_), np.zeros(s.rows, np.uint64)
    if data.exists(data.fetched_record(s.shard)):
        path = data.local(data.table(s.shard))
        fetched = read_table(path, ["key", "status", "sha256"])
        if len(fetched) != s.rows:
            raise UserError(f"{data.shown(path)}: {len(fetched):,} rows, and {s.rows:,} are planned")
        image = np.asarray(pc.equal(fetched["status"], Status.SUCCESS.value).to_numpy(), np.bool_)
        con.register("fetched_rows", fetched)
        # what says nothing of its bytes is like no other
        sql = f"SELECT hash(coalesce(sha256, concat('{folder} ', key))) AS sha FROM fetched_rows"
        sha = con.sql(sql).to_arrow_table()["sha"].to_numpy()
        con.unregister("fetched_rows")
        if search is not None and (keys := [key for batch in search.denied([path]) for key in batch]):
            denied = np.asarray(pc.is_in(fetched["key"], pa.array(keys, pa.string())).to_numpy(), np.bool_)
        data.release(path)
    rows.folder.append(np.full(s.rows, folder, np.int16))
    rows.sha.append(sha)
    rows.image.append(image)
    rows.denied.append(denied)


def _first(values: npt.NDArray[np.uint64], folders: npt.NDArray[np.int16], among: Mask) -> npt.NDArray[np.int16]:
    """For each row the first folder that has its value in a row `among` those; the largest number where none has.
    Rows are in the order of the folders."""
    none = np.iinfo(np.int16).max
    there, first = np.unique(values[among], return_index=True)
    if not len(there):
        return np.full(len(values), none, np.int16)
    at = np.minimum(np.searchsorted(there, values), len(there) - 1)
    return np.where(there[at] == values, folders[among][first][at], none).astype(np.int16)


def planned_rows(data: Data, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a shard as its plan has them, with our own columns beside: from the plan's own file, else from what
    is fetched, which does not need the list. None: all columns.

    UserError where a list that is read where it lies has changed, and the shard is not fetched.
    """
    plan = data.plan
    s = plan.shards[shard]
    if s.file in plan.facts["cut"]:
        path = data.local(data.root / s.file)
        there = pq.read_schema(path)
        wanted = there.names if columns is None else [n for n in columns if n in there.names]
        schema = pa.schema([there.field(name) for name in wanted])
        table = pa.Table.from_batches(rows_between(path, s.offset, s.rows, wanted, MOST_HELD), schema)
    elif data.exists(data.fetched_record(shard)):
        stored = stored_schema(plan.list_columns(plan.list_index(shard))).names
        wanted = ["url", "caption", *stored]
        table = read_table(data.local(data.table(shard)), wanted if columns is None else columns)
    else:
        table = plan.read(shard).table
        table = table if columns is None else table.select([n for n in columns if n in table.column_names])
    return table


def _all_columns(folders: Sequence[Data]) -> list[list[pa.Schema]]:
    """The extra columns of each list of each folder, with those of all lists before it."""
    found = list[list[pa.Schema]]()
    schema, places = pa.schema([]), list[str]()
    for data in folders:
        own = list[pa.Schema]()
        for i in range(len(data.plan.lists)):
            more = data.plan.list_columns(i)
            remedy = "Such folders can't be merged: fetch one again with `--set source.columns=[...]` without it"
            schema = with_columns(schema, " and ".join(places), more, str(data), remedy) if places else more
            own.append(schema)
        places.append(str(data))
        found.append(own)
    return found


# ------------------------------------------------------------------------------------------------------------- the plan


def write_merged_plan(data: Data, merge: Merge, facts: dict[str, Any]) -> Plan:
    """Write the plan of a merged folder, `plan.json` last; `facts`: what it says of the merge.

    UserError where a number does not go into the type that its column has in a folder before.
    """
    cut, identities, made_of, shards = dict[str, str](), dict[str, str](), dict[str, int](), list[ShardPlan]()
    first_input = np.cumsum([0, *(len(folder.plan.facts["inputs"]) for folder in merge.folders)]).tolist()
    first_list = np.cumsum([0, *(len(folder.plan.lists) for folder in merge.folders)]).tolist()
    rows = Counter[int]()  # of each list

    def source(part: Part) -> tuple[int, str]:
        return part.folder, merge.folders[part.folder].plan.shards[part.shard].file

    for (folder, there), group in groupby(merge.parts, source):
        parts, plan = [*group], merge.folders[folder].plan
        index = plan.facts["made_of"][there] + first_input[folder]
        file = f"plan/{index:05d}-{parts[0].number:05d}.parquet"
        try:
            _write_rows(data.root / file, merge, parts)
        except pa.ArrowInvalid as e:
            raise UserError(f"{plan.data}: a number is too large for the column of another folder: {e}") from e
        cut[file] = sha256_file(data.root / file)
        identities[file], made_of[file] = digest(["merged", cut[file]]), index
        offset = 0
        for part in parts:
            count = int(part.kept.sum())
            shards.append(ShardPlan(part.number, file, offset, count))
            rows[first_list[folder] + plan.list_index(part.shard)] += count
            offset += count

    lists = [
        _list_facts(merge, folder, i, rows[first_list[folder] + i])
        for folder, of in enumerate(merge.folders)
        for i in range(len(of.plan.lists))
    ]
    first = merge.folders[0].plan.facts
    columns = merge.extra_columns[0][0]
    whole = {
        "version": first["version"],
        **{k: v for k, v in lists[0].items() if k not in ("rows", "date", "counts")},
        "inputs": [
            {**fact, "list": index} if (index := fact.get("list", 0) + first_list[folder]) else {**fact}
            for folder, of in enumerate(merge.folders)
            for fact in of.plan.facts["inputs"]
        ],
        "total_rows": sum(s.rows for s in shards),
        "carried": {f.name: str(f.type) for f in columns},
        "identities": identities,
        "made_of": made_of,
        "cut": cut,
        "added": lists[1:],
        "merged": facts,
    }
    return write_plan(data, json.loads(json.dumps(whole)), shards)


def _write_rows(path: Path, merge: Merge, parts: Sequence[Part]) -> None:
    """Write the rows of shards that are of one file of a folder's plan, a row group each."""
    plan = merge.folders[parts[0].folder].plan
    s = plan.shards[parts[0].shard]
    index = plan.list_index(s.shard)
    broken = plan.facts["inputs"][plan.facts["made_of"][s.file]].get("broken")
    own = PLACE_COLUMNS if plan.list_of(s.shard)["base"] is not None else FAILURES if broken else ()
    extra_columns = stored_schema(merge.extra_columns[parts[0].folder][index])
    schema = pa.schema([*URL_COLUMNS, *extra_columns, *((stored_own(name), kind) for name, kind in own)])
    with atomic(path) as f, pq.ParquetWriter(f, schema, compression="zstd") as writer:
        for part in parts:
            table = planned_rows(plan.data, part.shard).filter(pa.array(part.kept))
            there = {*table.column_names}
            columns = [table[f.name].cast(f.type) if f.name in there else pa.nulls(len(table), f.type) for f in schema]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=max(1, len(table)))


def _list_facts(merge: Merge, folder: int, index: int, rows: int) -> dict[str, Any]:
    """What plan.json says of a list of a folder."""
    plan = merge.folders[folder].plan
    before, left = plan.lists[index], plan.lists[index]["rows"] - rows
    kept = ("list", "remote", "kind", "base", "limit_hash")
    schema = merge.extra_columns[folder][index]
    return {
        **{name: before[name] for name in kept if name in before},
        "carried_schema": base64.b64encode(schema.serialize()).decode(),
        "source": {**before["source"], "source.shard_size": merge.shard_size},
        "warnings": list(before.get("warnings", [])),
        "rows": rows,
        "listed_rows": before["listed_rows"] - left,
        "left_out": before.get("left_out", 0) + left,
        "date": before.get("date") or datetime.now(UTC).isoformat(timespec="seconds"),
        "counts": {**before.get("counts", {"changed_caption": 0, "denied": 0, "without_url": 0}), "new": rows}
        | {"known": before.get("counts", {}).get("known", 0) + left},
    }
