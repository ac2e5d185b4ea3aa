"""Groups of near-duplicates: which images are in the group of one, and which of them the recipe would keep."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fastapi import HTTPException

from aesthetic.errors import UserError
from curate.layout import ANNOTATED
from curate.ledger.rules import read_rules
from curate.ledger.sql import quote
from curate.ledger.view import LedgerTable

if TYPE_CHECKING:
    from studio.explore.explorer import Explorer
    from studio.explore.snapshot import Snapshot

ANNOTATOR = "near-duplicates"
MOST = 100
"""Members of a group that are listed."""
_BESIDE = ("size", "nearest", "of")  # what else the annotator says, as NAME_SIZE and so on


@dataclass(frozen=True)
class CopyMember:
    """An image of a group. kept: whether the recipe's best_of, else being the first, keeps it of its group."""

    key: str
    kept: bool
    values: dict[str, Any]


@dataclass(frozen=True)
class CopyGroup:
    """Images that are nearly the same, as one column has it. size: how many there are, listed or not."""

    column: str
    group: str
    size: int
    keeper: str
    rule: str  # of the recipe, that keeps it; empty: it is the first
    members: list[CopyMember]


@dataclass(frozen=True, eq=False)
class GroupColumn:
    """Which rows are in which group: rows (m,), ordered by group (m,), the number of its key, and by row."""

    name: str
    columns: tuple[str, ...]  # of the annotator, that are there
    groups: npt.NDArray[np.uint64]
    rows: npt.NDArray[np.int32]

    def members(self, row: int) -> npt.NDArray[np.int32]:
        """The rows of a row's group, ascending; none where it is in none."""
        at = np.flatnonzero(self.rows == row)
        if not len(at):
            return np.zeros(0, np.int32)
        group = self.groups[at[0]]
        return self.rows[np.searchsorted(self.groups, group) : np.searchsorted(self.groups, group, "right")]


class CopyGroups:
    """The groups of all near-duplicate columns of a data folder, read once for each version of it."""

    def __init__(self, explorer: Explorer) -> None:
        self._explorer, self._lock = explorer, threading.Lock()
        self._read: tuple[Snapshot, list[GroupColumn]] | None = None

    def of(self, key: str) -> list[CopyGroup]:
        """The groups that an image is in. HTTPException 404 where there is no such image, or it must not be seen."""
        found = list[CopyGroup]()
        try:
            row = self._explorer.row(key)
        except KeyError:
            raise HTTPException(404, f"there is no image {key}") from None
        for column in self._columns():
            members = column.members(row)
            if len(members):
                found.append(self._group(column, row, members))
        return found

    def _columns(self) -> list[GroupColumn]:
        with self._lock:
            snapshot = self._explorer.snapshot
            if self._read is None or self._read[0] is not snapshot:
                columns = [
                    _read_column(table, snapshot.rows.keys)
                    for table in snapshot.found[1:]
                    if table.facts[0].get("annotator") == ANNOTATOR
                    and table.name.removeprefix(f"{ANNOTATED}/") in table.columns
                ]
                self._read = snapshot, columns
            return self._read[1]

    def _group(self, column: GroupColumn, row: int, members: npt.NDArray[np.int32]) -> CopyGroup:
        explorer = self._explorer
        kept, rule = members[:1], ""
        if best := self._best_of(column.name):
            with contextlib.suppress(UserError):  # a column that the recipe names is not there
                by_rule = explorer.select({"best": best[1]}).kept[members]
                if by_rule.any():
                    kept, rule = members[by_rule], best[0]
        size = len(members)
        if size > MOST:  # the one that was asked for and the keeper among them
            members = np.unique(np.concatenate([[row], kept[:1], members[: MOST - 2]]))
        values = explorer.facts(members, [*column.columns, "original_width", "original_height"]).to_pylist()
        group = str(values[0][column.name])  # its first key, which may be hidden itself
        listed = [
            CopyMember(explorer.key(m), m in kept, {n: v for n, v in its.items() if v is not None and n != column.name})
            for m, its in zip(members.tolist(), values, strict=True)
        ]
        return CopyGroup(column.name, group, size, explorer.key(int(kept[0])), rule, listed)

    def _best_of(self, group: str) -> tuple[str, str] | None:
        """The recipe's rule that keeps the best of these groups, and that part of its condition."""
        rules = read_rules(self._explorer.recipe.rules, self._explorer.snapshot.all_types)
        for name, rule in rules.items():
            for computed in rule.computed if rule else ():
                if computed.kind == "best_of" and computed.column == group:
                    return name, f"best_of({quote(group)}, {computed.expression})"
        return None


def _read_column(table: LedgerTable, keys: npt.NDArray[np.uint64]) -> GroupColumn:
    """The groups of a table's column that is called like its entry; rows that are not shown are in none. UserError
    where it can't be read."""
    name = table.name.removeprefix(f"{ANNOTATED}/")
    own, groups = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
    try:
        for file in table.files:
            with pq.ParquetFile(table.data.local(file)) as stored:
                read = stored.read([table.key, name], use_threads=False)
            read = read.filter(pc.is_valid(read[name]))
            own.append(pc.cast(read[table.key], pa.uint64()).to_numpy())
            groups.append(pc.cast(read[name], pa.uint64()).to_numpy())
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{table.name} can't be read ({e}). If it is being made anew, try again in a while.") from e
    key, group = np.concatenate(own), np.concatenate(groups)
    at = np.minimum(np.searchsorted(keys, key), max(0, len(keys) - 1)).astype(np.int32)
    shown = keys[at] == key if len(keys) else np.zeros(len(key), np.bool_)
    rows, group = at[shown], group[shown]
    order = np.lexsort((rows, group))
    beside = tuple(c for c in (name, *(f"{name}_{suffix}" for suffix in _BESIDE)) if c in table.columns)
    return GroupColumn(name, beside, group[order], rows[order])
