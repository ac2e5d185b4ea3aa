"""Captioned images to train on.

`open_samples` gives a folder of them as a sequence of samples (curate.sources.find says of which kinds it may be);
`ImageDataset` prepares them for a model (train.split sets some aside); `Stream` is the endless order in which one rank
meets its share, known by two integers.
"""

from __future__ import annotations

import contextlib
import math
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
from aesthetic.untrusted import printable
from curate.images.decode import decode
from curate.images.header import probe
from curate.ledger.schema import RowError
from curate.sources.dataset import MapDataset, Sample
from curate.sources.find import open_folder
from curate.sources.packed import PackedShards, ShardsAhead
from train.captions import CAPTION_ALONE, CaptionMix, Choose, first_caption, no_caption
from train.split import unreadable_image

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
    tokens: (
        Tensor  # (n, longest) or (n, longest, 2) int64; or what frozen text encoders make of it, (.., width) float32
    )
    lengths: Tensor  # (n,) int64, on the CPU: how many tokens each caption has; what is beyond is 0
    views: Tensor  # (n, 6) int64: what of the images is shown (`view_of`)
    cursor: tuple[int, int]  # (epoch, position) of the batch that comes after this one


class TrainDataset(Protocol):
    """What a stream takes its batches from."""

    latent: bool
    bucket: Ints  # (n,): examples of one bucket have one shape

    def __len__(self) -> int: ...
    def load(self, index: int, choose: Choose = first_caption) -> tuple[str, Tensor, Tensor]:
        """(key, image or latents, tokens or the text encoder's states of the caption that is chosen)."""
        ...

    def view(self, index: int) -> list[int]:
        """What of the image is shown (`view_of`)."""
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
        ratios: what `aspect_ratios` gave, where that is known.
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
        ratios: npt.NDArray[np.float64] | None = None,
    ) -> None:
        self.samples = samples
        self._tokenize = tokenize
        self.shapes, self.bucket = [(size, size)], np.zeros(len(samples), np.int64)
        if buckets:
            self.shapes, self.bucket = buckets_of(
                aspect_ratios(samples) if ratios is None else ratios, size, step, least
            )

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def remote(self) -> PackedShards | None:
        """The samples, where they are tars on an object store that are read shard by shard."""
        return self.samples if isinstance(self.samples, PackedShards) and self.samples.remote else None

    @contextlib.contextmanager
    def brought(self, indices: Ints) -> Iterator[None]:
        """Within, these are read of whole shards, where they are on an object store."""
        if (remote := self.remote) is None:
            yield
            return
        with contextlib.closing(ShardsAhead(remote)) as ahead:
            ahead.want(np.unique(np.searchsorted(np.array(remote.ends), indices, side="right")).tolist())
            yield

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
            raise unreadable_image(self.samples.key(index), str(e)) from e
        pixels = torch.from_numpy(crop_resize(decode_sample(sample, 2 * max(height, width)), height, width))
        return sample, pixels.permute(2, 0, 1).float().div_(127.5).sub_(1)

    def view(self, index: int) -> list[int]:
        """What of the image is shown (`view_of`)."""
        return view_of(*_size(self.samples, index), *self.shapes[self.bucket[index]])


def decode_sample(sample: Sample, min_side: int) -> npt.NDArray[np.uint8]:
    """(h, w, 3), its short side at least `min_side` where the file has that. Raises UserError naming the sample."""
    try:
        return decode(sample.image, min_side=min_side)
    except RowError as e:
        raise unreadable_image(sample.key, str(e)) from e


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


def view_of(height: int, width: int, shown_height: int, shown_width: int) -> list[int]:
    """What of an image is shown, as Stable Diffusion XL is told it: its own height and width, how much is cut off above
    and on the left once it is scaled, and the height and width that are shown. All in pixels."""
    scale = max(shown_height / height, shown_width / width)
    top, left = (round(max(0.0, scale * a - b) / 2) for a, b in ((height, shown_height), (width, shown_width)))
    return [height, width, top, left, shown_height, shown_width]


