"""`tastemaker annotate`: what is missing of columns, old and new, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace

from aesthetic.errors import UserError
from pipelines.options import Options, Result, argument, command, option
from pipelines.terminal import counted


@dataclass(frozen=True, kw_only=True)
class AnnotateOptions(Options):
    data: str = argument("DATA", "the data folder")
    columns: tuple[str, ...] = argument(
        "NAME=SPEC",
        "a column NAME by a head's name or folder, an annotator's name, or {use: ANNOTATOR, option: value} (default: "
        "those of DATA's recipe)",
        nargs="*",
        default=(),
    )
    retry: bool = option("ask again about images of which a server gave no answer", default=False)
    ray_address: str | None = option("run on this Ray cluster what reads pixels or the whole table", metavar="ADDRESS")


def run(options: AnnotateOptions) -> Result:
    """Compute the columns that are given, or else those of the data folder's recipe, where shards lack them.

    New ones are added to recipe.yaml, so that `embed` and `retry` keep them. Annotators that read pixels run on Ray.
    UserError, before anything is computed, where one can't be used, or there is nothing yet that it reads.
    """
    from aesthetic.space import Space
    from curate.annotators.base import column_specs
    from curate.annotators.order import ENCODER, waited_for
    from curate.annotators.registry import absolute, add_needs, fetch_annotators, make_annotators
    from curate.column_sheet import column_sheet
    from curate.ledger.select import SelectConfig
    from curate.ledger.sql import plain_name
    from curate.store.files import sweep
    from curate.store.ownership import open_data
    from curate.workers import forget_unanswered, space_known
    from pipelines.checks import check_selection
    from pipelines.curation import early_rules
    from pipelines.recipe import Recipe, parse_columns, store_recipe, stored_recipe
    from pipelines.runtime.passes import annotate_passes

    data = open_data(options.data)
    given = parse_columns(options.columns)
    stored = stored_recipe(data)
    recipe = stored or Recipe()
    given = {name: absolute(name, spec) for name, spec in given.items()}
    recipe = replace(recipe, columns={**recipe.columns, **given})  # it knows which names a column may have
    recipe = replace(recipe, columns=add_needs(recipe.columns))
    known = make_annotators(recipe.columns)  # and that no two are alike
    space = Space.load(data.local(data.space)) if space_known(data) else None
    if space is not None:
        recipe = replace(recipe, embed=replace(recipe.embed, encoder=space.encoder))
    check_selection(data, replace(recipe, select=SelectConfig()), data.plan.extra_columns, known)
    early = early_rules(recipe, known)
    names = waited_for(known, [*given] or [*known])
    annotators = make_annotators({name: recipe.columns[name] for name in names}, space)
    for name in names:
        annotators[name].early = known[name].early

    shards = [s.shard for s in data.plan.shards if data.fetched_digests(s.shard) is not None]
    if not shards:
        raise UserError(f"{data} holds no fetched shard. `tastemaker curate LIST --out {data}` makes them.")
    if any(a.reads == "vectors" for a in annotators.values()) and space is None:
        raise UserError(f"{data} holds no vectors yet. `tastemaker embed {data}` makes them.")
    with data.hold():
        sweep(data.root)
        if options.retry:
            forget_unanswered(data, annotators)
        fetch_annotators(annotators, tables=False)
        fresh = annotate_passes(data, recipe, annotators, first=True, early=early[ENCODER], address=options.ray_address)
        if stored is not None and given:
            store_recipe(data, replace(stored, columns=recipe.columns))
        sheets = {name: column_sheet(data, name) for name, count in fresh.items() if count}
        data.push(*(path for path in sheets.values() if path is not None))
    for name, count in fresh.items():
        print(f"{name}: {count:,} of {counted(len(shards), 'shard')} annotated{'' if count else ' (all were)'}")

    # the next command selects by the last of them
    columns, following = {name: spec.facts() for name, spec in column_specs(annotators).items()}, ""
    for name, column in columns.items():
        if column["type"] == "float":
            setting = f"select.rules.{name}=top({plain_name(name)}, 0.1)"
            following = command("select", data, "--name", "mine", "--set", setting)
    paths = {"annotated": data.shown(data.root / "annotated")}
    paths |= {f"{name} by its values": data.shown(path) for name, path in sheets.items() if path is not None}
    facts = {"shards": len(shards), "annotated": fresh, "columns": columns}
    return Result(facts=facts, paths=paths, next=following)
