"""Sets of ratings of a data folder: made, rated in, and asked which images come next and what was learnt."""

from __future__ import annotations

import re
import shlex
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from fastapi import HTTPException

from aesthetic.errors import UserError
from curate.layout import Data
from studio.rate import choosing
from studio.rate.commands import apply_words, fit_words
from studio.rate.files import ANSWERS, NAME, RATER, RatingLog, RatingSet, Row, make_set, read_set
from studio.rate.learning import HeadLearner, LearntHead, VectorSample

if TYPE_CHECKING:
    from curate.sources.kept_vectors import KeptVectors
    from studio.data import StudioData

How = Literal["random", "around", "teach"]


@dataclass(frozen=True)
class NextQuery:
    """Which images a rater wants next."""

    rater: str
    how: How = "random"
    count: int = 20
    selection: str = ""  # of the rows that this live selection keeps
    column: str = ""
    value: float = 0.0


class RatingService:
    """Ratings of one data folder. Safe in many threads."""

    def __init__(self, folder: StudioData) -> None:
        self.folder, self.data = folder, folder.data
        self.learner = HeadLearner(self.vectors, folder.on_fault)
        self._logs: dict[str, RatingLog] = {}
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._vectors: tuple[object, KeptVectors, VectorSample] | None = None

    def stop(self) -> None:
        """Begin nothing more."""
        self.learner.stop()

    # ----------------------------------------------------------------------------------------------------- sets

    def names(self) -> list[str]:
        """The sets of ratings that are there."""
        return [name for name in self.data.rated() if read_set(self.data, name)]

    def log(self, name: str) -> RatingLog:
        """The ratings of a set; a 404 where there is none."""
        about = read_set(self.data, name)
        if about is None:
            raise HTTPException(404, f"there are no ratings called {name[:60]}")
        with self._lock:
            found = self._logs.get(name)
            if found is None or found.about != about:
                found = self._logs[name] = RatingLog(self.data, about, self.folder.log)
            return found

    def make(self, about: RatingSet) -> RatingLog:
        """Begin a set of ratings. UserError where its name is taken, or can't be that of a column."""
        if not re.fullmatch(NAME, about.name):
            raise UserError(f"{about.name!r}: a name is lower case letters, digits and _, and begins with a letter")
        if about.name in _taken_names(self.data):
            raise UserError(f"there is a column {about.name} already, and what is learnt goes into one of its name")
        make_set(self.data, about, self.folder.log)
        return self.log(about.name)

    # -------------------------------------------------------------------------------------------------- ratings

    def rate(self, name: str, row: Row) -> int:
        """Write a rating: cells as the set's file has them. How many there are. A 404 where there is no such image."""
        log = self.log(name)
        check_row(log.about, row)
        images = row[:-2]
        for key in images:
            if not self.is_shown(key):
                raise HTTPException(404, f"there is no image {key[:60]}")
        count = log.add(row)
        self.learner.want(log)
        return count

    def undo(self, name: str, rater: str, images: Collection[str] = ()) -> tuple[Row | None, Row | None, int]:
        """Take back a rater's last rating, or that of these images; as `RatingLog.undo`."""
        log = self.log(name)
        found = log.undo(rater, tuple(images))
        self.learner.want(log)
        return found

    def head(self, name: str) -> tuple[LearntHead | None, bool]:
        """What was learnt last, and whether something newer is under way, which is begun where it must be."""
        log = self.log(name)
        with log.held():
            version = log.version
        learnt, busy = self.learner.get(name)
        # what failed without a look at them is tried again at the next rating
        if not busy and (learnt is None or learnt.version not in (version, -1)):
            self.learner.want(log)
            busy = True
        return learnt, busy

    # --------------------------------------------------------------------------------------------- which are next

    def next_images(self, name: str, wanted: NextQuery) -> list[str]:
        """Keys of images that the rater has not rated yet, the next one first; fewer where there are no more."""
        log = self.log(name)
        rows = log.rows()
        own = {row[0] for row in rows if row[-1] == wanted.rater}
        if wanted.how == "teach":
            return self._telling(name, wanted, {row[0] for row in rows})
        return self._first(self._random(name, wanted), own, wanted.count)

    def next_pairs(self, name: str, wanted: NextQuery) -> list[tuple[str, str]]:
        """Pairs of images that the rater has not compared yet."""
        log = self.log(name)
        seen = {frozenset(row[:2]) for row in log.rows() if row[-1] == wanted.rater}
        _, sample = self.vectors()
        learnt, _ = self.learner.get(name)
        scores = None if learnt is None or learnt.sample is not sample else learnt.scores
        rows = np.arange(len(sample.keys))
        return choosing.pairs(sample.keys, rows, scores, seen, wanted.count, choosing.seed_of(name, wanted.rater))

    def _telling(self, name: str, wanted: NextQuery, rated: set[str]) -> list[str]:
        vectors, sample = self.vectors()
        known = vectors.images(sorted(rated))
        known = np.unique(known[known >= 0])
        rows = choosing.unrated(sample, known)
        learnt, _ = self.learner.get(name)
        chosen = choosing.most_telling(learnt, vectors.vectors(known)[0], sample.vectors[rows], wanted.count)
        return [sample.keys[row] for row in rows[chosen]]

    def _random(self, name: str, wanted: NextQuery) -> Iterator[list[str]]:
        """Keys in a random order, the same for every rater: so several rate the same images, and it shows how far they
        agree."""
        vectors, _ = self.vectors()
        order = choosing.shuffled(vectors.count, choosing.seed_of(name))
        while images := [image for image, _ in zip(order, range(wanted.count + 20), strict=False)]:
            found = np.array(images, np.int64)
            yield vectors.keys(found[vectors.shown(found)])

    @staticmethod
    def _first(found: Iterator[list[str]], without: Collection[str], count: int) -> list[str]:
        keys: list[str] = []
        for some in found:
            keys += [key for key in some if key not in without]
            if len(keys) >= count:
                break
        return keys[:count]

    # ---------------------------------------------------------------------------------------------- what is asked

    def is_shown(self, key: str) -> bool:
        """Whether there is an image of this key that may be seen."""
        vectors, _ = self.vectors()
        return bool(vectors.images([key])[0] >= 0)

    def vectors(self) -> tuple[KeptVectors, VectorSample]:
        """The folder's vectors, and a sample of them in memory; UserError where there are none."""
        from curate.sources.kept_vectors import KeptVectors

        with self._opening:
            if self._vectors is None:
                vectors = KeptVectors(str(self.data))
                self._vectors = None, vectors, VectorSample.of(vectors)
            return self._vectors[1:]

    # -------------------------------------------------------------------------------------------------- commands

    def column(self, name: str) -> str | None:
        """The column that the set's head has made, if it has."""
        return name if name in self.data.annotated() else None

    def commands(self, log: RatingLog, kind: str) -> tuple[str, str]:
        """What fits the head in a terminal, and what makes a column of it then."""
        line, name = self.folder.commands.line, log.about.name
        given = str(self.data) if line is None else line.given
        both = fit_words(self.data, log.about, given, kind), apply_words(self.data, name, given)
        return shlex.join(["tastemaker", *both[0]]), shlex.join(["tastemaker", *both[1]])


def check_row(about: RatingSet, row: Row) -> None:
    """UserError where a rating does not go with what is asked in its set."""
    *images, answer, rater = row
    if not re.fullmatch(RATER, rater):
        raise UserError("rater: a name of up to 40 letters, digits, blanks and . @ ' - is needed")
    if len(images) != (2 if about.kind == "pairs" else 1):
        raise UserError(f"{about.name} holds {about.kind}: {'two images, a and b' if about.kind == 'pairs' else 'one'}")
    if len(set(images)) < len(images):
        raise UserError("an image can't be compared with itself")
    if about.scale is not None:
        low, high = about.scale
        if not low <= float(answer) <= high:
            raise UserError(f"{answer} is outside the scale of {about.name}, {low:g} to {high:g}")
    elif answer not in ANSWERS[about.kind]:
        raise UserError(f"{about.name} holds {about.kind}: the answer is one of {', '.join(ANSWERS[about.kind])}")


def _taken_names(data: Data) -> set[str]:
    """Names that a new column can't have: those of the ledger, but for heads learnt here before."""
    from curate.ledger.view import known_columns

    return {name.lower() for name in known_columns(data)[0]}
