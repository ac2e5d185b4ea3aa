"""What may be in a rating file beside plain scores: histograms of votes, one row a vote, comparisons of two images.

Single votes become mean scores with their number and spread, without what raters add to all of theirs.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from aesthetic.heads import HeadError
from aesthetic.rating_files import (
    CHOICE_NAMES,
    IMAGE_NAMES,
    N_NAMES,
    POSITIVE,
    SCORE_NAMES,
    SD_NAMES,
    SIDE_NAMES,
    TIES,
    RatingFile,
)

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]

BIN = re.compile(
    r"((?:(?:score|rating|vote|count|star|bin|hist|histogram|c)s?[_. -]?)?)0{0,9}([1-9]\d{0,3})", re.IGNORECASE
)
"""The name of a bin: a usual word, if any, and how many points its votes give."""
_MIN_BINS = 3
_SHARES = 0.02  # how far from 1 the shares of a histogram may sum: rounded to two digits, ten of them are mostly nearer
_SAME_MEAN = 0.01  # of the width of the scale: how far a mean may lie from that of the histogram beside it


def find_histograms(file: RatingFile) -> list[list[str]]:
    """Columns that may be votes for 1 to K, each family in order."""
    families: dict[str, dict[int, str]] = {}
    for column in file.table.column_names:
        if bin_ := BIN.fullmatch(column):
            families.setdefault(bin_[1].lower(), {})[int(bin_[2])] = column
    return [[f[k] for k in sorted(f)] for f in families.values() if len(f) >= _MIN_BINS and max(f) == len(f)]


def from_histogram(file: RatingFile, histograms: list[list[str]]) -> tuple[dict[str, Any], set[str], int]:
    """Of votes from 1 to K, given as counts or shares: columns of the rating table, the file's columns used, and K."""
    if len(histograms) > 1:
        families = " and ".join(f"{bins[0]} to {bins[-1]}" for bins in histograms)
        raise HeadError(
            f"{file.path}: {families} may both be votes; leave one of them out, or name the column of scores"
        )
    bins = histograms[0]
    across = f"{bins[0]} to {bins[-1]}"
    counts = np.stack([file.numbers(c, "a number of votes", low=0) for c in bins], axis=1)
    total = counts.sum(1)
    if not total.all():
        raise file.error(int(total.argmin()), f"no votes: {across} are all 0; leave the image out")
    n_column, sd_column, score_column = file.find(N_NAMES), file.find(SD_NAMES), file.find(SCORE_NAMES)
    n = total
    if shares_given := bool((counts % 1).any()):
        if (odd := abs(total - 1) > _SHARES).any():
            row = int(odd.argmax())
            raise file.error(row, f"{across} sum to {total[row]:g}; votes are whole numbers, or shares that sum to 1")
        n = file.numbers(n_column, "a number of votes", low=POSITIVE) if n_column else np.full(len(total), np.inf)
    shares = counts / total[:, None]
    steps = np.arange(1.0, len(bins) + 1)
    mean = shares @ steps
    if score_column:
        given = file.numbers(score_column)
        if (differ := abs(given - mean) > _SAME_MEAN * (len(bins) - 1)).any():
            row = int(differ.argmax())
            raise file.error(
                row,
                f"{score_column} is {given[row]:g}, and the mean of {across} is {mean[row]:g}; leave one out, or name "
                "the column of scores",
            )
    spread = (shares * (steps - mean[:, None]) ** 2).sum(1)
    ddof = np.divide(1, 1 - 1 / n, out=np.full(len(n), np.nan), where=n > 1)
    data = {"score": mean, "sd": np.sqrt(spread * ddof)} | ({"n": n} if n_column or not shares_given else {})
    return data, {c for c in (n_column, sd_column, score_column) if c}, len(bins)


