"""The main job: a list -> plan -> fetch, embed and annotate (Ray) -> select -> pack -> report.

Everything that can be refused is refused before the first URL: the recipe, its rules against the columns that there
will be, heads and weights, changes that would alter finished shards, the disk.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from aesthetic.errors import UserError
from aesthetic.files import atomic
from aesthetic.untrusted import printable
from curate.annotators.base import Annotator, column_specs
from curate.annotators.registry import make_annotators
from curate.fetch import engine_img2dataset
from curate.fetch.deny import Deny
from curate.fetch.ingest import check_verify
from curate.layout import ANNOTATED, EMBEDDED, FETCHED, Data
from curate.ledger.schema import Reason, Status
from curate.sources.plan import load_plan
from curate.sources.planner import inspect, make_plan
from curate.store.disk import check_space
from curate.store.files import read_json, sweep
from curate.store.lock import Lock
from curate.store.ownership import RECIPE_HEADER, Taken, check_free, taken
from curate.store.records import invalidate
from curate.verify import command_again
from pipelines.options import Result
from pipelines.recipe import DEFAULT, Recipe, load_recipe, parse_recipe, read_recipe, to_yaml
from pipelines.runtime.cluster import check_reachable
from pipelines.runtime.jobs import CurateJob, RemainingWork, run_job
from pipelines.runtime.progress import ProgressDisplay, format_duration

if TYPE_CHECKING:
    from curate.ledger.select import Selection

Say = Callable[[str], None]
"""Shows a line to whoever started the run."""

STAGES = ("source", "fetch", "images", "embed")
"""The stages whose files a changed recipe would alter; what comes after them asks nothing."""


# ---------------------------------------------------------------------------------------------- what is asked of DATA


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
    return bool(data.records(EMBEDDED if stage == "embed" else FETCHED))


def restart(data: Data, recipe: Recipe, stage: str, stages: Sequence[str]) -> None:
    """Take back the records of a stage and of those after it. Files stay until they are replaced.

    UserError, and nothing is taken back, where what the stages need is not there.
    """
    if "embed" in stages:
        has_encoder(recipe)
    if stage in ("source", "fetch", "images"):
        for record in data.records(FETCHED):
            invalidate(record)
    for record in (*data.records(EMBEDDED), *data.records(ANNOTATED)):
        invalidate(record)
    data.space.unlink(missing_ok=True)
    if stage == "source":
        data.clear_plan()
        data.clear_shards()  # those of another list must not linger beside the new ones


def check_engine(recipe: Recipe, say: Say) -> None:
    """UserError where the download engine that is asked for cannot be used here."""
    if recipe.fetch.engine == "img2dataset":
        engine_img2dataset.require(recipe.images)
        if recipe.fetch.deny:
            raise UserError(
                "fetch.deny: img2dataset heeds no deny-list, so what is denied would be fetched. "
                "`--set fetch.engine=native`, or `--set fetch.deny=[]`"
            )
        say("warning: img2dataset checks no addresses and reads no robots.txt; keep it off private networks")


def refuse_denied(data: Data, recipe: Recipe, restart_from: str | None = None) -> None:
    """UserError where a deny-list cannot be read, or names images that the data folder holds already.

    Such a list would be obeyed for what is fetched from now on, and its owner would think for all.
    """
    deny = Deny.load(recipe.fetch.deny)
    if not deny or not data.root.is_dir():
        return
    from curate.ledger.denied import denied_images

    found = denied_images(data, deny, fetched=restart_from in (None, "embed"))
    if not found:
        return
    there = []
    if found.images:
        keys = ", ".join(found.keys) + (", ..." if found.images > len(found.keys) else "")
        there.append(f"{found.images:,} images of fetched/ (key {keys}; {_in_shards(found.shards)})")
    there += [f"{count:,} images of shards/{name}" for name, count in found.packs.items()]
    if found.unknown:
        there.append(
            f"perhaps images of fetched/ ({_in_shards(found.unknown)}): its md5, sha1 or sha512 can't be compared with "
            "what was fetched without them, because originals are not kept"
        )
    there += [f"perhaps images of shards/{name}, for the same reason" for name in found.unknown_packs]
    root = shlex.quote(str(data.root))
    steps = [f"  rm -r {root}/shards/{name} {root}/report/{name}" for name in [*found.packs, *found.unknown_packs]]
    if found.images or found.unknown:
        files = [str(Path(f).absolute()) for f in recipe.fetch.deny]
        denied = shlex.quote(f"fetch.deny=[{', '.join(files)}]")
        steps.append(f"  {command_again(data)} --set {denied} --restart-from fetch")
    raise UserError(
        f"fetch.deny names what {data.root} holds already: {'; '.join(there)}.\n"
        "A list that is given later takes nothing away, so nothing is done. Give another --out, or be rid of them:\n"
        + "\n".join(steps)
    )


def _in_shards(shards: Sequence[str]) -> str:
    named = ", ".join(shards[:3]) + (f" and {len(shards) - 3:,} more" if len(shards) > 3 else "")
    return f"shard{'s' if len(shards) > 1 else ''} {named}"


def check_selection(data: Data, recipe: Recipe, extra_columns: pa.Schema, annotators: Mapping[str, Annotator]) -> None:
    """UserError where a rule names a column that there will not be, or a threshold outside a column's scale."""
    from curate.ledger.rules import check_rules
    from curate.ledger.view import known_columns, ledger_types, source_types, sql_types

    specs = column_specs(annotators)
    made = dict(zip(specs, sql_types([c.type for c in specs.values()]), strict=True))
    known_types, known_scales = known_columns(data)
    types = {**ledger_types(), **known_types, **made}
    scales = known_scales | {name: c.scale for name, c in specs.items() if c.scale is not None}
    check_rules(recipe.select.rules, types, source_types(extra_columns), scales)


