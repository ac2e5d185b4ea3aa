"""The fetch and images stages of one shard: rows of the plan -> `fetched/NNNNN.tar`, `.parquet`, `_stats.json`.

Rows are fetched and decoded in whatever order the web answers; finished images go to a scratch file beside the shard,
so memory does not grow with a slow row, and are copied into the tar in the order of the list when all are there.

A row whose decoding kills the process would be tried again for ever by whoever restarts the process. So a shard notes
its starts, and from the third on each image is decoded in a child process that may die: its row ends as `crashed`.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.files import as_disk_full, atomic, scratch_path
from curate.fetch import engine_img2dataset
from curate.fetch.client import Fetcher
from curate.fetch.config import FetchConfig
from curate.fetch.deny import Deny
from curate.fetch.hashes import verify_hash
from curate.images.isolated import IsolatedDecoder
from curate.images.process import ImagesConfig, ProcessedImage, process
from curate.layout import Data
from curate.ledger.schema import FETCHED_COLUMNS, Reason, RowError, Status, fetched_schema, make_key, stored_name
from curate.shards.tar import TarWriter, image_member, index_tar, read_range
from curate.sources.columns import listed
from curate.sources.plan import Row, SourceShard
from curate.store.disk import check_space
from curate.store.files import read_json
from curate.store.records import commit, invalidate, output_digests

TRUSTED_STARTS = 2
"""How often a shard is begun with decoding in the worker itself; after that each decode may die alone."""

Report = Callable[[str, str, str], None]
"""report(stage, outcome, host) is called for every row as it ends."""

Decode = Callable[[bytes], Awaitable[ProcessedImage]]
"""The picture in the bytes of an image file, or RowError."""


@dataclass(frozen=True)
class IngestContext:
    """What a worker fetches with, the same for all its shards."""

    fetch: FetchConfig
    images: ImagesConfig
    fetcher: Fetcher
    deny: Deny
    threads: Executor  # decoders
    slots: asyncio.Semaphore  # local files read ahead of the decoders; the fetcher bounds what it downloads
    report: Report


@dataclass
class ShardResults:
    """What became of the rows of a shard: their facts, and where the images among them lie in the scratch file."""

    scratch: BinaryIO
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)
    places: dict[int, tuple[str, tuple[int, int]]] = field(default_factory=dict)  # extension, (offset, size)
    length: int = 0  # bytes of the scratch file

    def add(self, number: int, facts: dict[str, Any], image: bytes | None, extension: str = "") -> None:
        """Note what became of a row."""
        if image is not None:
            self.scratch.write(image)
            self.places[number] = extension, (self.length, len(image))
            self.length += len(image)
        self.facts[number] = facts


async def ingest_shard(
    data: Data, shard: int, context: IngestContext, config: str, retry: bool = False
) -> dict[str, Any]:
    """Fetch, decode and commit one shard; returns its record, which carries the hash `config`.

    With `retry`, rows that succeeded or failed for good keep what they have, and only the others are fetched; the
    record says what of that came of it (`retries`).
    Raises DiskFull where the disk has no room, and whatever is our own error; a row's error ends only the row.
    """
    check_space(data.root)
    check_verify(context.fetch, data.plan.extra_columns)
    began = time.time()
    source = data.plan.read(shard)
    starts = note_start(data.starts(shard))
    isolate = starts > TRUSTED_STARTS
    with _scratch(data, shard) as scratch:
        results = ShardResults(scratch)
        before = read_json(data.fetched_record(shard)) if retry else None
        if retry:
            _keep_final(data, shard, results)
        tried = [number for number in range(source.table.num_rows) if number not in results.facts]
        if context.fetch.engine == "img2dataset" and not source.local:
            await asyncio.to_thread(_by_img2dataset, data, shard, source, context, results)
        else:
            await _by_ourselves(source, context, results, isolate)
        facts: dict[str, Any] = {
            "starts": starts,
            "isolated": isolate,
            "denied_by": context.deny.digest if context.deny else None,
        }
        if before is not None:
            came = [n for n in tried if results.facts[n]["status"] == Status.SUCCESS]
            keys = [make_key(shard, number, data.plan.shard_size) for number in came]
            facts["retries"] = _retries(before, len(tried), keys)
        if source.notes:
            facts["notes"] = list(source.notes)
        if context.deny.hashes is not None:
            facts["denied_hashes"] = context.deny.hashes
        return await asyncio.to_thread(_commit, data, shard, source.table, results, config, began, facts)


_REMEMBERED = 10  # retries in a record; embedding needs those since it last ran


def _retries(before: dict[str, Any], tried: int, recovered: list[str]) -> list[dict[str, Any]]:
    """What the record says of a shard's retries, the last one last: the files before it (their sha256), how many rows
    it tried, and the keys of those that have an image now. All other images are the same, byte for byte."""
    this = {"files": output_digests(before), "tried": tried, "recovered": recovered}
    return [*before.get("retries", []), this][-_REMEMBERED:]


def recovered_since(data: Data, shard: int, files: Mapping[str, str]) -> list[str] | None:
    """Keys of the images that retries added to a fetched shard since its files had these sha256.

    None where retries alone do not lead from those files to those of now.
    """
    record = read_json(data.fetched_record(shard)) or {}
    retries = record.get("retries", [])
    for number, retry in enumerate(retries):
        if retry["files"] == dict(files):
            return [key for later in retries[number:] for key in later["recovered"]]
    return None


def check_verify(fetch: FetchConfig, extra_columns: pa.Schema) -> None:
    """UserError where `fetch.verify` names no column of text that is kept of the list."""
    if fetch.verify is None:
        return
    if fetch.verify not in extra_columns.names:
        raise UserError(
            f"fetch.verify: there is no extra column {fetch.verify!r}; there are: {listed(extra_columns.names)}. "
            "source.columns says which columns of the list are kept"
        )
    kind = extra_columns.field(fetch.verify).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"fetch.verify: column {fetch.verify} holds {kind}, not digests as text")


def note_start(path: Path) -> int:
    """Note on disk that a shard is begun, a byte each time; returns how often it has been, this time included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "ab") as f:
            f.write(b".")
            return f.tell()
    except OSError as e:
        raise as_disk_full(e, path.parent) from e


