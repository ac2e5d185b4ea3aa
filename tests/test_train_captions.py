"""Captions out of several columns: which is drawn when, what is said of them, from tars to a trained model."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aesthetic.errors import UserError
from curate.sources.dataset import MapDataset
from pipelines.cli import main
from tests.small_train import make_images
from tests.test_train_data import write_tars
from train.captions import CaptionMix
from train.data import ImageDataset, Stream, open_samples, ordered_batches
from train.latents import precompute_latents
from train.models.family import new_model, tokenize
from train.models.presets import PRESETS
from train.tasks import Denoise

MIX = "caption=0.25,recaption=0.75"
LONG = "a disc, small and of one colour alone, lies on white paper, and there is nothing else to be seen at all"


def more_columns(i: int) -> dict[str, Any]:
    """Of 50 images 40 have a recaption, of which 20 are long; one column is never filled."""
    text = [f"{LONG}, number {i}", f"disc {i}", f"{LONG}, number {i}", f"disc {i}", None][i % 5]
    return {"recaption": text, "empty": None}


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captioned")
    return write_tars(folder / "tars", make_images(folder / "discs", 50), more_columns)


def as_letters(captions: list[str]) -> list[torch.Tensor]:
    """A tokenizer of the simplest kind: a caption's own code points, as many as there are, and an end."""
    return [torch.tensor([*map(ord, c), 0]) for c in captions]


def read(tokens: torch.Tensor, length: Any) -> str:
    return "".join(map(chr, tokens[: int(length) - 1].tolist()))


