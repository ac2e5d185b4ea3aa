"""Latents and token ids computed once: for a model whose autoencoder is frozen, most of the work of reading a picture.

    LATENTS/00000.safetensors    latents (n, c, h, w) float16; tokens (n, length) int32, or where the text encoder is
                                 frozen too what it makes of them, text (n, length, width) float16; one shape per file
            00000.json           the pictures' numbers and keys, what the file was made with; written after it
            empty.safetensors    tokens or text of '', which takes the place of dropped captions
            made.json            what they were made from and with, the length of every file; written last

A shard is a function of the pictures' numbers alone, so a Ray stage can write them side by side and `finish` once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from aesthetic.errors import UserError
from aesthetic.files import atomic
from curate.ledger.schema import shard_name
from curate.store.disk import check_space
from curate.store.files import digest, read_json, write_json
from train.data import ImageDataset, Ints
from train.models.unet import encode_images, tokenize

_FORMAT = 2

Tell = Callable[[int], None]
"""Hears how many more pictures are done."""


def weights_digest(module: nn.Module) -> str:
    """A short name for a module's weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def made_from(pipeline: Any, examples: ImageDataset, numbers: Ints, text: bool = False) -> dict[str, Any]:
    """What latents depend on: autoencoder and its scale, tokenizer, text encoder where used, pictures, their shapes."""
    return {
        "format": _FORMAT,
        "vae": digest([weights_digest(pipeline.vae), pipeline.vae.config.scaling_factor]),
        "tokenizer": digest([pipeline.tokenizer.get_vocab(), pipeline.tokenizer.model_max_length]),
        "text_encoder": weights_digest(pipeline.text_encoder) if text else None,
        "pictures": examples.samples.fingerprint,
        "shapes": digest([examples.shapes, examples.bucket[numbers].tolist()]),
        "numbers": digest(numbers.tolist()),
    }


def shards_of(examples: ImageDataset, numbers: Ints, shard_size: int = 1024) -> list[Ints]:
    """The numbers of each shard: in order, one shape per shard."""
    parts = [numbers[examples.bucket[numbers] == b] for b in np.unique(examples.bucket[numbers])]
    return [part[i : i + shard_size] for part in parts for i in range(0, len(part), shard_size)]


