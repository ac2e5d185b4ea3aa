"""What each operation costs as a data folder grows: CPU-seconds and peak memory, on folders made up in our own formats.

    python -m bench.scale --rows 1e4 1e5 1e6 [--only select,fit] [--shard-size 10000] [--folder FOLDER]

Makes FOLDER/ROWS-SHARDSIZE/ as the stages before would leave it, unless it is there; runs each operation in a process
of its own and notes it in FOLDER/measured.json; prints all that is noted, with what a million more rows cost and what
that comes to at a billion. CPU is user and system time, all of the process; memory is its peak, mapped files included.

Vectors and, unless `pack` is asked of that folder (by default up to a million rows), tars are links to a few files: an
image's neighbours in others' shards repeat, and no image is opened. One row in twenty has no image, one in fifty is
nearly a copy of another one, one in a thousand is one placeholder.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

DIMS = 768
VECTOR_FILES = 8  # files of vectors that all shards are links to
RATINGS = 300
PACKED_UP_TO = 1_000_000
RULES = {
    "large": "least(original_width, original_height) >= 200",
    "readable": "lang = 'en'",
    "fits": "similarity >= 0.05",
    "once": "first_of(sha256)",
    "taste": "top(aesthetic, 0.5)",
}


def main() -> None:
    """Make folders, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, nargs="*", default=[], help="none: print what is noted")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[*OPERATIONS], metavar="OPERATION,...")
    parser.add_argument("--shard-size", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "tastemaker-scale")
    parser.add_argument("--keep", action="store_true", help="keep the folders of data")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if unknown := set(asked.only) - OPERATIONS.keys():
        parser.error(f"--only {', '.join(sorted(unknown))}: there is {', '.join(OPERATIONS)}")
    if asked.child:
        _child(*asked.child)
        return
    for rows in map(int, asked.rows):
        root = asked.folder / f"{rows}-{asked.shard_size}"
        names = [
            n for n in OPERATIONS if n in asked.only and (n != "pack" or rows <= PACKED_UP_TO or len(asked.only) < 3)
        ]
        tars = "real" if "pack" in names else "links"
        if not (root / f"made-{tars}").exists() and not (root / "made-real").exists():
            shutil.rmtree(root, ignore_errors=True)
            cpu, mb = measure("make", root, rows, asked.shard_size, tars)
            print(f"{rows:,} rows made: {cpu:.0f} CPU-s, {mb:,.0f} MB", file=sys.stderr)
        for name in names:
            cpu, mb = measure(name, root)
            note(asked.folder / "measured.json", name, rows, asked.shard_size, cpu, mb)
            print(
                f"{rows:,} rows in {-(-rows // asked.shard_size):,} shards  {name}: {cpu:.1f} CPU-s, {mb:,.0f} MB",
                file=sys.stderr,
            )
        if not asked.keep:
            shutil.rmtree(root)
    print(table(json.loads((asked.folder / "measured.json").read_text())))


def measure(*words: Any) -> tuple[float, float]:
    """CPU-seconds and peak MB of a process that does this. It is started from one as small as this, whose own size
    would else count."""
    command = [sys.executable, "-m", "bench.scale", "--child", *map(str, words)]
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(map(str, words))}: {output.read().decode(errors='replace')[-4000:]}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def _child(name: str, root: str, *words: str) -> None:
    if name == "make":
        os.fsync = lambda fd: None  # a hundred thousand files would wait for the disk, and nothing here is worth that
        make(Path(root), int(words[0]), int(words[1]), words[2] == "real")
    else:
        OPERATIONS[name](Path(root))


# --------------------------------------------------------------------------------------------------------- the figures


