"""Files of vectors as clip-retrieval stores them, .npy: mapped, once their header is found to be one of rows."""

from __future__ import annotations

import tokenize
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aesthetic.errors import UserError
from aesthetic.untrusted import check_regular

_NO_NPY = (
    *(OSError, ValueError, EOFError, TypeError, AttributeError, KeyError, OverflowError, MemoryError, RecursionError),
    *(SyntaxError, tokenize.TokenError, zipfile.BadZipFile),
)
"""What numpy raises for headers that somebody made up: they are parsed as Python literals."""


def open_vectors(path: Path) -> npt.NDArray[Any]:
    """The rows (n, d) of a .npy file, float16 or float32, mapped and not read.

    Raises UserError, naming the file, where it is anything else, such as pickled objects, or shorter than it says.
    """
    check_regular(path)
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except _NO_NPY as e:
        raise UserError(f"{path} cannot be read as a .npy file of vectors: {e}") from e
    if not isinstance(vectors, np.ndarray):
        vectors.close()
        raise UserError(f"{path} is a .npz file, not a .npy file of vectors")
    if vectors.ndim != 2 or vectors.dtype not in (np.float16, np.float32):
        raise UserError(
            f"{path} holds {vectors.dtype} of shape {vectors.shape}; rows of float16 or float32 are expected"
        )
    return vectors
