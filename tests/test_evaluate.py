"""Statistics against scipy and scikit-learn, and intervals that keep what they promise."""

import math
from functools import partial

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from aesthetic.metrics import (
    _MATRIX,
    auprc_of,
    auroc_of,
    brier_of,
    calibration_table,
    difference,
    ece_of,
    estimate,
    kendall_of,
    log_loss_of,
    pearson_of,
    recall_of,
    reliability,
    rmse_of,
    slope_of,
    spearman,
    spearman_of,
    threshold_of,
    top_of,
    worth_in_raters,
)


def pearson(a, b):
    return pearson_of(a, b)(np.ones(len(a)))


def tied(n=80, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 9, n).astype(float)
    return a, np.round(a + rng.normal(0, 2, n)) * 1.5


def test_correlations_are_scipys():
    a, b = tied()
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)
    assert kendall_of(a, b)(np.ones(80)) == pytest.approx(stats.kendalltau(a, b).statistic, rel=1e-6)
    assert np.isnan(spearman(a, np.ones(80)))
    assert np.isnan(pearson(np.full(80, 0.1), a))


@pytest.mark.parametrize("n", [80, _MATRIX + 10])
def test_a_weight_counts_a_row_so_many_times(n):
    """What a bootstrap draw relies on, for every statistic."""
    a, b = tied(n)
    p, label = 1 / (1 + np.exp(-(b - 6) / 3)), (a > 5).astype(float)
    w = np.random.default_rng(1).integers(0, 4, n).astype(float)
    times = w.astype(int)
    for make in (pearson_of, spearman_of, kendall_of, rmse_of, slope_of, lambda x, y: top_of(x, y, 0.1)):
        repeated = make(np.repeat(a, times), np.repeat(b, times))
        assert make(a, b)(w) == pytest.approx(repeated(np.ones(times.sum())), rel=1e-6)
    for make in (auroc_of, auprc_of, brier_of, log_loss_of, lambda s, y: recall_of(s, y, 0.1)):
        repeated = make(np.repeat(p, times), np.repeat(label, times))
        assert make(p, label)(w) == pytest.approx(repeated(np.ones(times.sum())), rel=1e-6)


def test_statistics_of_labels_are_scikit_learns():
    rng = np.random.default_rng(2)
    label = (rng.random(500) < 0.2).astype(float)
    p = np.round(np.clip(0.3 * label + rng.random(500) * 0.7, 0.01, 0.99), 2)  # with ties
    one = np.ones(500)
    assert auroc_of(p, label)(one) == pytest.approx(metrics.roc_auc_score(label, p))
    assert auprc_of(p, label)(one) == pytest.approx(metrics.average_precision_score(label, p))
    assert brier_of(p, label)(one) == pytest.approx(metrics.brier_score_loss(label, p))
    assert log_loss_of(p, label)(one) == pytest.approx(metrics.log_loss(label, p))
    fpr, tpr, _ = metrics.roc_curve(label, p, drop_intermediate=False)
    for loss in (0.01, 0.05, 0.5):
        assert recall_of(p, label, loss)(one) == pytest.approx(tpr[fpr <= loss + 1e-12].max())
        at = threshold_of(p, label, loss)
        assert np.mean(p[label == 0] >= at) <= loss
        assert np.mean(p[label == 1] >= at) == pytest.approx(recall_of(p, label, loss)(one))
    honest = rng.random(20_000)
    drawn = (rng.random(20_000) < honest).astype(float)
    assert ece_of(honest, drawn)(np.ones(20_000)) < 0.02
    assert ece_of(honest**2, drawn)(np.ones(20_000)) > 0.1


def test_slope_and_lift_mean_what_they_say():
    rng = np.random.default_rng(3)
    x = rng.normal(5, 1, 4000)
    assert slope_of(x, 3 + 0.5 * x)(np.ones(4000)) == pytest.approx(0.5)
    assert top_of(x, x, 0.01)(np.ones(4000)) == 1.0
    assert top_of(x, x, 0.01, lift=True)(np.ones(4000)) == pytest.approx(100)
    assert top_of(rng.permutation(x), x, 0.1, lift=True)(np.ones(4000)) == pytest.approx(1, abs=0.5)


