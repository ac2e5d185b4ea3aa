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
from aesthetic.examples import Examples, PreparedExamples, limit_threads, prepare
from aesthetic.heads import Head, HeadError
from aesthetic.logistic import PENALTIES, Linear, Logistic, best_penalty, platt
from aesthetic.reports import FitResult, card_of, chance_verdict, facts_of, leak_verdict, quantiles_of, unsure_verdict
from aesthetic.space import Space
from aesthetic.splits import TEST, Split, make_splits, predict_splits

Array = npt.NDArray[np.float64]

FEW = 10
ROUGHLY = 0.7  # the lower end of AUROC's interval from which a head is of use for sorting. Ours, a round number
PREVALENCE = 0.01
"""Positives among images as they come, where nobody says otherwise: about what is assumed of unfiltered web lists."""


@limit_threads
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
    quick: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> FitResult:
    """Fit a head to labels (scores 0 or 1), and measure it on labels that it has not seen.

    Penalised logistic regression, the penalty chosen by log-loss inside the rows it is fitted to. Up to 3,000 images
    are predicted in nested cross-validation, and the calibration (Platt's) is made on the inner folds' predictions;
    with more, a test set is held back by hash, and one fold serves calibration alone. prevalence: the share of
    positives where the head will be used, for what it would miss. positive: what the label 1 means, for the verdict.
    prompts: (d,) a direction from text prompts. quick: leave out what does not touch the head (baselines, calibration,
    all statistics but AUROC and what the verdict needs); the rest is the same, bit for bit. log: called with what is
    going on.

    Raises HeadError where the input does not fit together, or there are fewer than 10 images of either label.
    """
    if not 0 < prevalence < 1:
        raise HeadError(f"{name}: a prevalence of {prevalence:g}; it is a share between 0 and 1, such as 0.01")
    log("looking for near-duplicates")
    data = prepare(examples, space, name, (0.0, 1.0))
    if not np.isin(data.y, (0.0, 1.0)).all():
        raise HeadError(f"{name}: labels are 0 or 1, not {data.y[~np.isin(data.y, (0.0, 1.0))][0]:g}")
    positives = check_labels(data.y, name)
    fold, splits = make_splits(data.groups, name)
    for split in splits:
        for without in split.folds:  # the inner folds learn from this little
            if np.ptp(data.y[np.isin(fold, sorted(split.folds - {without}))]) == 0:
                raise HeadError(
                    f"{name}: the images of one label lie in too few groups to learn from some and test on others; "
                    f"label more groups (near-duplicates are one)"
                )
    log(f"{len(data.y):,} labels, {positives:,} positive, in {data.groups.count:,} groups; fitting")
    rows, nested, columns = fold != TEST, len(splits) > 1, baselines.usable(data.metadata)
    model = Logistic(data.x[rows], data.y[rows], data.w[rows], fold[rows])

    def predict(split: Split) -> dict[str, Array]:
        calibrated, plain, _ = _calibrated(model, split.folds, nested=nested)
        x = data.x[split.test]
        found = {"head": _probability(calibrated(x)), "uncalibrated": _probability(plain(x))}
        if quick:
            return found
        return found | baselines.predict(data.x, data.y, data.w, columns, split.train, split.test)

    predicted = predict_splits(splits, len(data.y), predict)
    tested = np.isfinite(predicted["head"])
    if prompts is not None and not quick:
        predicted["prompts"] = np.where(tested, data.x.astype(np.float64) @ prompts, np.nan)
    final = frozenset(int(f) for f in np.unique(fold)) - {TEST}
    linear, _, penalty = _calibrated(model, final, nested=nested)
    log(f"measuring on {int(tested.sum()):,} images not seen")
    report = facts_of(data, tested, splits) | _report(data, tested, predicted, prevalence, quick) | {"penalty": penalty}
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
    return FitResult(head, report, data.as_given(predicted["head"]), data.as_given(data.y), penalty)


def check_labels(labels: Array, name: str) -> int:
    """How many are positive; raises HeadError where there are too few of either label."""
    positives = int(labels.sum())
    if min(positives, len(labels) - positives) < FEW:
        raise HeadError(
            f"{name}: {positives} positive and {len(labels) - positives} negative labels; "
            f"at least {FEW} of each are needed"
        )
    return positives


def _calibrated(model: Logistic, within: frozenset[int], *, nested: bool) -> tuple[Linear, Linear, float]:
    """The calibrated regression of some folds, the same uncalibrated, and its penalty."""
    folds = sorted(within)
    if nested:
        odds = model.out_of_fold(folds, within)
        best = best_penalty(odds, model.labels, model.w)
        learnt = within
    else:  # the first fold is for calibration alone, the second chooses the penalty
        learnt = within - {folds[0]}
        best = best_penalty(model.out_of_fold([folds[1]], learnt), model.labels, model.w)
        odds = model.out_of_fold([folds[0]], within)
    seen = np.isfinite(odds[:, best])
    slope, shift = platt(odds[seen, best], model.labels[seen], model.w[seen])
    plain = model.path(learnt)[best].from_basis(model.basis)
    return Linear(plain.weights * slope, plain.constant * slope + shift), plain, PENALTIES[best]


