"""What a head is fitted to: rated, labelled or compared images with their vectors, checked and in one order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from aesthetic.chunks import blocks
from aesthetic.heads import HeadError, check_name, check_norms, check_scale
from aesthetic.space import Space
from aesthetic.splits import Groups, groups_of

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

P = ParamSpec("P")
T = TypeVar("T")

FEW = 10
USUAL_NOISE = 5.0
_WORTH_SHARING = 1_000_000  # numbers


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """n rated images.

    vectors: (n, d) of any float type, of one space.
    scores: (n,), in the ratings' units; for labels 0 or 1.
    ids: (n,) what the images are called; by default a digest of the vector.
    groups: (n,) what belongs together (a photographer, a prompt, a theme) and is never on both sides of a split; by
        default, and where it is None or NaN, each image is its own group. Near-duplicates join their groups either way.
    votes: (n,) how many people rated it, for its weight. sd: (n,) the sample standard deviation of theirs.
    sources: (n,) where the rating is from; each source has a scale of its own.
    metadata: what else is known of each image, by name: numbers or words. Never learnt from: it shows leaks.
    sha256, phash: (n,) hex digests of the file and of what it looks like, or None: to find copies.
    """

    vectors: npt.NDArray[Any]
    scores: Array
    ids: Sequence[str] | None = None
    groups: Sequence[Any] | None = None
    votes: Array | None = None
    sd: Array | None = None
    sources: Sequence[str] | None = None
    metadata: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    sha256: Sequence[str | None] | None = None
    phash: Sequence[str | None] | None = None


@dataclass(frozen=True, eq=False)
class PreparedExamples:
    """Examples whose parts fit together, sorted by what is in them: the order as given then changes no bit."""

    x: npt.NDArray[Any]
    y: Array
    w: Array
    votes: Array
    sd: Array
    groups: Groups
    sources: list[str]
    metadata: dict[str, list[Any]]
    ids: list[str]
    order: Ints  # row i here is row order[i] of the examples

    def group_names(self, rows: npt.NDArray[np.bool_]) -> list[str]:
        """The groups of some rows."""
        return [self.groups.names[i] for i in np.flatnonzero(rows)]

    def as_given(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Values of these rows in the order of the examples."""
        back = np.empty_like(values)
        back[self.order] = values
        return back


def weights_of(votes: Array, sd: Array, scores: Array) -> Array:
    """How much each rating counts: n / (n + k), its precision beside an error of the head that votes don't lessen.

    The mean of n votes errs by s^2 / n, and the head by something of its own besides, so the best weights are
    1 / (h^2 + s^2 / n): k = s^2 / h^2. h^2 is taken as half of the variance of the scores (the rest is what heads
    explain, about), s^2 from the spread of the votes where that is known. Without it k = 5, as for AVA's (2 / .27 = 7)
    and OASIS's ratings (2 / .5 = 4). So ten votes count a little more than five, and not twice.
    """
    known = np.isfinite(sd)
    half = float(np.var(scores)) / 2
    k = float(np.mean(sd[known] ** 2)) / half if known.any() and half > 0 else USUAL_NOISE
    return votes / (votes + k)


def limit_threads(fit: Callable[P, T]) -> Callable[P, T]:
    """A fit with one thread for BLAS and trees where there is little to do: waking others costs more, on a busy machine
    ten times more. The first argument is examples or vectors."""

    @wraps(fit)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        from threadpoolctl import threadpool_limits

        vectors = np.asarray(getattr(args[0], "vectors", args[0]))
        with threadpool_limits(1 if vectors.size < _WORTH_SHARING else None):
            return fit(*args, **kwargs)

    return run


def check_scores(scores: Array, name: str) -> None:
    """Raise HeadError where there are too few scores to fit a head to, or all are the same."""
    n = len(scores)
    if n > 1 and np.ptp(scores) == 0:
        raise HeadError(f"{name}: every score is {scores[0]:g}; there is nothing to learn")
    if n < FEW:
        raise HeadError(f"{name}: {n} ratings; at least {FEW} are needed to fit a head, and 30 to say how good it is")


def check_vectors(x: npt.NDArray[Any], space: Space, name: str) -> None:
    """Raise HeadError, naming the row, where these are no vectors (n, d) of the space: of its norm, and finite."""
    if x.ndim != 2 or x.shape[1] != space.dim:
        raise HeadError(f"{name}: vectors of shape {x.shape}; {space.encoder} gives (n, {space.dim})")
    if not np.issubdtype(x.dtype, np.floating):
        raise HeadError(f"{name}: vectors are of a float type, not {x.dtype}")
    finite = np.isfinite(x).all(1)
    if not finite.all():
        raise HeadError(f"{name}: the vector of row {int((~finite).argmax())} is not finite")
    for start, _, squares in blocks(x):
        check_norms(name, space, squares, start)


def prepare(examples: Examples, space: Space, name: str, scale: tuple[float, float] | None) -> PreparedExamples:
    """Check and sort. Raises HeadError, naming the row, where parts do not fit together or a value makes no sense.

    With several sources only the first of them, by name, must lie within `scale`; None asks nothing.
    """
    x = np.asarray(examples.vectors)
    n = len(x)
    check_name(name)
    if scale is not None:
        check_scale(name, scale)
    y = np.asarray(examples.scores, np.float64)
    votes = np.full(n, np.nan) if examples.votes is None else np.asarray(examples.votes, np.float64)
    sd = np.full(n, np.nan) if examples.sd is None else np.asarray(examples.sd, np.float64)
    parts = {"scores": y, "votes": votes, "sd": sd, "ids": examples.ids, "groups": examples.groups}
    parts |= {"sources": examples.sources, "sha256": examples.sha256, "phash": examples.phash, **examples.metadata}
    for what, values in parts.items():
        if values is not None and len(values) != n:
            raise HeadError(f"{name}: {n} vectors and {len(values)} {what}")
    check_vectors(x, space, name)
    if examples.votes is not None and not (np.isfinite(votes) & (votes > 0)).all():
        raise HeadError(f"{name}: a number of votes is not positive; leave out the rows that shall not count")
    w = np.ones(n) if examples.votes is None else weights_of(votes, sd, y)
    sources = ["" if v is None else str(v) for v in examples.sources or [""] * n]
    low, high = scale if scale is not None and len(set(sources)) == 1 else (-np.inf, np.inf)
    wrong = ~((y >= low) & (y <= high)) | ~np.isfinite(y)
    if wrong.any():
        row = int(wrong.argmax())
        raise HeadError(f"{name}: the score of row {row} is {y[row]:g}, outside the scale {low:g} to {high:g}")
    check_scores(y, name)

    given = None if examples.ids is None else [str(v) for v in examples.ids]
    ids = given or [hashlib.sha256(np.ascontiguousarray(row).tobytes()).hexdigest() for row in x]
    order = np.array(sorted(range(n), key=lambda i: (ids[i], sources[i], y[i], w[i])), np.int64)

    def sort(values: Sequence[Any] | None) -> list[Any] | None:
        return None if values is None else [values[i] for i in order]

    ids = [ids[i] for i in order]
    x = x[order]
    groups = groups_of(
        ids,
        sort(examples.groups),
        vectors=x if space.norm == "l2" else None,
        sha256=sort(examples.sha256),
        phash=sort(examples.phash),
    )
    return PreparedExamples(
        x=x,
        y=y[order],
        w=w[order],
        votes=votes[order],
        sd=sd[order],
        groups=groups,
        sources=[sources[i] for i in order],
        metadata={k: sort(v) or [] for k, v in examples.metadata.items()},
        ids=ids,
        order=order,
    )
