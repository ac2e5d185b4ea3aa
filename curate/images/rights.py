"""What an image file says of itself about training: C2PA's training-and-data-mining assertions, and PLUS Data Mining.

    read_rights(data)       # {"c2pa": "notAllowed ai_training", "iptc": "DMI-PROHIBITED"}, mostly {}

Read before anything is decoded, from bytes of anybody: what is looked at is bounded, what is broken says nothing, and
nothing here raises. No signature is verified: who forges an opt-out harms nobody but himself.

C2PA (specification 2.1, and the CAWG's training-and-data-mining assertion 1.0): the manifest store lies in APP11 of a
JPEG, in caBX of a PNG, in the chunk C2PA of a WebP, in a box `uuid` of an AVIF. In any of its manifests, those of
ingredients too, an assertion that calls data mining, AI training or generative AI training `notAllowed` or
`constrained` counts. A manifest that lies elsewhere is not asked for.
IPTC (Photo Metadata Standard 2023.1): the property plus:DataMining in the file's XMP, with any value DMI-PROHIBITED;
not in the extension of XMP that is longer than a segment of a JPEG.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any
from xml.parsers import expat

from aesthetic.errors import UserError
from aesthetic.untrusted import parse_json

MOST_PARTS = 4096
"""Segments, chunks or boxes of a file that are looked at, and boxes of its manifests."""

MOST_XMP = 1 << 20
"""Bytes of XMP that are read, also where they come compressed."""

_EDGE = 1 << 19  # bytes at both ends of an AVIF, GIF or TIFF in which XMP is looked for
_MOST_ITEMS, _DEEPEST = 10_000, 16  # of a CBOR value
_XMP_JPEG = b"http://ns.adobe.com/xap/1.0/\0"
_PLUS = "http://ns.useplus.org/ldf/xmp/1.0/"
_C2PA_UUID = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")


def read_rights(data: bytes) -> dict[str, str]:
    """The opt-outs in an image file: `c2pa` and `iptc` -> the words that say so; {} where there are none."""
    stores, packets = _embedded(data)
    found = {}
    if refused := ", ".join(sorted({word for store in stores for word in _mining(store)})):
        found["c2pa"] = refused
    if prohibited := next((value for packet in packets if (value := _data_mining(packet))), None):
        found["iptc"] = prohibited
    return found


# ------------------------------------------------------------------------------------------------------ where they lie


def _embedded(data: bytes) -> tuple[list[bytes], list[bytes]]:
    """(manifest stores, XMP packets) of a file."""
    if data.startswith(b"\xff\xd8"):
        return _of_jpeg(data)
    stores: list[bytes] = []
    packets: list[bytes] = []
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        for name, start, end in _png_chunks(data):
            if name == b"caBX":
                stores.append(data[start:end])
            elif name == b"iTXt" and data.startswith(b"XML:com.adobe.xmp\0", start):
                packets.append(_international_text(data[start:end]))
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        for name, start, end in _riff_chunks(data):
            if name == b"C2PA":
                stores.append(data[start:end])
            elif name == b"XMP ":
                packets.append(data[start : min(end, start + MOST_XMP)])
    else:
        if data[4:8] == b"ftyp":
            for name, start, end in _boxes(data, 0, len(data)):
                purpose = start + 20  # behind the uuid, a version and flags
                if name == b"uuid" and data.startswith(_C2PA_UUID, start) and data.startswith(b"manifest\0", purpose):
                    stores.append(data[purpose + 9 + 8 : end])  # and the place of more
        # wherever it lies: nothing compressed holds this by chance
        at = data.find(_PLUS.encode(), 0, _EDGE)
        if at < 0 and len(data) > _EDGE:
            at = data.find(_PLUS.encode(), max(_EDGE - 100, len(data) - _EDGE))
        if at >= 0:
            start = data.rfind(b"<x:xmpmeta", max(0, at - MOST_XMP), at)
            end = data.find(b"</x:xmpmeta>", at, at + MOST_XMP)
            if start >= 0:
                packets.append(data[start : end + 12 if end >= 0 else at + MOST_XMP])
    return stores, packets


def _of_jpeg(data: bytes) -> tuple[list[bytes], list[bytes]]:
    pieces: dict[bytes, list[tuple[int, bytes]]] = {}  # by the number of the box that is in pieces
    packets: list[bytes] = []
    for marker, start, end in _jpeg_segments(data):
        if marker == 0xEB and data.startswith(b"JP", start):
            body = data[start:end]
            pieces.setdefault(body[2:4], []).append((int.from_bytes(body[4:8], "big"), body[8:]))
        elif marker == 0xE1 and data.startswith(_XMP_JPEG, start):
            packets.append(data[start + len(_XMP_JPEG) : end])
    stores = []
    for found in pieces.values():
        found.sort(key=lambda piece: piece[0])
        head = 16 if found[0][1].startswith(b"\0\0\0\1") else 8  # of the box, which each piece repeats
        stores.append(b"".join([found[0][1], *(body[head:] for _, body in found[1:])]))
    return stores, packets


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end of its body) of each segment in front of the pixels, which are not looked at."""
    at = 2
    for _ in range(MOST_PARTS):
        if at + 4 > len(data) or data[at] != 0xFF or data[at + 1] in (0xDA, 0xD9):
            return
        if data[at + 1] == 0xFF:  # fill
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if length < 2:
            return
        yield data[at + 1], at + 4, at + 2 + length
        at += 2 + length


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end of its body) of each chunk."""
    at = 8
    for _ in range(MOST_PARTS):
        length, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if len(name) < 4 or name == b"IEND":
            return
        yield name, at + 8, at + 8 + length
        at += 12 + length


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    at = 12
    for _ in range(MOST_PARTS):
        name, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if len(name) < 4:
            return
        yield name, at + 8, at + 8 + length
        at += 8 + length + length % 2


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end of its content) of the boxes of ISO/IEC 14496-12 and of JUMBF; stops at one that is broken."""
    for _ in range(MOST_PARTS):
        if at + 8 > end:
            return
        size, kind, head = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        elif size == 0:
            size = end - at
        if size < head or at + head > end:
            return
        yield kind, at + head, min(at + size, end)
        at += size


