"""The demo: its web, its images, its list. Real sockets, real packages, real images; no network."""

from __future__ import annotations

import asyncio
import gzip
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import aiohttp
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from aesthetic.errors import UserError
from demo import run
from demo.pictures import BOTH_WAYS, demo_images, one_size_each, readable, unpack, wallpaper_name
from demo.web import Route, Web

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Someone's own images: twelve parts of two real photographs, some with captions, in folders."""
    here = tmp_path_factory.mktemp("pictures")
    (here / "garden").mkdir()
    photos = [Image.fromarray(p) for p in load_sample_images().images]
    for i in range(12):
        part = photos[i % 2].crop((20 * i, 10 * i, 20 * i + 320, 10 * i + 300))
        where = here / "garden" if i % 2 else here
        part.save(where / f"myFlower_{i}{'.png' if i % 3 else '.JPG'}")
    (here / "myFlower_0.txt").write_text("A red dahlia.\nde=Eine rote Dahlie.\n", encoding="utf-8")
    (here / "notes.txt").write_text("not a caption of anything")
    return here


def get(url: str) -> tuple[int, bytes, dict[str, str]]:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status, response.read(), dict(response.headers)
    except urllib.error.HTTPError as e:
        return e.code, e.read(), dict(e.headers)


# ---------------------------------------------------------------------------------------------------------------- web


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory):
    photo = tmp_path_factory.mktemp("web") / "photo.jpg"
    Image.fromarray(load_sample_images().images[0]).save(photo)
    whole = photo.read_bytes()
    routes: dict[str | tuple[int, str], Route] = {
        "/photo.jpg": Route(file=str(photo)),
        "/half.jpg": Route(file=str(photo), keep=0.5),
        "/dropped.jpg": Route(file=str(photo), drop=True),
        "/packed.jpg": Route(file=str(photo), gzip=True),
        "/lies.jpg": Route(body=b"<p>no</p>", content_type="image/jpeg"),
        "/private.jpg": Route(file=str(photo), headers=(("X-Robots-Tag", "noai"),)),
        "/gone": Route(status=410, body=b"gone"),
        "/moved": Route(status=302, headers=(("Location", "http://127.1.0.2:{port}/who"),)),
        "/who": Route(body=b"any host"),
        (1, "/who"): Route(body=b"host 1"),
        "/busy": Route(body=b"fine", first=(Route(status=429, headers=(("Retry-After", "1"),)),)),
        "/slow": Route(body=b"x", delay=0.3),
        "/trickle": Route(body=b"x" * 3000, trickle=0.1),
    }
    with Web(routes, hosts=3) as web:
        yield web, whole


def test_web_answers_as_its_routes_say(web: tuple[Web, bytes]) -> None:
    w, whole = web
    status, body, headers = get(w.url(0, "/photo.jpg"))
    assert (status, body, headers["Content-Type"]) == (200, whole, "image/jpeg")
    status, body, headers = get(w.url(0, "/half.jpg"))
    assert body == whole[: round(len(whole) / 2)] and int(headers["Content-Length"]) == len(body)
    with pytest.raises(Exception, match="IncompleteRead"):
        get(w.url(0, "/dropped.jpg"))
    _, body, headers = get(w.url(0, "/packed.jpg"))
    assert headers["Content-Encoding"] == "gzip" and gzip.decompress(body) == whole
    assert get(w.url(0, "/lies.jpg"))[1:] == (b"<p>no</p>", get(w.url(1, "/lies.jpg"))[2])
    assert get(w.url(0, "/lies.jpg"))[2]["Content-Type"] == "image/jpeg"
    assert get(w.url(0, "/private.jpg"))[2]["X-Robots-Tag"] == "noai"
    assert get(w.url(0, "/gone"))[:2] == (410, b"gone")
    assert get(w.url(0, "/nothing"))[0] == 404


def test_web_hosts_are_told_apart(web: tuple[Web, bytes]) -> None:
    w, _ = web
    assert get(w.url(0, "/who"))[1] == b"any host" and get(w.url(1, "/who"))[1] == b"host 1"
    assert get(w.url(2, "/moved"))[1] == b"host 1"  # a redirect to another host, whose port the route did not know
    before = w.counts().requests[(2, "/who")]
    get(w.url(2, "/who?size=big"))
    assert w.counts().requests[(2, "/who")] == before + 1


