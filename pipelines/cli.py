"""The command line. Thin: it parses, calls, prints, and turns exceptions into exit codes.

Exit codes: 0 done (failed rows are data), 1 an error of ours, no room, or what was printed is lost, 2 bad input or
recipe, or a machine that lacks something, 3 nothing kept, 130 interrupted.
Help, query, select, status and recipe start neither Ray nor torch, so imports here stay light.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipelines.faults import check_limits, find_home, told
from pipelines.terminal import Shown, open_descriptors, safe_streams

if TYPE_CHECKING:
    from aesthetic.heads import Head

EXAMPLES = """\
  tastemaker curate laion.parquet --out data --limit 1000     a list to curated shards
  tastemaker select data --name stricter --set select.rules.beautiful='laion_v2 >= 5.5'
  tastemaker pack data --name stricter                        the chosen images as shards
  tastemaker query data "select reason, count(*) from ledger group by all"
  tastemaker train data/shards/stricter --out model           a diffusion model of these
  tastemaker sample model "a red fox in the snow" --n 4       pictures from it
"""


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    parser = argparse.ArgumentParser(
        prog="tastemaker",
        description="Curate image-text data by taste: URL lists to scored, filtered webdataset shards.",
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and end")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        p.set_defaults(run=run)
        p.add_argument("--verbose", action="store_true", help="show tracebacks and libraries' warnings")
        p.add_argument("--json", action="store_true", help="make the last line machine-readable")
        return p

    def recipe_options(p: argparse.ArgumentParser) -> None:
        p.add_argument(
            "--recipe",
            metavar="R",
            help="a shipped recipe or a YAML file (default: DATA's own, else laion-aesthetics-5)",
        )
        p.add_argument(
            "--set", action="append", default=[], metavar="A.B=C", help="lay a value over the recipe (repeatable)"
        )

    def job_options(p: argparse.ArgumentParser) -> None:
        recipe_options(p)
        p.add_argument(
            "--ray-address",
            metavar="ADDRESS",
            help="run on this Ray cluster (`auto` finds it); default: Ray in this process",
        )
        p.add_argument(
            "--restart-from",
            choices=("source", "fetch", "images", "embed"),
            help="make this stage and those after it again",
        )

    for name, run, text in (
        ("curate", _curate, "turn a list of image URLs (or a folder of images or shards) into curated shards"),
        ("fetch", _curate, "only download and resize"),
    ):
        p = command(name, run, text)
        p.add_argument("list", metavar="LIST", help="file, folder, glob or URL of a list; a folder of images or shards")
        p.add_argument("--out", required=True, metavar="DATA", help="the data folder")
        p.add_argument("--limit", type=_positive, metavar="N", help="only N rows, spread over the whole list")
        p.add_argument(
            "--dry-run", action="store_true", help="print what would run, or why it would not; fetch nothing"
        )
        job_options(p)

    p = command("embed", _resume, "embed and score what is fetched")
    p.add_argument("data", metavar="DATA")
    job_options(p)
    p = command("retry", _resume, "fetch again what failed for passing reasons, and only that")
    p.add_argument("data", metavar="DATA")
    job_options(p)

    p = command("score", _score, "apply a head to the vectors that are there")
    p.add_argument("data", metavar="DATA")
    p.add_argument(
        "--head",
        action="append",
        default=[],
        metavar="COLUMN=HEAD",
        help="a new column from a head, by name or folder (repeatable)",
    )
    recipe_options(p)

    p = command("select", _select, "apply rules to the ledger: a verdict per row, no image opened")
    p.add_argument("data", metavar="DATA")
    p.add_argument("--name", help="the selection's name (default: the recipe's)")
    p.add_argument(
        "--uids", metavar="FILE.npy", help="keep the rows of a DataComp subset file instead of applying rules"
    )
    p.add_argument("--write-uids", metavar="FILE.npy", help="also write what is kept as a DataComp subset file")
    recipe_options(p)

    p = command("pack", _pack, "copy the chosen images into even, shuffled shards")
    p.add_argument("data", metavar="DATA")
    p.add_argument("--name", help="the selection's name (default: the recipe's)")
    recipe_options(p)

    p = command("status", _status, "say where a run stands")
    p.add_argument("data", metavar="DATA")
    p = command("verify", _verify, "read every file again and compare it with the records")
    p.add_argument("data", metavar="DATA")
    p.add_argument(
        "--repair",
        action="store_true",
        help="take back the records of damaged shards, so that the same command makes them again",
    )
    p = command("query", _query, "ask the whole ledger, as one table")
    p.add_argument("data", metavar="DATA")
    p.add_argument("sql", metavar="SQL", help="one SELECT over `ledger`; the list's own columns are source.NAME")
    p.add_argument("--out", type=Path, metavar="FILE", help="write all rows to a new .csv, .parquet or .jsonl")

    p = command("fit", _fit, "train a head from ratings, labels or comparisons")
    p.add_argument(
        "ratings",
        nargs="+",
        metavar="RATINGS",
        help="csv, tsv, parquet or AVA.txt: an image (key, path, url or sha256) and its score, label or votes; "
        "or winner and loser. Several files are several sources, each on its own scale",
    )
    p.add_argument("--out", required=True, metavar="HEAD", help="the head's folder")
    p.add_argument("--data", metavar="DATA", help="the data folder that holds the images and their vectors")
    p.add_argument("--images", metavar="FOLDER", help="or a folder of images, embedded with --encoder")
    p.add_argument(
        "--embeddings", metavar="FOLDER", help="or vectors as clip-retrieval stores them, made with --encoder"
    )
    p.add_argument("--encoder", metavar="E", help="bundled (default for --images) or open_clip:ARCH/PRETRAINED")
    p.add_argument("--key", metavar="COLUMN", help="the column that names the image (default: a usual name)")
    p.add_argument("--score", metavar="COLUMN", help="the column of the score or label (default: a usual name)")
    p.add_argument(
        "--group",
        metavar="COLUMN",
        help="images of one group never straddle training and test (photographer, prompt, theme)",
    )
    p.add_argument("--positive", metavar="VALUE", help="the label that counts as 1, where labels are words")
    p.add_argument(
        "--scale", nargs=2, type=float, metavar=("LO", "HI"), help="the rating scale (default: the range of the scores)"
    )
    p.add_argument("--task", metavar="WORD", help="what the score is about: aesthetic (default), nsfw, ...")
    p.add_argument(
        "--prevalence", type=float, metavar="SHARE", help="positives where a classifier will be used (default 0.01)"
    )
    p.add_argument("--network", action="store_true", help="try a small network too; taken only if it beats ridge")
    p.add_argument("--suggest", type=_positive, default=0, metavar="N", help="name N images to rate next")
    p.add_argument("--ray-address", metavar="ADDRESS", help="sum over the rows on this Ray cluster")

    p = command("heads", _heads, "list and show heads, import one, or make one from words")
    p.add_argument("action", nargs="?", default="list", choices=tuple(_HEADS))
    p.add_argument(
        "head",
        nargs="?",
        metavar="HEAD",
        help="show: a head's name or folder; import: a file, or a published head's name; prompt: the new head's name",
    )
    p.add_argument("--out", metavar="FOLDER", help="import, prompt: where the head goes (default: kept under its name)")
    p.add_argument(
        "--encoder",
        metavar="E",
        help="import: which vectors a file that is no published head reads; prompt: who reads the prompts",
    )
    p.add_argument("--task", metavar="WORD", help="import, prompt: what the scores are about (aesthetic, nsfw, ...)")
    p.add_argument(
        "--norm",
        choices=("l2", "l2_sqrt_d"),
        help="import: the norm of the vectors that such a file was fitted to, 1 (the default) or sqrt(d)",
    )
    p.add_argument("--scale", nargs=2, type=float, metavar=("LO", "HI"), help="import: the scale of its ratings")
    p.add_argument("--weights", metavar="FILE", help="prompt: a local copy of the encoder's weights")
    p.add_argument("--wanted", action="append", metavar="PROMPT", help="prompt: what scores high (repeatable)")
    p.add_argument("--against", action="append", metavar="PROMPT", help="prompt: what scores low (repeatable)")

    p = command("train", _train, "train a text-to-image diffusion model on captioned pictures")
    p.add_argument(
        "shards",
        metavar="SHARDS",
        help="a folder of packed shards, of img2dataset's or webdataset's tars, or of images",
    )
    p.add_argument("--out", required=True, metavar="MODEL", help="the model's folder, which diffusers loads when done")
    p.add_argument(
        "--preset",
        metavar="P",
        help="a new model: debug, tiny (default without a GPU), small-64 (default with one), base-128, sd15",
    )
    p.add_argument("--from", dest="start", metavar="MODEL", help="go on with a diffusers folder, or a hub id")
    p.add_argument(
        "--lora", nargs="?", type=_positive, const=8, metavar="RANK", help="train only a LoRA on it (default rank 8)"
    )
    p.add_argument("--objective", metavar="O", help="of a new model: flow (default), v or eps")
    p.add_argument("--steps", type=_positive, metavar="N", help="default: the preset's; 1000 with --from")
    p.add_argument("--batch", type=_positive, metavar="N", help="pictures a step, over all workers")
    p.add_argument("--lr", type=float, metavar="X", help="highest learning rate of AdamW")
    p.add_argument("--size", type=_positive, metavar="PX", help="side of the pictures (default: the model's own)")
    p.add_argument("--buckets", action="store_true", help="keep pictures' aspect ratios: several shapes of one area")
    p.add_argument("--caption", metavar="TEXT", help="of pictures without a caption of their own: 'a photo of sks dog'")
    p.add_argument("--weight-by", metavar="COLUMN", help="draw pictures in proportion to this score")
    p.add_argument("--workers", type=_positive, metavar="N", help="default: one per GPU, or one")
    p.add_argument(
        "--prompts", type=Path, metavar="FILE", help="drawn as training goes on, a line each (default: 4 captions)"
    )
    p.add_argument(
        "--save-every", type=_positive, metavar="N", help="steps between checkpoints (default: a fifth of all)"
    )
    p.add_argument("--look-every", type=_positive, metavar="N", help="steps between pictures (default: at checkpoints)")
    p.add_argument("--micro-batch", type=_positive, metavar="N", help="pictures at a time on a worker, to save memory")
    p.add_argument("--checkpointing", action="store_true", help="recompute activations: less memory, a third slower")
    p.add_argument("--compile", action="store_true", help="torch.compile: minutes at first, then faster on GPUs")
    p.add_argument("--tensorboard", action="store_true", help="write MODEL/tensorboard too (extra `tensorboard`)")
    p.add_argument("--seed", type=int, default=0, metavar="N")
    p.add_argument("--ray-address", metavar="ADDRESS", help="train on this Ray cluster (`auto` finds it)")

    p = command("sample", _sample, "draw pictures with a model: from words, from a picture, into one, or enlarged")
    p.add_argument("model", nargs="?", metavar="MODEL", help="a diffusers folder (Stable Diffusion type) or hub id")
    p.add_argument("prompt", nargs="*", metavar="PROMPT")
    p.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt on each line")
    p.add_argument("--out", default="samples", metavar="FOLDER", help="pictures get its next free numbers")
    p.add_argument("--again", type=Path, metavar="FILE.png", help="draw this picture again: it says how it was drawn")
    p.add_argument("--negative", metavar="TEXT", help="what should not be in it")
    p.add_argument("--steps", type=int, metavar="N", help="default: 30")
    p.add_argument("--guidance", type=float, metavar="X", help="how closely to keep to the prompt (7.5, or 3)")
    p.add_argument("--seed", type=int, metavar="N", help="of the first picture; the next has one more (default: any)")
    p.add_argument("--n", type=int, metavar="N", help="pictures of each prompt (default: 1)")
    p.add_argument("--batch", type=int, metavar="N", help="pictures drawn at once (default: 1)")
    p.add_argument("--width", type=int, metavar="PX", help="default: the model's own size, or that of --image")
    p.add_argument("--height", type=int, metavar="PX")
    p.add_argument("--scheduler", metavar="NAME", help="a class of diffusers, such as EulerAncestralDiscrete")
    p.add_argument("--image", type=Path, metavar="FILE", help="begin with this picture")
    p.add_argument("--strength", type=float, metavar="X", help="how much of it is drawn anew, 0 to 1 (default: 0.8)")
    p.add_argument("--mask", type=Path, metavar="FILE", help="draw only where this is white; of the picture's size")
    p.add_argument("--upscale", type=int, metavar="N", help="enlarge the result, or --image, so many times (2 to 4)")
    p.add_argument("--upscaler", type=Path, metavar="FILE", help="with ESRGAN-type weights (extra `upscale`)")
    p.add_argument("--faces", type=Path, metavar="FILE", help="restore faces with GFPGAN's weights (extra `upscale`)")
    p.add_argument("--lora", action="append", default=[], metavar="PATH[:WEIGHT]", help="repeatable")
    p.add_argument("--grid", action="store_true", help="all pictures in one file, too")
    p.add_argument("--show-flagged", action="store_true", help="do not blur what the NSFW detector flags")

    p = command("serve", _serve, "draw with a model on a page in the browser, alone or with others")
    p.add_argument("model", metavar="MODEL", help="a diffusers folder (Stable Diffusion type) or hub id")
    p.add_argument("--out", default="samples", metavar="FOLDER", help="pictures get its next free numbers")
    p.add_argument("--host", default="127.0.0.1", metavar="H", help="another address than this one needs a token")
    p.add_argument("--port", type=int, default=7860, metavar="N", help="default: 7860; 0: any that is free")
    p.add_argument("--token", metavar="T", help="what people must know to draw (default: one is made where needed)")
    p.add_argument("--batch", type=_positive, default=1, metavar="N", help="pictures of a job drawn at once")
    p.add_argument("--upscaler", type=Path, metavar="FILE", help="enlarge with ESRGAN-type weights (extra `upscale`)")
    p.add_argument("--faces", type=Path, metavar="FILE", help="restore faces with GFPGAN's weights (extra `upscale`)")
    p.add_argument("--lora", action="append", default=[], metavar="PATH[:WEIGHT]", help="repeatable")
    p.add_argument("--show-flagged", action="store_true", help="do not blur what the NSFW detector flags")

    p = command("evaluate", _evaluate, "measure a model beside chance, real pictures and noise")
    p.add_argument("model", metavar="MODEL", help="a folder that train made, a diffusers folder, a LoRA, or a hub id")
    p.add_argument(
        "shards",
        metavar="SHARDS",
        help="the captioned pictures that it was trained on (those held out count) or others",
    )
    p.add_argument("--out", metavar="DIR", help="default: MODEL/evaluation")
    p.add_argument(
        "--prompts", metavar="N|FILE", help="draw N captions (default 128), or the lines of a file, without real ones"
    )
    p.add_argument("--encoder", metavar="E", default="bundled", help="bundled (default) or open_clip:ARCH/PRETRAINED")
    p.add_argument(
        "--heads", nargs="+", metavar="HEAD", help="default: those of this encoder that come with tastemaker"
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the first picture; the next ones count on")
    p.add_argument("--guidance", type=float, metavar="X", help="default: what suits the model, as in sample")
    p.add_argument("--steps", type=_positive, default=30, metavar="N", help="of drawing (default 30)")

    p = command("recipe", _recipe, "print a recipe, resolved; without a name, list them")
    p.add_argument("name", nargs="?")
    p.add_argument("--set", action="append", default=[], metavar="A.B=C")
    command("doctor", _doctor, "say what this machine has, and what is missing")
    return parser


def _positive(text: str) -> int:
    value = int(text.replace("_", "").replace(",", ""))
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1 is expected")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    with safe_streams() as (out, err):
        try:
            return _all_told(_run(argv), out, err)
        except SystemExit as e:  # argparse: help was shown, or arguments are wrong
            raise SystemExit(_all_told(e.code if isinstance(e.code, int) else 0, out, err)) from None


def _run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        from importlib.metadata import version

        print(version("tastemaker"))
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    asked: list[int] = []

    def end(number: int, frame: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)  # how a batch system asks for an end
    try:
        check_limits(args.command)
        code: int = args.run(args)
        return code
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as e:
        if asked:  # DuckDB, for one, makes an error of its own of it
            return _interrupted()
        if args.verbose:
            traceback.print_exc()
        return _explain(e)


def _all_told(code: int, out: Shown, err: Shown) -> int:
    """The exit code, once all is written: 1 where work was done and what it printed is lost.

    A reader who has left, as in `tastemaker heads | head -1`, has lost nothing.
    """
    out.flush()
    err.flush()
    if lost := out.missed or err.missed:
        _complain(f"what was printed could not be written: {lost.strerror}")
        return code or 1
    return code


def _interrupted() -> int:
    _complain("interrupted; run the same command again to go on")
    return 130


def script() -> NoReturn:
    """The console script: `main`, and an end that runs no C++ library's destructors.

    On a busy machine about one in a hundred short processes that read parquet in threads is aborted there, by pyarrow
    26's thread pool, when all is written and said; the exit code must be ours.
    """
    open_descriptors()
    find_home()
    try:
        code = main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except KeyboardInterrupt:  # before there was anything to interrupt
        code = 130
    os._exit(code)


def _explain(error: Exception) -> int:
    """Print what went wrong in one paragraph; returns the exit code that it means."""
    code, text = told(error)
    _complain(text)
    return code


def _complain(text: str) -> None:
    print(f"tastemaker: {text}", file=sys.stderr)


def _end(args: argparse.Namespace, facts: dict[str, Any], paths: dict[str, Any], next: str) -> int:
    """How every command ends: the paths it wrote, the next command to type, JSON where asked for."""
    if paths:
        print("    ".join(f"{name}  {path}" for name, path in paths.items()))
    if next:
        print(f"next: {next}")
    if args.json:
        print(json.dumps({**facts, "paths": {k: str(v) for k, v in paths.items()}}, default=str))
    return 0


# ----------------------------------------------------------------------------------------------------------- commands


def _curate(args: argparse.Namespace) -> int:
    from curate.layout import Data
    from curate.store.files import local_path
    from pipelines.commands import curate
    from pipelines.recipe import to_yaml

    stages = ("fetch",) if args.command == "fetch" else ("fetch", "embed", "select", "pack")
    root = local_path(args.out)
    recipe = curate.recipe_of(Data(root), args.recipe, args.set)
    request = curate.Request(
        list=args.list,
        root=root,
        recipe=recipe,
        limit=args.limit,
        address=args.ray_address,
        stages=stages,
        restart_from=args.restart_from,
    )
    if args.dry_run:
        facts = curate.dry_run(request)
        print(to_yaml(recipe))
        rows = f"rows {facts['rows']:,} of {facts['listed_rows']:,} listed"
        parts = [rows, f"shards {facts['shards']:,}", f"stages {', '.join(stages)}"]
        print(" · ".join([*parts, *curate.columns_taken(facts["columns"])]))
        for warning in facts["warnings"]:
            print(f"warning: {warning}")
        words = [args.command, args.list, "--out", args.out]
        for option in ("recipe", "limit", "ray_address", "restart_from"):
            if getattr(args, option) is not None:
                words += [f"--{option.replace('_', '-')}", getattr(args, option)]
        words += [word for setting in args.set for word in ("--set", setting)]
        return _end(args, facts, {}, curate.command(*words))
    outcome = curate.run(request)
    return _end(args, outcome.facts, outcome.paths, outcome.next)


def _resume(args: argparse.Namespace) -> int:
    """embed and retry: the main job on what a data folder already plans."""
    from curate.store.ownership import open_data
    from pipelines.commands import curate

    data = open_data(args.data)
    recipe = curate.recipe_of(data, args.recipe, args.set)
    retry = args.command == "retry"
    outcome = curate.resume(data, recipe, retry=retry, address=args.ray_address, restart_from=args.restart_from)
    return _end(args, outcome.facts, outcome.paths, outcome.next)


def _score(args: argparse.Namespace) -> int:
    from aesthetic.errors import UserError
    from curate.ledger.sql import plain_name
    from curate.store.ownership import open_data
    from pipelines.commands import curate

    data = open_data(args.data)
    recipe = curate.recipe_of(data, args.recipe, args.set)
    score = dict(recipe.score) if not args.head else {}
    for item in args.head:
        column, equals, head = item.partition("=")
        if not equals:
            raise UserError(f"--head {item}: expected COLUMN=HEAD, for example --head taste=taste.head")
        score[column] = head
    score = replace(recipe, score=score).score  # a recipe knows which names a column may have
    facts = curate.score(data, score, print)
    following = ""
    for name in facts["scored"]:
        setting = f"select.rules.{name}=top({plain_name(name)}, 0.1)"
        following = curate.command("select", data.root, "--name", "mine", "--set", setting)
    return _end(args, facts, {"scored": data.root / "scored"}, following)


def _select(args: argparse.Namespace) -> int:
    from curate.store.ownership import open_data
    from pipelines.commands import curate

    data = open_data(args.data)
    recipe = curate.recipe_of(data, args.recipe, args.set, select=args.name)
    rules = [s for s in args.set if s.partition("=")[0].strip().split(".")[:2] in (["select"], ["select", "rules"])]
    facts = curate.select_only(
        data,
        recipe,
        print,
        uids=args.uids,
        write_uids=args.write_uids,
        given=bool(rules or args.recipe is not None or args.uids is not None),
    )
    name = recipe.select.name
    following = curate.command("pack", data.root, "--name", name) if facts["kept"] else ""
    return _end(args, facts, {"selected": data.verdicts(name)}, following)


def _pack(args: argparse.Namespace) -> int:
    from curate.store.ownership import open_data
    from pipelines.commands import curate

    data = open_data(args.data)
    recipe = curate.recipe_of(data, args.recipe, args.set, select=args.name)
    outcome = curate.pack_only(data, recipe)
    return _end(args, outcome.facts, outcome.paths, outcome.next)


def _status(args: argparse.Namespace) -> int:
    from curate.store.ownership import open_data
    from pipelines.commands import curate

    data = open_data(args.data)
    facts, following = curate.status(data, print)
    return _end(args, facts, {}, following)


def _verify(args: argparse.Namespace) -> int:
    from curate import verify
    from curate.store.lock import Lock
    from curate.store.ownership import open_data

    data = open_data(args.data)
    checked = 0
    damages: list[verify.Damage] = []
    for found in verify.verify(data):
        checked += 1
        if found is not None:
            damages.append(found)
            print(f"damaged  {found.path}: {found.what}\n         to repair it, {found.repair}")
    print(f"{len(damages):,} of {checked:,} files are damaged" if damages else f"{checked:,} files, none damaged")
    strays = verify.strays(data)
    if strays and not any(d.path == d.record for d in damages):  # else they may be a damaged record's
        print(f"files that no record names: {len(strays):,} ({strays[0]} is one), left by a run that was killed")
    if not any(d.record.parent.name == "plan" for d in damages):
        for stage, shards in verify.unfinished(data).items():
            print(f"shards that are not {stage} yet: {len(shards):,} ({shards[0]:05d} is one)")
    facts = {"checked": checked, "damaged": [str(d.path) for d in damages], "strays": [str(p) for p in strays]}
    if not damages:
        return _end(args, facts, {}, "")
    following = [f"tastemaker verify {data.root} --repair"]
    if args.repair:
        following = verify.remedies(data, damages)
        with Lock(data.root):
            verify.repair(damages)
        print(f"{len({d.record for d in damages}):,} records taken back")
    _end(args, facts, {}, "\n      ".join(following))
    return 1


def _query(args: argparse.Namespace) -> int:
    from curate.store.ownership import open_data
    from pipelines.commands.query import show, write

    data = open_data(args.data)
    if args.out is not None:
        rows = write(data, args.sql, args.out)
        print(f"{rows:,} rows")
        return _end(args, {"rows": rows}, {"written": args.out}, "")
    if told := show(data, args.sql, sys.stdout, as_json=args.json):
        print(told)
    return 0


def _fit(args: argparse.Namespace) -> int:
    from pipelines.commands.fit import Request, fit

    request = Request(
        ratings=[Path(r) for r in args.ratings],
        out=Path(args.out),
        data=args.data,
        images=Path(args.images) if args.images else None,
        embeddings=Path(args.embeddings) if args.embeddings else None,
        encoder=args.encoder,
        key=args.key,
        score=args.score,
        group=args.group,
        positive=args.positive,
        scale=tuple(args.scale) if args.scale else None,
        task=args.task,
        prevalence=args.prevalence,
        network=args.network,
        suggest=args.suggest,
        address=args.ray_address,
    )
    outcome = fit(request, _aside)
    print(outcome.text)
    following = f"tastemaker score {args.data or 'DATA'} --head {_column(request.out.stem)}={args.out}"
    return _end(args, outcome.report, dict(outcome.paths), following)


def _train(args: argparse.Namespace) -> int:
    from curate.store.files import local_path
    from pipelines.commands.train import Request, run

    same = (
        *("preset", "start", "lora", "objective", "steps", "batch", "lr", "size", "buckets", "weight_by", "caption"),
        "workers",
        *("prompts", "save_every", "look_every", "micro_batch", "checkpointing", "compile", "tensorboard"),
        "seed",
    )
    given = {name: getattr(args, name) for name in same}
    request = Request(data=Path(args.shards), out=local_path(args.out), address=args.ray_address, **given)
    outcome = run(request)
    print(outcome.text)
    return _end(args, outcome.facts, dict(outcome.paths), outcome.next)


def _sample(args: argparse.Namespace) -> int:
    from curate.store.files import local_path
    from pipelines.commands.sample import Asked, run

    same = (
        *("model", "prompts", "again", "negative", "steps", "guidance", "seed", "n", "batch", "width", "height"),
        *("scheduler", "image", "strength", "mask", "upscale", "upscaler", "faces", "grid", "show_flagged"),
    )
    given = {name: getattr(args, name) for name in same}
    # relative, so that pictures do not tell where somebody's folders lie
    out = local_path(args.out) if "://" in args.out else Path(args.out).expanduser()
    outcome = run(Asked(prompt=tuple(args.prompt), lora=tuple(args.lora), out=out, **given), sys.stdout, sys.stderr)
    return _end(args, outcome.facts, dict(outcome.paths), outcome.next)


def _serve(args: argparse.Namespace) -> int:
    from curate.store.files import local_path
    from pipelines.commands.serve import Asked, run

    same = ("model", "host", "port", "token", "batch", "upscaler", "faces", "show_flagged")
    asked = Asked(out=local_path(args.out), lora=tuple(args.lora), **{name: getattr(args, name) for name in same})
    run(asked)
    return _end(args, {}, {"pictures": asked.out}, "")


def _evaluate(args: argparse.Namespace) -> int:
    from aesthetic.errors import UserError
    from curate.store.files import local_path
    from pipelines.commands.evaluate import PROMPTS, Request, run

    if args.out is None and not Path(args.model).is_dir():
        raise UserError(f"{args.model} is no folder here: say with --out where its evaluation goes")
    number = args.prompts is None or args.prompts.isdigit()
    request = Request(
        model=args.model,
        data=Path(args.shards),
        out=local_path(args.out) if args.out else Path(args.model) / "evaluation",
        count=int(args.prompts or PROMPTS) if number else PROMPTS,
        prompts=None if number else Path(args.prompts),
        encoder=args.encoder,
        heads=tuple(args.heads) if args.heads else None,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
    )
    outcome = run(request)
    print(outcome.text)
    return _end(args, outcome.facts, dict(outcome.paths), outcome.next)


def _aside(line: str) -> None:
    """What is going on, for those who watch; not part of what a command prints."""
    print(line, file=sys.stderr)


def _heads(args: argparse.Namespace) -> int:
    from aesthetic.errors import UserError
    from aesthetic.heads import check_free

    run, takes = _HEADS[args.action]
    every = {option for _, options in _HEADS.values() for option in options}
    if odd := sorted(option for option in every - set(takes) if getattr(args, option) is not None):
        raise UserError(f"tastemaker heads {args.action} takes no --{odd[0]}")
    if args.action != "list" and not args.head:
        raise UserError(f"tastemaker heads {args.action} HEAD: which one? `tastemaker heads` lists those that are here")
    if args.out is not None:
        check_free(Path(args.out))
    return run(args)


def _heads_list(args: argparse.Namespace) -> int:
    from aesthetic.catalog import PUBLISHED
    from aesthetic.heads import HeadError, list_heads, load_head
    from curate.annotators.nsfw import DETECTORS

    known: dict[str, dict[str, Any]] = {}
    for name in list_heads():
        try:
            known[name] = _about(load_head(name))
        except HeadError as e:  # one that is damaged hides no other
            known[name] = {"name": name, "error": str(e)}
    known |= {n: {"name": n, "task": "detector", "scale": s, "reads": "pixels"} for n, s in DETECTORS.items()}
    width = max(map(len, known)) + 2
    print(f"{'HEAD':{width}}{'SCORES':12}{'SCALE':12}{'READS VECTORS OF':37}HOW GOOD")
    for name, about in known.items():
        if "error" in about:
            print(f"{name:{width}}damaged: {about['error']}")
            continue
        low, high = about["scale"]
        scale = f"{low:g} to {high:g}"
        line = f"{name:{width}}{about['task']:12}{scale:12}{about['reads']:37}{about.get('how_good') or ''}"
        print(line.rstrip())
    absent = [p.name for p in PUBLISHED if p.name not in known]
    if absent:
        print(f"published, not here: {', '.join(absent)} (`tastemaker heads import NAME` fetches one)")
    return _end(args, {"heads": list(known.values()), "published": absent}, {}, "tastemaker heads show HEAD")


def _heads_show(args: argparse.Namespace) -> int:
    from aesthetic.heads import describe, find_head, load_head
    from curate.annotators.nsfw import DETECTORS, Detector

    if args.head in DETECTORS:
        low, high = DETECTORS[args.head]
        about = {"name": args.head, "task": "detector", "scale": (low, high), "reads": "pixels"}
        told = inspect.getdoc(next(d for d in Detector.__subclasses__() if d.name == args.head))
        print(f"{args.head}, a detector: it reads pixels, and its scores are {low:g} to {high:g}\n{told}\n")
        return _end(args, about, {}, f"tastemaker embed DATA --set score.{args.head.replace('-', '_')}={args.head}")
    head, folder = load_head(args.head), find_head(args.head)
    print(describe(head) + "\n")
    following = f"tastemaker score DATA --head {_column(head.name)}={args.head}"
    return _end(args, {**_about(head), "card": head.card}, {"head": folder}, following)


def _heads_import(args: argparse.Namespace) -> int:
    from aesthetic.catalog import fetch_head, import_head
    from aesthetic.errors import UserError
    from curate.encoders.base import canonical_name, check_named

    if not Path(args.head).exists():
        if args.encoder or args.norm or args.scale:
            raise UserError(f"there is no file {args.head}")
        return _keep(args, fetch_head(args.head))
    if args.encoder is not None:
        check_named(args.encoder)
    head = import_head(
        args.head,
        encoder=None if args.encoder is None else canonical_name(args.encoder),
        norm=args.norm or "l2",
        scale=tuple(args.scale) if args.scale else None,
        task=args.task or "aesthetic",
    )
    if args.encoder is not None:
        _require_free(head.name, args.out)
    return _keep(args, head)


def _heads_prompt(args: argparse.Namespace) -> int:
    from aesthetic.errors import UserError
    from aesthetic.prompts import prompt_head
    from curate.encoders.base import check_available, load_encoder

    if not (args.encoder and args.wanted and args.against):
        raise UserError(
            f"tastemaker heads prompt {args.head} needs an encoder and prompts for both sides, such as "
            '--encoder bundled --wanted "a photo of a cat" --against "a photo"'
        )
    _require_free(args.head, args.out)
    check_available(args.encoder, args.weights)
    encoder = load_encoder(args.encoder, weights=args.weights, precision="fp32")
    head = prompt_head(
        encoder.encode_texts,
        encoder.space(),
        args.wanted,
        args.against,
        name=args.head,
        task=args.task or "prompts",
    )
    return _keep(args, head)


_HEADS: dict[str, tuple[Callable[[argparse.Namespace], int], tuple[str, ...]]] = {
    "list": (_heads_list, ()),
    "show": (_heads_show, ()),
    "import": (_heads_import, ("out", "encoder", "task", "norm", "scale")),
    "prompt": (_heads_prompt, ("out", "encoder", "task", "weights", "wanted", "against")),
}
"""What `tastemaker heads` does, and the options that each takes."""


def _require_free(name: str, out: str | None) -> None:
    """UserError where a head that goes by its name would never be found: one that is built in goes before it."""
    from aesthetic.errors import UserError
    from aesthetic.heads import SHIPPED
    from curate.annotators.nsfw import DETECTORS

    if out is None and (name in DETECTORS or (SHIPPED / name / "head.json").exists()):
        raise UserError(f"{name} is the name of one that is built in: choose another, or a folder with --out")


def _keep(args: argparse.Namespace, head: Head) -> int:
    """Save a new head, and say what it is."""
    from aesthetic.heads import check_replaces, describe, heads_folder, save_head

    folder = Path(args.out or heads_folder() / head.name)
    check_replaces(folder, head)
    save_head(head, folder)
    print(describe(head) + "\n")
    following = f"tastemaker score DATA --head {_column(head.name)}={folder if args.out else head.name}"
    return _end(args, _about(head), {"head": folder}, following)


def _column(head: str) -> str:
    """A name for the scores of a head of this name: what a column of SQL may be called."""
    name = re.sub(r"\W", "_", head, flags=re.ASCII).lower()
    return f"_{name}" if name[0].isdigit() else name


def _about(head: Head) -> dict[str, Any]:
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


def _recipe(args: argparse.Namespace) -> int:
    from pipelines.recipe import load_recipe, recipe_text, shipped, to_dict, to_yaml

    if args.name is None:
        about = {name: recipe_text(name).splitlines()[0].lstrip("# ") for name in shipped()}
        for name, line in about.items():
            print(f"{name:20} {line}")
        return _end(args, {"recipes": about}, {}, "")
    recipe = load_recipe(args.name, args.set)
    print(to_yaml(recipe), end="")
    return _end(args, to_dict(recipe), {}, "")


def _doctor(args: argparse.Namespace) -> int:
    from pipelines.commands.doctor import examine

    findings: list[str] = []

    def say(line: str) -> None:
        findings.append(line)
        print(line)

    good = examine(say)
    _end(args, {"ready": good, "findings": findings}, {}, "")
    return 0 if good else 1


if __name__ == "__main__":
    script()
