"""Rating files of every kind -> one table: scores or labels of images, or which of two images won.

`join` (in aesthetic.join) finds the images that the table names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from aesthetic.forms import forms_of
from aesthetic.heads import HeadError
from aesthetic.join import join
from aesthetic.raters import without_raters
from aesthetic.rating_files import POSITIVE, RatingFile, Texts, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Ratings", "join", "read_ratings"]

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]
Kind = Literal["scores", "labels", "pairs"]
By = Literal["image", "url", "sha256"]

LABEL_NAME = "label"
IMAGE_NAMES = (
    *("image", "key", "path", "image_path", "file", "filename", "file_name", "image_name", "image_id"),
    *("url", "image_url", "sha256", "image_sha256", "name", "id"),
)
SCORE_NAMES = ("score", "rating", "mean", "mos")
RATER_NAMES = ("rater", "rater_id", "user", "user_id", "worker", "worker_id", "annotator", "annotator_id")
N_NAMES = ("n", "votes", "n_votes", "num_votes")
SD_NAMES = ("sd", "std")
SIDE_NAMES = (("image_a", "image_b"), ("image_1", "image_2"), ("image_left", "image_right"), ("left", "right"))
CHOICE_NAMES = ("winner", "choice", "preference", LABEL_NAME)
"""Names of columns that are looked for where none is given: in this order, in upper or lower case."""

YES, NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")
TIES = ("tie", "tied", "draw", "equal", "same", "both", "neither")

_COLUMNS = {  # of the rating table, in order
    "scores": ("image", "score", "n", "sd", "group", "source"),
    "labels": ("image", "score", "n", "sd", "group", "source"),
    "pairs": ("winner", "loser", "n", "group", "source"),
}
_BIN = re.compile(
    r"((?:(?:score|rating|vote|count|star|bin|hist|histogram|c)s?[_. -]?)?)0{0,9}([1-9]\d{0,3})", re.IGNORECASE
)
_MIN_BINS = 3
_SHARES = 0.02  # how far from 1 the shares of a histogram may sum: rounded to two digits, ten of them are mostly nearer
_SAME_MEAN = 0.01  # of the width of the scale: how far a mean may lie from that of the histogram beside it


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
    restated: tuple[str, ...] = ()  # further columns that tell the score again, and are no metadata: see `forms_of`
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
    known by URL or sha256 where the column's name says so. What a file holds is told from its columns, in this order:

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
    sides = _sides(whole) if image is None and positive is None else None
    if sides is None and image is None:
        whole.choose("image", None, IMAGE_NAMES)  # without which nothing else is worth saying
    told = _told_in(whole, sides, score, positive)
    file = whole.filled(told, words=positive is not None) if told else whole
    unrated = len(whole.table) - len(file.table)
    if unrated and not len(file.table):
        raise HeadError(f"{path}: no {told[0]} is filled in")
    roles = {
        "group": file.choose("group", group, ()) if group is not None else file.find(["group"]),
        "source": file.find(["source"]),
    }
    data = {role: file.text(column) for role, column in roles.items() if column is not None}
    used = {column for column in roles.values() if column is not None}
    if sides:
        return replace(_pairs(file, sides, score, data, used), unrated=unrated)
    ratings = _scores(file, image, score, positive, data, used)
    return replace(ratings, unrated=unrated, restated=_restated(file, ratings, _score_column(file, score, positive)))


def _restated(file: RatingFile, ratings: Ratings, column: str | None) -> tuple[str, ...]:
    """What tells the score again: further columns of the table, and what was not even read because of a named score."""
    table, histograms = ratings.table, _histograms(file)
    further = {str(c): table[c] for c in table.columns if c not in _COLUMNS["scores"]}
    scores = None if ratings.kind == "labels" else table["score"].to_numpy(np.float64)
    if scores is not None and "source" in table:  # on scales of their own: within the largest
        scores = np.where(table["source"] == table["source"].mode()[0], scores, np.nan)
    prefixes = [_BIN.fullmatch(bins[0])[1] for bins in histograms]  # type: ignore[index]
    found = forms_of(column or prefixes[0], further, scores, prefixes)
    if column and ratings.scale is None:  # else the votes are what was read
        found = [f"{bins[0]} to {bins[-1]}" for bins in histograms] + found
        if (sd := file.find(SD_NAMES)) and sd not in found and "sd" not in table:
            found.append(sd)
    return tuple(found)


def _told_in(file: RatingFile, sides: tuple[str, str] | None, score: str | None, positive: str | None) -> list[str]:
    """The columns that hold a row's judgement; none where a file has no place for one that is missing."""
    if sides:
        return [] if sides[0].lower() == "winner" else [file.choose("choice", score, CHOICE_NAMES)]
    column = _score_column(file, score, positive)
    bins = [c for family in _histograms(file) for c in family] if score is None and positive is None else []
    return ([column] if column else []) + bins


