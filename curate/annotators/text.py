"""text: what is written in an image."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pyarrow as pa

from aesthetic.errors import UserError
from curate.annotators.base import Annotator, AnnotatorOptions, ColumnSpec, ImageBatch, Resources
from curate.encoders.onnx import onnx_session
from curate.store.files import digest

if TYPE_CHECKING:
    from rapidocr.ch_ppocr_det.utils import DBPostProcess
    from rapidocr.ch_ppocr_rec.utils import CTCLabelDecode

_PACKAGE = "rapidocr"
_FINDER, _READER = "PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"  # those that lie in the package
_RECIPE = 1  # raise it where the same image would get other values

_SHORT, _LONG = 512, 1536
"""Lines are looked for at this short side, and at most at this long one, in pixels; images are never enlarged."""
_SURE, _VERY_SURE, _FEW, _TALL = 0.5, 0.8, 4, 1 / 3
"""Mean confidence of its characters from which a line counts as read (RapidOCR's own), and that which it takes where
there are fewer than four, or it is taller than a third of the image: without this 21 of 317 photographs were one letter
from edge to edge. Tall lines of one or two characters never count."""
_MOST_LINES, _MOST_CHARACTERS = 64, 2000
_READ_HEIGHT, _READ_WIDTHS = 48, (48, 1536)  # pixels, of a line as it is read; rapidocr pads to 320 and more

_AGENCIES = """123rf 500px 699pic adobestock agefotostock alamy bigstock canstock colourbox corbis depositphotos
    dreamstime envato featurepics fotolia fotosearch freepik gettyimages ibaotu istock mostphotos nipic picfair pixta
    pond5 shutterstock stocksy superstock tuchong vecteezy vectorstock visualchina
    图虫 昵图网 千图网 摄图网 包图网 视觉中国"""
_REPLACED = """bandwidthexceeded comingsoon hasbeenremoved hotlink imagenotfound imageremoved nolongeravailable
    notavailable temporarilyunavailable currentlyunavailable imageunavailable photounavailable"""
_ENDINGS = "com|net|org|info|biz|edu|gov|de|fr|nl|pl|ru|cn|jp|kr|br|uk|eu|ch"
_MARK = re.compile(  # in the text without its blanks, of which a reader drops some
    rf"""{"|".join([*_AGENCIES.split(), *_REPLACED.split()])}
    |https?:|www\.|[a-z0-9-]{{2,}}\.(?:{_ENDINGS})(?![a-z0-9.])
    |©|\(c\)(?:19|20)\d\d|allrightsreserved""",
    re.VERBOSE | re.IGNORECASE,
)
_MARK_WORDS = re.compile(
    r"\b(?:sample|preview|proof|specimen|watermark|copyright|getty|no\s?(?:image|photo|picture))\b", re.IGNORECASE
)


class Text(Annotator):
    """What is written in an image: the share of its area, how many lines, the words, and whether they mark it.

    RapidOCR's models (PP-OCRv6 small) find lines and read them: Latin, Chinese and Japanese letters well, Greek ones by
    half, Cyrillic, Arabic and Indian ones not at all. What is found and not read counts as a line only where it has the
    shape of one; the rest is fences, petals and whole images. Of lines beyond the 64 largest nothing is known.

    A mark is the name of a picture agency, a web address, a sign of copyright, `sample`, `preview` or `proof`, or a
    notice such as `image not available`.
    """

    name = "text"
    reads = "pixels"

    def __init__(self, options: AnnotatorOptions) -> None:
        super().__init__(options)
        _models()
        self.columns = {
            "area": ColumnSpec(scale=(0, 1), unit="share", meaning="of the image's area, covered by lines of text"),
            "boxes": ColumnSpec(type=pa.int32(), meaning="lines of text"),
            "words": ColumnSpec(
                type=pa.string(), meaning="what could be read of them, from top to bottom; may be empty"
            ),
            "mark": ColumnSpec(
                type=pa.bool_(),
                meaning="whether they name an agency or an address, claim copyright or replace an image",
            ),
        }

    @property
    def digest(self) -> str:
        """Of the package that holds the weights, and of how we run them."""
        return digest([self.name, importlib.metadata.version(_PACKAGE), _RECIPE, _MARK.pattern, _MARK_WORDS.pattern])

    def load(self, resources: Resources) -> None:
        """Load the models; each image is read in one thread, so that its values depend on no number of them."""
        finder, reader = _models()
        self._find, self._read = onnx_session(finder, 1), onnx_session(reader, 1)
        self._letters = self._read.get_modelmeta().custom_metadata_map["character"].splitlines()

    @functools.cached_property
    def _boxes(self) -> DBPostProcess:
        from rapidocr.ch_ppocr_det.utils import DBPostProcess

        return DBPostProcess(thresh=0.3, box_thresh=0.5, unclip_ratio=1.6, use_dilation=True)  # as rapidocr has them

    @functools.cached_property
    def _decode(self) -> CTCLabelDecode:
        from rapidocr.ch_ppocr_rec.utils import CTCLabelDecode

        return CTCLabelDecode(character=list(self._letters))

    def preprocess(self, image: np.ndarray) -> dict[str, Any]:
        """The values of one image."""
        height, width = image.shape[:2]
        boxes = self._lines(image)
        said = [self._line(image, box) for box in boxes]
        counted = [box for box, line in zip(boxes, said, strict=True) if line or _is_line(box, min(height, width))]
        covered = np.zeros((height, width), np.uint8)
        for box in counted:
            cv2.fillPoly(covered, [np.rint(box).astype(np.int32)], 1)  # one by one: together, overlaps would be holes
        lines = [line for line in said if line]
        return {
            "area": float(covered.mean()),
            "boxes": len(counted),
            "words": " ".join(lines)[:_MOST_CHARACTERS],
            "mark": is_mark(lines),
        }

    def _lines(self, image: np.ndarray) -> np.ndarray:
        """The largest lines that are found in an image, (n, 4, 2) float32: corners clockwise, in its pixels; in the
        order in which they are read."""
        from rapidocr.ch_ppocr_det.main import TextDetector

        height, width = image.shape[:2]
        scale = min(1.0, _SHORT / min(height, width), _LONG / max(height, width))
        size = (max(32, round(width * scale / 32) * 32), max(32, round(height * scale / 32) * 32))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        pixels = (small.astype(np.float32) / 127.5 - 1)[None, :, :, ::-1].transpose(0, 3, 1, 2)  # blue first
        found = self._find.run(None, {"x": np.ascontiguousarray(pixels)})[0]
        boxes = np.asarray(self._boxes(found, (height, width))[0], np.float32).reshape(-1, 4, 2)
        sizes = [cv2.contourArea(box) for box in boxes]
        largest = np.sort(np.argsort(sizes, kind="stable")[::-1][:_MOST_LINES])
        return TextDetector.sorted_boxes(boxes[largest])

    def _line(self, image: np.ndarray, box: np.ndarray) -> str:
        """What a line says; empty where that is not sure, or neither letter nor digit."""
        from rapidocr.utils.process_img import get_rotate_crop_image

        line = get_rotate_crop_image(image, box)
        width = int(np.clip(np.ceil(_READ_HEIGHT * line.shape[1] / line.shape[0]), *_READ_WIDTHS))
        line = cv2.resize(line, (width, _READ_HEIGHT)).astype(np.float32) / 127.5 - 1
        pixels = np.ascontiguousarray(line[None, :, :, ::-1].transpose(0, 3, 1, 2))
        (said, sure), *_ = self._decode(self._read.run(None, {"x": pixels})[0])[0]
        said = said.strip()
        tall = np.ptp(box[:, 1]) > _TALL * image.shape[0] and np.ptp(box[:, 0]) < 8 * np.ptp(box[:, 1])
        few = len(said) < _FEW
        if sure < (_VERY_SURE if tall or few else _SURE) or (tall and len(said) < 3):
            return ""
        return said if any(c.isalnum() for c in said) else ""

    def annotate(self, batch: ImageBatch) -> dict[str, pa.Array]:
        """The values, as `preprocess` found them."""
        return {k: pa.array([found[k] for found in batch.inputs], spec.type) for k, spec in self.columns.items()}


def _is_line(box: np.ndarray, side: int) -> bool:
    """Whether what was found, four corners, has the shape of a line of text in an image of this short side, in pixels.

    Of 159 photographs four had such a thing that could not be read; of 24 with a line in Cyrillic letters 23, in
    Arabic ones ten.
    """
    width, height = sorted(
        (float(np.linalg.norm(box[0] - box[1])), float(np.linalg.norm(box[0] - box[3]))), reverse=True
    )
    return width > 3 * height and height < 0.15 * side


def is_mark(lines: list[str]) -> bool:
    """Whether lines read in an image are there to mark or replace it.

    >>> is_mark(["shutterst0ck", "Getty Images"]), is_mark(["A sample", "of wool"]), is_mark(["Sampler"])
    (True, True, False)
    """
    return bool(_MARK.search("".join("".join(lines).split())) or _MARK_WORDS.search(" ".join(lines)))


@functools.cache
def _models() -> tuple[Path, Path]:
    """The files of both models; UserError where they are not in the package, or it is not here. Nothing is fetched."""
    spec = importlib.util.find_spec(_PACKAGE)
    folder = Path(spec.origin).parent / "models" if spec is not None and spec.origin else Path()
    missing = [name for name in (_FINDER, _READER) if not (folder / name).is_file()]
    if spec is None or missing:
        why = "which is not here" if spec is None else f"in which {', '.join(missing)} is missing"
        raise UserError(f"reading text needs the package {_PACKAGE}, {why}: pip install 'rapidocr>=3.10,<3.11'")
    return folder / _FINDER, folder / _READER
