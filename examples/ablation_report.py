"""What examples/ablation.py reports: figures with intervals, tables, a page, a figure and a sheet of what was drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from curate.encoders.bundled import FEATURES
from curate.sheets import enlarged, sheet
from curate.store.files import read_json, write_json
from examples.faults import CLEAN, FAULTS
from train.evaluate.figures import kernel, kid_floor, scaled

Array = npt.NDArray[np.float64]

DRAWS = 1000
HALVES = 200  # subsets of half of the images of which KID is taken

WORDS = {
    "chance": "by chance", "size": "size", "sharpness": "sharpness", "text": "text in the image",
    "near_duplicates": "near-duplicates", "topic": "topic (a head on 100 ratings)", "caption": "caption agreement",
    "recipe": "the whole recipe", "clean": "clean rows only",
    "copy": "copies", "watermark": "watermarks", "blur": "blur", "tiny": "tiny", "off_topic": "off topic",
}  # fmt: skip
"""How ways and faults are called; the fault `caption` is a wrong one."""

FIGURES = {
    "loss": "held-out loss", "recall_at_5": "R@5 of prompts", "similarity": "similarity to the prompt", "kid": "KID",
}  # fmt: skip
BETTER = {"loss": -1, "recall_at_5": 1, "similarity": 1, "kid": -1}  # the sign of what is better


def write_report(out: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write report.json, report.md, figure.png and drawn.png of an ablation whose models are all measured."""
    settings = facts["settings"]
    ways, seeds = settings["ways"], range(settings["seeds"])
    measured = {way: [dict(np.load(out / "models" / f"{way}-{s}" / "measured.npz")) for s in seeds] for way in ways}
    report = {**facts, "planted": read_json(out / "planted.json")}
    real = dict(np.load(out / "apart.npz"))
    report["figures"], report["real"] = figures(real, measured), real_figures(real)
    write_json(out / "report.json", report)
    (out / "report.md").write_text("\n".join(page(report)) + "\n", encoding="utf-8")
    draw_figure(report, out / "figure.png")
    rows = [(WORDS[way], [enlarged(image, "") for image in cells[0]["drawn"][:5]]) for way, cells in measured.items()]
    sheet(out / "drawn.png", "The same prompts and noise, seed 0", rows)
    return report


# ------------------------------------------------------------------------------------------------------------ figures


