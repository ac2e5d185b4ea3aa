"""Which vectors were compared with which, and the pairs that were found, kept from run to run."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from aesthetic.errors import UserError
from aesthetic.files import atomic
from curate.annotators.base import TableRun
from curate.duplicates.rows import VERSION, Array, Table, keep_array
from curate.duplicates.vectors import (
    NEW,
    PAIR,
    USE,
    cell_ranges,
    compare_cells,
    find_cells,
    make_cells,
    unique_pairs,
)
from curate.store.files import digest

STORED = np.dtype([("a", "<i4"), ("a_row", "<i4"), ("b", "<i4"), ("b_row", "<i4"), ("cosine", "<f4")])
"""A pair as it is kept: shards and rows, since the number of an image changes with shards before it."""

MOST_PAIRS = 300_000_000
"""More would take 24 GB."""


def vector_pairs(run: TableRun, table: Table, work: str, use: Array) -> tuple[Array, float, str]:
    """(PAIRs of the images within the cosine, comparisons that all of them take, a digest of the cells and images).

    use: (n,) bool, which images are compared. Only those that are new are compared with all.
    """
    cells = find_cells(table, run.say)
    for _ in run.map(make_cells, [(table, at, cells) for at in range(len(table.shards))]):
        pass
    kept, old = read_compared(table, cells, use)
    state = np.where(use, USE, 0).astype(np.uint8) | np.where(use & ~old, NEW, 0).astype(np.uint8)
    config = digest([VERSION, cells, table.digest, table.modes.of_vectors])
    compared = digest([config, table.data.record(table.index / "compared.json").get("self")])
    ranges, cost = cell_ranges(table, work, compared)
    if (use & ~old).any():
        keep_array(table.data, table.index / work / "state.npy", lambda: state, config=compared)
        count = 0
        for found in run.map(compare_cells, ranges):
            count += found
            if count > MOST_PAIRS:
                raise UserError(
                    f"more than {MOST_PAIRS:,} pairs have a cosine of {table.modes.cosine} or more: so low a threshold "
                    "makes neighbours of everything; raise columns.NAME.cosine"
                )
        kept = unique_pairs(np.concatenate([kept, *(table.load(r.path) for r in ranges)]))
    write_compared(table, cells, use, kept)
    return kept, cost, config


def read_compared(table: Table, cells: str, use: Array) -> tuple[Array, Array]:
    """(PAIRs that were found before, of images that are compared now, too; (n,) bool: which were compared before)."""
    record, data = table.index / "compared.json", table.data
    old = np.zeros(int(table.offsets[-1]), np.bool_)
    nothing = np.zeros(0, PAIR)
    known = data.record(record)
    if not data.is_done(record, config=_config(table, cells), inputs={}):
        return nothing, old
    files = {Path(name).name.split("-")[0]: data.root / name for name in known["outputs"]}
    stored, used = table.load(files["pairs"]), table.load(files["used"])
    offsets, at = {}, 0  # of shards that are as they were
    now = dict(zip(table.shards, zip(table.inputs, table.offsets.tolist(), strict=False), strict=True))
    for shard, count, inputs in known["shards"]:
        if shard in now and now[shard][0] == inputs:
            offset = offsets[shard] = now[shard][1]
            old[offset : offset + count] = used[at : at + count]
        at += count
    shift = np.full(max(table.shards, default=0) + 1, -1, np.int64)
    shift[list(offsets)] = list(offsets.values())
    stored = stored[(stored["a"] < len(shift)) & (stored["b"] < len(shift))]
    stored = stored[(shift[stored["a"]] >= 0) & (shift[stored["b"]] >= 0)]
    found = np.empty(len(stored), PAIR)
    found["a"], found["b"] = shift[stored["a"]] + stored["a_row"], shift[stored["b"]] + stored["b_row"]
    found["distance"] = stored["cosine"]
    return found[use[found["a"]] & use[found["b"]]], old


def write_compared(table: Table, cells: str, use: Array, pairs: Array) -> None:
    """Keep them for later runs, in place of what was kept before."""
    record, data = table.index / "compared.json", table.data
    shards = [list(s) for s in zip(table.shards, table.counts, table.inputs, strict=True)]
    before = data.record(record)
    if before.get("shards") == shards and data.is_done(record, config=_config(table, cells), inputs={}):
        return
    stored = np.empty(len(pairs), STORED)
    for side in ("a", "b"):
        at, row = table.place(pairs[side])
        stored[side], stored[f"{side}_row"] = np.array(table.shards, np.int64)[at], row
    stored["cosine"] = pairs["distance"]
    name = digest([cells, table.digest, table.modes.of_vectors])
    files = [table.index / f"{what}-{name}.npy" for what in ("pairs", "used")]
    for path, array in zip(files, (stored, use), strict=True):
        with atomic(path) as f:
            np.save(f, array)
    data.commit(record, config=_config(table, cells), inputs={}, outputs=files, facts={"shards": shards})
    old = (table.index / name for name in data.store.names(table.index) if name.startswith(("pairs-", "used-")))
    data.remove(*(path for path in old if path not in files))


def _config(table: Table, cells: str) -> str:
    return digest([VERSION, cells, table.modes.of_vectors])
