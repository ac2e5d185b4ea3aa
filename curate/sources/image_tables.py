"""Parquet files that hold images (Hugging Face's, img2dataset's): as a dataset and as inputs of a plan."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aesthetic.errors import UserError
from aesthetic.untrusted import caption_of
from curate.ledger.schema import Reason, RowError, Status
from curate.sources.dataset import LARGEST_IMAGE, PartedDataset, read_image
from curate.sources.images import path_below
from curate.sources.img2dataset import failed_place
from curate.sources.inputs import PLACE_COLUMNS, RESULT_COLUMNS, Input, place
from curate.sources.listing import Listing
from curate.sources.lists import open_list
from curate.sources.parquet import open_parquet, parquet_batches
from curate.sources.problems import Problems
from curate.store.files import digest

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")  # of bytes; Hugging Face's structs may have any name


def image_column(path: Path) -> str | None:
    """The column of images of a parquet file: Hugging Face's struct of `bytes` and `path`, or bytes so called.

    A file with a column of bytes and one of URLs is taken for a list, unless it has img2dataset's `key` and `status`.
    """
    schema = open_parquet(path).schema_arrow
    for f in schema:
        if pa.types.is_struct(f.type) and {"bytes", "path"} == {c.name for c in f.type}:
            return f.name
    names = {n.lower() for n in schema.names}
    if "url" in names and not {"key", "status"} <= names:
        return None
    of_bytes = (f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type))
    return next((name for name in of_bytes if name.lower() in _IMAGE_COLUMNS), None)


def tables_with_images(listing: Listing) -> list[Path]:
    """The parquet files of a folder that hold images, where its first does."""
    found = [listing.folder / name for name in listing.lists if name.lower().endswith(".parquet")]
    if not found or image_column(found[0]) is None:
        return []
    for file in found:
        if image_column(file) is None:
            raise UserError(f"{file}: holds no column of images, as {found[0].name} does. Give a folder of one kind.")
    return found


class ParquetImages:
    """The images of one parquet file by the index of their row.

    Rows are decoded one by one from the beginning of their row group, so reading in order costs what it must; those
    last read are kept, so that threads may be ahead of each other.
    """

    _KEPT = 128 << 20  # bytes

    def __init__(self, path: Path) -> None:
        self.path, self.column = path, image_column(path)
        self._file = open_parquet(path)
        groups = self._file.metadata
        self._ends = list(accumulate(groups.row_group(g).num_rows for g in range(groups.num_row_groups)))
        self._kept: OrderedDict[int, bytes | str | None] = OrderedDict()
        self._kept_bytes = 0
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._group, self._next = -1, -1  # whose rows these are, and the row that comes next
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, row: int) -> bytes:
        """The bytes of one image; RowError where there are none."""
        with self._lock:
            value = self._kept[row] if row in self._kept else self._read_until(row)
        if isinstance(value, str):  # Hugging Face's: a file beside
            try:
                return read_image(self.path.parent / path_below(value))
            except (ValueError, UserError) as e:
                raise RowError(Reason.NOT_AN_IMAGE, f"row {row} holds no bytes, and its path {e}") from e
        if value is None:
            raise RowError(Reason.NOT_AN_IMAGE, f"row {row} of {self.path.name} holds no image")
        return value

    def _read_until(self, row: int) -> bytes | str | None:
        group = bisect_right(self._ends, row)
        if self._batches is None or group != self._group or self._next > row:
            # what would unpack to more than can be held is refused
            found = self._file.metadata.row_group(group)
            for column in map(found.column, range(found.num_columns)):
                if column.path_in_schema.split(".")[0] == self.column and found.num_rows:
                    mean = column.total_uncompressed_size / found.num_rows
                    if mean > LARGEST_IMAGE:
                        why = f"images of {mean:,.0f} bytes; at most {LARGEST_IMAGE:,} are read"
                        raise RowError(Reason.TOO_LARGE, why)
            self._batches = self._file.iter_batches(1, row_groups=[group], columns=[self.column])
            self._group, self._next = group, self._ends[group - 1] if group else 0
        try:
            while True:
                value = next(self._batches).column(0)[0].as_py() or None
                if isinstance(value, dict):
                    data, path = value.get("bytes"), value.get("path")
                    value = data or (path if isinstance(path, str) and path else None)
                self._kept[self._next] = value
                self._kept_bytes += len(value or b"")
                while self._kept_bytes > self._KEPT and len(self._kept) > 1:
                    self._kept_bytes -= len(self._kept.popitem(last=False)[1] or b"")
                self._next += 1
                if self._next > row:
                    return value
        except (pa.ArrowException, OSError, StopIteration) as e:
            self._batches = None
            raise RowError(Reason.DECODE_ERROR, f"row {row} of {self.path.name} cannot be read: {e}"[:300]) from e


@lru_cache(maxsize=8)
def parquet_images(path: Path) -> ParquetImages:
    """The images of a parquet file that was opened before, or is now."""
    return ParquetImages(path)


class ImageTables(PartedDataset):
    """The rows of parquet files that hold images."""

    def __init__(self, folder: str | Path, files: Sequence[Path], listing: Listing) -> None:
        self.folder, self.problems, self.parts, self._listing = Path(folder), Problems(), list(files), listing
        self.ends = list(accumulate(len(parquet_images(f)) for f in self.parts))
        self._table = lru_cache(maxsize=None)(self._read_table)

    def _read_table(self, file: Path) -> tuple[pa.Table, str | None]:
        """(the columns beside the image, the name of the caption's)."""
        source = open_list(file, "url", "caption")
        names = [n for n in source.schema.names if n != parquet_images(file).column]
        schema = pa.schema([source.schema.field(n) for n in names])
        return pa.Table.from_batches(list(parquet_batches(file, names)), schema), source.caption

    def passed_over(self) -> list[str]:
        return self._listing.notes()

    def key(self, index: int) -> str:
        file, row = self.locate(index)
        name = file.relative_to(self.folder).as_posix() if file.is_relative_to(self.folder) else file.name
        return f"{name}/{row}"

    def image(self, index: int) -> bytes:
        file, row = self.locate(index)
        return parquet_images(file).read(row)

    def captioned_rows(self, part: Path) -> npt.NDArray[np.int64]:
        table, caption = self._table(part)
        return np.flatnonzero(table.column(caption).is_valid()) if caption else np.empty(0, np.int64)

    def read_facts(self, index: int) -> dict[str, Any]:
        file, row = self.locate(index)
        table, caption = self._table(file)
        facts = {n: table.column(n)[row].as_py() for n in table.column_names}
        return {**facts, "key": self.key(index), "caption": caption_of(facts[caption]) if caption else None}


class ImageTableInput(Input):
    """A parquet file that holds images: Hugging Face's, and img2dataset's `output_format=parquet`."""

    local = True
    own_columns = PLACE_COLUMNS

    def __init__(self, path: Path, base: Path, url: str, caption: str | None) -> None:
        super().__init__(path)
        self._base = base
        table = open_list(path, url, caption)
        image = image_column(path)
        self._columns, self._url = [n for n in table.schema.names if n != image], table.url
        self.url, self.caption = self._url or "url", table.caption
        fields = [f for f in table.schema if f.name != image and f.name not in RESULT_COLUMNS - {"url"}]
        self.schema = pa.schema(fields if self._url else [("url", pa.string()), *fields])
        self.rows = table.rows
        self.uncaptioned = 0 if self.caption else self.rows

    def digest(self) -> str:
        # of the footer, which says where each piece of each column lies: a file may hold gigabytes of images
        with open(self.path, "rb") as f:
            f.seek(-8, 2)
            size = f.tell() + 8
            f.seek(-min(size, 8 + int.from_bytes(f.read(4), "little")), 2)
            return digest([f.read().hex(), size])

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        row = 0
        results = [n for n in ("status", "error_message", "reason") if n in self._columns]
        names = [n for n in self._columns if n in columns or n in results]
        path = self.path.relative_to(self._base).as_posix()
        for batch in parquet_batches(self.path, names):
            arrays = {n: batch.column(n) for n in names}
            places = [place(path, row + i, None) for i in range(batch.num_rows)]
            if "status" in results:
                for i, found in enumerate(batch.select(results).to_pylist()):
                    if found["status"] not in (None, Status.SUCCESS):
                        places[i] = failed_place(found)
            if not self._url:
                arrays["url"] = pa.array([f"{path}/{row + i}" for i in range(batch.num_rows)], pa.string())
            row += batch.num_rows
            for name, kind in PLACE_COLUMNS:
                arrays[name] = pa.array([p[name] for p in places], kind)
            yield pa.RecordBatch.from_pydict(arrays)
