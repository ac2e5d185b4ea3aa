"""Early rules: rules of a selection that are applied as soon as their columns are known (`select.early`).

What one rejects costs no more: on columns of the list, its row is never fetched; on the sizes that a header says, its
body is left; on columns of annotators, its image is not seen by those that come after. A rule that looks at other rows
can't be early, as these are not known yet.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, get_args

from aesthetic.errors import UserError, nearest
from curate.ledger.rules import Rule, read_rules
from curate.ledger.schema import EMBEDDED_COLUMNS, FETCHED_COLUMNS
from curate.ledger.sql import parse_condition, quote, references
from curate.ledger.view import LedgerTable

When = Literal["list", "header", "annotator"]
"""When the columns of a rule are known: with the row of the list; with the first bytes of a body; when the image is
stored, and annotators (or the encoder) have looked at it."""

LIST_COLUMNS = frozenset({"key", "url", "caption"})
"""Columns of ours that are known with the row of the list, beside all of `source`."""

HEADER_COLUMNS = frozenset({"original_width", "original_height"})
"""Columns of ours that the header of an image says."""


_OF_AN_IMAGE = {name for name, _ in FETCHED_COLUMNS + EMBEDDED_COLUMNS}


def when_known(condition: str) -> When:
    """When the latest column that a condition names is known. By names alone: needs no data."""
    named = {name.partition(".")[0] for name in named_columns(condition)}
    if named <= LIST_COLUMNS | {"source"}:
        return "list"
    return "header" if named <= LIST_COLUMNS | {"source"} | HEADER_COLUMNS else "annotator"


def named_columns(condition: str) -> set[str]:
    """The columns that a condition names, in lower case: `similarity`, `source.width`."""
    found = [part["column_names"] for part in references(parse_condition(condition)) if part["class"] == "COLUMN_REF"]
    return {".".join(names[:2] if names[0].lower() == "source" else names[:1]).lower() for names in found}


def split_early(rules: Mapping[str, str], early: Collection[str]) -> dict[When, dict[str, str]]:
    """The early ones of rules (name -> condition), in their order, by when they can be judged. Names in `early` that
    are no rules are passed over; `check_early` refuses them."""
    found: dict[When, dict[str, str]] = {when: {} for when in get_args(When)}
    for name, condition in rules.items():
        if name in early:
            try:
                found[when_known(condition)][name] = condition
            except UserError as e:
                raise UserError(f"rule {name} ({condition}): {e}") from None
    return found


def check_early(
    rules: Sequence[Rule], early: Sequence[str], made: Collection[str], of_all_rows: Collection[str] = ()
) -> None:
    """UserError, naming it, where what `early` names is no rule, or one that can't be judged early.

    rules: understood, by `check_rules`. made: the columns that the recipe's entries make. of_all_rows: those of them
    that compare all rows with each other.
    """
    named = {rule.name: rule for rule in rules}
    ours = {*LIST_COLUMNS, *HEADER_COLUMNS, *_OF_AN_IMAGE}
    for name in early:
        if name not in named:
            near = nearest(name, list(named))
            known = f". Did you mean {near}?" if near else f". There are {', '.join(named)}." if named else ""
            raise UserError(f"select.early: there is no rule {name}{known}")
        rule, sentence = named[name], f"select.early: {name} ({named[name].condition}) can't be judged early: "
        if rule.computed:
            kinds = ", ".join(dict.fromkeys(f"{c.kind}()" for c in rule.computed))
            raise UserError(f"{sentence}{kinds} looks at all rows. Take it out of select.early.")
        if not rule.columns:
            raise UserError(f"{sentence}it names no column, so it says the same of every row")
        for column in rule.columns:
            if column in of_all_rows:
                raise UserError(f"{sentence}{column} is made when all images are there. Take it out of select.early.")
            if column not in ours and column not in made and not column.startswith("source."):
                raise UserError(f"{sentence}no entry of `columns` makes {column}")


# ------------------------------------------------------------------------------------------ what was rejected, later on


def applied_early(found: Sequence[LedgerTable]) -> dict[str, set[str]]:
    """The early rules that these tables were made under, as their records say: name -> its conditions, several where
    shards differ."""
    rules = dict[str, set[str]]()
    for table in found:
        for facts in table.facts:
            for name, condition in (facts.get("early") or {}).items():
                rules.setdefault(name, set()).add(condition)
    return rules


def left_out(found: Sequence[LedgerTable], known: Collection[str]) -> tuple[dict[str, str], set[str]]:
    """Column -> SQL that is TRUE of the images that have no value in it because an early rule rejected them; and the
    columns that this SQL names. `known` are all columns that there are now."""
    sql, needed = dict[str, str](), set[str]()
    for table in found[1:]:
        conditions = sorted(c for several in applied_early([table]).values() for c in several)
        if not conditions:
            continue
        rules = read_rules({condition: condition for condition in conditions}, known)
        # one that names a column which is gone can't be asked any more
        asked = [r for r in rules.values() if r and len(r.columns) == len(named_columns(r.condition))]
        needed.update(c for rule in asked for c in rule.columns)
        left = f"NOT coalesce({' AND '.join(f'({rule.sql})' for rule in asked)}, false)"
        where = f" AND {left}" if len(asked) == len(conditions) else ""
        sql |= {column: f"({quote(column)} IS NULL{where})" for column in table.columns}
    return sql, needed
