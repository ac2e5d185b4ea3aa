"""What the ledger says of the images that are published: where they are from, when they came, under which licences."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from curate.fetch.budget import registered_domain
from curate.ledger.rules import KEPT
from curate.ledger.schema import Reason
from curate.ledger.sql import literal, quote
from curate.ledger.view import LedgerTable, column_types, open_ledger, recorded_columns

if TYPE_CHECKING:
    from curate.layout import Data

_LICENCE = re.compile(r"licen[cs]e|rights|usage_?terms|copyright(_?status)?", re.IGNORECASE)
_HOST = r"^[a-zA-Z]+://(?:[^/@?#]*@)?(\[[^\]]*\]|[^/:?#]*)"
_MOST = 20  # different values of a licence column or languages that are named


@dataclass(frozen=True)
class Census:
    """Counts over the images of one selection; dates as YYYY-MM-DD, in UTC."""

    images: int
    captions: int  # images with one
    bytes: int  # of the original files, as they were downloaded
    domains: list[tuple[str, int, int]]  # registered domain, images, bytes of originals; the most bytes first
    licences: dict[str, list[tuple[str, int]]]  # column of the list -> its values, the commonest first; "": none
    languages: dict[str, list[tuple[str, int]]]  # column -> its values, likewise
    first_day: str | None
    last_day: str | None
    opted_out: int  # rows of the whole list whose images were left alone because an opt-out was seen
    denied: int  # likewise, because a deny-list names them
    removed: int  # likewise, because they were removed
    signals: list[tuple[str, int]] = field(default_factory=list)  # opt-out headers seen on what is published


def is_licence(column: str) -> bool:
    """Whether a column of a list speaks of licences, by its name."""
    return _LICENCE.fullmatch(column) is not None


def take_census(data: Data, name: str, found: Sequence[LedgerTable]) -> Census:
    """Count the images that the selection kept, in one pass over the ledger. `found` are its tables, as packed."""
    source = column_types(found)[1]
    licences = [c for c in source if is_licence(c)]
    languages = [c for c, facts in recorded_columns(found).items() if facts.get("annotator") == "language"]
    languages = [c for c in languages if not c.endswith("score")]
    known = [c for c in source if c.lower() in ("lang", "language")]
    needed = {"url", "final_url", "bytes", "caption", "opt_out", *languages, *(f"source.{c}" for c in licences + known)}
    con = open_ledger(data, needed, found=found)
    con.execute(
        "CREATE TEMP TABLE kept AS SELECT l.* FROM ledger l SEMI JOIN verdicts v ON v.key = l.key "
        f"AND v.selection = {literal(name)} AND v.verdict = {literal(KEPT)}"
    )
    images, captions, size = con.execute(
        "SELECT count(*), count(*) FILTER (caption <> ''), coalesce(sum(bytes), 0) FROM kept"
    ).fetchall()[0]

    def values(column: str) -> list[tuple[str, int]]:
        value = f"coalesce(CAST({column} AS VARCHAR), '')"
        counted = con.execute(f"SELECT {value} AS v, count(*) AS n FROM kept GROUP BY v ORDER BY n DESC, v").fetchall()
        others = sum(n for _, n in counted[_MOST:])
        return [*counted[:_MOST], *([(f"{len(counted) - _MOST:,} others", others)] if others else [])]

    signals = [(value, n) for value, n in values("opt_out") if value]
    by_reason = "SELECT reason, count(*) FROM _fetched WHERE reason IS NOT NULL GROUP BY reason"
    failed = dict(con.execute(by_reason).fetchall())
    days = _days(found[0])
    return Census(
        images=images,
        captions=captions,
        bytes=int(size),
        domains=_domains(con),
        licences={c: values(f"source.{quote(c)}") for c in licences},
        languages={c: values(quote(c)) for c in languages} | {c: values(f"source.{quote(c)}") for c in known},
        first_day=days[0] if days else None,
        last_day=days[-1] if days else None,
        opted_out=failed.get(Reason.OPTED_OUT.value, 0),
        denied=failed.get(Reason.DENIED.value, 0),
        removed=failed.get("removed", 0),
        signals=signals,
    )


def _domains(con: Any) -> list[tuple[str, int, int]]:
    """Images and bytes by registered domain, of the URL that the image came from in the end."""
    images, sizes = Counter[str](), Counter[str]()
    answer = con.execute(
        f"SELECT lower(regexp_extract(coalesce(final_url, url), '{_HOST}', 1)) AS host, count(*), "
        "coalesce(sum(bytes), 0) FROM kept GROUP BY host"
    )
    while part := answer.fetchmany(10_000):
        for host, count, size in part:
            domain = registered_domain(host.strip("[]")) if host else ""
            images[domain] += count
            sizes[domain] += int(size)
    return sorted(((d, images[d], sizes[d]) for d in images), key=lambda d: (-d[2], -d[1], d[0]))


def _days(fetched: LedgerTable) -> list[str]:
    """The first and the last day on which images came, by the records of fetched shards."""
    noted = (facts.get(key) for facts in fetched.facts for key in ("start_time", "end_time"))
    times = [float(t) for t in noted if isinstance(t, (int, float))]
    return [time.strftime("%Y-%m-%d", time.gmtime(t)) for t in (min(times), max(times))] if times else []


def largest_domains(census: Census, share: float, most: int | None = None) -> list[tuple[str, int, int]]:
    """The largest domains by bytes: a share of all domains, rounded up, and no more than `most`."""
    count = -(-len(census.domains) * round(share * 100) // 100)
    return census.domains[: count if most is None else min(count, most)]


def domains_csv(census: Census) -> bytes:
    """All domains as CSV: domain, images, bytes, share of all bytes."""
    import io

    import pyarrow.csv

    rows = census.domains
    table = pa.table(
        {
            "domain": pa.array([d for d, _, _ in rows], pa.string()),
            "images": pa.array([n for _, n, _ in rows], pa.int64()),
            "bytes": pa.array([b for _, _, b in rows], pa.int64()),
            "share": pa.array([round(b / max(census.bytes, 1), 6) for _, _, b in rows], pa.float64()),
        }
    )
    out = io.BytesIO()
    pyarrow.csv.write_csv(table, out)
    return out.getvalue()
