"""All that a data folder knows of one row, and which rules are true of it, from the files of its shard.

found = explain(data, "000010005")       # what the list says, what became of it, columns, verdicts, packs
rule_states(data, rules, "000010005")    # rule by rule: true, false, null (a column has no value), unknown
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.ledger.counts import Verdicts
from curate.ledger.early import left_out
from curate.ledger.judge import UNKNOWN, compute, judge, judge_early, load_rows
from curate.ledger.neighbours import known_neighbours
from curate.ledger.rules import KEPT, Rule, check_rules
from curate.ledger.schema import FETCHED_COLUMNS, Status
from curate.ledger.sql import Bounds, quote
from curate.ledger.view import (
    LedgerTable,
    column_types,
    fetched_columns,
    hidden_columns,
    hidden_keys,
    open_ledger,
    recorded_scales,
    tables,
)
from curate.store.files import read_table, sha256_once

if TYPE_CHECKING:
    from curate.layout import Data

LICENCE = re.compile(r"licen[sc]e|rights|copyright|credit|author|attribution", re.IGNORECASE)
"""What the name of a column of the list holds that says whose an image is, or what may be done with it."""

_KEY = re.compile(r"[0-9]{5,20}")

State = Literal["true", "false", "null", "unknown"]

STATES: Mapping[int, State] = {0: "true", 1: "false", 2: "null", UNKNOWN: "unknown"}
"""What `curate.ledger.judge` says of a row, in words."""


@dataclass(frozen=True)
class KeyShape:
    """How keys are made in a data folder: the shard's number and so many digits for the row, as `make_key` has it."""

    digits: int

    @staticmethod
    def of(fetched: LedgerTable) -> KeyShape:
        """By the first key of the table `fetched`."""
        for shard, path in zip(fetched.shards, fetched.files, strict=True):
            with pq.ParquetFile(fetched.data.local(path)) as file:
                first = next((b["key"][0].as_py() for b in file.iter_batches(1, columns=["key"]) if len(b)), None)
            if first is not None:
                return KeyShape(len(first) - max(5, len(str(shard))))
        return KeyShape(0)

    def first(self, shard: int) -> int:
        """The number that the shard's first key is."""
        return shard * 10**self.digits

    def split(self, key: str) -> tuple[int, int] | None:
        """(shard, row) of a key, None for what is none."""
        if not _KEY.fullmatch(key):
            return None
        shard, row = divmod(int(key), 10**self.digits)
        return (shard, row) if key == f"{int(key):0{5 + self.digits}d}" else None

    def row_in(self, key: str, shard: int) -> int | None:
        """The row number of a key of a shard, None for other keys."""
        found = self.split(key)
        return found[1] if found is not None and found[0] == shard else None


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a data folder knows of one row of its list."""

    key: str
    shard: int
    list: str  # as it was given, and when it was added to others
    file: str  # of the list, that the row is in
    line: int | None  # its row there, counted from 0; None where that is not known
    status: str  # of Status
    reason: str | None  # why it has no image
    url: str | None
    caption: str | None
    download: dict[str, Any]  # the other columns of `fetched/` that are ours
    source: dict[str, Any]  # the list's own columns
    columns: dict[str, Any]  # similarity, and what annotators say; those of its shard alone
    selections: dict[str, str] = field(default_factory=dict)  # name -> verdict
    packs: dict[str, bool | None] = field(default_factory=dict)
    """Name -> whether it holds the image; None where it was packed of an older selection than there is now."""

    @property
    def licence(self) -> dict[str, Any]:
        """Those of the list's columns that say whose the image is."""
        return {name: value for name, value in self.source.items() if LICENCE.search(name)}

    def value(self, column: str) -> Any:
        """The value of a column as rules name it, `similarity` or `source.WIDTH`; None where it has none, as of NaN."""
        own = {"key": self.key, "url": self.url, "caption": self.caption, "status": self.status, "reason": self.reason}
        found = {**own, **self.download, **self.columns}.get(column)
        if column.startswith("source."):
            found = self.source.get(column.removeprefix("source."))
        return None if isinstance(found, float) and math.isnan(found) else found


