"""Single votes -> mean scores with their number and spread: of one row a vote, or of a histogram an image."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from aesthetic.heads import HeadError
from aesthetic.raters import without_raters
from aesthetic.rating_files import N_NAMES, POSITIVE, SCORE_NAMES, SD_NAMES, RatingFile

if TYPE_CHECKING:
    import pandas as pd

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
