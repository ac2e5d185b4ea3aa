"""What the page is told about a data folder, its columns and its rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from curate.ledger.funnel import RuleCount
from curate.ledger.select import changed_since
from curate.ledger.view import table_digests
from studio.explore.live import RuleAnswer
from studio.explore.snapshot import Snapshot
from studio.explore.wire import (
    ColumnView,
    CutView,
    DataView,
    IndexView,
    LiveRule,
    RecipeRule,
    SearchAbility,
    StoredRule,
    StoredSelection,
    TopView,
)

if TYPE_CHECKING:
    from studio.data import StudioData

_MEANINGS = {
    "width": ("as stored", "pixels"),
    "height": ("as stored", "pixels"),
    "original_width": ("before it was resized", "pixels"),
    "original_height": ("before it was resized", "pixels"),
    "bytes": ("length of the original file", "bytes"),
    "http_status": ("what the web server answered", ""),
    "faces_blurred": ("faces that were blurred", "faces"),
    "similarity": ("cosine of image and caption", ""),
    "opt_out": ("signals that ask not to be used", ""),
    "redirects": ("every URL on the way to the last one", ""),
    "url": ("where it was fetched from", ""),
    "final_url": ("the same, after redirects", ""),
    "caption": ("the text of the list", ""),
    "sha256": ("of the original bytes", ""),
    "phash": ("perceptual hash, 16 hex digits", ""),
}
"""Of our own columns: meaning and unit."""

_PASSED_OVER = {"key", "status", "reason", "error_message", "exif"}
"""Columns that say nothing of images that are there, or nothing to people."""


def describe_data(folder: StudioData) -> DataView:
    """The data folder, as far as its index is."""
    explorer, store = folder.explorer, folder.data
    stale, state, snapshot = explorer.stale, explorer.state, explorer.snapshot_or_none
    recipe = explorer.recipe
    columns = [] if snapshot is None else describe_columns(snapshot)
    return DataView(
        name=store.name,
        place=str(store),
        read_only=folder.read_only,
        images=0 if snapshot is None else snapshot.count,
        rows=0 if snapshot is None else snapshot.rows.rows,
        version=explorer.version,
        index=IndexView(state=state.state, done=state.done, of=state.of, seconds=state.seconds, error=state.error),
        stale=stale,
        columns=columns,
        selections=[] if snapshot is None else _selections(snapshot),
        recipe_rules=[
            RecipeRule(name=name, condition=condition, early=name in recipe.early)
            for name, condition in recipe.rules.items()
        ],
        recipe_name=recipe.name,
        packs=store.packs(),
        search=SearchAbility.model_validate(folder.search.ability(), from_attributes=True),
        unsafe=[c.name for c in columns if c.unsafe],
    )


def describe_columns(snapshot: Snapshot) -> list[ColumnView]:
    """The columns that people look at: those of annotators first, then those of the list, then ours."""
    names = [c for t in snapshot.found[1:] for c in t.columns]
    names += [c for c in snapshot.all_types if c.startswith("source.")]
    names += [c for c in snapshot.all_types if c not in names and c not in _PASSED_OVER]
    return [_column(snapshot, name) for name in names if name not in snapshot.hidden]


def _column(snapshot: Snapshot, name: str) -> ColumnView:
    recorded: dict[str, Any] = snapshot.recorded.get(name, {})
    meaning, unit = _MEANINGS.get(name, ("", ""))
    found = snapshot.columns.get(name)
    facts = None if found is None else found.facts
    kind: Any = "text" if facts is None else facts.kind
    made_by = recorded.get("annotator") or ("list" if name.startswith("source.") else "fetch")
    if name in ("url", "caption"):
        made_by = "list"
    scale = recorded.get("scale")
    return ColumnView(
        name=name,
        kind=kind,
        type=snapshot.all_types[name],
        meaning=str(recorded.get("meaning") or meaning),
        unit=str(recorded.get("unit") or unit),
        scale=(float(scale[0]), float(scale[1])) if scale else None,
        unsafe=bool(recorded.get("unsafe")),
        made_by="embed" if name == "similarity" else str(made_by),
        count=None if facts is None else facts.count,
        low=None if facts is None else facts.low,
        high=None if facts is None else facts.high,
        log_possible=bool(facts and facts.log_counts),
        sortable=bool(facts and facts.stored),
    )


def _selections(snapshot: Snapshot) -> list[StoredSelection]:
    """The selections that were saved; stale where what they were made from has changed."""
    data, found = snapshot.data, []
    now = table_digests(snapshot.found)
    for name in data.selections():
        record = data.record(data.selection_record(name))
        if not isinstance(record.get("rules"), list):
            continue
        rules = [StoredRule(name=r["name"], condition=r["condition"]) for r in record["rules"]]
        changed = changed_since(data, name, now, snapshot.hidden.values())
        found.append(StoredSelection(name=name, rules=rules, kept=record.get("kept", 0), stale=bool(changed)))
    return found


def describe_rule(answer: RuleAnswer, count: RuleCount | None, name: str) -> LiveRule:
    """What a rule does; without a count it is switched off."""
    rule, top = answer.rule, answer.rule.top
    both = answer.counts, answer.early_counts
    return LiveRule(
        name=name,
        condition=rule.condition,
        on=count is not None,
        rejected=0 if count is None else count.rejected,
        marginal=sum(c.marginal for c in both),
        nulls=sum(c.null for c in both),
        unknown=sum(c.unknown for c in both),
        columns=list(rule.columns),
        cuts=[CutView(column=c.column, sign=c.sign, value=c.value) for c in rule.cuts],  # type: ignore[arg-type]
        top=TopView(column=top.column, fraction=top.fraction, value=answer.cut) if top else None,
    )
