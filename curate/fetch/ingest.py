"""The fetch and images stages of one shard: rows of the plan -> `fetched/NNNNN.tar`, `.parquet`, `_stats.json`.

Rows are fetched and decoded in whatever order the web answers; finished images go to a scratch file beside the shard,
so memory does not grow with a slow row, and are copied into the tar in the order of the list when all are there.

A row whose decoding kills the process would be tried again for ever by whoever restarts the process. So a shard notes
its starts, and from the third on each image is decoded in a child process that may die: its row ends as `crashed`.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.files import as_disk_full, atomic, scratch_path
from curate.estimate.spent import Spent, counting, total_spent
from curate.fetch import engine_img2dataset
from curate.fetch.client import Fetcher, opt_outs_text
from curate.fetch.config import FetchConfig
from curate.fetch.deny import Deny, verify_hash
from curate.fetch.early import EarlyRules, ShardRules
from curate.images.config import ImagesConfig
from curate.images.faces import detector
from curate.images.isolated import IsolatedDecoder
from curate.images.process import ProcessedImage, process
from curate.images.rights import read_rights
from curate.layout import Data
from curate.ledger.schema import (
    FETCHED_COLUMNS,
    Reason,
    RejectedEarly,
    RowError,
    Status,
    failure_facts,
    fetched_schema,
    forget_removed,
    make_key,
    stored_name,
)
from curate.shards.tar import TarWriter, image_member, index_tar, read_range
from curate.sources.columns import listed
from curate.sources.plan import Row, SourceShard
from curate.store.files import check_space
from curate.store.records import output_digests

TRUSTED_STARTS = 2
"""How often a shard is begun with decoding in the worker itself; after that each decode may die alone."""

_BEGINNING = 65_536  # bytes of a local file that are looked at before all of it is read

_FAILED = (Status.FAILED_TO_DOWNLOAD.value, Status.FAILED_TO_RESIZE.value)

_RETRIES_KEPT = 10  # in a record; embedding needs those since it last ran

Report = Callable[[str, str, str], None]
"""report(stage, outcome, host) is called for every row as it ends."""


@dataclass(frozen=True)
class IngestContext:
    """What a worker fetches with, the same for all its shards."""

    fetch: FetchConfig
    images: ImagesConfig
    fetcher: Fetcher
    deny: Deny
    threads: Executor  # decoders
    local_reads: asyncio.Semaphore  # local files read ahead of the decoders; the fetcher bounds what it downloads
    report: Report
    early: EarlyRules
    cpu: Spent = field(default_factory=Spent)  # of the process


@dataclass
class ShardResults:
    """What became of the rows of a shard: their facts, and where the images among them lie in the scratch file."""

    scratch: BinaryIO
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)  # by the row's index
    places: dict[int, tuple[str, tuple[int, int]]] = field(default_factory=dict)  # extension, (offset, size)
    length: int = 0  # bytes of the scratch file

    def add(self, index: int, facts: dict[str, Any], image: bytes | None, extension: str = "") -> None:
        """Note what became of a row."""
        if image is not None:
            self.scratch.write(image)
            self.places[index] = extension, (self.length, len(image))
            self.length += len(image)
        self.facts[index] = facts


async def ingest_shard(
    data: Data, shard: int, context: IngestContext, config: str, again: bool = False, retry: bool = False
) -> dict[str, Any]:
    """Fetch, decode and commit one shard; returns its record, which carries the hash `config`.

    With `again`, rows that have an image keep it, and so does what failed keep its failure; with `retry`, what failed
    for transient reasons is fetched once more, and keeps its line where it fails for such a reason again. What early
    rules rejected is fetched where those of now do not reject it. The record says what came of that (`retries`); where
    no row's line is another, nothing else is written.
    Raises DiskFull where the disk has no room, and whatever is our own error; a row's error ends only the row.
    """
    check_space(data.root)
    check_verify(context.fetch, data.plan.extra_columns)
    began, spent = time.time(), Spent()
    source = data.plan.read(shard)
    starts = note_start(data, data.starts(shard))
    isolate = starts > TRUSTED_STARTS
    keys = [make_key(shard, i, data.plan.shard_size) for i in range(source.table.num_rows)]
    with _scratch(data, shard) as scratch, ShardRules(context.early, source.table, keys) as early:
        results = ShardResults(scratch)
        before = data.record(data.fetched_record(shard)) if again else None
        then = _keep_final(data, shard, results, early, retry) if again else []
        missing = [(i, row) for i, row in enumerate(source.rows()) if i not in results.facts]
        if context.fetch.engine == "img2dataset" and not source.local:
            folder = scratch_path(data.tar(shard))
            wanted = _not_rejected(missing, keys, context, results, early)
            await asyncio.to_thread(_download_by_img2dataset, wanted, context, results, folder)
            _reject_by_size(wanted, results, early)
        else:
            with counting(spent):
                await _fetch_and_decode(missing, source, keys, context, results, early, isolate, spent)

        facts: dict[str, Any] = {
            "starts": starts,
            "isolated": isolate,
            "denied_by": context.deny.digest if context.deny else None,
        }
        if before is not None:
            _keep_transient(results, then, [i for i, _ in missing])
            recovered = [keys[i] for i, _ in missing if results.facts[i]["status"] == Status.SUCCESS]
            facts["retries"] = _retries(before, len(missing), recovered)
        if context.early:
            facts["early"] = context.early.conditions
        if source.notes:
            facts["notes"] = list(source.notes)
        if context.deny.hashes is not None:
            facts["denied_hashes"] = context.deny.hashes

        def took() -> dict[str, Any]:
            return total_spent((before or {}).get("spent"), spent.take() | {"cpu": context.cpu.take()["cpu"]})

        if before is not None and all(results.facts[i] == facts_then for i, facts_then in enumerate(then)):
            data.remove(data.starts(shard))
            kept = dict.fromkeys(("early", "notes", "denied_hashes")) | facts | {"starts": before.get("starts", 1)}
            data.recommit(data.fetched_record(shard), before["inputs"], config=config, facts=kept)
            return data.record(data.fetched_record(shard))
        return await asyncio.to_thread(_commit, data, shard, source.table, results, config, began, facts, took)


def recovered_since(data: Data, shard: int, files: Mapping[str, str]) -> list[str] | None:
    """Keys of the images that retries added to a fetched shard since its files had these sha256.

    None where retries alone do not lead from those files to those of now. All other images are the same, byte for byte.
    """
    record = data.record(data.fetched_record(shard))
    retries = record.get("retries", [])
    for i, retry in enumerate(retries):
        if retry["files"] == dict(files):
            return [key for later in retries[i:] for key in later["recovered"]]
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


def note_start(data: Data, path: Path) -> int:
    """Note that a shard is begun, a byte each time; returns how often it has been, this time included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = data.store.stamp(path)
    starts = 1 + (stamp[0] if stamp else 0)
    try:
        path.write_bytes(b"." * starts)
        data.push(path)
    except OSError as e:
        raise as_disk_full(e, path.parent) from e
    return starts


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


