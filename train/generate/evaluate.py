"""How good a model is, in figures that stand beside what they would be by chance and at best.

Which pictures it was not trained on, its loss on them, whether what it draws shows what was asked, whether that is a
copy of training pictures. How far they lie from real ones as a whole is in train.generate.distances. Each function
takes arrays and can be used by itself; `tastemaker evaluate` puts them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aesthetic.errors import UserError
from aesthetic.metrics import Estimate, Statistic, estimate
from aesthetic.splits import NEAR_BITS, groups_of
from curate.annotators.base import Annotator, scores_of
from curate.encoders.base import Encoder
from curate.images.resize import perceptual_hash
from curate.store.files import digest, read_json
from train.data import ImageScan, Ints, MapDataset, TrainDataset, open_samples, ordered_batches, scan_images, split
from train.devices import autocast, out_of_memory
from train.models.info import training_record

Array = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.floating]
Pixels = npt.NDArray[np.uint8]
Tell = Callable[[int], None]
"""Hears how many more are done."""

DEALINGS = 1000
"""How often captions are dealt out at random, to see what chance gives."""

CLOSE = 0.95
"""Of real pictures that were not trained on, the share that lies farther from the training pictures than what is called
close to them. Of a model that has learnt nothing by heart 1 - CLOSE of the pictures are close."""

LEAST_CLOSE = 20
"""Real pictures below which that border is not drawn: fewer have no upper twentieth."""


# ------------------------------------------------------------------------------------ what the model was not trained on


@dataclass(frozen=True)
class Unseen:
    """The pictures to measure on, and those that the model was trained on where these are known."""

    numbers: Ints  # of the samples, those that it was not trained on as far as is known
    unreadable: int  # of the samples
    training: MapDataset | None
    trained_on: Ints  # of `training`
    facts: dict[str, Any] | None  # the model's train.json
    about: str  # what is known, in a sentence


def unseen(model: str | Path, samples: MapDataset, tell: Tell = lambda count: None) -> Unseen:
    """Which of these pictures a model was not trained on.

    Where they are its training data, those that its run held out. Where they are others, all but near-duplicates of
    training pictures (as `train.data.split` knows them), if these are still where they were. All that can be read,
    where nothing is known. `tell` hears of pictures that have been looked at.

    Raises UserError where none is left.
    """
    record = training_record(model)
    nothing = np.zeros(0, np.int64)
    if record is None or not _of_data(record[1]):
        found = Unseen(
            *_readable(scan_images(samples, tell)), None, nothing, None,
            "the model has no train.json, which would tell what it was trained on: it may have seen these pictures",
        )  # fmt: skip
    else:
        folder, facts = record
        where, then = Path(facts["data"]["folder"]), facts["settings"]["data"]
        if then == samples.fingerprint:
            chosen, held, lost = _sides(folder, samples, tell)
            about = "held out by the training run; near-duplicates of none of them were trained on"
            found = Unseen(held, lost, samples, chosen, facts, about)
        elif (training := _still_there(where, facts["settings"])) is None:
            about = f"other pictures than the model was trained on; those are no longer in {where.name} as they were, "
            about += "so that near-duplicates of them can't be told"
            found = Unseen(*_readable(scan_images(samples, tell)), None, nothing, facts, about)
        else:
            found = _others(folder, facts, samples, training, tell)
    if not len(found.numbers):
        raise UserError(f"{samples.folder}: there is no picture to measure on ({found.about}). Give others.")
    return found


def _of_data(facts: dict[str, Any]) -> bool:
    """Whether a train.json says of which pictures a model was trained."""
    return bool((facts.get("data") or {}).get("folder") and facts["settings"].get("data"))


def _readable(known: ImageScan) -> tuple[Ints, int]:
    """(numbers that can be read, how many can't)."""
    return np.array([i for i in range(len(known.keys)) if i not in known.unreadable], np.int64), len(known.unreadable)


def _sides(folder: Path, samples: MapDataset, tell: Tell) -> tuple[Ints, Ints, int]:
    """(trained on, held out, how many can't be read) of a run's own data."""
    told = read_json(folder / "data.json")
    if not _is_split(told, samples):  # the same pictures give the same split
        known = scan_images(samples, tell)
        return *split(samples, known=known), len(known.unreadable)
    out = {*told["held_out"], *map(int, told["unreadable"])}
    chosen = np.array([i for i in range(len(samples)) if i not in out], np.int64)
    return chosen, np.array(told["held_out"], np.int64), len(told["unreadable"])


def _is_split(told: Any, samples: MapDataset) -> bool:
    """Whether a data.json is of these pictures, and says what it should."""
    if not isinstance(told, dict) or told.get("data") != samples.fingerprint:
        return False
    held, lost = told.get("held_out"), told.get("unreadable")
    if not (
        isinstance(held, list) and isinstance(lost, dict) and all(str(n).isascii() and str(n).isdigit() for n in lost)
    ):
        return False
    return all(type(n) is int and 0 <= n < len(samples) for n in held)


def _still_there(folder: Path, settings: dict[str, Any]) -> MapDataset | None:
    fingerprint = settings["data"]
    try:
        samples = open_samples(folder, settings.get("caption"))
    except UserError:
        return None
    return samples if samples.fingerprint == fingerprint else None


def _others(folder: Path, facts: dict[str, Any], samples: MapDataset, training: MapDataset, tell: Tell) -> Unseen:
    chosen, _, _ = _sides(folder, training, tell)
    known, theirs = scan_images(samples, tell), scan_images(training, tell)
    numbers, lost = _readable(known)
    ids = [f"ours {i}" for i in numbers] + [f"theirs {i}" for i in chosen]
    sha256, phash = (
        [mine[i] for i in numbers] + [other[i] for i in chosen]
        for mine, other in ((known.sha256, theirs.sha256), (known.phash, theirs.phash))
    )
    groups = groups_of(ids, sha256=sha256, phash=phash).names
    trained = set(groups[len(numbers) :])
    new = np.array([group not in trained for group in groups[: len(numbers)]], bool)
    about = "other pictures than the model was trained on"
    if not new.all():
        about += f"; {(~new).sum():,} more are left out as near-duplicates of training pictures"
    return Unseen(numbers[new], lost, training, chosen, facts, about)


def in_order(samples: MapDataset, numbers: Ints) -> Ints:
    """The numbers in the order of hashes of their keys: the first of them are as good as drawn at random."""
    names = [digest(["measured", str(samples.facts(int(i)).get("key", i))]) for i in numbers]
    return numbers[np.argsort(names, kind="stable")]


def captions_of(samples: MapDataset, numbers: Ints, count: int) -> list[int]:
    """Of these numbers, in their order, at most `count` that have a caption which none before them has."""
    found: dict[str, int] = {}
    for number in map(int, numbers):
        if len(found) == count:
            break
        caption = samples.facts(number)["caption"]
        if caption and caption.strip():
            found.setdefault(caption.strip(), number)
    return list(found.values())


# ---------------------------------------------------------------------------------------------------------------- loss


def losses(
    pipeline: Any, examples: TrainDataset, numbers: Ints, *, seed: int = 0, tell: Tell = lambda count: None
) -> npt.NDArray[np.float32]:
    """The loss on each picture at each of the eight times that training measures at: (n, 8), as `Denoise.held_out`.

    The noise is a function of the seed and the picture's number: with a run's own seed and its held-out pictures the
    mean is what `train` calls held-out loss (EMA).
    """
    import torch

    from train.objective import GAMMA, objective_of
    from train.tasks import Denoise, eval_mode

    name = objective_of(pipeline.scheduler).name
    task = Denoise(pipeline, gamma=GAMMA if name == "eps" else None)  # weighted as train weights it
    device = pipeline.unet.device
    place = {int(n): i for i, n in enumerate(numbers)}
    size, found = 16, np.full((len(numbers), 8), np.nan, np.float32)
    with eval_mode(pipeline):
        while np.isnan(left := found[:, 0]).any():
            try:
                for batch in ordered_batches(examples, numbers[np.isnan(left)], size):
                    with autocast(device):
                        measured = task.held_out_losses_by_time(batch, seed).float().cpu().numpy()
                    if not np.isfinite(measured).all():
                        raise UserError(
                            f"the model's loss on {batch.keys[0]} and others is no number: its weights are broken"
                        )
                    found[[place[slot] for slot in batch.slots]] = measured.T
                    tell(len(batch.slots))
            except (RuntimeError, MemoryError) as e:
                if not out_of_memory(e) or size == 1:
                    raise
                size //= 2
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    return found


def mean_of(values: npt.ArrayLike) -> Statistic:
    """The mean of these values, as a statistic that can be bootstrapped."""
    y = np.asarray(values, np.float64)
    return lambda w: float(w @ y / w.sum())


def mean(values: npt.ArrayLike, seed: int = 0) -> Estimate:
    """The mean of (n,) values that do not depend on each other, with its 95% interval: {value, low, high}."""
    y = np.asarray(values, np.float64)
    return estimate({"mean": mean_of(y)}, range(len(y)), seed=seed)["mean"]


def share(hits: npt.ArrayLike) -> Estimate:
    """The mean of (n,) values from 0 to 1, most of them one of the two, with Wilson's 95% interval (1927).

    A bootstrap would promise too much here: of values that are all 0 it knows no other.
    """
    y = np.asarray(hits, np.float64)
    n, p, z = len(y), float(y.mean()), 1.959964
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    return {"value": p, "low": max(0.0, middle - reach), "high": min(1.0, middle + reach)}


def difference(drawn: npt.ArrayLike, real: npt.ArrayLike, *, paired: bool, seed: int = 0) -> Estimate:
    """Mean of `drawn` (n,) less mean of `real` (m,), with its 95% interval.

    `paired`: picture i of both has caption i, and the two are drawn together. Otherwise each for itself.
    """
    a, b = np.asarray(drawn, np.float64), np.asarray(real, np.float64)
    if paired:
        return mean(a - b, seed)
    first, second = mean_of(np.append(a, np.zeros(len(b)))), mean_of(np.append(np.zeros(len(a)), b))
    ours = np.arange(len(a) + len(b)) < len(a)

    def gap(w: Array) -> float:
        if not (w[ours].any() and w[~ours].any()):
            return float("nan")
        return first(w) * w.sum() / w[ours].sum() - second(w) * w.sum() / w[~ours].sum()

    return estimate({"gap": gap}, range(len(ours)), seed=seed)["gap"]


# ---------------------------------------------------------------------------------------------------- what is looked at


def look(
    pictures: Iterable[Pixels], models: Mapping[str, Encoder | Annotator], tell: Tell = lambda count: None
) -> dict[str, npt.NDArray[Any]]:
    """What models see in pictures, (h, w, 3) uint8: by name (n, d) unit vectors of an encoder, or a detector's (n,)
    scores.

    Beside them `phash`, (n,) uint64: perceptual hashes. Batches are cut at fixed places, so that the same pictures give
    the same numbers.
    """
    found: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in (*models, "phash")}
    rest = iter(pictures)
    while part := list(islice(rest, 32)):
        for name, model in models.items():
            found[name].append(model.encode_images(part) if isinstance(model, Encoder) else scores_of(model, part))
        found["phash"].append(np.array([int(perceptual_hash(p), 16) for p in part], np.uint64))
        tell(len(part))
    return {name: np.concatenate(parts) for name, parts in found.items()}


