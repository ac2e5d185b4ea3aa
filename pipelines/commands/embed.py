"""`tastemaker embed`: vectors and columns of what is fetched, then the selection and its shards."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.options import Result, StageOptions, argument


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(StageOptions):
    data: str = argument("DATA")


def run(options: EmbedOptions, *, retry: bool = False) -> Result:
    """The main job on what a data folder already plans; with `retry`, what failed is fetched again first."""
    from curate.store.ownership import open_data
    from pipelines import curation
    from pipelines.stored_recipe import recipe_of

    data = open_data(options.data)
    recipe = recipe_of(data, options.recipe, options.set)
    return curation.resume(data, recipe, retry=retry, address=options.ray_address, restart_from=options.restart_from)
