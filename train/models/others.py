"""Folders of any pipeline of diffusers but the Stable Diffusion type: what of them can be checked before loading."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aesthetic.errors import UserError
from aesthetic.untrusted import read_json_file
from train.models.abilities import Abilities, pipeline_class
from train.models.configs import AnyDenoiserConfig, AnyVaeConfig, SchedulerConfig, read_config
from train.models.parts import check_weights, is_whole, kind_of_part, parts_of

DENOISERS = ("transformer", "unet")
VAES = ("vae", "movq", "vqgan")


def read_others(
    name: str, folder: Path, index: Mapping[str, Any], abilities: Abilities
) -> tuple[dict[str, dict[str, Any]], dict[str, Any], tuple[str, ...]]:
    """The config.json of each part with weights, the scheduler's, and names of all parts.

    Checked is that each part which the pipeline is made of is there, whole, of a class that is installed, and that
    headers of weights fit their files. Raises UserError, naming the file.
    """
    configs: dict[str, dict[str, Any]] = {}
    scheduler: dict[str, Any] = {}
    found = parts_of(index, pipeline_class(abilities.text), folder)
    parts = {part: entry for part, entry in found.items() if entry is not None}
    for part, entry in parts.items():
        kind, role = kind_of_part(entry)
        if not (is_whole(folder, part, list(entry)) if role != "files" else (folder / part).is_dir()):
            raise UserError(f"{name} is no whole text-to-image model: {part} is missing or without weights")
        if role == "weights":
            configs[part] = _config(folder / part / "config.json", part, kind)
            check_weights(folder / part)
        elif role == "scheduler":
            _, scheduler = read_config(SchedulerConfig, folder / part / "scheduler_config.json")
            scheduler["_class_name"] = entry[1]
        else:
            for path in sorted((folder / part).glob("*.json")):
                read_json_file(path)
    if not any(part in configs for part in DENOISERS):
        raise UserError(f"{name}: its {abilities.text} has neither a transformer nor a UNet, and can't be drawn with")
    return configs, scheduler, tuple(sorted(parts))


def _config(path: Path, part: str, kind: Any) -> dict[str, Any]:
    schema = AnyDenoiserConfig if part in DENOISERS else AnyVaeConfig if part in VAES else None
    if schema is None:
        raw = read_json_file(path, finite=False)
        if not isinstance(raw, dict):
            raise UserError(f"{path}: a JSON object is expected")
        return raw
    config = read_config(schema, path)[0].model_dump(exclude_unset=True)
    own = inspect.signature(kind.__init__).parameters
    defaults = {name: p.default for name, p in own.items() if p.default is not inspect.Parameter.empty}
    if part in VAES:
        defaults.pop("sample_size", None)  # is what tiles are cut by, and says nothing of the model where it is default
    return defaults | config


def vae_factor(configs: Mapping[str, dict[str, Any]]) -> int:
    """Pixels of a side per latent; 1 where there is no autoencoder."""
    vae = next((configs[part] for part in VAES if part in configs), None)
    if vae is None:
        return 1
    if vae.get("temperal_downsample") is not None:
        return int(2 ** len(vae["temperal_downsample"]))
    levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
    return int(2 ** (len(levels) - 1)) if levels else 8


def denoiser_of(configs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The configuration of what takes the noise away."""
    return next(configs[part] for part in DENOISERS if part in configs)


def side_of_latents(configs: Mapping[str, dict[str, Any]]) -> int:
    """Sides of latents are multiples of this. Transformers read them in patches, or packed two by two."""
    denoiser = denoiser_of(configs)
    if "unet" in configs:
        return 8 if "movq" in configs else 1  # Kandinsky's sides are multiples of 64 pixels
    patch = denoiser.get("all_patch_size") or denoiser.get("patch_size") or 1
    return max(2, *(patch if isinstance(patch, list | tuple) else [patch]))


def finest_channels(configs: Mapping[str, dict[str, Any]]) -> tuple[int, int]:
    """About how many numbers the autoencoder holds for a pixel at its finest level, and the denoiser for a latent."""
    vae = next((configs[part] for part in VAES if part in configs), {})
    levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or [128]
    denoiser = denoiser_of(configs)
    width: Any = denoiser.get("block_out_channels")
    if isinstance(width, list | tuple) and width and isinstance(width[0], int):
        return levels[0], width[0]
    width = denoiser.get("dim") or denoiser.get("hidden_size")
    if not isinstance(width, int):
        heads, wide = denoiser.get("num_attention_heads"), denoiser.get("attention_head_dim")
        width = heads * wide if isinstance(heads, int) and isinstance(wide, int) else 2048
    return levels[0], max(1, width // side_of_latents(configs) ** 2)
