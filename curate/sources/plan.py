"""The source: a list of URLs, or a folder of images, cut once into the shards that everything after works on.

The plan lies in `plan/`: `shards.parquet` says for each shard which rows of which file it is, `plan.json` (written
last) what it was made of. The same list and settings give the same plan; a plan that is there is never made anew.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.files import atomic
from curate.ledger.schema import URL_COLUMNS, Reason, RowError, stored_schema
from curate.sources.captioned import read_place
from curate.sources.folders import PLACE_COLUMNS
from curate.sources.inputs import Found, find, is_remote, stat
from curate.sources.lists import FAILURES, Notes, ParquetInput, open_parquet, parquet_batches, with_constants
from curate.sources.survey import Survey, column, columns_of, stored_extra, survey_list
from curate.store.files import digest, read_json, sha256_file, write_json
from curate.store.ownership import clear
from curate.store.records import record_digest

_VERSION = 1
_LARGEST_GROUP = 2_000_000
"""Rows; a parquet file with a larger row group is cut anew: each of its shards would decode the whole group."""

_WRITTEN_GROUP = 100_000
"""Rows; the row groups of what is cut here hold a shard each, but no more than this."""

_SHARDS_AT_LEAST, _SMALLEST_SHARD = 8, 32
"""A list that is not long has shards of fewer rows than `source.shard_size`: a run that is stopped loses little, and
embedding begins while the rest is fetched. Below a batch of an encoder's (32 on a CPU) that would only cost."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What of the list is used (recipe: `source`)."""

    url: str = "url"  # column; the default also finds the usual names, `lists.URL_NAMES`
    caption: str | None = "caption"  # column; the default also finds `lists.CAPTION_NAMES`; None: no captions
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
class Totals:
    """What a plan would be, for `--dry-run`."""

    kind: str  # list, tars, images, imagefolder or parquet
    inputs: int  # files of the list, tars, or folders
    listed_rows: int  # rows of the list, after `where`
    total_rows: int  # of these, the rows that `limit` leaves
    shard_count: int
    url: str | None  # the columns as the (first) list calls them
    caption: str | None
    extra_columns: pa.Schema
    warnings: list[str]  # what a run says before it begins

    @property
    def columns(self) -> dict[str, str | None]:
        """As `Plan.columns`."""
        return _columns(self.kind, self.url, self.caption)


def _columns(kind: str, url: str | None, caption: str | None) -> dict[str, str | None]:
    return {"url": url, "caption": caption} if kind == "list" else {}


@dataclass(frozen=True)
class Place:
    """Where an image's bytes lie on this machine."""

    path: Path
    offset: int
    size: int | None  # None: `offset` is a row of a parquet file

    def read(self) -> bytes:
        """The bytes. Raises UserError where they are gone: the folder is not the one that was planned.

        RowError where they are too many, or where a row of a parquet file holds none.
        """
        data = read_place(self.path, self.offset, self.size)
        if self.size is not None and len(data) != self.size:
            raise UserError(f"{self.path}: is shorter than when the plan was made. {_ANEW}")
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
    places: pa.Table | None = None  # PLACE_COLUMNS, for folders of images
    base: Path | None = None
    failures: pa.Table | None = None  # @reason, @error, for lists with broken lines
    notes: tuple[str, ...] = ()  # what of these rows could not be taken as it is, in sentences

    @property
    def local(self) -> bool:
        """Whether nothing of this shard is to be fetched."""
        return self.places is not None

    def rows(self) -> list[Row]:
        """The rows one by one, in the order of the table."""
        urls, captions = (self.table.column(name).to_pylist() for name in ("url", "caption"))
        if self.failures is not None:
            told = [
                RowError(Reason(at["@reason"]), at["@error"]) if at["@reason"] else None
                for at in self.failures.to_pylist()
            ]
            return [Row(u, c, failure=failure) for u, c, failure in zip(urls, captions, told, strict=True)]
        if self.places is None or self.base is None:
            return [Row(url, caption) for url, caption in zip(urls, captions, strict=True)]
        rows = []
        for url, caption, at in zip(urls, captions, self.places.to_pylist(), strict=True):
            if at["@reason"] is None:
                rows.append(Row(url, caption, place=Place(self.base / at["@path"], at["@offset"], at["@size"])))
            else:
                rows.append(Row(url, caption, failure=RowError(Reason(at["@reason"]), at["@error"] or "")))
        return rows


