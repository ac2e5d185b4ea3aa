"""The annotator near-duplicates on made-up data with planted copies: time, CPU, memory, and recall.

    python -m bench.near_duplicates FOLDER ROWS [--dims 128] [--add 0] [--phash 4] [--cosine 0.95]

Makes FOLDER/data as the stages before would leave it, without images, unless it is there, and runs `tastemaker
annotate` on it. Vectors are a cone as CLIP's are: random pairs have a cosine of about .5, those of one topic about .8,
and topics are of Zipf's sizes. Every hundredth row is an original, and one row in twenty a copy of one, anywhere in the
data: up to 4 bits of the perceptual hash and 24 of PDQ away, at a cosine of .96 to .999; one copy in fifty is of the
first twenty originals, which makes large groups. With `--add N` the last N shards come afterwards, and the second run
is measured too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.space import Space
from bench import measure
from curate.annotators.base import column_specs
from curate.annotators.registry import make_annotator
from curate.layout import Data
from curate.ledger.schema import fetched_schema, make_key
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from curate.workers import claim_space
from pipelines.recipe import load_recipe, store_recipe

Floats = npt.NDArray[np.float32]

SHARD = 50_000
EVERY = 100  # one row in so many is an original
POPULAR = 20


class Originals:
    """What copies are made of; the same for every shard."""

    def __init__(self, rows: int, dims: int) -> None:
        rng = np.random.default_rng(1)
        count = -(-rows // EVERY)
        self.topics = unit(rng.standard_normal((max(20, rows // 500), dims), np.float32))
        self.cone = unit(rng.standard_normal((1, dims), np.float32))
        self.vectors = self.draw(rng, count)
        self.phash = draw_phash(rng, count)
        self.pdq = rng.integers(0, 2**64, (count, 4), np.uint64)

    def draw(self, rng: np.random.Generator, count: int) -> Floats:
        """Vectors of images that are no copies, (count, dims)."""
        topic = np.minimum(rng.zipf(1.3, count) - 1, len(self.topics) - 1)
        noise = unit(rng.standard_normal((count, self.topics.shape[1]), np.float32))
        return unit(self.cone + unit(self.topics[topic] + np.float32(0.7) * noise))

    def shard(
        self, rng: np.random.Generator, first: int, count: int
    ) -> tuple[Floats, npt.NDArray, npt.NDArray, Sequence]:
        """Vectors, perceptual hashes and PDQ of a shard's rows, and (row, original) of its copies."""
        vectors = self.draw(rng, count)
        phash, pdq = draw_phash(rng, count), rng.integers(0, 2**64, (count, 4), np.uint64)
        row = np.arange(count)
        own = row[(first + row) % EVERY == 0]
        of = (first + own) // EVERY
        vectors[own], phash[own], pdq[own] = self.vectors[of], self.phash[of], self.pdq[of]

        copies = row[(rng.random(count) < 0.05) & ((first + row) % EVERY != 0)]
        of = rng.integers(0, len(self.vectors), len(copies))
        of = np.where(rng.random(len(copies)) < 0.02, of % POPULAR, of)
        phash[copies] = self.phash[of] ^ flips(rng, len(copies), 64, 4)[:, 0]
        pdq[copies] = self.pdq[of] ^ flips(rng, len(copies), 256, 24)
        cosine = rng.uniform(0.96, 0.999, (len(copies), 1)).astype(np.float32)
        aside = rng.standard_normal((len(copies), vectors.shape[1]), np.float32)
        aside = unit(aside - (aside * self.vectors[of]).sum(1, keepdims=True) * self.vectors[of])
        vectors[copies] = cosine * self.vectors[of] + np.sqrt(1 - cosine**2) * aside
        return vectors, phash, pdq, list(zip((first + copies).tolist(), (of * EVERY).tolist(), strict=True))


def draw_phash(rng: np.random.Generator, count: int) -> npt.NDArray[np.uint64]:
    """Perceptual hashes with about as many ones as zeros, as those of images that are not flat have."""
    found = np.zeros(count, np.uint64)
    while len(few := np.flatnonzero(np.bitwise_count(found) < 32)):
        found[few] = rng.integers(0, 2**64, len(few), np.uint64)
    return found


def unit(x: Floats) -> Floats:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def flips(rng: np.random.Generator, count: int, bits: int, most: int) -> npt.NDArray[np.uint64]:
    """(count, bits / 64) masks of up to `most` random bits each."""
    on = np.zeros((count, bits), np.uint8)
    for _ in range(most):
        on[np.arange(count), rng.integers(0, bits, count)] = 1
    return np.packbits(on, axis=1).view(np.uint64)


def make_data(root: Path, rows: int, dims: int) -> None:
    """A data folder as the stages up to embed and the annotator pdq leave it, and what is a copy of what."""
    listed, data = root / "list.parquet", Data(root / "data")
    root.mkdir(parents=True)
    index = pa.array(np.arange(rows)).cast(pa.string())
    urls = pc.binary_join_element_wise("http://example.com/", index, "")
    pq.write_table(pa.table({"url": urls, "caption": urls}), listed)
    make_plan(str(listed), data, SourceConfig(shard_size=SHARD), None)
    store_recipe(data, load_recipe("bundled", ["columns={}", "select.rules={}", f"source.shard_size={SHARD}"]))
    claim_space(data, Space(encoder="bundled", dim=dims))
    originals, copies = Originals(rows, dims), list[npt.NDArray[np.int64]]()
    for s in data.plan.shards:
        vectors, phash, pdq, found = originals.shard(np.random.default_rng([2, s.shard]), s.shard * SHARD, s.rows)
        write_shard(data, s.shard, vectors, phash, pdq)
        copies += found
    np.save(root / "copies.npy", np.array(copies))