def test_web_answers_by_order_only_where_asked(web: tuple[Web, bytes]) -> None:
    w, _ = web
    assert [get(w.url(0, "/busy"))[0] for _ in range(3)] == [429, 200, 200]
    assert get(w.url(1, "/busy"))[0] == 429  # each host counts for itself


def test_web_counts_what_is_open_at_one_time(web: tuple[Web, bytes]) -> None:
    w, _ = web

    async def many() -> None:
        async with aiohttp.ClientSession() as session:
            await asyncio.gather(*(session.get(w.url(1, "/slow")) for _ in range(5)))

    began = time.monotonic()
    asyncio.run(many())
    get(w.url(1, "/trickle"))
    assert w.counts().peak[1] == 5 and w.counts().requests[(1, "/slow")] == 5
    assert 0.5 <= time.monotonic() - began < 3


def test_web_does_not_mind_clients_that_hang_up(web: tuple[Web, bytes], capfd: pytest.CaptureFixture[str]) -> None:
    w, whole = web
    for path in ("/photo.jpg", "/trickle", "/slow"):
        with socket.create_connection(("127.1.0.3", w.port), timeout=2) as s:
            s.sendall(f"GET {path} HTTP/1.1\r\nHost: {w.host(2)}\r\n\r\n".encode())
            s.recv(100) if path != "/slow" else None
    time.sleep(0.5)
    assert get(w.url(2, "/photo.jpg"))[1] == whole
    assert capfd.readouterr().err == ""


def test_web_is_on_its_own_addresses_only(web: tuple[Web, bytes]) -> None:
    w, _ = web
    for address in ("127.0.0.1", "127.1.0.4"):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, w.port), timeout=2)


def test_a_port_that_is_taken_is_named(web: tuple[Web, bytes]) -> None:
    with pytest.raises(UserError, match=f"port {web[0].port} on 127.1.0.1"), Web({}, port=web[0].port):
        pass


