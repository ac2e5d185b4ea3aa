"""Zero-shot heads: CLIP-IQA's formula, real images ranked by words, and what is refused."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from aesthetic.catalog import load_head
from aesthetic.head_files import save_head
from aesthetic.heads import HeadError
from aesthetic.prompts import prompt_head
from aesthetic.space import Space, probe_files, require_same
from curate.encoders.base import Encoder
from curate.encoders.registry import load_encoder
from curate.images.decode import decode
from pipelines.cli import main
from tests.tiny_clip import add_architectures, make_weights


@pytest.fixture(scope="module")
def bundled() -> Encoder:
    return load_encoder("bundled", threads=1)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return [decode(f) for f in probe_files()]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The share of pairs in the right order (Mann and Whitney 1947)."""
    return float((positive[:, None] > negative[None, :]).mean() + (positive[:, None] == negative[None, :]).mean() / 2)


def test_the_score_is_clip_iqas_softmax_over_two_sides(images: list[np.ndarray], tmp_path: Path) -> None:
    """With open_clip's own model: softmax over 100 times the cosines with both sides' mean vectors."""
    import open_clip
    import torch

    add_architectures(tmp_path)
    model = make_weights(tmp_path / "toy.pt")
    encoder = load_encoder(f"open_clip:toy/{tmp_path / 'toy.pt'}", device="cpu")
    wanted, against = ["a sharp photo", "a crisp photo of something"], ["a blurry photo"]
    head = prompt_head(encoder.encode_texts, encoder.space(), wanted, against, name="sharp")
    with torch.inference_mode():
        x = torch.from_numpy(encoder.encode_images(images))
        tokenize = open_clip.get_tokenizer("toy")
        ends = [model.encode_text(tokenize(side), normalize=True).mean(0) for side in (wanted, against)]
        cosines = x @ torch.stack([e / e.norm() for e in ends]).T
        expected = (100 * cosines).softmax(dim=1)[:, 0].numpy()
    np.testing.assert_allclose(head(x.numpy()), expected, atol=1e-4)
    assert np.ptp(expected) > 0.01  # what is compared varies
    again = load_head(save_head(head, tmp_path / "sharp"))
    assert (again.link, again.scale, again.task, again.affine) == ("sigmoid", (0, 1), "prompts", True)
    assert np.array_equal(again(x.numpy()), head(x.numpy()))
    require_same(again.space, encoder.space())
    gentle = prompt_head(encoder.encode_texts, encoder.space(), wanted, against, name="sharp", logit_scale=10)
    np.testing.assert_allclose(gentle(x.numpy()), (10 * cosines).softmax(dim=1)[:, 0].numpy(), atol=1e-5)


def test_words_rank_photographs(bundled: Encoder, shared: Path) -> None:
    """OASIS: 14 cats, 11 sharks and 10 photographs of flowers, each above 47 of other things and above each other."""
    rows = list(csv.DictReader((shared / "oasis" / "ratings.csv").open()))
    themes = {"cat": "Cat", "shark": "Shark", "flower": "Flowers"}
    shown = {word: [r for r in rows if r["theme"].startswith(theme)] for word, theme in themes.items()}
    others = [r for r in rows if not r["theme"].startswith(tuple(themes.values()))][::6]
    vectors = {
        word: bundled.encode_images([decode((shared / "oasis" / r["image"]).read_bytes()) for r in found])
        for word, found in {**shown, "": others}.items()
    }
    for word in themes:
        head = prompt_head(
            bundled.encode_texts, bundled.space(), [f"a photo of a {word}"], ["a photo of a building"], name=word
        )
        rest = np.concatenate([v for key, v in vectors.items() if key != word])
        assert auroc(head(vectors[word]), head(rest)) > 0.9, word
        assert (head(vectors[word]) < 1).all(), "ties at the top are no ranking"
    assert "not CLIP" in " ".join(head.card["limits"])