def note(file: Path, name: str, rows: int, shard_size: int, cpu: float, mb: float) -> None:
    """Put a measurement in the place of that of before."""
    found = json.loads(file.read_text()) if file.exists() else []
    same = [name, rows, shard_size]
    found = [m for m in found if [m["name"], m["rows"], m["shard_size"]] != same]
    found.append({"name": name, "rows": rows, "shard_size": shard_size, "cpu": round(cpu, 2), "mb": round(mb)})
    file.write_text(json.dumps(found, indent=1))


def table(found: Sequence[dict[str, Any]]) -> str:
    """A line an operation and shard size: measurements, what a million rows more cost, the power of rows by which the
    cost grew last, and what a billion would take at that rate.

    A rate is that between the two largest sizes. Below a tenth of a second or 20 MB of difference it is noise, and is
    not extrapolated.
    """
    lines = []
    for shard_size in sorted({m["shard_size"] for m in found}, reverse=True):
        some = [m for m in found if m["shard_size"] == shard_size]
        sizes = sorted({m["rows"] for m in some})
        lines += ["", f"{shard_size:,} rows a shard; CPU-seconds, MB", ""]
        lines += ["| operation | " + " | ".join(f"{n:,}" for n in sizes) + " | a million more | growth | a billion |"]
        lines += ["|---|" + "--:|" * (len(sizes) + 3)]
        for name in OPERATIONS:
            at = {m["rows"]: (m["cpu"], m["mb"]) for m in some if m["name"] == name}
            if at:
                cells = [f"{at[n][0]:.1f}, {at[n][1]:,}" if n in at else "" for n in sizes]
                lines.append(f"| {name} | " + " | ".join([*cells, *_rates(at)]) + " |")
    return "\n".join(lines).strip()


def _rates(at: dict[int, tuple[float, float]]) -> list[str]:
    if len(at) < 2:
        return ["", "", ""]
    a, b = sorted(at)[-2:]
    (cpu_a, mb_a), (cpu_b, mb_b) = at[a], at[b]
    cpu = (cpu_b - cpu_a) / (b - a) if cpu_b - cpu_a > 0.1 else 0.0
    mb = (mb_b - mb_a) / (b - a) if mb_b - mb_a > 20 else 0.0
    power = math.log(max(cpu_b, 0.01) / max(cpu_a, 0.01)) / math.log(b / a)
    hours, gb = (cpu_b + cpu * (1e9 - b)) / 3600, (mb_b + mb * (1e9 - b)) / 1000
    return [f"{cpu * 1e6:.2f} s, {mb * 1e6:,.0f} MB", f"rows^{power:.1f}", f"{hours:.1f} CPU-h, {gb:,.1f} GB"]


# ---------------------------------------------------------------------------------------------------------- operations


def _start(root: Path) -> None:
    """`tastemaker curate` again, where all is fetched, embedded and annotated."""
    from pipelines.curation import Request, run
    from pipelines.recipe import stored_recipe

    data = _data(root)
    run(Request(list=data.plan.list, data=data, recipe=_known(stored_recipe(data)), stages=("fetch", "embed")))


def _command(root: Path, *words: str) -> None:
    from pipelines.cli import main as tastemaker

    if code := tastemaker([*words]):
        raise SystemExit(code)


def _select(root: Path) -> None:
    _data(root).selection_record("default").unlink(missing_ok=True)
    _command(root, "select", str(root / "data"))


def _query(root: Path) -> None:
    sql = "SELECT lang, count(*), avg(aesthetic), avg(similarity), max(original_width) FROM ledger GROUP BY lang"
    _command(root, "query", str(root / "data"), sql)


def _head(root: Path) -> None:
    """Scores of a head that is new, on vectors that are there: what each worker of `annotate` does."""
    from curate.annotators.base import Resources
    from curate.annotators.registry import make_annotators
    from curate.annotators.stage import annotate_shard
    from curate.workers import ignore

    data = _data(root)
    shutil.rmtree(data.annotations("second", 0).parent, ignore_errors=True)
    heads = make_annotators({"second": str(root / "second")})
    heads["second"].load(Resources(threads=2, space=_space(), encoder=_known))
    with ThreadPoolExecutor(2) as threads:
        for s in data.plan.shards:
            annotate_shard(data, s.shard, heads, encoder=None, config="", threads=threads, report=ignore)
    shutil.rmtree(data.annotations("second", 0).parent)


