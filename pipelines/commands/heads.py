"""`tastemaker heads`: list heads, show one, import one of others, or make one from words."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from curate.store.files import local_path
from curate.store.mirror import here, open_store
from curate.store.objects import is_url
from pipelines.options import Options, Result, argument, option
from train.places import push

if TYPE_CHECKING:
    from aesthetic.heads import Head


@dataclass(frozen=True, kw_only=True)
class HeadsOptions(Options):
    action: str = argument(None, nargs="?", default="list", choices=("list", "show", "import", "prompt"))
    head: str | None = argument(
        "HEAD",
        "show: a head's name or folder; import: a file, or a published head's name; prompt: the new head's name",
        nargs="?",
        default=None,
    )
    out: str | None = option("import, prompt: where the head goes (default: kept under its name)", metavar="FOLDER")
    encoder: str | None = option(
        "import: which vectors a file that is no published head reads; prompt: who reads the prompts", metavar="E"
    )
    task: str | None = option("import, prompt: what the scores are about (aesthetic, nsfw, ...)", metavar="WORD")
    norm: str | None = option(
        "import: the norm of the vectors that such a file was fitted to, 1 (the default) or sqrt(d)",
        choices=("l2", "l2_sqrt_d"),
    )
    scale: tuple[float, float] | None = option("import: the scale of its ratings", metavar=("LO", "HI"))
    activation: str | None = option(
        "import: what stands between the linear layers of such a file, where there are several; dropout is none",
        choices=("none", "relu"),
    )
    weights: str | None = option("prompt: a local copy of the encoder's weights", metavar="FILE")
    wanted: tuple[str, ...] = option("prompt: what scores high (repeatable)", default=(), metavar="PROMPT")
    against: tuple[str, ...] = option("prompt: what scores low (repeatable)", default=(), metavar="PROMPT")


def run(options: HeadsOptions) -> Result:
    """Do what is asked for, if its options fit."""
    from aesthetic.head_files import check_free

    action, takes = _ACTIONS[options.action]
    every = {name for _, names in _ACTIONS.values() for name in names}
    if odd := sorted(name for name in every - set(takes) if getattr(options, name) not in (None, ())):
        raise UserError(f"tastemaker heads {options.action} takes no --{odd[0]}")
    if options.action == "prompt" and not options.head:
        raise UserError("tastemaker heads prompt NAME --wanted PROMPT --against PROMPT: give the new head a name")
    if options.action != "list" and not options.head:
        raise UserError(
            f"tastemaker heads {options.action} HEAD: which one? `tastemaker heads` lists those that are here"
        )
    if options.out is not None:
        check_free(head_out(options.out))
    return action(options)


def _list(options: HeadsOptions) -> Result:
    from aesthetic.catalog import list_heads, load_head, published_heads
    from aesthetic.heads import HeadError
    from curate.annotators.registry import describe_annotator, known_annotators

    known: dict[str, dict[str, Any]] = {}
    for name in list_heads():
        try:
            known[name] = _facts(load_head(name))
        except HeadError as e:  # one that is damaged hides no other
            known[name] = {"name": name, "error": str(e)}
    width = max(map(len, known)) + 2
    print(f"{'HEAD':{width}}{'SCORES':12}{'SCALE':12}{'READS VECTORS OF':37}HOW GOOD")
    for name, facts in known.items():
        if "error" in facts:
            print(f"{name:{width}}damaged: {facts['error']}")
            continue
        low, high = facts["scale"]
        scale = f"{low:g} to {high:g}"
        line = f"{name:{width}}{facts['task']:12}{scale:12}{facts['reads']:37}{facts.get('how_good') or ''}"
        print(line.rstrip())
    absent = [p.name for p in published_heads() if p.name not in known]
    if absent:
        print(f"published, not here: {', '.join(absent)} (`tastemaker heads import NAME` fetches one)")
    annotators = [describe_annotator(name) for name in known_annotators()]
    takes = [", ".join(facts["options"]) for facts in annotators]
    wide = max(map(len, takes)) + 2
    width = max(width, *(len(facts["name"]) + 2 for facts in annotators))
    print(f"\n{'ANNOTATOR':{width}}{'READS':12}{'OPTIONS':{wide}}WHAT IT SAYS")
    for facts, taken in zip(annotators, takes, strict=True):
        print(f"{facts['name']:{width}}{facts['reads']:12}{taken:{wide}}{facts['about'][0]}".rstrip())
    found = {"heads": list(known.values()), "annotators": annotators, "published": absent}
    return Result(facts=found, next="tastemaker heads show HEAD")


def _show(options: HeadsOptions) -> Result:
    from aesthetic.catalog import find_head, load_head
    from aesthetic.model_card import describe
    from curate.annotators.heads import head_here
    from curate.annotators.registry import describe_annotator, known_annotators

    name = str(options.head)
    if name in known_annotators():
        facts = describe_annotator(name)
        wanted = "".join(f", {option}: ..." for option in facts["options"])
        spec = f"'{column_for(name)}={{use: {name}{wanted}}}'" if wanted else f"{column_for(name)}={name}"
        print(f"{name}, an annotator: it reads {facts['reads']}\n" + "\n".join(facts["about"]) + "\n")
        return Result(facts=facts, next=f"tastemaker annotate DATA {spec}")
    folder = find_head(head_here(name))
    head = load_head(folder)
    print(describe(head) + "\n")
    following = f"tastemaker annotate DATA {column_for(head.name)}={name}"
    return Result(facts={**_facts(head), "card": head.card}, paths={"head": folder}, next=following)


def _import(options: HeadsOptions) -> Result:
    from aesthetic.imports import fetch_head, import_head
    from curate.encoders.registry import canonical_name, check_named

    file = str(here(str(options.head)))
    if not Path(file).exists():
        if options.encoder or options.norm or options.scale or options.activation:
            raise UserError(f"there is no file {file}")
        return _save(options, fetch_head(file))
    if options.encoder is not None:
        check_named(options.encoder)
    head = import_head(
        file,
        encoder=None if options.encoder is None else canonical_name(options.encoder),
        norm=options.norm or "l2",
        scale=options.scale,
        activation=options.activation,
        task=options.task or "aesthetic",
    )
    if options.encoder is not None:
        _require_free(head.name, options.out)
    return _save(options, head)


def _prompt(options: HeadsOptions) -> Result:
    from aesthetic.prompts import prompt_head
    from curate.encoders.registry import check_available, load_encoder

    name = str(options.head)
    if not (options.encoder and options.wanted and options.against):
        raise UserError(
            f"tastemaker heads prompt {name} needs an encoder and prompts for both sides, such as "
            '--encoder bundled --wanted "a photo of a cat" --against "a photo"'
        )
    _require_free(name, options.out)
    check_available(options.encoder, options.weights)
    encoder = load_encoder(options.encoder, weights=options.weights, precision="fp32")
    head = prompt_head(
        encoder.encode_texts,
        encoder.space(),
        options.wanted,
        options.against,
        name=name,
        task=options.task or "prompts",
    )
    return _save(options, head)


def head_out(text: str) -> Path:
    """A head's folder; of a URL, in the mirror of the folder that it is in, so that it has its name."""
    if not is_url(text):
        return local_path(text) if "://" in text else Path(text)
    above, _, name = text.rstrip("/").rpartition("/")
    if above.endswith("/"):
        raise UserError(f"--out {text} is a bucket: a head is a folder in it")
    store = open_store(above)
    store.bring(store.walk(store.root / name))
    return store.root / name


