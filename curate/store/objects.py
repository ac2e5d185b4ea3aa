"""An object store: whole objects under names below one URL. Everything here can be called from many threads."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from aesthetic.errors import UserError
from aesthetic.files import as_disk_full, scratch_path
from curate.store.clients import StoreUnavailable, explain, is_url, make_client, parse_url

__all__ = ["Changed", "ObjectStore", "StoreUnavailable", "StoredObject", "is_url"]

T = TypeVar("T")

IN_FLIGHT = 64  # requests at a time, of `get_many` and `get_files`: with 30 ms each that is 2,000 a second
_PART = 8 << 20  # bytes of a part of a large file; S3 wants 5 MB to 5 GB, and at most 10,000 of them
_PARTS_IN_FLIGHT = 8
_CHUNK = 1 << 20  # bytes of a body that are in memory at a time, of each download
_NONCE = "nonce"  # user metadata that every put carries: who finds it knows that the put was its own
_STANDARD = {"Content-Disposition", "Content-Encoding", "Content-Language", "Content-Type", "Cache-Control",
             "Storage-Class"}  # fmt: skip


class Changed(Exception):
    """What lies under a name is not what was to be replaced."""


@dataclass(frozen=True)
class StoredObject:
    """An object as the store describes it."""

    name: str  # relative to the store's URL
    size: int
    etag: str  # another one where the bytes are others; on some stores also where they are the same
    version: str | None = field(default=None, compare=False)  # GCS's generation, where the answer told it


_Stored = list[StoredObject]  # where `list` is a method


class ObjectStore:
    """The objects below one URL: s3://bucket/prefix, gs://... or az://...

    It pickles as its URL: each process takes credentials from its own environment, and opens its client when it first
    asks. A process that is forked from one that has asked cannot ask: its client would wait for ever.

    Raises UserError where credentials, bucket or rights are missing, StoreUnavailable where the store still fails after
    it was asked for `patience` seconds, with backoff.
    """

    def __init__(self, url: str, patience: float = 240.0) -> None:
        self._place = parse_url(url)
        self.url = self._place.url
        self.patience = patience
        self._opened: Any = None
        self._opening = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStore, (self.url, self.patience)

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    # ---------------------------------------------------------------------------------------------------- reading

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """All objects, or those below a folder, each once, in no order: 1,000 a request."""
        folder = _check_name(prefix.rstrip("/")) if prefix else None
        pages: Any = None
        last, ascending = "", True

        def page() -> Any:
            """The next page. A listing that failed is at its end, says the client: it is begun again after `last`."""
            nonlocal pages
            try:
                if pages is None:
                    if not ascending:  # what comes after it is not what is left
                        raise StoreUnavailable(f"{self.url}: the listing broke off")
                    pages = iter(self._client().list(folder, offset=last or None, chunk_size=1000))
                return next(pages, None)
            except BaseException:
                pages = None
                raise

        while (found := self._ask(f"listing {prefix or 'it'}", page)) is not None:
            for meta in found:
                ascending = ascending and meta["path"].encode() > last.encode()
                last = meta["path"]
                if not self._is_marker(meta, folder or ""):
                    yield _stored(last, meta)

    def _is_marker(self, meta: Mapping[str, Any], folder: str) -> bool:
        """Whether something listed is no object but an empty folder, as consoles of stores "create" them.

        It is an empty object whose key ends with a slash, which the client leaves out.
        """
        return meta["size"] == 0 and (meta["path"] in ("", folder) or self.head(meta["path"]) is None)

    def names(self, folder: str) -> tuple[_Stored, set[str]]:
        """The objects in a folder ("": the uppermost), and the names of the folders in it."""
        if folder:
            _check_name(folder)

        def read() -> Any:
            return self._client().list_with_delimiter(folder or None)

        answer = self._ask(f"listing {folder or 'it'}", read)
        own = [_stored(meta["path"], meta) for meta in answer["objects"] if not self._is_marker(meta, folder)]
        folders = {prefix.rstrip("/").rpartition("/")[2] for prefix in answer["common_prefixes"]}
        if not own:  # some stores list folders from which all was deleted, and made ones: is there anything in them?
            folders = {name for name in folders if any(True for _ in self.list(f"{folder}/{name}".lstrip("/")))}
        return own, folders

    def head(self, name: str) -> StoredObject | None:
        """What an object is; None where there is none."""
        try:
            return _stored(name, self._ask(f"looking at {name}", lambda: self._client().head(_check_name(name))))
        except FileNotFoundError:
            return None

    def get(self, name: str) -> tuple[bytes, StoredObject, dict[str, str]] | None:
        """A small object whole, what it is, and its metadata; None where there is none."""
        found = self._get(name)
        return found and (found[0], found[1], {k: v for k, v in found[2].items() if k != _NONCE})

    def _get(self, name: str) -> tuple[bytes, StoredObject, dict[str, str]] | None:
        def read() -> tuple[bytes, StoredObject, dict[str, str]]:
            answer = self._client().get(_check_name(name))
            metadata = {k: v for k, v in answer.attributes.items() if k not in _STANDARD}
            return bytes(answer.bytes()), _stored(name, answer.meta), metadata

        try:
            return self._ask(f"reading {name}", read)
        except FileNotFoundError:
            return None

    def get_many(self, names: Iterable[str]) -> Iterator[tuple[str, bytes, StoredObject, dict[str, str]]]:
        """Small objects in the order of their names given, many requests at a time; those that are not there are left
        out."""
        for name, found in _ahead(lambda name: (name, self.get(name)), names):
            if found is not None:
                yield (name, *found)

    def get_file(self, name: str, path: Path) -> StoredObject:
        """Copy an object into a file, which appears whole or not at all. Raises FileNotFoundError, DiskFull."""
        return self._ask(f"reading {name}", lambda: self._get_file(name, path))

    def get_files(self, names: Sequence[tuple[str, Path]]) -> _Stored:
        """Copy many objects into files, as `get_file`, in the order given. The first that fails ends it."""
        return list(_ahead(lambda pair: self.get_file(*pair), names))

    def _get_file(self, name: str, path: Path) -> StoredObject:
        answer = self._client().get(_check_name(name))
        stored = _stored(name, answer.meta)
        scratch = scratch_path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(scratch, "xb") as f:
                for chunk in answer.stream(min_chunk_size=_CHUNK):
                    f.write(chunk)
                f.flush()
                os.fsync(f.fileno())
                if f.tell() != stored.size:
                    raise StoreUnavailable(f"{self.url}: {name} ended after {f.tell():,} of {stored.size:,} bytes")
            os.replace(scratch, path)
        except OSError as e:
            raise as_disk_full(e, path.parent) from e
        finally:
            scratch.unlink(missing_ok=True)
        return stored

    def range(self, name: str, start: int, length: int, etag: str | None = None) -> bytes:
        """Bytes of an object from `start` on; fewer where it ends before. Raises FileNotFoundError, and Changed where
        it is not the one with this etag."""
        if length <= 0:
            return b""
        only = {} if etag is None else {"if_match": f'"{etag}"'}

        def read() -> bytes:
            options = {"range": (start, start + length), **only}
            return bytes(self._client().get(_check_name(name), options=options).bytes())

        return self._ask(f"reading {name}", read)

    # ---------------------------------------------------------------------------------------------------- writing

    def put_file(self, path: Path, name: str, metadata: Mapping[str, str] | None = None) -> StoredObject:
        """Copy a file into an object, which appears whole or not at all: a large one in parts, some at a time."""
        size = path.stat().st_size
        attributes = _attributes(metadata)
        part = max(_PART, (size // 9000 >> 20) + 1 << 20)

        def write() -> Any:
            return self._client().put(
                _check_name(name), path, attributes=attributes, chunk_size=part, max_concurrency=_PARTS_IN_FLIGHT
            )

        try:
            return _stored(name, {**self._ask(f"writing {name}", write), "size": size})
        except StoreUnavailable:  # was it the answer that got lost? it is whole then, and carries our nonce
            if (ours := self._ours(name, size, attributes[_NONCE])) is None:
                raise
            return ours

    def put(
        self,
        data: bytes,
        name: str,
        *,
        create: bool = False,
        replaces: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> StoredObject:
        """Write a small object, in one request.

        `create`: only where there is none, else FileExistsError. `replaces`: only where the object with this etag lies,
        else Changed. A write whose answer was lost, and which the client repeated, counts as done.
        """
        attributes = _attributes(metadata)

        def write() -> Any:
            mode = {"mode": "create" if create else self._version_of(name, replaces)} if create or replaces else {}
            return self._client().put(_check_name(name), data, attributes=attributes, use_multipart=False, **mode)

        refusal: Exception
        try:
            return _stored(name, {**self._ask(f"writing {name}", write), "size": len(data)})
        except (Changed, FileExistsError, StoreUnavailable) as e:
            refusal = e
        try:
            found = self._get(name)
        except StoreUnavailable:
            raise refusal from None
        if found is not None and found[0] == data and found[2].get(_NONCE) == attributes[_NONCE]:
            return found[1]
        raise refusal

    def _version_of(self, name: str, etag: str | None) -> dict[str, str]:
        """What a conditional write must name: the etag; on GCS the generation, which is asked for."""
        if self._place.kind != "gs":
            return {"e_tag": f'"{etag}"'}
        now = self.head(name)
        if now is None or now.etag != etag or now.version is None:
            raise Changed(f"{self.url}: {name} is not what was to be replaced")
        return {"e_tag": f'"{etag}"', "version": now.version}

    def _ours(self, name: str, size: int, nonce: str) -> StoredObject | None:
        try:
            answer = self._ask(f"looking at {name}", lambda: self._client().get(name, options={"head": True}))
        except (FileNotFoundError, StoreUnavailable):
            return None
        stored = _stored(name, answer.meta)
        return stored if stored.size == size and answer.attributes.get(_NONCE) == nonce else None

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects, 1,000 a request where the store can; those that are not there are fine."""
        left = iter(names)
        while some := [_check_name(name) for name in itertools.islice(left, 1000)]:
            try:
                self._ask(f"deleting {some[0]}", lambda: self._client().delete(some))
            except FileNotFoundError:  # of which one is not said
                list(_ahead(self._delete, some))

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ask(f"deleting {name}", lambda: self._client().delete(name))

    def probe(self) -> None:
        """Find out, in about eight requests, whether a data folder can be here: rights, and conditions of writes.

        Raises UserError, naming the store and what to do.
        """
        quick = ObjectStore(self.url, patience=min(self.patience, 8.0))
        name = f".probe-{secrets.token_hex(8)}"
        try:
            next(iter(quick.list(name)), None)
            quick._probe_conditions(name)
        except StoreUnavailable as e:
            raise UserError(str(e)) from e

    def _probe_conditions(self, name: str) -> None:
        ignored = (
            f"{self.url}: the store ignores conditions of writes (If-None-Match, If-Match), so nothing would keep two "
            f"runs apart. Take a store that honours them (AWS S3, GCS, Azure, R2, MinIO of 2024 or later, SeaweedFS)."
        )
        first = self.put(b"1", name)
        try:
            try:
                self.put(b"2", name, create=True)
            except FileExistsError:
                pass
            else:
                raise UserError(ignored)
            second = self.put(b"3", name, replaces=first.etag)
            try:
                self.put(b"4", name, replaces=first.etag)
            except Changed:
                pass
            else:
                raise UserError(ignored)
            if (found := self.get(name)) is None or found[0] != b"3" or found[1].etag != second.etag:
                raise UserError(
                    f"{self.url}: what was written just now cannot be read back: the store is not consistent"
                )
        finally:
            self.delete([name])

    # ----------------------------------------------------------------------------------------------------- client

    def _client(self) -> Any:
        if _forked:
            raise RuntimeError(
                f"{self.url}: this process is forked from one that used an object store, whose client would wait for "
                "ever here. Start it with spawn or forkserver."
            )
        with self._opening:
            if self._opened is None:
                self._opened = make_client(self._place, self.patience)
        return self._opened

    def _ask(self, doing: str, request: Callable[[], T]) -> T:
        """What the client answers, asked again where it gave up at once: at a short answer cut off, a conflict."""
        deadline = time.monotonic() + self.patience / 2
        for attempt in itertools.count():
            try:
                with self._explained(doing):
                    return _interruptible(request)
            except StoreUnavailable:
                if attempt == 5 or time.monotonic() > deadline:
                    raise
            time.sleep(random.uniform(0.5, 1.0) * 0.1 * 2**attempt)
        raise AssertionError

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        from obstore import exceptions

        global _used
        _used = True
        try:
            yield
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as e:
            if "ConditionalRequestConflict" in str(e):  # another writes it just now: S3's answer is "ask again"
                raise StoreUnavailable(f"{self.url}: {doing}: others write it all the time") from e
            if isinstance(e, exceptions.PreconditionError):
                raise Changed(f"{self.url}: {doing}: it is not what was to be replaced") from e
            raise FileExistsError(f"{self.url}: {doing}: there is one already") from e
        except FileNotFoundError as e:
            if e.errno is not None:  # of a file here
                raise
            raise FileNotFoundError(f"{self.url}: {doing}: it is not there") from e
        except (exceptions.BaseError, NotImplementedError) as e:
            raise explain(e, self._place, doing) from e


