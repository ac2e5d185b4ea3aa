"""The lock: a head is refused on vectors of another space, naming what differs, and accepted on its own.

Ten wrong spaces and four right ones: real models of random weights, through `tastemaker annotate` and the embed stage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aesthetic.catalog import load_head
from aesthetic.errors import UserError
from aesthetic.head_files import save_head
from aesthetic.heads import Head, HeadError
from aesthetic.space import Space, SpaceMismatch, measure, require_same
from curate.annotators.registry import make_annotators
from curate.encoders.base import Encoder, unit
from curate.encoders.embed import EmbedConfig
from curate.encoders.registry import load_encoder
from curate.images.decode import decode
from curate.layout import Data
from curate.shards.tar import read_images
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from curate.workers import EmbedWorker
from pipelines.cli import main
from tests.real_data import fetch_all, image_files
from tests.tiny_clip import DIM, add_architectures, make_weights

IMAGES = 7
FIRST = "open_clip:toy-quickgelu/first"  # the space that the heads here belong to


@dataclasses.dataclass
class Toys:
    """Files of weights, a data folder whose images are fetched, and a head of the space FIRST."""

    weights: dict[str, Path]
    fetched: Data
    head: Path

    def encoder(self, name: str = FIRST, weights: str = "first", **settings: Any) -> Encoder:
        return load_encoder(name, weights=str(self.weights[weights]), **{"device": "cpu", "threads": 1, **settings})

    def config(self, name: str = FIRST, weights: str = "first", **settings: Any) -> EmbedConfig:
        return EmbedConfig(encoder=name, weights=str(self.weights[weights]), **settings)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toys]:
    import torch
    from open_clip import pretrained

    folder = tmp_path_factory.mktemp("lock")
    threads = torch.get_num_threads()
    add_architectures(folder)
    weights = {name: folder / f"{name}.pt" for name in ("first", "second", "small", "other", "layer")}
    state = make_weights(weights["first"]).state_dict()
    make_weights(weights["second"], seed=1)
    make_weights(weights["small"], "toy-small")
    make_weights(weights["other"], "toy-other")
    # without its last projection a model gives the features of the layer before, here of the same dimension
    torch.save({**state, "visual.proj": torch.eye(DIM)}, weights["layer"])

    images = folder / "images"
    images.mkdir()
    for i, image in enumerate(image_files()[:20:3]):
        (images / f"{i:06d}.jpg").write_bytes(image)  # called like the keys, so that vectors can be imported
    data = Data(folder / "data")
    make_plan(str(images), data, SourceConfig(shard_size=IMAGES))
    fetch_all(data)

    plain = {**pretrained.get_pretrained_cfg("ViT-B-32", "laion2b_e16"), "hf_hub": "", "url": ""}
    quick = {**plain, "quick_gelu": True}
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "resize_mode": "squash"}
    with pytest.MonkeyPatch.context() as patch:
        table = pretrained._PRETRAINED
        patch.setitem(table, "toy", {"plain": plain})
        patch.setitem(
            table,
            "toy-quickgelu",
            {"first": quick, "second": quick, "bilinear": {**quick, "interpolation": "bilinear"}, "layer": quick},
        )
        patch.setitem(table, "toy-64px", {"first": plain})
        patch.setitem(table, "toy-small", {"first": plain})
        patch.setitem(table, "toy-other", {"first": {**plain, **half}})
        made = Toys(weights, data, folder / "taste.head")
        save_head(make_head(made.encoder().space()), made.head)
        yield made
    torch.set_num_threads(threads)


def make_head(space: Space) -> Head:
    weight = np.random.default_rng(0).standard_normal((1, space.dim)).astype(np.float32)
    return Head(
        name="taste", task="aesthetic", space=space, scale=(1, 10), layers=((weight, np.full(1, 5, np.float32)),)
    )


def embedded(toys: Toys, folder: Path, config: EmbedConfig, score: dict[str, str] | None = None) -> Data:
    """A data folder of the fetched images, embedded by the embed stage, and scored there if asked for."""
    if not folder.exists():
        shutil.copytree(toys.fetched.root, folder)
    data = Data(folder)
    EmbedWorker(data, config, score or {}, "c", threads=1).run(0)
    return data


def refused_by_score(data: Data, head: Path | str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `tastemaker annotate` says when it refuses; nothing is scored."""
    capsys.readouterr()
    assert main(["annotate", str(data.root), f"taste={head}"]) == 2
    assert not list((data.root / "annotated").rglob("*.parquet"))
    return capsys.readouterr().err


