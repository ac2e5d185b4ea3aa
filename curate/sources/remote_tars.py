"""Tars of samples on an object store: a plan copies each once, looks through it, and lets it go; so does who reads it.

No more than a few of them are on the disk of a machine at a time (beside what the cache keeps).
"""

from __future__ import annotations

import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aesthetic.errors import UserError
from aesthetic.files import scratch_path
from curate.sources.remote import RemoteFiles, copy_name
from curate.sources.tars import TarIndex, TarInput
from curate.store.files import check_space, digest
from curate.store.mirror import open_mirror

_HELD = 3  # tars of others that a process has at hand


class RemoteTars:
    """The tars that a URL stands for, opened one after the other."""

    def __init__(self, found: RemoteFiles, copies: Path) -> None:
        self.found = found
        self._kind: str | None = None  # which image of a sample is meant: the first tar that has any decides
        copies.mkdir(parents=True, exist_ok=True)
        self.files = {copy_name(copies, index, o.name): o for index, o in enumerate(found.files)}

    def open(self, file: Path, url: str, caption: str | None) -> TarInput:
        """The rows of one tar, which are kept in `file`; the tar itself is on the disk only meanwhile."""
        tar = self.files[file]
        folder = scratch_path(file)
        check_space(file.parent, tar.size)
        try:
            folder.mkdir()
            copied = folder / tar.name
            about = copied.with_suffix(".parquet").relative_to(folder).as_posix()
            wanted = [tar.name, *(name for name in [about] if name in self.found.beside)]
            self.found.store.get_files([(name, folder / name) for name in wanted])
            source = _RemoteTar(copied, folder, file, url, caption, self._kind)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        source.origin = {"path": tar.name, "etag": tar.etag, "size": tar.size}
        self._kind = self._kind or source.kind
        return source


class _RemoteTar(TarInput):
    def __init__(self, tar: Path, base: Path, kept: Path, url: str, caption: str | None, kind: str | None) -> None:
        self._kept, self._whole = kept, False
        super().__init__(tar, base, url, caption, kind)
        self._size, self._whole, self.path = tar.stat().st_size, True, kept
        counts = self._index.counts
        self.kind = counts.kind if counts.kinds else None
        self._index = TarIndex({}, counts)

    def digest(self) -> str:
        return digest([self.content, self._size])  # as of the same tar on a disk

    def objects(self) -> Iterator[dict[str, Any]]:
        with open(self._kept, "rb" if self._whole else "wb") as f:
            if not self._whole:
                for row in super().objects():
                    pickle.dump(row, f)
                    yield row
                return
            end = os.fstat(f.fileno()).st_size
            while f.tell() < end:
                yield pickle.load(f)  # we wrote it, in this process


@dataclass(frozen=True)
class RemoteTarFile:
    """A tar below a URL, as it was when the plan was made."""

    url: str
    name: str
    etag: str

    def local(self) -> Path:
        """A copy of it, for now: the next few that are asked for replace it. UserError where it is another by now."""
        mirror = open_mirror(self.url)
        path = mirror.root / self.name
        with _lock:
            if (mirror, path) not in _held:
                mirror.bring([path])
                stamp = mirror.stamp(path)
                if stamp is None or stamp[1] != self.etag:
                    raise UserError(f"{self.url}/{self.name}: has changed since the plan was made, or is gone.")
                _held.append((mirror, path))
                while len(_held) > _HELD:
                    old, left = _held.pop(0)
                    old.release([left])
        return path


_lock = threading.Lock()
_held: list[tuple[Any, Path]] = []
