"""Sheets of images, and histograms: one look for all that is drawn for people to look at.

The same images and words give the same bytes, on every machine.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from aesthetic.errors import UserError
from aesthetic.files import write_atomic

GREEN, GREY = "#2f7d6d", "#c9c7c0"
_TINTS = ("#d9a14e", "#b9708a", "#6f8fb8", "#8ea65b", "#c77b58", "#8c7fb3", "#5fa3a3", "#b8a06a")
_PAPER, _INK, _SOFT, _LINE, _CARD = "#fbfaf7", "#1d1d1b", "#85837c", "#e4e2dc", "#ffffff"

_SCALE = 2  # device pixels per unit of the design below
_WIDTH, _MARGIN, _GAP = 1240, 44, 12

Pixels = Image.Image | npt.NDArray[np.uint8]
"""An RGB image of any size."""


@dataclass(frozen=True)
class Tile:
    """An image of a sheet; `caption` is one line or two, with a newline between them."""

    image: Pixels | None  # None where it cannot be decoded
    caption: str
    blurred: bool = False  # what is called unsafe is shown as a blur that no one can undo


def enlarged(image: Pixels, caption: str, blurred: bool = False) -> Tile:
    """A tile; a small image, as small models make them, is shown large, pixel by pixel."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    times = max(1, 224 // max(image.size))
    large = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    return Tile(large, caption, blurred)


