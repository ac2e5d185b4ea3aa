"""`tastemaker fit`: ratings, labels or comparisons joined to images -> a head, its report and its figures."""

from __future__ import annotations

import contextlib
import csv
import re
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aesthetic.errors import UserError
from aesthetic.untrusted import printable
from curate.encoders.registry import check_available, check_named
from curate.store.files import digest, read_json, sha256_file, write_json
from curate.store.mirror import in_urls, store_at
from curate.store.objects import is_url
from pipelines.commands.heads import column_for, head_out
from pipelines.options import REQUIRED, Options, Result, argument, command, input_file, option, positive_int
from pipelines.runtime.progress import format_duration, format_rate
from pipelines.terminal import CLEAR, RETURN
from train.places import push

if TYPE_CHECKING:
    from aesthetic.ratings import Kind
    from aesthetic.reports import FitResult
    from curate.encoders.base import Encoder
    from curate.sources.image_vectors import ImageVectors
    from curate.sources.rated import RatedImages

WANTED, AGAINST = "a beautiful photograph", "an ugly photograph"
"""The prompts of the zero-shot baseline for ratings of beauty (after CLIP-IQA, Wang, Chan and Loy 2023)."""

SHOWN = 10  # of the best, worst and most wrong

WRITTEN = (
    *("head.json", "head.safetensors", "MODEL_CARD.md", "report.json", "held_out.csv", "unjoined.csv", "scatter.png"),
    *("learning_curve.png", "calibration.png", "extremes.png", "suggest.csv", "suggest.png"),
)
"""The files of a head's folder."""

_UNSAFE = re.compile("nsfw|unsafe|porn|hentai|nud|explicit|sexual", re.IGNORECASE)  # what a label may say of images


@dataclass(frozen=True, kw_only=True)
class FitOptions(Options):
    ratings: tuple[Path, ...] = argument(
        "RATINGS",
        "csv, tsv, parquet or AVA.txt: an image (key, path, url or sha256) and its score, label or votes; "
        "or winner and loser. Several files are several sources, each on its own scale",
        nargs="+",
        type=input_file,
    )
    out: Path = option("the head's folder", default=REQUIRED, metavar="HEAD", type=head_out)
    data: str | None = option("the data folder that holds the images and their vectors", metavar="DATA")
    images: Path | None = option("or a folder of images, embedded with --encoder", metavar="FOLDER", type=input_file)
    embeddings: Path | None = option(
        "or vectors as clip-retrieval stores them, made with --encoder", metavar="FOLDER", type=input_file
    )
    encoder: str | None = option("bundled (default for --images) or open_clip:ARCH/PRETRAINED", metavar="E")
    key: str | None = option("the column that names the image (default: a usual name)", metavar="COLUMN")
    score: str | None = option("the column of the score or label (default: a usual name)", metavar="COLUMN")
    group: str | None = option(
        "images of one group never straddle training and test (photographer, prompt, theme)", metavar="COLUMN"
    )
    positive: str | None = option("the label that counts as 1, where labels are words", metavar="VALUE")
    scale: tuple[float, float] | None = option(
        "the rating scale (default: the range of the scores)", metavar=("LO", "HI")
    )
    task: str | None = option("what the score is about: aesthetic (default), nsfw, ...", metavar="WORD")
    prevalence: float | None = option("positives where a classifier will be used (default 0.01)", metavar="SHARE")
    network: bool = option("try a small network too; taken only if it beats ridge", default=False)
    suggest: int = option("name N images to rate next", default=0, metavar="N", type=positive_int)
    address: str | None = option("sum over the rows on this Ray cluster", flag="--ray-address", metavar="ADDRESS")


