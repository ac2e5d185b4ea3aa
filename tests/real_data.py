"""A data folder that the real stages made, without Ray: 40 rows over HTTP, 4 of them failing, in 3 shards.

The images are parts of scikit-learn's two photographs and the probe images; the encoder is the bundled one.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from aesthetic.space import probe_files
from curate.encoders.embed import EmbedConfig
from curate.fetch.config import FetchConfig
from curate.images.config import ImagesConfig
from curate.layout import Data
from curate.ledger.select import SelectConfig, select
from curate.shards.pack import PackConfig, pack
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from curate.workers import EmbedWorker, FetchWorker
from demo.web import Route, Web

SELECTION = "bundled"  # as the snippets of docs/formats.md call it
SHARD_SIZE = 15  # rows of the list per shard: keys have two digits for the row
PACKED = 13  # samples per packed shard at most
IMAGES = ImagesConfig(size=96)
BUNDLED = EmbedConfig(encoder="bundled")
SCORE = {"aesthetic": "bundled-aesthetic", "open_nsfw": "open-nsfw"}


def image_files() -> list[bytes]:
    """36 images as files: 20 JPEG parts of two photographs, and the 16 probes (JPEG and PNG)."""
    from sklearn.datasets import load_sample_image

    files = []
    for name in ("china.jpg", "flower.jpg"):
        photo = load_sample_image(name)  # (427, 640, 3) uint8
        for i in range(10):
            top, left = 20 * i, 35 * i
            data = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(photo[top : top + 200, left : left + 240])).save(data, "JPEG")
            files.append(data.getvalue())
    return files + probe_files()


def make_real_data(root: Path, captions: Mapping[int, str] | None = None) -> Data:
    """List, plan, fetch, embed, score, select and pack under `root`; returns the data folder.

    captions: number of an image -> what is said of it, in place of the usual.
    """
    routes: dict[str | tuple[int, str], Route] = {
        f"/{i}": Route(body=file, content_type="image/jpeg") for i, file in enumerate(image_files())
    }
    routes["/page"] = Route(body=b"<!doctype html><p>gone", content_type="text/html")
    with Web(routes) as web:
        paths = [*(f"/{i}" for i in range(36)), "/page", "/no", "/page?2", "/no?2"]
        order = np.random.default_rng(0).permutation(len(paths))
        rows = {
            "url": [web.url(0, paths[i]) for i in order],
            "caption": [(captions or {}).get(int(i), None if i % 4 == 1 else f"picture {i}, naïve “ö”") for i in order],
            "WIDTH": pa.array([200 + int(i) for i in order], pa.int32()),
            "uid": [f"{int(i) * 0x9E3779B97F4A7C15:032x}"[-32:] for i in order],
        }
        pq.write_table(pa.table(rows), root / "list.parquet")
        make_plan(str(root / "list.parquet"), Data(root / "data"), SourceConfig(shard_size=SHARD_SIZE), None)
        data = Data(root / "data")
        fetch = FetchConfig(allow=(f"127.0.0.0/8:{web.port}",), retries=0, respect=())
        fetch_all(data, fetch)
    embed_all(data, BUNDLED, SCORE)
    select(data, SelectConfig(name=SELECTION, rules={"seen": "width > 0"}))
    pack(data, SELECTION, PackConfig(shard_size=PACKED))
    return data


def fetch_all(data: Data, config: FetchConfig | None = None) -> None:
    """Fetch and decode every shard, as the job's workers do."""

    async def run() -> None:
        worker = FetchWorker(data, config or FetchConfig(), IMAGES, "c")
        try:
            await asyncio.gather(*(worker.run(s.shard) for s in data.plan.shards))
        finally:
            await worker.close()

    asyncio.run(run())


def embed_all(data: Data, config: EmbedConfig, score: dict[str, str]) -> None:
    """Embed and score every shard, as the job's workers do."""
    worker = EmbedWorker(data, config, score, "c")
    for s in data.plan.shards:
        worker.run(s.shard)
