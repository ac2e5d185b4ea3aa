"""The main job: a list -> plan -> fetch, embed and annotate (Ray) -> select -> pack -> report.

Everything that can be refused is refused before the first URL: the recipe, its rules against the columns that there
will be, heads and weights, changes that would alter finished shards, the disk.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from aesthetic.untrusted import printable
from curate.annotators.base import Annotator
from curate.annotators.order import ENCODER, first_pass, set_early
from curate.annotators.registry import absolute, add_needs, fetch_annotators, make_annotators
from curate.encoders.registry import fetch_weights
from curate.fetch.deny import deny_place
from curate.fetch.deny_file import deny_of
from curate.fetch.ingest import check_verify
from curate.layout import Data
from curate.sources.adding import Addition, adding
from curate.sources.plan import Plan, load_plan
from curate.sources.planner import PlanPreview, inspect, make_plan
from curate.store.files import check_space, sweep
from curate.store.ownership import check_free, taken
from pipelines.checks import (
    check_engine,
    check_selection,
    has_encoder,
    refuse_changes,
    refuse_denied,
    refuse_same_early,
)
from pipelines.estimates import RunTimes, keep_rates, project
from pipelines.options import Result, command
from pipelines.recipe import Recipe, store_recipe, stored_recipe
from pipelines.runtime.cluster import check_reachable
from pipelines.runtime.jobs import CurateJob, RemainingWork, run_job
from pipelines.runtime.nodes import node_check
from pipelines.runtime.passes import annotate_passes
from pipelines.runtime.progress import ProgressBar
from pipelines.terminal import counted

if TYPE_CHECKING:
    from curate.ledger.select import Selection


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks of the main job."""

    list: str
    data: Data
    recipe: Recipe
    limit: int | None = None
    add: bool = False  # append what the data folder does not know yet, of another list
    address: str | None = None
    stages: tuple[str, ...] = ("fetch", "embed", "select", "pack")
    restart_from: str | None = None


def dry_run(request: Request) -> dict[str, Any]:
    """What would run. Raises what `run` would raise before its first URL; fetches and writes nothing."""
    recipe, data = request.recipe, request.data
    recipe = replace(recipe, columns=add_needs(recipe.columns))
    check_free(data.store, "data")
    annotators = make_annotators(recipe.columns, recipe.embed.encoder)
    check_engine(recipe)
    refuse_denied(data, recipe, request.restart_from)
    refuse_changes(data, recipe, request.restart_from, add=request.add)
    if "embed" in request.stages and load_plan(data) is None:
        has_encoder(recipe)  # as in `run`
    anew = _is_anew(request)
    plan, added = load_plan(data), None
    if request.add and plan is not None:
        with tempfile.TemporaryDirectory() as copies, _adding(request, plan, copies) as more:
            found, added = _preview(more), addition_facts(more)
    else:
        found = inspect(request.list, recipe.source, request.limit, None if anew else data)
    check_selection(data, recipe, found.extra_columns, annotators)
    check_verify(recipe.fetch, found.extra_columns)
    rows, work = found.total_rows, True
    if load_plan(data) is not None and request.restart_from is None:
        left = remaining_work(data, recipe, annotators, request.stages)
        rows = left.rows + found.total_rows - data.plan.total_rows
        work = bool(left.shards or rows)
    if work:
        if "embed" in request.stages and not has_encoder(recipe):
            print(f"the weights of {recipe.embed.encoder} are not on this machine; the run fetches them first")
        if request.address is not None:
            check_reachable(request.address)
        if data.url is None:
            there = next(folder for folder in (data.root, *data.root.parents) if folder.exists())
            check_space(there, estimate_bytes(recipe, rows))
    return {
        "rows": found.total_rows,
        "listed_rows": found.listed_rows,
        "shards": found.shard_count,
        "columns": found.columns,
        "carried": found.extra_columns.names,
        "added": added,
        "warnings": found.warnings,
        "stages": list(request.stages),
        "rows_to_fetch": rows,
    }


