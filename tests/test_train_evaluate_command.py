"""`tastemaker evaluate` from end to end: models and images to figures, sheets and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.cli import main
from tests.tiny_clip import add_architectures, make_weights
from train.models.unet import new_model

COLOURS = {
    "red": (220, 40, 40), "orange": (245, 150, 30), "yellow": (245, 230, 60), "green": (60, 180, 60),
    "blue": (50, 80, 225), "purple": (140, 50, 190), "pink": (250, 140, 200), "brown": (125, 75, 35),
    "black": (0, 0, 0), "white": (255, 255, 255),
}  # fmt: skip


def discs(folder: Path, count: int, seed: int = 0) -> Path:
    """PNG files, 16 x 16: a disc of each of ten colours on each of the others, 90 captions."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    pairs = [(a, b) for a in COLOURS for b in COLOURS if a != b]
    order = rng.permutation(len(pairs))
    for i in range(count):
        front, back = pairs[order[i % len(pairs)]]
        image = np.full((16, 16, 3), COLOURS[back], np.uint8)
        cv2.circle(image, [int(c) for c in rng.integers(5, 11, 2)], int(rng.integers(3, 6)), COLOURS[front], -1)
        cv2.imwrite(str(folder / f"{i:04d}.png"), image[:, :, ::-1])
        (folder / f"{i:04d}.txt").write_text(f"a {front} disc on {back}")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return discs(tmp_path_factory.mktemp("evaluate") / "discs", 10)


@pytest.fixture(scope="module")
def untrained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights that does not say where it comes from."""
    out = tmp_path_factory.mktemp("models") / "untrained"
    new_model("debug", [p.read_text() for p in images.glob("*.txt")]).save_pretrained(out)
    return out


def evaluation(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return found


def test_a_model_of_which_nothing_is_known_is_measured_and_what_is_left_out_is_said(
    images: Path, untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(untrained), str(images), "--out", str(tmp_path), "--steps", "2", "--prompts", "8"]
    assert main([*words, "--json"]) == 0
    said = capsys.readouterr().out
    told = json.loads(said.splitlines()[-1])
    facts = evaluation(tmp_path)
    assert told["figures"] == facts["figures"]
    assert "it may have seen these images" in said and "held-out loss (flow)" in said
    loss = facts["figures"]["held_out_loss"]["held_out"]
    assert loss["low"] < loss["value"] < loss["high"] and len(loss["by_time"]) == 8 and loss["pictures"] == 10
    assert np.mean([t["value"] for t in loss["by_time"].values()]) == pytest.approx(loss["value"], rel=1e-5)
    found = facts["figures"]["retrieval"]
    assert found["space"] == "bundled" and found["drawn"]["captions"] == found["real"]["captions"] == 8
    assert set(facts["left_out"]) >= {"memorisation", "KID", "FID", "retrieval in the in-domain space"}
    assert all(what in said for what in facts["left_out"])
    samples = sorted((tmp_path / "samples").iterdir())
    assert [p.name for p in samples] == [f"{i:06d}.png" for i in range(8)]
    assert Image.open(samples[3]).info["tastemaker"] and Image.open(tmp_path / "sheet.png").width > 1000
    assert "R@1 of 8 captions, bundled space" in (tmp_path / "README.md").read_text()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}
    assert main(words) == 0  # all of it is there
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}
    assert main([*words, "--seed", "5"]) == 2  # another evaluation has its own folder
    assert "its seed differs" in capsys.readouterr().err and evaluation(tmp_path) == facts


def test_what_does_not_fit_is_refused_before_anything_is_written(
    images: Path, untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, taken, broken = tmp_path / "short.txt", tmp_path / "taken", tmp_path / "broken"
    short.write_text("one\ntwo\n\ntwo\n")
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    shutil.copytree(untrained, broken)
    shutil.rmtree(broken / "unet")
    same = discs(tmp_path / "same", 9)
    for i in range(9):
        (same / f"{i:04d}.txt").write_text("a disc")
    out = tmp_path / "out"
    for model, data, more, said in (
        (untrained, images, ["--out", str(taken)], "thesis.txt"),
        (tmp_path / "none", images, [], "none holds no diffusers pipeline"),
        (broken, images, [], "unet"),
        (untrained, tmp_path / "nothing", [], "is no folder"),
        (untrained, images, ["--prompts", "3"], "--prompts 3: at least 8"),
        (untrained, images, ["--prompts", str(short)], "2 different prompts"),
        (untrained, images, ["--prompts", str(tmp_path / "absent.txt")], "neither a number nor a file"),
        (untrained, images, ["--encoder", "clap"], "no encoder"),
        (untrained, images, ["--heads", "laion-v2"], "reads vectors of open_clip:"),
        (untrained, images, ["--heads", "nobodys"], "no head nobodys"),
        (untrained, images, ["--steps", "5000"], "steps 5000"),
        (untrained, images, ["--guidance", "-1"], "guidance -1"),
        (untrained, same, [], "1 different captions among 9 images"),
    ):
        words = ["evaluate", str(model), str(data), *([] if "--out" in more else ["--out", str(out)]), *more]
        assert main(words) == 2, said
        assert said in capsys.readouterr().err
        assert not out.exists(), said
    assert [p.name for p in taken.iterdir()] == ["thesis.txt"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that has learnt colours, and its images."""
    folder = tmp_path_factory.mktemp("trained")
    data = discs(folder / "discs", 1500)
    words = ["train", str(data), "--out", str(folder / "model"), "--preset", "debug", "--steps", "600"]
    assert main(words) == 0
    return folder / "model", data