# ------------------------------------------------------------------------------------------------------ prompt fidelity


def retrieval(pictures: Vectors, texts: Vectors, *, ks: Sequence[int] = (1, 5), seed: int = 0) -> dict[str, Any]:
    """Whether pictures show what their captions say: is picture i, of all n captions, most like caption i?

    Args:
        pictures, texts: (n, d) unit vectors of one space; the captions all differ.
        ks: recall at k is the share of pictures whose caption is among the k most similar ones; equal similarities
            count as often as their order decides.

    Returns `recall_at_K` and `similarity` (mean cosine of each picture and its caption), each {value, low, high} with a
    95% interval over pictures and `shuffled`: the same when captions are dealt out so that none stays with its
    picture, with the interval that 95 of 100 such dealings lie in. That is chance: what a model would get that does not
    listen.
    """
    n = len(pictures)
    if n != len(texts) or n < 2:
        raise ValueError(f"{n} pictures and {len(texts)} captions")
    cosines = np.asarray(pictures, np.float64) @ np.asarray(texts, np.float64).T
    ordered = np.sort(cosines, axis=1)
    # of each picture and caption: how many captions are more similar to the picture, and how many as similar
    more = np.stack([n - np.searchsorted(row, c, side="right") for row, c in zip(ordered, cosines, strict=True)])
    same = np.stack([n - np.searchsorted(row, c, side="left") for row, c in zip(ordered, cosines, strict=True)]) - more
    values = {f"recall_at_{k}": np.clip((k - more) / same, 0, 1) for k in ks if k < n} | {"similarity": cosines}
    rng = np.random.default_rng(seed)
    dealt = [_dealt(rng, n) for _ in range(DEALINGS)]
    out: dict[str, Any] = {"captions": n}
    for name, v in values.items():
        chance = np.array([v[np.arange(n), order].mean() for order in dealt])
        low, high = np.quantile(chance, (0.025, 0.975))
        shuffled = {"value": float(chance.mean()), "low": float(low), "high": float(high)}
        found = mean(v.diagonal(), seed) if name == "similarity" else share(v.diagonal())
        out[name] = {**found, "shuffled": shuffled}
    return out