def _size(samples: MapDataset, index: int) -> tuple[int, int]:
    """(height, width) of an image, by its facts where they are possible, else by the file's header."""
    facts = samples.facts(index)
    height, width = (_number(facts.get(name)) for name in ("height", "width"))
    if not all(1 <= side <= 65_535 for side in (height, width)):
        try:
            _, width, height = probe(samples.image(index))
        except RowError:  # whoever reads it gets the error; it is in no one's way here
            height = width = 1
    return int(height), int(width)


def aspect_ratios(samples: MapDataset) -> npt.NDArray[np.float64]:
    """Height by width of each image, (n,): by its facts where they are possible, else by the file's header."""
    ratios = np.empty(len(samples), np.float64)
    start = 0
    for heights, widths in samples.columns("height", "width"):
        sides = np.stack([_numbers(heights), _numbers(widths)])
        with np.errstate(invalid="ignore"):
            known = ((sides >= 1) & (sides <= 65_535)).all(0)
        sides[:, known] = np.floor(sides[:, known])
        for row in np.flatnonzero(~known).tolist():
            try:
                _, width, height = probe(samples.image(start + row))
            except RowError:  # whoever reads it gets the error; it is in no one's way here
                height = width = 1
            sides[:, row] = height, width
        ratios[start : start + len(heights)] = sides[0] / sides[1]
        start += len(heights)
    return ratios


def buckets_of(ratios: npt.NDArray[np.float64], size: int, step: int, least: int) -> tuple[list[tuple[int, int]], Ints]:
    """The shapes in use and the shape of each image: the nearest in log aspect ratio that enough others share."""
    from diffusers.training_utils import generate_aspect_ratio_buckets

    ladder = sorted(generate_aspect_ratio_buckets(size, divisibility=step), key=lambda shape: shape[0] / shape[1])
    known, times = np.unique(ratios, return_counts=True)
    while True:
        steps = np.log([h / w for h, w in ladder])
        edges = np.exp((steps[1:] + steps[:-1]) / 2)
        counts = np.bincount(np.searchsorted(edges, known), times, len(ladder)).astype(np.int64)
        rare = [i for i in np.argsort(counts, kind="stable") if counts[i] < least]
        if not rare or len(ladder) == 1:
            used = np.flatnonzero(counts)
            return [ladder[i] for i in used], np.searchsorted(used, np.searchsorted(edges, ratios)).astype(np.int64)
        del ladder[int(rare[0])]


# ----------------------------------------------------------------------------------------------------------- weights


def sampling_weights(samples: MapDataset, column: str) -> npt.NDArray[np.float64]:
    """How often each image is used, (n,): in proportion to its score; without a score never.

    Raises UserError where no image has the column, or a score is negative or no finite number.
    """
    scores, start, wrong, count = np.empty(len(samples)), 0, list[str](), 0
    for (values,) in samples.columns(column):
        scores[start : start + len(values)] = part = _numbers(values)
        for i in np.flatnonzero(~np.isfinite(part)).tolist():
            if values[i] not in (None, "") and not (isinstance(values[i], float) and math.isnan(values[i])):
                count += 1
                if len(wrong) < 3:
                    wrong.append(f"{printable(samples.key(start + i), 80)}: {printable(repr(values[i]), 40)}")
        start += len(values)
    if count == len(scores) or (np.isnan(scores).all() and not count):
        some = (samples.facts(i).items() for i in range(min(len(samples), 1000)))  # the first may lack a score
        known = sorted({k for facts in some for k, v in facts if isinstance(v, int | float)})
        raise UserError(f"no image in {samples.folder} has a number {column!r}; there are {', '.join(known) or 'none'}")
    if count:
        raise UserError(
            f"{column} is no finite number in {count:,} of {len(scores):,} images ({', '.join(wrong)}): to weight by "
            f"it, correct these, or leave them empty (such images are not drawn)"
        )
    weights = np.nan_to_num(scores)
    with np.errstate(over="ignore"):
        if (scores < 0).any() or not weights.sum():
            raise UserError(
                f"{column} goes down to {np.nanmin(scores)}: as weights of sampling, scores must be positive"
            )
        return weights if np.isfinite(weights.sum()) else weights / weights.max()


