"""Drawing with any family of diffusers: what bare diffusers draws, bit for bit, and refused early where it can't be."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from PIL import Image
from safetensors.torch import load_file, save_file

from aesthetic.errors import UserError
from pipelines.cli import main
from tests.small_pipelines import FAMILIES, save_pipeline
from train import devices
from train.generate.files import read_facts
from train.generate.request import GenerationRequest, resolve
from train.generate.sampler import Sampler
from train.models.info import ModelInfo, check_trainable, read_model_info

QUICK = ("z-image", "sdxl")
"""Families that are drawn with in quick tests; images are begun with by the first alone."""

EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]
WITH_IMAGES = ("sdxl", "sd3", "flux", "z-image", "qwen-image", "sd3-without-t5")
"""Those that diffusers has image-to-image and inpainting for."""

SIZE: dict[str, Any] = {"width": 32, "height": 32}


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's folder, made when it is asked for first."""
    root = tmp_path_factory.mktemp("families")
    return lambda name: root / name if (root / name).is_dir() else save_pipeline(name, root / name)


@pytest.fixture(scope="module")
def sampler_of(folder_of: Callable[[str], Path]) -> Iterator[Callable[[str], Sampler]]:
    made: dict[str, Sampler] = {}

    def sampler(name: str) -> Sampler:
        if name not in made:
            made[name] = Sampler(folder_of(name), blur=False)  # noise is flagged now and then
        return made[name]

    yield sampler


def picture(seed: int = 0, side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8))


def hole() -> Image.Image:
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    return mask


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and bool((np.asarray(one) == np.asarray(other)).all())


def bare(auto: Any, folder: Path) -> Any:
    """A pipeline as diffusers' own Auto class loads it."""
    index = json.loads((folder / "model_index.json").read_text())
    empty = {name: None for name, value in index.items() if value == [None, None]}
    pipeline = auto.from_pretrained(folder, **empty)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: Any, prompt: str = "a red disc", seed: int = 7, steps: int = 3, **how: Any) -> Image.Image:
    """What it draws when somebody calls it: with a size, and without binning, which knows none so small."""
    call = inspect.signature(pipeline.__call__).parameters
    given = {"use_resolution_binning": False, **SIZE, **how}
    if "true_cfg_scale" in call and call["true_cfg_scale"].default > 1:  # as its documentation says it must
        given = {"negative_prompt": "", **given}
    drawn: Image.Image = pipeline(
        prompt, generator=noise(seed), num_inference_steps=steps, **{k: v for k, v in given.items() if k in call}
    ).images[0]
    return drawn


def draw(sampler: Sampler, *requests: GenerationRequest, **more: Any) -> list[Image.Image]:
    return [generated.image for generated in sampler.generate(requests, **more)]


@pytest.mark.parametrize("name", EACH)
def test_words_are_drawn_as_diffusers_draws_them(
    folder_of: Callable[[str], Path], sampler_of: Callable[[str], Sampler], name: str
) -> None:
    sampler, pipeline = sampler_of(name), bare(AutoPipelineForText2Image, folder_of(name))
    r = GenerationRequest("a red disc", seed=7, steps=3, **SIZE)
    assert type(pipeline).__name__ == sampler.info.abilities.text
    steps: list[tuple[int, int]] = []
    (drawn,) = draw(sampler, r, on_step=lambda done, of: steps.append((done, of)))
    assert same(drawn, theirs(pipeline)) and not same(drawn, theirs(pipeline, seed=8))
    assert steps[-1] == (3, 3) and len(steps) == 3
    if sampler.info.abilities.negative:
        (drawn,) = draw(sampler, GenerationRequest("a red disc", "a blue disc", seed=7, steps=3, **SIZE))
        assert same(drawn, theirs(pipeline, negative_prompt="a blue disc"))
    else:
        with pytest.raises(UserError, match="reads no negative prompt"):
            sampler.check(GenerationRequest("a red disc", "a blue disc"))
    two = [r, GenerationRequest("a fox", seed=8, steps=3, **SIZE)]
    sampler.batch = 2
    (first, second), sampler.batch = draw(sampler, *two), 1
    assert np.abs(np.asarray(first, int) - np.asarray(draw(sampler, r)[0], int)).max() <= 2
    assert np.abs(np.asarray(second, int) - np.asarray(theirs(pipeline, "a fox", 8), int)).max() <= 2