def _dealt(rng: np.random.Generator, n: int) -> Ints:
    """A random order of 0 .. n - 1 in which each number is followed around one circle: none stays where it was."""
    circle = rng.permutation(n)
    order = np.empty(n, np.int64)
    order[circle] = np.roll(circle, 1)
    return order


LEAST_FITTED, MOST_FITTED = 100, 5000
"""Captioned pictures that `InDomain` is fitted to, at least and at most. Ours."""


class InDomain:
    """A space of captions for pictures of one kind: what images and texts of an encoder have in common in these.

    A ridge regression from pictures' vectors to their captions', its strength chosen by leave-one-out, is fitted to
    real pictures, others than those that it judges. It tells apart what an encoder sees but has no words for: the
    bundled one, which is no CLIP, sees colours. It knows no more than these captions say, and its figures compare with
    no others.
    """

    def __init__(self, pictures: Vectors, texts: Vectors) -> None:
        """Fit it to unit vectors (n, d) of real pictures and of their captions, in the same order."""
        from sklearn.linear_model import RidgeCV

        self._used = np.asarray(texts).any(axis=0)  # the bundled encoder's texts have no features
        used = np.asarray(texts, np.float64)[:, self._used]
        self._middle = used.mean(0)
        self._ridge = RidgeCV(alphas=np.logspace(-4, 1, 6)).fit(np.asarray(pictures, np.float64), used - self._middle)

    def pictures(self, vectors: Vectors) -> Array:
        """(n, d) vectors of pictures -> unit vectors."""
        return _unit(self._ridge.predict(np.asarray(vectors, np.float64)))

    def texts(self, vectors: Vectors) -> Array:
        """(n, d) vectors of captions -> unit vectors of the same space."""
        return _unit(np.asarray(vectors, np.float64)[:, self._used] - self._middle)


