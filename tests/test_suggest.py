"""What to rate next: the same as a posterior computed anew for each image, no copies, and better than chance."""

import tracemalloc

import numpy as np
import pytest

from aesthetic.heads import HeadError
from aesthetic.ridge import ridge_path
from aesthetic.suggest import CONSIDERED, COPY, suggest


def brute_force(rated, weights, pool, penalty, count, relevance=None):
    """The definition: for each image the posterior with it among the rated ones, and the mean variance under that."""
    n, d = rated.shape
    r = np.ones(len(pool)) if relevance is None else relevance
    x, u = np.c_[rated, np.ones(n)], weights
    precision = x.T @ (u[:, None] * x) + np.diag([penalty * u.sum()] * d + [0.0])
    usual = np.sqrt(2 * np.cov(pool.T, aweights=r, ddof=0).trace())
    z = np.c_[pool, np.ones(len(pool))]
    known, taken = list(rated), []
    for _ in range(count):
        after = np.full(len(pool), np.inf)
        for i in np.flatnonzero(r):
            if min(np.linalg.norm(pool[i] - q) for q in known) > COPY * usual:
                covariance = np.linalg.inv(precision + u.mean() * np.outer(z[i], z[i]))
                after[i] = r @ np.einsum("ij,jk,ik->i", z, covariance, z, optimize=True)
        if not np.isfinite(after).any():
            break
        taken.append(int(after.argmin()))
        known.append(pool[taken[-1]])
        precision += u.mean() * np.outer(z[taken[-1]], z[taken[-1]])
    return taken


def images(m, d, seed, *, spread=1.0):
    """Unit vectors in a cone, some directions of it wider than others, as encoders give them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, d)) * np.linspace(1, 0.1, d) * spread
    x += 2 * np.random.default_rng(99).standard_normal(d)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("penalty", [1e-6, 1e-2, 10])
@pytest.mark.parametrize(("n", "d"), [(1, 12), (8, 40), (40, 40), (200, 12), (10, 6)])
def test_it_is_the_greedy_choice_of_a_posterior_computed_anew(n, d, penalty):
    rated, pool = images(n, d, 1), images(150, d, 2)
    weights = np.random.default_rng(3).uniform(0.5, 20, n)
    expected = brute_force(rated, weights, pool, penalty, 8)
    assert len(expected) == 8
    assert suggest(rated, weights, pool, penalty, 8).tolist() == expected


def test_relevance_says_whose_score_matters():
    rated, pool, weights = images(20, 30, 1), images(150, 30, 2), np.ones(20)
    relevance = np.random.default_rng(4).uniform(0, 2, len(pool)) * (np.arange(len(pool)) % 3 > 0)
    found = suggest(rated, weights, pool, 1e-2, 8, relevance=relevance)
    assert found.tolist() == brute_force(rated, weights, pool, 1e-2, 8, relevance)
    assert (relevance[found] > 0).all()
    assert found.tolist() != suggest(rated, weights, pool, 1e-2, 8).tolist()


def test_only_the_ratio_of_weights_counts():
    rated, pool = images(20, 30, 1), images(500, 30, 2)
    weights = np.random.default_rng(3).uniform(0.5, 20, 20)
    first = suggest(rated, weights, pool, 1e-2, 10)
    assert np.array_equal(suggest(rated, 1000 * weights, pool, 1e-2, 10), first)


def test_copies_of_rated_images_are_left_out_even_where_they_would_tell_most():
    rated, pool = images(20, 30, 1), images(400, 30, 2)
    rated[7] = -rated[7]  # far from all others: under a strong penalty one rating leaves most of its variance
    rng = np.random.default_rng(5)
    pool[100:150] = rated[7] + 1e-3 * rng.standard_normal((50, 30))  # a burst of it
    before = suggest(np.delete(rated, 7, 0), np.ones(19), pool, 1.0, 1)
    assert 100 <= before[0] < 150
    found = suggest(rated, np.ones(20), pool, 1.0, 400)
    assert not set(range(100, 150)) & set(found.tolist()) and len(found) > 100


def test_of_near_copies_one_is_suggested_and_of_equal_images_the_first():
    rated = images(20, 30, 1)
    kinds = images(8, 30, 2)
    rng = np.random.default_rng(6)
    which = rng.integers(0, 8, 4000)
    alike = suggest(rated, np.ones(20), kinds[which], 10.0, 100)  # copies lie in all the parts that the pool is read in
    assert sorted(which[alike]) == list(range(8))
    assert all(row == np.flatnonzero(which == which[row])[0] for row in alike)
    near = suggest(rated, np.ones(20), kinds[which] + 1e-3 * rng.standard_normal((4000, 30)), 10.0, 100)
    assert which[near].tolist() == which[alike].tolist()


@pytest.mark.long
def test_a_large_memory_mapped_pool_is_looked_at_in_places(tmp_path):
    rated, m, d = images(40, 128, 1).astype(np.float16), 5 * CONSIDERED, 128
    pool = images(m, d, 2).astype(np.float16)
    np.save(tmp_path / "pool.npy", pool)
    mapped = np.load(tmp_path / "pool.npy", mmap_mode="r")
    matters = (np.arange(m) % 2).astype(float)
    tracemalloc.start()
    found = suggest(rated, np.ones(40), mapped, 1e-3, 10, relevance=matters)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * CONSIDERED * d * 8
    apart = np.arange(CONSIDERED) * (m // 2) // CONSIDERED * 2 + 1
    assert np.array_equal(found, apart[suggest(rated, np.ones(40), pool[apart].astype(np.float64), 1e-3, 10)])


def test_the_order_of_the_pool_moves_only_row_numbers():
    rated, pool = images(60, 24, 1), images(5000, 24, 2)
    order = np.random.default_rng(7).permutation(len(pool))
    first = suggest(rated, np.ones(60), pool, 1e-3, 20)
    assert np.array_equal(order[suggest(rated, np.ones(60), pool[order], 1e-3, 20)], first)


def error_after(rows, pool, target, penalty):
    """Mean squared error on images apart of a ridge fitted to the pool's first images and to `rows`."""
    train = np.r_[:30, rows]
    path = ridge_path(pool[train], target[train], np.ones(len(train)))
    return np.mean((path.predict(pool[2000:], [penalty])[:, 0] - target[2000:]) ** 2)


