"""`tastemaker sample`: images from a model, each a PNG of the next free number that says how it was generated."""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from aesthetic.errors import UserError
from curate.store.files import local_path, sha256_file
from curate.store.mirror import here, in_urls, open_store
from curate.store.objects import is_url
from pipelines.options import Options, Result, argument, command, input_file, option, read_prompts
from pipelines.runtime.progress import ProgressBar
from pipelines.terminal import CLEAR

if TYPE_CHECKING:
    from PIL import Image

    from train.generate.request import GenerationRequest
    from train.generate.sampler import Generated, Sampler
    from train.models.info import ModelInfo

STAYS = (
    "model",
    "out",
    "again",
    "image",
    "mask",
    "lora",
    "embedding",
    "upscaler",
    "faces",
    "show_flagged",
    "verbose",
    "json",
)
"""What may be given beside --again: where things are, not how the image is generated."""

SOUND_TAKES = ("prompt", "prompts", "negative", "steps", "guidance", "seed", "n", "seconds")
"""What may be asked of models of sound."""


def _folder(text: str) -> Path:
    """A folder as it was given: relative, so that images do not tell where somebody's folders lie. Of a URL its
    mirror."""
    if is_url(text):
        store = open_store(text)
        store.refresh()  # the numbers that are taken
        return store.root
    return local_path(text) if "://" in text else Path(text).expanduser()


@dataclass(frozen=True, kw_only=True)
class SampleOptions(Options):
    """None: what suits the model."""

    model: str | None = argument(
        "MODEL",
        "a folder of any text-to-image model of diffusers, a .safetensors file, or a hub id",
        nargs="?",
        default=None,
    )
    prompt: tuple[str, ...] = argument("PROMPT", nargs="*", default=())
    prompts: Path | None = option("a prompt on each line", metavar="FILE", type=input_file)
    out: Path = option(
        "images get its next free numbers (default: samples)", default=Path("samples"), metavar="FOLDER", type=_folder
    )
    again: Path | None = option(
        "draw this image again: it says how it was generated", metavar="FILE.png", type=input_file
    )
    negative: str | None = option("what should not be in it", metavar="TEXT")
    steps: int | None = option("default: 30, or what its pipeline has", metavar="N")
    guidance: float | None = option("how closely to keep to the prompt (its own default)", metavar="X")
    seed: int | None = option("of the first image; the next has one more (default: any)", metavar="N")
    n: int | None = option("images of each prompt (default: 1)", metavar="N")
    batch: int | None = option("images drawn at once (default: 1)", metavar="N")
    width: int | None = option("default: the model's own size, or that of --image", metavar="PX")
    height: int | None = option(metavar="PX")
    seconds: float | None = option("how long, of models of sound", metavar="S")
    scheduler: str | None = option("a class of diffusers, such as EulerAncestralDiscrete", metavar="NAME")
    image: Path | None = option("begin with this image", metavar="FILE", type=input_file)
    strength: float | None = option("how much of it is regenerated, 0 to 1 (default: 0.8)", metavar="X")
    mask: Path | None = option("draw only where this is white; of the image's size", metavar="FILE", type=input_file)
    upscale: int | None = option("enlarge the result, or --image, so many times (2 to 4)", metavar="N")
    upscaler: Path | None = option("with ESRGAN-type weights (extra `upscale`)", metavar="FILE", type=input_file)
    faces: Path | None = option(
        "restore faces with GFPGAN's weights (extra `upscale`)", metavar="FILE", type=input_file
    )
    lora: tuple[str, ...] = option("repeatable", default=(), metavar="PATH[:WEIGHT]")
    embedding: tuple[str, ...] = option("a word (textual inversion); repeatable", default=(), metavar="FILE")
    grid: bool = option("all images in one file, too", default=False)
    show_flagged: bool = option("do not blur what the NSFW detector flags", default=False)