@contextmanager
def _scratch(data: Data, shard: int) -> Iterator[BinaryIO]:
    path = scratch_path(data.tar(shard))
    try:
        with open(path, "w+b") as f:
            yield f
    except OSError as e:
        raise as_disk_full(e, path.parent) from e
    finally:
        path.unlink(missing_ok=True)


def _keep_final(data: Data, shard: int, results: ShardResults) -> None:
    """Take over the rows of a fetched shard that a retry keeps: all but the transient failures."""
    index = index_tar(data.tar(shard))
    with open(data.tar(shard), "rb") as tar:
        for number, row in enumerate(pq.read_table(data.table(shard)).to_pylist()):
            facts = {name: row[name] for name, _ in FETCHED_COLUMNS}
            if facts["status"] == Status.SUCCESS:
                found = image_member(index[facts["key"]])
                assert found is not None, f"{facts['key']} has no image in {data.tar(shard)}"
                results.add(number, facts, read_range(tar, found[1]), found[0])
            elif not Reason(facts["reason"]).transient:
                results.add(number, facts, None)


# ------------------------------------------------------------------------------------------------------------- rows


async def _by_ourselves(source: SourceShard, context: IngestContext, results: ShardResults, isolate: bool) -> None:
    """Fetch and decode the rows that have no result yet, all at once; the fetcher knows how many at a time."""
    isolated = IsolatedDecoder(context.images) if isolate else None
    loop = asyncio.get_running_loop()
    hashes = source.table.column(stored_name(context.fetch.verify)).to_pylist() if context.fetch.verify else None

    def examine(body: bytes, expected: str | None) -> ProcessedImage | None:
        """In a thread: what is denied or not what the list names is not even decoded."""
        if context.deny or expected:
            sha256 = hashlib.sha256(body).digest()
            context.deny.body(body, sha256)
            verify_hash(body, expected, sha256)
        return None if isolated is not None else process(body, context.images)

    async def one(number: int, row: Row) -> None:
        async def decode(body: bytes) -> ProcessedImage:
            expected = hashes[number] if hashes else None
            picture = await loop.run_in_executor(context.threads, examine, body, expected)
            return picture or await isolated.decode(body)  # type: ignore[union-attr]

        facts, picture = await _attempt(row, context, decode)
        if picture is None:
            results.add(number, facts, None)
        else:
            results.add(number, facts, picture.data, picture.extension)
        context.report("fetch", facts["reason"] or Status.SUCCESS, _host(row.url))

    try:
        async with asyncio.TaskGroup() as group:
            for number, row in enumerate(source.rows()):
                if number not in results.facts:
                    group.create_task(one(number, row))
    except ExceptionGroup as e:
        raise e.exceptions[0] from None  # an error of ours, or a full disk; a row's own error never comes here
    finally:
        if isolated is not None:
            isolated.close()


