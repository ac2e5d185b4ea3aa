"""`tastemaker fit`: ratings, labels or comparisons joined to images -> a head, its report and its pictures."""

from __future__ import annotations

import contextlib
import csv
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aesthetic.errors import UserError
from aesthetic.untrusted import printable
from curate.encoders.registry import check_available, check_named
from curate.store.files import digest, read_json, sha256_file, write_json
from pipelines.commands.heads import column_for
from pipelines.options import REQUIRED, Options, Result, argument, option, positive_int
from pipelines.pool import DataPool, FolderPool, Pool, VectorsPool

if TYPE_CHECKING:
    import pandas as pd

    from aesthetic.chunks import Map
    from aesthetic.ratings import Kind, Ratings
    from aesthetic.reports import FitResult

WANTED, AGAINST = "a beautiful photograph", "an ugly photograph"
"""The prompts of the zero-shot baseline for ratings of beauty (after CLIP-IQA, Wang, Chan and Loy 2023)."""

SHOWN = 10  # of the best, worst and most wrong

WRITTEN = (
    *("head.json", "head.safetensors", "MODEL_CARD.md", "report.json", "held_out.csv", "unjoined.csv", "scatter.png"),
    *("learning_curve.png", "calibration.png", "extremes.png", "suggest.csv", "suggest.png"),
)
"""The files of a head's folder."""

_UNSAFE = re.compile("nsfw|unsafe|porn|hentai|nud|explicit|sexual", re.IGNORECASE)  # what a label may say of images
PREDICTED = "predicted"  # the column of suggest.csv that an earlier head wrote
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class FitOptions(Options):
    ratings: tuple[Path, ...] = argument(
        "RATINGS",
        "csv, tsv, parquet or AVA.txt: an image (key, path, url or sha256) and its score, label or votes; "
        "or winner and loser. Several files are several sources, each on its own scale",
        nargs="+",
    )
    out: Path = option("the head's folder", default=REQUIRED, metavar="HEAD")
    data: str | None = option("the data folder that holds the images and their vectors", metavar="DATA")
    images: Path | None = option("or a folder of images, embedded with --encoder", metavar="FOLDER")
    embeddings: Path | None = option("or vectors as clip-retrieval stores them, made with --encoder", metavar="FOLDER")
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
    """Fit a head; what is going on goes to stderr."""
    return fit(options, partial(print, file=sys.stderr))


def fit(request: FitOptions, say: Say = lambda line: None) -> Result:
    """Fit a head and write it, its report and its pictures under `request.out`.

    Raises UserError where the request makes no sense, asks what the ratings are not for, `request.out` holds another
    head, or nothing joins; HeadError where the ratings make no sense or are too few. Nothing is written then.
    """
    from aesthetic.head_files import save_head
    from aesthetic.ratings import read_ratings

    _check(request)
    ratings = read_ratings(
        *request.ratings,
        image=request.key,
        score=request.score,
        group=request.group,
        positive=request.positive,
    )
    _check_kind(request, ratings.kind)
    _check_out(request, say)
    pool = _pool(request, say)
    columns = ["winner", "loser"] if ratings.kind == "pairs" else ["image"]
    candidates = pool.candidates(ratings.by)
    rows, reasons = {}, {}
    for column in columns:
        rows[column], reasons[column] = _join(ratings, column, candidates)
    wanted = np.unique(np.concatenate([r[r >= 0] for r in rows.values()]))
    if not len(wanted):
        first = ratings.table[columns[0]].iloc[0]
        raise UserError(f"none of the {len(ratings.table):,} images rated is in {pool.root}; the first is {first!r}")
    _check_enough(request, ratings, rows, candidates)
    others = np.setdiff1d(np.arange(pool.count), wanted)
    if request.suggest and not len(others):
        raise UserError(f"--suggest: every image of {pool.root} is rated already")
    vectors, there = pool.vectors(wanted)
    if not (finite := np.isfinite(vectors).all(1)).all():
        say(f"{int((~finite).sum()):,} of {len(finite):,} vectors hold NaN or infinity, and are left out")
        there[there], vectors = finite, vectors[finite]
    place = np.full(len(candidates), -1)
    place[wanted[there]] = np.arange(int(there.sum()))
    for column in columns:
        found = rows[column] >= 0
        gone = found & (place[rows[column]] < 0)
        reasons[column] = [pool.absent if g else why for g, why in zip(gone, reasons[column], strict=True)]
        rows[column] = np.where(found & ~gone, place[rows[column]], -1)
    joined = np.logical_and.reduce([rows[c] >= 0 for c in columns])
    if not joined.any():
        raise UserError(f"none of the images rated in {pool.root} has a vector: {pool.absent}")
    facts = pool.facts(wanted[there])
    fitted = _fitted(request, ratings, joined, rows, vectors, facts, pool, say)
    fitted.report["asked"] = _asked(request)
    if aside := _aside(ratings):
        fitted.report["left_aside"] = aside

    out = request.out
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", fitted.report)  # first: by it the same command, killed here, knows its own head
    save_head(fitted.head, out)
    paths = {"head": out} | _pictures(request, ratings, fitted, pool, wanted[there], rows, joined)
    (out / "unjoined.csv").unlink(missing_ok=True)  # of another fit
    if not joined.all():
        left = ratings.table[~joined].copy()
        left["why"] = [
            " and ".join(sorted({reasons[c][i] for c in columns if reasons[c][i]})) for i in np.flatnonzero(~joined)
        ]
        left.to_csv(out / "unjoined.csv", index=False)
    if request.suggest:
        paths |= _suggest(request, fitted, pool, others, vectors, say)
    return Result(
        text=_text(request, ratings, fitted, joined),
        facts=fitted.report,
        paths=dict(paths),
        next=f"tastemaker annotate {request.data or 'DATA'} {column_for(out.stem)}={out}",
    )


