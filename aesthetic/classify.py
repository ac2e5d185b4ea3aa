"""Labels + vectors -> a head that gives a probability, calibrated on rows of their own, and how good it is.

For a filter accuracy says nothing: with one unsafe image in a hundred, a head that flags none is right 99 times. What
is reported is how many of the positives are found while a stated share of the clean images is lost, how many are
missed per million at a stated prevalence, and whether a probability means what it says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from aesthetic import baselines, metrics
from aesthetic.examples import Examples, Prepared, calm, prepare
from aesthetic.heads import Head, HeadError
from aesthetic.logistic import PENALTIES, Linear, Logistic, platt
from aesthetic.reports import Fit, card_of, doubt, facts_of, leak, quantiles_of, unsure
from aesthetic.space import Space
from aesthetic.splits import TEST, Round, rounds_of

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

FEW = 10
ROUGHLY = 0.7  # the lower end of AUROC's interval from which a head is of use for sorting. Ours, a round number
PREVALENCE = 0.01
"""Positives among images as they come, where nobody says otherwise: about what is assumed of unfiltered web lists."""


@calm
def fit_classifier(
    examples: Examples,
    space: Space,
    *,
    name: str,
    task: str = "label",
    prevalence: float = PREVALENCE,
    positive: str = "positives",
    prompts: npt.NDArray[Any] | None = None,
    card: dict[str, Any] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Fit:
    """Fit a head to labels (scores 0 or 1), and measure it on labels that it has not seen.

    Penalised logistic regression, the penalty chosen by log-loss inside the rows it is fitted to. Up to 3,000 images
    are predicted in nested cross-validation, and the calibration (Platt's) is made on the inner folds' predictions;
    with more, a test set is held back by hash, and one fold serves calibration alone. prevalence: the share of
    positives where the head will be used, for what it would miss. positive: what the label 1 means, for the verdict.
    prompts: (d,) a direction from text prompts.

    Raises HeadError where the input does not fit together, or there are fewer than 10 images of either label.
    """
    if not 0 < prevalence < 1:
        raise HeadError(f"{name}: a prevalence of {prevalence:g}; it is a share between 0 and 1, such as 0.01")
    tell("looking for near-duplicates")
    data = prepare(examples, space, name, (0.0, 1.0))
    if not np.isin(data.y, (0.0, 1.0)).all():
        raise HeadError(f"{name}: labels are 0 or 1, not {data.y[~np.isin(data.y, (0.0, 1.0))][0]:g}")
    positives = check_labels(data.y, name)
    fold, rounds = rounds_of(data.groups, name)
    for r in rounds:
        for without in r.folds:  # the inner folds learn from this little
            if np.ptp(data.y[np.isin(fold, sorted(r.folds - {without}))]) == 0:
                raise HeadError(
                    f"{name}: the images of one label lie in too few groups to learn from some and test on others; "
                    f"label more groups (near-duplicates are one)"
                )
    tell(f"{len(data.y):,} labels, {positives:,} positive, in {data.groups.count:,} groups; fitting")
    rows = fold != TEST
    model = Logistic(data.x[rows], data.y[rows], data.w[rows], fold[rows])

    held_out, raw = np.full(len(data.y), np.nan), np.full(len(data.y), np.nan)
    others: dict[str, Array] = {}
    columns = baselines.usable(data.metadata)
    for r in rounds:
        linear, plain, penalty = _of_round(model, r, nested=len(rounds) > 1)
        held_out[r.test] = _probability(linear(data.x[r.test]))
        raw[r.test] = _probability(plain(data.x[r.test]))
        for what, predicted in baselines.of_round(data.x, data.y, data.w, columns, r.train, r.test).items():
            others.setdefault(what, np.full(len(data.y), np.nan))[r.test] = predicted
    if prompts is not None:
        others["prompts"] = np.where(np.isfinite(held_out), data.x.astype(np.float64) @ prompts, np.nan)
    if len(rounds) > 1:
        everything = Round(frozenset(int(f) for f in np.unique(fold)), np.arange(len(fold)), np.arange(0))
        linear, _, penalty = _of_round(model, everything, nested=True)
    tested = np.isfinite(held_out)
    tell(f"measuring on {int(tested.sum()):,} images not seen")
    report = _report(data, tested, held_out, raw, others, rounds, prevalence) | {"penalty": penalty}
    report["verdict"] = verdict(report, task, positive)
    head = Head(
        name=name,
        task=task,
        space=space,
        scale=(0.0, 1.0),
        layers=((linear.weights.astype(np.float32)[None, :], np.array([linear.constant], np.float32)),),
        link="sigmoid",
        card={**(card or {}), **_card(report, task)},
    )
    return Fit(head, report, data.as_given(held_out), data.as_given(data.y), penalty)


def check_labels(labels: Array, name: str) -> int:
    """How many are positive; raises HeadError where there are too few of either label."""
    positives = int(labels.sum())
    if min(positives, len(labels) - positives) < FEW:
        raise HeadError(
            f"{name}: {positives} positive and {len(labels) - positives} negative labels; "
            f"at least {FEW} of each are needed"
        )
    return positives


def _of_round(model: Logistic, r: Round, *, nested: bool) -> tuple[Linear, Linear, float]:
    """The calibrated regression of a round's folds, the same uncalibrated, and its penalty."""
    folds = sorted(r.folds)
    if nested:
        odds = model.out_of_fold(folds, r.folds)
        best = model.best(odds)
        learnt = r.folds
    else:  # the first fold is for calibration alone, the second chooses the penalty
        learnt = r.folds - {folds[0]}
        best = model.best(model.out_of_fold([folds[1]], learnt))
        odds = model.out_of_fold([folds[0]], r.folds)
    linear = model.path(learnt)[best]
    seen = np.isfinite(odds[:, best])
    slope, shift = platt(odds[seen, best], model.labels[seen], model.w[seen])
    linear = model.unturned(linear)
    return linear.times(slope, shift), linear, PENALTIES[best]


def _probability(odds: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-np.clip(odds, -500, 500))))


