"""Images of what a selection did: a contact sheet of what was kept and what each rule rejected, and histograms.

Images are read from a few shards only, so a sheet takes seconds however long the list is. What a column or a rule
calls unsafe is shown as a blur that no one can undo. The same data folder gives the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from aesthetic.errors import UserError
from curate.images.decode import decode
from curate.layout import Data
from curate.ledger.balance import balance_words, cluster_columns
from curate.ledger.counts import Verdicts, quantile, value_range, values_of
from curate.ledger.rules import DENIED, NUMBER, UNJUDGED, Computed, read_rules
from curate.ledger.schema import RowError, Status
from curate.ledger.select import load_selection
from curate.ledger.sql import literal, quote
from curate.ledger.view import (
    LedgerTable,
    column_types,
    hidden_columns,
    hidden_condition,
    open_ledger,
    recorded_columns,
    tables,
)
from curate.shards.tar import CorruptShard, image_member, index_tar, read_range
from curate.sheets import GREEN, GREY, Page, Tile, small, tint

BLURRED_FROM = 0.5
"""Images of which a column that tells what is unsafe (`ColumnSpec.unsafe`) says this or more are blurred, whatever the
rules say; so is what a rule on such a column rejects."""

SHARDS = 20
"""Images come from at most this many shards, spread over the list: a tar has to be read to its end to find one."""
KEPT, REJECTED = 48, 10  # images of what was kept, and of each rule's rejects
BINS = 60

_SIDE = 160  # units of the sheet that an image has at most
_SIZES = {"width", "height", "original_width", "original_height", "bytes", "http_status"}


@dataclass(frozen=True)
class Example:
    """One image to show: where its bytes are, and the two lines under it."""

    key: str
    shard: int
    value: str
    caption: str
    blurred: bool


def contact_sheet(data: Data, name: str, column: str | None = None) -> Path:
    """Draw `report/NAME/sheet.png`: kept images by `column` from worst to best, and rejected ones by rule.

    `column` is one of numbers; None takes the last that a rule names. Raises UserError where there is no selection of
    that name or no such column.
    """
    report = Report(data, name)
    column = report.default_column() if column is None else column
    if column is not None and column not in report.scores:
        known = ", ".join(report.scores) or "none"
        raise UserError(f"{data} has no scores called {column!r}. It has: {known}.")
    kept = report.kept(column)
    rejected = {r.name: report.rejected(r.name) for r in report.selection.rules if r.rejected}
    tiles = load_tiles(data, [*kept, *(e for examples in rejected.values() for e in examples)])

    page = Page(220 + 190 * -(-KEPT // 8) + 180 * (len(rejected) + 2))
    made = report.selection
    _title(page, report)
    parts = [("not fetched", sum(made.not_fetched.values()), GREY)]
    if denied := sum(made.denied.values()):
        parts.append((DENIED, denied, GREY))
    parts += [(rule.name, rule.rejected, tint(i)) for i, rule in enumerate(made.rules)]
    if made.unjudged:
        parts.append((UNJUDGED, made.unjudged, GREY))
    page.bar([*parts, ("kept", made.kept, GREEN)])
    if kept:
        page.heading(
            GREEN, "kept", f"{made.kept:,}", f"by {column}, worst to best" if column else "in the list's order"
        )
        if column:
            page.scale(kept[0].value, kept[-1].value)
        page.tiles([tiles[e.key] for e in kept], per_row=8)
    for i, rule in enumerate(made.rules):
        if examples := rejected.get(rule.name):
            aside = "narrow misses first" if report.numbers_of(rule.name) else ""
            page.heading(tint(i), rule.name, f"{rule.rejected:,} rejected", rule.condition, aside)
            page.tiles([tiles[e.key] for e in examples], per_row=REJECTED)
    if denied:
        page.heading(GREY, DENIED, f"{denied:,}", "not shown")
        page.words(f"{column} {n:,}" for column, n in made.denied.items())
    if reasons := made.not_fetched:
        page.heading(GREY, "not fetched", f"{sum(reasons.values()):,}", "no image to show")
        page.words(f"{reason} {n:,}" for reason, n in sorted(reasons.items(), key=lambda r: (-r[1], r[0])))
    if (all_shards := len(report.fetched.shards)) > len(report.picked):
        some = f"{len(report.picked)} of {all_shards:,}"
        page.note(f"images from {some} shards, spread evenly; the counts are of all rows")
    return page.save(data.sheet(name))


def score_charts(data: Data, name: str) -> Path | None:
    """Draw `report/NAME/scores.png`: each score's histogram over all fetched images and over the kept ones, and what
    share clusters have of both.

    A line marks where a rule cuts. None where the data folder has neither.
    """
    report = Report(data, name)
    clusters = report.selection.clusters.keys() & report.tables.keys()
    if not report.scores and not clusters:
        return None
    page = Page(140 + 250 * len(report.scores) + 290 * len(clusters))
    _title(page, report)
    for column in report.scores:
        both = f"all {report.selection.fetched:,} images (grey), kept {report.selection.kept:,}"
        page.heading(GREEN, column, "", both)
        page.histogram(*report.histogram(column), report.cuts(column))
    for column in sorted(clusters):
        facts = report.selection.clusters[column]
        page.heading(GREEN, column, "share of all images (grey), of those kept", balance_words(facts))
        page.shares(*report.shares(column))
        for word in ("grown", "shrunk"):
            page.words([f"{word}:", *(f"cluster {c}: {before:.1%} to {after:.1%}" for c, before, after in facts[word])])
    return page.save(data.charts(name))


def _title(page: Page, report: Report) -> None:
    made = report.selection
    share = f" ({made.kept / made.rows:.1%})" if made.rows else ""
    page.title(made.name, report.data.name, f"{made.rows:,} rows, {made.kept:,} kept{share}")


class Report:
    """What the data folder says about a selection; reads tables, never a tar."""

    def __init__(self, data: Data, name: str, among: Collection[int] | None = None) -> None:
        """among: the shards that images are taken of, all where it is None; of many some are picked."""
        self.data = data
        self.selection = load_selection(data, name)
        found = tables(data)
        self.fetched, *others = found
        self.columns, source = column_types(found)
        self.tables = {c: t for t in others for c in t.columns}
        clusters = cluster_columns(found)
        self.scores = [c for c in self.tables if NUMBER.fullmatch(self.columns[c]) and c not in clusters]
        recorded = recorded_columns(found)
        self.unsafe = [c for c, facts in recorded.items() if facts.get("unsafe")]
        self._unasked = {c for c in self.unsafe if recorded[c].get("early")}  # of some images, as early rules say no
        known = [*self.columns, *(f"source.{n}" for n in source)]
        self.rules = read_rules({r.name: r.condition for r in self.selection.rules}, known)
        hidden = hidden_columns(found)
        self._hidden = hidden_condition(hidden)
        # what nobody has asked yet whether it must not be seen is not shown either
        asked = [set(t.shards) for t in found if t.name in hidden.values()]
        shards = [s for s in self.fetched.shards if all(s in a for a in asked) and (among is None or s in among)]
        self.picked = [shards[i] for i in spread(len(shards), SHARDS)]
        self._verdicts = Verdicts(data.local(data.verdicts(name)))
        self.db = self._candidates(found)
        self._blurred = " or ".join(self._unsafe_conditions()) or "false"

    def default_column(self) -> str | None:
        """The score by which the sheet is ordered: the last one that a rule names, else any that is there.

        How unsafe an image is, is no order of beauty; None where there is no other score.
        """
        good = [c for c in self.scores if c not in self.unsafe]
        named = [c for rule in self.rules.values() if rule for c in rule.values if c in good]
        return next(reversed(named), next(reversed(good), None))

    def kept(self, column: str | None) -> list[Example]:
        """Kept images at even quantiles of a score, the lowest first."""
        if column is None:
            return self.examples("\"#verdict\" = 'kept'", "key", KEPT, [])
        c = quote(column)
        return self.examples(f"\"#verdict\" = 'kept' and {c} is not null", f"{c}, key", KEPT, [column])

    def rejected(self, name: str) -> list[Example]:
        """Some of what a rule rejected, spread evenly over the value that it looks at, the narrowest miss first."""
        found = self.examples(
            f'"#verdict" = {literal(name)}', self._nearest_first(name), REJECTED, self.columns_of(name)
        )
        return [replace(e, blurred=True) for e in found] if self._is_unsafe(name) else found

    def nearest(self, name: str, keys: npt.NDArray[np.uint64], limit: int) -> list[Example]:
        """Those of the images with these keys that a rule rejected most narrowly, the narrowest miss first."""
        where = f'"#verdict" = {literal(name)} and {self._among(keys)}'
        found = self.examples(where, self._nearest_first(name), limit, self.columns_of(name), first=True)
        return [replace(e, blurred=True) for e in found] if self._is_unsafe(name) else found

    def of_keys(self, keys: npt.NDArray[np.uint64], limit: int) -> list[Example]:
        """Some of the images with these keys, spread evenly."""
        return self.examples(self._among(keys), "key", limit, [])

    def _among(self, keys: npt.NDArray[np.uint64]) -> str:
        """SQL that is true of the candidates with these keys."""
        self.db.register("wanted", pa.table({"k": keys}))
        self.db.execute("create or replace temp table of_keys as select k from wanted")
        return "key::ubigint in (select k from of_keys)"

    def _nearest_first(self, name: str) -> str:
        """The order in which the images that a rule rejected most narrowly come first."""
        rule, numbers = self.rules[name], ", ".join(map(quote, self.numbers_of(name)))
        if not numbers:
            return "key"
        if rule and rule.cuts and all(cut.sign in ("<", "<=") for cut in rule.cuts):
            return f"greatest({numbers}) asc nulls last, key"
        return f"least({numbers}) desc nulls last, key"

    def numbers_of(self, rule: str) -> list[str]:
        """Those of the columns whose values a rule looks at that hold numbers."""
        read = self.rules[rule]
        return [c for c in read.values if c in self.scores or c in _SIZES] if read else []

    def columns_of(self, name: str) -> list[str]:
        """The ledger's own columns that a rule names, in the order in which it names them."""
        rule = self.rules[name]
        return [c for c in rule.columns if c in self.columns] if rule else []

    def examples(
        self, where: str, order: str, limit: int, shown: Sequence[str], *, first: bool = False
    ) -> list[Example]:
        """At most `limit` of the candidates, evenly spaced in an order, or the first of it, with the values of the
        columns `shown`."""
        (total,) = self.db.sql(f"select count(*) from candidate where {where}").fetchall()[0]
        places = list(range(min(total, limit))) if first else spread(total, limit)
        values = "".join(f", {quote(c)}" for c in shown)
        rows = self.db.sql(
            f'select key, "#shard", caption, {self._blurred} {values} from candidate where {where} '
            f"qualify list_contains({places}::bigint[], row_number() over (order by {order}) - 1) order by {order}"
        ).fetchall()
        return [
            Example(key, shard, value_words(dict(zip(shown, found, strict=True))), caption or "", bool(blurred))
            for key, shard, caption, blurred, *found in rows
        ]

    def histogram(self, column: str) -> tuple[list[int], list[int], float, float]:
        """Counts per bin of all images that have a value and of the kept ones, and the range (lo, hi) that is cut."""
        table, everything, kept = self.tables[column], np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
        lo, hi = value_range(table, column) or (0.0, 1.0)
        hi = hi if hi > lo else lo + 1.0
        for keys, values in values_of(table, column):
            places = np.minimum(((values - lo) / (hi - lo) * BINS).astype(np.int64), BINS - 1)
            verdicts = self._verdicts.of(keys)
            everything += np.bincount(places[verdicts >= 0], minlength=BINS)
            kept += np.bincount(places[self._verdicts.kept(verdicts)], minlength=BINS)
        return everything.tolist(), kept.tolist(), lo, hi

    def shares(self, column: str) -> tuple[list[float], list[float]]:
        """The share that clusters have of all images and of the kept ones, the largest first; of many, as many together
        as make `BINS` bars."""
        sizes = dict[float, npt.NDArray[np.int64]]()  # cluster -> all, kept
        for keys, values in values_of(self.tables[column], column):
            verdicts = self._verdicts.of(keys)
            seen = (verdicts >= 0) & ~self._verdicts.denied(verdicts)
            clusters, places = np.unique(values[seen], return_inverse=True)
            kept = self._verdicts.kept(verdicts[seen])
            both = np.stack([np.bincount(places[some], minlength=len(clusters)) for some in (slice(None), kept)], 1)
            for cluster, counts in zip(clusters.tolist(), both, strict=True):
                sizes[cluster] = sizes.get(cluster, 0) + counts
        rows = [sizes[cluster] for cluster in sorted(sizes, key=lambda c: (-sizes[c][0], c))]
        counts = np.array(rows, np.float64) if rows else np.zeros((1, 2))
        counts /= np.maximum(1, counts.sum(0))
        bars = [part.sum(0) for part in np.array_split(counts, min(BINS, len(counts)))]
        return [float(before) for before, _ in bars], [float(after) for _, after in bars]

    def cuts(self, column: str) -> list[tuple[float, str]]:
        """Where rules compare a column with a number, or take its best part: (value, words)."""
        cuts = []
        for rule in filter(None, self.rules.values()):
            cuts += [(cut.value, cut.words) for cut in rule.cuts if cut.column == column]
            for top in (c for c in rule.computed if c.kind == "top" and c.column == column):
                if (at := self._cut_of(top)) is not None:
                    cuts.append((at, f"best {top.fraction:.0%}"))
        return cuts

    def _candidates(self, found: Sequence[LedgerTable]) -> duckdb.DuckDBPyConnection:
        """A connection with the table `candidate`: the ledger's rows of the images of the picked shards, with `#shard`
        and `#verdict`."""
        here = [t.of(self.picked) for t in found]
        named = {c for rule in self.rules.values() if rule for c in rule.columns}
        db = open_ledger(self.data, {*self.columns, *named}, found=[t for t in here if t.shards])
        keys = [pq.read_table(here[0].data.local(file), columns=["key"])["key"] for file in here[0].files]
        shards = [pa.array([shard] * len(k), pa.int64()) for shard, k in zip(self.picked, keys, strict=True)]
        columns = {"key": pa.chunked_array(keys, pa.string()), "shard": pa.chunked_array(shards, pa.int64())}
        verdicts = self._verdicts.of(columns["key"])
        words = pa.array(self._verdicts.words, pa.string())
        columns["verdict"] = words.take(pa.array(verdicts, mask=verdicts < 0))
        db.register("place", pa.table(columns))
        absent = "".join(f", null::{self.columns[c]} as {quote(c)}" for t in here if not t.shards for c in t.columns)
        db.execute(
            f'create temp table candidate as select l.*, p.shard as "#shard", p.verdict as "#verdict"{absent} '
            "from ledger l join place p on p.key = l.key "
            f"where l.status = '{Status.SUCCESS}' and p.verdict <> '{DENIED}' and not ({self._hidden})"
        )
        return db

    def _cut_of(self, top: Computed) -> float | None:
        """From which value on a `top` keeps; None where no image has one."""
        if top.column not in self.tables:
            return None
        return quantile(self.tables[top.column], top.column, 1 - top.fraction)

    def _is_unsafe(self, name: str) -> bool:
        """Whether a rule looks at how unsafe images are; one that can't be read does if it has such a column's name."""
        rule = self.rules[name]
        if rule is not None:
            return any(c in self.unsafe for c in rule.columns)
        condition = next(r.condition for r in self.selection.rules if r.name == name)
        return any(c.lower() in condition.lower() for c in self.unsafe)

    def _unsafe_conditions(self) -> list[str]:
        """SQL conditions, each of which is true of images that are unsafe to look at.

        For each rule on an unsafe column that is what it rejects, whichever rule rejected it first. A `top` depends on
        all rows: what fails with and without it counts, and what lies above its cut. Where a rule can't be asked, the
        strictest cut that any rule names decides, or `BLURRED_FROM`.
        """
        cuts = [cut for rule in self.rules.values() if rule for cut in rule.cuts]
        strictest = {c: min([BLURRED_FROM, *(cut.value for cut in cuts if cut.column == c)]) for c in self.unsafe}
        found = [f"coalesce({quote(c)} >= {BLURRED_FROM}, {str(c in self._unasked).lower()})" for c in self.unsafe]
        for name, rule in self.rules.items():
            if not self._is_unsafe(name):
                continue
            for top in (c for c in (rule.computed if rule else ()) if c.kind == "top" and c.column in self.unsafe):
                at = self._cut_of(top)
                found.append(f"coalesce({quote(top.column)} >= {at}, true)" if at is not None else "true")
            if rule is not None:
                both = [rule.sql, rule.sql]
                for place in (quote(computed.place) for computed in rule.computed):
                    both = [both[0].replace(place, "true"), both[1].replace(place, "false")]
                fails = " and ".join(f"(({sql}) is not true)" for sql in dict.fromkeys(both))
                with contextlib.suppress(duckdb.Error):
                    self.db.sql(f"select count(*) filter ({fails}) from candidate").fetchall()
                    found.append(f"({fails})")
                    continue
            found.append("(" + " or ".join(f"coalesce({quote(c)} >= {strictest[c]}, true)" for c in self.unsafe) + ")")
        return found


