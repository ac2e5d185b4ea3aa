"""The vectors of one shard: from an encoder, to clip-retrieval's files.

`img_emb/img_emb_NNNNN.npy` and `text_emb/...` hold fp16 unit rows, exactly one for each fetched image, but for those
that early rules leave out, in the order of the ledger; a missing caption is a row of zeros and a null similarity.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.files import atomic
from aesthetic.untrusted import open_vectors
from curate.encoders.base import Encoder
from curate.encoders.registry import check_settings
from curate.layout import Data
from curate.ledger.schema import Status
from curate.store.files import read_table


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Which encoder, and how it runs."""

    encoder: str = "open_clip:ViT-L-14-quickgelu/openai"
    weights: str | None = None  # a local copy of the encoder's weights, where the hub is out of reach
    precision: str | None = None  # fp32, bf16 or fp16; default: fp32 on CPU and MPS, fp16 on CUDA
    embeddings: str | None = None  # a clip-retrieval folder of this encoder's vectors, taken in place of the stage

    def __post_init__(self) -> None:
        check_settings(self.encoder, self.weights, self.precision)


def images_of(data: Data, shard: int, columns: list[str] | None = None) -> pa.Table:
    """The rows of a fetched shard that have an image, in the order of the ledger; None: with every column."""
    names = None if columns is None else [*columns, "status"]
    table = read_table(data.local(data.table(shard)), names)
    table = table.filter(pc.equal(table["status"], Status.SUCCESS.value))
    return table if columns is None else table.select(columns)


def recovered(data: Data, shard: int, record: Path, config: str) -> set[str] | None:
    """Keys of the images that retries added since this record of vectors or columns was written; the others are the
    same. None where it is another configuration's, or its images are others."""
    value = data.record(record)
    if not value or value.get("config") != config or not data.outputs_present(record):
        return None
    from curate.fetch.ingest import recovered_since  # brings aiohttp, for which a recipe need not wait

    keys = recovered_since(data, shard, value["inputs"])
    return None if keys is None else set(keys)


def vector_rows(data: Data, shard: int) -> npt.NDArray[np.int64] | None:
    """The row, in the shard's vectors, of each of its images in the order of the ledger, -1 for those without a vector;
    None where every image has one, so that both are the same."""
    record = data.record(data.embedded_record(shard))
    if "early" not in record or record["sample_count"] == data.record(data.fetched_record(shard)).get("successes"):
        return None
    keys = pq.read_table(data.local(data.metadata(shard)), columns=["key"])["key"].combine_chunks()
    places = pc.index_in(images_of(data, shard, ["key"])["key"], keys)
    return pc.fill_null(places, -1).to_numpy().astype(np.int64)


def take_vectors(data: Data, shard: int, images: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.float16]:
    """The vectors of a shard's images, of some by their place in the order of the ledger: (n, d), mapped where that
    will do; zeros for those without one."""
    vectors, rows = open_vectors(data.local(data.image_vectors(shard))), vector_rows(data, shard)
    if rows is None:
        return vectors if images is None else vectors[images]
    rows = rows if images is None else rows[images]
    found = np.zeros((len(rows), vectors.shape[1]), vectors.dtype)
    found[rows >= 0] = vectors[rows[rows >= 0]]
    return found


def caption_vectors(captions: list[str | None], encoder: Encoder) -> np.ndarray:
    """The captions' vectors: (n, dim) float32, zeros where there is no caption."""
    texts = np.zeros((len(captions), encoder.dim), np.float32)
    rows = np.flatnonzero(_has_words(captions))
    for start in range(0, len(rows), encoder.batch_size):
        part = rows[start : start + encoder.batch_size]
        texts[part] = encoder.encode_texts([captions[i] or "" for i in part])
    return texts


def similarity(captions: list[str | None], images: np.ndarray, texts: np.ndarray | None) -> pa.Array:
    """The cosine of each image and its caption; null where there is no caption, or its vector is zeros."""
    if texts is None:
        return pa.nulls(len(images), pa.float32())
    texts = np.where(_has_words(captions)[:, None], texts, np.float32(0))
    return pa.array(np.einsum("nd,nd->n", images, texts), pa.float32(), mask=~texts.any(axis=1))


def _has_words(captions: list[str | None]) -> np.ndarray:
    return np.array([caption is not None and bool(caption.strip()) for caption in captions], bool)


def write_vectors(
    data: Data,
    shard: int,
    rows: pa.Table,
    images: np.ndarray,
    texts: np.ndarray | None,
    cosines: pa.Array | None = None,
    *,
    config: str,
    inputs: dict[str, str],
    facts: dict[str, Any],
    began: float,
) -> None:
    """Write and commit one shard of `embedded/`: unit vectors (n, dim) of the images in `rows` (key, caption), and of
    captions.

    Rows of `texts` that are zero, and those of empty captions, have no similarity; without `texts` none has.
    """
    captions = rows["caption"].to_pylist()
    if texts is not None:
        texts = np.where(_has_words(captions)[:, None], texts, np.float32(0))
    if cosines is None:
        cosines = similarity(captions, images, texts)
    stored = {data.image_vectors(shard): images} | ({data.text_vectors(shard): texts} if texts is not None else {})
    for path, vectors in stored.items():
        if not np.isfinite(vectors).all():
            bad = rows["key"][int(np.argmin(np.isfinite(vectors).all(axis=1)))]
            raise ValueError(f"{path.name}: the vector of {bad} is not finite")

    data.invalidate(data.embedded_record(shard))
    data.remove(data.text_vectors(shard))  # of a run that had them
    for path, vectors in stored.items():
        with atomic(path) as f:
            np.save(f, vectors.astype(np.float16))
    with atomic(data.metadata(shard)) as f:
        # image_path is clip-retrieval's name for the key
        metadata = rows.add_column(0, "image_path", rows["key"]).append_column("similarity", cosines)
        pq.write_table(metadata, f, compression="zstd")
    data.commit(
        data.embedded_record(shard),
        config=config,
        inputs=inputs,
        outputs=[*stored, data.metadata(shard)],
        facts={"sample_count": len(images), "start_time": began, "end_time": time.time(), **facts},  # clip-retrieval's
    )
