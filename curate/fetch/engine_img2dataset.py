"""img2dataset as the download engine: it fetches and resizes one shard, and its results become ours.

It runs in a child process, because it starts pools and loggers of its own. It serves people who have tuned it, and the
tests as an independent second opinion. What it does not do: check addresses, read robots.txt, bound the bytes of an
answer or the requests to one host, turn images upright by their EXIF. Whoever chooses it for a list from the web
should run it where nothing private can be reached.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from curate.fetch.config import FetchConfig
from curate.images.config import ImagesConfig
from curate.images.decode import decode
from curate.images.process import perceptual_hash
from curate.ledger.schema import FETCHED_COLUMNS, Reason, RowError, Status, failure_facts
from curate.shards.tar import image_member, index_tar, read_range
from curate.sources.img2dataset import reason_of

_QUALITY = {"jpg": 95, "webp": 95, "png": 6}  # ours where none is given; img2dataset's own 95 is no level for png


def require(images: ImagesConfig) -> None:
    """UserError where img2dataset cannot be used here or cannot do what is asked, saying why."""
    import importlib.util

    if importlib.util.find_spec("img2dataset") is None:
        why = (
            "it cannot be imported on Python 3.13 and later (it needs the module imghdr): "
            "use Python 3.12, or `--set fetch.engine=native`"
            if sys.version_info >= (3, 13)
            else "pip install 'tastemaker[img2dataset]', or `--set fetch.engine=native`"
        )
        raise UserError(f"fetch.engine: img2dataset is not installed: {why}")
    if images.keep_original:
        raise UserError(
            "images.keep_original: img2dataset would keep what lies beside the image (EXIF, places, names) as well. "
            "`--set images.keep_original=false`, or `--set fetch.engine=native`"
        )
    if images.blur_faces:
        raise UserError(
            "images.blur_faces: img2dataset looks for no faces. `--set images.blur_faces=false`, or "
            "`--set fetch.engine=native`"
        )


def download(
    urls: Mapping[int, str | None], fetch: FetchConfig, images: ImagesConfig, folder: Path
) -> Iterator[tuple[int, dict[str, Any], bytes | None, str]]:
    """Have img2dataset fetch rows (index -> URL) into `folder`, and yield (index, facts, image, extension) for each.

    The folder is removed in the end. Raises RuntimeError with its last words where it fails as a whole.
    """
    if not urls:
        return
    folder.mkdir(parents=True)
    try:
        table = pa.table({"url": pa.array(urls.values(), pa.string()), "row": pa.array(urls.keys(), pa.int64())})
        pq.write_table(table, folder / "list.parquet")
        _run(_options(len(urls), fetch, images, folder), folder)
        missing = set(urls)
        for result in _results(folder / "out" / "00000.parquet"):
            missing.remove(result[0])
            yield result
        for index in sorted(missing):  # it prints what went wrong while it wrote a sample, and goes on without it
            lost = RowError(Reason.CRASHED, "img2dataset lost this row: it says nothing of it")
            yield index, failure_facts(lost), None, ""
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _options(count: int, fetch: FetchConfig, images: ImagesConfig, folder: Path) -> dict[str, Any]:
    """Our settings under img2dataset's names."""
    directives = ["noai", "noimageai", "noindex", "noimageindex", "none"]
    return {
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
        "encode_quality": _QUALITY[images.format] if images.quality is None else images.quality,
        "max_image_area": images.max_pixels,
        "extract_exif": images.exif,
        "processes_count": 1,
        "thread_count": min(fetch.concurrency, 256),
        "timeout": max(1, round(fetch.timeout)),
        "retries": fetch.retries,
        "number_sample_per_shard": count,
        "compute_hash": "sha256",
        "user_agent_token": "tastemaker",
        "disallowed_header_directives": directives if "x-robots-tag" in fetch.respect else [],
    }


def _run(options: dict[str, Any], folder: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
        "WANDB_MODE": "disabled",
        "NO_ALBUMENTATIONS_UPDATE": "1",  # else a library of its asks the network for its newest version
    }
    serve = "from curate.fetch.engine_img2dataset import _serve; _serve()"
    log = folder / "log"
    with (
        open(log, "wb") as out,
        subprocess.Popen(
            [sys.executable, "-c", serve], stdin=-1, stdout=out, stderr=out, env=environment, start_new_session=True
        ) as child,
    ):
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(options).encode() + b"\n")
            child.stdin.flush()
        except BrokenPipeError:
            pass  # it ended at once; its log says why
        # with its stdin open: it ends when that closes, so it cannot outlive us; nor shall its children outlive it
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        os.killpg(child.pid, signal.SIGKILL)
    # its record, written last; without it a shard has failed, though it ends with 0
    if child.returncode or not (folder / "out" / "00000_stats.json").exists():
        last = log.read_text(errors="replace").strip()[-2000:]  # its processes may all have some
        raise RuntimeError(f"img2dataset failed (exit code {child.returncode}). Its last words:\n{last}")


def _serve() -> None:
    """The child: img2dataset, until it ends, one of its processes dies, or our parent does."""
    import img2dataset

    options = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_watch, daemon=True).start()
    img2dataset.download(**options)


def _watch() -> None:
    """End this process and its children when stdin closes, or when one of them died: its pool would wait for ever."""
    children: set[multiprocessing.process.BaseProcess] = set()
    while not select.select([0], [], [], 0.2)[0]:
        children.update(multiprocessing.active_children())
        for child in children:
            if child.exitcode not in (None, 0, -signal.SIGTERM):  # with SIGTERM it ends its pool itself
                print(f"its process {child.name} died (exit code {child.exitcode})", file=sys.stderr, flush=True)
                os.killpg(0, signal.SIGKILL)
    os.killpg(0, signal.SIGKILL)


def _results(table: Path) -> Iterator[tuple[int, dict[str, Any], bytes | None, str]]:
    tar = table.with_suffix(".tar")
    members = index_tar(tar)
    with open(tar, "rb") as f:
        for row in pq.read_table(table).to_pylist():
            if row["status"] != Status.SUCCESS:
                message = row["error_message"] or ""
                yield row["row"], failure_facts(RowError(reason_of(message, row["status"]), message)), None, ""
                continue
            found = image_member(members[row["key"]])
            assert found is not None, f"img2dataset wrote no image for {row['url']}"
            image = read_range(f, found[1])
            facts = {name: row.get(name) for name, _ in FETCHED_COLUMNS}
            facts["phash"] = perceptual_hash(decode(image))
            yield row["row"], facts, image, found[0]
