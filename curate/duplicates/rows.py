"""What of each image is compared: digests of its bytes, its hashes, its caption, in one array a shard.

Images are numbered in the order of the ledger, by shard and row. A shard's array lies in `annotated/NAME/index/rows/`
and is made anew where the shard has changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.files import atomic
from aesthetic.hashes import hamming, hex_to_bits
from curate.duplicates.captions import normalised_caption
from curate.encoders.embed import images_of, vector_rows
from curate.layout import Data, shard_name
from curate.store.files import digest

Array = npt.NDArray[Any]

VERSION = 2
"""Raised whenever the search finds other groups from the same images."""

SHA, HASH, MIRROR, FLAT, CAPTION = 1, 2, 4, 8, 16
"""Bits of `known`: what an image has that can be compared. FLAT: there is nothing to see, so vectors say
nothing either."""

FLAT_ONES = 16
"""Fewer ones in the perceptual hash make an image flat. Measured: images of one colour, gradients and noise of a level
have 0 to 2; pages of text 26 and more, 317 photographs 25 and more, some of them too few for a hash to be compared."""


@dataclass(frozen=True, kw_only=True)
class Modes:
    """What makes two images near-duplicates, beside equal bytes; see the annotator's options."""

    phash: int | None = None
    pdq: int = 31
    cosine: float | None = None
    cosine_pdq: int | None = None
    captions: bool = False
    mirror: bool = False

    @property
    def hashes(self) -> bool:
        """Whether hashes are compared."""
        return self.phash is not None or self.cosine_pdq is not None

    @property
    def of_vectors(self) -> list[Any]:
        """What pairs of vectors depend on."""
        return [self.cosine, self.cosine_pdq, self.cosine_pdq is not None and self.mirror]

    def fields(self) -> np.dtype[Any]:
        """An image's entry in a shard's array; `mark` is a hash of its key."""
        fields: list[Any] = [("known", "u1"), ("mark", "<u8"), ("sha", "<u8", 2)]
        fields += [("phash", "<u8"), ("pdq", "<u8", 4)] if self.hashes else []
        fields += [("mirror_phash", "<u8"), ("mirror_pdq", "<u8", 4)] if self.mirror else []
        fields += [("caption", "<u8", 2)] if self.captions else []
        return np.dtype(fields)


@dataclass(frozen=True, kw_only=True)
class Table:
    """The shards that are compared, of one data folder.

    name: the entry, in whose index lies what is kept between runs.    counts: images of each shard.    inputs: a digest
    of the files that each shard is.    pdq: the entry of the annotator pdq.
    """

    data: Data
    name: str
    modes: Modes
    shards: tuple[int, ...]
    counts: tuple[int, ...]
    inputs: tuple[str, ...]
    pdq: str | None

    @property
    def index(self) -> Path:
        """The folder of what is kept between runs, in this process."""
        return self.data.index(self.name)

    def load(self, path: Path, *, mapped: bool = False) -> Array:
        """An array of a file in it."""
        return np.load(self.data.local(path), mmap_mode="r" if mapped else None)

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """The number of each shard's first image, and the number of images."""
        return np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])

    @property
    def digest(self) -> str:
        """Changes with whatever changes an image."""
        return digest([VERSION, self.shards, self.inputs])

    def rows(self, shard: int) -> Path:
        """The file of a shard's array."""
        return self.index / "rows" / f"{shard_name(shard)}.npy"

    def place(self, images: Array) -> tuple[Array, Array]:
        """Positions in `shards`, and rows, of images by number."""
        at = np.searchsorted(self.offsets, images, side="right") - 1
        return at, images - self.offsets[at]


def keep_array(data: Data, path: Path, make: Callable[[], Array], *, config: str, of: str = "") -> None:
    """Make an array, once: write it with a record beside it, unless a record of the same configuration is there, and
    of the same images (a digest)."""
    record, inputs = path.with_suffix(".json"), {"images": of}
    if data.is_done(record, config=config, inputs=inputs):
        return
    array = make()
    data.invalidate(record)
    with atomic(path) as f:
        np.save(f, array)
    data.commit(record, config=config, inputs=inputs, outputs=[path], facts={})


def make_rows(item: tuple[Table, int]) -> None:
    """A task: the entries of one shard (its position in `table.shards`)."""
    table, at = item
    shard, dtype = table.shards[at], table.modes.fields()
    config = digest([VERSION, dtype.descr])
    make = lambda: _entries(table, shard, dtype)  # noqa: E731
    keep_array(table.data, table.rows(shard), make, config=config, of=table.inputs[at])