def _numbers(values: list[Any]) -> npt.NDArray[np.float64]:
    """`_number` of each value; of a parquet's column a tenth of the time."""
    if {*map(type, values)} <= {int, float, type(None)}:
        with contextlib.suppress(OverflowError):
            return np.array(values, np.float64)
    return np.array([_number(value) for value in values])


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
    last batch of a bucket is filled up from its beginning. Of shards on an object store it is one that asks for few of
    them at a time (`order_by_shards`), which are fetched ahead. With `weights` each index comes as often in an epoch as
    its share says, rounded up or down at random (systematic resampling). Rank r of n takes places r, r + n, r + 2n ...
    of each batch: however many ranks there are, all of them together see the same batches.

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
        self.dataset, self._batch, self._seed, self._drop = dataset, batch, seed, drop
        self._captions = captions
        self._indices = indices.astype(np.int32)  # half of the memory of an epoch's order, of which two may be held
        self._weights = None
        if weights is not None:
            self._weights = weights[indices]
            self._weights /= self._weights.sum()
        self._rank, self._ranks, self._workers = rank, ranks, max(1, workers)
        self._remote: PackedShards | None = getattr(dataset, "remote", None)
        self._order = lru_cache(maxsize=2)(self.epoch_order)
        self._uses = lru_cache(maxsize=2)(self._shard_uses)

    def epoch_order(self, epoch: int) -> npt.NDArray[np.int32]:
        """The batches of an epoch: (batches, batch) indices. For a moment it takes some 50 bytes for each of them."""
        rng = np.random.default_rng([self._seed, epoch])
        indices = self._indices
        if self._weights is not None:
            until = np.cumsum(self._weights)
            until *= len(indices)
            until += rng.random()
            np.floor(until, out=until)
            indices = np.repeat(indices, np.diff(until, prepend=0.0).astype(np.int32))
            del until
        indices = rng.permutation(indices)
        if self._remote is not None:
            return order_by_shards(rng, indices, self.dataset.bucket, np.array(self._remote.ends), self._batch)
        buckets = self.dataset.bucket[indices]
        rows = []
        for bucket in np.unique(buckets):
            members = indices[buckets == bucket]
            rows.append(np.resize(members, (math.ceil(len(members) / self._batch), self._batch)))
        return rng.permutation(np.concatenate(rows))

    def batches(self, cursor: tuple[int, int] = (0, 0)) -> Generator[Batch]:
        """This rank's share of every batch from the cursor (epoch, position) on, without end."""
        epoch, position = cursor
        shards = None if self._remote is None else ShardsAhead(self._remote)
        with ThreadPoolExecutor(self._workers, thread_name_prefix="batches") as pool:
            ahead: deque[Future[Batch]] = deque()
            try:
                while True:
                    while len(ahead) < self._workers + 1:
                        if shards is not None:
                            shards.want(self._wanted(epoch, position, len(ahead)))
                        ahead.append(pool.submit(self._load, epoch, position))
                        position += 1
                        if position == len(self._order(epoch)):
                            epoch, position = epoch + 1, 0
                    yield ahead.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                if shards is not None:
                    shards.close()

    def _shard_uses(self, epoch: int) -> list[tuple[int, int, int]]:
        """(the position at which this rank first needs it, the last one, shard), of each shard, in that order."""
        assert self._remote is not None
        order = self._order(epoch)[:, self._rank :: self._ranks]
        shard = np.searchsorted(np.array(self._remote.ends), order.ravel(), side="right")
        position = np.repeat(np.arange(len(order)), order.shape[1])
        count = len(self._remote.ends)
        first, last = np.full(count, len(order)), np.full(count, -1)
        np.minimum.at(first, shard, position)
        np.maximum.at(last, shard, position)
        return sorted((int(first[s]), int(last[s]), s) for s in np.flatnonzero(last >= 0).tolist())

    def _wanted(self, epoch: int, position: int, in_flight: int) -> list[int]:
        """The shards of the batch at a position and of those before it that are not done, and the next of them."""
        found, more = list[int](), LANES
        if position < in_flight and epoch > 0:  # batches of the epoch before are still being read
            length = len(self._order(epoch - 1))
            found += [s for first, last, s in self._uses(epoch - 1) if last >= length + position - in_flight]
        for at in (epoch, epoch + 1):
            for first, last, shard in self._uses(at):
                if first > position or at > epoch:
                    if not more:
                        return list(dict.fromkeys(found))
                    more -= 1
                    found.append(shard)
                elif last >= position - in_flight:
                    found.append(shard)
        return list(dict.fromkeys(found))

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
        views = [self.dataset.view(int(order[position, slot])) for slot in slots]
        return _collate(loaded, views, slots, self.dataset.latent, after)


