"""The embed stage of one shard: its images -> vectors, similarity and detector scores, decoding each image once.

Files are clip-retrieval's: `img_emb/img_emb_NNNNN.npy` and `text_emb/...` hold fp16 unit rows, exactly one for each
fetched image, in ledger order; a missing caption is a row of zeros and a null similarity. Batches are cut at fixed
rows of the shard, so the same shard gives the same bytes whoever computes it. After a retry only the images that it
recovered go through the models, in batches of their own; the rows of the others stay as they are.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.files import atomic
from curate.annotators.heads import write_scores
from curate.annotators.nsfw import Detector, detector_digest
from curate.encoders.base import Encoder, check_settings
from curate.fetch.ingest import Report, note_start, recovered_since
from curate.images.decode import decode
from curate.layout import Data
from curate.ledger.schema import Status
from curate.shards.tar import read_images
from curate.store.disk import check_space
from curate.store.files import read_json
from curate.store.records import commit, invalidate, is_done, outputs_present, recommit


class EndsItsProcess(Exception):
    """A shard whose embedding has killed its process again and again."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Which encoder, and how it runs."""

    encoder: str = "open_clip:ViT-L-14-quickgelu/openai"
    weights: str | None = None  # a local copy of the encoder's weights, where the hub is out of reach
    precision: str | None = None  # fp32, bf16 or fp16; default: fp32 on CPU and MPS, fp16 on CUDA
    embeddings: str | None = None  # a clip-retrieval folder of this encoder's vectors, taken in place of the stage

    def __post_init__(self) -> None:
        check_settings(self.encoder, self.weights, self.precision)


STARTS = 3
"""How often a run begins to embed a shard. Its pictures have been decoded before: what ends the process each time is
no single picture, and whoever restarts it would do so for ever."""

_DETECTED_AT_ONCE = 32  # pictures of a batch where only detectors run


def embed_shard(
    data: Data,
    shard: int,
    *,
    encoder: Encoder | None,
    config: str,
    detectors: Mapping[str, Detector],
    threads: Executor,
    report: Report,
) -> None:
    """Embed one fetched shard and run the detectors (column -> detector) on it; what is done is left alone.

    Without an encoder only the detectors run: the vectors are imported (curate.sources.vectors).
    """
    inputs = data.fetched_digests(shard)
    assert inputs is not None, f"shard {shard} is embedded before it is fetched"
    records = {column: data.scores_record(column, shard) for column in detectors} | {"": data.embedded_record(shard)}
    configs = {column: detector_digest(d.name) for column, d in detectors.items()} | {"": config}
    models: dict[str, Any] = {**detectors} if encoder is None else {"": encoder, **detectors}
    for name in list(models):
        if is_done(data.root, records[name], config=configs[name], inputs=inputs):
            del models[name]
        elif recovered(data, shard, records[name], configs[name]) == set():  # a retry that changed nothing but reasons
            recommit(data.root, records[name], inputs)
            del models[name]
    if not models:
        return
    check_space(data.root)
    if (starts := note_start(data.embed_starts(shard))) > STARTS:
        raise EndsItsProcess(
            f"embedding shard {shard:05d} has ended its process {starts - 1} times: out of memory, or a crash in a "
            f"library. {data.logs / 'embed.log'} or the system's log may say why; all that is done stays done."
        )
    began = time.time()
    table = pictures_of(data, shard)
    added = [recovered(data, shard, records[name], configs[name]) for name in models]
    some = None if None in added else set[str]().union(*(keys for keys in added if keys is not None))
    fresh = table if some is None else table.filter(pa.compute.is_in(table["key"], pa.array(sorted(some))))
    keys = fresh["key"].to_pylist()

    # one pass over the pixels, in batches that do not depend on what else is wanted (detectors cut them as they like)
    size = encoder.batch_size if encoder is not None else _DETECTED_AT_ONCE
    results: dict[str, list[np.ndarray]] = {name: [] for name in models}
    for batch in _prepared(data, shard, keys, models, size, threads):
        for name, model in models.items():
            run = model.encode_prepared if name == "" else model.score_prepared
            results[name].append(run(batch[name]))
        for _ in batch[next(iter(models))]:
            report("embed", Status.SUCCESS, "")

    def whole(values: Any, file: Path, column: str | None = None) -> list[Any]:
        """A value for each picture of the shard: those just made, and for the others what the file holds."""
        there = {} if some is None else _values(data, shard, file, column)
        there.update(zip(keys, values, strict=True))
        return [there[key] for key in table["key"].to_pylist()]

    for column, detector in models.items():
        if column != "":
            scores = whole(_stacked(results[column], (0,)), data.scores(column, shard), column)
            write_scores(
                data,
                shard,
                column,
                table["key"],
                np.array(scores, np.float32),
                config=configs[column],
                inputs=inputs,
                facts={"detector": detector.name, "scale": list(detector.scale)},
            )
    if "" in models:
        assert encoder is not None
        images, captions = _stacked(results[""], (0, encoder.dim)), fresh["caption"].to_pylist()
        texts = _caption_vectors(captions, encoder)
        similarity = whole(_similarity(captions, images, texts).to_pylist(), data.metadata(shard), "similarity")
        images, texts = (
            np.array(whole(vectors, file), np.float32).reshape(-1, encoder.dim)
            for vectors, file in ((images, data.image_vectors(shard)), (texts, data.text_vectors(shard)))
        )
        write_vectors(
            data,
            shard,
            table,
            images,
            texts,
            pa.array(similarity, pa.float32()),
            config=config,
            inputs=inputs,
            facts={"batch_halved": encoder.halved},
            began=began,
        )
    data.embed_starts(shard).unlink(missing_ok=True)


