"""What img2dataset leaves beside its tars and folders: a parquet with a row for each URL, also those that failed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from curate.ledger.schema import Reason, Status
from curate.sources.inputs import no_place
from curate.sources.listing import Listing
from curate.sources.parquet import open_parquet, parquet_batches


def is_img2datasets(table: Path) -> bool:
    """Whether a parquet file has the columns that img2dataset's have."""
    return {"key", "status"} <= set(open_parquet(table).schema_arrow.names)


def rows_by_key(table: Path) -> dict[str, dict[str, Any]]:
    """The rows of img2dataset's parquet, by key; empty where there is none, or some other table."""
    if not table.exists() or not is_img2datasets(table):
        return {}
    names = open_parquet(table).schema_arrow.names
    return {str(row["key"]): row for batch in parquet_batches(table, names) for row in batch.to_pylist()}


def tabled_folders(listing: Listing) -> list[str]:
    """The folders of images that img2dataset wrote: those beside which its parquet of the same name lies."""
    folders = {name.rpartition("/")[0] for name in listing.images}
    tables = {name.removesuffix(".parquet") for name in listing.lists if name.endswith(".parquet")}
    return sorted(f for f in folders & tables if is_img2datasets(listing.folder / f"{f}.parquet"))


def failed_place(row: dict[str, Any]) -> dict[str, Any]:
    """PLACE_COLUMNS of a row that has no image, with the reason that it came with."""
    error = str(row.get("error_message") or "")
    if row.get("status") == Status.REJECTED_EARLY:  # of a run of ours; that rule is not this run's
        rule = row.get("reason")
        return no_place(Reason.NOT_AN_IMAGE, f"it was never stored, as the rule {rule} rejected it early ({error})")
    return no_place(reason_of(error, row.get("status"), row.get("reason")), error)


_CODE = r"(?:^|http |error:? |status:? ){}\b"
_MESSAGES = [
    (Reason.TOO_MANY_REDIRECTS, r"redirect"),
    (Reason.OPTED_OUT, r"x-robots-tag|robots\.txt|opt(ed)?.?out"),
    (Reason.HTTP_404, _CODE.format("404")),
    (Reason.HTTP_429, _CODE.format("429")),
    (Reason.HTTP_4XX, _CODE.format("4..")),
    (Reason.HTTP_5XX, _CODE.format("5..")),
    (
        Reason.DNS,
        r"name or service not known|name resolution|no address associated|getaddrinfo|nodename nor servname|idna",
    ),
    (Reason.TIMEOUT, r"timed? ?out"),
    (Reason.TLS, r"ssl|tls|certificate|hostname .* match"),
    (
        Reason.BAD_URL,
        r"unknown url type|no host given|nonnumeric port|invalid url|control characters|codec can't encode",
    ),
    (Reason.HASH_MISMATCH, r"hash mismatch"),
    (Reason.TOO_MANY_PIXELS, r"image area too large"),
    (Reason.PROTOCOL, r"incompleteread|remote end closed|badstatusline|http/|connection broken|chunk"),
    (Reason.DECODE_ERROR, r"decod|truncated|cannot identify image"),
]


def reason_of(message: str, status: str | None = None, reason: str | None = None) -> Reason:
    """Which of our reasons a failure is that another downloader put into words of its own (img2dataset's `str(err)`).

    `reason` is ours where the row comes from a run of ours; what no pattern knows is decode_error where the status is
    failed_to_resize, and connect where it is anything else.
    """
    if reason in set(Reason):
        return Reason(reason)
    for known, pattern in _MESSAGES:
        if re.search(pattern, message, re.IGNORECASE):
            return known
    return Reason.DECODE_ERROR if status == Status.FAILED_TO_RESIZE else Reason.CONNECT
