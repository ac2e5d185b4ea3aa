"""A folder of an object store, mirrored here: stages read and write whole local files, and whole files move."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aesthetic.errors import UserError
from aesthetic.files import write_atomic
from curate.store.cache import cache_folder, keep, link, make_room, one_at_a_time, own_folder
from curate.store.clients import StoreUnavailable, is_url
from curate.store.disk import Disk, FileChanged, Stamp
from curate.store.files import digest, is_scratch, json_bytes, local_path
from curate.store.lease import Lease, LeaseLost, check_token
from curate.store.objects import Changed, ObjectStore, StoredObject
from curate.store.records import parse_record

_FETCHES = 32  # files at a time
_PATIENCE = 8.0  # seconds that a store is asked for before anything is done

_MARK = "outputs"
"""User metadata of a record's object: a digest of the ETags of its outputs. The record itself holds the same bytes as
on a disk; by its mark it is known when somebody whose lease was lost has written over one of them."""


def open_store(place: str) -> Disk:
    """The store of a folder: at a path, or at a URL, which is looked at. UserError where that is none, or cannot be
    reached."""
    if not is_url(place):
        return Disk(local_path(place))
    objects = ObjectStore(place, patience=_PATIENCE)
    try:
        objects.names("")
    except StoreUnavailable as e:
        raise UserError(str(e)) from e
    return open_mirror(objects.url)


@functools.cache
def open_mirror(url: str) -> Mirror:
    """The mirror of a URL in this process, which has but one."""
    mirror = _mirrors[url] = Mirror(url)
    return mirror


def store_at(path: Path) -> Disk:
    """The store of a file or folder here: the mirror that it is in, else the disk, with it as the root."""
    found = (mirror for mirror in _mirrors.values() if path.is_relative_to(mirror.root))
    return max(found, key=lambda mirror: len(mirror.root.parts), default=Disk(path))


def here(place: str, without: Iterable[str] = ()) -> Path:
    """The path of a file or folder to read: of one at a URL, of its copy here, brought once in a process.

    `without`: names in the folder of what is not wanted. What is not there is not here either.
    """
    return _copied(place, frozenset(without)) if is_url(place) else Path(place).expanduser()


@functools.cache
def _copied(url: str, without: frozenset[str]) -> Path:
    above, _, name = ObjectStore(url).url.rpartition("/")
    file = None if above.endswith("/") else open_mirror(above).root / name  # where it is no bucket
    if file is not None and "." in name:  # as files are called
        open_mirror(above).bring([file])
        if file.is_file():
            return file
    store = open_mirror(ObjectStore(url).url)
    store.refresh()
    wanted = [n for n in store.names(store.root) if n not in without]
    if not wanted and file is not None:
        return file  # which is not there
    if store.stamp(store.root / "plan" / "plan.json") is not None:
        raise UserError(f"{url} is a data folder of ours, which may have terabytes: it is not copied whole")
    folders = {*store.folders(store.root)}
    store.bring(p for n in wanted for p in (store.walk(store.root / n) if n in folders else [store.root / n]))
    return store.root


def in_urls(text: str) -> str:
    """A text, such as an error's, with URLs in place of the paths of their mirrors: what people know."""
    for url, mirror in sorted(_mirrors.items(), reverse=True):  # the path of one may begin as another's
        text = text.replace(str(mirror.root), url)
    return text


_mirrors: dict[str, Mirror] = {}


