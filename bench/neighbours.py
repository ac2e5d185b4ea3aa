"""Near pairs of made-up hashes and vectors with planted pairs: time, CPU, memory, recall. One size per call.

    python -m bench.neighbours --hashes 10000000
    python -m bench.neighbours --vectors 1000000 --dims 128 --folder DIR    (DIR takes 4 bytes per number)

The numeric core alone (aesthetic/hashes, neighbours, groups), in one process and one thread: no Ray, no data folder.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from aesthetic.groups import link_groups
from aesthetic.hashes import cross_hashes, near_hashes, pair_tables
from aesthetic.neighbours import cell_pairs, fit_cells, nearest_cells

Array = npt.NDArray[Any]

COSINES = (0.9, 0.95, 0.98, 0.99)
PLANTED = 2000  # pairs per cosine
BLOCK = 20_000


@contextmanager
def step(name: str) -> Iterator[None]:
    """Print what the block took, and the peak memory of the process so far."""
    began, cpu = time.perf_counter(), time.process_time()
    yield
    taken, used = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{name:44} {taken:9.1f} s {used:9.1f} CPU-s   peak {peak:5.2f} GB", flush=True)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hashes", type=int, metavar="N")
    parser.add_argument("--vectors", type=int, metavar="N")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--dims", type=int, default=128)
    parser.add_argument("--cosine", type=float, default=0.95)
    parser.add_argument("--cells", type=int, help="by default the root of N")
    parser.add_argument("--nearest", type=int, default=8, help="cells in which a row is compared")
    parser.add_argument("--folder", type=Path, help="for the vectors; by default a temporary one")
    asked = parser.parse_args()
    threadpool_limits(1)
    if asked.hashes:
        measure_hashes(asked.hashes, asked.bits)
    if asked.vectors:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            cells = asked.cells or round(asked.vectors**0.5)
            measure_vectors(Path(folder), asked.vectors, asked.dims, asked.cosine, cells, asked.nearest)


# -------------------------------------------------------------------------------------------------------------- hashes


def measure_hashes(n: int, bits: int) -> None:
    """95% of the hashes at random, 5% neighbours of others at 1 to 8 bits, and a tenth more that are all equal."""
    rng = np.random.default_rng(0)
    with step(f"{n:,} hashes made up"):
        hashes = rng.integers(0, 2**64, n, dtype=np.uint64)
        at = rng.integers(0, n - n // 20, n // 20)
        distance = rng.integers(1, 9, len(at))
        hashes[n - len(at) :] = hashes[at] ^ _masks(rng, distance)
        hashes[rng.integers(0, n - n // 20, n // 10)] = 0x0F0F0F0F0F0F0F0F
        base, other = hashes[at], hashes[n - len(at) :].copy()
    with step("equal ones collapsed"):
        values = np.sort(hashes)
        values = values[np.append(True, np.diff(values) != 0)]
    with step(f"pairs within {bits} bits, {pair_tables(len(values), bits)} tables"):
        pairs = near_hashes(values, bits)
    with step("groups"):
        group = link_groups(len(values), pairs)
    differ = np.bitwise_count(base ^ other)
    a, b = np.searchsorted(values, base), np.searchsorted(values, other)
    wanted = np.minimum(a, b) * np.int64(len(values)) + np.maximum(a, b)
    found = np.isin(wanted, pairs[:, 0] * np.int64(len(values)) + pairs[:, 1])
    for d in range(1, bits + 1):
        print(f"  planted at {d} bits: {found[differ == d].mean():.4f} of {(differ == d).sum():,} found")
    by_chance = len(pairs) - len(np.unique(wanted[found]))
    print(f"  {len(pairs):,} pairs, {by_chance:,} of them not planted; {len(np.unique(group)) - 1:,} groups")
    with step("beside 1,000 protected ones, within 8 bits"):
        print(f"  {len(cross_hashes(hashes, other[:1000], 8)):,} pairs")


def _masks(rng: np.random.Generator, distance: Array) -> Array:
    """Random masks with so many bits set."""
    masks = np.zeros(len(distance), np.uint64)
    while (left := np.flatnonzero(np.bitwise_count(masks) < distance)).size:
        masks[left] |= np.uint64(1) << rng.integers(0, 64, len(left), dtype=np.uint64)
    return masks


# ------------------------------------------------------------------------------------------------------------- vectors


def measure_vectors(folder: Path, n: int, dims: int, cosine: float, cells: int, nearest: int) -> None:
    """Pairs within a cosine, each row compared with the members of the cells that are nearest to it."""
    with step(f"{n:,} vectors of {dims} made up"):
        planted = make_vectors(folder / "vectors", n, dims)
    vectors = np.memmap(folder / "vectors", np.float16, "r", shape=(n, dims))
    rng = np.random.default_rng(1)
    with step(f"cells fitted, {cells:,} asked for"):
        rows = np.sort(rng.choice(n, min(n, 64 * cells), replace=False))
        centroids = fit_cells(vectors[rows], cells, 0)
    with step(f"{nearest} nearest of {len(centroids):,} cells"):
        near = nearest_cells(vectors, centroids, nearest)
    with step("sorted by cell, on disk"):
        order = np.argsort(near[:, 0], kind="stable")
        moved = np.memmap(folder / "sorted", np.float16, "w+", shape=(n, dims))
        for start in range(0, n, BLOCK):
            moved[start : start + BLOCK] = vectors[order[start : start + BLOCK]]
        near = near[order]
        sizes = np.bincount(near[:, 0], minlength=len(centroids))
        asking = np.argsort(near.ravel(), kind="stable")  # rows * nearest by the cell that they ask for
        asked = np.bincount(near.ravel(), minlength=len(centroids))
    weighted = (sizes.astype(float) ** 2).sum() / n
    print(f"  a cell has {sizes.mean():,.0f} members, at most {sizes.max():,}, where a member is {weighted:,.0f}")
    found, first, from_ = [], np.cumsum(sizes) - sizes, np.cumsum(asked) - asked
    with step(f"pairs of cosine {cosine} or more"):
        for c in range(len(centroids)):
            members = slice(first[c], first[c] + sizes[c])
            queries = asking[from_[c] : from_[c] + asked[c]] // nearest
            pairs, _ = cell_pairs(moved[queries], order[queries], moved[members], order[members], cosine)
            found.append(pairs.astype(np.int32))
    with step("groups"):
        codes = np.sort(np.concatenate([p[:, 0] * np.int64(n) + p[:, 1] for p in found]))
        codes = codes[np.flatnonzero(np.diff(codes, prepend=-1))]
        group = link_groups(n, np.stack(np.divmod(codes, n), 1))
    largest = np.bincount(group[group >= 0], minlength=1).max()
    print(f"  {len(codes):,} pairs; {len(np.unique(group)) - 1:,} groups, the largest of {largest:,}")
    for at, (a, b) in planted.items():
        x, y = (np.asarray(vectors[rows], np.float32) for rows in (a, b))
        within = np.einsum("ij,ij->i", x, y) >= cosine
        if within.mean() > 0.4:
            hit = np.isin(np.minimum(a, b) * np.int64(n) + np.maximum(a, b), codes)[within]
            print(f"  planted at {at}: {hit.mean():.4f} of {within.sum():,} found")


def make_vectors(path: Path, n: int, dims: int) -> dict[float, tuple[Array, Array]]:
    """float16 unit vectors in a file, as CLIP's: a cone (mean cosine .5), topics by Zipf, few directions that matter.

    Returns the rows of the pairs that were planted, by their cosine. They differ in the directions that matter, too.
    """
    rng = np.random.default_rng(0)
    scale = np.arange(1, dims + 1) ** -0.5
    scale /= np.linalg.norm(scale)
    middle = np.zeros(dims)
    middle[-1] = 1.0
    topics = rng.standard_normal((max(10, n // 500), dims)) * scale * 0.7**0.5
    share = 1 / np.arange(1, len(topics) + 1)
    out = np.memmap(path, np.float16, "w+", shape=(n, dims))
    for start in range(0, n, BLOCK):
        topic = rng.choice(len(topics), min(BLOCK, n - start), p=share / share.sum())
        x = middle + topics[topic] + rng.standard_normal((len(topic), dims)) * scale * 0.3**0.5
        out[start : start + len(x)] = x / np.linalg.norm(x, axis=1, keepdims=True)
    rows = rng.choice(n, (len(COSINES), 2, min(PLANTED, n // 20)), replace=False)
    planted = {}
    for cosine, (a, b) in zip(COSINES, rows, strict=True):
        x = np.asarray(out[a], np.float64)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        aside = rng.standard_normal(x.shape) * scale
        aside -= np.einsum("ij,ij->i", x, aside)[:, None] * x
        aside /= np.linalg.norm(aside, axis=1, keepdims=True)
        out[b] = (cosine + 1e-3) * x + (1 - (cosine + 1e-3) ** 2) ** 0.5 * aside
        planted[cosine] = (a, b)
    out.flush()
    return planted


if __name__ == "__main__":
    main()
