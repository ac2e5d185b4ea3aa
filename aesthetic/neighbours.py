"""Neighbours among unit vectors: all pairs within a cosine, the nearest of others, and cells to look for them in.

All that is compared is compared as float32, in blocks, so that memory does not grow with the number of rows. Vectors
may be float16, and lie in files (np.memmap).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Vectors = npt.NDArray[Any]

_FILTER_DIMS = 32
_BLOCK = 2048
_CELL_BLOCK = 1024
_MANY = 0.01  # share of a block's pairs from which one product of matrices is quicker than so many of rows
_SLACK = 1e-5  # by how much a product of matrices may miss that of two rows

ROUNDS = 4
"""How often cells that are too large are split again, at most, where nothing else is said."""

TOO_LARGE = 4.0
"""Cells with more than this many times the mean number of rows are split again: large ones take most of the time."""

NEAREST = 8
"""Cells in which a row's neighbours are looked for. By measurement on made-up vectors like CLIP's: of pairs with a
cosine of .95 97% lie in one another's eight nearest cells, and 63% in one cell."""

_ITERATIONS = 10
_ROWS_PER_CELL = 256  # of a sample, that k-means looks at
_SAMPLE_PER_CELL = 64  # rows that cells are fitted on, where all lie in memory
_COMPARED = 500  # rows that are compared with all, to say how many pairs were found


