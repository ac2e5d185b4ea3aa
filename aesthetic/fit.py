"""Ratings + vectors -> a head, and how good it is.

A head is a ridge in closed form. Its one number to choose, the penalty, is chosen by cross-validation inside the rows
it is fitted to. How good it is comes from rows that it has not seen: with up to 3,000 images from a second
cross-validation around that one, in which each group is predicted by a head that knows nothing of it, and with more
from a test set that is held back by hash, looked at once, and never fitted to. Every other predictor of the report
(baselines, a network) learns from and predicts the same rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from aesthetic import baselines, metrics
from aesthetic.chunks import Map, thread_map
from aesthetic.examples import Examples, PreparedExamples, limit_threads, prepare
from aesthetic.heads import Head, HeadError, Layer, apply_layers
from aesthetic.reports import FitResult, card_of, chance_verdict, facts_of, leak_verdict, quantiles_of, unsure_verdict
from aesthetic.ridge import FittedRidge, Ridge, Scales, fit_scales, reference_of, ridge_path
from aesthetic.space import Space
from aesthetic.splits import TEST, Split, first_groups, make_splits, predict_splits

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

CURVE = (1 / 8, 1 / 4, 1 / 2)
"""The shares of the groups of which a learning curve is made."""

QUICK = ("spearman", "pearson", "slope")
"""The statistics of a quick fit: what its verdict and its worth in raters need. A draw is the same for any of them."""

_HIDDEN, _EPOCHS, _DECAY = 64, 200, 1e-2  # of a network

ROUGHLY, WELL = 0.2, 0.4
"""The lower ends of Spearman's interval from which a head orders images roughly, and well enough to choose the best.
Ours, round numbers: one person's vote agrees with the mean of many at about 0.46 (AVA)."""


