"""A closed world of captioned shapes, a model trained on it, and an independent judge: do prompts steer the images?

    python examples/shapes.py FOLDER [--preset tiny] [--steps 650] [--shuffle]

Writes 512 images like "a red star on a teal background" (8 colours, 6 shapes, 3 backgrounds; 6 of the 48 pairs of
colour and shape are never among them) as img2dataset would have fetched them, trains the preset on them (`tiny`, a
UNet, or `dit-tiny`, a transformer), draws prompts of seen and of unseen pairs, and prints how often colour, shape and
background are what was asked. With `--shuffle` captions are dealt out at random before training: what is left then is
chance.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from curate.shards.tar import TarWriter
from train.data import ImageDataset, Stream, open_samples
from train.loop import LoopConfig, train
from train.metrics import format_record
from train.models.family import new_model, tokenize
from train.models.presets import PRESETS, TransformerPreset
from train.tasks import Denoise, generate_images, image_grid

COLOURS = {
    "red": (220, 40, 40), "orange": (245, 150, 30), "yellow": (245, 230, 60), "green": (60, 180, 60),
    "blue": (50, 80, 225), "purple": (140, 50, 190), "pink": (250, 140, 200), "brown": (125, 75, 35),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "teal": (20, 140, 150)}
UNSEEN = {
    ("red", "star"), ("orange", "ring"), ("yellow", "cross"), ("green", "triangle"), ("blue", "circle"),
    ("purple", "square"),
}  # fmt: skip
"""Pairs of colour and shape that are never in the set: what a model draws for them it has composed."""

SIZE = 32
_FINE = 8  # drawn at this many times the size, so that edges are smooth


def mask(shape: str, centre: tuple[float, float], radius: float, size: int) -> np.ndarray:
    """How much of each pixel a shape covers: (size, size) in 0..1. Centre and radius in pixels, centre as (x, y)."""
    fine = np.zeros((size * _FINE, size * _FINE), np.uint8)
    middle, r = np.array(centre) * _FINE, radius * _FINE
    angles = {"triangle": (3, [1.0]), "star": (10, [1.0, 0.42]), "square": (4, [1.0])}
    if shape in ("circle", "ring"):
        place = [round(c) for c in middle]
        cv2.circle(fine, place, int(r), 255, -1)
        if shape == "ring":
            cv2.circle(fine, place, int(0.55 * r), 0, -1)
    elif shape == "cross":
        for box in ((1.0, 0.32), (0.32, 1.0)):
            low, high = middle - r * np.array(box), middle + r * np.array(box)
            cv2.rectangle(fine, [int(v) for v in low], [int(v) for v in high], 255, -1)
    else:
        corners, reach = angles[shape]
        turn = np.pi / 4 if shape == "square" else 0
        at = [2 * np.pi * i / corners - np.pi / 2 + turn for i in range(corners)]
        radii = [r * reach[i % len(reach)] for i in range(corners)]
        points = [middle + q * np.array([np.cos(a), np.sin(a)]) for a, q in zip(at, radii, strict=True)]
        cv2.fillPoly(fine, [np.rint(points).astype(np.int32)], 255)
    return np.asarray(cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA), np.float64) / 255


def caption(colour: str, shape: str, background: str) -> str:
    """The caption, and prompt, of an image."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape} on a {background} background"


