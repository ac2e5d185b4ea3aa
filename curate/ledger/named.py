"""Which rows of a data folder are meant, by key, URL, domain or bytes: for `tastemaker remove`.

Whatever names an image by its URL or its bytes names all of the same URL or bytes, as a deny-list does.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from aesthetic.errors import UserError
from curate.fetch.deny import Deny, digests_of, entry_digest
from curate.ledger.denied import DenySearch
from curate.ledger.schema import RowError, Status, make_key, shard_of_key
from curate.ledger.sql import connect
from curate.ledger.view import LedgerTable, tables
from curate.store.files import read_table

if TYPE_CHECKING:
    from curate.layout import Data

_READ = ["key", "status", "reason", "url", "final_url", "redirects", "sha256"]


@dataclass(kw_only=True)
class NamedRows:
    """The rows that are meant."""

    shards: dict[int, set[str]] = field(default_factory=dict)  # their keys
    images: int = 0  # of those that have one
    without: Counter[str] = field(default_factory=Counter)  # reason -> rows of the others that failed
    early: Counter[str] = field(default_factory=Counter)  # early rule -> rows that it left out
    entries: dict[str, str] = field(default_factory=dict)  # what denies them, sha256 in hex -> key, "" where given
    names: set[str] = field(default_factory=set)  # all that a list may deny one of them by, as `entries`

    @property
    def rows(self) -> int:
        """How many there are, with an image or without."""
        return sum(map(len, self.shards.values()))


def entry_of(text: str, what: str) -> bytes:
    """The sha256 that stands for a URL, a domain or a sha256 that somebody gives. UserError where it is none."""
    shape = {"urls": r"(?i)https?://\S+", "domains": r"[^\s/:]+", "sha256": r"[0-9A-Fa-f]{64}"}[what]
    try:
        if re.fullmatch(shape, text):
            return entry_digest(text.encode())
    except (ValueError, IndexError, RowError):  # IndexError: yarl
        pass
    expected = {"urls": "an http or https URL", "domains": "a domain such as example.com", "sha256": "64 hex digits"}
    raise UserError(f"--{what} {text[:200]!r}: {expected[what]} is expected")


def find_named(
    data: Data, keys: Collection[str] = (), entries: Iterable[bytes] = (), denied: Deny | None = None
) -> NamedRows:
    """The rows of these keys, those that these sha256 or a deny-list name, and all of the same URLs or bytes.

    UserError for a key that no row has. Time: some microseconds a row for each of the two or three searches.
    """
    found = NamedRows(entries={e.hex(): "" for e in entries})
    try:
        table = tables(data)[0]
    except UserError:  # nothing is fetched
        table = None
    fresh = _by_shard(data, keys)
    with connect(data.root, memory_limit="2GB") as con:
        if denied:
            _add(fresh, _search(DenySearch(con, denied), table))
            _add(fresh, _search_plan(data, table, denied))
    todo = set(found.entries)
    while fresh or todo:
        for shard, wanted in fresh.items():
            todo |= _take_in(data, shard, wanted, found)
        fresh = {}
        if todo:
            deny = Deny(bytes.fromhex(entry) for entry in todo)
            with connect(data.root, memory_limit="2GB") as con:
                _add(fresh, _search(DenySearch(con, deny), table))
            _add(fresh, _search_plan(data, table, deny))
            fresh = {s: left for s, k in fresh.items() if (left := k - found.shards.get(s, set()))}
            todo = set()
    return found


def _by_shard(data: Data, keys: Collection[str]) -> dict[int, set[str]]:
    plan, shards = data.plan, dict[int, set[str]]()
    for key in keys:
        shard = shard_of_key(key, plan.shard_size)
        row = -1 if shard is None else int(key) - int(make_key(shard, 0, plan.shard_size))
        if shard is None or shard >= len(plan.shards) or row >= plan.shards[shard].rows:
            example = make_key(0, 0, plan.shard_size)
            raise UserError(f"{data} has no row {key[:100]}: a key such as {example} is expected")
        shards.setdefault(shard, set()).add(key)
    return shards


def _add(to: dict[int, set[str]], more: Mapping[int, set[str]]) -> None:
    for shard, keys in more.items():
        to.setdefault(shard, set()).update(keys)


def _search(search: DenySearch, table: LedgerTable | None) -> dict[int, set[str]]:
    found = dict[int, set[str]]()
    for shard, path in zip(table.shards, table.files, strict=True) if table else ():
        assert table is not None
        if keys := {key for batch in search.denied([table.data.local(path)], every=True) for key in batch}:
            found[shard] = keys
    return found


def _search_plan(data: Data, table: LedgerTable | None, deny: Deny) -> dict[int, set[str]]:
    """Rows that the plan holds, in files of its own, and that are not fetched yet."""
    plan, found = data.plan, dict[int, set[str]]()
    for s in plan.shards:
        if s.shard in (table.shards if table else ()) or not in_plan(data, s.file):
            continue
        urls = plan.read(s.shard).table["url"].to_pylist()
        keys = {make_key(s.shard, i, plan.shard_size) for i, url in enumerate(urls) if url and deny.denies(url)}
        if keys:
            found[s.shard] = keys
    return found


def in_plan(data: Data, file: str) -> bool:
    """Whether a file that shards of the plan are made of is the plan's own, not the user's."""
    return (data.root / file).is_relative_to(data.plan_folder)


def _take_in(data: Data, shard: int, keys: set[str], found: NamedRows) -> set[str]:
    """Add rows of a shard to what was found; the entries that this adds."""
    known, more = found.shards.setdefault(shard, set()), set[str]()
    keys = keys - known
    path = data.table(shard)
    if data.exists(data.fetched_record(shard)) and data.exists(path):
        rows = read_table(data.local(path))
        rows = rows.select([name for name in _READ if name in rows.column_names])
        rows = rows.filter(pc.is_in(rows["key"], pa.array([*keys], pa.string())))
        for row in rows.to_pylist():
            if row["status"] == Status.REMOVED.value:
                keys.discard(row["key"])
                continue
            _count(row, found)
            chain = json.loads(row.get("redirects") or "[]")
            more |= _note(row["key"], [row.get("url"), row.get("final_url"), *chain], row.get("sha256"), found)
    else:
        plan = data.plan
        for i, row in enumerate(plan.read(shard).table.select(["url"]).to_pylist()):
            if (key := make_key(shard, i, plan.shard_size)) in keys:
                more |= _note(key, [row["url"], None], None, found)
    known |= keys
    if not known:
        del found.shards[shard]
    return more


def _count(row: Mapping[str, str | None], found: NamedRows) -> None:
    if row["status"] == Status.SUCCESS.value:
        found.images += 1
    elif row["status"] == Status.REJECTED_EARLY.value:
        found.early[str(row.get("reason"))] += 1
    else:
        found.without[str(row.get("reason") or row["status"] or "unknown")] += 1


def _note(key: str, urls: list[str | None], sha256: str | None, found: NamedRows) -> set[str]:
    """Note what a row may be named by; the entries that deny it, as far as they are new: its URL and its bytes."""
    more = set[str]()
    named = [[d.hex() for d in digests_of(url)] if url else [] for url in urls]
    found.names.update(*named)
    entries = named[0][:1]
    if sha256 and re.fullmatch("[0-9a-f]{64}", sha256):
        entries.append(sha256)
        found.names.add(sha256)
    for entry in entries:
        if not found.entries.get(entry):
            more |= {entry} - found.entries.keys()
            found.entries[entry] = key
    return more
