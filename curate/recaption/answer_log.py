"""Answers that were paid for, a line each as they come: what is in here is never asked again."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from aesthetic.files import sync
from curate.store.files import cannot_write, open_own

Name = tuple[str, str]
"""What names an answer: the sha256 of the stored image, and the digest of what was asked of it."""


class AnswerLog:
    """The answers about the images of one shard: a file of JSON lines that only grows.

    A line is with the kernel when `add` returns, so it outlives the process however that ends; `sync` flushes lines to
    the disk, where they outlive the machine. A last line that was cut off is dropped when the file is opened.

    answers: name -> what was added, of requests whose digests are given; the last of several.
    """

    def __init__(self, path: Path, requests: Collection[str]) -> None:
        self.path = path
        self.answers: dict[Name, dict[str, Any]] = {}
        self._fd: int | None = None
        self._dirty, self._lock = False, threading.Lock()  # sync and close are called from two threads
        if not path.exists():
            return
        with self._faults():
            fd = open_own(path, os.O_RDWR)
            with os.fdopen(fd, "rb+") as f:
                whole = 0
                for line in f:
                    if not line.endswith(b"\n"):
                        f.truncate(whole)
                        break
                    whole += len(line)
                    self._read(line, requests)

    def _read(self, line: bytes, requests: Collection[str]) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # of a disk that failed
            found = json.loads(line)
            if found["request"] in requests:
                self.answers[found["image"], found["request"]] = found

    def add(self, name: Name, answer: dict[str, Any]) -> None:
        """Append an answer. DiskFull where there is no room."""
        line = {"image": name[0], "request": name[1], **answer}
        left = memoryview(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        with self._faults():
            if self._fd is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                new = not self.path.exists()
                self._fd = open_own(self.path, os.O_WRONLY | os.O_APPEND)
                if new:
                    sync(self.path.parent)
            while left:
                left = left[os.write(self._fd, left) :]
        self._dirty = True
        self.answers[name] = line

    def sync(self) -> None:
        """Flush what was added to the disk."""
        with self._lock:
            self._flush()

    def close(self) -> None:
        """Flush and close."""
        with self._lock:
            self._flush()
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def _flush(self) -> None:
        if self._dirty and self._fd is not None:
            self._dirty = False
            with self._faults():
                os.fsync(self._fd)

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise cannot_write(self.path, e) from e
