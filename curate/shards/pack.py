"""The chosen images as shards of their own: bytes copied from `fetched/`, rows from the ledger, in a seeded shuffle.

What comes out is what webdataset, open_clip and clip-retrieval read: even shards with contiguous numbers, `sizes.json`,
a parquet beside each tar, keys that say which row of the list a sample was. The folder appears as a whole or not at
all. Each source shard is read once, in order (curate.shards.shuffle).
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.files import atomic, scratch_path, write_atomic
from curate.layout import Data, shard_name
from curate.ledger.schema import RESERVED, list_name, stored_name
from curate.ledger.select import NothingKept, Selection, load_selection
from curate.ledger.view import (
    LedgerTable,
    conform,
    current_tables,
    hidden_columns,
    recorded_columns,
    table_digests,
    tables,
)
from curate.shards.card import card_text
from curate.shards.croissant import CROISSANT, packed_croissant
from curate.shards.indexes import (
    ENERGON,
    image_extensions,
    indexed_extensions,
    shard_indexes,
    write_folder_indexes,
    write_shard_indexes,
)
from curate.shards.shuffle import Buckets, Hashes, KeptKeys, cuts, first_hashes
from curate.shards.tar import CorruptShard, TarWriter, image_member, index_tar, read_range
from curate.store.files import (
    check_space,
    digest,
    is_scratch,
    left_over,
    read_json,
    read_table,
    sha256_file,
    write_json,
)
from curate.store.records import read_record, record_digest

_FORMAT = 1  # of the shards; part of what makes them stale
_AT_ONCE = 1000  # samples that are made of rows at once
_PLAIN = frozenset((str, int, bool, type(None)))


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """How the chosen images are laid into shards."""

    shard_size: int = 10000  # samples per shard at most; shards are even
    seed: int = 0  # of the order of samples

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise UserError(f"pack.shard_size is {self.shard_size}: at least 1 is expected")


def pack(
    data: Data, name: str, config: PackConfig, progress: Callable[[int], None] = lambda packed: None
) -> dict[str, Any]:
    """Write `shards/NAME/` from the selection NAME, unless that is done; returns the manifest.

    The order is a function of keys and seed alone. `progress` is called with how far it is, in samples.
    Raises NothingKept where the selection kept nothing, UserError where there is no such selection or it was made from
    other data than is there now, CorruptShard where an image is not in its tar, DiskFull.
    """
    selection = load_selection(data, name)
    made_from: Mapping[str, str] = data.record(data.selection_record(name))["inputs"]
    all_tables = tables(data)
    now = table_digests(all_tables)
    stale = [t for t in made_from if t in now and now[t] != made_from[t]]
    stale += sorted(
        {*hidden_columns(all_tables).values()} - made_from.keys()
    )  # what says which images must not be seen
    if stale:
        raise UserError(
            f"the selection {name} was made before {', '.join(stale)} changed. "
            f"`tastemaker select {data} --name {name}` makes it anew."
        )
    found = current_tables(data, all_tables, made_from.keys())
    if not selection.kept:
        if not selection.fetched:
            raise NothingKept(f"the selection {name} kept nothing: none of {selection.rows:,} rows has an image")
        if sum(selection.denied.values()) == selection.fetched:
            raise NothingKept(f"the selection {name} kept nothing: all of {selection.fetched:,} images are denied")
        hardest = max(selection.rules, key=lambda r: r.marginal)
        raise NothingKept(
            f"the selection {name} kept none of {selection.fetched:,} images. "
            f"The hardest rule is {hardest.name} ({hardest.condition}), which alone rejects {hardest.marginal:,}."
        )
    inputs = {"selected": sha256_file(data.local(data.verdicts(name))), **{t.name: now[t.name] for t in found}}
    identity = pack_identity(config, selection)
    folder = data.packed(name)
    if data.is_done(data.manifest(name), config=identity, inputs=inputs):
        record = data.record(data.manifest(name))
        return record if f"shards/{name}/{CROISSANT}" in record["outputs"] else _add_indexes(data, name, record)

    _check_folder(data, folder)
    data.remove(data.sheet(name), data.charts(name))  # of what was packed before
    for leftover in left_over(folder.parent):  # of a process that was killed
        if leftover.name.startswith(f".{name}.") and leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
    # on a disk the whole folder is replaced at once; on a store each file is put as it is made, the manifest last
    building, old = scratch_path(folder) if data.url is None else folder, scratch_path(folder)
    if data.url is not None:
        data.invalidate(data.manifest(name))
    building.mkdir(parents=True, exist_ok=True)
    try:
        sizes, outputs = _write_shards(data, building, selection, config, found, progress)
        left_out = [t.name for t in all_tables if t not in found]
        facts = _facts(data, selection, config, len(sizes), found, left_out)
        write_json(building / "sizes.json", sizes)
        schema = pq.read_schema(data.local(building / f"{shard_name(0)}.parquet"))
        write_atomic(building / "README.md", card_text(facts, selection, schema.names).encode())
        write_atomic(building / CROISSANT, packed_croissant(facts, outputs, schema, _extensions(data, building)))
        outputs |= {file: _output(building / file) for file in ("sizes.json", "README.md", CROISSANT)}
        named = {f"shards/{name}/{file}": output for file, output in sorted(outputs.items())}  # where they will be
        facts |= {"config": identity, "inputs": inputs, "outputs": named}
        write_json(building / "manifest.json", {**facts, "self": record_digest(facts)})
        if data.url is None:
            if folder.exists():
                folder.rename(old)
            building.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            packed = {folder / file for file in outputs}
            data.remove(*(found for found in data.store.walk(folder) if found not in packed))
            data.push(*(folder / file for file in ("sizes.json", "README.md", CROISSANT, "manifest.json")))
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return data.record(data.manifest(name))


def pack_identity(config: PackConfig, selection: Selection) -> str:
    """The `config` of the manifest of what is packed of a selection."""
    return digest([_FORMAT, asdict(config), selection.to_json()])


def _check_folder(data: Data, folder: Path) -> None:
    """UserError where the folder of packed shards, which is replaced as a whole, holds a file that we did not pack."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(
            f"{folder} is a link or a file; shards are packed into a folder of that name: move it elsewhere"
        )
    if data.url is None and not folder.is_dir():
        return
    record = read_json(data.local(folder / "manifest.json"))
    # on a store what was packed by a run that was killed lies there without them
    packed = data.url is not None or (folder / "sizes.json").is_file() if record is None else "self" in record
    names = r"manifest\.json|sizes\.json|croissant\.json|README\.md|\.nv-meta|\d{5,}\.(tar|parquet|json|tar\.idx)"
    ours = re.compile(names if packed else "")
    others = sorted(n for n in data.store.names(folder) if not (ours.fullmatch(n) or is_scratch(n)))
    if others:
        raise UserError(
            f"{data.shown(folder)} holds {others[0]}, which was not packed, and would be replaced as a whole: "
            "move it elsewhere, or give another --name"
        )


