"""Protected sets: images that must not be in the data, or near anything in it, and how near each image comes to them.

A set is a folder of images (or tars, or parquet files of them), a .npy of vectors, or a file of hashes. What is
computed of it lies in a folder of the annotator's own, for its tasks to read, and is made anew when the set changes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.chunks import thread_map
from aesthetic.errors import UserError
from aesthetic.files import atomic
from aesthetic.hashes import MIN_ONES
from aesthetic.space import Space, require_same
from aesthetic.untrusted import check_regular, first_three, open_vectors, read_json_file, read_text
from curate.duplicates.hash_lists import mirrored_and_turned, read_hashes
from curate.images.config import ImagesConfig
from curate.layout import Data
from curate.store.files import digest, sha256_file

if TYPE_CHECKING:
    from curate.annotators.base import TableRun
    from curate.encoders.base import Encoder
    from curate.sources.dataset import MapDataset

Kind = Literal["images", "vectors", "hashes"]

LITTLE = 75
"""PDQ's quality below which the perceptual hash of an image is compared with that of one without PDQ: hashes end at a
quality of 50, and a copy may lie on the other side."""

_FORM = 1  # of the files written here
_FILES = ("names.parquet", "hashes.npz", "vectors.npy")
_ARRAYS = ("hashes", "hash_of", "small", "small_of")
_CHUNK = 64  # images of the set that one task hashes
_NAMES = ("key", "name", "file_name", "image_path", "url", "id")  # columns of a table beside vectors
_LARGEST_NAMES = 1 << 30


@dataclass(frozen=True, eq=False)
class Protected:
    """A protected set of n images, ready to be compared with.

    names: (n,) what they are called.    sha256: (n,) of their files, null where there are none.
    hashes: (m, 4) uint64 PDQ, or (m,) perceptual hashes.    hash_of: (m,) whose each is. Images have eight: they may
    be mirrored and turned.    small, small_of: perceptual hashes of images with little detail, likewise.
    vectors: (n, dim) float32 of unit norm, or None.    unreadable: more files, which are no images.
    """

    names: pa.StringArray
    sha256: pa.StringArray
    hashes: np.ndarray
    hash_of: np.ndarray
    small: np.ndarray
    small_of: np.ndarray
    vectors: np.ndarray | None
    unreadable: Sequence[str] = ()

    @property
    def bits(self) -> int:
        """Of each hash: 256 (PDQ) or 64."""
        return 256 if self.hashes.ndim == 2 else 64


# --------------------------------------------------------------------------------------------------- what a set can be


def kind_of(path: Path) -> Kind:
    """What a path is as a protected set. UserError where it is none; what lies in it isn't read."""
    if path.is_dir():
        _check_folder(path, path.stat().st_mtime_ns)
        return "images"
    check_regular(path)
    if path.suffix.lower() == ".npy":
        return "vectors"
    with open(path, "rb") as f:
        if b"\0" in f.read(512):
            raise UserError(
                f"{path} is no text: a folder of images or of tars, a .npy of vectors, or a file of hashes is "
                "expected. Of an image, a tar or a parquet file give the folder that it lies in"
            )
    return "hashes"


def vectors_dim(path: Path) -> int:
    """Numbers in each vector of a .npy file."""
    return int(open_vectors(path).shape[1])


@functools.lru_cache(maxsize=8)
def _check_folder(folder: Path, mtime_ns: int) -> None:
    """UserError where a folder holds no image that can be read. A command asks several times."""
    from curate.sources.find import kind_of_folder, nothing_in
    from curate.sources.listing import list_folder

    listing = list_folder(folder)
    if kind_of_folder(listing) is None:
        raise UserError(nothing_in(listing))


def digest_of(path: Path) -> str:
    """Changes with what is in a protected set: the bytes of its files, and what they are called."""
    kind = kind_of(path)
    if kind == "hashes":
        listed = read_hashes(path)
        return digest([kind, hashlib.sha256(listed.values.tobytes()).hexdigest(), listed.labels])
    if kind == "vectors":
        return digest([kind, sha256_file(path), _names_beside(path)])
    from curate.sources.find import open_folder

    files = open_folder(path).files()
    found = zip(files, thread_map(_sha256, files), strict=True)
    return digest([kind, [[str(file.relative_to(path)), sha256] for file, sha256 in found]])


def _sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as e:
        return f"unreadable: {e.strerror}"


