"""Early rules on a list as LAION's are, and img2dataset's `min_image_size` beside: `python -m bench.early`.

Images are made here from two photographs: 60% have a short side below 512 pixels. Of their captions 15% are empty and
15% are in another language. A server of its own process sends them at 8 MB/s a connection and counts what it sends. The
recipe's rules ask for a caption, English, and 512 pixels; they are applied at the end, or early. In every round each
contender does the same list, in turn. CPU is that of a contender's processes from the plan on, by stage.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
import os
import socket
import socketserver
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROWS, ROUNDS = 600, 3
PIECE, PAUSE = 16_384, 0.002  # bytes and seconds: 8 MB/s
RULES = {
    "told": "length(trim(caption)) > 5",
    "english": "lang in ('en', 'und')",
    "large": "least(original_width, original_height) >= 512",
}
CONTENDERS = {"no early rules": (), "list and header": ("told", "large"), "all early": tuple(RULES)}
CAPTIONS = (
    "a red dahlia in the garden of a castle, autumn light",
    "der Garten eines Schlosses im Herbst, rote Dahlien",
)


def make_rows(count: int) -> list[tuple[bytes, str]]:
    """Bodies and captions, drawn by one seed."""
    from sklearn.datasets import load_sample_images

    photos, rng, rows = load_sample_images().images, np.random.default_rng(0), []
    for i in range(count):
        side = int(rng.integers(100, 512)) if i % 10 < 6 else int(rng.integers(512, 1400))
        image = Image.fromarray(photos[i % 2]).resize((side * 3 // 2, side) if i % 3 else (side, side * 4 // 3))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=int(rng.integers(80, 96)))
        kind = rng.random()
        rows.append((out.getvalue(), "" if kind < 0.15 else CAPTIONS[kind < 0.3] + f" {i}"))
    return rows


# ------------------------------------------------------------------------------------------------------------ server


class _Answer(socketserver.StreamRequestHandler):
    """One connection: GET /NUMBER.jpg, kept open between answers."""

    def handle(self) -> None:
        server: Any = self.server
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * PIECE)
        try:
            while line := self.rfile.readline():
                while self.rfile.readline().strip():
                    pass
                path = line.split()[1].decode()
                body = server.bodies[int(path[1:-4])] if path.endswith(".jpg") else b""
                status = "200 OK" if body else "404 Not Found"
                head = f"HTTP/1.1 {status}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
                self.request.sendall(head.encode())
                for at in range(0, len(body), PIECE):
                    self.request.sendall(body[at : at + PIECE])
                    with server.sent.get_lock():
                        server.sent.value += len(body[at : at + PIECE])
                    time.sleep(PAUSE)
        except OSError:
            pass  # it has left


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads, allow_reuse_address, request_queue_size = True, True, 1024


def _serve(bodies: list[bytes], sent: Any, port: Any) -> None:
    with _Server(("127.0.0.1", 0), _Answer) as server:
        server.bodies, server.sent = bodies, sent  # type: ignore[attr-defined]
        port.value = server.server_address[1]
        server.serve_forever()


@contextmanager
def serving(bodies: list[bytes]) -> Iterator[tuple[int, Any]]:
    """Its port, and the bytes that it has sent."""
    context = multiprocessing.get_context("fork")
    sent, port = context.Value("q", 0), context.Value("i", 0)
    process = context.Process(target=_serve, args=(bodies, sent, port), daemon=True)
    process.start()
    while not port.value:
        time.sleep(0.01)
    try:
        yield port.value, sent
    finally:
        process.kill()
        process.join()


# --------------------------------------------------------------------------------------------------------- contenders


def ours(listed: str, folder: str, early: tuple[str, ...]) -> dict[str, Any]:
    """All stages up to the selection, in this process."""
    import pandas  # noqa: F401  imports are left out of all figures

    from curate.annotators.order import ENCODER, first_pass
    from curate.annotators.registry import make_annotators
    from curate.layout import Data
    from curate.ledger.select import select
    from curate.sources.planner import make_plan
    from curate.workers import EmbedWorker, FetchWorker
    from pipelines.curation import early_rules
    from pipelines.recipe import load_recipe

    port = listed.rpartition("-")[2].removesuffix(".parquet")
    fetching = [f'fetch.allow=["127.0.0.0/8:{port}"]', "fetch.per_domain=64", "fetch.rate=0", "fetch.respect=[]"]
    rules = [f"select.rules={json.dumps(RULES)}", f"select.early=[{', '.join(early)}]"]
    columns = "columns={lang: language, open_nsfw: open-nsfw, aesthetic: bundled-aesthetic}"
    recipe = load_recipe("bundled", [*fetching, *rules, columns, "source.shard_size=1000"])
    data = Data(Path(folder))
    make_plan(listed, data, recipe.source)
    embedder_needs = make_annotators(recipe.columns, recipe.embed.encoder)
    of_entries = early_rules(recipe, embedder_needs)
    first = {name: recipe.columns[name] for name in first_pass(embedder_needs, of_entries[ENCODER])}
    fetcher = FetchWorker(data, recipe.fetch, recipe.images, recipe.hashes()[0], early=recipe.early_fetch())
    embedder = EmbedWorker(data, recipe.embed, first, recipe.hashes()[1], early=of_entries)

    async def fetch() -> None:
        for shard in range(len(data.plan.shards)):
            await fetcher.run(shard)
        await fetcher.close()

    times = [time.process_time()]
    asyncio.run(fetch())
    times.append(time.process_time())
    for shard in range(len(data.plan.shards)):
        embedder.run(shard)
    times.append(time.process_time())
    kept = select(data, recipe.select).kept
    embedded = sum(pq.read_metadata(data.metadata(s)).num_rows for s in range(len(data.plan.shards)))
    stored = sum(p.stat().st_size for p in (data.root / "fetched").glob("*.tar"))
    return {
        "fetch": times[1] - times[0],
        "embed": times[2] - times[1],
        "stored": stored,
        "embedded": embedded,
        "kept": kept,
    }


def peer(python: str, listed: str, folder: str) -> dict[str, Any]:
    """img2dataset with `min_image_size`: it downloads, decodes and writes; nothing is embedded."""
    options = {
        "url_list": listed, "output_folder": folder, "input_format": "parquet", "url_col": "url",
        "caption_col": "caption", "output_format": "webdataset", "image_size": 512, "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True, "min_image_size": 512, "encode_quality": 95, "processes_count": 1,
        "thread_count": 64, "number_sample_per_shard": 1000, "retries": 0, "timeout": 20,
    }  # fmt: skip
    command = [python, "-m", "bench.peer", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(done.stdout[-500:] + done.stderr[-500:])
    stored = sum(p.stat().st_size for p in Path(folder).glob("*.tar"))
    return {"fetch": json.loads(done.stdout.splitlines()[-1])["cpu"], "stored": stored}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has img2dataset")
    parser.add_argument("--ours", nargs=3, help=argparse.SUPPRESS)  # list, folder, contender
    options = parser.parse_args()
    if options.ours:
        listed, folder, name = options.ours
        print(json.dumps(ours(listed, folder, CONTENDERS[name])), flush=True)
        return
    rows = make_rows(options.rows)
    print(f"{os.cpu_count()} cores; {len(rows):,} images, {sum(len(b) for b, _ in rows) / 1e6:.1f} MB", flush=True)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*CONTENDERS, "img2dataset")}
    with serving([body for body, _ in rows]) as (port, sent), tempfile.TemporaryDirectory() as scratch:
        listed = f"{scratch}/list-{port}.parquet"
        urls = [f"http://127.0.0.1:{port}/{i}.jpg" for i in range(len(rows))]
        pq.write_table(pa.table({"url": urls, "caption": [caption for _, caption in rows]}), listed)
        for n in range(options.rounds):
            for name in found:
                folder, before = f"{scratch}/{name.replace(' ', '-')}-{n}", sent.value
                if name == "img2dataset":
                    facts = peer(options.peer_python, listed, folder)
                else:
                    command = [sys.executable, "-m", "bench.early", "--ours", listed, folder, name]
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600, check=True)
                    facts = json.loads(done.stdout.splitlines()[-1])
                found[name].append({**facts, "sent": sent.value - before})
                print(f"round {n + 1}: {name}: {found[name][-1]}", flush=True)
    kept = found["all early"][0]["kept"]
    print("\n| | fetch, CPU ms per kept image | embed, annotate | sent | stored | embedded | kept |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, rounds in found.items():
        mid = {key: median(r[key] for r in rounds) for key in rounds[0]}
        cells = [f"{1000 * mid['fetch'] / kept:.1f}", f"{1000 * mid['embed'] / kept:.1f}" if "embed" in mid else "-"]
        cells += [f"{mid['sent'] / 1e6:.1f} MB", f"{mid['stored'] / 1e6:.1f} MB"]
        cells += [f"{mid[key]:.0f}" if key in mid else "-" for key in ("embedded", "kept")]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
