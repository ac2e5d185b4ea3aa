"""The web application: which pages there are, their files and their APIs, and the gate around all of it."""

from __future__ import annotations

import contextlib
import html
from collections.abc import AsyncIterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import Depends, FastAPI, Request, Response

from studio.clients import Client, set_client
from studio.commands import api as commands_api
from studio.draw import api as draw_api
from studio.draw.wire import JobRequest
from studio.errors import ERRORS, HANDLED, on_error
from studio.explore import api as explore_api
from studio.gate import Gate, address_of
from studio.images import api as images_api
from studio.queue import Turns
from studio.rate import api as rate_api
from studio.search import api as search_api
from studio.streams import EventStreams
from train.devices import versions

if TYPE_CHECKING:
    from studio.data import StudioData
    from studio.draw.loading import LoadingModel
    from studio.draw.service import GenerationService

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names of this machine to itself: what a server without a token answers to."""

_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
OF_DATA = (
    explore_api,
    images_api,
    commands_api,
    rate_api,
    search_api,
)
"""The APIs over a data folder, each a module: `api`, its routes, and where it has any `writing`, those that write. They
are left out where a studio is to be looked at only."""

_TABS = "<!-- tabs -->"
"""Where the links to all pages go in a page."""


def new_app(
    *,
    draw: GenerationService | LoadingModel | None = None,
    data: StudioData | None = None,
    hosts: frozenset[str] | None = LOOPBACK,
    token: str | None = None,
) -> Gate:
    """The ASGI app: pages and API, behind the gate, which the last two arguments are for.

    draw: a model; there is a page to draw on then. data: a data folder; there are pages to explore it and to rate its
    images then. Its lifespan starts and ends the threads of both.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if draw is not None:
            draw.start()
        yield
        if draw is not None:
            draw.close()
        if data is not None:
            data.close()

    app = FastAPI(
        title="Tastemaker",
        description="Look at a data folder, decide, rate, and draw with a model. Every error is `{error, hint}`.",
        version=versions().get("tastemaker", "unknown"),
        lifespan=lifespan,
        openapi_url="/api/openapi.json",
        docs_url=None,  # their pages come from another host
        redoc_url=None,
    )
    app.state.draw, app.state.data, app.state.streams = draw, data, EventStreams()
    pages = {"Explore": "explore.html", "Rate": "rate.html"} if data is not None else {}
    if data is not None and data.read_only:
        del pages["Rate"]
    pages |= {"Draw": "draw.html"} if draw is not None else {}
    _mount(app, pages)
    if draw is not None:
        app.include_router(draw_api.api, responses=ERRORS)
    if data is not None:
        routers = [part.api for part in OF_DATA]
        routers += [part.writing for part in OF_DATA if hasattr(part, "writing") and not data.read_only]
        turns = Turns()

        async def turn(request: Request, client: Client) -> AsyncIterator[None]:
            if request.url.path.endswith("/events"):  # lasts, and takes no thread
                yield
                return
            async with turns.take(client, address_of(request.scope)):
                yield

        for router in routers:
            app.include_router(router, responses=ERRORS, dependencies=[Depends(turn)])
    for error in HANDLED:
        app.add_exception_handler(error, on_error)
    description = app.openapi()
    if draw is not None:
        description["components"]["schemas"]["JobRequest"] = JobRequest.model_json_schema()
    if token is not None:
        description["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        description["security"] = [{"token": []}]
    sign_in = (resources.files("studio") / "page" / "sign-in.html").read_text("utf-8")
    return Gate(app, hosts, token, sign_in, {_address(i, title) for i, title in enumerate(pages)})


def _address(place: int, title: str) -> str:
    """Where a page is: the first one at the root."""
    return "/" if place == 0 else f"/{title.lower()}"


def _mount(app: FastAPI, pages: dict[str, str]) -> None:
    """Serve the pages, each with links to all of them, and what lies beside them in page/: scripts, style, icon."""
    files: dict[str, tuple[bytes, str]] = {}
    for item in sorted((resources.files("studio") / "page").iterdir(), key=lambda f: f.name):
        if (suffix := Path(item.name).suffix) in _TYPES and suffix != ".html":
            files[f"/{item.name}"] = item.read_bytes(), _TYPES[suffix]
    for place, (title, name) in enumerate(pages.items()):
        links = [
            f'<a href="{_address(i, other)}"{" aria-current=page" if other == title else ""}>{html.escape(other)}</a>'
            for i, other in enumerate(pages)
        ]
        text = (resources.files("studio") / "page" / name).read_text("utf-8")
        tabs = "".join(links) if len(links) > 1 else ""
        files[_address(place, title)] = text.replace(_TABS, tabs).encode(), _TYPES[".html"]

    async def file(request: Request) -> Response:
        """A file of a page. With the page itself a browser gets the cookie that tells its requests from others'."""
        content, kind = files[request.scope["path"]]
        response = Response(content, media_type=kind, headers={"cache-control": "no-cache"})
        if kind == _TYPES[".html"]:
            set_client(request, response)
        return response

    for path in files:
        app.get(path, include_in_schema=False)(file)
