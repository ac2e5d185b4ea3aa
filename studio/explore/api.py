"""The JSON API of the page to explore: the data folder and its columns."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

from studio.data import StudioData


class DataView(BaseModel):
    """A data folder."""

    name: str
    place: str = Field(description="its path or URL")
    read_only: bool


async def _data(request: Request) -> StudioData:
    data: StudioData = request.app.state.data
    return data


Folder = Annotated[StudioData, Depends(_data)]
api = APIRouter(prefix="/api")


@api.get("/data")
async def data(folder: Folder) -> DataView:
    """The data folder."""
    return DataView(name=folder.data.name, place=str(folder.data), read_only=folder.read_only)
