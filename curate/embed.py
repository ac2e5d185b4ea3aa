"""The embed stage of one shard: its images -> vectors, similarity and detector scores, decoding each image once.

Files are clip-retrieval's: `img_emb/img_emb_NNNNN.npy` and `text_emb/...` hold fp16 unit rows, exactly one for each
fetched image, in ledger order; a missing caption is a row of zeros and a null similarity. Batches are cut at fixed
rows of the shard, so the same shard gives the same bytes whoever computes it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curate.data import Data
from curate.detectors import Detector
from curate.encoders import Encoder
from curate.images import decode
from curate.ingest import Report
from curate.ledger import Status
from curate.score import write_scores
from curate.shards import read_images
from curate.store import atomic, check_space, commit, digest, is_done, uncommit


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Which encoder, and how it runs."""

    encoder: str = "open_clip:ViT-L-14-quickgelu/openai"
    weights: str | None = None  # a local copy of the encoder's weights, where the hub is out of reach
    precision: str | None = None  # fp32, bf16 or fp16; default: fp32 on CPU and MPS, fp16 on CUDA
    embeddings: str | None = None  # a clip-retrieval folder of this encoder's vectors, taken in place of the stage


def embed_shard(
    data: Data,
    shard: int,
    *,
    encoder: Encoder,
    config: str,
    detectors: Mapping[str, Detector],
    threads: Executor,
    report: Report,
) -> None:
    """Embed one fetched shard and run the detectors (column -> detector) on it; what is done is left alone."""
    inputs = data.fetched_digests(shard)
    assert inputs is not None, f"shard {shard} is embedded before it is fetched"
    embed = not is_done(data.root, data.embedded_record(shard), config=config, inputs=inputs)
    wanted = {
        column: d
        for column, d in detectors.items()
        if not is_done(data.root, data.scores_record(column, shard), config=digest(d.name), inputs=inputs)
    }
    if not embed and not wanted:
        return
    check_space(data.root)
    began = time.time()
    table = pq.read_table(data.table(shard), columns=["key", "caption", "status"])
    table = table.filter(pa.compute.equal(table["status"], Status.SUCCESS.value)).drop_columns(["status"])
    keys = table["key"].to_pylist()

    # one pass over the pixels, in batches that do not depend on what else is wanted (detectors cut them as they like)
    models: dict[str, Any] = {"": encoder, **wanted} if embed else dict(wanted)
    size = encoder.batch_size
    results: dict[str, list[np.ndarray]] = {name: [] for name in models}
    for batch in _prepared(data, shard, keys, models, size, threads):
        for name, model in models.items():
            run = model.encode_prepared if name == "" else model.score_prepared
            results[name].append(run(batch[name]))
        for _ in batch[next(iter(models))]:
            report("embed", Status.SUCCESS, "")

    for column, detector in wanted.items():
        write_scores(
            data,
            shard,
            column,
            table["key"],
            _stacked(results[column], (0,)),
            config=digest(detector.name),
            inputs=inputs,
            facts={"detector": detector.name, "scale": list(detector.scale)},
        )
    if embed:
        images = _stacked(results[""], (0, encoder.dim))
        _write_vectors(data, shard, table, images, encoder, config, inputs, began)


def _stacked(parts: list[np.ndarray], empty: tuple[int, ...]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(empty, np.float32)


def _prepared(
    data: Data, shard: int, keys: list[str], models: Mapping[str, Any], size: int, threads: Executor
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of inputs per model, decoded and preprocessed in threads, two batches ahead of the model."""

    def prepare(image: bytes) -> dict[str, np.ndarray]:
        pixels = decode(image)
        return {name: model.preprocess(pixels) for name, model in models.items()}

    ahead: deque[Future[dict[str, np.ndarray]]] = deque()
    stored = read_images(data.tar(shard))
    for start in range(0, len(keys), size):
        count = min(size, len(keys) - start)
        while len(ahead) < 3 * size and (item := next(stored, None)) is not None:
            ahead.append(threads.submit(prepare, item[2]))
        rows = [ahead.popleft().result() for _ in range(count)]
        yield {name: np.stack([r[name] for r in rows]) for name in models}
    assert not ahead and next(stored, None) is None, f"{data.tar(shard)} holds more images than its table"


def _write_vectors(
    data: Data,
    shard: int,
    table: pa.Table,
    images: np.ndarray,
    encoder: Encoder,
    config: str,
    inputs: dict[str, str],
    began: float,
) -> None:
    captions = table["caption"].to_pylist()
    texts = np.zeros((len(captions), encoder.dim), np.float32)
    told = [i for i, caption in enumerate(captions) if caption is not None and caption.strip()]
    for start in range(0, len(told), encoder.batch_size):
        part = told[start : start + encoder.batch_size]
        texts[part] = encoder.encode_texts([captions[i] for i in part])
    cosines = np.einsum("nd,nd->n", images, texts)
    similarity = pa.array(
        [float(cosines[i]) if has else None for i, has in enumerate(np.any(texts, axis=1))], pa.float32()
    )
    for name, vectors in (("image", images), ("text", texts)):
        if not np.isfinite(vectors).all():
            bad = table["key"][int(np.argmin(np.isfinite(vectors).all(axis=1)))]
            raise ValueError(f"{encoder.name} gave a {name} vector that is not finite, for {bad}")

    uncommit(data.embedded_record(shard))
    with atomic(data.image_vectors(shard)) as f:
        np.save(f, images.astype(np.float16))
    with atomic(data.text_vectors(shard)) as f:
        np.save(f, texts.astype(np.float16))
    with atomic(data.metadata(shard)) as f:
        # image_path is clip-retrieval's name for the key
        metadata = table.add_column(0, "image_path", table["key"]).append_column("similarity", similarity)
        pq.write_table(metadata, f, compression="zstd")
    ended = time.time()
    commit(
        data.root,
        data.embedded_record(shard),
        config=config,
        inputs=inputs,
        outputs=[data.image_vectors(shard), data.text_vectors(shard), data.metadata(shard)],
        facts={
            "sample_count": len(captions),  # clip-retrieval's names
            "start_time": began,
            "end_time": ended,
            "batch_halved": bool(getattr(encoder, "halved", False)),
        },
    )