def read_vectors(path: Path) -> tuple[np.ndarray, list[str]]:
    """The vectors of a .npy file, (n, dim) float32 of unit norm, and what they are called: as a file of the same name
    says (.txt, .json, .parquet), or by their row. UserError where they are no such vectors."""
    from curate.encoders.base import unit

    vectors = open_vectors(path)
    if not len(vectors):
        raise UserError(f"{path} holds no vector")
    try:
        found = unit(vectors, f"{path}: the vector of row")
    except FloatingPointError as e:
        raise UserError(str(e)) from None
    names = _names_beside(path) or [f"row {i}" for i in range(len(found))]
    if len(names) != len(found):
        raise UserError(f"{path} has {len(found):,} vectors, and the file beside it {len(names):,} names")
    return found, names


def _names_beside(path: Path) -> list[str] | None:
    """What a file beside a .npy calls its rows; None where there is none."""
    if (file := path.with_suffix(".txt")).is_file():
        return read_text(file, _LARGEST_NAMES).splitlines()
    if (file := path.with_suffix(".json")).is_file():
        names = read_json_file(file, _LARGEST_NAMES)
        if not isinstance(names, list):
            raise UserError(f"{file}: a list of names is expected, one for each row of {path.name}")
        return [str(name) for name in names]
    if (file := path.with_suffix(".parquet")).is_file():
        check_regular(file)
        try:
            there = pq.read_schema(file).names
            column = next((n for n in _NAMES if n in there), None)
            if column is None:
                raise UserError(f"{file} has none of the columns {', '.join(_NAMES)}, by which rows are called")
            return [str(name) for name in pq.read_table(file, columns=[column])[column].to_pylist()]
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{file} is not a parquet file that can be read: {e}") from e
    return None


@functools.lru_cache(maxsize=1)
def _open(folder: Path, content: str) -> MapDataset:
    """The images of a folder, which is not listed again for each task."""
    from curate.sources.find import open_folder

    return open_folder(folder)


# ------------------------------------------------------------------------------------------------ what is made of a set


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A protected set as tasks find it.

    name, config: what `load_protected` takes.    images: how many, that could be read.    unreadable: how many could
    not, and some_unreadable: the first three of them.
    """

    name: str
    config: str
    images: int
    unreadable: int
    some_unreadable: str


def prepare(path: Path, content: str, run: TableRun, *, cosine: bool, named: bool) -> Prepared:
    """Have what is compared of a protected set in `run.data.index(run.name)`: made where it is not there.

    content: `digest_of` the path.    cosine: compare vectors.    named: keep what its images are called.
    UserError where none of them can be read, and where vectors are of another space.
    """
    data, folder = run.data, run.data.index(run.name)
    record = folder / "protected.json"
    space = Space.load(data.local(data.space)) if cosine else None
    made_of = [_FORM, content, dataclasses.asdict(run.images), named, space and space.fingerprint]
    config = digest(made_of)
    if not data.is_done(record, config=config, inputs={}):
        found = _read(path, content, run, space)
        data.invalidate(record)
        written = _write(data, folder, found, named)
        some = first_three(found.unreadable) if named else ""
        said = {"images": len(found.names), "unreadable": len(found.unreadable), "some_unreadable": some}
        data.commit(record, config=config, inputs={}, outputs=written, facts=said)
    facts = data.record(record)
    return Prepared(
        name=run.name,
        config=config,
        images=facts["images"],
        unreadable=facts["unreadable"],
        some_unreadable=facts["some_unreadable"],
    )


def _read(path: Path, content: str, run: TableRun, space: Space | None) -> Protected:
    """What is compared of a set: hashes of images or of a file, vectors of images or of a file."""
    kind = kind_of(path)
    if kind == "hashes":
        listed = read_hashes(path)
        values, of = listed.values, np.arange(len(listed.labels))
        if listed.bits == 256:
            values, of = mirrored_and_turned(values).reshape(-1, 4), np.repeat(of, 8)
        return _protected(listed.labels, hashes=values, hash_of=of)
    if kind == "vectors":
        listed_vectors, names = read_vectors(path)
        if space is not None and (dim := listed_vectors.shape[1]) != space.dim:
            raise UserError(f"{path}: vectors of {dim} numbers; those of {space.encoder} have {space.dim}")
        return _protected(names, vectors=listed_vectors)
    count = len(_open(path, content))
    chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    task = functools.partial(_hash_images, path, content, run.images)
    hashed = [image for images in run.map(task, chunks) for image in images]
    good = [image for image in hashed if image.error is None]
    if not good:
        raise UserError(f"{path}: none of its {len(hashed):,} images can be read; {hashed[0].name}: {hashed[0].error}")
    vectors = None
    if space is not None:
        encoder = run.encoder()
        require_same(encoder.space(), space, str(path))
        run.say(f"{run.name}: {len(good):,} protected images go through {encoder.name}")
        vectors = _encode(_open(path, content), run.images, encoder, [image.index for image in good])
    places = np.arange(len(good))
    return _protected(
        [image.name for image in good],
        sha256=[image.sha256 for image in good],
        hashes=np.concatenate([image.hashes for image in good]),
        hash_of=np.repeat(places, [len(image.hashes) for image in good]),
        small=np.concatenate([image.small for image in good]),
        small_of=np.repeat(places, [len(image.small) for image in good]),
        vectors=vectors,
        unreadable=[image.name for image in hashed if image.error is not None],
    )


def _write(data: Data, folder: Path, found: Protected, named: bool) -> list[Path]:
    """Write what is compared; the files."""
    names = found.names if named else pa.array([""] * len(found.names))
    arrays = {name: getattr(found, name) for name in _ARRAYS}
    table, hashes, vectors = (folder / name for name in _FILES)
    with atomic(table) as f:
        pq.write_table(pa.table({"name": names, "sha256": found.sha256}), f, compression="zstd")
    with atomic(hashes) as f:
        np.savez(f, **arrays)
    data.remove(vectors)
    if found.vectors is None:
        return [table, hashes]
    with atomic(vectors) as f:
        np.save(f, found.vectors)
    return [table, hashes, vectors]


@functools.lru_cache(maxsize=2)
def load_protected(data: Data, name: str, config: str) -> Protected:
    """What `prepare` has made in the index of an entry; each process keeps it."""
    files = table, hashes, vectors = [data.index(name) / file for file in _FILES]
    data.bring(*files)
    names = pq.read_table(table)
    with np.load(hashes, allow_pickle=False) as arrays:
        return Protected(
            names=names["name"].combine_chunks(),
            sha256=names["sha256"].combine_chunks(),
            **{name: arrays[name] for name in _ARRAYS},
            vectors=np.load(vectors, mmap_mode="r", allow_pickle=False) if vectors.exists() else None,
        )


def _protected(names: Sequence[str], *, sha256: Sequence[str] | None = None, **parts: Any) -> Protected:
    """A set of these images, empty where nothing is said."""
    nothing: dict[str, Any] = {"hashes": np.zeros((0, 4), np.uint64), "small": np.zeros(0, np.uint64), "vectors": None}
    nothing |= {"hash_of": np.zeros(0, np.int64), "small_of": np.zeros(0, np.int64)}
    digests = pa.nulls(len(names), pa.string()) if sha256 is None else pa.array(sha256, pa.string())
    return Protected(names=pa.array(names, pa.string()), sha256=digests, **(nothing | parts))


@dataclass(frozen=True, eq=False)
class _Hashed:
    """One image of a set: its PDQ hashes, (8, 4) or (0, 4); of those with little detail perceptual ones, at most 8."""

    index: int
    name: str
    sha256: str = ""
    hashes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.uint64))
    small: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    error: str | None = None


def _hash_images(folder: Path, content: str, images: ImagesConfig, rows: range) -> list[_Hashed]:
    """A task: some of a folder's images, hashed as they would be stored."""
    dataset = _open(folder, content)
    return [_hash_image(dataset, index, images) for index in rows]


