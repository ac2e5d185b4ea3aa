"""Vectors that exist already: a clip-retrieval folder taken in place of the embed stage.

The folder may be cut into partitions in any way; what ties a vector to an image of ours is the name in `image_path`:
our key where the images came from a list of URLs, the key or file name that an image had in the folder of tars or
images that it was read from. A name is not proof, so 8 images of every shard are embedded again and compared; for a
folder that carries the description of its space (ours do), their captions are compared instead.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.space import Space
from aesthetic.untrusted import check_regular, open_vectors
from curate.encoders.base import Encoder, unit
from curate.encoders.embed import EmbedConfig, images_of, recovered, write_vectors
from curate.images.decode import decode
from curate.layout import Data
from curate.shards.tar import IMAGE_EXTENSIONS, image_member, index_tar, read_range
from curate.store.files import check_space

MIN_COSINE = 0.98
"""The least that the median of those images' cosines may be. Single images move further when they are stored anew
(bundled, 40 photographs: at 512 pixels 0.991 to 1, at 256 down to 0.89 and in the median 0.991), so no single one
decides; another encoder, activation or image moves them all (other images: 0.70 at most, seen on the same 40)."""

UNIT_TOLERANCE = 2e-3
"""How far a row's length may be from 1: models that normalise in fp16 come to within about 1e-3."""

_COMPARED = 8  # images of each shard
_IMAGE_ENDING = r"(?i)\.(" + "|".join(IMAGE_EXTENSIONS) + r")$"


@dataclass(frozen=True)
class Partition:
    """One partition: its vectors, their metadata, and how many rows both have."""

    images: Path
    texts: Path | None
    metadata: Path
    rows: int


@dataclass(frozen=True)
class VectorFolder:
    """A clip-retrieval folder whose files agree with each other."""

    root: Path
    parts: list[Partition]
    dim: int
    space: Space | None  # where the folder says which it is


@contextlib.contextmanager
def _of_option() -> Iterator[None]:
    """Have an error name the key of the recipe that it is about."""
    try:
        yield
    except UserError as e:
        raise UserError(f"embed.embeddings: {e}") from e


@_of_option()
def open_vector_folder(config: EmbedConfig) -> VectorFolder:
    """The folder that `embed.embeddings` names, from its files' headers: quick, and no row is read.

    Raises UserError where it is not a whole clip-retrieval folder, or says that it is of another encoder.
    """
    root = Path(config.embeddings or "").expanduser()
    images, metadata = _partition_files(root, "img_emb", "npy"), _partition_files(root, "metadata", "parquet")
    texts = _partition_files(root, "text_emb", "npy") if (root / "text_emb").is_dir() else {}
    if not images:
        raise UserError(f"{root} is not a clip-retrieval folder: it has no img_emb/img_emb_*.npy")
    for name, found in (("metadata", metadata), ("text_emb", texts or images)):
        if lacking := sorted(images.keys() ^ found.keys()):
            raise UserError(f"{root}: img_emb and {name} do not both have partition {lacking[0]}")
    parts = []
    dims = {}
    for index in sorted(images):
        table = metadata[index]
        try:
            check_regular(table)
            about = pq.read_metadata(table)
            schema = about.schema.to_arrow_schema()
        except (pa.ArrowException, OSError, ValueError) as e:
            raise UserError(f"{table} is not a parquet file that can be read: {e}") from e
        if "image_path" not in schema.names:
            raise UserError(f"{table} has no column image_path")
        if pa.types.is_nested(kind := schema.field("image_path").type):
            raise UserError(f"{table}: image_path is {kind}; names are expected")
        part = Partition(images[index], texts.get(index), table, int(about.num_rows))
        for path in filter(None, (part.images, part.texts)):
            vectors = open_vectors(path)
            if len(vectors) != part.rows:
                raise UserError(f"{path} has {len(vectors):,} rows, {part.metadata.name} {part.rows:,}")
            dims[vectors.shape[1]] = path
        parts.append(part)
    if len(dims) > 1:
        lengths = ", ".join(f"{dim} in {path.name}" for dim, path in sorted(dims.items()))
        raise UserError(f"{root}: the vectors are not of one length: {lengths}")
    dim = next(iter(dims))
    space = Space.load(root / "space.json") if (root / "space.json").exists() else None
    if space is not None and (space.encoder != config.encoder or space.dim != dim):
        raise UserError(
            f"{root} holds {dim} numbers a row, of {space.encoder} ({space.dim}), but embed.encoder "
            f"is {config.encoder}. Set embed.encoder: {space.encoder}, with heads and rules of that space."
        )
    return VectorFolder(root, parts, dim, space)


