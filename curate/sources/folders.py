"""Folders that hold images already, as inputs of a plan: tar shards, plain images, imagefolders, parquet with images.

Each row names the place of its bytes instead of something to fetch, or the failure that it came with: the rows of
img2dataset's parquet that have no image are rows of ours, so that the accounts still add up. What is an image, a
caption and a key is curate.sources.captioned's to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from aesthetic.errors import UserError
from aesthetic.untrusted import caption_of, clean, first_three
from curate.ledger.schema import EMBEDDED_COLUMNS, FETCHED_COLUMNS, Reason, Status
from curate.shards.tar import CorruptShard, image_member
from curate.sources.captioned import (
    Beside,
    Members,
    TarNotes,
    Troubles,
    below,
    image_column,
    read_json_member,
    read_text_member,
    tar_samples,
    text_member,
)
from curate.sources.listing import Listing, look
from curate.sources.lists import (
    CAPTION_NAMES,
    URL_NAMES,
    Input,
    RowsInput,
    named,
    open_list,
    open_parquet,
    parquet_batches,
)
from curate.store.files import digest

PLACE_COLUMNS = (
    ("@path", pa.string()),  # of the file that holds the bytes, relative to the plan's base
    ("@offset", pa.int64()),  # of the first byte; in a parquet file the number of the row
    ("@size", pa.int64()),
    ("@status", pa.string()),  # these three are set, and those above null, where the row came with a failure
    ("@reason", pa.string()),
    ("@error", pa.string()),
)
"""What a row of an image folder has beside the list's columns."""

_RESULTS = {name for name, _ in FETCHED_COLUMNS + EMBEDDED_COLUMNS}
"""Columns of a former run, img2dataset's or ours: results, which this run finds out anew."""

_MOST_NAMES = 500
"""Different names in the JSON of samples that become columns; what more there are is left out, and that is said."""


def _place(path: str, offset: int, size: int | None) -> dict[str, Any]:
    return {"@path": path, "@offset": offset, "@size": size, "@status": None, "@reason": None, "@error": None}


def _failure(reason: Reason, error: str) -> dict[str, Any]:
    place = dict.fromkeys(("@path", "@offset", "@size"))
    return {**place, "@status": reason.status.value, "@reason": reason.value, "@error": error}


def _came_with(row: dict[str, Any]) -> dict[str, Any]:
    """The failure that a row of img2dataset's parquet came with."""
    error = str(row.get("error_message") or "")
    return _failure(reason_of(error, row.get("status"), row.get("reason")), error)


class SamplesInput(RowsInput):
    """Rows that are samples: what is known of each becomes its columns, and each has a place or a failure."""

    local = True
    extra = PLACE_COLUMNS

    def __init__(self, path: Path, url: str, caption: str | None) -> None:
        super().__init__(path)
        self.notes = self.troubles = Troubles()
        self._wanted = url, caption
        self._names: set[str] = set()
        self.url, self.caption = "url", "caption"

    def find_out(self) -> None:
        """Go through all rows once; raises UserError where the JSON of too many can't be read."""
        self.scan()
        self.note_captions()
        self.troubles.refuse_many("json", self.rows, str(self.path))
        self.make_text("url", "caption")

    def row(self, facts: dict[str, Any], caption: str | None, place: dict[str, Any], name: str) -> dict[str, Any]:
        """A row from what is known of a sample; `caption` is that of a file of its own, `name` stands for its URL."""
        url, text = named(list(facts), self._wanted[0], URL_NAMES), None
        found = facts.get(url) if url else None
        result: dict[str, Any] = {"url": found if isinstance(found, str) and found else name, "caption": None}
        if self._wanted[1] is not None:
            text = named(list(facts), self._wanted[1], CAPTION_NAMES)
            result["caption"] = caption or (caption_of(facts[text]) if text else None)
        for key, value in facts.items():
            if key in (url, text, "url", "caption") or key in _RESULTS or key in place:
                continue
            if len(self._names) < _MOST_NAMES:
                self._names.add(key)
            if key in self._names:
                result[clean(key)] = value
            else:
                self.troubles.add("names", key)
        return result | place


