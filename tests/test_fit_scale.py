"""Ratings of a few images, joined to folders of many: what is kept of these, what is drawn of them, what it costs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aesthetic.join import WantedImages, join
from aesthetic.space import Space
from bench import scale
from curate.layout import Data
from curate.sources.image_vectors import ClipFolderVectors, DataFolderVectors
from pipelines.cli import main

ROWS, SHARD = 1200, 150  # a short list has eight shards at least

ALPHABET = ["a", "b", ".", "/", "\\", "./", ".jpg", ".PNG", "?", "#", "://", "\n", "http://h/", "", "é"]


@pytest.mark.parametrize("seed", range(4))
def test_what_is_left_out_of_a_table_is_found_for_no_id(seed: int) -> None:
    """However odd the names: `join` says the same of the rows that are left."""
    rng = np.random.default_rng(seed)

    def names(count: int) -> list[str]:
        return ["".join(rng.choice(ALPHABET, rng.integers(1, 5))) for _ in range(count)]

    hit = 0
    for _ in range(40):
        images = {"key": names(30), "path": names(30), "url": names(30), "sha256": [n.upper() for n in names(30)]}
        offered = {c: images[c] for c in images if c in ("key",) or rng.random() < 0.6}
        ids = [*names(3), *rng.choice(np.concatenate(list(offered.values())), 2)]
        for by in ("image", *(c for c in ("url", "sha256") if c in offered)):
            wanted, whole = WantedImages(ids, by), join(ids, by, offered)
            for paths in (False, True):
                left = np.flatnonzero(wanted.rows(offered, paths=paths))
                some = {c: [values[i] for i in left] for c, values in offered.items()}
                if not paths and not wanted.are_keys(some["key"]) and by == "image":
                    continue
                rows, reasons = join(ids, by, some)
                assert [-1 if r < 0 else int(left[r]) for r in rows] == whole[0].tolist() and reasons == whole[1]
                hit += (rows >= 0).any()
    assert hit > 30


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of eight shards with ratings of some of its images, in which row 99 of each shard is hidden."""
    root = tmp_path_factory.mktemp("scale") / "made"
    scale.make(root, ROWS, SHARD, True)
    data = Data(root / "data")
    for shard in range(ROWS // SHARD):
        keys = pq.read_table(data.metadata(shard), columns=["key"])["key"].to_pylist()
        path = data.annotations("never", shard)
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"key": keys, "never": [k.endswith("099") for k in keys]}), path)
        specs = {"never": {"meaning": "", "type": "bool", "hidden": True}}
        data.commit(
            data.annotations_record("never", shard),
            config="c",
            inputs={},
            outputs=[path],
            facts={"columns": specs},
        )
    return root


def images_of(root: Path) -> DataFolderVectors:
    def no_encoder():  # type: ignore[no-untyped-def]
        raise AssertionError("no text is embedded here")

    return DataFolderVectors(str(root / "data"), no_encoder)


