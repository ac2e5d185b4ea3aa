"""What the shipped annotators of pixels and captions cost: `python -m bench.annotate [--images FOLDER]`.

Images are fetched into one shard at 512 pixels. Each annotator then runs alone over images that are decoded already,
and all run together as the embed stage runs them, each image decoded once. Counted is CPU time, of one thread each, so
other work on the machine changes little. Without --images: parts of scikit-learn's two photographs, each another.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.embed import make_shard
from curate.annotators.base import Annotator, ImageBatch, Resources
from curate.annotators.registry import make_annotators
from curate.annotators.stage import ask
from curate.encoders.embed import EmbedConfig, images_of
from curate.fetch.config import FetchConfig
from curate.images.config import ImagesConfig
from curate.images.decode import decode
from curate.layout import Data
from curate.shards.tar import read_images
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from curate.workers import EmbedWorker, FetchWorker

COLUMNS = ("pdq", "open-nsfw", "quality", "borders", "text", "faces", "language", "caption-stats")
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.annotate", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="a folder of photographs")
    parser.add_argument("--count", type=int, default=1000, help="images at most (default: %(default)s)")
    parser.add_argument("--columns", nargs="*", default=COLUMNS, metavar="ANNOTATOR")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, last")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        data = make_shard(root, options.count) if options.images is None else fetched(root, options)
        found = measure(data, {name.replace("-", "_"): name for name in options.columns})
    for name, ms in found.items():
        print(f"{name:34} {ms:9.2f}" + ("" if name in ("images", "share of decoding") else " ms of a core per image"))
    if options.json:
        print(json.dumps(found))


def fetched(root: Path, options: argparse.Namespace) -> Data:
    """Images of a folder as a fetched shard; of a small folder each several times, under names of their own."""
    files = sorted(p for p in options.images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    (root / "images").mkdir()
    for i in range(options.count):
        (root / "images" / f"{i:05d}{files[i % len(files)].suffix}").symlink_to(files[i % len(files)].absolute())
    make_plan(str(root / "images"), Data(root / "data"), SourceConfig(), None)
    data = Data(root / "data")

    async def fetch() -> None:
        worker = FetchWorker(data, FetchConfig(), ImagesConfig(), "c")
        for shard in data.plan.shards:
            await worker.run(shard.shard)
        await worker.close()

    asyncio.run(fetch())
    return data


def measure(data: Data, columns: Mapping[str, str]) -> dict[str, float]:
    """CPU milliseconds per image: of decoding, of each annotator, of the stage with all of them."""
    shards = [s.shard for s in data.plan.shards]
    count = sum(len(images_of(data, shard, ["key"])) for shard in shards)
    annotators = make_annotators(columns)
    resources = Resources(threads=1, space=None, encoder=lambda: None)  # type: ignore[arg-type, return-value]
    for annotator in annotators.values():
        annotator.load(resources)
    spent = dict.fromkeys(["decoding", *annotators], 0.0)
    for shard in shards:
        rows, stored = images_of(data, shard), read_images(data.tar(shard))
        for start in range(0, len(rows), BATCH):
            part = rows.slice(start, BATCH)
            began = time.process_time()
            pixels = [decode(image) for _, (_, _, image) in zip(range(len(part)), stored, strict=False)]
            spent["decoding"] += time.process_time() - began
            for name, annotator in annotators.items():
                spent[name] += cpu_of(annotator, part, pixels)

    worker = EmbedWorker(data, EmbedConfig(), columns, "", threads=1, vectors=False)
    began = time.process_time()
    for shard in shards:
        worker.run(shard)
    together = time.process_time() - began
    found: dict[str, float] = {"images": count}
    found |= {name: 1000 * seconds / count for name, seconds in spent.items()}
    found["all together, as the stage runs"] = 1000 * together / count
    found["share of decoding"] = spent["decoding"] / together
    alone = sum(spent[n] + (spent["decoding"] if a.reads == "pixels" else 0) for n, a in annotators.items())
    found["each alone, decoding for itself"] = 1000 * alone / count
    return found


def cpu_of(annotator: Annotator, rows: Any, pixels: list[np.ndarray]) -> float:
    """CPU seconds of an annotator over a batch."""
    began = time.process_time()
    inputs = [annotator.preprocess(image) for image in pixels] if annotator.reads == "pixels" else ()
    ask(annotator, ImageBatch(rows=rows, inputs=inputs))
    return time.process_time() - began


if __name__ == "__main__":
    main()
