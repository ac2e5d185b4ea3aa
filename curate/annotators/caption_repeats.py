"""caption-repeats: under how many images the same caption stands."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.annotators.base import AnnotatorOptions, ColumnSpec, TableAnnotator, TableRun
from curate.duplicates.captions import normalised
from curate.encoders.embed import images_of
from curate.layout import Data
from curate.store.files import digest

VERSION = 1
"""Of how captions are compared: changed with whatever changes values."""


class CaptionRepeats(TableAnnotator):
    """How many images of the data folder have this image's caption, itself included: a caption that many have says
    little of any of them ("Throw Pillow", "click to enlarge").

    Captions are compared as `near-duplicates` compares them: case, punctuation and numbers aside, so "Image 1 of 12."
    counts with "image 2 of 12"; short ones too. Null where there is no caption, or one without a letter or digit.
    Captions are compared by 64 bits of BLAKE2b: among ten million, two that differ are counted together with a chance
    of 3 in a million. 16 bytes of memory per image.
    """

    name = "caption-repeats"
    inputs: Sequence[Literal["fetched", "embedded"]] = ("fetched",)

    def __init__(self, options: AnnotatorOptions) -> None:
        super().__init__(options)
        meaning = "images that have this caption, case, punctuation and numbers aside"
        self.columns = {"": ColumnSpec(type=pa.int32(), unit="images", meaning=meaning)}

    @property
    def digest(self) -> str:
        """Of how captions are compared."""
        return digest([self.name, VERSION])

    def annotate_all(self, run: TableRun) -> Iterator[dict[str, pa.Array]]:
        """All captions are counted before the first shard is given."""
        marks = list(run.map(caption_marks, [(run.data, shard) for shard in run.shards]))
        known = np.concatenate([np.zeros(0, np.uint64), *marks])
        known.sort()
        for shard in marks:
            images = np.searchsorted(known, shard, "right") - np.searchsorted(known, shard, "left")
            yield {"": pa.array(images, pa.int32(), mask=shard == 0)}


def caption_marks(item: tuple[Data, int]) -> npt.NDArray[np.uint64]:
    """A hash of each caption of a shard, as it is compared; 0 where there is none."""
    texts = [normalised(caption or "") for caption in images_of(*item, ["caption"])["caption"].to_pylist()]
    hashes = [hashlib.blake2b(text.encode(), digest_size=8).digest() if text else bytes(8) for text in texts]
    return np.frombuffer(b"".join(hashes), np.uint64)
