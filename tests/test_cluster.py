"""Two Ray nodes without a shared disk: machines of their own (network, mounts, processes), DATA and MODEL on S3.

One of them dies or falls silent while it embeds, one joins late, and some lack what they need. And what docs/cluster.md
prints for clusters of others, as far as it can be checked without them.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from small_cluster import Machine, Net, machines, needs_machines, serve_s3
from small_web import digests, image

ROOT = Path(__file__).parents[1]
IMAGES = 80
HEAD = "10.77.0.2:6379"

COPY = """
from pathlib import Path
from curate.store.objects import ObjectStore
store = ObjectStore("s3://bucket/data")
store.get_files([(stored.name, Path("copy", stored.name)) for stored in store.list()])
"""
LISTED = "from curate.store.objects import ObjectStore\nprint(*(s.name for s in ObjectStore('s3://bucket').list()))"


class Cluster:
    """A machine with an S3 server and a web of images, and one that is the head of a Ray cluster."""

    def __init__(self, net: Net) -> None:
        self.net, self.store, self.head = net, net.add("store"), net.add("head")
        self.s3 = serve_s3(self.store)
        web = self.store.folder / "web"
        web.mkdir()
        rows: dict[str, list[Any]] = {"url": [], "caption": []}
        for number in range(IMAGES):
            name, content, caption = image(number)
            if number % 10 == 9:  # a copy of the one before it
                name, content = f"{number:03d}.jpg", encoded_anew(image(number - 1)[1])
            (web / name).write_bytes(content)
            rows["url"].append(f"http://{self.store.ip}:8000/{name}")
            rows["caption"].append(caption or f"part {number}")
        pq.write_table(pa.table(rows), web / "list.parquet")
        serve = ["-m", "http.server", "8000", "--bind", self.store.ip, "--directory", str(net.here / "web")]
        self.store.start([sys.executable, *serve], "web.txt")

    def start_head(self) -> None:
        self.head.ray("--head", "--port=6379", "--num-cpus=2", "--include-dashboard=false", env=self.s3)

    def join(self, machine: Machine, env: dict[str, str] | None = None) -> None:
        machine.ray(f"--address={HEAD}", "--num-cpus=2", env=self.s3 if env is None else env)

    def curate(self, out: str, *settings: str, cluster: bool = True) -> list[str]:
        """The command; shards of eight images, so that many are under way."""
        words = ["curate", f"http://{self.store.ip}:8000/list.parquet", "--out", out, "--recipe", "bundled"]
        words += ["--ray-address", HEAD] if cluster else []
        for setting in (
            "source.shard_size=8",
            'fetch.allow=["10.77.0.0/24:8000"]',
            "fetch.retries=0",
            "images.size=128",
            "pack.shard_size=16",
            *settings,
        ):
            words += ["--set", setting]
        return [sys.executable, "-m", "pipelines.cli", *words]

    def watch(self, out: str, during: Callable[[str], bool], timeout: float = 900) -> str:
        """Run it on the head; `during` is called with what it said until it returns True. What it said in the end."""
        run = self.head.start(self.curate(out, "ray.embed_cpus=1"), "run.txt", env=self.s3)
        said, happened, deadline = self.head.folder / "run.txt", False, time.monotonic() + timeout
        while run.poll() is None:
            assert time.monotonic() < deadline, said.read_text()
            happened = happened or during(said.read_text())
            time.sleep(0.2)
        assert happened and run.returncode == 0, said.read_text()
        return said.read_text()

    def tastemaker(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.head.run([sys.executable, "-m", "pipelines.cli", *words], env=self.s3, timeout=600)

    def asked_for_images(self) -> int:
        """Requests that the web of images has had, but for the list."""
        return len(re.findall(r"GET /\d+\.\w+ ", (self.store.folder / "web.txt").read_text()))


def encoded_anew(content: bytes) -> bytes:
    """An image as somebody else would store it."""
    out = io.BytesIO()
    Image.open(io.BytesIO(content)).convert("RGB").save(out, "JPEG", quality=80)
    return out.getvalue()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with machines(tmp_path) as net:
        yield Cluster(net)


def stages(folder: Path) -> dict[str, str]:
    """The files of the stages, but for those that hold paths, times or pools."""
    return {
        name: sha256
        for name, sha256 in digests(folder).items()
        if name.startswith(("fetched/", "embedded/", "annotated/", "selected/", "shards/"))
        and not name.endswith("/manifest.json")
        and "/index/" not in name
        and not Path(name).name.startswith(".")
    }


def values(folder: Path) -> pa.Table:
    """The columns of an annotator, of all shards."""
    return pa.concat_tables(pq.read_table(file) for file in sorted(folder.glob("*.parquet")))


@needs_machines
@pytest.mark.long
def test_two_machines_without_a_shared_disk_and_one_dies(cluster: Cluster) -> None:
    """Its bytes are those of a run on a disk, by one machine, and so are those of columns of the whole table that two
    compute. Then they fit a head and train a model on it."""
    alone = cluster.head.run(cluster.curate("alone", "ray.embed_workers=2", cluster=False), env=cluster.s3, timeout=600)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    cluster.start_head()
    other = cluster.net.add("other")
    cluster.join(other)

    def kill(said: str) -> bool:
        if not other.processes("EmbedWorker.run"):
            return False
        time.sleep(1)
        other.die()
        return True

    said = cluster.watch("s3://bucket/data", kill)
    assert re.search(r"a worker \(embed\) on other \(10\.77\.0\.3\) has died; what it was at goes to others", said), (
        said
    )

    third = cluster.net.add("third")
    cluster.join(third)
    columns = ["like={use: near-duplicates, phash: 4, cosine: 0.9}", "kind={use: clusters, k: 3}"]
    columns += ["said=caption-repeats"]
    for words in (["alone", *columns], ["s3://bucket/data", *columns, "--ray-address", HEAD]):
        annotated = cluster.tastemaker("annotate", *words)
        assert annotated.returncode == 0, annotated.stdout + annotated.stderr
    assert cluster.head.run([sys.executable, "-c", COPY], env=cluster.s3).returncode == 0
    assert stages(cluster.head.folder / "copy") == stages(cluster.head.folder / "alone")
    assert pc.count(values(cluster.head.folder / "copy/annotated/dup")["dup"]).as_py() >= 2 * (IMAGES // 10 - 2)
    tasks = cluster.head.folder / "copy/annotated/like/index"
    assert {"rows", "cells"} <= {path.name for path in tasks.iterdir()}

    rated = values(cluster.head.folder / "alone/annotated/aesthetic").rename_columns(["key", "score"])
    pq.write_table(rated.slice(0, 60), cluster.head.folder / "rated.parquet")
    for words in (["alone", "--out", "one.head"], ["s3://bucket/data", "--out", "two.head", "--ray-address", HEAD]):
        fitted = cluster.tastemaker("fit", "rated.parquet", "--data", *words)
        assert fitted.returncode == 0, fitted.stdout + fitted.stderr
    one, two = (digests(cluster.head.folder / head) for head in ("one.head", "two.head"))
    assert one["head.safetensors"] == two["head.safetensors"]

    words = ["train", "s3://bucket/data/shards/bundled", "--out", "s3://bucket/model", "--preset", "debug"]
    words += ["--steps", "15", "--batch", "2", "--workers", "2", "--save-every", "8", "--ray-address", HEAD]
    trained = cluster.tastemaker(*words)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "2 workers with" in trained.stderr and "model  s3://bucket/model" in trained.stdout
    names = cluster.head.run([sys.executable, "-c", LISTED], env=cluster.s3).stdout.split()
    assert {"model/model_index.json", "model/checkpoints/000015/record.json", "model/latents/made.json"} <= {*names}
    assert any(name.startswith("model/checkpoints/000015/trainer/") for name in names)
    assert not [name for name in names if name.startswith("model/start/")]


@needs_machines
@pytest.mark.long
def test_a_machine_joins_late_and_falls_silent(cluster: Cluster) -> None:
    cluster.start_head()
    other = cluster.net.add("other")
    joined: list[float] = []

    def join_then_cut(said: str) -> bool:
        if not joined and re.search(r"embed  [1-9]", said):
            cluster.join(other)
            joined.append(time.monotonic())
        if joined and other.processes("EmbedWorker.run"):
            other.cut()
            return True
        return False

    said = cluster.watch("s3://bucket/data", join_then_cut)
    assert re.search(r"on other \(10\.77\.0\.3\) (was not heard of for 60 s|has died); what it was at", said), said
    status = cluster.tastemaker("status", "s3://bucket/data", "--json")
    assert status.returncode == 0 and f"annotated {IMAGES // 8}/{IMAGES // 8} shards   aesthetic" in status.stdout


@needs_machines
@pytest.mark.long
def test_machines_that_lack_something_are_refused_together_before_the_first_url(cluster: Cluster) -> None:
    """One has no tastemaker, one no credentials, one another numpy and not the head that is given by its folder."""
    cluster.start_head()
    bare, poor, odd = (cluster.net.add(name) for name in ("bare", "poor", "odd"))
    nothing = bare.folder / "path" / "pipelines"  # goes before ours, and holds nothing
    nothing.mkdir(parents=True)
    (nothing / "__init__.py").touch()
    fake = odd.folder / "path" / "numpy-1.0.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0\n")
    here = cluster.net.here
    cluster.join(bare, {**cluster.s3, "PYTHONPATH": str(here / "path")})
    cluster.join(poor, {})
    cluster.join(odd, {**cluster.s3, "PYTHONPATH": f"{here / 'path'}:{ROOT}"})
    taste = cluster.head.folder / "taste"
    subprocess.run(["cp", "-r", str(ROOT / "aesthetic/shipped/bundled-aesthetic"), str(taste)], check=True)

    command = cluster.curate("s3://bucket/data", f"columns.taste={here / 'taste'}")
    done = cluster.head.run(command, env=cluster.s3, timeout=200)
    assert done.returncode == 2, done.stdout + done.stderr
    said = done.stderr
    assert "not all of the cluster's 4 nodes can take part" in said and "Traceback" not in said
    assert re.search(r"node bare \(10\.77\.0\.3\): it has no tastemaker that can be imported", said), said
    assert re.search(r"node poor \(10\.77\.0\.4\): s3://bucket/data: no credentials", said), said
    assert re.search(r"node odd \(10\.77\.0\.5\): other software than the driver's: numpy 1\.0, not", said), said
    assert re.search(rf"node odd \(10\.77\.0\.5\): columns\.taste: .*{here / 'taste'}", said), said
    assert not re.search(r"node head", said), said
    assert cluster.asked_for_images() == 0


# --------------------------------------------------------------------------------------------------- docs/cluster.md


def printed(kind: str, number: int = 0) -> str:
    """A block of code of docs/cluster.md."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    return re.findall(rf"```{kind}\n(.*?)```", text, re.S)[number]


def test_what_is_printed_for_ray_up_is_what_ray_takes() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(printed("yaml")))
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]


def test_what_is_printed_for_kuberay_and_slurm() -> None:
    job = yaml.safe_load(printed("yaml", 1))
    spec = job["spec"]["rayClusterSpec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert {"entrypoint", "shutdownAfterJobFinishes", "rayClusterSpec"} <= job["spec"].keys()
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(v, str) for v in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {v["name"] for v in pod["volumes"]}
        for container in pod["containers"]:
            assert {m["name"] for m in container["volumeMounts"]} <= volumes
            assert all(isinstance(e["value"], str) for e in container["env"])
    script = printed("bash")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    import shlex

    from pipelines.cli import build_parser

    lines = [script[script.index("    tastemaker curate") :], job["spec"]["entrypoint"]]
    for line in lines:  # our own command takes its options
        build_parser("curate").parse_args(shlex.split(line.replace("\\\n", " "))[1:])
