"""Pairs of vectors that PDQ hashes confirm, against brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aesthetic.errors import UserError
from curate.annotators.registry import add_needs, make_annotator
from curate.store.files import read_json
from tests.small_near import found, plan_near, search, write_near
from tests.test_near_duplicates import flipped, with_neighbours

N, SIZE = 900, 300


@pytest.mark.parametrize("cell", [20_000, 100])
def test_both_must_be_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cell: int) -> None:
    monkeypatch.setattr("curate.duplicates.vectors.ONE_CELL", cell)
    rng = np.random.default_rng(5)
    vectors = with_neighbours(rng, N, 24, 0.97, 0.9).astype(np.float16)
    pdq = rng.integers(0, (1 << 64) - 1, (N, 4), np.uint64, endpoint=True)
    cosines = vectors.astype(np.float32) @ vectors.astype(np.float32).T
    np.fill_diagonal(cosines, -1)
    for row in range(0, N, 2):  # half of those that have a near vector have a hash like its
        if cosines[row].max() > 0.9:
            pdq[row] = flipped(rng, pdq[[cosines[row].argmax()]], 120)[0]
    phash = np.full(N, (1 << 63) - 1, np.uint64)
    phash[::7] = 0  # without a hash
    mirrors = np.roll(pdq, 1, axis=0)
    data = plan_near(tmp_path / "x", N, SIZE)
    for shard in range(N // SIZE):
        p = slice(shard * SIZE, (shard + 1) * SIZE)
        hashes = {"phash": phash[p], "pdq": pdq[p], "mirror_phash": phash[p], "mirror_pdq": mirrors[p]}
        write_near(data, shard, SIZE, vectors=vectors[p], **hashes)
    bits = np.bitwise_count(pdq[:, None] ^ pdq[None]).sum(-1)
    mirrored = np.bitwise_count(pdq[:, None] ^ mirrors[None]).sum(-1)
    usable = (phash != 0)[:, None] & (phash != 0)[None]
    for mirror in (False, True):
        search(data, cosine=0.9, cosine_pdq=90, mirror=mirror)
        near = np.minimum(bits, np.minimum(mirrored, mirrored.T)) if mirror else bits
        true = (cosines >= 0.9) & (near <= 90) & usable
        assert 100 < true.sum() < 0.7 * (cosines >= 0.9).sum()
        table = found(data, range(N // SIZE))
        nearest = np.array([-1 if x is None else x for x in table["dup_nearest"].to_pylist()])
        best = np.where(true, cosines, -1).max(1)
        if cell > N:
            np.testing.assert_allclose(nearest, best, atol=1e-3)
        else:
            assert (nearest <= best + 1e-3).all() and (nearest > 0).sum() > 0.8 * (best > 0).sum()
        facts = read_json(data.annotations_record("dup", 0))
        assert facts["recall"]["cosine"]["neighbours"] == true.sum()
        assert "pairs with a cosine of 0.9 or more and PDQ hashes within 90 bits" in facts["notes"][1]
        assert any("PDQ hashes that must both be near" in note for note in facts["notes"])
        assert facts["recall"]["cosine"]["recall"] == 1 or cell < N


def test_its_options() -> None:
    with pytest.raises(UserError, match="cosine_pdq: it confirms a cosine"):
        make_annotator("dup", {"use": "near-duplicates", "cosine_pdq": 90})
    columns = {"dup": {"use": "near-duplicates", "cosine": 0.8, "cosine_pdq": 90, "mirror": True}}
    assert add_needs(columns)["pdq"] == {"use": "pdq", "mirror": True}
