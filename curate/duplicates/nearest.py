"""How near the images of a shard come to those of a protected set: bits of their hashes, cosines of their vectors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.hashes import hex_to_bits
from aesthetic.neighbours import nearest
from aesthetic.untrusted import open_vectors
from curate.duplicates.protected import Protected, load_protected
from curate.encoders.embed import images_of
from curate.layout import Data


@dataclass(frozen=True, eq=False)
class Nearest:
    """What is nearest to each of n images.

    bits: by which the nearest hash differs, (n,) int16; as many as a hash has where nothing can be compared.
    cosine: the largest, (n,) float32, NaN where vectors aren't compared.
    index: which protected image that is, (n,) int64, -1 where it is none.
    unhashed: images that have no hash, because there is too little in them to see.
    """

    bits: np.ndarray
    cosine: np.ndarray
    index: np.ndarray
    unhashed: int


def compare_shard(
    data: Data, folder: Path, config: str, hashes: str | None, cosine: bool, within: int, shard: int
) -> Nearest:
    """A task: the images of one shard beside a protected set that was prepared (folder, config).

    hashes: the column of the images' hashes, NAME_hash of a `pdq` entry or phash; None: they are not compared.
    within: bits up to which the image of the nearest hash is the nearest, whatever cosines say.

    An image without a hash, flat ones mostly, is no copy of one that has a hash: bits are as many as there are. With
    images of the set that have none either it is compared by the perceptual hash, of which a bit counts for four.
    Equal files are 0 bits apart in any case.
    """
    protected = load_protected(folder, config)
    rows = images_of(data, shard, ["key", "sha256", "phash"])
    bits, index = np.full(len(rows), protected.bits, np.int64), np.full(len(rows), -1, np.int64)
    unhashed = 0
    if hashes is not None:
        phashes, has_phash = hex_to_bits(rows["phash"].to_pylist())
        values, valid = phashes, has_phash
        if hashes != "phash":
            entry = hashes.removesuffix("_hash")
            stored = pq.read_table(data.annotations(entry, shard), columns=["key", hashes])
            assert stored["key"].equals(rows["key"]), f"annotated/{entry} holds other images than shard {shard}"
            values, valid = hex_to_bits(stored[hashes].to_pylist(), 256)
            small = np.flatnonzero(~valid & has_phash)
            apart, index[small] = nearest_hashes(phashes[small], protected.small, protected.small_of)
            bits[small] = np.minimum(4 * apart, protected.bits)
        unhashed = int((~valid).sum())
        bits[valid], index[valid] = nearest_hashes(values[valid], protected.hashes, protected.hash_of)
        same = _equal_files(rows["sha256"], protected)
        bits[same >= 0], index[same >= 0] = 0, same[same >= 0]

    cosines = np.full(len(rows), np.nan, np.float32)
    if cosine and protected.vectors is not None:
        vectors = open_vectors(data.image_vectors(shard))
        assert len(vectors) == len(rows), f"shard {shard} has {len(rows)} images and {len(vectors)} vectors"
        place, largest = nearest(vectors, protected.vectors, 1)
        cosines = np.clip(largest[:, 0], -1, 1)
        index = np.where(bits <= within, index, place[:, 0])
    return Nearest(bits.astype(np.int16), cosines, index, unhashed)


def _equal_files(sha256: pa.ChunkedArray, protected: Protected) -> np.ndarray:
    """Which protected image is the same file as each image, (n,) int64; -1 where none is."""
    return pc.fill_null(pc.index_in(sha256, protected.sha256, skip_nulls=True), -1).to_numpy().astype(np.int64)


def nearest_hashes(values: np.ndarray, others: np.ndarray, whose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By how many bits the nearest of the others differs from each hash, (n,) int64, and `whose` (m,) it is; of equally
    near ones that of the first. All bits, and -1, where there are no others.

    Values (n, 4) or (n,) uint64, and others alike. Exact. On one core a million against 40,000, which are 5,000 images
    with eight hashes each, take 31 s.
    """
    import faiss

    width = 8 * others[:1].nbytes if len(others) else 64 * (values.size // max(1, len(values)))
    bits, index = np.full(len(values), width), np.full(len(values), -1)
    if len(values) and len(others):
        searcher = faiss.IndexBinaryFlat(width)
        searcher.add(_as_bytes(others))
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)  # of this thread: tasks run beside each other
        try:
            apart, found = searcher.search(_as_bytes(values), 1)
        finally:
            faiss.omp_set_num_threads(threads)
        bits, index = apart[:, 0].astype(np.int64), whose[found[:, 0]]
    return bits, index


def _as_bytes(hashes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(hashes).view(np.uint8).reshape(len(hashes), -1)
