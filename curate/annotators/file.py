"""file: columns that somebody else computed, from a table whose rows name images."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.files import atomic
from aesthetic.untrusted import printable
from curate.annotators.base import AnnotatorOptions, ColumnSpec, TableAnnotator, TableRun
from curate.ledger.schema import Status, stored_name
from curate.store.files import digest, read_table, sha256_file

if TYPE_CHECKING:
    import duckdb

    from curate.layout import Data
    from curate.sources.inputs import Input

_NAMES = ("key", "url", "sha256", "uid")
_OF_PANDAS = re.compile(r"__index_level_\d+__|Unnamed: \d+|")  # row numbers, which its writers leave beside the columns


class FileColumns(TableAnnotator):
    """Columns of a file that others made: scores, captions, labels. Each of its rows names an image, `on` says how.

    parquet, csv, tsv, JSON or JSON lines, read as lists are. Images that no row names have null, and so have values
    that are NaN or infinite. Rows that name no image of the data are counted, and listed in unmatched.parquet.
    """

    name = "file"
    inputs: Sequence[Literal["fetched", "embedded"]] = ("fetched",)

    class Options(AnnotatorOptions):
        """on: the column that names images, as the data does; uid is the list's own column of that name.

        columns: which become columns; default: all others.
        """

        path: Path
        on: Literal["key", "url", "sha256", "uid"]
        columns: tuple[str, ...] | None = None

    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.path = options.path.expanduser()
        file = open_table(self.path)
        names = {name.lower(): name for name in reversed(file.schema.names)}
        self._on = (file.url if options.on == "url" else None) or names.get(options.on, "")
        if not self._on:
            raise UserError(f"{self.path} has no column {options.on}; it has {_listed(file.schema.names)}")
        kind = file.schema.field(self._on).type
        if not pa.types.is_string(kind) and not (pa.types.is_integer(kind) and self.path.suffix != ".parquet"):
            raise UserError(f"{self.path}: {self._on} holds {kind}; text is expected")
        beside = {self._on, *(names[n] for n in _NAMES if n in names)}
        others = [n for n in file.schema.names if n not in beside and not _OF_PANDAS.fullmatch(n)]
        wanted = others if options.columns is None else list(options.columns)
        if missing := [n for n in wanted if n not in file.schema.names]:
            raise UserError(f"{self.path} has no column {missing[0]}; it has {_listed(file.schema.names)}")
        self._columns = {re.sub(r"\W", "_", name, flags=re.ASCII).lower(): name for name in wanted}
        if not wanted or len(self._columns) < len(wanted):
            raise UserError(f"{self.path}: {'no column of values' if not wanted else 'two columns have one name'}")
        types = {name: file.schema.field(name).type for name in wanted}
        if odd := [name for name, kind in types.items() if not _is_plain(kind)]:
            fit = _listed([name for name in wanted if name not in odd])
            raise UserError(
                f"{self.path}: {odd[0]} holds {types[odd[0]]}; numbers, text, dates or booleans are expected"
                + (f". `columns: [{fit}]` leaves it out" if fit else "")
            )
        self._url = names.get("url") if options.on == "key" else None  # to tell keys of another data folder
        self.columns = {
            suffix: ColumnSpec(meaning=f"{name} of {self.path.name}", type=types[name])
            for suffix, name in self._columns.items()
        }

    @cached_property
    def digest(self) -> str:
        """Of the file's bytes, and of what is taken from it."""
        return digest([self.name, sha256_file(self.path), self._on, sorted(self._columns.values())])

    def annotate_all(self, run: TableRun) -> Iterator[dict[str, pa.Array]]:
        """The file's values, shard by shard. UserError where two rows name one image, or rows name images by keys of
        another data folder."""
        import duckdb

        from curate.ledger.sql import batches, connect, sql_memory, too_much

        folder = run.data.index(run.name)
        folder.mkdir(parents=True, exist_ok=True)
        con = connect(folder.resolve(), sql_memory())  # what does not fit into its memory lies there meanwhile
        try:
            counts = list[int]()
            _fill(con, "theirs", self._rows())
            _fill(con, "ours", _images(run, self.options.on, counts))
            self._check(con)
            unmatched = self._write_unmatched(con, folder / "unmatched.parquet")
            if unmatched:
                run.data.push(folder / "unmatched.parquet")
            else:
                run.data.remove(folder / "unmatched.parquet")
            note = self._note(con, unmatched, str(folder.relative_to(run.data.root)))
            run.say(f"{run.name}: {note}")
            values = ", ".join(f"v{i}" for i in range(len(self._columns)))
            joined = (
                f"SELECT row, {values} FROM ours LEFT JOIN theirs USING (name) WHERE place IS NOT NULL ORDER BY place"
            )
            for table in _cut(batches(con, joined), counts):
                without = {f"without a row in {self.path.name}": table["row"].null_count}
                self.facts = {"file": str(self.path), "on": self.options.on, "notes": [note], "counts": without}
                yield {suffix: table[f"v{i}"].combine_chunks() for i, suffix in enumerate(self._columns)}
        except duckdb.OutOfMemoryException:
            raise UserError(f"columns.{run.name}: joining {self.path} {too_much()}") from None
        finally:
            con.close()

    def _rows(self) -> Iterator[pa.RecordBatch]:
        """The file's rows, after an empty batch: row (from 0), name, url, v0, v1 and so on."""
        kinds = [spec.type for spec in self.columns.values()]
        fields = [("row", pa.int64()), ("name", pa.string()), ("url", pa.string())]
        schema = pa.schema(fields + [(f"v{i}", kind) for i, kind in enumerate(kinds)])
        yield pa.RecordBatch.from_pylist([], schema)
        at = 0
        for batch in open_table(self.path).batches([*self._columns.values(), self._on, self._url or self._on]):
            url = batch[self._url].cast(pa.string()) if self._url else pa.nulls(len(batch), pa.string())
            values = [batch[name].cast(kind) for name, kind in zip(self._columns.values(), kinds, strict=True)]
            index = pa.array(np.arange(at, at + len(batch)))
            name = _as_name(batch[self._on].cast(pa.string()), self.options.on)
            yield pa.RecordBatch.from_arrays([index, name, url, *values], schema=schema)
            at += len(batch)

    def _check(self, con: duckdb.DuckDBPyConnection) -> None:
        """UserError where the file cannot mean what it says."""
        twice = "SELECT name FROM theirs WHERE name IS NOT NULL GROUP BY name HAVING count(*) > 1 ORDER BY 1 LIMIT 1"
        if found := con.execute(twice).fetchall():
            raise UserError(f"{self.path} has two rows of the {self.options.on} {printable(found[0][0], 200)}")
        other = (
            "SELECT name, theirs.url, ours.url FROM theirs JOIN ours USING (name) "
            "WHERE theirs.url <> ours.url ORDER BY 1 LIMIT 1"
        )
        if self._url and (found := con.execute(other).fetchall()):
            key, theirs, ours = (printable(text, 200) for text in found[0])
            raise UserError(
                f"{self.path}: the key {key} is {theirs} there, and {ours} here: it has the keys of another data "
                "folder. `on: url`"
            )

    def _write_unmatched(self, con: duckdb.DuckDBPyConnection, path: Path) -> int:
        """List the rows that name no image, and why not; returns how many there are."""
        from curate.ledger.sql import batches

        sql = (
            "SELECT row, theirs.name, CASE WHEN theirs.name IS NULL THEN 'it names nothing' "
            "WHEN ours.name IS NULL THEN 'not in the list' ELSE 'its image was not fetched' END AS reason "
            "FROM theirs LEFT JOIN (SELECT name, max(place) AS place FROM ours GROUP BY name) AS ours USING (name) "
            "WHERE ours.place IS NULL ORDER BY row"
        )
        reader, count = batches(con, sql), 0
        with atomic(path) as f, pq.ParquetWriter(f, reader.schema, compression="zstd") as writer:
            for batch in reader:
                writer.write_batch(batch)
                count += len(batch)
        return count

    def _note(self, con: duckdb.DuckDBPyConnection, unmatched: int, folder: str) -> str:
        """What status and the card say of the file."""
        ((rows,),) = con.execute("SELECT count(*) FROM theirs").fetchall()
        note = f"{self.path.name}: {rows:,} row{'' if rows == 1 else 's'}, {rows - unmatched:,} of them name an image"
        if unmatched:
            note += f"; {unmatched:,} name none, and are listed in {folder}/unmatched.parquet"
        if rows and unmatched == rows:
            theirs, ours = (
                printable(con.execute(f"SELECT min(name) FROM {table}").fetchall()[0][0], 100)
                for table in ("theirs", "ours")
            )
            note += f" (its {self.options.on} is such as {theirs}, here {ours})"
        return note


