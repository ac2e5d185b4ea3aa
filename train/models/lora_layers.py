"""Which layer of a model each tensor of a LoRA belongs to, by names and shapes.

Names are those of diffusers (new and old), of peft and of kohya's trainers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aesthetic.errors import UserError
from aesthetic.untrusted import first_three, printable
from curate.weight_files import WeightsHeader


@dataclass
class LoraLayer:
    """What a file holds for one layer of the model: names of its tensors, and the factor that they are scaled by."""

    down: str = ""  # A: (rank, inputs)
    up: str = ""  # B: (outputs, rank)
    magnitude: str = ""  # DoRA's (outputs,)
    alpha: str = ""
    rank: int = 0
    scale: float | None = None  # alpha / rank where that is known without reading `alpha`


LoraLayers = dict[str, dict[str, LoraLayer]]
"""Part -> module, by its name in the model -> what the file holds for it."""


_TENSOR = re.compile(
    r"(?P<module>.+?)"
    r"(?:"
    r"\.lora_(?P<peft>A|B)(?:\.(?P<adapter>[A-Za-z]\w*?))?\.weight"  # peft, diffusers
    r"|\.lora_(?P<kohya>down|up)\.weight"  # kohya
    r"|(?:\.lora|_lora|\.lora_linear_layer)\.(?P<old>down|up)\.weight"  # diffusers before peft
    r"|\.(?P<alpha>alpha)"
    r"|\.(?P<dora>dora_scale|lora_magnitude_vector(?:\.(?!weight)\w+)?(?:\.weight)?)"
    r")"
)
"""How a tensor's name ends."""

_PREFIXES = (
    ("lora_unet_", "unet"), ("lora_te1_", "text_encoder"), ("lora_te_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"), ("unet.", "unet"), ("text_encoder.", "text_encoder"), ("text_encoder_2.", ""),
    ("transformer.", ""),
)  # fmt: skip
"""How a tensor's name begins, and the part that it is of; "": of another kind of model."""

_OTHERS = (
    (("hada_", ), "LoHa (LyCORIS)"),
    (("lokr_", ), "LoKr (LyCORIS)"),
    (("lora_mid", ), "LoCon with a middle matrix (LyCORIS)"),
    (("oft_", "boft_"), "OFT"),
    ((".diff", ".diff_b", "on_input"), "whole layers or IA3 (LyCORIS)"),
    (("lora_te2_", "text_encoder_2."), "a LoRA of Stable Diffusion XL"),
    (("single_transformer_blocks", "single_blocks", "double_blocks", "transformer.", "lora_transformer_"),
     "a LoRA of a transformer, such as Flux or Stable Diffusion 3"),
    (("input_blocks", "output_blocks", "diffusion_model."), "a LoRA with the names of another layout of UNets"),
)  # fmt: skip
"""Words in names, and what they are a sign of."""


def _plain(name: str) -> str:
    """A module's name as kohya writes it, whose dots have become underscores."""
    return name.replace(".", "_").removeprefix("text_model_")


