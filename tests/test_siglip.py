"""From images to a selection as curators do it today: SigLIP, an imported head of several layers, scores of others."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from aesthetic.catalog import load_head
from aesthetic.untrusted import open_vectors
from curate.images.decode import decode
from curate.layout import Data
from curate.shards.tar import read_images
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from curate.workers import EmbedWorker
from pipelines.cli import main
from pipelines.recipe import Recipe, load_recipe, store_recipe
from tests.real_data import fetch_all, image_files
from tests.small_captions import Behaviour, CaptionServer
from tests.tiny_clip import DIM, add_architectures, make_weights

SIGLIP = "open_clip:toy-sigmoid/first"
PREPROCESSING = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash", "interpolation": "bicubic"}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny SigLIP that open_clip knows by name; its weights are in model.pt."""
    from open_clip import pretrained

    add_architectures(tmp_path)
    config = {**pretrained.get_pretrained_cfg("ViT-B-32", "laion2b_e16"), "hf_hub": "", "url": "", **PREPROCESSING}
    monkeypatch.setitem(pretrained._PRETRAINED, "toy-sigmoid", {"first": config})
    return make_weights(tmp_path / "model.pt", "toy-sigmoid")


def predictor() -> torch.nn.Module:
    """As Aesthetic Predictor V2.5 is made, and smaller: linear layers with dropout between them, in bfloat16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules: list[torch.nn.Module] = []
        for inputs, outputs in pairwise((DIM, 32, 16, 1)):
            linear = torch.nn.Linear(inputs, outputs)
            linear.weight.data *= 4  # so that scores differ
            modules += [linear, torch.nn.Dropout(0.5)]
        linear.bias.data += 3.3  # about half of the images are above 5.5
        head = torch.nn.Module()
        head.scoring_head = torch.nn.Sequential(*modules[:-1])
    return head.bfloat16().eval()


def encoder(folder: Path) -> list[str]:
    return [f"embed.encoder={SIGLIP}", f"embed.weights={folder / 'model.pt'}"]


def embedded(folder: Path, recipe: Recipe) -> Data:
    """Twenty images with captions, fetched and embedded by this recipe's encoder."""
    images, data = folder / "images", Data(folder / "data")
    images.mkdir()
    for i, image in enumerate(image_files()[:20]):
        (images / f"{i:02d}.jpg").write_bytes(image)
        (images / f"{i:02d}.txt").write_text("a photograph of a temple in China" if i < 10 else "une fleur rouge")
    make_plan(str(images), data, SourceConfig(shard_size=8))
    store_recipe(data, recipe)
    fetch_all(data)
    worker = EmbedWorker(data, recipe.embed, {}, recipe.hashes()[1], threads=1)
    for shard in data.plan.shards:
        worker.run(shard.shard)
    return data


