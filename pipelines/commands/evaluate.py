"""`tastemaker evaluate`: what a model has learnt, beside what chance, real pictures and noise would give.

OUT/evaluation.json    what was asked, of which model and data, with which versions; every figure
    README.md          the same for people
    samples/           the pictures that were drawn, 000000.png for the first caption
    sheet.png          some of them, beside the real pictures with the same captions
    nearest.png        those that are nearest to a training picture, beside the nearest three
    logs/
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from aesthetic.errors import UserError
from aesthetic.files import atomic
from curate.store.files import local_path, read_json, sha256_file, sweep, write_json
from curate.store.ownership import check_free, taken
from pipelines.commands.train import check_data
from pipelines.figures import meaning, readme, table
from pipelines.options import Options, Result, argument, option, positive_int
from pipelines.prompts import read_prompts
from pipelines.runtime.progress import ProgressBar, format_duration, redirect_output

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from aesthetic.heads import Head
    from curate.encoders.base import Encoder
    from train.data import Ints, MapDataset
    from train.generate.evaluate import InDomain, Nearest, Unseen
    from train.generate.sampler import GenerationRequest, Sampler
    from train.models.info import ModelInfo
    from train.models.lora import Lora

PROMPTS = 128
"""Captions that are drawn where nothing is asked."""

LOSS, REAL, TRAINING = 256, 1000, 20_000
"""Pictures at most: those that the loss is measured on (as training does), those that drawn ones are compared with
(more where more are drawn), and training pictures among which the nearest are looked for."""

LEAST = 8
"""Captions and real pictures below which nothing is said."""

BATCH = 8
"""Pictures drawn at once, cut at fixed places: in another batch a picture may be rounded otherwise."""

SHEET, NEAREST, NEAREST_REAL = 20, 8, 3  # pictures on the sheets


def _number_or_file(text: str) -> int | Path:
    return int(text) if text.isdigit() else Path(text)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Options):
    """None: what suits the model or the encoder."""

    model: str = argument("MODEL", "a folder that train made, a diffusers folder, a LoRA, or a hub id")
    data: Path = argument("SHARDS", "the captioned pictures that it was trained on (those held out count) or others")
    out: Path = option("default: MODEL/evaluation", metavar="DIR", type=local_path)
    prompts: int | Path = option(
        "draw N captions (default 128), or the lines of a file, without real ones",
        default=PROMPTS,
        metavar="N|FILE",
        type=_number_or_file,
    )
    encoder: str = option("bundled (default) or open_clip:ARCH/PRETRAINED", default="bundled", metavar="E")
    heads: tuple[str, ...] | None = option(
        "default: those of this encoder that come with tastemaker", metavar="HEAD", nargs="+"
    )
    seed: int = option("of the first picture; the next ones count on", default=0, metavar="N")
    guidance: float | None = option("default: what suits the model, as in sample", metavar="X")
    steps: int = option("of drawing (default 30)", default=30, metavar="N", type=positive_int)

    def __post_init__(self) -> None:
        if vars(self)["out"] is None:
            if not Path(self.model).is_dir():
                raise UserError(f"{self.model} is no folder here: say with --out where its evaluation goes")
            object.__setattr__(self, "out", Path(self.model) / "evaluation")

    @property
    def count(self) -> int:
        """How many captions are drawn, where no prompts are given."""
        return self.prompts if isinstance(self.prompts, int) else PROMPTS


def run(options: EvaluateOptions) -> Result:
    """Evaluate a model, from where an earlier run of the same request stopped.

    Raises UserError before the model is loaded where model, data, prompts, encoder, heads or folder do not fit.
    """
    check_data(options.data)
    check_free(options.out, "evaluation")
    prompts = _prompts(options)
    model = _Model.of(options.model)
    heads = _heads(options)
    from curate.encoders.registry import check_available

    check_available(options.encoder)
    from train.generate.sampler import (
        GenerationRequest,  # these bring torch and diffusers: after all that is told without them
        resolve,
    )

    resolve(model.about, GenerationRequest("", seed=options.seed, steps=options.steps, guidance=options.guidance))
    from train.data import open_samples
    from train.generate.evaluate import training_record

    _, trained = training_record(model.folder) or (None, {})
    samples = open_samples(options.data, trained.get("settings", {}).get("caption"))
    asked = _asked(options, model, samples, prompts, heads)
    if (done := _before(options.out, asked)) is not None:
        return _outcome(options, done)
    with (
        taken(options.out, "evaluation") as folder,
        redirect_output(options.out / "logs" / "evaluate.log") as terminal,
    ):
        sweep(options.out)
        if (done := _before(options.out, asked)) is not None:  # again: another run may have been at work until now
            return _outcome(options, done)
        for note in samples.notes():
            terminal.write(f"{samples.folder}: {note}\n")
        evaluation = _Evaluation(options, model, samples, prompts, heads, terminal)
        try:
            evaluation.prepare()
        except Exception:
            folder.undo(["logs"])
            raise
        write_json(options.out / "evaluation.json", {"asked": asked})
        return _outcome(options, evaluation.carried_out(asked))


# ---------------------------------------------------------------------------------------- before anything is written


def _prompts(options: EvaluateOptions) -> list[str] | None:
    """The different lines of a file of prompts."""
    asked = None if isinstance(options.prompts, int) else options.prompts
    if asked is None and options.count < LEAST:
        raise UserError(f"--prompts {options.count}: at least {LEAST} are needed to tell anything")
    if asked is None:
        return None
    if not asked.is_file():
        raise UserError(f"--prompts {asked}: neither a number nor a file")
    found = list(dict.fromkeys(read_prompts(asked)))
    if len(found) < LEAST:
        raise UserError(f"--prompts {asked} holds {len(found)} different prompts: at least {LEAST}, a line each")
    return found


@dataclass(frozen=True)
class _Model:
    """A model, or one with its LoRA over it, and what is known of its training."""

    about: ModelInfo
    loras: tuple[Lora, ...]
    folder: Path  # whose train.json is asked

    @staticmethod
    def of(name: str) -> _Model:
        from train.models.info import read_model_info
        from train.models.lora import Lora, check_lora
        from train.models.release import LORA_FILE

        folder = Path(name)
        if (folder / LORA_FILE).is_file() and not (folder / "model_index.json").is_file():
            base = ((read_json(folder / "train.json") or {}).get("settings") or {}).get("from")
            if not base:
                raise UserError(f"{folder} is a LoRA without a train.json that names the model it belongs to")
            lora = Lora(folder)
            about = read_model_info(base)
            check_lora(about, lora)
            return _Model(about, (lora,), folder)
        about = read_model_info(name)
        return _Model(about, (), about.folder)

    @cached_property
    def digest(self) -> str:
        """The sha256 of the model; with a LoRA, both."""
        return "+".join([self.about.digest, *(sha256_file(lora.file) for lora in self.loras)])


def _heads(options: EvaluateOptions) -> list[Head]:
    """Those that were asked for, else those that come with tastemaker and read this encoder's vectors."""
    from aesthetic.catalog import SHIPPED, list_heads, load_head
    from curate.encoders.registry import canonical_name

    encoder = canonical_name(options.encoder)
    if options.heads is None:
        shipped = [load_head(name) for name in list_heads() if (SHIPPED / name / "head.json").is_file()]
        return [head for head in shipped if head.space.encoder == encoder]
    heads = [load_head(name) for name in options.heads]
    for head in heads:
        if head.space.encoder != encoder:
            raise UserError(
                f"the head {head.name} reads vectors of {head.space.encoder}, not of {encoder}: "
                f"--encoder {head.space.encoder} would do"
            )
    return heads


