"""`tastemaker evaluate`: what a model has learnt, beside what chance, real images and noise would give.

OUT/evaluation.json    what was asked, of which model and data, with which versions; every figure
    README.md          the same for people
    samples/, sheet.png, nearest.png    images, see train.evaluate.evaluation
    logs/
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from aesthetic.files import write_atomic
from curate.store.files import read_json, sha256_file, sweep, write_json
from curate.store.mirror import store_at
from curate.store.objects import is_url
from pipelines.options import Options, Result, argument, command, input_file, option, positive_int, read_prompts
from pipelines.runtime.progress import ProgressBar, format_duration, redirect_output
from pipelines.training import check_data
from train.places import bring, bring_images, local_folder, push, shown

if TYPE_CHECKING:
    from aesthetic.heads import Head
    from train.evaluate.model import EvaluatedModel

MIN_PROMPTS = 8


def _number_or_file(text: str) -> int | Path:
    return int(text) if text.isdigit() else input_file(text)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Options):
    """None: what suits the model or the encoder."""

    model: str = argument("MODEL", "a folder that train made, a diffusers folder, a LoRA, or a hub id")
    data: Path = argument(
        "SHARDS", "the captioned images that it was trained on (those held out count) or others", type=local_folder
    )
    out: Path = option("default: MODEL/evaluation", metavar="DIR", type=local_folder)
    prompts: int | Path = option(
        "draw N captions (default 128), or the lines of a file, without real ones",
        default=128,
        metavar="N|FILE",
        type=_number_or_file,
    )
    encoder: str = option("bundled (default) or open_clip:ARCH/PRETRAINED", default="bundled", metavar="E")
    heads: tuple[str, ...] | None = option(
        "default: those of this encoder that come with tastemaker", metavar="HEAD", nargs="+"
    )
    seed: int = option("of the first image; the next ones count on", default=0, metavar="N")
    guidance: float | None = option("default: what suits the model, as in sample", metavar="X")
    steps: int = option("of drawing (default 30)", default=30, metavar="N", type=positive_int)

    def __post_init__(self) -> None:
        if vars(self)["out"] is None:
            if not is_url(self.model) and not Path(self.model).is_dir():
                raise UserError(
                    f"{self.model} is no folder here. Of a model of the hub, say with --out where its figures go"
                )
            inner = f"{self.model.rstrip('/')}/evaluation"
            object.__setattr__(self, "out", local_folder(inner) if is_url(self.model) else Path(inner))


def run(options: EvaluateOptions) -> Result:
    """Evaluate a model, from where an earlier run of the same request stopped.

    Raises UserError before the model is loaded where model, data, prompts, encoder, heads or folder do not fit.
    """
    from curate.store.ownership import check_free, taken

    if store_at(options.data).url is None:
        check_data(options.data)
    check_free(store_at(options.out), "evaluation")
    prompts = _prompts(options)
    from curate.encoders.registry import canonical_name, check_available
    from train.evaluate.model import EvaluatedModel

    model = EvaluatedModel.of(options.model)
    heads = _heads(options)
    check_available(options.encoder)
    bring_images(options.data)
    check_data(options.data)
    # these bring torch and diffusers: after all that is told without them
    from train.data import open_samples
    from train.evaluate.evaluation import Evaluation
    from train.evaluate.report import readme
    from train.generate.request import GenerationRequest, resolve

    same: dict[str, Any] = {"seed": options.seed, "steps": options.steps, "guidance": options.guidance}
    resolve(model.info, GenerationRequest("", **same))
    settings = model.record.get("settings", {})
    try:
        samples = open_samples(options.data, settings.get("caption"), settings.get("captions"))
    except UserError:  # other images may lack the columns that it was trained with
        samples = open_samples(options.data, settings.get("caption"))
    manifest = samples.folder / "manifest.json"
    asked = {  # what must be the same for the figures to be the same, but for versions and machine
        "model": {"name": options.model, "sha256": model.digest},
        "data": {
            "folder": shown(samples.folder.absolute()),
            "fingerprint": samples.fingerprint,
            "manifest_sha256": sha256_file(manifest) if manifest.is_file() else None,
        },
        "prompts": prompts,
        "encoder": canonical_name(options.encoder),
        "heads": {head.name: head.digest for head in heads},
        **same,
        "guidance": model.info.guidance if options.guidance is None else options.guidance,
    }
    bring(options.out)
    if (done := _finished(options.out, asked)) is not None:
        return _outcome(options, model, done)
    with (
        taken(store_at(options.out), "evaluation") as folder,
        redirect_output(options.out / "logs" / "evaluate.log") as terminal,
    ):
        sweep(options.out)
        bring(options.out)
        if (done := _finished(options.out, asked)) is not None:  # again: another run may have been at work until now
            return _outcome(options, model, done)
        for note in samples.notes():
            terminal.write(f"{samples.folder}: {note}\n")
        try:
            evaluation = Evaluation(
                model,
                samples,
                options.out,
                prompts=prompts,
                encoder=options.encoder,
                heads=heads,
                progress=lambda what, total, unit: ProgressBar(terminal, what, total, unit),
                **same,
            )
        except Exception:
            folder.undo(["logs"])
            raise
        write_json(options.out / "evaluation.json", {"asked": asked})

        def say(line: str) -> None:
            print(line, file=terminal)
            push(options.out)  # what is drawn so far

        facts = {"asked": asked, **evaluation.run(say)}
        write_atomic(options.out / "README.md", readme(facts).encode())
        write_json(options.out / "evaluation.json", facts)
        push(options.out)
        return _outcome(options, model, facts)


def _prompts(options: EvaluateOptions) -> list[str] | int:
    """The different lines of a file of prompts, or how many captions are generated."""
    if isinstance(options.prompts, int):
        if options.prompts < MIN_PROMPTS:
            raise UserError(f"--prompts {options.prompts}: at least {MIN_PROMPTS} are needed to tell anything")
        return options.prompts
    if not options.prompts.is_file():
        raise UserError(f"--prompts {options.prompts}: neither a number nor a file")
    found = list(dict.fromkeys(read_prompts(options.prompts)))
    if len(found) < MIN_PROMPTS:
        raise UserError(
            f"--prompts {options.prompts} holds {len(found)} different prompts: at least {MIN_PROMPTS}, a line each"
        )
    return found


def _heads(options: EvaluateOptions) -> Sequence[Head]:
    """Those that were asked for, else those that come with tastemaker and read this encoder's vectors."""
    from aesthetic.catalog import SHIPPED, list_heads, load_head
    from curate.annotators.heads import head_here
    from curate.encoders.registry import canonical_name

    encoder = canonical_name(options.encoder)
    if options.heads is None:
        shipped = [load_head(name) for name in list_heads() if (SHIPPED / name / "head.json").is_file()]
        return [head for head in shipped if head.space.encoder == encoder]
    heads = [load_head(head_here(name)) for name in options.heads]
    for head in heads:
        if head.space.encoder != encoder:
            raise UserError(
                f"the head {head.name} reads vectors of {head.space.encoder}, not of {encoder}: "
                f"--encoder {head.space.encoder} would do"
            )
    return heads


