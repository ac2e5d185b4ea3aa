"""The annotator `text`, on text drawn into photographs."""

import concurrent.futures
import difflib
import os
import subprocess
import sys

import matplotlib.font_manager
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_image

from curate.annotators.base import ImageBatch, Resources
from curate.annotators.registry import make_annotator
from curate.annotators.text import is_mark

FONT = matplotlib.font_manager.findfont("DejaVu Sans")  # matplotlib carries it


@pytest.fixture(scope="module")
def annotator():
    annotator = make_annotator("text", "text")
    annotator.load(Resources(threads=1, space=None, encoder=lambda: pytest.fail("no encoder is needed")))
    return annotator


def photograph(name="flower.jpg", size=(480, 320)):
    return Image.fromarray(load_sample_image(name)).resize(size)


def written(text, size, at=(20, 30), image=None):
    """A photograph with a line of text of this size in pixels, and the share of its area that the letters' box is."""
    image = photograph() if image is None else image.copy()
    font = ImageFont.truetype(FONT, size)
    canvas = ImageDraw.Draw(image)
    left, top, right, bottom = canvas.textbbox(at, text, font=font)
    assert right < image.width and bottom < image.height
    canvas.text(at, text, font=font, fill="white", stroke_width=1, stroke_fill="black")
    return np.asarray(image), (right - left) * (bottom - top) / image.width / image.height


def test_text_of_a_photograph(annotator):
    plain, (titled, share), (tagged, _) = (
        np.asarray(photograph()),
        written("Breakfast at the harbour", 24),
        written("shutterstock", 20, (150, 200)),
    )
    rows = pa.table({"key": ["a", "b", "c"]})
    inputs = [annotator.preprocess(image) for image in (plain, titled, tagged)]
    values = {k: v.to_pylist() for k, v in annotator.annotate(ImageBatch(rows=rows, inputs=inputs)).items()}
    assert values["area"][0] == 0 and values["boxes"][0] == 0 and values["words"][0] == ""
    assert share < values["area"][1] < 2 * share
    assert values["boxes"][1:] == [1, 1]
    assert values["words"][1].replace(" ", "") == "Breakfastattheharbour"
    assert values["mark"] == [False, False, True]


def test_values_do_not_depend_on_threads(annotator):
    images = [written(text, size)[0] for text, size in (("Open every day", 18), ("one", 40), ("Chapter 12", 12))]
    one = [annotator.preprocess(image) for image in images]
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        assert list(threads.map(annotator.preprocess, images)) == one


@pytest.mark.parametrize("size", [(1, 1), (3, 400), (900, 8)])
def test_an_image_of_any_shape_is_looked_at(annotator, size):
    found = annotator.preprocess(np.full((*size, 3), 90, np.uint8))
    assert found == {"area": 0, "boxes": 0, "words": "", "mark": False}


def test_nothing_is_said_and_nothing_is_fetched():
    """In a process of its own, in which no socket can be opened: nothing on its outputs, and the text is read."""
    code = """
import socket, sys
def refuse(*a, **k): raise AssertionError("a socket is opened")
socket.socket.connect = socket.getaddrinfo = refuse
from tests.test_text import written
from curate.annotators.base import Resources
from curate.annotators.registry import make_annotator
annotator = make_annotator("text", "text")
annotator.load(Resources(threads=1, space=None, encoder=None))
assert annotator.preprocess(written("Harbour", 24)[0])["words"] == "Harbour"
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": "."}
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "lines",
    [
        ["Getty Images"], ["gettyimages", "Credit: A. Name"], ["iStock"], ["alamy stock photo"], ["dreamstime.com"],
        ["www.example.org"], ["photos.example.de"], ["https://a.b/c"], ["© 2019 A. Name"], ["(c) 2019"], ["SAMPLE"],
        ["All rights", "reserved"], ["This image is no", "longer available"], ["image not available"], ["视觉中国"],
    ],
)  # fmt: skip
def test_marks(lines):
    assert is_mark(lines)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["Open every day"],
        ["Sampler of 1820"],
        ["St. Peter"],
        ["3.50"],
        ["Vol. 2"],
        ["storage"],
        ["A.B.C"],
        ["nobody.", "home"],
        ["techno photo"],
    ],
)
def test_no_marks(lines):
    assert not is_mark(lines)


@pytest.mark.long
@pytest.mark.parametrize(
    ("script", "texts", "found_at_least", "read_at_least"),
    [
        ("Latin", ("Breakfast at the harbour", "Open every day until nine"), 0.9, 0.9),
        ("Greek", ("Καλοκαιρινές εκπτώσεις", "Ανοιχτά κάθε μέρα"), 0.8, 0.2),
        ("Cyrillic", ("Завтрак у причала", "Открыто каждый день"), 0.8, 0),
    ],
)
def test_planted_text(annotator, script, texts, found_at_least, read_at_least):
    """Lines of 10 to 32 pixels at ten places of two photographs: how many are found, how much of their area, and how
    much of them is read."""
    areas, right = [], []
    for name in ("flower.jpg", "china.jpg"):
        for i, size in enumerate((10, 12, 16, 24, 32)):
            for k, text in enumerate(texts):
                text = text if size < 24 else text[:12]
                image, share = written(text, size, (10 + 12 * i, 20 + 110 * k), photograph(name))
                values = annotator.preprocess(image)
                areas.append(values["area"] / share)
                right.append(difflib.SequenceMatcher(None, text.lower(), values["words"].lower()).ratio())
    found = [a for a in areas if a > 0.5]
    assert len(found) >= found_at_least * len(areas), script
    assert 1 < np.median(found) < 2, script
    assert np.mean(right) >= read_at_least, script
