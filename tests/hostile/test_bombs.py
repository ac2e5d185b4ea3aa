"""Images that are small as files and huge as pixels, or as work (I1, I2): refused from the header, or cheap."""

from __future__ import annotations

import io
import itertools
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_a_child import Report, forget_peak, memory, peak, run
from PIL import Image, TiffImagePlugin

from curate.images.config import ImagesConfig
from curate.images.process import process
from curate.ledger.schema import Reason, RowError
from tests.test_images import encoded, patched, photograph, png_chunk, png_of

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")


def tiff(tags: dict[int, Any], body: bytes = b"") -> bytes:
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        directory[tag] = value
    return b"II*\0\x08\0\0\0" + directory.tobytes(8) + body


def plain_tiff(width: int, height: int, **more: int) -> dict[int, Any]:
    tags = {256: width, 257: height, 258: (8, 8, 8), 259: 1, 262: 2, 273: 8, 277: 3, 278: height, 279: 100}
    return tags | {int(k[1:]): v for k, v in more.items()}


def webp(kind: bytes, body: bytes) -> bytes:
    chunk = kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def jpeg_of(width: int, height: int, name: str = "jpg") -> bytes:
    data = encoded(photograph(16, 16), name)
    at = data.index(b"\xff\xc0" if name == "jpg" else b"\xff\xc2")
    return patched(data, at + 5, struct.pack(">HH", height, width))


def bmp_of(width: int, height: int, compression: int = 0) -> bytes:
    data = encoded(photograph(16, 16), "bmp")
    return patched(patched(data, 18, struct.pack("<ii", width, height)), 30, struct.pack("<I", compression))


def gif_of(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    data = encoded(photograph(16, 16), "gif")
    at = data.index(b"\x2c\0\0\0\0\x10\0\x10\0")
    return patched(patched(data, 6, struct.pack("<HH", *screen)), at + 5, struct.pack("<HH", *frame))


def avif_of(width: int, height: int) -> bytes:
    data = encoded(photograph(16, 16), "avif")
    return patched(data, data.index(b"ispe") + 8, struct.pack(">II", width, height))


def many_scans() -> bytes:
    data = encoded(photograph(64, 64), "progressive")
    at = data.rindex(b"\xff\xda")
    return data[:-2] + data[at:-2] * 5000 + b"\xff\xd9"


def zlib_bomb(size: int) -> bytes:
    """Zeros, compressed; without its end, which nobody gets to."""
    squeeze = zlib.compressobj(9)
    first = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    unit = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)  # stands alone
    return first + unit * ((size >> 20) - 1)


