"""`tastemaker train` from end to end: folders of images to models that diffusers loads; kills, workers, refusals."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipelines.cli import main
from tests.small_train import make_images, saved_state
from train import checkpoint
from train.models.presets import PRESETS
from train.models.unet import load_model

DEBUG = ("--preset", "debug", "--batch", "16")

DRAWS = """
import sys, torch
torch.set_num_threads(1)
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1])
if len(sys.argv) > 2:
    pipeline.load_lora_weights(sys.argv[2])
pipeline.set_progress_bar_config(disable=True)
print(pipeline("a red disc", num_inference_steps=4).images[0].size)
assert not any(m.split(".")[0] in ("train", "curate", "pipelines") for m in sys.modules)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty that can be read, one that can't, one without a caption."""
    torch.set_num_threads(1)
    folder = make_images(tmp_path_factory.mktemp("pictures") / "discs", 61)
    (folder / "060.png").write_bytes((folder / "060.png").read_bytes()[:70])
    (folder / "059.txt").unlink()
    return folder


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model after eight steps; what was printed is in printed.txt."""
    out = tmp_path_factory.mktemp("models") / "discs"
    with open(out.parent / "printed.txt", "w") as printed, contextlib.redirect_stdout(printed):
        assert main(["train", str(images), "--out", str(out), *DEBUG, "--steps", "8", "--json"]) == 0
    return out


def train(*words: Any, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "pipelines.cli", "train", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def losses(model: Path) -> list[tuple[int, float]]:
    path = model / "log.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # is being written
            record = json.loads(line)
            found.append((record["step"], record["loss"]))
    return found


def wait_for_step(model: Path, step: int, process: subprocess.Popen[str]) -> None:
    while not (there := losses(model)) or there[-1][0] < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def weights(model: Path) -> list[torch.Tensor]:
    return [t for k, t in sorted(saved_state(model).items()) if k.startswith(("raw.", "mean."))]


def test_a_folder_of_images_becomes_a_model(images: Path, trained: Path) -> None:
    assert (trained / "model_index.json").is_file() and load_model(trained).unet.config.sample_size == 16
    facts = json.loads((trained / "train.json").read_text())
    printed = (trained.parent / "printed.txt").read_text().splitlines()
    assert printed[0].startswith("trained 8 steps, ") and "held-out loss" in printed[0]
    assert printed[2].startswith("next: tastemaker sample ")
    assert json.loads(printed[-1])["result"] == facts["result"] and facts["result"]["step"] == 8
    assert facts["data"] | {"folder": "", "manifest_sha256": None} == {
        "folder": "", "manifest_sha256": None, "pictures": 61, "trained_on": 54, "held_out": 6, "unreadable": 1,
    }  # fmt: skip
    told = json.loads((trained / "data.json").read_text())
    assert list(told["unreadable"]) == ["60"] and told["unreadable"]["60"].startswith("060.png: ")
    assert facts["settings"]["lr"] == PRESETS["debug"].lr and facts["settings"]["objective"] == "flow"
    assert [s for s, _ in losses(trained)] == list(range(1, 9))
    assert len(facts["prompts"]) == 4 and (trained / "samples" / "000008.png").is_file()
    assert Image.open(trained / "loss.png").size == (1050, 630)
    assert (trained / "latents" / "made.json").is_file()  # each image is seen twice and more
    card = (trained / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n") and "54 captioned images of `discs`" in card
    assert not (trained / "start").exists() and not list(trained.rglob("*.tmp"))


def test_the_same_command_again_finds_all_done_and_another_is_refused(
    images: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file()}
    words = ["train", str(images), "--out", str(trained), *DEBUG, "--steps"]
    assert main([*words, "8"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("trained 8 steps, ")
    assert main([*words, "9", "--lr", "0.01"]) == 2
    said = capsys.readouterr().err
    assert "(steps: 8 then, 9 now; lr: 0.002 then, 0.01 now)" in said and f"--from {trained}" in said
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file()} == before


def refusals(images: Path, trained: Path, tmp: Path) -> Iterator[tuple[list[Any], str]]:
    """(words after `train`, what is said)."""
    (tmp / "empty.txt").write_text("\n \n")
    (tmp / "few").mkdir()
    for name in sorted(images.iterdir())[:6]:
        shutil.copy(name, tmp / "few")
    (tmp / "silent").mkdir()
    (tmp / "broken").mkdir()
    for i, name in enumerate(sorted(images.glob("*.png"))[:20]):
        shutil.copy(name, tmp / "silent")
        (tmp / "broken" / name.name).write_bytes(name.read_bytes()[: 10_000 if i < 5 else 60])
        (tmp / "broken" / f"{name.stem}.txt").write_text("a disc")
    (tmp / "lora").mkdir()
    (tmp / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    yield [tmp / "absent"], "is no folder"
    yield [tmp / "few"], "holds 3 images: too few"
    yield [tmp / "silent"], "has a caption"
    yield [tmp / "broken", "--preset", "debug"], "can be read: at least 8 are needed"
    yield [images, "--preset", "tinny"], "there is no preset 'tinny': debug, tiny"
    yield [images, "--objective", "x0"], "there is no objective 'x0': flow, v, eps"
    yield [images, "--preset", "debug", "--size", 17], "sides are multiples of 2"
    yield [images, "--preset", "debug", "--batch", 62], "--batch 62 is more than the 61 images"
    yield [images, "--preset", "debug", "--batch", 60], "--batch 60 is more than the 54 images to train on"
    yield [images, "--batch", 9, "--workers", 2], "--batch 9 can't be shared evenly by 2 workers"
    yield [images, "--lr", 0], "--lr 0.0: a number above 0"
    yield [images, "--weight-by", "beauty"], "has a number 'beauty'"
    yield [images, "--prompts", tmp / "none.txt"], "there is no such file"
    yield [images, "--prompts", tmp / "empty.txt"], "is empty"
    yield [images, "--lora"], "say which with --from"
    yield [images, "--preset", "debug", "--from", trained], "exclude each other"
    yield [images, "--from", trained, "--objective", "v"], "--objective is for new models"
    yield [images, "--from", images], "holds no diffusers pipeline"
    yield [images, "--from", tmp / "lora"], "is a LoRA: give --from the model"
    yield [images, "--from", trained, "--size", 17], "sides are multiples of 2"


def test_what_cannot_be_trained_is_said_and_nothing_is_written(
    images: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    for words, message in refusals(images, trained, tmp_path):
        code = main(["train", *map(str, words), "--out", str(out)])
        said = capsys.readouterr().err
        assert code == 2 and message in said, (words, said)
        assert not out.exists(), words
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    assert main(["train", str(images), "--out", str(tmp_path / "other")]) == 2
    assert "holds something else (thesis.tex)" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_help_starts_neither_ray_nor_torch() -> None:
    code = "import sys; from pipelines.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'ray', 'diffusers', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--weight-by COLUMN" in done.stdout


# ------------------------------------------------------------------------------------------------------- what follows


@pytest.mark.long
def test_diffusers_loads_the_folder_in_a_clean_process(trained: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", DRAWS, str(trained)]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout == "(16, 16)\n"


@pytest.mark.long
def test_a_lora_and_further_training_begin_with_a_model(images: Path, trained: Path, tmp_path: Path) -> None:
    common = ["train", str(images), "--from", str(trained), "--steps", "6", "--batch", "8", "--out"]
    assert main([*common, str(tmp_path / "lora"), "--lora", "4", "--lr", "0.01"]) == 0
    assert not (tmp_path / "lora" / "model_index.json").exists()
    facts = json.loads((tmp_path / "lora" / "train.json").read_text())
    assert facts["settings"]["lora"] == 4 and facts["settings"]["from"] == str(trained)
    command = [sys.executable, "-c", DRAWS, str(trained), str(tmp_path / "lora")]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout == "(16, 16)\n"
    assert "- lora" in (tmp_path / "lora" / "README.md").read_text()

    assert main([*common, str(tmp_path / "further")]) == 0
    facts = json.loads((tmp_path / "further" / "train.json").read_text())
    assert facts["settings"]["lr"] == pytest.approx(PRESETS["debug"].lr / 10)
    one, other = load_model(trained), load_model(tmp_path / "further")
    assert torch.equal(next(one.text_encoder.parameters()), next(other.text_encoder.parameters()))
    assert not torch.equal(next(one.unet.parameters()), next(other.unet.parameters()))
    first = json.loads((tmp_path / "further" / "log.jsonl").read_text().splitlines()[0])
    last = json.loads((trained / "log.jsonl").read_text().splitlines()[-1])
    assert first["loss"] < last["loss"] * 1.5  # it begins with what was learnt


@pytest.mark.long
def test_shards_of_scored_images_in_several_shapes(tmp_path: Path) -> None:
    words = ["train", str(images), "--out", str(tmp_path / "m"), *DEBUG[2:], "--preset", "small", "--steps", "20"]
    import cv2

    from curate.shards.tar import TarWriter

    rng = np.random.default_rng(0)
    with open(tmp_path / "00000.tar", "wb") as f:
        tar = TarWriter(f)
        for i in range(60):
            height, width = [(24, 24), (24, 48)][i % 2]
            data = cv2.imencode(".png", rng.integers(0, 255, (height, width, 3), np.uint8))[1].tobytes()
            facts = {"key": f"{i:09d}", "caption": "noise", "width": width, "height": height, "taste": float(i % 3)}
            tar.add_sample(facts["key"], data, "png", "noise", facts)
        tar.close()
    (tmp_path / "prompts.txt").write_text("noise\n\nmore noise\n")
    words = ["--buckets", "--weight-by", "taste", "--prompts", str(tmp_path / "prompts.txt"), "--steps", "3"]
    out = tmp_path / "model"
    assert main(["train", str(tmp_path), "--out", str(out), *DEBUG, *words]) == 0
    facts = json.loads((out / "train.json").read_text())
    assert facts["prompts"] == ["noise", "more noise"] and facts["settings"]["weight_by"] == "taste"
    assert not (out / "latents").exists()  # 48 images are drawn from 54


@pytest.mark.long
def test_an_autoencoder_of_its_own_is_trained_first(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    small = replace(PRESETS["debug"], vae=(16, 16), factor=2, latents=4)
    monkeypatch.setitem(PRESETS, "small", small)
    words = [
        "train",
        str(images),
        "--out",
        str(tmp_path / "m"),
        "--preset",
        "small",
        "--batch",
        "16",
        "--steps",
        "20",
    ]
    assert main(words) == 0
    said = capfd.readouterr()
    assert "autoencoder step 4/4" in said.err and "PSNR" in said.err and "autoencoder" in said.out
    pipeline = load_model(tmp_path / "m")
    assert pipeline.vae.config.scaling_factor != 1 and pipeline.vae_scale_factor == 2
    assert list((tmp_path / "m" / "vae-training" / "samples").glob("*.png"))


# -------------------------------------------------------------------------------------------------------------- kills

LONG = (*DEBUG, "--steps", "120", "--save-every", "40")


@pytest.fixture(scope="module")
def unkilled(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unkilled") / "model"
    process = train(images, "--out", out, *LONG)
    assert process.wait() == 0, process.communicate()
    return out


@pytest.mark.long
def test_a_killed_run_goes_on_when_the_command_is_typed_again(images: Path, unkilled: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    process = train(images, "--out", out, *LONG)
    wait_for_step(out, 48, process)
    process.kill()
    process.communicate()
    assert list(checkpoint.checkpoints(out)) == [40] and not (out / "model_index.json").exists()
    process = train(images, "--out", out, *LONG)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert "step 42/120" in said and "step 39/120" not in said
    assert losses(out) == losses(unkilled) and len(losses(out)) == 42
    assert all(torch.equal(a, b) for a, b in zip(weights(out), weights(unkilled), strict=True))
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == (
        unkilled / "unet" / "diffusion_pytorch_model.safetensors"
    ).read_bytes()


@pytest.mark.long
def test_ctrl_c_saves_a_checkpoint_and_the_same_command_goes_on_from_it(
    images: Path, unkilled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    process = train(images, "--out", out, *LONG)
    wait_for_step(out, 45, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130 and "run the same command again to go on" in said
    there = checkpoint.checkpoints(out)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [f"{s:06d}" for s in there]
    last = max(there)
    assert 40 in there and last >= 45 and f"step {last}/120" in said
    load_model(there[last] / "pipeline")
    process = train(images, "--out", out, *LONG)
    _, said = process.communicate()
    assert process.returncode == 0 and f"goes on from step {last}, {there[last]}" in said
    assert all(torch.equal(a, b) for a, b in zip(weights(out), weights(unkilled), strict=True))


# ---------------------------------------------------------------------------------------------------------------- Ray


@pytest.mark.long
def test_two_workers_make_the_model_that_one_makes(images: Path, tmp_path: Path) -> None:
    words = [*DEBUG, "--steps", "6", "--record-loss"]
    alone = train(images, "--out", tmp_path / "one", *words)
    assert alone.wait() == 0, alone.communicate()
    together = train(images, "--out", tmp_path / "two", *words, "--workers", 2)
    _, said = together.communicate()
    assert together.returncode == 0, said
    assert "2 workers" in said and "step 6/6" in said
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=1e-5)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    # one number may be further off: where a gradient is 0 but for rounding, as that of an attention's key bias, Adam
    # makes steps as large as any of it
    apart = torch.cat([(a - b).flatten() for a, b in zip(one, two, strict=True)])
    assert float(apart.square().mean().sqrt()) < 1e-5 and float(apart.abs().max()) < 1e-4
    assert load_model(tmp_path / "two").unet.config.sample_size == 16


@pytest.mark.long
def test_ctrl_c_saves_a_checkpoint_with_two_workers_too(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    words = [*DEBUG, "--steps", "5000", "--save-every", "5000", "--workers", 2]
    process = train(images, "--out", out, *words)
    wait_for_step(out, 100, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    there = checkpoint.checkpoints(out)
    assert len(there) == 1 and max(there) >= 100 and losses(out)[-1][0] == max(there)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Ray Train's workers below a driver."""
    found = []
    for p in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(p.cmdline()):
                found.append(p)
    return found


