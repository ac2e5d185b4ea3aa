"""What classifiers have in common: labels as columns, and images that are much longer than wide."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from aesthetic.errors import UserError, nearest
from aesthetic.untrusted import first_three, printable

WIDEST = 32
"""Long side over short side of what is resized by its short side before the middle is cut out of it: 50000 x 1 pixels
would become 11 million columns. What `middle` cuts off, that would cut off anyway."""


def wanted_labels(label: str | Sequence[str] | None) -> tuple[str, ...]:
    """The labels that an option `label` asks for, one or several; empty where it asks for none."""
    return (label,) if isinstance(label, str) else tuple(label or ())


def label_suffixes(labels: Sequence[str]) -> list[str]:
    """The suffix of each label's column: in lower case, "_" for all that is no letter or digit. UserError where two
    have the same."""
    suffixes = [re.sub(r"\W+", "_", label.lower()).strip("_") for label in labels]
    if len({*suffixes}) < len(suffixes) or "" in suffixes:
        raise UserError(f"label: {first_three(labels)}: each needs the name of a column of its own")
    return suffixes


def check_labels(labels: Sequence[str], known: Sequence[str], model: str) -> None:
    """UserError, with what there is, where one of the labels is not among the `known` ones of a model."""
    listed = ", ".join(printable(label, 60) for label in known[:20]) + (f", ... ({len(known)})" if known[20:] else "")
    for label in labels:
        if label not in known:
            near = nearest(label, known)
            has = f"did you mean {printable(near, 60)}?" if near else f"it has {listed or 'none'}"
            raise UserError(f"label: {model} has no label {printable(label, 60)}; {has}")
    if not labels:
        raise UserError(f"label: which of the labels of {model}? It has {listed or 'none'}")


def label_columns(values: np.ndarray, suffixes: Sequence[str]) -> dict[str, pa.Array]:
    """Values (n, labels) as a column each, float32, null where a value is no finite number."""
    values = values.astype(np.float32)
    return {s: pa.array(column, mask=~np.isfinite(column)) for s, column in zip(suffixes, values.T, strict=True)}


def middle(image: np.ndarray) -> np.ndarray:
    """An image (height, width, 3), or the middle of one that is longer than WIDEST allows."""
    height, width = image.shape[:2]
    longest = WIDEST * min(height, width)
    top, left = max(0, (height - longest) // 2), max(0, (width - longest) // 2)
    return np.ascontiguousarray(image[top : top + longest, left : left + longest])
