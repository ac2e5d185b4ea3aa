"""Which rows are shown, and in which order: a filter over verdicts, and an order that is made once for each column."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from aesthetic.errors import UserError
from curate.ledger.judge import UNKNOWN
from studio.explore.live import LiveSelection, RuleAnswer
from studio.explore.snapshot import Snapshot

Show = Literal["all", "kept", "rejected", "marginal", "around", "unjudged", "only", "other", "both"]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Ranking:
    """Rows that a search found, the best first, with their scores. again: searches among some rows alone, (n,) bool, of
    which there may be too few among those that were found of all."""

    rows: npt.NDArray[np.uint32]
    scores: npt.NDArray[np.float32]
    what: str
    of: str = ""  # the digest of all rows, by which they are numbered
    again: Callable[[Mask], tuple[npt.NDArray[Any], npt.NDArray[Any]]] | None = None


@dataclass(frozen=True, eq=False)
class RowOrder:
    """Rows in an order. The first `valued` have a value in the column that they are sorted by."""

    rows: npt.NDArray[np.uint32]
    valued: int
    column: str | None = None  # that they are sorted by
    descending: bool = False
    near: float | None = None  # the value that they are sorted by distance from
    scores: npt.NDArray[np.float32] | None = None  # of each row, of a search

    @property
    def bytes(self) -> int:
        return self.rows.nbytes + (0 if self.scores is None else self.scores.nbytes) + 1000


AnswerOf = Callable[[str], RuleAnswer]
"""Name of a rule of a selection, also of one that is switched off -> what it says. UserError where there is none."""


def filtered(
    selection: LiveSelection, show: Show, rule: str | None, other: LiveSelection | None, answer_of: AnswerOf
) -> Mask:
    """Which rows are shown, (n,)."""
    funnel = selection.funnel
    if show in ("only", "other", "both"):
        if other is None:
            raise UserError(f"show={show} compares two selections: say with `other` which is the second")
        one, two = selection.kept, other.kept
        return one & ~two if show == "only" else two & ~one if show == "other" else one & two
    if show == "all":
        return np.ones(len(funnel.verdicts), np.bool_)
    if show == "kept":
        return selection.kept
    if show == "unjudged":
        return funnel.verdicts == funnel.unjudged
    if rule is None:
        if show == "rejected":
            return funnel.verdicts < funnel.kept
        raise UserError(f"show={show} needs a rule: say with `rule` which")
    if show == "rejected":
        names = [r.name for r in selection.rules]
        if rule in names:
            return funnel.verdicts == names.index(rule) + 1
        answer_of(rule)  # it may be switched off: it rejects nothing then
        return np.zeros(len(funnel.verdicts), np.bool_)
    if show == "marginal":
        states = answer_of(rule).states
        return (states != 0) & (states != UNKNOWN)
    answer_of(rule)
    mask = np.ones(len(funnel.verdicts), np.bool_)
    for answer in selection.answers:
        if answer.rule.name != rule:
            mask &= answer.states == 0
    return mask


def order_of(snapshot: Snapshot, mask: Mask | None, sort: str, descending: bool) -> RowOrder:
    """The rows of a filter (None: all) by `key`, `random`, or the values of a column; those without a value last.

    Rows of one value are in the order of keys; a descending order is an ascending one reversed.
    """
    if sort == "key":
        rows = np.arange(snapshot.count, dtype=np.uint32) if mask is None else np.flatnonzero(mask).astype(np.uint32)
        return RowOrder(rows[::-1] if descending else rows, len(rows))
    if sort == "random":
        rows = _kept_of(snapshot.rows.random, mask)
        return RowOrder(rows[::-1] if descending else rows, len(rows))
    column = snapshot.columns.get(sort)
    if column is None or not column.facts.stored:
        if sort in snapshot.all_types:
            raise UserError(f"{sort} holds texts that the studio puts in no order")
        raise UserError(f"there is no column {sort} to sort by. {_sortable(snapshot)}")
    count = column.facts.count or 0
    with_value, without = _kept_of(column.order[:count], mask), _kept_of(column.order[count:], mask)
    valued = len(with_value)
    first = with_value[::-1] if descending else with_value
    return RowOrder(np.concatenate([first, without]) if len(without) else first, valued, sort, descending)


def _kept_of(order: npt.NDArray[np.uint32], mask: Mask | None) -> npt.NDArray[np.uint32]:
    return order if mask is None else order[mask[order]]


def _sortable(snapshot: Snapshot) -> str:
    return f"There are key, random, {', '.join(c for c, column in snapshot.columns.items() if column.facts.stored)}"


def order_of_ranking(ranking: Ranking, mask: Mask | None, descending: bool) -> RowOrder:
    """The rows of a filter that a search found, the best first; `descending` is that order reversed."""
    rows, scores = ranking.rows, ranking.scores
    if mask is not None and ranking.again is not None:
        found, scores = ranking.again(mask)
        rows = found.astype(np.uint32)
    elif mask is not None:
        some = mask[rows]
        rows, scores = rows[some], scores[some]
    if descending:
        rows, scores = rows[::-1], scores[::-1]
    return RowOrder(rows, len(rows), scores=scores)


def nearest(snapshot: Snapshot, mask: Mask, column: str, cuts: list[float]) -> RowOrder:
    """The rows of a filter by the distance of their value from the nearest of some cuts; those without a value last."""
    listing = order_of(snapshot, mask, column, False)
    rows = listing.rows[: listing.valued]
    values = snapshot.columns[column].values[rows].astype(np.float64)
    split = int(np.searchsorted(values, cuts[0]))
    distance = np.abs(values - cuts[0])
    for cut in cuts[1:]:
        np.minimum(distance, np.abs(values - cut), out=distance)
    del values
    # outwards from the cut: with one these are two runs that ascend, which a stable sort merges
    turned = np.concatenate([rows[:split][::-1], rows[split:]])
    distance[:split] = distance[:split][::-1].copy()
    order = np.argsort(distance, kind="stable")
    return RowOrder(
        np.concatenate([turned[order], listing.rows[listing.valued :]]), listing.valued, column, near=cuts[0]
    )


def cut_of(snapshot: Snapshot, answer: RuleAnswer) -> tuple[str, list[float]] | None:
    """The column and the values at which a rule cuts, where it does: of its first comparison, or its `top`."""
    rule = answer.rule
    for cut in rule.cuts:
        if numeric(snapshot, cut.column):
            return cut.column, sorted({c.value for c in rule.cuts if c.column == cut.column})
    if rule.top and answer.cut is not None:
        return rule.top.column, [answer.cut]
    return None


def numeric(snapshot: Snapshot, column: str) -> bool:
    found = snapshot.columns.get(column)
    return found is not None and found.facts.stored == "number" and bool(found.facts.count)


def place_of(snapshot: Snapshot, listing: RowOrder, value: float) -> int:
    """Where in a listing its sort column crosses a value: how many rows come before the first at or beyond it."""
    if listing.column is None or listing.near is not None:
        raise UserError("a place is looked for among rows that are sorted by a column")
    column = snapshot.columns[listing.column]
    if column.facts.stored != "number":
        raise UserError(f"{listing.column} holds no numbers")
    if not listing.descending:
        return column.below(value, listing.rows, listing.valued)
    turned = listing.rows[: listing.valued][::-1]
    return listing.valued - column.up_to(value, turned, listing.valued)


def value_at(snapshot: Snapshot, listing: RowOrder, i: int) -> Any:
    """What the i-th row of a listing is sorted by: its value in the column, or its score."""
    if listing.scores is not None:
        return float(listing.scores[i])
    if listing.column is None:
        return None
    return snapshot.columns[listing.column].value(int(listing.rows[i]))
