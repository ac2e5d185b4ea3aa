"""A data folder as it was at one moment: its rows, its columns, and what is asked of all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from curate.layout import Data
from curate.ledger.early import applied_early, left_out
from curate.ledger.judge import odd_words, top_count
from curate.ledger.neighbours import FACT, known_neighbours
from curate.ledger.rules import Computed, Rule
from curate.ledger.select import SelectConfig
from curate.ledger.sql import connect, quote
from curate.ledger.view import (
    LedgerTable,
    column_types,
    fetched_columns,
    hidden_columns,
    outdated_tables,
    recorded_columns,
    recorded_scales,
)
from curate.store.files import digest, read_table
from studio.explore.columns import IndexedColumn
from studio.explore.index import IndexedRows, open_columns, open_rows
from studio.images.shown import blurred_from


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The index, opened, and the tables that it was made from. Nothing of it changes; rows are numbers from 0."""

    data: Data
    recipe: SelectConfig
    found: Sequence[LedgerTable]
    rows: IndexedRows
    columns: Mapping[str, IndexedColumn]  # as rules name them; those of texts have facts alone
    parts: Mapping[str, str]  # table -> the digest of its part

    @staticmethod
    def open(
        data: Data,
        recipe: SelectConfig,
        found: Sequence[LedgerTable],
        folders: Mapping[str, Path],
        parts: Mapping[str, str],
    ) -> Snapshot:
        """Map the parts of an index, which are there."""
        rows, columns = open_rows(folders["rows"]), dict[str, IndexedColumn]()
        for table in found:
            columns |= open_columns(folders[table.name], table, rows)
        return Snapshot(data, recipe, found, rows, columns, parts)

    @cached_property
    def digest(self) -> str:
        """Of all that a selection depends on, but for its rules."""
        pairs = {table.name: table.facts[0].get(FACT) for table in self.found}
        early = {name: sorted(conditions) for name, conditions in self.applied_early.items()}
        return digest([dict(self.parts), list(self.recipe.early), early, pairs, self.outdated])

    @property
    def count(self) -> int:
        return len(self.rows.keys)

    def key(self, row: int) -> str:
        """The key of a row."""
        return f"{int(self.rows.keys[row]):0{self.rows.width}d}"

    def row(self, key: str) -> int:
        """The row of a key; KeyError where it has no image, or must not be seen."""
        if not (key.isascii() and key.isdigit()) or len(key) > 20 or int(key) >= 1 << 64:
            raise KeyError(key)
        at = int(np.searchsorted(self.rows.keys, np.uint64(int(key))))
        if at == self.count or self.key(at) != key:
            raise KeyError(key)
        return at

    def size(self, row: int) -> tuple[int | None, int | None]:
        """Width and height of an image as it is stored, where that is known."""
        columns = (self.columns.get(name) for name in ("width", "height"))
        width, height = (None if c is None or c.facts.stored != "number" else c.value(row) for c in columns)
        return None if width is None else int(width), None if height is None else int(height)

    # what rules are checked against

    @cached_property
    def types(self) -> tuple[dict[str, str], dict[str, str]]:
        """(columns of the ledger, fields of `source`) with their DuckDB types."""
        return column_types(self.found)

    @cached_property
    def all_types(self) -> dict[str, str]:
        """The same, all as rules name them."""
        columns, source = self.types
        return {**columns, **{f"source.{n}": t for n, t in source.items()}}

    @cached_property
    def scales(self) -> dict[str, tuple[float, float]]:
        return recorded_scales(self.found)

    @cached_property
    def recorded(self) -> dict[str, dict[str, Any]]:
        return recorded_columns(self.found)

    @cached_property
    def hidden(self) -> dict[str, str]:
        return hidden_columns(self.found)

    @cached_property
    def outdated(self) -> dict[str, str]:
        """Tables that are not whole or not up to date -> what to do about it."""
        return outdated_tables(self.data, self.found)

    @cached_property
    def left_out(self) -> tuple[dict[str, str], set[str]]:
        return left_out([t for t in self.found if t.name not in self.outdated], self.all_types)

    @cached_property
    def applied_early(self) -> dict[str, set[str]]:
        return applied_early(self.found)

    @cached_property
    def table_of(self) -> dict[str, LedgerTable]:
        """Column -> its table."""
        names = {c: t for t in self.found[1:] for c in t.columns}
        return {c: names.get(c, self.found[0]) for c in self.all_types}

    def check_tables(self, rules: Sequence[Rule]) -> None:
        """UserError where a table that rules read is not whole or not up to date, as `select` has it."""
        used = {self.table_of[c].name for r in rules for c in r.columns}.union(self.hidden.values())
        if first := next((self.outdated[t.name] for t in self.found if t.name in used and t.name in self.outdated), ""):
            raise UserError(first)

    def neighbours(self, rules: Sequence[Rule]) -> dict[str, tuple[Path, str]]:
        """Of the groups that rules take the best of: which members are near each other."""
        grouped = {x.column for r in rules for x in r.computed if x.kind == "best_of"}
        if not grouped:
            return {}
        some = [t for t in self.found if t is self.found[0] or grouped.intersection(t.columns)]
        return known_neighbours(self.data, some)

    # what DuckDB sees

    @cached_property
    def database(self) -> duckdb.DuckDBPyConnection:
        """One for all questions: making it takes longer than most of them. Each is asked of a cursor of its own, whose
        tables and views nobody else sees."""
        return connect(self.data.root.resolve())

    def holds(self, columns: Collection[str]) -> bool:
        """Whether the values of all these columns are in the index."""
        return all(c in self.columns and self.columns[c].facts.stored for c in columns)

    def connect(self, columns: Collection[str]) -> duckdb.DuckDBPyConnection:
        """A connection with the view `rows` over the memory of the index, as `curate.ledger.judge` needs it: `#key`
        and these columns, which the index holds."""
        con = self.database.cursor()
        arrays = [pa.array(self.rows.keys), *(self.columns[c].arrow for c in columns)]
        con.register("_index", pa.table(arrays, names=["#key", *(f"c{i}" for i in range(len(columns)))]))
        items, fields = ['"#key"'], []
        for i, column in enumerate(columns):
            if column.startswith("source."):
                fields.append(f"{quote(column[7:])} := c{i}")
            else:
                items.append(f"c{i} AS {quote(column)}")
        if fields:
            items.append(f"struct_pack({', '.join(fields)}) AS source")
        con.execute(f"CREATE TEMP VIEW rows AS SELECT {', '.join(items)} FROM _index")
        return con

    def cut_of(self, top: Computed) -> tuple[float, int] | None:
        """What `curate.ledger.judge` is told of a `top` over all rows, by the order of the column's values."""
        column = self.columns[top.column]
        low, high = column.facts.low, column.facts.high
        if low is None or high is None or max(abs(low), abs(high)) > 1 << 53:  # as doubles, whole numbers may be equal
            return None
        have = column.facts.count or 0
        count = top_count(top.fraction, have)
        cut = float(column.values[column.order[have - count]])
        first, after = column.below(cut), column.up_to(cut)  # those that equal it, in the order of keys
        return cut, int(self.rows.keys[column.order[first + count - (have - after) - 1]])

    def least_kept(self, top: Computed, states: npt.NDArray[np.int8]) -> float | None:
        """The least value that a `top` keeps, of its states; None where the index does not hold the column."""
        if not self.holds([top.column]):
            return None
        column = self.columns[top.column]
        order = column.order[: column.facts.count]
        return float(column.values[order[int(np.argmax(states[order] == 0))]])

    def odd(self, column: str) -> str:
        """What is said of a column of numbers that holds infinities; "" of others."""
        count, value = self.columns[column].facts.infinite
        return odd_words(column, value, count) if count else ""

    # what must not be shown as it is

    @cached_property
    def unsafe(self) -> dict[str, float]:
        """Columns that say how unsafe an image is -> from which value it is blurred. It is also where it has no value
        and others have."""
        facts = self.recorded.items()
        named = [c for c, said in facts if said.get("unsafe") and self.holds([c]) and self.columns[c].facts.count]
        return blurred_from(tuple(named), tuple(self.recipe.rules.items()), tuple(sorted(self.all_types)))

    def blurred(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which of some rows are unsafe to look at."""
        found = np.zeros(len(rows), np.bool_)
        for column, limit in self.unsafe.items():
            indexed = self.columns[column]
            there = indexed.has_value(rows)
            found |= ~there | ~(indexed.values[rows] < limit)
        return found

    # values of a few rows

    def facts(self, rows: npt.NDArray[Any], columns: Sequence[str]) -> pa.Table:
        """Any columns of the ledger of a few rows, in their order, read from the files of their shards."""
        out = {column: [None] * len(rows) for column in columns}
        wanted = [np.uint64(k) for k in self.rows.keys[rows].tolist()]
        shards = self.rows.shard[rows]
        stored = self._stored(columns)
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            for table, names in stored:
                if shard not in table.shards:
                    continue
                file = table.data.local(table.files[table.shards.index(shard)])
                key = self._key_column(table)
                read = read_table(file, [key, *names.values()])
                keys = pc.cast(read[key], pa.uint64()).to_numpy()
                at = {k: i for i, k in enumerate(keys.tolist())}
                for i in here.tolist():
                    if (place := at.get(int(wanted[i]))) is not None:
                        for column, name in names.items():
                            if name in read.column_names:
                                out[column][i] = read[name][place].as_py()
        return pa.table({column: pa.array(values, self._arrow_type(column)) for column, values in out.items()})

    def _key_column(self, table: LedgerTable) -> str:
        return "key" if table is self.found[0] else table.key

    @cached_property
    def _fetched_names(self) -> tuple[pa.Schema, dict[str, int]]:
        """The schema of `fetched/`, and where in it each column is, as rules name it."""
        schema = self.found[0].schema
        ours, source = fetched_columns(schema)
        places = {n: i for n, i in ours.items() if i is not None}
        return schema, {**places, **{f"source.{n}": i for n, i in source.items()}}

    def _stored(self, columns: Sequence[str]) -> list[tuple[LedgerTable, dict[str, str]]]:
        """Table -> the columns that it has of these, and what they are called there."""
        schema, places = self._fetched_names
        names = dict[str, dict[str, str]]()
        for column in columns:
            table = self.table_of[column]
            if table is not self.found[0]:
                names.setdefault(table.name, {})[column] = column
            elif column in places:
                names.setdefault(table.name, {})[column] = schema.names[places[column]]
        return [(t, names[t.name]) for t in self.found if t.name in names]

    def _arrow_type(self, column: str) -> pa.DataType:
        table = self.table_of[column]
        if table is not self.found[0]:
            return pq.read_schema(table.data.local(table.files[0])).field(column).type
        schema, places = self._fetched_names
        return schema.field(places[column]).type if column in places else pa.null()
