"""Classifiers: probabilities that mean what they say, and what is missed told for a stated prevalence."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from small_ratings import examples, space, unit

from aesthetic.catalog import load_head
from aesthetic.classify import fit_classifier
from aesthetic.head_files import save_head
from aesthetic.heads import HeadError
from aesthetic.logistic import PENALTIES, Logistic, platt
from aesthetic.splits import NESTED_UP_TO


def labelled(n=400, dim=32, rate=0.3, strength=12.0, seed=0):
    """Unit vectors, labels drawn from a logistic law, and the law's probabilities."""
    rng = np.random.default_rng(seed)
    x = unit(rng.standard_normal((n, dim)))
    odds = strength * x @ unit(rng.standard_normal((1, dim)))[0]
    odds += np.log(rate / (1 - rate))
    p = 1 / (1 + np.exp(-odds))
    return x, (rng.random(n) < p).astype(float), p


def fit(x, y, *, prevalence=0.01, dim=32, **more):
    return fit_classifier(examples(x, y, more.pop("groups", None), **more), space(dim), name="c", prevalence=prevalence)


@pytest.mark.parametrize(("n", "dim"), [(300, 20), (60, 90)])
def test_the_regression_is_scikit_learns(n, dim):
    """Turned into the rows' own directions where there are fewer rows than columns, or not."""
    x, y, _ = labelled(n, dim)
    w = np.random.default_rng(1).uniform(0.5, 3, n)
    model = Logistic(x, y, w, np.zeros(n, int))
    for i in (0, 3, 5):
        oracle = LogisticRegression(C=1 / (PENALTIES[i] * w.sum()), tol=1e-8, max_iter=10_000)
        oracle.fit(x.astype(float), y, sample_weight=w)
        got = model.path(frozenset({0}))[i].from_basis(model.basis)
        np.testing.assert_allclose(got(x), oracle.decision_function(x.astype(float)), atol=0.02, rtol=0.03)


def test_calibration_makes_odds_honest():
    rng = np.random.default_rng(0)
    odds = rng.normal(0, 2, 20_000)
    label = (rng.random(20_000) < 1 / (1 + np.exp(-odds))).astype(float)
    slope, shift = platt(3 * odds + 1, label, np.ones(20_000))
    assert (slope, shift) == (pytest.approx(1 / 3, rel=0.05), pytest.approx(-1 / 3, abs=0.05))
    assert platt(-odds, label, np.ones(20_000))[0] == 1e-3  # never turned around
    apart = np.repeat([5.0, -5.0], 50)  # separable: stays finite
    assert 0 < platt(apart, (apart > 0).astype(float), np.ones(100))[0] < 5


@pytest.mark.parametrize("n", [600, NESTED_UP_TO + 1000])
def test_a_classifier_is_calibrated_on_rows_it_has_not_seen(n, tmp_path):
    x, y, p = labelled(n)
    made = fit(x, y)
    m = made.report["metrics"]
    assert m["auroc"]["low"] < m["auroc"]["value"] < m["auroc"]["high"]
    assert m["auroc"]["value"] > 0.8
    assert np.abs(made.head(x) - p).mean() < 0.08
    assert 0.0 <= made.head(x).min() <= made.head(x).max() <= 1.0
    assert m["ece"]["value"] < (0.12 if n < 1000 else 0.08)
    assert m["log_loss"]["value"] <= m["uncalibrated_log_loss"]["value"] + 0.01
    recall = m["recall_at_5%_clean_loss"]["value"]
    assert m["missed_per_million_at_5%_clean_loss"]["value"] == pytest.approx(10_000 * (1 - recall))
    tested = np.isfinite(made.held_out)
    at = made.report["thresholds"]["5%"]
    clean = tested & (y == 0)
    assert np.mean(made.held_out[clean] >= at) <= 0.05
    again = load_head(save_head(made.head, tmp_path / "c"))
    assert (again.link, again.scale) == ("sigmoid", (0.0, 1.0))
    assert np.array_equal(again(x), made.head(x))


def test_the_order_of_rows_changes_nothing():
    x, y, _ = labelled(200)
    first = fit(x, y, ids=[str(i) for i in range(200)])
    order = np.random.default_rng(0).permutation(200)
    second = fit(x[order], y[order], ids=[str(i) for i in order])
    assert first.head.digest == second.head.digest
    assert first.report == second.report


def test_where_nothing_was_missed_the_interval_is_not_a_point():
    rng = np.random.default_rng(0)
    y = np.repeat([0.0, 1.0], [300, 40])
    x = unit(0.3 * rng.standard_normal((340, 32)) + np.outer(y, np.eye(32)[0] * 8))
    x[y == 0] = unit(rng.standard_normal((300, 32)))
    x[y == 1] = unit(np.eye(32)[0] * 2 + 0.15 * rng.standard_normal((40, 32)))
    recall = fit(x, y).report["metrics"]["recall_at_5%_clean_loss"]
    assert recall["value"] == 1.0
    assert recall["low"] == pytest.approx(0.05 ** (1 / 40))


def test_labels_that_are_noise_are_said_to_be():
    x, y, _ = labelled(300)
    report = fit(x, np.random.default_rng(3).permutation(y)).report
    assert abs(report["metrics"]["auroc"]["value"] - 0.5) < 0.15
    assert "chance" in report["verdict"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.full(400, 0.5) + 0.1 * np.arange(400) / 400}, "labels are 0 or 1"),
        ({"y": np.arange(400) // 395 * 1.0}, "5 positive and 395 negative"),
        ({"prevalence": 1.0}, "prevalence of 1"),
    ],
)
def test_labels_that_cannot_be_fitted_are_refused(change, message):
    x, y, _ = labelled()
    with pytest.raises(HeadError, match=message):
        fit(**({"x": x, "y": y} | change))
