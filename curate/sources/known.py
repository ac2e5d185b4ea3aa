"""Which rows of another list a plan has already: by uid where both have one, else by URL or by the place of the image.

A row's place is its file and where in it the image begins; it counts for folders of images, whose names are no URLs. In
memory a row is a few hashes of 8 bytes, 16 to 24 bytes in all: of 10 million known rows and 10 million others, one is
taken for another with a probability of 5 in a million.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from curate.fetch.deny import Deny
from curate.ledger.schema import list_name, stored_name
from curate.ledger.sql import connect
from curate.sources.columns import column_as
from curate.sources.find import stat
from curate.sources.inputs import Input
from curate.sources.parquet import parquet_batches
from curate.sources.plan import ANEW, Plan

_ROW = pa.schema([("url", pa.string()), ("caption", pa.string()), ("uid", pa.string()), ("path", pa.string())])

NAME = "if(path IS NULL OR contains(url, '://'), url, path)"
"""SQL of what names a row of `name_rows`."""

_HASHES = f"""
    SELECT name IS NULL AS nameless, hash(name) AS name, hash(name, caption) AS captioned,
           uid IS NULL AS no_uid, hash(uid) AS uid, hash(uid, caption) AS uid_captioned
    FROM (SELECT {NAME} AS name, caption, uid FROM known_rows)
"""


class KnownRows:
    """The rows that a plan has, but for those of one of its lists: hashes, sorted."""

    def __init__(self, plan: Plan, but: int | None, schema: pa.Schema, base: Path | str | None, deny: Deny) -> None:
        """but: the list that is not looked at, as it grows.  schema: the other list's columns.  base: what its images'
        places are relative to; None: it has URLs.  deny: what is left out as well.

        Raises UserError where rows of the plan can't be read any more.
        """
        self._plan, self._deny, self._base = plan, deny, base
        self._connection = connect(threads=1)
        self.counts = Counter[str]()
        """Of the rows that `are_new` was asked about: known, changed_caption (a part of them), denied, without_url."""
        ours, theirs = _uid(plan.extra_columns), _uid(schema)
        self.uid = theirs if ours is not None else None
        """What the other list calls its column of uids; None where none is compared."""
        found: dict[str, list[np.ndarray]] = {n: [np.empty(0, np.uint64)] for n in ("uids", "named", "others", "seen")}
        for table in self._planned(but, ours if self.uid is not None else None):
            h = self._hashes(table)
            found["uids"].append(h["uid"][~h["no_uid"]])
            found["named"].append(h["name"][h["no_uid"] & ~h["nameless"]])
            found["others"].append(h["name"][~h["no_uid"] & ~h["nameless"]])
            found["seen"] += [h["captioned"][~h["nameless"]], h["uid_captioned"][~h["no_uid"]]]
        self._uids, self._without_uid, self._with_uid, self._captioned = (
            _sorted(found.pop(name)) for name in ("uids", "named", "others", "seen")
        )

    def are_new(self, batch: pa.RecordBatch, source: Input) -> np.ndarray:
        """Which rows of another list are new, and count the others. Boolean, (rows,)."""
        h = self._hashes(name_rows(batch, source.url, source.caption, self.uid, self._base))
        has_uid = ~h["no_uid"]
        known = _within(h["name"], self._without_uid) | (~has_uid & _within(h["name"], self._with_uid))
        known = (known & ~h["nameless"]) | (has_uid & _within(h["uid"], self._uids))
        if source.caption is not None:
            same = _within(h["captioned"], self._captioned) | (has_uid & _within(h["uid_captioned"], self._captioned))
            self.counts["changed_caption"] += int((known & ~same).sum())
        nameless = h["nameless"] & ~known
        self.counts["known"] += int(known.sum())
        self.counts["without_url"] += int(nameless.sum())
        new = ~known & ~nameless
        if self._deny and source.url is not None:
            urls = column_as(batch, source.url, pa.string())
            for i in np.flatnonzero(new).tolist():
                if self._deny.denies(urls[i].as_py() or ""):
                    new[i] = False
                    self.counts["denied"] += 1
        return new

    def close(self) -> None:
        """Give the small database back."""
        self._connection.close()

    def _hashes(self, table: pa.Table) -> dict[str, np.ndarray]:
        self._connection.register("known_rows", table)
        try:
            found = self._connection.sql(_HASHES).to_arrow_table()
        finally:
            self._connection.unregister("known_rows")
        return {name: found.column(name).to_numpy() for name in found.column_names}

    def _planned(self, but: int | None, uid: str | None) -> Iterator[pa.Table]:
        """The rows of the plan's lists, some at a time."""
        facts = self._plan.facts
        shards: dict[str, list[int]] = {}
        for s in self._plan.shards:
            shards.setdefault(s.file, []).append(s.shard)
        for file, of in shards.items():
            if self._plan.list_index(of[0]) == but:
                continue
            fact, base = facts["inputs"][facts["made_of"][file]], self._plan.list_of(of[0])["base"]
            path = self._plan.data.root / file
            if file in facts["cut"]:
                reader = pq.ParquetFile(self._plan.data.local(path))
                names = [n for n in ("url", "caption", uid and stored_name(uid), "@path", "@offset") if n]
                wanted = [n for n in names if n in reader.schema_arrow.names]
                for batch in reader.iter_batches(columns=wanted):
                    yield name_rows(batch, "url", "caption", uid and stored_name(uid), base)
            elif self._is_there(path, fact):
                for batch in parquet_batches(path, [n for n in (fact["url"], fact["caption"], uid) if n]):
                    yield name_rows(batch, fact["url"], fact["caption"], uid, base)
            else:
                yield from self._fetched(of, fact["path"], uid)

    def _is_there(self, path: Path, fact: Mapping[str, Any]) -> bool:
        """Whether a list that is read where it lies is what it was when the plan was made."""
        if path.is_relative_to(self._plan.data.root):
            return True  # a copy of ours
        try:
            now = stat("list", path)
        except UserError:
            return False
        return all(now[k] == fact[k] for k in now)

    def _fetched(self, shards: list[int], path: str, uid: str | None) -> Iterator[pa.Table]:
        """The same of shards that are fetched: their list has changed, or is gone."""
        data = self._plan.data
        for shard in shards:
            if not data.exists(data.fetched_record(shard)):
                raise UserError(
                    f"{path}: has changed since the plan was made, or is gone, and shard {shard} of it is not fetched "
                    f"yet. Put the old one back until it is, or under another name. {ANEW}"
                )
            names = ["url", "caption", *([stored_name(uid)] if uid else [])]
            there = pq.ParquetFile(data.local(data.table(shard)))
            for batch in there.iter_batches(columns=[n for n in names if n in there.schema_arrow.names]):
                yield name_rows(batch, "url", "caption", uid and stored_name(uid), None)


