"""Captioned images as a sequence: what a sample is, and what all kinds of folders of them have in common."""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from aesthetic.errors import UserError
from aesthetic.untrusted import caption_of, decode_text, open_regular, parse_json, printable, read_bytes
from curate.ledger.schema import Reason, RowError
from curate.shards.indexes import is_index
from curate.sources.columns import CAPTION_NAMES, find_column
from curate.sources.problems import Problems
from curate.store.files import quoted

LARGEST_IMAGE = 1 << 30
"""Bytes of an image file that are read: 16 for each of the pixels that it may have."""

_AT_ONCE = 4096  # samples whose facts are in memory at a time
_PACKED_AT = re.compile(r"^shards/[^/]+/")  # of the paths in a manifest, which calls files by where they were packed
_LARGEST_MANIFEST = 256 << 20  # bytes; of a packed folder of 100,000 tars it has 30 MB


@dataclass(frozen=True)
class Sample:
    """One image with its caption and what is known of it beside (sizes, scores, the list's own columns)."""

    key: str
    image: bytes
    caption: str | None
    facts: dict[str, Any]
    captions: tuple[str | None, ...]  # of each of the dataset's caption columns


class MapDataset(Sequence[Sample]):
    """Samples by index, read when asked for; `facts` reads what is known of each without its image.

    A sample's caption is that of the first of `caption_columns` that has one; `default_caption` that of images without.
    """

    folder: Path
    problems: Problems
    default_caption: str | None = None
    decoded = False
    """Whether each image could be read when these files were written, so that nobody need look at them all again."""
    captioned: int | None = None  # how many samples have a caption, when the fingerprint was read
    caption_columns: tuple[str, ...] = ("caption",)  # this one by any of its names, others as they are written

    def key(self, index: int) -> str:
        """The name of one sample: its key in a tar, its path in a folder."""
        raise NotImplementedError

    def path(self, index: int) -> str:
        """What one may call its image: the path in a folder, KEY.jpg in a tar."""
        return self.key(index)

    def image(self, index: int) -> bytes:
        """The bytes of one image. Raises RowError where these can't be had though the rest of the folder can."""
        raise NotImplementedError

    def read_facts(self, index: int) -> dict[str, Any]:
        """As `facts`; `caption` is the one that the folder has."""
        raise NotImplementedError

    def files(self) -> list[Path]:
        """The files that hold the images."""
        raise NotImplementedError

    def maybe_captioned(self) -> Iterable[int]:
        """The samples that may have a caption, as far as is known without reading anything of them."""
        return range(len(self))

    def passed_over(self) -> list[str]:
        """What of the folder is not read, or not as one might think, in sentences."""
        return []

    def check_bytes(self) -> None:
        """Compare the files with what was written, where that is known. UserError where they are others."""

    def facts(self, index: int) -> dict[str, Any]:
        """What is known of one sample beside its pixels; `caption` among it."""
        facts = self.read_facts(index)
        return {**facts, "caption": _first(self.captions_in(facts))}

    def captions_in(self, facts: dict[str, Any]) -> tuple[str | None, ...]:
        """Of each of the caption columns, by what `read_facts` gave; where none has one, the default is the first's."""
        found = tuple(facts["caption"] if c == "caption" else caption_of(facts.get(c)) for c in self.caption_columns)
        return found if _first(found) else (self.default_caption, *found[1:])

    def columns(self, *names: str) -> Iterator[tuple[list[Any], ...]]:
        """What is known of all samples, in their order, some thousands at a time: a list of values for each name.

        As `read_facts` has them, but None where those of a sample have no such name.
        """
        for start in range(0, len(self), _AT_ONCE):
            rows = []
            for index in range(start, min(start + _AT_ONCE, len(self))):
                facts = self.read_facts(index)
                rows.append([facts.get(name, index if name == "key" else None) for name in names])
            yield tuple(list(column) for column in zip(*rows, strict=True))

    def captions(self) -> Iterator[tuple[list[Any], list[tuple[str | None, ...]]]]:
        """The keys of all samples, some thousands at a time, and of each the same as `captions_in`."""
        for keys, *columns in self.columns("key", *self.caption_columns):
            yield keys, self._captions_of(columns)

    def _captions_of(self, columns: Iterable[list[Any]]) -> list[tuple[str | None, ...]]:
        """Of some samples, by their values in the caption columns, the same as `captions_in`."""
        named = zip(self.caption_columns, columns, strict=True)
        texts = [values if name == "caption" else list(map(caption_of, values)) for name, values in named]
        rows = list(zip(*texts, strict=True))
        if self.default_caption:
            rows = [row if any(row) else (self.default_caption, *row[1:]) for row in rows]
        return rows

    def captions_at(self, indices: Sequence[int]) -> list[tuple[str | None, ...]]:
        """Of some samples, in ascending order, the same as `captions_in`."""
        if not self.decoded:
            return [self.captions_in(self.read_facts(index)) for index in indices]
        found, start, chosen = list[tuple[str | None, ...]](), 0, np.asarray(indices, np.int64)
        for columns in self.columns(*self.caption_columns):
            end = start + len(columns[0])
            low, high = np.searchsorted(chosen, [start, end])
            wanted = (chosen[low:high] - start).tolist()
            found += self._captions_of([values[i] for i in wanted] for values in columns)
            start = end
        return found

    def sample(self, index: int) -> Sample:
        """One sample, read whole."""
        return self.as_sample(index, self.image(index), self.read_facts(index))

    def as_sample(self, index: int, image: bytes, facts: dict[str, Any]) -> Sample:
        """One sample of its image and of what `read_facts` gave."""
        captions = self.captions_in(facts)
        caption = _first(captions)
        return Sample(self.key(index), image, caption, {**facts, "caption": caption}, captions)

    def has_captions(self) -> bool:
        """Whether any image has a caption; reads until it finds one, and nothing where there can be none."""
        if self.default_caption and len(self):
            return True
        return any(self.read_facts(i)["caption"] for i in self.maybe_captioned())

    def check_caption_columns(self) -> None:
        """UserError, naming the columns with texts, where no image has one in one of the caption columns."""
        lacking, there = set(self.caption_columns), set[str]()
        for found in self.columns(*self.caption_columns):
            columns = zip(self.caption_columns, found, strict=True)
            lacking -= {c for c, values in columns if any(values if c == "caption" else map(caption_of, values))}
            if not lacking:
                return
        for index in range(min(len(self), _AT_ONCE)):
            facts = self.read_facts(index)
            there |= {name for name, value in facts.items() if isinstance(value, str) and value.strip()}
        name = next(c for c in self.caption_columns if c in lacking)
        raise UserError(
            f"no image in {self.folder} has a text in the column {printable(name, 80)!r}; there are "
            f"{', '.join(printable(n, 80) for n in sorted(there)) or 'none'}"
        )

    def notes(self) -> list[str]:
        """`passed_over` and the problems so far, which are whole after `fingerprint`."""
        return [*self.passed_over(), *self.problems.sentences()]

    @cached_property
    def fingerprint(self) -> str:
        """A short name for what is in the folder: keys, captions, and the length of each file.

        Raises UserError where the JSON of more than a hundredth of the samples can't be read.
        """
        return self.read_fingerprint()

    def read_fingerprint(self, tell: Callable[[int], None] = lambda count: None) -> str:
        """`fingerprint`, read now; `tell` hears of how many more samples the captions were read.

        It is the digest of [captions, files, manifest], of which captions never are in memory all at once.
        """
        sha256, separator, captioned = hashlib.sha256(b"[["), b"", 0
        for keys, rows in self.captions():
            pairs = ", ".join(_as_json(key, texts) for key, texts in zip(keys, rows, strict=True))
            sha256.update(separator + pairs.encode())
            separator = b", "
            captioned += sum(map(any, rows))
            tell(len(keys))
        self.problems.refuse_many("json", len(self), str(self.folder))
        rest = json.dumps([self.file_sizes(), self._manifest()], sort_keys=True, default=str)
        sha256.update(b"], " + rest[1:].encode())
        self.captioned = captioned
        self.__dict__["fingerprint"] = found = sha256.hexdigest()[:16]
        return found

    def file_sizes(self) -> list[tuple[str, int]]:
        """The names of `files` and their lengths in bytes."""
        return [(path.name, path.stat().st_size) for path in self.files()]

    def _manifest(self) -> Any:
        """What a manifest says of the samples' files; indexes that were written later change nothing."""
        outputs = manifest_outputs(self.folder)
        if not isinstance(outputs, dict):
            return outputs
        return {name: fact for name, fact in outputs.items() if not is_index(name)}

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.sample(index % len(self))


