"""Folders of image files, with captions in files beside them or in a table: as a dataset and as inputs of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pyarrow as pa

from aesthetic.errors import UserError
from aesthetic.untrusted import caption_of, first_three, read_bytes
from curate.ledger.schema import Reason, Status
from curate.sources.dataset import MapDataset, caption_in, json_in, read_image, text_in
from curate.sources.img2dataset import failed_place, rows_by_key, tabled_folders
from curate.sources.inputs import FAILURES, PLACE_COLUMNS, Input, SamplesInput, merged, no_place, place
from curate.sources.listing import Listing, list_folder
from curate.sources.lists import open_list
from curate.sources.problems import LARGEST_CAPTION, Problems
from curate.store.files import digest


def path_below(name: Any) -> str:
    """A file name in a table as a path below the table's folder; `./` and backslashes are seen through.

    Raises ValueError, saying why, where it is none.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError("is empty")
    path = PurePosixPath(name.replace("\\", "/"))
    if ".." in path.parts or path.is_absolute() or PureWindowsPath(name).drive or "\0" in name or not path.parts:
        raise ValueError("is refused: it must be a path below the folder of the table")
    return path.as_posix()


class Sidecars:
    """What files beside the images of a folder tell of them."""

    def __init__(self, listing: Listing, problems: Problems) -> None:
        self._folder, self._problems = listing.folder, problems
        files = zip(listing.texts, listing.jsons, strict=True)
        self.files = {n: f for n, f in zip(listing.images, files, strict=True) if f != ((), None)}

    def caption(self, image: str) -> str | None:
        """The caption in a file of its own: the first that is not empty."""
        for name in self.files.get(image, ((), None))[0]:
            data = self._read(name)
            if data is not None and (caption := text_in(data, name, self._problems)) is not None:
                return caption
        return None

    def facts(self, image: str) -> dict[str, Any]:
        """What the JSON beside an image says."""
        name = self.files.get(image, ((), None))[1]
        data = self._read(name) if name else None
        return json_in(data, name, self._problems) if name and data is not None else {}

    def _read(self, name: str) -> bytes | None:
        try:
            return read_bytes(self._folder / name, LARGEST_CAPTION)
        except UserError as e:
            self._problems.add_once("size", name, str(e))
            return None


def open_metadata(path: Path, url: str, caption: str | None) -> Input:
    """A table whose column file_name says which image each row is about. Raises UserError where it has none."""
    table = open_list(path, url, caption)
    if "file_name" not in table.schema.names:
        raise UserError(f"{path}: there is no column 'file_name'. Its columns: {', '.join(table.schema.names)}.")
    if pa.types.is_nested(kind := table.schema.field("file_name").type):
        raise UserError(f"{path}: column 'file_name' holds {kind}, not text.")
    return table


def read_metadata(
    table: Input, columns: Sequence[str], problems: Problems
) -> Iterator[tuple[pa.RecordBatch, list[str], list[str | None]]]:
    """The rows of such a table in batches, each with (the path of every row's image below the table's folder, "" where
    it names none that is there, which is a problem; what is wrong with rows that are broken lines).
    """
    line = 0
    names = [n for n in table.schema.names if n in columns or n == "file_name"]
    for batch in table.batches(names):
        broken = batch.column(FAILURES[1][0]).to_pylist() if table.own_columns else [None] * batch.num_rows
        files = []
        for name, error in zip(batch.column("file_name").cast(pa.string()).to_pylist(), broken, strict=True):
            line += 1
            files.append("")
            if error:
                continue
            where = f"{table.path.name}, row {line}: file_name {name!r}"
            try:
                file = path_below(name)
            except ValueError as e:
                problems.add_once("metadata", where, f"{where} {e}")
                continue
            if (table.path.parent / file).is_file():
                files[-1] = file
            else:
                problems.add_once("absent", where, f"{where} is not there")
        yield batch.select(names), files, broken


