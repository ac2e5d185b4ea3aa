"""Fitting heads to ratings: in any order of rows, and honest about what they have not seen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_ratings import SCALE, examples, make, space, unit

from aesthetic import classify
from aesthetic.catalog import load_head
from aesthetic.fit import fit_head, to_halve, verdict
from aesthetic.head_files import save_head
from aesthetic.heads import HeadError
from aesthetic.metrics import spearman
from aesthetic.ridge import fit_scales
from aesthetic.space import require_same
from aesthetic.splits import NESTED_UP_TO

OASIS = Path(__file__).parents[2] / "shared" / "data" / "oasis"


def fit(x, y, groups=None, *, dim=32, scale=SCALE, network=False, prompts=None, **more):
    given = examples(x, y, groups, **more)
    return fit_head(given, space(dim), name="taste", scale=scale, network=network, prompts=prompts)


def value(report, name="spearman"):
    return report["metrics"][name]["value"]


def test_a_fitted_head_predicts_and_says_how_well(tmp_path):
    x, y, groups = make(400)
    made = fit_head(
        examples(x[:300], y[:300], groups[:300]), space(), name="taste", scale=SCALE, card={"licence": "CC0-1.0"}
    )
    assert spearman(made.head(x[300:]), y[300:]) > 0.8
    spread = made.report["metrics"]["spearman"]
    assert spread["low"] < spread["value"] < spread["high"]
    assert value(made.report, "rmse") < 0.6 * made.report["baselines"]["constant"]["rmse"]["value"]
    assert value(made.report) > made.report["baselines"]["nearest"]["spearman"]["value"]
    assert value(made.report) == pytest.approx(spearman(made.held_out, y[:300]))
    assert not made.report["penalty_at_edge"]
    curve = made.report["learning_curve"]
    assert [p["n"] for p in curve] == sorted(p["n"] for p in curve)
    assert curve[0]["value"] < curve[-1]["value"] == value(made.report)
    json.dumps(made.report, allow_nan=False)
    again = load_head(save_head(made.head, tmp_path / "h"))
    assert again.card["metrics"]["spearman"] == spread
    assert again.card["licence"] == "CC0-1.0"
    assert np.array_equal(again(x), made.head(x))
    assert "Spearman" in (tmp_path / "h" / "MODEL_CARD.md").read_text() or "spearman" in again.card["metrics"]


@pytest.mark.parametrize("sources", [None, "ab"])
def test_the_order_of_rows_changes_nothing(sources):
    x, y, groups = make()
    more = {"votes": np.random.default_rng(3).uniform(1, 5, len(y)), "metadata": {"width": np.arange(len(y)) % 7}}
    if sources:
        more["sources"] = [sources[i % 2] for i in range(len(y))]
    first = fit(x, y, groups, ids=[f"{i}" for i in range(len(y))], **more)
    order = np.random.default_rng(4).permutation(len(y))
    mixed = {k: [v[i] for i in order] for k, v in more.items() if k != "metadata"}
    mixed |= {"ids": [f"{i}" for i in order], "metadata": {"width": (np.arange(len(y)) % 7)[order]}}
    second = fit(x[order], y[order], [groups[i] for i in order], **mixed)
    assert first.head.digest == second.head.digest
    assert first.report == second.report
    assert np.array_equal(first.held_out[order], second.held_out)


def test_many_ratings_have_a_test_set_that_the_head_never_sees():
    x, y, _ = make(NESTED_UP_TO + 500, noise=1.0)
    made = fit(x, y)
    tested = np.isfinite(made.held_out)
    assert made.report["tested"] == tested.sum() < 0.25 * len(y)
    np.testing.assert_allclose(made.held_out[tested], made.head(x)[tested], atol=1e-4)
    y2 = y.copy()
    y2[tested] = np.random.default_rng(0).uniform(*SCALE, int(tested.sum()))
    assert fit(x, y2).head.digest == made.head.digest  # what the test set says changes no weight
    more = fit(*(np.concatenate([a, b]) for a, b in zip((x, y), make(500, seed=9)[:2], strict=True)))
    assert (np.isfinite(more.held_out)[: len(y)] == tested).all()


def test_what_only_the_group_tells_is_not_counted_as_skill():
    """Vectors that name their group and nothing else: rows split at random would predict well, whole groups can't."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(60), 8)
    own = rng.standard_normal((480, 64))
    y = np.clip(4 + rng.standard_normal(60)[group] + 0.1 * rng.standard_normal(480), *SCALE)
    loose = unit(rng.standard_normal((60, 64))[group] + 0.5 * own)
    assert value(fit(loose, y, dim=64).report) > 0.7  # each image its own group: a leak
    assert (value(fit(loose, y, group, dim=64).report) or 0) < 0.4
    close = unit(rng.standard_normal((60, 64))[group] + 0.1 * own)
    copies = fit(close, y, dim=64).report  # near-duplicates are found, without being told
    assert copies["groups"] == 60
    assert (value(copies) or 0) < 0.4


