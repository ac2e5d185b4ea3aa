"""A data folder: where each file of each stage lies. Every path and every pattern of one is here.

plan/         plan.json                   the record;  shards.parquet: the shards;  what of the list was cut or copied
fetched/      NNNNN.tar, NNNNN.parquet    images and rows;  NNNNN_stats.json: the record (img2dataset's layout)
embedded/     img_emb/, text_emb/         vectors;  metadata/: similarities;  stats/: records (clip-retrieval's layout)
annotated/N./ NNNNN.parquet, NNNNN.json   columns of an annotator and their record;  index/, answers/: what it keeps
selected/     NAME.parquet, NAME.json     verdicts and their record
shards/NAME/  NNNNN.tar, NNNNN.parquet    the chosen images;  manifest.json: the record
report/NAME/  sheet.png, scores.png
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from aesthetic.errors import UserError
from curate.store.files import clear, read_json
from curate.store.records import invalidate, output_digests

if TYPE_CHECKING:
    import duckdb

    from curate.sources.plan import Plan

PLAN, FETCHED, EMBEDDED, ANNOTATED, SELECTED, PACKED = "plan", "fetched", "embedded", "annotated", "selected", "shards"
"""The folders of the stages, in the order in which they are made."""

STAGES = (PLAN, FETCHED, EMBEDDED, ANNOTATED, SELECTED, PACKED)

_RECORDS = {
    PLAN: "plan.json",
    FETCHED: "*_stats.json",
    EMBEDDED: "stats/*.json",
    ANNOTATED: "*/*.json",
    SELECTED: "*.json",
    PACKED: "*/manifest.json",
}


def shard_name(shard: int) -> str:
    """How files of a shard are called: five digits, more where five do not suffice."""
    return f"{shard:05d}"


@dataclass(frozen=True)
class Data:
    """The paths of one data folder; opens nothing by itself."""

    root: Path

    # plan/

    @property
    def plan_folder(self) -> Path:
        return self.root / PLAN

    @property
    def plan_record(self) -> Path:
        return self.root / PLAN / "plan.json"

    # fetched/: img2dataset's layout

    def tar(self, shard: int) -> Path:
        return self.root / FETCHED / f"{shard_name(shard)}.tar"

    def table(self, shard: int) -> Path:
        return self.root / FETCHED / f"{shard_name(shard)}.parquet"

    def fetched_record(self, shard: int) -> Path:
        return self.root / FETCHED / f"{shard_name(shard)}_stats.json"

    def starts(self, shard: int) -> Path:
        """A byte for each time that the shard was begun; gone once it is committed."""
        return self.root / FETCHED / f".{shard_name(shard)}.starts"

    # embedded/: clip-retrieval's layout

    def image_vectors(self, shard: int) -> Path:
        return self.root / EMBEDDED / "img_emb" / f"img_emb_{shard_name(shard)}.npy"

    def text_vectors(self, shard: int) -> Path:
        return self.root / EMBEDDED / "text_emb" / f"text_emb_{shard_name(shard)}.npy"

    def metadata(self, shard: int) -> Path:
        return self.root / EMBEDDED / "metadata" / f"metadata_{shard_name(shard)}.parquet"

    def embedded_record(self, shard: int) -> Path:
        return self.root / EMBEDDED / "stats" / f"{shard_name(shard)}.json"

    def embed_starts(self, shard: int) -> Path:
        """A byte for each time that this run began to embed the shard; the next run sweeps it away as scratch."""
        return self.root / EMBEDDED / f".{shard_name(shard)}.starts.tmp"

    @property
    def space(self) -> Path:
        return self.root / EMBEDDED / "space.json"

    @property
    def space_record(self) -> Path:
        return self.root / EMBEDDED / "stats" / "space.json"

    # annotated/NAME/: the columns of an annotator

    def annotations(self, name: str, shard: int) -> Path:
        return self.root / ANNOTATED / name / f"{shard_name(shard)}.parquet"

    def annotations_record(self, name: str, shard: int) -> Path:
        return self.root / ANNOTATED / name / f"{shard_name(shard)}.json"

    def annotated(self) -> list[str]:
        """The names under which there are columns."""
        return _folders(self.root / ANNOTATED)

    def index(self, name: str) -> Path:
        """A folder for what an annotator that reads the whole table keeps between runs, such as pairs."""
        return self.root / ANNOTATED / name / "index"

    def answers(self, name: str, shard: int) -> Path:
        """What a server was paid to say of a shard's images; it stays when everything else is made anew."""
        return self.root / ANNOTATED / name / "answers" / f"{shard_name(shard)}.jsonl"

    def old_columns(self) -> list[str]:
        """Columns in `scored/`, where they were before there was `annotated/`, that nobody has computed anew."""
        return [name for name in _folders(self.root / "scored") if name not in self.annotated()]

    # selected/, shards/, report/

    def verdicts(self, name: str) -> Path:
        return self.root / SELECTED / f"{name}.parquet"

    def selection_record(self, name: str) -> Path:
        return self.root / SELECTED / f"{name}.json"

    def selections(self) -> list[str]:
        """The names of the selections that are there."""
        return [record.stem for record in self.records(SELECTED)]

    def packed(self, name: str) -> Path:
        return self.root / PACKED / name

    def manifest(self, name: str) -> Path:
        return self.root / PACKED / name / "manifest.json"

    def packs(self) -> list[str]:
        """The names of the selections that are packed."""
        return [name for name in _folders(self.root / PACKED) if self.manifest(name).exists()]

    def sheet(self, name: str) -> Path:
        return self.root / "report" / name / "sheet.png"

    def column_sheet(self, name: str) -> Path:
        """What an annotator says, in images; a selection of the same name has a folder beside it."""
        return self.root / "report" / f"{name}.png"

    def charts(self, name: str) -> Path:
        return self.root / "report" / name / "scores.png"

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def rates(self) -> Path:
        """What the last run measured, for `tastemaker plan`."""
        return self.root / "logs" / "rates.json"

    # what is there

    def shards(self, record: Callable[[int], Path]) -> list[int]:
        """The shards that have a record, in order: `data.shards(data.fetched_record)`."""
        example = record(0)
        before, after = example.name.split(shard_name(0))
        folder = example.parent
        names = (p.name.removeprefix(before).removesuffix(after) for p in folder.glob(f"{before}*{after}"))
        return sorted(int(name) for name in names if re.fullmatch(r"\d{5,}", name))

    def records(self, stage: str) -> list[Path]:
        """The records of a stage, in the order of their names: of its shards, of its selections, of its packs."""
        found = (self.root / stage).glob(_RECORDS[stage])
        return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(self.root).parts))

    def stage_of(self, record: Path) -> tuple[str, str]:
        """The stage of a record, and the name of the selection or columns that it is of ("" for shards alone)."""
        stage, *rest = record.relative_to(self.root).parts
        return stage, rest[0].removesuffix(".json") if stage in (ANNOTATED, SELECTED, PACKED) else ""

    @cached_property
    def plan(self) -> Plan:
        """The shard plan; UserError where the folder has none."""
        from curate.sources.plan import load_plan

        plan = load_plan(self)
        if plan is None:
            raise UserError(
                f"{self.root} is not a data folder: it has no plan. "
                f"`tastemaker curate LIST --out {self.root}` makes one."
            )
        return plan

    @cached_property
    def ledger(self) -> duckdb.DuckDBPyRelation:
        """One DuckDB relation over all tables, a line per row of the list: `.df()`, `.filter(...)`."""
        from curate.ledger.view import open_ledger

        return open_ledger(self).table("ledger")

    def fetched_digests(self, shard: int) -> dict[str, str] | None:
        """The sha256 of a fetched shard's files, from its record; None where it is not committed."""
        record = read_json(self.fetched_record(shard))
        return output_digests(record) if record and "outputs" in record else None

    def invalidate_from(self, stage: str) -> None:
        """Invalidate the records of a stage (source, fetch, images or embed) and of those after it, as far as they are
        a shard's. Files stay until they are replaced."""
        for made in (EMBEDDED, ANNOTATED) if stage == "embed" else (FETCHED, EMBEDDED, ANNOTATED):
            for record in self.records(made):
                invalidate(record)
        self.space.unlink(missing_ok=True)

    # what goes, where all is made anew; what somebody else has put beside it stays

    def clear_plan(self) -> None:
        """Remove the plan, whole or not."""
        clear(self.plan_folder, r"plan\.json|shards(-[0-9a-f]{8})?\.parquet|\d{5,}(-\d{5,})?\.parquet|list-\d{5,}-.*")

    def clear_shards(self) -> None:
        """Remove what the stages from fetch to annotate wrote."""
        embedded, annotated = self.root / EMBEDDED, self.root / ANNOTATED
        clear(self.root / FETCHED, r"\d{5,}(\.tar|\.parquet|_stats\.json)|\.\d{5,}\.starts")
        clear(embedded / "img_emb", r"img_emb_\d{5,}\.npy")
        clear(embedded / "text_emb", r"text_emb_\d{5,}\.npy")
        clear(embedded / "metadata", r"metadata_\d{5,}\.parquet")
        clear(embedded / "stats", r"\d{5,}\.json|space\.json")
        clear(embedded, r"space\.json")
        for name in self.annotated():
            shutil.rmtree(self.index(name), ignore_errors=True)
            clear(annotated / name, r"\d{5,}\.(parquet|json)")
        clear(annotated, "")


def _folders(parent: Path) -> list[str]:
    if not parent.is_dir():
        return []
    return sorted(p.name for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))