def near_vectors(vectors: Vectors, cosine: float) -> Ints:
    """All pairs (i < j) of unit vectors (n, d) with at least this cosine: (pairs, 2), sorted.

    Exact. A projection onto directions at right angles shortens distances only, so most pairs are ruled out by the 32
    directions in which the vectors differ most, and rows that lie too far apart along the first are never compared. For
    20,000 vectors as the bundled encoder makes them that takes 1.2 s of CPU, and all products of 1,664 numbers 5.8 s.
    """
    x = np.ascontiguousarray(vectors, np.float32)
    n, d = x.shape
    if n < 2:
        return np.zeros((0, 2), np.int64)
    radius2 = 2 - 2 * cosine + 1e-4
    sample = x[:: max(1, n // 10_000)].astype(np.float64)
    sample = sample - sample.mean(0)
    k = min(_FILTER_DIMS, d)
    directions = np.linalg.eigh(sample.T @ sample)[1][:, ::-1][:, :k].astype(np.float32)
    p = x @ directions
    order = np.argsort(p[:, 0], kind="stable")
    x, p = x[order], p[order]
    halves, ones = -np.einsum("ij,ij->i", p, p)[:, None] / 2, np.ones((n, 1), np.float32)
    left, right = np.hstack([p, halves, ones]), np.hstack([p, ones, halves])  # their product is -distance^2 / 2
    found = []
    for i in range(0, n, _BLOCK):
        a = slice(i, min(i + _BLOCK, n))
        reach = p[a.stop - 1, 0] + np.sqrt(radius2)
        for j in range(i, n, _BLOCK):
            if p[j, 0] > reach:
                break
            b = slice(j, min(j + _BLOCK, n))
            near = np.flatnonzero(left[a] @ right[b].T >= -radius2 / 2)
            if len(near) > _MANY * (a.stop - i) * (b.stop - j):
                near = np.flatnonzero(x[a] @ x[b].T >= cosine - _SLACK)
            rows, columns = np.divmod(near, b.stop - j)
            rows, columns = rows + i, columns + j
            rows, columns = rows[rows < columns], columns[rows < columns]
            close = _cosines(x, rows, x, columns) >= cosine
            one, other = order[rows[close]], order[columns[close]]
            found.append(np.minimum(one, other) * n + np.maximum(one, other))
    return np.stack(np.divmod(np.sort(np.concatenate(found)), n), 1)


def _cosines(x: Vectors, rows: Ints, y: Vectors, columns: Ints) -> Floats:
    """Of pairs of rows, (m,): the same whatever they were found with."""
    found = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _BLOCK):
        part = slice(start, start + _BLOCK)
        a, b = (np.asarray(v[at[part]], np.float32) for v, at in ((x, rows), (y, columns)))
        found[part] = np.einsum("ij,ij->i", a, b)
    return found


def nearest(vectors: Vectors, others: Vectors, count: int) -> tuple[Ints, Floats]:
    """The `count` others with the largest cosine to each vector: (indices, cosines), each (n, count), nearest first.

    Exact; of equal cosines the smaller index comes first. Vectors (n, d) and (m, d) of unit norm; of fewer others than
    `count` all are given.
    """
    count = min(count, len(others))
    indices, cosines = np.zeros((len(vectors), count), np.int64), np.zeros((len(vectors), count), np.float32)
    for start in range(0, len(vectors) if count else 0, _BLOCK // 2):
        x = np.asarray(vectors[start : start + _BLOCK // 2], np.float32)
        best = np.full((len(x), count), -np.inf, np.float32)
        where = np.zeros((len(x), count), np.int64)
        for at in range(0, len(others), 4 * _BLOCK):
            near = x @ np.asarray(others[at : at + 4 * _BLOCK], np.float32).T
            least = best[:, -1:]
            if at == 0 and near.shape[1] > count:
                least = np.nextafter(np.partition(near, -count, axis=1)[:, -count, None], np.float32(-np.inf))
            row, column = np.nonzero(near > least)
            best, where = _merge(best, where, row, column + at, near[row, column])
        flat = where.ravel()
        exact = _cosines(x, np.repeat(np.arange(len(x)), count), others, flat).reshape(where.shape)
        order = np.lexsort((where, -exact), axis=1)
        indices[start : start + len(x)] = np.take_along_axis(where, order, axis=1)
        cosines[start : start + len(x)] = np.take_along_axis(exact, order, axis=1)
    return indices, cosines


def _merge(best: Floats, where: Ints, row: Ints, column: Ints, cosine: Floats) -> tuple[Floats, Ints]:
    """The best of each row, of what there is (n, count) and of what is new, (m,) each."""
    n, count = best.shape
    rows = np.concatenate([np.repeat(np.arange(n), count), row])
    columns, cosines = np.concatenate([where.ravel(), column]), np.concatenate([best.ravel(), cosine])
    order = np.lexsort((columns, -cosines, rows))
    first = np.searchsorted(rows[order], np.arange(n))
    chosen = order[first[:, None] + np.arange(count)]
    return cosines[chosen], columns[chosen]


# --------------------------------------------------------------------------------------------------------------- cells


@contextmanager
def one_thread() -> Iterator[None]:
    """faiss on one thread: with others the last bits of its products differ, and with them the cells of some rows."""
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def near_vectors_in_cells(vectors: Vectors, cosine: float) -> tuple[Ints, float | None]:
    """Most pairs (i < j) of unit vectors (n, d) with at least this cosine, (pairs, 2), sorted; and the recall.

    A row is compared with those of the NEAREST of sqrt(n) cells, so the time grows with n^1.5: 50,000 vectors of 768
    numbers take 4 s of CPU, and all with all 8 s; 1 million about 5 minutes, in place of an hour. Of a row's partners
    some may be left out where they are tied to it by others (cell_pairs).

    Recall: the share of the near pairs of 500 rows, compared with all, whose two rows are connected; None where they
    have none.
    """
    n = len(vectors)
    cells, rng = round(n**0.5), np.random.default_rng(0)
    centroids = fit_cells(vectors[np.sort(rng.permutation(n)[: _SAMPLE_PER_CELL * cells])], cells, 0)
    near = nearest_cells(vectors, centroids, NEAREST)
    queries, query_edges = _by_cell(near, len(centroids))
    members, member_edges = _by_cell(near[:, :1], len(centroids))
    codes = [np.zeros(0, np.int64)]
    for cell in range(len(centroids)):
        q = queries[query_edges[cell] : query_edges[cell + 1]]
        m = members[member_edges[cell] : member_edges[cell + 1]]
        pairs, _ = cell_pairs(vectors[q], q, vectors[m], m, cosine)
        codes.append(pairs[:, 0] * n + pairs[:, 1])
    pairs = np.stack(np.divmod(np.unique(np.concatenate(codes)), max(n, 1)), 1)
    return pairs, _recall(vectors, np.sort(rng.permutation(n)[:_COMPARED]), cosine, pairs)


def _by_cell(near: npt.NDArray[np.int32], cells: int) -> tuple[Ints, Ints]:
    """Rows in the order of their cells (n, count), and where each cell begins, (cells + 1,)."""
    order = np.argsort(near.ravel(), kind="stable")
    return order // near.shape[1], np.searchsorted(near.ravel()[order], np.arange(cells + 1))


def _recall(vectors: Vectors, sample: Ints, cosine: float, pairs: Ints) -> float | None:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(vectors)
    ends = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    component = connected_components(ends, directed=False)[1]
    true, found, x = 0, 0, np.asarray(vectors[sample], np.float32)
    for start in range(0, n, 8 * _BLOCK):
        others = np.asarray(vectors[start : start + 8 * _BLOCK], np.float32)
        row, other = np.nonzero(x @ others.T >= cosine)
        row, other = sample[row], other + start
        row, other = row[row != other], other[row != other]
        true, found = true + len(row), found + int((component[row] == component[other]).sum())
    return found / true if true else None


def fit_cells(sample: Vectors, cells: int, seed: int, rounds: int = ROUNDS) -> Floats:
    """Centroids (k, d) of about `cells` cells, unit norm: spherical k-means, and cells that are too large split again.

    sample: (n, d) unit vectors; of more than 256 per cell a random part is looked at. k is smaller where the sample has
    fewer different rows, and larger where cells were split: those with more than TOO_LARGE times the mean of rows,
    `rounds` times at most. On one thread, whatever number is set, so that all find the same.
    """
    x = np.ascontiguousarray(sample, np.float32)
    if not len(x):
        return x
    centroids = _k_means(x, cells, seed)
    for turn in range(1, rounds + 1):
        cell = nearest_cells(x, centroids, 1)[:, 0]
        sizes = np.bincount(cell, minlength=len(centroids))
        mean = len(x) / len(centroids)
        large = np.flatnonzero(sizes > TOO_LARGE * mean)
        parts = {int(c): _k_means(x[cell == c], int(np.ceil(sizes[c] / mean)), seed + turn) for c in large}
        parts = {c: part for c, part in parts.items() if len(part) > 1}  # equal rows can't be told apart
        if not parts:
            break
        centroids = np.concatenate([parts.get(c, centroids[c : c + 1]) for c in range(len(centroids))])
    return centroids


def _k_means(x: Floats, cells: int, seed: int) -> Floats:
    """Centroids of at most `cells` cells, of which none is empty."""
    import faiss

    cells = max(1, min(cells, len(x)))
    fit = faiss.Kmeans(
        x.shape[1],
        cells,
        niter=_ITERATIONS,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=_ROWS_PER_CELL,
    )
    with one_thread():
        fit.train(x)
    centroids = np.asarray(fit.centroids, np.float32).reshape(cells, -1)
    return centroids[np.unique(nearest_cells(x, centroids, 1))]


def nearest_cells(vectors: Vectors, centroids: Floats, count: int) -> npt.NDArray[np.int32]:
    """The `count` cells whose centroids have the largest cosine to each vector: (n, count), nearest first.

    Vectors (n, d), centroids (k, d); all cells where k is smaller. On one thread, as fit_cells.
    """
    import faiss

    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids, np.float32))
    found = np.empty((len(vectors), min(count, len(centroids))), np.int32)
    for start in range(0, len(vectors), 8 * _BLOCK):
        x = np.ascontiguousarray(vectors[start : start + 8 * _BLOCK], np.float32)
        with one_thread():
            found[start : start + len(x)] = index.search(x, found.shape[1])[1]
    return found


def cell_pairs(
    query_vectors: Vectors, query_ids: Ints, member_vectors: Vectors, member_ids: Ints, cosine: float, most: int = 64
) -> tuple[Ints, Floats]:
    """Pairs of a query and a member of a cell with at least this cosine: ids (p, 2), the smaller first, and cosines.

    Sorted, each once. Of a query's partners only the `most` with the smallest ids are kept, and the nearest: a cell of
    n images that all look alike gives no n^2 pairs, and all are still tied to the first. Beside the pairs about 50 MB
    of memory are used.

    Args:
        query_vectors, member_vectors: (q, d) and (m, d) of unit norm.
        query_ids, member_ids: (q,) and (m,) int64, each id once; no pair is made of a row and itself.
    """
    order = np.argsort(member_ids, kind="stable")
    member_ids = np.asarray(member_ids, np.int64)[order]
    found, cosines = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.float32)]
    for start in range(0, len(query_ids), _CELL_BLOCK):
        ids = np.asarray(query_ids[start : start + _CELL_BLOCK], np.int64)
        x = np.asarray(query_vectors[start : start + _CELL_BLOCK], np.float32)
        row, column, exact = _partners(x, ids, member_vectors, member_ids, order, cosine, most)
        one, other = ids[row], member_ids[column]
        found.append(np.stack([np.minimum(one, other), np.maximum(one, other)], 1))
        cosines.append(exact)
    pairs, values = np.concatenate(found), np.concatenate(cosines)
    if not len(pairs):
        return pairs, values
    at = np.lexsort((pairs[:, 1], pairs[:, 0]))
    pairs, values = pairs[at], values[at]
    new = np.concatenate([[True], (np.diff(pairs, axis=0) != 0).any(1)])
    return pairs[new], values[new]


