"""What a list says, through the stages, into tars and tables (T1, T2) and what a server claims a file to be (I6)."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile_web
import pyarrow as pa
import pytest
from fetched import fetch_list, write_list
from hostile_web import Hostile, good_image, hosts, whole

from curate.fetch.config import FetchConfig
from curate.ledger.schema import Reason
from tests.test_images import encoded, photograph

SURROGATE = "\ud800".encode("utf-8", "surrogatepass")

TEXTS: dict[str, str] = {  # these come out as they went in
    "plain": "a cat on a mat",
    "NUL": "a\0b",
    "only NUL": "\0",
    "NUL at the end": "cat\0",
    "control characters": "".join(map(chr, range(1, 32))),
    "CRLF": "one\r\ntwo\r\n",
    "CR": "one\rtwo",
    "many newlines": "\n" * 1000,
    "tabs": "\ta\t",
    "blanks around": "  a cat  ",
    "only a blank": " ",
    "line separators": "a\u2028b\u2029c\u0085d",
    "bidi overrides": "\u202egnp.exe\u202c \u2066a\u2069 \u200e\u200f",
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "ZWJ emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308",
    "combining": "e" + "\u0301" * 500,
    "not normalised": "\u212b \u00c5 A\u030a",
    "non-characters": "\uffff \ufdd0 \U0010ffff",
    "byte order mark": "\ufeffcat",
    "private use": "\ue000\U000f0000",
    "zero width": "c\u200ba\u2060t",
    "1 MB": "word " * 200_000,
    "1 MB of one letter": "\u6f22" * 350_000,
    "JSON": '{"a": [1, "b\\u0000"]}',
    "end of JSON": '"}], "status": "failed"}\n{"x": 1}',
    "backslashes": "\\ \\\\ \\u0041 \\n",
    "quotes": "'\"`“”",
    "CSV": 'a,"b"",\n=cmd|" /C calc"!A0',
    "path": "../../../etc/passwd",
    "absolute path": "/etc/cron.d/x",
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "shell": "$(reboot) `reboot` ; rm -rf / | x && y",
    "SQL": "'); DROP TABLE ledger; --",
    "template": "{{7*7}} ${7*7} %s %n {0}",
    "the word null": "null",
    "the word NaN": "NaN",
    "a number": "0012",
    "a tar header": "ustar\0" + "0" * 506,
}
BYTES: dict[str, tuple[bytes | None, str | None]] = {  # what is not UTF-8 is null, by the rule of curate.sources.inputs
    "none": (None, None),
    "empty": (b"", ""),
    "lone surrogate": (b"a" + SURROGATE + b"b", None),
    "pair of surrogates": (SURROGATE + "\udc00".encode("utf-8", "surrogatepass"), None),
    "Latin-1": ("café".encode("latin-1"), None),
    "UTF-16": ("cat".encode("utf-16"), "cat"),
    "overlong": (b"\xc0\xaf..", None),
    "beyond Unicode": (b"\xf4\x90\x80\x80", None),
    "cut short": ("漢".encode()[:2], None),
    "random bytes": (bytes(range(128, 144)), None),
}
NUMBERS: dict[str, tuple[float | None, str | None]] = {
    "number": (1.5, "1.5"),
    "NaN": (float("nan"), None),
    "infinity": (float("inf"), None),
    "minus infinity": (float("-inf"), None),
    "no number": (None, None),
    "small": (5e-324, "5e-324"),
}
CAPTIONS: dict[str, str | None] = {
    **TEXTS,
    **{name: text for name, (_, text) in BYTES.items()},
    **{name: text for name, (_, text) in NUMBERS.items()},
}


@dataclass(frozen=True)
class Stored:
    """One row as it is stored: the table's row, and the sample's members."""

    row: dict[str, Any]
    json: dict[str, Any] | None
    txt: bytes | None
    image: bytes | None


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def stored(rows: list[dict[str, Any]], root: Path) -> list[Stored]:
    """The rows with what the tars hold of them; the tars hold nothing else."""
    members: dict[str, bytes] = {}
    for path in sorted((root / "fetched").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.isreg() and re.fullmatch(r"\d{6}\.(jpg|json|txt)", member.name), member.name
                file = tar.extractfile(member)
                assert file is not None and member.name not in members
                members[member.name] = file.read()
    assert len({row["key"] for row in rows}) == len(rows)
    found = []
    for row in rows:
        image, text, facts = (members.pop(f"{row['key']}.{e}", None) for e in ("jpg", "txt", "json"))
        parsed = json.loads(facts.decode(), parse_constant=refuse) if facts is not None else None
        found.append(Stored(row, parsed, text, image))
    assert not members
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[Hostile]:
    with Hostile("test_rows", hosts=60) as server:
        yield server


@pytest.fixture(scope="module")
def captions(server: Hostile, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    """All captions, by name: three lists, whose columns are text, bytes and numbers."""
    found: dict[str, Stored] = {}
    config = FetchConfig(allow=server.allow)
    texts = pa.array(list(TEXTS.values()), pa.large_string())
    raw = pa.array([b for b, _ in BYTES.values()], pa.binary())
    numbers = pa.array([n for n, _ in NUMBERS.values()], pa.float64(), from_pandas=False)
    for names, column in ((TEXTS, texts), (BYTES, raw), (NUMBERS, numbers)):
        folder = tmp_path_factory.mktemp("captions")
        columns = {"URL": list(hosts(len(names), server.port, "/good.jpg")), "TEXT": column, "copy": column}
        listed = write_list(folder / "list.parquet", columns)
        rows = fetch_list(listed, folder / "data", config, shard_size=10)
        found |= dict(zip(names, stored(rows, folder / "data"), strict=True))
    return found


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions(captions: dict[str, Stored], name: str) -> None:
    """The same text in the table, in the JSON and in the .txt, also of an extra column."""
    expected, found = CAPTIONS[name], captions[name]
    assert found.row["status"] == "success" and found.json is not None
    assert found.row["caption"] == expected and found.json["caption"] == expected
    assert found.txt == (expected or "").encode()
    if name in TEXTS:
        assert found.row["copy"] == found.json["copy"] == expected
    elif name in NUMBERS and expected is not None:
        assert found.row["copy"] == found.json["copy"] == float(expected)


PATHS = [
    *["/x/../../../../good.passwd", "/good/..%2f..%2fetc%2fpasswd", "/good//etc/passwd", "/x\\..\\good\\x", "/good/."],
    *[
        "/good.tar",
        "/good.json",
        "/good.txt",
        "/good.a.b.c.jpg",
        "/good..jpg",
        "/good.",
        "/good",
        "/good/CON",
        "/good/NUL",
    ],
    *["/good/aux.jpg", "/good/%00.jpg", "/good/%0d%0a.jpg", "/good/\u202egpj.exe", "/good/ü.jpg", "/good/" + "x" * 300],
    *["/good?../../x", "/good?key=000001", "/good/*.jpg", "/good/~root", "/good/C:\\x.jpg"],
]


@pytest.fixture(scope="module")
def named(server: Hostile, tmp_path_factory: pytest.TempPathFactory) -> list[Stored]:
    """A row for each path, and each twice: duplicates are rows like others."""
    folder = tmp_path_factory.mktemp("named")
    base = next(hosts(1, server.port, ""))
    urls = [base + path for path in PATHS for _ in range(2)]
    columns = {"url": urls, "__key__": urls, "../x": urls, "jpg": urls, "x" * 300: urls, "naïve \"'": urls, "a.b": urls}
    rows = fetch_list(
        write_list(folder / "list.parquet", columns), folder / "data", FetchConfig(allow=server.allow), 10
    )
    assert {p.name for p in folder.rglob("*") if p.is_file() and p.stat().st_size} >= {"list.parquet", "00000.tar"}
    assert not [p for p in folder.rglob("*") if "passwd" in p.name or "gpj" in p.name]
    return stored(rows, folder / "data")


@pytest.mark.parametrize("number", range(len(PATHS)), ids=[repr(path[:30]) for path in PATHS])
def test_keys_are_ours_whatever_a_url_says(named: list[Stored], number: int) -> None:
    for place in (2 * number, 2 * number + 1):
        found = named[place]
        assert found.row["status"] == "success", found.row
        assert found.row["key"] == f"{place // 10:05d}{place % 10}" and found.image is not None
        assert found.json is not None and found.json["url"] == found.row["url"] == found.row["__key__"]


HTML = b"<!doctype html><title>404</title><p>This picture has gone."
PNG, GIF = (encoded(photograph(40, 30), name) for name in ("png", "gif"))
SERVED: dict[str, tuple[bytes, Reason | None]] = {
    "/html.jpg": (whole(HTML, "Content-Type: image/jpeg"), Reason.NOT_AN_IMAGE),
    "/json.png": (whole(b'{"error": "gone"}', "Content-Type: image/png"), Reason.NOT_AN_IMAGE),
    "/text.webp": (whole(b"GIF is a format", "Content-Type: image/webp"), Reason.NOT_AN_IMAGE),
    "/script.jpg": (whole(b"\n\n  alert(1)", "Content-Type: image/jpeg"), Reason.NOT_AN_IMAGE),
    "/drawing.jpg": (
        whole(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "Content-Type: image/jpeg"),
        Reason.NOT_AN_IMAGE,
    ),
    "/empty.jpg": (whole(b"", "Content-Type: image/jpeg"), Reason.NOT_AN_IMAGE),
    "/picture.html": (whole(good_image(), "Content-Type: text/html"), None),
    "/picture.exe": (whole(good_image(), "Content-Type: application/x-msdownload"), None),
    "/png.jpg": (whole(PNG, "Content-Type: image/jpeg"), None),
    "/gif.png": (whole(GIF, "Content-Type: image/svg+xml"), None),
    "/untold": (whole(good_image()), None),
    "/odd.jpg": (whole(good_image(), "Content-Type: image/\xff; charset=\xfe"), None),
    "/download.jpg": (whole(good_image(), 'Content-Disposition: attachment; filename="../../x.sh"'), None),
}
hostile_web.PAGES.update({path: page for path, (page, _) in SERVED.items()})


@pytest.fixture(scope="module")
def served(server: Hostile, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    folder = tmp_path_factory.mktemp("served")
    urls = [next(hosts(1, server.port, path, first=n)) for n, path in enumerate(SERVED)]
    rows = fetch_list(
        write_list(folder / "list.parquet", {"url": urls}), folder / "data", FetchConfig(allow=server.allow), 10
    )
    return dict(zip(SERVED, stored(rows, folder / "data"), strict=True))


@pytest.mark.parametrize("path", SERVED)
def test_bytes_decide_what_a_file_is(served: dict[str, Stored], path: str) -> None:
    found, reason = served[path], SERVED[path][1]
    assert (found.row["reason"], found.row["http_status"]) == (reason, 200)
    assert (found.image is None) == (reason is not None)
    if reason is not None:
        assert found.row["status"] == "failed_to_resize" and found.row["error_message"]
