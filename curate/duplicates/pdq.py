"""PDQ: a perceptual hash of 256 bits, as safety organisations exchange it.

"The TMK+PDQF Video-Hashing Algorithm and the PDQ Image-Hashing Algorithm" (Meta, 2019): luma, filtered and sampled at
64 x 64, of which the 16 x 16 lowest frequencies without the zeroth row and column give one bit each: above their median
or not. Copies differ in few bits (Meta takes 31 for a match), other images in 128 +- 8. Hashes here are equal, bit for
bit, to those of Meta's code on the same pixels; its tools first resize what is larger to 512 x 512 of them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_array

MIN_QUALITY = 50
"""Below it a hash says little: Meta's threshold. Of a flat image every bit is chance."""

_SIDE = 64
_STRIP = 1 << 18  # pixels that are floats at a time
_DCT = np.sqrt(2 / _SIDE) * np.cos(np.pi / _SIDE * np.outer(np.arange(1, 17), np.arange(_SIDE) + 0.5))
"""Rows 1 to 16 of the orthonormal DCT-II of length 64."""


def pdq(image: np.ndarray) -> tuple[np.ndarray, int]:
    """The PDQ hash of an image, (h, w, 3) uint8 RGB, as (4,) uint64, the first digits of its text first; and its
    quality, 0 to 100: how much there is to see."""
    (small,) = _filtered(image, [(1, 1)])
    return _hash(small), _quality(small)


def pdq_mirrored(image: np.ndarray) -> np.ndarray:
    """The PDQ hash of an image mirrored left to right, (4,) uint64: exactly that of the mirrored pixels."""
    return _hash(_filtered(image, [(1, -1)])[0])


def symmetries(image: np.ndarray) -> np.ndarray:
    """The PDQ hashes of an image turned and mirrored in all eight ways, (8, 4) uint64; exactly those of the pixels.

    As it is, mirrored left to right, mirrored top to bottom, turned by 180 degrees; then the same, transposed.
    """
    views = _filtered(image, [(1, 1), (1, -1), (-1, 1), (-1, -1)])
    return np.stack([_hash(small) for small in (*views, *(view.T for view in views))])


def to_hex(hashes: np.ndarray) -> list[str]:
    """PDQ hashes, (n, 4) uint64, as text of 64 hex digits, as exchange lists have them (the last bit first)."""
    return [row.tobytes().hex() for row in np.ascontiguousarray(hashes, ">u8").reshape(-1, 4)]


def from_hex(texts: Sequence[str]) -> np.ndarray:
    """Texts of 64 hex digits each as (n, 4) uint64. ValueError where one is none."""
    for text in texts:
        if not re.fullmatch("[0-9A-Fa-f]{64}", text):
            raise ValueError(f"{text[:100]!r} is no PDQ hash: that has 64 hex digits")
    return np.frombuffer(bytes.fromhex("".join(texts)), ">u8").reshape(-1, 4).astype(np.uint64)


def _filtered(image: np.ndarray, ways: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """An image's luma, filtered and sampled at 64 x 64, (64, 64) float32: for (1, 1) as it is, and where the first is
    -1 that of the image upside down, where the second is -1 of the image mirrored.

    These are not quite the mirror images of the first: windows and samples lie a little to one side.
    """
    import cv2

    height, width = image.shape[:2]
    step = max(1, _STRIP // width)
    rows = {down: np.zeros((_SIDE, width), np.float32) for down, _ in ways}
    for start in range(0, height, step):
        luma = cv2.cvtColor(image[start : start + step].astype(np.float32), cv2.COLOR_RGB2GRAY)
        for down, found in rows.items():
            found += _filters(height, step)[down, start] @ luma
    columns = _filters(width, width)[1, 0]
    return [(columns @ np.ascontiguousarray(rows[down].T[::across])).T for down, across in ways]


@functools.lru_cache(256)
def _filters(length: int, step: int) -> dict[tuple[int, int], csr_array]:
    """What filters and samples `length` pixels at 64 places, cut into (64, step) float32 for the pixels from each
    start on: (1, start) -> matrix; and (-1, start) for pixels that count from the other end.

    Twice a box of ceil(length / 128) pixels, which borders cut off: it is the mean of what is left of it. Boxes of an
    even length reach further to the right.
    """
    from scipy.sparse import csr_array

    window = -(-length // 128)
    right = window // 2
    left = window - 1 - right

    def boxes(centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pixels of the boxes around `centres`, and their weights: zero beyond a border."""
        pixels = centres[..., None] + np.arange(-left, right + 1)
        inside = (pixels >= 0) & (pixels < length)
        return pixels.clip(0, length - 1), inside / inside.sum(-1, keepdims=True)

    samples = ((np.arange(_SIDE) + 0.5) * length / _SIDE).astype(int)
    middles, weights = boxes(samples)
    pixels, inner = boxes(middles)
    values = (inner * weights[..., None]).reshape(_SIDE, -1)
    places = np.broadcast_to(np.arange(_SIDE)[:, None], values.shape)
    pixels = pixels.reshape(_SIDE, -1)
    found = {}
    for way, columns in ((1, pixels), (-1, length - 1 - pixels)):
        whole = csr_array((values.ravel(), (places.ravel(), columns.ravel())), (_SIDE, length))
        for start in range(0, length, step):
            found[way, start] = whole[:, start : start + step].astype(np.float32)
    return found


def _hash(small: np.ndarray) -> np.ndarray:
    """The bits of a filtered image, (4,) uint64."""
    # without the noise of sums: frequencies that a symmetric image lacks would be bits by chance
    low = np.rint(_DCT @ small.astype(np.float64) @ _DCT.T * (1 << 20))
    bits = low > np.partition(low, 127, axis=None)[127]
    return np.packbits(bits.ravel()[::-1]).view(">u8").astype(np.uint64)


def _quality(small: np.ndarray) -> int:
    """Meta's measure of a filtered image: how far its neighbours lie apart, in whole hundredths of the range."""
    steps = sum(int(np.abs(np.trunc(np.diff(small, axis=axis) * 100 / 255)).sum()) for axis in (0, 1))
    return min(100, steps // 90)
