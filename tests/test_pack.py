from __future__ import annotations

import io
import json
import math
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from small_data import SHARD_SIZE, make_data, write_annotated, write_fetched

from aesthetic.errors import UserError
from curate.layout import Data
from curate.ledger.schema import make_key
from curate.ledger.select import NothingKept, SelectConfig, select
from curate.shards.pack import PackConfig, pack
from curate.shards.shuffle import cuts
from curate.shards.tar import CorruptShard, read_images
from curate.store.files import sha256_file
from curate.store.records import output_digests, record_digest

RULES = {"large": "original_width >= 300", "good": "laion_v2 >= 5 OR original_width < 600"}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_data(tmp_path_factory.mktemp("template") / "data")
    (root / "embedded" / "space.json").write_text(
        json.dumps({"encoder": "bundled", "fingerprint": "ab12", "probes": [[1]]})
    )
    (root / "recipe.yaml").write_text("columns: {laion_v2: laion-v2}\n")
    choose(root)
    return root


@pytest.fixture
def data(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "data")


def choose(root: Path, **rules: str) -> list[str]:
    """Make the selection s; the keys that it keeps."""
    select(Data(root), SelectConfig(name="s", rules=rules or RULES))
    table = pq.read_table(root / "selected" / "s.parquet")
    return [k for k, v in zip(table["key"].to_pylist(), table["verdict"].to_pylist(), strict=True) if v == "kept"]


def packed(root: Path) -> list[tuple[str, bytes]]:
    """(key, image) of every packed sample, in order."""
    return [(k, d) for tar in sorted((root / "shards" / "s").glob("*.tar")) for k, _, d in read_images(tar)]


def test_kept_images_are_copied_byte_for_byte_into_even_shards(data: Path) -> None:
    keys = choose(data)
    manifest = pack(Data(data), "s", PackConfig(shard_size=10))
    originals = {k: d for tar in (data / "fetched").glob("*.tar") for k, _, d in read_images(tar)}
    found = packed(data)
    assert sorted(k for k, _ in found) == keys
    assert [k for k, _ in found] != keys, "shuffled"
    assert all(originals[k] == image for k, image in found)
    sizes = json.loads((data / "shards" / "s" / "sizes.json").read_text())
    assert list(sizes) == ["00000.tar", "00001.tar", "00002.tar", "00003.tar"]
    assert sum(sizes.values()) == len(keys) == manifest["count"]
    assert max(sizes.values()) - min(sizes.values()) <= 1
    assert {p.name for p in (data / "shards").iterdir()} == {"s"}


def test_json_and_parquet_hold_the_ledgers_row(data: Path) -> None:
    pack(Data(data), "s", PackConfig(shard_size=10))
    rows: dict[str, dict[str, Any]] = {}
    for tar in sorted((data / "shards" / "s").glob("*.tar")):
        with tarfile.open(tar) as f:
            members = {m.name: f.extractfile(m).read() for m in f}  # type: ignore[union-attr]
        table = pq.read_table(tar.with_suffix(".parquet"))
        assert [n.removesuffix(".jpg") for n in members if n.endswith(".jpg")] == table["key"].to_pylist()
        assert table.schema.names[:3] == ["url", "caption", "WIDTH"]
        assert table.schema.names[-2:] == ["similarity", "laion_v2"]
        for row in table.to_pylist():
            facts = json.loads(members[row["key"] + ".json"], parse_constant=pytest.fail)
            rows[row["key"]] = facts
            same = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
            assert facts == same
            assert members[row["key"] + ".txt"].decode() == row["caption"]
    row = rows[make_key(2, 1, SHARD_SIZE)]
    assert (row["WIDTH"], row["width"], row["original_width"]) == (1041, 18, 920)
    assert row["laion_v2"] == pytest.approx(6.05)
    assert row['od"d'] is None
    assert row["caption"] == "picture 41, naïve “ö”"


def test_a_sample_without_a_caption_has_an_empty_txt(data: Path) -> None:
    choose(data, first="original_width <= 220")
    pack(Data(data), "s", PackConfig())
    with tarfile.open(data / "shards" / "s" / "00000.tar") as f:
        key = make_key(0, 5, SHARD_SIZE)
        assert f"{key}.jpg" in f.getnames()
        caption = f.extractfile(f"{key}.txt")
        assert caption is not None and caption.read() == b""


def test_the_same_is_packed_again_only_when_something_changed(data: Path) -> None:
    first = pack(Data(data), "s", PackConfig(shard_size=10))
    folder = data / "shards" / "s"
    when = (folder / "00000.tar").stat().st_ino
    assert pack(Data(data), "s", PackConfig(shard_size=10)) == first
    assert (folder / "00000.tar").stat().st_ino == when
    (folder / "manifest.json").unlink()
    again = pack(Data(data), "s", PackConfig(shard_size=10))
    assert again["outputs"] == first["outputs"]
    assert (folder / "00000.tar").stat().st_ino != when
    other = pack(Data(data), "s", PackConfig(shard_size=10, seed=1))
    assert output_digests(other) != output_digests(first)
    assert pack(Data(data), "s", PackConfig(shard_size=10))["outputs"] == first["outputs"]


def test_a_smaller_selection_leaves_no_shard_of_the_larger(data: Path) -> None:
    pack(Data(data), "s", PackConfig(shard_size=4))
    choose(data, few="top(laion_v2, 0.1)")
    pack(Data(data), "s", PackConfig(shard_size=4))
    assert sorted(p.name for p in (data / "shards" / "s").glob("*.tar")) == ["00000.tar", "00001.tar"]


