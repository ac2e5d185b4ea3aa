"""What a LIST argument stands for, and what a folder of images is: found, copied where it is remote, opened."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pyarrow as pa

from aesthetic.errors import UserError
from aesthetic.untrusted import check_regular, first_three
from curate.shards.tar import CorruptShard
from curate.sources.dataset import MapDataset
from curate.sources.image_tables import ImageTableInput, ImageTables, image_column, tables_with_images
from curate.sources.images import Images, ImagesInput, MetadataInput
from curate.sources.img2dataset import tabled_folders
from curate.sources.inputs import Input
from curate.sources.listing import (
    ARCHIVES,
    KNOWN_FORMATS,
    UNREAD_EXTENSIONS,
    Listing,
    is_image,
    is_no_list,
    list_folder,
    list_format,
    require_one_format,
)
from curate.sources.lists import open_list
from curate.sources.packed import PackedShards, not_in_copy, packed_tars
from curate.sources.remote import copy_lists, copy_objects, find_objects, is_remote
from curate.sources.tars import (
    TarInput,
    Tars,
    index_samples,
    tars_of,
    tars_passed_over,
)
from curate.store.clients import is_url

if TYPE_CHECKING:
    from curate.sources.remote_tars import RemoteTars


@dataclass(frozen=True)
class Found:
    """The files that a LIST argument stands for."""

    name: str  # as it was given; absolute where it is on this machine
    kind: str  # list, tars, images, imagefolder or parquet
    files: list[Path]  # list files, tars, tables of an imagefolder, parquet with images, or the one folder of images
    base: Path | str | None = None  # what the places of images are relative to (a URL's, too); None for lists
    remote: bool = False
    names: dict[Path, str] = field(default_factory=dict, repr=False)  # of copies: their paths below the list's folder
    tars: RemoteTars | None = field(default=None, repr=False)  # where they are remote
    listing: Listing | None = field(default=None, repr=False)  # of a folder
    notes: list[str] = field(default_factory=list)  # what of a folder is not read, in sentences

    def open(self, file: Path, url: str, caption: str | None) -> Input:
        """One of the files as an input. Raises UserError where it cannot be read."""
        if self.base is None:
            source = open_list(file, url, caption)
            # what its folders say of all rows, as Hive and Spark name them: lang=en/part-0.parquet
            if self.remote:
                parts: Sequence[str] = self.names.get(file, "").split("/")[:-1]
            else:
                start = self.name
                if not os.path.exists(start):  # a pattern: its folders before the first that is one
                    start = start.split("*")[0].split("?")[0].split("[")[0].rpartition("/")[0]
                parts = file.parent.parts[len(Path(start).parts) :]
            named = ((unquote(k), v) for k, equals, v in (part.partition("=") for part in parts) if k and equals)
            source.constants = {
                k: None if v == "__HIVE_DEFAULT_PARTITION__" else unquote(v)
                for k, v in named
                if k not in source.schema.names
            }
            source.schema = pa.schema([*source.schema, *((n, pa.string()) for n in source.constants)])
            return source
        if self.tars is not None:
            return self.tars.open(file, url, caption)
        assert isinstance(self.base, Path)
        match self.kind:
            case "tars":
                return TarInput(file, self.base, url, caption, self._image_kind)
            case "images":
                return ImagesInput(file, url, caption, self.listing)
            case "parquet":
                return ImageTableInput(file, self.base, url, caption)
        return MetadataInput(file, self.base, url, caption)

    def shown(self, source: Input) -> str:
        """What to call an input in messages: where it lies, also where what is read is a copy."""
        if not self.remote:
            return str(source.path)
        name = source.origin.get("path") or self.names.get(source.path, source.path.name)
        return self.name if len(self.files) == 1 else f"{self.name}, {name}"

    @cached_property
    def _image_kind(self) -> str | None:
        """Which image of a sample is meant: the first tar that has any decides for all."""
        for tar in self.files:
            try:
                counts = index_samples(tar).counts
            except CorruptShard as e:  # names it
                raise UserError(f"{tar}: cannot be read: {str(e).removeprefix(f'{tar}: ')}") from e
            except OSError as e:
                raise UserError(f"{tar}: cannot be read: {e.strerror or e}") from e
            if counts.kinds:
                return counts.kind
        return None


def find(name: str, copies: Path) -> Found:
    """The files of a LIST argument: a file, a folder, a glob, or a URL, whose files are copied into `copies`."""
    if not name.strip():
        raise UserError("LIST is empty: name a file, a folder, a glob or a URL")  # and not the folder one is in
    if is_remote(name):
        return _find_remote(name, copies)
    path = Path(name.removeprefix("file://")).expanduser().absolute()
    if os.path.isdir(path):
        return _find_in_folder(path)
    files = [path]
    if not os.path.lexists(path):  # a name with brackets that is there is no pattern
        files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not files:
        raise UserError(f"{name}: there is no such file or folder.")
    for file in files:
        check_regular(file)
    base = Path(os.path.commonpath([p.parent for p in files]))
    if all(p.name.lower().endswith(".tar") for p in files):
        return Found(str(path), "tars", files, base)
    if all(is_image(p.name) or p.name.rpartition(".")[2].lower() in UNREAD_EXTENSIONS for p in files):
        raise UserError(f"{name}: is an image. Give the folder that it lies in.")
    if packed := [p.name for p in files if p.name.lower().endswith(ARCHIVES)]:
        raise UserError(f"{name}: {packed[0]} is compressed: unpack it, and give what comes out (tars, or a folder)")
    require_one_format(name, [p.name for p in files])
    if list_format(files[0].name) == "parquet" and image_column(files[0]) is not None:
        return Found(str(path), "parquet", files, base)
    return Found(str(path), "list", files)


def _find_remote(url: str, copies: Path) -> Found:
    if not is_url(url):
        return Found(url, "list", copy_lists(url, copies), remote=True)
    found = find_objects(url)
    if found.tars:
        from curate.sources.remote_tars import RemoteTars  # and what mirrors a folder: for these alone

        tars = RemoteTars(found, copies)
        return Found(url, "tars", list(tars.files), found.store.url, remote=True, tars=tars)
    names = copy_objects(found, copies)
    return Found(url, "list", list(names), remote=True, names=names)


def _find_in_folder(folder: Path) -> Found:
    listing = list_folder(folder)
    kind, notes = kind_of_folder(listing), listing.notes()
    match kind:
        case "imagefolder":
            tabled = tuple(table.rpartition("/")[0] for table in listing.tables)
            left = [n for n in listing.images if not any(not f or n.startswith(f"{f}/") for f in tabled)]
            if left:
                notes.append(
                    f"{len(left):,} images lie in no folder with metadata, and are left out: {first_three(left)}"
                )
            return Found(str(folder), kind, [folder / name for name in listing.tables], folder, notes=notes)
        case "tars":
            return Found(
                str(folder), kind, tars_of(listing), folder, notes=[*not_in_copy(folder), *tars_passed_over(listing)]
            )
        case "parquet":
            return Found(str(folder), kind, tables_with_images(listing), folder, notes=notes)

    lists = [name for name in listing.lists if not is_no_list(name)]
    own = [name for name in lists if "/" not in name]
    if kind == "images":
        about = {f"{name}.parquet" for name in tabled_folders(listing)}
        own = [name for name in own if name not in about and list_format(name) != "txt"]
        if own:
            raise UserError(
                f"{folder}: holds a list ({own[0]}) and images ({listing.images[0]}). Give the one that is meant. "
                f"(A table about these images is called metadata.csv, and says which by a column file_name.)"
            )
        return Found(str(folder), kind, [folder], folder, listing=listing, notes=notes)
    if own and len(own) < len(lists):
        notes.append(f"{len(lists) - len(own):,} lists in folders below are passed over: give one of those folders")
    own = own or lists  # as Spark and the Hugging Face hub lay them out
    if not own:
        raise UserError(f"{nothing_in(listing, 'neither a list nor images')}. Lists are {KNOWN_FORMATS}.")
    require_one_format(str(folder), own)
    return Found(str(folder), "list", [folder / name for name in own], notes=notes)


def stat(kind: str, path: Path) -> dict[str, Any]:
    """What tells cheaply whether an input is still the same: path, bytes in all, and the newest change."""
    paths = [] if kind == "images" else [path]
    if kind == "tars":
        paths += [p for p in [path.with_suffix(".parquet")] if p.exists()]
    elif kind in ("images", "imagefolder"):
        listing = list_folder(path if kind == "images" else path.parent)
        for image, texts, json in zip(listing.images, listing.texts, listing.jsons, strict=True):
            paths += [listing.folder / n for n in (image, *texts, json) if n]
        if kind == "images":
            paths += [path / f"{folder}.parquet" for folder in tabled_folders(listing)]
    try:
        stats = [p.stat() for p in paths]
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be read: {e.strerror}") from e
    return {
        "path": str(path),
        "size": sum(s.st_size for s in stats),
        "mtime_ns": max((s.st_mtime_ns for s in stats), default=0),
    }


# --------------------------------------------------------------------------------------------------- folders of images


class NothingRead(UserError):
    """A folder without an image that is read."""


def open_folder(folder: str | Path, default_caption: str | None = None) -> MapDataset:
    """The images of a folder, whatever it is, as a dataset; those without a caption have the default one.

    An image's caption is, first to last:

    - images: the row of the folder's metadata that names it; NAME.txt, NAME.caption, NAME.jpg.txt, NAME.jpg.caption;
      NAME.json
    - tars: KEY.txt, KEY.caption, KEY.jpg.txt; KEY.json
    - parquet: its column

    The column of a table or the name in a JSON object is `caption`, or one of its other usual names (`columns`). Bytes
    that are no text, and JSON that cannot be read, cost an image its caption, are counted, and the first are named.
    Raises UserError where there is no such folder, or none in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder. A folder of packed shards, of tars or of images is expected.")
    try:
        if packed_tars(folder) is not None:
            found: MapDataset = PackedShards(folder)
        else:
            listing = list_folder(folder)
            match kind_of_folder(listing):
                case "imagefolder" | "images":
                    found = Images(folder, listing)
                case "tars":
                    found = Tars(folder, listing)
                case "parquet":
                    found = ImageTables(folder, tables_with_images(listing), listing)
                case _:
                    raise NothingRead(nothing_in(listing))
    except CorruptShard as e:
        raise UserError(f"{e}. Remove or replace that file.") from e
    if not len(found):
        raise NothingRead(f"{folder}: holds neither tars nor images that are read. {' '.join(found.notes())}".strip())
    found.default_caption = default_caption
    return found


