"""quality: sharpness, exposure, contrast, colour and detail of an image, as numbers with a published formula."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from curate.annotators.base import Annotator, AnnotatorOptions, ColumnSpec, ImageBatch
from curate.store.files import digest

SIDE = 256
"""Pixels of the longer side at which sharpness is measured: the Laplacian's variance changes with the size."""

DARK, LIGHT = 5, 250
"""Luma up to which, and from which, a pixel counts as clipped: black and white of 8 bits, give or take JPEG's noise."""

VERSION = 1
"""Of the formulas: changed with whatever changes values."""


class Quality(Annotator):
    """Sharpness, brightness, clipped shares, contrast, colourfulness and entropy of the stored pixels.

    They tell a blurred, dark, pale or empty copy from its original; they do not tell a good photograph from a bad one.
    Luma is .299 R + .587 G + .114 B in 8 bits. Of the image as it is stored, but for sharpness.

    sharpness: variance of the Laplacian (0 1 0, 1 -4 1, 0 1 0) of luma, the longer side scaled to 256 px (Pech-Pacheco
    et al. 2000, "Diatom autofocusing in brightfield microscopy"). Noise and text count as sharp.
    brightness: mean luma.    dark, light: share of pixels of luma up to 5, from 250.
    contrast: standard deviation of luma (Peli 1990, "Contrast in complex images": RMS contrast).
    colourfulness: sqrt(var(rg) + var(yb)) + .3 sqrt(mean(rg)^2 + mean(yb)^2), rg = R - G, yb = (R + G) / 2 - B (Hasler
    and Suesstrunk 2003, "Measuring colourfulness in natural images"): to them 0 is not colourful, 15 slightly, 33
    moderately, 45 averagely, 59 quite, 82 highly, 109 extremely.
    entropy: Shannon's, of the 256 levels of luma.
    """

    name = "quality"
    reads = "pixels"

    def __init__(self, options: AnnotatorOptions) -> None:
        super().__init__(options)
        self.columns = {
            "sharpness": ColumnSpec(meaning=f"variance of the Laplacian of luma at {SIDE} px: low where blurred"),
            "brightness": ColumnSpec(scale=(0, 1), meaning="mean luma: 0 black, 1 white"),
            "dark": ColumnSpec(scale=(0, 1), unit="share of pixels", meaning=f"luma at most {DARK} of 255: black"),
            "light": ColumnSpec(scale=(0, 1), unit="share of pixels", meaning=f"luma at least {LIGHT} of 255: white"),
            "contrast": ColumnSpec(scale=(0, 0.5), meaning="standard deviation of luma, which goes from 0 to 1"),
            "colourfulness": ColumnSpec(meaning="by Hasler and Suesstrunk: 0 grey, 33 moderately, 109 extremely"),
            "entropy": ColumnSpec(scale=(0, 8), unit="bits", meaning="of luma: low where there is little to see"),
        }

    @property
    def digest(self) -> str:
        """Of the formulas."""
        return digest([self.name, VERSION])

    def preprocess(self, image: np.ndarray) -> dict[str, float]:
        """The values of one image."""
        import cv2

        luma = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        return {"sharpness": sharpness(luma), **of_histogram(luma), "colourfulness": colourfulness(image)}

    def annotate(self, batch: ImageBatch) -> dict[str, pa.Array]:
        """The values, as `preprocess` found them."""
        return {name: pa.array([found[name] for found in batch.inputs], pa.float32()) for name in self.columns}


def sharpness(luma: np.ndarray) -> float:
    """The variance of the Laplacian of luma (h, w) uint8, the longer side scaled to SIDE."""
    import cv2

    height, width = luma.shape
    scale = SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    scaled = cv2.resize(luma, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    edges = cv2.Laplacian(scaled, cv2.CV_16S).astype(np.int64).ravel()
    return _variance(int(edges.sum()), int(edges @ edges), edges.size)


def of_histogram(luma: np.ndarray) -> dict[str, float]:
    """What the histogram of luma (h, w) uint8 says: brightness, dark, light, contrast, entropy."""
    counts = np.bincount(luma.ravel(), minlength=256)
    levels, total = np.arange(256), luma.size
    present = counts[counts > 0] / total
    return {
        "brightness": float(counts @ levels / (255 * total)),
        "dark": float(counts[: DARK + 1].sum() / total),
        "light": float(counts[LIGHT:].sum() / total),
        "contrast": _variance(int(counts @ levels), int(counts @ levels**2), total) ** 0.5 / 255,
        "entropy": abs(float(present @ np.log2(present))),
    }


def colourfulness(image: np.ndarray) -> float:
    """Hasler and Suesstrunk's M3 of sRGB (h, w, 3) uint8. rg and yb have signs: without them, as some copies of the
    formula have it, red beside green would be as colourful as red alone."""
    import cv2

    opponents = cv2.transform(image.astype(np.int16), np.array([[1, -1, 0], [1, 1, -2]], np.float32))  # rg, 2 yb: whole
    mean, deviation = cv2.meanStdDev(opponents)
    (rg, yb), (rg_deviation, yb_deviation) = mean.ravel() / (1, 2), deviation.ravel() / (1, 2)
    return float(np.hypot(rg_deviation, yb_deviation) + 0.3 * np.hypot(rg, yb))


def _variance(total: int, squares: int, count: int) -> float:
    """From the sum of whole numbers and of their squares, exactly."""
    return (count * squares - total**2) / count**2
