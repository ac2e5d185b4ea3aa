"""clusters: which of k groups of similar images one is in, so that no kind of image need crowd out the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from aesthetic.errors import UserError
from aesthetic.files import atomic
from aesthetic.untrusted import open_vectors
from curate.annotators.base import AnnotatorOptions, ColumnSpec, TableAnnotator, TableRun
from curate.encoders.embed import vector_rows
from curate.layout import Data
from curate.ledger.balance import CLUSTER
from curate.store.files import digest
from curate.store.records import output_digests

PER_CLUSTER = 256
"""Images of each cluster, on average, on which the centroids are fitted; faiss takes as many by itself."""

_BLOCK = 4096


class Clusters(TableAnnotator):
    """The nearest of k centroids of the images' vectors (spherical k-means), and the cosine to it.

    at_most(n, NAME) then keeps at most n images of each cluster, as MetaCLIP balances a list by its entries (Xu et al.
    2023, arXiv 2309.16671). Centroids are fitted once, on 256 images per cluster at random, when no shard has its
    clusters yet; images that come later are assigned to the nearest, so that clusters stay what they were. Fitting
    holds 1 KB per cluster and number of a vector in memory (k: 1000 and 768 numbers: 0.8 GB).
    """

    name = "clusters"
    whole = False
    inputs: Sequence[Literal["fetched", "embedded"]] = ("embedded",)

    class Options(AnnotatorOptions):
        """k: how many clusters."""

        k: int = pydantic.Field(ge=1)

    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.columns = {
            "": ColumnSpec(type=pa.int32(), unit=CLUSTER, meaning=f"nearest of {options.k} centroids, counted from 0"),
            "cosine": ColumnSpec(scale=(-1, 1), unit="cosine", meaning="to that centroid"),
        }

    def annotate_all(self, run: TableRun) -> Iterator[dict[str, pa.Array]]:
        """UserError where there are fewer images than clusters, or vectors or the centroids are not there."""
        data = run.data
        records = {s.shard: data.record(data.fetched_record(s.shard)) for s in data.plan.shards}
        fetched = [shard for shard, record in records.items() if record]
        embedded = [shard for shard in fetched if data.exists(data.embedded_record(shard))]
        if lacking := [s for s in fetched if s not in {*embedded} and records[s].get("successes", 1)]:
            raise UserError(
                f"columns.{run.name}: clusters reads vectors, and shard {lacking[0]:05d} has none. "
                f"`tastemaker embed {data}` makes them."
            )
        self._fit(run, embedded, anew=not {*embedded} - {*run.shards})
        items = [(data.without_plan(), s if s in {*embedded} else None, run.name) for s in run.shards]
        for shard, (cell, cosine) in zip(run.shards, run.map(_assign, items), strict=True):
            values = {"": pa.array(cell, pa.int32()), "cosine": pa.array(cosine, pa.float32())}
            if shard in {*embedded} and (rows := vector_rows(data, shard)) is not None:
                values = {suffix: value.take(pa.array(rows, mask=rows < 0)) for suffix, value in values.items()}
            yield values

    def _fit(self, run: TableRun, shards: Sequence[int], anew: bool) -> None:
        """Make the centroids, where these are not there yet, and set the facts about them; anew: no shard has clusters,
        so that they are made of what is there now."""
        from aesthetic.neighbours import fit_cells

        data, k = run.data, self.options.k
        record, file = run.data.index(run.name) / "fit.json", _centroids(data, run.name)
        before = data.record(record)
        made_of = [sorted(output_digests(data.record(data.embedded_record(shard))).items()) for shard in shards]
        inputs = {"embedded": digest(made_of)} if anew else before.get("inputs", {})
        if not data.is_done(record, config=self.digest, inputs=inputs):
            if not anew:
                raise UserError(
                    f"{file} is not what it was, and other shards were assigned by it. Remove {file.parent.parent}: "
                    f"`tastemaker annotate {data}` then computes {run.name} anew."
                )
            counts = [pq.read_metadata(data.local(data.metadata(s))).num_rows for s in shards]
            if sum(counts) < k:
                raise UserError(f"columns.{run.name}: k: {k:,} clusters are asked for, of {sum(counts):,} images")
            sample = _sample([data.local(data.image_vectors(s)) for s in shards], counts, PER_CLUSTER * k)
            run.say(f"{run.name}: fitting {k:,} clusters to {len(sample):,} images")
            centroids = fit_cells(sample, k, seed=0, rounds=0)
            data.invalidate(record)
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic(file) as f:
                np.save(f, centroids)
            facts = {"clusters": len(centroids), "fitted_on": len(sample), "images": sum(counts)}
            before = data.commit(record, config=self.digest, inputs=inputs, outputs=[file], facts=facts)
        note = (
            f"{before['clusters']:,} clusters, fitted on {before['fitted_on']:,} of the {before['images']:,} images "
            "that there were then; later ones are assigned to the nearest"
        )
        self.facts = {**{key: before[key] for key in ("clusters", "fitted_on", "images")}, "notes": [note]}


def _centroids(data: Data, name: str) -> Path:
    return data.index(name) / "centroids.npy"


def _sample(files: Sequence[Path], counts: Sequence[int], most: int) -> npt.NDArray[np.float32]:
    """At most so many rows of all files, at random and always the same ones, in order: (n, d)."""
    total = sum(counts)
    chosen = np.arange(total)
    if total > most:
        chosen = np.sort(np.random.default_rng(0).choice(total, most, replace=False))
    starts = np.concatenate([[0], np.cumsum(counts)])
    sample = np.zeros((0, 0), np.float32)
    at = 0
    for file, start, end in zip(files, starts[:-1], starts[1:], strict=True):
        rows = chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, end)] - start
        if len(rows):
            part = open_vectors(file)[rows]
            if not len(sample):
                sample = np.empty((len(chosen), part.shape[1]), np.float32)
            sample[at : at + len(rows)] = part
            at += len(rows)
    return sample


def _assign(item: tuple[Data, int | None, str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The nearest of an entry's centroids to each vector of a shard (n,), and the cosine to it (n,)."""
    from aesthetic.neighbours import nearest_cells

    data, shard, name = item
    if shard is None:
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    vectors = open_vectors(data.local(data.image_vectors(shard)))
    centroids = np.load(data.local(_centroids(data, name)), allow_pickle=False)
    cell, cosine = np.zeros(len(vectors), np.int32), np.zeros(len(vectors), np.float32)
    for start in range(0, len(vectors), _BLOCK):
        part = slice(start, start + _BLOCK)
        x = np.asarray(vectors[part], np.float32)
        cell[part] = nearest_cells(x, centroids, 1)[:, 0]
        cosine[part] = np.einsum("ij,ij->i", x, centroids[cell[part]]).clip(-1, 1)
    data.release(data.image_vectors(shard))
    return cell, cosine
