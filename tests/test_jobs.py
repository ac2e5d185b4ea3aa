"""How the job is laid out on Ray: pools, and clusters that were there before. Real clusters, on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from small_web import SmallWeb, digests, small_web, start_here

from pipelines.recipe import load_recipe
from pipelines.runtime.jobs import PoolSizes, size_pools

ROOT = Path(__file__).parents[1]


# ----------------------------------------------------------------------------------------------------------- sizing


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 16, 128])
@pytest.mark.parametrize(("gpus", "nodes"), [(0, 0), (1, 0), (8, 0), (0, 1), (0, 4), (8, 2)])
def test_pools_use_a_machine_and_no_more(cpus: int, gpus: int, nodes: int) -> None:
    pools = size_pools(load_recipe("bundled"), cpus, gpus, nodes)
    assert pools.fetch >= 1 and pools.embed >= 1
    assert pools.embed == (gpus or max(1, nodes))
    assert pools.embed * pools.embed_gpus == gpus
    assert pools.fetch_threads >= 1 and pools.embed_threads >= 1
    if cpus >= 2 * (pools.embed + 1):  # else there is less than a core for each
        assert pools.fetch * pools.fetch_cpus + pools.embed * pools.embed_cpus <= cpus
        assert pools.fetch * pools.fetch_threads <= cpus and pools.embed * pools.embed_threads <= cpus


def test_a_recipe_decides_about_pools() -> None:
    names = ("fetch_workers=3", "fetch_cpus=2", "embed_workers=4", "embed_cpus=1.5", "embed_gpus=0.5")
    recipe = load_recipe("bundled", [f"ray.{name}" for name in names])
    pools = size_pools(recipe, 16, 2, 2)
    assert pools == PoolSizes(
        fetch=3, embed=4, fetch_cpus=2.0, embed_cpus=1.5, embed_gpus=0.5, fetch_threads=2, embed_threads=1
    )


# ------------------------------------------------------------------------------------------------------------ the job


@pytest.fixture(scope="module")
def web() -> Iterator[SmallWeb]:
    """20 images and every way to fail."""
    with small_web(20) as web:
        yield web


@pytest.fixture(scope="module")
def alone(web: SmallWeb, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the same list comes to without Ray: path -> sha256."""
    folder = tmp_path_factory.mktemp("alone")
    listed = web.write_list(folder / "list.parquet")
    child = start_here(listed, folder / "data", settings(web))
    child.join(120)
    assert child.exitcode == 0
    return stages(folder / "data")


def settings(web: SmallWeb) -> list[str]:
    """Five shards. Vectors are compared bit by bit, so each embed worker is to have one thread."""
    return web.settings(8)


def stages(data: Path) -> dict[str, str]:
    """The files of the stages, but for those that hold the list's path or the recipe, with what Ray is to do."""
    return {
        name: sha256
        for name, sha256 in digests(data).items()
        if not name.startswith(("plan/", "recipe.yaml", "report/")) and not name.endswith("/manifest.json")
    }


