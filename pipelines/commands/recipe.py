"""`tastemaker recipe`: the recipes that come along, or one of them with every key."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.options import Options, Result, argument, option


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(Options):
    name: str | None = argument("RECIPE", "a shipped recipe or a YAML file", default=None, nargs="?")
    set: tuple[str, ...] = option("lay a value over the recipe (repeatable)", default=(), metavar="A.B=C")


def run(options: RecipeOptions) -> Result:
    """Print a recipe, or a line for each."""
    from pipelines.recipe import load_recipe, recipe_text, shipped, to_dict, to_yaml

    if options.name is None:
        first_lines = {name: recipe_text(name).splitlines()[0].lstrip("# ") for name in shipped()}
        for name, line in first_lines.items():
            print(f"{name:20} {line}")
        return Result(facts={"recipes": first_lines})
    recipe = load_recipe(options.name, options.set)
    print(to_yaml(recipe), end="")
    return Result(facts=to_dict(recipe))