def test_the_order_of_a_sample_depends_on_its_key_and_the_seed_alone(data: Path) -> None:
    pack(Data(data), "s", PackConfig())
    many = [k for k, _ in packed(data)]
    few = set(choose(data, few="original_width >= 700"))
    pack(Data(data), "s", PackConfig())
    assert [k for k, _ in packed(data)] == [k for k in many if k in few]


def test_the_manifest_is_a_record_like_others_and_says_what_made_the_numbers(data: Path) -> None:
    manifest = pack(Data(data), "s", PackConfig(shard_size=10))
    assert manifest["self"] == record_digest(manifest)
    assert Data(data).outputs_present(Data(data).manifest("s"))
    assert all(sha256_file(data / name) == sha for name, sha in output_digests(manifest).items())
    assert len(manifest["outputs"]) == 4 * 4 + 3 + 3
    assert manifest["space"] == {"encoder": "bundled", "fingerprint": "ab12"}
    assert manifest["columns"]["laion_v2"]["head"] == "laion-v2"
    assert sum(manifest["funnel"].values()) == 60
    assert manifest["recipe"].startswith("columns:")


def test_the_card_is_one_that_the_hub_reads(data: Path) -> None:
    manifest = pack(Data(data), "s", PackConfig())
    _, header, body = (data / "shards" / "s" / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(header)
    assert card["license"] == "other"
    assert card["size_categories"] == ["n<1K"]
    assert card["configs"][0]["data_files"][0]["path"] == "*.tar"
    assert "`laion_v2 >= 5 OR original_width < 600`" in body
    assert f"| kept | {manifest['count']} |" in body
    assert "from 1 to 10" in body


def test_nothing_kept_is_told_with_the_rule_that_did_it(data: Path) -> None:
    choose(data, fine="original_width > 0", harsh="laion_v2 > 9")
    with pytest.raises(NothingKept, match=r"harsh \(laion_v2 > 9\)"):
        pack(Data(data), "s", PackConfig())
    assert not (data / "shards").exists()


def test_a_selection_of_older_data_is_refused(data: Path) -> None:
    for shard in range(3):
        write_annotated(data, shard, "laion_v2", lambda n: 9.0)
    with pytest.raises(UserError, match=r"before annotated/laion_v2 changed.*tastemaker select"):
        pack(Data(data), "s", PackConfig())
    with pytest.raises(UserError, match="no selection t"):
        pack(Data(data), "t", PackConfig())


def test_a_half_made_score_that_no_rule_reads_is_left_out(data: Path) -> None:
    write_annotated(data, 0, "taste", lambda n: 0.5)
    manifest = pack(Data(data), "s", PackConfig())
    assert manifest["left_out"] == ["annotated/taste"]
    assert "taste" not in pq.read_schema(data / "shards" / "s" / "00000.parquet").names
    for shard in (1, 2):
        write_annotated(data, shard, "taste", lambda n: 0.5)
    assert pack(Data(data), "s", PackConfig())["left_out"] == []
    assert "taste" in pq.read_schema(data / "shards" / "s" / "00000.parquet").names


def test_a_missing_image_is_named_and_old_shards_stay(data: Path) -> None:
    pack(Data(data), "s", PackConfig())
    before = packed(data)
    tar = data / "fetched" / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:10240] + bytes(10240))
    with pytest.raises(CorruptShard, match=r"00001\.tar"):
        pack(Data(data), "s", PackConfig(seed=5))
    assert packed(data) == before
    assert {p.name for p in (data / "shards").iterdir()} == {"s"}


def test_what_a_killed_process_left_is_swept(data: Path) -> None:
    gone = 2**22 + 1  # more than any process's number
    for name in (f".s.{gone}-0123abcd.tmp", f".s.{gone}-4567cdef.tmp"):
        (data / "shards" / name).mkdir(parents=True)
        (data / "shards" / name / "00000.tar").write_bytes(b"half")
    pack(Data(data), "s", PackConfig())
    assert {p.name for p in (data / "shards").iterdir()} == {"s"}


@pytest.mark.parametrize(("count", "size"), [(1, 10), (10, 10), (11, 10), (99, 10), (100, 7), (3, 1)])
def test_cuts_are_even(count: int, size: int) -> None:
    sizes = np.diff(cuts(count, size))
    assert sizes.sum() == count
    assert sizes.max() <= size
    assert sizes.max() - sizes.min() <= 1
    assert len(sizes) == -(-count // size)


def test_webdataset_reads_them(data: Path) -> None:
    import webdataset

    keys = choose(data)
    pack(Data(data), "s", PackConfig(shard_size=10))
    urls = str(data / "shards" / "s" / "{00000..00003}.tar")
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil"))
    assert sorted(s["__key__"] for s in samples) == keys
    for sample in samples:
        assert isinstance(sample["jpg"], Image.Image)
        assert sample["json"]["key"] == sample["__key__"]
        assert sample["txt"] == sample["json"]["caption"]
        assert sample["jpg"].size == (sample["json"]["width"], sample["json"]["height"])


def test_open_clips_reader_finds_their_size(data: Path) -> None:
    data_module = pytest.importorskip("open_clip_train.data")
    pack(Data(data), "s", PackConfig(shard_size=10))
    urls = str(data / "shards" / "s" / "{00000..00003}.tar")
    total, shards = data_module.get_dataset_size(urls)
    assert (total, shards) == (len(packed(data)), 4)


def test_a_shard_fetched_anew_after_the_selection_is_refused(data: Path) -> None:
    write_fetched(data, 1, salt="!")
    with pytest.raises(UserError, match="before fetched changed"):
        pack(Data(data), "s", PackConfig())


def test_images_open(data: Path) -> None:
    pack(Data(data), "s", PackConfig())
    for key, image in packed(data):
        number = int(key[:-2]) * SHARD_SIZE + int(key[-2:])
        assert Image.open(io.BytesIO(image)).size == (16 + number % 3, 16)
