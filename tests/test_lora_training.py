"""LoRAs of larger families: each says what its own pipeline says, is trained, goes on to the same bits and is drawn."""

from __future__ import annotations

import inspect
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image
from PIL import Image
from safetensors.torch import load_file

from aesthetic.errors import UserError
from pipelines.cli import main
from tests.small_pipelines import save_pipeline
from tests.small_train import make_images
from train.data import ImageDataset, Stream, open_samples, view_of
from train.latents import precompute_latents
from train.models.family import family_of, load_model
from train.models.info import check_trainable, read_model_info
from train.objective import objective_of
from train.tasks import Denoise, generate_images

LONG = pytest.mark.long
KINDS = ["sdxl", *(pytest.param(kind, marks=LONG) for kind in ("sd3", "sd3-without-t5", "flux", "z-image"))]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs on squares of 48 pixels, some of them wider, one without a caption."""
    folder = make_images(tmp_path_factory.mktemp("images"), 24)
    for i, path in enumerate(sorted(folder.glob("*.png"))):
        cv2.imwrite(str(path), cv2.resize(np.asarray(cv2.imread(str(path))), (48 + 16 * (i % 2), 48)))
    (folder / "005.txt").unlink()
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")
    return lambda kind: folder / kind if (folder / kind).is_dir() else save_pipeline(kind, folder / kind)


def knows(pipeline: Any, x0: torch.Tensor) -> Any:
    """What a denoiser answers that knows x0, in the units, sign and layout of its own family."""
    family = family_of(pipeline)

    def unet(x: torch.Tensor, t: torch.Tensor, *args: Any, **more: Any) -> Any:
        a = pipeline.scheduler.alphas_cumprod[t.long()].reshape(-1, 1, 1, 1)
        return ((x - a.sqrt() * x0) / (1 - a).sqrt(),)

    def sd3(hidden_states: torch.Tensor, *args: Any, **more: Any) -> Any:
        t = more["timestep"] if "timestep" in more else args[2]
        return ((hidden_states - x0) / (t.reshape(-1, 1, 1, 1) / 1000),)

    def flux(hidden_states: torch.Tensor, timestep: torch.Tensor, **more: Any) -> Any:
        packed = pipeline._pack_latents(x0, 1, *x0.shape[1:])
        return ((hidden_states - packed) / timestep.reshape(-1, 1, 1),)

    def z_image(x: list[torch.Tensor], t: torch.Tensor, *args: Any, **more: Any) -> Any:
        return ([-(one - x0[0][:, None]) / (1 - share) for one, share in zip(x, t, strict=True)],)

    return {"unet": unet}.get(family.denoiser) or {"FluxPipeline": flux, "ZImagePipeline": z_image}.get(
        family.pipeline, sd3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_knows_the_image_is_sampled_to_it_by_the_familys_own_pipeline(models: Any, kind: str) -> None:
    made = load_model(models(kind))
    family, channels = family_of(made), made.vae.config.latent_channels
    assert family.default_size(made) == 32 and family.size_step(made) == 4
    x0 = torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    family.network(made).forward = knows(made, x0)
    made.set_progress_bar_config(disable=True)
    how = family.drawing(made, 3.0) | {"output_type": "latent"}
    found = made("a red disc", num_inference_steps=50, generator=torch.Generator().manual_seed(0), **how).images
    if kind == "flux":
        found = made._unpack_latents(found, 32, 32, 2)
    assert torch.allclose(found, x0, atol=0.02)

    noise, t = torch.randn(2, *x0.shape[1:]), torch.tensor([130.0, 900.0])
    x_t, target, _ = objective_of(made.scheduler).noised(x0.expand(2, -1, -1, -1), noise, t)
    tokens = torch.nn.utils.rnn.pad_sequence(family.tokenize(made, ["a red disc", ""]), batch_first=True)
    lengths = torch.tensor([tokens.shape[1]] * 2)
    text = family.encode_text(family.text_encoder(made), tokens, lengths)
    views = torch.tensor([view_of(32, 32, 32, 32)] * 2)
    said = family.predict(family.network(made), x_t, t, text, lengths, views)
    assert torch.allclose(said, target, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_given_what_its_own_pipeline_gives_it(models: Any, kind: str) -> None:
    """Everything but the noise: text, pooled vectors, sizes, places, guidance."""
    made = load_model(models(kind))
    family, given = family_of(made), []
    network, original = family.network(made), family.network(made).forward

    def listen(*args: Any, **more: Any) -> Any:
        given.append((args, more))
        return original(*args, **more)

    network.forward = listen
    made.set_progress_bar_config(disable=True)
    prompt = "a fox in the snow"
    guidance = {"guidance_scale": 0.0 if kind == "z-image" else 1.0}
    made(prompt, num_inference_steps=1, output_type="latent", height=32, width=32, **guidance)
    tokens = torch.stack(family.tokenize(made, [prompt]))
    lengths = torch.tensor([tokens.shape[1]])
    (args, more), x_t = given.pop(), torch.randn(1, made.vae.config.latent_channels, 16, 16)
    with torch.no_grad():
        text = family.encode_text(family.text_encoder(made), tokens, lengths)
        t = torch.tensor([500.0])
        family.predict(network, x_t, t, text, lengths, torch.tensor([view_of(32, 32, 32, 32)]))

    def conditions(args: tuple[Any, ...], more: dict[str, Any]) -> dict[str, torch.Tensor]:
        bound = inspect.signature(original).bind(*args, **more).arguments
        bound |= bound.pop("added_cond_kwargs", None) or {}
        left = {"sample", "hidden_states", "x", "timestep", "t"}
        found = {k: v[0] if isinstance(v, list) else v for k, v in bound.items() if k not in left}
        return {k: v.float().squeeze() for k, v in found.items() if isinstance(v, torch.Tensor)}

    theirs, ours = conditions(args, more), conditions(*given.pop())
    assert theirs.keys() == ours.keys() and theirs
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, atol=1e-5), name


def test_no_words_are_what_sdxl_draws_away_from(models: Any) -> None:
    made = load_model(models("sdxl"))
    family = family_of(made)
    tokens = torch.stack(family.tokenize(made, ["a red disc", ""]))
    text = family.encode_text(family.text_encoder(made), tokens, torch.tensor([17, 17]))
    negative = made.encode_prompt("a red disc", do_classifier_free_guidance=True, device="cpu")[1]
    assert torch.equal(text[1, :-1], negative[0]) and not text[1].any() and text[0].any()
    made.register_to_config(force_zeros_for_empty_prompt=False)
    tokens = torch.stack(family.tokenize(made, [""]))
    assert family.encode_text(family.text_encoder(made), tokens, torch.tensor([17])).any()


def test_what_of_an_image_is_shown_reaches_the_batch(models: Any, images: Path, tmp_path: Path) -> None:
    assert view_of(48, 64, 24, 24) == [48, 64, 0, 4, 24, 24] and view_of(20, 10, 40, 20) == [20, 10, 0, 0, 40, 20]
    made = load_model(models("sdxl"))
    dataset = ImageDataset(open_samples(images), lambda c: family_of(made).tokenize(made, c), 32)
    latents = precompute_latents(made, dataset, np.arange(24), tmp_path, text=True, shard_size=10)
    task = Denoise(made, text=False)
    assert sorted(task.modules) == ["text_encoder", "text_encoder_2", "unet"]
    one, other = (Stream(e, np.arange(24), batch=8, seed=1, drop=0.3).batches() for e in (dataset, latents))
    for step in range(3):
        a, b = next(one), next(other)
        assert a.keys == b.keys and torch.equal(a.views, b.views) and torch.equal(a.lengths, b.lengths)
        for key, view in zip(a.keys, a.views.tolist(), strict=True):
            wide = int(Path(key).stem) % 2
            assert view == [48, 48 + 16 * wide, 0, math.floor(16 * wide * 32 / 48 / 2 + 0.5), 32, 32]
        assert b.tokens.shape == (8, 17, 32)
        with torch.no_grad():
            assert torch.allclose(*(task.module(*task.inputs(x, 0, step)) for x in (a, b)), rtol=1e-2)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=LONG) for k in ("sdxl", "sd3", "flux", "z-image")])
def test_a_lora_is_trained_goes_on_to_the_same_bits_and_draws_in_bare_diffusers(
    models: Any, images: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = models(kind)
    before = {p: p.stat().st_mtime_ns for p in model.rglob("*")}
    words = ["train", str(images), "--from", str(model), "--lora", "2", "--batch", "4", "--steps", "9", "--lr", "0.01"]
    words += ["--save-every", "3", "--size", "32", "--buckets"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    killed = [*words, "--out", str(tmp_path / "killed")]
    running = subprocess.Popen([sys.executable, "-m", "pipelines.cli", *killed], stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoints" / "000003").is_dir():
        assert running.poll() is None
        time.sleep(0.01)
    running.kill()
    assert running.wait() == -signal.SIGKILL and main(killed) == 0
    lora = tmp_path / "whole" / "pytorch_lora_weights.safetensors"
    assert (tmp_path / "killed" / lora.name).read_bytes() == lora.read_bytes()
    assert any(bool(v.any()) for k, v in load_file(lora).items() if "lora_B" in k or "lora.up" in k)
    assert {p: p.stat().st_mtime_ns for p in model.rglob("*")} == before

    drawn = tmp_path / "drawn"
    more = ["--steps", "2", "--seed", "7", "--show-flagged", "--out", str(drawn)]  # noise may be taken for anything
    assert main(["sample", str(model), "a red disc", "--lora", str(tmp_path / "whole"), *more]) == 0
    pipeline: Any = AutoPipelineForText2Image.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    how: dict[str, Any] = {"generator": torch.Generator().manual_seed(7), "num_inference_steps": 2}
    how |= {"height": 32, "width": 32}
    without = np.array(pipeline("a red disc", **how).images[0])
    pipeline.load_lora_weights(tmp_path / "whole")
    how["generator"].manual_seed(7)
    bare = np.array(pipeline("a red disc", **how).images[0])
    assert np.array_equal(bare, np.array(Image.open(next(drawn.glob("*.png"))))) and not np.array_equal(bare, without)


def test_what_can_not_be_trained_is_refused_before_loading(models: Any, images: Path, tmp_path: Path) -> None:
    info = read_model_info(models("sdxl"))
    with pytest.raises(UserError, match="of which LoRAs are trained here, and not the whole: give --lora"):
        check_trainable(info, 32)
    with pytest.raises(UserError, match=r"size 34 does not fit this model: sides are multiples of 4"):
        check_trainable(info, 34, lora=True)
    check_trainable(info, 32, lora=True)
    with pytest.raises(UserError, match="EDM"):
        check_trainable(replace(info, scheduler={"_class_name": "EDMEulerScheduler"}), 32, lora=True)
    with pytest.raises(UserError, match="goes without one of its text encoders"):
        check_trainable(replace(info, configs={"vae": {}, "unet": {}, "text_encoder_2": {}}), 32, lora=True)
    other = replace(info, abilities=replace(info.abilities, text="SanaPipeline"))
    with pytest.raises(UserError, match=r"SimpleTuner trains LoRAs of many others.*docs/training\.md"):
        check_trainable(other, 32, lora=True)


@LONG
def test_the_loss_of_a_lora_falls_and_previews_are_drawn(models: Any, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    words = ["train", str(images), "--from", str(models("sdxl")), "--lora", "4", "--batch", "8", "--steps", "60"]
    assert main([*words, "--lr", "0.02", "--out", str(out)]) == 0
    assert len(list((out / "samples").glob("*.png"))) == 5
    card = (out / "README.md").read_text()
    assert "from diffusers import StableDiffusionXLPipeline" in card and "load_lora_weights" in card
    assert generate_images(load_model(models("sdxl")), ["a red disc"], [0], steps=2)[0].size == (32, 32)
