"""What a node of a cluster must have before it is given work: asked on each of them, before the first URL."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from aesthetic.errors import UserError
from aesthetic.files import scratch_path, write_atomic
from curate.layout import Data
from curate.store.disk import Disk
from curate.store.mirror import open_store
from pipelines.recipe import Recipe

PACKAGES = (
    *("numpy", "pyarrow", "pillow", "simplejpeg", "opencv-python-headless", "torch", "open_clip_torch", "transformers"),
    *("onnxruntime", "tokenizers", "diffusers", "scikit-learn", "scipy", "faiss-cpu", "duckdb", "webdataset"),
)
"""Those whose versions decide which bytes come out."""

ROOM = 2 * 10**9
"""Bytes that must be free for the cache of a node: a shard that comes, one that goes, and their scratch."""

PATIENCE = 600.0
"""Seconds in which a node must answer; it may have to fetch weights first."""


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where all nodes must be able to read and write: a folder with a file in it that proves that it is the same one,
    or a URL, with the token of the lease that this run holds there."""

    folder: str = ""
    proof: tuple[str, str] | None = None  # the file, and what it says
    url: str | None = None
    token: str | None = None

    def open(self) -> Disk:
        """The store, as a worker has it."""
        store = open_store(self.url or self.folder)
        store.token = self.token
        return store

    def problems(self) -> Iterator[str]:
        """What keeps this node from it."""
        if self.url is not None:
            yield from self._of_url(self.url)
        elif self.proof is not None:
            path, text = self.proof
            try:
                seen = Path(path).read_text() == text
            except (OSError, ValueError):
                seen = False
            if not seen:
                shared = "Put it on a file system that all nodes share, or on an object store"
                yield f"it does not see {self.folder}. {shared}"

    def _of_url(self, url: str) -> Iterator[str]:
        from curate.store.cache import cache_folder
        from curate.store.lease import LeaseLost, check_token
        from curate.store.objects import ObjectStore, StoreUnavailable

        try:
            folder = cache_folder()
            if (free := shutil.disk_usage(folder).free) < ROOM:
                yield (
                    f"{folder} has {free / 1e9:.1f} GB free, and {ROOM / 1e9:.0f} are needed for what comes and goes. "
                    "Set TASTEMAKER_CACHE there to a folder on a larger disk"
                )
            if self.token is not None:
                check_token(ObjectStore(url, patience=20), self.token)
        except (UserError, StoreUnavailable, LeaseLost) as e:
            yield str(e)


def place_of(store: Disk) -> Location:
    """The place of a store, as nodes are asked for it."""
    return Location(folder=str(store.root)) if store.url is None else Location(url=store.url, token=store.token)


@dataclass(frozen=True, kw_only=True)
class NodeCheck:
    """What is asked of every node; plain values, as Ray carries it there.

    place: where results lie.
    encoder, weights, columns: what is loaded there, as a recipe has them; configs: what the columns' values depend on.
    paths: files and folders that are read there.    gloo: whether workers there talk to each other by it.
    """

    place: Location
    versions: Mapping[str, str]
    encoder: str | None = None
    weights: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    configs: Mapping[str, str] = field(default_factory=dict)
    paths: tuple[str, ...] = ()
    gloo: bool = False

    def problems(self) -> list[str]:
        """What this node lacks, and what to do about each; [] where it is fit. Fetches weights that are not here."""
        return [*self._software(), *self._storage(), *self._models(), *self._network()]

    def _software(self) -> Iterator[str]:
        here = versions()
        other = [f"{k} {here.get(k, 'missing')}, not {v}" for k, v in self.versions.items() if here.get(k) != v]
        if other:
            yield f"other software than the driver's: {'; '.join(other)}. Install the same on all nodes"

    def _storage(self) -> Iterator[str]:
        yield from self.place.problems()
        for name in self.paths:
            if not Path(name).exists():
                yield f"there is no {name}, which is read there. Copy it to all nodes, or put it where all see it"

    def _network(self) -> Iterator[str]:
        if not self.gloo or os.environ.get("GLOO_SOCKET_IFNAME"):
            return
        try:  # as gloo finds the address that it tells others
            address = socket.gethostbyname(socket.gethostname())
        except OSError:
            address = "nothing"
        if address == "nothing" or address.startswith("127."):
            yield (
                f"its name {socket.gethostname()} means {address} there, so workers elsewhere can't reach those on it. "
                "Start Ray there with GLOO_SOCKET_IFNAME=eth0, or whatever its network interface is called"
            )

    def _models(self) -> Iterator[str]:
        from curate.annotators.registry import fetch_annotators, make_annotators
        from curate.encoders.registry import fetch_weights

        try:
            if self.encoder is not None:
                fetch_weights(self.encoder, self.weights)
        except UserError as e:
            yield str(e)
        try:
            annotators = make_annotators(self.columns)
            other = [name for name, a in annotators.items() if a.config != self.configs.get(name, a.config)]
            if other:
                yield f"columns.{', columns.'.join(other)}: files or weights are others than the driver's. Copy those"
            fetch_annotators(annotators, tables=False)
        except UserError as e:
            yield str(e)


