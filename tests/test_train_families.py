"""Families of models: each says what its own diffusers pipeline says, and a transformer is trained like a UNet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from aesthetic.errors import UserError
from pipelines.cli import main
from tests.small_train import make_images, small_run
from train.data import ImageDataset, Stream, open_samples, ordered_batches
from train.latents import precompute_latents
from train.models.base import count_parameters
from train.models.family import family_of, load_model, new_model, tokenize
from train.models.given import find_text_encoder, find_vae, with_vae
from train.models.presets import PRESETS, TransformerPreset
from train.objective import objective_of
from train.optimizer import MuonAdamW, new_optimizer
from train.tasks import Denoise, generate_images

CAPTIONS = ["a red star on a teal background", "a blue circle on a white background"] * 10
TINY = PRESETS["debug-dit"]
NO_VIEWS = torch.zeros(2, 6)  # which these families do not read

CLEAN = """
import sys, numpy as np, torch
torch.set_num_threads(1)
from diffusers import ZImagePipeline
pipeline = ZImagePipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
if len(sys.argv) > 3:
    pipeline.load_lora_weights(sys.argv[3])
image = pipeline("a red disc", height=16, width=16, num_inference_steps=20, guidance_scale=2.0,
                 generator=torch.Generator().manual_seed(7))
np.save(sys.argv[2], np.array(image.images[0]))
assert not any(m.split(".")[0] in ("train", "curate", "aesthetic") for m in sys.modules)
"""


def drawn_elsewhere(folder: Path, model: Path, *lora: str) -> np.ndarray:
    """The image that diffusers alone draws, in a process of its own."""
    command = [sys.executable, "-c", CLEAN, str(model), str(folder / "there.npy"), *lora]
    subprocess.run(command, check=True, cwd=folder, capture_output=True)
    return np.asarray(np.load(folder / "there.npy"))


def drawn_here(pipeline: Any) -> np.ndarray:
    return np.array(generate_images(pipeline, ["a red disc"], [7])[0])


@pytest.fixture(scope="module")
def pipeline() -> Any:
    torch.set_num_threads(1)
    return new_model("debug-dit", CAPTIONS)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs of several shapes of images, their captions of several lengths."""
    folder = make_images(tmp_path_factory.mktemp("images"), 48)
    for i, path in enumerate(sorted(folder.glob("*.png"))[:16]):
        cv2.imwrite(str(path), np.asarray(cv2.imread(str(path)))[4:16])  # wide
        path.with_suffix(".txt").write_text("a wide disc of a colour that needs more words than others " * (1 + i % 4))
    return folder


def padded(tokens: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths, and all captions as one tensor."""
    return torch.tensor([len(row) for row in tokens]), torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)


# ------------------------------------------------------------------------------------------------ against diffusers


@pytest.mark.parametrize("preset", ["debug", "debug-dit"])
def test_a_network_that_knows_the_image_is_sampled_to_it_by_the_familys_own_pipeline(preset: str) -> None:
    """A denoiser that answers in the network's own units and sign: the pipeline lands on x0, and `predict` gives the
    objective's target."""
    made = new_model(preset, CAPTIONS)
    family, size = family_of(made), PRESETS[preset].size
    x0 = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def unet(x: torch.Tensor, t: torch.Tensor, *args: Any, **more: Any) -> Any:
        return ((x - x0) / (t.reshape(-1, 1, 1, 1) / 1000),)

    def transformer(x: list[torch.Tensor], t: torch.Tensor, *args: Any, **more: Any) -> Any:
        return ([-(one - x0[0][:, None]) / (1 - share) for one, share in zip(x, t, strict=True)],)

    family.network(made).forward = unet if preset == "debug" else transformer
    found = torch.from_numpy(np.array(generate_images(made, ["a red star"], [0], steps=20)[0]))
    assert float((found.permute(2, 0, 1) - (x0[0] + 1) * 127.5).abs().max()) < 1.5  # of 255, rounding

    noise, t = torch.randn(2, 3, size, size), torch.tensor([130.0, 990.0])
    x_t, target, _ = objective_of(made.scheduler).noised(x0.expand(2, -1, -1, -1), noise, t)
    lengths, tokens = padded(family.tokenize(made, ["a red star", ""]))
    text = family.encode_text(made.text_encoder, tokens, lengths)
    assert torch.allclose(family.predict(family.network(made), x_t, t, text, lengths, NO_VIEWS), target, atol=1e-4)


def test_captions_are_read_as_the_pipeline_reads_prompts(pipeline: Any) -> None:
    prompts = ["a red star", "", "a star of no colour that anybody has ever seen, and of no size " * 20]
    family = family_of(pipeline)
    lengths, tokens = padded(family.tokenize(pipeline, prompts))
    assert lengths.tolist()[1:] == [1, 512]
    states = family.encode_text(pipeline.text_encoder, tokens, lengths)
    theirs, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, device=torch.device("cpu"))
    for ours, length, other in zip(states, lengths, theirs, strict=True):
        assert torch.allclose(ours[:length], other, atol=1e-5)


