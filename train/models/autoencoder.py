"""Autoencoders of new models, as diffusers' AutoencoderKL: small ones to be trained, and one that changes nothing."""

from __future__ import annotations

import math
from typing import Any

import torch

from train.models.presets import Preset


def new_autoencoder(p: Preset) -> Any:
    """The autoencoder of a new model: random and to be trained, or of one of pixels `pixel_vae`."""
    from diffusers import AutoencoderKL

    if not p.vae:
        return pixel_vae(p.size)
    return AutoencoderKL(
        block_out_channels=p.vae, layers_per_block=1 if p.size < 512 else 2, latent_channels=p.latents,
        down_block_types=("DownEncoderBlock2D",) * len(p.vae),
        up_block_types=("UpDecoderBlock2D",) * len(p.vae),
        norm_num_groups=math.gcd(32, p.vae[0] // 2), sample_size=p.size,
        mid_block_add_attention=p.size >= 512, scaling_factor=0.18215 if p.size >= 512 else 1.0,
    )  # fmt: skip


def pixel_vae(size: int) -> Any:
    """An AutoencoderKL that changes nothing: latents are the pixels, and decode(encode(x)) is x within fp32's rounding.

    So a model of pixels is a StableDiffusionPipeline like any other. Each value is carried as the pair (x, -x): their
    mean is 0, they are so small beside the epsilon of GroupNorm that it only multiplies by a constant, and
    silu(x) - silu(-x) = x. (The same with a patch transform, several pixels a latent, can't be had in this class: the
    decoder repeats pixels and convolves, and no convolution after that can make a row of +1, -1, +1, -1.) fp32 and
    bf16 only: the small values vanish in fp16.
    """
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(
        block_out_channels=(6,), layers_per_block=1, latent_channels=3, norm_num_groups=1, sample_size=size,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.0,
    )  # fmt: skip
    tiny = 1e-7
    pair = torch.cat([torch.eye(3), -torch.eye(3)])
    with torch.no_grad():
        for module in vae.modules():
            if type(module).__name__ == "ResnetBlock2D":  # x + 0
                module.conv2.weight.zero_()
                module.conv2.bias.zero_()
        for part, out in ((vae.encoder, 6), (vae.decoder, 3)):
            for conv in (part.conv_in, part.conv_out):
                conv.weight.zero_()
                conv.bias.zero_()
            part.conv_in.weight[:, :, 1, 1] = tiny * pair
            part.conv_norm_out.weight.fill_(part.conv_norm_out.eps**0.5 / tiny)
            part.conv_out.weight[:3, :, 1, 1] = pair.T
            part.conv_out.bias[3:out] = -30.0  # log variance of the latents: as good as none
    return vae.requires_grad_(False)
