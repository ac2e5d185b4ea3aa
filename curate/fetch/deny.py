"""What must not come in: deny-lists, and bytes that are not those whose digest a list carries.

    deny = Deny.load(["deny.txt", "more.txt.gz"])
    deny.check_url(url)             # before a request, at every hop: RowError `denied`
    deny.check_body(data, sha256)   # before anything looks at the bytes: RowError `denied`
    verify_hash(data, expected)     # RowError `hash_mismatch`

A deny-list names URLs, domains and bytes that are never fetched, decoded, stored or shown. It is a text file, one entry
a line; blank lines and what follows a `#` at the start of a line or after a blank are comments. An entry is one of

- a URL, http or https: that URL, with or without a fragment;
- a domain such as example.com: it and all its subdomains; or a host's address;
- a digest in hexadecimal: 32 digits are the md5, 40 the sha1, 64 the sha256, 128 the sha512 of the original bytes.
  64 digits are also compared with the sha256 of the URL and of the domain, as `url_text` and `domains` write them: a
  list can be passed on without being a map of what it denies.

In memory all of it is digests, so here too nothing tells what is denied.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_address, ip_network
from itertools import chain
from pathlib import Path

import numpy as np
from yarl import URL

from aesthetic.errors import UserError
from aesthetic.untrusted import marked_encoding, open_regular
from curate.fetch.addresses import Allowed, parse_url
from curate.ledger.schema import Reason, RowError, removal_note
from curate.store.clients import is_url

ALGORITHMS = {16: "md5", 20: "sha1", 32: "sha256", 64: "sha512"}
"""A digest's length in bytes tells which of these made it."""


class Deny:
    """What is denied. An empty one denies nothing, is false, and costs nothing.

    Args:
        digests: of the lengths in `ALGORITHMS`; in memory each takes its own length and no more.
        removed: those of them that stand for what was removed from the data folder -> the date. Such a row is not
            denied, but removed once more.
        removed_keys: the rows that were -> the date.
    """

    def __init__(
        self,
        digests: Iterable[bytes] = (),
        removed: Mapping[bytes, str] | None = None,
        removed_keys: Mapping[str, str] | None = None,
    ) -> None:
        self._removed, self._removed_keys = removed or {}, removed_keys or {}
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
        other = hashlib.sha256(b"".join(v.tobytes() for size, v in self._sorted.items() if size != 32))
        self.hashes: str | None = other.hexdigest() if self._sorted.keys() - {32} else None
        """The same of its md5, sha1 and sha512 alone: they say nothing once the original bytes are gone."""

    @classmethod
    def load(
        cls,
        files: Sequence[str | Path],
        removed: Mapping[bytes, str] | None = None,
        removed_keys: Mapping[str, str] | None = None,
    ) -> Deny:
        """Read deny-lists, at paths or URLs; compressed ones too. `deny_file.deny_of` adds a data folder's own.

        Raises:
            UserError: a file that cannot be read, or lines that are no entries, by file and number: their count and
                the first three. The lines themselves are not repeated: they would end in a log.
        """
        return cls(chain.from_iterable(_entries(_here(file)) for file in files), removed, removed_keys)

    def __bool__(self) -> bool:
        return bool(self._sorted)

    def check_url(self, url: URL) -> None:
        """Refuse a URL that is listed, or whose domain is. `url` is as `addresses.parse_url` gives it.

        Raises:
            RowError: denied, saying whether it is the URL or which domain; or removed.
        """
        if not self._sorted:
            return
        self._check(digest(url_text(url).encode(), "sha256"), "its URL is on a deny-list")
        for domain in domains(url.raw_host or ""):
            self._check(digest(domain.encode(), "sha256"), f"its domain {domain} is on a deny-list")

    def check_body(self, data: bytes, sha256: bytes) -> None:
        """Refuse bytes that are listed by a digest; `sha256` is theirs, 32 bytes.

        Raises:
            RowError: denied, saying which digest; or removed.
        """
        for size in self._sorted:
            algorithm = ALGORITHMS[size]
            value = sha256 if algorithm == "sha256" else digest(data, algorithm)
            self._check(value, f"the {algorithm} of its bytes is on a deny-list")

    def check_sha256(self, sha256: bytes) -> None:
        """Refuse bytes of which nothing but the sha256 is known. Raises what `check_body` does."""
        self._check(sha256, "the sha256 of its bytes is on a deny-list")

    def check_row(self, key: str, text: str | None) -> None:
        """Refuse a row that was removed, before anything else is asked of it: by its URL as it is listed, or by its key
        where the plan has no URL any more.

        Raises:
            RowError: removed.
        """
        if text is None and (date := self._removed_keys.get(key)) is not None:
            raise RowError(Reason.REMOVED, removal_note(date))
        if text is not None and self._removed:
            try:
                self.check_url(_parse_anywhere(text))
            except RowError as e:
                if e.reason is Reason.REMOVED:
                    raise
            except (ValueError, IndexError):  # yarl, see parse_url
                pass

    def denies(self, text: str) -> bool:
        """Whether a URL as a list has it is denied, it or its domain; no where it is no URL."""
        try:
            self.check_url(_parse_anywhere(text))
        except RowError as e:
            return e.reason in (Reason.DENIED, Reason.REMOVED)
        except (ValueError, IndexError):  # yarl, see parse_url
            pass
        return False

    def sha256s(self) -> list[bytes]:
        """The digests of 32 bytes: of URLs, of domains and of bytes."""
        values = self._sorted.get(32)
        return [] if values is None else [bytes(v) for v in values.view(np.uint8).reshape(-1, 32)]

    def _check(self, value: bytes, said: str) -> None:
        if self._has(value):
            if (date := self._removed.get(value)) is not None:
                raise RowError(Reason.REMOVED, removal_note(date))
            raise RowError(Reason.DENIED, said)

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