class Images(MapDataset):
    """The image files under a folder, and what its metadata (Hugging Face's imagefolder) and files beside them tell."""

    def __init__(self, folder: str | Path, listing: Listing | None = None) -> None:
        self.folder, self.problems = Path(folder), Problems()
        self.listing = listing or list_folder(self.folder)
        self._sidecars = Sidecars(self.listing, self.problems)
        self._names, self._rows = self.listing.images, dict[str, dict[str, Any]]()
        for table in self.listing.tables:
            source = open_metadata(self.folder / table, "url", "caption")
            for batch, files, _ in read_metadata(source, source.schema.names, self.problems):
                for row, file in zip(batch.to_pylist(), files, strict=True):
                    if file and source.caption:
                        row["caption"] = caption_of(row[source.caption])
                    if file:
                        self._rows[(PurePosixPath(table).parent / file).as_posix()] = row
            self.problems.general += [f"{table}: {sentence}" for sentence in source.problems.sentences()]
            self.problems.refuse_many("metadata", source.rows, str(self.folder / table))
        if others := self._rows.keys() - set(self._names):  # called like no image, and named as one
            self._names = sorted([*self._names, *others], key=lambda name: name.split("/"))

    def __len__(self) -> int:
        return len(self._names)

    def files(self) -> list[Path]:
        return [self.folder / name for name in self._names]

    def passed_over(self) -> list[str]:
        notes = self.listing.notes()
        tables = (".csv", ".tsv", ".json", ".jsonl")
        own = [n for n in self.listing.lists if "/" not in n and n.lower().endswith(tables)]
        if own and not self._rows:
            way = "a table of captions is metadata.csv or metadata.jsonl, with a column file_name"
            notes.append(f"{first_three(own)}: not read; {way}")
        if self._rows and (silent := [n for n in self._names if n not in self._rows]):
            notes.append(f"{len(silent):,} images are not in the metadata: {first_three(silent)}")
        return notes

    def key(self, index: int) -> str:
        return self._names[index]

    def image(self, index: int) -> bytes:
        return read_image(self.folder / self._names[index])

    def maybe_captioned(self) -> Iterable[int]:
        return (i for i, name in enumerate(self._names) if name in self._rows or name in self._sidecars.files)

    def read_facts(self, index: int) -> dict[str, Any]:
        name = self._names[index]
        row, facts = self._rows.get(name, {}), self._sidecars.facts(name)
        caption = row.get("caption") or self._sidecars.caption(name) or caption_in(facts)
        return {**facts, **row, "key": name, "caption": caption}


# -------------------------------------------------------------------------------------------------------------- inputs


class ImagesInput(SamplesInput):
    """All images below a folder, in the order of their paths, with what files beside them tell.

    Where img2dataset wrote them (`output_format=files`: 00000/KEY.jpg, and 00000.parquet beside the folder), the rows
    of its parquet that have no image are rows here too.
    """

    def __init__(self, path: Path, url: str, caption: str | None, listing: Listing | None = None) -> None:
        super().__init__(path, url, caption)
        listing = listing or list_folder(path)
        self._images, self._sidecars = listing.images, Sidecars(listing, self.problems)
        self._tables = {folder: rows_by_key(path / f"{folder}.parquet") for folder in tabled_folders(listing)}
        self.read_all()

    def digest(self) -> str:
        times = [(self.path / name).stat().st_mtime_ns for name in self._images]
        return digest([self.content, times])

    def objects(self) -> Iterator[dict[str, Any]]:
        in_table: dict[str, dict[str, str]] = {folder: {} for folder in self._tables}  # folder -> key -> image
        for name in self._images:
            folder, key = _folder_and_key(name)
            if key in self._tables.get(folder, ()):
                in_table[folder].setdefault(key, name)
        done: set[str] = set()
        for name in self._images:
            folder, key = _folder_and_key(name)
            if folder in in_table and folder not in done:
                done.add(folder)
                yield from self._table_rows(folder, in_table[folder])
            if in_table.get(folder, {}).get(key) != name:
                yield self._image_row(name, {})
        for folder in sorted(self._tables.keys() - done):
            yield from self._table_rows(folder, {})

    def _table_rows(self, folder: str, images: dict[str, str]) -> Iterator[dict[str, Any]]:
        for key, row in self._tables[folder].items():
            if key in images:
                yield self._image_row(images[key], row)
            elif row["status"] == Status.SUCCESS:
                why = f"{folder}.parquet says success, but there is no such image"
                yield self.row(row, None, no_place(Reason.NOT_AN_IMAGE, why), f"{folder}/{key}")
            else:
                yield self.row(row, None, failed_place(row), f"{folder}/{key}")

    def _image_row(self, name: str, row: dict[str, Any]) -> dict[str, Any]:
        try:
            size = (self.path / name).stat().st_size
        except OSError as e:
            raise UserError(f"{self.path / name}: cannot be read: {e.strerror}") from e
        caption = self._sidecars.caption(name) if self._wanted_caption is not None else None
        return self.row(merged(row, self._sidecars.facts(name)), caption, place(name, 0, size), name)


