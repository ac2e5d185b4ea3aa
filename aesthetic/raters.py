"""What raters add to all their votes, told from what they see in the images."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]

_EXACT = 1000  # raters up to which the likelihood is worked out: one eigendecomposition, a third of a second
_RATIOS = np.geomspace(1e-4, 1e4, 161)  # noise variance / variance of offsets that are tried before the best is refined
_LEAST_RATIO = 0.05  # where moments, not the likelihood, give the ratio; theirs may even come out negative
_FLAT = 1e-6  # a likelihood that varies no more than this says nothing
_CHUNK = 256  # raters whose images in common with all others are held at a time


def without_raters(votes: Array, image: Codes, rater: Codes) -> Array:
    """Votes (n,) without what their raters add to every vote: y - b(rater), of the model y = image + b(rater) + noise.

    Raters grade on different curves and see different images. Images are fixed effects; b is random, with variance t
    around 0; the noise has variance s. Their ratio s/t maximises the restricted likelihood (REML: Patterson and
    Thompson, Biometrika 58, 1971), that is, the likelihood of what is left of the votes without the images' means. With
    more than 1000 raters it comes from two quadratic forms of the same rest (MINQUE(0): Hartley, Rao and LaMotte,
    Biometrics 34, 1978), and is at least 0.05. Then b minimises sum (y - image - b)^2 + s/t sum b^2: the best linear
    unbiased prediction (Robinson, Statistical Science 6, 1991), which draws a rater with few votes to 0.

    `image` and `rater` (n,) count from 0 without gaps; no pair of them occurs twice. Raters whom no chain of images
    links are not compared: within each set of linked ones, b sums to 0. Votes come back as they are where offsets
    cannot be told from noise: no images in common, or no more variance between raters than noise would give.
    """
    from scipy.sparse import coo_array, diags_array
    from scipy.sparse.linalg import LinearOperator, cg

    per_image, per_rater = np.bincount(image), np.bincount(rater)
    raters, freedom = len(per_rater), len(votes) - len(per_image)

    def within(values: Array) -> Array:
        return values - (np.bincount(image, values) / per_image)[image]

    rest = within(votes)
    square, sums = float(rest @ rest), np.asarray(np.bincount(rater, rest), np.float64)
    if freedom == 0 or square <= 1e-20 * float(votes @ votes):
        return votes
    # the raters' normal equations are (K + s/t) b = sums, with K = diag(votes) - seen share
    seen = coo_array((np.ones(len(votes)), (rater, image)), shape=(raters, len(per_image))).tocsr()
    share = (seen @ diags_array(1 / per_image)).tocsr()
    if raters <= _EXACT:
        values, vectors = np.linalg.eigh(np.diag(per_rater) - (share @ seen.T).toarray())
        values, along = np.maximum(values, 0), vectors.T @ sums
        ratio = _most_likely(values, along, square, freedom)
        return votes if ratio is None else votes - (vectors @ (along / (values + ratio)))[rater]

    own = share.sum(axis=1)  # the diagonal of share seen'
    common = sum(float(((share[i : i + _CHUNK] @ seen.T).data ** 2).sum()) for i in range(0, raters, _CHUNK))
    norm = common - 2 * float(per_rater @ own) + float(per_rater @ per_rater)
    between = float(sums @ sums) - square
    if norm <= freedom * (1 + _FLAT) or between <= 0:
        return votes
    between /= norm - freedom
    ratio = max(square / freedom / between - 1, _LEAST_RATIO)
    normal = LinearOperator((raters, raters), lambda b: np.bincount(rater, within(b[rater])) + ratio * b)
    scaled = LinearOperator((raters, raters), lambda b: b / (per_rater - own + ratio))
    return votes - cg(normal, sums, rtol=1e-10, M=scaled)[0][rater]


def _most_likely(values: Array, along: Array, square: float, freedom: int) -> float | None:
    """The ratio s/t of greatest restricted likelihood; None where t = 0 is likelier.

    In the eigenvectors of K the rest falls apart: -2 log L = freedom log s + sum log(1 + values t/s) + S/s, where
    S = square - sum along^2 / (values + s/t); the best s for a ratio is S / freedom.
    """
    from scipy.optimize import minimize_scalar

    def cost(ratio: Array) -> Array:
        left = square - (along[:, None] ** 2 / (values[:, None] + ratio)).sum(0)
        return freedom * np.log(np.maximum(left, 1e-12 * square)) + np.log1p(values[:, None] / ratio).sum(0)

    costs = cost(_RATIOS)
    best = int(costs.argmin())
    if best == len(_RATIOS) - 1 or costs[best] > freedom * np.log(square) - _FLAT:
        return None
    bounds = np.log(_RATIOS[[max(best - 1, 0), best + 1]])
    return float(np.exp(minimize_scalar(lambda x: cost(np.exp([x]))[0], bounds=bounds, method="bounded").x))
