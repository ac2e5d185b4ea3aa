"""`tastemaker annotate`: what is missing of columns, old and new, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace

from aesthetic.errors import UserError
from pipelines.options import Options, Result, argument, command, option


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
    ray_address: str | None = option("run on this Ray cluster where pixels are read", metavar="ADDRESS")


def run(options: AnnotateOptions) -> Result:
    """Compute the columns that are given, or else those of the data folder's recipe, where shards lack them.

    New ones are added to recipe.yaml, so that `embed` and `retry` keep them. Annotators that read pixels run on Ray.
    UserError, before anything is computed, where one can't be used, or there is nothing yet that it reads.
    """
    from aesthetic.space import Space
    from curate.annotators.base import column_specs
    from curate.annotators.registry import absolute, add_needs, make_annotators, resolve_needs
    from curate.annotators.stage import column_inputs
    from curate.ledger.sql import plain_name
    from curate.store.files import read_json, sweep
    from curate.store.lock import Lock
    from curate.store.ownership import open_data
    from curate.workers import EmbedWorker, annotated, per_shard, space_known
    from pipelines.recipe import Recipe, parse_columns, store_recipe, stored_recipe
    from pipelines.runtime.cluster import check_reachable
    from pipelines.runtime.jobs import CurateJob, RemainingWork, run_job
    from pipelines.runtime.tables import annotate_tables

    data, address = open_data(options.data), options.ray_address
    given = parse_columns(options.columns)
    stored = stored_recipe(data)
    recipe = stored or Recipe()
    given = {name: absolute(name, spec) for name, spec in given.items()}
    recipe = replace(recipe, columns={**recipe.columns, **given})  # it knows which names a column may have
    recipe = replace(recipe, columns=add_needs(recipe.columns))
    known = make_annotators(recipe.columns)  # and that no two are alike
    space = Space.load(data.space) if space_known(data) else None
    if space is not None:
        recipe = replace(recipe, embed=replace(recipe.embed, encoder=space.encoder))
    names = [*given, *(n for name in given for n in resolve_needs(known, name).values() if n)] or recipe.columns
    wanted = replace(recipe, columns={name: recipe.columns[name] for name in names})
    annotators = make_annotators(wanted.columns, space)

    shards = [s.shard for s in data.plan.shards if data.fetched_digests(s.shard) is not None]
    if not shards:
        raise UserError(f"{data.root} holds no fetched shard. `tastemaker curate LIST --out {data.root}` makes them.")
    if any(a.reads == "vectors" for a in annotators.values()) and space is None:
        raise UserError(f"{data.root} holds no vectors yet. `tastemaker embed {data.root}` makes them.")
    with Lock(data.root):
        sweep(data.root)
        missing = {
            name: [s for s in shards if column_inputs(data, s, a) is not None and not annotated(data, s, name, a)]
            for name, a in per_shard(annotators).items()
        }
        left = sorted(set[int]().union(*missing.values()))
        on_ray = any(annotators[name].reads == "pixels" for name, lacking in missing.items() if lacking)
        worker = None if on_ray else EmbedWorker(data, wanted.embed, wanted.columns, "", vectors=False)
        if worker is None:
            if address is not None:
                check_reachable(address)
            images = sum(read_json(data.fetched_record(shard))["successes"] for shard in left)
            run_job(
                CurateJob(data, wanted, fetch=False, vectors=False), RemainingWork(left, 0, images), address=address
            )
        else:
            for shard in left:
                worker.run(shard)
        fresh = {name: len(lacking) for name, lacking in missing.items()}
        fresh |= annotate_tables(data, annotators, recipe.embed, recipe.images, address=address)
        if stored is not None and given:
            store_recipe(data, replace(stored, columns=recipe.columns))
    for name, count in fresh.items():
        print(f"{name}: {count:,} of {len(shards):,} shards annotated{'' if count else ' (all were)'}")

    # the next command selects by the last of them
    columns, following = {name: spec.facts() for name, spec in column_specs(annotators).items()}, ""
    for name, column in columns.items():
        if column["type"] == "float":
            setting = f"select.rules.{name}=top({plain_name(name)}, 0.1)"
            following = command("select", data.root, "--name", "mine", "--set", setting)
    facts = {"shards": len(shards), "annotated": fresh, "columns": columns}
    return Result(facts=facts, paths={"annotated": data.root / "annotated"}, next=following)
