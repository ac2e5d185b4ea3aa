"""Captioned pictures of others: packed shards, tars (webdataset, img2dataset), folders of images, parquet with images.

The one reader of them, for curate, fit, train and evaluate: `open_folder` gives any of them as a sequence of samples
that are read when asked for. What it takes for a picture's caption, first to last:

- images: the row of the folder's metadata that names it; NAME.txt, NAME.caption, NAME.jpg.txt, NAME.jpg.caption;
  NAME.json
- tars: KEY.txt, KEY.caption, KEY.jpg.txt; KEY.json
- parquet: its column

The column of a table or the name in a JSON object is `caption`, or one of its other usual names (curate.sources.lists).
Bytes that are no text, and JSON that cannot be read, cost a picture its caption, are counted, and the first are named.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, ClassVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aesthetic.errors import UserError
from aesthetic.untrusted import caption_of, decode_text, first_three, open_regular, parse_json, printable, read_bytes
from curate.ledger.schema import Reason, RowError
from curate.shards.tar import (
    IMAGE_EXTENSIONS,
    CorruptShard,
    image_member,
    key_of,
    read_range,
    tar_members,
)
from curate.sources.listing import TEXT_EXTENSIONS, UNREAD_EXTENSIONS, Listing, look
from curate.sources.lists import CAPTION_NAMES, NOTED, Notes, named, open_list, open_parquet, parquet_batches
from curate.store.files import digest

Members = dict[str, tuple[int, int]]
"""Extension -> (offset, size) in a tar."""

LARGEST_CAPTION = 1 << 20
"""Bytes of a caption, or of the JSON about one picture; what is larger is none."""

LARGEST_IMAGE = 1 << 30
"""Bytes of an image file that are read: 16 for each of the pixels that it may have."""

_LARGEST_MANIFEST = 256 << 20  # bytes; of a packed folder of 100,000 tars it has 30 MB
_MANY = 0.01  # share of rows of metadata, or of samples' JSON, that may be broken before the whole is refused
_MOST_IMAGES = 16  # of one key in a tar, in the mean; with more its names were not made for keys that end at a dot


# ----------------------------------------------------------------------------------------------------- what was wrong


class Troubles(Notes):
    """What of a folder's samples could not be taken as it is: each once, counted by kind, the first three named."""

    _KINDS: ClassVar = {
        "encoding": (
            "captions are neither UTF-8 nor marked by a byte order mark, and are taken for missing",
            "Convert them: `iconv -f WINDOWS-1252 -t UTF-8` (or whatever they are)",
        ),
        "size": (f"captions are no files of at most {LARGEST_CAPTION:,} bytes, and are taken for missing", ""),
        "json": ("samples have JSON that cannot be read", "They are taken without it"),
        "metadata": ("rows of the metadata cannot be used", ""),
        "absent": ("rows of the metadata name files that are not there", ""),
        "names": ("different names in the samples' JSON are too many, and left out", ""),
    }

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []  # sentences about the folder as a whole
        self._seen: set[tuple[str, str]] = set()

    def add(self, kind: str, where: str, why: str = "") -> None:
        """Note one of a kind, named in full by `why` where `where` does not; samples are read more than once."""
        if (kind, where) not in self._seen:
            self._seen.add((kind, where))
            super().add(kind, why or where)

    def sentences(self) -> list[str]:
        """All of them, a sentence for each kind."""
        return [*self.said, *(self._sentence(kind) for kind in sorted(self.counts))]

    def _sentence(self, kind: str) -> str:
        what, way_out = self._KINDS.get(kind) or (NOTED[kind], "")
        first = ", ".join(printable(name, 240) for name in self.first[kind])
        more = ", ..." if self.counts[kind] > len(self.first[kind]) else ""
        return f"{self.counts[kind]:,} {what}: {first}{more}" + (f". {way_out}" if way_out else "")

    def refuse_many(self, kind: str, of: int, what: str) -> None:
        """UserError where more than a hundredth of `of` rows or samples are of a kind."""
        if self.counts[kind] > _MANY * of:
            said = self._KINDS[kind][0].partition(",")[0]
            first = ", ".join(printable(name, 240) for name in self.first[kind])
            raise UserError(f"{what}: {self.counts[kind]:,} of {of:,} {said}, which is too many: {first}")