@pytest.mark.parametrize(
    "name", [QUICK[0], *(pytest.param(name, marks=pytest.mark.long) for name in WITH_IMAGES if name != QUICK[0])]
)
def test_images_are_begun_with_as_diffusers_begins_with_them(
    folder_of: Callable[[str], Path], sampler_of: Callable[[str], Sampler], name: str
) -> None:
    sampler, folder = sampler_of(name), folder_of(name)
    how: dict[str, Any] = {"image": picture(), "strength": 0.7}
    (over,) = draw(sampler, GenerationRequest("a red disc", seed=7, steps=3, **how, **SIZE))
    # a default of their own, where image to image has another guidance than text to image
    guidance = {"guidance_scale": sampler.info.abilities.guidance} if name != "qwen-image" else {}
    assert same(over, theirs(bare(AutoPipelineForImage2Image, folder), **how, **guidance))
    how |= {"mask": hole()}
    (into,) = draw(sampler, GenerationRequest("a red disc", seed=7, steps=3, **how, **SIZE))
    how |= {"mask_image": how.pop("mask")}
    assert same(into, theirs(bare(AutoPipelineForInpainting, folder), **how, **guidance))
    assert not same(into, over)

    (large,) = draw(sampler, GenerationRequest("a fox", seed=7, steps=3, image=picture(), upscale=2, strength=0.7))
    assert large.size == (64, 64) and not same(large, picture().resize((64, 64), Image.Resampling.LANCZOS))


@pytest.mark.parametrize("name", EACH)
def test_what_a_family_can_not_do_is_said_before_it_is_loaded(folder_of: Callable[[str], Path], name: str) -> None:
    info = read_model_info(folder_of(name))
    asked: list[tuple[bool, str, dict[str, Any]]] = [
        (info.abilities.image is not None, "has no image-to-image: it draws from words", {"image": picture()}),
        (info.abilities.mask is not None, "has no inpainting", {"image": picture(), "mask": hole()}),
        (info.abilities.image is not None, "enlarging redraws .* no image-to-image: --strength 0", {"upscale": 2}),
    ]
    assert (name in WITH_IMAGES) == (info.abilities.image is not None and info.abilities.mask is not None)
    for can, why, how in asked:
        if can:
            resolve(info, GenerationRequest("a", **how))
        else:
            with pytest.raises(UserError, match=why):
                resolve(info, GenerationRequest("a", **how))
    assert resolve(info, GenerationRequest("a", image=picture(), upscale=2, strength=0)).steps_of_image == 0
    if name != "z-image":
        with pytest.raises(UserError, match=r"can be trained further are|of which LoRAs are trained here"):
            check_trainable(info, None)


def test_the_command_draws_refuses_and_draws_again(
    folder_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(folder_of("z-image")), str(tmp_path / "out")
    small = ["--width", "32", "--height", "32", "--steps", "2"]
    assert main(["sample", model, "a red disc", "--seed", "7", *small, "--out", out]) == 0
    facts = read_facts(tmp_path / "out" / "000000.png")
    assert (facts["scheduler"], facts["guidance"]) == ("FlowMatchEulerDiscreteScheduler", 5.0)
    assert facts["model"]["sha256"] == read_model_info(model).digest
    assert main(["sample", "--again", f"{out}/000000.png", "--out", out]) == 0
    assert "bit for bit" in capsys.readouterr().out
    for given, why in (
        (["--scheduler", "Euler"], "drawn with its own FlowMatchEulerDiscreteScheduler alone"),
        (["--width", "33", "--height", "32"], "sides are multiples of 8"),
    ):
        assert main(["sample", model, "a red disc", *given, "--out", str(tmp_path / "none")]) == 2
        assert why in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", EACH)
def test_what_is_not_read_of_a_prompt_is_said(sampler_of: Callable[[str], Sampler], name: str) -> None:
    sampler, said = sampler_of(name), []
    short, long = "a red disc", "a red disc on blue, " * 300 + "and a fox"

    def notes(*requests: GenerationRequest) -> list[str]:
        found: list[str] = []
        draw(sampler, *requests, on_note=found.append)
        return found

    assert notes(GenerationRequest(short, seed=1, steps=2, **SIZE)) == []
    said = notes(*(GenerationRequest(long, seed=seed, steps=2, **SIZE) for seed in (1, 2)))
    encoders = {"sdxl": 2, "sd3": 3, "flux": 2, "hunyuan": 2}.get(name, 1)
    assert said and len(said) <= encoders, said  # once, for each text encoder that reads another length
    for line in said:
        assert line.endswith("and a fox'") and "no further than" in line
        read, unread = line.split("than: '")[1].removesuffix("'").split("'; not '")
        assert (read + unread).replace(" ", "") == long.replace(" ", "")
    if name in ("sd3", "flux"):
        clips = {"text_encoder"} if name == "flux" else {"text_encoder and text_encoder_2"}
        last = "text_encoder_2" if name == "flux" else "text_encoder_3"
        assert {line.split(" reads")[0].split("encoders ")[1] for line in said} == clips | {last}


@pytest.mark.long
def test_memory_is_saved_where_the_parts_can(sampler_of: Callable[[str], Sampler]) -> None:
    sampler, r = sampler_of("z-image"), GenerationRequest("a red disc", seed=7, steps=2, **SIZE)
    (before,) = draw(sampler, r)
    info = sampler.info
    cost = devices.memory_cost(info, [40, 10, 5], 4)
    assert (cost.weights, cost.largest_part, cost.heads) == (55, 40, 0)
    savings: devices.MemorySavings | None = devices.MemorySavings()
    while (savings := devices.next_savings(savings, "cpu")) is not None:
        devices.apply_savings(savings, sampler._text, sampler.device)
        assert same(draw(sampler, r)[0], before)
    devices.apply_savings(devices.MemorySavings(), sampler._text, sampler.device)


# --------------------------------------------------------------------------------------------- folders as people have


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def edit_index(folder: Path, **entries: Any) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | entries))


