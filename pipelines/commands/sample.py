"""`tastemaker sample`: pictures from a model, each a PNG of the next free number that says how it was drawn."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from aesthetic.errors import UserError
from curate.store.disk import check_space
from curate.store.files import local_path, sha256_file
from pipelines.options import Options, Result, argument, option
from pipelines.prompts import read_prompts
from pipelines.runtime.progress import ProgressBar
from pipelines.terminal import CLEAR

if TYPE_CHECKING:
    from train.generate.sampler import Generated, GenerationRequest, Sampler
    from train.models.info import ModelInfo
    from train.models.lora import Lora

STAYS = ("model", "out", "again", "image", "mask", "lora", "upscaler", "faces", "show_flagged", "verbose", "json")
"""What may be given beside --again: where things are, not how the picture is drawn."""


def _folder(text: str) -> Path:
    """A folder as it was given: relative, so that pictures do not tell where somebody's folders lie."""
    return local_path(text) if "://" in text else Path(text).expanduser()


@dataclass(frozen=True, kw_only=True)
class SampleOptions(Options):
    """None: what suits the model."""

    model: str | None = argument(
        "MODEL", "a diffusers folder (Stable Diffusion type) or hub id", nargs="?", default=None
    )
    prompt: tuple[str, ...] = argument("PROMPT", nargs="*", default=())
    prompts: Path | None = option("a prompt on each line", metavar="FILE")
    out: Path = option("pictures get its next free numbers", default=Path("samples"), metavar="FOLDER", type=_folder)
    again: Path | None = option("draw this picture again: it says how it was drawn", metavar="FILE.png")
    negative: str | None = option("what should not be in it", metavar="TEXT")
    steps: int | None = option("default: 30", metavar="N")
    guidance: float | None = option("how closely to keep to the prompt (7.5, or 3)", metavar="X")
    seed: int | None = option("of the first picture; the next has one more (default: any)", metavar="N")
    n: int | None = option("pictures of each prompt (default: 1)", metavar="N")
    batch: int | None = option("pictures drawn at once (default: 1)", metavar="N")
    width: int | None = option("default: the model's own size, or that of --image", metavar="PX")
    height: int | None = option(metavar="PX")
    scheduler: str | None = option("a class of diffusers, such as EulerAncestralDiscrete", metavar="NAME")
    image: Path | None = option("begin with this picture", metavar="FILE")
    strength: float | None = option("how much of it is drawn anew, 0 to 1 (default: 0.8)", metavar="X")
    mask: Path | None = option("draw only where this is white; of the picture's size", metavar="FILE")
    upscale: int | None = option("enlarge the result, or --image, so many times (2 to 4)", metavar="N")
    upscaler: Path | None = option("with ESRGAN-type weights (extra `upscale`)", metavar="FILE")
    faces: Path | None = option("restore faces with GFPGAN's weights (extra `upscale`)", metavar="FILE")
    lora: tuple[str, ...] = option("repeatable", default=(), metavar="PATH[:WEIGHT]")
    grid: bool = option("all pictures in one file, too", default=False)
    show_flagged: bool = option("do not blur what the NSFW detector flags", default=False)


def run(options: SampleOptions) -> Result:
    """Draw all pictures; each is there as soon as it is finished, its path a line of stdout.

    Raises UserError, before the model is loaded and anything is written, where something does not fit.
    """
    out, aside = sys.stdout, sys.stderr
    _check(options)
    told = _told(options) if options.again else None
    prompts = [] if told else _prompts(options)
    from train.generate.sampler import Sampler, check_scheduler, foreign_syntax, resolve
    from train.models.info import read_model_info
    from train.models.lora import check_lora

    # all that can be refused without torch and diffusers, which take seconds to load
    upscaler, faces = (_network(options, told, name) for name in ("upscaler", "faces"))
    about = read_model_info(_model(options, told))
    loras = _loras(options, told)
    for lora in loras:
        check_lora(about, lora)
    requests = [_again(options, told)] if told else _requests(options, prompts, about, aside)
    checked = [resolve(about, r, upscaler=upscaler is not None) for r in requests]
    check_space(_existing(options.out))
    if options.again is None and (foreign := foreign_syntax(t for r in requests for t in (r.prompt, r.negative))):
        aside.write(foreign + "\n")
    with quiet_libraries():
        check_scheduler(about, checked[0])
        large = max(((r.width or 0, r.height or 0) for r in checked if not r.enlarges), default=about.size)
        sampler = Sampler(
            about, loras=loras, upscaler=upscaler, faces=faces, batch=options.batch or 1, size=large,
            blur=not options.show_flagged,
        )  # fmt: skip
        aside.write(f"model  {about.name} · {sampler} · seed {requests[0].seed}\n")
        for note in sampler.notes:
            aside.write(note + "\n")
        for text in dict.fromkeys(t for r in requests for t in (r.prompt, r.negative)):
            if unread := sampler.unread(text):
                aside.write(f"the model reads no further than: {text.removesuffix(unread)!r}; not {unread!r}\n")
        if told and about.digest != told["model"]["sha256"]:
            aside.write(f"the model is not the one that {options.again} was drawn with: its digest is another\n")
        if cost := sampler.cost(requests):
            aside.write(f"enlarging: {cost}\n")
        drawn = _drawn(sampler, requests, options, told, out, aside)
    grid = _grid(drawn, options) if options.grid else None
    if told and options.again:
        out.write(_compared(drawn[0][1], options.again, told) + "\n")
    pictures = [{"path": str(path), "seed": d.request.seed, "nsfw": d.nsfw, "flagged": d.flagged} for path, d in drawn]
    paths = {"pictures": options.out, **({"grid": grid} if grid else {})}
    return Result(facts={"pictures": pictures}, paths=paths, next=f"tastemaker sample --again {drawn[-1][0]}")


