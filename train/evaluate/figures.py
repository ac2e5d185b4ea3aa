"""The figures of an evaluation, as functions of arrays: which can be used by themselves.

Means and shares with their 95% intervals, {value, low, high}; whether images show what their captions say (retrieval,
the in-domain space, CLIPScore); whether they are copies of training images; and how far two sets of images lie apart,
told by features of a frozen network (KID, the Frechet distance): these compare distributions, and do not look at which
image belongs to which caption. What a distance means is seen beside the same figure of real images against other real
ones, and of noise against real images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aesthetic.hashes import MIN_ONES, cross_hashes, hamming
from aesthetic.metrics import Estimate, Statistic, estimate
from aesthetic.neighbours import nearest
from aesthetic.splits import NEAR_BITS

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.floating]

# ------------------------------------------------------------------------------------------------------------ intervals


def mean_of(values: npt.ArrayLike) -> Statistic:
    """The mean of these values, as a statistic that can be bootstrapped."""
    y = np.asarray(values, np.float64)
    return lambda w: float(w @ y / w.sum())


def mean(values: npt.ArrayLike, seed: int = 0) -> Estimate:
    """The mean of (n,) values that do not depend on each other, with a bootstrap interval."""
    y = np.asarray(values, np.float64)
    return estimate({"mean": mean_of(y)}, range(len(y)), seed=seed)["mean"]


def share(hits: npt.ArrayLike) -> Estimate:
    """The mean of (n,) values from 0 to 1, most of them one of the two, with Wilson's interval (1927).

    A bootstrap would promise too much here: of values that are all 0 it knows no other.
    """
    y = np.asarray(hits, np.float64)
    n, p, z = len(y), float(y.mean()), 1.959964
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    return {"value": p, "low": max(0.0, middle - reach), "high": min(1.0, middle + reach)}


def difference(generated: npt.ArrayLike, real: npt.ArrayLike, *, paired: bool, seed: int = 0) -> Estimate:
    """Mean of `generated` (n,) less mean of `real` (m,).

    `paired`: image i of both has caption i, and the two are resampled together. Otherwise each for itself.
    """
    a, b = np.asarray(generated, np.float64), np.asarray(real, np.float64)
    if paired:
        return mean(a - b, seed)
    both, first = np.concatenate([a, b]), np.arange(len(a) + len(b)) < len(a)

    def gap(w: Array) -> float:
        if not (w[first].any() and w[~first].any()):
            return float("nan")
        return float(np.average(both[first], weights=w[first]) - np.average(both[~first], weights=w[~first]))

    return estimate({"gap": gap}, range(len(both)), seed=seed)["gap"]


# ------------------------------------------------------------------------------- do images show what their captions say

SHUFFLES = 1000
"""How often captions are dealt out at random, to see what chance gives."""

MIN_FITTED, MAX_FITTED = 100, 5000
"""Captioned images that `InDomainSpace` is fitted to, at least and at most. Ours."""

CLIP_SCORE = {"ViT-B-32": "ViT-B/32", "ViT-L-14": "ViT-L/14"}
"""The architectures of OpenAI's CLIP that CLIPScores are published of, as open_clip names them."""


def retrieval(images: Vectors, texts: Vectors, *, seed: int = 0) -> dict[str, Any]:
    """Whether images show what their captions say: is image i, of all n captions, most like caption i?

    Args:
        images, texts: (n, d) unit vectors of one space; the captions all differ.

    Returns `recall_at_1` and `recall_at_5`, the share of images whose caption is among the 1 or 5 most similar ones
    (equal similarities count as often as their order decides), and `similarity`, the mean cosine of each image and its
    caption: each {value, low, high} with a 95% interval over images and `shuffled`, the same when captions are dealt
    out so that none stays with its image, with the interval that 95 of 100 such shuffles lie in. That is chance: what a
    model would get that does not listen.
    """
    n = len(images)
    if n != len(texts) or n < 2:
        raise ValueError(f"{n} images and {len(texts)} captions")
    cosines = np.asarray(images, np.float64) @ np.asarray(texts, np.float64).T
    ordered = np.sort(cosines, axis=1)
    # of each image and caption: how many captions are more similar to the image, and how many as similar
    more = np.stack([n - np.searchsorted(row, c, side="right") for row, c in zip(ordered, cosines, strict=True)])
    same = np.stack([n - np.searchsorted(row, c, side="left") for row, c in zip(ordered, cosines, strict=True)]) - more
    values = {f"recall_at_{k}": np.clip((k - more) / same, 0, 1) for k in (1, 5) if k < n} | {"similarity": cosines}

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


