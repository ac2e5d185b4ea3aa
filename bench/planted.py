"""Copies of photographs, altered as the web alters them, and images that are like each other without being copies."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

WORDS = "the of a in on field light water old green road house river where stone under morning never small two"
BETWEEN = "--"  # in a copy's name, between the photograph's and the kind


def _scaled(share: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.resize(
        (round(image.width * share), round(image.height * share)), Image.Resampling.LANCZOS
    )


def _cropped(share: float) -> Callable[[Image.Image], Image.Image]:
    """Without this share of the width and of the height, half of it on each side."""

    def crop(image: Image.Image) -> Image.Image:
        x, y = image.width * share / 2, image.height * share / 2
        return image.crop((round(x), round(y), round(image.width - x), round(image.height - y)))

    return crop


def _framed(share: float) -> Callable[[Image.Image], Image.Image]:
    """With a white border of this share of the long side on each side."""
    return lambda image: ImageOps.expand(image, round(max(image.size) * share), "white")


def _to_128(image: Image.Image) -> Image.Image:
    return _scaled(128 / max(image.size))(image)


def _captioned(image: Image.Image) -> Image.Image:
    """Two lines of large white text with a black edge, as memes have them: a tenth of the height each."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(image.height / 10)
    for y, text in ((0.03, "when you see it"), (0.85, "IT IS TOO LATE")):
        at = (image.width / 2, y * image.height)
        draw.text(at, text, "white", font, anchor="ma", stroke_width=2, stroke_fill="black")
    return image


def _watermarked(image: Image.Image) -> Image.Image:
    """Slanted white words all over it, of an opacity of 0.35."""
    side = 2 * max(image.size)
    layer = Image.new("L", (side, side))
    draw, font = ImageDraw.Draw(layer), ImageFont.load_default(image.height / 14)
    for y in range(0, side, image.height // 5):
        for x in range(y % 97 - 97, side, image.width // 3):
            draw.text((x, y), "stock photo", 90, font)
    layer = layer.rotate(30).crop((side // 4, side // 4, side // 4 + image.width, side // 4 + image.height))
    return Image.composite(Image.new("RGB", image.size, "white"), image, layer)


KINDS: dict[str, tuple[Callable[[Image.Image], Image.Image], str, int]] = {
    "resized to half": (_scaled(0.5), "jpg", 90),
    "resized to 128 px": (_to_128, "jpg", 90),
    "JPEG, quality 30": (lambda image: image, "jpg", 30),
    "WebP, quality 50": (lambda image: image, "webp", 50),
    "grey": (lambda image: image.convert("L").convert("RGB"), "jpg", 90),
    "brighter by 1.3": (lambda image: ImageEnhance.Brightness(image).enhance(1.3), "jpg", 90),
    "tiled watermark": (_watermarked, "jpg", 90),
    "text over it": (_captioned, "jpg", 90),
    "cropped by 2%": (_cropped(0.02), "jpg", 90),
    "cropped by 5%": (_cropped(0.05), "jpg", 90),
    "cropped by 10%": (_cropped(0.10), "jpg", 90),
    "border of 2%": (_framed(0.02), "jpg", 90),
    "border of 5%": (_framed(0.05), "jpg", 90),
    "mirrored": (ImageOps.mirror, "jpg", 90),
}
"""Kind -> what is done to the pixels, the format of the file, its quality."""


def plant(photographs: Iterable[Path], folder: Path, kinds: Iterable[str]) -> None:
    """The photographs as they are, and beside each a copy of each of these kinds: NAME--KIND.EXT."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in photographs:
        (folder / path.name).write_bytes(path.read_bytes())
        image = Image.open(path).convert("RGB")
        for kind in kinds:
            change, extension, quality = KINDS[kind]
            change(image).save(folder / f"{path.stem}{BETWEEN}{kind}.{extension}", quality=quality)


def alike(folder: Path) -> None:
    """Images no two of which are copies, though they look alike: of one colour, flat, and pages of text; 40 each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, words = np.random.default_rng(0), random.Random(0)
    for i in range(40):
        colour = [(255, 255, 255), (0, 0, 0), (127, 127, 127)][i] if i < 3 else tuple(rng.integers(0, 256, 3).tolist())
        Image.new("RGB", (400 + i, 300), colour).save(folder / f"one colour{BETWEEN}{i}.png")
        if i % 2:  # one shade to another, or noise of a level
            ends = rng.integers(0, 256, (2, 3))
            steps = np.linspace(0, 1, 400)[None, :, None]
            pixels = np.broadcast_to(ends[0] + (ends[1] - ends[0]) * steps, (300, 400, 3))
        else:
            pixels = rng.integers(0, 240, 3) + rng.integers(0, 3, (300, 400, 1))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"flat{BETWEEN}{i}.png")
        page(words).save(folder / f"page of text{BETWEEN}{i}.png")


def page(words: random.Random) -> Image.Image:
    """A page of text as it is scanned: no two of the same words."""
    image = Image.new("L", (480, 640), 250)
    draw, font, y, known = ImageDraw.Draw(image), ImageFont.load_default(12), 40, WORDS.split()
    while y < 600:
        line = ""
        while len(line) < 58:
            line += words.choice(known) + " "
        draw.text((40, y), line[: words.randint(20, 60) if words.random() < 0.2 else 60], 20, font)
        y += 34 if words.random() < 0.15 else 18
    return image


def chain(photographs: Iterable[Path], folder: Path, steps: int = 40) -> None:
    """Views of each photograph, each moved by 1.5% of the view: neighbours are near, the ends are not."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in photographs:
        image = Image.open(path).convert("RGB")
        side = round(min(image.size) * 0.6)
        for i in range(min(steps, int((image.width - side) / (side * 0.015)))):
            left = round(i * side * 0.015)
            view = image.crop((left, 0, left + side, side))
            view.save(folder / f"{path.stem}{BETWEEN}view {i:03d}.jpg", quality=95)
