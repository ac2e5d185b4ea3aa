"""Models of others: whatever their files say, the outcome is an error that names the file, or an image that is one."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from aesthetic.errors import UserError
from curate.weight_files import weight_variant
from pipelines.cli import main
from train.generate.files import read_facts
from train.generate.request import GenerationRequest, fitting_size, foreign_syntax
from train.generate.sampler import NoImage, Sampler
from train.models.info import ModelInfo, check_trainable, read_model_info
from train.models.presets import PRESETS
from train.models.unet import load_model, new_model

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model") / "discs"
    preset = replace(PRESETS["debug"], vae=(16, 16), factor=2, latents=4, pooled=False)
    new_model(preset, ["a red disc", "a blue disc"] * 4, "eps").save_pretrained(folder)
    return folder


@pytest.fixture
def mine(model: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(model, tmp_path / "m"))


def draw(folder: Path) -> np.ndarray:
    return np.asarray(next(Sampler(folder).generate([GenerationRequest("a red disc", seed=1, steps=2)])).image, int)


def changed(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# ---------------------------------------------------------------------------------------------------------- weights


def test_weights_of_one_precision_alone_are_found(model: Path, mine: Path) -> None:
    whole = load_model(model)
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        file = mine / part / f"{stem}.safetensors"
        save_file({k: v.half() for k, v in load_file(file).items()}, file.with_name(f"{stem}.fp16.safetensors"))
        save_file({k: v * 0 for k, v in load_file(file).items()}, file.with_name(f"{stem}.non_ema.safetensors"))
        file.unlink()
    assert [weight_variant(mine / p) for p in ("unet", "vae", "text_encoder")] == ["fp16"] * 3
    half = load_model(mine)
    for part in ("unet", "vae", "text_encoder"):
        for (name, a), (_, b) in zip(
            getattr(whole, part).named_parameters(), getattr(half, part).named_parameters(), strict=True
        ):
            assert torch.equal(a.half().float(), b), name
    assert read_model_info(mine).digest != read_model_info(model).digest


def spoilt(mine: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(mine / UNET)
    change(tensors)
    save_file(tensors, mine / UNET)


WEIGHTS: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = [
    (
        lambda t: t["conv_out.bias"].fill_(math.nan),
        "unet/diff.*the weights conv_out.bias hold values that are no numbers",
    ),
    (lambda t: t["conv_in.weight"].view(-1)[3:4].fill_(math.inf), "conv_in.weight hold values that are no numbers"),
    (lambda t: t.pop("conv_in.weight"), "does not fit the weights in .*: these lack conv_in.weight"),
    (lambda t: t.update(other=torch.zeros(3)), "these hold, beside what is used, other"),
    (lambda t: t.update({"conv_in.weight": torch.zeros(3)}), r"unet/config\.json: no UNet2DConditionModel can be made"),
]


@pytest.mark.parametrize(("change", "message"), WEIGHTS)
def test_weights_that_are_no_numbers_or_not_the_models_are_named(
    mine: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    spoilt(mine, change)
    with pytest.raises(UserError, match=message):
        load_model(mine)


def test_files_that_are_no_weights_are_told_without_loading(mine: Path) -> None:
    data = (mine / UNET).read_bytes()
    for spoilt, message in (
        (data[:-1], "is cut"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html>" * 9, "no safetensors file"),
    ):
        (mine / UNET).write_bytes(spoilt)
        with pytest.raises(UserError, match=message):
            read_model_info(mine)


def test_an_image_of_values_that_are_no_numbers_is_not_drawn(model: Path) -> None:
    sampler = Sampler(model)
    sampler._text.unet.conv_out.weight.data[:] = 3e38
    with pytest.raises(NoImage, match="computed values that are no numbers"):
        list(sampler.generate([GenerationRequest("a red disc", seed=1, steps=2)]))


# --------------------------------------------------------------------------------------------------- configurations

TEXTS = ["", "{", "[]", "null", "9" * 5000, "[" * 99_999, '{"a":' * 9999, "\ufeff{}", "{}"]
VALUES: list[Any] = [
    None, -1, 0, 1, 3, 10**9, 10**30, 1.5, math.nan, math.inf, "4", "", [], [1], [[1]], {}, True, "Foo", [10**6] * 3,
]  # fmt: skip
FILES = [
    "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
    "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json",
]  # fmt: skip


def mutations(file: Path) -> Iterator[str]:
    """Texts of a JSON file that it should not have."""
    yield from TEXTS
    whole = json.loads(file.read_text())
    for key in whole:
        yield json.dumps({k: v for k, v in whole.items() if k != key})
        yield from (json.dumps({**whole, key: value}) for value in VALUES)


def outcome(folder: Path, file: str, then: Callable[[Path], Any]) -> str:
    """Nothing where it works, else what is wrong; what is not a UserError is a failure."""
    try:
        then(folder)
    except UserError as e:
        assert str(folder) in str(e) and ("\n" not in str(e)), (file, str(e))
        return str(e)
    return ""


@pytest.mark.parametrize("file", FILES)
def test_nonsense_in_a_configuration_is_told_by_its_file_before_anything_is_loaded(mine: Path, file: str) -> None:
    whole = (mine / file).read_text()
    found = []
    for text in mutations(mine / file):
        (mine / file).write_text(text)
        found.append(outcome(mine, file, read_model_info))
    (mine / file).write_text(whole)
    assert all(file in message for message in found[: len(TEXTS) - 2])  # what is no JSON, or nested too deep
    read_model_info(mine)


@pytest.mark.long
@pytest.mark.parametrize("file", FILES)
def test_whatever_a_configuration_says_there_is_an_image_or_an_error_that_names_the_file(mine: Path, file: str) -> None:
    for text in mutations(mine / file):
        (mine / file).write_text(text)
        outcome(mine, file, draw)


def test_parts_that_do_not_fit_each_other(mine: Path) -> None:
    for file, values, message in (
        ("unet/config.json", {"in_channels": 8}, "8 channels in and 4 out does not fit the autoencoder"),
        ("unet/config.json", {"cross_attention_dim": 768}, "cross_attention_dim is 768, and .* hidden_size 32"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type .*'text_time'"),
        (
            "tokenizer/tokenizer_config.json",
            {"model_max_length": 77},
            "77 is more than the 16 that the text encoder reads",
        ),
        ("model_index.json", {"scheduler": ["os", "system"]}, "its scheduler is a system, not one of DDIM"),
        (
            "model_index.json",
            {"vae": ["diffusers", "AutoencoderTiny"]},
            "its vae is a AutoencoderTiny, not AutoencoderKL",
        ),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLPipeline"},
            "text_encoder_2 is missing, of which a StableDiffusionXLPipeline is made",
        ),
    ):
        whole = (mine / file).read_text()
        changed(mine / file, **values)
        with pytest.raises(UserError, match=message):
            read_model_info(mine)
        (mine / file).write_text(whole)
    changed(mine / "unet/config.json", norm_num_groups=5)  # what diffusers alone knows
    with pytest.raises(UserError, match=r"unet/config\.json: no UNet2DConditionModel can be made"):
        load_model(mine)


def test_what_can_be_trained_further_is_told_without_the_weights(model: Path, mine: Path) -> None:
    check_trainable(read_model_info(model), None)
    check_trainable(read_model_info(model), 32)
    with pytest.raises(UserError, match=r"size 18 does not fit this model: sides are multiples of 4\. 16 would do"):
        check_trainable(read_model_info(model), 18)
    changed(mine / "scheduler/scheduler_config.json", prediction_type="sample")
    with pytest.raises(UserError, match=r"scheduler_config\.json: the model predicts 'sample' over 1000 times"):
        check_trainable(read_model_info(mine), None)
    changed(mine / "unet/config.json", in_channels=9)
    with pytest.raises(UserError, match="predicts 'sample'"):
        check_trainable(read_model_info(mine), None)


def test_what_is_no_folder_of_a_model_says_what_to_do(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "v1.safetensors").write_text("x")
    with pytest.raises(UserError, match=r"v1\.safetensors is no safetensors file"):
        read_model_info(tmp_path / "v1.safetensors")
    (tmp_path / "folder").mkdir()
    (tmp_path / "v1.safetensors").rename(tmp_path / "folder" / "v1.safetensors")
    with pytest.raises(UserError, match=r"Did you mean .*v1\.safetensors\?"):
        read_model_info(tmp_path / "folder")
    save_file({"a.lora_A.weight": torch.ones(1)}, tmp_path / "style.safetensors")
    with pytest.raises(UserError, match=r"is a LoRA: give the model that it was trained on, and --lora"):
        read_model_info(tmp_path / "style.safetensors")
    (mine / "train.json").write_text('{"settings": {"lr": "fast"}}')
    with pytest.raises(UserError, match=r"train\.json: settings"):
        read_model_info(mine)


# ------------------------------------------------------------------------------------------------- images, prompts


def about(size: int) -> ModelInfo:
    vae = {"block_out_channels": [1] * 4}
    return ModelInfo("m", Path("m"), {"unet": {"sample_size": size // 8}, "vae": vae}, {}, None)


def test_an_image_to_begin_with_is_brought_to_a_size_that_the_model_draws(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fitting_size(about(512), (500, 333)) == (624, 416)
    assert fitting_size(about(512), (333, 500)) == (416, 624)
    assert fitting_size(about(512), (640, 480)) == (640, 480)  # as it is
    assert fitting_size(about(512), (9, 4000)) == (24, 10792)
    for name, mode in (("photo.png", "RGB"), ("mask.png", "L")):
        Image.new(mode, (50, 33), "white").save(tmp_path / name)
    words = ["sample", str(model), "a", "--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png")]
    assert main([*words, "--steps", "1", "--seed", "1", "--out", str(tmp_path / "o")]) == 0
    assert "--image and --mask are scaled and cut from 50 x 33 to 16 x 16" in capsys.readouterr().err
    assert Image.open(tmp_path / "o" / "000000.png").size == (16, 16)


def test_the_syntax_of_other_programs_is_noticed() -> None:
    said = foreign_syntax(["a (red:1.4) [fox] <lora:style:0.8>", "(worst quality:2)"])
    assert "(red:1.4), [fox], <lora:style:0.8>, ... would weigh" in said and "--lora PATH:WEIGHT" in said
    for text in ("((very)) red", "a {red|blue} fox", "one BREAK two", "(red)1.3", "embedding:bad"):
        assert foreign_syntax([text]), text
    for text in ("a fox (vulpes) at 12:30", "C++", "a break, and a fox", "ratio 16:9", "(a, b)", "50% off: now"):
        assert not foreign_syntax([text]), text
    foreign_syntax(["(" * 10_000, "[" * 10_000, "(a" * 5000, "<lora:" * 1600, "{|" * 5000])  # in no time


def test_facts_of_a_foreign_png_are_told(tmp_path: Path) -> None:
    good = {
        "prompt": "a", "negative": "", "seed": 1, "steps": 2, "guidance": 3, "width": 16, "height": 16, "image": None,
        "scheduler": "DDIMScheduler", "strength": None, "upscale": 1, "mask": None, "loras": [],
        "model": {"name": "m", "sha256": "0"}, "nsfw": {"blurred": False},
    }  # fmt: skip

    def png(text: str) -> Path:
        info = PngImagePlugin.PngInfo()
        info.add_text("tastemaker", text)
        Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
        return tmp_path / "x.png"

    read_facts(png(json.dumps(good)))
    for text, message in (
        ('{"seed": %s}' % ("9" * 5000), "its text chunk 'tastemaker': not JSON"),
        ("[" * 99_999, "too deep"),
        ("[]", "object is expected"),
        ("{}", "prompt: field required"),
        *((json.dumps({**good, **odd}), why) for odd, why in (
            ({"seed": "7"}, "seed"), ({"model": "m"}, "model"), ({"loras": [{"name": 3}]}, r"loras\.0"),
            ({"image": 3}, "image"), ({"nsfw": {}}, "nsfw.blurred"), ({"loras": "abc"}, "loras"),
        )),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            read_facts(png(text))
    for odd in (
        {"width": 10**12, "height": 8},
        {"steps": 10**9},
        {"guidance": 1e308},
        {"prompt": "\ud800"},
        {"seed": -1},
    ):
        with pytest.raises(UserError):
            GenerationRequest(
                **{k: {**good, **odd}[k] for k in ("prompt", "seed", "steps", "guidance", "width", "height")}
            )


def test_refusals_start_neither_torch_nor_diffusers(model: Path, tmp_path: Path) -> None:
    """All in one process: what is loaded once stays."""
    (tmp_path / "pics").mkdir()
    (tmp_path / "empty.txt").write_text("")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    m, p = str(model), str(tmp_path)
    refused = [
        ["sample", m], ["sample", m, "a", "--steps", "0"], ["sample", m, "a", "--width", "9", "--height", "16"],
        ["sample", m, "a", "--image", f"{p}/none.png"], ["sample", m, "a", "--scheduler", "Eular"],
        ["sample", m, "--prompts", f"{p}/empty.txt"], ["sample", m, "a", "--lora", f"{p}/none"],
        ["sample", m, "a", "--image", f"{p}/a.png", "--strength", "2"], ["sample", "--again", f"{p}/a.png"],
        ["sample", m, "a", "--out", f"{p}/a.png"], ["sample", f"{p}/none", "a"], ["sample", m, "a", "--seed", "-1"],
        ["train", f"{p}/pics", "--from", f"{p}/none", "--out", f"{p}/o"],
        ["train", f"{p}/pics", "--from", m, "--size", "17", "--out", f"{p}/o"],
        ["train", f"{p}/none", "--from", m, "--out", f"{p}/o"],
        ["train", f"{p}/pics", "--preset", "big", "--out", f"{p}/o"],
        ["train", f"{p}/pics", "--objective", "x", "--out", f"{p}/o"],
        ["train", f"{p}/pics", "--preset", "tiny", "--size", "17", "--out", f"{p}/o"],
        ["evaluate", f"{p}/none", f"{p}/pics", "--out", f"{p}/o"], ["evaluate", m, f"{p}/none", "--out", f"{p}/o"],
        ["evaluate", m, f"{p}/pics", "--out", f"{p}/o", "--prompts", "3"],
        ["serve", f"{p}/none"], ["serve", m, "--lora", f"{p}/none"], ["serve", m, "--out", f"{p}/a.png"],
    ]  # fmt: skip
    code = "import json, sys; from pipelines.cli import main\n"
    code += "for words in json.loads(sys.argv[1]):\n    assert main(words) == 2, words\n"
    code += "    assert not {'torch', 'diffusers', 'ray'} & set(sys.modules), words\n"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(refused)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-1000:]


def test_what_old_diffusers_wrote_is_drawn_as_bare_diffusers_draws_it(model: Path, mine: Path) -> None:
    """Settings that pipelines put right as they load, the class in model_index.json, and CLIP's whole configuration."""
    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    scheduler, index = mine / "scheduler/scheduler_config.json", mine / "model_index.json"
    text = json.loads((mine / "text_encoder/config.json").read_text())
    (mine / "text_encoder/config.json").write_text(json.dumps({"model_type": "clip", "text_config": text}))
    changed(mine / "unet/config.json", sample_size=[8, 8])
    for kind, told in (
        ("PNDMScheduler", {"_class_name": "PNDMScheduler", "skip_prk_steps": True}),  # of 2022: no steps_offset
        ("DDIMScheduler", {"_class_name": "DDIMScheduler", "steps_offset": 0}),  # clip_sample would be true
        ("EulerDiscreteScheduler", {"_class_name": "PNDMScheduler", "steps_offset": 1}),  # the index decides
        ("DDIMScheduler", {"clip_sample": True, "set_alpha_to_one": False}),
    ):
        scheduler.write_text(json.dumps({**table, **told}))
        changed(index, scheduler=["diffusers", kind])
        bare: Any = StableDiffusionPipeline.from_pretrained(mine, safety_checker=None)
        asked: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 7.5, "width": 16, "height": 16}
        (expected,) = bare("a red disc", generator=torch.Generator().manual_seed(1), **asked).images
        sampler = Sampler(mine, blur=False)
        (drawn,) = sampler.generate([GenerationRequest("a red disc", seed=1, steps=2, guidance=7.5)])
        assert drawn.facts["scheduler"] == kind and (np.asarray(drawn.image) == np.asarray(expected)).all(), told