@pytest.mark.long
def test_a_model_that_has_learnt_colours_is_told_from_one_that_has_not(
    trained: tuple[Path, Path], untrained: Path, tmp_path: Path
) -> None:
    model, data = trained
    assert main(["evaluate", str(model), str(data), "--steps", "10", "--out", str(tmp_path / "a")]) == 0
    figures = evaluation(tmp_path / "a")["figures"]
    found = figures["retrieval_in_domain"]
    assert found["real"]["recall_at_5"]["value"] > 0.9  # the space can tell these captions apart
    assert found["drawn"]["recall_at_5"]["low"] > found["drawn"]["recall_at_5"]["shuffled"]["high"]
    loss = figures["held_out_loss"]
    assert loss["held_out"]["value"] == pytest.approx(loss["at_the_end_of_training"], rel=0.01)  # of latents in fp16
    kid = figures["kid"]
    assert abs(kid["real_against_real"]["mean"]) < kid["drawn"]["mean"] < kid["noise_against_real"]["mean"]
    assert not kid["circular"] and (tmp_path / "a" / "nearest.png").is_file()
    # the same images, of which random weights know nothing; their fingerprint makes them its own
    shutil.copytree(untrained, tmp_path / "deaf")
    for name in ("train.json", "data.json"):
        shutil.copy(model / name, tmp_path / "deaf" / name)
    assert main(["evaluate", str(tmp_path / "deaf"), str(data), "--steps", "10", "--out", str(tmp_path / "b")]) == 0
    deaf = evaluation(tmp_path / "b")["figures"]
    theirs = deaf["retrieval_in_domain"]["drawn"]["recall_at_5"]
    assert theirs["low"] <= theirs["shuffled"]["high"] and theirs["high"] < found["drawn"]["recall_at_5"]["low"]
    assert deaf["held_out_loss"]["held_out"]["low"] > loss["held_out"]["high"]
    assert deaf["kid"]["drawn"]["mean"] > kid["drawn"]["mean"]


@pytest.mark.long
def test_the_same_seed_gives_the_same_figures_and_images_that_are_there_are_not_drawn_again(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = trained
    words = ["evaluate", str(model), str(data), "--steps", "4", "--prompts", "20", "--seed", "3"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    b = tmp_path / "b"
    (b / "samples").mkdir(parents=True)
    (b / "evaluation.json").write_text(json.dumps({"asked": evaluation(tmp_path / "a")["asked"]}))
    for i in range(8):  # as a run leaves it that was killed after its first batch
        shutil.copy2(tmp_path / "a" / "samples" / f"{i:06d}.png", b / "samples")
    shutil.copy(b / "samples" / "000001.png", b / "samples" / "000012.png")  # an image of another prompt
    were = [(b / "samples" / f"{i:06d}.png").stat().st_mtime_ns for i in range(8)]
    assert main([*words, "--out", str(b)]) == 0
    assert [(b / "samples" / f"{i:06d}.png").stat().st_mtime_ns for i in range(8)] == were
    one, other = evaluation(tmp_path / "a"), evaluation(b)
    assert one["figures"] == other["figures"] and one["left_out"] == other["left_out"]
    for path in (tmp_path / "a" / "samples").iterdir():
        assert path.read_bytes() == (b / "samples" / path.name).read_bytes()


@pytest.mark.long
def test_prompts_of_ones_own_other_images_and_a_lora_are_measured_too(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = trained
    others = discs(tmp_path / "others", 60, seed=1)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "\n".join(f"a {a} disc on {b}" for a in ("red", "blue", "pink") for b in ("black", "white", "green"))
    )
    words = ["--steps", "3", "--prompts", str(prompts)]
    assert main(["evaluate", str(model), str(others), *words, "--out", str(tmp_path / "a")]) == 0
    facts = evaluation(tmp_path / "a")
    assert facts["pictures"]["drawn"] == 9 and facts["pictures"]["training"] > 1000
    assert "other images than the model was trained on" in facts["about"][1]
    assert facts["figures"]["retrieval"]["real"]["captions"] == 9
    score = facts["figures"]["scores"]["bundled-aesthetic"]
    assert score["difference"]["value"] == pytest.approx(score["drawn"]["value"] - score["real"]["value"])
    lora = tmp_path / "lora"
    assert main(["train", str(others), "--out", str(lora), "--from", str(model), "--lora", "--steps", "4"]) == 0
    assert main(["evaluate", str(lora), str(data), "--steps", "3", "--prompts", "8", "--out", str(tmp_path / "b")]) == 0
    assert f"next: tastemaker sample {model} PROMPT --lora {lora}" in capsys.readouterr().out
    with_lora = evaluation(tmp_path / "b")
    assert "with its LoRA" in with_lora["about"][0] and "+" in with_lora["asked"]["model"]["sha256"]
    assert with_lora["pictures"]["training"] == 54


@pytest.mark.long
def test_another_encoder_looks_and_kid_keeps_its_own_features(untrained: Path, tmp_path: Path) -> None:
    data = discs(tmp_path / "many", 110)
    add_architectures(tmp_path)
    make_weights(tmp_path / "toy.pt")
    words = ["--encoder", f"open_clip:toy/{tmp_path / 'toy.pt'}", "--prompts", "60", "--steps", "1"]
    assert main(["evaluate", str(untrained), str(data), *words, "--out", str(tmp_path / "out")]) == 0
    facts = evaluation(tmp_path / "out")
    assert facts["figures"]["retrieval"]["space"].startswith("open_clip:toy/sha256-")
    assert "no head that comes with tastemaker" in facts["left_out"]["scores"]
    kid = facts["figures"]["kid"]
    assert kid["features"] == "EfficientNet-lite0" and kid["drawn"]["subset"] == 30 and not kid["circular"]
    assert abs(kid["real_against_real"]["mean"]) < 3 * kid["real_against_real"]["sd"] < kid["drawn"]["mean"]