def run(options: FitOptions) -> Result:
    """Fit a head and write it, its report and its images under `options.out`; what is going on goes to stderr.

    Raises UserError where the options make no sense, ask what the ratings are not for, `options.out` holds another
    head, or nothing joins; HeadError where the ratings make no sense or are too few. Nothing is written then.
    """
    from aesthetic.head_files import save_head
    from aesthetic.ratings import read_ratings
    from curate.sources.rated import join_ratings

    _check(options)
    ratings = read_ratings(
        *options.ratings, image=options.key, score=options.score, group=options.group, positive=options.positive
    )
    _check_kind(options, ratings.kind)
    _check_out(options)
    name, out = options.out.stem, options.out
    rated = join_ratings(ratings, _images(options), name, need_pool=options.suggest > 0, log=_log)
    fitted = _fit(options, rated)
    fitted.report["asked"] = _digest(options)
    if rated.restated:
        fitted.report["left_aside"] = rated.restated

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", fitted.report)  # first: by it the same command, killed here, knows its own head
    store_at(out).push([out / "report.json"])
    save_head(fitted.head, out)
    paths = {"head": out}
    if ratings.kind != "pairs":
        paths |= _write_figures(options, rated, fitted)
    store_at(out).remove([out / "unjoined.csv"])  # of another fit
    if not rated.joined.all():
        rated.unjoined().to_csv(out / "unjoined.csv", index=False)
    if options.suggest:
        paths |= _write_suggestions(options, rated, fitted)
    push(out)
    return Result(
        text=_text(options, rated, fitted),
        facts=fitted.report,
        paths=dict(paths),
        next=command("annotate", options.data or "DATA", f"{column_for(name)}={out}"),
    )


def _log(line: str) -> None:
    print(line, file=sys.stderr)


def _check(options: FitOptions) -> None:
    """Raise UserError (HeadError for a scale) for what is wrong with the options themselves: before a file is read."""
    from aesthetic.heads import HeadError, check_name, check_scale
    from curate.sources.rated import PREDICTED

    if sum(place is not None for place in (options.data, options.images, options.embeddings)) != 1:
        raise UserError(
            "fit needs images, from one place: --data DATA (their vectors are there), --embeddings FOLDER (vectors as "
            "clip-retrieval stores them), or --images FOLDER"
        )
    if options.data is not None and options.encoder is not None:
        raise UserError(f"--encoder: {options.data} says itself which encoder made its vectors; leave the option out")
    try:
        check_name(options.out.stem)
    except HeadError as e:
        raise UserError(f"--out {options.out}: a head has the name of its folder, and {e}") from None
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is a file; a head is a folder: give another name")
    present = {p.name for p in options.out.iterdir()} if options.out.is_dir() else set()
    # what begins with a dot is what a killed run left
    if others := sorted(n for n in present - set(WRITTEN) if not n.startswith(".")):
        raise UserError(
            f"--out {options.out} holds something else ({printable(others[0], 80)}): give a folder of its own"
        )
    if options.encoder is not None:
        check_named(options.encoder)
    if options.images is not None:
        check_available(options.encoder or "bundled")
    if options.scale is not None:
        check_scale("--scale", options.scale)
    if options.prevalence is not None and not 0 < options.prevalence < 1:
        raise UserError(f"--prevalence {options.prevalence:g}: it is a share between 0 and 1, such as 0.01")
    if options.suggest and options.network:
        raise UserError("--suggest asks what would teach a straight line most, and --network may fit another: not both")
    suggested = options.out / "suggest.csv"
    if options.suggest and suggested.is_file():
        with open(suggested, newline="", encoding="utf-8-sig", errors="replace") as f:
            try:
                rows = list(csv.DictReader(f))
                names = {options.key or "image", PREDICTED}
                filled_in = any(str(v or "").strip() for row in rows for name, v in row.items() if name not in names)
            except csv.Error:  # somebody's, at any rate
                filled_in = True
        if filled_in:
            raise UserError(f"{suggested} has scores filled in, and --suggest would write over it: move it elsewhere")


def _digest(options: FitOptions) -> str:
    """A digest of what a head depends on, but for what is in the ratings: more of them are to make it anew."""
    places = [options.data, options.images, options.embeddings, *options.ratings]
    same = ("encoder", "key", "score", "group", "positive", "scale", "task", "prevalence", "network")
    return digest({"places": [p and _place(p) for p in places], **{k: getattr(options, k) for k in same}})


def _place(path: Path | str) -> str:
    return str(path) if is_url(str(path)) else in_urls(str(Path(path).absolute()))


