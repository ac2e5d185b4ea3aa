"""DATA/deny.txt: a data folder's own deny-list, which every run over it heeds. People write it while they look at
images, and `tastemaker remove` what it took out, hashed.

    https://example.com/a.jpg  # image 000010005
    example.com  # domain of 000010005
    3b0c...  # removed 000010005 2026-11-30

Lines that people put there themselves stay. Nothing is taken away by writing to it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from yarl import URL

from aesthetic.errors import UserError
from curate.fetch.deny import Deny, domain_entry, domains, entry_digest, url_entry
from curate.ledger.schema import RowError

if TYPE_CHECKING:
    from curate.layout import Data

What = Literal["image", "domain"]

_HEAD = "# What must not come in: denied while looking at images, or removed. Every run over this folder heeds it.\n"
_SAID = {"image": "image", "domain": "domain of"}
_COMMENT = re.compile(r"(?:^|\s)#\s*(.*)")
_OF_KEY = re.compile(r"(image|domain of) (\d{5,20})")
_REMOVED = re.compile(r"^([0-9a-fA-F]{64})\s+#\s*removed(?: (\d{5,20}))? (\d{4}-\d\d-\d\d)\s*$", re.MULTILINE)
_ANY_KEY = re.compile(r"(image|domain of|removed) (\d{5,20})\b")
_LONGEST = 64 << 20  # bytes


@dataclass(frozen=True)
class DenyEntry:
    """A line of the file."""

    entry: str  # a URL, a domain, or a digest
    what: What
    key: str | None  # of the image at which it was decided, where the line says it
    removed: bool = False  # it is of what was taken out


def entry_for(key: str, what: What, url: str | None, sha256: str | None) -> DenyEntry:
    """What denies an image or its domain; an image without a URL is denied by the sha256 of its original bytes.

    UserError where it has none of these.
    """
    entry = (url_entry if what == "image" else domain_entry)(url or "")
    if entry is None and what == "image":
        entry = sha256 if sha256 and re.fullmatch("[0-9a-f]{64}", sha256) else None
    if entry is None:
        wanted = "a domain, which this one's URL does not have" if what == "domain" else "a URL or a sha256"
        raise UserError(f"image {key} can't be denied so: that takes {wanted}")
    return DenyEntry(entry, what, key)


def deny_of(data: Data, files: Sequence[str | Path]) -> Deny:
    """What is denied in a data folder: by these lists, and by its own.

    UserError as `Deny.load` has it.
    """
    content = own_list(data)
    if content is None:
        return Deny.load(files)
    lines = _REMOVED.findall(content.decode("utf-8-sig", "replace"))
    return Deny.load(
        [*files, data.local(data.deny_list)],
        {bytes.fromhex(digest): date for digest, _, date in lines},
        {key: date for _, key, date in lines if key},
    )


def own_list(data: Data) -> bytes | None:
    """What a data folder's own list says; None where it has none. UserError where that can't be read."""
    if not data.exists(data.deny_list):
        return None
    content = data.store.read_small(data.deny_list, _LONGEST)
    if content is None:
        raise UserError(f"{data.shown(data.deny_list)} is a link, or larger than 64 MB: name it in fetch.deny instead")
    return content


def united(contents: Sequence[tuple[bytes, Callable[[str], str | None]]]) -> bytes:
    """What the deny-lists of several folders say, each entry once; with each comes what a key of it is called in the
    folder that it is for (None: nothing)."""
    lines, seen = [_HEAD], {_HEAD}

    def rekeyed(key_of: Callable[[str], str | None], found: re.Match[str]) -> str:
        key = key_of(found[2])
        return f"{found[1]} {key}" if key is not None else found[1]

    for content, key_of in contents:
        for line in content.decode("utf-8-sig", "replace").splitlines():
            entry = _digest_of(line.encode())
            name = f"{entry} {_REMOVED.match(line.strip()) is not None}" if entry else f"{line}\n"
            if name not in seen:
                seen.add(name)
                comment = _COMMENT.search(line)
                at = comment.start() if comment else len(line)
                lines.append(line[:at] + _ANY_KEY.sub(functools.partial(rekeyed, key_of), line[at:], count=1) + "\n")
    return "".join(lines).encode() if len(lines) > 1 else b""


def read_entries(data: Data) -> list[DenyEntry]:
    """What the file lists, in its order; nothing where there is none."""
    return _entries(data.store.read_small(data.deny_list, _LONGEST) or b"")


def naming(entries: Iterable[DenyEntry], urls: Iterable[str | None], sha256: str | None) -> DenyEntry | None:
    """The first entry that names one of these URLs, a domain of theirs, or the bytes with this digest."""
    names = {sha256}
    for url in filter(None, urls):
        if (listed := url_entry(url)) is not None:
            names |= {listed, *domains(URL(listed, encoded=True).raw_host or "")}
    return next((e for e in entries if e.entry in names), None)


def add_entry(data: Data, entry: DenyEntry) -> list[DenyEntry]:
    """Add a line, unless the same is listed; what is listed then. Whole and on the disk, or put on the store, then.

    UserError where the folder can't be written to.
    """

    def edit(before: bytes) -> bytes:
        if any(e.entry == entry.entry for e in _entries(before)):
            return before
        ends = b"" if before.endswith(b"\n") or not before else b"\n"
        line = f"{entry.entry}  # {_SAID[entry.what]} {entry.key}\n"
        return (before or _HEAD.encode()) + ends + line.encode()

    return _entries(data.store.change(data.deny_list, edit))


def remove_entry(data: Data, entry: str) -> list[DenyEntry]:
    """Remove the lines that list it; what is listed then."""

    def edit(before: bytes) -> bytes:
        lines = before.splitlines(keepends=True)
        return b"".join(line for line in lines if all(e.entry != entry for e in _entries(line)))

    if not data.exists(data.deny_list):
        return []
    return _entries(data.store.change(data.deny_list, edit))


def add_removed(data: Data, entries: Mapping[str, str], names: Collection[str], date: str) -> None:
    """Add what was removed, hashed: sha256 in hex -> the key ("" where no row is meant). Lines that name such an image
    in clear, by any of the digests in `names`, are hashed too.

    UserError where the folder can't be written to.
    """

    def line_of(digest: str) -> bytes:
        key = entries.get(digest, "")
        return f"{digest}  # removed {key}{' ' if key else ''}{date}\n".encode()

    def edit(before: bytes) -> bytes:
        lines, there = list[bytes](), set[str]()
        for line in before.splitlines(keepends=True):
            found = None if _REMOVED.match(line.decode("utf-8-sig", "replace").strip()) else _digest_of(line)
            if found is not None and found in names:
                line = line_of(found) if found not in there else b""
            if found or (found := _digest_of(line)):
                there.add(found)
            lines.append(line)
        if lines and lines[-1] and not lines[-1].endswith(b"\n"):
            lines.append(b"\n")
        return b"".join([*(lines or [_HEAD.encode()]), *(line_of(d) for d in entries if d not in there)])

    data.store.change(data.deny_list, edit)


def _digest_of(line: bytes) -> str | None:
    """The digest that stands for a line, in hex; None where it is no entry."""
    text = _COMMENT.sub("", line.decode("utf-8-sig", "replace").strip()).strip()
    try:
        return entry_digest(text.encode()).hex() if text else None
    except (ValueError, IndexError, RowError):  # IndexError: yarl
        return None


def _entries(content: bytes) -> list[DenyEntry]:
    found = []
    for line in content.decode("utf-8-sig", "replace").splitlines():
        comment = _COMMENT.search(line)
        entry = (line[: comment.start()] if comment else line).strip()
        if not entry:
            continue
        said = _OF_KEY.fullmatch(comment[1].strip()) if comment else None
        is_domain = said[1] == "domain of" if said else "://" not in entry and "." in entry
        key, removed = said[2] if said else None, _REMOVED.match(line.strip()) is not None
        found.append(DenyEntry(entry, "domain" if is_domain else "image", key, removed))
    return found
