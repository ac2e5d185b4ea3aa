"""Packed shards as a dataset: what is known of their samples from the parquet beside each tar, places from its index.

Nothing of a tar is read but the samples that are asked for, each at one place. Memory: 8 bytes a sample. The folder may
lie on an object store: tars that are not here are read in ranges, or fetched whole by `ShardsAhead`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.untrusted import first_three
from curate.ledger.schema import Reason, RowError
from curate.shards.tar import CorruptShard, image_member, members_in
from curate.sources.dataset import (
    LARGEST_IMAGE,
    Sample,
    caption_in,
    json_in,
    packed_files,
    read_json_of_others,
    text_in,
)
from curate.sources.listing import Listing
from curate.sources.problems import LARGEST_CAPTION
from curate.sources.tars import Tars
from curate.store.disk import Disk, FileChanged
from curate.store.files import sha256_once
from curate.store.mirror import store_at

AT_ONCE = 4 << 30
"""Bytes of tars up to which all are compared with the manifest before anything else is done."""

_FETCHES = 4  # tars at a time
_TABLES = 16  # parquet files at a time


class PackedShards(Tars):
    """The samples of a packed folder, `shards/NAME` or a copy of it, in the order in which they were packed.

    Shards that a copy lacks are left out, and `passed_over` says so. Raises UserError where the folder is no packed
    selection, or a tar of it has another length than was written; whether the bytes are others, `check_bytes` says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self._listing = Path(folder), Listing(Path(folder))
        self.store: Disk = store_at(self.folder)
        self.ahead: ShardsAhead | None = None
        self._watched = False
        self._changed: UserError | None = None  # what `watch_bytes` has found
        self._packed = {self.folder / name: fact for name, fact in sorted(packed_files(self.folder).items())}
        tars = [path for path in self._packed if path.name.endswith(".tar")]
        if not tars:
            raise UserError(f"{folder} holds no packed shards. `tastemaker pack DATA --name NAME` makes them.")
        sizes = {tar: self._length(tar) for tar in tars}
        self._tars, there = tars, [tar for tar in tars if sizes[tar] is not None]
        if not there:
            raise UserError(f"{folder}: none of its {len(tars):,} tars is here. Copy them again.")
        self._open(self.folder, there, kind="")
        if cut := [t.name for t in there if sizes[t] != self._packed[t]["bytes"]]:
            raise UserError(
                f"{folder}: {len(cut):,} of its {len(tars):,} tars cut or of other bytes: {first_three(cut)}. "
                "Copy them again, or remove them from the folder: what is there is then used without them"
            )
        counts_by_name = read_json_of_others(self.folder / "sizes.json")
        counts: list[Any] = [counts_by_name.get(t.name) if isinstance(counts_by_name, dict) else None for t in there]
        self._counted = all(type(count) is int and count >= 0 for count in counts)
        self.ends = list(accumulate(counts if self._counted else (len(self._places(t).keys) for t in there)))
        self._starts = lru_cache(maxsize=None)(self._read_starts)
        self._part = {tar: part for part, tar in enumerate(there)}
        self.decoded = self._counted and all(self._has(tar.with_suffix(".parquet")) for tar in there)

    @property
    def remote(self) -> bool:
        """Whether tars of it need not be here to be read."""
        return self.store.url is not None and self._counted and all(map(self._has, map(_index_of, self.parts)))

    def _length(self, path: Path) -> int | None:
        stamp = self.store.stamp(path) if path.parent == self.folder else None
        return stamp[0] if stamp else None

    def _has(self, path: Path) -> bool:
        """Whether a file that was packed is there, in the length that it had."""
        return path in self._packed and self._length(path) == self._packed[path]["bytes"]

    def missing(self) -> list[str]:
        """The names of the tars that were packed and are not in this copy."""
        return [tar.name for tar in self._tars if tar not in self._part]

    def passed_over(self) -> list[str]:
        return [*not_in_copy(self.folder, self.missing()), *super().passed_over()]

    def file_sizes(self) -> list[tuple[str, int]]:
        return [(tar.name, self._packed[tar]["bytes"]) for tar in self.parts]

    # ---------------------------------------------------------------------------------------------- of all samples

    def columns(self, *names: str) -> Iterator[tuple[list[Any], ...]]:
        if not self.decoded:
            yield from super().columns(*names)
            return
        for part, tar in enumerate(self.parts):
            if part % _TABLES == 0:
                self.store.bring(path.with_suffix(".parquet") for path in self.parts[part : part + _TABLES])
            for table in self._tables(tar, names):
                found = []
                for name in names:
                    values = _plain(table[name]) if name in table.column_names else [None] * len(table)
                    if name == "caption":
                        values = [(v and v.strip()) or None for v in values]
                    found.append(values)
                yield tuple(found)

    def _tables(self, tar: Path, names: Sequence[str]) -> Iterator[pa.Table]:
        """The parquet beside a tar, a row group at a time: what it has of these columns, or else the key."""
        path = tar.with_suffix(".parquet")
        try:
            with pq.ParquetFile(path) as file:
                wanted, rows = [n for n in file.schema_arrow.names if n in names] or ["key"], file.metadata.num_rows
                if rows != self._count(tar):
                    raise UserError(f"{path}: has {rows:,} rows, and {tar.name} {self._count(tar):,} samples")
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group, wanted)
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{path}: cannot be read: {e}. Copy it again") from e

    def _count(self, tar: Path) -> int:
        part = self._part[tar]
        return self.ends[part] - (self.ends[part - 1] if part else 0)

    def has_captions(self) -> bool:
        if not self.decoded:
            return super().has_captions()
        return bool(self.default_caption) or any(any(captions) for (captions,) in self.columns("caption"))

    # ------------------------------------------------------------------------------------------------ of one sample

    def _read_starts(self, tar: Path) -> npt.NDArray[np.uint64] | None:
        """Where each sample of a tar begins, and where the last ends, (n + 1,); None where no index says so."""
        path = _index_of(tar)
        if not self._counted or not self._has(path):
            return None
        self.store.bring([path])
        starts = np.fromfile(path, "<u8")
        ends_within = len(starts) and starts[-1] <= self._packed[tar]["bytes"] and (starts[1:] > starts[:-1]).all()
        return starts if ends_within and len(starts) == self._count(tar) + 1 else None

    def _piece(self, index: int, most: int | None = None) -> tuple[Path, bytes] | None:
        """(tar, the bytes of a sample in it, or the first of them); None where its index does not say where it is."""
        tar, row = self.locate(index)
        starts = self._starts(tar)
        if starts is None:
            return None
        if self._changed is not None:
            raise self._changed
        start, end = starts[row : row + 2].tolist()
        length = min(end - start, most or end - start)
        if self.ahead is not None:
            self.ahead.wait(tar)
        try:
            with open(tar, "rb") as f:
                f.seek(start)
                data = f.read(length)
        except FileNotFoundError:
            stamp = self.store.stamp(tar)
            if self.store.url is None or stamp is None:
                raise UserError(f"{tar} is no longer there") from None
            try:
                data = self.store.read_range(tar, start, length, stamp)
            except FileChanged as e:
                raise UserError(f"{e} has changed meanwhile") from e
        if len(data) != length:
            raise CorruptShard(f"{tar}: {length} bytes expected at {start}, {len(data)} there")
        return tar, data

    def as_sample(self, index: int, image: bytes, facts: dict[str, Any]) -> Sample:
        made = self.captions_in(facts)
        caption = next(filter(None, made), None)
        key = str(facts.get("key") or self.key(index))
        return Sample(key, image, caption, {**facts, "caption": caption}, made)

    def key(self, index: int) -> str:
        piece = self._piece(index, 512)
        return super().key(index) if piece is None else _first_name(*piece).partition(".")[0]

    def path(self, index: int) -> str:
        piece = self._piece(index, 512)
        return super().path(index) if piece is None else _first_name(*piece)

    def image(self, index: int) -> bytes:
        return self._read(index)[0]

    def _read(self, index: int, image: bool = True, facts: bool = True) -> tuple[bytes, dict[str, Any]]:
        piece = self._piece(index)
        if piece is None:
            return super()._read(index, image, facts)
        tar, data = piece
        key, members = members_in(data, f"{tar}, sample {index}")
        found = image_member({name: (0, len(value)) for name, value in members.items()})
        if found is None:
            raise CorruptShard(f"{tar}: holds no image of {key}")
        if found[1][1] > LARGEST_IMAGE:
            raise RowError(Reason.TOO_LARGE, f"{found[1][1]:,} bytes; at most {LARGEST_IMAGE:,} are read")
        known, caption, where = {"key": key}, None, f"{tar}, {key}"
        if "json" in members and len(members["json"]) <= LARGEST_CAPTION:
            known = {"key": key, **json_in(members["json"], f"{where}.json", self.problems)}
        if "txt" in members and len(members["txt"]) <= LARGEST_CAPTION:
            caption = text_in(members["txt"], f"{where}.txt", self.problems)
        return members[found[0]], {**known, "caption": caption or caption_in(known)}

    # --------------------------------------------------------------------------------------------------- same bytes

    def check_bytes(self) -> None:
        """Of tars of at most AT_ONCE together. Of more `watch_bytes` does it, and of a store `ShardsAhead`."""
        here = [tar for tar in self.parts if self.store.url is None or tar.is_file()]
        if self._is_large():
            return
        with ThreadPoolExecutor() as pool:
            same = pool.map(lambda tar: sha256_once(tar) == self._packed[tar]["sha256"], here)
            self._refuse([tar for tar, is_same in zip(here, same, strict=True) if not is_same])

    def _is_large(self) -> bool:
        return sum(self._packed[tar]["bytes"] for tar in self.parts) > AT_ONCE

    def watch_bytes(self, rank: int = 0, ranks: int = 1) -> None:
        """Compare the tars of a large folder meanwhile, in a thread: this process its share of them.

        Whoever reads a sample after one of other bytes was found gets the error.
        """
        if self.remote or self._watched or not self._is_large():
            return
        self._watched = True

        def watch() -> None:
            for tar in self.parts[rank::ranks]:
                try:
                    self.check_tar(tar)
                except (UserError, OSError) as e:
                    self._changed = e if isinstance(e, UserError) else UserError(f"{tar}: cannot be read: {e}")
                    return

        threading.Thread(target=watch, name="bytes", daemon=True).start()

    def check_tar(self, tar: Path) -> None:
        """As `check_bytes`, of one tar that is here."""
        if sha256_once(tar) != self._packed[tar]["sha256"]:
            self._refuse([tar])

    def _refuse(self, wrong: list[Path]) -> None:
        if wrong:
            raise UserError(
                f"{self.folder}: {len(wrong):,} of its {len(self._tars):,} tars hold other bytes than were packed: "
                f"{first_three([tar.name for tar in wrong])}. Copy them again, or remove them from the folder"
            )