def text_in(data: bytes, where: str, troubles: Troubles) -> str | None:
    """The caption in the bytes of a file or member: without a byte order mark and white space around it."""
    found = decode_text(data)
    if not found.certain:
        troubles.add("encoding", where)
        return None
    return found.text.strip() or None


def facts_in(data: bytes, where: str, troubles: Troubles) -> dict[str, Any]:
    """The JSON object about a sample; empty where it is none."""
    try:
        value = parse_json(data, where, finite=False)
    except UserError as e:
        troubles.add("json", where, str(e))
        return {}
    if not isinstance(value, dict):
        troubles.add("json", where, f"{where}: an object {{...}} is needed, not a {type(value).__name__}")
        return {}
    return value


def caption_in(facts: dict[str, Any], wanted: str = "caption") -> str | None:
    """The caption among what is known of a sample."""
    name = named(list(facts), wanted, CAPTION_NAMES)
    return caption_of(facts[name]) if name else None


def read_image(path: Path, offset: int = 0, size: int | None = None) -> bytes:
    """The bytes of an image, or `size` of them from `offset` on.

    Raises RowError where they are too many, UserError where the file is gone or no longer a file.
    """
    with open_regular(path) as f:
        there = os.fstat(f.fileno()).st_size - offset if size is None else size
        if there > LARGEST_IMAGE:
            raise RowError(Reason.TOO_LARGE, f"{there:,} bytes; at most {LARGEST_IMAGE:,} are read")
        f.seek(offset)
        try:
            return f.read(there)
        except OSError as e:
            raise UserError(f"{path}: cannot be read: {e.strerror or e}") from e


# -------------------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class Sample:
    """One image with its caption and what is known of it beside (sizes, scores, the list's own columns)."""

    key: str
    image: bytes
    extension: str  # as the file is called, in small letters: jpg, png ...; what it holds may differ
    caption: str | None
    facts: dict[str, Any]


class MapDataset(Sequence[Sample]):
    """A sequence of samples that are read when asked for; `facts` reads what is known of each without its image."""

    folder: Path
    troubles: Troubles

    def key(self, number: int) -> str:
        """The name of one sample: its key in a tar, its path in a folder."""
        raise NotImplementedError

    def path(self, number: int) -> str:
        """What one may call its image: the path in a folder, KEY.jpg in a tar."""
        return self.key(number)

    def image(self, number: int) -> bytes:
        """The bytes of one image. Raises RowError where these can't be had though the rest of the folder can."""
        raise NotImplementedError

    def extension(self, number: int) -> str:
        """What the image is called by."""
        raise NotImplementedError

    def facts(self, number: int) -> dict[str, Any]:
        """What is known of one sample beside its pixels; `caption` among it."""
        raise NotImplementedError

    def sample(self, number: int) -> Sample:
        """One sample, read whole."""
        facts = self.facts(number)
        return Sample(self.key(number), self.image(number), self.extension(number), facts["caption"], facts)

    def files(self) -> list[Path]:
        """The files that hold the pictures."""
        raise NotImplementedError

    def notes(self) -> list[str]:
        """What of the folder is not read, or not as one might think, in sentences; whole after `fingerprint`."""
        return [*self._aside(), *self.troubles.sentences()]

    def _aside(self) -> list[str]:
        """What of the folder is left aside."""
        return []

    @cached_property
    def fingerprint(self) -> str:
        """A short name for what is in the folder: keys, captions, and the length of each file.

        Raises UserError where the JSON of more than a hundredth of the samples can't be read.
        """
        told = [self.facts(i) for i in range(len(self))]
        self.troubles.refuse_many("json", len(self), str(self.folder))
        named_ = [[str(f.get("key", i)), f["caption"]] for i, f in enumerate(told)]
        return digest([named_, [[p.name, p.stat().st_size] for p in self.files()], _outputs(self.folder)])

    @overload
    def __getitem__(self, number: int) -> Sample: ...
    @overload
    def __getitem__(self, number: slice) -> list[Sample]: ...
    def __getitem__(self, number: int | slice) -> Sample | list[Sample]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        return self.sample(number)


def _outputs(folder: Path) -> Any:
    """What a packed folder's manifest says of its files; None where there is no manifest, or that of something else."""
    manifest = _json(folder / "manifest.json")
    return manifest.get("outputs") if isinstance(manifest, dict) else None


def _json(path: Path) -> Any:
    """The JSON in a file that may be anybody's; None where there is none."""
    if not os.path.lexists(path):
        return None
    try:
        return parse_json(read_bytes(path, _LARGEST_MANIFEST), str(path), finite=False)
    except UserError:
        return None


