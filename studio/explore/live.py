"""Rules over a snapshot: what each says of each row, remembered rule by rule, so that a drag asks one rule anew.

What rules mean is `curate.ledger.judge`'s: the same SQL over the same values, in the memory of the index in place of a
table that is loaded. Rules that name columns which the index does not hold are asked of the data folder's tables.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import numpy as np
import numpy.typing as npt

from aesthetic.errors import UserError
from curate.ledger.early import when_known
from curate.ledger.funnel import RowFunnel, RuleCount, StateCounts, States, count_rules, first_rejects
from curate.ledger.judge import UNKNOWN, compute, judge, judge_early, load_rows, odd_values
from curate.ledger.rules import Rule, check_rules
from curate.ledger.select import words_for_unjudged
from curate.ledger.sql import Bounds, short
from curate.ledger.view import open_ledger
from curate.store.files import digest
from studio.errors import NotHere
from studio.explore.answers import SLOW, KeptAnswers, RuleAnswer
from studio.explore.remembered import Remembered
from studio.explore.snapshot import Snapshot

SECONDS = 60
"""How long the SQL of one rule may work."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LiveSelection:
    """Rules that were applied to all rows, with nothing written."""

    id: str
    snapshot: Snapshot = field(repr=False)
    rules: tuple[Rule, ...]
    answers: tuple[RuleAnswer, ...]
    funnel: RowFunnel
    counts: list[RuleCount]
    unjudged: int
    warnings: list[str]
    off: dict[str, str] = field(default_factory=dict)  # rules that are switched off: name -> condition

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """(n,) of all rows."""
        return self.funnel.verdicts == self.funnel.kept

    @property
    def kept_count(self) -> int:
        return self.funnel.kept_count

    def verdict(self, row: int) -> str:
        """The verdict of a row, in the words of `select`."""
        code = int(self.funnel.verdicts[row])
        if code <= len(self.rules):
            return self.rules[code - 1].name
        return "kept" if code == self.funnel.kept else "unjudged"

    @property
    def bytes(self) -> int:
        return self.funnel.verdicts.nbytes + 10_000


