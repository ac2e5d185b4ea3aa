"""Named rules over the ledger -> one verdict per row, in seconds and without opening an image.

A rule is an SQL condition. It keeps a row only where it is TRUE, and rejects where any column that it names is NULL or
not finite, whatever the function: DuckDB's `least` skips NULLs, and NaN >= 5 is TRUE there. (Not so the columns that it
names inside `best_of` or `at_most` alone.) The rows with an image are loaded once, with the columns that rules name;
`top`, `first_of`, `best_of` and `at_most` become plain comparisons over them, because each depends on all fetched rows
and on nothing that another rule did.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.files import atomic
from curate.ledger.balance import balance, balance_words, cluster_columns
from curate.ledger.early import applied_early, left_out
from curate.ledger.funnel import RuleCount, StateCounts, count_rules, first_rejects
from curate.ledger.judge import (
    compute,
    failures,
    judge,
    judge_early,
    load_rows,
    numbers_of,
    odd_values,
    rejected_early,
)
from curate.ledger.neighbours import known_neighbours
from curate.ledger.rules import DENIED, KEPT, NOT_FETCHED, NOT_IN_UIDS, NUMBER, UNJUDGED, check_rules, read_rules
from curate.ledger.sql import Bounds
from curate.ledger.view import (
    OURS,
    LedgerTable,
    column_types,
    current_tables,
    hidden_columns,
    open_ledger,
    recorded_scales,
    table_digests,
    tables,
)
from curate.store.files import digest, sha256_file

if TYPE_CHECKING:
    from curate.layout import Data

LEVELS = {
    "min": 0.0,
    "1%": 0.01,
    "5%": 0.05,
    "10%": 0.1,
    "25%": 0.25,
    "median": 0.5,
    "75%": 0.75,
    "90%": 0.9,
    "95%": 0.95,
    "99%": 0.99,
    "max": 1.0,
}
"""The quantiles that are noted for each score, linearly interpolated."""

FORMAT = 1  # of selected/NAME.parquet and .json; part of what makes a selection stale


_IF_ANY = ("groups", "unknown", "early", "unjudged")
"""Counts that a record has where there are any."""


class NothingKept(Exception):
    """A selection kept no row, so there is nothing to pack (exit code 3). The message says which rules did it."""


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """A selection: a name, and rules in order. `rules` maps a rule's name to an SQL condition over the ledger; `early`
    names those of them that are applied as soon as their columns are known (curate.ledger.early)."""

    name: str = "default"
    rules: dict[str, str] = field(default_factory=dict)
    early: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a selection did with every row: rows == not fetched + denied + the sum of `rejected` over rules + unjudged
    + kept."""

    name: str
    rows: int
    not_fetched: dict[str, int]  # reason -> rows, the commonest first
    rules: list[RuleCount]
    kept: int
    quantiles: dict[str, dict[str, float]]  # numeric column -> level -> value, over the fetched rows that have one
    warnings: list[str]
    denied: dict[str, int] = field(default_factory=dict)
    """Fetched rows that must not be seen: the column that says so -> rows that none before it does."""
    early: dict[str, int] = field(default_factory=dict)
    """Rows that an early rule kept from having an image: the rule, as the ledger names it -> rows."""
    unjudged: int = 0
    """Rows that an early rule rejected before all was known that these rules ask, and that none of them rejects."""
    clusters: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Column of clusters -> what became of these (curate.ledger.balance)."""

    @property
    def fetched(self) -> int:
        """Rows that have an image."""
        return self.rows - sum(self.not_fetched.values()) - sum(self.early.values())

    @property
    def funnel(self) -> dict[str, int]:
        """Verdict -> rows, in the order of the rules; the values sum to `rows`."""
        failed, rejected = sum(self.not_fetched.values()), {r.name: r.rejected for r in self.rules}
        denied = {DENIED: sum(self.denied.values())} if self.denied else {}
        unjudged = {UNJUDGED: self.unjudged} if self.unjudged else {}
        return {NOT_FETCHED: failed, **denied, **rejected, **unjudged, KEPT: self.kept}

    def to_json(self) -> dict[str, Any]:
        """The selection as its record has it, where marginal rejects are called `alone`."""
        rules = [
            {("alone" if k == "marginal" else k): v for k, v in asdict(rule).items() if v or k not in _IF_ANY}
            for rule in self.rules
        ]
        return {**{k: v for k, v in asdict(self).items() if v or k not in _IF_ANY}, "rules": rules}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Selection:
        rules = [RuleCount(**{("marginal" if k == "alone" else k): v for k, v in r.items()}) for r in value["rules"]]
        fields = Selection.__dataclass_fields__.keys() - {"rules"}
        return Selection(**{k: value[k] for k in fields & value.keys()}, rules=rules)


# ---------------------------------------------------------------------------------------------------------- selecting


def select(data: Data, config: SelectConfig) -> Selection:
    """Apply the rules to every row of the ledger and write `selected/NAME.parquet` and `.json`, unless that is done.

    `selected/NAME.parquet` holds (key, verdict) for every row, in the order of keys: `not_fetched`, `denied` where a
    column says that the image must not be seen, the name of the first rule that isn't TRUE as far as is known,
    `unjudged` where an early rule rejected the row and no rule here does, or `kept`. Raises UserError
    for a rule that is wrong (see check_rules), for tables that are incomplete or stale, and for a rule that fails on a
    row (a cast, say).
    """
    found = tables(data)
    columns, source = column_types(found)
    rules = check_rules(config.rules, columns, source, recorded_scales(found))
    used = {c for r in rules for c in r.columns}
    hidden = hidden_columns(found)
    read = {t.name for t in found if used.intersection(t.columns)}.union(hidden.values())
    current = current_tables(data, found, read)
    # quantiles are shown for columns of numbers that no rule names, too, where these are complete
    clusters = cluster_columns(current)
    scores = [c for t in current[1:] for c in t.columns if NUMBER.fullmatch(columns[c]) and c not in clusters]
    inputs = table_digests([t for t in current if t is current[0] or t.name in read])
    grouped = {x.column for r in rules for x in r.computed if x.kind == "best_of"}
    neighbours = known_neighbours(data, [t for t in found if t is found[0] or grouped.intersection(t.columns)])
    early_names = [name for name in config.rules if name in config.early]
    identity = digest(
        [
            FORMAT,
            list(config.rules.items()),
            scores,
            *([[*hidden]] if hidden else []),
            *([["early", *early_names]] if early_names else []),
            *clusters,
            *(sha for _, sha in neighbours.values()),
        ]
    )
    if data.is_done(data.selection_record(config.name), config=identity, inputs=inputs):
        return load_selection(data, config.name)

    types = {**columns, **{f"source.{n}": t for n, t in source.items()}}
    numbers = sorted(c for c in used if NUMBER.fullmatch(types[c]) and c not in {*scores, *clusters})
    out, left_out_by = left_out(current, types)
    needed = {*used, *scores, *clusters, *hidden, *left_out_by}
    con = open_ledger(data, needed, found=found)

    denied, denied_by = np.zeros(0, np.uint64), dict[str, int]()
    groups: list[dict[str, dict[str, float]]] = []  # of each rule
    cluster_values: list[np.ndarray] = []

    early_keys, early_states = np.zeros(0, np.uint64), list[np.ndarray]()

    def ask() -> tuple[np.ndarray, list[np.ndarray], list[str], dict[str, dict[str, float]]]:
        nonlocal denied, denied_by, early_keys, early_states
        denied, denied_by = load_rows(con, needed, hidden)
        groups.extend(compute(con, rules, types, neighbours, early_names))
        keys, states, beside = judge(con, rules, types, clusters, out)
        early_keys, early_states = judge_early(con, rules, types)
        cluster_values.extend(beside)
        odd = odd_values(con, sorted(used), types)
        quantiles = {}
        for column in [*scores, *numbers]:
            if len(values := numbers_of(con, column)):
                found = np.quantile(values, list(LEVELS.values()), overwrite_input=True)
                quantiles[column] = {level: float(f"{v:.6g}") for level, v in zip(LEVELS, found, strict=True)}
        return keys, states, odd, quantiles

    with contextlib.closing(Bounds(con)) as bounds:
        fetched_keys, states, warnings, quantiles = bounds.run(ask)
        failed, not_fetched = bounds.run(lambda: failures(con))
        early = bounds.run(lambda: rejected_early(con))

    fetched = len(fetched_keys)
    of_images = first_rejects(states, fetched)
    of_early = first_rejects(early_states, len(early_keys), early=True)
    counts, odd = count_rules(
        rules,
        groups,
        (of_images, [StateCounts.of(state) for state in states]),
        (of_early, [StateCounts.of(state) for state in early_states]),
    )
    warnings += odd
    verdicts = np.concatenate([of_images.verdicts, of_early.verdicts]).astype(np.int16)
    kept_images = of_images.verdicts == of_images.kept
    if count := of_images.unjudged_count + of_early.unjudged_count:
        warnings.append(words_for_unjudged(data, count, applied_early(found), config.rules))
    selection = Selection(
        name=config.name,
        rows=fetched + len(denied) + len(failed) + len(early_keys),
        not_fetched=not_fetched,
        denied=denied_by,
        rules=counts,
        early=early,
        unjudged=count,
        kept=of_images.kept_count,
        clusters={c: balance(v, kept_images) for c, v in zip(clusters, cluster_values, strict=True)},
        quantiles=quantiles,
        warnings=warnings,
    )
    fetched_keys = np.concatenate([fetched_keys, early_keys, denied])
    verdicts = np.concatenate([verdicts, np.full(len(denied), len(rules) + 2, np.int16)])
    write_selection(found[0], selection, fetched_keys, verdicts, failed, config=identity, inputs=inputs)
    return selection


def words_for_unjudged(data: Data, count: int, applied: Mapping[str, Collection[str]], rules: Mapping[str, str]) -> str:
    """What is said of rows that can't be judged, and how they can."""
    stay = [name for name, conditions in applied.items() if {rules.get(name)} == {*conditions}]
    again = f"tastemaker retry {shlex.quote(str(data))} --early"
    if stay:
        again += f" --set {shlex.quote('select.early=[' + ', '.join(stay) + ']')}"
    without = ", ".join(name for name in applied if name not in stay)
    return (
        f"{count:,} rows can't be judged: no rule here rejects them, and early rules ({without or ', '.join(applied)}) "
        f"did before all was known of them. `{again}` fetches what was left out, and makes their columns"
    )