# ----------------------------------------------------------------------------------------------------------------- tars


@dataclass
class TarSamples:
    """The samples of one tar, in its order, and what else it held."""

    samples: dict[str, Members]
    image: str = ""  # which image of a sample is meant: what stands between key and extension, as in KEY.input.jpg
    images: Counter[str] = field(default_factory=Counter)  # kinds of image -> samples; `image` is one of them
    several: int = 0  # samples with more than one image
    repeated: int = 0  # members that a later one of the same name replaces
    unread: Counter[str] = field(default_factory=Counter)  # extension -> pictures in formats that are not read


def tar_samples(tar: Path, image: str | None = None) -> TarSamples:
    """The samples of a tar.

    `image` says which kind of image is meant; by default KEY.jpg, or where no sample has that, the most frequent kind,
    so that the images of one sample are never mixed with those of another kind. Raises CorruptShard, and UserError
    where keys that end at a dot make no sense of its names.
    """
    samples: dict[str, Members] = {}
    repeated = 0
    for name, place in tar_members(tar):
        key, extension = key_of(name)
        if key in samples:
            members = samples[key]
            repeated += extension in members
            members[extension] = place
        elif key and not key.startswith("__MACOSX/"):
            samples[key] = {extension: place}
    found = TarSamples(samples, repeated=repeated)
    for extensions, count in Counter(map(tuple, samples.values())).items():  # nearly always one shape for all
        kinds = [e.rpartition(".")[0] for e in extensions if e.rpartition(".")[2] in IMAGE_EXTENSIONS]
        found.images.update(dict.fromkeys(kinds, count))
        found.several += count * (len(kinds) > 1)
        if not kinds:
            unread = {e.rpartition(".")[2] for e in extensions} & UNREAD_EXTENSIONS
            found.unread.update(dict.fromkeys(unread, count))
    if sum(found.images.values()) > _MOST_IMAGES * len(samples):
        key, members = max(samples.items(), key=lambda s: len(s[1]))
        raise UserError(
            f"{tar}: {len(members):,} files share the key {printable(key, 80)!r}: in a tar keys end at the first dot "
            f"of a file's name (webdataset's rule). Rename its files so that no dot comes before the extension"
        )
    if image is None and found.images and "" not in found.images:
        image = min(found.images, key=lambda kind: (-found.images[kind], kind))
    found.image = image or ""
    return found


def text_member(members: Members, image: str) -> tuple[int, int] | None:
    """Where a sample's caption lies, if it has one of its own; `image` is the extension of its image."""
    if "txt" in members:
        return members["txt"]
    kind = image.rpartition(".")[0]
    beside = [f"{kind}.{e}" for e in TEXT_EXTENSIONS] if kind else []  # KEY.input.txt of KEY.input.jpg
    names = (*TEXT_EXTENSIONS, *beside, *(f"{image}.{e}" for e in TEXT_EXTENSIONS))
    return next((members[n] for n in names if n in members), None)


def read_text_member(tar: BinaryIO, place: tuple[int, int], where: str, troubles: Troubles) -> str | None:
    """The caption in a member of an open tar."""
    data = _read_small(tar, place, where, troubles)
    return None if data is None else text_in(data, where, troubles)


def read_json_member(tar: BinaryIO, place: tuple[int, int], where: str, troubles: Troubles) -> dict[str, Any]:
    """The JSON object in a member of an open tar; empty where it is none."""
    data = _read_small(tar, place, where, troubles)
    return {} if data is None else facts_in(data, where, troubles)


def _read_small(tar: BinaryIO, place: tuple[int, int], where: str, troubles: Troubles) -> bytes | None:
    if place[1] > LARGEST_CAPTION:
        troubles.add("size", where, f"{where}: has {place[1]:,} bytes")
        return None
    return read_range(tar, place)


