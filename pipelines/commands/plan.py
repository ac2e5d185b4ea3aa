"""`tastemaker plan`: what a list of some size takes on some machines, from rates that were measured or published."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from pipelines.options import Result, WithRecipe, argument, command, from_here, option

if TYPE_CHECKING:
    from curate.estimate.fleet import FleetPlan, ListPlan
    from curate.estimate.rates import Rates

SAMPLED = 20_000
"""Rows of a list whose sites are counted."""


def rows_number(text: str) -> float:
    """A number of rows: 250000, 2_500_000 or 1e9."""
    return float(text.replace("_", "").replace(",", ""))


@dataclass(frozen=True, kw_only=True)
class PlanOptions(WithRecipe):
    target: str | None = argument("DATA|LIST", "a data folder with a trial, or a list", default=None, nargs="?")
    rows: float | None = option("for a list of so many rows, such as 1e9", metavar="N", type=rows_number)
    nodes: tuple[str, ...] = option(
        "machines, such as 4x16cpu,2xh100; repeated, they are compared (default: one of each kind)",
        default=(),
        metavar="MACHINES",
    )
    rates: tuple[str, ...] = option(
        "rates or prices of your own: a DATA/logs/rates.json, or JSON as docs/estimate.md has it (repeatable)",
        default=(),
        metavar="FILE",
    )


def run(options: PlanOptions) -> Result:
    """Hours, money, disk and requests. Reads a list or a trial; fetches and writes nothing."""
    from curate.estimate.fleet import NoRate, default_fleets, parse_fleet, plan_fleet, plan_list

    if options.rows is not None and not options.rows > 0:
        raise UserError(f"--rows {options.rows:g}: it must be more than 0")
    rates = _rates(options)
    rows = options.rows or rates.listed
    if not rows:
        raise UserError("how many rows? Name a list or a data folder, or give --rows, such as --rows 1e9")
    fleets = [parse_fleet(text, rates.nodes) for text in options.nodes or default_fleets(rates.nodes)]
    listed, plans = plan_list(rates, rows), []
    for fleet in fleets:
        try:
            plans.append(plan_fleet(rates, rows, fleet))
        except NoRate:
            if options.nodes:
                raise
    if not plans:
        raise UserError(f"there is no rate of {rates.encoder} on any machine; a trial measures it")
    facts: dict[str, Any] = {"list": asdict(listed), "plans": [asdict(p) for p in plans], "rates": rates.to_json()}
    trial = ("curate", options.target, "--out", "trial", "--limit", 1000)
    following = command(*trial) if options.target and not rates.taken else ""
    return Result(text=plan_text(rates, listed, plans), facts=facts, next=following)


def _rates(options: PlanOptions) -> Rates:
    """The published figures, over them those of a trial or the sites of a list, over them the files that were given."""
    from dataclasses import replace

    from curate.estimate.rates import lay_over, published, published_late, read_rates_file
    from curate.layout import Data
    from curate.store.clients import is_url
    from pipelines.estimates import read_kept_rates

    base, trees, listed = published(), list[tuple[str, dict[str, Any]]](), None
    if options.target is not None:
        data = Data.at(options.target) if is_url(options.target) or "://" not in options.target else None
        if data is not None and data.exists(data.plan_record):
            tree = read_kept_rates(data)
            if tree is None:
                again = command("curate", "LIST", "--out", "DATA", "--limit", 1000)
                raise UserError(f"{data} holds no rates; a trial keeps them: `{again}`")
            trees.append((str(data.rates), tree))
        else:
            listed = _sites(options)
            trees.append((options.target, listed))
    trees += [(file, read_rates_file(Path(file).expanduser())) for file in options.rates]
    if any(tree.get("taken") for _, tree in trees):  # measured as a whole: what others published of stages goes
        base = {key: value for key, value in base.items() if key != "shares"} | published_late()
    rates = lay_over([("published.json", base), *trees])
    if listed is not None:  # a file of rates is of another list
        rates = replace(rates, listed=listed["listed"], of=listed["of"])
    if not rates.encoder:
        from pipelines.recipe import DEFAULT, load_recipe

        rates = replace(rates, encoder=load_recipe(options.recipe or DEFAULT, options.set).embed.encoder)
    return rates


def _sites(options: PlanOptions) -> dict[str, Any]:
    """How many rows a list has, and the sites of a sample of them."""
    from curate.estimate.rates import domains_of
    from curate.layout import Data
    from curate.sources.planner import make_plan
    from pipelines.recipe import DEFAULT, load_recipe

    source = load_recipe(options.recipe or DEFAULT, options.set).source
    with tempfile.TemporaryDirectory() as scratch:
        plan = make_plan(str(options.target), Data(Path(scratch)), source, SAMPLED)
        found: dict[str, Any] = {"listed": plan.listed_rows, "of": plan.list}
        if plan.facts.get("base") is None:
            urls = [row.url or "" for s in plan.shards for row in plan.read(s.shard).rows()]
            domains = domains_of(urls, plan.listed_rows)
            found |= {"domains": asdict(domains)} if domains is not None else {}
        return found


# ------------------------------------------------------------------------------------------------------------- words


def plan_text(rates: Rates, listed: ListPlan, plans: list[FleetPlan]) -> str:
    """The plan in tables for people."""
    from pipelines.estimates import hours, interval, size

    where = f"measured on {rates.machine} on {rates.made}, {rates.taken:,} rows" if rates.taken else "others', no trial"
    of = f" of {from_here(rates.of)}" if rates.of else ""
    lines = [f"{listed.rows:,.0f} rows{of}    rates: {where}", ""]
    lines.append(f"{'stage':16}{'looks at':>16}  {'each takes':<22}{'in all':<22}rate")
    for stage in plans[0].stages:
        figure, unit = (stage.gpu, "GPU") if stage.gpu else (stage.cpu, "core")
        assert figure is not None
        each = f"{figure.value / stage.count * 1000:.3g} ms of a {unit}" if stage.count else ""
        in_all = f"{hours(figure.value)} {unit}-hours"
        lines.append(f"{stage.name:16}{stage.count:>16,.0f}  {each:<22}{in_all:<22}{figure.origin}")
    store, put = rates.store, f"{listed.puts:,.0f} puts, {listed.gets:,.0f} gets"
    lines += ["", f"images    {interval(listed.images)}    kept  {interval(listed.kept)}"]
    lines.append(f"disk      {interval(listed.disk, size)}")
    lines.append(f"requests  {interval(listed.requests)} to the web, {interval(listed.received, size)} received")
    if store is not None:
        prices = f"${listed.store_requests:,.0f} and ${listed.store_month:,.0f} a month"
        lines.append(f"store     {put}: {prices} ({store.name}, {store.put.origin})")
    lines += ["", f"{'machines':28}{'hours':>8}{'dollars':>12}  {'held by':<28}{'Gbit/s':>8}"]
    for plan in plans:
        money = f"{plan.dollars:,.0f}"
        lines.append(
            f"{plan.fleet.name:28}{hours(plan.hours * 3600):>8}{money:>12}  {plan.bottleneck[:27]:<28}{plan.gbit:>8.2g}"
        )
    lines += sorted({f"note: {note}" for plan in plans for note in plan.notes})
    if rates.busy is not None:
        lines.append(f"cores and GPUs count as at work {rates.busy.value:.0%} of the time ({rates.busy.origin})")
    lines.append("prices change: --json has each with its source and date, --rates lays your own over them")
    return "\n".join(lines)
