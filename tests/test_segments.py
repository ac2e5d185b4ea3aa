"""PNGs inflated before Pillow sees them: the same pixels and the same complaints."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from curate.images import segments
from curate.images.decode import decode
from curate.images.segments import chunks, png_inflated
from curate.ledger.schema import RowError
from tests.test_images import png_chunk

SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
WIDTH, HEIGHT = 301, 157


def png(
    colour: int, bits: int, stream: bytes, parts: int = 1, interlaced: int = 0, before: bytes = b"", behind: bytes = b""
) -> bytes:
    """A PNG of that zlib stream, in so many IDAT chunks."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, colour, 0, 0, interlaced))
    if colour == 3:
        head += png_chunk(b"PLTE", bytes(range(256)) * 3) + png_chunk(b"tRNS", b"\0\x80\xff")
    step = max(1, -(-len(stream) // parts))
    body = b"".join(png_chunk(b"IDAT", stream[at : at + step]) for at in range(0, len(stream), step))
    return b"\x89PNG\r\n\x1a\n" + head + before + body + behind + png_chunk(b"IEND", b"")


def rows(colour: int, bits: int) -> bytes:
    """Filtered rows, every filter among them."""
    dice = np.random.default_rng(colour * 100 + bits)
    length = (WIDTH * bits * SAMPLES[colour] + 7) // 8
    return b"".join(bytes([y % 5]) + dice.integers(0, 7, length, np.uint8).tobytes() for y in range(HEIGHT))


def seen(data: bytes) -> tuple[object, ...]:
    image = Image.open(io.BytesIO(data))
    image.load()
    palette = image.getpalette() if image.mode == "P" else None
    return image.mode, image.size, palette, image.tobytes(), image.info, dict(image.getexif())


@pytest.mark.parametrize("colour,bits", [(c, b) for c, depths in DEPTHS.items() for b in depths])
def test_every_kind_of_png_holds_the_same_inflated(colour: int, bits: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    behind = png_chunk(b"tEXt", b"Comment\0behind") + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    raw = rows(colour, bits)
    for level, parts in ((9, 1), (1, 7), (0, 2)):
        data = png(colour, bits, zlib.compress(raw, level), parts, behind=behind)
        again = png_inflated(data)
        assert again is not None and len(again) >= len(raw)
        assert [name for name, _ in chunks(again, "png")].count(b"IDAT") == 1
        assert seen(again) == seen(data) and seen(data)[4]["Comment"] == "behind"


def test_a_broken_png_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = rows(2, 8)
    stream = zlib.compress(raw)
    middle = len(stream) // 2
    raw_deflate = zlib.compressobj(wbits=-15)
    broken = {
        "cut": stream[:-5],
        "half": stream[:middle],
        "flipped": stream[:middle] + bytes([stream[middle] ^ 8]) + stream[middle + 1 :],
        "checksum": stream[:-1] + bytes([stream[-1] ^ 1]),
        "a row too few": zlib.compress(raw[: -3 * WIDTH - 1]),
        "a row too many": zlib.compress(raw + raw[: 3 * WIDTH + 1]),
        "endless": zlib.compress(bytes(50_000_000)),
        "no zlib": raw_deflate.compress(raw) + raw_deflate.flush(),
        "empty": b"",
    }
    files = {name: png(2, 8, bad) for name, bad in broken.items()}
    files["interlaced"] = png(2, 8, stream, interlaced=1)
    files["cut in its header"] = png(2, 8, stream)[:30]
    files["no header first"] = b"\x89PNG\r\n\x1a\n" + png_chunk(b"tEXt", b"a\0b" + bytes(20)) + png(2, 8, stream)[8:]
    for name, data in files.items():
        assert png_inflated(data) is None, name

    def outcome(data: bytes) -> object:
        try:
            return decode(data).tobytes()
        except RowError as e:
            return e.reason, e.detail

    files["more in its last chunk"] = png(2, 8, stream + b"more than the stream")
    files["no end"] = png(2, 8, stream)[:-12]
    files["no end, no checksum"] = png(2, 8, stream)[:-16]
    found = {name: outcome(data) for name, data in files.items()}
    monkeypatch.setattr(segments, "MAX_INFLATED", 0)
    assert found == {name: outcome(data) for name, data in files.items()}
    assert isinstance(found["half"], tuple) and isinstance(found["more in its last chunk"], bytes)


def test_a_large_png_is_not_inflated_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    data = png(2, 8, zlib.compress(rows(2, 8)))
    assert png_inflated(data) is not None
    monkeypatch.setattr(segments, "MAX_INFLATED", len(rows(2, 8)) - 1)
    assert png_inflated(data) is None


def test_a_png_of_many_chunks_is_not_read_twice() -> None:
    stream, text = zlib.compress(rows(2, 8)), png_chunk(b"tEXt", b"a\0b")
    assert png_inflated(png(2, 8, stream, parts=200, before=text * 99, behind=text * 200)) is not None
    assert png_inflated(png(2, 8, stream, before=text * 100)) is None
