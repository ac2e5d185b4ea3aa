"""Files of a model's weights before any weight is read: which files hold them, what their headers say."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from aesthetic.errors import UserError
from aesthetic.untrusted import open_regular, parse_json, printable, read_json_file

if TYPE_CHECKING:
    import numpy.typing as npt

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
_WEIGHTS = tuple(stem + end for end in _ENDS for stem in _STEMS)
"""Names of weights as diffusers and transformers look for them, those they prefer first."""

_VARIANTS = re.compile(
    rf"(?:{'|'.join(_STEMS)})"
    r"(?:\.(?P<one>\w+)\.(?:safetensors|bin)|\.(?:safetensors|bin)\.index\.(?P<many>(?!json)\w+)\.json)"
)
"""Names of weights of which a folder may hold several precisions: model.fp16.safetensors."""


def weight_files(part: Path) -> list[Path]:
    """The files of weights of one part, as diffusers chooses them: none where there are none, or not all.

    Those of a variant, such as model.fp16.safetensors, where there are no others.
    """
    variant = weight_variant(part)
    for name in _WEIGHTS:
        stem, dot, end = name.rpartition(".")
        path = part / (name if variant is None else f"{stem}.{variant}{dot}{end}")
        if not path.is_file():
            continue
        if ".index." not in name:
            return [path]
        content = read_json_file(path)
        names = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise UserError(f"{path}: no index of files of weights that lie beside it")
        files = [part / name for name in sorted(set(names.values()))]
        return files if all(f.is_file() for f in files) else []
    return []


def weight_variant(part: Path) -> str | None:
    """The variant by which diffusers finds the weights of a part, fp16 where there are several; None: without one."""
    if any((part / name).is_file() for name in _WEIGHTS):
        return None
    found = [m["one"] or m["many"] for p in part.iterdir() if (m := _VARIANTS.fullmatch(p.name))]
    return min(found, key=lambda name: (name != "fp16", name != "bf16", name), default=None)


def weights_header(part: Path) -> WeightsHeader | None:
    """Names and shapes of the weights of a part; None where they are not in safetensors, which alone have headers."""
    files = weight_files(part)
    if not files or any(file.suffix != ".safetensors" for file in files):
        return None
    return WeightsHeader({name: t for file in files for name, t in read_header(file).tensors.items()}, {})


# -------------------------------------------------------------------------------------------- headers of safetensors

LARGEST_HEADER = 100_000_000
"""Bytes that a header may have: the format's own limit."""

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is in a file, and what it is."""

    kind: str  # F32, F16, BF16, ...
    shape: list[int]
    begin: int  # bytes from the file's beginning
    end: int


@dataclass(frozen=True)
class WeightsHeader:
    """What a safetensors file says of itself."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_header(path: Path) -> WeightsHeader:
    """The header of a safetensors file, checked against the file's size. Raises UserError where it can't be true."""
    with open_regular(path) as f:
        size = os.fstat(f.fileno()).st_size
        begin = f.read(100)
        length = int.from_bytes(begin[:8], "little")
        if b"git-lfs" in begin:
            raise UserError(f"{path} is a pointer of Git LFS, not the weights: `git lfs pull` fetches them")
        if size < 8 or length > min(LARGEST_HEADER, size - 8):
            raise UserError(f"{path} is no safetensors file, or a damaged one")
        f.seek(8)
        data = f.read(length)
    header = parse_json(data, f"{path}, its header")
    if not isinstance(header, dict):
        raise UserError(f"{path} is no safetensors file, or a damaged one: its header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        metadata = {}
    tensors = {}
    for name, entry in header.items():
        try:
            kind, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (*shape, first, last)) and len(shape) <= 16
            whole = whole and (last - first) * 8 == math.prod(shape) * _BITS[kind]
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise UserError(f"{path} is damaged: its header says of {printable(name, 80)} what can't be")
        tensors[name] = TensorEntry(kind, list(shape), 8 + length + first, 8 + length + last)
    end = max((t.end for t in tensors.values()), default=8 + length)
    if end > size:
        raise UserError(f"{path} is cut: it has {size:,} bytes, and its tensors end at {end:,}. Fetch it again.")
    return WeightsHeader(tensors, {str(k): str(v) for k, v in metadata.items()})


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git keeps in place of a large one."""
    with open_regular(path) as f:
        return f.read(40).startswith(b"version https://git-lfs")


_DTYPES = {
    "F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
}  # fmt: skip


def read_tensor(file: IO[bytes], entry: TensorEntry) -> npt.NDArray[Any] | None:
    """The numbers of a tensor in an open file, flat, BF16 as float32; None for what numpy has no type for."""
    import numpy as np

    file.seek(entry.begin)
    data = file.read(entry.end - entry.begin)
    if entry.kind == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, _DTYPES[entry.kind]) if entry.kind in _DTYPES else None


def not_numbers(path: Path, tensors: Mapping[str, TensorEntry]) -> Iterator[str]:
    """Names of the tensors of a file that hold NaN or infinity. Reads all of them."""
    import numpy as np

    with open_regular(path) as f:
        for name, entry in tensors.items():
            if entry.kind in ("F16", "BF16", "F32", "F64"):
                values = read_tensor(f, entry)
                if values is not None and not np.isfinite(values).all():
                    yield name
