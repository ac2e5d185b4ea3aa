"""`tastemaker status`: where a run stands, and what to do next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from aesthetic.untrusted import printable
from pipelines.options import Options, Result, argument, command
from pipelines.terminal import counted

if TYPE_CHECKING:
    from curate.layout import Data
    from curate.sources.plan import Plan


@dataclass(frozen=True, kw_only=True)
class StatusOptions(Options):
    data: str = argument("DATA", "the data folder")


def run(options: StatusOptions) -> Result:
    """Shards per stage, outcomes, selections."""
    from curate.store.ownership import open_data

    facts, following = status(open_data(options.data))
    return Result(facts=facts, next=following)


def status(data: Data, say: Callable[[str], None] = print) -> tuple[dict[str, Any], str]:
    """Where a run stands: shards per stage, outcomes, selections; and the next command."""
    from curate.ledger.schema import Reason, Status
    from curate.ledger.view import notes_of
    from curate.verify import command_again
    from curate.workers import transient_failures
    from pipelines.checks import old_columns, refuse_denied
    from pipelines.recipe import stored_recipe

    plan = data.plan
    records = {s.shard: data.record(data.fetched_record(s.shard)) for s in plan.shards}
    fetched = {shard: r for shard, r in records.items() if r}
    embedded = sum(data.exists(data.embedded_record(shard)) for shard in fetched)
    outcomes = Counter[str]()
    for record in fetched.values():
        outcomes.update(record.get("status_dict", {}))
    early = Counter[str]()
    for record in fetched.values():
        early.update(record.get("rejected_early", {}))
    total, shards = sum(outcomes.values()) - early.total(), len(plan.shards)
    several = f"{len(plan.lists)} lists" if len(plan.lists) > 1 else plan.list
    say(f"rows      {plan.total_rows:,} in {counted(shards, 'shard')} of {several}")
    lists = [_list_facts(plan, i) for i in range(len(plan.lists))]
    for one in lists if len(lists) > 1 else ():
        more = f", added {one['date'][:10]}" if one["date"] else ""
        whole = f" of {one['listed_rows']:,}" if one["listed_rows"] > one["rows"] else ""
        say(f"list      {one['rows']:,}{whole} rows of {one['list']} ({one['digest']}{more})")
    good = f"   {outcomes[Status.SUCCESS] / total:.1%} ok" if total else ""
    say(f"fetched   {len(fetched):,}/{shards:,} shards{good}")
    left = [(reason, n) for reason, n in outcomes.most_common() if reason != Status.REJECTED_EARLY]
    failures = [(reason, n) for reason, n in left if reason != Status.SUCCESS]
    if failures:
        say("          " + " · ".join(f"{reason} {n:,}" for reason, n in failures))
    if early:
        say("early     " + " · ".join(f"{rule} {n:,}" for rule, n in early.most_common()) + " rejected early")
    say(f"embedded  {embedded:,}/{shards:,} shards")
    annotated, notes, recall = dict[str, int](), dict[str, list[str]](), dict[str, Any]()
    for name in data.annotated():
        made = [
            data.record(data.annotations_record(name, s)) for s in data.shards(partial(data.annotations_record, name))
        ]
        annotated[name] = len(made)
        say(f"annotated {len(made):,}/{shards:,} shards   {name}")
        if noted := notes_of(made):
            notes[name] = noted
            for note in noted:
                say(f"          {printable(note, 500)}")
        if measured := [record["recall"] for record in made if "recall" in record]:
            recall[name] = measured[-1]
    if note := old_columns(data):
        say(f"old       {note}")
    selections = selections_there(data)
    for name, facts in selections.items():
        words = [f"{facts['kept']:,} kept", *facts["stale"]]
        if facts["packed"]:
            of_this = "packed before that" if facts["stale"] else "packed"
            words.append(of_this if facts["packed"] == "now" else "packed before it was made anew")
        say(f"selected  {name}: {', '.join(words)}")
    models = models_there(data, selections)
    for folder, one in models.items():
        say(f"model     {folder}: trained on shards/{one['pack']}{one['older'] and ', ' + one['older']}")
    found = {
        "rows": plan.total_rows,
        "lists": lists,
        "shards": shards,
        "fetched": len(fetched),
        "embedded": embedded,
        "annotated": annotated,
        "notes": notes,
        "recall": recall,
        "outcomes": outcomes,
        "rejected_early": early,
        "selected": selections,
        "models": models,
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
        return found, command("embed", data)
    if recipe is not None and any(annotated.get(name, 0) < embedded for name in recipe.columns):
        return found, command("annotate", data)
    waiting = sum(n for reason, n in failures if Reason(reason).transient)
    last = {shard: record["retries"][-1] for shard, record in fetched.items() if record.get("retries")}
    hopeless = sum(transient_failures(data, shard) for shard, retry in last.items() if not retry["recovered"])
    found["may_pass"], found["tried_in_vain"] = waiting, hopeless
    if waiting > hopeless:
        return found, command("retry", data)
    if waiting:
        once_more, failed = command("retry", data), f"{counted(waiting, 'row')} that failed for transient reasons"
        say(f"retry     the last one had back none of {failed}; `{once_more}` tries anew")
    for name, facts in selections.items():
        if facts["stale"]:
            return found, command("select", data, "--name", name)
        if facts["kept"] and facts["packed"] != "now":
            return found, command("pack", data, "--name", name)
    return found, ""


def _list_facts(plan: Plan, index: int) -> dict[str, Any]:
    """What is said of one of a plan's lists; the first has no date."""
    from curate.store.files import digest

    one = plan.lists[index]
    contents = [fact["sha256"] for fact in plan.facts["inputs"] if fact.get("list", 0) == index]
    whole = contents[0][:16] if len(contents) == 1 else digest(contents)
    kept = {name: one[name] for name in ("list", "rows", "listed_rows")}
    return {
        **kept,
        "digest": whole,
        "date": one.get("date"),
        "limit": one["source"]["--limit"],
        **one.get("counts", {}),
    }


