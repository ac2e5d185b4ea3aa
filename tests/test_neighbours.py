"""Neighbours among vectors, against all compared with all."""

from __future__ import annotations

import time

import numpy as np
import pytest
from small_ratings import unit

from aesthetic.neighbours import TOO_LARGE, cell_pairs, fit_cells, near_vectors, nearest, nearest_cells


def cone(n: int, dim: int, seed: int = 0, spread: float = 0.0) -> np.ndarray:
    """Unit vectors in a cone, as CLIP's; equally wide everywhere, or in some directions more than in others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dim)) * np.arange(1, dim + 1) ** -float(spread) + 1.0 / (1 + 3 * spread)
    copies = rng.integers(0, n, (n // 10, 2))
    x[copies[:, 0]] = x[copies[:, 1]] + rng.uniform(0, 0.6, (len(copies), 1)) * rng.standard_normal((len(copies), dim))
    return np.asarray(unit(x))


def brute(x: np.ndarray, cosine: float) -> np.ndarray:
    return np.argwhere(np.triu(x.astype(float) @ x.astype(float).T >= cosine, 1)) @ [len(x), 1]


@pytest.mark.parametrize("cosine", [0.9, 0.95])
@pytest.mark.parametrize(("n", "dim", "spread"), [(300, 16, 0), (3000, 96, 0), (3000, 96, 1)])
def test_near_vectors_are_all_pairs_above_the_cosine(n: int, dim: int, spread: float, cosine: float) -> None:
    x = cone(n, dim, spread=spread)
    found = near_vectors(x, cosine) @ [n, 1]
    assert (np.diff(found) > 0).all()
    assert np.isin(brute(x, cosine + 1e-6), found).all()  # the products are float32
    assert np.isin(found, brute(x, cosine - 1e-6)).all()
    assert len(found) > n // 40


def test_the_nearest_of_more_others_than_fit_a_block() -> None:
    x, others = cone(1100, 24, 1), cone(17_000, 24, 2)
    others[9000:9005] = x[:5]
    others[5:10] = x[:5]  # equal ones: the smaller index first
    indices, cosines = nearest(x, others.astype(np.float16), 4)
    exact = x.astype(float) @ others.astype(np.float16).astype(float).T
    assert np.allclose(cosines, -np.sort(-exact, axis=1)[:, :4], atol=1e-6)
    assert np.allclose(cosines, np.take_along_axis(exact, indices, axis=1), atol=1e-6)
    assert indices[:5, :2].tolist() == [[5 + i, 9000 + i] for i in range(5)]
    assert all(len(set(row)) == 4 for row in indices.tolist())


def test_the_nearest_of_few_others_or_none() -> None:
    x = cone(7, 8)
    assert nearest(x, x[:2], 3)[0].shape == (7, 2)
    assert nearest(x, x, 7)[0][:, 0].tolist() == list(range(7))
    assert nearest(x, x[:0], 3)[1].shape == (7, 0)
    assert nearest(x[:0], x, 3)[0].shape == (0, 3)


# --------------------------------------------------------------------------------------------------------------- cells


def test_cells_are_the_same_for_any_number_of_threads() -> None:
    import faiss

    x = np.concatenate([cone(6000, 48), unit(np.eye(48)[:1] + 0.1 * cone(1500, 48, 3))])
    threads = faiss.omp_get_max_threads()
    try:
        found = []
        for n in (1, 2, 4):
            faiss.omp_set_num_threads(n)
            found.append(fit_cells(x, 40, 5))
    finally:
        faiss.omp_set_num_threads(threads)
    assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()
    assert found[0].tobytes() != fit_cells(x, 40, 6).tobytes()
    assert np.allclose(np.linalg.norm(found[0], axis=1), 1, atol=1e-5)


def test_cells_that_are_too_large_are_split_but_not_equal_rows() -> None:
    rng = np.random.default_rng(0)
    topics = unit(rng.standard_normal((200, 32)))
    dense = unit(topics[0] + 0.02 * rng.standard_normal((4000, 32)))
    equal = np.repeat(topics[1:2], 1000, axis=0)
    x = np.concatenate(
        [unit(topics[rng.integers(2, 200, 2000)] + 0.05 * rng.standard_normal((2000, 32))), dense, equal]
    )
    centroids = fit_cells(x, 50, 0)
    cell = nearest_cells(x, centroids, 1)[:, 0]
    sizes = np.bincount(cell, minlength=len(centroids))
    assert len(centroids) > 50 and sizes.min() > 0
    assert sum(sizes > TOO_LARGE * len(x) / len(centroids)) <= 1  # the equal ones
    assert len(set(cell[-1000:].tolist())) == 1
    assert fit_cells(equal[:10], 4, 0).shape == (1, 32)
    assert fit_cells(x[:3], 8, 0).shape == (3, 32)
    assert fit_cells(x[:0], 8, 0).shape == (0, 32)


def test_the_nearest_cells() -> None:
    x, centroids = cone(300, 16), cone(20, 16, 1)
    found = nearest_cells(x.astype(np.float16), centroids, 8)
    exact = np.argsort(-(x.astype(np.float16).astype(np.float32) @ centroids.T), axis=1, kind="stable")[:, :8]
    assert found.dtype == np.int32 and (found == exact).mean() > 0.99
    assert nearest_cells(x, centroids[:3], 8).shape == (300, 3)


@pytest.mark.parametrize("most", [1, 5, 64, 5000])
def test_pairs_of_a_cell(most: int) -> None:
    rng = np.random.default_rng(1)
    x = cone(2600, 24).astype(np.float16)
    x[:300] = x[0]  # equal images
    ids = rng.permutation(10**12 + np.arange(2600))
    query, member = rng.permutation(2600)[:1500], rng.permutation(2600)[:2200]
    near = x[query].astype(np.float32) @ x[member].astype(np.float32).T
    expected = {}
    for i, q in enumerate(query):
        hits = sorted((int(ids[m]), near[i, j]) for j, m in enumerate(member) if m != q and near[i, j] >= 0.8)
        top = max((c for _, c in hits), default=0)
        best = next((k for k, c in hits if c >= top - 1e-5), None)  # of those as near the smallest id
        for n, (k, c) in enumerate(hits):
            if n < most or k == best:
                expected[min(k, int(ids[q])), max(k, int(ids[q]))] = c
    pairs, cosines = cell_pairs(x[query], ids[query], x[member], ids[member], 0.8, most)
    assert cosines.dtype == np.float32
    assert [tuple(p) for p in pairs.tolist()] == sorted(expected)
    assert np.allclose(cosines, [expected[a, b] for a, b in pairs.tolist()], atol=1e-5)


def test_a_cell_of_equal_images_takes_no_more_pairs_than_are_needed() -> None:
    x, ids = np.repeat(cone(1, 16), 3000, axis=0), np.arange(3000)
    start = time.process_time()
    pairs, _ = cell_pairs(x, ids, x, ids, 0.95)
    assert time.process_time() - start < 10
    assert len(pairs) < 66 * 3000 and np.bincount(pairs[:, 0])[0] == 2999


def test_no_pairs_of_nothing() -> None:
    x, none = cone(5, 8), np.zeros(0, np.int64)
    for q, m in ((x, x[:0]), (x[:0], x), (x[:1], x[:1])):
        ids = np.arange(5)
        pairs, cosines = cell_pairs(q, ids[: len(q)], m, ids[: len(m)], 0.5)
        assert pairs.shape == (0, 2) and cosines.shape == none.shape
