"""Plots of a head: what is drawn is what was given, in the same bytes each time, without pyplot."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from aesthetic.heads import HeadError
from aesthetic.plots import learning_curve, reliability, scatter
from curate.sheets import Tile, sheet

GREEN, AMBER = (47, 125, 109), (185, 112, 42)
pytestmark = pytest.mark.filterwarnings("error")


def predictions(n, seed=0):
    rng = np.random.default_rng(seed)
    rated = np.clip(rng.normal(4, 1, n), 1, 7)
    return 4 + 0.6 * (rated - 4) + rng.normal(0, 0.5, n), rated


BINS = [
    {"predicted": 0.04, "observed": 0.02, "low": 0.0, "high": 0.05, "n": 812},
    {"predicted": 0.31, "observed": 0.38, "low": 0.3, "high": 0.46, "n": 97},
    {"predicted": 0.5, "observed": None, "low": None, "high": None, "n": 0},
    {"predicted": 0.93, "observed": 1.0, "low": None, "high": float("nan"), "n": 12_345},
]
POINTS = [
    {"n": 100, "value": 0.5, "low": 0.4, "high": 0.6},
    {"n": 30, "value": 0.3, "low": 0.1, "high": 0.5},
    {"n": 10, "value": None, "low": None, "high": None},
    {"n": 250, "value": 0.58, "low": None, "high": None},
]


def pixels(path):
    with Image.open(path) as image:
        assert not image.info.keys() - {"dpi"}  # no date, no software
        return np.asarray(image.convert("RGB")).astype(int)


def coloured(path, ink):
    """Where a plot has that colour: (rows, columns)."""
    return np.nonzero(np.abs(pixels(path) - ink).max(2) < 12)


DRAWN = {
    "scatter": lambda path: scatter(path, *predictions(40), (1, 7), title="taste: Spearman 0.71"),
    "dense": lambda path: scatter(path, *predictions(5000), (1, 7), title="taste: Spearman 0.71"),
    "reliability": lambda path: reliability(path, BINS, title="watermark", probability=True),
    "ratings": lambda path: reliability(path, BINS, title="taste", probability=False),
    "curve": lambda path: learning_curve(path, POINTS, 0.87, title="taste"),
}


@pytest.mark.parametrize("kind", DRAWN)
def test_the_same_numbers_give_the_same_bytes_whatever_the_users_settings(kind, tmp_path):
    import matplotlib as mpl

    first = DRAWN[kind](tmp_path / "new" / "a.png")
    assert first == tmp_path / "new" / "a.png"
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "red", "savefig.bbox": "tight", "lines.linewidth": 9}):
        again = DRAWN[kind](tmp_path / "b.png")
        assert mpl.rcParams["font.size"] == 20
    assert first.read_bytes() == again.read_bytes()
    height, width, _ = pixels(first).shape
    assert 900 <= width <= 960 and 600 <= height <= 1000
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]


@pytest.mark.parametrize("kind", DRAWN)
def test_nothing_touches_the_edge(kind, tmp_path):
    found = pixels(DRAWN[kind](tmp_path / "a.png"))
    paper = found[0, 0]
    for edge in (found[:4], found[-4:], found[:, :4], found[:, -4:]):
        assert (edge == paper).all()


def test_the_calibration_line_is_that_of_the_numbers(tmp_path):
    x = np.linspace(2, 6, 30)
    steep = coloured(scatter(tmp_path / "a.png", x, 4 + 0.9 * (x - 4), (1, 7), title=""), AMBER)
    flat = coloured(scatter(tmp_path / "b.png", x, 4 + 0.1 * (x - 4), (1, 7), title=""), AMBER)
    below = 250  # under the legend
    for (rows, columns), slope in ((steep, 0.9), (flat, 0.1)):
        seen = rows > below
        assert -np.polyfit(columns[seen], rows[seen], 1)[0] == pytest.approx(slope, abs=0.05)


def test_predictions_outside_the_scale_are_still_in_the_plot(tmp_path):
    path = scatter(tmp_path / "a.png", [0.0, 3.0, 9.0], [1.0, 2.0, 7.0], (1, 7), title="")
    rows, columns = np.nonzero((np.abs(pixels(path) - (130, 179, 168)).max(2) < 20)[160:, :760])  # dots over paper
    assert np.ptp(columns) > 500 and np.ptp(rows) > 350


def test_an_empty_bin_and_a_point_without_a_value_are_left_out(tmp_path):
    whole = [b for b in BINS if b["n"]]
    some = reliability(tmp_path / "a.png", BINS, title="t", probability=True).read_bytes()
    assert reliability(tmp_path / "b.png", whole, title="t", probability=True).read_bytes() == some
    known = [p for p in reversed(POINTS) if p["value"] is not None]  # in any order
    curve = learning_curve(tmp_path / "c.png", POINTS, title="t").read_bytes()
    assert learning_curve(tmp_path / "d.png", known, title="t").read_bytes() == curve


def test_bins_of_what_is_rare_are_seen_apart(tmp_path):
    bins = [{"predicted": p, "observed": p, "low": None, "high": None, "n": 9} for p in (0.001, 0.004, 0.01, 0.03, 0.9)]
    path = reliability(tmp_path / "a.png", bins, title="t", probability=True)
    rows, columns = coloured(path, GREEN)
    plot = (rows < 700) & ((rows > 200) | (columns > 450))  # without the legend and the bars
    dots = np.bincount(columns[plot], minlength=950) > 9  # the line between them is thinner
    assert np.count_nonzero(np.diff(dots.astype(int)) == 1) == len(bins)


def test_the_ceiling_is_in_the_plot_however_high(tmp_path):
    low = coloured(learning_curve(tmp_path / "a.png", POINTS, 0.65, title="t"), AMBER)
    high = coloured(learning_curve(tmp_path / "b.png", POINTS, 0.99, title="t"), AMBER)
    none = coloured(learning_curve(tmp_path / "c.png", POINTS, title="t"), AMBER)
    assert len(none[0]) == 0 and min(len(low[0]), len(high[0])) > 500


def test_plots_of_very_little(tmp_path):
    scatter(tmp_path / "one.png", [3.0], [4.0], (1, 7), title="one image")
    scatter(tmp_path / "flat.png", [3.0, 3.0], [4.0, 5.0], (1, 7), title="one prediction")
    reliability(tmp_path / "bin.png", BINS[:1], title="one bin", probability=True)
    learning_curve(tmp_path / "point.png", POINTS[:1], title="one point")
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_any_title_can_be_drawn(tmp_path, recwarn):
    scatter(tmp_path / "a.png", *predictions(30), (1, 7), title="a_{b} $x_ 口味 " + "many words " * 30)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda p: scatter(p, [1.0, 2.0], [1.0], (1, 7), title=""), "2 predictions and 1 ratings"),
        (lambda p: scatter(p, [], [], (1, 7), title=""), "at least one"),
        (lambda p: scatter(p, [1.0, np.nan], [1.0, 2.0], (1, 7), title=""), "`predicted` is not"),
        (lambda p: reliability(p, BINS[2:3], title="", probability=True), "no bin"),
        (lambda p: learning_curve(p, POINTS[2:3], title=""), "no point"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name_and_leaves_no_file(draw, words, tmp_path):
    with pytest.raises(HeadError, match=f"x.png: .*{words}"):
        draw(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_neither_the_module_needs_matplotlib_nor_drawing_pyplot(tmp_path):
    code = (
        "import sys, aesthetic.plots as p; assert 'matplotlib' not in sys.modules; "
        f"p.learning_curve({str(tmp_path / 'a.png')!r}, [{{'n': 9, 'value': 1, 'low': 0, 'high': 2}}], title='t'); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_sheet_of_images_at_hand(tmp_path):
    red, blue = np.full((400, 600, 3), (200, 30, 30), np.uint8), Image.new("RGB", (300, 900), (30, 30, 200))
    rows = [
        ("best", [Tile(red, "rated 6.40, predicted 5.90\nred.jpg"), Tile(blue, "rated 6.31")]),
        ("worst", []),
        ("most wrong", [Tile(None, "rated 1.20"), *[Tile(blue, f"number {i}") for i in range(6)]]),
    ]
    first = sheet(tmp_path / "a.png", "taste", rows)
    assert first.read_bytes() == sheet(tmp_path / "b.png", "taste", rows).read_bytes()
    with Image.open(io.BytesIO(first.read_bytes())) as image:
        assert image.width == 2480
        counts = {colour: n for n, colour in image.getcolors(1 << 24)}
    assert blue.size == (300, 900)  # the images given are as they were
    assert counts[(200, 30, 30)] > 440 * 290 and counts[(30, 30, 200)] > 7 * 100 * 320


def test_a_blurred_image_of_a_sheet_cannot_be_told(tmp_path):
    stripes = np.zeros((300, 300, 3), np.uint8)
    stripes[::6] = 255
    for blurred in (False, True):
        sheet(tmp_path / f"{blurred}.png", "t", [("row", [Tile(stripes, "", blurred)])])
    sharp, soft = (np.abs(np.diff(pixels(tmp_path / f"{b}.png")[200:, :500, 0], axis=0)).mean() for b in (False, True))
    assert soft < sharp / 5
