"""Thumbnails of the studio, beside bare Pillow on the same bytes, and finding images among many shards.

    python -m bench.studio_images                      400 photographs; 200 shards of 100 images; a minute
    python -m bench.studio_images --shards 1000        as many shards, each a tar of its own

CPU seconds of one thread, in turns, the median over rounds. Ours is all that a request needs once its tar is known: the
place, the bytes from the tar, decoding, cutting, encoding. Pillow: open, thumbnail with LANCZOS, save, from memory.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_sample_image

from aesthetic.files import atomic
from curate.layout import Data
from curate.ledger.schema import fetched_schema, make_key
from curate.shards.tar import TarWriter
from studio.images.service import ImageService

SIZES = {"512 x 384": (512, 384), "683 x 512": (683, 512)}  # as `images.size: 512` leaves photographs


def main() -> None:
    """Measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400, help="photographs that are cut")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--per-shard", type=int, default=100)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    asked = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, size in SIZES.items():
            found[name] = cutting(
                Path(scratch) / name, [photograph(i, size) for i in range(asked.images)], asked.rounds
            )
        found["many shards"] = finding(Path(scratch) / "many", asked.shards, asked.per_shard)
    for title, figures in found.items():
        print(title)
        for name, value in figures.items():
            print(f"  {name:<60} {value:>10,.2f}")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2))


def photograph(number: int, size: tuple[int, int]) -> bytes:
    """A part of one of two photographs as a JPEG, another one for each number."""
    photo = load_sample_image(("china.jpg", "flower.jpg")[number % 2])
    top, left = number % 43, number % 128
    part = Image.fromarray(np.ascontiguousarray(photo[top : top + 384, left : left + 512]))
    data = io.BytesIO()
    part.resize(size, Image.Resampling.LANCZOS).save(data, "JPEG", quality=95)
    return data.getvalue()


def write_shard(data: Data, shard: int, files: list[bytes], shard_size: int) -> list[str]:
    """Write and commit a fetched shard; the keys of its images."""
    keys = [make_key(shard, row, shard_size) for row in range(len(files))]
    with atomic(data.tar(shard)) as f:
        out = TarWriter(f)
        for key, file in zip(keys, files, strict=True):
            out.add_sample(key, file, "jpg", "a photograph", {"key": key})
        out.close()
    rows = [{"key": key, "status": "success", "url": f"http://example.com/{key}"} for key in keys]
    with atomic(data.table(shard)) as f:
        pq.write_table(pa.Table.from_pylist(rows, schema=fetched_schema(pa.schema([]))), f)
    outputs, facts = [data.tar(shard), data.table(shard)], {"count": len(keys), "successes": len(keys)}
    data.commit(data.fetched_record(shard), config="c", inputs={}, outputs=outputs, facts=facts)
    return keys


def cutting(root: Path, files: list[bytes], rounds: int) -> dict[str, float]:
    """Thumbnails a second of a core, ours and Pillow's."""
    data = Data(root)
    keys = write_shard(data, 0, files, 10_000)

    def ours(side: int) -> int:
        service = ImageService(data)
        service.find(keys[0])
        try:
            return sum(len(service.make(key, side, False)[1].content) for key in keys)
        finally:
            service.close()

    def pillow(side: int, kind: str, **how: int) -> int:
        size = 0
        for file in files:
            image = Image.open(io.BytesIO(file))
            image.draft("RGB", (side, side))
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
            out = io.BytesIO()
            image.save(out, kind, **how)
            size += out.tell()
        return size

    work: dict[str, Callable[[], int]] = {
        "ours, 320": lambda: ours(320),
        "Pillow, 320, JPEG 82": lambda: pillow(320, "JPEG", quality=82),
        "Pillow, 320, WebP 75": lambda: pillow(320, "WEBP", quality=75, method=1),
        "ours, 640": lambda: ours(640),
        "Pillow, 640, JPEG 82": lambda: pillow(640, "JPEG", quality=82),
    }
    taken: dict[str, list[float]] = {name: [] for name in work}
    sizes = {}
    for number in range(rounds + 1):
        for name, run in work.items():
            began = time.process_time()
            sizes[name] = run()
            if number:  # the first is warming up
                taken[name].append(time.process_time() - began)
    rates = {f"{name}: a second of a core": len(files) / median(seconds) for name, seconds in taken.items()}
    ratios = {
        f"ours beside Pillow, {side}": median(
            theirs / own for own, theirs in zip(taken[f"ours, {side}"], taken[f"Pillow, {side}, JPEG 82"], strict=True)
        )
        for side in (320, 640)
    }
    return rates | ratios | {f"{name}: kB": size / len(files) / 1000 for name, size in sizes.items()}


def finding(root: Path, shards: int, per_shard: int) -> dict[str, float]:
    """Milliseconds of the clock for images of random shards: at first, and when their places are kept."""
    data = Data(root)
    file = photograph(0, (512, 384))
    keys = [write_shard(data, shard, [file] * per_shard, per_shard) for shard in range(shards)]
    some = [keys[int(s)][int(r)] for s, r in np.random.default_rng(0).integers(0, [shards, per_shard], (300, 2))]

    def look(service: ImageService) -> float:
        began = time.perf_counter()
        for key in some:
            service.read(service.find(key))
        return (time.perf_counter() - began) / len(some) * 1000

    first, again, warm = ImageService(data), ImageService(data), 0.0
    began = time.perf_counter()
    first.columns()
    tables = (time.perf_counter() - began) * 1000
    at_first = look(first)
    kept = look(again)
    warm = look(again)
    size = sum(path.stat().st_size for path in (root / "studio" / "images").iterdir())
    images = per_shard * len({key[:5] for key in some})
    return {
        "shards": shards,
        "ms to look for tables and columns, each five seconds": tables,
        "ms for an image, its shard seen for the first time": at_first,
        "ms for an image, places kept on the disk": kept,
        "ms for an image, places in memory": warm,
        "bytes kept for an image": size / images,
    }


if __name__ == "__main__":
    main()