@pytest.mark.long
def test_metadata_alone_exposes_a_leak():
    """Scores that go with the photographer, vectors that tell who it is, and a split that knows nothing of it."""
    rng = np.random.default_rng(1)
    who = np.repeat(np.arange(60), 8)
    y = np.clip(4 + rng.standard_normal(60)[who] + 0.3 * rng.standard_normal(480), *SCALE)
    x = unit(rng.standard_normal((60, 64))[who] + 0.5 * rng.standard_normal((480, 64)))
    names = [f"photographer {v}" for v in rng.permutation(60)[who]]
    leaking = fit(x, y, dim=64, metadata={"photographer": names}).report
    assert leaking["baselines"]["metadata"]["spearman"]["value"] > 0.7
    assert "suspect a leak" in leaking["verdict"]
    honest = fit(x, y, names, dim=64, metadata={"photographer": names}).report
    assert (honest["baselines"]["metadata"]["spearman"]["value"] or 0) < 0.4
    assert "chance" in honest["verdict"]


def test_noise_is_reported_as_noise():
    x, y, groups = make(200)
    report = fit(x, np.random.default_rng(5).permutation(y), groups).report
    assert abs(value(report)) < 0.25
    assert report["metrics"]["spearman"]["low"] < 0.1
    assert "chance" in report["verdict"]


@pytest.mark.parametrize(
    ("value", "low", "high", "start"),
    [
        (0.58, 0.44, 0.69, "good for ranking, not for absolute cuts"),
        (0.49, 0.03, 0.78, "better than chance, but how much is open (0.03 to 0.78): rate more"),
        (0.45, 0.3, 0.58, "orders images roughly"),
        (0.2, -0.1, 0.4, "not shown to be better than chance"),
        (-0.4, -0.6, -0.2, "worse than chance (-0.60 to -0.20): it orders images the wrong way round"),
        (None, None, None, "too few groups"),
    ],
)
def test_a_verdict_promises_no_more_than_the_interval(value, low, high, start):
    of = {"value": value, "low": low, "high": high}
    report = {"metrics": {"spearman": of, "slope": of, "pearson": of}, "baselines": {}}
    assert verdict(report).startswith(start)
    half = {k: v and (1 + v) / 2 for k, v in of.items()}  # a share of pairs that are in the right order
    other = classify.verdict(
        {
            "metrics": {
                "auroc": half,
                "recall_at_1%_clean_loss": {"value": 0.93, "low": 0.5},
                "missed_per_million_at_1%_clean_loss": {"value": 700.0},
            },
            "thresholds": {"1%": 0.25},
            "prevalence": 0.01,
            "baselines": {},
        },
        "cats",
        "'cat'",
    )
    if low and low >= 0.4:
        assert other.endswith(": >= 0.25 finds 93% of the 'cat', and 1% of the other images")
    elif low is None or low < 0:
        assert other[:14] == start[:14]
    else:
        assert other.startswith("better than chance, but how much is open (0.")


@pytest.mark.parametrize("n", [10, 30, 300])
def test_few_ratings_still_get_an_answer(n):
    x, y, _ = make(n, dim=512, noise=0.5)
    report = fit(x, y, dim=512).report
    assert report["n"] == n
    assert report["verdict"]
    assert to_halve(report) == 3 * n


