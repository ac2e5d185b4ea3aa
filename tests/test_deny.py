"""Deny-lists: what is on one is refused, nothing else is, and a list in memory tells nothing."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import os
import pickle
import random
import time
import tracemalloc
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from yarl import URL

from aesthetic.errors import UserError
from curate.fetch import addresses
from curate.fetch.deny import Deny, domains, entry_digest, url_text
from curate.ledger.schema import Reason, RowError
from tests.small_web import image

ANYWHERE = addresses.parse_allow(["0.0.0.0/0:8123", "[::]/0:8123"])


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def listing(folder: Path, *lines: str) -> Deny:
    path = folder / "deny.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return Deny.load([path])


def said(deny: Deny, url: str) -> str | None:
    try:
        deny.check_url(addresses.parse_url(url, ANYWHERE))
    except RowError as e:
        assert e.reason is Reason.DENIED
        return e.detail
    return None


@pytest.mark.parametrize(
    ("entry", "url", "kind"),
    [
        ("https://example.com/a.jpg", "https://example.com/a.jpg", "URL"),
        ("https://example.com/a.jpg", "https://Example.COM:443/a.jpg#part", "URL"),
        ("https://Example.COM:443/a.jpg#part", "https://example.com/a.jpg", "URL"),
        ("https://example.com/a.jpg", "https://example.com/a.jpg?x", None),
        ("https://example.com/a.jpg", "http://example.com/a.jpg", None),
        ("https://example.com/a.jpg", "https://example.com:8443/a.jpg", None),
        ("https://example.com/a.jpg", "https://www.example.com/a.jpg", None),
        ("https://example.com/a.jpg", "https://example.com/A.jpg", None),
        ("http://example.com", "http://example.com/", "URL"),
        ("http://example.com/", "http://example.com", "URL"),
        ("http://example.com/", "http://example.com/a", None),
        ("http://example.com?a=b", "http://example.com/?a=b", "URL"),
        ("https://bücher.example/ü b?c=ä", "https://xn--bcher-kva.example/%C3%BC%20b?c=%C3%A4", "URL"),
        ("https://example.com/a/../b.jpg", "https://example.com/b.jpg", "URL"),
        ("https://example.com/x%2fy?s=%7e", "https://example.com/x%2fy?s=%7e", "URL"),
        ("http://10.1.2.3:8123/a.jpg", "http://10.1.2.3:8123/a.jpg", "URL"),
        ("http://[FD00:0::1]:8123/a.jpg", "http://[fd00::1]:8123/a.jpg", "URL"),
        (sha256("https://example.com/a.jpg"), "https://example.com/a.jpg#x", "URL"),
        (sha256("https://example.com/"), "https://EXAMPLE.com", "URL"),
        ("example.com", "https://example.com/a.jpg", "domain example.com"),
        ("example.com", "http://example.com:8080/", "domain example.com"),
        ("example.com", "https://cdn.img.example.com/a.jpg", "domain example.com"),
        ("example.com", "https://example.com./a.jpg", "domain example.com"),
        ("example.com.", "https://example.com/a.jpg", "domain example.com"),
        ("EXAMPLE.com", "https://EXAMPLE.COM/a.jpg", "domain example.com"),
        ("example.com", "https://badexample.com/a.jpg", None),
        ("example.com", "https://example.com.evil.test/a.jpg", None),
        ("example.com", "https://evil.test/example.com", None),
        ("example.com", "https://evil.test/?u=https://example.com/", None),
        ("cdn.example.com", "https://example.com/a.jpg", None),
        ("cdn.example.com", "https://a.cdn.example.com/a.jpg", "domain cdn.example.com"),
        ("bücher.example", "https://www.xn--bcher-kva.example/", "domain xn--bcher-kva.example"),
        ("xn--bcher-kva.example", "https://BÜCHER.example/", "domain xn--bcher-kva.example"),
        ("bücher。example", "https://bücher.example/", "domain xn--bcher-kva.example"),
        (sha256("example.com"), "https://a.b.example.com/", "domain example.com"),
        (sha256("example.com").upper(), "https://example.com/", "domain example.com"),
        ("10.1.2.3", "http://10.1.2.3:8123/a.jpg", "domain 10.1.2.3"),
        ("10.1.2.3", "http://10.1.2.30:8123/a.jpg", None),
        ("fd00:0::1", "http://[fd00::1]:8123/a.jpg", "domain fd00::1"),
        (sha256("2.3"), "http://10.1.2.3:8123/a.jpg", None),
        (hashlib.md5(b"example.com").hexdigest(), "https://example.com/", None),
    ],
)
def test_urls_and_domains(entry: str, url: str, kind: str | None, tmp_path: Path) -> None:
    deny = listing(tmp_path, "# a list", "other.test", entry, "https://other.test/x")
    assert said(deny, url) == (f"its {kind} is on a deny-list" if kind else None)


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha256", "sha512"])
def test_bytes(algorithm: str, tmp_path: Path) -> None:
    bodies = [image(n)[1] for n in range(12)]
    listed = {n: hashlib.new(algorithm, bodies[n]).hexdigest() for n in (2, 7)}
    deny = listing(tmp_path, listed[2], listed[7].upper() + "   # where it came from", "example.com")
    for n, body in enumerate(bodies):
        if n not in listed:
            deny.check_body(body, hashlib.sha256(body).digest())
            continue
        with pytest.raises(RowError) as e:
            deny.check_body(body, hashlib.sha256(body).digest())
        assert e.value.reason is Reason.DENIED
        assert e.value.detail == f"the {algorithm} of its bytes is on a deny-list"


@pytest.mark.parametrize("size", [16, 20, 32, 64])
def test_digests_with_zeros_at_their_ends(size: int) -> None:
    values = [bytes(size), b"\0" + b"\1" * (size - 1), b"a" * (size - 2) + b"\0\0", b"a" * (size - 2) + b"\0b"]
    for listed in (values, values[:1], values[2:3]):
        deny = Deny(reversed(listed * 2))
        for value in [*values, b"a" * size, b"\xff" * size, b"a" * (size - 1) + b"\0"]:
            assert deny._has(value) == (value in listed)


def test_an_empty_one_denies_nothing(tmp_path: Path) -> None:
    for deny in (Deny(), Deny.load([]), listing(tmp_path), listing(tmp_path, "", "  ", "# nothing", "\t#")):
        assert not deny and deny.digest == Deny().digest
        deny.check_url(URL("https://example.com/"))
        deny.check_body(b"", hashlib.sha256(b"").digest())
    assert listing(tmp_path, "example.com")


def test_the_digest_is_of_what_is_denied(tmp_path: Path) -> None:
    lines = ["example.com", "https://example.org/a", "0" * 32, "f" * 40, "a" * 64, "b" * 128]
    digest = listing(tmp_path, *lines).digest
    assert len(digest) == 64 and int(digest, 16)
    hashed = [sha256("example.com"), sha256("https://example.org/a"), *lines[2:]]
    for same in (lines[::-1], ["# x", *lines, "", "example.COM  # again"], lines * 2, hashed):
        assert listing(tmp_path, *same).digest == digest
    digests = {listing(tmp_path, *lines[:n], *lines[n + 1 :]).digest for n in range(len(lines))}
    assert len(digests | {digest}) == 7


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfexample.com\r\nhttps://example.org/x # why\r\n  example.net")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf# more\nb.test\n"))
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf" + b"0" * 64)
    deny = Deny.load([tmp_path / "a.txt", str(tmp_path / "b.txt.gz"), tmp_path / "c.txt"])
    for url in ("https://example.com/", "https://example.org/x", "https://example.net/", "https://b.test/"):
        assert said(deny, url)
    assert not said(deny, "https://example.org/y") and deny._has(bytes(32))
    assert pickle.loads(pickle.dumps(deny)).digest == deny.digest


@pytest.mark.parametrize(
    "line",
    [
        *["com", "localhost", "*.example.com", ".example.com", "example..com", "example.com/", "example.com/a.jpg"],
        *["example.com:80", "user@example.com", "two words.example", "0.0.0.0 example.com", "127.1", "0x7f.0.0.1"],
        *[
            "ftp://example.com/a",
            "//example.com/a",
            "https://",
            "http://[]@/",
            "https://me@example.com/",
            "http://exa mple.com/",
        ],
        *["http://example.com:99999/", "http://2130706433/", "https://example.com/" + "a" * 8000],
        *["0" * 31, "0" * 33, "0" * 56, "g" * 32, "sha256:" + "0" * 64, "0" * 32 + " " + "0" * 32, "\ufeff", "\x00"],
    ],
)
def test_a_wrong_line_is_an_error_that_names_it_and_does_not_repeat_it(line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as e:
        listing(tmp_path, "# a list", "example.com", line, "example.org")
    assert f"{tmp_path / 'deny.txt'}, line 3:" in str(e.value)
    assert line not in str(e.value).partition(", line 3:")[2] or line == "com"  # the hint has an example.com


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    good = gzip.compress(b"example.com\n" * 1000)
    for name, content in [
        ("cut.gz", good[:-12]),
        ("no.gz", b"example.com\n"),
        ("bad.gz", good[:20] + b"\xff" * 20 + good[40:]),
        ("latin1.txt", "bücher.example".encode("latin-1")),
    ]:
        (tmp_path / name).write_bytes(content)
    for name in ("cut.gz", "no.gz", "bad.gz", "latin1.txt", "absent.txt", ""):
        with pytest.raises(UserError, match="deny-list") as e:
            Deny.load([tmp_path / name])
        assert str(tmp_path / name) in str(e.value)


def test_files_that_are_no_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curate.fetch.deny._AT_LEAST", 2 << 20)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    (tmp_path / "folder").mkdir()
    (tmp_path / "long.txt").write_bytes(b"example.com\n" + b"a" * 70_000)
    (tmp_path / "bomb.txt").write_bytes(gzip.compress(bytes(1 << 20)))  # told by its bytes, not by its name
    (tmp_path / "blank.gz").write_bytes(gzip.compress(b"\n" * (3 << 20), 1))
    (tmp_path / "rubbish").write_bytes(os.urandom(5000))
    (tmp_path / "half.txt").write_bytes(codecs.BOM_UTF16_LE + b"e\0x\0a\0m\0p\0l\0e\0.\0c\0o\0m\0\n\0\0\xd8")
    for name, says in {
        "fifo": "a pipe",
        "folder": "a folder",
        "dangling": "not there",
        "round": "back to itself",
        "long.txt": "line 2: longer than 65,536 bytes",
        "bomb.txt": "line 1: longer",
        "blank.gz": "decompresses to more than",
        "rubbish": "lines 1, 2, 3",
        "half.txt": "line 2: not utf-16-le",
    }.items():
        with pytest.raises(UserError, match=says) as e:
            Deny.load([tmp_path / name])
        assert str(e.value).startswith(f"deny-list {tmp_path / name}")
    with pytest.raises(UserError, match="a device"):
        Deny.load(["/dev/zero"])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path: Path, encoding: str, end: str) -> None:
    lines = ["example.com", "# ü", "https://bücher.example/ü", "", *(f"h{n}.example" for n in range(40_000)), "0" * 64]
    text = end.join(lines)
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / "a.txt").write_bytes(mark + text.encode(encoding))
    assert Deny.load([tmp_path / "a.txt"]).digest == listing(tmp_path, *lines).digest
    (tmp_path / "b.txt").write_bytes(mark + f"{text}{end}not this{end}".encode(encoding))
    with pytest.raises(UserError, match=f"b.txt, line {len(lines) + 1}: not an http"):
        Deny.load([tmp_path / "b.txt"])


def test_wrong_lines_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lines 2, 4, 5, \.\.\. \(4 in all\): not an http"):
        listing(tmp_path, "example.com", "||a^", "b.example", "*.c", "localhost", "d.example", "x y")
    with pytest.raises(UserError, match=r"\(1,000 or more in all\)"):
        listing(tmp_path, *["no"] * 1500)


def test_what_most_lines_look_like_is_read_as_all_lines_are() -> None:
    """There is a short way for plain URLs; it must come to what `addresses.parse_url` comes to."""
    pick = random.Random(3)
    letters = [*"aZ09-_.~!$&'()*+,;=:@%/?#[]", "//", "/.", "/..", "%2e", "ü", ":80", ":443", "example.com", "0x1"]
    checked = 0
    for _ in range(8000):
        host = "".join(pick.choices(letters, k=pick.randrange(3))) + pick.choice(["example.com", "a.b", "A.b", "a.0"])
        url = f"{pick.choice(['http', 'https'])}://{host}" + "".join(pick.choices(letters, k=pick.randrange(12)))
        try:
            parsed = addresses.parse_url(url, ())
        except RowError:
            continue
        assert entry_digest(url.encode()).hex() == sha256(url_text(parsed)), url
        checked += 1
    assert checked > 1000


def test_domains() -> None:
    assert domains("a.b.example.com.") == ["a.b.example.com", "b.example.com", "example.com"]
    assert domains("localhost") == domains("") == []
    assert domains("1.2.3.4") == ["1.2.3.4"] and domains("::1") == ["::1"]


def test_a_list_in_memory_names_nothing(tmp_path: Path) -> None:
    kept = pickle.dumps(listing(tmp_path, "https://secret.example/a.jpg", "secret.example"))
    assert b"secret" not in kept and b"a.jpg" not in kept


def test_real_urls(tmp_path: Path) -> None:
    """Every tenth of real URLs listed: exactly these are refused, be they listed as text or by their sha256."""
    source = Path(__file__).parents[2] / "shared/data/urls"
    files = sorted(source.glob("*.parquet"))
    if not files:
        pytest.skip("no list of real URLs here")
    urls = []
    for text in dict.fromkeys(pq.read_table(files[0], columns=["URL"])["URL"].to_pylist()):
        try:
            urls.append(addresses.parse_url(text, ()))
        except RowError:
            continue
    urls = list({url_text(url): url for url in urls}.values())
    listed = urls[::10]
    for lines in ([str(url) for url in listed], [sha256(url_text(url)) for url in listed]):
        deny = listing(tmp_path, *lines)
        assert [url for url in urls if said(deny, str(url))] == listed


@pytest.mark.long
def test_a_million_entries(tmp_path: Path) -> None:
    """Loaded in seconds, in less than 100 MB, and looked up in microseconds (with room for a busy machine)."""
    entries = [os.urandom(32) for _ in range(10**6)]
    path = tmp_path / "hashes.txt"
    path.write_text("".join(f"{entry.hex()}\n" for entry in entries))
    start = time.process_time()
    deny = Deny.load([path])
    assert time.process_time() - start < 10
    start = time.process_time()
    assert all(deny._has(entry) for entry in entries[:20_000])
    assert not any(deny._has(entry[::-1]) for entry in entries[:20_000])
    assert (time.process_time() - start) / 40_000 < 20e-6
    digest = deny.digest
    del deny, entries
    tracemalloc.start()
    assert Deny.load([path]).digest == digest
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    plain = tmp_path / "urls.txt"
    plain.write_text("".join(f"https://host{n % 5000}.example.com/{n}/a.jpg?b={n}\n" for n in range(10**6)))
    start = time.process_time()
    deny = Deny.load([plain])
    assert time.process_time() - start < 20
    assert said(deny, "https://host7.example.com/5007/a.jpg?b=5007")
    assert not said(deny, "https://host7.example.com/5007/a.jpg?b=5008")
