"""Training reads what pack wrote, and folders of tars and images; each rank meets its share in an order that two
integers describe."""

from __future__ import annotations

import io
import itertools
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from aesthetic.errors import UserError
from curate.layout import Data
from curate.ledger.select import SelectConfig, select
from curate.shards.pack import PackConfig, pack
from curate.shards.tar import TarWriter
from curate.sources.images import Images
from curate.sources.packed import PackedShards
from curate.sources.tars import Tars
from tests.small_data import make_data
from tests.small_train import make_images
from train.data import ImageDataset, Stream, buckets_of, crop_resize, open_samples, ordered_batches, sampling_weights
from train.split import scan_images, split


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_data(tmp_path_factory.mktemp("data"))
    select(Data(root), SelectConfig(name="all"))
    pack(Data(root), "all", PackConfig(shard_size=10))
    return root


def test_every_sample_is_there_once_and_any_can_be_had_by_number(root: Path) -> None:
    samples = PackedShards(root / "shards" / "all")
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
        PackedShards(tmp_path)
    tar = root / "shards" / "all" / "00001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1024])
    try:
        with pytest.raises(UserError, match=r"cut or of other bytes: 00001\.tar"):
            PackedShards(root / "shards" / "all")
    finally:
        tar.write_bytes(whole)


# -------------------------------------------------------------------------------------------- the three kinds of folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("pictures"), 50)


def write_tars(folder: Path, source: Path, facts: Any = lambda i: {}) -> Path:
    """The images of a folder as two tars, as img2dataset lays them out."""
    folder.mkdir()
    names = sorted(source.glob("*.png"))
    for shard in range(2):
        with open(folder / f"{shard:05d}.tar", "wb") as f:
            out = TarWriter(f)
            for i, name in list(enumerate(names))[shard * 25 : shard * 25 + 25]:
                caption = name.with_suffix(".txt").read_text()
                known = {"key": f"{i:09d}", "width": 24, "height": 24, "caption": caption, **facts(i)}
                out.add_sample(f"{i:09d}", name.read_bytes(), "png", caption, known)
            out.close()
    return folder


def test_tars_and_images_are_read_alike(images: Path, tmp_path: Path) -> None:
    tars, files = open_samples(write_tars(tmp_path / "tars", images)), open_samples(images)
    assert isinstance(tars, Tars) and isinstance(files, Images) and len(tars) == len(files) == 50
    for one, other in zip(tars, files, strict=True):
        assert one.image == other.image and one.caption == other.caption and one.caption
    assert tars[49].key == "000000049" and files[49].key == "049.png"
    assert tars.path(49) == "000000049.png" and files.path(49) == "049.png"


def test_the_kind_of_a_folder_is_told(root: Path, images: Path) -> None:
    assert type(open_samples(root / "shards" / "all")) is PackedShards
    assert type(open_samples(root / "fetched")) is Tars
    with pytest.raises(UserError, match=r"Did you mean .*shards/all\?"):
        open_samples(root)


def test_images_without_a_caption_can_be_given_one(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(images, folder, ignore=lambda _, names: [n for n in names if n.endswith(".txt") and n > "003"])
    with pytest.raises(UserError, match="--caption TEXT gives"):
        open_samples(shutil.copytree(folder, tmp_path / "none", ignore=shutil.ignore_patterns("*.txt")))
    own, given = open_samples(folder), open_samples(folder, "a sks disc")
    captions = [s.caption for s in given]
    assert captions == [s.caption or "a sks disc" for s in own] and captions.count("a sks disc") == len(own) - 3
    assert [s.image for s in given] == [s.image for s in own] and given.fingerprint != own.fingerprint


def test_folders_that_cannot_be_trained_on_are_refused_with_what_to_do(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        open_samples(tmp_path / "absent")
    with pytest.raises(UserError, match="neither tars nor images"):
        open_samples(tmp_path)
    few = tmp_path / "few"
    few.mkdir()
    for name in sorted(images.iterdir())[:6]:
        shutil.copy(name, few)
    with pytest.raises(UserError, match="holds 3 images: too few to train on, at least 8"):
        open_samples(few)
    silent = tmp_path / "silent"
    shutil.copytree(images, silent, ignore=shutil.ignore_patterns("*.txt"))
    with pytest.raises(UserError, match=r"none of the 50 images .* has a caption"):
        open_samples(silent)
    broken = write_tars(tmp_path / "broken", images)
    tar = broken / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:-20000])
    with pytest.raises(UserError, match=r"00001.tar.*Remove or replace"):
        open_samples(broken)


