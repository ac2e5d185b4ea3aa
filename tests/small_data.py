"""A small data folder, written as the stages write it: real images in real tars, tables with the ledger's schemas.

60 rows in 3 shards. Rows fail for several reasons; scores tie, and lack values (null, NaN); the list carries WIDTH,
which SQL takes for our width, a uid and a column with a quote in its name.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from aesthetic.files import atomic
from curate.layout import Data, shard_name
from curate.ledger.schema import FETCHED_COLUMNS, Reason, fetched_schema, make_key
from curate.shards.tar import TarWriter
from curate.store.files import read_json

SHARDS, SHARD_SIZE = 3, 20
EXTRA_COLUMNS = pa.schema(
    [("WIDTH", pa.int64()), ("uid", pa.string()), ("LICENSE", pa.string()), ('od"d', pa.float64()), ("n", pa.string())]
)
REASONS = {3: Reason.DNS, 7: Reason.HTTP_404, 11: Reason.HTTP_404, 17: Reason.NOT_AN_IMAGE}
"""Row of a shard -> why it has no image."""


def uid_of(number: int) -> str:
    """A 128-bit uid, in hex, of the row with this number in the list."""
    return hashlib.md5(str(number).encode()).hexdigest()


def make_data(root: Path) -> Path:
    """Write the folder. Row `number` of the list (0..59), in shard number // 20:

    original size 100 + 20 * number square; similarity number % 10 / 20, null at number % 10 == 9;
    laion_v2 4 + number / 20, null at 24, NaN at 25; phash the same for rows that agree in number // 2.
    """
    for shard in range(SHARDS):
        write_fetched(root, shard)
        write_embedded(root, shard)
        write_annotated(root, shard, "laion_v2", laion_v2)
    return root


def laion_v2(number: int) -> float | None:
    """The score of a row: ascending, but for two rows without a value."""
    return {24: None, 25: math.nan}.get(number, 4 + number / 20)


def write_fetched(root: Path, shard: int, salt: str = "") -> None:
    """Write and commit one fetched shard; another salt gives other captions."""
    rows, successes = [], 0
    tar = root / "fetched" / f"{shard_name(shard)}.tar"
    with atomic(tar) as f:
        out = TarWriter(f)
        for row in range(SHARD_SIZE):
            number = shard * SHARD_SIZE + row
            facts: dict[str, Any] = dict.fromkeys([*EXTRA_COLUMNS.names, *(n for n, _ in FETCHED_COLUMNS)])
            facts |= {
                "url": f"http://example.com/{number}.jpg",
                "caption": None if number == 5 else f"picture {number}{salt}, naïve “ö”",
                "WIDTH": 1000 + number,
                "uid": uid_of(number),
                "LICENSE": "?",
                'od"d': math.nan if number % 2 else number / 3,
                "n": "x" if number == 30 else str(number),
                "key": make_key(shard, row, SHARD_SIZE),
            }
            if reason := REASONS.get(row):
                facts |= {"status": reason.status.value, "reason": reason.value, "error_message": "no image"}
            else:
                data = io.BytesIO()
                Image.new("RGB", (16 + number % 3, 16), (number * 4, 10, 200)).save(data, "JPEG")
                image = data.getvalue()
                facts |= {
                    "status": "success",
                    "width": 16 + number % 3,
                    "height": 16,
                    "original_width": 100 + 20 * number,
                    "original_height": 100 + 20 * number,
                    "sha256": hashlib.sha256(image).hexdigest(),
                    "bytes": len(image),
                    "phash": f"{number // 2:016x}",
                    "http_status": 200,
                }
                clean = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in facts.items()}
                out.add_sample(facts["key"], image, "jpg", facts["caption"], clean)
                successes += 1
            rows.append(facts)
        out.close()
    table = tar.with_suffix(".parquet")
    with atomic(table) as f:
        pq.write_table(pa.Table.from_pylist(rows, schema=fetched_schema(EXTRA_COLUMNS)), f)
    record = root / "fetched" / f"{shard_name(shard)}_stats.json"
    facts = {"count": len(rows), "successes": successes}
    Data(root).commit(record, config="c", inputs={}, outputs=[tar, table], facts=facts)


def fetched_numbers(shard: int) -> list[int]:
    """The numbers of the rows of a shard that have an image."""
    return [shard * SHARD_SIZE + row for row in range(SHARD_SIZE) if row not in REASONS]


def _keys(shard: int) -> list[str]:
    return [make_key(shard, n % SHARD_SIZE, SHARD_SIZE) for n in fetched_numbers(shard)]


def write_embedded(root: Path, shard: int) -> None:
    """Write and commit the metadata of one embedded shard."""
    keys = pa.array(_keys(shard))
    similarity = [None if n % 10 == 9 else n % 10 / 20 for n in fetched_numbers(shard)]
    table = pa.table(
        {
            "image_path": keys,
            "caption": pa.nulls(len(keys), pa.string()),
            "key": keys,
            "similarity": pa.array(similarity, pa.float32()),
        }
    )
    path = root / "embedded" / "metadata" / f"metadata_{shard_name(shard)}.parquet"
    with atomic(path) as f:
        pq.write_table(table, f)
    record = root / "embedded" / "stats" / f"{shard_name(shard)}.json"
    Data(root).commit(record, config="c", inputs=_fetched_digests(root, shard), outputs=[path], facts={})


def write_annotated(root: Path, shard: int, column: str, score: Any) -> None:
    """Write and commit one shard of a score column; `score` maps a row's number to its score."""
    scores = pa.array([score(n) for n in fetched_numbers(shard)], pa.float32(), from_pandas=False)
    path = root / "annotated" / column / f"{shard_name(shard)}.parquet"
    with atomic(path) as f:
        pq.write_table(pa.table({"key": _keys(shard), column: scores}), f)
    record = path.with_suffix(".json")
    facts = {"head": "laion-v2", "columns": {column: {"scale": [1.0, 10.0]}}}
    Data(root).commit(record, config="c", inputs=_fetched_digests(root, shard), outputs=[path], facts=facts)


def write_column(
    root: Path,
    name: str,
    kind: pa.DataType,
    value: Callable[[int], Any],
    facts: Mapping[str, Any] | None = None,
    **spec: Any,
) -> None:
    """Write and commit a column of any type; `value` maps a row's number to its value, `spec` is said of the column,
    `facts` of the whole."""
    for shard in range(SHARDS):
        path = root / "annotated" / name / f"{shard_name(shard)}.parquet"
        values = pa.array(map(value, fetched_numbers(shard)), kind, from_pandas=False)
        with atomic(path) as f:
            pq.write_table(pa.table({"key": _keys(shard), name: values}), f)
        said, inputs = {"annotator": name, "columns": {name: spec}, **(facts or {})}, _fetched_digests(root, shard)
        Data(root).commit(path.with_suffix(".json"), config="c", inputs=inputs, outputs=[path], facts=said)


def _fetched_digests(root: Path, shard: int) -> dict[str, str]:
    record = read_json(root / "fetched" / f"{shard_name(shard)}_stats.json")
    return {name: fact["sha256"] for name, fact in record["outputs"].items()}
