"""A list of thousands of rows whose images cost little, for trials that are compared with the whole."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_sample_images

from demo.web import Route, Web

IMAGES = 40  # that differ; each is served under many URLs


@dataclass(frozen=True)
class Trial:
    """A server, its list sorted by site, and the settings that reach it."""

    web: Web
    list: Path
    rows: int
    settings: list[str]


@contextlib.contextmanager
def small_trial(folder: Path, rows: int, hosts: int = 12, delay: float = 0.0) -> Iterator[Trial]:
    """Serve crops of photographs, 90 to 330 pixels wide, under `rows` URLs; the later the site in the list, the more of
    its rows are 404. So a trial of the first rows would say nothing of the others."""
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(i) for i in load_sample_images().images]
    routes: dict[str | tuple[int, str], Route] = {}
    for number in range(IMAGES):
        side, out = int(rng.integers(90, 330)), io.BytesIO()
        left, top = (int(rng.integers(0, most - side)) for most in (640, 427))
        photographs[number % 2].crop((left, top, left + side, top + side)).save(out, "JPEG", quality=90)
        routes[f"/{number}.jpg"] = Route(body=out.getvalue(), content_type="image/jpeg", delay=delay)
    for row in range(rows):
        if rng.random() >= 0.6 * row / rows:
            routes[f"/{row}/"] = routes[f"/{int(rng.integers(IMAGES))}.jpg"]
    with Web(routes, hosts=hosts) as web:
        urls = [web.url(row * hosts // rows, f"/{row}/") for row in range(rows)]
        captions = [f"a photograph, row {row}" for row in range(rows)]
        pq.write_table(pa.table({"url": urls, "caption": captions}), folder / "list.parquet")
        settings = [f'fetch.allow=["127.0.0.0/8:{web.port}"]', "fetch.retries=0", "fetch.rate=0", "images.size=256"]
        yield Trial(web, folder / "list.parquet", rows, settings)
