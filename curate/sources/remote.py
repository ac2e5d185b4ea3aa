"""Lists that lie elsewhere, copied whole: from object stores by our client, from the web and the hub by fsspec's."""

from __future__ import annotations

import errno
import glob
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aesthetic.errors import DiskFull, UserError
from curate.sources.listing import KNOWN_FORMATS, is_image, is_no_list, list_format, require_one_format
from curate.store.files import check_space
from curate.store.objects import ObjectStore, StoredObject


def is_remote(name: str) -> bool:
    """Whether a LIST argument is not on this machine's file system."""
    return "://" in name and not name.startswith("file://")


@dataclass(frozen=True)
class RemoteFiles:
    """What a URL of an object store stands for: lists or tars, all of one folder."""

    store: ObjectStore  # of the folder
    files: list[StoredObject]  # sorted by their names, which are paths below the folder
    beside: dict[str, StoredObject]  # everything else there that was listed
    tars: bool


def copy_objects(found: RemoteFiles, copies: Path) -> dict[Path, str]:
    """Copy lists of an object store into a folder. Returns each copy with the file's path below the list's folder.

    Raises DiskFull before anything is copied where it would not fit.
    """
    copies.mkdir(parents=True, exist_ok=True)
    check_space(copies, sum(o.size for o in found.files))
    named = {copy_name(copies, index, o.name): o.name for index, o in enumerate(found.files)}
    found.store.get_files([(name, copy) for copy, name in named.items()])
    return named


def copy_lists(url: str, copies: Path) -> list[Path]:
    """Copy the files of a list on the web, the hub or elsewhere into a folder, in the order of their names.

    Raises UserError where nothing is there, DiskFull where it does not fit.
    """
    fs, names = _find_by_fsspec(url)
    _check_lists(url, names.values())
    copies.mkdir(parents=True, exist_ok=True)
    copied = []
    for index, (path, name) in enumerate(names.items()):
        copied.append(copy_name(copies, index, name))
        try:
            fs.get_file(path, str(copied[-1]))
        except Exception as e:
            if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(f"no space left while copying {path}") from e
            raise _remote_error(path, e) from e
    return copied


def _check_lists(url: str, names: Iterable[str], images: str = "") -> None:
    """UserError unless there are files, all lists of one format. `images`: what to say where images are there."""
    files = [name.rpartition("/")[2] for name in names]
    if not files:
        raise UserError(f"{url}: no list is there, and no tars. Lists are {KNOWN_FORMATS}. {images}".strip())
    require_one_format(url, files)


def copy_name(copies: Path, index: int, name: str) -> Path:
    return copies / f"list-{index:05d}-{name.rpartition('/')[2]}"


def _lists_below(folder: str, names: Iterable[str]) -> list[str]:
    """Those of the names that are lists, in the folder itself, or where it has none in those below it."""
    below = {n: n.removeprefix(folder.rstrip("/")).lstrip("/") for n in names}
    lists = [
        name
        for name, path in below.items()
        if list_format(path) and not is_no_list(path) and not any(p.startswith((".", "_")) for p in path.split("/"))
    ]
    return _at_the_top(folder.rstrip("/"), lists)


# ------------------------------------------------------------------------------------------------------ object stores


def find_objects(url: str) -> RemoteFiles:
    """The lists or tars that a URL of an object store stands for: a file, a folder or a pattern.

    A folder with tars is one of tars, as on a disk; what lies beside them is about them. UserError where nothing is.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    root, path = f"{scheme}://{bucket}", re.sub("/+", "/", path).strip("/")
    store = ObjectStore(root)
    if any(part in (".", "..") for part in path.split("/")):
        raise UserError(f"{url}: folders named '.' or '..' cannot be on an object store")
    folder, wanted = path, None
    if glob.has_magic(path):
        from fsspec.utils import glob_translate

        parts = path.split("/")
        folder = "/".join(parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
        wanted = re.compile(glob_translate(path))
    single = store.head(path) if path and not url.endswith("/") else None  # a name with brackets that is there, too
    if single is not None:
        folder, wanted = path.rpartition("/")[0], re.compile(re.escape(path) + r"\Z")
        about = store.head(f"{path.removesuffix('.tar')}.parquet") if _is_tar(path) else None
        objects = {o.name: o for o in (single, about) if o is not None}
    else:
        objects = {o.name: o for o in store.list(folder)}
    if not objects:
        raise UserError(f"{url}: there is no such object or folder.")
    names = [n for n in objects if not any(p.startswith(".") for p in n.removeprefix(folder).split("/"))]
    if wanted is not None:
        files = [n for n in names if wanted.match(n)]
    else:
        files = _at_the_top(folder, (n for n in names if _is_tar(n)))
        files = files or _lists_below(folder, names)
    tars = bool(files) and all(map(_is_tar, files))
    if not tars:
        image = next((n for n in names if is_image(n.rpartition("/")[2])), None)
        loose = f"Images are there ({image}): pack them into tars, or copy them to a disk." if image else ""
        _check_lists(url, files, loose)
    if tars and wanted is not None:  # as for a pattern on a disk: what all of them have in common
        folder = posixpath.commonpath([n.rpartition("/")[0] for n in files])
    below = {n: replace(o, name=n.removeprefix(folder).lstrip("/")) for n, o in objects.items()}
    taken = [below.pop(n) for n in sorted(files)]
    return RemoteFiles(ObjectStore(f"{root}/{folder}"), taken, {o.name: o for o in below.values()}, tars)


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar") and not name.rpartition("/")[2].startswith("_")


def _at_the_top(folder: str, names: Iterable[str]) -> list[str]:
    """Those of the names that are in the folder itself, or where none is, those below it."""
    below = {n: n.removeprefix(folder).lstrip("/") for n in names}
    return [n for n, path in below.items() if "/" not in path] or list(below)


# -------------------------------------------------------------------------------------------------------- other places


def _find_by_fsspec(url: str) -> tuple[Any, dict[str, str]]:
    """(file system, the path there of each list that a URL stands for -> its name), sorted."""
    import fsspec

    web = url.startswith(("http://", "https://"))
    # each file system has error types of its own: aiohttp's, huggingface_hub's, a missing package's
    try:
        fs, path = fsspec.core.url_to_fs(url)
        if web:  # one file: a ? in its address is no pattern, and the web has no folders
            paths = [path]
        elif glob.has_magic(path):
            paths = [p for p in fs.glob(path) if fs.isfile(p)]
        elif fs.isdir(path):
            paths = _lists_below(path, fs.ls(path, detail=False)) or _lists_below(path, fs.find(path))
        else:
            paths = [path]
    except Exception as e:
        raise _remote_error(url, e) from e
    return fs, {p: Path(urlsplit(p).path if web else p).name for p in sorted(paths)}


def _remote_error(url: str, e: Exception) -> UserError:
    if isinstance(e, ImportError):
        return UserError(f"{url}: {e}. `pip install 'tastemaker[remote]'` brings what it needs.")
    return UserError(f"{url}: cannot be read: {type(e).__name__}: {e}")