def match(
    header: WeightsHeader, layers: Mapping[str, Mapping[str, Sequence[int]]], name: str, model: str
) -> LoraLayers:
    """Find each tensor of a LoRA its layer.

    Args:
        layers: part -> module -> shape of its weight, (outputs, inputs) or (outputs, inputs, height, width).
        name, model: of the LoRA and of the model, for errors.

    Raises UserError where a tensor has no layer, or does not fit it: with counts, and the names of some.
    """
    projections = (("_q_proj", "_to_q"), ("_k_proj", "_to_k"), ("_v_proj", "_to_v"), ("_out_proj", "_to_out"))
    index: dict[str, dict[str, str]] = {part: {} for part in layers}  # part -> all names that a module goes by -> it
    for part, shapes in layers.items():
        for module in shapes:
            plain = _plain(module)
            index[part][plain] = module
            if part == "unet" and plain.endswith("_to_out_0"):  # of old diffusers
                index[part][plain.removesuffix("_0")] = module
            for end, old in projections:
                if part == "text_encoder" and plain.endswith(end):
                    index[part][plain.removesuffix(end) + old] = module

    found: LoraLayers = {part: {} for part in layers}
    unknown, twice = [], []
    for key in header.tensors:
        m = _TENSOR.fullmatch(key)
        place = _place(m["module"], index) if m else None
        if m is None or place is None:
            unknown.append(key)
            continue
        part, module = place
        matrices = found[part].setdefault(module, LoraLayer())
        side = m["peft"] or m["kohya"] or m["old"]
        what = {"A": "down", "B": "up"}.get(side, side) or ("alpha" if m["alpha"] else "magnitude")
        if getattr(matrices, what):
            twice.append(key)
        setattr(matrices, what, key)
    if unknown:
        signs = (kind for words, kind in _OTHERS if any(word in key for key in unknown for word in words))
        sign, of, some = next(signs, None), len(header.tensors), first_three(unknown, 100)
        if len(unknown) == of and not any(_TENSOR.fullmatch(key) for key in unknown) and sign is None:
            raise UserError(f"{name} is no LoRA: none of its {of:,} tensors is named so ({some})")
        raise UserError(
            f"the LoRA {name} was trained on another model than {model}, or in a form that is not read: "
            f"{len(unknown):,} of its {of:,} tensors belong to no layer of it ({some})"
            + (f". It looks like {sign}" if sign else "")
        )
    if twice:
        raise UserError(f"the LoRA {name} holds two for one layer ({first_three(twice, 100)}): give a file with one")
    for part, modules in found.items():
        for module, matrices in modules.items():
            _check_shapes(header, matrices, list(layers[part][module]), f"the LoRA {name}", module, model)
    if not any(found.values()):
        raise UserError(f"{name} is no LoRA: there is no tensor in it")
    return found


def _place(module: str, index: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    """(part, module of the model) of a module as a LoRA calls it."""
    parts: tuple[str, ...] = tuple(index)
    for prefix, part in (*((f"{part}.", part) for part in index), *_PREFIXES):
        if module.startswith(prefix):
            parts, module = ((part,) if part in index else ()), module.removeprefix(prefix)
            break
    module = _plain(module.removeprefix("base_model.model.").replace(".processor.", "."))  # the latter of old diffusers
    return next(((part, index[part][module]) for part in parts if module in index[part]), None)


def _check_shapes(
    header: WeightsHeader, matrices: LoraLayer, weight: list[int], lora: str, layer: str, model: str
) -> None:
    """The two matrices are there and fit the layer; notes their rank."""
    if not (matrices.down and matrices.up):
        only = matrices.down or matrices.up or matrices.magnitude or matrices.alpha
        raise UserError(f"{lora} is not whole: beside {printable(only, 100)} there is no other matrix for {layer}")
    down, up = header.tensors[matrices.down].shape, header.tensors[matrices.up].shape
    rank = down[0] if down else 0
    kernel = weight[2:]
    fits = (
        rank > 0
        and len(down) >= 2 and len(up) >= 2
        and up[:2] == [weight[0], rank] and math.prod(up[2:]) == 1
        and down[1] == weight[1] and ([*down[2:]] == kernel or math.prod(down[2:]) == math.prod(kernel) == 1)
    )  # fmt: skip
    if not fits:
        raise UserError(
            f"{lora} was trained on another model than {model}: {layer} is {_format_shape(weight)} there, which its "
            f"matrices {_format_shape(up)} and {_format_shape(down)} do not fit"
        )
    if matrices.magnitude:
        # one of each output, as in DoRA's paper and peft: LyCORIS has one of each input as well
        shape, outputs = header.tensors[matrices.magnitude].shape, weight[0]
        if shape not in ([outputs], [outputs, 1], [outputs, 1, 1, 1], [1, outputs, 1, 1]):
            raise UserError(
                f"{lora}: {printable(matrices.magnitude, 100)} has {_format_shape(shape)} numbers, and {layer} "
                f"{outputs} outputs"
            )
    if matrices.alpha and math.prod(header.tensors[matrices.alpha].shape) != 1:
        raise UserError(f"{lora}: {printable(matrices.alpha, 100)} is not one number")
    matrices.rank = rank


def _format_shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "1"
