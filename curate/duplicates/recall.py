"""How many of the near pairs a search found: a random sample of images is compared with all, by brute force."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from curate.duplicates.rows import Array, Table, gather_rows, hashes_agree, keep_array, read_rows
from curate.duplicates.vectors import PAIR, gather
from curate.encoders.embed import take_vectors

SAMPLE = 1000
"""Images that are compared with all, at most."""

SHARE = 0.05
"""Of the comparisons of the whole search that the sample may cost, about."""

_LEAST = 100  # images of the sample, where there are so many
_FREE = {"cosine": 1e9, "bits": 1e10}  # comparisons that take some seconds: made in any case
_NEIGHBOURS = 1024  # of an image of the sample, about: of images by the thousand that look alike some will do
_TASK_IMAGES = 200_000
_BLOCK = 4096
_SLACK = 1e-5  # by how much a product of matrices may miss that of two rows

Measure = Literal["cosine", "bits"]


@dataclass(frozen=True)
class BruteForce:
    """A task: the sample against some shards (positions first to last, not included)."""

    table: Table
    work: str
    config: str
    measure: Measure
    first: int
    last: int

    @property
    def path(self) -> Path:
        return self.table.index / self.work / f"recall-{self.measure}-{self.first:05d}.npy"


def measured_recall(
    table: Table,
    work: str,
    config: str,
    measure: Measure,
    eligible: Array,
    cost: float,
    found: Array,
    group: Array,
    run_map: Callable[[Callable[[Any], Any], Sequence[Any]], Any],
) -> dict[str, Any]:
    """The share of the sample's neighbours within the threshold that were found: in a pair, or in one group.

    sample: images;  with_neighbours: how many of them have any;  neighbours, found: pairs;  recall, low, high: the
    share and its 95% interval (Wilson's, of as many independent images as have neighbours), None where none has any.

    eligible: (n,) bool, which images take part.    cost: comparisons of the whole search.    found: PAIRs.
    group: (n,) the group of each image, -1 for those alone.
    """
    images = np.flatnonzero(eligible)
    size = int(min(SAMPLE, len(images), max(_LEAST, max(SHARE * cost, _FREE[measure]) / max(1, len(images)))))
    (marks,) = read_rows(table, "mark")
    sample = np.sort(images[np.argsort(marks[images], kind="stable")[:size]])
    keep_array(table.data, table.index / work / f"sample-{measure}.npy", lambda: sample, config=config)

    def compared() -> Array:  # here, once: it lies in all shards
        return gather(table, sample) if measure == "cosine" else gather_rows(table, sample)["pdq"]

    keep_array(table.data, table.index / work / f"compared-{measure}.npy", compared, config=config)
    keep_array(table.data, table.index / work / f"eligible-{measure}.npy", lambda: eligible, config=config)
    tasks, first = [], 0
    for at in range(len(table.shards)):
        if sum(table.counts[first : at + 1]) >= _TASK_IMAGES or at == len(table.shards) - 1:
            tasks.append(BruteForce(table, work, config, measure, first, at + 1))
            first = at + 1
    for _ in run_map(compare_sample, tasks):
        pass
    true = np.concatenate([np.zeros(0, PAIR), *(table.load(task.path) for task in tasks)])
    one, other, n = true["a"], true["b"], len(eligible)
    keys = found["a"] * n + found["b"]
    wanted = np.minimum(one, other) * n + np.maximum(one, other)
    place = np.minimum(np.searchsorted(keys, wanted), max(0, len(keys) - 1))
    listed = keys[place] == wanted if len(keys) else np.zeros(len(wanted), np.bool_)
    hit = listed | ((group[one] >= 0) & (group[one] == group[other]))
    with_neighbours = len(np.unique(one))
    share = float(hit.mean()) if len(hit) else None
    low, high = wilson(share, with_neighbours) if share is not None else (None, None)
    return {
        "sample": size,
        "with_neighbours": with_neighbours,
        "neighbours": len(hit),
        "found": int(hit.sum()),
        "recall": None if share is None else round(share, 6),
        "low": low,
        "high": high,
    }


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of n independent ones, to six digits."""
    z2 = 1.959964**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2) / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return round(max(0.0, middle - half), 6), round(min(1.0, middle + half), 6)


