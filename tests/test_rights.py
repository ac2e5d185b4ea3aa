"""What image files say of themselves, by files of C2PA's own library, of Pillow, and made byte by byte."""

from __future__ import annotations

import io
import json
import random
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from curate.images.rights import MOST_PARTS, MOST_XMP, read_rights
from demo.web import Route, Web
from tests.side_environments import SideEnvironments
from tests.test_fetch_job import fetch

FILES = Path(__file__).parent / "rights"  # make.py says how they were made
MADE = {
    "not_allowed": "notAllowed ai_training",
    "constrained": "constrained ai_generative_training",
    "two_pieces": "notAllowed data_mining",
    "allowed": None,
}


def files() -> list[Path]:
    return sorted(p for p in FILES.iterdir() if p.suffix != ".py" and p.is_file())


@pytest.mark.parametrize("path", files(), ids=lambda p: p.name)
def test_files_of_the_c2pa_library(path: Path) -> None:
    said = MADE[path.stem]
    assert read_rights(path.read_bytes()) == ({"c2pa": said} if said else {})


def test_there_is_a_file_of_each_format() -> None:
    assert {p.suffix for p in files()} == {".jpg", ".png", ".webp", ".avif"}
    assert {p.stem for p in files()} == MADE.keys()


WRITERS = "c2pa-python==0.38.1 cryptography==50.0.2 cffi==2.1.1 pycparser==3.0 pyexiv2==2.16.0"


@pytest.mark.long
def test_truth_tables_of_others_libraries_over_http(side: SideEnvironments, tmp_path: Path) -> None:
    """Every purpose and use of C2PA's two assertions, and IPTC's data mining, in files that C2PA's library and exiv2
    write: fetched from a real server, with the signals respected and not."""
    (tmp_path / "made").mkdir()
    made = side("write_rights.py", str(tmp_path / "made"), WRITERS)
    assert len(made) == 63
    said = {}
    for name, (signal, words) in made.items():
        refused = "PROHIBITED" in words if signal == "iptc" else not words.startswith("allowed")
        said[name] = f"{signal}: {words}" if refused and not words.endswith("ai_inference") else None
        found = read_rights((tmp_path / "made" / name).read_bytes())
        assert found == ({signal: words} if said[name] else {}), name
    assert sum(value is None for value in said.values()) == 24
    with Web({f"/{name}": Route(file=str(tmp_path / "made" / name)) for name in made}, hosts=1) as web:
        rows = {"url": [web.url(0, f"/{name}") for name in made], "caption": ["a"] * len(made)}
        for respect in (("c2pa", "iptc"), ("iptc",), ()):
            table = fetch(tmp_path / "-".join(["run", *respect]), rows, f"127.0.0.0/8:{web.port}", respect=respect)
            assert table["opt_out"].to_pylist() == [*said.values()]
            reasons = ["opted_out" if said[name] and made[name][0] in respect else None for name in made]
            assert table["reason"].to_pylist() == reasons


# ---------------------------------------------------------------------------------------------- C2PA, byte by byte


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def labelled(label: bytes, *boxes: bytes) -> bytes:
    return box(b"jumb", box(b"jumd", bytes(16) + b"\x03" + label + b"\0") + b"".join(boxes))


def cbor(value: Any) -> bytes:
    """RFC 8949, for maps, lists, texts and small numbers."""

    def head(major: int, number: int) -> bytes:
        return bytes([major << 5 | number]) if number < 24 else bytes([major << 5 | 25]) + struct.pack(">H", number)

    if isinstance(value, dict):
        return head(5, len(value)) + b"".join(cbor(k) + cbor(v) for k, v in value.items())
    if isinstance(value, list):
        return head(4, len(value)) + b"".join(map(cbor, value))
    return head(0, value) if isinstance(value, int) else head(3, len(value)) + value.encode()


def store(content: bytes, label: bytes = b"c2pa.training-mining", kind: bytes = b"cbor") -> bytes:
    assertion = labelled(label, box(kind, content))
    return labelled(b"c2pa", labelled(b"urn:uuid:1", labelled(b"c2pa.assertions", assertion)))


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    plain = out.getvalue()
    more = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return plain[:33] + more + plain[33:]


