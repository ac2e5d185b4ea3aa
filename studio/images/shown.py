"""Which images of a shard must not be seen, and which are blurred."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.layout import Data
from curate.ledger.counts import key_numbers
from curate.ledger.rules import read_rules
from curate.ledger.view import LedgerTable, recorded_columns, tables
from curate.ledger.why import KeyShape
from curate.report import BLURRED_FROM
from curate.store.disk import Stamp
from curate.store.files import read_table

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ShownColumns:
    """The columns that decide what is seen, as they were when the tables were last looked at."""

    found: Sequence[LedgerTable]
    hidden: tuple[tuple[LedgerTable, str], ...]  # an image of which one is true must not be seen
    unsafe: tuple[tuple[LedgerTable, str, float], ...]  # and the value from which on it has an image blurred

    @staticmethod
    def of(data: Data, rules: Mapping[str, str]) -> ShownColumns:
        """rules: of the recipe, name -> condition. UserError where nothing is fetched."""
        found = tables(data)
        facts = recorded_columns(found)
        table = {column: t for t in found[1:] for column in t.columns}
        hidden = tuple((table[c], c) for c, said in facts.items() if said.get("hidden"))
        unsafe = [c for c, said in facts.items() if said.get("unsafe") and not said.get("hidden")]
        limits = blurred_from(tuple(unsafe), tuple(rules.items()), tuple(sorted(table)))
        return ShownColumns(found, hidden, tuple((table[c], c, limits[c]) for c in unsafe if _has_value(table[c], c)))

    @cached_property
    def shards(self) -> frozenset[int]:
        """The shards that are fetched."""
        return frozenset(self.found[0].shards)

    def decides_as(self, other: ShownColumns) -> bool:
        """Whether the same columns decide."""
        return self is other or self._names() == other._names()

    def _names(self) -> list[tuple[str, str, float]]:
        hidden = [(table.name, column, -1.0) for table, column in self.hidden]
        return hidden + [(table.name, column, limit) for table, column, limit in self.unsafe]

    @property
    def unsafe_names(self) -> list[str]:
        """The columns by which images are blurred."""
        return [column for _, column, _ in self.unsafe]

    def stamps(self, data: Data, shard: int) -> tuple[Stamp | None, ...]:
        """What changes when a table of the shard is written again."""
        names = dict.fromkeys(name for name, _, _ in self._names())
        return tuple(data.store.stamp(_file(data, name, shard)) for name in names)

    def masks(self, data: Data, shape: KeyShape, shard: int, rows: npt.NDArray[np.uint32]) -> tuple[Mask, Mask]:
        """Of rows of a shard, by their numbers: which must not be seen, and which are blurred.

        What nobody has asked yet must not be seen either, and is blurred, where others were asked.
        """
        hidden, blurred = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
        for table, column in self.hidden:
            hidden |= _flags(data, table, column, shape, shard, rows, _is_true, unasked=True)
        for table, column, limit in self.unsafe:
            blurred |= _flags(data, table, column, shape, shard, rows, partial(_is_unsafe, limit=limit), unasked=True)
        return hidden, blurred


@lru_cache(16)
def blurred_from(
    columns: tuple[str, ...], rules: tuple[tuple[str, str], ...], known: tuple[str, ...]
) -> dict[str, float]:
    """From which value on such columns have an image blurred: BLURRED_FROM, or what the recipe's rules, name and
    condition, reject where that is less. known: the columns that these may name."""
    cuts = [cut for rule in read_rules(dict(rules), known).values() if rule for cut in rule.cuts]
    upper = [cut for cut in cuts if cut.sign in ("<", "<=")]
    return {c: min([BLURRED_FROM, *(cut.value for cut in upper if cut.column == c)]) for c in columns}


def _file(data: Data, table: str, shard: int) -> Path:
    return data.annotations(table.rpartition("/")[2], shard)


def _flags(
    data: Data,
    table: LedgerTable,
    column: str,
    shape: KeyShape,
    shard: int,
    rows: npt.NDArray[np.uint32],
    test: Callable[[pa.ChunkedArray], Mask],
    *,
    unasked: bool,
) -> Mask:
    """What a test says of a column's values for these rows; `unasked` for rows that the table does not have."""
    flags = np.full(len(rows), unasked)
    path = data.local(_file(data, table.name, shard))
    if not path.exists() or not data.exists(data.annotations_record(path.parent.name, shard)):
        return flags
    found = read_table(path, [table.key, column])
    theirs = key_numbers(found[table.key]) - np.uint64(shape.first(shard))
    places = np.minimum(np.searchsorted(rows, theirs), max(0, len(rows) - 1))
    there = rows[places] == theirs if len(rows) else np.zeros(len(theirs), bool)
    flags[places[there]] = test(found[column])[there]
    return flags


def _is_true(values: pa.ChunkedArray) -> Mask:
    """A null is no answer: of these columns it means that nothing was found."""
    return pc.fill_null(pc.cast(values, pa.bool_()), False).to_numpy(zero_copy_only=False).astype(bool)


def _is_unsafe(values: pa.ChunkedArray, limit: float) -> Mask:
    """So much or more, or no value, which NaN is too."""
    if not _can_compare(values.type):
        return np.ones(len(values), bool)
    numbers = pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return ~(numbers < limit)  # true of NaN, which null is here


def _can_compare(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _has_value(table: LedgerTable, column: str) -> bool:
    """Whether any image has a value in a column: by the files' statistics, so most often by the first file's."""
    for path in table.files:
        with pq.ParquetFile(table.data.local(path)) as file:
            place = file.schema_arrow.names.index(column)
            groups = (file.metadata.row_group(i).column(place) for i in range(file.metadata.num_row_groups))
            if any(g.statistics is None or g.statistics.null_count < g.num_values for g in groups):
                return True
    return False
