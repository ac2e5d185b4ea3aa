"""borders: bars and frames of one colour around an image: letterboxes, pillarboxes, mats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from curate.annotators.base import Annotator, AnnotatorOptions, ColumnSpec, ImageBatch
from curate.store.files import digest

TOLERANCE = 12
"""Levels of 255, in any channel, up to which a pixel has the border's colour: JPEG's noise on flat areas."""

UNIFORM = 0.98
"""Share of a line's pixels that have the border's colour."""

RINGING, RINGING_UNIFORM, RINGING_LINES = 24, 0.95, 8
"""The same of the lines next to the image, where JPEG's blocks of 8 pixels carry some of it into the border."""

DEPARTS = 8
"""Levels by which a pixel just inside differs from the border beside it: fewer, for many images are dark there."""

LEAST = 0.01
"""Of the image's height or width: narrower bars are no border, nor are single lines; and how far inside one's end the
image must begin."""

STRAIGHT, STRAIGHT_PAIR, STRAIGHT_ONE = 0.7, 0.35, 0.8
"""Share of the edges, where borders of one colour end, at which the image departs from that colour at once. Of an image
in a letterbox most does; of a drawing or product on a plain ground only what touches its bounding box. Two bars across
from each other that are equally wide need less, for chance makes few such; one alone, which a sky is too, more."""

VERSION = 1
"""Of the search: changed with whatever changes values."""

_SIDES = ("top", "bottom", "left", "right")


class Borders(Annotator):
    """Bars of one colour along whole sides of the image, such as a letterbox's, that end in a straight sharp edge.

    A side's bar is every line from there inward that is of the outermost one's colour. Bars of one colour count where
    most of what is inside departs from that colour at once: a drawing or product on a plain ground does not, for it
    touches its bounding box in places only. Bars that are blurred copies of the image, or carry text, are not found; a
    book seen from the front on a plain ground is taken for a framed image.
    """

    name = "borders"
    reads = "pixels"

    def __init__(self, options: AnnotatorOptions) -> None:
        super().__init__(options)
        height, width = "of the height: bar at the", "of the width: bar at the"
        units = {"top": height, "bottom": height, "left": width, "right": width}
        self.columns = {
            "share": ColumnSpec(scale=(0, 1), meaning="share of the area that is border"),
            **{side: ColumnSpec(scale=(0, 1), meaning=f"share {unit} {side}") for side, unit in units.items()},
        }

    @property
    def digest(self) -> str:
        """Of the search."""
        return digest([self.name, VERSION])

    def preprocess(self, image: np.ndarray) -> tuple[float, ...]:
        """The share of the area, and of each side."""
        height, width = image.shape[:2]
        top, bottom, left, right = find_borders(image)
        inside = (height - top - bottom) * (width - left - right)
        return 1 - inside / (height * width), top / height, bottom / height, left / width, right / width

    def annotate(self, batch: ImageBatch) -> dict[str, pa.Array]:
        """The values, as `preprocess` found them."""
        values = zip(*batch.inputs, strict=True) if batch.inputs else [()] * len(self.columns)
        return {name: pa.array(column, pa.float32()) for name, column in zip(self.columns, values, strict=True)}


def find_borders(image: np.ndarray) -> tuple[int, int, int, int]:
    """Pixels of the bars at the top, bottom, left and right of sRGB (h, w, 3) uint8. What is of one colour altogether
    has none."""
    views = [_turned(image, side) for side in _SIDES]
    colours = [np.median(view[0], axis=0).astype(np.int16) for view in views]
    widths = [_lines_of_border(view, colour) for view, colour in zip(views, colours, strict=True)]
    if any(width == len(view) for width, view in zip(widths, views, strict=True)):
        return 0, 0, 0, 0
    found = [0, 0, 0, 0]
    todo = [side for side in range(4) if widths[side]]
    while todo:
        same = [side for side in todo if np.abs(colours[side] - colours[todo[0]]).max() <= TOLERANCE]
        todo = [side for side in todo if side not in same]
        edges = [_edge(views[side], widths, side) for side in same]
        if np.mean(edges) >= _straight_enough(same, widths, views):
            for side in same:
                found[side] = widths[side] if widths[side] >= max(2, LEAST * len(views[side])) else 0
    top, bottom, left, right = found
    return top, bottom, left, right


def _turned(image: np.ndarray, side: str) -> np.ndarray:
    """A view of the image in which this side is at the top."""
    if side in ("left", "right"):
        image = image.swapaxes(0, 1)
    return image[::-1] if side in ("bottom", "right") else image


def _departs(pixels: np.ndarray, colour: np.ndarray, levels: int) -> np.ndarray:
    """Which pixels (n, w, 3) differ by more than so many levels from a colour, or one for each column: (n, w) bool."""
    return (np.abs(pixels.astype(np.int16) - colour) > levels).any(-1)


def _lines_of_border(view: np.ndarray, colour: np.ndarray) -> int:
    """How many lines from the top are of a colour."""
    count = _uniform_lines(view, colour, TOLERANCE, UNIFORM)
    if not count:
        return 0
    return count + _uniform_lines(view[count : count + RINGING_LINES], colour, RINGING, RINGING_UNIFORM)


def _uniform_lines(view: np.ndarray, colour: np.ndarray, levels: int, share: float) -> int:
    """How many lines from the top have so large a share of pixels within so many levels of a colour."""
    for start in range(0, len(view), 32):  # most images have no border: their first lines say so
        uniform = (~_departs(view[start : start + 32], colour, levels)).mean(1) >= share
        if not uniform.all():
            return start + int(np.argmin(uniform))
    return len(view)


def _edge(view: np.ndarray, widths: Sequence[int], side: int) -> float:
    """Share of the edge, between the borders of the sides that meet this one, at which the image departs at once: from
    what the border is there, so that a sky that grows darker is none."""
    before, after = widths[2:] if side < 2 else widths[:2]
    end, reach = widths[side], max(2, round(LEAST * len(view)))
    between = slice(before, view.shape[1] - after)
    beside = view[max(0, end - reach), between].astype(np.int16)
    if not len(beside):
        return 0.0
    return float(_departs(view[end : end + reach, between], beside, DEPARTS).any(0).mean())


def _straight_enough(same: Sequence[int], widths: Sequence[int], views: Sequence[np.ndarray]) -> float:
    """The share of their edges that borders of one colour, at these sides, must have."""
    if len(same) == 1:
        return STRAIGHT_ONE
    one, other = same[0], same[-1]
    equal = abs(widths[one] - widths[other]) <= LEAST * len(views[one])
    return STRAIGHT_PAIR if list(same) in ([0, 1], [2, 3]) and equal else STRAIGHT
