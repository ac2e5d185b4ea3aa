"""The curation job on Ray: shards through two pools of workers, fetch and embed. No pixels go through Ray itself.

What goes through are shard numbers; the files lie in the data folder, which every node must reach. What is done is
skipped inside the workers, so a lost worker's shards simply run again. A row of the list never raises here: an
exception is an error of ours, and ends the job with its cause.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from curate.fetch.budget import Budget, LeaseReply, LeaseRequest
from curate.layout import Data
from pipelines.recipe import Recipe
from pipelines.runtime.channel import beside_driver, report_errors, start_progress, start_worker, watch
from pipelines.runtime.cluster import local_gpus, ray_cluster
from pipelines.runtime.nodes import NodeCheck, node_check
from pipelines.runtime.pool import Pool, Size, Staff, Stage
from pipelines.runtime.progress import Meter, ProgressDisplay, redirect_output


@dataclass(frozen=True)
class CurateJob:
    """What one run of the pools does; plain values, because Ray carries it to the workers."""

    data: Data
    recipe: Recipe
    fetch: bool = True
    embed: bool = True
    vectors: bool = True  # with false, embedding makes no vectors: columns alone
    retry: bool = False
    early: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # of entries and the encoder: EmbedWorker


@dataclass(frozen=True)
class RemainingWork:
    """What is left to do: shards, the rows among them to fetch, and the images fetched before and yet to embed."""

    shards: Sequence[int]
    rows: int
    images: int


@dataclass(frozen=True)
class PoolSizes:
    """How many workers of each kind, the CPUs and GPUs that Ray sets aside for each, and the threads of each."""

    fetch: int
    embed: int
    fetch_cpus: float
    embed_cpus: float
    embed_gpus: float
    fetch_threads: int
    embed_threads: int


def size_pools(recipe: Recipe, cpus: int, gpus: int, nodes: int = 0) -> PoolSizes:
    """Pools for so many CPUs and GPUs, where the recipe does not say.

    An embed worker per GPU, else one per node; a fetch worker per two cores where GPUs embed, else per four (then
    embedding takes the most time); embed workers share the cores that fetching leaves. On a machine of our own
    (`nodes` 0) both kinds may use every core: fetching waits for the web, and ends first.
    """
    r = recipe.ray
    fetch = r.fetch_workers or max(1, cpus // (2 if gpus else 4))
    embed = r.embed_workers or gpus or max(1, nodes)
    embed_cpus = r.embed_cpus or float(max(1, int(cpus - fetch * r.fetch_cpus) // embed))
    return PoolSizes(
        fetch=fetch,
        embed=embed,
        fetch_cpus=r.fetch_cpus,
        embed_cpus=embed_cpus,
        embed_gpus=r.embed_gpus or (1.0 if gpus else 0.0),
        fetch_threads=max(1, int(r.fetch_cpus) if nodes else cpus // fetch),
        embed_threads=max(1, int(embed_cpus) if nodes else cpus // embed),
    )


def shards_together(rows: int) -> int:
    """How many shards of so many rows a fetch worker has under way: two large ones, or as many rows of small ones.

    The last rows of a shard are slow (a dead host takes a minute to be given up); meanwhile others are fetched.
    """
    return max(2, min(16, 20_000 // rows))


def run_job(
    job: CurateJob, work: RemainingWork, *, check: NodeCheck | None = None, address: str | None = None
) -> ProgressDisplay:
    """Run the pools over what is left to do, on nodes that pass a check (by default, that the job can run there).

    Raises the cause of what went wrong in a worker."""
    largest = max(job.data.plan.shards[shard].rows for shard in work.shards)
    sizes = size_pools(job.recipe, os.cpu_count() or 1, local_gpus())
    with redirect_output(job.data.logs / "ray.log") as out:
        display = ProgressDisplay(out, work.rows, work.images, job.embed, largest)
        display.say("starting Ray ..." if address is None else f"joining the cluster at {address} ...")
        cpus = math.ceil(sizes.fetch * sizes.fetch_cpus + sizes.embed * sizes.embed_cpus)  # both pools at once
        check = check or node_check(job.data, job.recipe)
        with ray_cluster(address, check, cpus=cpus, gpus=local_gpus()) as check:
            import ray  # not before: the switches that keep it to the loopback interface are read then
            from ray.exceptions import RayError

            name, progress = start_progress()
            budget: Any = ray.remote(Budget).options(name=f"{name}-budget", **beside_driver())
            budget = budget.remote(job.recipe.fetch.per_domain)  # lives as long as this

            def show(end: bool = False) -> None:
                with contextlib.suppress(RayError):  # what ends the job is told, not what its end breaks
                    counts, hosts = ray.get(progress.counts.remote(), timeout=5)
                    display.show(counts, hosts, end)

            def work_through() -> None:
                stages = _stages(job, name, largest, sizes if address is None else None)
                joined = None if address is None else check.problems
                pool = Pool(stages, work.shards, progress, check=joined, grow=address is not None, say=display.say)
                for _ in pool.results():
                    pass

            try:
                for _ in watch(work_through, progress, 0.5):
                    show()
            finally:
                del budget
                show(end=True)
    job.data.store.refresh()  # workers wrote there
    return display


def _stages(job: CurateJob, progress: str, rows: int, sizes: PoolSizes | None) -> list[Stage]:
    """Fetch and embed, as far as the job does them, for shards of so many rows at the most, in pools of these sizes or
    of what the cluster can carry."""

    def staff(size: Size) -> tuple[Staff, Staff]:
        ray, s = job.recipe.ray, sizes or size_pools(job.recipe, size.cpus, size.gpus, size.nodes)
        return (
            Staff(s.fetch, s.fetch_cpus, threads=s.fetch_threads, most=ray.fetch_workers),
            Staff(s.embed, s.embed_cpus, s.embed_gpus, s.embed_threads, most=ray.embed_workers),
        )

    fetch = Stage(
        "fetch",
        functools.partial(open_fetch, job, progress),
        lambda size: staff(size)[0],
        together=shards_together(rows),
        is_async=True,
    )
    embed = Stage("embed", functools.partial(open_embed, job, progress), lambda size: staff(size)[1])
    return [stage for stage, wanted in ((fetch, job.fetch), (embed, job.embed)) if wanted]


def open_fetch(job: CurateJob, progress: str, threads: int) -> Callable[[int, int], Awaitable[None]]:
    """A FetchWorker in an actor."""
    import ray

    from curate.workers import FetchWorker

    actor = start_worker(job.data.store, "fetch", progress)
    meter = Meter(actor.add.remote)
    budget: Any = ray.get_actor(f"{progress}-budget")
    client = secrets.token_hex(8)

    async def lease(message: LeaseRequest) -> LeaseReply:
        return await budget.lease.remote(client, message)

    recipe = job.recipe
    with report_errors(actor):
        early = recipe.early_fetch()
        worker = FetchWorker(job.data, recipe.fetch, recipe.images, recipe.hashes()[0], meter, threads, lease, early)

    async def run(shard: int, lost: int) -> None:
        with report_errors(actor):
            await worker.run(shard, retry=job.retry)
        meter.flush()

    return run


def open_embed(job: CurateJob, progress: str, threads: int) -> Callable[[int, int], None]:
    """An EmbedWorker in an actor. In a retry its models are loaded for the first shard that had something back: most
    often none has."""
    from curate.workers import EmbedWorker

    actor, recipe = start_worker(job.data.store, "embed", progress), job.recipe
    meter = Meter(actor.add.remote)

    @functools.cache
    def worker() -> EmbedWorker:
        return EmbedWorker(
            job.data,
            recipe.embed,
            recipe.columns,
            recipe.hashes()[1],
            meter,
            threads,
            vectors=job.vectors,
            early=job.early,
        )

    if not job.retry:
        with report_errors(actor):
            worker()

    def run(shard: int, lost: int) -> None:
        with report_errors(actor):
            if not (job.retry and _embedded(job, shard)):
                worker().run(shard)
        meter.flush()

    return run


def _embedded(job: CurateJob, shard: int) -> bool:
    """Whether a shard has all that the job's recipe makes of it. Loads no model."""
    from curate.annotators.order import ENCODER
    from curate.annotators.registry import make_annotators
    from curate.workers import embed_done

    annotators = make_annotators(job.recipe.columns)
    early = job.early.get(ENCODER, {})
    for name, annotator in annotators.items():
        annotator.early = job.early.get(name, {})
    return embed_done(job.data, shard, job.recipe.hashes()[1], annotators, early)
