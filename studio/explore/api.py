"""The JSON API of the page to explore: the data folder, histograms, selections, rows in an order."""

from __future__ import annotations

import shlex
import time
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Depends, HTTPException, Query, Request

from aesthetic.errors import UserError
from curate.ledger.compare import compare_kept
from curate.ledger.select import saved_as
from studio.clients import Client
from studio.data import StudioData
from studio.explore.describe import describe_data, describe_rule
from studio.explore.explorer import Explorer, UnknownSelection
from studio.explore.histograms import histogram as count_all
from studio.explore.histograms import kept_counts
from studio.explore.listing import RowOrder, Show, place_of, value_at
from studio.explore.live import LiveSelection
from studio.explore.wire import (
    CompareRequest,
    CompareView,
    DataView,
    HistogramView,
    LiveRule,
    LiveView,
    Name,
    PlaceView,
    RowsView,
    RowView,
    SelectionId,
    SelectionRequest,
)


async def _data(request: Request) -> StudioData:
    data: StudioData = request.app.state.data
    return data


Folder = Annotated[StudioData, Depends(_data)]
api = APIRouter(prefix="/api")


class RuleWrong(UserError):
    """A rule that is wrong, and which."""

    def __init__(self, message: str, rule: str) -> None:
        super().__init__(message)
        self.rule = rule


@api.get("/data")
def data(folder: Folder) -> DataView:
    """The data folder: its columns, its selections, and how far its index is."""
    return describe_data(folder)


@api.get("/histogram")
def histogram(folder: Folder, column: Annotated[Name, Query()], log: bool = False) -> HistogramView:
    """A column over all rows."""
    return HistogramView(**count_all(folder.explorer.snapshot, column, log))


@api.post("/selections")
async def select(folder: Folder, client: Client, asked: SelectionRequest) -> LiveView:
    """Try rules: what each does with all rows, and histograms of what is kept. Nothing is written."""
    return await folder.explorer.work.run(client, lambda: _select(folder.explorer, asked))


def _select(explorer: Explorer, asked: SelectionRequest) -> LiveView:
    began = time.monotonic()
    names = [rule.name for rule in asked.rules]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise RuleWrong(f"there are two rules called {twice}", twice)
    rules = {rule.name: rule.condition for rule in asked.rules if rule.on}
    off = {rule.name: rule.condition for rule in asked.rules if not rule.on}
    try:
        selection = explorer.select(rules, off)
    except UserError as e:
        if wrong := next((name for name, text in rules.items() if str(e).startswith(f"rule {name} ({text})")), None):
            raise RuleWrong(str(e), wrong) from None
        raise
    counts = {count.name: count for count in selection.counts}
    live = list[LiveRule]()
    for rule in asked.rules:
        try:
            answer = explorer.answer_of(selection, rule.name)
        except UserError as e:  # of a rule that is off
            live.append(
                LiveRule(
                    name=rule.name,
                    condition=rule.condition,
                    on=False,
                    rejected=0,
                    marginal=0,
                    nulls=0,
                    unknown=0,
                    columns=[],
                    cuts=[],
                    top=None,
                    error=str(e),
                )
            )
            continue
        live.append(describe_rule(answer, counts.get(rule.name), rule.name))
    kept = kept_counts(selection.snapshot, selection.kept, {c: c in asked.log for c in asked.columns})
    rows = selection.snapshot.rows
    return LiveView(
        id=selection.id,
        rules=live,
        rows=rows.rows,
        not_fetched=rows.not_fetched,
        denied=rows.denied,
        early=rows.early,
        unjudged=selection.unjudged,
        kept=selection.kept_count,
        warnings=selection.warnings,
        kept_histograms=kept,
        seconds=time.monotonic() - began,
    )


