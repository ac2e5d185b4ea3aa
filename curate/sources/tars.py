"""Tars of samples (webdataset's, img2dataset's, packed ones): as a dataset and as inputs of a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from aesthetic.errors import UserError
from aesthetic.untrusted import first_three, printable
from curate.ledger.schema import Reason, RowError, Status
from curate.shards.tar import IMAGE_EXTENSIONS, CorruptShard, image_member, key_of, read_range, tar_members
from curate.sources import kept_tars
from curate.sources.dataset import (
    LARGEST_IMAGE,
    PartedDataset,
    Sample,
    caption_in,
    json_in,
    text_in,
)
from curate.sources.img2dataset import failed_place, rows_by_key
from curate.sources.inputs import SamplesInput, merged, no_place, place
from curate.sources.listing import TEXT_EXTENSIONS, UNREAD_EXTENSIONS, Listing, list_folder
from curate.sources.problems import LARGEST_CAPTION, Problems
from curate.store.files import digest

Span = tuple[int, int]
"""Offset and size of a member of a tar."""

_NONE: Span = (0, -1)
_MOST_IMAGES = 16  # of one key in a tar, in the mean; with more its names were not made for keys that end at a dot


# ------------------------------------------------------------------------------------------------------------ one tar


@dataclass
class TarCounts:
    """What one tar, or several, hold beside one image for each sample."""

    kind: str = ""  # which image of a sample is meant: what stands between key and extension, as in KEY.input.jpg
    kinds: Counter[str] = field(default_factory=Counter)  # kinds of image -> samples; `kind` is one of them
    several: int = 0  # samples with more than one image
    repeated: int = 0  # members that a later one of the same name replaces
    unread: Counter[str] = field(default_factory=Counter)  # extension -> samples in formats that are not read

    def add(self, other: TarCounts) -> None:
        """Count what is in one more tar."""
        self.kind = other.kind
        self.kinds += other.kinds
        self.unread += other.unread
        self.several += other.several
        self.repeated += other.repeated

    def to_json(self) -> dict[str, Any]:
        """Itself as a JSON object."""
        return {**vars(self), "kinds": dict(self.kinds), "unread": dict(self.unread)}

    @staticmethod
    def of_json(value: dict[str, Any]) -> TarCounts:
        """Of what `to_json` gave."""
        return TarCounts(**{**value, "kinds": Counter(value["kinds"]), "unread": Counter(value["unread"])})

    def notes(self) -> list[str]:
        """A sentence for each oddity."""
        found = []
        if self.several:
            kinds = [f"KEY.{k + '.' if k else ''}jpg" for k in sorted(self.kinds)]
            taken = f"KEY.{self.kind + '.' if self.kind else ''}jpg"
            order = ", the first in the order jpg, png, webp ... of its format" if len(kinds) == 1 else ""
            found.append(
                f"{self.several:,} samples have several images ({first_three(kinds)}): {taken} is taken{order}. "
                "(A key ends at the first dot of a file's name.)"
            )
        if unread := sum(self.unread.values()):
            extensions = ", ".join(f".{e}" for e, _ in self.unread.most_common(3))
            found.append(f"{unread:,} samples have only images that are not read ({extensions}): convert them")
        if self.repeated:
            found.append(f"{self.repeated:,} files are in a tar twice under one name: the later one is taken")
        return found


@dataclass(frozen=True)
class TarIndex:
    """The samples of one tar, in its order: key -> extension -> where the member lies."""

    samples: dict[str, dict[str, Span]]
    counts: TarCounts


def index_samples(tar: Path, kind: str | None = None) -> TarIndex:
    """The samples of a tar.

    `kind` says which kind of image is meant; by default KEY.jpg, or where no sample has that, the most frequent kind,
    so that the images of one sample are never mixed with those of another kind. Raises CorruptShard, and UserError
    where keys that end at a dot make no sense of its names.
    """
    samples: dict[str, dict[str, Span]] = {}
    counts = TarCounts()
    for name, span in tar_members(tar):
        key, extension = key_of(name)
        if key in samples:
            counts.repeated += extension in samples[key]
            samples[key][extension] = span
        elif key and not key.startswith("__MACOSX/"):
            samples[key] = {extension: span}
    for extensions, count in Counter(map(tuple, samples.values())).items():  # nearly always one shape for all
        kinds = [e.rpartition(".")[0] for e in extensions if e.rpartition(".")[2] in IMAGE_EXTENSIONS]
        counts.kinds.update(dict.fromkeys(kinds, count))
        counts.several += count * (len(kinds) > 1)
        if not kinds:
            unread = {e.rpartition(".")[2] for e in extensions} & UNREAD_EXTENSIONS
            counts.unread.update(dict.fromkeys(unread, count))
    if sum(counts.kinds.values()) > _MOST_IMAGES * len(samples):
        key, members = max(samples.items(), key=lambda s: len(s[1]))
        raise UserError(
            f"{tar}: {len(members):,} files share the key {printable(key, 80)!r}: in a tar keys end at the first dot "
            f"of a file's name (webdataset's rule). Rename its files so that no dot comes before the extension"
        )
    if kind is None and counts.kinds and "" not in counts.kinds:
        kind = min(counts.kinds, key=lambda k: (-counts.kinds[k], k))
    counts.kind = kind or ""
    return TarIndex(samples, counts)


def text_member(members: dict[str, Span], image: str) -> Span:
    """Where a sample's caption lies, _NONE where it has none of its own; `image` is the extension of its image."""
    if "txt" in members:
        return members["txt"]
    kind = image.rpartition(".")[0]
    of_kind = [f"{kind}.{e}" for e in TEXT_EXTENSIONS] if kind else []  # KEY.input.txt of KEY.input.jpg
    names = (*TEXT_EXTENSIONS, *of_kind, *(f"{image}.{e}" for e in TEXT_EXTENSIONS))
    return next((members[n] for n in names if n in members), _NONE)