class Mirror(Disk):
    """The folder of an object store at a URL. What is not asked for is not here.

    A run that holds the lease lists the store once (`refresh`) and knows from then on what it has written; a worker,
    which asks about a shard or two, asks the store each time.
    """

    def __init__(self, url: str) -> None:
        self._objects = ObjectStore(url)
        self.url = self._objects.url
        super().__init__(own_folder() / quote(self.url, safe=""))
        self.root.mkdir(exist_ok=True)
        self._lease: Lease | None = None
        self._listing: _Listing | None = None
        self._here: dict[str, tuple[StoredObject, Any]] = {}  # what of the store lies here, and its file's identity

    def __str__(self) -> str:
        return str(self.url)

    def lock(self) -> contextlib.AbstractContextManager[Any]:
        return self._leased()

    @contextlib.contextmanager
    def _leased(self) -> Iterator[None]:
        self._objects.probe()
        with Lease(self._objects, waiting=print) as lease:
            self._lease, self.token = lease, lease.token
            try:
                listing = self._listing = _Listing(self._objects.list())
                self.remove(self.root / name for name in listing if is_scratch(name.rpartition("/")[2]))
                yield
            finally:
                self._lease = self.token = None

    def refresh(self) -> None:
        self._listing = _Listing(self._objects.list())

    def _check(self) -> None:
        """LeaseLost where another run has taken the folder over meanwhile, or another worker the shard."""
        if self.fence is not None:
            self.fence()
        if self._lease is not None:
            self._lease.check()
        elif self.token is not None:  # a worker's
            check_token(self._objects, self.token)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    # ------------------------------------------------------------------------------------------------------ asking

    def _find(self, path: Path) -> StoredObject | None:
        name = self._name(path)
        return self._objects.head(name) if self._listing is None else self._listing.get(name)

    def stamp(self, path: Path) -> Stamp | None:
        found = self._find(path)
        return None if found is None else (found.size, found.etag)

    def lasting(self, stamp: Stamp) -> bool:
        return True

    def names(self, folder: Path) -> list[str]:
        return sorted([*self._in(folder)[0], *self._in(folder)[1]])

    def folders(self, parent: Path) -> list[str]:
        return sorted(self._in(parent)[1])

    def _in(self, folder: Path) -> tuple[Iterable[str], Iterable[str]]:
        """The names of the files, and of the folders, in a folder."""
        name = "" if folder == self.root else self._name(folder)
        if self._listing is not None:
            return self._listing.names(name)
        files, folders = self._objects.names(name)
        return [stored.name.rpartition("/")[2] for stored in files], folders

    def read_range(self, path: Path, start: int, length: int, stamp: Stamp) -> bytes:
        found = StoredObject(self._name(path), *stamp)
        with contextlib.suppress(OSError), open(self._cached(found), "rb") as f:  # as whoever brings it
            if os.fstat(f.fileno()).st_size == found.size:
                return os.pread(f.fileno(), length, start)
        try:
            return self._objects.range(found.name, start, length, found.etag)
        except (Changed, FileNotFoundError) as e:
            raise FileChanged(f"{self}/{found.name}") from e

    def change(self, path: Path, edit: Callable[[bytes], bytes]) -> bytes:
        name = self._name(path)
        while True:
            found = self._objects.get(name)
            before = b"" if found is None else found[0]
            after = edit(before)
            if after == before:
                return after
            try:
                etag = None if found is None else found[1].etag
                put = self._objects.put(after, name, create=found is None, replaces=etag)
            except (Changed, FileExistsError):  # another was quicker
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, after)
            self._note(put, path)
            return after

    # ------------------------------------------------------------------------------------------------------ moving

    def bring(self, paths: Iterable[Path]) -> None:
        wanted = []
        for path in dict.fromkeys(paths):
            name, found = self._name(path), self._find(path)
            known = self._here.get(name)
            if found is None:
                if known is not None:  # it was removed there; what was written here and not yet put there stays
                    path.unlink(missing_ok=True)
                    del self._here[name]
            elif (known is not None and known[0] != found) or not path.exists():
                wanted.append((path, found))
        if len(wanted) == 1:
            self._fetch(*wanted[0])
        elif wanted:
            with ThreadPoolExecutor(min(_FETCHES, len(wanted))) as pool:
                list(pool.map(lambda item: self._fetch(*item), wanted))

    def _fetch(self, path: Path, found: StoredObject) -> None:
        """Link an object of the cache to its path, after it is fetched where it is not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        cached = self._cached(found)
        if not link(cached, path, found.size):
            with one_at_a_time(cached):  # the workers of a machine want the same shards at the same time
                if not link(cached, path, found.size):
                    make_room(found.size)
                    try:
                        found = self._objects.get_file(found.name, path)  # it may be a newer one by now
                    except FileNotFoundError:  # gone since it was listed
                        path.unlink(missing_ok=True)
                        self._here.pop(found.name, None)
                        return
                    keep(path, self._cached(found))
        self._note(found, path)

    def push(self, paths: Iterable[Path]) -> None:
        self._check()
        for path in paths:
            self._put_file(path)

    def bring_newest(self, path: Path) -> None:
        name = self._name(path)
        found = self._objects.head(name)
        if self._listing is not None:
            if found is not None:
                self._listing.add(found)
            elif self._listing.get(name) is not None:
                self._listing.remove([name])
        self.bring([path])

    def replace(self, path: Path, data: bytes) -> None:
        self._check()
        name = self._name(path)
        known = self._here.get(name)
        try:
            put = self._objects.put(data, name, create=known is None, replaces=None if known is None else known[0].etag)
        except FileExistsError as e:
            raise Changed(f"{self}: somebody else has written {name} meanwhile") from e
        write_atomic(path, data)
        self._note(put, path)

    def create(self, path: Path, data: bytes) -> None:
        """Write a file here and there, of a name that nobody has there. Raises FileExistsError."""
        self._check()
        put = self._objects.put(data, self._name(path), create=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self._note(put, path)

    def _put_file(self, path: Path) -> StoredObject:
        """Put a file there, unless it lies there as it is here."""
        name = self._name(path)
        known, found = self._here.get(name), _identity(path)
        if known is not None and known[1] == found:
            return known[0]
        if found is None and (there := self._find(path)) is not None:  # a record is written again, of what lies there
            return there
        put = self._objects.put_file(path, name)
        keep(path, self._cached(put))
        self._note(put, path)
        return put

    def _note(self, found: StoredObject, path: Path | None) -> None:
        if path is not None:
            self._here[found.name] = found, _identity(path)
        if self._listing is not None:
            self._listing.add(found)

    def gone(self, folder: Path) -> list[Path]:
        """What lay there and here below a folder, and is no longer here."""
        paths = (self.root / name for name in [*self._here])
        return [path for path in paths if path.is_relative_to(folder) and not path.exists()]

    def release(self, paths: Iterable[Path]) -> None:
        for path in paths:
            if self._here.pop(self._name(path), None) is not None:
                path.unlink(missing_ok=True)

    def remove(self, paths: Iterable[Path]) -> None:
        paths = list(paths)
        self._check()
        names = [self._name(path) for path in paths]
        if self._listing is not None:
            self._objects.delete(name for name in names if self._listing.get(name))
            self._listing.remove(names)
        else:
            self._objects.delete(names)
        for path, name in zip(paths, names, strict=True):
            path.unlink(missing_ok=True)
            if (known := self._here.pop(name, None)) is not None:
                self._cached(known[0]).unlink(missing_ok=True)  # nobody will want it any more

    # ----------------------------------------------------------------------------------------------------- records

    def read_records(self, paths: Iterable[Path]) -> dict[Path, tuple[dict, Stamp, str]]:
        found: dict[Path, tuple[dict, Stamp, str]] = {}
        for name, content, stored, metadata in self._objects.get_many(self._name(path) for path in paths):
            self._note(stored, None)
            stamp = stored.size, stored.etag
            found[self.root / name] = parse_record(content), stamp, metadata.get(_MARK, "")
        return found

    def write_record(self, path: Path, value: Mapping[str, Any], outputs: Iterable[Path]) -> None:
        self._check()
        etags = {self._name(output): self._put_file(output).etag for output in outputs}
        # whoever has the folder by now either wrote the record before this, and the check says so, or the put finds
        # another than is seen here; a listing may lag behind
        before = self._objects.head(self._name(path))
        self._check()
        content = json_bytes(value)
        try:
            put = self._objects.put(
                content,
                self._name(path),
                create=before is None,
                replaces=None if before is None else before.etag,
                metadata={_MARK: digest(etags)},
            )
        except (Changed, FileExistsError) as e:
            raise LeaseLost(f"{self}: another run has written {self._name(path)} meanwhile; this one ends here") from e
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        self._note(put, path)

    def mark(self, outputs: Iterable[Path]) -> str:
        return digest({self._name(path): stored.etag if (stored := self._find(path)) else "" for path in outputs})

    def _cached(self, found: StoredObject) -> Path:
        return cache_folder() / "objects" / digest([self.url, found.name, found.etag, found.size])


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What is another as soon as a file is written again."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


class _Listing:
    """All objects of a store, as they were listed once and written since."""

    def __init__(self, found: Iterable[StoredObject]) -> None:
        self._files: dict[str, dict[str, StoredObject]] = {}
        self._folders: dict[str, set[str]] = {}
        for stored in found:
            self.add(stored)

    def __iter__(self) -> Iterator[str]:
        for folder, files in self._files.items():
            yield from (f"{folder}/{name}" if folder else name for name in files)

    def get(self, name: str) -> StoredObject | None:
        folder, _, own = name.rpartition("/")
        return self._files.get(folder, {}).get(own)

    def names(self, folder: str) -> tuple[Iterable[str], Iterable[str]]:
        return self._files.get(folder, {}), self._folders.get(folder, ())

    def add(self, stored: StoredObject) -> None:
        folder, _, own = stored.name.rpartition("/")
        if folder not in self._files:
            self._files[folder] = {}
            below = folder
            while below:
                above, _, name = below.rpartition("/")
                self._folders.setdefault(above, set()).add(name)
                below = above
        self._files[folder][own] = stored

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            folder, _, own = name.rpartition("/")
            if self._files.get(folder, {}).pop(own, None) and not self._files[folder]:
                self._forget(folder)

    def _forget(self, folder: str) -> None:
        """There are no folders without objects."""
        while folder and not self._files.get(folder) and not self._folders.get(folder):
            self._files.pop(folder, None)
            self._folders.pop(folder, None)
            folder, _, name = folder.rpartition("/")
            self._folders[folder].discard(name)
