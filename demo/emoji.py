"""`make demo-train`: some 450 captioned emoji, which a small model learns to draw on a CPU in minutes.

    python -m demo.emoji FOLDER

They are the bitmaps of Google's Noto Color Emoji (SIL Open Font License), from the Debian package of that font, each
under its Unicode name: faces and hearts, animals, food and plants, weather, the hours of a clock. Signs, flags,
vehicles and tools are left, so that a small model meets each thing often enough.
"""

from __future__ import annotations

import csv
import sys
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from aesthetic.errors import UserError
from demo.pictures import unpacked

PACKAGE = "fonts-noto-color-emoji"
SIDE = 136  # pixels: as wide as the font's bitmaps are
FONT_SIZE = 109  # the one size that its bitmaps have

BLOCKS = (
    (0x1F600, 0x1F644), (0x1F910, 0x1F917), (0x1F920, 0x1F925), (0x1F927, 0x1F92F), (0x1F970, 0x1F97A),  # faces
    (0x1FAE0, 0x1FAE8), (0x2764, 0x2764), (0x1F493, 0x1F49F), (0x1F5A4, 0x1F5A4), (0x1F90D, 0x1F90E),  # and hearts
    (0x1F400, 0x1F43F), (0x1F980, 0x1F9AE), (0x1FAB0, 0x1FABF),  # animals
    (0x1F32D, 0x1F37F), (0x1F950, 0x1F96F), (0x1F9C0, 0x1F9CB), (0x1FAD0, 0x1FADB),  # food and plants
    (0x1F300, 0x1F320), (0x2600, 0x2604),  # weather, sun and moon
    (0x1F550, 0x1F567),  # hours
)  # fmt: skip
"""First and last code point of what is taken."""

NO_EMOJI = """\
The emoji come from a Debian package (10 MB), which is fetched with apt-get and unpacked, not installed. Elsewhere:
  make demo-train IMAGES=folder    images of your own, with captions from NAME.txt beside NAME.jpg"""


def write_emoji(folder: Path) -> int:
    """Write FOLDER/1f34e.png ... and, last, metadata.csv with their captions; how many. UserError without the font."""
    try:
        home = unpacked(PACKAGE)
    except UserError as e:
        raise UserError(f"{str(e).splitlines()[0]}\n{NO_EMOJI}") from e
    font = ImageFont.truetype(next(home.rglob("*.ttf")), FONT_SIZE)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for first, last in BLOCKS:
        for code in range(first, last + 1):
            name, image = unicodedata.name(chr(code), ""), drawn(chr(code), font)
            if name and image:
                rows.append((f"{code:05x}.png", name.lower()))
                image.save(folder / rows[-1][0])
    with open(folder / "metadata.csv", "w", newline="") as f:
        csv.writer(f).writerows([("file_name", "text"), *rows])
    return len(rows)


def drawn(letter: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """An emoji on white, SIDE pixels a side; None where the font has none for the letter."""
    image = Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 0))
    ImageDraw.Draw(image).text((0, 4), letter, font=font, embedded_color=True)
    if image.getbbox() is None:
        return None
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


if __name__ == "__main__":
    try:
        print(f"{write_emoji(Path(sys.argv[1]))} emoji with captions in {sys.argv[1]}")
    except UserError as e:
        sys.exit(str(e))