# ------------------------------------------------------------------------------------------------------------ the run


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks of the main job."""

    list: str
    root: Path
    recipe: Recipe
    limit: int | None = None
    address: str | None = None
    stages: tuple[str, ...] = ("fetch", "embed", "select", "pack")
    restart_from: str | None = None


def dry_run(request: Request, say: Say = print) -> dict[str, Any]:
    """What would run. Raises what `run` would raise before its first URL; fetches and writes nothing."""
    recipe, data = request.recipe, Data(request.root)
    check_free(data.root, "data")
    annotators = make_annotators(recipe.columns, recipe.embed.encoder)
    check_engine(recipe, say)
    refuse_denied(data, recipe, request.restart_from)
    refuse_changes(data, recipe, request.restart_from)
    if "embed" in request.stages and load_plan(data.root) is None:
        has_encoder(recipe)  # as in `run`
    anew = request.restart_from == "source"
    found = inspect(request.list, recipe.source, request.limit, None if anew else data.root)
    check_selection(data, recipe, found.extra_columns, annotators)
    check_verify(recipe.fetch, found.extra_columns)
    rows, work = found.total_rows, True
    if load_plan(data.root) is not None and request.restart_from is None:
        left = left_to_do(data, recipe, annotators, request.stages)
        rows = left.rows + found.total_rows - data.plan.total_rows
        work = bool(left.shards or rows)
    if work:
        if "embed" in request.stages and not has_encoder(recipe):
            say(f"the weights of {recipe.embed.encoder} are not on this machine; the run fetches them first")
        if request.address is not None:
            check_reachable(request.address)
        check_space(_there(data.root), estimate_bytes(recipe, rows))
    return {
        "rows": found.total_rows,
        "listed_rows": found.listed_rows,
        "shards": found.shard_count,
        "columns": found.columns,
        "carried": found.extra_columns.names,
        "warnings": found.warnings,
        "stages": list(request.stages),
        "rows_to_fetch": rows,
    }


def _there(path: Path) -> Path:
    """The path, or the first folder above it that is there."""
    return path if path.exists() else _there(path.parent)


def run(request: Request, say: Say = print) -> Result:
    """The whole job under the data folder's lock; what is done already is left alone.

    Raises UserError before anything starts, DiskFull, NothingKept, or the cause of what went wrong in a worker.
    """
    recipe, data = _found_from_anywhere(request.recipe), Data(request.root)
    check_free(data.root, "data")
    annotators = make_annotators(recipe.columns, recipe.embed.encoder)
    check_engine(recipe, say)
    refuse_denied(data, recipe, request.restart_from)
    if "embed" in request.stages and not data.plan_record.exists():
        has_encoder(recipe)  # before a long list is read; where a plan is there, all may be embedded
    with taken(data.root, "data", replaces=["recipe.yaml"]) as folder, _nothing_left_behind(data, folder):
        sweep(data.root)
        refuse_changes(data, recipe, request.restart_from)
        anew = request.restart_from == "source"  # the new list is read before the shards of the old one go
        if anew or load_plan(data.root) is not None:  # nor does a plan grow before all is checked
            extra_columns = inspect(
                request.list, recipe.source, request.limit, None if anew else data.root
            ).extra_columns
        else:
            extra_columns = make_plan(request.list, data.root, recipe.source, request.limit).extra_columns
        check_selection(data, recipe, extra_columns, annotators)
        check_verify(recipe.fetch, extra_columns)
        if request.restart_from is not None:
            restart(data, recipe, request.restart_from, request.stages)
        make_plan(request.list, data.root, recipe.source, request.limit)
        store_recipe(data, recipe)
        return _go_on(data, recipe, annotators, request.stages, request.address, say)


def _found_from_anywhere(recipe: Recipe) -> Recipe:
    """The recipe with whole paths of deny-lists and weights: later commands may be given in another folder."""
    deny = tuple(str(Path(f).expanduser().absolute()) for f in recipe.fetch.deny)
    weights = recipe.embed.weights and str(Path(recipe.embed.weights).expanduser().absolute())
    fetch, embed = replace(recipe.fetch, deny=deny), replace(recipe.embed, weights=weights)
    return replace(recipe, fetch=fetch, embed=embed)


@contextmanager
def _nothing_left_behind(data: Data, folder: Taken) -> Iterator[None]:
    """Where input or recipe is refused before a job began, a data folder is as it was, and a new one is not there."""
    planned = data.plan_record.exists()
    try:
        yield
    except UserError:
        if not planned and not data.logs.exists():
            data.clear_plan()
            folder.undo(["recipe.yaml"])
        raise


def resume(
    data: Data,
    recipe: Recipe,
    *,
    retry: bool = False,
    address: str | None = None,
    restart_from: str | None = None,
    say: Say = print,
) -> Result:
    """The main job on the plan that a data folder has; `retry` fetches again what failed for transient reasons."""
    if restart_from not in (None, "embed"):
        again = command("curate", data.plan.list, "--out", data.root, "--restart-from", restart_from)
        raise UserError(f"--restart-from {restart_from} needs the list: `{again}`")
    annotators = make_annotators(recipe.columns, recipe.embed.encoder)
    if retry:
        check_engine(recipe, say)
    refuse_denied(data, recipe)
    with Lock(data.root):
        sweep(data.root)
        refuse_changes(data, recipe, restart_from)
        check_selection(data, recipe, data.plan.extra_columns, annotators)
        stages = ("fetch", "embed", "select", "pack") if retry else ("embed", "select", "pack")
        if restart_from is not None:
            restart(data, recipe, restart_from, stages)
        store_recipe(data, recipe)
        return _go_on(data, recipe, annotators, stages, address, say, retry=retry)


def _go_on(
    data: Data,
    recipe: Recipe,
    annotators: dict[str, Annotator],
    stages: tuple[str, ...],
    address: str | None,
    say: Say,
    retry: bool = False,
) -> Result:
    plan = data.plan
    say(" · ".join([headline(recipe), *columns_taken(plan.columns)]))
    for warning in plan.warnings:
        say(f"warning: {warning}")
    if recipe.fetch.allow:
        say(f"warning: private addresses are open to this list: {', '.join(recipe.fetch.allow)} (fetch.allow)")
    facts = {"columns": plan.columns, "warnings": plan.warnings}
    outcome = Result(facts={"rows": plan.total_rows, "shards": len(plan.shards), **facts})
    before = _images(data) if retry else 0
    screen = _run_stages(data, recipe, annotators, stages, address, say, retry)
    if retry and screen is not None:
        outcome.facts["recovered"] = _images(data) - before
        say(f"retry  {outcome.facts['recovered']:,} more images")
    _name_notes(data, outcome, say)
    _name_repeats(data, outcome, say)
    if "select" not in stages:
        outcome.paths["fetched"] = str(data.root / "fetched")
        outcome.next = command("embed", data.root)
        return outcome
    selection = _select(data, recipe, say)
    outcome.facts |= {"kept": selection.kept, "funnel": selection.funnel}
    _pack(data, recipe, outcome)
    if plan.listed_rows > plan.total_rows:
        say(projection(data, plan.listed_rows, plan.total_rows, selection.kept, screen))
    return outcome


def _name_notes(data: Data, outcome: Result, say: Say) -> None:
    """Say which values of the list could not be taken as they are; a list that is used where it lies is read late."""
    records = {s.shard: read_json(data.fetched_record(s.shard)) or {} for s in data.plan.shards}
    notes = [f"shard {shard}: {note}" for shard, record in records.items() for note in record.get("notes", [])]
    if notes:
        outcome.facts["notes"] = notes[:100]
        for note in notes[:3]:
            say(f"warning: {note}")
        if len(notes) > 3:
            say(f"    and in {len(notes) - 3:,} more shards")


def _name_repeats(data: Data, outcome: Result, say: Say) -> None:
    """Say which bytes came from many URLs: most are placeholders."""
    from curate.duplicates.repeats import repeats

    found = repeats(data)
    if found:
        outcome.facts["repeated"] = [{"sha256": r.sha256, "urls": r.urls, "url": r.url} for r in found[:100]]
        say(f"the same bytes from many URLs, {len(found):,} times ({sum(r.urls for r in found):,} rows): placeholders?")
        for repeat in found[:3]:
            say(f"    {repeat}")
        say("    the rule first_of(sha256) keeps one of each; their sha256 in a list of fetch.deny keeps none")


def _run_stages(
    data: Data,
    recipe: Recipe,
    annotators: dict[str, Annotator],
    stages: tuple[str, ...],
    address: str | None,
    say: Say,
    retry: bool,
) -> ProgressDisplay | None:
    """Fetch, embed and annotate what is missing, with Ray; returns what was seen of it (None where all was done)."""
    fetch, embed = "fetch" in stages, "embed" in stages
    left = left_to_do(data, recipe, annotators, stages, retry)
    if not left.shards:
        return None
    if address is not None:
        check_reachable(address)
    check_space(data.root, estimate_bytes(recipe, left.rows))
    if embed:
        _fetch_encoder(recipe, say)
    if len(left.shards) < len(data.plan.shards):
        say(f"{len(data.plan.shards) - len(left.shards):,} of {len(data.plan.shards):,} shards are done already")
    return run_job(CurateJob(data, recipe, fetch=fetch, embed=embed, retry=retry), left, address=address)


def _images(data: Data) -> int:
    """How many images are fetched."""
    return sum((read_json(data.fetched_record(s.shard)) or {}).get("successes", 0) for s in data.plan.shards)


def left_to_do(
    data: Data, recipe: Recipe, annotators: Mapping[str, Annotator], stages: Sequence[str], retry: bool = False
) -> RemainingWork:
    """The shards that are not fetched, embedded and annotated, as far as these stages do that."""
    from curate.workers import embed_done, fetch_done, transient_failures

    fetch, embed = "fetch" in stages, "embed" in stages
    fetch_hash, embed_hash = recipe.hashes()
    shards, rows, images = [], 0, 0
    for s in data.plan.shards:
        fetched = fetch_done(data, s.shard, fetch_hash)
        waiting = transient_failures(data, s.shard) if fetched and retry else 0 if fetched else s.rows
        unembedded = fetched and embed and not embed_done(data, s.shard, embed_hash, annotators)
        if (waiting and fetch) or unembedded:
            shards.append(s.shard)
            rows += waiting
            images += _images_left(data, s.shard, embed_hash) if unembedded else 0
    return RemainingWork(shards, rows, images)


def _images_left(data: Data, shard: int, config: str) -> int:
    """How many images of a fetched shard are to be embedded: after a retry, those that it recovered."""
    from curate.encoders.embed import recovered

    some = recovered(data, shard, data.embedded_record(shard), config)
    return read_json(data.fetched_record(shard))["successes"] if some is None else len(some)


def has_encoder(recipe: Recipe) -> bool:
    """Whether the vectors can be made at once; UserError where neither the encoder's weights nor a folder of them can
    be had."""
    from curate.encoders.registry import check_available
    from curate.sources.vectors import open_folder

    if recipe.embed.embeddings is not None and open_folder(recipe.embed).space is not None:
        return True
    return check_available(recipe.embed.encoder, recipe.embed.weights)


def _fetch_encoder(recipe: Recipe, say: Say) -> None:
    """Have the encoder's weights here, before workers ask for them all at once."""
    from curate.encoders.registry import fetch_weights

    if not has_encoder(recipe):
        say(f"fetching the weights of {recipe.embed.encoder} ...")
        fetch_weights(recipe.embed.encoder, recipe.embed.weights)


