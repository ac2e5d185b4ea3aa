"""How fast the studio answers as a data folder grows, on folders that bench.scale makes up; beside plain DuckDB.

    python -m bench.studio --rows 1e5 1e7 [--folder FOLDER] [--keep] [--only make,index,answers,duckdb]

Each part runs in a process of its own: `index` makes the index; `answers` serves the folder and asks as the page does,
over HTTP on loopback; `duckdb` gives the same funnel and histograms by a scan of the parquet files. Times are wall
times; memory is the peak, in all and without the pages of mapped files, which the system can take back.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench import scale

RULES = {
    "large": "least(original_width, original_height) >= 200",
    "readable": "lang = 'en'",
    "fits": "similarity >= 0.1",
    "taste": "top(aesthetic, 0.5)",
    "good": "aesthetic >= {cut}",
}
COLUMNS = 10
TIMES = 20


def main() -> None:
    """Make folders, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, nargs="+", default=[1e5])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "tastemaker-scale")
    parser.add_argument("--only", type=lambda text: text.split(","), default=["make", "index", "answers", "duckdb"])
    parser.add_argument("--keep", action="store_true", help="keep the folders of data")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(PARTS[asked.child[0]](Path(asked.child[1]))))
        return
    for rows in map(int, asked.rows):
        root = asked.folder / f"{rows}-10000"
        if "make" in asked.only and not (root / "made-links").exists():
            scale.measure("make", root, rows, 10_000, "links")
        for name in asked.only:
            if name in PARTS:
                for what, said in _part(name, root).items():
                    print(f"{rows:>12,}  {name:<8} {what:<34} {said}", flush=True)
        if not asked.keep:
            shutil.rmtree(root)


def _part(name: str, root: Path) -> dict[str, str]:
    """What a process of its own said."""
    command = [sys.executable, "-m", "bench.studio", "--child", name, str(root)]
    child = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)}: {child.stderr[-4000:]}")
    return dict(json.loads(child.stdout.splitlines()[-1]))


# ---------------------------------------------------------------------------------------------------------- the parts


def index(root: Path) -> dict[str, str]:
    """Make the index."""
    from curate.layout import Data
    from studio.explore.explorer import Explorer

    data = Data(root / "data")
    shutil.rmtree(data.studio_index, ignore_errors=True)
    with _memory() as peak, _timed() as took:
        explorer = Explorer(data)
        explorer.wait()
        assert explorer.state.state == "ready", explorer.state
    explorer.close()
    size = sum(f.stat().st_size for f in data.studio_index.rglob("*") if f.is_file())
    return {"made in": took(), "bytes": f"{size / 1e6:,.0f} MB", **peak}


def answers(root: Path) -> dict[str, str]:
    """Ask as the page does."""
    import httpx

    from curate.layout import Data
    from studio.app import new_app
    from studio.data import StudioData
    from studio.server import StudioServer, listen

    said, rng = dict[str, str](), np.random.default_rng(0)
    with _memory() as peak:
        with _timed() as opened:
            folder = StudioData(Data(root / "data"))
            folder.search.stop()  # vectors have an index of their own, which is not measured here
            folder.explorer.wait()
        at, ready = listen("127.0.0.1", 0), threading.Event()
        server = StudioServer(new_app(data=folder), folder.stop, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [at]})
        thread.start()
        assert ready.wait(60)
        with (
            _ending(server, thread),
            httpx.Client(base_url=f"http://127.0.0.1:{at.getsockname()[1]}", timeout=600) as client,
        ):
            client.get("/")

            def get(path: str, **params: Any) -> Any:
                answer = client.get(path, params={k: v for k, v in params.items() if v is not None})
                assert answer.status_code == 200, answer.text
                return answer.json()

            def select(cut: float) -> Any:
                body = {"rules": _rules(cut), "columns": columns}
                answer = client.post("/api/selections", json=body)
                assert answer.status_code == 200, answer.text
                return answer.json()

            columns: list[str] = []
            with _timed() as first:
                numbers = [c["name"] for c in get("/api/data")["columns"] if c["kind"] == "number" and c["count"]]
                columns += numbers[:COLUMNS]
                for column in columns:
                    get("/api/histogram", column=column)
                tried = select(5.0)
                get("/api/rows", selection=tried["id"], show="kept", sort="aesthetic", limit=100)
            said |= {"index opened": opened(), "first page": first(), "columns": ", ".join(columns)}
            said["funnel"] = _funnel(tried)

            cuts = iter(rng.uniform(4, 6, 10_000).round(4).tolist())
            said["drag, ten kept histograms"] = _times(lambda: select(next(cuts)))
            ids = [select(next(cuts))["id"] for _ in range(TIMES)]
            some = iter(ids * 1000)

            def rows(**params: Any) -> Callable[[], Any]:
                return lambda: get("/api/rows", selection=next(some), limit=100, **params)

            total = get("/api/rows", selection=ids[0], show="kept")["total"]
            places = iter(rng.integers(0, total, 10_000).tolist())
            said["rows kept, by a column, new cut"] = _times(rows(show="kept", sort="aesthetic", descending=True))
            said["the same, another place"] = _times(
                lambda: get("/api/rows", selection=ids[0], show="kept", sort="bytes", offset=next(places), limit=100)
            )
            said["rows around a cut"] = _times(rows(show="around", rule="good", sort="aesthetic"))
            said["rejected, nearest first"] = _times(rows(show="rejected", rule="good", sort="nearest"))
            said["all of a rule's, nearest first"] = _times(rows(show="marginal", rule="good", sort="nearest"))
            said["rows at random"] = _times(rows(show="kept", sort="random"))
            said["place of a value"] = _times(
                lambda: get("/api/place", selection=next(some), show="around", rule="good", sort="aesthetic", value=5.0)
            )
            pairs = iter(itertools.pairwise(ids))
            said["compare"] = _times(
                lambda: client.post("/api/compare", json=dict(zip("ab", next(pairs), strict=True))), TIMES - 1
            )
            said["a new top()"] = _times(
                lambda: client.post(
                    "/api/selections",
                    json={"rules": [{"name": "t", "condition": f"top(aesthetic, {next(cuts) / 10:.4f})"}]},
                )
            )
            said["GET /api/data"] = _times(lambda: get("/api/data"))
    return {**said, **peak}