_ANEW = "Give another --out to start anew."
_AGAIN = "the command that made it makes it again."


@dataclass(frozen=True)
class Plan:
    """The shards of a data folder, and their rows."""

    root: Path
    shards: list[ShardPlan] = field(repr=False)
    extra_columns: pa.Schema
    total_rows: int  # rows of all shards
    listed_rows: int  # rows of the list after `where`, before `limit`
    facts: Mapping[str, Any] = field(repr=False)  # what plan.json holds

    @property
    def list(self) -> str:
        """The list as it was given."""
        return self.facts["list"]

    @property
    def columns(self) -> dict[str, str | None]:
        """What the (first) list calls the columns of URLs and captions; {} for folders of pictures."""
        return _columns(self.facts["kind"], **{role: self.facts["inputs"][0][role] for role in ("url", "caption")})

    @property
    def warnings(self) -> Sequence[str]:
        """What a run says of the list before it begins."""
        return self.facts.get("warnings", [])

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
        facts = self.facts
        files = sorted((number, name) for name, number in facts["made_of"].items())
        parts = [facts["identities"][name] for _, name in files]
        return digest([parts, self.shard_size, self._columns(), self.total_rows])

    def shard_digest(self, shard: int) -> str:
        """A short name of what one shard holds; other shards and other files of the list do not change it."""
        s = self.shards[shard]
        return digest([self.facts["identities"][s.file], s.offset, s.rows, self._columns()])

    def _columns(self) -> Sequence[str]:
        return [f"{f.name}:{f.type}" for f in self.extra_columns]

    @property
    def schema(self) -> pa.Schema:
        """The columns of a shard's rows: url, caption, and the extra ones under the names that they are stored by."""
        return pa.schema([*URL_COLUMNS, *stored_schema(self.extra_columns)])

    def read(self, shard: int) -> SourceShard:
        """The rows of a shard; of its file, only the row groups that it lies in are read.

        Raises UserError where the list has changed since the plan was made.
        """
        s = self.shards[shard]
        fact = self.facts["inputs"][self.facts["made_of"][s.file]]
        self._require_unchanged(s.file, fact)
        local = self.facts["base"] is not None
        extra = [(stored_extra(n), k) for n, k in (PLACE_COLUMNS if local else FAILURES if fact.get("broken") else ())]
        schema = pa.schema([*self.schema, *extra])
        notes = Notes()  # what was cut has been checked, so these are of a list that is used where it lies
        if s.file in self.facts["cut"]:
            batches = (
                pa.RecordBatch.from_arrays([column(batch, f.name, f.type) for f in schema], schema=schema)
                for batch in _read_slice(self.root / s.file, s.offset, s.rows, schema.names)
            )
        else:  # the list itself, under its own names
            url, caption = fact["url"], fact["caption"]
            wanted = [n for n in (url, caption, *self.extra_columns.names) if n]
            batches = (
                columns_of(
                    with_constants(batch, fact.get("constants", {})), url, caption, self.extra_columns, notes=notes
                )
                for batch in _read_slice(self.root / s.file, s.offset, s.rows, wanted, notes)
            )
        table = pa.Table.from_batches(batches, schema)
        if table.num_rows != s.rows:
            raise UserError(f"{s.file}: has fewer rows than when the plan was made. {_ANEW}")
        rows = table.select(self.schema.names)
        beside = table.select([name for name, _ in extra]) if extra else None
        if local:
            return SourceShard(shard, rows, self.shard_digest(shard), beside, Path(self.facts["base"]))
        return SourceShard(shard, rows, self.shard_digest(shard), failures=beside, notes=tuple(notes.sentences()))

    def _require_unchanged(self, file: str, fact: Mapping[str, Any]) -> None:
        if self.facts["remote"] or (file in self.facts["cut"] and self.facts["kind"] not in ("tars", "parquet")):
            return  # everything is in plan/, or Place.read finds out image by image
        now = stat(self.facts["kind"], Path(fact["path"]))
        if any(now[k] != fact[k] for k in now):
            raise UserError(
                f"{fact['path']}: has changed since the plan was made. If its content is the same, the command that "
                f"made the plan takes it up again; if not, it is another list. {_ANEW}"
            )

    def check(self) -> None:
        """Read what the plan wrote again. Raises UserError where it is not what was written."""
        for name, sha256 in self.facts["cut"].items():
            path = self.root / name
            if not path.exists() or sha256_file(path) != sha256:
                raise UserError(f"{path}: is damaged. Remove {self.root / 'plan'}; {_AGAIN}")


