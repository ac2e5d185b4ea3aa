"""All that is known of one image, for the page: what the data folder says, and where its values lie among all."""

from __future__ import annotations

import base64
import datetime
import math
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from curate.fetch.deny import domain_entry
from curate.fetch.deny_file import What, read_entries
from curate.ledger.rules import NUMBER
from curate.ledger.schema import Status
from curate.ledger.view import column_types, recorded_columns
from curate.ledger.why import STATES, Explanation, RuleState, State, explain
from studio.images.denying import named_by

if TYPE_CHECKING:
    from studio.data import StudioData

Kind = Literal["number", "category", "flag", "text"]

LONGEST = 20_000
"""Characters of a text, and values of a list, that are shown."""
GROUPED = 200_000
"""Images up to which the whole groups of near-duplicates are told here; of more it takes seconds until it is known who
is kept of each, and GET /api/duplicates tells it."""


class ValueView(BaseModel):
    """What a column says of an image."""

    name: str
    value: Any = Field(description="null where it has none")
    percentile: float | None = Field(
        description="0 to 100: the share of images with a smaller value, half of those with the same; null where the "
        "column has no order, the image no value, or the index is not made yet"
    )
    kind: Kind
    meaning: str
    unit: str
    unsafe: bool = Field(description="whether high values say that the image is unsafe to show")


class RuleStateView(BaseModel):
    """What a rule says of an image."""

    name: str
    condition: str
    state: State = Field(
        description="true: it keeps the image; false; null: a column that it needs has no value; unknown"
    )
    values: dict[str, Any] = Field(description="the columns that it looks at")


class SelectionVerdict(BaseModel):
    """What a saved selection says of an image."""

    name: str
    verdict: str


class DuplicatesView(BaseModel):
    """The images that a column takes for nearly the same."""

    column: str
    group: str = Field(description="its first key")
    size: int
    keeper: str | None = Field(description="null where that is not known here: GET /api/duplicates tells it")
    members: list[str] = Field(description="keys, the first 100; of a large data folder the nearest alone")


class ListView(BaseModel):
    """Where in the list a row is."""

    name: str
    file: str
    line: int | None = Field(description="of that file, counted from 0; null where the list was copied or cut")


class DeniedView(BaseModel):
    """Why an image is denied, by the studio's deny-list."""

    entry: str
    what: What


class WhyView(BaseModel):
    """All that is known of one row."""

    key: str
    status: str
    reason: str | None = Field(description="why it has no image")
    caption: str | None
    captions: dict[str, str] = Field(description="captions that annotators wrote: column -> text")
    url: str | None
    licence: dict[str, str] = Field(description="columns of the list that say whose it is")
    width: int | None = Field(description="pixels, as it is stored")
    height: int | None
    blurred: bool
    image: str | None = Field(description="where it is served")
    columns: list[ValueView]
    source: dict[str, Any] = Field(description="the list's own columns")
    verdict: str | None = Field(description="of the selection that was asked about")
    rules: list[RuleStateView] = Field(description="of that selection, in its order")
    selections: list[SelectionVerdict]
    packs: list[str] = Field(description="those that hold it, as far as they are up to date")
    download: dict[str, Any] = Field(description="status, final_url, domain, http_status, bytes, sha256, ...")
    duplicates: list[DuplicatesView]
    denied: DeniedView | None
    commands: list[str] = Field(description="commands that show the same in a terminal")
    list: ListView


def why_view(folder: StudioData, key: str, selection: str | None) -> WhyView:
    """All that is known of a row. KeyError where there is none, or its image must not be seen."""
    shown, _ = folder.images.columns()
    found = shown.found
    explained = explain(folder.data, key, found)
    has_image = explained.status == Status.SUCCESS
    placed = folder.images.find(key) if has_image else None
    facts = recorded_columns(found)
    types, _ = column_types(found)
    verdict, states = (None, []) if selection is None else _judged(folder, explained, selection)
    domain = domain_entry(explained.url or "")
    download = {"status": explained.status, "domain": domain, **explained.download}
    root = shlex.quote(str(folder.data))
    return WhyView(
        key=key,
        status=explained.status,
        reason=explained.reason,
        caption=_text(explained.caption),
        captions={
            column: str(_text(value))
            for column, value in explained.columns.items()
            if facts.get(column, {}).get("annotator") == "captions"
            and isinstance(value, str)
            and not column.endswith("_outcome")
        },
        url=_text(explained.url),
        licence={name: str(_text(str(value))) for name, value in explained.licence.items() if value is not None},
        width=explained.download.get("width"),
        height=explained.download.get("height"),
        blurred=placed is not None and placed.blurred,
        image=f"/api/data/images/{key}" if placed is not None else None,
        columns=[
            ValueView(
                name=column,
                value=json_value(explained.value(column)),
                percentile=_percentile(folder, column, explained.value(column)),
                kind=_kind(folder, column, types.get(column, "")),
                meaning=_meaning(column, facts.get(column, {})),
                unit=str(facts.get(column, {}).get("unit") or ""),
                unsafe=column in shown.unsafe_names,
            )
            for column in explained.columns
        ],
        source={name: json_value(value) for name, value in explained.source.items()},
        verdict=verdict,
        rules=[RuleStateView(**{**vars(s), "values": json_value(s.values)}) for s in states],
        selections=[SelectionVerdict(name=n, verdict=v) for n, v in explained.selections.items()],
        packs=[name for name, holds in explained.packs.items() if holds],
        download={name: json_value(value) for name, value in download.items() if value is not None},
        list=ListView(name=explained.list, file=explained.file, line=explained.line),
        duplicates=_duplicates(folder, explained, facts) if has_image else [],
        denied=_denied(folder, explained),
        commands=[
            f"tastemaker why {root} {key}",
            f"tastemaker query {root} \"SELECT * FROM ledger WHERE key = '{key}'\"",
        ],
    )


