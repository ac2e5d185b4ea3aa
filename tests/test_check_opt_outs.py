"""`tastemaker check-opt-outs`: a real web that changes its mind, asked again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from aesthetic.errors import UserError
from curate.fetch import recheck
from curate.fetch.deny import Deny
from curate.layout import Data
from curate.ledger.view import open_ledger
from curate.store.objects import ObjectStore
from demo.web import Route, Web
from pipelines import cli
from tests.small_web import image
from tests.test_fetch import PIXELS, reply, running
from tests.test_fetch_job import fetch

ROBOTS = "User-agent: *\nDisallow: /private\nContent-Usage: /usage train-ai=n\n"
USAGE, TAG = ("Content-Usage", "train-ai=n"), ("X-Robots-Tag", "noai")


# --------------------------------------------------------------------------------------------------------- one URL


def test_a_head_is_enough_and_a_byte_where_that_is_refused() -> None:
    asked: list[tuple[str, str | None]] = []

    def page(refuse_head: int | None, *headers: str) -> Any:
        async def answer(writer: asyncio.StreamWriter, request: str) -> None:
            method = request.split()[0]
            lines = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in request.splitlines()[1:])}
            asked.append((method, lines.get("range")))
            if method == "HEAD":
                status = refuse_head or 200
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: 99999999\r\n".encode())
                writer.write("".join(f"{h}\r\n" for h in headers if not refuse_head).encode() + b"\r\n")
            else:
                writer.write(reply(206, PIXELS[:1], *headers, "Content-Range: bytes 0-0/99"))
            await writer.drain()

        return answer

    async def main() -> None:
        async with running(respect=["x-robots-tag"], retries=0) as (server, root, fetcher):
            server["/fine"] = page(None)
            server["/seen"] = page(None, "Content-Usage: train-ai=n")
            server["/out"] = page(None, "X-Robots-Tag: noai")
            body = await fetcher.check(root + "fine")
            assert (body.data, body.http_status, body.opt_out) == (b"", 200, None)
            assert (await fetcher.check(root + "seen")).opt_out == "content-usage: train-ai=n"
            with pytest.raises(Exception, match="opted_out"):
                await fetcher.check(root + "out")
            assert asked == [("HEAD", None)] * 3
            for status in (400, 403, 405, 406, 501):
                server[f"/{status}"] = page(status, "X-Robots-Tag: noai")
                with pytest.raises(Exception, match="opted_out"):
                    await fetcher.check(root + str(status))
                assert asked[-2:] == [("HEAD", None), ("GET", "bytes=0-0")]
            asked.clear()
            server["/404"] = page(404)
            with pytest.raises(Exception, match="http_404"):
                await fetcher.check(root + "404")
            assert asked == [("HEAD", None)]

    asyncio.run(main())


# ------------------------------------------------------------------------------------------------------- a data folder


PATHS = ["/stays.jpg", "/tag.jpg", "/private/1.jpg", "/usage/1.jpg", "/hop", "/gone.jpg", "/moved"]


def before() -> dict[Any, Route]:
    bodies = {path: image(n)[1] for n, path in enumerate(PATHS)}
    routes: dict[Any, Route] = {path: Route(body=body) for path, body in bodies.items()}
    routes["/target.jpg"] = routes["/hop"]
    routes["/hop"] = Route(status=302, headers=(("Location", "/target.jpg"),))
    return routes


def after() -> dict[Any, Route]:
    hop = ("Location", "/target.jpg")
    return before() | {
        "/tag.jpg": Route(body=b"", headers=(TAG,)),
        "/robots.txt": Route(body=ROBOTS.encode()),
        "/hop": Route(status=302, headers=(hop, USAGE)),
        "/gone.jpg": Route(status=404),
        "/moved": Route(status=302, headers=(("Location", "http://10.0.0.1/x"),)),
    }


OPTED_OUT = {"/tag.jpg", "/private/1.jpg", "/usage/1.jpg", "/hop"}


@pytest.fixture
def fetched(tmp_path: Path) -> Iterator[tuple[Data, int]]:
    """A folder of images whose web has changed since, and the port of that web."""
    with Web(before(), hosts=1) as web:
        port = web.port
        rows = {"url": [web.url(0, path) for path in PATHS], "caption": ["a"] * len(PATHS)}
        table = fetch(tmp_path / "run", rows, f"127.0.0.0/8:{port}")
        assert table["status"].to_pylist() == ["success"] * len(PATHS)
    yield Data(tmp_path / "run" / "data"), port


def settings(port: int) -> list[str]:
    return ["--recipe", "bundled", "--set", f'fetch.allow=["127.0.0.0/8:{port}"]', "--set", "fetch.retries=0"]


def told(data: Data) -> dict[str, tuple[str, str]]:
    with open_ledger(data) as con:
        rows = con.execute("SELECT url, opt_out_answer, opt_out_now FROM ledger WHERE url IS NOT NULL").fetchall()
    return {"/" + url.split("/", 3)[3]: (answer, now) for url, answer, now in rows}


def test_what_has_opted_out_since_is_found_and_removed(
    fetched: tuple[Data, int], capsys: pytest.CaptureFixture[str]
) -> None:
    data, port = fetched
    with Web(after(), hosts=1, port=port) as web:
        start = [str(data), *settings(port), "--json"]
        assert cli.main(["check-opt-outs", *start, "--dry-run"]) == 0
        facts = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert len(facts["opted_out"]) == len(OPTED_OUT) and facts["removed"] is None
        assert not data.deny_list.exists() and not data.annotated()  # nothing was written

        assert cli.main(["check-opt-outs", *start]) == 0
        facts = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert facts["asked"] == facts["images"] == len(PATHS)
        assert (facts["removed"]["images"], facts["removed"]["denied"]) == (4, 8)  # URLs and bytes
        assert facts["answers"] == {"opted_out": 4, "ok": 1, "http_404": 1, "blocked_address": 1}
        once = web.counts().requests.total()

        # again within a day: nobody is asked, and there is nothing left to remove
        assert cli.main(["check-opt-outs", *start]) == 0
        facts = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (facts["images"], facts["asked"], facts["opted_out"]) == (3, 0, [])
        assert web.counts().requests.total() == once
        assert cli.main(["check-opt-outs", *start, "--days", "0"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["asked"] == 3

    stay = {"/stays.jpg": ("ok", None), "/gone.jpg": ("http_404", None), "/moved": ("blocked_address", None)}
    assert told(data) == stay
    table = pq.read_table(data.table(0))
    assert Counter(table["status"].to_pylist()) == {"removed": 4, "success": 3}
    assert table["url"].null_count == 4
    deny = Deny.load([data.deny_list])
    root = f"http://127.1.0.1:{port}"
    assert {path for path in PATHS if deny.denies(root + path)} == OPTED_OUT
    assert "127.1.0.1" not in data.deny_list.read_text()  # hashes alone


def test_signals_that_are_not_respected_are_seen_and_deny_nothing(
    fetched: tuple[Data, int], capsys: pytest.CaptureFixture[str]
) -> None:
    data, port = fetched
    with Web(after(), hosts=1, port=port):
        assert cli.main(["check-opt-outs", str(data), *settings(port), "--set", "fetch.respect=[robots-txt]"]) == 0
    out = capsys.readouterr().out
    assert "not heeded: x-robots-tag, tdm-reservation, content-usage" in out
    found = told(data)
    assert found.keys() == {*PATHS} - {"/private/1.jpg"}
    assert found["/tag.jpg"] == ("ok", "x-robots-tag: noai")
    assert found["/usage/1.jpg"] == ("ok", "content-usage: train-ai=n in robots.txt")


def test_a_selection_alone_and_what_lacks_one(fetched: tuple[Data, int], tmp_path: Path) -> None:
    data, port = fetched
    keys = pq.read_table(data.table(0))["key"].to_pylist()
    with pytest.raises(UserError, match="no selection 'good'"):
        recheck.kept_keys(data, "good")
    from curate.fetch.config import FetchConfig

    config = FetchConfig(allow=(f"127.0.0.0/8:{port}",), retries=0)
    with Web(after(), hosts=1, port=port) as web:
        first = recheck.recheck(data, config, {keys[1]})
        assert (first.images, first.asked, [*first.opted_out]) == (1, 1, [keys[1]])
        assert told(data)["/tag.jpg"] == ("opted_out", "x-robots-tag: noai")
        assert {path for _, path in web.counts().requests} == {"/robots.txt", "/tag.jpg"}
        second = recheck.recheck(data, config)  # the others, and not that one again
        assert (second.images, second.asked) == (len(PATHS), len(PATHS) - 1)
        assert told(data) == {
            "/stays.jpg": ("ok", None),
            "/tag.jpg": ("opted_out", "x-robots-tag: noai"),
            "/private/1.jpg": ("opted_out", "robots-txt: disallow"),
            "/usage/1.jpg": ("opted_out", "content-usage: train-ai=n in robots.txt"),
            "/hop": ("opted_out", "content-usage: train-ai=n"),
            "/gone.jpg": ("http_404", None),
            "/moved": ("blocked_address", None),
        }
        nothing = FetchConfig(allow=config.allow, retries=0, respect=())
        assert recheck.recheck(data, nothing, {keys[0]}).asked == 1
        other = recheck.recheck(data, nothing)
        assert (other.asked, other.opted_out) == (len(PATHS) - 1, {})  # other signals: asked anew


@pytest.mark.long
def test_a_killed_check_goes_on(tmp_path: Path) -> None:
    """Killed while a third shard waits for a slow server: the first two are not asked again, and all is denied."""
    count, size = 12, 4
    routes: dict[Any, Route] = {f"/{n}.jpg": Route(body=image(n)[1]) for n in range(count)}
    with Web(routes, hosts=1) as web:
        port = web.port
        rows = {"url": [web.url(0, path) for path in routes], "caption": ["a"] * count}
        fetch(tmp_path / "run", rows, f"127.0.0.0/8:{port}", shard_size=size)
    data = Data(tmp_path / "run" / "data")
    out = {f"/{n}.jpg": Route(body=b"", headers=(TAG,)) for n in (0, 5, 11)}
    slow = {f"/{n}.jpg": Route(body=b"", delay=60) for n in range(2 * size, count)}
    line = [sys.executable, "-m", "pipelines.cli", "check-opt-outs", str(data), *settings(port)]
    with Web({**routes, **out, **slow}, hosts=1, port=port) as web:
        records = [data.annotations_record("opt_outs", shard) for shard in (0, 1)]
        with subprocess.Popen(line, stdout=subprocess.DEVNULL, start_new_session=True) as child:
            end = time.monotonic() + 60
            while not all(r.exists() for r in records) and time.monotonic() < end:
                time.sleep(0.05)
            os.killpg(child.pid, signal.SIGKILL)
        assert all(r.exists() for r in records) and not data.deny_list.exists()
    with Web({**routes, **out}, hosts=1, port=port) as web:
        subprocess.run(line, check=True, timeout=120, stdout=subprocess.DEVNULL)
        asked = {path for _, path in web.counts().requests}
    assert asked == {f"/{n}.jpg" for n in range(2 * size, count)} | {"/robots.txt"}
    deny = Deny.load([data.deny_list])
    assert {path for path in routes if deny.denies(f"http://127.1.0.1:{port}{path}")} == {*out}


@pytest.mark.long
def test_a_folder_on_a_store(
    fetched: tuple[Data, int], s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a real S3 server the same is asked, told and removed as on a disk."""
    data, port = fetched
    store = ObjectStore(s3_url)
    for file in sorted(p for p in data.root.rglob("*") if p.is_file() and p.name != ".lock"):
        store.put_file(file, file.relative_to(data.root).as_posix())
    paths = dict(zip(pq.read_table(data.table(0))["key"].to_pylist(), PATHS, strict=True))
    with Web(after(), hosts=1, port=port) as web:
        assert cli.main(["check-opt-outs", s3_url, *settings(port), "--json", "--dry-run"]) == 0
        facts = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert {paths[key] for key in facts["opted_out"]} == OPTED_OUT
        assert "deny.txt" not in {o.name for o in store.list()}
        assert cli.main(["check-opt-outs", s3_url, *settings(port), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (facts["asked"], facts["removed"]["images"], facts["removed"]["denied"]) == (len(PATHS), 4, 8)
        once = web.counts().requests.total()
        assert cli.main(["check-opt-outs", s3_url, *settings(port), "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["asked"] == 0
        assert web.counts().requests.total() == once
    there = tmp_path / "there"
    for name in [stored.name for stored in store.list()]:
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        store.get_file(name, there / name)
    stay = {"/stays.jpg": ("ok", None), "/gone.jpg": ("http_404", None), "/moved": ("blocked_address", None)}
    assert told(Data(there)) == stay
    assert cli.main(["verify", s3_url]) == cli.main(["verify", str(there)]) == 0
    images = {image(n)[1] for n, path in enumerate(PATHS) if path in OPTED_OUT}
    for file in (p for p in there.rglob("*") if p.is_file()):
        content = file.read_bytes()
        assert not any(one in content for one in images)
        assert not any(f"127.1.0.1:{port}{path}".encode() in content for path in OPTED_OUT), file


def test_it_waits_its_turn(fetched: tuple[Data, int]) -> None:
    """Another run at work on the folder is not disturbed; --dry-run writes nothing and asks all the same."""
    data, port = fetched
    with Web(after(), hosts=1, port=port), data.hold():
        assert cli.main(["check-opt-outs", str(data), *settings(port)]) == 2
        assert cli.main(["check-opt-outs", str(data), *settings(port), "--dry-run"]) == 0
    assert not data.annotated()
