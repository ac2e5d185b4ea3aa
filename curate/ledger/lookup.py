"""Which rows of a data folder are meant: by a key, by a URL, by an image file.

by_key(found, "000010005");  by_url(found, "https://example.com/a.jpg");  by_image(data, found, file, images)

Each takes one pass over the columns that it compares, a few files at a time, on all cores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from aesthetic.chunks import thread_map
from aesthetic.hashes import MIN_ONES
from curate.ledger.alike import cosines_of, vector_of
from curate.ledger.counts import key_numbers
from curate.ledger.view import LedgerTable
from curate.ledger.whereabouts import stored_image
from curate.ledger.why import KeyShape
from curate.store.files import read_table

if TYPE_CHECKING:
    from curate.images.config import ImagesConfig
    from curate.layout import Data

T = TypeVar("T")

Pixels = npt.NDArray[np.uint8]
"""(h, w, 3), RGB."""

NEAR_PDQ, NEAR_PHASH = 31, 7
"""Bits up to which two images are near: of PDQ's 256 as its authors have it, and of 64 where one of them has no PDQ
hash; there a bit counts for four, as when protected images are looked for."""

_FILES = 256  # brought from an object store at a time
_BESIDE = 3  # images that are told where none is near
_MOST = 100  # images that are told where many are


@dataclass(frozen=True, kw_only=True)
class Match:
    """A row that is meant, and by what; bits are those in which the hashes of two images differ."""

    key: str
    by: str
    near: bool = True  # no: nothing is near, and this is what comes nearest
    phash_bits: int | None = None  # of 64
    pdq_bits: int | None = None  # of 256
    cosine: float | None = None


def by_url(found: Sequence[LedgerTable], url: str) -> list[Match]:
    """The rows with this URL; else those that differ from it in the fragment alone; else those that were redirected to
    it. In the order of keys."""
    start = url.partition("#")[0]

    def look(rows: pa.Table) -> list[tuple[str, str]]:
        alike = rows.filter(pc.fill_null(pc.starts_with(rows["url"], start), False))
        urls = alike["url"].to_pylist()
        return [(k, u) for k, u in zip(alike["key"].to_pylist(), urls, strict=True) if u.partition("#")[0] == start]

    alike = [pair for pairs in over_files(found[0], ["key", "url"], look) for pair in pairs]
    if exact := [Match(key=key, by="url") for key, its in alike if its == url]:
        return exact
    if alike:
        return [Match(key=key, by="url without its fragment") for key, _ in alike]
    return [Match(key=key, by="url after redirects") for key in _equal(found[0], "final_url", start)]


def by_image(data: Data, found: Sequence[LedgerTable], file: bytes, images: ImagesConfig) -> list[Match]:
    """The rows whose image a file is: by the sha256 of the original bytes; else by its stored bytes; else those that
    are near by PDQ or the perceptual hash, the nearest first; else what comes nearest, which is not `near`.

    RowError where a file that no row has is no image.
    """
    if same := _equal(found[0], "sha256", hashlib.sha256(file).hexdigest()):
        return [Match(key=key, by="sha256 of the original bytes") for key in same]
    near, pixels = _by_hashes(found, file, images)
    near = _with_cosines(data, found, near, pixels)
    copies = []
    for match in near:
        at = KeyShape.of(found[0]).split(match.key) if match.near else None
        stored = stored_image(data, match.key, at[0]) if at else None
        if stored is not None and stored.sha256 == hashlib.sha256(file).hexdigest():
            copies.append(replace(match, by="sha256 of the stored image"))
    return copies or near


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


def _equal(table: LedgerTable, column: str, value: str) -> list[str]:
    """The keys of the rows that have this value in a column."""

    def look(rows: pa.Table) -> list[str]:
        return rows.filter(pc.fill_null(pc.equal(rows[column], value), False))[table.key].to_pylist()

    return [key for keys in over_files(table, [table.key, column], look) for key in keys]


# --------------------------------------------------------------------------------------------------------------- images


def _with_cosines(data: Data, found: Sequence[LedgerTable], matches: list[Match], pixels: Pixels) -> list[Match]:
    """These with their cosines to the image, where there are vectors and the encoder that made them is here."""
    if not matches or (vector := vector_of(data, pixels)) is None:
        return matches
    shape, cosines = KeyShape.of(found[0]), dict[str, float]()
    for shard in sorted({at[0] for match in matches if (at := shape.split(match.key))}):
        cosines |= cosines_of(data, shard, vector)
    return [replace(match, cosine=cosines.get(match.key)) for match in matches]


def _by_hashes(found: Sequence[LedgerTable], file: bytes, images: ImagesConfig) -> tuple[list[Match], Pixels]:
    """The nearest rows by the hashes that tables have of the pixels as they are stored, and the file's such pixels."""
    from curate.duplicates.pdq import MIN_QUALITY, pdq, to_hex
    from curate.images.decode import decode
    from curate.images.process import process

    made = process(file, images)
    pixels = decode(made.data)
    own, quality = pdq(pixels)
    keys, phash = _distances(found[0], "phash", made.phash if _ones(made.phash) >= MIN_ONES else "", MIN_ONES)
    wide = np.full(len(keys), _ABSENT, np.int16)
    entry = next((t for t in found[1:] if t.facts[0].get("annotator") == "pdq"), None)
    column = "" if entry is None else f"{entry.name.rpartition('/')[2]}_hash"
    if entry is not None and column in entry.columns and quality >= MIN_QUALITY and len(keys):
        theirs, bits = _distances(entry, column, to_hex(own)[0])
        places = np.minimum(np.searchsorted(keys, theirs), len(keys) - 1)
        known = keys[places] == theirs
        wide[places[known]] = bits[known]
    apart = np.where(wide != _ABSENT, wide, np.where(phash != _ABSENT, 4 * phash, _ABSENT))
    is_near = np.where(wide != _ABSENT, wide <= NEAR_PDQ, phash <= NEAR_PHASH)
    order = np.argsort(apart, kind="stable")[: max(_BESIDE, min(_MOST, int(is_near.sum())))]
    digits = 5 + KeyShape.of(found[0]).digits
    matches = [
        Match(
            key=f"{int(keys[i]):0{digits}d}",
            by="PDQ hash" if wide[i] != _ABSENT else "perceptual hash",
            near=bool(is_near[i]),
            phash_bits=int(phash[i]) if phash[i] != _ABSENT else None,
            pdq_bits=int(wide[i]) if wide[i] != _ABSENT else None,
        )
        for i in order.tolist()
        if apart[i] != _ABSENT
    ]
    return [m for m in matches if m.near] or matches, pixels


_ABSENT = 30_000  # bits: there is no hash
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