def spread(total: int, limit: int) -> list[int]:
    """At most `limit` places among `total`, evenly spaced, with the first and the last."""
    if total <= limit:
        return list(range(total))
    return [round(i * (total - 1) / (limit - 1)) for i in range(limit)]


def value_words(values: dict[str, Any]) -> str:
    """The values that a rule looked at, short: `83 x 120`, `0.71`."""
    words = []
    for side, other in (("original_width", "original_height"), ("width", "height")):
        if side in values and other in values:
            words.append(f"{values.pop(side)} x {values.pop(other)}")
    for value in values.values():
        if value is None:
            words.append("no value")
        elif isinstance(value, bool):
            words.append(str(value).lower())
        elif isinstance(value, float):
            words.append(f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}")
        else:
            words.append(f"{value:,}" if isinstance(value, int) else " ".join(str(value).split()))
    return "  ".join(words)


def load_tiles(data: Data, examples: Sequence[Example]) -> dict[str, Tile]:
    """The examples with their images by key, each tar opened once."""
    tiles = {}
    for shard in sorted({e.shard for e in examples}):
        tar = data.local(data.tar(shard))
        index = index_tar(tar)
        with open(tar, "rb") as f:
            for e in (e for e in examples if e.shard == shard):
                member = image_member(index.get(e.key, {}))
                if member is None:
                    raise CorruptShard(f"{tar}: there is no image for {e.key}, which its table calls fetched")
                image = _decoded(read_range(f, member[1]), e.blurred)
                tiles[e.key] = Tile(image, f"{e.value}\n{e.caption}", e.blurred)
    return tiles


def _decoded(image: bytes, blurred: bool) -> Image.Image | None:
    """An image, small; None where it cannot be decoded, as a folder that others made may hold."""
    with contextlib.suppress(RowError):
        return small(decode(image, 2 * _SIDE), _SIDE, blurred)
    return None
