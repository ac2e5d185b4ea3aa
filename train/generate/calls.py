"""Calls of diffusers' pipelines, each with the arguments that it knows: families name and take them differently."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from train.generate.request import GenerationRequest
from train.models.abilities import guidance_argument
from train.models.info import ModelInfo

if TYPE_CHECKING:
    import torch

_READS = {"QwenImage": 1024}
"""Tokens that pipelines whose names begin so read where they are told to; otherwise they cut after 512, unseen."""


def call_arguments(
    pipeline: Any,
    info: ModelInfo,
    batch: Sequence[GenerationRequest],
    noise: Sequence[torch.Generator],
    on_step: Callable[[int, int], None],
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """What a pipeline is called with for requests that differ in prompts, seeds and images alone.

    Args:
        on_step: called with (steps done, steps in all) of this call.
        more: image, strength, mask and size; the size only for those that do not take it from the image.
    """
    call = inspect.signature(pipeline.__call__).parameters
    one, steps = batch[0], max(1, int((batch[0].steps or 1) * more.get("strength", 1)))
    guidance, negative = guidance_argument(call), [r.negative for r in batch]
    given: dict[str, Any] = {
        "prompt": [r.prompt for r in batch],
        "num_inference_steps": one.steps,
        guidance: one.guidance,
        "generator": list(noise),
        "output_type": "np",
        **{name: value for name, value in more.items() if name in call or name not in ("width", "height")},
    }
    # true_cfg_scale weighs nothing but against a negative prompt
    if any(negative) or guidance == "true_cfg_scale":
        given["negative_prompt"] = negative
    if "use_resolution_binning" in call:  # to sizes that the model was trained at
        given["use_resolution_binning"] = False
    if "max_sequence_length" in call and (length := _length(pipeline, info, call)):
        given["max_sequence_length"] = length
    if "callback_on_step_end" in call:

        def on_step_end(pipeline: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
            on_step(i + 1, getattr(pipeline, "num_timesteps", steps))
            return {}

        given["callback_on_step_end"] = on_step_end
    elif "callback" in call:  # of older pipelines
        given["callback"] = lambda i, t, latents: on_step(min(i + 1, steps), steps)
    return given


def _length(pipeline: Any, info: ModelInfo, call: Mapping[str, inspect.Parameter]) -> int | None:
    """Tokens that are read of a prompt: as many as the pipeline reads by default, and no more than the last text
    encoder, which that is for, has places for."""
    kind = type(pipeline).__name__
    length = next((most for name, most in _READS.items() if kind.startswith(name)), call["max_sequence_length"].default)
    encoders = sorted(name for name in pipeline.components if name.startswith("text_encoder"))
    config = info.configs.get(encoders[-1], {}) if encoders else {}
    inner = config.get("text_config")
    places = (inner if isinstance(inner, dict) else config).get("max_position_embeddings")
    if not isinstance(length, int):
        return None
    return min(length, places) if isinstance(places, int) else length
