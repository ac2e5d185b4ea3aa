"""The chosen images as shards of their own: bytes copied from `fetched/`, rows from the ledger, in a seeded shuffle.

What comes out is what webdataset, open_clip and clip-retrieval read: even shards with contiguous numbers, `sizes.json`,
a parquet beside each tar, keys that say which row of the list a sample was. The folder appears as a whole or not at
all. Memory holds a few numbers for each chosen row and the text of one shard, never the images.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.files import atomic, scratch_path, write_atomic
from aesthetic.untrusted import markdown, markdown_code
from curate.layout import Data, shard_name
from curate.ledger.balance import balance_words
from curate.ledger.rules import DENIED, KEPT, NOT_FETCHED, UNJUDGED, read_rules
from curate.ledger.schema import RESERVED, list_name, stored_name
from curate.ledger.select import NothingKept, Selection, load_selection
from curate.ledger.sql import batches, quote
from curate.ledger.view import (
    LedgerTable,
    current_tables,
    fetched_columns,
    hidden_columns,
    notes_of,
    open_ledger,
    recorded_columns,
    table_digests,
    tables,
)
from curate.shards.tar import CorruptShard, TarWriter, image_member, index_tar, read_range
from curate.store.files import check_space, digest, is_scratch, left_over, read_json, sha256_file, write_json
from curate.store.records import is_done, read_record, record_digest

_FORMAT = 1  # of the shards; part of what makes them stale
_OPEN_FILES = 64
_MEMORY = "2GB"  # of DuckDB, which sorts the rows' text and spills the rest beside the data


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """How the chosen images are laid into shards."""

    shard_size: int = 10000  # samples per shard at most; shards are even
    seed: int = 0  # of the order of samples

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise UserError(f"pack.shard_size is {self.shard_size}: at least 1 is expected")


@dataclass(frozen=True)
class _Chosen:
    """The chosen rows in the order in which they are packed: arrays of one length, and the tars they index."""

    keys: pa.Array
    tar: np.ndarray  # which tar of `tars`
    offset: np.ndarray  # of the image in it, bytes
    size: np.ndarray
    extension: np.ndarray  # which of `extensions`
    tars: list[Path]
    extensions: list[str]


def pack(
    data: Data, name: str, config: PackConfig, progress: Callable[[int], None] = lambda packed: None
) -> dict[str, Any]:
    """Write `shards/NAME/` from the selection NAME, unless that is done; returns the manifest.

    The order is a function of keys and seed alone. `progress` is called with the number of samples packed so far.
    Raises NothingKept where the selection kept nothing, UserError where there is no such selection or it was made from
    other data than is there now, CorruptShard where an image is not in its tar, DiskFull.
    """
    selection = load_selection(data, name)
    made_from: Mapping[str, str] = read_record(data.selection_record(name))["inputs"]
    all_tables = tables(data)
    now = table_digests(all_tables)
    stale = [t for t in made_from if t in now and now[t] != made_from[t]]
    stale += sorted(
        {*hidden_columns(all_tables).values()} - made_from.keys()
    )  # what says which images must not be seen
    if stale:
        raise UserError(
            f"the selection {name} was made before {', '.join(stale)} changed. "
            f"`tastemaker select {data.root} --name {name}` makes it anew."
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
    inputs = {"selected": sha256_file(data.verdicts(name)), **{t.name: now[t.name] for t in found}}
    identity = digest([_FORMAT, asdict(config), selection.to_json()])
    folder = data.packed(name)
    if is_done(data.root, data.manifest(name), config=identity, inputs=inputs):
        return read_json(data.manifest(name))

    _check_folder(folder)
    for leftover in left_over(folder.parent):  # of a process that was killed
        if leftover.name.startswith(f".{name}.") and leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
    building, old = scratch_path(folder), scratch_path(folder)
    building.mkdir(parents=True)
    try:
        chosen = _choose(data, name, config, found)
        check_space(data.root, int(chosen.size.sum()))
        sizes = _write_shards(data, building, chosen, config, found, progress)
        left_out = [t.name for t in all_tables if t not in found]
        facts = _facts(data, selection, config, len(sizes), found, left_out)
        write_json(building / "sizes.json", sizes)
        columns = pq.read_schema(building / f"{shard_name(0)}.parquet").names
        write_atomic(building / "README.md", _card(facts, selection, columns).encode())
        files = sorted(building.iterdir())  # under the paths that they are going to have
        outputs = {f"shards/{name}/{p.name}": {"sha256": sha256_file(p), "bytes": p.stat().st_size} for p in files}
        facts |= {"config": identity, "inputs": inputs, "outputs": outputs}
        write_json(building / "manifest.json", {**facts, "self": record_digest(facts)})
        if folder.exists():
            folder.rename(old)
        building.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return read_json(data.manifest(name))


def _check_folder(folder: Path) -> None:
    """UserError where the folder of packed shards, which is replaced as a whole, holds a file that we did not pack."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(
            f"{folder} is a link or a file; shards are packed into a folder of that name: move it elsewhere"
        )
    if not folder.is_dir():
        return
    record = read_json(folder / "manifest.json")
    packed = (folder / "sizes.json").is_file() if record is None else "self" in record
    ours = re.compile(r"manifest\.json|sizes\.json|README\.md|\d{5,}\.(tar|parquet)" if packed else "")
    others = sorted(n for n in os.listdir(folder) if not (ours.fullmatch(n) or is_scratch(n)))
    if others:
        raise UserError(
            f"{folder} holds {others[0]}, which was not packed, and would be replaced as a whole: "
            "move it elsewhere, or give another --name"
        )


