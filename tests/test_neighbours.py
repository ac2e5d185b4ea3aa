"""`best_of` rejects only what is near to what it keeps, where that is known."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import REASONS, SHARD_SIZE, make_data, write_column
from small_near import plan_near, search, unit, write_near

from aesthetic.chunks import thread_map
from aesthetic.errors import UserError
from curate.layout import Data
from curate.ledger.neighbours import FACT, FILE, far_from_best, write_neighbours
from curate.ledger.schema import make_key
from curate.ledger.select import SelectConfig, funnel_text, select


def by_hand(keys: list[int], values: list[float], stands: dict[int, int], near: set[frozenset[int]]) -> set[int]:
    """What stays, one after the other."""
    order = sorted(range(len(keys)), key=lambda i: (np.isnan(values[i]), -np.nan_to_num(values[i]), keys[i]))
    left, stay = [keys[i] for i in order], set[int]()
    while left:
        best = left.pop(0)
        stay.add(best)
        of = stands.get(best, best)
        left = [k for k in left if stands.get(k, k) != of and frozenset((stands.get(k, k), of)) not in near]
    return stay


@pytest.mark.parametrize("seed", range(20))
def test_the_best_that_is_left_stays_and_rejects_its_neighbours(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    keys = (rng.permutation(300)[:200] * (7 if seed % 2 else 1) + 5).astype(np.uint64)
    values = rng.integers(0, 5, 200).astype(float)
    values[rng.random(200) < 0.2] = np.nan
    stands = {int(k): int(keys[i // 4 * 4]) for i, k in enumerate(keys) if i % 4 and rng.random() < 0.5}
    standing = [int(k) for k in keys if int(k) not in stands]
    pairs = {frozenset(rng.choice(standing, 2, replace=False).tolist()) for _ in range(250)}
    beyond = [frozenset((standing[0], 10**6))]  # an image that is not here
    copies = np.array(list(stands.items()), np.uint64)
    linked = np.array([sorted(pair) for pair in [*pairs, *beyond]], np.uint64)
    write_neighbours(tmp_path / FILE, copies, linked)
    known, stay = far_from_best(tmp_path / FILE, keys, values)
    in_pairs = {k for pair in pairs for k in pair} | {standing[0]}
    assert known.tolist() == [stands.get(int(k), int(k)) in in_pairs for k in keys]
    assert set(keys[stay].tolist()) == by_hand(keys.tolist(), values.tolist(), stands, pairs)


def test_without_pairs_or_without_rows_nothing_is_known(tmp_path: Path) -> None:
    nothing = np.zeros((0, 2), np.uint64)
    write_neighbours(tmp_path / FILE, nothing, nothing)
    assert not far_from_best(tmp_path / FILE, np.arange(3, dtype=np.uint64), np.zeros(3))[0].any()
    write_neighbours(tmp_path / FILE, nothing, np.array([[1, 2]], np.uint64))
    assert len(far_from_best(tmp_path / FILE, np.zeros(0, np.uint64), np.zeros(0))[0]) == 0


def test_best_of_splits_a_group_whose_ends_are_not_near_each_other(tmp_path: Path) -> None:
    """Of rows 0 to 10 row 4 is the centre, and all are near it; beyond, only those next to each other are. 8 equals 6.
    Of rows 20 to 34 nothing is known, so one stays."""
    data = Data(make_data(tmp_path / "data"))
    fetched = [n for n in range(60) if n % SHARD_SIZE not in REASONS]

    def key(n: int) -> int:
        return int(make_key(n // SHARD_SIZE, n % SHARD_SIZE, SHARD_SIZE))

    chain = [n for n in fetched if n <= 10]  # 0 1 2 4 5 6 8 9 10
    pairs = {(n, 4) for n in chain if n not in (4, 8)} | {(0, 1), (1, 2), (5, 6), (6, 9), (9, 10)}
    file = data.index("dup") / FILE
    file.parent.mkdir(parents=True)
    sha = write_neighbours(
        file, np.array([[key(8), key(6)]], np.uint64), np.array([[key(a), key(b)] for a, b in sorted(pairs)], np.uint64)
    )
    write_column(
        data.root, "dup", pa.string(), lambda n: "a" if n in chain else "b" if 20 <= n < 35 else None, facts={FACT: sha}
    )

    def kept(rule: str) -> list[int]:
        selection = select(data, SelectConfig(name="s", rules={"once": rule}))
        assert sum(selection.funnel.values()) == 60
        verdicts = pq.read_table(data.verdicts("s"))["verdict"].to_pylist()
        return [n for n, v in enumerate(verdicts) if v == "kept" and n < 35 and (n in chain or n >= 20)]

    assert kept(f"best_of(dup, CAST(key = '{make_key(0, 4, SHARD_SIZE)}' AS INT))") == [4, 20]
    # 10 rejects 9 and 4; 8, which equals 6, rejects 6 and 5; 2 rejects 1
    assert kept("best_of(dup, original_width)") == [0, 2, 8, 10, 34]
    text = funnel_text(select(data, SelectConfig(name="s", rules={"once": "best_of(dup, original_width)"})))
    assert "2 groups of dup (median 10.5 images, largest 12), 1 of them split: not all are near the best" in text
    assert kept("at_most(1, dup, original_width)") == [10, 34], "a number is a number"
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"is not what it was when dup was made. Remove annotated/dup"):
        kept("best_of(dup, width)")


def test_every_rejected_image_of_a_search_is_near_one_that_stays(tmp_path: Path) -> None:
    """Chains of vectors, each within the threshold of the next, and copies: what `best_of` rejects is compared with all
    that it keeps."""
    rng, size, cosine = np.random.default_rng(0), 200, 0.96
    data = plan_near(tmp_path / "near", 2 * size, size)
    angle = np.arccos(cosine) * 0.8  # every second one of a chain is too far
    turns = np.tile(np.arange(5) * angle, 2 * size // 5)
    planes = np.repeat(np.arange(2 * size // 5), 5)
    x = np.zeros((2 * size, 4 * size // 5), np.float32)
    x[np.arange(2 * size), 2 * planes], x[np.arange(2 * size), 2 * planes + 1] = np.cos(turns), np.sin(turns)
    x = unit(x[rng.permutation(2 * size)])
    x[300:] = x[rng.integers(0, 300, 100)]
    for shard in range(2):
        write_near(data, shard, size, vectors=x[shard * size : (shard + 1) * size])
    search(data, cosine=cosine)

    selection = select(data, SelectConfig(name="s", rules={"once": "best_of(dup, hash(key) % 1000)"}))
    verdicts = np.array(pq.read_table(data.verdicts("s"))["verdict"].to_pylist())
    y = x.astype(np.float32)
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    near = y[verdicts == "once"] @ y[verdicts == "kept"].T >= cosine - 1e-3
    assert near.any(axis=1).all() and len(near) > 100
    facts = selection.rules[0].groups["dup"]
    assert facts["split"] > 10 and selection.kept > facts["groups"]
    search(data, cosine=cosine)
    before = (data.index("dup") / FILE).read_bytes()
    shutil.rmtree(data.annotations("dup", 0).parent)
    search(data, cosine=cosine, map=thread_map)
    assert (data.index("dup") / FILE).read_bytes() == before
