"""Stable Diffusion XL, as a diffusers StableDiffusionXLPipeline: what LoRAs of it are trained with.

Two CLIPs read the caption: their states before the last layer side by side, and the second one's pooled vector. The
UNet is told too how large an image was and what of it is shown (Podell et al. 2023, arXiv 2307.01952, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.models.base import padded_ids, with_pooled
from train.models.unet import UnetFamily


class SdxlFamily(UnetFamily):
    """Stable Diffusion XL, and what is built like it."""

    pipeline = "StableDiffusionXLPipeline"

    def tokenize(self, pipeline: Any, captions: Sequence[str]) -> list[Tensor]:
        """(tokens + 1, 2): of both tokenizers, the last row for the pooled vector; -1 throughout where the pipeline
        takes zeros for no words (force_zeros_for_empty_prompt)."""
        tokens = clip_ids(pipeline, captions)
        if pipeline.config.force_zeros_for_empty_prompt:
            tokens[[not caption for caption in captions]] = -1
        return list(tokens)

    def encode_text(self, text_encoder: Any, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(n, tokens + 1, width of both), the last row the pooled vector."""
        states, pooled = clip_states(text_encoder, tokens[:, :-1].clamp(min=0))
        text = with_pooled(states, pooled[1])
        return text.masked_fill(tokens[:, :, :1] < 0, 0)

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, text: Tensor, lengths: Tensor, views: Tensor) -> Tensor:
        """In the scheduler's own units."""
        config = denoiser.config
        pooled = config.projection_class_embeddings_input_dim - views.shape[1] * config.addition_time_embed_dim
        added = {"text_embeds": text[:, -1, :pooled], "time_ids": views.to(x_t)}
        said: Tensor = denoiser(x_t, t, text[:, :-1], added_cond_kwargs=added, return_dict=False)[0]
        return said


def clip_ids(pipeline: Any, captions: Sequence[str]) -> Tensor:
    """(n, tokens + 1, 2) int64: what the tokenizers of two CLIPs make of captions, and a row of zeros."""
    pair = [padded_ids(t, captions, t.model_max_length) for t in (pipeline.tokenizer, pipeline.tokenizer_2)]
    ids = torch.stack(pair, -1)
    return torch.cat([ids, torch.zeros_like(ids[:, :1])], 1)


def clip_states(encoders: Sequence[nn.Module], ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Of two CLIPs: states before the last layer side by side (n, tokens, width of both), and what each pools."""
    said = [encoder(ids[:, :, i], output_hidden_states=True) for i, encoder in enumerate(encoders[:2])]
    return torch.cat([s.hidden_states[-2] for s in said], -1), [s[0] for s in said]
