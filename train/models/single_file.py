"""A model in one .safetensors file, as other programs keep them: made into a folder of diffusers, once, in the cache.

Such a file holds weights alone, under the names of the program that trained it: diffusers knows these
(`from_single_file`). What it does not hold, configurations and tokenizers, comes from the folder of the file's name
beside it, without ".safetensors", else from the hub's model of the same kind.
"""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

from aesthetic.errors import UserError
from aesthetic.untrusted import error_line
from curate.hub import no_progress_bars, no_warnings, unreachable
from curate.store.cache import cache_folder, make_room, one_at_a_time
from curate.store.files import digest
from curate.weight_files import WeightsHeader, read_header, weight_files
from train.models.abilities import abilities_of, pipeline_class
from train.models.configs import ModelIndexConfig, read_config

_UNET, _VAE = "model.diffusion_model.", ("first_stage_model.", "vae.")
"""How names of these parts begin: of Stable Diffusion's own trainers, whose names others kept."""

_CONFIGS = ["*.json", "*.txt", "*.model", "*.jinja"]


def convert_single_file(file: Path) -> Path:
    """The folder in the cache that a file was made into, now or before; anew where the file, or the folder beside it,
    has changed since.

    Raises UserError where it is no safetensors file, is a LoRA, is no model that diffusers reads from one file, lacks a
    part, or where its configuration can't be had; DiskFull.
    """
    if file.suffix != ".safetensors":
        raise UserError(
            f"{file} is a pickle, and to load one may run code that is in it. Most models are there as .safetensors too"
            if file.suffix in (".ckpt", ".pt", ".pth", ".bin")
            else f"{file} is a file: a folder with model_index.json is expected, a .safetensors file, or a hub id."
        )
    header = read_header(file)
    if any("lora" in name for name in header.tensors):
        raise UserError(f"{file} is a LoRA: give the model that it was trained on, and --lora {file}")
    beside = file.with_suffix("")
    config = beside if (beside / "model_index.json").is_file() else None
    sources = [file, *(sorted(p for p in beside.rglob("*") if p.is_file()) if config else ())]
    stamps = [[str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns] for p in sources]
    same_file = digest(str(file.absolute()))
    place = cache_folder() / "models" / f"{same_file}-{digest(stamps)}"
    with one_at_a_time(place):
        if not place.is_dir():
            place.parent.mkdir(exist_ok=True)
            for old in place.parent.glob(f"{same_file}-*"):  # of what the file was before, or a killed process
                shutil.rmtree(old, ignore_errors=True)
            scratch = place.with_name(f"{place.name}.tmp")
            _convert(file, header, config or _config_of_hub(file, header), scratch)
            scratch.rename(place)
    return place


def _config_of_hub(file: Path, header: WeightsHeader) -> Path:
    """Configurations and tokenizers of the model that diffusers takes a file for: of the cache, or fetched."""
    import torch
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type
    from huggingface_hub import constants, snapshot_download

    shapes = {name: torch.empty(t.shape, device="meta") for name, t in header.tensors.items()}
    kind = infer_diffusers_model_type(shapes)
    # what it knows nothing of it takes for Stable Diffusion 1
    if kind == "v1" and f"{_UNET}input_blocks.0.0.weight" not in shapes:
        raise UserError(
            f"{file} holds no model that the installed diffusers knows as a single file. Where it is one, put a "
            f"diffusers folder of its kind at {file.with_suffix('')}"
        )
    name = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    try:
        if not constants.HF_HUB_OFFLINE and (why := unreachable(constants.ENDPOINT, hub=True)):
            return Path(snapshot_download(name, allow_patterns=_CONFIGS, local_files_only=True))
        return Path(snapshot_download(name, allow_patterns=_CONFIGS))
    except (OSError, ValueError) as e:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else why or error_line(e)
        patterns = " ".join(f"--include '{pattern}'" for pattern in _CONFIGS)
        raise UserError(
            f"{file} holds weights alone. Configurations and tokenizer of its kind, {name}, could not be had from the "
            f"Hugging Face hub ({why}). Put them beside it: `hf download {name} {patterns} --local-dir "
            f"{file.with_suffix('')}` where the hub can be reached (a few MB), or any diffusers folder of that kind"
        ) from e


