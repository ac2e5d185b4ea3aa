"""Which rows of a list belong to its plan, found before anything is written: columns, types, `where`, `limit`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aesthetic.errors import UserError
from aesthetic.untrusted import printable
from curate.ledger.schema import stored_name
from curate.sources.folders import PLACE_COLUMNS
from curate.sources.inputs import Found
from curate.sources.lists import (
    FAILURES,
    Input,
    Notes,
    ParquetInput,
    as_type,
    common_type,
    describe,
    is_texts,
    listed,
    parquet_batches,
)
from curate.sources.predicate import Predicate

if TYPE_CHECKING:
    from curate.sources.plan import SourceConfig

MOST_EXTRA = 1_000
"""Extra columns at most: each is a column of every table, and a field of every sample's JSON."""

_SEED = 0x7461737465  # of the order in which --limit takes rows; a change gives other rows to everyone


@dataclass
class Survey:
    """What a list is, found before anything is written."""

    inputs: list[Input]
    union: pa.Schema  # the columns of all inputs, under the list's names
    extra_columns: pa.Schema
    predicate: Predicate | None = None
    listed_rows: int = 0
    kept: list[int] = field(default_factory=list)  # rows per input, after where and limit
    captions_unwanted: bool = False  # source.caption is null
    notes: list[str] = field(default_factory=list)  # what of a folder is not read
    threshold: int | None = None  # of the spread numbers; rows above it are beyond the limit
    planned: int | None = None  # and those up to this one are in the plan that grows

    @property
    def filtered(self) -> bool:
        return self.predicate is not None or self.threshold is not None or self.planned is not None

    def warnings(self) -> list[str]:
        """What a run says before it begins: of rows and values that are not taken as they are, and missing captions."""
        said = [*self.notes, *(f"{s.path}: {sentence}" for s in self.inputs for sentence in s.notes.sentences())]
        if self.inputs[0].local and not self.captions_unwanted:
            said += self._uncaptioned()
        without = [s for s in self.inputs if s.caption is None and not s.local and s.rows]
        if without and not self.captions_unwanted:
            texts = [f.name for f in without[0].schema if pa.types.is_string(f.type) and f.name != without[0].url]
            candidates = (
                f"Columns of text: {listed(texts)}. `--set source.caption=NAME` takes one"
                if texts
                else ("It has no other column of text")
            )
            of = f" ({len(without):,} of {len(self.inputs):,} files)" if len(self.inputs) > 1 else ""
            said.append(
                f"{without[0].path}{of}: no column of captions was found, so all captions are null. {candidates}"
            )
        return said

    def _uncaptioned(self) -> list[str]:
        """How many pictures of a folder have no caption."""
        rows, without = sum(s.rows for s in self.inputs), sum(s.uncaptioned for s in self.inputs)
        if not without:
            return []
        where = self.inputs[0].path if len(self.inputs) == 1 else self.inputs[0].path.parent
        if without < rows:
            return [f"{where}: {without:,} of {rows:,} pictures have no caption"]
        return [
            f"{where}: none of the {rows:,} pictures has a caption. Captions are NAME.txt beside NAME.jpg (in a tar or "
            "a folder), or a column `text` or `caption` of the table that the pictures are in, or that names them"
        ]

    def mask(self, batch: pa.RecordBatch) -> np.ndarray:
        """Which rows `where` keeps: those for which it is true, and broken lines, which nothing can be said of."""
        if self.predicate is None:
            return np.ones(batch.num_rows, dtype=bool)
        fields = [f for f in self.union if f.name in self.predicate.columns]
        table = pa.table({f.name: column(batch, f.name, f.type) for f in fields})
        kept = self.predicate.mask(table, batch.num_rows)
        if FAILURES[0][0] in batch.schema.names:
            kept = kept | batch.column(FAILURES[0][0]).is_valid().to_numpy(zero_copy_only=False)
        return kept

    def kept_rows(self, number: int) -> Iterator[pa.RecordBatch]:
        """The rows of one input that belong to the plan, in order."""
        source = self.inputs[number]
        wanted = {n for n in (source.url, source.caption) if n} | set(self.extra_columns.names)
        if self.predicate is not None:
            wanted |= set(self.predicate.columns)
        start = 0
        for batch in source.whole_batches(sorted(wanted)):
            count = batch.num_rows
            if self.threshold is not None or self.planned is not None:
                place = spread(number, start, count)
                wanted_rows = np.ones(count, bool) if self.threshold is None else place <= np.uint64(self.threshold)
                if self.planned is not None:
                    wanted_rows &= place > np.uint64(self.planned)
                batch = batch.filter(pa.array(wanted_rows))
            if self.predicate is not None and batch.num_rows:
                batch = batch.filter(pa.array(self.mask(batch)))
            start += count
            if batch.num_rows:
                yield batch


