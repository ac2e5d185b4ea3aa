"""The Ray job: shard rows through two actor pools, fetch and embed. No pixels go through the object store.

A row is a shard number; its files lie in the data folder, which every node must see. What is done is skipped inside
the workers, so a lost worker's shards simply run again. A row of the list never raises here: an exception is an error
of ours, and ends the job with its cause.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import pickle
import secrets
import signal
import socket
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from aesthetic.errors import UserError
from aesthetic.files import atomic, scratch_path
from curate.fetch.budget import Budget, LeaseReply, LeaseRequest
from curate.layout import Data
from curate.store.files import open_log
from curate.store.lock import hold_worker_lock
from pipelines.recipe import Recipe
from pipelines.runtime.progress import Board, Meter, ProgressDisplay, Terminal
from pipelines.terminal import LogFormatter

OBJECT_STORE = 200_000_000
"""Bytes; only shard numbers and counts pass through it."""


@dataclass(frozen=True)
class CurateJob:
    """What one run of the pools does; plain values, because Ray carries it to the workers."""

    data: Data
    recipe: Recipe
    fetch: bool = True
    embed: bool = True
    retry: bool = False


@dataclass(frozen=True)
class RemainingWork:
    """What is left to do: shards, the rows among them to fetch, and the images fetched before and yet to embed."""

    shards: Sequence[int]
    rows: int
    images: int


def _meter(board: Any) -> Meter:
    return Meter(lambda counts, hosts: board.add.remote(counts, hosts))


@contextlib.contextmanager
def report_errors(board: Any) -> Iterator[None]:
    """Have the board keep the error that ends a worker: Ray's own report of it is text, in wrappings that vary."""
    import ray

    try:
        yield
    except Exception as e:
        told = e
        while isinstance(told, ExceptionGroup):  # rows of a shard are tasks of a group
            told = told.exceptions[0]
        told.add_note(f"In a worker:\n{traceback.format_exc()}")
        try:
            pickle.loads(pickle.dumps(told))
        except Exception:  # whatever a class of exceptions does when it is copied
            told = RuntimeError(f"{type(told).__name__}: {told}")
        ray.get(board.fail.remote(told))
        raise


class FetchActor:
    """A FetchWorker in an actor; `async` is the only form in which Ray Data lets two shards overlap."""

    def __init__(self, job: CurateJob, board: str, threads: int) -> None:
        import ray

        from curate.workers import FetchWorker

        hold_worker_lock(job.data.root)
        log_to_file(job.data.logs, "fetch")
        self._job, self._board = job, ray.get_actor(board)
        self._meter = _meter(self._board)
        budget: Any = ray.get_actor(_budget_of(board))
        me = secrets.token_hex(8)

        async def lease(message: LeaseRequest) -> LeaseReply:
            return await budget.lease.remote(me, message)

        recipe = job.recipe
        with report_errors(self._board):
            self._worker = FetchWorker(
                job.data, recipe.fetch, recipe.images, recipe.hashes()[0], self._meter, threads, lease
            )

    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        with report_errors(self._board):
            await self._worker.run(int(row["shard"]), retry=self._job.retry)
        self._meter.flush()
        return row


class EmbedActor:
    """An EmbedWorker in an actor."""

    def __init__(self, job: CurateJob, board: str, threads: int) -> None:
        import ray

        from curate.workers import EmbedWorker

        hold_worker_lock(job.data.root)
        log_to_file(job.data.logs, "embed")
        self._board = ray.get_actor(board)
        self._meter = _meter(self._board)
        with report_errors(self._board):
            self._worker = EmbedWorker(
                job.data, job.recipe.embed, job.recipe.score, job.recipe.hashes()[1], self._meter, threads
            )

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        with report_errors(self._board):
            self._worker.run(int(row["shard"]))
        self._meter.flush()
        return row


def _budget_of(board: str) -> str:
    """The name of the actor that lends the fetch workers of a job their turns at web sites."""
    return f"{board}-budget"


