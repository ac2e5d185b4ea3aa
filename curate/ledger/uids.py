"""Selections as DataComp writes them: a sorted .npy of the 128-bit uids to keep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aesthetic.errors import UserError
from aesthetic.files import atomic
from aesthetic.untrusted import check_regular
from curate.ledger.early import applied_early
from curate.ledger.judge import as_value, failures, load_rows, rejected_early
from curate.ledger.rules import KEPT, NOT_IN_UIDS
from curate.ledger.schema import Status
from curate.ledger.select import (
    FORMAT,
    RuleCount,
    Selection,
    check_name,
    load_selection,
    words_for_unjudged,
    write_selection,
)
from curate.ledger.sql import batches
from curate.ledger.view import (
    LedgerTable,
    column_types,
    current_tables,
    hidden_columns,
    open_ledger,
    table_digests,
    tables,
)
from curate.store.files import digest, sha256_file

if TYPE_CHECKING:
    from curate.layout import Data

UID = np.dtype("u8,u8")
"""A 128-bit uid as DataComp's subset files hold it: its high half, then its low half."""


def read_uids(path: Path) -> np.ndarray:
    """A subset file of DataComp's: 128-bit uids as (u8, u8), sorted, mapped into memory and not read. Shape (n,)."""
    check_regular(path)
    try:
        uids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, OverflowError, MemoryError) as e:
        raise UserError(f"{path} is not a .npy file: {e}") from None
    if not isinstance(uids, np.ndarray):
        raise UserError(f"{path} is not a .npy file: it holds several arrays (.npz)")
    if uids.dtype != UID or uids.ndim != 1:
        raise UserError(f"{path} holds {uids.dtype} of shape {uids.shape}; a row of uids of dtype u8,u8 is expected")
    return uids


def select_uids(data: Data, name: str, path: Path) -> Selection:
    """A selection by a subset file: fetched rows whose `source.uid` is in it are kept, the others are `not_in_uids`.

    A uid that the file repeats keeps its row once. Memory: 24 bytes per fetched row and a block of the file.
    Raises UserError where the list carries no uid, or the file isn't one of sorted uids.
    """
    check_name(name)
    uids = read_uids(path)
    found = tables(data)
    hidden = hidden_columns(found)
    column, config = _uid_column(found), digest([FORMAT, NOT_IN_UIDS, *([[*hidden]] if hidden else [])])
    read = [t for t in current_tables(data, found, hidden.values()) if t is found[0] or t.name in hidden.values()]
    inputs = {**table_digests(read), "uids": sha256_file(path)}
    if data.is_done(data.selection_record(name), config=config, inputs=inputs):
        return load_selection(data, name)
    with open_ledger(data, {column, *hidden}, found=found) as con:
        keys, ours, missing = [np.zeros(0, np.uint64)], [np.zeros(0, "S16")], [np.zeros(0, np.uint64)]
        early = [np.zeros(0, bool)]
        denied, denied_by = load_rows(con, {column, *hidden}, hidden)
        left = f"_fetched WHERE status = '{Status.REJECTED_EARLY}'"  # they may be in it, but have no image
        uid = f"{as_value(column)} AS uid"
        sql = f'SELECT "#key" AS k, {uid}, false AS early FROM rows'
        for batch in batches(con, f'{sql} UNION ALL SELECT CAST("key" AS UBIGINT), {uid}, true FROM {left}'):
            has = pc.is_valid(batch["uid"])
            early.append(batch["early"].filter(has).to_numpy(zero_copy_only=False))
            missing.append(batch["k"].filter(pc.invert(has)).to_numpy())
            keys.append(batch["k"].filter(has).to_numpy())
            ours.append(_from_hex(batch["uid"].filter(has), column))
        failed, not_fetched = failures(con)
        left_by = rejected_early(con)
    known, values = np.concatenate(keys), np.concatenate(ours)
    order = np.argsort(values, kind="stable")
    known, values = known[order], values[order]
    inside = _members(values, uids, path)
    unjudged = inside & np.concatenate(early)[order]
    without = np.concatenate(missing)
    states = np.where(unjudged, 4, np.where(inside, 2, 1))
    verdicts = np.concatenate([states, np.ones(len(without)), np.full(len(denied), 3)]).astype(np.int16)
    rejected = int((verdicts == 1).sum())
    condition = f"uid in {path.name}"
    selection = Selection(
        name=name,
        rows=len(verdicts) + len(failed),
        not_fetched=not_fetched,
        denied=denied_by,
        rules=[
            RuleCount(name=NOT_IN_UIDS, condition=condition, rejected=rejected, marginal=rejected, nulls=len(without))
        ],
        early=left_by,
        unjudged=int(unjudged.sum()),
        kept=int((states == 2).sum()),
        quantiles={},
        warnings=[] if (states == 2).any() else [f"no fetched row has a uid that is in {path}"],
    )
    if selection.unjudged:
        selection.warnings.append(words_for_unjudged(data, selection.unjudged, applied_early(found), {}))
    fetched_keys = np.concatenate([known, without, denied])
    more = {"uids": str(path.absolute())}
    write_selection(found[0], selection, fetched_keys, verdicts, failed, config=config, inputs=inputs, more=more)
    return selection


