"""Early rules, asked while rows are fetched: of the rows of a list, and of the sizes that headers say.

DuckDB is asked here as `select` asks it, with the same SQL over columns of the same types, so an early rule rejects
exactly what the rule rejects in a selection.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import duckdb
import pyarrow as pa

from aesthetic.errors import UserError
from curate.images.prefix import prefix_size
from curate.ledger.early import HEADER_COLUMNS, when_known
from curate.ledger.judge import state_sql
from curate.ledger.rules import Rule, check_rules
from curate.ledger.schema import URL_COLUMNS, RejectedEarly, stored_schema
from curate.ledger.sql import Bounds, connect, parse_condition, quote, references, short
from curate.ledger.view import conform, fetched_columns, ledger_types, source_types

_CHEAP = {
    *("+", "-", "*", "/", "//", "%", "abs", "least", "greatest", "round", "floor", "ceil", "sqrt", "ln", "log", "log2"),
    *("power", "pow", "sign", "coalesce", "ifnull"),
}
"""Functions of numbers that take next to no time or memory: rules that hold no others are asked without the bounds of
`curate.ledger.sql`, which take twice as long as the question."""


class EarlyRules:
    """The early rules of a worker that are judged while rows are fetched, understood.

    Args:
        rules: name -> condition, in the order of the selection; those on columns of the list and on header sizes.
        extra_columns: of the list.
    """

    def __init__(self, rules: Mapping[str, str], extra_columns: pa.Schema) -> None:
        self.conditions = dict(rules)
        self.extra_columns = extra_columns
        source = source_types(extra_columns)
        self.types = {**ledger_types(), **{f"source.{name}": kind for name, kind in source.items()}}
        found = check_rules(rules, ledger_types(), source, {}) if rules else []
        self.listed = [rule for rule in found if when_known(rule.condition) == "list"]
        self.header = [rule for rule in found if when_known(rule.condition) == "header"]

    def __bool__(self) -> bool:
        return bool(self.conditions)

    @functools.cached_property
    def columns(self) -> set[str]:
        """What the rules name of a list's row."""
        return {c for rule in (*self.listed, *self.header) for c in rule.columns}.difference(HEADER_COLUMNS)


