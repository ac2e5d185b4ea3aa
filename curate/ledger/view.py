"""The ledger as one DuckDB view over all tables of a data folder; nothing is stored twice.

DuckDB itself may touch no file (curate.ledger.sql): the tables reach it as pyarrow datasets that we open.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.errors import UserError, nearest
from curate.ledger.schema import (
    EMBEDDED_COLUMNS,
    FETCHED_COLUMNS,
    OPT_OUTS,
    URL_COLUMNS,
    Status,
    fetched_schema,
    list_name,
)
from curate.ledger.sql import Bounds, batches, check_one_select, connect, literal, parse, quote, short, walk
from curate.store.files import digest, read_table, sha256_file
from curate.store.records import output_digests

if TYPE_CHECKING:
    import pandas as pd

    from curate.layout import Data

T = TypeVar("T")

_MANY, _SMALL = 64, 64_000  # files of a table, and bytes of one, from and up to which they are read one by one

OURS = [name for name, _ in URL_COLUMNS + FETCHED_COLUMNS]
"""The columns of `fetched/` that are ours; every other one is the list's, under `source` (`schema.stored_name`)."""


@dataclass(frozen=True)
class LedgerTable:
    """One table of a data folder, in files of committed shards: `fetched`, `embedded`, or that of an annotator."""

    data: Data = field(repr=False)
    name: str  # the folder: `annotated/aesthetic`
    key: str  # its key column
    columns: tuple[str, ...]  # what it adds to the ledger; nothing for `fetched`
    shards: tuple[int, ...]
    files: tuple[Path, ...]
    records: tuple[Path, ...]

    def of(self, shards: Collection[int]) -> LedgerTable:
        """The part of the table that some shards are."""
        kept = [i for i, shard in enumerate(self.shards) if shard in shards]
        files, records = (tuple(paths[i] for i in kept) for paths in (self.files, self.records))
        return replace(self, shards=tuple(self.shards[i] for i in kept), files=files, records=records)

    @cached_property
    def facts(self) -> list[dict[str, Any]]:
        """What the records say, {} for what is none of ours."""
        self.data.look(self.records)
        return [self.data.record(record) for record in self.records]

    @cached_property
    def notes(self) -> list[str]:
        """What the records ask to be repeated (`notes_of`), which takes a look at each."""
        return notes_of(self.facts)

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of its files; files may lack those of lists that were added later (`conform`)."""
        if self.name == "fetched" and self.data.record(self.data.plan_record).get("added"):
            return fetched_schema(self.data.plan.extra_columns)
        return pq.read_schema(self.data.local(self.files[0]))

    @property
    def partial(self) -> bool:
        """Whether it lacks rows of images that early rules left out, by its first shard: vectors alone may."""
        record, fetched = (self.data.record(p) for p in (self.records[0], self.data.fetched_record(self.shards[0])))
        return "early" in record and record.get("sample_count", 0) < fetched.get("successes", 0)

    def digest(self) -> str:
        """A short digest over the sha256 of the files: what a stage that reads whole tables notes as its input."""
        digests = {
            path.name: output_digests(facts) if "outputs" in facts else sha256_file(path)  # img2dataset's name no files
            for path, facts in zip(self.files, self.facts, strict=True)
        }
        return digest(digests)


def tables(data: Data, shards: Sequence[int] | None = None) -> list[LedgerTable]:
    """The tables that a data folder holds, `fetched` first, or their part of these shards. A shard without its record
    is not there yet.

    Raises UserError where nothing is fetched, or where two tables have a column of the same name.
    """
    fetched = _table(data, shards, data.table(0).parent, data.fetched_record, data.table)
    if fetched is None:
        raise UserError(f"{data} holds no fetched shard. `tastemaker fetch LIST --out {data}` makes them.")
    found = [replace(fetched, columns=())]
    embedded = _table(data, shards, data.space.parent, data.embedded_record, data.metadata)
    if embedded and "similarity" in embedded.columns:
        found.append(replace(embedded, columns=("similarity",)))
    taken = {n.lower() for n in OURS} | {"similarity", "source"}
    for name in data.annotated():
        folder = data.annotations(name, 0).parent
        table = _table(data, shards, folder, partial(data.annotations_record, name), partial(data.annotations, name))
        if table is None:
            continue
        for column in table.columns:
            if column.lower() in taken:
                raise UserError(f"{folder}: the ledger has a column {column} already (SQL ignores case)")
            taken.add(column.lower())
        found.append(table)
    return found


def _table(
    data: Data,
    wanted: Sequence[int] | None,
    folder: Path,
    record: Callable[[int], Path],
    file: Callable[[int], Path],
) -> LedgerTable | None:
    """The committed shards of a table, or of those wanted, with all its columns; None where there is none."""
    if wanted is None:
        there = {*data.shards(file)}
        shards = tuple(s for s in data.shards(record) if s in there)
    else:
        shards = tuple(s for s in wanted if data.exists(record(s)) and data.exists(file(s)))
    if not shards:
        return None
    data.bring(file(shards[0]))
    names = pq.read_schema(file(shards[0])).names
    key = "key" if "key" in names else "image_path"  # as clip-retrieval has it
    columns = tuple(n for n in names if n != key)
    name = str(folder.relative_to(data.root))
    return LedgerTable(data, name, key, columns, shards, tuple(map(file, shards)), tuple(map(record, shards)))


# ------------------------------------------------------------------------------------------------------------ opening


def open_ledger(
    data: Data,
    needed: set[str] | None = None,
    *,
    found: Sequence[LedgerTable] | None = None,
    memory_limit: str | None = None,
) -> duckdb.DuckDBPyConnection:
    """A connection with the view `ledger`, a line per row of the list, and `verdicts` (selection, key, verdict).

    Columns: `key`, the other columns of `fetched/` that are ours, `source` (a STRUCT of the list's own columns),
    `similarity` and those of the annotators; null where a row has no image. Where the list has two columns that differ
    in case only, the second is called NAME_1. With `needed` (names as rules write them: `similarity`, `source.WIDTH`),
    only these columns are there, and key, status, reason: joining costs seconds at ten million rows.
    `found` are the tables, or parts of them, instead of all that the folder holds.

    `_fetched` is the same without joins. `_aligned` holds the rows with an image alone and joins by position: its
    column `aligned` is TRUE where the keys agree, as they do by the data folder's contract. That takes half the time
    of the join by key, which remains for a table that is partial.
    Raises UserError where nothing is fetched.
    """
    import pyarrow.dataset as ds  # slow: it brings pandas

    found = tables(data) if found is None else found
    con = connect(data.root.resolve(), memory_limit)
    wanted = None if needed is None else {n.lower() for n in needed}
    joined = [t for t in found[1:] if wanted is None or any(c.lower() in wanted for c in t.columns)]
    columns, source = fetched_columns(schema := found[0].schema)
    if wanted is not None:
        columns = {n: i for n, i in columns.items() if n in wanted or n in ("key", "status", "reason")}
    fields = [(name, c) for name, c in source.items() if wanted is None or f"source.{name}".lower() in wanted]
    places = sorted({c for c in columns.values() if c is not None}.union(c for _, c in fields))
    fetched = f"_table0 AS f({', '.join(f'c{i}' for i in range(len(schema)))})"
    for i, table in enumerate([found[0], *joined]):
        data.bring(*table.files)
        if _small(table):
            _load(con, f"_table{i}", table, None if i else places)
            fetched = fetched if i else "_table0 AS f"
        else:
            schema_of = None if i else schema
            con.register(f"_table{i}", ds.dataset([str(p) for p in table.files], schema=schema_of, format="parquet"))
    con.execute(f"CREATE VIEW ledger AS {_join(fetched, columns, fields, joined, by_position=False)}")
    con.execute(f"CREATE VIEW _fetched AS {_join(fetched, columns, fields, [], by_position=False)}")
    con.execute(f"CREATE VIEW _aligned AS {_join(fetched, columns, fields, joined, by_position=True)}")

    parts = ["SELECT '' AS selection, '' AS key, '' AS verdict WHERE false"]
    for i, name in enumerate(n for n in data.selections() if data.exists(data.verdicts(n))):
        con.register(f"_selected{i}", ds.dataset(str(data.local(data.verdicts(name))), format="parquet"))
        parts.append(f"SELECT {literal(name)}, key, CAST(verdict AS VARCHAR) FROM _selected{i}")
    con.execute(f"CREATE VIEW verdicts AS {' UNION ALL '.join(parts)}")
    return con


def _small(table: LedgerTable) -> bool:
    """Whether a table is in so many and so small files that opening them costs more than their rows: pyarrow's datasets
    take 0.5 ms and 50 kB for each, each time."""
    sizes = [stamp[0] for file in table.files if (stamp := table.data.store.stamp(file))]
    return len(sizes) >= _MANY and sum(sizes) < _SMALL * len(sizes)


def _load(con: duckdb.DuckDBPyConnection, name: str, table: LedgerTable, places: Sequence[int] | None) -> None:
    """Copy a table into DuckDB's memory, which spills: all columns, or those at these places as c0, c1 and so on."""
    schema = table.schema
    read = schema if places is None else pa.schema([schema.field(i) for i in places])
    names = read.names if places is None else [f"c{i}" for i in places]
    stored = pa.schema([f.with_name(name) for f, name in zip(read, names, strict=True)])
    con.register("_rows", stored.empty_table())
    con.execute(f"CREATE TEMP TABLE {name} AS FROM _rows")
    for start in range(0, len(table.files), 1000):  # a reader of all would have DuckDB's threads wait busily for it
        parts = [conform(read_table(file, read.names), read) for file in table.files[start : start + 1000]]
        con.register("_rows", pa.concat_tables(parts).rename_columns(names).combine_chunks())
        con.execute(f"INSERT INTO {name} FROM _rows")
    con.unregister("_rows")


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of a schema, null where a table lacks them."""
    there = {*table.column_names}
    columns = [table[f.name].cast(f.type) if f.name in there else pa.nulls(len(table), f.type) for f in schema]
    return pa.table(columns, schema=schema)


def fetched_columns(schema: pa.Schema) -> tuple[dict[str, int | None], dict[str, int]]:
    """Where columns lie in `fetched/NNNNN.parquet`: ours (None: a folder of img2dataset's lacks it), and the list's."""
    places = {name: i for i, name in enumerate(schema.names)}
    columns = {name: places.get(name) for name in ["key", *(n for n in OURS if n != "key")]}
    others = [name for name in places if name not in columns]
    return columns, {new: places[name] for new, name in zip(_distinct(map(list_name, others)), others, strict=True)}


def _distinct(names: Iterable[str], same: Callable[[str], str] = str.lower) -> list[str]:
    """The names, with _1, _2 and so on after those that were there before, in any case."""
    found: dict[str, str] = {}
    for name in names:
        unique, n = name, 0
        while same(unique) in found:
            n += 1
            unique = f"{name}_{n}"
        found[same(unique)] = unique
    return list(found.values())


def _join(
    fetched: str,
    columns: Mapping[str, int | None],
    fields: Sequence[tuple[str, int]],
    joined: Sequence[LedgerTable],
    *,
    by_position: bool,
) -> str:
    """The SELECT behind a view. Positions, not names: DuckDB takes `WIDTH` and `width` for one name."""
    types = ledger_types()
    values = {n: f"f.c{i}" if i is not None else f"CAST(NULL AS {types[n]})" for n, i in columns.items()}
    items = [f"{value} AS {quote(name)}" for name, value in values.items()]
    if fields:
        packed = ", ".join(f"{quote(name)} := f.c{i}" for name, i in fields)
        items.append(f"struct_pack({packed}) AS source")
    items += [f"t{i}.{quote(c)}" for i, t in enumerate(joined, 1) for c in t.columns]
    same = {i: f"t{i}.{quote(t.key)} = {values['key']}" for i, t in enumerate(joined, 1)}
    placed = [i for i, t in enumerate(joined, 1) if by_position and not t.partial]
    if by_position:
        items.append(f"({' AND '.join(same[i] for i in placed) or 'true'}) AS aligned")
        fetched = f"(SELECT * FROM {fetched} WHERE {values['status']} = '{Status.SUCCESS}') AS f"
    joins = [f" POSITIONAL JOIN _table{i} AS t{i}" for i in placed]
    joins += [f" LEFT JOIN _table{i} AS t{i} ON {sql}" for i, sql in same.items() if i not in placed]
    return f"SELECT {', '.join(items)} FROM {fetched}{''.join(joins)}"


# -------------------------------------------------------------------------------------------------------------- types


@cache
def ledger_types() -> Mapping[str, str]:
    """The ledger's own columns and their DuckDB types, whatever the list and the annotators are."""
    own = URL_COLUMNS + FETCHED_COLUMNS + EMBEDDED_COLUMNS
    return dict(zip([n for n, _ in own], sql_types([t for _, t in own]), strict=True))


def source_types(extra_columns: pa.Schema) -> dict[str, str]:
    """The list's own columns (`Plan.extra_columns`) as fields of `source`, with their DuckDB types."""
    return dict(zip(_distinct(extra_columns.names), sql_types(extra_columns.types), strict=True))


def column_types(found: Sequence[LedgerTable]) -> tuple[dict[str, str], dict[str, str]]:
    """(columns of the ledger, fields of `source`) that the tables hold, with their DuckDB types."""
    types = {n: t for n, t in ledger_types().items() if n in OURS}
    for table in found[1:]:
        schema = pq.read_schema(table.data.local(table.files[0]))
        types |= zip(table.columns, sql_types([schema.field(c).type for c in table.columns]), strict=True)
    fetched = found[0].schema
    source = fetched_columns(fetched)[1]
    return types, dict(zip(source, sql_types([fetched.types[i] for i in source.values()]), strict=True))


def recorded_columns(found: Sequence[LedgerTable]) -> dict[str, dict[str, Any]]:
    """What records say of annotators' columns: name -> type, scale, unit, meaning, unsafe, hidden, and what made it."""
    facts = dict[str, dict[str, Any]]()
    for table in found[1:]:
        if "similarity" in table.columns:
            continue
        record = {k: v for k, v in table.facts[0].items() if k not in ("inputs", "outputs", "self", "count", "spent")}
        record |= {"notes": [*table.notes]} if table.notes else {}
        record.pop("counts", None)  # of its shard alone; notes have the sums
        specs = record.pop("columns", {})
        facts |= {column: {**specs.get(column, {}), **record} for column in table.columns}
    return facts


def notes_of(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The sentences that an annotator's records ask to be repeated, each once; and of how many images they say what."""
    notes, counts = dict[str, None](), Counter[str]()
    for record in records:
        notes |= dict.fromkeys(str(note) for note in record.get("notes") or ())
        counts.update(record.get("counts") or {})
    return [*notes, *(f"{count:,} image{'' if count == 1 else 's'} {what}" for what, count in counts.items())]


def hidden_columns(found: Sequence[LedgerTable]) -> dict[str, str]:
    """The columns that say which images must not be seen (`ColumnSpec.hidden`), and the table of each."""
    hidden = [column for column, facts in recorded_columns(found).items() if facts.get("hidden")]
    return {column: table.name for column in hidden for table in found[1:] if column in table.columns}


def hidden_condition(columns: Iterable[str]) -> str:
    """SQL that is true of what such columns hide, and false of all else."""
    return " OR ".join(f"coalesce({quote(c)}, false)" for c in columns) or "false"


def hidden_keys(found: Sequence[LedgerTable], hidden: Mapping[str, str], shard: int) -> set[str]:
    """The keys of the images of a shard that must not be seen; `hidden` as `hidden_columns` has it."""
    keys = set[str]()
    for column, name in hidden.items():
        table = next(t for t in found if t.name == name)
        at = bisect.bisect_left(table.shards, shard)
        if table.shards[at : at + 1] == (shard,):
            rows = pq.read_table(table.data.local(table.files[at]), columns=[table.key, column])
            keys.update(rows.filter(pc.fill_null(rows[column], False))[table.key].to_pylist())
    return keys


def recorded_scales(found: Sequence[LedgerTable]) -> dict[str, tuple[float, float]]:
    """The (lowest, highest) value of the columns that have such a scale."""
    scales = {column: facts.get("scale") for column, facts in recorded_columns(found).items()}
    return {column: (float(scale[0]), float(scale[1])) for column, scale in scales.items() if scale}


def known_columns(data: Data) -> tuple[dict[str, str], dict[str, tuple[float, float]]]:
    """The columns of the ledger that a data folder has now, and their scales; nothing where nothing is fetched."""
    try:
        found = tables(data)
    except UserError:
        return {}, {}
    return column_types(found)[0], recorded_scales(found)


def sql_types(kinds: Sequence[pa.DataType]) -> list[str]:
    """What DuckDB calls Arrow types."""
    return _sql_types(tuple(kinds))


@lru_cache(256)  # asking takes 20 ms
def _sql_types(kinds: tuple[pa.DataType, ...]) -> list[str]:
    if not kinds:
        return []
    with duckdb.connect(":memory:") as con:
        con.register("t", pa.table([pa.array([], k) for k in kinds], names=[f"c{i}" for i in range(len(kinds))]))
        return [row[0] for row in con.execute("SELECT column_type FROM (DESCRIBE t)").fetchall()]


# ---------------------------------------------------------------------------------------------------------- freshness


def table_digests(found: Sequence[LedgerTable]) -> dict[str, str]:
    """The digest of each table, by its name."""
    return {table.name: table.digest() for table in found}


def current_tables(data: Data, found: Sequence[LedgerTable], used: Collection[str]) -> list[LedgerTable]:
    """`fetched`, which `found` starts with, and the other tables that are whole and up to date.

    UserError where one of those that are `used`, by name, is not: its rows would count as rows without a value, and
    nobody would notice. One that nobody uses must not hold anything up.
    """
    wrong = outdated_tables(data, found)
    if first := next((wrong[t.name] for t in found if t.name in used and t.name in wrong), None):
        raise UserError(first)
    return [t for t in found if t.name not in wrong]


def outdated_tables(data: Data, found: Sequence[LedgerTable]) -> dict[str, str]:
    """The tables that lack a shard, or were made from what has changed since, and what to do about each."""
    fetched, *others = found
    made: dict[str, str] = {}  # what is there now: file -> sha256
    embedded = (data.record(data.embedded_record(s)) for s in data.shards(data.embedded_record))
    for facts in (*fetched.facts, *embedded, *(facts for table in others for facts in table.facts)):
        made |= output_digests(facts) if "outputs" in facts else {}
    whole = {name for table in others for name in table.facts[0].get("inputs", {})}  # that some were made from
    made |= table_digests([t for t in found if t.name in whole])
    with_images = {s for s, facts in zip(fetched.shards, fetched.facts, strict=True) if facts.get("successes", 1)}

    wrong = {}
    for table in others:
        by = "embed" if "similarity" in table.columns else "annotate"
        by = "check-opt-outs" if table.facts[0].get("annotator") == OPT_OUTS else by
        again = f"tastemaker {by} {data}"
        if missing := with_images.difference(table.shards):
            wrong[table.name] = (
                f"{table.name} lacks {len(missing):,} of {len(with_images):,} fetched shards "
                f"(the first is {min(missing):05d}). `{again}` makes them."
            )
            continue
        for shard, facts in zip(table.shards, table.facts, strict=True):
            inputs = facts.get("inputs", {})
            if stale := next((n for n, sha in inputs.items() if made.get(n, sha) != sha), None):
                shard_of = f"{table.name}/{shard:05d}"
                wrong[table.name] = f"{shard_of} was made from an older {stale}. `{again}` makes it anew."
                break

    return wrong


# -------------------------------------------------------------------------------------------------------------- query


class QueryResult:
    """The rows of one SELECT over `ledger` and `verdicts`, as they come: nothing holds them all.

    `columns` are their names, made different where SQL gives one name twice.
    """

    def __init__(self, data: Data, sql: str) -> None:
        """Raises UserError for other statements, for SQL errors, and where nothing is fetched."""
        check_one_select(sql)
        self._data = data
        found = tables(data)
        self._con = open_ledger(data, _mentioned(found, sql), found=found)
        self._bounds = Bounds(self._con)
        try:
            self._rows = self._run(lambda: batches(self._con, sql, 1 << 14))
        except BaseException:
            self._bounds.close()
            raise
        self.columns = _distinct(self._rows.schema.names, same=str)
        self.schema = pa.schema([f.with_name(n) for f, n in zip(self._rows.schema, self.columns, strict=True)])

    def __enter__(self) -> QueryResult:
        return self

    def __exit__(self, *_: object) -> None:
        self._bounds.close()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows. UserError where a row has an error of SQL's, or where they take too much memory or time."""
        while (batch := self._run(self._next)) is not None:
            yield pa.RecordBatch.from_arrays(batch.columns, schema=self.schema)

    def _next(self) -> pa.RecordBatch | None:
        try:
            return self._rows.read_next_batch()
        except StopIteration:
            return None
        except (OSError, pa.ArrowException) as e:  # what pyarrow makes of an error of DuckDB's in mid-stream
            if "Out of Memory Error" in str(e):
                raise MemoryError from None
            raise duckdb.Error(str(e)) from None

    def _run(self, work: Callable[[], T]) -> T:
        try:
            return self._bounds.run(work)
        except duckdb.Error as e:
            raise UserError(_no_column(self._data, e) or short(e)) from None


def query(data: Data, sql: str) -> pd.DataFrame:
    """The rows of one SELECT over `ledger` and `verdicts`, all at once. Raises what `QueryResult` does."""
    with QueryResult(data, sql) as answer:
        return pa.Table.from_batches(answer.batches(), answer.schema).to_pandas()


def _no_column(data: Data, error: Exception) -> str:
    """What to say of a column that there is not. DuckDB's own suggestions are of those that the query names."""
    unknown = re.match(r'Binder Error: Referenced column "(.*)" not found in FROM clause', str(error))
    if not unknown:
        return ""
    columns, source = column_types(tables(data))
    there = [*columns, *(f"source.{name}" for name in source), "selection", "verdict"]
    near = nearest(unknown[1], there)
    return f"there is no column {unknown[1]}. " + (f"Did you mean {near}?" if near else f"There are {', '.join(there)}")


def _mentioned(found: Sequence[LedgerTable], sql: str) -> set[str] | None:
    """The columns whose names occur in a query; None (all) where it may mean columns that it doesn't name."""
    tree = parse(sql)
    nodes = list(walk(tree))
    aliases = {"ledger"} | {str(n["alias"]).lower() for n in nodes if n.get("type") == "BASE_TABLE"}
    whole = any(
        n.get("class") == "STAR"
        or n.get("type") == "SHOW_REF"
        or (n.get("class") == "COLUMN_REF" and n["column_names"][-1].lower() in aliases | {"source"})
        for n in nodes
    )
    if tree["error"] or whole:
        return None
    columns, source = column_types(found)
    text = sql.lower().replace('""', '"')
    return {n for n in columns if n.lower() in text} | {f"source.{n}" for n in source if n.lower() in text}