def run(options: SampleOptions) -> Result:
    """Generate all images; each is there as soon as it is finished, its path a line of stdout.

    Raises UserError, before the model is loaded and anything is written, where something does not fit.
    """
    out, err = sys.stdout, sys.stderr
    _check(options)
    if options.model is not None and not options.again:
        from train.generate.sound import is_sound

        if is_sound(options.model):
            return _sample_sound(options, out, err)
    _check_wanted(options)
    from train.generate.files import grid_png, read_facts, read_image, read_mask, save_numbered
    from train.generate.request import check_scheduler, foreign_syntax, request_of, resolve
    from train.generate.upscale import check_network
    from train.models.embeddings import read_embedding
    from train.models.info import read_model_info
    from train.models.lora import check_lora, parse_lora

    # all that can be refused without torch and diffusers, which take seconds to load
    record = None
    if options.again is not None:
        record = read_facts(options.again)
        options = _from_record(options, record)
    prompts = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else ())]
    for name, path in (("upscaler", options.upscaler), ("faces", options.faces)):
        if path is not None:
            check_network(path, f"--{name} {path}")
    info = read_model_info(str(options.model))
    loras = [parse_lora(text) for text in options.lora]
    for lora in loras:
        check_lora(info, lora)
    embeddings = [here(text) for text in options.embedding]
    for path in embeddings:
        read_embedding(info, path)
    image = read_image(options.image) if options.image else None
    mask = read_mask(options.mask) if options.mask else None
    requests = [request_of(record, image, mask)] if record else _requests(options, prompts, info, image, mask, err)
    resolved = [resolve(info, r, upscaler=options.upscaler is not None) for r in requests]
    words = list(dict.fromkeys(text for r in requests for text in (r.prompt, r.negative)))
    if record is None and (foreign := foreign_syntax(words)):
        err.write(foreign + "\n")
    with quiet_libraries():
        check_scheduler(info, resolved[0])
        from train.generate.sampler import Sampler

        largest = max(((r.width or 0, r.height or 0) for r in resolved if not r.enlarges), default=info.size)
        sampler = Sampler(
            info,
            loras=loras,
            embeddings=embeddings,
            upscaler=options.upscaler,
            faces=options.faces,
            batch=options.batch or 1,
            size=largest,
            blur=not options.show_flagged,
        )
        err.write(f"model  {info.name} · {sampler} · seed {requests[0].seed}\n")
        for note in sampler.notes:
            err.write(note + "\n")
        if record and info.digest != record["model"]["sha256"]:
            err.write(f"the model is not the one that {options.again} was generated with: its digest is another\n")
        if cost := sampler.cost(requests):
            err.write(f"enlarging: {cost}\n")
        finished = _generate(sampler, requests, options, out, err)
    paths = {"pictures": options.out}
    if options.grid:
        from train.tasks import image_grid

        count = options.n or 1
        columns = count if count > 1 else max(1, round(len(finished) ** 0.5))  # a row for each prompt
        grid = image_grid([generated.image for _, generated in finished], columns)
        names = [path.name for path, _ in finished]
        paths["grid"] = save_numbered(grid_png(grid, names), options.out, "grid-")
    if record and options.again:
        out.write(_compare(finished[0][1], options.again, record) + "\n")
    images = [{"path": str(path), "seed": g.request.seed, "nsfw": g.nsfw, "flagged": g.flagged} for path, g in finished]
    return Result(facts={"pictures": images}, paths=paths, next=command("sample", "--again", finished[-1][0]))


# ------------------------------------------------------------------------------------------- before the model is loaded


