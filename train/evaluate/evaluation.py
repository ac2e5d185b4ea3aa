"""The evaluation of a model: what is measured on, generated, looked at, and every figure of it.

In its folder: `samples/`, the generated images, 000000.png for the first caption; `sheet.png`, some of them beside the
real images with the same captions; `nearest.png`, those nearest to a training image, beside the nearest three.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from aesthetic.errors import UserError
from aesthetic.files import atomic
from aesthetic.heads import Head
from aesthetic.metrics import estimate
from aesthetic.space import require_same
from curate.annotators.base import Annotator, scores_of
from curate.annotators.registry import DETECTOR, load_annotator
from curate.encoders.base import Encoder
from curate.encoders.bundled import FEATURES, BundledEncoder
from curate.encoders.registry import load_encoder
from curate.images.process import perceptual_hash
from curate.sheets import Tile, enlarged, sheet
from curate.sources.dataset import MapDataset
from curate.store.files import read_json
from curate.store.mirror import store_at
from train.data import ImageDataset, Ints, crop_resize, decode_sample
from train.devices import default_device, versions
from train.evaluate import figures, heldout
from train.evaluate.model import EvaluatedModel
from train.generate.files import png, read_facts, read_image
from train.generate.request import GenerationRequest, facts_of, resolve
from train.generate.sampler import UNSAFE, Sampler
from train.models.family import family_of, load_model
from train.models.lora import add_loras
from train.objective import objective_of
from train.tasks import HELD_OUT_TIMES

Pixels = npt.NDArray[np.uint8]
Encoded = Mapping[str, npt.NDArray[Any]]
"""What `encode_images` gives: by name of a model, and `phash`."""

MAX_LOSS, MAX_REAL, MAX_TRAINING = 256, 1000, 20_000
"""Images at most: those that the loss is measured on (as training does), those that generated ones are compared with
(more where more are generated), and training images among which the nearest are looked for."""

MIN_IMAGES = 8
"""Captions and real images below which nothing is said."""

BATCH = 8
"""Images generated at once, cut at fixed places: in another batch an image may be rounded otherwise."""

SHEET, SHEET_NEAREST, SHEET_NEAREST_REAL = 20, 8, 3  # images on the sheets


class Progress(Protocol):
    """Is called with how many more are done, and at the end."""

    def __call__(self, more: int) -> None: ...
    def end(self, more: str = "") -> None: ...


def encode_images(
    images: Iterable[Pixels], models: Mapping[str, Encoder | Annotator], on_done: heldout.OnDone = lambda count: None
) -> dict[str, npt.NDArray[Any]]:
    """What models see in images, (h, w, 3) uint8: by name (n, d) unit vectors of an encoder, or (n,) scores of others.

    Beside them `phash`, (n,) uint64: perceptual hashes. Batches are cut at fixed places, so that the same images give
    the same values.
    """
    found: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in (*models, "phash")}
    rest = iter(images)
    while part := list(islice(rest, 32)):
        for name, model in models.items():
            found[name].append(scores_of(model, part) if isinstance(model, Annotator) else model.encode_images(part))
        found["phash"].append(np.array([int(perceptual_hash(image), 16) for image in part], np.uint64))
        on_done(len(part))
    return {name: np.concatenate(parts) for name, parts in found.items()}


class Evaluation:
    """One evaluation. `run` does everything; what can be refused is refused before that."""

    def __init__(
        self,
        model: EvaluatedModel,
        samples: MapDataset,
        out: Path,
        *,
        prompts: list[str] | int,
        encoder: str,
        heads: Sequence[Head],
        seed: int,
        steps: int,
        guidance: float | None,
        progress: Callable[[str, int, str], Progress],
    ) -> None:
        """Choose what is measured on, and load what looks at it.

        Args:
            prompts: what is generated, or how many captions of held-out images are.
            encoder, heads: what images and captions are encoded and scored by.
            progress: is told of each part (what, how many, of which unit), and gives what is to be called.

        Raises UserError where there are too few images or captions, or a head is of another space.
        """
        self.model, self.samples, self.out = model, samples, out
        self.seed, self.steps, self._progress = seed, steps, progress
        self.guidance = model.info.guidance if guidance is None else guidance
        self.given = prompts if isinstance(prompts, list) else None
        self.left_out: dict[str, str] = {}  # figure -> why it is not given

        count = prompts if isinstance(prompts, int) else len(prompts)
        record, total = self.model.record, len(self.samples)
        if record and record["settings"].get("data") == self.samples.fingerprint:
            self.held_out = heldout.find_held_out(self.model.folder, self.samples)  # the training run looked at them
        else:
            bar = self._progress("images", total + (record.get("data") or {}).get("pictures", 0), "img")
            self.held_out = heldout.find_held_out(self.model.folder, self.samples, bar)
            bar.end()
        pool = heldout.in_hash_order(self.samples, self.held_out.indices)
        self.captioned = heldout.distinct_captions(self.samples, pool, count)
        self.captions = [heldout.caption_of(self.samples, i) for i in self.captioned]
        self.prompts = self.given or self.captions
        if len(self.prompts) < MIN_IMAGES:
            raise UserError(
                f"{self.samples.folder}: {len(self.captioned)} different captions among {len(pool)} images that the "
                f"model was not trained on ({self.held_out.note}); at least {MIN_IMAGES} are needed. Give other "
                f"captioned images, or --prompts FILE."
            )
        rest = pool[~np.isin(pool, self.captioned)][: max(0, max(MAX_REAL, count) - len(self.captioned))]
        self.real: Ints = np.concatenate([np.array(self.captioned, np.int64), rest])  # image i has caption i
        self.training: Ints = np.zeros(0, np.int64)
        if self.held_out.training is not None:
            self.training = heldout.in_hash_order(self.held_out.training, self.held_out.trained_on)[:MAX_TRAINING]

        self.device = default_device()
        self.encoder, self.heads = load_encoder(encoder), heads
        self.detector = load_annotator(DETECTOR)
        space = self.encoder.space() if heads else None
        for head in heads:
            assert space is not None
            require_same(head.space, space, f"the head {head.name}")
        self.features = self.encoder if isinstance(self.encoder, BundledEncoder) else load_encoder("bundled")

    def describe(self) -> Iterator[str]:
        """Model, data and what is generated, a line each."""
        width, height = self.model.info.size
        lora = " with its LoRA" if self.model.loras else ""
        yield f"model  {self.model.name}{lora} · {width} x {height} px · sha256 {self.model.digest[:16]}"
        lacking = f", {self.held_out.unreadable:,} can't be read" if self.held_out.unreadable else ""
        yield f"data   {len(self.held_out.indices):,} images to measure on{lacking}: {self.held_out.note}"
        yield (
            f"draws  {len(self.prompts):,} {'prompts' if self.given else 'captions of these'}, {self.steps} steps, "
            f"guidance {self.guidance:g}, seeds from {self.seed}; looked at in the space of {self.encoder.name}"
        )

    def run(self, log: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
        """Generate, look and measure: what `evaluation.json` says but for what was asked; both sheets are written."""
        began = time.monotonic()
        about = list(self.describe())
        for line in about:
            log(line)
        measured: dict[str, Any] = {"held_out_loss": self._held_out_loss()}
        self._generate(log)

        models: dict[str, Encoder | Annotator] = {"vectors": self.encoder, "nsfw": self.detector}
        if self.features is not self.encoder:
            models["features"] = self.features
        bar = self._progress("looked at", len(self.prompts) + len(self.real) + len(self.training), "img")
        generated = encode_images((self._generated_image(i) for i in range(len(self.prompts))), models, bar)
        real = encode_images((self._real_image(self.samples, i) for i in self.real), models, bar)
        training = None
        if (samples := self.held_out.training) is not None:
            images = (self._real_image(samples, i) for i in self.training)
            training = encode_images(images, {"vectors": self.encoder}, bar)
        bar.end()

        measured |= self._fidelity(generated, real, training)
        measured["scores"] = self._scores(generated, real)
        measured["nsfw"] = {
            "detector": self.detector.name,
            "threshold": UNSAFE,
            "drawn": figures.share(generated["nsfw"] >= UNSAFE),
            "real": figures.share(real["nsfw"] >= UNSAFE),
        }
        measured["memorisation"] = self._memorisation(generated, real, training)
        measured |= self._distances(generated, real)
        self._draw_sheet(generated)
        return {
            "about": about,
            "figures": {name: found for name, found in measured.items() if found is not None},
            "left_out": self.left_out,
            "pictures": {
                "held_out": len(self.held_out.indices),
                "real": len(self.real),
                "drawn": len(self.prompts),
                "training": len(self.training),
            },
            "prompts": self.prompts,
            "made_with": {**versions(), "device": str(self.device)},
            "seconds": round(time.monotonic() - began),
        }

    # ------------------------------------------------------------------------------------------------------ images

    def _generate(self, log: Callable[[str], None]) -> None:
        """`samples/`: those of the same request that are there stay."""
        requests = [
            GenerationRequest(p, seed=(self.seed + i) % 2**32, steps=self.steps, guidance=self.guidance)
            for i, p in enumerate(self.prompts)
        ]
        batches = [range(start, min(start + BATCH, len(requests))) for start in range(0, len(requests), BATCH)]
        missing = [batch for batch in batches if not all(self._is_generated(i, requests[i]) for i in batch)]
        bar = self._progress("steps of drawing", self.steps * (sum(map(len, missing)) or len(requests)), "steps")
        if missing:
            sampler = Sampler(self.model.info, loras=self.model.loras, batch=BATCH, blur=False)
            log(f"draws on {sampler}")
            for batch in missing:
                images = sampler.generate([requests[i] for i in batch], on_more_steps(bar))
                for i, generated in zip(batch, images, strict=True):
                    with atomic(path := self._sample(i)) as f:
                        f.write(png(generated.image, generated.facts))
                    store_at(path).push([path])
        bar.end(f", {len(requests)} images in {self._sample(0).parent}")

    def _sample(self, index: int) -> Path:
        return self.out / "samples" / f"{index:06d}.png"

    def _is_generated(self, index: int, request: GenerationRequest) -> bool:
        """Whether this very image is there."""
        try:
            facts = read_facts(self._sample(index))
        except UserError:
            return False
        wanted = facts_of(resolve(self.model.info, request))
        return {k: facts.get(k) for k in wanted} == wanted and facts["model"]["sha256"] == self.model.info.digest

    def _generated_image(self, index: int) -> Pixels:
        return np.asarray(read_image(self._sample(index)))

    def _real_image(self, samples: MapDataset, index: Any) -> Pixels:
        """A real image, brought to the size of the generated ones as training does."""
        width, height = self.model.info.size
        return crop_resize(decode_sample(samples[int(index)], 2 * max(width, height)), height, width)

    # ----------------------------------------------------------------------------------------------------- figures

    def _held_out_loss(self) -> dict[str, Any] | None:
        """The held-out loss, by time, and beside it that of as many training images."""
        if not self.model.info.is_trainable:
            self.left_out["held_out_loss"] = f"of a {self.model.info.abilities.text} it is not measured"
            return None
        pipeline = load_model(self.model.info.folder)  # as it was trained: in fp32
        add_loras(pipeline, self.model.loras, self.model.info.name)
        pipeline.to(self.device)
        family = family_of(pipeline)
        try:
            objective = objective_of(pipeline.scheduler).name
            if self.model.info.inpaints_only:
                raise UserError("its UNet takes more than latents")
        except UserError as e:
            self.left_out["held_out_loss"] = str(e)
            return None

        record = self.held_out.record or {}
        settings = record.get("settings", {})
        seed = settings.get("seed", 0)  # the noise of the run's own measurements
        chosen = heldout.in_hash_order(self.samples, self.held_out.indices)[:MAX_LOSS]
        parts = {"held_out": (self.samples, chosen)}
        if self.held_out.training is not None:
            parts["training"] = (self.held_out.training, self.training[: len(chosen)])
        bar = self._progress("loss", sum(len(indices) for _, indices in parts.values()), "img")
        found: dict[str, Any] = {}
        for name, (samples, indices) in parts.items():
            dataset = ImageDataset(
                samples,
                lambda captions: family.tokenize(pipeline, captions),
                min(self.model.info.size),
                buckets=settings.get("buckets", False),
                step=family.size_step(pipeline),
                least=settings.get("batch", 1),
            )
            each = heldout.losses(pipeline, dataset, indices, seed=seed, on_done=bar)
            columns = {"mean": each.astype(float).mean(1)} | {str(t): each[:, i] for i, t in enumerate(HELD_OUT_TIMES)}
            estimates = estimate({k: figures.mean_of(v) for k, v in columns.items()}, range(len(each)), seed=self.seed)
            found[name] = {**estimates.pop("mean"), "pictures": len(each), "by_time": estimates}
        bar.end()
        then = ((record.get("result") or {}).get("held_out") or {}).get("ema")
        return {**found, "objective": objective, "noise_seed": seed, "at_the_end_of_training": then}

    def _fidelity(self, generated: Encoded, real: Encoded, training: Encoded | None) -> dict[str, Any]:
        """Retrieval of captions by generated images, and by real ones; CLIPScore where the encoder is that CLIP."""
        n, encode = len(self.prompts), self.encoder.encode_texts
        compare = len(self.captions) == n
        if not compare:
            self.left_out["retrieval with real images"] = (
                f"{n} prompts, and {len(self.captions)} different captions among real images: not comparable"
            )
        prompts = encode(self.prompts)
        captions = (encode(self.captions) if self.given else prompts) if compare else None

        def both_sides(images: Callable[[Any], Any], texts: Callable[[Any], Any]) -> dict[str, Any]:
            """Retrieval in a space to which `images` and `texts` bring what the encoder gives."""
            found = {"drawn": figures.retrieval(images(generated["vectors"]), texts(prompts), seed=self.seed)}
            if captions is not None:
                found["real"] = figures.retrieval(images(real["vectors"][:n]), texts(captions), seed=self.seed)
            return found

        measured: dict[str, Any] = {"retrieval": {"space": self.encoder.name, **both_sides(lambda x: x, lambda x: x)}}

        # a space fitted to the training images, or to real ones that nothing else is told of
        samples, first = self.samples, len(self.captioned)
        indices, vectors = self.real[first:], real["vectors"][first:]
        if training is not None and self.held_out.training is not None:
            samples, indices, vectors = self.held_out.training, self.training, training["vectors"]
        known = [heldout.caption_of(samples, i) for i in indices]
        used = [i for i, caption in enumerate(known) if caption][: figures.MAX_FITTED]
        if len(used) < figures.MIN_FITTED:
            self.left_out["retrieval in the in-domain space"] = (
                f"{len(used)} captioned images beside those that are measured on: {figures.MIN_FITTED} are needed"
            )
        else:
            space = figures.InDomainSpace(vectors[used], encode([known[i] for i in used]))
            measured["retrieval_in_domain"] = {
                "space": "in-domain",
                "fitted_to": len(used),
                "fitted_on": "other real images" if training is None else "training images",
                **both_sides(space.images, space.texts),
            }

        if name := figures.clip_score_of(self.encoder.name):
            pairs = {"drawn": (generated["vectors"], self.prompts)}
            if compare:
                pairs["real"] = (real["vectors"][:n], self.captions)
            measured["clip_score"] = {"model": name} | {
                side: figures.mean(
                    figures.clip_score(vectors, encode([f"A photo depicts {w}" for w in words])), self.seed
                )
                for side, (vectors, words) in pairs.items()
            }
        return measured

    def _scores(self, generated: Encoded, real: Encoded) -> dict[str, Any] | None:
        """Each head's mean on generated and on real images: those of the same captions, where these were generated."""
        found = {}
        for head in self.heads:
            ours, theirs = head(generated["vectors"]), head(real["vectors"])
            if not self.given:
                theirs = theirs[: len(ours)]
            if min(len(ours), len(theirs)) < MIN_IMAGES:
                self.left_out[head.name] = (
                    f"{len(ours)} generated and {len(theirs)} real images: {MIN_IMAGES} are needed"
                )
                continue
            found[head.name] = {
                "drawn": figures.mean(ours, self.seed),
                "real": figures.mean(theirs, self.seed),
                "difference": figures.difference(ours, theirs, paired=not self.given, seed=self.seed),
                "scale": list(head.scale),
            }
        if not self.heads:
            self.left_out["scores"] = f"no head that comes with tastemaker reads vectors of {self.encoder.name}"
        return found or None

    def _memorisation(self, generated: Encoded, real: Encoded, training: Encoded | None) -> dict[str, Any] | None:
        samples = self.held_out.training
        if training is None or samples is None:
            self.left_out["memorisation"] = f"the training images are not at hand: {self.held_out.note}"
            return None
        ours, theirs = figures.nearest_training(generated, training), figures.nearest_training(real, training)
        found = figures.memorisation(ours, theirs, self.seed)
        found |= {"space": self.encoder.name, "training": len(self.training)}
        if len(self.training) < len(self.held_out.trained_on):
            found["of_training"] = len(self.held_out.trained_on)
        if found["close"] is None:
            self.left_out["images close to training images"] = (
                f"{len(self.real)} real images to tell what is close: {figures.MIN_CLOSE} are needed"
            )

        # `nearest.png`: generated images nearest to training images, then real ones that were not trained on
        rows = []
        for near, most in ((ours, SHEET_NEAREST), (theirs, SHEET_NEAREST_REAL)):
            for i in map(int, np.argsort(-near.cosines[:, 0], kind="stable")[:most]):
                if near is ours:
                    title, kind, image = self.prompts[i], "generated", self._generated_image(i)
                else:
                    title = str(self.samples.facts(int(self.real[i]))["caption"] or "")
                    kind, image = "real, not trained on", self._real_image(self.samples, self.real[i])
                images = [image, *(self._real_image(samples, self.training[k]) for k in near.indices[i])]
                words = [f"{kind}\n"] + [
                    f"trained on\ncosine {c:.3f}, {b} of 64 bits"
                    for c, b in zip(near.cosines[i], near.bits[i], strict=True)
                ]
                rows.append((title, _tiles(images, words, self._unsafe(images))))
        sheet(self.out / "nearest.png", f"{Path(self.model.name).name}: the nearest training images", rows)
        return found

    def _distances(self, generated: Encoded, real: Encoded) -> dict[str, Any]:
        """KID beside its floor and ceiling; the Frechet distance where there are enough images."""

        def features(encoded: Encoded) -> Any:
            return encoded.get("features", encoded["vectors"])[:, FEATURES]

        ours, theirs, seed = features(generated), features(real), self.seed
        count, few = min(len(ours), len(theirs)), f"{len(ours):,} generated and {len(theirs):,} real images: at least"
        measured: dict[str, Any] = {}
        if count >= figures.MIN_KID:
            subset = min(figures.SUBSET, count // 2)
            rng, (width, height) = np.random.default_rng(seed), self.model.info.size
            noise = (rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(subset))
            nothing = features(encode_images(noise, {"vectors": self.features}))
            manifest = read_json(self.samples.folder / "manifest.json") or {}  # says by whose scores they were chosen
            measured["kid"] = {
                "features": "EfficientNet-lite0",
                "drawn": dataclasses.asdict(figures.kid(ours, theirs, subset=subset, seed=seed)),
                "real_against_real": dataclasses.asdict(figures.kid_floor(theirs, subset=subset, seed=seed)),
                "noise_against_real": dataclasses.asdict(figures.kid(nothing, theirs, subset=subset, seed=seed)),
                "circular": (manifest.get("space") or {}).get("encoder") == "bundled",
            }
        else:
            self.left_out["KID"] = f"{few} {figures.MIN_KID} of each are needed"
        if count >= figures.MIN_FRECHET:
            measured["frechet"] = {"features": "EfficientNet-lite0", "value": figures.frechet(ours, theirs)}
        else:
            self.left_out["FID"] = f"{few} {figures.MIN_FRECHET:,} of each are needed, below which it is biased"
        return measured

    # ------------------------------------------------------------------------------------------------------ sheets

    def _draw_sheet(self, generated: Encoded) -> None:
        """`sheet.png`: generated images in rows of five, below them the real ones with the same captions."""
        rows = []
        for start in range(0, min(SHEET, len(self.prompts)), 5):
            some = range(start, min(start + 5, len(self.prompts)))
            words = [f"{self.prompts[i]}\nseed {self.seed + i}" for i in some]
            unsafe = [bool(generated["nsfw"][i] >= UNSAFE) for i in some]
            rows.append(("generated", _tiles([self._generated_image(i) for i in some], words, unsafe)))
            if not self.given:
                real = [self._real_image(self.samples, self.captioned[i]) for i in some]
                rows.append(("real", _tiles(real, ["\n"] * len(real), self._unsafe(real))))
        title = f"{Path(self.model.name).name}: what was asked for, and what was generated"
        sheet(self.out / "sheet.png", title, rows)

    def _unsafe(self, images: Sequence[Pixels]) -> list[bool]:
        return [bool(score >= UNSAFE) for score in scores_of(self.detector, images)]


def _tiles(images: Sequence[Pixels], words: Sequence[str], blurred: Sequence[bool]) -> list[Tile]:
    return [enlarged(*tile) for tile in zip(images, words, blurred, strict=True)]


def on_more_steps(progress: Callable[[int], None]) -> Callable[[int, int], None]:
    """`on_step` of one call of `Sampler.generate`, for what wants to be called with how many more are done."""
    done = 0

    def on_step(now: int, total: int) -> None:
        nonlocal done
        progress(now - done)
        done = now

    return on_step
