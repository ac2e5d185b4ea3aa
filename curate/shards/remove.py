"""Images taken out of a data folder, byte for byte: fetched and packed shards, vectors, columns, selections, the plan's
copy of the list, and whatever was made to look at them. The row stays: key, status `removed`, the date.

What is about to go is written down first (`removing/what.json`: keys and digests, nothing that says more), and every
record is kept there before its files are rewritten. So whoever is killed goes on: each step does nothing to what
it has done already, and until the end no other run takes hold of the folder.
"""

from __future__ import annotations

import contextlib
import csv
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.files import atomic
from curate.fetch.deny import digests_of
from curate.fetch.deny_file import add_removed
from curate.layout import RATINGS, Data
from curate.ledger.named import NamedRows, in_plan
from curate.ledger.neighbours import FACT, FILE
from curate.ledger.schema import Status, make_key
from curate.ledger.view import table_digests, tables
from curate.shards.repack import packed_images, repack
from curate.shards.subset import (
    Moved,
    forget_answers,
    forget_places,
    forget_rows,
    forget_verdicts,
    keep_aside,
    kept_aside,
    moved_inputs,
    subset_table,
    subset_tar,
    subset_vectors,
    without_images,
)
from curate.store.files import read_json, read_table, sha256_file, write_json
from curate.store.lock import held
from curate.store.records import output_digests, record_digest

_TRIES = 100  # to take a folder away
OF_RECORD = ("config", "inputs", "outputs", "self")
"""What a record holds beside its facts."""


@dataclass(kw_only=True)
class Removal:
    """What is to be removed, as `removing/what.json` holds it."""

    date: str  # ISO
    shards: dict[str, list[str]]  # shard -> keys
    images: int
    without: dict[str, int]
    early: dict[str, int]
    entries: dict[str, str]
    names: list[str]
    tables: dict[str, str]  # digests of before
    packs: dict[str, int] = field(default_factory=dict)  # that hold such images -> how many
    manifests: dict[str, str] = field(default_factory=dict)  # the sha256 of theirs, by which models name them
    latents: list[str] = field(default_factory=list)  # folders in the data folder
    said: dict[str, Any] = field(default_factory=dict)  # what is said in the end

    @property
    def keys(self) -> set[str]:
        return {key for keys in self.shards.values() for key in keys}

    @property
    def removed(self) -> int:
        """Rows."""
        return sum(map(len, self.shards.values()))


def plan_removal(data: Data, named: NamedRows, date: str) -> Removal:
    """What taking these rows out is; nothing is written."""
    try:
        digests = table_digests(tables(data))
    except Exception:  # nothing is fetched
        digests = {}
    keys = {key for of_shard in named.shards.values() for key in of_shard}
    packs = {name: count for name in data.packs() if (count := packed_images(data, name, keys))}
    return Removal(
        date=date,
        shards={str(shard): sorted(of_shard) for shard, of_shard in sorted(named.shards.items())},
        images=named.images,
        without=dict(named.without),
        early=dict(named.early),
        entries=named.entries,
        names=sorted(named.names),
        tables=digests,
        packs=packs,
        manifests={name: sha256_file(data.local(data.manifest(name))) for name in packs},
    )


def begin(data: Data, removal: Removal) -> None:
    """Write down what is to be removed. From here on it is, whoever is killed: `finish` goes on."""
    data.removal.parent.mkdir(parents=True, exist_ok=True)
    write_json(data.removal, vars(removal))
    data.push(data.removal)


def unfinished(data: Data) -> Removal | None:
    """A removal that has begun and not ended."""
    value = read_json(data.local(data.removal)) if data.exists(data.removal) else None
    return Removal(**value) if value else None


