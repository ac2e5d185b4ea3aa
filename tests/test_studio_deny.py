"""Denying from the studio: what is written, by however many at once, and the command that takes the images out."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_data import SHARD_SIZE, make_data
from small_serve import serving_data
from small_web import small_web

from aesthetic.errors import UserError
from curate.fetch.deny import Deny, domain_entry, url_entry
from curate.fetch.deny_file import DenyEntry, add_entry, entry_for, naming, read_entries, remove_entry
from curate.layout import Data
from curate.ledger.schema import make_key
from curate.store import cache as store_cache
from curate.store import mirror
from curate.store.objects import ObjectStore

ROOT = Path(__file__).parents[1]


def key_of(number: int) -> str:
    return make_key(number // SHARD_SIZE, number % SHARD_SIZE, SHARD_SIZE)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(make_data(tmp_path / "data"))


def entries_of(data: Data) -> list[tuple[str, str, str | None]]:
    return [(e.entry, e.what, e.key) for e in read_entries(data)]


def test_what_is_written_is_a_deny_list(data: Data) -> None:
    assert read_entries(data) == [] and remove_entry(data, "example.com") == []
    assert not data.deny_list.exists()
    one = DenyEntry("http://example.com/1.jpg", "image", "0000001")
    two = DenyEntry("example.com", "domain", "0000002")
    assert add_entry(data, one) == [one]
    assert add_entry(data, two) == add_entry(data, two) == [one, two]
    assert add_entry(data, DenyEntry("example.com", "domain", "0000004")) == [one, two], "it is listed already"
    deny = Deny.load([data.deny_list])
    assert deny.denies("http://example.com/1.jpg") and deny.denies("https://www.example.com/x")
    assert not deny.denies("http://example.org/1.jpg")
    assert remove_entry(data, "example.com") == [one] == read_entries(data)
    assert not Deny.load([data.deny_list]).denies("https://www.example.com/x")
    assert remove_entry(data, one.entry) == [] and not Deny.load([data.deny_list])


def test_lines_of_people_stay(data: Data) -> None:
    mine = (
        "\ufeff# mine\r\nhttps://example.org/a?b=c#d  \n\n" + "0123456789abcdef" * 2 + " # its md5\nexample.net # bad\n"
    )
    text = mine + "example.edu"  # without an end of line
    data.deny_list.write_text(text, encoding="utf-8", newline="")
    known = [
        ("https://example.org/a?b=c#d", "image", None),
        ("0123456789abcdef0123456789abcdef", "image", None),
        ("example.net", "domain", None),
        ("example.edu", "domain", None),
    ]
    assert entries_of(data) == known
    add_entry(data, DenyEntry("http://example.com/1.jpg", "image", "0000001"))
    assert entries_of(data) == [*known, ("http://example.com/1.jpg", "image", "0000001")]
    remove_entry(data, "http://example.com/1.jpg")
    assert data.deny_list.read_bytes().decode() == text + "\n"


@pytest.mark.parametrize(
    ("url", "image", "domain"),
    [
        ("http://A.Example.com:80/x y.jpg#z", "http://a.example.com/x%20y.jpg", "example.com"),
        ("https://user.github.io/a.jpg", "https://user.github.io/a.jpg", "user.github.io"),
        ("https://a.b.example.co.uk/", "https://a.b.example.co.uk/", "example.co.uk"),
        ("http://127.0.0.1:8790/a.png", "http://127.0.0.1:8790/a.png", "127.0.0.1"),
        ("http://[::1]/a.png", "http://[::1]/a.png", "::1"),
        ("https://bücher.example/ü", "https://xn--bcher-kva.example/%C3%BC", "xn--bcher-kva.example"),
        ("http://localhost/a.png", "http://localhost/a.png", None),
        ("no url", None, None),
        ("/a/file.jpg", None, None),
        ("ftp://example.com/a", None, None),
        ("", None, None),
        ("http://[]@/", None, None),
    ],
)
def test_entries_are_as_lists_have_them(
    url: str, image: str | None, domain: str | None, data: Data, tmp_path: Path
) -> None:
    assert url_entry(url) == image and domain_entry(url) == domain
    for entry in filter(None, (image, domain)):
        (tmp_path / "one.txt").write_text(entry)
        assert Deny.load([tmp_path / "one.txt"]).denies(url), entry
        found = naming([DenyEntry("other.example", "domain", None), DenyEntry(entry, "image", None)], [None, url], None)
        assert found is not None and found.entry == entry
    if image is None:
        assert entry_for("0000001", "image", url, "a" * 64).entry == "a" * 64
        with pytest.raises(UserError, match="a URL or a sha256"):
            entry_for("0000001", "image", url, None)
    if domain is None:
        with pytest.raises(UserError, match="a domain"):
            entry_for("0000001", "domain", url, "a" * 64)


# ------------------------------------------------------------------------------------------------------ several writers


def add_many(place: str, start: int) -> None:
    data = Data.at(place)
    for number in range(start, start + 12):
        add_entry(data, DenyEntry(f"http://example.com/{number}.jpg", "image", f"{number:07d}"))
        if number % 4 == 0:
            remove_entry(data, f"http://example.com/{number}.jpg")


WRITER = """
import sys
from curate.fetch.deny_file import DenyEntry, add_entry, remove_entry
from curate.layout import Data

