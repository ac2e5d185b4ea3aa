"""Ratings + vectors -> a head, and how good it is.

A head is a ridge in closed form. Its one number to choose, the penalty, is chosen by cross-validation inside the rows
it is fitted to. How good it is comes from rows that it has not seen: with up to 3,000 images from a second
cross-validation around that one, in which each group is predicted by a head that knows nothing of it, and with more
from a test set that is held back by hash, looked at once, and never fitted to. Every other predictor of the report
(baselines, a network) learns from and predicts the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from aesthetic import baselines, metrics
from aesthetic.chunks import Map, thread_map
from aesthetic.examples import Examples, Prepared, calm, prepare
from aesthetic.heads import Head, HeadError, Layer
from aesthetic.network import apply_network, fit_network
from aesthetic.reports import Fit, card_of, doubt, facts_of, leak, quantiles_of, unsure
from aesthetic.ridge import Fitted, Ridge, ridge_path
from aesthetic.sources import Scales, fit_scales, reference_of
from aesthetic.space import Space
from aesthetic.splits import TEST, Round, first_groups, rounds_of

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CURVE = (1 / 8, 1 / 4, 1 / 2)

ROUGHLY, WELL = 0.2, 0.4
"""The lower ends of Spearman's interval from which a head orders images roughly, and well enough to choose the best.
Ours, round numbers: one person's vote agrees with the mean of many at about 0.46 (AVA)."""


@calm
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
    tell: Callable[[str], None] = lambda line: None,
) -> Fit:
    """Fit a head to ratings, and measure it on ratings that it has not seen.

    scale: lowest and highest possible rating; with several sources, that of the one with most images, to which the
    others are brought. network: try a network as well, and take it if it is better than the ridge beyond doubt (the
    lower end of the paired difference's 95% interval is above 0). prompts: (d,) a direction of the space from text
    prompts, as a baseline that was not trained. map: where sums over rows are made. tell: called with what is going on.

    Raises HeadError where the input does not fit together, has fewer than 10 rows or fewer than 3 groups.
    """
    tell("looking for near-duplicates")
    data = prepare(examples, space, name, scale)
    for source in sorted(set(data.sources)):
        scores = data.y[[s == source for s in data.sources]]
        if np.ptp(scores) == 0:
            raise HeadError(f"{name}: every score of the source {source} is {scores[0]:g}; leave it out")
    fold, rounds = rounds_of(data.groups, name)
    final = frozenset(int(f) for f in np.unique(fold)) - {TEST}
    tell(f"{len(data.y):,} ratings in {data.groups.count:,} groups; fitting")
    ridges = _Ridges(data, fold, map)

    held_out, rated = np.full(len(data.y), np.nan), np.full(len(data.y), np.nan)
    constant, curve = np.full(len(data.y), np.nan), {f: np.full(len(data.y), np.nan) for f in CURVE}
    others: dict[str, Array] = {}
    layers: tuple[Layer, ...]
    columns = baselines.usable(data.metadata)
    for r in rounds:
        ridge, y, scales = ridges(r.folds)
        fitted = ridge.fit(r.folds)
        rated[r.test] = y[r.test]
        held_out[r.test] = fitted(data.x[r.test])
        constant[r.test] = data.w[r.train] @ y[r.train] / data.w[r.train].sum()
        predictions = baselines.of_round(data.x, y, data.w, columns, r.train, r.test)
        if network:
            layers = fit_network(data.x[r.train], y[r.train], data.w[r.train])
            predictions["network"] = apply_network(layers, data.x[r.test])
        for what, predicted in predictions.items():
            others.setdefault(what, np.full(len(data.y), np.nan))[r.test] = predicted
        for share, predicted in curve.items():
            predicted[r.test] = _with_less(data, y, fitted.penalty, share, r)
    if prompts is not None:
        others["prompts"] = np.where(np.isfinite(held_out), data.x.astype(np.float64) @ prompts, np.nan)

    if len(rounds) > 1:  # the only round learns from the same folds
        ridge, y, scales = ridges(final)
    best = ridge.fit(final)
    tested = np.isfinite(held_out)
    rated[~tested] = y[~tested]
    tell(f"measuring on {int(tested.sum()):,} images not seen")
    report = _report(data, tested, rated, held_out, constant, others, rounds)
    report |= {"penalty": best.penalty, "penalty_at_edge": best.at_edge}
    layers = ((best.weights.astype(np.float32)[None, :], np.array([best.constant], np.float32)),)
    if network and (report["network"]["difference"]["low"] or 0) > 0:
        rows = np.flatnonzero(fold != TEST)
        layers = fit_network(data.x[rows], y[rows], data.w[rows])
        held_out = others["network"]
        report |= _measured(data, tested, rated, held_out)
        report |= {"penalty": None, "penalty_at_edge": False}
    report["kind"] = "affine" if len(layers) == 1 else "network"
    if scales:
        report["sources"] = {
            s: {"n": data.sources.count(s), "offset": scales.offset[s], "factor": scales.factor[s]}
            for s in sorted(set(data.sources))
        }
    report["learning_curve"] = _curve(data, tested, rated, curve, held_out, rounds)
    report["verdict"] = verdict(report)
    head = Head(
        name=name,
        task=task,
        space=space,
        scale=(float(scale[0]), float(scale[1])),
        layers=layers,
        card={**(card or {}), **_card(report)},
    )
    return Fit(head, report, data.as_given(held_out), data.as_given(rated), report["penalty"])


