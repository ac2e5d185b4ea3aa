"""Models in onnxruntime on the CPU, and the cache folder where converted models are kept."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import logging
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aesthetic.errors import UserError
from aesthetic.files import atomic

if TYPE_CHECKING:
    import onnxruntime
    import torch

log = logging.getLogger(__name__)

RECIPE = 1  # part of the cached files' names: raise it when what they hold is computed differently


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

    def __init__(self, model: Path | onnxruntime.InferenceSession, threads: int) -> None:
        """Of a file, or of a session of one thread."""
        self._session = onnx_session(model, 1) if isinstance(model, Path) else model
        self._input = self._session.get_inputs()[0].name
        self.outputs = [output.name for output in self._session.get_outputs()]
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="onnx")

    def run(self, rows: np.ndarray) -> list[np.ndarray]:
        """The model's outputs for (n, ...) rows, n of at least 1: a list of arrays (n, ...)."""

        def one(row: np.ndarray) -> list[np.ndarray]:
            return self._session.run(None, {self._input: row[None]})

        return [np.concatenate(parts) for parts in zip(*self._threads.map(one, rows), strict=True)]


def cached(name: str, make: Callable[[], bytes]) -> Path:
    """The file of this name in $TASTEMAKER_CACHE, or tastemaker/ in the user's cache folder, made where it is missing.

    It appears whole or not at all.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tastemaker"
    path = Path(os.environ.get("TASTEMAKER_CACHE") or folder) / name
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


def cache_name(model: str, package: str, sha256: str) -> str:
    """What the converted model of a package is called in the cache folder."""
    return f"{model}-{importlib.metadata.version(package)}-{sha256[:12]}-r{RECIPE}.onnx"


def export(
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