def duckdb(root: Path) -> dict[str, str]:
    """The same funnel and the histograms of what is kept, by a scan of the tables."""
    from curate.layout import Data
    from curate.ledger.view import open_ledger

    columns = ["similarity", "aesthetic", "original_width", "original_height", "bytes"]
    needed = {*columns, "lang"}
    with _memory() as peak:
        con = open_ledger(Data(root / "data"), needed, memory_limit="2GB")
        (cut,) = con.execute("SELECT quantile_cont(aesthetic, 0.5) FROM _aligned").fetchall()[0]
        conditions = [c.format(cut=5.0).replace("top(aesthetic, 0.5)", f"aesthetic >= {cut}") for c in RULES.values()]
        counts, before = list[str](), "true"
        for condition in conditions:
            counts += [f"count(*) FILTER ({before} AND NOT ({condition}))", f"count(*) FILTER (NOT ({condition}))"]
            before += f" AND ({condition})"

        def funnel() -> None:
            con.execute(f"SELECT {', '.join(counts)}, count(*) FILTER ({before}) FROM _aligned").fetchall()

        def histogram() -> None:
            con.execute(f"SELECT floor(bytes / 6000), count(*) FROM _aligned WHERE {before} GROUP BY 1").fetchall()

        times = 3
        said = {"funnel": _times(funnel, times), "one histogram of what is kept": _times(histogram, times)}
    return {**said, **peak}


PARTS = {"index": index, "answers": answers, "duckdb": duckdb}


def _rules(cut: float) -> list[dict[str, str]]:
    return [{"name": name, "condition": rule.format(cut=cut)} for name, rule in RULES.items()]


def _funnel(tried: dict[str, Any]) -> str:
    return ", ".join(f"{r['name']} {r['rejected']:,}" for r in tried["rules"]) + f", kept {tried['kept']:,}"


@contextlib.contextmanager
def _timed() -> Iterator[Callable[[], str]]:
    """Gives a function that says how long the block took, and how much CPU time."""
    began, cpu, took = time.monotonic(), time.process_time(), list[float]()
    yield lambda: f"{took[0]:.2f} s, {took[1]:.2f} CPU-s"
    took += [time.monotonic() - began, time.process_time() - cpu]


def _times(work: Callable[[], Any], times: int = TIMES) -> str:
    """Median and longest wall time, and CPU time of the process, of one time."""
    walls, cpu = list[float](), time.process_time()
    for _ in range(times):
        began = time.monotonic()
        work()
        walls.append(time.monotonic() - began)
    each = (time.process_time() - cpu) / times
    return f"median {statistics.median(walls):.3f} s, longest {max(walls):.3f} s, {each:.3f} CPU-s"


@contextlib.contextmanager
def _ending(server: Any, thread: threading.Thread) -> Iterator[None]:
    """Ends a server, whatever happens."""
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(30)


@contextlib.contextmanager
def _memory() -> Iterator[dict[str, str]]:
    """Fills in the peak of this process: in all, and without mapped files."""
    peak, said, end = {"VmRSS": 0, "RssAnon": 0}, dict[str, str](), threading.Event()

    def look() -> None:
        while not end.wait(0.02):
            for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in peak:
                    peak[name] = max(peak[name], int(value.split()[0]))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield said
    finally:
        end.set()
        thread.join()
        said["peak memory"] = f"{peak['VmRSS'] / 1024:,.0f} MB, {peak['RssAnon'] / 1024:,.0f} MB without mapped files"


if __name__ == "__main__":
    main()