# ------------------------------------------------------------------------------------------- before the model is loaded


def _check(options: SampleOptions) -> None:
    """What options alone tell."""
    if options.again:
        given = (f.name for f in fields(options) if getattr(options, f.name) not in (None, (), False))
        if odd := sorted(set(given) - set(STAYS)):
            raise UserError(f"--again draws {options.again} as it was drawn: it takes no {_option(odd[0])}")
    elif options.model is None:
        raise UserError("which model? tastemaker sample MODEL PROMPT")
    for name in ("n", "batch"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: at least 1 is expected")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"{options.out} is a file; --out names a folder")
    if options.prompts is None and not options.prompt and not options.again:
        _prompts(options)  # there are none
    if not os.access(_existing(options.out), os.W_OK | os.X_OK):
        raise UserError(f"{options.out} can't be written: give another folder with --out")
    if options.mask and not options.image:
        raise UserError("--mask says what of a picture is drawn anew: say which with --image")
    if options.strength is not None and not options.image and (options.upscale or 1) == 1:
        raise UserError("--strength is for a picture to begin with (--image), or for --upscale")
    if options.upscaler and (options.upscale or 1) == 1 and not options.again:
        raise UserError("--upscaler enlarges: say how many times with --upscale")


def _option(name: str) -> str:
    return "PROMPT" if name == "prompt" else f"--{name.replace('_', '-')}"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that there is."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())


def _prompts(options: SampleOptions) -> list[str]:
    if options.prompts is None:
        if options.prompt:
            return list(options.prompt)
        if options.image and (options.upscale or 1) > 1:
            return [""]  # an enlargement needs no words
        raise UserError('what is to be drawn? tastemaker sample MODEL "a red fox in the snow", or --prompts FILE')
    return [*options.prompt, *read_prompts(options.prompts)]


def _requests(options: SampleOptions, prompts: list[str], about: ModelInfo, aside: IO[str]) -> list[GenerationRequest]:
    """Picture i of the run has seed + i."""
    from train.generate.files import read_mask, read_picture
    from train.generate.sampler import SEEDS, GenerationRequest, fitting_size

    prompts = [p for p in prompts for _ in range(options.n or 1)]
    image = read_picture(options.image) if options.image else None
    mask = read_mask(options.mask) if options.mask else None
    first = secrets.randbelow(SEEDS - len(prompts)) if options.seed is None else options.seed
    names = ("steps", "guidance", "width", "height", "scheduler", "strength", "upscale", "negative")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if image and not (options.width or options.height) and (options.upscale or 1) == 1:
        width, height = fitting_size(about, image.size)
        if (width, height) != image.size:
            given |= {"width": width, "height": height}
            which = "--image and --mask are" if mask else "--image is"
            sides = f"{image.width} x {image.height}"
            aside.write(
                f"{which} scaled and cut from {sides} to {width} x {height} (--width and --height say otherwise)\n"
            )
    return [GenerationRequest(p, seed=first + i, image=image, mask=mask, **given) for i, p in enumerate(prompts)]


# ------------------------------------------------------------------------------------------------------------- again


def _told(options: SampleOptions) -> dict[str, Any]:
    from train.generate.files import check_facts, read_facts

    assert options.again
    facts = read_facts(options.again)
    check_facts(facts, options.again)
    return facts


def _model(options: SampleOptions, told: dict[str, Any] | None) -> str:
    if options.model or told is None:
        return str(options.model)
    name = str(told["model"]["name"])
    if name.count("/") != 1 and not Path(name).exists():
        raise UserError(
            f"{options.again} was drawn with {name}, which is not there: tastemaker sample MODEL --again ..."
        )
    return name


def _again(options: SampleOptions, told: dict[str, Any]) -> GenerationRequest:
    from train.generate.files import read_mask, read_picture
    from train.generate.sampler import request_of

    pictures = {}
    for name, read in (("image", read_picture), ("mask", read_mask)):
        path = getattr(options, name) or _there(told.get(name))
        if told.get(name) and path is None:
            raise UserError(
                f"{options.again} was drawn with a picture to begin with that is not here "
                f"({told[name].get('path')}): give it with --{name}"
            )
        pictures[name] = read(path) if path else None
    return request_of(told, pictures["image"], pictures["mask"])


def _loras(options: SampleOptions, told: dict[str, Any] | None) -> list[Lora]:
    from train.models.lora import Lora, parse_lora

    if options.lora or not told:
        return [parse_lora(text) for text in options.lora]
    loras = [Lora(Path(fact["name"]), float(fact["weight"])) for fact in told.get("loras", ())]
    for lora, fact in zip(loras, told.get("loras", ()), strict=True):
        if not lora.path.exists() or sha256_file(lora.file) != fact["sha256"]:
            raise UserError(f"the LoRA {lora.path} is not there any more, or another one: say where with --lora")
    return loras


def _network(options: SampleOptions, told: dict[str, Any] | None, name: str) -> Path | None:
    path: Path | None = getattr(options, name)
    if path is None and told and told.get(name):
        path = Path(told[name]["name"])
        if not path.is_file() or sha256_file(path) != told[name]["sha256"]:
            raise UserError(f"{path} is not there any more, or another file: say where with --{name}")
    if path is not None:
        from train.generate.upscale import check_network

        check_network(path, f"--{name} {path}")
    return path


def _there(fact: dict[str, Any] | None) -> Path | None:
    """The picture that was begun with, where it still is at the path that was given then."""
    path = Path(str(fact["path"])) if fact and fact.get("path") else None
    return path if path and path.is_file() else None


def _compared(drawn: Generated, before: Path, told: dict[str, Any]) -> str:
    """How near the new picture is to the old one, and what may have made the difference."""
    import numpy as np
    from PIL import Image

    if bool(told["nsfw"]["blurred"]) != bool(drawn.facts["nsfw"]["blurred"]):
        return f"{before} is blurred, this one is not" if told["nsfw"]["blurred"] else f"{before} is not blurred"
    old, new = np.asarray(Image.open(before).convert("RGB"), int), np.asarray(drawn.image.convert("RGB"), int)
    if old.shape == new.shape and (old == new).all():
        return f"the same picture as {before}, bit for bit"
    apart = f"on average {np.abs(old - new).mean():.2f} of 255 apart" if old.shape == new.shape else "another size"
    then, now = ({**facts["made_with"], "device": facts["device"], "dtype": facts["dtype"]} for facts in
                 (told, drawn.facts))  # fmt: skip
    other = [f"{name} {then.get(name)} then, {value} now" for name, value in now.items() if then.get(name) != value]
    why = f" ({'; '.join(other)})" if other else ""
    return f"not the same picture as {before}: {apart}{why}"


# ------------------------------------------------------------------------------------------------------------ pictures


def _drawn(
    sampler: Sampler,
    requests: list[GenerationRequest],
    options: SampleOptions,
    told: dict[str, Any] | None,
    out: IO[str],
    aside: IO[str],
) -> list[tuple[Path, Generated]]:
    """Draw and save, one after the other."""
    from train.generate.files import png, save_numbered

    count: ProgressBar | None = None
    done = 0

    def tell(now: int, of: int) -> None:
        nonlocal count, done
        count = count or ProgressBar(aside, "steps", of, "steps")
        count(now - done)
        done = now

    finished = []
    for drawn in sampler.generate(requests, tell):
        for name in ("image", "mask"):
            if drawn.facts[name] and (path := getattr(options, name) or _there((told or {}).get(name))):
                drawn.facts[name]["path"] = str(path)
        path = save_numbered(png(drawn.image, drawn.facts), options.out)
        finished.append((path, drawn))
        if aside.isatty():
            aside.write(CLEAR)
        out.write(f"{path}  seed {drawn.request.seed}{_judged(drawn)}\n")
        out.flush()
    if count:
        count.end()
    return finished


def _judged(drawn: Generated) -> str:
    if not drawn.flagged:
        return ""
    threshold = drawn.facts["nsfw"]["threshold"]
    kept = "blurred; --show-flagged keeps it as it is" if drawn.facts["nsfw"]["blurred"] else "kept by --show-flagged"
    return f"  flagged: NSFW score {drawn.nsfw:.2f}, {threshold} and more are not safe ({kept})"


def _grid(drawn: list[tuple[Path, Generated]], options: SampleOptions) -> Path:
    """All pictures in one file, a row for each prompt."""
    from train.generate.files import save_numbered, sheet
    from train.tasks import image_grid

    count = options.n or 1
    columns = count if count > 1 else max(1, round(len(drawn) ** 0.5))
    image = image_grid([d.image for _, d in drawn], columns)
    return save_numbered(sheet(image, [path.name for path, _ in drawn]), options.out, "grid-")


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
