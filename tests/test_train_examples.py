"""The examples that train: clip art on a GPU, and a LoRA of one's own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from examples import clipart, lora
from examples.shapes import BACKGROUNDS, COLOURS, image, judge
from tests.small_train import make_images, small_run
from train import checkpoint
from train.models.presets import PRESETS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("path", "caption"),
    [
        ("animals/mammals/lion_face_nicu_buculei_01.png", "lion face, mammals, clip art"),
        ("food/fruit/banana_mateya_01.png", "banana, fruit, clip art"),
        ("tools/ruota_dentata_architetto_01.png", "ruota dentata, tools, clip art"),
        ("signs_and_symbols/flags/europe/germany/germany_lower_saxony.png", "germany lower saxony, flags, clip art"),
        ("shapes/arrows/arrow08_4.png", "arrow, arrows, clip art"),
        ("plants/01.png", "plants, clip art"),
    ],
)
def test_clip_art_is_captioned_by_its_path_without_its_author(path: str, caption: str) -> None:
    assert clipart.clip_art_caption(path) == caption


def test_an_image_is_put_whole_on_a_white_square() -> None:
    def png(pixels: np.ndarray) -> bytes:
        return cv2.imencode(".png", pixels)[1].tobytes()

    wide = np.zeros((100, 200, 4), np.uint8)
    wide[:, :, 3] = 255
    wide[:, :20, 3] = 0  # transparent
    square = clipart.on_white(png(wide))
    assert square is not None and square.shape == (64, 64, 3)
    assert (square[:15] == 255).all() and (square[50:] == 255).all() and (square[20:44, :5] == 255).all()
    assert (square[20:44, 8:] == 0).all()
    assert clipart.on_white(png(np.zeros((20, 31, 3), np.uint8))) is None


@pytest.mark.parametrize("noise", [0, 10])
def test_outlines_are_told_from_what_is_filled_in_every_colour(noise: float) -> None:
    rng = np.random.default_rng(0)

    def seen(image: np.ndarray) -> bool:
        return lora.is_outline(np.clip(image + rng.normal(0, noise, image.shape), 0, 255).astype(np.uint8))

    kinds = [(c, s, b) for c in COLOURS for s in ("circle", "square") for b in BACKGROUNDS]
    outlines = [lora.outline(*kind, rng) for kind in kinds]
    assert np.mean([seen(p) for p in outlines]) >= 0.95
    assert np.mean([seen(image(*kind, rng)) for kind in kinds]) <= 0.05
    told = [judge(p) for p in outlines]
    assert [(c, b) for c, _, b in told] == [(c, b) for c, _, b in kinds]


def test_outlines_to_learn_and_others_share_no_colour_and_are_the_same_each_time(tmp_path: Path) -> None:
    first, again = lora.make(tmp_path / "a", 24, learn=True), lora.make(tmp_path / "b", 24, learn=True)
    other = lora.make(tmp_path / "c", 24, learn=False)
    assert [p.read_bytes() for p in sorted(first.iterdir())] == [p.read_bytes() for p in sorted(again.iterdir())]
    colours = [{p.read_text().split()[1] for p in folder.glob("*.txt")} for folder in (first, other)]
    assert colours[0] | colours[1] == set(COLOURS) and not colours[0] & colours[1]


@pytest.mark.long
def test_clip_art_trains_an_autoencoder_and_a_model_reports_both_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(PRESETS["debug"], latents=4, factor=2, vae=(8, 16))
    monkeypatch.setitem(PRESETS, "debug-latent", small)
    folder, out = make_images(tmp_path / "pictures"), tmp_path / "out"
    monkeypatch.setattr(clipart, "PROMPTS", ["a red disc", "a purple disc"])
    report = clipart.make(folder, out, "debug-latent", 0.5)

    assert report == json.loads((out / "report.json").read_text())
    assert report["prompts"] == {"a red disc": "learnt", "a purple disc": "new"}
    assert report["held_out"] == 6 and report["pictures"] == 58
    losses = [h["ema"] for h in report["autoencoder"]["held_out"]]
    assert losses[-1] < losses[0] and report["psnr_db"] > 10
    model = report["model"]
    assert model["held_out"][-1]["step"] == model["steps"] >= 20 and model["img_s"] > 0 and model["mfu"] is None
    assert model["held_out"][-1]["ema"] < model["held_out"][0]["ema"]
    assert Image.open(out / "grid.png").size == (6 * 16, 2 * 16)
    last = sorted((out / "autoencoder" / "samples").glob("*.png"))[-1]  # a labelled sheet
    assert (out / "autoencoder.png").read_bytes() == last.read_bytes() and Image.open(last).width > 8 * 16
    assert Image.open(out / "curve.png").size[0] > 500

    capsys.readouterr()
    again = clipart.make(folder, out, "debug-latent", 0.5)
    assert "step" not in capsys.readouterr().out  # nothing was left to do
    assert again["model"] == model and again["psnr_db"] == report["psnr_db"]


@pytest.mark.long
def test_clip_art_needs_neither_ray_nor_a_database_nor_open_clip(tmp_path: Path) -> None:
    absent = ("ray", "duckdb", "open_clip", "webdataset", "aiohttp", "publicsuffixlist", "onnxruntime")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "from examples import clipart; from pathlib import Path\n"
        "clipart.make(Path(sys.argv[1]), Path(sys.argv[2]), 'debug', 0.2)"
    )
    folder, out = make_images(tmp_path / "pictures"), tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", code, folder, out], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (out / "grid.png").is_file() and (out / "curve.png").is_file()


@pytest.mark.long
def test_a_lora_learns_from_32_images_and_one_that_learnt_nothing_changes_nothing(tmp_path: Path) -> None:
    for _ in small_run(make_images(tmp_path / "discs"), tmp_path / "base", steps=150):
        pass
    base = checkpoint.checkpoints(tmp_path / "base")[150] / "pipeline"
    learn, others = lora.make(tmp_path / "learn", 32, learn=True), lora.make(tmp_path / "others", 16, learn=False)
    for steps, lr in ((1, 1e-12), (150, 5e-3)):
        for _ in small_run(learn, tmp_path / f"lora{steps}", start=base, steps=steps, lr=lr):
            pass

    prompts = ["a red circle on a black background", "a blue square on a white background"]
    found = {
        steps: lora.compare(
            str(base), tmp_path / f"lora{steps}" / "checkpoints" / f"{steps:06d}" / "lora", others, prompts
        )
        for steps in (1, 150)
    }
    before, same, losses = found[1]
    assert np.abs(np.array(lora.rows(before, before)).astype(int) - np.array(lora.rows(before, same))).max() <= 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)

    again, after, losses = found[150]
    assert [np.array(p).tolist() for p in again] == [np.array(p).tolist() for p in before]
    assert losses[1] < 0.9 * losses[0]
    real = np.array([np.array(Image.open(p).resize((16, 16))) for p in sorted(learn.glob("*.png"))]).mean((0, 1, 2))
    far = [np.abs(np.array([np.array(p) for p in drawn]).mean((0, 1, 2)) - real).max() for drawn in (before, after)]
    assert far[1] < 0.5 * far[0]