def explain(data: Data, key: str, found: Sequence[LedgerTable] | None = None) -> Explanation:
    """All that is known of a row, from the files of its shard, the verdicts' row groups, and the records.

    `found` are the tables, where they are known. KeyError where there is no such row, or its image must not be seen.
    """
    found = tables(data) if found is None else found
    at = KeyShape.of(found[0]).split(key)
    if at is None or at[0] not in found[0].shards:
        raise KeyError(key)
    shard = at[0]
    here = {t.name: t.of([shard]) for t in found}
    row = _row(here[found[0].name], key)
    if row is None or key in hidden_keys(found, hidden := hidden_columns(found), shard):
        raise KeyError(key)
    if row["status"] == Status.SUCCESS and any(not here[name].shards for name in hidden.values()):
        raise KeyError(key)  # nobody has asked yet whether it must not be seen
    columns = dict[str, Any]()
    for table in found[1:]:
        values = _row(here[table.name], key) or {}
        columns |= {column: values.get(column) for column in table.columns}
    source = row.pop("source")
    ours = {name for name, _ in FETCHED_COLUMNS} - {"key", "status", "reason"}
    file, line = _line(data, shard, at[1])
    return Explanation(
        key=key,
        shard=shard,
        list=_list(data, shard),
        file=file,
        line=line,
        status=str(row["status"]),
        reason=row["reason"],
        url=row["url"],
        caption=row["caption"],
        download={name: row[name] for name, _ in FETCHED_COLUMNS if name in ours},
        source=source,
        columns=columns,
        selections=(verdicts := verdicts_of(data, key)),
        packs={name: _in_pack(data, name, verdicts) for name in data.packs()},
    )


def _row(table: LedgerTable, key: str) -> dict[str, Any] | None:
    """The row of a key in a table of one shard, under the names that the ledger has; `source` is the list's."""
    if not table.files:
        return None
    rows = read_table(table.data.local(table.files[0]))
    found = rows.filter(pc.equal(rows[table.key], key)).slice(0, 1)
    if not len(found):
        return None
    values = [column[0].as_py() for column in found.columns]
    if table.name != "fetched":
        return dict(zip(found.column_names, values, strict=True))
    columns, source = fetched_columns(found.schema)
    ours = {name: None if place is None else values[place] for name, place in columns.items()}
    return {**ours, "source": {name: values[place] for name, place in source.items()}}


def _list(data: Data, shard: int) -> str:
    """The list that a shard is of, as it was given; of one that was added, with the date."""
    if not data.exists(data.plan_record) or shard >= len(data.plan.shards):
        return ""
    found = data.plan.list_of(shard)
    return f"{found['list']}, added on {str(found['date'])[:10]}" if found.get("date") else str(found["list"])


def _line(data: Data, shard: int, row: int) -> tuple[str, int | None]:
    """The file of the list that a row is in, and its row there, counted from 0; None where the list was copied, so that
    its rows are others."""
    if not data.exists(data.plan_record):
        return "", None
    planned = next((s for s in data.plan.shards if s.shard == shard), None)
    if planned is None:
        return "", None
    facts = data.plan.facts
    path = str(facts["inputs"][facts["made_of"][planned.file]]["path"])
    return path, None if planned.file in facts["cut"] else planned.offset + row


def verdicts_of(data: Data, key: str) -> dict[str, str]:
    """What each selection says of a row."""
    found = dict[str, str]()
    for name in data.selections():
        if data.exists(path := data.verdicts(name)):
            verdicts = Verdicts(data.local(path))
            (place,) = verdicts.of(pa.array([key])).tolist()
            if place >= 0:
                found[name] = verdicts.words[place]
    return found


