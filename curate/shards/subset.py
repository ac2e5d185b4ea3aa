"""Files of a shard without some of its images: bytes are copied, rows taken out, and nothing is computed.

Each function does nothing to a file that holds none of these images, so that whoever is killed can do it all again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.files import atomic
from aesthetic.untrusted import open_vectors
from curate.layout import Data
from curate.ledger.rules import DENIED, KEPT, NOT_FETCHED, UNJUDGED
from curate.ledger.schema import KEPT_OF_REMOVED, Reason, Status, forget, forget_removed, removal_note
from curate.shards.tar import CorruptShard, TarWriter, image_member, index_tar, key_of, read_range, tar_members
from curate.store.files import read_json, read_table, write_json

Moved = dict[str, tuple[str, str]]
"""Of a file, of a whole table, or of `selected NAME`: its digest before and after."""


def moved_inputs(inputs: Mapping[str, str], moved: Moved) -> dict[str, str]:
    """Inputs, where what was rewritten is as it is now; what was stale before stays so."""
    return {n: moved[n][1] if n in moved and moved[n][0] == sha256 else sha256 for n, sha256 in inputs.items()}


def kept_aside(data: Data, copy: Path) -> dict[str, Any] | None:
    """What a removal keeps of records, None where nothing is kept."""
    return read_json(data.local(copy)) if data.exists(copy) else None


def keep_aside(data: Data, copy: Path, value: Mapping[str, Any]) -> None:
    """Keep it, on the disk or on the store."""
    write_json(copy, dict(value))
    data.push(copy)


def subset_tar(path: Path, keys: Container[str]) -> bool:
    """Write a tar without the samples of these keys; whether it held any. The bytes of the others are as they were."""
    members = list(tar_members(path))
    left = [(name, place) for name, place in members if key_of(name)[0] not in keys]
    if len(left) == len(members):
        return False
    with open(path, "rb") as f, atomic(path) as out:
        tar = TarWriter(out)
        for name, place in left:
            tar.add(name, read_range(f, place))
        tar.close()
    return True


def subset_table(path: Path, keys: Collection[str], column: str = "key") -> int:
    """Write a table without the rows of these keys; how many rows it has then."""
    table = read_table(path)
    gone = _among(table[column], keys)
    if gone.any():
        _write(path, table.filter(pa.array(~gone)))
    return len(table) - int(gone.sum())


def subset_vectors(data: Data, shard: int, keys: Collection[str]) -> int:
    """Write the vectors of a shard, and their metadata, without the rows of these keys; how many rows there are then.

    The metadata last: until then they say which rows go, and a file of vectors that is as long as what is left has
    been written already.
    """
    path = data.metadata(shard)
    table = read_table(path)
    gone = _among(table["key" if "key" in table.column_names else "image_path"], keys)
    left = len(table) - int(gone.sum())
    if left == len(table):
        return left
    for file in (data.image_vectors(shard), data.text_vectors(shard)):
        if not data.exists(file):
            continue
        vectors = open_vectors(data.local(file))
        if len(vectors) == len(table):
            kept = np.array(vectors[~gone])
            with atomic(file) as f:
                np.save(f, kept)
        elif len(vectors) != left:
            raise CorruptShard(f"{data.shown(file)}: {len(vectors)} rows, and its metadata have {len(table)}")
    _write(path, table.filter(pa.array(~gone)))
    return left


def forget_rows(path: Path, keys: Collection[str], date: str) -> pa.Table:
    """Write a fetched table in which rows of these keys are removed; it, as it is then."""
    table = read_table(path)
    gone = _among(table["key"], keys) & ~_among(table["status"], {Status.REMOVED.value})
    if gone.any():
        said = {"status": Status.REMOVED.value, "reason": Reason.REMOVED.value, "error_message": removal_note(date)}
        assert {*said, "key"} == {*KEPT_OF_REMOVED}
        for i, f in enumerate(table.schema):
            if f.name in said:
                column = pc.if_else(pa.array(gone), pa.scalar(said[f.name], f.type), table.column(i).combine_chunks())
                table = table.set_column(i, f, column)
        table = forget_removed(table)
        _write(path, table)
    return table


def forget_places(path: Path, rows: Container[int]) -> None:
    """Write a file of the plan in which rows (numbers in the file) hold nothing, row group by row group."""
    with pq.ParquetFile(path) as file, atomic(path) as f:
        schema = pa.schema([field.with_nullable(True) for field in file.schema_arrow])
        at = 0
        with pq.ParquetWriter(f, schema, compression="zstd") as writer:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, use_threads=False).cast(schema)
                gone = np.fromiter((at + i in rows for i in range(len(table))), np.bool_, len(table))
                writer.write_table(forget(table, gone), row_group_size=max(1, len(table)))
                at += len(table)


def forget_answers(data: Data, shard: int, keys: Container[str], files: Collection[Path]) -> None:
    """Take the answers about these images out of the logs of a shard. Their tar must still hold them: an answer names
    an image by the sha256 of its bytes."""
    there = [file for file in files if data.exists(file)]
    if not there:
        return
    gone = {hashlib.sha256(image).hexdigest() for image in _images(data.local(data.tar(shard)), keys)}
    for file in there:
        lines = data.local(file).read_bytes().splitlines(keepends=True)
        left = [line for line in lines if image_of_answer(line) not in gone]
        if len(left) < len(lines):
            with atomic(file) as f:
                f.write(b"".join(left))
            data.push(file)


def _images(tar: Path, keys: Container[str]) -> Iterator[bytes]:
    with open(tar, "rb") as f:
        for key, members in index_tar(tar).items():
            if key in keys and (found := image_member(members)) is not None:
                yield read_range(f, found[1])


def image_of_answer(line: bytes) -> str | None:
    """The sha256 of the stored image that a line of a log of answers is about."""
    try:
        return str(json.loads(line)["image"])
    except (ValueError, KeyError, TypeError):  # of a disk that failed
        return None


def _among(column: pa.ChunkedArray, values: Collection[str]) -> np.ndarray:
    found = pc.is_in(column.cast(pa.string()), pa.array([*values], pa.string()))
    return np.asarray(found.to_numpy(zero_copy_only=False), np.bool_)


def _write(path: Path, table: pa.Table) -> None:
    for i, f in enumerate(table.schema):  # words that no row names any more would be written, too
        if pa.types.is_dictionary(f.type):
            table = table.set_column(i, f, table.column(i).cast(f.type.value_type).cast(f.type))
    with atomic(path) as f:
        pq.write_table(table, f, compression="zstd")


# --------------------------------------------------------------------------------------------------------- selections


def forget_verdicts(path: Path, keys: Collection[str]) -> None:
    """Write a selection's verdicts in which the rows of these keys are not fetched."""
    table = read_table(path)
    verdicts = table["verdict"].combine_chunks()
    words = verdicts.dictionary.to_pylist()
    gone = _among(table["key"], keys)
    if NOT_FETCHED not in words:
        words.append(NOT_FETCHED)
    codes = np.where(gone, words.index(NOT_FETCHED), verdicts.indices.to_numpy()).astype(np.int16)
    now = pa.DictionaryArray.from_arrays(codes, pa.array(words, verdicts.type.value_type))
    table = table.set_column(1, table.schema.field("verdict"), now.cast(table.schema.field("verdict").type))
    with atomic(path) as f:
        pq.write_table(table, f, compression="zstd", use_dictionary=["verdict"])