def run(request: Request) -> Result:
    """The whole job under the data folder's lock; what is done already is left alone.

    Raises UserError before anything starts, DiskFull, NothingKept, or the cause of what went wrong in a worker.
    """
    recipe, data = request.recipe, request.data
    # whole paths of its files, as later commands may be given in another folder
    deny = tuple(map(deny_place, recipe.fetch.deny))
    weights = recipe.embed.weights and str(Path(recipe.embed.weights).expanduser().absolute())
    recipe = replace(
        recipe,
        fetch=replace(recipe.fetch, deny=deny),
        embed=replace(recipe.embed, weights=weights),
        columns=add_needs({name: absolute(name, spec) for name, spec in recipe.columns.items()}),
    )
    check_free(data.store, "data")
    annotators = make_annotators(recipe.columns, recipe.embed.encoder)
    check_engine(recipe)
    refuse_denied(data, recipe, request.restart_from)
    planned = data.exists(data.plan_record)
    if "embed" in request.stages and not planned:
        has_encoder(recipe)  # before a long list is read; where a plan is there, all may be embedded
    with taken(data.store, "data", replaces=["recipe.yaml"]) as folder:
        planned = data.exists(data.plan_record)  # again: another run may have been at work until now
        data.require_finished()
        try:
            sweep(data.root)
            refuse_changes(data, recipe, request.restart_from, add=request.add)
            anew = _is_anew(request)  # the new list is read before the shards of the old one go
            plan, added = load_plan(data), None
            if request.add and plan is not None:
                recipe, added = _add(replace(request, recipe=recipe), plan, annotators)
                store_recipe(data, recipe)
                result = _run_job(data, recipe, annotators, request.stages, request.address, added=added)
                data.compact()
                return result
            if anew or load_plan(data) is not None:  # nor does a plan grow before all is checked
                listed = inspect(request.list, recipe.source, request.limit, None if anew else data).extra_columns
            else:
                listed = make_plan(request.list, data, recipe.source, request.limit).extra_columns
            check_selection(data, recipe, listed, annotators)
            check_verify(recipe.fetch, listed)
            if request.restart_from is not None:
                restart(data, recipe, request.restart_from, request.stages)
            make_plan(request.list, data, recipe.source, request.limit)
            store_recipe(data, recipe)
            result = _run_job(data, recipe, annotators, request.stages, request.address)
            data.compact()
            return result
        except UserError:
            # refused before a job began: a data folder is as it was, and a new one is not there
            if not planned and not data.shards(data.fetched_record) and not data.logs.exists():
                data.clear_plan()
                folder.undo(["recipe.yaml"])
            raise


def resume(
    data: Data,
    recipe: Recipe,
    *,
    retry: bool = False,
    early: bool = False,
    address: str | None = None,
    restart_from: str | None = None,
) -> Result:
    """The main job on the plan that a data folder has; `retry` fetches again what failed for transient reasons, `early`
    what early rules left out that are others now."""
    if restart_from not in (None, "embed"):
        again = command("curate", data.plan.list, "--out", data, "--restart-from", restart_from)
        raise UserError(f"--restart-from {restart_from} needs the list: `{again}`")
    recipe = replace(recipe, columns=add_needs(recipe.columns))
    annotators = make_annotators(recipe.columns, recipe.embed.encoder)
    if retry or early:
        check_engine(recipe)
    refuse_denied(data, recipe)
    with data.hold():
        sweep(data.root)
        refuse_changes(data, recipe, restart_from, early=early)
        check_selection(data, recipe, data.plan.extra_columns, annotators)
        if early:
            refuse_same_early(data, recipe)
        stages = ("fetch", "embed", "select", "pack") if retry or early else ("embed", "select", "pack")
        if restart_from is not None:
            restart(data, recipe, restart_from, stages)
        store_recipe(data, recipe)
        return _run_job(data, recipe, annotators, stages, address, retry=retry, regain=early)


def _is_anew(request: Request) -> bool:
    """Whether the list is read anew, whatever the data folder was made of; UserError where that would lose lists."""
    anew = request.restart_from == "source"
    if not anew:
        return False
    if request.add:
        raise UserError("--add keeps what is there, and --restart-from source makes all of it anew: leave one out")
    plan = load_plan(request.data)
    if plan is not None and len(plan.lists) > 1:
        names = ", ".join(one["list"] for one in plan.lists)
        raise UserError(
            f"{request.data} was made of {len(plan.lists)} lists ({names}), and --restart-from source would leave one. "
            "Give another --out, and --add the others to it."
        )
    return True


def _adding(request: Request, plan: Plan, copies: str | Path) -> AbstractContextManager[Addition]:
    """What the list of a request adds to a plan, without what the recipe's and the data folder's deny-lists deny."""
    deny = deny_of(request.data, request.recipe.fetch.deny)
    return adding(request.list, plan, request.recipe.source, request.limit, deny, Path(copies))


