"""The routes of the page and of the JSON API, what errors look like, and the server around them."""

from __future__ import annotations

import contextlib
import errno
import re
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Annotated, Any

import fastapi
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError, StarletteHTTPException
from fastapi.responses import FileResponse, JSONResponse
from fastapi.sse import EventSourceResponse

from aesthetic.errors import UserError
from studio.gate import MAX_HEAD, Gate, GuardedProtocol, address_of, error_response
from studio.queue import QueueFull, StudioJob
from studio.service import FolderGone, GenerationService, facts_in
from studio.wire import ERRORS, ERRORS_OF_FILES, ImagesView, JobRequest, JobsView, JobView, ModelView
from train.devices import versions

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names of this machine to itself: what a server without a token answers to."""

CLIENT = "tastemaker_client"
"""The cookie by which a browser's jobs are told from others'."""

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/brush.js": ("brush.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


def new_app(service: GenerationService, hosts: frozenset[str] | None = LOOPBACK, token: str | None = None) -> Gate:
    """The ASGI app: page and API, behind the gate, which the last two arguments are for.

    Its lifespan starts and ends the thread that draws.
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
    app.include_router(api, responses=ERRORS)
    folder = resources.files("studio") / "page"
    for path, (file, kind) in PAGE.items():
        app.get(path, include_in_schema=False)(_shows((folder / file).read_bytes(), kind))
    for error, handler in _HANDLERS.items():
        app.add_exception_handler(error, handler)
    description = app.openapi()
    description["components"]["schemas"]["JobRequest"] = JobRequest.model_json_schema()
    if token is not None:
        description["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        description["security"] = [{"token": []}]
    return Gate(app, hosts, token, (folder / "sign-in.html").read_text("utf-8"))


def listen(host: str, port: int) -> socket.socket:
    """Take an address, before a model is loaded in vain. Raises UserError where it can't be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as e:
        raise UserError(f"--host {host}: no such address ({e})") from e
    taken = socket.socket(family, kind, protocol)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        taken.listen()
    except OSError as e:
        taken.close()
        if e.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use: stop what uses it, or give another --port") from e
        raise UserError(f"{host} port {port} can't be had: {e.strerror}") from e
    return taken


class StudioServer(uvicorn.Server):
    """uvicorn around the app. `run(sockets=[listen(...)])` serves until SIGINT or SIGTERM, or `should_exit`.

    What is being drawn ends at its next step then, what waits is dropped. The signal is raised once more at the end.

    Args:
        ready: called when the server answers.
    """

    def __init__(self, app: Gate, service: GenerationService, ready: Callable[[], None] = lambda: None) -> None:
        config = uvicorn.Config(
            app,
            http=GuardedProtocol,
            ws="none",
            log_config=None,
            log_level="error",  # its warnings are of requests that are none, as many as anybody likes
            access_log=False,
            server_header=False,
            proxy_headers=False,  # anybody could say that he is somebody else
            h11_max_incomplete_event_size=MAX_HEAD,
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)
        self._service, self._ready = service, ready

    async def main_loop(self) -> None:
        self._ready()
        await super().main_loop()
        self._service.queue.stop()  # ends the streams of events too, for which it would wait
        for connection in list(self.server_state.connections):
            if isinstance(connection, GuardedProtocol) and connection.is_sending:
                connection.transport.abort()


# ------------------------------------------------------------------------------------------------------------- routes


async def _service(request: Request) -> GenerationService:
    service: GenerationService = request.app.state.service
    return service


async def client_of(request: Request) -> str:
    """Who asks: a browser by its cookie, anybody else by address."""
    known = request.cookies.get(CLIENT, "")
    if re.fullmatch(r"[0-9a-f]{32}", known):
        return known
    return address_of(request.scope)


async def _stream(request: Request) -> AsyncIterator[None]:
    with request.app.state.service.stream(address_of(request.scope)):
        yield


Service = Annotated[GenerationService, Depends(_service)]
Client = Annotated[str, Depends(client_of)]


async def _job(id: Annotated[str, fastapi.Path(pattern="^[0-9a-f]{16}$")], service: Service) -> StudioJob:
    if job := service.queue.get(id):
        return job
    raise HTTPException(404, f"there is no job {id}, or no longer: it may be of before a restart")


JobInPath = Annotated[StudioJob, Depends(_job)]
OneStream = Depends(_stream)
"""Takes a place among the streams until the last event was sent."""
JOB_BODY = {"required": True, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobRequest"}}}}
"""The body of a request to draw, for the description: it is parsed by `studio.body`, off the event loop."""
api = APIRouter(prefix="/api")


# What is quick is answered on the event loop itself: so it waits for none of the threads that read files.


@api.get("/model")
async def model(service: Service) -> ModelView:
    """What pictures are drawn with, and what may be asked."""
    return service.model()


@api.post("/jobs", status_code=202, openapi_extra={"requestBody": JOB_BODY})
async def ask(request: Request, service: Service, client: Client) -> JobView:
    """Ask for pictures. The answer comes at once, the pictures when it is their turn."""
    job = await service.ask(await request.body(), client, address_of(request.scope))
    return service.views([job], client)[0]


@api.get("/jobs")
async def jobs(
    service: Service,
    client: Client,
    mine: bool = False,
    offset: Annotated[int, Query(ge=0, le=10_000)] = 0,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
) -> JobsView:
    """Jobs that wait, are drawn, or ended lately: newest first."""
    found = [j for j in service.queue.jobs() if not mine or j.client == client]
    return JobsView(jobs=service.views(found[offset : offset + limit], client), more=len(found) > offset + limit)


@api.get("/jobs/{id}")
async def job(job: JobInPath, service: Service, client: Client) -> JobView:
    """How far a job is."""
    return service.views([job], client)[0]


@api.delete("/jobs/{id}")
async def cancel(job: JobInPath, service: Service, client: Client) -> JobView:
    """End a job of one's own, waiting or being drawn. Pictures that are finished stay."""
    if job.client != client:
        raise HTTPException(403, "this job is somebody else's")
    service.queue.cancel(job)
    return service.views([job], client)[0]


@api.get("/jobs/{id}/events", response_class=EventSourceResponse, responses=ERRORS_OF_FILES, dependencies=[OneStream])
async def events(job: JobInPath, service: Service, client: Client) -> AsyncIterator[JobView]:
    """Server-sent events: the job each time that it changes, until it is over."""
    async for views in service.changes(lambda: [job], client):
        yield views[0]


@api.get("/events", response_class=EventSourceResponse, responses=ERRORS_OF_FILES, dependencies=[OneStream])
async def my_events(service: Service, client: Client) -> AsyncIterator[JobsView]:
    """Server-sent events: one's jobs that wait or are drawn, and how these end, until all are over."""
    before = {j.id for j in service.queue.jobs() if j.is_over}

    def mine() -> list[StudioJob]:
        return [j for j in service.queue.jobs() if j.client == client and j.id not in before]

    async for views in service.changes(mine, client):
        yield JobsView(jobs=views, more=False)


@api.get("/images")
def images(
    service: Service,
    before: Annotated[int | None, Query(ge=0, lt=10**12)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 24,
) -> ImagesView:
    """Finished pictures, newest first. The next page is that `before` the number of the last one."""
    return service.history(before, limit)


@api.get(
    "/images/{name}.png",
    response_class=FileResponse,
    responses={**ERRORS_OF_FILES, 200: {"content": {"image/png": {}}, "description": "the file"}},
)
def image(name: Annotated[str, fastapi.Path(pattern="^[0-9]{6,12}$")], service: Service) -> FileResponse:
    """A picture's file, with all facts in it."""
    path = service.out / f"{name}.png"
    if facts_in(path) is None:
        raise HTTPException(404, f"there is no picture {name}")
    return FileResponse(path, headers={"cache-control": "private, max-age=31536000"})


def _shows(data: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    """A file of the page. With the page itself a browser gets the cookie that tells its jobs from others'."""

    async def show(request: Request) -> Response:
        response = Response(data, media_type=kind, headers={"cache-control": "no-cache"})
        if kind.startswith("text/html") and CLIENT not in request.cookies:
            response.set_cookie(CLIENT, secrets.token_hex(16), max_age=365 * 86400, httponly=True, samesite="strict")
        return response

    return show


# ------------------------------------------------------------------------------------------------------------- errors


async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    said = [f"{'.'.join(str(part) for part in e['loc'][1:]) or 'body'}: {e['msg']}" for e in error.errors()]
    more = f" (and {len(said) - 5} more)" if len(said) > 5 else ""
    return error_response(422, ("; ".join(said[:5]) + more)[:1000], "GET /api/openapi.json says what can be asked")


async def _impossible(request: Request, error: UserError) -> JSONResponse:
    return error_response(422, str(error))


async def _full(request: Request, error: QueueFull) -> JSONResponse:
    hint = "cancel some, or wait" if error.own else "try again in a while"
    return error_response(429 if error.own else 503, str(error), hint, {"retry-after": "10"})


async def _gone(request: Request, error: FolderGone) -> JSONResponse:
    return error_response(503, str(error), "put it back, or draw: then it is made anew", {"retry-after": "10"})


async def _http(request: Request, error: StarletteHTTPException) -> JSONResponse:
    return error_response(error.status_code, str(error.detail), headers=error.headers)


async def _ours(request: Request, error: Exception) -> JSONResponse:
    return error_response(500, f"an error of the server's own: {type(error).__name__}", "its log says where")


_HANDLERS: dict[type[Exception], Any] = {
    RequestValidationError: _invalid,
    UserError: _impossible,
    QueueFull: _full,
    FolderGone: _gone,
    StarletteHTTPException: _http,
    Exception: _ours,
}