def test_the_interval_covers_grows_with_groups_and_ignores_order():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(50), 6)
    effect = rng.standard_normal((50, 2))[group]
    y = effect[:, 0] + 0.3 * rng.standard_normal(300)
    x = y + effect[:, 1]

    def of(x, y, group):
        found = estimate({"s": spearman_of(x, y)}, group)["s"]
        return found["low"], found["value"], found["high"]

    low, value, high = of(x, y, group)
    assert low < value < high
    rows_low, _, rows_high = of(x, y, np.arange(300))
    assert high - low > 1.3 * (rows_high - rows_low)
    order = rng.permutation(300)
    assert of(x[order], y[order], group[order]) == pytest.approx((low, value, high))
    assert of(x, y, np.zeros(300))[0] is None
    assert of(np.ones(300), y, group) == (None, None, None)


def test_two_predictors_are_compared_on_the_same_draws():
    """Two that are nearly the same differ by little for sure, though each alone is uncertain."""
    rng = np.random.default_rng(1)
    y = rng.standard_normal(200)
    a = y + rng.standard_normal(200)
    b = a + 0.05 * rng.standard_normal(200)
    one, two = spearman_of(a, y), spearman_of(b, y)
    found = estimate({"a": one, "difference": difference(one, two)}, np.arange(200))
    assert found["a"]["high"] - found["a"]["low"] > 0.1
    assert found["difference"]["high"] - found["difference"]["low"] < 0.04
    assert found["difference"]["value"] == pytest.approx(one(np.ones(200)) - two(np.ones(200)))


def cover(simulate, truth, statistic, simulations, draws=400):
    """The share of simulated data sets whose 95% interval holds the truth."""
    hits = 0
    for seed in range(simulations):
        x, y, group = simulate(np.random.default_rng(seed))
        found = estimate({"s": statistic(x, y)}, group, draws=draws, seed=seed)["s"]
        hits += found["low"] <= truth <= found["high"]
    return hits / simulations


def clustered(rng, groups=80, size=4, correlation=0.6):
    """Normal pairs of a known correlation, whose groups share half of their variance."""
    cov = [[1, correlation], [correlation, 1]]
    shared = rng.multivariate_normal([0, 0], cov, groups)[np.repeat(np.arange(groups), size)]
    own = rng.multivariate_normal([0, 0], cov, groups * size)
    both = (shared + own) / math.sqrt(2)
    return both[:, 0], both[:, 1], np.repeat(np.arange(groups), size)


@pytest.mark.long
@pytest.mark.parametrize(
    ("statistic", "truth"),
    [(pearson_of, 0.6), (spearman_of, 6 / math.pi * math.asin(0.3))],  # of a normal pair: Pearson 1907
)
def test_intervals_cover_as_often_as_they_say(statistic, truth):
    """500 simulations of groups of four that share half of their variance."""
    assert 0.93 <= cover(clustered, truth, statistic, 500) <= 0.97
    assert 0.91 <= cover(partial(clustered, groups=30), truth, statistic, 500) <= 0.97  # few groups, a little less


def test_intervals_cover_roughly():
    assert cover(clustered, 0.6, pearson_of, 40, draws=200) >= 0.85


def test_the_calibration_table_holds_every_row_once():
    a, b = tied(200)
    table = calibration_table(a, b, np.arange(200))
    assert sum(row["n"] for row in table) == 200
    assert [row["predicted"] for row in table] == sorted(row["predicted"] for row in table)
    assert all(row["low"] <= row["observed"] <= row["high"] for row in table)


def test_noise_and_raters_are_those_that_were_planted():
    """Ratings of 4,000 images by 8 raters each, of a known spread: reliability, ceiling, and the worth of k raters."""
    rng = np.random.default_rng(0)
    truth = rng.normal(5, 1, 4000)
    votes = truth[:, None] + rng.normal(0, 2, (4000, 8))
    means, sd, n = votes.mean(1), votes.std(1, ddof=1), np.full(4000, 8.0)
    share = reliability(means, n, sd)
    assert share == pytest.approx(1 / (1 + 4 / 8), abs=0.02)
    assert math.sqrt(share) == pytest.approx(pearson(truth, means), abs=0.01)
    for k in (1, 3):
        others = truth + rng.normal(0, 2, (4000, k)).mean(1) if k == 1 else truth + rng.normal(0, 2, (k, 4000)).mean(0)
        assert worth_in_raters(pearson(others, means), means, n, sd) == pytest.approx(k, rel=0.15)
    assert worth_in_raters(-0.2, means, n, sd) == 0.0
    assert reliability(means, n, np.full(4000, 100.0)) is None
    assert reliability(means, np.ones(4000), sd) is None