def open_table(path: Path) -> Input:
    """A file of others' columns, by what it is called, as an input. UserError where it can't be read."""
    try:
        found = path.stat()
    except OSError as e:
        raise UserError(f"{path}: {'there is no such file' if isinstance(e, FileNotFoundError) else e}") from None
    return _open_table(path, (found.st_size, found.st_mtime_ns))


@cache
def _open_table(path: Path, version: tuple[int, int]) -> Input:
    """Once a process: of a table of text all rows are read to find the types."""
    from curate.sources.lists import open_list

    return open_list(path, url="url", caption=None)


def _fill(con: duckdb.DuckDBPyConnection, name: str, rows: Iterator[pa.RecordBatch]) -> None:
    """Make a table of batches, the first of which says what columns it has."""
    for i, batch in enumerate(rows):
        con.register("_batch", pa.Table.from_batches([batch]))
        con.execute(f"INSERT INTO {name} SELECT * FROM _batch" if i else f"CREATE TABLE {name} AS SELECT * FROM _batch")
        con.unregister("_batch")


def _images(run: TableRun, on: str, counts: list[int]) -> Iterator[pa.RecordBatch]:
    """The rows of the list, a shard at a time: place (among the images of the run; null: it has none), name and url.
    Appends the number of images of each shard."""
    column, at = _uid_column(run.data) if on == "uid" else on, 0
    for shard in run.shards:
        table = read_table(run.data.local(run.data.table(shard)), list(dict.fromkeys([column, "url", "status"])))
        if column not in table.column_names:  # of a list that was added later
            table = table.append_column(column, pa.nulls(len(table), pa.string()))
        fetched = pc.equal(table["status"], Status.SUCCESS.value).combine_chunks()
        place = pc.add(pc.cumulative_sum(fetched.cast(pa.int64())), at - 1)
        name, url = (table[c].cast(pa.string()).combine_chunks() for c in (column, "url"))
        count = pc.sum(fetched).as_py() or 0
        counts.append(count)
        at += count
        place = pc.if_else(fetched, place, pa.scalar(None, pa.int64()))
        yield pa.RecordBatch.from_arrays([place, _as_name(name, on), url], names=["place", "name", "url"])


