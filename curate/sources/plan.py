"""The plan of a data folder: which rows of which file each shard is, and how they are read.

It lies in `plan/`: `shards.parquet` says for each shard which rows of which file it is, `plan.json` (written last) what
it was made of. `planner` makes it, once; the same list and settings give the same plan. Other lists may be added to it
(`adding`): the first is what plan.json says at its top, the others follow in its `added`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from curate.ledger.schema import URL_COLUMNS, Reason, RowError, stored_schema
from curate.sources.columns import column_as, stored_batch, stored_own
from curate.sources.dataset import read_image
from curate.sources.find import stat
from curate.sources.image_tables import parquet_images
from curate.sources.inputs import FAILURES, PLACE_COLUMNS, with_constants
from curate.sources.parquet import rows_between
from curate.sources.problems import Problems
from curate.store.clients import is_url
from curate.store.files import digest, read_json, sha256_file
from curate.store.records import record_digest

if TYPE_CHECKING:
    from curate.layout import Data
    from curate.sources.remote_tars import RemoteTarFile

VERSION = 1

MOST_HELD = 512 << 20
"""Bytes of the text of a shard; beyond them, long texts are null."""

SHARDS = pa.schema([("shard", pa.int64()), ("file", pa.string()), ("offset", pa.int64()), ("rows", pa.int64())])

ANEW = "Give another --out to start anew."
_AGAIN = "the command that made it makes it again."


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What of the list is used (recipe: `source`)."""

    url: str = "url"  # column; the default also finds the usual names, `columns.URL_NAMES`
    caption: str | None = "caption"  # column; the default also finds `columns.CAPTION_NAMES`; None: no captions
    shard_size: int = 10_000  # rows per shard at most, img2dataset's number; a short list has eight smaller ones
    where: str | None = None  # SQL condition on the list's own columns; other rows are not part of the list
    columns: tuple[str, ...] | None = None  # extra columns that are kept; None: all others

    def __post_init__(self) -> None:
        if isinstance(self.columns, str):
            raise UserError(f"source.columns: a list of names is needed, such as [{self.columns}]")
        if self.columns is not None:
            object.__setattr__(self, "columns", tuple(self.columns))
        if isinstance(self.shard_size, bool) or not isinstance(self.shard_size, int) or self.shard_size < 1:
            raise UserError(f"source.shard_size: {self.shard_size!r} is no number of rows; it must be at least 1")


@dataclass(frozen=True)
class ShardPlan:
    """Which rows a shard is: `rows` rows of `file` (absolute, or relative to the data folder) from `offset` on."""

    shard: int
    file: str
    offset: int
    rows: int


@dataclass(frozen=True)
class Place:
    """Where an image's bytes lie: on this machine, or in a tar on an object store."""

    path: Path | RemoteTarFile
    offset: int
    size: int | None  # None: `offset` is a row of a parquet file

    def begin(self, most: int) -> bytes:
        """The first bytes, `most` at most; none where they can't be had without the others, or are all."""
        if self.size is None or self.size <= most or not isinstance(self.path, Path):
            return b""
        return read_image(self.path, self.offset, most)

    def read(self) -> bytes:
        """The bytes. Raises UserError where they are gone: the folder is not the one that was planned.

        RowError where they are too many, or where a row of a parquet file holds none.
        """
        path = self.path if isinstance(self.path, Path) else self.path.local()
        if self.size is None:
            return parquet_images(path).read(self.offset)
        data = read_image(path, self.offset, self.size)
        if len(data) != self.size:
            raise UserError(f"{self.path}: is shorter than when the plan was made. {ANEW}")
        return data


@dataclass(frozen=True)
class Row:
    """One line of the list: to be fetched from `url` where neither a place nor a failure is given."""

    url: str | None
    caption: str | None
    place: Place | None = None  # where the bytes are already
    failure: RowError | None = None  # what the row came with instead of bytes