def _check(options: SampleOptions) -> None:
    """What options alone tell."""
    from train.generate.files import check_out

    if options.again:
        given = (f.name for f in fields(options) if getattr(options, f.name) not in (None, (), False))
        if odd := sorted(set(given) - set(STAYS)):
            name = "PROMPT" if odd[0] == "prompt" else f"--{odd[0].replace('_', '-')}"
            raise UserError(f"--again draws {options.again} as it was generated: it takes no {name}")
    elif options.model is None:
        raise UserError("which model? tastemaker sample MODEL PROMPT")
    for name in ("n", "batch"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: at least 1 is expected")
    check_out(options.out)
    enlarges = (options.upscale or 1) > 1
    if options.mask and not options.image:
        raise UserError("--mask says what of an image is regenerated: say which with --image")
    if options.strength is not None and not options.image and not enlarges:
        raise UserError("--strength is for an image to begin with (--image), or for --upscale")
    if options.upscaler and not enlarges and not options.again:
        raise UserError("--upscaler enlarges: say how many times with --upscale")


def _check_wanted(options: SampleOptions) -> None:
    """That an image is asked for, in words or else."""
    enlarges = (options.upscale or 1) > 1
    if options.seconds is not None:
        raise UserError("--seconds is for models of sound")
    if not (options.prompts or options.prompt or options.again or (options.image and enlarges)):
        raise UserError('what is to be generated? tastemaker sample MODEL "a red fox in the snow", or --prompts FILE')


def _sample_sound(options: SampleOptions, out: IO[str], err: IO[str]) -> Result:
    """Sound of each prompt, or of none: a WAV file each. Raises UserError for what such a model does not take."""
    from train.generate.files import save_numbered
    from train.generate.request import SEEDS
    from train.generate.sound import SoundModel, wav

    takes = {*SOUND_TAKES, "model", "out", "verbose", "json"}
    given = (f.name for f in fields(options) if getattr(options, f.name) not in (None, (), False))
    if odd := sorted(set(given) - takes):
        raise UserError(f"{options.model} is a model of sound: it takes no --{odd[0].replace('_', '-')}")
    prompts = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else ())]
    with quiet_libraries():
        model = SoundModel(str(options.model))
        if bool(prompts) != model.takes_words:
            takes_words = "what is to be heard? Give a prompt" if model.takes_words else "it takes no prompt"
            raise UserError(f"{options.model} is a {model.kind}: {takes_words}")
        prompts = [p for p in prompts or [""] for _ in range(options.n or 1)]
        first = secrets.randbelow(SEEDS - len(prompts)) if options.seed is None else options.seed
        if not 0 <= first <= SEEDS - len(prompts):
            raise UserError(f"--seed {first}: 0 to {SEEDS - len(prompts)} is expected")
        err.write(f"model  {model.name} · {model.device.type} · float32 · {model.rate:,} Hz · seed {first}\n")
        files = []
        for i, prompt in enumerate(prompts):
            samples, facts = model.generate(
                prompt, seed=first + i, seconds=options.seconds, steps=options.steps, guidance=options.guidance,
                negative=options.negative or "",
            )  # fmt: skip
            path = save_numbered(wav(samples, model.rate, facts), options.out, suffix=".wav")
            files.append({"path": str(path), "seed": first + i, "seconds": samples.shape[1] / model.rate})
            out.write(f"{path}  seed {first + i}  {samples.shape[1] / model.rate:.1f} s\n")
            out.flush()
    return Result(facts={"sounds": files}, paths={"sounds": options.out})


def _requests(
    options: SampleOptions,
    prompts: list[str],
    info: ModelInfo,
    image: Image.Image | None,
    mask: Image.Image | None,
    err: IO[str],
) -> list[GenerationRequest]:
    """Image i of the run has seed + i."""
    from train.generate.request import SEEDS, GenerationRequest, fitting_size

    prompts = [p for p in prompts or [""] for _ in range(options.n or 1)]  # an enlargement needs no words
    first = secrets.randbelow(SEEDS - len(prompts)) if options.seed is None else options.seed
    names = ("steps", "guidance", "width", "height", "scheduler", "strength", "upscale", "negative")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if image and not (options.width or options.height) and (options.upscale or 1) == 1:
        width, height = fitting_size(info, image.size)
        if (width, height) != image.size:
            given |= {"width": width, "height": height}
            which = "--image and --mask are" if mask else "--image is"
            sides = f"{image.width} x {image.height}"
            err.write(
                f"{which} scaled and cut from {sides} to {width} x {height} (--width and --height say otherwise)\n"
            )
    return [GenerationRequest(p, seed=first + i, image=image, mask=mask, **given) for i, p in enumerate(prompts)]


# -------------------------------------------------------------------------------------------------------------- --again


