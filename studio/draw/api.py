"""The JSON API of the page to draw on: the model, jobs, their events, and the images that are there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

import fastapi
from fastapi import APIRouter, Depends, HTTPException, Query, Request
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse

from studio.clients import Client
from studio.draw.service import GenerationService, facts_in
from studio.draw.wire import ImagesView, JobsView, JobView, ModelView
from studio.errors import ERRORS_OF_FILES
from studio.gate import address_of
from studio.queue import StudioJob
from studio.streams import OneStream


async def _service(request: Request) -> GenerationService:
    service: GenerationService = request.app.state.draw.service
    return service


Service = Annotated[GenerationService, Depends(_service)]


async def _job(id: Annotated[str, fastapi.Path(pattern="^[0-9a-f]{16}$")], service: Service) -> StudioJob:
    if job := service.queue.get(id):
        return job
    raise HTTPException(404, f"there is no job {id}, or no longer: it may be of before a restart")


JobInPath = Annotated[StudioJob, Depends(_job)]
JOB_BODY = {"required": True, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobRequest"}}}}
"""The body of a request to draw, for the description: it is parsed by `studio.draw.wire`, off the event loop."""
api = APIRouter(prefix="/api")


# What is quick is answered on the event loop itself: so it waits for none of the threads that read files.


@api.get("/model")
async def model(service: Service) -> ModelView:
    """What images are generated with, and what may be asked."""
    return service.model()


@api.post("/jobs", status_code=202, openapi_extra={"requestBody": JOB_BODY})
async def ask(request: Request, service: Service, client: Client) -> JobView:
    """Ask for images. The answer comes at once, the images when it is their turn."""
    job = await service.submit(await request.body(), client, address_of(request.scope))
    return service.views([job], client)[0]


@api.get("/jobs")
async def jobs(
    service: Service,
    client: Client,
    mine: bool = False,
    offset: Annotated[int, Query(ge=0, le=10_000)] = 0,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
) -> JobsView:
    """Jobs that wait, are generated, or ended lately: newest first."""
    found = [j for j in service.queue.jobs() if not mine or j.client == client]
    return JobsView(jobs=service.views(found[offset : offset + limit], client), more=len(found) > offset + limit)


@api.get("/jobs/{id}")
async def job(job: JobInPath, service: Service, client: Client) -> JobView:
    """How far a job is."""
    return service.views([job], client)[0]


@api.delete("/jobs/{id}")
async def cancel(job: JobInPath, service: Service, client: Client) -> JobView:
    """End a job of one's own, waiting or being generated. Images that are finished stay."""
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
    """Server-sent events: one's jobs that wait or are generated, and how these end, until all are over."""
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
    """Finished images, newest first. The next page is that `before` the number of the last one."""
    return service.history(before, limit)


@api.get(
    "/images/{name}.png",
    response_class=FileResponse,
    responses={**ERRORS_OF_FILES, 200: {"content": {"image/png": {}}, "description": "the file"}},
)
def image(name: Annotated[str, fastapi.Path(pattern="^[0-9]{6,12}$")], service: Service) -> FileResponse:
    """An image's file, with all facts in it."""
    path = service.out / f"{name}.png"
    if facts_in(path) is None:
        raise HTTPException(404, f"there is no image {name}")
    return FileResponse(path, headers={"cache-control": "private, max-age=31536000"})
