"""The ledger as one DuckDB view over all tables of a data folder; nothing is stored twice.

DuckDB itself may touch no file (curate.ledger.sql): the tables reach it as pyarrow datasets that we open.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from curate.ledger.schema import EMBEDDED_COLUMNS, FETCHED_COLUMNS, URL_COLUMNS, Status, list_name
from curate.ledger.sql import Bounds, check_one_select, connect, literal, parse, quote, reader, short, walk
from curate.store.files import digest, read_json, sha256_file
from curate.store.records import output_digests

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

OURS = [name for name, _ in URL_COLUMNS + FETCHED_COLUMNS]
"""The columns of `fetched/` that are ours; every other one is the list's, under `source` (`ledger.stored_name`)."""


@dataclass(frozen=True)
class Table:
    """One table of a data folder: `fetched`, `embedded` or `annotated/NAME`, in files that are committed shards."""

    name: str
    columns: tuple[str, ...]  # what it adds to the ledger; none for `fetched`
    key: str  # its key column
    shards: tuple[str, ...]
    files: tuple[Path, ...]
    records: tuple[Path, ...]


def tables(root: Path) -> list[Table]:
    """The tables that a data folder holds, `fetched` first. A shard without its record is not there yet.

    Raises UserError where nothing is fetched.
    """
    fetched = _table(root, "fetched", "{}.parquet", "{}_stats.json")
    if fetched is None:
        raise UserError(f"{root} holds no fetched shard. `tastemaker fetch LIST --out {root}` makes them.")
    found = [fetched]
    if embedded := _table(root, "embedded", "metadata/metadata_{}.parquet", "stats/{}.json"):
        names = pq.read_schema(embedded.files[0]).names
        if "similarity" in names:
            key = "key" if "key" in names else "image_path"
            found.append(replace(embedded, columns=("similarity",), key=key))
    taken = {n.lower() for n in OURS} | {"similarity", "source"}
    for folder in sorted((root / "annotated").glob("*")) if (root / "annotated").is_dir() else []:
        if table := _table(root, f"annotated/{folder.name}", "{}.parquet", "{}.json"):
            columns = tuple(name for name in pq.read_schema(table.files[0]).names if name != table.key)
            for column in columns:
                if column.lower() in taken:
                    raise UserError(f"{folder}: the ledger has a column {column} already (SQL ignores case)")
                taken.add(column.lower())
            found.append(replace(table, columns=columns))
    return found


def _table(root: Path, name: str, file: str, record: str) -> Table | None:
    before, after = (root / name / record).parent, record.rpartition("/")[2]
    ending = after.removeprefix("{}")
    found = [p.name.removesuffix(ending) for p in before.glob("*" + ending)]
    shards = [s for s in found if s.isdigit() and (root / name / file.format(s)).is_file()]
    shards.sort(key=lambda s: (len(s), s))  # six digits come after five
    if not shards:
        return None
    files = tuple(root / name / file.format(s) for s in shards)
    return Table(name, (), "key", tuple(shards), files, tuple(root / name / record.format(s) for s in shards))


# ------------------------------------------------------------------------------------------------------------ opening