def _score_column(file: RatingFile, score: str | None, positive: str | None) -> str | None:
    if score is not None:
        return file.choose("score", score, ())
    return (file.find(SCORE_NAMES) if positive is None else None) or file.find([LABEL_NAME])


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


def _further(file: RatingFile, kind: Kind, used: set[str]) -> dict[str, pd.Series]:
    """The columns that have no role yet; raises HeadError where one has the name of a column of the rating table."""
    if clash := [c for c in _COLUMNS[kind] if c in file.table.column_names and c not in used]:
        raise HeadError(
            f"{file.path}: the rating table has a column {clash[0]!r} of its own; rename the one of that name here, "
            "which is not used for it, or leave it out"
        )
    return {c: file.values(c) for c in file.table.column_names if c not in used}


# Scores and labels ---------------------------------------------------------------------------------------------------


def _scores(
    file: RatingFile, image: str | None, score: str | None, positive: str | None, data: dict[str, Any], used: set[str]
) -> Ratings:
    import pandas as pd

    image = file.choose("image", image, IMAGE_NAMES)
    by: By = "sha256" if "sha256" in image.lower() else "url" if "url" in image.lower() else "image"
    data["image"] = _hashes(file, image) if by == "sha256" else file.text(image)
    keys = [data[k] for k in ("source", "image") if k in data]
    again = pd.DataFrame(dict(enumerate(keys))).duplicated().to_numpy()

    column = _score_column(file, score, positive)
    rater = file.find(RATER_NAMES) if column and again.any() else None
    histograms = _histograms(file)
    used |= {image, *(c for bins in histograms for c in bins)} | ({column} if column else set())

    if column and rater:
        data["score"], kind = _judgements(file, column, positive)
        used.add(rater)
        votes = pd.DataFrame(data | {"rater": file.text(rater)} | _further(file, "scores", used))
        return _of_votes(file, votes, by, (0.0, 1.0) if kind == "labels" else None)
    if again.any():
        row = int(again.argmax())
        before = int(np.logical_and.reduce([k == k[row] for k in keys]).argmax())
        raise file.error(
            row,
            f"{data['image'][row]!r} was rated before ({file.place(before)}); give one row an image, the mean, or say "
            "in a column rater whose vote each row is",
        )
    if histograms and score is None and positive is None:
        return _of_histogram(file, histograms, data, used, by)
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
    scale = (0.0, 1.0) if kind == "labels" else None
    return _ratings(file, kind, data, _further(file, kind, used), by, scale)


def _hashes(file: RatingFile, column: str) -> Texts:
    hashes = file.words(column)
    for row, value in enumerate(hashes):
        if not re.fullmatch("[0-9a-f]{64}", value):
            raise file.error(row, f"{column} is {value!r}, not a sha256 (64 hexadecimal digits)")
    return hashes


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
        raise file.error(
            row,
            f"{column} is {file.table[column][row].as_py()!r}; labels are 0 and 1, false and true, or no and yes. Say "
            f"which of other values counts as 1: --positive {_quoted(seen[0])} (`positive` in Python). "
            f"Values: {_some(seen)}",
        )
    if not other.any() and (column.lower() == LABEL_NAME or 0 < yes.sum() < len(yes)):
        return yes.astype(np.float64), "labels"
    return file.numbers(column), "scores"


def _quoted(value: str) -> str:
    return value if re.fullmatch(r"[\w.-]+", value) else repr(value)


def _some(values: list[str]) -> str:
    return ", ".join(map(repr, values[:10])) + (f" and {len(values) - 10:,} more" if len(values) > 10 else "")


def _histograms(file: RatingFile) -> list[list[str]]:
    """Columns that may be votes for 1 to K, each in order."""
    families: dict[str, dict[int, str]] = {}
    for column in file.table.column_names:
        if bin_ := _BIN.fullmatch(column):
            families.setdefault(bin_[1].lower(), {})[int(bin_[2])] = column
    return [[f[k] for k in sorted(f)] for f in families.values() if len(f) >= _MIN_BINS and max(f) == len(f)]