def _partners(
    x: Floats, ids: Ints, members: Vectors, member_ids: Ints, order: Ints, cosine: float, most: int
) -> tuple[Ints, Ints, Floats]:
    """Of one block of queries: (row, member, cosine). member_ids ascend, members[order] are theirs."""
    m = len(member_ids)
    kept = np.zeros(len(x), np.int64)  # partners of each query that are certain
    best, where = np.full(len(x), -np.inf, np.float32), np.full(len(x), -1, np.int64)
    found = [np.zeros(0, np.int64)]  # row * m + member
    for at in range(0, m, _CELL_BLOCK):
        part = slice(at, at + _CELL_BLOCK)
        near = x @ np.asarray(members[order[part]], np.float32).T
        own = np.searchsorted(member_ids[part], ids).clip(max=near.shape[1] - 1)
        near[np.flatnonzero(member_ids[part][own] == ids), own[member_ids[part][own] == ids]] = -np.inf
        row, column = np.nonzero(near >= cosine - _SLACK)
        if not len(row):
            continue
        value, start = near[row, column], np.flatnonzero(np.diff(row, prepend=-1))
        rows, length = row[start], np.diff(start, append=len(row))
        height = np.maximum.reduceat(value, start)
        # rounding must not choose among equal ones: the first of all that are as near
        nearest_one = np.flatnonzero(value >= np.repeat(height - _SLACK, length))
        nearest_one = nearest_one[np.flatnonzero(np.diff(row[nearest_one], prepend=-1))]
        better = height > best[rows] + _SLACK
        where[rows[better]] = column[nearest_one[better]] + at
        best[rows] = np.maximum(best[rows], height)
        certain = value >= cosine + _SLACK
        until = np.concatenate([[0], np.cumsum(certain)])
        before = until[:-1] - np.repeat(until[start] - kept[rows], length)  # of the same query, with smaller ids
        kept += np.bincount(row[certain], minlength=len(x))
        found.append((row * m + column + at)[before < most])
    code = np.sort(np.concatenate([*found, (np.arange(len(x)) * m + where)[where >= 0]]))
    row, column = np.divmod(code[np.flatnonzero(np.diff(code, prepend=-1))], max(m, 1))
    exact = _cosines(x, row, members, order[column])
    row, column, exact = row[exact >= cosine], column[exact >= cosine], exact[exact >= cosine]
    keep = (np.arange(len(row)) - np.searchsorted(row, row) < most) | (where[row] == column)
    return row[keep], column[keep], exact[keep]
