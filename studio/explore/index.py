"""The index of a data folder: the columns of its tables in the order of keys, in files that are mapped into memory.

    studio/index/rows-DIGEST/          which rows there are: those with an image that must not be hidden
    studio/index/fetched-DIGEST/       columns of a table of the ledger, and so on for each other table
    studio/index/answers/              what rules said that took long (studio.explore.answers)

A part is made in a scratch folder and renamed when it is whole; its digest is that of all it was made from. So a part
that is there is right, one that was made from what has changed is another, and two servers that make the same do no
harm to each other. A column that is new adds its own part.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from aesthetic.errors import UserError
from aesthetic.files import scratch_path, sync
from curate.ledger.balance import CLUSTER
from curate.ledger.schema import Status
from curate.ledger.view import (
    LedgerTable,
    conform,
    fetched_columns,
    hidden_columns,
    recorded_columns,
)
from curate.store.files import digest, left_over, read_table
from studio.explore.columns import ColumnFacts, ColumnWriter, IndexedColumn, open_array, save

FORMAT = 2
"""Of the index; part of every digest."""

CAPTION = 300
"""Characters of a caption that the grid shows."""

_NOT_INDEXED = {"key", "status", "reason", "error_message", "exif", "sha256", "phash"}
"""Columns of ours that no one looks at as a histogram."""

OnStep = Callable[[int], None]
"""Called with steps that are done, each a shard of a table. What it raises ends the work."""


class IndexStopped(Exception):
    """The server ends, so the index is not made now."""


@dataclass(frozen=True)
class IndexedRows:
    """The rows of the index, in the order of keys, and what became of all others."""

    keys: npt.NDArray[np.uint64]
    shard: npt.NDArray[np.int32]
    place: npt.NDArray[np.uint32]  # of a row among the images of its shard
    random: npt.NDArray[np.uint32]  # rows in an order that says nothing, and that new rows do not change
    width: int  # digits of a key
    rows: int  # of the list, with all that have no image
    not_fetched: dict[str, int]
    early: dict[str, int]
    denied: dict[str, int]
    digest: str
    captions: tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint16], npt.NDArray[np.uint8]] = field(repr=False)

    def caption(self, row: int) -> str | None:
        """The first characters of a row's caption."""
        starts, lengths, text = self.captions
        length = int(lengths[row])
        if length == _NO_CAPTION:
            return None
        start = int(starts[row])
        return text[start : start + length].tobytes().decode("utf-8", "replace")


_NO_CAPTION = 65_535


def part_digests(found: Sequence[LedgerTable]) -> dict[str, str]:
    """Table -> the digest of its part: "rows" first."""
    hidden = hidden_columns(found)
    of_table = {table.name: table.digest() for table in found}
    rows = digest([FORMAT, of_table[found[0].name], {name: of_table[name] for name in sorted({*hidden.values()})}])
    parts = {"rows": rows}
    for table in found:
        parts[table.name] = digest([FORMAT, rows, of_table[table.name], table.columns])
    return parts


def part_folders(root: Path, found: Sequence[LedgerTable]) -> dict[str, Path]:
    """Table -> where its part is in the folder `root`, once it is made."""
    return {name: root / f"{name.replace('/', '@')}-{d}" for name, d in part_digests(found).items()}


def make_index(root: Path, found: Sequence[LedgerTable], on_step: OnStep) -> dict[str, Path]:
    """Make the parts that are missing in the folder `root`; where each is. Others are removed.

    Steps: a shard of a table each, of all tables (see `steps`). Raises UserError where tables hold what they must not.
    """
    folders = part_folders(root, found)
    if all(folder.exists() for folder in folders.values()):
        on_step(steps(found))
        return folders
    root.mkdir(parents=True, exist_ok=True)
    for scratch in left_over(root):
        shutil.rmtree(scratch, ignore_errors=True)
    if folders["rows"].exists():
        on_step(len(found[0].shards))
    else:
        with _part(folders["rows"]) as folder:
            _make_rows(folder, found, on_step)
    rows = open_rows(folders["rows"])
    clusters = {c for c, facts in recorded_columns(found).items() if facts.get("unit") == CLUSTER}
    for table in found:
        if folders[table.name].exists():
            on_step(len(table.shards))
            continue
        with _part(folders[table.name]) as folder:
            _make_columns(folder, table, found[0], rows, clusters, on_step)
    for other in root.iterdir():
        if (
            other.name != "answers"
            and other not in folders.values()
            and other.is_dir()
            and not other.name.startswith(".")
        ):
            shutil.rmtree(other, ignore_errors=True)  # of what was before; who has it mapped keeps it
    return folders


def steps(found: Sequence[LedgerTable]) -> int:
    """How many steps `make_index` takes."""
    return len(found[0].shards) + sum(len(table.shards) for table in found)