def _from_record(options: SampleOptions, record: dict[str, Any]) -> SampleOptions:
    """The options with the model, files and LoRAs that --again's image was generated with, as far as none are given.

    Raises UserError where they are not there any more.
    """
    from train.models.lora import Lora

    model = str(options.model or record["model"]["name"])
    if not options.model and model.count("/") != 1 and not (is_url(model) or Path(model).exists()):
        raise UserError(
            f"{options.again} was generated with {model}, which is not there: tastemaker sample MODEL --again ..."
        )
    found: dict[str, Any] = {"model": model}
    for name in ("image", "mask"):
        if getattr(options, name) is None and (fact := record.get(name)):
            found[name] = here(str(fact.get("path")))
            if not found[name].is_file():
                raise UserError(
                    f"{options.again} was generated with an image to begin with that is not here "
                    f"({fact.get('path')}): give it with --{name}"
                )
    for name in ("upscaler", "faces"):
        if getattr(options, name) is None and (fact := record.get(name)):
            found[name] = here(fact["name"])
            if not found[name].is_file() or sha256_file(found[name]) != fact["sha256"]:
                raise UserError(f"{found[name]} is not there any more, or another file: say where with --{name}")
    if not options.lora:
        for fact in record.get("loras", ()):
            lora = Lora(here(fact["name"]))
            if not lora.path.exists() or sha256_file(lora.file) != fact["sha256"]:
                raise UserError(f"the LoRA {lora.path} is not there any more, or another one: say where with --lora")
        found["lora"] = tuple(f"{fact['name']}:{fact.get('weight', 1.0)}" for fact in record.get("loras", ()))
    if not options.embedding:
        for fact in record.get("embeddings", ()):
            path = here(fact["name"])
            if not path.is_file() or sha256_file(path) != fact["sha256"]:
                raise UserError(f"{path} is not there any more, or another file: say where with --embedding")
        found["embedding"] = tuple(fact["name"] for fact in record.get("embeddings", ()))
    return replace(options, **found)


def _compare(generated: Generated, before: Path, record: dict[str, Any]) -> str:
    """How near the new image is to the old one, and what may have made the difference."""
    import numpy as np
    from PIL import Image

    facts = generated.facts
    if bool(record["nsfw"]["blurred"]) != bool(facts["nsfw"]["blurred"]):
        return f"{before} is blurred, this one is not" if record["nsfw"]["blurred"] else f"{before} is not blurred"
    old, new = np.asarray(Image.open(before).convert("RGB"), int), np.asarray(generated.image.convert("RGB"), int)
    if old.shape == new.shape and (old == new).all():
        return f"the same image as {before}, bit for bit"
    apart = f"on average {np.abs(old - new).mean():.2f} of 255 apart" if old.shape == new.shape else "another size"
    then, now = ({**f["made_with"], "device": f["device"], "dtype": f["dtype"]} for f in (record, facts))
    other = [f"{name} {then.get(name)} then, {value} now" for name, value in now.items() if then.get(name) != value]
    why = f" ({'; '.join(other)})" if other else ""
    return f"not the same image as {before}: {apart}{why}"


# -------------------------------------------------------------------------------------------------------------- images


def _generate(
    sampler: Sampler,
    requests: list[GenerationRequest],
    options: SampleOptions,
    out: IO[str],
    err: IO[str],
) -> list[tuple[Path, Generated]]:
    """Generate and save, one after the other."""
    from train.generate.files import png, save_numbered

    bar: ProgressBar | None = None
    done = 0

    def on_step(now: int, total: int) -> None:
        nonlocal bar, done
        bar = bar or ProgressBar(err, "steps", total, "steps")
        bar(now - done)
        done = now

    finished = []

    def on_note(note: str) -> None:
        err.write(f"{CLEAR if err.isatty() else ''}{note}\n")

    for generated in sampler.generate(requests, on_step, on_note):
        facts = generated.facts
        for name in ("image", "mask"):
            if facts[name] and (given := getattr(options, name)):
                facts[name]["path"] = in_urls(str(given))
        path = save_numbered(png(generated.image, facts), options.out)
        finished.append((path, generated))
        flagged = ""
        if generated.flagged:
            kept = "blurred; --show-flagged keeps it as it is" if facts["nsfw"]["blurred"] else "kept by --show-flagged"
            threshold = facts["nsfw"]["threshold"]
            flagged = f"  flagged: NSFW score {generated.nsfw:.2f}, {threshold} and more are not safe ({kept})"
        if err.isatty():
            err.write(CLEAR)
        out.write(f"{path}  seed {generated.request.seed}{flagged}\n")
        out.flush()
    if bar:
        bar.end()
    return finished


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without what diffusers, transformers and others say to programmers; what users should know, we say."""
    import warnings

    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    were = [(log, log.get_verbosity()) for log in (diffusers_logging, transformers_logging)]
    for log, _ in were:
        log.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, was in were:
            log.set_verbosity(was)
