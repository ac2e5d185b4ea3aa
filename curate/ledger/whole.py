"""All that a data folder knows of one row, put together: what its shard says, and what only all rows tell.

whole = whole_row(data, "000010005", models=[Path("models")])
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from curate.fetch.deny import Deny
from curate.fetch.deny_file import naming, read_entries
from curate.ledger.early import applied_early
from curate.ledger.percentiles import percentiles
from curate.ledger.rules import KEPT, NOT_IN_UIDS, Rule, read_rules
from curate.ledger.schema import Reason, Status
from curate.ledger.select import changed_since
from curate.ledger.view import (
    LedgerTable,
    column_types,
    hidden_columns,
    recorded_columns,
    table_digests,
    tables,
)
from curate.ledger.whereabouts import (
    CopiesOf,
    ModelUse,
    PackedAt,
    StoredImage,
    copies_of,
    model_uses,
    packed_at,
    stored_image,
)
from curate.ledger.why import Explanation, RuleState, State, explain, read_conditions, rule_states

if TYPE_CHECKING:
    from curate.layout import Data


@dataclass(frozen=True)
class ColumnValue:
    """What a column says of a row. percentile: 0 to 100, the share of all values that are smaller, and half of equal
    ones; None where the column has no order or the row no value."""

    value: Any
    percentile: float | None
    meaning: str
    unit: str


@dataclass(frozen=True)
class Judgement:
    """What a selection says of a row. stale: the tables that changed since it was made. rules: as they are true of the
    row now, in their order; none where they can't be asked any more, which `problem` says."""

    verdict: str | None  # None: it does not know the row
    stale: list[str]
    rules: list[RuleState]
    problem: str = ""


@dataclass(frozen=True)
class DeniedBy:
    """A deny-list that names a row. entry: the line, where it is readable; "" where it is a digest."""

    file: str
    entry: str


@dataclass(frozen=True, kw_only=True)
class WholeRow:
    """All that is known of one row."""

    row: Explanation
    fetched: tuple[str, str] | None  # ISO 8601, UTC: when the fetch of its shard began and ended
    recovered: str | None  # which retry brought it: "2nd of 3"
    retries: int  # of its shard
    stored: StoredImage | None
    columns: dict[str, ColumnValue]
    selections: dict[str, Judgement]
    packed: dict[str, PackedAt]
    old_packs: list[str]  # of `packed`, those that were packed of an older selection
    models: list[ModelUse]
    copies: list[CopiesOf]
    denied: list[DeniedBy]
    can_be_done: str  # where there is no image


def whole_row(
    data: Data,
    key: str,
    found: Sequence[LedgerTable] | None = None,
    *,
    models: Sequence[Path] = (),
    deny: Sequence[str] = (),
) -> WholeRow:
    """All that is known of a row. models: folders below which models are looked for, beside DATA. deny: the deny-lists
    that the recipe names. KeyError where there is no such row, or its image must not be seen."""
    found = tables(data) if found is None else found
    row = explain(data, key, found)
    record = data.record(data.fetched_record(row.shard))
    retries = [retry.get("recovered") or [] for retry in record.get("retries") or []]
    back = next((i for i, keys in enumerate(retries, 1) if key in keys), None)
    has_image = row.status == Status.SUCCESS
    facts, shares = recorded_columns(found), percentiles(found, row)
    numbers = {c: row.download.get(c) for c in ("original_width", "original_height", "width", "height", "bytes")}
    columns = {
        name: ColumnValue(
            row.value(name),
            shares.get(name),
            "cosine of image and caption" if name == "similarity" else str(facts.get(name, {}).get("meaning") or ""),
            str(facts.get(name, {}).get("unit") or ""),
        )
        for name in [*row.columns, *(n for n, value in numbers.items() if value is not None)]
    }
    packs = {name: packed_at(data, name, key) for name in data.packs()} if has_image else {}
    return WholeRow(
        row=row,
        fetched=_times(record),
        recovered=f"{back} of {len(retries)}" if back else None,
        retries=len(retries),
        stored=(stored := stored_image(data, key, row.shard) if has_image else None),
        columns=columns,
        selections=judgements(data, row, found),
        packed={name: at for name, at in packs.items() if at is not None},
        old_packs=[name for name, at in packs.items() if at is not None and row.packs.get(name) is not True],
        models=model_uses(data, packs, models) if has_image else [],
        copies=copies_of(data, found, row.columns) if has_image else [],
        denied=denied_by(data, row, deny),
        can_be_done="" if stored else _can_be_done(row, data),
    )


def _times(record: Mapping[str, Any]) -> tuple[str, str] | None:
    times = [record.get(name) for name in ("start_time", "end_time")]
    if not all(isinstance(t, int | float) for t in times):
        return None
    began, ended = (datetime.datetime.fromtimestamp(t or 0, datetime.UTC).isoformat(timespec="seconds") for t in times)
    return began, ended


