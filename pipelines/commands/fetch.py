"""`tastemaker fetch`: a list to downloaded images."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.commands import curate
from pipelines.options import Result


@dataclass(frozen=True, kw_only=True)
class FetchOptions(curate.CurateOptions):
    pass


def run(options: FetchOptions) -> Result:
    """The first stages of the main job."""
    return curate.run(options, fetch_only=True)
