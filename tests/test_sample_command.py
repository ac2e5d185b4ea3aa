"""`tastemaker sample` from end to end: files that come as they are finished, drawn again, and refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.cli import main
from train.generate import sampler as sampler_module
from train.generate.files import read_facts
from train.models.unet import new_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model") / "discs"
    new_model("debug", ["a red disc", "a blue disc on white"] * 4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def drawn(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of each of two prompts, and one that was begun with an image."""
    out = tmp_path_factory.mktemp("out") / "samples"
    words = ["sample", str(model), "a red disc", "a blue disc", "--n", "2", "--steps", "2", "--seed", "40"]
    assert main([*words, "--grid", "--out", str(out)]) == 0
    begin = ["--image", str(out / "000000.png"), "--strength", "0.5", "--seed", "44", "--steps", "2"]
    assert main(["sample", str(model), "a blue disc", *begin, "--out", str(out)]) == 0
    return out


def test_images_get_numbers_and_say_what_they_are(drawn: Path, model: Path) -> None:
    assert sorted(p.name for p in drawn.iterdir()) == [*(f"{i:06d}.png" for i in range(5)), "grid-000000.png"]
    facts = [read_facts(drawn / f"{i:06d}.png") for i in range(5)]
    assert [f["seed"] for f in facts] == [40, 41, 42, 43, 44]
    assert [f["prompt"] for f in facts] == ["a red disc"] * 2 + ["a blue disc"] * 3
    assert facts[0]["model"]["name"] == str(model) and facts[4]["image"]["path"] == str(drawn / "000000.png")
    grid = np.asarray(Image.open(drawn / "grid-000000.png"))
    rows = [np.hstack([np.asarray(Image.open(drawn / f"{i:06d}.png")) for i in row]) for row in ((0, 1), (2, 3))]
    assert (grid == np.vstack(rows)).all()


def test_what_an_enlargement_will_take_is_said(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (24, 24), "red").save(tmp_path / "a.png")
    words = ["--image", tmp_path / "a.png", "--upscale", "2", "--steps", "2", "--out", tmp_path / "out"]
    assert main(["sample", str(model), "a red disc", *map(str, words)]) == 0
    assert "enlarging: 25 tiles of 16 x 16 pixels, about " in capsys.readouterr().err
    assert Image.open(tmp_path / "out" / "000000.png").size == (48, 48)