def finish(data: Data, removal: Removal, progress: Callable[[int], None] = lambda shards: None) -> dict[str, int]:
    """Do what was written down, as far as it is not done; counts of what else went: ratings, lines of logs, sheets.

    The caller holds the folder. `progress` hears of each shard. Raises CorruptShard, DiskFull.
    """
    add_removed(data, removal.entries, {*removal.names}, removal.date)
    keys = removal.keys
    if keys:
        _forget_plan(data, removal)
        for shard, of_shard in removal.shards.items():
            _take_out(data, int(shard), {*of_shard}, removal.date)
            progress(1)
        moved = _moved_tables(data, removal)
        _whole_tables(data, keys, moved)
        for name in data.selections():
            _forget_verdicts(data, name, keys, removal, moved)
        for name in data.store.folders(data.root / "shards"):
            if not name.startswith("."):
                repack(data, name, keys, removal.date, moved)
    gone = _forget_the_rest(data, removal, keys) if keys else {}
    _remove_folder(data, data.removal.parent, last=data.removal)
    return gone


# ------------------------------------------------------------------------------------------------------------ the plan


def _forget_plan(data: Data, removal: Removal) -> None:
    """Null the rows in the files that the plan itself wrote: its own, and its copies of lists from elsewhere."""
    rows = dict[str, set[int]]()  # of each file
    plan = data.plan
    for shard, keys in removal.shards.items():
        s = plan.shards[int(shard)]
        if in_plan(data, s.file):
            first = int(make_key(s.shard, 0, plan.shard_size))
            rows.setdefault(s.file, set()).update(s.offset + int(key) - first for key in keys)
    if not rows:
        return
    facts = {k: v for k, v in plan.facts.items() if k != "self"}
    facts["cut"] = dict(facts["cut"])
    for file, numbers in rows.items():
        path = data.root / file
        forget_places(data.local(path), numbers)
        data.push(path)
        if file in facts["cut"]:
            facts["cut"][file] = sha256_file(path)
    write_json(data.plan_record, {**facts, "self": record_digest(facts)})
    data.push(data.plan_record)
    data.forget_plan()


# --------------------------------------------------------------------------------------------------------- one shard


def _take_out(data: Data, shard: int, keys: set[str], date: str) -> None:
    """The fetched shard, its vectors and its columns without these images, and their records."""
    columns = data.annotated()
    fetched, embedded = data.fetched_record(shard), data.embedded_record(shard)
    made = {data.annotations_record(name, shard): data.annotations(name, shard) for name in columns}
    copy = data.taken_back(f"shard-{shard}")
    before = keep_records(data, copy, [fetched, embedded, *made])
    if fetched not in before:
        return
    logs = [data.answers(name, shard) for name in columns]
    data.bring(*(data.root / name for record in before.values() for name in record["outputs"]))
    forget_answers(data, shard, keys, logs)
    subset_tar(data.tar(shard), keys)
    facts = {fetched: fetched_facts(before[fetched], forget_rows(data.table(shard), keys, date), keys)}
    if embedded in before:
        facts[embedded] = counted(before[embedded], "sample_count", subset_vectors(data, shard, keys))
    for record, path in made.items():
        if record in before:
            facts[record] = counted(before[record], "count", subset_table(path, keys))
    moved: Moved = {}
    for value in before.values():
        for name, sha256 in output_digests(value).items():
            moved[name] = sha256, sha256_file(data.root / name)
    for record, value in before.items():
        commit_again(data, record, value, moved, facts[record])
    data.remove(copy)
    data.release_shard(shard, columns)


def keep_records(data: Data, copy: Path, records: Collection[Path]) -> dict[Path, dict[str, Any]]:
    """Keep records aside, all in one file, and take them back; those that there are, as they were before a removal
    touched them."""
    kept = kept_aside(data, copy)
    if kept is None:
        there = {record: data.record(record) for record in records}
        kept = {r.relative_to(data.root).as_posix(): value for r, value in there.items() if "outputs" in value}
        keep_aside(data, copy, kept)
    found = {data.root / name: value for name, value in kept.items()}
    data.invalidate(*found)
    return found