def log_to_file(logs: Path, stage: str) -> None:
    """Send a worker's log records to a file in that folder."""
    handler = logging.StreamHandler(io.TextIOWrapper(open_log(logs / f"{stage}.log"), "utf-8", "backslashreplace"))
    handler.setFormatter(LogFormatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


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
    with Terminal(job.data.logs / "ray.log") as out:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if address is None:
            # the switch by which Ray keeps to the loopback interface (it is off on Windows and macOS by default);
            # `_node_ip_address="127.0.0.1"` alone is resolved back to an address that others reach
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        import ray

        largest = max(job.data.plan.shards[shard].rows for shard in work.shards)
        screen = ProgressDisplay(out, work.rows, work.images, job.embed, largest)
        screen.say("starting Ray ..." if address is None else f"joining the cluster at {address} ...")
        asked_to_end = signal.getsignal(signal.SIGTERM)
        try:
            pools = _start_ray(job, address)
            if callable(asked_to_end):  # Ray has put its own in place, which ends with a code that says nothing
                signal.signal(signal.SIGTERM, asked_to_end)
            _run_waves(job, work.shards, pools, screen)
        finally:
            ray.shutdown()
    return screen


def _start_ray(job: CurateJob, address: str | None) -> PoolSizes:
    import ray

    if address is not None:
        connect(address)
        total = ray.cluster_resources()
        check_nodes(job.data.root)
        nodes = sum(node["Alive"] for node in ray.nodes())
        return size_pools(job.recipe, int(total.get("CPU", 1)), int(total.get("GPU", 0)), nodes)
    gpus = local_gpus()
    pools = size_pools(job.recipe, os.cpu_count() or 1, gpus)
    ray.init(
        num_cpus=math.ceil(pools.fetch * pools.fetch_cpus + pools.embed * pools.embed_cpus),  # so that both run at once
        num_gpus=gpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    return pools


def check_reachable(address: str) -> None:
    """UserError where nothing answers at a cluster's address: Ray itself would try for minutes. Starts nothing."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # `auto`, or nonsense that Ray names
        return
    try:
        socket.create_connection((host, int(port)), 5).close()
    except (OSError, OverflowError) as e:
        raise _unreachable(address, e) from None


def _unreachable(address: str, error: Exception) -> UserError:
    what = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(
        f"--ray-address {address}: {what[0]}. `ray start --head` prints a cluster's address; "
        "where the cluster asks for a token, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH must hold it here too."
    )


def connect(address: str) -> None:
    """Become a driver of the cluster at an address. UserError where there is none, or it does not let us in."""
    import ray
    from ray.exceptions import AuthenticationError

    check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, AuthenticationError) as e:
        raise _unreachable(address, e) from None


def ray_map(address: str, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`map` as tasks of the Ray cluster at an address, in order, two items a core ahead of the reader."""
    import ray
    from threadpoolctl import threadpool_limits

    if not ray.is_initialized():
        connect(address)

    def once(item: Any) -> Any:
        with threadpool_limits(1, user_api="blas"):  # the same bits as on another number of cores
            return function(item)

    task = ray.remote(num_cpus=1)(once)
    ahead: deque[Any] = deque()
    most = 2 * int(ray.cluster_resources().get("CPU", 1))
    for item in items:
        ahead.append(task.remote(item))
        if len(ahead) > most:
            yield ray.get(ahead.popleft())
    while ahead:
        yield ray.get(ahead.popleft())


def local_gpus() -> int:
    """CUDA devices of this machine, without importing torch."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").exists() else 0


def check_nodes(root: Path) -> None:
    """Have every node of the cluster read a nonce from a folder; a node that cannot is refused by name."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nonce = secrets.token_hex(8)
    path = scratch_path(root / "nonce")
    with atomic(path) as f:
        f.write(nonce.encode())

    @ray.remote(num_cpus=0)
    def look(file: str) -> str | None:
        try:
            with open(file, encoding="ascii") as f:
                return f.read()
        except OSError:
            return None

    try:
        for node in ray.nodes():
            if node["Alive"]:
                strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                if ray.get(look.options(scheduling_strategy=strategy).remote(str(path))) != nonce:
                    raise UserError(
                        f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}) does not see {root}. "
                        "Put --out on a file system that all nodes share."
                    )
    finally:
        path.unlink(missing_ok=True)


def _run_waves(job: CurateJob, shards: Sequence[int], pools: PoolSizes, screen: ProgressDisplay) -> None:
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayError

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = 0  # a row's error is data already; any other stops the job
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    name = f"tastemaker-{os.getpid()}-{secrets.token_hex(4)}"
    board: Any = ray.remote(Board).options(name=name, num_cpus=0).remote()
    per_domain = job.recipe.fetch.per_domain
    budget = ray.remote(Budget).options(name=_budget_of(name), num_cpus=0).remote(per_domain)  # lives as long as this
    stop = threading.Event()
    drawing = threading.Thread(target=_draw, args=(board, screen, stop), daemon=True)
    drawing.start()
    r = job.recipe.ray
    try:
        waves = iter(shards)
        while wave := list(islice(waves, r.wave)):
            together = shards_together(max(job.data.plan.shards[shard].rows for shard in wave))
            # one block per shard: Ray's default packs 200 blocks, and a block comes out only when it is complete
            ds: Any = ray.data.from_items([{"shard": shard} for shard in wave], override_num_blocks=len(wave))
            if job.fetch:
                ds = ds.map(
                    FetchActor,
                    fn_constructor_args=(job, name, pools.fetch_threads),
                    compute=ActorPoolStrategy(
                        size=min(pools.fetch, len(wave)),
                        max_tasks_in_flight_per_actor=together,
                        max_concurrent_calls_per_actor=together,
                    ),
                    num_cpus=pools.fetch_cpus,
                )
            if job.embed:
                ds = ds.map(
                    EmbedActor,
                    fn_constructor_args=(job, name, pools.embed_threads),
                    compute=ActorPoolStrategy(size=min(pools.embed, len(wave))),
                    num_cpus=pools.embed_cpus,
                    num_gpus=pools.embed_gpus or None,
                )
            for _ in ds.iter_rows():
                pass
    except Exception as e:
        traceback.print_exc()  # into the log: Ray's account of it
        raise _failure(board) or e from None
    finally:
        del budget
        stop.set()
        drawing.join(timeout=5)
        with contextlib.suppress(RayError):  # what ended the job is told, not what its end broke
            counts, hosts = ray.get(board.read.remote(), timeout=5)
            screen.draw(counts, hosts, end=True)


def _draw(board: Any, screen: ProgressDisplay, stop: threading.Event) -> None:
    import ray

    while not stop.wait(0.5):
        screen.draw(*ray.get(board.read.remote()))


def _failure(board: Any) -> Exception | None:
    """What went wrong in a worker, as it was raised there; None where it was no worker's error."""
    import ray
    from ray.exceptions import RayError

    try:
        return ray.get(board.failure.remote(), timeout=5)
    except RayError:
        return None