def _folder_and_key(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    return folder, base.rpartition(".")[0]


class MetadataInput(Input):
    """Hugging Face's imagefolder: a table whose column file_name says where each image lies, below its own folder.

    A row whose file is not there is a row without an image; where a row has no caption, a file beside its image may.
    """

    local = True
    own_columns = PLACE_COLUMNS

    def __init__(self, path: Path, base: Path, url: str, caption: str | None) -> None:
        super().__init__(path)
        self._base = base
        self._table = open_metadata(path, url, caption)
        listing = list_folder(path.parent)
        self._sidecars = Sidecars(listing, self.problems)
        self._fill_captions = caption is not None
        self.url, self.caption = self._table.url or "url", self._table.caption
        fields = [f for f in self._table.schema if f.name != "file_name"]
        if self._fill_captions and self.caption is None and self._sidecars.files:
            self.caption = "caption"
            fields = [*(f for f in fields if f.name != "caption"), pa.field("caption", pa.string())]
        self.schema = pa.schema(fields if self._table.url else [("url", pa.string()), *fields])
        self.rows = self._table.rows
        self._named: set[str] = set()

        # every image is looked for once
        self._filled: list[str] = []  # captions that came from files beside the images
        sizes = []
        for batch in self.batches([self.caption] if self.caption else []):
            sizes.append(batch.column("@size").to_pylist())
            self.uncaptioned += batch.column(self.caption).null_count if self.caption else batch.num_rows
        if self.rows and not any(size is not None for part in sizes for size in part):
            raise UserError(f"{path}: none of its rows names an image. {' '.join(self.problems.sentences())}")
        self._content: list[Any] = [self._table.digest(), *sizes, *([self._filled] if self._filled else [])]
        self.problems.general += self._table.problems.sentences()
        if left := [name for name in listing.images if name not in self._named]:
            self.problems.general.append(f"{len(left):,} images are in no row, and left out: {first_three(left)}")

    def digest(self) -> str:
        return digest(self._content)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        line = 0
        self._filled = []
        wanted = [*columns, *([self._table.caption] if self._table.caption else [])]
        for batch, files, broken in read_metadata(self._table, wanted, self.problems):
            self._named.update(files)
            arrays = {n: batch.column(n) for n in batch.schema.names}
            names = arrays.pop("file_name").cast(pa.string()).to_pylist()
            places = []
            for file, error in zip(files, broken, strict=True):
                line += 1
                path = self.path.parent / file
                if file:
                    places.append(place(path.relative_to(self._base).as_posix(), 0, path.stat().st_size))
                elif error:
                    places.append(no_place(Reason.BAD_LINE, error))
                else:
                    why = f"row {line} of {self.path.name} names no file that is there"
                    places.append(no_place(Reason.NOT_AN_IMAGE, why))
            if not self._table.url:
                urls = [p["@path"] or name for p, name in zip(places, names, strict=True)]
                arrays["url"] = pa.array(urls, pa.string())
            if self.caption and self.caption in columns and self._fill_captions:
                column = arrays.get(self.caption)
                if column is None or (pa.types.is_string(column.type) and column.null_count):
                    captions = column.to_pylist() if column is not None else [None] * len(files)
                    for i, file in enumerate(files):
                        if captions[i] is None and file:
                            captions[i] = text = self._sidecars.caption(file) or caption_in(self._sidecars.facts(file))
                            self._filled += [text] if text else []
                    arrays[self.caption] = pa.array(captions, pa.string())
            for name, kind in PLACE_COLUMNS:
                arrays[name] = pa.array([p[name] for p in places], kind)
            yield pa.RecordBatch.from_pydict(arrays)