def open_ledger(
    root: Path, needed: set[str] | None = None, *, memory_limit: str | None = None
) -> duckdb.DuckDBPyConnection:
    """A connection with the view `ledger`, a line per row of the list, and `verdicts` (selection, key, verdict).

    Columns: `key`, the other columns of `fetched/` that are ours, `source` (a STRUCT of the list's own columns),
    `similarity` and those of annotators; null where a row has no image. Where the list has two columns that differ in
    case only, the second is called NAME_1. With `needed` (names as rules write them: `similarity`, `source.WIDTH`),
    only these tables are joined and only these fields are in `source`: joining costs seconds at ten million rows.

    `_fetched` is the same without what annotators made, so without joins. `_aligned` holds the rows with an image alone
    and joins by position: its column `aligned` is TRUE where the keys agree, as they do by the data folder's contract.
    That takes half the time of the join by key.
    Raises UserError where nothing is fetched.
    """
    import pyarrow.dataset as ds  # slow: it brings pandas

    root = Path(root).resolve()
    found = tables(root)
    con = connect(root, memory_limit)
    wanted = None if needed is None else {n.lower() for n in needed}
    joined = [t for t in found[1:] if wanted is None or any(c.lower() in wanted for c in t.columns)]
    for i, table in enumerate([found[0], *joined]):
        con.register(f"_table{i}", ds.dataset([str(p) for p in table.files], format="parquet"))
    columns, source = fetched_columns(pq.read_schema(found[0].files[0]))
    fields = [(name, c) for name, c in source.items() if wanted is None or f"source.{name}".lower() in wanted]
    con.execute(f"CREATE VIEW ledger AS {_join(columns, fields, joined, by_position=False)}")
    con.execute(f"CREATE VIEW _fetched AS {_join(columns, fields, [], by_position=False)}")
    con.execute(f"CREATE VIEW _aligned AS {_join(columns, fields, joined, by_position=True)}")
    _verdicts(con, root)
    return con


def fetched_columns(schema: pa.Schema) -> tuple[dict[str, int | None], dict[str, int]]:
    """Where columns lie in `fetched/NNNNN.parquet`: ours (None: a folder of img2dataset's lacks it), and the list's."""
    places = {name: i for i, name in enumerate(schema.names)}
    columns = {name: places.get(name) for name in ["key", *(n for n in OURS if n != "key")]}
    source: dict[str, int] = {}
    seen: set[str] = set()
    for name, i in places.items():
        if name not in columns:
            source[_unique(list_name(name), seen)] = i
    return columns, source


def _unique(name: str, seen: set[str]) -> str:
    """A name that no other has in any case; it is added to those that were seen."""
    unique, n = name, 0
    while unique.lower() in seen:
        n += 1
        unique = f"{name}_{n}"
    seen.add(unique.lower())
    return unique


def _join(
    columns: Mapping[str, int | None], fields: Sequence[tuple[str, int]], joined: Sequence[Table], *, by_position: bool
) -> str:
    """The SELECT behind a view. Positions, not names: DuckDB takes `WIDTH` and `width` for one name."""
    types = ledger_types()
    values = {n: f"f.c{i}" if i is not None else f"CAST(NULL AS {types[n]})" for n, i in columns.items()}
    items = [f"{value} AS {quote(name)}" for name, value in values.items()]
    if fields:
        packed = ", ".join(f"{quote(name)} := f.c{i}" for name, i in fields)
        items.append(f"struct_pack({packed}) AS source")
    items += [f"t{i}.{quote(column)}" for i, t in enumerate(joined, 1) for column in t.columns]
    count = 1 + max([i for i in columns.values() if i is not None] + [i for _, i in fields])
    fetched = f"_table0 AS f({', '.join(f'c{i}' for i in range(count))})"
    if by_position:
        same = [f"t{i}.{quote(t.key)} = {values['key']}" for i, t in enumerate(joined, 1)]
        items.append(f"({' AND '.join(same) or 'true'}) AS aligned")
        fetched = f"(SELECT * FROM {fetched} WHERE {values['status']} = '{Status.SUCCESS}') AS f"
        joins = "".join(f" POSITIONAL JOIN _table{i} AS t{i}" for i in range(1, len(joined) + 1))
    else:
        joins = "".join(
            f" LEFT JOIN _table{i} AS t{i} ON t{i}.{quote(t.key)} = {values['key']}" for i, t in enumerate(joined, 1)
        )
    return f"SELECT {', '.join(items)} FROM {fetched}{joins}"