def _uid_column(data: Data) -> str:
    """The list's own column uid, as it is stored."""
    for field in data.plan.extra_columns:
        if field.name.lower() == "uid" and pa.types.is_string(field.type):
            return stored_name(field.name)
    raise UserError("on: uid: the list carries no text column uid")


def _as_name(values: pa.Array, on: str) -> pa.Array:
    """Names of images as they are compared: hex digits in lower case."""
    return pc.utf8_lower(values) if on in ("sha256", "uid") else values


def _cut(batches: pa.RecordBatchReader, counts: Sequence[int]) -> Iterator[pa.Table]:
    """The rows of batches in tables of so many."""
    left, schema = pa.table({name: [] for name in batches.schema.names}, batches.schema), batches.schema
    for count in counts:
        while len(left) < count:
            left = pa.concat_tables([left, pa.Table.from_batches([batches.read_next_batch()], schema)])
        yield left.slice(0, count)
        left = left.slice(count)


def _is_plain(kind: pa.DataType) -> bool:
    """Whether a column of ours can be of this type."""
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string, pa.types.is_decimal)
    return any(test(kind) for test in (*tests, pa.types.is_date, pa.types.is_timestamp))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(printable(name, 80) for name in names[:40]) + (", ..." if len(names) > 40 else "")
