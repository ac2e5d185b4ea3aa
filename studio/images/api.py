"""The JSON API of images: thumbnails and whole images, all that is known of one, denying."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Annotated, TypeVar

import fastapi
from fastapi import APIRouter, HTTPException, Query, Request, Response

from curate.fetch.deny_file import What
from studio.clients import Client
from studio.data import StudioData
from studio.errors import ERRORS_OF_FILES
from studio.explore.api import Folder
from studio.explore.explorer import UnknownSelection
from studio.explore.wire import SelectionId
from studio.images import denying
from studio.images.denying import DenyRequest, DenyView
from studio.images.service import etag
from studio.images.thumbnails import ImageFile
from studio.images.why import WhyView, why_view

T = TypeVar("T")


class Side(IntEnum):
    """Pixels of the long side of a thumbnail."""

    SMALL = 320
    LARGE = 640


Key = Annotated[str, fastapi.Path(pattern="^[0-9]{5,20}$", description="of a row, such as 000010005")]
Reveal = Annotated[bool, Query(description="show an unsafe image in clear")]
_IMAGES = {
    kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("image/jpeg", "image/png", "image/webp")
}
ANSWERS: dict[int | str, dict[str, object]] = {
    **ERRORS_OF_FILES,
    200: {"content": _IMAGES, "description": "the image; `x-image-state: undecodable` and one grey pixel in its place"},
    304: {"description": "it is what `if-none-match` names"},
}
api = APIRouter(prefix="/api")
writing = APIRouter(prefix="/api")


@api.get("/thumbnails/{key}", response_class=Response, responses=ANSWERS)
async def thumbnail(
    key: Key, folder: Folder, client: Client, request: Request, side: Side = Side.SMALL, reveal: Reveal = False
) -> Response:
    """An image of at most `side` pixels. Unsafe ones are blurred unless `reveal`; what can't be decoded is one grey
    pixel, with the header `x-image-state: undecodable`."""
    return await _image(request, folder, client, key, int(side), reveal)


@api.get("/data/images/{key}", response_class=Response, responses=ANSWERS)
async def whole_image(key: Key, folder: Folder, client: Client, request: Request, reveal: Reveal = False) -> Response:
    """An image as it is stored; unsafe ones as a blurred one of at most 640 pixels, unless `reveal`."""
    return await _image(request, folder, client, key, None, reveal)


async def _image(
    request: Request, folder: StudioData, client: str, key: str, side: int | None, reveal: bool
) -> Response:
    """What is in memory is answered at once, on the event loop; the rest when it is the client's turn."""
    images = folder.images
    try:
        if (known := images.known(key)) is not None:
            name = etag(known, side, reveal)
            if not reveal and request.headers.get("if-none-match") == name:
                return Response(status_code=304, headers=_headers(name, reveal))
            if (ready := images.ready(known, side, reveal)) is not None:
                return _answer(ready, name, reveal)
        make = partial(images.make, key, side, reveal)
        image, file = await images.executor.run(client, lambda: images.patiently(make))
    except KeyError:
        raise _no_image(key) from None
    return _answer(file, etag(image, side, reveal), reveal)


def _answer(file: ImageFile, name: str, reveal: bool) -> Response:
    headers = _headers(name, reveal)
    if not file.decoded:
        headers["x-image-state"] = "undecodable"
    return Response(file.content, media_type=file.media_type, headers=headers)


def _headers(name: str, reveal: bool) -> dict[str, str]:
    """A browser keeps it and asks each time whether it is still that: another data folder may have the same keys."""
    return {"cache-control": "no-store"} if reveal else {"cache-control": "private, no-cache", "etag": name}


def _no_image(key: str) -> HTTPException:
    return HTTPException(404, f"there is no image {key} here")


@api.get("/why/{key}")
async def why(
    key: Key,
    folder: Folder,
    client: Client,
    selection: Annotated[SelectionId | None, Query(description="whose rules are asked")] = None,
) -> WhyView:
    """All that is known of one row: captions, columns with their place among all, verdicts, licence, download."""
    return await _run(folder, client, key, lambda: why_view(folder, key, selection))


@api.get("/deny")
async def denied(folder: Folder, client: Client) -> DenyView:
    """The deny-list that is written from here, and what takes out what it names. It takes nothing away by itself."""
    return await folder.images.questions.run(client, lambda: folder.images.patiently(lambda: denying.deny_view(folder)))


@writing.post("/deny")
async def deny(body: DenyRequest, folder: Folder, client: Client) -> DenyView:
    """Deny an image by its URL (by its bytes where it has none), or its domain and all below it."""
    return await _run(folder, client, body.key, lambda: denying.deny(folder, body))


@writing.delete("/deny/{key}")
async def allow(key: Key, folder: Folder, client: Client, what: What = "image") -> DenyView:
    """Take an image, or its domain, off the deny-list again."""
    return await _run(folder, client, key, lambda: denying.allow(folder, key, what))


async def _run(folder: StudioData, client: str, key: str, work: Callable[[], T]) -> T:
    """Work about one row, when it is the client's turn."""
    try:
        return await folder.images.questions.run(client, lambda: folder.images.patiently(work))
    except UnknownSelection:
        raise HTTPException(404, "there is no such selection, or no longer: post its rules again") from None
    except KeyError:
        raise HTTPException(404, f"there is no row {key} here") from None
