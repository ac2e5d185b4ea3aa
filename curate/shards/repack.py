"""Packed shards without some of their images: rewritten where they hold one, so that every reader takes them as before,
and with a manifest that is true of them."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.files import write_atomic
from curate.layout import Data, shard_name
from curate.ledger.rules import KEPT
from curate.ledger.select import Selection
from curate.shards.card import card_text
from curate.shards.indexes import is_index
from curate.shards.pack import PackConfig, pack_identity, write_croissant, write_indexes
from curate.shards.subset import Moved, keep_aside, kept_aside, moved_inputs, subset_table, subset_tar, without_images
from curate.store.files import read_table, sha256_file, write_json
from curate.store.records import record_digest

_SHARD = re.compile(r"\d{5,}\.(tar|parquet)")
_OURS = re.compile(r"\d{5,}\.(tar|parquet)|sizes\.json|README\.md")


def packed_images(data: Data, name: str, keys: Collection[str]) -> int:
    """How many of these images are packed under a name."""
    wanted = pa.array([*keys], pa.string())
    return sum(
        pc.sum(pc.is_in(read_table(data.local(path), ["key"])["key"], wanted)).as_py() or 0
        for path in data.store.walk(data.packed(name))
        if re.fullmatch(r"\d{5,}\.parquet", path.name)
    )


def repack(data: Data, name: str, keys: Collection[str], date: str, moved: Moved) -> None:
    """Take these images out of `shards/NAME/`, manifest and card with it. Where none is left, the folder goes.

    A shard that is left empty gives its number to the last one. moved: what the manifest names as its inputs.
    """
    manifest, folder = data.manifest(name), data.packed(name)
    copy = data.taken_back(f"packed-{name}")
    before = kept_aside(data, copy)
    known: Mapping[str, Any] = {}  # files that are as they were
    if before is None:
        before = data.record(manifest)
        holds = packed_images(data, name, keys)
        if not (holds or (before and _moved(before, name, moved) != before["inputs"])):
            return
        if before:
            known = before["outputs"]
            keep_aside(data, copy, before)
    data.invalidate(manifest)
    counts, changed = _without(data, folder, keys)
    sizes = _renumber(data, folder, counts)
    if not sizes:
        data.remove(*data.store.walk(folder))
        shutil.rmtree(folder, ignore_errors=True)
    elif before:
        _write_manifest(data, name, before, sizes, date, moved, {} if 0 in counts.values() else known, changed)
    data.remove(copy)


def _without(data: Data, folder: Path, keys: Collection[str]) -> tuple[dict[str, int], set[str]]:
    """Rewrite the shards that hold such images; ({name of each shard: its samples}, the names of those)."""
    found, changed = dict[str, int](), set[str]()
    for path in data.store.walk(folder):
        if path.parent == folder and re.fullmatch(r"\d{5,}\.parquet", path.name):
            data.bring(path)
            rows = pq.read_metadata(path).num_rows
            tar = path.with_suffix(".tar")
            if packed_keys(path) & {*keys}:
                data.bring(tar)
                subset_tar(tar, keys)
                data.push(tar)  # the table last: it says whether the tar is to be looked at
                found[path.stem] = subset_table(path, keys)
                data.push(path)
                data.release(tar)
                changed.add(path.stem)
            else:
                found[path.stem] = rows
    return found, changed


def packed_keys(path: Path) -> set[str]:
    """The keys of a packed shard, by its table."""
    return {*read_table(path, ["key"])["key"].to_pylist()}


def _renumber(data: Data, folder: Path, shards: Mapping[str, int]) -> dict[str, int]:
    """Numbers without gaps: the last shards take those of shards that are empty, or that a kill left without files.
    Returns {tar: samples}, in order."""
    sizes = {int(stem): count for stem, count in shards.items() if count}
    files = lambda number: [folder / f"{shard_name(number)}{suffix}" for suffix in (".tar", ".parquet")]  # noqa: E731
    data.remove(*(file for stem, count in shards.items() if not count for file in files(int(stem))))
    for number in range(len(sizes)):
        if number not in sizes:
            last = max(sizes)
            for old, new in zip(files(last), files(number), strict=True):
                if data.exists(old):
                    shutil.copyfile(data.local(old), new)
                    data.push(new)
            data.remove(*files(last))
            sizes[number] = sizes.pop(last)
    return {f"{shard_name(number)}.tar": sizes[number] for number in sorted(sizes)}


def _selection(data: Data, before: Mapping[str, Any], gone: int) -> dict[str, Any]:
    """The selection of a manifest as its own record has it now; where that is of another one, without what is gone."""
    record = data.record(data.selection_record(before["name"]))
    then, now = before["selection"], {k: record[k] for k in before["selection"] if k in record}
    same = [rule["name"] for rule in now.get("rules", [])] == [rule["name"] for rule in then["rules"]]
    if same and record.get("kept") == then["kept"] - gone:
        return {**then, **now}
    return {**then, **without_images(then, {KEPT: gone} if gone else {}, {}, {})}


def _moved(before: Mapping[str, Any], name: str, moved: Moved) -> dict[str, str]:
    selected = {"selected": moved[f"selected {name}"]} if f"selected {name}" in moved else {}
    return moved_inputs(before["inputs"], {**moved, **selected})


def _write_manifest(
    data: Data,
    name: str,
    before: Mapping[str, Any],
    sizes: Mapping[str, int],
    date: str,
    moved: Moved,
    known: Mapping[str, Any],
    changed: Collection[str],
) -> None:
    """known: what the manifest says of files, which is true of shards that were not `changed`."""
    folder, count = data.packed(name), sum(sizes.values())
    said, gone = _selection(data, before, before["count"] - count), Counter(before.get("removed", {}))
    selection, then = Selection.from_json(said), Selection.from_json(before["selection"])
    gone[date] += before["count"] - count
    facts = {k: v for k, v in before.items() if k not in ("config", "inputs", "outputs", "self")}
    facts |= {
        "count": count,
        "shards": len(sizes),
        "selection": said,
        "funnel": selection.funnel,
        "removed": dict(+gone),
    }
    write_json(folder / "sizes.json", dict(sizes))
    names = pq.read_schema(data.local(folder / f"{shard_name(0)}.parquet")).names
    write_atomic(folder / "README.md", card_text(facts, selection, names).encode())
    # an index of somebody else's loader would lead into the middle of other samples, and has their captions
    stays = {at: f for at, f in known.items() if is_index(at) and Path(at).name.partition(".")[0] not in changed}
    there = {at: at.split("/", 2)[2] for at in before["outputs"]}
    data.remove(*(folder / file for at, file in there.items() if not _OURS.fullmatch(file) and at not in stays))
    outputs = write_indexes(data, name, sizes, stays)
    for stem in [*(Path(tar).stem for tar in sizes), "sizes", "README"]:
        for file in (f"{stem}.tar", f"{stem}.parquet", f"{stem}.json", f"{stem}.md"):
            path, at = folder / file, f"shards/{name}/{file}"
            if at in known and _SHARD.fullmatch(file) and stem not in changed:
                outputs[at] = known[at]
            elif _OURS.fullmatch(file) and data.exists(path):
                data.bring(path)
                outputs[at] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    outputs |= write_croissant(data, name, facts, outputs)
    config = PackConfig(**before["pack"])
    same = before["config"] == pack_identity(config, then)
    value = {
        **facts,
        "config": pack_identity(config, selection) if same else before["config"],
        "inputs": _moved(before, name, moved),
        "outputs": dict(sorted(outputs.items())),
    }
    write_json(data.manifest(name), {**value, "self": record_digest(value)})
    data.push(folder / "sizes.json", folder / "README.md", data.manifest(name))