def _finished(out: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What OUT holds, where it is finished; None where there is something to do. UserError where it is another's."""
    before = read_json(out / "evaluation.json")
    if before is None:
        return None
    elsewhere = {"model": "name", "data": "folder"}  # they may lie elsewhere now

    def compared(asked: dict[str, Any], key: str) -> Any:
        value = asked.get(key)
        return {k: v for k, v in value.items() if k != elsewhere[key]} if key in elsewhere and value else value

    if other := [key for key in asked if compared(before["asked"], key) != compared(asked, key)]:
        raise UserError(
            f"{out} holds an evaluation of another kind (its {', '.join(other)} differ{'s' * (len(other) == 1)}). "
            f"Give another --out, or remove it."
        )
    return before if "figures" in before else None


def _outcome(options: EvaluateOptions, model: EvaluatedModel, facts: dict[str, Any]) -> Result:
    from train.evaluate.report import summary, table

    out = options.out
    paths = {"evaluation": out / "evaluation.json", "pictures": out / "sheet.png"}
    if "memorisation" in facts["figures"]:
        paths["nearest"] = out / "nearest.png"
    text = f"{table(facts)}\nevaluated in {format_duration(facts['seconds'])}\n{summary(facts)}"
    words = [model.info.folder, "PROMPT", "--lora", options.model] if model.loras else [options.model, "PROMPT"]
    return Result(text=text, facts=facts, paths=paths, next=command("sample", *words))
