"""The list of what a selection kept, for others to fetch: URLs, captions, scores and digests, no image.

A file is made of the rows of some fetched shards, so that rows that are added or removed change few files. Rows are in
the order of keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as types

from aesthetic.files import atomic
from curate.ledger.rules import KEPT
from curate.ledger.sql import literal, quote
from curate.ledger.view import LedgerTable, fetched_columns, open_ledger
from curate.publish.census import is_licence

if TYPE_CHECKING:
    from curate.layout import Data

SHARDS_A_FILE = 100  # fetched shards whose rows are in one file: a million rows at most, of shards of 10,000

OWN = ("url", "caption", "key", "original_width", "original_height", "sha256", "phash")
"""What each row has of ours, whatever the list and the annotators are."""

_IDS = ("uid", "sample_id", "hash", "md5")  # by which DataComp and LAION name rows


@dataclass(frozen=True)
class ListColumn:
    """A column of the published list."""

    name: str
    type: pa.DataType
    sql: str  # over the ledger
    needed: str  # as `open_ledger` wants it


def list_columns(found: Sequence[LedgerTable]) -> list[ListColumn]:
    """The columns: ours, those of the list that are numbers or tell ids or licences, and all numbers of annotators."""
    data = found[0].data
    fetched = pq.read_schema(data.local(found[0].files[0]))
    columns = [ListColumn(n, fetched.field(n).type, quote(n), n) for n in OWN if n in fetched.names]
    for table in found[1:]:
        schema = pq.read_schema(data.local(table.files[0]))
        for name in table.columns:
            if _is_number(kind := schema.field(name).type):
                columns.append(ListColumn(name, kind, quote(name), name))
    taken = {c.name.lower() for c in columns}  # SQL ignores case
    for field, place in fetched_columns(fetched)[1].items():
        if _is_number(fetched.types[place]) or is_licence(field) or field.lower() in _IDS:
            name = field if field.lower() not in taken else f"source.{field}"
            columns.append(ListColumn(name, fetched.types[place], f"source.{quote(field)}", f"source.{field}"))
    return columns


def _is_number(kind: pa.DataType) -> bool:
    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def list_files(
    data: Data, name: str, found: Sequence[LedgerTable], columns: Sequence[ListColumn], folder: Path
) -> Iterator[tuple[Path, int]]:
    """Write the files one by one into a folder: each, and its rows. Whoever takes one may remove it before the next.

    A file without rows is not written: the numbers of files may have gaps.
    """
    groups: dict[int, list[int]] = {}
    for shard in found[0].shards:
        groups.setdefault(shard // SHARDS_A_FILE, []).append(shard)
    schema = pa.schema([(c.name, c.type) for c in columns])
    for group, shards in groups.items():
        part = [table.of(shards) for table in found]
        part = [table for table in part if table.files]
        there = {c for table in part[1:] for c in table.columns}
        missing = {c for table in found[1:] for c in table.columns} - there
        items = [f"{'NULL' if c.needed in missing else c.sql} AS {quote(c.name)}" for c in columns]
        con = open_ledger(data, {c.needed for c in columns} - missing, found=part)
        rows: pa.Table = con.sql(
            f"SELECT {', '.join(items)} FROM ledger l SEMI JOIN verdicts v ON v.key = l.key "
            f"AND v.selection = {literal(name)} AND v.verdict = {literal(KEPT)} ORDER BY l.key"
        ).to_arrow_table()
        con.close()
        if not len(rows):
            continue
        path = folder / f"{group:05d}.parquet"
        with atomic(path) as f:
            pq.write_table(rows.cast(schema), f, compression="zstd")
        yield path, len(rows)
