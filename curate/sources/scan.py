"""Which rows of a list belong to its plan, found before anything is written: columns, types, `where`, `limit`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aesthetic.errors import UserError
from aesthetic.untrusted import printable
from curate.ledger.sql import Bounds, connect, parse_condition, volatile_functions, walk
from curate.sources.columns import column_as, common_type, describe, is_texts, listed
from curate.sources.find import Found
from curate.sources.inputs import FAILURES, PLACE_COLUMNS, Input, with_constants
from curate.sources.known import KnownRows
from curate.sources.lists import ParquetInput
from curate.sources.parquet import check_pages, parquet_batches
from curate.sources.plan import SourceConfig

MOST_EXTRA = 1_000
"""Extra columns at most: each is a column of every table, and a field of every sample's JSON."""

_SEED = 0x7461737465  # of the order in which --limit takes rows; a change gives other rows to everyone


@dataclass
class ListScan:
    """What a list holds, and which of its rows are wanted."""

    inputs: list[Input]
    schema: pa.Schema  # the columns of all inputs, under the list's names
    extra_columns: pa.Schema
    absent: frozenset[str] = frozenset()  # of these, those that other lists of the plan have and this one has not
    predicate: Predicate | None = None  # of source.where
    warnings: list[str] = field(default_factory=list)  # what a run says before it begins
    listed_rows: int = 0
    kept: list[int] = field(default_factory=list)  # rows per input, after where and limit
    limit_hash: int | None = None  # rows whose hash is above it are beyond the limit
    planned_hash: int | None = None  # and those up to this one are in the plan that grows
    known: KnownRows | None = None  # which other rows are left out, as the plan has them from other lists
    taken: list[np.ndarray] = field(default_factory=list)  # per input, where rows are known: which are not left out

    def masks(self, index: int) -> Iterator[np.ndarray]:
        """What `where` keeps of an input, and is not known, in pieces; without either no row is read."""
        source = self.inputs[index]
        if self.predicate is None and self.known is None:
            for start in range(0, source.rows, 1 << 20):
                yield np.ones(min(1 << 20, source.rows - start), dtype=bool)
            return
        wanted = {source.url or "url"}  # at least one: a batch needs a length
        wanted |= set(self.predicate.columns) if self.predicate is not None else set()
        wanted |= {n for n in (source.caption, self.known.uid) if n} if self.known is not None else set()
        for batch in source.batches(sorted(wanted)):
            batch = with_constants(batch, source.constants)
            mask = np.ones(batch.num_rows, bool) if self.predicate is None else self._mask(batch)
            if self.known is not None:
                mask[mask] = self.known.are_new(batch.filter(pa.array(mask)), source)
            yield mask

    def _mask(self, batch: pa.RecordBatch) -> np.ndarray:
        """The rows for which `where` is true, and broken lines, which nothing can be said of."""
        assert self.predicate is not None
        fields = [f for f in self.schema if f.name in self.predicate.columns]
        table = pa.table({f.name: column_as(batch, f.name, f.type) for f in fields})
        kept = self.predicate.mask(table, batch.num_rows)
        reason = FAILURES[0][0]
        if reason in batch.schema.names:
            kept = kept | batch.column(reason).is_valid().to_numpy(zero_copy_only=False)
        return kept

    def _unplanned(self, index: int, start: int, count: int) -> np.ndarray:
        """Whether rows of an input are not in the plan that grows, as a limit took them."""
        if self.planned_hash is None:
            return np.ones(count, bool)
        return row_hashes(index, start, count) > np.uint64(self.planned_hash)

    def kept_rows(self, index: int) -> Iterator[pa.RecordBatch]:
        """The rows of one input that belong to the plan, in order."""
        source = self.inputs[index]
        wanted = {n for n in (source.url, source.caption) if n} | set(self.extra_columns.names) - self.absent
        if self.predicate is not None:
            wanted |= set(self.predicate.columns)
        start = 0
        for batch in source.batches(sorted(wanted)):
            count = batch.num_rows
            within = self._unplanned(index, start, count)
            if self.limit_hash is not None:
                within &= row_hashes(index, start, count) <= np.uint64(self.limit_hash)
            if self.taken:
                within &= self.taken[index][start : start + count]
            batch = batch if within.all() else batch.filter(pa.array(within))
            batch = with_constants(batch, source.constants)
            if self.predicate is not None and not self.taken and batch.num_rows:
                batch = batch.filter(pa.array(self._mask(batch)))
            start += count
            if batch.num_rows:
                yield batch