def _verdicts(con: duckdb.DuckDBPyConnection, root: Path) -> None:
    import pyarrow.dataset as ds

    parts = []
    found = [p for p in (root / "selected").glob("[!.]*.parquet") if p.with_suffix(".json").exists()]
    for i, path in enumerate(sorted(found)):
        con.register(f"_selected{i}", ds.dataset(str(path), format="parquet"))
        parts.append(
            f"SELECT {literal(path.stem)} AS selection, key, CAST(verdict AS VARCHAR) AS verdict FROM _selected{i}"
        )
    nothing = "SELECT '' AS selection, '' AS key, '' AS verdict WHERE false"
    con.execute(f"CREATE VIEW verdicts AS {' UNION ALL '.join(parts) or nothing}")


# -------------------------------------------------------------------------------------------------------------- types


def recorded_columns(found: Sequence[Table]) -> dict[str, dict[str, Any]]:
    """What records say of annotators' columns: name -> type, scale, unit, meaning, unsafe, and what made it."""
    columns: dict[str, dict[str, Any]] = {}
    for table in found:
        if table.name.startswith("annotated/"):
            record = read_json(table.records[0]) or {}
            made = {k: v for k, v in record.items() if k not in ("inputs", "outputs", "self", "count", "columns")}
            specs = record.get("columns", {})
            columns |= {name: {**specs.get(name, {}), **made} for name in table.columns}
    return columns


def recorded_types(root: Path) -> dict[str, str]:
    """The columns of the ledger that a data folder has now, with their DuckDB types; empty where nothing is fetched."""
    try:
        return types_there(root)[0]
    except UserError:
        return {}


def recorded_scales(root: Path) -> dict[str, tuple[float, float]]:
    """The scales of the columns that a data folder holds; empty where nothing is fetched."""
    try:
        found = recorded_columns(tables(root))
    except UserError:
        return {}
    return {name: (float(c["scale"][0]), float(c["scale"][1])) for name, c in found.items() if c.get("scale")}


def ledger_types() -> dict[str, str]:
    """The ledger's own columns and their DuckDB types, whatever the list and the annotators are."""
    return dict(_own_types())


@functools.cache
def _own_types() -> tuple[tuple[str, str], ...]:
    own = URL_COLUMNS + FETCHED_COLUMNS + EMBEDDED_COLUMNS
    return tuple(zip([n for n, _ in own], sql_types([t for _, t in own]), strict=True))


def source_types(extra_columns: pa.Schema) -> dict[str, str]:
    """The list's own columns (a plan's `extra_columns`) as fields of `source`, with their DuckDB types."""
    seen: set[str] = set()
    return dict(zip([_unique(n, seen) for n in extra_columns.names], sql_types(extra_columns.types), strict=True))


