"""`tastemaker curate`, and parts of it: a list to curated shards.

fetch       its first stages;  embed: the others, on what is fetched
retry       what failed for transient reasons is fetched again, and then embedded; or what early rules left out
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipelines.options import REQUIRED, Result, StageOptions, argument, command_line, option, positive_int


@dataclass(frozen=True, kw_only=True)
class CurateOptions(StageOptions):
    list: str = argument("LIST", "file, folder, glob or URL of a list; a folder of images or shards")
    out: str = option("the data folder", default=REQUIRED, metavar="DATA")
    limit: int | None = option("only N rows, spread over the whole list", metavar="N", type=positive_int)
    add: bool = option("append the rows of LIST that DATA does not know yet, as new shards", default=False)
    dry_run: bool = option("print what would run, or why it would not; fetch nothing", default=False)


def run(options: CurateOptions, *, fetch_only: bool = False) -> Result:
    """The whole job, or with `fetch_only` its first stages."""
    from curate.layout import Data
    from pipelines import curation
    from pipelines.recipe import recipe_of, to_yaml

    data = Data.at(options.out)
    request = curation.Request(
        list=options.list,
        data=data,
        recipe=recipe_of(data, options.recipe, options.set),
        limit=options.limit,
        add=options.add,
        address=options.ray_address,
        stages=("fetch",) if fetch_only else ("fetch", "embed", "select", "pack"),
        restart_from=options.restart_from,
    )
    if not options.dry_run:
        return curation.run(request)

    facts = curation.dry_run(request)
    print(to_yaml(request.recipe))
    if facts["added"] is not None:
        print(curation.addition_text(facts["added"]))
    rows = f"rows {facts['rows']:,} of {facts['listed_rows']:,} listed"
    parts = [rows, f"shards {facts['shards']:,}", f"stages {', '.join(request.stages)}"]
    print(" · ".join([*parts, *curation.columns_taken(facts["columns"])]))
    for warning in facts["warnings"]:
        print(f"warning: {warning}")
    return Result(facts=facts, next=command_line("fetch" if fetch_only else "curate", options, "dry_run"))


@dataclass(frozen=True, kw_only=True)
class FetchOptions(CurateOptions):
    pass


def run_fetch(options: FetchOptions) -> Result:
    """The first stages of the main job."""
    return run(options, fetch_only=True)


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(StageOptions):
    data: str = argument("DATA", "the data folder")


def run_embed(options: EmbedOptions, *, retry: bool = False, early: bool = False) -> Result:
    """The main job on what a data folder already plans; with `retry`, what failed is fetched again first; with `early`,
    what early rules left out: none is early any more, unless the options say which."""
    from curate.store.ownership import open_data
    from pipelines import curation
    from pipelines.recipe import recipe_of

    data = open_data(options.data)
    recipe = recipe_of(data, options.recipe, options.set)
    if early and options.recipe is None and not any(s.partition("=")[0].strip()[:6] == "select" for s in options.set):
        recipe = replace(recipe, select=replace(recipe.select, early=()))
    return curation.resume(
        data,
        recipe,
        retry=retry,
        early=early,
        address=options.ray_address,
        restart_from=options.restart_from,
    )


@dataclass(frozen=True, kw_only=True)
class RetryOptions(EmbedOptions):
    early: bool = option(
        "instead of failures, fetch what early rules left out; `--set select.early=[...]` says which stay early",
        default=False,
    )


def run_retry(options: RetryOptions) -> Result:
    """The main job on what a data folder already plans, with the failed rows, or those left out, once more."""
    return run_embed(options, retry=not options.early, early=options.early)