def scored(data: Data, head: Path | str) -> np.ndarray:
    """The scores that `tastemaker annotate` writes."""
    assert main(["annotate", str(data.root), f"taste={head}"]) == 0
    return pq.read_table(data.annotations("taste", 0))["taste"].to_numpy()


# ----------------------------------------------------------------------------------------------------- ten wrong spaces


@pytest.mark.parametrize(
    ("name", "weights", "told"),
    [
        ("open_clip:toy-small/first", "small", r"dimension 64 against 32"),  # ViT-B/32's on ViT-L/14's
        ("open_clip:toy-quickgelu/second", "second", r"probe images.*cosine.*weights '"),  # laion2b's on openai's
        ("open_clip:toy/plain", "first", r"probe images.*activation 'quick_gelu' against 'gelu'"),
        ("open_clip:toy-64px/first", "first", r"probe images.*'size': \[48, 48\].*against.*'size': \[64, 64\]"),
        ("open_clip:toy-other/first", "other", r"probe images.*'resize_mode': 'squash'"),  # CLIP's 768 on SigLIP's
        (
            "open_clip:toy-quickgelu/bilinear",
            "first",
            r"probe images.*'interpolation': 'bicubic'.*'interpolation': 'bilinear'",
        ),
        ("open_clip:toy-quickgelu/layer", "layer", r"probe images.*weights '"),  # the layer before the last
    ],
    ids=["dimension", "weights", "activation", "resolution", "same dimension", "resize", "layer"],
)
def test_a_head_is_refused_on_vectors_of_another_encoder(
    toys: Toys, name: str, weights: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = embedded(toys, tmp_path / "data", toys.config(name, weights))
    err = refused_by_score(data, toys.head, capsys)
    assert_told(err, rf"columns\.taste: the head taste belongs to the space of {FIRST} .* is of {name} .*{told}")


def assert_told(text: str, pattern: str) -> None:
    assert re.search(pattern, text, re.S), text


def test_an_image_left_on_its_side_is_another_space(toys: Toys, tmp_path: Path) -> None:
    """A folder that somebody else embedded, without minding the EXIF orientation, and described truthfully."""
    encoder = toys.encoder()

    def careless(file: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(file))
        return np.asarray(image.convert("RGB")) if image.getexif().get(0x0112, 1) > 1 else decode(file)

    def encode(files: list[bytes]) -> np.ndarray:
        return encoder.encode_images([careless(f) for f in files])

    data = embedded(toys, tmp_path / "theirs", toys.config())
    measure(encode, FIRST).save(data.space)
    ours = tmp_path / "ours"
    with pytest.raises(SpaceMismatch, match=r"columns\.taste: the head taste.*1 of 16 probe images, most of all 10_"):
        embedded(toys, ours, toys.config(embeddings=str(data.root / "embedded")), {"taste": str(toys.head)})
    assert not Data(ours).embedded_record(0).exists()


def test_vectors_that_were_not_normalised_are_refused(
    toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = embedded(toys, tmp_path / "theirs", toys.config())
    vectors = np.load(data.image_vectors(0))
    np.save(data.image_vectors(0), vectors * np.float16(10))
    assert_told(refused_by_score(data, toys.head, capsys), r"taste takes unit vectors; row 0 has norm (9\.9|10)")
    with pytest.raises(UserError, match=r"has the length (9\.9|10).*not 1"):
        embedded(toys, tmp_path / "ours", toys.config(embeddings=str(data.root / "embedded")))


def test_a_head_of_longer_vectors_is_refused_on_unit_ones(
    toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Simulacra's ridge with its norm declared and not multiplied in; imported, the same weights are accepted."""
    data = embedded(toys, tmp_path / "data", toys.config())
    head = make_head(Space(encoder=FIRST, dim=DIM, norm="l2_sqrt_d"))
    err = refused_by_score(data, save_head(head, tmp_path / "long.head"), capsys)
    assert_told(err, "They differ in: norm l2_sqrt_d against l2")
    vectors = np.load(data.image_vectors(0)).astype(np.float32)
    with pytest.raises(HeadError, match=r"takes vectors of norm 8 \(l2_sqrt_d\); row 0 has norm 1"):
        head(vectors)

    from safetensors.numpy import save_file

    save_file({"weight": head.layers[0][0], "bias": head.layers[0][1]}, tmp_path / "ridge.safetensors")
    words = ["heads", "import", str(tmp_path / "ridge.safetensors"), "--out", str(tmp_path / "ridge.head")]
    assert main([*words, "--encoder", FIRST, "--norm", "l2_sqrt_d", "--scale", "1", "10"]) == 0
    np.testing.assert_allclose(scored(data, tmp_path / "ridge.head"), head(unit(vectors, "row") * 8), atol=1e-2)


def test_a_declared_head_knows_its_encoder_by_name(
    toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LAION's heads have no probes, since nobody's weights were at hand when they were imported."""
    l14, siglip = "open_clip:ViT-L-14-quickgelu/openai", "open_clip:ViT-B-16-SigLIP/webli"
    for head, encoder in (("laion-v1-b32", l14), ("laion-v2", siglip), ("laion-v2", "bundled")):
        with pytest.raises(SpaceMismatch, match=f"reads vectors of .*, but embed.encoder is {encoder}"):
            make_annotators({"taste": head}, encoder)
    assert make_annotators({"taste": "laion-v2"}, "open_clip:ViT-L-14-quickgelu/OpenAI")
    with pytest.raises(SpaceMismatch, match="differ in: the encoder"):
        require_same(load_head("laion-v2").space, Space(encoder=siglip, dim=768, probes=np.eye(16, 768)))

    data = embedded(toys, tmp_path / "data", toys.config("open_clip:toy-quickgelu/second", "second"))
    assert_told(refused_by_score(data, "laion-v2", capsys), "dimension 768 against 64; the encoder")
    declared = make_head(Space(encoder=FIRST, dim=DIM))
    err = refused_by_score(data, save_head(declared, tmp_path / "declared.head"), capsys)
    assert_told(err, "differ in: the encoder")
    right = embedded(toys, tmp_path / "right", toys.config())
    assert len(scored(right, tmp_path / "declared.head")) == IMAGES


def test_the_embed_stage_refuses_before_it_embeds(toys: Toys, tmp_path: Path) -> None:
    other = "open_clip:toy-quickgelu/second"
    score = {"taste": str(toys.head)}
    with pytest.raises(SpaceMismatch, match=f"{FIRST}, but embed.encoder is {other}"):
        make_annotators(score, other)
    with pytest.raises(SpaceMismatch, match=r"the head taste .*probe images"):
        embedded(toys, tmp_path / "data", toys.config(other, "second"), score)
    assert not Data(tmp_path / "data").embedded_record(0).exists()


def test_imported_vectors_meet_the_same_lock(toys: Toys, tmp_path: Path) -> None:
    """A folder of vectors that says which space it is of, under the name of the head's own encoder."""
    theirs = embedded(toys, tmp_path / "theirs", toys.config("open_clip:toy-quickgelu/second", "second"))
    folder = toys.config(embeddings=str(theirs.root / "embedded"))
    score = {"taste": str(toys.head)}
    with pytest.raises(UserError, match=r"of open_clip:toy-quickgelu/second .*but embed.encoder is"):
        embedded(toys, tmp_path / "ours", folder, score)
    dataclasses.replace(Space.load(theirs.space), encoder=FIRST).save(theirs.space)
    with pytest.raises(SpaceMismatch, match=r"the head taste .*probe images.*cosine"):
        embedded(toys, tmp_path / "ours", folder, score)
    same = embedded(toys, tmp_path / "same", toys.config())
    ours = embedded(toys, tmp_path / "ours", toys.config(embeddings=str(same.root / "embedded")), score)
    assert pq.read_table(ours.annotations("taste", 0)).num_rows == IMAGES


# --------------------------------------------------------------------------------------------- four ways of being right


def test_half_precision_in_storage_is_the_same_space(toys: Toys, tmp_path: Path) -> None:
    data = embedded(toys, tmp_path / "data", toys.config(), {"taste": str(toys.head)})
    stored = np.load(data.image_vectors(0))
    assert stored.dtype == np.float16
    images = [decode(image) for _, _, image in read_images(data.tar(0))]
    exact = load_head(toys.head)(toys.encoder().encode_images(images))
    np.testing.assert_allclose(scored(data, toys.head), exact, atol=0.05)
    assert np.ptp(exact) > 1


def test_a_lower_precision_of_the_run_is_the_same_space(toys: Toys, tmp_path: Path) -> None:
    data = embedded(toys, tmp_path / "data", toys.config(precision="bf16"))
    assert Space.load(data.space).details["precision"] == "bf16"
    assert len(scored(data, toys.head)) == IMAGES


def test_other_threads_and_batches_are_the_same_space(toys: Toys, tmp_path: Path) -> None:
    encoder = toys.encoder(threads=2)
    encoder.batch_size = 3
    require_same(load_head(toys.head).space, encoder.space())
    data = embedded(toys, tmp_path / "data", toys.config())
    encoder.space().save(data.space)
    assert len(scored(data, toys.head)) == IMAGES


@contextlib.contextmanager
def on_cuda(toys: Toys) -> Iterator[Encoder]:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    yield toys.encoder(device="cuda")


@contextlib.contextmanager
def in_double_precision(toys: Toys) -> Iterator[Encoder]:
    """Another arithmetic, as another device is: further from fp32's rounding than devices are from each other."""
    import torch

    encoder: Any = toys.encoder()
    model = encoder._model.double()
    with torch.inference_mode():
        encoder._vectors = lambda batch, exact=False: model.encode_image(torch.from_numpy(batch).double()).numpy()
        yield encoder


@pytest.mark.parametrize("elsewhere", [on_cuda, in_double_precision])
def test_other_arithmetic_is_the_same_space(
    toys: Toys, elsewhere: Callable[[Toys], contextlib.AbstractContextManager[Encoder]], tmp_path: Path
) -> None:
    data = embedded(toys, tmp_path / "data", toys.config())
    with elsewhere(toys) as encoder:
        space = encoder.space()
    assert not np.array_equal(space.probes, Space.load(data.space).probes)  # type: ignore[arg-type]
    space.save(data.space)
    assert len(scored(data, toys.head)) == IMAGES


def test_a_published_file_of_weights_and_its_copy_are_one_space(toys: Toys, tmp_path: Path) -> None:
    """The name does not decide where both sides were measured: the same weights under another name are accepted."""
    copy = tmp_path / "copy.pt"
    shutil.copy(toys.weights["first"], copy)
    data = embedded(toys, tmp_path / "data", EmbedConfig(encoder=f"open_clip:toy-quickgelu/{copy}"))
    assert len(scored(data, toys.head)) == IMAGES
