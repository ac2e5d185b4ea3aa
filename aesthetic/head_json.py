"""The schema of head.json. A module of its own: pydantic is slow to import, and most who import heads read none."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aesthetic.untrusted import printable

Size = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class SpaceFields(_Strict):
    """The space that a head reads."""

    encoder: str
    dim: Size
    norm: str
    details: dict[str, Any]
    fingerprint: str
    probes: Size | None


class Digests(_Strict):
    """The sha256 of the other file."""

    weights: str = Field(alias="head.safetensors")


class HeadFields(_Strict):
    """What head.json says, but for its format."""

    name: str
    task: str
    scale: Annotated[list[Number], Field(min_length=2, max_length=2)]
    space: SpaceFields
    layers: list[int]
    activation: Literal["relu"] | None
    link: str = "identity"
    card: dict[str, Any]
    sha256: Digests


def wrong_field(error: ValidationError) -> str:
    """The first field that does not fit, and why, for a message."""
    first = error.errors(include_url=False, include_context=False)[0]
    return printable(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", 300)