def _check_out(options: FitOptions) -> None:
    """Raise UserError where a head of another command is there, or no file can be written."""
    out = options.out
    if (out / "head.json").exists():
        report = read_json(out / "report.json")
        if not isinstance(report, dict) or report.get("asked") != _digest(options):
            raise UserError(
                f"--out {out} holds a head already, and not of this command: give another name, or remove that folder"
            )
        _log(f"{out} holds a head of this command, which the new one will replace")
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as e:
        raise UserError(f"--out {out} cannot be written: {e.strerror or e}") from e
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _check_kind(options: FitOptions, kind: Kind) -> None:
    """Raise UserError for an option that these ratings have no use for."""
    hold = {"scores": "scores", "labels": "labels (each 0 or 1)", "pairs": "comparisons (a winner and a loser)"}
    for flag, given, kinds in (
        ("--scale", options.scale is not None, ("scores",)),
        ("--network", options.network, ("scores",)),
        ("--ray-address", options.address is not None, ("scores",)),
        ("--prevalence", options.prevalence is not None, ("labels",)),
        ("--suggest", options.suggest > 0, ("scores", "labels")),
    ):
        if given and kind not in kinds:
            raise UserError(
                f"{flag} is for {' and '.join(kinds)}, and {', '.join(p.name for p in options.ratings)} "
                f"{'hold' if len(options.ratings) > 1 else 'holds'} {hold[kind]}: leave the option out"
            )


def _images(options: FitOptions) -> ImageVectors:
    """Where the images and their vectors are."""
    from curate.sources.image_vectors import ClipFolderVectors, DataFolderVectors, FolderVectors

    if options.data is not None:
        data = options.data

        def text_encoder() -> Encoder:
            from curate.encoders.registry import load_encoder
            from curate.store.ownership import open_data
            from pipelines.recipe import recipe_of

            embed = recipe_of(open_data(data), None, ()).embed
            return load_encoder(embed.encoder, embed.weights)

        return DataFolderVectors(data, text_encoder)
    if options.embeddings is not None:
        return ClipFolderVectors(options.embeddings, options.encoder)

    def show_progress(done: int, total: int, seconds: float) -> None:
        if sys.stderr.isatty():
            rate = done / seconds
            left = format_duration((total - done) / rate)
            line = f"embed  {done:,}/{total:,}  {format_rate(rate, 'img')}  eta {left} "
            print(RETURN + (line if done < total else CLEAR), end="", file=sys.stderr)

    return FolderVectors(options.images or Path(), options.encoder or "bundled", _log, show_progress)


def _fit(options: FitOptions, rated: RatedImages) -> FitResult:
    from aesthetic.chunks import thread_map
    from curate.sources.rated import fit_rated
    from pipelines.runtime.cluster import ray_map

    ratings = rated.ratings
    files = [{"file": p.name, "sha256": sha256_file(p)} for p in options.ratings]
    card = {"ratings": {"rows": len(ratings.table), "joined": int(rated.joined.sum()), "files": files}}
    common: dict[str, Any] = {"card": card, "log": _log} | ({"task": options.task} if options.task else {})

    def prompts() -> np.ndarray | None:
        """The zero-shot baseline's direction."""
        try:
            wanted, against = rated.images.encode_texts([WANTED, AGAINST])
        except UserError as e:
            _log(f"no zero-shot baseline: {str(e).splitlines()[0]}")
            return None
        return np.asarray(wanted - against, np.float64)

    return fit_rated(
        rated,
        options.out.stem,
        scale=options.scale,
        prevalence=options.prevalence,
        positive=f"{options.positive!r}" if options.positive else "positives",
        network=options.network,
        map=thread_map if options.address is None else partial(ray_map, options.address),
        prompts=prompts,
        **common,
    )


# What is written beside the head -------------------------------------------------------------------------------------


