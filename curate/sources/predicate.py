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
from curate.ledger.sql import Bounds, connect, parse_condition, volatile_functions, walk
from curate.sources.columns import describe


class Predicate:
    """A condition, parsed and bound to the columns of a list. `columns` are those that it names."""

    def __init__(self, condition: str, schema: pa.Schema, name: str) -> None:
        """`name` is the key of the recipe that the condition comes from. Raises UserError where it is not usable."""
        self.condition, self._name, self._names = condition, name, schema.names
        self._connection = connect()
        self._bounds = Bounds(self._connection)
        self._check(schema)
        # the empty table says what DuckDB objects to: first as a condition (no aggregates there), then as it is used
        empty = schema.empty_table().select(self.columns)
        self._run(f"SELECT true AS keep FROM list WHERE (\n{condition}\n)", empty, 0)
        self.mask(empty, 0)

    def mask(self, table: pa.Table, rows: int) -> np.ndarray:
        """Whether the condition is TRUE, for each row of a table with at least the columns that it names."""
        sql = f"SELECT coalesce(CAST((\n{self.condition}\n) AS BOOLEAN), false) AS keep FROM list"
        return self._run(sql, table, rows)

    def _run(self, sql: str, table: pa.Table, rows: int) -> np.ndarray:
        if not self.columns:  # a table must have one
            table = pa.table({"@": pa.nulls(rows)})
        self._connection.register("list", table)
        try:
            return self._bounds.run(lambda: self._connection.sql(sql).to_arrow_table().column("keep")).to_numpy()
        except UserError as e:  # too much memory or time
            raise self._error(str(e)) from None
        except duckdb.Error as e:
            if unknown := re.search(r'Referenced (?:column|table) "(.+?)" not found', str(e)):
                why = f"there is no column {unknown[1]!r}. {describe(self._names, unknown[1])}"
                raise self._error(why) from e
            raise self._error(re.sub(r"^\w+ Error: ", "", str(e).strip().splitlines()[0])) from e
        finally:
            self._connection.unregister("list")

    def _check(self, schema: pa.Schema) -> None:
        """Refuse what is not one condition on one row, and find the columns that it names."""
        if not self.condition.strip():
            raise self._error("is empty; write null for no condition.")
        try:
            parts = list(walk(parse_condition(self.condition)))
        except UserError as e:
            raise self._error(str(e)) from None
        except RecursionError:
            raise self._error("it is nested too deep.") from None
        classes = {p.get("class") for p in parts}
        if "SUBQUERY" in classes:
            raise self._error("a subquery; each row is decided by itself.")
        if "STAR" in classes:
            raise self._error("name the columns one by one; * and COLUMNS() stand for more than one answer.")
        functions = {p["function_name"] for p in parts if p.get("class") == "FUNCTION"}
        if volatile := functions & volatile_functions():
            raise self._error(
                f"{min(volatile)}() gives another answer each time. "
                "For a part of the list use --limit, or a hash: hash(url) % 10 = 0."
            )
        folded = {n.lower(): n for n in reversed(schema.names)}
        named = [n for p in parts if p.get("class") == "COLUMN_REF" for n in p["column_names"]]
        wanted = {n if n in schema.names else folded.get(n.lower()) for n in named}
        self.columns = [n for n in schema.names if n in wanted]

    def _error(self, why: str) -> UserError:
        return UserError(f"{self._name}: {self.condition}: {why}")
