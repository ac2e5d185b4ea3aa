"""img2dataset as the download engine: it fetches and resizes one shard, and its outcomes become ours.

It runs in a child process, because it starts pools and loggers of its own. It serves people who have tuned it, and the
tests as an independent second opinion. It has no address guard, no robots.txt, no size limit: whoever chooses it for a
list from the web should run it where nothing private can be reached.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curate.fetch import FetchConfig
from curate.folders import reason_of
from curate.images import ImagesConfig, decode, perceptual_hash
from curate.ledger import FETCHED_COLUMNS, Status
from curate.shards import image_member, index_tar, read_range
from curate.store import UserError

_DIRECTIVES = ["noai", "noimageai", "noindex", "noimageindex"]


def require() -> None:
    """UserError where img2dataset cannot be used here, saying why."""
    import importlib.util

    if importlib.util.find_spec("img2dataset") is None:
        why = (
            "it cannot be imported on Python 3.13 and later (it needs the module imghdr): "
            "use Python 3.12, or the native engine"
            if sys.version_info >= (3, 13)
            else "pip install 'tastemaker[img2dataset]'"
        )
        raise UserError(f"fetch.engine: img2dataset is not installed: {why}")


def download(
    rows: Sequence[tuple[int, str | None]], fetch: FetchConfig, images: ImagesConfig, folder: Path
) -> Iterator[tuple[int, dict[str, Any], bytes | None, str]]:
    """Have img2dataset fetch (number, url) rows into `folder`, and yield (number, facts, image, extension) for each.

    Raises RuntimeError with its last words where it fails as a whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers, urls = zip(*rows, strict=True) if rows else ((), ())
    pq.write_table(
        pa.table({"url": pa.array(urls, pa.string()), "row": pa.array(numbers, pa.int64())}), folder / "list.parquet"
    )
    options = {
        "url_list": str(folder / "list.parquet"),
        "input_format": "parquet",
        "url_col": "url",
        "save_additional_columns": ["row"],
        "output_folder": str(folder / "out"),
        "output_format": "webdataset",
        "image_size": images.size,
        "resize_mode": images.mode,
        "resize_only_if_bigger": images.only_if_bigger,
        "encode_format": images.format,
        **({"encode_quality": images.quality} if images.quality is not None else {}),
        "processes_count": 1,
        "thread_count": min(fetch.concurrency, 256),
        "timeout": max(1, round(fetch.timeout)),
        "retries": fetch.retries,
        "number_sample_per_shard": max(len(rows), 1),
        "compute_hash": "sha256",
        "extract_exif": images.exif,
        "user_agent_token": "tastemaker",
        "disallowed_header_directives": _DIRECTIVES if "x-robots-tag" in fetch.respect else [],
    }
    environment = {**os.environ, "WANDB_MODE": "disabled", "NO_ALBUMENTATIONS_UPDATE": "1"}
    program = "import json, sys, img2dataset; img2dataset.download(**json.load(sys.stdin))"
    try:
        child = subprocess.run(
            [sys.executable, "-c", program], input=json.dumps(options), capture_output=True, text=True, env=environment
        )
        table = folder / "out" / "00000.parquet"
        if child.returncode or not table.exists():
            raise RuntimeError(f"img2dataset ended with {child.returncode}: {child.stderr.strip()[-500:]}")
        yield from _outcomes(table, folder / "out" / "00000.tar")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _outcomes(table: Path, tar: Path) -> Iterator[tuple[int, dict[str, Any], bytes | None, str]]:
    index = index_tar(tar)
    with open(tar, "rb") as f:
        for row in pq.read_table(table).to_pylist():
            facts: dict[str, Any] = {name: row.get(name) for name, _ in FETCHED_COLUMNS}
            image, extension = None, ""
            if row["status"] == Status.SUCCESS:
                found = image_member(index[row["key"]])
                assert found is not None, f"img2dataset wrote no image for {row['url']}"
                extension, image = found[0], read_range(f, found[1])
                facts["phash"] = perceptual_hash(decode(image))
                facts["error_message"] = None
            else:
                reason = reason_of(row["error_message"] or "", row["status"])
                facts |= {"reason": reason.value, "status": reason.status.value}
            yield row["row"], facts, image, extension