def compare_sample(task: BruteForce) -> None:
    """A task: write the pairs (image of the sample, its neighbour) among its shards."""
    compare = _by_cosine if task.measure == "cosine" else _by_bits

    def make() -> Array:
        table, work = task.table, task.table.index / task.work
        sample, ours = (table.load(work / f"{what}-{task.measure}.npy") for what in ("sample", "compared"))
        eligible = table.load(work / f"eligible-{task.measure}.npy", mapped=True)
        found = [np.zeros(0, PAIR)]
        if len(sample):
            for at in range(task.first, task.last):
                rows = np.flatnonzero(eligible[task.table.offsets[at] : task.table.offsets[at + 1]])
                found += compare(task.table, at, rows, sample, ours)
        return np.concatenate(found)

    keep_array(task.table.data, task.path, make, config=task.config)


def _by_cosine(table: Table, at: int, rows: Array, sample: Array, ours: Array) -> list[Array]:
    cosine, found = table.modes.cosine, []
    assert cosine is not None
    ours = ours.astype(np.float32)
    vectors = take_vectors(table.data, table.shards[at]) if len(rows) else None
    most = max(2, _NEIGHBOURS // sum(-(-count // _BLOCK) for count in table.counts))
    for start in range(0, len(rows), _BLOCK):
        assert vectors is not None
        part = rows[start : start + _BLOCK]
        theirs = vectors[part].astype(np.float32)
        i, j = np.nonzero(ours @ theirs.T >= cosine - _SLACK)
        some = _spread(np.searchsorted(i, np.arange(len(ours) + 1)), most)
        i, j = i[some], j[some]
        exact = np.einsum("ij,ij->i", ours[i], theirs[j])
        one, other = sample[i], table.offsets[at] + part[j]
        found.append(_pairs(one, other, exact, (exact >= cosine) & hashes_agree(table, one, other)))
    return found


def _by_bits(table: Table, at: int, rows: Array, sample: Array, ours: Array) -> list[Array]:
    words = table.load(table.rows(table.shards[at]), mapped=True)["pdq"][rows].T.copy()
    found = []
    most = max(4, _NEIGHBOURS // len(table.shards))
    for image, hash in zip(sample.tolist(), ours, strict=True):
        bits = sum(np.bitwise_count(word ^ own) for word, own in zip(words, hash, strict=True))
        near = np.flatnonzero(bits <= table.modes.pdq)
        near = near[_spread(np.array([0, len(near)]), most)]
        found.append(_pairs(np.full(len(near), image), table.offsets[at] + rows[near], bits[near], True))
    return found


def _spread(edges: Array, most: int) -> Array:
    """Of runs of indices, from one edge to the next, at most so many of each, evenly spread: their indices."""
    size = np.diff(edges)
    run = np.repeat(np.arange(len(size)), size)
    rank = np.arange(len(run)) - edges[run]
    share = np.maximum(size, most)[run]
    return np.flatnonzero((rank + 1) * most // share > rank * most // share)


def _pairs(one: Array, other: Array, distance: Array, keep: Any) -> Array:
    found = np.empty(len(one), PAIR)
    found["a"], found["b"], found["distance"] = one, other, distance
    return found[keep & (one != other)]


def recall_sentence(facts: dict[str, Any], what: str) -> str:
    """What a record's notes say of it: `what` are the pairs, such as "pairs with a cosine of 0.96 or more"."""
    if facts["recall"] is None:
        return f"Recall: {facts['sample']:,} images taken at random are in no {what}, so it could not be measured."
    return (
        f"Recall: {_percent(facts['recall'])} of {what} were found (95% interval {_percent(facts['low'])} to "
        f"{_percent(facts['high'])}): {facts['neighbours']:,} neighbours of {facts['with_neighbours']:,} images, "
        f"of {facts['sample']:,} taken at random and compared with all."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
