"""Tensors of a `.pth` file, read without torch and without running what is in it.

A `.pth` is a zip with a pickle, and a pickle is a program. Its opcodes are scanned for anything but a state dict of
tensors before an unpickler that knows four names reads it. That refuses more than `torch.load(weights_only=True)`: of
36 spoilt files of tests/test_published.py torch 2.15 loads eight, among them a tensor of a trillion numbers with
strides of 0, big-endian numbers read as little-endian, and a zip with other files in it.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aesthetic.heads import HeadError

MAX_FILE = 16 << 20  # bytes of a .pth; the largest published one has 3.7 MB
_MAX_UNPACKED = 64 << 20  # bytes of what is in it
_MAX_PICKLE = 64 << 10  # bytes of data.pkl; the published ones have 1.3 KB
NOT_A_ZIP = (
    *(zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError, OSError, OverflowError, KeyError),
    struct.error,
)
"""What zipfile raises for files that somebody made up."""
_NOT_A_PICKLE = (
    *(pickle.UnpicklingError, TypeError, ValueError, AttributeError, KeyError, IndexError, EOFError, MemoryError),
    *(RecursionError, OverflowError, ImportError),
)

_MEMBER = re.compile(
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
    length: int  # of numbers


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]


def read_pth(data: bytes, what: str) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors of a `.pth` file (torch's zip format) as float32, by name; runs nothing that the file asks for.

    Reads an OrderedDict of contiguous float tensors and refuses everything else: raises HeadError, naming `what`.
    """
    if len(data) > MAX_FILE:
        raise HeadError(f"{what}: more than {MAX_FILE:,} bytes")
    members = _zip_members(data, what)
    program = members["data.pkl"]
    _scan_opcodes(program, what)
    try:
        loaded = RestrictedUnpickler(io.BytesIO(program)).load()
    except HeadError as e:
        raise HeadError(f"{what}: {e}") from e
    except _NOT_A_PICKLE as e:
        raise HeadError(f"{what}: its pickle does not hold a state dict: {type(e).__name__} {e}") from e
    if not isinstance(loaded, OrderedDict) or not all(
        isinstance(key, str) and isinstance(tensor, _Tensor)
        for key, tensor in dict.items(loaded)  # BUILD may hide its own `items`
    ):
        raise HeadError(f"{what}: not a state dict (an OrderedDict of tensors)")
    arrays = {}
    for key, tensor in dict.items(loaded):
        storage, dtype = tensor.storage, _STORAGES[tensor.storage.kind]
        numbers = members.get(f"data/{storage.key}")
        width = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
        if numbers is None or len(numbers) != width * storage.length:
            raise HeadError(
                f"{what}: {key}: its storage {storage.key!r} is missing or not {storage.length} numbers long"
            )
        count, start = math.prod(tensor.shape), width * tensor.offset
        if dtype == "bfloat16":
            values = from_bfloat16(numbers, count, start)
        else:
            values = np.frombuffer(numbers, dtype, count, start).astype(np.float32)
        arrays[key] = values.reshape(tensor.shape)
    return arrays


def from_bfloat16(data: bytes, count: int = -1, offset: int = 0) -> npt.NDArray[np.float32]:
    """Little-endian bfloat16 numbers as float32, whose upper half they are."""
    return (np.frombuffer(data, "<u2", count, offset).astype(np.uint32) << 16).view(np.float32)


def _zip_members(data: bytes, what: str) -> dict[str, bytes]:
    """The zip's members without their common folder, once the zip is found to be what torch.save writes."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            names = [e.filename for e in entries]
            if odd := [n for n in names if not _MEMBER.fullmatch(n)]:
                raise HeadError(f"{what}: {odd[0]!r} does not belong in a checkpoint")
            if len(set(names)) != len(names) or len({n.partition("/")[0] for n in names}) != 1:
                raise HeadError(f"{what}: not one checkpoint: a name occurs twice, or there are several folders")
            if any(e.compress_type != zipfile.ZIP_STORED or e.flag_bits & 1 for e in entries):
                raise HeadError(f"{what}: compressed or encrypted; torch.save does neither")
            if sum(e.file_size for e in entries) > _MAX_UNPACKED:
                raise HeadError(f"{what}: more than {_MAX_UNPACKED:,} bytes unpacked")
            members = {e.filename.partition("/")[2]: archive.read(e) for e in entries}
    except NOT_A_ZIP as e:
        raise HeadError(f"{what}: not a whole checkpoint in torch's zip format: {e}") from e
    if "data.pkl" not in members:
        raise HeadError(f"{what}: a zip without data.pkl, not a checkpoint")
    if members.get("byteorder", b"little") != b"little":
        raise HeadError(f"{what}: not little-endian")
    return members


def _scan_opcodes(program: bytes, what: str) -> None:
    """Refuse a pickle that uses more than a state dict needs. Reads the opcodes, executes none."""
    if len(program) > _MAX_PICKLE:
        raise HeadError(f"{what}: a pickle of {len(program):,} bytes; a state dict of a head needs a few thousand")
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name not in _OPCODES:
                raise HeadError(f"{what}: its pickle uses {opcode.name}, which no state dict needs: refused")
            if opcode.name == "GLOBAL" and argument not in _GLOBALS:
                asked = str(argument).replace(" ", ".")
                raise HeadError(f"{what}: its pickle asks for {asked}: refused, nothing was run")
            if opcode.name.endswith("BINPUT") and isinstance(argument, int) and argument > len(program):
                raise HeadError(f"{what}: its pickle counts {argument:,} things, which would take all memory: refused")
    except (ValueError, OverflowError, MemoryError) as e:
        raise HeadError(f"{what}: its pickle is damaged: {e}") from e


class RestrictedUnpickler(pickle.Unpickler):
    """Knows the few names of a state dict of tensors, and reads a tensor as where its numbers lie."""

    def find_class(self, module: str, name: str) -> Callable[..., Any] | str:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch" and name in _STORAGES:
            return name
        raise HeadError(f"its pickle asks for {module}.{name}: refused, nothing was run")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", str(kind), str(key), str(), int(length)) if kind in _STORAGES:
                return _Storage(key, kind, length)
        raise HeadError("its pickle refers to something that is no storage")


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> _Tensor:
    """Stands for torch._utils._rebuild_tensor_v2: a contiguous tensor, its hooks empty."""
    integers = isinstance(offset, int) and all(isinstance(v, int) and v >= 1 for v in shape)
    if not isinstance(storage, _Storage) or not integers or any(rest[1:]):
        raise HeadError("a tensor is not described as torch.save does")
    contiguous = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if tuple(stride) != contiguous:
        raise HeadError(f"a tensor of shape {shape} has strides {stride}: not contiguous")
    if not 0 <= offset <= offset + math.prod(shape) <= storage.length:
        raise HeadError(f"a tensor of shape {shape} reaches beyond its storage of {storage.length} numbers")
    return _Tensor(storage, offset, tuple(shape))
