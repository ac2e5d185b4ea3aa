"""`tastemaker score`: columns from heads, of the vectors that are there."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipelines.options import Result, WithRecipe, argument, option


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(WithRecipe):
    data: str = argument("DATA")
    head: tuple[str, ...] = option(
        "a new column from a head, by name or folder (repeatable)", default=(), metavar="COLUMN=HEAD"
    )


def run(options: ScoreOptions) -> Result:
    """Apply heads, or those of the recipe; no image is opened."""
    from aesthetic.errors import UserError
    from curate.layout import open_data
    from curate.ledger.sql import plain_name
    from pipelines.commands import curate

    data = open_data(options.data)
    recipe = curate.recipe_of(data, options.recipe, options.set)
    score = dict(recipe.score) if not options.head else {}
    for item in options.head:
        column, equals, head = item.partition("=")
        if not equals:
            raise UserError(f"--head {item}: expected COLUMN=HEAD, for example --head taste=taste.head")
        score[column] = head
    score = replace(recipe, score=score).score  # a recipe knows which names a column may have
    facts = curate.score(data, score, print)
    following = ""
    for name in facts["scored"]:
        setting = f"select.rules.{name}=top({plain_name(name)}, 0.1)"
        following = curate.command("select", data.root, "--name", "mine", "--set", setting)
    return Result(facts=facts, paths={"scored": data.root / "scored"}, next=following)
