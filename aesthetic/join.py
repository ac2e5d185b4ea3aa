"""Which image a rating means: ids of rating files -> rows of a table of images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from aesthetic.heads import HeadError

if TYPE_CHECKING:
    import pandas as pd

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

NOT_FOUND, AMBIGUOUS = -1, -2
REASONS = {NOT_FOUND: "not found", AMBIGUOUS: "ambiguous"}

_URL, _SHA256 = "(?i)^https?://", "(?i)^[0-9a-f]{64}$"
_ENDING = r"(?i)\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic|heif|jxl)$"
_ROUND_THE_NAME = r"^(?s:.*)[/\\]|\.[^/\\]*$"  # folders, and what follows the first dot of the last part


def join(ids: Sequence[str], by: str, images: Mapping[str, Any] | pd.DataFrame) -> tuple[Rows, list[str]]:
    """Find rated images in a table of images.

    `images` offers columns out of key, path, url and sha256, of equal length. by="url" and by="sha256" look there. By
    "image" an id may be a key, a path (whatever its ./ and backslashes), a file name, or a stem: a name without the
    ending of an image file. Names and stems are those of paths, or of keys where no paths are offered. The way under
    which most ids are found is taken for all, the earlier one where two are equal. Ids that look like a URL or a sha256
    and are not found in this way are looked for there.

    Returns for each id its row in `images`, or -1, and the reason: "" where found, "not found", or "ambiguous": the id
    fits several images (unless they have one sha256: then it means the first), or it fits an image that an id of
    another folder or ending fits too, and at most one of them can mean it.

    Files that name images in different ways are best joined one by one. Raises HeadError where `images` has no column
    to look in.
    """
    offered = {c: _strings(images[c]) for c in ("key", "path", "url", "sha256") if c in images}
    if by not in ("image", "url", "sha256"):
        raise HeadError(f"images are joined by image, url or sha256, not by {by!r}")
    if not offered or (by != "image" and by not in offered):
        raise HeadError(f"ratings that name images by {by} cannot be joined to {', '.join(offered) or 'no column'}")
    if len({len(column) for column in offered.values()}) > 1:
        raise HeadError(f"columns of unequal length: {', '.join(f'{c} {len(v):,}' for c, v in offered.items())}")
    if "sha256" in offered:
        offered["sha256"] = pc.utf8_lower(offered["sha256"])
    same = offered.get("sha256")
    coded = _strings(ids).dictionary_encode()
    wanted = coded.dictionary
    found = _by_image(wanted, offered) if by == "image" else np.full(len(wanted), NOT_FOUND)
    for column, form in (("url", _URL), ("sha256", _SHA256)):
        if by == column:
            left = np.ones(len(wanted), bool)
        elif by == "image" and column in offered:
            left = (found == NOT_FOUND) & _looks_like(wanted, form)
        else:
            continue
        some = wanted.filter(pa.array(left))
        found[left] = _match(pc.utf8_lower(some) if column == "sha256" else some, offered[column], same)
    rows = found[coded.indices.to_numpy()]
    return np.maximum(rows, -1), [REASONS.get(row, "") for row in rows.tolist()]


class WantedImages:
    """The ids of ratings, to be looked for in tables of images that are too large for `join`.

    What `rows` leaves out, `join` finds for none of them: of a table without these rows it says the same.
    """

    def __init__(self, ids: Sequence[str], by: str) -> None:
        self.by, self._ids = by, _strings(ids).unique()
        self._sha256 = pc.utf8_lower(self._ids)
        self._parts = _first_of_name(_normal(self._ids)).unique()

    def rows(self, images: Mapping[str, Any], *, paths: bool) -> Mask:
        """Which rows an id may mean, (n,). paths: whether by="image" looks at parts of paths too, ten times as slow."""
        offered = {c: _strings(images[c]) for c in ("key", "path", "url", "sha256") if c in images}
        columns = ("key", "url", "sha256") if self.by == "image" else (self.by,)
        found = np.zeros(len(next(iter(offered.values()))), np.bool_)
        for column in (c for c in columns if c in offered):
            texts, wanted = offered[column], self._ids
            if column == "sha256":
                texts, wanted = pc.utf8_lower(texts), self._sha256
            found |= _mask(pc.is_in(texts, value_set=wanted))
        if self.by == "image" and paths:
            found |= _mask(pc.is_in(_first_of_name(offered.get("path", offered["key"])), value_set=self._parts))
        return found

    def are_keys(self, keys: Any) -> bool:
        """Whether every id is one of these keys, and only one: `join` looks no further then."""
        found = _strings(keys).filter(pc.is_in(_strings(keys), value_set=self._ids))
        return self.by == "image" and len(found) == len(self._ids) == len(found.unique())


def _by_image(wanted: pa.Array, offered: dict[str, pa.Array]) -> Rows:
    """The rows of distinct ids in the one way that finds most of them."""
    best = np.full(len(wanted), NOT_FOUND)
    paths = offered.get("path", offered.get("key"))
    if paths is None:
        return best
    same = offered.get("sha256")
    normal, paths = _normal(wanted), _normal(paths)
    ways: list[Callable[[], Rows]] = []
    if "key" in offered:
        ways.append(lambda: _match(wanted, offered["key"], same))
    if "path" in offered:
        ways.append(lambda: _match(normal, paths, same))
    ways.append(lambda: _by_part(_name, normal, paths, same))
    ways.append(lambda: _by_part(_stem, normal, paths, same))
    for way in ways:
        found = way()
        if (found >= 0).sum() > (best >= 0).sum() or (best == NOT_FOUND).all():
            best = found
        if (best >= 0).all():
            break
    return best


def _by_part(part: Callable[[pa.Array], pa.Array], wanted: pa.Array, paths: pa.Array, same: pa.Array | None) -> Rows:
    """Match by a part of the path. Not for URLs: their last part says little (image.jpg)."""
    found = _match(part(wanted), part(paths), same)
    found[_looks_like(wanted, _URL.replace("//", "/"))] = NOT_FOUND
    hit = np.flatnonzero(found >= 0)
    hit = hit[np.bincount(found[hit], minlength=1)[found[hit]] > 1] if len(hit) else hit
    ids = wanted.take(pa.array(hit))
    folders: dict[int, set[str]] = defaultdict(set)
    endings: dict[int, set[str]] = defaultdict(set)
    for row, whole, stem in zip(found[hit].tolist(), ids.to_pylist(), _stem(ids).to_pylist(), strict=True):
        folder, _, name = whole.rpartition("/")
        folders[row] |= {folder} - {""}
        endings[row] |= {name.removeprefix(stem).lower()} - {""}
    found[[i for i in hit.tolist() if len(folders[found[i]]) > 1 or len(endings[found[i]]) > 1]] = AMBIGUOUS
    return found


def _match(wanted: pa.Array, present: pa.Array, same: pa.Array | None) -> Rows:
    """The row where each wanted text stands: the first one where all that it stands in are the `same`."""
    coded = wanted.dictionary_encode()
    fits = pc.fill_null(pc.index_in(present, value_set=coded.dictionary), -1).to_numpy()
    rows = np.flatnonzero(fits >= 0)
    fits = fits[rows]
    first = np.full(len(coded.dictionary), NOT_FOUND)
    first[fits[::-1]] = rows[::-1]  # the last assignment counts
    again = rows != first[fits]
    rows, fits = rows[again], fits[again]
    if same is None:
        differ = np.ones(len(rows), bool)
    else:
        equal = pc.equal(same.take(pa.array(rows)), same.take(pa.array(first[fits])))
        differ = ~pc.fill_null(equal, False).to_numpy(zero_copy_only=False)
    first[fits[differ]] = AMBIGUOUS
    return first[coded.indices.to_numpy()]


def _strings(values: Any) -> pa.Array:
    array = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, from_pandas=True)
    array = pc.cast(array, pa.string())
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _looks_like(texts: pa.Array, form: str) -> Mask:
    return _mask(pc.match_substring_regex(texts, form))


def _mask(values: pa.Array) -> Mask:
    found: Mask = pc.fill_null(values, False).to_numpy(zero_copy_only=False)
    return found


def _normal(paths: pa.Array) -> pa.Array:
    """Paths with / between folders, and no ./ or empty folder in front or between."""
    paths = pc.replace_substring(paths, "\\", "/")
    return pc.replace_substring_regex(pc.replace_substring_regex(paths, r"^(\./+)+", ""), r"/(\.?/)+", "/")


def _name(paths: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(paths, r"^.*/", "")


def _first_of_name(paths: pa.Array) -> pa.Array:
    """A file's name up to its first dot: paths, names and stems that are equal are so in this."""
    return pc.replace_substring_regex(paths, _ROUND_THE_NAME, "")


def _stem(paths: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(_name(paths), _ENDING, "")
