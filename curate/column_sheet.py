"""A sheet of what an annotator says: each column's histogram, and images where it is lowest and highest.

So that whoever adds a column sees what it means before a rule is made of it. Images come from a few shards, as those of
a selection's sheet; what a column calls unsafe is blurred, what must not be seen is left out.
"""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from curate.layout import Data
from curate.ledger.rules import NUMBER
from curate.ledger.schema import Status
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
from curate.report import BINS, BLURRED_FROM, SHARDS, Example, load_tiles, spread, value_words
from curate.sheets import GREEN, Page

ENDS = 20  # images at each end of a column of numbers
TEXTS = 12  # of a column of texts
VALUES, OF_EACH = 8, 10  # of a column with few values: how many are shown, and images of each


def column_sheet(data: Data, name: str) -> Path | None:
    """Draw `report/NAME.png` of the columns of an entry; None where it has no value yet.

    Of numbers: a histogram, the lowest and the highest images. Of a column with few values: images of each. Of texts:
    some images with theirs. The same data folder gives the same bytes.
    """
    if not data.shards(lambda shard: data.annotations_record(name, shard)):
        return None
    sheet = _Sheet(data, name)
    columns = [c for c in sheet.columns if sheet.count(c)]
    if not columns:
        return None
    page = Page(160 + sum(420 + 190 * (2 * ENDS // 8 + VALUES) for _ in columns))
    page.title(name, f"{data.name}/annotated", f"{sheet.images:,} images")
    for column in columns:
        facts = sheet.facts.get(column, {})
        about = " ".join(filter(None, [facts.get("meaning", ""), f"[{facts['unit']}]" if facts.get("unit") else ""]))
        page.heading(GREEN, column, f"{sheet.count(column):,} values", about)
        kind = sheet.types[column]
        if kind in ("FLOAT", "DOUBLE") or (NUMBER.fullmatch(kind) and sheet.distinct(column) > VALUES):
            page.histogram(*sheet.histogram(column), [])
            for words, examples in (("lowest", sheet.ends(column)), ("highest", sheet.ends(column, "desc"))):
                page.words([f"{words}, {examples[0].value} to {examples[-1].value}" if examples else words])
                page.tiles(sheet.tiles(examples), per_row=10)
        elif sheet.distinct(column) <= VALUES * 4:
            values = sheet.values(column)
            for value, count in values:
                page.words([f"{value or 'empty'}: {count:,}"])
                found = sheet.examples(f"{quote(column)}::varchar = {literal(value)}", "key", OF_EACH, column)
                page.tiles(sheet.tiles(found), per_row=10)
            shown = ", ".join(literal(value) for value, _ in values) or "''"
            if others := sheet.examples(f"{quote(column)}::varchar not in ({shown})", "key", ENDS, column):
                page.words(["others"] if values else [])
                page.tiles(sheet.tiles(others), per_row=10)
        else:
            found = sheet.examples(f"{quote(column)} is not null", "key", TEXTS, column)
            for tile, example in zip(sheet.tiles(found), found, strict=True):
                page.passage(tile, example.value, example.caption)
    if len(sheet.picked) < len(sheet.table.shards):
        page.note(f"images from {len(sheet.picked)} of {len(sheet.table.shards):,} shards, spread evenly")
    return page.save(data.column_sheet(name))


class _Sheet:
    """What the data folder says about an entry's columns; `db` has the table `candidate`: images that may be shown."""

    def __init__(self, data: Data, name: str) -> None:
        self.data = data
        found = tables(data)
        folder = data.annotations(name, 0).parent.relative_to(data.root)
        self.table = next(t for t in found if t.name == str(folder))
        self.columns = self.table.columns
        self.types, self.facts = column_types(found)[0], recorded_columns(found)
        hidden = hidden_columns(found)
        asked = [set(t.shards) for t in found if t.name in hidden.values()]
        shards = [s for s in self.table.shards if all(s in a for a in asked)]
        self.picked = [shards[i] for i in spread(len(shards), SHARDS)]
        self.images = sum(int(facts.get("count", 0)) for facts in self.table.facts)
        unsafe = {c: bool(facts.get("early")) for c, facts in self.facts.items() if facts.get("unsafe")}
        blurred = [f"coalesce({quote(c)} >= {BLURRED_FROM}, {str(unasked).lower()})" for c, unasked in unsafe.items()]
        self.blurred = " or ".join(blurred) or "false"  # also what early rules left out before it was asked
        self.db = self._candidates(found, hidden_condition(hidden), {*self.columns, *unsafe, *hidden})

    def _candidates(self, found: list[LedgerTable], hidden: str, needed: set[str]) -> duckdb.DuckDBPyConnection:
        here = [part for t in found if (part := t.of(self.picked)).shards] or [found[0].of(())]
        there = {c for t in here for c in t.columns}
        db = open_ledger(self.data, {*needed, "caption"}, found=here)
        keys = [pq.read_table(here[0].data.local(file), columns=["key"])["key"] for file in here[0].files]
        places = [pa.array([shard] * len(k), pa.int64()) for shard, k in zip(self.picked, keys, strict=True)]
        db.register("place", pa.table({"key": pa.chunked_array(keys), "shard": pa.chunked_array(places)}))
        absent = "".join(f", null::{self.types[c]} as {quote(c)}" for c in sorted(needed - there))
        db.execute(
            f'create temp table candidate as select * from (select l.*, p.shard as "#shard"{absent} from ledger l '
            f"join place p on p.key = l.key where l.status = '{Status.SUCCESS}') where not ({hidden})"
        )
        return db

    def count(self, column: str) -> int:
        return int(self.db.sql(f"select count({quote(column)}) from candidate").fetchall()[0][0])

    def distinct(self, column: str) -> int:
        return int(self.db.sql(f"select count(distinct {quote(column)}) from candidate").fetchall()[0][0])

    def values(self, column: str) -> list[tuple[str, int]]:
        """The commonest values of more than one image, and how many have each."""
        c = quote(column)
        return self.db.sql(
            f"select {c}::varchar, count(*) from candidate where {c} is not null "
            f"group by 1 having count(*) > 1 order by 2 desc, 1 limit {VALUES}"
        ).fetchall()

    def ends(self, column: str, order: str = "asc") -> list[Example]:
        """The images at one end, the outermost first."""
        return self._rows(f"{quote(column)} is not null order by {quote(column)} {order}, key limit {ENDS}", column)

    def examples(self, where: str, order: str, limit: int, column: str) -> list[Example]:
        """At most `limit` images, spread evenly in an order."""
        total = int(self.db.sql(f"select count(*) from candidate where {where}").fetchall()[0][0])
        places = f"list_contains({spread(total, limit)}::bigint[], row_number() over (order by {order}) - 1)"
        return self._rows(f"{where} qualify {places} order by {order}", column)

    def _rows(self, rest: str, column: str) -> list[Example]:
        rows = self.db.sql(
            f'select key, "#shard", caption, {self.blurred}, {quote(column)} from candidate where {rest}'
        ).fetchall()
        return [Example(k, s, value_words({column: v}), text or "", bool(b)) for k, s, text, b, v in rows]

    def tiles(self, examples: list[Example]) -> list:
        found = load_tiles(self.data, examples)
        return [found[e.key] for e in examples]

    def histogram(self, column: str) -> tuple[list[int], list[int], float, float]:
        """Counts per bin between the 0.5% and the 99.5% quantile (what lies beyond is in the outer bins), none kept."""
        c = f"{quote(column)}::double"
        lo, hi = self.db.sql(f"select quantile_cont({c}, 0.005), quantile_cont({c}, 0.995) from candidate").fetchall()[
            0
        ]
        hi = hi if hi > lo else lo + 1.0
        counts = [0] * BINS
        for place, n in self.db.sql(
            f"select greatest(0, least(floor(({c} - {lo}) / {hi - lo} * {BINS}), {BINS - 1}))::int, count(*) "
            f"from candidate where {quote(column)} is not null group by 1"
        ).fetchall():
            counts[place] = n
        return counts, [0] * BINS, lo, hi