_ACTIONS: dict[str, tuple[Callable[[HeadsOptions], Result], tuple[str, ...]]] = {
    "list": (_list, ()),
    "show": (_show, ()),
    "import": (_import, ("out", "encoder", "task", "norm", "scale", "activation")),
    "prompt": (_prompt, ("out", "encoder", "task", "weights", "wanted", "against")),
}
"""What can be done, and the options that each takes."""


def _require_free(name: str, out: str | None) -> None:
    """UserError where a head that goes by its name would never be found: one that is built in goes before it."""
    from aesthetic.catalog import SHIPPED
    from curate.annotators.registry import known_annotators

    if out is None and (name in known_annotators() or (SHIPPED / name / "head.json").exists()):
        raise UserError(f"{name} is the name of one that is built in: choose another, or a folder with --out")


def _save(options: HeadsOptions, head: Head) -> Result:
    from aesthetic.catalog import heads_folder
    from aesthetic.head_files import check_replaces, save_head
    from aesthetic.model_card import describe

    folder = head_out(options.out) if options.out else heads_folder() / head.name
    check_replaces(folder, head)
    save_head(head, folder)
    push(folder)
    print(describe(head) + "\n")
    following = f"tastemaker annotate DATA {column_for(head.name)}={options.out or head.name}"
    return Result(facts=_facts(head), paths={"head": folder}, next=following)


def column_for(head: str) -> str:
    """A name for the scores of a head of this name: what a column of SQL may be called."""
    name = re.sub(r"\W", "_", head, flags=re.ASCII).lower()
    return f"_{name}" if name[0].isdigit() else name


def _facts(head: Head) -> dict[str, Any]:
    """What the list says of a head."""
    metrics = head.card.get("metrics")
    measured = metrics if isinstance(metrics, dict) else {}
    how_good = None
    for key, word in (("auroc", "AUROC"), ("spearman", "Spearman")):
        match measured.get(key):
            case {"value": float(value), "low": float(low), "high": float(high)}:
                how_good = f"{word} {value:.2f} [{low:.2f}, {high:.2f}]"
    return {
        "name": head.name,
        "task": head.task,
        "scale": head.scale,
        "reads": head.space.encoder,
        "how_good": how_good,
    }