class PartedDataset(MapDataset):
    """Samples of several files, one after the other; `ends` are how many there are up to the end of each file."""

    parts: list[Path]
    ends: list[int]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def files(self) -> list[Path]:
        return self.parts

    def locate(self, index: int) -> tuple[Path, int]:
        """(the file of a sample, its index in it)."""
        part = bisect_right(self.ends, index)
        return self.parts[part], index - (self.ends[part - 1] if part else 0)

    def maybe_captioned(self) -> Iterator[int]:
        start = 0
        for part, end in zip(self.parts, self.ends, strict=True):
            yield from (start + self.captioned_rows(part)).tolist()
            start = end

    def captioned_rows(self, part: Path) -> npt.NDArray[np.int64]:
        """As `maybe_captioned`, of one file."""
        raise NotImplementedError


def _as_json(key: Any, captions: Iterable[str | None]) -> str:
    """[key, *captions]. Of a million lists, made to be dumped, the collector of garbage would look at all, again and
    again: three quarters of the time."""
    return f"[{', '.join([quoted(str(key)), *('null' if text is None else quoted(text) for text in captions)])}]"


def _first(captions: Iterable[str | None]) -> str | None:
    return next((caption for caption in captions if caption), None)


# ------------------------------------------------------------------------------------------ one image, caption or JSON


