"""Pictures of what a selection did: a contact sheet of what was kept and what each rule rejected, and score histograms.

Images are read from a few shards only, so a sheet takes seconds however long the list is. What a column or a rule
calls unsafe is shown as a blur that no one can undo. The same data folder gives the same bytes. `sheet` draws a contact
sheet of any images at hand.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from aesthetic.errors import UserError
from aesthetic.files import atomic
from curate.images.decode import decode
from curate.layout import Data
from curate.ledger.rules import NUMBER, Rule, read_rules
from curate.ledger.schema import FETCHED_COLUMNS, URL_COLUMNS, RowError, Status
from curate.ledger.select import load_selection
from curate.ledger.sql import connect, literal, quote
from curate.ledger.view import OURS, column_types, fetched_columns, recorded_columns, tables
from curate.shards.tar import CorruptShard, image_member, index_tar, read_range

BLURRED_FROM = 0.5
"""Images of which a column that tells what is unsafe (`ColumnSpec.unsafe`) says this or more are blurred, whatever the
rules say; so is what a rule on such a column rejects."""

SHARDS = 20
"""Pictures come from at most this many shards, spread over the list: a tar has to be read to its end to find one."""
KEPT, REJECTED = 48, 10  # pictures of what was kept, and of each rule's rejects
BINS = 60

_SCALE = 2  # device pixels per unit of the design below
_WIDTH, _MARGIN, _GAP = 1240, 44, 12
_PAPER, _INK, _SOFT, _LINE, _CARD = "#fbfaf7", "#1d1d1b", "#85837c", "#e4e2dc", "#ffffff"
_GREEN, _GREY = "#2f7d6d", "#c9c7c0"
_TINTS = ("#d9a14e", "#b9708a", "#6f8fb8", "#8ea65b", "#c77b58", "#8c7fb3", "#5fa3a3", "#b8a06a")


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One picture of the sheet: where its bytes are, and the two lines under it."""

    key: str
    shard: int
    value: str
    caption: str
    blurred: bool


# ------------------------------------------------------------------------------------------------------ what to show


