"""What a request to draw brings along, bounded before anything of it becomes an object.

Of a request's bytes only the pictures, in base64, may be many. They are cut out of the bytes first, so that what is
parsed is small whatever it says; and a picture's header says how large it will be before it is decoded. All of this is
work for threads, of which a `Line` has few, so that it can hold up neither the event loop nor the memory.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from aesthetic.errors import UserError
from aesthetic.untrusted import decode_text
from curate.images.header import probe
from curate.ledger.schema import RowError
from studio.queue import MOST_OF_ONE, MOST_WAITING, QueueFull
from studio.wire import MAX_INPUT, JobRequest

MAX_WORDS = 256 << 10
"""Bytes of a request's JSON beside its pictures: both prompts, every character written as an escape, take 48 kB."""
MAX_QUOTES = 6000  # those of two prompts, and room
MAX_FIELDS = 50

_PICTURE = re.compile(rb'"([A-Za-z0-9+/=\\]{1024,}+)"')
_MARK = "\0picture "
"""What stands in a picture's place: no base64, and no text that may be in another field."""
_ESCAPES = ((rb"\/", b"/"), (rb"\u002B", b"+"), (rb"\u002b", b"+"), (rb"\u002F", b"/"), (rb"\u002f", b"/"),
            (rb"\u003D", b"="), (rb"\u003d", b"="))  # fmt: skip
"""How PHP and .NET write the signs of base64 in JSON."""


@dataclass(frozen=True)
class ParsedRequest:
    """A request as it was read: nothing is decoded yet."""

    ask: JobRequest  # without pictures
    pictures: dict[str, bytes]  # by field, "image" and "mask": the files
    room: int  # bytes of their pixels


def parse_request(body: bytes) -> ParsedRequest:
    """Parse a request to draw.

    Raises HTTPException (400, 413), RequestValidationError or UserError, which name the field where it is one's.
    """
    words, parts = _cut(body)
    found = decode_text(words)
    if not found.certain:
        raise HTTPException(400, "the request is not UTF-8")
    if not found.text.strip():
        raise _invalid("missing", (), "Field required")
    try:
        value = json.loads(found.text, parse_int=_whole)
    except RecursionError:
        raise HTTPException(400, "the request is nested too deep") from None
    except ValueError as e:
        raise _invalid("json_invalid", (), f"this is no JSON: {e}") from None
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise _invalid(
            "too_long", (), f"{len(value):,} fields; there are {len(JobRequest.model_fields)} that can be asked"
        )
    try:
        ask = JobRequest.model_validate(value)
    except ValidationError as e:
        errors = e.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**error, "loc": ("body", *error["loc"])} for error in errors]) from None
    pictures = {
        name: _file(name, text, parts) for name in ("image", "mask") if (text := getattr(ask, name)) is not None
    }
    room = sum(_room(name, data) for name, data in pictures.items())
    return ParsedRequest(ask.model_copy(update={"image": None, "mask": None}), pictures, room)


def _cut(body: bytes) -> tuple[bytes, list[bytes]]:
    """The JSON with a mark in the place of each long run of base64, and these."""
    if body.count(b'"') > MAX_QUOTES:
        raise HTTPException(413, "the request holds more text than can be asked")
    parts: list[bytes] = []

    def taken(match: re.Match[bytes]) -> bytes:
        parts.append(match[1])
        return json.dumps(f"{_MARK}{len(parts) - 1}").encode()

    words = _PICTURE.sub(taken, body)
    if len(words) > MAX_WORDS:
        raise HTTPException(
            413,
            f"the request has {len(words):,} bytes beside its pictures; at most {MAX_WORDS:,} are read (pictures are "
            "plain base64, without `data:` and line ends)",
        )
    return words, parts


def _whole(digits: str) -> int | float:
    """An integer; one that no field could hold is infinite, for the field's own check to find."""
    return int(digits) if len(digits) < 400 else math.inf


def _invalid(kind: str, loc: tuple[str, ...], message: str) -> RequestValidationError:
    return RequestValidationError([{"type": kind, "loc": ("body", *loc), "msg": message}])


def _file(name: str, text: str, parts: list[bytes]) -> bytes:
    """The bytes of a picture's file."""
    given = text.encode("utf-8", "replace")
    if text.startswith(_MARK) and (number := text.removeprefix(_MARK)).isdecimal() and int(number[:9]) < len(parts):
        given = parts[int(number)]
        if b"\\" in given:
            for escape, sign in _ESCAPES:
                given = given.replace(escape, sign)
    try:
        return base64.b64decode(given, validate=True)
    except ValueError as e:
        raise UserError(f"{name}: this is no base64 ({e})") from e


def _room(name: str, data: bytes) -> int:
    """Bytes of a picture's pixels, by its header. Raises UserError where there is no picture, or it is too large."""
    try:
        _, width, height = probe(data, MAX_INPUT)
    except RowError as e:
        raise unreadable(name, e) from e
    return 3 * width * height


def unreadable(name: str, error: RowError) -> UserError:
    """A picture that can't be read, in words."""
    return UserError(f"{name}: the picture can't be read: {error.detail or error.reason.value}")


T = TypeVar("T")


class BoundedExecutor:
    """Work off the event loop: `places` pieces at a time, one at a time of each client, and as many that wait as jobs.

    So nobody waits for more than one piece of each of the others.
    """

    def __init__(self, name: str, places: int) -> None:
        self._pool = ThreadPoolExecutor(places, thread_name_prefix=name)
        self._places = asyncio.Semaphore(places)
        self._waiting: Counter[str] = Counter()
        self._turns: dict[str, asyncio.Lock] = {}

    async def run(self, client: str, work: Callable[[], T]) -> T:
        """What `work` returns, or raises. raises QueueFull where too many wait already."""
        if self._waiting[client] >= MOST_OF_ONE:
            raise QueueFull(f"{MOST_OF_ONE} of your requests are being read already", own=True)
        if self._waiting.total() >= MOST_WAITING:
            raise QueueFull(f"{MOST_WAITING} requests are being read already")
        self._waiting[client] += 1
        try:
            async with self._turns.setdefault(client, asyncio.Lock()), self._places:
                return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._waiting[client] -= 1
            if not self._waiting[client]:
                del self._waiting[client], self._turns[client]

    def close(self) -> None:
        """Begin nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
