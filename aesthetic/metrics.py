"""How well predictions agree with ratings or labels, and how sure one can be of it.

A statistic here is a function of row weights: all ones give its value, and a bootstrap draw is a weight for each row
that says how often its group was drawn. What can be prepared once (orders, ranks of ties) is prepared once, so that a
thousand draws cost a thousand passes over the rows, and every statistic of a report, and every difference of two, is
measured on the same draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Statistic = Callable[[Array], float]
Estimate = dict[str, float | None]

TOPS = (0.01, 0.05, 0.1)
"""The shares of the best that a filter would keep, for precision and lift."""

CLEAN_LOSSES = (0.01, 0.05)
"""The shares of clean images that a filter is allowed to lose, for recall."""

_DRAWS_OF_SLOW = 200  # bootstrap draws where a draw takes n log n
_MATRIX = 1500  # rows up to which Kendall's signs are kept as a matrix


@dataclass(frozen=True)
class Correlation:
    """A statistic between -1 and 1 whose draws are even on Fisher's scale, atanh."""

    statistic: Statistic

    def __call__(self, w: Array) -> float:
        return self.statistic(w)


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Spearman's rank correlation, -1 to 1, with the mean rank for ties; NaN where one of them does not vary."""
    return spearman_of(np.asarray(a, np.float64), np.asarray(b, np.float64))(np.ones(len(np.asarray(a))))


# Statistics of ratings -----------------------------------------------------------------------------------------------


def _pearson(x: Array, y: Array, w: Array) -> float:
    total = w.sum()
    if not total > 0:
        return math.nan
    x, y = x - w @ x / total, y - w @ y / total
    xx, yy, xy = w @ (x * x), w @ (y * y), w @ (x * y)
    scale = total * 1e-24  # what is left of a constant after rounding
    return float(np.clip(xy / math.sqrt(xx * yy), -1, 1)) if xx > scale and yy > scale else math.nan


def pearson_of(x: Array, y: Array) -> Statistic:
    return Correlation(lambda w: _pearson(x, y, w))


class _Ranks:
    """Mean ranks under row weights; the order of the values is found once."""

    def __init__(self, values: Array) -> None:
        self.unique, self.codes = np.unique(values, return_inverse=True)

    def __call__(self, w: Array) -> Array:
        ties = np.bincount(self.codes, w, minlength=len(self.unique))
        return (np.cumsum(ties) - (ties - 1) / 2)[self.codes]


def spearman_of(x: Array, y: Array) -> Statistic:
    ranks_x, ranks_y = _Ranks(x), _Ranks(y)
    return Correlation(lambda w: _pearson(ranks_x(w), ranks_y(w), w))


def kendall_of(x: Array, y: Array) -> Statistic:
    """Kendall's tau-b. A draw repeats rows, and a row and its repetition are a tie in both."""
    if len(x) > _MATRIX:
        from scipy.stats import kendalltau

        return Correlation(
            lambda w: float(kendalltau(np.repeat(x, w.astype(int)), np.repeat(y, w.astype(int))).statistic)
        )
    signs = (np.sign(x[:, None] - x) * np.sign(y[:, None] - y)).astype(np.float32)
    ranks_x, ranks_y = _Ranks(x), _Ranks(y)

    def untied(ranks: _Ranks, w: Array) -> float:
        ties = np.bincount(ranks.codes, w, minlength=len(ranks.unique))
        return float(w.sum() ** 2 - ties @ ties)

    def tau(w: Array) -> float:
        pairs = math.sqrt(max(untied(ranks_x, w), 0) * max(untied(ranks_y, w), 0))
        return float(w @ (signs @ w.astype(np.float32))) / pairs if pairs > 0 else math.nan

    return Correlation(tau)


def rmse_of(x: Array, y: Array) -> Statistic:
    """Root of the mean squared difference, in the ratings' units."""
    squares = (x - y) ** 2
    return lambda w: math.sqrt(w @ squares / w.sum())


