"""Plots of how good a head is: predictions against ratings, reliability, the learning curve.

Each is one PNG of 900 pixels or a little more in width, and the same numbers give the same bytes on one version of
matplotlib, whatever the user's own matplotlib settings.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from aesthetic.files import write_atomic
from aesthetic.heads import HeadError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DENSE = 2000
"""Above this many rows, dots would hide each other: density is drawn."""

_PAPER, _INK, _SOFT, _LINE, _GREEN, _AMBER = "#fbfaf7", "#1d1d1b", "#6d6b65", "#e4e2dc", "#2f7d6d", "#b9702a"
_STYLE: dict[str, Any] = {
    "figure.facecolor": _PAPER,
    "axes.facecolor": _PAPER,
    "savefig.facecolor": _PAPER,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "text.color": _INK,
    "text.parse_math": False,  # a dollar in a head's name is a dollar
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "legend.fontsize": 9,
    "legend.frameon": False,
}
_DPI = 150
_ROOM = 1.15  # beside the first and the last point of a logarithmic axis, as a factor


def scatter(
    path: Path | str,
    predicted: npt.ArrayLike,
    rated: npt.ArrayLike,
    scale: tuple[float, float],
    *,
    title: str,
) -> Path:
    """Draw held-out predictions (n,) against ratings (n,), both in the units of `scale`; returns the path.

    A dotted line is where both are equal, an amber one the calibration: the least-squares line of rating on prediction,
    with its slope. Histograms of both lie along the edges. Above DENSE rows density takes the place of dots. The axes
    hold the scale, and all predictions where they leave it.
    """
    x, y = _numbers(path, "predicted", predicted), _numbers(path, "rated", rated)
    if len(x) != len(y) or not len(x):
        raise HeadError(f"{path}: {len(x)} predictions and {len(y)} ratings; as many of both are needed, at least one")
    start, end = _span([*scale, x.min(), x.max(), y.min(), y.max()])
    with drawing(path, title, 6.2, 6.2) as figure:
        from matplotlib.colors import LinearSegmentedColormap

        grid = figure.add_gridspec(2, 2, width_ratios=(6, 1), height_ratios=(1, 6), wspace=0.02, hspace=0.02)
        axes = figure.add_subplot(grid[1, 0])
        above, beside = figure.add_subplot(grid[0, 0], sharex=axes), figure.add_subplot(grid[1, 1], sharey=axes)
        axes.set(xlim=(start, end), ylim=(start, end), xlabel="predicted, held out", ylabel="rated")
        if len(x) > DENSE:
            greens = LinearSegmentedColormap.from_list("greens", ["#d3e5df", _GREEN, "#0e3a32"])
            cells = axes.hexbin(
                x, y, gridsize=55, mincnt=1, bins="log", extent=(start, end, start, end), cmap=greens, linewidths=0
            )
            bar = figure.colorbar(cells, ax=[axes, beside], shrink=0.5, pad=0.01, aspect=30, label="images in a cell")
            bar.outline.set_visible(False)  # type: ignore[operator]
            bar.ax.yaxis.set_major_formatter(_plain)
            bar.ax.yaxis.set_minor_formatter("")
        else:
            axes.plot(x, y, "o", color=_GREEN, markersize=5 if len(x) <= 300 else 3, alpha=0.6, markeredgewidth=0)
        axes.plot((start, end), (start, end), ":", color=_INK, linewidth=1, label="equal")
        if np.ptp(x) > 0:
            slope = float(np.cov(x, y, bias=True)[0, 1] / x.var())
            sides = np.array([x.min(), x.max()])
            words = f"calibration, slope {slope:.2f}"
            axes.plot(sides, y.mean() + slope * (sides - x.mean()), color=_AMBER, linewidth=1.8, label=words)
        _finish(axes, "upper left")
        edges = np.linspace(start, end, 41).tolist()
        above.hist(x, edges, color=_GREEN, alpha=0.7)
        beside.hist(y, edges, color=_GREEN, alpha=0.7, orientation="horizontal")
        above.axis("off")
        beside.axis("off")
    return Path(path)


def reliability(path: Path | str, bins: Sequence[dict[str, Any]], *, title: str, probability: bool) -> Path:
    """Draw what was predicted against what came true, bin by bin, and how many images each bin has; returns the path.

    bins, from the lowest prediction to the highest: predicted (the bin's mean), observed (the share of positives, or
    the mean rating), low and high (the ends of an interval around `observed`; None or NaN where there is none), n. A
    bin without images is left out. `probability`: predictions are probabilities and `observed` a share, both 0 to 1;
    otherwise both are ratings. Where half of the bins predict less than 0.1, as for what is rare, the axes are square
    roots.
    """
    bins = [b for b in bins if b["n"]]
    if not bins:
        raise HeadError(f"{path}: no bin has an image in it; there is nothing to draw")
    predicted, observed = (_numbers(path, name, [b[name] for b in bins]) for name in ("predicted", "observed"))
    low, high = (_ends([b[name] for b in bins], observed) for name in ("low", "high"))
    counts = [int(b["n"]) for b in bins]
    start, end = _span([*predicted, *low, *high], *((0, 1) if probability else (None, None)))
    with drawing(path, title, 6.2, 6.6) as figure:
        axes, below = figure.subplots(2, 1, height_ratios=(4, 1))
        names = ("predicted probability", "observed share") if probability else ("mean prediction", "mean rating")
        if probability and np.median(predicted) < 0.1:  # what is rare would lie in one corner
            for scale in (axes.set_xscale, axes.set_yscale):
                scale("function", functions=(np.sqrt, np.square))
            top = min(v * 10.0**e for e in range(-9, 1) for v in (1, 2, 5) if v * 10.0**e >= end)
            ticks = [v * top for v in (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1) if start <= v * top <= end]
            axes.set_xticks(ticks, [f"{v:.3g}" for v in ticks])
            axes.set_yticks(ticks, [f"{v:.3g}" for v in ticks])
            names = (f"{names[0]} (square-root axes)", names[1])
        axes.set(xlim=(start, end), ylim=(start, end), xlabel=names[0], ylabel=names[1])
        axes.plot((start, end), (start, end), ":", color=_INK, linewidth=1, label="calibrated")
        axes.errorbar(
            predicted,
            observed,
            yerr=(observed - low, high - observed),
            fmt="o-",
            color=_GREEN,
            ecolor=_GREEN,
            elinewidth=1.4,
            capsize=3,
            markersize=5.5,
            linewidth=1,
            clip_on=False,
            label="observed, with its interval" if (high > low).any() else "observed",
        )
        _finish(axes, "upper left")
        bars = below.bar(range(1, len(bins) + 1), counts, color=_GREEN, alpha=0.7, width=0.8)
        small = {"fontsize": 8 if len(bins) <= 12 else 6.5, "color": _SOFT}
        below.bar_label(bars, [f"{n:,}" if n < 10_000 else f"{n / 1000:,.0f}k" for n in counts], padding=2, **small)
        below.set(xticks=range(1, len(bins) + 1), yticks=(), ylabel="images", xlabel="bin, by prediction")
        below.margins(x=0.02, y=0.25)
        below.spines["left"].set_visible(False)
    return Path(path)


def learning_curve(
    path: Path | str,
    points: Sequence[dict[str, Any]],
    ceiling: float | None = None,
    *,
    title: str,
) -> Path:
    """Draw how good a head is that was fitted to so many ratings; returns the path.

    points: n (ratings in training, at least 1), value (Spearman, on ratings held out), low and high (the ends of
    its interval; None or NaN where there is none); a point whose value is None or NaN is left out. ceiling: the best
    value that the ratings' own noise allows, a dashed line. What more ratings would bring is not drawn: from a
    handful of points with intervals like these, any law could be fitted.
    """
    known = sorted((p for p in points if p["value"] is not None and np.isfinite(p["value"])), key=lambda p: p["n"])
    if not known or known[0]["n"] < 1:
        raise HeadError(f"{path}: no point of the learning curve has a value and at least one rating")
    n, value = _numbers(path, "n", [p["n"] for p in known]), _numbers(path, "value", [p["value"] for p in known])
    low, high = (_ends([p[name] for p in known], value) for name in ("low", "high"))
    with drawing(path, title, 6.2, 4.2) as figure:
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set(xlim=(n[0] / _ROOM, n[-1] * _ROOM), xlabel="ratings in training", ylabel="Spearman, held out")
        axes.fill_between(n, low, high, color=_GREEN, alpha=0.15, linewidth=0)
        axes.vlines(n, low, high, color=_GREEN, alpha=0.5, linewidth=1.2)
        axes.plot(n, value, "o-", color=_GREEN, markersize=5.5, linewidth=1.4, label="Spearman")
        if ceiling is not None:
            words = f"noise ceiling {ceiling:.2f}"
            axes.axhline(ceiling, color=_AMBER, linestyle="--", linewidth=1.4, label=words)
        axes.set_ylim(*_span([*low, *high, *value, *([] if ceiling is None else [ceiling])]))
        # labels of those numbers of ratings that have room on a logarithmic axis, the last among them
        room = np.log(n[-1] / n[0] * _ROOM**2) / 12
        ticks: list[float] = []
        for v in n[::-1]:
            if not ticks or np.log(ticks[-1] / v) >= room:
                ticks.append(float(v))
        axes.set_xticks(ticks, minor=False)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(_plain)
        _finish(axes, "lower right")
    return Path(path)


@contextmanager
def drawing(path: Path | str, title: str, width: float, height: float) -> Iterator[Figure]:
    """A figure in our style, which is written under `path` when the block ends well."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a letter that the font lacks is a box
        figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
        figure.suptitle("\n".join(textwrap.wrap(title, 70)), x=0.02, ha="left", fontsize=11)
        yield figure
        buffer = BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(Path(path), buffer.getvalue())


def _finish(axes: Axes, legend: str) -> None:
    axes.legend(loc=legend)
    axes.grid(color=_LINE, linewidth=0.7)
    axes.set_axisbelow(True)


def _plain(value: float, _: Any = None) -> str:
    return f"{value:,.0f}"


def _span(values: Sequence[float], least: float | None = None, most: float | None = None) -> tuple[float, float]:
    """An axis that holds all values with a little room, but no room beyond `least` and `most`."""
    start, end = float(min(values)), float(max(values))
    room = 0.04 * (end - start) or 0.5
    return (
        start - room if least is None else max(start - room, least),
        end + room if most is None else min(end + room, most),
    )


def _numbers(path: Path | str, name: str, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    found = np.asarray(values, np.float64)
    if found.ndim != 1 or not np.isfinite(found).all():
        raise HeadError(f"{path}: `{name}` is not a row of finite numbers")
    return found


def _ends(values: Sequence[float | None], otherwise: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ends of intervals; where there is none, the value itself."""
    found = np.array([np.nan if v is None else v for v in values], np.float64)
    return np.where(np.isfinite(found), found, otherwise)