def _hash_image(dataset: MapDataset, index: int, images: ImagesConfig) -> _Hashed:
    from curate.duplicates.pdq import MIN_QUALITY, pdq, symmetries
    from curate.images.process import perceptual_hash
    from curate.ledger.schema import RowError

    name = dataset.path(index)
    try:
        file = dataset.image(index)
        image = _stored(file, images)
    except (RowError, UserError) as e:
        return _Hashed(index, name, error=str(e))
    sha256 = hashlib.sha256(file).hexdigest()
    quality = pdq(image)[1]
    found = symmetries(image) if quality >= MIN_QUALITY else np.zeros((0, 4), np.uint64)
    if quality >= LITTLE:
        return _Hashed(index, name, sha256, found)
    turned = [np.rot90(view, k) for view in (image, image[:, ::-1]) for k in range(4)]
    small = [int(perceptual_hash(np.ascontiguousarray(view)), 16) for view in turned]
    seen = np.array(sorted({h for h in small if h.bit_count() >= MIN_ONES}), np.uint64)
    return _Hashed(index, name, sha256, found, seen)


def _stored(file: bytes, images: ImagesConfig) -> np.ndarray:
    """The pixels of an image as those of the data's images come to annotators: resized, stored and decoded again."""
    from curate.images.decode import decode
    from curate.images.process import process

    return decode(process(file, images).data)


def _encode(dataset: MapDataset, images: ImagesConfig, encoder: Encoder, rows: Sequence[int]) -> np.ndarray:
    """The vectors of some of a folder's images, (n, dim) float32."""

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            inputs = thread_map(lambda i: encoder.preprocess(_stored(dataset.image(i), images)), part)
            yield encoder.encode_prepared(np.stack(list(inputs)))

    return np.concatenate(list(batches()))