def survey_list(found: Found, config: SourceConfig, limit: int | None) -> Survey:
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: it must be at least 1")
    inputs = [found.open(file, config.url, config.caption) for file in found.files]
    if not sum(source.rows for source in inputs):
        raise UserError(f"{found.name}: has no rows.")
    for source in inputs:
        if source.url is None and source.rows:
            columns = describe(source.schema.names, "url")
            raise UserError(f"{source.path}: there is no column of URLs. `--set source.url=NAME` names one. {columns}")
    union = _union(inputs)
    survey = Survey(
        inputs, union, _extra_columns(found, inputs, union, config), captions_unwanted=config.caption is None
    )
    survey.notes = [f"{found.name}: {note}" for note in found.notes]
    if config.where is not None:
        survey.predicate = Predicate(config.where, union, "source.where")
    used = [*survey.extra_columns.names, *(survey.predicate.columns if survey.predicate else ())]
    for source in inputs:
        source.check_sizes([n for n in (source.url, source.caption, *used) if n])
    if found.base is None:
        survey.notes += _no_urls(inputs[0])
    best, owner = np.empty(0, np.uint64), np.empty(0, np.int64)
    survey.kept = [0] * len(inputs)
    for number, source in enumerate(inputs):
        start = 0
        for mask in _masks(survey, source):
            listed = int(mask.sum())
            survey.kept[number] += listed
            if limit is not None and listed:
                best = np.concatenate([best, spread(number, start, len(mask))[mask]])
                owner = np.concatenate([owner, np.full(listed, number)])
                if len(best) > limit:  # the rows with the smallest numbers stay, whatever part of the list they are in
                    smallest = np.argpartition(best, limit - 1)[:limit]
                    best, owner = best[smallest], owner[smallest]
            start += len(mask)
    survey.listed_rows = sum(survey.kept)
    if not survey.listed_rows:
        raise UserError(f"source.where: {config.where} keeps none of the {sum(s.rows for s in inputs):,} rows.")
    if limit is not None and limit < survey.listed_rows:
        survey.threshold = int(best.max())
        survey.kept = np.bincount(owner, minlength=len(inputs)).tolist()
    return survey


_A_PATH = r"^(/[^/]|\.\.?[/\\]|~/|[A-Za-z]:[/\\][^/]|file:)"


def _no_urls(source: Input) -> list[str]:
    """A sentence where the first values of the column of URLs are paths on this machine."""
    assert source.url is not None
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
        f"{printable(values[0], 80)!r}. Pictures on this machine are given as the folder that they lie in"
    ]


def _masks(survey: Survey, source: Input) -> Iterator[np.ndarray]:
    """What `where` keeps of an input, in pieces; without `where` no row is read."""
    if survey.predicate is not None:
        wanted = set(survey.predicate.columns) | {source.url or "url"}  # at least one: a batch needs a length
        for batch in source.whole_batches(sorted(wanted)):
            yield survey.mask(batch)
        return
    for start in range(0, source.rows, 1 << 20):
        yield np.ones(min(1 << 20, source.rows - start), dtype=bool)


def spread(number: int, start: int, count: int) -> np.ndarray:
    """A number for each of `count` rows of an input: without pattern, and never twice (splitmix64's mixing)."""
    x = np.arange(start, start + count, dtype=np.uint64) + np.array([(number << 40) + _SEED], dtype=np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def _union(inputs: list[Input]) -> pa.Schema:
    """The columns of all files of the list, in order of appearance, each in the type that fits all of them."""
    kinds: dict[str, pa.DataType] = {}
    for source in inputs:
        for f in source.schema:
            here = pa.string() if f.name == source.caption and is_texts(f.type) else f.type
            kind = common_type(kinds[f.name], here) if f.name in kinds else here
            if kind is None:
                raise UserError(f"{source.path}: column {f.name!r} is {here} here and {kinds[f.name]} in other files.")
            kinds[f.name] = kind
        for role, name in (("url", source.url), ("caption", source.caption)):
            if name and pa.types.is_nested(source.schema.field(name).type) and kinds[name] != pa.string():
                raise UserError(
                    f"{source.path}: column {name!r} ({role}) holds {source.schema.field(name).type}, not text."
                )
    return pa.schema([(n, pa.string() if pa.types.is_null(k) else k) for n, k in kinds.items()])


def _extra_columns(found: Found, inputs: list[Input], union: pa.Schema, config: SourceConfig) -> pa.Schema:
    own = {n for source in inputs for n in (source.url, source.caption) if n}
    if config.caption is None:
        own.add("caption")
    if config.columns is None:
        # what pandas calls an index that has no name, in parquet and in csv: no column of the list
        names = [n for n in union.names if n not in own and n and not n.startswith("__index_level_")]
    else:
        names = [n for n in dict.fromkeys(config.columns) if n not in own]
    for name in names:
        if name not in union.names:
            raise UserError(
                f"{found.name}: there is no column {name!r} (source.columns). {describe(union.names, name)}"
            )
    if found.base is not None and (taken := [n for n in names if n in dict(PLACE_COLUMNS)]):
        raise UserError(f"{found.name}: the column {taken[0]!r} has a name that is needed here. Rename it.")
    if len(names) > MOST_EXTRA:
        raise UserError(
            f"{found.name}: {len(names):,} extra columns would be kept with each row; at most {MOST_EXTRA:,} can be. "
            f"Name those that matter in source.columns: {listed(names)}"
        )
    return pa.schema([union.field(n) for n in names])


def columns_of(
    batch: pa.RecordBatch,
    url: str,
    caption: str | None,
    extra_columns: pa.Schema,
    extra: Sequence[tuple[str, pa.DataType]] = (),
    notes: Notes | None = None,
) -> pa.RecordBatch:
    """A batch of a list as our columns, in their types and under the names that we store them by.

    Null where this file of the list has no such column. `extra` are the input's own columns beside the list's.
    """
    wanted = [(url, "url", pa.string()), (caption, "caption", pa.string())]
    wanted += [(f.name, stored_name(f.name), f.type) for f in extra_columns]
    wanted += [(name, stored_extra(name), kind) for name, kind in extra]
    arrays = [column(batch, name, kind, notes) for name, _, kind in wanted]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema([(stored, kind) for _, stored, kind in wanted]))


def stored_extra(name: str) -> str:
    """What a column of ours beside the list's is called in a file of the plan: the list has none that begins with @."""
    return name.replace("\0", "@")


def column(batch: pa.RecordBatch, name: str | None, kind: pa.DataType, notes: Notes | None = None) -> pa.Array:
    if name is None or name not in batch.schema.names:
        return pa.nulls(batch.num_rows, kind)
    return as_type(batch.column(name), kind, notes, name)
