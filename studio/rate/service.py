"""Sets of ratings of a data folder: made, rated in, and asked which images come next and what was learnt."""

from __future__ import annotations

import contextlib
import re
import shlex
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np
from fastapi import HTTPException

from aesthetic.errors import UserError
from curate.layout import Data
from curate.store.files import digest
from studio.rate import choosing
from studio.rate.choosing import Rows
from studio.rate.commands import apply_words, fit_words
from studio.rate.files import ANSWERS, RATER, RatingLog, RatingSet, Row, make_set, read_set
from studio.rate.learning import HeadLearner, LearntHead, VectorSample

if TYPE_CHECKING:
    from curate.sources.kept_vectors import KeptVectors
    from studio.data import StudioData

How = Literal["random", "around", "teach"]


_LOOK = 5.0  # seconds after which it is seen whether vectors were made anew
_TRY_AGAIN = 30.0  # seconds after which a fit is tried again that failed because of something else than ratings
_MOST_SETS = 1000
_SELECTIONS = 4  # of which images to choose from are kept


@dataclass(frozen=True)
class ShownImage:
    """An image to rate."""

    key: str
    caption: str
    blurred: bool


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
        self._lock, self._opening, self._sampling = threading.Lock(), threading.Lock(), threading.Lock()
        self._opened: tuple[str, KeptVectors] | None = None
        self._sampled: tuple[KeptVectors, VectorSample] | None = None
        self._looked = 0.0
        self._of_selections: OrderedDict[str, VectorSample] = OrderedDict()

    def stop(self) -> None:
        """Begin nothing more."""
        self.learner.stop()

    def look(self) -> None:
        """The data folder may have changed."""
        self._looked = 0.0

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
        if about.name in _taken_names(self.data):
            raise UserError(f"there is a column {about.name} already, and what is learnt goes into one of its name")
        if len(self.data.rated()) >= _MOST_SETS:
            raise UserError(f"there are {_MOST_SETS:,} sets of ratings: remove some from {self.data}/ratings")
        make_set(self.data, about, self.folder.log)
        return self.log(about.name)

    # -------------------------------------------------------------------------------------------------- ratings

    def rate(self, name: str, row: Row) -> int:
        """Write a rating: cells as the set's file has them. How many there are. A 404 where there is no such image."""
        log = self.log(name)
        check_row(log.about, row)
        for key in row[:-2]:
            if self.shown(key) is None:
                raise HTTPException(404, f"there is no image {key}")
        count = log.add(row)
        self.learner.want(log)
        return count

    def undo(self, name: str, rater: str, images: Sequence[str] = ()) -> tuple[Row | None, Row | None, int]:
        """Take back a rater's last rating, or that of these images; as `RatingLog.undo`."""
        log = self.log(name)
        found = log.undo(rater, images)
        self.learner.want(log)
        return found

    def head(self, name: str) -> tuple[LearntHead | None, bool]:
        """What was learnt last, and whether something newer is under way, which is begun where it must be."""
        log = self.log(name)
        with log.held():
            version = log.version
        learnt, busy = self.learner.get(name)
        due = learnt is None or (learnt.version != version and (learnt.version >= 0 or learnt.age > _TRY_AGAIN))
        if not busy and due:
            self.learner.want(log)
            busy = True
        return learnt, busy

    # --------------------------------------------------------------------------------------------- which are next

    def next_images(self, name: str, query: NextQuery) -> list[ShownImage]:
        """Images that the rater has not rated yet, the next one first; fewer where there are no more."""
        rows = self.log(name).rows()
        own = {row[0] for row in rows if row[-1] == query.rater}
        if query.how == "teach":
            return list(self._shown(self._telling(name, query, {row[0] for row in rows})))
        found: Iterable[str]
        if query.how == "around":
            found = self._around(query, query.count + len(own))
        else:
            found = self._random(choosing.seed_of(name), query)
        return list(islice(self._shown(key for key in found if key not in own), query.count))

    def next_pairs(self, name: str, query: NextQuery) -> list[tuple[ShownImage, ShownImage]]:
        """Pairs of images that the rater has not compared yet; by the present head they are about as good."""
        seen = {frozenset(row[:2]) for row in self.log(name).rows() if row[-1] == query.rater}
        sample, scores, seed = self._sample(query), None, choosing.seed_of(name, query.rater)
        learnt, _ = self.learner.get(name)
        if learnt is not None and learnt.head is not None and len(sample.vectors):
            scores = learnt.scores if sample is learnt.sample else learnt.head(sample.vectors).astype(np.float64)
        found = choosing.pairs(sample.keys, np.arange(len(sample.keys)), scores, seen, query.count, seed)
        shown = ((self.shown(a), self.shown(b)) for a, b in found)
        return [(a, b) for a, b in shown if a is not None and b is not None]

    def _telling(self, name: str, query: NextQuery, rated: set[str]) -> list[str]:
        vectors, sample = self.kept(), self._sample(query)
        known = vectors.images(sorted(rated))
        known = np.unique(known[known >= 0])
        rows = np.flatnonzero(~np.isin(sample.images, known))
        learnt, _ = self.learner.get(name)
        chosen = choosing.most_telling(learnt, vectors.vectors(known)[0], sample.vectors[rows], query.count)
        return [sample.keys[row] for row in rows[chosen]]

    def _around(self, query: NextQuery, most: int) -> list[str]:
        explorer = self.folder.explorer
        values, rows = explorer.values(query.column), self._rows(query.selection)
        rows = np.arange(len(values)) if rows is None else rows
        return [explorer.key(int(row)) for row in choosing.around(values[rows], rows, query.value, most)]

    def _random(self, seed: int, query: NextQuery) -> Iterator[str]:
        """Keys in a random order, the same for every rater: so several rate the same images, and it shows how far they
        agree. Images without a vector are left out, where there are vectors: no head can learn from them."""
        explorer, vectors = self.folder.explorer, self._kept_or_none()
        rows = self._rows(query.selection)
        if vectors is not None and rows is None:
            images = None if self.data.url is None else self.vectors()[1].images  # each file of others would be fetched
            order = choosing.shuffled(vectors.count if images is None else len(images), seed)
            while some := list(islice(order, query.count + 20)):
                yield from vectors.keys(np.array(some) if images is None else images[some])
            return
        order = choosing.shuffled(explorer.count if rows is None else len(rows), seed)
        while some := list(islice(order, query.count + 20)):
            keys = [explorer.key(int(row)) for row in (some if rows is None else rows[some])]
            if vectors is not None:
                keys = [key for key, image in zip(keys, vectors.images(keys), strict=True) if image >= 0]
            yield from keys

    def _rows(self, selection: str) -> Rows | None:
        """The rows that a live selection keeps; None where all are meant."""
        if not selection:
            return None
        try:
            return np.flatnonzero(self.folder.explorer.selection(selection).kept)
        except KeyError:
            raise HTTPException(404, f"there is no selection {selection}, or no longer: make it again") from None

    def _sample(self, query: NextQuery) -> VectorSample:
        """Images to choose from: those of the sample of all, or some of a selection."""
        if not query.selection and self._kept_or_none() is not None:
            return self.vectors()[1]
        with self._lock:
            if (found := self._of_selections.get(query.selection)) is not None:
                return found
        vectors = self._kept_or_none()
        keys = list(islice(self._random(choosing.seed_of(query.selection), query), choosing.POOL))
        if vectors is None:
            return VectorSample(np.full(len(keys), -1), keys, np.zeros((0, 0), np.float16))
        found = VectorSample.at(vectors, np.sort(vectors.images(keys)))
        with self._lock:
            self._of_selections[query.selection] = found
            while len(self._of_selections) > _SELECTIONS:
                self._of_selections.popitem(last=False)
        return found

    # ---------------------------------------------------------------------------------------------- what is asked

    def shown(self, key: str) -> ShownImage | None:
        """An image by its key; None where there is none, or it must not be seen."""
        try:
            found = self.folder.images.find(key)
        except KeyError:
            return None
        caption, snapshot = "", self.folder.explorer.snapshot_or_none
        with contextlib.suppress(KeyError):
            caption = (snapshot.rows.caption(snapshot.row(key)) if snapshot else None) or ""
        return ShownImage(key, caption, found.blurred)

    def _shown(self, keys: Iterable[str]) -> Iterator[ShownImage]:
        return (image for key in keys if (image := self.shown(key)) is not None)

    def _kept_or_none(self) -> KeptVectors | None:
        try:
            return self.kept()
        except UserError:
            return None

    def kept(self) -> KeptVectors:
        """The folder's vectors; UserError where there are none."""
        from curate.sources.kept_vectors import KeptVectors

        with self._opening:
            if self._opened is None or time.monotonic() - self._looked > _LOOK:
                if self._opened is None or self._opened[0] != self._signature(self._opened[1]):
                    kept = KeptVectors(str(self.data))
                    self._opened = self._signature(kept), kept
                    with self._lock:
                        self._of_selections.clear()
                self._looked = time.monotonic()
            return self._opened[1]

    def vectors(self) -> tuple[KeptVectors, VectorSample]:
        """They and a sample of them in memory, which is read at first: seconds where there are millions."""
        with self._sampling:
            kept = self.kept()
            if self._sampled is None or self._sampled[0] is not kept:
                self._sampled = kept, VectorSample.of(kept)
            return self._sampled

    def _signature(self, kept: KeptVectors) -> str:
        """What is another when vectors were made anew, or what hides images, or there are other columns, which may."""
        data, shards = self.data, self.data.shards(self.data.embedded_record)
        records = [data.embedded_record(shard) for shard in shards]
        for table in kept.hiding:
            records += [data.annotations_record(table, shard) for shard in shards]
        return digest([[data.store.stamp(record) for record in records], data.annotated()])

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
