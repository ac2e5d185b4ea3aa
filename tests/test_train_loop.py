"""The loop: the same numbers as diffusers' own, through kills, over ranks and however a batch is cut."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aesthetic.errors import DiskFull, UserError
from tests.small_train import clean_processes, make_images, saved_state, small_run
from train import checkpoint
from train.captions import first_caption
from train.data import ImageDataset, Stream, open_samples, ordered_batches
from train.devices import FreeCores
from train.loop import Diverged, Ema, LoopConfig, learning_rate, train
from train.metrics import format_record, training_flops
from train.models.family import family_of, load_model, new_model, tokenize
from train.models.presets import PRESETS
from train.split import split
from train.tasks import Denoise, Reconstruct, fit_scale, generate_images, psnr, slice_batch


def run(images: Path, out: Path, said: Any, settings: dict[str, Any]) -> None:
    """In a process of its own: train, and send each step's number when it is done."""
    torch.set_num_threads(1)
    for record in small_run(images, out, **settings):
        said.send(record["step"])


def start(processes: Any, images: Path, out: Path, **settings: Any) -> tuple[Any, Any]:
    """(process, the end of a pipe on which its steps arrive)."""
    here, there = processes.Pipe(duplex=False)
    process = processes.Process(target=run, args=(images, out, there, settings))
    process.start()
    there.close()
    return process, here


def steps(said: Any) -> Iterator[int]:
    with contextlib.suppress(EOFError):
        while True:
            yield said.recv()


@pytest.fixture(scope="module")
def processes() -> Any:
    return clean_processes()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_images(tmp_path_factory.mktemp("pictures"))


def losses(folder: Path) -> list[tuple[int, float]]:
    records = [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in records]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for k, t in saved_state(folder).items() if k.startswith(("raw.", "mean."))}


@pytest.mark.parametrize("objective", ["flow", "v", "eps"])
def test_the_loss_is_that_of_a_loop_written_by_hand_with_diffusers(images: Path, objective: str) -> None:
    from diffusers import DDPMScheduler

    samples = open_samples(images)
    pipeline = new_model("debug", ["a red disc"] * 4, objective)
    examples = ImageDataset(samples, lambda c: tokenize(pipeline, c), 16)
    batch = next(Stream(examples, np.arange(len(samples)), batch=8).batches())
    task = Denoise(pipeline)
    ours = task.module(*task.inputs(batch, seed=3, step=5))

    rngs = [np.random.default_rng([3, 5, slot]) for slot in range(8)]
    t = torch.tensor([task.objective.sample_time(r) for r in rngs], dtype=torch.float32)
    noise = torch.from_numpy(np.stack([r.standard_normal((3, 16, 16), dtype=np.float32) for r in rngs]))
    with torch.no_grad():
        latents = pipeline.vae.encode(batch.images).latent_dist.mean * pipeline.vae.config.scaling_factor
    if objective == "flow":
        sigma = (t / 1000).view(-1, 1, 1, 1)
        x_t, target = sigma * noise + (1 - sigma) * latents, noise - latents
    else:
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        x_t = scheduler.add_noise(latents, noise, t.long())
        target = noise if objective == "eps" else scheduler.get_velocity(latents, noise, t.long())
    states = pipeline.text_encoder(batch.tokens, return_dict=False)[0]
    said = pipeline.unet(x_t, t.long() if objective != "flow" else t, states).sample
    theirs = torch.nn.functional.mse_loss(said.float(), target.float(), reduction="mean")
    assert abs(ours.mean().item() - theirs.item()) < 1e-6
    ours.mean().backward()
    mine = pipeline.unet.conv_in.weight.grad.clone()
    pipeline.unet.zero_grad()
    theirs.backward()
    assert torch.allclose(mine, pipeline.unet.conv_in.weight.grad, atol=1e-6)