def _select(data: Data, recipe: Recipe, say: Say) -> Selection:
    from curate.ledger.select import remembered, select

    name = recipe.select.name
    try:
        before = remembered(data, name)
    except UserError:  # of a subset file that is gone
        before = ({}, Path())
    if before is not None and before != (recipe.select.rules, None):
        say(f"the selection {name} was made by other rules; it is made anew by the recipe's")
    selection = select(data, recipe.select)
    show_selection(selection, say)
    return selection


def show_selection(selection: Selection, say: Say) -> None:
    """The funnel, and what is odd about it."""
    from curate.ledger.select import funnel_text

    say(funnel_text(selection))
    for warning in selection.warnings:
        say(f"warning: {warning}")


def _stricter(data: Data, selection: Selection) -> str:
    """A command that selects less than a run did, or trains on it where nothing shows how."""
    from curate.ledger.rules import read_rules
    from curate.ledger.sql import plain_name

    conditions = {r.name: r.condition for r in selection.rules}
    for rule, said in reversed(read_rules(conditions, selection.quantiles).items()):
        if said and said.top and not data.selection_record("stricter").exists() and re.fullmatch(r"\w+", rule):
            setting = f"select.rules.{rule}=top({plain_name(said.top.column)}, {said.top.fraction / 2:g})"
            return command("select", data.root, "--name", "stricter", "--set", setting)
    return command("train", data.packed(selection.name), "--out", "model")