def _write_figures(options: FitOptions, rated: RatedImages, fitted: FitResult) -> dict[str, Path]:
    """held_out.csv, the plots, and a sheet of the best, worst and most wrong images."""
    from aesthetic import plots
    from curate.sheets import Tile, sheet

    out, report = options.out, fitted.report
    rated.table.assign(rated=fitted.rated, predicted=fitted.held_out).to_csv(out / "held_out.csv", index=False)
    seen = np.isfinite(fitted.held_out)
    predicted, scores = fitted.held_out[seen], fitted.rated[seen]
    labels = rated.ratings.kind == "labels"
    metric = report["metrics"]["auroc" if labels else "spearman"]
    title = f"{fitted.head.name}: {'AUROC' if labels else 'Spearman'} {_interval(metric)}"
    if not labels:
        plots.scatter(out / "scatter.png", predicted, scores, fitted.head.scale, title=title)
        ceiling = report["noise"]["ceiling"] if report["noise"] else None
        if len(report["learning_curve"]) > 1:
            plots.learning_curve(out / "learning_curve.png", report["learning_curve"], ceiling, title=title)
    plots.reliability(out / "calibration.png", report["calibration"], title=title, probability=labels)

    best, worst, words = "rated best by the head", "rated worst by the head", [f"people {v:.2f}" for v in scores]
    if labels:
        positive = printable(options.positive or "positive", 20)
        best, worst = f"surest of {positive}", f"surest of not {positive}"
        words = [f"labelled {positive if v else f'not {positive}'}" for v in scores]
    by_head = np.argsort(-predicted, kind="stable")
    most_wrong = np.argsort(-np.abs(predicted - scores), kind="stable")
    chosen = {best: by_head[:SHOWN], worst: by_head[::-1][:SHOWN], "most wrong": most_wrong[:SHOWN]}
    images = rated.indices[rated.image_of()][seen]
    loaded = rated.images.thumbnails(sorted({int(images[i]) for rows in chosen.values() for i in rows}))
    if not any(loaded.values()):  # vectors without their images
        return {"look": out / "calibration.png"}
    unsafe = _unsafe(options, fitted)  # all are blurred then: what is wrong may be either way
    sections = [
        (title, [Tile(loaded[int(images[i])], f"{predicted[i]:.2f}, {words[i]}", unsafe) for i in rows])
        for title, rows in chosen.items()
    ]
    sheet(out / "extremes.png", title, sections)
    return {"look": out / "extremes.png"}


def _write_suggestions(options: FitOptions, rated: RatedImages, fitted: FitResult) -> dict[str, Path]:
    """Those of the images not rated that would teach the head most: a csv to fill in, and a sheet."""
    import pandas as pd

    from aesthetic.suggest import suggest
    from curate.sheets import Tile, sheet
    from curate.sources.rated import PREDICTED

    assert fitted.penalty is not None  # see _check and _check_kind
    images, out = rated.images, options.out
    left = images.count - len(rated.indices)
    drawn = f", drawn at random from {left:,}" if left > len(rated.pool) else ""
    _log(f"choosing {options.suggest} of {len(rated.pool):,} images not rated{drawn}")
    candidates, present = images.vectors(rated.pool)
    finite = np.isfinite(candidates).all(1)
    pool, candidates = rated.pool[present][finite], candidates[finite]
    weights, relevance = np.ones(len(rated.vectors)), None
    if fitted.head.link == "sigmoid":  # a label of an image at p says p (1 - p) of what a rating would
        each = (fitted.head(vectors) for vectors in (rated.vectors, candidates))
        weights, relevance = (np.maximum(p.astype(np.float64) * (1 - p), 1e-6) for p in each)
    chosen = pool[suggest(rated.vectors, weights, candidates, fitted.penalty, options.suggest, relevance=relevance)]
    if not len(chosen):
        _log(f"nothing to suggest: what is not rated is a copy of what is, or {images.missing}")
        return {}
    facts, scores = images.facts(chosen), fitted.head(images.vectors(chosen)[0])
    keys, by = facts["key"], rated.ratings.by
    # called as in the files of ratings, so that the same options read it beside them
    listed = {options.key or "image": facts[by] if options.key and by in facts else keys}
    listed |= {options.score or ("label" if rated.ratings.kind == "labels" else "score"): ""}
    listed |= {options.group: ""} if options.group else {}
    pd.DataFrame(listed | {PREDICTED: np.round(scores, 3)}).to_csv(out / "suggest.csv", index=False)
    loaded, unsafe = images.thumbnails(chosen.tolist()), _unsafe(options, fitted)
    captions = [f"{score:.2f}\n{key}" for score, key in zip(scores, keys, strict=True)]
    tiles = [Tile(loaded[int(i)], caption, unsafe) for i, caption in zip(chosen, captions, strict=True)]
    sheet(out / "suggest.png", "rate these next", [("most is learnt from these", tiles)])
    return {"rate next": out / "suggest.csv", "look at them": out / "suggest.png"}