def test_a_run_learns_and_leaves_what_it_promises(images: Path, tmp_path: Path) -> None:
    settings = {"steps": 45, "batch": 16, "log_every": 15, "save_every": 15, "keep": 1}
    records = list(small_run(images, tmp_path, **settings))
    assert [r["step"] for r in records] == [15, 30, 45]
    held = [r["held_out"]["ema"] for r in records]
    assert records[-1]["loss"] < 0.6 * records[0]["loss"] and held[-1] < 0.7 * held[0]
    for r in records:
        assert r["img_s"] > 0 and r["tflop_s"] > 0 and 0 <= r["data_wait"] < 1 and r["memory_gb"] > 0.1
        assert r["mfu"] is None and Image.open(r["samples"]).width == 2480  # a sheet, with labels
    assert records[-1]["eta_s"] == 0 and records[-1]["epoch"] == 45 * 16 // 64  # 52 images fill 4 batches
    said = format_record(records[-1])
    assert said.startswith("step 45/45  loss ") and "img/s" in said and "data-wait" in said and "\n" not in said
    assert [json.loads(t) for t in (tmp_path / "log.jsonl").read_text().splitlines()] == records
    assert list(checkpoint.checkpoints(tmp_path)) == [45] and checkpoint.best(tmp_path) is not None
    # the pipeline holds the average, not the raw weights
    state = saved_state(tmp_path)
    first = load_model(tmp_path / "checkpoints" / "000045" / "pipeline").unet.conv_in.weight
    assert torch.equal(first, state["mean.denoiser.conv_in.weight"])
    assert not torch.equal(first, state["raw.denoiser.conv_in.weight"])


def test_a_run_that_is_stopped_saves_where_it_is_and_goes_on_to_the_same_bits(images: Path, tmp_path: Path) -> None:
    whole = [r["loss"] for r in small_run(images, tmp_path / "whole", steps=6)]
    asked = iter([False, False, True])
    records = list(small_run(images, tmp_path / "stopped", steps=6, stop=lambda: next(asked)))
    assert [r["step"] for r in records] == [1, 2, 3] and records[-1]["stopped"]
    assert list(checkpoint.checkpoints(tmp_path / "stopped")) == [3]
    assert "samples" not in records[-1] and "held_out" not in records[-1]  # whoever stops a run does not want to wait
    rest = list(small_run(images, tmp_path / "stopped", steps=6))
    assert [r["loss"] for r in records + rest] == whole


def test_what_is_drawn_is_shown_large_beside_the_real_image_of_the_caption(tmp_path: Path) -> None:
    real = np.full((16, 16, 3), (255, 0, 0), np.uint8)
    task = Denoise(new_model("debug", ["a red disc"]), real={"a red disc": real})
    rows = task.preview(["a red disc", "no such thing"], [0, 1])
    assert [(words, [s.caption for s in shown]) for words, shown in rows] == [
        ("a red disc", ["real, held out", "generated, seed 0", "generated, seed 1"]),
        ("no such thing", ["generated, seed 0", "generated, seed 1"]),
    ]
    sizes = {s.image.size for _, shown in rows for s in shown}
    assert sizes == {(224, 224)} and rows[0][1][0].image.getpixel((100, 100)) == (255, 0, 0)


def test_threads_are_chosen_by_what_others_leave_free() -> None:
    free = FreeCores()
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    time.sleep(0.6)
    found = free()
    for p in others:
        p.kill()
        p.wait()
    assert found == 1
    assert FreeCores()() == len(os.sched_getaffinity(0))  # too soon to tell: all


@pytest.mark.long
def test_a_lora_is_trained_and_checkpointed_on_top_of_a_model(images: Path, tmp_path: Path) -> None:
    first = list(small_run(images, tmp_path / "base", steps=2))[-1]["held_out"]["ema"]
    base = tmp_path / "base" / "checkpoints" / "000002" / "pipeline"
    records = list(small_run(images, tmp_path / "lora", start=base, steps=60, log_every=30))
    assert records[-1]["held_out"]["ema"] < first - 0.05 and records[1]["loss"] < records[0]["loss"]
    saved = tmp_path / "lora" / "checkpoints" / "000060"
    assert sorted(p.name for p in saved.iterdir()) == ["lora", "record.json", "trainer"]
    plain, dressed = load_model(base), load_model(base)
    dressed.load_lora_weights(saved / "lora")
    one, other = (np.array(generate_images(p, ["a red disc"], [0], steps=4)[0]) for p in (plain, dressed))
    assert not np.array_equal(one, other)


