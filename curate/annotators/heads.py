"""Embeddings x heads -> score columns: `scored/COLUMN/NNNNN.parquet`, a key and one number per fetched image.

A column comes from a head, which reads the shard's vectors, or from a detector, which needs pixels and therefore runs
where they are decoded (curate.annotators.embed). Either way it is one folder, so a new column touches nothing that is
there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.catalog import load_head
from aesthetic.files import atomic
from aesthetic.heads import Head
from aesthetic.space import SpaceMismatch
from aesthetic.vectors import open_vectors
from curate.annotators.nsfw import DETECTORS, detector_digest
from curate.encoders.base import canonical_name
from curate.layout import Data
from curate.store.files import read_json
from curate.store.records import commit, invalidate, is_done, output_digests


def is_detector(name: str) -> bool:
    """Whether a name in a recipe's `score` part means a detector (pixels) and not a head (vectors)."""
    return name in DETECTORS


@dataclass(frozen=True)
class Column:
    """What makes a score column: its scale, the hash that its records carry, and whether it needs pixels."""

    config: str
    scale: tuple[float, float]
    pixels: bool


def columns_of(score: Mapping[str, str], encoder: str | None = None) -> dict[str, Column]:
    """The columns of a recipe's `score` part. Reads the heads' cards and loads no model.

    Raises HeadError where there is no such head, and SpaceMismatch where one reads vectors of another encoder.
    """
    columns = {}
    reads = None if encoder is None else canonical_name(encoder)
    for name, source in score.items():
        if is_detector(source):
            columns[name] = Column(detector_digest(source), DETECTORS[source], True)
            continue
        head = load_head(source)
        if reads is not None and head.space.encoder != reads:
            raise SpaceMismatch(
                f"score.{name}: the head {source} reads vectors of {head.space.encoder}, "
                f"but embed.encoder is {reads}. A head works in its own space only."
            )
        columns[name] = Column(head.digest, head.scale, False)
    return columns


def head_inputs(data: Data, shard: int) -> dict[str, str] | None:
    """What a head's column of a shard depends on: the shard's image vectors; None where they are not there."""
    record = read_json(data.embedded_record(shard))
    if not record:
        return None
    name = str(data.image_vectors(shard).relative_to(data.root))
    digests = output_digests(record)
    return {name: digests[name]} if name in digests else None


def score_shard(data: Data, shard: int, column: str, head: Head) -> bool:
    """Score one shard's vectors with a head, unless that is done. Returns whether it had to."""
    inputs = head_inputs(data, shard)
    assert inputs is not None, f"shard {shard} is scored before it is embedded"
    record = data.scores_record(column, shard)
    if is_done(data.root, record, config=head.digest, inputs=inputs):
        return False
    vectors = open_vectors(data.image_vectors(shard))
    keys = pq.read_table(data.metadata(shard), columns=["key"])["key"]
    facts = {"head": head.name, "task": head.task, "scale": list(head.scale), "space": head.space.fingerprint}
    write_scores(data, shard, column, keys, head(vectors), config=head.digest, inputs=inputs, facts=facts)
    return True


def write_scores(
    data: Data,
    shard: int,
    column: str,
    keys: pa.ChunkedArray | pa.Array,
    scores: np.ndarray,
    *,
    config: str,
    inputs: dict[str, str],
    facts: dict[str, Any],
) -> None:
    """Write and commit one shard of a score column. `scores` is (n,) and finite, in the order of `keys`."""
    if not np.isfinite(scores).all():
        raise ValueError(f"{column} of shard {shard}: a score is not a finite number")
    table = pa.table({"key": keys, column: pa.array(scores.astype(np.float32), pa.float32())})
    invalidate(data.scores_record(column, shard))
    with atomic(data.scores(column, shard)) as f:
        pq.write_table(table, f, compression="zstd")
    commit(
        data.root,
        data.scores_record(column, shard),
        config=config,
        inputs=inputs,
        outputs=[data.scores(column, shard)],
        facts={"count": len(scores), **facts},
    )