@pytest.mark.parametrize("number", [1, 4])
def test_an_image_is_drawn_again_from_its_file_alone(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    before = drawn / f"{number:06d}.png"
    assert main(["sample", "--again", str(before), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"the same image as {before}, bit for bit" in said
    assert (tmp_path / "000000.png").read_bytes() == before.read_bytes()


@pytest.mark.long
def test_what_differs_from_then_is_said(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_model("debug", ["a red disc", "a blue disc on white"] * 4, seed=1).save_pretrained(tmp_path / "other")
    words = ["sample", str(tmp_path / "other"), "--again", str(drawn / "000001.png"), "--out", str(tmp_path / "o")]
    assert main(words) == 0
    told = capsys.readouterr()
    assert "the model is not the one that" in told.err and "not the same image as" in told.out


@pytest.mark.long
def test_flagged_images_are_said_plainly_and_kept_where_asked(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler_module, "UNSAFE", 0.0)
    words = ["sample", str(model), "a red disc", "--steps", "2", "--seed", "1", "--out", str(tmp_path)]
    assert main([*words, "--json"]) == 0 and main([*words, "--show-flagged"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert "flagged: NSFW score 0." in first and "(blurred; --show-flagged keeps it as it is)" in first
    assert json.loads(rest[2])["pictures"][0]["flagged"] is True and "(kept by --show-flagged)" in rest[3]
    blurred, kept = (np.asarray(Image.open(tmp_path / f"00000{i}.png"), int) for i in (0, 1))
    assert 0 < blurred.std() < kept.std()


def refusals(model: Path, drawn: Path, tmp: Path) -> Iterator[tuple[list[Any], str]]:
    """(words after `sample`, what is said)."""
    image = drawn / "000000.png"
    (tmp / "empty.txt").write_text("\n \n")
    (tmp / "lora").mkdir()
    (tmp / "words.safetensors").write_text("words, not numbers")
    Image.new("L", (8, 16), 255).save(tmp / "mask.png")
    yield [], "which model?"
    yield [model], "what is to be generated?"
    yield [tmp / "absent", "a"], "holds no diffusers pipeline"
    yield [tmp / "lora", "a"], "holds no diffusers pipeline"
    yield [model, "a", "--prompts", tmp / "none.txt"], "there is no such file"
    yield [model, "--prompts", tmp / "empty.txt"], "is empty: a prompt on each line"
    yield [model, "a", "--n", 0], "--n 0: at least 1"
    yield [model, "a", "--batch", 0], "--batch 0: at least 1"
    yield [model, "a", "--steps", 0], "steps 0: 1 to 1000"
    yield [model, "a", "--width", 17, "--height", 16], "width 17 does not fit this model"
    yield [model, "a", "--scheduler", "Euler"], "did you mean EulerAncestralDiscreteScheduler or EulerDiscrete"
    yield [model, "a", "--scheduler", "EulerDiscrete"], "predicts flow"
    yield [model, "a", "--image", tmp / "none.png"], "none.png can't be read"
    yield [model, "a", "--image", tmp / "empty.txt"], "empty.txt can't be read"
    yield [model, "a", "--image", image, "--mask", tmp / "mask.png"], "the mask has another size than the image"
    yield [model, "a", "--mask", tmp / "mask.png"], "say which with --image"
    yield [model, "a", "--strength", 0.5], "--strength is for an image"
    yield [model, "a", "--upscaler", tmp / "x.pth"], "say how many times with --upscale"
    yield [model, "a", "--upscaler", tmp / "x.pth", "--upscale", 2], "there is no such file of weights"
    yield [model, "a", "--faces", tmp / "x.pth"], "there is no such file of weights"
    yield [model, "a", "--lora", tmp / "none"], "the LoRA"
    yield [model, "a", "--lora", tmp / "lora"], "holds no LoRA"
    yield [model, "a", "--lora", f"{tmp}/words.safetensors:0.5"], "is no safetensors file"
    yield [model, "a", "--lora", model / "unet"], "is no LoRA"
    yield ["--again", image, "--steps", 3], "it takes no --steps"
    yield [model, "a", "--again", image], "it takes no PROMPT"
    yield ["--again", tmp / "mask.png"], "does not say how it was generated"
    yield ["--again", tmp / "none.png"], "none.png"


def test_what_cannot_be_drawn_is_said_and_nothing_is_written(
    model: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "samples"
    for words, message in refusals(model, drawn, tmp_path):
        code = main(["sample", *map(str, words), "--out", str(out)])
        said = capsys.readouterr()
        assert code == 2 and message in said.err and not said.out, (words, said)
        assert "model  " not in said.err and not out.exists(), words
    assert main(["sample", str(model), "a", "--out", str(model / "model_index.json")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_help_starts_no_torch() -> None:
    code = "import sys; from pipelines.cli import main\ntry: main(['sample', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'ray', 'diffusers', 'numpy', 'PIL'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--lora PATH[:WEIGHT]" in done.stdout


@pytest.mark.long
def test_what_is_finished_stays_when_it_is_interrupted(model: Path, tmp_path: Path) -> None:
    words = ["sample", str(model), "a red disc", "--n", "500", "--steps", "20", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "pipelines.cli", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    assert process.stdout.readline().startswith(str(tmp_path / "000000.png"))
    process.terminate()
    process.communicate()
    assert process.returncode == 130
    files = sorted(tmp_path.iterdir())
    assert 1 <= len(files) < 500 and [f.name for f in files] == [f"{i:06d}.png" for i in range(len(files))]
    assert all(read_facts(f)["steps"] == 20 for f in files)