@pytest.mark.long
def test_an_autoencoder_learns_to_reproduce_by_the_same_loop(images: Path, tmp_path: Path) -> None:
    samples = open_samples(images)
    small = replace(PRESETS["debug"], vae=(16, 16), factor=2, latents=4)
    pipeline = new_model(small, ["a red disc"] * 4)
    examples = ImageDataset(samples, lambda c: tokenize(pipeline, c), 16)
    chosen, apart = split(samples, 0.2)
    config = LoopConfig(steps=60, batch=16, lr=3e-3, ema=0.9, log_every=30, warmup=10)
    task = Reconstruct(pipeline)
    records = list(train(task, Stream(examples, chosen, batch=16), config, tmp_path, held_out=apart))
    assert psnr(records[-1]["held_out"]["ema"]) > 15
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]
    batch = next(ordered_batches(examples, chosen, 32))
    scale = fit_scale(pipeline, batch)
    latents = family_of(pipeline).encode_images(pipeline.vae, batch.images)
    assert latents.std().item() == pytest.approx(1, abs=1e-4) and scale > 0
    saved = type(pipeline.vae).from_pretrained(tmp_path / "checkpoints" / "000060" / "vae")
    assert torch.equal(next(saved.parameters()), next(pipeline.vae.parameters()))  # the average, in both


def test_the_best_is_kept_beside_the_last(tmp_path: Path) -> None:
    def fill(path: Path) -> None:
        (path / "pipeline").mkdir()
        (path / "pipeline" / "weights").write_bytes(b"x" * 100)

    for step, loss in ((1, 0.5), (2, 0.2), (3, 0.3), (4, 0.4), (5, 0.6)):
        state = {"weight": torch.full((3,), float(step))}
        checkpoint.save(tmp_path, step, fill, state, {"config": {}, "held_out": {"ema": loss}}, keep=2)
    assert list(checkpoint.checkpoints(tmp_path)) == [2, 4, 5]
    assert checkpoint.best(tmp_path) == tmp_path / "checkpoints" / "000002"
    (tmp_path / "checkpoints" / "000005" / "pipeline" / "weights").write_bytes(b"x")  # cut
    assert list(checkpoint.checkpoints(tmp_path)) == [2, 4]
    record = checkpoint.last_record(tmp_path, {})
    assert record is not None and record["step"] == 4
    checkpoint.load_tensors(checkpoint.path_of(tmp_path, 4), read := {"weight": torch.zeros(3)})
    assert read["weight"].tolist() == [4, 4, 4]


def test_other_settings_do_not_go_on_with_a_run(images: Path, tmp_path: Path) -> None:
    list(small_run(images, tmp_path, steps=2))
    with pytest.raises(UserError, match=r"trained otherwise \(lr: 0.002 then, 0.01 now\)"):
        list(small_run(images, tmp_path, steps=2, lr=0.01))


@pytest.mark.long
@pytest.mark.parametrize("half", [10, 50])
def test_half_a_run_a_kill_and_the_other_half_are_one_run_bit_for_bit(
    half: int, images: Path, tmp_path: Path, processes: Any
) -> None:
    """Killed between two checkpoints, so that some steps are done twice."""
    settings = {"steps": 2 * half, "batch": 4, "save_every": half}
    whole, _ = start(processes, images, tmp_path / "whole", **settings)
    process, said = start(processes, images, tmp_path / "killed", **settings)
    for step in steps(said):
        if step == half + 4:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(checkpoint.checkpoints(tmp_path / "killed")) == [half]
    assert losses(tmp_path / "killed")[-1][0] >= half + 4
    process, said = start(processes, images, tmp_path / "killed", **settings)
    assert next(steps(said)) == half + 1
    process.join()
    whole.join()
    assert whole.exitcode == process.exitcode == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 2 * half
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.long
def test_a_run_that_is_killed_anywhere_always_goes_on(images: Path, tmp_path: Path, processes: Any) -> None:
    """Checkpoints at every second step, kills at random times until the run is through; the same curve in the end."""
    settings = {"steps": 60, "batch": 4, "save_every": 2}
    whole, _ = start(processes, images, tmp_path / "whole", **settings)
    whole.join()
    rng = np.random.default_rng(0)
    for _attempt in range(60):
        process, said = start(processes, images, tmp_path / "killed", **settings)
        next(steps(said), None)
        time.sleep(float(rng.uniform(0, 4)))
        process.kill()
        process.join()
        for path in (tmp_path / "killed" / "checkpoints").glob("[0-9]*"):
            load_model(path / "pipeline")
        if 60 in checkpoint.checkpoints(tmp_path / "killed"):
            break
    assert _attempt > 2
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.long
def test_micro_batches_change_nothing(images: Path, tmp_path: Path) -> None:
    one = [r["loss"] for r in small_run(images, tmp_path / "a", steps=4)]
    other = [r["loss"] for r in small_run(images, tmp_path / "b", steps=4, micro_batch=3, checkpointing=True)]
    assert np.allclose(one, other, atol=1e-5)


