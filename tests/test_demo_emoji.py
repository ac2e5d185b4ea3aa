"""The emoji that `make demo-train` learns: real ones, from the font's package where apt-get can have it."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aesthetic.errors import UserError
from demo import emoji
from train.data import open_samples

ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("apt-get"), reason="the emoji come from a Debian package")
def test_emoji_with_their_names_are_a_folder_to_train_on(tmp_path: Path) -> None:
    """The prompts of the demo are captions of it, and the images show what they say: an apple is red."""
    count = emoji.write_emoji(tmp_path / "emoji")
    samples = open_samples(tmp_path / "emoji")
    captions = [samples.facts(i)["caption"] for i in range(len(samples))]
    assert count == len(samples) == len(set(captions)) > 430
    assert {*(ROOT / "demo" / "emoji.txt").read_text().splitlines()} <= {*captions}

    with open(tmp_path / "emoji" / "metadata.csv") as f:
        names = {text: name for name, text in list(csv.reader(f))[1:]}
    for caption, channel in (("red apple", 0), ("green apple", 1), ("blue heart", 2)):
        pixels = np.asarray(Image.open(tmp_path / "emoji" / names[caption]))
        assert pixels.shape == (136, 136, 3) and (pixels[0] == 255).all()  # on white
        assert pixels[68, 68].argmax() == channel, caption


def test_without_the_package_what_else_can_be_done_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TASTEMAKER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="make demo-train IMAGES=folder"):
        emoji.write_emoji(tmp_path / "emoji")