def _pack(data: Data, recipe: Recipe, outcome: Result) -> None:
    from curate.ledger.select import load_selection
    from curate.report import contact_sheet, score_charts
    from curate.shards.pack import pack

    name = recipe.select.name
    pack(data, name, recipe.pack)
    folder, sheet = data.packed(name), data.sheet(name)
    if not sheet.exists() or sheet.stat().st_mtime < data.manifest(name).stat().st_mtime:
        score_charts(data, name)
        contact_sheet(data, name)
    outcome.paths |= {"shards": f"{folder}/", "look": str(sheet)}
    outcome.next = _stricter(data, load_selection(data, name))


# ------------------------------------------------------------------------------------------- one stage alone, no Ray


def recipe_of(data: Data, name: str | None, settings: Sequence[str], select: str | None = None) -> Recipe:
    """The recipe that a data folder was made with, or another one, with settings laid over it.

    A recipe.yaml where no plan is belongs to somebody else.
    """
    if name is None and data.recipe.exists() and data.plan_record.exists():
        recipe = parse_recipe(read_recipe(data.recipe), settings, what=str(data.recipe))
    else:
        recipe = load_recipe(name or DEFAULT, settings)
    return recipe if select is None else replace(recipe, select=replace(recipe.select, name=select))


def select_only(
    data: Data, recipe: Recipe, say: Say, *, uids: str | None, write_uids: str | None, given: bool = True
) -> dict[str, Any]:
    """Rules over the ledger, in seconds, with every column that it holds now.

    Where no rules are `given`, a selection that was made before is made again by what it was made by then.
    """
    from curate.ledger import uids as subsets
    from curate.ledger.select import remembered, select

    if not given and (before := remembered(data, recipe.select.name)) is not None:
        rules, file = before
        if file is not None:
            uids = str(file)
            say(f"made again from {file}, as before")
        elif rules != recipe.select.rules:
            say(f"by the rules that {recipe.select.name} was made by (the recipe's: --recipe {_quoted(data.recipe)})")
        recipe = replace(recipe, select=replace(recipe.select, rules=rules))
    name = recipe.select.name
    refuse_denied(data, recipe)
    with Lock(data.root):
        selection = select(data, recipe.select) if uids is None else subsets.select_uids(data, name, Path(uids))
        show_selection(selection, say)
        if write_uids is not None:
            subsets.write_uids(data, name, Path(write_uids))
    return {"kept": selection.kept, "funnel": selection.funnel}