@pytest.mark.long
def test_weights_of_one_precision_alone_are_found(
    folder_of: Callable[[str], Path], sampler_of: Callable[[str], Sampler], tmp_path: Path
) -> None:
    mine = copied(folder_of("z-image"), tmp_path / "m")
    for path in [*mine.glob("*/model.safetensors"), *mine.glob("*/diffusion_pytorch_model.safetensors")]:
        path.rename(path.with_suffix(".fp16.safetensors"))
    r = GenerationRequest("a red disc", seed=7, steps=2, **SIZE)
    assert same(draw(Sampler(mine, blur=False), r)[0], draw(sampler_of("z-image"), r)[0])
    assert read_model_info(mine).digest != read_model_info(folder_of("z-image")).digest  # other files


def no_numbers(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda f: shutil.rmtree(f / "vae"), "vae is missing or without weights"),
        (lambda f: (f / "text_encoder" / "model.safetensors").unlink(), "text_encoder is missing or without weights"),
        (lambda f: edit_index(f, transformer=[None, None]), "transformer is null, and a ZImagePipeline can't draw"),
        (lambda f: edit_index(f, vae=["my_code", "Vae"]), "my_code.Vae, which the installed diffusers"),
        (lambda f: edit_index(f, vae=["os", "system"]), "os.system, which the installed diffusers"),
        (lambda f: edit_index(f, vae=["transformers", "pipeline"]), "transformers.pipeline, which the installed"),
        (lambda f: edit_index(f, _class_name="ZImage9Pipeline"), "is a ZImage9Pipeline, which the installed diffusers"),
        (lambda f: edit_index(f, _class_name="FluxFillPipeline"), "FluxFillPipeline, which draws no image from words"),
        (lambda f: edit_index(f, _class_name="ZImageControlNetPipeline"), r"needs an image .*\(ControlNet\)"),
        (lambda f: edit_index(f, _class_name="KandinskyV22CombinedPipeline"), "is two models, one after the other"),
        (lambda f: edit_index(f, _class_name="WanPipeline"), "WanPipeline, which draws no image from words"),
        (lambda f: edit_index(f, vae=3), r"vae is 3, not \[library, class\]"),
        (lambda f: (f / "vae" / "config.json").write_text('{"block_out_channels": "many"}'), "block_out_channels"),
        (lambda f: (f / "transformer" / "config.json").write_text('{"all_patch_size": [-1]}'), "all_patch_size"),
        (lambda f: (f / "transformer" / "config.json").write_text('{"dim": 48}'), "can be made of it|does not fit"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{"), "not JSON"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{}"), "can be made of these files"),
        (no_numbers, "hold values that are no numbers"),
    ],
)
def test_a_damaged_folder_is_told_by_the_file(
    folder_of: Callable[[str], Path], tmp_path: Path, damage: Callable[[Path], Any], why: str
) -> None:
    mine = copied(folder_of("z-image"), tmp_path / "m")
    damage(mine)
    with pytest.raises(UserError, match=why):
        draw(Sampler(read_model_info(mine)), GenerationRequest("a", steps=1, **SIZE))


def test_sizes_are_the_models_own() -> None:
    def info(transformer: dict[str, Any], vae: dict[str, Any]) -> ModelInfo:
        return ModelInfo("m", Path("m"), {"transformer": transformer, "vae": vae}, {}, None)

    levels = {"block_out_channels": [8, 8, 8, 8]}
    assert info({"patch_size": 1}, levels).size == (1024, 1024)  # Flux
    assert info({"patch_size": 1}, levels).step == 16
    assert info({"sample_size": [32, 64], "patch_size": [1, 2, 2]}, levels).size == (512, 256)
    assert info({}, {"temperal_downsample": [False, True, True]}).factor == 8  # Qwen-Image
    assert info({}, {"encoder_block_out_channels": [1] * 6}).factor == 32  # Sana
