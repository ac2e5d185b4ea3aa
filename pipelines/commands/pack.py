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
    from curate.store.files import sweep
    from curate.store.lock import Lock
    from curate.store.ownership import open_data
    from pipelines.checks import refuse_denied
    from pipelines.curation import pack_selection
    from pipelines.stored_recipe import recipe_of

    data = open_data(options.data)
    recipe = recipe_of(data, options.recipe, options.set, select=options.name)
    result = Result()
    refuse_denied(data, recipe)
    with Lock(data.root):
        sweep(data.root)
        pack_selection(data, recipe, result)
    return result