def jpeg(*segments: tuple[int, bytes]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    plain = out.getvalue()
    more = b"".join(bytes([0xFF, marker]) + struct.pack(">H", 2 + len(body)) + body for marker, body in segments)
    return plain[:2] + more + plain[2:]


def said_by(manifests: bytes) -> str | None:
    return read_rights(png((b"caBX", manifests))).get("c2pa")


PURPOSES = {"data_mining": True, "ai_training": True, "ai_generative_training": True, "ai_inference": False, "x": False}


@pytest.mark.parametrize("label", ["c2pa", "cawg"])
@pytest.mark.parametrize(("purpose", "counts"), PURPOSES.items())
@pytest.mark.parametrize("use", ["notAllowed", "constrained", "allowed", "notallowed", ""])
def test_c2pa_truth_table(label: str, purpose: str, counts: bool, use: str) -> None:
    said = f"{use} {purpose}" if counts and use in ("notAllowed", "constrained") else None
    entries = {f"{label}.{purpose}": {"use": use}, f"{label}.ai_inference": {"use": "allowed"}}
    assertion = f"{label}.training-mining".encode()
    assert said_by(store(cbor({"entries": entries}), assertion)) == said
    assert said_by(store(cbor(entries), assertion)) == said  # as early writers had it
    assert said_by(store(cbor({"entries": entries}), assertion + b"__1")) == said
    assert said_by(store(json.dumps({"entries": entries}).encode(), assertion, b"json")) == said
    assert said_by(store(cbor({"entries": entries}), b"org.training-mining")) is None


REFUSED = cbor({"entries": {"c2pa.ai_training": {"use": "notAllowed"}}})


def test_c2pa_in_pieces_and_in_any_manifest() -> None:
    whole = store(REFUSED)
    cuts = [whole[:40], whole[40:90], whole[90:]]
    pieces = [
        (0xEB, b"JP\0\1" + struct.pack(">I", n + 1) + (whole[:8] if n else b"") + piece) for n, piece in enumerate(cuts)
    ]
    for order in ([0, 1, 2], [2, 0, 1]):
        assert read_rights(jpeg(*(pieces[i] for i in order))) == {"c2pa": "notAllowed ai_training"}
    assert read_rights(jpeg((0xEB, b"JP\0\2" + struct.pack(">I", 1) + whole), (0xEB, b"other"))) != {}
    assert read_rights(jpeg((0xEC, b"JP\0\2" + struct.pack(">I", 1) + whole))) == {}  # another marker

    allowed = labelled(
        b"urn:2", labelled(b"c2pa.assertions", labelled(b"c2pa.training-mining", box(b"cbor", cbor({}))))
    )
    refused = whole[8 + 30 :]  # its manifest
    assert said_by(labelled(b"c2pa", refused, allowed)) == said_by(labelled(b"c2pa", allowed, refused)) is not None


def test_c2pa_in_cbor_of_all_kinds() -> None:
    use = b"\x63use\x6anotAllowed"
    for inner in (
        b"\xa1" + use,
        b"\xbf" + use + b"\xff",  # of no stated length
        b"\xd8\x20\xa1" + use,  # tagged
        b"\xa2\x01\x02" + use,  # a key that is no text
        b"\xa1\x63use\x7f\x63not\x67Allowed\xff",  # a text in pieces
        b"\xa5\x61a\xf9\x3c\x00\x61b\xfb" + bytes(8) + b"\x61c\xf5\x61d\x3a\0\0\0\1" + use,
        b"\xa2\x61a\x82\x01\x42xy" + use,
    ):
        assert said_by(store(b"\xa1\x70c2pa.data_mining" + inner)) == "notAllowed data_mining", inner


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xa1",
        REFUSED[:-1],
        b"\xbf\x61a",
        b"\xff",
        b"\x1c",
        b"\x5b" + b"\xff" * 8,
        b"\x9b" + b"\xff" * 8,
        b"\xbb" + b"\xff" * 8,
        b"\xc2" * 10_000,
        b"\x81" * 10_000,
        b"\x9f" * 10_000,
        b"\x7f\x41a\xff",
        b"\x62\xff\xfe",
        b"\x9f" + b"\0" * 100_000 + b"\xff",
        b"\x81" * 10 + REFUSED,
    ],
)
def test_broken_cbor_says_nothing(content: bytes) -> None:
    start = time.process_time()
    assert said_by(store(content)) is None
    assert time.process_time() - start < 0.1


def test_boxes_without_end() -> None:
    nested = b"training-mining"
    for _ in range(3000):
        nested = box(b"jumb", nested)
    start = time.process_time()
    assert said_by(nested) is said_by(b"training-mining" + box(b"jumb", b"") * 100_000) is None
    assert said_by(struct.pack(">I4sQ", 1, b"jumb", 3) + b"training-mining") is None
    assert read_rights(png(*[(b"teXt", b"")] * (MOST_PARTS + 1), (b"caBX", store(REFUSED)))) == {}
    assert read_rights(jpeg(*[(0xFE, b"")] * (MOST_PARTS + 1), (0xEB, b"JP\0\1\0\0\0\1" + store(REFUSED)))) == {}
    assert time.process_time() - start < 1


# ------------------------------------------------------------------------------------------------------------- IPTC

HEAD = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
TAIL = "</rdf:RDF></x:xmpmeta>"
PLUS = 'xmlns:plus="http://ns.useplus.org/ldf/xmp/1.0/"'
VALUES = {
    **dict.fromkeys(("DMI-UNSPECIFIED", "DMI-ALLOWED", "DMI-", "", "prohibited"), False),
    **dict.fromkeys(("DMI-PROHIBITED", "DMI-PROHIBITED-AIMLTRAINING", "DMI-PROHIBITED-GENAIMLTRAINING"), True),
    **dict.fromkeys(("DMI-PROHIBITED-EXCEPTSEARCHENGINEINDEXING", "DMI-PROHIBITED-SEECONSTRAINT"), True),
    **dict.fromkeys(("DMI-PROHIBITED-SEEEMBEDDEDRIGHTSEXPR", "DMI-PROHIBITED-SEELINKEDRIGHTSEXPR"), True),
}


