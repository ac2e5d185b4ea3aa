"""The loss of a run over its steps, as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from aesthetic.plots import drawing


def draw_loss(folder: Path) -> Path | None:
    """Draw `folder/log.jsonl` as `folder/loss.png`: training loss, and held-out loss of raw and averaged weights.

    None, and nothing is drawn, where fewer than two steps were logged. The scale is logarithmic.
    """
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    if len(records) < 2:
        return None
    held = [r for r in records if r.get("held_out")]
    with drawing(folder / "loss.png", f"{folder.name}: loss", 7.0, 4.2) as figure:
        axes = figure.subplots()
        axes.plot([r["step"] for r in records], [r["loss"] for r in records], color="#c9c7c0", label="training")
        for kind, ink, words in (("raw", "#b9702a", "held out"), ("ema", "#2f7d6d", "held out, averaged weights")):
            points = [r["step"] for r in held], [r["held_out"][kind] for r in held]
            axes.plot(*points, "o-", color=ink, markersize=3, label=words)
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(color="#e4e2dc", linewidth=0.7, which="both")
        axes.set_axisbelow(True)
        axes.legend(loc="upper right")
    return folder / "loss.png"
