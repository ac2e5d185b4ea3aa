"""Images with their vectors, to which ratings can be joined: of a data folder, of a clip-retrieval folder, or of a
folder of images, which are embedded when they are asked for.
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
from aesthetic.space import Space, require_same
from aesthetic.untrusted import open_vectors

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

    from curate.encoders.base import Encoder

THUMBNAIL = 320  # pixels of its longer side


class ImageVectors(ABC):
    """Images by index, 0 to count - 1, with vectors of one space."""

    root: Path
    space: Space
    count: int
    missing: str  # why an image that is listed may have no vector

    @abstractmethod
    def names(self, by: str) -> pd.DataFrame:
        """What ratings may call each image: columns out of key, path, url, sha256. by: as `aesthetic.join` has it."""

    @abstractmethod
    def vectors(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of those images that have one (m, d), and which of them do (n,) bool."""

    @abstractmethod
    def facts(self, images: np.ndarray) -> pd.DataFrame:
        """key, and what is known of: sha256, phash, width, height, domain."""

    @abstractmethod
    def thumbnails(self, images: Sequence[int]) -> dict[int, Image.Image | None]:
        """The images, small; None for one that can't be decoded."""

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts (n, d) in the images' space; raises UserError where that can't be had."""


class DataFolderVectors(ImageVectors):
    """The embedded images of a data folder, without those that must not be seen. Vectors are read from their files, and
    no image is opened for them."""

    missing = "no vector"

    def __init__(self, root: str, text_encoder: Callable[[], Encoder]) -> None:
        import pandas as pd
        import pyarrow.parquet as pq

        from curate.ledger.view import hidden_keys, tables
        from curate.store.ownership import open_data

        self.data = open_data(root)
        self.root, self._text_encoder = self.data.root, text_encoder
        parts = []
        if self.data.exists(self.data.space):
            found = tables(self.data)
            for shard in (s.shard for s in self.data.plan.shards):
                if self.data.exists(self.data.embedded_record(shard)):
                    keys = pq.read_table(self.data.local(self.data.metadata(shard)), columns=["key"])["key"].to_numpy()
                    part = pd.DataFrame({"key": keys, "shard": shard, "row": np.arange(len(keys))})
                    parts.append(part[~part["key"].isin(hidden_keys(found, shard))])
        if not parts:
            raise UserError(f"{self.data} holds no vectors yet. `tastemaker embed {self.data}` makes them.")
        self.space = Space.load(self.data.local(self.data.space))
        self.index = pd.concat(parts, ignore_index=True)
        self.count = len(self.index)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        encoder = self._text_encoder()
        require_same(self.space, encoder.space(), f"{self.data}/embedded")
        return encoder.encode_texts(texts)

    def names(self, by: str) -> pd.DataFrame:
        if by == "sha256":
            return self._fetched(self.index, ["sha256"])
        table = self._fetched(self.index, ["url"])
        if "url" not in table:
            return table
        # without scheme and host, where it has these
        rests = ((u or "").partition("://") for u in table["url"])
        paths = (rest.partition("/")[2] if scheme_ends else path for path, scheme_ends, rest in rests)
        return table.assign(path=[path.partition("?")[0].partition("#")[0] for path in paths])

    def vectors(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wanted = self.index.iloc[images]
        out = np.empty((len(images), self.space.dim), np.float16)
        for shard, part in wanted.reset_index(drop=True).groupby("shard"):
            stored = open_vectors(self.data.local(self.data.image_vectors(int(shard))))
            out[part.index.to_numpy()] = stored[part["row"].to_numpy()]
        return out, np.ones(len(images), bool)

    def facts(self, images: np.ndarray) -> pd.DataFrame:
        wanted = self.index.iloc[images].reset_index(drop=True)
        table = self._fetched(wanted, ["url", "sha256", "phash", "original_width", "original_height"])
        return _with_domain(table.rename(columns={"original_width": "width", "original_height": "height"}))

    def _fetched(self, index: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
        """These columns of `fetched/` for the images of an index, as far as the folder has them."""
        import pandas as pd
        import pyarrow.parquet as pq

        parts = []
        for shard, part in index.groupby("shard"):
            path = self.data.local(self.data.table(int(shard)))
            present = [c for c in columns if c in pq.read_schema(path).names]
            table = pq.read_table(path, columns=["key", *present]).to_pandas().drop_duplicates("key").set_index("key")
            parts.append(table.reindex(part["key"]).set_axis(part.index).assign(key=part["key"]))
        return pd.concat(parts).sort_index() if parts else index[["key"]]

    def thumbnails(self, images: Sequence[int]) -> dict[int, Image.Image | None]:
        from curate.shards.tar import image_member, index_tar, read_range

        found: dict[int, Image.Image | None] = {}
        for shard, part in self.index.iloc[list(images)].groupby("shard"):
            tar = self.data.local(self.data.tar(int(shard)))
            members = index_tar(tar)
            with open(tar, "rb") as f:
                for image, key in zip(part.index, part["key"], strict=True):
                    member = image_member(members.get(key, {}))
                    found[int(image)] = None if member is None else _thumbnail(read_range(f, member[1]))
        return found


class ClipFolderVectors(ImageVectors):
    """A clip-retrieval folder: img_emb/*.npy, metadata/*.parquet. Its images are shown where they are files here."""

    missing = "no vector"

    def __init__(self, root: Path, encoder: str | None) -> None:
        import pandas as pd
        import pyarrow as pa
        import pyarrow.parquet as pq

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
        self.root, self.parts = root, folder.parts
        self.space = folder.space or Space(encoder=canonical_name(name), dim=folder.dim)
        texts, sizes = ["image_path", "url", "sha256", "phash"], ["original_width", "original_height"]
        tables = []
        for i, part in enumerate(self.parts):
            present = pq.read_schema(part.metadata).names
            try:
                table = pq.read_table(part.metadata, columns=[c for c in texts + sizes if c in present])
                for column in (c for c in texts if c in present):  # whatever their type
                    table = table.set_column(table.column_names.index(column), column, table[column].cast(pa.string()))
                table.validate(full=True)
            except (pa.ArrowException, OSError) as e:
                raise UserError(f"{part.metadata} is not a parquet file that can be read: {e}") from e
            tables.append(table.to_pandas().assign(part=i, row=np.arange(table.num_rows)))
        self.table = pd.concat(tables, ignore_index=True).rename(
            columns={"image_path": "key", "original_width": "width", "original_height": "height"}
        )
        self.count = len(self.table)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        from curate.encoders.registry import load_encoder

        encoder = load_encoder(self.space.encoder)
        require_same(self.space, encoder.space(), str(self.root))
        return encoder.encode_texts(texts)

    def names(self, by: str) -> pd.DataFrame:
        named = self.table[[c for c in ("key", "url", "sha256") if c in self.table]]
        return named.assign(path=named["key"])

    def vectors(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        out = np.empty((len(images), self.space.dim), np.float16)
        for i, part in self.table.iloc[images].reset_index(drop=True).groupby("part"):
            path, rows = self.parts[int(i)].images, part["row"].to_numpy()
            taken = open_vectors(path)[rows].astype(np.float32)
            lengths = np.linalg.norm(taken, axis=1)
            if (long := np.abs(lengths - 1) > 0.01).any():  # not so of NaN: such a row is left out
                row = int(long.argmax())
                raise UserError(f"{path}: row {rows[row]:,} has the length {lengths[row]:.4g}, not 1")
            out[part.index.to_numpy()] = taken
        return out, np.ones(len(images), bool)

    def facts(self, images: np.ndarray) -> pd.DataFrame:
        return _with_domain(self.table.iloc[images].reset_index(drop=True))

    def thumbnails(self, images: Sequence[int]) -> dict[int, Image.Image | None]:
        files = {int(i): Path(str(self.table["key"].iloc[i])) for i in images}
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

        self.root, self._encoder_name, self._log, self._progress = root, encoder, log, progress
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

    def names(self, by: str) -> pd.DataFrame:
        import pandas as pd

        if by == "url":
            raise UserError(f"the ratings name URLs, and {self.root} is a folder of images: name files, or use --data")
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
