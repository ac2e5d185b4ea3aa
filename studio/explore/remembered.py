"""Values that were made lately, in bounded memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Remembered(Generic[K, V]):
    """Values that were made lately, so many bytes of them; each is made by one thread, for which others wait."""

    def __init__(self, most: int, size: Callable[[V], int]) -> None:
        self._most, self._size, self._bytes = most, size, 0
        self._values = OrderedDict[K, V]()
        self._making = dict[K, threading.Lock]()
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        """What is remembered; None where nothing is."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: K, value: V) -> V:
        with self._lock:
            if (old := self._values.pop(key, None)) is not None:
                self._bytes -= self._size(old)
            self._values[key] = value
            self._bytes += self._size(value)
            while self._bytes > self._most and len(self._values) > 1:
                _, gone = self._values.popitem(last=False)
                self._bytes -= self._size(gone)
        return value

    def get_or_make(self, key: K, make: Callable[[], V]) -> V:
        """What is remembered, else what `make` returns. What it raises is not remembered."""
        if (found := self.get(key)) is not None:
            return found
        with self._lock:
            lock = self._making.setdefault(key, threading.Lock())
        with lock:
            found = self.get(key)
            try:
                return self.put(key, make()) if found is None else found
            finally:
                with self._lock:
                    self._making.pop(key, None)
