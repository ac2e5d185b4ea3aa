"""Training a text-to-image model on curated shards, and drawing with it. A library: it runs without Ray.

data: images and their order; latents: computed once; objective: flow, v and eps; tasks: what a batch's loss is; loop:
the steps; run: a run in its folder; checkpoint: what it goes on from; metrics: what is seen of it; models/: diffusers
pipelines, built or loaded; generate/: images from a model, and how good they are.

from train import load_model
from train.generate.sampler import GenerationRequest, Sampler
load_model("model")                                                         # a diffusers StableDiffusionPipeline
next(Sampler("model").generate([GenerationRequest("a fox", seed=7)])).image  # a PIL image
"""

from __future__ import annotations

from typing import Any

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    # on demand: a command line that answers at once must not load torch
    if name == "load_model":
        from train.models.family import load_model

        return load_model
    raise AttributeError(f"module 'train' has no attribute {name!r}")
