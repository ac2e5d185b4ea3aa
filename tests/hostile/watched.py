"""What this process really does: every connection that it begins, every file that it opens, told by Python itself."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Seen:
    """What was begun: the system was asked for it, whether or not it worked."""

    connects: list[tuple[str, int]] = field(default_factory=list)  # address, port
    opened: list[str] = field(default_factory=list)  # paths


_watching: list[Seen] = []


def _hook(event: str, values: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event in ("socket.connect", "socket.sendto") and isinstance(values[1], tuple):  # a Unix socket has a name
        for seen in _watching:
            seen.connects.append(values[1][:2])
    elif event in ("open", "os.open") and not isinstance(values[0], int):  # a descriptor was opened before
        for seen in _watching:
            seen.opened.append(str(values[0]))


@functools.cache
def _install() -> None:
    sys.addaudithook(_hook)  # for the life of the process: hooks cannot be taken off again


@contextlib.contextmanager
def watched() -> Iterator[Seen]:
    """Collect what happens inside the block, in all threads."""
    _install()
    seen = Seen()
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)