def recovered(data: Data, shard: int, record: Path, config: str) -> set[str] | None:
    """Keys of the pictures that retries added since this record of vectors or scores was written; the others are the
    same. None where it is another configuration's, or its pictures are others."""
    value = read_json(record)
    if not isinstance(value, dict) or value.get("config") != config or not outputs_present(data.root, value):
        return None
    keys = recovered_since(data, shard, value["inputs"])
    return None if keys is None else set(keys)


def _values(data: Data, shard: int, file: Path, column: str | None) -> dict[str, Any]:
    """key -> what a file of the shard holds: rows of vectors, or a column of a table."""
    if column is not None:
        table = pq.read_table(file, columns=["key", column])
        return dict(zip(table["key"].to_pylist(), table[column].to_pylist(), strict=True))
    keys = pq.read_table(data.metadata(shard), columns=["key"])["key"].to_pylist()
    return dict(zip(keys, np.load(file, allow_pickle=False).astype(np.float32), strict=True))


def pictures_of(data: Data, shard: int) -> pa.Table:
    """Key and caption of a fetched shard's pictures: the rows with status success, in the order of the ledger."""
    table = pq.read_table(data.table(shard), columns=["key", "caption", "status"])
    return table.filter(pa.compute.equal(table["status"], Status.SUCCESS.value)).drop_columns(["status"])


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
    wanted = set(keys)
    stored = (image for image in read_images(data.tar(shard)) if image[0] in wanted)
    for start in range(0, len(keys), size):
        count = min(size, len(keys) - start)
        while len(ahead) < 3 * size and (item := next(stored, None)) is not None:
            ahead.append(threads.submit(prepare, item[2]))
        rows = [ahead.popleft().result() for _ in range(count)]
        yield {name: np.stack([r[name] for r in rows]) for name in models}
    assert not ahead and next(stored, None) is None, f"{data.tar(shard)} holds more images than its table"


def _caption_vectors(captions: list[str | None], encoder: Encoder) -> np.ndarray:
    """The captions' vectors: (n, dim) float32, zeros where there is no caption."""
    texts = np.zeros((len(captions), encoder.dim), np.float32)
    told = [i for i, caption in enumerate(captions) if _says_something(caption)]
    for start in range(0, len(told), encoder.batch_size):
        part = told[start : start + encoder.batch_size]
        texts[part] = encoder.encode_texts([captions[i] or "" for i in part])
    return texts


def _says_something(caption: str | None) -> bool:
    return caption is not None and bool(caption.strip())


def _told(captions: list[str | None]) -> np.ndarray:
    return np.array([_says_something(caption) for caption in captions], bool)


def _similarity(captions: list[str | None], images: np.ndarray, texts: np.ndarray | None) -> pa.Array:
    """The cosine of each picture and its caption; null where there is no caption, or its vector is zeros."""
    if texts is None:
        return pa.nulls(len(images), pa.float32())
    texts = np.where(_told(captions)[:, None], texts, np.float32(0))
    return pa.array(np.einsum("nd,nd->n", images, texts), pa.float32(), mask=~texts.any(axis=1))


def write_vectors(
    data: Data,
    shard: int,
    table: pa.Table,
    images: np.ndarray,
    texts: np.ndarray | None,
    similarity: pa.Array | None = None,
    *,
    config: str,
    inputs: dict[str, str],
    facts: dict[str, Any],
    began: float,
) -> None:
    """Write and commit one shard of `embedded/`: unit vectors (n, dim) of the pictures in `table`, and of captions.

    Rows of `texts` that are zero, and those of empty captions, have no similarity; without `texts` none has.
    """
    captions = table["caption"].to_pylist()
    if texts is not None:
        texts = np.where(_told(captions)[:, None], texts, np.float32(0))
    if similarity is None:
        similarity = _similarity(captions, images, texts)
    stored = {data.image_vectors(shard): images} | ({data.text_vectors(shard): texts} if texts is not None else {})
    for path, vectors in stored.items():
        if not np.isfinite(vectors).all():
            bad = table["key"][int(np.argmin(np.isfinite(vectors).all(axis=1)))]
            raise ValueError(f"{path.name}: the vector of {bad} is not finite")

    invalidate(data.embedded_record(shard))
    data.text_vectors(shard).unlink(missing_ok=True)  # of a run that had them
    for path, vectors in stored.items():
        with atomic(path) as f:
            np.save(f, vectors.astype(np.float16))
    with atomic(data.metadata(shard)) as f:
        # image_path is clip-retrieval's name for the key
        metadata = table.add_column(0, "image_path", table["key"]).append_column("similarity", similarity)
        pq.write_table(metadata, f, compression="zstd")
    commit(
        data.root,
        data.embedded_record(shard),
        config=config,
        inputs=inputs,
        outputs=[*stored, data.metadata(shard)],
        facts={"sample_count": len(images), "start_time": began, "end_time": time.time(), **facts},  # clip-retrieval's
    )
