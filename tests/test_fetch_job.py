"""The fetch stage as a whole, over real servers: one budget for several workers, hashes, deny-lists, placeholders."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import io
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aesthetic.errors import UserError
from curate.duplicates.repeats import repeats
from curate.fetch.config import FetchConfig
from curate.images.config import ImagesConfig
from curate.layout import Data
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from curate.workers import FetchWorker
from demo.web import Route, Web
from tests.small_web import ROOT, image


def fetch(root: Path, rows: dict[str, list[Any]], allow: str, shard_size: int = 1000, **config: Any) -> pa.Table:
    """The rows of a list after the fetch stage, by one worker, without Ray."""
    root.mkdir(parents=True)
    pq.write_table(pa.table(rows), root / "list.parquet")
    make_plan(str(root / "list.parquet"), Data(root / "data"), SourceConfig(shard_size=shard_size), None)
    data = Data(root / "data")

    async def main() -> None:
        config_ = FetchConfig(**{"allow": (allow,), "retries": 0, "rate": 0, **config})
        worker = FetchWorker(data, config_, ImagesConfig(size=64), "c")
        await asyncio.gather(*(worker.run(s.shard) for s in data.plan.shards))
        await worker.close()

    asyncio.run(main())
    return pa.concat_tables(pq.read_table(data.table(s.shard)) for s in data.plan.shards)


@pytest.mark.parametrize("algorithm", ["md5", "sha256", "sha512"])
def test_bytes_are_verified_and_denied_before_anything_is_made_of_them(tmp_path: Path, algorithm: str) -> None:
    """Rows in turn: right, wrong, unhashed, nonsense, denied by bytes, by domain, by a redirect to a denied URL."""
    bodies = [image(n)[1] for n in range(20)]
    routes: dict[Any, Route] = {f"/{n}.jpg": Route(body=body) for n, body in enumerate(bodies)}
    routes["/moved"] = Route(status=302, headers=(("Location", "/7.jpg"),))
    with Web(routes, hosts=2) as web:
        digests = [hashlib.new(algorithm, body).hexdigest() for body in bodies]
        urls = [web.url(0, f"/{n}.jpg") for n in range(6)] + [web.url(1, "/6.jpg"), web.url(0, "/moved")]
        hashes = [digests[0], digests[2], None, "what", digests[4].upper(), digests[5], digests[6], digests[7]]
        denied = tmp_path / "denied.txt"
        entries = [hashlib.md5(bodies[4]).hexdigest(), web.host(1).partition(":")[0], web.url(0, "/7.jpg")]
        denied.write_text("# what must not come in\n" + "\n".join(entries) + "\n")
        rows = {"url": urls, "caption": ["a"] * 8, "digest": hashes}
        allow = f"127.0.0.0/8:{web.port}"
        table = fetch(tmp_path / "run", rows, allow, verify="digest", deny=(str(denied),))
        asked = web.counts().requests
    wanted = [None, "hash_mismatch", None, "hash_mismatch", "denied", None, "denied", "denied"]
    assert table["reason"].to_pylist() == wanted
    assert (1, "/6.jpg") not in asked and (0, "/7.jpg") not in asked and asked[0, "/moved"] == 1
    kept = b"".join(p.read_bytes() for p in (tmp_path / "run" / "data").rglob("*") if p.is_file())
    for n in (1, 3, 4):
        assert hashlib.sha256(bodies[n]).hexdigest().encode() not in kept and bodies[n] not in kept


def test_what_cannot_be_verified_or_denied_is_said_before_anything_is_asked(tmp_path: Path) -> None:
    with Web({}, hosts=1) as web:
        rows = {"url": [web.url(0, "/x")], "caption": ["a"], "number": [1]}
        for config, words in [
            ({"verify": "sha256_of_it"}, "sha256_of_it.*number"),
            ({"verify": "number"}, "int64"),
            ({"deny": (str(tmp_path / "none.txt"),)}, "none.txt"),
        ]:
            with pytest.raises(UserError, match=words):
                fetch(tmp_path / words[:4], rows, f"127.0.0.0/8:{web.port}", **config)
        assert not web.counts().requests


def test_signals_that_are_not_respected_are_in_the_ledger(tmp_path: Path) -> None:
    body = image(0)[1]
    tag, tdm = ("X-Robots-Tag", "tastemaker: noai"), ("TDM-Reservation", "1")
    routes: dict[Any, Route] = {
        "/tag.jpg": Route(body=body, headers=(tag,)),
        "/both.jpg": Route(body=body, headers=(tag, tdm)),
        "/plain.jpg": Route(body=body, headers=(("X-Robots-Tag", "otherbot: noai"), ("TDM-Reservation", "0"))),
        "/hop": Route(status=302, headers=(("Location", "/plain.jpg"), tdm)),
    }
    with Web(routes, hosts=1) as web:
        rows = {"url": [web.url(0, p) for p in routes], "caption": ["a"] * 4}
        allow = f"127.0.0.0/8:{web.port}"
        open_ = fetch(tmp_path / "a", rows, allow, respect=())
        kept = fetch(tmp_path / "b", rows, allow)
    seen = ["x-robots-tag: noai", "x-robots-tag: noai; tdm-reservation: 1", None, "tdm-reservation: 1"]
    assert open_["opt_out"].to_pylist() == kept["opt_out"].to_pylist() == seen
    assert open_["status"].to_pylist() == ["success"] * 4
    assert kept["reason"].to_pylist() == ["opted_out", "opted_out", None, "opted_out"]


def test_placeholders_are_named(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("RGB", (100, 80), "lightgrey").save(out, "PNG")
    routes: dict[Any, Route] = {f"/{n}.png": Route(body=out.getvalue()) for n in range(30)}
    routes |= {f"/{n}.jpg": Route(body=image(n)[1]) for n in range(30)}
    with Web(routes, hosts=3) as web:
        urls = [web.url(n % 3, path) for n, path in enumerate(routes)]
        urls += [web.url(0, "/0.jpg")] * 20  # one URL many times is the list's affair
        table = fetch(tmp_path / "run", {"url": urls, "caption": ["a"] * 80}, f"127.0.0.0/8:{web.port}")
        assert table["status"].to_pylist() == ["success"] * 80
        (found,) = repeats(Data(tmp_path / "run" / "data"))
        assert (found.urls, found.hosts, found.width, found.height) == (30, 3, 80, 64)
        assert "30 URLs of 3 hosts gave one image of 80 x 64" in str(found)


@pytest.mark.long
def test_a_moment_of_silence_costs_no_row(tmp_path: Path) -> None:
    """All hosts answer 503 at first; the second pass comes when they have recovered."""
    down = Route(status=503, body=b"down")
    routes: dict[Any, Route] = {f"/{n}.jpg": Route(body=image(n)[1], first=(down, down)) for n in range(24)}
    with Web(routes, hosts=6) as web:
        urls = [web.url(n, path) for n, path in enumerate(routes)]
        table = fetch(tmp_path / "run", {"url": urls, "caption": ["a"] * 24}, f"127.0.0.0/8:{web.port}", retries=2)
    assert table["status"].to_pylist() == ["success"] * 24


@pytest.mark.long
def test_four_workers_keep_a_domains_limits_together(tmp_path: Path) -> None:
    """By the server's own count: at no time more than `per_domain`, and no more than `rate` a second; in order."""
    count = 160
    routes: dict[Any, Route] = {f"/{n}.jpg": Route(body=image(n % 40)[1], delay=0.03) for n in range(count)}
    with Web(routes, hosts=2) as web:
        urls = [web.url(n % 2, f"/{n}.jpg") for n in range(count)]
        pq.write_table(pa.table({"url": urls, "caption": ["a"] * count}), tmp_path / "list.parquet")
        settings = ["source.shard_size=10", f'fetch.allow=["127.0.0.0/8:{web.port}"]', "fetch.per_domain=3"]
        settings += ["fetch.rate=20", "ray.fetch_workers=4", "ray.fetch_cpus=0.5", "images.size=64"]
        command = [sys.executable, "-m", "pipelines.cli", "fetch", str(tmp_path / "list.parquet")]
        command += ["--out", str(tmp_path / "data"), *(w for s in settings for w in ("--set", s))]
        command += ["--recipe", "everything"]  # with early rules, these small images would be left at their headers
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stdout + run.stderr
        counts = web.counts()
    assert sum(counts.requests.values()) <= count + 2 * 4  # robots.txt once per worker and host
    assert 2 <= max(counts.peak.values()) <= 3, counts.peak
    data = Data(tmp_path / "data")
    records = [data.fetched_record(s.shard).read_text() for s in data.plan.shards]
    table = pa.concat_tables(pq.read_table(data.table(s.shard)) for s in data.plan.shards)
    assert table["url"].to_pylist() == urls and table["status"].to_pylist() == ["success"] * count
    began = [float(r.partition('"start_time": ')[2].partition(",")[0]) for r in records]
    ended = [float(r.partition('"end_time": ')[2].partition(",")[0]) for r in records]
    assert max(ended) - min(began) >= (count / 2 - 3) / 20  # 80 rows of each host at 20 a second
    assert time.time() > max(ended) and Counter(table["reason"].to_pylist()) == {None: count}


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="a scheduler without batch work")
def test_a_worker_is_batch_work_and_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    before = os.sched_getscheduler(0), gc.get_threshold()
    policies: set[int] = set()

    def report(stage: str, outcome: str, host: str) -> None:
        decoders = [t for t in threading.enumerate() if t.name.startswith("decode")]
        policies.update(os.sched_getscheduler(t.native_id or 0) for t in (*decoders, threading.current_thread()))
        assert outcome != "success" or decoders

    with Web({"/1.jpg": Route(body=image(1)[1])}, hosts=1) as web:
        pq.write_table(pa.table({"url": [web.url(0, "/1.jpg"), web.url(0, "/none")]}), tmp_path / "list.parquet")
        make_plan(str(tmp_path / "list.parquet"), Data(tmp_path / "data"), SourceConfig(), None)

        async def main() -> None:
            config = FetchConfig(allow=(f"127.0.0.0/8:{web.port}",))
            worker = FetchWorker(Data(tmp_path / "data"), config, ImagesConfig(size=64), "c", report)
            await worker.run(0)
            await worker.close()

        asyncio.run(main())
    assert policies == {os.SCHED_BATCH}
    assert (os.sched_getscheduler(0), gc.get_threshold()) == before
