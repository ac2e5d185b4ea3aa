"""Several processes train what one trains: with all of the model in each, with a share in each, through kills."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from aesthetic.errors import UserError
from tests.small_pipelines import save_pipeline
from tests.small_train import clean_processes, make_images, saved_state, small_run
from train import checkpoint
from train.models.unet import load_model
from train.parallel import PeerLost, join
from train.tasks import generate_images

STEPS = {"steps": 6, "batch": 16}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Callable[..., list[Any]]]:
    """Starts `work(*words)` in a process for each rank of a gloo group; returns them."""
    started: list[Any] = []

    def start(count: int, work: Callable[..., None], *words: Any) -> list[Any]:
        store = tmp_path / f"store-{len(started)}"
        processes = [
            clean_processes().Process(target=in_group, args=(r, count, store, work, words)) for r in range(count)
        ]
        for process in processes:
            process.start()
        started.extend(processes)
        return processes

    yield start
    for process in started:
        process.kill()
        process.join()


def in_group(rank: int, count: int, store: Path, work: Callable[..., None], words: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    work(*words)
    dist.destroy_process_group()


def finish(processes: list[Any]) -> None:
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * len(processes)


# ------------------------------------------------------------------------------------------- gradients, in a second


def line(width: int = 5) -> Any:
    """A task of the smallest kind: its module's blocks are its layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))
    model._no_split_modules = ["Linear"]  # type: ignore[assignment]  # as models of transformers say it
    module = nn.Sequential(model, nn.Flatten())
    return SimpleNamespace(module=module, modules={"line": model}, pipeline=SimpleNamespace(line=model))


def gradients(out: Path) -> None:
    """In each of two processes: gradients of its half of eight samples, in two micro-batches; written by the first."""
    rank, found = dist.get_rank(), {}
    for name, options in {"replicated": {}, "whole": {}, "sharded": {"shard": True}}.items():
        task = line()
        workers = join(task, **options)
        halves = samples()[rank::2].split(4 if name == "whole" else 2)
        for i, part in enumerate(halves):
            with workers.exchanging(i == len(halves) - 1):
                (workers.module(part).square().sum() / 8).backward()
        grads = [p.grad for p in task.module.parameters()]
        found[name] = [g.full_tensor() if workers.sharded else g for g in grads]  # type: ignore[union-attr,operator]
        assert workers.sum(rank, 2.5) == [1, 5]
        assert "FSDP" not in repr(type(workers)) and (type(grads[0]).__name__ == "DTensor") == workers.sharded
        if workers.sharded:
            state = {k: p.detach() for k, p in task.module.named_parameters()}

            def export(folder: Path, workers: Any = workers, task: Any = task) -> None:
                with workers.whole() as first:
                    if first:
                        torch.save(task.pipeline.line.state_dict(), folder / "line.pt")

            checkpoint.save(out, 1, export, state, {}, together=True)
    if rank == 0:
        torch.save(found, out / "gradients.pt")


def samples() -> torch.Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(1))


def test_gradients_of_two_processes_are_those_of_one_and_what_is_sharded_is_saved_whole(
    tmp_path: Path, ranks: Callable[..., list[Any]]
) -> None:
    finish(ranks(2, gradients, tmp_path))
    task = line()
    (join(task).module(samples()).square().sum() / 8).backward()
    for name, found in torch.load(tmp_path / "gradients.pt").items():
        for p, grad in zip(task.module.parameters(), found, strict=True):
            assert float((p.grad - grad).abs().max()) < 1e-6 * float(p.grad.abs().max()), name
    there = checkpoint.checkpoints(tmp_path)[1]
    assert len(list((there / "trainer").iterdir())) == 2  # a file of each process
    state, exported = saved_state(tmp_path), torch.load(there / "line.pt")
    assert all(torch.equal(p, state[f"0.{k}"]) for k, p in task.modules["line"].named_parameters())
    assert all(torch.equal(p, exported[k]) for k, p in task.modules["line"].named_parameters())
    assert not any(p.suffix == ".metadata" or p.suffix == ".distcp" for p in there.rglob("*"))  # pickles
    with pytest.raises(UserError, match="takes several workers"):
        join(line(), shard=True)


def test_weights_that_lie_channels_last_are_saved_and_read_back(tmp_path: Path) -> None:
    """As convolutions on GPUs like them; safetensors takes them in their usual order alone."""
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    path = checkpoint.save(tmp_path, 1, lambda folder: None, {"weight": weight}, {})
    read = torch.zeros_like(weight)
    checkpoint.load_tensors(path, {"weight": read})
    assert torch.equal(read, weight) and read.stride() == weight.stride()


# ------------------------------------------------------------------------------------------------------- whole runs


