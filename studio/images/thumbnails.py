"""An image's bytes -> a small one to look at: decoded as downloads are, cut to size, blurred where it is unsafe."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from curate import sheets
from curate.images.config import MAX_PIXELS
from curate.images.decode import upright
from curate.images.header import open_header, sniff
from curate.ledger.schema import RowError

VERSION = 1
"""Part of a thumbnail's name: another one where the same image gives other bytes."""

QUALITY = 82
_GREY = 204
_KINDS = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "AVIF": "avif"}  # browsers show


@dataclass(frozen=True)
class ImageFile:
    """An image as it is sent. `decoded` is False of one that stands for bytes that are no image: one grey pixel."""

    content: bytes
    media_type: str
    decoded: bool = True


def thumbnail(data: bytes, side: int, blur: bool) -> ImageFile:
    """An image no larger than `side` x `side` pixels, never enlarged; with `blur` 7 x 7 values of it and no more."""
    try:
        pixels = _decoded(data, side)
    except RowError:
        return undecodable()
    if blur:
        pixels = np.asarray(sheets.blur(Image.fromarray(pixels)))
    return ImageFile(_jpeg(pixels), "image/jpeg")


def whole(data: bytes, blur: bool, side: int = 2048) -> ImageFile:
    """The image as it is stored; where it must be blurred, or browsers can't show it, of `side` pixels at most."""
    kind = sniff(data)
    if blur:
        return thumbnail(data, 640, True)
    if kind not in _KINDS:  # TIFF, or none
        return thumbnail(data, side, False)
    try:
        open_header(data, MAX_PIXELS)
    except RowError:
        return undecodable()
    return ImageFile(data, f"image/{_KINDS[kind]}")


def undecodable() -> ImageFile:
    """What stands for an image that can't be decoded."""
    return ImageFile(_jpeg(np.full((1, 1, 3), _GREY, np.uint8)), "image/jpeg", decoded=False)


def _decoded(data: bytes, side: int) -> np.ndarray:
    """Upright sRGB pixels, the long side at most `side`. A JPEG is decoded at as few eighths of its size as suffice:
    three times as fast from 512 to 320 pixels."""
    opened = open_header(data, MAX_PIXELS)
    scale = min(1.0, side / max(opened.size))
    least = (max(1, math.ceil(opened.width * scale)), max(1, math.ceil(opened.height * scale)))
    found = upright(opened, data, least, eighths=range(1, 8))
    size = max(1, round(found.width * scale)), max(1, round(found.height * scale))
    if found.pixels.shape[1::-1] == size:
        return found.pixels
    return np.asarray(Image.fromarray(found.pixels).resize(size, Image.Resampling.LANCZOS))


def _jpeg(pixels: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), QUALITY, "RGB", "420")


class ByteCache:
    """What was asked for lately, up to so many bytes; from any thread."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._files: OrderedDict[str, ImageFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> ImageFile | None:
        with self._lock:
            if (found := self._files.get(name)) is not None:
                self._files.move_to_end(name)
            return found

    def put(self, name: str, file: ImageFile) -> None:
        with self._lock:
            if name in self._files or len(file.content) > self._most // 8:
                return
            self._files[name] = file
            self._held += len(file.content) + 200  # and what Python needs for it
            while self._held > self._most:
                self._held -= len(self._files.popitem(last=False)[1].content) + 200