def _entries(table: Table, shard: int, dtype: np.dtype[Any]) -> Array:
    import pandas as pd

    modes = table.modes
    rows = images_of(table.data, shard, ["key", "sha256", "phash", *(["caption"] if modes.captions else [])])
    found = np.zeros(len(rows), dtype)
    found["mark"] = pd.util.hash_array(np.array(rows["key"].to_pylist(), dtype=object), categorize=False)
    found["sha"], known = hex_to_bits([None if s is None else s[:32] for s in rows["sha256"].to_pylist()], 128)
    found["known"] |= np.where(known, SHA, 0).astype(np.uint8)
    digits: list[str | None] = rows["phash"].to_pylist()
    phash, usable = hex_to_bits(digits)
    flat = rows["phash"].is_valid().to_numpy() & ~hex_to_bits(digits, least=FLAT_ONES)[1]
    found["known"] |= np.where(flat, FLAT, 0).astype(np.uint8)
    if modes.captions:
        texts = map(normalised_caption, rows["caption"].to_pylist())
        hashes = [None if t is None else hashlib.blake2b(t.encode(), digest_size=16).hexdigest() for t in texts]
        found["caption"], known = hex_to_bits(hashes, 128)
        found["known"] |= np.where(known, CAPTION, 0).astype(np.uint8)
    if modes.hashes:
        assert table.pdq is not None
        pdq = pq.read_table(table.data.local(table.data.annotations(table.pdq, shard)))
        if not pdq["key"].equals(rows["key"]):
            raise UserError(f"{table.data.annotations(table.pdq, shard)} is of other images: annotate {table.pdq} anew")
        for prefix, bit, values in (
            ("", HASH, (phash, usable)),
            ("mirror_", MIRROR, hex_to_bits(_column(pdq, table.pdq, "mirror_phash")) if modes.mirror else None),
        ):
            if values is None:
                continue
            found[f"{prefix}phash"] = values[0]
            found[f"{prefix}pdq"], ok = hex_to_bits(_column(pdq, table.pdq, f"{prefix}hash"), 256)
            ok &= usable & values[1]
            found["known"] |= np.where(ok, bit, 0).astype(np.uint8)
    if modes.cosine is not None and (places := vector_rows(table.data, shard)) is not None:
        found["known"][places < 0] = FLAT  # what early rules left out is compared with nothing
    return found


def _column(table: pa.Table, entry: str, suffix: str) -> list[str | None]:
    return table[f"{entry}_{suffix}"].to_pylist()


def read_rows(table: Table, *fields: str) -> tuple[Array, ...]:
    """Fields of all images, in their order; the files of the shards are mapped, not read whole."""
    table.data.bring(*map(table.rows, table.shards))
    arrays = [np.load(table.rows(s), mmap_mode="r") for s in table.shards]
    empty = np.zeros(0, table.modes.fields())
    return tuple(np.concatenate([empty[f], *(a[f] for a in arrays)]) for f in fields)


def gather_rows(table: Table, images: Array) -> Array:
    """The entries of images by number, in ascending order."""
    at, rows = table.place(images)
    found = np.zeros(len(images), table.modes.fields())
    edges = np.searchsorted(at, np.arange(len(table.shards) + 1))
    for shard, low, high in zip(table.shards, edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if low < high:
            found[low:high] = table.load(table.rows(shard), mapped=True)[rows[low:high]]
    return found


def hashes_agree(table: Table, a: Array, b: Array) -> npt.NDArray[np.bool_]:
    """Whether PDQ hashes let images `a` and `b` (n,), whose vectors are near, be copies: all do without `cosine_pdq`.

    With `mirror` also that of a mirrored image of one of them. Images without a hash have no copies.
    """
    modes = table.modes
    if modes.cosine_pdq is None or not len(a):
        return np.ones(len(a), np.bool_)
    numbers, where = np.unique(np.concatenate([a, b]), return_inverse=True)
    found = gather_rows(table, numbers)
    one, other = found[where[: len(a)]], found[where[len(a) :]]
    agree = hamming(one["pdq"], other["pdq"]) <= modes.cosine_pdq
    agree &= (one["known"] & other["known"] & HASH) != 0
    if modes.mirror:
        mirrored = hamming(one["pdq"], other["mirror_pdq"]) <= modes.cosine_pdq
        agree |= mirrored & ((one["known"] & HASH) != 0) & ((other["known"] & MIRROR) != 0)
    return agree
