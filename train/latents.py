"""Latents and token ids computed once: for a model whose autoencoder is frozen, most of the work of reading an image.

    LATENTS/00000.safetensors    latents (n, c, h, w) float16, one shape per file; tokens (all, ) int32, those of one
                                 caption after those of another, all columns' of an image before the next image's, or
                                 where the text encoder is frozen too what it makes of them, text (all, width) float16
                                 or bfloat16; lengths (n, columns) int32, how many are of each caption; 0: no text;
                                 views (n, 6) int32 (`data.view_of`)
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
import numpy.typing as npt
import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from aesthetic.errors import UserError
from aesthetic.files import atomic
from curate.layout import shard_name
from curate.store.files import check_space, digest, read_json, write_json
from train.captions import Choose, first_caption
from train.data import ImageDataset, Ints
from train.models.family import family_of

_FORMAT = 6

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
        "shapes": digest([dataset.shapes, _array_digest(dataset.bucket[indices])]),
        "numbers": _array_digest(indices),
    }


def _array_digest(numbers: Ints) -> str:
    return hashlib.sha256(np.ascontiguousarray(numbers, np.int64).tobytes()).hexdigest()[:16]


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
    some = np.sort(indices[:: max(1, len(indices) // 256)]).tolist()  # captions, of which the length of all is told
    samples = dataset.samples
    captions = [text for texts in samples.captions_at(some) for text in texts if text]
    tokens = family_of(pipeline).tokenize(pipeline, captions or [""])
    words = sum(map(len, tokens)) / len(some) * width
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
    Those of all caption columns are kept, and of '', which takes the place of dropped captions. Raises DiskFull before
    anything is computed.

    Args:
        write_shards: called with `made_from` and the numbers of missing shards, where others than this process write
            them, by `write_shard`.
    """
    if (kept := kept_latents(pipeline, dataset, indices, folder, text)) is not None:
        return kept
    made = made_from(pipeline, dataset, indices, text)
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


def kept_latents(
    pipeline: Any, dataset: ImageDataset, indices: Ints, folder: Path, text: bool = False
) -> LatentDataset | None:
    """The latents in a folder, if they are of all these images and made with the same."""
    before = read_json(folder / "made.json")
    if before is None:
        return None
    made = made_from(pipeline, dataset, indices, text)
    return LatentDataset(folder) if {k: before.get(k) for k in made} == made else None


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
    latents, words, lengths = [], [], []
    with ThreadPoolExecutor(threads) as pool, dataset.brought(indices):
        ahead = pool.map(dataset.load_all, parts[0])
        for following in [*parts[1:], []]:  # is read while the part before it is encoded
            loaded, ahead = list(ahead), pool.map(dataset.load_all, following)
            images, rows = torch.stack([x[1] for x in loaded]), [x[2] for x in loaded]
            keys += [str(x[0]) for x in loaded]
            latents.append(family.encode_images(pipeline.vae, images.to(pipeline.vae.device)).half().cpu())
            if tokens := [t for row in rows for t in row if t is not None]:
                words.append(_text_states(pipeline, tokens) if text else torch.cat(tokens).int())
            lengths += [[0 if t is None else len(t) for t in row] for row in rows]
            tell(len(loaded))
        views = torch.tensor([dataset.view(i) for i in indices.tolist()], dtype=torch.int32)
    if not words:  # no image of this shard has a caption
        words = [torch.zeros(0, 1, dtype=family.text_dtype) if text else torch.zeros(0, dtype=torch.int32)]
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
    family, rows = family_of(pipeline), []
    encoder, device = family.text_encoder(pipeline).eval(), family.network(pipeline).device
    for part in (tokens[i : i + 32] for i in range(0, len(tokens), 32)):
        lengths = torch.tensor([len(t) for t in part])
        padded = pad_sequence(list(part), batch_first=True).to(device)
        states = family.encode_text(encoder, padded, lengths)
        rows += [row[:n].to(family.text_dtype).cpu() for row, n in zip(states, lengths.tolist(), strict=True)]
    return torch.cat(rows)


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
        self._keys: list[pa.Array] = []  # not lists of str, of which ten millions would be most of the memory
        numbers: list[Ints] = []
        for name in names:
            record = read_json((self.folder / name).with_suffix(".json"))
            self._keys.append(pa.array(record["keys"], pa.string()))
            numbers.append(np.array(record["numbers"], np.int64))
        # mapped memory, whose rows are read when they are touched: four times as fast as a slice of the file for each
        # row, and a GPU takes 10,000 small latents a second
        self._views: list[Tensor] = []
        self._mapped: list[tuple[Tensor, Tensor, npt.NDArray[np.int64]]] = []  # latents, words, (n, columns, 2) of them
        for name in names:
            with safe_open(self.folder / name, "pt") as file:
                lengths = file.get_tensor("lengths").numpy().astype(np.int64)
                ends = lengths.cumsum().reshape(lengths.shape)
                spans = np.stack([ends - lengths, ends], -1)
                self._mapped.append((file.get_tensor("latents"), file.get_tensor(self._words), spans))
                self._views.append(file.get_tensor("views"))
        self._empty = self._typed(load((self.folder / "empty.safetensors").read_bytes())[self._words])

        shapes = [tuple(latents.shape[1:]) for latents, _, _ in self._mapped]
        kinds = sorted(set(shapes))
        self._count = sum(map(len, numbers))
        end = 1 + max(int(part.max()) for part in numbers)
        self._place = np.full((end, 2), -1, np.int32)  # (shard, row)
        self.bucket = np.full(end, -1, np.int64)
        for shard, (part, shape) in enumerate(zip(numbers, shapes, strict=True)):
            self._place[part] = np.stack([np.full(len(part), shard), np.arange(len(part))], 1)
            self.bucket[part] = kinds.index(shape)

    def __len__(self) -> int:
        return self._count

    def _typed(self, words: Tensor) -> Tensor:
        return words.float() if self._words == "text" else words.long()

    def load(self, index: int, choose: Choose = first_caption) -> tuple[str, Tensor, Tensor]:
        """(key, (c, h, w) float32, tokens, or the text encoder's states (length, width) float32)."""
        shard, row = self._place[index].tolist()
        if shard < 0:
            raise IndexError(f"image {index} has no latents in {self.folder}")
        latents, words, spans = self._mapped[shard]
        captions = spans[row].tolist()
        chosen = choose([start < end for start, end in captions])
        text = self._empty if chosen is None else self._typed(words[slice(*captions[chosen])])
        return self._keys[shard][row].as_py(), latents[row].float(), text

    def view(self, index: int) -> list[int]:
        """What of the image is shown (`data.view_of`)."""
        shard, row = self._place[index].tolist()
        view: list[int] = self._views[shard][row].tolist()
        return view