def scan_list(found: Found, config: SourceConfig, limit: int | None) -> ListScan:
    """Open the files of a list and count the rows that are wanted. UserError where list or settings are wrong."""
    scan = open_scan(found, config, limit)
    count_rows(scan, limit)
    if not scan.listed_rows:
        rows = sum(source.rows for source in scan.inputs)
        raise UserError(f"source.where: {config.where} keeps none of the {rows:,} rows.")
    return scan


def open_scan(found: Found, config: SourceConfig, limit: int | None) -> ListScan:
    """Open the files of a list; nothing is counted yet. UserError where list or settings are wrong."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: it must be at least 1")
    inputs = [found.open(file, config.url, config.caption) for file in found.files]
    if not sum(source.rows for source in inputs):
        raise UserError(f"{found.name}: has no rows.")
    for source in inputs:
        if source.url is None and source.rows:
            columns = describe(source.schema.names, "url")
            raise UserError(f"{source.path}: there is no column of URLs. `--set source.url=NAME` names one. {columns}")
    schema = _common_schema(inputs)
    scan = ListScan(inputs, schema, _extra_columns(found, inputs, schema, config))
    if config.where is not None:
        scan.predicate = Predicate(config.where, schema, "source.where")
    used = [*scan.extra_columns.names, *(scan.predicate.columns if scan.predicate else ())]
    for source in inputs:
        if isinstance(source, ParquetInput):
            check_pages(source.path, [n for n in (source.url, source.caption, *used) if n])

    scan.warnings = _warnings(found, inputs, wants_captions=config.caption is not None)
    return scan


def count_rows(scan: ListScan, limit: int | None) -> None:
    """Find which rows are wanted: those that `where` keeps, are not known and not planned, `limit` of them at most."""
    hashes, owners = np.empty(0, np.uint64), np.empty(0, np.int64)
    scan.kept = [0] * len(scan.inputs)
    for index in range(len(scan.inputs)):
        start, masks = 0, list[np.ndarray]()
        for mask in scan.masks(index):
            mask = mask & scan._unplanned(index, start, len(mask))
            count = int(mask.sum())
            scan.kept[index] += count
            if limit is not None and count:
                hashes = np.concatenate([hashes, row_hashes(index, start, len(mask))[mask]])
                owners = np.concatenate([owners, np.full(count, index)])
                if len(hashes) > limit:  # the rows with the smallest hashes stay, whatever part of the list they are in
                    smallest = np.argpartition(hashes, limit - 1)[:limit]
                    hashes, owners = hashes[smallest], owners[smallest]
            start += len(mask)
            if scan.known is not None:
                masks.append(mask)
        if scan.known is not None:
            scan.taken.append(np.concatenate([np.empty(0, bool), *masks]))
    scan.listed_rows = sum(scan.kept)
    if limit is not None and limit < scan.listed_rows:
        scan.limit_hash = int(hashes.max())
        scan.kept = np.bincount(owners, minlength=len(scan.inputs)).tolist()


def row_hashes(index: int, start: int, count: int) -> np.ndarray:
    """A number for each of `count` rows of an input: without pattern, and never twice (splitmix64's mixing)."""
    x = np.arange(start, start + count, dtype=np.uint64) + np.array([(index << 40) + _SEED], dtype=np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


# ------------------------------------------------------------------------------------------------------------- columns


def _common_schema(inputs: list[Input]) -> pa.Schema:
    """The columns of all files of the list, in order of appearance, each in the type that fits all of them."""
    types: dict[str, pa.DataType] = {}
    for source in inputs:
        for f in source.schema:
            own = pa.string() if f.name == source.caption and is_texts(f.type) else f.type
            common = common_type(types[f.name], own) if f.name in types else own
            if common is None:
                raise UserError(f"{source.path}: column {f.name!r} is {own} here and {types[f.name]} in other files.")
            types[f.name] = common
        for role, name in (("url", source.url), ("caption", source.caption)):
            if name and pa.types.is_nested(source.schema.field(name).type) and types[name] != pa.string():
                raise UserError(
                    f"{source.path}: column {name!r} ({role}) holds {source.schema.field(name).type}, not text."
                )
    return pa.schema([(n, pa.string() if pa.types.is_null(t) else t) for n, t in types.items()])


def _extra_columns(found: Found, inputs: list[Input], schema: pa.Schema, config: SourceConfig) -> pa.Schema:
    used = {n for source in inputs for n in (source.url, source.caption) if n}
    if config.caption is None:
        used.add("caption")
    if config.columns is None:
        # what pandas calls an index that has no name, in parquet and in csv: no column of the list
        names = [n for n in schema.names if n not in used and n and not n.startswith("__index_level_")]
    else:
        names = [n for n in dict.fromkeys(config.columns) if n not in used]
    for name in names:
        if name not in schema.names:
            raise UserError(
                f"{found.name}: there is no column {name!r} (source.columns). {describe(schema.names, name)}"
            )
    if found.base is not None and (taken := [n for n in names if n in dict(PLACE_COLUMNS)]):
        raise UserError(f"{found.name}: the column {taken[0]!r} has a name that is needed here. Rename it.")
    if len(names) > MOST_EXTRA:
        raise UserError(
            f"{found.name}: {len(names):,} extra columns would be kept with each row; at most {MOST_EXTRA:,} can be. "
            f"Name those that matter in source.columns: {listed(names)}"
        )
    return pa.schema([schema.field(n) for n in names])


# ------------------------------------------------------------------------------------------------------------ warnings

_A_PATH = r"^(/[^/]|\.\.?[/\\]|~/|[A-Za-z]:[/\\][^/]|file:)"


def _warnings(found: Found, inputs: list[Input], wants_captions: bool) -> list[str]:
    """What a run says before it begins: of rows and values that are not taken as they are, and missing captions."""
    first = inputs[0]
    warnings = [f"{found.name}: {note}" for note in found.notes]
    if found.base is None:
        warnings += _paths_for_urls(first)
    warnings += [f"{found.shown(s)}: {sentence}" for s in inputs for sentence in s.problems.sentences()]
    if not wants_captions:
        return warnings
    if first.local:
        rows, without = sum(s.rows for s in inputs), sum(s.uncaptioned for s in inputs)
        where = found.name if found.remote else first.path if len(inputs) == 1 else first.path.parent
        if without == rows:
            warnings.append(
                f"{where}: none of the {rows:,} images has a caption. Captions are NAME.txt beside NAME.jpg (in a "
                "tar or a folder), or a column `text` or `caption` of the table that the images are in, or that "
                "names them"
            )
        elif without:
            warnings.append(f"{where}: {without:,} of {rows:,} images have no caption")
    lacking = [s for s in inputs if s.caption is None and not s.local and s.rows]
    if lacking:
        texts = [f.name for f in lacking[0].schema if pa.types.is_string(f.type) and f.name != lacking[0].url]
        of = f" ({len(lacking):,} of {len(inputs):,} files)" if len(inputs) > 1 else ""
        warnings.append(
            f"{found.shown(lacking[0])}{of}: no column of captions was found, so all captions are null. "
            + (
                f"Columns of text: {listed(texts)}. `--set source.caption=NAME` takes one"
                if texts
                else "It has no other column of text"
            )
        )
    return warnings


def _paths_for_urls(source: Input) -> list[str]:
    """A sentence where the first values of the column of URLs are paths on this machine."""
    if source.url is None:
        return []
    columns = [source.url]
    batches = (
        parquet_batches(source.path, columns, [0]) if isinstance(source, ParquetInput) else source.batches(columns)
    )
    batch = next(batches, None)
    values = batch.column(source.url) if batch is not None and source.url in batch.schema.names else pa.array([])
    if not pa.types.is_string(values.type) or not len(values := values.drop_null()):
        return []
    if not pc.all(pc.match_substring_regex(values, _A_PATH)).as_py():
        return []
    return [
        f"{source.path}: the first {len(values):,} values of column {printable(source.url, 80)!r} are paths, not URLs: "
        f"{printable(values[0], 80)!r}. Images on this machine are given as the folder that they lie in"
    ]


# ------------------------------------------------------------------------------------------------------- source.where


class Predicate:
    """A condition on the list's own columns, in DuckDB's SQL, decided row by row; `columns` are those that it names.

    DuckDB sees one batch of rows at a time and nothing else (curate.ledger.sql), and what would make the answer depend
    on other rows or on the moment (subqueries, aggregates, random(), now()) is refused.
    """

    def __init__(self, condition: str, schema: pa.Schema, name: str) -> None:
        """`name` is the key of the recipe that the condition comes from. Raises UserError where it is not usable."""
        self.condition, self._name, self._names = condition, name, schema.names
        self._connection = connect()
        self._bounds = Bounds(self._connection)

        if not self.condition.strip():
            raise self._error("is empty; write null for no condition.")
        try:
            parts = list(walk(parse_condition(self.condition)))
        except UserError as e:
            raise self._error(str(e)) from None
        except RecursionError:
            raise self._error("it is nested too deep.") from None
        classes = {p.get("class") for p in parts}
        if "SUBQUERY" in classes:
            raise self._error("a subquery; each row is decided by itself.")
        if "STAR" in classes:
            raise self._error("name the columns one by one; * and COLUMNS() stand for more than one answer.")
        functions = {p["function_name"] for p in parts if p.get("class") == "FUNCTION"}
        if volatile := functions & volatile_functions():
            raise self._error(
                f"{min(volatile)}() gives another answer each time. "
                "For a part of the list use --limit, or a hash: hash(url) % 10 = 0."
            )
        folded = {n.lower(): n for n in reversed(schema.names)}
        named = [n for p in parts if p.get("class") == "COLUMN_REF" for n in p["column_names"]]
        wanted = {n if n in schema.names else folded.get(n.lower()) for n in named}
        self.columns = [n for n in schema.names if n in wanted]

        # the empty table says what DuckDB objects to: first as a condition (no aggregates there), then as it is used
        empty = schema.empty_table().select(self.columns)
        self._run(f"SELECT true AS keep FROM list WHERE (\n{condition}\n)", empty, 0)
        self.mask(empty, 0)

    def mask(self, table: pa.Table, rows: int) -> np.ndarray:
        """Whether the condition is TRUE, for each row of a table with at least the columns that it names."""
        sql = f"SELECT coalesce(CAST((\n{self.condition}\n) AS BOOLEAN), false) AS keep FROM list"
        return self._run(sql, table, rows)

    def _run(self, sql: str, table: pa.Table, rows: int) -> np.ndarray:
        if not self.columns:  # a table must have one
            table = pa.table({"@": pa.nulls(rows)})
        self._connection.register("list", table)
        try:
            return self._bounds.run(lambda: self._connection.sql(sql).to_arrow_table().column("keep")).to_numpy()
        except UserError as e:  # too much memory or time
            raise self._error(str(e)) from None
        except duckdb.Error as e:
            if unknown := re.search(r'Referenced (?:column|table) "(.+?)" not found', str(e)):
                why = f"there is no column {unknown[1]!r}. {describe(self._names, unknown[1])}"
                raise self._error(why) from e
            raise self._error(re.sub(r"^\w+ Error: ", "", str(e).strip().splitlines()[0])) from e
        finally:
            self._connection.unregister("list")

    def _error(self, why: str) -> UserError:
        return UserError(f"{self._name}: {self.condition}: {why}")
