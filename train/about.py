"""What a model's folder says of itself, read before its weights: parts, sizes, scheduler, where it comes from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from curate.store import UserError, read_json, sha256_file

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

_WEIGHTS = tuple(
    stem + end
    for end in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model")
)
"""Names of weights as diffusers and transformers look for them, those they prefer first."""


@dataclass(frozen=True)
class About:
    """A diffusers folder of the Stable Diffusion 1 and 2 type."""

    name: str  # as it was asked for
    folder: Path
    unet: dict[str, Any]  # the parts' config.json
    vae: dict[str, Any]
    scheduler: dict[str, Any]
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
        """(width, height) in pixels that it draws without being told; of 64 latents where it does not say."""
        sample = self.unet.get("sample_size") or 64
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return width * self.factor, height * self.factor

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
        return (self.trained or {}).get("data", {}).get("manifest_sha256")

    @cached_property
    def digest(self) -> str:
        """One sha256 over configurations, tokenizer and weights: the same model, wherever it lies. Reads all of it."""
        lines = [f"{p.relative_to(self.folder)} {sha256_file(p)}" for p in sorted(self._files())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """What the weights take on disk."""
        return sum(p.stat().st_size for part in PARTS[:3] for p in weights_of(self.folder / part))

    def _files(self) -> Iterator[Path]:
        for part in PARTS:
            yield from (p for p in (self.folder / part).iterdir() if p.suffix in (".json", ".txt"))
            if part in PARTS[:3]:
                yield from weights_of(self.folder / part)


def look(name: str | Path) -> About:
    """What there is to know of a model, a folder or a hub id (which is downloaded first).

    Raises UserError where a part is missing, or where it is of another type.
    """
    folder = find_folder(name)
    index = read_json(folder / "model_index.json")
    if not isinstance(index, dict):
        raise UserError(f"{folder / 'model_index.json'} is no JSON: the model is damaged")
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise UserError(f"{name} is a {kind}: what can be drawn with are models of the type of {PIPELINES[0]}")
    missing = [part for part in PARTS if not _is_whole(folder, part, index.get(part))]
    if missing:
        raise UserError(f"{name} is no whole text-to-image model: {', '.join(missing)} missing or without weights")
    unet, vae, scheduler = (
        read_json(folder / part / f"{'scheduler_' if part == 'scheduler' else ''}config.json")
        for part in ("unet", "vae", "scheduler")
    )
    record = record_of(folder)
    return About(str(name), folder, unet, vae, scheduler, record[1] if record else None)


def record_of(model: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The folder of a model that was trained here, and its train.json; also for MODEL/checkpoints/NUMBER/pipeline."""
    folder = Path(model).expanduser().absolute()
    places = [folder]
    if len(folder.parents) > 2 and folder.parents[1].name == "checkpoints":
        places.append(folder.parents[2])
    for place in places:
        facts = read_json(place / "train.json")
        if isinstance(facts, dict) and isinstance(facts.get("settings"), dict):
            return place, facts
    return None


def find_folder(name: str | Path) -> Path:
    """The folder of a model. One on the hub is downloaded into the hub's cache, where it is not there yet."""
    folder = Path(name).expanduser()
    if (folder / "model_index.json").is_file():
        return folder
    if folder.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") != 1:
        inner = sorted(folder.glob("checkpoints/*/pipeline")) if folder.is_dir() else []
        lora = folder.is_dir() and any(folder.glob("*lora*.safetensors"))
        hint = " A folder with model_index.json is expected, or a hub id."
        if lora:
            hint = f" It is a LoRA: give the model that it was trained on, and --lora {name}"
        if inner:
            hint = f" Did you mean {inner[-1]}?"
        raise UserError(f"{name} holds no diffusers pipeline.{hint}")
    from diffusers import DiffusionPipeline

    from train.model import no_bars

    try:
        with no_bars():
            return Path(DiffusionPipeline.download(str(name), safety_checker=None))
    except (OSError, ValueError) as e:
        raise UserError(
            f"the model {name} is neither a folder here nor could it be had from the Hugging Face hub "
            f"({str(e).splitlines()[0]}). Where the hub is blocked, download it elsewhere (`hf download {name}`) and "
            f"give the folder, or set HF_ENDPOINT to a mirror."
        ) from e


def weights_of(part: Path) -> list[Path]:
    """The files of weights of one part, as diffusers chooses them: none where there are none, or not all."""
    for name in _WEIGHTS:
        path = part / name
        if not path.is_file():
            continue
        if not name.endswith(".json"):
            return [path]
        shards = sorted(set((read_json(path) or {}).get("weight_map", {}).values()))
        files = [part / shard for shard in shards]
        return files if all(f.is_file() for f in files) else []
    return []


def shapes_of(part: Path) -> dict[str, list[int]]:
    """Name -> shape of the tensors of a part, or of one file, from the headers of its safetensors files."""
    files = [part] if part.is_file() else weights_of(part)
    found: dict[str, list[int]] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with open(file, "rb") as f:
                size = int.from_bytes(f.read(8), "little")
                if size > 100_000_000:  # the format's own limit
                    raise ValueError(f"{file} is no safetensors file")
                header = json.loads(f.read(size))
            found |= {name: about["shape"] for name, about in header.items() if name != "__metadata__"}
    return found


def _is_whole(folder: Path, part: str, entry: Any) -> bool:
    if not isinstance(entry, list) or None in entry or not (folder / part).is_dir():
        return False
    if part == "tokenizer":
        return any((folder / part / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    if part == "scheduler":
        return isinstance(read_json(folder / part / "scheduler_config.json"), dict)
    return isinstance(read_json(folder / part / "config.json"), dict) and bool(weights_of(folder / part))
