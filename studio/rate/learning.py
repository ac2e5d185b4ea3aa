"""The head that learns while people rate: fitted anew in the background, from the newest ratings, one fit at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from aesthetic.errors import UserError
from aesthetic.heads import Head, HeadError
from studio.errors import NotHere
from studio.rate.files import RatingLog, RatingSet

if TYPE_CHECKING:
    from curate.sources.kept_vectors import KeptVectors

LOOKED_AT = 100_000
"""Images that the new head is asked about: all, or where there are more, that many of them, drawn once."""
FILES_THERE = 16
"""Files of vectors that are fetched from an object store to draw images from; each has some 15 MB."""
_REST = 0.5, 2.0  # seconds, at least and at most
SHOWN = 12
"""Of the best and of the worst."""

METRICS = {"scores": "spearman", "labels": "auroc", "pairs": "accuracy"}


@dataclass(frozen=True)
class LearntHead:
    """A head, and how good it is; or why there is none yet.

    version: of the ratings that it was fitted to; -1 where these were not looked at. kind: what `tastemaker fit` took
    these for: labels of which several raters' differ are scores. best, worst: (key, score) of images that nobody has
    rated, `of` so many. rated (n, d): the vectors learnt from; penalty: the ridge's.
    """

    version: int
    ratings: int
    error: str = ""
    few: bool = False  # whether more ratings are all that it takes
    kind: str = ""
    metric: dict[str, Any] = field(default_factory=dict)
    ceiling: float | None = None
    worth: float | None = None
    more: int | None = None
    verdict: str = ""
    best: tuple[tuple[str, float], ...] = ()
    worst: tuple[tuple[str, float], ...] = ()
    of: int = 0
    seconds: float = 0.0
    head: Head | None = None
    sample: VectorSample | None = None  # that it was asked about
    scores: np.ndarray | None = None  # of the sample's images, NaN for those that are rated
    rated: np.ndarray | None = None
    penalty: float | None = None
    made: float = field(default_factory=time.monotonic)

    @property
    def age(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self.made


@dataclass(frozen=True)
class VectorSample:
    """Vectors of the folder's images, of all or of some that were drawn at random, in memory."""

    images: np.ndarray  # (m,), as KeptVectors counts them, ascending
    keys: list[str]  # theirs
    vectors: np.ndarray  # (m, d) float16

    @staticmethod
    def of(vectors: KeptVectors) -> VectorSample:
        """All, or LOOKED_AT of them; on an object store, from which files are fetched whole, of FILES_THERE alone."""
        if vectors.data.url is None:
            return VectorSample.at(vectors, vectors.draw(np.zeros(0, np.int64), LOOKED_AT))
        return VectorSample.at(vectors, vectors.draw_in_files(LOOKED_AT, FILES_THERE))

    @staticmethod
    def at(vectors: KeptVectors, images: np.ndarray) -> VectorSample:
        """These, but for those whose vector is not finite."""
        found = vectors.read_vectors(images)
        if not (whole := np.isfinite(found).all(1)).all():
            images, found = images[whole], found[whole]
        return VectorSample(images, vectors.keys(images), found)


def learn(log: RatingLog, vectors: KeptVectors, sample: VectorSample) -> LearntHead:
    """The head of all ratings of a set as they are now: the same as `tastemaker fit` makes of the file, bit for bit."""
    import pandas  # noqa: F401 - a second, in which nobody could rate if the file were held already

    from aesthetic.fit import to_halve
    from aesthetic.ratings import read_ratings
    from curate.sources.rated import fit_rated, join_ratings

    began = time.monotonic()
    with log.held():
        version, count = log.version, len(log.rows())
        about, path = log.about, log.path
        try:
            ratings = read_ratings(path)
        except HeadError as e:
            return LearntHead(version, count, str(e) if count else "nothing is rated yet", few=not count)
    try:
        rated = join_ratings(ratings, vectors, about.name)
        fitted = fit_rated(rated, about.name, scale=scale_of(about, ratings.kind), quick=True)
    except HeadError as e:
        return LearntHead(version, count, str(e).removeprefix(f"{about.name}: "), few=True)
    except UserError as e:
        return LearntHead(version, count, str(e))
    report = fitted.report
    noise = report.get("noise") or {}
    scores = fitted.head(sample.vectors).astype(np.float64)
    scores[np.isin(sample.images, rated.indices)] = np.nan
    order = np.argsort(-scores, kind="stable")[: int(np.isfinite(scores).sum())]

    def named(rows: np.ndarray) -> tuple[tuple[str, float], ...]:
        return tuple((sample.keys[row], float(scores[row])) for row in rows)

    return LearntHead(
        version=version,
        ratings=count,
        kind=ratings.kind,
        metric=report["metrics"][METRICS[ratings.kind]],
        ceiling=noise.get("ceiling"),
        worth=noise.get("worth_raters"),
        more=to_halve(report),
        verdict=report["verdict"],
        best=named(order[:SHOWN]),
        worst=named(order[::-1][:SHOWN]),
        of=len(order),
        seconds=time.monotonic() - began,
        head=fitted.head,
        sample=sample,
        scores=scores,
        rated=rated.vectors,
        penalty=fitted.penalty,
    )


def scale_of(about: RatingSet, kind: str) -> tuple[float, float] | None:
    """The scale that `tastemaker fit` is to be told. Scores that are 0 and 1 and nothing else it takes for labels."""
    return about.scale if kind == "scores" else None


class HeadLearner:
    """A thread that fits a set's head whenever its ratings have changed; what comes meanwhile is taken together. It
    rests for as long as it has worked, half a second at least, so that a machine of one core answers, too.

    open_vectors: the folder's vectors and a sample of them; called before each fit, UserError where there are none.
    """

    def __init__(
        self,
        open_vectors: Callable[[], tuple[KeptVectors, VectorSample]],
        on_fault: Callable[[Exception], None],
    ) -> None:
        self._open, self._on_fault = open_vectors, on_fault
        self._changed = threading.Condition()
        self._wanted: dict[str, RatingLog] = {}
        self._learnt: dict[str, LearntHead] = {}
        self._running = ""
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def want(self, log: RatingLog) -> None:
        """Have the head of a set fitted to its ratings as they are, soon."""
        with self._changed:
            if self._stopped.is_set():
                return
            self._wanted[log.about.name] = log
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="learn", daemon=True)
                self._thread.start()
            self._changed.notify()

    def get(self, name: str) -> tuple[LearntHead | None, bool]:
        """The last head of a set, and whether a newer one is under way."""
        with self._changed:
            return self._learnt.get(name), name in self._wanted or self._running == name

    def stop(self) -> None:
        """Begin nothing more."""
        with self._changed:
            self._stopped.set()
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._wanted and not self._stopped.is_set():
                    self._changed.wait()
                if self._stopped.is_set():
                    return
                name = next(iter(self._wanted))
                log, self._running = self._wanted.pop(name), name
            began = time.monotonic()
            found = self._fit(log)
            took = time.monotonic() - began
            with self._changed:
                self._learnt[name], self._running = found, ""
            self._stopped.wait(min(max(took, _REST[0]), _REST[1]))

    def _fit(self, log: RatingLog) -> LearntHead:
        try:
            return learn(log, *self._open())
        except (UserError, NotHere, OSError) as e:  # no vectors, say, or files that are being written
            return LearntHead(-1, 0, str(e))
        except Exception as e:
            self._on_fault(e)
            return LearntHead(-1, 0, f"an error of the studio's own: {type(e).__name__}. Its log says where.")
