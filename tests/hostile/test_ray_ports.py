"""Ray's own ports (N8): it runs code for whoever reaches them, and a list of URLs is somebody else's text."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from fetched import fetch_list, write_list
from hostile_web import Hostile, hosts, measure
from watched import watched

from curate.fetch.config import FetchConfig

WELL_KNOWN = (6379, 8265, 10001)
PATHS = ("/", "/api/jobs/", "/api/version", "/nodes?view=summary")


def listening(pid: int) -> set[int]:
    """The TCP ports that the processes of a family, and their strays, listen at."""
    family = {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    found = psutil.net_connections("tcp")
    return {c.laddr.port for c in found if c.status == psutil.CONN_LISTEN and c.pid in family}


def fetch_in_an_actor(ready: Callable[[], None], root: str, port: int, allow: tuple[str, ...]) -> dict[str, Any]:
    """A process that starts Ray, and fetches a list of Ray's ports in an actor, as the job does."""
    import ray

    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)  # workers find these modules too
    ray.init(num_cpus=2, include_dashboard=None, log_to_driver=False, object_store_memory=80_000_000)
    ready()

    @ray.remote
    class Fetch:
        def run(self, urls: list[str]) -> tuple[list[dict[str, Any]], list[Any]]:
            folder = Path(root)
            with watched() as seen:
                rows = fetch_list(
                    write_list(folder / "list.parquet", {"url": urls}), folder / "data", FetchConfig(allow=allow)
                )
            return rows, seen.connects

    ports = sorted(listening(os.getpid()) | set(WELL_KNOWN))
    node = ray.util.get_node_ip_address()
    names = ("127.0.0.1", "localhost", "127.1", "2130706433", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", node)
    bad = [
        f"http://{name}:{p}{path}" for p in ports for name in names for path in PATHS[: 4 if name == names[0] else 1]
    ]
    bad += [f"https://{names[0]}:{p}/" for p in ports]
    good = list(hosts(20, port, "/good"))
    rows, connects = ray.get(Fetch.remote().run.remote(bad + good))
    result = {
        "rows": rows,
        "connects": connects,
        "ports": ports,
        "bad": len(bad),
        "alive": ray.nodes()[0]["Alive"],
    }
    ray.shutdown()
    return result


@pytest.mark.long
def test_nothing_arrives_at_ray(tmp_path: Path) -> None:
    with Hostile(hosts=20) as server:
        result = measure(fetch_in_an_actor, str(tmp_path), server.port, server.allow, limit=4_000_000_000).result
    rows, bad = result["rows"], result["bad"]
    print(f"{len(result['ports'])} ports, {bad} URLs: {result['ports']}")
    assert len(result["ports"]) > len(WELL_KNOWN) and bad > 50  # Ray does listen
    assert {row["reason"] for row in rows[:bad]} <= {"blocked_address", "bad_url"}
    assert {row["http_status"] for row in rows[:bad]} == {None}
    assert {row["reason"] for row in rows[bad:]} == {None}  # the web beside it is reached
    reached = {port for address, port in result["connects"]}
    assert reached == {server.port} and not reached & set(result["ports"])
    assert result["alive"]
