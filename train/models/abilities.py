"""What diffusers' pipelines can be asked for, by their classes: asked of these, without any weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from aesthetic.errors import UserError
from aesthetic.untrusted import printable

STABLE_DIFFUSION = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
"""The family that is checked down to each number of its configurations."""

TRAINABLE = (STABLE_DIFFUSION[0], "ZImagePipeline")
"""What can be trained here (`train.models.family`)."""

LORA_ONLY = ("StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline")
"""What LoRAs can be trained of here, and nothing more."""


@dataclass(frozen=True)
class Abilities:
    """What a model's pipelines can be asked for. None: diffusers has no such pipeline for models of this kind."""

    text: str = STABLE_DIFFUSION[0]  # class of diffusers: text to image
    image: str | None = STABLE_DIFFUSION[1]  # image to image
    mask: str | None = STABLE_DIFFUSION[2]  # inpainting
    negative: bool = True  # reads negative prompts
    guidance: float = 7.5  # by default
    steps: int = 30


OF_STABLE_DIFFUSION = Abilities()


def abilities_of(kind: str, name: str) -> Abilities:
    """What models can be asked for whose model_index.json names this class. Imports diffusers, reads nothing.

    Raises UserError, about the model `name`, where the class draws no image from words alone.
    """
    if kind in STABLE_DIFFUSION:
        return OF_STABLE_DIFFUSION
    import diffusers

    if kind in ("DiffusionPipeline", "") or not hasattr(diffusers, kind):
        raise UserError(
            f"{name} is a {printable(kind, 60)}, which the installed diffusers {diffusers.__version__} does not have: "
            "a newer one may, and code that a model brings with it is not run"
        )
    texts, images, masks = _auto_classes()
    key = next((key for table in (texts, images, masks) for key, c in table.items() if c.__name__ == kind), None)
    text = texts.get(key) if key else None
    if key is None or text is None or (lacks := _lacks(text)):
        why = "" if key is None or text is None else f": it {lacks}"
        raise UserError(f"{name} is a {printable(kind, 60)}, which draws no image from words alone{why}")
    call = inspect.signature(text.__call__).parameters
    true_guidance = _default(call, "true_cfg_scale")
    guidance = _default(call, "guidance_scale")
    return Abilities(
        text=text.__name__,
        image=_with_strength(images.get(key)),
        mask=_with_strength(masks.get(key)),
        negative="negative_prompt" in call and (true_guidance is None or true_guidance > 1),
        guidance=float(true_guidance or 1.0) if guidance is None else float(guidance),
        steps=int(_default(call, "num_inference_steps") or Abilities.steps),
    )


def pipeline_class(name: str) -> Any:
    """The class of diffusers of this name, one of those in Abilities."""
    import diffusers

    return getattr(diffusers, name)


def guidance_argument(call: Mapping[str, inspect.Parameter]) -> str:
    """What a pipeline's call names classifier-free guidance: `true_cfg_scale` where `guidance_scale` is not used by
    default, as with Qwen-Image."""
    plain = _default(call, "guidance_scale") is not None or "true_cfg_scale" not in call
    return "guidance_scale" if plain else "true_cfg_scale"


@cache
def _auto_classes() -> tuple[Mapping[str, Any], ...]:
    """What AutoPipelineForText2Image, -Image2Image and -Inpainting choose from: by family, classes of pipelines."""
    from diffusers.pipelines import auto_pipeline as auto

    return (
        auto.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        auto.AUTO_INPAINT_PIPELINES_MAPPING,
    )


def _default(call: Mapping[str, inspect.Parameter], name: str) -> Any:
    found = call[name].default if name in call else None
    return None if found is inspect.Parameter.empty else found


def _lacks(text: Any) -> str:
    """Why a class can't be called with words, a size and a seed, "" where it can."""
    made, call = (inspect.signature(f).parameters for f in (text.__init__, text.__call__))
    if any("controlnet" in name for name in made) or "control_image" in call:
        return "needs an image that says where things are (ControlNet)"
    if any(name.startswith("prior_") for name in made):
        return "is two models, one after the other, in two folders"
    if "num_frames" in call:
        return "makes video"
    wanted = ("prompt", "width", "height", "generator", "num_inference_steps")
    if lacking := [name for name in wanted if name not in call]:
        return f"takes no {lacking[0]}"
    if not isinstance(_default(call, "guidance_scale") or _default(call, "true_cfg_scale"), int | float):
        return "takes no guidance scale"
    return ""


def _with_strength(kind: Any) -> str | None:
    """The class's name where it begins with an image and says how much of it stays; editing by instruction is
    something else."""
    if kind is None or not {"image", "strength"} <= inspect.signature(kind.__call__).parameters.keys():
        return None
    return str(kind.__name__)