def _repeats(root: Path) -> None:
    from curate.duplicates.repeats import repeats

    print(repeats(_data(root)))


def _fit(root: Path, *more: str) -> None:
    shutil.rmtree(root / "mine.head", ignore_errors=True)
    data, ratings = str(root / "data"), str(root / "ratings.csv")
    _command(root, "fit", ratings, "--data", data, "--out", str(root / "mine.head"), *more)


def _charts(root: Path) -> None:
    from curate.report import score_charts

    print(score_charts(_data(root), "default"))


def _pack(root: Path) -> None:
    data = _data(root)
    shutil.rmtree(data.packed("default"), ignore_errors=True)
    _command(root, "pack", str(data.root))
    shutil.rmtree(data.packed("default"))


def _duplicates(root: Path) -> None:
    """Groups of near-duplicates by perceptual hashes that PDQ confirms, in one process."""
    from curate.annotators.registry import make_annotators
    from curate.annotators.stage import annotate_table

    data = _data(root)
    annotators = make_annotators({"dup": {"use": "near-duplicates", "phash": 4}, "pdq": "pdq"})
    annotate_table(data, "dup", annotators, encoder=_known)
    shutil.rmtree(data.annotations("dup", 0).parent)


OPERATIONS: dict[str, Callable[[Path], None]] = {
    "start": _start,
    "status": lambda root: _command(root, "status", str(root / "data")),
    "select": _select,
    "query": _query,
    "head": _head,
    "repeats": _repeats,
    "fit": _fit,
    "suggest": lambda root: _fit(root, "--suggest", "20"),
    "charts": _charts,
    "pack": _pack,
    "duplicates": _duplicates,
}
"""Start with nothing to do; status; select by five rules; a query over all rows; a new head; repeats; fit of 300
ratings, and with --suggest; charts of a selection; pack of one; near-duplicates by hashes."""


def _data(root: Path) -> Any:
    from curate.layout import Data

    return Data(root / "data")


def _known(value: Any = None) -> Any:
    assert value is not None, "not made up"
    return value


def _space() -> Any:
    from aesthetic.space import Space

    return Space(encoder="bundled", dim=DIMS)


# ------------------------------------------------------------------------------------------------------- made-up data


