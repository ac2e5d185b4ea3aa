"""The images of a data folder that are nearly the same as an image somebody gives: by hashes of what they show.

Both `tastemaker why DATA IMAGE` and `remove --like IMAGE` ask here, and mean the same by "nearly".
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from aesthetic.chunks import thread_map
from aesthetic.errors import UserError
from aesthetic.hashes import MIN_ONES
from aesthetic.untrusted import open_vectors
from curate.ledger.counts import key_numbers
from curate.ledger.schema import RowError
from curate.ledger.view import LedgerTable
from curate.ledger.why import KeyShape
from curate.shards.tar import image_member, index_tar, read_range
from curate.store.files import read_table

if TYPE_CHECKING:
    from curate.images.config import ImagesConfig
    from curate.layout import Data

T = TypeVar("T")

Pixels = npt.NDArray[np.uint8]
"""(h, w, 3), RGB."""

NEAR_PDQ, NEAR_PHASH = 31, 7
"""Bits up to which two images are near: of PDQ's 256 as its authors have it, and of 64 where one of them has no PDQ
hash that says anything; there a bit counts for four, as when protected images are looked for."""
SAME_PHASH = 4
"""Of 64: near whatever PDQ says, as the columns of near-duplicates have it: PDQ looks at finer things, which a strong
compression of a small image takes away."""
LOOKED_AT = 12
"""Of 64: of what differs in no more, and has no PDQ hash in a column, that is made of the stored image. Copies at
another size or quality differ in 4 or fewer."""

_FILES = 256  # brought from an object store at a time
_BESIDE = 3  # images that are told where none is near
_ABSENT = 30_000  # bits: there is no hash


@dataclass(frozen=True, kw_only=True)
class Match:
    """A row that is meant, and by what; bits are those in which the hashes of two images differ."""

    key: str
    by: str
    near: bool = True  # no: nothing is near, and this is what comes nearest
    phash_bits: int | None = None  # of 64
    pdq_bits: int | None = None  # of 256
    cosine: float | None = None

    @property
    def apart(self) -> str:
        """How far it is from what was given, for people; nothing where that is not measured."""
        parts = [] if self.pdq_bits is None else [f"PDQ differs in {self.pdq_bits} of 256 bits"]
        parts += [] if self.phash_bits is None else [f"perceptual hash in {self.phash_bits} of 64"]
        return ", ".join(parts + ([] if self.cosine is None else [f"cosine {self.cosine:.3f}"]))


def same_bytes(found: Sequence[LedgerTable], file: bytes) -> list[Match]:
    """The rows whose original file had these bytes."""
    keys = keys_with(found[0], "sha256", hashlib.sha256(file).hexdigest())
    return [Match(key=key, by="sha256 of the original bytes") for key in keys]


def images_near(
    data: Data, found: Sequence[LedgerTable], file: bytes, images: ImagesConfig, most: int | None = None
) -> list[Match]:
    """The rows whose image is nearly that of a file, the nearest first, `most` of them at most; else the three that
    come nearest, which are not `near`. Cosines stand beside, where there are vectors and their encoder is here.

    Hashes are those of the pixels as they are stored: PDQ where a column has it or the perceptual hash proposes it,
    else the perceptual hash alone. images: how the data's images were made. RowError where the file is no image.
    """
    from curate.images.decode import decode
    from curate.images.process import process

    made = process(file, images)
    pixels = decode(made.data)
    matches = _by_hashes(data, found, made.phash, pixels, most)
    if not matches or (vector := _vector_of(data, pixels)) is None:
        return matches
    shape, cosines = KeyShape.of(found[0]), dict[str, float]()
    for shard in sorted({at[0] for match in matches if (at := shape.split(match.key))}):
        cosines |= _cosines_of(data, shard, vector)
    return [replace(match, cosine=cosines.get(match.key)) for match in matches]


def over_files(table: LedgerTable, columns: Sequence[str], work: Callable[[pa.Table], T]) -> Iterator[T]:
    """What `work` says of some columns of each file of a table, in order; null columns where a file lacks them."""

    def read(path: Any) -> T:
        rows = read_table(path, columns)
        for name in columns:
            if name not in rows.column_names:
                rows = rows.append_column(name, pa.nulls(len(rows), pa.string()))
        return work(rows)

    for start in range(0, len(table.files), _FILES):
        files = table.files[start : start + _FILES]
        table.data.bring(*files)
        yield from thread_map(read, files)


def keys_with(table: LedgerTable, column: str, value: str) -> list[str]:
    """The keys of the rows that have this value in a column."""

    def look(rows: pa.Table) -> list[str]:
        return rows.filter(pc.fill_null(pc.equal(rows[column], value), False))[table.key].to_pylist()

    return [key for keys in over_files(table, [table.key, column], look) for key in keys]


# --------------------------------------------------------------------------------------------------------------- hashes


def _by_hashes(data: Data, found: Sequence[LedgerTable], phash: str, pixels: Pixels, most: int | None) -> list[Match]:
    from curate.duplicates.pdq import MIN_QUALITY, pdq, to_hex

    own, quality = pdq(pixels)
    shape = KeyShape.of(found[0])
    keys, narrow = _distances(found[0], "phash", phash if _ones(phash) >= MIN_ONES else "", MIN_ONES)
    wide = np.full(len(keys), _ABSENT, np.int16)
    says = quality >= MIN_QUALITY  # else its hash is noise
    if says and len(keys) and (entry := _pdq_column(found)) is not None:
        theirs, bits = _distances(*entry, to_hex(own)[0])
        places = np.minimum(np.searchsorted(keys, theirs), len(keys) - 1)
        known = keys[places] == theirs
        wide[places[known]] = bits[known]
    key_of = lambda i: f"{int(keys[i]):0{5 + shape.digits}d}"  # noqa: E731
    if says:
        asked = np.flatnonzero((wide == _ABSENT) & (narrow <= LOOKED_AT))
        asked = asked[np.argsort(narrow[asked], kind="stable")][:most]
        bits_of = _stored_distances(data, shape, [key_of(i) for i in asked.tolist()], own)
        for i in asked.tolist():
            wide[i] = bits_of.get(key_of(i), _ABSENT)
    apart = np.where(wide != _ABSENT, wide, np.where(narrow != _ABSENT, 4 * narrow, _ABSENT))
    is_near = np.where(wide != _ABSENT, (wide <= NEAR_PDQ) | (narrow <= SAME_PHASH), narrow <= NEAR_PHASH)
    # what is near by PDQ comes before what only the other hash calls near
    order = np.lexsort((keys, apart, ~is_near))[: max(_BESIDE, min(most or len(keys), int(is_near.sum())))]
    matches = [
        Match(
            key=key_of(i),
            by="PDQ hash" if wide[i] != _ABSENT else "perceptual hash",
            near=bool(is_near[i]),
            phash_bits=int(narrow[i]) if narrow[i] != _ABSENT else None,
            pdq_bits=int(wide[i]) if wide[i] != _ABSENT else None,
        )
        for i in order.tolist()
        if apart[i] != _ABSENT
    ]
    return [m for m in matches if m.near] or matches


def _pdq_column(found: Sequence[LedgerTable]) -> tuple[LedgerTable, str] | None:
    """The table and the column of PDQ hashes, where there is one."""
    entry = next((t for t in found[1:] if t.facts[0].get("annotator") == "pdq"), None)
    column = "" if entry is None else f"{entry.name.rpartition('/')[2]}_hash"
    return (entry, column) if entry is not None and column in entry.columns else None


def _stored_distances(data: Data, shape: KeyShape, keys: Sequence[str], own: npt.NDArray[np.uint8]) -> dict[str, int]:
    """In how many bits of PDQ stored images differ from a hash; not of those whose own hash says nothing."""
    from curate.duplicates.pdq import MIN_QUALITY, pdq
    from curate.images.decode import decode

    shards, bits = dict[int, list[str]](), dict[str, int]()
    for key in keys:
        if (at := shape.split(key)) is not None:
            shards.setdefault(at[0], []).append(key)
    for shard, wanted in sorted(shards.items()):
        if not data.exists(data.tar(shard)):
            continue
        tar = data.local(data.tar(shard))
        index = index_tar(tar)
        with open(tar, "rb") as f:
            for key in wanted:
                if (member := image_member(index.get(key, {}))) is None:
                    continue
                with contextlib.suppress(RowError):  # a damaged one: `verify` says so
                    theirs, quality = pdq(decode(read_range(f, member[1])))
                    if quality >= MIN_QUALITY:
                        bits[key] = int(np.bitwise_count(theirs ^ own).sum())
    return bits


_NIBBLES = np.full(256, 255, np.uint8)
_NIBBLES[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
_NIBBLES[np.frombuffer(b"ABCDEF", np.uint8)] = np.arange(10, 16)


def _distances(
    table: LedgerTable, column: str, own: str, least: int = 0
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int16]]:
    """The keys of a table in their order, as numbers, and in how many bits the hash of each differs from `own`, both in
    hex; `_ABSENT` where there is none, or one of fewer than `least` ones."""
    wanted = _NIBBLES[np.frombuffer(own.encode(), np.uint8)]

    def look(rows: pa.Table) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int16]]:
        bits = np.full(len(rows), _ABSENT, np.int16)
        values = rows[column].cast(pa.string())
        there = pc.fill_null(pc.equal(pc.binary_length(values), len(own)), False).to_numpy()
        if own and there.any():
            text = "".join(values.filter(pa.array(there)).to_pylist()).encode()
            nibbles = _NIBBLES[np.frombuffer(text, np.uint8)].reshape(-1, len(own))
            good = (nibbles < 16).all(1) & (np.bitwise_count(nibbles).sum(1) >= least)
            apart = np.bitwise_count(nibbles ^ wanted).sum(1)
            bits[there] = np.where(good, apart, _ABSENT)
        return key_numbers(rows[table.key]), bits

    parts = [*over_files(table, [table.key, column], look)]
    keys, bits = (np.concatenate(both) for both in zip(*parts, strict=True))
    order = np.argsort(keys, kind="stable")
    return keys[order], bits[order]


def _ones(phash: str) -> int:
    return int(phash, 16).bit_count()


# -------------------------------------------------------------------------------------------------------------- vectors


def _vector_of(data: Data, image: Pixels) -> npt.NDArray[np.float32] | None:
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


def _cosines_of(data: Data, shard: int, vector: npt.NDArray[np.float32]) -> dict[str, float]:
    """The cosine of a vector to that of each image of a shard, by key; nothing where there are none."""
    if not data.exists(data.embedded_record(shard)):
        return {}
    keys = read_table(data.local(data.metadata(shard)), ["key"])["key"].to_pylist()
    vectors = np.asarray(open_vectors(data.local(data.image_vectors(shard))), np.float32)
    return dict(zip(keys, (vectors @ vector).tolist(), strict=True)) if vectors.shape[1:] == vector.shape else {}
