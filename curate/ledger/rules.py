"""Rules: SQL conditions over the ledger, understood and checked before anything runs.

Each is parsed to DuckDB's syntax tree, checked there, and printed back from the tree, so that what runs is what was
checked. `top`, `first_of`, `best_of` and `at_most` become plain comparisons, because each depends on all fetched rows
and on nothing that another rule did.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import duckdb

from aesthetic.errors import UserError, nearest
from curate.ledger.sql import (
    Bounds,
    arguments,
    connect,
    parse_condition,
    print_expression,
    quote,
    references,
    short,
    volatile_functions,
    walk,
)

KEPT = "kept"
NOT_FETCHED = "not_fetched"
NOT_IN_UIDS = "not_in_uids"
DENIED = "denied"
UNJUDGED = "unjudged"
RESERVED = (KEPT, NOT_FETCHED, NOT_IN_UIDS, DENIED, UNJUDGED)
"""Verdicts that are ours: a rule may not be called so."""


USAGE = {
    "top": "top(COLUMN, FRACTION), for example top(similarity, 0.3)",
    "first_of": "first_of(COLUMN)",
    "best_of": "best_of(GROUP, EXPRESSION), for example best_of(phash, original_width * original_height)",
    "at_most": "at_most(N, GROUP) or at_most(N, GROUP, EXPRESSION), for example at_most(3, phash)",
}
"""The functions that look at all fetched rows, and how each is written."""


@dataclass(frozen=True)
class Computed:
    """One of these functions inside a rule; in the rule's SQL it is a boolean column called `place`."""

    kind: Literal["top", "first_of", "best_of", "at_most"]
    column: str  # of `best_of` and `at_most`: the one whose values are groups
    place: str
    fraction: float = 1.0  # of `top`
    count: int = 1  # of `best_of` and `at_most`: how many of each group stay
    expression: str = ""  # of these: SQL by which a group's rows are ordered, the best first; empty: by key alone

    @property
    def grouped(self) -> bool:
        """Whether it keeps some of each group."""
        return self.kind in ("best_of", "at_most")


@dataclass(frozen=True)
class Cut:
    """A comparison of a column with a constant, as it would be with the column on the left and no `not` before it."""

    column: str
    sign: str  # <, <=, > or >=
    value: float
    words: str  # sign and constant as the condition has them: ">= 4.0"


@dataclass(frozen=True)
class Rule:
    """A rule that was understood. Columns are named as rules name them, `similarity` or `source.WIDTH`.

    required: those of `columns` without whose value a row is rejected. Those that are named inside `best_of` or
    `at_most` alone are not: a row without a group is alone, and one without a value for the expression comes last.
    Nor are those of which the condition itself says what holds without a value: `text_area < 0.1 or text_area is null`.
    finite: those whose values must be finite where there are any; the required ones, and these last.
    """

    name: str
    condition: str
    sql: str  # printed from the syntax tree, with a column in the place of each function of all rows
    columns: tuple[str, ...]  # in the order in which the condition names them
    required: tuple[str, ...]
    finite: tuple[str, ...]
    computed: tuple[Computed, ...]
    cuts: tuple[Cut, ...]

    @property
    def top(self) -> Computed | None:
        """The `top` that the condition is, where it is nothing else."""
        only = self.computed[0] if len(self.computed) == 1 else None
        return only if only and only.kind == "top" and self.sql == quote(only.place) else None

    @property
    def values(self) -> tuple[str, ...]:
        """The columns whose values it looks at: not those that only name groups."""
        groups = {c.column for c in self.computed if c.grouped}.difference(self.finite)
        return tuple(c for c in self.columns if c not in groups)