def commit_again(data: Data, record: Path, before: Mapping[str, Any], moved: Moved, facts: Mapping[str, Any]) -> None:
    """Write the record of files that were rewritten, made from inputs that were too."""
    kept = {k: v for k, v in before.items() if k not in OF_RECORD}
    outputs = [data.root / name for name in before["outputs"]]
    inputs = moved_inputs(before["inputs"], moved)
    data.commit(record, config=before["config"], inputs=inputs, outputs=outputs, facts={**kept, **facts})


def counted(before: Mapping[str, Any], name: str, now: int) -> dict[str, int]:
    """What a record counts of images (as `name`), once there are fewer."""
    facts = {name: now} if name in before else {}
    if "asked" in before and name in before:
        facts["asked"] = max(0, before["asked"] - (before[name] - now))
    return facts


def fetched_facts(before: Mapping[str, Any], table: pa.Table, keys: Collection[str]) -> dict[str, Any]:
    """The counts of a fetched shard's record, as its table has them now."""
    statuses = table["status"].to_pylist()
    reasons = table["reason"].to_pylist() if "reason" in table.column_names else [None] * len(statuses)
    count, plain = Counter(statuses), (Status.SUCCESS, Status.REJECTED_EARLY)
    facts: dict[str, Any] = {"removed": count[Status.REMOVED]}
    for name, status in (
        ("successes", Status.SUCCESS),
        ("failed_to_download", Status.FAILED_TO_DOWNLOAD),
        ("failed_to_resize", Status.FAILED_TO_RESIZE),
    ):
        if name in before:
            facts[name] = count[status]
    if "status_dict" in before:
        facts["status_dict"] = dict(Counter(s if s in plain else r for s, r in zip(statuses, reasons, strict=True)))
    if "rejected_early" in before:
        pairs = zip(statuses, reasons, strict=True)
        facts["rejected_early"] = dict(Counter(r for s, r in pairs if s == Status.REJECTED_EARLY))
    if "faces_blurred" in before:
        facts["faces_blurred"] = pc.sum(table["faces_blurred"]).as_py() or 0
    if "retries" in before:
        facts["retries"] = [
            {**retry, "recovered": [k for k in retry["recovered"] if k not in keys]} for retry in before["retries"]
        ]
    return facts


# ------------------------------------------------------------------------------------------------------- whole tables


def _moved_tables(data: Data, removal: Removal) -> Moved:
    """What stages that read whole tables note of these: before, and now."""
    if not removal.tables:
        return {}
    now = table_digests(tables(data))
    return {name: (before, now[name]) for name, before in removal.tables.items() if name in now}


def _whole_tables(data: Data, keys: Collection[str], moved: Moved) -> None:
    """The records of columns that were made from whole tables, and the index of near-duplicates: the pairs without
    these images; all else in it is made anew when it is needed."""
    for name in data.annotated():
        records = [data.annotations_record(name, s) for s in data.shards(partial(data.annotations_record, name))]
        facts = dict[str, Any]()
        if records and data.record(records[0]).get("annotator") == "near-duplicates":
            facts = _forget_pairs(data, name, keys)
        for record in records:
            value = data.record(record)
            inputs = moved_inputs(value.get("inputs", {}), moved)
            more = {k: v for k, v in facts.items() if k in value and value[k] != v}
            if "outputs" in value and (inputs != value["inputs"] or more):
                data.recommit(record, inputs, facts=more)


def _forget_pairs(data: Data, name: str, keys: Collection[str]) -> dict[str, Any]:
    index, file = data.index(name), data.index(name) / FILE
    data.remove(*(path for path in data.store.walk(index) if path != file))
    for folder in data.store.folders(index):
        shutil.rmtree(index / folder, ignore_errors=True)
    if not data.exists(file):
        return {}
    table = read_table(data.local(file))
    gone = pa.array([int(key) for key in keys], pa.uint64())
    left = table.filter(pc.invert(pc.or_(pc.is_in(table["key"], gone), pc.is_in(table["near"], gone))))
    if len(left) < len(table):
        with atomic(file) as f:
            pq.write_table(left, f, compression="zstd")
        data.push(file)
    return {FACT: sha256_file(file)}


