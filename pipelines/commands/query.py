"""`tastemaker query`: one SELECT over the ledger; its rows for a pipe, a file or a terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from pipelines.options import Options, Result, argument, local_file, option
from pipelines.terminal import counted


@dataclass(frozen=True, kw_only=True)
class QueryOptions(Options):
    data: str = argument("DATA", "the data folder")
    sql: str = argument("SQL", "one SELECT over `ledger`; the list's own columns are source.NAME")
    out: Path | None = option("write all rows to a new .csv, .parquet or .jsonl", metavar="FILE", type=local_file)


def run(options: QueryOptions) -> Result:
    """Show the rows, or write them to a file."""
    from curate.store.ownership import open_data
    from pipelines.rows import show, write

    data = open_data(options.data)
    if options.out is None:
        return Result(text=show(data, options.sql, sys.stdout, as_json=options.json), own_json=True)
    rows = write(data, options.sql, options.out)
    return Result(text=f"{counted(rows, 'row')}", facts={"rows": rows}, paths={"written": options.out})
