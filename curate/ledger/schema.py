"""The row: what every line of the input list becomes, and the words for it.

Every row of the list has exactly one line in the ledger, and on that line one `status` (img2dataset's three words, and
two of ours: for what an early rule rejected, and for what was removed) and, where there is no image, one `reason`: from
a closed list, or the name of that rule. The columns below are those of `fetched/NNNNN.parquet`: first
the list's own (`url`, `caption`, then what it carries), then img2dataset's under their names, then ours.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import KW_ONLY, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

OPT_OUTS = "opt_outs"
"""Under `annotated/`: what `tastemaker check-opt-outs` was told. No recipe names it."""


class Status(StrEnum):
    """What became of a row; img2dataset's words, so that its readers count right, and two of ours."""

    SUCCESS = "success"
    FAILED_TO_DOWNLOAD = "failed_to_download"
    FAILED_TO_RESIZE = "failed_to_resize"
    REJECTED_EARLY = "rejected_early"
    REMOVED = "removed"  # by `tastemaker remove`: of such a row nothing is left but its key and the date


class Reason(StrEnum):
    """Why a row has no image. Closed: a new reason is a change of format."""

    DNS = "dns"
    CONNECT = "connect"
    TLS = "tls"
    TIMEOUT = "timeout"
    HTTP_4XX = "http_4xx"
    HTTP_404 = "http_404"
    HTTP_429 = "http_429"
    HTTP_5XX = "http_5xx"
    PROTOCOL = "protocol"
    TOO_LARGE = "too_large"
    TOO_MANY_REDIRECTS = "too_many_redirects"
    BLOCKED_ADDRESS = "blocked_address"
    BAD_URL = "bad_url"
    BAD_LINE = "bad_line"
    OPTED_OUT = "opted_out"
    DENIED = "denied"
    NOT_AN_IMAGE = "not_an_image"
    DECODE_ERROR = "decode_error"
    TOO_MANY_PIXELS = "too_many_pixels"
    HASH_MISMATCH = "hash_mismatch"
    CRASHED = "crashed"
    REMOVED = "removed"
    REJECTED_EARLY = "rejected_early"  # as rows are counted; on a row's line stands the rule's name

    @property
    def status(self) -> Status:
        """The word that a row with this reason carries."""
        if self is Reason.REJECTED_EARLY:
            return Status.REJECTED_EARLY
        if self is Reason.REMOVED:
            return Status.REMOVED
        return Status.FAILED_TO_RESIZE if self in _OF_THE_IMAGE else Status.FAILED_TO_DOWNLOAD

    @property
    def transient(self) -> bool:
        """Whether trying again later may succeed: what `tastemaker retry` fetches again."""
        return self in _TRANSIENT


_OF_THE_IMAGE = {Reason.NOT_AN_IMAGE, Reason.DECODE_ERROR, Reason.TOO_MANY_PIXELS, Reason.CRASHED}
_TRANSIENT = {Reason.DNS, Reason.CONNECT, Reason.TLS, Reason.TIMEOUT, Reason.HTTP_429, Reason.HTTP_5XX, Reason.PROTOCOL}


@dataclass(eq=False, repr=False)
class RowError(Exception):
    """A row has no image, for this reason. It ends one row, never a run.

    `detail` is for people (it lands in `error_message`); it is never parsed. `final_url` and `http_status` are set
    where a server answered, `redirects` (as the column has it) where one sent us on, `original_size` (width, height)
    where a header could be read, `opt_out` where somebody asked us to stay away.
    """

    reason: Reason
    detail: str = ""
    _: KW_ONLY
    final_url: str | None = None
    http_status: int | None = None
    original_size: tuple[int, int] | None = None
    opt_out: str | None = None
    redirects: str | None = None

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)


class FinalError(RowError):
    """A row's error that trying again in this run would not change, whatever its reason."""


class RejectedEarly(FinalError):
    """An early rule rejected a row, before it was fetched or by what its header said."""

    def __init__(self, rule: str, condition: str, size: tuple[int, int] | None = None) -> None:
        super().__init__(Reason.REJECTED_EARLY, condition, original_size=size)
        self.rule = rule


URL_COLUMNS = [("url", pa.string()), ("caption", pa.string())]
"""The list's own two columns, under img2dataset's names; what else it carries follows them."""

FETCHED_COLUMNS = [
    ("key", pa.string()),
    ("status", pa.string()),
    ("error_message", pa.string()),
    ("width", pa.int32()),  # pixels as stored
    ("height", pa.int32()),
    ("original_width", pa.int32()),  # pixels upright, before resizing
    ("original_height", pa.int32()),
    ("exif", pa.string()),  # JSON; null unless images.exif
    ("sha256", pa.string()),  # hex, of the original bytes
    ("reason", pa.string()),
    ("final_url", pa.string()),  # after redirects
    ("http_status", pa.int32()),
    ("bytes", pa.int64()),  # length of the original body
    ("phash", pa.string()),  # 16 hex digits
    ("opt_out", pa.string()),  # opt-out signals that were seen, respected or not: "x-robots-tag: noai"
    ("faces_blurred", pa.int32()),  # how many; null unless images.blur_faces
    ("redirects", pa.string()),  # JSON list: every URL of a chain of redirects, the first and the last one too
]
"""What the fetch and images stages add: img2dataset's columns under their names, then ours."""

