"""The parts of a model of any kind, each with its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from aesthetic.untrusted import error_line
from curate.weight_files import weight_files, weight_variant
from train.devices import out_of_memory

if TYPE_CHECKING:
    import torch


def load_part(folder: Path, kind: Any, dtype: torch.dtype, unused: Sequence[str] | None = ()) -> Any:
    """A model of diffusers or transformers, `kind`, out of its folder, with weights of type `dtype`.

    Args:
        unused: how weights begin that the files may hold beside those that are used; None: any may.

    Raises UserError, naming the file, where none can be made of the configuration, where weights are missing or left
    over, and where one is no number.
    """
    import torch

    try:
        part, report = kind.from_pretrained(
            folder, dtype=dtype, variant=weight_variant(folder), output_loading_info=True, local_files_only=True
        )
    except Exception as e:  # whatever a configuration that is none makes of a constructor
        if out_of_memory(e):
            raise
        raise UserError(
            f"{folder / 'config.json'}: no {kind.__name__} can be made of it and its weights: {error_line(e)}"
        ) from e
    files = " and ".join(str(path) for path in weight_files(folder)[:2])
    unknown = [] if unused is None else [k for k in report["unexpected_keys"] if not k.startswith(tuple(unused))]
    unknown = [k for k in unknown if not k.endswith("position_ids")]
    for keys, verb in ((report["missing_keys"], "lack"), (unknown, "hold, beside what is used,")):
        if keys := sorted(keys):
            raise UserError(
                f"{folder / 'config.json'} does not fit the weights in {files}: these {verb} {keys[0]}"
                + (f" and {len(keys) - 1:,} more" if len(keys) > 1 else "")
            )
    for key, tensor in [*part.named_parameters(), *part.named_buffers()]:
        # a sum is infinite or NaN where one of them is, and takes a hundredth of the time of a test of each number,
        # which is three times that of reading them
        suspect = tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float32))
        if suspect and not torch.isfinite(tensor).all():
            precision = "" if dtype == torch.float32 else f" in {str(dtype).removeprefix('torch.')}"
            raise UserError(
                f"{files}: the weights {key} hold values that are no numbers{precision}: the model is broken, and "
                "would draw nothing"
            )
    if hasattr(part, "register_to_config"):  # a part of diffusers: what is saved of it would say where it was read
        part.register_to_config(_name_or_path="")
    return part
