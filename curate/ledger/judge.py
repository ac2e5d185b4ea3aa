"""Rules over the rows with an image, in DuckDB: whether each is TRUE of each row, and what functions of all rows say.

The rows are loaded once into a table `rows`, with the columns that rules name. `top` and `first_of` become comparisons;
`best_of` and `at_most` a table of the keys that they do not keep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from aesthetic.errors import UserError
from curate.ledger.early import when_known
from curate.ledger.neighbours import far_from_best
from curate.ledger.rules import Computed, Rule
from curate.ledger.schema import Status
from curate.ledger.sql import quote, short, too_much
from curate.ledger.view import hidden_condition


def as_value(column: str) -> str:
    """A column, as rules name it, as SQL over the table `rows`."""
    return f"source.{quote(column[7:])}" if column.startswith("source.") else quote(column)


def load_rows(
    con: duckdb.DuckDBPyConnection, columns: set[str], hidden: Collection[str] = ()
) -> tuple[np.ndarray, dict[str, int]]:
    """The table `rows`: every fetched row with the columns that are needed, and its key as the number `#key`.

    Rows that a column of `hidden` hides are not in it: no rule is asked of them, and none of a group is rejected for
    their sake. Their keys are returned, and how many each column hides that none before it does.
    """
    ours = sorted(c for c in columns if not c.startswith("source."))
    items = ['CAST("key" AS UBIGINT) AS "#key"', *(quote(c) for c in ours)]
    if len(ours) < len(columns):
        items.append("source")
    wanted = ", ".join(items)
    try:
        con.execute(f"CREATE TEMP TABLE rows AS SELECT {wanted}, aligned FROM _aligned")
    except duckdb.ConversionException as e:
        raise UserError(f"a key in fetched/ is not a number: {short(e)}") from None
    if con.execute("SELECT 1 FROM rows WHERE aligned IS NOT TRUE LIMIT 1").fetchone():
        con.execute(
            f"CREATE OR REPLACE TEMP TABLE rows AS SELECT {wanted} FROM ledger WHERE status = '{Status.SUCCESS}'"
        )
    keys, counts = [np.zeros(0, np.uint64)], dict[str, int]()
    for column in hidden:
        condition = hidden_condition([column])
        keys.append(con.execute(f'SELECT "#key" FROM rows WHERE {condition}').fetchnumpy()["#key"])
        counts[column] = len(keys[-1])
        con.execute(f"DELETE FROM rows WHERE {condition}")
    return np.concatenate(keys), {column: count for column, count in counts.items() if count}


def compute(
    con: duckdb.DuckDBPyConnection,
    rules: Sequence[Rule],
    types: Mapping[str, str],
    neighbours: Mapping[str, tuple[Path, str]],
    early: Collection[str] = (),
    cut_of: CutOf | None = None,
) -> list[dict[str, dict[str, float]]]:
    """Give `rows` the column of each function of all rows that rules hold; what is said of each rule's groups.

    neighbours: of columns of groups, which members are near each other (curate.ledger.neighbours). early: the names of
    the early rules. All rows are those that these leave, the view `compared`: the others may have been rejected before
    they had a value, so whether they have one must make no difference.
    """
    items, groups = [], []
    left = " AND ".join(f"{state_sql(rule, types)} = 0" for rule in rules if rule.name in early) or "true"
    con.execute(f"CREATE TEMP VIEW compared AS SELECT * FROM rows WHERE {left}")
    for rule in rules:
        found = {}
        with _blame(rule):
            for computed in rule.computed:
                if computed.grouped:
                    found[computed.column] = _rank(con, computed, types, neighbours)
                    sql = f'"#key" NOT IN (FROM {quote(f"later{computed.place}")})'
                else:
                    sql = _condition(con, computed, cut_of)
                items.append(f"({sql}) AS {quote(computed.place)}")
        groups.append(found)
    con.execute(f"CREATE TEMP VIEW judged AS SELECT {', '.join(['*', *items])} FROM rows")
    return groups


def judge(
    con: duckdb.DuckDBPyConnection,
    rules: Sequence[Rule],
    types: Mapping[str, str],
    beside: Sequence[str] = (),
    left_out: Mapping[str, str] | None = None,
    with_keys: bool = True,
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Keys of the rows; per rule: 0 where it is TRUE, 1 where it isn't, 2 where a column has no value, UNKNOWN where
    early rules left the row out of a column; and the values of the columns `beside`, masked where these are null.

    left_out: column -> SQL that is TRUE of the rows that have no value in it for that reason. with_keys: without them,
    which are most of what is read, for who knows that the rows stay in their order.
    """
    items = []
    for i, rule in enumerate(rules):
        unknown = [sql for c in rule.columns if (sql := (left_out or {}).get(c)) is not None]
        items.append(f"{state_sql(rule, types, unknown)} AS s{i}")
    try:
        values = [f"{quote(column)} AS b{i}" for i, column in enumerate(beside)]
        keys = [quote("#key")] if with_keys else []
        found = con.execute(f"SELECT {', '.join([*keys, *items, *values])} FROM judged").fetchnumpy()
    except duckdb.InterruptException:
        raise
    except duckdb.Error as e:
        for rule, item in zip(rules, items, strict=True):  # say which rule it was
            with _blame(rule):
                con.execute(f"SELECT max(s) FROM (SELECT {item.rpartition(' AS ')[0]} AS s FROM judged)")
        if isinstance(e, duckdb.OutOfMemoryException):
            raise
        raise UserError(f"the rules fail on a row: {short(e)}") from None
    states = [np.asarray(found[f"s{i}"]) for i in range(len(rules))]
    return np.asarray(found.get("#key", np.zeros(0, np.uint64))), states, [found[f"b{i}"] for i in range(len(beside))]


