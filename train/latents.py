"""Latents and token ids computed once: for a model whose autoencoder is frozen, most of the work of reading an image.

    LATENTS/00000.safetensors    latents (n, c, h, w) float16, one shape per file; tokens (all, ) int32, those of one
                                 caption after those of another, or where the text encoder is frozen too what it makes
                                 of them, text (all, width) float16 or bfloat16; lengths (n,) int32,
                                 how many are of each caption; views (n, 6) int32 (`data.view_of`)
            00000.json           the images' indices and keys, what the file was made with; written after it
            empty.safetensors    tokens or text of '', which takes the place of dropped captions
            made.json            what they were made from and with, the length of every file; written last

A shard is a function of the images' indices alone, so that several processes can write them side by side.
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
from torch.nn.utils.rnn import pad_sequence

from aesthetic.errors import UserError
from aesthetic.files import atomic
from curate.layout import shard_name
from curate.store.files import check_space, digest, read_json, write_json
from train.data import ImageDataset, Ints
from train.models.family import family_of

_FORMAT = 5

Tell = Callable[[int], None]
"""Hears how many more images are done."""


def weights_digest(module: nn.Module) -> str:
    """A short name for a module's weights."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()[:16]


def made_from(pipeline: Any, dataset: ImageDataset, indices: Ints, text: bool = False) -> dict[str, Any]:
    """What latents depend on: autoencoder and its scale, tokenizers, text encoders where used, images, their shapes."""
    family, parts = family_of(pipeline), sorted(pipeline.components.items())
    tokenizers = [part for name, part in parts if name.startswith("tokenizer") and part is not None]
    return {
        "format": _FORMAT,
        "vae": digest([weights_digest(pipeline.vae), pipeline.vae.config.scaling_factor, family.shift(pipeline.vae)]),
        "tokenizer": digest([[t.get_vocab(), t.model_max_length] for t in tokenizers]),
        "text_encoder": weights_digest(family.text_encoder(pipeline)) if text else None,
        "pictures": dataset.samples.fingerprint,
        "shapes": digest([dataset.shapes, dataset.bucket[indices].tolist()]),
        "numbers": digest(indices.tolist()),
    }


def shards_of(dataset: ImageDataset, indices: Ints, shard_size: int = 1024) -> list[Ints]:
    """The indices of each shard: in order, one shape per shard."""
    parts = [indices[dataset.bucket[indices] == b] for b in np.unique(dataset.bucket[indices])]
    return [part[i : i + shard_size] for part in parts for i in range(0, len(part), shard_size)]


