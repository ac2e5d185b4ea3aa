"""LoRAs on any family: what diffusers' own loaders make of them, in the names of several programs, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForText2Image
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from aesthetic.errors import UserError
from tests.small_pipelines import save_pipeline
from tests.test_sample_families import SIZE, noise, same
from train.generate.request import GenerationRequest
from train.generate.sampler import Sampler
from train.models.info import read_model_info
from train.models.lora import Lora, check_lora

REQUEST = GenerationRequest("a red disc", seed=7, steps=2, **SIZE)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def with_lora(family: str, folder: Path, *more: str) -> tuple[Path, Path]:
    """(model, LoRA of random matrices in diffusers' format); `more`: text encoders that it changes too."""
    model = save_pipeline(family, folder / family)
    pipeline: Any = AutoPipelineForText2Image.from_pretrained(model)
    denoiser = "unet" if hasattr(pipeline, "unet") else "transformer"
    saved = {}
    for name in (denoiser, *more):
        part = getattr(pipeline, name)
        part.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS if name == denoiser else ["q_proj"]))
        with torch.no_grad():
            for number, p in enumerate(p for p in part.parameters() if p.requires_grad):
                p.copy_(0.5 * torch.randn(p.shape, generator=noise(number)))
        saved[f"{name}_lora_layers"] = get_peft_model_state_dict(part)
        saved[f"{name}_lora_adapter_metadata"] = part.peft_config["default"].to_dict()
    pipeline.save_lora_weights(folder / "lora", **saved)
    return model, folder / "lora"


def draw(model: Path, *loras: Lora) -> Image.Image:
    (drawn,) = Sampler(model, loras=loras, blur=False).generate([REQUEST])
    return drawn.image


def theirs(model: Path, lora: Path, weight: float = 1.0) -> Image.Image:
    pipeline: Any = AutoPipelineForText2Image.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(lora, adapter_name="mine")
    pipeline.set_adapters("mine", weight)
    image: Image.Image = pipeline("a red disc", generator=noise(7), num_inference_steps=2, **SIZE).images[0]
    return image


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("z-image", ()),
        pytest.param("sdxl", ("text_encoder", "text_encoder_2"), marks=pytest.mark.long),
        pytest.param("sd3", ("text_encoder",), marks=pytest.mark.long),
        pytest.param("flux", (), marks=pytest.mark.long),
        pytest.param("lumina2", (), marks=pytest.mark.long),
        pytest.param("sana", (), marks=pytest.mark.long),
    ],
)
def test_a_lora_is_what_diffusers_makes_of_it(tmp_path: Path, family: str, more: tuple[str, ...]) -> None:
    model, lora = with_lora(family, tmp_path, *more)
    check_lora(read_model_info(model), Lora(lora))
    with_it = draw(model, Lora(lora, 0.5))
    if family == "sana":  # whose bare call rounds sizes to those of its training
        assert not same(with_it, draw(model))
        return
    assert same(with_it, theirs(model, lora, 0.5)) and not same(with_it, draw(model))


def renamed(lora: Path, to: Path, names: dict[str, str], **more: torch.Tensor) -> Path:
    """A file whose tensors bear other names; an alpha of 4 for each layer of two."""
    tensors = {}
    for name, tensor in load_file(lora / "pytorch_lora_weights.safetensors").items():
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
        tensors[name.replace("lora_A.weight", "alpha")] = torch.tensor(4.0)
    save_file({**tensors, **more}, to)
    return to


@pytest.mark.long
def test_names_of_other_programs_mean_the_same(tmp_path: Path) -> None:
    model, lora = with_lora("z-image", tmp_path)
    comfy = renamed(lora, tmp_path / "comfy.safetensors", {"transformer.": "diffusion_model."})
    check_lora(read_model_info(model), Lora(comfy))
    assert same(draw(model, Lora(comfy)), draw(model, Lora(lora)))


@pytest.mark.long
def test_kohyas_names_mean_the_same_on_sdxl(tmp_path: Path) -> None:
    model, lora = with_lora("sdxl", tmp_path, "text_encoder", "text_encoder_2")
    tensors = {}
    for name, tensor in load_file(lora / "pytorch_lora_weights.safetensors").items():
        module, matrix = name.split(".lora")
        part, module = module.split(".", 1)
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[part]
        down = "down" in matrix or "_A" in matrix
        key = prefix + module.replace(".", "_")
        tensors[f"{key}.lora_{'down' if down else 'up'}.weight"] = tensor
        tensors[f"{key}.alpha"] = torch.tensor(4.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    check_lora(read_model_info(model), Lora(tmp_path / "kohya.safetensors"))
    assert same(draw(model, Lora(tmp_path / "kohya.safetensors")), draw(model, Lora(lora)))


def test_a_tensor_without_a_layer_is_refused(tmp_path: Path) -> None:
    model, lora = with_lora("z-image", tmp_path)
    info, odd = read_model_info(model), tmp_path / "odd.safetensors"
    for name in (
        "transformer.layers.9.attention.to_q.lora_A.weight",
        "diffusion_model.layers.9.attention.to_q.lora_A.weight",
    ):
        renamed(lora, odd, {"transformer.": name.split(".")[0] + "."}, **{name: torch.zeros(2, 32)})
        with pytest.raises(UserError, match=r"belong to no layer of it|would leave out"):
            check_lora(info, Lora(odd))
    renamed(lora, odd, {"lora_A.weight": "hada_w1_a"})
    with pytest.raises(UserError, match="belong to no layer of it"):
        check_lora(info, Lora(odd))