def pack_only(data: Data, recipe: Recipe) -> Result:
    """The chosen images of a selection as shards, with their sheet."""
    outcome = Result()
    refuse_denied(data, recipe)
    with Lock(data.root):
        sweep(data.root)
        _pack(data, recipe, outcome)
    return outcome


def status(data: Data, say: Say) -> tuple[dict[str, Any], str]:
    """Where a run stands: shards per stage, outcomes, selections; and the next command."""
    plan = data.plan
    records = {s.shard: read_json(data.fetched_record(s.shard)) for s in plan.shards}
    fetched = {shard: r for shard, r in records.items() if r}
    embedded = sum(data.embedded_record(shard).exists() for shard in fetched)
    outcomes = Counter[str]()
    for record in fetched.values():
        outcomes.update(record.get("status_dict", {}))
    total, shards = sum(outcomes.values()), len(plan.shards)
    say(f"rows      {plan.total_rows:,} in {shards:,} shards of {plan.list}")
    good = f"   {outcomes[Status.SUCCESS] / total:.1%} ok" if total else ""
    say(f"fetched   {len(fetched):,}/{shards:,} shards{good}")
    failures = [(reason, n) for reason, n in outcomes.most_common() if reason != Status.SUCCESS]
    if failures:
        say("          " + " · ".join(f"{reason} {n:,}" for reason, n in failures))
    say(f"embedded  {embedded:,}/{shards:,} shards")
    for name in data.annotated():
        count = len(data.shards(partial(data.annotations_record, name)))
        say(f"annotated {count:,}/{shards:,} shards   {name}")
    selections = selections_there(data)
    for name, facts in selections.items():
        words = [f"{facts['kept']:,} kept", *facts["stale"]]
        if facts["packed"]:
            words.append("packed" if facts["packed"] == "now" else "packed before it was made anew")
        say(f"selected  {name}: {', '.join(words)}")
    found = {
        "rows": plan.total_rows,
        "shards": shards,
        "fetched": len(fetched),
        "embedded": embedded,
        "outcomes": outcomes,
        "selected": selections,
    }
    try:
        recipe = stored_recipe(data)
        if recipe is not None:
            refuse_denied(data, recipe)
    except UserError as e:
        say(f"denied    {e}")
        return found, ""
    if len(fetched) < shards:
        return found, command_again(data)
    if embedded < sum(1 for r in fetched.values() if r.get("successes", 1)):
        return found, command("embed", data.root)
    waiting = sum(n for reason, n in failures if Reason(reason).transient)
    vain = _tried_in_vain(data, fetched)
    found["may_pass"], found["tried_in_vain"] = waiting, vain
    if waiting > vain:
        return found, command("retry", data.root)
    if waiting:
        once_more, failed = command("retry", data.root), f"{waiting:,} rows that failed for transient reasons"
        say(f"retry     the last one had back none of {failed}; `{once_more}` tries anew")
    for name, facts in selections.items():
        if facts["stale"]:
            return found, command("select", data.root, "--name", name)
        if facts["kept"] and facts["packed"] != "now":
            return found, command("pack", data.root, "--name", name)
    return found, ""


