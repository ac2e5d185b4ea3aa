"""How far two sets of images lie apart, told by features of a frozen network: KID, and the Frechet distance.

Both compare distributions: neither looks at which image belongs to which caption. What a figure means is seen beside
the same figure of real images against other real ones, and of noise against real images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Features = npt.NDArray[np.floating]

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


def scaled(vectors: Features) -> Array:
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


def kid(x: Features, y: Features, *, subset: int = SUBSET, subsets: int = SUBSETS, seed: int = 0) -> Spread:
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


def kid_floor(x: Features, *, subset: int, subsets: int = SUBSETS, seed: int = 0) -> Spread:
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


def frechet(x: Features, y: Features) -> float:
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
