"""A model's folder: here, downloaded from the hub, or made of a single file."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from aesthetic.errors import UserError
from aesthetic.untrusted import printable
from curate.hub import no_progress_bars
from curate.store.mirror import here, open_store
from train.models.single_file import convert_single_file

_TRAINING = ("checkpoints", "latents", "start", "vae-training", "samples", "evaluation", "logs", "tensorboard")
"""What lies in a model's folder beside the model."""


def model_folder(name: str | Path) -> Path:
    """The folder (or single file) that a name of a model means, whether there is one or not: of a URL, a copy of the
    model in it."""
    if found := re.fullmatch(r"(.+://.+)/(checkpoints/\d+)/pipeline/?", str(name)):  # train.json lies above it
        store = open_store(found[1])
        folder = store.root / found[2] / "pipeline"
        store.bring([store.root / "train.json", store.root / "data.json", *store.walk(folder)])
        return folder
    return here(str(name), _TRAINING)


def find_model_folder(name: str | Path) -> Path:
    """The folder of a model. One on the hub is downloaded into the hub's cache, where it is not there yet; one in a
    single file is made into a folder in ours."""
    folder = model_folder(name)
    if (folder / "model_index.json").is_file():
        return folder
    if folder.is_file():
        return convert_single_file(folder)
    if folder.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") != 1:  # so has a URL
        inner = sorted(folder.glob("checkpoints/*/pipeline")) if folder.is_dir() else []
        files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.ckpt")) if folder.is_dir() else []
        hint = " A folder with model_index.json is expected, or a hub id."
        if any("lora" in file.name for file in files):
            hint = f" It is a LoRA: give the model that it was trained on, and --lora {name}"
        if inner:
            hint = f" Did you mean {inner[-1]}?"
        elif files and "LoRA" not in hint:
            hint = f" Did you mean {files[0]}?"
        raise UserError(f"{name} holds no diffusers pipeline.{hint}")
    if folder.parent.is_dir():
        models = sorted(p.name for p in folder.parent.iterdir() if (p / "model_index.json").is_file())
        listed = ", ".join(printable(model, 60) for model in models[:5]) + (", ..." if len(models) > 5 else "")
        raise UserError(
            f"{name} is not there: {folder.parent} is a folder here, "
            + (f"with the models {listed}. " if models else "and holds no models. ")
            + f"Is a model of the hub meant? `hf download {name}` prints the folder to give"
        )
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()  # we say ourselves that the hub can't be reached
    try:
        with no_progress_bars("diffusers"):
            return Path(DiffusionPipeline.download(str(name), safety_checker=None))
    except (OSError, ValueError) as e:
        raise UserError(
            f"the model {name} is neither a folder here nor could it be had from the Hugging Face hub "
            f"({_why_not(e)}). Where the hub is blocked, download it elsewhere (`hf download {name}`) and "
            f"give the folder, or set HF_ENDPOINT to a mirror."
        ) from e


def _why_not(error: BaseException) -> str:
    """Why the hub gave nothing, from what its clients raised, one because of another."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    first = str(error).splitlines()[0]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (ConnectionError, TimeoutError, socket.gaierror)):
            return f"{constants.ENDPOINT} does not answer"
        cause = cause.__cause__ or cause.__context__
    return first
