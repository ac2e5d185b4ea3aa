"""Models of any family: which one a pipeline is of, new ones from presets, saved ones from folders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from aesthetic.errors import UserError
from train.models import flux, sd3, sdxl, unet, z_image
from train.models.abilities import LORA_ONLY, TRAINABLE
from train.models.base import Family
from train.models.info import ModelInfo, read_model_info
from train.models.load import load_pipeline
from train.models.presets import PRESETS, Preset, TransformerPreset, UnetPreset

FAMILIES: tuple[Family, ...] = (
    *(unet.UnetFamily(), z_image.ZImageFamily()),
    *(sdxl.SdxlFamily(), sd3.Sd3Family(), flux.FluxFamily()),
)
"""What can be trained."""


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline. Raises UserError for a kind that can't be trained."""
    for family in FAMILIES:
        if hasattr(pipeline, family.denoiser) and type(pipeline).__name__ == family.pipeline:
            return family
    raise UserError(
        f"a {type(pipeline).__name__} can't be trained here: {' and '.join(f.pipeline for f in FAMILIES)} can"
    )


def tokenize(pipeline: Any, captions: Sequence[str]) -> list[torch.Tensor]:
    """The token ids of each caption, (length,) int64, as the pipeline itself reads prompts."""
    return family_of(pipeline).tokenize(pipeline, captions)


def new_model(
    preset: Preset | str,
    captions: Iterable[str],
    objective: str = "flow",
    seed: int = 0,
    *,
    vae: Path | None = None,
    text_encoder: Path | None = None,
) -> Any:
    """A pipeline of random weights, its tokenizer trained on the captions; the same for the same seed.

    `vae` and `text_encoder`, of transformers, are folders of parts that take the place of the preset's (see `given`).
    """
    p = PRESETS[preset] if isinstance(preset, str) else preset
    if isinstance(p, TransformerPreset):
        return z_image.new_model(p, captions, objective, seed, vae=vae, text_encoder=text_encoder)
    assert isinstance(p, UnetPreset)
    return unet.new_model(p, captions, objective, seed)


def load_model(model: ModelInfo | str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline in a folder or under a hub id, of a family that can be trained. Weights are of type `dtype`.

    Raises UserError, saying what to do and naming the file, for what is missing, broken or of another kind.
    """
    info = model if isinstance(model, ModelInfo) else read_model_info(model)
    if not info.is_trainable:
        raise UserError(
            f"{info.name} is a {info.abilities.text}: what can be trained further is of "
            f"{', '.join((*TRAINABLE, *LORA_ONLY))}"
        )
    return load_pipeline(info, dtype)
