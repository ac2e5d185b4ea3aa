"""Search in the studio over made-up vectors: CPU seconds of a search, what it finds, and memory.

    python -m bench.studio_search FOLDER ROWS [--dims 512]

Makes FOLDER as the stages up to embed would leave it, without images, unless it is there. Vectors are a cone as CLIP's
are: random pairs have a cosine of about .5, topics are of Zipf's sizes, and few directions matter. Queries are images
that are not in the data, words, which lie outside of the cone, and both together, and rules that keep a half, 2% and
0.1%. What is found is compared with the 100 nearest of all vectors, by numpy.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.space import Space
from curate.layout import Data
from curate.ledger.schema import fetched_schema, make_key
from curate.workers import claim_space
from studio.search.codes import CodeBuilder, CodeIndex
from studio.search.vectors import VectorTable

Floats = npt.NDArray[np.float32]

SHARD = 10_000
QUERIES = 20  # of each kind
TRUE = 100  # nearest images that should be found


class Cone:
    """Where vectors and queries are drawn from; the same for every shard."""

    def __init__(self, rows: int, dims: int) -> None:
        rng = np.random.default_rng(1)
        self.scale = (np.arange(1, dims + 1) ** -0.5).astype(np.float32)  # of each direction
        self.middle, self.words = (rng.standard_normal(dims).astype(np.float32) * self.scale for _ in range(2))
        self.topics = rng.standard_normal((max(20, rows // 500), dims), np.float32) * self.scale
        self.turn = np.linalg.qr(rng.standard_normal((dims, dims)))[0].astype(np.float32)

    def draw(self, rng: np.random.Generator, count: int) -> Floats:
        """Vectors of images, (count, dims)."""
        topic = np.minimum(rng.zipf(1.3, count) - 1, len(self.topics) - 1)
        x = rng.standard_normal((count, len(self.scale)), np.float32) * (np.float32(0.55) * self.scale)
        return unit((x + self.middle + np.float32(0.84) * self.topics[topic]) @ self.turn)

    def draw_words(self, rng: np.random.Generator, count: int) -> Floats:
        """Vectors of texts, whose cosines with images are small, as CLIP's are."""
        topic = rng.integers(0, min(1000, len(self.topics)), count)
        return unit((self.words * 2 + self.topics[topic]) @ self.turn)


def unit(x: Floats) -> Floats:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def make(root: Path, rows: int, dims: int) -> None:
    """The data folder."""
    data, cone = Data(root), Cone(rows, dims)
    claim_space(data, Space(encoder="bundled", dim=dims))
    schema = fetched_schema(pa.schema([]))
    for shard in range(-(-rows // SHARD)):
        n = min(SHARD, rows - shard * SHARD)
        rng = np.random.default_rng([2, shard])
        keys = [make_key(shard, row, SHARD) for row in range(n)]
        known = {"key": keys, "url": keys, "status": ["success"] * n}
        columns = [pa.array(known[f.name], f.type) if f.name in known else pa.nulls(n, f.type) for f in schema]
        for file in (data.table(shard), data.image_vectors(shard), data.text_vectors(shard), data.metadata(shard)):
            file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns, schema=schema), data.table(shard))
        facts = {"count": n, "successes": n, "status_dict": {"success": n}}
        data.commit(data.fetched_record(shard), config="b", inputs={}, outputs=[data.table(shard)], facts=facts)
        np.save(data.image_vectors(shard), cone.draw(rng, n).astype(np.float16))
        np.save(data.text_vectors(shard), cone.draw_words(rng, min(n, 100)).astype(np.float16))
        pq.write_table(pa.table({"key": keys, "similarity": pa.nulls(n, pa.float32())}), data.metadata(shard))
        files = [data.image_vectors(shard), data.text_vectors(shard), data.metadata(shard)]
        inputs = data.fetched_digests(shard) or {}
        data.commit(data.embedded_record(shard), config="b", inputs=inputs, outputs=files, facts={"sample_count": n})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", type=int)
    parser.add_argument("--dims", type=int, default=512)
    options = parser.parse_args()
    if not options.folder.exists():
        report("made", lambda: make(options.folder, options.rows, options.dims))
    keys = np.arange(options.rows, dtype=np.uint64)
    table = report("keys read", lambda: VectorTable(Data(options.folder), keys))
    cone, rng = Cone(options.rows, options.dims), np.random.default_rng(3)
    images, words = cone.draw(rng, QUERIES), cone.draw_words(rng, QUERIES)
    queries = {"image": images, "words": words, "both": unit(images + words)}
    kept = rng.random(options.rows)
    rules = {"all": None, "half": kept < 0.5, "2%": kept < 0.02, "0.1%": kept < 0.001}
    truth = {
        (kind, rule): nearest(table, q, among)
        for kind, q in queries.items()
        for rule, among in rules.items()
        if kind == "image" or rule == "all"
    }
    index: CodeIndex | None = None
    if not table.is_small:
        builder = CodeBuilder(table, options.folder / "search", lambda index: None, print)
        index = report("codes made", builder.build)
        size = sum(f.stat().st_size for f in (options.folder / "search").iterdir())
        print(f"codes: {size / 1e6:,.0f} MB; recall as the studio says: {index.recall}")
    for (kind, rule), true in truth.items():
        measure(table, index, f"{kind}, {rule}", queries[kind], rules[rule], true)
    print(f"memory at most: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB; ", end="")
    memory = psutil.Process().memory_full_info()
    print(
        f"now {memory.rss / 1e6:,.0f} MB, of which {memory.uss / 1e6:,.0f} MB its own, {memory.shared / 1e6:,.0f} files"
    )


