"""A contact sheet of what only one of two selections keeps, by the rule of the other that rejects it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curate.ledger.differ import Difference, Keys, OnlyOne
from curate.ledger.select import load_selection
from curate.ledger.view import tables
from curate.ledger.why import KeyShape
from curate.report import SHARDS, Report, load_tiles
from curate.sheets import GREEN, Page, Tile, tint

if TYPE_CHECKING:
    from curate.layout import Data

EACH = 20
"""Images of each rule that made a difference."""


def difference_sheet(path: Path, data: Data, a: str, other: Data, b: str, found: Difference) -> Path:
    """Draw what only `a` of `data` keeps, then what only `b` of `other` keeps; by the rule that rejects it there, the
    narrowest miss first where it is one of numbers.

    Images come from a few shards that have most of them. The same folders give the same bytes.
    """
    same = str(data) == str(other)
    names = (a, b) if same else (f"{a} of {data.name}", f"{b} of {other.name}")
    parts = [
        *_parts(data, a, other, b, found.only_a, names, same),
        *_parts(other, b, data, a, found.only_b, names[::-1], same),
    ]
    page = Page(260 + sum(110 + 190 * -(-len(tiles) // 8) for _, _, _, tiles in parts))
    page.title(f"{names[0]}, {names[1]}", data.name, f"{found.compared:,} rows compared")
    kept = found.kept
    counts = [(f"only {names[0]}", kept.only_a, tint(0)), ("both", kept.both, GREEN)]
    page.bar([*counts, (f"only {names[1]}", kept.only_b, tint(2))])
    for ink, words, detail, tiles in parts:
        page.heading(ink, words, "", detail)
        page.tiles(tiles, per_row=8)
    if not parts:
        page.note("no image that only one of them keeps")
    return page.save(path)


def _parts(
    data: Data, keeps: str, other: Data, rejects: str, only: OnlyOne, names: tuple[str, str], same: bool
) -> Iterator[tuple[str, str, str, list[Tile]]]:
    """Of each rule that rejects what `keeps` keeps: a colour, words, its condition, and images, which lie in `data`."""
    if not only.keys:
        return
    rules = {rule.name: rule.condition for rule in load_selection(other, rejects).rules}
    shards = _shards(data, only.keys)
    by_rule = Report(data, rejects, shards) if same and rules.keys() & only.keys.keys() else None
    plain = Report(data, keeps, shards)
    for verdict, keys in only.keys.items():
        is_rule = by_rule is not None and verdict in rules
        examples = by_rule.nearest(verdict, keys, EACH) if by_rule and is_rule else plain.of_keys(keys, EACH)
        if examples:
            tiles = load_tiles(data, examples)
            words = f"only {names[0]}: {len(keys):,}, which {names[1]} rejects by {verdict}"
            ink = tint(list(rules).index(verdict)) if verdict in rules else tint(7)
            yield ink, words, rules.get(verdict, ""), [tiles[e.key] for e in examples]


def _shards(data: Data, keys: dict[str, Keys]) -> set[int]:
    """The shards that hold most of these images: of each rule some, so that none is without."""
    width = 10 ** KeyShape.of(tables(data)[0]).digits
    each, picked = max(1, SHARDS // len(keys)), set[int]()
    for those in keys.values():
        shards, counts = np.unique(those // np.uint64(width), return_counts=True)
        picked.update(shards[np.argsort(-counts, kind="stable")[:each]].tolist())
    return picked
