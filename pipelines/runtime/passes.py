"""Annotators pass by pass: over the shards, or over the whole table, each after those whose columns it waits for."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from curate.annotators.base import Annotator
from curate.annotators.missing import column_inputs
from curate.annotators.order import passes, wanted_keys
from curate.layout import Data
from curate.workers import EmbedWorker, ignore
from pipelines.recipe import Recipe
from pipelines.runtime.cluster import check_reachable
from pipelines.runtime.jobs import CurateJob, RemainingWork, run_job
from pipelines.runtime.progress import ProgressBar
from pipelines.runtime.tables import annotate_tables

IMAGES_FOR_RAY = 2_000
"""Images in the shards that are left from which a cluster of our own is started for their pixels: it takes some
seconds, and on one machine it has one worker for them, as this process would be."""


def annotate_passes(
    data: Data,
    recipe: Recipe,
    annotators: Mapping[str, Annotator],
    *,
    first: bool,
    early: Mapping[str, str] | None = None,
    address: str | None = None,
) -> dict[str, int]:
    """Compute what is missing of the columns of annotators, pass by pass; of each entry how many shards lacked them.

    `recipe` has their entries. The first pass, which waits for nothing but early rules (`early`: the encoder's), is
    left out without `first`: it has run while images were fetched and embedded.
    """
    found = dict[str, int]()
    for number, names in enumerate(passes(annotators, early)):
        if number == 0 and not first:
            continue
        if any(annotators[name].reads == "table" for name in names):
            found |= annotate_tables(data, annotators, recipe.embed, recipe.images, names=names, address=address)
        else:
            found |= _over_shards(data, recipe, {name: annotators[name] for name in names}, address)
    return found


def _over_shards(
    data: Data, recipe: Recipe, annotators: Mapping[str, Annotator], address: str | None
) -> dict[str, int]:
    """One pass over the shards that lack some of these columns: on Ray where the pixels of many are read, else here."""
    missing = {name: _lacking(data, name, annotator) for name, annotator in annotators.items()}
    left = sorted(set[int]().union(*missing.values()))
    wanted = replace(recipe, columns={name: recipe.columns[name] for name in annotators})
    early = {name: dict(annotator.early) for name, annotator in annotators.items()}
    images = sum(data.record(data.fetched_record(shard))["successes"] for shard in left)
    pixels = any(annotators[name].reads == "pixels" for name, lacking in missing.items() if lacking)
    if pixels and (address is not None or images >= IMAGES_FOR_RAY):
        if address is not None:
            check_reachable(address)
        job = CurateJob(data, wanted, fetch=False, vectors=False, early=early)
        run_job(job, RemainingWork(left, 0, images), address=address)
    elif left:
        seeing = [a for a in annotators.values() if a.reads == "pixels"]
        images = max((sum(len(wanted_keys(data, s, a.condition)) for s in left) for a in seeing), default=0)
        bar = ProgressBar(sys.stderr, ", ".join(annotators), images) if images else None
        report = ignore if bar is None else lambda *_: bar(1)
        worker = EmbedWorker(data, wanted.embed, wanted.columns, "", report=report, vectors=False, early=early)
        for shard in left:
            worker.run(shard)
        if bar is not None:
            bar.end()
    return {name: len(lacking) for name, lacking in missing.items()}


def _lacking(data: Data, name: str, annotator: Annotator) -> Sequence[int]:
    """The fetched shards that lack an entry's columns and have what it reads."""
    inputs = {s.shard: column_inputs(data, s.shard, annotator) for s in data.plan.shards}
    return [
        shard
        for shard, there in inputs.items()
        if there is not None
        and not data.is_done(data.annotations_record(name, shard), config=annotator.config, inputs=there)
    ]