def kind_of_folder(listing: Listing) -> str | None:
    """imagefolder, tars, images or parquet: what a folder of images is; None where it holds none that are read.

    Raises UserError where it is a data folder of ours.
    """
    folder, own_tars = listing.folder, any("/" not in t for t in listing.tars)
    if not own_tars:
        inner = [p.parent for pattern in ("shards/*/sizes.json", "*/sizes.json") for p in sorted(folder.glob(pattern))]
        inner = [p for p in inner if packed_tars(p) is not None]
        if inner:
            raise UserError(f"{folder} holds packed shards, and is none itself. Did you mean {inner[0]}?")
        if (folder / "plan" / "plan.json").is_file():
            raise UserError(
                f"{folder} is a data folder of ours: `tastemaker pack {folder}` makes {folder / 'shards'}/NAME, "
                f"and {folder / 'fetched'} has all its images"
            )
    if listing.tables:
        return "imagefolder"
    if own_tars:
        return "tars"
    if listing.images:
        return "images"
    if listing.tars:
        return "tars"
    return "parquet" if tables_with_images(listing) else None


def nothing_in(listing: Listing, what: str = "neither tars nor images") -> str:
    """What to say of a folder in which there is no image that is read."""
    notes = "; ".join(listing.notes())
    if not notes and listing.unread_tables:
        notes = f"{first_three(listing.unread_tables)} (save it as parquet: Dataset.to_parquet, DataFrame.to_parquet)"
    return f"{listing.folder}: holds {what}" + (f" that are read: {notes}" if notes else "")