for number in map(int, sys.argv[2:]):
    add_entry(Data.at(sys.argv[1]), DenyEntry(f"http://example.com/{number}.jpg", "image", f"{number:07d}"))
    if number % 4 == 0:
        remove_entry(Data.at(sys.argv[1]), f"http://example.com/{number}.jpg")
"""


def writer(data: Data, numbers: Iterable[int]) -> subprocess.Popen[bytes]:
    """A process that denies images of these numbers, one after the other, and takes each fourth back."""
    return subprocess.Popen([sys.executable, "-c", WRITER, str(data.root), *map(str, numbers)], cwd=ROOT)


def test_two_processes_and_many_threads_lose_nothing(data: Data) -> None:
    process = writer(data, range(1000, 1012))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda start: add_many(str(data.root), start), [0, 100]))
    assert process.wait(60) == 0
    numbers = sorted(int(key) for _, _, key in entries_of(data) if key)
    assert numbers == [s + n for s in (0, 100, 1000) for n in range(12) if n % 4]
    assert Deny.load([data.deny_list])


@pytest.mark.long
def test_a_writer_that_is_killed_leaves_a_whole_file(data: Data) -> None:
    for pause in (0.05, 0.11, 0.3):
        process = writer(data, range(5000))
        while not data.deny_list.exists():
            time.sleep(0.01)
        time.sleep(pause)
        process.kill()
        process.wait()
        Deny.load([data.deny_list])
        assert all(e.entry == f"http://example.com/{int(e.key or 0)}.jpg" for e in read_entries(data))
        add_entry(data, DenyEntry("example.org", "domain", "0000001"))  # the lock went with it
        remove_entry(data, "example.org")


def forget() -> None:
    shutil.rmtree(store_cache.cache_folder(), ignore_errors=True)
    store_cache._own_folder.cache_clear()
    mirror.open_mirror.cache_clear()


@pytest.fixture
def there(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("TASTEMAKER_CACHE", str(tmp_path / "cache"))
    forget()
    yield s3_url
    forget()


def test_on_an_object_store(there: str) -> None:
    """Two machines, as it were: each with a client and a mirror of its own."""
    one, other = Data.at(there), Data(Path("/nowhere"), there)
    other.__dict__["store"] = mirror.Mirror(there)
    object.__setattr__(other, "root", other.store.root)

    def write(pair: tuple[Data, int]) -> None:
        data, start = pair
        for number in range(start, start + 15):
            add_entry(data, DenyEntry(f"http://example.com/{number}.jpg", "image", f"{number:07d}"))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, [(one, 0), (other, 100)]))
    found = ObjectStore(there).get("deny.txt")
    assert found is not None and found[0].count(b"\n") == 31
    for data in (one, other):
        assert sorted(int(e.key or 0) for e in read_entries(data)) == [*range(15), *range(100, 115)]
    assert len(remove_entry(one, "http://example.com/3.jpg")) == 29 == len(read_entries(other))


# ------------------------------------------------------------------------------------------------------------- routes


def test_the_routes(data: Data) -> None:
    with serving_data(data) as served, served.client() as client:
        assert client.get("/api/deny").json() == {
            "file": f"{data.root}/deny.txt",
            "entries": [],
            "count": 0,
            "command": None,
        }
        key = key_of(21)
        assert client.get(f"/api/why/{key}").json()["denied"] is None
        made = client.post("/api/deny", json={"key": key, "what": "image"})
        assert made.status_code == 200
        entry = {"entry": "http://example.com/21.jpg", "what": "image", "key": key}
        assert made.json()["entries"] == [entry]
        assert made.json()["command"] == f"tastemaker remove {data.root} --denied"
        assert client.get(f"/api/why/{key}").json()["denied"] == {"entry": entry["entry"], "what": "image"}
        assert client.get(f"/api/thumbnails/{key}").status_code == 200, "nothing is taken away by itself"

        client.post("/api/deny", json={"key": key_of(2), "what": "domain"})
        listed = client.get("/api/deny").json()
        assert listed["count"] == 2 and listed["entries"][1] == {
            "entry": "example.com",
            "what": "domain",
            "key": key_of(2),
        }
        assert listed["command"] == f"tastemaker remove {data.root} --denied"
        assert client.get(f"/api/why/{key_of(45)}").json()["denied"] == {"entry": "example.com", "what": "domain"}
        left = client.delete(f"/api/deny/{key_of(45)}?what=domain").json()
        assert left["entries"] == [entry], "whichever image of the domain it was"
        assert client.delete(f"/api/deny/{key}").json()["entries"] == []
        assert client.delete(f"/api/deny/{key}").json()["command"] is None
        assert client.get(f"/api/why/{key}").json()["denied"] is None

        for body in ({}, {"key": key, "what": "all"}, {"key": "x"}, {"key": key, "more": 1}, {"key": "0" * 21}, []):
            assert client.post("/api/deny", json=body).status_code == 422
        assert client.post("/api/deny", json={"key": "0099999"}).status_code == 404
        assert client.delete("/api/deny/0099999").status_code == 404
        data.deny_list.write_text("not an entry\n")
        answer = client.get("/api/deny")
        assert answer.status_code == 200 and answer.json()["command"].startswith("# deny-list")
        assert "line 1: not an http" in answer.json()["command"]


def test_a_folder_that_can_not_be_written_to(data: Data) -> None:
    data.deny_list.with_name(".deny.txt.lock").symlink_to("/etc/passwd")
    with serving_data(data) as served, served.client() as client:
        answer = client.post("/api/deny", json={"key": key_of(2)})
        assert answer.status_code == 422 and "is a link" in answer.json()["error"]


# ---------------------------------------------------------------------------------------- the command that takes it out


def shell(command: str) -> str:
    """Run commands as people paste them, in a folder of theirs; what they print."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = ["bash", "-e", "-c", command]
    done = subprocess.run(words, cwd="/", env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def stored(data: Data) -> dict[str, str]:
    """Of each image that a file of the data folder holds, its URL."""
    data.store.refresh()
    found = [*data.store.walk(data.root / "fetched"), *data.store.walk(data.root / "shards")]
    files = [path for path in found if path.suffix == ".parquet" and not path.name.startswith(".")]
    data.bring(*files)
    rows = [row for file in files for row in pq.read_table(file, columns=["key", "url", "status"]).to_pylist()]
    return {row["key"]: row["url"] for row in rows if row["status"] == "success"}


@pytest.mark.long
@pytest.mark.parametrize("looked_at", [10**6, 0])
def test_after_the_command_the_image_is_gone(looked_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run, an image denied, the command as it is shown; then its domain; and no later run brings either back."""
    monkeypatch.setattr("studio.images.denying.LOOKED_AT", looked_at)
    with small_web(40) as web:
        data = Data(tmp_path / "a folder" / "data")
        listed = web.write_list(tmp_path / "list.parquet")
        options = " ".join(f"--set {shlex.quote(s)}" for s in (*web.settings(20), "fetch.timeout=2"))
        shell(f"tastemaker curate {listed} --out {shlex.quote(str(data))} --recipe bundled {options}")
        before, packs = stored(data), data.packs()
        packed = pq.read_table(sorted(data.packed(packs[0]).glob("*.parquet")))["key"].to_pylist()
        kept = next(key for key in packed if list(before.values()).count(before[key]) == 1)
        tars = {p.name: p.read_bytes() for p in (data.root / "fetched").glob("*.tar")}

        def denied(key: str, what: str) -> str:
            with serving_data(Data(data.root)) as served, served.client() as client:
                answer = client.post("/api/deny", json={"key": key, "what": what}).json()
                assert client.get(f"/api/thumbnails/{key}").status_code == 200
            return str(answer["command"])

        command = denied(kept, "image")
        assert command == f"tastemaker remove {shlex.quote(str(data))} --denied"
        shell(command)
        assert stored(data).keys() == before.keys() - {kept}
        changed = [name for name, content in tars.items() if (data.root / "fetched" / name).read_bytes() != content]
        assert len(changed) == 1, "the other shards have the same bytes"
        with serving_data(Data(data.root)) as served, served.client() as client:
            assert client.get(f"/api/thumbnails/{kept}").status_code == 404
            why = client.get(f"/api/why/{kept}").json()
            assert (why["reason"], why["image"]) == ("removed", None)
            assert client.get("/api/deny").json()["command"] is None, "nothing is left to be taken out"

        domain = domain_entry(before[kept])
        of_domain = {key for key, url in before.items() if domain_entry(url) == domain}
        assert len(of_domain) > 1
        command = denied(next(iter(of_domain - {kept})), "domain")
        assert command == f"tastemaker remove {shlex.quote(str(data))} --denied"
        shell(command)
        assert stored(data).keys() == before.keys() - of_domain
        shell(f"tastemaker select {shlex.quote(str(data))}")  # the folder's recipe heeds the list from now on
        shell(f"tastemaker retry {shlex.quote(str(data))}")
        assert stored(data).keys() == before.keys() - of_domain


@pytest.mark.long
def test_after_the_command_it_is_gone_from_an_object_store(there: str, tmp_path: Path) -> None:
    place = f"{there}/data"
    with small_web(40) as web:
        listed = web.write_list(tmp_path / "list.parquet")
        options = " ".join(f"--set {shlex.quote(s)}" for s in (*web.settings(20), "fetch.timeout=2"))
        shell(f"tastemaker curate {listed} --out {place} --recipe bundled {options}")
        data = Data.at(place)
        before = stored(data)
        key = next(key for key in before if list(before.values()).count(before[key]) == 1)
        with serving_data(data) as served, served.client() as client:
            command = client.post("/api/deny", json={"key": key}).json()["command"]
            assert client.get(f"/api/thumbnails/{key}").status_code == 200
        assert command == f"tastemaker remove {place} --denied"
        shell(command)
        assert stored(data).keys() == before.keys() - {key}
        shell(f"tastemaker select {place}")