def _judged(folder: StudioData, explained: Explanation, selection: str) -> tuple[str | None, list[RuleState]]:
    """The verdict of a selection that lives in the studio, and what its rules say; nothing of a row without an image.

    UnknownSelection where there is none of this id.
    """
    found = folder.explorer.selection(selection)
    if explained.status != Status.SUCCESS:
        return None, []
    row = found.snapshot.row(explained.key)
    states = [
        RuleState(
            answer.rule.name,
            answer.rule.condition,
            STATES[int(answer.states[row])],
            {column: explained.value(column) for column in answer.rule.columns},
        )
        for answer in found.answers
    ]
    return found.verdict(row), states


def _percentile(folder: StudioData, column: str, value: Any) -> float | None:
    """The share of images with a smaller value, 0 to 100."""
    snapshot = folder.explorer.snapshot_or_none
    indexed = None if snapshot is None else snapshot.columns.get(column)
    if indexed is None or indexed.facts.kind != "number" or isinstance(value, bool):
        return None
    return folder.explorer.percentile(column, float(value)) if isinstance(value, int | float) else None


def _kind(folder: StudioData, column: str, kind: str) -> Kind:
    snapshot = folder.explorer.snapshot_or_none
    if snapshot is not None and (indexed := snapshot.columns.get(column)) is not None:
        kinds: dict[str, Kind] = {"number": "number", "category": "category", "flag": "flag"}
        return kinds.get(indexed.facts.kind, "text")
    return "number" if NUMBER.fullmatch(kind) else "flag" if kind == "BOOLEAN" else "text"


def _meaning(column: str, facts: Mapping[str, Any]) -> str:
    return "cosine of image and caption" if column == "similarity" else str(facts.get("meaning") or "")


def _duplicates(
    folder: StudioData, explained: Explanation, facts: Mapping[str, Mapping[str, Any]]
) -> list[DuplicatesView]:
    """The groups of the image, by the columns that near-duplicates made."""
    snapshot = folder.explorer.snapshot_or_none
    if snapshot is not None and snapshot.count <= GROUPED:
        groups = folder.search.groups.of(explained.key)
        return [
            DuplicatesView(
                column=g.column, group=g.group, size=g.size, keeper=g.keeper, members=[m.key for m in g.members]
            )
            for g in groups
        ]
    found = []
    for column, value in explained.columns.items():
        is_group = facts.get(column, {}).get("annotator") == "near-duplicates" and f"{column}_size" in explained.columns
        if is_group and value is not None:
            size = explained.columns[f"{column}_size"] or 1
            known = sorted({m for m in (value, explained.key, explained.columns.get(f"{column}_of")) if m})
            found.append(DuplicatesView(column=column, group=value, size=size, keeper=None, members=known))
    return found


def _denied(folder: StudioData, explained: Explanation) -> DeniedView | None:
    entry = named_by(explained, read_entries(folder.data))
    return None if entry is None else DeniedView(entry=entry.entry, what=entry.what)


def json_value(value: Any) -> Any:
    """A value of a table as JSON has it: no NaN, times as ISO 8601, bytes as base64, long texts and lists cut."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case str():
            return _text(value)
        case bytes():
            return base64.b64encode(value[:LONGEST]).decode()
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case dict():
            return {str(k): json_value(v) for k, v in value.items()}
        case list() | tuple():
            return [json_value(v) for v in value[:LONGEST]]
        case _:
            return _text(str(value))


def _text(text: str | None) -> str | None:
    return text if text is None or len(text) <= LONGEST else text[:LONGEST] + " ..."
