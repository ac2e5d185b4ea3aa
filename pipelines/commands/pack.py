"""`tastemaker pack`: the images of a selection as shards to train on, with a sheet to look at."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.options import Result, WithRecipe, argument, option


@dataclass(frozen=True, kw_only=True)
class PackOptions(WithRecipe):
    data: str = argument("DATA")
    name: str | None = option("the selection's name (default: the recipe's)")


def run(options: PackOptions) -> Result:
    """Copy what was selected."""
    from curate.store.ownership import open_data
    from pipelines.commands import curate

    data = open_data(options.data)
    return curate.pack_only(data, curate.recipe_of(data, options.recipe, options.set, select=options.name))