def contact_sheet(data: Data, name: str, column: str | None = None) -> Path:
    """Draw `report/NAME/sheet.png`: kept images by `column` from worst to best, and rejected ones by rule.

    `column` is a score column or `similarity`; None takes the last score that a rule names. Raises UserError where
    there is no selection of that name or no such column.
    """
    facts = _Facts(data, name)
    column = facts.default_column() if column is None else column
    if column is not None and column not in facts.score_tables:
        raise UserError(
            f"{data.root} has no scores called {column!r}. It has: {', '.join(facts.score_tables) or 'none'}."
        )
    kept = facts.kept_tiles(column)
    rejected = {r.name: facts.rejected_tiles(r.name) for r in facts.selection.rules if r.rejected}
    pictures = _read_pictures(data, [*kept, *(t for tiles in rejected.values() for t in tiles)])

    page = _Page(220 + 190 * -(-KEPT // 8) + 180 * (len(rejected) + 1))
    _header(page, data.root, facts)
    if kept:
        order = f"by {column}, worst to best" if column else "in the list's order"
        page.heading(_GREEN, "kept", f"{facts.selection.kept:,}", order)
        if column:
            page.scale(kept[0].value, kept[-1].value)
        page.tiles(kept, pictures, per_row=8, ratio=0.75)
    for i, rule in enumerate(facts.selection.rules):
        if tiles := rejected.get(rule.name):
            aside = "narrow misses first" if facts.numbers_of(rule.name) else ""
            page.heading(_tint(i), rule.name, f"{rule.rejected:,} rejected", rule.condition, aside)
            page.tiles(tiles, pictures, per_row=REJECTED, ratio=0.75)
    if reasons := facts.selection.not_fetched:
        page.heading(_GREY, "not fetched", f"{sum(reasons.values()):,}", "no image to show")
        page.words(f"{reason} {n:,}" for reason, n in sorted(reasons.items(), key=lambda r: (-r[1], r[0])))
    if (there := len(facts.fetched_table.shards)) > len(facts.picked):
        page.note(f"pictures from {len(facts.picked)} of {there:,} shards, spread evenly; the counts are of all rows")
    return page.save(data.sheet(name))


def score_charts(data: Data, name: str) -> Path | None:
    """Draw `report/NAME/scores.png`: each score's histogram over all fetched images and over the kept ones.

    A line marks where a rule cuts. None where the data folder has no scores.
    """
    facts = _Facts(data, name)
    if not facts.score_tables:
        return None
    page = _Page(140 + 250 * len(facts.score_tables))
    _header(page, data.root, facts, bar=False)
    for column in facts.score_tables:
        both = f"all {facts.selection.fetched:,} images (grey), kept {facts.selection.kept:,}"
        page.heading(_GREEN, column, "", both)
        page.histogram(*facts.histogram(column), facts.cuts(column))
    return page.save(data.charts(name))


class Shown(NamedTuple):
    """A picture of a sheet of one's own; `caption` is one line or two, with a newline between them."""

    image: Image.Image | npt.NDArray[np.uint8] | None  # RGB, of any size; None where it cannot be decoded
    caption: str
    blurred: bool = False  # what is called unsafe is shown as a blur that no one can undo


def enlarged(picture: Image.Image | npt.NDArray[np.uint8], caption: str, blurred: bool = False) -> Shown:
    """A picture of a sheet; a small one, as small models draw them, is shown large, pixel by pixel."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    times = max(1, 224 // max(image.size))
    large = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    return Shown(large, caption, blurred)


def sheet(path: Path, title: str, rows: Sequence[tuple[str, Sequence[Shown]]]) -> Path:
    """Draw a contact sheet of pictures at hand: for each row its title line, then its pictures, five abreast.

    A row without pictures is left out. The same pictures and words give the same bytes.
    """
    rows = [(words, shown) for words, shown in rows if shown]
    page = _Page(200 + sum(100 + 220 * -(-len(shown) // 5) for _, shown in rows))
    page.text(_MARGIN, page.y, title, 24, room=_WIDTH - 2 * _MARGIN)
    page.y += 36
    for i, (words, shown) in enumerate(rows):
        page.heading(_tint(i), words, "", "")
        tiles, pictures = [], {}
        for j, (image, caption, blurred) in enumerate(shown):
            value, _, more = caption.partition("\n")
            tiles.append(Tile(key=str(j), shard=0, value=value, caption=more, blurred=blurred))
            if isinstance(image, np.ndarray):
                image = Image.fromarray(image)
            pictures[str(j)] = None if image is None else _small(image, 224 * _SCALE, blurred)
        page.tiles(tiles, pictures, per_row=5, ratio=0.75)
    return page.save(path)


class _Facts:
    """What the data folder says about a selection; reads tables, never a tar."""

    def __init__(self, data: Data, name: str) -> None:
        self.selection = load_selection(data, name)
        self.rules = [(r.name, r.condition) for r in self.selection.rules]
        found = tables(data)
        self.fetched_table, *others = found
        self.columns, self.source = column_types(found)
        self.column_tables = {c: t for t in others for c in t.columns}
        self.score_tables = {c: t for c, t in self.column_tables.items() if NUMBER.fullmatch(self.columns[c])}
        self.unsafe = [c for c, facts in recorded_columns(found).items() if facts.get("unsafe")]
        known = [*self.columns, *(f"source.{n}" for n in self.source)]
        self.said: dict[str, Rule | None] = read_rules(dict(self.rules), known)
        self.db = connect()
        chosen = ds.dataset(str(data.verdicts(name)), format="parquet")
        self.db.register("chosen", chosen)
        shards = self.fetched_table.shards
        self.picked = [shards[i] for i in _spread(len(shards), SHARDS)]
        self._candidates()
        plain = [f"coalesce({quote(c)} >= {BLURRED_FROM}, false)" for c in self.unsafe]
        self.blur = " or ".join([*plain, *self._fails()]) or "false"

    def default_column(self) -> str | None:
        """The score by which the sheet is ordered unless told: the last one that a rule names, else any that is there.

        How unsafe an image is, is no order of beauty; None where there is no other score.
        """
        good = [c for c in self.score_tables if c not in self.unsafe]
        named = [c for rule, _ in self.rules for c in self.columns_of(rule) if c in good]
        return next(reversed(named), next(reversed(good), None))

    def _candidates(self) -> None:
        """The table `candidate`: the images of the picked shards, with their shard, verdict and scores."""
        parts = []
        fields = self._fields()
        for shard, path in zip(self.fetched_table.shards, self.fetched_table.files, strict=True):
            if shard in self.picked:
                there = [n for n in pq.read_schema(path).names if n in OURS]  # the list's WIDTH is our width to SQL
                part = pq.read_table(path, columns=there, filters=[("status", "=", Status.SUCCESS.value)])
                for name, kind in URL_COLUMNS + FETCHED_COLUMNS:
                    if name not in there:  # a folder that img2dataset wrote
                        part = part.append_column(name, pa.nulls(len(part), kind))
                whole = part.select(OURS).append_column("shard", pa.array([shard] * len(part), pa.int64()))
                if fields:
                    values = pq.read_table(path, filters=[("status", "=", Status.SUCCESS.value)])
                    arrays = [values.column(i).combine_chunks() for i in fields.values()]
                    whole = whole.append_column("source", pa.StructArray.from_arrays(arrays, list(fields)))
                parts.append(whole)
        self.db.register("image", pa.concat_tables(parts))
        columns, joins = ["image.*", "chosen.verdict"], ["join chosen using (key)"]
        for i, (column, table) in enumerate(self.column_tables.items()):
            files = [str(p) for s, p in zip(table.shards, table.files, strict=True) if s in self.picked]
            if files:
                self.db.register(f"score{i}", ds.dataset(files, format="parquet"))
                joins.append(f"left join score{i} on score{i}.{quote(table.key)} = image.key")
            columns.append(f"score{i}.{quote(column)}" if files else f"null::{self.columns[column]} as {quote(column)}")
        self.db.execute(f"create table candidate as select {', '.join(columns)} from image {' '.join(joins)}")

    def _fields(self) -> dict[str, int]:
        """The list's columns that rules on unsafe scores name, and their places in `fetched/`."""
        named = {c for rule, _ in self.rules if self._is_unsafe(rule) and (r := self.said[rule]) for c in r.columns}
        places = fetched_columns(pq.read_schema(self.fetched_table.files[0]))[1]
        return {n: i for n, i in places.items() if f"source.{n}" in named}

    def _is_unsafe(self, rule: str) -> bool:
        """Whether a rule looks at a score of how unsafe images are; one that can't be read does if it has its name."""
        said = self.said[rule]
        if said is not None:
            return any(c in self.unsafe for c in said.columns)
        return any(c.lower() in dict(self.rules)[rule].lower() for c in self.unsafe)

    def _fails(self) -> list[str]:
        """For each rule on an unsafe score, SQL that is true of what it rejects, whichever rule rejected it first.

        A `top` depends on all rows: what fails with and without it counts, and what lies above its cut. Where a rule
        can't be asked, the strictest cut that any rule names decides, or `BLURRED_FROM`.
        """
        found = []
        for rule, condition in self.rules:
            if not self._is_unsafe(rule):
                continue
            said = self.said[rule]
            for c in said.computed if said else ():
                if c.kind == "top" and c.column in self.unsafe:
                    self._values(c.column)
                    (at,) = self.db.sql(f"select quantile_disc(v, {1 - c.fraction}) from value").fetchall()[0]
                    found.append(f"coalesce({quote(c.column)} >= {at}, true)" if at is not None else "true")
            try:
                if said is None:
                    raise UserError(f"{condition} is no condition")
                both = [said.sql, said.sql]
                for computed in said.computed:
                    both = [sql.replace(quote(computed.place), word) for sql, word in zip(both, WORDS, strict=True)]
                fails = " and ".join(f"(({sql}) is not true)" for sql in dict.fromkeys(both))
                self.db.sql(f"select count(*) filter ({fails}) from candidate").fetchall()
            except (UserError, duckdb.Error):
                cuts = [cut for r in self.said.values() if r for cut in r.cuts]
                strictest = {c: min([BLURRED_FROM, *(u.value for u in cuts if u.column == c)]) for c in self.unsafe}
                fails = " or ".join(f"coalesce({quote(c)} >= {strictest[c]}, true)" for c in self.unsafe)
            found.append(f"({fails})")
        return found

    def _values(self, column: str) -> None:
        """The table `value` (key, v): one score of every image that has one."""
        table = self.score_tables[column]
        self.db.register("stored", ds.dataset([str(p) for p in table.files], format="parquet"))
        c = quote(column)
        self.db.execute(
            "create or replace temp table value as "
            f"select {quote(table.key)} as key, {c} as v from stored where isfinite({c})"
        )

    def kept_tiles(self, column: str | None) -> list[Tile]:
        """Kept images at even quantiles of a score, the lowest first."""
        if column is None:
            return self._tiles("verdict = 'kept'", "key", KEPT, [])
        c = quote(column)
        return self._tiles(f"verdict = 'kept' and {c} is not null", f"{c}, key", KEPT, [column])

    def rejected_tiles(self, rule: str) -> list[Tile]:
        """Some of what a rule rejected, spread evenly over the value that it looks at, the narrowest miss first."""
        shown = self.columns_of(rule)
        order = "key"
        if numbers := self.numbers_of(rule):
            both = ", ".join(quote(c) for c in numbers)
            order = f"least({both}) desc nulls last, key"
            said = self.said[rule]
            if said and said.cuts and all(cut.sign in ("<", "<=") for cut in said.cuts):
                order = f"greatest({both}) asc nulls last, key"
        unsafe = self._is_unsafe(rule)
        return self._tiles(f"verdict = {literal(rule)}", order, REJECTED, shown, unsafe=unsafe)

    def numbers_of(self, rule: str) -> list[str]:
        """Those of a rule's columns that hold numbers."""
        return [c for c in self.columns_of(rule) if c in self.score_tables or c in _NUMERIC]

    def columns_of(self, rule: str) -> list[str]:
        """The ledger's own columns that a rule names, in the order in which it names them."""
        said = self.said[rule]
        return [c for c in said.columns if c in self.columns] if said else []

    def _tiles(self, where: str, order: str, limit: int, shown: list[str], *, unsafe: bool = False) -> list[Tile]:
        (total,) = self.db.sql(f"select count(*) from candidate where {where}").fetchall()[0]
        places = _spread(total, limit)
        values = ", ".join(f"{quote(c)} as shown{i}" for i, c in enumerate(shown))
        rows = self.db.sql(
            f"select key, shard, caption, {self.blur} {', ' + values if values else ''} from candidate where {where} "
            f"qualify list_contains({places}::bigint[], row_number() over (order by {order}) - 1) order by {order}"
        ).fetchall()
        return [
            Tile(
                key=key,
                shard=shard,
                value=_describe(shown, found),
                caption=caption or "",
                blurred=unsafe or over,
            )
            for key, shard, caption, over, *found in rows
        ]

    def histogram(self, column: str) -> tuple[list[int], list[int], float, float]:
        """Counts per bin of all scored images and of the kept ones, and the range (lo, hi) that the bins cut."""
        self._values(column)
        everything, kept = [0] * BINS, [0] * BINS
        lo, hi = self.db.sql("select min(v), max(v) from value").fetchall()[0]
        if lo is None:
            return everything, kept, 0.0, 1.0
        hi = hi if hi > lo else lo + 1.0
        for place, n, k in self.db.sql(
            f"select least(floor((v - {lo}) / {hi - lo} * {BINS})::int, {BINS - 1}), count(*), "
            "count(*) filter (chosen.verdict = 'kept') from value join chosen using (key) group by 1"
        ).fetchall():
            everything[place], kept[place] = n, k
        return everything, kept, lo, hi

    def cuts(self, column: str) -> list[tuple[float, str]]:
        """Where rules compare a column with a number, or take its best part: (value, words)."""
        cuts = []
        for said in self.said.values():
            cuts += [(cut.value, cut.words) for cut in (said.cuts if said else ()) if cut.column == column]
            for c in said.computed if said else ():
                if c.kind == "top" and c.column == column:
                    self._values(column)
                    (at,) = self.db.sql(f"select quantile_disc(v, {1 - c.fraction}) from value").fetchall()[0]
                    if at is not None:
                        cuts.append((at, f"best {c.fraction:.0%}"))
        return cuts


WORDS = ("true", "false")
_NUMERIC = {"width", "height", "original_width", "original_height", "bytes", "http_status"}


def _spread(total: int, limit: int) -> list[int]:
    """At most `limit` places among `total`, evenly spaced, with the first and the last."""
    if total <= limit:
        return list(range(total))
    return [round(i * (total - 1) / (limit - 1)) for i in range(limit)]


def _describe(columns: Sequence[str], values: Sequence[Any]) -> str:
    """The values that a rule looked at, short: `83 x 120`, `open_nsfw 0.71`."""
    pairs = dict(zip(columns, values, strict=True))
    words = []
    for side, other in (("original_width", "original_height"), ("width", "height")):
        if side in pairs and other in pairs:
            words.append(f"{pairs.pop(side)} x {pairs.pop(other)}")
    for value in pairs.values():
        if value is None:
            words.append("no value")
        elif isinstance(value, float):
            words.append(f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}")
        else:
            words.append(f"{value:,}" if isinstance(value, int) else str(value))
    return "  ".join(words)


# ---------------------------------------------------------------------------------------------------------- pictures


def _read_pictures(data: Data, tiles: Iterable[Tile]) -> dict[str, Image.Image | None]:
    """The tiles' images, each tar opened once; None where one cannot be decoded."""
    by_shard: dict[int, list[Tile]] = {}
    for tile in tiles:
        by_shard.setdefault(tile.shard, []).append(tile)
    found: dict[str, Image.Image | None] = {}
    for shard, wanted in sorted(by_shard.items()):
        tar = data.tar(shard)
        index = index_tar(tar)
        with open(tar, "rb") as f:
            for tile in wanted:
                member = image_member(index.get(tile.key, {}))
                if member is None:
                    raise CorruptShard(f"{tar}: there is no image for {tile.key}, which its table calls fetched")
                found[tile.key] = _picture(read_range(f, member[1]), tile.blurred)
    return found


def _picture(data: bytes, blurred: bool) -> Image.Image | None:
    side = 160 * _SCALE
    try:
        return _small(Image.fromarray(decode(data, side)), side, blurred)
    except RowError:  # a folder that others made may hold what cannot be decoded
        return None


def _small(image: Image.Image, side: int, blurred: bool) -> Image.Image:
    """An image no larger than a tile needs; a blurred one keeps 7 x 7 values of itself and no more."""
    image = image.convert("RGB")  # a copy
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    if blurred:
        image = image.resize((7, 7), Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)
    return image


# -------------------------------------------------------------------------------------------------------- the drawing


def _header(page: _Page, root: Path, facts: _Facts, *, bar: bool = True) -> None:
    made = facts.selection
    share = f" ({made.kept / made.rows:.1%})" if made.rows else ""
    page.title(made.name, root.name, f"{made.rows:,} rows, {made.kept:,} kept{share}")
    if bar:
        parts = [("not fetched", made.rows - made.fetched, _GREY)]
        parts += [(rule.name, rule.rejected, _tint(i)) for i, rule in enumerate(made.rules)]
        page.bar([*parts, ("kept", made.kept, _GREEN)])


def _tint(i: int) -> str:
    return _TINTS[i % len(_TINTS)]


class _Page:
    """A page that grows downwards: each method draws one block at the cursor `y` and moves it. Units, not pixels."""

    def __init__(self, height: int) -> None:
        """`height` is an upper bound; what is not used is cut off."""
        self.image = Image.new("RGB", (_WIDTH * _SCALE, height * _SCALE), _PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.y = _MARGIN

    def save(self, path: Path) -> Path:
        buffer = BytesIO()
        self.image.crop((0, 0, self.image.width, (self.y + _MARGIN // 2) * _SCALE)).save(buffer, "PNG")
        with atomic(path) as f:
            f.write(buffer.getvalue())
        return path

    def text(
        self, x: float, y: float, text: str, size: int, ink: str = _INK, *, room: float = 0, anchor: str = "la"
    ) -> float:
        """Draw one line, cut to `room` units where that is not 0; returns its width."""
        font = _font(size)
        text = _printable(text)
        if room:
            text = _cut(text, font, room * _SCALE)
        self.draw.text((x * _SCALE, y * _SCALE), text, fill=ink, font=font, anchor=anchor)
        return font.getlength(text) / _SCALE

    def box(self, x: float, y: float, w: float, h: float, fill: str | None, outline: str | None = None) -> None:
        at = [round(v * _SCALE) for v in (x, y, x + w, y + h)]
        self.draw.rectangle((at[0], at[1], max(at[0], at[2] - 1), max(at[1], at[3] - 1)), fill, outline)

    def title(self, title: str, source: str, counts: str) -> None:
        wide = self.text(_MARGIN, self.y, title, 30)
        self.text(_MARGIN + wide + 14, self.y + 11, f"from {source}", 16, _SOFT)
        self.text(_WIDTH - _MARGIN, self.y + 11, counts, 16, _INK, anchor="ra")
        self.y += 54

    def bar(self, parts: list[tuple[str, int, str]]) -> None:
        """The funnel in one line: each row of the list once, by verdict, in the order of the rules."""
        total = sum(n for _, n, _ in parts) or 1
        room = _WIDTH - 2 * _MARGIN
        x = float(_MARGIN)
        for _, n, ink in parts:
            self.box(x, self.y, room * n / total, 10, ink)
            x += room * n / total
        self.y += 22
        x = _MARGIN
        for name, n, ink in parts:
            label = f"{name} {n:,}"
            wide = _font(13).getlength(_printable(label)) / _SCALE + 16
            if x + wide > _WIDTH - _MARGIN and x > _MARGIN:
                x = _MARGIN
                self.y += 20
            self.box(x, self.y + 4, 9, 9, ink)
            self.text(x + 15, self.y, label, 13)
            x += wide + 20
        self.y += 30

    def heading(self, ink: str, name: str, count: str, detail: str, aside: str = "") -> None:
        self.y += 16
        self.box(_MARGIN, self.y + 4, 12, 12, ink)
        x = _MARGIN + 22.0
        x += self.text(x, self.y, name, 18) + 12
        if count:
            x += self.text(x, self.y + 3, count, 14) + 12
        end = float(_WIDTH - _MARGIN)
        end -= self.text(end, self.y + 4, aside, 12, _SOFT, anchor="ra") + 16 if aside else 0
        self.text(x, self.y + 3, detail, 14, _SOFT, room=end - x)
        self.y += 32

    def scale(self, worst: str, best: str) -> None:
        """An arrow from the worst value to the best: which way the tiles below are to be read."""
        left = _MARGIN + self.text(_MARGIN, self.y, f"worst {worst}", 13, _SOFT) + 12
        right = _WIDTH - _MARGIN - self.text(_WIDTH - _MARGIN, self.y, f"best {best}", 13, _GREEN, anchor="ra") - 12
        middle = self.y + 9
        self.box(left, middle - 0.5, right - left - 4, 1, _GREY)
        tip = [(right, middle), (right - 8, middle - 4), (right - 8, middle + 4)]
        self.draw.polygon([(x * _SCALE, y * _SCALE) for x, y in tip], fill=_GREY)
        self.y += 28

    def tiles(self, tiles: list[Tile], pictures: dict[str, Image.Image | None], *, per_row: int, ratio: float) -> None:
        """A grid of pictures, each whole on a white card, with its value and its caption under it."""
        width = (_WIDTH - 2 * _MARGIN - (per_row - 1) * _GAP) / per_row
        height = round(width * ratio)
        for i, tile in enumerate(tiles):
            if i and i % per_row == 0:
                self.y += height + 48
            x = _MARGIN + (i % per_row) * (width + _GAP)
            self.box(x, self.y, width, height, _CARD, _LINE)
            self._place(pictures[tile.key], x, self.y, width, height)
            if tile.blurred:
                self.box(x + width / 2 - 28, self.y + height / 2 - 10, 56, 19, _CARD)
                self.text(x + width / 2, self.y + height / 2, "blurred", 12, _SOFT, anchor="mm")
            self.text(x, self.y + height + 5, tile.value, 13, room=width)
            self.text(x, self.y + height + 22, tile.caption, 11, _SOFT, room=width)
        if tiles:
            self.y += height + 48

    def _place(self, image: Image.Image | None, x: float, y: float, width: float, height: float) -> None:
        if image is None:
            self.text(x + width / 2, y + height / 2, "cannot be decoded", 11, _SOFT, anchor="mm")
            return
        room_w, room_h = round(width * _SCALE) - 4, round(height * _SCALE) - 4
        fit = min(room_w / image.width, room_h / image.height, 2.0)  # a small image is seen to be small
        size = max(1, round(image.width * fit)), max(1, round(image.height * fit))
        shown = image.resize(size, Image.Resampling.LANCZOS)
        at = round(x * _SCALE) + 2 + (room_w - size[0]) // 2, round(y * _SCALE) + 2 + (room_h - size[1]) // 2
        self.image.paste(shown, at)

    def words(self, words: Iterable[str]) -> None:
        x: float = _MARGIN + 22
        for word in words:
            wide = _font(14).getlength(_printable(word)) / _SCALE
            if x + wide > _WIDTH - _MARGIN:
                x = _MARGIN + 22
                self.y += 22
            self.text(x, self.y, word, 14)
            x += wide + 24
        self.y += 30

    def note(self, text: str) -> None:
        self.text(_MARGIN, self.y + 8, text, 12, _SOFT)
        self.y += 32

    def histogram(
        self, everything: list[int], kept: list[int], lo: float, hi: float, cuts: list[tuple[float, str]]
    ) -> None:
        """Bars for all images with those of the kept ones before them; a line and words where a rule cuts."""
        room, height = _WIDTH - 2 * _MARGIN, 150
        top, wide = max(everything) or 1, room / len(everything)
        base = self.y + height + 16
        for i, (n, k) in enumerate(zip(everything, kept, strict=True)):
            for count, ink in ((n, _GREY), (k, _GREEN)):
                if count:
                    tall = max(1.0, height * count / top)
                    self.box(_MARGIN + i * wide, base - tall, wide - 1, tall, ink)
        self.box(_MARGIN, base, room, 1, _LINE)
        for at, words in cuts:
            if lo <= at <= hi:
                x = _MARGIN + room * (at - lo) / (hi - lo)
                self.box(x - 0.5, self.y, 1, height + 16, _INK)
                near_end = x > _WIDTH - 2 * _MARGIN - 80
                self.text(x - 5 if near_end else x + 5, self.y, words, 12, anchor="ra" if near_end else "la")
        for i in range(5):
            at = lo + (hi - lo) * i / 4
            anchor = {0: "la", 4: "ra"}.get(i, "ma")
            self.text(_MARGIN + room * i / 4, base + 5, f"{at:.2f}", 12, _SOFT, anchor=anchor)
        self.y += height + 46


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font: the same letters on every machine."""
    font = ImageFont.load_default(size * _SCALE)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise UserError("this Pillow was built without FreeType, which the report's letters need: reinstall pillow")
    return font


_SPELT = str.maketrans(
    {"×": "x", "–": "-", "—": "-", "≥": ">=", "≤": "<=", "ß": "ss", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "æ": "ae"}
)


@cache
def _has_letter(letter: str) -> bool:
    font = _font(12)
    missing, ours = font.getmask("\U0010fffd"), font.getmask(letter)
    return ours.size != missing.size or bytes(ours) != bytes(missing)


def _printable(text: str) -> str:
    """The text in letters that the font has: accents are dropped, and so is what has no letter at all."""
    text = unicodedata.normalize("NFKD", text.translate(_SPELT))
    return " ".join("".join(" " if c.isspace() else c if _has_letter(c) else "" for c in text).split())


def _cut(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """As much of the text as fits into `room` pixels, with an ellipsis where something is missing."""
    if font.getlength(text) <= room:
        return text
    few, many = 0, len(text)
    while few < many:
        middle = (few + many + 1) // 2
        if font.getlength(text[:middle].rstrip() + "…") <= room:
            few = middle
        else:
            many = middle - 1
    return text[:few].rstrip() + "…"
