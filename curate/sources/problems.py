"""What of a list or a folder could not be taken as it is: counted by kind, the first three of each kind named."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

from aesthetic.errors import UserError
from aesthetic.untrusted import printable

LARGEST_CAPTION = 1 << 20
"""Bytes of a caption's file, or of the JSON about one image; what is larger is none."""

_ICONV = "`iconv -f WINDOWS-1252 -t UTF-8` (or whatever it is) converts it"
_KINDS = {  # kind: (what is wrong, what to do)
    # of lists
    "broken": ("lines are broken, and rows without an image (bad_line)", ""),
    "not_utf8": ("values are not UTF-8, and null", _ICONV),
    "too_long": ("values are too long, and null (4 MB; or 64 kB, where a shard holds half a gigabyte)", ""),
    "no_caption": ("captions are neither text nor a list of texts, and null", ""),
    # of samples
    "encoding": (
        "captions are neither UTF-8 nor marked by a byte order mark, and are taken for missing",
        _ICONV,
    ),
    "size": (f"captions are no files of at most {LARGEST_CAPTION:,} bytes, and are taken for missing", ""),
    "json": ("samples have JSON that cannot be read, and are taken without it", ""),
    "metadata": ("rows of the metadata cannot be used", ""),
    "absent": ("rows of the metadata name files that are not there", ""),
    "names": ("different names in the samples' JSON are too many, and left out", ""),
}


class Problems:
    """Problems of one list or folder. `general` are sentences about the whole of it."""

    def __init__(self) -> None:
        self.general: list[str] = []
        self.counts: Counter[str] = Counter()
        self.first: defaultdict[str, list[str]] = defaultdict(list)
        self._seen: set[tuple[str, str]] = set()

    def add(self, kind: str, where: str) -> None:
        """Count one of a kind of _KINDS; `where` names it."""
        self.counts[kind] += 1
        if len(self.first[kind]) < 3:
            self.first[kind].append(printable(where, 240))

    def add_once(self, kind: str, where: str, why: str = "") -> None:
        """As `add`, of samples, which are read more than once; `why` names it in full where `where` does not."""
        if (kind, where) not in self._seen:
            self._seen.add((kind, where))
            self.add(kind, why or where)

    def sentences(self) -> list[str]:
        """All of them, a sentence for each kind."""
        found = [*self.general]
        for kind, count in sorted(self.counts.items()):
            what, way_out = _KINDS[kind]
            names, more = "; ".join(self.first[kind]), count - len(self.first[kind])
            found.append(
                f"{count:,} {what}: {names}"
                + (f" and {more:,} more" if more else "")
                + (f". {way_out}" if way_out else "")
            )
        return found

    def refuse_many(self, kind: str, of: int, what: str, hint: str = "") -> None:
        """UserError where more than a hundredth of `of` rows or samples are of a kind."""
        if (count := self.counts[kind]) * 100 > of:
            problem = _KINDS[kind][0].partition(",")[0]
            raise UserError(
                f"{what}: {count:,} of {of:,} {problem}, which is too many: {'; '.join(self.first[kind])}{hint}"
            )


def unreadable(path: Path, error: BaseException) -> UserError:
    """The error for a file that a library gave up on."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{path}: cannot be read: {printable(reason, 300)}")
