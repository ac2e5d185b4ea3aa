"""Ridge: scikit-learn's answer, from one decomposition, whatever the order of rows or number of workers."""

import functools
import itertools

import numpy as np
import pytest
from sklearn.linear_model import Ridge as Oracle
from small_ratings import make

from aesthetic.chunks import thread_map
from aesthetic.ridge import CHUNK, PENALTIES, Moments, Ridge, path_of_sums, ridge_path


@pytest.mark.parametrize(("n", "dim"), [(240, 32), (60, 100)])
def test_the_path_is_scikit_learns_ridge(n, dim):
    x, y, _ = make(n, dim)
    x = x.astype(np.float64)
    w = np.random.default_rng(1).uniform(0.5, 20, n)
    path = ridge_path(x, y, w)
    predicted = path.predict(x)
    for i in range(4, len(PENALTIES), 6):
        oracle = Oracle(alpha=PENALTIES[i] * w.sum(), solver="cholesky").fit(x, y, sample_weight=w)
        weights, constant = path.solution(PENALTIES[i])
        np.testing.assert_allclose(weights, oracle.coef_, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(constant, oracle.intercept_, rtol=1e-6)
        np.testing.assert_allclose(predicted[:, i], oracle.predict(x), rtol=1e-6)


def test_weights_count_like_repeated_rows():
    x, y, _ = make(120)
    times = np.random.default_rng(6).integers(1, 4, len(y))
    path = ridge_path(x, y, times.astype(float))
    repeated = ridge_path(np.repeat(x, times, 0), np.repeat(y, times), np.ones(times.sum()))
    np.testing.assert_allclose(path.solution(1e-3)[0], repeated.solution(1e-3)[0], rtol=1e-8)


def test_sums_of_parts_give_the_ridge_of_the_whole():
    x, y, _ = make(500)
    w = np.random.default_rng(2).uniform(0.5, 4, 500)
    parts = [Moments.of((x[i : i + 130], y[i : i + 130], w[i : i + 130])) for i in range(0, 500, 130)]
    path = path_of_sums(sum(parts[1:], parts[0]))
    whole = ridge_path(x, y, w)
    for penalty in PENALTIES[::8]:
        np.testing.assert_allclose(path.solution(penalty)[0], whole.solution(penalty)[0], rtol=1e-9, atol=1e-12)


def test_folds_are_those_of_scikit_learn_and_the_penalty_is_the_best():
    """The sums' way (many rows) and the rows' way (few) against plain cross-validation."""
    for n, dim in ((400, 16), (60, 100)):
        x, y, _ = make(n, dim, noise=1.0)
        w, fold = np.ones(n), np.arange(n) % 5
        ridge = Ridge(x, y, w, fold)
        assert bool(ridge._sums) == (n > dim)
        errors = np.zeros(len(PENALTIES))
        for f, (i, penalty) in itertools.product(range(5), enumerate(PENALTIES)):
            train, test = fold != f, fold == f
            oracle = Oracle(alpha=penalty * train.sum()).fit(x[train].astype(float), y[train])
            errors[i] += ((oracle.predict(x[test].astype(float)) - y[test]) ** 2).sum()
        np.testing.assert_allclose(ridge.errors(ridge.folds), errors, rtol=1e-6)
        fitted = ridge.fit(ridge.folds)
        assert fitted.penalty == PENALTIES[int(np.argmin(errors))]
        assert not fitted.at_edge


def test_whoever_sums_the_result_is_the_same_to_the_last_bit():
    x, y, _ = make(3 * CHUNK + 17, 8)
    w, fold = np.ones(len(y)), np.arange(len(y)) % 2
    once = Ridge(x, y, w, fold, map).fit(frozenset({0, 1}))
    threads = Ridge(x, y, w, fold, thread_map).fit(frozenset({0, 1}))
    assert np.array_equal(once.weights, threads.weights)
    assert once.constant == threads.constant


def test_a_map_over_threads_keeps_the_order_and_raises_what_was_raised():
    assert list(thread_map(lambda v: v * v, range(50))) == [v * v for v in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(thread_map(lambda v: 1 / v, [1, 0]))
    assert list(thread_map(abs, [])) == []


@pytest.mark.long
def test_a_linear_truth_is_recovered():
    """250,000 x 768: the direction that made the scores, to a cosine of .999."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((250_000, 768), np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    truth = rng.standard_normal(768)
    y = x @ truth + 0.5 * np.std(x[:1000] @ truth) * rng.standard_normal(len(x))
    ridge = Ridge(x.astype(np.float16), y, np.ones(len(y)), np.arange(len(y)) % 5)
    fitted = ridge.fit(ridge.folds)
    assert fitted.weights @ truth / np.linalg.norm(fitted.weights) / np.linalg.norm(truth) >= 0.999


@pytest.mark.long
def test_ray_tasks_give_the_bits_of_threads():
    """Real Ray: four workers, and two, against threads here."""
    import ray

    from pipelines.runtime.cluster import ray_map

    x, y, _ = make(3 * CHUNK + 17, 8)
    w, fold = np.ones(len(y)), np.arange(len(y)) % 2
    here = Ridge(x, y, w, fold).fit(frozenset({0, 1}))
    for workers in (4, 2):
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
        try:
            there = Ridge(x, y, w, fold, functools.partial(ray_map, "auto")).fit(frozenset({0, 1}))
        finally:
            ray.shutdown()
        assert np.array_equal(here.weights, there.weights)
        assert here.constant == there.constant
