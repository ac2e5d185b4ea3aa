"""Whether generated images are copies of training images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aesthetic.metrics import estimate
from aesthetic.splits import NEAR_BITS
from train.evaluate.intervals import Array, share

Ints = npt.NDArray[np.int64]

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
    fewest_bits: Ints  # (n,): to whichever training image differs in fewest; 64 where an image is flat


def nearest_training(
    encoded: Mapping[str, npt.NDArray[Any]], training: Mapping[str, npt.NDArray[Any]], count: int = 3
) -> NearestTraining:
    """For images and training images as `encode_images` gave them (`vectors`, `phash`): the `count` nearest by cosine.

    By brute force, 256 rows at a time.
    """
    count = min(count, len(training["vectors"]))
    indices, cosines, bits, fewest = [], [], [], []
    flat = training["phash"] == 0  # flat images all have one hash
    for start in range(0, len(encoded["vectors"]), 256):
        rows = slice(start, start + 256)
        phash = encoded["phash"][rows, None]
        near = encoded["vectors"][rows] @ training["vectors"].T
        best = np.argsort(-near, axis=1, kind="stable")[:, :count]
        differ = np.bitwise_count(phash ^ training["phash"][None]).astype(np.int64)
        indices.append(best)
        cosines.append(np.take_along_axis(near, best, axis=1).astype(np.float64))
        bits.append(np.take_along_axis(differ, best, axis=1))
        fewest.append(np.where(flat[None] | (phash == 0), 64, differ).min(1))
    return NearestTraining(*(np.concatenate(parts) for parts in (indices, cosines, bits, fewest)))


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
        "copies": int((generated.fewest_bits <= NEAR_BITS).sum()),
        "copies_real": int((held_out.fewest_bits <= NEAR_BITS).sum()),
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