LANES = 8
"""Shards at most that a batch on an object store is made of."""


def order_by_shards(
    rng: np.random.Generator, indices: npt.NDArray[Any], bucket: Ints, ends: Ints, batch: int
) -> npt.NDArray[Any]:
    """Batches of indices, (batches, batch), that need few shards at a time: LANES, or as many as divide a batch.

    Shards are put in a random order, and the samples of each, which `indices` has in a random order; all that is cut
    into lanes of one length, and place p of a batch takes the next of lane p modulo their number. So a batch mixes as
    many shards as there are lanes, and rank r of n, which takes places r, r + n ..., needs those of its own lanes alone
    where n divides their number. Buckets advance side by side.

    ends: how many samples there are up to the end of each shard. A function of the random numbers and the arguments.
    """
    lanes = next(n for n in range(min(LANES, batch, len(ends)), 0, -1) if batch % n == 0)
    turn = rng.permutation(len(ends))
    indices = indices[np.argsort(turn[np.searchsorted(ends, indices, side="right")], kind="stable")]
    rows, times = [], []
    for b in np.unique(bucket[indices]):
        members = indices[bucket[indices] == b]
        count = math.ceil(len(members) / batch)
        by_lane = np.resize(members, (lanes, count, batch // lanes))
        rows.append(by_lane.transpose(1, 2, 0).reshape(count, batch))
        times.append((np.arange(count) + rng.random()) / count)
    return np.concatenate(rows)[np.argsort(np.concatenate(times), kind="stable")]


def _collate(
    loaded: list[tuple[str, Tensor, Tensor]],
    views: list[list[int]],
    slots: list[int],
    latent: bool,
    cursor: tuple[int, int],
) -> Batch:
    keys, images, tokens = zip(*loaded, strict=True)
    lengths = torch.tensor([len(t) for t in tokens])
    words = pad_sequence(list(tokens), batch_first=True)
    return Batch(list(keys), slots, torch.stack(images), latent, words, lengths, torch.tensor(views), cursor)


def ordered_batches(dataset: TrainDataset, indices: Ints, size: int) -> Iterator[Batch]:
    """All of the indices once, in order, each with its first caption: for held-out loss. One bucket per batch."""
    for bucket in np.unique(dataset.bucket[indices]):
        members = indices[dataset.bucket[indices] == bucket]
        for start in range(0, len(members), size):
            part = [int(i) for i in members[start : start + size]]
            views = [dataset.view(i) for i in part]
            yield _collate([dataset.load(i) for i in part], views, part, dataset.latent, (0, 0))