def _international_text(chunk: bytes) -> bytes:
    """The text of a PNG's iTXt, b"" where that is broken."""
    _, _, rest = chunk.partition(b"\0")
    parts = rest[2:].split(b"\0", 2)  # behind flag and method: language, keyword as translated, text
    if len(parts) < 3:
        return b""
    if rest[0] == 0:
        return parts[2][:MOST_XMP]
    try:
        return zlib.decompressobj().decompress(parts[2], MOST_XMP)
    except zlib.error:
        return b""


# --------------------------------------------------------------------------------------------------------------- C2PA

_USES = ("notAllowed", "constrained")
_PURPOSES = ("ai_generative_training", "ai_training", "data_mining")


def _mining(store: bytes) -> Iterator[str]:
    """What the training-and-data-mining assertions of a manifest store refuse: `notAllowed ai_training`."""
    if b"training-mining" not in store:
        return
    for content, start, end in _assertions(store):
        value: Any = None
        try:
            if content == b"cbor":
                value = _Cbor(store, start, end).value()
            elif content == b"json":
                value = parse_json(store[start:end], "an assertion")
        except (ValueError, UserError):
            continue
        entries = value.get("entries", value) if isinstance(value, dict) else None  # early writers had no `entries`
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            use = entry.get("use") if isinstance(entry, dict) else entry
            purpose = name.rpartition(".")[2] if isinstance(name, str) else ""
            if purpose in _PURPOSES and use in _USES:
                yield f"{use} {purpose}"


