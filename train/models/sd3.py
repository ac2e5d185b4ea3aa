"""Stable Diffusion 3, as a diffusers StableDiffusion3Pipeline: what LoRAs of it are trained with.

Two CLIPs read the caption as for Stable Diffusion XL, and T5, whose states come after theirs. T5 may be missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.models.base import MMDIT_ATTENTION, Family, padded_ids, with_pooled
from train.models.sdxl import clip_ids, clip_states

TOKENS = 256
"""That T5 reads: what the pipeline cuts prompts to, if it is not told otherwise."""


class Sd3Family(Family):
    """Stable Diffusion 3 and 3.5."""

    title = "transformer"
    pipeline = "StableDiffusion3Pipeline"
    denoiser = "transformer"
    lora_targets = MMDIT_ATTENTION
    text_dtype = torch.bfloat16

    def tokenize(self, pipeline: Any, captions: Sequence[str]) -> list[Tensor]:
        """(CLIP's tokens + T5's + 1, 2): both CLIPs', then T5's and -1, then a row for the pooled vector."""
        clips, t5 = clip_ids(pipeline, captions), pipeline.tokenizer_3
        ids = padded_ids(t5, captions, TOKENS) if t5 else clips.new_zeros(len(clips), TOKENS)
        rows = torch.stack([ids, torch.full_like(ids, -1)], -1)
        return list(torch.cat([clips[:, :-1], rows, clips[:, -1:]], 1))

    def tokenizer(self, pipeline: Any) -> Any:
        """T5's, where it is there."""
        return pipeline.tokenizer_3 or pipeline.tokenizer

    def most_tokens(self, pipeline: Any) -> int:
        """T5's, where it is there."""
        return TOKENS if pipeline.tokenizer_3 else super().most_tokens(pipeline)

    def encode_text(self, text_encoder: Any, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(n, CLIP's tokens + T5's + 1, T5's width), the last row the pooled vector of both CLIPs."""
        clips, ids = tokens[:, : -TOKENS - 1], tokens[:, -TOKENS - 1 : -1, 0]
        states, pooled = clip_states(text_encoder, clips)
        if len(text_encoder) > 2:
            more = text_encoder[2](ids)[0]
            states = F.pad(states, (0, more.shape[-1] - states.shape[-1]))
        else:
            more = states.new_zeros(len(states), TOKENS, states.shape[-1])
        return with_pooled(torch.cat([states, more], 1), torch.cat(pooled, -1))

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, text: Tensor, lengths: Tensor, views: Tensor) -> Tensor:
        """As it is: noise - x0."""
        config = denoiser.config
        text = F.pad(text, (0, config.joint_attention_dim - text.shape[-1]))  # where there is no T5
        pooled = text[:, -1, : config.pooled_projection_dim]
        said: Tensor = denoiser(x_t, text[:, :-1], pooled, t, return_dict=False)[0]
        return said

    def blocks(self, denoiser: Any) -> list[nn.Module]:
        """Its layers."""
        return list(denoiser.transformer_blocks)

    def shift(self, vae: Any) -> float:
        """The autoencoder's own."""
        return float(vae.config.shift_factor or 0.0)

    def size_step(self, pipeline: Any) -> int:
        """The side of a patch."""
        return int(pipeline.vae_scale_factor * pipeline.transformer.config.patch_size)

    def default_size(self, pipeline: Any) -> int:
        """By the transformer's sample_size."""
        return int(pipeline.transformer.config.sample_size * pipeline.vae_scale_factor)

    def set_default_size(self, pipeline: Any, size: int) -> None:
        """As what the pipeline draws of itself."""
        pipeline.default_sample_size = size // pipeline.vae_scale_factor
