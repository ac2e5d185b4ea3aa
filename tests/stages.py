"""The stages of the main job one after another, in this process: what `tastemaker curate` does, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from curate.annotators.order import ENCODER, first_pass
from curate.annotators.registry import add_needs, make_annotators
from curate.layout import Data
from curate.ledger.select import Selection, select
from curate.shards.pack import pack
from curate.sources.planner import make_plan
from curate.workers import EmbedWorker, FetchWorker
from demo.web import Route, Web
from pipelines.curation import early_rules
from pipelines.recipe import Recipe, load_recipe, store_recipe
from pipelines.runtime.passes import annotate_passes
from tests.small_web import image


@dataclass(frozen=True)
class Served:
    """A server with images and whatever else a test adds, its list, and a recipe that may ask it."""

    web: Web
    urls: list[str]
    recipe: Recipe
    settings: list[str]  # what the recipe has over `bundled`

    def write_list(self, path: Path) -> Path:
        """Write the list as tab-separated values; no parquet, so that the plan holds a copy of it."""
        captions = [f"picture {i}, “naïve”" if i % 7 else "" for i in range(len(self.urls))]
        lines = ["url\tcaption", *(f"{url}\t{caption}" for url, caption in zip(self.urls, captions, strict=True))]
        path.write_text("\n".join(lines) + "\n")
        return path

    def requests(self) -> dict[str, int]:
        """How often each path was asked for so far, whichever host; robots.txt aside."""
        counts = self.web.counts().requests
        return {path: n for (_, path), n in counts.items() if path != "/robots.txt"}


@contextlib.contextmanager
def serving(count: int, others: Mapping[str, Route], shard_size: int) -> Iterator[Served]:
    """Serve `count` images and the other routes, which are spread among them in the list."""
    routes: dict[str | tuple[int, str], Route] = {}
    paths = []
    for number in range(count):
        name, data, _ = image(number)
        paths.append(f"/{name}")
        routes[paths[-1]] = Route(body=data, content_type=f"image/{name.rpartition('.')[2]}")
    for number, (path, route) in enumerate(others.items()):
        routes[path] = route
        paths.insert(number * (count + len(others)) // len(others), path)
    with Web(routes, hosts=3) as web:
        settings = [
            f"source.shard_size={shard_size}",
            f'fetch.allow=["127.0.0.0/8:{web.port}"]',
            "fetch.retries=0",
            "images.size=128",
            "pack.shard_size=8",
        ]
        urls = [web.url(i, path) for i, path in enumerate(paths)]
        yield Served(web, urls, load_recipe("bundled", settings), settings)


def run_stages(listed: Path | str, data: Data, recipe: Recipe) -> Selection:
    """Plan, fetch, embed, score, select and pack what is not done yet."""
    recipe = replace(recipe, columns=add_needs(recipe.columns))
    make_plan(str(listed), data, recipe.source)
    store_recipe(data, recipe)
    fetch_shards(data, recipe)
    embed_shards(data, recipe)
    return choose(data, recipe)


def fetch_shards(data: Data, recipe: Recipe, *, retry: bool = False) -> None:
    """The fetch and images stages of all shards."""

    async def run() -> None:
        early = recipe.early_fetch()
        worker = FetchWorker(data, recipe.fetch, recipe.images, recipe.hashes()[0], threads=2, early=early)
        try:
            await asyncio.gather(*(worker.run(s.shard, retry=retry) for s in data.plan.shards))
        finally:
            await worker.close()

    asyncio.run(run())


def embed_shards(data: Data, recipe: Recipe) -> int:
    """The embed and annotate stages of all shards; returns how many images went through the models."""
    seen: list[str] = []

    def report(stage: str, outcome: str, host: str) -> None:
        seen.append(stage)

    columns = add_needs(recipe.columns)
    annotators = make_annotators(columns)
    early = early_rules(recipe, annotators)
    first = {name: columns[name] for name in first_pass(annotators, early[ENCODER])}
    worker = EmbedWorker(data, recipe.embed, first, recipe.hashes()[1], report, threads=2, early=early)
    for s in data.plan.shards:
        worker.run(s.shard)
    annotate_passes(data, replace(recipe, columns=columns), annotators, first=False, early=early[ENCODER])
    return len(seen)


def choose(data: Data, recipe: Recipe) -> Selection:
    """Select and pack."""
    selection = select(data, recipe.select)
    pack(data, recipe.select.name, recipe.pack)
    return selection


def contents(root: Path) -> dict[str, bytes]:
    """Every file that a rerun must give back to the byte: all but records, which hold times, logs and hidden files.
    Records of columns are there without what they took."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and not is_record(path, root) and not path.name.startswith(".") and "logs" not in path.parts:
            found[str(path.relative_to(root))] = path.read_bytes()
    for name in [n for n in found if n.startswith("annotated/") and n.endswith(".json")]:
        record = {k: v for k, v in json.loads(found[name]).items() if k not in ("spent", "self")}
        found[name] = json.dumps(record).encode()
    return found


def is_record(path: Path, root: Path) -> bool:
    """Whether a file is the record of a shard, which says when it was made."""
    stage = path.relative_to(root).parts[0]
    return path.suffix == ".json" and (stage == "fetched" or "stats" in path.parts)
