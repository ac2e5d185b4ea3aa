"""Heads that others trained and published, imported without running anything that is in their files.

A `.pth` is a zip with a pickle, and a pickle is a program: it is first scanned for anything but tensors, and read by an
unpickler that knows four names, without torch. A file whose sha256 is one of those below must hold the architecture
that was published, and is collapsed to one affine map where its layers have no non-linearity between them (LAION's v2
"MLP" has none: 927,969 numbers say what 769 say). Of other files a single linear layer is taken, where whoever imports
it says which encoder's vectors it reads: the file does not know.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import math
import os
import pickle
import pickletools
import re
import struct
import urllib.request
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aesthetic.errors import UserError
from aesthetic.heads import Head, HeadError, Layer, safetensors_header, unpack
from aesthetic.space import Space
from aesthetic.untrusted import read_bytes

_MAX_FILE = 16 << 20  # bytes of a .pth; the largest published one has 3.7 MB
_MAX_UNPACKED = 64 << 20  # bytes of what is in it
_MAX_PICKLE = 64 << 10  # bytes of data.pkl; the published ones have 1.3 KB
_TIMEOUT = 30.0  # seconds without a byte from the server
_KERAS_FILES = ("saved_model.pb", "keras_metadata.pb", "model.weights.h5")
_NO_ZIP = (
    *(zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError, OSError, OverflowError, KeyError),
    struct.error,
)
_NO_PICKLE = (
    *(pickle.UnpicklingError, TypeError, ValueError, AttributeError, KeyError, IndexError, EOFError, MemoryError),
    *(RecursionError, OverflowError, ImportError),
)
_COLLAPSE_TOLERANCE = 1e-5  # largest difference between the layers and the one map made of them, on unit vectors

_V1 = "https://github.com/LAION-AI/aesthetic-predictor/raw/main/"
_V2 = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published file and what is known of it. `layers` are the prefixes of its linear layers, in order."""

    name: str
    url: str
    sha256: str
    encoder: str
    sizes: tuple[int, ...]
    layers: tuple[str, ...]
    relu: bool
    scale: tuple[float, float]
    card: dict[str, Any]

    @property
    def file(self) -> str:
        """The file's name as published."""
        return self.url.rpartition("/")[2].replace("%2B", "+")

    @property
    def by_hand(self) -> str:
        """What to do to have it here."""
        return f"Download {self.url} and run: tastemaker heads import {self.file}"


_L14 = "open_clip:ViT-L-14-quickgelu/openai"
_B32 = "open_clip:ViT-B-32-quickgelu/openai"
_B16 = "open_clip:ViT-B-16-quickgelu/openai"

_V1_LIMITS = [
    "Scores are not on the scale of the v2 heads: a threshold means nothing without the head's name.",
    "Input must have unit norm, which the original README leaves out; without it scores of 20 to 30 come out.",
    "Scores leave the nominal scale: the publisher's ten example vectors of ViT-L/14 score -2.5 to 11.3.",
]
_V2_LIMITS = [
    "Not on the scale of the v1 heads, nor of the other v2 heads: a threshold means nothing without the head's name.",
    "The scale of 1 to 10 is that of the ratings; scores stay well inside it.",
    "The encoder needs QuickGELU: with plain GELU one image was seen to move from 5.05 to 4.03 without any error.",
]
_V2_DATA = {
    "SAC": "Simulacra Aesthetic Captions, ratings 1-10 of generated images",
    "LAION-logos": "ratings of logos",
    "AVA": "ratings 1-10 of photographs (dpchallenge.com)",
}


def _v1(name: str, file: str, sha256: str, encoder: str, dim: int, more: dict[str, Any]) -> Published:
    return Published(
        name=name,
        url=_V1 + file,
        sha256=sha256,
        encoder=encoder,
        sizes=(dim, 1),
        layers=("",),
        relu=False,
        scale=(0.0, 10.0),
        card={
            "about": "LAION's aesthetic predictor, version 1: a linear head on OpenAI's CLIP.",
            "licence": "MIT",
            "source": f"{_V1}{file}, sha256 {sha256}; LAION-AI/aesthetic-predictor; converted, values unchanged",
            "data": "about 4,000 ratings 0-10 of generated images (SAC bot)",
            "limits": _V1_LIMITS,
            **more,
        },
    )


