"""quality and borders against planted truth: formulas computed another way, blurs and bars of known size."""

from __future__ import annotations

import io
from collections.abc import Iterator

import cv2
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage
from sklearn.datasets import load_sample_image

from curate.annotators.base import Annotator, ImageBatch
from curate.annotators.registry import load_annotator
from curate.images.decode import decode

NOTHING = pa.table({"key": pa.array([], pa.string()), "caption": pa.array([], pa.string())})


def photos(side: int = 512) -> Iterator[np.ndarray]:
    """Six parts of two photographs, their longer side so many pixels."""
    for name in ("china.jpg", "flower.jpg"):
        for box in ((0, 0, 640, 427), (0, 0, 320, 300), (250, 100, 640, 400)):
            part = Image.fromarray(load_sample_image(name)).crop(box)
            scale = side / max(part.size)
            yield np.asarray(part.resize((round(part.width * scale), round(part.height * scale))))


def jpeg(image: np.ndarray, quality: int = 75) -> np.ndarray:
    """The pixels of an image that went through a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return decode(file.getvalue())


def values(annotator: Annotator, *images: np.ndarray) -> dict[str, list[float]]:
    """An annotator's columns of images."""
    rows = pa.table({"key": [str(n) for n in range(len(images))], "caption": pa.nulls(len(images), pa.string())})
    answer = annotator.annotate(ImageBatch(rows=rows, inputs=[annotator.preprocess(image) for image in images]))
    assert {name: value.type for name, value in answer.items()} == {n: c.type for n, c in annotator.columns.items()}
    return {name: value.to_pylist() for name, value in answer.items()}


@pytest.fixture(scope="module")
def quality() -> Annotator:
    return load_annotator("quality")


@pytest.fixture(scope="module")
def borders() -> Annotator:
    return load_annotator("borders")


def test_each_formula_computed_another_way(quality: Annotator) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 256, 3), np.uint8)
    for image in (noise, *photos(256)):
        found = {name: value[0] for name, value in values(quality, image).items()}
        red, green, blue = image.astype(float).transpose(2, 0, 1)
        luma = np.rint(0.299 * red + 0.587 * green + 0.114 * blue)  # OpenCV's is fixed-point: at most one level off
        edges = ndimage.convolve(luma, np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]]), mode="mirror")
        assert found["sharpness"] == pytest.approx(edges.var(), rel=0.01)
        assert found["brightness"] == pytest.approx(luma.mean() / 255, abs=1e-3)
        assert found["contrast"] == pytest.approx(luma.std() / 255, abs=1e-3)
        assert found["dark"] == pytest.approx((luma <= 5).mean(), abs=2e-3)
        assert found["light"] == pytest.approx((luma >= 250).mean(), abs=2e-3)
        share = np.unique(luma, return_counts=True)[1] / luma.size
        assert found["entropy"] == pytest.approx(-(share * np.log2(share)).sum(), abs=0.02)
        rg, yb = red - green, (red + green) / 2 - blue
        colour = np.sqrt(rg.var() + yb.var()) + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2)
        assert found["colourfulness"] == pytest.approx(colour, rel=1e-5)


def test_images_whose_values_are_known(quality: Annotator) -> None:
    flat = np.full((300, 500, 3), 128, np.uint8)
    half = flat.copy()
    half[:, :250], half[:, 250:] = 0, 255
    ramp = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (64, 1, 3))
    found = values(quality, flat, half, ramp)
    assert found["brightness"] == pytest.approx([128 / 255, 0.5, 0.5])
    assert found["dark"] == pytest.approx([0, 0.5, 6 / 256]) and found["light"] == pytest.approx([0, 0.5, 6 / 256])
    assert found["contrast"] == pytest.approx([0, 0.5, np.arange(256).std() / 255])
    assert found["entropy"] == pytest.approx([0, 1, 8]) and found["colourfulness"] == [0, 0, 0]
    assert found["sharpness"][0] == 0 and found["sharpness"][2] < 10  # a ramp has no edges but its ends

    colours = np.zeros((100, 100, 3), np.uint8)
    colours[:50, :, 0] = colours[50:, :, 1] = 255  # red above green: rg = 255 and -255, yb = 127.5
    assert values(quality, colours)["colourfulness"] == pytest.approx([255 + 0.3 * 127.5])