def node_check(data: Data, recipe: Recipe) -> NodeCheck:
    """What nodes must have for the fetch, embed and annotate stages of a recipe."""
    from curate.annotators.registry import make_annotators

    embeds = recipe.embed.embeddings is None
    annotators = {name: a for name, a in make_annotators(recipe.columns).items() if a.reads != "table"}
    wanted = embeds or any(a.asks_encoder for a in annotators.values())
    return NodeCheck(
        place=place_of(data.store),
        versions=versions(),
        encoder=recipe.embed.encoder if wanted else None,
        weights=recipe.embed.weights,
        columns={name: recipe.columns[name] for name in annotators},
        configs={name: a.config for name, a in annotators.items()},
        paths=(*_list_files(data), *recipe.fetch.deny, *filter(None, [recipe.embed.embeddings])),
    )


def _list_files(data: Data) -> list[str]:
    """The first files of a list that is read where it lies, and the folder of images that it is; [] of a copied one."""
    facts, lists = data.plan.facts, data.plan.lists
    cut = {facts["made_of"][name] for name in facts["cut"]}
    read = {i for i, one in enumerate(lists) if not one["remote"]}
    kept_places = {i for i, one in enumerate(lists) if one["kind"] in ("tars", "parquet")}
    used = [
        fact["path"]
        for index, fact in enumerate(facts["inputs"])
        if (of := fact.get("list", 0)) in read and (index not in cut or of in kept_places)
    ]
    return [*used[:100], *(lists[i]["base"] for i in sorted(read) if lists[i]["base"])]


@functools.cache
def versions() -> dict[str, str]:
    """Python, our own code and the packages that decide which bytes come out, with their versions here."""
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "tastemaker": _own_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _own_version() -> str:
    """Our version, with a digest of the source: two checkouts may have one number."""
    import pipelines

    root, sha256 = Path(pipelines.__file__).parents[1], hashlib.sha256()
    files = (path for name in ("aesthetic", "curate", "train", "pipelines") for path in (root / name).rglob("*.py"))
    for path in sorted(files):
        sha256.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    with contextlib.suppress(metadata.PackageNotFoundError):
        return f"{metadata.version('tastemaker')} ({sha256.hexdigest()[:8]})"
    return f"({sha256.hexdigest()[:8]})"


@contextlib.contextmanager
def proven(check: NodeCheck) -> Iterator[NodeCheck]:
    """A check with a file in its folder that nodes must read; the file goes when the block ends."""
    if check.place.url is not None:  # there the lease is proof enough
        yield check
        return
    path, text = scratch_path(Path(check.place.folder) / "nonce"), secrets.token_hex(8)
    write_atomic(path, text.encode())
    try:
        yield replace(check, place=replace(check.place, proof=(str(path), text)))
    finally:
        path.unlink(missing_ok=True)


def check_nodes(check: NodeCheck, say: Callable[[str], None] = print) -> list[str]:
    """Ask all nodes of the cluster at one time; the ids of those that are fit.

    UserError names every node that lacks something, and what. Of one that is lost meanwhile something is said.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(NodeCheck.problems)
    waiting, found = dict[Any, dict[str, Any]](), dict[str, list[str]]()
    for node in alive_nodes():
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        waiting[task.options(scheduling_strategy=strategy).remote(check)] = node
    deadline = time.monotonic() + PATIENCE
    while waiting:
        done, _ = ray.wait([*waiting], num_returns=1, timeout=5)
        there = {node["NodeID"] for node in alive_nodes()}
        late = time.monotonic() > deadline
        for answer in done or [ref for ref, node in waiting.items() if late or node["NodeID"] not in there]:
            node = waiting.pop(answer)
            try:
                found[node["NodeID"]] = ray.get(answer, timeout=1)
            except RayError as e:
                if (problem := _unfit(e)) is None:
                    say(f"node {node_name(node)} can't be reached: the run goes on without it")
                else:
                    found[node["NodeID"]] = [problem]
    names = {node["NodeID"]: node_name(node) for node in ray.nodes()}
    if lacking := [f"node {names[n]}: {problem}" for n, problems in found.items() for problem in problems]:
        nodes = f"{len(found)} node{'s' if len(found) > 1 else ''}"
        raise UserError("\n".join([f"not all of the cluster's {nodes} can take part:", *lacking]))
    return [*found]


def alive_nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster that Ray takes for alive, as `ray.nodes` has them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def node_name(node: Mapping[str, Any]) -> str:
    """What people call a node: its host, and its address."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _unfit(error: Exception) -> str | None:
    """Why a node could not even answer; None where it is not there any more."""
    said = [line.strip() for line in str(error).splitlines() if "No module named" in line]
    if said:
        return f"it has no tastemaker that can be imported ({said[-1]}). Install it on all nodes, best in one image"
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError):
        return f"it can't run what it is asked: {(str(error).strip().splitlines() or [''])[-1]}"
    return None