def test_a_run_that_diverges_stops_with_the_keys_of_its_batch(images: Path, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"Samples \d\d\d.png") as told:
        list(small_run(images, tmp_path, steps=50, lr=1e30, warmup=0, clip=1e30))
    step = int(str(told.value).split()[1].strip(":"))
    keys = json.loads((tmp_path / "diverged-0.json").read_text())["keys"]
    assert len(keys) == 8 and all((images / k).is_file() for k in keys)
    assert [s for s, _ in losses(tmp_path)] == list(range(1, step))  # and none after


def test_the_average_warms_up() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    ema = Ema([p], 0.9)
    mean = np.zeros(3)
    for step in range(1, 200):
        with torch.no_grad():
            p += 1
        ema.update(step)
        mean += (1 - min(0.9, (1 + step) / (10 + step))) * (step - mean)
    assert np.allclose(ema.mean[0].numpy(), mean, rtol=1e-5) and not np.allclose(mean, 199)
    with ema.applied():
        assert np.allclose(p.detach().numpy(), mean, rtol=1e-5)
    assert float(p.detach()[0]) == 199


def test_the_learning_rate_is_a_function_of_the_step() -> None:
    config = LoopConfig(steps=100, batch=8, lr=1.0, warmup=10)
    rates = [learning_rate(config, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1) and rates[99] < 0.001
    assert rates[55] == pytest.approx(0.5)
    constant = LoopConfig(steps=100, batch=8, lr=1.0, warmup=10, schedule="constant")
    assert learning_rate(constant, 99) == 1


def test_speed_waiting_and_time_left_are_what_a_clock_beside_the_loop_says(images: Path, tmp_path: Path) -> None:
    class SlowDisk(ImageDataset):
        def load(self, index: int, choose: Any = first_caption) -> Any:
            time.sleep(0.01)
            return super().load(index, choose)

    class Clocked(Stream):
        waited = 0.0

        def batches(self, cursor: tuple[int, int] = (0, 0)) -> Any:
            source = super().batches(cursor)
            while True:
                before = time.perf_counter()
                batch = next(source)
                self.waited += time.perf_counter() - before
                yield batch

    samples = open_samples(images)
    pipeline = new_model("debug", ["a red disc"] * 4)
    examples = SlowDisk(samples, lambda c: tokenize(pipeline, c), 16)
    stream = Clocked(examples, np.arange(len(samples)), batch=8, workers=1)
    began = time.perf_counter()
    records = train(Denoise(pipeline), stream, LoopConfig(steps=9, batch=8, log_every=3), tmp_path)
    next(records)
    time.sleep(0.5)  # the caller's time is not the loop's
    resumed, waited = time.perf_counter(), stream.waited
    record = next(records)
    now = time.perf_counter()
    assert record["step"] == 6 and record["img_s"] == pytest.approx(24 / (now - resumed), rel=0.1)
    assert record["data_wait"] == pytest.approx((stream.waited - waited) / (now - resumed), abs=0.05)
    assert "WARNING: training waits for data" in format_record({**record, "data_wait": 0.11})
    assert "WARNING" not in format_record({**record, "data_wait": 0.09})
    assert record["eta_s"] == pytest.approx((now - began) / 2, rel=0.1)  # with the caller's time
    status = dict(t.split(":", 1) for t in Path("/proc/self/status").read_text().splitlines())
    assert record["memory_gb"] == pytest.approx(int(status["VmHWM"].split()[0]) * 1024 / 1e9, rel=0.02)
    records.close()


def test_flops_are_those_of_the_layers_and_a_frozen_autoencoder_counts_once(images: Path) -> None:
    """Beside a count by hand: multiply-adds of convolutions and linear layers; attention's products are left out."""
    samples = open_samples(images)
    pipeline = new_model("debug", ["a red disc"] * 4)
    examples = ImageDataset(samples, lambda c: tokenize(pipeline, c), 16)
    batch = next(Stream(examples, np.arange(len(samples)), batch=8).batches())
    latents = replace(batch, images=family_of(pipeline).encode_images(pipeline.vae, batch.images), latent=True)
    task = Denoise(pipeline)
    from_pixels, from_latents = (training_flops(task, b) for b in (batch, latents))
    assert all(p.grad is None for m in task.modules.values() for p in m.parameters())

    counted = {"trained": 0, "frozen": 0}

    def count(kind: str) -> Any:
        def hook(layer: Any, inputs: Any, out: torch.Tensor) -> None:
            counted[kind] += 2 * out.numel() * layer.weight[0].numel()

        return hook

    for kind, modules in (("trained", [pipeline.unet, pipeline.text_encoder]), ("frozen", [pipeline.vae])):
        for layer in (x for m in modules for x in m.modules() if isinstance(x, torch.nn.Conv2d | torch.nn.Linear)):
            layer.register_forward_hook(count(kind))
    with torch.no_grad():
        task.module(*task.inputs(slice_batch(batch, 0, 1), 0, 0))
    assert from_pixels - from_latents == counted["frozen"] > 0
    assert 0.95 < from_latents / (3 * counted["trained"]) < 1.15
    pipeline.unet.enable_gradient_checkpointing()
    assert training_flops(task, latents, checkpointing=True) == pytest.approx(from_latents, rel=0.1)


def run_in_little_memory(images: Path, out: Path, said: Any, megabytes: int, settings: dict[str, Any]) -> None:
    """In a process of its own: train with so much more memory than a small batch leaves in use."""
    torch.set_num_threads(1)
    list(small_run(images, out / "small", steps=1))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (megabytes << 20), -1))
    for record in small_run(images, out / "whole", **settings):
        said.send((record["step"], record["loss"], record["grad_norm"], record["micro_batch"]))
    said.close()