def nearest(table: VectorTable, queries: Floats, among: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.int64]:
    """The nearest rows of each query, by numpy."""
    rows = np.zeros((len(queries), 0), np.int64)
    scores = rows.astype(np.float32)
    for file in table.files:
        x = file.open().astype(np.float32)
        new = np.arange(file.first, file.first + file.count)
        if among is not None:
            x, new = x[among[new]], new[among[new]]
        both = np.hstack([scores, queries @ x.T])
        rows = np.hstack([rows, np.broadcast_to(new, (len(queries), len(new)))])
        best = np.argpartition(-both, min(TRUE, both.shape[1] - 1), axis=1)[:, :TRUE]
        rows, scores = np.take_along_axis(rows, best, 1), np.take_along_axis(both, best, 1)
    return rows


def measure(
    table: VectorTable,
    index: CodeIndex | None,
    what: str,
    queries: Floats,
    among: npt.NDArray[np.bool_] | None,
    true: npt.NDArray[np.int64],
) -> None:
    """Print what a search takes and finds."""
    found, cpus, walls = [], [], []
    for query in queries:
        cpu, wall = time.process_time(), time.perf_counter()
        rows = index.nearest(query, 10_000, among)[0] if index else table.nearest(query, 10_000, among)[0]
        cpus.append(time.process_time() - cpu)
        walls.append(time.perf_counter() - wall)
        found.append(rows[:TRUE])
    recall = np.mean([np.isin(t, f).mean() for t, f in zip(true, found, strict=True)])
    print(
        f"{what:12} CPU {1000 * np.median(cpus):5.0f} ms (first {1000 * cpus[0]:.0f}, most {1000 * max(cpus):.0f}), "
        f"wall {1000 * np.median(walls):5.0f} (first {1000 * walls[0]:.0f}, most {1000 * max(walls):.0f}), "
        f"{len(rows):,} images, recall@{TRUE} {recall:.4f}",
        flush=True,
    )


def report(name: str, work: Callable[[], Any]) -> Any:
    """What `work` returns; how long it took is printed."""
    cpu, wall = time.process_time(), time.perf_counter()
    done = work()
    print(f"{name}: {time.process_time() - cpu:.1f} s of CPU, {time.perf_counter() - wall:.1f} s", flush=True)
    return done


if __name__ == "__main__":
    main()
