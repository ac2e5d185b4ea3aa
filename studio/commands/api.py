"""The JSON API of commands: what they would be, those that run, and how far they are."""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator
from typing import Annotated

import fastapi
from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse
from pydantic import BaseModel, Field

from curate.layout import Data
from studio.clients import Client
from studio.commands.actions import Action, CommandLine, Preview, SelectionName
from studio.commands.service import CommandJob, CommandService, State
from studio.errors import ERRORS_OF_FILES
from studio.streams import OneStream

api = APIRouter(prefix="/api")
writing = APIRouter(prefix="/api")


class PreviewView(BaseModel):
    """What an action is in a terminal."""

    command: str = Field(description="to be typed in the folder where the studio was started")
    yaml: str = Field(description="of `select` the rules, of `recipe` all of it: a file for `--recipe`")


class ProgressView(BaseModel):
    """How far a command says that it is."""

    done: int
    of: int
    rate: str
    eta: str


class CommandView(BaseModel):
    """A command that waits, runs or has run."""

    id: str
    command: str
    state: State
    lines: list[str] = Field(description="the last ones")
    dropped: int = Field(description="lines before those")
    progress: ProgressView | None
    exit: int | None = Field(description="the exit code; 130: interrupted")
    paths: dict[str, str] = Field(description="what it wrote")
    at: float = Field(description="when it was asked for, in seconds since 1970")
    seconds: float = Field(description="how long it took")
    mine: bool


class CommandsView(BaseModel):
    """Commands that wait, run, or ended lately: newest first."""

    jobs: list[CommandView]


async def _service(request: Request) -> CommandService:
    service: CommandService = request.app.state.data.commands
    return service


Service = Annotated[CommandService, Depends(_service)]


async def _line(service: Service) -> CommandLine:
    if service.line is None:
        raise HTTPException(404, "this studio was started without the command line")
    return service.line


Line = Annotated[CommandLine, Depends(_line)]


async def _job(id: Annotated[str, fastapi.Path(pattern="^[0-9a-f]{16}$")], service: Service) -> CommandJob:
    if job := service.get(id):
        return job
    raise HTTPException(404, f"there is no command {id}, or no longer: it may be of before a restart")


JobInPath = Annotated[CommandJob, Depends(_job)]


@api.post("/commands/preview")
def preview(action: Preview, line: Line) -> PreviewView:
    """The command that does this, as one would type it. Nothing is run."""
    return PreviewView(command=shlex.join(["tastemaker", *line.words(action)]), yaml=line.text(action))


@writing.post("/commands", status_code=202)
def run(action: Action, line: Line, service: Service, client: Client) -> CommandView:
    """Run the command that does this, when those before it are over."""
    return _view(service.submit(line.words(action), client), client)


@api.get("/commands")
async def commands(service: Service, client: Client) -> CommandsView:
    """Commands that wait, run, or ended lately: newest first."""
    return CommandsView(jobs=[_view(job, client) for job in service.jobs()])


@api.get("/commands/{id}")
async def command(job: JobInPath, client: Client) -> CommandView:
    """How far a command is, and its last lines."""
    return _view(job, client)


@api.get(
    "/commands/{id}/events", response_class=EventSourceResponse, responses=ERRORS_OF_FILES, dependencies=[OneStream]
)
async def events(job: JobInPath, service: Service, client: Client) -> AsyncIterator[CommandView]:
    """Server-sent events: the command each time that it changed, until it is over."""
    last: CommandView | None = None
    async for changed in service.changes(job):
        view = _view(changed, client)
        if view != last:
            yield view
        last = view


@api.get(
    "/sheets/{name}.png",
    response_class=FileResponse,
    responses={**ERRORS_OF_FILES, 200: {"content": {"image/png": {}}, "description": "the sheet"}},
)
def sheet(name: Annotated[SelectionName, fastapi.Path()], request: Request) -> FileResponse:
    """The contact sheet of a selection, where `sheet` or `pack` has drawn one; unsafe images are blurred in it."""
    data: Data = request.app.state.data.data
    path = data.sheet(name)
    if not data.exists(path):
        raise HTTPException(404, f"there is no sheet of {name} yet")
    return FileResponse(data.local(path), media_type="image/png", headers={"cache-control": "private, no-cache"})


@writing.delete("/commands/{id}")
async def cancel(job: JobInPath, service: Service, client: Client) -> CommandView:
    """End a command, as Ctrl-C would; 10 seconds later it is killed. Anybody may who may write here."""
    service.cancel(job)
    return _view(job, client)


def _view(job: CommandJob, client: str) -> CommandView:
    done = job.progress
    return CommandView(
        id=job.id,
        command=shlex.join(["tastemaker", *job.words]),
        state=job.state,
        lines=list(job.lines),
        dropped=job.dropped,
        progress=ProgressView(done=done.done, of=done.of, rate=done.rate, eta=done.eta) if done else None,
        exit=job.exit,
        paths=job.paths,
        at=job.at,
        seconds=job.seconds,
        mine=job.client == client,
    )