def _check(request: FitOptions) -> None:
    """Raise UserError (HeadError for a scale) for what is wrong with the request itself: before a file is read."""
    from aesthetic.heads import HeadError, check_name, check_scale

    if sum(place is not None for place in (request.data, request.images, request.embeddings)) != 1:
        raise UserError(
            "fit needs images, from one place: --data DATA (their vectors are there), --embeddings FOLDER (vectors as "
            "clip-retrieval stores them), or --images FOLDER"
        )
    if request.data is not None and request.encoder is not None:
        raise UserError(f"--encoder: {request.data} says itself which encoder made its vectors; leave the option out")
    try:
        check_name(request.out.stem)
    except HeadError as e:
        raise UserError(f"--out {request.out}: a head has the name of its folder, and {e}") from None
    if request.out.exists() and not request.out.is_dir():
        raise UserError(f"--out {request.out} is a file; a head is a folder: give another name")
    if others := sorted(_names(request.out) - set(WRITTEN)):
        raise UserError(
            f"--out {request.out} holds something else ({printable(others[0], 80)}): give a folder of its own"
        )
    if request.encoder is not None:
        check_named(request.encoder)
    if request.images is not None:
        check_available(request.encoder or "bundled")
    if request.scale is not None:
        check_scale("--scale", request.scale)
    if request.prevalence is not None and not 0 < request.prevalence < 1:
        raise UserError(f"--prevalence {request.prevalence:g}: it is a share between 0 and 1, such as 0.01")
    if request.suggest and request.network:
        raise UserError("--suggest asks what would teach a straight line most, and --network may fit another: not both")
    if request.suggest and _filled_in(request.out / "suggest.csv"):
        raise UserError(
            f"{request.out / 'suggest.csv'} has scores filled in, and --suggest would write over it: move it elsewhere"
        )


def _names(folder: Path) -> set[str]:
    if not folder.is_dir():
        return set()
    return {p.name for p in folder.iterdir() if not p.name.startswith(".")}  # the others: what a killed run left


def _asked(request: FitOptions) -> str:
    """A digest of what a head depends on, but for what is in the ratings: more of them are to make it anew."""
    places = [request.data, request.images, request.embeddings, *request.ratings]
    same = ("encoder", "key", "score", "group", "positive", "scale", "task", "prevalence", "network")
    return digest({"places": [p and str(Path(p).absolute()) for p in places], **{k: getattr(request, k) for k in same}})


def _check_out(request: FitOptions, say: Say) -> None:
    """Raise UserError where a head of another command is there, or no file can be written."""
    out = request.out
    if (out / "head.json").exists():
        report = read_json(out / "report.json")
        if not isinstance(report, dict) or report.get("asked") != _asked(request):
            raise UserError(
                f"--out {out} holds a head already, and not of this command: give another name, or remove that folder"
            )
        say(f"{out} holds a head of this command, which the new one will replace")
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