def slope_of(x: Array, y: Array) -> Statistic:
    """Calibration slope: of the rating on the prediction, by least squares; 1 is calibrated, below 1 overconfident."""

    def slope(w: Array) -> float:
        total = w.sum()
        dx = x - w @ x / total
        xx = w @ (dx * dx)
        return float(w @ (dx * y) / xx) if xx > total * 1e-24 else math.nan

    return slope


def top_of(x: Array, y: Array, share: float, lift: bool = False) -> Statistic:
    """Precision of the best `share` by prediction: how many of them are among the best `share` by rating.

    Ratings tied with the last of the best count as best. Lift is precision over what drawing at random would have.
    """
    by_x, by_y = np.argsort(-x, kind="stable"), np.argsort(-y, kind="stable")

    def precision(w: Array) -> float:
        keep = max(1.0, round(share * w.sum()))
        best = y >= y[by_y][min(int(np.searchsorted(np.cumsum(w[by_y]), keep)), len(y) - 1)]
        before = np.cumsum(w[by_x]) - w[by_x]
        taken = np.clip(keep - before, 0, w[by_x])  # of the last row only what is needed
        found = float(taken @ best[by_x] / taken.sum())
        return found / float(w @ best / w.sum()) if lift else found

    return precision


def rating_statistics(x: Array, y: Array) -> dict[str, Statistic]:
    """The statistics of a report on ratings `y` predicted as `x`."""
    return {
        "spearman": spearman_of(x, y),
        "pearson": pearson_of(x, y),
        "kendall": kendall_of(x, y),
        "rmse": rmse_of(x, y),
        "slope": slope_of(x, y),
        **{f"precision_top_{f:.0%}": top_of(x, y, f) for f in TOPS},
        **{f"lift_top_{f:.0%}": top_of(x, y, f, lift=True) for f in TOPS},
    }


# Statistics of labels ------------------------------------------------------------------------------------------------


class _Roc:
    """Positive and negative weight down the list of scores, best first, at the end of each run of ties."""

    def __init__(self, score: Array, label: Array) -> None:
        order = np.argsort(-score, kind="stable")
        self.order, self.positive = order, label[order] > 0.5
        self.ends = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)

    def __call__(self, w: Array) -> tuple[Array, Array]:
        w = w[self.order]
        return np.cumsum(w * self.positive)[self.ends], np.cumsum(w * ~self.positive)[self.ends]


def auroc_of(score: Array, label: Array) -> Statistic:
    """Area under the ROC curve: how often a positive goes before a negative, ties half."""
    roc = _Roc(score, label)

    def area(w: Array) -> float:
        tp, fp = roc(w)
        if not (tp[-1] > 0 and fp[-1] > 0):
            return math.nan
        tp, fp = np.append(0, tp), np.append(0, fp)
        return float(np.diff(fp) @ (tp[1:] + tp[:-1]) / 2 / (tp[-1] * fp[-1]))

    return area


def auprc_of(score: Array, label: Array) -> Statistic:
    """Average precision, as scikit-learn's: precision at each threshold, weighted by the recall gained there."""
    roc = _Roc(score, label)

    def area(w: Array) -> float:
        tp, fp = roc(w)
        if not tp[-1] > 0:
            return math.nan
        precision = np.divide(tp, tp + fp, out=np.zeros_like(tp), where=tp + fp > 0)
        return float(np.diff(np.append(0, tp)) @ precision / tp[-1])

    return area


def _allowed(fp: Array, loss: float) -> int:
    """How many runs of ties, best first, may be flagged for at most this loss of negatives."""
    return int(np.searchsorted(fp, loss * fp[-1] + 1e-9, side="right"))


def recall_of(score: Array, label: Array, loss: float) -> Statistic:
    """The largest share of positives found while at most `loss` of the negatives are flagged."""
    roc = _Roc(score, label)

    def recall(w: Array) -> float:
        tp, fp = roc(w)
        if not (tp[-1] > 0 and fp[-1] > 0):
            return math.nan
        allowed = _allowed(fp, loss)
        return float(tp[allowed - 1] / tp[-1]) if allowed else 0.0

    return recall


