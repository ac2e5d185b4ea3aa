"""A head: vector of one space -> number with a scale."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from aesthetic.chunks import blocks, thread_map
from aesthetic.errors import UserError
from aesthetic.space import Space

HEAD_FORMAT = "tastemaker-head/1"
HEAD_NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}"
LINKS = ("identity", "sigmoid")
MAX_LAYERS = 16

_CHUNK = 16384  # rows that a thread takes at a time
_UNIT = 0.01  # how far a vector's norm may lie from what it should be, as a share; float16 moves it by less than 0.001

Layer = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


class HeadError(UserError):
    """A head, a file of one, or input to one is not usable; the message names it and what to do."""


def check_name(name: str) -> None:
    """Raise HeadError where a head cannot be called so."""
    if not re.fullmatch(HEAD_NAME, name):
        raise HeadError(f"{name!r} cannot name a head: use letters, digits and . _ + - (up to 100)")


def check_scale(what: str, scale: tuple[float, float]) -> None:
    """Raise HeadError, beginning with `what`, where these are not the lowest and the highest rating of a scale."""
    low, high = scale
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise HeadError(f"{what}: scale is {low} to {high}; it must be two finite numbers, the lower one first")


def check_norms(name: str, space: Space, squares: npt.NDArray[np.floating], first: int) -> None:
    """Raise HeadError where rows of these squared lengths (n,), the first of them row `first`, have another norm than
    the space's vectors: 1 for "l2", the square root of dim for "l2_sqrt_d". A NaN is let pass."""
    length = {"l2": 1.0, "l2_sqrt_d": math.sqrt(space.dim)}.get(space.norm)
    if length is None:
        return
    norms = np.sqrt(squares)
    wrong = np.abs(norms / np.float32(length) - 1) > _UNIT
    if wrong.any():
        row = int(wrong.argmax())
        takes = "unit vectors" if length == 1 else f"vectors of norm {length:.4g} ({space.norm})"
        raise HeadError(f"{name} takes {takes}; row {first + row} has norm {norms[row]:.4g}: scale the rows to that")


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """Affine maps with ReLU between them, from the vectors of one space to one number, and a link at the end.

    A head without a non-linearity is one layer. `link` says what becomes of the last layer's number z: "identity"
    leaves it, "sigmoid" gives 1 / (1 + exp(-z)), the probability of a logistic classifier. `card` is JSON for people
    and for `heads show`: `about`, `licence`, `source`, `data`, `metrics`, `quantiles`, `thresholds`, `limits`, all
    optional. Scores of the identity may leave `scale`: it is the scale of the ratings that the head was fitted to, and
    nothing clips. A sigmoid's scale is 0 to 1.
    """

    name: str
    task: str  # "aesthetic", "nsfw", or whatever the ratings were about
    space: Space
    scale: tuple[float, float]  # lowest and highest possible rating
    layers: tuple[Layer, ...] = field(repr=False)  # (weight (out, in), bias (out,)) float32, the last with out = 1
    link: str = "identity"  # or "sigmoid"
    card: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Refuse what could not be applied or written: raises HeadError."""
        check_name(self.name)
        if not self.task:
            raise HeadError(f"{self.name}: the task is empty")
        check_scale(self.name, self.scale)
        low, high = self.scale
        if self.link not in LINKS:
            raise HeadError(f"{self.name}: the link is {self.link!r}; it is one of {', '.join(LINKS)}")
        if self.link == "sigmoid" and (low, high) != (0, 1):
            raise HeadError(f"{self.name}: scale is {low:g} to {high:g}; a sigmoid's scores are on a scale of 0 to 1")
        if not 1 <= len(self.layers) <= MAX_LAYERS:
            raise HeadError(f"{self.name}: {len(self.layers)} layers; a head has 1 to {MAX_LAYERS}")
        width = self.space.dim
        for i, (weight, bias) in enumerate(self.layers):
            if weight.dtype != np.float32 or bias.dtype != np.float32:
                raise HeadError(f"{self.name}: layer {i} is {weight.dtype} and {bias.dtype}; both must be float32")
            if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
                raise HeadError(f"{self.name}: layer {i} is {weight.shape} and {bias.shape}, its input has {width}")
            if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                raise HeadError(f"{self.name}: layer {i} holds values that are not finite")
            width = weight.shape[0]
        if width != 1:
            raise HeadError(f"{self.name}: the last layer gives {width} numbers; a head gives one")

    @property
    def affine(self) -> bool:
        """Whether the number that the link gets is a weighted sum of the vector and a constant."""
        return len(self.layers) == 1

    @cached_property
    def digest(self) -> str:
        """16 hex digits that change with anything that a score depends on or is recorded with: not with the card."""
        digest = hashlib.sha256()
        space = [self.space.encoder, self.space.norm, self.space.fingerprint]
        link = [] if self.link == "identity" else [self.link]  # heads from before there were links keep their digest
        digest.update(json.dumps([HEAD_FORMAT, self.name, self.task, *map(float, self.scale), *space, *link]).encode())
        for weight, bias in self.layers:
            digest.update(json.dumps(weight.shape).encode())
            digest.update(weight.tobytes() + bias.tobytes())
        return digest.hexdigest()[:16]

    def __call__(self, vectors: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Score vectors (n, dim) of any float type -> (n,) float32, in the units of `scale`.

        A row with a NaN scores NaN. Raises HeadError where the dimension is wrong, or where a row has another norm than
        the space's vectors (1 for "l2", the square root of dim for "l2_sqrt_d"). It cannot see whether they come from
        the right encoder: compare spaces first (`aesthetic.space.require_same`).
        """
        vectors = np.asanyarray(vectors)
        if vectors.ndim != 2 or vectors.shape[1] != self.space.dim:
            raise HeadError(f"{self.name} takes vectors of shape (n, {self.space.dim}), not {vectors.shape}")
        if not np.issubdtype(vectors.dtype, np.floating):
            raise HeadError(f"{self.name} takes vectors of a float type, not {vectors.dtype}")
        scores = np.empty(len(vectors), np.float32)

        def score(start: int) -> None:
            for offset, x, squares in blocks(vectors[start : start + _CHUNK]):
                first = start + offset
                check_norms(self.name, self.space, squares, first)
                z = apply_layers(self.layers, x)
                if self.link == "sigmoid":
                    with np.errstate(invalid="ignore"):  # a NaN stays one
                        # 1 / (1 + exp(-z)), where exp(-z) may be beyond float32
                        z = np.exp(-np.logaddexp(np.float32(0), -z))
                scores[first : first + len(x)] = z

        starts = range(0, len(vectors), _CHUNK)
        for _ in thread_map(score, starts) if len(starts) > 2 else map(score, starts):
            pass
        return scores


def apply_layers(layers: Sequence[Layer], x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What the layers make of vectors (n, d), ReLU between them: (n,)."""
    for weight, bias in layers[:-1]:
        x = np.maximum(x @ weight.T + bias, 0)
    weight, bias = layers[-1]
    return x @ weight[0] + bias[0]
