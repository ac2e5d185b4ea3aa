"""Where the values of one row lie among those of all rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curate.ledger.alike import over_files
from curate.ledger.balance import cluster_columns
from curate.ledger.rules import NUMBER
from curate.ledger.view import LedgerTable, column_types
from curate.ledger.why import Explanation

_OWN = ("width", "height", "original_width", "original_height", "bytes")


def percentiles(found: Sequence[LedgerTable], explained: Explanation) -> dict[str, float]:
    """Column of numbers -> 0 to 100: the share of all rows' finite values that are smaller than the row's, and half of
    those that equal it. One pass over these columns; none of columns in which the row has no value."""
    types, _ = column_types(found)
    clusters = cluster_columns(found)
    shares = dict[str, float]()
    for table in found:
        names = table.columns if table is not found[0] else _OWN
        values = {c: explained.value(c) for c in names if NUMBER.fullmatch(types[c]) and c not in clusters}
        asked = {c: float(v) for c, v in values.items() if _finite(v)}
        if not asked:
            continue

        def look(rows: pa.Table, asked: dict[str, float] = asked) -> np.ndarray:
            counts = np.zeros((len(asked), 3), np.int64)  # smaller, equal, all
            for place, (name, own) in enumerate(asked.items()):
                column = pc.cast(rows[name], pa.float64(), safe=False).to_numpy(zero_copy_only=False)
                column = column[np.isfinite(column)]  # null is NaN here
                counts[place] = (column < own).sum(), (column == own).sum(), len(column)
            return counts

        sums = np.sum([*over_files(table, list(asked), look)], axis=0)
        for name, (smaller, equal, every) in zip(asked, sums.tolist(), strict=True):
            if every:
                shares[name] = 100 * (smaller + equal / 2) / every
    return shares


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
