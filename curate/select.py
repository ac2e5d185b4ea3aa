"""Named rules over the ledger -> one verdict per row, in seconds and without opening an image.

A rule is an SQL condition. It keeps a row only where it is TRUE, and rejects where any column that it names is NULL or
NaN, whatever the function: DuckDB's `least` skips NULLs, and NaN >= 5 is TRUE there. The rows with an image are loaded
once, with the columns that rules name; `top` and `first_of` become plain comparisons over them, because each depends
on all fetched rows and on nothing that another rule did.
"""

from __future__ import annotations

import copy
import difflib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.ledger import Status
from curate.store import UserError, atomic, commit, digest, is_done, read_json, sha256_file, uncommit
from curate.view import (
    batches,
    check_current,
    connect,
    is_current,
    open_ledger,
    quote,
    short,
    table_digests,
    tables,
    types_there,
    walk,
)

KEPT = "kept"
NOT_FETCHED = "not_fetched"
NOT_IN_UIDS = "not_in_uids"
RESERVED = (KEPT, NOT_FETCHED, NOT_IN_UIDS)
"""Verdicts that are ours: a rule may not be called so."""

LEVELS = {
    "min": 0.0,
    "1%": 0.01,
    "5%": 0.05,
    "10%": 0.1,
    "25%": 0.25,
    "median": 0.5,
    "75%": 0.75,
    "90%": 0.9,
    "95%": 0.95,
    "99%": 0.99,
    "max": 1.0,
}
"""The quantiles that are noted for each score, linearly interpolated."""

UID = np.dtype("u8,u8")
"""A 128-bit uid as DataComp's subset files hold it: its high half, then its low half."""

_FORMAT = 1  # of selected/NAME.parquet and .json; part of what makes a selection stale


class NothingKept(Exception):
    """A selection kept no row, so there is nothing to pack (exit code 3). The message says which rules did it."""


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """A selection: a name, and rules in order. `rules` maps a rule's name to an SQL condition over the ledger."""

    name: str = "default"
    rules: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name(self.name)


@dataclass(frozen=True, kw_only=True)
class RuleCount:
    """What one rule did. Counts are of fetched rows."""

    name: str
    condition: str
    rejected: int  # rows that no earlier rule had rejected
    alone: int  # rows that it would reject if it were the only rule
    nulls: int  # those of `alone` where a column that it names has no value


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a selection did with every row: rows == not fetched + the sum of `rejected` over rules + kept."""

    name: str
    rows: int
    not_fetched: dict[str, int]  # reason -> rows, the commonest first
    rules: list[RuleCount]
    kept: int
    quantiles: dict[str, dict[str, float]]  # numeric column -> level -> value, over the fetched rows that have one
    warnings: list[str]

    @property
    def fetched(self) -> int:
        """Rows that have an image."""
        return self.rows - sum(self.not_fetched.values())

    @property
    def funnel(self) -> dict[str, int]:
        """Verdict -> rows, in the order of the rules; the values sum to `rows`."""
        return {NOT_FETCHED: self.rows - self.fetched, **{r.name: r.rejected for r in self.rules}, KEPT: self.kept}


# -------------------------------------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Computed:
    """A `top` or `first_of` inside a rule; in the rule's SQL it is a column called `place`."""

    kind: Literal["top", "first_of"]
    column: str
    fraction: float  # of `top`
    place: str


@dataclass(frozen=True)
class Rule:
    """A rule that was understood: its condition as SQL of ours, and the columns that it names as rules name them."""

    name: str
    condition: str
    sql: str
    columns: tuple[str, ...]
    computed: tuple[Computed, ...]