def read_image(path: Path, offset: int = 0, size: int | None = None) -> bytes:
    """The bytes of an image, or `size` of them from `offset` on.

    Raises RowError where they are too many, UserError where the file is gone or no longer a file.
    """
    with open_regular(path) as f:
        length = os.fstat(f.fileno()).st_size - offset if size is None else size
        if length > LARGEST_IMAGE:
            raise RowError(Reason.TOO_LARGE, f"{length:,} bytes; at most {LARGEST_IMAGE:,} are read")
        f.seek(offset)
        try:
            return f.read(length)
        except OSError as e:
            raise UserError(f"{path}: cannot be read: {e.strerror or e}") from e


def text_in(data: bytes, where: str, problems: Problems) -> str | None:
    """The caption in the bytes of a file or member: without a byte order mark and white space around it."""
    found = decode_text(data)
    if not found.certain:
        problems.add_once("encoding", where)
        return None
    return found.text.strip() or None


def json_in(data: bytes, where: str, problems: Problems) -> dict[str, Any]:
    """The JSON object about a sample; empty where it is none."""
    try:
        value = parse_json(data, where, finite=False)
        if isinstance(value, dict):
            return value
        problems.add_once("json", where, f"{where}: an object {{...}} is needed, not a {type(value).__name__}")
    except UserError as e:
        problems.add_once("json", where, str(e))
    return {}


def caption_in(facts: dict[str, Any], wanted: str = "caption") -> str | None:
    """The caption among what is known of a sample."""
    name = find_column(list(facts), wanted, CAPTION_NAMES)
    return caption_of(facts[name]) if name else None


def read_json_of_others(path: Path) -> Any:
    """The JSON in a file that may be anybody's; None where there is none."""
    if not os.path.lexists(path):
        return None
    try:
        return parse_json(read_bytes(path, _LARGEST_MANIFEST), str(path), finite=False)
    except UserError:
        return None


def packed_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The files of a packed folder by their paths in it, each with its `sha256` and `bytes`, as its manifest has them;
    nothing where it has none. The folder may be a copy, of any name: what stands before a path is where it was packed.
    """
    outputs, found = manifest_outputs(folder), {}
    for packed_as, fact in outputs.items() if isinstance(outputs, dict) else ():
        name = _PACKED_AT.sub("", packed_as)
        known = isinstance(fact, dict) and isinstance(fact.get("bytes"), int) and isinstance(fact.get("sha256"), str)
        if known and not {"", ".", ".."} & {*name.split("/")}:  # none leads out of the folder
            found[name] = fact
    return found


def manifest_outputs(folder: Path) -> Any:
    """What a packed folder's manifest says of its files; None where there is no manifest, or that of something else."""
    manifest = read_json_of_others(folder / "manifest.json")
    return manifest.get("outputs") if isinstance(manifest, dict) else None
