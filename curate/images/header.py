"""The header of an image file: which format it is, how large it is, and whether it may be decoded at all."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from curate.images.segments import jpeg_segments, webp_size
from curate.ledger.schema import Reason, RowError

PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}

# What the decoders raise on hostile bytes. MemoryError is not among them: it says something about the machine.
HOSTILE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
)


def probe(data: bytes, max_pixels: int | None = None) -> tuple[str, int, int]:
    """(format, width, height) from the header alone, sides as stored, before orientation.

    Formats are JPEG, PNG, WEBP, GIF, BMP, TIFF and AVIF. Raises RowError: not_an_image; decode_error where a file
    begins like one of these and its header is broken; too_many_pixels where it says more than `max_pixels`, or where
    the decoder itself says so.
    """
    opened = open_header(data, max_pixels)
    return str(opened.format), *opened.size


def open_header(data: bytes, max_pixels: int | None) -> ImageFile.ImageFile:
    """The file's header, parsed, and its size checked; nothing is decoded yet.

    The plugin is called directly: `Image.open` adds a global limit on pixels, and tries formats we do not take.
    """
    name = sniff(data)
    if name is None:
        begins = f"it begins with {data[:16]!r}" if data else "it is empty"
        raise RowError(Reason.NOT_AN_IMAGE, f"not one of {', '.join(PLUGINS)}: {begins}")
    if max_pixels is not None and name == "WEBP":  # opening a WebP allocates its canvas
        _check_size(webp_size(data), max_pixels)
    with decoder_errors():
        opened = PLUGINS[name](io.BytesIO(data))
    if max_pixels is not None:
        _check_size(opened.size, max_pixels)
    if name == "JPEG" and opened.info.get("progressive"):
        # A few megabytes can hold thousands of scans, each of which costs a pass over all pixels. Encoders write ~10.
        scans = data.count(b"\xff\xda")  # quick, and no fewer than there are
        if scans > 100 and (scans := sum(marker == 0xDA for marker, _, _ in jpeg_segments(data))) > 100:
            raise RowError(Reason.DECODE_ERROR, f"{scans} scans; at most 100 are decoded", original_size=opened.size)
    return opened


def sniff(data: bytes) -> str | None:
    """Which format the first bytes say; what the server or the name said is not asked."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in (12, 16, 40, 52, 56, 64, 108, 124):
        return "BMP"  # two letters alone would take any text that begins with BM
    if data[4:8] == b"ftyp":
        brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
    return None


@contextlib.contextmanager
def decoder_errors(size: tuple[int, int] | None = None) -> Iterator[None]:
    """Around calls of decoders only: what they raise is the file's fault."""
    try:
        yield
    except Image.DecompressionBombError as e:
        raise RowError(Reason.TOO_MANY_PIXELS, str(e), original_size=size) from e
    except HOSTILE as e:
        raise RowError(Reason.DECODE_ERROR, f"{type(e).__name__}: {e}"[:300], original_size=size) from e


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise RowError(Reason.DECODE_ERROR, f"the header says {width} x {height} pixels")
    if width * height > max_pixels or max(size) > 65_535:
        detail = f"{width} x {height} pixels; at most {max_pixels:,} are decoded, and 65,535 a side"
        raise RowError(Reason.TOO_MANY_PIXELS, detail, original_size=size)
