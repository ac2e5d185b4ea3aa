"""The images that ratings can be joined to, with their vectors: of a data folder, of vectors as clip-retrieval stores
them, or of a folder of pictures."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from aesthetic.errors import UserError
from aesthetic.space import Space
from aesthetic.vectors import open_vectors
from pipelines.runtime.progress import format_duration, format_rate
from pipelines.terminal import CLEAR, RETURN

if TYPE_CHECKING:
    import pandas as pd

    from curate.encoders.base import Encoder


class Pool(Protocol):
    """Images by number, 0 to count - 1."""

    root: Path
    absent: str  # why an image that is listed may have no vector
    count: int

    @property
    def space(self) -> Space: ...

    def candidates(self, by: str) -> pd.DataFrame:
        """What ratings may call each image: columns out of key, path, url, sha256."""
        ...

    def vectors(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of those images that have one (m, d), and which of them do (n,) bool."""
        ...

    def facts(self, images: np.ndarray) -> pd.DataFrame:
        """key, and what is known of: sha256, phash, width, height, domain."""
        ...

    def pictures(self, images: Sequence[int]) -> dict[int, Any]:
        """PIL images, None for one that can't be decoded."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts in the images' space; UserError where that can't be had."""
        ...


class DataPool:
    """The embedded images of a data folder. Vectors are read from their files, and no image is opened for them."""

    absent = "no vector"

    def __init__(self, root: str) -> None:
        import pandas as pd
        import pyarrow.parquet as pq

        from curate.layout import open_data

        self.data = open_data(root)
        self.root = self.data.root
        if not self.data.space.exists():
            raise UserError(f"{self.root} holds no vectors yet. `tastemaker embed {self.root}` makes them.")
        self.space = Space.load(self.data.space)
        parts = []
        for s in self.data.plan.shards:
            if self.data.embedded_record(s.shard).exists():
                keys = pq.read_table(self.data.metadata(s.shard), columns=["key"])["key"].to_numpy()
                parts.append(pd.DataFrame({"key": keys, "shard": s.shard, "row": np.arange(len(keys))}))
        if not parts:
            raise UserError(f"{self.root} holds no vectors yet. `tastemaker embed {self.root}` makes them.")
        self.index = pd.concat(parts, ignore_index=True)
        self.count = len(self.index)

    def candidates(self, by: str) -> pd.DataFrame:
        if by == "sha256":
            return self._of_ledger(self.index, ["sha256"])
        table = self._of_ledger(self.index, ["url"])
        return table if "url" not in table else table.assign(path=[_path_of(u) for u in table["url"]])

    def vectors(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wanted = self.index.iloc[images]
        out = np.empty((len(images), self.space.dim), np.float16)
        for shard, part in wanted.reset_index(drop=True).groupby("shard"):
            stored = open_vectors(self.data.image_vectors(int(shard)))
            out[part.index.to_numpy()] = stored[part["row"].to_numpy()]
        return out, np.ones(len(images), bool)

    def facts(self, images: np.ndarray) -> pd.DataFrame:
        wanted = self.index.iloc[images].reset_index(drop=True)
        table = self._of_ledger(wanted, ["url", "sha256", "phash", "original_width", "original_height"])
        table = table.rename(columns={"original_width": "width", "original_height": "height"})
        return table.assign(domain=[_domain_of(u) for u in table["url"]]) if "url" in table else table

    def _of_ledger(self, index: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
        """These columns of `fetched/` for the images of an index, as far as the folder has them."""
        import pandas as pd
        import pyarrow.parquet as pq

        parts = []
        for shard, part in index.groupby("shard"):
            path = self.data.table(int(shard))
            there = [c for c in columns if c in pq.read_schema(path).names]
            table = pq.read_table(path, columns=["key", *there]).to_pandas().drop_duplicates("key").set_index("key")
            parts.append(table.reindex(part["key"]).set_axis(part.index).assign(key=part["key"]))
        return pd.concat(parts).sort_index() if parts else index[["key"]]

    def pictures(self, images: Sequence[int]) -> dict[int, Any]:
        from curate.shards.tar import image_member, index_tar, read_range

        found: dict[int, Any] = {}
        for shard, part in self.index.iloc[list(images)].groupby("shard"):
            tar = self.data.tar(int(shard))
            members = index_tar(tar)
            with open(tar, "rb") as f:
                for image, key in zip(part.index, part["key"], strict=True):
                    member = image_member(members.get(key, {}))
                    found[int(image)] = None if member is None else _thumbnail(read_range(f, member[1]))
        return found

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        from aesthetic.space import require_same
        from curate.encoders.registry import load_encoder
        from pipelines.stored_recipe import recipe_of

        asked = recipe_of(self.data, None, ()).embed
        encoder = load_encoder(asked.encoder, asked.weights)
        require_same(self.space, encoder.space(), str(self.data.space))
        return encoder.encode_texts(texts)


class VectorsPool:
    """A clip-retrieval folder: img_emb/*.npy, metadata/*.parquet. Its pictures are shown where they are files here."""

    absent = "no vector"

    def __init__(self, root: Path, encoder: str | None) -> None:
        import pandas as pd
        import pyarrow as pa
        import pyarrow.parquet as pq

        from curate.encoders.embed import EmbedConfig
        from curate.encoders.registry import canonical_name
        from curate.sources.vectors import open_folder

        described = root / "space.json"
        if encoder is None and not described.exists():
            raise UserError(
                f"--embeddings {root} does not say which encoder made its vectors (it has no space.json): say it with "
                f"--encoder, such as open_clip:ViT-L-14-quickgelu/openai"
            )
        name = encoder or Space.load(described).encoder
        folder = open_folder(EmbedConfig(encoder=name, embeddings=str(root)))
        self.root, self.parts = root, folder.parts
        self.space = folder.space or Space(encoder=canonical_name(name), dim=folder.dim)
        wanted = ["image_path", "url", "sha256", "phash", "original_width", "original_height"]
        tables = []
        for number, part in enumerate(self.parts):
            there = [c for c in wanted if c in pq.read_schema(part.metadata).names]
            try:
                table = pq.read_table(part.metadata, columns=there)
                for i, name in enumerate(there[:4]):  # names, whatever their type
                    if name in wanted[:4]:
                        table = table.set_column(i, name, table[name].cast(pa.string()))
                table.validate(full=True)
            except (pa.ArrowException, OSError) as e:
                raise UserError(f"{part.metadata} is not a parquet file that can be read: {e}") from e
            table = table.to_pandas()
            tables.append(table.assign(part=number, row=np.arange(len(table))))
        self.table = pd.concat(tables, ignore_index=True).rename(
            columns={"image_path": "key", "original_width": "width", "original_height": "height"}
        )
        self.count = len(self.table)

    def candidates(self, by: str) -> pd.DataFrame:
        named = self.table[[c for c in ("key", "url", "sha256") if c in self.table]]
        return named.assign(path=named["key"])

    def vectors(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        out = np.empty((len(images), self.space.dim), np.float16)
        for number, part in self.table.iloc[images].reset_index(drop=True).groupby("part"):
            path, rows = self.parts[int(number)].images, part["row"].to_numpy()
            taken = open_vectors(path)[rows].astype(np.float32)
            lengths = np.linalg.norm(taken, axis=1)
            if (long := np.abs(lengths - 1) > 0.01).any():  # not so of NaN: such a row is left out
                row = int(long.argmax())
                raise UserError(f"{path}: row {rows[row]:,} has the length {lengths[row]:.4g}, not 1")
            out[part.index.to_numpy()] = taken
        return out, np.ones(len(images), bool)

    def facts(self, images: np.ndarray) -> pd.DataFrame:
        table = self.table.iloc[images].reset_index(drop=True)
        return table.assign(domain=[_domain_of(u) for u in table["url"]]) if "url" in table else table

    def pictures(self, images: Sequence[int]) -> dict[int, Any]:
        files = {int(i): Path(str(self.table["key"].iloc[i])) for i in images}
        return {i: _thumbnail(f.read_bytes()) if f.is_file() else None for i, f in files.items()}

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        from aesthetic.space import require_same
        from curate.encoders.registry import load_encoder

        encoder = load_encoder(self.space.encoder)
        require_same(self.space, encoder.space(), str(self.root))
        return encoder.encode_texts(texts)


class FolderPool:
    """The pictures of a folder (of images, of tars, of parquet), embedded when they are asked for."""

    absent = "not a picture that can be decoded"

    def __init__(self, root: Path, encoder: str, say: Callable[[str], None]) -> None:
        from curate.sources.captioned import NothingRead, open_folder

        self.root, self._name, self._say = root, encoder, say
        if not root.is_dir():
            raise UserError(f"--images {root}: there is no such folder")
        try:
            self.samples = open_folder(root)
        except NothingRead as e:
            raise UserError(f"--images {root}: there is no image in it that is read ({e})") from e
        except UserError as e:
            raise UserError(f"--images {e}") from e
        for note in self.samples.notes():
            say(f"{root}: {note}")
        self.count = len(self.samples)
        self._known: dict[int, tuple[np.ndarray, dict[str, Any]] | None] = {}

    @cached_property
    def _encoder(self) -> Encoder:
        from curate.encoders.registry import load_encoder

        return load_encoder(self._name)

    @property
    def space(self) -> Space:
        return self._encoder.space()

    def candidates(self, by: str) -> pd.DataFrame:
        import pandas as pd

        if by == "url":
            raise UserError(f"the ratings name URLs, and {self.root} is a folder of images: name files, or use --data")
        names = [self.samples.key(i) for i in range(self.count)]
        paths = [self.samples.path(i) for i in range(self.count)]
        table = pd.DataFrame({"key": names, "path": paths})
        return table.assign(sha256=[self._sha256(i) for i in range(self.count)]) if by == "sha256" else table

    def _sha256(self, image: int) -> str | None:
        import hashlib

        from curate.ledger.schema import RowError

        try:
            return hashlib.sha256(self.samples.image(image)).hexdigest()
        except RowError:
            return None

    def vectors(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        todo = [int(i) for i in images if int(i) not in self._known]
        self._embed(todo)
        there = np.array([self._known[int(i)] is not None for i in images], bool)
        rows = [known[0] for i in images if (known := self._known[int(i)]) is not None]
        return np.array(rows, np.float32).reshape(len(rows), self._encoder.dim), there

    def _embed(self, images: list[int]) -> None:
        encoder = self._encoder
        began, size = time.monotonic(), encoder.batch_size
        shown = sys.stderr.isatty()
        with ThreadPoolExecutor(max_workers=4) as threads:
            ahead: deque[tuple[int, Future[tuple[np.ndarray, dict[str, Any]] | None]]] = deque()
            batch: list[tuple[int, np.ndarray, dict[str, Any]]] = []
            todo = iter(images)
            for done in range(len(images)):
                while len(ahead) < 3 * size and (i := next(todo, None)) is not None:
                    ahead.append((i, threads.submit(self._prepare, i, encoder)))
                i, future = ahead.popleft()
                if (prepared := future.result()) is None:
                    self._known[i] = None
                else:
                    batch.append((i, *prepared))
                if batch and (len(batch) == size or done == len(images) - 1):
                    vectors = encoder.encode_prepared(np.stack([b[1] for b in batch]))
                    self._known |= {b[0]: (v, b[2]) for b, v in zip(batch, vectors, strict=True)}
                    batch = []
                    rate = (done + 1) / (time.monotonic() - began)
                    if shown:
                        left = (len(images) - done - 1) / rate
                        print(RETURN, end="", file=sys.stderr)
                        speed = f"{format_rate(rate, 'img')}  eta {format_duration(left)} "
                        print(f"embed  {done + 1:,}/{len(images):,}  {speed}", end="", file=sys.stderr)
        if images:
            print(CLEAR if shown else "", end="", file=sys.stderr)
            self._say(f"embedded {len(images):,} images in {time.monotonic() - began:.0f} s with {encoder.name}")

    def _prepare(self, image: int, encoder: Encoder) -> tuple[np.ndarray, dict[str, Any]] | None:
        """A picture as the encoder's input, and what copies of it are known by; None where it is none."""
        import hashlib

        from curate.images.decode import decode
        from curate.images.resize import perceptual_hash
        from curate.ledger.schema import RowError

        try:
            data = self.samples.image(image)
            pixels = decode(data)
        except RowError:
            return None
        facts = {"sha256": hashlib.sha256(data).hexdigest(), "phash": perceptual_hash(pixels)}
        return encoder.preprocess(pixels), facts | {"width": pixels.shape[1], "height": pixels.shape[0]}

    def facts(self, images: np.ndarray) -> pd.DataFrame:
        import pandas as pd

        names = [self.samples.key(int(i)) for i in images]
        known = [(self._known.get(int(i)) or (None, {}))[1] for i in images]
        return pd.DataFrame([{"key": n, **k} for n, k in zip(names, known, strict=True)])

    def pictures(self, images: Sequence[int]) -> dict[int, Any]:
        return {int(i): self._thumbnail(int(i)) for i in images}

    def _thumbnail(self, image: int) -> Any:
        from curate.ledger.schema import RowError

        try:
            return _thumbnail(self.samples.image(image))
        except RowError:
            return None

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        return self._encoder.encode_texts(texts)


def _thumbnail(data: bytes) -> Any:
    from PIL import Image

    from curate.images.decode import decode
    from curate.ledger.schema import RowError

    try:
        image = Image.fromarray(decode(data, 320))
    except RowError:
        return None
    image.thumbnail((320, 320), Image.Resampling.LANCZOS)
    return image


def _path_of(url: str | None) -> str:
    """The path part of a URL, without its first slash; a path stays what it is."""
    rest = (url or "").partition("://")
    path = rest[2].partition("/")[2] if rest[1] else rest[0]
    return path.partition("?")[0].partition("#")[0]


def _domain_of(url: str | None) -> str:
    return (url or "").partition("://")[2].partition("/")[0].lower()
