"""A small real web for tests: real images on several hosts, beside rows that fail in each way that the web does.

What a URL answers depends on the URL alone, so two runs over one list must give the same bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fnmatch
import hashlib
import io
import json
import multiprocessing
import os
import runpy
import select
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_sample_images

from curate.ledger.schema import Reason
from demo.web import Route, Web

ROOT = Path(__file__).parents[1]
HOSTS = 6
MAX_BYTES = 400_000  # of `settings`; every image is smaller, one failing row's body is not
TIMEOUT = 6.0  # seconds, of `settings` where a row is to time out; its answer takes longer
FATAL = b"this picture kills whoever decodes it"
"""In a comment of the JPEG that `fatal_image` makes; harmless unless `FAULT` is at work."""

FAULT = f"""
# A fault in a library that we use: libjpeg-turbo's binding ends the process at some images.
import hashlib, os, signal, simplejpeg
_decode = simplejpeg.decode_jpeg
_fatal = set(os.environ.get("FATAL_SHA256", "").split())
def decode_jpeg(data, *args, **kwargs):
    if {FATAL!r} in bytes(data) or hashlib.sha256(data).hexdigest() in _fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return _decode(data, *args, **kwargs)
simplejpeg.decode_jpeg = decode_jpeg
"""
"""A sitecustomize.py: every Python process that has its folder on PYTHONPATH gets the fault."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the list, and what must become of it (None: it succeeds)."""

    url: str
    caption: str | None
    reason: Reason | None


@dataclass(frozen=True)
class SmallWeb:
    """The server and the list that it serves."""

    web: Web
    rows: list[Row]

    def write_list(self, path: Path) -> Path:
        """Write the list as parquet: URL, TEXT, and two columns to carry."""
        numbers = range(len(self.rows))
        columns = {
            "URL": [r.url for r in self.rows],
            "TEXT": [r.caption for r in self.rows],
            "WIDTH": pa.array([1000 + n for n in numbers], pa.int64()),
            "LICENSE": [None if n % 3 else "?" for n in numbers],
        }
        pq.write_table(pa.table(columns), path)
        return path

    def settings(self, shard_size: int, timeout: float = 60) -> list[str]:
        """`--set` values: this server may be asked, and nothing is tried twice (each answer is for good)."""
        return [
            f"source.shard_size={shard_size}",
            f'fetch.allow=["127.0.0.0/8:{self.web.port}"]',
            "fetch.retries=0",
            f"fetch.timeout={timeout}",
            f"fetch.max_bytes={MAX_BYTES}",
            "images.size=256",
            "pack.shard_size=8",
        ]


