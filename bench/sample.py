"""Drawing, beside bare diffusers: the same pipeline, prompts, seeds and settings, in one process, in turns.

    python -m bench.sample                      a model like Stable Diffusion's at a third of its width: some minutes
    python -m bench.sample --model FOLDER       with a model of yours
    python -m bench.sample --kind image         image to image;  mask: inpainting

Ours is `Sampler.generate` to the saved PNG: checks, NSFW detector, facts and file included. Theirs is the call of the
pipeline and `image.save`. Every figure is a median over rounds, the ratio the median of each round's. CPU-seconds stand
beside those of the clock, for machines that do other things meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.commands.sample import quiet_libraries
from train.generate.files import png, save_numbered
from train.generate.sampler import GenerationRequest, Sampler
from train.models.presets import PRESETS, UnetPreset
from train.models.unet import new_model

_WHOLE: Any = PRESETS["sd15"]
MODEL: UnetPreset = replace(_WHOLE, unet=(96, 192, 384, 384), text=256, text_layers=4, size=256, vae=(32, 64, 128, 128))
PROMPT = "a photograph of a temple by a lake"
KINDS = {"text": "", "image": "Img2Img", "mask": "Inpaint"}


def main() -> None:
    """Draw in turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FOLDER")
    parser.add_argument("--kind", choices=tuple(KINDS), default="text")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as scratch, quiet_libraries():
        folder = asked.model or Path(scratch) / "model"
        if asked.model is None:
            new_model(MODEL, [PROMPT] * 4, "eps").save_pretrained(folder)
        sampler = Sampler(folder)
        theirs = peer(sampler, asked.kind)
        request = sampler.check(GenerationRequest(PROMPT, steps=asked.steps, **begin(sampler, asked.kind)))
        taken: dict[str, list[tuple[float, float]]] = {"ours": [], "diffusers": []}
        for number in range(asked.rounds + 1):
            order = ("ours", "diffusers")[:: 1 if number % 2 else -1]
            images = {}
            for name in order:
                began = time.perf_counter(), time.process_time()
                now = replace(request, seed=number)
                images[name] = ours(sampler, now, Path(scratch)) if name == "ours" else drawn(theirs, now, scratch)
                if number:  # the first warms up
                    taken[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
            one, other = (np.asarray(Image.open(p)) for p in images.values())
            assert np.array_equal(one, other), f"round {number}: the images differ"
        size = f"{request.width} x {request.height}"
        print(f"{asked.kind}, {size}, {asked.steps} steps, {sampler}, {asked.threads} threads")
        for name, rounds in taken.items():
            clock, cpu = (median(r[i] for r in rounds) for i in (0, 1))
            print(f"    {name:12} {clock:7.2f} s, {cpu:7.2f} CPU-seconds")
        both = list(zip(taken["ours"], taken["diffusers"], strict=True))
        ratio, of_cpu = (median(b[i] / a[i] for a, b in both) for i in (0, 1))
        print(f"    as fast as bare diffusers: {ratio:.3f}, by CPU-seconds {of_cpu:.3f}; images bit-identical")
    if asked.json:
        figures = {**vars(asked), "taken": taken, "ratio": ratio, "of_cpu": of_cpu}
        asked.json.write_text(json.dumps(figures, indent=1, default=str))


def begin(sampler: Sampler, kind: str) -> dict[str, Any]:
    """The image to begin with, and the mask."""
    if kind == "text":
        return {}
    width, height = sampler.info.size
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))
    if kind == "image":
        return {"image": image, "strength": 0.75}
    mask = Image.new("L", image.size)
    mask.paste(255, (width // 4, height // 4, width, height))
    return {"image": image, "mask": mask, "strength": 1.0}


def peer(sampler: Sampler, kind: str) -> Any:
    """A pipeline of diffusers of its own, loaded as its documentation does it."""
    import diffusers

    kinds = getattr(diffusers, f"StableDiffusion{KINDS[kind]}Pipeline")
    pipeline = kinds.from_pretrained(sampler.info.folder, dtype=sampler.dtype).to(sampler.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(sampler: Sampler, request: GenerationRequest, folder: Path) -> Path:
    (made,) = sampler.generate([request])
    return save_numbered(png(made.image, made.facts), folder / "ours")


def drawn(pipeline: Any, request: GenerationRequest, folder: str) -> Path:
    """As a user of diffusers would."""
    more: dict[str, Any] = {"width": request.width, "height": request.height}
    if request.image is not None:
        more = {"image": request.image, "strength": request.strength}
    if request.mask is not None:
        more |= {"mask_image": request.mask, "width": request.width, "height": request.height}
    image = pipeline(
        request.prompt, num_inference_steps=request.steps, guidance_scale=request.guidance,
        generator=torch.Generator().manual_seed(request.seed), **more,
    ).images[0]  # fmt: skip
    path = Path(folder) / "theirs.png"
    image.save(path)
    return path


if __name__ == "__main__":
    main()
