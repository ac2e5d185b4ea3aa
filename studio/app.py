"""The web application: where pages are mounted, what errors look like, and the gate around all of it."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError, StarletteHTTPException
from fastapi.responses import JSONResponse

from aesthetic.errors import UserError
from studio import draw
from studio.gate import Gate, error_response
from studio.queue import QueueFull
from studio.service import FolderGone, GenerationService
from studio.wire import ERRORS, JobRequest
from train.devices import versions

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names of this machine to itself: what a server without a token answers to."""

PAGES = {"/": "draw.html", "/draw.js": "draw.js", "/brush.js": "brush.js"}
SHARED = {"/style.css": "style.css", "/icon.svg": "icon.svg"}
"""Files of the folder page/, by address: those of each page, and those of all. A page's routes are below."""

ROUTERS = (draw.api,)

_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def new_app(service: GenerationService, hosts: frozenset[str] | None = LOOPBACK, token: str | None = None) -> Gate:
    """The ASGI app: pages and API, behind the gate, which the last two arguments are for.

    Its lifespan starts and ends the thread that generates.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.queue.start()
        yield
        service.close()

    app = FastAPI(
        title="Tastemaker",
        description="Draw with a diffusion model. Every error is `{error, hint}`.",
        version=versions().get("tastemaker", "unknown"),
        lifespan=lifespan,
        openapi_url="/api/openapi.json",
        docs_url=None,  # their pages come from another host
        redoc_url=None,
    )
    app.state.service = service
    folder = resources.files("studio") / "page"
    files = {path: ((folder / name).read_bytes(), _TYPES[Path(name).suffix]) for path, name in (PAGES | SHARED).items()}

    async def file(request: Request) -> Response:
        """A file of a page. With the page itself a browser gets the cookie that tells its jobs from others'."""
        data, kind = files[request.scope["path"]]
        response = Response(data, media_type=kind, headers={"cache-control": "no-cache"})
        if kind == "text/html" and draw.CLIENT not in request.cookies:
            token = secrets.token_hex(16)
            response.set_cookie(draw.CLIENT, token, max_age=365 * 86400, httponly=True, samesite="strict")
        return response

    for path in files:
        app.get(path, include_in_schema=False)(file)
    for router in ROUTERS:
        app.include_router(router, responses=ERRORS)
    for error in (RequestValidationError, UserError, QueueFull, FolderGone, StarletteHTTPException, Exception):
        app.add_exception_handler(error, _on_error)
    description = app.openapi()
    description["components"]["schemas"]["JobRequest"] = JobRequest.model_json_schema()
    if token is not None:
        description["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        description["security"] = [{"token": []}]
    return Gate(app, hosts, token, (folder / "sign-in.html").read_text("utf-8"))


async def _on_error(request: Request, error: Any) -> JSONResponse:
    """Every error in one shape, with what to do about it."""
    soon = {"retry-after": "10"}
    match error:
        case RequestValidationError():
            found = [f"{'.'.join(str(part) for part in e['loc'][1:]) or 'body'}: {e['msg']}" for e in error.errors()]
            more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
            text = ("; ".join(found[:5]) + more)[:1000]
            return error_response(422, text, "GET /api/openapi.json says what can be asked")
        case UserError():
            return error_response(422, str(error))
        case QueueFull(own=True):
            return error_response(429, str(error), "cancel some, or wait", soon)
        case QueueFull():
            return error_response(503, str(error), "try again in a while", soon)
        case FolderGone():
            return error_response(503, str(error), "put it back, or draw: then it is made anew", soon)
        case StarletteHTTPException():
            return error_response(error.status_code, str(error.detail), headers=error.headers)
        case _:
            return error_response(500, f"an error of the server's own: {type(error).__name__}", "its log says where")
