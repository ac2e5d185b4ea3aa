"""`tastemaker select`: rules over the ledger, in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.options import Result, WithRecipe, argument, option


@dataclass(frozen=True, kw_only=True)
class SelectOptions(WithRecipe):
    data: str = argument("DATA")
    name: str | None = option("the selection's name (default: the recipe's)")
    uids: str | None = option("keep the rows of a DataComp subset file instead of applying rules", metavar="FILE.npy")
    write_uids: str | None = option("also write what is kept as a DataComp subset file", metavar="FILE.npy")


def run(options: SelectOptions) -> Result:
    """A verdict for every row."""
    from curate.store.ownership import open_data
    from pipelines.commands import curate

    data = open_data(options.data)
    recipe = curate.recipe_of(data, options.recipe, options.set, select=options.name)
    keys = [setting.partition("=")[0].strip().split(".") for setting in options.set]
    rules_given = any(key[:2] in (["select"], ["select", "rules"]) for key in keys)
    facts = curate.select_only(
        data,
        recipe,
        print,
        uids=options.uids,
        write_uids=options.write_uids,
        given=rules_given or options.recipe is not None or options.uids is not None,
    )
    name = recipe.select.name
    return Result(
        facts=facts,
        paths={"selected": data.verdicts(name)},
        next=curate.command("pack", data.root, "--name", name) if facts["kept"] else "",
    )
