"""Opt-outs asked for again: what the origins of images that were kept say of them today.

    checked = await check_shard(data, 0, Fetcher(config), config, keys=None)

`annotated/opt_outs/NNNNN.parquet` holds what was said, beside the other columns of the ledger, a row for each image:

opt_out_checked   the day on which its URL was asked, null where it was not
opt_out_answer    `ok`, `opted_out`, or the reason why there was no answer: http_404, timeout, ...
opt_out_now       the signals that were seen, respected or not, as in `opt_out`

The image itself is not fetched again, so what files say of themselves is not among these. Of images that came since,
by a retry or another list, nobody was asked: a rule that names one of these columns is refused until it is done again.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.files import atomic
from curate.encoders.embed import images_of
from curate.fetch.client import Fetcher
from curate.fetch.config import FetchConfig
from curate.layout import Data
from curate.ledger.rules import KEPT
from curate.ledger.schema import OPT_OUTS, Reason, RowError, shard_of_key
from curate.store.files import digest, read_table

DAY = 86_400.0
"""Seconds for which an answer holds: as long as RFC 9309 lets a robots.txt be remembered."""

_AT_A_TIME = 8  # shards, so that the slow hosts of one hold up nobody
_COLUMNS = {
    "opt_out_checked": "the day on which its URL was asked again for opt-outs",
    "opt_out_answer": "ok, opted_out, or why there was no answer",
    "opt_out_now": "the opt-out signals that were seen then",
}
_SCHEMA = pa.schema([("key", pa.string()), *((name, pa.string()) for name in _COLUMNS)])


@dataclass
class Rechecked:
    """What the origins said."""

    images: int = 0  # that were to be asked about
    asked: int = 0  # of them now; the others were on a day before, or have no URL
    without_url: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    signals: Counter[str] = field(default_factory=Counter)  # of all that was seen, respected or not
    opted_out: dict[str, str] = field(default_factory=dict)  # key -> URL

    def add(self, row: Mapping[str, Any], url: str | None) -> None:
        """Count an image with its row of the table."""
        self.images += 1
        self.without_url += not url
        if (answer := row["opt_out_answer"]) is not None:
            self.answers[answer] += 1
            self.signals.update({said.partition(": ")[0] for said in (row["opt_out_now"] or "").split("; ") if said})
            if answer == Reason.OPTED_OUT and url:
                self.opted_out[row["key"]] = url


def kept_keys(data: Data, name: str) -> set[str]:
    """The keys of the images that a selection keeps. UserError where there is no such selection."""
    if not data.record(data.selection_record(name)):
        there = ", ".join(data.selections()) or "none"
        raise UserError(f"{data} has no selection {name!r}; there are: {there}")
    table = read_table(data.local(data.verdicts(name)), ["key", "verdict"])
    rows = zip(table["key"].to_pylist(), table["verdict"].to_pylist(), strict=True)
    return {key for key, verdict in rows if verdict == KEPT}


def recheck(
    data: Data,
    config: FetchConfig,
    keys: Collection[str] | None = None,
    *,
    older: float = DAY,
    write: bool = True,
    report: Callable[[int], None] = lambda more: None,
) -> Rechecked:
    """Ask about the images of all fetched shards (`keys`: about these alone), shard by shard.

    What was asked less than `older` seconds ago, for the same signals, is not asked again: so a run that was killed
    goes on where it was. With `write`, each shard is committed as it ends; the caller holds the folder.
    `report` is told of every few images that are done.
    """
    return asyncio.run(_recheck(data, config, keys, older, write, report))


async def _recheck(
    data: Data,
    config: FetchConfig,
    keys: Collection[str] | None,
    older: float,
    write: bool,
    report: Callable[[int], None],
) -> Rechecked:
    found, places = Rechecked(), asyncio.Semaphore(_AT_A_TIME)
    shards = data.shards(data.fetched_record)
    wanted: dict[int, set[str]] | None = None
    if keys is not None:
        wanted = {}
        for key in keys:
            if (shard := shard_of_key(key, data.plan.shard_size)) is not None:
                wanted.setdefault(shard, set()).add(key)
        shards = [s for s in shards if s in wanted]
    fetcher = Fetcher(config)

    async def one(shard: int) -> None:
        async with places:
            await _check_shard(
                data, shard, fetcher, config, None if wanted is None else wanted[shard], older, write, report, found
            )

    try:
        async with asyncio.TaskGroup() as group:
            for shard in shards:
                group.create_task(one(shard))
    except ExceptionGroup as e:
        raise e.exceptions[0] from None  # an error of ours, or a full disk
    finally:
        await fetcher.close()
    return found


async def _check_shard(
    data: Data,
    shard: int,
    fetcher: Fetcher,
    config: FetchConfig,
    wanted: Collection[str] | None,
    older: float,
    write: bool,
    report: Callable[[int], None],
    found: Rechecked,
) -> None:
    file, record = data.annotations(OPT_OUTS, shard), data.annotations_record(OPT_OUTS, shard)
    images = images_of(data, shard, ["key", "url"]).to_pylist()
    made_by = digest(sorted(config.respect))
    facts = data.record(record)
    fresh = facts.get("config") == made_by and time.time() - facts.get("checked", 0.0) < older
    before = _rows_of(data, shard) if fresh else {}  # a table holds one round of asking
    today = datetime.now(UTC).date().isoformat()
    empty = dict.fromkeys(_COLUMNS)
    rows = {row["key"]: {"key": row["key"], **empty, **before.get(row["key"], {})} for row in images}
    mine = [row for row in images if wanted is None or row["key"] in wanted]

    async def ask(key: str, url: str) -> None:
        said = {"opt_out_checked": today, "opt_out_answer": "ok", "opt_out_now": None}
        try:
            said["opt_out_now"] = (await fetcher.check(url)).opt_out
        except RowError as e:
            said |= {"opt_out_answer": e.reason.value, "opt_out_now": e.opt_out}
        rows[key].update(said)
        found.asked += 1
        report(1)

    asking = [r for r in mine if r["url"] and not (fresh and rows[r["key"]]["opt_out_answer"] is not None)]
    async with asyncio.TaskGroup() as group:
        for row in asking:
            group.create_task(ask(row["key"], row["url"]))
    report(len(mine) - len(asking))
    for row in mine:
        found.add(rows[row["key"]], row["url"])
    inputs = data.fetched_digests(shard) or {}
    if write and (asking or facts.get("inputs") != inputs):  # of images that have no URL, that there is nothing to say
        # an answer of before holds no longer than it would have without this one
        checked = facts["checked"] if fresh else time.time()
        await asyncio.to_thread(_commit, data, shard, list(rows.values()), made_by, checked, today, inputs)
    data.release(file)


def _rows_of(data: Data, shard: int) -> dict[str, dict[str, Any]]:
    """What was said before, by key; nothing where there is none, or where that is damaged."""
    if not data.outputs_present(data.annotations_record(OPT_OUTS, shard)):
        return {}
    table = read_table(data.local(data.annotations(OPT_OUTS, shard)))
    return {row["key"]: row for row in table.to_pylist()} if table.schema.names == _SCHEMA.names else {}


def _commit(
    data: Data,
    shard: int,
    rows: list[dict[str, Any]],
    made_by: str,
    checked: float,
    today: str,
    inputs: Mapping[str, str],
) -> None:
    file, record = data.annotations(OPT_OUTS, shard), data.annotations_record(OPT_OUTS, shard)
    file.parent.mkdir(parents=True, exist_ok=True)
    data.invalidate(record)
    with atomic(file) as f:
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), f, compression="zstd")
    columns = {name: {"type": "string", "scale": None, "unit": "", "meaning": said} for name, said in _COLUMNS.items()}
    answers = Counter(row["opt_out_answer"] for row in rows if row["opt_out_answer"] is not None)
    data.commit(
        record,
        config=made_by,
        inputs=inputs,
        outputs=[file],
        facts={
            "count": len(rows),
            "annotator": OPT_OUTS,
            "columns": {name: {**spec, "unsafe": False, "hidden": False} for name, spec in columns.items()},
            "checked": checked,
            "date": today,
            "answers": dict(answers),
        },
    )