@pytest.mark.long
def test_suggested_ratings_teach_more_than_random_ones():
    chosen, chance = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        pool = images(3000, 48, seed)
        truth = 8 * pool @ rng.standard_normal(48)
        target = truth + 0.3 * truth.std() * rng.standard_normal(3000)
        target[2000:] = truth[2000:]  # the error is measured against the truth
        penalty = 1e-4
        rows = 30 + suggest(pool[:30], np.ones(30), pool[30:2000], penalty, 20)
        chosen.append(error_after(rows, pool, target, penalty))
        chance.append(error_after(rng.choice(np.arange(30, 2000), 20, replace=False), pool, target, penalty))
    assert np.mean(np.log(chosen)) < np.mean(np.log(chance)) + np.log(0.9)  # measured: 0.80


def test_what_does_not_fit_together_is_refused():
    rated, pool, ones = images(5, 8, 1), images(50, 8, 2), np.ones(5)
    broken = pool.copy()
    broken[42, 3] = np.nan
    infinite = pool.astype(np.float16)
    infinite[17, 0] = np.inf
    for arguments, words in [
        ((rated[0], ones, pool, 1.0, 5), "rated vectors of shape"),
        ((rated[:0], ones[:0], pool, 1.0, 5), "at least one row"),
        ((rated, ones, pool[:, :7], 1.0, 5), r"\(50, 7\).*\(m, 8\)"),
        ((rated, ones[:4], pool, 1.0, 5), "weights for 5 rated images"),
        ((rated, np.array([1, 1, 1, 1, -1]), pool, 1.0, 5), "not a positive number"),
        ((broken[40:45], ones, pool, 1.0, 5), "rated row 2 is not finite"),
        ((rated, ones, broken, 1.0, 5), "row 42 of the pool"),
        ((rated, ones, infinite, 1.0, 5), "row 17 of the pool"),
        ((rated, ones, pool, 0.0, 5), "penalty 0"),
        ((rated, ones, pool, float("nan"), 5), "penalty nan"),
        ((rated, ones, pool, 1.0, 0), "at least one"),
    ]:
        with pytest.raises(HeadError, match=words):
            suggest(*arguments)
    with pytest.raises(HeadError, match="relevances for a pool of 50"):
        suggest(rated, ones, pool, 1.0, 5, relevance=np.ones(49))
    with pytest.raises(HeadError, match="relevance is not"):
        suggest(rated, ones, pool, 1.0, 5, relevance=-np.ones(50))
    assert len(suggest(rated, ones, pool[:0], 1.0, 5)) == 0