@pytest.mark.long
@pytest.mark.parametrize("whom", [lambda workers: workers[:1], lambda workers: workers[1:]], ids=["first", "second"])
def test_a_worker_that_is_killed_is_replaced(
    images: Path, tmp_path: Path, whom: Callable[[list[psutil.Process]], list[psutil.Process]]
) -> None:
    """The losses are in the end those of a run that nobody killed."""
    whole = train(images, "--out", tmp_path / "whole", *LONG, "--workers", 2)
    assert whole.wait() == 0, whole.communicate()
    process = train(images, "--out", tmp_path / "killed", *LONG, "--workers", 2)
    wait_for_step(tmp_path / "killed", 45, process)
    for worker in whom(workers_of(process)):
        worker.kill()
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert "a worker was lost: all go on from the last checkpoint" in said
    assert np.allclose(losses(tmp_path / "killed"), losses(tmp_path / "whole"), atol=1e-6)


@pytest.mark.long
def test_an_error_of_a_worker_is_no_lost_worker(images: Path, tmp_path: Path) -> None:
    """Weights of another shape are a RuntimeError of torch's: it is told at once, and not tried nine times."""
    out = tmp_path / "model"
    process = train(images, "--out", out, *LONG, "--workers", 2)
    wait_for_step(out, 45, process)
    process.send_signal(signal.SIGINT)
    process.communicate()
    there = checkpoint.checkpoints(out)
    folder = there[max(there)]
    state = saved_state(out)
    (file,) = (folder / "trainer").iterdir()
    save_file({**state, "raw.denoiser.conv_in.weight": torch.zeros(7, 7, 7, 7)}, file)
    record = json.loads((folder / "record.json").read_text())
    record["files"][f"trainer/{file.name}"] = file.stat().st_size
    (folder / "record.json").write_text(json.dumps(record))
    again = train(images, "--out", out, *LONG, "--workers", 2)
    _, said = again.communicate(timeout=300)
    assert again.returncode == 1 and "a worker was lost" not in said, said


