"""Which model is evaluated, and what is known of its training. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from aesthetic.errors import UserError
from curate.store.files import read_json, sha256_file
from train.models.files import model_folder
from train.models.info import ModelInfo, read_model_info, training_record
from train.models.lora import Lora, check_lora
from train.models.release import LORA_FILE


@dataclass(frozen=True)
class EvaluatedModel:
    """A model, or one with its LoRA over it, and what is known of its training."""

    name: str
    info: ModelInfo
    loras: tuple[Lora, ...]
    folder: Path  # where its train.json is looked for

    @staticmethod
    def of(name: str) -> EvaluatedModel:
        """A model's folder or hub id, or the folder of a LoRA that says to which model it belongs. Raises UserError."""
        folder = model_folder(name)
        if not (folder / LORA_FILE).is_file() or (folder / "model_index.json").is_file():
            info = read_model_info(name)
            return EvaluatedModel(name, info, (), info.folder)
        base = ((read_json(folder / "train.json") or {}).get("settings") or {}).get("from")
        if not base:
            raise UserError(f"{folder} is a LoRA without a train.json that names the model it belongs to")
        lora, info = Lora(folder), read_model_info(base)
        check_lora(info, lora)
        return EvaluatedModel(name, info, (lora,), folder)

    @cached_property
    def digest(self) -> str:
        """The sha256 of the model; with a LoRA, both."""
        return "+".join([self.info.digest, *(sha256_file(lora.file) for lora in self.loras)])

    @cached_property
    def record(self) -> dict[str, Any]:
        """Its train.json; {} where there is none."""
        found = training_record(self.folder)
        return found[1] if found else {}
