"""Tars of samples: written so that the same samples give the same bytes, read without trusting what they hold.

A sample is the members that share a key: `KEY.jpg`, `KEY.json`, `KEY.txt`. Members are USTAR with mtime 0 and
uid/gid 0, in the order given. Reading never extracts to disk: regular files only, as byte ranges of the tar.
"""

from __future__ import annotations

import json
import mmap
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from aesthetic.errors import UserError
from aesthetic.untrusted import clean, open_regular

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jfif", "jpe")
"""Of the formats that are read, in the order in which one of several images of a sample is taken."""

_LONGEST_HEADER = 65_536  # bytes of a long name or extended header
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_REGULAR = (b"0", b"\0")
_PLAIN = (*_REGULAR, b"1", b"2", b"3", b"4", b"5", b"6")  # and links, devices, folders: passed over

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}


class CorruptShard(Exception):
    """A tar that ends early or holds what a shard may not hold; names the file."""


_EMPTY = tarfile.TarInfo()
_EMPTY.mtime, _EMPTY.mode = 0, 0o444
_HEADER = _EMPTY.tobuf(tarfile.USTAR_FORMAT)
_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=False, allow_nan=False, default=str)  # JSON has no NaN


class TarWriter:
    """Writes members to an open binary file; `close` ends the tar."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._length = 0

    def add(self, name: str, data: bytes) -> None:
        """Append one regular file. The name is ours: short, ASCII, with one dot."""
        raw = name.encode("ascii")
        assert len(raw) <= 100 and len(data) < 8**11, f"{name}: {len(data)} bytes"
        head = bytearray(_HEADER)  # name, size and checksum are filled in; tarfile takes ten times as long
        head[: len(raw)] = raw
        head[124:136] = b"%011o\0" % len(data)
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % _sum(head)  # exact, as all is ASCII
        self._file.write(bytes(head))
        self._file.write(data)
        padding = -len(data) % _BLOCK
        self._file.write(bytes(padding))
        self._length += _BLOCK + len(data) + padding

    def add_sample(self, key: str, image: bytes, extension: str, caption: str | None, facts: dict[str, Any]) -> None:
        """Append one sample: image, JSON, caption, in img2dataset's order.

        A caption that is null is an empty file, as img2dataset writes it: readers want samples of one kind (Hugging
        Face's refuses others, open_clip's drops them and then counts wrong).
        """
        self.add(f"{key}.{extension}", image)
        self.add(f"{key}.json", _JSON.encode(facts).encode())
        self.add(f"{key}.txt", (caption or "").encode())

    def add_members(self, members: bytes) -> None:
        """Append what another writer wrote."""
        self._file.write(members)
        self._length += len(members)

    def close(self) -> None:
        """Two zero blocks, then zeros up to tar's record size of 10,240 bytes."""
        end = self._length + 2 * _BLOCK
        self._file.write(bytes(2 * _BLOCK + -end % tarfile.RECORDSIZE))


_SUMS = 65521


def _sum(head: bytes | bytearray) -> int:
    """The sum of a header's bytes modulo 65,521: half of an Adler-32. Python's `sum` takes ten times as long, which
    were 15% of packing small images."""
    return ((zlib.adler32(head) & 0xFFFF) - 1) % _SUMS