def _uid(schema: pa.Schema) -> str | None:
    """The column of uids of a list (as DataComp has it), where it holds text: numbers of rows are no names."""
    return next((f.name for f in schema if list_name(f.name).lower() == "uid" and pa.types.is_string(f.type)), None)


def name_rows(
    batch: pa.RecordBatch, url: str | None, caption: str | None, uid: str | None, base: Path | str | None
) -> pa.Table:
    """What names the rows of a batch: url, caption, uid, and as `path` the place of the image, null for URLs."""
    names = {"url": url, "caption": caption, "uid": uid, "path": None}
    columns = {name: column_as(batch, own, pa.string()) for name, own in names.items()}
    if base is not None:
        paths, offsets = column_as(batch, "@path", pa.string()), column_as(batch, "@offset", pa.int64())
        places = [
            f"{base}/{url if path is None else path}" + ("" if offset is None else f"\n{offset}")
            for url, path, offset in zip(*(c.to_pylist() for c in (columns["url"], paths, offsets)), strict=True)
        ]
        columns["path"] = pa.array(places, pa.string())
    return pa.table(columns, schema=_ROW)


def _sorted(hashes: list[np.ndarray]) -> np.ndarray:
    values = np.concatenate(hashes)
    hashes.clear()
    values.sort()
    return values


def _within(values: np.ndarray, sorted_values: np.ndarray) -> np.ndarray:
    """Which of the values are among the sorted ones."""
    if not len(sorted_values):
        return np.zeros(len(values), bool)
    at = np.minimum(np.searchsorted(sorted_values, values), len(sorted_values) - 1)
    return sorted_values[at] == values