def curate(listed: Path, data: Path, options: list[str], *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`tastemaker curate` with these settings."""
    command = [sys.executable, "-m", "pipelines.cli", "curate", str(listed), "--out", str(data)]
    command += ["--recipe", "bundled", *(w for s in options for w in ("--set", s)), *words, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)


@pytest.mark.long
def test_several_workers_give_the_same_bytes(web: SmallWeb, alone: dict[str, str], tmp_path: Path) -> None:
    """Five shards, two workers of each kind."""
    listed = web.write_list(tmp_path / "list.parquet")
    two = ["ray.fetch_workers=2", f"ray.embed_workers={os.cpu_count() or 2}"]
    done = curate(listed, tmp_path / "data", [*settings(web), *two])
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["shards"] == 5
    assert stages(tmp_path / "data") == alone


# ---------------------------------------------------------------------------------------------------------- clusters


@dataclass
class Cluster:
    """Nodes that `ray start` made on this machine, with a token of their own. Only their processes are ended.

    A cluster of several nodes does not stay on the loopback interface, whatever address is asked for: the token is
    what keeps others out.
    """

    folder: Path  # Ray's, on a short path: it makes sockets there
    port: int
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_USAGE_STATS_ENABLED": "0"}

    def start(self, *options: str, hidden: Path | None = None) -> None:
        """Start a node and wait until it has joined. From `hidden` it sees nothing of what is there."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += ["--node-ip-address=127.0.0.1", "--object-store-memory=80000000", *options]
        if hidden is not None:
            inside = f"mount -t tmpfs none {shlex.quote(str(hidden))} && exec {shlex.join(command)}"
            command = ["unshare", "--mount", "sh", "-c", inside]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **self.environment}
        log = open(self.folder / f"node-{len(self.nodes)}.log", "wb")  # noqa: SIM115
        node = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        log.close()
        self.nodes.append(node)
        deadline = time.monotonic() + 90
        while self.joined() < len(self.nodes):
            told = (self.folder / f"node-{len(self.nodes) - 1}.log").read_text()
            assert node.poll() is None and time.monotonic() < deadline, told
            time.sleep(0.5)

    def joined(self) -> int:
        """Nodes that have joined, by what each says when it has."""
        return sum("Ray runtime started" in p.read_text() for p in self.folder.glob("node-*.log"))

    def stop(self) -> None:
        """End the nodes' processes, and no others that Ray may have on this machine."""
        for node in reversed(self.nodes):
            if node.poll() is None:
                for process in psutil.Process(node.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                node.kill()
                node.wait()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head node."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    cluster = Cluster(folder, port)
    try:
        cluster.start("--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false", f"--temp-dir={folder}")
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.long
def test_two_nodes_of_a_cluster_give_the_same_bytes(
    web: SmallWeb, alone: dict[str, str], cluster: Cluster, tmp_path: Path
) -> None:
    cluster.start(f"--address={cluster.address}", "--num-cpus=2")
    listed = web.write_list(tmp_path / "list.parquet")
    one = ["ray.embed_cpus=1"]
    words = ["--ray-address", cluster.address]
    done = curate(listed, tmp_path / "data", [*settings(web), *one], *words, **cluster.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"joining the cluster at {cluster.address}" in done.stderr
    assert stages(tmp_path / "data") == alone
    assert not (tmp_path / "data" / ".nonce").exists()

    stranger = curate(listed, tmp_path / "other", settings(web), *words, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="f" * 64)
    assert stranger.returncode == 2, stranger.stdout + stranger.stderr
    assert "RAY_AUTH_TOKEN" in stranger.stderr and "Traceback" not in stranger.stderr
    assert not list((tmp_path / "other").glob("fetched/*"))


@pytest.mark.long
@pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0,
    reason="needs to mount",
)
def test_a_node_that_does_not_see_the_data_is_refused(web: SmallWeb, cluster: Cluster, tmp_path: Path) -> None:
    cluster.start(f"--address={cluster.address}", "--num-cpus=2", hidden=tmp_path)
    listed = web.write_list(tmp_path / "list.parquet")
    before = web.web.counts().requests.total()
    done = curate(listed, tmp_path / "data", settings(web), "--ray-address", cluster.address, **cluster.environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(rf"node \S+ \([\d.]+\): it does not see {tmp_path / 'data'}", done.stderr)
    assert "file system that all nodes share" in done.stderr and "Traceback" not in done.stderr
    assert web.web.counts().requests.total() == before


@pytest.mark.long
def test_no_cluster_there(web: SmallWeb, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    listed = web.write_list(tmp_path / "list.parquet")
    done = curate(listed, tmp_path / "data", settings(web), "--ray-address", f"127.0.0.1:{port}")
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"--ray-address 127.0.0.1:{port}: " in done.stderr and "Connection refused" in done.stderr