UNKNOWN = 3
"""Of a rule and a row: an early rule rejected the row before the rule's columns were known."""


def judge_early(
    con: duckdb.DuckDBPyConnection, rules: Sequence[Rule], types: Mapping[str, str]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Keys of the rows that early rules kept from having an image, and of each rule what `judge` says of them: UNKNOWN
    where it needs more than the list and, if the header was seen, the sizes that it said."""
    items = ['CAST("key" AS UBIGINT) AS "#key"']
    for i, rule in enumerate(rules):
        when = "annotator" if rule.computed else when_known(rule.condition)
        if when == "annotator":
            sql = f"CAST({UNKNOWN} AS TINYINT)"
        else:
            sql = state_sql(rule, types, ["original_width IS NULL"] if when == "header" else [])
        items.append(f"{sql} AS s{i}")
    try:
        sql = f"SELECT {', '.join(items)} FROM _fetched WHERE status = '{Status.REJECTED_EARLY}'"
        found = con.execute(sql).fetchnumpy()
    except (duckdb.OutOfMemoryException, duckdb.InterruptException):
        raise
    except duckdb.Error as e:
        raise UserError(f"the rules fail on a row that was rejected early: {short(e)}") from None
    return np.asarray(found["#key"]), [np.asarray(found[f"s{i}"]) for i in range(len(rules))]


def state_sql(rule: Rule, types: Mapping[str, str], unknown: Sequence[str] = ()) -> str:
    """SQL over a row's columns: 0 where a rule is TRUE of it, 1 where it isn't, 2 where a column has no value.

    types: of the columns that rules name, `similarity` or `source.WIDTH`, as DuckDB calls them. unknown: SQL that is
    TRUE where nothing can be said.
    """
    empty = [f"{as_value(c)} IS NULL" for c in rule.required]
    empty += [no for c in rule.finite if (no := _no_value(c, types[c]))]
    null = f"WHEN {' OR '.join(unknown)} THEN {UNKNOWN} " if unknown else ""
    null += f"WHEN {' OR '.join(empty)} THEN 2 " if empty else ""
    return f"CAST(CASE {null}WHEN ({rule.sql}) THEN 0 ELSE 1 END AS TINYINT)"


@contextlib.contextmanager
def _blame(rule: Rule) -> Iterator[None]:
    """Say of DuckDB's errors which rule they are of."""
    try:
        yield
    except duckdb.OutOfMemoryException:
        raise UserError(f"rule {rule.name} ({rule.condition}) {too_much()}") from None
    except duckdb.InterruptException:
        raise
    except duckdb.Error as e:
        raise UserError(f"rule {rule.name} ({rule.condition}) fails on a row: {short(e)}") from None


def _no_value(column: str, kind: str) -> str:
    """SQL that is true where what a column holds counts as no value; empty where all does."""
    value = as_value(column)
    if kind in ("FLOAT", "DOUBLE"):
        return f"NOT isfinite({value})"
    return f"length({value}) <> 16" if column == "phash" else ""


def odd_values(con: duckdb.DuckDBPyConnection, columns: Sequence[str], types: Mapping[str, str]) -> list[str]:
    """What is said of columns that hold infinities, or perceptual hashes that are none."""
    found = []
    for column in columns:
        value, no = as_value(column), _no_value(column, types[column])
        if not no:
            continue
        odd = f"isinf({value})" if types[column] in ("FLOAT", "DOUBLE") else no
        row = con.execute(f"SELECT count(*), any_value({value}) FROM rows WHERE {odd}").fetchone()
        if row and row[0]:
            found.append(odd_words(column, row[1], row[0]))
    return found


def odd_words(column: str, value: Any, count: int) -> str:
    """What is said of a column where some values are none."""
    return f"{column} is {str(value)[:40]!r} or the like in {count:,} rows; that counts as no value"


def _condition(con: duckdb.DuckDBPyConnection, computed: Computed, cut_of: CutOf | None) -> str:
    """What a `top` or a `first_of` comes to on these rows, as a condition."""
    value = as_value(computed.column)
    if computed.kind == "first_of":
        later = quote(f"later{computed.place}")
        con.execute(
            f'CREATE TEMP TABLE {later} AS SELECT "#key" FROM compared JOIN (SELECT {value} AS "#v", min("#key") AS '
            f'"#first" FROM compared GROUP BY 1 HAVING count(*) > 1) ON {value} = "#v" WHERE "#key" <> "#first"'
        )
        return f'"#key" NOT IN (FROM {later})'
    value = f"CAST({value} AS DOUBLE)"
    if cut_of is not None and (known := cut_of(computed)) is not None:
        cut, last = known
    else:
        values = numbers_of(con, computed.column)
        if not len(values):
            return "false"
        count = top_count(computed.fraction, len(values))
        cut = float(np.partition(values, len(values) - count)[len(values) - count])
        equal = f"SELECT \"#key\" FROM compared WHERE {value} = CAST('{cut!r}' AS DOUBLE) ORDER BY 1"
        ((last,),) = con.execute(f"{equal} LIMIT 1 OFFSET {count - int((values > cut).sum()) - 1}").fetchall()
    bound = f"CAST('{cut!r}' AS DOUBLE)"
    return f'{value} > {bound} OR ({value} = {bound} AND "#key" <= {last})'


CutOf = Callable[[Computed], tuple[float, int] | None]
"""A `top` -> the least value that it keeps, and the last key that it keeps of this value; None: to be found out."""


def top_count(fraction: float, count: int) -> int:
    """How many of so many rows the best fraction is: half up, so that a fraction of a row counts as a row from one half
    on; at least one."""
    return max(1, int(np.floor(fraction * count + 0.5)))


def _rank(
    con: duckdb.DuckDBPyConnection,
    computed: Computed,
    types: Mapping[str, str],
    neighbours: Mapping[str, tuple[Path, str]],
) -> dict[str, float]:
    """Make the table `laterPLACE` of the keys that a `best_of` or an `at_most` does not keep; facts about its groups.

    Only rows of groups that are larger than what stays of each are put in order.
    """
    value, sizes, later = as_value(computed.column), quote(f"sizes{computed.place}"), quote(f"later{computed.place}")
    no = _no_value(computed.column, types[computed.column])
    con.execute(
        f'CREATE TEMP TABLE {sizes} AS SELECT {value} AS "#group", count(*) AS "#size" FROM compared '
        f"WHERE {value} IS NOT NULL {f'AND NOT ({no})' if no else ''} GROUP BY 1 HAVING count(*) > 1"
    )
    number = f"CAST(({computed.expression}) AS DOUBLE)" if computed.expression else "0.0"
    number = f"CASE WHEN isfinite({number}) THEN {number} END"
    joined, split = f'compared JOIN {sizes} ON {value} = "#group"', dict[str, float]()
    con.execute(f'CREATE TEMP TABLE {later} ("#key" UBIGINT)')
    ranked = f'{joined} WHERE "#size" > {computed.count}'
    if computed.kind == "best_of" and computed.column in neighbours:
        found = con.execute(f'SELECT "#key", {number} AS v FROM {joined}').fetchnumpy()
        keys, values = np.asarray(found["#key"]), np.ma.filled(found["v"], np.nan)
        del found
        known, stay = far_from_best(neighbours[computed.column][0], keys, values)
        con.register("_near", pa.table({"#k": keys[known], "#stay": stay[known]}))
        con.execute(f'INSERT INTO {later} SELECT "#k" FROM _near WHERE NOT "#stay"')
        ranked += ' AND "#key" NOT IN (SELECT "#k" FROM _near)'
        several = f'{joined} JOIN _near ON "#k" = "#key" WHERE "#stay" GROUP BY "#group" HAVING count(*) > 1'
        split["split"] = con.execute(f"SELECT count(*) FROM (SELECT 1 FROM {several})").fetchall()[0][0]
    con.execute(
        f'INSERT INTO {later} SELECT "#key" FROM (SELECT "#key", '
        f'row_number() OVER (PARTITION BY "#group" ORDER BY {number} DESC NULLS LAST, "#key") AS "#rank" '
        f'FROM {ranked}) WHERE "#rank" > {computed.count}'
    )
    if split:
        con.unregister("_near")
    row = con.execute(
        'SELECT count(*), coalesce(sum("#size"), 0), coalesce(median("#size"), 0), coalesce(max("#size"), 0) '
        f"FROM {sizes}"
    ).fetchone()
    assert row is not None
    return {"groups": row[0], "images": int(row[1]), "median": row[2], "largest": row[3], **split}


def numbers_of(con: duckdb.DuckDBPyConnection, column: str) -> np.ndarray:
    """The values of a numeric column over the rows that are compared and have one, as float64 in no order."""
    value = f"CAST({as_value(column)} AS DOUBLE)"
    return con.execute(f"SELECT {value} AS v FROM compared WHERE isfinite({value})").fetchnumpy()["v"]


def failures(con: duckdb.DuckDBPyConnection) -> tuple[np.ndarray, dict[str, int]]:
    """Keys of the rows that failed, and how many there are for each reason, the commonest first."""
    con.execute(
        'CREATE TEMP TABLE failed AS SELECT CAST("key" AS UBIGINT) AS k, '
        f"coalesce(reason, status, 'unknown') AS reason FROM _fetched WHERE "
        f"status IS DISTINCT FROM '{Status.SUCCESS}' AND status IS DISTINCT FROM '{Status.REJECTED_EARLY}'"
    )
    keys = con.execute("SELECT k FROM failed").fetchnumpy()["k"]
    reasons = con.execute("SELECT reason, count(*) AS n FROM failed GROUP BY 1 ORDER BY n DESC, 1").fetchall()
    return np.asarray(keys), dict(reasons)


def rejected_early(con: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """How many rows each early rule kept from having an image, the commonest first."""
    sql = f"SELECT reason, count(*) AS n FROM _fetched WHERE status = '{Status.REJECTED_EARLY}' GROUP BY 1"
    return dict(con.execute(f"{sql} ORDER BY n DESC, 1").fetchall())
