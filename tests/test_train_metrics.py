"""TensorBoard reads what a run wrote for it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aesthetic.errors import UserError
from train import checkpoint
from train.metrics import SCALARS, log_to_tensorboard


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
    checkpoint.save(tmp_path, 1, lambda path: None, {"step": 1}, {"config": {}})
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