# --------------------------------------------------------------------------------------------------- images and split


def letters(captions: list[str]) -> torch.Tensor:
    """Stands in for a tokenizer: the length of each caption, and its first letters."""
    return torch.tensor([[len(c), *(ord(x) for x in c[:9].ljust(9))] for c in captions])


def test_images_come_scaled_cut_and_centred() -> None:
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 255
    assert (crop_resize(wide, 10, 10) == 255).all()
    assert crop_resize(wide, 20, 20).shape == (20, 20, 3) and crop_resize(wide.swapaxes(0, 1), 4, 8).shape == (4, 8, 3)


def test_values_lie_between_minus_one_and_one(images: Path) -> None:
    examples = ImageDataset(open_samples(images), letters, 16)
    key, image, tokens = examples.load(0)
    assert key == "000.png" and tokens[0] == len("a red disc")
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32
    assert image.max() == 1 and -1 <= image.min() < -0.5


def test_an_image_that_cannot_be_read_is_named(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "007.png").write_bytes((folder / "007.png").read_bytes()[:60])
    samples = open_samples(folder)
    with pytest.raises(UserError, match=r"the image 007\.png can't be read"):
        split(samples)
    with pytest.raises(UserError, match=r"the image 007\.png can't be read"):
        for _ in zip(
            range(7), Stream(ImageDataset(samples, letters, 16), np.arange(50), batch=8).batches(), strict=False
        ):
            pass


def test_a_survey_finds_what_cannot_be_read_and_leaves_it_out(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "007.png").write_bytes((folder / "007.png").read_bytes()[:60])
    samples, told = open_samples(folder), []
    known = scan_images(samples, told.append)
    assert sum(told) == 50 and list(known.unreadable) == [7] and known.keys[7].as_py() == "007.png"
    chosen, held = split(samples, 0.2, known=known)
    assert sorted([*chosen, *held]) == [i for i in range(50) if i != 7]
    ImageDataset(samples, letters, 16, buckets=True)  # whose shapes are told by the images' headers


@pytest.mark.long
def test_images_of_several_shapes_go_into_buckets(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(60):
        height, width = [(32, 32), (32, 64), (64, 32), (32, 600)][3 if i == 0 else i % 3]
        cv2.imwrite(str(tmp_path / f"{i:02d}.png"), rng.integers(0, 255, (height, width, 3), np.uint8))
        (tmp_path / f"{i:02d}.txt").write_text("noise")
    examples = ImageDataset(open_samples(tmp_path), letters, 64, buckets=True, step=16, least=4)
    assert sorted(examples.shapes) == [(48, 96), (64, 64), (96, 48)]
    assert examples.shapes[examples.bucket[0]] == (48, 96)  # the longest goes with the nearest that has company
    stream = Stream(examples, np.arange(60), batch=4)
    for batch in itertools.islice(stream.batches(), len(stream.epoch_order(0))):
        assert batch.images.shape[0] == 4  # one shape, or stacking had failed
    assert {int(n) for n in stream.epoch_order(0).ravel()} == set(range(60))


def test_each_shape_is_the_nearest_by_the_logarithm_of_its_ratio() -> None:
    rng = np.random.default_rng(0)
    ratios = np.exp(rng.uniform(-1.5, 1.5, 3000)) * rng.choice([1, 1, 1, 0.9], 3000)
    for least in (1, 100, 400, 2000):
        shapes, chosen = buckets_of(ratios, 256, 8, least)
        far = np.abs(np.log(ratios)[:, None] - np.log([h / w for h, w in shapes]))
        assert (far[np.arange(3000), chosen] == far.min(1)).all()
        counts = np.bincount(chosen)
        assert len(counts) == len(shapes) and (counts.min() >= least or len(shapes) == 1)


def test_no_near_duplicate_of_what_is_held_out_is_trained_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(40):
        coarse = cv2.resize(rng.integers(0, 255, (8, 8, 3), np.uint8), (64, 64), interpolation=cv2.INTER_CUBIC)
        for copy, quality in enumerate((95, 70, 95)):
            data = io.BytesIO()
            Image.fromarray(cv2.resize(coarse, (48, 48)) if copy == 2 else coarse).save(data, "JPEG", quality=quality)
            (tmp_path / f"{i:02d}-{copy}.jpg").write_bytes(data.getvalue())
            (tmp_path / f"{i:02d}-{copy}.txt").write_text("noise")
    samples = open_samples(tmp_path)
    chosen, held = split(samples, 0.2)
    scenes = [{samples.facts(int(i))["key"][:2] for i in part} for part in (chosen, held)]
    assert not scenes[0] & scenes[1] and 12 <= len(held) <= 24
    assert sorted([*chosen, *held]) == list(range(120))
    again = split(samples, 0.2)
    assert np.array_equal(again[0], chosen) and len(split(samples, 0.005)[1]) == 0


# --------------------------------------------------------------------------------------------------------- the stream


def test_a_stream_goes_on_exactly_where_its_cursor_says(images: Path) -> None:
    examples = ImageDataset(open_samples(images), letters, 16)
    stream = Stream(examples, np.arange(50), batch=8, seed=3)
    batches = list(itertools.islice(stream.batches(), 20))
    assert [b.cursor for b in batches[:8]] == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (1, 0), (1, 1)]
    for start in (1, 6, 7, 13):
        rest = Stream(examples, np.arange(50), batch=8, seed=3, workers=4).batches(batches[start - 1].cursor)
        for one, other in zip(batches[start:], rest, strict=False):
            assert one.keys == other.keys and one.cursor == other.cursor
            assert torch.equal(one.tokens, other.tokens) and torch.equal(one.images, other.images)
    assert {k for b in batches[:7] for k in b.keys} == {f"{i:03d}.png" for i in range(50)}
    assert batches[0].keys != batches[7].keys
    other = next(Stream(examples, np.arange(50), batch=8, seed=4).batches())
    assert other.keys != batches[0].keys