def threshold_of(score: Array, label: Array, loss: float) -> float:
    """The lowest score from which on at most `loss` of the negatives are flagged."""
    roc = _Roc(score, label)
    allowed = _allowed(roc(np.ones(len(score)))[1], loss)
    ranked = score[roc.order][roc.ends]
    return float(ranked[allowed - 1]) if allowed else float(np.nextafter(ranked[0], np.inf))


def mean_of(values: Array) -> Statistic:
    """The weighted mean."""
    return lambda w: float(w @ values / w.sum())


def brier_of(p: Array, label: Array) -> Statistic:
    """Mean squared difference of the probability and the label."""
    return mean_of((p - label) ** 2)


def log_loss_of(p: Array, label: Array) -> Statistic:
    """Mean of -log of the probability that the label was given, in nats."""
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return mean_of(-np.where(label > 0.5, np.log(p), np.log1p(-p)))


def ece_of(p: Array, label: Array) -> Statistic:
    """Expected calibration error over 15 bins of equal counts (Nguyen and O'Connor 2015)."""
    bins = 15
    bin_of = _bins_of(p, bins)

    def error(w: Array) -> float:
        gap = np.bincount(bin_of, w * (p - label), minlength=bins)
        return float(np.abs(gap).sum() / w.sum())

    return error


def label_statistics(p: Array, label: Array) -> dict[str, Statistic]:
    """The statistics of a report on labels (0 or 1) predicted as probabilities `p`."""
    return {
        "auroc": auroc_of(p, label),
        "auprc": auprc_of(p, label),
        **{f"recall_at_{loss:.0%}_clean_loss": recall_of(p, label, loss) for loss in CLEAN_LOSSES},
        "brier": brier_of(p, label),
        "log_loss": log_loss_of(p, label),
        "ece": ece_of(p, label),
    }


# Intervals -----------------------------------------------------------------------------------------------------------


