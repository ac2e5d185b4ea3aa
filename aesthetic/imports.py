"""Heads of others, imported from files of weights or from their publisher, without running anything in the files.

A file whose sha256 is known must hold the architecture that was published, and is collapsed to one affine map where its
layers have no non-linearity between them (LAION's v2 "MLP" has none: 927,969 numbers say what 769 say). Of other files
linear layers are taken, where whoever imports them says which encoder's vectors they read, and, of several, whether
ReLU stands between them: the file knows neither.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import math
import os
import re
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
ACTIVATIONS = ("none", "relu")

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
    activation: str | None = None,
    task: str = "aesthetic",
) -> Head:
    """A head from a file of weights; `save_head` then writes it, and that file is not needed again.

    A published head is known by its sha256, whatever the file is called, and takes no more than `path` and `name`. Any
    other file (torch's zip format, or safetensors) must hold linear layers alone, weights of shape (out, in) and biases
    of shape (out,), the last with out = 1, and be declared: `encoder` by its canonical name, the `scale` of its
    ratings, the `norm` of the vectors it was fitted to, and, where there are several layers, the `activation` between
    them. "l2" are unit vectors; "l2_sqrt_d" are unit vectors times the square root of d, a factor that is multiplied
    into the first weight, so that the head reads unit vectors too. Layers without activation ("none": nothing stands
    between them, or dropout, which does nothing once a head is trained) are one affine map, and become one.

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
        if encoder is not None or scale is not None or norm != "l2" or activation is not None:
            raise HeadError(f"{path} is {known.name}, a published head: its encoder, norm, scale and layers are known")
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
            f"{', '.join(p.file for p in published_heads())}; a page saved from a browser is a common cause. If it "
            f"holds linear layers and you know which vectors they read, say so: tastemaker heads import {path} "
            f"{options}"
        )
    if norm not in NORMS:
        raise HeadError(f"{path}: the norm is {norm!r}; it is one of {', '.join(NORMS)}")
    if activation not in (None, *ACTIVATIONS):
        raise HeadError(f"{path}: the activation is {activation!r}; it is one of {', '.join(ACTIVATIONS)}")
    if scale is None:
        raise HeadError(f"{path}: on which scale are its ratings? --scale LO HI, such as --scale 1 10")
    if any(name == p.name for p in published_heads()):
        raise HeadError(f"{path}: {name} is the name of a published head, and this is another file: rename it")

    layers = _linear_layers(data, str(path))
    done = "values unchanged"
    if len(layers) > 1:
        if activation is None:
            raise HeadError(
                f"{path} holds {len(layers)} linear layers ({_sizes(layers)}), and no file of weights says what stands "
                "between them. Its publisher's code does: --activation none where there is nothing or dropout (the "
                "layers are one affine map then, and become one), --activation relu where ReLU follows each but the "
                "last. With anything else, or a sigmoid at the end, it can't be imported."
            )
        if activation == "none":
            done = f"its {len(layers)} layers ({_sizes(layers)}) multiplied out in float64, declared without activation"
        else:
            done = f"values unchanged, {len(layers)} layers ({_sizes(layers)}) with ReLU between them as declared"
    if norm == "l2_sqrt_d":
        (weight, bias), *rest = layers
        layers = ((weight * math.sqrt(weight.shape[1])).astype(np.float32), bias), *rest
        done += (
            "; its first weight multiplied by sqrt(d): it was fitted to vectors of that norm, and reads unit vectors"
        )
    if activation != "relu":
        layers = (collapse(layers),)
    about = "A linear head" if len(layers) == 1 else f"A network of {len(layers)} layers with ReLU"
    return Head(
        name=name,
        task=task,
        space=Space(encoder=encoder, dim=layers[0][0].shape[1], norm="l2"),
        scale=scale,
        layers=layers,
        card={
            "about": f"{about} from the file {path.name}.",
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
        raise HeadError(f"{known.name} could not be fetched ({e}): {known.by_hand}") from e
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

    Raises HeadError where, in float32, it differs from the chain by more than 1e-5 on 1,000 random unit vectors.
    """
    weight, bias = layers[0][0].astype(np.float64), layers[0][1].astype(np.float64)
    for w, b in layers[1:]:
        weight, bias = w @ weight, w @ bias + b
    one = weight.astype(np.float32), bias.astype(np.float32)
    x = np.random.default_rng(0).standard_normal((1000, weight.shape[1]))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    chained = x
    for w, b in layers:
        chained = chained @ w.T.astype(np.float64) + b
    difference = float(np.abs(x @ one[0].T + one[1] - chained).max())
    if not difference <= _COLLAPSE_TOLERANCE:
        raise HeadError(f"the layers and the map made of them differ by {difference:.2g}")
    return one


def _linear_layers(data: bytes, what: str) -> tuple[Layer, ...]:
    """The linear layers in a file that holds nothing else, in order: weight (out, in) and bias (out,), float32, called
    as those of one module are, each taking what the one before gives, the last giving one number."""
    is_safetensors = data[8:9] == b"{"  # behind the length of a header, its first byte
    tensors = read_safetensors(data, what, half=True) if is_safetensors else read_pth(data, what)
    listed = ", ".join(f"{key} {list(value.shape)}" for key, value in list(tensors.items())[:12])
    modules = [key.removesuffix("weight") for key in tensors if key.endswith("weight")]
    layers = {m: (tensors[f"{m}weight"], tensors[f"{m}bias"]) for m in modules if f"{m}bias" in tensors}
    if (
        not layers
        or 2 * len(layers) != len(tensors)
        or any(w.ndim != 2 or b.ndim != 1 or not w.size for w, b in layers.values())
    ):
        raise HeadError(
            f"{what}: not linear layers alone, each a weight [out, in] and a bias [out]; it holds "
            f"{listed or 'no tensors'}"
        )
    _require_finite(tensors, what)
    # a Sequential numbers its modules; others are saved by torch as they are defined
    for order in (sorted(layers, key=_number), list(layers)):
        found = tuple(layers[module] for module in order)
        if _is_chain(found):
            break
    else:
        raise HeadError(
            f"{what}: not linear layers of which each takes what the one before gives, and the last gives one number; "
            f"it holds {listed}"
        )
    called: dict[tuple[int, ...], str] = {}
    for module, (weight, _) in layers.items():
        if called.setdefault(weight.shape, unnumbered := re.sub(r"\d+", "#", module)) != unnumbered:
            raise HeadError(f"{what}: layers of one shape whose names don't say which comes first; it holds {listed}")
    return found


def _number(module: str) -> list[tuple[int, str]]:
    """Sorts layers.10. behind layers.9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", module)]


def _is_chain(layers: tuple[Layer, ...]) -> bool:
    outputs = [weight.shape[0] for weight, _ in layers]
    fits = all(bias.shape == weight.shape[:1] for weight, bias in layers)
    return fits and outputs[-1] == 1 and outputs[:-1] == [weight.shape[1] for weight, _ in layers[1:]]


def _sizes(layers: tuple[Layer, ...]) -> str:
    return "-".join(str(n) for n in (layers[0][0].shape[1], *(len(bias) for _, bias in layers)))


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
