"""Records: what a stage says of a shard that is done.

A stage writes the record of a shard last; it names the sha256 of every file that was written and of every file that was
read, so a shard is done exactly when its record still matches.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curate.store.files import digest, sha256_file


def record_value(
    root: Path, *, config: str, inputs: Mapping[str, str], outputs: list[Path], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """What `RecordIndex.commit` writes."""
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


def output_digests(value: Mapping[str, Any]) -> dict[str, str]:
    """The files that a record names, each with its sha256: what the next stage notes as its inputs."""
    return {name: fact["sha256"] for name, fact in value["outputs"].items()}
