"""LoRAs of anybody on a model: checked against its configuration first, then laid over it by diffusers."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate.store import UserError
from train.about import About, shapes_of
from train.release import LORA_FILE

_OURS = re.compile(r"unet\.(?P<module>.+)\.(?P<side>lora\.down|lora\.up|lora_A|lora_B)\.weight")
"""Names in diffusers' and peft's format. A matrix "down" or "A" is (rank, inputs), "up" or "B" (outputs, rank)."""


@dataclass(frozen=True)
class Lora:
    """Low-rank matrices to lay over a model: a file of safetensors, or the folder of one."""

    path: Path
    weight: float = 1.0

    @property
    def file(self) -> Path:
        """The file of weights. Raises UserError where there is none, or more than one."""
        if self.path.is_file():
            return self.path
        if not self.path.is_dir():
            raise UserError(f"the LoRA {self.path} is not there")
        files = sorted(self.path.glob("*.safetensors"))
        named = self.path / LORA_FILE
        if not files:
            raise UserError(f"{self.path} holds no LoRA: a file {LORA_FILE} is expected")
        if len(files) > 1 and named not in files:
            raise UserError(f"{self.path} holds several files ({files[0].name}, {files[1].name}, ...): name one")
        return named if named in files else files[0]


def check_lora(about: About, lora: Lora) -> None:
    """Raise UserError where a file is no LoRA, or, as far as headers tell, one of another model.

    The names of other formats (kohya's, for one) are known to diffusers alone, which converts them when they are
    loaded.
    """
    if lora.file.suffix != ".safetensors":
        raise UserError(f"{lora.file}: LoRAs are read from .safetensors alone, which can hold no program")
    try:
        shapes = shapes_of(lora.file)
    except (ValueError, KeyError, OverflowError) as e:
        raise UserError(f"{lora.file} is no safetensors file, or a damaged one") from e
    if not any("lora" in name for name in shapes):
        raise UserError(f"{lora.file} is no LoRA: no tensor in it is named so")
    model = shapes_of(about.folder / "unet")
    for name, shape in shapes.items() if model else ():
        if found := _OURS.fullmatch(name):
            module, down = found["module"], found["side"] in ("lora.down", "lora_A")
            whole = model.get(f"{module}.weight")
            if whole is None or whole[1 if down else 0] != shape[1 if down else 0]:
                there = "has no such part" if whole is None else f"is {whole} there"
                raise UserError(
                    f"the LoRA {lora.path} was trained on another model than {about.name}: {module} {there}"
                )


def add_loras(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Lay LoRAs over a pipeline, all at once, each with its weight. UserError where diffusers can't."""
    from diffusers.utils import set_weights_and_activate_adapters

    for number, lora in enumerate(loras):
        try:
            pipeline.load_lora_weights(lora.file.parent, weight_name=lora.file.name, adapter_name=f"lora_{number}")
        except (ValueError, RuntimeError, KeyError) as e:
            raise UserError(f"the LoRA {lora.path} does not fit the model: {str(e).splitlines()[0]}") from e
    weights = {f"lora_{number}": lora.weight for number, lora in enumerate(loras)}
    for module in (pipeline.unet, pipeline.text_encoder):
        # not pipeline.set_adapters, which fails where a UNet's levels have their own numbers of layers (`tiny` has)
        there = {name: weight for name, weight in weights.items() if name in getattr(module, "peft_config", {})}
        if there:
            set_weights_and_activate_adapters(module, list(there), list(there.values()))


def parse_lora(text: str) -> Lora:
    """A LoRA as the command line names it: PATH or PATH:WEIGHT."""
    path, colon, weight = text.rpartition(":")
    if colon and not Path(text).exists():
        with contextlib.suppress(ValueError):
            return Lora(Path(path), float(weight))
    return Lora(Path(text))
