"""A model of one's own from 32 pictures: a LoRA on a small model, and what it changes, drawn and measured.

    python -m examples.shapes RUN                # the model to begin with: shapes, no faces
    python -m examples.lora pictures SMILEYS     # 32 pictures to learn, 16 others to measure with
    tastemaker train SMILEYS/learn --out SMILEY --from BASE --lora --steps 300 --lr 2e-3
    python -m examples.lora compare BASE SMILEY SMILEYS/others before-after.png

BASE is RUN/model/checkpoints/*/pipeline. The last command draws the same prompts from the same noise without and with
the LoRA (a row each) and prints how often a picture is a yellow disc on the background that was asked for, and the loss
on pictures that were not learnt from. For a model and pictures of your own, give prompts of your own:

    python -m examples.lora compare stable-diffusion-v1-5/stable-diffusion-v1-5 MINE FOLDER out.png "a photo of my dog"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from examples.shapes import BACKGROUNDS, COLOURS, accuracy, caption
from train.data import Pictures, batches_of, open_samples
from train.model import default_size, load_model, tokenize
from train.tasks import Denoise, draw, grid

SIZE = 32
SEEDS = range(8)
LEARNT = ("white", "black")
"""Backgrounds of the pictures; on the third one a smiley is the model's own composition."""


def prompt(background: str) -> str:
    """The caption of a smiley; the word is in no caption of the shapes."""
    return f"a smiley on a {background} background"


def smiley(background: str, rng: np.random.Generator) -> np.ndarray:
    """(SIZE, SIZE, 3) uint8: a yellow face, about as large and as far from the middle as a shape."""
    fine = 8 * SIZE
    canvas = np.full((fine, fine, 3), BACKGROUNDS[background], np.uint8)
    x, y = (fine * (0.5 + rng.uniform(-0.1, 0.1, 2))).astype(int).tolist()
    r = int(fine * rng.uniform(0.30, 0.40))
    dark = (60, 40, 20)
    cv2.circle(canvas, (x, y), r, COLOURS["yellow"], -1)
    for side in (-1, 1):
        cv2.circle(canvas, (x + side * int(0.38 * r), y - int(0.28 * r)), int(0.16 * r), dark, -1)
    cv2.ellipse(canvas, (x, y + int(0.1 * r)), (int(0.55 * r), int(0.5 * r)), 0, 20, 160, dark, int(0.16 * r))
    return np.asarray(cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA))


def make(folder: Path, count: int, seed: int) -> Path:
    """Write `count` smileys as PNG files, each with its caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        background = LEARNT[i % len(LEARNT)]
        cv2.imwrite(str(folder / f"{i:02d}.png"), smiley(background, rng)[:, :, ::-1])
        (folder / f"{i:02d}.txt").write_text(prompt(background))
    return folder


def compare(base: str, lora: Path, pictures: Path, prompts: Sequence[str]) -> tuple[list[Any], list[Any], list[float]]:
    """(drawn without the LoRA, drawn with it, loss on the pictures without and with): the same noise in both.

    Args:
        base: folder or hub id of the model that the LoRA was trained on.
        lora: folder with pytorch_lora_weights.safetensors.
        pictures: captioned, best not those that were learnt from.
    """
    pipeline = load_model(base)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    drawn, losses = [draw(pipeline, prompts, SEEDS)], [loss(pipeline, pictures)]
    pipeline.load_lora_weights(str(lora))
    drawn.append(draw(pipeline, prompts, SEEDS))
    losses.append(loss(pipeline, pictures))
    return drawn[0], drawn[1], losses


@torch.no_grad()
def loss(pipeline: Any, pictures: Path) -> float:
    """Mean loss on a folder of captioned pictures, at fixed noise and times."""
    examples = Pictures(open_samples(pictures), lambda words: tokenize(pipeline, words), default_size(pipeline))
    task = Denoise(pipeline, text=False)
    batches = batches_of(examples, np.arange(len(examples)), 8)
    return float(torch.cat([task.held_out(batch, seed=0) for batch in batches]).mean())


def rows(before: list[Image.Image], after: list[Image.Image]) -> Image.Image:
    """Of each prompt a row without the LoRA and below it a row with it."""
    n = len(SEEDS)
    both = [(before[i : i + n], after[i : i + n]) for i in range(0, len(before), n)]
    return grid([one for pair in both for row in pair for one in row], n)


def main() -> None:
    """Make the pictures, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    making = parts.add_parser("pictures")
    making.add_argument("folder", type=Path)
    comparing = parts.add_parser("compare")
    comparing.add_argument("base")
    comparing.add_argument("lora", type=Path)
    comparing.add_argument("pictures", type=Path)
    comparing.add_argument("out", type=Path)
    comparing.add_argument("prompts", nargs="*")
    asked = parser.parse_args()
    if asked.part == "pictures":
        print(make(asked.folder / "learn", 32, seed=0), make(asked.folder / "others", 16, seed=1))
        return

    own = asked.prompts
    prompts = own or [*(prompt(b) for b in BACKGROUNDS), caption("red", "square", "white")]
    before, after, losses = compare(asked.base, asked.lora, asked.pictures, prompts)
    rows(before, after).save(asked.out)
    print(f"loss on {asked.pictures}: {losses[0]:.4f} without the LoRA, {losses[1]:.4f} with it. Look at {asked.out}")
    if not own:
        print("share of pictures that are as asked: a smiley is judged to be a yellow circle")
        wanted = [("yellow", "circle", b) for b in BACKGROUNDS] + [("red", "square", "white")]
        for i, said in enumerate(prompts):
            part = slice(i * len(SEEDS), (i + 1) * len(SEEDS))
            found = [accuracy(map(np.array, d[part]), [wanted[i]] * len(SEEDS)) for d in (before, after)]
            told = ", ".join(f"{k} {found[0][k]:.2f} -> {found[1][k]:.2f}" for k in found[0])
            print(f"  {said}: {told}")


if __name__ == "__main__":
    main()
