"""Bytes that came from many URLs: placeholders such as "image not available", and images that everybody copies."""

from __future__ import annotations

from dataclasses import dataclass

from curate.layout import Data
from curate.ledger.view import hidden_columns, hidden_condition, open_ledger, tables

MANY = 10
"""URLs from which the same bytes are named. One shop's few pages share an image; a placeholder has more."""


@dataclass(frozen=True)
class Repeat:
    """One file that many URLs gave."""

    sha256: str
    urls: int
    hosts: int
    url: str  # one of them
    width: int  # pixels as stored
    height: int

    def __str__(self) -> str:
        where = f"{self.hosts:,} hosts" if self.hosts > 1 else "one host"
        return f"{self.urls:,} URLs of {where} gave one image of {self.width} x {self.height}: {self.url[:100]}"


def repeats(data: Data) -> list[Repeat]:
    """What more than `MANY` URLs gave alike, the most repeated first.

    Placeholders pass every check of an image, and may score well. The rule `first_of(sha256)` keeps one of each; the
    hashes in a deny-list (`fetch.deny`) keep none. Images that must not be seen are not named.
    """
    hidden = hidden_columns(tables(data))
    with open_ledger(
        data, {"sha256", "url", "width", "height", *hidden}, memory_limit="2GB"
    ) as con:  # and as much of the disk as it takes
        denied = f"SELECT sha256 FROM ledger WHERE ({hidden_condition(hidden)}) AND sha256 IS NOT NULL"
        found = con.execute(
            # by a short hash first: at ten million rows a table of all digests would take gigabytes
            f"""
            SELECT sha256, count(DISTINCT url) AS urls, count(DISTINCT split_part(url, '/', 3)), min(url),
                   any_value(width), any_value(height)
            FROM _fetched WHERE hash(sha256) IN (
                SELECT hash(sha256) FROM _fetched WHERE sha256 IS NOT NULL GROUP BY 1 HAVING count(*) > {MANY})
                {f"AND sha256 NOT IN ({denied})" if hidden else ""}
            GROUP BY sha256 HAVING urls > {MANY} ORDER BY urls DESC, sha256
            """
        ).fetchall()
    return [Repeat(*row) for row in found]
