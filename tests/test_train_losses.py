"""`--record-loss`: the loss of each image, as the run itself measures it, becomes a column that a rule selects by."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from curate.layout import Data
from pipelines.cli import main
from pipelines.recipe import load_recipe, store_recipe
from tests.real_data import SELECTION
from tests.small_train import make_images

pytestmark = pytest.mark.long


def train(shards: Path, out: Path, *more: str) -> dict[str, Any]:
    assert main(["train", str(shards), "--out", str(out), "--batch", "8", "--steps", "8", *more]) == 0
    return dict(json.loads((out / "train.json").read_text()))


def test_a_recipe_selects_by_the_loss_of_a_model_trained_on_the_same_data(real_data: Data, tmp_path: Path) -> None:
    root, model = tmp_path / "data", tmp_path / "model"
    shutil.copytree(real_data.root, root)
    store_recipe(Data(root), load_recipe("bundled", ["columns={}", "select.rules={}"]))
    facts = train(root / "shards" / SELECTION, model, "--preset", "debug", "--record-loss")

    table = pd.read_parquet(model / "losses.parquet")
    assert [*table] == ["key", "sha256", "url", "loss", "held_out"] and len(table) == 36 == facts["losses"]["images"]
    assert np.isfinite(table["loss"]).all() and table["loss"].nunique() > 30
    ema = facts["result"]["held_out"]["ema"]  # of the same weights on the same latents at the same noise
    assert table["loss"][table["held_out"]].mean() == pytest.approx(ema, rel=1e-4)
    assert int(table["held_out"].sum()) == facts["data"]["held_out"] > 0
    assert facts["losses"]["median"] == pytest.approx(table["loss"].median())

    column = f"train={{use: file, path: {model / 'losses.parquet'}, on: key}}"
    assert main(["annotate", str(root), column]) == 0
    middle = float(table["loss"].median())
    assert main(["select", str(root), "--name", "easy", "--set", f"select.rules.easy=train_loss < {middle}"]) == 0
    kept = set(table["key"][table["loss"] < np.float32(middle)])
    assert main(["pack", str(root), "--name", "easy"]) == 0
    packed = pd.concat(map(pd.read_parquet, sorted((root / "shards" / "easy").glob("*.parquet"))))
    assert set(packed["key"]) == kept and 0 < len(kept) < 36


def test_losses_of_a_model_that_is_there_are_added_and_a_lora_has_them_too(tmp_path: Path) -> None:
    images = make_images(tmp_path / "discs", 24)
    (images / "007.png").write_bytes((images / "007.png").read_bytes()[:60])
    model = tmp_path / "model"
    before = train(images, model, "--preset", "debug")
    weights = (model / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert "losses" not in before and not (model / "losses.parquet").exists()
    after = train(images, model, "--preset", "debug", "--record-loss")
    table = pd.read_parquet(model / "losses.parquet")
    assert [*table] == ["key", "loss", "held_out"] and len(table) == 23 and "007.png" not in set(table["key"])
    assert {k: v for k, v in after.items() if k != "losses"} == before
    assert (model / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    written = (model / "losses.parquet").stat().st_mtime_ns
    train(images, model, "--preset", "debug", "--record-loss")
    assert (model / "losses.parquet").stat().st_mtime_ns == written

    facts = train(images, tmp_path / "lora", "--from", str(model), "--lora", "--record-loss")
    other = pd.read_parquet(tmp_path / "lora" / "losses.parquet")
    assert [*other["key"]] == [*table["key"]] and not np.allclose(other["loss"], table["loss"], rtol=1e-3)
    assert other["loss"][other["held_out"]].mean() == pytest.approx(facts["result"]["held_out"]["ema"], rel=1e-4)
