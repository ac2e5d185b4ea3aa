"""Reading every file again: does each hold the bytes that its record says, and is each record itself whole?

A tar cut at a member boundary reads as a smaller tar without any error, and a flipped byte in a JPEG as a picture, so
nothing but counts and digests finds them.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from curate.layout import Data
from curate.store.files import json_bytes, read_json, sha256_file
from curate.store.records import invalidate, record_digest

_STAGES = ("plan", "fetched", "embedded", "annotated", "selected", "shards")


@dataclass(frozen=True)
class Damage:
    """One file that is not what its record says, and the record whose removal makes the stage run again."""

    path: Path
    what: str
    record: Path
    repair: str  # what making it again means


def verify(data: Data) -> Iterator[Damage | None]:
    """Check every committed file, yielding a Damage for each bad one and None for each good one."""
    for record, value in _records(data):
        repair = _repair(data, record)
        if not record.exists():
            yield Damage(record, "missing", record, repair)
        elif not _whole(record, value):
            yield Damage(record, "the record itself is damaged", record, repair)
        else:
            yield None
            for name, fact in _outputs(value).items():
                what = _wrong(data.root / name, fact)
                yield Damage(data.root / name, what, record, repair) if what else None


def strays(data: Data) -> list[Path]:
    """Files of the stages that no record names: what a killed run left, or a shard whose record is gone."""
    named = set[Path]()
    for record, value in _records(data):
        named |= {record, *(data.root / name for name in _outputs(value))}
    found = (p for stage in _STAGES for p in (data.root / stage).rglob("*"))
    return sorted(p for p in found if p.is_file() and p not in named)


def unfinished(data: Data) -> dict[str, list[int]]:
    """The planned shards without a record, by stage, for stages that are begun. UserError where the plan is damaged."""
    stages = {"fetched": data.fetched_record, "embedded": data.embedded_record}
    missing = {
        stage: [s.shard for s in data.plan.shards if not record(s.shard).exists()]
        for stage, record in stages.items()
        if (data.root / stage).exists()
    }
    return {stage: shards for stage, shards in missing.items() if shards}


def repair(damages: Sequence[Damage]) -> None:
    """Take back the records of damaged files: the commands of `remedies` then make them again."""
    for damage in damages:
        invalidate(damage.record)


def remedies(data: Data, damages: Sequence[Damage]) -> list[str]:
    """The commands that make damaged files again once their records are taken back. Call it before `repair`."""
    recipe = _yaml(data.recipe)
    own = (recipe.get("select") or {}).get("name")
    columns = recipe.get("columns") or {}
    root = shlex.quote(str(data.root))
    main, others = False, []
    for stage, name in dict.fromkeys(_place(data, d.record) for d in damages):
        if stage == "annotated" and name not in columns:
            others.append(f"tastemaker annotate {root} {name}=SPEC")
        elif stage == "selected" and name != own:
            others.append(f"tastemaker select {root} --name {name}{_rules(data, name)}")
        elif stage == "shards" and name != own:
            others.append(f"tastemaker pack {root} --name {name}")
        else:
            main = True
    return ([again(data)] if main else []) + others


def again(data: Data) -> str:
    """The command that made the data folder, which goes on where it stopped."""
    root = shlex.quote(str(data.root))
    path, plan = next(_records(data))
    if not path.exists() or not _whole(path, plan):
        plan = {}  # its words may be wrong
    command = "curate" if (data.root / "embedded").exists() else "fetch"
    limit = (plan.get("source") or {}).get("--limit")
    parts = [f"tastemaker {command} {shlex.quote(str(plan.get('list', 'LIST')))} --out {root}"]
    if data.recipe.exists():
        parts.append(f"--recipe {shlex.quote(str(data.recipe))}")
    if limit is not None:
        parts.append(f"--limit {limit}")
    return " ".join(parts)


def _rules(data: Data, name: str) -> str:
    """The rules of a selection as settings, where its record can still be read."""
    rules = (read_json(data.root / "selected" / f"{name}.json") or {}).get("rules") or []
    return "".join(" --set " + shlex.quote(f"select.rules.{r['name']}={r['condition']}") for r in rules)


def _place(data: Data, record: Path) -> tuple[str, str]:
    """A record's stage, and the name of the selection or column that it is of."""
    stage, *rest = record.relative_to(data.root).parts
    return stage, rest[0].removesuffix(".json") if stage in ("annotated", "selected", "shards") else ""


def _repair(data: Data, record: Path) -> str:
    stage, name = _place(data, record)
    if record == data.space_record:
        return "the encoder's probes are measured again"
    shard = record.stem.removesuffix("_stats")
    return {
        "plan": "the list is read and cut again",
        "fetched": f"shard {shard} is fetched again, all its rows",
        "embedded": f"shard {shard} is embedded again",
        "annotated": f"{name} of shard {shard} is computed again",
        "selected": f"the rules of {name} are applied again",
        "shards": f"{name} is packed again",
    }[stage]


def _records(data: Data) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every record, and the plan, which is one too; {} for what is not JSON."""
    plan = data.root / "plan" / "plan.json"
    value = read_json(plan)
    yield plan, value if isinstance(value, dict) else {}
    yield from data.records()


def _outputs(value: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The files that a record names, each with its sha256 and, but for the plan's, its size."""
    if "shards_sha256" in value:  # the plan
        files = {value.get("shards", "plan/shards.parquet"): value["shards_sha256"], **value["cut"]}
        return {name: {"sha256": sha256} for name, sha256 in files.items()}
    return value.get("outputs", {})


def _whole(record: Path, value: Mapping[str, Any]) -> bool:
    """Whether a record is byte for byte what was written; a changed space between two words leaves its value."""
    return value.get("self") == record_digest(value) and record.read_bytes() == json_bytes(value)


def _wrong(path: Path, fact: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "missing"
    if size != fact.get("bytes", size):
        return f"{size:,} bytes, {fact['bytes']:,} were written"
    if sha256_file(path) != fact["sha256"]:
        return "other bytes than were written"
    return None


def _yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}
