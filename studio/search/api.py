"""The JSON API of search: what is searched for becomes a ranking; and the near-duplicates of an image."""

from __future__ import annotations

from typing import Annotated, Literal

import fastapi
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from studio.clients import Client
from studio.search.request import SearchRequest, parse_search
from studio.search.service import SearchService


class _View(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class SearchIndexView(_View):
    """The index by which many vectors are searched; of few, all are compared, and there is none."""

    state: Literal["none", "building", "ready"]
    done: int = Field(description="vectors that are in it")
    of: int
    error: str = Field(description="why it could not be made")


class SearchStateView(_View):
    """What can be searched for."""

    words: bool = Field(description="whether words, and images that are not in the data, can be")
    why: str = Field(description="if not, why not; else what there is to know")
    images: bool = Field(description="whether images of the data can be")
    index: SearchIndexView


class SearchView(_View):
    """A ranking: GET /api/rows?sort=search:ID shows it."""

    id: str
    what: str = Field(description="what was searched for, in words")
    seconds: float
    exact: bool = Field(description="whether every image was compared; else some of the nearest may be missing")
    recall: float | None = Field(description="of the 100 nearest the share that is found, as measured on this data")
    of: int = Field(description="images that have a vector")


class CopyView(_View):
    """An image of a group."""

    key: str
    kept: bool = Field(description="whether it is the one that the recipe keeps, or one of those")
    values: dict[str, str | int | float | bool] = Field(description="what the annotator says of it, and its size")


class CopyGroupView(_View):
    """Images that are nearly the same."""

    column: str
    group: str = Field(description="the first key in it, by which it is called")
    size: int = Field(description="images in it; at most 100 are listed")
    keeper: str
    rule: str = Field(description="of the recipe, that keeps it; empty: it is the first")
    members: list[CopyView]


class NearestView(_View):
    """An image that looks like it."""

    key: str
    cosine: float


class LookAlikesView(_View):
    """The near-duplicates of an image, and what else looks like it."""

    groups: list[CopyGroupView] = Field(description="of each column of near-duplicates in which it has one")
    nearest: list[NearestView] = Field(description="by their vectors, nearest first; empty where it has none")


async def _service(request: Request) -> SearchService:
    service: SearchService = request.app.state.data.search
    return service


Service = Annotated[SearchService, Depends(_service)]
SEARCH_BODY = {"required": True, "content": {"application/json": {"schema": SearchRequest.model_json_schema()}}}
"""The body of a search, for the description: it is parsed by `studio.search.request`, off the event loop."""
api = APIRouter(prefix="/api")


@api.get("/search")
def state(service: Service) -> SearchStateView:
    """What can be searched for, and how far the index is."""
    ability = service.ability()
    index = SearchIndexView.model_validate(service.index_state)
    return SearchStateView(words=ability.words, why=ability.why, images=ability.images, index=index)


@api.post("/search", openapi_extra={"requestBody": SEARCH_BODY})
async def search(request: Request, service: Service, client: Client) -> SearchView:
    """Search by words, by an image of the data or another one, or by several of these together."""
    body = await request.body()
    asked = await service.reading.run(client, lambda: parse_search(body))
    return SearchView.model_validate(await service.searching.run(client, lambda: service.search(asked)))


@api.get("/duplicates/{key}")
async def duplicates(
    key: Annotated[str, fastapi.Path(max_length=40)], service: Service, client: Client
) -> LookAlikesView:
    """The near-duplicates of an image: its groups, which of each is kept, and the images nearest to it."""

    def find() -> LookAlikesView:
        nearest = [NearestView(key=other, cosine=cosine) for other, cosine in service.nearest(key)]
        return LookAlikesView(
            groups=[CopyGroupView.model_validate(group) for group in service.groups.of(key)], nearest=nearest
        )

    return await service.searching.run(client, find)
