"""The order of packed samples, and putting samples into it with bounded memory and each source read once.

A sample's place is the rank of a hash of its key and the seed. First the hashes at which packed shards begin are found;
then samples come in the order of their sources and are appended to buckets, scratch files of one packed shard or a few;
then each bucket is read, put in order and removed. Memory holds what is not yet appended and the rows of one bucket,
never its images. The disk holds every sample twice, but for the buckets that are gone.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.files import as_disk_full
from curate.ledger.rules import KEPT
from curate.store.files import check_space

Hashes = npt.NDArray[np.uint64]

BUCKETS = 1024
"""At most so many buckets. A bucket's rows are held in memory: of a billion samples, a million rows."""

_BINS = 22  # bits of a hash by which rows are counted
_HELD = 64 << 20  # bytes of samples, and of rows, that wait to be appended
_ROWS = 1 << 16  # rows that wait: each bucket gets a piece of them, and pieces cost 0.1 ms


def cuts(count: int, shard_size: int) -> list[int]:
    """Where shards begin and end: as few as shard_size allows, of sizes that differ by one at most."""
    shards = math.ceil(count / shard_size)
    return [count * i // shards for i in range(shards + 1)]


def order_hashes(keys: Iterable[str], seed: int) -> Hashes:
    """The hashes by which samples are ordered; those of equal ones by key."""
    keyed = str(seed).encode()
    return np.frombuffer(
        b"".join(hashlib.blake2b(key.encode(), digest_size=8, key=keyed).digest() for key in keys), ">u8"
    ).astype(np.uint64)


def first_hashes(batches: Callable[[], Iterator[Hashes]], ranks: Sequence[int]) -> Hashes:
    """The hashes of these ranks (0: the least). `batches` gives all hashes, and is asked twice; memory holds counts."""
    counts = np.zeros(1 << _BINS, np.int64)
    for hashes in batches():
        counts += np.bincount((hashes >> np.uint64(64 - _BINS)).astype(np.int64), minlength=len(counts))
    ends = np.cumsum(counts)
    bins = np.searchsorted(ends, ranks, side="right")  # of a rank, the bin in which it lies
    wanted = np.zeros(len(counts), bool)
    wanted[bins] = True
    found = [hashes[wanted[(hashes >> np.uint64(64 - _BINS)).astype(np.int64)]] for hashes in batches()]
    near = np.sort(np.concatenate(found)) if found else np.zeros(0, np.uint64)
    starts = np.searchsorted(near, bins.astype(np.uint64) << np.uint64(64 - _BINS))
    return near[starts + np.asarray(ranks, np.int64) - (ends - counts)[bins]]


class KeptKeys:
    """The keys that a selection kept, each with its hash, a window of them at a time.

    Verdicts are in the order of keys, as shards are; a shard of lower keys than the one before costs a new beginning.
    """

    _from: int
    _window: Hashes  # keys
    _of: Hashes  # the hashes of these

    def __init__(self, verdicts: Path, hashes: Path, seed: int) -> None:
        """Computes the hashes, into the scratch file `hashes`."""
        self._verdicts, self._file = verdicts, hashes
        with open(hashes, "wb") as f:
            for keys in self._kept():
                f.write(order_hashes(keys.to_pylist(), seed).tobytes())
        self._begin()

    def hashes(self) -> Iterator[Hashes]:
        """All hashes, in pieces."""
        with open(self._file, "rb") as f:
            while len(piece := np.fromfile(f, np.uint64, 1 << 17)):
                yield piece

    def among(self, keys: Hashes) -> tuple[npt.NDArray[np.bool_], Hashes]:
        """Which of these keys (as numbers, at least one) are kept, and the hashes of those that are."""
        low, high = int(keys.min()), int(keys.max())
        if low < self._from:
            self._begin()
        first = np.searchsorted(self._window, np.uint64(low))
        self._from, self._window, self._of = low, self._window[first:], self._of[first:]
        while not len(self._window) or self._window[-1] < high:
            more = next(self._batches, None)
            if more is None:
                break
            self._window = np.concatenate([self._window, more[0]])
            self._of = np.concatenate([self._of, more[1]])
        if not len(self._window):
            return np.zeros(len(keys), bool), np.zeros(0, np.uint64)
        places = np.minimum(np.searchsorted(self._window, keys), len(self._window) - 1)
        kept = self._window[places] == keys
        return kept, self._of[places[kept]]

    def _begin(self) -> None:
        self._batches = self._with_hashes()
        self._from = 0  # what is lower is not in the window any more
        self._window = np.zeros(0, np.uint64)
        self._of = np.zeros(0, np.uint64)

    def _with_hashes(self) -> Iterator[tuple[Hashes, Hashes]]:
        with open(self._file, "rb") as f:
            for keys in self._kept():
                yield keys.cast(pa.uint64()).to_numpy(), np.fromfile(f, np.uint64, len(keys))

    def _kept(self) -> Iterator[pa.Array]:
        with pq.ParquetFile(self._verdicts) as file:
            for batch in file.iter_batches(1 << 17):
                yield batch["key"].filter(pc.equal(batch["verdict"].cast(pa.string()), KEPT))


class Buckets:
    """Samples and their rows, appended in any order, to be read in that of their hashes."""

    def __init__(self, folder: Path, firsts: Hashes, schema: pa.Schema) -> None:
        """folder: for scratch files; firsts: the hashes at which shards begin, but for the first shard."""
        self._folder, self._firsts, self._schema = folder, firsts, schema
        self._each = math.ceil((len(firsts) + 1) / BUCKETS)  # shards of a bucket
        self.count = math.ceil((len(firsts) + 1) / self._each)
        own = [pa.field("#hash", pa.uint64()), pa.field("#at", pa.int64()), pa.field("#size", pa.int64())]
        self._stored = pa.schema([*schema, *own])
        self._lengths = np.zeros(self.count, np.int64)  # of the files of samples, with what waits
        self._samples: dict[int, list[bytes]] = {}
        self._tables: list[pa.Table] = []
        self._held = self._text = self._rows = 0

    def add(self, rows: pa.Table, hashes: Hashes, samples: Sequence[bytes]) -> None:
        """Append samples (members of a tar, of `hashes`) and their rows."""
        at = np.zeros(len(samples), np.int64)
        for i, bucket in enumerate(self._bucket(hashes).tolist()):
            at[i] = self._lengths[bucket]
            self._lengths[bucket] += len(samples[i])
            self._samples.setdefault(bucket, []).append(samples[i])
            self._held += len(samples[i])
            if self._held >= _HELD:
                self._append_samples()
        own = [hashes, at, np.fromiter(map(len, samples), np.int64, len(samples))]
        self._tables.append(pa.table([*rows.columns, *map(pa.array, own)], schema=self._stored))
        self._text, self._rows = self._text + rows.nbytes, self._rows + len(rows)
        if self._text >= _HELD or self._rows >= _ROWS:
            self._append_rows()

    def shards(self) -> Iterator[tuple[pa.Table, Iterator[bytes]]]:
        """The rows and samples of each shard, in order. A bucket is removed when its last shard was taken."""
        self._append_samples()
        self._append_rows()
        for bucket in range(self.count):
            with open(self._file(bucket, "rows"), "rb") as f, open(self._file(bucket, "samples"), "rb") as samples:
                rows = pa.ipc.open_stream(f).read_all()
                hashes = rows["#hash"].to_numpy()
                order = np.lexsort((rows["key"].cast(pa.uint64()).to_numpy(), hashes))
                ends = np.searchsorted(hashes[order], self._firsts[bucket * self._each :][: self._each])
                shards = [*[0, *ends.tolist()][: self._each], len(order)]
                for start, end in itertools.pairwise(shards):
                    part = rows.take(order[start:end]).combine_chunks()
                    places = zip(part["#at"].to_pylist(), part["#size"].to_pylist(), strict=True)
                    yield part.select(self._schema.names), (os.pread(samples.fileno(), n, at) for at, n in places)
            self._file(bucket, "rows").unlink()
            self._file(bucket, "samples").unlink()

    def _bucket(self, hashes: Hashes) -> npt.NDArray[np.int64]:
        return np.searchsorted(self._firsts, hashes, side="right") // self._each

    def _append_samples(self) -> None:
        for bucket, samples in self._samples.items():
            self._append(self._file(bucket, "samples"), samples)
        self._samples, self._held = {}, 0

    def _append_rows(self) -> None:
        if not self._tables:
            return
        table = pa.concat_tables(self._tables)
        buckets = self._bucket(table["#hash"].to_numpy())
        order = np.argsort(buckets, kind="stable")
        table, buckets = table.take(order), buckets[order]
        there, starts = np.unique(buckets, return_index=True)
        for bucket, start, end in zip(there.tolist(), starts, [*starts[1:], len(buckets)], strict=True):
            file = self._file(bucket, "rows")
            head = [] if file.exists() else [self._stored.serialize()]
            self._append(file, [*head, *(b.serialize() for b in table.slice(start, end - start).to_batches())])
        self._tables, self._text, self._rows = [], 0, 0

    def _append(self, file: Path, parts: Sequence[bytes | pa.Buffer]) -> None:
        check_space(self._folder, sum(map(len, parts)))
        try:
            with open(file, "ab") as f:
                f.writelines(parts)
        except OSError as e:
            raise as_disk_full(e, self._folder) from e

    def _file(self, bucket: int, kind: str) -> Path:
        return self._folder / f"{bucket:04d}.{kind}"
