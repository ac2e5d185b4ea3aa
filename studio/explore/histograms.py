"""Histograms of what a selection keeps, over bins that were made with the index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from aesthetic.errors import UserError
from curate.ledger.funnel import count_bytes
from studio.explore.columns import OTHER, ColumnFacts
from studio.explore.snapshot import Snapshot

_KEPT = 128  # added to the bin of a row that is kept
_PART = 1 << 20  # rows that are counted at a time: they stay within a cache


def kept_counts(snapshot: Snapshot, kept: npt.NDArray[np.bool_], columns: Mapping[str, bool]) -> dict[str, list[int]]:
    """Column -> the counts of `kept` rows in the bins of its histogram; of values, one more for all others.

    columns: those that are wanted, and whether logarithmic.
    """
    bins = {c: snapshot.columns[facts_of(snapshot, c, log).name].bins(log) for c, log in columns.items()}
    counts = {column: np.zeros(256, np.int64) for column in columns}
    for start in range(0, snapshot.count, _PART):
        marks = kept[start : start + _PART].view(np.uint8) << np.uint8(7)
        for column in columns:
            counts[column] += count_bytes(bins[column][start : start + _PART] | marks)
    found = dict[str, list[int]]()
    for column, log in columns.items():
        facts, of_kept = snapshot.columns[column].facts, counts[column][_KEPT:]
        if facts.kind == "number":
            found[column] = of_kept[: len(facts.log_counts if log else facts.counts)].tolist()
        else:
            found[column] = [*of_kept[: len(facts.values)].tolist(), int(of_kept[OTHER])]
    return found


def facts_of(snapshot: Snapshot, column: str, log: bool) -> ColumnFacts:
    """What is known of a column that has a histogram. UserError where it has none."""
    if column not in snapshot.columns:
        known = ", ".join(c for c, found in snapshot.columns.items() if found.facts.kind != "text")
        raise UserError(f"there is no column {column} to count. There are {known}")
    facts = snapshot.columns[column].facts
    if facts.kind == "text":
        raise UserError(f"{column} holds texts, of which there is no histogram")
    if log and not facts.log_counts:
        raise UserError(f"{column} has no logarithmic histogram: that needs numbers above 0")
    return facts


def histogram(snapshot: Snapshot, column: str, log: bool) -> dict[str, Any]:
    """The histogram of a column over all rows, as the API has it."""
    facts = facts_of(snapshot, column, log)
    nulls = snapshot.count - (facts.count or 0)
    found: dict[str, Any] = {"column": column, "kind": facts.kind, "log": log, "nulls": nulls}
    if facts.kind == "number":
        edges, counts = (facts.log_edges, facts.log_counts) if log else (facts.edges, facts.counts)
        return {**found, "edges": list(edges), "counts": list(counts)}
    return {**found, "values": list(facts.values), "counts": list(facts.counts), "others": facts.others}
