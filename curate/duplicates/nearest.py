"""How near the images of a shard come to those of a protected set: bits of their hashes, cosines of their vectors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.hashes import hex_to_bits
from aesthetic.neighbours import nearest, one_thread
from curate.duplicates.protected import LITTLE, Protected, load_protected
from curate.encoders.embed import images_of, take_vectors
from curate.layout import Data


@dataclass(frozen=True, eq=False)
class Nearest:
    """What is nearest to each of n images.

    bits: by which the nearest hash differs, (n,) int16; as many as a hash has where nothing can be compared.
    cosine: the largest, (n,) float32, NaN where vectors aren't compared, and where an image has none.
    index: which protected image that is, (n,) int64, -1 where it is none.
    unhashed: images that have no hash, because there is too little in them to see.
    """

    bits: np.ndarray
    cosine: np.ndarray
    index: np.ndarray
    unhashed: int


def compare_shard(
    data: Data, name: str, config: str, hashes: str | None, cosine: bool, within: int, shard: int
) -> Nearest:
    """A task: the images of one shard beside a protected set that was prepared (name, config).

    hashes: the column of the images' hashes, NAME_hash of a `pdq` entry or phash; None: they are not compared.
    within: bits up to which the image of the nearest hash is the nearest, whatever cosines say.

    Where one of two images has too little detail for PDQ, and the other has not much more, they are compared by the
    perceptual hash, of which a bit counts for four. An image without any hash, as flat ones are, is no copy of one that
    shows something: bits are as many as there are. Equal files are 0 bits apart in any case.
    """
    protected = load_protected(data, name, config)
    rows = images_of(data, shard, ["key", "sha256", "phash"])
    bits, index = np.full(len(rows), protected.bits, np.int64), np.full(len(rows), -1, np.int64)
    unhashed = 0
    if hashes == "phash":
        values, valid = hex_to_bits(rows["phash"].to_pylist())
        bits[valid], index[valid] = nearest_hashes(values[valid], protected.hashes, protected.hash_of)
        unhashed = int((~valid).sum())
    elif hashes is not None:
        bits, index, unhashed = _by_pdq(data, shard, rows, protected, hashes.removesuffix("_hash"))
    cosines = np.full(len(rows), np.nan, np.float32)
    if cosine and protected.vectors is not None:
        vectors = take_vectors(data, shard)
        assert len(vectors) == len(rows), f"shard {shard} has {len(rows)} images and {len(vectors)} vectors"
        place, largest = nearest(vectors, protected.vectors, 1)
        has = vectors.any(axis=1)
        cosines = np.where(has, np.clip(largest[:, 0], -1, 1), np.nan).astype(np.float32)
        index = np.where((bits <= within) | ~has, index, place[:, 0])
        data.release(data.image_vectors(shard))
    return Nearest(bits.astype(np.int16), cosines, index, unhashed)


def _by_pdq(
    data: Data, shard: int, rows: pa.Table, protected: Protected, entry: str
) -> tuple[np.ndarray, np.ndarray, int]:
    """Bits, index and unhashed of `Nearest`, by the PDQ hashes in the columns of an entry."""
    stored = pq.read_table(
        data.local(data.annotations(entry, shard)), columns=["key", f"{entry}_hash", f"{entry}_quality"]
    )
    assert stored["key"].equals(rows["key"]), f"annotated/{entry} holds other images than shard {shard}"
    bits, index = np.full(len(rows), protected.bits, np.int64), np.full(len(rows), -1, np.int64)
    values, valid = hex_to_bits(stored[f"{entry}_hash"].to_pylist(), 256)
    bits[valid], index[valid] = nearest_hashes(values[valid], protected.hashes, protected.hash_of)

    # where either lacks PDQ: ours beside all with little detail, or ours with little detail beside theirs that lack it
    phashes, shows = hex_to_bits(rows["phash"].to_pylist())
    little = valid & (stored[f"{entry}_quality"].to_numpy() < LITTLE)
    lacking = ~np.isin(protected.small_of, protected.hash_of)
    for ours, theirs in ((~valid & shows, np.ones(len(lacking), bool)), (little & shows, lacking)):
        some = np.flatnonzero(ours)
        apart, whose = nearest_hashes(phashes[some], protected.small[theirs], protected.small_of[theirs])
        nearer = 4 * apart < bits[some]
        bits[some[nearer]], index[some[nearer]] = 4 * apart[nearer], whose[nearer]

    same = pc.fill_null(pc.index_in(rows["sha256"], protected.sha256, skip_nulls=True), -1).to_numpy()
    bits[same >= 0], index[same >= 0] = 0, same[same >= 0]
    return bits, index, int((~valid).sum())


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
        with one_thread():  # tasks run beside each other
            apart, found = searcher.search(_as_bytes(values), 1)
        bits, index = apart[:, 0].astype(np.int64), whose[found[:, 0]]
    return bits, index


def _as_bytes(hashes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(hashes).view(np.uint8).reshape(len(hashes), -1)