def _convert(file: Path, header: WeightsHeader, config: Path, to: Path) -> None:
    """Write the pipeline of a file, as diffusers reads it, its weights as precise as they are. Raises UserError."""
    import torch
    from diffusers.utils import logging

    index, raw = read_config(ModelIndexConfig, config / "model_index.json")
    abilities_of(index.kind, str(file))
    kind = pipeline_class(index.kind)
    if not hasattr(kind, "from_single_file"):
        raise UserError(f"{file}: the installed diffusers reads no {index.kind} from a single file")
    kinds = {t.kind for t in header.tensors.values()} & {"F64", "F32", "F16", "BF16"}
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[kinds.pop()] if kinds in ({"F16"}, {"BF16"}) else None
    make_room(file.stat().st_size * (1 if dtype or not kinds & {"F16", "BF16"} else 2))
    logging.set_verbosity_error()  # what is lacking we say ourselves
    try:
        with no_progress_bars("diffusers"), no_warnings():
            pipeline = kind.from_single_file(
                str(file), config=str(config), dtype=dtype or torch.float32, local_files_only=True,
                **_vae_beside(header, config, raw, dtype or torch.float32),
            )  # fmt: skip
            _check_whole(file, header, config, pipeline)
            _set_prediction(header, pipeline)
            pipeline.save_pretrained(to)
    except (UserError, MemoryError):
        raise
    except Exception as e:  # whatever weights that are others make of a configuration
        if "meta tensor" in str(e):  # as what is left over is made
            raise UserError(f"{file} does not fit {config}: it lacks weights that the configurations describe") from e
        raise UserError(
            f"{file} can't be read as the {index.kind} of {config}: {error_line(e)}. What a file lacks is taken from a "
            f"diffusers folder of its kind, with weights, at {file.with_suffix('')}"
        ) from e


def _vae_beside(header: WeightsHeader, config: Path, index: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """{"vae": the autoencoder of the folder beside} for a file without one, as those of newer families are."""
    if not index.get("vae") or any(name.startswith(_VAE) for name in header.tensors):
        return {}
    if not (config / "vae").is_dir() or not weight_files(config / "vae"):
        return {}
    from train.models.parts import kind_of_part, load_part

    library, name = index["vae"]
    return {"vae": load_part(config / "vae", kind_of_part((library, name))[0], dtype)}


def _check_whole(file: Path, header: WeightsHeader, config: Path, pipeline: Any) -> None:
    """Raise UserError where weights of a part are not in the file, or where a UNet has more than the configuration."""
    import torch

    for name, part in pipeline.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        if lacking := [weight for weight, value in part.named_parameters() if value.is_meta]:
            raise UserError(
                f"{file} does not fit {config / name / 'config.json'}: it lacks {lacking[0]}"
                + (f" and {len(lacking) - 1:,} more" if len(lacking) > 1 else "")
            )
    unet = getattr(pipeline, "unet", None)
    found = sum(name.startswith(_UNET) for name in header.tensors)  # which are converted one by one
    if unet is not None and found not in (0, len(unet.state_dict())):
        raise UserError(
            f"{file} does not fit {config / 'unet' / 'config.json'}: its UNet has {found:,} tensors, and this "
            f"describes {len(unet.state_dict()):,}"
        )


def _set_prediction(header: WeightsHeader, pipeline: Any) -> None:
    """What a UNet was trained to predict, as far as the file says: by Stability's ModelSpec, or by the empty tensors
    that trainers of v-prediction put into it, for web UIs."""
    said = header.metadata.get("modelspec.prediction_type", "")
    if pipeline.scheduler.config.get("prediction_type") is None or not hasattr(pipeline, "unet"):
        return
    if "v_pred" in header.tensors or said in ("v", "v_prediction"):
        change: dict[str, Any] = {"prediction_type": "v_prediction"}
    elif said == "epsilon":
        change = {"prediction_type": "epsilon"}
    else:
        return
    kind = type(pipeline.scheduler)
    if "ztsnr" in header.tensors and "rescale_betas_zero_snr" in inspect.signature(kind.__init__).parameters:
        change |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler = kind.from_config({**pipeline.scheduler.config, **change})