def test_sizes_that_diffusers_does_not_believe() -> None:
    """Models of 512 pixels that were converted with a size of 32, before 0.9."""
    vae = {"block_out_channels": [1] * 4}

    def size(**unet: Any) -> tuple[int, int]:
        return ModelInfo("m", Path("m"), {"unet": unet, "vae": vae}, {}, None).size

    assert size(sample_size=32, version="0.6.0") == size(sample_size=None, version=None) == (512, 512)
    assert size(sample_size=32, version="0.10.0.dev0") == size(sample_size=32, version=None) == (256, 256)
    assert size(sample_size=96, version="0.6.0") == (768, 768)


def test_a_tokenizer_that_does_not_say_how_much_it_reads(mine: Path) -> None:
    path = mine / "tokenizer/tokenizer_config.json"
    for length in (None, 10**30):
        changed(path, model_max_length=length)
        with pytest.raises(UserError, match=r"tokenizer_config\.json: model_max_length.*16"):
            read_model_info(mine)
    path.unlink()
    with pytest.raises(UserError, match=r"What would do: .*\"model_max_length\": 16"):
        read_model_info(mine)


def test_a_folder_that_is_mistyped_is_not_asked_of_the_hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent.parent)
    with pytest.raises(UserError, match=rf"is not there: .* is a folder here, with the models .*{model.name}"):
        read_model_info(f"{model.parent.name}/{model.name}x")