def latents_size(pipeline: Any, dataset: ImageDataset, indices: Ints, text: bool = False) -> int:
    """About the bytes that the latents of these images take."""
    encoders = family_of(pipeline).text_encoders(pipeline).values()
    width = sum(encoder.config.hidden_size for encoder in encoders) if text else 2
    factor, channels = pipeline.vae_scale_factor**2, pipeline.vae.config.latent_channels
    areas = np.array([h * w for h, w in dataset.shapes])[dataset.bucket[indices]]
    some = indices[:: max(1, len(indices) // 256)].tolist()  # captions, of which the length of all is told
    tokens = family_of(pipeline).tokenize(pipeline, [str(dataset.samples.facts(i)["caption"] or "") for i in some])
    words = np.mean([len(t) for t in tokens]) * width
    return int(2 * (areas.sum() * channels // factor + words * len(indices)))


def precompute_latents(
    pipeline: Any,
    dataset: ImageDataset,
    indices: Ints,
    folder: Path,
    shard_size: int = 1024,
    *,
    text: bool = False,
    threads: int = 2,
    tell: Tell = lambda count: None,
    write_shards: Callable[[dict[str, Any], list[int]], None] | None = None,
) -> LatentDataset:
    """Write the latents of these images, as far as they are not there already, made with the same; returns them.

    Latents are the mean of the autoencoder's posterior, as training without this step takes them, rounded to float16.
    With `text` the states of the text encoder take the place of token ids: for a text encoder that is not trained.
    What a caption's tokens are dropped for, '', is kept too. Raises DiskFull before anything is computed.

    Args:
        write_shards: called with `made_from` and the numbers of missing shards, where others than this process write
            them, by `write_shard`.
    """
    made = made_from(pipeline, dataset, indices, text)
    before = read_json(folder / "made.json")
    if before is not None and {k: before.get(k) for k in made} == made:
        return LatentDataset(folder)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "made.json").unlink(missing_ok=True)
    shards = shards_of(dataset, indices, shard_size)
    missing = []
    for i, part in enumerate(shards):
        path = folder / f"{shard_name(i)}.safetensors"
        record = read_json(path.with_suffix(".json"))
        same = record and record["made"] == digest(made) and record["numbers"] == part.tolist()
        if not (same and path.is_file() and path.stat().st_size == record["bytes"]):
            missing.append(i)
    check_space(folder, sum(latents_size(pipeline, dataset, shards[i], text) for i in missing))
    tell(sum(map(len, shards)) - sum(len(shards[i]) for i in missing))
    if write_shards and missing:
        write_shards(made, missing)
    else:
        for i in missing:
            write_shard(pipeline, dataset, shards[i], folder, i, made, text=text, threads=threads, tell=tell)

    with torch.no_grad():
        tokens = family_of(pipeline).tokenize(pipeline, [""])
        empty = {"text": _text_states(pipeline, tokens)} if text else {"tokens": tokens[0].int()}
    with atomic(folder / "empty.safetensors") as f:
        f.write(save(empty))
    names = [f"{shard_name(i)}.safetensors" for i in range(len(shards))]
    sizes = {name: [len(part), (folder / name).stat().st_size] for name, part in zip(names, shards, strict=True)}
    write_json(folder / "made.json", {**made, "shards": sizes})
    return LatentDataset(folder)


@torch.no_grad()
def write_shard(
    pipeline: Any,
    dataset: ImageDataset,
    indices: Ints,
    folder: Path,
    shard: int,
    made: dict[str, Any],
    *,
    text: bool = False,
    threads: int = 2,
    tell: Tell = lambda count: None,
) -> None:
    """Encode the images of one shard and write its two files, each whole or absent, the record last."""
    family = family_of(pipeline)
    parts = [indices[i : i + 32].tolist() for i in range(0, len(indices), 32)]
    keys: list[str] = []
    views = torch.tensor([dataset.view(i) for i in indices.tolist()], dtype=torch.int32)
    latents, words, lengths = [], [], []
    with ThreadPoolExecutor(threads) as pool:
        ahead = pool.map(dataset.load, parts[0])
        for following in [*parts[1:], []]:  # is read while the part before it is encoded
            loaded, ahead = list(ahead), pool.map(dataset.load, following)
            images, tokens = torch.stack([x[1] for x in loaded]), [x[2] for x in loaded]
            keys += [str(x[0]) for x in loaded]
            latents.append(family.encode_images(pipeline.vae, images.to(pipeline.vae.device)).half().cpu())
            words.append(_text_states(pipeline, tokens) if text else torch.cat(tokens).int())
            lengths += [len(t) for t in tokens]
            tell(len(loaded))
    tensors = {"latents": torch.cat(latents).contiguous(), "text" if text else "tokens": torch.cat(words)}
    data = save({**tensors, "lengths": torch.tensor(lengths, dtype=torch.int32), "views": views})
    check_space(folder, len(data))
    path = folder / f"{shard_name(shard)}.safetensors"
    path.with_suffix(".json").unlink(missing_ok=True)
    with atomic(path) as f:
        f.write(data)
    record = {"made": digest(made), "numbers": indices.tolist(), "keys": keys, "bytes": len(data)}
    write_json(path.with_suffix(".json"), record)


def _text_states(pipeline: Any, tokens: Sequence[Tensor]) -> Tensor:
    """What the text encoder makes of captions, one after the other: (all, width)."""
    lengths = torch.tensor([len(t) for t in tokens])
    family = family_of(pipeline)
    padded = pad_sequence(list(tokens), batch_first=True).to(family.network(pipeline).device)
    states = family.encode_text(family.text_encoder(pipeline).eval(), padded, lengths)
    rows = [row[:length] for row, length in zip(states, lengths.tolist(), strict=True)]
    return torch.cat(rows).to(family.text_dtype).cpu()


class LatentDataset:
    """Precomputed latents as examples for a stream, read by memory map, under the indices that the images have.

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
        self._words = "text" if made["text_encoder"] else "tokens"

        names = sorted(made["shards"])
        counts = [made["shards"][name][0] for name in names]
        records = [read_json((self.folder / name).with_suffix(".json")) for name in names]
        self._keys = [record["keys"] for record in records]
        # mapped memory, whose rows are read when they are touched: four times as fast as a slice of the file for each
        # row, and a GPU takes 10,000 small latents a second
        self._views: list[Tensor] = []
        self._mapped: list[tuple[Tensor, Tensor, list[int]]] = []  # latents, words, where those of each caption end
        for name in names:
            with safe_open(self.folder / name, "pt") as file:
                ends = [0, *file.get_tensor("lengths").cumsum(0).tolist()]
                self._mapped.append((file.get_tensor("latents"), file.get_tensor(self._words), ends))
                self._views.append(file.get_tensor("views"))
        self._empty = self._typed(load((self.folder / "empty.safetensors").read_bytes())[self._words])

        shapes = [tuple(latents.shape[1:]) for latents, _, _ in self._mapped]
        kinds = sorted(set(shapes))
        indices = np.concatenate([np.array(record["numbers"], np.int64) for record in records])
        self._count = len(indices)
        self._place = np.full((indices.max() + 1, 2), -1, np.int64)  # (shard, row)
        self._place[indices] = [(i, row) for i, count in enumerate(counts) for row in range(count)]
        self.bucket = np.full(indices.max() + 1, -1, np.int64)
        self.bucket[indices] = np.repeat([kinds.index(shape) for shape in shapes], counts)

    def __len__(self) -> int:
        return self._count

    def _typed(self, words: Tensor) -> Tensor:
        return words.float() if self._words == "text" else words.long()

    def load(self, index: int, dropped: bool = False) -> tuple[str, Tensor, Tensor]:
        """(key, (c, h, w) float32, tokens, or the text encoder's states (length, width) float32)."""
        shard, row = self._place[index].tolist()
        if shard < 0:
            raise IndexError(f"image {index} has no latents in {self.folder}")
        latents, words, ends = self._mapped[shard]
        text = self._empty if dropped else self._typed(words[ends[row] : ends[row + 1]])
        return self._keys[shard][row], latents[row].float(), text

    def view(self, index: int) -> list[int]:
        """What of the image is shown (`data.view_of`)."""
        shard, row = self._place[index].tolist()
        view: list[int] = self._views[shard][row].tolist()
        return view
