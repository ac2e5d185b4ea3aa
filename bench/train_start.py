"""How long training takes to begin, and how much memory each of its processes takes, by the number of images.

    python -m bench.train_start                             10 thousand, 100 thousand, 1 million: some two minutes
    python -m bench.train_start --counts 10000 10000000

Packed folders are made up: real parquet, tars and indexes as `pack` writes them, with tiny images, random captions and
random hashes. All tars of a folder are one file under many names; each has a parquet of its own. Each measurement is a
process of its own:

- the first: looks at all samples (fingerprint, hashes, held-out split, weights, shapes, captions for a tokenizer),
  writes data.json and what else other processes need, and makes the first batch;
- another: opens the same, with what the first one wrote, and makes the first batch.

Seconds are of CPU time, which other work on the machine does not change, and of the clock; memory is the most that the
process held, and how much of that it took to load torch and our modules. What it takes to compare the bytes of tars is
told apart, as that of more than 4 GB is done while training runs.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from curate.shards.indexes import write_shard_indexes
from curate.shards.tar import TarWriter

BATCH = 64
SHARD = 10_000
_WORDS = "a the photograph of red small old house tree river mountain woman child dog in on near with blue".split()  # noqa: SIM905


def make_packed(folder: Path, count: int, shard: int = SHARD, *, linked: bool = False, seed: int = 0) -> Path:
    """A packed folder of made-up samples. linked: all tars are one file, and hold other keys than their parquets."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    sizes, outputs = dict[str, int](), dict[str, dict[str, Any]]()
    first: list[Path] = []
    for start in range(0, count, shard):
        rows = made_up(rng, range(start, min(start + shard, count)))
        tar = folder / f"{start // shard:05d}.tar"
        if linked and first and len(rows) == sizes[first[0].name]:
            files = [tar, tar.with_suffix(".json"), tar.with_suffix(".tar.idx")]
            for file, known in zip(files, first, strict=True):
                os.link(known, file)
                outputs[file.name] = outputs[known.name]
        else:
            _write_tar(tar, rows)
            files = [tar, *write_shard_indexes(tar, rows)]
            outputs |= {file.name: _output(file) for file in files}
            first = first or files
        pq.write_table(rows, tar.with_suffix(".parquet"), compression="zstd")
        outputs[f"{tar.stem}.parquet"] = _output(tar.with_suffix(".parquet"))
        sizes[tar.name] = len(rows)
    named = {f"shards/all/{name}": fact for name, fact in sorted(outputs.items())}
    (folder / "sizes.json").write_text(json.dumps(sizes))
    (folder / "manifest.json").write_text(json.dumps({"name": "all", "count": count, "outputs": named}))
    return folder


def made_up(rng: np.random.Generator, numbers: range) -> pa.Table:
    """Rows of so many samples, with the columns of packed ones that training reads, and some more."""
    n = len(numbers)
    words = rng.integers(0, len(_WORDS), (n, 12))
    hashes = rng.integers(0, 256, (n, 40), np.uint8)
    digests = [row.tobytes().hex() for row in hashes]
    return pa.table(
        {
            "url": [f"https://site-{i % 997}.example/images/{i}.jpg" for i in numbers],
            "caption": [
                f"{' '.join(_WORDS[w] for w in row)} {i}" for row, i in zip(words.tolist(), numbers, strict=True)
            ],
            "key": [f"{i:012d}" for i in numbers],
            "width": rng.choice(np.array([256, 341, 384], np.int32), n),
            "height": rng.choice(np.array([256, 341, 384], np.int32), n),
            "sha256": [d[:64] for d in digests],
            "phash": [d[64:] for d in digests],
            "aesthetic": rng.normal(5, 1, n).clip(0.1).astype(np.float32),
        }
    )


def _write_tar(path: Path, rows: pa.Table) -> None:
    rng = np.random.default_rng(len(rows))
    images = []
    for _ in range(16):
        data = io.BytesIO()
        pixels = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((24, 24)).save(data, "JPEG", quality=80)
        images.append(data.getvalue())
    with open(path, "wb") as f:
        tar = TarWriter(f)
        for i, row in enumerate(rows.to_pylist()):
            row = {name: value if value == value else None for name, value in row.items()}  # JSON has no NaN
            tar.add_sample(row["key"], images[i % 16], "jpg", row["caption"], row)
        tar.close()