def url_entry(text: str) -> str | None:
    """A URL as a list of images has it, as it is listed; None where it is none."""
    try:
        return url_text(_parse_anywhere(text))
    except (ValueError, IndexError, RowError):  # yarl, see parse_url
        return None


def digests_of(text: str) -> list[bytes]:
    """The sha256 of all entries that would name a URL as a list has it: it, and its domains. None where it is none."""
    if (entry := url_entry(text)) is None:
        return []
    names = [entry, *domains(URL(entry, encoded=True).raw_host or "")]
    return [digest(name.encode(), "sha256") for name in names]


def domain_entry(text: str) -> str | None:
    """The domain of a URL as it is listed, whose it is by the list of public suffixes; None where it has none."""
    from curate.fetch.budget import registered_domain

    if (entry := url_entry(text)) is None:
        return None
    domain = registered_domain(URL(entry, encoded=True).raw_host or "")
    return domain if "." in domain or ":" in domain else None  # a name of this machine's network is no entry


# ------------------------------------------------------------------------------------------------------------- reading

# What most lines are made of, and what `parse_url` would leave as it is. Without this shortcut a list takes seven times
# as long to load, and `PLAIN_SQL` saves 62% of the search for what is denied (docs/benchmarks.md).
_HOST = rb"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.){1,10}[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"
_PATH = rb"/(?!\.)(?:[!$%&'()*+,\-0-9:;=?@A-Z_a-z~.]|/(?!\.)){0,1000}(?<!\?)"
_PLAIN = re.compile(b"(?:https?://" + _HOST + _PATH + b"|" + _HOST + b")")
_COMMENT = re.compile(rb"(?:^|\s)#.*")
_DIGITS = {2 * size for size in ALGORITHMS}
_EVERYWHERE = (ip_network("0.0.0.0/0"), ip_network("::/0"))


PLAIN_SQL = (
    "coalesce(regexp_full_match(u, 'https?://"
    + _HOST.decode()
    + "/[!$%&''()*+,0-9:;=?@A-Z_a-z~./-]*') AND length(u) < 1000 AND NOT contains(u, '/.') AND NOT ends_with(u, '?'),"
    " false)"
)
"""Whether a URL `u` is one that `parse_url` leaves as it is, for DuckDB, whose patterns cannot look ahead."""

LONGEST = 1 << 16
"""Bytes of a line: no URL is longer than 8,000 characters."""

_RATIO, _AT_LEAST = 100, 1 << 26
"""A compressed list may decompress to this many times its size, and to so many bytes in any case."""

_MOST_WRONG = 1000  # lines that are no entries, after which the rest is not counted


def deny_place(text: str) -> str:
    """The name of a deny-list that means the same in every folder: its whole path, or its URL."""
    return text if is_url(text) else str(Path(text).expanduser().absolute())


def _here(file: str | Path) -> Path:
    if not is_url(str(file)):
        return Path(file)
    from curate.store.mirror import here

    return here(str(file))