class TarNotes:
    """What the tars of a folder hold beside one image for each sample, in sentences."""

    def __init__(self) -> None:
        self._image, self._images, self._unread = "", Counter[str](), Counter[str]()
        self._several = self._repeated = 0

    def add(self, found: TarSamples) -> None:
        """Count what is in one more tar."""
        self._image = found.image
        self._images += found.images
        self._unread += found.unread
        self._several += found.several
        self._repeated += found.repeated

    def lines(self) -> list[str]:
        """The sentences."""
        found = []
        if self._several:
            kinds = [f"KEY.{k + '.' if k else ''}jpg" for k in sorted(self._images)]
            taken = f"KEY.{self._image + '.' if self._image else ''}jpg"
            told = f"{self._several:,} samples have several images ({first_three(kinds)})"
            first = ", the first in the order jpg, png, webp ... of its format" if len(kinds) == 1 else ""
            found.append(f"{told}: {taken} is taken{first}. (A key ends at the first dot of a file's name.)")
        if unread := sum(self._unread.values()):
            kinds = [f".{e}" for e, _ in self._unread.most_common(3)]
            found.append(f"{unread:,} samples have only images that are not read ({', '.join(kinds)}): convert them")
        if self._repeated:
            found.append(f"{self._repeated:,} files are in a tar twice under one name: the later one is taken")
        return found


@dataclass(frozen=True)
class _Index:
    """Where the samples of one tar lie, in about 100 bytes each: shuffled reading needs all tars' at hand."""

    keys: npt.NDArray[np.str_]
    extensions: npt.NDArray[np.str_]
    places: npt.NDArray[np.int64]  # (n, 3, 2): offset and size of image, JSON and caption; a size of -1: there is none

    @staticmethod
    def of(found: TarSamples) -> _Index:
        """Of the samples that have an image."""
        none = (0, -1)
        rows = [(k, i, m) for k, m in found.samples.items() if (i := image_member(m, found.image))]
        places = [[i[1], m.get("json", none), text_member(m, i[0]) or none] for _, i, m in rows]
        keys, extensions = [k for k, _, _ in rows], [i[0] for _, i, _ in rows]
        return _Index(np.array(keys, str), np.array(extensions, str), np.array(places, np.int64).reshape(-1, 3, 2))


class Tars(MapDataset):
    """The samples of tars, in the order of their names, as webdataset and img2dataset write them.

    Raises CorruptShard where one of them is no whole tar.
    """

    def __init__(self, folder: str | Path, listing: Listing | None = None) -> None:
        self._begin(Path(folder), listing or look(Path(folder)))
        assert self._listing is not None
        self._tars = tars_of(self._listing)
        self._ends = list(accumulate(len(self._index(t).keys) for t in self._tars))

    def _begin(self, folder: Path, listing: Listing | None = None) -> None:
        self.folder, self.troubles, self._about = folder, Troubles(), TarNotes()
        self._image: str | None = None
        self._listing = listing
        self._index = lru_cache(maxsize=None)(self._indexed)

    def _indexed(self, tar: Path) -> _Index:
        found = tar_samples(tar, self._image)
        if self._image is None and found.images:  # the first tar decides for all
            self._image = found.image
        self._about.add(found)
        return _Index.of(found)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def files(self) -> list[Path]:
        return self._tars

    def _aside(self) -> list[str]:
        return [*tars_aside(self._listing), *self._about.lines()]

    def _at(self, number: int) -> tuple[Path, _Index, int]:
        """(tar, its index, row in it)."""
        shard = bisect_right(self._ends, number)
        tar = self._tars[shard]
        index, row = self._index(tar), number - (self._ends[shard - 1] if shard else 0)
        if row >= len(index.keys):
            raise CorruptShard(f"{tar}: a sample lacks its image")
        return tar, index, row

    def key(self, number: int) -> str:
        _, index, row = self._at(number)
        return str(index.keys[row])

    def path(self, number: int) -> str:
        _, index, row = self._at(number)
        return f"{index.keys[row]}.{index.extensions[row]}"

    def extension(self, number: int) -> str:
        _, index, row = self._at(number)
        return str(index.extensions[row]).rpartition(".")[2]

    def image(self, number: int) -> bytes:
        tar, index, row = self._at(number)
        return self._read(tar, index, row, image=True)[0]

    def facts(self, number: int) -> dict[str, Any]:
        return self._read(*self._at(number), image=False)[1]

    def sample(self, number: int) -> Sample:
        tar, index, row = self._at(number)
        data, facts = self._read(tar, index, row, image=True, told=True)
        return Sample(str(index.keys[row]), data, self.extension(number), facts["caption"], facts)

    def _read(
        self, tar: Path, index: _Index, row: int, image: bool, told: bool | None = None
    ) -> tuple[bytes, dict[str, Any]]:
        """(the image's bytes if asked for, facts if asked for): the tar is opened once."""
        key, (at, json_at, text_at) = str(index.keys[row]), index.places[row].tolist()
        data, facts, caption = b"", {"key": key}, None
        with open(tar, "rb") as f:
            if image:
                if at[1] > LARGEST_IMAGE:
                    raise RowError(Reason.TOO_LARGE, f"{at[1]:,} bytes; at most {LARGEST_IMAGE:,} are read")
                data = read_range(f, at)
            if told or not image:
                where = f"{tar.name}/{key}"
                if json_at[1] >= 0:
                    facts = read_json_member(f, json_at, f"{where}.json", self.troubles)
                if text_at[1] >= 0:
                    caption = read_text_member(f, text_at, f"{where}.txt", self.troubles)
                caption = caption or caption_in(facts)
        return data, {**facts, "caption": caption}


