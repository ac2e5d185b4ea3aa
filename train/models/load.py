"""A model as a pipeline of diffusers, with its weights: of the Stable Diffusion type, or any other that draws."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from aesthetic.untrusted import error_line, read_json_file
from curate.hub import no_progress_bars
from train.devices import out_of_memory
from train.models.abilities import pipeline_class
from train.models.info import ModelInfo
from train.models.parts import kind_of_part, load_part, parts_of

if TYPE_CHECKING:
    import torch


def load_pipeline(info: ModelInfo, dtype: torch.dtype) -> Any:
    """The pipeline that draws from words with a model, its weights of type `dtype`.

    Raises UserError, naming the file, where a part can't be made of its configuration, its weights do not fit that, or
    one is no number.
    """
    from train.models.unet import load_model

    if info.is_stable_diffusion:
        return load_model(info, dtype)
    return assemble(pipeline_class(info.abilities.text), info.folder, dtype)


def assemble(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A pipeline of this class, made of the parts in a folder that model_index.json names. Raises UserError."""
    from train.models.unet import REST_OF_CLIP

    index = read_json_file(folder / "model_index.json")
    taken = inspect.signature(kind.__init__).parameters
    parts = parts_of(index, kind, folder)
    made = {name: value for name, value in index.items() if name in taken and name not in parts}  # settings
    if "requires_safety_checker" in taken:
        made["requires_safety_checker"] = False
    with no_progress_bars("diffusers"):
        for name, part in parts.items():
            if part is None:
                made[name] = None
                continue
            place, (cls, role) = folder / name, kind_of_part(part)
            if role == "weights":
                # text encoders are often cut out of a larger model, whose other weights stay in the file
                made[name] = load_part(place, cls, dtype, None if part[0] == "transformers" else REST_OF_CLIP)
                continue
            try:
                made[name] = cls.from_pretrained(place, local_files_only=True)
            except Exception as e:  # whatever files that are none make of a constructor
                raise UserError(f"{place}: no {cls.__name__} can be made of these files: {error_line(e)}") from e
    try:
        return kind(**made)
    except Exception as e:
        raise UserError(f"{folder / 'model_index.json'}: its parts make no {kind.__name__}: {error_line(e)}") from e


def pipelines_with_images(text: Any, info: ModelInfo) -> tuple[Any, Any]:
    """(image to image, inpainting) of the same parts; None where diffusers has none for models of this kind."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    if not info.is_stable_diffusion:
        return (
            AutoPipelineForImage2Image.from_pipe(text) if info.abilities.image else None,
            AutoPipelineForInpainting.from_pipe(text) if info.abilities.mask else None,
        )
    if not isinstance(text.unet.config.sample_size, int):  # which image-to-image compares, and does not use
        text.unet.register_to_config(sample_size=64)
    same = {**text.components, "requires_safety_checker": False}
    image, mask = info.abilities.image, info.abilities.mask
    return pipeline_class(str(image))(**same), pipeline_class(str(mask))(**same)


def check_fits(pipeline: Any, info: ModelInfo, error: Exception) -> None:
    """After an error while a pipeline drew: raise UserError where that is the model's, whose parts do not fit or can't
    be computed."""
    if info.is_stable_diffusion:
        from train.models.unet import check_computes

        check_computes(pipeline, info, error)
    elif not out_of_memory(error):
        raise UserError(
            f"diffusers' {info.abilities.text} fails with {info.name}: {error_line(error)}. Its parts may not fit each "
            "other, or what was asked for does not fit it"
        ) from error
