"""Captioned images to train on.

`open_samples` gives a folder of them as a sequence of samples (curate.sources.find says of which kinds it may be);
`ImageDataset` prepares them for a model; `split` sets some aside; `Stream` is the endless order in which one rank meets
its share, known by two integers.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from aesthetic.errors import UserError
from aesthetic.splits import groups_of
from aesthetic.untrusted import printable
from curate.images.decode import decode
from curate.images.header import probe
from curate.images.process import perceptual_hash
from curate.ledger.schema import RowError
from curate.sources.dataset import MapDataset, Sample
from curate.sources.find import open_folder
from curate.store.files import digest
from train.captions import CAPTION_ALONE, CaptionMix, Choose, first_caption, no_caption

Ints = npt.NDArray[np.int64]

MIN_IMAGES = 8
"""Images below which training is refused: fewer can't be split, nor fill a batch."""


def open_samples(folder: str | Path, caption: str | None = None, captions: str | None = None) -> MapDataset:
    """The captioned images of a folder, whatever of the kinds it is that curate.sources.find reads.

    `caption` is that of images without one, `captions` a mix of columns (see `CaptionMix.parse`). Raises UserError
    where there is no such folder, no image in it, too few, or none with a caption, or with one in a column of the mix.
    """
    samples = open_folder(folder, caption)
    if len(samples) < MIN_IMAGES:
        raise UserError(f"{folder} holds {len(samples)} images: too few to train on, at least {MIN_IMAGES} are needed")
    samples.caption_columns = CaptionMix.parse(captions).columns
    if captions is not None:
        samples.check_caption_columns()
    elif not samples.has_captions():
        samples.problems.refuse_many("json", len(samples), str(folder))
        raise UserError(
            f"none of the {len(samples)} images in {folder} has a caption. Captions are NAME.txt beside NAME.jpg, "
            f"or a column `text` of metadata.csv or metadata.jsonl beside `file_name`; --caption TEXT gives all of "
            "them the same. " + " ".join(samples.notes())
        )
    return samples


# ----------------------------------------------------------------------------------------------- ready for the model


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step."""

    keys: list[str]
    slots: list[int]  # the place of each sample in the whole batch, over all ranks
    images: Tensor  # (n, 3, h, w) float32 in [-1, 1]; or latents, (n, c, h / f, w / f)
    latent: bool  # which of the two
    tokens: Tensor  # (n, longest) int64; or what a frozen text encoder makes of them, (n, longest, width) float32
    lengths: Tensor  # (n,) int64, on the CPU: how many tokens each caption has; what is beyond is 0
    cursor: tuple[int, int]  # (epoch, position) of the batch that comes after this one


class TrainDataset(Protocol):
    """What a stream takes its batches from."""

    latent: bool
    bucket: Ints  # (n,): examples of one bucket have one shape

    def __len__(self) -> int: ...
    def load(self, index: int, choose: Choose = first_caption) -> tuple[str, Tensor, Tensor]:
        """(key, image or latents, tokens or the text encoder's states of the caption that is chosen)."""
        ...


class ImageDataset:
    """Samples decoded, scaled and cut to the model's size, their captions as token ids.

    With `buckets` images keep about their aspect ratio: each goes to the nearest of diffusers' ladder of shapes with
    about size * size pixels; shapes that fewer than `least` images have are given up. Without, all are square. What is
    cut off is cut evenly on both sides.

    Args:
        samples: what `open_samples` gave.
        tokenize: captions -> the token ids of each, (length,) int64.
        size: pixels of a side; a multiple of `step`.
    """

    latent = False

    def __init__(
        self,
        samples: MapDataset,
        tokenize: Callable[[list[str]], Sequence[Tensor]],
        size: int,
        *,
        buckets: bool = False,
        step: int = 8,
        least: int = 1,
    ) -> None:
        self.samples = samples
        self._tokenize = tokenize
        self.shapes, self.bucket = [(size, size)], np.zeros(len(samples), np.int64)
        if buckets:
            self.shapes, self.bucket = _buckets(samples, size, step, least)

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int, choose: Choose = first_caption) -> tuple[str, Tensor, Tensor]:
        """(key, (3, h, w) float32 in [-1, 1], tokens)."""
        sample, image = self._read(index)
        chosen = choose([bool(text) for text in sample.captions])
        return sample.key, image, self._tokenize([(sample.captions[chosen] if chosen is not None else None) or ""])[0]

    def load_all(self, index: int) -> tuple[str, Tensor, list[Tensor | None]]:
        """As `load`, with the tokens of each caption column; None where it has no text."""
        sample, image = self._read(index)
        texts = [text for text in sample.captions if text]
        tokens = iter(self._tokenize(texts) if texts else ())
        return sample.key, image, [next(tokens) if text else None for text in sample.captions]

    def _read(self, index: int) -> tuple[Sample, Tensor]:
        height, width = self.shapes[self.bucket[index]]
        try:
            sample = self.samples[index]
        except RowError as e:
            raise _unreadable(self.samples.key(index), str(e)) from e
        pixels = torch.from_numpy(crop_resize(decode_sample(sample, 2 * max(height, width)), height, width))
        return sample, pixels.permute(2, 0, 1).float().div_(127.5).sub_(1)


