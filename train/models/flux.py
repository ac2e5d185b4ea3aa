"""FLUX.1, as a diffusers FluxPipeline: what LoRAs of it are trained with.

T5 reads the caption, CLIP gives a pooled vector; four latents, two by two, are one token. Where the model was distilled
with guidance, it is trained at a guidance of 1, as diffusers' own LoRA training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.models.base import MMDIT_ATTENTION, Family, padded_ids, with_pooled
from train.objective import TIMES

TOKENS = 512
"""That T5 reads: what the pipeline cuts prompts to, if it is not told otherwise."""


class FluxFamily(Family):
    """FLUX.1 (Black Forest Labs), and what is built like it."""

    title = "transformer"
    pipeline = "FluxPipeline"
    denoiser = "transformer"
    lora_targets = MMDIT_ATTENTION
    text_dtype = torch.bfloat16

    def tokenize(self, pipeline: Any, captions: Sequence[str]) -> list[Tensor]:
        """(T5's tokens + 1, 2): T5's beside CLIP's, where these end -1; the last row for the pooled vector."""
        clip = padded_ids(pipeline.tokenizer, captions, pipeline.tokenizer.model_max_length)
        t5 = padded_ids(pipeline.tokenizer_2, captions, TOKENS)
        both = torch.stack([t5, F.pad(clip, (0, TOKENS - clip.shape[1]), value=-1)], -1)
        return list(F.pad(both, (0, 0, 0, 1), value=-1))

    def tokenizer(self, pipeline: Any) -> Any:
        """T5's."""
        return pipeline.tokenizer_2

    def most_tokens(self, pipeline: Any) -> int:
        """T5's."""
        return TOKENS

    def encode_text(self, text_encoder: Any, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(n, T5's tokens + 1, T5's width), the last row CLIP's pooled vector."""
        clip, t5 = text_encoder
        ids = tokens[:, tokens[0, :, 1] >= 0, 1]
        return with_pooled(t5(tokens[:, :-1, 0])[0], clip(ids).pooler_output)

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, text: Tensor, lengths: Tensor, views: Tensor) -> Tensor:
        """As it is: noise - x0, of latents packed two by two."""
        from diffusers import FluxPipeline

        n, channels, height, width = x_t.shape
        places = FluxPipeline._prepare_latent_image_ids(n, height // 2, width // 2, x_t.device, x_t.dtype)
        said = denoiser(
            hidden_states=FluxPipeline._pack_latents(x_t, n, channels, height, width),
            timestep=t / TIMES,
            guidance=torch.ones_like(t) if denoiser.config.guidance_embeds else None,
            pooled_projections=text[:, -1, : denoiser.config.pooled_projection_dim],
            encoder_hidden_states=text[:, :-1],
            txt_ids=text.new_zeros(text.shape[1] - 1, 3),
            img_ids=places,
            return_dict=False,
        )[0]
        unpacked: Tensor = FluxPipeline._unpack_latents(said, height, width, 1)
        return unpacked

    def blocks(self, denoiser: Any) -> list[nn.Module]:
        """Its layers."""
        return [*denoiser.transformer_blocks, *denoiser.single_transformer_blocks]

    def drawing(self, pipeline: Any, guidance: float) -> dict[str, Any]:
        """Its own size is 1024 whatever the model's; guidance is what the model was distilled with, not w."""
        size = self.default_size(pipeline)
        return {"height": size, "width": size}

    def shift(self, vae: Any) -> float:
        """The autoencoder's own."""
        return float(vae.config.shift_factor or 0.0)

    def size_step(self, pipeline: Any) -> int:
        """Two latents of a side are one token."""
        return 2 * int(pipeline.vae_scale_factor)

    def default_size(self, pipeline: Any) -> int:
        """By the autoencoder's sample_size: the transformer's configuration has none."""
        return int(pipeline.vae.config.sample_size)

    def set_default_size(self, pipeline: Any, size: int) -> None:
        """As the autoencoder's sample_size."""
        pipeline.vae.register_to_config(sample_size=size)
