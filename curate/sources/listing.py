"""What lies in a folder: pictures and the files about them, tars, tables, lists, and what of it is not read.

One walk for all commands, in which no file is opened. Links to files are followed, to wherever they lead; links to
folders are not, so that none leads in circles. Hidden files and folders (macOS' `._` files among them) are passed over.
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
from curate.sources.lists import list_format, open_parquet

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables of Hugging Face's imagefolder; where a folder has several, the first of these is taken."""

TEXT_EXTENSIONS = ("txt", "caption")
"""Of files beside a picture that hold its caption: NAME.txt, NAME.caption, NAME.jpg.txt, in this order."""

_CAMERAS = ("cr2", "cr3", "nef", "nrw", "arw", "dng", "raf", "orf", "rw2", "pef", "srw")
_OTHERS = ("heic", "heif", "hif", "jxl", "jp2", "j2k", "jpx", "jpf", "psd", "svg", "svgz", "ico", "tga", "exr", "hdr")
_BITMAPS = ("dds", "pbm", "pgm", "ppm", "pnm", "pcx", "wmf", "emf")
UNREAD_EXTENSIONS = frozenset((*_CAMERAS, *_OTHERS, *_BITMAPS))
"""Of pictures in formats that are not read. They are counted and named: nobody is to miss them."""

TABLES = ("arrow", "feather", "tfrecord", "tfrecords", "xlsx", "xls", "ods", "avro", "orc", "h5", "hdf5", "lmdb", "mdb")
"""Of tables in formats that are not read; where a folder holds nothing else, they are named."""

ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".zip", ".7z", ".rar")


@dataclass
class Listing:
    """The contents of a folder; names are paths below it, with slashes, in the order of their parts."""

    folder: Path
    images: list[str] = field(default_factory=list)
    texts: list[tuple[str, ...]] = field(default_factory=list)  # of each image: the files that may hold its caption
    jsons: list[str | None] = field(default_factory=list)  # of each image: the JSON file that tells of it
    tars: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)  # metadata that says which file each row is about
    tables_passed_over: list[str] = field(default_factory=list)  # beside another in the same folder
    lists: list[str] = field(default_factory=list)  # files that may be lists, and are about no picture here
    archives: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)  # pictures in formats that are not read, by extension
    others: list[str] = field(default_factory=list)  # tables in formats that are not read
    links: list[str] = field(default_factory=list)  # to folders
    no_files: list[str] = field(default_factory=list)  # called like something to read: pipes, dangling links
    closed: list[str] = field(default_factory=list)  # folders that may not be read
    not_utf8: list[str] = field(default_factory=list)  # as far as they can be shown

    def notes(self) -> list[str]:
        """What of the folder's pictures is not read, and what to do; a sentence each."""
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
            (self.tables_passed_over, "a second table of metadata in its folder, and passed over ({})"),
        ):
            if names:
                found.append(f"{len(names):,} {'is' if len(names) == 1 else 'are'} {what.format(first_three(names))}")
        return found


def look(folder: Path) -> Listing:
    """What is in a folder and in those below it."""
    found = Listing(folder)
    pictures: list[tuple[list[str], str, tuple[str, ...], str | None]] = []
    waiting = [""]
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(folder / here) as entries:
                names = _files(found, here, entries, waiting)
        except OSError:
            found.closed.append(here or str(folder))
            continue
        pictures += _look_in(found, here, names)
    pictures.sort(key=lambda p: p[0])
    found.images = [name for _, name, _, _ in pictures]
    found.texts = [texts for _, _, texts, _ in pictures]
    found.jsons = [told for _, _, _, told in pictures]
    for kind in (
        found.tars,
        found.lists,
        found.archives,
        found.others,
        found.links,
        found.no_files,
        found.closed,
        found.not_utf8,
    ):
        kind.sort(key=lambda name: name.split("/"))
    found.tables = _topmost(found, found.tables)
    return found