def _merged(row: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """The row of a parquet and the JSON of the same sample, which has the last word."""
    return row | {k: v for k, v in told.items() if v is not None or k not in row}


class TarInput(SamplesInput):
    """A tar of samples (webdataset, img2dataset), and the parquet that img2dataset writes beside it.

    `image` says which image of a sample is meant, as in `tar_samples`.
    """

    def __init__(self, path: Path, base: Path, url: str, caption: str | None, image: str | None = None) -> None:
        super().__init__(path, url, caption)
        self._base = base
        try:
            self._found = tar_samples(path, image)
        except CorruptShard as e:  # names it
            raise UserError(f"{path}: {str(e).removeprefix(f'{path}: ')}. Remove or replace that file.") from e
        except OSError as e:
            raise UserError(f"{path}: cannot be read: {e.strerror or e}") from e
        self._beside = _img2dataset_rows(path.with_suffix(".parquet"))
        index = self._found.samples
        lost = [k for k, row in self._beside.items() if k not in index and row["status"] == Status.SUCCESS]
        if lost:
            raise UserError(
                f"{path.with_suffix('.parquet')} has {len(lost)} rows of status success, {lost[0]} the first, "
                f"that {path.name} has no sample for. The tar is not whole, or the two do not belong together."
            )
        self.find_out()
        about = TarNotes()
        about.add(self._found)
        self.troubles.said += about.lines()

    def digest(self) -> str:
        # every caption, JSON and place was read for it, the pixels were not: a shard may hold gigabytes
        return digest([self.content, self.path.stat().st_size])

    def objects(self) -> Iterator[dict[str, Any]]:
        index = self._found.samples
        # img2dataset writes both in the same order, so failed rows fall where they were
        with open(self.path, "rb") as tar:
            for key in [*self._beside, *(k for k in index if k not in self._beside)]:
                yield self._sample(tar, key, index.get(key), self._beside.get(key, {}))

    def _sample(self, tar: BinaryIO, key: str, members: Members | None, row: dict[str, Any]) -> dict[str, Any]:
        image = image_member(members, self._found.image) if members else None
        where = f"{self.path}, {key}"
        facts, caption = row, None
        if members and "json" in members:
            facts = _merged(row, read_json_member(tar, members["json"], f"{where}.json", self.troubles))
        if members and self._wanted[1] is not None and (at := text_member(members, image[0] if image else "")):
            caption = read_text_member(tar, at, f"{where}.txt", self.troubles)
        if image:
            place = _place(self.path.relative_to(self._base).as_posix(), *image[1])
        elif members:
            place = _failure(Reason.NOT_AN_IMAGE, self._why_none(members))
        else:
            place = _came_with(row)
        return self.row(facts, caption, place, f"{self.path.name}/{key}")

    def _why_none(self, members: Members) -> str:
        if self._found.images and self._found.image and any(image_member(members, kind) for kind in self._found.images):
            return f"the sample has no image {self._found.image}.jpg among its members, as others have"
        return "the sample has no image among its members"


def _img2dataset_rows(table: Path) -> dict[str, dict[str, Any]]:
    """The rows of img2dataset's parquet beside a tar or a folder, by key; empty where there is none."""
    if not table.exists():
        return {}
    names = open_parquet(table).schema_arrow.names
    if not {"key", "status"} <= set(names):
        return {}  # some other table
    return {str(row["key"]): row for batch in parquet_batches(table, names) for row in batch.to_pylist()}


class ImagesInput(SamplesInput):
    """All images below a folder, in the order of their paths, with what files beside them tell.

    Where img2dataset wrote them (`output_format=files`: 00000/KEY.jpg, and 00000.parquet beside the folder), the rows
    of its parquet that have no image are rows here too.
    """

    def __init__(self, path: Path, url: str, caption: str | None, listing: Listing | None = None) -> None:
        super().__init__(path, url, caption)
        listing = listing or look(path)
        self._images, self._beside = listing.images, Beside(listing, self.troubles)
        self._tables = {folder: _img2dataset_rows(path / f"{folder}.parquet") for folder in tabled_folders(listing)}
        self.find_out()

    def digest(self) -> str:
        times = [(self.path / name).stat().st_mtime_ns for name in self._images]
        return digest([self.content, times])

    def objects(self) -> Iterator[dict[str, Any]]:
        in_tables: dict[str, dict[str, str]] = {folder: {} for folder in self._tables}
        for name in self._images:
            folder, key = _folder_and_key(name)
            if key in self._tables.get(folder, ()):
                in_tables[folder].setdefault(key, name)
        done: set[str] = set()
        for name in self._images:
            folder, key = _folder_and_key(name)
            if folder in in_tables and folder not in done:
                done.add(folder)
                yield from self._table(folder, in_tables[folder])
            if in_tables.get(folder, {}).get(key) != name:
                yield self._image(name, {})
        for folder in sorted(self._tables.keys() - done):
            yield from self._table(folder, {})

    def _table(self, folder: str, names: dict[str, str]) -> Iterator[dict[str, Any]]:
        for key, row in self._tables[folder].items():
            if key in names:
                yield self._image(names[key], row)
            elif row["status"] == Status.SUCCESS:
                place = _failure(Reason.NOT_AN_IMAGE, f"{folder}.parquet says success, but there is no such image")
                yield self.row(row, None, place, f"{folder}/{key}")
            else:
                yield self.row(row, None, _came_with(row), f"{folder}/{key}")

    def _image(self, name: str, row: dict[str, Any]) -> dict[str, Any]:
        try:
            size = (self.path / name).stat().st_size
        except OSError as e:
            raise UserError(f"{self.path / name}: cannot be read: {e.strerror}") from e
        caption = self._beside.caption(name) if self._wanted[1] is not None else None
        return self.row(_merged(row, self._beside.facts(name)), caption, _place(name, 0, size), name)


def _folder_and_key(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    return folder, base.rpartition(".")[0]


def tabled_folders(listing: Listing) -> list[str]:
    """The folders of images that img2dataset wrote: those beside which its parquet of the same name lies."""
    folders = {name.rpartition("/")[0] for name in listing.images}
    tables = {name.removesuffix(".parquet") for name in listing.lists if name.endswith(".parquet")}
    return sorted(f for f in folders & tables if _is_img2datasets(listing.folder / f"{f}.parquet"))


def _is_img2datasets(table: Path) -> bool:
    return {"key", "status"} <= set(open_parquet(table).schema_arrow.names)


class MetadataInput(Input):
    """Hugging Face's imagefolder: a table whose column file_name says where each image lies, below its own folder.

    A row whose file is not there is a row without an image; where a row has no caption, a file beside its image may.
    """

    local = True
    extra = PLACE_COLUMNS

    def __init__(self, path: Path, base: Path, url: str, caption: str | None) -> None:
        super().__init__(path)
        self.notes = self.troubles = Troubles()
        self._base = base
        self._table = open_list(path, url, caption)
        names = self._table.schema.names
        if "file_name" not in names:
            raise UserError(f"{path}: there is no column 'file_name'. Its columns: {', '.join(names)}.")
        listing = look(path.parent)
        self._beside = Beside(listing, self.troubles)
        self._with_captions, self._caption, self._url = caption is not None, self._table.caption, self._table.url
        self.url, self.caption = self._url or "url", self._caption
        fields = [f for f in self._table.schema if f.name != "file_name"]
        if self._with_captions and self._caption is None and self._beside.any():
            self.caption = "caption"
            fields = [*(f for f in fields if f.name != "caption"), pa.field("caption", pa.string())]
        self.schema = pa.schema(fields if self._url else [("url", pa.string()), *fields])
        self.rows = self._table.rows
        self._named: set[str] = set()
        self._filled: list[str] = []  # captions that came from files beside the images
        # finds every image
        sizes = []
        for batch in self.batches([self.caption] if self.caption else []):
            sizes.append(batch.column("@size").to_pylist())
            self.uncaptioned += batch.column(self.caption).null_count if self.caption else batch.num_rows
        if self.rows and not any(size is not None for part in sizes for size in part):
            raise UserError(f"{path}: none of its rows names an image. {' '.join(self.troubles.sentences())}")
        self._content: list[Any] = [self._table.digest(), *sizes, *([self._filled] if self._filled else [])]
        self.troubles.said += self._table.notes.sentences()
        if left := [name for name in listing.images if name not in self._named]:
            self.troubles.said.append(f"{len(left):,} images are in no row, and left out: {first_three(left)}")

    def digest(self) -> str:
        return digest(self._content)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        line = 0
        self._filled = []
        wanted = {*columns, "file_name", *([self._caption] if self._caption else [])}
        for batch in self._table.batches([n for n in self._table.schema.names if n in wanted]):
            arrays = {n: batch.column(n) for n in batch.schema.names}
            broken = arrays.pop("\0error", pa.nulls(batch.num_rows)).to_pylist()
            reasons = arrays.pop("\0reason", pa.nulls(batch.num_rows)).to_pylist()
            names = arrays.pop("file_name").cast(pa.string()).to_pylist()
            found = [self._find(name, line + i) if not broken[i - 1] else "" for i, name in enumerate(names, 1)]
            places = [
                _failure(Reason(reason), why) if why else self._place(file, line + i)
                for i, (file, why, reason) in enumerate(zip(found, broken, reasons, strict=True), 1)
            ]
            line += len(names)
            if not self._url:
                urls = [p["@path"] or name for p, name in zip(places, names, strict=True)]
                arrays["url"] = pa.array(urls, pa.string())
            if self.caption and self.caption in columns and self._with_captions:
                arrays[self.caption] = self._captions(arrays.get(self.caption), found)
            for name, kind in PLACE_COLUMNS:
                arrays[name] = pa.array([p[name] for p in places], kind)
            yield pa.RecordBatch.from_pydict(arrays)

    def _captions(self, told: pa.Array | None, files: list[str]) -> pa.Array:
        """Those of the table, and where it has none, those of files beside the images."""
        if told is not None and (not pa.types.is_string(told.type) or not told.null_count):
            return told
        captions = told.to_pylist() if told is not None else [None] * len(files)
        for i, file in enumerate(files):
            if captions[i] is None and file and (caption := self._beside.any_caption(file)):
                captions[i] = caption
                self._filled.append(caption)
        return pa.array(captions, pa.string())

    def _find(self, name: str | None, line: int) -> str:
        """The path of a row's image below the table's folder; empty, and noted, where there is none."""
        where = f"row {line}: file_name {name!r}"
        try:
            file = below(name)
        except ValueError as e:
            self.troubles.add("metadata", where, f"{where} {e}")
            return ""
        if not (self.path.parent / file).is_file():
            self.troubles.add("absent", where, f"{where} is not there")
            return ""
        self._named.add(file)
        return file

    def _place(self, file: str, line: int) -> dict[str, Any]:
        if not file:
            return _failure(Reason.NOT_AN_IMAGE, f"row {line} of {self.path.name} names no file that is there")
        path = self.path.parent / file
        return _place(path.relative_to(self._base).as_posix(), 0, path.stat().st_size)


class ParquetImagesInput(Input):
    """A parquet file that holds the images themselves: Hugging Face's, and img2dataset's `output_format=parquet`."""

    local = True
    extra = PLACE_COLUMNS

    def __init__(self, path: Path, base: Path, url: str, caption: str | None) -> None:
        super().__init__(path)
        self._base = base
        self._table = open_list(path, url, caption)
        self._image = image_column(open_parquet(path).schema_arrow)
        self._url = self._table.url
        self.url, self.caption = self._url or "url", self._table.caption
        fields = [f for f in self._table.schema if f.name != self._image and f.name not in _RESULTS - {"url"}]
        self.schema = pa.schema(fields if self._url else [("url", pa.string()), *fields])
        self.rows = self._table.rows
        self.uncaptioned = 0 if self.caption else self.rows

    def digest(self) -> str:
        # of the footer, which says where each piece of each column lies: a file may hold gigabytes of images
        with open(self.path, "rb") as f:
            f.seek(-8, 2)
            size = f.tell() + 8
            f.seek(-min(size, 8 + int.from_bytes(f.read(4), "little")), 2)
            return digest([f.read().hex(), size])

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        row = 0
        results = [n for n in ("status", "error_message", "reason") if n in self._table.schema.names]
        names = [n for n in self._table.schema.names if n != self._image and (n in columns or n in results)]
        path = self.path.relative_to(self._base).as_posix()
        for batch in parquet_batches(self.path, names):
            arrays = {n: batch.column(n) for n in names}
            came = [arrays[n].to_pylist() if n in arrays else [None] * batch.num_rows for n in ("status", *results)]
            failed = "status" in results
            places = [
                _came_with(dict(zip(("status", *results), told, strict=True)))
                if failed and told[0] not in (None, Status.SUCCESS)
                else _place(path, row + i, None)
                for i, told in enumerate(zip(*came, strict=True))
            ]
            if not self._url:
                arrays["url"] = pa.array([f"{path}/{row + i}" for i in range(batch.num_rows)], pa.string())
            row += batch.num_rows
            for name, kind in PLACE_COLUMNS:
                arrays[name] = pa.array([p[name] for p in places], kind)
            yield pa.RecordBatch.from_pydict(arrays)


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
