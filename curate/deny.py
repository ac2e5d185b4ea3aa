"""Deny-lists: URLs, domains and bytes that are never fetched, decoded, stored or shown.

    deny = Deny.load(["deny.txt", "more.txt.gz"])
    deny.url(url)               # before a request, at every hop: RowError `denied`
    deny.body(data, sha256)     # before anything looks at the bytes: RowError `denied`

A list is a text file, one entry a line; blank lines and what follows a `#` at the start of a line or after a blank are
comments. An entry is one of

- a URL, http or https: that URL, with or without a fragment;
- a domain such as example.com: it and all its subdomains; or a host's address;
- a digest in hexadecimal: 32 digits are the md5, 40 the sha1, 64 the sha256, 128 the sha512 of the original bytes.
  64 digits are also compared with the sha256 of the URL and of the domain, as `url_text` and `domains` write them: a
  list can be passed on without being a map of what it denies.

In memory all of it is digests, so here too nothing tells what is denied.
"""

from __future__ import annotations

import binascii
import codecs
import gzip
import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import ip_address, ip_network
from itertools import chain
from pathlib import Path

import numpy as np
from yarl import URL

from curate.guard import Allowed, parse_url
from curate.hashes import ALGORITHMS, digest
from curate.ledger import Reason, RowError
from curate.store import UserError


class Deny:
    """What is denied. An empty one denies nothing, is false, and costs nothing.

    Args:
        digests: of the lengths in `hashes.ALGORITHMS`; in memory each takes its own length and no more.
    """

    def __init__(self, digests: Iterable[bytes] = ()) -> None:
        found: dict[int, bytearray] = {}
        for entry in digests:
            found.setdefault(len(entry), bytearray()).extend(entry)
        self._sorted = {size: _sorted(found.pop(size), size) for size in sorted(found)}
        content = hashlib.sha256()
        for size, values in self._sorted.items():
            content.update(f"{size} {len(values)} ".encode())
            content.update(values.data)
        self.digest: str = content.hexdigest()
        """Hexadecimal; of what is denied alone: not of the order, the comments, or what is listed in which form."""

    @classmethod
    def load(cls, files: Sequence[str | Path]) -> Deny:
        """Read deny-lists; those whose names end in .gz are decompressed.

        Raises:
            UserError: a file that cannot be read, or a line that is no entry, by file and number. The line itself is
                not repeated: it would end in a log.
        """
        return cls(chain.from_iterable(_entries(Path(file)) for file in files))

    def __bool__(self) -> bool:
        return bool(self._sorted)

    def url(self, url: URL) -> None:
        """Refuse a URL that is listed, or whose domain is. `url` is as `guard.parse_url` gives it.

        Raises:
            RowError: denied, saying whether it is the URL or which domain.
        """
        if not self._sorted:
            return
        if self._has(digest(url_text(url).encode(), "sha256")):
            raise RowError(Reason.DENIED, "its URL is on a deny-list")
        for domain in domains(url.raw_host or ""):
            if self._has(digest(domain.encode(), "sha256")):
                raise RowError(Reason.DENIED, f"its domain {domain} is on a deny-list")

    def body(self, data: bytes, sha256: bytes) -> None:
        """Refuse bytes that are listed by a digest; `sha256` is theirs, 32 bytes.

        Raises:
            RowError: denied, saying which digest.
        """
        for size in self._sorted:
            algorithm = ALGORITHMS[size]
            if self._has(sha256 if algorithm == "sha256" else digest(data, algorithm)):
                raise RowError(Reason.DENIED, f"the {algorithm} of its bytes is on a deny-list")

    def _has(self, value: bytes) -> bool:
        values = self._sorted.get(len(value))
        if values is None:
            return False
        at = int(values.searchsorted(np.frombuffer(value, values.dtype))[0])
        return values[at : at + 1].tobytes() == value


def _sorted(content: bytearray, size: int) -> np.ndarray:
    """Sorted and without repetitions. Of dtype S: it orders as bytes do, and drops NULs only where one is looked at."""
    values = np.frombuffer(content, f"S{size}")
    values.sort()
    fresh = np.append(True, values[1:] != values[:-1])
    return values if fresh.all() else values[fresh]


def url_text(url: URL) -> str:
    """A URL as it is listed: host in lower-case ASCII, no default port, at least `/` as path, no fragment."""
    return str(url) if url.raw_path_qs != "/" else f"{url.origin()}/"


def domains(host: str) -> list[str]:
    """The names under which a host may be listed: itself, and the domains above it down to two labels."""
    host = host.rstrip(".")
    labels = host.split(".")
    if ":" in host or labels[-1].isdigit():
        return [host]
    return [".".join(labels[i:]) for i in range(len(labels) - 1)]


# ------------------------------------------------------------------------------------------------------------- reading

# What most lines are made of, and what `parse_url` would leave as it is; it takes 30 microseconds to find that out.
_HOST = rb"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.){1,10}[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"
_PATH = rb"/(?!\.)(?:[!$%&'()*+,\-0-9:;=?@A-Z_a-z~.]|/(?!\.)){0,1000}(?<!\?)"
_PLAIN = re.compile(b"(?:https?://" + _HOST + _PATH + b"|" + _HOST + b")")
_COMMENT = re.compile(rb"(?:^|\s)#.*")
_DIGITS = {2 * size for size in ALGORITHMS}
_EVERYWHERE = (ip_network("0.0.0.0/0"), ip_network("::/0"))


def _entries(file: Path) -> Iterator[bytes]:
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                line = (line if b"#" not in line else _COMMENT.sub(b"", line)).strip()
                if not line:
                    continue
                try:
                    entry = _entry(line)
                except (ValueError, IndexError, RowError) as e:  # IndexError: yarl, see parse_url
                    raise UserError(
                        f"deny-list {file}, line {number}: not an http or https URL, a domain such as example.com, or "
                        f"a digest of {', '.join(str(2 * size) for size in ALGORITHMS)} hexadecimal digits"
                    ) from e
                yield entry
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"deny-list {file}: {getattr(e, 'strerror', None) or e}") from e


def _entry(line: bytes) -> bytes:
    """The digest that stands for a line. ValueError, IndexError or RowError where it is no entry."""
    if line.isalnum() and len(line) in _DIGITS:
        return binascii.unhexlify(line)
    if _PLAIN.fullmatch(line) and b"&amp;" not in line.lower():
        return digest(line, "sha256")
    text = line.decode()
    return digest((_listed_url(text) if "://" in text else _listed_host(text)).encode(), "sha256")


def _listed_url(text: str) -> str:
    port = URL(text).port or 0
    return url_text(parse_url(text, tuple(Allowed(network, port) for network in _EVERYWHERE)))


def _listed_host(text: str) -> str:
    try:
        return str(ip_address(text))
    except ValueError:
        url = parse_url(f"http://{text}/", ())
    host = (url.raw_host or "").rstrip(".")
    if "." not in host or url.explicit_port is not None or url.raw_path_qs != "/":
        raise ValueError("not a domain")
    return host
