"""LoRAs of anybody: every tensor of a file changes its layer as it says, or the file is refused, also in part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from aesthetic.errors import UserError
from train.models.info import read_model_info
from train.models.lora import Lora, add_loras, check_lora
from train.models.unet import load_model, new_model

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
QUERY, OUT, CONV = f"{ATTENTION}.to_q", f"{ATTENTION}.to_out.0", "down_blocks.0.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"
UNET = {QUERY: (3, 32, 32), OUT: (2, 32, 32), CONV: (2, 16, 16)}  # rank, inputs, outputs

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model") / "discs"
    new_model("debug", ["a red disc", "a blue disc"] * 4).save_pretrained(folder)
    return folder


def pair(module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices for a layer: A (rank, inputs), B (outputs, rank)."""
    rank, inputs, outputs = UNET.get(module, (4, 32, 32))
    generator = torch.Generator().manual_seed(len(module))
    kernel = (3, 3) if module == CONV else ()
    a = torch.randn(rank, inputs, *kernel, generator=generator)
    return a, torch.randn(outputs, rank, *(1 for _ in kernel), generator=generator)


def written(name: Callable[[str, str], str], *modules: str, **more: float) -> Tensors:
    """Tensors of a file; `name` says how a layer's matrix A or B is called."""
    found = {}
    for module in modules or (QUERY, OUT, CONV, TEXT):
        a, b = pair(module)
        found |= {name(module, "A"): a, name(module, "B"): b}
        for what, value in more.items():
            found[name(module, what)] = torch.tensor(value)
    return found


def diffusers(module: str, side: str) -> str:
    return f"{'text_encoder' if module == TEXT else 'unet'}.{module}.lora_{side}.weight"


def kohya(module: str, what: str) -> str:
    part = "te_text_model" if module == TEXT else "unet"
    end = {"A": "lora_down.weight", "B": "lora_up.weight"}.get(what, what)
    return f"lora_{part}_{module.replace('.', '_')}.{end}"


def old(module: str, side: str) -> str:
    which = {"A": "down", "B": "up"}[side]
    if module == TEXT:
        return f"text_encoder.text_model.{module}.lora_linear_layer.{which}.weight"
    return f"unet.{module}.lora.{which}.weight"


def processors(module: str, side: str) -> str:
    parent, _, name = module.removesuffix(".0").rpartition(".")
    return f"{parent}.processor.{name}_lora.{ {'A': 'down', 'B': 'up'}[side] }.weight"


def peft(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


FORMS: dict[str, tuple[Tensors, float, dict[str, str]]] = {  # tensors, alpha (0: the rank), metadata
    "diffusers": (written(diffusers), 0, {}),
    "named": (written(lambda m, s: diffusers(m, s).replace(".weight", ".default_0.weight")), 0, {}),
    "old": (written(old), 0, {}),
    "processors": (written(processors, QUERY, OUT), 0, {}),
    "kohya": (written(kohya, alpha=1.5), 1.5, {}),
    "bare": (written(lambda m, s: f"{m}.lora_{s}.weight", QUERY, CONV), 0, {}),
    "half": ({k: v.half() for k, v in written(kohya, alpha=2.0).items()}, 2.0, {}),
    "said": (
        written(diffusers, QUERY, OUT), 5.0,
        {"lora_adapter_metadata": json.dumps({"unet.r": 3, "unet.lora_alpha": 5, "unet.target_modules": ["to_q"]})},
    ),
    "adapter_model": (written(peft, QUERY, OUT), 6.0, {}),
}  # fmt: skip


def test_every_tensor_changes_its_layer_by_what_it_says(model: Path, tmp_path: Path) -> None:
    loras = []
    for name, (tensors, _, metadata) in FORMS.items():
        save_file(tensors, tmp_path / f"{name}.safetensors", {"format": "pt", **metadata})
        loras.append(Lora(tmp_path / f"{name}.safetensors", 0.5))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 6}')
    about, pipeline = read_model_info(model), load_model(model)
    for lora in loras:
        check_lora(about, lora)
    assert add_loras(pipeline, loras) == []
    for number, (name, (tensors, alpha, _)) in enumerate(FORMS.items()):
        count = 0
        for part, modules in ((pipeline.unet, UNET), (pipeline.text_encoder, [TEXT])):
            for module in modules:
                layer = part.get_submodule(module)
                if f"lora_{number}" not in getattr(layer, "lora_A", {}):
                    continue
                a, b = pair(module)
                expected = (
                    0.5 * (alpha / len(a) if alpha else 1) * (b.flatten(1) @ a.flatten(1)).reshape(layer.weight.shape)
                )
                assert torch.allclose(layer.get_delta_weight(f"lora_{number}"), expected, atol=0.02), (name, module)
                count += 1
        assert count == sum(t.numel() > 1 for t in tensors.values()) // 2, name


def test_magnitudes_of_dora_are_applied(model: Path, tmp_path: Path) -> None:
    """W' = m (W + B A) / |W + B A|, the norm of each output (Liu et al. 2024, arXiv 2402.09353, equation 5)."""
    tensors = written(kohya, QUERY, alpha=3.0)
    tensors[kohya(QUERY, "dora_scale")] = torch.linspace(0.5, 2, 32)[:, None]
    save_file(tensors, tmp_path / "dora.safetensors")
    pipeline = load_model(model)
    weight = pipeline.unet.get_submodule(QUERY).weight.detach().clone()
    add_loras(pipeline, [Lora(tmp_path / "dora.safetensors")])
    a, b = pair(QUERY)
    changed = weight + b @ a
    expected = torch.linspace(0.5, 2, 32)[:, None] * changed / changed.norm(dim=1, keepdim=True)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(pipeline.unet.get_submodule(QUERY)(x), x @ expected.T, atol=1e-4)