def sheet(path: Path, title: str, rows: Sequence[tuple[str, Sequence[Tile]]]) -> Path:
    """Draw a contact sheet: for each row its title line, then its images, five abreast; nothing for rows without."""
    rows = [(words, tiles) for words, tiles in rows if tiles]
    page = Page(200 + sum(100 + 220 * -(-len(tiles) // 5) for _, tiles in rows))
    page.text(_MARGIN, page.y, title, 24, room=_WIDTH - 2 * _MARGIN)
    page.y += 36
    for i, (words, tiles) in enumerate(rows):
        page.heading(tint(i), words, "", "")
        page.tiles([Tile(small(t.image, 224, t.blurred), t.caption, t.blurred) for t in tiles], per_row=5)
    return page.save(path)


def small(image: Pixels | None, side: int, blurred: bool) -> Image.Image | None:
    """An image no larger than a tile of `side` units needs; a blurred one keeps 7 x 7 values of itself and no more."""
    if image is None:
        return None
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image = image.convert("RGB")  # a copy
    image.thumbnail((side * _SCALE, side * _SCALE), Image.Resampling.LANCZOS)
    return blur(image) if blurred else image


def blur(image: Image.Image) -> Image.Image:
    """An image of which 7 x 7 values are left and no more."""
    return image.resize((7, 7), Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)


def tint(i: int) -> str:
    """The colour of the i-th rule or row."""
    return _TINTS[i % len(_TINTS)]


class Page:
    """A page that grows downwards: each method draws one block at the cursor `y` and moves it. Units, not pixels."""

    def __init__(self, height: int) -> None:
        """`height` is an upper bound; what is not used is cut off."""
        self.image = Image.new("RGB", (_WIDTH * _SCALE, height * _SCALE), _PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.y = _MARGIN

    def save(self, path: Path) -> Path:
        buffer = BytesIO()
        self.image.crop((0, 0, self.image.width, (self.y + _MARGIN // 2) * _SCALE)).save(buffer, "PNG")
        write_atomic(path, buffer.getvalue())
        return path

    def text(
        self, x: float, y: float, text: str, size: int, ink: str = _INK, *, room: float = 0, anchor: str = "la"
    ) -> float:
        """Draw one line, cut to `room` units where that is not 0; returns its width."""
        font = _font(size)
        text = _printable(text)
        if room:
            text = _cut(text, font, room * _SCALE)
        self.draw.text((x * _SCALE, y * _SCALE), text, fill=ink, font=font, anchor=anchor)
        return font.getlength(text) / _SCALE

    def box(self, x: float, y: float, w: float, h: float, fill: str | None, outline: str | None = None) -> None:
        at = [round(v * _SCALE) for v in (x, y, x + w, y + h)]
        self.draw.rectangle((at[0], at[1], max(at[0], at[2] - 1), max(at[1], at[3] - 1)), fill, outline)

    def title(self, title: str, source: str, counts: str) -> None:
        wide = self.text(_MARGIN, self.y, title, 30)
        self.text(_MARGIN + wide + 14, self.y + 11, f"from {source}", 16, _SOFT)
        self.text(_WIDTH - _MARGIN, self.y + 11, counts, 16, _INK, anchor="ra")
        self.y += 54

    def bar(self, parts: list[tuple[str, int, str]]) -> None:
        """The funnel in one line: each row of the list once, by verdict, in the order of the rules."""
        total = sum(n for _, n, _ in parts) or 1
        room = _WIDTH - 2 * _MARGIN
        x = float(_MARGIN)
        for _, n, ink in parts:
            self.box(x, self.y, room * n / total, 10, ink)
            x += room * n / total
        self.y += 22
        x = _MARGIN
        for name, n, ink in parts:
            label = f"{name} {n:,}"
            wide = _font(13).getlength(_printable(label)) / _SCALE + 16
            if x + wide > _WIDTH - _MARGIN and x > _MARGIN:
                x = _MARGIN
                self.y += 20
            self.box(x, self.y + 4, 9, 9, ink)
            self.text(x + 15, self.y, label, 13)
            x += wide + 20
        self.y += 30

    def heading(self, ink: str, name: str, count: str, detail: str, aside: str = "") -> None:
        self.y += 16
        self.box(_MARGIN, self.y + 4, 12, 12, ink)
        x = _MARGIN + 22.0
        x += self.text(x, self.y, name, 18) + 12
        if count:
            x += self.text(x, self.y + 3, count, 14) + 12
        end = float(_WIDTH - _MARGIN)
        end -= self.text(end, self.y + 4, aside, 12, _SOFT, anchor="ra") + 16 if aside else 0
        self.text(x, self.y + 3, detail, 14, _SOFT, room=end - x)
        self.y += 32

    def scale(self, worst: str, best: str) -> None:
        """An arrow from the worst value to the best: which way the tiles below are to be read."""
        left = _MARGIN + self.text(_MARGIN, self.y, f"worst {worst}", 13, _SOFT) + 12
        right = _WIDTH - _MARGIN - self.text(_WIDTH - _MARGIN, self.y, f"best {best}", 13, GREEN, anchor="ra") - 12
        middle = self.y + 9
        self.box(left, middle - 0.5, right - left - 4, 1, GREY)
        tip = [(right, middle), (right - 8, middle - 4), (right - 8, middle + 4)]
        self.draw.polygon([(x * _SCALE, y * _SCALE) for x, y in tip], fill=GREY)
        self.y += 28

    def tiles(self, tiles: Sequence[Tile], *, per_row: int, ratio: float = 0.75) -> None:
        """A grid of images, each whole on a white card, with the two lines of its caption under it."""
        width = (_WIDTH - 2 * _MARGIN - (per_row - 1) * _GAP) / per_row
        height = round(width * ratio)
        for i, tile in enumerate(tiles):
            if i and i % per_row == 0:
                self.y += height + 48
            x = _MARGIN + (i % per_row) * (width + _GAP)
            self.box(x, self.y, width, height, _CARD, _LINE)
            if tile.image is None:
                self.text(x + width / 2, self.y + height / 2, "cannot be decoded", 11, _SOFT, anchor="mm")
            else:
                image = Image.fromarray(tile.image) if isinstance(tile.image, np.ndarray) else tile.image
                room_w, room_h = round(width * _SCALE) - 4, round(height * _SCALE) - 4
                fit = min(room_w / image.width, room_h / image.height, 2.0)  # a small image is seen to be small
                w, h = max(1, round(image.width * fit)), max(1, round(image.height * fit))
                left, top = round(x * _SCALE) + 2 + (room_w - w) // 2, round(self.y * _SCALE) + 2 + (room_h - h) // 2
                self.image.paste(image.resize((w, h), Image.Resampling.LANCZOS), (left, top))
            if tile.blurred:
                self.box(x + width / 2 - 28, self.y + height / 2 - 10, 56, 19, _CARD)
                self.text(x + width / 2, self.y + height / 2, "blurred", 12, _SOFT, anchor="mm")
            first, _, second = tile.caption.partition("\n")
            self.text(x, self.y + height + 5, first, 13, room=width)
            self.text(x, self.y + height + 22, second, 11, _SOFT, room=width)
        if tiles:
            self.y += height + 48

    def passage(self, tile: Tile, text: str, below: str) -> None:
        """An image with a text beside it, broken into lines, and one more line below."""
        side, lines, y = 130, _broken(_printable(text), _font(13), (_WIDTH - 2 * _MARGIN - 150) * _SCALE), self.y
        self.tiles([Tile(tile.image, "", tile.blurred)], per_row=8)
        for i, line in enumerate(lines[: side // 18]):
            self.text(_MARGIN + 154, y + 18 * i, line, 13)
        self.text(_MARGIN + 154, y + 18 * min(len(lines), side // 18) + 2, below, 11, _SOFT, room=_WIDTH - 300)
        self.y -= 30  # no line stands under the image

    def words(self, words: Iterable[str]) -> None:
        x: float = _MARGIN + 22
        for word in words:
            wide = _font(14).getlength(_printable(word)) / _SCALE
            if x + wide > _WIDTH - _MARGIN:
                x = _MARGIN + 22
                self.y += 22
            self.text(x, self.y, word, 14)
            x += wide + 24
        self.y += 30

    def note(self, text: str) -> None:
        self.text(_MARGIN, self.y + 8, text, 12, _SOFT)
        self.y += 32

    def histogram(
        self, everything: list[int], kept: list[int], lo: float, hi: float, cuts: list[tuple[float, str]]
    ) -> None:
        """Bars for all images with those of the kept ones before them; a line and words where a rule cuts."""
        room, height = _WIDTH - 2 * _MARGIN, 150
        top, wide = max(everything) or 1, room / len(everything)
        base = self.y + height + 16
        for i, (n, k) in enumerate(zip(everything, kept, strict=True)):
            for count, ink in ((n, GREY), (k, GREEN)):
                if count:
                    tall = max(1.0, height * count / top)
                    self.box(_MARGIN + i * wide, base - tall, wide - 1, tall, ink)
        self.box(_MARGIN, base, room, 1, _LINE)
        for at, words in cuts:
            if lo <= at <= hi:
                x = _MARGIN + room * (at - lo) / (hi - lo)
                self.box(x - 0.5, self.y, 1, height + 16, _INK)
                near_end = x > _WIDTH - 2 * _MARGIN - 80
                self.text(x - 5 if near_end else x + 5, self.y, words, 12, anchor="ra" if near_end else "la")
        for i in range(5):
            at = lo + (hi - lo) * i / 4
            anchor = {0: "la", 4: "ra"}.get(i, "ma")
            self.text(_MARGIN + room * i / 4, base + 5, f"{at:.2f}", 12, _SOFT, anchor=anchor)
        self.y += height + 46

    def shares(self, before: list[float], after: list[float]) -> None:
        """A bar for each of several parts: its share before, and in it, narrower, its share after."""
        room, height = _WIDTH - 2 * _MARGIN, 150
        top, wide = max([*before, *after]) or 1.0, room / len(before)
        base = self.y + height + 16
        for i, pair in enumerate(zip(before, after, strict=True)):
            for share, ink, inset in ((pair[0], GREY, 0.08), (pair[1], GREEN, 0.3)):
                if share:
                    tall = max(1.0, height * share / top)
                    self.box(_MARGIN + (i + inset) * wide, base - tall, wide * (1 - 2 * inset), tall, ink)
        self.box(_MARGIN, base, room, 1, _LINE)
        self.text(_MARGIN, self.y - 4, f"{top:.1%}", 12, _SOFT)
        self.text(_MARGIN, base + 5, "largest before", 12, _SOFT)
        self.text(_MARGIN + room, base + 5, "smallest", 12, _SOFT, anchor="ra")
        self.y += height + 46


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font: the same letters on every machine."""
    font = ImageFont.load_default(size * _SCALE)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise UserError("this Pillow was built without FreeType, which the report's letters need: reinstall pillow")
    return font


_SPELT = str.maketrans(
    {"×": "x", "–": "-", "—": "-", "≥": ">=", "≤": "<=", "ß": "ss", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "æ": "ae"}
)


@cache
def _has_letter(letter: str) -> bool:
    font = _font(12)
    missing, ours = font.getmask("\U0010fffd"), font.getmask(letter)
    return ours.size != missing.size or bytes(ours) != bytes(missing)


def _printable(text: str) -> str:
    """The text in letters that the font has: accents are dropped, and so is what has no letter at all."""
    text = unicodedata.normalize("NFKD", text.translate(_SPELT))
    return " ".join("".join(" " if c.isspace() else c if _has_letter(c) else "" for c in text).split())


def _broken(text: str, font: ImageFont.FreeTypeFont, room: float) -> list[str]:
    """The text in lines of at most `room` pixels, broken between words."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(_cut(word, font, room))
    return lines


def _cut(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """As much of the text as fits into `room` pixels, with an ellipsis where something is missing."""
    if font.getlength(text) <= room:
        return text
    few, many = 0, len(text)
    while few < many:
        middle = (few + many + 1) // 2
        if font.getlength(text[:middle].rstrip() + "…") <= room:
            few = middle
        else:
            many = middle - 1
    return text[:few].rstrip() + "…"