def test_sides_are_means_of_directions_and_mirror_each_other() -> None:
    table = {"a": [3.0, 0, 0], "b": [0, 1.0, 0], "c": [0, 0, 2.0]}

    def encode(texts: Sequence[str]) -> np.ndarray:
        return np.array([table[t] for t in texts], np.float32)

    space = Space(encoder="test", dim=3)
    head = prompt_head(encode, space, ["a", "b"], ["c"], name="x")
    np.testing.assert_allclose(head.layers[0][0][0], [100 / 2**0.5, 100 / 2**0.5, -100], rtol=1e-6)
    x = unit(np.random.default_rng(0).standard_normal((20, 3))) * 1.0
    mirrored = prompt_head(encode, space, ["c"], ["b", "a"], name="x")
    np.testing.assert_allclose(mirrored(x), 1 - head(x), atol=1e-6)
    assert "“a”; “b”" in head.card["data"]["wanted"]


def test_what_says_nothing_is_refused() -> None:
    space = Space(encoder="test", dim=3)
    vectors = np.eye(3, dtype=np.float32)

    def encode(texts: Sequence[str]) -> np.ndarray:
        return vectors[[{"a": 0, "b": 1, "same as a": 0}[t] for t in texts]]

    def build(wanted: object, against: object, encode: object = encode, **changes: object) -> None:
        arguments = {"space": space, "name": "x", **changes}
        prompt_head(encode, wanted=wanted, against=against, **arguments)  # type: ignore[arg-type]

    build(["a"], ["b"])
    with pytest.raises(HeadError, match="has no text encoder"):
        build(["a"], ["b"], None)
    with pytest.raises(HeadError, match="wanted is a list of at least one prompt"):
        build([], ["b"])
    with pytest.raises(HeadError, match="against is a list of at least one prompt, not 'b'"):
        build(["a"], "b")
    with pytest.raises(HeadError, match="a prompt of against is empty"):
        build(["a"], ["b", "  "])
    with pytest.raises(HeadError, match="are the same"):
        build(["a", "b"], ["b", "a"])
    with pytest.raises(HeadError, match="both sides say the same"):
        build(["a"], ["same as a"])
    with pytest.raises(HeadError, match="cancel each other out"):
        build(["a", "b"], ["b"], lambda texts: np.array([[1, 0, 0], [-1, 0, 0]], np.float32)[: len(texts)])
    with pytest.raises(HeadError, match=r"shape \(1, 3\); test has 4 numbers"):
        build(["a"], ["b"], space=Space(encoder="test", dim=4))
    with pytest.raises(HeadError, match="zero or not finite"):
        build(["a"], ["b"], lambda texts: np.zeros((len(texts), 3)))
    with pytest.raises(HeadError, match="norm l2_sqrt_d"):
        build(["a"], ["b"], space=Space(encoder="test", dim=3, norm="l2_sqrt_d"))
    for wrong in (0, -1, float("nan")):
        with pytest.raises(HeadError, match="logit scale"):
            build(["a"], ["b"], logit_scale=wrong)


def test_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASTEMAKER_HEADS", str(tmp_path / "heads"))
    words = ["heads", "prompt", "cats", "--encoder", "bundled"]
    assert main(words) == 2
    assert "prompts for both sides" in capsys.readouterr().err
    sides = ["--wanted", "a photo of a cat", "--wanted", "a kitten", "--against", "a photo of a building"]
    assert main([*words, *sides]) == 0
    out = capsys.readouterr().out
    assert "“a photo of a cat”; “a kitten”" in out
    assert "next: tastemaker annotate DATA cats=cats" in out
    assert load_head("cats").link == "sigmoid"
    assert main([*words, *sides, "--out", str(tmp_path / "c.head"), "--task", "subject"]) == 0
    assert load_head(tmp_path / "c.head").task == "subject"
    assert main(["heads", "prompt", "laion-v2", *words[3:], *sides]) == 2
    assert "built in" in capsys.readouterr().err
    assert main([*words, *sides[:2], "--against", "a photo of a cat"]) == 2
    assert "are the same" in capsys.readouterr().err
