"""The raw set of examples/ablation.py: real captioned images with faults planted at known rates.

    python -m examples.faults FOLDER [--images 7000]

FOLDER/raw/    00000.jpg ..., metadata.csv: file_name, text, uid, origin, fault. No rule may read `fault`
      apart/   clean images that nothing in raw/ is near, to measure with; metadata.csv: file_name, text

The images are Debian's: emoji of a font, clip art and stamps, each whole on a white square of 160 pixels. A row has one
fault or none. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from aesthetic.errors import UserError
from aesthetic.splits import groups_of
from curate.images.process import perceptual_hash
from curate.ledger.schema import RowError
from demo.emoji import FONT_SIZE, PACKAGE, drawn
from demo.pictures import STAMPS, demo_images, unpacked
from examples.clipart import clip_art_and_stamps, on_white

Pixels = npt.NDArray[np.uint8]

SIDE = 160
CLEAN = "clean"
FAULTS = {"copy": 0.12, "caption": 0.15, "watermark": 0.08, "blur": 0.08, "tiny": 0.05, "off_topic": 0.12}
"""The share of rows of each fault."""

COPIES = 8  # of each image that is copied at all: few images are copied often, as on the web
TILES = (4, 3)  # columns and rows into which a wallpaper is cut
MARKS = ("stockphotos.com", "SAMPLE", "PREVIEW ONLY", "www.clipart.net", "DO NOT COPY", "bigimages.com")


class Captioned(NamedTuple):
    """An image that is read when it is wanted: pixels, or None where it can't be used."""

    origin: str
    caption: str
    read: Callable[[], Pixels | None]


# ------------------------------------------------------------------------------------------------- what is on topic


def topical() -> list[Captioned]:
    """Some 7,600 emoji, pieces of clip art and stamps. Packages are downloaded where they are not there yet."""
    font = ImageFont.truetype(next(unpacked(PACKAGE).rglob("*.ttf")), FONT_SIZE)
    found = []
    for code in (*range(0x2190, 0x3300), *range(0x1F000, 0x1FB00)):
        if name := unicodedata.name(chr(code), ""):
            found.append(Captioned("emoji", f"{name.lower()}, emoji", partial(_emoji, chr(code), font)))
    for origin, path, caption in clip_art_and_stamps():
        found.append(Captioned(origin, caption, partial(_whole_file, path)))
    return found


def _emoji(letter: str, font: ImageFont.FreeTypeFont) -> Pixels | None:
    image = drawn(letter, font)
    if image is None:
        return None
    image.save(data := io.BytesIO(), "PNG", compress_level=1)
    return _whole(data.getvalue())


def _whole_file(path: Path) -> Pixels | None:
    return _whole(path.read_bytes())


def _whole(image: bytes) -> Pixels | None:
    try:
        return on_white(image, SIDE)
    except RowError:
        return None


# ------------------------------------------------------------------------------------------------ and what is not


