"""Models in one .safetensors file, in the layout of Stable Diffusion's first trainers, as web UIs keep them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compvis import save_single_file
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from small_pipelines import WIDE, clip, clip_tokenizer, sdxl, unet, vae

from aesthetic.errors import UserError
from pipelines.cli import main
from train.evaluate.model import EvaluatedModel
from train.generate.files import read_facts
from train.generate.request import GenerationRequest
from train.generate.sampler import Sampler
from train.models.info import check_trainable, read_model_info


def sd() -> Any:
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=clip(), tokenizer=clip_tokenizer(), unet=unet(cross_attention_dim=WIDE),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sd/ and sd.safetensors, sdxl/ and sdxl.safetensors."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    for name, make in (
        ("sd", sd),
        ("sdxl", lambda: sdxl(second=32)),
    ):  # by their widths it tells the two encoders apart
        torch.manual_seed(0)
        pipeline = make()
        pipeline.save_pretrained(folder / name)
        save_single_file(pipeline, folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def mine(models: Path, tmp_path: Path) -> Path:
    """A copy of sd.safetensors that may be spoilt, and beside it sd/ without weights."""
    shutil.copytree(models / "sd", tmp_path / "sd", ignore=shutil.ignore_patterns("*.safetensors"))
    return Path(shutil.copy(models / "sd.safetensors", tmp_path / "sd.safetensors"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TASTEMAKER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield tmp_path / "cache"


def draw(model: Path) -> np.ndarray:
    (drawn,) = Sampler(model, blur=False).generate([GenerationRequest("a red disc", seed=7, steps=2)])
    return np.asarray(drawn.image)


def test_what_a_file_draws_is_what_its_folder_draws(models: Path, mine: Path, cache: Path) -> None:
    assert (draw(mine) == draw(models / "sd")).all()
    (made,) = (cache / "models").iterdir()
    before = made.stat().st_ctime_ns
    info = read_model_info(mine)  # as it was made
    assert (info.name, info.folder, made.stat().st_ctime_ns) == (str(mine), made, before)
    check_trainable(info, 32)
    assert EvaluatedModel.of(str(mine)).info.folder == made
    for part in ("unet", "vae", "text_encoder"):
        (a,), (b,) = ((f / part).glob("*.safetensors") for f in (made, models / "sd"))
        one, other = load_file(a), load_file(b)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.long
def test_stable_diffusion_xl_too(models: Path) -> None:
    assert (draw(models / "sdxl.safetensors") == draw(models / "sdxl")).all()


@pytest.mark.long
def test_the_command_draws_from_a_file_and_again(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["sample", str(mine), "a red disc", "--steps", "2", "--seed", "1", "--out", str(out)]) == 0
    assert read_facts(out / "000000.png")["model"]["name"] == str(mine)
    shutil.rmtree(tmp_path / "cache")
    assert main(["sample", "--again", str(out / "000000.png"), "--out", str(out)]) == 0
    said = "".join(capsys.readouterr())
    assert "bit for bit" in said and "its digest is another" not in said


def test_half_precision_stays_so_and_what_the_file_says_of_its_objective_is_kept(mine: Path, models: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(models / "sd", torch_dtype=torch.float16)
    empty = torch.empty(0, dtype=torch.float16)
    save_single_file(pipeline, mine, v_pred=empty, ztsnr=empty, betas=empty)
    info = read_model_info(mine)
    assert info.scheduler["prediction_type"] == "v_prediction" and info.scheduler["rescale_betas_zero_snr"]
    assert load_file(info.folder / "unet/diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == torch.float16
    save_single_file(pipeline, mine, {"modelspec.prediction_type": "epsilon"})
    again = read_model_info(mine)
    assert again.scheduler["prediction_type"] == "epsilon" and again.folder != info.folder
    assert not info.folder.exists()  # of what the file was


def test_a_file_without_a_configuration_says_which_and_where(mine: Path) -> None:
    shutil.rmtree(mine.with_suffix(""))
    with pytest.raises(
        UserError, match=r"stable-diffusion-v1-5/stable-diffusion-v1-5.*HF_HUB_OFFLINE.*--local-dir .*sd"
    ):
        read_model_info(mine)
    save_file({"decoder.conv_in.weight": torch.ones(1)}, mine)
    with pytest.raises(UserError, match="holds no model that the installed diffusers knows as a single file"):
        read_model_info(mine)


def test_files_that_are_not_the_model_of_the_folder_beside_are_refused(mine: Path, cache: Path) -> None:
    whole = load_file(mine)

    def refused(match: str, **change: torch.Tensor | None) -> None:
        tensors = {**whole, **{k.replace("__", "."): v for k, v in change.items()}}
        save_file({k: v for k, v in tensors.items() if v is not None}, mine)
        with pytest.raises(UserError, match=match):
            read_model_info(mine)
        assert not any(p.suffix != ".tmp" for p in (cache / "models").glob("*"))

    unet_, text = "model__diffusion_model__", "cond_stage_model__transformer__text_model__"
    refused("does not fit .*sd: it lacks weights that the configurations describe", **{f"{unet_}out__2__bias": None})
    refused("its UNet has .* tensors, and this describes", **{f"{unet_}input_blocks__9__0__op__bias": torch.ones(8)})
    refused("can't be read as the StableDiffusionPipeline", **{f"{unet_}out__0__bias": torch.ones(99)})
    refused("text_encoder/config.json: it lacks final_layer_norm", **{f"{text}final_layer_norm__bias": None})
    refused(
        "can't be read .*AutoencoderKL.*with weights, at",
        **{k.replace(".", "__"): None for k in whole if k.startswith("first_stage_model")},
    )
    refused("is a LoRA", a__lora_A__weight=torch.ones(1))


@pytest.mark.long
def test_an_autoencoder_that_is_not_in_the_file_is_taken_from_the_folder_beside(models: Path, mine: Path) -> None:
    save_file({k: v for k, v in load_file(mine).items() if not k.startswith("first_stage_model")}, mine)
    shutil.copytree(models / "sd/vae", mine.with_suffix("") / "vae", dirs_exist_ok=True)
    assert (draw(mine) == draw(models / "sd")).all()


def test_pickles_are_not_read(mine: Path) -> None:
    for name in ("sd.ckpt", "sd.pt"):
        mine.rename(mine.with_name(name))
        with pytest.raises(UserError, match="is a pickle, and to load one may run code"):
            read_model_info(mine.with_name(name))
        mine.with_name(name).rename(mine)
    index = mine.with_suffix("") / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "WanPipeline"}))
    with pytest.raises(UserError, match="WanPipeline, which draws no image from words"):
        read_model_info(mine)
