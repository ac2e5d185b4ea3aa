"""The transformer's training step beside the UNet's, at equal parameters: `python -m bench.families`, two minutes.

Both learn from the same captions and from latents of the same shape, through our loop, with a frozen text encoder of
the same size, in one process, in turns of some steps, every other round in the other order. Every figure is a median
over turns, every ratio the median of each round's. Operations are counted by torch (`train.metrics.training_flops`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.train import BATCH, IMAGES, MODEL, STEPS, _Again, batch_of, caption, in_turn, ours, times_as_fast
from train.models.base import count_parameters
from train.models.family import family_of, new_model
from train.models.presets import PRESETS, Preset, TransformerPreset

_LARGE: Any = PRESETS["dit-256"]
TRANSFORMER: TransformerPreset = replace(
    _LARGE, size=MODEL.size, latents=MODEL.latents, factor=MODEL.factor, vae=MODEL.vae, shift=1.0,
    width=256, layers=6, refiners=2, heads=4, text=MODEL.text, text_layers=MODEL.text_layers,
    vocabulary=MODEL.vocabulary,
)  # fmt: skip
"""A transformer of as many parameters as bench.train's UNet, within a hundredth."""


def main() -> None:
    """Train both in turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    warnings.filterwarnings("ignore")
    models: dict[str, Preset] = {"UNet": MODEL, "transformer": TRANSFORMER}
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(models, Path(scratch), asked.rounds)
    print(f"batch {BATCH}, {asked.threads} threads, {asked.rounds} rounds of {STEPS} steps")
    for name, row in result.items():
        print(
            f"    {name:12} {row['parameters'] / 1e6:5.2f} M parameters  {row['img_s']:6.2f} img/s  "
            f"{row['gflop']:5.2f} GFLOP an image  {row['gflop_s']:6.1f} GFLOP/s  {row['cpu_ms']:6.0f} CPU-ms a step, "
            f"{row['gflop_cpu_s']:.1f} GFLOP a CPU-second  {row['ratio']:.2f} times the UNet's images"
        )
    if asked.json:
        asked.json.write_text(json.dumps({**vars(asked), "found": result}, indent=1, default=str))


def measure(models: dict[str, Preset], folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Of each model: parameters of the denoiser, rates by the clock, CPU time of a step."""
    captions = [caption(n) for n in range(IMAGES)]
    loops: dict[str, Iterator[dict[str, Any]]] = {}
    rows: dict[str, dict[str, float]] = {}
    spent: dict[str, list[float]] = {name: [] for name in models}
    flops: dict[str, float] = {}
    for name, preset in models.items():
        pipeline = new_model(preset, captions, "flow")
        side = preset.size // preset.factor
        latents = torch.randn(BATCH, preset.latents, side, side, generator=torch.Generator().manual_seed(0))
        loops[name] = ours(_Again(batch_of(pipeline, latents, True, range(BATCH))), folder / name, pipeline)
        rows[name] = {"parameters": count_parameters([family_of(pipeline).network(pipeline)])}

    def turn(name: str) -> float:
        began, cpu = time.perf_counter(), time.process_time()
        record = next(loops[name])
        flops[name] = record["tflop_s"] * 1e12 / record["img_s"]
        spent[name].append((time.process_time() - cpu) / STEPS)
        return time.perf_counter() - began

    taken = in_turn({name: lambda name=name: turn(name) for name in models}, rounds)  # type: ignore[misc]
    for name, row in rows.items():
        row["img_s"] = BATCH * STEPS / median(taken[name])
        row |= {"gflop": flops[name] / 1e9, "gflop_s": row["img_s"] * flops[name] / 1e9}
        row |= {"cpu_ms": 1000 * median(spent[name][1:]), "ratio": times_as_fast(taken, name, "UNet")}
        row["gflop_cpu_s"] = BATCH * row["gflop"] / row["cpu_ms"] * 1000
    return rows


if __name__ == "__main__":
    main()