_used = False  # whether this process, or one that it is forked from, has asked a store
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = _used


os.register_at_fork(after_in_child=_after_fork)


def _interruptible(request: Callable[[], T]) -> T:
    """request(), where Ctrl-C ends the wait for it: the client alone would not let it."""
    if threading.current_thread() is not threading.main_thread():
        return request()
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(request())
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    return future.result()


def _stored(name: str, meta: Mapping[str, Any]) -> StoredObject:
    # Azure's answers quote an etag, and its listings do not
    return StoredObject(name, meta["size"], (meta["e_tag"] or meta["version"] or "").strip('"'), meta["version"])


def _check_name(name: str) -> str:
    """A name as it is, if it is one on all stores, and the same on all."""
    if not name or any(part in ("", ".", "..") for part in name.split("/")) or any(ord(c) < 32 for c in name):
        raise ValueError(f"{name!r} cannot be the name of an object")
    return name


def _attributes(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """User metadata for a client, with a nonce. They travel as headers: names of a to z and 0 to 9, values of ASCII."""
    for key, value in (metadata or {}).items():
        if not re.fullmatch(r"[a-z][a-z0-9]*", key) or key == _NONCE or not re.fullmatch(r"[!-~]([ -~]*[!-~])?", value):
            raise ValueError(f"{key}={value!r} cannot be metadata of an object")
    return {**(metadata or {}), _NONCE: secrets.token_hex(16)}


def _ahead(work: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
    """work(item) of all items in their order, on threads, at most twice as many ahead as there are threads."""
    items = iter(items)
    pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="objects")
    try:
        waiting = deque(pool.submit(work, item) for item in itertools.islice(items, 2 * IN_FLIGHT))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(work, item) for item in itertools.islice(items, 1))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