# ----------------------------------------------------------------------------------------------------------- torchrun


def torchrun(*words: Any, restarts: int = 0) -> subprocess.Popen[str]:
    """The command in two processes of torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "-m", "pipelines.cli", "train", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def processes_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Those that torchrun has started, by their ranks."""
    found = [p for p in psutil.Process(process.pid).children() if "pipelines.cli" in " ".join(p.cmdline())]
    return sorted(found, key=lambda p: int(p.environ()["RANK"]))


@pytest.mark.long
@pytest.mark.parametrize("how", [[], ["--shard"]], ids=["replicated", "sharded"])
def test_torchrun_makes_the_model_that_one_process_makes_and_one_voice_is_heard(
    images: Path, tmp_path: Path, how: list[str]
) -> None:
    words = [*DEBUG, "--steps", "6", "--record-loss"]
    alone = train(images, "--out", tmp_path / "one", *words)
    assert alone.wait() == 0, alone.communicate()
    together = torchrun(images, "--out", tmp_path / "two", *words, *how)
    out, said = together.communicate(timeout=300)
    assert together.returncode == 0, said
    assert out.count("trained 6 steps") == 1 and said.count("step 6/6") == 1 and "2 processes with the CPU each" in said
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=1e-5)
    tables = [pd.read_parquet(tmp_path / name / "losses.parquet").set_index("key") for name in ("one", "two")]
    assert tables[0].index.equals(tables[1].index) and np.allclose(tables[0].loss, tables[1].loss, atol=1e-4)
    apart = torch.cat([(a - b).flatten() for a, b in zip(*map(weights, (tmp_path / "one", tmp_path / "two")))])  # noqa: B905
    assert float(apart.square().mean().sqrt()) < 1e-6 and float(apart.abs().max()) < 1e-4
    assert load_model(tmp_path / "two").unet.config.sample_size == 16
    refused = torchrun(images, "--out", tmp_path / "three", *words, "--workers", "3")
    _, said = refused.communicate(timeout=300)
    assert refused.returncode != 0 and "torchrun has started 2 processes" in said


@pytest.mark.long
@pytest.mark.parametrize("whom", [0, 1])
def test_torchrun_starts_all_again_from_the_checkpoint_where_one_is_killed(
    images: Path, unkilled: Path, tmp_path: Path, whom: int
) -> None:
    out = tmp_path / "model"
    process = torchrun(images, "--out", out, *LONG, restarts=1)
    wait_for_step(out, 45, process)
    processes_of(process)[whom].kill()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "goes on from step 40, " in said
    assert [s for s, _ in losses(out)] == [s for s, _ in losses(unkilled)]
    assert np.allclose(losses(out), losses(unkilled), atol=1e-3)


@pytest.mark.long
def test_ctrl_c_under_torchrun_saves_a_checkpoint(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    process = torchrun(images, "--out", out, *DEBUG, "--steps", "5000", "--save-every", "5000")
    wait_for_step(out, 100, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    there = checkpoint.checkpoints(out)
    assert len(there) == 1 and max(there) >= 100, said
    assert not (out / "model_index.json").exists()