def _probability(odds: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-np.clip(odds, -500, 500))))


def _report(
    data: PreparedExamples,
    tested: npt.NDArray[np.bool_],
    predicted: dict[str, Array],
    prevalence: float,
    quick: bool,
) -> dict[str, Any]:
    names, y = data.group_names(tested), data.y[tested]
    p, uncalibrated = predicted["head"][tested], predicted["uncalibrated"][tested]
    others = [what for what in ("nearest", "metadata", "prompts") if what in predicted]

    def missed(recall: metrics.Statistic) -> metrics.Statistic:
        return lambda w: prevalence * 1e6 * (1 - recall(w))

    statistics = metrics.label_statistics(p, y)
    for loss in metrics.CLEAN_LOSSES:
        statistics[f"missed_per_million_at_{loss:.0%}_clean_loss"] = missed(metrics.recall_of(p, y, loss))
    statistics["uncalibrated_log_loss"] = metrics.log_loss_of(uncalibrated, y)
    statistics["uncalibrated_ece"] = metrics.ece_of(uncalibrated, y)
    head = metrics.auroc_of(p, y)
    for what in others:
        other = metrics.auroc_of(predicted[what][tested], y)
        statistics |= {f"{what}_auroc": other, f"{what}_difference": metrics.difference(head, other)}
    if quick:
        statistics = {name: statistics[name] for name in ("auroc", *(k for k in statistics if "_1%_" in k))}
    found = metrics.estimate(statistics, names)
    positives = int(y.sum())
    for loss in metrics.CLEAN_LOSSES[:1] if quick else metrics.CLEAN_LOSSES:
        recall = found[f"recall_at_{loss:.0%}_clean_loss"]
        if recall["value"] == 1.0:  # a bootstrap of no misses never misses: Clopper and Pearson 1934 instead
            lowest = 0.05 ** (1 / positives)
            recall |= {"low": lowest, "high": 1.0}
            found[f"missed_per_million_at_{loss:.0%}_clean_loss"] |= {
                "low": 0.0,
                "high": prevalence * 1e6 * (1 - lowest),
            }
    compared = {what: {k: found.pop(f"{what}_{k}") for k in ("auroc", "difference")} for what in others}
    return {
        "positives": int(data.y.sum()),
        "tested_positives": positives,
        "prevalence": prevalence,
        "kind": "affine",
        "baselines": compared,
        "metrics": found,
        "thresholds": {f"{loss:.0%}": metrics.threshold_of(p, y, loss) for loss in metrics.CLEAN_LOSSES},
        "calibration": [] if quick else metrics.calibration_table(p, y, names),
        "quantiles": quantiles_of(p),
    }


def verdict(report: dict[str, Any], task: str = "nsfw", positive: str = "positives") -> str:
    """One sentence on what a classifier is good for, in the words of its task."""
    auroc = report["metrics"]["auroc"]
    if line := chance_verdict(auroc, 0.5, "label") or leak_verdict(report, "auroc", 0.5, "AUROC"):
        return line
    if auroc["low"] < ROUGHLY:
        return unsure_verdict(auroc, "label")
    recall, threshold = report["metrics"]["recall_at_1%_clean_loss"], report["thresholds"]["1%"]
    missed = report["metrics"]["missed_per_million_at_1%_clean_loss"]["value"]
    if task == "nsfw":
        at = f"< {threshold:.3g} loses 1% of clean images, and misses {missed:,.0f} per million at "
        at += f"{report['prevalence']:.1%}"
    else:
        at = f">= {threshold:.3g} finds {recall['value']:.0%} of the {positive}, and 1% of the other images"
    if (recall["low"] or 0) >= 0.9:
        return f"good for filtering: {at}"
    return f"good for sorting what people will look at, not as the only filter: {at}"


def _card(report: dict[str, Any], task: str) -> dict[str, Any]:
    facts = (
        *("how", "n", "positives", "groups", "tested", "tested_positives", "tested_groups", "near_duplicates_joined"),
        *("test_sha256", "prevalence"),
    )
    sign, effect = ("<", "loses {} of clean images") if task == "nsfw" else (">=", "takes in {} of the other images")
    thresholds = {f"{sign} {v:.4g}": effect.format(k) for k, v in report["thresholds"].items()}
    return card_of(report, facts, "probabilities") | {"thresholds": thresholds}
