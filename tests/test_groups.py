"""Pairs -> groups in which each member is near the centre."""

from __future__ import annotations

import time

import numpy as np
import pytest

from aesthetic import groups as module
from aesthetic.groups import link_groups


def one_by_one(n: int, pairs: np.ndarray, order: np.ndarray) -> list[int]:
    """As the words say it: the row with most neighbours among those left, again and again."""
    near: list[set[int]] = [set() for _ in range(n)]
    for a, b in pairs.tolist():
        if a != b:
            near[a].add(b)
            near[b].add(a)
    left, found = set(range(n)), [-1] * n
    while True:
        centre = max(left, key=lambda i: (len(near[i] & left), -order[i]), default=None)
        if centre is None or not near[centre] & left:
            return found
        members = {centre} | (near[centre] & left)
        left -= members
        for i in members:
            found[i] = min(members, key=lambda i: order[i])


@pytest.mark.parametrize("worth", [0.1, 2])  # by rounds, and one centre after another
def test_groups_are_those_that_one_centre_after_another_gives(worth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WORTH", worth)
    for seed in range(150):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(1, 60))
        pairs = rng.integers(0, n, (int(rng.integers(0, 100)), 2))
        order = rng.permutation(n) if seed % 2 else np.arange(n)
        got = link_groups(n, pairs, order if seed % 2 else None)
        assert got.dtype == np.int64 and got.tolist() == one_by_one(n, pairs, order)
        assert link_groups(n, rng.permutation(pairs)[:, ::-1], order).tolist() == got.tolist()


def test_every_member_is_near_one_of_its_group() -> None:
    rng = np.random.default_rng(0)
    place = np.sort(rng.uniform(0, 300, 1000))  # on a line: all hang together, and few are near each other
    pairs = np.argwhere(np.triu(np.abs(place[:, None] - place[None]) < 1, 1))
    group = link_groups(1000, pairs)
    for name in np.unique(group[group >= 0]):
        members = place[group == name]
        assert name == np.flatnonzero(group == name)[0]
        assert any((np.abs(members - centre) < 1).all() for centre in members)
    assert (group >= 0).mean() > 0.9


def test_no_pairs() -> None:
    assert link_groups(3, np.zeros((0, 2), np.int64)).tolist() == [-1, -1, -1]
    assert link_groups(2, np.array([[1, 1]])).tolist() == [-1, -1]
    assert link_groups(0, np.zeros((0, 2), np.int64)).tolist() == []


@pytest.mark.parametrize("shape", ["stars", "chain", "one star", "random"])
def test_a_million_rows(shape: str) -> None:
    n = 200_000 if shape == "chain" else 1_000_000
    first = {
        "stars": np.arange(n) // 10 * 10,  # as from equal hashes: each to the first
        "chain": np.arange(n) - 1,
        "one star": np.zeros(n, np.int64),
        "random": np.random.default_rng(0).integers(0, n, n),
    }[shape]
    pairs = np.stack([first, np.arange(n)], 1)[1:]
    start = time.process_time()
    group = link_groups(n, pairs)
    assert time.process_time() - start < 4
    if shape == "chain":
        assert np.array_equal(group[: n // 3 * 3], np.arange(n // 3 * 3) // 3 * 3)
    elif shape != "random":
        assert np.array_equal(group, first)