def _assertions(store: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of the content of each assertion of training and mining: JUMBF, ISO/IEC 19566-5."""
    waiting, seen = [(0, len(store))], 0
    while waiting:
        start, end = waiting.pop()
        label = b""
        for kind, first, last in _boxes(store, start, end):
            seen += 1
            if seen > MOST_PARTS:
                return
            if kind == b"jumd":  # a type of 16 bytes, toggles, a label that ends with NUL
                label = store[first + 17 : min(last, first + 300)].partition(b"\0")[0]
            elif kind == b"jumb":
                waiting.append((first, last))
            elif re.fullmatch(rb"(?:c2pa|cawg)\.training-mining(?:[._].*)?", label):
                yield kind, first, last


class _Cbor:
    """Reads one value of CBOR (RFC 8949) as an assertion may have it; ValueError for what is broken, deep or large.

    Tags are passed over: nothing is made of them, as big numbers could be.
    """

    def __init__(self, data: bytes, start: int, end: int) -> None:
        self._data, self._at, self._end, self._items = data, start, end, 0

    def value(self, depth: int = 0) -> Any:
        self._items += 1
        if depth > _DEEPEST or self._items > _MOST_ITEMS:
            raise ValueError("too much")
        major, info = divmod(self._take(1)[0], 32)
        if info == 31 and major in (2, 3, 4, 5):
            return self._until_break(major, depth)
        if info > 27:
            raise ValueError("no such length")
        number = info if info < 24 else int.from_bytes(self._take(1 << (info - 24)), "big")
        if major == 0:
            return number
        if major == 1:
            return -1 - number
        if major == 2:
            return self._take(number)
        if major == 3:
            return self._take(number).decode()
        if major == 4:
            return [self.value(depth + 1) for _ in range(self._count(number))]
        if major == 5:
            return self._mapping((self.value(depth + 1), self.value(depth + 1)) for _ in range(self._count(number)))
        if major == 6:
            return self.value(depth + 1)
        return {20: False, 21: True}.get(number) if info < 24 else None  # floats and others: of no interest

    def _until_break(self, major: int, depth: int) -> Any:
        values = []
        while self._data[self._at : self._at + 1] != b"\xff":
            values.append(self.value(depth + 1))
        self._take(1)
        if major == 4:
            return values
        if major == 5:
            return self._mapping(zip(values[::2], values[1::2], strict=True))
        wanted: type = str if major == 3 else bytes
        if not all(isinstance(v, wanted) for v in values):
            raise ValueError("pieces of another kind")
        return wanted().join(values)

    @staticmethod
    def _mapping(pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if isinstance(key, str)}

    def _count(self, number: int) -> int:
        if number > self._end - self._at:  # each takes a byte at least
            raise ValueError("more than there is")
        return number

    def _take(self, count: int) -> bytes:
        at = self._at
        self._at += count
        if self._at > self._end:
            raise ValueError("cut short")
        return self._data[at : self._at]


# --------------------------------------------------------------------------------------------------------------- IPTC

_PROHIBITED = re.compile(r"\bDMI-PROHIBITED[A-Z-]*")


def _data_mining(packet: bytes) -> str | None:
    """The value of plus:DataMining in an XMP packet where it prohibits something; None else.

    What stands in front of a fault counts. A document type, and so every entity, ends the reading.
    """
    if b"DataMining" not in packet or len(packet) > MOST_XMP:
        return None
    name = f"{_PLUS} DataMining"
    values: list[str] = []
    depth = 0  # of elements, in the property

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        if name in attributes:
            values.append(attributes[name])
        if depth or tag == name:
            depth += 1
            values.extend(attributes.values())  # rdf:resource

    def end(tag: str) -> None:
        nonlocal depth
        depth -= depth > 0

    def text(piece: str) -> None:
        if depth:
            values.append(piece)

    def refuse(*_: Any) -> None:
        raise ValueError("a document type")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True  # a value is not cut in two
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    with contextlib.suppress(expat.ExpatError, ValueError):
        parser.Parse(packet.strip(b"\0 \r\n\t"), True)
    found = (_PROHIBITED.search(value) for value in values)
    return next((match[0] for match in found if match), None)
