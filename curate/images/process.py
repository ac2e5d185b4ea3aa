"""The images stage of one image: bytes from anywhere -> decoded, resized, encoded as the recipe says.

Nothing but pixels goes into the output: no EXIF, GPS, XMP, comments, profiles or trailing bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, ImageFile
from PIL.TiffImagePlugin import IFDRational

from curate.images.config import ImagesConfig
from curate.images.decode import upright
from curate.images.header import HOSTILE, open_header
from curate.images.resize import center_crop, perceptual_hash, resize
from curate.images.segments import is_bare
from curate.ledger.schema import Reason, RowError

_MAX_SIDE = {"jpg": 65_500, "webp": 16_383, "png": 65_535}  # what the encoders take, pixels
_EXTENSION = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True, kw_only=True)
class ProcessedImage:
    """One image as it is stored, and what is known of its original."""

    data: bytes
    extension: str  # jpg | webp | png
    width: int  # pixels as stored
    height: int
    original_width: int  # pixels upright, before resizing
    original_height: int
    sha256: str  # hex, of the original bytes
    phash: str  # 16 hex digits, of the stored pixels: see perceptual_hash
    exif: str | None  # JSON object of strings; None unless asked for

    def facts(self) -> dict[str, Any]:
        """All but the file, under the names of the ledger's columns."""
        names = ("width", "height", "original_width", "original_height", "exif", "sha256", "phash")
        return {name: getattr(self, name) for name in names}


def process(data: bytes, config: ImagesConfig) -> ProcessedImage:
    """Turn the bytes of an image file into the image to store; the same bytes give the same image.

    Raises RowError: not_an_image, too_many_pixels (both before anything is decoded) or decode_error.
    """
    opened = open_header(data, config.max_pixels)
    fitted = _fitted_size(*opened.size, config)
    _check_result(opened, fitted or opened.size, config)
    image = upright(opened, data, least=fitted or opened.size)
    pixels = image.pixels
    fitted = _fitted_size(image.width, image.height, config)
    if fitted:
        pixels = resize(pixels, fitted, reduced=pixels.shape[:2] != (image.height, image.width))
        if config.mode == "center_crop":
            pixels = center_crop(pixels, config.size)
    height, width = pixels.shape[:2]
    as_it_came = (
        config.keep_original
        and _EXTENSION.get(opened.format or "") == config.format
        and (width, height) == (image.width, image.height)
        and image.plain
        and is_bare(data, config.format, metadata=config.exif)
    )
    return ProcessedImage(
        data=data if as_it_came else _encode(pixels, config),
        extension=config.format,
        width=width,
        height=height,
        original_width=image.width,
        original_height=image.height,
        sha256=hashlib.sha256(data).hexdigest(),
        phash=perceptual_hash(pixels),
        exif=_exif_json(image.opened) if config.exif else None,
    )


def _check_result(opened: ImageFile.ImageFile, size: tuple[int, int], config: ImagesConfig) -> None:
    """Refuse what cannot be made or written: 1 x 4,000 pixels enlarged to a short side of 512 are a billion."""
    side = config.size if config.mode == "center_crop" and size != opened.size else max(size)
    if size[0] * size[1] > config.max_pixels or side > _MAX_SIDE[config.format]:
        detail = f"{size[0]} x {size[1]} pixels would have to be made and written as {config.format}"
        raise RowError(Reason.TOO_MANY_PIXELS, detail, original_size=opened.size)


def _fitted_size(width: int, height: int, config: ImagesConfig) -> tuple[int, int] | None:
    """The (width, height) to resize to, before any crop, or None where the image stays as it is.

    img2dataset's sizes: scale = size / side, each side rounded half to even; but never less than one pixel.
    """
    if config.mode == "no":
        return None
    side = max(width, height) if config.mode == "keep_ratio_largest" else min(width, height)
    if config.only_if_bigger and side <= config.size:
        return None
    scale = config.size / side
    return max(1, round(width * scale)), max(1, round(height * scale))


def _encode(pixels: np.ndarray, config: ImagesConfig) -> bytes:
    quality = config.level
    if config.format == "jpg":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "420")
    flag = cv2.IMWRITE_WEBP_QUALITY if config.format == "webp" else cv2.IMWRITE_PNG_COMPRESSION
    _, encoded = cv2.imencode(f".{config.format}", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [flag, quality])
    return encoded.tobytes()


def _exif_json(opened: ImageFile.ImageFile) -> str:
    """EXIF as img2dataset keeps it: a JSON object of strings under names such as "Image Make", "GPS GPSLatitude".

    Rationals are written a/b, lists in brackets; binary blobs and values above 1,000 characters are left out.
    """
    found: dict[str, str] = {}
    with contextlib.suppress(*HOSTILE):  # what can be read of broken metadata is kept
        exif = opened.getexif()
        for prefix, ifd, names in (
            ("Image", dict(exif), ExifTags.TAGS),
            ("EXIF", exif.get_ifd(ExifTags.IFD.Exif), ExifTags.TAGS),
            ("GPS", exif.get_ifd(ExifTags.IFD.GPSInfo), ExifTags.GPSTAGS),
        ):
            for tag, value in ifd.items():
                text = _exif_text(value)
                if text is not None and len(text) <= 1000:
                    found[f"{prefix} {names.get(tag, f'Tag {tag:#06x}')}"] = text
    return json.dumps(found, sort_keys=True)


def _exif_text(value: object) -> str | None:
    if isinstance(value, bytes):
        text = value.rstrip(b"\0").decode("ascii", errors="replace")
        return text if text.isprintable() and "\ufffd" not in text else None
    if isinstance(value, IFDRational):
        return f"{value.numerator}/{value.denominator}"
    if isinstance(value, tuple):
        return f"[{', '.join(str(_exif_text(v)) for v in value)}]"
    return str(value).strip().strip("\0")
