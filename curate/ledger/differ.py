"""What two selections of one data folder keep differently, or two data folders of one list, and by which rule.

found = differ(data, "mine", data, "stricter")      # counts, and the keys that only one keeps, by the other's verdict
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from curate.ledger.compare import Comparison, compare_kept
from curate.ledger.counts import key_numbers
from curate.ledger.rules import KEPT
from curate.ledger.select import load_selection
from curate.ledger.view import LedgerTable, column_types, tables
from curate.store.files import read_table

if TYPE_CHECKING:
    from curate.layout import Data

Keys = npt.NDArray[np.uint64]

NO_VERDICT = "no_verdict"
"""What is said of a row that the other selection does not know: it was made before the row came."""

_UID = "uid"


@dataclass(frozen=True, eq=False)
class OnlyOne:
    """The rows that one side keeps and the other does not."""

    verdicts: dict[str, int]  # of the other side -> rows, in the order of its rules
    keys: dict[str, Keys]  # the same rows, by their keys on the side that keeps them


@dataclass(frozen=True, eq=False)
class Difference:
    """What two sides, each a selection of a data folder, keep of the rows that both have."""

    compared: int  # rows that both have
    kept: Comparison
    only_a: OnlyOne
    only_b: OnlyOne
    matched_by: str  # key, uid or url
    rows_only_a: int = 0  # rows of the list that the other folder does not have
    rows_only_b: int = 0
    kept_rows_only_a: int = 0  # those of them that are kept
    kept_rows_only_b: int = 0


@dataclass(frozen=True, eq=False)
class _Side:
    """The verdicts of a selection: keys in their order (n,), places in `words` (n,)."""

    keys: Keys
    places: npt.NDArray[np.int16]
    words: list[str]  # in the order of the rules

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        return self.places == self.words.index(KEPT)


def differ(data: Data, a: str, other: Data, b: str) -> Difference:
    """What the selection `a` of `data` and `b` of `other` keep differently.

    In one folder rows are the same by their keys. In two they are the same by `uid`, where both lists carry it and no
    row lacks it, else by URL; where several rows have the same, the first are the same, the second and so on. Rows of
    one folder alone are counted apart. UserError where there is no such selection.
    """
    load_selection(data, a), load_selection(other, b)
    one, two = _read(data, a), _read(other, b)
    if str(data) == str(other):
        keys = np.union1d(one.keys, two.keys)
        every = np.arange(len(keys))
        return _difference(_over(one, keys), _over(two, keys), every, every, "key")
    by, ids_a, ids_b = _ids(data, one.keys, other, two.keys)
    return _difference(one, two, *_pairs(ids_a, ids_b), by)


def _read(data: Data, name: str) -> _Side:
    words: list[str] = []
    keys, places = [np.zeros(0, np.uint64)], [np.zeros(0, np.int16)]
    with pq.ParquetFile(data.local(data.verdicts(name))) as file:
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, use_threads=False)
            verdict = rows["verdict"].combine_chunks()
            names = verdict.dictionary.to_pylist()
            words += [n for n in names if n not in words]
            keys.append(key_numbers(rows["key"]))
            to = np.array([words.index(n) for n in names], np.int16)
            places.append(to[verdict.indices.to_numpy()])
    return _Side(np.concatenate(keys), np.concatenate(places), words if KEPT in words else [*words, KEPT])


def _over(side: _Side, keys: Keys) -> _Side:
    """The verdicts of these keys, in their order: `NO_VERDICT` for those that came since the selection was made."""
    places = np.full(len(keys), len(side.words), np.int16)
    places[np.searchsorted(keys, side.keys)] = side.places
    return _Side(keys, places, [*side.words, NO_VERDICT])


def _difference(
    one: _Side, two: _Side, at_a: npt.NDArray[np.int64], at_b: npt.NDArray[np.int64], by: str
) -> Difference:
    """at_a, at_b: (m,) the places of the rows that both have, in the one and in the other."""
    alone_a, alone_b = np.ones(len(one.keys), bool), np.ones(len(two.keys), bool)
    alone_a[at_a] = alone_b[at_b] = False
    kept_a, kept_b = one.kept[at_a], two.kept[at_b]
    only_a = _only(one.keys[at_a], kept_a & ~kept_b, two.places[at_b], two.words)
    only_b = _only(two.keys[at_b], kept_b & ~kept_a, one.places[at_a], one.words)
    return Difference(
        compared=len(at_a),
        kept=compare_kept(kept_a, kept_b),
        only_a=only_a,
        only_b=only_b,
        matched_by=by,
        rows_only_a=int(alone_a.sum()),
        rows_only_b=int(alone_b.sum()),
        kept_rows_only_a=int((alone_a & one.kept).sum()),
        kept_rows_only_b=int((alone_b & two.kept).sum()),
    )


def _only(keys: Keys, which: npt.NDArray[np.bool_], places: npt.NDArray[np.int16], words: list[str]) -> OnlyOne:
    keys, places = keys[which], places[which]
    found = {word: keys[places == place] for place, word in enumerate(words)}
    found = {word: those for word, those in found.items() if len(those)}
    return OnlyOne({word: len(those) for word, those in found.items()}, found)


# ------------------------------------------------------------------------------------------------ rows of two folders


def _ids(data: Data, keys_a: Keys, other: Data, keys_b: Keys) -> tuple[str, pa.Array, pa.Array]:
    """What names the rows of both, uid or url, in the order of their keys."""
    found = tables(data)[0], tables(other)[0]
    if all(_UID in column_types([table])[1] for table in found):
        ids = [_column(table, _UID, keys) for table, keys in zip(found, (keys_a, keys_b), strict=True)]
        if not any(each.null_count for each in ids):
            return _UID, *ids
    ids = [_column(table, "url", keys) for table, keys in zip(found, (keys_a, keys_b), strict=True)]
    for each, place in zip(ids, (data, other), strict=True):
        if len(each) and each.null_count == len(each):
            raise UserError(f"{place}: its rows have neither uid nor URL, by which they could be compared with others")
    return "url", *ids


def _column(table: LedgerTable, name: str, keys: Keys) -> pa.Array:
    """A column of text of a fetched table, in the order of these keys; null where a row is not there."""
    table.data.bring(*table.files)
    parts = [read_table(file, ["key", name]) for file in table.files]
    rows = pa.concat_tables(parts)
    places = pc.index_in(pa.array(keys), pa.array(key_numbers(rows["key"])))
    return rows[name].cast(pa.string()).combine_chunks().take(places)


def _pairs(a: pa.Array, b: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The places (m,) in both of the same names: the n-th of a name in the one is the n-th in the other."""
    both = pa.concat_arrays([a, b]).dictionary_encode()
    codes = both.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    sides = [_numbered(part) for part in (codes[: len(a)], codes[len(a) :])]
    (names_a, at_a), (names_b, at_b) = sides
    _, i, j = np.intersect1d(names_a, names_b, assume_unique=True, return_indices=True)
    order = np.argsort(at_a[i], kind="stable")
    return at_a[i][order], at_b[j][order]


def _numbered(codes: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Each name together with how many rows before had it, as one number; and the places of these rows."""
    places = np.flatnonzero(codes >= 0)
    order = places[np.argsort(codes[places], kind="stable")]
    named = codes[order]
    starts = np.flatnonzero(np.append(True, named[1:] != named[:-1])) if len(named) else np.zeros(0, np.int64)
    lengths = np.diff(np.append(starts, len(named)))
    nth = np.arange(len(named)) - np.repeat(starts, lengths)
    return named << 32 | nth, order
