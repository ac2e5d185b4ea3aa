"""What lies in a folder: images and the files about them, tars, tables, lists, and what of it is not read.

One walk for all commands, in which no file is opened but tables of metadata. Links to files are followed, to wherever
they lead; links to folders are not, so that none leads in circles. Hidden files and folders (macOS' `._` files among
them) are passed over. What a file is, its name says.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from aesthetic.errors import UserError
from aesthetic.untrusted import first_three, marked_encoding
from curate.shards.tar import IMAGE_EXTENSIONS

_ABOUT = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "croissant.json", "config.json")

KNOWN_FORMATS = ".parquet, or .csv, .tsv, .json, .jsonl, .ndjson, .txt, each also with .gz"
_TEXT_FORMATS = ("csv", "tsv", "json", "jsonl", "ndjson", "txt")

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables of Hugging Face's imagefolder; where a folder has several, the first of these is taken."""

TEXT_EXTENSIONS = ("txt", "caption")
"""Of files beside an image that hold its caption: NAME.txt, NAME.caption, NAME.jpg.txt, in this order."""

_CAMERAS = ("cr2", "cr3", "nef", "nrw", "arw", "dng", "raf", "orf", "rw2", "pef", "srw")
_OTHERS = ("heic", "heif", "hif", "jxl", "jp2", "j2k", "jpx", "jpf", "psd", "svg", "svgz", "ico", "tga", "exr", "hdr")
_BITMAPS = ("dds", "pbm", "pgm", "ppm", "pnm", "pcx", "wmf", "emf")
UNREAD_EXTENSIONS = frozenset((*_CAMERAS, *_OTHERS, *_BITMAPS))
"""Of images in formats that are not read. They are counted and named: nobody is to miss them."""

UNREAD_TABLES = (
    *("arrow", "feather", "tfrecord", "tfrecords", "xlsx", "xls", "ods", "avro", "orc", "h5", "hdf5", "lmdb", "mdb"),
)
"""Of tables in formats that are not read; where a folder holds nothing else, they are named."""

ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".zip", ".7z", ".rar")


def list_format(name: str) -> str | None:
    """The format that a file's name says: parquet, csv, tsv, json, jsonl, txt, or None for no list at all."""
    parts = name.lower().split(".")
    if parts[-1] == "parquet" and len(parts) > 1:
        return "parquet"
    if parts[-1] == "gz":
        parts.pop()
    if len(parts) < 2 or parts[-1] not in _TEXT_FORMATS:
        return None
    return "jsonl" if parts[-1] == "ndjson" else parts[-1]


def is_image(name: str) -> bool:
    """Whether a file is called like an image that can be read."""
    return not name.startswith(".") and "." in name and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def is_no_list(name: str) -> bool:
    """Whether a file is about a data set (the hub's, Spark's, Delta's), and no part of it."""
    *folders, file = name.split("/")
    return file in _ABOUT or file.lower() in ("readme.txt", "license.txt") or any(f.startswith("_") for f in folders)


def require_one_format(name: str, files: list[str]) -> None:
    """UserError unless all files are lists of one format; `name` is what they were given as."""
    formats = {list_format(f): f for f in files}
    if None in formats:
        raise UserError(f"{name}: {formats[None]} is not a list that can be read. Lists are {KNOWN_FORMATS}.")
    if len(formats) > 1:
        raise UserError(f"{name}: lists of several formats ({', '.join(sorted(formats.values()))}). Give one of them.")


@dataclass
class Listing:
    """The contents of a folder; names are paths below it, with slashes, in the order of their parts."""

    folder: Path
    images: list[str] = field(default_factory=list)
    texts: list[tuple[str, ...]] = field(default_factory=list)  # of each image: the files that may hold its caption
    jsons: list[str | None] = field(default_factory=list)  # of each image: the JSON file about it
    tars: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)  # metadata that says which file each row is about
    second_tables: list[str] = field(default_factory=list)  # beside another in the same folder, or below one
    lists: list[str] = field(default_factory=list)  # files that may be lists, and are about no image here
    archives: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)  # images in formats that are not read, by extension
    unread_tables: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)  # to folders
    no_files: list[str] = field(default_factory=list)  # called like something to read: pipes, dangling links
    closed: list[str] = field(default_factory=list)  # folders that may not be read
    not_utf8: list[str] = field(default_factory=list)  # as far as they can be shown

    def notes(self) -> list[str]:
        """What of the folder's images is not read, and what to do; a sentence each."""
        found = []
        if unread := sum(self.unread.values()):
            kinds = ", ".join(f"{n:,} .{e}" for e, n in self.unread.most_common(3))
            total = unread + len(self.images)
            what = f"{unread:,} of {total:,} images" if self.images else f"{unread:,} images"
            found.append(f"{what} cannot be read ({kinds}): convert them (to .jpg, .png or .webp)")
        for names, what in (
            (self.archives, "compressed, and not read: unpack {}"),
            (self.links, "a link to a folder, and not followed: give that folder itself ({})"),
            (self.no_files, "no regular file, and passed over ({})"),
            (self.closed, "not to be opened (no permission?), and passed over ({})"),
            (self.not_utf8, "not named in UTF-8, and passed over: rename {}"),
            (self.second_tables, "a second table of metadata in its folder, and passed over ({})"),
        ):
            if names:
                found.append(f"{len(names):,} {'is' if len(names) == 1 else 'are'} {what.format(first_three(names))}")
        return found