# Splits and what is fitted on them -----------------------------------------------------------------------------------


class _Ridges:
    """The ridge of some folds and the scores it is fitted to; with several sources scores depend on the folds."""

    def __init__(self, data: Prepared, fold: Ints, map: Map) -> None:
        self.data, self.fold, self.map = data, fold, map
        self.reference = reference_of(data.sources)  # of all, so that every fold's scale is the same
        self.one = self._of(data.y, fold != TEST) if len(set(data.sources)) == 1 else None

    def _of(self, y: Array, rows: npt.NDArray[np.bool_]) -> Ridge:
        return Ridge(self.data.x[rows], y[rows], self.data.w[rows], self.fold[rows], self.map)

    def __call__(self, folds: frozenset[int]) -> tuple[Ridge, Array, Scales | None]:
        """The ridge, the scores (n,), and by which scales they came to the reference's where there are several."""
        d = self.data
        if self.one is not None:
            return self.one, d.y, None
        rows = np.isin(self.fold, sorted(folds))
        sources = [d.sources[i] for i in np.flatnonzero(rows)]
        if missing := set(d.sources) - set(sources):
            raise HeadError(
                f"the ratings of {', '.join(sorted(missing))} lie in one fold: too few groups to tell their scale. "
                f"Leave the source out, or rate more of it."
            )
        scales = fit_scales(d.x[rows], d.y[rows], d.w[rows], sources, self.fold[rows], self.reference, self.map)
        y = scales.to_reference(d.y, d.sources)
        return self._of(y, rows), y, scales


def _with_less(data: Prepared, y: Array, penalty: float, share: float, r: Round) -> Array:
    """What a ridge on a share of the groups predicts. Its prior stays: the penalty per weight grows as rows go."""
    rows = r.train[first_groups([data.groups.names[i] for i in r.train], share)]
    if len(rows) < 5:
        return np.full(len(r.test), np.nan)
    part = data.w[rows].sum() / data.w[r.train].sum()
    weights, constant = ridge_path(data.x[rows], y[rows], data.w[rows]).solution(penalty / part)
    return Fitted(weights, constant, penalty)(data.x[r.test])


# The report ----------------------------------------------------------------------------------------------------------


