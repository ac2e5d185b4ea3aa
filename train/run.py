"""A training run in a model's folder: data held out, model and data opened, the stages in order, what came of it.

MODEL/train.json                 settings, data, versions, result
      data.json                  which images are held out, and which can't be read
      data/                      what is made of all samples' columns once, for all processes
      start/                     a new model before its first step
      vae-training/ latents/     what is computed before the model is trained
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aesthetic.errors import UserError
from aesthetic.files import atomic, scratch_path
from curate.hub import no_progress_bars
from curate.sources.dataset import MapDataset
from curate.sources.packed import PackedShards
from curate.store.files import check_space, digest, read_json, sha256_file, write_json
from train import checkpoint
from train.captions import CAPTION_ALONE, CaptionMix, count_captions
from train.data import (
    MIN_IMAGES,
    ImageDataset,
    Stream,
    TrainDataset,
    aspect_ratios,
    crop_resize,
    decode_sample,
    ordered_batches,
    sampling_weights,
)
from train.latents import LatentDataset, Tell, latents_size, precompute_latents, shards_of, write_shard
from train.loop import LoopConfig, train
from train.models.base import count_parameters
from train.models.family import family_of, new_model
from train.models.files import model_folder
from train.models.info import training_record
from train.models.presets import Preset
from train.models.release import is_released, release
from train.objective import GAMMA, objective_of
from train.parallel import rank_and_size
from train.places import shown
from train.split import scan_images, split, without
from train.tasks import Denoise, Reconstruct, Task, fit_scale, psnr

Record = dict[str, Any]
ShouldStop = Callable[[], bool]
"""Whether training is to end after this step."""

MOST_CAPTIONS = 1_000_000
"""That a tokenizer is made of: more change none of its words, and take minutes."""

SD_LR = 1e-4
"""What Stable Diffusion 1 was trained with (its model card): taken for a model that does not say."""


# ---------------------------------------------------------------------------------------------------- before the stages


def earlier_run(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """`train.json` of a run with the same settings that can go on; None where nothing was learnt yet.

    Raises UserError where the folder holds what was learnt with other settings, naming them.
    """
    record: dict[str, Any] | None = read_json(out / "train.json")
    if record is None:
        return None
    before = record["settings"]
    other = [f"{k}: {before.get(k)} then, {v} now" for k, v in settings.items() if before.get(k) != v and k != "data"]
    if before["data"] != settings["data"]:
        other.append("its images or captions were not those that are there now")
    if not other:
        return record
    if not (any(out.glob("checkpoints/*")) or any(out.glob("vae-training/*")) or is_released(out)):
        return None
    raise UserError(
        f"{out} holds a model that was trained otherwise ({'; '.join(other)}). Give the same settings to go on "
        f"with it, another --out for another model, or --from {out} to begin with what it has learnt."
    )


def further_lr(start: str, *, lora: bool) -> float:
    """The rate that a model was trained with for a LoRA, a tenth of it for all of its weights.

    For Stable Diffusion these are 1e-4 and 1e-5, the rates of diffusers' own examples.
    """
    folder, facts = training_record(start) or (None, {})
    own = folder == model_folder(start).absolute()  # and not of the run whose checkpoint it is
    rate = float((facts["settings"].get("lr") if own else None) or SD_LR)
    return rate if lora else rate / 10


def hold_out(samples: MapDataset, out: Path, tell: Tell) -> dict[str, Any]:
    """`data.json`: which images are held out, and which can't be read. Where it is not there, each is looked at once.

    `tell` hears at how many more. Raises UserError where too few can be.
    """
    facts: dict[str, Any] | None = read_json(out / "data.json")
    if facts is not None and facts["data"] == samples.fingerprint:
        return facts
    known = scan_images(samples, tell)
    chosen, held_out = split(samples, known=known)
    readable = len(chosen) + len(held_out)
    if readable < MIN_IMAGES:
        raise UserError(f"{readable} images in {samples.folder} can be read: at least {MIN_IMAGES} are needed")
    facts = {
        "data": samples.fingerprint,
        "held_out": held_out.tolist(),
        "unreadable": {str(i): f"{known.keys[i].as_py()}: {reason}" for i, reason in known.unreadable.items()},
        "captioned": samples.captioned,
    }
    shutil.rmtree(out / "data", ignore_errors=True)  # of other images
    write_json(out / "data.json", facts)
    return facts


def write_new_model(
    folder: Path, preset: Preset, captions: Sequence[str], objective: str, seed: int, **given: Path | None
) -> None:
    """A new model, whole or absent: random weights, and a tokenizer of the captions that are trained on.

    `given`: parts in place of the preset's (see `family.new_model`).
    """
    if folder.is_dir():
        return
    pipeline = new_model(preset, captions, objective, seed, **given)
    scratch = scratch_path(folder)
    with no_progress_bars("diffusers"):
        pipeline.save_pretrained(scratch)
    scratch.rename(folder)


def default_prompts(samples: MapDataset, held_out: Sequence[int]) -> tuple[str, ...]:
    """Captions for previews: the first four of held-out images that differ, and of others where these are too few."""
    captions: dict[str, None] = {}
    everyone = (next(filter(None, texts), None) for _, rows in samples.captions() for texts in rows)
    for caption in itertools.chain((samples.facts(index)["caption"] for index in held_out), everyone):
        if caption:
            captions[caption] = None
        if len(captions) == 4:
            break
    return tuple(captions)


def trained_captions(samples: MapDataset, left_out: Iterable[int], most: int = MOST_CAPTIONS) -> list[str]:
    """The captions of all samples but some, in their order; of more than `most` every second, third ..."""
    chosen = without(len(samples), left_out)
    chosen = chosen[:: max(1, math.ceil(len(chosen) / most))]
    return [text or "" for texts in samples.captions_at(chosen.tolist()) for text in texts]


# ------------------------------------------------------------------------------------------------------------ the run


class TrainRun:
    """Model and data of a run, opened; one in each process that takes part. `hold_out` has written data.json before.

    Args:
        pipeline: what training begins with.
        new: whether that is a new model.
        text: whether its text encoder is trained too.
        own_vae: whether its autoencoder is new, and trained first.
        size: pixels of a side; None: what the model generates.
        captions: how often the caption of which of the samples' caption columns is drawn.
        weight_by: a column; images are used in proportion to it.
        lora: rank; None: the whole model is trained.
        prompts: of previews.
        identity: what must be the same for a run to go on, by name.
    """

    def __init__(
        self,
        pipeline: Any,
        samples: MapDataset,
        out: Path,
        loop: LoopConfig,
        *,
        device: torch.device,
        new: bool,
        text: bool,
        own_vae: bool = False,
        size: int | None = None,
        buckets: bool = False,
        captions: CaptionMix = CAPTION_ALONE,
        weight_by: str | None = None,
        lora: int | None = None,
        prompts: Sequence[str] = (),
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.pipeline, self.samples, self.out, self.loop, self.device = pipeline, samples, out, loop, device
        self.new, self.text, self.lora = new, text, lora
        self.prompts, self.identity, self.captions = prompts, identity, captions
        self.family = family_of(pipeline)
        self.size = size or self.family.default_size(pipeline)
        self.objective = objective_of(pipeline.scheduler).name  # flow, v or eps
        self.family.set_default_size(pipeline, self.size)
        self.vae_folder = out / "vae-training"  # its `vae/`, whole or absent, is the trained autoencoder
        self.latents_folder = out / "latents"
        if (self.vae_folder / "vae").is_dir():
            self._load_vae(self.vae_folder / "vae")
        pipeline.to(device)

        self.vae_loop: LoopConfig | None = None
        if own_vae:  # a fifth of the steps, at twice the rate: no attention in it that could take offence
            steps = max(1, loop.steps // 5)
            self.vae_loop = replace(
                loop, steps=steps, lr=2 * loop.lr, preview_every=0, save_every=max(1, steps // 4), shard=False
            )  # it is small

        facts = read_json(out / "data.json")
        samples.fingerprint = facts["data"]  # of this very folder: nobody need read it again
        self.held_out = np.array(facts["held_out"], np.int64)
        self.chosen = without(len(samples), facts["held_out"], map(int, facts["unreadable"]))
        self.captioned: int | None = facts.get("captioned")  # images with a caption; runs of before did not count them
        self._encoded = np.sort(np.concatenate([self.chosen, self.held_out]))  # whose latents are wanted
        self.unreadable = len(facts["unreadable"])
        self.uses_latents = loop.steps * loop.batch > len(self.chosen)  # each image more than once
        ratios = self._once("ratios", lambda: aspect_ratios(samples)) if buckets else None
        weights = f"weights-{digest(weight_by)}"
        self.weights = self._once(weights, lambda: sampling_weights(samples, str(weight_by))) if weight_by else None
        self.images = ImageDataset(
            samples,
            lambda captions: self.family.tokenize(self.pipeline, captions),
            self.size,
            buckets=buckets,
            step=self.family.size_step(pipeline),
            least=loop.batch,
            ratios=ratios,
        )

    def _once(self, name: str, make: Callable[[], npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
        """What one process of the run, the first that opens it, makes of all samples' columns; others map its file."""
        path = self.out / "data" / f"{name}.npy"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            made = make()
            with atomic(path) as f:
                np.save(f, made)
        return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]

    def check_space(self) -> None:
        """DiskFull before the first step where latents and checkpoints would not fit."""
        p, network, text = self.pipeline, self.family.network(self.pipeline), self.family.text_encoder(self.pipeline)
        trained = 0 if self.lora else count_parameters([network, text] if self.text else [network])
        whole = 0 if self.lora else count_parameters([network, text, p.vae])
        latents = latents_size(p, self.images, self._encoded, not self.text) if self.uses_latents else 0
        if not (self.out / "checkpoints").is_dir():
            each = 4 * (4 * trained + whole)  # raw, average, two moments; the pipeline
            check_space(self.out, latents + (self.loop.keep + 2) * each)

    def train_autoencoder(self, should_stop: ShouldStop) -> Iterator[Record]:
        """Train the autoencoder; records as `loop.train` yields them."""
        assert self.vae_loop is not None
        return self._train(Reconstruct(self.pipeline), self.images, self.vae_loop, self.vae_folder, should_stop)

    def finish_autoencoder(self) -> None:
        """Put the trained autoencoder where every stage after it looks, its latents scaled to unit variance."""
        self._load_vae(_last(self.vae_folder) / "vae")
        fit_scale(self.pipeline, next(ordered_batches(self.images, self.chosen, 64)))
        scratch = scratch_path(self.vae_folder / "vae")
        self.pipeline.vae.save_pretrained(scratch)
        scratch.rename(self.vae_folder / "vae")

    def _load_vae(self, folder: Path) -> None:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(folder)
        vae.register_to_config(_name_or_path="")  # what is saved would say where it was read
        self.pipeline.vae = vae.to(self.device)

    def precompute_latents(
        self, tell: Tell, write_shards: Callable[[dict[str, Any], list[int]], None] | None = None
    ) -> None:
        """Write the latents that are missing: here, or by `write_shards` (see `latents.precompute_latents`)."""
        precompute_latents(
            self.pipeline, self.images, self._encoded, self.latents_folder,
            text=not self.text, threads=_threads(), tell=tell, write_shards=write_shards,
        )  # fmt: skip

    def write_latents(self, shard: int, made: dict[str, Any], tell: Tell) -> None:
        """Write one shard of them."""
        indices = shards_of(self.images, self._encoded)[shard]
        write_shard(
            self.pipeline, self.images, indices, self.latents_folder, shard, made,
            text=not self.text, threads=_threads(), tell=tell,
        )  # fmt: skip

    def train_model(self, should_stop: ShouldStop) -> Iterator[Record]:
        """Train the model, or its LoRA; records as `loop.train` yields them."""
        if self.lora:
            self.family.add_lora(self.pipeline, self.lora, self.loop.seed)
        dataset = LatentDataset(self.latents_folder) if self.uses_latents else self.images
        real: dict[str, Any] = {}  # the held-out image of each prompt that is the caption of one, for previews
        for index in self.held_out.tolist() if rank_and_size()[0] == 0 else ():
            caption = self.samples.facts(index)["caption"]
            if caption in self.prompts and caption not in real:
                real[caption] = crop_resize(decode_sample(self.samples[index], self.size), self.size, self.size)
        gamma = GAMMA if self.objective == "eps" else None
        task = Denoise(self.pipeline, text=self.text, gamma=gamma, real=real)
        return self._train(task, dataset, self.loop, self.out, should_stop)

    def _train(
        self, task: Task, dataset: TrainDataset, config: LoopConfig, folder: Path, should_stop: ShouldStop
    ) -> Iterator[Record]:
        rank, ranks = rank_and_size()
        if isinstance(self.samples, PackedShards):
            self.samples.watch_bytes(rank, ranks)
        # what is on an object store comes in another order, and who goes on must not mix the two
        order = {"order": "by shard"} if isinstance(dataset, ImageDataset) and dataset.remote else {}
        stream = Stream(
            dataset,
            self.chosen,
            batch=config.batch,
            seed=config.seed,
            captions=self.captions,
            weights=self.weights,
            rank=rank,
            ranks=ranks,
            workers=_threads(),
        )
        return train(
            task,
            stream,
            config,
            folder,
            held_out=self.held_out,
            prompts=self.prompts,
            identity={**(self.identity or {}), **order},
            should_stop=should_stop,
        )

    def caption_facts(self) -> dict[str, Any]:
        """What train.json says of the captions that are trained on (see `captions.count_captions`)."""
        family, p = self.family, self.pipeline
        count = partial(family.count_tokens, p)
        return count_captions(self.samples, self.chosen.tolist(), count, family.most_tokens(p))

    def data_facts(self) -> dict[str, Any]:
        """What train.json says of the data."""
        manifest, notes = self.samples.folder / "manifest.json", self.samples.passed_over()
        missing = self.samples.missing() if isinstance(self.samples, PackedShards) else []
        return {
            "folder": shown(self.samples.folder.absolute()),
            "manifest_sha256": sha256_file(manifest) if manifest.is_file() else None,
            "pictures": len(self.samples),
            "trained_on": len(self.chosen),
            "held_out": len(self.held_out),
            "unreadable": self.unreadable,
            **({"missing": missing} if missing else {}),
            **({"notes": notes} if notes else {}),
        }

    def release(self, facts: dict[str, Any]) -> None:
        """Put the averaged weights of the last step at the top of MODEL, with a model card: whole, or absent."""
        release(_last(self.out), self.out, facts)
        write_json(self.out / "train.json", facts)
        shutil.rmtree(self.out / "start", ignore_errors=True)

    def result(self) -> dict[str, Any]:
        """Held-out losses of the last checkpoint and of the best, from their records."""
        record = read_json(_last(self.out) / "record.json")
        result = {"step": record["step"], "held_out": record.get("held_out")}
        if (best := checkpoint.best(self.out)) is not None:
            record = read_json(best / "record.json")
            result["best"] = {"step": record["step"], "held_out": record.get("held_out"), "checkpoint": shown(best)}
        if self.vae_loop:
            loss = read_json(_last(self.vae_folder) / "record.json").get("held_out")
            result["autoencoder_psnr_db"] = psnr(loss["ema"]) if loss else None
        return result


def _last(folder: Path) -> Path:
    path = checkpoint.last(folder)
    assert path is not None  # training has come to its end
    return path


def _threads() -> int:
    """Threads that read and decode."""
    return max(2, min(16, os.cpu_count() or 1))
