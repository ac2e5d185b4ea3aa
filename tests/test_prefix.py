"""The size of an image from its first bytes is that of the decoded image, or is not said."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from curate.images.decode import decode
from curate.images.prefix import prefix_size

RNG = np.random.default_rng(0)
PIXELS = Image.fromarray(RNG.integers(0, 255, (90, 140, 3), np.uint8))


def saved(kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    PIXELS.save(out, kind, **options)
    return out.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


FILES = {
    "jpeg": saved("JPEG"),
    "progressive": saved("JPEG", progressive=True),
    "profile": saved("JPEG", icc_profile=bytes(150_000)),
    "upright": saved("JPEG", exif=turned(3)),
    "turned": saved("JPEG", exif=turned(6)),
    "png": saved("PNG"),
    "turned png": saved("PNG", exif=turned(8)),
    "webp": saved("WEBP"),
    "lossless": saved("WEBP", lossless=True),
    "turned webp": saved("WEBP", exif=turned(5)),
    "gif": saved("GIF"),
    "animation": saved("GIF", save_all=True, append_images=[PIXELS.rotate(9), PIXELS]),
    "bmp": saved("BMP"),
    "avif": saved("AVIF"),
    "turned avif": saved("AVIF", exif=turned(6)),
    "tiff": saved("TIFF"),
}
ENOUGH = {"profile": 151_500, "gif": 2_000, "animation": 2_000, "avif": 1_000, "turned avif": 1_000}
"""Bytes in which the size must be said; 800 for others."""


@pytest.mark.parametrize("name", FILES)
def test_the_size_is_that_of_the_decoded_image(name: str) -> None:
    data = FILES[name]
    height, width = decode(data).shape[:2]
    assert (width, height) == ((90, 140) if name.startswith("turned") else (140, 90))
    for length in [*range(0, 1000, 7), *range(1000, len(data), 997), len(data)]:
        found = prefix_size(data[:length])
        if name == "tiff":
            assert found is None
        elif found is None:
            assert length < ENOUGH.get(name, 800)
        elif found[2]:
            assert found[:2] == (width, height)
        else:
            assert {*found[:2]} == {width, height}
    if name in ("jpeg", "progressive", "profile", "upright", "turned"):
        assert prefix_size(data) == (width, height, True)


def test_what_is_no_image_or_damaged_says_nothing() -> None:
    for data in (b"", b"<html>", b"\xff\xd8\xff", b"\xff\xd8\xff\xc0\xff\xff" + bytes(20), b"BM" + bytes(60)):
        assert prefix_size(data) is None
    for name, data in FILES.items():
        for _ in range(200):
            broken = bytearray(data[:2000])
            for at in RNG.integers(0, min(300, len(broken)), 4):
                broken[at] = RNG.integers(256)
            found = prefix_size(bytes(broken))  # nothing is raised
            assert found is None or min(found[:2]) > 0, name
