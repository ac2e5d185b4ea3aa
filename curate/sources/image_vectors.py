"""Images with their vectors, to which ratings can be joined: of a data folder, of a clip-retrieval folder, or of a
folder of images, which are embedded when they are asked for.

Of a folder that holds vectors already the names are read file by file, and what no rating means is not kept: memory
does not grow with the number of images.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aesthetic.errors import UserError
from aesthetic.join import WantedImages
from aesthetic.space import Space, require_same
from aesthetic.untrusted import open_vectors
from curate.sources.vectors import by_part

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from PIL import Image

    from curate.encoders.base import Encoder

THUMBNAIL = 320  # pixels of its longer side
_AHEAD = 16  # tables that are brought together
_SEED = 0x7461737465  # of the images that are drawn; a change draws others for everyone


class ImageVectors(ABC):
    """Images by index, 0 to count - 1, with vectors of one space."""

    place: str  # the folder, for people
    space: Space
    count: int
    missing: str  # why an image that is listed may have no vector

    @abstractmethod
    def names(self, ids: Sequence[str], by: str) -> pd.DataFrame:
        """What the images that these ids of ratings may mean are called, and perhaps others: columns out of key, path,
        url, sha256; the index is the image's. by: as `aesthetic.join` has it."""

    @abstractmethod
    def vectors(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of those images that have one (m, d), and which of them do (n,) bool."""

    @abstractmethod
    def facts(self, images: np.ndarray) -> pd.DataFrame:
        """key, and what is known of: sha256, phash, width, height, domain."""

    @abstractmethod
    def thumbnails(self, images: Sequence[int]) -> dict[int, Image.Image | None]:
        """The images, small; None for one that can't be decoded."""

    def draw(self, without: np.ndarray, most: int) -> np.ndarray:
        """Images other than these, in order: all, or where they are more than `most`, that many drawn at random, the
        same ones at each call."""
        count = min(self.count, most + len(without))
        drawn = np.random.default_rng(_SEED).choice(self.count, count, replace=False)
        drawn = drawn[~np.isin(drawn, without) & self._shown(drawn)]
        return np.sort(drawn[:most])

    def _shown(self, images: np.ndarray) -> np.ndarray:
        """Which of these images may be seen, (n,) bool."""
        return np.ones(len(images), bool)

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts (n, d) in the images' space; raises UserError where that can't be had."""


class DataFolderVectors(ImageVectors):
    """The embedded images of a data folder, without those that must not be seen. Vectors are read from their files, and
    no image is opened for them."""

    missing = "no vector"

    def __init__(self, root: str, text_encoder: Callable[[], Encoder]) -> None:
        from curate.ledger.view import hidden_columns, tables
        from curate.store.ownership import open_data

        self.data = open_data(root)
        self.place, self._text_encoder = str(self.data), text_encoder
        self._tables, planned = tables(self.data), {s.shard for s in self.data.plan.shards}
        self._shards = [s for s in self.data.shards(self.data.embedded_record) if s in planned]
        if not self._shards or not self.data.exists(self.data.space):
            raise UserError(f"{self.data} holds no vectors yet. `tastemaker embed {self.data}` makes them.")
        self._hidden = hidden_columns(self._tables)
        self.space = Space.load(self.data.local(self.data.space))
        records = [self.data.embedded_record(s) for s in self._shards]
        self.data.look(records)
        self._starts = np.cumsum([0, *(self.data.record(record)["sample_count"] for record in records)])
        self.count = int(self._starts[-1])

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        encoder = self._text_encoder()
        require_same(self.space, encoder.space(), f"{self.data}/embedded")
        return encoder.encode_texts(texts)

    def names(self, ids: Sequence[str], by: str) -> pd.DataFrame:
        import pyarrow.compute as pc

        columns = ["key", "sha256" if by == "sha256" else "url"]

        def called(index: int, paths: bool) -> pa.Table:
            if index % _AHEAD == 0:
                self.data.bring(*map(self.data.table, self._shards[index : index + _AHEAD]))
            table = self._read(self.data.table(self._shards[index]), columns)
            with_path = paths and "url" in table.column_names
            return table.append_column("path", _paths(table["url"])) if with_path else table

        def image_of(index: int, table: pa.Table) -> np.ndarray:
            keys = self._keys(index)
            rows = pc.fill_null(pc.index_in(table["key"], value_set=keys), -1).to_numpy()
            images = np.where(rows >= 0, self._starts[index] + rows, -1)  # a row without an image has no vector
            images[rows >= 0] = np.where(self._shown(images[rows >= 0]), images[rows >= 0], -1)
            return images

        return _find(ids, by, len(self._shards), called, image_of)

    def _keys(self, index: int) -> pa.Array:
        """The keys of a shard's vectors, in their order."""
        return self._read(self.data.metadata(self._shards[index]), ["key"])["key"].combine_chunks()

    def _read(self, path: Path, columns: Sequence[str]) -> pa.Table:
        table = _read(self.data.local(path), columns)
        self.data.release(path)  # there may be more of them than room
        return table

    def _shown(self, images: np.ndarray) -> np.ndarray:
        import pyarrow as pa
        import pyarrow.compute as pc

        from curate.ledger.view import hidden_keys

        shown = np.ones(len(images), bool)
        for index, places, rows in by_part(self._starts, images) if self._hidden else ():
            if hidden := hidden_keys(self._tables, self._hidden, self._shards[index]):
                keys = self._keys(index).take(pa.array(rows))
                shown[places] = ~pc.is_in(keys, pa.array(sorted(hidden))).to_numpy(zero_copy_only=False)
        return shown

    def vectors(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        out = np.empty((len(images), self.space.dim), np.float16)
        for index, places, rows in by_part(self._starts, images):
            path = self.data.image_vectors(self._shards[index])
            out[places] = open_vectors(self.data.local(path))[rows]
            self.data.release(path)
        return out, np.ones(len(images), bool)

    def facts(self, images: np.ndarray) -> pd.DataFrame:
        import pyarrow as pa
        import pyarrow.compute as pc

        columns = ["key", "url", "sha256", "phash", "original_width", "original_height"]

        def known(index: int, rows: np.ndarray) -> pa.Table:
            table = self._read(self.data.table(self._shards[index]), columns)
            keys = self._keys(index).take(pa.array(rows))
            found = table.take(pc.index_in(keys, value_set=table["key"].combine_chunks()))
            return found.set_column(found.column_names.index("key"), "key", keys)

        table = _gather(images, self._starts, known)
        return _with_domain(table.rename(columns={"original_width": "width", "original_height": "height"}))

    def thumbnails(self, images: Sequence[int]) -> dict[int, Image.Image | None]:
        from curate.shards.tar import image_member, index_tar, read_range

        found: dict[int, Image.Image | None] = {}
        for index, places, rows in by_part(self._starts, np.asarray(images, np.int64)):
            tar, keys = self.data.local(self.data.tar(self._shards[index])), self._keys(index)
            members = index_tar(tar)
            with open(tar, "rb") as f:
                for place, row in zip(places, rows, strict=True):
                    member = image_member(members.get(keys[int(row)].as_py(), {}))
                    found[int(images[place])] = None if member is None else _thumbnail(read_range(f, member[1]))
            self.data.release(tar)
        return found


class ClipFolderVectors(ImageVectors):
    """A clip-retrieval folder: img_emb/*.npy, metadata/*.parquet. Its images are shown where they are files here."""

    missing = "no vector"

    def __init__(self, root: Path, encoder: str | None) -> None:
        from curate.encoders.embed import EmbedConfig
        from curate.encoders.registry import canonical_name
        from curate.sources.vectors import open_vector_folder

        described = root / "space.json"
        if encoder is None and not described.exists():
            raise UserError(
                f"--embeddings {root} does not say which encoder made its vectors (it has no space.json): say it with "
                f"--encoder, such as open_clip:ViT-L-14-quickgelu/openai"
            )
        name = encoder or Space.load(described).encoder
        folder = open_vector_folder(EmbedConfig(encoder=name, embeddings=str(root)))
        self.place, self.parts = str(root), folder.parts
        self.space = folder.space or Space(encoder=canonical_name(name), dim=folder.dim)
        self._starts = np.cumsum([0, *(part.rows for part in self.parts)])
        self.count = int(self._starts[-1])

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        from curate.encoders.registry import load_encoder

        encoder = load_encoder(self.space.encoder)
        require_same(self.space, encoder.space(), self.place)
        return encoder.encode_texts(texts)

    def names(self, ids: Sequence[str], by: str) -> pd.DataFrame:
        def called(index: int, paths: bool) -> pa.Table:
            table = self._read(index, ["image_path", "url", "sha256"])
            return table.append_column("path", table["key"]) if paths else table

        def image_of(index: int, table: pa.Table) -> np.ndarray:
            return self._starts[index] + table["row"].to_numpy()

        return _find(ids, by, len(self.parts), called, image_of)

    def _read(self, index: int, columns: list[str]) -> pa.Table:
        """These columns of a partition as far as it has them, names as text; UserError where that can't be read."""
        import pyarrow as pa

        path = self.parts[index].metadata
        try:
            table = _read(path, columns)
            for at, column in enumerate(table.column_names):
                if column in ("image_path", "url", "sha256", "phash"):  # whatever their type
                    table = table.set_column(at, column, table[column].cast(pa.string()))
            table.validate(full=True)
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{path} is not a parquet file that can be read: {e}") from e
        called = {"image_path": "key", "original_width": "width", "original_height": "height"}
        return table.rename_columns([called.get(name, name) for name in table.column_names])

    def vectors(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        out = np.empty((len(images), self.space.dim), np.float16)
        for index, places, rows in by_part(self._starts, images):
            path = self.parts[index].images
            taken = open_vectors(path)[rows].astype(np.float32)
            lengths = np.linalg.norm(taken, axis=1)
            if (long := np.abs(lengths - 1) > 0.01).any():  # not so of NaN: such a row is left out
                row = int(long.argmax())
                raise UserError(f"{path}: row {rows[row]:,} has the length {lengths[row]:.4g}, not 1")
            out[places] = taken
        return out, np.ones(len(images), bool)

    def facts(self, images: np.ndarray) -> pd.DataFrame:
        import pyarrow as pa

        columns = ["image_path", "url", "sha256", "phash", "original_width", "original_height"]
        table = _gather(images, self._starts, lambda index, rows: self._read(index, columns).take(pa.array(rows)))
        return _with_domain(table)

    def thumbnails(self, images: Sequence[int]) -> dict[int, Image.Image | None]:
        keys = self.facts(np.asarray(images, np.int64))["key"]
        files = {int(i): Path(str(key)) for i, key in zip(images, keys, strict=True)}
        return {i: _thumbnail(f.read_bytes()) if f.is_file() else None for i, f in files.items()}


class FolderVectors(ImageVectors):
    """The images of a folder (of images, of tars, of parquet), embedded when their vectors are asked for.

    log: called with lines to read; progress: with the images done, of how many, and the seconds that took.
    """

    missing = "not an image that can be decoded"

    def __init__(
        self,
        root: Path,
        encoder: str,
        log: Callable[[str], None] = lambda line: None,
        progress: Callable[[int, int, float], None] = lambda done, total, seconds: None,
    ) -> None:
        from curate.sources.find import NothingRead, open_folder

        self.place, self._encoder_name, self._log, self._progress = str(root), encoder, log, progress
        if not root.is_dir():
            raise UserError(f"--images {root}: there is no such folder")
        try:
            self.samples = open_folder(root)
        except NothingRead as e:
            raise UserError(f"--images {root}: there is no image in it that is read ({e})") from e
        except UserError as e:
            raise UserError(f"--images {e}") from e
        for note in self.samples.notes():
            log(f"{root}: {note}")
        self.count = len(self.samples)
        self._embedded: dict[int, tuple[np.ndarray, dict[str, Any]] | None] = {}

    @cached_property
    def encoder(self) -> Encoder:
        from curate.encoders.registry import load_encoder

        return load_encoder(self._encoder_name)

    @cached_property
    def space(self) -> Space:  # type: ignore[override]
        return self.encoder.space()

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        return self.encoder.encode_texts(texts)

    def names(self, ids: Sequence[str], by: str) -> pd.DataFrame:
        import pandas as pd

        if by == "url":
            raise UserError(f"the ratings name URLs, and {self.place} is a folder of images: name files, or use --data")
        images = range(self.count)
        table = pd.DataFrame(
            {"key": [self.samples.key(i) for i in images], "path": [self.samples.path(i) for i in images]}
        )
        if by != "sha256":
            return table
        data = (self._read(i) for i in images)
        return table.assign(sha256=[None if d is None else hashlib.sha256(d).hexdigest() for d in data])

    def _read(self, image: int) -> bytes | None:
        from curate.ledger.schema import RowError

        try:
            return self.samples.image(image)
        except RowError:
            return None

    def vectors(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        new = [int(i) for i in images if int(i) not in self._embedded]
        began, size = time.monotonic(), self.encoder.batch_size
        batch: list[tuple[int, np.ndarray, dict[str, Any]]] = []
        for done, (image, prepared) in enumerate(self._prepared_ahead(new), 1):
            if prepared is None:
                self._embedded[image] = None
            else:
                batch.append((image, *prepared))
            if batch and (len(batch) == size or done == len(new)):
                encoded = self.encoder.encode_prepared(np.stack([b[1] for b in batch]))
                self._embedded |= {b[0]: (v, b[2]) for b, v in zip(batch, encoded, strict=True)}
                batch = []
            if not batch:
                self._progress(done, len(new), time.monotonic() - began)
        if new:
            seconds = time.monotonic() - began
            self._log(f"embedded {len(new):,} images in {seconds:.0f} s with {self.encoder.name}")

        found = [self._embedded[int(i)] for i in images]
        rows = [embedded[0] for embedded in found if embedded is not None]
        return (
            np.array(rows, np.float32).reshape(len(rows), self.encoder.dim),
            np.array([embedded is not None for embedded in found], bool),
        )

    def _prepared_ahead(self, images: list[int]) -> Iterator[tuple[int, tuple[np.ndarray, dict[str, Any]] | None]]:
        """The images in their order, prepared in threads, three batches ahead."""
        with ThreadPoolExecutor(max_workers=4) as threads:
            ahead: deque[tuple[int, Future[tuple[np.ndarray, dict[str, Any]] | None]]] = deque()
            for image in images:
                ahead.append((image, threads.submit(self._prepare, image)))
                if len(ahead) >= 3 * self.encoder.batch_size:
                    first, future = ahead.popleft()
                    yield first, future.result()
            for first, future in ahead:
                yield first, future.result()

    def _prepare(self, image: int) -> tuple[np.ndarray, dict[str, Any]] | None:
        """An image as the encoder's input, and what copies of it are known by; None where it is none."""
        from curate.images.decode import decode
        from curate.images.process import perceptual_hash
        from curate.ledger.schema import RowError

        try:
            data = self.samples.image(image)
            pixels = decode(data)
        except RowError:
            return None
        facts = {"sha256": hashlib.sha256(data).hexdigest(), "phash": perceptual_hash(pixels)}
        return self.encoder.preprocess(pixels), facts | {"width": pixels.shape[1], "height": pixels.shape[0]}

    def facts(self, images: np.ndarray) -> pd.DataFrame:
        import pandas as pd

        embedded = ((int(i), self._embedded.get(int(i)) or (None, {})) for i in images)
        return pd.DataFrame([{"key": self.samples.key(i), **facts} for i, (_, facts) in embedded])

    def thumbnails(self, images: Sequence[int]) -> dict[int, Image.Image | None]:
        data = {int(i): self._read(int(i)) for i in images}
        return {i: None if d is None else _thumbnail(d) for i, d in data.items()}


# ------------------------------------------------------------------------------------------------------ file by file


def _read(path: Path, columns: Sequence[str]) -> pa.Table:
    """These columns of a parquet file, as far as it has them."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        present = file.schema_arrow.names
        return file.read([c for c in columns if c in present], use_threads=False)


def _find(
    ids: Sequence[str],
    by: str,
    files: int,
    called: Callable[[int, bool], pa.Table],
    image_of: Callable[[int, pa.Table], np.ndarray],
) -> pd.DataFrame:
    """`ImageVectors.names` of a folder in files.

    called: the names of a file's rows, with paths where these are asked for.    image_of: the images of those rows that
    are left, -1 where one has none; `row` says where they were.
    """
    import pyarrow as pa

    wanted = WantedImages(ids, by)

    def look(paths: bool) -> pa.Table:
        parts = []
        for index in range(files):
            table = called(index, paths)
            rows = np.flatnonzero(wanted.rows(dict(zip(table.column_names, table.columns, strict=True)), paths=paths))
            table = table.take(pa.array(rows)).append_column("row", pa.array(rows))
            images = image_of(index, table) if len(rows) else rows
            parts.append(table.append_column("image", pa.array(images)).drop(["row"]).filter(pa.array(images >= 0)))
        return pa.concat_tables(parts, promote_options="permissive")

    found = look(paths=False)
    if by == "image" and not wanted.are_keys(found["key"]):
        found = look(paths=True)
    table = found.to_pandas().set_index("image").sort_index()
    return table[~table.index.duplicated()]


def _gather(images: np.ndarray, starts: np.ndarray, take: Callable[[int, np.ndarray], pa.Table]) -> pd.DataFrame:
    """Rows of the files of a folder: take(file, its rows) for all of these images, in their order."""
    import pandas as pd
    import pyarrow as pa

    if not len(images):
        return pd.DataFrame({"key": []})
    parts, order = [], []
    for index, places, rows in by_part(starts, images):
        parts.append(take(index, rows))
        order.append(places)
    table = pa.concat_tables(parts, promote_options="permissive")
    return table.take(pa.array(np.argsort(np.concatenate(order)))).to_pandas()


def _paths(urls: pa.ChunkedArray) -> pa.ChunkedArray:
    """URLs without scheme and host, where they have these, and without what follows the path."""
    import pyarrow.compute as pc

    paths = pc.replace_substring_regex(pc.fill_null(urls, ""), r"^(?s:.*?)://[^/]*/?", "")
    return pc.replace_substring_regex(paths, r"[?#](?s:.*)$", "")


# ---------------------------------------------------------------------------------------------------------- thumbnails


def _thumbnail(data: bytes) -> Image.Image | None:
    from PIL import Image

    from curate.images.decode import decode
    from curate.ledger.schema import RowError

    try:
        image = Image.fromarray(decode(data, THUMBNAIL))
    except RowError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return image


def _with_domain(table: pd.DataFrame) -> pd.DataFrame:
    if "url" not in table:
        return table
    return table.assign(domain=[(u or "").partition("://")[2].partition("/")[0].lower() for u in table["url"]])
