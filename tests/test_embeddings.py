"""Words that files teach a model: what diffusers makes of them, in the forms of several programs, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForText2Image
from safetensors.torch import save_file

from aesthetic.errors import UserError
from pipelines.cli import main
from tests.small_pipelines import WIDE, save_pipeline
from tests.test_sample_families import SIZE, noise, same
from train.generate.files import read_facts
from train.generate.request import GenerationRequest
from train.generate.sampler import Sampler
from train.models.embeddings import read_embedding
from train.models.info import read_model_info
from train.models.presets import PRESETS
from train.models.unet import new_model


def vectors(count: int, wide: int = WIDE, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, wide, generator=noise(seed))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model") / "discs"
    new_model(PRESETS["debug"], ["a red disc", "a blue disc"] * 4).save_pretrained(folder)
    return folder


def width(model: Path) -> int:
    return int(read_model_info(model).text["hidden_size"])


def test_a_word_is_what_diffusers_makes_of_it(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "learned.safetensors", tmp_path / "out"
    save_file({"<fox>": vectors(2, width(model))}, file)
    words = ["sample", str(model), "a <fox> disc", "--seed", "7", "--steps", "4", "--guidance", "4", "--show-flagged"]
    assert main([*words, "--embedding", str(file), "--out", str(out)]) == 0
    assert "'<fox>' in a prompt means what" in capsys.readouterr().err
    assert main([*words, "--out", str(out)]) == 0
    pipeline: Any = AutoPipelineForText2Image.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_textual_inversion(file)
    theirs = pipeline("a <fox> disc", generator=noise(7), num_inference_steps=4, guidance_scale=4.0).images[0]
    from PIL import Image

    assert same(Image.open(out / "000000.png").convert("RGB"), theirs)
    assert not same(Image.open(out / "000001.png").convert("RGB"), theirs)
    assert len(read_facts(out / "000000.png")["embeddings"][0]["sha256"]) == 64
    capsys.readouterr()
    assert main(["sample", "--again", str(out / "000000.png"), "--show-flagged", "--out", str(out)]) == 0
    assert "bit for bit" in capsys.readouterr().out
    file.unlink()
    assert main(["sample", "--again", str(out / "000000.png"), "--out", str(out)]) == 2
    assert "say where with --embedding" in capsys.readouterr().err


@pytest.mark.long
def test_words_of_other_programs_and_of_two_encoders(model: Path, tmp_path: Path) -> None:
    sdxl = save_pipeline("sdxl", tmp_path / "sdxl")
    save_file({"emb_params": vectors(3, width(model))}, tmp_path / "mine.safetensors")
    assert read_embedding(read_model_info(model), tmp_path / "mine.safetensors").word == "mine"
    both = {"clip_l": vectors(2), "clip_g": vectors(2, seed=1)}
    save_file(both, tmp_path / "zorg.safetensors")
    r = GenerationRequest("a zorg disc", seed=7, steps=2, **SIZE)
    (ours,) = Sampler(sdxl, embeddings=[tmp_path / "zorg.safetensors"], blur=False).generate([r])
    pipeline: Any = AutoPipelineForText2Image.from_pretrained(sdxl)
    pipeline.set_progress_bar_config(disable=True)
    for name, suffix in (("clip_l", ""), ("clip_g", "_2")):
        parts = {part: getattr(pipeline, part + suffix) for part in ("tokenizer", "text_encoder")}
        pipeline.load_textual_inversion(both[name], token="zorg", **parts)
    assert same(ours.image, pipeline("a zorg disc", generator=noise(7), num_inference_steps=2, **SIZE).images[0])


def test_what_teaches_nothing_is_refused_before_the_model_loads(model: Path, tmp_path: Path) -> None:
    info, wide = read_model_info(model), width(model)
    nan = vectors(1, wide)
    nan[0, 0] = float("nan")
    for tensors, why in (
        ({"<fox>": vectors(2, wide + 1)}, "made for another model"),
        ({"<fox>": nan}, "no numbers"),
        ({"clip_l": vectors(1, wide), "clip_g": vectors(1, wide)}, "no textual inversion for"),
        ({"<a>": vectors(1, wide), "<b>": vectors(1, wide)}, "one tensor is expected"),
        ({"two words": vectors(1, wide)}, "no word of a prompt"),
    ):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=why):
            read_embedding(info, tmp_path / "x.safetensors")
    for name, why in (("x.pt", "which can hold no program"), ("y.safetensors", "no such file")):
        (tmp_path / "x.pt").write_bytes(b"x")
        with pytest.raises(UserError, match=why):
            read_embedding(info, tmp_path / name)
    save_file({"disc</w>": vectors(1, wide)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="can't be taught"):
        Sampler(model, embeddings=[tmp_path / "x.safetensors"])