def tars_of(listing: Listing) -> list[Path]:
    """The tars of a folder: its own, or where it has none, those in folders below it."""
    own = [t for t in listing.tars if "/" not in t and not t.startswith("_")]
    return [listing.folder / t for t in own or listing.tars]


def tars_aside(listing: Listing | None) -> list[str]:
    """What lies in a folder of tars and is not read, in sentences."""
    if listing is None:
        return []
    notes, taken = listing.notes(), len(tars_of(listing))
    if left := len(listing.tars) - taken:
        notes.append(f"{left:,} more tars in folders below are not read: give these folders themselves")
    if listing.images:
        notes.append(f"{len(listing.images):,} images that lie beside the tars are not read ({listing.images[0]})")
    return notes


class Samples(Tars):
    """The samples of a packed folder, `shards/NAME` or a copy of it, in the order in which they were packed.

    Raises UserError where the folder is no packed selection, or a tar of it is missing or of another length.
    """

    def __init__(self, folder: str | Path) -> None:
        self._begin(Path(folder))
        self._image = ""
        manifest, sizes = packed(self.folder), _json(self.folder / "sizes.json")
        if manifest is None:
            raise UserError(f"{self.folder} holds no packed shards. `tastemaker pack DATA --name NAME` makes them.")
        self._tars = [self.folder / name for name in sorted(manifest)]
        lost = [t.name for t in self._tars if not t.is_file() or t.stat().st_size != manifest[t.name]]
        if lost:
            raise UserError(
                f"{self.folder}: {len(lost):,} of its {len(self._tars):,} tars missing or cut: {first_three(lost)}. "
                f"Copy them again; or, for what is there alone, leave out manifest.json. `tastemaker verify` on the "
                f"data folder says whether they are whole there"
            )
        known = isinstance(sizes, dict) and all(_is_count(sizes.get(t.name)) for t in self._tars)
        counts = (sizes[t.name] if known else len(self._index(t).keys) for t in self._tars)
        self._ends = list(accumulate(counts))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def packed(folder: Path) -> dict[str, int] | None:
    """The tars of a packed folder and their bytes, by its manifest; None where it has none.

    The manifest calls its files by their paths in the data folder; a copy of the folder is as good.
    """
    outputs = _outputs(folder)
    if not isinstance(outputs, dict):
        return None
    sizes = {PurePosixPath(n).name: f.get("bytes") for n, f in outputs.items() if isinstance(f, dict)}
    return {n: size for n, size in sizes.items() if n.endswith(".tar") and isinstance(size, int)} or None


# --------------------------------------------------------------------------------------------------------------- images