@pytest.mark.long
def test_where_memory_runs_out_the_micro_batch_is_halved_and_the_update_is_the_same(
    images: Path, tmp_path: Path, processes: Any
) -> None:
    settings = {"steps": 3, "batch": 512, "save_every": 3}
    here, there = processes.Pipe(duplex=False)
    arguments = (images, tmp_path / "little", there, LITTLE, settings)
    process = processes.Process(target=run_in_little_memory, args=arguments)
    process.start()
    there.close()
    told = list(steps(here))
    process.join()
    assert process.exitcode == 0
    enough = list(small_run(images, tmp_path / "enough", **settings))
    assert [r["micro_batch"] for r in enough] == [512] * 3
    assert [t[3] for t in told] == [told[0][3]] * 3 and told[0][3] < 512  # found once, then kept
    for (_, loss, norm, _), record in zip(told, enough, strict=True):
        assert loss == pytest.approx(record["loss"], rel=1e-5) and norm == pytest.approx(record["grad_norm"], rel=1e-4)
    one, two = weights(tmp_path / "little" / "whole"), weights(tmp_path / "enough")
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-4


LITTLE = 400
"""Megabytes in which 512 samples do not fit."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 120 MB of its own, or a skip where none may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", disk]).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_too_small_for_checkpoints_is_told_before_the_first_step(images: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(40 << 20))
    with pytest.raises(DiskFull, match=r"has \d+ MB free, and \d+ MB are needed"):
        next(small_run(images, small_disk / "model"))
    assert not list((small_disk / "model").iterdir())


@pytest.mark.long
def test_a_disk_that_fills_up_leaves_whole_checkpoints_to_go_on_from(
    images: Path, tmp_path: Path, small_disk: Path
) -> None:
    settings = {"steps": 6, "save_every": 2}
    list(small_run(images, tmp_path / "whole", **settings))
    records = small_run(images, small_disk / "model", **settings)
    while next(records)["step"] < 3:
        pass
    ballast = small_disk / "ballast"
    with open(ballast, "wb") as f:
        os.posix_fallocate(f.fileno(), 0, shutil.disk_usage(small_disk).free - 1_000_000)
    with pytest.raises(DiskFull, match="goes on where it stopped"):
        list(records)
    assert list(checkpoint.checkpoints(small_disk / "model")) == [2]
    assert [p.name for p in (small_disk / "model" / "checkpoints").iterdir()] == ["000002"]
    ballast.unlink()
    list(small_run(images, small_disk / "model", **settings))
    assert losses(small_disk / "model") == losses(tmp_path / "whole")


def test_settings_that_make_no_sense_are_refused() -> None:
    wrong: list[dict[str, Any]] = [{"steps": 0}, {"batch": 0}, {"schedule": "linear"}, {"ema": 1.0}, {"lr": 0.0}]
    for settings in wrong:
        with pytest.raises(UserError, match=r"train\." + next(iter(settings))):
            LoopConfig(**{"steps": 1, "batch": 1, **settings})
