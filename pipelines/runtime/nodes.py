"""What a node of a cluster must have before it is given work: asked on each of them, before the first URL."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from aesthetic.errors import UserError
from aesthetic.files import scratch_path, write_atomic
from curate.layout import Data
from pipelines.recipe import Recipe

PACKAGES = (
    *("numpy", "pyarrow", "pillow", "simplejpeg", "opencv-python-headless", "torch", "open_clip_torch", "transformers"),
    *("onnxruntime", "tokenizers", "diffusers", "scikit-learn", "scipy", "faiss-cpu", "duckdb", "webdataset"),
)
"""Those whose versions decide which bytes come out."""

PATIENCE = 600.0
"""Seconds in which a node must answer; it may have to fetch weights first."""


@dataclass(frozen=True, kw_only=True)
class NodeCheck:
    """What is asked of every node; plain values, as Ray carries it there.

    folder: where results lie, one that all nodes see, with a file `proof` in it.
    encoder, weights, columns: what is loaded there, as a recipe has them; configs: what the columns' values depend on.
    paths: files and folders that are read there.
    """

    folder: Path
    versions: Mapping[str, str]
    proof: tuple[Path, str] | None = None
    encoder: str | None = None
    weights: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    configs: Mapping[str, str] = field(default_factory=dict)
    paths: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        """What this node lacks, and what to do about each; [] where it is fit. Fetches weights that are not here."""
        return [*self._software(), *self._storage(), *self._models()]

    def _software(self) -> Iterator[str]:
        here = versions()
        other = [f"{k} {here.get(k, 'missing')}, not {v}" for k, v in self.versions.items() if here.get(k) != v]
        if other:
            yield f"other software than the driver's: {'; '.join(other)}. Install the same on all nodes"

    def _storage(self) -> Iterator[str]:
        if self.proof is not None:
            path, text = self.proof
            try:
                seen = path.read_text() == text
            except (OSError, ValueError):
                seen = False
            if not seen:
                shared = "Put it on a file system that all nodes share, or on an object store"
                yield f"it does not see {self.folder}. {shared}"
        for name in self.paths:
            if not Path(name).exists():
                yield f"there is no {name}, which is read there. Copy it to all nodes, or put it where all see it"

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
        folder=data.root,
        versions=versions(),
        encoder=recipe.embed.encoder if wanted else None,
        weights=recipe.embed.weights,
        columns={name: recipe.columns[name] for name in annotators},
        configs={name: a.config for name, a in annotators.items()},
        paths=(*_list_files(data), *recipe.fetch.deny, *filter(None, [recipe.embed.embeddings])),
    )


def _list_files(data: Data) -> list[str]:
    """The first files of a list that is read where it lies, and the folder of images that it is; [] of a copied one."""
    facts = data.plan.facts
    if facts["remote"]:
        return []
    cut = {facts["made_of"][name] for name in facts["cut"]} if facts["kind"] not in ("tars", "parquet") else set()
    used = [fact["path"] for index, fact in enumerate(facts["inputs"]) if index not in cut]
    return [*used[:100], *filter(None, [facts["base"]])]


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
    path, text = scratch_path(check.folder / "nonce"), secrets.token_hex(8)
    write_atomic(path, text.encode())
    try:
        yield replace(check, proof=(path, text))
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


def free_bytes(folder: Path) -> int:
    """What is free where a folder is, or will be."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    return shutil.disk_usage(there).free