def below(name: Any) -> str:
    """A file name in a table as a path below the table's folder; `./` and backslashes are seen through.

    Raises ValueError, saying why, where it is none.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError("is empty")
    path = PurePosixPath(name.replace("\\", "/"))
    if ".." in path.parts or path.is_absolute() or PureWindowsPath(name).drive or "\0" in name or not path.parts:
        raise ValueError("is refused: it must be a path below the folder of the table")
    return path.as_posix()


class Beside:
    """What files beside the images of a folder tell of them."""

    def __init__(self, listing: Listing, troubles: Troubles) -> None:
        self._folder, self._troubles = listing.folder, troubles
        files = zip(listing.texts, listing.jsons, strict=True)
        self._files = {n: f for n, f in zip(listing.images, files, strict=True) if f != ((), None)}

    def any(self) -> bool:
        """Whether there are such files."""
        return bool(self._files)

    def caption(self, name: str) -> str | None:
        """The caption in a file of its own: the first that is not empty."""
        for text in self._files.get(name, ((), None))[0]:
            data = self._read(text)
            if data is not None and (caption := text_in(data, text, self._troubles)) is not None:
                return caption
        return None

    def facts(self, name: str) -> dict[str, Any]:
        """What the JSON beside an image says."""
        told = self._files.get(name, ((), None))[1]
        data = self._read(told) if told else None
        return facts_in(data, told, self._troubles) if told and data is not None else {}

    def any_caption(self, name: str) -> str | None:
        """The caption in a file of its own, or that in the JSON."""
        return self.caption(name) or caption_in(self.facts(name))

    def _read(self, name: str) -> bytes | None:
        try:
            return read_bytes(self._folder / name, LARGEST_CAPTION)
        except UserError as e:
            self._troubles.add("size", name, str(e))
            return None


class Images(MapDataset):
    """The image files under a folder, and what its metadata (Hugging Face's imagefolder) and files beside them tell."""

    def __init__(self, folder: str | Path, listing: Listing | None = None) -> None:
        self.folder, self.troubles = Path(folder), Troubles()
        self.listing = listing or look(self.folder)
        self._beside = Beside(self.listing, self.troubles)
        self._names, self._told = self.listing.images, dict[str, dict[str, Any]]()
        for table in self.listing.tables:
            self._read_table(table)
        if self._told:
            known = set(self._names)
            others = [n for n in self._told if n not in known]
            there = [n for n in others if (self.folder / n).is_file()]  # called like no image, and named as one
            for name in sorted(set(others) - set(there)):
                self.troubles.add("absent", name)
            self._names = sorted([*self._names, *there], key=lambda name: name.split("/"))

    def _read_table(self, table: str) -> None:
        """Take in the rows of a table; what it holds nothing of costs its own row."""
        prefix, rows = table.rpartition("/")[0], 0
        source = open_list(self.folder / table, "url", "caption")
        for batch in source.batches(source.schema.names):
            for row in batch.to_pylist():
                rows += 1
                if row.pop("\0error", None) or row.pop("\0reason", None):
                    continue  # a broken line: the source has noted it
                try:
                    name = below(row.get("file_name"))
                except ValueError as e:
                    self.troubles.add("metadata", f"{table} {rows}", f"{table}, row {rows}: file_name {e}")
                    continue
                if source.caption:
                    row["caption"] = caption_of(row[source.caption])
                self._told[f"{prefix}/{name}" if prefix else name] = row
        self.troubles.said += [f"{table}: {sentence}" for sentence in source.notes.sentences()]
        self.troubles.refuse_many("metadata", rows, str(self.folder / table))

    def __len__(self) -> int:
        return len(self._names)

    def files(self) -> list[Path]:
        return [self.folder / name for name in self._names]

    def _aside(self) -> list[str]:
        notes = self.listing.notes()
        own = [
            n for n in self.listing.lists if "/" not in n and n.lower().endswith((".csv", ".tsv", ".json", ".jsonl"))
        ]
        if own and not self._told:
            way = "a table of captions is metadata.csv or metadata.jsonl, with a column file_name"
            notes.append(f"{first_three(own)}: not read; {way}")
        if self._told and (silent := [n for n in self._names if n not in self._told]):
            notes.append(f"{len(silent):,} images are not in the metadata: {first_three(silent)}")
        return notes

    def key(self, number: int) -> str:
        return self._names[number]

    def extension(self, number: int) -> str:
        base = self._names[number].rpartition("/")[2]
        return base.rpartition(".")[2].lower() if "." in base else ""

    def image(self, number: int) -> bytes:
        return read_image(self.folder / self._names[number])

    def facts(self, number: int) -> dict[str, Any]:
        name = self._names[number]
        row = self._told.get(name, {})
        facts = self._beside.facts(name)
        caption = row.get("caption") or self._beside.caption(name) or caption_in(facts)
        return {**facts, **row, "key": name, "caption": caption}


# -------------------------------------------------------------------------------------------------------------- parquet

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")  # of bytes; Hugging Face's structs may have any name


def image_column(schema: pa.Schema) -> str | None:
    """The column of images of a parquet file: Hugging Face's struct of `bytes` and `path`, or bytes so called.

    A file with a column of bytes and one of URLs is taken for a list, unless it has img2dataset's `key` and `status`.
    """
    for f in schema:
        if pa.types.is_struct(f.type) and {"bytes", "path"} == {c.name for c in f.type}:
            return f.name
    names = {n.lower() for n in schema.names}
    if "url" in names and not {"key", "status"} <= names:
        return None
    return next((f.name for f in schema if f.name.lower() in _IMAGE_COLUMNS and _is_bytes(f.type)), None)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


class ParquetImages:
    """The images of one parquet file by the number of their row.

    Rows are decoded one by one from the beginning of their row group, so reading in order costs what it must; those
    last read are kept, so that threads may be ahead of each other.
    """

    _KEPT = 128 << 20  # bytes
    _LARGEST = LARGEST_IMAGE

    def __init__(self, path: Path, column: str | None = None) -> None:
        self.path = path
        self._file = open_parquet(path)
        self.column = column or image_column(self._file.schema_arrow)
        groups = self._file.metadata
        self._ends = list(accumulate(groups.row_group(g).num_rows for g in range(groups.num_row_groups)))
        self._kept: OrderedDict[int, bytes | str | None] = OrderedDict()
        self._held = 0
        self._rows: Iterator[pa.RecordBatch] | None = None
        self._group, self._at = -1, -1  # whose rows these are, and the row that comes next
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, row: int) -> bytes:
        """The bytes of one image; RowError where there are none."""
        with self._lock:
            value = self._kept[row] if row in self._kept else self._go_to(row)
        if isinstance(value, str):  # Hugging Face's: a file beside
            try:
                return read_image(self.path.parent / below(value))
            except (ValueError, UserError) as e:
                raise RowError(Reason.NOT_AN_IMAGE, f"row {row} holds no bytes, and its path {e}") from e
        if value is None:
            raise RowError(Reason.NOT_AN_IMAGE, f"row {row} of {self.path.name} holds no image")
        return value

    def _go_to(self, row: int) -> bytes | str | None:
        group = bisect_right(self._ends, row)
        start = self._ends[group - 1] if group else 0
        if self._rows is None or group != self._group or self._at > row:
            self._check(group)
            self._rows = self._file.iter_batches(1, row_groups=[group], columns=[self.column])
            self._group, self._at = group, start
        try:
            while True:
                value = self._value(next(self._rows).column(0)[0])
                self._keep(self._at, value)
                self._at += 1
                if self._at > row:
                    return value
        except (pa.ArrowException, OSError, StopIteration) as e:
            self._rows = None
            raise RowError(Reason.DECODE_ERROR, f"row {row} of {self.path.name} cannot be read: {e}"[:300]) from e

    def _check(self, group: int) -> None:
        """Refuse what would unpack to more than can be held."""
        found = self._file.metadata.row_group(group)
        for number in range(found.num_columns):
            column = found.column(number)
            if column.path_in_schema.split(".")[0] == self.column and found.num_rows:
                mean = column.total_uncompressed_size / found.num_rows
                if mean > self._LARGEST:
                    raise RowError(Reason.TOO_LARGE, f"images of {mean:,.0f} bytes; at most {self._LARGEST:,} are read")

    def _value(self, cell: Any) -> bytes | str | None:
        value = cell.as_py()
        if isinstance(value, dict):
            data, path = value.get("bytes"), value.get("path")
            return data if data else (path if isinstance(path, str) and path else None)
        return value or None

    def _keep(self, row: int, value: bytes | str | None) -> None:
        self._kept[row] = value
        self._held += len(value or b"")
        while self._held > self._KEPT and len(self._kept) > 1:
            self._held -= len(self._kept.popitem(last=False)[1] or b"")


