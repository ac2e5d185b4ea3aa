"""How near the embed stage comes to what its models and decoders can do here: `python -m bench.embed`.

Images of 683 x 512 are fetched from a folder into a shard; then, in turns, the whole stage runs over the shard, and
its parts run alone: the models over prepared arrays, decoding and preprocessing in threads. All are bound by the CPU,
so the stage can at best take the sum of what its parts take: the ceiling. The best of several rounds counts. Measure on
a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from curate.annotators.base import ImageBatch
from curate.encoders.embed import EmbedConfig
from curate.fetch.config import FetchConfig
from curate.images.config import ImagesConfig
from curate.images.decode import decode
from curate.layout import Data
from curate.shards.tar import read_images
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from curate.workers import EmbedWorker, FetchWorker

SCORES = {"open_nsfw": "open-nsfw"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.embed", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=256, help="images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the best counts (default: %(default)s)")
    parser.add_argument("--encoder", default="bundled")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, last")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = make_shard(Path(scratch), options.count)
        rates = measure(data, options.encoder, options.rounds)
    for name, facts in rates.items():
        first, second = facts.values()
        units = ("of the rate", "of the work") if "over" in name else ("images/s", "ms of a core per image")
        print(f"{name:42} {first:8.2f} {units[0]:12} {second:8.2f} {units[1]}")
    if options.json:
        print(json.dumps(rates))


def make_shard(root: Path, count: int) -> Data:
    """Parts of scikit-learn's photographs, each another, as a fetched shard."""
    from sklearn.datasets import load_sample_image

    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    dice = np.random.default_rng(0)
    (root / "pictures").mkdir()
    for i in range(count):
        left, top = int(dice.integers(0, 200)), int(dice.integers(0, 80))
        part = photos[i % 2].crop((left, top, left + 440, top + 330)).resize((683, 512), Image.Resampling.LANCZOS)
        part.save(root / "pictures" / f"{i:05d}.jpg", quality=95)
        (root / "pictures" / f"{i:05d}.txt").write_text(f"part {i} of a photograph")
    make_plan(str(root / "pictures"), Data(root / "data"), SourceConfig(), None)
    data = Data(root / "data")

    async def fetch() -> None:
        worker = FetchWorker(data, FetchConfig(), ImagesConfig(), "c")
        await worker.run(0)
        await worker.close()

    asyncio.run(fetch())
    return data


def measure(data: Data, encoder: str, rounds: int) -> dict[str, dict[str, float]]:
    """Of the stage, of its parts, and of what the parts would allow together: images per second, and milliseconds of a
    core per image, which others' work on the machine disturbs less."""
    config = EmbedConfig(encoder=encoder)
    both, plain = EmbedWorker(data, config, SCORES, "c"), EmbedWorker(data, config, {}, "c")
    assert both.encoder is not None and plain.encoder is not None
    model, detector = both.encoder, both.annotators["open_nsfw"]
    files = [file for _, _, file in read_images(data.tar(0))]
    pixels = [decode(file) for file in files[:64]]
    prepared = np.stack([model.preprocess(p) for p in pixels])
    detected = [detector.preprocess(p) for p in pixels]
    rows = pa.table({"key": [str(i) for i in range(len(detected))]})
    captions = ["part of a photograph"] * len(files)

    def stage(worker: EmbedWorker) -> None:
        for folder in ("embedded/stats", "annotated"):
            shutil.rmtree(data.root / folder, ignore_errors=True)
        worker.run(0)

    def decode_and(*models: Any) -> None:
        def one(file: bytes) -> None:
            image = decode(file)
            for each in models:
                each.preprocess(image)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(one, files))

    def texts() -> None:
        for start in range(0, len(captions), model.batch_size):
            model.encode_texts(captions[start : start + model.batch_size])

    tasks: dict[str, tuple[int, Callable[[], object]]] = {
        "stage, encoder": (len(files), lambda: stage(plain)),
        "stage, encoder and detector": (len(files), lambda: stage(both)),
        "encoder's model alone": (len(prepared), lambda: model.encode_prepared(prepared)),
        "detector's model alone": (len(detected), lambda: detector.annotate(ImageBatch(rows=rows, inputs=detected))),
        "texts alone": (len(captions), texts),
        "decode, prepare for encoder": (len(files), lambda: decode_and(model)),
        "decode, prepare for both": (len(files), lambda: decode_and(model, detector)),
    }
    best: dict[str, tuple[float, float]] = {}
    for _ in range(rounds):  # in turns, so that whatever else the machine does falls on all alike
        for name, (count, task) in tasks.items():
            wall, core = time.perf_counter(), time.process_time()
            task()
            wall, core = (time.perf_counter() - wall) / count, (time.process_time() - core) / count
            before = best.get(name, (wall, core))
            best[name] = min(before[0], wall), min(before[1], core)
    parts = {
        "encoder": ["encoder's model alone", "texts alone", "decode, prepare for encoder"],
        "encoder and detector": [
            "encoder's model alone",
            "texts alone",
            "detector's model alone",
            "decode, prepare for both",
        ],
    }
    result = {name: _numbers(*best[name]) for name in tasks}
    for name, used in parts.items():
        wall, core = (sum(best[part][i] for part in used) for i in (0, 1))
        result[f"ceiling, {name}"] = _numbers(wall, core)
        stage_wall, stage_core = best[f"stage, {name}"]
        result[f"stage over ceiling, {name}"] = {"rate": wall / stage_wall, "core": core / stage_core}
    return result


def _numbers(wall: float, core: float) -> dict[str, float]:
    return {"images_per_second": 1 / wall, "core_ms_per_image": 1000 * core}


if __name__ == "__main__":
    main()