# ----------------------------------------------------------------------------------------------------------- samples


def _stored_bytes(data: Data, selection: Selection, fetched: LedgerTable) -> int:
    """About how many bytes the kept images and their rows take: their share of all."""
    files = [path for table in fetched.files for path in (table, table.with_suffix(".tar"))]
    sizes = [stamp[0] for path in files if (stamp := data.store.stamp(path))]
    return sum(sizes) * selection.kept // selection.fetched


def _gather(
    found: list[LedgerTable], columns: _Columns, kept: KeptKeys, progress: Callable[[int], None]
) -> Iterator[tuple[pa.Table, Hashes, list[bytes]]]:
    """The kept samples in the order of their sources: rows, the hashes that order them, and the members of their tar.

    Each shard's files are read once, the images from the tar's beginning to its end.
    """
    data, others = columns.data, [dict(zip(table.shards, table.files, strict=True)) for table in found[1:]]
    for shard, path in zip(found[0].shards, found[0].files, strict=True):
        with pq.ParquetFile(data.local(path)) as file:
            keys = file.read(["key"])["key"].cast(pa.uint64()).to_numpy()
            if not len(keys):
                continue
            among, hashes = kept.among(keys)
            if not among.any():
                continue
            rows = file.read().filter(pa.array(among))
        tar = data.local(path.with_suffix(".tar"))
        index = index_tar(tar)
        images = [image_member(index.get(key, {})) for key in rows["key"].to_pylist()]
        del index
        if None in images:
            key = rows["key"][images.index(None)].as_py()
            raise CorruptShard(
                f"{data.shown(tar)} holds no image of {key}. `tastemaker verify {data}` looks for damage."
            )
        order = np.argsort([at for _, (at, _) in filter(None, images)], kind="stable")
        rows = columns.of(rows.take(order), [files.get(shard) for files in others])
        hashes = hashes[order]
        with open(tar, "rb") as f:
            for start in range(0, len(rows), _AT_ONCE):
                part = rows.slice(start, _AT_ONCE)
                samples = []
                for i, row in zip(order[start:], part.to_pylist(), strict=False):
                    extension, place = images[i]  # type: ignore[misc] # none is None
                    sample = io.BytesIO()
                    TarWriter(sample).add_sample(
                        row["key"], read_range(f, place), extension, row["caption"], _without_nan(row)
                    )
                    samples.append(sample.getvalue())
                yield part, hashes[start : start + _AT_ONCE], samples
                progress(len(part))
        data.release(tar)