@lru_cache(maxsize=8)
def parquet_images(path: Path, column: str | None = None) -> ParquetImages:
    """The images of a parquet file that was opened before, or is now."""
    return ParquetImages(path, column)


class Tables(MapDataset):
    """The rows of parquet files that hold images."""

    def __init__(self, folder: str | Path, files: Sequence[Path], listing: Listing | None = None) -> None:
        self.folder, self.troubles, self._files = Path(folder), Troubles(), list(files)
        self._listing = listing
        self._ends = list(accumulate(len(parquet_images(f)) for f in self._files))
        self._table = lru_cache(maxsize=None)(self._others)

    def _others(self, file: Path) -> tuple[pa.Table, str | None]:
        """(the columns beside the image, the name of the caption's)."""
        source = open_list(file, "url", "caption")
        image = parquet_images(file).column
        names = [n for n in source.schema.names if n != image]
        schema = pa.schema([source.schema.field(n) for n in names])
        return pa.Table.from_batches(list(parquet_batches(file, names)), schema), source.caption

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _at(self, number: int) -> tuple[Path, int]:
        part = bisect_right(self._ends, number)
        return self._files[part], number - (self._ends[part - 1] if part else 0)

    def files(self) -> list[Path]:
        return self._files

    def _aside(self) -> list[str]:
        return self._listing.notes() if self._listing else []

    def key(self, number: int) -> str:
        file, row = self._at(number)
        name = file.relative_to(self.folder).as_posix() if file.is_relative_to(self.folder) else file.name
        return f"{name}/{row}"

    def extension(self, number: int) -> str:
        return ""

    def image(self, number: int) -> bytes:
        file, row = self._at(number)
        return parquet_images(file).read(row)

    def facts(self, number: int) -> dict[str, Any]:
        file, row = self._at(number)
        table, caption = self._table(file)
        facts = {n: table.column(n)[row].as_py() for n in table.column_names}
        return {**facts, "key": self.key(number), "caption": caption_of(facts[caption]) if caption else None}


