"""What a run measured, kept in `logs/rates.json`, and what it says of the whole list; numbers in words."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from curate.estimate.rates import Figure, Rates, lay_over, measure, published_late
from curate.estimate.spent import Spent
from curate.estimate.whole import Projection, projection_facts, whole_list
from curate.layout import Data
from curate.store.files import read_json, read_table, write_json
from pipelines.runtime.progress import ProgressDisplay, format_duration

if TYPE_CHECKING:
    from curate.ledger.select import Selection
    from pipelines.recipe import Recipe


@dataclass
class RunTimes:
    """How a run goes by the clock, and what the stages take that have no records of shards."""

    began: float = field(default_factory=time.time)
    wall: dict[str, dict[str, float]] = field(default_factory=dict)
    spent: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage that comes after fetch and embed."""
        counter, began = Spent(), time.monotonic()
        yield
        self.wall[name] = {"seconds": round(time.monotonic() - began, 3)}
        self.spent[name] = counter.take()

    def add(self, display: ProgressDisplay | None) -> None:
        """What was seen of fetch and embed."""
        if display is not None:
            self.wall |= display.timing()


def kept_of_lists(data: Data, name: str) -> Sequence[int]:
    """How many rows of each of the plan's lists a selection keeps."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from curate.ledger.counts import key_numbers
    from curate.ledger.rules import KEPT
    from curate.ledger.schema import make_key

    table, plan = read_table(data.local(data.verdicts(name)), ["key", "verdict"]), data.plan
    keys = key_numbers(table.filter(pc.equal(table["verdict"].cast(pa.string()), KEPT))["key"])
    firsts = np.array([int(make_key(s.shard, 0, plan.shard_size)) for s in plan.shards], np.uint64)
    of_shards = np.array([plan.list_index(s.shard) for s in plan.shards])
    found: list[int] = np.bincount(
        of_shards[np.searchsorted(firsts, keys, "right") - 1], minlength=len(plan.lists)
    ).tolist()
    return found


def keep_rates(data: Data, recipe: Recipe, times: RunTimes) -> Rates | None:
    """Write `logs/rates.json`, from which `tastemaker plan` makes plans; None where no record says what it took.

    What an earlier run measured stays where this one found it done, or had fewer rows of it.
    """
    before = read_kept_rates(data) or {}
    try:
        lay_over([(str(data.rates), before)])
    except UserError:  # somebody has written in it
        before = {}
    wall, name = dict(before.get("wall", {})), recipe.select.name
    for stage, record in (("select", data.selection_record(name)), ("pack", data.manifest(name))):
        outputs = data.record(record).get("outputs", {})
        if outputs and record.exists() and record.stat().st_mtime >= times.began:
            times.spent[stage]["bytes"] = sum(fact["bytes"] for fact in outputs.values())
        else:
            times.spent.pop(stage, None)
            times.wall.pop(stage, None)
    for stage, now in times.wall.items():
        if _size(now) >= _size(wall.get(stage, {})):
            wall[stage] = now
    fetch = recipe.fetch
    rates = measure(
        data,
        kept=kept_of_lists(data, name),
        spent=times.spent,
        settings={
            "concurrency": fetch.concurrency,
            "per_domain": fetch.per_domain,
            "rate": fetch.rate,
            "shard_size": recipe.source.shard_size,
        },
        made=datetime.now(UTC).date().isoformat(),
        machine=f"{os.cpu_count() or 1} cores",
        encoder=recipe.embed.encoder,
        wall=wall,
    )
    if rates is None:
        return None
    tree = rates.to_json()
    tree["stages"] = {k: v for k, v in before.get("stages", {}).items() if k in ("select", "pack")} | tree["stages"]
    if {**tree, "made": ""} != {**before, "made": ""} and not data.logs.is_symlink():
        data.logs.mkdir(exist_ok=True)
        write_json(data.rates, tree)
        data.push(data.rates)
    return lay_over([("published.json", published_late()), (str(data.rates), tree)])


def _size(wall: dict[str, float]) -> float:
    """How much of a stage a run saw: rows, or seconds where they are not counted."""
    return wall.get("count", wall.get("seconds", 0.0))


def read_kept_rates(data: Data) -> dict[str, Any] | None:
    """The rates that the last run of a data folder kept; None where none did."""
    if not data.exists(data.rates):
        return None
    tree = read_json(data.local(data.rates))
    return tree if isinstance(tree, dict) else None


def projection_text(found: Projection, selection: Selection, lists: int) -> str:
    """What the whole list would take, or so many lists, in lines for people."""
    of, over = (f"all {lists} lists", "each") if lists > 1 else ("whole list", "it")
    rows = f"{found.rows:,} rows, by these {found.taken:,}"
    lines = [f"{of}: {rows}, which are spread at random over {over} (95% intervals)"]
    if found.kept is not None:
        lines.append(f"    kept      {interval(found.kept)}    of {interval(found.images)} images")
    if found.seconds is not None:
        s = found.seconds
        span = f"({format_duration(s.low or 0)} to {format_duration(s.high or 0)}: stages overlap wholly, not at all)"
        lines.append(f"    time      about {format_duration(s.value)} here  {span}")
    lines.append(f"    disk      {interval(found.disk, size)}")
    if found.requests.value:
        lines.append(f"    requests  {interval(found.requests)}    {interval(found.received, size)} received")
    gpu = f"{interval(found.gpu, hours)} GPU-hours, " if found.gpu.value else ""
    lines.append(f"    compute   {gpu}{interval(found.cpu, hours)} core-hours")
    compared = [r.name for r in selection.rules if re.search(r"\b(first_of|best_of|at_most)\s*\(", r.condition, re.I)]
    if compared:
        rules = ", ".join(compared)
        lines.append(f"    {rules}: a longer list has more rows alike, so fewer of them are kept than is said here")
    return "\n".join(lines)


def project(rates: Rates, selection: Selection, facts: dict[str, Any], lists: int) -> str:
    """The projection of a part of a list, or of several, to the whole: its text, and into `facts` its figures."""
    found = whole_list(rates, os.cpu_count() or 1)
    facts["whole"] = projection_facts(found)
    return projection_text(found, selection, lists)


# ------------------------------------------------------------------------------------------------------------- words


def interval(figure: Figure, words: Any = None) -> str:
    """A figure and its interval: `1,234 (1,100 to 1,400)`."""
    say = words or (lambda value: f"{value:,.0f}")
    value = str(say(figure.value))
    if figure.low is None or figure.high is None or value == say(figure.low) == say(figure.high):
        return value
    return f"{say(figure.value)} ({say(figure.low)} to {say(figure.high)})"


def size(count: float) -> str:
    """Bytes as people say them.

    >>> size(1_234_000), size(5.6e9), size(120)
    ('1.2 MB', '5.6 GB', '120 B')
    """
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    unit = units[0]
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def hours(seconds: float) -> str:
    """Seconds as hours, in three digits at most.

    >>> hours(3600), hours(36), hours(7_200_000)
    ('1', '0.01', '2,000')
    """
    value = seconds / 3600
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
