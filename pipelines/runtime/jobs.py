"""The curation job on Ray: shard rows through two actor pools, fetch and embed. No pixels go through the object store.

A row is a shard number; its files lie in the data folder, which every node must see. What is done is skipped inside
the workers, so a lost worker's shards simply run again. A row of the list never raises here: an exception is an error
of ours, and ends the job with its cause.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from curate.fetch.budget import Budget, LeaseReply, LeaseRequest
from curate.layout import Data
from pipelines.recipe import Recipe
from pipelines.runtime.channel import report_errors, start_progress, start_worker, watch
from pipelines.runtime.cluster import local_gpus, quiet_ray_data, ray_cluster
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


def run_job(job: CurateJob, work: RemainingWork, *, address: str | None = None) -> ProgressDisplay:
    """Run the pools over what is left to do. Raises the cause of what went wrong in a worker."""
    largest = max(job.data.plan.shards[shard].rows for shard in work.shards)
    sizes = size_pools(job.recipe, os.cpu_count() or 1, local_gpus())
    with redirect_output(job.data.logs / "ray.log") as out:
        display = ProgressDisplay(out, work.rows, work.images, job.embed, largest)
        display.say("starting Ray ..." if address is None else f"joining the cluster at {address} ...")
        cpus = math.ceil(sizes.fetch * sizes.fetch_cpus + sizes.embed * sizes.embed_cpus)  # both pools at once
        with ray_cluster(address, job.data.root, cpus=cpus, gpus=local_gpus()):
            import ray  # not before: the switches that keep it to the loopback interface are read then
            from ray.exceptions import RayError

            if address is not None:
                total = ray.cluster_resources()
                nodes = sum(node["Alive"] for node in ray.nodes())
                sizes = size_pools(job.recipe, int(total.get("CPU", 1)), int(total.get("GPU", 0)), nodes)
            name, progress = start_progress()
            budget: Any = ray.remote(Budget).options(name=f"{name}-budget", num_cpus=0)
            budget = budget.remote(job.recipe.fetch.per_domain)  # lives as long as this

            def show(end: bool = False) -> None:
                with contextlib.suppress(RayError):  # what ends the job is told, not what its end breaks
                    counts, hosts = ray.get(progress.counts.remote(), timeout=5)
                    display.show(counts, hosts, end)

            try:
                for _ in watch(lambda: _run_waves(job, work.shards, sizes, name), progress, 0.5):
                    show()
            finally:
                del budget
                show(end=True)
    return display


def _run_waves(job: CurateJob, shards: Sequence[int], sizes: PoolSizes, progress: str) -> None:
    import ray
    from ray.data import ActorPoolStrategy

    quiet_ray_data()
    remaining = iter(shards)
    while wave := list(islice(remaining, job.recipe.ray.wave)):
        # one block per shard: Ray's default packs 200 blocks, and a block comes out only when it is complete
        ds: Any = ray.data.from_items([{"shard": shard} for shard in wave], override_num_blocks=len(wave))
        if job.fetch:
            together = shards_together(max(job.data.plan.shards[shard].rows for shard in wave))
            ds = ds.map(
                FetchActor,
                fn_constructor_args=(job, progress, sizes.fetch_threads),
                compute=ActorPoolStrategy(
                    size=min(sizes.fetch, len(wave)),
                    max_tasks_in_flight_per_actor=together,
                    max_concurrent_calls_per_actor=together,
                ),
                num_cpus=sizes.fetch_cpus,
            )
        if job.embed:
            ds = ds.map(
                EmbedActor,
                fn_constructor_args=(job, progress, sizes.embed_threads),
                compute=ActorPoolStrategy(size=min(sizes.embed, len(wave))),
                num_cpus=sizes.embed_cpus,
                num_gpus=sizes.embed_gpus or None,
            )
        for _ in ds.iter_rows():
            pass


class FetchActor:
    """A FetchWorker in an actor; `async` is the only form in which Ray Data lets two shards overlap."""

    def __init__(self, job: CurateJob, progress: str, threads: int) -> None:
        import ray

        from curate.workers import FetchWorker

        self._job = job
        self._progress = start_worker(job.data.root, "fetch", progress)
        self._meter = Meter(self._progress.add.remote)
        budget: Any = ray.get_actor(f"{progress}-budget")
        client = secrets.token_hex(8)

        async def lease(message: LeaseRequest) -> LeaseReply:
            return await budget.lease.remote(client, message)

        recipe = job.recipe
        with report_errors(self._progress):
            self._worker = FetchWorker(
                job.data,
                recipe.fetch,
                recipe.images,
                recipe.hashes()[0],
                self._meter,
                threads,
                lease,
                recipe.early_fetch(),
            )

    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        with report_errors(self._progress):
            await self._worker.run(int(row["shard"]), retry=self._job.retry)
        self._meter.flush()
        return row


class EmbedActor:
    """An EmbedWorker in an actor."""

    def __init__(self, job: CurateJob, progress: str, threads: int) -> None:
        from curate.workers import EmbedWorker

        self._progress = start_worker(job.data.root, "embed", progress)
        self._meter = Meter(self._progress.add.remote)
        with report_errors(self._progress):
            self._worker = EmbedWorker(
                job.data,
                job.recipe.embed,
                job.recipe.columns,
                job.recipe.hashes()[1],
                self._meter,
                threads,
                vectors=job.vectors,
            )

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        with report_errors(self._progress):
            self._worker.run(int(row["shard"]))
        self._meter.flush()
        return row