def estimate(
    statistics: Mapping[str, Statistic],
    groups: Sequence[Any] | npt.NDArray[Any],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Each statistic with its 95% interval from one cluster bootstrap: {name: {value, low, high}}, None where
    there is none.

    Whole groups are drawn, with replacement: rows of a group resemble each other, so drawing rows would promise too
    much (Cameron, Gelbach and Miller 2008). A correlation's interval is Student's, of the bootstrap's standard error on
    Fisher's scale (1921); any other statistic's lies between the draws' percentiles, expanded as Hesterberg (2015)
    proposes, so that few groups promise less. The same data and seed give the same interval in any order of groups. No
    interval with fewer than two groups, or where most draws have no value.
    """
    from threadpoolctl import threadpool_limits

    names, group = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)
    count = len(names)
    values = {name: statistic(np.ones(len(group))) for name, statistic in statistics.items()}
    if count < 2:
        return {name: _estimate(value, math.nan, math.nan) for name, value in values.items()}
    slow = {name for name in statistics if name.startswith("kendall") and len(group) > _MATRIX}
    drawn: dict[str, list[float]] = {name: [] for name in statistics}
    rng = np.random.default_rng(seed)
    with threadpool_limits(1, user_api="blas"):  # a thousand dot products: waking a second thread costs more than each
        for i in range(draws):
            weights = np.bincount(rng.integers(0, count, count), minlength=count)[group].astype(np.float64)
            for name, statistic in statistics.items():
                if name not in slow or i < _DRAWS_OF_SLOW:
                    drawn[name].append(statistic(weights) if weights.any() else math.nan)
    return {
        name: _estimate(value, *_interval(value, np.array(drawn[name]), count, statistics[name]))
        for name, value in values.items()
    }


def _interval(value: float, drawn: Array, groups: int, statistic: Statistic) -> tuple[float, float]:
    from scipy.special import ndtr, stdtrit

    finite = drawn[np.isfinite(drawn)]
    if not math.isfinite(value) or len(finite) < len(drawn) / 2 or not len(finite):
        return math.nan, math.nan
    widen = math.sqrt(groups / (groups - 1))
    reach = widen * float(stdtrit(groups - 1, 0.975))  # standard errors to either side
    if isinstance(statistic, Correlation) and max(abs(value), np.abs(finite).max()) < 1:
        centre, error = math.atanh(value), float(np.std(np.arctanh(finite)))
        return math.tanh(centre - reach * error), math.tanh(centre + reach * error)
    low, high = np.quantile(finite, [float(ndtr(-reach)), float(ndtr(reach))])
    return float(low), float(high)


def _estimate(value: float, low: float, high: float) -> Estimate:
    values = {"value": value, "low": low, "high": high}
    return {k: float(v) if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN


def difference(a: Statistic, b: Statistic) -> Statistic:
    """How much larger one statistic is than another on the same rows: for a paired comparison."""
    return lambda w: a(w) - b(w)


# Calibration and noise -----------------------------------------------------------------------------------------------


def _bins_of(predicted: Array, bins: int) -> npt.NDArray[np.int64]:
    """The bin of each row: equal counts, lowest predictions first; ties stay in one bin."""
    ranks = np.searchsorted(np.sort(predicted), predicted, side="left")
    return np.minimum(ranks * bins // max(len(predicted), 1), bins - 1).astype(np.int64)


def calibration_table(predicted: Array, observed: Array, groups: Sequence[Any]) -> list[dict[str, Any]]:
    """Mean prediction against mean rating (or share of positives) in up to 10 bins of equal counts, with 95% intervals.

    Each row: predicted, observed, low, high, n.
    """
    bin_of = _bins_of(predicted, min(10, max(1, len(predicted) // 5)))
    table: list[dict[str, Any]] = []
    for b in np.unique(bin_of):
        rows = bin_of == b
        y = observed[rows]
        found = estimate({"mean": mean_of(y)}, np.asarray(groups, object)[rows], draws=200)["mean"]
        table.append({"predicted": float(predicted[rows].mean()), "observed": float(y.mean()), "n": int(rows.sum())})
        table[-1] |= {"low": found["low"], "high": found["high"]}
    return table


def reliability(means: Array, n: Array, sd: Array) -> float | None:
    """The share of the variance of mean ratings that is not the raters' noise: 1 - mean(sd^2 / n) / var(means).

    n: raters of each image; sd: sample standard deviation of their ratings. Its root is the noise ceiling: no
    prediction can correlate more than that with these means (Spearman 1904, correction for attenuation). None where
    the noise explains all, or fewer than two raters gave the typical rating.
    """
    known = np.isfinite(sd) & (n > 1)
    if known.sum() < 10 or known.mean() < 0.5 or np.ptp(means[known]) == 0:
        return None
    noise = float(np.mean(sd[known] ** 2 / n[known]))
    value = 1 - noise / float(np.var(means[known], ddof=1))
    return value if value > 0 else None


def worth_in_raters(correlation: float, means: Array, n: Array, sd: Array) -> float | None:
    """How many raters' mean would agree with the consensus as well as predictions with this Pearson correlation do.

    The mean of k raters correlates with the consensus by t / sqrt(t^2 + s^2 / k), t^2 the variance of the consensus
    and s^2 that of one rating around it (Spearman 1910, Brown 1910); solved for k at the correlation corrected for the
    noise of the means themselves. None where that is unknown; inf where predictions agree as well as noise permits.
    """
    share = reliability(means, n, sd)
    if share is None or not correlation > 0:
        return None if share is None else 0.0
    known = np.isfinite(sd) & (n > 1)
    of_one = float(np.mean(sd[known] ** 2))
    consensus = float(np.var(means[known], ddof=1)) * share
    true = correlation**2 / share
    return math.inf if true >= 1 else of_one / consensus * true / (1 - true)