PIXELS: dict[str, Callable[[], bytes]] = {  # more pixels than are decoded
    "PNG, 9,000 x 9,000, 1 bit": lambda: png_of(9000, 9000, 1, 0, bytes(9000 * 1126)),
    "PNG, 20,000 x 20,000, 1 bit": lambda: png_of(20_000, 20_000, 1, 0, bytes(20_000 * 2501)),
    "PNG, 65,535 x 65,535": lambda: png_of(65_535, 65_535, 8, 2, b""),
    "PNG, 2^31 - 1 square": lambda: png_of(2**31 - 1, 2**31 - 1, 16, 6, b""),
    "PNG, 1 x 10^7": lambda: png_of(1, 10_000_000, 1, 0, b""),
    "PNG, 10^7 x 1": lambda: png_of(10_000_000, 1, 1, 0, b""),
    "PNG, 16 bits with alpha": lambda: png_of(30_000, 30_000, 16, 6, b""),
    "JPEG": lambda: jpeg_of(65_500, 65_500),
    "JPEG, progressive": lambda: jpeg_of(65_500, 65_500, "progressive"),
    "JPEG, long": lambda: jpeg_of(65_535, 2000),
    "GIF, screen": lambda: gif_of((65_535, 65_535), (16, 16)),
    "GIF, screen and frame": lambda: gif_of((65_535, 65_535), (65_535, 65_535)),
    "BMP": lambda: bmp_of(60_000, 60_000),
    "BMP, top down": lambda: bmp_of(60_000, -60_000),
    "BMP, RLE": lambda: bmp_of(60_000, 60_000, 1),
    "WebP, lossless": lambda: webp(b"VP8L", b"\x2f" + struct.pack("<I", 13_999 | 13_999 << 14) + bytes(9)),
    "WebP, lossy": lambda: webp(b"VP8 ", b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 16_383, 16_383) + bytes(20)),
    "WebP, canvas": lambda: webp(b"VP8X", bytes(4) + b"\xff\xff\0" + b"\xff\xff\0"),
    "WebP, canvas of 2^24": lambda: webp(b"VP8X", bytes(4) + b"\xff\xff\xff" * 2),
    "AVIF": lambda: avif_of(16_000, 16_000),
    "AVIF, as large as libavif takes": lambda: avif_of(16_384, 16_384),
    "TIFF": lambda: tiff(plain_tiff(60_000, 60_000)),
    "TIFF, LZW": lambda: tiff(plain_tiff(60_000, 60_000, t259=5)),
    "TIFF, deflate": lambda: tiff(plain_tiff(60_000, 60_000, t259=8)),
    "TIFF, fax": lambda: tiff(plain_tiff(60_000, 60_000) | {258: 1, 277: 1, 262: 0, 259: 4}),
}
COSTLY: dict[str, Callable[[], bytes]] = {  # few pixels, and much work for who takes all that is offered
    "PNG, a profile of 1 GB": lambda: png_of(
        16, 16, 8, 0, bytes(272), png_chunk(b"iCCP", b"x\0\0" + zlib_bomb(1 << 30))
    ),
    "PNG, a text of 1 GB": lambda: png_of(16, 16, 8, 0, bytes(272), png_chunk(b"zTXt", b"x\0\0" + zlib_bomb(1 << 30))),
    "PNG, an iTXt of 1 GB": lambda: png_of(
        16, 16, 8, 0, bytes(272), png_chunk(b"iTXt", b"x\0\1\0\0\0" + zlib_bomb(1 << 30))
    ),
    "PNG, 100,000 chunks": lambda: png_of(16, 16, 8, 0, bytes(272), png_chunk(b"tEXt", b"a\0b") * 100_000),
    "PNG, 1 GB of pixels too many": lambda: png_of(16, 16, 8, 0, b"")[:-12] + png_chunk(b"IDAT", zlib_bomb(1 << 30)),
    "JPEG, 5,000 scans": many_scans,
    "JPEG, 100,000 comments": lambda: patched_in(encoded(photograph(64, 48), "jpg"), 2, b"\xff\xfe\0\4ab" * 100_000),
    "TIFF, a tile of 60,000 x 60,000": lambda: tiff(
        plain_tiff(16, 16) | {322: 60_000, 323: 60_000, 324: 8, 325: 100, 259: 5}
    ),
    "TIFF, 10^9 rows in a strip": lambda: tiff(plain_tiff(16, 16, t278=10**9, t279=10**9)),
    "TIFF, a directory that points to itself": lambda: tiff(plain_tiff(16, 16))[:-4] + b"\x08\0\0\0" + bytes(768),
    "GIF, frame larger than the screen": lambda: gif_of((16, 16), (65_535, 65_535)),
    "GIF, 10,000 frames": lambda: animated("gif", 10_000),
    "WebP, 300 frames": lambda: animated("webp", 300),
    "APNG, 300 frames": lambda: animated("png", 300),
    "BMP, a palette of 2^32": lambda: patched(encoded(photograph(16, 16), "bmp"), 46, b"\xff\xff\xff\xff"),
    "AVIF, a box of 2^63": lambda: patched_in(
        encoded(photograph(16, 16), "avif"), 32, b"\0\0\0\1free\x7f" + b"\xff" * 7
    ),
}


def patched_in(data: bytes, at: int, more: bytes) -> bytes:
    return data[:at] + more + data[at:]


def animated(name: str, frames: int) -> bytes:
    if name == "gif":
        one = encoded(photograph(8, 8), "gif")
        at = one.index(b"\x2c\0\0\0\0\x08\0\x08\0")
        return one[:-1] + one[at:-1] * (frames - 1) + b";"
    images = [Image.new("RGB", (8, 8), (n % 250, n // 250, 0)) for n in range(frames)]
    out = io.BytesIO()
    images[0].save(out, name, save_all=True, append_images=images[1:], duration=20)
    return out.getvalue()


def cost(case: tuple[str, bytes]) -> tuple[Reason | None, tuple[int, int] | None, float, int]:
    """In the child: reason, size said, CPU seconds, bytes of memory above what there was."""
    forget_peak()
    before, start = memory(), time.process_time()
    try:
        image = process(case[1], ImagesConfig(size=64))
        end: tuple[Reason | None, tuple[int, int] | None] = None, (image.original_width, image.original_height)
    except RowError as e:
        end = e.reason, e.original_size
    return *end, time.process_time() - start, peak() - before


@pytest.fixture(scope="module")
def costs() -> Report:
    """All of them, one after the other, in a process that has decoded good images before."""
    warm = [(name, encoded(photograph(64, 48), name)) for name in ("jpg", "png", "webp", "gif", "tiff", "bmp", "avif")]
    cases = [(name, make()) for name, make in itertools.chain(PIXELS.items(), COSTLY.items())]
    report = run(cost, [*warm, *cases])
    assert not report.deaths and not report.hangs, [name for name, _ in report.deaths + report.hangs]
    report.outcomes = {name: outcome for (name, _), outcome in report.outcomes.items()}
    return report


@pytest.mark.parametrize("name", PIXELS)
def test_too_many_pixels_are_refused_from_the_header(costs: Report, name: str) -> None:
    reason, size, seconds, growth = costs.outcomes[name]
    assert reason is Reason.TOO_MANY_PIXELS and size is not None and max(size) > 8000
    assert seconds < 0.1 and growth < 64e6


@pytest.mark.parametrize("name", COSTLY)
def test_costly_images_cost_little(costs: Report, name: str) -> None:
    reason, size, seconds, growth = costs.outcomes[name]
    assert reason in (None, Reason.DECODE_ERROR, Reason.TOO_MANY_PIXELS), reason
    assert seconds < 1.0 and growth < 64e6
    if "frames" in name:
        assert reason is None and size == (8, 8)
