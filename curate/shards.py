"""Tars of samples: written so that the same samples give the same bytes, read without trusting what they hold.

A sample is the members that share a key: `KEY.jpg`, `KEY.json`, `KEY.txt`. Members are USTAR with mtime 0 and
uid/gid 0, in the order given. Reading never extracts to disk: regular files only, as byte ranges of the tar.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
_BLOCK = 512


class CorruptShard(Exception):
    """A tar that ends early or holds what a shard may not hold; names the file."""


class TarWriter:
    """Writes members to an open binary file; `close` ends the tar."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._length = 0

    def add(self, name: str, data: bytes) -> None:
        """Append one regular file. The name is ours: short, ASCII, with one dot."""
        self._file.write(_header(name, len(data)))
        self._file.write(data)
        padding = -len(data) % _BLOCK
        self._file.write(bytes(padding))
        self._length += _BLOCK + len(data) + padding

    def add_sample(self, key: str, image: bytes, extension: str, caption: str | None, facts: dict[str, Any]) -> None:
        """Append one sample: image, JSON, and caption where there is one, in img2dataset's order."""
        self.add(f"{key}.{extension}", image)
        self.add(f"{key}.json", sample_json(facts))
        if caption is not None:
            self.add(f"{key}.txt", caption.encode())

    def close(self) -> None:
        """Two zero blocks, then zeros up to tar's record size of 10,240 bytes."""
        end = self._length + 2 * _BLOCK
        self._file.write(bytes(2 * _BLOCK + -end % tarfile.RECORDSIZE))


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mtime = 0
    info.mode = 0o444
    return info.tobuf(tarfile.USTAR_FORMAT)


def sample_json(facts: dict[str, Any]) -> bytes:
    """A sample's JSON: sorted keys, UTF-8, no NaN (JSON has none)."""
    return json.dumps(facts, sort_keys=True, ensure_ascii=False, allow_nan=False, default=str).encode()


def index_tar(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Where each member lies: key -> {extension: (offset, size)}, in the tar's order.

    Raises CorruptShard where the tar ends inside a member or without its end marker (a cut at a member boundary is
    found by the marker; only a digest finds a changed byte).
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            end = 0
            for member in tar:
                end = member.offset_data + member.size
                if end > size:
                    raise CorruptShard(f"{path}: ends inside {member.name}")
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, dot, extension = base.partition(".")  # webdataset's rule: a key ends at the first dot
                if dot and stem:
                    key = f"{folder}/{stem}" if folder else stem
                    samples.setdefault(key, {})[extension.lower()] = (member.offset_data, member.size)
    except tarfile.TarError as e:
        raise CorruptShard(f"{path}: {e}") from e
    if size < end + 2 * _BLOCK:
        raise CorruptShard(f"{path}: the end of the archive is missing")
    return samples


def image_member(members: dict[str, tuple[int, int]]) -> tuple[str, tuple[int, int]] | None:
    """The image among a sample's members: (extension, (offset, size)), or None."""
    return next(((e, members[e]) for e in IMAGE_EXTENSIONS if e in members), None)


def read_range(file: BinaryIO, place: tuple[int, int]) -> bytes:
    """The bytes of one member, from an open tar and its place in it."""
    offset, size = place
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise CorruptShard(f"{getattr(file, 'name', 'a tar')}: {size} bytes expected at {offset}, {len(data)} there")
    return data


def read_images(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Each sample's (key, extension, image bytes), in the tar's order."""
    index = index_tar(path)
    with open(path, "rb") as f:
        for key, members in index.items():
            if found := image_member(members):
                yield key, found[0], read_range(f, found[1])
