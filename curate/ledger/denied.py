"""What a data folder holds although a deny-list names it: a list that is given later takes nothing away by itself."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa
import yaml

from aesthetic.errors import UserError
from curate.fetch.deny import PLAIN_SQL, Deny
from curate.layout import shard_name
from curate.ledger.schema import Status
from curate.ledger.sql import connect
from curate.ledger.view import tables
from curate.verify import command_again

if TYPE_CHECKING:
    from curate.layout import Data

_COMPARED = ("key", "url", "final_url", "sha256")


@dataclass
class DeniedImages:
    """What is there and should not be. Keys, not URLs: what is denied is not repeated in messages and logs."""

    keys: list[str] = field(default_factory=list)  # the first three
    images: int = 0  # of fetched/
    shards: list[str] = field(default_factory=list)  # that these are in
    packs: dict[str, int] = field(default_factory=dict)  # name -> images of shards/NAME
    unknown: list[str] = field(default_factory=list)  # fetched shards whose originals are gone, so that nobody can tell
    unknown_packs: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.images or self.packs or self.unknown or self.unknown_packs)


def denied_images(data: Data, deny: Deny, *, fetched: bool = True) -> DeniedImages:
    """The images of a data folder that are denied: of fetched shards that were made under another deny-list, and packs.

    URLs (the list's, and the one after redirects), their domains and the sha256 of the original bytes are compared.
    Of md5, sha1 and sha512 nobody can tell, because originals are not kept: shards that were fetched without these are
    `unknown`. Without `fetched` only packs are looked at. Time: some microseconds a row.
    """
    found = DeniedImages()
    if not deny:
        return found
    try:
        table = tables(data)[0]
    except UserError:  # nothing is fetched
        table = None
    hashes = set()  # of what the images were compared with when they were fetched
    with connect(data.root, memory_limit="2GB") as con:
        search = DenySearch(con, deny)
        for shard, path, facts in zip(table.shards, table.files, table.facts, strict=True) if table else ():
            if not facts.get("successes", 1):
                continue
            hashes.add(facts.get("denied_hashes"))
            if not fetched or facts.get("denied_by") == deny.digest:
                continue
            if keys := [key for batch in search.denied([data.local(path)]) for key in batch]:
                found.images += len(keys)
                found.keys = [*found.keys, *keys][:3]
                found.shards.append(shard_name(shard))
            if deny.hashes is not None and facts.get("denied_hashes") != deny.hashes:
                found.unknown.append(shard_name(shard))

        now = table.digest() if table else None
        for name in data.packs():
            manifest = data.record(data.manifest(name))
            fresh = fetched and manifest.get("inputs", {}).get("fetched") == now
            if fresh and not found:  # it is a part of what was looked at
                continue
            files = [path for path in data.store.walk(data.packed(name)) if path.suffix == ".parquet"]
            data.bring(*files)
            if count := sum(len(keys) for keys in search.denied(files)):
                found.packs[name] = count
            elif deny.hashes is not None and (hashes if fresh else {manifest.get("denied_hashes")}) != {deny.hashes}:
                found.unknown_packs.append(name)
    return found


def removal(data: Data, found: DeniedImages, files: Sequence[str], more: Sequence[str] = ()) -> list[str]:
    """The commands that take denied images out. What only original bytes could tell is fetched and packed anew.

    files: all that `fetch.deny` is to name then.    more: those of them that the folder's recipe does not name yet.
    """
    steps = []
    if found.images or found.packs:
        steps.append(shlex.join(["tastemaker", "remove", str(data), "--denied", *(["--deny", *more] if more else [])]))
    if found.unknown or found.unknown_packs:
        listed = yaml.safe_dump([*files], default_flow_style=True, width=1 << 20, allow_unicode=True).strip()
        steps.append(f"{command_again(data)} --set {shlex.quote(f'fetch.deny={listed}')} --restart-from fetch")
    return steps


class DenySearch:
    """Finds rows that are denied, a batch at a time in DuckDB; only odd URLs and hosts not seen before in Python."""

    def __init__(self, con: duckdb.DuckDBPyConnection, deny: Deny) -> None:
        self._con, self._deny = con, deny
        self._hosts: dict[str, bool] = {}
        con.register("_digests", pa.table({"v": pa.array(deny.sha256s(), pa.binary())}))
        con.execute("CREATE TABLE digests AS SELECT DISTINCT v FROM _digests")

    def denied(self, files: Sequence[Path], *, every: bool = False) -> Iterator[list[str]]:
        """The keys of images that are denied, in order, batch by batch; every: of rows without an image, too."""
        import pyarrow.dataset as ds  # slow: it brings pandas

        if not files:
            return
        con = self._con
        data = ds.dataset([str(f) for f in files], format="parquet")
        names = [n for n in _COMPARED if n in data.schema.names]
        status = ds.field("status")
        wanted = status != Status.REMOVED.value if every else status == Status.SUCCESS.value
        wanted = wanted if "status" in data.schema.names else None
        for batch in data.to_batches(columns=names, filter=wanted, batch_size=1 << 17):
            table = pa.Table.from_batches([batch])
            for name in _COMPARED:
                if name not in names:
                    table = table.append_column(name, pa.nulls(len(table), pa.string()))
            con.register("_batch", table)
            con.execute(
                "CREATE OR REPLACE TEMP TABLE batch AS SELECT row_number() OVER () AS n, key, "
                "CAST(sha256 AS VARCHAR) AS s, "
                "[CAST(url AS VARCHAR), nullif(CAST(final_url AS VARCHAR), CAST(url AS VARCHAR))] AS us FROM _batch"
            )
            con.execute(
                f"CREATE OR REPLACE TEMP TABLE named AS SELECT n, u, {PLAIN_SQL} AS plain, "
                "split_part(u, '/', 3) AS host "
                "FROM (SELECT n, split_part(trim(unnest(us), ' '), '#', 1) AS u FROM batch) WHERE u IS NOT NULL"
            )
            hosts = [h for (h,) in con.execute("SELECT DISTINCT host FROM named WHERE plain").fetchall()]
            for host in hosts:
                if host not in self._hosts:
                    self._hosts[host] = self._deny.denies(f"http://{host}/") or self._deny.denies(f"https://{host}/x")
            con.register("_hosts", pa.table({"h": pa.array([h for h in hosts if self._hosts[h]], pa.string())}))
            odd = con.execute("SELECT n, u FROM named WHERE NOT plain").fetchall()
            con.register("_odd", pa.table({"n": pa.array([n for n, u in odd if self._deny.denies(u)], pa.int64())}))
            rows = con.execute(
                "SELECT key FROM batch WHERE n IN (FROM _odd) "
                "OR n IN (SELECT n FROM named WHERE plain AND "
                "(host IN (FROM _hosts) OR unhex(sha256(u)) IN (FROM digests))) "
                "OR CASE WHEN regexp_full_match(s, '[0-9a-fA-F]{64}') THEN unhex(s) END IN (FROM digests) ORDER BY n"
            ).fetchall()
            yield [str(key) for (key,) in rows]
