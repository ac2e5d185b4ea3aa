"""The JSON API of the page to rate on. Nothing of it is there where a studio is to be looked at only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import fastapi
from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from aesthetic.errors import UserError
from studio.explore.api import Folder
from studio.rate.files import NAME, RatingLog, RatingSet, Row, SetKind
from studio.rate.learning import METRICS
from studio.rate.service import How, NextQuery, RatingService, ShownImage

api = APIRouter(prefix="/api")
writing = APIRouter(prefix="/api")

Name = Annotated[str, fastapi.Path(pattern=f"^{NAME}$")]
Key = Annotated[str, Field(min_length=1, max_length=30)]
Rater = Annotated[str, Field(min_length=1, max_length=40, description="who rates")]
Finite = Annotated[float, Field(allow_inf_nan=False)]


HeadState = Literal["few", "fitting", "ready", "failed"]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SetView(BaseModel):
    """A set of ratings."""

    name: str
    kind: SetKind
    scale: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        description="the lowest and the highest score; null for other kinds"
    )
    concept: str = Field(description="what is judged, in words")
    count: int = Field(description="ratings in it")
    images: int = Field(description="images that have any")
    raters: dict[str, int] = Field(description="who rated how often")
    file: str = Field(description="where they are: what `tastemaker fit` reads")
    command: str = Field(description="what fits a head to them in a terminal")


class SetsView(BaseModel):
    """The sets of ratings of the data folder."""

    sets: list[SetView]


class NewSet(_Body):
    """A set of ratings to begin."""

    name: str = Field(pattern=f"^{NAME}$", description="lower case letters, digits and _: its column's name, too")
    kind: SetKind
    scale: tuple[Finite, Finite] | None = Field(default=None, description="of scores; 1 to 7 where none is given")
    concept: str = Field(default="", max_length=200)


class RatedImage(BaseModel):
    """An image to rate."""

    key: str
    caption: str = ""
    blurred: bool = False

    @staticmethod
    def of(image: ShownImage) -> RatedImage:
        return RatedImage(key=image.key, caption=image.caption, blurred=image.blurred)


class NextView(BaseModel):
    """What to rate next, the first one first; fewer than asked for where there are no more."""

    images: list[RatedImage] | None = Field(default=None, description="of scores and labels")
    pairs: list[tuple[RatedImage, RatedImage]] | None = None


class NewRating(_Body):
    """A rating: an image and its score or label, or two images, a and b, and which of them is chosen."""

    rater: Rater
    key: Key | None = None
    score: Finite | None = None
    label: Literal["yes", "no"] | None = None
    a: Key | None = None
    b: Key | None = None
    choice: Literal["a", "b", "tie"] | None = None


class SavedView(BaseModel):
    """A rating is on the disk."""

    count: int = Field(description="ratings in the set now")
    saved: Literal[True] = True


class UndoRequest(_Body):
    """Whose last rating is taken back; or that of an image, or of two."""

    rater: Rater
    key: Key | None = None
    a: Key | None = None
    b: Key | None = None


class RatingView(BaseModel):
    """A rating that was given."""

    rater: str
    key: str | None = None
    score: float | None = None
    label: str | None = None
    a: str | None = None
    b: str | None = None
    choice: str | None = None


class UndoneView(BaseModel):
    """What was taken back."""

    undone: RatingView | None = Field(description="null where there was nothing")
    restored: RatingView | None = Field(description="what the same rater had said before, and is in the set again")
    count: int


class EstimateView(BaseModel):
    """A figure, and its 95% interval where there is one."""

    value: float | None
    low: float | None
    high: float | None


class ScoredImage(BaseModel):
    """An image that nobody has rated, and what the head says of it."""

    key: str
    score: float
    blurred: bool = False


class HeadView(BaseModel):
    """The head that learns from a set of ratings."""

    state: HeadState = Field(description="fitting: the figures are those before")
    error: str = Field(description="what there is too little of, or what failed")
    ratings: int = Field(description="that the figures are of")
    spearman: EstimateView | None = None
    auroc: EstimateView | None = None
    accuracy: EstimateView | None = None
    ceiling: float | None = Field(default=None, description="no head can correlate more than that with these ratings")
    worth_raters: float | None = Field(default=None, description="as many raters' mean would agree with all as well")
    more: int | None = Field(default=None, description="so many more ratings would halve the interval")
    verdict: str = ""
    best: list[ScoredImage] = []
    worst: list[ScoredImage] = []
    of: int = Field(default=0, description="images looked at that nobody has rated")
    seconds: float = Field(default=0, description="that it took")
    command: str = Field(description="the `tastemaker fit` that makes this very head")
    apply: str = Field(description="what makes a column of it then")
    column: str | None = Field(default=None, description="the column, once it is there")


@writing.get("/ratings")
def ratings(folder: Folder) -> SetsView:
    """The sets of ratings that there are."""
    service = folder.ratings
    return SetsView(sets=[_set_view(service, service.log(name)) for name in service.names()])


@writing.post("/ratings", status_code=201)
def make(folder: Folder, body: NewSet) -> SetView:
    """Begin a set of ratings."""
    scale = body.scale
    if body.kind == "scores":
        scale = scale or (1.0, 7.0)
        if not scale[0] < scale[1]:
            raise UserError("scale: the lower end comes first")
    elif scale is not None:
        raise UserError(f"scale: {body.kind} have none")
    about = RatingSet(body.name, body.kind, scale, body.concept.strip())
    return _set_view(folder.ratings, folder.ratings.make(about))


@writing.get("/ratings/{name}/next")
def next_ones(
    folder: Folder,
    name: Name,
    rater: Annotated[str, Query(min_length=1, max_length=40)],
    how: How = "random",
    count: Annotated[int, Query(ge=1, le=200)] = 20,
    selection: Annotated[str, Query(max_length=100)] = "",
    column: Annotated[str, Query(max_length=200)] = "",
    value: Annotated[float, Query(allow_inf_nan=False)] = 0.0,
) -> NextView:
    """Images, or pairs, that a rater has not rated yet: at random; around a cut, a column and its value; or those that
    teach most. Of a live selection's rows, where one is given."""
    service, query = folder.ratings, NextQuery(rater.strip(), how, count, selection, column, value)
    if service.log(name).about.kind == "pairs":
        found = service.next_pairs(name, query)
        return NextView(pairs=[(RatedImage.of(a), RatedImage.of(b)) for a, b in found])
    return NextView(images=[RatedImage.of(image) for image in service.next_images(name, query)])


