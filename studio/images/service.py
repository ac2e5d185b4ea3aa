"""Images of a data folder by their keys, from any thread: each found in its tar, cut, blurred, and kept for a while."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from aesthetic.errors import DiskFull
from curate.layout import Data
from curate.ledger.why import KeyShape
from curate.shards.tar import CorruptShard
from curate.store.clients import StoreUnavailable
from curate.store.disk import FileChanged, Stamp
from studio.errors import NotHere
from studio.images.places import ShardPlaces, load_places
from studio.images.shown import Mask, ShownColumns
from studio.images.thumbnails import VERSION, ByteCache, ImageFile, thumbnail, whole
from studio.queue import BoundedExecutor

T = TypeVar("T")

CACHED = 64 << 20
"""Bytes of ready thumbnails in memory: some 3,000."""
SHARDS = 256
"""Shards whose places are in memory: of 10,000 images each 36 MB."""
PLACES = 4
"""Images that are decoded at once; one person has all but one of these places."""
LONGEST = 256 << 20
"""Bytes of an image that is read at all."""

_LOOK = 5.0  # seconds after which tables are looked for again; on an object store, where each question is a request,
_LOOK_THERE = 30.0  # these, and there tars are asked about no more often either


@dataclass(frozen=True)
class PlacedImage:
    """An image in its tar, and how it is to be shown."""

    key: str
    shard: int
    offset: int
    size: int
    stamp: Stamp  # of the tar
    blurred: bool
    name: str  # another one where its bytes are others


@dataclass
class _Shard:
    places: ShardPlaces
    hidden: Mask
    blurred: Mask
    stamp: Stamp  # of the tar
    stamps: tuple[Stamp | None, ...]  # of what says how images are shown
    columns: ShownColumns
    asked: float = field(default_factory=time.monotonic)


class ImageService:
    """Thumbnails and whole images of a data folder.

    Args:
        rules: of the recipe, name -> condition: what they reject as unsafe is blurred.
        keep: whether what is found out may be written into the folder.
        log: called with a line about what is wrong with a tar.
    """

    def __init__(
        self,
        data: Data,
        rules: Mapping[str, str] | None = None,
        *,
        keep: bool = True,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.data, self._rules, self._keep, self._log = data, rules or {}, keep, log
        self._ready = ByteCache(CACHED)
        self._shards: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = threading.Lock()
        self._making: dict[int, threading.Lock] = {}
        self._columns: tuple[float, ShownColumns, KeyShape] | None = None
        self._folders: list[Stamp | None] | None = None
        self.executor = BoundedExecutor("images", PLACES, each=PLACES - 1)
        self.questions = BoundedExecutor("why", 2)  # about single images: these may take longer

    def close(self) -> None:
        """Begin nothing more."""
        self.executor.close()
        self.questions.close()

    # ----------------------------------------------------------------------------------------------------- finding

    def find(self, key: str) -> PlacedImage:
        """Where an image is, and whether it is blurred. KeyError where there is none, or it must not be seen."""
        columns, shape = self.columns()
        at = shape.split(key)
        if at is None or at[0] not in columns.shards:
            raise KeyError(key)
        return self._placed(key, at[0], at[1], self._shard(at[0], columns, shape))

    def known(self, key: str) -> PlacedImage | None:
        """The same from memory alone, without waiting; None where files must be read first."""
        known = self._columns
        if known is None or self._is_due(known[0]):
            return None
        _, columns, shape = known
        at = shape.split(key)
        with self._lock:
            found = self._shards.get(at[0]) if at is not None else None
        if at is None or found is None or (self.data.url is not None and self._is_due(found.asked)):
            return None
        if not self._is_current(at[0], found, columns):
            return None
        return self._placed(key, at[0], at[1], found)

    def columns(self) -> tuple[ShownColumns, KeyShape]:
        """The columns that decide what is seen, and how keys are made; looked for again now and then.

        UserError where nothing is fetched.
        """
        known = self._columns
        if known is None or self._is_due(known[0]):
            with self._one_at_a_time(-1):
                known = self._columns
                if known is None or self._is_due(known[0]):
                    known = self._columns = self._look(known)
        return known[1:]

    def _look(self, known: tuple[float, ShownColumns, KeyShape] | None) -> tuple[float, ShownColumns, KeyShape]:
        """Look for tables; on a disk only where a folder of theirs has changed: of many shards it takes a while."""
        data = self.data
        if data.url is not None:
            data.store.refresh()
            folders = None
        else:
            annotated = data.annotations("", 0).parent
            embedded = data.metadata(0).parent, data.embedded_record(0).parent
            paths = [data.table(0).parent, *embedded, annotated, *(annotated / name for name in data.annotated())]
            folders = [data.store.stamp(path) for path in paths]
        if known is not None and folders is not None and folders == self._folders:
            return time.monotonic(), *known[1:]
        lasting = folders is not None and all(stamp is None or data.store.lasting(stamp) for stamp in folders)
        data.forget_plan()  # lists may have been added, rows removed
        columns = ShownColumns.of(data, self._rules)
        self._folders = folders if lasting else None
        return time.monotonic(), columns, KeyShape.of(columns.found[0])

    def look_again(self) -> None:
        """Look for tables again: a file that was there is not, or is another."""
        self._columns = None

    def _is_due(self, since: float) -> bool:
        return time.monotonic() - since > (_LOOK if self.data.url is None else _LOOK_THERE)

    def _placed(self, key: str, shard: int, row: int, found: _Shard) -> PlacedImage:
        place, at = found.places.find(row), int(np.searchsorted(found.places.rows, row))
        if place is None or found.hidden[at]:
            raise KeyError(key)
        name = hashlib.sha256(f"{found.places.tag} {key}".encode()).hexdigest()[:32]
        return PlacedImage(key, shard, *place, found.stamp, bool(found.blurred[at]), name)

    def _shard(self, shard: int, columns: ShownColumns, shape: KeyShape) -> _Shard:
        with self._lock:
            found = self._shards.get(shard)
            if found is not None:
                self._shards.move_to_end(shard)
        if found is not None and self._is_current(shard, found, columns):
            return found
        with self._one_at_a_time(shard):
            with self._lock:
                found = self._shards.get(shard)
            if found is not None and self._is_current(shard, found, columns):
                return found
            made = self._make(shard, columns, shape)
            with self._lock:
                self._shards[shard] = made
                while len(self._shards) > SHARDS:
                    self._shards.popitem(last=False)
            return made

    def _make(self, shard: int, columns: ShownColumns, shape: KeyShape) -> _Shard:
        data = self.data
        stamp, stamps = data.store.stamp(data.tar(shard)), columns.stamps(data, shard)
        if stamp is None or not data.exists(data.fetched_record(shard)):
            raise NotHere(f"shard {shard} is being made anew", "try again when that is done")
        places = load_places(data, shape, shard, stamp, keep=self._keep)
        hidden, blurred = columns.masks(data, shape, shard, places.rows)
        return _Shard(places, hidden, blurred, stamp, stamps, columns)

    def _is_current(self, shard: int, found: _Shard, columns: ShownColumns) -> bool:
        """Whether neither the tar nor what says how its images are shown was written again."""
        if self.data.url is not None and not self._is_due(found.asked):
            return True
        same = columns.decides_as(found.columns) and found.stamps == columns.stamps(self.data, shard)
        if same and found.stamp == self.data.store.stamp(self.data.tar(shard)):
            found.asked = time.monotonic()
            return True
        return False

    def _one_at_a_time(self, shard: int) -> threading.Lock:
        with self._lock:
            return self._making.setdefault(shard, threading.Lock())

    def patiently(self, work: Callable[[], T]) -> T:
        """What work on the files of the folder returns; once more, on what is there then, where they were written
        meanwhile. NotHere where that, or a disk or store that fails, goes on."""
        for last in (False, True):
            try:
                return work()
            except (FileChanged, FileNotFoundError):
                self.look_again()
                if last:
                    raise NotHere("these files are being written", "try again when that is done") from None
            except CorruptShard as e:
                self._log(str(e))
                raise NotHere("the tar of this image is damaged", f"`tastemaker verify {self.data}` says more") from e
            except (DiskFull, StoreUnavailable) as e:
                raise NotHere(str(e), "try again when that is put right") from e
        raise AssertionError

    # ----------------------------------------------------------------------------------------------------- reading

    def read(self, image: PlacedImage) -> bytes:
        """The bytes of an image as they are stored. FileChanged where its tar is another by now."""
        if image.size > LONGEST:
            return b""
        return self.data.store.read_range(self.data.tar(image.shard), image.offset, image.size, image.stamp)

    def ready(self, image: PlacedImage, side: int | None, reveal: bool) -> ImageFile | None:
        """A thumbnail that was made already."""
        return self._ready.get(_name(image, side, reveal))

    def make(self, key: str, side: int | None, reveal: bool) -> tuple[PlacedImage, ImageFile]:
        """An image, cut to `side` pixels (None: whole), blurred where it is unsafe and not to be revealed.

        KeyError as `find`, FileChanged as `read`. Of bytes that can't be decoded `decoded` is False.
        """
        image = self.find(key)
        if (found := self.ready(image, side, reveal)) is not None:
            return image, found
        data = self.read(image)
        blur = image.blurred and not reveal
        file = whole(data, blur) if side is None else thumbnail(data, side, blur)
        if side is not None or blur:
            self._ready.put(_name(image, side, reveal), file)
        return image, file


def _name(image: PlacedImage, side: int | None, reveal: bool) -> str:
    """What bytes that are sent are called: another name, other bytes."""
    return f"{VERSION}-{image.name}-{side or 'whole'}-{'blurred' if image.blurred and not reveal else 'clear'}"


def etag(image: PlacedImage, side: int | None, reveal: bool) -> str:
    """The name of what is sent, as HTTP has it."""
    return f'"{_name(image, side, reveal)}"'