def image(colour: str, shape: str, background: str, rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """(size, size, 3) uint8: the shape at a random place near the middle, its radius 28 to 40% of the side."""
    centre = (size / 2 + rng.uniform(-0.1, 0.1) * size, size / 2 + rng.uniform(-0.1, 0.1) * size)
    cover = mask(shape, centre, rng.uniform(0.28, 0.40) * size, size)[:, :, None]
    pixels = cover * np.array(COLOURS[colour]) + (1 - cover) * np.array(BACKGROUNDS[background])
    return np.rint(pixels).astype(np.uint8)


def kinds(seen: bool) -> list[tuple[str, str, str]]:
    """All (colour, shape, background) whose pair is in the set, or all whose pair is not."""
    every = [(c, s, b) for c in COLOURS for s in SHAPES for b in BACKGROUNDS]
    return [k for k in every if ((k[0], k[1]) not in UNSEEN) == seen]


def make(folder: Path, count: int = 512, seed: int = 0, shuffle: bool = False) -> Path:
    """Write the set as img2dataset does: one tar, one parquet, one stats file. The same seed gives the same bytes."""
    rng = np.random.default_rng(seed)
    there = kinds(seen=True)
    chosen = [there[i % len(there)] for i in rng.permutation(count)]
    words = [caption(*k) for k in chosen]
    if shuffle:
        words = [words[i] for i in np.random.default_rng(seed + 1).permutation(count)]
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with open(folder / "00000.tar", "wb") as f:
        tar = TarWriter(f)
        for i, ((colour, shape, ground), text) in enumerate(zip(chosen, words, strict=True)):
            data = cv2.imencode(".png", image(colour, shape, ground, rng)[:, :, ::-1])[1].tobytes()
            url = f"shape:{colour}/{shape}/{ground}"
            row: dict[str, Any] = {"key": f"{i:09d}", "caption": text, "url": url, "status": "success"}
            rows.append(row | {"width": SIZE, "height": SIZE})
            tar.add_sample(row["key"], data, "png", text, rows[-1])
        tar.close()
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text(json.dumps({"count": count, "successes": count}))
    return folder


# -------------------------------------------------------------------------------------------------------- the judge


def judge(image: np.ndarray) -> tuple[str, str, str]:
    """(colour, shape, background) of an image, (h, w, 3) uint8, by its pixels alone: no network, nothing learnt.

    The background is the one nearest to the median of the border. Pixels nearer to some colour than to it are the
    shape; the colour is the one nearest to the median of those. The shape is that of the mask, among those of all
    shapes at several sizes and places, which leaves the least squared error when it is filled with the colour that
    suits it best: the likeliest one where what is drawn badly is noise.
    """
    size = image.shape[0]
    pixels = image.astype(np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = _nearest(np.median(border, axis=0), BACKGROUNDS)
    ground = np.array(BACKGROUNDS[background])
    palette = np.array(list(COLOURS.values()))
    far = np.linalg.norm(pixels - ground, axis=2)
    inside = far > np.linalg.norm(pixels[:, :, None] - palette, axis=3).min(2)
    if not inside.any():
        return "none", "none", background
    colour = _nearest(np.median(pixels[inside], axis=0), COLOURS)
    shapes, templates = _templates(size)
    flat = templates.reshape(len(templates), -1)
    explained = ((flat @ (pixels - ground).reshape(-1, 3)) ** 2).sum(1) / (flat**2).sum(1)
    return colour, shapes[int(explained.argmax())], background


def _nearest(value: np.ndarray, named: dict[str, tuple[int, int, int]]) -> str:
    return min(named, key=lambda n: float(np.linalg.norm(value - np.array(named[n]))))


@lru_cache
def _templates(size: int) -> tuple[list[str], np.ndarray]:
    """Every shape at several sizes and places: its name, and its mask."""
    places = [0.5 + offset for offset in np.linspace(-0.1, 0.1, 7)]
    every = [(s, r, x, y) for s in SHAPES for r in (0.28, 0.31, 0.34, 0.37, 0.40) for x in places for y in places]
    masks = [mask(s, (size * x, size * y), r * size, size) for s, r, x, y in every]
    return [s for s, *_ in every], np.array(masks, np.float32)


def accuracy(images: Iterable[np.ndarray], asked: Sequence[tuple[str, str, str]]) -> dict[str, float]:
    """The share of images whose colour, shape and background are as asked, and of those where all three are."""
    found = [judge(p) for p in images]
    right = np.array(
        [[f == a for f, a in zip(one, other, strict=True)] for one, other in zip(found, asked, strict=True)]
    )
    shares = dict(zip(("colour", "shape", "background"), right.mean(0).tolist(), strict=True))
    return {**shares, "all": float(right.all(1).mean())}


# --------------------------------------------------------------------------------------------------------- training


def main() -> None:
    """Make the set, train, draw, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=650)
    parser.add_argument("--batch", type=int, help="default: the preset's")
    parser.add_argument("--preset", choices=("tiny", "dit-tiny"), default="tiny")
    parser.add_argument("--lr", type=float, help="AdamW's (default: the preset's)")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--shuffle", action="store_true")
    asked = parser.parse_args()

    preset = PRESETS[asked.preset]
    lr, size = asked.lr or preset.lr, asked.batch or preset.batch
    muon = preset.muon * lr / preset.lr if isinstance(preset, TransformerPreset) else 0.0
    began, used = time.perf_counter(), time.process_time()
    samples = open_samples(make(asked.folder / "shapes", shuffle=asked.shuffle))
    captions = [str(samples.facts(i)["caption"]) for i in range(len(samples))]
    pipeline = new_model(preset, captions)
    examples = ImageDataset(samples, lambda words: tokenize(pipeline, words), SIZE)
    everything = np.arange(len(samples))
    stream = Stream(examples, everything, batch=size)

    prompts = [caption("red", "circle", "white"), caption("blue", "ring", "black"), caption("red", "star", "teal")]
    config = LoopConfig(steps=asked.steps, batch=size, lr=lr, muon=muon, ema=0.995, log_every=50)
    for record in train(Denoise(pipeline), stream, config, asked.folder / "model", prompts=prompts):
        print(format_record(record), flush=True)
    print(
        f"trained in {time.perf_counter() - began:.0f} s on {torch.get_num_threads()} threads, "
        f"{time.process_time() - used:.0f} s of CPU"
    )

    for name, kind in (("seen", kinds(seen=True)), ("unseen", kinds(seen=False))):
        images = generate_images(
            pipeline, [caption(*k) for k in kind], [0, 1, 2] if name == "unseen" else [0], guidance=asked.guidance
        )
        wanted = [k for k in kind for _ in range(3 if name == "unseen" else 1)]
        found = accuracy((np.array(p) for p in images), wanted)
        print(f"{name} pairs, {len(images)} images: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()))
        image_grid(images, 18).save(asked.folder / f"{name}.png")


if __name__ == "__main__":
    main()
