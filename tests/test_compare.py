"""Comparisons: Bradley and Terry's law recovered, and judged on images that are new."""

import numpy as np
import pytest
from small_ratings import space, unit

from aesthetic.compare import fit_comparisons
from aesthetic.heads import HeadError
from aesthetic.metrics import spearman


def compared(images=300, pairs=2500, dim=16, strength=6.0, prompts=None, seed=0):
    """Vectors, winners and losers drawn by Bradley and Terry's law, and the log-strengths."""
    rng = np.random.default_rng(seed)
    x = unit(rng.standard_normal((images, dim)))
    s = strength * x @ unit(rng.standard_normal((1, dim)))[0]
    a = rng.integers(0, images, pairs)
    b = rng.integers(0, images, pairs)
    if prompts:  # images of one prompt meet each other only
        b = a // prompts * prompts + (a % prompts + rng.integers(1, prompts, pairs)) % prompts
    a, b = a[a != b], b[a != b]
    first = rng.random(len(a)) < 1 / (1 + np.exp(-(s[a] - s[b])))
    return x, np.where(first, a, b), np.where(first, b, a), s


def fit(x, win, lose, **more):
    return fit_comparisons(x, win, lose, space(x.shape[1]), name="p", ids=[f"{i:05d}" for i in range(len(x))], **more)


def test_strengths_are_recovered_in_log_odds():
    x, win, lose, s = compared()
    made = fit(x, win, lose)
    scores = made.head(x)
    assert spearman(scores, s) > 0.97
    assert np.polyfit(scores, s, 1)[0] == pytest.approx(1, abs=0.15)
    assert abs(scores.mean()) < 1e-3
    low, high = made.head.scale
    assert low < scores.min() < scores.max() < high
    accuracy = made.report["metrics"]["accuracy"]
    best = np.mean(s[win] > s[lose])
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert accuracy["value"] == pytest.approx(best, abs=0.06)
    assert made.report["tested"] < 0.3 * len(win)  # both images new


def test_comparisons_within_prompts_are_all_tested():
    x, win, lose, _ = compared(prompts=4)
    made = fit(x, win, lose, groups=[f"prompt {i // 4}" for i in range(len(x))])
    assert made.report["tested"] == len(win)
    assert made.report["groups"] == 75
    assert np.isfinite(made.held_out).all()


def test_a_tie_counts_half_each_way_and_order_does_not_matter():
    x, win, lose, _ = compared(pairs=600)
    w = np.random.default_rng(0).uniform(0.5, 1.5, len(win))
    first = fit(x, win, lose, votes=w)
    order = np.random.default_rng(1).permutation(len(win))
    second = fit(x, win[order], lose[order], votes=w[order])
    assert first.head.digest == second.head.digest
    assert first.report == second.report
    both = fit(x, np.concatenate([win, lose]), np.concatenate([lose, win]), votes=np.full(2 * len(win), 0.5))
    assert np.abs(both.head(x)).max() < 0.05  # each comparison a tie: nothing is better
    assert "chance" in both.report["verdict"]


def test_comparisons_that_cannot_be_fitted_are_refused():
    x, win, lose, _ = compared()
    with pytest.raises(HeadError, match="compared with itself: 00003"):
        fit(x, [3], [3])
    with pytest.raises(HeadError, match="at least 30 are needed"):
        fit(x, win[:40], lose[:40])
    with pytest.raises(HeadError, match="1 winners, 2 losers"):
        fit(x, [0], [1, 2])