def write_shard(data: Data, shard: int, vectors: Floats, phash: npt.NDArray, pdq: npt.NDArray) -> None:
    """Files and records of one shard, as far as near-duplicates read them."""
    n = len(phash)
    keys = [make_key(shard, row, SHARD) for row in range(n)]
    sha256 = np.random.default_rng([3, shard]).bytes(32 * n).hex()
    known = {
        "key": keys,
        "url": keys,
        "caption": keys,
        "status": ["success"] * n,
        "sha256": [sha256[i : i + 64] for i in range(0, 64 * n, 64)],
        "phash": hexadecimal(phash[:, None]),
    }
    schema = fetched_schema(pa.schema([]))
    columns = [pa.array(known[f.name], f.type) if f.name in known else pa.nulls(n, f.type) for f in schema]
    data.table(shard).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), data.table(shard))
    facts = {"count": n, "successes": n, "status_dict": {"success": n}}
    inputs = {"plan": data.plan.shard_digest(shard)}
    data.commit(data.fetched_record(shard), config="b", inputs=inputs, outputs=[data.table(shard)], facts=facts)

    files = [data.image_vectors(shard), data.metadata(shard)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    np.save(files[0], vectors.astype(np.float16))
    empty = pa.nulls(n, pa.float32())
    pq.write_table(pa.table({"image_path": keys, "key": keys, "caption": keys, "similarity": empty}), files[1])
    inputs = data.fetched_digests(shard) or {}
    data.commit(data.embedded_record(shard), config="b", inputs=inputs, outputs=files, facts={})

    annotator = make_annotator("pdq", "pdq")
    file = data.annotations("pdq", shard)
    file.parent.mkdir(parents=True, exist_ok=True)
    values = {"pdq_hash": hexadecimal(pdq), "pdq_quality": pa.array([100] * n, annotator.columns["quality"].type)}
    pq.write_table(pa.table({"key": keys, **values}), file)
    specs = {column: spec.facts() for column, spec in column_specs({"pdq": annotator}).items()}
    data.commit(
        data.annotations_record("pdq", shard),
        config=annotator.digest,
        inputs=inputs,
        outputs=[file],
        facts={"count": n, "annotator": "pdq", "columns": specs},
    )


def hexadecimal(words: npt.NDArray[np.uint64]) -> list[str]:
    """(n, words) as hex digits, the highest first."""
    text, digits = words.astype(">u8").tobytes().hex(), 16 * words.shape[1]
    return [text[i : i + digits] for i in range(0, len(text), digits)]


def planted_recall(root: Path) -> float:
    """The share of the planted copies that are in one group with their original."""
    copies, data = np.load(root / "copies.npy"), Data(root / "data")
    groups = pa.concat_tables(
        pq.read_table(data.annotations("dup", shard), columns=["dup"]) for shard in data.shards(data.fetched_record)
    )["dup"]
    ids = groups.combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy()
    copies = copies[copies.max(1) < len(ids)]
    return float(((ids[copies[:, 0]] == ids[copies[:, 1]]) & (ids[copies[:, 0]] >= 0)).mean())


def annotate(root: Path, spec: str) -> None:
    """Run the command, and print what it used."""
    data = Data(root / "data")
    command = [sys.executable, "-m", "pipelines.cli", "annotate", str(data.root), f"dup={spec}"]
    before = psutil.cpu_times()
    used = measure.run(command, {}, root / "output.txt", seconds=4 * 3600)
    after = psutil.cpu_times()  # of the machine: Ray's workers are nobody's children when they end
    cpu = sum(after[:3]) - sum(before[:3])  # user, nice, system
    print(used.output)
    record = json.loads(data.annotations_record("dup", 0).read_text())
    print(json.dumps({k: record.get(k) for k in ("recall", "notes")}, indent=1))
    size = sum(f.stat().st_size for f in data.index("dup").rglob("*") if f.is_file())
    print(
        f"{spec}: {used.wall:.0f} s, {cpu:.0f} s of the machine's CPU, {used.peak:,.0f} MB at most, "
        f"index {size / 1e6:,.0f} MB; of the planted copies {planted_recall(root):.4f} are with their original"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", type=int)
    parser.add_argument("--dims", type=int, default=128)
    parser.add_argument("--add", type=int, default=0)
    parser.add_argument("--phash", type=int, default=4)
    parser.add_argument("--cosine", type=float, default=0.95)
    options = parser.parse_args()
    root, data = options.folder, Data(options.folder / "data")
    if not root.exists():
        make_data(root, options.rows, options.dims)
    asked = [f"phash: {options.phash}"] * bool(options.phash) + [f"cosine: {options.cosine}"] * bool(options.cosine)
    spec = f"{{use: near-duplicates, {', '.join(asked)}}}"
    late = [s.shard for s in data.plan.shards][len(data.plan.shards) - options.add :]
    for shard in late:  # not fetched yet, as far as anybody can see
        data.fetched_record(shard).rename(data.fetched_record(shard).with_suffix(".later"))
    annotate(root, spec)
    for shard in late:
        data.fetched_record(shard).with_suffix(".later").rename(data.fetched_record(shard))
    if late:
        annotate(root, spec)


if __name__ == "__main__":
    main()
