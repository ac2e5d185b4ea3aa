"""Folders that hold images already: tar shards, plain images, Hugging Face's imagefolder.

Each row names the place of its bytes instead of something to fetch, or the failure that it came with: the rows of
img2dataset's parquet that have no image are rows of ours, so that the accounts still add up.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import pyarrow as pa

from curate.ledger import EMBEDDED_COLUMNS, FETCHED_COLUMNS, Reason, Status
from curate.lists import (
    CAPTION_NAMES,
    URL_NAMES,
    Input,
    RowsInput,
    clean,
    list_format,
    named,
    open_list,
    open_parquet,
)
from curate.shards import IMAGE_EXTENSIONS, CorruptShard, image_member, index_tar, read_range
from curate.store import UserError, digest

PLACE_COLUMNS = (
    ("@path", pa.string()),  # of the file that holds the bytes, relative to the plan's base
    ("@offset", pa.int64()),
    ("@size", pa.int64()),
    ("@status", pa.string()),  # these three are set, and those above null, where the row came with a failure
    ("@reason", pa.string()),
    ("@error", pa.string()),
)
"""What a row of an image folder has beside the list's columns."""

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

_RESULTS = {name for name, _ in FETCHED_COLUMNS + EMBEDDED_COLUMNS}
"""Columns of a former run, img2dataset's or ours: results, which this run finds out anew."""


def _place(path: str, offset: int, size: int) -> dict[str, Any]:
    return {"@path": path, "@offset": offset, "@size": size, "@status": None, "@reason": None, "@error": None}


def _failure(reason: Reason, error: str) -> dict[str, Any]:
    place = dict.fromkeys(("@path", "@offset", "@size"))
    return {**place, "@status": reason.status.value, "@reason": reason.value, "@error": error}


class TarInput(RowsInput):
    """A tar of samples (webdataset, img2dataset), and the parquet that img2dataset writes beside it."""

    local = True
    extra = PLACE_COLUMNS

    def __init__(self, path: Path, base: Path, url: str, caption: str | None) -> None:
        super().__init__(path)
        self._base, self._names = base, (url, caption)
        self.scan()
        self.url, self.caption = "url", "caption"
        self.make_text("url", "caption")

    def digest(self) -> str:
        # every caption, JSON and place was read for it, the pixels were not: a shard may hold gigabytes
        return digest([self.content, self.path.stat().st_size])

    def objects(self) -> Iterator[dict[str, Any]]:
        try:
            index = index_tar(self.path)
        except (CorruptShard, OSError) as e:
            raise UserError(f"{self.path}: cannot be read: {e}") from e
        beside = _beside(self.path)
        lost = [k for k, row in beside.items() if k not in index and row["status"] == Status.SUCCESS]
        if lost:
            raise UserError(
                f"{self.path.with_suffix('.parquet')} has {len(lost)} rows of status success, {lost[0]} the first, "
                f"that {self.path.name} has no sample for. The tar is not whole, or the two do not belong together."
            )
        # img2dataset writes both in the same order, so failed rows fall where they were
        with open(self.path, "rb") as tar:
            for key in [*beside, *(k for k in index if k not in beside)]:
                yield self._row(tar, key, index.get(key), beside.get(key, {}))

    def _row(self, tar: BinaryIO, key: str, members: dict[str, tuple[int, int]] | None, row: dict) -> dict[str, Any]:
        facts = dict(row)
        if members and "json" in members:
            told = self._json(tar, key, members["json"])
            facts |= {k: v for k, v in told.items() if v is not None or k not in facts}
        found = image_member(members) if members else None
        if found:
            place = _place(self.path.relative_to(self._base).as_posix(), *found[1])
        elif members:
            place = _failure(Reason.NOT_AN_IMAGE, "the sample has no image among its members")
        else:
            error = row.get("error_message") or ""
            place = _failure(reason_of(str(error), row.get("status"), row.get("reason")), str(error))
        url = named(list(facts), self._names[0], URL_NAMES)
        result = {"url": facts.get(url) if url else f"{self.path.name}/{key}", "caption": None}
        caption = None
        if self._names[1] is not None:
            caption = named(list(facts), self._names[1], CAPTION_NAMES)
            text = _text(read_range(tar, members["txt"])) if members and "txt" in members else None
            result["caption"] = text or (facts.get(caption) if caption else None)
        for name, value in facts.items():
            if name in place:
                raise UserError(f"{self.path}, {key}.json: the name {name!r} is taken for something else here.")
            if name not in (url, caption, "url", "caption") and name not in _RESULTS:
                result[clean(name)] = value
        return result | place

    def _json(self, tar: BinaryIO, key: str, place: tuple[int, int]) -> dict[str, Any]:
        try:
            value = json.loads(read_range(tar, place).decode("utf-8", "replace"))
        except ValueError as e:
            raise UserError(f"{self.path}, {key}.json: not JSON: {e}") from e
        if not isinstance(value, dict):
            raise UserError(f"{self.path}, {key}.json: an object {{...}} is needed, not a {type(value).__name__}.")
        return value