def run(images: Path, out: Path, settings: dict[str, Any]) -> None:
    list(small_run(images, out, **settings))


def apart(one: Path, other: Path) -> tuple[float, float]:
    """(root mean square, largest) difference of raw and averaged weights.

    The largest is looser: Adam divides a gradient by its own size, also one that is 0 but for rounding, as that of an
    attention's key bias is.
    """
    a, b = saved_state(one), saved_state(other)
    assert a.keys() == b.keys()
    names = [k for k in a if k.startswith(("raw.", "mean."))]
    difference = torch.cat([(a[k] - b[k]).double().flatten() for k in names])
    return float(difference.square().mean().sqrt()), float(difference.abs().max())


def losses(folder: Path) -> list[tuple[float, float]]:
    """(loss, norm of the gradient) of each step."""
    records = [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]
    return [(r["loss"], r["grad_norm"]) for r in records]


@pytest.fixture(scope="module")
def one(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    out = tmp_path_factory.mktemp("one")
    list(small_run(images, out, **STEPS))
    return out


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("how", [{}, {"shard": True}, {"micro_batch": 3}], ids=["replicated", "sharded", "micro"])
def test_several_workers_make_the_model_that_one_makes_of_the_same_batch(
    images: Path, one: Path, tmp_path: Path, ranks: Callable[..., list[Any]], count: int, how: dict[str, Any]
) -> None:
    settings = {**STEPS, **how}
    finish(ranks(count, run, images, tmp_path / "several", settings))
    assert np.allclose(losses(one), losses(tmp_path / "several"), rtol=1e-4)
    rms, largest = apart(one, tmp_path / "several")
    assert rms < 1e-6 and largest < 1e-4
    unet = load_model(checkpoint.checkpoints(tmp_path / "several")[6] / "pipeline").unet
    state = saved_state(tmp_path / "several")
    assert all(torch.equal(p, state[f"mean.denoiser.{k}"]) for k, p in unet.named_parameters())
    finish(ranks(count, run, images, tmp_path / "again", settings))
    assert apart(tmp_path / "several", tmp_path / "again") == (0, 0)


@pytest.mark.long
@pytest.mark.parametrize(("muon", "most"), [(0.0, 1e-6), (0.02, 1e-4)])  # Muon makes matrices orthogonal in bf16
def test_a_transformer_and_its_language_model_are_trained_in_shares(
    images: Path, tmp_path: Path, ranks: Callable[..., list[Any]], muon: float, most: float
) -> None:
    """transformers gives hidden states by the class of a model, and to be sharded makes it another."""
    settings = {**STEPS, "preset": "debug-dit", "muon": muon}
    list(small_run(images, tmp_path / "one", **settings))
    finish(ranks(2, run, images, tmp_path / "two", {**settings, "shard": True}))
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-4)
    assert apart(tmp_path / "one", tmp_path / "two")[0] < most


@pytest.mark.long
@pytest.mark.parametrize("then", [4, 2, 1])
def test_what_four_sharded_workers_have_saved_any_number_goes_on_from(
    images: Path, one: Path, tmp_path: Path, ranks: Callable[..., list[Any]], then: int
) -> None:
    finish(ranks(4, run, images, tmp_path / "m", {**STEPS, "schedule": "constant", "steps": 3, "shard": True}))
    record = json.loads((checkpoint.path_of(tmp_path / "m", 3) / "record.json").read_text())
    record["config"] |= {"steps": 6}
    (checkpoint.path_of(tmp_path / "m", 3) / "record.json").write_text(json.dumps(record))
    settings = {**STEPS, "schedule": "constant"}
    finish(ranks(then, run, images, tmp_path / "m", {**settings, "shard": then == 4}))
    list(small_run(images, tmp_path / "one", **settings))
    assert len(losses(tmp_path / "m")) == 6
    rms, largest = apart(tmp_path / "one", tmp_path / "m")
    assert rms < 1e-6 and largest < 1e-4


@pytest.mark.long
def test_a_lora_is_trained_by_two_workers(images: Path, one: Path, tmp_path: Path, ranks: Any) -> None:
    base = checkpoint.checkpoints(one)[6] / "pipeline"
    for name, how in {"whole": {}, "shared": {"shard": True}}.items():
        finish(ranks(2, run, images, tmp_path / name, {**STEPS, "start": base, **how}))
    list(small_run(images, tmp_path / "one", start=base, **STEPS))
    for name in ("whole", "shared"):
        rms, largest = apart(tmp_path / "one", tmp_path / name)
        assert rms < 1e-6 and largest < 1e-4
        plain, dressed = load_model(base), load_model(base)
        dressed.load_lora_weights(checkpoint.checkpoints(tmp_path / name)[6] / "lora")
        drawn = [np.array(generate_images(p, ["a red disc"], [0], steps=4)[0]) for p in (plain, dressed)]
        assert not np.array_equal(*drawn)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux", "z-image"])