def off_topic() -> list[Captioned]:
    """Pieces of 66 wallpapers under the wallpaper's name, and a page of text for every three of them."""
    wallpapers = [image for image in demo_images() if image.package != STAMPS]
    columns, rows = TILES
    found = [
        Captioned("wallpaper", w.caption.lower(), partial(_tile, w.path, n))
        for w in wallpapers
        for n in range(columns * rows)
    ]
    lines = [line for path in sorted((Path(__file__).parents[1] / "docs").glob("*.md")) for line in _prose(path)]
    for i in range(len(found) // 3):
        page = [lines[(13 * i + k) % len(lines)] for k in range(13)]
        caption = " ".join(page[0].split()[:6]).lower()
        found.append(Captioned("page", caption, partial(_page, page)))
    return found


def _tile(path: Path, number: int) -> Pixels:
    """The square middle of one piece of a wallpaper."""
    columns, rows = TILES
    wallpaper = _wallpaper(path)
    width, height = wallpaper.width // columns, wallpaper.height // rows
    side = min(width, height)
    left = number % columns * width + (width - side) // 2
    top = number // columns * height + (height - side) // 2
    piece = wallpaper.crop((left, top, left + side, top + side))
    return np.asarray(piece.resize((SIDE, SIDE), Image.Resampling.BOX))


@lru_cache(1)
def _wallpaper(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.draft("RGB", (TILES[0] * SIDE, TILES[1] * SIDE))  # a large JPEG is read small
        return image.convert("RGB")


def _prose(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if len(line) > 60 and line[0].isalpha():
            yield line


def _page(lines: Sequence[str]) -> Pixels:
    page = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(page).multiline_text((4, 3), "\n".join(lines), "black", ImageFont.load_default(10), spacing=1)
    return np.asarray(page)


# ------------------------------------------------------------------------------------------------------------- faults


def copied(pixels: Pixels, rng: np.random.Generator) -> bytes:
    """The same image smaller, and encoded worse."""
    side = round(rng.uniform(0.6, 0.95) * SIDE)
    return jpeg(cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA), int(rng.integers(40, 85)))


def watermarked(pixels: Pixels, rng: np.random.Generator) -> bytes:
    """Three lines of one text across the image, at a slant, half transparent."""
    layer = Image.new("RGBA", (2 * SIDE, 2 * SIDE), (0, 0, 0, 0))
    text, font = MARKS[rng.integers(len(MARKS))], ImageFont.load_default(int(rng.integers(18, 27)))
    shade, opacity = int(rng.choice([40, 128, 215])), int(rng.integers(120, 220))
    step, draw = SIDE // 3, ImageDraw.Draw(layer)
    for line in range(6):
        draw.text((SIDE, line * step + step // 2), text, (shade, shade, shade, opacity), font, anchor="mm")
    half = SIDE // 2
    layer = layer.rotate(float(rng.uniform(-30, 30)), Image.Resampling.BICUBIC)
    layer = layer.crop((half, half, half + SIDE, half + SIDE))
    image = Image.fromarray(pixels)
    image.paste(layer, (0, 0), layer)
    return jpeg(np.asarray(image))


def blurred(pixels: Pixels, rng: np.random.Generator) -> bytes:
    """Out of focus, so far that it shows at a fifth of the size."""
    return jpeg(cv2.GaussianBlur(pixels, (0, 0), float(rng.uniform(0.03, 0.08) * SIDE)))


def tiny(pixels: Pixels, rng: np.random.Generator) -> bytes:
    """At most 24 pixels a side."""
    side = int(rng.integers(12, 25))
    return jpeg(cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA))


def jpeg(pixels: npt.NDArray[Any], quality: int = 92) -> bytes:
    """As a JPEG file."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=quality)
    return data.getvalue()


def deranged(captions: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Each caption where another was that differs, as far as there are others."""
    order = rng.permutation(len(captions))
    order = order[np.argsort(np.array(captions)[order], kind="stable")]  # equal ones side by side
    _, counts = np.unique(np.array(captions), return_counts=True)
    moved = np.roll(order, int(counts.max(initial=0)))  # by as many as the longest row of equal ones
    out = list(captions)
    for place, source in zip(order, moved, strict=True):
        out[place] = captions[source]
    return out


# ------------------------------------------------------------------------------------------------------------- the set


def make(
    folder: Path,
    count: int,
    apart: int,
    seed: int = 0,
    good: Sequence[Captioned] | None = None,
    other: Sequence[Captioned] | None = None,
) -> dict[str, int]:
    """Write raw/ of `count` rows and apart/ of `apart` images; how many rows each fault has, and how many none.

    Args:
        good, other: what is on topic and what is not, in place of Debian's.

    Raises UserError where there are not enough images.
    """
    good, other = good or topical(), other or off_topic()
    rng = np.random.default_rng(seed)
    number = {fault: round(rate * count) for fault, rate in FAULTS.items()}
    number[CLEAN] = count - sum(number.values())
    bases = count - number["copy"] - number["off_topic"]
    images, spare = _read(good, rng, bases + apart)
    if len(images) < bases + apart or len(spare) < apart or len(other) < number["off_topic"]:
        raise UserError(
            f"{count:,} rows and {apart:,} images apart need {bases + apart:,} images on topic, and "
            f"{number['off_topic']:,} others: there are {len(images):,} ({len(spare):,} of them unlike all others) and "
            f"{len(other):,}. Give fewer --images."
        )
    held = set(spare[:apart])
    rest = iter([images[i] for i in range(len(images)) if i not in held])
    own = [fault for fault in number if fault not in ("copy", "off_topic")]  # each row an image of its own
    parts = {fault: [next(rest) for _ in range(number[fault])] for fault in own}

    rows = [(CLEAN, origin, caption, jpeg(pixels)) for origin, caption, pixels in parts[CLEAN]]
    captions = deranged([caption for _, caption, _ in parts["caption"]], rng)
    for (origin, _, pixels), caption in zip(parts["caption"], captions, strict=True):
        rows.append(("caption", origin, caption, jpeg(pixels)))
    for fault, plant in (("watermark", watermarked), ("blur", blurred), ("tiny", tiny)):
        rows += [(fault, origin, caption, plant(pixels, rng)) for origin, caption, pixels in parts[fault]]
    popular = parts[CLEAN][: max(1, math.ceil(number["copy"] / COPIES))]
    for i in range(number["copy"]):
        origin, caption, pixels = popular[i % len(popular)]
        rows.append(("copy", origin, caption, copied(pixels, rng)))
    for i in sorted(rng.permutation(len(other))[: number["off_topic"]]):  # a wallpaper's pieces after each other
        off = other[i].read()
        assert off is not None
        rows.append(("off_topic", other[i].origin, other[i].caption, jpeg(off)))

    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    uids = [hashlib.md5(f"{seed}:{i}".encode()).hexdigest() for i in range(len(rows))]
    named = [
        (data, (caption, uid, origin, fault))
        for (fault, origin, caption, data), uid in zip(shuffled, uids, strict=True)
    ]
    _write(folder / "raw", ("file_name", "text", "uid", "origin", "fault"), named)
    chosen = [images[i] for i in spare[:apart]]
    _write(folder / "apart", ("file_name", "text"), [(jpeg(pixels), (caption,)) for _, caption, pixels in chosen])
    return number


def _read(
    good: Sequence[Captioned], rng: np.random.Generator, enough: int
) -> tuple[list[tuple[str, str, Pixels]], list[int]]:
    """Images in random order, a tenth more than is enough where there are so many; and which are like no other."""
    images: list[tuple[str, str, Pixels]] = []
    for i in rng.permutation(len(good)):
        if len(images) >= 1.1 * enough:
            break
        if (pixels := good[i].read()) is not None:
            images.append((good[i].origin, good[i].caption, pixels))
    names = groups_of([str(i) for i in range(len(images))], phash=[perceptual_hash(p) for _, _, p in images]).names
    _, group, size = np.unique(np.array(names), return_inverse=True, return_counts=True)
    return images, np.flatnonzero(size[group] == 1).tolist()


def _write(folder: Path, header: tuple[str, ...], rows: Sequence[tuple[bytes, tuple[str, ...]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = []
    for i, (data, facts) in enumerate(rows):
        (folder / f"{i:05d}.jpg").write_bytes(data)
        table.append((f"{i:05d}.jpg", *facts))
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *table])


def main() -> None:
    """Write the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=7000)
    parser.add_argument("--apart", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print(make(asked.folder, asked.images, asked.apart, asked.seed))


if __name__ == "__main__":
    main()
