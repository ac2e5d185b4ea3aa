"""Checkpoints that are whole or absent: a folder is written under a hidden name, flushed to the disk and renamed.

MODEL/checkpoints/000400/pipeline/     the averaged weights, as any diffusers client loads them
                                       (of a LoRA: lora/; of an autoencoder: vae/)
                         trainer/      raw and averaged weights, optimizer: what training goes on from, by name, in
                                       safetensors; from as many processes as one likes
                         record.json   step, cursor, held-out loss, configuration; the length of every file
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as distributed
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

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
    state: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    together: bool = False,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of a step, then remove all but the last `keep` and the best.

    The best has the lowest `facts["held_out"]["ema"]`. `write_weights` adds to the folder that it is given.
    Raises DiskFull; what was there before stays.

    Args:
        together: all processes of the group call this, and see one folder; each writes its shares of `state`.
    """
    path = path_of(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = _agreed(scratch_path(path)) if together else scratch_path(path)
    first = not together or dist.get_rank() == 0
    try:
        scratch.mkdir(exist_ok=together)
        write_weights(scratch)
        _save_tensors(scratch / "trainer", state, together)
        if first:
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
        if first:
            shutil.rmtree(scratch, ignore_errors=True)

    if first:
        sweep(path.parent)  # what a process that was killed has left
        good = best(folder)
        for old in list(checkpoints(folder).values())[: -max(1, keep)]:
            if old != good:
                _remove(old)
    return path


def _agreed(path: Path) -> Path:
    """The path that the first process of the group calls this with."""
    said = [str(path)]
    dist.broadcast_object_list(said)
    return Path(said[0])


def _save_tensors(folder: Path, tensors: Mapping[str, Tensor], together: bool) -> None:
    """Into safetensors, one file a process: what torch writes otherwise is read by pickle, which can run programs."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    tensors = {k: t if t.is_contiguous() else t.contiguous() for k, t in tensors.items()}  # channels last are refused
    try:
        with warnings.catch_warnings(action="ignore"):  # where this process alone writes, that it does
            distributed.save(tensors, storage_writer=writer, no_dist=not together)
    except CheckpointException as e:  # no Exception, in torch
        raise next(iter(e.failures.values()))[0] from e


def load_tensors(path: Path, into: Mapping[str, Tensor]) -> None:
    """Read what a checkpoint has of each tensor, by name, into it; of one that is sharded this process's share."""
    reader = HuggingFaceStorageReader(str(path / "trainer"))
    try:
        with warnings.catch_warnings(action="ignore"):  # that this process alone reads
            distributed.load(dict(into), storage_reader=reader, no_dist=True)
    except CheckpointException as e:
        raise next(iter(e.failures.values()))[0] from e


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


def last_record(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the last whole checkpoint says of itself, or None where there is none.

    Raises UserError where it was made with another configuration, naming what differs.
    """
    path = last(folder)
    if path is None:
        return None
    record: dict[str, Any] = read_json(path / "record.json")
    before = record["config"]
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
    return record
