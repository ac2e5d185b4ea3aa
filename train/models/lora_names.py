"""LoRAs whose layers bear the names of other programs (Flux by Black Forest Labs, Stability's SDXL), by diffusers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from aesthetic.untrusted import printable
from train.models.abilities import pipeline_class

if TYPE_CHECKING:
    import torch


def renamed_lora(
    file: Path, kind: str, unet: Mapping[str, Any] | None
) -> tuple[dict[str, torch.Tensor], dict[str, float]] | None:
    """A file's tensors by diffusers' names, as the pipeline of this class would load them, and alphas by name.

    None where diffusers has nothing to rename, or does not know the names. `unet`: its configuration, where the model
    has one. Raises UserError where diffusers would leave some of the file out.
    """
    from safetensors.torch import load_file

    convert = getattr(pipeline_class(kind), "lora_state_dict", None)
    if convert is None:
        return None
    tensors = load_file(file)
    warned = _Warnings()
    log = logging.getLogger("diffusers")
    level, quiet = log.level, log.handlers
    log.handlers, log.propagate, were = [warned], False, log.propagate
    log.setLevel(logging.WARNING)
    try:
        more = {"unet_config": SimpleNamespace(**unet)} if unet else {}
        found: Any = convert(dict(tensors), **more)
    except Exception:  # whatever names that it does not know make of it
        return None
    finally:
        log.handlers, log.propagate = quiet, were
        log.setLevel(level)
    if warned.lines:
        raise UserError(f"{file}: diffusers would leave out some of this LoRA: {printable(warned.lines[0], 300)}")
    state, alphas = found if isinstance(found, tuple) else (found, None)
    if state.keys() == tensors.keys():
        return None
    return state, {name: float(alpha) for name, alpha in (alphas or {}).items()}


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
