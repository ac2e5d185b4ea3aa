"""The size of an image from the first bytes of its file, before the others have come."""

from __future__ import annotations

import re

from curate.images.decode import orientation
from curate.images.header import open_header, sniff
from curate.images.segments import webp_size
from curate.ledger.schema import RowError

_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_ISPE = re.compile(rb"ispe\0\0\0\0(....)(....)", re.DOTALL)


def prefix_size(data: bytes) -> tuple[int, int, bool] | None:
    """(width, height, whether that is upright) of an image that begins with these bytes; None: they do not say.

    Not upright means: width and height may have to change places, as an orientation may follow later in the file.
    A TIFF never says it early. Raises nothing: what is wrong with a file its decoder says.
    """
    name = sniff(data)
    if name == "JPEG":
        return _jpeg_size(data)
    size = None
    if name == "PNG" and data[12:16] == b"IHDR" and len(data) >= 24:
        size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    elif name == "WEBP" and len(data) >= 30:
        size = webp_size(data)
    elif name == "AVIF":
        size = _avif_size(data)
    elif name in ("GIF", "BMP"):  # a GIF is as large as its first frame, where that is larger than it says
        size = _opened_size(data)
    return (*size, False) if size is not None and min(size) > 0 else None


def _jpeg_size(data: bytes) -> tuple[int, int, bool] | None:
    """From the frame's header (ITU-T T.81, B.2.2), once all is there that comes before the first scan."""
    at, size, turned = 2, None, False
    while _MARKER.match(data, at):
        marker, start = data[at + 1], at + 4
        if marker == 0xDA:
            if size is None or min(size) < 1:
                return None
            if turned:
                try:
                    turned = orientation(open_header(data, None)) >= 5
                except RowError:
                    return None
            return (*size[::-1], True) if turned else (*size, True)
        if start + 5 > len(data):
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            size = (
                int.from_bytes(data[start + 3 : start + 5], "big"),
                int.from_bytes(data[start + 1 : start + 3], "big"),
            )
        turned |= marker == 0xE1  # Exif or XMP: either may have an orientation
        at += 2 + int.from_bytes(data[at + 2 : start], "big")
    return None


def _avif_size(data: bytes) -> tuple[int, int] | None:
    """From the image spatial extents (ISO/IEC 23008-12, 6.5.3), where all that there are say the same: tiles of a grid
    have others than their image."""
    start = int.from_bytes(data[:4], "big")
    end = start + int.from_bytes(data[start : start + 4], "big")
    if data[start + 4 : start + 8] != b"meta" or not start < end <= len(data):
        return None
    sizes = set(_ISPE.findall(data, start, end))
    if len(sizes) != 1:
        return None
    width, height = sizes.pop()
    return int.from_bytes(width, "big"), int.from_bytes(height, "big")


def _opened_size(data: bytes) -> tuple[int, int] | None:
    try:
        return open_header(data, None).size
    except RowError:
        return None
