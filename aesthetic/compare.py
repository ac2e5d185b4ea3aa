"""Comparisons + vectors -> a head: which of two images is better, as people chose (Bradley and Terry 1952)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from aesthetic import metrics
from aesthetic.examples import check_vectors, limit_threads
from aesthetic.heads import Head, HeadError, check_name
from aesthetic.logistic import PENALTIES, best_penalty, logistic_path, platt, row_space
from aesthetic.reports import FitResult, chance_verdict, quantiles_of, sha256_of, unsure_verdict
from aesthetic.space import Space
from aesthetic.splits import FOLDS, folds_of, groups_of

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

FEW = 30
ROUGHLY, WELL = 0.55, 0.6
"""The lower ends of the interval of what is picked rightly from which a head orders roughly, and well. Ours."""


@limit_threads
def fit_comparisons(
    vectors: npt.NDArray[Any],
    winners: npt.ArrayLike,
    losers: npt.ArrayLike,
    space: Space,
    *,
    name: str,
    ids: Sequence[str],
    groups: Sequence[Any] | None = None,
    votes: npt.ArrayLike | None = None,
    sha256: Sequence[str | None] | None = None,
    phash: Sequence[str | None] | None = None,
    task: str = "preference",
    prompts: npt.NDArray[Any] | None = None,
    card: dict[str, Any] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> FitResult:
    """Fit a head to comparisons: the log-odds that one image is preferred are the difference of their scores.

    vectors: (m, d) of the images; winners, losers: (k,) rows of them; ids, groups, sha256, phash: of the images, as in
    Examples; votes: (k,) how often a comparison counts (a tie is two, each way, of half a vote). A score has the unit
    of log-odds and is 0 for the mean image: 1 more means preferred in 73% of comparisons.

    Measured on comparisons of which the head has seen neither image: with five folds of images, those whose two images
    lie in the fold that is left out. Comparisons within a group (a prompt) are all used; of those between groups drawn
    at random about a fifth can be tested. Raises HeadError where fewer than 30 can.
    """
    x = np.asarray(vectors)
    check_name(name)
    win, lose = np.asarray(winners, np.int64), np.asarray(losers, np.int64)
    w = np.ones(len(win)) if votes is None else np.asarray(votes, np.float64)
    if not len(win) == len(lose) == len(w):
        raise HeadError(f"{name}: {len(win)} winners, {len(lose)} losers and {len(w)} votes")
    if (win == lose).any():
        raise HeadError(f"{name}: an image is compared with itself: {ids[int(win[(win == lose).argmax()])]}")
    if not (np.isfinite(w) & (w > 0)).all():
        raise HeadError(f"{name}: a number of votes is not finite, or not positive")
    check_vectors(x, space, name)
    order = np.array(sorted(range(len(win)), key=lambda i: (ids[int(win[i])], ids[int(lose[i])], w[i])), np.int64)
    win, lose, w = win[order], lose[order], w[order]
    image_groups = groups_of(ids, groups, vectors=x if space.norm == "l2" else None, sha256=sha256, phash=phash)
    fold = folds_of(image_groups.names, min(FOLDS, image_groups.count))
    pair_fold = _pair_folds(fold[win], fold[lose])
    tested = pair_fold >= 0
    _require_tested(pair_fold, name)
    log(f"{len(win):,} comparisons of {len(x):,} images in {image_groups.count:,} groups; fitting")

    x64 = x.astype(np.float64)
    difference = x64[win] - x64[lose]
    odds = np.full(len(win), np.nan)
    for held in sorted(set(pair_fold[tested])):
        train = (fold[win] != held) & (fold[lose] != held)
        direction = _fit_direction(difference[train], w[train], fold[win][train], fold[lose][train])
        odds[pair_fold == held] = difference[pair_fold == held] @ direction
    slope, _ = platt(odds[tested], np.ones(int(tested.sum())), w[tested], constant=False)
    direction = _fit_direction(difference, w, fold[win], fold[lose])
    centre = x64.mean(0)
    scores = (x64 - centre) @ direction
    report: dict[str, Any] = {
        "n": len(win),
        "images": len(x),
        **image_groups.facts,
        "how": "nested cross-validation by group; both images of a tested comparison are new",
        "tested": int(tested.sum()),
        "test_sha256": sha256_of(f"{ids[a]}\t{ids[b]}" for a, b in zip(win[tested], lose[tested], strict=True)),
        "kind": "affine",
        "calibration_slope": slope,
        "quantiles": quantiles_of(scores),
    }
    by_prompts = None if prompts is None else difference[tested] @ prompts
    report |= _measured(odds[tested], w[tested], by_prompts, [image_groups.names[i] for i in win[tested]])
    report["verdict"] = verdict(report)
    facts = ("how", "n", "images", "groups", "tested", "test_sha256", "near_duplicates_joined", "calibration_slope")
    reach = float(max(1, math.ceil(2 * np.abs(scores).max())))
    head = Head(
        name=name,
        task=task,
        space=space,
        scale=(-reach, reach),
        layers=((direction.astype(np.float32)[None, :], np.array([-centre @ direction], np.float32)),),
        card={
            **(card or {}),
            "verdict": report["verdict"],
            "metrics": {**report["metrics"], **{k: report[k] for k in facts}},
            "baselines": report["baselines"],
            "quantiles": {"of": f"scores of the {len(x):,} compared images", **report["quantiles"]},
            "unit": "log-odds: a difference of 1 means preferred in 73% of comparisons; 0 is the mean compared image",
        },
    )
    held_out = np.full(len(win), np.nan)
    held_out[order] = odds
    return FitResult(head, report, held_out, np.ones(len(win)), None)


def check_comparisons(
    winners: npt.ArrayLike, losers: npt.ArrayLike, ids: Sequence[str], groups: Sequence[Any] | None, name: str
) -> None:
    """Raise HeadError, with how many are needed, where so few comparisons can be tested that `fit_comparisons` would.

    It needs no vectors, and knows of no near-duplicates: with these it may be a few more or less.
    """
    image_groups = groups_of(ids, groups)
    fold = folds_of(image_groups.names, min(FOLDS, image_groups.count))
    _require_tested(_pair_folds(fold[np.asarray(winners, np.int64)], fold[np.asarray(losers, np.int64)]), name)


def _pair_folds(fold_win: Ints, fold_lose: Ints) -> Ints:
    """The fold that both images of a comparison lie in, else -1."""
    return np.where(fold_win == fold_lose, fold_win, -1)


def _require_tested(pair_fold: Ints, name: str) -> None:
    tested = int((pair_fold >= 0).sum())
    if tested >= FEW and len(set(pair_fold[pair_fold >= 0])) >= 2:
        return
    share = max(tested / max(1, len(pair_fold)), 1 / FOLDS)
    enough = math.ceil(1.25 * FEW / share)  # hashes deal unevenly
    raise HeadError(
        f"{name}: {len(pair_fold):,} comparisons, of which {tested:,} can be tested on images not seen; at least {FEW} "
        f"are needed. About {max(enough, len(pair_fold) + 1):,} comparisons of these images would do, or {FEW} of "
        f"images within groups (--group: a prompt, a theme), where all can be tested."
    )


def _fit_direction(difference: Array, w: Array, fold_win: Ints, fold_lose: Ints) -> Array:
    """Direction (d,) by penalised logistic regression; the penalty by comparisons of images that were left out."""

    def directions(rows: npt.NDArray[np.bool_]) -> list[Array]:
        x, basis = row_space(difference[rows])
        path = logistic_path(x, np.ones(len(x)), w[rows], comparisons=True)
        return [model.from_basis(basis).weights for model in path]

    pair_fold = _pair_folds(fold_win, fold_lose)
    odds = np.full((len(w), len(PENALTIES)), np.nan)
    for held in sorted(set(pair_fold[pair_fold >= 0])):
        train = (fold_win != held) & (fold_lose != held)
        if train.sum() >= 5:
            for i, direction in enumerate(directions(train)):
                odds[pair_fold == held, i] = difference[pair_fold == held] @ direction
    best = best_penalty(odds, np.ones(len(w)), w) if np.isfinite(odds).any() else len(PENALTIES) // 2
    return directions(np.ones(len(w), bool))[best]


def accuracy_of(odds: Array, votes: Array) -> metrics.Statistic:
    """The share of comparisons whose winner has the higher score; equal scores count half."""
    right = np.where(odds > 0, 1.0, np.where(odds == 0, 0.5, 0.0)) * votes
    return lambda w: float(w @ right / (w @ votes))


def _measured(odds: Array, votes: Array, by_prompts: Array | None, groups: Sequence[str]) -> dict[str, Any]:
    """Metrics and baselines with their intervals; by_prompts: the differences that prompts give."""
    head, likely = accuracy_of(odds, votes), -np.logaddexp(0, -odds)
    statistics: dict[str, metrics.Statistic] = {
        "accuracy": head,
        "log_loss": lambda w: float(-(w * votes) @ likely / (w @ votes)),
    }
    if by_prompts is not None:
        other = accuracy_of(by_prompts, votes)
        statistics |= {"prompts_accuracy": other, "prompts_difference": metrics.difference(head, other)}
    found = metrics.estimate(statistics, groups)
    baselines: dict[str, Any] = {"constant": {"accuracy": {"value": 0.5, "low": None, "high": None}}}
    if by_prompts is not None:
        baselines["prompts"] = {"accuracy": found["prompts_accuracy"], "difference": found["prompts_difference"]}
    return {"metrics": {k: found[k] for k in ("accuracy", "log_loss")}, "baselines": baselines}


def verdict(report: dict[str, Any]) -> str:
    """One sentence on what the head is good for: what the lower end of its interval promises."""
    accuracy = report["metrics"]["accuracy"]
    if line := chance_verdict(accuracy, 0.5, "compare"):
        return line
    if accuracy["low"] < ROUGHLY:
        return unsure_verdict(accuracy, "compare")
    if accuracy["low"] < WELL:
        return "orders images roughly: good for dropping the worst, not for choosing the best"
    return "good for ranking; its scores have no absolute meaning"
