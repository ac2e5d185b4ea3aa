"""Stable Diffusion's pipelines as one file, under the names that CompVis and Stability AI gave their parts.

The rules are those of their code (`openaimodel.UNetModel`, `autoencoder.AutoencoderKL`, open_clip's transformer): how
its blocks are numbered, and what its layers are called.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def save_single_file(pipeline: Any, path: Path, metadata: dict[str, str] | None = None, **more: Tensor) -> Path:
    """A StableDiffusionPipeline or StableDiffusionXLPipeline in the layout of their first trainers."""
    tensors = {f"model.diffusion_model.{k}": v for k, v in unet_names(pipeline.unet).items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in vae_names(pipeline.vae).items()}
    two = hasattr(pipeline, "text_encoder_2")
    clip = "conditioner.embedders.0.transformer." if two else "cond_stage_model.transformer."
    tensors |= {f"{clip}text_model.{k}": v for k, v in bare(pipeline.text_encoder).items()}
    if two:
        open_clip = open_clip_names(pipeline.text_encoder_2)
        tensors |= {f"conditioner.embedders.1.model.{k}": v for k, v in open_clip.items()}
    tensors |= {"betas": torch.linspace(0.1, 0.2, 10), **more}  # as Lightning's modules saved theirs
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    return path


def unet_names(unet: Any) -> dict[str, Tensor]:
    layers, attends = unet.config.layers_per_block, ["Attn" in kind for kind in unet.config.up_block_types]
    found = {}
    for name, value in unet.state_dict().items():
        m = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
        if m:
            block, layer = int(m[2]), int(m[4])
            if m[1] == "down":
                number = 1 + block * (layers + 1) + (layers if m[3] == "downsamplers" else layer)
                new = f"input_blocks.{number}.{1 if m[3] == 'attentions' else 0}."
                new += m[5].replace("conv.", "op.") if m[3] == "downsamplers" else m[5]
            else:
                number = block * (layers + 1) + (layers if m[3] == "upsamplers" else layer)
                place = {"resnets": 0, "attentions": 1, "upsamplers": 2 if attends[block] else 1}[m[3]]
                new = f"output_blocks.{number}.{place}.{m[5]}"
        else:
            new = next(b + name[len(a) :] for a, b in _ENDS.items() if name.startswith(a + "."))
        if ".resnets." in name:
            new = renamed(new, _RESNET)
        found[new] = value
    return found


def vae_names(vae: Any) -> dict[str, Tensor]:
    levels, found = len(vae.config.block_out_channels), {}
    for name, value in vae.state_dict().items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        new = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "attentions" in name:
            new = renamed(new.replace("mid_block.attentions.0", "mid.attn_1"), _ATTENTION)
            if value.ndim == 2:  # a convolution of one pixel
                value = value[:, :, None, None]
        found[new] = value
    return found


def open_clip_names(encoder: Any) -> dict[str, Tensor]:
    state, found = bare(encoder), {}
    ends = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding", "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }  # fmt: skip
    for name, value in state.items():
        if name == "text_projection.weight":
            found["text_projection"] = value.T
        elif name in ends:
            found[ends[name]] = value
        elif ".q_proj." in name:
            place = re.sub(
                r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.", r"transformer.resblocks.\1.attn.in_proj_", name
            )
            found[place] = torch.cat([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        elif ".k_proj." not in name and ".v_proj." not in name:
            found[renamed(name.replace("encoder.layers.", "transformer.resblocks."), _OPEN_CLIP)] = value
    return found


def bare(encoder: Any) -> dict[str, Tensor]:
    """Its weights, whether or not its class has them in a module `text_model`."""
    return {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items() if "position_ids" not in k}


def renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name