# ----------------------------------------------------------------------------------- are they copies of training images

CLOSE = 0.95
"""Of real images that were not trained on, the share that lies farther from the training images than what is called
close to them. Of a model that has learnt nothing by heart 1 - CLOSE of the images are close."""

MIN_CLOSE = 20
"""Real images below which that border is not drawn: fewer have no upper twentieth."""


@dataclass(frozen=True)
class NearestTraining:
    """The training images that each image is nearest to: indices among them, nearest first."""

    indices: Ints  # (n, k)
    cosines: Array  # (n, k), of their vectors
    bits: Ints  # (n, k): in which their perceptual hashes differ, of 64
    copies: npt.NDArray[np.bool_]  # (n,): whether a training image's hash is near, as aesthetic.splits has it


def nearest_training(
    encoded: Mapping[str, npt.NDArray[Any]], training: Mapping[str, npt.NDArray[Any]]
) -> NearestTraining:
    """For images and training images as `encode_images` gave them (`vectors`, `phash`): the three nearest by cosine."""
    indices, cosines = nearest(encoded["vectors"], training["vectors"], 3)
    hashes, theirs = encoded["phash"], training["phash"]
    rows, others = (np.flatnonzero(np.bitwise_count(h) >= MIN_ONES) for h in (hashes, theirs))
    copies = np.isin(hashes, theirs[theirs != 0])
    copies[rows[cross_hashes(hashes[rows], theirs[others], NEAR_BITS)[:, 0]]] = True
    return NearestTraining(indices, cosines.astype(np.float64), hamming(hashes[:, None], theirs[indices]), copies)


def memorisation(generated: NearestTraining, held_out: NearestTraining, seed: int = 0) -> dict[str, Any]:
    """Whether generated images lie closer to training images than real ones do that were not trained on.

    `close`: the share of generated images whose nearest training image is nearer, by cosine, than that of CLOSE of the
    real ones (`border`); 1 - CLOSE is expected. Its interval is the bootstrap's, of both sides, and at least Wilson's:
    where no image is close, the bootstrap knows no other. None with fewer than MIN_CLOSE real ones. `median`,
    `median_real`: cosine to the nearest. `copies`, `copies_real`: how many are near-duplicates by perceptual hash, in
    at most NEAR_BITS bits; of real ones none is left where they were chosen so.
    """
    ours, real = generated.cosines[:, 0], held_out.cosines[:, 0]
    first = np.arange(len(ours) + len(real)) < len(ours)

    def share_of(w: Array) -> float:
        times = w.astype(np.int64)
        if not (times[first].any() and times[~first].any()):
            return float("nan")
        border = np.quantile(np.repeat(real, times[~first]), CLOSE)
        return float(np.repeat(ours > border, times[first]).mean())

    found: dict[str, Any] = {
        "median": float(np.median(ours)),
        "median_real": float(np.median(real)),
        "copies": int(generated.copies.sum()),
        "copies_real": int(held_out.copies.sum()),
        "pictures": len(ours),
        "pictures_real": len(real),
        "close": None,
        "border": None,
    }
    if len(real) >= MIN_CLOSE:
        border = float(np.quantile(real, CLOSE))
        bootstrap, wilson = estimate({"": share_of}, range(len(first)), seed=seed)[""], share(ours > border)
        low = np.nanmin(np.array([bootstrap["low"], wilson["low"]], float))  # None, where there is none, becomes NaN
        high = np.nanmax(np.array([bootstrap["high"], wilson["high"]], float))
        found["close"] = {"value": wilson["value"], "low": float(low), "high": float(high), "expected": 1 - CLOSE}
        found["border"] = border
    return found


# ------------------------------------------------------------------------------------------- how far two sets lie apart