def types_there(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(columns of the ledger, fields of `source`) that a data folder has now, with their DuckDB types."""
    found = tables(root)
    own = {n: t for n, t in ledger_types().items() if n in OURS}
    schemas = [(t, pq.read_schema(t.files[0])) for t in found[1:]]
    arrow = {column: schema.field(column).type for t, schema in schemas for column in t.columns}
    types = dict(zip(arrow, sql_types(list(arrow.values())), strict=True))
    fetched = pq.read_schema(found[0].files[0])
    source = fetched_columns(fetched)[1]
    return own | types, dict(zip(source, sql_types([fetched.types[i] for i in source.values()]), strict=True))


def sql_types(kinds: Sequence[pa.DataType]) -> list[str]:
    """What DuckDB calls Arrow types."""
    if not kinds:
        return []
    with duckdb.connect(":memory:") as con:
        con.register("t", pa.table([pa.array([], k) for k in kinds], names=[f"c{i}" for i in range(len(kinds))]))
        return [row[0] for row in con.execute("SELECT column_type FROM (DESCRIBE t)").fetchall()]


# ---------------------------------------------------------------------------------------------------------- freshness


def table_digests(found: Sequence[Table]) -> dict[str, str]:
    """One short digest per table over the sha256 of its files: what a stage that reads whole tables notes as inputs."""
    digests = {}
    for table in found:
        files = {}
        for path, record in zip(table.files, table.records, strict=True):
            value = read_json(record)
            whole = isinstance(value, dict) and "outputs" in value  # img2dataset's own records name no files
            files[path.name] = output_digests(value) if whole else sha256_file(path)
        digests[table.name] = digest(files)
    return digests


def check_current(root: Path, found: Sequence[Table]) -> None:
    """Raise UserError where a table lacks a shard that has images, or was made from files that have changed since.

    `found` starts with `fetched`. Such rows would count as rows without a value, and nobody would notice.
    """
    made: dict[str, str] = {}
    with_images = []
    for shard, record in zip(found[0].shards, found[0].records, strict=True):
        value = read_json(record) or {}
        made |= output_digests(value) if "outputs" in value else {}
        if value.get("successes", 1):
            with_images.append(shard)
    for path in sorted((root / "embedded" / "stats").glob("*.json")):  # heads read these
        value = read_json(path) or {}
        made |= output_digests(value) if "outputs" in value else {}
    if any("fetched" in (read_json(t.records[0]) or {}).get("inputs", {}) for t in found[1:]):
        made |= table_digests([t for t in found if t.name in ("fetched", "embedded")])  # read by those that read all
    for table in found[1:]:
        again = f"tastemaker {'embed' if table.name == 'embedded' else 'annotate'} {root}"
        missing = [s for s in with_images if s not in table.shards]
        if missing:
            raise UserError(
                f"{table.name} lacks {len(missing):,} of {len(with_images):,} fetched shards "
                f"(the first is {missing[0]}). `{again}` makes them."
            )
        for shard, record in zip(table.shards, table.records, strict=True):
            inputs = (read_json(record) or {}).get("inputs", {})
            if stale := next((n for n, sha in inputs.items() if made.get(n, sha) != sha), None):
                raise UserError(f"{table.name}/{shard} was made from an older {stale}. `{again}` makes it anew.")


def is_current(root: Path, found: Sequence[Table]) -> bool:
    """Whether check_current has nothing to say."""
    try:
        check_current(root, found)
    except UserError:
        return False
    return True


# -------------------------------------------------------------------------------------------------------------- query


class Answer:
    """The rows of one SELECT over `ledger` and `verdicts`, as they come: nothing holds them all.

    `columns` are their names, made different where SQL gives one name twice.
    """

    def __init__(self, root: Path, sql: str) -> None:
        """Raises UserError for other statements, for SQL errors, and where nothing is fetched."""
        check_one_select(sql)
        self._con = open_ledger(root, _mentioned(root, sql))
        self._bounds = Bounds(self._con)
        try:
            self._rows = self._run(lambda: reader(self._con, sql, 1 << 14))
        except BaseException:
            self._bounds.close()
            raise
        self.columns = _different(self._rows.schema.names)
        self.schema = pa.schema([f.with_name(n) for f, n in zip(self._rows.schema, self.columns, strict=True)])

    def __enter__(self) -> Answer:
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
            raise UserError(short(e)) from None


def query(root: Path, sql: str) -> pd.DataFrame:
    """The rows of one SELECT over `ledger` and `verdicts`, all at once. Raises what `Answer` does."""
    with Answer(root, sql) as answer:
        return pa.Table.from_batches(answer.batches(), answer.schema).to_pandas()


def _different(names: Sequence[str]) -> list[str]:
    """The names, with _1, _2 and so on after those that were there before."""
    found: list[str] = []
    for name in names:
        unique, n = name, 0
        while unique in found:
            n += 1
            unique = f"{name}_{n}"
        found.append(unique)
    return found


def _mentioned(root: Path, sql: str) -> set[str] | None:
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
    columns, source = types_there(root)
    text = sql.lower().replace('""', '"')
    return {n for n in columns if n.lower() in text} | {f"source.{n}" for n in source if n.lower() in text}
