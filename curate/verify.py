"""Reading every file again: does each hold the bytes that its record says, and is each record itself whole?

A tar cut at a member boundary reads as a smaller tar without any error, and a flipped byte in a JPEG as an image, so
nothing but counts and digests finds them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from curate.layout import ANNOTATED, EMBEDDED, FETCHED, PACKED, PLAN, SELECTED, STAGES, Data
from curate.ledger.schema import OPT_OUTS
from curate.sources.dataset import packed_files
from curate.store.files import json_bytes, sha256_file
from curate.store.index import COMPACTED
from curate.store.records import read_record, record_digest

_REPAIR = {
    PLAN: "the list is read and cut again",
    FETCHED: "shard {shard} is fetched again, all its rows",
    EMBEDDED: "shard {shard} is embedded again",
    ANNOTATED: "{name} of shard {shard} is computed again",
    SELECTED: "the rules of {name} are applied again",
    PACKED: "{name} is packed again",
}


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
        stage, name = data.stage_of(record)
        repair = _REPAIR[stage].format(name=name, shard=record.stem.removesuffix("_stats"))
        if record == data.space_record:
            repair = "the encoder's probes are measured again"
        if not data.exists(record):
            yield Damage(record, "missing", record, repair)
        elif not _is_whole(data.local(record), value):
            yield Damage(record, "the record itself is damaged", record, repair)
        else:
            yield None
            for file, expected in _outputs(value).items():
                what = _difference(data.local(data.root / file), expected)
                data.release(data.root / file)
                yield Damage(data.root / file, what, record, repair) if what else None


def verify_packed(folder: Path) -> Iterator[Damage | None]:
    """As `verify`, of packed shards alone, wherever they lie and whatever the folder is called. Shards that a copy
    lacks wholly are no damage: `missing_shards` names them."""
    manifest = folder / "manifest.json"
    value, lacking = read_record(manifest), {Path(name).stem for name in missing_shards(folder)}
    if not _is_whole(manifest, value):
        yield Damage(manifest, "the record itself is damaged", manifest, "copy it again")
        return
    yield None
    for name, expected in packed_files(folder).items():
        if name.partition(".")[0] not in lacking:
            what = _difference(folder / name, expected)
            yield Damage(folder / name, what, manifest, "copy it again") if what else None


def missing_shards(folder: Path) -> list[str]:
    """The tars that were packed of which a copy of packed shards holds no file."""
    files = packed_files(folder)
    there = {name.partition(".")[0] for name in files if (folder / name).is_file()}
    return [name for name in files if name.endswith(".tar") and name.partition(".")[0] not in there]


def strays(data: Data) -> list[Path]:
    """Files of the stages that no record names: what a killed run left, or a shard whose record is gone.

    What annotators keep between runs (`Data.index`, `Data.answers`) they clear themselves.
    """
    named = set[Path]()
    for record, value in _records(data):
        named |= {record, *(data.root / name for name in _outputs(value))}
    found = (p for stage in STAGES for p in data.store.walk(data.root / stage) if p.name != COMPACTED)
    kept = tuple(f"{p}/" for name in data.annotated() for p in (data.index(name), data.answers(name, 0).parent))
    return sorted(p for p in found if p not in named and not str(p).startswith(kept))


def unfinished(data: Data) -> dict[str, list[int]]:
    """The planned shards without a record, by stage, for stages that are begun. UserError where the plan is damaged."""
    stages = {FETCHED: data.fetched_record, EMBEDDED: data.embedded_record}
    missing = {
        stage: [s.shard for s in data.plan.shards if not data.exists(record(s.shard))]
        for stage, record in stages.items()
        if data.store.names(data.root / stage)
    }
    return {stage: shards for stage, shards in missing.items() if shards}


def repair(data: Data, damages: Sequence[Damage]) -> None:
    """Invalidate the records of damaged files: the commands of `remedies` then make them again."""
    data.invalidate(*(damage.record for damage in damages))


def remedies(data: Data, damages: Sequence[Damage]) -> list[str]:
    """The commands that make damaged files again once their records are gone. Call it before `repair`."""
    try:
        recipe = yaml.safe_load(data.local(data.recipe).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, yaml.YAMLError):
        recipe = None
    recipe = recipe if isinstance(recipe, dict) else {}
    own = (recipe.get("select") or {}).get("name")
    columns = recipe.get("columns") or {}
    root = shlex.quote(str(data))
    main, others = False, []
    for stage, name in dict.fromkeys(data.stage_of(d.record) for d in damages):
        if stage == ANNOTATED and name == OPT_OUTS:
            others.append(f"tastemaker check-opt-outs {root}")
        elif stage == ANNOTATED and name not in columns:
            others.append(f"tastemaker annotate {root} {name}=SPEC")
        elif stage == SELECTED and name != own:
            rules = data.record(data.selection_record(name)).get("rules") or []  # where it can still be read
            settings = [shlex.quote(f"select.rules.{r['name']}={r['condition']}") for r in rules]
            others.append(" --set ".join([f"tastemaker select {root} --name {name}", *settings]))
        elif stage == PACKED and name != own:
            others.append(f"tastemaker pack {root} --name {name}")
        else:
            main = True
    return ([command_again(data)] if main else []) + others


def command_again(data: Data) -> str:
    """The command that made the data folder, which goes on where it stopped."""
    root = shlex.quote(str(data))
    plan = read_record(data.local(data.plan_record))
    if not _is_whole(data.plan_record, plan):
        plan = {}  # its words may be wrong
    command = "curate" if data.store.names(data.space.parent) else "fetch"
    first, last = plan, (plan.get("added") or [plan])[-1]  # the first list may have changed or be gone since
    source = last.get("source") or {}
    limit = source.get("--limit")
    parts = [f"tastemaker {command} {shlex.quote(str(last.get('list', 'LIST')))} --out {root}"]
    if last is not first:
        parts.append("--add")
        own = {name: value for name, value in source.items() if name in first["source"] and name != "--limit"}
        changed = [name for name, value in own.items() if value != first["source"][name]]
        parts += [f"--set {shlex.quote(f'{name}={json.dumps(own[name], ensure_ascii=False)}')}" for name in changed]
    if data.exists(data.recipe):
        parts.append(f"--recipe {shlex.quote(data.shown(data.recipe))}")
    if limit is not None:
        parts.append(f"--limit {limit}")
    return " ".join(parts)


def _records(data: Data) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every record of every stage, the plan first, whether it is there or not."""
    yield data.plan_record, read_record(data.local(data.plan_record))
    for stage in STAGES[1:]:
        for record in data.records(stage):
            yield record, read_record(data.local(record))
    for name in data.annotated():
        for record in (path for path in data.store.walk(data.index(name)) if path.suffix == ".json"):
            yield record, read_record(data.local(record))


def _outputs(value: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The files that a record names, each with its sha256 and, but for the plan's, its size."""
    if "shards_sha256" in value:  # the plan
        files = {value.get("shards", "plan/shards.parquet"): value["shards_sha256"], **value["cut"]}
        return {name: {"sha256": sha256} for name, sha256 in files.items()}
    return value.get("outputs", {})


def _is_whole(record: Path, value: Mapping[str, Any]) -> bool:
    """Whether a record is byte for byte what was written; a changed space between two words leaves its value."""
    return value.get("self") == record_digest(value) and record.read_bytes() == json_bytes(value)


def _difference(path: Path, expected: Mapping[str, Any]) -> str | None:
    """How a file differs from what was written; None where it does not."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "missing"
    if size != expected.get("bytes", size):
        return f"{size:,} bytes, {expected['bytes']:,} were written"
    if sha256_file(path) != expected["sha256"]:
        return "other bytes than were written"
    return None
