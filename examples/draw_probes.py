"""How the sixteen probe images of `aesthetic.space` were drawn: `python examples/draw_probes.py` writes them.

The files in aesthetic/probes are authoritative: every stored space was measured on those bytes. This says where they
came from, and what each is for. Drawing them anew (other libraries compress differently) makes all stored spaces
incomparable, so do it only together with a new set of spaces.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

FOLDER = Path(__file__).parents[1] / "aesthetic" / "probes"
Colour = tuple[int, int, int]


def noise(height: int, width: int, power: float, seed: int) -> np.ndarray:
    """Fractal noise in [0, 1], shape (height, width): amplitude falls with frequency to the given power."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    radius = np.maximum(np.hypot(fy, fx), 1 / max(height, width))
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / radius**power, s=(height, width))
    return (field - field.min()) / (field.max() - field.min())


def blend(low: Colour, high: Colour, t: np.ndarray) -> np.ndarray:
    """Colours between two, shape (..., 3), at t in [0, 1]."""
    return np.asarray(low) + (np.asarray(high) - np.asarray(low)) * t[..., None]


def image_of(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def gradient() -> Image.Image:
    """Two crossing colour ramps, smaller than any encoder's input: enlarging, and the order of channels."""
    y, x = np.mgrid[0:64, 0:64] / 63
    return image_of(np.stack([255 * x, 255 * y, 255 * (1 - x)], -1))


def stripes() -> Image.Image:
    """Slanted lines of falling width: what a resize without antialiasing turns into moiré."""
    y, x = np.mgrid[0:640, 0:640]
    on = np.sin((x + 0.3 * y) ** 2 / 2600) > 0
    return image_of(255.0 * on).convert("1")


def rings() -> Image.Image:
    """A zone plate: every spatial frequency in every direction, once."""
    y, x = np.mgrid[-1:1:512j, -1:1:512j]
    return image_of(127.5 + 127.5 * np.cos(260 * (x * x + y * y)))


def checks() -> Image.Image:
    """A tiny board of saturated colours: hard edges under enlarging."""
    colours = np.array([[230, 20, 30], [20, 60, 220], [250, 220, 10], [10, 150, 60]])
    y, x = np.mgrid[0:37, 0:37] // 5
    return image_of(colours[(x + 2 * y) % 4])


def static() -> Image.Image:
    """White noise, each channel by itself."""
    return image_of(np.random.default_rng(4).integers(0, 256, (80, 80, 3)))


def clouds() -> Image.Image:
    """Smooth noise in two colours, as JPEG."""
    return image_of(blend((245, 130, 60), (40, 70, 160), noise(240, 320, 1.8, 5)))


def shapes() -> Image.Image:
    """Flat figures on white."""
    image = Image.new("RGB", (400, 300), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((30, 40, 170, 180), fill=(220, 30, 40))
    pen.polygon([(200, 250), (280, 60), (360, 250)], fill=(30, 90, 200))
    pen.rectangle((60, 200, 180, 280), fill=(250, 200, 20), outline=(0, 0, 0), width=4)
    pen.arc((220, 20, 390, 150), 200, 340, fill=(20, 140, 70), width=12)
    return image


def letters(
    width: int, height: int, cell: int, ink: tuple[int, int, int], paper: Image.Image, seed: int
) -> Image.Image:
    """Lines of made-up characters, each three strokes between the nine points of a cell, in words."""
    rng = np.random.default_rng(seed)
    pen = ImageDraw.Draw(paper)
    for top in range(cell, height - 2 * cell, 2 * cell):
        left = cell
        while left < width - 2 * cell:
            if rng.random() < 0.18:
                left += cell
                continue
            points = [(left + cell * 0.35 * (p % 3), top + cell * 0.6 * (p // 3)) for p in rng.permutation(9)[:4]]
            pen.line(points, fill=ink, width=max(1, cell // 8))
            left += cell
    return paper


def page() -> Image.Image:
    """A page of small print."""
    return letters(420, 560, 12, (20, 20, 20), Image.new("RGB", (420, 560), (250, 248, 240)), 7).convert("L")


def poster() -> Image.Image:
    """Large writing over a smooth image."""
    paper = image_of(blend((20, 20, 60), (220, 60, 120), noise(360, 360, 2.2, 8)))
    return letters(360, 360, 48, (255, 240, 90), paper, 9)


def landscape(
    width: int, height: int, seed: int, sky: tuple[int, int, int], ground: tuple[int, int, int]
) -> Image.Image:
    """Ranges of hills under a clouded sky, with a sun: as near to a photograph as we can draw."""
    y, x = np.mgrid[0:height, 0:width]
    y, x = y / height, x / width
    scene = (
        blend(sky, (250, 235, 215), np.clip(y * 1.6, 0, 1)) * (0.75 + 0.35 * noise(height, width, 1.9, seed))[..., None]
    )
    glow = np.exp(-(((x - 0.7) * width / height) ** 2 + (y - 0.25) ** 2) / 0.006)
    scene = scene + (np.array([255, 245, 200]) - scene) * glow[..., None]
    for i in range(4):
        ridge = 0.45 + 0.13 * i + (0.25 - 0.03 * i) * (noise(1, width, 1.7, seed + 10 + i)[0] - 0.5)
        texture = 0.6 + 0.8 * noise(height, width, 1.2, seed + 20 + i)
        hill = blend(sky, ground, np.full((height, width), 0.35 + 0.2 * i)) * texture[..., None]
        scene = np.where((y > ridge[None, :])[..., None], hill, scene)
    return image_of(scene)


def turned() -> tuple[Image.Image, Image.Exif]:
    """A landscape stored on its side, with the EXIF tag that sets it upright (orientation 6: a quarter turn right)."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return landscape(360, 240, 31, (70, 120, 210), (60, 100, 30)).transpose(Image.Transpose.ROTATE_90), exif


def glass() -> Image.Image:
    """Figures with soft edges and holes over nothing: transparency, to be laid over white."""
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    alpha = 255 * np.clip(1.4 - np.hypot(x, y) * 1.5, 0, 1) * (np.hypot(x - 0.3, y + 0.2) > 0.25)
    colour = blend((200, 0, 120), (0, 160, 160), (x + 1) / 2)
    return image_of(np.dstack([colour, alpha]))


def night() -> Image.Image:
    """Dark and of low contrast: what a wrong normalisation loses first."""
    return image_of(np.asarray(landscape(300, 300, 41, (20, 24, 44), (10, 14, 8))) * 0.35)


def bust() -> Image.Image:
    """A grey figure before a window of light, stored with one channel."""
    y, x = np.mgrid[0:400, 0:300]
    light = 210 - 90 * (x / 300) + 30 * noise(400, 300, 2.0, 51)
    head = ((x - 150) / 62) ** 2 + ((y - 150) / 84) ** 2 < 1
    body = ((x - 150) / 120) ** 2 + ((y - 400) / 150) ** 2 < 1
    shade = 60 + 80 * np.clip((x - 90) / 120, 0, 1)
    return image_of(np.where(head | body, shade, light))


def main() -> None:
    """Write the sixteen files; their names begin with their numbers."""
    drawings: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("00_gradient.png", gradient(), {}),
        ("01_stripes.png", stripes(), {}),
        ("02_rings.jpg", rings(), {"quality": 85}),
        ("03_checks.png", checks(), {}),
        ("04_static.png", static(), {}),
        ("05_clouds.jpg", clouds(), {"quality": 90}),
        ("06_shapes.png", shapes(), {}),
        ("07_page.png", page(), {}),
        ("08_poster.jpg", poster(), {"quality": 90}),
        ("09_landscape.jpg", landscape(480, 320, 61, (90, 150, 230), (70, 90, 30)), {"quality": 92}),
        ("10_turned.jpg", turned()[0], {"quality": 90, "exif": turned()[1]}),
        ("11_panorama.jpg", landscape(1200, 100, 71, (230, 140, 90), (90, 50, 40)), {"quality": 90}),
        ("12_tower.png", shapes().rotate(90, expand=True).resize((60, 700)).quantize(32), {}),
        ("13_glass.png", glass(), {}),
        ("14_night.jpg", night(), {"quality": 90}),
        ("15_bust.jpg", bust(), {"quality": 90}),
    ]
    for name, image, options in drawings:
        out = io.BytesIO()
        image.save(out, "PNG" if name.endswith(".png") else "JPEG", **options)
        (FOLDER / name).write_bytes(out.getvalue())


if __name__ == "__main__":
    main()
