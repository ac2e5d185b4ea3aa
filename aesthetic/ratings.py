"""Rating files of every kind -> one table: scores or labels of images, or which of two images won."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from aesthetic.heads import HeadError
from aesthetic.metrics import spearman
from aesthetic.rating_files import (
    CHOICE_NAMES,
    IMAGE_NAMES,
    LABEL_NAME,
    N_NAMES,
    NO,
    POSITIVE,
    RATER_NAMES,
    SCORE_NAMES,
    SD_NAMES,
    YES,
    RatingFile,
    did_you_mean,
)
from aesthetic.votes import BIN, find_histograms, find_sides, from_histogram, from_pairs, from_votes

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[np.float64]
Kind = Literal["scores", "labels", "pairs"]
By = Literal["image", "url", "sha256"]

_COLUMNS = {  # of the rating table, in order
    "scores": ("image", "score", "n", "sd", "group", "source"),
    "labels": ("image", "score", "n", "sd", "group", "source"),
    "pairs": ("winner", "loser", "n", "group", "source"),
}


@dataclass(frozen=True, eq=False)
class Ratings:
    """What rating files say, whatever their format.

    `table` has one row an image (kinds "scores" and "labels") or one a comparison ("pairs"), in the files' order:

    scores, labels  `image` (str); `score` (float: the mean of the votes; of labels 0 or 1); where known `n` (float: the
                    votes) and `sd` (float: the sample standard deviation of single votes, ddof 1; NaN for one vote)
    pairs           `winner`, `loser` (str); where known `n` (float: how often it ended so)
    all             `group` (str: what belongs on one side of a split) and `source` (str: what shares a scale), if any

    What only some of several files say is missing (NaN, None) in the rows of the others. Every further column of a file
    follows under its own name: numbers where every filled cell is one, otherwise text; empty cells are missing. Only
    the bins of a histogram and the score beside it are left out, and columns of bytes or nested values.
    """

    kind: Kind
    table: pd.DataFrame
    by: By  # what identifies an image: a key, path, name or id; a URL; the sha256 of its file. For pairs: "image"
    scale: tuple[float, float] | None  # lowest and highest possible score, where the file itself says so
    restated: tuple[
        str, ...
    ] = ()  # further columns that say the score again, and are no metadata: see restated_columns
    unrated: int = 0  # rows without a score, which are not in the table


def read_ratings(
    *paths: str | Path,
    image: str | None = None,
    score: str | None = None,
    group: str | None = None,
    positive: str | None = None,
) -> Ratings:
    """Read rating files: CSV, TSV or parquet with a header, or AVA.txt.

    The arguments name the files' columns; without them usual names are looked for (IMAGE_NAMES and so on). Images are
    known by URL or sha256 where the column's name says so. What a file holds is seen from its columns, in this order:

    pairs      winner and loser; or image_a and image_b (image_1 and image_2, left and right) and a column winner,
               choice, preference or label (or the one given as `score`) that says a or b, 1 or 2, left or right, or the
               winning image's own id. A tie counts half a vote each way: two rows with n = 0.5. Not where there is a
               column of images, or `image` or `positive` is given.
    per rater  a score or a label, a rater (RATER_NAMES), and images that occur several times. Scores are means without
               what each rater adds to every vote (see `without_raters`), kept within the range of the votes; labels
               become the share of yes, a score from 0 to 1. Several votes of a rater for an image count as one, their
               mean. A further column keeps its value for an image where all its votes agree; one in which they never do
               belongs to votes and is left out.
    histogram  columns 1 to K, bare or after a usual word (score_1 to score_10, votes_1, c1): counts of votes, or shares
               that sum to 1 (then n comes from a column of that name, and without it sd has ddof 0). The scale is 1 to
               K. Not where `score` is given.
    labels     a column label, or a score column of 0 and 1 (false and true, no and yes) and nothing else. `positive` is
               the value that counts as 1 where labels are other words.
    scores     a number an image; n and sd from columns called so, or like the score: beauty_sd or beauty_std beside
               beauty_mean. Where the file has another column of scores too, only the latter.

    Rows whose score, label, choice or votes are empty (also NA or nan) are left out and counted.

    AVA.txt (Murray, Marchesotti and Perronnin 2012) has 15 whole numbers a line: index, image_id, votes 1 to 10, two
    tags, challenge. The challenge is the group unless another is given: photographs of a challenge were taken for it
    and voted on together, so a split through challenges leaks.

    Several files must be of one kind. Each is a `source` (its name) unless it has a column source; an image may occur
    in several sources, but once in each. Where they name images in different ways, `by` is "image": `join` looks for
    URLs and hashes among those too.

    Raises HeadError where a column is missing (it names those that are there, and the nearest), a value is not what its
    column needs or an image occurs twice (it names the line; of parquet the row, from 0), two columns would have one
    name, or the files don't go together.
    """
    import pandas as pd

    if not paths:
        raise HeadError("no rating file was given")
    files = [Path(p).expanduser() for p in paths]
    if len(set(files)) < len(files):
        raise HeadError(f"a rating file is given twice: {', '.join(map(str, files))}")
    parts = [_read(file, image, score, group, positive) for file in files]
    kind = parts[0].kind
    if len(parts) == 1:
        return parts[0]
    if any(part.kind != kind for part in parts):
        holds = ", ".join(f"{file} holds {part.kind}" for file, part in zip(files, parts, strict=True))
        raise HeadError(f"one kind of rating at a time: {holds}")
    names = [file.stem for file in files]
    if len(set(names)) < len(names):
        names = [file.with_suffix("").as_posix() for file in files]
    tables = [t.table if "source" in t.table else t.table.assign(source=s) for t, s in zip(parts, names, strict=True)]
    table = pd.concat(tables, ignore_index=True)
    if kind != "pairs" and (again := table.duplicated(["source", "image"]).to_numpy()).any():
        twice, source = table.loc[again.argmax(), ["image", "source"]]
        raise HeadError(f"{twice!r} of the source {source!r} is in two of {', '.join(map(str, files))}")
    first = [c for c in _COLUMNS[kind] if c in table]
    return Ratings(
        kind=kind,
        table=table[[*first, *table.columns.drop(first)]],
        by=parts[0].by if len({part.by for part in parts}) == 1 else "image",
        scale=parts[0].scale if len({part.scale for part in parts}) == 1 else None,
        restated=tuple(dict.fromkeys(name for part in parts for name in part.restated)),
        unrated=sum(part.unrated for part in parts),
    )


def _read(path: Path, image: str | None, score: str | None, group: str | None, positive: str | None) -> Ratings:
    whole = RatingFile.read(path)
    if group is None and path.suffix.lower() == ".txt":
        group = "challenge"
    sides = find_sides(whole) if image is None and positive is None else None
    if sides is None and image is None:
        whole.choose("image", None, IMAGE_NAMES)  # without which nothing else is worth saying
    # what holds a row's judgement: nothing where the file has no place for one that is missing
    if sides:
        judged = [] if sides[0].lower() == "winner" else [whole.choose("choice", score, CHOICE_NAMES)]
    else:
        column = _score_column(whole, score, positive)
        judged = [column] if column else []
        if score is None and positive is None:
            judged += [c for family in find_histograms(whole) for c in family]
    file = whole.filled(judged, words=positive is not None) if judged else whole
    unrated = len(whole.table) - len(file.table)
    if unrated and not len(file.table):
        raise HeadError(f"{path}: no {judged[0]} is filled in")

    roles = {
        "group": file.choose("group", group, ()) if group is not None else file.find(["group"]),
        "source": file.find(["source"]),
    }
    data = {role: file.text(column) for role, column in roles.items() if column is not None}
    used = {column for column in roles.values() if column is not None}
    if sides:
        rows, pairs, more = from_pairs(file, sides, score)
        data = {role: values[rows] for role, values in data.items()} | pairs
        further = {c: v.iloc[rows].reset_index(drop=True) for c, v in _further(file, "pairs", used | more).items()}
        return replace(_ratings(file, "pairs", data, further), unrated=unrated)
    ratings = _read_scores(file, image, score, positive, data, used)
    return replace(ratings, unrated=unrated, restated=_restated(file, ratings, _score_column(file, score, positive)))


def _score_column(file: RatingFile, score: str | None, positive: str | None) -> str | None:
    if score is not None:
        return file.choose("score", score, ())
    return (file.find(SCORE_NAMES) if positive is None else None) or file.find([LABEL_NAME])


def _restated(file: RatingFile, ratings: Ratings, column: str | None) -> tuple[str, ...]:
    """What tells the score again: further columns of the table, and what was not even read because of a named score."""
    table, histograms = ratings.table, find_histograms(file)
    further = {str(c): table[c] for c in table.columns if c not in _COLUMNS["scores"]}
    scores = None if ratings.kind == "labels" else table["score"].to_numpy(np.float64)
    if scores is not None and "source" in table:  # on scales of their own: within the largest
        scores = np.where(table["source"] == table["source"].mode()[0], scores, np.nan)
    prefixes = [BIN.fullmatch(bins[0])[1] for bins in histograms]  # type: ignore[index]
    found = restated_columns(column or prefixes[0], further, scores, prefixes)
    if column and ratings.scale is None:  # else the votes are what was read
        found = [f"{bins[0]} to {bins[-1]}" for bins in histograms] + found
        if (sd := file.find(SD_NAMES)) and sd not in found and "sd" not in table:
            found.append(sd)
    return tuple(found)


def _further(file: RatingFile, kind: Kind, used: set[str]) -> dict[str, pd.Series]:
    """The columns that have no role yet; raises HeadError where one has the name of a column of the rating table."""
    if clash := [c for c in _COLUMNS[kind] if c in file.table.column_names and c not in used]:
        raise HeadError(
            f"{file.path}: the rating table has a column {clash[0]!r} of its own; rename the one of that name here, "
            "which is not used for it, or leave it out"
        )
    return {c: file.values(c) for c in file.table.column_names if c not in used}


def _ratings(
    file: RatingFile,
    kind: Kind,
    data: Mapping[str, Any],
    further: Mapping[str, Any],
    by: By = "image",
    scale: tuple[float, float] | None = None,
) -> Ratings:
    import pandas as pd

    if not len(next(iter(data.values()))):
        raise HeadError(f"{file.path}: no ratings in it")
    return Ratings(kind, pd.DataFrame({c: data[c] for c in _COLUMNS[kind] if c in data} | dict(further)), by, scale)


def _read_scores(
    file: RatingFile, image: str | None, score: str | None, positive: str | None, data: dict[str, Any], used: set[str]
) -> Ratings:
    """Scores or labels, in whatever form. data: columns of the rating table so far, used: of the file."""
    import pandas as pd

    image = file.choose("image", image, IMAGE_NAMES)
    by: By = "sha256" if "sha256" in image.lower() else "url" if "url" in image.lower() else "image"
    data["image"] = file.words(image) if by == "sha256" else file.text(image)
    if by == "sha256":
        for row, value in enumerate(data["image"]):
            if not re.fullmatch("[0-9a-f]{64}", value):
                raise file.error(row, f"{image} is {value!r}, not a sha256 (64 hexadecimal digits)")
    keys = [data[k] for k in ("source", "image") if k in data]
    again = pd.DataFrame(dict(enumerate(keys))).duplicated().to_numpy()
    column = _score_column(file, score, positive)
    histograms = find_histograms(file)
    used |= {image, *(c for bins in histograms for c in bins)} | ({column} if column else set())

    if column and again.any() and (rater := file.find(RATER_NAMES)):
        data["score"], kind = _judgements(file, column, positive)
        used.add(rater)
        votes = pd.DataFrame(data | {"rater": file.text(rater)} | _further(file, "scores", used))
        table, scale = from_votes(file, votes, (0.0, 1.0) if kind == "labels" else None)
        front = [c for c in _COLUMNS["scores"] if c in table]
        return Ratings("scores", table[[*front, *table.columns.drop(front)]], by, scale)
    if again.any():
        row = int(again.argmax())
        before = int(np.logical_and.reduce([k == k[row] for k in keys]).argmax())
        raise file.error(
            row,
            f"{data['image'][row]!r} was rated before ({file.locate(before)}); give one row an image, the mean, or say "
            "in a column rater whose vote each row is",
        )
    if histograms and score is None and positive is None:
        means, more, points = from_histogram(file, histograms)
        further = _further(file, "scores", used | more)
        return _ratings(file, "scores", data | means, further, by, (1.0, float(points)))

    column = column or file.choose("score", None, (*SCORE_NAMES, LABEL_NAME, "or votes 1 to K"))
    data["score"], kind = _judgements(file, column, positive)
    base = re.sub("_?mean$", "", column.lower())
    if (n := file.find([f"{base}_n", *N_NAMES])) and n not in used:
        data["n"] = file.numbers(n, "a number of votes", low=POSITIVE)
        used.add(n)
    if (sd := file.find([*(f"{base}_{name}" for name in SD_NAMES), *SD_NAMES])) and sd not in used:
        if sd.lower() not in SD_NAMES or column == (file.find(SCORE_NAMES) or column):
            data["sd"] = file.numbers(sd, "a spread of votes", low=0, may_be_empty=True)
        used.add(sd)  # else it is that of another score, in other units
    return _ratings(file, kind, data, _further(file, kind, used), by, (0.0, 1.0) if kind == "labels" else None)


def _judgements(file: RatingFile, column: str, positive: str | None) -> tuple[Array, Kind]:
    """A column of scores or labels as numbers, and which of the two it is."""
    if positive is not None:
        values = file.text(column)
        if not (values == positive).any():
            seen = sorted(set(values))
            raise HeadError(
                f"{file.path}: no {column} is {positive!r}. Values: {_some(seen)}{did_you_mean(positive, seen)}"
            )
        return (values == positive).astype(np.float64), "labels"
    words = file.words(column)
    yes = np.isin(words, YES)
    other = ~yes & ~np.isin(words, NO)
    if column.lower() == LABEL_NAME and other.any():
        row = int(other.argmax())
        seen = sorted(set(file.table[column].cast("string").drop_null().to_pylist()))
        quoted = seen[0] if re.fullmatch(r"[\w.-]+", seen[0]) else repr(seen[0])
        raise file.error(
            row,
            f"{column} is {file.table[column][row].as_py()!r}; labels are 0 and 1, false and true, or no and yes. Say "
            f"which of other values counts as 1: --positive {quoted} (`positive` in Python). "
            f"Values: {_some(seen)}",
        )
    if not other.any() and (column.lower() == LABEL_NAME or 0 < yes.sum() < len(yes)):
        return yes.astype(np.float64), "labels"
    return file.numbers(column), "scores"


def _some(values: list[str]) -> str:
    return ", ".join(map(repr, values[:10])) + (f" and {len(values) - 10:,} more" if len(values) > 10 else "")


# What says again what people judged: no metadata, and no sign of a leak. KonIQ has its mean opinion score (MOS), a
# z-score of it, the votes and their spread side by side; PARA has the means of nine judgements. Whoever predicts one of
# them from another knows nothing of how the images came about.

SAME = 0.95
"""From this rank correlation with the score on a column of numbers counts as the score in another form. Ours: z-scores,
ranks and means without outliers of one set of votes lie above 0.98, other judgements of the same people below 0.95."""

_FEW = 10  # rows below which a correlation says nothing
_TOKEN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # the words of MOS_zscore, aestheticScore_mean, beauty.sd
_SPREADS = {"sd", "std", "stdev", "stddev"}
_STATISTICS = _SPREADS | {
    *("mean", "avg", "average", "median", "var", "variance", "se", "sem", "ci", "z", "norm", "normalized", "rank"),
    *("n", "num", "count", "counts", "total", "min", "max", "percentile", "quantile", "raw"),
}
_JUDGEMENTS = {
    *("score", "scores", "rating", "ratings", "mos", "dmos", "zscore", "vote", "votes", "opinion", "opinions"),
    *("label", "labels", "preference", "preferences"),
}


def restated_columns(
    score: str, columns: Mapping[str, pd.Series], scores: npt.NDArray[np.float64] | None, prefixes: Collection[str] = ()
) -> list[str]:
    """The columns that say the score again, or what the same people judged besides, in their order.

    By name: called after judging (qualityScore, votes), a spread or a number of votes (SD, c_total), or called like the
    column `score` but for one part (valence_mean and valence_n beside beauty_mean). prefixes: of a histogram's columns.
    By value, where `scores` are given: numbers whose rank correlation with them is at least SAME, either way.
    """
    base, statistics = _parts(score)
    siblings = {b for b, s in map(_parts, columns) if s and s == statistics} | {base}
    siblings |= {_parts(p)[0] for p in prefixes}

    def says_again(name: str, values: pd.Series) -> bool:
        other_base, other_statistics = _parts(name)
        if (other_base | other_statistics) & (_JUDGEMENTS | _SPREADS):
            return True
        if other_statistics and (other_base in siblings or not other_base):
            return True
        if scores is None or values.dtype.kind not in "iuf":
            return False
        x = values.to_numpy(np.float64)
        known = np.isfinite(x) & np.isfinite(scores)
        return bool(known.sum() >= _FEW and abs(spearman(x[known], scores[known])) >= SAME)

    return [name for name, values in columns.items() if says_again(name, values)]


def _parts(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """The words of a column's name: what is measured, and which statistic of it."""
    words = frozenset(w.lower() for w in _TOKEN.findall(name))
    return words - _STATISTICS, words & _STATISTICS