def read_members(
    tar: BinaryIO, json_span: Span, text_span: Span, where: str, problems: Problems
) -> tuple[dict[str, Any], str | None]:
    """A sample's JSON object, and the caption that is a member of its own."""

    def read(span: Span, name: str) -> bytes | None:
        if span[1] > LARGEST_CAPTION:
            problems.add_once("size", name, f"{name}: has {span[1]:,} bytes")
        return read_range(tar, span) if 0 <= span[1] <= LARGEST_CAPTION else None

    data, text = read(json_span, f"{where}.json"), read(text_span, f"{where}.txt")
    facts = json_in(data, f"{where}.json", problems) if data is not None else {}
    return facts, text_in(text, f"{where}.txt", problems) if text is not None else None


# ------------------------------------------------------------------------------------------------------------ datasets


@dataclass(frozen=True)
class _Places:
    """Where the samples of one tar lie, in about 100 bytes each: shuffled reading needs all tars' at hand."""

    keys: npt.NDArray[np.str_]
    extensions: npt.NDArray[np.str_]
    spans: npt.NDArray[np.int64]  # (n, 3, 2): offset and size of image, JSON and caption; a size of -1: there is none


class Tars(PartedDataset):
    """The samples of tars, in the order of their names, as webdataset and img2dataset write them.

    Raises CorruptShard where one of them is no whole tar.
    """

    def __init__(self, folder: str | Path, listing: Listing | None = None) -> None:
        self._listing = listing or list_folder(Path(folder))
        self._open(Path(folder), tars_of(self._listing))
        self.ends = list(accumulate(len(self._places(t).keys) for t in self.parts))

    def _open(self, folder: Path, tars: list[Path], kind: str | None = None) -> None:
        self.folder, self.problems, self._counts = folder, Problems(), TarCounts()
        self.parts, self._kind = tars, kind
        self._kept, self._to_keep = dict[Path, Path](), dict[Path, tuple[Path, TarCounts]]()
        self._places = lru_cache(maxsize=None)(self._find_places)

    def _find_places(self, tar: Path) -> _Places:
        path = kept_tars.kept_path(tar, self._kind)
        if path and (known := kept_tars.places(path)):
            self._kept[tar] = path
            counts = TarCounts.of_json(known[3])
            if self._kind is None and counts.kinds:
                self._kind = counts.kind
            self._counts.add(counts)
            return _Places(*known[:3])
        index = index_samples(tar, self._kind)
        if self._kind is None and index.counts.kinds:  # the first tar decides for all
            self._kind = index.counts.kind
        self._counts.add(index.counts)
        if path and len(index.samples) >= kept_tars.FROM:
            self._to_keep[tar] = path, index.counts
        rows = [(k, i, m) for k, m in index.samples.items() if (i := image_member(m, index.counts.kind))]
        spans = [[i[1], m.get("json", _NONE), text_member(m, i[0])] for _, i, m in rows]
        keys, extensions = [k for k, _, _ in rows], [i[0] for _, i, _ in rows]
        return _Places(np.array(keys, str), np.array(extensions, str), np.array(spans, np.int64).reshape(-1, 3, 2))

    def columns(self, *names: str) -> Iterator[tuple[list[Any], ...]]:
        start = 0
        for tar, end in zip(self.parts, self.ends, strict=True):
            found = self._places(tar)
            if tar in self._kept and (parts := kept_tars.columns(self._kept[tar], names)) is not None:
                for part in parts:
                    for column, name in zip(part, names, strict=True):
                        if name == "key":
                            column[:] = [start + i if key is None else key for i, key in enumerate(column)]
                    yield part
                    start += len(part[0]) if part else 0
            else:
                before = self.problems.counts.total()
                facts = [self.read_facts(index) for index in range(start, end)]
                if tar in self._to_keep and self.problems.counts.total() == before:  # those are counted each time
                    path, counts = self._to_keep.pop(tar)
                    kept_tars.keep(path, found.keys, found.extensions, found.spans, facts, counts.to_json())
                    self._kept[tar] = path
                yield tuple([f.get(n, start + i if n == "key" else None) for i, f in enumerate(facts)] for n in names)
            start = end

    def passed_over(self) -> list[str]:
        return [*tars_passed_over(self._listing), *self._counts.notes()]

    def _at(self, index: int) -> tuple[Path, _Places, int]:
        """(tar, its places, row in it)."""
        tar, row = self.locate(index)
        places = self._places(tar)
        if row >= len(places.keys):
            raise CorruptShard(f"{tar}: a sample lacks its image")
        return tar, places, row

    def key(self, index: int) -> str:
        _, places, row = self._at(index)
        return str(places.keys[row])

    def path(self, index: int) -> str:
        _, places, row = self._at(index)
        return f"{places.keys[row]}.{places.extensions[row]}"

    def image(self, index: int) -> bytes:
        return self._read(index, facts=False)[0]

    def read_facts(self, index: int) -> dict[str, Any]:
        return self._read(index, image=False)[1]

    def sample(self, index: int) -> Sample:
        return self.as_sample(index, *self._read(index))  # the tar is opened once

    def captioned_rows(self, part: Path) -> npt.NDArray[np.int64]:
        return np.flatnonzero((self._places(part).spans[:, 1:, 1] >= 0).any(1))

    def _read(self, index: int, image: bool = True, facts: bool = True) -> tuple[bytes, dict[str, Any]]:
        """(the image's bytes if asked for, facts if asked for)."""
        tar, places, row = self._at(index)
        key, (image_span, json_span, text_span) = str(places.keys[row]), places.spans[row].tolist()
        data, known, caption = b"", {"key": key}, None
        with open(tar, "rb") as f:
            if image:
                if image_span[1] > LARGEST_IMAGE:
                    raise RowError(Reason.TOO_LARGE, f"{image_span[1]:,} bytes; at most {LARGEST_IMAGE:,} are read")
                data = read_range(f, image_span)
            if facts:
                in_json, caption = read_members(f, json_span, text_span, f"{tar}, {key}", self.problems)
                known = in_json if json_span[1] >= 0 else known
                caption = caption or caption_in(known)
        return data, {**known, "caption": caption}


