"""Records: what a stage says of a shard that is done.

A stage writes the record of a shard last; it names the sha256 of every file that was written and of every file that was
read, so a shard is done exactly when its record still matches.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curate.store.files import digest, sha256_file, write_json


def commit(
    root: Path,
    record: Path,
    *,
    config: str,
    inputs: Mapping[str, str],
    outputs: list[Path],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the record that makes a shard done, last of all its files. Of a data folder, `Data.commit` does.

    `config` is the hash of the part of the recipe that the stage reads, `inputs` maps names to sha256, `outputs` are
    the files just written, `facts` what else is worth knowing (counts, times). Paths are kept relative to `root`.
    """
    value = record_value(root, config=config, inputs=inputs, outputs=outputs, facts=facts)
    write_json(record, value)
    return value


def record_value(
    root: Path, *, config: str, inputs: Mapping[str, str], outputs: list[Path], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """What `commit` writes."""
    written = {str(p.relative_to(root)): {"sha256": sha256_file(p), "bytes": p.stat().st_size} for p in outputs}
    value = {**facts, "config": config, "inputs": dict(inputs), "outputs": written}
    return {**value, "self": record_digest(value)}


def read_record(path: Path) -> dict[str, Any]:
    """What a record says; {} where there is none, or where it is none of ours."""
    try:
        return parse_record(path.read_bytes())
    except FileNotFoundError:
        return {}


def parse_record(content: bytes) -> dict[str, Any]:
    """What a record says; {} where it is none of ours."""
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def record_digest(value: Mapping[str, Any]) -> str:
    """The digest that a record carries of itself (key `self`), so that a changed byte in it is found as well."""
    return digest({k: v for k, v in value.items() if k != "self"})


def recommit(root: Path, record: Path, inputs: Mapping[str, str]) -> None:
    """Write a record again for other inputs from which the same files would come."""
    value = read_record(record)
    facts = {k: v for k, v in value.items() if k not in ("config", "inputs", "outputs", "self")}
    outputs = [root / name for name in value["outputs"]]
    commit(root, record, config=value["config"], inputs=inputs, outputs=outputs, facts=facts)


def invalidate(record: Path) -> None:
    """Take a record back before its files are replaced, so that a half-replaced shard is never taken for done."""
    record.unlink(missing_ok=True)


def is_done(root: Path, record: Path, *, config: str, inputs: Mapping[str, str]) -> bool:
    """Whether a shard's record still matches: same configuration, same inputs, every file there at its size.

    Bytes are not read again here (that is `tastemaker verify`), so asking costs a few stats per shard.
    """
    value = read_record(record)
    same = value.get("config") == config and value.get("inputs") == dict(inputs)
    return same and outputs_present(root, value)


def outputs_present(root: Path, value: Mapping[str, Any]) -> bool:
    """Whether every file that a record names is there at the size that it names."""
    for name, fact in value.get("outputs", {}).items():
        try:
            if (root / name).stat().st_size != fact["bytes"]:
                return False
        except FileNotFoundError:
            return False
    return True


def output_digests(value: Mapping[str, Any]) -> dict[str, str]:
    """The files that a record names, each with its sha256: what the next stage notes as its inputs."""
    return {name: fact["sha256"] for name, fact in value["outputs"].items()}
