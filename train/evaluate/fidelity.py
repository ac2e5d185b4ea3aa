"""Whether images show what their captions say: retrieval, the in-domain space, CLIPScore."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from train.evaluate.intervals import Array, mean, share

Vectors = npt.NDArray[np.floating]

SHUFFLES = 1000
"""How often captions are dealt out at random, to see what chance gives."""

MIN_FITTED, MAX_FITTED = 100, 5000
"""Captioned images that `InDomainSpace` is fitted to, at least and at most. Ours."""

CLIP_SCORE = {"ViT-B-32": "ViT-B/32", "ViT-L-14": "ViT-L/14"}
"""The architectures of OpenAI's CLIP that CLIPScores are published of, as open_clip names them."""


def retrieval(images: Vectors, texts: Vectors, *, ks: Sequence[int] = (1, 5), seed: int = 0) -> dict[str, Any]:
    """Whether images show what their captions say: is image i, of all n captions, most like caption i?

    Args:
        images, texts: (n, d) unit vectors of one space; the captions all differ.
        ks: recall at k is the share of images whose caption is among the k most similar ones; equal similarities
            count as often as their order decides.

    Returns `recall_at_K` and `similarity` (mean cosine of each image and its caption), each {value, low, high} with a
    95% interval over images and `shuffled`: the same when captions are dealt out so that none stays with its image,
    with the interval that 95 of 100 such shuffles lie in. That is chance: what a model would get that does not listen.
    """
    n = len(images)
    if n != len(texts) or n < 2:
        raise ValueError(f"{n} images and {len(texts)} captions")
    cosines = np.asarray(images, np.float64) @ np.asarray(texts, np.float64).T
    ordered = np.sort(cosines, axis=1)
    # of each image and caption: how many captions are more similar to the image, and how many as similar
    more = np.stack([n - np.searchsorted(row, c, side="right") for row, c in zip(ordered, cosines, strict=True)])
    same = np.stack([n - np.searchsorted(row, c, side="left") for row, c in zip(ordered, cosines, strict=True)]) - more
    values = {f"recall_at_{k}": np.clip((k - more) / same, 0, 1) for k in ks if k < n} | {"similarity": cosines}

    rng = np.random.default_rng(seed)
    orders = np.empty((SHUFFLES, n), np.int64)
    for order in orders:  # each caption goes to the next around one circle: none stays where it was
        circle = rng.permutation(n)
        order[circle] = np.roll(circle, 1)
    out: dict[str, Any] = {"captions": n}
    for name, v in values.items():
        chance = np.array([v[np.arange(n), order].mean() for order in orders])
        low, high = np.quantile(chance, (0.025, 0.975))
        found = mean(v.diagonal(), seed) if name == "similarity" else share(v.diagonal())
        out[name] = {**found, "shuffled": {"value": float(chance.mean()), "low": float(low), "high": float(high)}}
    return out


class InDomainSpace:
    """A space of captions for images of one kind: what images and texts of an encoder have in common in these.

    A ridge regression from images' vectors to their captions', its strength chosen by leave-one-out, is fitted to real
    images, others than those that it judges. It tells apart what an encoder sees but has no words for: the bundled one,
    which is no CLIP, sees colours. It knows no more than these captions say, and its figures compare with no others.
    """

    def __init__(self, images: Vectors, texts: Vectors) -> None:
        """Fit it to unit vectors (n, d) of real images and of their captions, in the same order."""
        from sklearn.linear_model import RidgeCV

        self._used = np.asarray(texts).any(axis=0)  # the bundled encoder's texts have no features
        used = np.asarray(texts, np.float64)[:, self._used]
        self._middle = used.mean(0)
        self._ridge = RidgeCV(alphas=np.logspace(-4, 1, 6)).fit(np.asarray(images, np.float64), used - self._middle)

    def images(self, vectors: Vectors) -> Array:
        """(n, d) vectors of images -> unit vectors."""
        return _unit(self._ridge.predict(np.asarray(vectors, np.float64)))

    def texts(self, vectors: Vectors) -> Array:
        """(n, d) vectors of captions -> unit vectors of the same space."""
        return _unit(np.asarray(vectors, np.float64)[:, self._used] - self._middle)


def _unit(rows: Array) -> Array:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def clip_score_of(encoder: str) -> str | None:
    """Which CLIPScore an encoder of this name gives (`ViT-B/32`); None where its similarities are none."""
    architecture, _, weights = encoder.removeprefix("open_clip:").partition("/")
    return CLIP_SCORE.get(architecture.removesuffix("-quickgelu")) if weights == "openai" else None


def clip_score(images: Vectors, texts: Vectors) -> Array:
    """CLIPScore of each image and caption, (n,) from 0 to 2.5: 2.5 max(cos, 0).

    Source: Hessel et al. 2021 (arXiv 2104.08718).

    Args:
        images, texts: (n, d) unit vectors of OpenAI's CLIP, the captions after "A photo depicts ", as theirs.
    """
    cosines = np.einsum("nd,nd->n", np.asarray(images, np.float64), np.asarray(texts, np.float64))
    return np.asarray(2.5 * cosines.clip(0))