def _of_histogram(
    file: RatingFile, histograms: list[list[str]], data: dict[str, Any], used: set[str], by: By
) -> Ratings:
    """Mean, number and sample standard deviation of votes from 1 to K, given as counts or shares."""
    if len(histograms) > 1:
        families = " and ".join(f"{bins[0]} to {bins[-1]}" for bins in histograms)
        raise HeadError(
            f"{file.path}: {families} may both be votes; leave one of them out, or name the column of scores"
        )
    bins = histograms[0]
    across = f"{bins[0]} to {bins[-1]}"
    counts = np.stack([file.numbers(c, "a number of votes", low=0) for c in bins], axis=1)
    total = counts.sum(1)
    if not total.all():
        raise file.error(int(total.argmin()), f"no votes: {across} are all 0; leave the image out")
    n_column, sd_column, score_column = file.find(N_NAMES), file.find(SD_NAMES), file.find(SCORE_NAMES)
    n = total
    if shares_given := bool((counts % 1).any()):
        if (odd := abs(total - 1) > _SHARES).any():
            row = int(odd.argmax())
            raise file.error(row, f"{across} sum to {total[row]:g}; votes are whole numbers, or shares that sum to 1")
        n = file.numbers(n_column, "a number of votes", low=POSITIVE) if n_column else np.full(len(total), np.inf)
    shares = counts / total[:, None]
    steps = np.arange(1.0, len(bins) + 1)
    mean = shares @ steps
    if score_column:
        given = file.numbers(score_column)
        if (differ := abs(given - mean) > _SAME_MEAN * (len(bins) - 1)).any():
            row = int(differ.argmax())
            raise file.error(
                row,
                f"{score_column} is {given[row]:g}, and the mean of {across} is {mean[row]:g}; leave one out, or name "
                "the column of scores",
            )
    spread = (shares * (steps - mean[:, None]) ** 2).sum(1)
    ddof = np.divide(1, 1 - 1 / n, out=np.full(len(n), np.nan), where=n > 1)
    data |= {"score": mean, "sd": np.sqrt(spread * ddof)} | ({"n": n} if n_column or not shares_given else {})
    used |= {c for c in (n_column, sd_column, score_column) if c}
    return _ratings(file, "scores", data, _further(file, "scores", used), by, (1.0, float(len(bins))))


# One row a vote ------------------------------------------------------------------------------------------------------


def _of_votes(file: RatingFile, votes: pd.DataFrame, by: By, scale: tuple[float, float] | None) -> Ratings:
    """Rows of votes (image, rater, score, and further columns) -> rows of images, in the order of their first votes.

    Several votes of a rater for an image count as one, their mean. Nothing but the rows' order depends on the order of
    the votes: they are sorted before they are summed.
    """
    import pandas as pd

    def numbered(column: str) -> Codes:  # within the source
        codes = pd.factorize(votes[column], sort=True)[0].astype(np.int64)
        return _from_zero(source * len(votes) + codes)

    source = pd.factorize(votes["source"], sort=True)[0] if "source" in votes else np.zeros(len(votes), np.int64)
    image, rater = numbered("image"), numbered("rater")
    score = votes["score"].to_numpy()
    order = np.lexsort((score, rater, image))
    i, r = image[order], rater[order]
    new = np.flatnonzero(np.r_[True, (np.diff(i) != 0) | (np.diff(r) != 0)])
    y = np.add.reduceat(score[order], new) / np.diff(np.r_[new, len(order)])
    i, r = i[new], r[new]
    first = np.full(image.max() + 1, len(image))
    np.minimum.at(first, image, np.arange(len(image)))

    low, high = np.empty(len(first)), np.empty(len(first))
    for s in range(source.max() + 1):
        rows = source[first][i] == s
        low[i[rows]], high[i[rows]] = y[rows].min(), y[rows].max()
        y[rows] = without_raters(y[rows], _from_zero(i[rows]), _from_zero(r[rows]))
    n = np.bincount(i).astype(np.float64)
    mean = np.bincount(i, y) / n
    variance = np.divide(np.bincount(i, (y - mean[i]) ** 2), n - 1, out=np.full(len(n), np.nan), where=n > 1)

    table = votes.iloc[first].drop(columns=["rater", "score"])
    several = np.bincount(image) > 1
    for name in table.columns.drop(["image", "source"], errors="ignore"):
        codes = pd.factorize(votes[name], use_na_sentinel=False)[0]
        other = codes != codes[first][image]
        agree = np.bincount(image, other) == 0
        if name == "group" and other.any():
            row = int(other.argmax())
            before = int(first[image[row]])
            raise file.error(
                row,
                f"{votes['image'][row]!r} is in the group {votes['group'][row]!r}, and in "
                f"{votes['group'][before]!r} before ({file.place(before)}); an image has one group",
            )
        if (agree & several).any():
            table[name] = table[name].where(agree)
        else:
            table = table.drop(columns=name)
    table = table.assign(score=np.clip(mean, low, high), n=n, sd=np.sqrt(variance))
    table = table.iloc[np.argsort(first)].reset_index(drop=True)
    front = [c for c in _COLUMNS["scores"] if c in table]
    lowest, highest = float(np.min(low)), float(np.max(high))
    if scale is None and lowest < highest and ("source" not in table or table["source"].nunique() == 1):
        scale = lowest, highest  # means reach less far than votes
    return Ratings("scores", table[[*front, *table.columns.drop(front)]], by, scale)


