"""Which images a model was not trained on, and its loss on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aesthetic.errors import UserError
from aesthetic.splits import near_copies
from curate.sources.dataset import MapDataset
from curate.store.files import digest, read_json
from train.data import Ints, TrainDataset, open_samples, ordered_batches
from train.devices import autocast, out_of_memory
from train.models.family import family_of
from train.models.info import training_record
from train.objective import GAMMA, objective_of
from train.places import bring_images, local_folder
from train.split import connected, scan_images, split, without
from train.tasks import HELD_OUT_TIMES, Denoise, eval_mode

OnDone = Callable[[int], None]
"""Called with how many more images are done."""


@dataclass(frozen=True)
class HeldOut:
    """The images to measure on, and those that the model was trained on where these are known."""

    indices: Ints  # of the samples: those that it was not trained on as far as is known
    unreadable: int  # how many of the samples
    training: MapDataset | None
    trained_on: Ints  # indices of `training`
    record: dict[str, Any] | None  # the model's train.json
    note: str  # what is known, in a sentence


def find_held_out(model: str | Path, samples: MapDataset, on_done: OnDone = lambda count: None) -> HeldOut:
    """Which of these images a model was not trained on.

    Where they are its training data, those that its run held out. Where they are others, all but near-duplicates of
    training images (as `train.data.split` knows them), if these are still where they were. All that can be read, where
    nothing is known. `on_done` is called for each image that has been looked at.

    Raises UserError where none is left.
    """
    found = _held_out(model, samples, on_done)
    if not len(found.indices):
        raise UserError(f"{samples.folder}: there is no image to measure on ({found.note}). Give others.")
    return found


def _held_out(model: str | Path, samples: MapDataset, on_done: OnDone) -> HeldOut:
    folder, record = training_record(model) or (Path(model), {})
    data, settings = record.get("data") or {}, record.get("settings") or {}
    known = data.get("folder") and settings.get("data")
    if known and settings["data"] == samples.fingerprint:
        trained_on, held, unreadable = _sides_of_split(folder, samples, on_done)
        note = "held out by the training run; near-duplicates of none of them were trained on"
        return HeldOut(held, unreadable, samples, trained_on, record, note)

    scan = scan_images(samples, on_done)
    readable = without(len(samples), scan.unreadable)
    nothing = np.zeros(0, np.int64)
    if not known:
        note = "the model has no train.json, which would tell what it was trained on: it may have seen these images"
        return HeldOut(readable, len(scan.unreadable), None, nothing, None, note)

    training = None
    with contextlib.suppress(UserError):
        there = bring_images(local_folder(str(data["folder"])))
        training = open_samples(there, settings.get("caption"), settings.get("captions"))
    if training is None or training.fingerprint != settings["data"]:
        note = f"other images than the model was trained on; those are no longer in {Path(data['folder']).name} as "
        note += "they were, so that near-duplicates of them can't be told"
        return HeldOut(readable, len(scan.unreadable), None, nothing, record, note)

    trained_on, _, _ = _sides_of_split(folder, training, on_done)
    other = scan_images(training, on_done)
    sha256, phash = (
        np.concatenate([ours[readable], theirs[trained_on]])
        for ours, theirs in ((scan.sha256, other.sha256), (scan.phash, other.phash))
    )
    groups = connected(len(sha256), near_copies(sha256, phash))
    new = ~np.isin(groups[: len(readable)], groups[len(readable) :])
    note = "other images than the model was trained on"
    if not new.all():
        note += f"; {(~new).sum():,} more are left out as near-duplicates of training images"
    return HeldOut(readable[new], len(scan.unreadable), training, trained_on, record, note)


def _sides_of_split(folder: Path, samples: MapDataset, on_done: OnDone) -> tuple[Ints, Ints, int]:
    """(trained on, held out, how many can't be read) of a run's own data: by its data.json, or split again."""
    record = read_json(folder / "data.json")
    if isinstance(record, dict) and record.get("data") == samples.fingerprint:
        held, lost = record.get("held_out"), record.get("unreadable")
        if (
            isinstance(held, list)
            and isinstance(lost, dict)
            and all(type(n) is int and 0 <= n < len(samples) for n in held)
            and all(str(n).isascii() and str(n).isdigit() for n in lost)
        ):
            trained_on = without(len(samples), held, [i for i in map(int, lost) if i < len(samples)])
            return trained_on, np.array(held, np.int64), len(lost)
    scan = scan_images(samples, on_done)  # the same images give the same split
    return *split(samples, known=scan), len(scan.unreadable)


def in_hash_order(samples: MapDataset, indices: Ints) -> Ints:
    """Indices in the order of hashes of their keys: the first of them are as good as chosen at random."""
    names = [digest(["measured", str(samples.facts(int(i)).get("key", i))]) for i in indices]
    return indices[np.argsort(names, kind="stable")]


def caption_of(samples: MapDataset, index: int) -> str:
    """The caption of a sample; "" where it has none."""
    return str(samples.facts(int(index))["caption"] or "").strip()


def distinct_captions(samples: MapDataset, indices: Ints, count: int) -> list[int]:
    """Of these indices, in their order, at most `count` that have a caption which none before them has."""
    found: dict[str, int] = {}
    for index in map(int, indices):
        if len(found) == count:
            break
        if caption := caption_of(samples, index):
            found.setdefault(caption, index)
    return list(found.values())


def losses(
    pipeline: Any, examples: TrainDataset, indices: Ints, *, seed: int = 0, on_done: OnDone = lambda count: None
) -> npt.NDArray[np.float32]:
    """The loss on each image at each of the times that training measures at: (n, 8), as `Denoise.held_out_losses`.

    The noise is a function of the seed and the image's index: with a run's own seed and its held-out images the mean is
    what `train` calls held-out loss (EMA).
    """
    gamma = GAMMA if objective_of(pipeline.scheduler).name == "eps" else None  # weighted as train weights it
    task = Denoise(pipeline, gamma=gamma)
    device = family_of(pipeline).network(pipeline).device
    place = {int(n): i for i, n in enumerate(indices)}
    size, found = 16, np.full((len(indices), len(HELD_OUT_TIMES)), np.nan, np.float32)
    with eval_mode(pipeline):
        while (left := np.isnan(found[:, 0])).any():
            try:
                for batch in ordered_batches(examples, indices[left], size):
                    with autocast(device):
                        measured = task.held_out_losses_by_time(batch, seed).float().cpu().numpy()
                    if not np.isfinite(measured).all():
                        raise UserError(
                            f"the model's loss on {batch.keys[0]} and others is no number: its weights are broken"
                        )
                    found[[place[slot] for slot in batch.slots]] = measured.T
                    on_done(len(batch.slots))
            except (RuntimeError, MemoryError) as e:
                if not out_of_memory(e) or size == 1:
                    raise
                size //= 2
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    return found