def _v2(name: str, file: str, sha256: str, relu: bool, layers: tuple[int, ...], more: dict[str, Any]) -> Published:
    url = _V2 + file.replace("+", "%2B")
    how = "a network with ReLU" if relu else "published as five layers without activation, which are one affine map"
    done = "converted, values unchanged" if relu else "converted: the five layers multiplied out in float64"
    return Published(
        name=name,
        url=url,
        sha256=sha256,
        encoder=_L14,
        sizes=(768, 1024, 128, 64, 16, 1),
        layers=tuple(f"layers.{i}." for i in layers),
        relu=relu,
        scale=(1.0, 10.0),
        card={
            "about": f"LAION's improved aesthetic predictor (version 2) on OpenAI's CLIP ViT-L/14: {how}.",
            "licence": "Apache-2.0",
            "source": f"{url}, sha256 {sha256}; christophschuhmann/improved-aesthetic-predictor; {done}",
            "limits": _V2_LIMITS,
            **more,
        },
    )


_AVA_LOGOS = {k: _V2_DATA[k] for k in ("AVA", "LAION-logos")}

PUBLISHED: tuple[Published, ...] = (
    _v1(
        "laion-v1-l14",
        "sa_0_4_vit_l_14_linear.pth",
        "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
        _L14,
        768,
        {
            # shares of LAION's own histogram of laion2B-en (2.17 billion scores in whole bins), linear within a bin
            "quantiles": {
                "of": "laion2B-en, from the published histogram in bins of one",
                "1%": 1.74,
                "10%": 3.1,
                "50%": 4.76,
                "90%": 6.4,
                "99%": 7.64,
            },
            "thresholds": {
                "> 7": "LAION-Aesthetics V1: 120 million images (52 M English), pwatermark < 0.8 and punsafe < 0.5",
                "> 8": "laion-art: 8 million images, same conditions",
            },
        },
    ),
    _v1(
        "laion-v1-b32",
        "sa_0_4_vit_b_32_linear.pth",
        "c7b14cead230694acc7b9447974d3cad78003c72da032e402a303b6c2429e85f",
        _B32,
        512,
        {},
    ),
    _v1(
        "laion-v1-b16",
        "sa_0_4_vit_b_16_linear.pth",
        "8ad3923d7ecf019df20ecd2ab5542a3075fbba0278d239c0371345f3d7fcbde0",
        _B16,
        512,
        {},
    ),
    _v2(
        "laion-v2",
        "sac+logos+ava1-l14-linearMSE.pth",
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        False,
        (0, 2, 4, 6, 7),
        {
            "data": _V2_DATA,
            "metrics": {
                "AVA": "Spearman 0.665, Pearson 0.666 as IQA-PyTorch measures it; optimistic, because most of those "
                "images were probably in its training set. About as good as the mean of three human votes.",
            },
            # LAION-Aesthetics V2 is English only: its sizes as shares of laion2B-en, 2.32 billion images
            "quantiles": {
                "of": "laion2B-en, from the published sizes of the subsets",
                "48%": 4.5,
                "60%": 4.75,
                "74%": 5.0,
                "99.5%": 6.0,
                "99.87%": 6.25,
                "99.97%": 6.5,
            },
            "thresholds": {
                ">= 4.5": "LAION-Aesthetics V2 4.5+, 1.2 billion images; Stable Diffusion 2 base",
                ">= 4.75": "939 million",
                ">= 5": "600 million; Stable Diffusion 1.2 to 1.5 (> 5.0)",
                ">= 6": "12 million",
                ">= 6.25": "3 million",
                ">= 6.5": "625,000",
            },
        },
    ),
    _v2(
        "laion-v2-ava-logos",
        "ava+logos-l14-linearMSE.pth",
        "390a3aafaf3b37d57148f9b22f30556de38343064b7d915acfa80d3812b4c9ff",
        False,
        (0, 2, 4, 6, 7),
        {"data": _AVA_LOGOS},
    ),
    _v2(
        "laion-v2-relu",
        "ava+logos-l14-reluMSE.pth",
        "0af3254c651d55b7ea851429c20f26ec880bb0169805a4df85b814bd7966f3e4",
        True,
        (0, 3, 6, 9, 11),
        {"data": _AVA_LOGOS},
    ),
)


KERAS = {
    "905520bb0336accc73ee282c605d926aef90cf14248889d44b9cee50eef71f8a": "LAION's CLIP NSFW head on ViT-L/14",
    "78715ab9d64485167e8c9ade3b8e6761a17a16c24d114bd47431ac1dab46462b": "LAION's CLIP NSFW head on ViT-B/32",
}
"""Published files that are Keras models, by sha256: known, and refused."""