def _from_zero(codes: Codes) -> Codes:
    return np.unique(codes, return_inverse=True)[1]


# Pairs ---------------------------------------------------------------------------------------------------------------


def _sides(file: RatingFile) -> tuple[str, str] | None:
    """The two columns of images of a file of comparisons."""
    if any(file.find([name]) for name in IMAGE_NAMES if name not in ("name", "id")):
        return None
    for one, other in (("winner", "loser"), *SIDE_NAMES):
        a, b = file.find([one]), file.find([other])
        if a and b:
            return a, b
    return None


def _pairs(
    file: RatingFile, sides: tuple[str, str], choice: str | None, data: dict[str, Any], used: set[str]
) -> Ratings:
    a, b = (file.text(side) for side in sides)
    if sides[0].lower() == "winner":
        won = np.zeros(len(a), np.int64)
        if choice is not None:
            raise HeadError(f"{file.path}: winner and loser say which image won; no score ({choice}) goes with them")
    else:
        choice = file.choose("choice", choice, CHOICE_NAMES)
        used.add(choice)
        won = _won(file, choice, sides, a, b)
    used |= set(sides)
    if (a == b).any():
        row = int((a == b).argmax())
        raise file.error(row, f"{a[row]!r} is compared with itself")
    rows = np.repeat(np.arange(len(won)), np.where(won == _TIE, 2, 1))
    second_of_tie = np.diff(rows, prepend=-1) == 0
    b_won = (won[rows] == 1) | second_of_tie
    n_column = file.find(N_NAMES)
    if n_column or second_of_tie.any():
        n = file.numbers(n_column, "a number of votes", low=POSITIVE) if n_column else np.ones(len(won))
        data["n"] = n * np.where(won == _TIE, 0.5, 1)
        used |= {n_column} if n_column else set()
    data = {role: values[rows] for role, values in data.items()}
    data |= {"winner": np.where(b_won, b[rows], a[rows]), "loser": np.where(b_won, a[rows], b[rows])}
    further = {c: v.iloc[rows].reset_index(drop=True) for c, v in _further(file, "pairs", used).items()}
    return _ratings(file, "pairs", data, further)


_TIE = 2


def _won(file: RatingFile, choice: str, sides: tuple[str, str], a: Texts, b: Texts) -> Codes:
    """Which side a choice names, 0 or 1 or _TIE: by a word for the side, or by the winning image's own id."""
    short = [side.lower().rpartition("_")[2] for side in sides]
    side_of = {short[0]: 0, sides[0].lower(): 0, short[1]: 1, sides[1].lower(): 1} | dict.fromkeys(TIES, _TIE)
    chosen = file.text(choice)
    by_word = np.array([side_of.get(word, -1) for word in file.words(choice)], np.int64)
    by_id = np.select([chosen == a, chosen == b], [0, 1], -1)
    if (unclear := (by_word >= 0) & (by_id >= 0) & (by_word != by_id)).any():
        row = int(unclear.argmax())
        raise file.error(
            row, f"{choice} is {chosen[row]!r}: a side, or the image of that id? Write {sides[0]} or {sides[1]}"
        )
    won = np.where(by_word >= 0, by_word, by_id)
    if (won < 0).any():
        row = int((won < 0).argmax())
        raise file.error(
            row,
            f"{choice} is {chosen[row]!r}; it must be {short[0]}, {short[1]}, tie, or the id of one of the two images",
        )
    return won