_MOST_HELD = 512 << 20
"""Bytes of the text of a shard; beyond them, long texts are null."""


def _read_slice(
    path: Path, offset: int, rows: int, columns: Sequence[str], notes: Notes | None = None
) -> Iterator[pa.RecordBatch]:
    metadata = open_parquet(path).metadata
    groups: list[int] = []
    first = start = 0
    for number in range(metadata.num_row_groups):
        end = start + metadata.row_group(number).num_rows
        if start < offset + rows and end > offset:
            if not groups:
                first = start
            groups.append(number)
        start = end
    yield from parquet_batches(path, columns, groups, offset - first, rows, _MOST_HELD, notes)


# ------------------------------------------------------------------------------------------------------ making a plan


def inspect(list_path: str, config: SourceConfig, limit: int | None = None, root: Path | None = None) -> Totals:
    """What `make_plan` would make, in `root` where one is given. Writes nothing; a remote list is copied elsewhere.

    Raises UserError as make_plan does.
    """
    plan = load_plan(root) if root is not None else None
    if plan is not None:
        remote = plan.facts["remote"] or is_remote(list_path)
        _require_same(plan, list_path, None if remote else find(list_path, plan.root), config)
        if not _grows(plan, limit):
            first = plan.facts["inputs"][0]
            return Totals(
                kind=plan.facts["kind"],
                inputs=len(plan.facts["inputs"]),
                listed_rows=plan.listed_rows,
                total_rows=plan.total_rows,
                shard_count=len(plan.shards),
                url=first["url"],
                caption=first["caption"],
                extra_columns=plan.extra_columns,
                warnings=list(plan.warnings),
            )
    with tempfile.TemporaryDirectory() as scratch:
        found = find(list_path, Path(scratch))
        survey = survey_list(found, config, limit)
        fresh = survey if plan is None else _more(plan, found, config, survey)
    size = _rows_a_shard(config, sum(fresh.kept))
    return Totals(
        kind=found.kind,
        inputs=len(survey.inputs),
        listed_rows=survey.listed_rows,
        total_rows=sum(survey.kept),
        shard_count=(len(plan.shards) if plan else 0) + sum(-(-kept // size) for kept in fresh.kept),
        url=survey.inputs[0].url,
        caption=survey.inputs[0].caption,
        extra_columns=survey.extra_columns,
        warnings=survey.warnings(),
    )


def make_plan(list_path: str, root: Path, config: SourceConfig, limit: int | None = None) -> Plan:
    """The plan of a list, made in `root/plan` where there is none yet.

    `limit` takes that many rows, spread over the whole list and always the same ones, in the list's order. A plan that
    is there grows where `limit` now asks for more rows: its shards stay, and shards of the other rows follow them.
    Raises UserError, and leaves nothing behind, where the list or the configuration is at fault; and where `root` holds
    the plan of another list, other settings or more rows. A remote list is copied once, and looked at again only to
    grow.
    """
    existing = load_plan(root)
    if existing is not None:
        existing = _same_plan(existing, list_path, config)
        return _grown(existing, list_path, config, limit) if _grows(existing, limit) else existing
    folder = root / "plan"
    clear_plan(root)  # of a run that was killed before its plan was whole
    try:
        found = find(list_path, folder)
        survey = survey_list(found, config, limit)
        facts, shards = _write_lists(root, found, survey, _rows_a_shard(config, sum(survey.kept)))
        facts |= {"source": _settings(config, limit)}
        _write_plan(root, facts, shards)
    except BaseException:
        clear_plan(root)
        raise
    return _loaded(root, facts, shards)


def clear_plan(root: Path) -> None:
    """Remove the plan that `root` holds, whole or not; what somebody else has put beside it stays."""
    clear(root / "plan", r"plan\.json|shards(-[0-9a-f]{8})?\.parquet|\d{5,}(-\d{5,})?\.parquet|list-\d{5,}-.*")


def load_plan(root: Path) -> Plan | None:
    """The plan that `root` holds, or None. Raises UserError where it is damaged or of another version."""
    facts = read_json(root / "plan" / "plan.json")
    if facts is None:
        return None
    if facts.get("version") != _VERSION:
        raise UserError(f"{root / 'plan'}: made by another version ({facts.get('version')}). {_ANEW}")
    if facts.get("self") != record_digest(facts):
        raise UserError(f"{root / 'plan' / 'plan.json'}: is damaged. Remove {root / 'plan'}; {_AGAIN}")
    file = root / _shards_file(facts)
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        if read_json(root / "plan" / "plan.json") != facts:  # it has grown between the two readings
            return load_plan(root)
        data = b""
    if hashlib.sha256(data).hexdigest() != facts["shards_sha256"]:
        raise UserError(f"{file}: is damaged. Remove {root / 'plan'}; {_AGAIN}")
    # small, so without pyarrow's threads (which may abort a short process as it ends), or pandas, as read_table has it
    table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    shards = [ShardPlan(*row) for row in zip(*(table.column(n).to_pylist() for n in _SHARDS.names), strict=True)]
    return _loaded(root, facts, shards)


_SHARDS = pa.schema([("shard", pa.int64()), ("file", pa.string()), ("offset", pa.int64()), ("rows", pa.int64())])


def _loaded(root: Path, facts: dict[str, Any], shards: list[ShardPlan]) -> Plan:
    extra_columns = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(facts["carried_schema"])))
    return Plan(root, shards, extra_columns, facts["total_rows"], facts["listed_rows"], facts)