def _in_pack(data: Data, name: str, verdicts: Mapping[str, str]) -> bool | None:
    """Whether a pack holds a row: what its selection kept, where that is the one that was packed."""
    packed = data.record(data.manifest(name)).get("inputs", {}).get("selected")
    path = data.verdicts(name)
    if not data.exists(path) or packed != sha256_once(data.local(path)):
        return None
    return verdicts.get(name) == KEPT


# --------------------------------------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class RuleState:
    """What a rule says of one row, and the values that it looked at."""

    name: str
    condition: str
    state: State
    """true: it keeps the row; false; null: a column that it needs has no value; unknown: nobody can say, as an early
    rule rejected the row before its columns were there, or they were not computed."""
    values: dict[str, Any]


def read_conditions(found: Sequence[LedgerTable], conditions: Mapping[str, str]) -> list[Rule]:
    """Rules, name -> SQL condition, understood; UserError for one that is wrong."""
    columns, source = column_types(found)
    return check_rules(conditions, columns, source, recorded_scales(found))


def rule_states(
    data: Data,
    rules: Sequence[Rule],
    explained: Explanation,
    found: Sequence[LedgerTable] | None = None,
    early: Sequence[str] = (),
) -> list[RuleState]:
    """Each rule's state of a row, by the SQL of `select`. Rules with functions of all rows (`top`, `first_of`,
    `best_of`, `at_most`) read the columns that they name of all shards, others the row's own shard.

    early: the names of the early rules. UserError where a rule fails on a row.
    """
    found = tables(data) if found is None else found
    near = [rule for rule in rules if not rule.computed]
    states = _states(data, near, explained, [t.of([explained.shard]) for t in found])
    if far := [rule for rule in rules if rule.computed]:
        # the early rules beside them: `compute` compares what these leave
        beside = [rule for rule in near if rule.name in early]
        states |= _states(data, [*beside, *far], explained, found, early)
    return [
        RuleState(rule.name, rule.condition, states[rule.name], {c: explained.value(c) for c in rule.columns})
        for rule in rules
    ]


def _states(
    data: Data,
    rules: Sequence[Rule],
    explained: Explanation,
    found: Sequence[LedgerTable],
    early: Sequence[str] = (),
) -> dict[str, State]:
    """The states of rules by the rows of these tables."""
    there = [t for t in found if t.shards]
    columns, source = column_types(there)
    types = {**columns, **{f"source.{name}": kind for name, kind in source.items()}}
    asked = [rule for rule in rules if all(c in types for c in rule.columns)]
    states: dict[str, State] = {rule.name: "unknown" for rule in rules}
    if not asked or explained.status not in (Status.SUCCESS, Status.REJECTED_EARLY):
        return states
    hidden = hidden_columns(there)
    grouped = {c.column for rule in asked for c in rule.computed if c.kind == "best_of"}
    neighbours = known_neighbours(data, [t for t in there if t is there[0] or grouped.intersection(t.columns)])
    out, of_early = left_out(there, types)
    needed = {c for rule in asked for c in rule.columns}.union(hidden, of_early)
    number = int(explained.key)

    def ask() -> list[int]:
        load_rows(con, needed, hidden)
        if explained.status == Status.REJECTED_EARLY:
            keys, codes = judge_early(con, asked, types)
        else:
            compute(con, asked, types, neighbours, early)
            con.execute(f"CREATE OR REPLACE TEMP TABLE one AS SELECT * FROM judged WHERE {quote('#key')} = {number}")
            con.execute("DROP VIEW judged; CREATE TEMP VIEW judged AS SELECT * FROM one")
            keys, codes, _ = judge(con, asked, types, (), out)
        at = keys.tolist().index(number)
        return [int(code[at]) for code in codes]

    con = open_ledger(data, needed, found=there)
    with contextlib.closing(Bounds(con)) as bounds:
        codes = bounds.run(ask)
    return states | {rule.name: STATES[code] for rule, code in zip(asked, codes, strict=True)}