class ShardRules:
    """The early rules over the rows of one shard. For `with`: it holds a small database, which belongs to one thread.

    Raises UserError where the SQL of a rule fails on a row, or takes too much.
    """

    def __init__(self, rules: EarlyRules, table: pa.Table, keys: list[str]) -> None:
        """table: url, caption and the extra columns, under the names that they are stored by."""
        self._rules = rules
        self._listed: list[Rule | None] = [None] * table.num_rows
        self._sizes: dict[Any, Rule | None] = {}  # what was asked before
        if not rules:
            return
        self._bounds = Bounds(connect(threads=1))
        try:
            self._load(table, keys)
            self._judge_list()
            self._prepare()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ShardRules:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._rules:
            self._bounds.close()

    def check_row(self, index: int) -> None:
        """RejectedEarly where a rule on columns of the list rejects a row."""
        if (rule := self._listed[index]) is not None:
            raise RejectedEarly(rule.name, rule.condition)

    def check_prefix(self, index: int, data: bytes) -> bool:
        """Whether these first bytes of a row's image say its size; RejectedEarly where a rule rejects that.

        Where the image may lie on its side, it is rejected only if it is so both ways.
        """
        if not self._rules.header:
            return True
        if (found := prefix_size(data)) is None:
            return False
        width, height, upright = found
        rule = self._asked(index, width, height)
        if rule is not None and (upright or self._asked(index, height, width) is not None):
            raise RejectedEarly(rule.name, rule.condition, (width, height))
        return True

    def check_size(self, index: int, width: int | None, height: int | None) -> None:
        """RejectedEarly where a rule rejects the size of a row's image, pixels upright."""
        if self._rules.header and (rule := self._asked(index, width, height)) is not None:
            size = (width, height) if width is not None and height is not None else None
            raise RejectedEarly(rule.name, rule.condition, size)

    # ---------------------------------------------------------------------------------------------------- questions

    def _load(self, table: pa.Table, keys: list[str]) -> None:
        """The table `rows`: what rules name of the list, typed as the ledger has it, and the row's index `#i`."""
        # a shard lacks the columns of lists that were added later
        table = conform(table, pa.schema([*URL_COLUMNS, *stored_schema(self._rules.extra_columns)]))
        columns, source = fetched_columns(table.schema)
        wanted = {c.lower() for c in self._rules.columns}
        numbered = pa.table(
            [*table.columns, pa.array(keys, pa.string()), pa.array(range(len(keys)), pa.int32())],
            names=[*(f"c{i}" for i in range(table.num_columns)), "k", "i"],
        )
        items = ['i AS "#i"', *(f"c{columns[n]} AS {n}" for n in ("url", "caption") if n in wanted)]
        if "key" in wanted:
            items.append("k AS key")
        fields = [f"{quote(n)} := c{at}" for n, at in source.items() if f"source.{n}".lower() in wanted]
        if fields:
            items.append(f"struct_pack({', '.join(fields)}) AS source")
        con = self._bounds.con
        con.register("_listed", numbered)
        con.execute(f"CREATE TEMP TABLE rows AS SELECT {', '.join(items)} FROM _listed")
        con.unregister("_listed")

    def _judge_list(self) -> None:
        """Of each row the first rule on columns of the list that isn't TRUE."""
        for rule in reversed(self._rules.listed):
            sql = f'SELECT "#i" FROM rows WHERE {state_sql(rule, self._rules.types)} <> 0'
            for (index,) in self._run(rule, sql):
                self._listed[index] = rule

    def _prepare(self) -> None:
        """A prepared statement per rule on sizes: planning one takes five times as long as asking it."""
        self._direct = {}
        for i, rule in enumerate(self._rules.header):
            state = state_sql(rule, self._rules.types)
            sizes = "(SELECT $1::INTEGER AS original_width, $2::INTEGER AS original_height) AS sizes"
            listed = len(set(rule.columns) - HEADER_COLUMNS) > 0
            rows = f'{sizes}, rows WHERE "#i" = $3' if listed else sizes
            self._bounds.con.execute(f"PREPARE size{i} AS SELECT {state} FROM {rows}")
            functions = (n for n in references(parse_condition(rule.condition)) if n["class"] == "FUNCTION")
            self._direct[rule.name] = all(n["function_name"].lower() in _CHEAP for n in functions), listed

    def _asked(self, index: int, width: int | None, height: int | None) -> Rule | None:
        """The first rule on sizes that isn't TRUE of a row whose image has this size."""
        of_row = any(listed for _, listed in self._direct.values())
        place = (width, height, index if of_row else -1)
        if place not in self._sizes:
            self._sizes[place] = next((r for i, r in enumerate(self._rules.header) if self._rejects(i, r, place)), None)
        return self._sizes[place]

    def _rejects(self, number: int, rule: Rule, place: tuple[int | None, int | None, int]) -> bool:
        direct, listed = self._direct[rule.name]
        words = ["NULL" if value is None else str(value) for value in (place if listed else place[:2])]
        sql = f"EXECUTE size{number}({', '.join(words)})"
        rows = self._fetch(rule, sql) if direct else self._run(rule, sql)
        return rows[0][0] != 0

    def _run(self, rule: Rule, sql: str) -> list[tuple[Any, ...]]:
        return self._bounds.run(lambda: self._fetch(rule, sql))

    def _fetch(self, rule: Rule, sql: str) -> list[tuple[Any, ...]]:
        try:
            return self._bounds.con.execute(sql).fetchall()
        except (duckdb.OutOfMemoryException, duckdb.InterruptException):
            raise
        except duckdb.Error as e:
            raise UserError(f"rule {rule.name} ({rule.condition}) fails on a row: {short(e)}") from None
