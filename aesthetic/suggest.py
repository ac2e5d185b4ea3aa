"""Which images to rate next: those that would make a ridge head surest of all others."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from aesthetic.heads import HeadError

Array = npt.NDArray[np.float64]

COPY = 0.3
"""Two images nearer to each other than this share of the usual distance between two images count as copies."""

CONSIDERED = 10_000
"""Of a larger pool this many images stand for all, evenly spaced."""

_CHUNK = 256  # rows in work at a time
_TIE = 1e-6  # gains that differ by less than this share count as equal: rounding chooses no image


def suggest(
    rated: npt.ArrayLike,
    weights: npt.ArrayLike,
    pool: npt.NDArray[np.floating],
    penalty: float,
    count: int,
    *,
    relevance: npt.ArrayLike | None = None,
) -> npt.NDArray[np.int64]:
    """The rows of the pool to rate next, the most informative first: at most `count`, each once.

    rated (n, d): vectors of the images that have ratings; weights (n,) positive, such as numbers of votes; pool (m, d):
    vectors of the same space, in any float type, memory-mapped or not; penalty: the head's, as `fit_head` reports it;
    relevance (m,): how much it matters to know an image's score, at least 0; 0 leaves an image out.

    The ridge head is the posterior mean of Bayesian linear regression (Bishop 2006, section 3.3): score = x w + b +
    noise, the noise of variance s^2 / weight, w ~ N(0, s^2 / (penalty * sum(weights))), b unknown. With W =
    sum(weights) and c = the weighted mean of the rated vectors, the posterior covariance of two images' scores, in
    units of s^2, is

        v(x, y) = 1/W + (x - c)' A^-1 (y - c),    A = sum_i weights_i (x_i - c)(x_i - c)' + penalty W I.

    A rating of x with weight u lowers the variance v(y, y) by u v(x, y)^2 / (1 + u v(x, x)). Suggested is the image
    that lowers the mean variance of the pool most, weighted by relevance; the next one is chosen as if the first had
    been rated, with the mean weight of those that have been (Yu, Bi and Tresp 2006, Active learning via transductive
    experimental design, the sequential algorithm; a region of interest as in MacKay 1992, Information-based objective
    functions for active data selection). The image of the largest v(x, x) would tell more about w, but it tends to be
    an oddity, for which a linear head is wrong and nobody asks. What the scores are, changes nothing.

    Under a strong penalty one rating takes little off the variance of a copy, though a copy would be rated alike. So
    an image is left out if its distance from a rated or suggested one is at most COPY times the usual one (the root of
    the mean squared distance of two images of the pool). Fewer rows than `count` come back where no more are left. Ties
    go to the row that comes first.

    A pool of more than CONSIDERED images is looked at in that many places, evenly spaced among those of a relevance
    above 0: a mean over so many is known well enough, and so many hold twenty good ones. Memory: twice CONSIDERED x d,
    n x d and four times d x d float64. Raises HeadError where the input does not fit together or is not
    finite.
    """
    x, w = np.array(rated, np.float64), np.asarray(weights, np.float64)
    if x.ndim != 2 or not len(x):
        raise HeadError(f"suggest: rated vectors of shape {x.shape}; (n, d) with at least one row is needed")
    if pool.ndim != 2 or pool.shape[1] != x.shape[1]:
        raise HeadError(f"suggest: a pool of shape {pool.shape}; the rated vectors give (m, {x.shape[1]})")
    matters = np.ones(len(pool)) if relevance is None else np.asarray(relevance, np.float64)
    if w.shape != (len(x),) or matters.shape != (len(pool),):
        raise HeadError(
            f"suggest: {w.shape} weights for {len(x):,} rated images, {matters.shape} relevances for a pool of "
            f"{len(pool):,}; one number each is needed"
        )
    if not np.isfinite(x).all():
        raise HeadError(f"suggest: the vector of rated row {int((~np.isfinite(x)).any(1).argmax())} is not finite")
    if not (np.isfinite(w) & (w > 0)).all():
        raise HeadError("suggest: a weight is not a positive number; leave out the rows that shall not count")
    if not (np.isfinite(matters) & (matters >= 0)).all():
        raise HeadError("suggest: a relevance is not a number of at least 0")
    if not (np.isfinite(penalty) and penalty > 0):
        raise HeadError(f"suggest: penalty {penalty}; it is a positive number, the one in the head's card")
    if count < 1:
        raise HeadError(f"suggest: {count} images; ask for at least one")

    share = w / w.mean()
    n, d = x.shape
    centre = share @ x / n
    x -= centre
    indices = np.flatnonzero(matters)
    if len(indices) > CONSIDERED:
        indices = indices[np.arange(CONSIDERED) * len(indices) // CONSIDERED]
    z = np.ones((len(indices), d + 1))  # a one behind each vector stands for b
    z[:, :d] = pool[indices]
    finite = np.isfinite(z).all(1)
    if not finite.all():
        row = indices[int(finite.argmin())]
        raise HeadError(f"suggest: the vector of row {row} of the pool is not finite; leave that image out")
    if not len(indices):
        return indices
    z[:, :d] -= centre

    # of (w, b): weights of mean 1 sum to n, and s^2 is then the noise of a rating of mean weight
    covariance = np.zeros((d + 1, d + 1))
    covariance[:d, :d] = np.linalg.inv((share[:, None] * x).T @ x + penalty * n * np.eye(d))
    covariance[d, d] = 1 / n
    share_of = matters[indices] / matters[indices].sum()
    spread = (share_of[:, None] * z).T @ z  # the mean variance is the sum of covariance * spread
    variance, shared = np.empty(len(z)), np.empty(len(z))  # v(x, x), and the mean of v(x, y)^2 over the pool
    for start in range(0, len(z), _CHUNK):
        rows = slice(start, start + _CHUNK)
        about = z[rows] @ covariance
        variance[rows] = np.einsum("ij,ij->i", about, z[rows])
        shared[rows] = np.einsum("ij,ij->i", about @ spread, about)

    near = COPY**2 * 2 * float(np.trace(spread) - spread[d] @ spread[d])  # twice the variance: spread[d] is the mean, 1
    left = ~_near(z[:, :d], x, near)
    taken: list[int] = []
    while len(taken) < count and left.any():
        gain = np.where(left, shared / (1 + variance), 0)
        i = int((gain >= gain.max() * (1 - _TIE)).argmax())
        taken.append(i)
        update = covariance @ z[i] / np.sqrt(1 + variance[i])
        along, across = z @ update, z @ (covariance @ (spread @ update))
        shared += along * (along * (update @ spread @ update) - 2 * across)
        variance -= along**2
        covariance -= np.outer(update, update)
        left &= ~_near(z[:, :d], z[i : i + 1, :d], near)
        left[i] = False
    return indices[taken].astype(np.int64)


def _near(a: Array, b: Array, square: float) -> npt.NDArray[np.bool_]:
    """Which rows of `a` have a row of `b` at a squared distance of at most `square`."""
    near, squares = np.zeros(len(a), np.bool_), np.einsum("ij,ij->i", a, a)
    for start in range(0, len(b), _CHUNK):
        some = b[start : start + _CHUNK]
        near |= (squares[:, None] + np.einsum("ij,ij->i", some, some) - 2 * a @ some.T).min(1, initial=np.inf) <= square
    return near
