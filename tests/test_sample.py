"""Drawing: what diffusers' own pipelines draw, from what a request says alone, and refused early where it can't be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aesthetic.errors import UserError
from train.generate import sampler as sampler_module
from train.generate.files import png, read_facts
from train.generate.request import GenerationRequest, request_of, resolve
from train.generate.sampler import Generated, Sampler
from train.models.family import family_of
from train.models.info import read_model_info
from train.models.lora import Lora, check_lora, parse_lora
from train.models.presets import PRESETS
from train.models.schedulers import FLOW, SCHEDULERS, scheduler_name, share_of_steps
from train.models.unet import load_model, new_model

WORDS = ["a red disc", "a blue disc on white"]

CLEAN = """
import sys, numpy as np, torch
torch.set_num_threads(1)
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
g = torch.Generator().manual_seed(7)
image = pipeline("a red disc", num_inference_steps=12, guidance_scale=4.0, generator=g).images[0]
np.save(sys.argv[2], np.array(image))
assert not any(m.split(".")[0] in ("train", "curate", "pipelines") for m in sys.modules)
"""


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), int)


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and bool((pixels(one) == pixels(other)).all())


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def save(name: str, folder: Path) -> Path:
    """A model of random weights: `pixels` of flow, `latents` of four channels that predict the noise."""
    preset = replace(PRESETS["debug"], layers=(1, 1))  # for each level, as `tiny` has them
    if name == "latents":
        preset = replace(preset, vae=(16, 16), factor=2, latents=4)
    new_model(preset, WORDS * 4, "flow" if name == "pixels" else "eps").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    return {name: save(name, folder / name) for name in ("pixels", "latents")}


@pytest.fixture(scope="module")
def artists(models: dict[str, Path]) -> dict[str, Sampler]:
    return {name: Sampler(folder) for name, folder in models.items()}


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8))


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    made = Image.new("L", (16, 16))
    made.paste(255, (4, 4, 12, 12))
    return made


def bare(sampler: Sampler, kind: str = "") -> Any:
    """A pipeline of diffusers with the artist's modules and the model's own scheduler."""
    import diffusers

    pipeline = getattr(diffusers, f"StableDiffusion{kind}Pipeline")(
        **sampler._text.components, requires_safety_checker=False
    )
    pipeline.scheduler = type(pipeline.scheduler).from_pretrained(sampler.info.folder / "scheduler")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(sampler: Sampler, *requests: GenerationRequest, **more: Any) -> list[Generated]:
    return list(sampler.generate(requests, **more))


# ---------------------------------------------------------------------------------------------- what diffusers draws


@pytest.mark.parametrize("name", ["pixels", "latents"])
def test_text_and_image_to_image_are_what_diffusers_draws(
    artists: dict[str, Sampler], photo: Image.Image, name: str
) -> None:
    sampler = artists[name]
    how: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 4.0, "negative_prompt": "a blue disc"}
    r = GenerationRequest("a red disc", negative="a blue disc", seed=7, steps=4, guidance=4)
    (drawn,) = draw(sampler, r)
    assert same(drawn.image, bare(sampler)("a red disc", generator=noise(7), **how).images[0])
    (over,) = draw(sampler, replace(r, image=photo, strength=0.5))
    theirs = bare(sampler, "Img2Img")("a red disc", image=photo, strength=0.5, generator=noise(7), **how)
    assert same(over.image, theirs.images[0]) and not same(over.image, drawn.image)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_inpainting_is_what_diffusers_draws(
    artists: dict[str, Sampler], photo: Image.Image, mask: Image.Image, strength: float
) -> None:
    sampler = artists["latents"]
    r = GenerationRequest("a red disc", seed=7, steps=4, guidance=4, image=photo, mask=mask, strength=strength)
    (drawn,) = draw(sampler, r)
    theirs = bare(sampler, "Inpaint")(
        "a red disc", image=photo, mask_image=mask, strength=strength, width=16, height=16,
        num_inference_steps=4, guidance_scale=4.0, generator=noise(7),
    )  # fmt: skip
    assert same(drawn.image, theirs.images[0])


def test_inpainting_leaves_pixels_outside_the_mask(
    artists: dict[str, Sampler], photo: Image.Image, mask: Image.Image
) -> None:
    """A model of pixels has three latent channels, which diffusers' pipeline would refuse."""
    (drawn,) = draw(artists["pixels"], GenerationRequest("a red disc", seed=7, steps=3, image=photo, mask=mask))
    inside = np.asarray(mask) > 0
    assert (pixels(drawn.image)[~inside] == pixels(photo)[~inside]).all()
    assert (pixels(drawn.image)[inside] != pixels(photo)[inside]).any()
    assert artists["pixels"]._text.unet.config.in_channels == 3


