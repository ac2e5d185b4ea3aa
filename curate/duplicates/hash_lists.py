"""Files of perceptual hashes, as safety organisations share them: one a line, perhaps with a label behind it."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aesthetic.errors import UserError
from aesthetic.untrusted import check_regular, decode_text, read_bytes

LARGEST_LIST = 1 << 30
"""Bytes that a file of hashes may have: ten million PDQ hashes with labels."""

_ENTRY = re.compile(r"([0-9a-fA-F]{64}|[0-9a-fA-F]{16})(?:[\s,;]+(.*))?")
_COMMENT = re.compile(r"(?:^|\s)#.*")
_DIGEST = re.compile(r"(?:[0-9a-fA-F]{32}|[0-9a-fA-F]{40}|[0-9a-fA-F]{128})\b")
_FEW = 20  # entries below which nothing is said of how many of their bits are set


@dataclass(frozen=True, eq=False)
class HashList:
    """The hashes of a file: PDQ as (n, 4) uint64, or 64-bit perceptual ones as (n,); and what each is called."""

    values: np.ndarray
    labels: list[str]

    @property
    def bits(self) -> int:
        """Of each hash: 256 (PDQ) or 64."""
        return 256 if self.values.ndim == 2 else 64


def read_hashes(path: Path) -> HashList:
    """Read a file of hashes: on each line 64 hex digits (PDQ) or 16 (a perceptual hash), then perhaps a comma or a
    blank and a label; without one an entry is called by its line. A `#` at the start or after a blank begins a comment.

    UserError, by their numbers, for lines that hold no hash, or one of another length than the first; and where they
    can't be PDQ. The lines themselves are not repeated: they would end in a log.
    """
    check_regular(path, LARGEST_LIST)
    stat = path.stat()
    return _read(path.absolute(), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _read(path: Path, size: int, mtime_ns: int) -> HashList:
    """Each command asks several times; another size or time is another file."""
    hashes, labels, wrong, digests = list[str](), list[str](), list[int](), False
    for number, line in enumerate(decode_text(read_bytes(path, LARGEST_LIST)).text.splitlines(), 1):
        entry = _COMMENT.sub("", line).strip()
        if not entry:
            continue
        match = _ENTRY.fullmatch(entry)
        if match is None or (hashes and len(match[1]) != len(hashes[0])):
            wrong.append(number)
            digests |= _DIGEST.match(entry) is not None
            continue
        hashes.append(match[1])
        labels.append((match[2] or "").strip() or f"line {number}")
    if wrong:
        some = ", ".join(map(str, wrong[:3])) + (", ..." if len(wrong) > 3 else "")
        one_kind = f", {len(hashes[0])} digits in each line as in the first" if hashes else ""
        raise UserError(
            f"{path}: no perceptual hash in line{'s' if len(wrong) > 1 else ''} {some}: 64 hex digits (PDQ) or 16 are "
            f"expected{one_kind}, then perhaps a comma and a label"
            + (". (md5, sha1 and sha512 of files go into fetch.deny)" if digests else "")
        )
    if not hashes:
        raise UserError(f"{path} holds no hash")
    words = np.frombuffer(bytes.fromhex("".join(hashes)), ">u8").astype(np.uint64)
    values = words.reshape(len(hashes), -1)
    ones = np.bitwise_count(values).sum(1)
    # PDQ sets the bits above the median, 128 of 256; of any digest 128 +- 8 are set, 15% of them within 2
    if values.shape[1] == 4 and len(values) >= _FEW and (np.abs(ones.astype(int) - 128) <= 2).mean() < 0.5:
        raise UserError(
            f"{path}: 64 digits in each line, but no PDQ hashes: of those 128 bits are set. If they are the sha256 of "
            "files, they go into fetch.deny"
        )
    return HashList(values if values.shape[1] == 4 else values[:, 0], labels)


def mirrored_and_turned(hashes: np.ndarray) -> np.ndarray:
    """PDQ hashes (n, 4) of the same images mirrored and turned in all eight ways: (n, 8, 4) uint64, the first as given.

    Mirroring negates every other frequency along one axis, and a bit says whether one is above the median, which is
    nearly zero; so these bits are turned over. Of 60 photographs such hashes differ from those of the pixels by 16 bits
    on average (22 where both axes are mirrored), and not at all where axes change places.
    """
    bits = np.unpackbits(np.ascontiguousarray(hashes, ">u8").view(np.uint8).reshape(-1, 32), axis=1)[:, ::-1]
    bits = bits.reshape(-1, 16, 16)
    odd = (np.arange(16) % 2 == 0).astype(np.uint8)  # the first is frequency 1
    ways = [bits ^ flips for flips in (0 * odd, odd, odd[:, None], odd ^ odd[:, None])]
    ways += [way.transpose(0, 2, 1) for way in ways]
    packed = [np.packbits(way.reshape(-1, 256)[:, ::-1], axis=1).view(">u8") for way in ways]
    return np.stack(packed, axis=1).astype(np.uint64)