def _by_img2dataset(data: Data, shard: int, source: SourceShard, context: IngestContext, results: ShardResults) -> None:
    """Have img2dataset do it."""
    rows = source.rows()
    for number, row in enumerate(rows):
        if row.failure is not None and number not in results.facts:
            results.add(number, {name: None for name, _ in FETCHED_COLUMNS} | _failed(row.failure), None)
            context.report("fetch", row.failure.reason, "")
    waiting = [(number, row.url) for number, row in enumerate(rows) if number not in results.facts]
    folder = scratch_path(data.tar(shard))
    for number, facts, image, extension in engine_img2dataset.download(waiting, context.fetch, context.images, folder):
        results.add(number, facts, image, extension)
        context.report("fetch", facts["reason"] or Status.SUCCESS, _host(rows[number].url))


async def _attempt(row: Row, context: IngestContext, decode: Decode) -> tuple[dict[str, Any], ProcessedImage | None]:
    """One row's facts and, where all went well, its picture. Never raises for what the row did."""
    facts: dict[str, Any] = {name: None for name, _ in FETCHED_COLUMNS}
    try:
        if row.failure is not None:
            raise row.failure
        if row.place is not None:
            async with context.slots:
                body = await asyncio.to_thread(row.place.read)
                facts["bytes"] = len(body)
                picture = await decode(body)
        else:
            async with context.fetcher.body(row.url or "") as answer:
                facts |= {"final_url": answer.final_url, "http_status": answer.http_status, "bytes": len(answer.data)}
                facts["opt_out"] = answer.opt_out
                picture = await decode(answer.data)
    except RowError as e:
        failed = _failed(e)
        return facts | failed | {name: facts[name] or failed[name] for name in _OF_AN_ANSWER}, None
    good = {
        "status": Status.SUCCESS.value,
        "width": picture.width,
        "height": picture.height,
        "original_width": picture.original_width,
        "original_height": picture.original_height,
        "exif": picture.exif,
        "sha256": picture.sha256,
        "phash": picture.phash,
    }
    return facts | good, picture


_OF_AN_ANSWER = ("final_url", "http_status", "opt_out")


def _failed(e: RowError) -> dict[str, Any]:
    width, height = e.original_size or (None, None)
    return {
        "status": e.reason.status.value,
        "reason": e.reason.value,
        "error_message": e.detail,
        "original_width": width,
        "original_height": height,
        "final_url": e.final_url,
        "http_status": e.http_status,
        "opt_out": e.opt_out,
    }


_HOST = re.compile(r"(?i)https?://(?:[^/?#]*@)?(\[[^\]/?#]*\]|[^/?#:]*)")


def _host(url: str | None) -> str:
    """The host of a URL, for people to see; empty where it has none that can be read."""
    found = _HOST.match(url or "")
    return found[1].lower() if found else ""


# ----------------------------------------------------------------------------------------------------------- commit


def _commit(
    data: Data, shard: int, table: pa.Table, results: ShardResults, config: str, began: float, extra: dict[str, Any]
) -> dict[str, Any]:
    """Write tar, table and record, in the order of the list."""
    ordered = [results.facts[number] for number in range(table.num_rows)]
    for number, facts in enumerate(ordered):
        facts["key"] = make_key(shard, number, data.plan.shard_size)
    for name, kind in FETCHED_COLUMNS:
        table = table.append_column(name, pa.array([facts[name] for facts in ordered], kind))
    table = table.cast(fetched_schema(data.plan.extra_columns))

    with atomic(data.tar(shard)) as f, atomic(data.table(shard)) as g:
        tar = TarWriter(f)
        number = 0
        for batch in table.to_batches(max_chunksize=1000):
            for row in batch.to_pylist():
                if number in results.places:
                    extension, place = results.places[number]
                    tar.add_sample(row["key"], read_range(results.scratch, place), extension, row["caption"], row)
                number += 1
        tar.close()
        pq.write_table(table, g, compression="zstd")
        # as late as can be: a retry that is killed before this line has changed nothing
        invalidate(data.fetched_record(shard))

    data.starts(shard).unlink(missing_ok=True)  # all is decoded; after the record, a kill would leave it for ever
    done = time.time()
    statuses = Counter(facts["status"] for facts in ordered)
    return commit(
        data.root,
        data.fetched_record(shard),
        config=config,
        inputs={"plan": data.plan.shard_digest(shard)},
        outputs=[data.tar(shard), data.table(shard)],
        facts={
            # img2dataset's names
            "count": len(ordered),
            "successes": statuses[Status.SUCCESS],
            "failed_to_download": statuses[Status.FAILED_TO_DOWNLOAD],
            "failed_to_resize": statuses[Status.FAILED_TO_RESIZE],
            "duration": round(done - began, 3),
            "start_time": began,
            "end_time": done,
            "status_dict": dict(Counter(facts["reason"] or Status.SUCCESS.value for facts in ordered)),
            **extra,
        },
    )