def selections_there(data: Data) -> dict[str, dict[str, Any]]:
    """Each selection: rows kept, why it is `stale` (nothing: it is not), and whether it is `packed`: "now", an "older"
    state of it, or None."""
    from curate.ledger.select import changed_since, remembered
    from curate.ledger.view import table_digests, tables

    recipe, found = stored_recipe(data), dict[str, dict[str, Any]]()
    names = data.selections()
    try:
        now = table_digests(tables(data)) if names else {}
    except UserError:  # nothing is fetched any more: the folder is being made again
        now = {}
    for name in names:
        record = read_json(data.selection_record(name))
        if not isinstance(record, dict) or "kept" not in record:
            continue
        changed = changed_since(data, name, now)
        stale = [f"stale: {', '.join(changed)} changed since"] if changed else []
        try:
            before = remembered(data, name)
        except UserError:
            before = None
        if recipe is not None and name == recipe.select.name and before != (recipe.select.rules, None):
            stale.append("by other rules than recipe.yaml's")
        manifest = read_json(data.manifest(name))
        made = record.get("outputs", {}).get(f"selected/{name}.parquet", {}).get("sha256")
        packed = None
        if isinstance(manifest, dict):
            packed = "now" if manifest.get("inputs", {}).get("selected") == made else "older"
        found[name] = {"kept": record["kept"], "stale": stale, "packed": packed}
    return found


