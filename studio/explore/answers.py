"""What rules say of all rows; answers that took long are kept beside the index, so that the next server has them.

studio/index/answers/DIGEST.npy, .early.npy, .json     states of all rows, of those that early rules left, and the rest
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aesthetic.errors import DiskFull
from aesthetic.files import write_atomic
from curate.ledger.funnel import StateCounts, States
from curate.ledger.rules import Rule

SLOW = 0.5
"""Seconds from which on an answer is kept: what is asked of texts, and of groups."""
MOST = 40
"""Answers that are kept; the oldest go first."""


@dataclass(frozen=True, eq=False)
class RuleAnswer:
    """What one rule says of all rows."""

    rule: Rule
    states: States
    counts: StateCounts
    early_states: States  # of the rows that early rules kept from having an image
    early_counts: StateCounts
    groups: dict[str, dict[str, float]]
    odd: tuple[str, ...]  # what is odd about its columns
    cut: float | None  # of a `top`: the least value that it keeps; None where it keeps nothing

    @property
    def bytes(self) -> int:
        return self.states.nbytes + self.early_states.nbytes + 10_000


class KeptAnswers:
    """Answers in a folder; None: nothing is kept, and nothing found."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def find(self, digest: str, rule: Rule, rows: int) -> RuleAnswer | None:
        """The answer that was kept under a digest; None where there is none that is whole."""
        if self.folder is None:
            return None
        try:
            said: dict[str, Any] = json.loads((self.folder / f"{digest}.json").read_bytes())
            states, early = (np.load(self.folder / f"{digest}.{name}.npy") for name in ("states", "early"))
        except (OSError, ValueError):
            return None
        if states.shape != (rows,) or states.dtype != np.int8:
            return None
        counts = StateCounts.of(states), StateCounts.of(early)
        return RuleAnswer(rule, states, counts[0], early, counts[1], said["groups"], tuple(said["odd"]), said["cut"])

    def keep(self, digest: str, answer: RuleAnswer) -> None:
        """Keep an answer, as far as there is room on the disk."""
        if self.folder is None:
            return
        with contextlib.suppress(OSError, DiskFull):
            for name, array in (("states", answer.states), ("early", answer.early_states)):
                out = io.BytesIO()
                np.save(out, array)
                write_atomic(self.folder / f"{digest}.{name}.npy", out.getvalue())
            said = {"groups": answer.groups, "odd": answer.odd, "cut": answer.cut}
            write_atomic(self.folder / f"{digest}.json", json.dumps(said).encode())  # last: it is whole then
            kept = sorted(self.folder.glob("*.json"), key=lambda f: f.stat().st_mtime)
            for old in kept[:-MOST]:
                for file in self.folder.glob(f"{old.stem}.*"):
                    file.unlink(missing_ok=True)
