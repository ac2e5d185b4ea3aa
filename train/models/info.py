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
from aesthetic.untrusted import check_regular, printable, read_json_file
from curate.store.files import sha256_file
from curate.weight_files import is_pointer, read_header, weight_files
from train.models.configs import (
    ModelIndexConfig,
    SchedulerConfig,
    TextEncoderConfig,
    TokenizerConfig,
    TrainRecordConfig,
    UnetConfig,
    VaeConfig,
    read_config,
)
from train.models.files import find_model_folder, model_folder
from train.models.schedulers import SCHEDULERS

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": SCHEDULERS,
}
"""What a part may be, by the second word of its entry in model_index.json."""


@dataclass(frozen=True)
class ModelInfo:
    """A diffusers folder of the Stable Diffusion 1 and 2 type."""

    name: str  # as it was asked for
    folder: Path
    unet: dict[str, Any]  # the parts' config.json, with diffusers' defaults for what they leave out
    vae: dict[str, Any]
    text: dict[str, Any]
    scheduler: dict[str, Any]  # as it is, of the class that model_index.json names, as diffusers makes it
    trained: dict[str, Any] | None  # train.json, where tastemaker trained it

    @property
    def factor(self) -> int:
        """Pixels of a side per latent."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    @property
    def step(self) -> int:
        """Sides of images are multiples of this: of 8 in diffusers' pipelines, and of the autoencoder's factor."""
        return math.lcm(8, self.factor)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels that it draws without being told; of 64 latents where it does not say, or says less
        and is so old that diffusers does not believe it (models of 512 pixels were converted with a size of 32)."""
        sample = self.unet.get("sample_size") or 64
        version = re.match(r"(\d+)\.(\d+)", self.unet.get("version") or "")
        if isinstance(sample, int) and version and (int(version[1]), int(version[2])) < (0, 9):
            sample = max(sample, 64)
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return width * self.factor, height * self.factor

    @property
    def of_pixels(self) -> bool:
        """Whether its autoencoder is `unet.pixel_vae`, which fp16 would break."""
        return len(self.vae["block_out_channels"]) == 1

    @property
    def inpaints_only(self) -> bool:
        """Whether its UNet takes a mask and a masked image beside the latents: it can't draw without them."""
        return bool(self.unet["in_channels"] == 2 * self.vae["latent_channels"] + 1)

    @property
    def guidance(self) -> float:
        """The guidance that suits it: 3 for models trained here (as when they are looked at in training), else 7.5,
        Stable Diffusion's."""
        return 7.5 if self.trained is None or self.trained["settings"].get("from") else 3.0

    @property
    def manifest(self) -> str | None:
        """The sha256 of the manifest of the shards that it was trained on, where it says so."""
        found: str | None = (self.trained or {}).get("data", {}).get("manifest_sha256")
        return found

    @cached_property
    def digest(self) -> str:
        """One sha256 over configurations, tokenizer and weights: the same model, wherever it lies. Reads all of it."""
        files = [p for part in PARTS for p in (self.folder / part).iterdir() if p.suffix in (".json", ".txt")]
        files += [p for part in PARTS[:3] for p in weight_files(self.folder / part)]
        lines = [f"{p.relative_to(self.folder)} {sha256_file(p)}" for p in sorted(files)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_model_info(name: str | Path) -> ModelInfo:
    """What there is to know of a model, a folder or a hub id (which is downloaded first).

    Raises UserError, naming the file, where a part is missing, of another type, or where a configuration says what
    can't be. No weights are read, and neither torch nor diffusers is loaded, but to download.
    """
    folder = find_model_folder(name)
    index, parts = read_config(ModelIndexConfig, folder / "model_index.json")
    if index.kind not in PIPELINES:
        raise UserError(
            f"{name} is a {printable(index.kind, 60)}: what can be drawn with, and trained further, are models of the "
            f"type of {PIPELINES[0]}"
        )
    missing = [part for part in PARTS if not _is_whole(folder, part, parts.get(part))]
    if missing:
        raise UserError(f"{name} is no whole text-to-image model: {', '.join(missing)} missing or without weights")
    for part, classes in _CLASSES.items():
        if (found := parts[part][1]) not in classes:
            named = " or ".join(classes[:2]) if len(classes) < 3 else f"one of {', '.join(classes)}"
            raise UserError(f"{folder / 'model_index.json'}: its {part} is a {printable(found, 60)}, not {named}")
    unet, vae, text = (
        read_config(kind, folder / part / "config.json")[0].model_dump()
        for kind, part in ((UnetConfig, "unet"), (VaeConfig, "vae"), (TextEncoderConfig, "text_encoder"))
    )
    _, scheduler = read_config(SchedulerConfig, folder / "scheduler" / "scheduler_config.json")
    scheduler["_class_name"] = parts["scheduler"][1]
    _check_tokenizer(folder / "tokenizer", text["max_position_embeddings"])
    record = training_record(folder)
    info = ModelInfo(str(name), folder, unet, vae, text, scheduler, record[1] if record else None)

    path, latents, wide = folder / "unet" / "config.json", vae["latent_channels"], text["hidden_size"]
    if unet["in_channels"] not in (latents, 2 * latents + 1) or unet["out_channels"] != latents:
        raise UserError(
            f"{path}: a UNet with {unet['in_channels']} channels in and {unet['out_channels']} out does not fit the "
            f"autoencoder, whose latents have {latents}"
        )
    reads = unet["cross_attention_dim"]
    if any(n != wide for n in (reads if isinstance(reads, list) else [reads])):
        raise UserError(f"{path}: cross_attention_dim is {reads}, and the text encoder's hidden_size {wide}")

    for file in (file for part in PARTS[:3] for file in weight_files(folder / part)):
        if file.suffix == ".safetensors":
            read_header(file)
        elif check_regular(file) < 64 or is_pointer(file):
            raise UserError(f"{file} holds no weights: it may be a pointer of Git LFS (`git lfs pull` fetches them)")
    return info


def _check_tokenizer(folder: Path, most: int) -> None:
    for path in sorted(folder.glob("*.json")):
        if path.name == "tokenizer_config.json":
            length = read_config(TokenizerConfig, path)[0].model_max_length
            if length is None:
                raise UserError(f"{path}: model_max_length, how long a prompt may be, is missing: {most} would do")
            if length > most:
                raise UserError(
                    f"{path}: model_max_length {length} is more than the {most} that the text encoder reads"
                )
        elif not isinstance(read_json_file(path), dict):
            raise UserError(f"{path}: a JSON object is expected")
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(
            f"{folder / 'tokenizer_config.json'} is missing: it says how long a prompt may be. What would do: "
            f'{{"tokenizer_class": "CLIPTokenizer", "model_max_length": {most}}}'
        )


def check_trainable(info: ModelInfo, size: int | None) -> None:
    """Raise UserError where a model can't be trained further, or not on images of this side."""
    config = info.scheduler
    kind, times = config.get("prediction_type", "epsilon"), config.get("num_train_timesteps", 1000)
    if kind not in ("flow_prediction", "v_prediction", "epsilon") or times != 1000:
        raise UserError(
            f"{info.folder / 'scheduler' / 'scheduler_config.json'}: the model predicts {kind!r} over {times} times; "
            "what can be trained further is flow_prediction, v_prediction and epsilon over 1000"
        )
    if info.inpaints_only:
        raise UserError(f"{info.name} is no plain text-to-image model: its UNet takes more than latents (inpainting?)")
    side = size or min(info.size)
    step = int(
        info.factor * 2 ** (len(info.unet["block_out_channels"]) - 1)
    )  # the autoencoder's factor times the UNet's
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


def _is_whole(folder: Path, part: str, entry: Any) -> bool:
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)):
        return False
    if not (folder / part).is_dir():
        return False
    if part == "tokenizer":
        return any((folder / part / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    if part == "scheduler":
        return (folder / part / "scheduler_config.json").is_file()
    return (folder / part / "config.json").is_file() and bool(weight_files(folder / part))
