"""Small real images to train on, and the smallest model."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader

from train import checkpoint
from train.data import ImageDataset, Stream, open_samples
from train.loop import LoopConfig, train
from train.models.family import family_of, load_model, new_model, tokenize
from train.models.presets import PRESETS
from train.parallel import rank_and_size
from train.split import split
from train.tasks import Denoise

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}


def make_images(folder: Path, count: int = 64) -> Path:
    """A folder of PNG files, 24 x 24, discs of four colours, each with its caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        name = list(COLOURS)[i % 4]
        image = np.full((24, 24, 3), 255, np.uint8)
        centre = [int(c) for c in rng.integers(4, 20, 2)]
        cv2.circle(image, centre, int(rng.integers(3, 8)), COLOURS[name], -1)
        cv2.imwrite(str(folder / f"{i:03d}.png"), image[:, :, ::-1])
        (folder / f"{i:03d}.txt").write_text(f"a {name} disc")
    return folder


def small_run(
    folder: Path,
    out: Path,
    objective: str = "flow",
    start: Path | None = None,
    stop: Any = None,
    preset: str = "debug",
    **settings: Any,
) -> Any:
    """Training of a small model on such a folder, or of a LoRA on the model `start`: the generator of records."""
    config = LoopConfig(**{"steps": 10, "batch": 8, "lr": 2e-3, "log_every": 1, "ema": 0.99, **settings})
    samples = open_samples(folder)
    captions = [samples.facts(i)["caption"] or "" for i in range(len(samples))]
    if start is None:
        pipeline = new_model(preset, captions, objective)
    else:
        pipeline = load_model(start)
        family_of(pipeline).add_lora(pipeline)
    examples = ImageDataset(samples, lambda c: tokenize(pipeline, c), PRESETS[preset].size)
    rank, ranks = rank_and_size()
    chosen, held_out = split(samples, 0.2)
    stream = Stream(examples, chosen, batch=config.batch, rank=rank, ranks=ranks)
    task, more = Denoise(pipeline), {"should_stop": stop} if stop else {}
    return train(task, stream, config, out, held_out=held_out, prompts=["a red disc"], seeds=[0, 1], **more)


def saved_state(model: Path) -> dict[str, torch.Tensor]:
    """What the last checkpoint holds for going on, put together from what each process wrote: tensors by name."""
    path = checkpoint.checkpoints(model).popitem()[1]
    known = HuggingFaceStorageReader(str(path / "trainer")).read_metadata().state_dict_metadata
    state = {name: torch.zeros(found.size, dtype=found.properties.dtype) for name, found in known.items()}
    checkpoint.load_tensors(path, state)
    return state


def clean_processes() -> Any:
    """Processes without threads of this one, that need not import torch and diffusers again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "tests.small_train",
            "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
            "transformers.models.clip",
        ]
    )
    return context
