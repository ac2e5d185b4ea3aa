"""Precomputed latents are what training would compute, and know what they were made with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aesthetic.errors import UserError
from tests.small_train import make_images
from train.data import ImageDataset, MapDataset, Stream, open_samples
from train.latents import LatentDataset, precompute_latents
from train.models.family import new_model, tokenize
from train.models.presets import PRESETS
from train.tasks import Denoise


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> MapDataset:
    return open_samples(make_images(tmp_path_factory.mktemp("pictures"), 50))


@pytest.fixture(scope="module")
def pipeline(samples: MapDataset) -> Any:
    small = replace(PRESETS["debug"], vae=(16, 16), factor=2, latents=4)
    return new_model(small, [str(s.caption) for s in samples])


def test_the_loss_from_latents_is_that_from_images(pipeline: Any, samples: MapDataset, tmp_path: Path) -> None:
    images = ImageDataset(samples, lambda c: tokenize(pipeline, c), 16)
    latents = precompute_latents(pipeline, images, np.arange(50), tmp_path / "latents", shard_size=20)
    assert sorted(p.name for p in (tmp_path / "latents").glob("0*.safetensors")) == [
        f"{i:05d}.safetensors" for i in range(3)
    ]
    assert len(latents) == 50
    task = Denoise(pipeline)
    one, other = (Stream(e, np.arange(50), batch=8, seed=1).batches() for e in (images, latents))
    for step in range(4):
        a, b = next(one), next(other)
        assert a.keys == b.keys and torch.equal(a.tokens, b.tokens) and not a.latent and b.latent
        assert b.images.shape == (8, 4, 8, 8)
        assert torch.allclose(*(task.module(*task.inputs(x, 0, step)) for x in (a, b)), rtol=2e-3)


def test_what_a_frozen_text_encoder_says_is_kept_too(pipeline: Any, samples: MapDataset, tmp_path: Path) -> None:
    images = ImageDataset(samples, lambda c: tokenize(pipeline, c), 16)
    numbers = np.arange(3, 50, 2)
    latents = precompute_latents(pipeline, images, numbers, tmp_path, text=True)
    assert len(latents) == len(numbers)
    task = Denoise(pipeline, text=False)
    one, other = (Stream(e, numbers, batch=8, seed=1, drop=0.5).batches() for e in (images, latents))
    for step in range(3):
        a, b = next(one), next(other)
        assert a.keys == b.keys and b.tokens.shape == (8, 16, 32)
        assert torch.allclose(*(task.module(*task.inputs(x, 0, step)) for x in (a, b)), rtol=2e-3)
    with pytest.raises(IndexError, match="image 2 has no latents"):
        latents.load(2)


def test_a_shard_that_is_there_is_not_made_again(pipeline: Any, samples: MapDataset, tmp_path: Path) -> None:
    images = ImageDataset(samples, lambda c: tokenize(pipeline, c), 16)
    told: list[int] = []

    def written() -> list[int]:
        precompute_latents(pipeline, images, np.arange(50), tmp_path, shard_size=20, tell=told.append)
        assert sum(told) == 50
        return [(tmp_path / f"{i:05d}.safetensors").stat().st_mtime_ns for i in range(3)]

    before = written()
    (tmp_path / "made.json").unlink()  # killed before the end, in the middle of the second
    (tmp_path / "00001.json").unlink()
    told.clear()
    after = written()
    assert [b == a for b, a in zip(before, after, strict=True)] == [True, False, True]


def test_they_are_made_once_and_again_when_something_changed(
    pipeline: Any, samples: MapDataset, tmp_path: Path
) -> None:
    images = ImageDataset(samples, lambda c: tokenize(pipeline, c), 16)

    def written() -> int:
        precompute_latents(pipeline, images, np.arange(20), tmp_path)
        return (tmp_path / "00000.safetensors").stat().st_mtime_ns

    first = written()
    assert written() == first
    with torch.no_grad():
        pipeline.vae.encoder.conv_in.weight.mul_(1.01)
    assert written() > first


def test_a_folder_that_is_not_whole_is_refused(pipeline: Any, samples: MapDataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no precomputed latents"):
        LatentDataset(tmp_path)
    images = ImageDataset(samples, lambda c: tokenize(pipeline, c), 16)
    precompute_latents(pipeline, images, np.arange(20), tmp_path)
    path = tmp_path / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"00000\.safetensors is missing or cut"):
        LatentDataset(tmp_path)
