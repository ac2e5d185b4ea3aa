"""Rules: SQL conditions over the ledger, understood and checked before anything runs.

Each is parsed to DuckDB's syntax tree, checked there, and printed back from the tree, so that what runs is what was
checked. `top` and `first_of` become plain comparisons, because each depends on all fetched rows and on nothing that
another rule did.
"""

from __future__ import annotations

import copy
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
    unstable_functions,
    walk,
)

KEPT = "kept"
NOT_FETCHED = "not_fetched"
NOT_IN_UIDS = "not_in_uids"
RESERVED = (KEPT, NOT_FETCHED, NOT_IN_UIDS)
"""Verdicts that are ours: a rule may not be called so."""


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
NUMBER = re.compile(r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?|FLOAT|DOUBLE|DECIMAL\(.*\)")


def check_rules(
    rules: Mapping[str, str],
    columns: Mapping[str, str],
    source_columns: Mapping[str, str],
    scales: Mapping[str, tuple[float, float]],
) -> list[Rule]:
    """The rules, understood; needs no data. UserError names the rule, what is wrong with it and the nearest right name.

    `columns` are the ledger's own and the scores, `source_columns` the list's, both name -> DuckDB type
    (curate.ledger.view.ledger_types and source_types give them). `scales` maps a score to the (lowest, highest) value
    of its head: comparing it with a constant outside is refused, because such a threshold was made for another head.
    """
    names = _Names(columns, source_columns)
    checked: list[Rule] = []
    bounds = Bounds(connect())
    try:
        place = 0
        for name, condition in rules.items():
            if not isinstance(name, str) or not name.strip() or not name.isprintable():
                raise UserError(f"{name!r} can't be a rule's name: printable text is expected")
            if name in RESERVED:
                raise UserError(f"a rule can't be called {name}: that is a verdict of its own. Choose another name.")
            if not isinstance(condition, str):
                raise UserError(f"rule {name}: an SQL condition in quotes is expected, not {condition!r}")
            rule = _understand(bounds, name, condition, names, scales, place)
            place += len(rule.computed)
            checked.append(rule)
        _check_types(bounds, checked, columns, source_columns)
    finally:
        bounds.close()
    return checked


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
        if near := nearest(word, known):
            return f". Did you mean {near}?"
        return f". There are {', '.join(known)}."

    def _there(self) -> str:
        return f" (there are {', '.join(self.source)})" if self.source else " (this list carries none)"


def _understand(
    bounds: Bounds,
    name: str,
    condition: str,
    names: _Names,
    scales: Mapping[str, tuple[float, float]],
    place: int,
) -> Rule:
    """One rule as a tree, its columns found, `top` and `first_of` taken out, and the rest as SQL again.

    The SQL that runs is printed from the tree, so nothing can hide from these checks in how a rule is written.
    """

    def wrong(what: str) -> UserError:
        return UserError(f"rule {name} ({condition}): {what}")

    try:
        expression = parse_condition(condition)
    except UserError as e:
        raise wrong(str(e)) from None

    columns: dict[str, None] = {}
    computed: list[Computed] = []
    try:
        for part in list(references(expression)):
            kind = part["class"]
            if kind == "COLUMN_REF":
                columns[names.find(part["column_names"])] = None
            elif kind not in _EXPRESSIONS:
                raise UserError(f"a rule can't hold {_REFUSED.get(kind, kind.lower())}")
            elif kind == "FUNCTION" and part["function_name"].lower() in ("top", "first_of"):
                computed.append(_computed(bounds, part, names, place + len(computed)))
            elif kind == "FUNCTION" and part["function_name"].lower() in unstable_functions():
                raise UserError(f"{part['function_name']}() gives another value each time, and a selection may not")
            else:
                _check_scale(bounds, part, scales)
    except UserError as e:
        raise wrong(str(e)) from None
    except RecursionError:
        raise wrong("it is nested too deep") from None
    if expression.get("alias"):
        raise wrong(f"what does {expression['alias']!r} at its end mean? One condition is expected")
    return Rule(name, condition, print_expression(expression), tuple(columns), tuple(computed))


def _computed(bounds: Bounds, function: dict[str, Any], names: _Names, number: int) -> Computed:
    """Understand a `top` or `first_of` and leave a column in its place."""
    kind: Literal["top", "first_of"] = "top" if function["function_name"].lower() == "top" else "first_of"
    usage = "top(COLUMN, FRACTION), for example top(similarity, 0.3)" if kind == "top" else "first_of(COLUMN)"
    given = arguments(function)
    if len(given) != (2 if kind == "top" else 1) or given[0].get("class") != "COLUMN_REF":
        raise UserError(f"{kind} is written {usage}")
    reference = copy.deepcopy(given[0])
    if len(reference["column_names"]) > (2 if reference["column_names"][0].lower() == "source" else 1):
        raise UserError(f"{kind} takes a whole column, not a part of one")
    column = names.find(reference["column_names"])
    fraction = 1.0
    if kind == "top":
        if not NUMBER.fullmatch(names.type_of(column)):
            raise UserError(f"top({column}, ...) needs numbers, and {column} is {names.type_of(column)}")
        value = _constant(bounds, given[1])
        if value is None or not 0 < value <= 1:
            raise UserError(f"the fraction in {usage} must be above 0 and at most 1")
        fraction = value
    result = Computed(kind, column, fraction, f"#{number}")
    reference["column_names"] = [result.place]
    function.clear()
    function.update(reference)
    return result


def _constant(bounds: Bounds, expression: dict[str, Any]) -> float | None:
    """The number that an expression without columns is; None where it names columns or is no number."""
    if any(n.get("class") in ("COLUMN_REF", "SUBQUERY", "WINDOW", "PARAMETER", "STAR") for n in walk(expression)):
        return None
    try:
        row = bounds.first(f"SELECT TRY_CAST({print_expression(expression)} AS DOUBLE)")
    except duckdb.Error:
        return None  # what is wrong with it is said when the whole rule is bound
    return None if row is None or row[0] is None else float(row[0])


# ------------------------------------------------------------------------------------- what a rule says, to be shown


@dataclass(frozen=True)
class Reading:
    """What a condition looks at. Columns are named as they are known, in the order in which the condition names them.

    `cuts` are its comparisons with a constant: column, sign as it would be with the column on the left and without a
    `not` before it, the constant, and both as words. `tops` are column and fraction of each `top`; `best` is that of a
    condition that is nothing else.
    """

    columns: tuple[str, ...]
    cuts: tuple[tuple[str, str, float, str], ...]
    tops: tuple[tuple[str, float], ...]
    best: tuple[str, float] | None


def read_rules(rules: Mapping[str, str], known: Collection[str]) -> dict[str, Reading | None]:
    """What each condition says of the known columns (`similarity`, `source.WIDTH`); None of what is no condition.

    The same syntax tree that selects is read, so quotes, case, turned comparisons and `not` mean what they mean there.
    """
    names = {n.lower(): n for n in known}
    bounds = Bounds(connect())
    try:
        return {name: _read(bounds, condition, names) for name, condition in rules.items()}
    finally:
        bounds.close()


def _read(bounds: Bounds, condition: str, names: Mapping[str, str]) -> Reading | None:
    try:
        expression = parse_condition(condition)
        found = (_known(part, names) for part in references(expression))
        cuts = tuple(_cuts(bounds, expression, names, False))
        tops = tuple(t for part in references(expression) if (t := _top(bounds, part, names)))
        return Reading(tuple(dict.fromkeys(c for c in found if c)), cuts, tops, _top(bounds, expression, names))
    except (UserError, RecursionError):
        return None


def _known(expression: Mapping[str, Any], names: Mapping[str, str]) -> str | None:
    if expression.get("class") != "COLUMN_REF":
        return None
    parts = [p.lower() for p in expression["column_names"]]
    return names.get(".".join(parts[:2]) if parts[0] == "source" else parts[0])


def _top(bounds: Bounds, expression: dict[str, Any], names: Mapping[str, str]) -> tuple[str, float] | None:
    if expression.get("class") != "FUNCTION" or expression["function_name"].lower() != "top":
        return None
    given = arguments(expression)
    column = _known(given[0], names) if len(given) == 2 else None
    fraction = _constant(bounds, given[1]) if column is not None else None
    return (column, fraction) if column is not None and fraction is not None else None


_SIGNS = {
    "COMPARE_GREATERTHAN": ">", "COMPARE_GREATERTHANOREQUALTO": ">=", "COMPARE_LESSTHAN": "<",
    "COMPARE_LESSTHANOREQUALTO": "<=",
}  # fmt: skip
_TURNED = {">": "<", ">=": "<=", "<": ">", "<=": ">="}
_NEGATED = {">": "<=", ">=": "<", "<": ">=", "<=": ">"}


def _cuts(bounds: Bounds, node: Any, names: Mapping[str, str], negated: bool) -> Iterator[tuple[str, str, float, str]]:
    if isinstance(node, list):
        for item in node:
            yield from _cuts(bounds, item, names, negated)
        return
    if not isinstance(node, dict) or node.get("class") == "LAMBDA":
        return
    pairs: list[tuple[dict[str, Any], str, dict[str, Any]]] = []
    if node.get("class") == "COMPARISON" and (sign := _SIGNS.get(node["type"])):
        pairs = [(node["left"], sign, node["right"]), (node["right"], _TURNED[sign], node["left"])]
    elif node.get("class") == "BETWEEN":
        pairs = [(node["input"], ">=", node["lower"]), (node["input"], "<=", node["upper"])]
    for one, sign, other in pairs:
        column = _known(one, names)
        value = _constant(bounds, other) if column is not None else None
        if column is not None and value is not None:
            sign = _NEGATED[sign] if negated else sign
            yield column, sign, value, f"{sign} {print_expression(other)}"
    negated ^= node.get("type") in ("OPERATOR_NOT", "COMPARE_NOT_BETWEEN")
    for value in node.values():
        yield from _cuts(bounds, value, names, negated)


# ---------------------------------------------------------------------------------------------------- checks of a rule


def _check_scale(
    bounds: Bounds,
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
        value = _constant(bounds, other) if column is not None else None
        if column is not None and value is not None and not scales[column][0] <= value <= scales[column][1]:
            low, high = scales[column]
            raise UserError(
                f"{column} goes from {low:g} to {high:g}, and {value:g} is outside. Is it meant for another head?"
            )


def _check_types(bounds: Bounds, rules: Sequence[Rule], columns: Mapping[str, str], source: Mapping[str, str]) -> None:
    """Bind every rule to an empty ledger: functions exist, types fit, the result is a boolean."""
    parts = [f"{quote(n)} {t}" for n, t in columns.items()]
    if source:
        parts.append("source STRUCT(" + ", ".join(f"{quote(n)} {t}" for n, t in source.items()) + ")")
    parts += [f"{quote(c.place)} BOOLEAN" for r in rules for c in r.computed]
    bounds.con.execute(f"CREATE TABLE ledger ({', '.join(parts)})")
    for rule in rules:
        try:
            # beside a column, so that an aggregate is refused too
            row = bounds.first(f'SELECT column_type FROM (DESCRIBE SELECT ({rule.sql}) AS c, "key" FROM ledger)')
        except duckdb.Error as e:
            raise UserError(f"rule {rule.name} ({rule.condition}): {short(e)}") from None
        assert row is not None
        if row[0] != "BOOLEAN":
            kind = "NULL" if row[0] == '"NULL"' else row[0]
            raise UserError(
                f"rule {rule.name} ({rule.condition}): it gives {kind}, and a rule is a condition (true or false)"
            )
