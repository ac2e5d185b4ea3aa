"""Tiny open_clip models of random weights: an encoder's whole way of loading and running, in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DIM = 64
_VISION = {"image_size": 48, "layers": 12, "width": 64, "head_width": 32, "patch_size": 16}
_SIGLIP = {"image_size": 48, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"}
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "toy": {},
    "toy-quickgelu": {"quick_gelu": True},
    "toy-64px": {"vision_cfg": {**_VISION, "image_size": 64}},  # as ViT-L-14-336 is to ViT-L-14
    "toy-small": {"embed_dim": 32},  # as ViT-B-32's 512 numbers are to ViT-L-14's 768
    # as SigLIP (a name with which open_clip takes another tokenizer): timm's tower, pooled by attention and without
    # projection, and a text tower without causal mask
    "toy-sigmoid": {
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": {**_SIGLIP, "timm_model_pretrained": False},
        "text_cfg": {**_TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
    "toy-other": {"vision_cfg": {**_VISION, "width": 96, "pool_type": "avg"}},  # as SigLIP's 768 are to CLIP's
}


def add_architectures(folder: Path) -> None:
    """Make them known to open_clip."""
    import open_clip

    for name, changes in ARCHITECTURES.items():
        config = {"embed_dim": DIM, "vision_cfg": _VISION, "text_cfg": _TEXT, **changes}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def make_weights(path: Path, architecture: str = "toy", seed: int = 0) -> Any:
    """Write a file of weights; returns the model that they are of."""
    import open_clip
    import torch

    torch.set_num_threads(1)  # for a model this small, waking threads costs more than they save
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.create_model(architecture, pretrained=None)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "token_embedding" not in name:
                    parameter.mul_(4)  # lively enough for activations to differ
    torch.save(model.state_dict(), path)
    return model.eval()