def from_votes(
    file: RatingFile, votes: pd.DataFrame, scale: tuple[float, float] | None
) -> tuple[pd.DataFrame, tuple[float, float] | None]:
    """Rows of votes (image, rater, score, and further columns) -> rows of images, in the order of their first votes.

    With the scale: that given, else the range of the votes of a single source. Several votes of a rater for an image
    count as one, their mean. Nothing but the rows' order depends on the order of the votes: they are sorted before they
    are summed.
    """
    import pandas as pd

    def numbered(column: str) -> Codes:  # within the source
        codes = pd.factorize(votes[column], sort=True)[0].astype(np.int64)
        return _from_zero(source * len(votes) + codes)

    source = pd.factorize(votes["source"], sort=True)[0] if "source" in votes else np.zeros(len(votes), np.int64)
    image, rater = numbered("image"), numbered("rater")
    score = votes["score"].to_numpy()
    order = np.lexsort((score, rater, image))
    i, r = image[order], rater[order]
    new = np.flatnonzero(np.r_[True, (np.diff(i) != 0) | (np.diff(r) != 0)])
    y = np.add.reduceat(score[order], new) / np.diff(np.r_[new, len(order)])
    i, r = i[new], r[new]
    first = np.full(image.max() + 1, len(image))
    np.minimum.at(first, image, np.arange(len(image)))

    low, high = np.empty(len(first)), np.empty(len(first))
    for s in range(source.max() + 1):
        rows = source[first][i] == s
        low[i[rows]], high[i[rows]] = y[rows].min(), y[rows].max()
        y[rows] = without_raters(y[rows], _from_zero(i[rows]), _from_zero(r[rows]))
    n = np.bincount(i).astype(np.float64)
    mean = np.bincount(i, y) / n
    variance = np.divide(np.bincount(i, (y - mean[i]) ** 2), n - 1, out=np.full(len(n), np.nan), where=n > 1)

    table = votes.iloc[first].drop(columns=["rater", "score"])
    several = np.bincount(image) > 1
    for name in table.columns.drop(["image", "source"], errors="ignore"):
        codes = pd.factorize(votes[name], use_na_sentinel=False)[0]
        other = codes != codes[first][image]
        agree = np.bincount(image, other) == 0
        if name == "group" and other.any():
            row = int(other.argmax())
            before = int(first[image[row]])
            raise file.error(
                row,
                f"{votes['image'][row]!r} is in the group {votes['group'][row]!r}, and in "
                f"{votes['group'][before]!r} before ({file.locate(before)}); an image has one group",
            )
        if (agree & several).any():
            table[name] = table[name].where(agree)
        else:
            table = table.drop(columns=name)
    table = table.assign(score=np.clip(mean, low, high), n=n, sd=np.sqrt(variance))
    table = table.iloc[np.argsort(first)].reset_index(drop=True)
    lowest, highest = float(np.min(low)), float(np.max(high))
    if scale is None and lowest < highest and ("source" not in table or table["source"].nunique() == 1):
        scale = lowest, highest  # means reach less far than votes
    return table, scale


def _from_zero(codes: Codes) -> Codes:
    return np.unique(codes, return_inverse=True)[1]


# What raters add to all their votes ----------------------------------------------------------------------------------

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


# Comparisons: which of two images won --------------------------------------------------------------------------------

_TIE = 2


def find_sides(file: RatingFile) -> tuple[str, str] | None:
    """The two columns of images of a file of comparisons."""
    if any(file.find([name]) for name in IMAGE_NAMES if name not in ("name", "id")):
        return None
    for one, other in (("winner", "loser"), *SIDE_NAMES):
        a, b = file.find([one]), file.find([other])
        if a and b:
            return a, b
    return None


def from_pairs(file: RatingFile, sides: tuple[str, str], choice: str | None) -> tuple[Codes, dict[str, Any], set[str]]:
    """For each comparison the row of the file that it stands in, columns of the rating table, and those used of the
    file. A tie is two comparisons, one each way.
    """
    a, b = (file.text(side) for side in sides)
    data: dict[str, Any] = {}
    used = set(sides)
    if sides[0].lower() == "winner":
        won = np.zeros(len(a), np.int64)
        if choice is not None:
            raise HeadError(f"{file.path}: winner and loser say which image won; no score ({choice}) goes with them")
    else:
        choice = file.choose("choice", choice, CHOICE_NAMES)
        used.add(choice)

        # a choice is a word for the side, or the winning image's own id
        short = [side.lower().rpartition("_")[2] for side in sides]
        side_of = {short[0]: 0, sides[0].lower(): 0, short[1]: 1, sides[1].lower(): 1} | dict.fromkeys(TIES, _TIE)
        chosen = file.text(choice)
        by_word = np.array([side_of.get(word, -1) for word in file.words(choice)], np.int64)
        by_id = np.select([chosen == a, chosen == b], [0, 1], -1)
        if (unclear := (by_word >= 0) & (by_id >= 0) & (by_word != by_id)).any():
            row = int(unclear.argmax())
            raise file.error(
                row, f"{choice} is {chosen[row]!r}: a side, or the image of that id? Write {sides[0]} or {sides[1]}"
            )
        won = np.where(by_word >= 0, by_word, by_id)
        if (won < 0).any():
            row = int((won < 0).argmax())
            raise file.error(
                row,
                f"{choice} is {chosen[row]!r}; it must be {short[0]}, {short[1]}, tie, or the id of one of the two "
                "images",
            )
    if (a == b).any():
        row = int((a == b).argmax())
        raise file.error(row, f"{a[row]!r} is compared with itself")
    rows = np.repeat(np.arange(len(won)), np.where(won == _TIE, 2, 1))
    second_of_tie = np.diff(rows, prepend=-1) == 0
    b_won = (won[rows] == 1) | second_of_tie
    n_column = file.find(N_NAMES)
    if n_column or second_of_tie.any():
        n = file.numbers(n_column, "a number of votes", low=POSITIVE) if n_column else np.ones(len(won))
        data["n"] = (n * np.where(won == _TIE, 0.5, 1))[rows]
        used |= {n_column} if n_column else set()
    data |= {"winner": np.where(b_won, b[rows], a[rows]), "loser": np.where(b_won, a[rows], b[rows])}
    return rows, data, used
