"""A manner of one's own from 32 images: a LoRA on a small model, and what it changes, drawn and measured.

    python -m examples.shapes RUN --steps 1500    # the model to begin with: filled shapes
    python -m examples.lora images OUTLINES     # 32 outlines to learn from, 16 of other colours to measure with
    tastemaker train OUTLINES/learn --out OUTLINE --from BASE --lora --steps 200 --lr 2e-3
    python -m examples.lora compare BASE OUTLINE OUTLINES/others before-after.png

BASE is RUN/model/checkpoints/*/pipeline. The last command draws the same prompts from the same noise without and with
the LoRA (a row each) and prints how often an image is an outline, of the colour and on the background that was asked
for, and the loss on images that were not learnt from. For a model and images of your own, give prompts of your own:

    python -m examples.lora compare stable-diffusion-v1-5/stable-diffusion-v1-5 MINE FOLDER out.png "a photo of my dog"
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from examples.shapes import BACKGROUNDS, COLOURS, SIZE, accuracy, caption, mask
from train.data import ImageDataset, open_samples, ordered_batches
from train.models.family import family_of, load_model
from train.tasks import Denoise, generate_images, image_grid

SEEDS = range(8)
LEARNT = {True: ("red", "yellow", "green", "blue"), False: ("orange", "purple", "pink", "brown")}
"""Colours of the images that are learnt from, and of the others: a manner is to be learnt, not images."""
PROMPTS = (
    ("pink", "circle", "black"), ("purple", "circle", "white"),
    ("orange", "square", "teal"), ("orange", "cross", "teal"),
)  # fmt: skip
"""What is drawn to compare: three in colours that no outline had, and a shape of which there was no outline."""


def outline(colour: str, shape: str, background: str, rng: np.random.Generator) -> np.ndarray:
    """(SIZE, SIZE, 3) uint8: a circle or square of which only a band along its edge is left."""
    radius = rng.uniform(0.30, 0.40) * SIZE
    centre = (SIZE / 2 + rng.uniform(-0.1, 0.1) * SIZE, SIZE / 2 + rng.uniform(-0.1, 0.1) * SIZE)
    cover = (mask(shape, centre, radius, SIZE) - mask(shape, centre, 0.6 * radius, SIZE))[:, :, None]
    pixels = cover * np.array(COLOURS[colour]) + (1 - cover) * np.array(BACKGROUNDS[background])
    return np.rint(pixels).astype(np.uint8)


def make(folder: Path, count: int, learn: bool) -> Path:
    """Write `count` outlines as PNG files, each with its caption beside it; to `learn` from, or the others."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(int(learn))
    kinds = list(itertools.product(LEARNT[learn], ("circle", "square"), BACKGROUNDS))
    for i in range(count):
        kind = kinds[i % len(kinds)]
        cv2.imwrite(str(folder / f"{i:02d}.png"), outline(*kind, rng)[:, :, ::-1])
        (folder / f"{i:02d}.txt").write_text(caption(*kind))
    return folder


def is_outline(image: np.ndarray) -> bool:
    """Whether the shape on an image of one shape has a hole, of a tenth of its area at least.

    Args:
        image: (h, w, 3) uint8, the shape not touching the edge, which is of the background's colour.
    """
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    far = np.abs(image.astype(int) - np.median(edge, axis=0)).max(2) > 60
    shape = cv2.morphologyEx(far.astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))  # without specks of noise
    around = np.pad(1 - shape, 1, constant_values=1)
    cv2.floodFill(around, None, (0, 0), 0)  # what is left of it can't be reached from the edge
    hole = int(around.sum())
    return hole >= 0.1 * (hole + int(shape.sum())) > 0


def compare(base: str, lora: Path, images: Path, prompts: Sequence[str]) -> tuple[list[Any], list[Any], list[float]]:
    """(drawn without the LoRA, drawn with it, loss on the images without and with): the same noise in both.

    Args:
        base: folder or hub id of the model that the LoRA was trained on.
        lora: folder with pytorch_lora_weights.safetensors.
        images: captioned, best not those that were learnt from.
    """
    pipeline = load_model(base)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    drawn, losses = [generate_images(pipeline, prompts, SEEDS)], [loss(pipeline, images)]
    pipeline.load_lora_weights(str(lora))
    drawn.append(generate_images(pipeline, prompts, SEEDS))
    losses.append(loss(pipeline, images))
    return drawn[0], drawn[1], losses


@torch.no_grad()
def loss(pipeline: Any, images: Path) -> float:
    """Mean loss on a folder of captioned images, at fixed noise and times."""
    family = family_of(pipeline)
    size = family.default_size(pipeline)
    examples = ImageDataset(open_samples(images), lambda words: family.tokenize(pipeline, words), size)
    task = Denoise(pipeline, text=False)
    batches = ordered_batches(examples, np.arange(len(examples)), 8)
    return float(torch.cat([task.held_out_losses(batch, seed=0) for batch in batches]).mean())


def rows(before: list[Image.Image], after: list[Image.Image]) -> Image.Image:
    """Of each prompt a row without the LoRA and below it a row with it."""
    n = len(SEEDS)
    both = [(before[i : i + n], after[i : i + n]) for i in range(0, len(before), n)]
    return image_grid([one for pair in both for row in pair for one in row], n)


def main() -> None:
    """Make the images, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    making = parts.add_parser("images")
    making.add_argument("folder", type=Path)
    comparing = parts.add_parser("compare")
    comparing.add_argument("base")
    comparing.add_argument("lora", type=Path)
    comparing.add_argument("images", type=Path)
    comparing.add_argument("out", type=Path)
    comparing.add_argument("prompts", nargs="*")
    asked = parser.parse_args()
    if asked.part == "images":
        print(make(asked.folder / "learn", 32, learn=True), make(asked.folder / "others", 16, learn=False))
        return

    own = asked.prompts
    prompts = own or [caption(*kind) for kind in PROMPTS]
    before, after, losses = compare(asked.base, asked.lora, asked.images, prompts)
    rows(before, after).save(asked.out)
    print(f"loss on {asked.images}: {losses[0]:.4f} without the LoRA, {losses[1]:.4f} with it. Look at {asked.out}")
    if not own:
        print("share of images, without -> with the LoRA:")
        for i, said in enumerate(prompts):
            part = slice(i * len(SEEDS), (i + 1) * len(SEEDS))
            shares = []
            for images in ([np.array(p) for p in drawn[part]] for drawn in (before, after)):
                right = accuracy(images, [PROMPTS[i]] * len(SEEDS))
                shares.append({"outline": float(np.mean([is_outline(p) for p in images])), **right})
            words = ("outline", "colour", "background")
            print(f"  {said}: " + ", ".join(f"{w} {shares[0][w]:.2f} -> {shares[1][w]:.2f}" for w in words))


if __name__ == "__main__":
    main()
