"""Bodies of requests that bring images along: how much of them is read, and in what order.

Of a request's bytes only the images, in base64, may be many. They are cut out of the bytes first, so that what is
parsed is small whatever it says; and an image's header says how large it will be before it is decoded. All of it is
work for threads, of which a `BoundedExecutor` has few, so that it can hold up neither the event loop nor the memory.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from aesthetic.errors import UserError
from aesthetic.untrusted import decode_text
from curate.ledger.schema import RowError

MAX_INPUT = 16_000_000
"""Pixels of an image that is sent, or enlarged (4,000 x 4,000); checked before anything is decoded."""
MAX_TEXT = 256 << 10
"""Bytes of a request's JSON beside its images: two prompts, every character written as an escape, take 48 kB."""
MAX_QUOTES = 6000  # those of two prompts, and room
MAX_FIELDS = 50

_LONG_BASE64 = re.compile(rb'"([A-Za-z0-9+/=\\]{1024,}+)"')
_MARK = "\0image "
"""What stands in an image's place: no base64, and no text that may be in another field."""
_ESCAPES = ((rb"\/", b"/"), (rb"\u002B", b"+"), (rb"\u002b", b"+"), (rb"\u002F", b"/"), (rb"\u002f", b"/"),
            (rb"\u003D", b"="), (rb"\u003d", b"="))  # fmt: skip
"""How PHP and .NET write the signs of base64 in JSON."""

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


def parse_body(body: bytes, model: type[M], fields: Sequence[str]) -> tuple[M, dict[str, bytes]]:
    """A request as it was read, and the files in those of its fields that hold images in base64; nothing is decoded.

    The fields are None in the request itself. Raises HTTPException (400, 413), RequestValidationError or UserError,
    which name the field where it is one's.
    """
    if body.count(b'"') > MAX_QUOTES:
        raise HTTPException(413, "the request holds more text than can be asked")
    parts: list[bytes] = []

    def cut(match: re.Match[bytes]) -> bytes:
        parts.append(match[1])
        return json.dumps(f"{_MARK}{len(parts) - 1}").encode()

    rest = _LONG_BASE64.sub(cut, body)
    if len(rest) > MAX_TEXT:
        raise HTTPException(
            413,
            f"the request has {len(rest):,} bytes beside its images; at most {MAX_TEXT:,} are read (images are "
            "plain base64, without `data:` and line ends)",
        )
    request = _parse_fields(rest, model)
    files = {}
    for name in fields:
        text: str | None = getattr(request, name)
        if text is None:
            continue
        data = text.encode("utf-8", "replace")
        if text.startswith(_MARK) and (number := text.removeprefix(_MARK)).isdecimal() and int(number[:9]) < len(parts):
            data = parts[int(number)]
            for escape, sign in _ESCAPES if b"\\" in data else ():
                data = data.replace(escape, sign)
        try:
            files[name] = base64.b64decode(data, validate=True)
        except ValueError as e:
            raise UserError(f"{name}: this is no base64 ({e})") from e
    return request.model_copy(update=dict.fromkeys(fields)), files


def _parse_fields(data: bytes, model: type[M]) -> M:
    found = decode_text(data)
    if not found.certain:
        raise HTTPException(400, "the request is not UTF-8")
    if not found.text.strip():
        raise _invalid("missing", "Field required")
    try:  # an integer that no field could hold is infinite, for the field's own check to find
        value = json.loads(found.text, parse_int=lambda digits: int(digits) if len(digits) < 400 else math.inf)
    except RecursionError:
        raise HTTPException(400, "the request is nested too deep") from None
    except ValueError as e:
        raise _invalid("json_invalid", f"this is no JSON: {e}") from None
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise _invalid("too_long", f"{len(value):,} fields; there are {len(model.model_fields)} that can be asked")
    try:
        return model.model_validate(value)
    except ValidationError as e:
        errors = e.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**error, "loc": ("body", *error["loc"])} for error in errors]) from None


def _invalid(kind: str, message: str) -> RequestValidationError:
    return RequestValidationError([{"type": kind, "loc": ("body",), "msg": message}])


def check_characters(text: str) -> str:
    """The text, for a field's validator. ValueError where a character can't be in one."""
    for character in text:
        if "\ud800" <= character <= "\udfff" or (character < " " and character not in "\t\n\r"):
            raise ValueError(f"the character {character!r} can't be in a text")
    return text


def read_input(name: str, read: Callable[[bytes, int], T], data: bytes) -> T:
    """What `read(data, MAX_INPUT)` returns. Raises UserError where there is no image, or it is too large."""
    try:
        return read(data, MAX_INPUT)
    except RowError as e:
        raise UserError(f"{name}: the image can't be read: {e.detail or e.reason.value}") from e