@pytest.mark.long
def test_a_network_is_taken_only_where_it_wins():
    rng = np.random.default_rng(0)
    x = unit(rng.standard_normal((600, 8)))
    bent = 4 + 4 * np.abs(x[:, 0]) + 0.1 * rng.standard_normal(600)
    won = fit(x, bent, dim=8, network=True, scale=(3.0, 9.0))
    assert won.report["kind"] == "network"
    assert value(won.report) > 0.8
    assert spearman(won.head(x), bent) > 0.8
    assert won.report["network"]["difference"]["low"] > 0
    x, y, groups = make(150, dim=8)
    lost = fit(x, y, groups, dim=8, network=True)
    assert lost.report["kind"] == "affine"
    assert "network" in lost.report
    assert fit(x, y, groups, dim=8).head.digest == lost.head.digest


def test_sources_on_other_scales_come_to_one():
    """Three sources of one taste: 1-7, 0-100 of better images, and a third that is too small for a slope of its own."""
    rng = np.random.default_rng(2)
    x = unit(rng.standard_normal((900, 32)))
    w = rng.standard_normal(32)
    truth = 4 + 3 * x @ w
    order = np.argsort(-truth + 1.5 * rng.standard_normal(900))
    source = np.full(900, "one", object)
    source[order[:300]] = "percent"  # mostly the better ones
    source[order[-20:]] = "small"
    y = truth + 0.3 * rng.standard_normal(900)
    y = np.where(source == "percent", 20 * y - 30, np.where(source == "small", y / 2, y))
    made = fit(x, y, sources=source.tolist(), scale=(-10.0, 20.0))
    scales = made.report["sources"]
    assert (scales["one"]["offset"], scales["one"]["factor"]) == (0.0, 1.0)
    assert scales["percent"]["factor"] == pytest.approx(20, rel=0.1)
    assert scales["percent"]["offset"] == pytest.approx(-30, abs=5)
    assert spearman(made.head(x), truth) > 0.95
    assert np.abs(made.head(x) - truth).mean() < 0.4
    assert np.abs(made.rated - truth).mean() < 0.5


def test_two_sources_of_equal_size_share_one_scale_in_every_fold():
    """Were the reference another in some folds, scales would mix, and how good the head is would be made up."""
    x, y, _ = make(317, noise=2.0)
    source = ["a" if i % 2 else "b" for i in range(317)]
    percent = np.where(np.arange(317) % 2, y, 14 * y - 10)
    one = value(fit(x, y).report)
    made = fit(x, percent, sources=source, scale=(-100.0, 200.0)).report
    assert value(made) == pytest.approx(one, abs=0.07)
    assert made["sources"]["a"]["factor"] == pytest.approx(1 / 14, rel=0.15)


def test_a_source_that_gave_one_score_to_all_takes_the_factor_of_its_spread():
    x, y, _ = make(100)
    source, fold = ["a", "b"] * 50, np.arange(100) // 2 % 5
    y[1::2] = 5
    scales = fit_scales(x, y, np.ones(100), source, fold, "a")
    assert scales.factor == {"a": 1.0, "b": pytest.approx(1 / np.std(y[::2]))}
    assert np.isfinite(scales.to_reference(y, source)).all()


