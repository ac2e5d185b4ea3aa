"""What a model's folder says of itself, read before its weights: parts, sizes, scheduler, where it comes from."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from aesthetic.errors import UserError
from aesthetic.untrusted import read_json_file
from curate.store.files import sha256_file
from curate.weight_files import weight_files
from train.models.abilities import LORA_ONLY, OF_STABLE_DIFFUSION, STABLE_DIFFUSION, TRAINABLE, Abilities, abilities_of
from train.models.configs import ModelIndexConfig, TrainRecordConfig, read_config
from train.models.files import find_model_folder, model_folder
from train.models.others import denoiser_of, finest_channels, read_others, side_of_latents, vae_factor
from train.models.stable_diffusion import PARTS, read_stable_diffusion


@dataclass(frozen=True)
class ModelInfo:
    """A model of diffusers that draws from words, before its weights are read."""

    name: str  # as it was asked for
    folder: Path
    # config.json of the parts that have weights, by name, with diffusers' defaults for what they leave out
    configs: dict[str, dict[str, Any]]
    scheduler: dict[str, Any]  # as it is, of the class that model_index.json names, as diffusers makes it
    trained: dict[str, Any] | None  # train.json, where tastemaker trained it
    abilities: Abilities = OF_STABLE_DIFFUSION
    parts: tuple[str, ...] = PARTS  # of which it is made: folders
    side: int | None = None  # that it draws without being told, where model_index.json has one, in pixels

    @property
    def is_stable_diffusion(self) -> bool:
        """Whether it is of the Stable Diffusion 1 and 2 type."""
        return self.abilities.text in STABLE_DIFFUSION

    @property
    def is_trainable(self) -> bool:
        """Whether it is of a family of which at least LoRAs are trained here, with all that reads its captions."""
        kind = self.abilities.text
        return kind in TRAINABLE or (kind in LORA_ONLY and {"text_encoder", "text_encoder_2"} <= self.configs.keys())

    @property
    def unet(self) -> dict[str, Any]:
        """Of the Stable Diffusion type: the UNet's configuration."""
        return self.configs["unet"]

    @property
    def vae(self) -> dict[str, Any]:
        """Of the Stable Diffusion type: the autoencoder's configuration."""
        return self.configs["vae"]

    @property
    def text(self) -> dict[str, Any]:
        """Of the Stable Diffusion type: the text encoder's configuration."""
        return self.configs["text_encoder"]

    @property
    def factor(self) -> int:
        """Pixels of a side per latent."""
        return vae_factor(self.configs)

    @property
    def step(self) -> int:
        """Sides of images are multiples of this: of 8 in diffusers' pipelines, and of the autoencoder's factor times
        the side of what a transformer reads at once."""
        return math.lcm(8, self.factor * side_of_latents(self.configs))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels that it draws without being told; of 64 latents where it does not say (transformers
        of as many pixels as the autoencoder says, or of 128), or says less and is so old that diffusers does not
        believe it (models of 512 pixels were converted with a size of 32)."""
        if self.side:
            return self.side, self.side
        denoiser, vae = denoiser_of(self.configs), self.configs.get("vae", {})
        sample = denoiser.get("sample_size")
        if not sample and not self.is_stable_diffusion and (pixels := vae.get("sample_size")):
            height, width = (pixels, pixels) if isinstance(pixels, int) else pixels
            return width, height
        sample = sample or (64 if "unet" in self.configs else 128)
        version = re.match(r"(\d+)\.(\d+)", denoiser.get("version") or "") if self.is_stable_diffusion else None
        if isinstance(sample, int) and version and (int(version[1]), int(version[2])) < (0, 9):
            sample = max(sample, 64)
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return width * self.factor, height * self.factor

    @property
    def finest(self) -> tuple[int, int, int]:
        """At the finest levels: channels of the autoencoder, numbers that the denoiser holds for a latent, and heads of
        its attention (0: none, or none that memory is counted for)."""
        if not self.is_stable_diffusion:
            return *finest_channels(self.configs), 0
        heads = self.unet.get("num_attention_heads") or self.unet["attention_head_dim"]
        attends = "Attn" in self.unet["down_block_types"][0]
        heads = (heads if isinstance(heads, int) else heads[0]) if attends else 0
        return self.vae["block_out_channels"][0], self.unet["block_out_channels"][0], heads

    @property
    def of_pixels(self) -> bool:
        """Whether its autoencoder is `unet.pixel_vae`, which fp16 would break."""
        return len(self.configs.get("vae", {}).get("block_out_channels") or (1, 1)) == 1

    @property
    def inpaints_only(self) -> bool:
        """Whether its UNet takes a mask and a masked image beside the latents: it can't draw without them."""
        unet, vae = self.configs.get("unet"), self.configs.get("vae")
        return bool(unet and vae and unet["in_channels"] == 2 * vae["latent_channels"] + 1)

    @property
    def guidance(self) -> float:
        """The guidance that suits it: 3 for models trained here (as when they are looked at in training), else its
        pipeline's default: 7.5 for Stable Diffusion. What is 3 elsewhere is 2 to ZImagePipeline, which adds it."""
        if self.trained is None or self.trained["settings"].get("from"):
            return self.abilities.guidance
        return 2.0 if self.abilities.text == "ZImagePipeline" else 3.0

    @property
    def manifest(self) -> str | None:
        """The sha256 of the manifest of the shards that it was trained on, where it says so."""
        found: str | None = (self.trained or {}).get("data", {}).get("manifest_sha256")
        return found

    @cached_property
    def digest(self) -> str:
        """One sha256 over configurations, tokenizer and weights: the same model, wherever it lies. Reads all of it."""
        # of others also tokenizers of SentencePiece, and templates of chats
        kinds = (".json", ".txt") if self.is_stable_diffusion else (".json", ".txt", ".model", ".jinja")
        files = [p for part in self.parts for p in (self.folder / part).iterdir() if p.suffix in kinds]
        files += [p for part in self.parts if part in self.configs for p in weight_files(self.folder / part)]
        lines = [f"{p.relative_to(self.folder)} {sha256_file(p)}" for p in sorted(files)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_model_info(name: str | Path) -> ModelInfo:
    """What there is to know of a model, a folder or a hub id (which is downloaded first).

    Raises UserError, naming the file, where a part is missing, of another type, or where a configuration says what
    can't be. No weights are read. Of the Stable Diffusion type neither torch nor diffusers is loaded, but to download;
    of others diffusers' classes are asked what they need.
    """
    folder = find_model_folder(name)
    index, raw = read_config(ModelIndexConfig, folder / "model_index.json")
    abilities = abilities_of(index.kind, str(name))
    parts: tuple[str, ...] = PARTS
    if index.kind in STABLE_DIFFUSION:
        configs, scheduler = read_stable_diffusion(str(name), folder, raw)
    else:
        configs, scheduler, parts = read_others(str(name), folder, raw, abilities)
    record = training_record(folder)
    trained = record[1] if record else None
    return ModelInfo(str(name), folder, configs, scheduler, trained, abilities, parts, index.default_sample_size)


def check_trainable(info: ModelInfo, size: int | None, *, lora: bool = False) -> None:
    """Raise UserError where a model can't be trained further, or no LoRA of it, or not on images of this side."""
    kind = info.abilities.text
    if kind not in (*TRAINABLE, *LORA_ONLY):
        raise UserError(
            f"{info.name} is a {kind}: what can be trained further are models of the type of "
            f"{' and '.join(TRAINABLE)}, and with --lora LoRAs of {', '.join(LORA_ONLY)} too. SimpleTuner trains LoRAs "
            'of many others, and reads packed shards as they are (docs/training.md, "Other models")'
        )
    if kind in LORA_ONLY:
        if not lora:
            raise UserError(f"{info.name} is a {kind}, of which LoRAs are trained here, and not the whole: give --lora")
        if not info.is_trainable:
            raise UserError(f"{info.name} goes without one of its text encoders: a LoRA of it can't be trained here")
        if info.vae.get("latents_mean") or info.scheduler["_class_name"].startswith("EDM"):
            raise UserError(
                f"{info.name} is noised as in Karras et al. 2022 (EDM), and not as {kind} usually: a LoRA of it can't "
                "be trained here"
            )
    config = info.scheduler
    prediction, times = config.get("prediction_type", "epsilon"), config.get("num_train_timesteps", 1000)
    if prediction not in ("flow_prediction", "v_prediction", "epsilon") or times != 1000:
        raise UserError(
            f"{info.folder / 'scheduler' / 'scheduler_config.json'}: the model predicts {prediction!r} over {times} "
            "times; what can be trained further is flow_prediction, v_prediction and epsilon over 1000"
        )
    if info.inpaints_only:
        raise UserError(f"{info.name} is no plain text-to-image model: its UNet takes more than latents (inpainting?)")
    side = size or min(info.size)
    # the autoencoder's factor times the UNet's, or the side of a transformer's patches
    levels = (
        2 ** (len(info.unet["block_out_channels"]) - 1) if "unet" in info.configs else side_of_latents(info.configs)
    )
    step = info.factor * int(levels)
    if side % step:
        near = max(step, round(side / step) * step)
        raise UserError(f"size {side} does not fit this model: sides are multiples of {step}. {near} would do.")


def training_record(model: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The folder of a model that was trained here, and its train.json; also for MODEL/checkpoints/NUMBER/pipeline.

    Raises UserError where it is one of ours and says what can't be.
    """
    folder = model_folder(model).absolute()
    places = [folder]
    if len(folder.parents) > 2 and folder.parents[1].name == "checkpoints":
        places.append(folder.parents[2])
    for place in places:
        path = place / "train.json"
        if not path.is_file():
            continue
        try:
            facts = read_json_file(path)
        except UserError:  # somebody else's, who calls a file so too
            continue
        if isinstance(facts, dict) and isinstance(facts.get("settings"), dict):
            read_config(TrainRecordConfig, path)
            return place, facts
    return None
