"""A run in TensorBoard: `tensorboard --logdir MODEL/tensorboard`. Needs the extra `tensorboard`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aesthetic.errors import UserError
from train.checkpoint import checkpoints

SCALARS = ("loss", "lr", "grad_norm", "img_s", "tflop_s", "mfu", "data_wait", "memory_gb")
"""What of a record is drawn over the steps, beside held-out loss."""


def on_board(records: Iterable[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    """The records of `loop.train` into the model folder `folder`, each written to `folder/tensorboard` on its way.

    Where a run goes on from a checkpoint, the steps after it that the board knows are done again, and seen once.
    Raises UserError, at once, where the package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise UserError("TensorBoard is not installed: `pip install 'tastemaker[tensorboard]'`") from e
    last = max(checkpoints(folder), default=0)
    return _written(records, SummaryWriter(str(folder / "tensorboard"), purge_step=last + 1))


def _written(records: Iterable[dict[str, Any]], writer: Any) -> Iterator[dict[str, Any]]:
    with writer:
        for record in records:
            step = record["step"]
            for name in SCALARS:
                if record[name] is not None:
                    writer.add_scalar(name, record[name], step)
            for kind, loss in (record.get("held_out") or {}).items():
                writer.add_scalar(f"held_out/{kind}", loss, step)
            if "samples" in record:
                picture = Image.open(record["samples"]).convert("RGB")
                writer.add_image("samples", np.asarray(picture), step, dataformats="HWC")
            writer.flush()
            yield record