def packets(value: str) -> list[str]:
    """The ways in which XMP can state it."""
    ways = [
        f'<rdf:Description rdf:about="" {PLUS} plus:DataMining="{value}"/>',
        f'<rdf:Description rdf:about="" {PLUS}><plus:DataMining>{value}</plus:DataMining></rdf:Description>',
        f'<rdf:Description {PLUS}><plus:DataMining rdf:resource="{value}"/></rdf:Description>',
        f'<rdf:Description {PLUS.replace("plus", "p", 1)} p:DataMining=" {value} "/>',
    ]
    return [f"{HEAD}{way}{TAIL}" for way in ways]


def with_xmp(kind: str, packet: bytes) -> bytes:
    if kind == "PNG":
        return png((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet))
    if kind == "packed PNG":
        return png((b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(packet)))
    out = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(out, kind, xmp=packet)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "packed PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize(("value", "refused"), VALUES.items())
def test_iptc_truth_table(kind: str, value: str, refused: bool) -> None:
    for spelt in (value, f"http://ns.useplus.org/ldf/vocab/{value}"):
        for packet in packets(spelt):
            assert read_rights(with_xmp(kind, packet.encode())) == ({"iptc": value} if refused else {}), packet


def test_xmp_that_is_broken_foreign_or_hostile() -> None:
    def said(packet: str) -> str | None:
        return read_rights(png((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet.encode()))).get("iptc")

    good = packets("DMI-PROHIBITED")[0]
    assert said(f'<?xpacket begin="\ufeff" id="W5M0"?>{good}{" " * 2000}<?xpacket end="w"?>\0') == "DMI-PROHIBITED"
    assert said(good.removesuffix(TAIL)) == "DMI-PROHIBITED"  # cut short, behind what counts
    assert said(good.replace("useplus", "other")) is None
    assert said(f"{HEAD}DataMining DMI-PROHIBITED{TAIL}") is None
    assert said(" " * MOST_XMP + good) is None
    lol = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10 if i else "lol"}">' for i in range(12))
    start = time.process_time()
    for content in ("&l11;", "DMI-PROHIBITED"):
        assert said(f"<!DOCTYPE x [{lol}]>{packets(content)[1]}") is None
    assert said("<a DataMining=''>" * 50_000) is None
    bomb = zlib.compress(bytes(20_000_000), 9)
    assert read_rights(png(*[(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb)] * 3)) == {}
    assert time.process_time() - start < 1.5  # most of it packing that bomb


# ------------------------------------------------------------------------------------------------------------ bounds


def samples() -> list[bytes]:
    xmp = packets("DMI-PROHIBITED")[1].encode()
    made = [with_xmp(kind, xmp) for kind in ("JPEG", "PNG", "packed PNG", "WEBP", "AVIF")]
    return [*(p.read_bytes() for p in files() if p.stem != "two_pieces"), *made, png((b"caBX", store(REFUSED)))]


def mutate(data: bytes, rng: random.Random) -> bytes:
    body = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 40))):
        at, kind = rng.randrange(len(body)), rng.randrange(5)
        if kind == 0:
            body[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            body[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x9F, 0xBF, 0x5B))
        elif kind == 2:
            body[at : at + 4] = struct.pack(">I", rng.choice((0, 1, 7, 8, 2**31 - 1, 2**32 - 1, rng.randrange(5000))))
        elif kind == 3 and len(body) > 20:
            del body[at : at + rng.randrange(1, 200)]
        else:
            body[at:at] = body[at : at + rng.randrange(1, 200)]
        if not body:
            return b""
    return bytes(body)


def fuzz(rounds: int, seed: int) -> None:
    rng, originals = random.Random(seed), samples()
    still = 0
    for _ in range(rounds):
        data = mutate(rng.choice(originals), rng)
        start = time.process_time()
        found = read_rights(data)
        assert time.process_time() - start < 0.25
        assert found.keys() <= {"c2pa", "iptc"} and all(len(word) < 300 for word in found.values())
        still += bool(found)
    assert rounds / 10 < still < rounds  # mutations reach what is read, and do not only break its frame


def test_mutations_end_quietly() -> None:
    fuzz(600, 1)


@pytest.mark.long
def test_ten_thousand_mutations_end_quietly() -> None:
    fuzz(10_000, 2)


def test_what_says_nothing_costs_next_to_nothing() -> None:
    """0.1 ms an image at most; a noisy machine is given five tries."""
    pixels = Image.effect_noise((600, 400), 60).convert("RGB")
    for kind in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF"):
        out = io.BytesIO()
        pixels.save(out, kind)
        times = []
        for _ in range(5):
            start = time.process_time()
            for _ in range(50):
                assert read_rights(out.getvalue()) == {}
            times.append((time.process_time() - start) / 50)
        assert min(times) < 0.2e-3, kind  # 0.01 to 0.09 ms where it was measured
