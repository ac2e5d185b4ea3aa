"""Image and text encoders behind one small interface: open_clip's models, and one that pip packages carry.

>>> from curate import load_encoder
>>> encoder = load_encoder("bundled")
>>> vectors = encoder.encode_images([picture])     # (1, encoder.dim) float32, unit length

Importing this module loads no model library; `load_encoder` does.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aesthetic.errors import UserError
from aesthetic.space import Space, measure, probe_cosines, probe_files
from curate.encoders.onnx import cpus
from curate.store.files import sha256_file

if TYPE_CHECKING:
    import PIL.Image

PRECISIONS = ("fp32", "bf16", "fp16")


def load_encoder(
    name: str,
    weights: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
) -> Encoder:
    """Load an encoder: "bundled", or "open_clip:ARCH/PRETRAINED".

    PRETRAINED is a tag of open_clip's (its weights are fetched from the hub once) or a local file of weights; `weights`
    is a local copy of the weights that the tag means. `device` is torch's ("cpu", "cuda:1"); by default CUDA where
    there is one. `precision` is one of PRECISIONS; by default fp32 on CPU, fp16 on CUDA. `threads` are CPU threads for
    the model; by default every core that this process may use.

    Raises UserError where there is no such encoder, where an architecture disagrees with its weights, and, within
    seconds, where weights can't be had.
    """
    _check_file(weights)
    check_settings(name, weights, precision, device)
    if name == "bundled":
        from curate.encoders.bundled import BundledEncoder

        return BundledEncoder(threads or cpus())
    kind, _, spec = name.partition(":")
    architecture, _, pretrained = spec.partition("/")
    if kind != "open_clip" or not architecture or not pretrained:
        raise UserError(
            f"embed.encoder: there is no encoder {name!r}; there are bundled and open_clip:ARCH/PRETRAINED, "
            "such as open_clip:ViT-L-14-quickgelu/openai"
        )
    from curate.encoders.openclip import OpenClipEncoder

    return OpenClipEncoder(architecture, pretrained, weights, device, precision, threads)


def check_settings(name: str, weights: str | None, precision: str | None, device: str | None = None) -> None:
    """UserError where an encoder can't run with these settings; looks at no file."""
    if precision is not None and precision not in PRECISIONS:
        raise UserError(f"embed.precision: {precision!r} is none of {', '.join(PRECISIONS)}")
    if name == "bundled" and (weights is not None or device not in (None, "cpu") or precision not in (None, "fp32")):
        raise UserError(
            "the encoder bundled has its own weights and runs on the CPU in fp32: leave out weights, "
            "device and precision, or name an open_clip encoder"
        )


def _check_file(weights: str | None) -> None:
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"embed.weights: there is no file {weights}")


def check_available(name: str, weights: str | None = None) -> bool:
    """Whether an encoder's weights are on this machine; loads no model and no library, and fetches nothing.

    Raises UserError as load_encoder does, also where weights that are not here can't be fetched.
    """
    _check_file(weights)
    kind, _, spec = name.partition(":")
    architecture, _, pretrained = spec.partition("/")
    if kind == "open_clip" and architecture and pretrained:
        from curate.encoders.openclip import check_weights

        return check_weights(architecture, pretrained, weights)
    if name != "bundled":
        load_encoder(name)  # which says what names there are
    return True


def fetch_weights(name: str, weights: str | None = None) -> None:
    """Have an encoder's weights on this machine. Raises UserError as check_available does."""
    if not check_available(name, weights):
        from curate.encoders.openclip import find_weights

        architecture, _, pretrained = name.partition(":")[2].partition("/")
        find_weights(architecture, pretrained, weights)


def canonical_name(name: str) -> str:
    """The name that an encoder gives itself: a tag as open_clip spells it, a file of weights by its digest.

    Reads that file, and loads no library.
    """
    kind, _, spec = name.partition(":")
    architecture, _, pretrained = spec.partition("/")
    if kind != "open_clip" or pretrained.startswith("sha256-"):
        return name
    if Path(pretrained).is_file():
        return name_by_digest(architecture, sha256_file(Path(pretrained)))
    return name_by_tag(architecture, pretrained)


def check_named(name: str) -> None:
    """UserError where no encoder can be called so; looks for no weights and loads no library."""
    kind, _, spec = name.partition(":")
    if name != "bundled" and not (kind == "open_clip" and all(spec.partition("/"))):
        raise UserError(
            f"--encoder {name}: no encoder is called that; there are bundled and open_clip:ARCH/PRETRAINED, "
            "such as open_clip:ViT-L-14-quickgelu/openai"
        )


def name_by_tag(architecture: str, tag: str) -> str:
    return f"open_clip:{architecture}/{tag.lower().replace('-', '_')}"  # as open_clip reads it


def name_by_digest(architecture: str, sha256: str) -> str:
    return f"open_clip:{architecture}/sha256-{sha256[:12]}"  # a path would differ from machine to machine


class Encoder(abc.ABC):
    """Pictures and texts -> vectors of one space. One instance serves many threads' `preprocess` and one's encoding.

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
        """One upright sRGB picture, (height, width, 3) uint8, as the model's input. Safe to call from threads."""

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
        """Vectors of preprocessed pictures, stacked: (n, ...) -> (n, dim) float32 of unit length.

        Raises FloatingPointError, naming the row, where the model gives NaN or infinity.
        """
        out = np.zeros((len(batch), self.dim), np.float32)
        start = 0
        while start < len(batch):  # batch_size may shrink on the way
            part = batch[start : start + self.batch_size]
            out[start : start + len(part)] = self._vectors(part)
            start += len(part)
        return unit(out, f"{self.name}: the vector of picture")

    def encode_images(self, images: Sequence[np.ndarray | PIL.Image.Image]) -> np.ndarray:
        """Vectors of pictures, PIL images or (height, width, 3) uint8 arrays: (n, dim) float32 of unit length."""
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
    """A picture as (height, width, 3) uint8: a PIL image is set upright and laid over white where it is transparent."""
    if not isinstance(image, np.ndarray):
        from PIL import Image, ImageOps

        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"a picture has shape (height, width, 3) and type uint8, not {image.shape} {image.dtype}")
    return image