_SAC = "sac_public_2022_06_29_vit_{}_linear.pth"
_DECLARE = {_SAC.format("l_14"): _L14, _SAC.format("b_32"): _B32, _SAC.format("b_16"): _B16}
"""Crowson and Pressman's ridge heads (simulacra-aesthetic-models) by file name: which encoder each reads. No digest of
theirs was published, so a name is good for a hint only."""

NORMS = ("l2", "l2_sqrt_d")


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
    data = _read(path)
    sha256 = hashlib.sha256(data).hexdigest()
    _refuse_keras(path, data, sha256)
    known = next((p for p in PUBLISHED if p.sha256 == sha256), None)
    if known is not None:
        if encoder is not None or scale is not None or norm != "l2":
            raise HeadError(f"{path} is {known.name}, a published head: its encoder, norm and scale are known")
        return _build(known, read_checkpoint(data, str(path)), name or known.name)
    if encoder is None:
        raise HeadError(
            f"{path} is none of the published heads (its sha256 is {sha256}). Known files: "
            f"{', '.join(p.file for p in PUBLISHED)}; a page saved from a browser is a common cause. If it is a single "
            "linear layer and you know which vectors it reads, say so: tastemaker heads import "
            f"{path} {_how_to_declare(path)}"
        )
    return _declared(path, data, sha256, name or path.stem, encoder, norm, scale, task)


def _how_to_declare(path: Path) -> str:
    if path.name in _DECLARE:
        return f"--encoder {_DECLARE[path.name]} --norm l2_sqrt_d --scale 1 10"
    return (
        f"--encoder ENCODER --norm l2 --scale LO HI (ENCODER such as {_L14}; --norm l2_sqrt_d where it was fitted to "
        "vectors of norm sqrt(d))"
    )


def _declared(
    path: Path,
    data: bytes,
    sha256: str,
    name: str,
    encoder: str,
    norm: str,
    scale: tuple[float, float] | None,
    task: str,
) -> Head:
    """The head in a file of one linear layer, of which the encoder, norm and scale are what somebody says they are."""
    if norm not in NORMS:
        raise HeadError(f"{path}: the norm is {norm!r}; it is one of {', '.join(NORMS)}")
    if scale is None:
        raise HeadError(f"{path}: on which scale are its ratings? --scale LO HI, such as --scale 1 10")
    if any(name == p.name for p in PUBLISHED):
        raise HeadError(f"{path}: {name} is the name of a published head, and this is another file: rename it")
    weight, bias = _linear(data, str(path))
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


def _linear(data: bytes, what: str) -> Layer:
    """The one linear layer in a file: weight (1, d) and bias (1,), float32."""
    if data[8:9] == b"{":  # safetensors: the length of a header, and the header
        header, _ = safetensors_header(data, what)
        claimed = {key: entry.get("shape") if isinstance(entry, dict) else None for key, entry in header.items()}
        weight, bias, dim = _names_of_linear(claimed, what)
        tensors = unpack(data, what, {weight: (1, dim), bias: (1,)})
    else:
        tensors = read_checkpoint(data, what)
        weight, bias, _ = _names_of_linear({key: list(value.shape) for key, value in tensors.items()}, what)
    _require_finite(tensors, what)
    return tensors[weight], tensors[bias]


def _names_of_linear(shapes: dict[str, Any], what: str) -> tuple[str, str, int]:
    """(name of the weight, name of the bias, d) where shapes by name are those of one linear layer."""
    match sorted(shapes.items()):
        case [(bias, [1]), (weight, [1, int(dim)])] if dim >= 1 and _twins(weight, bias):
            return weight, bias, dim
    told = ", ".join(f"{key} {shape}" for key, shape in list(shapes.items())[:12])
    raise HeadError(
        f"{what}: not a single linear layer, which is a weight [1, d] and a bias [1]; it holds {told or 'no tensors'}"
    )


def _twins(weight: str, bias: str) -> bool:
    """Whether two tensors are called as those of one module are."""
    return weight.endswith("weight") and weight.removesuffix("weight") == bias.removesuffix("bias")


def _require_finite(tensors: dict[str, npt.NDArray[np.float32]], what: str) -> None:
    for key, value in tensors.items():
        if not np.isfinite(value).all():
            raise HeadError(f"{what}: {key} holds values that are not finite")