def _index_of(tar: Path) -> Path:
    return tar.with_suffix(".tar.idx")


def _first_name(tar: Path, head: bytes) -> str:
    """The name in the header that a sample begins with: its image's, as we write them."""
    name = head[:100].split(b"\0", 1)[0].decode(errors="replace")
    if "." not in name:
        raise CorruptShard(f"{tar}: holds no sample where its index says so")
    return name


def _plain(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column as the JSON of a sample has them: what is not finite is None."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
    return column.to_pylist()  # type: ignore[no-any-return]


def packed_tars(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The tars of a packed folder, each with its `sha256` and `bytes`, by its manifest; None where it has none."""
    return {name: fact for name, fact in packed_files(folder).items() if name.endswith(".tar")} or None


def not_in_copy(folder: Path, missing: list[str] | None = None) -> list[str]:
    """Which of the tars that were packed a copy of them lacks, in a sentence; nothing where none, or nothing packed.

    `missing`: where that is known already.
    """
    packed = packed_tars(folder) or {}
    if missing is None:
        missing = [name for name in sorted(packed) if not (folder / name).is_file()]
    return missing and [
        f"{len(missing):,} of the {len(packed):,} shards that were packed are not in this copy, "
        f"which is used without them: {first_three(missing)}"
    ]


class ShardsAhead:
    """Whole tars of a store, fetched before their samples are read, compared with the manifest, let go of after.

    While it is open, whoever reads a sample of a tar that is wanted waits until that is here. What is let go of stays
    in the machine's bounded cache (curate.store.cache), for the other processes and for the next epoch.
    """

    def __init__(self, samples: PackedShards) -> None:
        self._samples, self._here = samples, dict[Path, Future[None]]()
        self._pool = ThreadPoolExecutor(_FETCHES, thread_name_prefix="shards")
        samples.ahead = self

    def want(self, parts: Iterable[int]) -> None:
        """Fetch these, first to last, as far as they are not here or on their way; let go of all others."""
        wanted = [self._samples.parts[part] for part in parts]
        for tar in self._here.keys() - {*wanted}:
            if not self._here.pop(tar).cancel():
                self._pool.submit(self._samples.store.release, [tar])
        for tar in wanted:
            if tar not in self._here:
                self._here[tar] = self._pool.submit(self._fetch, tar)

    def wait(self, tar: Path) -> None:
        """Until a tar is here, if it is wanted at all."""
        if (future := self._here.get(tar)) is not None:
            future.result()

    def _fetch(self, tar: Path) -> None:
        self._samples.store.bring([tar])
        self._samples.check_tar(tar)

    def close(self) -> None:
        """Let go of all."""
        self._samples.ahead = None
        self.want([])
        self._pool.shutdown(wait=False)
