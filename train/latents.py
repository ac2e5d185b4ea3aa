"""Latents and token ids computed once: for a model whose autoencoder is frozen, most of the work of reading a picture.

    LATENTS/00000.safetensors    latents (n, c, h, w) float16, tokens (n, length) int32; one shape per file
            00000.json           keys
            made.json            what they were made from and with, the length of every file; written last

A shard is a function of the pictures' numbers alone, so a Ray stage can write them side by side and `finish` once.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from curate.ledger import shard_name
from curate.store import UserError, atomic, check_space, digest, read_json, write_json
from train.data import Ints, Numbered, Pictures, batches_of
from train.model import encode_images, tokenize

_FORMAT = 1


def made_from(pipeline: Any, samples: Numbered, size: int, buckets: bool = False) -> dict[str, Any]:
    """What latents depend on, as digests: the autoencoder and its scale, the tokenizer, the pictures, their size."""
    weights = hashlib.sha256()
    for name, tensor in sorted(pipeline.vae.state_dict().items()):
        weights.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    manifest = read_json(samples.folder / "manifest.json") or {}
    keys = [str(samples.facts(i).get("key", i)) for i in range(len(samples))]
    return {
        "format": _FORMAT,
        "vae": digest([weights.hexdigest(), pipeline.vae.config.scaling_factor]),
        "tokenizer": digest([pipeline.tokenizer.get_vocab(), pipeline.tokenizer.model_max_length]),
        "pictures": digest([manifest.get("outputs"), keys]),
        "size": size,
        "buckets": buckets,
    }


def shards_of(examples: Pictures, numbers: Ints, shard_size: int = 4096) -> list[Ints]:
    """The numbers of each shard: in order, one shape per shard."""
    parts = [numbers[examples.bucket[numbers] == b] for b in np.unique(examples.bucket[numbers])]
    return [part[i : i + shard_size] for part in parts for i in range(0, len(part), shard_size)]


def write_shard(pipeline: Any, examples: Pictures, numbers: Ints, folder: Path, shard: int, batch: int = 32) -> None:
    """Encode the pictures of one shard and write its two files, each whole or absent."""
    latents, tokens, keys = [], [], []
    for part in batches_of(examples, numbers, batch):
        latents.append(encode_images(pipeline.vae, part.images.to(pipeline.vae.device)).half().cpu())
        tokens.append(part.tokens.int())
        keys += part.keys
    check_space(folder, 2 * sum(x.numel() * x.element_size() for x in latents))
    write_json(folder / f"{shard_name(shard)}.json", keys)
    with atomic(folder / f"{shard_name(shard)}.safetensors") as f:
        f.write(save({"latents": torch.cat(latents), "tokens": torch.cat(tokens)}))


def finish(pipeline: Any, folder: Path, made: dict[str, Any], shards: Sequence[Ints]) -> None:
    """Write the record that makes the folder whole."""
    empty = tokenize(pipeline, [""])[0].tolist()
    names = [f"{shard_name(i)}.safetensors" for i in range(len(shards))]
    sizes = {name: [len(part), (folder / name).stat().st_size] for name, part in zip(names, shards, strict=True)}
    write_json(folder / "made.json", {**made, "empty": empty, "shards": sizes})


def precompute(pipeline: Any, examples: Pictures, numbers: Ints, folder: Path, shard_size: int = 4096) -> Latents:
    """Write the latents of these pictures, unless they are there already, made with the same; returns them.

    What a caption's tokens are dropped for, '', is kept too. Latents are the mean of the autoencoder's posterior, as
    training without this step takes them, rounded to float16.
    """
    size = examples.shapes[0]
    made = made_from(pipeline, examples.samples, int(np.sqrt(size[0] * size[1])), len(examples.shapes) > 1)
    made["numbers"] = digest(numbers.tolist())
    there = read_json(folder / "made.json")
    if there is None or {k: there.get(k) for k in made} != made:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "made.json").unlink(missing_ok=True)
        shards = shards_of(examples, numbers, shard_size)
        for i, part in enumerate(shards):
            write_shard(pipeline, examples, part, folder, i)
        finish(pipeline, folder, made, shards)
    return Latents(folder)


class Latents:
    """Precomputed latents as examples for a stream, read by memory map.

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
        self._names = sorted(made["shards"])
        counts = [made["shards"][n][0] for n in self._names]
        self._ends = list(accumulate(counts))
        self._empty = torch.tensor(made["empty"])
        self._opened = lru_cache(maxsize=None)(lambda name: safe_open(self.folder / name, "pt"))
        self._keys = lru_cache(maxsize=None)(lambda name: read_json((self.folder / name).with_suffix(".json")))
        shapes = [tuple(self._opened(n).get_slice("latents").get_shape()[1:]) for n in self._names]
        kinds = sorted(set(shapes))
        self.bucket = np.repeat(np.array([kinds.index(s) for s in shapes], np.int64), counts)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _find(self, number: int) -> tuple[str, int]:
        shard = bisect_right(self._ends, number)
        return self._names[shard], number - (self._ends[shard - 1] if shard else 0)

    def load(self, number: int, dropped: bool = False) -> tuple[str, Tensor, Tensor]:
        """(key, (c, h, w) float32, tokens)."""
        name, row = self._find(number)
        opened = self._opened(name)
        tokens: Tensor = self._empty if dropped else opened.get_slice("tokens")[row].long()
        return str(self._keys(name)[row]), opened.get_slice("latents")[row].float(), tokens
