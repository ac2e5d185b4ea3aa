"""Shards of data folders, taken over into a merged one: images, rows, vectors and columns under new keys.

Nothing is fetched, decoded or computed. A file that stays what it is becomes a hard link where both folders lie on one
disk: stages replace files, and never write into one. Each file is read against its record, so what is damaged there is
refused here. A shard is done when its records are written; whoever is killed goes on with those that are not.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.files import atomic, scratch_path, sync
from aesthetic.untrusted import open_vectors
from curate.annotators.base import config_of
from curate.layout import EMBEDDED, Data
from curate.ledger.schema import Status, fetched_schema, make_key
from curate.ledger.view import conform
from curate.shards.remove import OF_RECORD, counted, fetched_facts
from curate.shards.subset import image_of_answer
from curate.shards.tar import CorruptShard, TarWriter, image_member, index_tar, read_range
from curate.sources.merging import Merge, Part
from curate.store.files import read_table, sha256_file
from curate.store.records import output_digests


@dataclass(frozen=True, kw_only=True)
class MergedConfig:
    """What the records of a merged folder say they were made with, and what in each folder counts as that."""

    fetched: str  # the hash of its fetch and images stages
    embedded: str  # and of its embed stage
    embedded_there: Sequence[str]  # that of each folder
    columns: Mapping[str, str]  # name -> the configuration of the columns that are taken over
    denied: Mapping[str, Any]  # `denied_by`: the digest of what no image here is denied by


@dataclass
class _Shard:
    """One shard on its way."""

    merge: Merge
    part: Part
    data: Data
    config: MergedConfig
    moved: dict[str, tuple[str, str, str]] = field(
        default_factory=dict
    )  # there -> its sha256, its name and sha256 here
    keys: dict[str, str] = field(default_factory=dict)  # there -> here, of rows that come in

    @property
    def source(self) -> Data:
        return self.merge.folders[self.part.folder]

    @property
    def same(self) -> bool:
        return stays(self.merge, self.part)


def stays(merge: Merge, part: Part) -> bool:
    """Whether all rows of a shard come in under the keys and with the columns that they have."""
    plan = merge.folders[part.folder].plan
    same = make_key(part.shard, 0, plan.shard_size) == make_key(part.number, 0, merge.shard_size)
    return part.folder == 0 and same and bool(part.kept.all())


def copied_bytes(merge: Merge, data: Data) -> int:
    """Roughly how much is written, beside what is linked."""
    total = 0.0
    for part in merge.parts:
        source = merge.folders[part.folder]
        if stays(merge, part) and _one_disk(source, data):
            continue
        records = [source.fetched_record(part.shard), source.embedded_record(part.shard)]
        records += [source.annotations_record(name, part.shard) for name in source.annotated()]
        size = sum(fact["bytes"] for r in records for fact in source.record(r).get("outputs", {}).values())
        total += size * part.kept.mean()
    return int(total)


def column_configs(folders: Sequence[Data], names: Sequence[Collection[str]]) -> dict[str, str]:
    """Of columns with these names (of each folder, those whose values depend on their shard alone), the configuration
    that is taken over: that of the first folder which has any."""
    found = dict[str, str]()
    for data, wanted in zip(folders, names, strict=True):
        for name in {*wanted}.intersection(data.annotated()) - found.keys():
            records = (data.record(data.annotations_record(name, s.shard)) for s in data.plan.shards)
            if (record := next((r for r in records if "outputs" in r), None)) is not None:
                found[name] = record["config"]
    return found


def take_over(merge: Merge, part: Part, data: Data, config: MergedConfig) -> set[str]:
    """Take over a shard, as far as that is not done: what is fetched, and then `embedded` and columns, as far as they
    are up to date. The names of those that are there then.

    Raises UserError where a file there is not what its record says, DiskFull.
    """
    shard = _Shard(merge, part, data, config)
    source, n = shard.source, part.shard
    if not source.exists(source.fetched_record(n)):
        return set()
    _fetched(shard)
    made = set[str]()
    waiting = {EMBEDDED, *(name for name in source.annotated() if name in config.columns)}
    while todo := [name for name in sorted(waiting) if _inputs(shard, _record_there(shard, name)) is not None]:
        for name in todo:
            if _take_columns(shard, name):
                made.add(name)
        waiting -= {*todo}
    _answers(shard)
    data.release_shard(part.number, source.annotated())
    source.release_shard(n, source.annotated())
    return made


# -------------------------------------------------------------------------------------------------------- what is there


def _record_there(shard: _Shard, name: str) -> dict[str, Any]:
    source, n = shard.source, shard.part.shard
    record = source.embedded_record(n) if name == EMBEDDED else source.annotations_record(name, n)
    value = source.record(record)
    return value if "outputs" in value and source.outputs_present(record) else {}


def _inputs(shard: _Shard, record: Mapping[str, Any]) -> dict[str, str] | None:
    """What a record there was made from, as it is called here; None where that has changed since, or is not here."""
    if "outputs" not in record:
        return None
    found = dict[str, str]()
    for name, sha256 in record["inputs"].items():
        if name == "early":
            found[name] = sha256
        elif shard.moved.get(name, ("", "", ""))[0] == sha256:
            _, here, now = shard.moved[name]
            found[here] = now
        else:
            return None
    return found


# ----------------------------------------------------------------------------------------------------------- one stage


def _fetched(shard: _Shard) -> None:
    source, part, data = shard.source, shard.part, shard.data
    record, before = data.fetched_record(part.number), source.record(source.fetched_record(part.shard))
    files = {source.tar(part.shard): data.tar(part.number), source.table(part.shard): data.table(part.number)}
    source.bring(*files)
    table = read_table(source.table(part.shard))
    keys = [make_key(part.number, i, shard.merge.shard_size) for i in range(int(part.kept.sum()))]
    shard.keys = dict(zip(table.filter(pa.array(part.kept))["key"].to_pylist(), keys, strict=True))
    facts = dict[str, Any]()
    if not data.outputs_present(record):
        if shard.same:
            _take_files(shard, files, before)
        else:
            _check(shard, files, before)
            facts = _write_fetched(shard, table)
        facts = {**_facts(before), **facts, **shard.config.denied}
        facts.pop("retries", None)  # they name files that are not here
        inputs = {"plan": data.plan.shard_digest(part.number)}
        _commit(shard, record, before, files, config=shard.config.fetched, inputs=inputs, facts=facts)
    _note_moved(shard, files, before, record)


def _write_fetched(shard: _Shard, table: pa.Table) -> dict[str, Any]:
    """Write tar and table with the rows that come in; what the record counts of them."""
    source, part, data = shard.source, shard.part, shard.data
    columns = shard.merge.extra_columns[part.folder][source.plan.list_index(part.shard)]
    table = table.filter(pa.array(part.kept))
    there = table["key"].to_pylist()
    table = table.set_column(table.schema.get_field_index("key"), "key", pa.array(shard.keys.values(), pa.string()))
    table = conform(table, fetched_schema(columns))
    members = index_tar(source.tar(part.shard))
    with open(source.tar(part.shard), "rb") as images, atomic(data.tar(part.number)) as f:
        tar, index = TarWriter(f), 0
        for batch in table.to_batches(max_chunksize=1000):
            for row in batch.to_pylist():
                if row["status"] == Status.SUCCESS.value:
                    found = image_member(members.get(there[index], {}))
                    if found is None:
                        raise CorruptShard(f"{source.shown(source.tar(part.shard))}: has no image {there[index]}")
                    tar.add_sample(row["key"], read_range(images, found[1]), found[0], row["caption"], row)
                index += 1
        tar.close()
    with atomic(data.table(part.number)) as f:
        pq.write_table(table, f, compression="zstd")
    before = source.record(source.fetched_record(part.shard))
    return {**fetched_facts(before, table, ()), "count": len(table)}


def _take_columns(shard: _Shard, name: str) -> bool:
    """Take over vectors, or columns, whose inputs are here; whether they were made as those here are."""
    source, part, data = shard.source, shard.part, shard.data
    before, early = _record_there(shard, name), {}
    if name == EMBEDDED:
        if before.get("digest", before["config"]) != shard.config.embedded_there[part.folder]:
            return False
        record, count, early = data.embedded_record(part.number), "sample_count", before.get("early", {})
        config = config_of(shard.config.embedded, None, early)
        there = (source.image_vectors, source.text_vectors, source.metadata)
        here = (data.image_vectors, data.text_vectors, data.metadata)
        files = {a(part.shard): b(part.number) for a, b in zip(there, here, strict=True)}
        files = {a: b for a, b in files.items() if a.relative_to(source.root).as_posix() in before["outputs"]}
    else:
        if before["config"] != shard.config.columns[name]:
            return False
        record, count, config = data.annotations_record(name, part.number), "count", before["config"]
        files = {source.annotations(name, part.shard): data.annotations(name, part.number)}
    if not data.outputs_present(record):
        source.bring(*files)
        facts = _facts(before)
        if shard.same:
            _take_files(shard, files, before)
        else:
            _check(shard, files, before)
            rows = _write_columns(shard, files)
            facts |= counted(before, count, rows)
        facts |= {"digest": shard.config.embedded} if early else {}
        inputs = _inputs(shard, before)
        assert inputs is not None
        _commit(shard, record, before, files, config=config, inputs=inputs, facts=facts)
    _note_moved(shard, files, before, record)
    return True


def _write_columns(shard: _Shard, files: Mapping[Path, Path]) -> int:
    """Write a table with the images that come in, under their keys here, and their vectors; how many they are."""
    table_there = next(path for path in files if path.suffix == ".parquet")
    table = read_table(table_there)
    key = "key" if "key" in table.column_names else "image_path"
    keys = [shard.keys.get(k) for k in table[key].to_pylist()]
    kept = np.array([k is not None for k in keys], np.bool_)
    for path, to in files.items():
        if path == table_there:
            continue
        vectors = open_vectors(path)
        if len(vectors) != len(table):
            raise CorruptShard(f"{shard.source.shown(path)}: {len(vectors)} rows, and its metadata have {len(table)}")
        if kept.all():
            _take_file(shard.source, path, shard.data, to)
        else:
            with atomic(to) as f:
                np.save(f, np.array(vectors[kept]))
    table = table.filter(pa.array(kept))
    now = pa.array([k for k in keys if k is not None], pa.string())
    for name in ("key", "image_path"):
        if name in table.column_names:
            table = table.set_column(table.schema.get_field_index(name), name, now)
    with atomic(files[table_there]) as f:
        pq.write_table(table, f, compression="zstd")
    return len(table)


def _answers(shard: _Shard) -> None:
    """The answers of servers about images that come in: they were paid for. Such files grow in place, so they are
    copied."""
    source, part, data = shard.source, shard.part, shard.data
    logs = {source.answers(name, part.shard): data.answers(name, part.number) for name in source.annotated()}
    logs = {there: here for there, here in logs.items() if source.exists(there) and not data.exists(here)}
    if not logs:
        return
    left_out = set[str]()
    tar = source.local(source.tar(part.shard))
    with open(tar, "rb") as f:
        for key, members in index_tar(tar).items():
            if key not in shard.keys and (found := image_member(members)) is not None:
                left_out.add(hashlib.sha256(read_range(f, found[1])).hexdigest())
    for there, here in logs.items():
        lines = source.local(there).read_bytes().splitlines(keepends=True)
        with atomic(here) as f:
            f.write(b"".join(line for line in lines if image_of_answer(line) not in left_out))
        data.push(here)


# ------------------------------------------------------------------------------------------------------- files, records


def _facts(before: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in before.items() if k not in OF_RECORD}


def _commit(shard: _Shard, record: Path, before: Mapping[str, Any], files: Mapping[Path, Path], **commit: Any) -> None:
    value = shard.data.commit(record, outputs=[*files.values()], **commit)
    if shard.same:  # read just now, for the first time
        now = output_digests(value)
        wrong = [
            there for there, here in files.items() if now[_name(shard.data, here)] != _sha256(shard, before, there)
        ]
        if wrong:
            shard.data.invalidate(record)
            raise _damaged(shard.source, wrong[0])


def _check(shard: _Shard, files: Collection[Path], before: Mapping[str, Any]) -> None:
    """UserError where files there are not what their record says: what is made of them would hide that."""
    for path in files:
        if sha256_file(path) != _sha256(shard, before, path):
            raise _damaged(shard.source, path)


def _damaged(source: Data, path: Path) -> UserError:
    return UserError(
        f"{source.shown(path)}: is damaged, or has changed since this merge began. `tastemaker verify {source}` finds "
        "out, and says what to do"
    )


def _sha256(shard: _Shard, before: Mapping[str, Any], path: Path) -> str:
    digests = output_digests(before)
    return digests[_name(shard.source, path)]


def _name(data: Data, path: Path) -> str:
    return path.relative_to(data.root).as_posix()


def _note_moved(shard: _Shard, files: Mapping[Path, Path], before: Mapping[str, Any], record: Path) -> None:
    now = output_digests(shard.data.record(record))
    for there, here in files.items():
        name = _name(shard.data, here)
        shard.moved[_name(shard.source, there)] = _sha256(shard, before, there), name, now[name]


def _take_files(shard: _Shard, files: Mapping[Path, Path], before: Mapping[str, Any]) -> None:
    for there, here in files.items():
        _take_file(shard.source, there, shard.data, here)


def _take_file(source: Data, there: Path, data: Data, here: Path) -> None:
    """Have a file of one folder in another: a link to the same bytes where they lie on one disk, else a copy."""
    here.parent.mkdir(parents=True, exist_ok=True)
    if source.url is None and data.url is None:
        scratch = scratch_path(here)
        with contextlib.suppress(OSError):  # another disk, or one without links
            os.link(os.path.realpath(there), scratch)
            os.replace(scratch, here)
            sync(here.parent)
            return
    with open(there, "rb") as f, atomic(here) as to:
        shutil.copyfileobj(f, to, 1 << 20)


def _one_disk(source: Data, data: Data) -> bool:
    if source.url is not None or data.url is not None:
        return False
    there = next(folder for folder in (data.root, *data.root.parents) if folder.exists())
    return os.stat(source.root).st_dev == os.stat(there).st_dev
