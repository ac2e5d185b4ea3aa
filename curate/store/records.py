"""Records: what a stage says of a shard that is done.

A stage writes the record of a shard last; it names the sha256 of every file that was written and of every file that was
read, so a shard is done exactly when its record still matches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curate.store.files import digest, read_json, sha256_file, write_json


def commit(
    root: Path,
    record: Path,
    *,
    config: str,
    inputs: Mapping[str, str],
    outputs: list[Path],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the record that makes a shard done, last of all its files.

    `config` is the hash of the part of the recipe that the stage reads, `inputs` maps names to sha256, `outputs` are
    the files just written, `facts` what else is worth knowing (counts, times). Paths are kept relative to `root`.
    """
    written = {str(p.relative_to(root)): {"sha256": sha256_file(p), "bytes": p.stat().st_size} for p in outputs}
    value = {**facts, "config": config, "inputs": dict(inputs), "outputs": written}
    write_json(record, {**value, "self": record_digest(value)})
    return value


def read_record(path: Path) -> dict[str, Any]:
    """What a record says; {} where there is none, or where it is none of ours."""
    value = read_json(path)
    return value if isinstance(value, dict) else {}


def record_digest(value: Mapping[str, Any]) -> str:
    """The digest that a record carries of itself (key `self`), so that a changed byte in it is found as well."""
    return digest({k: v for k, v in value.items() if k != "self"})


def recommit(
    root: Path,
    record: Path,
    inputs: Mapping[str, str],
    *,
    config: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a record again for other inputs, or another configuration, from which the same files would come; facts are
    laid over those that it has, and None takes one away."""
    value, facts = read_record(record), facts or {}
    gone = {"config", "inputs", "outputs", "self", *(k for k, v in facts.items() if v is None)}
    kept = {k: v for k, v in {**value, **facts}.items() if k not in gone}
    outputs = [root / name for name in value["outputs"]]
    commit(root, record, config=config or value["config"], inputs=inputs, outputs=outputs, facts=kept)


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
