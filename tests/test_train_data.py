"""Training reads what pack wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from curate.pack import PackConfig, pack
from curate.select import SelectConfig, select
from curate.store import UserError
from tests.small_data import make_data
from train.data import Samples


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_data(tmp_path_factory.mktemp("data"))
    select(root, SelectConfig(name="all"), {})
    pack(root, "all", PackConfig(shard_size=10))
    return root


def test_every_sample_is_there_once_and_any_can_be_had_by_number(root: Path) -> None:
    samples = Samples(root / "shards" / "all")
    keys = [s.key for s in samples]
    assert len(samples) == len(keys) == len(set(keys)) > 20
    assert samples[17].key == keys[17] and samples[-1].key == keys[-1]
    assert [s.key for s in samples[8:12]] == keys[8:12]
    for sample in samples[:5]:
        assert sample.facts["key"] == sample.key and sample.facts["caption"] == sample.caption
        assert len(sample.image) > 100
    with pytest.raises(IndexError):
        samples[len(samples)]


def test_a_folder_that_is_not_whole_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no packed shards"):
        Samples(tmp_path)
    tar = root / "shards" / "all" / "00001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1024])
    try:
        with pytest.raises(UserError, match="missing or cut"):
            Samples(root / "shards" / "all")
    finally:
        tar.write_bytes(whole)
