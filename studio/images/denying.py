"""Denying from the page: what is written to the data folder's deny-list, and the command that takes it out."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from aesthetic.errors import UserError
from curate.fetch.deny import Deny
from curate.fetch.deny_file import DenyEntry, What, add_entry, entry_for, naming, read_entries, remove_entry
from curate.layout import Data, shard_name
from curate.ledger.denied import DeniedImages, denied_images, removal
from curate.ledger.schema import Status
from curate.ledger.view import tables
from curate.ledger.why import Explanation, explain

if TYPE_CHECKING:
    from studio.data import StudioData

LOOKED_AT = 500_000
"""Rows of a data folder whose URLs are compared, in some 2 s, to find out whether there is anything to remove. Of a
larger one the images that were denied one by one are looked for, and where domains were it is taken for granted."""
_FEW = 200  # images that are looked for one by one


class DenyRequest(BaseModel):
    """An image to deny, or its domain."""

    model_config = ConfigDict(extra="forbid")

    key: str = Field(pattern="^[0-9]{5,20}$")
    what: What = "image"


class DenyEntryView(BaseModel):
    """A line of the deny-list."""

    entry: str = Field(description="a URL, a domain with all below it, or a digest of bytes")
    what: What
    key: str | None = Field(description="the image at which it was decided")


class DenyView(BaseModel):
    """The studio's deny-list. It takes nothing away by itself."""

    file: str = Field(description="its path or URL")
    entries: list[DenyEntryView] = Field(description="the last 10,000")
    count: int
    command: str | None = Field(
        description="what takes out of the data folder what the list names, a command a line; null where it holds none"
    )


def deny(folder: StudioData, request: DenyRequest) -> DenyView:
    """Add a line for an image or its domain. KeyError where there is no such image, UserError where it has no URL."""
    entry = _entry(_row(folder, request.key), request.what)
    entries = add_entry(folder.data, entry)
    folder.log(f"denied: {request.what} {request.key}")
    return _view(folder, entries)


def allow(folder: StudioData, key: str, what: What) -> DenyView:
    """Remove the line again, and others that name the image, or its domain, in other words."""
    row = _row(folder, key)
    entries = remove_entry(folder.data, _entry(row, what).entry)
    while (other := named_by(row, [e for e in entries if e.what == what])) is not None:
        entries = remove_entry(folder.data, other.entry)
    folder.log(f"no longer denied: {what} {key}")
    return _view(folder, entries)


def deny_view(folder: StudioData) -> DenyView:
    """What the list names."""
    return _view(folder, read_entries(folder.data))


def _row(folder: StudioData, key: str) -> Explanation:
    shown, _ = folder.images.columns()
    return explain(folder.data, key, shown.found)


def _entry(row: Explanation, what: What) -> DenyEntry:
    return entry_for(row.key, what, row.url or row.download.get("final_url"), row.download.get("sha256"))


def named_by(row: Explanation, entries: Iterable[DenyEntry]) -> DenyEntry | None:
    """The first entry that names a row: by its URL, its domain, or its bytes."""
    return naming(entries, (row.url, row.download.get("final_url")), row.download.get("sha256"))


def _view(folder: StudioData, entries: list[DenyEntry]) -> DenyView:
    data = folder.data
    lines = [DenyEntryView(entry=e.entry, what=e.what, key=e.key) for e in entries[-10_000:]]
    shown, _ = folder.images.columns()
    fetched = shown.found[0]
    rows = sum(int(facts.get("count", 0)) for facts in fetched.facts)
    state = data.store.stamp(data.deny_list), data.store.stamp(data.recipe), fetched.digest(), tuple(data.packs())
    command = _removal_command(data, rows, state) if entries else None
    return DenyView(file=data.shown(data.deny_list), entries=lines, count=len(entries), command=command)


@lru_cache(16)
def _removal_command(data: Data, rows: int, state: tuple[Any, ...]) -> str | None:
    """The commands, one a line, after which the data folder holds nothing that its deny-list names.

    state: what is another when the answer may be.
    """
    lists = _lists_of(data)
    files = [*lists, *([own] if (own := data.shown(data.deny_list)) not in lists else [])]
    try:
        deny = Deny.load([data.local(data.deny_list)])
    except UserError as e:  # a line that somebody wrote is no entry
        return f"# {e}"
    if rows <= LOOKED_AT:
        found = denied_images(data, deny)
    elif (known := _known_images(data)) is not None:
        found = known
    else:
        every = DeniedImages(images=1, packs=dict.fromkeys(data.packs(), 1))
        return "\n".join(removal(data, every, files))
    return "\n".join(removal(data, found, files)) or None


def _known_images(data: Data) -> DeniedImages | None:
    """What the list's own lines say is there, where they all are of single images, and few: their shards, and the packs
    that hold them. Where there is more, such as the same URL once more, the run says so before it does anything."""
    entries, found, shards = [e for e in read_entries(data) if not e.removed], DeniedImages(), set[str]()
    if len(entries) > _FEW or any(e.what != "image" or e.key is None for e in entries):
        return None
    known = tables(data)
    for entry in entries:
        try:
            row = explain(data, entry.key or "", known)
        except KeyError:
            continue
        if row.status == Status.SUCCESS:
            found.images += 1
            shards.add(shard_name(row.shard))
            found.packs |= {name: 1 for name, holds in row.packs.items() if holds is not False}
    found.shards = sorted(shards)
    return found


def _lists_of(data: Data) -> list[str]:
    """The deny-lists that the folder's recipe names already."""
    try:
        recipe = yaml.safe_load(data.local(data.recipe).read_text(encoding="utf-8"))
        return [str(file) for file in recipe["fetch"]["deny"]]
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        return []