def _unsafe(options: FitOptions, fitted: FitResult) -> bool:
    """Whether the images may be unsafe to look at: what they are rated or labelled for says so."""
    return bool(_UNSAFE.search(f"{fitted.head.task} {options.positive or ''}"))


# What the terminal shows ---------------------------------------------------------------------------------------------


def _interval(estimate: dict[str, Any], digits: int = 2) -> str:
    value, low, high = (v if v is None else f"{v:.{digits}f}" for v in (estimate[k] for k in ("value", "low", "high")))
    if value is None:
        return "unknown"
    return value if low is None else f"{value} [{low}, {high}]"


def _text(options: FitOptions, rated: RatedImages, fitted: FitResult) -> str:
    """Five lines or more: what was used, and what not; how good; against what; worth how many raters; a verdict."""
    from aesthetic.fit import to_halve

    r, ratings, joined = fitted.report, rated.ratings, rated.joined
    total, used = len(joined), int(joined.sum())
    missing = f" ({total - used:,} listed in {options.out / 'unjoined.csv'})" if used < total else ""
    what = {"scores": "ratings", "labels": "labels", "pairs": "comparisons"}[ratings.kind]
    groups = f"{r['groups']:,} groups" + ("" if r["groups_given"] else ", each image its own")
    copies = f", {r['near_duplicates_joined']:,} near-duplicates kept together" if r["near_duplicates_joined"] else ""
    copies += f" ({r['near_duplicates_recall']:.1%} of them found)" if "near_duplicates_recall" in r else ""
    lines = [f"{total:,} {what}, {used:,} joined{missing} · {groups}{copies}"]
    if ratings.unrated:
        lines.append(f"left out: {ratings.unrated:,} without a {'choice' if ratings.kind == 'pairs' else 'score'}")
    if rated.restated:
        names = ", ".join(printable(name, 60) for name in rated.restated)
        lines.append(f"left aside, as it tells the score again: {names}")

    m, positive = r["metrics"], printable(repr(options.positive), 40) if options.positive else "positives"
    if ratings.kind == "pairs":
        metric = "accuracy"
        lines.append(f"picks the preferred image in {_interval(m[metric])} of {r['tested']:,} comparisons not seen")
    elif ratings.kind == "labels":
        metric, recall = "auroc", _interval(m["recall_at_1%_clean_loss"])
        nsfw = fitted.head.task == "nsfw"
        lost = "1% of clean images are lost" if nsfw else "1% of the other images are taken in"
        lines.append(
            f"AUROC {_interval(m[metric])} on images it had not seen · finds {recall} of the {positive} where {lost}"
        )
    else:
        metric = "spearman"
        lines.append(f"Spearman {_interval(m[metric])} on images it had not seen")
    known = {"nearest": "10 nearest", "prompts": "zero-shot", "metadata": "metadata only", "constant": "a coin"}
    values = {known.get(k, k): v[metric]["value"] for k, v in r["baselines"].items() if metric in v}
    parts = [f"{name} none" if value is None else f"{name} {value:.2f}" for name, value in values.items()]
    if ratings.kind == "scores":
        guess = r["baselines"]["constant"]["rmse"]["value"]
        parts.append(f"RMSE {m['rmse']['value']:.2f}, {guess:.2f} for guessing the mean")
    lines.append(f"baselines: {' · '.join(parts)}")

    if ratings.kind == "scores":
        lines.append(_worth(r["noise"]))
    elif ratings.kind == "labels":
        missed = m["missed_per_million_at_1%_clean_loss"]
        lines.append(f"where {r['prevalence']:.1%} are {positive}, misses {_interval(missed, 0)} per million images")
    more = to_halve(r)
    lines.append(r["verdict"] + (f"; about {more:,} more {what} would halve the interval" if more else ""))
    return "\n".join(lines)


def _worth(noise: dict[str, Any] | None) -> str:
    if noise is None:
        return "worth how many raters: unknown, without the number (n) and spread (sd) of the ratings of each image"
    raters, worth = noise["worth_raters"], "more raters than were asked"
    if raters is not None:
        worth = f"{raters:.{1 if raters < 10 else 0}f} raters"
    return f"worth {worth} · no head can correlate more than {noise['ceiling']:.2f} with these ratings"
