"""The images of bench.fetch: several hundred files as the web has them, in one file with an index beside it.

Photographs are crops and reductions of the photographs among Debian's wallpapers (as `make demo` gets them), of
scikit-learn's two, and, where a folder of them is given, small ones as they are. Drawings are Debian's stamps and
rendered wallpapers, as PNG with and without alpha or palette. The same sources give the same images.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from demo.pictures import unpacked

VERSION = 1  # counted up when images are made otherwise

LONG_SIDES = {400: 14, 500: 16, 640: 17, 800: 15, 1024: 14, 1200: 9, 1600: 7, 2048: 4, 3000: 2, 4000: 2}
"""Pixels of the long side, and how many in a hundred photographs have it."""

LARGE = 1024
"""Pixels of the long side from which on a photograph is a large one: what lists that are filtered by size hold."""

COUNTS = {"photo": 480, "png": 120, "webp": 60}
MIX = {"photo": 84, "png": 10, "webp": 6}
"""How many different images of each kind there are, and how many in a hundred rows of a mixed list show one."""

PHOTOGRAPHS = {
    "mate-backgrounds": "Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings Wood "
    "YellowFlower",
    "plasma-workspace-wallpapers": "BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite "
    "OneStandsOut Path summer_1am Volna",
}
RENDERED = "Altai Canopee Cascade Cluster Elarun FlyingKonqui IceCold Kay Kokkini MilkyWay Opal Patak"
STAMPS = "tuxpaint-stamps-default"


class Entry(NamedTuple):
    """Where one image lies in the file."""

    kind: str  # photo | png | webp; small | large
    extension: str
    offset: int
    size: int


def prepare(cache: Path, small: Path | None = None) -> Path:
    """The file of images, made if it is not there; `small` is a folder of photographs of some 500 pixels."""
    own = hashlib.sha256(repr([VERSION, LONG_SIDES, COUNTS, small]).encode()).hexdigest()[:12]
    target = cache / f"pictures-{own}.bin"
    if not index_path(target).exists():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"making {sum(COUNTS.values())} images in {cache} (once, some two minutes)", flush=True)
        entries: list[Entry] = []
        with open(target, "wb") as f:
            for kind, extension, data in _images(small):
                entries.append(Entry(kind, extension, f.tell(), len(data)))
                f.write(data)
        index_path(target).write_text(json.dumps(entries))
    return target


def index_path(images: Path) -> Path:
    return images.with_suffix(".json")


def entries(images: Path) -> list[Entry]:
    """Of each image, its kind and place."""
    return [Entry(*e) for e in json.loads(index_path(images).read_text())]


def by_kind(images: Path) -> dict[str, dict[int, tuple[int, int]]]:
    """The numbers of the images of each kind with their (width, height); large photographs are a kind once more."""
    found, data = entries(images), images.read_bytes()
    kinds: dict[str, dict[int, tuple[int, int]]] = {}
    for number, e in enumerate(found):
        size = Image.open(io.BytesIO(data[e.offset : e.offset + e.size])).size
        kinds.setdefault(e.kind, {})[number] = size
        if e.kind == "photo" and max(size) >= LARGE:
            kinds.setdefault("large photo", {})[number] = size
    return kinds


def describe(images: Path) -> str:
    """The mix in a line."""
    found, kinds = entries(images), by_kind(images)
    parts = []
    for kind in ("photo", "large photo", "png", "webp"):
        pixels = np.mean([w * h for w, h in kinds[kind].values()]) / 1e6
        bytes_ = np.mean([found[n].size for n in kinds[kind]]) / 1000
        parts.append(f"{len(kinds[kind])} {kind} ({pixels:.2f} megapixels, {bytes_:.0f} kB in the mean)")
    return ", ".join(parts)


def _images(small: Path | None) -> Iterator[tuple[str, str, bytes]]:
    dice = random.Random(20)
    photos = list(_photographs())
    little = sorted(small.glob("*.jpg")) if small else []
    sides = [side for side, share in LONG_SIDES.items() for _ in range(share)]
    for n in range(COUNTS["photo"]):
        side = sides[n % len(sides)]
        if side == 500 and little:  # as a camera and its owner left them
            yield "photo", "jpg", little[n * 7 % len(little)].read_bytes()
        else:
            yield "photo", "jpg", _as_jpeg(_part(photos[dice.randrange(len(photos))], side, dice), dice)
    yield from _pngs(dice, photos)
    for n in range(COUNTS["webp"]):
        out = io.BytesIO()
        image = _part(photos[n % len(photos)], dice.choice((500, 640, 800, 1024, 1200, 1600)), dice)
        image.save(out, "WEBP", quality=dice.choice((75, 80, 90)), method=2)
        yield "webp", "webp", out.getvalue()
    for kind, side in (("small", 160), ("large", 4000)):  # for bench.fetch --memory alone
        yield kind, "jpg", _as_jpeg(_part(photos[0], side, dice), dice)


def _photographs() -> Iterator[Image.Image]:
    from sklearn.datasets import load_sample_image

    for package, names in PHOTOGRAPHS.items():
        files = [p for p in sorted(unpacked(package).rglob("*.jpg")) if "screenshot" not in p.name]
        for name in names.split():
            yield Image.open(next(p for p in files if name in p.parts or p.stem == name)).convert("RGB")
    for name in ("china.jpg", "flower.jpg"):
        yield Image.fromarray(load_sample_image(name))


def _part(photo: Image.Image, side: int, dice: random.Random) -> Image.Image:
    """A part of a photograph with a long side of `side`; enlarged where the photograph has less, as phones do."""
    aspect = dice.choice((4 / 3, 3 / 2, 3 / 2, 16 / 9, 1.0))
    wide, high = photo.size
    width = min(wide, high * aspect)
    share = dice.uniform(max(0.5, min(1.0, side / width)), 1.0)  # not less of it than the pixels that are asked for
    width, height = width * share, width * share / aspect
    left, top = dice.uniform(0, wide - width), dice.uniform(0, high - height)
    box = (left, top, left + width, top + height)
    size = (side, round(side / aspect))
    part = photo.resize(size, Image.Resampling.LANCZOS, box=box)
    return part.rotate(90, expand=True) if dice.random() < 0.3 else part


def _as_jpeg(image: Image.Image, dice: random.Random) -> bytes:
    """One in five progressive, one in four without chroma subsampling, one in three with EXIF, one in five with a
    profile that says sRGB."""
    options: dict[str, object] = {"quality": dice.choice((80, 85, 85, 90, 90, 95))}
    options["progressive"] = dice.random() < 0.2
    options["subsampling"] = "4:4:4" if dice.random() < 0.25 else "4:2:0"
    if dice.random() < 1 / 3:
        exif = Image.Exif()
        exif[0x010F], exif[0x0110], exif[0x0112] = "Maker", "Model", 1
        exif.get_ifd(0x8769)[0x9003] = "2024:05:06 07:08:09"
        options["exif"] = exif
    if dice.random() < 0.2:
        options["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def _pngs(dice: random.Random, photos: list[Image.Image]) -> Iterator[tuple[str, str, bytes]]:
    """Half stamps as they are, of at least 400 pixels as far as there are enough; the others rendered images and some
    photographs, with alpha, without, and with a palette."""
    stamps = sorted(unpacked(STAMPS).rglob("*.png"), key=lambda p: (-max(Image.open(p).size), p))
    half = COUNTS["png"] // 2
    for path in sorted(stamps[:half]):
        yield "png", "png", path.read_bytes()
    files = [p for p in sorted(unpacked("plasma-workspace-wallpapers").rglob("*.png")) if "screenshot" not in p.name]
    opened = [Image.open(p) for p in files if set(RENDERED.split()) & set(p.parts) and max(Image.open(p).size) > 2000]
    rendered = [o.convert("RGBA" if o.has_transparency_data else "RGB") for o in opened]
    for n in range(COUNTS["png"] - half):
        source = photos[n % len(photos)] if n % 4 == 0 else rendered[n % len(rendered)]
        image = _part(source, dice.choice((400, 640, 800, 1024, 1200, 1600)), dice)
        if n % 5 == 0:
            image = image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
        out = io.BytesIO()
        image.save(out, "PNG")
        yield "png", "png", out.getvalue()