@contextlib.contextmanager
def _part(final: Path) -> Iterator[Path]:
    """A scratch folder that becomes a part where the block ends well, unless somebody else made it meanwhile."""
    scratch = scratch_path(final)
    scratch.mkdir()
    try:
        yield scratch
        for file in scratch.iterdir():
            sync(file)
        with contextlib.suppress(OSError):  # it is there by now
            os.rename(scratch, final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------------- rows


def _make_rows(folder: Path, found: Sequence[LedgerTable], on_step: OnStep) -> None:
    fetched, hidden = found[0], hidden_columns(found)
    schema = fetched.schema
    names = {name: schema.names[i] for name, i in fetched_columns(schema)[0].items() if i is not None}
    read = [names[n] for n in ("key", "status", "reason", "caption") if n in names]
    keys, shards, places = list[npt.NDArray[np.uint64]](), list[npt.NDArray[np.int32]](), list[npt.NDArray[Any]]()
    starts, lengths, begin, width = list[npt.NDArray[Any]](), list[npt.NDArray[Any]](), 0, 0
    failed, early, denied = Counter[str](), Counter[str](), Counter[str]()
    total = 0
    with open(folder / "captions.bin", "wb") as captions:
        for shard, file in zip(fetched.shards, fetched.files, strict=True):
            table = read_table(fetched.data.local(file), read)
            total += len(table)
            if not width and len(table):
                width = len(table[names["key"]][0].as_py())
            status = table[names["status"]].combine_chunks()
            success = pc.fill_null(pc.equal(status, Status.SUCCESS.value), False)
            _count_failures(table.filter(pc.invert(success)), names, failed, early)
            images = table.filter(success)
            own = _key_numbers(images[names["key"]])
            seen = np.ones(len(images), np.bool_)
            for column, name in hidden.items():
                hides = _hidden_of(found, column, name, shard, own) & seen
                denied[column] += int(hides.sum())
                seen &= ~hides
            keys.append(own[seen])
            shards.append(np.full(int(seen.sum()), shard, np.int32))
            places.append(np.flatnonzero(seen).astype(np.uint32))
            text = images[names["caption"]].filter(pa.array(seen)) if "caption" in names else pa.nulls(int(seen.sum()))
            data, sizes = _utf8(text)
            starts.append(begin + np.concatenate([[0], np.cumsum(np.where(sizes == _NO_CAPTION, 0, sizes))])[:-1])
            lengths.append(sizes)
            captions.write(data)
            begin += len(data)
            on_step(1)
    all_keys = _joined(keys, np.uint64)
    order = np.argsort(all_keys, kind="stable")
    all_keys = all_keys[order]
    if twice := all_keys[1:][all_keys[1:] == all_keys[:-1]][:1].tolist():
        place = f"{fetched.data}/fetched"
        raise UserError(f"key {twice[0]} comes twice in {place}: `tastemaker verify {fetched.data}` looks for damage")
    save(folder / "key.npy", all_keys)
    save(folder / "shard.npy", _joined(shards, np.int32)[order])
    save(folder / "place.npy", _joined(places, np.uint32)[order])
    save(folder / "starts.npy", _joined(starts, np.uint64)[order])
    save(folder / "lengths.npy", _joined(lengths, np.uint16)[order])
    save(folder / "random.npy", np.argsort(_mixed(all_keys), kind="stable").astype(np.uint32))
    counts = {"not_fetched": _by_count(failed), "early": _by_count(early)}
    denied_by = {column: denied[column] for column in hidden if denied[column]}
    facts = {"rows": total, "width": width, "denied": denied_by, **counts}
    (folder / "rows.json").write_text(json.dumps(facts), "utf-8")


def _count_failures(table: pa.Table, names: Mapping[str, str], failed: Counter[str], early: Counter[str]) -> None:
    """Count rows without an image by reason, as `curate.ledger.judge.failures` does."""
    status = table[names["status"]]
    reason = table[names["reason"]] if "reason" in names else pa.nulls(len(table), pa.string())
    is_early = pc.fill_null(pc.equal(status, Status.REJECTED_EARLY.value), False)
    why = pc.coalesce(reason, status, pa.scalar("unknown"))
    failed.update(why.filter(pc.invert(is_early)).to_pylist())
    early.update(reason.filter(is_early).to_pylist())


def _by_count(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def _hidden_of(
    found: Sequence[LedgerTable], column: str, name: str, shard: int, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.bool_]:
    """Which of a shard's images a column hides."""
    table = next(t for t in found if t.name == name)
    if shard not in table.shards:
        return np.zeros(len(keys), np.bool_)
    rows = read_table(table.data.local(table.files[table.shards.index(shard)]), [table.key, column])
    hides = _key_numbers(rows.filter(pc.fill_null(rows[column], False))[table.key])
    return np.isin(keys, hides)


def _key_numbers(keys: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    try:
        return pc.cast(keys, pa.uint64()).to_numpy()
    except pa.ArrowInvalid as e:
        raise UserError(f"a key in fetched/ is not a number: {e}") from None


def _utf8(text: pa.ChunkedArray | pa.Array) -> tuple[bytes, npt.NDArray[np.uint16]]:
    """The bytes of the first characters of texts, one after another, and how many each has."""
    column = pc.cast(text.combine_chunks() if isinstance(text, pa.ChunkedArray) else text, pa.large_string())
    cut = pc.utf8_slice_codeunits(column, 0, CAPTION)
    sizes = pc.fill_null(pc.cast(pc.binary_length(cut), pa.uint16()), _NO_CAPTION).to_numpy(zero_copy_only=False)
    return "".join(word for word in cut.to_pylist() if word).encode(), sizes


def _joined(parts: list[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *(p.astype(dtype, copy=False) for p in parts)])


def _mixed(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Hashes of numbers: splitmix64, of Steele, Lea and Flood 2014."""
    x = keys + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def open_rows(folder: Path) -> IndexedRows:
    """The rows of a part that is there."""
    facts = json.loads((folder / "rows.json").read_text("utf-8"))
    text = folder / "captions.bin"
    captions = np.memmap(text, np.uint8, "r") if text.stat().st_size else np.zeros(0, np.uint8)
    arrays = {n: open_array(folder / f"{n}.npy") for n in ("key", "shard", "place", "random", "starts", "lengths")}
    return IndexedRows(
        keys=arrays["key"],
        shard=arrays["shard"],
        place=arrays["place"],
        random=arrays["random"],
        captions=(arrays["starts"], arrays["lengths"], np.asarray(captions)),
        digest=folder.name.rpartition("-")[2],
        **facts,
    )


# ------------------------------------------------------------------------------------------------------------ columns


def _make_columns(
    folder: Path,
    table: LedgerTable,
    fetched: LedgerTable,
    rows: IndexedRows,
    clusters: set[str],
    on_step: OnStep,
) -> None:
    schema = table.schema
    if table is fetched:
        ours, source = fetched_columns(schema)
        ours = {n: i for n, i in ours.items() if i is not None and n not in (*_NOT_INDEXED, "caption", "url")}
        stored = {n: schema.names[i] for n, i in ours.items() if i is not None}
        stored |= {f"source.{n}": schema.names[i] for n, i in source.items()}
    else:
        stored = {n: n for n in table.columns}
    writers = [
        ColumnWriter(folder, i, name, schema.field(at).type, len(rows.keys), name in clusters)
        for i, (name, at) in enumerate(stored.items())
    ]
    key = schema.names[fetched_columns(schema)[0]["key"] or 0] if table is fetched else table.key
    status = ["status"] if table is fetched else []
    for file in table.files:
        read = [w for w in writers if w.wanted]
        names = [key, *status, *(stored[w.name] for w in read)]
        wanted = pa.schema([schema.field(n) for n in names])
        found = conform(read_table(table.data.local(file), names), wanted)
        if status:
            found = found.filter(pc.fill_null(pc.equal(found["status"], Status.SUCCESS.value), False))
        places, some = _places(rows.keys, _key_numbers(found[key]))
        found = found if some is None else found.filter(pa.array(some))
        for writer in read:
            writer.put(places, found[stored[writer.name]])
        on_step(1)
    facts = []
    for writer in writers:
        facts.append(writer.finish())
        on_step(0)  # it may raise
    (folder / "columns.json").write_text(json.dumps([f.to_json() for f in facts]), "utf-8")


def _places(
    keys: npt.NDArray[np.uint64], own: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.int64] | slice, npt.NDArray[np.bool_] | None]:
    """Where some keys are among all, and which of them are there (None: all)."""
    if not len(own) or not len(keys):
        return slice(0, 0), np.zeros(len(own), np.bool_)
    start = int(np.searchsorted(keys, own[0]))
    if np.array_equal(keys[start : start + len(own)], own):
        return slice(start, start + len(own)), None
    at = np.minimum(np.searchsorted(keys, own), len(keys) - 1)
    there = keys[at] == own
    return at[there], there


def open_columns(folder: Path, table: LedgerTable, rows: IndexedRows) -> dict[str, IndexedColumn]:
    """The columns of a part that is there; those whose values are not in it have facts alone."""
    schema = table.schema
    kinds = {name: schema.field(name).type for name in schema.names if schema.names.count(name) == 1}
    source = {f"source.{n}": schema.field(i).type for n, i in fetched_columns(schema)[1].items()}
    found = {}
    for value in json.loads((folder / "columns.json").read_text("utf-8")):
        facts = ColumnFacts.from_json(value)
        kind = source.get(facts.name) if facts.name.startswith("source.") else kinds.get(facts.name)
        found[facts.name] = IndexedColumn(folder, facts, kind or pa.null(), len(rows.keys))
    return found