def _report(
    data: Prepared,
    tested: npt.NDArray[np.bool_],
    held_out: Array,
    raw: Array,
    others: dict[str, Array],
    rounds: list[Round],
    prevalence: float,
) -> dict[str, Any]:
    rows = np.flatnonzero(tested)
    names = [data.groups.names[i] for i in rows]
    p, y = held_out[rows], data.y[rows]
    statistics = metrics.label_statistics(p, y)
    for loss in metrics.CLEAN_LOSSES:
        recalled = metrics.recall_of(p, y, loss)
        statistics[f"missed_per_million_at_{loss:.0%}_clean_loss"] = _missed(recalled, prevalence)
    statistics |= {
        "uncalibrated_log_loss": metrics.log_loss_of(raw[rows], y),
        "uncalibrated_ece": metrics.ece_of(raw[rows], y),
    }
    head = metrics.auroc_of(p, y)
    for what, predicted in others.items():
        other = metrics.auroc_of(predicted[rows], y)
        statistics[f"{what}_auroc"], statistics[f"{what}_difference"] = other, metrics.difference(head, other)
    found = metrics.estimate(statistics, names)
    positives = int(y.sum())
    for loss in metrics.CLEAN_LOSSES:
        recall = found[f"recall_at_{loss:.0%}_clean_loss"]
        if recall["value"] == 1.0:  # a bootstrap of no misses never misses: Clopper and Pearson 1934 instead
            lowest = 0.05 ** (1 / positives)
            recall["low"], recall["high"] = lowest, 1.0
            missed = found[f"missed_per_million_at_{loss:.0%}_clean_loss"]
            missed["low"], missed["high"] = 0.0, prevalence * 1e6 * (1 - lowest)
    return facts_of(data, tested, rounds) | {
        "positives": int(data.y.sum()),
        "tested_positives": positives,
        "prevalence": prevalence,
        "kind": "affine",
        "baselines": {
            what: {"auroc": found.pop(f"{what}_auroc"), "difference": found.pop(f"{what}_difference")}
            for what in others
        },
        "metrics": found,
        "thresholds": {f"{loss:.0%}": metrics.threshold_of(p, y, loss) for loss in metrics.CLEAN_LOSSES},
        "calibration": metrics.calibration_table(p, y, names),
        "quantiles": quantiles_of(p),
    }


def _missed(recall: metrics.Statistic, prevalence: float) -> metrics.Statistic:
    return lambda w: prevalence * 1e6 * (1 - recall(w))


def verdict(report: dict[str, Any], task: str = "nsfw", positive: str = "positives") -> str:
    """One sentence on what a classifier is good for, in the words of its task."""
    auroc = report["metrics"]["auroc"]
    if told := doubt(auroc, 0.5, "label") or leak(report, "auroc", 0.5, "AUROC"):
        return told
    if auroc["low"] < ROUGHLY:
        return unsure(auroc, "label")
    recall, threshold = report["metrics"]["recall_at_1%_clean_loss"], report["thresholds"]["1%"]
    missed = report["metrics"]["missed_per_million_at_1%_clean_loss"]["value"]
    good = (recall["low"] or 0) >= 0.9
    if task == "nsfw":
        told = (
            f"< {threshold:.3g} loses 1% of clean images, "
            f"and misses {missed:,.0f} per million at {report['prevalence']:.1%}"
        )
    else:
        told = f">= {threshold:.3g} finds {recall['value']:.0%} of the {positive}, and 1% of the other images"
    if good:
        return f"good for filtering: {told}"
    return f"good for sorting what people will look at, not as the only filter: {told}"


def _card(report: dict[str, Any], task: str) -> dict[str, Any]:
    facts = (
        *("how", "n", "positives", "groups", "tested", "tested_positives", "tested_groups", "near_duplicates_joined"),
        *("test_sha256", "prevalence"),
    )
    told = ("<", "loses {} of clean images") if task == "nsfw" else (">=", "takes in {} of the other images")
    thresholds = {f"{told[0]} {v:.4g}": told[1].format(k) for k, v in report["thresholds"].items()}
    return card_of(report, facts, "probabilities") | {"thresholds": thresholds}