class _Filter:
    """Which rows are asked for, and in which order: parameters of the addresses of rows."""

    def __init__(
        self,
        selection: Annotated[SelectionId | None, Query(description="the id of a selection")] = None,
        show: Annotated[
            Show,
            Query(
                description="rejected: first by `rule` (without one: by any); marginal: `rule` is not TRUE, whatever "
                "others say; around: all other rules are TRUE; only, other, both: of what is kept here and in `other`"
            ),
        ] = "all",
        rule: Annotated[Name | None, Query()] = None,
        other: Annotated[SelectionId | None, Query(description="the id of another selection")] = None,
        sort: Annotated[
            Name, Query(description="key, random, nearest (to the cut of `rule`), search:ID, or a column")
        ] = "key",
        descending: bool = False,
    ) -> None:
        self.selection, self.show, self.rule, self.other = selection, show, rule, other
        self.sort, self.descending = sort, descending

    def listing(self, explorer: Explorer) -> tuple[LiveSelection | None, RowOrder]:
        """The rows; UnknownSelection becomes a 404."""
        try:
            selection = None if self.selection is None else explorer.selection(self.selection)
            other = None if self.other is None else explorer.selection(self.other)
            return selection, explorer.listing(
                selection, show=self.show, rule=self.rule, other=other, sort=self.sort, descending=self.descending
            )
        except UnknownSelection as e:
            raise HTTPException(404, f"there is no selection or search {e.args[0]}, or no longer: ask again") from None


Filter = Annotated[_Filter, Depends(_Filter)]


@api.get("/rows")
async def rows(
    folder: Folder,
    client: Client,
    which: Filter,
    offset: Annotated[int, Query(ge=0, le=1 << 40)] = 0,
    limit: Annotated[int, Query(ge=1, le=200)] = 100,
) -> RowsView:
    """Images in an order, from a place of it on."""
    return await folder.explorer.work.run(client, lambda: _rows(folder.explorer, which, offset, limit))


def _rows(explorer: Explorer, which: _Filter, offset: int, limit: int) -> RowsView:
    selection, listing = which.listing(explorer)
    snapshot = explorer.snapshot if selection is None else selection.snapshot
    places = range(offset, min(offset + limit, len(listing.rows)))
    some = listing.rows[offset : offset + limit].astype(np.int64)
    blurred = snapshot.blurred(some)
    found = []
    for i, row, blur in zip(places, some.tolist(), blurred.tolist(), strict=True):
        width, height = snapshot.size(row)
        found.append(
            RowView(
                key=snapshot.key(row),
                width=width,
                height=height,
                caption=snapshot.rows.caption(row),
                value=value_at(snapshot, listing, i),
                verdict=None if selection is None else selection.verdict(row),
                blurred=blur,
            )
        )
    return RowsView(total=len(listing.rows), offset=offset, rows=found)


@api.get("/place")
async def place(
    folder: Folder,
    client: Client,
    which: Filter,
    value: Annotated[float, Query(allow_inf_nan=False)],
) -> PlaceView:
    """Where in an order the column that is sorted by crosses a value."""

    def find() -> PlaceView:
        selection, listing = which.listing(folder.explorer)
        snapshot = folder.explorer.snapshot if selection is None else selection.snapshot
        return PlaceView(offset=place_of(snapshot, listing, value), total=len(listing.rows))

    return await folder.explorer.work.run(client, find)


@api.post("/compare")
async def compare(folder: Folder, client: Client, asked: CompareRequest) -> CompareView:
    """What two selections keep, in numbers."""
    explorer = folder.explorer

    def count() -> CompareView:
        try:
            one, two = explorer.selection(asked.a), explorer.selection(asked.b)
        except UnknownSelection as e:
            raise HTTPException(404, f"there is no selection {e.args[0]}, or no longer: ask again") from None
        data = explorer.snapshot.data
        saved = [saved_as(data, {rule.name: rule.condition for rule in each.rules}) for each in (one, two)]
        command = None
        if all(saved) and saved[0] != saved[1]:
            command = shlex.join(["tastemaker", "diff", str(data), *map(str, saved)])
        return CompareView(**vars(compare_kept(one.kept, two.kept)), command=command)

    return await explorer.work.run(client, count)