def check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise UserError(
            f"{name!r} can't be a selection's name: it names files, so letters, digits and . _ + - are expected"
        )


def write_selection(
    table: LedgerTable,
    selection: Selection,
    fetched: np.ndarray,
    verdicts: np.ndarray,
    failed: np.ndarray,
    *,
    config: str,
    inputs: Mapping[str, str],
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write the verdicts in the order of keys, and commit them. Refuses a key that comes twice.

    `table` is that of what was fetched. `fetched` are the keys (numbers) of rows that did not fail, `verdicts` theirs:
    i the i-th rule, counted from one, and after the last rule kept, then denied, then unjudged. `failed` are the keys
    of the other rows. `more` goes into the record.
    """
    data, keys = table.data, np.concatenate([fetched, failed])
    codes = np.concatenate([verdicts, np.zeros(len(failed), np.int16)])
    order = np.argsort(keys, kind="stable")
    keys, codes = keys[order], codes[order]
    if twice := keys[1:][keys[1:] == keys[:-1]][:1].tolist():
        folder = f"{data}/fetched"
        raise UserError(f"key {twice[0]} comes twice in {folder}: `tastemaker verify {data}` looks for damage")
    more_words = [DENIED, UNJUDGED] if selection.unjudged else [DENIED] if selection.denied else []
    names = pa.array([NOT_FETCHED, *(r.name for r in selection.rules), KEPT, *more_words])
    path, record = data.verdicts(selection.name), data.selection_record(selection.name)
    # as many digits as the first key has: keys are numbers, zero-padded to that, and longer ones have no zeros
    files = (pq.ParquetFile(data.local(file)) for file in table.files)
    firsts = (batch for file in files for batch in file.iter_batches(1, columns=["key"]))
    width = next((len(batch["key"][0].as_py()) for batch in firsts), 0)
    schema = pa.schema([("key", pa.string()), ("verdict", pa.dictionary(pa.int16(), pa.string()))])
    data.invalidate(record)
    with atomic(path) as f, pq.ParquetWriter(f, schema, compression="zstd", use_dictionary=["verdict"]) as out:
        for start in range(0, len(keys), 1 << 20):
            part = slice(start, start + (1 << 20))
            padded = pc.utf8_lpad(pa.array(keys[part]).cast(pa.string()), width=width, padding="0")
            out.write_table(pa.table([padded, pa.DictionaryArray.from_arrays(codes[part], names)], schema=schema))
    facts = {**selection.to_json(), **(more or {})}
    data.commit(record, config=config, inputs=inputs, outputs=[path], facts=facts)


def load_selection(data: Data, name: str) -> Selection:
    """A selection that was made before. UserError where there is none of that name, naming those that there are."""
    check_name(name)
    value = data.record(data.selection_record(name))
    if not isinstance(value, dict) or "kept" not in value:
        others = data.selections()
        known = f" There are {', '.join(others)}." if others else ""
        raise UserError(
            f"{data} has no selection {name}.{known} "
            f"`tastemaker select {shlex.quote(str(data.root))} --name {name}` makes it."
        )
    return Selection.from_json(value)


def remembered(data: Data, name: str) -> tuple[dict[str, str], Path | None] | None:
    """What a selection was made by: its rules, or a subset file of DataComp's; None where there is no such selection.

    Raises UserError where that file is not what it was.
    """
    record = data.record(data.selection_record(name))
    if not isinstance(record, dict) or not isinstance(record.get("rules"), list):
        return None
    rules = {r["name"]: r["condition"] for r in record["rules"]}
    if NOT_IN_UIDS not in rules:
        return rules, None
    file = Path(record["uids"]) if "uids" in record else None
    if file is None or not file.is_file() or sha256_file(file) != record["inputs"]["uids"]:
        raise UserError(
            f"the selection {name} was made from a subset file, {file or rules[NOT_IN_UIDS]}, which is not there any "
            "more or has changed: say with --uids which file is meant"
        )
    return {}, file


def saved_as(data: Data, rules: Mapping[str, str]) -> str | None:
    """The name of a selection that was made by these rules in this order; None where there is none."""
    for name in data.selections():
        record = data.record(data.selection_record(name))
        if [(r["name"], r["condition"]) for r in record.get("rules") or []] == [*rules.items()]:
            return name
    return None


def changed_since(data: Data, name: str, now: Mapping[str, str], hidden: Collection[str] = ()) -> list[str]:
    """The tables that a selection was made from and that have changed, and those of `hidden_columns` that it was not
    made from; `now` is what `table_digests` says of all."""
    then = data.record(data.selection_record(name)).get("inputs", {})
    changed = [table for table, digest in then.items() if table != "uids" and now.get(table) != digest]
    return changed + sorted({*hidden} - then.keys())


# ------------------------------------------------------------------------------------------------------------- funnel


def funnel_text(selection: Selection) -> str:
    """The funnel as a table: rows, not fetched with reasons, each rule with counts and condition, and what is kept."""
    width = max(12, *(len(r.name) for r in selection.rules)) if selection.rules else 12
    commonest = sorted(selection.not_fetched.items(), key=lambda item: (-item[1], item[0]))[:5]
    reasons = " · ".join(f"{reason} {n:,}" for reason, n in commonest)
    rules = read_rules({r.name: r.condition for r in selection.rules}, {*OURS, "similarity", *selection.quantiles})

    def share(count: int) -> str:
        return f"{count / selection.rows:.1%}" if selection.rows else "-"

    failed = sum(selection.not_fetched.values())
    lines = [
        ("rows", f"{selection.rows:,}", "rejected", "marginal", "share", ""),
        (NOT_FETCHED, "", f"{failed:,}", "-", share(failed), reasons),
    ]
    if denied := sum(selection.denied.values()):
        columns = " · ".join(f"{column} {n:,}" for column, n in selection.denied.items())
        lines.append((DENIED, "", f"{denied:,}", "-", share(denied), columns))
    for count in selection.rules:
        rule = rules[count.name]
        note = f"best {100 * rule.top.fraction:g}% of {rule.top.column}" if rule and rule.top else count.condition
        named = [q for column, q in selection.quantiles.items() if rule and column in rule.values]
        if len(named) == 1:
            note += f"   (median {named[0]['median']:.3g}, 90% {named[0]['90%']:.3g})"
        for group, facts in count.groups.items():
            note += f" · {facts['groups']:,} groups of {group}"
            if facts["groups"]:
                note += f" (median {facts['median']:g} images, largest {facts['largest']:,})"
            if facts.get("split"):
                note += f", {facts['split']:,} of them split: not all are near the best"
        if count.nulls:
            note += f" · {count.nulls:,} without a value"
        if count.unknown:
            note += f" · {count.unknown:,} unknown, as early rules rejected them"
        lines.append((count.name, "", f"{count.rejected:,}", f"{count.marginal:,}", share(count.rejected), note))
    if selection.unjudged:
        note = "rejected early, by rules that are not among these"
        lines.append((UNJUDGED, "", f"{selection.unjudged:,}", "-", share(selection.unjudged), note))
    lines.append((KEPT, f"{selection.kept:,}", "", "", share(selection.kept), ""))
    shown = [
        f"{name:<{width}}{rows:>12}{rejected:>12}{marginal:>12}{part:>8}   {note}".rstrip()
        for name, rows, rejected, marginal, part, note in lines
    ]
    return "\n".join([*shown, *(f"{column}: {balance_words(facts)}" for column, facts in selection.clusters.items())])
