"""Folders of the Stable Diffusion 1 and 2 type, checked down to each number, before their weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aesthetic.errors import UserError
from aesthetic.untrusted import printable, read_json_file
from train.models.configs import (
    SchedulerConfig,
    TextEncoderConfig,
    TokenizerConfig,
    UnetConfig,
    VaeConfig,
    read_config,
)
from train.models.parts import check_weights, is_whole
from train.models.schedulers import SCHEDULERS

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": SCHEDULERS,
}
"""What a part may be, by the second word of its entry in model_index.json."""


def read_stable_diffusion(
    name: str, folder: Path, index: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The parts' config.json, with diffusers' defaults for what they leave out, and the scheduler's as it is.

    Raises UserError, naming the file, where a part is missing, of another type, or where a configuration says what
    can't be.
    """
    missing = [part for part in PARTS if not is_whole(folder, part, index.get(part))]
    if missing:
        raise UserError(f"{name} is no whole text-to-image model: {', '.join(missing)} missing or without weights")
    for part, classes in _CLASSES.items():
        if (found := index[part][1]) not in classes:
            named = " or ".join(classes[:2]) if len(classes) < 3 else f"one of {', '.join(classes)}"
            raise UserError(f"{folder / 'model_index.json'}: its {part} is a {printable(found, 60)}, not {named}")
    unet, vae, text = (
        read_config(kind, folder / part / "config.json")[0].model_dump()
        for kind, part in ((UnetConfig, "unet"), (VaeConfig, "vae"), (TextEncoderConfig, "text_encoder"))
    )
    _, scheduler = read_config(SchedulerConfig, folder / "scheduler" / "scheduler_config.json")
    scheduler["_class_name"] = index["scheduler"][1]
    _check_tokenizer(folder / "tokenizer", text["max_position_embeddings"])

    path, latents, wide = folder / "unet" / "config.json", vae["latent_channels"], text["hidden_size"]
    if unet["in_channels"] not in (latents, 2 * latents + 1) or unet["out_channels"] != latents:
        raise UserError(
            f"{path}: a UNet with {unet['in_channels']} channels in and {unet['out_channels']} out does not fit the "
            f"autoencoder, whose latents have {latents}"
        )
    reads = unet["cross_attention_dim"]
    if any(n != wide for n in (reads if isinstance(reads, list) else [reads])):
        raise UserError(f"{path}: cross_attention_dim is {reads}, and the text encoder's hidden_size {wide}")

    for part in PARTS[:3]:
        check_weights(folder / part)
    return {"unet": unet, "vae": vae, "text_encoder": text}, scheduler


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