def all_images(root: Path) -> pd.DataFrame:
    """What the files of a data folder say of each image that has a vector, one after the other."""
    data, parts = Data(root / "data"), []
    for shard in range(ROWS // SHARD):
        fetched = pq.read_table(data.table(shard)).to_pandas()
        keys = pq.read_table(data.metadata(shard))["key"].to_pandas()
        part = fetched.set_index("key").loc[keys].reset_index()
        part["vector"] = list(np.load(data.image_vectors(shard)))
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize("by", ["url", "sha256", "key", "path", "name", "stem"])
def test_images_of_a_data_folder_are_found_by_each_of_their_names(made: Path, by: str) -> None:
    whole, images = all_images(made), images_of(made)
    hidden = whole["key"].str.endswith("099")
    assert images.count == len(whole) and hidden.any()
    some = np.sort(
        np.random.default_rng(1).choice(np.flatnonzero(~hidden & ~whole["key"].str.endswith("007")), 40, False)
    )
    path = whole["url"].str.removeprefix("https://").str.partition("/")[2]
    called = {"url": whole["url"], "sha256": whole["sha256"].str.upper(), "key": whole["key"], "path": path}
    called |= {"name": "elsewhere/" + path.str.rpartition("/")[2], "stem": path.str.rpartition("/")[2].str[:-4]}
    ids = [*called[by][some], *called[by][hidden][:2], "neither"]
    how = by if by in ("url", "sha256") else "image"
    names = images.names(ids, how)
    assert len(names) < 100, "what nobody asked for is kept"
    rows, _ = join(ids, how, names)
    assert names.index[rows[:40]].tolist() == some.tolist()
    assert (rows[40:] == -1).all(), "what is hidden is not there"
    facts = images.facts(some[::-1])
    expected = whole.iloc[some[::-1]]
    for column in ("key", "url", "sha256", "phash"):
        assert facts[column].tolist() == expected[column].tolist()
    assert facts["width"].tolist() == expected["original_width"].tolist()
    assert facts["domain"].str.endswith(".example.com").all()
    assert np.array_equal(images.vectors(some[::-1])[0], np.stack(expected["vector"]))


def test_some_of_many_are_drawn_the_same_ones_at_each_call(made: Path) -> None:
    images, whole = images_of(made), all_images(made)
    hidden = np.flatnonzero(whole["key"].str.endswith("099"))
    rated = np.arange(0, images.count, 7)
    everything = images.draw(rated, 10_000)
    assert everything.tolist() == np.setdiff1d(np.arange(images.count), [*rated, *hidden]).tolist()
    drawn = images.draw(rated, 300)
    assert len(drawn) == 300 and (np.diff(drawn) > 0).all() and np.isin(drawn, everything).all()
    assert drawn.tolist() == images_of(made).draw(rated, 300).tolist()
    quarter = np.histogram(drawn, bins=4, range=(0, images.count))[0]
    assert quarter.min() > 50, "they are of everywhere"


def test_what_to_rate_next_is_of_a_pool_whose_size_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """12,000 vectors without images: twice the same suggestions, none of them rated."""
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).standard_normal((12_000, 16)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for folder in ("img_emb", "metadata"):
        (tmp_path / "vectors" / folder).mkdir(parents=True)
    Space(encoder="bundled", dim=16).save(tmp_path / "vectors" / "space.json")
    paths = np.array([f"/gone/{i:05d}.jpg" for i in range(len(x))])
    for part, rows in enumerate(np.array_split(np.arange(len(x)), 3)):
        np.save(tmp_path / "vectors" / "img_emb" / f"img_emb_{part}.npy", x[rows].astype(np.float16))
        metadata = tmp_path / "vectors" / "metadata" / f"metadata_{part}.parquet"
        pq.write_table(pa.table({"image_path": paths[rows]}), metadata)
    rated = np.arange(0, 12_000, 100)
    pd.DataFrame({"image": paths[rated], "score": 5 + 4 * x[rated, 0]}).to_csv("r.csv", index=False)
    found = []
    for name in ("a.head", "b.head"):
        assert main(["fit", "r.csv", "--embeddings", "vectors", "--out", name, "--suggest", "3"]) == 0
        assert "choosing 3 of 10,000 images not rated, drawn at random from 11,880" in capsys.readouterr().err
        found.append(pd.read_csv(Path(name) / "suggest.csv"))
    assert found[0].equals(found[1]) and len(found[0]) == 3
    assert not set(found[0]["image"]) & set(paths[rated])
    folder = ClipFolderVectors(tmp_path / "vectors", None)
    assert len(folder.names(paths[rated].tolist(), "image")) == len(rated), "the other names are not kept"


@pytest.mark.long
def test_ten_times_the_images_take_neither_ten_times_the_memory_nor_the_time(tmp_path: Path) -> None:
    used = {}
    for rows in (30_000, 300_000):
        root = tmp_path / str(rows)
        scale.measure("make", root, rows, 3_000, "links")
        used[rows] = scale.measure("suggest", root)
        shutil.rmtree(root)
    (cpu, mb), (more_cpu, more_mb) = used.values()
    assert more_cpu < 2.5 * cpu, used
    assert more_mb < mb + 60, used