def _asked(
    options: EvaluateOptions, model: _Model, samples: MapDataset, prompts: list[str] | None, heads: Sequence[Head]
) -> dict[str, Any]:
    """What must be the same for the figures to be the same, but for versions and machine."""
    from curate.encoders.registry import canonical_name

    manifest = samples.folder / "manifest.json"
    return {
        "model": {"name": options.model, "sha256": model.digest},
        "data": {
            "folder": str(samples.folder.absolute()),
            "fingerprint": samples.fingerprint,
            "manifest_sha256": sha256_file(manifest) if manifest.is_file() else None,
        },
        "prompts": options.count if prompts is None else prompts,
        "encoder": canonical_name(options.encoder),
        "heads": {head.name: head.digest for head in heads},
        "seed": options.seed,
        "steps": options.steps,
        "guidance": model.about.guidance if options.guidance is None else options.guidance,
    }


def _before(out: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What OUT holds, where it is finished; None where there is something to do. UserError where it is another's."""
    before = read_json(out / "evaluation.json")
    if before is None:
        return None
    then, now = (_without_places(a) for a in (before["asked"], asked))
    if other := [k for k in now if then.get(k) != now[k]]:
        raise UserError(
            f"{out} holds an evaluation of another kind (its {', '.join(other)} differ{'s' * (len(other) == 1)}). "
            f"Give another --out, or remove it."
        )
    return before if "figures" in before else None


def _without_places(asked: dict[str, Any]) -> dict[str, Any]:
    """Model and data may lie elsewhere now."""
    places = {"model": "name", "data": "folder"}
    return {k: {n: x for n, x in v.items() if n != places[k]} if k in places else v for k, v in asked.items()}


# ------------------------------------------------------------------------------------------------------------ the run


class _Evaluation:
    """One run: what is chosen, measured, drawn and looked at, and what is said of it."""

    def __init__(
        self,
        options: EvaluateOptions,
        model: _Model,
        samples: MapDataset,
        prompts: list[str] | None,
        heads: list[Head],
        terminal: IO[str],
    ) -> None:
        self.options, self.model, self.samples, self.heads = options, model, samples, heads
        self.out, self.terminal = options.out, terminal
        self.left_out: dict[str, str] = {}  # figure -> why it is not given
        self._given = prompts

    def prepare(self) -> None:
        """All that can be refused: what is measured on, and what looks at it."""
        self._choose()
        self._load_eyes()

    def carried_out(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Everything else: `evaluation.json`."""
        began = time.monotonic()
        for text in self._headline():
            self.terminal.write(text + "\n")
        figures: dict[str, Any] = {"held_out_loss": self._loss()}
        self._draw()
        drawn, real, training = self._look()
        figures |= self._fidelity(drawn, real, training)
        figures["scores"] = self._scores(drawn, real)
        figures["nsfw"] = self._nsfw(drawn, real)
        figures["memorisation"], near = self._memorised(drawn, real, training)
        figures |= self._distances(drawn, real)
        self._sheet(drawn)
        if near is not None:
            self._nearest_sheet(*near)
        facts = self._facts(asked, figures, round(time.monotonic() - began))
        with atomic(self.out / "README.md") as f:
            f.write(readme(facts).encode())
        write_json(self.out / "evaluation.json", facts)
        return facts

    def _facts(self, asked: dict[str, Any], figures: dict[str, Any], seconds: int) -> dict[str, Any]:
        from train.devices import versions

        return {
            "asked": asked,
            "about": list(self._headline()),
            "figures": {name: found for name, found in figures.items() if found is not None},
            "left_out": self.left_out,
            "pictures": {
                "held_out": len(self.unseen.numbers),
                "real": len(self.real),
                "drawn": len(self.prompts),
                "training": len(self.training),
            },
            "prompts": self.prompts,
            "made_with": {**versions(), "device": str(self.device)},
            "seconds": seconds,
        }

    # what is measured on

    def _choose(self) -> None:
        """Held-out and training pictures, and what is drawn."""
        import numpy as np

        from train.generate.evaluate import captions_of, in_order, unseen
        from train.models.info import training_record

        _, known = training_record(self.model.folder) or (None, None)
        others = known and known["settings"].get("data") != self.samples.fingerprint
        if others or known is None:  # otherwise the training run looked at all of them
            more = known["data"].get("pictures", 0) if known and known.get("data") else 0
            count = ProgressBar(self.terminal, "pictures", len(self.samples) + more)
            self.unseen: Unseen = unseen(self.model.folder, self.samples, count)
            count.end()
        else:
            self.unseen = unseen(self.model.folder, self.samples)
        pool = in_order(self.samples, self.unseen.numbers)
        wanted = len(self._given) if self._given else self.options.count
        captioned = captions_of(self.samples, pool, wanted)
        self.prompts = self._given or [self._caption(i) for i in captioned]
        if len(self.prompts) < LEAST:
            raise UserError(
                f"{self.options.data}: {len(captioned)} different captions among {len(pool)} pictures that the model "
                f"was not trained on ({self.unseen.about}); at least {LEAST} are needed. Give other captioned "
                f"pictures, or --prompts FILE."
            )
        self.captioned = captioned  # the first of `real`: picture i has caption i
        most = max(REAL, wanted)
        rest = pool[~np.isin(pool, captioned)][: max(0, most - len(captioned))]
        self.real: Ints = np.concatenate([np.array(captioned, np.int64), rest])
        self.training: Ints = np.zeros(0, np.int64)
        if self.unseen.training is not None:
            self.training = in_order(self.unseen.training, self.unseen.trained_on)[:TRAINING]

    def _caption(self, number: int) -> str:
        return str(self.samples.facts(number)["caption"]).strip()

    def _load_eyes(self) -> None:
        """Encoders and the detector; refuses heads of another space."""
        from aesthetic.space import require_same
        from curate.annotators.registry import load_annotator
        from curate.encoders.bundled import BundledEncoder
        from curate.encoders.registry import load_encoder
        from train.devices import default_device
        from train.generate.sampler import DETECTOR

        self.device = default_device()
        self.encoder: Encoder = load_encoder(self.options.encoder)
        self.detector = load_annotator(DETECTOR)
        space = self.encoder.space() if self.heads else None
        for head in self.heads:
            assert space is not None
            require_same(head.space, space, f"the head {head.name}")
        self.features = self.encoder if isinstance(self.encoder, BundledEncoder) else load_encoder("bundled")

    def _headline(self) -> Iterator[str]:
        about = self.model.about
        width, height = about.size
        lora = " with its LoRA" if self.model.loras else ""
        yield f"model  {self.options.model}{lora} · {width} x {height} px · sha256 {self.model.digest[:16]}"
        lacking = f", {self.unseen.unreadable:,} can't be read" if self.unseen.unreadable else ""
        yield f"data   {len(self.unseen.numbers):,} pictures to measure on{lacking}: {self.unseen.about}"
        captions = "prompts" if self._given else "captions of these"
        guidance = about.guidance if self.options.guidance is None else self.options.guidance
        yield (
            f"draws  {len(self.prompts):,} {captions}, {self.options.steps} steps, guidance {guidance:g}, "
            f"seeds from {self.options.seed}; looked at in the space of {self.encoder.name}"
        )

    # loss

    def _loss(self) -> dict[str, Any] | None:
        """The held-out loss, by time, and beside it that of as many training pictures."""
        from aesthetic.metrics import estimate
        from train.data import ImageDataset
        from train.generate.evaluate import in_order, losses, mean_of
        from train.models.unet import size_step, tokenize
        from train.objective import objective_of
        from train.tasks import HELD_OUT_TIMES

        pipeline = self._pipeline()
        try:
            objective = objective_of(pipeline.scheduler).name
            if pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
                raise UserError("its UNet takes more than latents")
        except UserError as e:
            self.left_out["held_out_loss"] = str(e)
            return None
        trained = self.unseen.facts or {}
        settings = trained.get("settings", {})
        numbers = in_order(self.samples, self.unseen.numbers)[:LOSS]
        size, seed = min(self.model.about.size), settings.get("seed", 0)  # the noise of the run's own measurements
        parts = {"held_out": (self.samples, numbers)}
        if self.unseen.training is not None:
            parts["training"] = (self.unseen.training, self.training[: len(numbers)])
        count = ProgressBar(self.terminal, "loss", sum(len(n) for _, n in parts.values()))
        found = {}
        for name, (samples, chosen) in parts.items():
            pictures = ImageDataset(
                samples,
                lambda captions: tokenize(pipeline, captions),
                size,
                buckets=settings.get("buckets", False),
                step=size_step(pipeline),
                least=settings.get("batch", 1),
            )
            each = losses(pipeline, pictures, chosen, seed=seed, tell=count)
            columns = {"mean": each.astype(float).mean(1)} | {str(t): each[:, i] for i, t in enumerate(HELD_OUT_TIMES)}
            estimates = estimate({k: mean_of(v) for k, v in columns.items()}, range(len(each)), seed=self.options.seed)
            found[name] = {**estimates.pop("mean"), "pictures": len(each), "by_time": estimates}
        count.end()
        result = trained.get("result") or {}
        then = (result.get("held_out") or {}).get("ema")
        return {**found, "objective": objective, "noise_seed": seed, "at_the_end_of_training": then}

    def _pipeline(self) -> Any:
        """The model as it was trained: in fp32."""
        from train.models.lora import add_loras
        from train.models.unet import load_model

        pipeline = load_model(self.model.about.folder)
        add_loras(pipeline, self.model.loras, self.model.about.name)
        return pipeline.to(self.device)

    # drawing

    def _draw(self) -> None:
        """`samples/`: those of the same request that are there stay."""
        from train.generate.files import png
        from train.generate.sampler import GenerationRequest, Sampler

        r = self.options
        asked = [
            GenerationRequest(p, seed=(r.seed + i) % 2**32, steps=r.steps, guidance=r.guidance)
            for i, p in enumerate(self.prompts)
        ]
        batches = [range(start, min(start + BATCH, len(asked))) for start in range(0, len(asked), BATCH)]
        missing = [batch for batch in batches if not all(self._is_drawn(i, asked[i]) for i in batch)]
        steps = r.steps * (sum(map(len, missing)) or len(asked))
        count = ProgressBar(self.terminal, "steps of drawing", steps, "steps")
        if missing:
            sampler: Sampler = Sampler(self.model.about, loras=self.model.loras, batch=BATCH, blur=False)
            self.terminal.write(f"draws on {sampler}\n")
            for batch in missing:
                for i, drawn in zip(batch, sampler.generate([asked[i] for i in batch], _growth(count)), strict=True):
                    with atomic(self._sample(i)) as f:
                        f.write(png(drawn.image, drawn.facts))
        count.end(f", {len(asked)} pictures in {self._sample(0).parent}")

    def _sample(self, number: int) -> Path:
        return self.out / "samples" / f"{number:06d}.png"

    def _is_drawn(self, number: int, asked: GenerationRequest) -> bool:
        """Whether this very picture is there."""
        from train.generate.files import check_facts, read_facts
        from train.generate.sampler import facts_of, resolve

        try:
            facts = read_facts(self._sample(number))
            check_facts(facts, self._sample(number))
        except UserError:
            return False
        wanted = facts_of(resolve(self.model.about, asked))
        return {k: facts.get(k) for k in wanted} == wanted and facts["model"]["sha256"] == self.model.about.digest

    # looking

    def _look(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
        """Drawn, real and training pictures as the models see them."""
        from train.generate.evaluate import look

        models: dict[str, Any] = {"vectors": self.encoder, "nsfw": self.detector}
        if self.features is not self.encoder:
            models["features"] = self.features
        count = ProgressBar(self.terminal, "looked at", len(self.prompts) + len(self.real) + len(self.training))
        drawn = look((self._drawn(i) for i in range(len(self.prompts))), models, count)
        real = look((self._fitted(self.samples, i) for i in self.real), models, count)
        training = None
        if self.unseen.training is not None:
            pictures = (self._fitted(self.unseen.training, i) for i in self.training)
            training = look(pictures, {"vectors": self.encoder}, count)
        count.end()
        return drawn, real, training

    def _drawn(self, number: int) -> npt.NDArray[np.uint8]:
        import numpy as np

        from train.generate.files import read_picture

        return np.asarray(read_picture(self._sample(number)))

    def _fitted(self, samples: MapDataset, number: Any) -> npt.NDArray[np.uint8]:
        """A real picture, brought to the size of the drawn ones as training does."""
        from train.data import crop_resize, decode_sample

        width, height = self.model.about.size
        return crop_resize(decode_sample(samples[int(number)], 2 * max(width, height)), height, width)

    def _features(self, seen: dict[str, Any]) -> Any:
        from curate.encoders.bundled import FEATURES

        return seen.get("features", seen["vectors"])[:, FEATURES]

    # figures

    def _fidelity(self, drawn: dict[str, Any], real: dict[str, Any], training: dict[str, Any] | None) -> dict[str, Any]:
        """Retrieval of captions by drawn pictures, and by real ones; CLIPScore where the encoder is that CLIP."""
        from train.generate.evaluate import clip_score, clip_score_of, mean, retrieval

        seed, n, encoder = self.options.seed, len(self.prompts), self.encoder
        captions = [self._caption(i) for i in self.captioned]
        real_too = len(captions) == n
        if not real_too:
            self.left_out["retrieval with real pictures"] = (
                f"{n} prompts, and {len(captions)} different captions among real pictures: not comparable"
            )

        def both(vectors: Any, words: Any) -> dict[str, Any]:
            """Retrieval in a space to which `vectors` and `words` bring what the encoder gives."""
            said = words(encoder.encode_texts(self.prompts))
            found = {"drawn": retrieval(vectors(drawn["vectors"]), said, seed=seed)}
            if real_too:
                own = words(encoder.encode_texts(captions)) if self._given else said
                found["real"] = retrieval(vectors(real["vectors"][:n]), own, seed=seed)
            return found

        figures: dict[str, Any] = {"retrieval": {"space": encoder.name, **both(lambda x: x, lambda x: x)}}
        if (fitted := self._in_domain(real, training)) is not None:
            space, pictures = fitted
            found = both(space.pictures, space.texts)
            on = "other real pictures" if training is None else "training pictures"
            figures["retrieval_in_domain"] = {"space": "in-domain", "fitted_to": pictures, "fitted_on": on, **found}
        if name := clip_score_of(encoder.name):

            def score(vectors: Any, words: list[str]) -> Any:
                said = encoder.encode_texts([f"A photo depicts {w}" for w in words])
                return mean(clip_score(vectors, said), seed)

            figures["clip_score"] = {"model": name, "drawn": score(drawn["vectors"], self.prompts)}
            if real_too:
                figures["clip_score"]["real"] = score(real["vectors"][:n], captions)
        return figures

    def _in_domain(self, real: dict[str, Any], training: dict[str, Any] | None) -> tuple[InDomain, int] | None:
        """A space fitted to the training pictures, or to real ones that nothing else is told of; and to how many."""
        from train.generate.evaluate import LEAST_FITTED, MOST_FITTED, InDomain

        samples, numbers, vectors = (
            self.samples,
            self.real[len(self.captioned) :],
            real["vectors"][len(self.captioned) :],
        )
        if training is not None and self.unseen.training is not None:
            samples, numbers, vectors = self.unseen.training, self.training, training["vectors"]
        words = [str(samples.facts(int(i))["caption"] or "").strip() for i in numbers]
        told = [i for i, text in enumerate(words) if text][:MOST_FITTED]
        if len(told) < LEAST_FITTED:
            self.left_out["retrieval in the in-domain space"] = (
                f"{len(told)} captioned pictures beside those that are measured on: {LEAST_FITTED} are needed"
            )
            return None
        return InDomain(vectors[told], self.encoder.encode_texts([words[i] for i in told])), len(told)

    def _scores(self, drawn: dict[str, Any], real: dict[str, Any]) -> dict[str, Any] | None:
        """Each head's mean on drawn and on real pictures: those of the same captions, where these were drawn."""
        from train.generate.evaluate import difference, mean

        found = {}
        for head in self.heads:
            ours, theirs = head(drawn["vectors"]), head(real["vectors"])
            if not self._given:
                theirs = theirs[: len(ours)]
            if min(len(ours), len(theirs)) < LEAST:
                self.left_out[head.name] = f"{len(ours)} drawn and {len(theirs)} real pictures: {LEAST} are needed"
                continue
            seed = self.options.seed
            found[head.name] = {
                "drawn": mean(ours, seed),
                "real": mean(theirs, seed),
                "difference": difference(ours, theirs, paired=not self._given, seed=seed),
                "scale": list(head.scale),
            }
        if not self.heads:
            self.left_out["scores"] = f"no head that comes with tastemaker reads vectors of {self.encoder.name}"
        return found or None

    def _nsfw(self, drawn: dict[str, Any], real: dict[str, Any]) -> dict[str, Any]:
        from train.generate.evaluate import share
        from train.generate.sampler import UNSAFE

        return {
            "detector": self.detector.name,
            "threshold": UNSAFE,
            "drawn": share(drawn["nsfw"] >= UNSAFE),
            "real": share(real["nsfw"] >= UNSAFE),
        }

    def _memorised(
        self, drawn: dict[str, Any], real: dict[str, Any], training: dict[str, Any] | None
    ) -> tuple[dict[str, Any] | None, tuple[Nearest, Nearest] | None]:
        from train.generate.evaluate import LEAST_CLOSE, memorised, nearest

        if training is None:
            self.left_out["memorisation"] = f"the training pictures are not at hand: {self.unseen.about}"
            return None, None
        ours, theirs = nearest(drawn, training), nearest(real, training)
        found = memorised(ours, theirs, self.options.seed)
        found |= {"space": self.encoder.name, "training": len(self.training)}
        if len(self.training) < len(self.unseen.trained_on):
            found["of_training"] = len(self.unseen.trained_on)
        if found["close"] is None:
            self.left_out["pictures close to training pictures"] = (
                f"{len(self.real)} real pictures to tell what is close: {LEAST_CLOSE} are needed"
            )
        return found, (ours, theirs)

    def _distances(self, drawn: dict[str, Any], real: dict[str, Any]) -> dict[str, Any]:
        """KID beside its floor and ceiling; the Frechet distance where there are enough pictures."""
        import numpy as np

        from train.generate.distances import LEAST_FRECHET, LEAST_KID, SUBSET, frechet, kid, kid_floor
        from train.generate.evaluate import look

        ours, theirs, seed = self._features(drawn), self._features(real), self.options.seed
        few = f"{len(ours):,} drawn and {len(theirs):,} real pictures: at least"
        figures: dict[str, Any] = {}
        if min(len(ours), len(theirs)) >= LEAST_KID:
            subset = min(SUBSET, len(ours) // 2, len(theirs) // 2)
            rng, (width, height) = np.random.default_rng(seed), self.model.about.size
            noise = (rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(subset))
            nothing = self._features(look(noise, {"vectors": self.features}))
            figures["kid"] = {
                "features": "EfficientNet-lite0",
                "drawn": dataclasses.asdict(kid(ours, theirs, subset=subset, seed=seed)),
                "real_against_real": dataclasses.asdict(kid_floor(theirs, subset=subset, seed=seed)),
                "noise_against_real": dataclasses.asdict(kid(nothing, theirs, subset=subset, seed=seed)),
                "circular": self._chosen_by() == "bundled",
            }
        else:
            self.left_out["KID"] = f"{few} {LEAST_KID} of each are needed"
        if min(len(ours), len(theirs)) >= LEAST_FRECHET:
            figures["frechet"] = {"features": "EfficientNet-lite0", "value": frechet(ours, theirs)}
        else:
            self.left_out["FID"] = f"{few} {LEAST_FRECHET:,} of each are needed, below which it is biased"
        return figures

    def _chosen_by(self) -> str | None:
        """The encoder by whose scores the pictures were chosen, where their shards say so."""
        manifest = read_json(self.samples.folder / "manifest.json") or {}
        name = (manifest.get("space") or {}).get("encoder")
        return None if name is None else str(name)

    # sheets

    def _sheet(self, drawn: dict[str, Any]) -> None:
        """`sheet.png`: drawn pictures in rows of five, below them the real ones with the same captions."""
        from curate.report import sheet
        from train.generate.sampler import UNSAFE

        rows = []
        for start in range(0, min(SHEET, len(self.prompts)), 5):
            some = range(start, min(start + 5, len(self.prompts)))
            shown = [
                _shown(self._drawn(i), self.prompts[i], f"seed {self.options.seed + i}", drawn["nsfw"][i] >= UNSAFE)
                for i in some
            ]
            rows.append(("drawn", shown))
            if not self._given:
                real = [self._fitted(self.samples, self.captioned[i]) for i in some]
                unsafe = self._unsafe(real)
                rows.append(("real", [_shown(p, "", "", u) for p, u in zip(real, unsafe, strict=True)]))
        sheet(self.out / "sheet.png", f"{Path(self.options.model).name}: what was asked for, and what was drawn", rows)

    def _nearest_sheet(self, ours: Nearest, theirs: Nearest) -> None:
        """`nearest.png`: the drawn pictures nearest to training pictures, then real ones that were not trained on."""
        import numpy as np

        from curate.report import sheet

        assert self.unseen.training is not None
        rows = []
        for near, most, words, what in (
            (ours, NEAREST, "drawn", self._drawn),
            (theirs, NEAREST_REAL, "real, not trained on", lambda i: self._fitted(self.samples, self.real[i])),
        ):
            for i in np.argsort(-near.cosines[:, 0], kind="stable")[:most]:
                others = [self._fitted(self.unseen.training, self.training[p]) for p in near.places[i]]
                pictures = [what(int(i)), *others]
                captions = [words, *("trained on" for _ in others)]
                details = [""] + [
                    f"cosine {c:.3f}, {b} of 64 bits" for c, b in zip(near.cosines[i], near.bits[i], strict=True)
                ]
                flags = self._unsafe(pictures)
                shown = [_shown(*x) for x in zip(pictures, captions, details, flags, strict=True)]
                text = self.prompts[i] if near is ours else self.samples.facts(int(self.real[i]))["caption"] or ""
                rows.append((str(text), shown))
        sheet(self.out / "nearest.png", f"{Path(self.options.model).name}: the nearest training pictures", rows)

    def _unsafe(self, pictures: Sequence[npt.NDArray[np.uint8]]) -> list[bool]:
        from curate.annotators.base import scores_of
        from train.generate.sampler import UNSAFE

        return [bool(score >= UNSAFE) for score in scores_of(self.detector, pictures)]


def _growth(count: Callable[[int], None]) -> Callable[[int, int], None]:
    """`on_step` of one call of `Sampler.generate`, for a count that wants to hear how many more are done."""
    done = 0

    def on_step(now: int, of: int) -> None:
        nonlocal done
        count(now - done)
        done = now

    return on_step


def _shown(picture: npt.NDArray[np.uint8], line: str, more: str, blurred: bool) -> Any:
    """A tile of a sheet."""
    from curate.report import enlarged

    return enlarged(picture, f"{line}\n{more}", bool(blurred))


# ---------------------------------------------------------------------------------------------------------- its result


def _outcome(options: EvaluateOptions, facts: dict[str, Any]) -> Result:
    out = options.out
    paths = {"evaluation": out / "evaluation.json", "pictures": out / "sheet.png"}
    if "memorisation" in facts["figures"]:
        paths["nearest"] = out / "nearest.png"
    text = f"{table(facts)}\nevaluated in {format_duration(facts['seconds'])}\n{meaning(facts)}"
    return Result(text=text, facts=facts, paths=dict(paths), next=f"tastemaker sample {options.model} PROMPT")