def _unit(rows: Array) -> Array:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


CLIP_SCORE = {"ViT-B-32": "ViT-B/32", "ViT-L-14": "ViT-L/14"}
"""The architectures of OpenAI's CLIP that CLIPScores are published of, as open_clip names them."""


def clip_score_of(encoder: str) -> str | None:
    """Which CLIPScore an encoder of this name gives (`ViT-B/32`); None where its similarities are none."""
    architecture, _, weights = encoder.removeprefix("open_clip:").partition("/")
    return CLIP_SCORE.get(architecture.removesuffix("-quickgelu")) if weights == "openai" else None


def clip_score(pictures: Vectors, texts: Vectors) -> Array:
    """CLIPScore of each picture and caption, (n,) from 0 to 2.5: 2.5 max(cos, 0).

    Source: Hessel et al. 2021 (arXiv 2104.08718).

    Args:
        pictures, texts: (n, d) unit vectors of OpenAI's CLIP, the captions after "A photo depicts ", as theirs.
    """
    cosines = np.einsum("nd,nd->n", np.asarray(pictures, np.float64), np.asarray(texts, np.float64))
    return np.asarray(2.5 * cosines.clip(0))


# -------------------------------------------------------------------------------------------------------- memorisation


@dataclass(frozen=True)
class Nearest:
    """The training pictures that each picture is nearest to: places among them, nearest first."""

    places: Ints  # (n, k)
    cosines: Array  # (n, k), of their vectors
    bits: Ints  # (n, k): in which their perceptual hashes differ, of 64
    fewest_bits: Ints  # (n,): to whichever training picture differs in fewest; 64 where a picture is flat


