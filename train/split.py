"""Which images are held out: none of which a near-duplicate is trained on.

What of each image is needed for that, two hashes, is read from columns where images were looked at when they were
packed; others are decoded once, before the first step. Memory: some 60 bytes an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aesthetic.errors import UserError
from aesthetic.hashes import Hashes, hex_to_bits
from aesthetic.splits import near_copies
from curate.images.decode import decode
from curate.images.process import perceptual_hash
from curate.ledger.schema import RowError
from curate.sources.dataset import MapDataset
from curate.store.files import quoted

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImageScan:
    """By what the copies of each image are known, and which images can't be read."""

    keys: pa.ChunkedArray  # (n,) strings
    sha256: Hashes  # (n,) uint64: the first 64 bits of the file's; 0 where they are not known
    phash: Hashes  # (n,) uint64: the perceptual hash; 0 where there is none, or where it has no ones
    unreadable: dict[int, str]  # index -> reason


def scan_images(samples: MapDataset, tell: Callable[[int], None] = lambda count: None) -> ImageScan:
    """Look at every image once: of packed shards at their columns, of others at the pixels, small where its format
    allows that. `tell` hears how many more are done.

    Raises UserError where packed shards hold other bytes than were packed, where they are few enough to be read for it.
    """
    samples.check_bytes()
    keys, files, looks = [], list[Hashes](), list[Hashes]()
    start, unknown = 0, list[int]()
    for names, sha256, phash in samples.columns("key", "sha256", "phash"):
        keys.append(pa.array([str(name) for name in names], pa.large_string()))
        files.append(hex_to_bits(sha256, 256)[0][:, 0].copy())  # without the other words
        found, known = hex_to_bits(phash, least=0)
        looks.append(found)
        unknown += (start + np.flatnonzero(~known if samples.decoded else np.ones(len(found), bool))).tolist()
        start += len(names)
        tell(len(names) if samples.decoded else 0)
    phashes, unreadable = np.concatenate(looks), dict[int, str]()

    def scan(index: int) -> tuple[int, int | None, str | None]:
        """(index, perceptual hash, why it can't be read)."""
        try:
            pixels = decode(samples.image(index), min_side=32)
            return index, int(phashes[index]) or int(perceptual_hash(pixels), 16), None
        except RowError as e:
            return index, None, str(e)

    with ThreadPoolExecutor() as pool:
        for index, look, reason in pool.map(scan, unknown):
            phashes[index] = look or 0
            if reason is not None:
                unreadable[index] = reason
            tell(0 if samples.decoded else 1)
    return ImageScan(pa.chunked_array(keys), np.concatenate(files), phashes, unreadable)


def split(
    samples: MapDataset, share: float = 0.1, most: int = 256, known: ImageScan | None = None
) -> tuple[Ints, Ints]:
    """(indices to train on, indices held out): no image is held out of which a near-duplicate is trained on.

    Near-duplicates are equal files and perceptual hashes within 4 of 64 bits; hashes are the column `phash` where there
    is one, and computed otherwise. Which groups are held out follows from hashes of their keys: the same images give
    the same split. At most `share` of the images and `most` of them; none where that is less than one.

    Images that `known` says can't be read are in neither. Without it, the first such image raises UserError.
    """
    if known is None:
        known = scan_images(samples)
        for index, reason in known.unreadable.items():
            raise unreadable_image(known.keys[index].as_py(), reason)
    readable = np.ones(len(samples), bool)
    readable[list(known.unreadable)] = False
    indices = np.flatnonzero(readable)
    room = min(most, int(share * len(indices)))
    if not room:
        return indices, indices[:0]
    keys, sha256, phash = known.keys, known.sha256, known.phash
    if len(indices) < len(samples):
        keys, sha256, phash = keys.take(pa.array(indices)), sha256[indices], phash[indices]
    pairs = near_copies(sha256, phash)
    if not samples.decoded:  # keys of packed samples differ
        codes = keys.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.uint64)
        pairs = np.concatenate([pairs, near_copies(codes + np.uint64(1), np.zeros(len(codes), np.uint64))])
    group, order = groups_by_name(keys, pairs)
    sizes = np.bincount(group, minlength=len(group))
    held_out = []
    for row in _smallest_first(order):
        if 0 < sizes[row] <= room:  # a row that no group is called by has none
            held_out.append(row)
            room -= int(sizes[row])
        if not room:
            break
    held = np.zeros(len(group), bool)  # by the name of the group
    held[held_out] = True
    apart = held[group]
    return indices[~apart], indices[apart]


def groups_by_name(keys: pa.ChunkedArray, pairs: Ints) -> tuple[Ints, Hashes]:
    """Of each row the row whose key is the name of its group, and a hash of its own key that puts names in order.

    A group is what pairs connect. Its name is that of its keys whose hash is the smallest (as aesthetic.splits has it).
    """
    labels = connected(len(keys), pairs)
    linked = np.unique(pairs)
    smallest = dict[int, tuple[bytes, int]]()
    for row, key in zip(linked.tolist(), keys.take(pa.array(linked)).to_pylist(), strict=True):
        name = hashlib.sha256(f"\0{key}".encode()).digest()[:8], row
        smallest[labels[row]] = min(name, smallest.get(labels[row], name))
    group = np.arange(len(keys))
    group[linked] = [smallest[labels[row]][1] for row in linked.tolist()]
    hashes = [np.fromiter(map(_in_order, chunk.to_pylist()), "S8", len(chunk)) for chunk in keys.chunks]
    return group, np.concatenate([h.view(">u8").astype(np.uint64) for h in hashes])


def _smallest_first(order: Hashes) -> Iterator[int]:
    """Rows by their hashes, some thousands to begin with: no one asks for many, and sorting all takes their memory."""
    low, width = 0, 2**64 // (1 + len(order) // 5000)
    while low < 2**64:
        rows = np.flatnonzero((order >= low) & (order <= min(low + width, 2**64) - 1))
        yield from rows[np.argsort(order[rows], kind="stable")].tolist()
        low, width = low + width, 2 * width


def connected(count: int, pairs: Ints) -> npt.NDArray[np.int32]:
    """A number for each of `count` rows, the same for rows that pairs connect."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]  # type: ignore[no-any-return]


def _in_order(key: str) -> bytes:
    """The first 8 bytes of the digest (curate.store.files) of ["held out", key], which takes six times as long."""
    return hashlib.sha256(f'["held out", {quoted(key)}]'.encode()).digest()[:8]


def without(count: int, *left_out: Iterable[int]) -> Ints:
    """The indices below `count` that are none of these, in order."""
    kept = np.ones(count, bool)
    for indices in left_out:
        kept[np.fromiter(indices, np.int64)] = False
    return np.flatnonzero(kept)


def unreadable_image(key: str, reason: str) -> UserError:
    """What to say of an image that can't be read."""
    return UserError(f"the image {key} can't be read ({reason}). Remove it, or curate the folder first.")