def _partition_files(root: Path, kind: str, ending: str) -> dict[int, Path]:
    """The files of one kind by the number in their name, as clip-retrieval calls them."""
    pattern = re.compile(rf"{kind}_(\d+)\.{ending}")
    found = ((pattern.fullmatch(p.name), p) for p in (root / kind).glob(f"*.{ending}"))
    return {int(match[1]): path for match, path in found if match}


class ImportedVectors:
    """The vectors of a folder, found by name. Holds 16 bytes for each of its rows, whatever their number."""

    @_of_option()
    def __init__(self, folder: VectorFolder) -> None:
        self.folder = folder
        self._starts = np.cumsum([0, *(part.rows for part in folder.parts)])
        hashes = np.empty(self._starts[-1], np.uint64)
        for start, part in zip(self._starts, folder.parts, strict=False):
            at = int(start)
            try:
                with pq.ParquetFile(part.metadata) as file:
                    for batch in file.iter_batches(columns=["image_path"], batch_size=1 << 16):
                        paths = batch.column(0).cast(pa.string())
                        if paths.null_count:
                            raise UserError(f"{part.metadata} has a row without image_path")
                        paths.validate(full=True)
                        hashes[at : at + len(paths)] = _hashes(_names_of(paths))
                        at += len(paths)
            except (pa.ArrowException, OSError) as e:
                raise UserError(f"{part.metadata} is not a parquet file that can be read: {e}") from e
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def find(self, names: list[str]) -> np.ndarray:
        """The row of each name, counted through all partitions: (n,) int64, -1 where the folder lacks it.

        Raises UserError where a name stands for several rows.
        """
        wanted = _hashes(names)
        first = np.searchsorted(self._hashes, wanted, "left")
        count = np.searchsorted(self._hashes, wanted, "right") - first
        if (count > 1).any():
            name = names[int(np.argmax(count > 1))]
            raise UserError(f"{self.folder.root} has {count.max()} rows that are called {name}")
        if not len(self._order):
            return np.full(len(names), -1)
        return np.where(count == 1, self._order[np.minimum(first, len(self._order) - 1)], -1)

    def images(self, rows: np.ndarray, keys: list[str]) -> np.ndarray:
        """The image vectors of rows: (n, dim) float32 of unit length. UserError where one is not of unit length."""
        return _unit(self._gather(rows, "images"), keys, self.folder.root / "img_emb")

    def texts(self, rows: np.ndarray, keys: list[str]) -> np.ndarray | None:
        """The same of captions, None where the folder has none; a row of zeros (no caption) stays one."""
        if self.folder.parts[0].texts is None:
            return None
        vectors = self._gather(rows, "texts")
        present = np.flatnonzero(vectors.any(axis=1))
        vectors[present] = _unit(vectors[present], [keys[i] for i in present], self.folder.root / "text_emb")
        return vectors

    def _gather(self, rows: np.ndarray, kind: str) -> np.ndarray:
        vectors = np.zeros((len(rows), self.folder.dim), np.float32)
        for index, places, inside in by_part(self._starts, rows):
            vectors[places] = open_vectors(getattr(self.folder.parts[index], kind))[inside]
        return vectors

    def captions(self, rows: np.ndarray) -> list[str | None]:
        """The captions of rows; None where the folder has none."""
        captions: list[str | None] = [None] * len(rows)
        for index, places, inside in by_part(self._starts, rows):
            metadata = self.folder.parts[index].metadata
            if "caption" in pq.read_schema(metadata).names:
                column = pq.read_table(metadata, columns=["caption"])["caption"]
                for place, caption in zip(places, column.take(pa.array(inside)).to_pylist(), strict=True):
                    captions[place] = caption
        return captions


