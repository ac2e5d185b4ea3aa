"""`tastemaker retry`: what failed for transient reasons is fetched again, and then embedded."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.commands import embed
from pipelines.options import Result


@dataclass(frozen=True, kw_only=True)
class RetryOptions(embed.EmbedOptions):
    pass


def run(options: RetryOptions) -> Result:
    """The main job on what a data folder already plans, with the failed rows once more."""
    return embed.run(options, retry=True)
