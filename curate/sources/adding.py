"""More rows for a plan that is there: those of another list that it does not know, or of one of its own lists.

What the plan has stays as it is: other rows are cut into files and shards of their own, which follow those that are
there. Plan files of before are read, and rows that are known left out (`known`); nothing is fetched for that.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from aesthetic.errors import UserError
from aesthetic.untrusted import printable
from curate.fetch.deny import Deny
from curate.sources.columns import common_type
from curate.sources.find import Found, find, stat
from curate.sources.inputs import Input
from curate.sources.known import KnownRows
from curate.sources.plan import ANEW, Plan, SourceConfig, shards_file
from curate.sources.plan_files import input_facts, rows_per_shard, settings, shards_of, write_plan, write_rows
from curate.sources.scan import MOST_EXTRA, ListScan, count_rows, open_scan, scan_list
from curate.store.files import digest, sha256_file

_OF_ITS_OWN = ("source.url", "source.caption", "source.where", "source.columns")
"""Settings that each list has for itself; the others are the whole plan's."""


@dataclass(kw_only=True)
class Addition:
    """What a list adds to a plan; nothing is written before `write`."""

    plan: Plan
    found: Found
    scan: ListScan
    config: SourceConfig
    limit: int | None
    index: int  # of the list among `Plan.lists`; their number where it is another
    extra_columns: pa.Schema  # of the whole plan, with those that this list brings
    own_rows: int  # rows of this list that are no other's, in the plan or not
    counts: dict[str, int]  # new (before `limit`), added, known, changed_caption (a part of them), denied, without_url

    @property
    def is_another(self) -> bool:
        """Whether the plan has no such list yet."""
        return self.index == len(self.plan.lists)

    @property
    def total_rows(self) -> int:
        """Rows that the plan has with it."""
        return self.plan.total_rows + self.counts["added"]

    @property
    def plan_listed_rows(self) -> int:
        """As `Plan.listed_rows`, with it."""
        return self.own_rows + sum(one["listed_rows"] for i, one in enumerate(self.plan.lists) if i != self.index)

    @property
    def shard_count(self) -> int:
        """Shards that the plan has with it."""
        size = rows_per_shard(self._sizes, self.counts["added"])
        return len(self.plan.shards) + sum(-(-kept // size) for kept in self.scan.kept)

    @property
    def _sizes(self) -> SourceConfig:
        return SourceConfig(shard_size=self.plan.shard_size)

    def write(self) -> Plan:
        """Cut the rows into files, and have the plan hold them; the plan as it is then.

        Raises UserError, and the plan stays what it was, where the list changes meanwhile.
        """
        if not (self.counts["added"] or self.is_another or self._wants_more):
            return self.plan
        plan, scan, data = self.plan, self.scan, self.plan.data
        facts = json.loads(json.dumps(dict(plan.facts)))
        shards, written = list(plan.shards), list[Path]()
        _remove_unfinished(plan)
        size = rows_per_shard(self._sizes, self.counts["added"])
        start = len(facts["inputs"]) if self.is_another else _first_input(plan, self.index)
        try:
            for i, (source, kept) in enumerate(zip(scan.inputs, scan.kept, strict=True)):
                before = stat(self.found.kind, source.path)
                content = source.digest()
                if self.is_another:
                    facts["inputs"].append({**input_facts(self.found, source, before, content), "list": self.index})
                elif content != facts["inputs"][start + i]["sha256"]:
                    raise UserError(f"{self.found.name}: has changed since the plan was made. {ANEW}")
                if kept:
                    file = f"plan/{start + i:05d}-{len(plan.shards):05d}.parquet"
                    written.append(data.root / file)
                    try:
                        write_rows(written[-1], i, scan, size)
                    except pa.ArrowInvalid as e:
                        raise UserError(
                            f"{self.found.shown(source)}: a number is too large for {plan.data}: {e}"
                        ) from e
                    facts["cut"][file] = sha256_file(written[-1])
                    identity = [content, source.url, source.caption, self.config.where, start + i]
                    identity += [scan.planned_hash, scan.limit_hash]
                    if scan.known is not None:  # which rows these are depends on all that were there
                        identity.append(facts["cut"][file])
                    facts["identities"][file] = digest(identity)
                    facts["made_of"][file] = start + i
                    shards += shards_of(file, kept, size, first=len(shards))
                if not self.found.remote and stat(self.found.kind, source.path) != before:
                    raise UserError(f"{source.path}: changed while it was read. Run the same command again.")
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise
        self._note_list(facts)
        facts["total_rows"] = self.total_rows
        return write_plan(data, facts, shards, replaces=shards_file(plan.facts))

    @property
    def _wants_more(self) -> bool:
        """Whether a limit is larger than the one that the list was taken with, whatever it brings."""
        before = None if self.is_another else self.plan.lists[self.index]["source"]["--limit"]
        return before is not None and (self.limit is None or self.limit > before)

    def _note_list(self, facts: dict[str, Any]) -> None:
        """What plan.json says of the list."""
        noted: dict[str, Any] = {
            "source": settings(self.config, self.limit),
            "listed_rows": self.own_rows,
        }
        if self.scan.limit_hash is not None or self.index or "added" in facts:
            noted["limit_hash"] = self.scan.limit_hash
        if self.index == 0:
            facts |= noted
            return
        if not self.is_another:
            one = facts["added"][self.index - 1]
            facts["added"][self.index - 1] = one | noted | {"rows": one["rows"] + self.counts["added"]}
            return
        if "added" not in facts:
            facts["added"] = []
        facts["added"].append(
            {
                "list": self.found.name,
                "remote": self.found.remote,
                "kind": self.found.kind,
                "base": str(self.found.base) if self.found.base else None,
                "carried_schema": base64.b64encode(self.extra_columns.serialize()).decode(),
                "rows": self.counts["added"],
                "warnings": list(self.scan.warnings),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "counts": {k: v for k, v in self.counts.items() if k != "added"},
                **noted,
            }
        )


@contextmanager
def adding(
    list_path: str, plan: Plan, config: SourceConfig, limit: int | None, deny: Deny, copies: Path
) -> Iterator[Addition]:
    """What a list adds to a plan. A remote list is copied into `copies`, a folder.

    A list whose content and settings are those of one of the plan's is that list: it adds what a larger `limit` asks
    for. Of another the rows that the plan does not know are new, as far as the deny-lists allow them; `limit` takes
    that many of them.
    Raises UserError where the list or its settings are at fault, or its columns do not go with those that are there.
    """
    _require_settings(plan, config)
    found = find(list_path, copies)
    scan = open_scan(found, config, limit)
    index = _same_list(plan, found, scan.inputs, config)
    grows = index < len(plan.lists)
    extra_columns = plan.extra_columns
    if not grows:
        remedy = "Rename columns there, or name those that are kept of this list: `--set source.columns=[...]`"
        extra_columns = with_columns(extra_columns, str(plan.data), scan.extra_columns, found.name, remedy)
    own = {*scan.extra_columns.names}
    scan.extra_columns = plan.list_columns(index) if grows else extra_columns
    scan.absent = frozenset(scan.extra_columns.names) - own
    with growing(plan, index, found, scan, config, limit, deny, extra_columns) as addition:
        yield addition


@contextmanager
def growing(
    plan: Plan,
    index: int,
    found: Found,
    scan: ListScan,
    config: SourceConfig,
    limit: int | None,
    deny: Deny,
    extra_columns: pa.Schema,
) -> Iterator[Addition]:
    """What an opened list adds, as another or, where it is one of the plan's, as far as a larger limit asks for it."""
    lists = plan.lists
    taken, more = 0, limit
    if index < len(lists):
        taken, before = lists[index]["rows"], lists[index]["source"]["--limit"]
        more = None if limit is None else max(0, limit - taken)
        if before is None or (limit is not None and limit <= before):
            more = 0
        if more != 0:
            scan.planned_hash = _planned_hash(plan, index, found, config)
    addition = Addition(
        plan=plan,
        found=found,
        scan=scan,
        config=config,
        limit=limit,
        index=index,
        extra_columns=extra_columns,
        own_rows=lists[index]["listed_rows"] if index < len(lists) else 0,
        counts=dict.fromkeys(("new", "added", "changed_caption", "denied", "without_url"), 0) | {"known": taken},
    )
    if more == 0 or (taken and scan.planned_hash is None):  # all of it is there
        scan.kept = [0] * len(scan.inputs)
        yield addition
        return
    others = len(lists) > 1 or index == len(lists)
    scan.known = KnownRows(plan, index, scan.schema, found.base, deny) if others else None
    try:
        count_rows(scan, more)
        left_out = dict(scan.known.counts) if scan.known is not None else {}
        addition.counts |= left_out | {"new": scan.listed_rows, "added": sum(scan.kept)}
        addition.counts["known"] = taken + left_out.get("known", 0)
        addition.own_rows = taken + scan.listed_rows
        yield addition
    finally:
        if scan.known is not None:
            scan.known.close()


def _planned_hash(plan: Plan, index: int, found: Found, config: SourceConfig) -> int | None:
    """Up to which hash a limit has taken the rows of a list; None: all of them."""
    facts = plan.lists[index]
    if "limit_hash" in facts:
        return facts["limit_hash"]
    before = scan_list(found, config, facts["source"]["--limit"])  # a plan of before it was noted
    if sum(before.kept) != facts["rows"] + facts.get("left_out", 0):
        raise UserError(f"{found.name}: has changed since the plan was made. {ANEW}")
    return before.limit_hash


def _require_settings(plan: Plan, config: SourceConfig) -> None:
    """UserError where a setting differs that all lists of a plan have in common."""
    ours, theirs = settings(config, None), plan.facts["source"]
    changed = [k for k in ours if k not in (*_OF_ITS_OWN, "--limit") and ours[k] != theirs.get(k)]
    if changed:
        name = changed[0]
        raise UserError(f"{name} was {theirs.get(name)!r} and is {ours[name]!r} now: all lists of {plan.data} share it")


def _same_list(plan: Plan, found: Found, inputs: Sequence[Input], config: SourceConfig) -> int:
    """Which of the plan's lists this is, by content and settings, the last one first; their number where it is none."""
    ours = settings(config, None)
    contents: list[str] | None = None
    for index in reversed(range(len(plan.lists))):
        one = plan.lists[index]
        planned = [fact for fact in plan.facts["inputs"] if fact.get("list", 0) == index]
        same = one["kind"] == found.kind and len(planned) == len(inputs)
        if not same or any(ours[name] != one["source"].get(name) for name in _OF_ITS_OWN):
            continue
        if found.base is not None and str(found.base) != one["base"]:
            continue  # images of the same names elsewhere
        contents = [source.digest() for source in inputs] if contents is None else contents
        if all(
            content == fact["sha256"] and source.constants == fact.get("constants", {})
            for content, fact, source in zip(contents, planned, inputs, strict=True)
        ):
            return index
    return len(plan.lists)


def with_columns(there: pa.Schema, place: str, more: pa.Schema, name: str, remedy: str) -> pa.Schema:
    """The extra columns that are there (in `place`), and those that `name` has beside; UserError, which says what to
    do, where one is of another type, or they are too many."""
    columns = {f.name: f.type for f in there}
    for f in more:
        known = columns.setdefault(f.name, f.type)
        kinds = (pa.types.is_integer, pa.types.is_floating)
        same = any(kind(known) and kind(f.type) for kind in kinds)  # csv knows no narrow numbers; who writes finds out
        if not same and common_type(known, f.type) != known:
            column = printable(f.name, 80)
            raise UserError(f"{name}: column {column!r} is {f.type} here and {known} in {place}. {remedy}")
    if len(columns) > MOST_EXTRA:
        raise UserError(
            f"{name}: {len(columns):,} extra columns would be kept with each row; at most {MOST_EXTRA:,} can be. "
            f"{remedy}"
        )
    return pa.schema(list(columns.items()))


def _first_input(plan: Plan, index: int) -> int:
    return next(i for i, fact in enumerate(plan.facts["inputs"]) if fact.get("list", 0) == index)


def _remove_unfinished(plan: Plan) -> None:
    """Remove what a run wrote that was killed before its plan was whole."""
    data = plan.data
    for name in data.store.names(data.plan_folder):
        if name.endswith(".parquet") and f"plan/{name}" not in {*plan.facts["made_of"], shards_file(plan.facts)}:
            data.remove(data.plan_folder / name)
