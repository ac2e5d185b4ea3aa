"""The encoder of a data folder's vectors: words and images that are not in it become vectors of the same space."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from aesthetic.errors import UserError
from aesthetic.space import Space, require_same
from curate.encoders.embed import EmbedConfig
from curate.encoders.registry import canonical_name, check_available, load_encoder
from curate.images.config import ImagesConfig
from curate.images.decode import decode
from curate.images.faces import require_detector
from curate.images.process import process
from curate.layout import Data
from studio.bodies import read_input
from studio.search.scan import Scores

if TYPE_CHECKING:
    from curate.encoders.base import Encoder


@dataclass(frozen=True)
class EncoderAbility:
    """What can be searched for. words: words, and images that are not in the data; why: if not, why not, and else what
    there is to know.    images: images of the data."""

    words: bool
    why: str
    images: bool


class DataEncoder:
    """The encoder that made a data folder's vectors, loaded when it is first needed, and how its images were made.

    The encoder is used only where its space is that of the vectors.
    """

    def __init__(self, data: Data, embed: EmbedConfig | None, images: ImagesConfig | None) -> None:
        """embed, images: as the recipe has them; None: the encoder that the vectors name, and images as by default."""
        self._data, self._embed, self._images = data, embed, images or ImagesConfig()
        self._lock = threading.Lock()
        self._encoder: Encoder | None = None

    def ability(self) -> EncoderAbility:
        """What can be searched for; loads no model, and looks at most for the file of its weights."""
        data = self._data
        if not data.exists(data.space) or not data.shards(data.embedded_record):
            return EncoderAbility(False, f"there are no vectors yet: `tastemaker embed {data}` makes them", False)
        name, weights = self._name()
        try:
            here = check_available(name, weights)
        except UserError as e:
            return EncoderAbility(False, str(e), True)
        if not here:
            why = f"the weights of {name} are not on this machine: `tastemaker embed {data}` brings them"
            return EncoderAbility(False, why, True)
        note = "the bundled encoder knows plain names of things; CLIP's vectors know more" if name == "bundled" else ""
        return EncoderAbility(True, note, True)

    def text(self, words: str) -> Scores:
        """The vector of words, (dim,) of unit length. UserError where the encoder can't be had, or reads no such."""
        with self._lock, _understood():
            return self._loaded().encode_texts([words])[0]

    def image(self, file: bytes) -> Scores:
        """The vectors of an image file, (1 or 2, dim) of unit length; UserError where it is none.

        It is processed as the data's images were, so that the file that one of them was made of finds it. One that the
        data would not resize is also taken as it is: it may be such an image as it is stored, and encoding it once more
        would be too much.
        """
        if self._images.blur_faces:
            require_detector()

        def images(data: bytes, most: int) -> list[npt.NDArray[np.uint8]]:
            stored, own = decode(process(data, self._images).data), decode(data)
            return [stored] if own.shape != stored.shape or np.array_equal(own, stored) else [stored, own]

        pixels = read_input("image", images, file)
        with self._lock, _understood():
            return self._loaded().encode_images(pixels)

    def _loaded(self) -> Encoder:
        if self._encoder is None:
            name, weights = self._name()
            encoder = load_encoder(name, weights, precision=self._embed.precision if self._embed else None)
            space = Space.load(self._data.local(self._data.space))
            require_same(space, encoder.space(), f"{self._data}/embedded")
            self._encoder = encoder
        return self._encoder

    def _name(self) -> tuple[str, str | None]:
        """The encoder's name, and where its weights are, if not where they usually are. Both are the recipe's where it
        means the encoder of the vectors, or may: of weights in a file the vectors know the digest alone."""
        space = Space.load(self._data.local(self._data.space))
        embed = self._embed
        if embed and ("/sha256-" in space.encoder or canonical_name(embed.encoder) == space.encoder):
            return embed.encoder, embed.weights and str(Path(embed.weights).expanduser())
        return space.encoder, None


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    """UserError where a model gives no numbers: half precision may, and what is all zeros."""
    try:
        yield
    except FloatingPointError as e:
        raise UserError(f"the encoder makes no vector of that ({e}): search for something else") from e
