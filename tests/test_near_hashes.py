"""Near pairs of hashes, against all compared with all."""

from __future__ import annotations

import time

import numpy as np
import pytest

from aesthetic import hashes as module
from aesthetic.hashes import cross_hashes, hamming, hex_to_bits, near_hashes, pair_tables, table_pairs

RNG = np.random.default_rng(0)


def turned(values: np.ndarray, bits: int) -> np.ndarray:
    """Each with up to `bits` bits turned, anywhere."""
    values = values.copy()
    for _ in range(bits):
        values ^= np.uint64(1) << RNG.integers(0, 64, len(values), dtype=np.uint64)
    return values


def planted(n: int, bits: int) -> np.ndarray:
    """Unique hashes: random ones, neighbours of theirs within and beyond `bits`, and many that share their blocks."""
    base = RNG.integers(0, 2**64, n, dtype=np.uint64)
    alike = np.uint64(0x0123_4567_89AB_CDEF) ^ (RNG.integers(0, 2**12, n // 2, dtype=np.uint64) << np.uint64(30))
    return np.unique(np.concatenate([base, turned(base, bits), turned(base, bits + 2), alike]))


def brute(values: np.ndarray, others: np.ndarray, bits: int) -> list[list[int]]:
    return np.argwhere(np.bitwise_count(values[:, None] ^ others[None]) <= bits).tolist()


@pytest.mark.parametrize("bits", [0, 1, 4, 8, 20])
@pytest.mark.parametrize("n", [0, 1, 2, 40, 400])
def test_near_hashes_are_all_pairs_within_the_bits(n: int, bits: int) -> None:
    values = planted(n, bits)
    assert near_hashes(values, bits).tolist() == [p for p in brute(values, values, bits) if p[0] < p[1]]


@pytest.mark.parametrize("blocks", range(4, 10))
def test_tables_find_each_pair_once_however_the_hashes_are_cut(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_blocks", lambda n, bits: blocks)
    values = planted(300, 4)
    found = np.concatenate([table_pairs(values, 4, t) for t in range(pair_tables(len(values), 4))])
    assert sorted(found.tolist()) == [p for p in brute(values, values, 4) if p[0] < p[1]]


def test_hashes_must_be_sorted_and_unique() -> None:
    with pytest.raises(ValueError, match="sorted and unique"):
        near_hashes(np.array([1, 1], np.uint64), 4)


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (3, 900), (2500, 2500)])  # few with many, and many with many
def test_hashes_of_two_sets_equal_ones_too(n: int, m: int) -> None:
    values = RNG.integers(0, 2**64, n, dtype=np.uint64)
    others = turned(RNG.choice(values, m), 5) if n else RNG.integers(0, 2**64, m, dtype=np.uint64)
    some = min(n, m) // 3
    others[:some] = values[:some]
    values[some : 2 * some] = values[:some]  # equal ones within a set
    assert cross_hashes(values, others, 4).tolist() == brute(values, others, 4)


def test_many_with_many_are_not_compared_one_by_one() -> None:
    values = np.unique(RNG.integers(0, 2**64, 200_000, dtype=np.uint64))
    others = RNG.permutation(turned(values, 4))
    start = time.process_time()
    found = cross_hashes(values, others, 4)
    assert time.process_time() - start < 5
    assert len(np.unique(found[:, 0])) == len(values)
    assert (hamming(values[found[:, 0]], others[found[:, 1]]) <= 4).all()


def test_a_hundred_thousand_take_no_time() -> None:
    base = RNG.integers(0, 2**64, 100_000, dtype=np.uint64)
    values = np.unique(np.concatenate([base, turned(base[:1000], 4)]))
    start = time.process_time()
    pairs = near_hashes(values, 4)
    assert time.process_time() - start < 1
    assert 990 <= len(pairs) <= 1100


def test_hex_digits_and_what_is_absent() -> None:
    flat, nearly = "0" * 16, f"{0x0FFF_FFFF:016x}"
    given = ["f0" * 8, None, "", "0F1e" * 4, "f0" * 7, "zz" * 8, " " * 16, flat, nearly, f"{0x1FFF_FFFF:016x}"]
    values, there = hex_to_bits(given)
    assert there.tolist() == [True, False, False, True, False, False, False, False, False, True]
    assert [int(v) for v in values[there]] == [0xF0F0F0F0F0F0F0F0, 0x0F1E0F1E0F1E0F1E, 0x1FFFFFFF]
    assert not values[~there].any()
    assert hex_to_bits([])[0].shape == (0,)
    for others in ([], [None], [7], [["f0"]], ["zz" * 8]):  # what else a JSON file may have there
        values, there = hex_to_bits(["f0" * 8, *others])
        assert there.tolist() == [True, *(False for _ in others)] and int(values[0]) == 0xF0F0F0F0F0F0F0F0

    long = "0123456789abcdef" * 3 + "f" * 16
    values, there = hex_to_bits([long, None, "0" * 64, long[:-1]], 256)
    assert there.tolist() == [True, False, True, False]  # whether PDQ is of a flat image tells its quality
    assert values.shape == (4, 4) and values[0].tolist() == [0x0123456789ABCDEF] * 3 + [2**64 - 1]


def test_bits_that_differ() -> None:
    a = np.array([0, 1, 3, 2**64 - 1], np.uint64)
    assert hamming(a, a[:1]).tolist() == [0, 1, 2, 64]
    assert hamming(a, a).tolist() == [0, 0, 0, 0]  # four hashes of 64 bits
    assert hamming(a[:, None], a[None]).shape == (4, 4)
    assert hamming(a[:2, None], a[None]).shape == (2, 4)
    long = np.stack([a, np.zeros(4, np.uint64)])
    assert hamming(long, long[1]).tolist() == [67, 0]
    assert hamming(long[:, None], long[None]).tolist() == [[0, 67], [67, 0]]
