"""Digests of bytes as lists carry them."""

from __future__ import annotations

import base64
import hashlib
import re

from curate.ledger.schema import Reason, RowError

ALGORITHMS = {16: "md5", 20: "sha1", 32: "sha256", 64: "sha512"}
"""A digest's length in bytes tells which of these made it."""

_PREFIX = re.compile(r"(md5|sha-?(?:1|256|512))[:=-]", re.IGNORECASE)


def digest(data: bytes, algorithm: str) -> bytes:
    """The digest of `data` by one of `ALGORITHMS`; what it is for is recognition, also where it is md5."""
    value: bytes = getattr(hashlib, algorithm)(data, usedforsecurity=False).digest()
    return value


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
