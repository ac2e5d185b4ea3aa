"""A Ray cluster: one of our own on this machine, or the one at an address; tasks on it, and what its nodes see."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from aesthetic.errors import UserError
from aesthetic.files import atomic, scratch_path


@contextlib.contextmanager
def ray_cluster(address: str | None, folder: Path, *, cpus: int, gpus: int) -> Iterator[None]:
    """Be a driver while the block runs: of the cluster at an address, all of whose nodes must see `folder`, or of one
    of our own, of this process and on the loopback interface, with so many CPUs and GPUs.

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
    try:
        if address is not None:
            connect(address)
            check_nodes(folder)
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
        yield
    finally:
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


def check_nodes(folder: Path) -> None:
    """Have every node of the cluster read a nonce from a folder; a node that cannot is refused by name."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nonce = secrets.token_hex(8)
    path = scratch_path(folder / "nonce")
    with atomic(path) as f:
        f.write(nonce.encode())

    @ray.remote(num_cpus=0)
    def read(file: str) -> str | None:
        try:
            with open(file, encoding="ascii") as f:
                return f.read()
        except OSError:
            return None

    try:
        for node in ray.nodes():
            if node["Alive"]:
                strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                if ray.get(read.options(scheduling_strategy=strategy).remote(str(path))) != nonce:
                    raise UserError(
                        f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}) does not see {folder}. "
                        "Put --out on a file system that all nodes share."
                    )
    finally:
        path.unlink(missing_ok=True)


def ray_map(address: str, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`map` as tasks of the Ray cluster at an address, in order, two items a core ahead of the reader."""
    import ray
    from threadpoolctl import threadpool_limits

    if not ray.is_initialized():
        connect(address)

    def call(item: Any) -> Any:
        with threadpool_limits(1, user_api="blas"):  # the same bits as on another number of cores
            return function(item)

    task = ray.remote(num_cpus=1)(call)
    ahead: deque[Any] = deque()
    most = 2 * int(ray.cluster_resources().get("CPU", 1))
    for item in items:
        ahead.append(task.remote(item))
        if len(ahead) > most:
            yield ray.get(ahead.popleft())
    while ahead:
        yield ray.get(ahead.popleft())


def quiet_ray_data() -> None:
    """Ray Data without progress bars of its own, ended by the first error: a row's error is data already."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    logging.getLogger("ray.data").setLevel(logging.ERROR)