def _beside(tar: Path) -> dict[str, dict[str, Any]]:
    """The rows of img2dataset's parquet beside a tar, by key; empty where there is none."""
    path = tar.with_suffix(".parquet")
    if not path.exists():
        return {}
    file = open_parquet(path)
    if not {"key", "status"} <= set(file.schema_arrow.names):
        return {}  # some other table
    return {str(row["key"]): row for row in file.read().to_pylist()}


class ImagesInput(RowsInput):
    """All images below a folder, sorted by path; the caption of a.jpg is in a.txt."""

    local = True
    extra = PLACE_COLUMNS

    def __init__(self, path: Path, caption: str | None) -> None:
        super().__init__(path)
        self._with_captions = caption is not None
        self.scan()
        self.url, self.caption = "url", "caption"
        self.make_text("url", "caption")

    def digest(self) -> str:
        times = [(self.path / name).stat().st_mtime_ns for name in images_below(self.path)]
        return digest([self.content, times])

    def objects(self) -> Iterator[dict[str, Any]]:
        for name in images_below(self.path):
            file = self.path / name
            text = file.with_suffix(".txt")
            caption = _text(text.read_bytes()) if self._with_captions and text.exists() else None
            yield {"url": name, "caption": caption, **_place(name, 0, file.stat().st_size)}


class MetadataInput(Input):
    """Hugging Face's imagefolder: a table whose column file_name says where each image lies, below its own folder."""

    local = True

    def __init__(self, path: Path, base: Path, url: str, caption: str | None) -> None:
        super().__init__(path)
        self._base = base
        self._table = open_list(path, url, caption)
        self.caption = self._table.caption
        if "file_name" not in self._table.schema.names:
            raise UserError(
                f"{path}: there is no column 'file_name'. Its columns: {', '.join(self._table.schema.names)}."
            )
        self._url = self._table.url
        self.url = self._url or "url"
        fields = [f for f in self._table.schema if f.name != "file_name"]
        self.schema = pa.schema(fields if self._url else [("url", pa.string()), *fields])
        self.rows = self._table.rows
        sizes = [
            batch.column("@size").to_pylist() for batch in self.batches([])
        ]  # finds every image, or says which not
        self._content = [self._table.digest(), *sizes]

    def digest(self) -> str:
        return digest(self._content)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        line = 0
        for batch in self._table.batches([*columns, "file_name"]):
            names = batch.column("file_name").cast(pa.string()).to_pylist()
            places = [self._find(name, line + i) for i, name in enumerate(names, 1)]
            line += len(names)
            arrays = {n: batch.column(n) for n in batch.schema.names if n != "file_name"}
            if not self._url:
                arrays["url"] = pa.array([p["@path"] for p in places], pa.string())
            for name, kind in PLACE_COLUMNS:
                arrays[name] = pa.array([p[name] for p in places], kind)
            yield pa.RecordBatch.from_pydict(arrays)

    def _find(self, name: str | None, line: int) -> dict[str, Any]:
        where = f"{self.path}, row {line}: file_name {name!r}"
        if not name:
            raise UserError(f"{where} is empty.")
        outside = ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute()
        if outside or PureWindowsPath(name).drive or "\\" in name or "\0" in name:
            raise UserError(f"{where} is refused: it must be a path below the folder of the table.")
        file = self.path.parent / name
        if not file.is_file():
            raise UserError(f"{where} is not there.")
        return _place(file.relative_to(self._base).as_posix(), 0, file.stat().st_size)


