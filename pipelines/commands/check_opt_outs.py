"""`tastemaker check-opt-outs`: who asks today that what was kept be not used; and it is removed."""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass, replace

from pipelines.options import Result, WithRecipe, argument, option
from pipelines.terminal import counted


def _days(text: str) -> float:
    value = float(text)
    if not 0 <= value < 10_000:
        raise argparse.ArgumentTypeError("a number of days from 0 on is expected")
    return value


@dataclass(frozen=True, kw_only=True)
class CheckOptOutsOptions(WithRecipe):
    data: str = argument("DATA", "the data folder")
    name: str | None = option("ask only about what this selection keeps (default: about all images)")
    days: float = option("ask again what was asked so many days ago or before", default=1.0, metavar="N", type=_days)
    dry_run: bool = option("only ask and report: write nothing, remove nothing", default=False)


def run(options: CheckOptOutsOptions) -> Result:
    """Ask the origin of each image again, and remove what has opted out, as `tastemaker remove` does."""
    from curate.fetch.optouts import SIGNALS
    from curate.fetch.recheck import DAY, kept_keys, recheck
    from curate.store.ownership import open_data
    from pipelines.commands import remove
    from pipelines.recipe import recipe_of
    from pipelines.runtime.progress import ProgressBar

    data = open_data(options.data)
    fetch = replace(recipe_of(data, options.recipe, options.set).fetch, engine="native")
    asked_for = [s for s in SIGNALS if s in fetch.respect and s not in ("c2pa", "iptc")]
    print(f"heeded: {', '.join(asked_for) or 'nothing'} (fetch.respect)")
    if left := [s for s in ("x-robots-tag", "robots-txt", "tdm-reservation", "content-usage") if s not in asked_for]:
        print(f"not heeded: {', '.join(left)}; `--set fetch.respect=[...]` heeds them too")
    keys = None if options.name is None else kept_keys(data, options.name)
    records = (data.record(data.fetched_record(s)) for s in data.shards(data.fetched_record))
    total = len(keys) if keys is not None else sum(r.get("successes", 0) for r in records)

    bar = ProgressBar(sys.stderr, "asked", total, "img")
    with contextlib.nullcontext() if options.dry_run else data.hold():
        found = recheck(data, fetch, keys, older=options.days * DAY, write=not options.dry_run, report=bar)
        bar.clear()
    answers = " · ".join(f"{answer} {n:,}" for answer, n in found.answers.most_common())
    print(f"{counted(found.images, 'image')}, {found.asked:,} asked about now: {answers or 'none'}")
    if found.without_url:
        print(f"without a URL, from files: {found.without_url:,}")
    if found.signals:
        print("seen: " + " · ".join(f"{signal} {n:,}" for signal, n in found.signals.most_common()))
    if found.opted_out:
        first = ", ".join([*found.opted_out][:3]) + (", ..." if len(found.opted_out) > 3 else "")
        print(f"opted out: {counted(len(found.opted_out), 'image')} ({first})")
    facts = {
        "images": found.images,
        "asked": found.asked,
        "without_url": found.without_url,
        "answers": dict(found.answers),
        "signals": dict(found.signals),
        "opted_out": sorted(found.opted_out),
        "removed": None,
    }
    if not found.opted_out or options.dry_run:
        return Result(facts=facts)
    done = remove.run(remove.RemoveOptions(data=options.data, keys=tuple(sorted(found.opted_out))))
    return Result(facts=facts | {"removed": done.facts}, next=done.next)