class RuleBook:
    """The answers to rules of one snapshot."""

    def __init__(self, snapshot: Snapshot, kept: Path | None = None, most_bytes: int = 200 << 20) -> None:
        """kept: a folder for answers that took long."""
        self.snapshot, self._kept = snapshot, KeptAnswers(kept)
        self._answers = Remembered[Any, RuleAnswer](most_bytes, lambda answer: answer.bytes)
        self._checked = Remembered[tuple[str, str], Rule](2000, lambda rule: 1)

    def check(self, rules: dict[str, str]) -> list[Rule]:
        """The rules, understood; UserError as `select` says it."""
        snapshot = self.snapshot

        def understand(some: dict[str, str]) -> list[Rule]:
            return check_rules(some, *snapshot.types, snapshot.scales, snapshot.database.cursor())

        found = {item: self._checked.get(item) for item in rules.items()}
        missing = {name: condition for (name, condition), rule in found.items() if rule is None}
        if missing:
            try:  # each by itself: places of computed columns count from 0
                new = [understand({name: condition})[0] for name, condition in missing.items()]
            except UserError:
                understand(rules)  # the first that is wrong, of all
                raise
            for rule in new:
                found[rule.name, rule.condition] = self._checked.put((rule.name, rule.condition), rule)
        checked = [rule for rule in found.values() if rule is not None]
        snapshot.check_tables(checked)
        return checked

    def answer(self, rule: Rule, early: Sequence[Rule]) -> RuleAnswer:
        """What a rule says of all rows; `early` are the rules of the same selection that are early ones."""
        before = [r.condition for r in early] if rule.computed else []
        made = self._answers.get_or_make((rule.condition, *before), lambda: self._find_or_ask(rule, early, before))
        return RuleAnswer(**{**vars(made), "rule": rule})  # it may have another name

    def _find_or_ask(self, rule: Rule, early: Sequence[Rule], before: Sequence[str]) -> RuleAnswer:
        """The answer that was kept, else what the tables say; that is kept where it took long."""
        key = digest([self.snapshot.digest, rule.condition, *before])
        if (found := self._kept.find(key, rule, self.snapshot.count)) is not None:
            return found
        began = time.monotonic()
        answer = self._ask(rule, early)
        if time.monotonic() - began > SLOW:
            self._kept.keep(key, answer)
        return answer

    def _ask(self, rule: Rule, early: Sequence[Rule]) -> RuleAnswer:
        snapshot = self.snapshot
        before = [r for r in early if rule.computed and r.name != rule.name]
        out, left_out_by = snapshot.left_out
        needed = {c for r in (rule, *before) for c in r.columns}
        if any(c in out for c in rule.columns):
            needed |= left_out_by
        neighbours = snapshot.neighbours([rule])
        types = snapshot.all_types
        mapped = snapshot.holds(needed)
        if mapped:
            con = snapshot.connect(sorted(needed))
        else:
            needed |= {*snapshot.hidden}
            con = open_ledger(snapshot.data, needed, found=snapshot.found)

        def ask() -> tuple[States, dict[str, dict[str, float]], list[str]]:
            if not mapped:
                load_rows(con, needed, snapshot.hidden)
            known = snapshot.cut_of if mapped and not before else None
            groups = compute(con, [*before, rule], types, neighbours, [r.name for r in early], known)[-1]
            # a plain look at each row leaves them in their order; a join may not
            joined = not mapped or any(c.kind != "top" for c in rule.computed)
            keys, states, _ = judge(con, [rule], types, [], out, with_keys=joined)
            unknown = [c for c in sorted(rule.columns) if not mapped or snapshot.columns[c].facts.stored != "number"]
            odd = [*odd_values(con, unknown, types), *(snapshot.odd(c) for c in rule.columns if c not in unknown)]
            return self._in_order(keys, states[0]) if joined else states[0], groups, [words for words in odd if words]

        with contextlib.closing(Bounds(con, SECONDS)) as bounds:
            states, groups, odd = _run(bounds, rule, ask)
        early_states = self._ask_early(rule)
        counts = StateCounts.of(states), StateCounts.of(early_states)
        cut = snapshot.least_kept(rule.top, states) if rule.top and counts[0].true else None
        return RuleAnswer(rule, states, counts[0], early_states, counts[1], groups, tuple(odd), cut)

    def _in_order(self, keys: npt.NDArray[np.uint64], states: States) -> States:
        """States in the order of rows."""
        own = self.snapshot.rows.keys
        if not np.array_equal(keys, own):
            order = np.argsort(keys, kind="stable")
            keys, states = keys[order], states[order]
        if not np.array_equal(keys, own):
            raise UserError("the data folder changed meanwhile: try again in a while")
        return states

    def _ask_early(self, rule: Rule) -> States:
        """What it says of the rows that early rules kept from having an image, in their order."""
        count = sum(self.snapshot.rows.early.values())
        if not count:
            return np.zeros(0, np.int8)
        if rule.computed or when_known(rule.condition) == "annotator":
            return np.full(count, UNKNOWN, np.int8)
        named = {*rule.columns, "original_width"}
        con = open_ledger(self.snapshot.data, named, found=self.snapshot.found)
        with contextlib.closing(Bounds(con, SECONDS)) as bounds:
            keys, states = _run(bounds, rule, lambda: judge_early(con, [rule], self.snapshot.all_types))
        return np.ascontiguousarray(states[0][np.argsort(keys, kind="stable")])

    # -------------------------------------------------------------------------------------------- selections

    def select(self, rules: dict[str, str], off: dict[str, str]) -> LiveSelection:
        """Apply rules, name -> condition, in their order. Raises UserError as `select` does."""
        snapshot = self.snapshot
        checked = self.check(rules)
        early = [rule for rule in checked if rule.name in snapshot.recipe.early]
        answers = tuple(self.answer(rule, early) for rule in checked)
        of_images = first_rejects([a.states for a in answers], snapshot.count)
        of_early = first_rejects([a.early_states for a in answers], sum(snapshot.rows.early.values()), early=True)
        counts, warnings = count_rules(
            checked,
            [a.groups for a in answers],
            (of_images, [a.counts for a in answers]),
            (of_early, [a.early_counts for a in answers]),
        )
        unjudged = of_images.unjudged_count + of_early.unjudged_count
        odd = list(dict.fromkeys(words for answer in answers for words in answer.odd))
        if unjudged:
            warnings.append(words_for_unjudged(snapshot.data, unjudged, snapshot.applied_early, rules))
        return LiveSelection(
            selection_id(snapshot, rules, off),
            snapshot,
            tuple(checked),
            answers,
            of_images,
            counts,
            unjudged,
            [*odd, *warnings],
            off,
        )


def selection_id(snapshot: Snapshot, rules: dict[str, str], off: dict[str, str]) -> str:
    """What names a selection: nothing that is said of it depends on anything else."""
    return digest([snapshot.digest, list(rules.items()), list(off.items())])


def _run(bounds: Bounds, rule: Rule, work: Callable[[], T]) -> T:
    """The result of work that asks one rule; what goes wrong is told with its name."""
    try:
        return bounds.run(work)
    except (duckdb.IOException, OSError) as e:
        raise NotHere(f"the data folder is being changed: {short(e)}", "try again in a while") from None
    except duckdb.Error as e:
        raise UserError(f"rule {rule.name} ({rule.condition}): {short(e)}") from None
    except UserError as e:
        if str(e).startswith("rule "):
            raise
        raise UserError(f"rule {rule.name} ({rule.condition}): {e}") from None