def _entries(file: Path) -> Iterator[bytes]:
    wrong: list[int] = []
    cause: Exception | None = None
    try:
        for number, line in _lines(file):
            line = (line if b"#" not in line else _COMMENT.sub(b"", line)).strip()
            if not line:
                continue
            try:
                entry = entry_digest(line)
            except (ValueError, IndexError, RowError) as e:  # IndexError: yarl, see parse_url
                wrong.append(number)
                cause = cause or e
                if len(wrong) == _MOST_WRONG:
                    break
                continue
            if not wrong:
                yield entry
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"deny-list {file}: {getattr(e, 'strerror', None) or e}") from e
    except UserError as e:
        raise UserError(f"deny-list {e}") from e
    if wrong:  # a list without some of its lines would deny less than its owner thinks
        lines = f"line {wrong[0]}"
        if len(wrong) > 1:
            count = f"{len(wrong):,}" + (" or more" if len(wrong) == _MOST_WRONG else "")
            first = ", ".join(map(str, wrong[:3]))
            lines = f"lines {first}{', ...' if len(wrong) > 3 else ''} ({count} in all)"
        raise UserError(
            f"deny-list {file}, {lines}: not an http or https URL, a domain such as example.com, or "
            f"a digest of {', '.join(str(2 * size) for size in ALGORITHMS)} hexadecimal digits"
        ) from cause


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The numbered lines of a list that are not empty, in UTF-8, without their ends: \\n, \\r\\n or \\r.

    Raises UserError for what is no regular file, for a line that is too long to be an entry, and for a compressed file
    that is made to fill the memory.
    """
    with open_regular(file) as raw:
        compressed = file.suffix == ".gz" or raw.peek(2)[:2] == b"\x1f\x8b"  # type: ignore[attr-defined]
        most = max(_AT_LEAST, _RATIO * os.fstat(raw.fileno()).st_size)
        source = gzip.GzipFile(fileobj=raw) if compressed else raw
        head = source.read(4)
        encoding, mark = marked_encoding(head) or ("utf-8", 0)
        decoder = None if encoding == "utf-8" else codecs.getincrementaldecoder(encoding)("strict")
        rest, read, number, ends = b"", 0, 0, False
        while not ends:
            part = source.read(1 << 20) if read else head[mark:]
            ends = not part and read > 0
            read += len(part) or 1
            if compressed and read > most:
                raise UserError(f"{file}: decompresses to more than {most:,} bytes, {_RATIO} times its size")
            try:
                rest += part if decoder is None else decoder.decode(part, ends).encode()
            except UnicodeError as e:
                raise UserError(f"{file}, line {number + 1}: not {encoding}, which its first bytes say it is") from e
            half = rest.endswith(b"\r") and not ends  # of a \r\n
            lines = (rest[:-1] if half else rest).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
            rest = lines.pop() + (b"\r" if half else b"")
            yield from [(n, line) for n, line in enumerate(lines, number + 1) if line]
            number += len(lines)
            if len(rest) > LONGEST:
                raise UserError(f"{file}, line {number + 1}: longer than {LONGEST:,} bytes, which no entry is")
        yield number + 1, rest


def entry_digest(line: bytes) -> bytes:
    """The digest that stands for a line. ValueError, IndexError or RowError where it is no entry."""
    if line.isalnum() and len(line) in _DIGITS:
        return binascii.unhexlify(line)
    if _PLAIN.fullmatch(line) and b"&amp;" not in line.lower():
        return digest(line, "sha256")
    text = line.decode()
    if "://" in text:
        return digest(url_text(_parse_anywhere(text)).encode(), "sha256")
    try:
        host = str(ip_address(text))
    except ValueError:
        url = parse_url(f"http://{text}/", ())
        host = (url.raw_host or "").rstrip(".")
        if "." not in host or url.explicit_port is not None or url.raw_path_qs != "/":
            raise ValueError("not a domain") from None
    return digest(host.encode(), "sha256")


def _parse_anywhere(text: str) -> URL:
    """A URL, be its address one that may not be contacted."""
    port = URL(text).port or 0
    return parse_url(text, tuple(Allowed(network, port) for network in _EVERYWHERE))


# -------------------------------------------------------------------------------------------------------------- digests


def digest(data: bytes, algorithm: str) -> bytes:
    """The digest of `data` by one of `ALGORITHMS`; what it is for is recognition, also where it is md5."""
    value: bytes = getattr(hashlib, algorithm)(data, usedforsecurity=False).digest()
    return value


_PREFIX = re.compile(r"(md5|sha-?(?:1|256|512))[:=-]", re.IGNORECASE)


def verify_hash(data: bytes, expected: str | None, sha256: bytes | None = None) -> None:
    """Refuse bytes that are not those whose digest a list carries.

    Args:
        data: the original bytes, as the server sent them.
        expected: a digest by one of `ALGORITHMS`, told by its length: hexadecimal as img2dataset and DataComp have it,
            or base64 as Open Images has it (`OriginalMD5`). Case of hexadecimal, blanks around it and a name before it
            (`sha256:`, `md5-`) don't matter. None and "" mean that there is nothing to verify.
        sha256: the sha256 of `data` where it is known already.

    Raises:
        RowError: hash_mismatch, also where `expected` is no such digest: then nothing vouches for the bytes.
    """
    text = (expected or "").strip()
    if not text:
        return
    wanted = _read(text)
    if wanted is None:
        names = ", ".join(ALGORITHMS.values())
        raise RowError(Reason.HASH_MISMATCH, f"the list's hash {text[:40]!r} is none of {names}")
    algorithm = ALGORITHMS[len(wanted)]
    found = sha256 if sha256 is not None and algorithm == "sha256" else digest(data, algorithm)
    if found != wanted:
        raise RowError(Reason.HASH_MISMATCH, f"{algorithm} of the bytes is {found.hex()}, the list says {wanted.hex()}")


def _read(text: str) -> bytes | None:
    prefix = _PREFIX.match(text)
    text = text[prefix.end() :].strip() if prefix else text
    try:
        if len(text) in {2 * size for size in ALGORITHMS}:  # which no base64 of a digest has
            value = bytes.fromhex(text)
        else:
            value = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    algorithm = ALGORITHMS.get(len(value))
    if prefix and prefix[1].lower().replace("-", "") != algorithm:
        return None
    return value if algorithm else None
