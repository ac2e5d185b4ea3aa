"""table: columns that somebody else computed, from a parquet file."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.untrusted import check_regular
from curate.annotators.base import Annotator, AnnotatorOptions, ColumnSpec, ImageBatch, Resources
from curate.store.files import digest, sha256_file

_NAMES = ("key", "sha256", "url")


class ParquetTable(Annotator):
    """Columns of a parquet file whose rows name images by key, sha256 or url.

    A value is null where the file has no row of an image, and where it is NaN or infinite.
    """

    name = "table"
    reads = "row"

    class Options(AnnotatorOptions):
        """by: what names images; default: the first of key, sha256, url that is there.    columns: default: all."""

        file: Path
        by: Literal["key", "sha256", "url"] | None = None
        columns: tuple[str, ...] | None = None

    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.file = options.file.expanduser()
        try:
            check_regular(self.file)
            schema = pq.read_schema(self.file)
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{self.file} is not a parquet file that can be read: {e}") from e
        names_in_file = ", ".join(schema.names)
        names = {name.lower(): name for name in reversed(schema.names)}
        by: str | None = options.by or next((n for n in _NAMES if n in names), None)
        if by is None or by not in names:
            raise UserError(f"{self.file} has no column {options.by or 'key, sha256 or url'}; it has {names_in_file}")
        self.by, self._by_column = by, names[by]
        if not (pa.types.is_string(kind := schema.field(names[by]).type) or pa.types.is_large_string(kind)):
            raise UserError(f"{self.file}: {names[by]} holds {kind}; text is expected")
        others = [n for n in schema.names if n.lower() not in _NAMES]
        wanted = others if options.columns is None else list(options.columns)
        if missing := [n for n in wanted if n not in schema.names]:
            raise UserError(f"{self.file} has no column {missing[0]}; it has {names_in_file}")
        self._columns = {re.sub(r"\W", "_", name, flags=re.ASCII).lower(): name for name in wanted}
        if not wanted or len(self._columns) < len(wanted):
            raise UserError(f"{self.file}: {'no column of values' if not wanted else 'two columns have one name'}")
        for name in wanted:
            if pa.types.is_nested(kind := schema.field(name).type) or pa.types.is_binary(kind):
                raise UserError(f"{self.file}: {name} holds {kind}; numbers, text, dates or booleans are expected")
        self.columns = {
            suffix: ColumnSpec(meaning=f"{name} of {self.file.name}", type=_plain(schema.field(name).type))
            for suffix, name in self._columns.items()
        }
        self.facts = {"file": str(self.file)}

    @cached_property
    def digest(self) -> str:
        """Of the file's bytes, and of what is taken from it."""
        return digest([self.name, sha256_file(self.file), self.by, sorted(self._columns.values())])

    def load(self, resources: Resources) -> None:
        """Read the file, and sort its rows by a hash of what names them."""
        try:
            table = pq.read_table(self.file, columns=[self._by_column, *self._columns.values()])
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{self.file} is not a parquet file that can be read: {e}") from e
        table = table.filter(pc.is_valid(table[self._by_column]))
        marks = _marks(table[self._by_column])
        order = np.argsort(marks, kind="stable")
        self._marks, self._table = marks[order], table.take(order)
        twice = np.flatnonzero(self._marks[1:] == self._marks[:-1])
        for row in twice.tolist():
            one, other = self._table[self._by_column].slice(row, 2).to_pylist()
            if one == other:
                raise UserError(f"{self.file} has two rows of the {self.by} {one}")

    def annotate(self, batch: ImageBatch) -> dict[str, pa.Array]:
        """The file's values of these images."""
        names = batch.rows[self.by]
        places = np.searchsorted(self._marks, _marks(names))
        places = np.minimum(places, max(0, len(self._marks) - 1))
        found = self._table.take(pa.array(places)) if len(self._marks) else self._table.slice(0, 0)
        if not len(found):
            return {suffix: pa.nulls(len(names), spec.type) for suffix, spec in self.columns.items()}
        same = pc.fill_null(pc.equal(found[self._by_column].cast(pa.string()), names.cast(pa.string())), False)
        return {
            suffix: _finite(pc.if_else(same, found[name].cast(self.columns[suffix].type), None)).combine_chunks()
            for suffix, name in self._columns.items()
        }


def _marks(names: pa.ChunkedArray) -> np.ndarray:
    """A 64-bit hash of each name: (n,) uint64."""
    import pandas as pd

    values = np.array(names.to_pylist(), dtype=object)
    values[pd.isna(values)] = ""
    return pd.util.hash_array(values, categorize=False)


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type that values of a column of the file get: no dictionary, no large or half type."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    return pa.float32() if pa.types.is_float16(kind) else kind


def _finite(values: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(pc.is_finite(values), values, None) if pa.types.is_floating(values.type) else values
