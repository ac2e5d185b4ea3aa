"""What the tars of others hold, kept: where each sample lies, its caption and its JSON, so that each tar is read once.

    CACHE/indexes/DIGEST.parquet    one for each tar of many samples; CACHE as in curate.store.cache

Without one, each start of a run would read all headers of a tar, in each of its processes, and all captions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.errors import DiskFull, UserError
from aesthetic.files import atomic
from curate.store.cache import cache_folder
from curate.store.files import digest
from curate.store.mirror import store_at

FROM = 1000
"""Samples from which on what a tar holds is kept."""

_FORMAT = 1  # part of the name
_TICK = 2_000_000_000  # nanoseconds: a file that was written just now may be written again at the same time
_SPANS = [f"{what}_{of}" for what in ("image", "json", "text") for of in ("at", "size")]
_COUNTS = b"counts"


def kept_path(tar: Path, kind: str | None) -> Path | None:
    """Where what a tar holds is kept, if it is: by its path, length and time, and the kind of image that is meant.

    None where it would not be known again: where it is a copy of what lies on a store, or just written.
    """
    stat = tar.stat()
    if store_at(tar).url is not None or time.time_ns() - stat.st_mtime_ns < _TICK:
        return None
    try:
        folder = cache_folder() / "indexes"
        folder.mkdir(exist_ok=True)
    except (UserError, OSError):  # it is a convenience
        return None
    return folder / f"{digest([_FORMAT, str(tar.absolute()), stat.st_size, stat.st_mtime_ns, kind])}.parquet"


def keep(
    path: Path,
    keys: npt.NDArray[np.str_],
    extensions: npt.NDArray[np.str_],
    spans: npt.NDArray[np.int64],
    facts: Sequence[dict[str, Any]],
    counts: dict[str, Any],
) -> None:
    """Write what one tar holds: what `places` and `columns` give again. counts: what JSON can hold."""
    columns: dict[str, Any] = {
        "key": pa.array(keys.tolist(), pa.string()),
        "extension": pa.array(extensions.tolist(), pa.string()),
        **dict(zip(_SPANS, spans.reshape(len(keys), 6).T, strict=True)),
    }
    try:
        columns["name"] = pa.array([str(f["key"]) if "key" in f else None for f in facts], pa.string())
        columns["caption"] = pa.array([f["caption"] for f in facts], pa.string())
        columns["facts"] = pa.array([json.dumps(f) for f in facts], pa.string())
        table = pa.table(columns).replace_schema_metadata({_COUNTS: json.dumps(counts).encode()})
        with atomic(path) as f:
            pq.write_table(table, f, compression="zstd")
    except (OSError, DiskFull, UnicodeError, pa.ArrowException):  # of a text that no table holds, too
        return


def places(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.int64], dict[str, Any]] | None:
    """(keys, extensions, spans (n, 3, 2), counts) of a tar; None where none are kept."""
    try:
        table = pq.read_table(path, columns=["key", "extension", *_SPANS])
    except (OSError, pa.ArrowException):
        return None
    keys, extensions = (np.array(table[name].to_pylist(), str) for name in ("key", "extension"))
    spans = np.stack([table[name].to_numpy() for name in _SPANS], 1).reshape(-1, 3, 2)
    return keys, extensions, spans, json.loads(table.schema.metadata[_COUNTS])


def columns(path: Path, names: Sequence[str]) -> Iterator[tuple[list[Any], ...]] | None:
    """As MapDataset.columns, of one tar, a row group at a time; a key that is none is None. None where none is kept."""
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException):
        return None
    return _columns(file, names)


def _columns(file: pq.ParquetFile, names: Sequence[str]) -> Iterator[tuple[list[Any], ...]]:
    plain = {"key": "name", "caption": "caption"}
    wanted = list(dict.fromkeys(plain.get(name, "facts") for name in names))
    with file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, wanted)
            facts = [json.loads(text) for text in table["facts"].to_pylist()] if "facts" in wanted else []
            yield tuple(
                table[plain[name]].to_pylist() if name in plain else [f.get(name) for f in facts] for name in names
            )