def _settings(config: SourceConfig, limit: int | None) -> dict[str, Any]:
    settings = {f"source.{k}": v for k, v in asdict(config).items()}
    return json.loads(json.dumps({**settings, "--limit": limit}))  # as it will be read again: tuples are lists


def _shards_file(facts: Mapping[str, Any]) -> str:
    """The table of shards of a plan, relative to its root; one that was written anew has its digest in its name."""
    return facts.get("shards", "plan/shards.parquet")


def _write_plan(root: Path, facts: dict[str, Any], shards: list[ShardPlan], instead: str | None = None) -> None:
    """Write the plan's two files; from the second one on it is there, `instead` of one with that table of shards."""
    columns = zip(*((s.shard, s.file, s.offset, s.rows) for s in shards), strict=True)
    data = io.BytesIO()
    pq.write_table(pa.table([list(c) for c in columns], schema=_SHARDS), data)
    facts["shards_sha256"] = hashlib.sha256(data.getvalue()).hexdigest()
    if instead is not None:  # a kill between the two files leaves the old plan whole
        facts["shards"] = f"plan/shards-{facts['shards_sha256'][:8]}.parquet"
    with atomic(root / _shards_file(facts)) as f:
        f.write(data.getbuffer())
    facts = {k: v for k, v in facts.items() if k != "self"}
    write_json(root / "plan" / "plan.json", {**facts, "self": record_digest(facts)})
    if instead is not None and instead != facts["shards"]:
        (root / instead).unlink(missing_ok=True)