def _check_enough(request: FitOptions, ratings: Ratings, rows: dict[str, np.ndarray], candidates: pd.DataFrame) -> None:
    """Raise HeadError where what is joined is too little to fit to: before an image is embedded."""
    from aesthetic.classify import check_labels
    from aesthetic.compare import check_comparisons
    from aesthetic.examples import check_scores

    joined = np.logical_and.reduce([r >= 0 for r in rows.values()])
    table, name = ratings.table[joined], request.out.stem
    if ratings.kind == "pairs":
        images, places = np.unique([rows["winner"][joined], rows["loser"][joined]], return_inverse=True)
        win, lose = places.reshape(2, -1)
        named = candidates["key" if "key" in candidates else candidates.columns[0]]
        ids = [str(v) for v in named.iloc[images]]
        groups = _groups_of_pairs(table, {"winner": win, "loser": lose}, np.ones(len(win), bool), len(images))
        check_comparisons(win, lose, ids, groups, name)
    else:
        scores = table["score"].to_numpy(np.float64)
        check_scores(scores, name)
        if ratings.kind == "labels":
            check_labels(scores, name)


def _filled_in(suggested: Path) -> bool:
    if not suggested.is_file():
        return False
    with open(suggested, newline="", encoding="utf-8-sig", errors="replace") as f:
        try:
            return any((row.get("score") or "").strip() for row in csv.DictReader(f))
        except csv.Error:  # somebody's, at any rate
            return True


_HOLD = {"scores": "scores", "labels": "labels (each 0 or 1)", "pairs": "comparisons (a winner and a loser)"}


def _check_kind(request: FitOptions, kind: Kind) -> None:
    """Raise UserError for an option that these ratings have no use for."""
    for flag, given, kinds in (
        ("--scale", request.scale is not None, ("scores",)),
        ("--network", request.network, ("scores",)),
        ("--ray-address", request.address is not None, ("scores",)),
        ("--prevalence", request.prevalence is not None, ("labels",)),
        ("--suggest", request.suggest > 0, ("scores", "labels")),
    ):
        if given and kind not in kinds:
            raise UserError(
                f"{flag} is for {' and '.join(kinds)}, and {', '.join(p.name for p in request.ratings)} "
                f"{'hold' if len(request.ratings) > 1 else 'holds'} {_HOLD[kind]}: leave the option out"
            )


def _pool(request: FitOptions, say: Say) -> Pool:
    if request.data is not None:
        return DataPool(request.data)
    if request.embeddings is not None:
        return VectorsPool(request.embeddings, request.encoder)
    return FolderPool(request.images or Path(), request.encoder or "bundled", say)