def _keep_final(data: Data, shard: int, results: ShardResults, early: ShardRules, retry: bool) -> list[dict[str, Any]]:
    """Take over the rows of a fetched shard that stay: all but what early rules of before rejected and those of now do
    not, and with `retry` the transient failures. Returns the facts of all its rows as they were."""
    data.bring(data.tar(shard), data.table(shard))
    members = index_tar(data.tar(shard))
    then = list[dict[str, Any]]()
    with open(data.tar(shard), "rb") as tar:
        for i, row in enumerate(pq.read_table(data.table(shard)).to_pylist()):
            facts = {name: row.get(name) for name, _ in FETCHED_COLUMNS}  # a shard of before may lack a column
            then.append(facts)
            if facts["status"] == Status.SUCCESS:
                found = image_member(members[facts["key"]])
                assert found is not None, f"{facts['key']} has no image in {data.tar(shard)}"
                results.add(i, facts, read_range(tar, found[1]), found[0])
            elif facts["status"] == Status.REJECTED_EARLY:
                try:
                    early.check_row(i)
                    if facts["original_width"] is not None:
                        early.check_size(i, facts["original_width"], facts["original_height"])
                except RejectedEarly as e:
                    results.add(i, facts | {"reason": e.rule, "error_message": e.detail}, None)
            elif not (retry and Reason(facts["reason"]).transient):
                results.add(i, facts, None)
    return then


def _keep_transient(results: ShardResults, then: list[dict[str, Any]], tried: list[int]) -> None:
    """Give rows that were tried in vain their lines of before: of a server that is down each try says something else,
    and another line would make all that was made of the shard stale. A failure that is final now is written down."""
    for i in tried:
        if all(row["status"] in _FAILED and Reason(row["reason"]).transient for row in (then[i], results.facts[i])):
            results.facts[i] = then[i]