_EXPRESSIONS = {
    "COMPARISON", "CONJUNCTION", "FUNCTION", "CONSTANT", "COLUMN_REF", "OPERATOR", "CASE", "BETWEEN", "CAST",
    "COLLATE", "LAMBDA", "TYPE",
}  # fmt: skip
_REFUSED = {
    "SUBQUERY": "a query inside it",
    "WINDOW": "a window function (top and first_of are there for what needs all rows)",
    "STAR": "a star",
    "PARAMETER": "a parameter",
}
_NUMBER = re.compile(r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?|FLOAT|DOUBLE|DECIMAL\(.*\)")


def check_rules(
    rules: Mapping[str, str],
    columns: Mapping[str, str],
    source_columns: Mapping[str, str],
    scales: Mapping[str, tuple[float, float]],
) -> list[Rule]:
    """The rules, understood; needs no data. UserError names the rule, what is wrong with it and the nearest right name.

    `columns` are the ledger's own and the scores, `source_columns` the list's, both name -> DuckDB type
    (curate.view.ledger_types and source_types give them). `scales` maps a score to the (lowest, highest) value of its
    head: comparing it with a constant outside is refused, because such a threshold was made for another head.
    """
    names = _Names(columns, source_columns)
    checked: list[Rule] = []
    with connect() as con:
        unstable = _unstable_functions()
        place = 0
        for name, condition in rules.items():
            if not isinstance(name, str) or not name.strip() or not name.isprintable():
                raise UserError(f"{name!r} can't be a rule's name: printable text is expected")
            if name in RESERVED:
                raise UserError(f"a rule can't be called {name}: that is a verdict of its own. Choose another name.")
            if not isinstance(condition, str):
                raise UserError(f"rule {name}: an SQL condition in quotes is expected, not {condition!r}")
            rule = _understand(con, name, condition, names, scales, unstable, place)
            place += len(rule.computed)
            checked.append(rule)
        _check_types(con, checked, columns, source_columns)
    return checked


@functools.cache
def _unstable_functions() -> frozenset[str]:
    """DuckDB's functions that need not give the same value each time: random, now and the like."""
    with connect() as con:
        sql = "SELECT function_name FROM duckdb_functions() WHERE stability <> 'CONSISTENT'"
        return frozenset(row[0] for row in con.execute(sql).fetchall())


class _Names:
    """The columns that a rule may name, found without regard to case as SQL does, and the nearest where it is wrong."""

    def __init__(self, columns: Mapping[str, str], source: Mapping[str, str]) -> None:
        self.columns = columns
        self.source = source
        self._ours = {n.lower(): n for n in columns}
        self._theirs = {n.lower(): n for n in source}

    def find(self, parts: Sequence[str]) -> str:
        """The column behind a reference, as rules write it: `similarity`, `source.WIDTH`."""
        if parts[0].lower() == "source":
            if len(parts) == 1:
                raise UserError("`source` alone is no column: write source.NAME" + self._there())
            if parts[1].lower() in self._theirs:
                return f"source.{self._theirs[parts[1].lower()]}"
            raise UserError(f"the list has no column {parts[1]}{self._nearest('source.' + parts[1])}")
        ours = self._ours.get(parts[0].lower())
        if ours is not None and ours != parts[0] and parts[0] in self.source:
            raise UserError(
                f"{parts[0]} may mean two columns: write source.{parts[0]} for the list's, {ours} for the ledger's own"
            )
        if ours is not None:
            return ours
        hint = (
            f". The list has one: write source.{self._theirs[parts[0].lower()]}"
            if parts[0].lower() in self._theirs
            else ""
        )
        raise UserError(f"the ledger has no column {parts[0]}{hint or self._nearest(parts[0])}")

    def type_of(self, column: str) -> str:
        return self.source[column.removeprefix("source.")] if column.startswith("source.") else self.columns[column]

    def _nearest(self, word: str) -> str:
        known = [*self.columns, *(f"source.{n}" for n in self.source)]
        found = difflib.get_close_matches(word.lower(), [k.lower() for k in known], n=1)
        if found:
            return f". Did you mean {next(k for k in known if k.lower() == found[0])}?"
        return f". There are {', '.join(known)}."

    def _there(self) -> str:
        return f" (there are {', '.join(self.source)})" if self.source else " (this list carries none)"


def _understand(
    con: duckdb.DuckDBPyConnection,
    name: str,
    condition: str,
    names: _Names,
    scales: Mapping[str, tuple[float, float]],
    unstable: frozenset[str],
    place: int,
) -> Rule:
    """One rule as a tree, its columns found, `top` and `first_of` taken out, and the rest as SQL again.

    The SQL that runs is printed from the tree, so nothing can hide from these checks in how a rule is written.
    """

    def wrong(what: str) -> UserError:
        return UserError(f"rule {name} ({condition}): {what}")

    tree = _serialize(con, "SELECT " + condition)
    if tree["error"] and tree["error_type"] == "parser":
        raise wrong(str(tree["error_message"]))
    node = tree["statements"][0]["node"] if len(tree.get("statements", [])) == 1 else {}
    plain: dict[str, Any] = {
        "modifiers": [],
        "group_expressions": [],
        "where_clause": None,
        "having": None,
        "qualify": None,
        "sample": None,
    }
    if (
        node.get("type") != "SELECT_NODE"
        or len(node["select_list"]) != 1
        or node["from_table"]["type"] != "EMPTY"
        or node["cte_map"]["map"]
        or any(node[k] != v for k, v in plain.items())
    ):
        raise wrong("one condition is expected, without SELECT, FROM, commas or anything after it")
    expression = node["select_list"][0]

    columns: dict[str, None] = {}
    computed: list[Computed] = []
    try:
        for part in list(_references(expression, frozenset())):
            kind = part["class"]
            if kind == "COLUMN_REF":
                columns[names.find(part["column_names"])] = None
            elif kind not in _EXPRESSIONS:
                raise UserError(f"a rule can't hold {_REFUSED.get(kind, kind.lower())}")
            elif kind == "FUNCTION" and part["function_name"].lower() in ("top", "first_of"):
                computed.append(_computed(con, part, names, place + len(computed)))
            elif kind == "FUNCTION" and part["function_name"].lower() in unstable:
                raise UserError(f"{part['function_name']}() gives another value each time, and a selection may not")
            else:
                _check_scale(con, part, scales)
    except UserError as e:
        raise wrong(str(e)) from None
    if expression.get("alias"):
        raise wrong(f"what does {expression['alias']!r} at its end mean? One condition is expected")
    return Rule(name, condition, _print(con, expression), tuple(columns), tuple(computed))


def _serialize(con: duckdb.DuckDBPyConnection, sql: str) -> dict[str, Any]:
    row = con.execute("SELECT json_serialize_sql(?)", [sql]).fetchone()
    assert row is not None
    return json.loads(row[0])


def _print(con: duckdb.DuckDBPyConnection, expression: dict[str, Any]) -> str:
    """An expression's tree as SQL."""
    tree = _serialize(con, "SELECT 1")
    tree["statements"][0]["node"]["select_list"] = [expression]
    row = con.execute("SELECT json_deserialize_sql(CAST(? AS JSON))", [json.dumps(tree)]).fetchone()
    assert row is not None
    return row[0].removeprefix("SELECT ")


def _references(node: Any, bound: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Every expression inside a tree, but for a lambda's own parameters, which are no columns."""
    if isinstance(node, list):
        for item in node:
            yield from _references(item, bound)
        return
    if not isinstance(node, dict):
        return
    if node.get("class") == "LAMBDA":
        bound |= {n["column_names"][0] for n in walk(node["lhs"]) if n.get("class") == "COLUMN_REF"}
    if node.get("class") == "COLUMN_REF" and node["column_names"][0] in bound:
        return
    if "class" in node:
        yield node
    for value in node.values():
        yield from _references(value, bound)


def _arguments(function: dict[str, Any]) -> list[dict[str, Any]]:
    """A function's arguments; DuckDB 2 keeps them under another name than DuckDB 1."""
    if "children" in function:
        return function["children"]
    return [a["expression"] for a in function["arguments"]]


def _computed(con: duckdb.DuckDBPyConnection, function: dict[str, Any], names: _Names, number: int) -> Computed:
    """Understand a `top` or `first_of` and leave a column in its place."""
    kind: Literal["top", "first_of"] = "top" if function["function_name"].lower() == "top" else "first_of"
    usage = "top(COLUMN, FRACTION), for example top(similarity, 0.3)" if kind == "top" else "first_of(COLUMN)"
    arguments = _arguments(function)
    if len(arguments) != (2 if kind == "top" else 1) or arguments[0].get("class") != "COLUMN_REF":
        raise UserError(f"{kind} is written {usage}")
    reference = copy.deepcopy(arguments[0])
    if len(reference["column_names"]) > (2 if reference["column_names"][0].lower() == "source" else 1):
        raise UserError(f"{kind} takes a whole column, not a part of one")
    column = names.find(reference["column_names"])
    fraction = 1.0
    if kind == "top":
        if not _NUMBER.fullmatch(names.type_of(column)):
            raise UserError(f"top({column}, ...) needs numbers, and {column} is {names.type_of(column)}")
        value = _constant(con, arguments[1])
        if value is None or not 0 < value <= 1:
            raise UserError(f"the fraction in {usage} must be above 0 and at most 1")
        fraction = value
    result = Computed(kind, column, fraction, f"#{number}")
    reference["column_names"] = [result.place]
    function.clear()
    function.update(reference)
    return result


def _constant(con: duckdb.DuckDBPyConnection, expression: dict[str, Any]) -> float | None:
    """The number that an expression without columns is; None where it names columns or is no number."""
    if any(n.get("class") in ("COLUMN_REF", "SUBQUERY", "WINDOW", "PARAMETER", "STAR") for n in walk(expression)):
        return None
    try:
        row = con.execute(f"SELECT TRY_CAST({_print(con, expression)} AS DOUBLE)").fetchone()
    except duckdb.Error:
        return None  # what is wrong with it is said when the whole rule is bound
    return None if row is None or row[0] is None else float(row[0])


def _check_scale(
    con: duckdb.DuckDBPyConnection,
    expression: dict[str, Any],
    scales: Mapping[str, tuple[float, float]],
) -> None:
    """Refuse a comparison of a score with a constant that its head can't have meant."""
    if expression["class"] == "COMPARISON":
        sides = [expression["left"], expression["right"]]
        pairs = [(sides[0], sides[1]), (sides[1], sides[0])]
    elif expression["class"] == "BETWEEN":
        pairs = [(expression["input"], expression["lower"]), (expression["input"], expression["upper"])]
    else:
        return
    for one, other in pairs:
        if one.get("class") != "COLUMN_REF" or len(one["column_names"]) != 1:
            continue
        column = next((c for c in scales if c.lower() == one["column_names"][0].lower()), None)
        value = _constant(con, other) if column is not None else None
        if column is not None and value is not None and not scales[column][0] <= value <= scales[column][1]:
            low, high = scales[column]
            raise UserError(
                f"{column} goes from {low:g} to {high:g}, and {value:g} is outside. Is it meant for another head?"
            )


def _check_types(
    con: duckdb.DuckDBPyConnection, rules: Sequence[Rule], columns: Mapping[str, str], source: Mapping[str, str]
) -> None:
    """Bind every rule to an empty ledger: functions exist, types fit, the result is a boolean."""
    parts = [f"{quote(n)} {t}" for n, t in columns.items()]
    if source:
        parts.append("source STRUCT(" + ", ".join(f"{quote(n)} {t}" for n, t in source.items()) + ")")
    parts += [f"{quote(c.place)} BOOLEAN" for r in rules for c in r.computed]
    con.execute(f"CREATE TABLE ledger ({', '.join(parts)})")
    for rule in rules:
        try:
            # beside a column, so that an aggregate is refused too
            row = con.execute(
                f'SELECT column_type FROM (DESCRIBE SELECT ({rule.sql}) AS c, "key" FROM ledger)'
            ).fetchone()
        except duckdb.Error as e:
            raise UserError(f"rule {rule.name} ({rule.condition}): {short(e)}") from None
        assert row is not None
        if row[0] != "BOOLEAN":
            kind = "NULL" if row[0] == '"NULL"' else row[0]
            raise UserError(
                f"rule {rule.name} ({rule.condition}): it gives {kind}, and a rule is a condition (true or false)"
            )


# ---------------------------------------------------------------------------------------------------------- selecting


def select(root: Path, config: SelectConfig, scales: Mapping[str, tuple[float, float]]) -> Selection:
    """Apply the rules to every row of the ledger and write `selected/NAME.parquet` and `.json`, unless that is done.

    `selected/NAME.parquet` holds (key, verdict) for every row, in the order of keys: `not_fetched`, the name of the
    first rule that isn't TRUE, or `kept`. Raises UserError for a rule that is wrong (see check_rules), for tables that
    are incomplete or stale, and for a rule that fails on a row (a cast, say).
    """
    root = Path(root)
    _check_name(config.name)
    found = tables(root)
    columns, source = types_there(root)
    rules = check_rules(config.rules, columns, source, scales)
    used = {c for r in rules for c in r.columns}
    current = [t for t in found if t is found[0] or t.column in used]
    check_current(root, current)
    # quantiles are shown for scores that no rule names, too, where these are complete
    scores = [str(t.column) for t in found[1:] if t in current or is_current(root, [found[0], t])]
    inputs = table_digests(current)
    key = digest([_FORMAT, list(config.rules.items()), scores])
    record = _record(root, config.name)
    if is_done(root, record, config=key, inputs=inputs):
        return load_selection(root, config.name)

    con = open_ledger(root, used | set(scores))
    try:
        _load_rows(con, used | set(scores), types := {**columns, **{f"source.{n}": t for n, t in source.items()}})
        fetched_keys, states = _states(con, rules, types)
        numbers = sorted(c for c in used if _NUMBER.fullmatch(types[c]))
        quantiles = {c: q for c in [*scores, *(n for n in numbers if n not in scores)] if (q := _quantiles(con, c))}
        failed, not_fetched = _failures(con)
    finally:
        con.close()

    fetched = len(fetched_keys)
    verdicts = np.full(fetched, len(rules) + 1, np.int16)  # i: the i-th rule, counted from one; the last: kept
    counts = []
    for i, (rule, state) in enumerate(zip(rules, states, strict=True), 1):
        first = (state != 0) & (verdicts == len(rules) + 1)
        verdicts[first] = i
        counts.append(
            RuleCount(
                name=rule.name,
                condition=rule.condition,
                rejected=int(first.sum()),
                alone=int(np.count_nonzero(state)),
                nulls=int((state == 2).sum()),
            )
        )
    selection = Selection(
        name=config.name,
        rows=fetched + len(failed),
        not_fetched=not_fetched,
        rules=counts,
        kept=int((verdicts == len(rules) + 1).sum()),
        quantiles=quantiles,
        warnings=_warnings(counts, fetched),
    )
    _write(root, selection, fetched_keys, verdicts, failed, config=key, inputs=inputs)
    return selection


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise UserError(
            f"{name!r} can't be a selection's name: it names files, so letters, digits and . _ + - are expected"
        )


def _record(root: Path, name: str) -> Path:
    return root / "selected" / f"{name}.json"


def _value(column: str) -> str:
    """A column, as rules name it, as SQL over the table `rows`."""
    return f"source.{quote(column[7:])}" if column.startswith("source.") else quote(column)


def _load_rows(con: duckdb.DuckDBPyConnection, columns: set[str], types: Mapping[str, str]) -> None:
    """The table `rows`: every fetched row with the columns that are needed, and its key as the number `#key`."""
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


def _states(
    con: duckdb.DuckDBPyConnection, rules: Sequence[Rule], types: Mapping[str, str]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Keys of the fetched rows, and per rule: 0 where it is TRUE, 1 where it isn't, 2 where a column has no value."""
    computed = [f"({_computed_sql(con, c)}) AS {quote(c.place)}" for r in rules for c in r.computed]
    items = [f"{_state_sql(rule, types)} AS s{i}" for i, rule in enumerate(rules)]
    inner = f"(SELECT {', '.join(['*', *computed])} FROM rows)"
    try:
        found = con.execute(f"SELECT {', '.join([quote('#key'), *items])} FROM {inner}").fetchnumpy()
    except duckdb.Error as e:
        for rule, item in zip(rules, items, strict=True):  # say which rule it was
            try:
                con.execute(f"SELECT max(s) FROM (SELECT {item.rpartition(' AS ')[0]} AS s FROM {inner})")
            except duckdb.Error as e2:
                raise UserError(f"rule {rule.name} ({rule.condition}) fails on a row: {short(e2)}") from None
        raise UserError(f"the rules fail on a row: {short(e)}") from None
    return np.asarray(found["#key"]), [np.asarray(found[f"s{i}"]) for i in range(len(rules))]


def _state_sql(rule: Rule, types: Mapping[str, str]) -> str:
    empty = [
        f"{_value(c)} IS NULL" + (f" OR isnan({_value(c)})" if types[c] in ("FLOAT", "DOUBLE") else "")
        for c in rule.columns
    ]
    null = f"WHEN {' OR '.join(empty)} THEN 2 " if empty else ""
    return f"CAST(CASE {null}WHEN ({rule.sql}) THEN 0 ELSE 1 END AS TINYINT)"


def _computed_sql(con: duckdb.DuckDBPyConnection, computed: Computed) -> str:
    """What `top` or `first_of` comes to on these rows, as a condition."""
    value = _value(computed.column)
    if computed.kind == "first_of":
        later = quote(f"later{computed.place}")
        con.execute(
            f'CREATE TEMP TABLE {later} AS SELECT "#key" FROM rows JOIN (SELECT {value} AS v, min("#key") AS first '
            f'FROM rows GROUP BY 1 HAVING count(*) > 1) ON {value} = v WHERE "#key" <> first'
        )
        return f'"#key" NOT IN (FROM {later})'
    value = f"CAST({value} AS DOUBLE)"
    values = _numbers(con, computed.column)
    if not len(values):
        return "false"
    # half up, so that a fraction of a row counts as a row from one half on; at least one
    count = max(1, int(np.floor(computed.fraction * len(values) + 0.5)))
    cut = float(np.partition(values, len(values) - count)[len(values) - count])
    ties = count - int((values > cut).sum())
    bound = f"CAST('{cut!r}' AS DOUBLE)"
    last = con.execute(
        f'SELECT "#key" FROM rows WHERE {value} = {bound} ORDER BY 1 LIMIT 1 OFFSET {ties - 1}'
    ).fetchone()
    assert last is not None
    return f'{value} > {bound} OR ({value} = {bound} AND "#key" <= {last[0]})'


def _numbers(con: duckdb.DuckDBPyConnection, column: str) -> np.ndarray:
    """The values of a numeric column over the fetched rows that have one, as float64 in no order."""
    value = f"CAST({_value(column)} AS DOUBLE)"
    return con.execute(f"SELECT {value} AS v FROM rows WHERE {value} IS NOT NULL AND NOT isnan({value})").fetchnumpy()[
        "v"
    ]


def _quantiles(con: duckdb.DuckDBPyConnection, column: str) -> dict[str, float]:
    values = _numbers(con, column)
    if not len(values):
        return {}
    found = np.quantile(values, list(LEVELS.values()))
    return {level: float(f"{v:.6g}") for level, v in zip(LEVELS, found, strict=True)}


def _failures(con: duckdb.DuckDBPyConnection) -> tuple[np.ndarray, dict[str, int]]:
    """Keys of the rows without an image, and how many there are for each reason, the commonest first."""
    con.execute(
        'CREATE TEMP TABLE failed AS SELECT CAST("key" AS UBIGINT) AS k, '
        f"coalesce(reason, status, 'unknown') AS reason FROM _fetched WHERE status IS DISTINCT FROM '{Status.SUCCESS}'"
    )
    keys = con.execute("SELECT k FROM failed").fetchnumpy()["k"]
    reasons = con.execute("SELECT reason, count(*) AS n FROM failed GROUP BY 1 ORDER BY n DESC, 1").fetchall()
    return np.asarray(keys), dict(reasons)


def _warnings(rules: Sequence[RuleCount], fetched: int) -> list[str]:
    found = []
    for rule in rules:
        without = " (no row has a value)" if rule.nulls == fetched else ""
        if fetched and rule.alone == fetched:
            found.append(f"rule {rule.name} ({rule.condition}) rejects every image{without}")
        elif fetched and rule.alone == 0:
            found.append(f"rule {rule.name} ({rule.condition}) keeps every image")
    return found


def _write(
    root: Path,
    selection: Selection,
    fetched: np.ndarray,
    verdicts: np.ndarray,
    failed: np.ndarray,
    *,
    config: str,
    inputs: Mapping[str, str],
) -> None:
    """Write the verdicts in the order of keys, and commit them. Refuses a key that comes twice.

    `fetched` are the keys (numbers) of rows with an image, `verdicts` theirs: i the i-th rule, counted from one, and
    after the last rule kept. `failed` are the keys of the other rows.
    """
    keys = np.concatenate([fetched, failed])
    codes = np.concatenate([verdicts, np.zeros(len(failed), np.int16)])
    order = np.argsort(keys, kind="stable")
    keys, codes = keys[order], codes[order]
    if twice := keys[1:][keys[1:] == keys[:-1]][:1].tolist():
        raise UserError(
            f"key {twice[0]} comes twice in {root / 'fetched'}: `tastemaker verify {root}` looks for damage"
        )
    names = pa.array([NOT_FETCHED, *(r.name for r in selection.rules), KEPT])
    path = _record(root, selection.name).with_name(f"{selection.name}.parquet")
    width = _key_width(root)
    schema = pa.schema([("key", pa.string()), ("verdict", pa.dictionary(pa.int16(), pa.string()))])
    uncommit(_record(root, selection.name))
    with atomic(path) as f, pq.ParquetWriter(f, schema, compression="zstd", use_dictionary=["verdict"]) as out:
        for start in range(0, len(keys), 1 << 20):
            part = slice(start, start + (1 << 20))
            padded = pc.utf8_lpad(pa.array(keys[part]).cast(pa.string()), width=width, padding="0")
            out.write_table(pa.table([padded, pa.DictionaryArray.from_arrays(codes[part], names)], schema=schema))
    commit(root, _record(root, selection.name), config=config, inputs=inputs, outputs=[path], facts=asdict(selection))


def _key_width(root: Path) -> int:
    """How many digits the first key has; keys are numbers, zero-padded to that, and longer ones have no zeros."""
    for path in tables(root)[0].files:
        for batch in pq.ParquetFile(path).iter_batches(1, columns=["key"]):
            return len(batch["key"][0].as_py())
    return 0


def load_selection(root: Path, name: str) -> Selection:
    """A selection that was made before. UserError where there is none of that name, naming those that there are."""
    _check_name(name)
    value = read_json(_record(root, name))
    if not isinstance(value, dict) or "kept" not in value:
        others = sorted(p.stem for p in (root / "selected").glob("[!.]*.parquet"))
        there = f" There are {', '.join(others)}." if others else ""
        raise UserError(f"{root} has no selection {name}.{there} `tastemaker select {root} --name {name}` makes it.")
    fields = {k: value[k] for k in Selection.__dataclass_fields__}
    return Selection(**{**fields, "rules": [RuleCount(**r) for r in value["rules"]]})


# ------------------------------------------------------------------------------------------------------------- funnel


def funnel_text(selection: Selection) -> str:
    """The funnel as a table: rows, not fetched with reasons, each rule with counts and condition, and what is kept."""
    width = max(12, *(len(r.name) for r in selection.rules)) if selection.rules else 12
    reasons = " · ".join(f"{reason} {n:,}" for reason, n in list(selection.not_fetched.items())[:5])

    def line(name: str, rows: str, rejected: str, alone: str, share: str, note: str = "") -> str:
        return f"{name:<{width}}{rows:>12}{rejected:>12}{alone:>12}{share:>8}   {note}".rstrip()

    lines = [line("rows", f"{selection.rows:,}", "rejected", "alone", "share")]
    failed = selection.rows - selection.fetched
    lines.append(line(NOT_FETCHED, "", f"{failed:,}", "-", _share(failed, selection.rows), reasons))
    for r in selection.rules:
        note = _note(r, selection.quantiles)
        lines.append(line(r.name, "", f"{r.rejected:,}", f"{r.alone:,}", _share(r.rejected, selection.rows), note))
    lines.append(line(KEPT, f"{selection.kept:,}", "", "", _share(selection.kept, selection.rows)))
    return "\n".join(lines)


def _share(count: int, rows: int) -> str:
    return f"{count / rows:.1%}" if rows else "-"


def _note(rule: RuleCount, quantiles: Mapping[str, Mapping[str, float]]) -> str:
    """A rule's condition in words, with where its score lies and how many rows had no value."""
    best = re.fullmatch(r"\s*top\(\s*([\w.\"]+)\s*,\s*([\d.eE-]+)\s*\)\s*", rule.condition)
    note = f"best {100 * float(best[2]):g}% of {best[1]}" if best else rule.condition
    named = [c for c in quantiles if re.search(rf"(?<![\w.]){re.escape(c)}(?!\w)", rule.condition)]
    if len(named) == 1:
        q = quantiles[named[0]]
        note += f"   (median {q['median']:.3g}, 90% {q['90%']:.3g})"
    return note + (f" · {rule.nulls:,} without a value" if rule.nulls else "")


# --------------------------------------------------------------------------------------------------------------- uids


def read_uids(path: Path) -> np.ndarray:
    """A subset file of DataComp's: 128-bit uids as (u8, u8), sorted, mapped into memory and not read. Shape (n,)."""
    try:
        uids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is not a .npy file: {e}") from None
    if uids.dtype != UID or uids.ndim != 1:
        raise UserError(f"{path} holds {uids.dtype} of shape {uids.shape}; a row of uids of dtype u8,u8 is expected")
    return uids


def select_uids(root: Path, name: str, path: Path) -> Selection:
    """A selection by a subset file: fetched rows whose `source.uid` is in it are kept, the others are `not_in_uids`.

    A uid that the file repeats keeps its row once. Memory: 24 bytes per fetched row and a block of the file.
    Raises UserError where the list carries no uid, or the file isn't one of sorted uids.
    """
    root = Path(root)
    _check_name(name)
    uids = read_uids(path)
    column = _uid_column(root)
    inputs = {**table_digests(tables(root)[:1]), "uids": sha256_file(path)}
    if is_done(root, _record(root, name), config=digest([_FORMAT, NOT_IN_UIDS]), inputs=inputs):
        return load_selection(root, name)
    con = open_ledger(root, {column})
    try:
        keys, ours, missing = [np.zeros(0, np.uint64)], [np.zeros(0, "S16")], [np.zeros(0, np.uint64)]
        fetched = f"FROM ledger WHERE status = '{Status.SUCCESS}'"
        for batch in batches(con, f'SELECT CAST("key" AS UBIGINT) AS k, {_value(column)} AS uid {fetched}'):
            has = pc.is_valid(batch["uid"])
            missing.append(batch["k"].filter(pc.invert(has)).to_numpy())
            keys.append(batch["k"].filter(has).to_numpy())
            ours.append(_from_hex(batch["uid"].filter(has), column))
        failed, not_fetched = _failures(con)
    finally:
        con.close()
    known, values = np.concatenate(keys), np.concatenate(ours)
    order = np.argsort(values, kind="stable")
    known, values = known[order], values[order]
    inside = _members(values, uids, path)
    without = np.concatenate(missing)
    verdicts = np.concatenate([np.where(inside, 2, 1), np.ones(len(without))]).astype(np.int16)
    rejected = int((verdicts == 1).sum())
    selection = Selection(
        name=name,
        rows=len(verdicts) + len(failed),
        not_fetched=not_fetched,
        rules=[
            RuleCount(
                name=NOT_IN_UIDS, condition=f"uid in {path.name}", rejected=rejected, alone=rejected, nulls=len(without)
            )
        ],
        kept=int(inside.sum()),
        quantiles={},
        warnings=[] if inside.any() else [f"no fetched row has a uid that is in {path}"],
    )
    fetched_keys = np.concatenate([known, without])
    config = digest([_FORMAT, NOT_IN_UIDS])
    _write(root, selection, fetched_keys, verdicts, failed, config=config, inputs=inputs)
    return selection


def write_uids(root: Path, name: str, path: Path) -> int:
    """Write the uids of a selection's kept rows as a subset file of DataComp's, sorted; returns how many.

    Raises UserError where the list carries no uid, or a kept row has none.
    """
    root = Path(root)
    load_selection(root, name)
    column = _uid_column(root)
    con = open_ledger(root, {column})
    try:
        kept = f"SELECT key FROM verdicts WHERE selection = '{name}' AND verdict = '{KEPT}'"
        parts = [np.zeros(0, "S16")]
        for batch in batches(con, f"SELECT {_value(column)} AS uid FROM ledger WHERE key IN ({kept})"):
            if batch["uid"].null_count:
                raise UserError(f"{batch['uid'].null_count:,} kept rows or more have no {column}")
            parts.append(_from_hex(batch["uid"], column))
    finally:
        con.close()
    values = np.unique(np.concatenate(parts))
    with atomic(path) as f:
        np.save(f, values.view(">u8").astype("<u8").view(UID))
    return len(values)


def _uid_column(root: Path) -> str:
    columns = types_there(root)[1]
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


def _members(values: np.ndarray, uids: np.ndarray, path: Path, block: int = 1 << 22) -> np.ndarray:
    """Which of the sorted `values` (S16) are among the sorted `uids`, read a block at a time. Bool, shape (n,)."""
    inside = np.zeros(len(values), bool)
    previous = b""
    for start in range(0, len(uids), block):
        part = np.array(uids[start : start + block]).view("<u8").astype(">u8").view("S16")
        if (part[1:] < part[:-1]).any() or part[0] < previous:
            raise UserError(f"{path} is not sorted: sort it with numpy's sort, as DataComp's tools do")
        previous = part[-1]
        low, high = np.searchsorted(values, part[0], "left"), np.searchsorted(values, part[-1], "right")
        mine = values[low:high]
        inside[low:high] |= part[np.searchsorted(part, mine)] == mine
    return inside