@contextlib.contextmanager
def small_web(
    count: int = 60,
    *,
    failing: Collection[Reason] = tuple(Reason),
    fatal: Sequence[int] = (),
    delay: float = 0.0,
) -> Iterator[SmallWeb]:
    """Serve `count` images and, spread among them, rows that fail in each of the ways named.

    `fatal` are places in the list where a fatal image is put. Each image is answered after `delay` seconds.
    """
    routes: dict[str | tuple[int, str], Route] = {"/robots.txt": Route(body=b"User-agent: *\nDisallow: /members/\n")}
    with_port: list[tuple[str, str | None, Reason | None]] = []  # URLs with {host} and {port} to fill in
    for number in range(count):
        name, data, caption = image(number)
        routes[f"/{name}"] = Route(body=data, content_type=f"image/{name.rpartition('.')[2]}", delay=delay)
        with_port.append((_at(number, name), caption, None))
    wrong: list[tuple[str, Reason]] = []
    for reason, path, route in _failing_routes():
        if reason in failing:
            routes[path] = route
            wrong.append((_at(len(wrong), path[1:]), reason))
    wrong += [(url, reason) for url, reason in _ELSEWHERE if reason in failing]
    for i, (url, reason) in enumerate(wrong):  # spread over the list
        with_port.insert(1 + i * (count + len(wrong)) // len(wrong), (url, f"a row that fails: {reason}", reason))
    for place in fatal:
        routes[f"/fatal-{place}.jpg"] = Route(body=fatal_image(place), content_type="image/jpeg")
        with_port.insert(place, (_at(place, f"fatal-{place}.jpg"), "a fatal picture", Reason.CRASHED))
    with Web(routes, hosts=HOSTS) as web:
        rows = [Row(url=u.replace("{port}", str(web.port)), caption=c, reason=r) for u, c, r in with_port]
        yield SmallWeb(web, rows)


def _at(number: int, path: str) -> str:
    return f"http://127.1.0.{number % HOSTS + 1}:{{port}}/{path}"


# ----------------------------------------------------------------------------------------------------------- images


@cache
def _photographs() -> list[Image.Image]:
    return [Image.fromarray(photo) for photo in load_sample_images().images]


@cache
def image(number: int) -> tuple[str, bytes, str | None]:
    """(name, bytes, caption): a part of one of two real photographs, all different, in six formats; some untold."""
    kind = ("JPEG", "JPEG", "PNG", "WEBP", "JPEG", "GIF", "BMP", "TIFF")[number % 8]
    extension = {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
    photo = _photographs()[number % 2]
    side = 140 + 7 * (number % 30)  # pixels; some are smaller than what is stored, some larger
    left, top = number * 37 % (photo.width - side), number * 23 % (photo.height - side)
    part = photo.crop((left, top, left + side, top + side * 3 // 4))
    options = {"quality": 85 + number % 10, "progressive": number % 16 == 4} if kind == "JPEG" else {}
    out = io.BytesIO()
    part.save(out, kind, **options)
    caption = None if number % 11 == 5 else f"{('a temple roof', 'a red dahlia')[number % 2]}, part {number}"
    return f"{number:03d}.{extension}", out.getvalue(), caption


@cache
def fatal_image(number: int) -> bytes:
    """A good JPEG with the fatal mark in a comment."""
    out = io.BytesIO()
    _photographs()[0].crop((number, number, number + 300, number + 200)).save(out, "JPEG", comment=FATAL)
    return out.getvalue()


# -------------------------------------------------------------------------------------------------- ways of going wrong

_HTML = b"<!doctype html><title>Sorry</title><p>This picture has moved. Sign in to see it.</p>"

_ELSEWHERE = [
    ("http://10.0.0.1:{port}/a.jpg", Reason.BLOCKED_ADDRESS),
    ("http://169.254.169.254/latest/meta-data/", Reason.BLOCKED_ADDRESS),
    ("http://127.2.0.9:{port}/nobody.jpg", Reason.CONNECT),
    ("http://pictures.invalid/c.jpg", Reason.DNS),  # no such name, ever (RFC 6761)
    ("https://127.1.0.1:{port}/plain.jpg", Reason.TLS),
    ("file:///etc/hostname", Reason.BAD_URL),
]


def _failing_routes() -> list[tuple[Reason, str, Route]]:
    jpeg = image(0)[1]
    as_jpeg: dict[str, Any] = {"content_type": "image/jpeg"}
    return [
        (Reason.TIMEOUT, "/slow.jpg", Route(body=jpeg, delay=4 * TIMEOUT, **as_jpeg)),
        (Reason.HTTP_404, "/no.jpg", Route(status=404, body=_HTML, content_type="text/html")),
        (Reason.HTTP_4XX, "/gone.jpg", Route(status=410, body=b"gone")),
        (Reason.HTTP_429, "/busy.jpg", Route(status=429, body=b"slow down")),
        (Reason.HTTP_5XX, "/down.jpg", Route(status=503, body=b"down")),
        (Reason.PROTOCOL, "/cut.jpg", Route(body=jpeg, drop=True, **as_jpeg)),
        (Reason.TOO_LARGE, "/large.jpg", Route(body=jpeg + bytes(MAX_BYTES), **as_jpeg)),
        (Reason.TOO_MANY_REDIRECTS, "/round", Route(status=302, headers=(("Location", "/round"),))),
        (Reason.OPTED_OUT, "/noai.jpg", Route(body=jpeg, headers=(("X-Robots-Tag", "noai"),), **as_jpeg)),
        (Reason.OPTED_OUT, "/members/only.jpg", Route(body=jpeg, **as_jpeg)),
        (Reason.NOT_AN_IMAGE, "/login.jpg", Route(body=_HTML, **as_jpeg)),
        (Reason.DECODE_ERROR, "/half.jpg", Route(body=jpeg, keep=0.5, **as_jpeg)),
        (Reason.TOO_MANY_PIXELS, "/bomb.png", Route(body=_bomb(), content_type="image/png")),
    ]


def _bomb() -> bytes:
    """A PNG of a few dozen bytes whose header says 30,000 x 30,000 pixels."""

    def chunk(body: bytes) -> bytes:
        return (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(header) + chunk(b"IDAT" + zlib.compress(bytes(30)))


# ------------------------------------------------------------------------------------------------------------- running


def curate_here(listed: Path, root: Path, settings: list[str], fault: Path | None = None) -> None:
    """The main job in this process, without Ray, as a notebook does it; then the command's, which finds that done.

    `fault` is the folder of a sitecustomize.py: it is run here, and Python processes that are started from here run it.
    """
    from curate.annotators.registry import add_needs, make_annotators
    from curate.layout import Data
    from curate.sources.planner import make_plan
    from curate.store.files import sweep
    from curate.store.lock import Lock
    from curate.workers import EmbedWorker, FetchWorker, embed_done
    from pipelines.checks import refuse_changes
    from pipelines.curation import Request, run
    from pipelines.recipe import load_recipe, store_recipe

    if fault is not None:
        sys.path.insert(0, str(fault))
        runpy.run_path(str(fault / "sitecustomize.py"))
    recipe, data = load_recipe("bundled", settings), Data(root)
    recipe = replace(recipe, columns=add_needs(recipe.columns))
    annotators = make_annotators(recipe.columns, recipe.embed.encoder)
    fetch_hash, embed_hash = recipe.hashes()
    with Lock(root):
        sweep(root)
        refuse_changes(data, recipe)
        shards = [s.shard for s in make_plan(str(listed), Data(root), recipe.source).shards]
        store_recipe(data, recipe)

        async def fetch() -> None:
            worker = FetchWorker(data, recipe.fetch, recipe.images, fetch_hash, threads=1, early=recipe.early_fetch())
            await asyncio.gather(*(worker.run(shard) for shard in shards))
            await worker.close()

        asyncio.run(fetch())
        waiting = [shard for shard in shards if not embed_done(data, shard, embed_hash, annotators)]
        if waiting:
            embedder = EmbedWorker(data, recipe.embed, recipe.columns, embed_hash, threads=1)
            for shard in waiting:
                embedder.run(shard)
    run(Request(list=str(listed), data=Data(root), recipe=recipe))


def start_here(*args: Any) -> BaseProcess:
    """Start `curate_here` in a child that is forked from a process which has imported everything; opens no model."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "curate.workers", "curate.report", "pipelines.curation", "onnxruntime"])
    child = context.Process(target=curate_here, args=args, daemon=False)
    child.start()
    return child


_MOVED_TO, _CREATE, _DELETE, _IS_FOLDER = 0x80, 0x100, 0x200, 0x40000000  # linux/inotify.h


class Watch:
    """What happens to the files under a folder, told by the kernel: creations, renamings, removals."""

    def __init__(self, root: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._fd >= 0, os.strerror(ctypes.get_errno())
        self._root, self._folders, self._told = root, dict[int, Path](), set[Path]()
        root.mkdir(parents=True, exist_ok=True)
        self._add(root)

    def _add(self, folder: Path) -> Iterator[Path]:
        number = self._libc.inotify_add_watch(self._fd, os.fsencode(folder), _MOVED_TO | _CREATE | _DELETE)
        if number < 0:  # it is gone already
            return iter(())
        self._folders[number] = folder
        early = sorted(folder.rglob("*"))  # what came before the watch did; its own event may come still
        self._told.update(early)
        for path in early:
            if path.is_dir():
                list(self._add(path))
        return iter(early)

    def events(self, timeout: float) -> Iterator[str]:
        """Paths, relative to the folder, of what happened; empty where nothing does for `timeout` seconds."""
        if not select.select([self._fd], [], [], timeout)[0]:
            return
        data, at = os.read(self._fd, 1 << 16), 0
        while at < len(data):
            number, mask, _, length = struct.unpack_from("iIII", data, at)
            name = data[at + 16 : at + 16 + length].rstrip(b"\0").decode()
            at += 16 + length
            if number not in self._folders or not name:
                continue
            path = self._folders[number] / name
            if mask & _CREATE and path in self._told:
                self._told.discard(path)
                continue
            yield str(path.relative_to(self._root))
            if mask & _IS_FOLDER and mask & (_CREATE | _MOVED_TO):
                for early in self._add(path) if mask & _CREATE else ():
                    yield str(early.relative_to(self._root))

    def close(self) -> None:
        os.close(self._fd)


class Run:
    """`tastemaker curate` in a process group of its own, as a terminal starts it, and what its data folder sees."""

    def __init__(self, listed: Path, root: Path, settings: Sequence[str], **environment: str) -> None:
        self.root, self.said = root, root.with_name(f"{root.name}.said")
        self._watch = Watch(root)
        self._events: Iterator[str] = iter(())
        command = [sys.executable, "-m", "pipelines.cli", "curate", str(listed), "--out", str(root)]
        command += ["--recipe", "bundled", *(word for setting in settings for word in ("--set", setting))]
        paths = [environment.pop("PYTHONPATH", ""), str(ROOT)]
        with open(self.said, "wb") as out:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(p for p in paths if p)},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def until(self, pattern: str, timeout: float = 120) -> str:
        """Wait for a file event at a path that matches; returns the path."""
        end = time.monotonic() + timeout
        while time.monotonic() < end and self.process.poll() is None:
            for path in self._events:
                if fnmatch.fnmatch(path, pattern):
                    return path
            self._events = self._watch.events(0.05)
        raise AssertionError(f"no {pattern} in {self.root}; the command ({self.process.poll()}) said:\n{self.text()}")

    def wait(self, timeout: float = 120) -> int:
        """The exit code."""
        code = self.process.wait(timeout)
        self._watch.close()
        return code

    def text(self) -> str:
        """What it said, on either stream."""
        return self.said.read_text(errors="replace")

    def family(self, name: str = "") -> list[psutil.Process]:
        """The processes that it started, and theirs, whose command line holds these words."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if name in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill_one(self, name: str) -> None:
        """SIGKILL the one process of the family whose command line holds these words."""
        (process,) = self.family(name)
        process.kill()


def gone(processes: Sequence[psutil.Process], timeout: float = 10) -> list[str]:
    """Names of those processes that are still there after so long, but for Ray's two agents, which end later."""
    _, alive = psutil.wait_procs(processes, timeout)
    names = []
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(" ".join(process.cmdline())[:80])
    return [n for n in names if not n.startswith(("ray::DashboardAgent", "ray::RuntimeEnvAgent"))]


# ----------------------------------------------------------------------------------------------- what a run left behind

_CLOCKS = {"start_time", "end_time", "duration", "starts", "isolated", "batch_halved", "spent", "self"}
"""What the records of shards say about the run and not about the data."""


def digests(root: Path) -> dict[str, str]:
    """path -> sha256 of every file that a run of a data folder leaves, but for logs; records without their clocks."""
    found = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = str(path.relative_to(root))
        if name in (".lock", ".workers", ".tastemaker") or name.startswith("logs/"):
            continue
        data = path.read_bytes()
        if name.endswith(".json") and name.startswith(("fetched/", "embedded/stats/", "annotated/")):
            record = {k: v for k, v in json.loads(data).items() if k not in _CLOCKS}
            data = json.dumps(record, sort_keys=True).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def same_as(reference: dict[str, str], root: Path) -> None:
    """Every file is there with the bytes of the undisturbed run, and nothing else is."""
    now = digests(root)
    differing = sorted(n for n in now.keys() | reference.keys() if now.get(n) != reference.get(n))
    assert not differing
    assert {p.name for p in root.rglob(".*")} <= {".lock", ".workers", ".tastemaker"}  # folders too
