"""A Ray cluster: one of our own on this machine, or the one at an address; `map` on it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from aesthetic.errors import UserError
from curate.layout import Data
from pipelines.runtime.nodes import NodeCheck, check_nodes, proven


@contextlib.contextmanager
def ray_cluster(address: str | None, check: NodeCheck, *, cpus: int, gpus: int) -> Iterator[NodeCheck]:
    """Be a driver while the block runs: of the cluster at an address, all of whose nodes must pass a check, or of one
    of our own, of this process and on the loopback interface, with so many CPUs and GPUs. Gives what nodes that join
    later are to be asked.

    Ray reads its switches when it is imported: nothing imports it before this.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a thread that outlives the block must not start a cluster of its own
    if address is None:
        # the switch by which Ray keeps to the loopback interface (it is off on Windows and macOS by default);
        # `_node_ip_address="127.0.0.1"` alone is resolved back to an address that others reach
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    on_sigterm = signal.getsignal(signal.SIGTERM)
    stack = contextlib.ExitStack()
    try:
        if address is not None:
            connect(address)
            check = stack.enter_context(proven(check))
            check_nodes(check)
        else:
            ray.init(
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=False,
                object_store_memory=200_000_000,  # only shard numbers, counts and records pass through it
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        if callable(on_sigterm):  # Ray has put its own in place, which ends with a code that says nothing
            signal.signal(signal.SIGTERM, on_sigterm)
        yield check
    finally:
        stack.close()
        ray.shutdown()


def local_gpus() -> int:
    """NVIDIA GPUs of this machine, without importing torch."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def check_reachable(address: str) -> None:
    """UserError where nothing answers at a cluster's address: Ray itself would try for minutes. Starts nothing."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # `auto`, or nonsense that Ray names
        return
    try:
        socket.create_connection((host, int(port)), 5).close()
    except (OSError, OverflowError) as e:
        raise _unreachable(address, e) from None


def connect(address: str) -> None:
    """Become a driver of the cluster at an address. UserError where there is none, or it does not let us in."""
    import ray
    from ray.exceptions import AuthenticationError

    check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, AuthenticationError) as e:
        raise _unreachable(address, e) from None


def _unreachable(address: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(
        f"--ray-address {address}: {reason[0]}. `ray start --head` prints a cluster's address; "
        "where the cluster asks for a token, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH must hold it here too."
    )


def ray_map(
    address: str,
    function: Callable[[Any], Any],
    items: Iterable[Any],
    data: Data | None = None,
    check: Callable[[], list[str]] | None = None,
) -> Iterator[Any]:
    """`map` on the Ray cluster at an address, in order, by a worker a core; two items a core ahead of the reader.

    data: the folder that the function reads and writes, if any, as it is now: no item needs what another one writes.
    check: what a node lacks that joins meanwhile.
    """
    import ray

    from pipelines.runtime.channel import start_progress
    from pipelines.runtime.pool import Pool, Staff, Stage

    if not ray.is_initialized():
        connect(address)
    cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
    name, progress = start_progress()
    make = functools.partial(_open_map, function, data and data.without_plan(), name)
    stage = Stage("map", make, lambda size: Staff(max(1, size.cpus), 1.0))
    pool = Pool([stage], items, progress, check=check, ahead=3 * cores)
    early: dict[int, Any] = {}  # answers that came before one that was asked for earlier
    following = 0
    for number, answer in pool.results():
        early[number] = answer
        while following in early:
            yield early.pop(following)
            following += 1


def _open_map(
    function: Callable[[Any], Any], data: Data | None, progress: str, threads: int
) -> Callable[[Any, int], Any]:
    from threadpoolctl import threadpool_limits

    from pipelines.runtime.channel import start_worker

    if data is not None:
        start_worker(data.store, "tables", progress)
        data.store.refresh()  # one listing, rather than to ask for each file of each item

    def call(item: Any, lost: int) -> Any:
        with threadpool_limits(1, user_api="blas"):  # the same bits as on another number of cores
            return function(item)

    return call