def images_below(folder: Path) -> Iterator[str]:
    """The images below a folder as relative paths, sorted; hidden files and folders are passed over."""
    for name in sorted(_walk(folder)):
        try:
            name.encode()
        except UnicodeEncodeError as e:
            raise UserError(f"{folder}: the file name {name!r} is not UTF-8. Rename it.") from e
        yield name


def _walk(folder: Path) -> Iterator[str]:
    for here, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for file in files:
            if is_image(file):
                yield (Path(here) / file).relative_to(folder).as_posix()


def is_image(name: str) -> bool:
    """Whether a file is called like an image."""
    return not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and "." in name


def metadata_files(folder: Path) -> list[Path]:
    """The tables of an imagefolder: in the folder itself, or else in the folders right below it (its splits)."""
    for pattern in ("{}", "*/{}"):
        found = sorted(p for name in METADATA_FILES for p in folder.glob(pattern.format(name)))
        if any(_has_file_names(p) for p in found):
            return found
    return []


def _has_file_names(path: Path) -> bool:
    if list_format(path.name) == "parquet":
        return "file_name" in open_parquet(path).schema_arrow.names
    with open(path, "rb") as f:
        return b"file_name" in f.readline(1 << 16)


def _text(data: bytes) -> str | None:
    return data.decode("utf-8-sig", "replace").strip() or None


# --------------------------------------------------------------------------------------------- others' error messages

_CODE = r"(?:^|http |error:? |status:? ){}\b"
_MESSAGES = [
    (Reason.TOO_MANY_REDIRECTS, r"redirect"),
    (Reason.OPTED_OUT, r"x-robots-tag|robots\.txt|opt(ed)?.?out"),
    (Reason.HTTP_404, _CODE.format("404")),
    (Reason.HTTP_429, _CODE.format("429")),
    (Reason.HTTP_4XX, _CODE.format("4..")),
    (Reason.HTTP_5XX, _CODE.format("5..")),
    (
        Reason.DNS,
        r"name or service not known|name resolution|no address associated|getaddrinfo|nodename nor servname|idna",
    ),
    (Reason.TIMEOUT, r"timed? ?out"),
    (Reason.TLS, r"ssl|tls|certificate|hostname .* match"),
    (
        Reason.BAD_URL,
        r"unknown url type|no host given|nonnumeric port|invalid url|control characters|codec can't encode",
    ),
    (Reason.HASH_MISMATCH, r"hash mismatch"),
    (Reason.TOO_MANY_PIXELS, r"image area too large"),
    (Reason.PROTOCOL, r"incompleteread|remote end closed|badstatusline|http/|connection broken|chunk"),
    (Reason.DECODE_ERROR, r"decod|truncated|cannot identify image"),
]


def reason_of(message: str, status: str | None = None, reason: str | None = None) -> Reason:
    """Which of our reasons a failure is that another downloader put into words of its own (img2dataset's `str(err)`).

    `reason` is ours where the row comes from a run of ours; what no pattern knows is decode_error where the status is
    failed_to_resize, and connect where it is anything else.
    """
    if reason in set(Reason):
        return Reason(reason)
    for known, pattern in _MESSAGES:
        if re.search(pattern, message, re.IGNORECASE):
            return known
    return Reason.DECODE_ERROR if status == Status.FAILED_TO_RESIZE else Reason.CONNECT