_FINAL = {
    Reason.HTTP_404: "the server says that there is no such file; other rows may have the same image",
    Reason.HTTP_4XX: "the server refuses; `tastemaker query` shows what it said (http_status, error_message)",
    Reason.OPTED_OUT: "its owner asks not to be used so, which is respected: leave it",
    Reason.DENIED: "a deny-list names it: it stays out unless the list changes",
    Reason.REMOVED: "it was removed: nothing else is known of it, and the deny-list of the data folder keeps it out",
    Reason.BAD_URL: "what the list has is no URL that can be fetched: put it right in the list",
    Reason.BAD_LINE: "the line of the list can't be read: put it right in the list",
    Reason.HASH_MISMATCH: "the server has other bytes than those whose digest the list carries",
    Reason.TOO_LARGE: "the file is larger than fetch.max_bytes allows",
    Reason.TOO_MANY_PIXELS: "the image has more pixels than images.max_pixels allows",
}


def _can_be_done(row: Explanation, data: Data) -> str:
    """What may yet bring an image that is not there, in a sentence."""
    if row.status == Status.SUCCESS:
        return f"the shard is damaged: `tastemaker verify {data} --repair` finds out, and makes it anew"
    if row.status == Status.REJECTED_EARLY:
        return (
            f"the early rule {row.reason} rejected it before it was fetched whole: `tastemaker retry {data} --early` "
            "fetches what the recipe's early rules no longer reject"
        )
    try:
        reason = Reason(str(row.reason))
    except ValueError:
        return ""
    if reason.transient:
        return f"this may pass: `tastemaker retry {data}` tries again"
    return _FINAL.get(reason, "trying again would not change it")


# ----------------------------------------------------------------------------------------------------------- selections


def judgements(data: Data, row: Explanation, found: Sequence[LedgerTable]) -> dict[str, Judgement]:
    """What each selection says of a row, rule by rule.

    A verdict tells much of what its rules say: all of a kept row, and those before the one that rejected it. Only what
    it does not tell is asked, of the row's shard, or of all rows where a rule looks at these.
    """
    now, hidden = table_digests(found), hidden_columns(found).values()
    applied = applied_early(found)
    judged = dict[str, Judgement]()
    for name in data.selections():
        record = data.record(data.selection_record(name))
        if not isinstance(record.get("rules"), list):
            continue
        stale = changed_since(data, name, now, hidden)
        verdict = row.selections.get(name)
        conditions = {r["name"]: r["condition"] for r in record["rules"]}
        if NOT_IN_UIDS in conditions:
            judged[name] = Judgement(verdict, stale, [])
            continue
        try:
            rules = read_conditions(found, conditions)
            told = {} if stale or verdict is None else _told(rules, row, verdict)
            early = [n for n, several in applied.items() if conditions.get(n) in several]
            asked = rule_states(data, [r for r in rules if r.name not in told], row, found, early)
            states = {**told, **{state.name: state for state in asked}}
            judged[name] = Judgement(verdict, stale, [states[rule.name] for rule in rules])
        except UserError as e:
            judged[name] = Judgement(verdict, stale, _unasked(found, conditions), str(e))
    return judged


def _told(rules: Sequence[Rule], row: Explanation, verdict: str) -> dict[str, RuleState]:
    """What a verdict that is up to date tells of the rules that look at all rows."""
    if row.status != Status.SUCCESS:
        return {}
    names = [rule.name for rule in rules]
    last = len(rules) if verdict == KEPT else names.index(verdict) + 1 if verdict in names else 0
    told = dict[str, RuleState]()
    for rule in rules[:last]:
        if rule.computed:
            values = {c: row.value(c) for c in rule.columns}
            missing = any(values[c] is None for c in rule.required)
            state: State = "true" if rule.name != verdict else "null" if missing else "false"
            told[rule.name] = RuleState(rule.name, rule.condition, state, values)
    return told


def _unasked(found: Sequence[LedgerTable], conditions: Mapping[str, str]) -> list[RuleState]:
    columns, source = column_types(found)
    known = read_rules(conditions, [*columns, *(f"source.{n}" for n in source)])
    return [RuleState(name, conditions[name], "unknown", {}) for name in known]


# ------------------------------------------------------------------------------------------------------------ deny-list


def denied_by(data: Data, row: Explanation, files: Sequence[str] = ()) -> list[DeniedBy]:
    """The deny-lists, DATA's own and `files`, that name a row: its URL, where that led, their domains, or its bytes."""
    sha256, said = row.download.get("sha256"), list[DeniedBy]()
    urls = [u for u in (row.url, row.download.get("final_url")) if u]
    if data.exists(data.deny_list):
        own = data.shown(data.deny_list)
        entry = naming(read_entries(data), urls, sha256)
        if entry is not None:
            said.append(DeniedBy(own, entry.entry))
        elif denies(Deny.load([data.local(data.deny_list)]), urls, sha256):
            said.append(DeniedBy(own, ""))
    said += [DeniedBy(file, "") for file in files if denies(Deny.load([file]), urls, sha256)]
    return said


def denies(deny: Deny, urls: Sequence[str], sha256: str | None) -> bool:
    """Whether a deny-list names one of these URLs, their domains, or bytes by their sha256."""
    known = re.fullmatch("[0-9a-f]{64}", sha256 or "")
    return any(map(deny.denies, urls)) or (known is not None and bytes.fromhex(known[0]) in set(deny.sha256s()))
