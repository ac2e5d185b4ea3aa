"""Bytes against the digests that lists carry for them."""

from __future__ import annotations

import base64
import hashlib
import io

import pytest
from PIL import Image

from curate.fetch.deny import ALGORITHMS, verify_hash
from curate.ledger.schema import Reason, RowError
from tests.small_web import image

DATA = b"the bytes as the server sent them"
HEX = {name: hashlib.new(name, DATA).hexdigest() for name in ALGORITHMS.values()}
BASE64 = {name: base64.b64encode(bytes.fromhex(value)).decode() for name, value in HEX.items()}


@pytest.mark.parametrize("algorithm", ALGORITHMS.values())
def test_the_spellings_of_a_digest(algorithm: str) -> None:
    named = algorithm.replace("sha", "sha-")
    spelled = [HEX[algorithm], BASE64[algorithm]]
    for text in [
        *spelled,
        HEX[algorithm].upper(),
        *(f"  {s}\n" for s in spelled),
        *(f"{prefix}{s}" for s in spelled for prefix in (f"{algorithm}:", f"{algorithm}-", f"{named.upper()}: ")),
    ]:
        verify_hash(DATA, text)
        with pytest.raises(RowError) as e:
            verify_hash(DATA + b"!", text)
        assert e.value.reason is Reason.HASH_MISMATCH
        found = hashlib.new(algorithm, DATA + b"!").hexdigest()
        assert e.value.detail == f"{algorithm} of the bytes is {found}, the list says {HEX[algorithm]}"


@pytest.mark.parametrize("text", [None, "", "  "])
def test_nothing_to_verify(text: str | None) -> None:
    verify_hash(DATA, text)


@pytest.mark.parametrize(
    "text",
    [
        *["nan", "None", "0", "-1932818491239", HEX["md5"][:-1], HEX["sha256"] + "0", "g" * 32, "ü" * 32],
        *[HEX["sha256"][:48], BASE64["md5"][:-2], "=" * 24, f"sha256:{HEX['md5']}", f"md5:{HEX['sha256']}"],
        *[f"crc32:{HEX['md5']}", "sha256:", "x" * 1_000_000],
    ],
)
def test_what_is_no_digest_vouches_for_nothing(text: str) -> None:
    with pytest.raises(RowError, match="the list's hash") as e:
        verify_hash(DATA, text)
    assert e.value.reason is Reason.HASH_MISMATCH and len(e.value.detail) < 200


def test_a_known_sha256_is_not_computed_again() -> None:
    """Seen by giving a wrong one: it is believed for sha256, and not used for the others."""
    wrong = bytes(32)
    verify_hash(DATA, "00" * 32, wrong)
    with pytest.raises(RowError):
        verify_hash(DATA, HEX["sha256"], wrong)
    verify_hash(DATA, HEX["md5"], wrong)


@pytest.mark.parametrize("algorithm", ["md5", "sha256", "sha512"])
def test_a_thousand_rows_of_which_a_hundred_were_changed(algorithm: str) -> None:
    """50 with a byte of their own, 50 encoded again: 100 refused, all others kept."""
    data, expected = [], []
    for n in range(1000):
        body = image(n % 40)[1] + n.to_bytes(2, "big")  # all different
        expected.append(hashlib.new(algorithm, body).hexdigest())
        if n % 20 == 3:
            at = n * 7919 % len(body)
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        elif n % 20 == 11:
            out = io.BytesIO()
            Image.open(io.BytesIO(body)).convert("RGB").resize((64, 64)).save(out, "JPEG")
            body = out.getvalue()
        data.append(body)
    refused = []
    for n, (body, text) in enumerate(zip(data, expected, strict=True)):
        try:
            verify_hash(body, text)
        except RowError as e:
            assert e.reason is Reason.HASH_MISMATCH
            refused.append(n)
    assert refused == [n for n in range(1000) if n % 20 in (3, 11)]
