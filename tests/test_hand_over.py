"""Packed shards as others get them: their indexes, copies that are not whole, other forms."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import tarfile
import tomllib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from small_data import make_data

from aesthetic.errors import UserError
from curate.layout import Data
from curate.ledger.select import SelectConfig, select
from curate.shards.export import FORMS, export
from curate.shards.indexes import is_index, write_shard_indexes
from curate.shards.pack import PackConfig, pack
from curate.shards.repack import repack
from curate.sources.find import open_folder
from curate.sources.packed import PackedShards
from curate.store.files import read_json, write_json
from curate.store.records import record_digest
from pipelines.cli import main

CONFIG = PackConfig(shard_size=20)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_data(tmp_path_factory.mktemp("hand over") / "data")
    select(Data(root), SelectConfig(name="all"))
    pack(Data(root), "all", CONFIG)
    return root


@pytest.fixture
def copy(template: Path, tmp_path: Path) -> Path:
    """The packed folder alone, elsewhere, under another name."""
    return Path(shutil.copytree(template / "shards" / "all", tmp_path / "handed over"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------------------------- indexes


def test_indexes_say_where_each_sample_lies(copy: Path) -> None:
    samples, seen = {s.key: s for s in open_folder(copy)}, 0
    for tar in sorted(copy.glob("*.tar")):
        data, about = tar.read_bytes(), read_json(tar.with_suffix(".json"))
        assert about["path"] == tar.name and about["filesize"] == len(data) and about["includes_image_geometry"]
        for name, found in about["files"].items():
            sample = samples[name.partition(".")[0]]
            image = data[found["offset"] : found["offset"] + found["length"]]
            assert image == sample.image and found["captions"] == (sample.caption or "")
            width, height = Image.open(io.BytesIO(image)).size
            assert (found["width"], found["height"], found["aspect"]) == (width, height, width / height)
        ends = np.fromfile(tar.with_suffix(".tar.idx"), "<u8")
        for key, start, end in zip(about["files"], ends[:-1], ends[1:], strict=True):
            with tarfile.open(fileobj=io.BytesIO(data[start:end])) as part:
                stem = key.partition(".")[0]
                assert part.getnames() == [f"{stem}.jpg", f"{stem}.json", f"{stem}.txt"]
        assert not any(data[int(ends[-1]) :])
        seen += len(about["files"])
    assert seen == len(samples)
    sizes = read_json(copy / "sizes.json")
    assert read_json(copy / ".nv-meta" / ".info.json")["shard_counts"] == sizes
    split = yaml.safe_load((copy / ".nv-meta" / "split.yaml").read_text())
    assert split == {"split_parts": {"train": [*sizes], "val": [], "test": []}, "exclude": []}
    assert yaml.safe_load((copy / ".nv-meta" / "dataset.yaml").read_text())["field_map"] == {
        "image": "jpg",
        "caption": "txt",
    }


def test_shards_of_before_get_their_indexes_by_packing_again(template: Path, tmp_path: Path) -> None:
    data = Data(Path(shutil.copytree(template, tmp_path / "data")))
    folder, wanted = data.packed("all"), contents(template / "shards" / "all")
    manifest = read_json(folder / "manifest.json")
    for name in filter(is_index, manifest["outputs"]):
        (data.root / name).unlink()
    manifest["outputs"] = {name: fact for name, fact in manifest["outputs"].items() if not is_index(name)}
    write_json(folder / "manifest.json", {**manifest, "self": record_digest(manifest)})
    before, tar = open_folder(folder).fingerprint, (folder / "00000.tar").stat()
    pack(data, "all", CONFIG)
    assert contents(folder) == wanted and (folder / "00000.tar").stat().st_mtime_ns == tar.st_mtime_ns
    assert open_folder(folder).fingerprint == before  # models that were trained on them know them again
    pack(data, "all", PackConfig(shard_size=15))  # another cut takes their place
    assert not (folder / "00003.tar.idx").exists() or (folder / "00003.tar").exists()
    assert main(["verify", str(folder)]) == 0


def test_indexes_hold_nothing_of_what_was_taken_out(template: Path, tmp_path: Path) -> None:
    data = Data(Path(shutil.copytree(template, tmp_path / "data")))
    folder = data.packed("all")
    untouched = (folder / "00002.json").stat().st_mtime_ns
    gone = [*read_json(folder / "00001.json")["files"]][3].partition(".")[0]
    repack(data, "all", {gone}, "2026-01-31", {})
    assert main(["verify", str(folder)]) == 0
    assert not any(f"{gone}.".encode() in content for content in contents(folder).values())
    assert (folder / "00002.json").stat().st_mtime_ns == untouched
    assert read_json(folder / ".nv-meta" / ".info.json")["shard_counts"] == read_json(folder / "sizes.json")
    before = contents(folder)
    for tar in folder.glob("*.tar"):
        write_shard_indexes(tar)
    assert contents(folder) == before


# -------------------------------------------------------------------------------------------------------------- copies


def test_verify_takes_packed_shards(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy)]) == 0 and ", none damaged" in capsys.readouterr().out
    for path in copy.glob("00001.*"):
        path.unlink()
    assert main(["verify", str(copy), "--json"]) == 0
    said = capsys.readouterr().out
    assert "not in this copy" in said and json.loads(said.splitlines()[-1])["missing"] == ["00001.tar"]
    flip(copy / "00000.tar", 600)
    (copy / "00002.json").unlink()
    assert main(["verify", str(copy), "--json"]) == 1
    damaged = json.loads(capsys.readouterr().out.splitlines()[-1])["damaged"]
    assert sorted(Path(p).name for p in damaged) == ["00000.tar", "00002.json"]
    assert main(["verify", str(copy), "--repair"]) == 2
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text().replace('"count": ', '"count":  '))
    assert main(["verify", str(copy)]) == 1 and "the record itself is damaged" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize("form", FORMS)
def test_export_holds_every_sample_and_goes_on_where_it_was_killed(copy: Path, tmp_path: Path, form: str) -> None:
    done = export(copy, form, tmp_path / "a")
    assert (done.images, done.found) == (len(open_folder(copy)), 0)
    child = os.fork()
    if child == 0:
        try:
            export(copy, form, tmp_path / "b", lambda count: os.kill(os.getpid(), signal.SIGKILL))
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    again = export(copy, form, tmp_path / "b")
    assert again.found == 1 and again.shards == 3
    hidden = {".lock", ".workers"}
    one, other = ({k: v for k, v in contents(tmp_path / n).items() if k not in hidden} for n in "ab")
    assert one == other
    if form != "mds":  # which only a reader of theirs reads: tests/test_formats.py
        ours, found = list(PackedShards(copy)), list(open_folder(tmp_path / "a"))
        if form != "parquet":  # whose rows are in the order of the tars
            assert sorted(Path(s.key).stem for s in found) == sorted(s.key for s in ours)
            places = {Path(s.key).stem: s for s in found}
            found = [places[s.key] for s in ours]
        assert [(s.image, s.caption) for s in found] == [(s.image, s.caption) for s in ours]


def test_export_as_parquet_keeps_types_and_images(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset

    export(copy, "parquet", tmp_path / "a")
    rows = pq.read_table(copy / "00000.parquet")
    table = pq.read_table(tmp_path / "a" / "00000.parquet")
    assert table.schema.names == ["image", *rows.schema.names] and table.drop(["image"]).to_pandas().equals(
        rows.to_pandas()
    )
    found = load_dataset(str(tmp_path / "a"), split="train", cache_dir=str(tmp_path / "cache"))
    assert found.num_rows == len(open_folder(copy)) and found[0]["image"].width == rows["width"][0].as_py()


def test_export_as_kohya_keeps_the_rules_of_its_dataset_config(copy: Path, tmp_path: Path) -> None:
    """Its own loader is in no registry. It asks for folders of images, each with a caption file, an empty one at least;
    keys that it does not know it refuses."""
    out = tmp_path / "kohya"
    export(copy, "kohya", out)
    config = tomllib.loads((out / "dataset.toml").read_text())
    assert config.keys() == {"general", "datasets"}
    assert config["general"] == {"caption_extension": ".txt", "enable_bucket": True}
    (dataset,) = config["datasets"]
    assert dataset.keys() == {"resolution", "subsets"} and dataset["resolution"] % 64 == 0
    folders = [out / subset.pop("image_dir") for subset in dataset["subsets"]]
    assert all(subset == {"num_repeats": 1} for subset in dataset["subsets"])
    assert folders == [out / tar.stem for tar in sorted(copy.glob("*.tar"))]
    images = [path for folder in folders for path in folder.glob("*.jpg")]
    assert len(images) == len(open_folder(copy)) and all(path.with_suffix(".txt").is_file() for path in images)
    assert sum(len([*folder.iterdir()]) for folder in folders) == 2 * len(images)


def test_export_refuses_what_is_wrong_by_name(copy: Path, tmp_path: Path) -> None:
    export(copy, "folder", tmp_path / "a")
    with pytest.raises(UserError, match="an export of other shards, or as folder"):
        export(copy, "mds", tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds something else \(mine.txt\)"):
        export(copy, "folder", tmp_path / "b")
    (copy / "00002.tar").unlink()
    assert export(copy, "kohya", tmp_path / "c").missing == ["00002.tar"]
    flip(copy / "00001.tar", 600)
    with pytest.raises(UserError, match=r"00001\.tar holds other bytes than were packed"):
        export(copy, "mds", tmp_path / "d")
    (copy / "00000.parquet").unlink()
    with pytest.raises(UserError, match=r"the table beside 00000\.tar is missing"):
        export(copy, "parquet", tmp_path / "e")
    with pytest.raises(UserError, match="no packed shards"):
        export(tmp_path, "folder", tmp_path / "f")