def test_loras_of_larger_families_are_trained_by_two_workers(
    images: Path, tmp_path: Path, ranks: Any, kind: str
) -> None:
    base = save_pipeline(kind, tmp_path / "base")
    list(small_run(images, tmp_path / "one", start=base, **STEPS))
    for name, how in {"whole": {}, "shared": {"shard": True}}.items():
        finish(ranks(2, run, images, tmp_path / name, {**STEPS, "start": base, **how}))
        rms, largest = apart(tmp_path / "one", tmp_path / name)
        assert rms < 1e-6 and largest < 1e-4
    whole, shared = (checkpoint.checkpoints(tmp_path / name)[6] / "lora" for name in ("whole", "shared"))
    assert [p.name for p in whole.iterdir()] == [p.name for p in shared.iterdir()]


# ---------------------------------------------------------------------------------------------------------- troubles


def little_memory(images: Path, out: Path, megabytes: int, settings: dict[str, Any]) -> None:
    """The second of two workers has so much more memory than a small batch leaves in use."""
    list(small_run(images, out / "small", steps=1, batch=2))
    if dist.get_rank() == 1:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (megabytes << 20), -1))
    list(small_run(images, out / "whole", **settings))


@pytest.mark.long
def test_where_memory_runs_out_in_one_worker_all_halve_their_micro_batches(
    images: Path, tmp_path: Path, ranks: Callable[..., list[Any]]
) -> None:
    settings = {"steps": 2, "batch": 512}
    finish(ranks(2, little_memory, images, tmp_path, 250, settings))
    finish(ranks(2, run, images, tmp_path / "enough", settings))
    records = [json.loads(text) for text in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert len({r["micro_batch"] for r in records}) == 1 and records[0]["micro_batch"] < 256
    assert np.allclose(losses(tmp_path / "whole"), losses(tmp_path / "enough"), rtol=1e-4)
    assert apart(tmp_path / "whole", tmp_path / "enough")[0] < 1e-6


def lose_a_peer(images: Path, out: Path, settings: dict[str, Any]) -> None:
    """The second of two workers is killed before its sixth step; the first writes what it is told."""
    try:
        for record in small_run(images, out, **settings):
            if record["step"] == 5 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
    except PeerLost as e:
        (out / "told.txt").write_text(str(e))


@pytest.mark.long
@pytest.mark.parametrize("how", [{}, {"shard": True}, {"micro_batch": 3}], ids=["replicated", "sharded", "micro"])
def test_a_worker_whose_peer_is_killed_says_so_and_both_go_on_from_the_checkpoint(
    images: Path, tmp_path: Path, ranks: Callable[..., list[Any]], how: dict[str, Any]
) -> None:
    settings = {**STEPS, "steps": 8, "save_every": 4, **how}
    first, second = ranks(2, lose_a_peer, images, tmp_path / "m", settings)
    second.join()
    first.join(60)
    assert second.exitcode == -signal.SIGKILL
    assert (tmp_path / "m" / "told.txt").read_text().startswith("another worker is gone: ")
    assert list(checkpoint.checkpoints(tmp_path / "m")) == [4]
    finish(ranks(2, run, images, tmp_path / "m", settings))
    finish(ranks(2, run, images, tmp_path / "whole", settings))
    assert apart(tmp_path / "m", tmp_path / "whole") == (0, 0)
    assert [p.name for p in (tmp_path / "m" / "checkpoints").iterdir() if "tmp" in p.name] == []


def profile(out: Path) -> None:
    """Of a wide model: when exchanges begin, and when the backward pass is done."""
    task = line(width=3_000_000)
    workers = join(task)
    for _ in range(2):  # the second one orders what is exchanged
        workers.module(samples()).square().sum().backward()
    with torch.profiler.profile() as found:
        workers.module(samples()).square().sum().backward()
    if dist.get_rank() == 0:
        found.export_chrome_trace(str(out))


@pytest.mark.long
def test_the_exchange_begins_while_the_backward_pass_is_computed(tmp_path: Path, ranks: Any) -> None:
    finish(ranks(2, profile, tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    exchanges = [e["ts"] for e in events if "all_reduce" in e.get("name", "").replace("allreduce", "all_reduce")]
    computed = [e["ts"] + e["dur"] for e in events if e.get("name", "").endswith("AddmmBackward0") and "dur" in e]
    assert exchanges and computed and min(exchanges) < max(computed)
