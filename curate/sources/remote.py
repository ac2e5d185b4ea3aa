"""Lists that lie elsewhere, copied whole: from object stores by our client, from the web and the hub by fsspec's."""

from __future__ import annotations

import errno
import glob
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aesthetic.errors import DiskFull, UserError
from curate.sources.listing import KNOWN_FORMATS, is_no_list, list_format, require_one_format
from curate.store.clients import is_url
from curate.store.files import check_space
from curate.store.objects import ObjectStore, StoredObject


def is_remote(name: str) -> bool:
    """Whether a LIST argument is not on this machine's file system."""
    return "://" in name and not name.startswith("file://")


def copy_lists(url: str, copies: Path) -> dict[Path, str]:
    """Copy the files of a remote list into a folder, in the order of their names.

    `url` is of a file, a folder or a pattern. Returns each copy with the file's path below that folder, or below the
    folder in which the pattern begins. Raises UserError where nothing is there, DiskFull before anything is copied
    where it would not fit.
    """
    if is_url(url):
        store, below, found = _find_objects(url)
        check_lists(url, (o.name for o in found))
        copies.mkdir(parents=True, exist_ok=True)
        check_space(copies, sum(o.size for o in found))
        named = {_copy_name(copies, index, o.name): o.name for index, o in enumerate(found)}
        store.get_files([(name, copy) for copy, name in named.items()])
        return {copy: name.removeprefix(below).lstrip("/") for copy, name in named.items()}
    fs, names = _find_by_fsspec(url)
    check_lists(url, names.values())
    copies.mkdir(parents=True, exist_ok=True)
    copied = {}
    for index, (path, name) in enumerate(names.items()):
        copy = _copy_name(copies, index, name)
        try:
            fs.get_file(path, str(copy))
        except Exception as e:
            if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(f"no space left while copying {path}") from e
            raise _remote_error(path, e) from e
        copied[copy] = name
    return copied


def check_lists(url: str, names: Iterable[str]) -> None:
    """UserError unless there are files, all lists of one format."""
    files = [name.rpartition("/")[2] for name in names]
    if not files:
        raise UserError(f"{url}: no list is there. Lists are {KNOWN_FORMATS}.")
    require_one_format(url, files)


def _copy_name(copies: Path, index: int, name: str) -> Path:
    return copies / f"list-{index:05d}-{name.rpartition('/')[2]}"


def _lists_below(folder: str, names: Iterable[str]) -> list[str]:
    """Those of the names that are lists, in the folder itself, or where it has none in those below it."""
    below = {n: n.removeprefix(folder.rstrip("/")).lstrip("/") for n in names}
    lists = [
        name
        for name, path in below.items()
        if list_format(path) and not is_no_list(path) and not any(p.startswith((".", "_")) for p in path.split("/"))
    ]
    return [name for name in lists if "/" not in below[name]] or lists


# ------------------------------------------------------------------------------------------------------ object stores


def _find_objects(url: str) -> tuple[ObjectStore, str, list[StoredObject]]:
    """(the store of the bucket, the folder that is looked through, the lists that a URL stands for, sorted)."""
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    store, path = ObjectStore(f"{scheme}://{bucket}"), re.sub("/+", "/", path).strip("/")
    if any(part in (".", "..") for part in path.split("/")):
        raise UserError(f"{url}: folders named '.' or '..' cannot be on an object store")
    if path and not url.endswith("/") and (found := store.head(path)) is not None:
        return store, path.rpartition("/")[0], [found]
    matches: Callable[[Mapping[str, StoredObject]], Iterable[str]]
    if glob.has_magic(path):
        from fsspec.utils import glob_translate

        parts = path.split("/")
        folder = "/".join(parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
        wanted = re.compile(glob_translate(path))

        def matches(names: Mapping[str, StoredObject]) -> Iterable[str]:
            hidden = (n for n in names if any(p.startswith(".") for p in n[len(folder) :].split("/")))
            return (n for n in names.keys() - set(hidden) if wanted.match(n))
    else:
        folder = path

        def matches(names: Mapping[str, StoredObject]) -> Iterable[str]:
            return _lists_below(folder, names)

    objects = {o.name: o for o in store.list(folder)}
    if not objects:
        raise UserError(f"{url}: there is no such object or folder.")
    return store, folder, [objects[name] for name in sorted(matches(objects))]


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