def _rows_a_shard(config: SourceConfig, rows: int) -> int:
    """How many rows the shards of so many have: `shard_size`, or less, for a list that would have but a few shards."""
    return min(config.shard_size, max(_SMALLEST_SHARD, -(-rows // _SHARDS_AT_LEAST)))


def _write_lists(root: Path, found: Found, survey: Survey, shard_size: int) -> tuple[dict[str, Any], list[ShardPlan]]:
    """Cut what cannot be used where it lies; returns what plan.json says of it, and the shards."""
    shards: list[ShardPlan] = []
    inputs: list[dict[str, Any]] = []
    identities: dict[str, str] = {}  # of each file that shards refer to: what it holds, whoever wrote it
    made_of: dict[str, int] = {}  # and which input it is or comes from
    cut: dict[str, str] = {}  # and the sha256 of those that were written here
    for number, (source, kept) in enumerate(zip(survey.inputs, survey.kept, strict=True)):
        before = stat(found.kind, source.path)
        content = source.digest()
        identity: list[Any] = [content, source.url, source.caption, *([source.constants] if source.constants else [])]
        if isinstance(source, ParquetInput) and source.largest_group <= _LARGEST_GROUP and not survey.filtered:
            file = str(source.path.relative_to(root) if found.remote else source.path)
        else:
            file = f"plan/{number:05d}.parquet"
            if survey.predicate is not None:
                identity.append(survey.predicate.condition)
            if survey.threshold is not None:
                identity += [number, survey.threshold]
            if kept:
                _cut(root / file, number, survey, shard_size)
                cut[file] = sha256_file(root / file)
            if found.remote:
                source.path.unlink()
        if not found.remote and stat(found.kind, source.path) != before:
            raise UserError(f"{source.path}: changed while it was read. Run the same command again.")
        broken = {"broken": n} if (n := source.notes.counts["broken"]) else {}
        constants = {"constants": source.constants} if source.constants else {}
        inputs.append(
            {**before, "sha256": content, "url": source.url, "caption": source.caption, **broken, **constants}
        )
        identities[file], made_of[file] = digest(identity), number
        for offset in range(0, kept, shard_size):
            shards.append(ShardPlan(len(shards), file, offset, min(shard_size, kept - offset)))
    facts = {
        "version": _VERSION,
        "list": found.name,
        "remote": found.remote,
        "kind": found.kind,
        "base": str(found.base) if found.base else None,
        "inputs": inputs,
        "listed_rows": survey.listed_rows,
        "total_rows": sum(survey.kept),
        "carried": {f.name: str(f.type) for f in survey.extra_columns},
        "carried_schema": base64.b64encode(survey.extra_columns.serialize()).decode(),
        "identities": identities,
        "made_of": made_of,
        "cut": cut,
        "warnings": survey.warnings(),
    }
    return facts, shards


def _cut(path: Path, number: int, survey: Survey, shard_size: int) -> None:
    """Write the rows of one input that belong to the plan, a row group per shard."""
    source = survey.inputs[number]
    extra = source.extra or (PLACE_COLUMNS if source.local else ())
    beside = [(stored_extra(name), kind) for name, kind in extra]
    schema = pa.schema([*URL_COLUMNS, *stored_schema(survey.extra_columns), *beside])
    group = min(shard_size, _WRITTEN_GROUP)
    held: list[pa.RecordBatch] = []
    with atomic(path) as f, pq.ParquetWriter(f, schema, compression="zstd") as writer:
        for batch in survey.kept_rows(number):
            held.append(columns_of(batch, source.url or "url", source.caption, survey.extra_columns, extra))
            rows = sum(b.num_rows for b in held)
            many = sum(b.nbytes for b in held) > _MOST_HELD
            if rows >= group or many:
                table = pa.Table.from_batches(held)
                whole = rows if many else rows - rows % group
                writer.write_table(table.slice(0, whole), row_group_size=group)
                held = table.slice(whole).combine_chunks().to_batches()
        if held:
            writer.write_table(pa.Table.from_batches(held), row_group_size=group)


# ------------------------------------------------------------------------------------------------- a plan that is there


def _same_plan(plan: Plan, list_path: str, config: SourceConfig) -> Plan:
    """The plan that is there, if it is that of this list and these settings. Raises UserError saying what differs."""
    local = not (plan.facts["remote"] or is_remote(list_path))
    found = find(list_path, plan.root / "plan") if local else None
    moved = _require_same(plan, list_path, found, config)
    return _follow(plan, found, moved) if found is not None and moved else plan


def _require_same(plan: Plan, list_path: str, found: Found | None, config: SourceConfig) -> dict[int, dict[str, Any]]:
    """The inputs whose content is the same, but not their path or time. UserError where anything else differs."""
    old, new = plan.facts["source"], _settings(config, plan.limit)
    differences = [f"{k} was {old.get(k)!r} and is {new[k]!r} now" for k in new if old.get(k) != new[k]]
    moved: dict[int, dict[str, Any]] = {}
    if found is not None:
        differences += _compare(plan, found, config, moved)
    elif list_path != plan.list:
        differences.append(f"the list was {plan.list} and is {list_path} now")
    if differences:
        raise UserError(f"{plan.root} was made from something else: {'; '.join(differences)}. {_ANEW}")
    return moved


def _grows(plan: Plan, limit: int | None) -> bool:
    """Whether a limit asks for more rows than the plan has. UserError where it asks for fewer."""
    wanted = plan.listed_rows if limit is None else min(limit, plan.listed_rows)
    if wanted < plan.total_rows:
        raise UserError(
            f"{plan.root} holds {plan.total_rows:,} rows of the list, and --limit {limit} is fewer. Leave --limit out "
            f"for the whole list, give {plan.total_rows} or more, or another --out."
        )
    return wanted > plan.total_rows


def _more(plan: Plan, found: Found, config: SourceConfig, survey: Survey) -> Survey:
    """What a larger limit adds to a plan: the survey without the rows that are planned."""
    before = survey_list(found, config, plan.limit)
    if sum(before.kept) != plan.total_rows:
        raise UserError(f"{found.name}: has changed since the plan was made. {_ANEW}")
    kept = [now - then for now, then in zip(survey.kept, before.kept, strict=True)]
    return replace(survey, kept=kept, planned=before.threshold)


def _grown(plan: Plan, list_path: str, config: SourceConfig, limit: int | None) -> Plan:
    """The plan with the rows that a larger limit adds, cut into files and shards of their own."""
    facts = json.loads(json.dumps(dict(plan.facts)))
    shards, made = list(plan.shards), list[Path]()
    with tempfile.TemporaryDirectory(dir=plan.root / "plan", prefix=".", suffix=".tmp") as scratch:
        found = find(list_path, Path(scratch))
        survey = _more(plan, found, config, survey_list(found, config, limit))
        size = _rows_a_shard(config, sum(survey.kept))
        try:
            for number, (source, kept) in enumerate(zip(survey.inputs, survey.kept, strict=True)):
                if found.remote and sha256_file(source.path) != facts["inputs"][number]["sha256"]:
                    raise UserError(f"{list_path}: has changed since the plan was made. {_ANEW}")
                if not kept:
                    continue
                file = f"plan/{number:05d}-{len(plan.shards):05d}.parquet"
                made.append(plan.root / file)
                _cut(made[-1], number, survey, size)
                facts["cut"][file] = sha256_file(made[-1])
                identity = [facts["inputs"][number]["sha256"], source.url, source.caption, config.where, number]
                facts["identities"][file] = digest([*identity, survey.planned, survey.threshold])
                facts["made_of"][file] = number
                for offset in range(0, kept, size):
                    shards.append(ShardPlan(len(shards), file, offset, min(size, kept - offset)))
            _require_same(plan, list_path, None if found.remote else found, config)  # nor did it change meanwhile
        except BaseException:
            for path in made:
                path.unlink(missing_ok=True)
            raise
    facts |= {"total_rows": plan.total_rows + sum(survey.kept), "source": _settings(config, limit)}
    _write_plan(plan.root, facts, shards, instead=_shards_file(plan.facts))
    return _loaded(plan.root, facts, shards)


def _compare(plan: Plan, found: Found, config: SourceConfig, moved: dict[int, dict[str, Any]]) -> Iterator[str]:
    """What differs; fills `moved` with the inputs whose content is the same, but not their path or time."""
    inputs = plan.facts["inputs"]
    if found.kind != plan.facts["kind"] or len(found.files) != len(inputs):
        yield (
            f"the list was {plan.list} ({len(inputs)} inputs of kind {plan.facts['kind']}) and is {found.name} now "
            f"({len(found.files)} of kind {found.kind})"
        )
        return
    for number, (file, fact) in enumerate(zip(found.files, inputs, strict=True)):
        now = stat(found.kind, file)
        if all(now[k] == fact[k] for k in now):
            continue
        here = f"{file} is not the list that was planned ({fact['path']})" if now["path"] != fact["path"] else str(file)
        if now["size"] != fact["size"]:
            yield f"{here}: it had {fact['size']:,} bytes and has {now['size']:,} now"
            continue
        same = sha256_file(file) if found.base is None else found.open(file, config.url, config.caption).digest()
        if same != fact["sha256"]:
            yield f"{here}: the size is the same, the content is not"
        else:
            moved[number] = now


def _follow(plan: Plan, found: Found, moved: Mapping[int, dict[str, Any]]) -> Plan:
    """The plan, written anew with the paths and times of inputs that moved or were touched."""
    facts = json.loads(json.dumps(dict(plan.facts)))
    paths = {}
    for number, now in moved.items():
        paths[facts["inputs"][number]["path"]] = now["path"]
        facts["inputs"][number] |= now
    for table in ("identities", "made_of"):
        facts[table] = {paths.get(name, name): value for name, value in facts[table].items()}
    facts |= {"list": found.name, "base": str(found.base) if found.base else None}
    shards = [ShardPlan(s.shard, paths.get(s.file, s.file), s.offset, s.rows) for s in plan.shards]
    _write_plan(plan.root, facts, shards, instead=_shards_file(plan.facts))
    return _loaded(plan.root, facts, shards)
