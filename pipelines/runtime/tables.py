"""Whole-table annotators: their tasks in threads of this process, or on a Ray cluster where images are many."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aesthetic.chunks import thread_map
from curate.annotators.base import Annotator
from curate.annotators.stage import annotate_table
from curate.encoders.base import Encoder
from curate.encoders.embed import EmbedConfig
from curate.encoders.registry import load_encoder
from curate.images.config import ImagesConfig
from curate.layout import Data
from pipelines.runtime.progress import ProgressBar, redirect_output
from pipelines.terminal import CLEAR

IMAGES_FOR_RAY = 100_000
"""Images from which a cluster of our own is started for the tasks: it takes five seconds, and each worker reads its
arguments anew."""


def annotate_tables(
    data: Data,
    annotators: Mapping[str, Annotator],
    embed: EmbedConfig,
    images: ImagesConfig,
    *,
    names: Sequence[str],
    address: str | None = None,
) -> dict[str, int]:
    """Compute the columns of these entries of a recipe, whose annotators read the whole table, one after the other; how
    many shards lacked those of each."""

    @functools.cache
    def encoder() -> Encoder:
        return load_encoder(embed.encoder, weights=embed.weights, precision="fp32")

    found = {}
    for name in names:
        with contextlib.ExitStack() as stack:
            tasks = _Tasks(data, name, annotators[name], address, stack)
            found[name] = annotate_table(
                data, name, annotators, encoder=encoder, images=images, map=tasks.map, say=tasks.say, show=tasks.show
            )
    return found


class _Tasks:
    """Runs the tasks of an annotator, with a progress line; a cluster is joined or started with the first of them."""

    def __init__(
        self, data: Data, name: str, annotator: Annotator, address: str | None, stack: contextlib.ExitStack
    ) -> None:
        self._data, self._name, self._address, self._stack = data, name, address, stack
        self._paths = tuple(str(value) for _, value in annotator.options if isinstance(value, Path))
        self._check: Callable[[], list[str]] | None = None
        self._shown, self._last = "", time.monotonic()
        self._out: Any = None  # the terminal, once Ray writes to where it was
        images = sum(data.record(data.fetched_record(s.shard)).get("successes", 0) for s in data.plan.shards)
        self._on_ray = address is not None or images >= IMAGES_FOR_RAY

    def say(self, text: str) -> None:
        self.show("")
        print(text, file=self._out or sys.stdout, flush=True)

    def show(self, text: str) -> None:
        """See TableRun.show: rewritten in place on a terminal, a line every ten seconds elsewhere; "" for none."""
        out, now = self._out or sys.stderr, time.monotonic()
        if out.isatty():
            if text or self._shown:
                width = shutil.get_terminal_size().columns - 1
                out.write(CLEAR + text[:width])
                out.flush()
        elif text and now - self._last >= 10:
            out.write(text + "\n")
            out.flush()
            self._last = now
        self._shown = text

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """See TableRun.map."""
        if not items:
            return
        answers = self._ray_map(function, items) if self._on_ray else thread_map(function, items)
        bar = ProgressBar(self._out or sys.stderr, self._name, len(items), "tasks")
        for answer in answers:
            yield answer
            bar(1)
        if self._on_ray:
            bar.end()
            self._data.store.refresh()  # tasks wrote there

    def _ray_map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        from pipelines.runtime.cluster import local_gpus, ray_cluster, ray_map
        from pipelines.runtime.nodes import NodeCheck, place_of, versions

        if self._out is None:
            self._out = self._stack.enter_context(redirect_output(self._data.logs / "ray.log"))
            check = NodeCheck(place=place_of(self._data.store), versions=versions(), paths=self._paths)
            cluster = ray_cluster(self._address, check, cpus=os.cpu_count() or 1, gpus=local_gpus())
            check = self._stack.enter_context(cluster)
            self._check = check.problems if self._address is not None else None
        from ray.exceptions import RayTaskError  # not before: the switches of a cluster of our own are read then

        try:
            yield from ray_map("auto", function, items, self._data, self._check)
        except RayTaskError as e:
            raise e.cause from e
