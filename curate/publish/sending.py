"""What goes to a place: files that are not there yet, then the record of all; and what of that is noted here.

`published/NAME.json` of the data folder says of each place what was sent, and which keys that held: `keys` are those of
what is there or on its way, `before` those of what was there whole before it.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.files import atomic, scratch_path, write_atomic
from curate.publish.places import Destination
from curate.store.files import digest, json_bytes, sha256_file
from curate.store.records import read_record, record_digest

if TYPE_CHECKING:
    from curate.layout import Data

RECORD = "published.json"
_FORMAT = 1
_NOTED_EACH = 2.0  # seconds after which what was sent is noted, and what a kill has sent again at most


@dataclass(frozen=True, kw_only=True)
class PublishRequest:
    """What is to be published, and where."""

    name: str
    to: str
    list_only: bool = False
    license: str | None = None  # of the collection: an SPDX name or a URL
    recipe: Mapping[str, Any]  # of the data folder
    recipe_text: str = ""  # that fetches what is published, as recipe.yaml

    @property
    def kind(self) -> str:
        """What is sent: `list` or `shards`."""
        return "list" if self.list_only else "shards"


@dataclass(frozen=True)
class FileToSend:
    """A file to publish: where it is here, and what it holds."""

    name: str
    path: Path
    sha256: str
    bytes: int

    @classmethod
    def of(cls, name: str, path: Path) -> FileToSend:
        """A file as it lies here."""
        return cls(name, path, sha256_file(path), path.stat().st_size)


class Sending:
    """Sends files that are not there yet, notes what was sent, and finishes with the record.

    progress: called for each file with its name, the bytes that were sent so far, and those that all will take.
    """

    def __init__(
        self,
        data: Data,
        request: PublishRequest,
        place: Destination,
        before: Mapping[str, Any],
        dry_run: bool,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.files: dict[str, FileToSend] = {}
        self.expected = 0  # bytes of all files, those that lie there among them, as far as that is known
        self._data, self._request, self._place, self._before = data, request, place, before
        self._dry_run, self._progress = dry_run, progress
        self._mine = noted_of(data, request)
        self._stamps: dict[str, str] = dict(self._mine.get("stamps", {}))
        self._state: dict[str, Any] = {}
        self._sent: list[str] = []
        self._sent_bytes, self._bytes, self._noted = 0, 0, time.monotonic()

    def begin(self, keys: pa.Array) -> None:
        """Note that something is on its way: here, and at the place."""
        data, request, was = self._data, self._request, self._mine
        path = data.published_keys(keys_digest(keys))
        if not data.exists(path):
            with atomic(path) as f:
                pq.write_table(pa.table({"key": keys}), f, compression="zstd")
            data.push(path)
        self._state = {"kind": request.kind, "keys": keys_digest(keys), "count": len(keys), "complete": False}
        if whole := keys_before(was):
            self._state["before"] = whole
        self._note()
        files = self._before.get("files", {})  # that may lie there still
        self._write_record({"name": request.name, "kind": request.kind, "complete": False, "files": files})

    def take(self, file: FileToSend) -> None:
        """Send a file, unless it lies there."""
        self.files[file.name] = file
        self._bytes += file.bytes
        if not self._place.holds(file.name, file.path, file.sha256, self._known(file)):
            self._sent.append(file.name)
            if not self._dry_run:
                stamp = self._place.send(file.path, file.name, file.sha256)
                self._stamps[file.name] = f"{file.sha256} {stamp}"
                if time.monotonic() - self._noted > _NOTED_EACH:
                    self._note()
            self._sent_bytes += file.bytes
        there = self._bytes - self._sent_bytes
        self._progress(file.name, self._sent_bytes, max(self.expected, self._bytes) - there)

    def _known(self, file: FileToSend) -> str:
        """The stamp of what was sent under the name, where that is what it is now."""
        sha256, _, stamp = self._stamps.get(file.name, "").partition(" ")
        return stamp if sha256 == file.sha256 else ""

    def finish(self, count: int, keys: str) -> dict[str, Any]:
        """Remove what is no longer published, and write the record."""
        named = {name: {"sha256": f.sha256, "bytes": f.bytes} for name, f in sorted(self.files.items())}
        gone = sorted({*self._before.get("files", {}), *self._stamps} - named.keys() - {RECORD})
        gone = sorted({*gone} & self._place.names())
        facts = {
            "name": self._request.name,
            "kind": self._request.kind,
            "count": count,
            "keys": keys,
            "complete": True,
            "files": named,
        }
        seen = ""
        if not self._dry_run:
            self._place.delete(gone)
            self._write_record(facts)
            seen = self._place.finish(f"{self._request.name}: {count:,} images")
            self._stamps = {n: s for n, s in self._stamps.items() if n in named}
            self._state.pop("before", None)
            self._state |= {
                "complete": True,
                "digest": digest(named),
                "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            self._note()
            remove_old_keys(self._data)
        return {
            "files": len(named),
            "bytes": self._bytes,
            "sent": self._sent,
            "sent_bytes": self._sent_bytes,
            "deleted": gone,
            "seen": seen,
        }

    def _write_record(self, facts: Mapping[str, Any]) -> None:
        value = {**facts, "format": _FORMAT}
        path = scratch_path(self._data.published(self._request.name))
        write_atomic(path, json_bytes({**value, "self": record_digest(value)}))
        try:
            self._place.send(path, RECORD, sha256_file(path))
        finally:
            path.unlink()

    def _note(self) -> None:
        """Write what is known of the place into the data folder's record."""
        data, path = self._data, self._data.published(self._request.name)
        noted = read_record(data.local(path))
        places = {**noted.get("places", {}), self._request.to: {**self._state, "stamps": self._stamps}}
        write_atomic(path, json_bytes({"name": self._request.name, "places": places}))
        data.push(path)
        self._noted = time.monotonic()


def noted_of(data: Data, request: PublishRequest) -> dict[str, Any]:
    """What is noted here of a place; empty where nothing was sent there."""
    noted = read_record(data.local(data.published(request.name)))
    return dict(noted.get("places", {}).get(request.to, {}))


def keys_digest(keys: pa.Array) -> str:
    """By which the keys of what is published are known."""
    return digest(hashlib.sha256("\n".join(keys.to_pylist()).encode()).hexdigest())


def keys_before(noted: Mapping[str, Any]) -> str | None:
    """Of what is noted of a place, the digest of the keys of what was there whole last."""
    return noted.get("keys") if noted.get("complete") else noted.get("before")


def remove_old_keys(data: Data) -> None:
    """Remove the keys of publications that others have taken the place of, everywhere."""
    records = [read_record(data.local(data.published(name))) for name in data.published_names()]
    places = [place for record in records for place in record.get("places", {}).values()]
    used = {data.published_keys(place[of]) for place in places for of in ("keys", "before") if of in place}
    folder = data.root / "published"
    keys = [folder / n for n in data.store.names(folder) if re.fullmatch(r"keys-\w+\.parquet", n)]
    data.remove(*(path for path in keys if path not in used))
