"""The loss of each image that a run had, as a table that `tastemaker annotate` takes as columns of others."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.files import atomic
from curate.sources.dataset import MapDataset
from curate.store.files import read_json
from train.data import ImageDataset, TrainDataset
from train.devices import default_device
from train.evaluate import heldout
from train.latents import kept_latents
from train.models.family import family_of, load_model
from train.models.lora import Lora, add_loras
from train.split import without

FILE = "losses.parquet"


def record_losses(model: Path, samples: MapDataset, record: dict[str, Any], on_done: heldout.OnDone) -> dict[str, Any]:
    """Write MODEL/losses.parquet, a row for each image that can be read; returns its facts for train.json.

    `loss` is that of the averaged weights: the mean over the eight times of held-out loss at fixed noise, with the
    first caption of each image; a function of model and image, whatever the order of training. `held_out` says which
    images the model has not seen. `key`, and `sha256` and `url` where the samples have them, say which image it is.

    Args:
        model: a finished run's folder.
        samples: what it was trained on.
        record: its train.json.
    """
    settings, data = record["settings"], read_json(model / "data.json")
    pipeline = load_model(settings["from"] if settings["lora"] else model)
    if settings["lora"]:
        add_loras(pipeline, (Lora(model),), settings["from"])
    pipeline.to(default_device())
    family = family_of(pipeline)

    images = ImageDataset(
        samples, partial(family.tokenize, pipeline), record["size"], buckets=settings["buckets"],
        step=family.size_step(pipeline), least=settings["batch"],
    )  # fmt: skip
    indices = without(len(samples), map(int, data["unreadable"]))
    frozen = bool(settings["from"] or settings.get("text_encoder"))
    examples: TrainDataset = kept_latents(pipeline, images, indices, model / "latents", frozen) or images
    each = heldout.losses(pipeline, examples, indices, seed=settings["seed"], on_done=on_done).mean(1)

    known: dict[str, list[str | None]] = {"sha256": [], "url": []}
    for columns in samples.columns(*known):
        for found, values in zip(known.values(), columns, strict=True):
            found += [value if isinstance(value, str) else None for value in values]
    table = {
        "key": pa.array([samples.key(i) for i in indices.tolist()], pa.string()),
        **{name: pa.array(values, pa.string()).take(indices) for name, values in known.items() if any(values)},
        "loss": pa.array(each, pa.float32()),
        "held_out": pa.array(np.isin(indices, data["held_out"])),
    }
    with atomic(model / FILE) as f:
        pq.write_table(pa.table(table), f)
    low, middle, high = (float(x) for x in np.percentile(each, (5, 50, 95)))
    return {"file": FILE, "images": len(each), "p5": low, "median": middle, "p95": high}
