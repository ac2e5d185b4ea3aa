"""`tastemaker status`: where a run stands, and what to do next."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.options import Options, Result, argument


@dataclass(frozen=True, kw_only=True)
class StatusOptions(Options):
    data: str = argument("DATA")


def run(options: StatusOptions) -> Result:
    """Shards per stage, outcomes, selections."""
    from curate.store.ownership import open_data
    from pipelines.commands import curate

    facts, following = curate.status(open_data(options.data), print)
    return Result(facts=facts, next=following)
