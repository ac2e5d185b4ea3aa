"""Checkpoints that are whole or absent: a folder is written under a hidden name, flushed to the disk and renamed.

MODEL/checkpoints/000400/pipeline/     the averaged weights, as any diffusers client loads them
                                       (of a LoRA: lora/; of an autoencoder: vae/)
                         trainer.pt    raw and averaged weights, optimizer, cursor: what training goes on from
                         record.json   step, held-out loss, configuration; the length of every file
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from aesthetic.errors import UserError
from aesthetic.files import as_disk_full, scratch_path, sync
from curate.store.files import check_space, read_json, sweep, write_json


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or will be."""
    return folder / "checkpoints" / f"{step:06d}"


def save(
    folder: Path,
    step: int,
    write_weights: Callable[[Path], None],
    state: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of a step, then remove all but the last `keep` and the best.

    The best has the lowest `facts["held_out"]["ema"]`. `write_weights` adds to the folder that it is given.
    Raises DiskFull; what was there before stays.
    """
    path = path_of(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_path(path)
    try:
        scratch.mkdir()
        write_weights(scratch)
        torch.save(dict(state), scratch / "trainer.pt")
        files = {str(p.relative_to(scratch)): p.stat().st_size for p in sorted(scratch.rglob("*")) if p.is_file()}
        write_json(scratch / "record.json", {**facts, "step": step, "files": files})
        for part in [*scratch.rglob("*"), scratch]:
            sync(part)
        if path.exists():
            _remove(path)
        scratch.rename(path)
        sync(path.parent)
    except OSError as e:
        raise as_disk_full(e, folder) from e
    except Exception as e:  # torch and safetensors wrap a full disk in errors of their own
        check_space(folder)
        raise e
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

    sweep(path.parent)  # what a process that was killed has left
    good = best(folder)
    for old in list(checkpoints(folder).values())[: -max(1, keep)]:
        if old != good:
            _remove(old)
    return path


def _remove(path: Path) -> None:
    """Out of sight at once, then gone."""
    scratch = scratch_path(path)
    path.rename(scratch)
    shutil.rmtree(scratch, ignore_errors=True)


def checkpoints(folder: Path) -> dict[int, Path]:
    """The whole checkpoints of a model, by step."""
    found = {}
    for path in sorted((folder / "checkpoints").glob("[0-9]*")):
        record = read_json(path / "record.json")
        if isinstance(record, dict) and all(
            (path / name).is_file() and (path / name).stat().st_size == size for name, size in record["files"].items()
        ):
            found[int(record["step"])] = path
    return dict(sorted(found.items()))


def last(folder: Path) -> Path | None:
    """The last whole checkpoint."""
    return next(reversed(checkpoints(folder).values()), None)


def best(folder: Path) -> Path | None:
    """The checkpoint with the lowest held-out loss of the averaged weights; the last one where none was measured."""
    losses = {}
    for path in checkpoints(folder).values():
        held_out = read_json(path / "record.json").get("held_out") or {}
        if held_out.get("ema") is not None:
            losses[path] = float(held_out["ema"])
    return min(losses, key=lambda path: losses[path]) if losses else last(folder)


def load_state(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the last whole checkpoint holds for going on, or None where there is none.

    Raises UserError where it was made with another configuration, naming what differs.
    """
    path = last(folder)
    if path is None:
        return None
    before = read_json(path / "record.json")["config"]
    other = [
        f"{k}: {before.get(k)} then, {config.get(k)} now"
        for k in {**before, **config}
        if before.get(k) != config.get(k)
    ]
    if other:
        raise UserError(
            f"{folder} holds a model that was trained otherwise ({'; '.join(other)}). "
            f"Give the same settings to go on with it, or another --out."
        )
    state: dict[str, Any] = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
    return state
