"""LoRAs of anybody on a model: every tensor is found its layer, by names and shapes, or the file is refused.

Files of diffusers, of peft (adapter_model.safetensors) and of kohya's trainers are read, for UNet and text encoder,
with their alphas and with DoRA's magnitudes. What a layer becomes is what peft makes of it, as in diffusers:
W + weight * alpha / rank * B A.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from aesthetic.untrusted import check_regular, open_regular, parse_json, printable, read_json_file
from curate.weight_files import TensorEntry, WeightsHeader, not_numbers, read_header, read_tensor, weights_header
from train.models.abilities import STABLE_DIFFUSION
from train.models.files import model_folder
from train.models.info import ModelInfo
from train.models.lora_layers import LoraLayer, LoraLayers, match
from train.models.lora_names import renamed_lora
from train.models.others import DENOISERS
from train.models.release import LORA_FILE

if TYPE_CHECKING:
    import torch

LARGEST_WEIGHT = 100.0
"""Of a LoRA, with either sign: 1 is what it was trained for, and beyond 2 little is left of an image."""


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


# ----------------------------------------------------------------------------------------------- before the model loads


def check_lora(info: ModelInfo, lora: Lora) -> None:
    """Raise UserError where a file is no LoRA, is damaged, or is one of another model, before that is loaded.

    Of a model whose weights are not in safetensors this is told when it is loaded, by `add_loras`.
    """
    check_weight(lora)
    if lora.file.suffix != ".safetensors":
        raise UserError(f"{lora.file}: LoRAs are read from .safetensors alone, which can hold no program")
    check_regular(lora.file)
    header = read_header(lora.file)
    parts = _changeable(info.configs)
    _read_configs(lora.file, header, parts)
    headers = {part: weights_header(info.folder / part) for part in parts}
    if all(headers.values()):
        layers = {  # that a LoRA can change
            part: {
                name.removesuffix(".weight").removeprefix("text_model."): tensor.shape
                for name, tensor in (weights.tensors.items() if weights else ())
                if name.endswith(".weight") and len(tensor.shape) in (2, 4) and "_embedding.weight" not in name
            }
            for part, weights in headers.items()
        }
        _find_layers(header, layers, lora, info.name, info.abilities.text, info.configs.get("unet"))
    for name in not_numbers(lora.file, header.tensors):
        raise UserError(f"the LoRA {lora.path} is broken: {printable(name, 100)} holds values that are no numbers")


def _changeable(parts: Iterable[str]) -> tuple[str, ...]:
    """Of a model's parts those that a LoRA can change: what takes the noise away, and text encoders."""
    return tuple(part for part in parts if part in DENOISERS or part.startswith("text_encoder"))


def _find_layers(
    header: WeightsHeader,
    layers: Mapping[str, Mapping[str, Sequence[int]]],
    lora: Lora,
    model: str,
    kind: str,
    unet: Mapping[str, Any] | None,
) -> tuple[LoraLayers, dict[str, torch.Tensor] | None]:
    """Find each tensor of a LoRA its layer, and by what it is scaled; also the tensors, where diffusers renamed them.

    Args:
        kind: the pipeline's class.
        unet: the UNet's configuration, if there is one.
    """
    try:
        found = match(header, layers, str(lora.path), model)
        _set_scales(found, header, lora)
        return found, None
    except UserError:
        renamed = None if kind in STABLE_DIFFUSION else renamed_lora(lora.file, kind, unet)
        if renamed is None:
            raise
    tensors, alphas = renamed
    shapes = {**{name: list(t.shape) for name, t in tensors.items()}, **{name: [] for name in alphas}}
    found = match(
        WeightsHeader({name: TensorEntry("F32", shape, 0, 0) for name, shape in shapes.items()}, {}),
        layers, str(lora.path), model,
    )  # fmt: skip
    for layer in (layer for modules in found.values() for layer in modules.values()):
        layer.scale = alphas.get(layer.alpha, float(layer.rank)) / layer.rank
    return found, tensors


def check_weight(lora: Lora) -> None:
    """Raise UserError where a LoRA's weight is no number, or far from any that is used."""
    if not abs(lora.weight) <= LARGEST_WEIGHT:  # NaN too
        raise UserError(
            f"the LoRA {lora.path}: weight {lora.weight:g}: {-LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g} is read"
        )


