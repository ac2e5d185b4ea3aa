"""One worker of each kind: what it keeps open between shards. Ray holds them in actors; a notebook just calls them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import pyarrow as pa

from aesthetic.errors import UserError
from aesthetic.space import Space, require_same
from curate.annotators.base import Annotator, Resources, all_of, config_of
from curate.annotators.missing import column_inputs
from curate.annotators.order import ENCODER, first_pass, where_inputs
from curate.annotators.registry import Spec, make_annotators
from curate.annotators.stage import annotate_shard
from curate.encoders.base import Encoder
from curate.encoders.embed import EmbedConfig
from curate.encoders.registry import load_encoder
from curate.estimate.spent import Spent
from curate.fetch import engine_img2dataset
from curate.fetch.budget import LeaseSlots
from curate.fetch.client import Fetcher
from curate.fetch.config import FetchConfig
from curate.fetch.deny_file import deny_of
from curate.fetch.early import EarlyRules
from curate.fetch.ingest import IngestContext, Report, ingest_shard
from curate.images.config import ImagesConfig
from curate.images.faces import require_detector
from curate.layout import Data
from curate.ledger.schema import Reason, Status
from curate.sources.vectors import ImportedVectors, import_shard, open_vector_folder

GC_THRESHOLDS = (50_000, 20, 100)
"""Thresholds of the garbage collector while shards are fetched: thousands of rows wait at once and leave next to no
cycles behind, so looking through them for garbage again and again is in vain."""


def ignore(stage: str, outcome: str, host: str) -> None:
    """The report of a worker that nobody watches."""


class FetchWorker:
    """Fetches shards, several at a time on one event loop: the slow tail of one does not idle the worker.

    `lease` asks the budget of requests per domain that several workers share; without it, this one has its own.
    """

    def __init__(
        self,
        data: Data,
        fetch: FetchConfig,
        images: ImagesConfig,
        config: str,
        report: Report = ignore,
        threads: int = 0,
        lease: LeaseSlots | None = None,
        early: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """early: rules that are judged while rows are fetched, name -> condition (curate.ledger.early)."""
        if fetch.engine == "img2dataset":
            engine_img2dataset.require(images)
        if images.blur_faces:
            require_detector()
        self._untuned: tuple[tuple[int, int, int], int | None] | None = None  # GC thresholds, Linux's scheduler
        self.data, self.config = data, config
        count = threads or os.cpu_count() or 1
        deny = deny_of(data, fetch.deny)
        self._context = IngestContext(
            fetch=fetch,
            images=images,
            fetcher=Fetcher(fetch, lease=lease, deny=deny),
            deny=deny,
            threads=ThreadPoolExecutor(count, thread_name_prefix="decode"),
            local_reads=asyncio.Semaphore(4 * count),
            report=report,
            early=EarlyRules(early, data.plan.extra_columns if early else pa.schema([])),
        )

    async def run(self, shard: int, retry: bool = False) -> None:
        """Fetch one shard unless it is done, and what early rules left out of it that are others now; with `retry`,
        fetch again what failed for transient reasons."""
        self._tune_process()
        done = fetch_done(self.data, shard, self.config)
        left = done and left_out(self.data, shard, self._context.early.conditions)
        if not done or left or (retry and transient_failures(self.data, shard)):
            try:
                await ingest_shard(self.data, shard, self._context, self.config, again=done, retry=retry)
            finally:
                await self._context.fetcher.return_slots()
                self.data.release_shard(shard)

    async def close(self) -> None:
        """Close connections and threads; the process is as it was."""
        await self._context.fetcher.close()
        self._context.threads.shutdown(cancel_futures=True)
        if self._untuned is not None:
            thresholds, policy = self._untuned
            gc.set_threshold(*thresholds)
            if policy is not None:
                os.sched_setscheduler(0, policy, os.sched_param(0))

    def _tune_process(self) -> None:
        """Collect garbage rarely, and have Linux treat the event loop and the decoders that it starts as batch work:
        else the loop takes a decoder's core at every packet, and the decoder's data are out of the cache when it goes
        on. Together they save 13% of the time, 10% and 3% (docs/benchmarks.md)."""
        if self._untuned is not None:
            return
        policy = None
        if hasattr(os, "sched_setscheduler"):
            with contextlib.suppress(OSError):  # a sandbox that forbids it
                if (current := os.sched_getscheduler(0)) == os.SCHED_OTHER:
                    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
                    policy = current
        self._untuned = (gc.get_threshold(), policy)
        gc.set_threshold(*GC_THRESHOLDS)


class EmbedWorker:
    """Embeds and annotates fetched shards. Models are loaded once, and heads refused if they read another space."""

    def __init__(
        self,
        data: Data,
        embed: EmbedConfig,
        columns: Mapping[str, Spec],
        config: str,
        report: Report = ignore,
        threads: int = 0,
        vectors: bool = True,
        early: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """With `vectors` false, it makes none: columns alone, of what is there. early: the early rules that each entry
        and the encoder wait for (curate.annotators.order.early_of)."""
        self.data, self.config, self.report = data, config, report
        count = threads or os.cpu_count() or 1
        self.imported: ImportedVectors | None = None
        self.encoder: Encoder | None = None
        space: Space | None = None
        if vectors and embed.embeddings is not None:
            self.imported = ImportedVectors(open_vector_folder(embed))
            space = self.imported.folder.space
        elif not vectors and space_known(data):
            space = Space.load(data.local(data.space))
        if vectors and space is None:
            self.encoder = load_encoder(embed.encoder, weights=embed.weights, precision=embed.precision, threads=count)
            space = self.encoder.space()
        if self.imported is not None and space is not None and self.imported.folder.dim != space.dim:
            raise UserError(
                f"embed.embeddings: {embed.embeddings} holds {self.imported.folder.dim} numbers a row, and the vectors "
                f"of {embed.encoder} have {space.dim}: it was made by another encoder"
            )

        def exact() -> Encoder:
            if self.encoder is not None and self.encoder.precision == "fp32":
                return self.encoder
            return load_encoder(embed.encoder, weights=embed.weights, precision="fp32", threads=count)

        resources = Resources(threads=count, space=space, encoder=functools.cache(exact))
        self.annotators = {name: a for name, a in make_annotators(columns).items() if a.reads != "table"}
        self.early = (early or {}).get(ENCODER, {})
        for name, annotator in self.annotators.items():
            annotator.early = (early or {}).get(name, {})
            try:
                annotator.load(resources)
            except UserError as e:
                raise type(e)(f"columns.{name}: {e}") from None
        if vectors and space is not None:
            claim_space(data, space)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="decode")
        self._spent = Spent()

    def run(self, shard: int) -> None:
        """Embed and annotate one fetched shard; what is done is left alone."""
        if self.imported is not None:
            taken = import_shard(self.data, shard, self.imported, self.encoder, self.config)
            seen = any(a.reads == "pixels" for a in self.annotators.values())  # a pass over the pixels reports them
            for _ in range(0 if seen else taken):
                self.report("embed", Status.SUCCESS, "")
        annotate_shard(
            self.data,
            shard,
            self.annotators,
            encoder=self.encoder if self.imported is None else None,
            config=self.config,
            threads=self._threads,
            report=self.report,
            early=self.early,
            spent=self._spent,
        )
        self.data.release_shard(shard, self.annotators)


def claim_space(data: Data, space: Space) -> None:
    """Note the space of a data folder's vectors; SpaceMismatch where it already holds vectors of another one."""
    if space_known(data):
        require_same(Space.load(data.local(data.space)), space, f"{data}/embedded")
    else:
        data.space.parent.mkdir(parents=True, exist_ok=True)
        space.save(data.space)
        data.commit(data.space_record, config="", inputs={}, outputs=[data.space], facts={})