def _refuse_keras(path: Path, data: bytes, sha256: str) -> None:
    """HeadError where a file is a Keras model, which is a graph for TensorFlow to run and not a list of layers."""
    names: list[str] = []
    with contextlib.suppress(*_NO_ZIP), zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [n.rpartition("/")[2] for n in archive.namelist()]
    if sha256 in KERAS or data.startswith(b"\x89HDF") or any(n in _KERAS_FILES for n in names):
        which = f", {KERAS[sha256]}" if sha256 in KERAS else ""
        raise HeadError(
            f"{path} is a Keras model{which}: a program for TensorFlow, which is not run here, and which can't be "
            "reproduced exactly without it. Instead: `tastemaker fit` on labels of your own, `tastemaker heads prompt` "
            "(zero-shot, from words), or the detector open-nsfw, which is built in."
        )


def fetch_head(name: str) -> Head:
    """A published head by its name, from its publisher; only a file with the known sha256 is taken.

    Raises HeadError, with the address and what to do by hand, where it can't be had.
    """
    known = next((p for p in PUBLISHED if p.name == name), None)
    if known is None:
        raise HeadError(f"{name} is no file here, and no published head. Known: {', '.join(p.name for p in PUBLISHED)}")
    return _build(known, read_checkpoint(_download(known), known.url), name)


def how_to_get(name: str) -> str | None:
    """What to do to have a published head of this name here; None where no head of that name was published."""
    return next((p.by_hand for p in PUBLISHED if p.name == name), None)


def _download(known: Published) -> bytes:
    try:
        with urllib.request.urlopen(known.url, timeout=_TIMEOUT) as response:
            data = response.read(_MAX_FILE + 1)
    except (OSError, http.client.HTTPException) as e:
        raise HeadError(f"{known.name} could not be fetched ({e}). {known.by_hand}") from e
    if hashlib.sha256(data).hexdigest() != known.sha256:
        raise HeadError(
            f"{known.url} gave {len(data):,} bytes that are not the published file (sha256 {known.sha256}): refused"
        )
    return data


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, _MAX_FILE)
    except UserError as e:
        raise HeadError(str(e)) from e


def _build(known: Published, tensors: dict[str, npt.NDArray[np.float32]], name: str) -> Head:
    """The head in a checkpoint that must have exactly the published tensors."""
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


# Reading a checkpoint without torch, and without running it ----------------------------------------------------------

_ENTRY = re.compile(
    r"[^/]+/(data\.pkl|version|byteorder|data/\d{1,4}|\.format_version|\.storage_alignment|\.data/serialization_id)"
)

_OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE",
    "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINUNICODE", "SHORT_BINUNICODE", "BINPUT", "LONG_BINPUT",
    "BINGET", "LONG_BINGET", "MEMOIZE", "GLOBAL", "BINPERSID", "REDUCE", "BUILD", "SETITEM", "SETITEMS",
}  # fmt: skip
"""What torch.save writes for an OrderedDict of tensors. STACK_GLOBAL, INST, OBJ, NEWOBJ and EXT are left out:
with GLOBAL alone, every name that a pickle asks for stands in plain text."""

_STORAGES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "BFloat16Storage": "bfloat16"}
_GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"} | {f"torch {s}" for s in _STORAGES}


@dataclass(frozen=True)
class _Storage:
    key: str
    kind: str
    length: int  # numbers in it


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]