@dataclass(frozen=True)
class SourceShard:
    """The rows of one shard."""

    shard: int
    table: pa.Table  # url, caption, and the extra columns, under the names that they are stored by
    digest: str  # `Plan.shard_digest`
    own_columns: pa.Table | None = (
        None  # PLACE_COLUMNS of folders of images; @reason, @error of lists with broken lines
    )
    base: Path | str | None = None  # of the places; of those on an object store its URL
    etag: str = ""  # of the tar there
    notes: tuple[str, ...] = ()  # what of these rows could not be taken as it is, in sentences

    @property
    def local(self) -> bool:
        """Whether nothing of this shard is to be fetched."""
        return self.base is not None

    def file(self, name: str) -> Path | RemoteTarFile:
        """The file that a place is in."""
        assert self.base is not None
        if isinstance(self.base, Path):
            return self.base / name
        from curate.sources.remote_tars import RemoteTarFile

        return RemoteTarFile(self.base, name, self.etag)

    def rows(self) -> list[Row]:
        """The rows one by one, in the order of the table."""
        urls, captions = (self.table.column(name).to_pylist() for name in ("url", "caption"))
        rows = []
        for i, own in enumerate(self.own_columns.to_pylist() if self.own_columns is not None else [{}] * len(urls)):
            place, failure = None, None
            if own.get("@reason"):
                failure = RowError(Reason(own["@reason"]), own["@error"] or "")
            elif self.base is not None and own["@path"] is None:  # the plan was made to forget it
                failure = RowError(Reason.REMOVED)
            elif self.base is not None:
                place = Place(self.file(own["@path"]), own["@offset"], own["@size"])
            rows.append(Row(urls[i], captions[i], place, failure))
        return rows


@dataclass(frozen=True)
class Plan:
    """The shards of a data folder, and their rows."""

    data: Data = field(repr=False)
    shards: list[ShardPlan] = field(repr=False)
    extra_columns: pa.Schema
    total_rows: int  # rows of all shards
    listed_rows: int  # rows of the list after `where`, before `limit`
    facts: Mapping[str, Any] = field(repr=False)  # what plan.json holds

    @staticmethod
    def of(data: Data, facts: Mapping[str, Any], shards: list[ShardPlan]) -> Plan:
        """From what its two files hold."""
        added = facts.get("added", [])
        extra_columns = _schema_of((added[-1] if added else facts)["carried_schema"])
        listed_rows = facts["listed_rows"] + sum(one["listed_rows"] for one in added)
        return Plan(data, shards, extra_columns, facts["total_rows"], listed_rows, facts)

    @property
    def list(self) -> str:
        """The (first) list as it was given."""
        return self.facts["list"]

    @property
    def lists(self) -> Sequence[Mapping[str, Any]]:
        """What is known of each list that rows were taken from, in that order: its name (`list`), `kind`, `base`,
        `remote`, its settings (`source`), `rows` that were taken and `listed_rows` that could be; of those that were
        added also `date`, and `counts` of other rows.
        """
        added = self.facts.get("added", [])
        first = {**self.facts, "rows": self.total_rows - sum(one["rows"] for one in added)}
        return [first, *added]

    def list_index(self, shard: int) -> int:
        """Which of the lists a shard is of."""
        return self.facts["inputs"][self.facts["made_of"][self.shards[shard].file]].get("list", 0)

    def list_of(self, shard: int) -> Mapping[str, Any]:
        """The list that a shard is of, as plan.json has it; the first list's has more in it."""
        index = self.list_index(shard)
        return self.facts["added"][index - 1] if index else self.facts

    def list_columns(self, index: int) -> pa.Schema:
        """The extra columns of a list's shards: its own, and those of the lists before it."""
        return _schema_of((self.facts["added"][index - 1] if index else self.facts)["carried_schema"])

    @property
    def columns(self) -> dict[str, str | None]:
        """What the (first) list calls the columns of URLs and captions; {} for folders of images."""
        first = self.facts["inputs"][0]
        return {"url": first["url"], "caption": first["caption"]} if self.facts["kind"] == "list" else {}

    @property
    def warnings(self) -> Sequence[str]:
        """What a run says of the list before it begins."""
        return [warning for one in self.lists for warning in one.get("warnings", [])]

    @property
    def shard_size(self) -> int:
        """Rows per shard at most, which decides how many digits a key has."""
        return self.facts["source"]["source.shard_size"]

    @property
    def limit(self) -> int | None:
        """The `--limit` that it was made with, or has grown to."""
        return self.facts["source"]["--limit"]

    @property
    def digest(self) -> str:
        """A short name of the whole plan: what the list holds, and how it is cut."""
        files = sorted((index, name) for name, index in self.facts["made_of"].items())
        identities = [self.facts["identities"][name] for _, name in files]
        return digest([identities, self.shard_size, _column_types(self.extra_columns), self.total_rows])

    def shard_digest(self, shard: int) -> str:
        """A short name of what one shard holds; other shards and other files of the list do not change it."""
        s = self.shards[shard]
        return digest(
            [
                self.facts["identities"][s.file],
                s.offset,
                s.rows,
                _column_types(self.list_columns(self.list_index(shard))),
            ]
        )

    @property
    def schema(self) -> pa.Schema:
        """The columns of all rows: url, caption, and the extra ones of all lists under the names they are stored by."""
        return pa.schema([*URL_COLUMNS, *stored_schema(self.extra_columns)])

    def read(self, shard: int) -> SourceShard:
        """The rows of a shard; of its file, only the row groups that it lies in are read.

        Raises UserError where the list has changed since the plan was made.
        """
        s, of, extra_columns = self.shards[shard], self.list_of(shard), self.list_columns(self.list_index(shard))
        fact = self.facts["inputs"][self.facts["made_of"][s.file]]
        was_cut = s.file in self.facts["cut"]
        # else everything is in plan/, or Place.read finds out image by image
        if not of["remote"] and (not was_cut or of["kind"] in ("tars", "parquet")):
            now = stat(of["kind"], Path(fact["path"]))
            if any(now[k] != fact[k] for k in now):
                raise UserError(
                    f"{fact['path']}: has changed since the plan was made. If its content is the same, the command "
                    f"that made the plan takes it up again; if not, it is another list. {ANEW}"
                )
        base = of["base"]
        beside = PLACE_COLUMNS if base is not None else FAILURES if fact.get("broken") else ()
        own = [(stored_own(name), kind) for name, kind in beside]
        listed = pa.schema([*URL_COLUMNS, *stored_schema(extra_columns)])
        schema = pa.schema([*listed, *own])
        problems = Problems()  # what was cut has been checked, so these are of a list that is used where it lies
        path = self.data.root / s.file
        if path.is_relative_to(self.data.root):
            self.data.bring(path)
        if was_cut:
            batches = [
                pa.RecordBatch.from_arrays([column_as(batch, f.name, f.type) for f in schema], schema=schema)
                for batch in rows_between(path, s.offset, s.rows, schema.names, MOST_HELD)
            ]
        else:  # the list itself, under its own names
            url, caption, constants = fact["url"], fact["caption"], fact.get("constants", {})
            wanted = [n for n in (url, caption, *extra_columns.names) if n]
            batches = [
                stored_batch(with_constants(batch, constants), url, caption, extra_columns, problems=problems)
                for batch in rows_between(path, s.offset, s.rows, wanted, MOST_HELD, problems)
            ]
        table = pa.Table.from_batches(batches, schema)
        if table.num_rows != s.rows:
            raise UserError(f"{s.file}: has fewer rows than when the plan was made. {ANEW}")
        return SourceShard(
            shard,
            table.select(listed.names),
            self.shard_digest(shard),
            table.select([name for name, _ in own]) if own else None,
            base if base is None or is_url(base) else Path(base),
            fact.get("etag", ""),
            tuple(problems.sentences()),
        )

    def check(self) -> None:
        """Read what the plan wrote again. Raises UserError where it is not what was written."""
        for name, sha256 in self.facts["cut"].items():
            path = self.data.local(self.data.root / name)
            if not path.exists() or sha256_file(path) != sha256:
                raise UserError(f"{path}: is damaged. Remove {self.data.plan_folder}; {_AGAIN}")


