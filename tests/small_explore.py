"""A data folder of some hundred made-up rows, with all that makes rules hard: no values, NaN, infinities, ties, groups,
texts, flags, rows that are hidden, and rows that early rules left without an image or a value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.files import atomic
from curate.layout import Data
from curate.ledger.neighbours import FACT, write_neighbours
from curate.ledger.schema import Reason, fetched_schema, make_key

SHARD_SIZE = 120
EXTRA_COLUMNS = pa.schema(
    [
        ("WIDTH", pa.int64()),
        ("width", pa.float32()),
        ("LICENSE", pa.string()),
        ('od"d', pa.float64()),
        ("seen", pa.date32()),
    ]
)
EARLY = {"told": "length(caption) > 8", "large": "original_width >= 120", "sharp": "sharpness > 0.1"}
"""Rules that were applied early: on the list, on headers, and by an annotator before the dear ones."""
_WORDS = ["a dog", "a red house", "the old river at dawn", "Kyoto, <b>1961</b>", ""]


def made_up(rows: int, seed: int = 0) -> dict[str, list[Any]]:
    """The values of all rows, by column."""
    rng = np.random.default_rng(seed)

    def some(values: Any, missing: float) -> list[Any]:
        return [None if rng.random() < missing else v for v in values]

    score = np.round(rng.normal(5, 1, rows), 1).astype(np.float32)  # so that values tie
    score[rng.random(rows) < 0.03] = math.nan
    score[rng.random(rows) < 0.01] = math.inf
    groups = rng.integers(0, rows // 3, rows)
    return {
        "caption": some([f"{_WORDS[i]} {n}" if i else _WORDS[0] for n, i in enumerate(rng.integers(0, 5, rows))], 0.05),
        "WIDTH": some(rng.integers(50, 3000, rows).tolist(), 0.1),
        "width": some(rng.random(rows).tolist(), 0.1),
        "LICENSE": some(rng.choice(["?", "cc-by", "CC0"], rows).tolist(), 0.2),
        'od"d': some(np.where(rng.random(rows) < 0.2, np.nan, rng.normal(0, 1e6, rows)).tolist(), 0.1),
        "original_width": rng.integers(60, 900, rows).tolist(),
        "original_height": rng.integers(60, 900, rows).tolist(),
        "sha256": [f"{n:064x}" for n in np.where(rng.random(rows) < 0.1, 7, np.arange(rows))],
        "phash": some([f"{g:016x}" for g in rng.integers(0, rows // 2, rows)], 0.02),
        "similarity": some(rng.normal(0.25, 0.06, rows).astype(np.float32).tolist(), 0.08),
        "score": some(score.tolist(), 0.05),
        "safe": some((rng.random(rows) < 0.7).tolist(), 0.1),
        "unsafe": some(rng.random(rows).astype(np.float32).tolist(), 0.05),
        "cluster": some(rng.integers(0, 12, rows).tolist(), 0.05),
        "dup": some([f"g{g}" for g in groups], 0.4),
        "count": some(rng.integers(0, 200, rows).astype(np.uint8).tolist(), 0.05),
        "half": some(rng.random(rows).tolist(), 0.05),
        "sharpness": rng.random(rows).astype(np.float32).tolist(),
        "denied": some((rng.random(rows) < 0.04).tolist(), 0.2),
    }


def make_explored(root: Path, rows: int = 900, seed: int = 0, early: bool = False) -> Data:
    """Write the folder. early: as `EARLY` leaves it."""
    data, values = Data(root), made_up(rows, seed)
    for shard in range(-(-rows // SHARD_SIZE)):
        numbers = range(shard * SHARD_SIZE, min(rows, (shard + 1) * SHARD_SIZE))
        write_shard(data, values, shard, numbers, early)
    return data


def write_shard(data: Data, values: dict[str, list[Any]], shard: int, numbers: range, early: bool) -> None:
    """One shard of all tables."""
    lines, images = list[dict[str, Any]](), list[int]()
    for n in numbers:
        schema = fetched_schema(EXTRA_COLUMNS)
        line = dict.fromkeys(schema.names) | {"url": f"http://example.com/{n}.jpg", "caption": values["caption"][n]}
        line |= {"WIDTH": values["WIDTH"][n], "source.width": values["width"][n], "LICENSE": values["LICENSE"][n]}
        line |= {'od"d': values['od"d'][n], "key": make_key(shard, n % SHARD_SIZE, SHARD_SIZE)}
        sizes = {name: values[name][n] for name in ("original_width", "original_height")}
        left = next((rule for rule in ("told", "large") if early and not _early(rule, values, n)), None)
        if left is not None:
            line |= {"status": "rejected_early", "reason": left, **(sizes if left == "large" else {})}
        elif n % 17 == 3:
            reason = (Reason.DNS, Reason.HTTP_404, Reason.NOT_AN_IMAGE)[n % 3]
            line |= {"status": reason.status.value, "reason": reason.value}
        else:
            line |= {"status": "success", "width": 64, "height": 64, **sizes, "bytes": 1000 + n}
            line |= {"sha256": values["sha256"][n], "phash": values["phash"][n]}
            images.append(n)
        lines.append(line)
    applied = {"early": {name: EARLY[name] for name in ("told", "large")}} if early else {}
    facts = {"count": len(lines), "successes": len(images), **applied}
    table = data.table(shard)
    inputs = write(
        data,
        table,
        data.fetched_record(shard),
        pa.Table.from_pylist(lines, schema=fetched_schema(EXTRA_COLUMNS)),
        facts,
    )

    def seen(name: str) -> Callable[[int], Any]:
        """The values of a dear annotator: none of those that `sharp` left out."""
        return lambda n: values[name][n] if not early or _early("sharp", values, n) else None

    left = {"early": EARLY} if early else {}
    keys = [make_key(shard, n % SHARD_SIZE, SHARD_SIZE) for n in images]
    with_vectors = [i for i, n in enumerate(images) if not early or _early("sharp", values, n)]
    embedded = pa.table(
        {
            "image_path": [keys[i] for i in with_vectors],
            "key": [keys[i] for i in with_vectors],
            "similarity": pa.array([values["similarity"][images[i]] for i in with_vectors], pa.float32()),
        }
    )
    write(
        data,
        data.metadata(shard),
        data.embedded_record(shard),
        embedded,
        {"sample_count": len(with_vectors), **left},
        inputs,
    )
    specs: list[tuple[str, pa.DataType, Callable[[int], Any], dict[str, Any], dict[str, Any]]] = [
        ("score", pa.float32(), seen("score"), {"scale": [0.0, 10.0]}, left),
        ("safe", pa.bool_(), seen("safe"), {}, left),
        ("unsafe", pa.float32(), lambda n: values["unsafe"][n], {"unsafe": True, "scale": [0, 1]}, {}),
        ("cluster", pa.int32(), lambda n: values["cluster"][n], {"unit": "cluster"}, {}),
        ("count", pa.uint8(), lambda n: values["count"][n], {}, {}),
        ("half", pa.float64(), lambda n: values["half"][n], {}, {}),
        ("sharpness", pa.float32(), lambda n: values["sharpness"][n], {}, {}),
        ("denied", pa.bool_(), lambda n: values["denied"][n], {"hidden": True}, {}),
        ("dup", pa.string(), lambda n: values["dup"][n], {}, {FACT: _neighbours(data, values)}),
    ]
    for name, kind, value, spec, facts in specs:
        made = pa.table({"key": keys, name: pa.array([value(n) for n in images], kind, from_pandas=False)})
        said = {"annotator": name, "columns": {name: spec}, **facts}
        write(data, data.annotations(name, shard), data.annotations_record(name, shard), made, said, inputs)


def write(
    data: Data, path: Path, record: Path, table: pa.Table, facts: dict[str, Any], inputs: dict[str, str] | None = None
) -> dict[str, str]:
    """Write and commit one file of a shard; its sha256, for those that are made from it."""
    with atomic(path) as f:
        pq.write_table(table, f)
    made = data.commit(record, config="c", inputs=inputs or {}, outputs=[path], facts=facts)
    return {name: fact["sha256"] for name, fact in made["outputs"].items()}


def _early(rule: str, values: dict[str, list[Any]], n: int) -> bool:
    """Whether an early rule leaves a row, as Python has it."""
    if rule == "told":
        return values["caption"][n] is not None and len(values["caption"][n]) > 8
    return bool(values["original_width"][n] >= 120 if rule == "large" else values["sharpness"][n] > 0.1)


_written: dict[Path, str] = {}


def _neighbours(data: Data, values: dict[str, list[Any]]) -> str:
    """Write which members of `dup` are near each other: each and the next of its group; the file's sha256."""
    file = data.index("dup") / "neighbours.parquet"
    if file not in _written:
        of_group = dict[str, list[int]]()
        for n, group in enumerate(values["dup"]):
            if group is not None:
                of_group.setdefault(group, []).append(int(make_key(n // SHARD_SIZE, n % SHARD_SIZE, SHARD_SIZE)))
        pairs = [pair for keys in of_group.values() for pair in itertools.pairwise(keys)]
        file.parent.mkdir(parents=True, exist_ok=True)
        _written[file] = write_neighbours(file, np.zeros((0, 2), np.uint64), np.array(pairs, np.uint64))
    return _written[file]