def make(root: Path, rows: int, shard_size: int, real_tars: bool) -> None:
    """A data folder as all stages up to annotate leave it, a second head and ratings."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from aesthetic.head_files import save_head
    from aesthetic.heads import Head
    from bench.near_duplicates import Originals
    from curate.annotators.registry import make_annotators
    from curate.layout import ANNOTATED, EMBEDDED, FETCHED
    from curate.sources.planner import make_plan
    from curate.workers import claim_space
    from pipelines.recipe import load_recipe, store_recipe

    data = _data(root)
    root.mkdir(parents=True)
    with pq.ParquetWriter(root / "list.parquet", _listed(0, 1).schema, compression="zstd") as out:
        for first in range(0, rows, 1_000_000):
            out.write_table(_listed(first, min(1_000_000, rows - first)))
    rng = np.random.default_rng(0)
    for name in ("first", "second"):
        layer = (rng.standard_normal((1, DIMS), np.float32), np.full(1, 5, np.float32))
        save_head(Head(name=name, task="aesthetic", space=_space(), scale=(0, 10), layers=(layer,)), root / name)
    settings = ["columns={}", "select.rules={}", "select.name=default", f"source.shard_size={shard_size}"]
    settings += [f"columns.aesthetic={(root / 'first').absolute()}", "columns.lang={use: language}", "columns.pdq=pdq"]
    recipe = load_recipe("bundled", settings + [f"select.rules.{name}={rule}" for name, rule in RULES.items()])
    make_plan(str(root / "list.parquet"), data, recipe.source, None)
    store_recipe(data, recipe)
    claim_space(data, _space())

    pool = Originals(100_000, DIMS)
    files = [pool.draw(np.random.default_rng([1, i]), shard_size) for i in range(VECTOR_FILES)]
    maker = _Maker(data, rows, recipe.hashes(), make_annotators(recipe.columns), real_tars, files)
    for s in data.plan.shards:
        maker.shard(s.shard, s.offset, s.rows)
    chosen = np.sort(rng.choice(rows, min(3 * RATINGS, rows), replace=False))
    chosen = chosen[chosen % 20 > 0][:: max(1, len(chosen) // (2 * RATINGS))][:RATINGS]
    taste = rng.standard_normal(DIMS).astype(np.float32)
    vectors = np.stack([maker.vector(int(i)) for i in chosen])
    scores = np.round(5 + 2 * (vectors - vectors.mean(0)) @ taste + rng.standard_normal(len(chosen)) / 2, 2)
    urls = pa.chunked_array([_listed(int(i), 1)["url"].chunk(0) for i in chosen])
    import pandas as pd

    pd.DataFrame({"url": urls.to_pylist(), "score": scores}).to_csv(root / "ratings.csv", index=False)
    with data.hold():  # records lie together, as a run leaves them
        for stage in (FETCHED, EMBEDDED, ANNOTATED):
            data.look(data.records(stage))
    (root / f"made-{'real' if real_tars else 'links'}").touch()


def _listed(first: int, count: int) -> Any:
    """Rows of the list: url, caption, and the number of a licence."""
    import pyarrow as pa
    import pyarrow.compute as pc

    row = np.arange(first, first + count)
    index, host = (pa.array(v).cast(pa.string()) for v in (row, row * 7919 % 50_021))
    words = pa.array(
        [
            "a",
            "red",
            "small",
            "old",
            "photo",
            "of",
            "the",
            "house",
            "river",
            "dog",
            "market",
            "at",
            "dawn",
            "in",
            "Kyoto",
            ".",
        ]
    )
    picked = [words.take(pa.array(row * p % 16)) for p in (3, 5, 7, 11, 13)]
    return pa.table(
        {
            "url": pc.binary_join_element_wise("https://images", host, ".example.com/media/", index, ".jpg", ""),
            "caption": pc.binary_join_element_wise(*picked, index, " "),
            "licence": pa.array(row % 7, pa.int32()),
        }
    )


class _Maker:
    """Writes the files and records of one shard after another."""

    def __init__(
        self,
        data: Any,
        rows: int,
        hashes: tuple[str, str],
        annotators: dict[str, Any],
        real_tars: bool,
        vectors: list[npt.NDArray[np.float32]],
    ) -> None:
        from bench.near_duplicates import draw_phash

        self.data, self.shard_size = data, data.plan.shard_size
        self.fetch_hash, self.embed_hash = hashes
        self.annotators, self.real_tars = annotators, real_tars
        self.vectors = [w.astype(np.float16) for w in vectors]
        rng = np.random.default_rng(3)
        self.originals = max(1, rows // 100)
        self.phash = draw_phash(rng, self.originals)
        self.pdq = rng.integers(0, 2**64, (self.originals, 4), np.uint64)
        self.linked: dict[tuple[str, int], Path] = {}  # kind and rows -> a file that others are links to
        for folder in (self.data.table(0), self.data.image_vectors(0), self.data.metadata(0)):
            folder.parent.mkdir(parents=True, exist_ok=True)
        for name in annotators:
            self.data.annotations(name, 0).parent.mkdir(parents=True, exist_ok=True)

    def shard(self, shard: int, first: int, count: int) -> None:
        """Everything of one shard, whose first row is this one of the list."""
        import pyarrow as pa
        import pyarrow.compute as pc

        rng, row = np.random.default_rng([4, shard]), np.arange(count)
        good = (first + row) % 20 > 0
        digits = len(str(self.shard_size - 1)) if self.shard_size > 1 else 0
        keys = pc.utf8_lpad(pa.array(shard * 10**digits + row).cast(pa.string()), 5 + digits, "0")
        listed = _listed(first, count)
        phash, pdq = self._hashes(rng, shard, count)
        inputs = self._fetched(shard, keys, listed, good, phash, rng)
        keys, captions, pdq = keys.filter(pa.array(good)), listed["caption"].filter(pa.array(good)), pdq[good]
        vectors = self._embedded(shard, keys, captions, inputs, rng)
        n = len(keys)
        self._annotated(shard, "aesthetic", keys, vectors, [rng.normal(5, 1, n).astype(np.float32)])
        self._annotated(shard, "lang", keys, inputs, [_language(rng, n), rng.random(n, np.float32)])
        self._annotated(shard, "pdq", keys, inputs, [_hexadecimal(pdq), np.full(n, 100)])

    def _hashes(self, rng: np.random.Generator, shard: int, count: int) -> tuple[npt.NDArray, npt.NDArray]:
        from bench.near_duplicates import flips

        phash = rng.integers(0, 2**64, count, np.uint64)
        pdq = rng.integers(0, 2**64, (count, 4), np.uint64)
        copies = np.flatnonzero(rng.random(count) < 0.02)
        of = rng.integers(0, self.originals, len(copies))
        phash[copies] = self.phash[of] ^ flips(rng, len(copies), 64, 2)[:, 0]
        pdq[copies] = self.pdq[of] ^ flips(rng, len(copies), 256, 20)
        return phash, pdq

    def _fetched(
        self, shard: int, keys: Any, listed: Any, good: npt.NDArray[np.bool_], phash: npt.NDArray, rng: Any
    ) -> dict[str, str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from curate.ledger.schema import fetched_schema

        data, n = self.data, len(keys)
        sha256 = rng.integers(0, 2**64, (n, 4), np.uint64)
        sha256[np.arange(n) % 1000 == 7] = 7
        sides = rng.integers(100, 3000, (2, n))
        of_image = {
            "width": np.full(n, 256),
            "height": np.full(n, 256),
            "original_width": sides[0],
            "original_height": sides[1],
            "sha256": _hexadecimal(sha256),
            "bytes": rng.integers(10_000, 500_000, n),
            "phash": _hexadecimal(phash[:, None]),
            "http_status": np.full(n, 200),
        }
        known = {
            name: pa.array(values, mask=~good) if isinstance(values, np.ndarray) else _where(values, good)
            for name, values in of_image.items()
        }
        known |= {"url": listed["url"], "caption": listed["caption"], "key": keys, "licence": listed["licence"]}
        known["status"] = pa.array(np.where(good, "success", "failed_to_download"))
        known["reason"] = pa.array(np.full(n, "http_404"), mask=good)
        schema = fetched_schema(data.plan.extra_columns)
        columns = [known[f.name].cast(f.type) if f.name in known else pa.nulls(n, f.type) for f in schema]
        pq.write_table(pa.table(columns, schema=schema), data.table(shard), compression="zstd")
        self._tar(shard, keys.filter(pa.array(good)))
        count = int(good.sum())
        facts = {"count": n, "successes": count, "status_dict": {"success": count, "http_404": n - count}}
        data.commit(
            data.fetched_record(shard),
            config=self.fetch_hash,
            inputs={"plan": data.plan.shard_digest(shard)},
            outputs=[data.tar(shard), data.table(shard)],
            facts=facts,
        )
        return _known(data.fetched_digests(shard))

    def _embedded(self, shard: int, keys: Any, captions: Any, inputs: dict[str, str], rng: Any) -> dict[str, str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        data, n, file = self.data, len(keys), self.data.image_vectors(shard)
        if not self._link(f"vectors-{shard % VECTOR_FILES}", n, file):
            np.save(file, self.vectors[shard % VECTOR_FILES][:n])
        similarity = pa.array(rng.normal(0.25, 0.06, n).astype(np.float32))
        named = {"image_path": keys, "key": keys, "caption": captions, "similarity": similarity}
        pq.write_table(pa.table(named), data.metadata(shard), compression="zstd")
        files = [file, data.metadata(shard)]
        made = data.commit(
            data.embedded_record(shard),
            config=self.embed_hash,
            inputs=inputs,
            outputs=files,
            facts={"sample_count": n},
        )
        name = str(file.relative_to(data.root))
        return {name: made["outputs"][name]["sha256"]}

    def _annotated(self, shard: int, name: str, keys: Any, inputs: dict[str, str], values: list[Any]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from curate.annotators.base import column_name, column_specs

        data, annotator = self.data, self.annotators[name]
        columns = {"key": keys}
        for (suffix, spec), value in zip(annotator.columns.items(), values, strict=True):
            columns[column_name(name, suffix, annotator)] = pa.array(value).cast(spec.type)
        pq.write_table(pa.table(columns), data.annotations(name, shard), compression="zstd")
        specs = {column: spec.facts() for column, spec in column_specs({name: annotator}).items()}
        data.commit(
            data.annotations_record(name, shard),
            config=annotator.config,
            inputs=inputs,
            outputs=[data.annotations(name, shard)],
            facts={"count": len(keys), "annotator": annotator.name, "columns": specs, **annotator.facts},
        )

    def _tar(self, shard: int, keys: Any) -> None:
        path = self.data.tar(shard)
        if self.real_tars or not self._link("tar", len(keys), path):
            path.write_bytes(_tar(keys.to_pylist()))

    def _link(self, kind: str, rows: int, path: Path) -> bool:
        """Make `path` a link to a file of this kind; false where it is the first, and is to be written. A file takes
        some thousand links only."""
        first = self.linked.get((kind, rows))
        try:
            if first is not None:
                os.link(first, path)
                return True
        except OSError:
            pass
        self.linked[kind, rows] = path
        return False

    def vector(self, row: int) -> npt.NDArray[np.float32]:
        """That of a row with an image."""
        size = self.data.plan.shards[0].rows  # all but the last have as many
        shard, before = row // size, np.count_nonzero(np.arange(row // size * size, row) % 20)
        return self.vectors[shard % VECTOR_FILES][before].astype(np.float32)


def _tar(keys: list[str]) -> bytes:
    """A tar of samples, as a fetched shard has them: one small image under all keys."""
    from PIL import Image

    from curate.shards.tar import TarWriter

    image, out = io.BytesIO(), io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(image, "JPEG", quality=80)
    tar = TarWriter(out)
    for key in keys:
        tar.add_sample(key, image.getvalue(), "jpg", "a red house", {"key": key, "width": 256, "height": 256})
    tar.close()
    return out.getvalue()


def _language(rng: np.random.Generator, n: int) -> Any:
    import pyarrow as pa

    return pa.array(["en", "de", "ja", "und"]).take(pa.array(rng.choice(4, n, p=[0.6, 0.2, 0.1, 0.1])))


def _hexadecimal(words: npt.NDArray[np.uint64]) -> Any:
    """(n, words) as n texts of hex digits."""
    import pyarrow as pa

    n, digits = len(words), 16 * words.shape[1]
    text = words.astype(">u8").tobytes().hex().encode()
    return pa.StringArray.from_buffers(n, pa.py_buffer(np.arange(n + 1, dtype=np.int32) * digits), pa.py_buffer(text))


def _where(values: Any, good: npt.NDArray[np.bool_]) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.if_else(pa.array(good), values, pa.nulls(len(values), values.type))


if __name__ == "__main__":
    main()