def test_a_lora_is_what_diffusers_makes_of_it(
    models: dict[str, Path], artists: dict[str, Sampler], tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    made = load_model(models["pixels"])
    family_of(made).add_lora(made, rank=2)
    with torch.no_grad():
        for p in made.unet.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=noise(p.numel())))
    family_of(made).save_lora(made, tmp_path / "lora")
    r = GenerationRequest("a red disc", seed=7, steps=3, guidance=4)
    (drawn,) = draw(Sampler(models["pixels"], loras=[Lora(tmp_path / "lora", 0.5)]), r)
    (without,) = draw(artists["pixels"], r)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(models["pixels"])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path / "lora")
    how: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "generator": noise(7)}
    theirs = pipeline("a red disc", cross_attention_kwargs={"scale": 0.5}, **how).images[0]
    assert same(drawn.image, theirs) and not same(drawn.image, without.image)
    assert drawn.facts["loras"][0]["weight"] == 0.5 and len(drawn.facts["loras"][0]["sha256"]) == 64
    with pytest.raises(UserError, match=r"trained on another model than .*latents: .* there"):
        check_lora(read_model_info(save_other(models["latents"], tmp_path / "latents")), Lora(tmp_path / "lora"))
    assert parse_lora(f"{tmp_path}/lora:0.5") == Lora(tmp_path / "lora", 0.5)
    assert parse_lora(f"{tmp_path}/lora") == Lora(tmp_path / "lora")


def save_other(model: Path, folder: Path) -> Path:
    """The same with a UNet of another width."""
    from diffusers import UNet2DConditionModel

    shutil.copytree(model, folder)
    unet: Any = UNet2DConditionModel.from_pretrained(model / "unet")
    UNet2DConditionModel.from_config({**unet.config, "block_out_channels": (16, 48)}).save_pretrained(folder / "unet")
    return folder


