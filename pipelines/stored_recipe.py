"""The recipe that lies in a data folder: what it was made with, and which changes its finished shards forbid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from aesthetic.errors import UserError
from aesthetic.files import atomic
from curate.layout import Data
from curate.store.ownership import RECIPE_HEADER
from pipelines.recipe import DEFAULT, Recipe, load_recipe, parse_recipe, read_recipe, to_yaml

STAGES = ("source", "fetch", "images", "embed")
"""The stages whose files a changed recipe would alter; what comes after them asks nothing."""


def stored_recipe(data: Data) -> Recipe | None:
    """The recipe that a data folder was made with."""
    if not data.recipe.exists():
        return None
    return parse_recipe(read_recipe(data.recipe), what=str(data.recipe))


def store_recipe(data: Data, recipe: Recipe) -> None:
    """Write the resolved recipe beside the data, with a hash per stage as comments."""
    hashes = "".join(f"# {stage}: {value}\n" for stage, value in recipe.stage_hashes().items())
    with atomic(data.recipe) as f:
        f.write(
            (
                f"{RECIPE_HEADER}; a hash per stage over the keys that its files depend on\n" + hashes + to_yaml(recipe)
            ).encode()
        )


def recipe_of(data: Data, name: str | None, settings: Sequence[str], select: str | None = None) -> Recipe:
    """The recipe that a data folder was made with, or another one, with settings laid over it.

    A recipe.yaml where no plan is belongs to somebody else.
    """
    if name is None and data.recipe.exists() and data.plan_record.exists():
        recipe = parse_recipe(read_recipe(data.recipe), settings, what=str(data.recipe))
    else:
        recipe = load_recipe(name or DEFAULT, settings)
    return recipe if select is None else replace(recipe, select=replace(recipe.select, name=select))


def refuse_changes(data: Data, recipe: Recipe, restart_from: str | None = None) -> None:
    """UserError where the recipe would alter shards that are finished, naming keys and both values.

    Stages from `restart_from` on may differ: they are about to be made again.
    """
    stored = stored_recipe(data)
    if stored is None:
        return
    kept = STAGES[: STAGES.index(restart_from)] if restart_from else STAGES
    ours, theirs = recipe.identity(), stored.identity()
    changed = [
        f"  {stage}.{key}: {theirs[stage][key]!r} there, {ours[stage][key]!r} asked for"
        for stage in kept
        for key in ours[stage]
        if ours[stage][key] != theirs[stage][key] and _holds(data, stage)
    ]
    if changed:
        first = next(stage for stage in kept if any(line.startswith(f"  {stage}.") for line in changed))
        raise UserError(
            f"{data.root} holds shards made with other settings:\n" + "\n".join(changed) + "\n"
            f"Give another --out, or `--restart-from {first}` to make them again on purpose."
        )


def _holds(data: Data, stage: str) -> bool:
    """Whether the data folder holds anything that a change of this stage would alter."""
    if stage == "source":
        return data.plan_record.exists()
    where = "embedded/stats/*.json" if stage == "embed" else "fetched/*_stats.json"
    return next(data.root.glob(where), None) is not None
