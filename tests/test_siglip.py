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
from curate.encoders.embed import EmbedConfig
from curate.images.decode import decode
from curate.layout import Data
from curate.shards.tar import read_images
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from curate.workers import EmbedWorker
from pipelines.cli import main
from pipelines.recipe import load_recipe, store_recipe
from tests.real_data import fetch_all, image_files
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
        head = torch.nn.Module()
        head.scoring_head = torch.nn.Sequential(*modules[:-1])
    return head.bfloat16().eval()


def test_an_imported_head_and_scores_of_others_choose_images(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TASTEMAKER_HEADS", str(tmp_path / "heads"))
    (tmp_path / "images").mkdir()
    for i, image in enumerate(image_files()[:20]):
        (tmp_path / "images" / f"{i:02d}.jpg").write_bytes(image)
    data, root = Data(tmp_path / "data"), str(tmp_path / "data")
    make_plan(str(tmp_path / "images"), data, SourceConfig(shard_size=8))
    settings = ["columns={}", "select.rules={}", f"embed.encoder={SIGLIP}", f"embed.weights={tmp_path / 'model.pt'}"]
    store_recipe(data, load_recipe("everything", settings))
    fetch_all(data)
    embed = EmbedConfig(encoder=SIGLIP, weights=str(tmp_path / "model.pt"))
    worker = EmbedWorker(data, embed, {}, load_recipe("everything", settings).hashes()[1], threads=1)
    for shard in data.plan.shards:
        worker.run(shard.shard)

    head = predictor()
    torch.save(head.state_dict(), tmp_path / "taste.pth")
    declared = ["--encoder", SIGLIP, "--scale", "1", "10"]
    assert main(["heads", "import", str(tmp_path / "taste.pth"), *declared]) == 2
    assert "3 linear layers (64-32-16-1)" in capsys.readouterr().err
    assert main(["heads", "import", str(tmp_path / "taste.pth"), *declared, "--activation", "none"]) == 0
    assert load_head("taste").affine
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


def _squash(image: np.ndarray) -> np.ndarray:
    """As SigLIP's preprocessing: 48 x 48 whatever the shape, bicubic, -1 to 1; (3, 48, 48) float32."""
    from PIL import Image

    small = Image.fromarray(image).resize((48, 48), Image.Resampling.BICUBIC)
    return (np.asarray(small, np.float32) / 127.5 - 1).transpose(2, 0, 1)
