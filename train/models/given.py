"""Parts of others that a new transformer is given, and that are not trained: an autoencoder, a language model.

Each is a folder, of the part itself or of a diffusers pipeline that has it, or an id of the Hugging Face hub. What is
checked here needs no torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from aesthetic.errors import UserError
from aesthetic.untrusted import printable, read_json_file
from curate.hub import ModelFiles
from train.models.configs import VaeConfig, read_config
from train.models.presets import TransformerPreset

ENCODERS = {"qwen3": "Qwen3Model", "qwen2": "Qwen2Model", "llama": "LlamaModel", "mistral": "MistralModel"}
"""Language models whose states a transformer can be given: model_type in config.json, class in transformers."""


def find_vae(name: str) -> Path:
    """The folder of an AutoencoderKL. Raises UserError where there is none."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _downloaded_vae(name)
    for place in (folder, folder / "vae"):
        if (place / "config.json").is_file() and not (place / "model_index.json").is_file():
            kind = _config(place).get("_class_name")
            if kind != "AutoencoderKL":
                raise UserError(f"{place / 'config.json'}: an AutoencoderKL is expected, not {_named(kind)}")
            return place.absolute()
    raise UserError(f"{name} holds no autoencoder: config.json of an AutoencoderKL is expected there, or in vae/")


def _downloaded_vae(name: str) -> Path:
    """Out of the hub's cache, or from the hub."""
    from huggingface_hub import snapshot_download

    files = [f"{place}{file}" for place in ("", "vae/") for file in ("config.json", "diffusion_pytorch_model*.safe*")]
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name} is no folder. That of an AutoencoderKL is expected, or a hub id")
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError) as e:
        raise UserError(
            f"the autoencoder {name} is neither a folder here nor could it be had from the Hugging Face hub "
            f"({str(e).splitlines()[0]}). `hf download {name}` elsewhere prints the folder to give"
        ) from e


def find_text_encoder(name: str) -> Path:
    """The folder of a language model and its tokenizer, or of a pipeline that has both. Raises UserError."""
    folder = Path(name).expanduser()
    weights = folder / "text_encoder"
    if not weights.is_dir():
        weights = folder = ModelFiles(name).fetch()
    kind = _config(weights).get("model_type")
    if kind not in ENCODERS:
        raise UserError(
            f"{weights / 'config.json'}: a text encoder of the type {_named(kind)} can't be used here; what can is "
            f"{', '.join(ENCODERS)}"
        )
    if not any((place / "tokenizer_config.json").is_file() for place in (folder, folder / "tokenizer")):
        raise UserError(f"{folder} holds no tokenizer: tokenizer_config.json is expected there, or in tokenizer/")
    return folder.absolute()


def _config(folder: Path) -> dict[str, Any]:
    found = read_json_file(folder / "config.json")
    if not isinstance(found, dict):
        raise UserError(f"{folder / 'config.json'}: a JSON object is expected")
    return found


def _named(kind: Any) -> str:
    return printable(repr(kind), 60)


def with_vae(preset: TransformerPreset, folder: Path) -> TransformerPreset:
    """The preset with the latents of this autoencoder."""
    config, _ = read_config(VaeConfig, folder / "config.json")
    if config.latents_mean is not None:
        raise UserError(f"{folder / 'config.json'}: an autoencoder with latents_mean is not read by ZImagePipeline")
    factor = 2 ** (len(config.block_out_channels) - 1)
    return replace(preset, latents=config.latent_channels, factor=factor, vae=())