def _join(ratings: Ratings, column: str, candidates: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    """The image of each row, -1 and why where there is none; each source by the way in which it names images."""
    from aesthetic.ratings import join

    table = ratings.table
    rows, reasons = np.full(len(table), -1), np.full(len(table), "", object)
    sources = table["source"].fillna("").to_numpy() if "source" in table else np.full(len(table), "")
    for source in np.unique(sources):
        of = np.flatnonzero(sources == source)
        rows[of], reasons[of] = join(table[column].iloc[of].to_list(), ratings.by, candidates)
    return rows, reasons.tolist()


def _fitted(
    request: FitOptions,
    ratings: Ratings,
    joined: np.ndarray,
    rows: dict[str, np.ndarray],
    vectors: np.ndarray,
    facts: pd.DataFrame,
    pool: Pool,
    say: Say,
) -> FitResult:
    from aesthetic.classify import PREVALENCE, fit_classifier
    from aesthetic.compare import fit_comparisons
    from aesthetic.examples import Examples
    from aesthetic.fit import fit_head

    table = ratings.table[joined]
    files = [{"file": p.name, "sha256": sha256_file(p)} for p in request.ratings]
    common: dict[str, Any] = {
        "name": request.out.stem,
        "card": {"ratings": {"rows": len(ratings.table), "joined": int(joined.sum()), "files": files}},
        "log": say,
    }
    if request.task:
        common["task"] = request.task
    if ratings.kind == "pairs":
        return fit_comparisons(
            vectors,
            rows["winner"][joined],
            rows["loser"][joined],
            pool.space,
            ids=facts["key"].to_list(),
            groups=_groups_of_pairs(table, rows, joined, len(facts)),
            votes=_column(table, "n"),
            sha256=_known(facts, "sha256"),
            phash=_known(facts, "phash"),
            prompts=_prompts(pool, say),
            **common,
        )
    of = facts.iloc[rows["image"][joined]]
    ours = {"image", "score", "n", "sd", "group", "source", *ratings.aside, PREDICTED}
    metadata = {str(c): table[c].to_list() for c in table.columns if c not in ours}
    metadata |= {c: of[c].to_list() for c in ("width", "height", "domain") if c in of}
    examples = Examples(
        vectors=vectors[rows["image"][joined]],
        scores=table["score"].to_numpy(np.float64),
        ids=of["key"].to_list(),
        groups=table["group"].to_list() if "group" in table else None,
        votes=_column(table, "n"),
        sd=_column(table, "sd"),
        sources=table["source"].to_list() if "source" in table else None,
        metadata=metadata,
        sha256=_known(of, "sha256"),
        phash=_known(of, "phash"),
    )
    if ratings.kind == "labels":
        prevalence = PREVALENCE if request.prevalence is None else request.prevalence
        positive = f"{request.positive!r}" if request.positive else "positives"
        return fit_classifier(examples, pool.space, prevalence=prevalence, positive=positive, **common)
    return fit_head(
        examples,
        pool.space,
        scale=request.scale or ratings.scale or _range(table),
        network=request.network,
        prompts=_prompts(pool, say),
        map=_map(request.address),
        **common,
    )


def _aside(ratings: Ratings) -> list[str]:
    return [name for name in ratings.aside if name != PREDICTED]


def _range(table: pd.DataFrame) -> tuple[float, float]:
    """The range of the scores; of several sources that of the one to whose scale they are brought."""
    from aesthetic.sources import reference_of

    if "source" in table:
        table = table[table["source"] == reference_of(table["source"].to_list())]
    return float(table["score"].min()), float(table["score"].max())


def _column(table: pd.DataFrame, name: str) -> np.ndarray | None:
    """A column of numbers; where only some votes are known, the others count as the middle one of these."""
    if name not in table or not table[name].notna().any():
        return None
    values = table[name].to_numpy(np.float64)
    return np.where(np.isfinite(values), values, np.nanmedian(values)) if name == "n" else values


def _known(facts: pd.DataFrame, name: str) -> list[str | None] | None:
    if name not in facts:
        return None
    form = re.compile("[0-9a-fA-F]{16}" if name == "phash" else ".+", re.DOTALL)  # of vectors' metadata, by others
    return [v if isinstance(v, str) and form.fullmatch(v) else None for v in facts[name]]


def _groups_of_pairs(
    table: pd.DataFrame, rows: dict[str, np.ndarray], joined: np.ndarray, images: int
) -> list[str | None] | None:
    """A group for each image, from the groups of the comparisons that it is in, if they have any: the first by name."""
    if "group" not in table:
        return None
    of: dict[int, str] = {}
    for column in ("winner", "loser"):
        for image, group in zip(rows[column][joined], table["group"], strict=True):
            if isinstance(group, str):
                of[int(image)] = min(of.get(int(image), group), group)
    return [of.get(i) for i in range(images)]


def _prompts(pool: Pool, say: Say) -> np.ndarray | None:
    """The zero-shot baseline's direction; None, and a line that says why, where there is no text encoder to ask."""
    try:
        wanted, against = pool.encode_texts([WANTED, AGAINST])
    except UserError as e:
        say(f"no zero-shot baseline: {str(e).splitlines()[0]}")
        return None
    return np.asarray(wanted - against, np.float64)


def _map(address: str | None) -> Map:
    """Where sums over rows are made: in threads here, or as Ray tasks."""
    from aesthetic.chunks import thread_map

    if address is None:
        return thread_map
    from pipelines.runtime.cluster import ray_map

    return partial(ray_map, address)


# What is written beside the head -------------------------------------------------------------------------------------


def _pictures(
    request: FitOptions,
    ratings: Ratings,
    fitted: FitResult,
    pool: Pool,
    wanted: np.ndarray,
    rows: dict[str, np.ndarray],
    joined: np.ndarray,
) -> dict[str, Path]:
    from aesthetic import plots
    from curate.report import Shown, sheet

    out, report = request.out, fitted.report
    if ratings.kind == "pairs":
        return {}
    seen = np.isfinite(fitted.held_out)
    predicted, rated = fitted.held_out[seen], fitted.rated[seen]
    table = ratings.table[joined]
    listed = table.assign(rated=fitted.rated, predicted=fitted.held_out)
    listed.to_csv(out / "held_out.csv", index=False)
    labels = ratings.kind == "labels"
    metric = report["metrics"]["auroc" if labels else "spearman"]
    title = f"{fitted.head.name}: {'AUROC' if labels else 'Spearman'} {_interval(metric)}"
    if not labels:
        plots.scatter(out / "scatter.png", predicted, rated, fitted.head.scale, title=title)
        ceiling = report["noise"]["ceiling"] if report["noise"] else None
        if len(report["learning_curve"]) > 1:
            plots.learning_curve(out / "learning_curve.png", report["learning_curve"], ceiling, title=title)
    plots.reliability(out / "calibration.png", report["calibration"], title=title, probability=labels)

    images = wanted[rows["image"][joined]][seen]
    by_head, error = np.argsort(-predicted, kind="stable"), np.abs(predicted - rated)
    best, worst, words = "rated best by the head", "rated worst by the head", [f"people {v:.2f}" for v in rated]
    if labels:
        positive = printable(request.positive or "positive", 20)
        best, worst = f"surest of {positive}", f"surest of not {positive}"
        words = [f"labelled {positive if v else f'not {positive}'}" for v in rated]
    chosen = {
        best: by_head[:SHOWN],
        worst: by_head[::-1][:SHOWN],
        "most wrong": np.argsort(-error, kind="stable")[:SHOWN],
    }
    sections = [
        (what, [(images[i], f"{predicted[i]:.2f}, {words[i]}") for i in places]) for what, places in chosen.items()
    ]
    loaded = pool.pictures(sorted({int(i) for _, tiles in sections for i, _ in tiles}))
    if not any(loaded.values()):  # vectors without their pictures
        return {"look": out / "calibration.png"}
    unsafe = _unsafe(request, fitted)  # all are blurred then: what is wrong may be either way
    sheet(
        out / "extremes.png",
        title,
        [(what, [Shown(loaded[int(i)], words, unsafe) for i, words in tiles]) for what, tiles in sections],
    )
    return {"look": out / "extremes.png"}


def _suggest(
    request: FitOptions, fitted: FitResult, pool: Pool, others: np.ndarray, vectors: np.ndarray, say: Say
) -> dict[str, Path]:
    """Those of the `others`, the images not rated, that would teach the head most: a csv to fill in, and a sheet."""
    import pandas as pd

    from aesthetic.suggest import suggest
    from curate.report import Shown, sheet

    assert fitted.penalty is not None  # see _check and _check_kind
    say(f"choosing {request.suggest} of {len(others):,} images not rated")
    candidates, there = pool.vectors(others)
    finite = np.isfinite(candidates).all(1)
    others, candidates = others[there][finite], candidates[finite]
    weights, relevance = np.ones(len(vectors)), None
    if fitted.head.link == "sigmoid":  # a label of an image at p tells p (1 - p) of what a rating would
        weights, relevance = _information(fitted.head(vectors)), _information(fitted.head(candidates))
    chosen = others[suggest(vectors, weights, candidates, fitted.penalty, request.suggest, relevance=relevance)]
    if not len(chosen):
        say(f"nothing to suggest: what is not rated is a copy of what is, or {pool.absent}")
        return {}
    facts = pool.facts(chosen)
    scores = fitted.head(pool.vectors(chosen)[0])
    pd.DataFrame({"image": facts["key"], "score": "", PREDICTED: np.round(scores, 3)}).to_csv(
        request.out / "suggest.csv", index=False
    )
    loaded = pool.pictures(chosen.tolist())
    unsafe = _unsafe(request, fitted)
    tiles = [Shown(loaded[int(i)], f"{scores[n]:.2f}\n{facts['key'].iloc[n]}", unsafe) for n, i in enumerate(chosen)]
    sheet(request.out / "suggest.png", "rate these next", [("most is learnt from these", tiles)])
    return {"rate next": request.out / "suggest.csv", "look at them": request.out / "suggest.png"}


def _unsafe(request: FitOptions, fitted: FitResult) -> bool:
    """Whether the images may be unsafe to look at: what they are rated or labelled for says so."""
    return bool(_UNSAFE.search(f"{fitted.head.task} {request.positive or ''}"))


def _information(p: np.ndarray) -> np.ndarray:
    """Fisher's, of a label about its log-odds."""
    return np.maximum(p.astype(np.float64) * (1 - p), 1e-6)


# What the terminal shows ---------------------------------------------------------------------------------------------


def _interval(estimate: dict[str, Any], digits: int = 2) -> str:
    if estimate["value"] is None:
        return "unknown"
    value = f"{estimate['value']:.{digits}f}"
    return (
        value if estimate["low"] is None else f"{value} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"
    )


def _text(request: FitOptions, ratings: Ratings, fitted: FitResult, joined: np.ndarray) -> str:
    """Five lines or more: what was used, and what not; how good; against what; worth how many raters; a verdict."""
    from aesthetic.fit import to_halve

    r = fitted.report
    total, used = len(joined), int(joined.sum())
    missing = f" ({total - used:,} listed in {request.out / 'unjoined.csv'})" if used < total else ""
    what = {"scores": "ratings", "labels": "labels", "pairs": "comparisons"}[ratings.kind]
    groups = f"{r['groups']:,} groups" + ("" if r["groups_given"] else ", each image its own")
    copies = f", {r['near_duplicates_joined']:,} near-duplicates kept together" if r["near_duplicates_joined"] else ""
    lines = [f"{total:,} {what}, {used:,} joined{missing} · {groups}{copies}"]
    if ratings.unrated:
        lines.append(f"left out: {ratings.unrated:,} without a {'choice' if ratings.kind == 'pairs' else 'score'}")
    if aside := _aside(ratings):
        lines.append(f"left aside, as it tells the score again: {', '.join(printable(name, 60) for name in aside)}")
    m, baselines = r["metrics"], r["baselines"]
    if ratings.kind == "pairs":
        lines.append(f"picks the preferred image in {_interval(m['accuracy'])} of {r['tested']:,} comparisons not seen")
        named = {k: v["accuracy"]["value"] for k, v in baselines.items()}
    elif ratings.kind == "labels":
        recall = _interval(m["recall_at_1%_clean_loss"])
        nsfw = fitted.head.task == "nsfw"
        positive = printable(repr(request.positive), 40) if request.positive else "positives"
        lost = "1% of clean images are lost" if nsfw else "1% of the other images are taken in"
        lines.append(
            f"AUROC {_interval(m['auroc'])} on images it had not seen · finds {recall} of the {positive} where {lost}"
        )
        named = {k: v["auroc"]["value"] for k, v in baselines.items()}
    else:
        lines.append(f"Spearman {_interval(m['spearman'])} on images it had not seen")
        named = {k: v["spearman"]["value"] for k, v in baselines.items() if k != "constant"}
    told = " · ".join(
        f"{_NAMED.get(k, k)} {v:.2f}" if v is not None else f"{_NAMED.get(k, k)} none" for k, v in named.items()
    )
    if ratings.kind == "scores":
        guess = baselines["constant"]["rmse"]["value"]
        told += f" · RMSE {m['rmse']['value']:.2f}, {guess:.2f} for guessing the mean"
    lines.append(f"baselines: {told}")
    if ratings.kind == "scores":
        lines.append(_worth(r))
    elif ratings.kind == "labels":
        missed = m["missed_per_million_at_1%_clean_loss"]
        lines.append(f"where {r['prevalence']:.1%} are {positive}, misses {_interval(missed, 0)} per million images")
    more = to_halve(r)
    lines.append(r["verdict"] + (f"; about {more:,} more {what} would halve the interval" if more else ""))
    return "\n".join(lines)


_NAMED = {"nearest": "10 nearest", "prompts": "zero-shot", "metadata": "metadata only", "constant": "a coin"}


def _worth(report: dict[str, Any]) -> str:
    noise = report["noise"]
    if noise is None:
        return "worth how many raters: unknown, without the number (n) and spread (sd) of the ratings of each image"
    raters = noise["worth_raters"]
    told = "more raters than were asked" if raters is None else _raters(raters)
    return f"worth {told} · no head can correlate more than {noise['ceiling']:.2f} with these ratings"


def _raters(count: float) -> str:
    return f"{count:.1f} raters" if count < 10 else f"{count:.0f} raters"
