"""Splits: groups whole, near-duplicates together, nothing moved by data that comes later."""

import time

import numpy as np
import pytest
from small_ratings import unit

from aesthetic.heads import HeadError
from aesthetic.neighbours import near_vectors, near_vectors_in_cells
from aesthetic.splits import (
    EXACT_UP_TO,
    NESTED_UP_TO,
    TEST,
    Groups,
    first_groups,
    folds_of,
    groups_of,
    in_test_set,
    make_splits,
)


def test_copies_join_their_groups_whatever_tells_that_they_are_copies():
    rng = np.random.default_rng(1)
    x = unit(rng.standard_normal((6, 64)))
    x[1] = x[0]
    sha256 = [None, None, "aa", "aa", None, None]
    phash = [None, None, None, "f0f0f0f0f0f0f0f0", "f0f0f0f0f0f0f0f3", "0000000000000000"]
    got = groups_of(list("abcdef"), vectors=x, sha256=sha256, phash=phash)
    a, b, c, d, e, f = got.names
    assert a == b
    assert c == d == e
    assert len({a, c, f}) == 3
    assert got.joined == 3
    assert (got.count, got.given) == (3, False)
    given = groups_of(list("abcdef"), ["p", "q", "q", "r", "s", "p"], sha256=sha256)
    assert given.names[1] == given.names[2] == given.names[3]  # q and r share a copy
    assert given.names[0] == given.names[5] == "p"


def test_images_without_a_group_are_no_group_together():
    """As where one of two rating files has a column of groups."""
    got = groups_of(list("abcde"), ["p", "p", None, float("nan"), None])
    assert (got.count, got.given) == (4, True)
    assert got.names[0] == got.names[1]


def test_flat_images_are_no_copies_of_each_other():
    assert groups_of(["a", "b"], phash=["0" * 16, "0" * 16]).count == 2
    nearly, other = f"{0x_0FFF_FFFF:016x}", f"{0x_07FF_FFFF:016x}"  # 28 and 27 ones
    assert groups_of(["a", "b", "c"], phash=[nearly, other, nearly]).count == 2  # equal, but not near
    assert groups_of(["a", "b", "c"], phash=["f0" * 8, "F0" * 8, nearly]).count == 2


def test_many_equal_hashes_take_no_time():
    start = time.process_time()
    got = groups_of([f"i{i}" for i in range(50_000)], phash=["f0" * 8] * 50_000)
    assert time.process_time() - start < 3
    assert (got.count, got.joined) == (1, 49_999)


def test_near_hashes_are_found_whichever_bits_differ():
    rng = np.random.default_rng(2)
    base = rng.integers(1, 2**63, 1600, dtype=np.uint64)
    base = base[np.bitwise_count(base) >= 33][:400]  # with fewer than 29 ones it would be of a flat image
    turned = base.copy()
    for _ in range(4):
        turned ^= np.uint64(1) << rng.integers(0, 64, 400, dtype=np.uint64)
    hashes = [f"{int(h):016x}" for h in np.concatenate([base, turned])]
    names = groups_of([f"i{i}" for i in range(800)], phash=hashes).names
    assert all(names[i] == names[i + 400] for i in range(400))
    assert len(set(names)) > 390


def test_folds_keep_groups_whole_and_even():
    for count in (30, 300):
        groups = [f"g{v}" for v in np.random.default_rng(0).integers(0, count, 2000)]
        fold = folds_of(groups, 5)
        assert all(len({f for g, f in zip(groups, fold, strict=True) if g == name}) == 1 for name in set(groups))
        sizes = np.bincount(fold)
        assert len(sizes) == 5
        assert sizes.max() < 2 * sizes.min()


def test_what_comes_later_moves_nothing_that_is_there():
    groups = [f"g{i}" for i in range(500)]
    more = [f"h{i}" for i in range(2000)] + groups
    assert np.array_equal(in_test_set(groups), in_test_set(more)[2000:])
    assert np.array_equal(folds_of(groups, 5), folds_of(more, 5)[2000:])
    assert np.array_equal(first_groups(groups, 0.5), first_groups(more, 0.5)[2000:])
    assert in_test_set(groups).mean() == pytest.approx(0.2, abs=0.06)
    quarter, half = first_groups(groups, 0.25), first_groups(groups, 0.5)
    assert (half >= quarter).all()
    assert 0.15 < quarter.mean() < 0.35 < half.mean() < 0.65


def test_rounds_predict_every_row_once_or_hold_a_test_set_back():
    few = Groups([f"g{i % 60}" for i in range(600)], True, 0)
    fold, rounds = make_splits(few, "a")
    assert sorted(np.concatenate([r.test for r in rounds])) == list(range(600))
    assert all(set(r.train) | set(r.test) == set(range(600)) for r in rounds)
    assert TEST not in fold
    many = Groups([f"g{i // 3}" for i in range(NESTED_UP_TO + 3)], True, 0)
    fold, (only,) = make_splits(many, "a")
    assert set(np.array(many.names)[only.test]).isdisjoint(np.array(many.names)[only.train])
    assert 0.15 < len(only.test) / len(many.names) < 0.25
    with pytest.raises(HeadError, match="have 2 groups"):
        make_splits(Groups(["a", "b"] * 20, True, 0), "a")


def _with_copies(rows: int, dims: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors in a cone, of clusters of unlike sizes, and which rows are near copies of which others."""
    rng = np.random.default_rng(3)
    topics = unit(rng.standard_normal((rows // 50, dims)))
    topic = np.minimum(rng.zipf(1.3, rows) - 1, len(topics) - 1)
    x = unit(dims**-0.5 + unit(topics[topic] + unit(rng.standard_normal((rows, dims)))))
    copies = rng.choice(rows, (rows // 20, 2), replace=False)
    x[copies[:, 1]] = unit(x[copies[:, 0]] + 0.2 * unit(rng.standard_normal((len(copies), dims))))
    return x.astype(np.float32), copies


def test_near_vectors_are_looked_for_in_cells_and_how_many_are_found_is_measured():
    x, _ = _with_copies(4000, 48)
    true = near_vectors(x, 0.95)
    found, recall = near_vectors_in_cells(x, 0.95)
    assert len(true) >= 200
    codes = np.isin(found[:, 0] * 4000 + found[:, 1], true[:, 0] * 4000 + true[:, 1])
    assert codes.all() and len(found) >= 0.97 * len(true)
    assert np.array_equal(found, np.unique(found, axis=0)) and recall > 0.95
    assert np.array_equal(near_vectors_in_cells(x, 0.95)[0], found)
    assert near_vectors_in_cells(unit(np.eye(400)).astype(np.float32), 0.95)[1] is None


@pytest.mark.long
def test_the_groups_of_very_many_images_state_their_recall():
    rows = EXACT_UP_TO + 1000
    x, copies = _with_copies(rows, 64)
    ids = [f"{i}" for i in range(rows)]
    few, many = groups_of(ids[:-1000], vectors=x[:-1000]), groups_of(ids, vectors=x)
    assert few.recall is None and "near_duplicates_recall" not in few.facts
    assert many.recall > 0.95 and many.facts["near_duplicates_recall"] == round(many.recall, 4)
    together = [many.names[a] == many.names[b] for a, b in copies]
    assert np.mean(together) > 0.97
