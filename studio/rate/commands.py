"""The commands that fit a head to a set of ratings, and that make a column of it: what stands after `tastemaker`."""

from __future__ import annotations

from pathlib import Path

from curate.layout import Data
from studio.rate.files import RatingSet


def fit_words(data: Data, about: RatingSet, given: str, kind: str = "") -> list[str]:
    """What fits the head. given: the data folder as it is typed; kind: what `fit` takes the ratings for, where that is
    known: labels have no scale."""
    words = ["fit", _typed(data, data.ratings(about.name), given), "--data", given]
    if about.scale is not None and (kind or about.kind) == "scores":
        words += ["--scale", *(f"{end:g}" for end in about.scale)]
    return [*words, "--out", _typed(data, data.head(about.name), given)]


def apply_words(data: Data, name: str, given: str) -> list[str]:
    """What scores every image by the set's head: a column of the set's name."""
    return ["annotate", given, f"{name}={_typed(data, data.head(name), given)}"]


def _typed(data: Data, path: Path, given: str) -> str:
    return f"{given.rstrip('/')}/{path.relative_to(data.root).as_posix()}"