class _Columns:
    """The columns of packed rows: those of `fetched` under the names that they have there, then the other tables'."""

    def __init__(self, data: Data, found: list[LedgerTable]) -> None:
        self.data = data
        self._fetched = found[0].schema
        self._others = list[tuple[str, pa.Schema]]()  # the key of a table, and what it adds
        for table in found[1:]:
            schema = pq.read_schema(data.local(table.files[0]))
            self._others.append((table.key, pa.schema([schema.field(c) for c in table.columns])))
        added = [pa.field(f.name, f.type) for _, schema in self._others for f in schema]
        taken = RESERVED | {f.name for f in added}
        # a list may have a column that is called like one of an annotator's
        own = [f if f.name in RESERVED else f.with_name(stored_name(list_name(f.name), taken)) for f in self._fetched]
        self.schema = pa.schema([*own, *added])

    def of(self, rows: pa.Table, others: list[Path | None]) -> pa.Table:
        """Rows of a fetched shard, and those of the same keys in the other tables, null where they have none."""
        columns = conform(rows, self._fetched).columns
        for (key, schema), path in zip(self._others, others, strict=True):
            if path is None:
                columns += [pa.nulls(len(rows), f.type) for f in schema]
                continue
            table = read_table(self.data.local(path))
            places = pc.index_in(rows["key"], table[key].combine_chunks())
            columns += [column.take(places) for column in conform(table, schema).columns]
        return pa.table(columns, schema=self.schema)


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: they become null."""
    return {k: v if type(v) in _PLAIN else _finite(v) for k, v in row.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value


# ------------------------------------------------------------------------------------------------------------ writing


def _write_shards(
    data: Data,
    folder: Path,
    selection: Selection,
    config: PackConfig,
    found: list[LedgerTable],
    progress: Callable[[int], None],
) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Write each shard's tar and parquet; returns {tar: samples} and {file: its sha256 and bytes}."""
    ranks = cuts(selection.kept, config.shard_size)
    scratch = folder / "scratch"
    scratch.mkdir()
    kept = KeptKeys(data.local(data.verdicts(selection.name)), scratch / "hashes", config.seed)
    columns = _Columns(data, found)
    buckets = Buckets(scratch, first_hashes(kept.hashes, ranks[1:-1]), columns.schema)
    stored = _stored_bytes(data, selection, found[0])
    check_space(data.root, stored + stored // buckets.count)  # each sample once, and those of a bucket twice
    done = 0

    def half(more: int) -> None:  # of the work: each sample is gathered, then written
        nonlocal done
        done += more
        progress(done // 2)

    for rows, hashes, samples in _gather(found, columns, kept, half):
        buckets.add(rows, hashes, samples)
    if done < selection.kept:
        raise UserError(
            f"the selection {selection.name} keeps {selection.kept - done:,} rows that fetched/ does not hold: "
            "make the selection anew"
        )
    sizes, outputs, extensions = dict[str, int](), dict[str, dict[str, Any]](), set[str]()
    for shard, (rows, members) in enumerate(buckets.shards()):
        path = folder / f"{shard_name(shard)}.tar"
        with atomic(path) as f:
            tar = TarWriter(f)
            for sample in members:
                tar.add_members(sample)
            tar.close()
        with atomic(path.with_suffix(".parquet")) as f:
            pq.write_table(rows, f, compression="zstd")
        files = path, path.with_suffix(".parquet"), *write_shard_indexes(path, rows)
        extensions |= image_extensions([path])
        outputs |= {file.name: _output(file) for file in files}
        if data.url is not None:
            data.push(*files)
            data.release(*files)
        sizes[path.name] = len(rows)
        half(len(rows))
    shutil.rmtree(scratch)
    indexes = write_folder_indexes(folder, sizes, extensions)
    data.push(*indexes)
    return sizes, outputs | {str(file.relative_to(folder)): _output(file) for file in indexes}


def write_indexes(
    data: Data, name: str, sizes: Mapping[str, int], known: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Write the indexes of packed shards anew; what the manifest says of them, {path: its sha256 and bytes}.

    sizes: {tar: samples}, in order.
    known: what it says of those that need no change, as their tars have not changed.
    """
    folder, extensions, outputs = data.packed(name), set[str](), dict[str, dict[str, Any]]()

    def at(file: Path) -> str:
        return file.relative_to(data.root).as_posix()

    for tar in (folder / file for file in sizes):
        files = shard_indexes(tar)
        if all(at(file) in known for file in files):
            data.bring(*files)
            outputs |= {at(file): known[at(file)] for file in files}
        else:
            data.bring(tar, tar.with_suffix(".parquet"))
            outputs |= {at(file): _output(file) for file in write_shard_indexes(tar)}
            data.push(*files)
        extensions |= image_extensions([tar])
        data.release(tar, tar.with_suffix(".parquet"), *files)
    written = write_folder_indexes(folder, sizes, extensions)
    data.push(*written)
    return outputs | {at(file): _output(file) for file in written}


def write_croissant(data: Data, name: str, facts: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Write croissant.json of packed shards anew; what the manifest says of it, {path: its sha256 and bytes}.

    facts: of the manifest; known: what it says of all other files.
    """
    folder = data.packed(name)
    schema = pq.read_schema(data.local(folder / f"{shard_name(0)}.parquet"))
    files = {Path(at).name: output for at, output in known.items()}
    write_atomic(folder / CROISSANT, packed_croissant(facts, files, schema, _extensions(data, folder)))
    data.push(folder / CROISSANT)
    return {f"shards/{name}/{CROISSANT}": _output(folder / CROISSANT)}


def _extensions(data: Data, folder: Path) -> list[str]:
    return indexed_extensions(data.local(folder / ENERGON / "dataset.yaml"))


def _add_indexes(data: Data, name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write what lies beside shards that were packed before there was all of it; nothing else is touched."""
    sizes, outputs = read_json(data.local(data.packed(name) / "sizes.json")), dict(record["outputs"])
    outputs |= write_indexes(data, name, sizes, outputs)
    outputs |= write_croissant(data, name, record, outputs)
    facts = {**record, "outputs": dict(sorted(outputs.items()))}
    write_json(data.manifest(name), {**facts, "self": record_digest(facts)})
    data.push(data.manifest(name))
    return data.record(data.manifest(name))


def _output(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


# ----------------------------------------------------------------------------------------------------------- manifest


def _facts(
    data: Data, selection: Selection, config: PackConfig, shards: int, found: list[LedgerTable], left_out: list[str]
) -> dict[str, Any]:
    """What the manifest says beside files and digests."""
    hashes = {facts.get("denied_hashes") for facts in found[0].facts}
    recipe = data.local(data.recipe).read_text() if data.exists(data.recipe) else None
    return {
        "name": selection.name,
        "count": selection.kept,
        "shards": shards,
        "pack": asdict(config),
        "selection": selection.to_json(),
        "funnel": selection.funnel,
        "space": {k: v for k, v in read_record(data.local(data.space)).items() if k != "probes"},
        "columns": recorded_columns(found),
        "left_out": left_out,  # tables that were not complete
        "recipe": recipe,
        "recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest() if recipe is not None else None,
        **({"denied_hashes": hashes.pop()} if len(hashes) == 1 and hashes != {None} else {}),
    }
