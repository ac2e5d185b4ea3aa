"""A condition on the list's own columns: `source.where`, in DuckDB's SQL, decided row by row.

DuckDB sees one batch of rows at a time and nothing else (curate.ledger.sql), and what would make the answer depend on
other rows or on the moment (subqueries, aggregates, random(), now()) is refused.
"""

from __future__ import annotations

import re

import duckdb
import numpy as np
import pyarrow as pa

from aesthetic.errors import UserError
from curate.ledger.sql import Bounds, connect, parse, volatile_functions, walk
from curate.sources.lists import describe


class Predicate:
    """A condition, parsed and bound to the columns of a list. `columns` are those that it names."""

    def __init__(self, condition: str, schema: pa.Schema, name: str) -> None:
        """`name` is the key of the recipe that the condition comes from. Raises UserError where it is not usable."""
        self.condition, self._name = condition, name
        self._connection = connect()
        self._bounds = Bounds(self._connection)
        self._check(schema)
        # the empty table says what DuckDB objects to: first as a condition (no aggregates there), then as it is used
        empty = schema.empty_table().select(self.columns) if self.columns else _rows(0)
        try:
            self._connection.register("list", empty)
            self._bounds.first(f"SELECT 1 FROM list WHERE (\n{condition}\n)")
            self._ask(empty)
        except duckdb.Error as e:
            raise self._error(e, schema) from e

    def mask(self, table: pa.Table, rows: int) -> np.ndarray:
        """Whether the condition is TRUE, for each row of a table with at least the columns that it names."""
        if not self.columns:
            table = _rows(rows)
        try:
            return self._ask(table)
        except duckdb.Error as e:
            raise self._error(e, table.schema) from e

    def _ask(self, table: pa.Table) -> np.ndarray:
        self._connection.register("list", table)
        query = f"SELECT coalesce(CAST((\n{self.condition}\n) AS BOOLEAN), false) AS keep FROM list"
        try:
            keep = self._bounds.run(lambda: self._connection.sql(query).to_arrow_table().column("keep"))
        except UserError as e:  # too much memory or time
            raise self._refused(str(e)) from None
        finally:
            self._connection.unregister("list")
        return keep.to_numpy()

    def _check(self, schema: pa.Schema) -> None:
        if not self.condition.strip():
            raise self._refused("is empty; write null for no condition.")
        statement = f"SELECT 1 FROM list WHERE (\n{self.condition}\n)"
        parsed = parse(statement)
        if parsed["error"]:
            raise self._refused(parsed["error_message"])
        node = parsed["statements"][0]["node"]
        rest = [node.get(part) for part in ("modifiers", "group_expressions", "having", "qualify")]
        if node["type"] != "SELECT_NODE" or any(rest) or len(parsed["statements"]) > 1:
            raise self._refused("one condition is needed, and nothing after it.")
        try:
            parts = list(walk(node["where_clause"]))
        except RecursionError:
            raise self._refused("it is nested too deep.") from None
        if any(p.get("class") == "SUBQUERY" for p in parts):
            raise self._refused("a subquery; each row is decided by itself.")
        self._refuse_moods({p["function_name"] for p in parts if p.get("class") == "FUNCTION"})
        if any(p.get("class") == "STAR" for p in parts):
            raise self._refused("name the columns one by one; * and COLUMNS() stand for more than one answer.")
        folded = {n.lower(): n for n in reversed(schema.names)}
        said = [n for p in parts if p.get("class") == "COLUMN_REF" for n in p["column_names"]]
        wanted = {n if n in schema.names else folded.get(n.lower()) for n in said}
        self.columns = [n for n in schema.names if n in wanted]

    def _refuse_moods(self, functions: set[str]) -> None:
        if volatile := functions & volatile_functions():
            raise self._refused(
                f"{min(volatile)}() gives another answer each time. "
                "For a part of the list use --limit, or a hash: hash(url) % 10 = 0."
            )

    def _error(self, e: duckdb.Error, schema: pa.Schema) -> UserError:
        text = str(e)
        if unknown := re.search(r'Referenced (?:column|table) "(.+?)" not found', text):
            column = unknown[1]
            return self._refused(f"there is no column {column!r}. {describe(schema.names, column)}")
        return self._refused(re.sub(r"^\w+ Error: ", "", text.strip().splitlines()[0]))

    def _refused(self, why: str) -> UserError:
        return UserError(f"{self._name}: {self.condition}: {why}")


def _rows(count: int) -> pa.Table:
    return pa.table({"@": pa.nulls(count)})  # for a condition that names no column