# ----------------------------------------------------------------------------------------------------------- choosing


def _choose(data: Data, name: str, config: PackConfig, found: list[LedgerTable]) -> _Chosen:
    """Find the image of every kept row, and shuffle."""
    verdicts = pq.read_table(data.verdicts(name))
    kept = verdicts.filter(pc.equal(verdicts["verdict"].cast(pa.string()), KEPT))["key"].combine_chunks()
    del verdicts
    seed = str(config.seed).encode()
    marks = np.fromiter(
        (int.from_bytes(hashlib.blake2b(k.encode(), digest_size=8, key=seed).digest()) for k in kept.to_pylist()),
        np.uint64,
        len(kept),
    )
    order = np.argsort(marks, kind="stable")  # where marks agree, the order of keys
    shuffled = kept.take(pa.array(order))

    tar, offset, size = np.full(len(kept), -1, np.int32), np.zeros(len(kept), np.int64), np.zeros(len(kept), np.int64)
    extension, extensions, tars = np.zeros(len(kept), np.int16), list[str](), list[Path]()
    numbers = kept.cast(pa.uint64()).to_numpy()  # ascending
    for table in found[0].files:
        keys = pq.read_table(table, columns=["key"])["key"]
        if not len(keys):
            continue
        bounds = pc.min_max(keys.cast(pa.uint64())).as_py()
        low, high = np.searchsorted(numbers, bounds["min"], "left"), np.searchsorted(numbers, bounds["max"], "right")
        places = low + pc.index_in(keys, kept[low:high]).drop_null().to_numpy()
        if not len(places):
            continue
        tars.append(table.with_suffix(".tar"))
        index = index_tar(tars[-1])
        for place in places:
            key = kept[int(place)].as_py()
            image = image_member(index.get(key, {}))
            if image is None:
                raise CorruptShard(
                    f"{tars[-1]} holds no image of {key}. `tastemaker verify {data.root}` looks for damage."
                )
            kind, (at, length) = image
            if kind not in extensions:
                extensions.append(kind)
            tar[place], offset[place], size[place] = len(tars) - 1, at, length
            extension[place] = extensions.index(kind)
    if (tar < 0).any():
        lost = kept[int(np.argmax(tar < 0))].as_py()
        raise UserError(f"the selection {name} keeps {lost}, which fetched/ does not hold: make the selection anew")
    return _Chosen(shuffled, tar[order], offset[order], size[order], extension[order], tars, extensions)


# ------------------------------------------------------------------------------------------------------------ writing