# --------------------------------------------------------------------------------------------------------- selections


def _forget_verdicts(data: Data, name: str, keys: Collection[str], removal: Removal, moved: Moved) -> None:
    """The rows are not fetched any more, and counted as removed; all other verdicts stay."""
    record, path = data.selection_record(name), data.verdicts(name)
    copy = data.taken_back(f"selected-{name}")
    kept = kept_aside(data, copy)
    if kept is None:
        value = data.record(record)
        if "kept" not in value or not data.exists(path):
            return
        table = read_table(data.local(path))
        verdicts = table.filter(pc.is_in(table["key"], pa.array([*keys], pa.string())))["verdict"].to_pylist()
        kept = {"record": value, "verdicts": dict(Counter(verdicts))}
        keep_aside(data, copy, kept)
    before = kept["record"]
    data.invalidate(record)
    forget_verdicts(data.local(path), keys)
    facts = without_images(before, kept["verdicts"], removal.without, removal.early)
    commit_again(data, record, before, moved, facts)
    file = f"selected/{name}.parquet"
    moved[f"selected {name}"] = before["outputs"][file]["sha256"], sha256_file(path)
    removal.said.setdefault("selections", {})[name] = kept["verdicts"]


# ------------------------------------------------------------------------------------------------------- and the rest


def _forget_the_rest(data: Data, removal: Removal, keys: Collection[str]) -> dict[str, int]:
    """Ratings of the images, what the studio keeps, sheets and charts, lines of logs, latents."""
    names, lines, ratings = {*removal.names, *removal.entries}, 0, 0
    # a studio that runs holds this while it writes, and reads what another has written before
    with held(data.ratings_lock) if data.ratings_lock.parent.is_dir() else contextlib.nullcontext():
        for path in data.store.walk(data.root / RATINGS):
            if path.suffix == ".csv" and not path.name.startswith("."):
                ratings += _without_lines(data, path, partial(_rates, keys=keys))
    for path in data.store.walk(data.logs):
        if path != data.rates:
            lines += _without_lines(data, path, partial(_tells, names=names))
    sheets = [p for p in data.store.walk(data.root / "report") if p.suffix == ".png"]
    data.remove(*sheets)
    _remove_folder(data, data.root / "studio")
    for folder in removal.latents:
        _remove_folder(data, Path(folder))
    return {"ratings": ratings, "log_lines": lines, "sheets": len(sheets)}


def _without_lines(data: Data, path: Path, gone: Callable[[str], bool]) -> int:
    """Take lines out of a text file; how many."""
    count = 0

    def edit(before: bytes) -> bytes:
        nonlocal count
        lines = before.splitlines(keepends=True)
        left = [line for line in lines if not gone(line.decode("utf-8", "replace"))]
        count = len(lines) - len(left)
        return b"".join(left) if count else before

    plain = data.url is not None or (path.is_file() and not path.is_symlink())  # of a store it need not be here
    if plain and data.exists(path):
        data.store.change(path, edit)
    return count


def _rates(line: str, keys: Collection[str]) -> bool:
    row = next(csv.reader([line]), [])
    return any(value in keys for value in row[:2])  # one image, or the two of a pair


def _tells(line: str, names: Collection[str]) -> bool:
    found = re.findall(r"https?://[^\s\"'<>]+", line)
    urls = {text for url in found for text in (url, url.rstrip(".,;:)]"))}
    return any(digests[0].hex() in names for url in urls if (digests := digests_of(url)))


def _remove_folder(data: Data, folder: Path, last: Path | None = None) -> None:
    data.remove(*(path for path in data.store.walk(folder) if path != last))
    if last is not None:
        data.remove(last)
    for _ in range(_TRIES):  # a studio that makes its index puts files there until it finds that the folder is gone
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