def _files(found: Listing, here: str, entries: Iterable[os.DirEntry[str]], waiting: list[str]) -> list[str]:
    """The names of the files of one folder that may be read; folders below it are put on `waiting`."""
    names = []
    for entry in entries:
        name = entry.name
        if name.startswith(".") or name == "__MACOSX":
            continue
        below = f"{here}/{name}" if here else name
        try:
            name.encode()
        except UnicodeEncodeError:
            found.not_utf8.append(below.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
            continue
        try:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(below)
            elif entry.is_file():
                names.append(name)
            elif entry.is_dir():
                found.links.append(below)
            elif _may_be_read(name):
                found.no_files.append(below)
        except OSError:  # a link that leads back to itself, or to where nobody may look
            found.no_files.append(below)
    return names


def _may_be_read(name: str) -> bool:
    ending = name.rpartition(".")[2].lower()
    return is_image(name) or ending in ("tar", "json", *TEXT_EXTENSIONS) or list_format(name) is not None


def is_image(name: str) -> bool:
    """Whether a file is called like an image that can be read."""
    return not name.startswith(".") and "." in name and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _look_in(found: Listing, here: str, names: list[str]) -> list[tuple[list[str], str, tuple[str, ...], str | None]]:
    """Sort the files of one folder; returns its images: (parts, path, files with its caption, JSON about it)."""
    prefix = f"{here}/" if here else ""
    images, about, others, stems = [], {}, [], set()
    for name in names:
        stem, _, ending = name.rpartition(".")
        ending = ending.lower()
        if stem and ending in IMAGE_EXTENSIONS:
            images.append(name)
        elif stem and ending in UNREAD_EXTENSIONS:
            found.unread[ending] += 1
        elif name.lower().endswith(ARCHIVES):
            found.archives.append(prefix + name)
            continue
        elif stem and ending in TABLES:
            found.others.append(prefix + name)
            continue
        elif stem and ending == "tar":
            found.tars.append(prefix + name)
            continue
        elif stem and ending in ("json", *TEXT_EXTENSIONS):
            about[f"{stem}.{ending}"] = name  # NAME.TXT is NAME.txt, unless that is there too
            continue
        else:
            others.append(name)
            continue
        stems |= {stem, name}
    for name in names:
        if name in about:
            about[name] = name
    told = []
    for name in images:
        stem = name.rpartition(".")[0]
        texts = tuple(prefix + about[t] for t in _texts_of(stem, name) if t in about)
        json = about.get(f"{stem}.json") or about.get(f"{name}.json")
        told.append(((prefix + name).split("/"), prefix + name, texts, prefix + json if json else None))
    tables = [n for n in METADATA_FILES if n in others and _says_file_names(found.folder / here / n)]
    found.tables += [prefix + n for n in tables[:1]]
    found.tables_passed_over += [prefix + n for n in tables[1:]]
    others += [name for key, name in about.items() if key.rpartition(".")[0] not in stems]
    for name in others:
        if list_format(name) and name not in tables and not name.startswith("_") and not name.endswith("_stats.json"):
            found.lists.append(prefix + name)
    return told


def _texts_of(stem: str, name: str) -> list[str]:
    return [f"{stem}.{e}" for e in TEXT_EXTENSIONS] + [f"{name}.{e}" for e in TEXT_EXTENSIONS]


def _topmost(found: Listing, tables: list[str]) -> list[str]:
    """The tables in whose folders, or those above, there is no other: a table tells of all below its folder."""
    folders = {t.rpartition("/")[0] for t in tables}

    def below_another(table: str) -> bool:
        parts = table.split("/")[:-1]
        return any("/".join(parts[:n]) in folders for n in range(len(parts)))

    found.tables_passed_over += sorted(t for t in tables if below_another(t))
    return sorted((t for t in tables if not below_another(t)), key=lambda name: name.split("/"))


def _says_file_names(path: Path) -> bool:
    """Whether a table has the column that makes it one of an imagefolder's."""
    if path.suffix == ".parquet":
        try:
            return "file_name" in open_parquet(path).schema_arrow.names
        except UserError:
            return True  # whoever reads it says what is wrong
    try:
        with open(path, "rb") as f:
            head = f.read(1 << 16)
    except OSError:
        return True
    encoding, start = marked_encoding(head[:4]) or ("utf-8", 0)
    return "file_name" in head[start:].decode(encoding, "replace")