def _retries(before: Mapping[str, Any], tried: int, recovered: list[str]) -> list[dict[str, Any]]:
    """What the record of a shard says of retries, this one included. One in vain takes the place of one before."""
    this = {"files": output_digests(before), "tried": tried, "recovered": recovered}
    others = [*before.get("retries", [])]
    if others and not others[-1]["recovered"] and others[-1]["files"] == this["files"]:
        others.pop()
    return [*others, this][-_RETRIES_KEPT:]


async def _fetch_and_decode(
    rows: list[tuple[int, Row]],
    source: SourceShard,
    keys: Sequence[str],
    context: IngestContext,
    results: ShardResults,
    early: ShardRules,
    isolate: bool,
    spent: Spent,
) -> None:
    """Fetch and decode rows, all at once: the fetcher knows how many requests at a time. Whatever a row does ends in
    its own facts."""
    isolated = IsolatedDecoder(context.images) if isolate else None
    loop = asyncio.get_running_loop()
    name = stored_name(context.fetch.verify) if context.fetch.verify else None
    there = name is not None and name in source.table.column_names  # a shard lacks columns of lists added later
    expected = source.table.column(name).to_pylist() if there else None

    def check_and_process(body: bytes, digest: str | None, facts: dict[str, Any]) -> ProcessedImage | None:
        """In a thread: what is denied, not what the list names, or opted out by itself is not even decoded."""
        with spent.thread("decode"):
            if context.deny or digest:
                sha256 = hashlib.sha256(body).digest()
                context.deny.check_body(body, sha256)
                verify_hash(body, digest, sha256)
            rights = read_rights(body)  # all metadata are gone once it is processed
            facts["opt_out"] = "; ".join(filter(None, (facts["opt_out"], opt_outs_text(rights)))) or None
            for signal, word in rights.items():
                if signal in context.fetch.respect:
                    raise RowError(Reason.OPTED_OUT, f"{signal}: the file says {word}")
            return None if isolated is not None else process(body, context.images)

    async def decode(body: bytes, index: int, facts: dict[str, Any]) -> ProcessedImage:
        early.check_prefix(index, body)
        digest = expected[index] if expected else None
        image = await loop.run_in_executor(context.threads, check_and_process, body, digest, facts)
        image = image or await isolated.decode(body)  # type: ignore[union-attr]
        early.check_size(index, image.original_width, image.original_height)  # now it is known for sure
        return image

    async def ingest_row(index: int, row: Row) -> None:
        facts: dict[str, Any] = {name: None for name, _ in FETCHED_COLUMNS}
        image = None
        try:
            context.deny.check_row(keys[index], row.url if row.place is None else "")
            if row.failure is not None:
                raise row.failure
            early.check_row(index)
            look = functools.partial(early.check_prefix, index)
            if row.place is not None:
                async with context.local_reads:
                    if context.early.header:
                        look(await asyncio.to_thread(row.place.begin, _BEGINNING))
                    body = await asyncio.to_thread(row.place.read)
                    facts["bytes"] = len(body)
                    image = await decode(body, index, facts)
            else:
                async with context.fetcher.body(row.url or "", look if context.early.header else None) as answer:
                    facts |= {"final_url": answer.final_url, "http_status": answer.http_status}
                    facts |= {"bytes": len(answer.data), "opt_out": answer.opt_out, "redirects": answer.redirects}
                    image = await decode(answer.data, index, facts)
            facts |= image.facts() | {"status": Status.SUCCESS.value}
            results.add(index, facts, image.data, image.extension)
        except RowError as e:
            facts |= {name: value for name, value in failure_facts(e).items() if value is not None}
            results.add(index, facts, None)
        context.report("fetch", counted(facts), _host(row.url) if facts["status"] != Status.REMOVED else "")

    try:
        async with asyncio.TaskGroup() as group:
            for index, row in rows:
                group.create_task(ingest_row(index, row))
    except ExceptionGroup as e:
        raise e.exceptions[0] from None  # an error of ours, or a full disk; a row's own error never comes here
    finally:
        if isolated is not None:
            isolated.close()


def _not_rejected(
    rows: list[tuple[int, Row]], keys: Sequence[str], context: IngestContext, results: ShardResults, early: ShardRules
) -> dict[int, str | None]:
    """The URLs of the rows that img2dataset is given, by index: neither broken lines nor what early rules reject, nor
    what the folder's own deny-list names."""
    urls = dict[int, str | None]()
    for index, row in rows:
        try:
            context.deny.check_row(keys[index], row.url)
            if context.deny and context.deny.denies(
                row.url or ""
            ):  # by the folder's own list, as the recipe's are refused
                raise RowError(Reason.DENIED, "its URL or its domain is on a deny-list")
            if row.failure is not None:
                raise row.failure
            early.check_row(index)
            urls[index] = row.url
        except RowError as e:
            results.add(index, failure_facts(e), None)
            context.report("fetch", e.reason, "")
    return urls


