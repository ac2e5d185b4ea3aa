"""Data folders of made-up images for the search of near-duplicates: tables, vectors and hashes, no pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.files import atomic
from curate.annotators.base import Spec
from curate.annotators.registry import make_annotator, make_annotators
from curate.annotators.stage import annotate_table
from curate.images.config import ImagesConfig
from curate.layout import Data
from curate.ledger.schema import fetched_schema, make_key
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan

Array = npt.NDArray[Any]


def plan_near(root: Path, images: int, shard_size: int) -> Data:
    """A data folder with the plan of a list of so many rows, and nothing fetched."""
    root.mkdir(parents=True)
    urls = pa.array([f"http://example.com/{i}.jpg" for i in range(images)])
    pq.write_table(pa.table({"url": urls}), root / "list.parquet")
    data = Data(root / "data")
    make_plan(str(root / "list.parquet"), data, SourceConfig(shard_size=shard_size, caption=None))
    return data


def write_near(
    data: Data,
    shard: int,
    shard_size: int,
    *,
    sha256: Sequence[str] | None = None,
    vectors: Array | None = None,
    phash: Array | None = None,
    pdq: Array | None = None,
    mirror_phash: Array | None = None,
    mirror_pdq: Array | None = None,
    captions: Sequence[str | None] | None = None,
) -> None:
    """Write and commit one fetched shard, and what else there is of its images: vectors (n, d), hashes as uint64 (n,)
    and (n, 4). Images have bytes of their own unless `sha256` says otherwise."""
    given = [x for x in (sha256, vectors, phash, captions) if x is not None]
    n = len(given[0])
    keys = [make_key(shard, row, shard_size) for row in range(n)]
    columns = dict.fromkeys(fetched_schema(pa.schema([])).names)
    texts = list(captions) if captions is not None else [None] * n
    columns |= {
        "url": [f"http://example.com/{key}.jpg" for key in keys],
        "caption": texts,
        "key": keys,
        "status": ["success"] * n,
        "width": [64] * n,
        "height": [64] * n,
        "sha256": list(sha256) if sha256 is not None else [f"{int(key) + 1:064x}"[::-1] for key in keys],
        "phash": hex_of(phash) if phash is not None else None,
    }
    schema = fetched_schema(pa.schema([]))
    table = pa.table([pa.array(columns[f.name] or [None] * n, f.type) for f in schema], schema=schema)
    data.invalidate(data.fetched_record(shard))
    _write(data.table(shard), table)
    fetched = data.commit(
        data.fetched_record(shard),
        config="c",
        inputs={},
        outputs=[data.table(shard)],
        facts={"count": n, "successes": n},
    )
    inputs = {name: fact["sha256"] for name, fact in fetched["outputs"].items()}
    if vectors is not None:
        with atomic(data.image_vectors(shard)) as f:
            np.save(f, vectors.astype(np.float16))
        metadata = {"image_path": keys, "caption": pa.array(texts, pa.string()), "key": keys}
        _write(data.metadata(shard), pa.table({**metadata, "similarity": pa.nulls(n, pa.float32())}))
        data.commit(
            data.embedded_record(shard),
            config="c",
            inputs=inputs,
            outputs=[data.image_vectors(shard), data.metadata(shard)],
            facts={},
        )
    if pdq is not None:
        mirror = mirror_pdq is not None and mirror_phash is not None
        found = {"key": keys, "pdq_hash": hex_of(pdq), "pdq_quality": pa.array([100] * n, pa.int32())}
        if mirror_pdq is not None and mirror_phash is not None:
            found |= {"pdq_mirror_hash": hex_of(mirror_pdq), "pdq_mirror_phash": hex_of(mirror_phash)}
        _write(data.annotations("pdq", shard), pa.table(found))
        annotator = make_annotator("pdq", {"use": "pdq", "mirror": mirror})
        data.commit(
            data.annotations_record("pdq", shard),
            config=annotator.digest,
            inputs=inputs,
            outputs=[data.annotations("pdq", shard)],
            facts={"annotator": "pdq"},
        )


def _write(path: Path, table: pa.Table) -> None:
    with atomic(path) as f:
        pq.write_table(table, f)


def hex_of(hashes: Array) -> list[str]:
    """uint64 (n,) or (n, 4) as hex digits."""
    words = hashes.reshape(len(hashes), -1)
    return [h.hex() for h in words.astype(">u8").view(f"V{8 * words.shape[1]}").ravel().tolist()]


def search(
    data: Data,
    *,
    map: Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]] = map,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> None:
    """Compute the columns `dup` of a data folder, in this process unless `map` does otherwise."""
    columns: Mapping[str, Spec] = {"dup": {"use": "near-duplicates", **options}}
    if "phash" in options or "cosine_pdq" in options:
        columns = {**columns, "pdq": {"use": "pdq", "mirror": options.get("mirror", False)}}

    def no_encoder() -> Any:
        raise AssertionError("a search encodes nothing")

    annotators = make_annotators(columns)
    annotate_table(data, "dup", annotators, encoder=no_encoder, images=ImagesConfig(), map=map, say=say)


def found(data: Data, shards: Iterable[int]) -> pa.Table:
    """The columns of some shards, one after the other."""
    return pa.concat_tables([pq.read_table(data.annotations("dup", shard)) for shard in shards])


def unit(vectors: Array) -> Array:
    """Rows of unit length, float16."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def with_neighbours(rng: np.random.Generator, images: int, dim: int, cosine: float, share: float) -> Array:
    """Unit vectors around some topics, of which a share lie at about this cosine from one before: (images, dim)."""
    topics = rng.standard_normal((max(2, images // 100), dim))
    own = rng.standard_normal((images, dim))
    x = topics[rng.integers(0, len(topics), images)] + own
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    of = rng.integers(0, images, images)
    copies = np.flatnonzero((rng.random(images) < share) & (of < np.arange(images)))
    noise = rng.standard_normal((len(copies), dim))
    source = x[of[copies]]
    noise -= (noise * source).sum(1, keepdims=True) * source
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    x[copies] = cosine * source + np.sqrt(1 - cosine**2) * noise
    return unit(x)
