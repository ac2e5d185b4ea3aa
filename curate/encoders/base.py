"""What an encoder is: images and texts -> vectors of one space."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aesthetic.space import Space, measure, probe_cosines, probe_files

if TYPE_CHECKING:
    import PIL.Image

PRECISIONS = ("fp32", "bf16", "fp16")


def name_by_tag(architecture: str, tag: str) -> str:
    return f"open_clip:{architecture}/{tag.lower().replace('-', '_')}"  # as open_clip reads it


def name_by_digest(architecture: str, sha256: str) -> str:
    return f"open_clip:{architecture}/sha256-{sha256[:12]}"  # a path would differ from machine to machine


class Encoder(abc.ABC):
    """Images and texts -> vectors of one space. One instance serves many threads' `preprocess` and one's encoding.

    name: canonical; the same on every machine.    dim: numbers in a vector.    precision: one of PRECISIONS.
    batch_size: rows that the model takes at once; feeding whole batches of it gives bit-identical results run to run.
    halved: whether memory did not suffice for the batch size that it began with (CUDA only).
    """

    name: str
    dim: int
    precision: str
    batch_size: int
    halved: bool = False

    @abc.abstractmethod
    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """One upright sRGB image, (height, width, 3) uint8, as the model's input. Safe to call from threads."""

    @abc.abstractmethod
    def _vectors(self, batch: np.ndarray, exact: bool = False) -> np.ndarray:
        """(n, dim) vectors of any length for at most batch_size inputs; `exact` asks for fp32 without shortcuts."""

    @abc.abstractmethod
    def _text_vectors(self, texts: list[str]) -> np.ndarray:
        """(n, dim) vectors of any length for at most batch_size texts."""

    @abc.abstractmethod
    def _details(self) -> dict[str, Any]:
        """What the space's description records: weights, activation, preprocessing."""

    def encode_prepared(self, batch: np.ndarray) -> np.ndarray:
        """Vectors of preprocessed images, stacked: (n, ...) -> (n, dim) float32 of unit length.

        Raises FloatingPointError, naming the row, where the model gives NaN or infinity.
        """
        out = np.zeros((len(batch), self.dim), np.float32)
        start = 0
        while start < len(batch):  # batch_size may shrink on the way
            part = batch[start : start + self.batch_size]
            out[start : start + len(part)] = self._vectors(part)
            start += len(part)
        return unit(out, f"{self.name}: the vector of image")

    def encode_images(self, images: Sequence[np.ndarray | PIL.Image.Image]) -> np.ndarray:
        """Vectors of images, PIL images or (height, width, 3) uint8 arrays: (n, dim) float32 of unit length."""
        out = np.zeros((len(images), self.dim), np.float32)
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size]
            out[start : start + len(part)] = self.encode_prepared(np.stack([self.preprocess(pixels(i)) for i in part]))
        return out

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts, cut at what the tokenizer takes: (n, dim) float32 of unit length."""
        out = np.zeros((len(texts), self.dim), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths together: little padding
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            out[part] = self._text_vectors([texts[i] for i in part])
        return unit(out, f"{self.name}: the vector of text")

    def space(self) -> Space:
        """The space of these vectors: the probe images through the whole path in fp32, whatever `precision` is.

        `details` records the precision of the run and the worst cosine of a probe in it to fp32.
        """
        from curate.images.decode import decode

        def prepare(files: list[bytes]) -> np.ndarray:
            return np.stack([self.preprocess(decode(f)) for f in files])

        exact = measure(lambda files: unit(self._vectors(prepare(files), exact=True), "probe"), self.name)
        assert exact.probes is not None
        cosine = 1.0
        if self.precision != "fp32":
            cosine = float(probe_cosines(exact.probes, self.encode_prepared(prepare(probe_files()))).min())
        details = {**self._details(), "precision": self.precision, "precision_cosine": round(cosine, 5)}
        return dataclasses.replace(exact, details=details)


def unit(vectors: np.ndarray, what: str) -> np.ndarray:
    """Rows scaled to unit length, float32. FloatingPointError names the first row where that can't be done."""
    vectors = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(bad):
        raise FloatingPointError(f"{what} {bad[0]} is {'zero' if lengths[bad[0], 0] == 0 else 'not finite'}")
    return vectors / lengths


def pixels(image: np.ndarray | PIL.Image.Image) -> np.ndarray:
    """An image as (height, width, 3) uint8: a PIL image is set upright and laid over white where it is transparent."""
    if not isinstance(image, np.ndarray):
        from PIL import Image, ImageOps

        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"an image has shape (height, width, 3) and type uint8, not {image.shape} {image.dtype}")
    return image