@pytest.mark.long
def test_the_command_draws_what_a_clean_process_with_diffusers_draws(models: dict[str, Path], tmp_path: Path) -> None:
    words = ["sample", str(models["pixels"]), "a red disc", "--seed", "7", "--steps", "12", "--guidance", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in (
        [sys.executable, "-m", "pipelines.cli", *words, "--out", str(tmp_path / "ours")],
        [sys.executable, "-c", CLEAN, str(models["pixels"]), str(tmp_path / "theirs.npy")],
    ):
        subprocess.run(command, check=True, capture_output=True, env=environment)
    assert (np.asarray(Image.open(tmp_path / "ours" / "000000.png")) == np.load(tmp_path / "theirs.npy")).all()


# ------------------------------------------------------------------------------------------ on what an image depends


@pytest.mark.parametrize(
    "scheduler",
    ["EulerAncestralDiscrete", *(pytest.param(n, marks=pytest.mark.long) for n in SCHEDULERS if "EulerA" not in n)],
)
def test_a_batch_changes_images_by_rounding_at_most(artists: dict[str, Sampler], scheduler: str) -> None:
    """Stochastic schedulers too: all noise is an image's own."""
    sampler = artists["latents"]
    requests = [GenerationRequest(WORDS[i % 2], seed=i, steps=4, scheduler=scheduler) for i in range(3)]
    single = draw(sampler, *requests)
    (alone,) = draw(sampler, requests[2])
    assert same(alone.image, single[2].image) and not same(single[0].image, single[2].image)
    sampler.batch = 3
    try:
        together = draw(sampler, *requests)
    finally:
        sampler.batch = 1
    assert [d.request.seed for d in together] == [0, 1, 2]
    for one, other in zip(single, together, strict=True):
        assert np.abs(pixels(one.image) - pixels(other.image)).max() <= 1


def test_requests_of_several_kinds_come_in_order_and_steps_add_up(
    artists: dict[str, Sampler], photo: Image.Image
) -> None:
    heard: list[tuple[int, int]] = []
    first = GenerationRequest("a red disc", seed=1, steps=3)
    requests = [first, replace(first, image=photo, strength=0.7), replace(first, scheduler="HeunDiscrete", seed=2)]
    drawn = draw(artists["latents"], *requests, on_step=lambda *now: heard.append(now))
    assert [d.request.seed for d in drawn] == [1, 1, 2]
    assert heard[-1] == (3 + 2 + 3, 8) and heard == sorted(heard) and {of for _, of in heard} == {8}


def test_an_exception_in_on_step_ends_it_and_the_next_image_is_as_ever(artists: dict[str, Sampler]) -> None:
    sampler, r = artists["latents"], GenerationRequest("a red disc", seed=1, steps=3)
    (before,) = draw(sampler, r)

    class Cancelled(Exception):
        pass

    def cancel(done: int, of: int) -> None:
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        draw(sampler, r, on_step=cancel)
    assert same(draw(sampler, r)[0].image, before.image)


@pytest.mark.long
def test_where_memory_runs_out_it_draws_fewer_at_once_then_saves_memory_then_says_so(models: dict[str, Path]) -> None:
    sampler = Sampler(models["latents"], batch=2)
    requests = [GenerationRequest("a red disc", seed=i, steps=2) for i in range(2)]
    expected = draw(sampler, *requests)
    left = [1]

    def lacks(done: int, of: int) -> None:
        if left[0]:
            left[0] -= 1
            torch.empty(1 << 60, dtype=torch.uint8)  # as on a CPU, which has no error of its own for it

    again = draw(sampler, *requests, on_step=lacks)
    assert sampler.batch == 1 and str(sampler.savings) == "nothing more"
    left[0] = 1
    draw(sampler, *requests, on_step=lacks)
    assert str(sampler.savings) == "VAE slicing"
    for one, other in zip(expected, again, strict=True):
        assert np.abs(pixels(one.image) - pixels(other.image)).max() <= 1
    left[0] = 99
    with pytest.raises(UserError, match=r"16 x 16 pixels need more memory than cpu has, also with VAE slicing \+ VAE"):
        draw(sampler, *requests, on_step=lacks)


def test_enlarging_in_one_go_is_enlarging_the_result(artists: dict[str, Sampler]) -> None:
    sampler = artists["latents"]
    r = GenerationRequest("a red disc", seed=5, steps=2)
    (small,) = draw(sampler, r)
    heard: list[tuple[int, int]] = []
    (large,) = draw(sampler, replace(r, upscale=2, strength=0.5), on_step=lambda *now: heard.append(now))
    (later,) = draw(sampler, replace(r, upscale=2, strength=0.5, image=small.image))
    assert large.image.size == (32, 32) and same(large.image, later.image)
    assert heard[-1] == (2 + 9 * 1, 11)  # nine tiles of 16 that overlap by 8
    (plain,) = draw(sampler, replace(r, upscale=3, strength=0, image=small.image.crop((0, 0, 13, 7))))
    lanczos = small.image.crop((0, 0, 13, 7)).resize((39, 21), Image.Resampling.LANCZOS)
    assert same(plain.image, lanczos)


def test_flagged_images_are_blurred_and_never_black(
    artists: dict[str, Sampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, r = artists["latents"], GenerationRequest("a red disc", seed=5, steps=2)
    (clear,) = draw(sampler, r)
    assert not clear.flagged and 0 <= clear.nsfw < sampler_module.UNSAFE
    monkeypatch.setattr(sampler_module, "UNSAFE", 0.0)
    (blurred,) = draw(sampler, r)
    monkeypatch.setattr(sampler, "blur", False)
    (kept,) = draw(sampler, r)
    assert blurred.flagged and kept.flagged and same(kept.image, clear.image)
    assert blurred.nsfw == clear.nsfw and kept.facts["nsfw"]["blurred"] is False
    assert blurred.facts["nsfw"] == {"score": clear.nsfw, "threshold": 0.0, "flagged": True, "blurred": True}
    assert pixels(blurred.image).std() < pixels(clear.image).std() / 2
    assert np.abs(pixels(blurred.image).mean((0, 1)) - pixels(clear.image).mean((0, 1))).max() < 10


# ----------------------------------------------------------------------------------------------- facts and refusals


def test_a_png_says_how_to_draw_it_again(
    artists: dict[str, Sampler], photo: Image.Image, mask: Image.Image, tmp_path: Path
) -> None:
    r = GenerationRequest("ein „roter“ Kreis", negative="blau", seed=9, steps=2, image=photo, mask=mask, strength=0.5)
    (drawn,) = draw(artists["latents"], r)
    path = tmp_path / "a.png"
    path.write_bytes(png(drawn.image, drawn.facts))
    facts = read_facts(path)
    assert facts == json.loads(json.dumps(drawn.facts)) and same(Image.open(path), drawn.image)
    assert request_of(facts, photo, mask) == drawn.request
    told = Image.open(path).info["parameters"].splitlines()
    assert told[:2] == ["ein „roter“ Kreis", "Negative prompt: blau"]
    assert told[2].startswith("Steps: 2, Sampler: DDIMScheduler, CFG scale: 7.5, Seed: 9, Size: 16x16, Model hash: ")
    with pytest.raises(UserError, match="give it too"):
        request_of(facts, photo)
    with pytest.raises(UserError, match="another mask than the one given"):
        request_of(facts, photo, mask.point(lambda v: 255 - v))
    photo.save(tmp_path / "other.png")
    with pytest.raises(UserError, match="does not say how it was generated"):
        read_facts(tmp_path / "other.png")
    (tmp_path / "torn.png").write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"torn\.png"):
        read_facts(tmp_path / "torn.png")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"seed": -1}, "seed -1"),
    ({"seed": 2**32}, "seed 4294967296"),
    ({"steps": 0}, "steps 0: 1 to 1000"),
    ({"guidance": float("nan")}, "guidance nan"),
    ({"width": 16}, "both width and height"),
    ({"width": 20, "height": 16}, r"width 20 does not fit.*multiples of 8\. 16 would do"),
    ({"width": 16, "height": 2}, "height 2 does not fit"),
    ({"upscale": 5}, "1 to 4 times"),
    ({"strength": 0.5}, "strength is for an image"),
    ({"mask": "mask"}, "give that image too"),
    ({"image": "photo", "strength": 1.5}, "0 to 1 are expected"),
    ({"image": "photo", "strength": 0.0}, "a strength above 0 would do"),
    ({"image": "photo", "strength": 0.02}, "of 30 steps strength 0.02 leaves none: at least 50 steps"),
    ({"image": "photo", "mask": "small"}, "the mask has another size than the image: 8 x 8, not 16 x 16"),
    ({"image": "photo", "mask": "mask", "upscale": 2}, "draw first, then enlarge"),
    ({"image": "odd"}, "width 13 does not fit"),
    ({"scheduler": "EulerDiscretescheduler"}, "can't draw with them. Those that can: DPMSolverMultistep"),
    ({"scheduler": "Eular"}, "did you mean EulerAncestralDiscreteScheduler or EulerDiscreteScheduler"),
    ({"scheduler": "zzz"}, "there are DDIMScheduler, DDPM"),
    ({"scheduler": "DPMSolverSDE"}, "can't be used here: its noise does not come"),
    ({"prompt": "x" * 10_001}, "more than 10,000 characters"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_does_not_fit_is_refused_without_the_weights(
    models: dict[str, Path], photo: Image.Image, mask: Image.Image, given: dict[str, Any], message: str
) -> None:
    images = {"photo": photo, "mask": mask, "small": mask.resize((8, 8)), "odd": photo.crop((0, 0, 13, 16))}
    given = {"prompt": "a"} | {k: images[v] if k in ("image", "mask") else v for k, v in given.items()}
    with pytest.raises(UserError, match=message):
        resolve(read_model_info(models["pixels"]), GenerationRequest(**given))


def test_defaults_are_the_models(models: dict[str, Path], photo: Image.Image, mask: Image.Image) -> None:
    about, r = read_model_info(models["latents"]), GenerationRequest("a")
    assert about.size == (16, 16) and about.factor == 2 and about.step == 8 and not about.of_pixels
    whole = resolve(about, r)
    assert (whole.width, whole.height, whole.guidance, whole.scheduler) == (16, 16, 7.5, "DDIMScheduler")
    assert resolve(about, whole) == whole and whole.strength is None
    assert resolve(about, replace(r, image=photo)).strength == 0.8
    assert resolve(about, replace(r, image=photo, mask=mask)).strength == 1.0
    assert resolve(about, replace(r, upscale=2)).strength == 0.3
    assert resolve(about, replace(r, upscale=2), upscaler=True).strength == 0.0
    (models["latents"] / "train.json").write_text('{"settings": {}, "data": {"manifest_sha256": "abc"}}')
    assert (
        resolve(read_model_info(models["latents"]), r).guidance == 3.0
        and read_model_info(models["latents"]).manifest == "abc"
    )
    (models["latents"] / "train.json").unlink()


def test_a_shifted_flow_enlarges_with_as_much_noise() -> None:
    flow = {"prediction_type": "flow_prediction", "flow_shift": 6.0}
    u = share_of_steps(0.3, flow)
    assert 6 * u / (1 + 5 * u) == pytest.approx(0.3, abs=1e-3)
    assert share_of_steps(0.3, {**flow, "flow_shift": 1.0}) == share_of_steps(0.3, {}) == 0.3


def test_too_few_or_many_steps_for_a_scheduler_are_refused(models: dict[str, Path]) -> None:
    about = read_model_info(models["latents"])
    resolve(about, GenerationRequest("a", scheduler="PNDM", steps=4))
    for name, steps in (("PNDM", 3), ("LCM", 999)):
        with pytest.raises(UserError, match=rf"{name}Scheduler can't draw in {steps} steps"):
            resolve(about, GenerationRequest("a", scheduler=name, steps=steps))


def test_schedulers_go_by_diffusers_names_and_flow_by_three_of_them() -> None:
    eps = {"_class_name": "PNDMScheduler", "prediction_type": "epsilon"}
    assert scheduler_name(None, eps) == scheduler_name("pndm", eps) == "PNDMScheduler"
    assert [scheduler_name(n.removesuffix("Scheduler"), eps) for n in SCHEDULERS] == list(SCHEDULERS)
    flow = {"_class_name": FLOW[0], "prediction_type": "flow_prediction"}
    assert [scheduler_name(n, flow) for n in FLOW] == list(FLOW)
    for name in set(SCHEDULERS) - set(FLOW):
        with pytest.raises(UserError, match="predicts flow"):
            scheduler_name(name, flow)


def cut(part: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / part)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("unet"), "no whole text-to-image model: unet missing"),
        (cut("tokenizer"), "tokenizer missing"),
        (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "vae missing or without weights"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "scheduler missing"),
        (lambda f: (f / "model_index.json").write_text("{"), "not JSON"),
        (
            lambda f: (f / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'),
            "scheduler is missing, of which a FluxPipeline is made",
        ),
        (lambda f: (f / "model_index.json").unlink(), "holds no diffusers pipeline"),
    ],
)
def test_a_model_without_a_part_is_told_without_loading(
    models: dict[str, Path], tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(models["pixels"], tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(UserError, match=message):
        read_model_info(tmp_path / "m")


def test_the_digest_is_that_of_the_weights_wherever_they_lie(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["pixels"], tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("a note")
    assert (
        read_model_info(tmp_path / "m").digest
        == read_model_info(models["pixels"]).digest
        != read_model_info(models["latents"]).digest
    )
    with open(tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors", "r+b") as f:
        f.seek(-1, 2)
        f.write(b"\x01")
    assert read_model_info(tmp_path / "m").digest != read_model_info(models["pixels"]).digest


def test_a_model_goes_by_its_bare_name_too(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pipeline").symlink_to(models["pixels"])
    monkeypatch.chdir(tmp_path)
    assert read_model_info("pipeline").digest == read_model_info(models["pixels"]).digest


def test_the_end_of_a_prompt_that_is_not_read_is_known(artists: dict[str, Sampler]) -> None:
    said: list[str] = []
    long = "a red disc " * 5 + "and a blue disc"
    for prompt in ("a red disc", long, long):
        draw(artists["pixels"], GenerationRequest(prompt, steps=1), on_note=said.append)
    assert len(said) == 2 and said[0].endswith("and a blue disc'") and said[0].startswith("the model reads no further")


@pytest.mark.long
def test_a_model_for_inpainting_is_used_as_one(
    models: dict[str, Path], photo: Image.Image, mask: Image.Image, tmp_path: Path
) -> None:
    from diffusers import UNet2DConditionModel

    shutil.copytree(models["latents"], tmp_path / "m")
    unet: Any = UNet2DConditionModel.from_config(
        {**UNet2DConditionModel.load_config(models["latents"] / "unet"), "in_channels": 9}
    )
    unet.save_pretrained(tmp_path / "m" / "unet")
    sampler, r = Sampler(tmp_path / "m"), GenerationRequest("a red disc", seed=7, steps=3, image=photo, mask=mask)
    (drawn,) = draw(sampler, r)
    theirs = bare(sampler, "Inpaint")(
        "a red disc", image=photo, mask_image=mask, strength=1.0, width=16, height=16,
        num_inference_steps=3, guidance_scale=7.5, generator=noise(7),
    )  # fmt: skip
    assert same(drawn.image, theirs.images[0])
    with pytest.raises(UserError, match="is an inpainting model"):
        sampler.check(replace(r, mask=None))