def list_folder(folder: Path) -> Listing:
    """What is in a folder and in those below it."""
    found = Listing(folder)
    images: list[tuple[str, tuple[str, ...], str | None]] = []
    waiting = [""]
    while waiting:
        subfolder = waiting.pop()
        prefix = f"{subfolder}/" if subfolder else ""
        try:
            with os.scandir(folder / subfolder) as entries:
                names = _readable(found, prefix, entries, waiting)
        except OSError:
            found.closed.append(subfolder or str(folder))
            continue
        images += _sort_files(found, prefix, names)
    images.sort(key=lambda image: image[0].split("/"))
    found.images = [name for name, _, _ in images]
    found.texts = [texts for _, texts, _ in images]
    found.jsons = [json for _, _, json in images]

    # a table is about all below its folder, so one below another is passed over
    folders = {t.rpartition("/")[0] for t in found.tables}
    for table in found.tables[:]:
        parts = table.split("/")[:-1]
        if any("/".join(parts[:n]) in folders for n in range(len(parts))):
            found.tables.remove(table)
            found.second_tables.append(table)
    for names in (
        *(found.tars, found.tables, found.lists, found.archives, found.unread_tables),
        *(found.second_tables, found.links, found.no_files, found.closed, found.not_utf8),
    ):
        names.sort(key=lambda name: name.split("/"))
    return found


def _readable(found: Listing, prefix: str, entries: Iterable[os.DirEntry[str]], waiting: list[str]) -> list[str]:
    """The names of the files of one folder that may be read; folders below it are put on `waiting`."""
    names = []
    for entry in entries:
        name = entry.name
        if name.startswith(".") or name == "__MACOSX":
            continue
        try:
            name.encode()
        except UnicodeEncodeError:
            found.not_utf8.append((prefix + name).encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
            continue
        try:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(prefix + name)
            elif entry.is_file():
                names.append(name)
            elif entry.is_dir():
                found.links.append(prefix + name)
            elif is_image(name) or list_format(name) or name.lower().endswith((".tar", ".json", ".caption")):
                found.no_files.append(prefix + name)
        except OSError:  # a link that leads back to itself, or to where nobody may look
            found.no_files.append(prefix + name)
    return names


def _sort_files(found: Listing, prefix: str, names: list[str]) -> list[tuple[str, tuple[str, ...], str | None]]:
    """Sort the files of one folder; returns its images: (path, files with its caption, JSON about it)."""
    images, sidecars, others, stems = [], {}, [], set()
    for name in names:
        stem, _, extension = name.rpartition(".")
        extension = extension.lower() if stem else ""
        if extension in IMAGE_EXTENSIONS:
            images.append(name)
            stems |= {stem, name}
        elif extension in UNREAD_EXTENSIONS:
            found.unread[extension] += 1
            stems |= {stem, name}
        elif name.lower().endswith(ARCHIVES):
            found.archives.append(prefix + name)
        elif extension in UNREAD_TABLES:
            found.unread_tables.append(prefix + name)
        elif extension == "tar":
            found.tars.append(prefix + name)
        elif extension in ("json", *TEXT_EXTENSIONS):
            sidecars[f"{stem}.{extension}"] = name  # NAME.TXT is NAME.txt, unless that is there too
        else:
            others.append(name)
    sidecars |= {name: name for name in names if name in sidecars}

    result = []
    for name in images:
        stem = name.rpartition(".")[0]
        candidates = [f"{base}.{extension}" for base in (stem, name) for extension in TEXT_EXTENSIONS]
        texts = tuple(prefix + sidecars[t] for t in candidates if t in sidecars)
        json = sidecars.get(f"{stem}.json") or sidecars.get(f"{name}.json")
        result.append((prefix + name, texts, prefix + json if json else None))

    tables = [n for n in METADATA_FILES if n in others and _has_file_names(found.folder / prefix / n)]
    found.tables += [prefix + n for n in tables[:1]]
    found.second_tables += [prefix + n for n in tables[1:]]
    others += [name for key, name in sidecars.items() if key.rpartition(".")[0] not in stems]
    for name in others:
        if list_format(name) and name not in tables and not name.startswith("_") and not name.endswith("_stats.json"):
            found.lists.append(prefix + name)
    return result


def _has_file_names(path: Path) -> bool:
    """Whether a table has the column that makes it one of an imagefolder's."""
    try:
        if path.suffix == ".parquet":
            from curate.sources.parquet import open_parquet  # brings pyarrow, which who asks for names does not need

            return "file_name" in open_parquet(path).schema_arrow.names
        with open(path, "rb") as f:
            head = f.read(1 << 16)
    except (UserError, OSError):
        return True  # whoever reads it says what is wrong
    encoding, start = marked_encoding(head[:4]) or ("utf-8", 0)
    return "file_name" in head[start:].decode(encoding, "replace")