def _measured(data: Prepared, tested: npt.NDArray[np.bool_], rated: Array, predicted: Array) -> dict[str, Any]:
    """What is said of a predictor: statistics with intervals, noise, calibration, quantiles."""
    names = [data.groups.names[i] for i in np.flatnonzero(tested)]
    x, y = predicted[tested], rated[tested]
    found: dict[str, Any] = {"metrics": metrics.estimate(metrics.rating_statistics(x, y), names)}
    found["calibration"] = metrics.calibration_table(x, y, names)
    found["quantiles"] = quantiles_of(x)
    share = metrics.reliability(data.y[tested], data.votes[tested], data.sd[tested])
    correlation = found["metrics"]["pearson"]["value"] or 0.0
    if share is not None and len(set(data.sources)) == 1:
        worth = metrics.worth_of(correlation, data.y[tested], data.votes[tested], data.sd[tested])
        worth = None if worth is None or math.isinf(worth) else worth
        found["noise"] = {"reliability": share, "ceiling": math.sqrt(share), "worth_raters": worth}
    else:
        found["noise"] = None
    return found


def _report(
    data: Prepared,
    tested: npt.NDArray[np.bool_],
    rated: Array,
    held_out: Array,
    constant: Array,
    others: dict[str, Array],
    rounds: list[Round],
) -> dict[str, Any]:
    names = [data.groups.names[i] for i in np.flatnonzero(tested)]
    y, x = rated[tested], held_out[tested]
    head = metrics.spearman_of(x, y)
    compared: dict[str, metrics.Statistic] = {"constant_rmse": metrics.rmse_of(constant[tested], y)}
    for what, predicted in others.items():
        other = metrics.spearman_of(predicted[tested], y)
        compared[f"{what}_spearman"] = other
        better = (other, head) if what == "network" else (head, other)
        compared[f"{what}_difference"] = metrics.difference(*better)
    found = metrics.estimate(compared, names)
    report = facts_of(data, tested, rounds) | {
        "baselines": {
            "constant": {"rmse": found["constant_rmse"]},
            **{
                what: {"spearman": found[f"{what}_spearman"], "difference": found[f"{what}_difference"]}
                for what in others
                if what != "network"
            },
        },
    }
    if "network" in others:
        report["network"] = {"spearman": found["network_spearman"], "difference": found["network_difference"]}
    return report | _measured(data, tested, rated, held_out)


def _curve(
    data: Prepared,
    tested: npt.NDArray[np.bool_],
    rated: Array,
    curve: dict[float, Array],
    held_out: Array,
    rounds: list[Round],
) -> list[dict[str, Any]]:
    """Spearman against the number of images learnt from."""
    names = [data.groups.names[i] for i in np.flatnonzero(tested)]
    learnt = float(np.mean([len(r.train) for r in rounds]))
    points = []
    for share, predicted in {**curve, 1.0: held_out}.items():
        known = np.isfinite(predicted[tested])
        if not known.all():
            continue
        statistic = metrics.spearman_of(predicted[tested], rated[tested])
        found = metrics.estimate({"spearman": statistic}, names, draws=300)["spearman"]
        points.append({"n": round(learnt * share), **found})
    return points


def verdict(report: dict[str, Any]) -> str:
    """One sentence on what a head is good for: what the lower end of its interval promises."""
    spearman = report["metrics"]["spearman"]
    if told := doubt(spearman, 0.0, "rate") or leak(report, "spearman", 0.0, "Spearman"):
        return told
    if spearman["low"] < ROUGHLY:
        return unsure(spearman, "rate")
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
    facts = (
        "how",
        "n",
        "groups",
        "tested",
        "tested_groups",
        "near_duplicates_joined",
        "test_sha256",
        "penalty",
        "kind",
    )
    card = card_of(report, facts, "predictions") | {"learning_curve": report["learning_curve"]}
    for optional in ("noise", "sources", "network"):
        if report.get(optional):
            card[optional] = report[optional]
    return card