def forget_unanswered(data: Data, names: Iterable[str]) -> None:
    """Take back the records of these columns whose facts say that images are `unanswered`, so that they are asked
    about once more; what was answered is kept elsewhere."""
    for name in names:
        for shard in data.shards(functools.partial(data.annotations_record, name)):
            record = data.annotations_record(name, shard)
            if data.record(record).get("unanswered"):
                data.invalidate(record)


def space_known(data: Data) -> bool:
    """Whether the space of a data folder's vectors is noted."""
    return data.is_done(data.space_record, config="", inputs={})


def fetch_done(data: Data, shard: int, config: str) -> bool:
    """Whether a shard is fetched with this configuration from this list."""
    inputs = {"plan": data.plan.shard_digest(shard)}
    return data.is_done(data.fetched_record(shard), config=config, inputs=inputs)


def transient_failures(data: Data, shard: int) -> int:
    """How many rows of a fetched shard failed for a transient reason."""
    outcomes = data.record(data.fetched_record(shard)).get("status_dict", {})
    return sum(n for reason, n in outcomes.items() if reason != Status.SUCCESS and Reason(reason).transient)


def left_out(data: Data, shard: int, early: Mapping[str, str]) -> int:
    """How many rows of a fetched shard early rules rejected, where the rules were not those of now."""
    record = data.record(data.fetched_record(shard))
    return 0 if record.get("early", {}) == dict(early) else sum(record.get("rejected_early", {}).values())


def embed_done(
    data: Data, shard: int, config: str, annotators: Mapping[str, Annotator], early: Mapping[str, str] | None = None
) -> bool:
    """Whether a fetched shard is embedded, but for what early rules leave out, and has every column of the first pass.
    Loads no model."""
    inputs = data.fetched_digests(shard)
    if inputs is None or not space_known(data):
        return False
    if (condition := all_of(None, early or {})) is not None:
        more = where_inputs(data, shard, condition)
        if more is None:
            return False
        inputs = inputs | more
    config = config_of(config, None, early or {})
    embedded = data.is_done(data.embedded_record(shard), config=config, inputs=inputs)
    return embedded and all(annotated(data, shard, name, annotators[name]) for name in first_pass(annotators, early))


def annotated(data: Data, shard: int, name: str, annotator: Annotator) -> bool:
    """Whether a shard has an annotator's columns, of what it is now. Loads no model."""
    inputs, record = column_inputs(data, shard, annotator), data.annotations_record(name, shard)
    return inputs is not None and data.is_done(record, config=annotator.config, inputs=inputs)
