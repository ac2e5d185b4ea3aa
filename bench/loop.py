"""The loop that people live in, timed: rate -> fit -> annotate -> select -> pack, on 100,000 images.

    python -m bench.loop [--images 100000] [--ratings 300]

The data folder is made by the library's own writers: small JPEGs, and unit vectors of the bundled encoder's length that
know what the ratings are about. The commands are those of the README, each a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from aesthetic.files import atomic
from curate.encoders.embed import images_of, write_vectors
from curate.encoders.registry import load_encoder
from curate.layout import Data
from curate.ledger.schema import fetched_schema, make_key
from curate.shards.tar import TarWriter
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from curate.workers import claim_space
from pipelines.recipe import load_recipe, store_recipe

SHARD = 10_000


def main() -> None:
    """Make the folder and the ratings, run the commands, print how long each takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--ratings", type=int, default=300)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        began = time.perf_counter()
        data = make_data(root, asked.images, asked.ratings)
        print(f"{asked.images:,} images made in {time.perf_counter() - began:.0f} s")
        head, folder = root / "taste.head", str(data.root)
        rule = "select.rules={beautiful: 'top(taste, 0.1)'}"
        commands = {
            "fit": ["fit", str(root / "ratings.csv"), "--data", folder, "--out", str(head)],
            "fit, and suggest 20": [
                *("fit", str(root / "ratings.csv"), "--data", folder, "--out", str(head)),
                *("--suggest", "20"),
            ],
            "annotate": ["annotate", folder, f"taste={head}"],
            "select": ["select", folder, "--name", "mine", "--set", rule],
            "pack": ["pack", folder, "--name", "mine"],
        }
        for what, words in commands.items():
            began = time.perf_counter()
            done = subprocess.run([sys.executable, "-m", "pipelines.cli", *words], capture_output=True, text=True)
            print(f"{what:20} {time.perf_counter() - began:6.1f} s   {(done.stdout or done.stderr).splitlines()[0]}")
            if done.returncode:
                sys.exit(done.stderr)


def make_data(root: Path, images: int, ratings: int) -> Data:
    """A curated and embedded data folder, and ratings of some of its images."""
    rng = np.random.default_rng(0)
    pq.write_table(
        pa.table(
            {
                "url": [f"http://example.com/{i}.jpg" for i in range(images)],
                "caption": [f"picture {i}" for i in range(images)],
            }
        ),
        root / "list.parquet",
    )
    make_plan(str(root / "list.parquet"), Data(root / "data"), SourceConfig(shard_size=SHARD), None)
    data = Data(root / "data")
    space = load_encoder("bundled").space()
    claim_space(data, space)
    store_recipe(data, load_recipe("bundled", ["select.rules={}", "columns={}"]))
    files = [_jpeg(rng) for _ in range(1000)]
    taste = rng.standard_normal(space.dim)
    rated = []
    for s in data.plan.shards:
        keys = _write_fetched(data, s.shard, s.rows, files)
        x = rng.standard_normal((s.rows, space.dim)).astype(np.float32)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        inputs = data.fetched_digests(s.shard)
        assert inputs is not None
        table = images_of(data, s.shard)
        write_vectors(data, s.shard, table, x, None, config="bench", inputs=inputs, facts={}, began=time.time())
        share = ratings * s.rows // images
        rated += [f"{k},{5 + v:.2f}" for k, v in zip(keys[:share], x[:share] @ taste, strict=True)]
    (root / "ratings.csv").write_text("key,score\n" + "\n".join(rated) + "\n")
    return data


def _jpeg(rng: np.random.Generator) -> bytes:
    """A small image of about 10 kB."""
    out = io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3)).astype(np.uint8))
    coarse.resize((320, 240), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()


def _write_fetched(data: Data, shard: int, count: int, files: list[bytes]) -> list[str]:
    rows = []
    with atomic(data.tar(shard)) as f:
        out = TarWriter(f)
        for row in range(count):
            file = files[(row + 137 * shard) % len(files)]  # no rated image is a copy of another
            facts: dict[str, Any] = {
                "url": f"http://example.com/{shard * SHARD + row}.jpg",
                "caption": f"picture {shard * SHARD + row}",
                "key": make_key(shard, row, SHARD),
                "status": "success",
                "width": 320,
                "height": 240,
                "original_width": 320,
                "original_height": 240,
                "sha256": hashlib.sha256(file).hexdigest(),
                "bytes": len(file),
            }
            out.add_sample(facts["key"], file, "jpg", facts["caption"], facts)
            rows.append(facts)
        out.close()
    with atomic(data.table(shard)) as f:
        pq.write_table(pa.Table.from_pylist(rows, schema=fetched_schema(pa.schema([]))), f)
    data.commit(
        data.fetched_record(shard),
        config="bench",
        inputs={},
        outputs=[data.tar(shard), data.table(shard)],
        facts={"count": count, "successes": count},
    )
    return [str(r["key"]) for r in rows]


if __name__ == "__main__":
    main()
