"""The parts of a model of any kind: which there are, whether each is whole, and one with its weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aesthetic.errors import UserError
from aesthetic.untrusted import check_regular, error_line, printable
from curate.weight_files import is_pointer, read_header, weight_files, weight_variant
from train.devices import out_of_memory

if TYPE_CHECKING:
    import torch


Part = tuple[str, str]
"""(library, class), as model_index.json names what a part is."""

_UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "image_processor", "watermarker")
"""Parts that draw nothing: the project has its own detector, and images as prompts (IP adapters) are not read."""

_MAY_BE_NULL = ("text_encoder", "tokenizer", *_UNUSED)
"""How parts begin that a model may go without: Stable Diffusion 3 draws without its third text encoder."""


def parts_of(index: Mapping[str, Any], pipeline: Any, folder: Path) -> dict[str, Part | None]:
    """The parts that a pipeline's class is made of, by name, as model_index.json says; None: drawn without.

    Raises UserError, about that file in `folder`, where one is missing or is no part.
    """
    path = folder / "model_index.json"
    found: dict[str, Part | None] = {}
    for name, parameter in inspect.signature(pipeline.__init__).parameters.items():
        if name == "self" or (name not in index and parameter.default is not inspect.Parameter.empty):
            continue
        entry, optional = index.get(name), name in pipeline._optional_components
        if entry is None and not (optional and name.startswith(_UNUSED)):
            raise UserError(f"{path}: {name} is missing, of which a {pipeline.__name__} is made")
        if entry == [None, None] or (optional and name.startswith(_UNUSED)):
            if not optional and not name.startswith(_MAY_BE_NULL):
                raise UserError(f"{path}: {name} is null, and a {pipeline.__name__} can't draw without it")
            found[name] = None
        elif isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry):
            found[name] = entry[0], entry[1]
        elif parameter.default is inspect.Parameter.empty:
            raise UserError(f"{path}: {name} is {printable(repr(entry), 60)}, not [library, class]")
    return found


def kind_of_part(part: Part) -> tuple[Any, Literal["weights", "scheduler", "files"]]:
    """The class of a part, of diffusers or transformers, and what it is made of. Raises UserError for any other."""
    import diffusers
    import torch
    import transformers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    library, name = part
    module = {"diffusers": diffusers, "transformers": transformers}.get(library)
    if module is None:  # classes that diffusers keeps beside a pipeline, such as kolors' text encoder
        module = getattr(diffusers.pipelines, library, None)
    try:
        kind = getattr(module, name, None)
    except Exception:  # of lazy modules: a library that is not installed
        kind = None
    if inspect.isclass(kind) and hasattr(kind, "from_pretrained"):
        if issubclass(kind, torch.nn.Module):
            return kind, "weights"
        if issubclass(kind, SchedulerMixin):
            return kind, "scheduler"
        if issubclass(kind, transformers.PreTrainedTokenizerBase | transformers.ProcessorMixin):
            return kind, "files"
    raise UserError(
        f"a part of the model is a {printable(f'{library}.{name}', 80)}, which the installed diffusers and "
        "transformers do not have: a newer one may, and code that a model brings with it is not run"
    )


def is_whole(folder: Path, part: str, entry: Any) -> bool:
    """Whether a part that model_index.json names is there, with its configuration and weights."""
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)):
        return False
    if not (folder / part).is_dir():
        return False
    if part == "tokenizer":
        return any((folder / part / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    if part == "scheduler":
        return (folder / part / "scheduler_config.json").is_file()
    return (folder / part / "config.json").is_file() and bool(weight_files(folder / part))


def check_weights(folder: Path) -> None:
    """Raise UserError where a part's files of weights are damaged, or only stand for them. No weights are read."""
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            read_header(file)
        elif check_regular(file) < 64 or is_pointer(file):
            raise UserError(f"{file} holds no weights: it may be a pointer of Git LFS (`git lfs pull` fetches them)")


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
