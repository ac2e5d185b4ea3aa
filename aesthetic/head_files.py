"""A head's folder: written, and read without trust.

`head.safetensors` holds the weights (float32), `head.json` says everything else and is the authority on the weights'
names, shapes and sha256, `MODEL_CARD.md` is written from it for people. No file is a program, and a file that does not
agree with head.json is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aesthetic.errors import UserError
from aesthetic.files import write_atomic
from aesthetic.heads import HEAD_FORMAT, MAX_LAYERS, Head, HeadError
from aesthetic.model_card import model_card
from aesthetic.pth import from_bfloat16
from aesthetic.space import Space, SpaceError
from aesthetic.untrusted import parse_json, printable, read_bytes, read_json_file

_MAX_JSON = 4 << 20  # bytes of head.json
_MAX_WEIGHTS = 64 << 20  # bytes of head.safetensors; the largest head known (768-1024-128-64-16-1) has 3.7 MB
_MAX_HEADER = 64 << 10  # bytes of the header of head.safetensors; ours are below 2 KB
_MAX_DEPTH = 30  # of what a card may nest; ours nest four deep
_PROBES = "space.probes"
_FLOATS = {"F32": "<f4", "F16": "<f2"}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


Size = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class SpaceFields(_Strict):
    """The space that a head reads."""

    encoder: str
    dim: Size
    norm: str
    details: dict[str, Any]
    fingerprint: str
    probes: Size | None


class Digests(_Strict):
    """The sha256 of the other file."""

    weights: str = Field(alias="head.safetensors")


class HeadFields(_Strict):
    """What head.json says, but for its format."""

    name: str
    task: str
    scale: Annotated[list[Finite], Field(min_length=2, max_length=2)]
    space: SpaceFields
    layers: list[int]
    activation: Literal["relu"] | None
    link: str = "identity"
    card: dict[str, Any]
    sha256: Digests


def save_head(head: Head, folder: Path | str) -> Path:
    """Write a head as a folder; the same head gives the same bytes. Returns the folder.

    Each file appears whole or not at all; head.json comes after the weights, and names their sha256, so a writer that
    was killed in between leaves a head that is refused, never one that mixes two.
    """
    from safetensors.numpy import save

    folder, space = Path(folder), head.space
    tensors = {}
    for i, (weight, bias) in enumerate(head.layers):
        tensors[f"layers.{i}.weight"] = np.ascontiguousarray(weight)
        tensors[f"layers.{i}.bias"] = np.ascontiguousarray(bias)
    if space.probes is not None:
        tensors[_PROBES] = np.ascontiguousarray(space.probes, np.float32)
    weights = save(tensors)
    fields = {
        "format": HEAD_FORMAT,
        "name": head.name,
        "task": head.task,
        "scale": [float(v) for v in head.scale],
        "space": {
            "encoder": space.encoder,
            "dim": space.dim,
            "norm": space.norm,
            "details": space.details,
            "fingerprint": space.fingerprint,
            "probes": None if space.probes is None else len(space.probes),
        },
        "layers": [space.dim, *(len(bias) for _, bias in head.layers)],
        "activation": None if head.affine else "relu",
        **({} if head.link == "identity" else {"link": head.link}),
        "card": head.card,
        "sha256": {"head.safetensors": hashlib.sha256(weights).hexdigest()},
    }
    try:
        text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as e:
        raise HeadError(f"{head.name}: its card or space cannot be written as JSON: {e}") from e
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "head.safetensors", weights)
    write_atomic(folder / "head.json", text.encode())
    write_atomic(folder / "MODEL_CARD.md", model_card(head).encode())
    return folder


def read_head(folder: Path) -> Head:
    """Read a head's folder; raises HeadError where a file is missing, damaged, or not what head.json says."""
    path = folder / "head.json"
    fields = _fields(path)
    layers, dim = len(fields.layers) - 1, fields.space.dim
    one_or_relu = (fields.activation is not None) == (layers > 1)
    if not 1 <= layers <= MAX_LAYERS or min(fields.layers) < 1 or fields.layers[0] != dim or not one_or_relu:
        raise HeadError(
            f"{path}: layers {fields.layers} with activation {fields.activation} do not make a head for {dim} numbers"
        )

    expected: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        expected[f"layers.{i}.weight"] = (fields.layers[i + 1], fields.layers[i])
        expected[f"layers.{i}.bias"] = (fields.layers[i + 1],)
    if fields.space.probes is not None:
        expected[_PROBES] = (fields.space.probes, dim)
    weights = folder / "head.safetensors"
    try:
        data = read_bytes(weights, _MAX_WEIGHTS)
    except UserError as e:
        raise HeadError(str(e)) from e
    if hashlib.sha256(data).hexdigest() != fields.sha256.weights:
        raise HeadError(f"{weights} is not the file that head.json describes (sha256): written in part, or edited")
    tensors = read_safetensors(data, str(weights))
    if unknown := sorted(tensors.keys() ^ expected.keys()):
        raise HeadError(f"{weights}: tensors missing or unknown: {', '.join(unknown)}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise HeadError(f"{weights}: {name} is of shape {tensors[name].shape}, not {shape}")

    try:
        space = Space(
            encoder=fields.space.encoder,
            dim=dim,
            norm=fields.space.norm,
            probes=tensors.get(_PROBES),
            details=fields.space.details,
        )
    except SpaceError as e:
        raise HeadError(f"{path}: its space is not one: {e}") from e
    if space.fingerprint != fields.space.fingerprint:
        raise HeadError(
            f"{path}: its space is {space.fingerprint}, not {fields.space.fingerprint} as written: edited by hand?"
        )
    return Head(
        name=fields.name,
        task=fields.task,
        space=space,
        scale=(fields.scale[0], fields.scale[1]),
        layers=tuple((tensors[f"layers.{i}.weight"], tensors[f"layers.{i}.bias"]) for i in range(layers)),
        link=fields.link,
        card=fields.card,
    )


def read_safetensors(data: bytes, what: str, half: bool = False) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors in the bytes of a safetensors file, which must all be float32, or where `half` says so of half
    precision, as float32; raises HeadError, naming `what`."""
    from safetensors import SafetensorError, deserialize

    length = int.from_bytes(data[:8], "little")
    if len(data) >= 8 and length > min(_MAX_HEADER, len(data) - 8):
        raise HeadError(f"{what}: claims a header of {length:,} bytes")
    try:
        tensors = deserialize(data)
        parse_json(data[8 : 8 + length], f"{what}, header", unique=True)  # of two tensors of a name it takes the last
    except SafetensorError as e:
        raise HeadError(f"{what}: not a safetensors file that can be read: {str(e)[:200]}") from e
    except UserError as e:
        raise HeadError(str(e)) from e
    arrays = {}
    for name, tensor in tensors:
        kind, numbers = tensor["dtype"], tensor["data"]
        if kind != "F32" and not (half and kind in ("F16", "BF16")):
            raise HeadError(f"{what}: {printable(name, 100)} is {kind}, not float32")
        arrays[name] = from_bfloat16(numbers) if kind == "BF16" else np.frombuffer(numbers, _FLOATS[kind])
        arrays[name] = arrays[name].astype(np.float32).reshape(tensor["shape"])
    return arrays


def check_free(folder: Path) -> None:
    """Raise HeadError where a folder holds something else than a head, before one is written to it."""
    if folder.exists() and not folder.is_dir():
        raise HeadError(f"{folder} is a file; a head is a folder: give another name")
    others = sorted(os.listdir(folder)) if folder.is_dir() else []
    if not others:
        return
    try:
        fields = read_json_file(folder / "head.json", _MAX_JSON)
    except UserError:
        fields = None
    if not isinstance(fields, dict) or fields.get("format") != HEAD_FORMAT:
        raise HeadError(f"{folder} holds something else ({printable(others[0], 80)}): give a folder of its own")


def check_replaces(folder: Path, head: Head) -> None:
    """Raise HeadError where a folder holds another head, which `save_head` would write over; a damaged one is none."""
    if not os.path.exists(folder / "head.json"):
        return
    try:
        present = read_head(folder)
    except HeadError:
        return
    if present.digest != head.digest or present.card != json.loads(json.dumps(head.card)):
        raise HeadError(f"{folder} holds another head already: give another name, or remove that folder")


def _fields(path: Path) -> HeadFields:
    """What a head.json says, by its schema; raises HeadError naming the field that does not fit."""
    try:
        value = parse_json(read_bytes(path, _MAX_JSON), str(path), unique=True)
    except UserError as e:
        raise HeadError(str(e)) from e
    if not isinstance(value, dict):
        raise HeadError(f"{path}: not a JSON object")
    if value.get("format") != HEAD_FORMAT:
        other = printable(repr(value.get("format")), 60)
        raise HeadError(f"{path}: format is {other}; this version reads {HEAD_FORMAT!r}")
    try:
        fields = HeadFields.model_validate(value)
    except ValidationError as e:
        first = e.errors(include_url=False, include_context=False)[0]
        reason = printable(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", 300)
        raise HeadError(f"{path}: a field is missing or of the wrong type: {reason}") from e
    if _depth(fields.card) > _MAX_DEPTH or _depth(fields.space.details) > _MAX_DEPTH:
        raise HeadError(f"{path}: its card or space is nested more than {_MAX_DEPTH} deep")
    return fields


def _depth(value: Any) -> int:
    """How deep lists and objects of a JSON value are nested."""
    level, depth = [value], 0
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        level = [w for v in level for w in (v.values() if isinstance(v, dict) else v)]
    return depth
