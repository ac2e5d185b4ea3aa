"""Our fetch stage, img2dataset, and a bare loop as the limit, on the same images in one run: `python -m bench.fetch`.

A web of several hundred host names is served from this machine by processes of their own (bench.web): real images
(bench.pictures), latency with a long tail, errors, http and https with certificates that are verified. In every round
each contender fetches the same list, in turn. Server and contenders share the cores, so the figure that counts is the
CPU that a contender's processes use, user and system, per image that succeeds, from the list to the written shards:
what they use to start and to import is not counted. Measure on a machine that does nothing else.

    python -m bench.fetch --peer-python .venv312/bin/python       the comparison
    python -m bench.fetch --tune                                  img2dataset's settings, tried out
    python -m bench.fetch --memory | --drips | --mechanisms       one worker alone: see bench.alone
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import alone, certificates, names, pictures, quality, tables, web
from bench.contend import Bench, Lists

VARIANTS = {
    "mixed, http": ("mixed", "http", False),
    "mixed, https": ("mixed", "https", False),
    "mixed, https, no reuse": ("mixed", "https", True),
    "photographs, http": ("photo", "http", False),
    "photographs, https": ("photo", "https", False),
    "large photographs, http": ("large photo", "http", False),
    "PNG, http": ("png", "http", False),
}
"""What is on the list, the scheme, and whether the server closes after each answer."""

GRID = [(p, t) for p in (1, 2, 3) for t in (32, 64, 128, 256)]
PSNR_IMAGES = 240


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="bench-fetch-") as scratch:
        root, made = certificates.make(Path(scratch) / "tls", [names.host(n) for n in range(names.HOSTS)])
        shown = pictures.prepare(options.cache, options.photos)
        bench = Bench(
            folder=Path(scratch),
            authority=root,
            python=options.peer_python,
            images=shown,
            certificates=made,
            size=options.size,
            quality=options.quality,
            processes=options.peer[0],
            threads=options.peer[1],
        )
        result: dict[str, Any] = {"machine": _machine(options.peer_python), "pictures": pictures.describe(shown)}
        for line in (*result["machine"].values(), result["pictures"]):
            print(line, flush=True)
        if options.tune:
            result["tune"] = tune(bench, options)
        elif options.memory:
            result["memory"] = alone.memory(bench, options.scale)
        elif options.drips:
            result["drips"] = alone.drips(bench, options.drips_per_host)
        elif options.mechanisms:
            result["mechanisms"] = alone.mechanisms(bench, options.count, options.rounds)
        else:
            result["variants"] = compare(bench, options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


def compare(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """All contenders over all variants, in turns."""
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in options.variants}
    psnr: dict[str, Any] = {}
    with web.serving(bench.images, bench.certificates) as server:  # so that no turn compiles modules
        first = Lists(bench, server, "mixed", "http", 64)
        bench.ours(first), bench.peer(first)
    for n in range(options.rounds):
        for name in options.variants:
            kind, scheme, close = VARIANTS[name]
            with web.serving(bench.images, bench.certificates, close=close) as server:
                lists = Lists(bench, server, kind, scheme, options.count)
                found = {
                    "one thread": bench.limit(lists, 1),
                    "ours": bench.ours(lists),
                    "threads": bench.limit(lists, os.cpu_count() or 1),
                    "img2dataset": bench.peer(lists),
                }
                counts = {k: found[k]["successes"] for k in ("ours", "img2dataset")}
                if set(counts.values()) != {lists.good}:
                    raise SystemExit(f"{name}: {lists.good} rows can succeed; successes: {counts}: {found}")
                if n == 0 and scheme == "http":
                    psnr[name] = quality.compare(bench, lists, PSNR_IMAGES)
                bench.clear()
            rounds[name].append(found)
            print(f"round {n + 1}: {tables.line(name, [found])}", flush=True)
    print()
    print(tables.table(rounds, psnr))
    return {name: {"rounds": rounds[name], "psnr": psnr.get(name)} for name in rounds}


def tune(bench: Bench, options: argparse.Namespace) -> list[dict[str, Any]]:
    """img2dataset's settings: how it does with so many processes and threads each."""
    tried = []
    with web.serving(bench.images, bench.certificates) as server:
        lists = Lists(bench, server, "photo", "http", options.count)
        for processes, threads in GRID:
            found = bench.peer(lists, processes, threads)
            bench.clear()
            tried.append({"processes": processes, "threads": threads, **found})
            rate, cpu = found["per_second"], found["cpu_ms"]
            print(f"{processes} processes, {threads:3} threads: {rate:6.1f} img/s, {cpu:6.2f} ms of CPU", flush=True)
    return tried


def _machine(peer: str) -> dict[str, str]:
    """What this was measured on, in lines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    versions = (
        "import sys,ssl,PIL,cv2,importlib.metadata as m;"
        "print('Python', sys.version.split()[0], ssl.OPENSSL_VERSION, *(p + ' ' + m.version(p) for p in %r))"
    )
    of_ours = ["aiohttp", "simplejpeg", "opencv-python-headless", "pillow", "pyarrow"]
    told = []
    for python, packages in ((sys.executable, of_ours), (peer, ["img2dataset", "opencv-python-headless", "pyarrow"])):
        done = subprocess.run([python, "-c", versions % packages], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{python} lacks one of {', '.join(packages)}: {done.stderr[-300:]}")
        told.append(done.stdout.strip())
    machine = f"{os.cpu_count()} x {cpu}, {platform.system()} {platform.release()}"
    return {"machine": machine, "ours": f"ours: {told[0]}", "peer": f"img2dataset: {told[1]}"}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.fetch", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=6000, help="rows of the list (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians count (default: %(default)s)")
    parser.add_argument("--variants", type=lambda s: s.split(";"), default=list(VARIANTS), help="; between them")
    parser.add_argument("--size", type=int, default=256, help="short side, pixels (default: %(default)s)")
    parser.add_argument("--quality", type=int, default=95, help="of the JPEGs written (default: %(default)s)")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python 3.12 with img2dataset")
    parser.add_argument(
        "--peer",
        type=lambda s: tuple(map(int, s.split("x"))),
        default=(2, 128),
        metavar="PROCESSESxTHREADS",
        help="img2dataset's best settings, as --tune finds them (default: 2x128)",
    )
    parser.add_argument("--cache", type=Path, default=_cache(), help="folder of the images (default: %(default)s)")
    parser.add_argument("--photos", type=Path, help="a folder of photographs of some 500 pixels, to be among them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--tune", action="store_true", help="try img2dataset's processes and threads")
    modes.add_argument("--memory", action="store_true", help="200,000 small bodies, then 2,000 of 2 MB")
    modes.add_argument("--drips", action="store_true", help="64 hosts that drip beside 1,000 good rows")
    modes.add_argument("--mechanisms", action="store_true", help="what each mechanism of the fetcher earns")
    parser.add_argument("--scale", type=float, default=1.0, help="of --memory's lists, to try it out")
    parser.add_argument("--drips-per-host", type=int, default=1, help="rows of each dripping host (default: 1)")
    options = parser.parse_args()
    if shutil.which("openssl") is None:
        parser.error("the openssl command is needed, for certificates")
    if unknown := set(options.variants) - set(VARIANTS):
        parser.error(f"{unknown}: variants are {'; '.join(VARIANTS)}")
    return options


def _cache() -> Path:
    root = os.environ.get("TASTEMAKER_CACHE") or Path.home() / ".cache" / "tastemaker"
    return Path(root).expanduser() / "bench-fetch"


if __name__ == "__main__":
    main()
