"""Rating in the studio over made-up data: how long a rating, the next images and a new head take, and memory.

    python -m bench.studio_rate FOLDER [--rows 100000] [--shard-size 10000]

Makes FOLDER as `bench.scale` does (vectors of 768 numbers), unless it is there, and rates 1,000 of its images over HTTP
by a rule on their vectors. Times are CPU seconds of server and client together, which are one process here, and wall
seconds in brackets.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench import scale
from curate.layout import Data
from studio.app import new_app
from studio.data import StudioData
from studio.rate.learning import learn
from studio.server import StudioServer, listen

STEPS = (30, 100, 300, 1000)


def main() -> None:
    """Make, rate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--shard-size", type=int, default=10_000)
    options = parser.parse_args()
    if not options.folder.exists():
        scale.make(options.folder, options.rows, options.shard_size, options.rows <= 1_000_000)
    folder = StudioData(Data(options.folder / "data"))
    folder.explorer.wait()
    with _serving(folder) as url, httpx.Client(base_url=url, timeout=600) as client:
        _measure(folder, client)
    print(f"most memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")


def _measure(folder: StudioData, client: httpx.Client) -> None:
    service, name = folder.ratings, f"bench{time.time_ns()}"[:40]
    pairs = name.replace("bench", "pairs")
    for called, kind in ((name, "scores"), (pairs, "pairs")):
        client.post("/api/ratings", json={"name": called, "kind": kind}).raise_for_status()
    _timed("vectors opened, and a sample of them read", service.vectors)
    _, sample = service.vectors()
    liked = sample.vectors.astype(np.float32) @ np.random.default_rng(0).standard_normal(sample.vectors.shape[1])
    taste = dict(zip(sample.keys, np.clip(np.round(4 + 1.5 * (liked - liked.mean()) / liked.std()), 1, 7), strict=True))

    def following(**query: Any) -> list[Any]:
        answer = client.get(f"/api/ratings/{query.pop('of', name)}/next", params={"rater": "anna", **query})
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found["images"] or found["pairs"]

    _timed("24 images at random, the first time", lambda: following(count=24))
    _timed("24 images at random", lambda: following(count=24))
    _timed("24 images, a spread", lambda: following(count=24, how="teach"))
    want, service.learner.want = service.learner.want, lambda log: None  # type: ignore[method-assign]
    log, rated = service.log(name), 0

    def rate(keys: list[str]) -> None:
        for key in keys:
            body = {"rater": "anna", "key": key, "score": taste[key]}
            client.post(f"/api/ratings/{name}", json=body).raise_for_status()

    for step in STEPS:
        while rated < step:
            keys = [i["key"] for i in following(count=200) if i["key"] in taste][: step - rated]
            rated += len(keys)
            _timed(f"a rating, of {len(keys)}", partial(rate, keys), len(keys))
        _timed(f"a new head of {rated} ratings, names and vectors not read before", lambda: _learn(service, log))
        found = _timed(f"a new head of {rated} ratings", lambda: _learn(service, log))
        print(f"    Spearman {found.metric['value']:.3f}; best and worst of {found.of:,} images")
    service.learner.want = want  # type: ignore[method-assign]
    want(log)
    while service.learner.get(name)[1]:
        time.sleep(0.01)
    _timed("24 images that teach most", lambda: following(count=24, how="teach"))
    _timed("24 pairs", lambda: following(of=pairs, count=24))


def _learn(service: Any, log: Any) -> Any:
    return learn(log, *service.vectors())


def _timed(what: str, work: Callable[[], Any], times: int = 1) -> Any:
    cpu, wall = time.process_time(), time.monotonic()
    found = work()
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    print(f"{what}: {cpu / times:.4f} s ({wall / times:.4f})", flush=True)
    return found


@contextlib.contextmanager
def _serving(folder: StudioData) -> Iterator[str]:
    at, ready = listen("127.0.0.1", 0), threading.Event()
    server = StudioServer(new_app(data=folder), folder.close, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [at]})
    thread.start()
    try:
        ready.wait(60)
        yield f"http://127.0.0.1:{at.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


if __name__ == "__main__":
    main()