def read_place(path: Path, offset: int, size: int | None) -> bytes:
    """The bytes of an image where a plan says they are: a range of a file, or a row of a parquet file.

    Raises RowError and UserError as `read_image` and `ParquetImages.read` do.
    """
    if size is None:
        return parquet_images(path).read(offset)
    return read_image(path, offset, size)


# -------------------------------------------------------------------------------------------------------------- folders


class NothingRead(UserError):
    """A folder without a picture that is read."""


def refuse_data_folder(folder: Path) -> None:
    """UserError, naming what is meant, where a folder is a data folder of ours or its `shards/`."""
    inner = [p.parent for pattern in ("shards/*/sizes.json", "*/sizes.json") for p in sorted(folder.glob(pattern))]
    inner = [p for p in inner if packed(p) is not None]
    if inner:
        raise UserError(f"{folder} holds packed shards, and is none itself. Did you mean {inner[0]}?")
    if (folder / "plan" / "plan.json").is_file():
        way = (
            f"`tastemaker pack {folder}` makes {folder / 'shards'}/NAME, and {folder / 'fetched'} has all its pictures"
        )
        raise UserError(f"{folder} is a data folder of ours: {way}")


def parquet_with_images(listing: Listing) -> list[Path]:
    """The parquet files of a folder that hold images, where its first does."""
    found = [listing.folder / name for name in listing.lists if name.lower().endswith(".parquet")]
    if not found or image_column(open_parquet(found[0]).schema_arrow) is None:
        return []
    for file in found:
        if image_column(open_parquet(file).schema_arrow) is None:
            raise UserError(f"{file}: holds no column of images, as {found[0].name} does. Give a folder of one kind.")
    return found


def kind_of_folder(listing: Listing) -> str | None:
    """imagefolder, tars, images or parquet: what a folder of pictures is; None where it holds none that are read."""
    if listing.tables:
        return "imagefolder"
    if any("/" not in t for t in listing.tars):
        return "tars"
    if listing.images:
        return "images"
    if listing.tars:
        return "tars"
    return "parquet" if parquet_with_images(listing) else None


def open_folder(folder: str | Path) -> MapDataset:
    """The pictures of a folder, whatever it is. Raises UserError where there is no such folder, or none in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder. A folder of packed shards, of tars or of images is expected.")
    try:
        if packed(folder) is not None:
            return Samples(folder)
        listing = look(folder)
        if listing.folder and not any("/" not in t for t in listing.tars):
            refuse_data_folder(folder)
        match kind_of_folder(listing):
            case "imagefolder" | "images":
                found: MapDataset = Images(folder, listing)
            case "tars":
                found = Tars(folder, listing)
            case "parquet":
                found = Tables(folder, parquet_with_images(listing), listing)
            case _:
                raise NothingRead(nothing_in(listing))
    except CorruptShard as e:
        raise UserError(f"{e}. Remove or replace that file.") from e
    if not len(found):
        raise NothingRead(f"{folder}: holds neither tars nor images that are read. {' '.join(found.notes())}".strip())
    return found


def nothing_in(listing: Listing, what: str = "neither tars nor images") -> str:
    """What to say of a folder in which there is no picture that is read."""
    told = "; ".join(listing.notes())
    if not told and listing.others:
        told = f"{first_three(listing.others)} (save it as parquet: Dataset.to_parquet, DataFrame.to_parquet)"
    return f"{listing.folder}: holds {what}" + (f" that are read: {told}" if told else "")