def _preview(more: Addition) -> PlanPreview:
    """What a plan would be with an addition."""
    plan = more.plan
    return PlanPreview(
        more.plan_listed_rows,
        more.total_rows,
        more.shard_count,
        plan.columns,
        more.extra_columns,
        list(dict.fromkeys([*plan.warnings, *more.scan.warnings])),
    )


def _add(request: Request, plan: Plan, annotators: dict[str, Annotator]) -> tuple[Recipe, dict[str, Any]]:
    """Check what a list adds to a plan, and write it; the recipe as it is stored, which names the first list's columns,
    and what came."""
    data, recipe = request.data, request.recipe
    with (
        tempfile.TemporaryDirectory(dir=data.plan_folder, prefix=".", suffix=".tmp") as copies,
        _adding(request, plan, copies) as more,
    ):
        check_selection(data, recipe, more.extra_columns, annotators)
        check_verify(recipe.fetch, more.extra_columns)
        if request.restart_from is not None:
            restart(data, recipe, request.restart_from, request.stages)
        more.write()
        data.forget_plan()  # it was read before
        stored = stored_recipe(data)
        return replace(recipe, source=stored.source if stored is not None else recipe.source), addition_facts(more)


def addition_facts(more: Addition) -> dict[str, Any]:
    """What a list adds, for --json: `rows` are added; `new` would be without --limit."""
    counts = {name: more.counts[name] for name in ("new", "known", "changed_caption", "denied", "without_url")}
    return {"list": more.found.name, "rows": more.counts["added"], **counts, "another": more.is_another}


def addition_text(facts: Mapping[str, Any]) -> str:
    """The same in a line."""
    if not facts["rows"] and not facts["another"]:
        return f"add       nothing new: the rows of {facts['list']} are there already ({facts['known']:,})"
    parts = [f"{counted(facts['rows'], 'row')} added"]
    if facts["new"] > facts["rows"]:
        parts[0] += f" of {facts['new']:,} new ones"
    changed = f", {facts['changed_caption']:,} of them with another caption" if facts["changed_caption"] else ""
    parts.append(f"{facts['known']:,} known{changed}")
    if facts["denied"]:
        parts.append(f"{facts['denied']:,} on a deny-list")
    if facts["without_url"]:
        parts.append(f"{facts['without_url']:,} without a URL")
    return f"add       {' · '.join(parts)} ({facts['list']})"


def restart(data: Data, recipe: Recipe, stage: str, stages: Sequence[str]) -> None:
    """Invalidate the records of a stage and of those after it. UserError, and nothing is invalidated, where what the
    stages need is not there."""
    if "embed" in stages:
        has_encoder(recipe)
    data.invalidate_from(stage)
    if stage == "source":
        data.clear_plan()
        data.clear_shards()  # those of another list must not linger beside the new ones