@dataclass(frozen=True)
class _LoraConfig:
    """What a trainer wrote down beside the matrices of one part (peft's LoraConfig)."""

    alpha: float
    alphas: Mapping[str, float]  # by module, where it has its own
    root: bool  # rslora: divided by the rank's root


def _read_configs(file: Path, header: WeightsHeader, parts: Iterable[str]) -> dict[str, _LoraConfig]:
    """By part, out of the file's own metadata, as diffusers writes it, or of peft's adapter_config.json beside it."""
    beside = file.parent / "adapter_config.json"
    if (text := header.metadata.get("lora_adapter_metadata")) is not None:
        content, where = parse_json(text, f"{file}, its metadata"), f"{file}, its metadata"
    elif file.name == "adapter_model.safetensors" and beside.is_file():
        content, where = read_json_file(beside), str(beside)
    else:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{where}: a JSON object is expected")
    by_part = dict.fromkeys(parts, content)
    if text is not None:  # unet.lora_alpha, unet.peft_type, ...
        by_part = {part: {k.removeprefix(f"{part}."): v for k, v in content.items() if k.startswith(f"{part}.")}
                   for part in by_part}  # fmt: skip

    configs = {}
    for part, config in by_part.items():
        if not config:
            continue
        if (kind := config.get("peft_type", "LORA")) != "LORA":
            raise UserError(f"{where}: {printable(kind, 40)} is no LoRA")
        pattern = config.get("alpha_pattern") or {}
        if not isinstance(pattern, dict):
            raise UserError(f"{where}: alpha_pattern is no object")
        configs[part] = _LoraConfig(
            alpha=_number(config.get("lora_alpha", 8), where, "lora_alpha"),
            alphas={str(k).removeprefix("^"): _number(v, where, "alpha_pattern") for k, v in pattern.items()},
            root=config.get("use_rslora") is True,
        )
    return configs