def decode_sample(sample: Sample, min_side: int) -> npt.NDArray[np.uint8]:
    """(h, w, 3), its short side at least `min_side` where the file has that. Raises UserError naming the sample."""
    try:
        return decode(sample.image, min_side=min_side)
    except RowError as e:
        raise _unreadable(sample.key, str(e)) from e


def _unreadable(key: str, reason: str) -> UserError:
    return UserError(f"the image {key} can't be read ({reason}). Remove it, or curate the folder first.")


def crop_resize(pixels: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """(h, w, 3): the middle of it, as much as has the shape of height x width, cut out and then scaled to that."""
    scale = max(height / pixels.shape[0], width / pixels.shape[1])
    rows, columns = round(height / scale), round(width / scale)
    top, left = (pixels.shape[0] - rows) // 2, (pixels.shape[1] - columns) // 2
    pixels = pixels[top : top + rows, left : left + columns]
    if (rows, columns) != (height, width):
        interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        pixels = cv2.resize(pixels, (width, height), interpolation=interpolation)  # type: ignore[assignment]
    return np.ascontiguousarray(pixels)


def _buckets(samples: MapDataset, size: int, step: int, least: int) -> tuple[list[tuple[int, int]], Ints]:
    """The shapes in use and the shape of each image: the nearest in log aspect ratio that enough others share."""
    from diffusers.training_utils import generate_aspect_ratio_buckets

    ratios = []
    for index in range(len(samples)):  # by its facts where they are possible, else by the file's header
        facts = samples.facts(index)
        height, width = (_number(facts.get(name)) for name in ("height", "width"))
        if not all(1 <= side <= 65_535 for side in (height, width)):
            try:
                _, width, height = probe(samples.image(index))
            except RowError:  # whoever reads it gets the error; it is in no one's way here
                height = width = 1
        ratios.append(int(height) / int(width))

    ladder = generate_aspect_ratio_buckets(size, divisibility=step)
    aspect = np.log(ratios)
    while True:
        distance = np.abs(aspect[:, None] - np.log([h / w for h, w in ladder])[None])
        nearest = distance.argmin(1)
        counts = np.bincount(nearest, minlength=len(ladder))
        rare = [i for i in np.argsort(counts, kind="stable") if counts[i] < least]
        if not rare or len(ladder) == 1:
            used = np.flatnonzero(counts)
            return [ladder[i] for i in used], np.searchsorted(used, nearest).astype(np.int64)
        del ladder[int(rare[0])]


# ------------------------------------------------------------------------------------------------------------- split


@dataclass(frozen=True)
class ImageScan:
    """What reading every image once shows: by what its copies are known, and which can't be read."""

    keys: list[str]
    sha256: list[str | None]
    phash: list[str | None]
    unreadable: dict[int, str]  # index -> reason


def scan_images(samples: MapDataset, tell: Callable[[int], None] = lambda count: None) -> ImageScan:
    """Decode every image, small where its format allows that. `tell` hears how many more are done.

    Raises UserError where packed shards hold other bytes than were packed: this is read once, as images are.
    """

    def scan(index: int) -> tuple[str, str | None, str | None, str | None]:
        """(key, sha256, perceptual hash, why it can't be read)."""
        facts = samples.facts(index)
        key, sha256 = str(facts.get("key", index)), _hexadecimal(facts.get("sha256"), 64)
        try:
            pixels = decode(samples.image(index), min_side=32)
            return key, sha256, _hexadecimal(facts.get("phash"), 16) or perceptual_hash(pixels), None
        except RowError as e:
            return key, sha256, None, str(e)

    samples.check_bytes()
    rows = []
    with ThreadPoolExecutor() as pool:
        for row in pool.map(scan, range(len(samples))):
            rows.append(row)
            tell(1)
    keys, sha256, phash, reasons = (list(column) for column in zip(*rows, strict=True))
    return ImageScan(keys, sha256, phash, {i: reason for i, reason in enumerate(reasons) if reason is not None})


def _hexadecimal(value: Any, digits: int) -> str | None:
    """A hash as lists and shards have it; None for what is none."""
    return value if isinstance(value, str) and re.fullmatch(f"[0-9a-fA-F]{{{digits}}}", value) else None


def split(
    samples: MapDataset, share: float = 0.1, most: int = 256, known: ImageScan | None = None
) -> tuple[Ints, Ints]:
    """(indices to train on, indices held out): no image is held out of which a near-duplicate is trained on.

    Near-duplicates are equal files and perceptual hashes within 4 of 64 bits; hashes are the column `phash` where there
    is one, and computed otherwise. Which groups are held out follows from hashes of their keys: the same images give
    the same split. At most `share` of the images and `most` of them; none where that is less than one.

    Images that `known` says can't be read are in neither. Without it, the first such image raises UserError.
    """
    if known is None:
        known = scan_images(samples)
        for index, reason in known.unreadable.items():
            raise _unreadable(known.keys[index], reason)
    indices = np.array([i for i in range(len(samples)) if i not in known.unreadable], np.int64)
    room = min(most, int(share * len(indices)))
    if not room:
        return indices, indices[:0]
    keys, sha256, phash = ([column[i] for i in indices] for column in (known.keys, known.sha256, known.phash))
    groups = np.array(groups_of(keys, sha256=sha256, phash=phash).names)
    names, sizes = np.unique(groups, return_counts=True)
    held_out: list[str] = []
    for i in sorted(range(len(names)), key=lambda i: digest(["held out", str(names[i])])):
        if sizes[i] <= room:
            held_out.append(str(names[i]))
            room -= int(sizes[i])
        if not room:
            break
    apart = np.isin(groups, held_out)
    return indices[~apart], indices[apart]


def sampling_weights(samples: MapDataset, column: str) -> npt.NDArray[np.float64]:
    """How often each image is used, (n,): in proportion to its score; without a score never.

    Raises UserError where no image has the column, or a score is negative or no finite number.
    """
    values: list[Any] = [samples.facts(i).get(column) for i in range(len(samples))]
    scores = np.array([_number(value) for value in values])
    wrong = [i for i in range(len(values)) if values[i] not in (None, "") and not math.isfinite(scores[i])]
    wrong = [i for i in wrong if not (isinstance(values[i], float) and math.isnan(values[i]))]  # one way to say none
    if len(wrong) == len(values) or (np.isnan(scores).all() and not wrong):
        some = (samples.facts(i).items() for i in range(min(len(samples), 1000)))  # the first may lack a score
        known = sorted({k for facts in some for k, v in facts if isinstance(v, int | float)})
        raise UserError(f"no image in {samples.folder} has a number {column!r}; there are {', '.join(known) or 'none'}")
    if wrong:
        first = ", ".join(f"{printable(samples.key(i), 80)}: {printable(repr(values[i]), 40)}" for i in wrong[:3])
        raise UserError(
            f"{column} is no finite number in {len(wrong):,} of {len(values):,} images ({first}): to weight by it, "
            f"correct these, or leave them empty (such images are not drawn)"
        )
    weights = np.nan_to_num(scores)
    with np.errstate(over="ignore"):
        if (scores < 0).any() or not weights.sum():
            raise UserError(
                f"{column} goes down to {np.nanmin(scores)}: as weights of sampling, scores must be positive"
            )
        return weights if np.isfinite(weights.sum()) else weights / weights.max()


def _number(value: Any) -> float:
    """A score as the ledger or a csv file has it; NaN where there is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


# ------------------------------------------------------------------------------------------------------------ stream


class Stream:
    """The endless order of batches, and one rank's share of it.

    An epoch is a seeded permutation of the indices, dealt into whole batches of one bucket each, in a seeded order; the
    last batch of a bucket is filled up from its beginning. With `weights` each index comes as often in an epoch as its
    share says, rounded up or down at random (systematic resampling). Rank r of n takes places r, r + n, r + 2n ... of
    each batch: however many ranks there are, all of them together see the same batches.

    Everything random is a function of (seed, epoch, position, place): the cursor is all there is to save.

    Args:
        dataset: where images and tokens come from.
        indices: which of them.
        batch: samples per step over all ranks; a multiple of the number of ranks.
        drop: share of captions replaced by '', for classifier-free guidance (Ho and Salimans 2022).
        captions: how often the caption of which column is drawn.
        workers: threads that read and decode.
    """

    def __init__(
        self,
        dataset: TrainDataset,
        indices: Ints,
        *,
        batch: int,
        seed: int = 0,
        drop: float = 0.1,
        captions: CaptionMix = CAPTION_ALONE,
        weights: npt.NDArray[np.float64] | None = None,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 2,
    ) -> None:
        if batch < 1 or batch % ranks:
            raise UserError(f"a batch of {batch} can't be shared evenly by {ranks} workers")
        if not len(indices):
            raise UserError("there is no image to train on")
        self.dataset, self._indices, self._batch, self._seed, self._drop = dataset, indices, batch, seed, drop
        self._captions = captions
        self._weights = None if weights is None else weights[indices] / weights[indices].sum()
        self._rank, self._ranks, self._workers = rank, ranks, max(1, workers)
        self._order = lru_cache(maxsize=2)(self.epoch_order)

    def epoch_order(self, epoch: int) -> Ints:
        """The batches of an epoch: (batches, batch) indices."""
        rng = np.random.default_rng([self._seed, epoch])
        indices = self._indices
        if self._weights is not None:
            ends = np.cumsum(self._weights) * len(indices)
            until = np.floor(np.concatenate([[0.0], ends + rng.random()])).astype(np.int64)
            indices = np.repeat(indices, until[1:] - until[:-1])
        indices = rng.permutation(indices)
        buckets = self.dataset.bucket[indices]
        rows = []
        for bucket in np.unique(buckets):
            members = indices[buckets == bucket]
            rows.append(np.resize(members, (math.ceil(len(members) / self._batch), self._batch)))
        return rng.permutation(np.concatenate(rows))

    def batches(self, cursor: tuple[int, int] = (0, 0)) -> Generator[Batch]:
        """This rank's share of every batch from the cursor (epoch, position) on, without end."""
        epoch, position = cursor
        with ThreadPoolExecutor(self._workers, thread_name_prefix="batches") as pool:
            ahead: deque[Future[Batch]] = deque()
            try:
                while True:
                    while len(ahead) < self._workers + 1:
                        ahead.append(pool.submit(self._load, epoch, position))
                        position += 1
                        if position == len(self._order(epoch)):
                            epoch, position = epoch + 1, 0
                    yield ahead.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, epoch: int, position: int) -> Batch:
        order = self._order(epoch)
        slots = list(range(self._rank, self._batch, self._ranks))
        drop, draws = (np.random.default_rng([self._seed, epoch, position, k]).random(self._batch) for k in (1, 2))
        choose = [
            no_caption if d < self._drop else partial(self._captions.choose, x)
            for d, x in zip(drop, draws, strict=True)
        ]
        after = (epoch, position + 1) if position + 1 < len(order) else (epoch + 1, 0)
        loaded = [self.dataset.load(int(order[position, slot]), choose[slot]) for slot in slots]
        return _collate(loaded, slots, self.dataset.latent, after)


def _collate(
    loaded: list[tuple[str, Tensor, Tensor]], slots: list[int], latent: bool, cursor: tuple[int, int]
) -> Batch:
    keys, images, tokens = zip(*loaded, strict=True)
    lengths = torch.tensor([len(t) for t in tokens])
    words = pad_sequence(list(tokens), batch_first=True)
    return Batch(list(keys), slots, torch.stack(images), latent, words, lengths, cursor)


def ordered_batches(dataset: TrainDataset, indices: Ints, size: int) -> Iterator[Batch]:
    """All of the indices once, in order, each with its first caption: for held-out loss. One bucket per batch."""
    for bucket in np.unique(dataset.bucket[indices]):
        members = indices[dataset.bucket[indices] == bucket]
        for start in range(0, len(members), size):
            part = [int(i) for i in members[start : start + size]]
            yield _collate([dataset.load(i) for i in part], part, dataset.latent, (0, 0))