def _output(path: Path) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}


# ---------------------------------------------------------------------------------------------------------- measuring


def measure(folder: Path, out: Path) -> dict[str, Any]:
    """What a process of a run does until it has its first batch; it is the first where `out` has no data.json."""
    import torch

    from train.data import Stream, open_samples
    from train.loop import LoopConfig
    from train.models.family import new_model
    from train.models.presets import PRESETS
    from train.run import TrainRun, default_prompts, hold_out, trained_captions
    from train.split import without

    torch.set_num_threads(1)
    loaded = _memory()
    spent: dict[str, float] = {}
    marks = [time.process_time(), time.monotonic()]
    began = list(marks)

    def mark(name: str) -> None:
        now = time.process_time()
        spent[name] = round(now - marks[0], 2)
        marks[0] = now

    samples = open_samples(folder)
    mark("open")
    samples.check_bytes()  # of 4 GB at most: larger folders are compared while training runs
    compared = time.process_time() - marks[0]
    marks[0] = time.process_time()
    if not (out / "data.json").is_file():
        samples.read_fingerprint()
        mark("fingerprint")
        facts = hold_out(samples, out, lambda count: None)
        mark("held out")
        captions = trained_captions(samples, facts["held_out"])
        default_prompts(samples, facts["held_out"])
        mark("captions")
        del captions
    pipeline = new_model(PRESETS["debug"], ["a photograph"], "flow", 0)
    mark("model")
    loop = LoopConfig(steps=100, batch=BATCH)
    options: dict[str, Any] = {"device": torch.device("cpu"), "new": True, "text": True}
    run = TrainRun(pipeline, samples, out, loop, buckets=True, weight_by="aesthetic", **options)
    assert len(run.chosen) == len(without(len(samples), run.held_out.tolist()))
    mark("columns")
    stream = Stream(run.images, run.chosen, batch=BATCH, weights=run.weights)
    batch = next(stream.batches())
    mark("first batch")
    assert len(batch.keys) == BATCH
    return {
        "images": len(samples),
        "cpu_s": round(time.process_time() - began[0] - compared, 2),
        "clock_s": round(time.monotonic() - began[1], 2),
        "memory_mb": round(_memory()),
        "loaded_mb": round(loaded),
        "spent": {**spent, "(bytes compared": f"{compared:.2f})"},
    }


def _memory() -> float:
    """The most memory that this process held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure, and print a table of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measure(*asked.measure)))
        return
    found: dict[str, list[dict[str, Any]]] = {"the first": [], "another": []}
    for count in asked.counts:
        with tempfile.TemporaryDirectory(prefix="train-start-") as scratch:
            folder, out = make_packed(Path(scratch, "shards"), count, linked=True), Path(scratch, "model")
            out.mkdir()
            for which, results in found.items():
                command = [sys.executable, "-m", "bench.train_start", "--measure", str(folder), str(out)]
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                results.append(result := json.loads(said.splitlines()[-1]))
                spent = ", ".join(f"{name} {seconds}" for name, seconds in result["spent"].items())
                print(
                    f"{count:>11,}  {which:<9}  {result['cpu_s']:>7.1f} s CPU  {result['clock_s']:>7.1f} s  "
                    f"{result['memory_mb']:>6,} MB ({result['loaded_mb']:,} to load)   {spent}",
                    flush=True,
                )
    for which, results in found.items():
        if len(results) > 1:
            (low, high), million = (results[-2], results[-1]), 1e6
            per = million / (high["images"] - low["images"])
            seconds, memory = ((high[k] - low[k]) * per for k in ("cpu_s", "memory_mb"))
            print(
                f"{which}: {seconds:.1f} s of CPU and {memory:.0f} MB more for each million; 10 million: "
                f"{high['cpu_s'] + seconds * (10 - high['images'] / million):.0f} s, "
                f"{high['memory_mb'] + memory * (10 - high['images'] / million):,.0f} MB"
            )


if __name__ == "__main__":
    main()