def import_predictor(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`tastemaker heads import`, as `taste`: refused until it is said what stands between the layers."""
    torch.save(predictor().state_dict(), folder / "taste.pth")
    declared = ["heads", "import", str(folder / "taste.pth"), "--encoder", SIGLIP, "--scale", "1", "10"]
    assert main(declared) == 2
    assert "3 linear layers (64-32-16-1)" in capsys.readouterr().err
    assert main([*declared, "--activation", "none"]) == 0
    assert load_head("taste").affine


def test_an_imported_head_and_scores_of_others_choose_images(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TASTEMAKER_HEADS", str(tmp_path / "heads"))
    settings = ["columns={}", "select.rules={}"]
    data = embedded(tmp_path, load_recipe("everything", [*settings, *encoder(tmp_path)]))
    root = str(data.root)
    import_predictor(tmp_path, capsys)
    head = predictor()
    theirs = pd.DataFrame(
        {"sha256": data.ledger.order("key").df()["sha256"], "label": [f"l{i % 4}" for i in range(20)]}
    )
    theirs.to_csv(tmp_path / "labels.csv")
    file = f"{{use: file, path: {tmp_path / 'labels.csv'}, on: sha256}}"
    assert main(["annotate", root, "taste=taste", f"label={file}"]) == 0
    assert "labels.csv: 20 rows, 20 of them name an image" in capsys.readouterr().out

    found = Data(data.root).ledger.order("key").df()
    stored = np.concatenate([open_vectors(data.image_vectors(s.shard)) for s in data.plan.shards]).astype(np.float64)
    images = [decode(image) for s in data.plan.shards for _, _, image in read_images(data.tar(s.shard))]
    with torch.inference_mode():
        scores = head.double().scoring_head(torch.from_numpy(stored))[:, 0].numpy()  # type: ignore[operator]
        squashed = np.stack([_squash(image) for image in images])
        features = torch.nn.functional.normalize(model.encode_image(torch.from_numpy(squashed)), dim=-1).double()
        own = head.scoring_head(features)[:, 0].numpy()  # type: ignore[operator]
    np.testing.assert_allclose(found["taste"], scores, atol=1e-5)
    np.testing.assert_allclose(found["taste"], own, atol=0.01)  # stored vectors are float16
    assert np.ptp(scores) > 0.1
    limit = float(np.median(scores))
    rules = [f"select.rules.beautiful=taste > {limit}", "select.rules.labelled=label in ('l0', 'l1')"]
    assert main(["select", root, *(word for rule in rules for word in ("--set", rule))]) == 0
    kept = pq.read_table(data.verdicts("everything"), filters=[("verdict", "=", "kept")])["key"].to_pylist()
    assert kept == [k for i, k in enumerate(found["key"]) if found["taste"][i] > limit and i % 4 < 2]
    assert 0 < len(kept) < 10


@pytest.mark.long
def test_the_recipe_modern_goes_the_whole_way(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its columns, conditions and rules as they are, but for the size; with the tiny model, a head like V2.5, and a
    server of captions."""
    monkeypatch.setenv("TASTEMAKER_HEADS", str(tmp_path / "heads"))
    import_predictor(tmp_path, capsys)
    with CaptionServer(Behaviour()) as server:
        settings = [f"columns.recaption.base_url={server.url}", "columns.recaption.model=tiny-vl"]
        settings += ["columns.aesthetic_v25=taste", "select.rules.large=", *encoder(tmp_path)]
        recipe = load_recipe("modern", settings)
        data = embedded(tmp_path, recipe)
        assert main(["annotate", str(data.root)]) == 0, capsys.readouterr().err
    assert main(["select", str(data.root)]) == 0
    rows = Data(data.root).ledger.order("key").df()
    wanted = (rows["aesthetic_v25"] >= 5.5) & (rows["open_nsfw"] < 0.2) & (rows["text_area"] < 0.05)
    assert 0 < wanted.sum() < 20
    assert [*rows["recaption"].notna()] == [*wanted]  # only those were asked about
    assert [*rows["recaption_outcome"][wanted].unique()] == ["ok"]
    assert {*rows["lang"].dropna()} == {"en", "fr"}
    kept = pq.read_table(data.verdicts("modern"), filters=[("verdict", "=", "kept")])["key"].to_pylist()
    fine = (rows["quality_sharpness"] > 50) & (rows["borders_share"] < 0.05) & ~rows["text_mark"].astype(bool)
    assert 0 < len(kept) <= (wanted & fine).sum() and {*kept} <= {*rows["key"][wanted & fine]}


def _squash(image: np.ndarray) -> np.ndarray:
    """As SigLIP's preprocessing: 48 x 48 whatever the shape, bicubic, -1 to 1; (3, 48, 48) float32."""
    from PIL import Image

    small = Image.fromarray(image).resize((48, 48), Image.Resampling.BICUBIC)
    return (np.asarray(small, np.float32) / 127.5 - 1).transpose(2, 0, 1)