def test_the_server_ends_with_its_owner_however_that_ends(tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(
        "import time\nfrom demo.web import Web\n"
        "if __name__ == '__main__':\n    with Web({}) as w:\n"
        "        print(w.port, flush=True)\n        time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment) as owner:
        assert owner.stdout is not None
        port = int(owner.stdout.readline())
        assert get(f"http://127.1.0.1:{port}/")[0] == 404
        owner.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.1.0.1", port), timeout=1).close()
        except OSError:
            return
        time.sleep(0.05)
    pytest.fail("the server outlived its owner")


# ----------------------------------------------------------------------------------------------------------- images


def test_own_images_and_their_captions(folder: Path) -> None:
    found = demo_images(folder)
    assert [p.path for p in found] == sorted(p.path for p in found) and len(found) == 12
    by_name = {p.path.name: p for p in found}
    assert by_name["myFlower_0.JPG"].caption == "A red dahlia."
    assert by_name["myFlower_1.png"][1:] == ("My flower 1", "garden")
    assert by_name["myFlower_2.png"].package == folder.name


def test_no_images_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no image"):
        demo_images(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        demo_images(tmp_path / "nowhere")


def test_names_made_readable() -> None:
    assert readable("fox_in-theSnow2") == "Fox in the snow 2"
    assert readable("MATE-Stripes-Dark") == "MATE stripes dark"
    assert wallpaper_name(Path("x/EveningGlow/contents/images/2560x1600.jpg")) == "Evening glow"
    assert wallpaper_name(Path("mate/abstract/Elephants_3840x2160.jpg")) == "Elephants"
    assert wallpaper_name(Path("gnome/wood-l.webp")) == "Wood"


def test_one_size_of_each_wallpaper(tmp_path: Path) -> None:
    images = tmp_path / "Kite" / "contents" / "images"
    dark = tmp_path / "Kite" / "contents" / "images_dark"
    for where in (images, dark):
        where.mkdir(parents=True)
        for width, height in ((1080, 1920), (5120, 2880), (1920, 1080), (640, 480)):
            Image.new("L", (width, height)).save(where / f"{width}x{height}.png")
    for name in ("Elephants", "Elephants_2000x1200", "Dune"):
        Image.new("L", (1920, 1100)).save(tmp_path / f"{name}.png")
    Image.new("L", (400, 250)).save(tmp_path / "screenshot.png")
    chosen = one_size_each(sorted(tmp_path.rglob("*.png")))
    assert [p.name for p in chosen] == ["Dune.png", "Elephants.png", "1920x1080.png"]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_package_is_unpacked_to_its_images(tmp_path: Path) -> None:
    made = tmp_path / "made"
    stamps = made / "usr" / "share" / "stamps"
    stamps.mkdir(parents=True)
    (made / "DEBIAN").mkdir()
    (made / "DEBIAN" / "control").write_text(
        "Package: stamps\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.com>\nDescription: stamps\n"
    )
    Image.new("RGB", (9, 9)).save(stamps / "owl.png")
    (stamps / "owl.txt").write_text("An owl.\nfr.utf8=Un hibou.\n")
    (stamps / "owl.ogg").write_bytes(b"hoot")
    (stamps / "link.png").symlink_to("owl.png")
    (made / "usr" / "lib").mkdir()
    (made / "usr" / "lib" / "x.so").write_bytes(b"")
    deb = tmp_path / "stamps.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", made, deb], check=True, capture_output=True)
    unpack(deb, tmp_path / "tree")
    left = sorted(str(p.relative_to(tmp_path / "tree")) for p in (tmp_path / "tree").rglob("*"))
    assert left == ["usr", "usr/share", "usr/share/stamps", "usr/share/stamps/owl.png", "usr/share/stamps/owl.txt"]
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(stamps / "owl.png", tmp_path / "other")


def test_without_apt_and_without_a_folder_both_ways_are_printed(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "TASTEMAKER_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "demo.run", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip() == BOTH_WAYS.strip()
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------------- list


def test_the_list_is_the_same_each_time_and_fails_in_every_way(folder: Path, tmp_path: Path) -> None:
    found = demo_images(folder)
    rows, routes = run.web_of(found)
    assert (rows, routes) == run.web_of(found)
    path = tmp_path / "list.parquet"
    run.write_list(path, rows)
    stamp = path.stat().st_mtime_ns
    run.write_list(path, rows)
    assert path.stat().st_mtime_ns == stamp
    table = pq.read_table(path)
    assert table.schema.equals(run.SCHEMA) and table.num_rows == len(rows) == 12 + 2 + 7 + 6
    assert len(set(table["URL"].to_pylist())) == len(rows)
    served = {u for u in table["URL"].to_pylist() if ":8790/" in u and "127.1.0." in u}
    assert {"/" + u.split("/", 3)[3] for u in served} | {"/robots.txt"} == set(routes)
    kinds = [(r.status, r.content_type, r.keep, r.headers) for r in routes.values()]
    for kind in (
        (404, "text/html", 1.0, ()),
        (410, "text/plain", 1.0, ()),
        (503, "text/plain", 1.0, ()),
        (200, "image/jpeg", 1.0, ()),
        (200, None, 0.5, ()),
        (200, None, 1.0, (("X-Robots-Tag", "noai"),)),
    ):
        assert kinds.count(kind) == 1, kind
    assert all(row["WIDTH"] == 320 and row["HEIGHT"] == 300 for row in rows)
    with Web(routes, hosts=run.HOSTS) as web:  # on a free port; the demo's own may be in use
        for url in served:
            host, asked = int(url.split(":")[1].rpartition(".")[2]) - 1, "/" + url.split("/", 3)[3]
            assert get(web.url(host, asked))[0] == routes[asked].status


@pytest.mark.long
def test_the_whole_demo_and_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    with socket.create_server(("127.1.0.50", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "demo.run", "--images", str(folder), "--out", str(out), "--port", port]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    with Image.open(out / "report" / "bundled" / "sheet.png") as sheet:
        assert sheet.width == 2480
    ledger = pq.read_table(out / "fetched" / "00000.parquet", columns=["reason"])["reason"].to_pylist()
    assert len(ledger) == 27 and ledger.count(None) == 14
    reasons = {"http_404", "http_4xx", "http_5xx", "not_an_image", "decode_error", "opted_out", "blocked_address"}
    assert reasons | {"dns", "connect", "bad_url"} == set(ledger) - {None}
    began = time.monotonic()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and time.monotonic() - began < 30
    assert "fetch  " not in again.stdout  # nothing was fetched