@functools.lru_cache(maxsize=64)
def _schema_of(text: str) -> pa.Schema:
    """The extra columns of a list, as its facts hold them."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


def _column_types(extra_columns: pa.Schema) -> Sequence[str]:
    return [f"{f.name}:{f.type}" for f in extra_columns]


def shards_file(facts: Mapping[str, Any]) -> str:
    """The table of shards of a plan, relative to its root; one that was written anew has its digest in its name."""
    return facts.get("shards", "plan/shards.parquet")


def load_plan(data: Data) -> Plan | None:
    """The plan that a data folder holds, or None. Raises UserError where it is damaged or of another version."""
    facts = read_json(data.local(data.plan_record))
    if facts is None:
        return None
    remove = f"Remove {data.plan_folder}; {_AGAIN}"
    if facts.get("version") != VERSION:
        raise UserError(f"{data.plan_folder}: made by another version ({facts.get('version')}). {ANEW}")
    if facts.get("self") != record_digest(facts):
        raise UserError(f"{data.plan_record}: is damaged. {remove}")
    file = data.root / shards_file(facts)
    try:
        content = data.local(file).read_bytes()
    except FileNotFoundError:
        if read_json(data.local(data.plan_record)) != facts:  # it has grown between the two readings
            return load_plan(data)
        content = b""
    if hashlib.sha256(content).hexdigest() != facts["shards_sha256"]:
        raise UserError(f"{file}: is damaged. {remove}")
    # small, so without pyarrow's threads (which may abort a short process as it ends), or pandas, as read_table has it
    table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
    shards = [ShardPlan(*row) for row in zip(*(table.column(n).to_pylist() for n in SHARDS.names), strict=True)]
    return Plan.of(data, facts, shards)