def test_ranks_share_the_batches_that_one_would_see(images: Path) -> None:
    examples = ImageDataset(open_samples(images), letters, 16)
    one = Stream(examples, np.arange(50), batch=12).batches()
    ranks = [Stream(examples, np.arange(50), batch=12, rank=r, ranks=3).batches() for r in range(3)]
    for _ in range(10):
        whole, parts = next(one), [next(r) for r in ranks]
        for part in parts:
            assert [whole.keys[s] for s in part.slots] == part.keys and part.cursor == whole.cursor
            assert torch.equal(whole.tokens[part.slots], part.tokens)
        assert sorted(s for p in parts for s in p.slots) == list(range(12))
    with pytest.raises(UserError, match="a batch of 10 can't be shared evenly by 3"):
        Stream(examples, np.arange(50), batch=10, ranks=3)


def test_a_tenth_of_captions_is_dropped(images: Path) -> None:
    examples = ImageDataset(open_samples(images), letters, 16)
    drawn = itertools.islice(Stream(examples, np.arange(50), batch=50).batches(), 40)
    share = np.mean([float((b.tokens[:, 0] == 0).float().mean()) for b in drawn])
    assert abs(share - 0.1) < 0.03  # 2,000 captions: four standard deviations
    kept = next(Stream(examples, np.arange(50), batch=50, drop=0).batches())
    assert (kept.tokens[:, 0] > 0).all()
    held = list(ordered_batches(examples, np.arange(20), 8))
    assert [len(b.keys) for b in held] == [8, 8, 4] and all((b.tokens[:, 0] > 0).all() for b in held)


def test_images_of_a_higher_score_come_more_often(images: Path, tmp_path: Path) -> None:
    def facts(i: int) -> dict[str, Any]:
        return {"taste": None if i == 7 else 1 + i % 3}

    samples = open_samples(write_tars(tmp_path / "tars", images, facts))
    weights = sampling_weights(samples, "taste")
    stream = Stream(ImageDataset(samples, letters, 16), np.arange(50), batch=10, weights=weights)
    counts = np.bincount(np.concatenate([stream.epoch_order(epoch).ravel() for epoch in range(200)]), minlength=50)
    expected = weights / weights.sum() * counts.sum()
    assert counts[7] == 0 and np.allclose(counts, expected, rtol=0.2)
    each = [np.bincount(stream.epoch_order(e).ravel(), minlength=50) - weights / weights.sum() * 50 for e in range(9)]
    assert np.abs(each).max() < 1  # as often as its share says, rounded up or down
    with pytest.raises(UserError, match="has a number 'tastes'; there are height, taste, width"):
        sampling_weights(samples, "tastes")