def _number(value: Any, where: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
        raise UserError(f"{where}: {name} is {printable(repr(value), 40)}, not a number")
    return float(value)


def _set_scales(found: LoraLayers, header: WeightsHeader, lora: Lora) -> None:
    """Note by what the matrices are scaled, and read the alphas that are tensors. UserError where one can't be."""
    configs = _read_configs(lora.file, header, found)
    with open_regular(lora.file) as f:
        for part, modules in found.items():
            config = configs.get(part)
            for module, layer in modules.items():
                alpha: float = layer.rank
                if layer.alpha:
                    entry = header.tensors[layer.alpha]
                    values = read_tensor(f, entry)
                    if values is None:
                        raise UserError(f"{lora.file}: {printable(layer.alpha, 100)} is {entry.kind}, not a number")
                    alpha = float(values[0])
                elif config:
                    own = (a for name, a in config.alphas.items() if module.endswith(name))
                    alpha = next(own, config.alpha)
                if not math.isfinite(alpha) or alpha == 0:
                    raise UserError(
                        f"the LoRA {lora.path}: the alpha of {module} is {alpha:g}, with which its matrices change "
                        "nothing"
                    )
                layer.scale = alpha / (math.sqrt(layer.rank) if config and config.root else layer.rank)


# ----------------------------------------------------------------------------------------------------------- on a model


def add_loras(pipeline: Any, loras: Sequence[Lora], model: str = "the model") -> list[str]:
    """Lay LoRAs over a pipeline, all at once, each with its weight. Returns a note for each that changes
    nothing.

    Raises UserError where one does not fit.
    """
    from diffusers.utils import set_weights_and_activate_adapters
    from safetensors.torch import load_file
    from torch import nn

    notes: list[str] = []
    if not loras:
        return notes
    kind = type(pipeline).__name__
    there = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    parts: dict[str, Any] = {name: there[name] for name in _changeable(there)}
    layers: dict[str, dict[str, Sequence[int]]] = {
        name: {
            m: list(layer.weight.shape) for m, layer in part.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
        }
        for name, part in parts.items()
    }
    for number, lora in enumerate(loras):
        check_weight(lora)
        header = read_header(lora.file)
        unet = dict(parts["unet"].config) if "unet" in parts else None
        found, renamed = _find_layers(header, layers, lora, model, kind, unet)
        try:
            tensors = renamed or load_file(lora.file)
        except Exception as e:
            raise UserError(f"{lora.file} is no safetensors file, or a damaged one: {e}") from e
        if lora.weight == 0:
            notes.append(f"the LoRA {lora.path} has weight 0, and so changes nothing")
        elif not any(bool(tensors[m.up].any()) for modules in found.values() for m in modules.values()):
            notes.append(
                f"the LoRA {lora.path} changes nothing: its matrices are zero, as before the first training step"
            )
        for name, part in parts.items():
            if found[name]:
                dora = sum(1 for m in found[name].values() if m.magnitude)
                if dora not in (0, len(found[name])):
                    raise UserError(
                        f"the LoRA {lora.path} has DoRA's magnitudes for {dora} of {len(found[name])} layers of the "
                        f"{name}: for all or none of them it can be applied"
                    )
                _add(part, found[name], tensors, f"lora_{number}", layers[name])
    weights = {f"lora_{number}": lora.weight for number, lora in enumerate(loras)}
    for module in parts.values():
        # not pipeline.set_adapters, which fails where a UNet's levels have their own numbers of layers (`tiny` has)
        active = {name: weight for name, weight in weights.items() if name in getattr(module, "peft_config", {})}
        if active:
            set_weights_and_activate_adapters(module, list(active), list(active.values()))
    return notes


def _add(
    part: Any,
    found: Mapping[str, LoraLayer],
    tensors: Mapping[str, torch.Tensor],
    name: str,
    layers: Mapping[str, Sequence[int]],
) -> None:
    """One LoRA on one part, under a name; afterwards every number of it is where it belongs, or it was not added."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    like = next(part.parameters())
    state: dict[str, torch.Tensor] = {}
    for module, m in found.items():
        kernel = list(layers[module][2:])
        down, up = tensors[m.down], tensors[m.up]
        down = down.reshape(*down.shape[:2], *kernel)
        state[f"{module}.lora_A.weight"] = down.to(like)
        state[f"{module}.lora_B.weight"] = up.reshape(*up.shape[:2], *(1 for _ in kernel)).to(like)
        if m.magnitude:
            shape = (1, -1, 1, 1) if kernel else (-1,)
            state[f"{module}.lora_magnitude_vector.weight"] = tensors[m.magnitude].reshape(shape).to(like)
    ranks = {f"^{re.escape(module)}": m.rank for module, m in found.items()}
    alphas = {f"^{re.escape(module)}": (m.scale or 1.0) * m.rank for module, m in found.items()}
    rank, alpha = (Counter(of.values()).most_common(1)[0][0] for of in (ranks, alphas))
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(found), use_dora=any(m.magnitude for m in found.values()),
        rank_pattern={k: r for k, r in ranks.items() if r != rank},
        alpha_pattern={k: a for k, a in alphas.items() if a != alpha},
    )  # fmt: skip
    inject_adapter_in_model(config, part, adapter_name=name, state_dict=state)
    set_peft_model_state_dict(part, state, adapter_name=name)
    part.to(like)
    loaded = part.state_dict()
    for key, tensor in state.items():
        module, _, matrix = key.removesuffix(".weight").rpartition(".")
        copied = loaded.get(f"{module}.{matrix}.{name}.weight")
        if copied is None or not bool((copied.to(tensor) == tensor).all()):
            raise RuntimeError(f"{key} of a LoRA did not come to its layer")
        if not math.isclose(part.get_submodule(module).scaling[name], found[module].scale or 1.0, rel_tol=1e-6):
            raise RuntimeError(f"{key} of a LoRA is scaled otherwise than it says")


def parse_lora(text: str) -> Lora:
    """A LoRA as the command line names it: PATH or PATH:WEIGHT; a URL is as good as a path."""
    path, colon, weight = text.rpartition(":")
    if colon and not Path(text).exists():
        with contextlib.suppress(ValueError):
            return Lora(model_folder(path), float(weight))
    return Lora(model_folder(text))