def tars_of(listing: Listing) -> list[Path]:
    """The tars of a folder: its own, or where it has none, those in folders below it."""
    own = [t for t in listing.tars if "/" not in t and not t.startswith("_")]
    return [listing.folder / t for t in own or listing.tars]


def tars_passed_over(listing: Listing) -> list[str]:
    """What lies in a folder of tars and is not read, in sentences."""
    notes = listing.notes()
    if left := len(listing.tars) - len(tars_of(listing)):
        notes.append(f"{left:,} more tars in folders below are not read: give these folders themselves")
    if listing.images:
        notes.append(f"{len(listing.images):,} images that lie beside the tars are not read ({listing.images[0]})")
    return notes


# -------------------------------------------------------------------------------------------------------------- input


class TarInput(SamplesInput):
    """A tar of samples, and the parquet that img2dataset writes beside it: the rows that failed are rows, too.

    `kind` says which image of a sample is meant, as in `index_samples`.
    """

    def __init__(self, path: Path, base: Path, url: str, caption: str | None, kind: str | None = None) -> None:
        super().__init__(path, url, caption)
        self._base = base
        try:
            self._index = index_samples(path, kind)
        except CorruptShard as e:  # names it
            raise UserError(f"{path}: {str(e).removeprefix(f'{path}: ')}. Remove or replace that file.") from e
        except OSError as e:
            raise UserError(f"{path}: cannot be read: {e.strerror or e}") from e
        self._table = rows_by_key(path.with_suffix(".parquet"))
        samples = self._index.samples
        lost = [k for k, row in self._table.items() if k not in samples and row["status"] == Status.SUCCESS]
        if lost:
            raise UserError(
                f"{path.with_suffix('.parquet')} has {len(lost)} rows of status success, {lost[0]} the first, "
                f"that {path.name} has no sample for. The tar is not whole, or the two do not belong together."
            )
        self.read_all()
        self.problems.general += self._index.counts.notes()

    def digest(self) -> str:
        # every caption, JSON and place was read for it, the pixels were not: a shard may hold gigabytes
        return digest([self.content, self.path.stat().st_size])

    def objects(self) -> Iterator[dict[str, Any]]:
        samples = self._index.samples
        # img2dataset writes both in the same order, so failed rows fall where they were
        with open(self.path, "rb") as tar:
            for key in [*self._table, *(k for k in samples if k not in self._table)]:
                row = self._table.get(key, {})
                if key in samples:
                    yield self._sample(tar, key, samples[key], row)
                else:
                    yield self.row(row, None, failed_place(row), f"{self.path.name}/{key}")

    def _sample(self, tar: BinaryIO, key: str, members: dict[str, Span], row: dict[str, Any]) -> dict[str, Any]:
        counts = self._index.counts
        image = image_member(members, counts.kind)
        text_span = text_member(members, image[0] if image else "") if self._wanted_caption is not None else _NONE
        json_span = members.get("json", _NONE)
        facts, caption = read_members(tar, json_span, text_span, f"{self.path}, {key}", self.problems)
        if image:
            where = place(self.path.relative_to(self._base).as_posix(), *image[1])
        elif counts.kind and any(image_member(members, kind) for kind in counts.kinds):
            why = f"the sample has no image {counts.kind}.jpg among its members, as others have"
            where = no_place(Reason.NOT_AN_IMAGE, why)
        else:
            where = no_place(Reason.NOT_AN_IMAGE, "the sample has no image among its members")
        return self.row(merged(row, facts), caption, where, f"{self.path.name}/{key}")
