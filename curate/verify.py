"""Reading every file again: does each hold the bytes that its record says, and is each record itself whole?

A tar cut at a member boundary reads as a smaller tar without any error, and a flipped byte in a JPEG as a picture, so
nothing but counts and digests finds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate.data import Data
from curate.store import record_digest, sha256_file, uncommit


@dataclass(frozen=True)
class Damage:
    """One file that is not what its record says, and the record whose removal makes the stage run again."""

    path: Path
    what: str
    record: Path


def verify(data: Data) -> Iterator[Damage | None]:
    """Check every committed file, yielding a Damage for each bad one and None for each good one."""
    plan = data.root / "plan" / "plan.json"
    for record, value in data.records():
        if value.get("self") != record_digest(value):
            yield Damage(record, "the record is damaged", record)
            continue
        yield None
        for name, fact in value["outputs"].items():
            what = _wrong(data.root / name, fact)
            yield Damage(data.root / name, what, record) if what else None
    data.plan.check()  # a damaged plan is refused by name when it is loaded
    assert plan.exists()


def _wrong(path: Path, fact: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "missing"
    if size != fact["bytes"]:
        return f"{size:,} bytes, {fact['bytes']:,} were written"
    if sha256_file(path) != fact["sha256"]:
        return "other bytes than were written (same length)"
    return None


def repair(damages: list[Damage]) -> None:
    """Take back the records of damaged files: the same `curate`, `select` and `pack` commands then make them again."""
    for damage in damages:
        uncommit(damage.record)
