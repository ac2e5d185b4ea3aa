"""Splits: groups whole, near-duplicates together, nothing moved by data that comes later."""

import numpy as np
import pytest
from small_ratings import unit

from aesthetic.heads import HeadError
from aesthetic.splits import (
    NEAR_COSINE,
    NESTED_UP_TO,
    TEST,
    Groups,
    first_groups,
    folds_of,
    groups_of,
    in_test_set,
    make_splits,
    near_duplicates,
)


def brute(x, cosine):
    a, b = np.nonzero(np.triu(x.astype(float) @ x.astype(float).T >= cosine, 1))
    return set(zip(a.tolist(), b.tolist(), strict=True))


@pytest.mark.long
@pytest.mark.parametrize(("n", "dim", "spread"), [(300, 16, 0), (3000, 96, 0), (3000, 96, 1)])
def test_near_duplicates_are_all_pairs_above_the_cosine(n, dim, spread):
    """In a cone, as CLIP's vectors form; equally wide everywhere, or like them in some directions more than others."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, dim)) * np.arange(1, dim + 1) ** -float(spread) + 1.0 / (1 + 3 * spread)
    copies = rng.integers(0, n, (n // 10, 2))
    x[copies[:, 0]] = x[copies[:, 1]] + rng.uniform(0, 0.6, (len(copies), 1)) * rng.standard_normal((len(copies), dim))
    x = unit(x)
    found = {tuple(p) for p in near_duplicates(x).tolist()}
    assert brute(x, NEAR_COSINE + 1e-6) <= found <= brute(x, NEAR_COSINE - 1e-6)  # the products are float32
    assert len(found) > n // 40


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


def test_near_hashes_are_found_whichever_bits_differ():
    rng = np.random.default_rng(2)
    base = rng.integers(1, 2**63, 400, dtype=np.uint64)
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
