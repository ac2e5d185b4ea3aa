"""What a protected set finds: 50 of a data folder's own images, altered in ten ways, as sets to be kept out.

    python -m bench.decontaminate demo-data          a minute: each kind is a set of its own, compared with all rows

Of each kind: how many of the 50 are found by hash and by cosine, how far away they lie, and how many other rows a rule
would throw away with them. The data folder is read only.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from curate.annotators.near import Near
from curate.annotators.registry import make_annotators
from curate.annotators.stage import annotate_table
from curate.encoders.base import Encoder
from curate.encoders.registry import load_encoder
from curate.images.config import ImagesConfig
from curate.layout import Data
from curate.shards.tar import read_images
from curate.workers import EmbedWorker
from pipelines.recipe import Recipe, stored_recipe

SET = 50


def crop(image: Image.Image, share: float) -> Image.Image:
    """Without `share` of its width and height, half of it on each side."""
    width, height = image.size
    left, top = round(width * share / 2), round(height * share / 2)
    return image.crop((left, top, width - left, height - top))


def frame(image: Image.Image, share: float) -> Image.Image:
    """With a white border of `share` of its longer side, half of it on each side."""
    return ImageOps.expand(image, round(max(image.size) * share / 2), "white")


def caption(image: Image.Image) -> Image.Image:
    """With a line of text over its lower part, as large as memes have it."""
    image = image.copy()
    font = ImageFont.load_default(image.height / 8)
    place = (image.width / 2, image.height * 0.9)
    ImageDraw.Draw(image).text(place, "WHEN IT WORKS", "white", font, "mm", stroke_width=2, stroke_fill="black")
    return image


KINDS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half the size": lambda image: image.resize((max(1, image.width // 2), max(1, image.height // 2))),
    "JPEG 30": lambda image: image,
    "grey": ImageOps.grayscale,
    "brightness x 1.3": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "mirrored": ImageOps.mirror,
    "turned by 90 degrees": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "a line of text": caption,
    "cropped by 5%": lambda image: crop(image, 0.05),
    "cropped by 10%": lambda image: crop(image, 0.10),
    "border of 5%": lambda image: frame(image, 0.05),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.decontaminate", description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA", help="a data folder with vectors")
    parser.add_argument("--seed", type=int, default=0, help="of which images are taken (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = view_of(Data(options.data.absolute()), Path(scratch) / "data")
        recipe = stored_recipe(data) or Recipe()
        worker = EmbedWorker(data, recipe.embed, {"pdq": "pdq"}, "", vectors=False)
        for shard in data.plan.shards:
            worker.run(shard.shard)
        encoder = load_encoder(recipe.embed.encoder, weights=recipe.embed.weights, precision="fp32")
        keys = data.ledger.filter("status = 'success'").order("key").df()["key"].tolist()
        chosen = sorted(np.random.default_rng(options.seed).choice(keys, SET, replace=False).tolist())
        print(f"{SET} of {len(keys):,} images of {options.data}, altered; in brackets what else of the rows is found")
        print("| altered | within 31 bits | 60 | median | cosine >= .95 | >= .90 | median | 31 or .95 | 60 or .90 |")
        print("|---|---|---|---|---|---|---|---|---|")
        for kind in KINDS:
            folder = Path(scratch) / kind
            write_set(data, chosen, kind, folder)
            bits, cosines = compare(data, folder, recipe.images, encoder)
            print(row_of(kind, bits, cosines, np.isin(keys, chosen)), flush=True)
    return 0


def view_of(data: Data, root: Path) -> Data:
    """A data folder with the same images and vectors, and columns of its own."""
    root.mkdir(parents=True)
    for name in ("plan", "fetched", "embedded", "recipe.yaml"):
        if (data.root / name).exists():
            (root / name).symlink_to(data.root / name)
    return Data(root)


def write_set(data: Data, keys: Sequence[str], kind: str, folder: Path) -> None:
    """The images of these keys, altered, as files KEY.jpg."""
    folder.mkdir()
    for shard in data.plan.shards:
        for key, _, file in read_images(data.tar(shard.shard)):
            if key in keys:
                altered = KINDS[kind](Image.open(io.BytesIO(file)).convert("RGB"))
                altered.convert("RGB").save(folder / f"{key}.jpg", quality=30 if kind == "JPEG 30" else 90)


def compare(data: Data, folder: Path, images: ImagesConfig, encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """The columns of `near` for this set: bits and cosines of all images, in the order of their keys."""
    annotators = make_annotators({"near": {"use": Near.name, "against": str(folder), "cosine": True}, "pdq": "pdq"})
    annotate_table(data, "near", annotators, encoder=lambda: encoder, images=images, say=lambda line: None)
    found = Data(data.root).ledger.filter("status = 'success'").order("key").df()
    return found["near_bits"].to_numpy(), found["near_cosine"].to_numpy()


def row_of(kind: str, bits: np.ndarray, cosines: np.ndarray, ours: np.ndarray) -> str:
    """A line of the table: how many of our images are found, in brackets how many others."""
    tight, wide, high, low = bits <= 31, bits <= 60, cosines >= 0.95, cosines >= 0.9
    counts = [
        f"{int(found[ours].sum())} ({int(found[~ours].sum())})"
        for found in (tight, wide, high, low, tight | high, wide | low)
    ]
    counts.insert(2, f"{np.median(bits[ours]):.0f}")
    counts.insert(5, f"{np.median(cosines[ours]):.2f}")
    return f"| {kind} | {' | '.join(counts)} |"


if __name__ == "__main__":
    sys.exit(main())