def selections_there(data: Data) -> dict[str, dict[str, Any]]:
    """Each selection: rows kept, why it is `stale` (nothing: it is not), and whether it is `packed`: "now", an "older"
    state of it, or None."""
    from curate.ledger.select import changed_since, remembered
    from curate.ledger.view import hidden_columns, table_digests, tables
    from pipelines.recipe import stored_recipe

    recipe, found = stored_recipe(data), dict[str, dict[str, Any]]()
    names = data.selections()
    try:
        found_tables = tables(data) if names else []
    except UserError:  # nothing is fetched any more: the folder is being made again
        found_tables = []
    now, hidden = table_digests(found_tables), hidden_columns(found_tables).values()
    for name in names:
        record = data.record(data.selection_record(name))
        if not isinstance(record, dict) or "kept" not in record:
            continue
        changed = changed_since(data, name, now, hidden)
        stale = [f"stale: {', '.join(changed)} changed since"] if changed else []
        try:
            before = remembered(data, name)
        except UserError:
            before = None
        if recipe is not None and name == recipe.select.name and before != (recipe.select.rules, None):
            stale.append("by other rules than recipe.yaml's")
        manifest = data.record(data.manifest(name))
        made = record.get("outputs", {}).get(f"selected/{name}.parquet", {}).get("sha256")
        packed = None
        if manifest:
            packed = "now" if manifest.get("inputs", {}).get("selected") == made else "older"
        found[name] = {"kept": record["kept"], "stale": stale, "packed": packed}
    return found


def models_there(data: Data, selections: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """The models below the data folder that were trained on its packed shards: on which (`pack`), and why these are
    `older` than the data (nothing: they are not)."""
    from curate.ledger.whereabouts import trained_on

    found = dict[str, dict[str, str]]()
    for folder, _, name, same in trained_on(data, data.packs()):
        facts = selections.get(name, {})
        older = "which is older than the data" if facts.get("stale") or facts.get("packed") == "older" else ""
        found[str(folder)] = {"pack": name, "older": older if same else "before it was packed anew"}
    return found
