"""A library of taste: embedding spaces, heads that score in them, and fitting heads to ratings.

Imports none of the other packages. What is listed in `__all__` is for anyone; curate, train, studio and pipelines also
use errors, untrusted, tables, space, metrics, splits and plots as they are.

>>> from aesthetic import load_head
>>> load_head("laion-v2").scale
(1.0, 10.0)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aesthetic.catalog import list_heads, load_head
    from aesthetic.classify import fit_classifier
    from aesthetic.compare import fit_comparisons
    from aesthetic.examples import Examples
    from aesthetic.fit import fit_head
    from aesthetic.head_files import save_head
    from aesthetic.heads import Head, HeadError
    from aesthetic.imports import import_head
    from aesthetic.prompts import prompt_head
    from aesthetic.ratings import read_ratings
    from aesthetic.space import Space, SpaceMismatch

__all__ = [
    "Examples",
    "Head",
    "HeadError",
    "Space",
    "SpaceMismatch",
    "fit_classifier",
    "fit_comparisons",
    "fit_head",
    "import_head",
    "list_heads",
    "load_head",
    "prompt_head",
    "read_ratings",
    "save_head",
]

_HOME = {
    "Examples": "examples",
    "Head": "heads",
    "HeadError": "heads",
    "Space": "space",
    "SpaceMismatch": "space",
    "fit_classifier": "classify",
    "fit_comparisons": "compare",
    "fit_head": "fit",
    "import_head": "imports",
    "list_heads": "catalog",
    "load_head": "catalog",
    "prompt_head": "prompts",
    "read_ratings": "ratings",
    "save_head": "head_files",
}


def __getattr__(name: str) -> Any:
    """Import the module that holds `name` on first use: `import aesthetic` alone costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'aesthetic' has no attribute {name!r}")
    return getattr(importlib.import_module(f"aesthetic.{_HOME[name]}"), name)