def test_a_mix_says_columns_and_weights() -> None:
    mix = CaptionMix.parse("caption=0.5, re=caption=3,alone")
    assert mix == CaptionMix(("caption", "re=caption", "alone"), (0.5, 3.0, 1.0))
    assert CaptionMix.parse(str(mix)) == mix and CaptionMix.parse(None) == CaptionMix()
    for text, why in (
        ("caption=a", "a weight from 0 on"), ("a=1,a=2", "twice"), ("a=-1", "weight"), ("a=nan", "weight"), 
        ("", "weight"), ("a=0,b=0", "at least one weight"), ("a=1e308,b=1e308", "at least one"), ("=1", "a column"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            CaptionMix.parse(text)


def test_columns_are_drawn_by_weight_among_those_with_a_text() -> None:
    mix = CaptionMix(("a", "b", "c"), (1.0, 3.0, 0.0))
    even = (np.arange(400) + 0.5) / 400

    def shares(*there: bool) -> list[float]:
        chosen = [mix.choose(float(x), there) for x in even]
        return [chosen.count(i) / 400 for i in range(3)]

    assert shares(True, True, True) == [0.25, 0.75, 0] and shares(False, True, True) == [0, 1, 0]
    assert shares(False, False, True) == [0, 0, 1]  # of weight 0: where no other has a text
    assert mix.choose(0.5, [False] * 3) is None
    assert CaptionMix(("a", "b"), (0.1, 0.2)).choose(np.nextafter(1, 0), [True, True]) == 1


def test_a_stream_draws_captions_as_the_seed_says_whatever_the_ranks_and_wherever_it_begins(tars: Path) -> None:
    samples = open_samples(tars, captions=MIX)
    examples, mix = ImageDataset(samples, as_letters, 16), CaptionMix.parse(MIX)

    def stream(**more: Any) -> Stream:
        return Stream(examples, np.arange(50), batch=10, seed=5, captions=mix, **more)

    batches = list(itertools.islice(stream().batches(), 40))
    told: dict[str, list[str]] = {}
    for batch in batches:
        for key, tokens, length in zip(batch.keys, batch.tokens, batch.lengths, strict=True):
            told.setdefault(key, []).append(read(tokens, length))
    ours = {samples.key(i): samples.read_facts(i) for i in range(50)}
    for key, texts in told.items():
        assert set(texts) <= {"", ours[key]["caption"], ours[key]["recaption"] or ""}
    both = [t for key, texts in told.items() if ours[key]["recaption"] for t in texts if t]
    share = np.mean([t.startswith((LONG, "disc")) for t in both])
    assert abs(share - 0.75) < 0.07  # of 288 draws: nearly three standard deviations
    alone = [t for key, texts in told.items() if not ours[key]["recaption"] for t in texts]
    assert 60 < sum(bool(t) for t in alone) < len(alone) == 80  # the caption, but for a tenth that is dropped

    rest = stream(workers=3).batches(batches[12].cursor)
    halves = [stream(rank=r, ranks=2).batches(batches[12].cursor) for r in range(2)]
    for whole in batches[13:20]:
        again, parts = next(rest), [next(h) for h in halves]
        assert whole.keys == again.keys and torch.equal(whole.tokens, again.tokens)
        for part in parts:
            for slot, tokens, length in zip(part.slots, part.tokens, part.lengths, strict=True):
                assert read(tokens, length) == read(whole.tokens[slot], whole.lengths[slot])

    held = next(ordered_batches(examples, np.arange(10), 10))  # the first column that is named, or else the next
    assert [read(*row) for row in zip(held.tokens, held.lengths, strict=True)] == [
        s["caption"] for s in list(ours.values())[:10]
    ]
    other = ImageDataset(open_samples(tars, captions="recaption,caption"), as_letters, 16)
    held = next(ordered_batches(other, np.arange(10), 10))
    assert [read(*row) for row in zip(held.tokens, held.lengths, strict=True)] == [
        s["recaption"] or s["caption"] for s in list(ours.values())[:10]
    ]


def test_the_samples_say_the_first_columns_caption_and_know_when_any_changed(tars: Path, tmp_path: Path) -> None:
    one, mixed = open_samples(tars), open_samples(tars, captions="recaption,caption")
    assert mixed[0].caption == mixed.facts(0)["caption"] == f"{LONG}, number 0" != one[0].caption
    assert mixed[4].caption == one[4].caption and mixed[4].captions == (None, one[4].caption)
    assert one.fingerprint == open_samples(tars).fingerprint != mixed.fingerprint
    given = open_samples(tars, "a sks disc", "recaption")
    assert given[4].captions == ("a sks disc",) and given[0].captions == mixed[0].captions[:1]
    with pytest.raises(UserError, match=r"in the column 'empty'; there are caption, key, recaption$"):
        open_samples(tars, captions="caption,empty")


@pytest.fixture(scope="module")
def pipeline(tars: Path) -> Any:
    small = replace(PRESETS["debug"], vae=(16, 16), factor=2, latents=4)
    return new_model(small, [LONG, "a red disc"])


@pytest.mark.parametrize("text", [False, True])
def test_latents_keep_the_captions_of_each_column(pipeline: Any, tars: Path, tmp_path: Path, text: bool) -> None:
    samples: MapDataset = open_samples(tars, captions=MIX)
    images, every = ImageDataset(samples, lambda c: tokenize(pipeline, c), 16), np.arange(50)
    latents = precompute_latents(pipeline, images, every, tmp_path, text=text, shard_size=20)
    task = Denoise(pipeline, text=not text)
    mix = CaptionMix.parse(MIX)
    one, other = (Stream(e, every, batch=16, seed=1, captions=mix).batches() for e in (images, latents))
    for step in range(3):
        a, b = next(one), next(other)
        assert a.keys == b.keys and torch.equal(a.lengths, b.lengths) and (text or torch.equal(a.tokens, b.tokens))
        assert torch.allclose(*(task.module(*task.inputs(x, 0, step)) for x in (a, b)), rtol=2e-3)
    again = ImageDataset(open_samples(tars, captions="caption"), lambda c: tokenize(pipeline, c), 16)
    before = (tmp_path / "00000.safetensors").stat().st_mtime_ns
    precompute_latents(pipeline, again, every, tmp_path, text=text, shard_size=20)
    assert (tmp_path / "00000.safetensors").stat().st_mtime_ns > before  # made again: of other columns


def test_a_transformers_captions_keep_their_lengths_in_latents(tars: Path, tmp_path: Path) -> None:
    samples = open_samples(tars, captions=MIX)
    made = new_model("debug-dit", [LONG, "a red disc"])
    images, every = ImageDataset(samples, lambda c: tokenize(made, c), 16), np.arange(50)
    latents = precompute_latents(made, images, every, tmp_path)
    mix = CaptionMix.parse(MIX)
    one, other = (Stream(e, every, batch=16, seed=1, captions=mix).batches() for e in (images, latents))
    for _ in range(2):
        a, b = next(one), next(other)
        assert (
            torch.equal(a.tokens, b.tokens) and torch.equal(a.lengths, b.lengths) and len(set(a.lengths.tolist())) > 2
        )


@pytest.mark.long
def test_a_run_says_what_it_mixes_and_what_is_cut_and_goes_on_with_the_same_alone(
    tars: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(tars), "--preset", "debug", "--batch", "16", "--seed", "3", "--captions", MIX]
    assert main([*words, "--out", str(tmp_path / "one"), "--steps", "6"]) == 0
    said = capfd.readouterr().err
    facts = json.loads((tmp_path / "one" / "train.json").read_text())
    assert facts["settings"]["captions"] == MIX
    found = facts["captions"]["columns"]
    assert found["caption"] == {"images": 1, "cut": 0} and 0.75 < found["recaption"]["images"] < 0.85
    assert f"recaption: 75% of draws, {1 - found['recaption']['images']:.0%} of images have none, " in said
    assert "are longer than the 16 tokens that the model reads, and cut" in said and said.count("75% of draws") == 1
    assert main([*words, "--out", str(tmp_path / "one"), "--steps", "6"]) == 0
    words[-1] = "caption=0.75,recaption=0.25"
    assert main([*words, "--out", str(tmp_path / "one"), "--steps", "6"]) == 2
    said = capfd.readouterr().err
    assert f"captions: {MIX} then, caption=0.75,recaption=0.25 now" in said
    words[-1] = "caption,recaptions"
    assert main([*words, "--out", str(tmp_path / "two")]) == 2
    assert "in the column 'recaptions'; there are caption, key, recaption" in capfd.readouterr().err
    assert not (tmp_path / "two").exists()