def write_uids(data: Data, name: str, path: Path) -> int:
    """Write the uids of a selection's kept rows as a subset file of DataComp's, sorted; returns how many.

    Raises UserError where the list carries no uid, or a kept row has none.
    """
    load_selection(data, name)
    found = tables(data)
    column = _uid_column(found)
    with open_ledger(data, {column}, found=found) as con:
        kept = f"SELECT key FROM verdicts WHERE selection = '{name}' AND verdict = '{KEPT}'"
        parts = [np.zeros(0, "S16")]
        for batch in batches(con, f"SELECT {as_value(column)} AS uid FROM ledger WHERE key IN ({kept})"):
            if batch["uid"].null_count:
                raise UserError(f"{batch['uid'].null_count:,} kept rows or more have no {column}")
            parts.append(_from_hex(batch["uid"], column))
    values = np.unique(np.concatenate(parts))
    with atomic(path) as f:
        np.save(f, values.view(">u8").astype("<u8").view(UID))
    return len(values)


def _uid_column(found: Sequence[LedgerTable]) -> str:
    columns = column_types(found)[1]
    for name, kind in columns.items():
        if name.lower() == "uid" and kind == "VARCHAR":
            return f"source.{name}"
    raise UserError(f"the list carries no text column uid (it has {', '.join(columns) or 'no columns of its own'})")


def _from_hex(texts: pa.Array, column: str) -> np.ndarray:
    """32 hex digits each -> 16 bytes each, whose order is that of the (high, low) pairs."""
    if len(texts) == 0:
        return np.zeros(0, "S16")
    try:
        data = bytes.fromhex("".join(texts.to_pylist()))
    except ValueError:
        data = b""
    if len(data) != 16 * len(texts) or not pc.all(pc.equal(pc.utf8_length(texts), 32)).as_py():
        raise UserError(f"{column} must be 32 hex digits in every row")
    return np.frombuffer(data, "S16")


def _members(values: np.ndarray, uids: np.ndarray, path: Path) -> np.ndarray:
    """Which of the sorted `values` (S16) are among the sorted `uids`, read a block at a time. Bool, shape (n,)."""
    inside = np.zeros(len(values), bool)
    previous = b""
    for start in range(0, len(uids), 1 << 22):
        part = np.array(uids[start : start + (1 << 22)]).view("<u8").astype(">u8").view("S16")
        if (part[1:] < part[:-1]).any() or part[0] < previous:
            raise UserError(f"{path} is not sorted: sort it with numpy's sort, as DataComp's tools do")
        previous = part[-1]
        low, high = np.searchsorted(values, part[0], "left"), np.searchsorted(values, part[-1], "right")
        mine = values[low:high]
        inside[low:high] |= part[np.searchsorted(part, mine)] == mine
    return inside