def by_part(starts: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Rows counted through several files, file by file: (index of the file, places in `rows`, rows within the file).

    starts: the first row of each file, and how many there are in all.
    """
    owner = np.searchsorted(starts, rows, "right") - 1
    order = np.argsort(owner, kind="stable")
    for places in np.split(order, np.flatnonzero(np.diff(owner[order])) + 1):
        if len(places):
            index = int(owner[places[0]])
            yield index, places, rows[places] - starts[index]


def _names_of(paths: pa.Array) -> pa.Array:
    """The last parts of paths, without the ending of an image."""
    return pc.replace_substring_regex(pc.replace_substring_regex(paths, r"^.*[/\\]", ""), _IMAGE_ENDING, "")


def _hashes(names: list[str] | pa.Array) -> np.ndarray:
    """A 64-bit number for each name: (n,) uint64. Two of ten million agree once in 400,000 folders."""
    import pandas as pd

    values = names if isinstance(names, list) else names.to_pylist()
    return pd.util.hash_array(np.array(values, dtype=object), categorize=False)


def _unit(vectors: np.ndarray, keys: list[str], where: Path) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~(np.abs(lengths - 1) <= UNIT_TOLERANCE))
    if len(bad):
        raise UserError(
            f"{where}: the vector of {keys[bad[0]]} has the length {lengths[bad[0]]:.4g}, not 1 "
            f"({len(bad):,} of {len(keys):,} here are like that). Vectors as clip-retrieval writes them are needed."
        )
    return unit(vectors, str(where))


# ------------------------------------------------------------------------------------------------------------- shards


@_of_option()
def import_shard(data: Data, shard: int, imported: ImportedVectors, encoder: Encoder | None, config: str) -> int:
    """Take over the vectors of one fetched shard's images, in the order of the ledger, unless that is done.
    Returns how many.

    `encoder` is None where the folder says which space it is of. Raises UserError, naming the first, where the folder
    lacks an image, or its vectors are not of unit length or not those of these images.
    """
    inputs = data.fetched_digests(shard)
    assert inputs is not None, f"shard {shard} is embedded before it is fetched"
    if data.is_done(data.embedded_record(shard), config=config, inputs=inputs):
        return 0
    if recovered(data, shard, data.embedded_record(shard), config) == set():
        data.recommit(data.embedded_record(shard), inputs)
        return 0
    check_space(data.root)
    began = time.time()
    root = imported.folder.root
    table = images_of(data, shard, ["key", "caption"])
    keys = table["key"].to_pylist()
    names = _names(data, shard, keys)
    rows = imported.find(names)
    if (rows < 0).any():
        first = int(np.argmax(rows < 0))
        called = "" if names[first] == keys[first] else f" (called {names[first]} where it was read)"
        raise UserError(
            f"{root} has no vector for {int((rows < 0).sum()):,} of the {len(keys):,} images of "
            f"shard {shard}; the first is {keys[first]}{called}. Its metadata must name every image in image_path."
        )
    images, texts = imported.images(rows, keys), imported.texts(rows, keys)
    some = np.unique(np.linspace(0, len(keys) - 1, min(_COMPARED, len(keys))).astype(int))
    if encoder is not None:
        _compare_vectors(data, shard, encoder, [keys[i] for i in some], images[some], root)
    else:
        for i, theirs in zip(some.tolist(), imported.captions(rows[some]), strict=True):
            ours = table["caption"][i].as_py()
            if ours is not None and theirs is not None and ours != theirs:
                raise UserError(
                    f"{root} was made from another list: {keys[i]} has the caption {theirs[:80]!r} there and "
                    f"{ours[:80]!r} here"
                )
    write_vectors(
        data, shard, table, images, texts, config=config, inputs=inputs, facts={"imported": str(root)}, began=began
    )
    return len(keys)


def _names(data: Data, shard: int, keys: list[str]) -> list[str]:
    """What the images of a shard were called by whoever embedded them: in tars and folders, their names there."""
    if data.plan.list_of(shard)["base"] is None:
        return keys
    source = data.plan.read(shard)
    assert source.own_columns is not None and source.base is not None
    statuses = pq.read_table(data.local(data.table(shard)), columns=["status"])["status"]
    places = source.own_columns.filter(pc.equal(statuses, "success")).to_pylist()
    named: dict[str, dict[int, str]] = {}
    names = []
    for place in places:
        path = place["@path"]
        if path.endswith(".tar"):
            if path not in named:
                file = source.file(path)
                index = index_tar(file if isinstance(file, Path) else file.local())
                named[path] = {at: key for key, found in index.items() for at, _ in found.values()}
            path = named[path][place["@offset"]]
        names.append(path)
    return _names_of(pa.array(names, pa.string())).to_pylist()


def _compare_vectors(data: Data, shard: int, encoder: Encoder, keys: list[str], theirs: np.ndarray, root: Path) -> None:
    """UserError unless the encoder gives, for most of these images, the vectors that the folder holds."""
    index = index_tar(data.local(data.tar(shard)))
    images = []
    with open(data.tar(shard), "rb") as tar:
        for key in keys:
            found = image_member(index[key])
            assert found is not None, f"{key} has no image in {data.tar(shard)}"
            images.append(decode(read_range(tar, found[1])))
    cosines = np.einsum("nd,nd->n", encoder.encode_images(images), theirs)
    if len(keys) and np.median(cosines) < MIN_COSINE:
        worst = int(np.argmin(cosines))
        raise UserError(
            f"{root} does not hold {encoder.name}'s vectors of these images: {len(keys)} of shard "
            f"{shard} were embedded again, and their cosines have the median {np.median(cosines):.3f}, {MIN_COSINE} "
            f"needed; the worst is {keys[worst]} with {cosines[worst]:.3f}. Name the encoder that made the folder as "
            "embed.encoder, and the list that it was made from."
        )