def _cuts(count: int, shard_size: int) -> list[int]:
    """Where shards begin and end: as few as shard_size allows, of sizes that differ by one at most."""
    shards = math.ceil(count / shard_size)
    return [count * i // shards for i in range(shards + 1)]


def _write_shards(
    data: Data,
    folder: Path,
    chosen: _Chosen,
    config: PackConfig,
    found: list[LedgerTable],
    progress: Callable[[int], None],
) -> dict[str, int]:
    """Write each shard's tar and parquet; returns {tar: samples}."""
    cuts = _cuts(len(chosen.keys), config.shard_size)
    sizes = {}
    parts = _tables_in_order(data, chosen.keys, found, cuts)
    with _OpenTars() as tars, contextlib.closing(parts):
        for shard, table in enumerate(parts):
            path = folder / f"{shard_name(shard)}.tar"
            with atomic(path) as f:
                out = TarWriter(f)
                for i, row in enumerate(table.to_pylist(), cuts[shard]):
                    tar = chosen.tars[chosen.tar[i]]
                    image = read_range(tars.get(tar), (int(chosen.offset[i]), int(chosen.size[i])))
                    extension = chosen.extensions[chosen.extension[i]]
                    out.add_sample(row["key"], image, extension, row["caption"], _without_nan(row))
                out.close()
            with atomic(path.with_suffix(".parquet")) as f:
                pq.write_table(table, f, compression="zstd")
            sizes[path.name] = len(table)
            progress(cuts[shard + 1])
    return sizes


class _OpenTars:
    """Tars kept open, the least recently used closed first."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, BinaryIO] = OrderedDict()

    def __enter__(self) -> _OpenTars:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def get(self, path: Path) -> BinaryIO:
        if path not in self._files:
            if len(self._files) == _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[path] = open(path, "rb")  # noqa: SIM115 - closed when it is the oldest, or at the end
        self._files.move_to_end(path)
        return self._files[path]


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return value


def _tables_in_order(
    data: Data, keys: pa.Array, found: list[LedgerTable], cuts: list[int]
) -> Generator[pa.Table, None, None]:
    """The ledger's rows in the packed order, a table for each shard. DuckDB sorts, and spills what does not fit."""
    fetched = pq.read_schema(found[0].files[0])
    added = [pa.field(c, pq.read_schema(t.files[0]).field(c).type) for t in found[1:] for c in t.columns]
    taken = RESERVED | {f.name for f in added}
    # a list may have a column that is called like one of an annotator's
    fields = [f if f.name in RESERVED else f.with_name(stored_name(list_name(f.name), taken)) for f in fetched]
    source = [f.name for f in fields if f.name not in RESERVED]
    schema = pa.schema([*fields, *added])
    needed = {*(f.name for f in added), *(f"source.{n}" for n in fetched_columns(fetched)[1])}
    with open_ledger(data, needed, memory_limit=_MEMORY) as con:
        con.register("_order", pa.table({"key": keys, "place": pa.array(np.arange(len(keys)))}))
        items = [f"l.{quote(n)}" for n in schema.names if n not in source] + (["l.source"] if source else [])
        joined = '_order o JOIN ledger l ON l."key" = o."key"'
        stream = batches(con, f"SELECT {', '.join(items)} FROM {joined} ORDER BY o.place", 1 << 14)
        rest = pa.table({})
        for start, end in itertools.pairwise(cuts):
            parts = [rest] if rest.num_rows else []
            while sum(p.num_rows for p in parts) < end - start:
                batch = next(stream, None)
                if batch is None:
                    raise UserError(f"{data.root} lost rows while they were packed: is another process at work there?")
                parts.append(pa.Table.from_batches([batch]))
            table = pa.concat_tables(parts)
            rest = table.slice(end - start)
            columns = [
                (pc.struct_field(table["source"], source.index(f.name)) if f.name in source else table[f.name])
                .slice(0, end - start)
                .cast(f.type)
                for f in schema
            ]
            yield pa.table(columns, schema=schema)


# ----------------------------------------------------------------------------------------------------------- manifest


def _facts(
    data: Data, selection: Selection, config: PackConfig, shards: int, found: list[LedgerTable], left_out: list[str]
) -> dict[str, Any]:
    """What the manifest says beside files and digests."""
    hashes = {facts.get("denied_hashes") for facts in found[0].facts}
    recipe = data.recipe.read_text() if data.recipe.exists() else None
    return {
        "name": selection.name,
        "count": selection.kept,
        "shards": shards,
        "pack": asdict(config),
        "selection": selection.to_json(),
        "funnel": selection.funnel,
        "space": {k: v for k, v in read_record(data.space).items() if k != "probes"},
        "columns": recorded_columns(found),
        "left_out": left_out,  # tables that were not complete
        "recipe": recipe,
        "recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest() if recipe is not None else None,
        **({"denied_hashes": hashes.pop()} if len(hashes) == 1 and hashes != {None} else {}),
    }


# ---------------------------------------------------------------------------------------------------------------- card


def _card(facts: Mapping[str, Any], selection: Selection, columns: Sequence[str]) -> str:
    """A dataset card as the Hugging Face hub shows them: a YAML header, then what these shards are and came from."""
    count = selection.kept
    total = sum(selection.funnel.values())
    bounds = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
    size = next((word for bound, word in bounds if count < bound), "10M<n<100M" if count < 10**8 else "100M<n<1B")
    header = {
        "pretty_name": facts["name"],
        "license": "other",
        "license_name": "unknown-per-image",
        "task_categories": ["text-to-image", "image-to-text"],
        "size_categories": [size],
        "tags": ["webdataset", "image-text"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}],
    }
    lines = ["---", *(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in header.items()), "---", ""]
    lines += [
        f"# {facts['name']}",
        "",
        f"{count:,} images in {facts['shards']:,} webdataset shards, chosen from a list of {total:,} rows.",
        "A sample is `KEY.jpg` (or its kind), `KEY.json` (the row) and `KEY.txt` (the caption, or nothing).",
        "`NNNNN.parquet` holds the rows of `NNNNN.tar` in the same order, `sizes.json` the samples per shard,",
        "`manifest.json` the sha256 of every file, the recipe and what each number was made by.",
        "",
        "## How the images were chosen",
        "",
        "| verdict | rows | share | marginal | condition |",
        "|---|--:|--:|--:|---|",
    ]
    reasons = ", ".join(f"{r} {n:,}" for r, n in selection.not_fetched.items())
    denied = ", ".join(f"{markdown_code(column)} {n:,}" for column, n in selection.denied.items())
    table = [(NOT_FETCHED, "", reasons), *([(DENIED, "", denied)] if denied else [])] + [
        (r.name, f"{r.marginal:,}", markdown_code(r.condition)) for r in selection.rules
    ]
    if selection.unjudged:
        table.append((UNJUDGED, "", "rejected by early rules that are not among these"))
    for verdict, marginal, text in [*table, (KEPT, "", "")]:
        rows = selection.funnel[verdict]
        lines.append(f"| {markdown(verdict)} | {rows:,} | {rows / total:.1%} | {marginal} | {text} |")
    lines += [
        "",
        "Rules were applied in this order; a row counts for the first that rejected it.",
        "*Marginal* is what a rule would reject without the others.",
        "",
    ]
    if selection.early:
        early = ", ".join(f"{markdown(rule)} {n:,}" for rule, n in selection.early.items())
        lines += [
            f"Some rules were applied early, and what they rejected was not stored ({early} rows): other rules say",
            "nothing of these, and what looks at all rows (`top`, `best_of` and the like) looked at the others.",
            "",
        ]
    for column, became in selection.clusters.items():
        lines += [f"{markdown_code(column)}: {balance_words(became)}.", ""]
    if notes := _notes(facts["columns"], selection):
        lines += [
            "Of what these columns say:",
            "",
            *(f"- {markdown_code(column)}: {markdown(note)}" for note, column in notes.items()),
            "",
        ]
    if facts["columns"] or facts["space"]:
        lines += ["## What the columns were made by", ""]
        if encoder := facts["space"].get("encoder"):
            lines.append(f"- embeddings: {markdown_code(encoder)}, space `{facts['space'].get('fingerprint', '')}`")
        for column, made in facts["columns"].items():
            maker = made.get("head") or made.get("annotator") or "unknown"
            words = [markdown(str(word)) for word in (made.get("meaning"), made.get("unit")) if word]
            if scale := made.get("scale"):
                words.append(f"from {scale[0]:g} to {scale[1]:g}")
            lines.append(f"- {markdown_code(column)}: {', '.join([markdown(maker), *words])}")
        lines += ["", "A score means something only beside others of the same head.", ""]
    lines += [
        "## Columns",
        "",
        ", ".join(map(markdown_code, columns)),
        "",
        "## Licences",
        "",
        "The images belong to whoever made them, under terms that this collection neither knows nor changes;",
        "a URL and a score grant no right. Columns of the list that speak of licences are kept with each sample.",
        "Look up and respect the terms of each image before use, and remove it when its owner asks.",
        "",
    ]
    return "\n".join(lines)


def _notes(columns: Mapping[str, Mapping[str, Any]], selection: Selection) -> dict[str, str]:
    """What is to be known of the columns that decided, those that a rule names and those that hide images: note -> the
    first of these columns that it is of."""
    rules = read_rules({r.name: r.condition for r in selection.rules}, columns)
    named = {c for rule in rules.values() if rule for c in rule.columns}
    decided = {column: made for column, made in columns.items() if column in named or made.get("hidden")}
    notes = dict[str, str]()
    for column, made in decided.items():
        for note in notes_of([made]):
            notes.setdefault(note, column)
    return notes
