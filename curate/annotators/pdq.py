"""pdq: a perceptual hash of 256 bits, which tells copies from look-alikes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from curate.annotators.base import Annotator, AnnotatorOptions, ColumnSpec, ImageBatch


class Pdq(Annotator):
    """PDQ, the perceptual hash of 256 bits that safety organisations exchange, and how much there is to see.

    Copies that were resized, encoded anew or made grey differ in at most 31 bits; cut by 5%, framed or mirrored they
    do not. Images of a quality below 50, such as flat ones, have no hash: theirs would be chance. With `mirror` also
    the hashes of the mirrored image, by which `near-duplicates` finds mirrored copies.
    """

    name = "pdq"
    reads = "pixels"

    class Options(AnnotatorOptions):
        """mirror: also the PDQ hash and the perceptual hash of the mirrored image."""

        mirror: bool = False

    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.columns = {
            "hash": ColumnSpec(type=pa.string(), meaning="PDQ hash, 64 hex digits; null where quality is below 50"),
            "quality": ColumnSpec(
                type=pa.int32(), scale=(0, 100), meaning="how much PDQ sees in it; of photographs 100"
            ),
        }
        if options.mirror:
            self.columns |= {
                "mirror_hash": ColumnSpec(type=pa.string(), meaning="PDQ hash of the mirrored image"),
                "mirror_phash": ColumnSpec(type=pa.string(), meaning="perceptual hash of the mirrored image, as phash"),
            }

    def preprocess(self, image: np.ndarray) -> dict[str, Any]:
        """The values of one image."""
        from curate.duplicates.pdq import MIN_QUALITY, pdq, pdq_mirrored, to_hex
        from curate.images.process import perceptual_hash

        own, quality = pdq(image)
        seen = quality >= MIN_QUALITY
        found = {"hash": to_hex(own)[0] if seen else None, "quality": quality}
        if self.options.mirror:
            found["mirror_hash"] = to_hex(pdq_mirrored(image))[0] if seen else None
            found["mirror_phash"] = perceptual_hash(np.ascontiguousarray(image[:, ::-1]))
        return found

    def annotate(self, batch: ImageBatch) -> dict[str, pa.Array]:
        """The values, as `preprocess` found them."""
        return {k: pa.array([found[k] for found in batch.inputs], spec.type) for k, spec in self.columns.items()}