_EXPRESSIONS = {
    "COMPARISON", "CONJUNCTION", "FUNCTION", "CONSTANT", "COLUMN_REF", "OPERATOR", "CASE", "BETWEEN", "CAST",
    "COLLATE", "LAMBDA", "TYPE",
}  # fmt: skip
_REFUSED = {
    "SUBQUERY": "a query inside it",
    "WINDOW": f"a window function ({', '.join(USAGE)} are there for what needs all rows)",
    "STAR": "a star",
    "PARAMETER": "a parameter",
}
NUMBER = re.compile(r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?|FLOAT|DOUBLE|DECIMAL\(.*\)")


def check_rules(
    rules: Mapping[str, str],
    columns: Mapping[str, str],
    source_columns: Mapping[str, str],
    scales: Mapping[str, tuple[float, float]],
    con: duckdb.DuckDBPyConnection | None = None,
) -> list[Rule]:
    """The rules, understood; needs no data. UserError names the rule, what is wrong with it and the nearest right name.

    `columns` are the ledger's own and the annotators', `source_columns` the list's, both name -> DuckDB type
    (curate.ledger.view gives them). `scales` maps a column to the (lowest, highest) value of what made it: comparing
    it with a constant outside is refused, because such a threshold was made for another head. `con` is asked in place
    of a database that is made for it (in 20 ms), and closed.
    """
    names = _Names(columns, source_columns)
    checked: list[Rule] = []
    with contextlib.closing(Bounds(con or connect())) as bounds:
        for name, condition in rules.items():
            if not isinstance(name, str) or not name.strip() or not name.isprintable():
                raise UserError(f"{name!r} can't be a rule's name: printable text is expected")
            if name in RESERVED:
                raise UserError(f"a rule can't be called {name}: that is a verdict of its own. Choose another name.")
            if not isinstance(condition, str):
                raise UserError(f"rule {name}: an SQL condition in quotes is expected, not {condition!r}")
            try:
                place = sum(len(rule.computed) for rule in checked)
                checked.append(_parse(bounds, name, condition, names, scales, place))
            except UserError as e:
                raise UserError(f"rule {name} ({condition}): {e}") from None
            except RecursionError:
                raise UserError(f"rule {name} ({condition}): it is nested too deep") from None
        _check_types(bounds, checked, columns, source_columns)
    return checked


def read_rules(rules: Mapping[str, str], known: Collection[str]) -> dict[str, Rule | None]:
    """What each condition says of the known columns (`similarity`, `source.WIDTH`), to be shown; None: no condition.

    Columns that are not known are passed over, so the SQL of a rule that names one may not run.
    """
    names, found = _Known(known), dict[str, Rule | None]()
    with contextlib.closing(Bounds(connect())) as bounds:
        for name, condition in rules.items():
            try:
                found[name] = _parse(bounds, name, condition, names, {}, 0)
            except (UserError, RecursionError):
                found[name] = None
    return found


class _Names:
    """The columns that a rule may name, found without regard to case as SQL does, and the nearest where it is wrong."""

    def __init__(self, columns: Mapping[str, str], source: Mapping[str, str]) -> None:
        self.columns = columns
        self.source = source
        self._ours = {n.lower(): n for n in columns}
        self._theirs = {n.lower(): n for n in source}

    def find(self, parts: Sequence[str]) -> str | None:
        """The column behind a reference, as rules write it: `similarity`, `source.WIDTH`."""
        if parts[0].lower() == "source":
            if len(parts) == 1:
                there = f"there are {', '.join(self.source)}" if self.source else "this list carries none"
                raise UserError(f"`source` alone is no column: write source.NAME ({there})")
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

    def check_number(self, column: str) -> None:
        kind = self.source[column.removeprefix("source.")] if column.startswith("source.") else self.columns[column]
        if not NUMBER.fullmatch(kind):
            raise UserError(f"top({column}, ...) needs numbers, and {column} is {kind}")

    def _nearest(self, word: str) -> str:
        known = [*self.columns, *(f"source.{n}" for n in self.source)]
        if near := nearest(word, known):
            return f". Did you mean {near}?"
        return f". There are {', '.join(known)}."


class _Known:
    """Columns of which nothing but the names is known; others are passed over."""

    def __init__(self, columns: Collection[str]) -> None:
        self._columns = {n.lower(): n for n in columns}

    def find(self, parts: Sequence[str]) -> str | None:
        folded = [p.lower() for p in parts]
        return self._columns.get(".".join(folded[:2]) if folded[0] == "source" else folded[0])

    def check_number(self, column: str) -> None:
        pass


# ------------------------------------------------------------------------------------------------------------ parsing


def _parse(
    bounds: Bounds,
    name: str,
    condition: str,
    names: _Names | _Known,
    scales: Mapping[str, tuple[float, float]],
    place: int,
) -> Rule:
    """One rule as a tree, its columns found, functions of all rows taken out, and the rest as SQL again.

    The SQL that runs is printed from the tree, so nothing can hide from these checks in how a rule is written.
    """
    expression = parse_condition(condition)
    cuts = []
    for compared, sign, value, constant in _comparisons(bounds, expression, names):
        low, high = scales.get(compared, (value, value))
        if not low <= value <= high:
            raise UserError(
                f"{compared} goes from {low:g} to {high:g}, and {value:g} is outside. Is it meant for another head?"
            )
        if sign:
            cuts.append(Cut(compared, sign, value, f"{sign} {print_expression(constant)}"))
    columns, required = dict[str, None](), dict[str, None]()
    computed: list[Computed] = []
    inside = set[int]()  # what `best_of` and `at_most` hold, by identity; the list keeps all of it
    said = set[str]()  # columns of which the condition says what holds without a value
    for part in list(references(expression)):
        kind = part["class"]
        if kind not in _EXPRESSIONS:
            raise UserError(f"a rule can't hold {_REFUSED.get(kind, kind.lower())}")
        if kind == "FUNCTION" and part["function_name"].lower() in volatile_functions():
            raise UserError(f"{part['function_name']}() gives another value each time, and a selection may not")
        if part.get("type") in ("OPERATOR_IS_NULL", "OPERATOR_IS_NOT_NULL"):
            asked = (names.find(n["column_names"]) for n in part["children"] if "column_names" in n)
            said.update(filter(None, asked))
        if kind == "COLUMN_REF" and (column := names.find(part["column_names"])):
            columns[column] = None
            if id(part) not in inside:
                required[column] = None
        elif kind == "FUNCTION" and part["function_name"].lower() in USAGE:
            held = [id(node) for node in walk(arguments(part))]
            if found := _computed(bounds, part, names, place + len(computed)):
                computed.append(found)
                inside.update(held if found.grouped else [])
    if expression.get("alias"):
        raise UserError(f"what does {expression['alias']!r} at its end mean? One condition is expected")
    sql = print_expression(expression)
    needed = tuple(column for column in required if column not in said)
    return Rule(name, condition, sql, tuple(columns), needed, tuple(required), tuple(computed), tuple(cuts))


def _computed(bounds: Bounds, function: dict[str, Any], names: _Names | _Known, number: int) -> Computed | None:
    """Understand a function of all rows and leave a column in its place; None where it is of an unknown column."""
    kind: Any = function["function_name"].lower()
    usage, given = USAGE[kind], arguments(function)
    if function.get("distinct") or function.get("filter") or (function.get("order_bys") or {}).get("orders"):
        raise UserError(f"{kind} is written {usage}")
    place = f"#{number}"
    if kind in ("best_of", "at_most"):
        found = _grouped(bounds, kind, given, names, place)
    else:
        found = _of_column(bounds, kind, given, names, place)
    if found is not None:
        (reference := parse_condition("x"))["column_names"] = [place]
        function.clear()
        function.update(reference)
    return found


def _of_column(
    bounds: Bounds, kind: Literal["top", "first_of"], given: Sequence[Any], names: _Names | _Known, place: str
) -> Computed | None:
    """A `top` or a `first_of` with these arguments."""
    if len(given) != (2 if kind == "top" else 1) or given[0].get("class") != "COLUMN_REF":
        raise UserError(f"{kind} is written {USAGE[kind]}")
    column = _whole_column(kind, given[0], names)
    if column is None:
        return None
    if kind == "first_of":
        return Computed(kind, column, place)
    names.check_number(column)
    fraction = _constant(bounds, given[1])
    if fraction is None or not 0 < fraction <= 1:
        raise UserError(f"the fraction in {USAGE[kind]} must be above 0 and at most 1")
    return Computed(kind, column, place, fraction=fraction)


def _grouped(
    bounds: Bounds, kind: Literal["best_of", "at_most"], given: Sequence[Any], names: _Names | _Known, place: str
) -> Computed | None:
    """A `best_of` or an `at_most` with these arguments."""
    first, lengths = (0, {2}) if kind == "best_of" else (1, {2, 3})  # where the group stands
    if len(given) not in lengths or given[first].get("class") != "COLUMN_REF":
        raise UserError(f"{kind} is written {USAGE[kind]}")
    group, expression = _whole_column(kind, given[first], names), ""
    count = 1.0 if kind == "best_of" else _constant(bounds, given[0])
    if count is None or count < 1 or count % 1:
        raise UserError(f"the number in {USAGE[kind]} must be whole and at least 1")
    if by := given[first + 1 :]:
        for held in walk(by):
            if held.get("class") == "FUNCTION" and held["function_name"].lower() in USAGE:
                raise UserError(f"the expression of {kind} can't hold {held['function_name']}()")
        expression = print_expression(by[0])
    return None if group is None else Computed(kind, group, place, count=int(count), expression=expression)


def _whole_column(kind: str, reference: dict[str, Any], names: _Names | _Known) -> str | None:
    parts = reference["column_names"]
    if len(parts) > (2 if parts[0].lower() == "source" else 1):
        raise UserError(f"{kind} takes a whole column, not a part of one")
    return names.find(parts)


def _constant(bounds: Bounds, expression: dict[str, Any]) -> float | None:
    """The number that an expression without columns is; None where it names columns or is no number."""
    if any(n.get("class") == "COLUMN_REF" for n in walk(expression)):
        return None
    try:
        row = bounds.first(f"SELECT TRY_CAST({print_expression(expression)} AS DOUBLE)")
    except duckdb.Error:
        return None  # what is wrong with it is said when the whole rule is bound
    return None if row is None or row[0] is None else float(row[0])


_SIGNS = {
    "COMPARE_GREATERTHAN": ">", "COMPARE_GREATERTHANOREQUALTO": ">=", "COMPARE_LESSTHAN": "<",
    "COMPARE_LESSTHANOREQUALTO": "<=",
}  # fmt: skip
_TURNED = {">": "<", ">=": "<=", "<": ">", "<=": ">="}
_NEGATED = {">": "<=", ">=": "<", "<": ">=", "<=": ">"}


def _comparisons(
    bounds: Bounds, node: Any, names: _Names | _Known, negated: bool = False
) -> Iterator[tuple[str, str, float, dict[str, Any]]]:
    """The comparisons of a column with a constant in a tree: (column, sign, value, the constant's expression).

    The sign is as with the column on the left and no `not` before it; "" for one that has no order. The parameters of
    lambdas are no columns, so what these hold is passed over.
    """
    if isinstance(node, list):
        for item in node:
            yield from _comparisons(bounds, item, names, negated)
    if not isinstance(node, dict) or node.get("class") == "LAMBDA":
        return
    pairs: list[tuple[dict[str, Any], str, dict[str, Any]]] = []
    if node.get("class") == "COMPARISON":
        sign = _SIGNS.get(node["type"], "")
        pairs = [(node["left"], sign, node["right"]), (node["right"], _TURNED.get(sign, ""), node["left"])]
    elif node.get("class") == "BETWEEN":
        pairs = [(node["input"], ">=", node["lower"]), (node["input"], "<=", node["upper"])]
    for one, sign, other in pairs:
        column = names.find(one["column_names"]) if one.get("class") == "COLUMN_REF" else None
        value = _constant(bounds, other) if column is not None else None
        if column is not None and value is not None:
            yield column, _NEGATED.get(sign, "") if negated else sign, value, other
    negated ^= node.get("type") in ("OPERATOR_NOT", "COMPARE_NOT_BETWEEN")
    for item in node.values():
        yield from _comparisons(bounds, item, names, negated)


def _check_types(bounds: Bounds, rules: Sequence[Rule], columns: Mapping[str, str], source: Mapping[str, str]) -> None:
    """Bind every rule to an empty ledger: functions exist, types fit, the result is a boolean, and what orders groups
    a number."""
    parts = [f"{quote(n)} {t}" for n, t in columns.items()]
    if source:
        parts.append("source STRUCT(" + ", ".join(f"{quote(n)} {t}" for n, t in source.items()) + ")")
    parts += [f"{quote(c.place)} BOOLEAN" for r in rules for c in r.computed]
    bounds.con.execute(f"CREATE TEMP TABLE ledger ({', '.join(parts)})")
    for rule in rules:
        for computed in rule.computed:
            if computed.expression and not NUMBER.fullmatch(kind := _type(bounds, rule, computed.expression)):
                raise UserError(
                    f"rule {rule.name} ({rule.condition}): {computed.kind} takes the best by a number, and "
                    f"{computed.expression} is {kind}"
                )
        if (kind := _type(bounds, rule, rule.sql)) != "BOOLEAN":
            raise UserError(
                f"rule {rule.name} ({rule.condition}): it gives {kind}, and a rule is a condition (true or false)"
            )


def _type(bounds: Bounds, rule: Rule, sql: str) -> str:
    """The type of an expression of a rule's over the empty ledger."""
    try:
        # beside a column, so that an aggregate is refused too
        row = bounds.first(f'SELECT column_type FROM (DESCRIBE SELECT ({sql}) AS c, "key" FROM ledger)')
    except duckdb.Error as e:
        raise UserError(f"rule {rule.name} ({rule.condition}): {short(e)}") from None
    assert row is not None
    return "NULL" if row[0] == '"NULL"' else row[0]