SUBSET = 1000
"""Images of each side in a subset, where there are so many: as Binkowski et al. 2018 take."""

SUBSETS = 100
"""How many subsets, as theirs."""

MIN_KID = 50
"""Images of each side below which KID is not given. Ours: of fewer, its spread hides what it measures."""

MIN_FRECHET = 10_000
"""Images of each side below which the Frechet distance is not given: it is biased by how many there are, the more so
the fewer (Chong and Forsyth 2020, arXiv 1911.07023); 10,000 is the least that its authors recommend."""


@dataclass(frozen=True)
class Spread:
    """A mean over subsets, and the standard deviation of one subset's value around it."""

    mean: float
    sd: float
    subset: int  # images of each side
    subsets: int


def scaled(vectors: Vectors) -> Array:
    """Vectors (n, d) at a length of sqrt(d): then x . y / d in `kernel` is their cosine, whatever d is."""
    x = np.asarray(vectors, np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True) * np.sqrt(x.shape[1])


def kernel(x: Array, y: Array) -> Array:
    """(n, m): (x . y / d + 1)^3 of rows (n, d) and (m, d), the kernel of KID."""
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def mmd2(x: Array, y: Array) -> float:
    """The squared maximum mean discrepancy of two samples (n, d) and (m, d) under `kernel`, without bias.

    Gretton et al. 2012 (JMLR 13), lemma 6: the means over pairs of different rows of x and of y, less twice the mean
    over pairs of one of each. Of two samples of one distribution it is 0 on average, so often below 0.
    """
    n, m = len(x), len(y)
    xx, yy = kernel(x, x), kernel(y, y)
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * kernel(x, y).mean())


def kid(x: Vectors, y: Vectors, *, subset: int = SUBSET, subsets: int = SUBSETS, seed: int = 0) -> Spread:
    """Kernel Inception Distance (Binkowski et al. 2018, arXiv 1801.01401) of features (n, d) and (m, d).

    The mean of `mmd2` over random subsets of `subset` rows of each side, which are chosen without replacement. Rows are
    brought to one length first (`scaled`). The features decide what is seen: with others than Inception's the
    number is no KID that papers give.

    Raises ValueError where a side has fewer rows than a subset, or a subset fewer than two.
    """
    if not 2 <= subset <= min(len(x), len(y)):
        raise ValueError(f"subsets of {subset} of {len(x)} and {len(y)} rows")
    x, y = scaled(x), scaled(y)
    rng = np.random.default_rng(seed)
    found = [
        mmd2(x[rng.choice(len(x), subset, replace=False)], y[rng.choice(len(y), subset, replace=False)])
        for _ in range(subsets)
    ]
    return _spread(found, subset)


def kid_floor(x: Vectors, *, subset: int, subsets: int = SUBSETS, seed: int = 0) -> Spread:
    """KID of a set against itself: each time between two random subsets (n, d) that share no row.

    Raises ValueError where two subsets do not fit.
    """
    if not 2 <= subset <= len(x) // 2:
        raise ValueError(f"two subsets of {subset} of {len(x)} rows")
    x = scaled(x)
    rng = np.random.default_rng(seed)
    orders = (rng.permutation(len(x)) for _ in range(subsets))
    return _spread([mmd2(x[order[:subset]], x[order[subset : 2 * subset]]) for order in orders], subset)


def _spread(found: list[float], subset: int) -> Spread:
    return Spread(float(np.mean(found)), float(np.std(found, ddof=1)), subset, len(found))


def frechet(x: Vectors, y: Vectors) -> float:
    """The Frechet distance of two samples (n, d) and (m, d), each taken for a normal distribution.

    |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances (Dowson and Landau 1982): with Inception's
    features this is FID (Heusel et al. 2017, arXiv 1706.08500). Rows are brought to one length first (`scaled`).

    Raises ValueError where a side has fewer than MIN_FRECHET rows.
    """
    if min(len(x), len(y)) < MIN_FRECHET:
        raise ValueError(f"{len(x)} and {len(y)} rows: at least {MIN_FRECHET} of each are needed")
    x, y = scaled(x), scaled(y)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # the eigenvalues of A B are those of the symmetric A^(1/2) B A^(1/2)
    crossed = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * crossed)
