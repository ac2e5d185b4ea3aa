"""`tastemaker select`: rules over the ledger, in seconds; `pack`: what they chose, as shards to train on."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from aesthetic.errors import UserError
from pipelines.options import Result, WithRecipe, argument, command, local_file, option


@dataclass(frozen=True, kw_only=True)
class SelectOptions(WithRecipe):
    data: str = argument("DATA", "the data folder")
    name: str | None = option("the selection's name (default: the recipe's)")
    uids: Path | None = option(
        "keep the rows of a DataComp subset file instead of applying rules", metavar="FILE.npy", type=local_file
    )
    write_uids: Path | None = option(
        "also write what is kept as a DataComp subset file", metavar="FILE.npy", type=local_file
    )
    sheet: bool = option("also draw its contact sheet, as `pack` does", default=False)


def run(options: SelectOptions) -> Result:
    """A verdict for every row, by every column that the ledger holds now.

    Where no rules are given, a selection that was made before is made again by what it was made by then.
    """
    from curate.ledger import uids as subsets
    from curate.ledger.select import remembered, select
    from curate.store.ownership import open_data
    from pipelines.checks import old_columns, refuse_denied
    from pipelines.curation import draw_sheets, show_selection
    from pipelines.recipe import recipe_of

    data = open_data(options.data)
    recipe = recipe_of(data, options.recipe, options.set, select=options.name)
    name, uids = recipe.select.name, options.uids
    keys = [setting.partition("=")[0].strip().split(".") for setting in options.set]
    rules_given = any(key[:2] in (["select"], ["select", "rules"]) for key in keys)
    given = rules_given or options.recipe is not None or uids is not None
    if not given and (before := remembered(data, name)) is not None:
        rules, file = before
        if file is not None:
            uids = file
            print(f"made again from {file}, as before")
        elif rules != recipe.select.rules:
            theirs = shlex.quote(data.shown(data.recipe))
            print(f"by the rules that {name} was made by (the recipe's: --recipe {theirs})")
        recipe = replace(recipe, select=replace(recipe.select, rules=rules))

    refuse_denied(data, recipe)
    with data.hold():
        if uids is not None:
            selection = subsets.select_uids(data, name, uids)
        else:
            try:
                selection = select(data, recipe.select)
            except UserError as e:
                raise UserError(f"{e}\n{note}" if (note := old_columns(data)) else str(e)) from None
        show_selection(selection)
        if options.write_uids is not None:
            subsets.write_uids(data, name, options.write_uids)
        sheets = draw_sheets(data, name) if options.sheet else {}
    return Result(
        facts={"kept": selection.kept, "funnel": selection.funnel},
        paths={"selected": data.shown(data.verdicts(name)), **sheets},
        next=command("pack", data, "--name", name) if selection.kept else "",
    )


@dataclass(frozen=True, kw_only=True)
class PackOptions(WithRecipe):
    data: str = argument("DATA", "the data folder")
    name: str | None = option("the selection's name (default: the recipe's)")


def run_pack(options: PackOptions) -> Result:
    """Copy what was selected."""
    from curate.store.files import sweep
    from curate.store.ownership import open_data
    from pipelines.checks import refuse_denied
    from pipelines.curation import pack_selection
    from pipelines.recipe import recipe_of

    data = open_data(options.data)
    recipe = recipe_of(data, options.recipe, options.set, select=options.name)
    result = Result()
    refuse_denied(data, recipe)
    with data.hold():
        sweep(data.root)
        pack_selection(data, recipe, result)
    return result