def test_sharpness_falls_with_the_radius_of_a_blur(quality: Annotator) -> None:
    for image in photos():
        blurred = [np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(r))) for r in (0, 1, 2, 4, 8)]
        found = values(quality, *blurred)["sharpness"]
        assert found == sorted(found, reverse=True) and found[0] > 2 * found[2] > 8 * found[4]
        enlarged = cv2.resize(
            cv2.resize(image, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA), image.shape[1::-1]
        )
        assert values(quality, enlarged)["sharpness"][0] < found[0] / 2


def test_sharpness_of_larger_copies_is_no_lower(quality: Annotator) -> None:
    for large, small in zip(photos(1280), photos(320), strict=True):
        one, other = values(quality, large, small)["sharpness"]
        assert 0.8 < one / other < 2.5


def test_small_and_narrow_images_have_finite_values(quality: Annotator, borders: Annotator) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in [(1, 1), (1, 700), (700, 1), (2, 3), (9, 2000)]]
    for annotator in (quality, borders):
        found = values(annotator, *images)
        assert all(np.isfinite(value).all() for value in found.values())
        alone = [values(annotator, image) for image in images]  # a value does not depend on the others of a batch
        assert found == {name: [one[name][0] for one in alone] for name in found}
        empty = annotator.annotate(ImageBatch(rows=NOTHING))
        assert {n: (len(v), v.type) for n, v in empty.items()} == {n: (0, c.type) for n, c in annotator.columns.items()}


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (16, 16, 16), (30, 90, 160)])
@pytest.mark.parametrize("bars", [(60, 60, 0, 0), (0, 0, 80, 80), (40, 40, 40, 40), (50, 0, 0, 0)])
def test_bars_of_known_size(borders: Annotator, colour: tuple[int, ...], bars: tuple[int, ...]) -> None:
    top, bottom, left, right = bars
    for image in photos():
        height, width = image.shape[:2]
        framed = np.empty((top + height + bottom, left + width + right, 3), np.uint8)
        framed[:] = colour
        framed[top : top + height, left : left + width] = image
        size = framed.shape[1] * 2 // 3, framed.shape[0] * 2 // 3
        fetched = jpeg(framed)
        stored = jpeg(cv2.resize(fetched, size, interpolation=cv2.INTER_AREA))
        found = {name: value[0] for name, value in values(borders, stored).items()}
        long, wide = framed.shape[:2]
        truth = {"top": top / long, "bottom": bottom / long, "left": left / wide, "right": right / wide}
        assert found.pop("share") == pytest.approx(1 - height * width / (long * wide), abs=0.03)
        assert found == pytest.approx(truth, abs=0.01)


def test_what_is_no_border(borders: Annotator) -> None:
    images = [*photos()]
    for ground in ((255, 255, 255), (0, 0, 0)):
        drawing = Image.new("RGB", (400, 400), ground)
        ImageDraw.Draw(drawing).ellipse((60, 80, 340, 300), fill=(200, 30, 40))
        images.append(jpeg(np.asarray(drawing)))
        text = Image.new("RGB", (500, 300), ground)
        ImageDraw.Draw(text).text((60, 100), "SALE", font_size=120, fill=(90, 120, 60))
        images.append(jpeg(np.asarray(text)))
    sky = np.zeros((300, 400, 3), np.uint8)
    sky[:] = np.linspace(90, 200, 300)[:, None, None]  # grows lighter, line by line
    sky[250:] = np.random.default_rng(0).integers(0, 90, (50, 400, 3), np.uint8)
    lined = next(photos())
    lined = np.concatenate([np.zeros_like(lined[:2]), lined])  # two lines of black: a scanner's
    images += [jpeg(sky), jpeg(lined), np.full((200, 300, 3), 255, np.uint8)]
    assert set(values(borders, *images)["share"]) == {0}
