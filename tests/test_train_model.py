"""What is built and saved is a pipeline that any diffusers client loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aesthetic.errors import UserError
from train.models.autoencoder import pixel_vae
from train.models.base import count_parameters
from train.models.presets import OBJECTIVES, PRESETS
from train.models.unet import UnetFamily, load_model, new_model
from train.tasks import generate_images

UNET = UnetFamily()
CAPTIONS = ["a red star on a teal background", "a blue circle on a white background"] * 10

CLEAN = """
import sys, numpy as np, torch
torch.set_num_threads(1)
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
image = pipeline("a red star", num_inference_steps=20, guidance_scale=3.0, generator=torch.Generator().manual_seed(7))
np.save(sys.argv[2], np.array(image.images[0]))
assert not any(m.split(".")[0] in ("train", "curate", "aesthetic") for m in sys.modules)
"""


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return new_model("debug", CAPTIONS)


@pytest.mark.long
def test_a_saved_pipeline_draws_the_same_in_a_clean_process(pipeline: Any, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    pipeline.save_pretrained(tmp_path / "model")
    here = np.array(generate_images(pipeline, ["a red star"], [7])[0])
    command = [sys.executable, "-c", CLEAN, str(tmp_path / "model"), str(tmp_path / "there.npy")]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    assert here.shape == (16, 16, 3) and here.std() > 1
    assert np.array_equal(here, np.load(tmp_path / "there.npy"))
    again = load_model(tmp_path / "model")
    assert np.array_equal(here, np.array(generate_images(again, ["a red star"], [7])[0]))
    assert UNET.default_size(again) == 16


def test_the_same_seed_builds_the_same_weights(pipeline: Any) -> None:
    state = torch.random.get_rng_state()
    again, other = new_model("debug", CAPTIONS), new_model("debug", CAPTIONS, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    weight = pipeline.unet.conv_in.weight
    assert torch.equal(weight, again.unet.conv_in.weight) and not torch.equal(weight, other.unet.conv_in.weight)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_draws_in_the_same_pipeline_class(name: str) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    made = new_model("debug", CAPTIONS, name)
    image = generate_images(made, ["a red star"], [0], steps=4)[0]
    assert np.array(image).std() > 1
    over = StableDiffusionImg2ImgPipeline.from_pipe(made)
    over.set_progress_bar_config(disable=True)
    assert over("a red star", image=image.resize((16, 16)), strength=0.5, num_inference_steps=4).images[0].size == (
        16,
        16,
    )


def test_pixels_come_back_from_the_pixel_vae() -> None:
    vae = pixel_vae(32)
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x[1], x[2, :, :16] = 1.0, -1.0
    z = UNET.encode_images(vae, x)
    assert float((z - x).abs().max()) < 1e-6
    with torch.no_grad():
        assert float((vae.decode(5 * z).sample - 5 * x).abs().max()) < 1e-5
    assert float(vae.encode(x).latent_dist.std.max()) < 1e-6


def test_the_tokenizer_writes_any_text(pipeline: Any) -> None:
    tokenizer = pipeline.tokenizer
    assert tokenizer.tokenize("a red star") == ["a</w>", "red</w>", "star</w>"]
    assert len(tokenizer) > 514
    for text in ("zebra crossing 12", "naïve “ö”", "星"):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in ids[1:-1]  # which would be unknown
        assert tokenizer.decode(ids[1:-1]).replace(" ", "") == text.replace(" ", "")
    assert [len(t) for t in UNET.tokenize(pipeline, ["", "a red star " * 20])] == [16, 16]
    assert pipeline.text_encoder.config.eos_token_id == tokenizer.eos_token_id


def test_sd15_is_stable_diffusion_by_its_parameters() -> None:
    """Published: UNet 859.5 M, text encoder 123.1 M, autoencoder 83.7 M."""
    with torch.device("meta"):
        made = new_model("sd15", CAPTIONS, "eps")
    assert count_parameters([made.unet]) == 859_520_964
    assert count_parameters([made.vae]) == 83_653_863
    words = (PRESETS["sd15"].vocabulary - made.text_encoder.config.vocab_size) * 768
    assert count_parameters([made.text_encoder]) + words == 123_060_480


def test_what_is_no_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no diffusers pipeline"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="no diffusers pipeline"):
        load_model(tmp_path / "absent")
    (tmp_path / "checkpoints" / "000010" / "pipeline").mkdir(parents=True)
    with pytest.raises(UserError, match=r"Did you mean .*000010"):
        load_model(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="_class_name is missing"):
        load_model(tmp_path)


def test_a_hub_that_does_not_have_it_or_cannot_be_reached_is_told_with_the_ways_on() -> None:
    with pytest.raises(UserError, match=r"(?s)neither a folder.*hf download no-such-owner/no-such-model.*HF_ENDPOINT"):
        load_model("no-such-owner/no-such-model")


def test_a_lora_goes_to_disk_and_back(pipeline: Any, tmp_path: Path) -> None:
    """Random matrices stand in for trained ones here; tests of the loop train some."""
    before = np.array(generate_images(pipeline, ["a red star"], [7], steps=4)[0])
    made = new_model("debug", CAPTIONS)
    UNET.add_lora(made, rank=2)
    assert np.array_equal(before, np.array(generate_images(made, ["a red star"], [7], steps=4)[0]))  # nothing yet
    trained = [p for p in made.unet.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in trained) < 0.05 * count_parameters([made.unet])
    with torch.no_grad():
        for p in trained:
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    with_lora = np.array(generate_images(made, ["a red star"], [7], steps=4)[0])
    UNET.save_lora(made, tmp_path)
    other = new_model("debug", CAPTIONS)
    other.load_lora_weights(tmp_path)
    assert not np.array_equal(with_lora, before)
    assert np.array_equal(with_lora, np.array(generate_images(other, ["a red star"], [7], steps=4)[0]))