def _download_by_img2dataset(
    urls: Mapping[int, str | None], context: IngestContext, results: ShardResults, folder: Path
) -> None:
    for index, facts, image, extension in engine_img2dataset.download(urls, context.fetch, context.images, folder):
        try:
            if image is not None and facts["sha256"]:
                context.deny.check_sha256(bytes.fromhex(facts["sha256"]))
        except RowError as e:
            facts, image = failure_facts(e), None
        results.add(index, facts, image, extension)
        context.report("fetch", facts["reason"] or Status.SUCCESS, _host(urls[index]))


def _reject_by_size(indices: Collection[int], results: ShardResults, early: ShardRules) -> None:
    """Take images out again that early rules reject, once img2dataset has downloaded them. Its own `min_image_size` is
    not asked for: it takes sides before they are upright, and there is no more than one number to it."""
    for index in indices:
        facts = results.facts[index]
        try:
            if index in results.places:
                early.check_size(index, facts["original_width"], facts["original_height"])
        except RejectedEarly as e:
            del results.places[index]
            results.facts[index] = failure_facts(e)


def counted(facts: Mapping[str, Any]) -> str:
    """As what a row is counted: its reason where it failed, else its status; rules have any names."""
    return facts["status"] if facts["status"] in (Status.SUCCESS, Status.REJECTED_EARLY) else facts["reason"]


_HOST = re.compile(r"(?i)https?://(?:[^/?#]*@)?(\[[^\]/?#]*\]|[^/?#:]*)")


def _host(url: str | None) -> str:
    """The host of a URL, for people to see; empty where it has none that can be read."""
    found = _HOST.match(url or "")
    return found[1].lower() if found else ""


def _commit(
    data: Data,
    shard: int,
    table: pa.Table,
    results: ShardResults,
    config: str,
    began: float,
    extra: dict[str, Any],
    took: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Write tar, table and record, in the order of the list."""
    rows = [results.facts[i] for i in range(table.num_rows)]
    for i, facts in enumerate(rows):
        facts["key"] = make_key(shard, i, data.plan.shard_size)
    for name, kind in FETCHED_COLUMNS:
        table = table.append_column(name, pa.array([facts[name] for facts in rows], kind))
    plan = data.plan
    table = forget_removed(table.cast(fetched_schema(plan.list_columns(plan.list_index(shard)))))

    with atomic(data.tar(shard)) as f, atomic(data.table(shard)) as g:
        tar = TarWriter(f)
        index = 0
        for batch in table.to_batches(max_chunksize=1000):
            for row in batch.to_pylist():
                if index in results.places:
                    extension, place = results.places[index]
                    tar.add_sample(row["key"], read_range(results.scratch, place), extension, row["caption"], row)
                index += 1
        tar.close()
        pq.write_table(table, g, compression="zstd")
        # as late as can be: a retry that is killed before this line has changed nothing
        data.invalidate(data.fetched_record(shard))

    data.remove(data.starts(shard))  # all is decoded; after the record, a kill would leave it for ever
    done = time.time()
    statuses = Counter(facts["status"] for facts in rows)
    if rejected := Counter(facts["reason"] for facts in rows if facts["status"] == Status.REJECTED_EARLY):
        extra = {**extra, "rejected_early": dict(rejected)}
    if removed := statuses[Status.REMOVED]:
        extra = {**extra, "removed": removed}
    faces = [facts["faces_blurred"] for facts in rows if facts["faces_blurred"] is not None]
    if faces:
        extra = {**extra, "faces_blurred": sum(faces), "face_detector": detector()}
    return data.commit(
        data.fetched_record(shard),
        config=config,
        inputs={"plan": data.plan.shard_digest(shard)},
        outputs=[data.tar(shard), data.table(shard)],
        facts={
            # img2dataset's names
            "count": len(rows),
            "successes": statuses[Status.SUCCESS],
            "failed_to_download": statuses[Status.FAILED_TO_DOWNLOAD],
            "failed_to_resize": statuses[Status.FAILED_TO_RESIZE],
            "duration": round(done - began, 3),
            "start_time": began,
            "end_time": done,
            "status_dict": dict(Counter(counted(facts) for facts in rows)),
            "spent": took(),
            **extra,
        },
    )
