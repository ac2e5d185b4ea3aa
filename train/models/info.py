"""What a model's folder says of itself, read before its weights: parts, sizes, scheduler, where it comes from."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from aesthetic.errors import UserError
from aesthetic.untrusted import check_regular, printable, read_json_file
from curate.store.files import sha256_file
from train.models.configs import (
    ModelIndexConfig,
    SchedulerConfig,
    TextEncoderConfig,
    TokenizerConfig,
    TrainRecordConfig,
    UnetConfig,
    VaeConfig,
    read_config,
)
from train.models.schedulers import SCHEDULERS
from train.models.tensors import Header, is_pointer, read_header

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": SCHEDULERS,
}
"""What a part may be, by the second word of its entry in model_index.json."""

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
_WEIGHTS = tuple(stem + end for end in _ENDS for stem in _STEMS)
"""Names of weights as diffusers and transformers look for them, those they prefer first."""

_VARIANTS = re.compile(
    rf"(?:{'|'.join(_STEMS)})"
    r"(?:\.(?P<one>\w+)\.(?:safetensors|bin)|\.(?:safetensors|bin)\.index\.(?P<many>(?!json)\w+)\.json)"
)
"""Names of weights of which a folder may hold several precisions: model.fp16.safetensors."""


@dataclass(frozen=True)
class ModelInfo:
    """A diffusers folder of the Stable Diffusion 1 and 2 type."""

    name: str  # as it was asked for
    folder: Path
    unet: dict[str, Any]  # the parts' config.json, with diffusers' defaults for what they leave out
    vae: dict[str, Any]
    text: dict[str, Any]
    scheduler: dict[str, Any]  # as it is, of the class that model_index.json names, as diffusers makes it
    trained: dict[str, Any] | None  # train.json, where tastemaker trained it

    @property
    def factor(self) -> int:
        """Pixels of a side per latent."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    @property
    def step(self) -> int:
        """Sides of pictures are multiples of this: of 8 in diffusers' pipelines, and of the autoencoder's factor."""
        return math.lcm(8, self.factor)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels that it draws without being told; of 64 latents where it does not say, or says less
        and is so old that diffusers does not believe it (models of 512 pixels were converted with a size of 32)."""
        sample = self.unet.get("sample_size") or 64
        version = re.match(r"(\d+)\.(\d+)", self.unet.get("version") or "")
        if isinstance(sample, int) and version and (int(version[1]), int(version[2])) < (0, 9):
            sample = max(sample, 64)
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return width * self.factor, height * self.factor

    @property
    def training_step(self) -> int:
        """Sides of pictures to train on are multiples of this: the autoencoder's factor times the UNet's."""
        return int(self.factor * 2 ** (len(self.unet["block_out_channels"]) - 1))

    @property
    def of_pixels(self) -> bool:
        """Whether its autoencoder is `model.pixel_vae`, which fp16 would break."""
        return len(self.vae["block_out_channels"]) == 1

    @property
    def inpaints_only(self) -> bool:
        """Whether its UNet takes a mask and a masked picture beside the latents: it can't draw without them."""
        return bool(self.unet["in_channels"] == 2 * self.vae["latent_channels"] + 1)

    @property
    def guidance(self) -> float:
        """The guidance that suits it: 3 for models trained here (as when they are looked at in training), else 7.5,
        Stable Diffusion's."""
        return 7.5 if self.trained is None or self.trained["settings"].get("from") else 3.0

    @property
    def manifest(self) -> str | None:
        """The sha256 of the manifest of the shards that it was trained on, where it says so."""
        found: str | None = (self.trained or {}).get("data", {}).get("manifest_sha256")
        return found

    @cached_property
    def digest(self) -> str:
        """One sha256 over configurations, tokenizer and weights: the same model, wherever it lies. Reads all of it."""
        lines = [f"{p.relative_to(self.folder)} {sha256_file(p)}" for p in sorted(self._files())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """What the weights take on disk."""
        return sum(p.stat().st_size for part in PARTS[:3] for p in weight_files(self.folder / part))

    def _files(self) -> Iterator[Path]:
        for part in PARTS:
            yield from (p for p in (self.folder / part).iterdir() if p.suffix in (".json", ".txt"))
            if part in PARTS[:3]:
                yield from weight_files(self.folder / part)


def read_model_info(name: str | Path) -> ModelInfo:
    """What there is to know of a model, a folder or a hub id (which is downloaded first).

    Raises UserError, naming the file, where a part is missing, of another type, or where a configuration says what
    can't be. No weights are read, and neither torch nor diffusers is loaded, but to download.
    """
    folder = find_model_folder(name)
    index, parts = read_config(ModelIndexConfig, folder / "model_index.json")
    if index.kind not in PIPELINES:
        raise UserError(
            f"{name} is a {printable(index.kind, 60)}: what can be drawn with, and trained further, are models of the "
            f"type of {PIPELINES[0]}"
        )
    missing = [part for part in PARTS if not _is_whole(folder, part, parts.get(part))]
    if missing:
        raise UserError(f"{name} is no whole text-to-image model: {', '.join(missing)} missing or without weights")
    for part, classes in _CLASSES.items():
        if (found := parts[part][1]) not in classes:
            named = " or ".join(classes[:2]) if len(classes) < 3 else f"one of {', '.join(classes)}"
            raise UserError(f"{folder / 'model_index.json'}: its {part} is a {printable(found, 60)}, not {named}")
    unet, vae, text = (
        read_config(kind, folder / part / "config.json")[0].model_dump()
        for kind, part in ((UnetConfig, "unet"), (VaeConfig, "vae"), (TextEncoderConfig, "text_encoder"))
    )
    _, scheduler = read_config(SchedulerConfig, folder / "scheduler" / "scheduler_config.json")
    scheduler["_class_name"] = parts["scheduler"][1]
    _check_tokenizer(folder / "tokenizer", text["max_position_embeddings"])
    record = training_record(folder)
    about = ModelInfo(str(name), folder, unet, vae, text, scheduler, record[1] if record else None)
    _check_agreement(about)
    for part in PARTS[:3]:
        for file in weight_files(folder / part):
            _check_weights(file)
    return about


def _check_tokenizer(folder: Path, most: int) -> None:
    for path in sorted(folder.glob("*.json")):
        if path.name == "tokenizer_config.json":
            length = read_config(TokenizerConfig, path)[0].model_max_length
            if length is None:
                raise UserError(f"{path}: model_max_length, how long a prompt may be, is missing: {most} would do")
            if length > most:
                raise UserError(
                    f"{path}: model_max_length {length} is more than the {most} that the text encoder reads"
                )
        elif not isinstance(read_json_file(path), dict):
            raise UserError(f"{path}: a JSON object is expected")
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(
            f"{folder / 'tokenizer_config.json'} is missing: it says how long a prompt may be. What would do: "
            f'{{"tokenizer_class": "CLIPTokenizer", "model_max_length": {most}}}'
        )


def _check_agreement(about: ModelInfo) -> None:
    """What parts say of each other."""
    unet, latents, wide = about.unet, about.vae["latent_channels"], about.text["hidden_size"]
    path = about.folder / "unet" / "config.json"
    if unet["in_channels"] not in (latents, 2 * latents + 1) or unet["out_channels"] != latents:
        raise UserError(
            f"{path}: a UNet with {unet['in_channels']} channels in and {unet['out_channels']} out does not fit the "
            f"autoencoder, whose latents have {latents}"
        )
    reads = unet["cross_attention_dim"]
    if any(n != wide for n in (reads if isinstance(reads, list) else [reads])):
        raise UserError(f"{path}: cross_attention_dim is {reads}, and the text encoder's hidden_size {wide}")


def _check_weights(file: Path) -> None:
    """UserError for a file that can't be weights: cut, a pointer of Git LFS, a page of HTML."""
    if file.suffix == ".safetensors":
        read_header(file)
    elif check_regular(file) < 64 or is_pointer(file):
        raise UserError(f"{file} holds no weights: it may be a pointer of Git LFS (`git lfs pull` fetches them)")


def check_trainable(about: ModelInfo, size: int | None) -> None:
    """Raise UserError where a model can't be trained further, or not on pictures of this side."""
    config = about.scheduler
    kind, times = config.get("prediction_type", "epsilon"), config.get("num_train_timesteps", 1000)
    if kind not in ("flow_prediction", "v_prediction", "epsilon") or times != 1000:
        raise UserError(
            f"{about.folder / 'scheduler' / 'scheduler_config.json'}: the model predicts {kind!r} over {times} times; "
            "what can be trained further is flow_prediction, v_prediction and epsilon over 1000"
        )
    if about.inpaints_only:
        raise UserError(f"{about.name} is no plain text-to-image model: its UNet takes more than latents (inpainting?)")
    side, step = size or min(about.size), about.training_step
    if side % step:
        near = max(step, round(side / step) * step)
        raise UserError(f"size {side} does not fit this model: sides are multiples of {step}. {near} would do.")


def training_record(model: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The folder of a model that was trained here, and its train.json; also for MODEL/checkpoints/NUMBER/pipeline.

    Raises UserError where it is one of ours and says what can't be.
    """
    folder = Path(model).expanduser().absolute()
    places = [folder]
    if len(folder.parents) > 2 and folder.parents[1].name == "checkpoints":
        places.append(folder.parents[2])
    for place in places:
        path = place / "train.json"
        if not path.is_file():
            continue
        try:
            facts = read_json_file(path)
        except UserError:  # somebody else's, who calls a file so too
            continue
        if isinstance(facts, dict) and isinstance(facts.get("settings"), dict):
            read_config(TrainRecordConfig, path)
            return place, facts
    return None


def find_model_folder(name: str | Path) -> Path:
    """The folder of a model. One on the hub is downloaded into the hub's cache, where it is not there yet."""
    folder = Path(name).expanduser()
    if (folder / "model_index.json").is_file():
        return folder
    if folder.is_file():
        raise UserError(_of_one_file(folder))
    if folder.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") != 1:
        inner = sorted(folder.glob("checkpoints/*/pipeline")) if folder.is_dir() else []
        files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.ckpt")) if folder.is_dir() else []
        hint = " A folder with model_index.json is expected, or a hub id."
        if any("lora" in file.name for file in files):
            hint = f" It is a LoRA: give the model that it was trained on, and --lora {name}"
        if inner:
            hint = f" Did you mean {inner[-1]}?"
        elif files and "LoRA" not in hint:
            hint = " " + _of_one_file(files[0])
        raise UserError(f"{name} holds no diffusers pipeline.{hint}")
    if folder.parent.is_dir():
        there = sorted(p.name for p in folder.parent.iterdir() if (p / "model_index.json").is_file())
        raise UserError(
            f"{name} is not there: {folder.parent} is a folder here, "
            + (f"with the models {_listed(there)}. " if there else "and holds no models. ")
            + f"Is a model of the hub meant? `hf download {name}` prints the folder to give"
        )
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    from train.models.unet import no_progress_bars

    logging.set_verbosity_error()  # we say ourselves that the hub can't be reached
    try:
        with no_progress_bars():
            return Path(DiffusionPipeline.download(str(name), safety_checker=None))
    except (OSError, ValueError) as e:
        raise UserError(
            f"the model {name} is neither a folder here nor could it be had from the Hugging Face hub "
            f"({str(e).splitlines()[0]}). Where the hub is blocked, download it elsewhere (`hf download {name}`) and "
            f"give the folder, or set HF_ENDPOINT to a mirror."
        ) from e


def _listed(names: list[str]) -> str:
    return ", ".join(printable(name, 60) for name in names[:5]) + (", ..." if len(names) > 5 else "")


def _of_one_file(file: Path) -> str:
    """What to do with a model that is a single file."""
    if file.suffix not in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        return f"{file} is a file: a folder with model_index.json is expected, or a hub id."
    if is_lora(file):
        return f"{file} is a LoRA: give the model that it was trained on, and --lora {file}"
    return (
        f"{file} is a model in a single file, and a diffusers folder is expected. Make one of it where the Hugging "
        f"Face hub can be reached, which says how such files are laid out: python -c 'from diffusers import "
        f'StableDiffusionPipeline as P; P.from_single_file("{file}").save_pretrained("{file.with_suffix("")}")\''
    )


def is_lora(file: Path) -> bool:
    """Whether a file of safetensors holds low-rank matrices, by the names of its tensors."""
    try:
        return file.suffix == ".safetensors" and any("lora" in name for name in read_header(file).tensors)
    except UserError:
        return False


def weight_files(part: Path) -> list[Path]:
    """The files of weights of one part, as diffusers chooses them: none where there are none, or not all.

    Those of a variant, such as model.fp16.safetensors, where there are no others.
    """
    variant = weight_variant(part)
    for name in _WEIGHTS if variant is None else _of_variant(variant):
        path = part / name
        if not path.is_file():
            continue
        if ".index." not in name:
            return [path]
        return _shards(part, path)
    return []


def weight_variant(part: Path) -> str | None:
    """The variant by which diffusers finds the weights of a part, fp16 where there are several; None: without one."""
    if any((part / name).is_file() for name in _WEIGHTS):
        return None
    found = [m["one"] or m["many"] for p in part.iterdir() if (m := _VARIANTS.fullmatch(p.name))]
    return min(found, key=lambda name: (name != "fp16", name != "bf16", name), default=None)


def _of_variant(variant: str) -> Iterator[str]:
    """Names of weights of a variant, as diffusers makes them of those without."""
    for name in _WEIGHTS:
        stem, dot, end = name.rpartition(".")
        yield f"{stem}.{variant}{dot}{end}"


def _shards(part: Path, index: Path) -> list[Path]:
    """The files that an index of several names; none where one of them is not there."""
    told = read_json_file(index)
    named = told.get("weight_map") if isinstance(told, dict) else None
    if not isinstance(named, dict) or not all(isinstance(n, str) and Path(n).name == n for n in named.values()):
        raise UserError(f"{index}: no index of files of weights that lie beside it")
    files = [part / name for name in sorted(set(named.values()))]
    return files if all(f.is_file() for f in files) else []


def weights_header(part: Path) -> Header | None:
    """Names and shapes of the weights of a part; None where they are not in safetensors, which alone have headers."""
    files = weight_files(part)
    if not files or any(file.suffix != ".safetensors" for file in files):
        return None
    return Header({name: t for file in files for name, t in read_header(file).tensors.items()}, {})


def _is_whole(folder: Path, part: str, entry: Any) -> bool:
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)):
        return False
    if not (folder / part).is_dir():
        return False
    if part == "tokenizer":
        return any((folder / part / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    if part == "scheduler":
        return (folder / part / "scheduler_config.json").is_file()
    return (folder / part / "config.json").is_file() and bool(weight_files(folder / part))
