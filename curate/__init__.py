"""Turning lists of images into the part that is worth training on. A library: it runs without Ray.

from curate import load_encoder, open_data
load_encoder("bundled").encode_images([pil, ...])       # (n, d) float32, unit norm
open_data("data").ledger.df()                           # a line per row of the list
"""

from __future__ import annotations

from typing import Any

__all__ = ["load_encoder", "open_data"]


def __getattr__(name: str) -> Any:
    # on demand: a command line that answers at once must not load models or DuckDB
    if name == "load_encoder":
        from curate.encoders.registry import load_encoder

        return load_encoder
    if name == "open_data":
        from curate.store.ownership import open_data

        return open_data
    raise AttributeError(f"module 'curate' has no attribute {name!r}")