def without_images(
    selection: Mapping[str, Any], verdicts: Mapping[str, int], without: Mapping[str, int], early: Mapping[str, int]
) -> dict[str, Any]:
    """What a selection's record counts, without rows that were removed: they are not fetched.

    verdicts: of these rows.    without: why those had no image that had none;  early: and which rules left them out.
    How many a rule alone rejects is known of those that it was the first to reject; of the others it stays.
    """
    not_fetched, left_out = Counter(selection["not_fetched"]), Counter(selection.get("early", {}))
    not_fetched.subtract(Counter(without) if verdicts.get(NOT_FETCHED) else {})
    left_out.subtract(Counter(early))
    not_fetched[Reason.REMOVED.value] += sum(verdicts.values())
    denied, hidden = Counter(selection.get("denied", {})), verdicts.get(DENIED, 0)
    for column in [*denied]:
        taken = min(denied[column], hidden)
        denied[column], hidden = denied[column] - taken, hidden - taken
    rules = []
    for rule in selection["rules"]:
        n = verdicts.get(rule["name"], 0)
        rules.append({**rule, "rejected": rule["rejected"] - n, "alone": max(0, rule["alone"] - n)})
    facts: dict[str, Any] = {
        "not_fetched": {r: n for r, n in sorted(not_fetched.items(), key=lambda item: (-item[1], item[0])) if n > 0},
        "kept": selection["kept"] - verdicts.get(KEPT, 0),
        "rules": rules,
    }
    if "denied" in selection:
        facts["denied"] = {column: n for column, n in denied.items() if n > 0}
    if "early" in selection:
        facts["early"] = {rule: n for rule, n in left_out.items() if n > 0}
    if "unjudged" in selection:
        facts["unjudged"] = selection["unjudged"] - verdicts.get(UNJUDGED, 0)
    return facts