EMBEDDED_COLUMNS = [("similarity", pa.float32())]
"""What the embed stage adds: the cosine of image and caption, null where there is no caption."""

RESERVED = {name for name, _ in URL_COLUMNS + FETCHED_COLUMNS}
"""Names of ours, which a column of the list cannot have in `fetched/NNNNN.parquet`."""

_SOURCE = "source."


def stored_name(name: str, taken: Collection[str] = RESERVED) -> str:
    """What a column of the list is called in our files: its own name, or source.NAME where that is taken.

    >>> stored_name("WIDTH"), stored_name("width"), stored_name("source.width")
    ('WIDTH', 'source.width', 'source.source.width')
    """
    return _SOURCE + name if name in taken or name.startswith((_SOURCE, "@")) else name


def list_name(stored: str) -> str:
    """What the list calls a column of our files that is not ours: the reverse of `stored_name`."""
    return stored.removeprefix(_SOURCE)


def stored_schema(extra_columns: pa.Schema) -> pa.Schema:
    """The extra columns of a list, under the names that they have in our files."""
    return pa.schema([(stored_name(f.name), f.type) for f in extra_columns])


def failure_facts(error: RowError) -> dict[str, Any]:
    """The fetched columns of a row that ended with an error; None where nothing is known."""
    width, height = error.original_size or (None, None)
    return {name: None for name, _ in FETCHED_COLUMNS} | {
        "status": error.reason.status.value,
        "reason": error.rule if isinstance(error, RejectedEarly) else error.reason.value,
        "error_message": error.detail,
        "original_width": width,
        "original_height": height,
        "final_url": error.final_url,
        "http_status": error.http_status,
        "opt_out": error.opt_out,
        "redirects": error.redirects,
    }


KEPT_OF_REMOVED = ("key", "status", "reason", "error_message")
"""The columns of `fetched/` that a row that was removed still has a value in; `error_message` says when."""


def removal_note(date: str) -> str:
    """The `error_message` of a row that was removed on a day (ISO)."""
    return f"removed on {date}"


def forget_removed(table: pa.Table) -> pa.Table:
    """Rows of `fetched/`, where all that could tell what a removed one was is null."""
    removed = pc.equal(table["status"], Status.REMOVED.value).combine_chunks()
    return forget(table, pc.fill_null(removed, False).to_numpy(zero_copy_only=False), KEPT_OF_REMOVED)


def forget(table: pa.Table, rows: np.ndarray, kept: Collection[str] = ()) -> pa.Table:
    """A table in which all columns but those `kept` are null in some rows (a mask); of any type, dictionaries too."""
    if not rows.any():
        return table
    places = pa.array(np.arange(len(rows)), mask=rows)  # a place that is null gives a null
    for i, f in enumerate(table.schema):
        if f.name not in kept:
            column = table.column(i).combine_chunks().take(places)
            if pa.types.is_dictionary(f.type):  # the words that nothing names any more would be written, too
                column = column.cast(f.type.value_type).cast(f.type)
            table = table.set_column(i, f, column)
    return table


def fetched_schema(extra_columns: pa.Schema) -> pa.Schema:
    """The schema of `fetched/NNNNN.parquet` for a list with these extra columns."""
    return pa.schema(URL_COLUMNS + list(stored_schema(extra_columns)) + FETCHED_COLUMNS)


def make_key(shard: int, row: int, shard_size: int) -> str:
    """The name of a row: shard number and row number, zero-padded, without a dot (webdataset cuts keys at dots).

    A row number has img2dataset's ceil(log10(shard_size)) digits, so that its keys and ours agree.

    >>> make_key(1, 5, 10000)
    '000010005'
    """
    digits = _row_digits(shard_size)
    return f"{shard * 10**digits + row:0{5 + digits}d}"


def shard_of_key(key: str, shard_size: int) -> int | None:
    """The shard of a row by its key; None of a text that `make_key` does not give.

    >>> shard_of_key("000010005", 10000)
    1
    """
    digits = _row_digits(shard_size)
    if not re.fullmatch(r"[0-9]{5,20}", key):
        return None
    shard, row = divmod(int(key), 10**digits)
    return shard if make_key(shard, row, shard_size) == key else None


def _row_digits(shard_size: int) -> int:
    return len(str(shard_size - 1)) if shard_size > 1 else 0
