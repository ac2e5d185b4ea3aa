"""The vectors of a data folder, of images that are asked for again and again by their keys, as while people rate."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curate.ledger.schema import make_key, shard_of_key
from curate.sources.image_vectors import _SEED, DataFolderVectors
from curate.sources.vectors import by_part

if TYPE_CHECKING:
    import pandas as pd

    from curate.encoders.base import Encoder

_KEPT = 100_000  # images of which something is kept: 100 MB of vectors of 512 numbers
_KEYS_KEPT = 256  # shards whose keys are kept: 20 MB where each has 10,000


def _no_encoder() -> Encoder:
    raise AssertionError("no text is encoded here")


class KeptVectors(DataFolderVectors):
    """As its base, where all ids are keys: an image is found by its shard alone, and what was read of it is kept.

    To `curate.sources.rated.join_ratings` it gives the same images, vectors and facts as its base. Safe in threads.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root, _no_encoder)
        self._index_of = {shard: index for index, shard in enumerate(self._shards)}
        self._keys_of: OrderedDict[int, np.ndarray] = OrderedDict()
        self._image_of: dict[str, int] = {}
        self._vector_of: dict[int, np.ndarray] = {}
        self._facts: pd.DataFrame | None = None
        self._lock = threading.RLock()

    @property
    def hiding(self) -> list[str]:
        """The names of the annotators whose columns say which images must not be seen."""
        return sorted({table.rpartition("/")[2] for table in self._hidden.values()})

    def images(self, keys: Sequence[str]) -> np.ndarray:
        """Of each key its image (n,), -1 where it has none that has a vector and may be seen."""
        with self._lock:
            new: dict[int, list[str]] = {}
            for key in {*keys}.difference(self._image_of):
                shard = shard_of_key(key, self.data.plan.shard_size)
                if shard in self._index_of:
                    new.setdefault(self._index_of[shard], []).append(key)
            if len(self._image_of) > _KEPT:
                self._image_of.clear()
            for index, wanted in new.items():
                self._image_of |= self._look(index, wanted)
            return np.array([self._image_of.get(key, -1) for key in keys], np.int64)

    def _look(self, index: int, wanted: list[str]) -> dict[str, int]:
        keys, numbers = self._numbers(index), np.array([int(key) for key in wanted], np.uint64)
        rows = np.minimum(np.searchsorted(keys, numbers), len(keys) - 1)
        there = keys[rows] == numbers if len(keys) else np.zeros(len(wanted), bool)
        images = self._starts[index] + rows
        there[there] = self._shown(images[there])
        return {key: int(image) for key, image, ok in zip(wanted, images, there, strict=True) if ok}

    def _numbers(self, index: int) -> np.ndarray:
        """The keys of a shard's vectors as numbers, ascending, as rows of a list come."""
        if index not in self._keys_of:
            self._keys_of[index] = pc.cast(self._keys(index), pa.uint64()).to_numpy()
            if len(self._keys_of) > _KEYS_KEPT:
                self._keys_of.popitem(last=False)
        self._keys_of.move_to_end(index)
        return self._keys_of[index]

    def shown(self, images: np.ndarray) -> np.ndarray:
        """Which of these images may be seen, (n,) bool."""
        with self._lock:
            return self._shown(images)

    def keys(self, images: np.ndarray) -> list[str]:
        """The keys of images, in their order."""
        width = len(make_key(0, 0, self.data.plan.shard_size))
        return [f"{number:0{width}d}" for number in self.key_numbers(images).tolist()]

    def key_numbers(self, images: np.ndarray) -> np.ndarray:
        """The keys of images as numbers (n,) uint64."""
        found = np.empty(len(images), np.uint64)
        with self._lock:
            for index, places, rows in by_part(self._starts, images):
                found[places] = self._numbers(index)[rows]
        return found

    def names(self, ids: Sequence[str], by: str) -> pd.DataFrame:
        import pandas as pd

        wanted = sorted(set(ids))
        images = self.images(wanted)
        there = images >= 0
        table = pd.DataFrame({"key": np.array(wanted, object)[there]}, index=images[there])
        return table.sort_index()

    def vectors(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            new = self._new(images, self._vector_of)
            if len(self._vector_of) + len(new) > _KEPT:
                self._vector_of.clear()
                new = self._new(images, {})
            if len(new):
                self._vector_of |= zip(new.tolist(), super().vectors(new)[0], strict=True)
            found = [self._vector_of[i] for i in images.tolist()]
        return np.array(found, np.float16).reshape(len(found), self.space.dim), np.ones(len(images), bool)

    def draw_in_files(self, most: int, files: int) -> np.ndarray:
        """Images of so many files of vectors, `most` at most, drawn at random, in order; the same ones at each call."""
        rng = np.random.default_rng(_SEED)
        chosen = np.sort(rng.choice(len(self._shards), min(files, len(self._shards)), replace=False))
        images = np.concatenate([np.arange(self._starts[i], self._starts[i + 1]) for i in chosen])
        if len(images) > most:
            images = np.sort(rng.choice(images, most, replace=False))
        return images[self.shown(images)]

    def read_vectors(self, images: np.ndarray) -> np.ndarray:
        """The vectors of many images (n, d), of which none is kept here."""
        return super().vectors(images)[0]

    def facts(self, images: np.ndarray) -> pd.DataFrame:
        import pandas as pd

        with self._lock:
            kept = self._facts
            if kept is not None and len(kept) > _KEPT:
                kept = None
            new = self._new(images, () if kept is None else kept.index)
            if len(new) or kept is None:
                more = super().facts(new).set_index(new)
                kept = more if kept is None else pd.concat([kept, more])
            self._facts = kept
            return kept.loc[images].reset_index(drop=True)

    @staticmethod
    def _new(images: np.ndarray, kept: Iterable[int]) -> np.ndarray:
        known = kept if isinstance(kept, dict) else set(kept)
        return np.array([i for i in dict.fromkeys(images.tolist()) if i not in known], np.int64)