def test_a_new_transformer_answers_nothing_and_learns_in_all_its_parts(images: Path) -> None:
    made = new_model("debug-dit", CAPTIONS)
    task = Denoise(made)
    examples = ImageDataset(open_samples(images), lambda c: tokenize(made, c), 16)
    batch = next(Stream(examples, np.arange(48), batch=8).batches())
    x0, _, t, words, lengths, views = task.inputs(batch, 0, 0)
    text = task.family.encode_text(made.text_encoder, words, lengths)
    assert float(task.family.predict(made.transformer, x0, t, text, lengths, views).detach().abs().max()) == 0
    frozen = {n for n, p in made.text_encoder.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in made.text_encoder.named_parameters() if n.startswith(("layers.1.", "norm."))}
    trained = {n: p for n, p in task.module.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    for step in range(4):  # what begins with zeros lets gradients through one after the other
        task.module(*task.inputs(batch, 0, step)).mean().backward()
        assert all(p.grad is not None for p in trained.values())  # as DistributedDataParallel wants it
        optimizer.step()
        optimizer.zero_grad()
    assert [n for n, p in trained.items() if torch.equal(p, before[n])] == ["denoiser.x_pad_token"]  # 64 tokens


def test_the_same_seed_builds_the_same_transformer(pipeline: Any) -> None:
    again, other = new_model("debug-dit", CAPTIONS), new_model("debug-dit", CAPTIONS, seed=1)
    weight = pipeline.transformer.layers[0].attention.to_q.weight
    assert torch.equal(weight, again.transformer.layers[0].attention.to_q.weight)
    assert not torch.equal(weight, other.transformer.layers[0].attention.to_q.weight)
    assert pipeline.tokenizer.tokenize("a red star") == ["a", "Ġred", "Ġstar"]
    for text in ("zebra crossing 12", "naïve “ö”", "星"):
        assert pipeline.tokenizer.decode(pipeline.tokenizer(text).input_ids) == text


@pytest.mark.long
def test_transformers_have_the_parameters_that_their_presets_promise() -> None:
    with torch.device("meta"):
        found = {n: new_model(n, CAPTIONS).transformer for n in PRESETS if n.startswith("dit-256")}
    millions = {n: round(count_parameters([m]) / 1e6) for n, m in found.items()}
    assert millions == {"dit-256": 59, "dit-256-l": 157, "dit-256-xl": 587}


# --------------------------------------------------------------------------------------------------------- training


def test_a_transformer_goes_on_to_the_same_bits(images: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"preset": "debug-dit", "steps": 4, "muon": 0.02}
    whole = list(small_run(images, tmp_path / "whole", **settings))
    assert whole[-1]["held_out"]["ema"] < 2 and Path(whole[-1]["samples"]).is_file()
    asked = iter([False, True])
    records = list(small_run(images, tmp_path / "stopped", stop=lambda: next(asked), **settings))
    assert [r["step"] for r in records] == [1, 2]
    records += list(small_run(images, tmp_path / "stopped", **settings))
    assert [r["loss"] for r in records] == [r["loss"] for r in whole]
    one, other = (tmp_path / name / "checkpoints" / "000004" / "pipeline" for name in ("whole", "stopped"))
    for part in ("transformer/diffusion_pytorch_model", "text_encoder/model"):
        assert (one / f"{part}.safetensors").read_bytes() == (other / f"{part}.safetensors").read_bytes()
    saved = load_model(one)
    assert family_of(saved).default_size(saved) == 16


@pytest.mark.long
def test_what_is_trained_draws_the_same_in_a_clean_process(images: Path, tmp_path: Path) -> None:
    records = list(small_run(images, tmp_path, preset="debug-dit", steps=60, log_every=20, muon=0.02))
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    folder = tmp_path / "checkpoints" / "000060" / "pipeline"
    here = drawn_here(load_model(folder))
    assert here.shape == (16, 16, 3) and here.std() > 1
    assert np.array_equal(here, drawn_elsewhere(tmp_path, folder))

    lora = list(small_run(images, tmp_path / "lora", start=folder, steps=10))
    assert lora[-1]["held_out"]["ema"] < records[-1]["held_out"]["ema"] + 0.01
    dressed = load_model(folder)
    dressed.load_lora_weights(tmp_path / "lora" / "checkpoints" / "000010" / "lora")
    with_lora = drawn_here(dressed)
    assert not np.array_equal(with_lora, here)
    assert np.array_equal(
        with_lora, drawn_elsewhere(tmp_path, folder, str(tmp_path / "lora" / "checkpoints" / "000010" / "lora"))
    )


def test_captions_of_other_lengths_and_images_of_other_shapes_change_nothing_for_a_sample(
    pipeline: Any, images: Path
) -> None:
    """The loss of an image in a batch is that which it has alone."""
    examples = ImageDataset(open_samples(images), lambda c: tokenize(pipeline, c), 16, buckets=True, step=2, least=4)
    assert len(examples.shapes) > 1
    made = new_model("debug-dit", CAPTIONS)
    with torch.no_grad():  # so that it answers something
        for p in made.transformer.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    task, shapes = Denoise(made), set()
    for batch in ordered_batches(examples, np.arange(0, 48, 9), 3):
        shapes.add(tuple(batch.images.shape[2:]))
        together = task.held_out_losses(batch, 0).detach()
        for i, slot in enumerate(batch.slots):
            alone = next(ordered_batches(examples, np.array([slot]), 1))
            assert torch.allclose(task.held_out_losses(alone, 0)[0].detach(), together[i], rtol=1e-4)
    assert len(shapes) == len(examples.shapes)


@pytest.mark.long
def test_muon_learns_in_fewer_steps(images: Path, tmp_path: Path) -> None:
    last = {}
    for muon in (0.0, 0.02):
        records = list(small_run(images, tmp_path / str(muon), preset="debug-dit", steps=80, log_every=40, muon=muon))
        last[muon] = records[-1]["held_out"]["raw"]
    assert last[0.02] < last[0.0]


def test_muon_is_for_the_matrices_of_blocks_and_its_rate_follows() -> None:
    made = new_model("debug-dit", CAPTIONS)
    task = Denoise(made)
    matrices = task.matrices()
    shapes = {tuple(p.shape) for p in matrices}
    assert shapes == {(32, 32), (85, 32), (32, 85), (128, 32)}
    params = [p for p in task.module.parameters() if p.requires_grad]
    optimizer = new_optimizer(params, matrices, lr=1e-3, muon=0.02, weight_decay=0.01)
    assert isinstance(optimizer, MuonAdamW)
    assert sorted(id(p) for g in optimizer.param_groups for p in g["params"]) == sorted(map(id, params))
    assert type(new_optimizer(params, matrices, lr=1e-3, muon=0.0, weight_decay=0.01)) is torch.optim.AdamW


# ------------------------------------------------------------------------------------------------- parts of others


def language_model(folder: Path, kind: str = "Qwen3") -> Path:
    """A tiny language model with its head and its tokenizer, as people save one."""
    import transformers

    tokenizer = new_model("debug-dit", CAPTIONS).tokenizer
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=12,
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def autoencoder(folder: Path) -> Path:
    """One of 16 channels, and with a shift."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=16,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, scaling_factor=3.5, shift_factor=0.12,
    )  # fmt: skip
    vae.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["Qwen3", pytest.param("Llama", marks=pytest.mark.long)])
def test_a_frozen_language_model_and_an_autoencoder_of_16_channels_are_used_as_they_are(
    images: Path, tmp_path: Path, kind: str
) -> None:
    assert isinstance(TINY, TransformerPreset)
    text = find_text_encoder(str(language_model(tmp_path / "llm", kind)))
    vae = find_vae(str(autoencoder(tmp_path / "vae")))
    preset = replace(with_vae(TINY, vae), size=32)
    assert (preset.latents, preset.factor, preset.step) == (16, 2, 4)
    made = new_model(preset, CAPTIONS, vae=vae, text_encoder=text)
    assert made.transformer.config.cap_feat_dim == 24 and made.transformer.config.in_channels == 16
    made.save_pretrained(tmp_path / "model")
    made = load_model(tmp_path / "model")

    dataset = ImageDataset(open_samples(images), lambda c: tokenize(made, c), 32)
    task, everything = Denoise(made, text=False), np.arange(48)
    latents = precompute_latents(made, dataset, everything, tmp_path / "latents", text=True, shard_size=20)
    one, other = (Stream(e, everything, batch=8, seed=1, drop=0.3).batches() for e in (dataset, latents))
    for step in range(3):
        a, b = next(one), next(other)
        assert a.keys == b.keys and torch.equal(a.lengths, b.lengths) and len(set(a.lengths.tolist())) > 1
        assert b.images.shape[1] == 16 and b.tokens.shape[2] == 24
        with torch.no_grad():
            assert torch.allclose(*(task.module(*task.inputs(x, 0, step)) for x in (a, b)), rtol=1e-2)
    # what is encoded, the pipeline decodes
    x = next(ordered_batches(dataset, everything, 4)).images
    z = task.family.encode_images(made.vae, x)
    assert torch.allclose(z / 3.5 + 0.12, made.vae.encode(x).latent_dist.mode(), atol=1e-5)
    assert generate_images(made, ["a red disc"], [0], steps=2)[0].size == (32, 32)


def test_parts_that_can_not_be_used_are_refused_by_name(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"of the type 'bert' can't be used here; what can is qwen3"):
        find_text_encoder(str(tmp_path / "bert"))
    with pytest.raises(UserError, match="nowhere"):
        find_text_encoder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="an AutoencoderKL is expected, not None"):
        find_vae(str(tmp_path / "bert"))
    with pytest.raises(UserError, match="holds no autoencoder"):
        find_vae(str(tmp_path))
    with pytest.raises(UserError, match="learns by flow, not by v"):
        new_model("debug-dit", CAPTIONS, "v")
    from diffusers import DiffusionPipeline

    with pytest.raises(UserError, match="a DiffusionPipeline can't be trained here"):
        family_of(DiffusionPipeline())


# ------------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--preset", "debug", "--vae", "x"], "--vae is for transformers, and debug is a UNet"),
        (["--text-encoder", "x"], "--text-encoder is for new transformers"),
        (["--preset", "dit-tiny", "--objective", "v"], "which learns by flow alone"),
        (["--preset", "dit-tiny", "--size", "33"], "sides are multiples of 2"),
        (["--preset", "dit-tiny", "--vae", "nowhere"], "nowhere is no folder"),
    ],
)
def test_what_a_transformer_can_not_be_is_refused_at_once(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert main(["train", str(images), "--out", str(tmp_path / "m"), *words]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "m").exists()


@pytest.mark.long
def test_the_command_trains_a_transformer_on_parts_of_others(images: Path, tmp_path: Path) -> None:
    text, vae = language_model(tmp_path / "llm"), autoencoder(tmp_path / "vae")
    given = ["--text-encoder", str(text), "--vae", str(vae), "--size", "32", "--buckets"]
    out = tmp_path / "model"
    words = ["train", str(images), "--out", str(out), "--preset", "debug-dit", "--batch", "8", "--steps", "12", *given]
    assert main(words) == 0
    card = (out / "README.md").read_text()
    assert "from diffusers import ZImagePipeline" in card and "height=32, width=32" in card and "Muon at 0.02" in card
    made = load_model(out)
    before = load_file(vae / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[k], v) for k, v in made.vae.state_dict().items())
    head = load_file(text / "model.safetensors")
    assert all(torch.equal(head[f"model.{k}"], v) for k, v in made.text_encoder.state_dict().items())
    assert made.vae.config.shift_factor == 0.12 and family_of(made).default_size(made) == 32

    more = ["train", str(images), "--from", str(out), "--batch", "8", "--steps", "2"]
    assert main([*more, "--out", str(tmp_path / "further")]) == 0
    assert main([*more, "--out", str(tmp_path / "lora"), "--lora", "2"]) == 0
    assert not torch.equal(
        next(load_model(tmp_path / "further").transformer.parameters()), next(made.transformer.parameters())
    )
    for number, name in enumerate(("further", "model")):
        lora = ["--lora", str(tmp_path / "lora")] if name == "model" else []
        drawn = tmp_path / f"drawn-{number}"
        assert main(["sample", str(tmp_path / name), "a red disc", *lora, "--steps", "2", "--out", str(drawn)]) == 0
        assert Image.open(next(drawn.glob("*.png"))).size == (32, 32)


@pytest.mark.long
@pytest.mark.parametrize("more", [[], ["--shard"]])
def test_two_processes_train_a_transformer_as_one_does(images: Path, tmp_path: Path, more: list[str]) -> None:
    """With Muon on what may be sharded, and a text encoder that is asked for the states inside of it."""
    words = ["train", str(images), "--preset", "debug-dit", "--batch", "8", "--steps", "6", "--out"]
    assert main([*words, str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "pipelines.cli", *words, str(tmp_path / "two"), *more]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == 6 and np.allclose(one, two, rtol=2e-3)
    assert family_of(load_model(tmp_path / "two")).default_size(load_model(tmp_path / "two")) == 16