def test_prompts_are_a_baseline_that_was_not_trained():
    x, y, groups = make(300)
    report = fit(x, y, groups, prompts=np.linalg.lstsq(x, y - y.mean(), rcond=None)[0]).report
    assert report["baselines"]["prompts"]["spearman"]["value"] > 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((240, 5), np.float32)}, r"\(n, 32\)"),
        ({"x": np.zeros((240, 32), int)}, "float type"),
        ({"y": np.full(240, 9.0)}, "row 0 is 9, outside the scale 1 to 7"),
        ({"y": np.full(240, np.nan)}, "row 0 is nan"),
        ({"y": np.full(240, 3.0)}, "every score is 3"),
        ({"y": np.ones(5), "ids": ["a"] * 240}, "240 vectors and 5 scores"),
        ({"groups": ["a", "b"] * 120}, "have 2 groups"),
        ({"votes": np.zeros(240)}, "a number of votes is not positive"),
        ({"metadata": {"width": [1]}}, "240 vectors and 1 width"),
        ({"x": np.full((240, 32), np.inf, np.float32)}, "row 0 is not finite"),
        ({"x": np.full((240, 32), 1.0, np.float32)}, "unit vectors; row 0 has norm 5.657"),
        ({"sources": ["a"] * 239 + ["b"]}, "every score of the source b is"),
        ({"scale": (7.0, 1.0)}, "two finite numbers, the lower one first"),
    ],
)
def test_ratings_that_cannot_be_fitted_are_refused(change, message):
    x, y, groups = make()
    with pytest.raises(HeadError, match=message):
        fit(**({"x": x, "y": y, "groups": groups} | change))
    with pytest.raises(HeadError, match="5 ratings; at least 10"):
        fit(x[:5], y[:5])


@pytest.mark.long
@pytest.mark.skipif(not OASIS.is_dir(), reason="the rated photographs are not here")
def test_the_shipped_bundled_head_is_what_its_script_makes(tmp_path):
    """Images, encoder, ratings and fit, end to end; other processors round differently in the last digits."""
    command = [sys.executable, "examples/fit_bundled_head.py", str(OASIS), str(tmp_path / "h")]
    root = Path(__file__).parents[1]
    subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, check=True)
    made, shipped = load_head(tmp_path / "h"), load_head("bundled-aesthetic")
    require_same(shipped.space, made.space)
    x, _, _ = make(100, made.space.dim)
    np.testing.assert_allclose(made(x), shipped(x), atol=0.01)
    found = shipped.card["metrics"]["spearman"]["value"]
    assert 0.55 < found < 0.66  # other folds move it by 0.03; above 0.70 a theme would have leaked
    assert made.card["metrics"]["spearman"]["value"] == pytest.approx(found, abs=0.01)


def test_votes_count_by_their_precision():
    """Half of the images with one noisy vote, half with a hundred: better than counting each image alike, or votes."""
    rng = np.random.default_rng(0)
    x = unit(rng.standard_normal((400, 32)))
    truth = 4 + 3 * x @ rng.standard_normal(32) * 0.5
    votes = np.where(np.arange(400) % 2, 1.0, 100.0)
    y = truth + 0.5 * rng.standard_normal(400) + 4 * rng.standard_normal(400) / np.sqrt(votes)
    wide = (-50.0, 50.0)
    weighted = fit(x, y, votes=votes, sd=np.full(400, 4.0), scale=wide).head(x)
    assert spearman(weighted, truth) > spearman(fit(x, y, scale=wide).head(x), truth) + 0.02


@pytest.mark.parametrize("n", [60, 240, 3500])
@pytest.mark.parametrize("several", [False, True])
def test_a_quick_fit_has_the_same_head_and_figures(n: int, several: bool) -> None:
    x, y, groups = make(n=n, groups=n // 2)
    rng = np.random.default_rng(4)
    more = {"metadata": {"width": rng.integers(1, 9, n).tolist()}, "votes": rng.integers(1, 9, n).astype(float)}
    more |= {"sd": rng.uniform(0.2, 1, n)} | ({"sources": [f"s{i % 2}" for i in range(n)]} if several else {})
    given = examples(x, y, groups, **more)
    whole, quick = (fit_head(given, space(), name="h", scale=SCALE, quick=quick) for quick in (False, True))
    assert whole.head.digest == quick.head.digest and whole.penalty == quick.penalty
    assert np.array_equal(whole.held_out, quick.held_out, equal_nan=True)
    for what in ("spearman", "pearson", "slope"):
        assert whole.report["metrics"][what] == quick.report["metrics"][what]
    for what in ("noise", "tested", "test_sha256", "verdict"):
        assert whole.report[what] == quick.report[what]
    assert not quick.report["baselines"] and not quick.report["learning_curve"]