def bytes_of(pipeline: Any, examples: ImageDataset, numbers: Ints, text: bool = False) -> int:
    """How much room the latents of these pictures take, without the little that files need for their headers."""
    factor, channels = pipeline.vae_scale_factor**2, pipeline.vae.config.latent_channels
    areas = np.array([h * w for h, w in examples.shapes])[examples.bucket[numbers]]
    words = pipeline.tokenizer.model_max_length * (pipeline.text_encoder.config.hidden_size if text else 2)
    return int(2 * (areas.sum() * channels // factor + words * len(numbers)))


def is_made(folder: Path, shard: int, numbers: Ints, made: dict[str, Any]) -> bool:
    """Whether a shard of these pictures is there, whole and made with the same."""
    told, path = read_json(folder / f"{shard_name(shard)}.json"), folder / f"{shard_name(shard)}.safetensors"
    same = told and told["made"] == digest(made) and told["numbers"] == numbers.tolist()
    return bool(same and path.is_file() and path.stat().st_size == told["bytes"])


@torch.no_grad()
def write_shard(
    pipeline: Any,
    examples: ImageDataset,
    numbers: Ints,
    folder: Path,
    shard: int,
    made: dict[str, Any],
    *,
    text: bool = False,
    batch: int = 32,
    threads: int = 2,
    tell: Tell = lambda count: None,
) -> None:
    """Encode the pictures of one shard and write its two files, each whole or absent, the record last."""
    parts = [numbers[i : i + batch].tolist() for i in range(0, len(numbers), batch)]
    keys: list[str] = []
    latents, words = [], []
    with ThreadPoolExecutor(threads) as pool:
        ahead = pool.map(examples.load, parts[0])
        for following in [*parts[1:], []]:  # is read while the part before it is encoded
            loaded, ahead = list(ahead), pool.map(examples.load, following)
            images, tokens = torch.stack([x[1] for x in loaded]), torch.stack([x[2] for x in loaded])
            keys += [str(x[0]) for x in loaded]
            latents.append(encode_images(pipeline.vae, images.to(pipeline.vae.device)).half().cpu())
            words.append(_states(pipeline, tokens) if text else tokens.int())
            tell(len(loaded))
    stored = {"latents": torch.cat(latents).contiguous(), "text" if text else "tokens": torch.cat(words)}
    data = save(stored)
    check_space(folder, len(data))
    path = folder / f"{shard_name(shard)}.safetensors"
    path.with_suffix(".json").unlink(missing_ok=True)
    with atomic(path) as f:
        f.write(data)
    told = {"made": digest(made), "numbers": numbers.tolist(), "keys": keys, "bytes": len(data)}
    write_json(path.with_suffix(".json"), told)


def _states(pipeline: Any, tokens: Tensor) -> Tensor:
    states: Tensor = pipeline.text_encoder(tokens.to(pipeline.text_encoder.device))[0]
    return states.half().cpu()


@torch.no_grad()
def finish(pipeline: Any, folder: Path, made: dict[str, Any], shards: Sequence[Ints], text: bool = False) -> None:
    """Write what takes the place of dropped captions, and the record that makes the folder whole."""
    tokens = tokenize(pipeline, [""])
    with atomic(folder / "empty.safetensors") as f:
        f.write(save({"text": _states(pipeline, tokens)[0]} if text else {"tokens": tokens[0].int()}))
    names = [f"{shard_name(i)}.safetensors" for i in range(len(shards))]
    sizes = {name: [len(part), (folder / name).stat().st_size] for name, part in zip(names, shards, strict=True)}
    write_json(folder / "made.json", {**made, "shards": sizes})


def precompute_latents(
    pipeline: Any,
    examples: ImageDataset,
    numbers: Ints,
    folder: Path,
    shard_size: int = 1024,
    *,
    text: bool = False,
    threads: int = 2,
    tell: Tell = lambda count: None,
) -> LatentDataset:
    """Write the latents of these pictures, as far as they are not there already, made with the same; returns them.

    What a caption's tokens are dropped for, '', is kept too. Latents are the mean of the autoencoder's posterior, as
    training without this step takes them, rounded to float16. With `text` the states of the text encoder take the
    place of token ids: for a text encoder that is not trained. Raises DiskFull before anything is computed.
    """
    made = made_from(pipeline, examples, numbers, text)
    there = read_json(folder / "made.json")
    if there is None or {k: there.get(k) for k in made} != made:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "made.json").unlink(missing_ok=True)
        shards = shards_of(examples, numbers, shard_size)
        missing = [i for i, part in enumerate(shards) if not is_made(folder, i, part, made)]
        check_space(folder, sum(bytes_of(pipeline, examples, shards[i], text) for i in missing))
        tell(sum(map(len, shards)) - sum(len(shards[i]) for i in missing))
        for i in missing:
            write_shard(pipeline, examples, shards[i], folder, i, made, text=text, threads=threads, tell=tell)
        finish(pipeline, folder, made, shards, text)
    return LatentDataset(folder)


class LatentDataset:
    """Precomputed latents as examples for a stream, read by memory map, under the numbers that the pictures have.

    Raises UserError where the folder is not whole.
    """

    latent = True

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        made = read_json(self.folder / "made.json")
        if not made:
            raise UserError(f"{folder} holds no precomputed latents, or is not finished")
        for name, (_, length) in made["shards"].items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != length:
                raise UserError(f"{path} is missing or cut. Remove {folder} and precompute again.")
        self.made: dict[str, Any] = made
        names = sorted(made["shards"])
        counts = [made["shards"][n][0] for n in names]
        records = [read_json((self.folder / n).with_suffix(".json")) for n in names]
        self._keys = [r["keys"] for r in records]
        self._words = "text" if made["text_encoder"] else "tokens"
        self._mapped = [self._tensors(self.folder / name) for name in names]
        self._empty = self._typed(load((self.folder / "empty.safetensors").read_bytes())[self._words])
        shapes = [tuple(latents.shape[1:]) for latents, _ in self._mapped]
        kinds = sorted(set(shapes))
        numbers = np.concatenate([np.array(r["numbers"], np.int64) for r in records])
        places = [(i, row) for i, count in enumerate(counts) for row in range(count)]
        self._count = len(numbers)
        self._place = np.full((numbers.max() + 1, 2), -1, np.int64)  # (shard, row)
        self._place[numbers] = places
        self.bucket = np.full(numbers.max() + 1, -1, np.int64)
        self.bucket[numbers] = np.repeat([kinds.index(s) for s in shapes], counts)

    def __len__(self) -> int:
        return self._count

    def _tensors(self, shard: Path) -> tuple[Tensor, Tensor]:
        """(latents, words) of a shard in mapped memory: rows are read when they are touched.

        Four times as fast as a slice of the file for each row: a GPU takes 10,000 small latents a second.
        """
        with safe_open(shard, "pt") as file:
            return file.get_tensor("latents"), file.get_tensor(self._words)

    def _typed(self, words: Tensor) -> Tensor:
        return words.float() if self._words == "text" else words.long()

    def load(self, number: int, dropped: bool = False) -> tuple[str, Tensor, Tensor]:
        """(key, (c, h, w) float32, tokens, or the text encoder's states (length, width) float32)."""
        shard, row = self._place[number].tolist()
        if shard < 0:
            raise IndexError(f"picture {number} has no latents in {self.folder}")
        latents, words = self._mapped[shard]
        return self._keys[shard][row], latents[row].float(), self._empty if dropped else self._typed(words[row])