def read_checkpoint(data: bytes, what: str) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors of a `.pth` file (torch's zip format) as float32, by name; runs nothing that the file asks for.

    Reads an OrderedDict of contiguous float tensors and refuses everything else: raises HeadError, naming `what`.
    """
    if len(data) > _MAX_FILE:
        raise HeadError(f"{what}: more than {_MAX_FILE:,} bytes")
    members = _members(data, what)
    program = members.get("data.pkl", b"")
    _scan(program, what)
    try:
        loaded = _Restricted(io.BytesIO(program)).load()
    except HeadError as e:
        raise HeadError(f"{what}: {e}") from e
    except _NO_PICKLE as e:
        raise HeadError(f"{what}: its pickle does not hold a state dict: {type(e).__name__} {e}") from e
    if not isinstance(loaded, OrderedDict) or not all(
        isinstance(k, str) and isinstance(v, _Tensor)
        for k, v in dict.items(loaded)  # BUILD may hide its own `items`
    ):
        raise HeadError(f"{what}: not a state dict (an OrderedDict of tensors)")
    return {key: _materialise(tensor, members, f"{what}: {key}") for key, tensor in dict.items(loaded)}


def _members(data: bytes, what: str) -> dict[str, bytes]:
    """The zip's members without their common folder, once the zip is found to be what torch.save writes."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            names = [e.filename for e in entries]
            if odd := [n for n in names if not _ENTRY.fullmatch(n)]:
                raise HeadError(f"{what}: {odd[0]!r} does not belong in a checkpoint")
            if len(set(names)) != len(names) or len({n.partition("/")[0] for n in names}) != 1:
                raise HeadError(f"{what}: not one checkpoint: a name occurs twice, or there are several folders")
            if any(e.compress_type != zipfile.ZIP_STORED or e.flag_bits & 1 for e in entries):
                raise HeadError(f"{what}: compressed or encrypted; torch.save does neither")
            if sum(e.file_size for e in entries) > _MAX_UNPACKED:
                raise HeadError(f"{what}: more than {_MAX_UNPACKED:,} bytes unpacked")
            members = {e.filename.partition("/")[2]: archive.read(e) for e in entries}
    except _NO_ZIP as e:
        raise HeadError(f"{what}: not a whole checkpoint in torch's zip format: {e}") from e
    if "data.pkl" not in members:
        raise HeadError(f"{what}: a zip without data.pkl, not a checkpoint")
    if members.get("byteorder", b"little") != b"little":
        raise HeadError(f"{what}: not little-endian")
    return members


def _scan(program: bytes, what: str) -> None:
    """Refuse a pickle that uses more than a state dict needs. Reads the opcodes, executes none."""
    if len(program) > _MAX_PICKLE:
        raise HeadError(f"{what}: a pickle of {len(program):,} bytes; a state dict of a head needs a few thousand")
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name not in _OPCODES:
                raise HeadError(f"{what}: its pickle uses {opcode.name}, which no state dict needs: refused")
            if opcode.name == "GLOBAL" and argument not in _GLOBALS:
                raise HeadError(
                    f"{what}: its pickle asks for {str(argument).replace(' ', '.')}: refused, nothing was run"
                )
            if opcode.name.endswith("BINPUT") and isinstance(argument, int) and argument > len(program):
                raise HeadError(f"{what}: its pickle counts {argument:,} things, which would take all memory: refused")
    except (ValueError, OverflowError, MemoryError) as e:
        raise HeadError(f"{what}: its pickle is damaged: {e}") from e


class _Restricted(pickle.Unpickler):
    """Knows the few names of a state dict of tensors; a tensor becomes a note of where its numbers lie."""

    def find_class(self, module: str, name: str) -> Callable[..., Any] | str:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _note_tensor
        if module == "torch" and name in _STORAGES:
            return name
        raise HeadError(f"its pickle asks for {module}.{name}: refused, nothing was run")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", str(kind), str(key), str(), int(length)) if kind in _STORAGES:
                return _Storage(key, kind, length)
        raise HeadError("its pickle refers to something that is no storage")


def _note_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> _Tensor:
    """Stands for torch._utils._rebuild_tensor_v2: a contiguous tensor, its hooks empty."""
    numbers = isinstance(offset, int) and all(isinstance(v, int) and v >= 1 for v in shape)
    if not isinstance(storage, _Storage) or not numbers or any(rest[1:]):
        raise HeadError("a tensor is not described as torch.save does")
    contiguous = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if tuple(stride) != contiguous:
        raise HeadError(f"a tensor of shape {shape} has strides {stride}: not contiguous")
    if not 0 <= offset <= offset + math.prod(shape) <= storage.length:
        raise HeadError(f"a tensor of shape {shape} reaches beyond its storage of {storage.length} numbers")
    return _Tensor(storage, offset, tuple(shape))


def _materialise(tensor: _Tensor, members: dict[str, bytes], what: str) -> npt.NDArray[np.float32]:
    data = members.get(f"data/{tensor.storage.key}")
    dtype = _STORAGES[tensor.storage.kind]
    width = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
    if data is None or len(data) != width * tensor.storage.length:
        raise HeadError(
            f"{what}: its storage {tensor.storage.key!r} is missing or not {tensor.storage.length} numbers long"
        )
    count = math.prod(tensor.shape)
    if dtype == "bfloat16":  # the upper half of a float32
        halves = np.frombuffer(data, "<u2", count, width * tensor.offset)
        values = (halves.astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(data, dtype, count, width * tensor.offset).astype(np.float32)
    return values.reshape(tensor.shape)