def nearest(seen: Mapping[str, npt.NDArray[Any]], training: Mapping[str, npt.NDArray[Any]], count: int = 3) -> Nearest:
    """For pictures and training pictures as `look` saw them (`vectors`, `phash`): the `count` nearest by cosine."""
    count = min(count, len(training["vectors"]))
    places, cosines, bits, fewest = [], [], [], []
    theirs, flat = training["vectors"], training["phash"] == 0  # flat pictures all have one hash
    for start in range(0, len(seen["vectors"]), 256):
        rows = slice(start, start + 256)
        near = seen["vectors"][rows] @ theirs.T
        best = np.argsort(-near, axis=1, kind="stable")[:, :count]
        differ = np.bitwise_count(seen["phash"][rows, None] ^ training["phash"][None]).astype(np.int64)
        places.append(best)
        cosines.append(np.take_along_axis(near, best, axis=1).astype(np.float64))
        bits.append(np.take_along_axis(differ, best, axis=1))
        fewest.append(np.where(flat[None] | (seen["phash"][rows, None] == 0), 64, differ).min(1))
    return Nearest(*(np.concatenate(parts) for parts in (places, cosines, bits, fewest)))


def memorised(drawn: Nearest, held: Nearest, seed: int = 0) -> dict[str, Any]:
    """Whether drawn pictures lie closer to training pictures than real ones do that were not trained on.

    `close`: the share of drawn pictures whose nearest training picture is nearer, by cosine, than that of CLOSE of the
    real ones (`border`); 1 - CLOSE is expected. Its interval is the bootstrap's, of both sides, and at least Wilson's:
    where no picture is close, the bootstrap knows no other. None with fewer than LEAST_CLOSE real ones. `median`,
    `median_real`: cosine to the nearest. `copies`, `copies_real`: how many are near-duplicates by perceptual hash, in
    at most NEAR_BITS bits; of real ones none is left where they were chosen so.
    """
    ours, real = drawn.cosines[:, 0], held.cosines[:, 0]
    both = np.concatenate([ours, real])
    mine = np.arange(len(both)) < len(ours)

    def share_of(w: Array) -> float:
        times = w.astype(np.int64)
        if not (times[mine].any() and times[~mine].any()):
            return float("nan")
        beyond = np.quantile(np.repeat(real, times[~mine]), CLOSE)
        return float(np.repeat(ours > beyond, times[mine]).mean())

    found: dict[str, Any] = {
        "median": float(np.median(ours)),
        "median_real": float(np.median(real)),
        "copies": int((drawn.fewest_bits <= NEAR_BITS).sum()),
        "copies_real": int((held.fewest_bits <= NEAR_BITS).sum()),
        "pictures": len(ours),
        "pictures_real": len(real),
        "close": None,
        "border": None,
    }
    if len(real) >= LEAST_CLOSE:
        border = float(np.quantile(real, CLOSE))
        both_drawn, alone = estimate({"": share_of}, range(len(both)), seed=seed)[""], share(ours > border)
        low = np.nanmin(np.array([both_drawn["low"], alone["low"]], float))  # None, where there is none, becomes NaN
        high = np.nanmax(np.array([both_drawn["high"], alone["high"]], float))
        found["close"] = {"value": alone["value"], "low": float(low), "high": float(high), "expected": 1 - CLOSE}
        found["border"] = border
    return found