def index_tar(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Where each member lies: key -> {extension: (offset, size)}, in the tar's order.

    Raises CorruptShard where a header is damaged, or the tar ends inside a member or without its end marker (a cut at
    a member boundary is found by the marker; only a digest finds a changed byte in a member).
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for name, place in tar_members(path):
        key, extension = key_of(name)
        if key:
            samples.setdefault(key, {})[extension] = place
    return samples


def key_of(name: str) -> tuple[str, str]:
    """(key, extension in small letters) of a member: webdataset's rule is that a key ends at its name's first dot.

    Both are empty for what belongs to no sample: names without a dot, hidden ones.
    """
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem:
        return "", ""
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def tar_members(path: Path) -> list[tuple[str, tuple[int, int]]]:
    """The regular files of a tar with their places. Plain headers are read here, ten times as fast as by tarfile.

    Raises CorruptShard as `index_tar` does, UserError for a tar that is compressed.
    """
    size = path.stat().st_size
    with open_regular(path) as f:  # a pipe of that name would be waited for, for ever
        head = f.read(_BLOCK)
        if packed := next((name for mark, name in _COMPRESSED.items() if head.startswith(mark)), None):
            raise UserError(f"{path}: is compressed by {packed}, and tars are read by place. Unpack it first")
    if size < 2 * _BLOCK:
        raise CorruptShard(f"{path}: the end of the archive is missing")
    found: list[tuple[str, tuple[int, int]]] = []
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as tar:
        at = 0
        while at + _BLOCK <= size:
            head = tar[at : at + _BLOCK]
            if head == _ZEROS:
                if size < at + 2 * _BLOCK:
                    break
                return found
            kind = head[156:157]
            if kind not in _PLAIN or head[124] & 0x80:  # long names, sparse files, sizes past octal
                return _members_by_tarfile(path)
            try:
                name, length = _name_and_length(head)
            except ValueError:
                raise CorruptShard(f"{path}: the header at byte {at:,} is damaged") from None
            if at + _BLOCK + length > size:
                raise CorruptShard(f"{path}: ends inside {name.decode(errors='replace')}")
            if kind in _REGULAR:
                found.append((name.decode(errors="replace"), (at + _BLOCK, length)))
            at += _BLOCK + length + -length % _BLOCK
    raise CorruptShard(f"{path}: the end of the archive is missing")


class _Bounded(tarfile.TarInfo):
    """Refuses long names and extended headers of any length that they state: tarfile would read them whole."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0 or (self.type not in tarfile.REGULAR_TYPES and self.size > _LONGEST_HEADER):
            raise tarfile.HeaderError(f"a header of {self.size:,} bytes")
        return super()._proc_member(tar)  # type: ignore[misc, no-any-return]


def _name_and_length(head: bytes) -> tuple[bytes, int]:
    """What a plain header says of its member. ValueError where it is damaged."""
    length, checksum = int(head[124:136].strip(b" \0") or b"0", 8), int(head[148:156].strip(b" \0"), 8)
    # the checksum counts its own field as blanks; a negative length would lead in circles
    if length < 0 or checksum % _SUMS != _sum(head[:148] + b" " * 8 + head[156:]):
        raise ValueError
    name = head[:100].split(b"\0", 1)[0]
    if head[257:262] == b"ustar" and head[345]:
        name = head[345:500].split(b"\0", 1)[0] + b"/" + name
    return name, length


def members_in(data: bytes, where: str) -> tuple[str, dict[str, bytes]]:
    """The sample that a piece of a tar of ours holds: its key, and its members by extension.

    Raises CorruptShard, which says `where`, if that is none.
    """
    key, members, at = "", dict[str, bytes](), 0
    while at + _BLOCK <= len(data):
        head = data[at : at + _BLOCK]
        try:
            name, length = _name_and_length(head)
        except ValueError:
            raise CorruptShard(f"{where}: a header is damaged") from None
        at += _BLOCK
        own, extension = key_of(name.decode(errors="replace"))
        if not own or (key and own != key) or at + length > len(data) or head[156:157] not in _REGULAR:
            raise CorruptShard(f"{where}: holds no sample")
        key, members[extension] = own, data[at : at + length]
        at += length + -length % _BLOCK
    return key, members


def _members_by_tarfile(path: Path) -> list[tuple[str, tuple[int, int]]]:
    found = []
    end, size = 0, path.stat().st_size
    try:
        with tarfile.open(path, "r:", tarinfo=_Bounded) as tar:
            for member in tar:
                end = member.offset_data + member.size
                if end > size or member.size < 0:
                    raise CorruptShard(f"{path}: ends inside {member.name}")
                if member.isreg() and not member.issparse():
                    found.append((clean(member.name), (member.offset_data, member.size)))
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as e:
        raise CorruptShard(f"{path}: {e}") from e
    if size < end + 2 * _BLOCK:
        raise CorruptShard(f"{path}: the end of the archive is missing")
    return found


def image_member(members: dict[str, tuple[int, int]], name: str = "") -> tuple[str, tuple[int, int]] | None:
    """The image among a sample's members: (extension, (offset, size)), or None.

    `name` is what stands before the extension where samples have several images: `input` of KEY.input.jpg.
    """
    wanted = [f"{name}.{e}" for e in IMAGE_EXTENSIONS] if name else IMAGE_EXTENSIONS
    return next(((e, members[e]) for e in wanted if e in members), None)


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