@writing.post("/ratings/{name}")
def rate(folder: Folder, name: Name, body: NewRating) -> SavedView:
    """Rate an image, or two against each other. The answer says that it is on the disk."""
    about = folder.ratings.log(name).about
    return SavedView(count=folder.ratings.rate(name, _row(about, body)))


@writing.post("/ratings/{name}/undo")
def undo(folder: Folder, name: Name, body: UndoRequest) -> UndoneView:
    """Take back a rater's last rating, or that of an image, or of two."""
    about = folder.ratings.log(name).about
    images = [key for key in (body.key, body.a, body.b) if key is not None]
    row, before, count = folder.ratings.undo(name, body.rater.strip(), images)
    return UndoneView(undone=_rating_view(about, row), restored=_rating_view(about, before), count=count)


@writing.get("/ratings/{name}/head")
def head(folder: Folder, name: Name) -> HeadView:
    """How good the head is that learns from these ratings, and what it says of images that nobody has rated."""
    service = folder.ratings
    log = service.log(name)
    learnt, busy = service.head(name)
    command, apply = service.commands(log, learnt.kind if learnt is not None and learnt.kind else log.about.kind)
    common: dict[str, Any] = {"command": command, "apply": apply, "column": service.column(name)}
    if learnt is None:
        return HeadView(state="fitting", error="", ratings=0, **common)
    state: HeadState = "fitting" if busy else "ready" if learnt.head is not None else "few" if learnt.few else "failed"
    if learnt.kind:
        common[METRICS[learnt.kind]] = EstimateView(**learnt.metric)
    return HeadView(
        state=state,
        error=learnt.error,
        ratings=learnt.ratings,
        ceiling=learnt.ceiling,
        worth_raters=learnt.worth,
        more=learnt.more,
        verdict=learnt.verdict,
        best=_scored(service, learnt.best),
        worst=_scored(service, learnt.worst),
        of=learnt.of,
        seconds=learnt.seconds,
        **common,
    )


def _scored(service: RatingService, found: Iterable[tuple[str, float]]) -> list[ScoredImage]:
    shown = ((service.shown(key), score) for key, score in found)
    return [ScoredImage(key=i.key, score=score, blurred=i.blurred) for i, score in shown if i is not None]


def _row(about: RatingSet, body: NewRating) -> Row:
    """A rating as its set's file has it; UserError where it does not go with what is asked there."""
    fields = {"scores": ("key", "score"), "labels": ("key", "label"), "pairs": ("a", "b", "choice")}[about.kind]
    given = body.model_dump(exclude_none=True, exclude={"rater"})
    if given.keys() != set(fields):
        raise UserError(f"{about.name} holds {about.kind}: a rating has rater, {', '.join(fields)}, and nothing else")
    score = None if body.score is None else repr(body.score).removesuffix(".0")
    return (*(str(given[field]) for field in fields[:-1]), score or str(given[fields[-1]]), body.rater.strip())


def _rating_view(about: RatingSet, row: Row | None) -> RatingView | None:
    match about.kind, row:
        case _, None:
            return None
        case "scores", (key, score, rater):
            return RatingView(rater=rater, key=key, score=float(score))
        case "labels", (key, label, rater):
            return RatingView(rater=rater, key=key, label=label)
        case _, (a, b, choice, rater):
            return RatingView(rater=rater, a=a, b=b, choice=choice)
    raise AssertionError(row)


def _set_view(service: RatingService, log: RatingLog) -> SetView:
    about, rows = log.about, log.rows()
    return SetView(
        name=about.name,
        kind=about.kind,
        scale=None if about.scale is None else [*about.scale],
        concept=about.concept,
        count=len(rows),
        images=len({key for row in rows for key in row[:-2]}),
        raters=log.raters(),
        file=service.data.shown(log.path),
        command=service.commands(log, about.kind)[0],
    )
