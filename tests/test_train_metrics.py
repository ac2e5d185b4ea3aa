"""Operations, counted by torch and by hand; peaks of devices; TensorBoard reads what a run wrote for it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from aesthetic.errors import UserError
from train import checkpoint
from train.data import Batch
from train.metrics import SCALARS, TrainMeter, log_to_tensorboard, peak_flops, training_flops
from train.models.family import new_model, tokenize
from train.models.presets import PRESETS
from train.tasks import Denoise


def record(folder: Path, step: int, **more: Any) -> dict[str, Any]:
    image = folder / f"{step}.png"
    Image.fromarray(np.full((8, 16, 3), step, np.uint8)).save(image)
    return {**dict.fromkeys(SCALARS, float(step)), "mfu": None, "step": step, "samples": str(image), **more}


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="the extra tensorboard is not installed")
def test_tensorboard_shows_scalars_and_images_and_a_step_done_again_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = [record(tmp_path, s, held_out={"raw": 0.5, "ema": 0.25}, loss=9.0) for s in (1, 2, 3)]
    again = [record(tmp_path, s, loss=7.0) for s in (2, 3, 4)]
    assert list(log_to_tensorboard(killed, tmp_path)) == killed
    checkpoint.save(tmp_path, 1, lambda path: None, {"step": torch.ones(1)}, {"config": {}})
    assert list(log_to_tensorboard(again, tmp_path)) == again
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 9.0), (2, 7.0), (3, 7.0), (4, 7.0)]
    assert [e.value for e in board.Scalars("held_out/ema")] == [0.25] and "mfu" not in board.Tags()["scalars"]
    assert set(board.Tags()["scalars"]) == {*SCALARS, "held_out/raw", "held_out/ema"} - {"mfu"}
    assert [(e.step, e.width, e.height) for e in board.Images("samples")] == [(s, 16, 8) for s in (1, 2, 3, 4)]


@pytest.mark.skipif(find_spec("tensorboard") is not None, reason="the extra tensorboard is installed")
def test_without_tensorboard_it_is_told_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pip install 'tastemaker\[tensorboard\]'"):
        log_to_tensorboard(iter(()), tmp_path)


def up(tokens: int) -> int:
    """Tokens with those that the transformer adds: up to a multiple of 32."""
    return -(-tokens // 32) * 32


@pytest.mark.parametrize("train_text", [False, True])
def test_operations_of_a_transformer_are_those_of_its_products(train_text: bool) -> None:
    """Every product of matrices of ZImageTransformer2DModel by hand, and twice as many backwards where needed."""
    p = PRESETS["debug-dit"]
    pipeline = new_model(p, ["a red disc"] * 4)
    tokens = tokenize(pipeline, ["a", "a red disc " * 3, "a red disc " * 20])
    lengths = torch.tensor([len(row) for row in tokens])
    images = torch.zeros(3, p.latents, p.size, p.size)
    padded, views = pad_sequence(tokens, batch_first=True), torch.zeros(3, 6, dtype=torch.int64)
    batch = Batch(list("abc"), [0, 1, 2], images, True, padded, lengths, views, (0, 0))
    task = Denoise(pipeline, text=train_text)

    d, hidden, time = p.width, int(p.width / 3 * 8), min(p.width, 256)
    image, text = up((p.size // 2) ** 2), up(int(lengths.median()))
    patch = 4 * p.latents

    def block(n: int) -> int:  # of n tokens: projections of attention, its two products, the gated layer
        return 2 * n * 4 * d * d + 2 * 2 * n * n * d + 2 * n * 3 * d * hidden

    modulation = 2 * time * 4 * d  # one for each block that sees the time
    first = [2 * image * patch * d, 2 * 256 * 1024]  # of pixels and of the time: nothing before them is learnt
    rest = 2 * text * p.text * d + 2 * 1024 * time  # of captions, of the time
    rest += p.refiners * (block(image) + modulation + block(text)) + p.layers * (block(image + text) + modulation)
    rest += 2 * (image + text) * d * patch + 2 * time * d  # the answer
    learnt = 2 * sum(first) + 3 * rest
    if not train_text:
        n = int(lengths.median())
        learnt += (p.text_layers + 1) * (2 * n * 4 * p.text**2 + 2 * 2 * n * n * p.text + 2 * n * 3 * 4 * p.text**2)
        assert training_flops(task, batch) == learnt
    else:
        assert 1.01 < training_flops(task, batch) / learnt < 1.2  # with the text encoder's own
    plain = training_flops(task, batch)
    pipeline.transformer.enable_gradient_checkpointing()
    assert training_flops(task, batch, checkpointing=True) == pytest.approx(plain, rel=0.1)


def test_peaks_are_those_of_the_device_and_no_other() -> None:
    known = {
        "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835, "NVIDIA H200": 989,
        "NVIDIA B200": 2250, "NVIDIA GB200": 2500, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA L4": 121, "NVIDIA L40S": 362,
        "NVIDIA A10G": 70, "NVIDIA GeForce RTX 4090": 165.2, "NVIDIA GeForce RTX 5090": 209.5,
        "AMD Instinct MI300X": 1307, "NVIDIA GH200 480GB": 989,
    }  # fmt: skip
    assert {name: (peak_flops(name) or 0) / 1e12 for name in known} == known
    others = ("NVIDIA RTX A1000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla T4")
    assert [peak_flops(name) for name in others] == [None] * 4


def test_of_several_ranks_mfu_is_a_share_of_all_their_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is here: its name is all that the meter takes of one."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    peaks = [TrainMeter(10, 64, torch.device("cuda"), ranks=ranks)._peak for ranks in (1, 8)]
    assert peaks == [989e12, 8 * 989e12]
    assert TrainMeter(10, 64, torch.device("cpu"))._peak is None