def _run_job(
    data: Data,
    recipe: Recipe,
    annotators: dict[str, Annotator],
    stages: tuple[str, ...],
    address: str | None,
    retry: bool = False,
    regain: bool = False,
    added: Mapping[str, Any] | None = None,
) -> Result:
    """Everything after the checks: the stages on Ray, then the selection and its shards. regain: what early rules left
    out is fetched, and counted."""
    from curate.duplicates.repeats import repeats

    plan = data.plan
    print(" · ".join([headline(recipe), *columns_taken(plan.columns)]))
    for warning in plan.warnings:
        print(f"warning: {warning}")
    if added is not None:
        print(addition_text(added))
    if recipe.fetch.allow:
        print(f"warning: private addresses are open to this list: {', '.join(recipe.fetch.allow)} (fetch.allow)")
    facts = {"columns": plan.columns, "warnings": plan.warnings}
    result = Result(facts={"rows": plan.total_rows, "shards": len(plan.shards), **facts})
    if added is not None:
        result.facts["added"] = dict(added)
    had = _images(data) if retry or regain else 0
    if retry:
        from curate.workers import forget_unanswered

        forget_unanswered(data, annotators)
    early = early_rules(recipe, annotators)
    left = remaining_work(data, recipe, annotators, stages, retry)
    times, display = RunTimes(), None  # where all was done already
    if "embed" in stages:
        fetch_annotators(annotators, tables=bool(left.shards))
    if left.shards:
        if address is not None:
            check_reachable(address)
        if data.url is None:  # else what is done goes there, shard by shard
            check_space(data.root, estimate_bytes(recipe, left.rows))
        if "embed" in stages and not has_encoder(recipe):  # before workers ask for the weights all at once
            print(f"fetching the weights of {recipe.embed.encoder} ...")
            fetch_weights(recipe.embed.encoder, recipe.embed.weights)
        if len(left.shards) < len(plan.shards):
            print(f"{len(plan.shards) - len(left.shards):,} of {len(plan.shards):,} shards are done already")
        columns = {name: recipe.columns[name] for name in first_pass(annotators, early[ENCODER])}
        fetch, embed = "fetch" in stages, "embed" in stages
        job = CurateJob(data, replace(recipe, columns=columns), fetch, embed, retry=retry, early=early)
        display = run_job(job, left, check=node_check(data, recipe), address=address)
        times.add(display)
    if "embed" in stages:
        with times.stage("annotate"):
            annotate_passes(data, recipe, annotators, first=False, early=early[ENCODER], address=address)
    if (retry or regain) and display is not None:
        result.facts["recovered"] = _images(data) - had
        print(f"retry  {result.facts['recovered']:,} more images")

    # values of the list that could not be taken as they are: one that is used where it lies is read late
    notes, count = list[str](), 0
    for shard, said in ((s.shard, data.record(data.fetched_record(s.shard)).get("notes", [])) for s in plan.shards):
        notes += [f"shard {shard}: {note}" for note in said[: 100 - len(notes)]]
        count += len(said)
    if notes:
        result.facts["notes"] = notes
        for note in notes[:3]:
            print(f"warning: {note}")
        if count > 3:
            print(f"    and in {count - 3:,} more shards")
    if found := repeats(data):
        result.facts["repeated"] = [{"sha256": r.sha256, "urls": r.urls, "url": r.url} for r in found[:100]]
        print(
            f"the same bytes from many URLs, {len(found):,} times ({sum(r.urls for r in found):,} rows): placeholders?"
        )
        for repeat in found[:3]:
            print(f"    {repeat}")
        print("    the rule first_of(sha256) keeps one of each; their sha256 in a list of fetch.deny keeps none")

    if "select" in stages:
        _select(data, recipe, result, times)
    else:
        result.paths["fetched"] = data.shown(data.root / "fetched")
        result.next = command("embed", data)
    return result


def _select(data: Data, recipe: Recipe, result: Result, times: RunTimes) -> None:
    """Select and pack; keep what the run took, and of a part of a list, say what the whole would take."""
    from curate.ledger.select import NothingKept, remembered, select

    name, plan = recipe.select.name, data.plan
    try:
        before = remembered(data, name)
    except UserError:  # of a subset file that is gone
        before = ({}, Path())
    if before is not None and before != (recipe.select.rules, None):
        print(f"the selection {name} was made by other rules; it is made anew by the recipe's")
    with times.stage("select"):
        selection = select(data, recipe.select)
    show_selection(selection)
    result.facts |= {"kept": selection.kept, "funnel": selection.funnel}

    def keep() -> None:
        rates = keep_rates(data, recipe, times)
        if rates is not None and plan.listed_rows > plan.total_rows:
            print(project(rates, selection, result.facts, len(plan.lists)))

    try:
        with times.stage("pack"):
            pack_selection(data, recipe, result)
    except NothingKept:
        keep()
        raise
    keep()
    result.look = command("studio", data)


def _images(data: Data) -> int:
    """How many images are fetched."""
    return sum(data.record(data.fetched_record(s.shard)).get("successes", 0) for s in data.plan.shards)


def early_rules(recipe: Recipe, annotators: Mapping[str, Annotator]) -> dict[str, dict[str, str]]:
    """Have each annotator wait for the recipe's early rules; returns which those are, and those of the encoder."""
    select = recipe.select
    rules = {name: condition for name, condition in select.rules.items() if name in select.early}
    return set_early(annotators, rules, imported=recipe.embed.embeddings is not None)


