"""Heads of others, imported from files of weights or from their publisher, without running anything in the files.

A file whose sha256 is known must hold the architecture that was published, and is collapsed to one affine map where its
layers have no non-linearity between them (LAION's v2 "MLP" has none: 927,969 numbers say what 769 say). Of other files
a single linear layer is taken, where whoever imports it says which encoder's vectors it reads: the file does not know.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import math
import os
import urllib.request
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from aesthetic.catalog import PublishedHead, keras_files, published_heads, simulacra_encoder
from aesthetic.errors import UserError
from aesthetic.head_files import read_safetensors
from aesthetic.heads import Head, HeadError, Layer
from aesthetic.pth import MAX_FILE, NOT_A_ZIP, read_pth
from aesthetic.space import Space
from aesthetic.untrusted import read_bytes

NORMS = ("l2", "l2_sqrt_d")

_TIMEOUT = 30.0  # seconds without a byte from the server
_KERAS_MEMBERS = ("saved_model.pb", "keras_metadata.pb", "model.weights.h5")
_COLLAPSE_TOLERANCE = 1e-5  # largest difference between the layers and the one map made of them, on unit vectors


def import_head(
    path: str | Path,
    name: str | None = None,
    *,
    encoder: str | None = None,
    norm: str = "l2",
    scale: tuple[float, float] | None = None,
    task: str = "aesthetic",
) -> Head:
    """A head from a file of weights; `save_head` then writes it, and that file is not needed again.

    A published head is known by its sha256, whatever the file is called, and takes no more than `path` and `name`. Any
    other file (torch's zip format, or safetensors) must hold one linear layer, a weight of shape (1, d) and a bias of
    shape (1,), and be declared: `encoder` by its canonical name, the `scale` of its ratings, and the `norm` of the
    vectors it was fitted to. "l2" are unit vectors; "l2_sqrt_d" are unit vectors times the square root of d, a factor
    that is multiplied into the weight, so that the head reads unit vectors too.

    Raises HeadError where the file is neither or is a program, before anything in it is built.
    """
    path = Path(os.path.expanduser(path))
    try:
        data = read_bytes(path, MAX_FILE)
    except UserError as e:
        raise HeadError(str(e)) from e
    sha256 = hashlib.sha256(data).hexdigest()
    _refuse_keras(path, data, sha256)
    known = next((p for p in published_heads() if p.sha256 == sha256), None)
    if known is not None:
        if encoder is not None or scale is not None or norm != "l2":
            raise HeadError(f"{path} is {known.name}, a published head: its encoder, norm and scale are known")
        return build_published(known, read_pth(data, str(path)), name or known.name)
    name = name or path.stem
    if encoder is None:
        if hint := simulacra_encoder(path.name):
            options = f"--encoder {hint} --norm l2_sqrt_d --scale 1 10"
        else:
            options = (
                "--encoder ENCODER --norm l2 --scale LO HI (ENCODER such as open_clip:ViT-L-14-quickgelu/openai; "
                "--norm l2_sqrt_d where it was fitted to vectors of norm sqrt(d))"
            )
        raise HeadError(
            f"{path} is none of the published heads (its sha256 is {sha256}). Known files: "
            f"{', '.join(p.file for p in published_heads())}; a page saved from a browser is a common cause. If it is "
            f"a single linear layer and you know which vectors it reads, say so: tastemaker heads import {path} "
            f"{options}"
        )
    if norm not in NORMS:
        raise HeadError(f"{path}: the norm is {norm!r}; it is one of {', '.join(NORMS)}")
    if scale is None:
        raise HeadError(f"{path}: on which scale are its ratings? --scale LO HI, such as --scale 1 10")
    if any(name == p.name for p in published_heads()):
        raise HeadError(f"{path}: {name} is the name of a published head, and this is another file: rename it")

    weight, bias = _linear_layer(data, str(path))
    done = "values unchanged"
    if norm == "l2_sqrt_d":
        weight = (weight * math.sqrt(weight.shape[1])).astype(np.float32)
        done = "its weight multiplied by sqrt(d): it was fitted to vectors of that norm, and now reads unit vectors"
    return Head(
        name=name,
        task=task,
        space=Space(encoder=encoder, dim=weight.shape[1], norm="l2"),
        scale=scale,
        layers=((weight, bias),),
        card={
            "about": f"A linear head from the file {path.name}.",
            "source": f"{path.name}, sha256 {sha256}; {done}",
            "limits": [
                "Encoder, norm and scale are as declared at the import: the file does not say which vectors it reads, "
                "and those of another encoder of the same dimension would give plausible numbers.",
            ],
        },
    )


def fetch_head(name: str) -> Head:
    """A published head by its name, from its publisher; only a file with the known sha256 is taken.

    Raises HeadError, with the address and what to do by hand, where it can't be had.
    """
    known = next((p for p in published_heads() if p.name == name), None)
    if known is None:
        names = ", ".join(p.name for p in published_heads())
        raise HeadError(f"{name} is no file here, and no published head. Known: {names}")
    return build_published(known, read_pth(download(known), known.url), name)


def download(known: PublishedHead) -> bytes:
    """The bytes of a published file from its publisher; raises HeadError where they are others, or can't be had."""
    try:
        with urllib.request.urlopen(known.url, timeout=_TIMEOUT) as response:
            data: bytes = response.read(MAX_FILE + 1)
    except (OSError, http.client.HTTPException) as e:
        raise HeadError(f"{known.name} could not be fetched ({e}). {known.by_hand}") from e
    if hashlib.sha256(data).hexdigest() != known.sha256:
        raise HeadError(
            f"{known.url} gave {len(data):,} bytes that are not the published file (sha256 {known.sha256}): refused"
        )
    return data


def build_published(known: PublishedHead, tensors: dict[str, npt.NDArray[np.float32]], name: str) -> Head:
    """The head in a checkpoint, which must have exactly the published tensors; raises HeadError."""
    expected: dict[str, tuple[int, ...]] = {}
    for prefix, (inputs, outputs) in zip(known.layers, pairwise(known.sizes), strict=True):
        expected[f"{prefix}weight"] = (outputs, inputs)
        expected[f"{prefix}bias"] = (outputs,)
    found = {key: value.shape for key, value in tensors.items()}
    if found != expected:
        odd = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
        raise HeadError(
            f"{known.name}: not the published architecture; missing, unknown or of another shape: {', '.join(odd)}"
        )
    _require_finite(tensors, known.name)
    layers = tuple((tensors[f"{p}weight"], tensors[f"{p}bias"]) for p in known.layers)
    return Head(
        name=name,
        task="aesthetic",
        space=Space(encoder=known.encoder, dim=known.sizes[0], norm="l2", probes=None, details={}),
        scale=known.scale,
        layers=layers if known.relu else (collapse(layers),),
        card=known.card,
    )


def collapse(layers: tuple[Layer, ...]) -> Layer:
    """The one affine map that a chain of affine maps is, multiplied out in float64.

    Raises HeadError where it differs from the chain by more than 1e-5 on 1,000 random unit vectors.
    """
    weight, bias = layers[0][0].astype(np.float64), layers[0][1].astype(np.float64)
    for w, b in layers[1:]:
        weight, bias = w @ weight, w @ bias + b
    one = weight.astype(np.float32), bias.astype(np.float32)
    x = np.random.default_rng(0).standard_normal((1000, weight.shape[1]))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    chained = x = x.astype(np.float32)
    for w, b in layers:
        chained = chained @ w.T + b
    difference = float(np.abs(x @ one[0].T + one[1] - chained).max())
    if not difference <= _COLLAPSE_TOLERANCE:
        raise HeadError(f"the layers and the map made of them differ by {difference:.2g}")
    return one


def _linear_layer(data: bytes, what: str) -> Layer:
    """The one linear layer in a file: weight (1, d) and bias (1,), float32, called as those of one module are."""
    is_safetensors = data[8:9] == b"{"  # behind the length of a header, its first byte
    tensors = read_safetensors(data, what) if is_safetensors else read_pth(data, what)
    match sorted((list(value.shape), key) for key, value in tensors.items()):
        case [([1], bias), ([1, int(dim)], weight)] if dim >= 1 and weight.endswith("weight"):
            if weight.removesuffix("weight") == bias.removesuffix("bias"):
                _require_finite(tensors, what)
                return tensors[weight], tensors[bias]
    listed = ", ".join(f"{key} {list(value.shape)}" for key, value in list(tensors.items())[:12])
    raise HeadError(
        f"{what}: not a single linear layer, which is a weight [1, d] and a bias [1]; it holds {listed or 'no tensors'}"
    )


def _require_finite(tensors: dict[str, npt.NDArray[np.float32]], what: str) -> None:
    for key, value in tensors.items():
        if not np.isfinite(value).all():
            raise HeadError(f"{what}: {key} holds values that are not finite")


def _refuse_keras(path: Path, data: bytes, sha256: str) -> None:
    """HeadError where a file is a Keras model, which is a graph for TensorFlow to run and not a list of layers."""
    members: list[str] = []
    with contextlib.suppress(*NOT_A_ZIP), zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [n.rpartition("/")[2] for n in archive.namelist()]
    known = keras_files().get(sha256)
    if known or data.startswith(b"\x89HDF") or any(n in _KERAS_MEMBERS for n in members):
        raise HeadError(
            f"{path} is a Keras model{f', {known}' if known else ''}: a program for TensorFlow, which is not run here, "
            "and which can't be reproduced exactly without it. Instead: `tastemaker fit` on labels of your own, "
            "`tastemaker heads prompt` (zero-shot, from words), or the detector open-nsfw, which is built in."
        )
