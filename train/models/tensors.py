"""What files of weights hold, told by the headers of safetensors before any number is read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aesthetic.errors import UserError
from aesthetic.untrusted import open_regular, parse_json, printable

LARGEST_HEADER = 100_000_000
"""Bytes that a header may have: the format's own limit."""

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is in a file, and what it is."""

    kind: str  # F32, F16, BF16, ...
    shape: list[int]
    begin: int  # bytes from the file's beginning
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Name -> shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def read_header(path: Path) -> Header:
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
    tensors = {name: _tensor(path, name, told, 8 + length) for name, told in header.items()}
    end = max((t.end for t in tensors.values()), default=8 + length)
    if end > size:
        raise UserError(f"{path} is cut: it has {size:,} bytes, and its tensors end at {end:,}. Fetch it again.")
    return Header(tensors, {str(k): str(v) for k, v in metadata.items()})


def _tensor(path: Path, name: str, told: Any, offset: int) -> Tensor:
    try:
        kind, shape, (begin, end) = told["dtype"], told["shape"], told["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and len(shape) <= 16
        if whole and (end - begin) * 8 == math.prod(shape) * _BITS[kind]:
            return Tensor(kind, list(shape), offset + begin, offset + end)
    except (KeyError, TypeError, ValueError):
        pass
    raise UserError(f"{path} is damaged: its header says of {printable(name, 80)} what can't be")


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git keeps in place of a large one."""
    with open_regular(path) as f:
        return f.read(40).startswith(b"version https://git-lfs")


def not_numbers(path: Path, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Names of the tensors of a file that hold NaN or infinity. Reads all of them."""
    import numpy as np

    exponents = {"F16": 0x7C00, "BF16": 0x7F80}  # all bits of the exponent set: NaN, or infinite
    with open_regular(path) as f:
        for name, tensor in tensors.items():
            if tensor.kind not in ("F16", "BF16", "F32", "F64"):
                continue
            f.seek(tensor.begin)
            data = f.read(tensor.end - tensor.begin)
            if mask := exponents.get(tensor.kind):
                bad = (np.frombuffer(data, "<u2") & mask) == mask
            else:
                bad = ~np.isfinite(np.frombuffer(data, "<f4" if tensor.kind == "F32" else "<f8"))
            if bad.any():
                yield name