def also(more: Tensors) -> Tensors:
    return written(diffusers) | more


def without(end: str) -> Tensors:
    return {k: v for k, v in written(kohya, QUERY, alpha=1.0).items() if not k.endswith(end)}


ONE = torch.ones(4, 32)
REFUSED: dict[str, tuple[Tensors, str]] = {
    "flux": (written(lambda m, s: f"transformer.single_{m}.lora_{s}.weight", QUERY),
             r"2 of its 2 tensors belong to no layer of it \(transformer.single.*looks like a LoRA of a transformer"),
    "in part": (also({"unet.up_blocks.7.attn.to_q.lora_A.weight": ONE}), r"1 of its 9 tensors .*up_blocks\.7"),
    "sdxl": ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": ONE}, "Stable Diffusion XL"),
    "loha": ({f"lora_unet_{QUERY.replace('.', '_')}.hada_w1_a": ONE}, "looks like LoHa"),
    "lokr": ({f"lora_unet_{QUERY.replace('.', '_')}.lokr_w1": ONE}, "looks like LoKr"),
    "mid": (written(kohya, CONV) | {kohya(CONV, "lora_mid.weight"): ONE}, "1 of its 3 tensors .*middle matrix"),
    "bias": (also({f"unet.{QUERY}.lora_B.bias": torch.ones(32)}), "1 of its 9 tensors"),
    "no up": (without("up.weight"), "is not whole: beside .* there is no other matrix for down_blocks"),
    "only alpha": ({kohya(QUERY, "alpha"): torch.tensor(1.0)}, "is not whole"),
    "another rank": (also({diffusers(QUERY, "B"): torch.ones(32, 5)}), r"to_q is 32 x 32 there, .* 32 x 5 and 3 x 32"),
    "wider": (also({diffusers(QUERY, "A"): torch.ones(3, 768)}), "trained on another model than .*do not fit"),
    "twice": (also({f"unet.{QUERY}.lora_A.default_1.weight": pair(QUERY)[0]}), "holds two for one layer"),
    "alpha 0": (written(kohya, QUERY, alpha=0.0), "the alpha of .* is 0, with which its matrices change nothing"),
    "alpha nan": (written(kohya, QUERY, alpha=float("nan")), "the alpha of .* is nan"),
    "nan": (also({diffusers(QUERY, "B"): torch.full((32, 3), float("nan"))}), r"lora_B\.weight holds values that"),
    "half nan": (also({diffusers(QUERY, "B"): torch.full((32, 3), torch.inf).half()}), "holds values that are no num"),
    "bf16 nan": (also({diffusers(OUT, "B"): torch.full((32, 2), torch.inf).bfloat16()}), "holds values that are no"),
    "dora of inputs": (written(kohya, CONV) | {kohya(CONV, "dora_scale"): torch.ones(1, 16)}, "dora_scale has 1 x 16"),
    "words": ({"embeddings": ONE}, "is no LoRA: none of its 1 tensors is named so"),
    "nothing": ({}, "there is no tensor in it"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_of_which_a_part_would_be_lost_is_refused_before_the_model_is_loaded(
    model: Path, tmp_path: Path, name: str
) -> None:
    tensors, message = REFUSED[name]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        check_lora(read_model_info(model), Lora(tmp_path / "x.safetensors"))


def test_headers_that_lie_and_settings_that_are_none(model: Path, tmp_path: Path) -> None:
    about, file = read_model_info(model), tmp_path / "adapter_model.safetensors"
    save_file(written(peft, QUERY), file)
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")

    def header(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + whole[8 + size :]

    for data, message in (
        (whole[:-1], "is cut"),
        (whole[:20], "no safetensors file, or a damaged one"),
        (b"", "no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a pointer of Git LFS"),
        ((1 << 60).to_bytes(8, "little") + whole[8:], "no safetensors file"),
        (header(b"[" * 100_000), "its header: not read: it is nested too deep"),
        (header(b'{"a.lora_A.weight": 3}'), "what can't be"),
        (header(b'{"a.lora_A.weight": {"dtype": "F32", "shape": [1e3], "data_offsets": [0, 4000]}}'), "what can't be"),
        (header(b'{"a.lora_A.weight": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}'), "what can't be"),
        (header(b"[]"), "header is no object"),
    ):
        file.write_bytes(data)
        with pytest.raises(UserError, match=message):
            check_lora(about, Lora(file))
    file.write_bytes(whole)
    for text, message in (("[" * 99_999, "too deep"), ('{"lora_alpha": "x"}', "lora_alpha is 'x'"), ("3", "object"),
                          ('{"peft_type": "LOHA"}', "LOHA is no LoRA"), ('{"alpha_pattern": [1]}', "alpha_pattern"),
                          ("9" * 5000, "adapter_config.json: not JSON")):  # fmt: skip
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            check_lora(about, Lora(file))
    (tmp_path / "adapter_config.json").unlink()
    for weight in (float("nan"), float("inf"), 1e9):
        with pytest.raises(UserError, match="-100 to 100 is read"):
            check_lora(about, Lora(file, weight))


def test_what_changes_nothing_is_said(model: Path, tmp_path: Path) -> None:
    save_file(written(diffusers, QUERY), tmp_path / "a.safetensors")
    zero = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in written(diffusers, QUERY).items()}
    save_file(zero, tmp_path / "zero.safetensors")
    loras: list[Any] = [Lora(tmp_path / "a.safetensors", 0.0), Lora(tmp_path / "zero.safetensors")]
    said = add_loras(load_model(model), loras)
    assert "a.safetensors has weight 0" in said[0] and "zero.safetensors changes nothing" in said[1]