@limit_threads
def fit_head(
    examples: Examples,
    space: Space,
    *,
    name: str,
    scale: tuple[float, float],
    task: str = "aesthetic",
    network: bool = False,
    prompts: npt.NDArray[Any] | None = None,
    card: dict[str, Any] | None = None,
    map: Map = thread_map,
    quick: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> FitResult:
    """Fit a head to ratings, and measure it on ratings that it has not seen.

    scale: lowest and highest possible rating; with several sources, that of the one with most images, to which the
    others are brought. network: try a network as well, and take it if it is better than the ridge beyond doubt (the
    lower end of the paired difference's 95% interval is above 0). prompts: (d,) a direction of the space from text
    prompts, as a baseline that was not trained. map: where sums over rows are made. quick: leave out what does not
    touch the head (baselines, the network, the learning curve, the calibration, all statistics but Spearman, Pearson
    and the slope): the head and these figures are the same, bit for bit, in a quarter of the time. log: called with
    what is going on.

    Raises HeadError where the input does not fit together, has fewer than 10 rows or fewer than 3 groups.
    """
    log("looking for near-duplicates")
    data = prepare(examples, space, name, scale)
    for source in sorted(set(data.sources)):
        scores = data.y[[s == source for s in data.sources]]
        if np.ptp(scores) == 0:
            raise HeadError(f"{name}: every score of the source {source} is {scores[0]:g}; leave it out")
    fold, splits = make_splits(data.groups, name)
    log(f"{len(data.y):,} ratings in {data.groups.count:,} groups; fitting")
    x, w, ridges, columns = data.x, data.w, _Ridges(data, fold, map), baselines.usable(data.metadata)

    def predict(split: Split) -> dict[str, Array]:
        train, test = split.train, split.test
        ridge, y, _ = ridges(split.folds)
        fitted = ridge.fit(split.folds)
        found = {"rated": y[test], "head": fitted(x[test])}
        if quick:
            return found
        found["constant"] = np.full(len(test), w[train] @ y[train] / w[train].sum())
        found |= baselines.predict(x, y, w, columns, train, test)
        if network:
            tried = fit_network(x[train], y[train], w[train])
            found["network"] = apply_layers(tried, x[test].astype(np.float32)).astype(np.float64)

        # ridges on shares of the groups, of the same prior: the penalty per weight grows as rows go
        for share in CURVE:
            rows = train[first_groups([data.groups.names[i] for i in train], share)]
            found[str(share)] = np.full(len(test), np.nan)
            if len(rows) >= 5:
                penalty = fitted.penalty / (w[rows].sum() / w[train].sum())
                less = FittedRidge(*ridge_path(x[rows], y[rows], w[rows]).solution(penalty), penalty)
                found[str(share)] = less(x[test])
        return found

    predicted = predict_splits(splits, len(data.y), predict)
    rated, head_scores, tested = predicted["rated"], predicted["head"], np.isfinite(predicted["head"])
    if prompts is not None:
        predicted["prompts"] = np.where(tested, x.astype(np.float64) @ prompts, np.nan)
    final = frozenset(int(f) for f in np.unique(fold)) - {TEST}
    ridge, y, scales = ridges(final)
    best = ridge.fit(final)
    rated[~tested] = y[~tested]

    log(f"measuring on {int(tested.sum()):,} images not seen")
    report = facts_of(data, tested, splits) | _measured(data, tested, predicted, quick)
    report |= {"baselines": {}} if quick else _compared(data, tested, predicted)
    report |= {"penalty": best.penalty, "penalty_at_edge": best.at_edge, "kind": "affine"}
    layers: tuple[Layer, ...]
    layers = ((best.weights.astype(np.float32)[None, :], np.array([best.constant], np.float32)),)
    if network and not quick and (report["network"]["difference"]["low"] or 0) > 0:
        rows = np.flatnonzero(fold != TEST)
        layers = fit_network(x[rows], y[rows], w[rows])
        head_scores = predicted["head"] = predicted["network"]
        report |= _measured(data, tested, predicted) | {"penalty": None, "penalty_at_edge": False, "kind": "network"}
    if scales:
        report["sources"] = {
            s: {"n": data.sources.count(s), "offset": scales.offset[s], "factor": scales.factor[s]}
            for s in sorted(set(data.sources))
        }
    report["learning_curve"] = [] if quick else _learning_curve(data, tested, predicted, splits)
    report["verdict"] = verdict(report)
    head = Head(
        name=name,
        task=task,
        space=space,
        scale=(float(scale[0]), float(scale[1])),
        layers=layers,
        card={**(card or {}), **_card(report)},
    )
    return FitResult(head, report, data.as_given(head_scores), data.as_given(rated), report["penalty"])


class _Ridges:
    """The ridge of some folds and the scores it is fitted to; with several sources scores depend on the folds."""

    def __init__(self, data: PreparedExamples, fold: npt.NDArray[np.int64], map: Map) -> None:
        self.data, self.fold, self.map = data, fold, map
        self.reference = reference_of(data.sources)  # of all, so that every fold's scale is the same
        self.one = self._ridge(data.y, fold != TEST) if len(set(data.sources)) == 1 else None
        self._several: dict[frozenset[int], tuple[Ridge, Array, Scales | None]] = {}

    def _ridge(self, y: Array, rows: Bools) -> Ridge:
        return Ridge(self.data.x[rows], y[rows], self.data.w[rows], self.fold[rows], self.map)

    def __call__(self, folds: frozenset[int]) -> tuple[Ridge, Array, Scales | None]:
        """The ridge, the scores (n,), and by which scales they came to the reference's where there are several."""
        d = self.data
        if self.one is not None:
            return self.one, d.y, None
        if folds not in self._several:
            rows = np.isin(self.fold, sorted(folds))
            sources = [d.sources[i] for i in np.flatnonzero(rows)]
            if missing := set(d.sources) - set(sources):
                raise HeadError(
                    f"the ratings of {', '.join(sorted(missing))} lie in one fold: too few groups to tell their scale. "
                    f"Leave the source out, or rate more of it."
                )
            scales = fit_scales(d.x[rows], d.y[rows], d.w[rows], sources, self.fold[rows], self.reference, self.map)
            y = scales.to_reference(d.y, d.sources)
            self._several[folds] = self._ridge(y, rows), y, scales
        return self._several[folds]


def fit_network(x: npt.NDArray[Any], y: Array, w: Array) -> tuple[Layer, ...]:
    """A d-64-1 network with ReLU (scikit-learn's MLPRegressor, Adam, weight decay), as the layers of a head.

    x (n, d), scores y and weights w (n,). Vectors are centred and scaled to a mean square of 1, scores to mean 0 and
    variance 1; both are multiplied into the layers. The seed is fixed and the rows come sorted: the same data give the
    same network on one machine.
    """
    from sklearn.neural_network import MLPRegressor

    share = w / w.sum()
    a = x.astype(np.float32)
    centre = (share @ a).astype(np.float32)
    a -= centre
    scale = float(np.sqrt(share @ (a**2).mean(1))) or 1.0
    mean = float(share @ y)
    spread = float(np.sqrt(share @ (y - mean) ** 2)) or 1.0
    # fewer passes over more rows: about the same number of steps from 20,000 rows on
    epochs = int(np.clip(_EPOCHS * 20_000 / len(y), 10, _EPOCHS))
    net = MLPRegressor(
        hidden_layer_sizes=(_HIDDEN,), alpha=_DECAY, max_iter=epochs, tol=0, n_iter_no_change=epochs + 1, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the number of epochs is the plan, not a failure to converge
        net.fit(a / np.float32(scale), ((y - mean) / spread).astype(np.float32), sample_weight=w)
    first, last = (c.astype(np.float64) for c in net.coefs_)
    bias = net.intercepts_[0] - (centre.astype(np.float64) / scale) @ first
    layers = ((first / scale).T, bias), (last.T * spread, net.intercepts_[1] * spread + mean)
    return tuple((weight.astype(np.float32), bias.astype(np.float32)) for weight, bias in layers)


# The report ----------------------------------------------------------------------------------------------------------


def _compared(data: PreparedExamples, tested: Bools, predicted: dict[str, Array]) -> dict[str, Any]:
    """The head beside the baselines and the network, each with an interval and a paired difference."""
    y = predicted["rated"][tested]
    head = metrics.spearman_of(predicted["head"][tested], y)
    others = [what for what in ("nearest", "metadata", "network", "prompts") if what in predicted]
    statistics: dict[str, metrics.Statistic] = {"constant": metrics.rmse_of(predicted["constant"][tested], y)}
    for what in others:
        other = metrics.spearman_of(predicted[what][tested], y)
        better, worse = (other, head) if what == "network" else (head, other)
        statistics |= {f"{what}_spearman": other, f"{what}_difference": metrics.difference(better, worse)}
    found = metrics.estimate(statistics, data.group_names(tested))
    pairs = {what: {k: found[f"{what}_{k}"] for k in ("spearman", "difference")} for what in others}
    network = {"network": pairs.pop("network")} if "network" in pairs else {}
    return {"baselines": {"constant": {"rmse": found["constant"]}, **pairs}, **network}


def _measured(
    data: PreparedExamples, tested: Bools, predicted: dict[str, Array], quick: bool = False
) -> dict[str, Any]:
    """What is said of a predictor: statistics with intervals, noise, calibration, quantiles."""
    x, y, names = predicted["head"][tested], predicted["rated"][tested], data.group_names(tested)
    statistics = metrics.rating_statistics(x, y)
    estimates = metrics.estimate({k: statistics[k] for k in QUICK} if quick else statistics, names)
    votes = data.y[tested], data.votes[tested], data.sd[tested]
    share, noise = metrics.reliability(*votes), None
    if share is not None and len(set(data.sources)) == 1:
        worth = metrics.worth_in_raters(estimates["pearson"]["value"] or 0.0, *votes)
        worth = None if worth is None or math.isinf(worth) else worth
        noise = {"reliability": share, "ceiling": math.sqrt(share), "worth_raters": worth}
    return {
        "metrics": estimates,
        "calibration": [] if quick else metrics.calibration_table(x, y, names),
        "quantiles": quantiles_of(x),
        "noise": noise,
    }


def _learning_curve(
    data: PreparedExamples, tested: Bools, predicted: dict[str, Array], splits: list[Split]
) -> list[dict[str, Any]]:
    """Spearman against the number of images learnt from."""
    learnt = float(np.mean([len(s.train) for s in splits]))
    points = []
    for share in (*CURVE, 1.0):
        scores = predicted["head" if share == 1 else str(share)][tested]
        if np.isfinite(scores).all():
            statistic = {"spearman": metrics.spearman_of(scores, predicted["rated"][tested])}
            found = metrics.estimate(statistic, data.group_names(tested), draws=300)["spearman"]
            points.append({"n": round(learnt * share), **found})
    return points


def verdict(report: dict[str, Any]) -> str:
    """One sentence on what a head is good for: what the lower end of its interval promises."""
    spearman = report["metrics"]["spearman"]
    if line := chance_verdict(spearman, 0.0, "rate") or leak_verdict(report, "spearman", 0.0, "Spearman"):
        return line
    if spearman["low"] < ROUGHLY:
        return unsure_verdict(spearman, "rate")
    if spearman["low"] < WELL:
        return "orders images roughly: good for dropping the worst, not for choosing the best"
    slope = report["metrics"]["slope"]
    calibrated = slope["low"] is not None and 0.9 <= slope["value"] <= 1.1
    if (report["metrics"]["pearson"]["low"] or 0) >= 0.85 and calibrated:
        return "good for ranking and for absolute cuts"
    return "good for ranking, not for absolute cuts"


def to_halve(report: dict[str, Any]) -> int | None:
    """About how many more ratings would halve the interval: three times as many again (it goes with 1 / sqrt(n))."""
    return None if report["tested"] >= 5000 else 3 * int(report["tested"])


def _card(report: dict[str, Any]) -> dict[str, Any]:
    facts = ("how", "n", "groups", "tested", "tested_groups", "near_duplicates_joined", "test_sha256")
    card = card_of(report, (*facts, "penalty", "kind"), "predictions") | {"learning_curve": report["learning_curve"]}
    return card | {key: report[key] for key in ("noise", "sources", "network") if report.get(key)}