def _tried_in_vain(data: Data, fetched: Mapping[int, dict[str, Any]]) -> int:
    """How many rows failed for reasons that may pass in shards whose last retry recovered nothing."""
    from curate.workers import transient_failures

    last = {shard: record["retries"][-1] for shard, record in fetched.items() if record.get("retries")}
    return sum(transient_failures(data, shard) for shard, retry in last.items() if not retry["recovered"])


# ---------------------------------------------------------------------------------------------------- words and sums


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def command(*words: object) -> str:
    """A command to type, quoted as a shell reads it."""
    return shlex.join(["tastemaker", *map(str, words)])


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
    """Which columns of a list are URL and caption, in words; nothing for folders of pictures."""
    return [f"{role} from {printable(name, 80)}" if name else f"no {role}" for role, name in columns.items()]


def estimate_bytes(recipe: Recipe, rows: int) -> int:
    """Roughly what a run will write: images of about 1.1 bits a pixel (quality 95), half of them twice, and vectors."""
    side = recipe.images.size if recipe.images.mode != "no" else 1024
    image = int(side * side * 1.33 * 0.14)
    return rows * (int(image * 1.5) + 2 * 2 * 1664)


def projection(data: Data, listed: int, taken: int, kept: int, screen: ProgressDisplay | None) -> str:
    """What the whole list would take, from the rows that were taken: time, size, and kept rows with a 95% interval."""
    share = kept / taken
    half = 1.96 * (share * (1 - share) / taken) ** 0.5
    size = sum(p.stat().st_size for p in (data.root / "fetched").glob("*.tar")) / taken * listed
    seconds = screen.project(listed, round(_images(data) / taken * listed)) if screen is not None else None
    time = f"about {format_duration(seconds)} here, " if seconds is not None else ""
    return f"whole list: {listed:,} rows, {time}{size / 1e9:,.1f} GB, {share * listed:,.0f} ± {half * listed:,.0f} kept"
