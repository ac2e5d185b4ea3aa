"""The images of a data folder that are nearly the same as an image somebody gives: by bytes, hashes and vectors."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aesthetic.errors import UserError
from aesthetic.hashes import hamming, hex_to_bits
from aesthetic.untrusted import open_vectors, read_bytes
from curate.duplicates.pdq import pdq
from curate.images.config import ImagesConfig
from curate.images.decode import decode
from curate.images.process import process
from curate.ledger.schema import RowError, Status
from curate.ledger.view import tables
from curate.shards.tar import image_member, index_tar, read_range
from curate.store.files import read_table

if TYPE_CHECKING:
    from curate.layout import Data

PHASH_BITS = 12
"""Of 64: what differs in no more is looked at. Copies at another size or quality differ in 4 or fewer."""
COSINE = 0.9
"""What is at least so near is looked at, too, where there are vectors: hashes do not find all that was cropped."""
PDQ_BITS = 31
"""Of 256: Meta's threshold of a match, which decides of all that was looked at."""


@dataclass(frozen=True)
class Alike:
    """An image that is nearly the same."""

    key: str
    url: str | None
    bits: int  # of PDQ's 256 that differ
    cosine: float | None
    same: bool  # the same original bytes


def images_like(data: Data, path: Path) -> list[Alike]:
    """The images within 31 bits of PDQ of an image file, or of the same bytes, the nearest first.

    Looked at is what its perceptual hash or, where its encoder is here, its vector proposes. UserError where the file
    is no image, or nothing is fetched.
    """
    body = read_bytes(path)
    try:
        image = decode(body)
        processed = process(body, ImagesConfig())
    except RowError as e:
        raise UserError(f"{path}: {e.detail or e.reason}") from None
    sha256, hashed = processed.sha256, pdq(image)[0]
    ours, there = hex_to_bits([processed.phash])
    vector = vector_of(data, image)
    found = []
    fetched = tables(data)[0]
    for shard, file in zip(fetched.shards, fetched.files, strict=True):
        rows = read_table(data.local(file))
        keys, statuses, urls, digests, hashes = (
            rows[n].to_pylist() if n in rows.column_names else [None] * len(rows)
            for n in ("key", "status", "url", "sha256", "phash")
        )
        bits, valid = hex_to_bits(hashes)
        near = valid & there[0] & (hamming(bits, ours[0]) <= PHASH_BITS)
        cosines = cosines_of(data, shard, vector)
        wanted = {
            key: (url, digest == sha256)
            for key, status, url, digest, close in zip(keys, statuses, urls, digests, near, strict=True)
            if status == Status.SUCCESS and (close or digest == sha256 or cosines.get(key, -1) >= COSINE)
        }
        if wanted:
            for key, distance in _distances(data, shard, wanted, hashed):
                url, same = wanted[key]
                if same or distance <= PDQ_BITS:
                    found.append(Alike(key, url, distance, cosines.get(key), same))
    return sorted(found, key=lambda one: (not one.same, one.bits, one.key))


def _distances(data: Data, shard: int, keys: Collection[str], hashed: np.ndarray) -> Iterator[tuple[str, int]]:
    """In how many bits of PDQ stored images differ from a hash."""
    tar = data.local(data.tar(shard))
    index = index_tar(tar)
    with open(tar, "rb") as f:
        for key in keys:
            if (member := image_member(index.get(key, {}))) is not None:
                yield key, int(np.bitwise_count(pdq(decode(read_range(f, member[1])))[0] ^ hashed).sum())


def vector_of(data: Data, image: np.ndarray) -> np.ndarray | None:
    """The image in the space of the data folder's vectors; None where there are none, or their encoder isn't here."""
    from aesthetic.space import Space
    from curate.encoders.registry import check_available, load_encoder

    if not data.exists(data.space):
        return None
    with contextlib.suppress(UserError, ImportError, OSError):
        name = Space.load(data.local(data.space)).encoder
        if not check_available(name):
            return None
        encoder = load_encoder(name)
        return np.asarray(encoder.encode_images([image])[0], np.float32)
    return None


def cosines_of(data: Data, shard: int, vector: np.ndarray | None) -> dict[str, float]:
    """The cosine of a vector to that of each image of a shard, by key; nothing where there are none."""
    if vector is None or not data.exists(data.embedded_record(shard)):
        return {}
    keys = read_table(data.local(data.metadata(shard)), ["key"])["key"].to_pylist()
    vectors = np.asarray(open_vectors(data.local(data.image_vectors(shard))), np.float32)
    return dict(zip(keys, (vectors @ vector).tolist(), strict=True)) if vectors.shape[1:] == vector.shape else {}