def remaining_work(
    data: Data, recipe: Recipe, annotators: Mapping[str, Annotator], stages: Sequence[str], retry: bool = False
) -> RemainingWork:
    """The shards that are not fetched, embedded and annotated, as far as these stages do that."""
    from curate.workers import embed_done, fetch_done, left_out, transient_failures

    fetch, embed = "fetch" in stages, "embed" in stages
    fetch_hash, embed_hash = recipe.hashes()
    early = early_rules(recipe, annotators)[ENCODER]
    of_fetch = recipe.early_fetch()
    shards, rows, images = [], 0, 0
    for s in data.plan.shards:
        fetched = fetch_done(data, s.shard, fetch_hash)
        waiting = left_out(data, s.shard, of_fetch) if fetched else s.rows
        waiting += transient_failures(data, s.shard) if fetched and retry else 0
        unembedded = fetched and embed and not embed_done(data, s.shard, embed_hash, annotators, early)
        if (waiting and fetch) or unembedded:
            shards.append(s.shard)
            rows += waiting if fetch else 0
            if unembedded:  # after a retry, or a wider condition, those that have no vector yet
                path = data.embedded_record(s.shard)
                record = data.record(path)
                same = record.get("digest", record.get("config")) == embed_hash
                there = record["sample_count"] if same and data.outputs_present(path) else 0
                images += max(0, data.record(data.fetched_record(s.shard))["successes"] - there)
    return RemainingWork(shards, rows, images)


def show_selection(selection: Selection) -> None:
    """The funnel, and what is odd about it."""
    from curate.ledger.select import funnel_text

    print(funnel_text(selection))
    for warning in selection.warnings:
        print(f"warning: {warning}")


def draw_sheets(data: Data, name: str) -> dict[str, Any]:
    """Draw what a selection did, as images; where to look."""
    from curate.report import contact_sheet, score_charts

    score_charts(data, name)
    sheet = contact_sheet(data, name)
    data.push(*(path for path in (sheet, data.charts(name)) if path.exists()))
    return {"look": data.shown(sheet)}


def pack_selection(data: Data, recipe: Recipe, result: Result) -> None:
    """The shards of a selection and a sheet to look at, and into `result` where they are and what comes next."""
    from curate.ledger.rules import read_rules
    from curate.ledger.select import load_selection
    from curate.ledger.sql import plain_name
    from curate.shards.pack import pack

    name = recipe.select.name
    bar, packed = ProgressBar(sys.stderr, "pack", load_selection(data, name).kept), 0

    def progress(now: int) -> None:
        nonlocal packed
        bar(now - packed)
        packed = now

    pack(data, name, recipe.pack, progress)
    bar.clear()
    folder, sheet = data.packed(name), data.sheet(name)
    if not data.exists(sheet):  # `pack` removes that of another selection
        draw_sheets(data, name)
    result.paths |= {"shards": f"{data.shown(folder)}/", "look": data.shown(sheet)}

    # next: a command that selects less than this did, or trains on it where nothing shows how
    result.next = command("train", data.shown(folder), "--out", "model")
    selection = load_selection(data, name)
    conditions = {r.name: r.condition for r in selection.rules}
    for rule, reading in read_rules(conditions, selection.quantiles).items():
        if (
            reading
            and reading.top
            and not data.exists(data.selection_record("stricter"))
            and re.fullmatch(r"\w+", rule)
        ):
            setting = f"select.rules.{rule}=top({plain_name(reading.top.column)}, {reading.top.fraction / 2:g})"
            result.next = command("select", data, "--name", "stricter", "--set", setting)


# ---------------------------------------------------------------------------------------------------- words and sums


def headline(recipe: Recipe) -> str:
    """One line: what this run is made of."""
    parts = [f"recipe {recipe.select.name}", recipe.embed.encoder.removeprefix("open_clip:")]
    if recipe.columns:
        parts.append("columns " + ", ".join(recipe.columns))
    if recipe.images.format != "jpg":
        level = recipe.images.level
        parts.append(f"{recipe.images.format}, {'compression' if recipe.images.format == 'png' else 'quality'} {level}")
    return " · ".join(parts)


def columns_taken(columns: Mapping[str, str | None]) -> list[str]:
    """Which columns of a list are URL and caption, in words; nothing for folders of images."""
    return [f"{role} from {printable(name, 80)}" if name else f"no {role}" for role, name in columns.items()]


def estimate_bytes(recipe: Recipe, rows: int) -> int:
    """Roughly what a run will write: images of about 1.1 bits a pixel (quality 95), half of them twice, and vectors."""
    side = recipe.images.size if recipe.images.mode != "no" else 1024
    image = int(side * side * 1.33 * 0.14)
    return rows * (int(image * 1.5) + 2 * 2 * 1664)
