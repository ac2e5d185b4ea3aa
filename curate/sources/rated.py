"""Ratings joined to images and their vectors: what a head is fitted to."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from aesthetic.chunks import Map, thread_map
from aesthetic.classify import check_labels
from aesthetic.compare import check_comparisons
from aesthetic.errors import UserError
from aesthetic.examples import Examples, check_scores
from aesthetic.join import join
from aesthetic.rating_files import RATER_NAMES
from aesthetic.ratings import Ratings
from aesthetic.suggest import CONSIDERED
from curate.sources.image_vectors import ImageVectors

if TYPE_CHECKING:
    import pandas as pd

    from aesthetic.reports import FitResult

PREDICTED = "predicted"
"""A column that an earlier head wrote into a file of images to rate next: no metadata."""

_RATERS = {name for name in RATER_NAMES if not name.startswith("user")}
"""Who rated an image is no metadata of it: raters grade on different curves. A user may be the photographer."""


@dataclass(frozen=True, eq=False)
class RatedImages:
    """Ratings, and which images they mean.

    indices: the images that are meant and have a vector, as `images` counts them; vectors (m, d), facts (m rows):
        theirs. pool: images that no rating means, counted likewise, to choose from what to rate next: all, or where
        these are more than CONSIDERED, that many, drawn at random; none where none was asked for.
    rows: by the column of the rating table that names images, for each rating its row in these, or -1.
    reasons: likewise, why it has none, or "".
    """

    ratings: Ratings
    images: ImageVectors
    indices: np.ndarray
    pool: np.ndarray
    vectors: np.ndarray
    facts: pd.DataFrame
    rows: dict[str, np.ndarray]
    reasons: dict[str, list[str]]

    @cached_property
    def joined(self) -> np.ndarray:
        """Which ratings are joined to all the images that they name: (n,) bool."""
        return np.logical_and.reduce([r >= 0 for r in self.rows.values()])

    @cached_property
    def table(self) -> pd.DataFrame:
        """The rows of the rating table that are joined."""
        return self.ratings.table[self.joined]

    @property
    def restated(self) -> list[str]:
        """Columns of the rating files that tell the score again."""
        return [name for name in self.ratings.restated if name != PREDICTED]

    def image_of(self, column: str = "image") -> np.ndarray:
        """For each joined rating the row of its image in `vectors` and `facts`."""
        return self.rows[column][self.joined]

    def examples(self) -> Examples:
        """Scores or labels with their vectors."""
        table, images = self.table, self.image_of()
        facts = self.facts.iloc[images]
        no_metadata = {"image", "score", "n", "sd", "group", "source", PREDICTED, *self.ratings.restated}
        metadata = {
            str(c): table[c].to_list()
            for c in table.columns
            if c not in no_metadata and str(c).lower().replace(" ", "_") not in _RATERS
        }
        metadata |= {c: facts[c].to_list() for c in ("width", "height", "domain") if c in facts}
        return Examples(
            vectors=self.vectors[images],
            scores=table["score"].to_numpy(np.float64),
            ids=facts["key"].to_list(),
            groups=table["group"].to_list() if "group" in table else None,
            votes=_column(table, "n"),
            sd=_column(table, "sd"),
            sources=table["source"].to_list() if "source" in table else None,
            metadata=metadata,
            sha256=_digests(facts, "sha256"),
            phash=_digests(facts, "phash"),
        )

    def comparisons(self) -> dict[str, Any]:
        """Pairs, as the arguments of `fit_comparisons` that follow the vectors."""
        winners, losers = self.image_of("winner"), self.image_of("loser")
        return {
            "winners": winners,
            "losers": losers,
            "ids": self.facts["key"].to_list(),
            "groups": pair_groups(self.table, winners, losers, len(self.facts)),
            "votes": _column(self.table, "n"),
            "sha256": _digests(self.facts, "sha256"),
            "phash": _digests(self.facts, "phash"),
        }

    def unjoined(self) -> pd.DataFrame:
        """The rows of the rating table that are not joined, with a column `why`."""
        rows = np.flatnonzero(~self.joined)
        why = [" and ".join(sorted({r[i] for r in self.reasons.values() if r[i]})) for i in rows]
        return self.ratings.table[~self.joined].assign(why=why)


def join_ratings(
    ratings: Ratings,
    images: ImageVectors,
    name: str,
    *,
    need_pool: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> RatedImages:
    """Find the images that ratings mean, and their vectors; these are made now where the images were not embedded.

    Raises UserError where no image is found, or `need_pool` and all are rated, and HeadError, naming the head
    `name`, where too few are to fit one to: each before anything is embedded.
    """
    columns = ["winner", "loser"] if ratings.kind == "pairs" else ["image"]
    table, rows, reasons = ratings.table, {}, {}
    names = images.names([name for column in columns for name in table[column]], ratings.by)
    image_at = names.index.to_numpy(np.int64)
    sources = table["source"].fillna("").to_numpy() if "source" in table else np.full(len(table), "")
    for column in columns:
        found, why = np.full(len(table), -1), np.full(len(table), "", object)
        for source in np.unique(sources):  # each by the way in which it names images
            of_source = np.flatnonzero(sources == source)
            at, why[of_source] = join(table[column].iloc[of_source].to_list(), ratings.by, names)
            found[of_source[at >= 0]] = image_at[at[at >= 0]]
        rows[column], reasons[column] = found, why.tolist()
    indices = np.unique(np.concatenate([r[r >= 0] for r in rows.values()]))
    if not len(indices):
        first = table[columns[0]].iloc[0]
        raise UserError(f"none of the {len(table):,} images rated is in {images.place}; the first is {first!r}")
    _check_enough(ratings, rows, names, name)
    pool = images.draw(indices, CONSIDERED) if need_pool else np.zeros(0, np.int64)
    if need_pool and not len(pool):
        raise UserError(f"--suggest: every image of {images.place} is rated already")

    vectors, present = images.vectors(indices)
    if not (finite := np.isfinite(vectors).all(1)).all():
        log(f"{int((~finite).sum()):,} of {len(finite):,} vectors hold NaN or infinity, and are left out")
        present[present], vectors = finite, vectors[finite]
    row_of = np.where(present, np.cumsum(present) - 1, -1)  # of each of `indices` its row in `vectors`
    for column in columns:
        found = rows[column] >= 0
        row = row_of[np.searchsorted(indices, rows[column][found])]
        lost = np.zeros(len(found), bool)
        lost[found] = row < 0
        reasons[column] = [images.missing if gone else r for gone, r in zip(lost, reasons[column], strict=True)]
        rows[column][found] = row
    indices = indices[present]
    rated = RatedImages(ratings, images, indices, pool, vectors, images.facts(indices), rows, reasons)
    if not rated.joined.any():
        raise UserError(f"none of the images rated in {images.place} has a vector: {images.missing}")
    return rated


def fit_rated(
    rated: RatedImages,
    name: str,
    *,
    scale: tuple[float, float] | None = None,
    prevalence: float | None = None,
    positive: str = "positives",
    network: bool = False,
    map: Map = thread_map,
    quick: bool = False,
    prompts: Callable[[], np.ndarray | None] = lambda: None,
    **common: Any,
) -> FitResult:
    """Fit a head of this name to what people said of images, whatever kind of ratings that is.

    scale: of scores; None: what the ratings say, else the range of the scores. quick: leave out what does not touch the
    head, as `fit_head` says. prompts: asked for the direction of the zero-shot baseline, where there is one. common:
    card, task, log. Raises HeadError as `fit_head`, `fit_classifier` and `fit_comparisons` do.
    """
    from aesthetic.classify import PREVALENCE, fit_classifier
    from aesthetic.compare import fit_comparisons
    from aesthetic.fit import fit_head
    from aesthetic.ridge import reference_of

    ratings, space = rated.ratings, rated.images.space
    if ratings.kind == "labels":
        prevalence = PREVALENCE if prevalence is None else prevalence
        more: dict[str, Any] = {"prevalence": prevalence, "positive": positive, "quick": quick}
        return fit_classifier(rated.examples(), space, name=name, **more, **common)
    common["prompts"] = None if quick else prompts()
    if ratings.kind == "pairs":
        return fit_comparisons(rated.vectors, space=space, name=name, **rated.comparisons(), **common)
    scale = scale or ratings.scale
    if scale is None:  # the range of the scores; of several sources that of the one to whose scale they are brought
        table = rated.table
        if "source" in table:
            table = table[table["source"] == reference_of(table["source"].to_list())]
        scale = float(table["score"].min()), float(table["score"].max())
    more = {"scale": scale, "network": network, "map": map, "quick": quick}
    return fit_head(rated.examples(), space, name=name, **more, **common)


def pair_groups(table: pd.DataFrame, winners: np.ndarray, losers: np.ndarray, images: int) -> list[str | None] | None:
    """A group for each image, from the groups of the comparisons that it is in, if they have any: the first by name."""
    if "group" not in table:
        return None
    groups: dict[int, str] = {}
    for rows in (winners, losers):
        for image, group in zip(rows.tolist(), table["group"], strict=True):
            if isinstance(group, str):
                groups[image] = min(groups.get(image, group), group)
    return [groups.get(i) for i in range(images)]


def _check_enough(ratings: Ratings, rows: dict[str, np.ndarray], names: pd.DataFrame, name: str) -> None:
    joined = np.logical_and.reduce([r >= 0 for r in rows.values()])
    table = ratings.table[joined]
    if ratings.kind == "pairs":
        images, codes = np.unique([rows["winner"][joined], rows["loser"][joined]], return_inverse=True)
        win, lose = codes.reshape(2, -1)
        ids = [str(v) for v in names["key" if "key" in names else names.columns[0]].loc[images]]
        check_comparisons(win, lose, ids, pair_groups(table, win, lose, len(images)), name)
        return
    scores = table["score"].to_numpy(np.float64)
    check_scores(scores, name)
    if ratings.kind == "labels":
        check_labels(scores, name)


def _column(table: pd.DataFrame, name: str) -> np.ndarray | None:
    """A column of numbers; where only some votes are known, the others count as the middle one of these."""
    if name not in table or not table[name].notna().any():
        return None
    values = table[name].to_numpy(np.float64)
    return np.where(np.isfinite(values), values, np.nanmedian(values)) if name == "n" else values


def _digests(facts: pd.DataFrame, name: str) -> list[str | None] | None:
    if name not in facts:
        return None
    form = re.compile("[0-9a-fA-F]{16}" if name == "phash" else ".+", re.DOTALL)  # of vectors' metadata, by others
    return [v if isinstance(v, str) and form.fullmatch(v) else None for v in facts[name]]