def figures(real: Mapping[str, Any], measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Of each way each of FIGURES: `mean` over seeds, `seeds`, and `gain`, what it differs from chance by.

    The gain has an interval of 95% {value, low, high}, paired by seed and image (or prompt, and noise), of draws with
    replacement of seeds and of images (of KID: of a seed and of halves of the images, so its interval is a wide one).
    """
    each = {
        "loss": {way: np.stack([c["loss"] for c in cells]) for way, cells in measured.items()},
        "recall_at_5": {way: np.stack([c["rank"] < 5 for c in cells]) for way, cells in measured.items()},
        "similarity": {way: np.stack([c["similarity"] for c in cells]) for way, cells in measured.items()},
    }
    found: dict[str, Any] = {way: {} for way in measured}
    for name, values in each.items():
        for way, v in values.items():
            gain = paired(v.astype(float) - values["chance"])
            found[way][name] = {"mean": float(v.mean()), "seeds": v.mean(1).tolist(), "gain": gain}
    distances = kids(real, measured)
    for way, d in distances.items():
        gap = d - distances["chance"]
        low, high = np.quantile(gap, (0.025, 0.975))
        gain = {"value": float(gap.mean()), "low": float(low), "high": float(high)}
        found[way]["kid"] = {"mean": float(d.mean()), "seeds": d.mean(1).tolist(), "gain": gain}
    return found


def real_figures(real: Mapping[str, Any]) -> dict[str, float]:
    """The same of the real images with these captions: the most that there is to reach."""
    floor = kid_floor(real["vectors"][:, FEATURES], subset=len(real["prompts"]) // 2)
    return {
        "recall_at_5": float((real["rank"] < 5).mean()),
        "similarity": float(real["similarity"].mean()),
        "kid": floor.mean,
    }


def paired(gap: Array, seed: int = 0) -> dict[str, float]:
    """The mean of differences (seeds, images) and its interval, both drawn with replacement."""
    rng = np.random.default_rng(seed)
    seeds, images = gap.shape
    means = [gap[rng.integers(seeds, size=seeds)][:, rng.integers(images, size=images)].mean() for _ in range(DRAWS)]
    low, high = np.quantile(means, (0.025, 0.975))
    return {"value": float(gap.mean()), "low": float(low), "high": float(high)}


def kids(real: Mapping[str, Any], measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Array]:
    """KID of each way and seed, (seeds, HALVES): of the same halves of prompts and of real images for all.

    As `train.evaluate.figures.mmd2` has it of two halves, but every pair's kernel is computed once.
    """
    features = scaled(real["vectors"][:, FEATURES])
    prompts, seeds = len(measured["chance"][0]["vectors"]), len(measured["chance"])
    rng = np.random.default_rng(0)
    halves = [(_half(prompts, rng), _half(len(features), rng)) for _ in range(HALVES)]
    among = kernel(features, features)
    found = {way: np.empty((seeds, HALVES)) for way in measured}
    for way, cells in measured.items():
        for s, cell in enumerate(cells):
            x = scaled(cell["vectors"][:, FEATURES])
            own, cross = kernel(x, x), kernel(x, features)
            for half, (drawn, some) in enumerate(halves):
                crossed = 2 * float(cross[np.ix_(drawn, some)].mean())
                found[way][s, half] = _pairs(own, drawn) + _pairs(among, some) - crossed
    return found


def _half(count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    return rng.choice(count, count // 2, replace=False)


def _pairs(kernels: Array, rows: npt.NDArray[np.int64]) -> float:
    """The mean over pairs of different rows."""
    part = kernels[np.ix_(rows, rows)]
    return float((part.sum() - np.trace(part)) / (len(rows) * (len(rows) - 1)))


def closed(report: Mapping[str, Any], name: str) -> float | None:
    """Which part of the way from chance to clean rows the recipe goes; None where clean rows are not clearly better."""
    found = report["figures"]
    if "recipe" not in found or against_chance(found["clean"][name]["gain"], name) != "better":
        return None
    return float(found["recipe"][name]["gain"]["value"] / found["clean"][name]["gain"]["value"])


def against_chance(gain: Mapping[str, float], name: str) -> str:
    """`better` or `worse` than chance where the interval leaves zero out, else `no difference seen`."""
    if gain["low"] <= 0 <= gain["high"]:
        return "no difference seen"
    return "better" if BETTER[name] * gain["value"] > 0 else "worse"


def rules(report: Mapping[str, Any]) -> list[str]:
    """The ways that a curator has."""
    return [way for way in report["removed"] if way not in ("chance", "clean")]


def shares_removed(report: Mapping[str, Any], way: str) -> dict[str, float]:
    """Of each fault, and of clean rows, the share that the rules of a way turn down before any are taken."""
    return {fault: 1 - part["kept"] / part["rows"] for fault, part in report["removed"][way].items()}


# --------------------------------------------------------------------------------------------------------------- page


def page(report: Mapping[str, Any]) -> list[str]:
    """report.md, line by line."""
    s, planted = report["settings"], report["planted"]
    total, chosen = s["images"], round(s["share"] * s["images"])
    names = [*FAULTS, CLEAN]
    head = ["", *map(fault_words, names)]
    lines = [
        "# Does curating help?", "",
        f"{total:,} images with planted faults; {chosen:,} of them chosen in each way; preset {s['preset']}, "
        f"{s['steps']:,} steps of {s['batch']}, {s['seeds']} seed{'s' if s['seeds'] > 1 else ''}; measured on "
        f"{s['apart']:,} clean images that no set holds. torch {report['made_with'].get('torch')}.", "",
        *summary(report), "",
        "## What the rules turn down", "",
        "Share of the rows with each planted fault, and of the clean rows, that the rules reject.", "",
    ]  # fmt: skip
    rows = [["rows", *(f"{planted[n]:,}" for n in names)]]
    for way in rules(report):
        rows.append([WORDS[way], *(f"{shares_removed(report, way)[n]:.2f}" for n in names)])
    lines += [
        *table(head, rows),
        "",
        "## What was trained on",
        "",
        f"Share of the {chosen:,} images, mean of seeds.",
        "",
    ]
    rows = []
    for way in s["ways"]:
        counts = [report["chosen"][f"{way}-{seed}"] for seed in range(s["seeds"])]
        rows.append([WORDS[way], *(f"{np.mean([c.get(n, 0) for c in counts]) / chosen:.3f}" for n in names)])
    lines += [*table(head, rows), "", "## What came of it", ""]
    one = " With one seed it knows nothing of how models of other seeds would differ." if s["seeds"] == 1 else ""
    lines.append(
        "Mean of seeds; below it the difference to chance and its 95% interval, bold where zero is outside." + one
    )
    lines.append("")
    rows = []
    for way in s["ways"]:
        row = [WORDS[way]]
        for name in FIGURES:
            found = report["figures"][way][name]
            row.append(f"{found['mean']:.4f}" + ("" if way == "chance" else f"<br>{_gain(found['gain'])}"))
        rows.append(row)
    rows.append(["real images", *(f"{report['real'][n]:.4f}" if n in report["real"] else "" for n in FIGURES)])
    arrows = [f"{words} {'↓' if BETTER[name] < 0 else '↑'}" for name, words in FIGURES.items()]
    return [*lines, *table(["way", *arrows], rows), "", "![](figure.png)", "", "![](drawn.png)"]


def _gain(gain: Mapping[str, float]) -> str:
    words = f"{gain['value']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]"
    return words if gain["low"] <= 0 <= gain["high"] else f"**{words}**"


def summary(report: Mapping[str, Any]) -> list[str]:
    """What the figures say, whatever it is: a line for each."""
    found, lines = report["figures"], []
    for way in ("recipe", "clean"):
        if way in found:
            said = [f"{words} {against_chance(found[way][name]['gain'], name)}" for name, words in FIGURES.items()]
            lines.append(f"- {WORDS[way]} against chance: {', '.join(said)}.")
    parts = [f"{part:.0%} of {FIGURES[name]}" for name in FIGURES if (part := closed(report, name)) is not None]
    if parts:
        lines.append(f"- Of what clean rows gain over chance, the whole recipe gains {', '.join(parts)}.")
    for way in found:
        if way not in ("chance", "recipe", "clean"):
            said = [f"{words} {verdict}" for name, words in FIGURES.items()
                    if (verdict := against_chance(found[way][name]["gain"], name)) != "no difference seen"]  # fmt: skip
            lines.append(f"- {WORDS[way]} alone: {', '.join(said) or 'no difference seen'}.")
    return lines


def fault_words(name: str) -> str:
    """How a fault is called; and rows without one."""
    return {"caption": "wrong captions", CLEAN: "clean"}.get(name) or WORDS[name]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


# ------------------------------------------------------------------------------------------------------------- figure


def draw_figure(report: Mapping[str, Any], path: Path) -> None:
    """Above, what each rule turns down; below, how each way differs from chance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ways, names = [way for way in report["settings"]["ways"] if way != "chance"], [*FAULTS, CLEAN]
    every = rules(report)
    figure = plt.figure(figsize=(11, 2.4 + 0.3 * (len(every) + len(ways))), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(len(every) + 2, len(ways) + 3))
    axes = above.subplots()
    shares = np.array([[shares_removed(report, way)[n] for n in names] for way in every])
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (y, x), share in np.ndenumerate(shares):
        axes.text(x, y, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.6 else "black")
    axes.axvline(len(names) - 1.5, color="white", linewidth=4)
    axes.set_yticks(range(len(every)), [WORDS[way] for way in every])
    axes.set_xticks(range(len(names)), [fault_words(n) for n in names])
    axes.xaxis.tick_top()
    axes.set_title("share of rows that the rule turns down")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    panels = below.subplots(1, len(FIGURES), sharey=True)
    for axes, (name, words) in zip(panels, FIGURES.items(), strict=True):
        for y, way in enumerate(ways):
            gain = report["figures"][way][name]["gain"]
            colour = {"better": "tab:green", "worse": "tab:red"}.get(against_chance(gain, name), "0.5")
            axes.plot([gain["low"], gain["high"]], [y, y], color=colour)
            axes.plot(gain["value"], y, "o", color=colour)
        axes.axvline(0, color="0.7", linewidth=0.8, zorder=0)
        axes.set_title(f"{words}\n{'lower' if BETTER[name] < 0 else 'higher'} is better", fontsize=10)
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=4)
    panels[0].set_yticks(range(len(ways)), [WORDS[way] for way in ways])
    panels[0].set_ylim(len(ways) - 0.5, -0.5)
    below.supxlabel("difference to chance, 95% interval", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
