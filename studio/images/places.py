"""Where the images of a data folder lie in its tars: found once per shard, kept compactly in memory and on the disk.

    DATA/studio/images/NNNNN.places     of one shard: its tar's digest, then a row number, a block and a size per image

12 bytes an image: 120 MB for ten million. A tar that is another by now is read anew.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from aesthetic.errors import DiskFull, UserError
from aesthetic.files import write_atomic
from curate.layout import Data
from curate.ledger.why import KeyShape
from curate.shards.tar import image_member, index_tar
from curate.store.clients import StoreUnavailable
from curate.store.disk import Stamp

_BLOCK = 512  # of a tar: a member begins at a multiple of it
_MAGIC = b"tastemaker places 1\n"
_LONGEST = (1 << 32) - 1  # bytes of an image


@dataclass(frozen=True)
class ShardPlaces:
    """Where the images of one shard lie in its tar."""

    tag: str  # names the tar's bytes
    rows: npt.NDArray[np.uint32]  # row numbers within the shard, ascending
    blocks: npt.NDArray[np.uint32]
    sizes: npt.NDArray[np.uint32]  # bytes

    def find(self, row: int) -> tuple[int, int] | None:
        """The (offset, size) in bytes of the image of a row, None where it has none."""
        at = int(np.searchsorted(self.rows, row))
        if at == len(self.rows) or self.rows[at] != row:
            return None
        return int(self.blocks[at]) * _BLOCK, int(self.sizes[at])

    def to_bytes(self) -> bytes:
        arrays = (self.rows, self.blocks, self.sizes)
        return _MAGIC + self.tag.encode() + b"\n" + b"".join(a.astype("<u4").tobytes() for a in arrays)

    @staticmethod
    def from_bytes(content: bytes, tag: str) -> ShardPlaces | None:
        """What a file says of the tar with this tag; None where it is of another, or damaged."""
        head = _MAGIC + tag.encode() + b"\n"
        if not content.startswith(head) or (len(content) - len(head)) % 12:
            return None
        rows, blocks, sizes = np.frombuffer(content, "<u4", offset=len(head)).reshape(3, -1)
        return ShardPlaces(tag, rows, blocks, sizes)


def tar_tag(data: Data, shard: int, stamp: Stamp) -> str:
    """A name for the bytes of a shard's tar: their digest by the shard's record; of a folder of img2dataset's, whose
    records name no files, its stamp."""
    outputs = data.record(data.fetched_record(shard)).get("outputs", {})
    fact = outputs.get(data.tar(shard).relative_to(data.root).as_posix())
    if fact is not None and fact["bytes"] == stamp[0]:
        return str(fact["sha256"])
    return hashlib.sha256(f"{stamp}".encode()).hexdigest()


def load_places(data: Data, shape: KeyShape, shard: int, stamp: Stamp, *, keep: bool) -> ShardPlaces:
    """The places of a shard, from what is kept, else from its tar: on an object store the whole tar is brought once.

    keep: whether they may be written down. Raises CorruptShard where the tar is damaged.
    """
    tag, file = tar_tag(data, shard, stamp), data.image_places(shard)
    with contextlib.suppress(StoreUnavailable):
        data.bring(file)
    with contextlib.suppress(OSError):
        if (found := ShardPlaces.from_bytes(file.read_bytes(), tag)) is not None:
            return found
    tar = data.local(data.tar(shard))
    made = _read_places(tar, shape, shard, tag)
    data.release(tar)  # it may stay in the cache
    if keep:  # a convenience: where it can't be written it is found anew
        with contextlib.suppress(OSError, DiskFull, UserError, StoreUnavailable):
            write_atomic(file, made.to_bytes())
            data.push(file)
    return made


def _read_places(tar: Path, shape: KeyShape, shard: int, tag: str) -> ShardPlaces:
    found = dict[int, tuple[int, int]]()
    for key, members in index_tar(tar).items():
        row, image = shape.row_in(key, shard), image_member(members)
        if row is not None and image is not None and image[1][1] <= _LONGEST:
            found[row] = image[1][0] // _BLOCK, image[1][1]
    rows = np.array(sorted(found), np.uint32)
    places = np.array([found[row] for row in rows.tolist()], np.uint32).reshape(-1, 2)
    return ShardPlaces(tag, rows, places[:, 0].copy(), places[:, 1].copy())
