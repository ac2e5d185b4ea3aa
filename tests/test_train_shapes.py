"""The closed world of examples/shapes.py and its judge."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from examples.shapes import BACKGROUNDS, COLOURS, SHAPES, UNSEEN, accuracy, caption, image, judge, kinds, make
from train.data import open_samples


@pytest.mark.long
def test_the_judge_is_right_on_real_images_and_at_chance_on_shuffled_ones() -> None:
    rng = np.random.default_rng(5)
    every = (kinds(seen=True) + kinds(seen=False)) * 2
    images = [image(*kind, rng) for kind in every]
    right = accuracy(images, every)
    assert right["colour"] == right["background"] == 1 and right["shape"] > 0.99
    noisy = [np.clip(p + rng.normal(0, 20, p.shape), 0, 255).astype(np.uint8) for p in images]
    assert min(accuracy(noisy, every).values()) > 0.9
    drowned = [np.clip(p + rng.normal(0, 60, p.shape), 0, 255).astype(np.uint8) for p in images]
    assert accuracy(drowned, every)["shape"] > 0.95  # noise is not taken for another shape
    chance = accuracy(images, [every[i] for i in rng.permutation(len(every))])
    assert abs(chance["colour"] - 1 / 8) < 0.06 and abs(chance["shape"] - 1 / 6) < 0.07
    assert judge(np.full((32, 32, 3), 255, np.uint8)) == ("none", "none", "white")


def test_the_set_is_what_img2dataset_would_have_fetched(tmp_path: Path) -> None:
    samples = open_samples(make(tmp_path / "a"))
    assert len(samples) == 512 and len({s.key for s in samples}) == 512
    told = re.compile(rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) on a ({'|'.join(BACKGROUNDS)}) background")
    found = [told.fullmatch(str(samples.facts(i)["caption"])) for i in range(512)]
    assert all(found)
    pairs = {(m[1], m[2]) for m in found if m}
    assert len(pairs) == 42 and not pairs & UNSEEN
    make(tmp_path / "b")
    assert (tmp_path / "a" / "00000.tar").read_bytes() == (tmp_path / "b" / "00000.tar").read_bytes()
    shuffled = open_samples(make(tmp_path / "c", shuffle=True))
    same = np.mean([samples.facts(i)["caption"] == shuffled.facts(i)["caption"] for i in range(512)])
    assert same < 0.05 and samples[3].image == shuffled[3].image
    assert caption("orange", "star", "teal") == "an orange star on a teal background"
