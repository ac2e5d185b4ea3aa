"""What early rules on annotators save: `python -m bench.early_annotators [--count N]`.

Images are fetched already; 30% of them have a German caption, and about half are blurred. They are embedded, scored and
annotated without early rules, with one on the language of captions, and with one on pixels too; then selected by the
same rules. Counted is CPU time of this process, in one thread.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageFilter

from curate.annotators import stage
from curate.annotators.registry import make_annotators
from curate.fetch.config import FetchConfig
from curate.images.config import ImagesConfig
from curate.layout import Data
from curate.ledger.select import select
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from curate.workers import EmbedWorker, FetchWorker
from pipelines.curation import early_rules
from pipelines.recipe import load_recipe

COLUMNS = "{lang: language, quality: quality, aesthetic: bundled-aesthetic, open_nsfw: open-nsfw}"
RULES = "{english: \"lang in ('en', 'und')\", sharp: quality_sharpness > 100, safe: open_nsfw < 0.5}"
EARLY: tuple[list[str], ...] = ([], ["english"], ["english", "sharp"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.early_annotators", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="images (default: %(default)s)")
    parser.add_argument("--text", action="store_true", help="read the images' text as well, which is dear")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data, kept = make_data(Path(scratch), options.count), set[frozenset[str]]()
        print(f"{'early':18} {'kept':>6} {'embedded':>9} {'decoded':>8} {'CPU s':>7} {'ms per image kept':>18}")
        for names in EARLY:
            found, embedded, decoded, seconds = run(data, names, options.text)
            kept.add(frozenset(found))
            each, name = 1000 * seconds / len(found), ", ".join(names) or "none"
            print(f"{name:18} {len(found):6} {embedded:9} {decoded:8} {seconds:7.1f} {each:18.1f}")
        assert len(kept) == 1, "early rules changed what is kept"


def make_data(root: Path, count: int) -> Data:
    """Parts of scikit-learn's photographs, each another, in shards of 500."""
    from sklearn.datasets import load_sample_image

    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    dice, folder = np.random.default_rng(0), root / "images"
    folder.mkdir()
    for i in range(count):
        left, top = int(dice.integers(0, 200)), int(dice.integers(0, 80))
        part = photos[i % 2].crop((left, top, left + 440, top + 330)).resize((683, 512), Image.Resampling.LANCZOS)
        part = part.filter(ImageFilter.GaussianBlur(4)) if dice.random() < 0.5 else part
        part.save(folder / f"{i:05d}.jpg", quality=95)
        german = dice.random() < 0.3
        text = "ein Bild von einem alten Haus am Wasser" if german else "a photograph of an old house by the water"
        (folder / f"{i:05d}.txt").write_text(f"{text}, {i}")
    make_plan(str(folder), Data(root / "data"), SourceConfig(shard_size=500), None)
    data = Data(root / "data")

    async def fetch() -> None:
        worker = FetchWorker(data, FetchConfig(), ImagesConfig(), "c")
        for shard in data.plan.shards:
            await worker.run(shard.shard)
        await worker.close()

    asyncio.run(fetch())
    return data


def run(data: Data, names: list[str], text: bool) -> tuple[set[str], int, int, float]:
    """Keys of what is kept, images embedded, how often one was decoded, and CPU seconds, of the stages after the
    fetch with these early rules."""
    for folder in ("embedded", "annotated", "selected"):
        shutil.rmtree(data.root / folder, ignore_errors=True)
    settings = [f"columns={COLUMNS}", f"select.rules={RULES}", f"select.early=[{', '.join(names)}]"]
    recipe = load_recipe("bundled", [*settings, *(["columns.text={use: text}"] if text else [])])
    early = early_rules(recipe, make_annotators(recipe.columns))
    worker = EmbedWorker(data, recipe.embed, recipe.columns, recipe.hashes()[1], threads=1, early=early)
    decode, counts = stage.decode, Counter[str]()

    def counted(image: bytes) -> np.ndarray:
        counts["decoded"] += 1
        return decode(image)

    stage.decode = counted  # type: ignore[assignment]
    began = time.process_time()
    try:
        for shard in data.plan.shards:
            worker.run(shard.shard)
        select(Data(data.root), replace(recipe.select, name="kept"))
    finally:
        stage.decode = decode
    seconds = time.process_time() - began
    verdicts = pq.read_table(data.verdicts("kept")).to_pylist()
    embedded = sum(pq.read_metadata(data.metadata(s.shard)).num_rows for s in data.plan.shards)
    return {row["key"] for row in verdicts if row["verdict"] == "kept"}, embedded, counts["decoded"], seconds


if __name__ == "__main__":
    main()
