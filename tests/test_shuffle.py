"""The order of packed samples and the buckets that bring it about, against sorting everything in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import SHARD_SIZE, fetched_numbers, make_data, write_fetched

from curate.layout import Data
from curate.ledger.schema import make_key
from curate.ledger.select import SelectConfig, select
from curate.shards import shuffle
from curate.shards.pack import PackConfig, pack
from curate.shards.shuffle import Buckets, KeptKeys, first_hashes, order_hashes
from curate.shards.tar import read_images

HERE = Path(__file__).parent


def test_hashes_of_ranks_are_those_of_the_sorted_ones() -> None:
    rng = np.random.default_rng(0)
    spread = rng.integers(0, 2**64, 100_000, np.uint64)
    crowded = rng.integers(0, 2**24, 50_000, np.uint64)  # all in one bin, many of them twice
    for hashes in (spread, crowded, np.concatenate([spread, crowded]), spread[:1]):
        ranks = sorted({0, len(hashes) - 1, *rng.integers(0, len(hashes), 300).tolist()})
        found = first_hashes(lambda hashes=hashes: iter(np.array_split(hashes, 7)), ranks)  # type: ignore[misc]
        assert found.tolist() == np.sort(hashes)[ranks].tolist()
    assert first_hashes(lambda: iter([spread]), []).tolist() == []


def test_kept_keys_are_found_in_whatever_order_shards_are_asked(tmp_path: Path) -> None:
    count = 400_000  # several batches of verdicts
    keys = np.arange(count, dtype=np.uint64) * np.uint64(3)
    kept = keys % np.uint64(2) == 0
    verdicts = pa.array(np.where(kept, "kept", "small")).dictionary_encode()
    pq.write_table(pa.table({"key": pa.array([f"{k:09d}" for k in keys]), "verdict": verdicts}), tmp_path / "v.parquet")
    asked = KeptKeys(tmp_path / "v.parquet", tmp_path / "hashes", 7)
    for first in (0, 10_000, 900_000, 300_000, 299_000, 1_150_000, 5_000_000, 12):  # forwards, back, past the end
        some = np.random.default_rng(first).permutation(np.arange(first, first + 100_000, dtype=np.uint64))
        among, hashes = asked.among(some)
        there = (some < count * 3) & (some % np.uint64(6) == 0)
        assert (among == there).all()
        assert hashes.tolist() == order_hashes([f"{k:09d}" for k in some[there]], 7).tolist()


def test_buckets_of_several_shards_give_each_shard_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "BUCKETS", 3)
    monkeypatch.setattr(shuffle, "_HELD", 1000)
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**64, 500, np.uint64)
    hashes[100:110] = hashes[7]  # ordered by key
    keys, samples = [f"{i:09d}" for i in rng.permutation(500)], [bytes([i % 256]) * (i % 90) for i in range(500)]
    firsts = np.sort(hashes)[50::50]
    buckets = Buckets(tmp_path, firsts, pa.schema([("key", pa.string()), ("x", pa.int8())]))
    assert buckets.count == 3
    for some in np.array_split(np.arange(500), 11):
        rows = pa.table({"key": [keys[i] for i in some], "x": pa.array(some % 100, pa.int8())})
        buckets.add(rows, hashes[some], [samples[i] for i in some])
    order = sorted(range(500), key=lambda i: (int(hashes[i]), keys[i]))
    begins = [0, *(sum(int(h) < first for h in hashes.tolist()) for first in firsts.tolist()), 500]
    for shard, (rows, found) in enumerate(buckets.shards()):
        wanted = order[begins[shard] : begins[shard + 1]]
        assert rows.to_pydict() == {"key": [keys[i] for i in wanted], "x": [i % 100 for i in wanted]}
        assert list(found) == [samples[i] for i in wanted]
    assert shard == len(firsts)
    assert not list(tmp_path.iterdir())


def test_packed_samples_are_in_the_order_of_their_keys_hashes(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    select(Data(data), SelectConfig(name="s"))
    pack(Data(data), "s", PackConfig(shard_size=7, seed=3))
    keys = [make_key(shard, n % SHARD_SIZE, SHARD_SIZE) for shard in range(3) for n in fetched_numbers(shard)]
    order = np.argsort(order_hashes(keys, 3))
    tars = sorted((data / "shards" / "s").glob("*.tar"))
    assert [k for tar in tars for k, _, _ in read_images(tar)] == [keys[i] for i in order]
    assert not (data / "shards" / "s" / "scratch").exists()


@pytest.mark.long
def test_memory_does_not_grow_with_the_selection(tmp_path: Path) -> None:
    peaks = []
    for shards in (100, 800):
        data = tmp_path / f"data-{shards}"
        for shard in range(shards):
            write_fetched(data, shard)
        script = (
            "import json, sys; from pathlib import Path; from curate.layout import Data;"
            "from curate.ledger.select import *; from curate.shards.pack import *;"
            f"d = Data(Path({str(data)!r}));"
            "c = PackConfig(shard_size=500);"
            "select(d, SelectConfig(name='s')) if sys.argv[1] == 'select' else pack(d, 's', c);"
            "print(json.dumps(next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))))"
        )
        for what in ("select", "pack"):
            found = subprocess.run(
                [sys.executable, "-c", script, what], cwd=HERE.parent, capture_output=True, check=True
            )
        peaks.append(json.loads(found.stdout))
    assert peaks[1] < 1.25 * peaks[0], peaks
